"""8-bit optimizer states and low-rank adapters: what they hold, what they save, and that they learn."""

import dataclasses
import shutil

import pytest
import torch
from conftest import state_of
from test_distributed import arguments, launch
from test_resume import FOLDER, same_end, stop_and_resume

from dualoptim import EvalArgs, InputError, UnlearnArgs, run
from dualoptim.data import demo
from dualoptim.evaluate import evaluate
from dualoptim.models.load import load_policy, start_accelerator
from dualoptim.method.dual import decay_groups, measure_state, set_phase
from dualoptim.unlearn import optimizer_of

BAND = 0.05


@pytest.mark.parametrize("optim", ["dual-adamw", "adamw-alternate", "adamw"])
def test_8_bit_stays_within_a_band_of_32_over_60_steps(small_args, tmp_path, optim):
    """The band: at every step |loss8 - loss32| <= 0.05 (1 + loss32)."""
    losses = {}
    for bits in (32, 8):
        args = dataclasses.replace(
            small_args, optim=optim, optim_bits=bits, max_steps=60, num_epochs=20, output_dir=str(tmp_path / str(bits))
        )
        losses[bits] = [record["loss"] for record in run(args).tasks[0].log]
    assert len(losses[8]) == 60
    assert losses[8] != losses[32]
    for ours, reference in zip(losses[8], losses[32], strict=True):
        assert abs(ours - reference) <= BAND * (1 + reference)


@pytest.mark.parametrize(("quantize_embeddings", "share"), [(False, 0.75), (True, 0.99)])
@pytest.mark.parametrize(
    ("kind", "bytes_32", "bytes_8"), [("dual-adamw", 16, 4.2), ("dual-adamw-plus", 24, 6.2), ("adamw", 8, 2.1)]
)
def test_bytes_per_parameter(kind, bytes_32, bytes_8, quantize_embeddings, share):
    model, _ = demo.tiny_model(0)
    optimizer = optimizer_of(UnlearnArgs(optim=kind, optim_bits=8))(decay_groups(model, 0.01, 8, quantize_embeddings))
    for phase in ("forget", "retain"):
        set_phase(optimizer, phase, 1e-3)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    size = measure_state(optimizer)
    assert size.bytes_32 / size.parameters_32 == pytest.approx(bytes_32, abs=0.1)
    assert bytes_8 - 0.2 < size.bytes_8 / size.parameters_8 < bytes_8
    assert size.parameters_8 / (size.parameters_8 + size.parameters_32) == pytest.approx(share, abs=0.02)
    embedding = model.get_input_embeddings().weight
    assert any(value.dtype == torch.uint8 for value in optimizer.state[embedding].values() if torch.is_tensor(value)) == (
        quantize_embeddings
    )


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("kind", ["dual-adamw", "dual-adamw-plus"])
def test_a_step_in_pieces_is_the_step(kind, bits, monkeypatch):
    """A CPU takes large tensors piece by piece, which need not fill the last one, nor its last block."""
    found = []
    for piece in (10**9, 1024):
        monkeypatch.setattr("dualoptim.method.plus.PIECE", piece)
        generator = torch.Generator().manual_seed(0)
        shapes = ((70, 99), (512,), (4, 1024), (3, 4099))
        parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
        groups = [{"params": parameters, "weight_decay": 0.01, "decayed": True, "bits": bits}]
        optimizer = optimizer_of(UnlearnArgs(optim=kind, optim_bits=bits))(groups)
        for phase in ("forget", "retain", "forget", "retain", "retain"):
            set_phase(optimizer, phase, 1e-3)
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
        state = [optimizer.state[parameter] for parameter in parameters]
        assert set(optimizer.state) == set(parameters)
        found.append((parameters, state, getattr(optimizer, "largest_update", None)))
    (whole, expected, largest), (pieces, state, same) = found
    assert largest == same
    for one, other in zip(whole, pieces, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(expected, state, strict=True):
        assert (int(other["forget/step"]), int(other["retain/step"])) == (2, 3)
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[key])), key


def test_8_bit_resume_is_exact(tiny, tmp_path):
    for optim in ("dual-adamw", "dual-adamw-plus", "adamw"):
        place = tmp_path / optim
        args = arguments(tiny, place / "whole", optim, optim_bits=8, save_every=3, max_steps=9)
        run(args)
        stop_and_resume(args, place, 4)
        first, second = state_of(place / "whole" / FOLDER / "model"), state_of(place / "parts" / FOLDER / "model")
        assert all(torch.equal(first[name], second[name]) for name in first), optim


@pytest.fixture(scope="module")
def adapted(taught, tmp_path_factory):
    """Two tasks unlearned with an adapter, evaluated on a few rows."""
    args = UnlearnArgs(
        model=str(taught), data="demo", learning_rates=(2e-3,), use_lora=True, task_list=(1, 2), max_steps=20, eval_rows=4,
        retain_freq=1, output_dir=str(tmp_path_factory.mktemp("lora")),
    )  # fmt: skip
    return args, run(args)


