"""A model folder that is not what `save_pretrained` wrote ends in one line that names it, before anything is written."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import (
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    XLNetConfig,
    XLNetLMHeadModel,
)

from dualoptim import EvalArgs, InputError, UnlearnArgs, run
from dualoptim.data import demo
from dualoptim.evaluate import evaluate
from dualoptim.memory_plan import dry_run


def short(model: Path, folder: Path, **changes) -> UnlearnArgs:
    given = {"model": str(model), "data": "demo", "eval": False, "max_steps": 1, "batch_size": 2, "output_dir": str(folder)}
    return UnlearnArgs(**(given | changes))


def measured(model: Path, folder: Path, **changes) -> EvalArgs:
    given = {"model": str(model), "data": "demo", "eval_rows": 2, "max_new_tokens": 2, "output_dir": str(folder)}
    return EvalArgs(**(given | changes))


@pytest.fixture
def model(tiny, tmp_path) -> Path:
    return shutil.copytree(tiny, tmp_path / "model")


def refused(action, args, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        action(args)
    assert "\n" not in str(error.value)
    assert not Path(str(args.output_dir)).exists()


def change(file: Path, **values) -> None:
    file.write_text(json.dumps((json.loads(file.read_text()) if file.is_file() else {}) | values))


# ------------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", "3", '{"model_type": "lla', "\0\0", "[" * 100_000])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "prompt.json"])
def test_settings_that_are_none(name, text, model, tmp_path):
    if (name, text) == ("tokenizer_config.json", "{}"):
        pytest.skip("says of no end token, which has a test of its own")
    (model / name).write_text(text)
    refused(run, short(model, tmp_path / "out"), f"--model {model}")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 0),
        ("num_hidden_layers", -1),
        ("num_hidden_layers", "two"),
        ("vocab_size", 0),
        ("vocab_size", -3),
        ("vocab_size", 10**15),
        ("hidden_size", 0),
        ("hidden_size", -8),
        ("attention_dropout", 2.0),
        ("attention_dropout", -0.1),
        ("num_attention_heads", 0),
        ("hidden_act", "banana"),
        ("model_type", "banana"),
        ("model_type", 3),
    ],
)
def test_numbers_and_names_of_which_no_model_is_made(key, value, model, tmp_path):
    change(model / "config.json", **{key: value})
    refused(run, short(model, tmp_path / "out"), f"--model {model}")


@pytest.mark.parametrize("value", ["x", [[1]], [None], 1.5, True])
@pytest.mark.parametrize("key", ["eos_token_id", "suppress_tokens", "begin_suppress_tokens"])
def test_ends_of_answers_that_are_no_tokens(key, value, model, tmp_path):
    change(model / "generation_config.json", **{key: value})
    refused(evaluate, measured(model, tmp_path / "out"), f"--model {model}")


PROMPTS: list[dict[str, Any]] = [
    {"template": 3, "tags": None},
    {"template": "qa", "tags": None},
    {"template": "chat", "tags": {}},
    {"template": "qa", "tags": {"unknown": ""}},
    {"template": "qa", "tags": []},
    {"template": "qa", "tags": {"question_start": 3}},
    {"template": "chat", "tags": None, "date_string": 3},
    {"tags": None},
]


@pytest.mark.parametrize("prompt", PROMPTS, ids=str)
def test_a_prompt_that_no_run_wrote(prompt, model, tmp_path):
    (model / "prompt.json").write_text(json.dumps(prompt))
    message = r"prompt.json cannot be read \(.*\); write it anew, or remove it and give --template"
    refused(run, short(model, tmp_path / "out"), message)
    (model / "prompt.json").unlink()
    (model / "prompt.json").mkdir()
    refused(run, short(model, tmp_path / "again"), message)


def without_unknown(model: Path) -> None:
    words = Tokenizer(models.WordLevel({"<end>": 0, "who": 1}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(model)


def of_odd_length(model: Path) -> None:
    change(model / "tokenizer_config.json", model_max_length="x")


@pytest.mark.parametrize("spoil", [without_unknown, of_odd_length])
def test_a_tokenizer_that_fails_on_a_text(spoil, model, tmp_path):
    spoil(model)
    refused(run, short(model, tmp_path / "out"), f"--model {model}: its tokenizer cannot be used")


@pytest.mark.parametrize("base", [3, None, "", [], {}])
def test_an_adapter_that_names_no_base(base, tmp_path):
    (tmp_path / "adapter").mkdir()
    change(tmp_path / "adapter" / "adapter_config.json", peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=base)
    refused(run, short(tmp_path / "adapter", tmp_path / "out"), "the adapter does not say which model it is of")


# -------------------------------------------------------------------------------------------------------------- weights


def empty(file: Path) -> None:
    file.write_bytes(b"")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:5000])


def no_tensors(file: Path) -> None:
    save_file({}, file, {"format": "pt"})


def a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def missing_shard(file: Path) -> None:
    weights = load_file(file)
    save_file(weights, file.with_name("model-00001-of-00002.safetensors"), {"format": "pt"})
    file.unlink()
    places = {name: f"model-0000{1 + n % 2}-of-00002.safetensors" for n, name in enumerate(weights)}
    change(file.with_name("model.safetensors.index.json"), metadata={"total_size": 1}, weight_map=places)


def index_of_nothing(file: Path) -> None:
    missing_shard(file)
    file.with_name("model.safetensors.index.json").write_text("[]")


def no_pickle(file: Path) -> None:
    file.unlink()
    file.with_name("pytorch_model.bin").write_text("hello")


def pickle_of_a_list(file: Path) -> None:
    file.unlink()
    torch.save([1, 2], file.with_name("pytorch_model.bin"))


@pytest.mark.parametrize(
    "spoil", [empty, cut, no_tensors, a_folder, missing_shard, index_of_nothing, no_pickle, pickle_of_a_list, Path.unlink]
)
def test_weights_that_are_none(spoil, model, tmp_path):
    spoil(model / "model.safetensors")
    refused(run, short(model, tmp_path / "out"), f"--model {model}")


# ---------------------------------------------------------------------------------------------------- what a kind lacks


def gemma3n() -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    return Gemma3nForCausalLM(
        Gemma3nTextConfig(
            **sizes,
            intermediate_size=[64, 64],
            vocab_size=2000,
            vocab_size_per_layer_input=2000,
            hidden_size_per_layer_input=8,
            laurel_rank=4,
            num_kv_shared_layers=0,
            layer_types=["sliding_attention", "full_attention"],
            activation_sparsity_pattern=[0.0, 0.0],
            altup_num_inputs=2,
            eos_token_id=0,
        )
    )


def xlnet() -> Any:
    return XLNetLMHeadModel(XLNetConfig(d_model=32, n_layer=2, n_head=4, d_inner=64, vocab_size=2000))


def gpt2(positions: int) -> Any:
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=2000, n_positions=positions, eos_token_id=0)
    return GPT2LMHeadModel(config)


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    demo.tiny_model(0)[1].save_pretrained(folder)
    return folder


def test_layers_that_hand_on_several_states_of_a_token_are_not_read(tmp_path):
    model = saved(gemma3n(), tmp_path / "model")
    for pair in ("RMU+EMBED", "RMU+GD", "GA+EMBED"):
        args = short(model, tmp_path / "out", forget_losses=(pair,), layer=0)
        refused(run, args, f"--forget-losses {re.escape(pair)}: Gemma3nForCausalLM hands on no states of its layers")
    run(short(model, tmp_path / "other"))


def test_layers_of_several_widths_are_planned_by_the_widest(tmp_path):
    assert dry_run(short(saved(gemma3n(), tmp_path / "model"), tmp_path / "out", dry_run=True)).shape.intermediate == 64


@pytest.mark.parametrize("changes", [{}, {"use_lora": True}])
def test_gradient_checkpointing_of_a_model_that_has_none_is_refused(changes, tmp_path):
    model = saved(xlnet(), tmp_path / "model")
    message = r"--gradient-checkpointing: .*XLNet.* has none; drop it"
    refused(run, short(model, tmp_path / "out", gradient_checkpointing=True, **changes), message.replace(".*XLNet.*", ".*"))
    run(short(model, tmp_path / "out", **changes))


def test_a_model_that_is_taught_again_answers_within_its_positions(tmp_path):
    model = saved(gpt2(64), tmp_path / "model")
    evaluate(measured(model, tmp_path / "out", max_length=64, max_new_tokens=200, relearn=1, relearn_rows="retain"))
