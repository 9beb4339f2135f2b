"""A model with what feeds it: batches in its layout, and the arguments that it resolves."""

from types import SimpleNamespace

import torch
from support import examples

from dualoptim import EvalArgs, UnlearnArgs
from dualoptim.config.saved import to_dict
from dualoptim.data.stream import Stream
from dualoptim.method.scores import Reference
from dualoptim.models.launch import start_accelerator
from dualoptim.models.load import load_model
from dualoptim.models.loaded import Layout, MicroBatches, autocast

CPU = torch.device("cpu")


def test_a_layout_packs_or_pads():
    texts = examples(3)
    packed, padded = Layout(CPU, packed=True)(texts), Layout(CPU, packed=False)(texts)
    assert packed.input_ids.shape == (1, sum(len(text.ids) for text in texts))
    assert padded.input_ids.shape == (3, max(len(text.ids) for text in texts))
    assert torch.equal(packed.labels, padded.labels)
    twice = [texts[0], texts[0]]
    assert Layout(CPU, packed=True, shares=True)(twice).input_ids.shape[1] == len(texts[0].ids)


def test_what_a_run_resolves_is_readable_by_config(tiny, tmp_path):
    args = UnlearnArgs(model=str(tiny), data="demo", output_dir=str(tmp_path))
    loaded = load_model(args, start_accelerator(args))
    tags = {"question_start_tag": "Question: ", "question_end_tag": "\n", "answer_tag": "Answer:"}
    changed = {name: value for name, value in loaded.resolved(args).items() if value != to_dict(args).get(name)}
    assert changed.keys() == {"template", "processes", *tags}
    assert changed["template"] == "qa"
    own = UnlearnArgs(model=str(tiny), forget_file="rows.csv", output_dir=str(tmp_path))
    assert loaded.resolved(own)["data"] is None  # a default would be read as given beside the file
    hub = EvalArgs(model=str(tiny), output_dir=str(tmp_path))
    assert loaded.resolved(hub)["data"] == "locuslab/TOFU"


def test_micro_batches_bring_what_the_frozen_model_says():
    asked = []

    def reference(texts, device):
        asked.append((len(texts), device))
        return Reference(log_prob=torch.zeros(1))

    stream = Stream("forget", 6, lambda index, epoch: [examples(6)[index]], 1, batch_size=2, accumulation=3)
    batches = list(MicroBatches(stream, Layout(CPU, packed=True), reference)(0))
    assert [batch.num_sequences for batch in batches] == [2, 2, 2]
    assert asked == []  # read when it is asked for
    assert batches[1].reference().log_prob is not None
    assert asked == [(2, CPU)]
    assert next(MicroBatches(stream, Layout(CPU, packed=True))(0)).reference is None


def test_products_are_in_16_bits_where_the_launch_says_so():
    weight = torch.ones(2, 2)
    for precision, dtype in (("bf16", torch.bfloat16), ("no", torch.float32)):
        with autocast(SimpleNamespace(mixed_precision=precision, device=CPU)):
            assert (weight @ weight).dtype == dtype
