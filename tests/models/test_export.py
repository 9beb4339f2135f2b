"""A saved model is what `from_pretrained` loads, and remembers its template."""

import json

import torch
from safetensors import safe_open
from support import state_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from dualoptim import UnlearnArgs
from dualoptim.models.export import export_model
from dualoptim.models.launch import start_accelerator
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
