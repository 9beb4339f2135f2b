"""Which weights `--trainable` means, and what a run with it moves, keeps and saves."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file
from support import FOLDER, arguments, launch, same_end, state_of, stop_and_resume
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from dualoptim import FinetuneArgs, InputError, UnlearnArgs, run
from dualoptim.config.optimizers import Moments
from dualoptim.finetune import finetune
from dualoptim.memory_plan import plan
from dualoptim.models.launch import start_accelerator
from dualoptim.models.memory import Demand, Division, Shape, divide
from dualoptim.models.peaks import activation_bytes, loading
from dualoptim.models.trainable import check_reach, chosen_weights

DOWN = "layers.(0|1).mlp.down_proj"


def llama(**changes):
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 30}
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**{**sizes, "num_hidden_layers": 12, **changes}))


def chosen(model, trainable):
    return chosen_weights(UnlearnArgs(model="a/model", data="demo", trainable=trainable), model)


def test_a_pattern_is_found_in_names_and_last_counts_layers():
    model = llama()
    assert chosen(model, None) == [name for name, _ in model.named_parameters()]
    assert chosen(model, "layers.(5|6|7).mlp.down_proj") == [f"model.layers.{n}.mlp.down_proj.weight" for n in (5, 6, 7)]
    assert {name.split(".")[2] for name in chosen(model, "last:2")} == {"10", "11"}
    assert len(chosen(model, "last:12")) == len(list(model.named_parameters())) - 3  # embeddings, the final norm, the head
    with torch.device("meta"):
        gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=3, n_head=2, vocab_size=30))
    assert {name.split(".")[2] for name in chosen(gpt2, "last:1")} == {"2"}


def test_a_tied_weight_goes_by_both_of_its_names():
    for name in ("lm_head", "embed_tokens"):
        assert chosen(llama(tie_word_embeddings=True), name) == ["model.embed_tokens.weight", "lm_head.weight"]
        assert len(chosen(llama(tie_word_embeddings=False), name)) == 1


@pytest.mark.parametrize(
    ("trainable", "message"),
    [
        (
            "h.*.c_proj",
            "--trainable h.*.c_proj: no weight of a/model has such a name; they are called model.embed_tokens.weight, "
            "model.layers.0.self_attn.q_proj.weight, model.layers.0.self_attn.k_proj.weight",
        ),
        ("last:13", "--trainable last:13: the model has 12 layers that can be told apart; give last:1 to last:12"),
    ],
)
def test_what_no_weight_is_called_is_refused_with_some_names(trainable, message):
    with pytest.raises(InputError) as error:
        chosen(llama(), trainable)
    assert str(error.value).startswith(message)


def test_a_layer_that_nothing_reaches_is_refused():
    args = UnlearnArgs(model="a/model", data="demo", forget_losses=("RMU+EMBED",), trainable="last:4")
    check_reach(args, llama(), 8)
    with pytest.raises(InputError, match=r"model\.layers\.8\..* and all others lie behind layer 7, which the objective reads"):
        check_reach(args, llama(), 7)


@pytest.mark.parametrize("trainable", ["h.0", "last:4"])
def test_a_mistake_is_said_before_anything_is_written(tiny, tmp_path, trainable):
    kinds = (UnlearnArgs, run), (FinetuneArgs, finetune)
    for kind, call in kinds:
        with pytest.raises(InputError, match=f"--trainable {trainable}"):
            call(kind(model=str(tiny), data="demo", trainable=trainable, output_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("optim", ["dual-adamw", "dual-adamw-plus"])
def test_a_run_moves_these_weights_alone_and_goes_on_at_the_same_bits(tiny, tmp_path, optim):
    args = arguments(tiny, tmp_path / "whole", optim, trainable=DOWN, save_every=3, max_steps=7)
    model = run(args).tasks[0].model
    before, after = state_of(tiny), state_of(model)
    names = {f"model.layers.{n}.mlp.down_proj.weight" for n in (0, 1)}
    assert {name for name in before if not torch.equal(before[name], after[name])} == names
    assert before.keys() == after.keys()
    (checkpoint,) = (tmp_path / "whole" / FOLDER / "checkpoint").iterdir()
    kept = {name.partition(":")[2] for path in checkpoint.glob("part-*.safetensors") for name in load_file(path)}
    assert kept == names
    stop_and_resume(args, tmp_path, 5)
    same_end(tmp_path / "whole", tmp_path / "parts")
    resumed = dataclasses.replace(args, trainable="last:1", resume="newest")
    with pytest.raises(InputError, match=r"--trainable was .* and is last:1; give the same value"):
        run(resumed)


def test_what_did_not_train_trains_again_and_is_measured_like_the_rest(tiny, tmp_path):
    """The gradient of every weight counts in --mia-gradnorm, after unlearning as before."""
    measured = {"eval": True, "mia_gradnorm": True, "eval_rows": 2, "max_new_tokens": 2, "max_steps": 1}
    rate = {"learning_rates": (1e-12,), "weight_decay": 0.0}  # which moves nothing
    result = run(arguments(tiny, tmp_path, "dual-adamw", trainable=DOWN, **measured, **rate)).tasks[0]
    rows = [(result.folder / name / "forget.jsonl").read_text().splitlines() for name in ("eval_before", "eval")]
    norms = [[json.loads(row)["gradnorm"] for row in own] for own in rows]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


# ------------------------------------------------------------------------------------------------------- the memory plan


def test_the_plan_counts_what_trains_and_what_lies_beside_it(tiny):
    args = UnlearnArgs(model=str(tiny), data="demo", trainable="last:1")
    planned, whole = (plan(one, start_accelerator(one)) for one in (args, dataclasses.replace(args, trainable=None)))
    (step,) = (one.device for one in planned.phases if one.name == "first step")
    trains = sum(value.numel() for name, value in state_of(tiny).items() if ".layers.2." in name)
    assert planned.shape.trainable == trains
    assert planned.shape.total == whole.shape.total
    assert step.weights == 4 * whole.shape.total
    assert step.gradients == 4 * trains
    assert step.optimizer == 4 * 4 * trains
    assert (planned.shape.reached, whole.shape.reached) == (1, 3)


def test_what_lies_beside_weights_that_train_by_hand():
    shape = Shape(quantizable=800, other=200, frozen=1000, layers=4, hidden=8, intermediate=16, vocabulary=50)
    demand = Demand(moments=Moments(2), tokens=1, scored=1, partly=True)
    plain, zero = Division(half=True), Division(2, stage=2, deepspeed=True, half=True)
    assert divide(shape, plain, demand)[0].weights == 4 * 2000
    assert divide(shape, plain, dataclasses.replace(demand, partly=False))[0].weights == 4 * 1000 + 2 * 1000  # an adapter
    device, host = divide(shape, zero, demand)
    assert (device.weights, device.masters, host.masters) == (2 * 2000, 4 * 1000 // 2, 4 * 1000)  # what is rounded is kept
    assert divide(shape, zero, dataclasses.replace(demand, stored=2))[1].masters == 0
    assert divide(shape, dataclasses.replace(zero, stage=3), demand)[1].masters == 4 * 1000 // 2
    assert [loading(shape, zero, dataclasses.replace(demand, stored=size))[0].weights for size in (4, 2)] == [8000, 4000]
    few = activation_bytes(dataclasses.replace(shape, reached=1), 10, half=False, checkpointing=False)
    assert 4 * few == activation_bytes(shape, 10, half=False, checkpointing=False)


# ----------------------------------------------------------------------- several processes; in 32 bits: test_distributed.py


@pytest.mark.launch
@pytest.mark.parametrize("config", ["zero2", "zero3"])
def test_what_does_not_train_is_saved_as_it_was_loaded_where_the_launch_rounds_it(config, tiny, tmp_path):
    pytest.importorskip("deepspeed")
    args = arguments(tiny, tmp_path / "two", "dual-adamw", batch_size=2, trainable=DOWN, max_steps=2, threads=1)
    launch(config, {"runs": [dataclasses.asdict(args)]}, precision="bf16")
    ours, before = state_of(tmp_path / "two" / FOLDER / "model"), state_of(tiny)
    moved = {name for name in before if not torch.equal(before[name], ours[name])}
    assert moved == {f"model.layers.{n}.mlp.down_proj.weight" for n in (0, 1)}
    assert any(not torch.equal(value, value.bfloat16().float()) for value in before.values()), "rounding would not show"
