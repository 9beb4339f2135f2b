"""The reference that is kept on disk says what a live frozen model would."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from support import arguments, difference, launch, state_of
from transformers import (
    AutoTokenizer,
    CohereConfig,
    CohereForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    NanoChatConfig,
    NanoChatForCausalLM,
)

from dualoptim import InputError, run
from dualoptim.data.prompts import Example
from dualoptim.method.objectives import FORGET, RETAIN
from dualoptim.method.scores import Reference, score
from dualoptim.models import reference as reference_module
from dualoptim.models.launch import start_accelerator
from dualoptim.models.load import load_model
from dualoptim.models.reference import Frozen, check_reference
from dualoptim.models.store import Store, text_key

PAIRS = ("NPO+KL", "DPO+GD", "UNDIAL+KLQ", "RMU+EMBED")
# near the reference the gradient of KL and EMBED is all rounding, which Adam would turn into a share of the rate
SGD = {"forget_optimizer": "sgd", "retain_optimizer": "sgd", "learning_rates": (1e-2,)}


def live(monkeypatch):
    """Have every reference computed by a frozen copy of the whole model instead, and count how often."""
    calls = []

    class Live:
        def __init__(self, frozen, loaded, objective):
            self.loaded, self.objective = dataclasses.replace(loaded, model=frozen), objective

        def __call__(self, examples, device):
            calls.append(self.objective.reference)
            with torch.no_grad():
                scores = score(self.loaded.model, self.loaded.batch(examples), self.objective.layer)
            return Reference(scores.log_prob, scores.logits.__getitem__, scores.hidden)

    def init(self, loaded, *_):
        self.loaded, self.frozen = loaded, copy.deepcopy(loaded.model).eval()

    monkeypatch.setattr(Frozen, "__init__", init)
    monkeypatch.setattr(Frozen, "score", lambda *_: None)
    monkeypatch.setattr(Frozen, "reader", lambda self, objective: Live(self.frozen, self.loaded, objective))
    return calls


@pytest.mark.parametrize("changes", [{}, {"use_lora": True}, {"mask": False}], ids=["all weights", "LoRA", "question scored"])
def test_equal_to_a_live_reference(changes, taught, tmp_path, monkeypatch):
    common = {"forget_losses": PAIRS, "max_steps": 5, "retain_freq": 1, **SGD, **changes}
    ours = run(arguments(taught, tmp_path / "ours", "dual-adamw", **common))
    with monkeypatch.context() as patch:
        calls = live(patch)
        theirs = run(arguments(taught, tmp_path / "live", "dual-adamw", **common))
    assert {"log_prob", "logits", "hidden"} == set(calls)
    for one, other in zip(ours.tasks, theirs.tasks, strict=True):
        for record, expected in zip(one.log, other.log, strict=True):
            assert record["loss"] == pytest.approx(expected["loss"], rel=1e-5, abs=1e-5), one.losses
            assert record["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4, abs=1e-5), one.losses
    assert ours.tasks[0].log[3]["loss"] != ours.tasks[0].log[1]["loss"]  # KL is not zero any more
    assert not (tmp_path / "live" / "reference").exists()


def test_a_second_run_reads_what_the_first_has_stored(taught, tmp_path, monkeypatch):
    args = arguments(taught, tmp_path, "dual-adamw", forget_losses=("NPO+KL",), max_steps=6)
    first = run(args)
    files = sorted((tmp_path / "reference").rglob("*.safetensors"))
    assert len(files) == 2  # log-probabilities and hidden states
    stamps = [path.stat().st_mtime_ns for path in files]
    scored = []
    original = reference_module.score
    monkeypatch.setattr(reference_module, "score", lambda *a: scored.append(a) or original(*a))
    other_rate = dataclasses.replace(args, learning_rates=(5e-4,), overwrite=True)
    second = run(other_rate)
    assert len(scored) == 2  # the check of the head before anything is written, once with its input
    assert sorted((tmp_path / "reference").rglob("*.safetensors")) == files
    assert [path.stat().st_mtime_ns for path in files] == stamps
    assert second.tasks[0].log[0]["loss"] == first.tasks[0].log[0]["loss"]
    more = run(dataclasses.replace(args, max_steps=12, learning_rates=(2e-4,)))
    assert len(list((tmp_path / "reference").rglob("*.safetensors"))) > len(files)  # only the texts that are new
    stored = [Store(folder) for folder in (tmp_path / "reference").iterdir()]
    assert sum(len(store.files) for store in stored) == len(list((tmp_path / "reference").rglob("*.safetensors")))
    assert more.tasks[0].log[0]["loss"] == first.tasks[0].log[0]["loss"]


def test_other_weights_and_other_texts_are_never_mixed_up(tiny, taught, tmp_path):
    texts = [Example([3, 4, 5, 6], 2), Example([3, 4, 5, 6], 1), Example([7, 8, 9], 2)]
    assert len({text_key(text) for text in texts}) == 3
    objective = FORGET["NPO"].resolved({"beta": None, "gamma": None}, 0)
    found = []
    for model in (tiny, taught):
        args = arguments(model, tmp_path, "dual-adamw")
        accelerator = start_accelerator(args)
        loaded = load_model(args, accelerator)
        frozen = Frozen(loaded, tmp_path / "reference", [objective], 2)
        frozen.score(loaded, objective, texts)
        values = frozen.reader(objective)(texts, accelerator.device).log_prob
        with torch.no_grad():
            assert torch.allclose(values, score(loaded.model, loaded.batch(texts)).log_prob, atol=1e-5)
        # in another order and one by one
        again = torch.cat([frozen.reader(objective)([text], accelerator.device).log_prob for text in reversed(texts)])
        assert torch.equal(again.sort().values, values.sort().values)
        found.append(values)
    assert not torch.allclose(*found)
    assert len(list((tmp_path / "reference").iterdir())) == 2


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 2000}
CHANGING = {
    "a cap": (Gemma2ForCausalLM, Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.05)),
    "a cap far off": (NanoChatForCausalLM, NanoChatConfig(**SMALL, num_key_value_heads=2, final_logit_softcapping=30.0)),
    "a factor": (CohereForCausalLM, CohereConfig(**SMALL, num_key_value_heads=2, logit_scale=0.25)),
    "a divisor": (GraniteForCausalLM, GraniteConfig(**SMALL, num_key_value_heads=2, logits_scaling=7.0)),
    "a factor of the body": (
        FalconH1ForCausalLM,
        FalconH1Config(**SMALL, num_key_value_heads=2, lm_head_multiplier=3.0, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8),
    ),
}


def changing(name, folder, taught):
    torch.manual_seed(0)
    kind, config = CHANGING[name]
    kind(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(taught).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", CHANGING)
def test_what_a_model_does_with_its_logits_is_done_to_the_reference(name, taught, tmp_path):
    args = arguments(changing(name, tmp_path / "model", taught), tmp_path, "dual-adamw", attn_implementation="eager")
    loaded = load_model(args, start_accelerator(args))
    head = loaded.model.get_output_embeddings()
    with torch.no_grad():
        head.weight *= 20  # as large as logits are of a model that has learned something
    texts = [Example([3, 4, 5, 6], 2), Example([7, 8, 9], 1)]
    frozen = Frozen(loaded, tmp_path / "reference", [RETAIN["KL"]], 2)
    frozen.score(loaded, RETAIN["KL"], texts)
    with torch.no_grad():
        expected = score(loaded.model, loaded.batch(texts)).logits
        head.weight.zero_()  # training moves it, and not the reference
    found = frozen.reader(RETAIN["KL"])(texts, torch.device("cpu")).logits
    assert torch.allclose(found(slice(None)), expected, rtol=1e-5, atol=1e-4)
    assert torch.allclose(found(slice(2, 3)), expected[2:3], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("use", ["train", "measure"])
@pytest.mark.parametrize("name", CHANGING)
def test_a_frozen_head_has_two_bytes_a_weight_in_16_bits(sixteen_bits, name, use, tiny, tmp_path):
    """And says what the model does, whose products are in 16 bits whichever way its weights lie."""
    args = arguments(changing(name, tmp_path / "model", tiny), tmp_path, "dual-adamw", attn_implementation="eager")
    loaded = load_model(args, start_accelerator(args), use)
    texts = [Example([3, 4, 5, 6], 2), Example([7, 8, 9], 1)]
    frozen = Frozen(loaded, tmp_path / "reference", [RETAIN["KL"]], 2)
    assert {weight.dtype for weight in frozen._tail.head.parameters()} == {torch.bfloat16}
    frozen.score(loaded, RETAIN["KL"], texts)
    with torch.no_grad(), loaded.autocast():
        expected = score(loaded.model, loaded.batch(texts)).logits.float()
    found = frozen.reader(RETAIN["KL"])(texts, torch.device("cpu")).logits(slice(None))
    assert float((found - expected).norm()) <= 1e-2 * float(expected.norm())


@pytest.mark.parametrize(("name", "lora"), [("a cap", False), ("a factor", False), ("a divisor", True)])
def test_runs_on_such_a_model_are_those_with_a_live_reference(name, lora, taught, tmp_path, monkeypatch):
    model = changing(name, tmp_path / "model", taught)
    common = {"forget_losses": ("UNDIAL+KL",), "max_steps": 5, "retain_freq": 1, "use_lora": lora, **SGD}
    common["attn_implementation"] = "eager"
    ours = run(arguments(model, tmp_path / "ours", "dual-adamw", **common)).tasks[0]
    with monkeypatch.context() as patch:
        calls = live(patch)
        theirs = run(arguments(model, tmp_path / "live", "dual-adamw", **common)).tasks[0]
    assert set(calls) == {"logits"}
    for record, expected in zip(ours.log, theirs.log, strict=True):
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-5, abs=1e-5)
        assert record["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4, abs=1e-5)


def test_logits_that_cannot_be_rebuilt_are_refused(tiny, tmp_path):
    """Here they depend on the text once more after the head."""
    args = arguments(tiny, tmp_path, "dual-adamw")
    loaded = load_model(args, start_accelerator(args))

    class Reminded(type(loaded.model)):
        def forward(self, input_ids, **options):
            output = super().forward(input_ids, **options)
            output.logits = output.logits + input_ids.sum()
            return output

    loaded.model.__class__ = Reminded
    check_reference(loaded, [FORGET["NPO"]], tmp_path)
    with pytest.raises(InputError, match=r"Reminded changes its logits after the output head, .* no reference here"):
        check_reference(loaded, [RETAIN["KL"]], tmp_path)


def test_the_first_model_stays_the_reference_with_fix_ref_model(taught, tmp_path):
    """In the second task NPO's loss starts at 2/beta log 2 if the reference is the model before it."""
    start = 2 / 0.1 * 0.6931471805599453
    common = {"forget_losses": ("NPO+GD",), "task_list": (1, 2), "max_steps": 4, "forget_freq": 2, "learning_rates": (1e-3,)}
    moving = run(arguments(taught, tmp_path / "moving", "dual-adamw", **common)).tasks
    fixed = run(arguments(taught, tmp_path / "fixed", "dual-adamw", fix_ref_model=True, **common)).tasks
    assert [record["loss"] for record in moving[0].log] == [record["loss"] for record in fixed[0].log]
    assert moving[1].log[0]["loss"] == pytest.approx(start, rel=1e-5)
    assert abs(fixed[1].log[0]["loss"] - start) > 1e-3
    assert len(list((tmp_path / "moving" / "reference").iterdir())) == 2
    assert len(list((tmp_path / "fixed" / "reference").iterdir())) == 1