def test_the_adapter_alone_is_saved_and_says_where_its_base_lies(adapted, taught):
    _, result = adapted
    model = result.tasks[0].model
    assert {path.name for path in model.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "prompt.json", "README.md", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    assert all("lora_" in name for name in state_of(model))
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(model).config.model_type == "llama"


def test_the_adapter_forgets_and_the_next_task_goes_on_with_it(adapted):
    _, result = adapted
    first, second = result.tasks
    assert first.after["sets"]["forget"]["probability"] < 0.7 * first.before["sets"]["forget"]["probability"]
    one, two = state_of(first.model), state_of(second.model)
    assert any(not torch.equal(one[name], two[name]) for name in one)
    assert first.log[0]["state_bytes_per_parameter"] == pytest.approx(16, abs=0.05)  # of what trains


def test_evaluation_and_training_take_an_adapter_folder(adapted, tmp_path):
    args, result = adapted
    last = result.tasks[1]
    merged = evaluate(EvalArgs(model=str(last.model), data="demo", task=2, eval_rows=4, output_dir=str(tmp_path / "eval")))
    for name, scores in merged["sets"].items():
        assert scores["probability"] == pytest.approx(last.after["sets"][name]["probability"], rel=1e-4)
    on = dataclasses.replace(args, model=str(last.model), task_list=(3,), eval=False, max_steps=2)
    with_adapter = run(dataclasses.replace(on, output_dir=str(tmp_path / "on")))
    assert state_of(with_adapter.tasks[0].model).keys() == state_of(last.model).keys()
    without = run(dataclasses.replace(on, use_lora=False, output_dir=str(tmp_path / "merged")))
    assert not any("lora_" in name for name in state_of(without.tasks[0].model))


def test_an_adapter_folder_without_weights_is_refused_in_one_line(adapted, tmp_path):
    args, result = adapted
    shutil.copytree(result.tasks[0].model, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"adapter: its adapter cannot be loaded .* give the whole folder") as error:
        run(dataclasses.replace(args, model=str(tmp_path / "adapter"), output_dir=str(tmp_path / "out")))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_gradient_checkpointing_changes_no_gradient_of_an_adapter(adapted, tmp_path):
    args, result = adapted
    again = run(
        dataclasses.replace(args, gradient_checkpointing=True, task_list=(1,), eval=False, output_dir=str(tmp_path / "out"))
    )
    for ours, reference in zip(again.tasks[0].log, result.tasks[0].log, strict=True):
        assert ours["grad_norm"] > 0
        assert ours["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-4)


def test_lora_resume_is_exact(tiny, tmp_path):
    changes = {"use_lora": True, "lora_dropout": 0.1, "save_every": 3, "max_steps": 9}
    args = arguments(tiny, tmp_path / "whole", "dual-adamw", **changes)
    run(args)
    stop_and_resume(args, tmp_path, 4)
    same_end(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("config", ["zero2", "zero3"])
def test_lora_resume_is_exact_under_deepspeed_and_keeps_the_adapter_alone(config, tiny, tmp_path):
    pytest.importorskip("deepspeed")
    changes = {"use_lora": True, "lora_dropout": 0.1, "save_every": 3, "batch_size": 2}
    whole = arguments(tiny, tmp_path / "whole", "dual-adamw", max_steps=9, **changes)
    first = dataclasses.replace(whole, output_dir=str(tmp_path / "parts"), max_steps=4)
    launch(config, {"runs": [dataclasses.asdict(whole), dataclasses.asdict(first)]})
    (tmp_path / "parts" / FOLDER / "trained.json").unlink()  # as if it had been interrupted there
    rest = dataclasses.replace(whole, output_dir=str(tmp_path / "parts"), resume="newest")
    launch(config, {"runs": [dataclasses.asdict(rest)]})
    same_end(tmp_path / "whole", tmp_path / "parts")
    saved = sum(path.stat().st_size for path in (tmp_path / "whole" / FOLDER / "checkpoint").rglob("*") if path.is_file())
    base = sum(path.stat().st_size for path in tiny.glob("*.safetensors"))
    assert saved < base, "a checkpoint holds the frozen weights"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"load_in_4bit": True}, "--load-in-4bit freezes the weights, so that only an adapter can learn; add --use-lora"),
        ({"quantize_embeddings": True}, "--quantize-embeddings has no effect with --optim-bits 32; give --optim-bits 8"),
        ({"lora_rank": 0}, "--lora-rank 0 is out of range; give 1 or more"),
        ({"lora_alpha": 0}, "--lora-alpha 0 is out of range"),
        ({"lora_dropout": 1.0}, "--lora-dropout 1 is out of range"),
        ({"lora_target_modules": ()}, "--lora-target-modules is empty"),
    ],
)
def test_flags_that_make_no_sense(changes, message):
    with pytest.raises(InputError) as error:
        UnlearnArgs(**changes)
    assert message in str(error.value)


def test_modules_that_are_not_there_and_4_bit_without_cuda(tiny, tmp_path):
    args = UnlearnArgs(model=str(tiny), data="demo", use_lora=True, output_dir=str(tmp_path))
    accelerator = start_accelerator(args)
    with pytest.raises(InputError, match=r"--lora-target-modules query: not in this model; choose from .*q_proj"):
        load_policy(dataclasses.replace(args, lora_target_modules=("query",)), accelerator)
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="--load-in-4bit needs CUDA"):
            load_policy(dataclasses.replace(args, load_in_4bit=True), accelerator)
    policy = load_policy(dataclasses.replace(args, lora_target_modules=("q_proj", "v_proj")), accelerator)
    trained = {name.split(".")[-4] for name, parameter in policy.model.named_parameters() if parameter.requires_grad}
    assert trained == {"q_proj", "v_proj"}
