"""A saved model is what `from_pretrained` loads, and remembers its template."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import MODELS, SIZES, state_of
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from dualoptim import UnlearnArgs
from dualoptim.config.optimizers import kind_of
from dualoptim.models import export
from dualoptim.models.export import export_model
from dualoptim.models.launch import release, start_accelerator, training
from dualoptim.models.load import load_model


def exported(tiny, folder, **changes):
    args = UnlearnArgs(model=str(tiny), data="demo", **changes)
    loaded = load_model(args, start_accelerator(args))
    export_model(loaded, folder, "# a card\n")
    return loaded


def test_weights_tokenizer_and_card_are_written(tiny, tmp_path):
    loaded = exported(tiny, tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    weights = loaded.model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in again.state_dict().items())
    assert AutoTokenizer.from_pretrained(tmp_path / "model").get_vocab() == loaded.tokenizer.get_vocab()
    assert (tmp_path / "model" / "README.md").read_text() == "# a card\n"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]  # nothing beside it


def test_tied_weights_are_written_once(tiny, tmp_path):
    loaded = exported(tiny, tmp_path / "model")
    assert loaded.model.get_output_embeddings().weight is loaded.model.get_input_embeddings().weight
    assert "lm_head.weight" not in state_of(tmp_path / "model")
    with safe_open(tmp_path / "model" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_template_is_remembered(tiny, tmp_path):
    exported(tiny, tmp_path / "model", template="llama2", answer_tag="=")
    assert json.loads((tmp_path / "model" / "prompt.json").read_text()) == {
        "template": "llama2",
        "tags": {"question_start": "[INST] ", "question_end": " [/INST]", "answer": "="},
    }


def test_an_earlier_model_is_replaced_whole(tiny, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "stale.bin").write_text("x")
    exported(tiny, tmp_path / "model")
    assert not (tmp_path / "model" / "stale.bin").exists()
    assert (tmp_path / "model" / "model.safetensors").is_file()


@pytest.fixture
def compiling(monkeypatch):
    """A launch with `--dynamo_backend eager`, and with regional compilation if the test says so."""

    def start(regional):
        for state in (AcceleratorState, GradientState, PartialState):
            state._shared_state.clear()
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
        monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", str(regional))

    yield start
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()


@pytest.mark.parametrize("regional", [False, True])
@pytest.mark.parametrize("changes", [{}, {"use_lora": True}], ids=["weights", "adapter"])
def test_a_compiled_model_is_saved_under_its_own_names(changes, regional, tiny, tmp_path, compiling):
    compiling(regional)
    args = UnlearnArgs(model=str(tiny), data="demo", **changes)
    loaded = load_model(args, start_accelerator(args))
    export_model(loaded, tmp_path / "before", "a card")
    with training(loaded, args, kind_of(args).build(args)) as engine, torch.no_grad():
        assert any("_orig_mod" in name for name, _ in engine.model.named_modules())
        trained = [weight for weight in engine.model.parameters() if weight.requires_grad]
        for weight in trained:
            weight.add_(1)
    export_model(loaded, tmp_path / "after", "a card")
    before, after = state_of(tmp_path / "before"), state_of(tmp_path / "after")
    assert before.keys() == after.keys()
    assert len(after) == len(trained)
    assert all(torch.allclose(after[name], before[name] + 1) for name in after)
    release(loaded)


def test_a_model_that_would_not_load_again_replaces_nothing(tiny, tmp_path, monkeypatch):
    loaded = exported(tiny, tmp_path / "model")
    state = {f"_orig_mod.{name}": value for name, value in loaded.model.state_dict().items()}
    monkeypatch.setattr(loaded.model, "state_dict", lambda **_: dict(state))
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    with pytest.raises(RuntimeError, match=r"model\.tmp: what was saved would not load as the model that was trained"):
        export_model(loaded, tmp_path / "model", "a card")
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before


# ------------------------------------------------------------------------------------------------- files, tensor by tensor

MIXTURE = MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=3)


@pytest.mark.parametrize(("name", "size"), [*((name, "50GB") for name in MODELS), ("mixtral", "50GB"), ("qwen2", "20KB")])
def test_files_that_are_written_tensor_by_tensor_have_the_bytes_of_the_librarys(name, size, tmp_path, monkeypatch):
    """In whatever order tensors come; experts, which transformers joins in memory, are apart again."""
    model = MODELS[name]() if name in MODELS else MixtralForCausalLM(MIXTURE)
    model.save_pretrained(tmp_path / "library", max_shard_size=size)
    monkeypatch.setattr(export, "FILE_BYTES", size)
    (tmp_path / "ours").mkdir()
    outlines = export._outlines(model, torch.float32)
    state = model.state_dict()
    export._write_weights(model, tmp_path / "ours", outlines, ((name, state[name]) for name in list(outlines)[::-1]))
    files = {path.name: path for path in (tmp_path / "ours").iterdir()}
    weights = [path for path in (tmp_path / "library").iterdir() if path.suffix == ".safetensors"]
    assert files.keys() == {path.name for path in weights} | ({"model.safetensors.index.json"} if size == "20KB" else set())
    assert all(files[path.name].read_bytes() == path.read_bytes() for path in weights)
    if size == "20KB":
        ours, other = (json.loads((tmp_path / way / "model.safetensors.index.json").read_text()) for way in ("ours", "library"))
        assert ours["weight_map"] == other["weight_map"]


def test_types_of_other_widths_lie_as_the_library_has_them(tmp_path):
    model = MODELS["llama"]()
    state = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    state |= {
        "seen": torch.tensor([True, False, True]),
        "steps": torch.tensor([[1, 2, 3]]),
        "a": torch.ones(3, dtype=torch.uint8),
    }
    save_file(state, tmp_path / "library.safetensors", metadata={"format": "pt"})
    outlines = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
    export._write_weights(model, tmp_path, outlines, iter(state.items()))
    ours = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(ours[name], tensor) and ours[name].dtype == tensor.dtype for name, tensor in state.items())