@pytest.mark.launch
@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "LoRA"])
def test_under_zero3_on_two_processes_it_is_that_of_one(lora, taught, tmp_path):
    pytest.importorskip("deepspeed")
    changes = {"forget_losses": ("NPO+KL", "DPO+AP", "UNDIAL+GD", "RMU+EMBED"), "max_steps": 6, "use_lora": lora, **SGD}
    alone = run(arguments(taught, tmp_path / "one", "dual-adamw", **changes))
    start = taught if not lora else alone.tasks[0].model  # an adapter is drawn anew; other pairs move it elsewhere
    args = arguments(taught, tmp_path / "two", "dual-adamw", batch_size=2, **changes)
    launch("zero3", {"runs": [dataclasses.asdict(args)]})
    for task in alone.tasks:
        folder = tmp_path / "two" / Path(task.folder).relative_to(tmp_path / "one")
        largest, mean = difference(state_of(folder / "model"), state_of(task.model))
        assert largest <= 2e-6, task.losses
        assert mean <= 2e-8, task.losses
        assert task.model == start or difference(state_of(task.model), state_of(start))[0] > 1e-4, task.losses
        for record, line in zip(task.log, (folder / "log.jsonl").read_text().splitlines(), strict=True):
            assert record["loss"] == pytest.approx(json.loads(line)["loss"], rel=1e-5, abs=1e-5), task.losses
    stores = list((tmp_path / "two" / "reference").iterdir())
    assert all(len(list(store.iterdir())) == 2 * len({p.name[:4] for p in store.iterdir()}) for store in stores)  # each a half
