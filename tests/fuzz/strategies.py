"""Draws inputs of the fuzzer: flags, rows, bytes of files, configurations, model folders, and what our commands have left."""

import json
import math
import typing
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
from fuzz import home as homes
from fuzz.judge import KINDS, NESTED, Case, read
from hypothesis import strategies as st
from safetensors.torch import load_file

from dualoptim.config.flags import default_of, flag_name, flags

# ------------------------------------------------------------------------------------------------------- texts and values

ODD_TEXTS = (
    "", " ", "\n", "\ufeff", "\x00", "a\x00b", "\ud800", "a\udfffb", "é", "e\u0301", "日本語", "🙂", "\u202e", "\u2028", "\x85",
    "\u200b",
    "<end>", "{{ 7 }}", "{% for", "None", "null", "nan", "1e400", "-1", "true", "..", ".", "/", "~", "~nobody", "-", "--",
    "x" * 300,
    "a" * 5000, "'", '"', ",", "\\", "\r", "\t", "%s", "{0}", "\U0010ffff", "\ufffe", NESTED,
)  # fmt: skip
texts = st.one_of(st.sampled_from(ODD_TEXTS), st.text(max_size=12))
json_texts = st.one_of(texts, st.text(st.characters(), max_size=8))
ODD_NUMBERS = (
    0, -1, 1, 2, 3, 7, 255, 2**31, 2**32, 2**63, -(2**63), 10**30, 0.5, -0.5, -0.0, 1e-320, 1e308, math.nan, math.inf,
    -math.inf,
)  # fmt: skip
numbers = st.sampled_from(ODD_NUMBERS)
scalars = st.one_of(st.none(), st.booleans(), numbers, texts)
values = st.one_of(
    scalars,
    st.lists(scalars, max_size=3),
    st.dictionaries(st.sampled_from(("", "a", "0", "question", "type")), scalars, max_size=2),
)
"""What may stand in JSON where something else should."""

PATHS = (
    "model", "data", "forget.jsonl", "retain.jsonl", "holdout.jsonl", "rows.csv", "rows.json", "text.txt", "idk.txt",
    "open.json",
    "tofu.json", "measured", "finished", "nowhere", "no/where.jsonl", "model/config.json", "/dev/null", "/dev/null/x", ".",
    "..",
    "./model/", "~/nowhere", "~nobody/x", "org/name", "demo", "x.gguf", "x" * 300, "a/" * 3000 + "b", "a\x00b", "\ud800", "",
    " ", "é",
)  # fmt: skip
NAMES = (
    "NPO+KL", "ME+GD", "IDK+AP", "RMU+EMBED", "NPO+none", "GA", "ME+XY", "+", "forget01", "forget", "retain90", "full",
    "auto", "chat",
    "qa", "llama2", "adamw", "adamw-8bit", "dual-adamw", "dual-adamw-plus", "sgd", "torch.optim.RMSprop", "torch.optim",
    "os.path.join",
    "builtins.dict", "tensorboard", "wandb", "10 Apr 2025", "31 Feb 2025", "1 Jan 0001", "q_proj", "all-linear", "question",
    "me/model",
)  # fmt: skip

# ------------------------------------------------------------------------------------------------------------------ flags


def of_type(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a field's type: good, borderline and absurd ones."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return of_type(inner[0])
    if origin is tuple:
        return st.lists(of_type(inner[0]), max_size=3).map(tuple)
    if origin is typing.Literal:
        return st.sampled_from(inner)
    if inner:  # a union
        return st.one_of(*(of_type(one) for one in inner))
    number = st.sampled_from((0, 1, 2, 3, 7, 8, 32))
    rate = st.sampled_from((0.0, 1e-5, 1e-3, 0.1, 0.5, 0.9, 0.999, 1.0, 2.0))
    return {
        bool: st.booleans(),
        int: st.one_of(number, number, number, numbers),
        float: st.one_of(rate, rate, rate, numbers),
        str: st.one_of(st.sampled_from(NAMES), st.sampled_from(PATHS), texts),
        type(None): st.none(),
    }[hint]


strange = st.one_of(
    values,
    st.sampled_from(PATHS).filter(lambda path: "\x00" not in path and path.isprintable()).map(PosixPath),
    st.sampled_from(
        (np.float32(0.5), np.int64(3), np.float64(math.nan), np.array([1, 2]), np.array(3), np.str_("chat"), np.bool_(True))
    ),
    st.sampled_from((b"bytes", 1j, range(2))),
)
"""What a notebook may give in place of a value of the right type."""


@st.composite
def python_flags(draw: Any, command: str, base: dict[str, Any], most: int = 4) -> dict[str, Any]:
    """Some flags of a command over a base that runs, most of them of their types."""
    kind = KINDS[command][0]
    hints = typing.get_type_hints(kind, include_extras=True)
    names = draw(st.lists(st.sampled_from(sorted(flags(kind))), max_size=most, unique=True))
    changed = {
        name: draw(st.one_of(of_type(hints[name]), of_type(hints[name]), of_type(hints[name]), strange)) for name in names
    }
    if str(changed.get("output_dir", "out")) in ("", " ", ".."):  # nothing is written beside the folder of an input
        changed["output_dir"] = "out"
    return base | changed


def typed(kind: Any, values: dict[str, Any]) -> list[str]:
    """The same as it is typed on the command line; an input of the fuzzer, which need not be right."""
    words: list[str] = []
    for name, value in values.items():
        if kind is KINDS["report"][0] and name == "runs":
            words = [*(map(str, value) if isinstance(value, (tuple, list)) else [str(value)]), *words]
        elif isinstance(value, bool) and isinstance(default_of(kind, name), bool):
            words.append(flag_name(name) if value else f"--no-{name.replace('_', '-')}")
        elif isinstance(value, (tuple, list)):
            words += [flag_name(name), *map(str, value)]
        else:
            words += [flag_name(name), str(value)]
    return [word for word in words if "\x00" not in word]  # which no command line can hold


BASES: dict[str, dict[str, Any]] = {
    "unlearn": homes.UNLEARN | {"output_dir": "out"},
    "plan": homes.UNLEARN | {"output_dir": "out", "dry_run": True},
    "eval": homes.EVAL | {"output_dir": "out"},
    "finetune": homes.FINETUNE | {"output_dir": "out"},
    "sweep": homes.SWEEP | {"output_dir": "out"},
    "report": {"runs": ("finished",)},
}
RESUMED = (
    *(f"killed/NPO+KL_lr0.001/task{task}/checkpoint/step-{step}" for task in (1, 2) for step in (1, 3, 4)),
    *("killed", "killed/NPO+KL_lr0.001/task2/checkpoint", "finished/NPO+KL_lr0.001/task2/checkpoint/step-1", *PATHS[-14:]),
)
TOO_SLOW = {"log_with": (), "sentence_encoder": None, "push_to_hub": None, "lm_eval_tasks": (), "model": "model"}
"""Flags that make an input of the fuzzer wait for something else than us: only their parsing is tried."""


@st.composite
def flag_cases(draw: Any, only_parse: bool) -> Case:
    """A command with some flags changed, as Python values or as typed."""
    command = draw(st.sampled_from(sorted(KINDS) if only_parse else ("unlearn", "eval", "finetune", "plan", "sweep")))
    own = draw(st.booleans()) and command in ("unlearn", "eval", "plan")
    base = BASES[command]
    if own:
        base = {name: value for name, value in base.items() if name not in ("data", "split")} | homes.OWN_ROWS
    found = draw(python_flags(command, base))
    if not only_parse:
        if command == "unlearn" and not own and draw(st.integers(0, 3)) == 0:
            found |= {"output_dir": "killed", "task_list": (1, 2), "resume": draw(st.sampled_from(("newest", *RESUMED)))}
        found = {name: TOO_SLOW[name] if name in TOO_SLOW and name in found else value for name, value in found.items()}
        found = {name: value for name, value in found.items() if name in base or name not in TOO_SLOW or value}
    if draw(st.booleans()):
        return Case(command, typed(KINDS[command][0], found), (), only_parse)
    return Case(command, found, (), only_parse)


words = st.one_of(
    st.sampled_from(
        ("--model", "--resume", "--config", "--preset", "--eval", "--no-eval", "--forget-losses", "--seed", "--help", "=", "--")
    ),
    st.sampled_from([flag_name(name) for name in flags(KINDS["eval"][0])]),
    st.sampled_from((*NAMES, *(path for path in PATHS if "\x00" not in path))),
    texts.filter(lambda text: "\x00" not in text),
    numbers.map(str),
)


@st.composite
def word_cases(draw: Any) -> Case:
    """Any words behind a command."""
    return Case(draw(st.sampled_from(sorted(KINDS))), draw(st.lists(words, max_size=6)), (), True)


# ------------------------------------------------------------------------------------------------------- rows and files

FIELDS = (
    "question", "answer", "task_id", "paraphrased_answer", "perturbed_answer", "paraphrased_question", "original_answer",
    "golden_answer",
    "text", "messages", "prompt", "completion", "other",
)  # fmt: skip
messages = st.lists(
    st.one_of(
        values, st.fixed_dictionaries({"role": st.sampled_from(("user", "assistant", "system", None, 3)), "content": values})
    ),
    max_size=3,
)
good_rows = st.sampled_from([homes.row(name) for name in homes.NAMES] + [homes.row("Ann", 1), {"text": "Ann is from Rome."}])


@st.composite
def odd_rows(draw: Any) -> Any:
    """A row with some fields changed or dropped, or something else."""
    found: Any = dict(draw(good_rows))
    for name in draw(st.lists(st.sampled_from((*FIELDS[:2], *FIELDS)), max_size=2, unique=True)):
        how = draw(st.integers(0, 5))
        if how == 0:
            found.pop(name, None)
        elif how < 4 and name not in ("messages", "perturbed_answer"):
            found[name] = draw(st.sampled_from(("", "Ann "))) + draw(texts)
        else:
            found[name] = draw(messages if name == "messages" else values)
    return draw(st.one_of(st.just(found), st.just(found), st.just(found), values))


def as_bytes(text: str) -> st.SearchStrategy[bytes]:
    """A text in some encoding, with or without a byte order mark."""

    def encoded(how: str) -> bytes:
        return {
            "plain": text.encode("utf-8", "surrogatepass"),
            "mark": b"\xef\xbb\xbf" + text.encode("utf-8", "replace"),
            "two marks": b"\xef\xbb\xbf" * 2 + text.encode("utf-8", "replace"),
            "utf-16": text.encode("utf-16", "replace"),
            "latin": text.encode("latin-1", "replace"),
            "crlf": text.encode("utf-8", "replace").replace(b"\n", b"\r\n"),
        }[how]

    return st.sampled_from(("plain", "plain", "plain", "mark", "two marks", "utf-16", "latin", "crlf")).map(encoded)


def nested(text: str) -> str:
    brackets = "[" * 100_000 + "]" * 100_000
    return text.replace(f'"{NESTED}"', brackets)


@st.composite
def row_files(draw: Any) -> tuple[str, bytes]:
    """A name and content of rows: JSON Lines, an array, a table, a text, perhaps packed."""
    rows = draw(st.lists(st.one_of(good_rows, odd_rows()), min_size=1, max_size=4))
    kind = draw(st.sampled_from(("jsonl", "jsonl", "json", "csv", "txt")))
    escaped = draw(st.booleans())
    if kind == "jsonl":
        text = nested("".join(json.dumps(row, ensure_ascii=escaped) + "\n" for row in rows))
    elif kind == "json":
        text = nested(json.dumps(rows, ensure_ascii=escaped))
    elif kind == "txt":
        text = draw(json_texts) + "\n" + draw(st.sampled_from(("Ann is from Rome.", "")))
    else:
        cells = [
            [draw(texts) if draw(st.booleans()) else str(homes.row("Ann")[name]) for name in ("question", "answer")]
            for _ in rows
        ]
        head = draw(
            st.sampled_from(("question,answer", "question,answer,", "answer,question", "q,a", "text,", "question,question", ""))
        )
        quote = draw(st.sampled_from(('"', "")))
        text = "\n".join([head, *(",".join(quote + cell + quote for cell in row) for row in cells)])
    return f"odd.{kind}", draw(as_bytes(text))


@st.composite
def row_cases(draw: Any) -> Case:
    """A run, an evaluation or a fine-tuning of odd rows."""
    command = draw(st.sampled_from(("unlearn", "unlearn", "eval")))
    base = {name: value for name, value in BASES[command].items() if name not in ("data", "split")}
    if draw(st.booleans()):
        base |= {"template": draw(st.sampled_from(("qa", "chat", "llama2")))}
    if draw(st.integers(0, 3)):
        name, content = draw(row_files())
        place = draw(st.sampled_from(("forget_file", "forget_file", "retain_file", "holdout_file")))
        found = base | homes.OWN_ROWS | {place: (name,)}
        if command == "unlearn":
            found |= {"forget_losses": (draw(st.sampled_from(("NPO+KL", "IDK+AP", "ME+GD", "DPO+none"))),)}
        return Case(command, found, (("write", name, content),))
    rows = draw(st.lists(st.one_of(good_rows, odd_rows()), min_size=1, max_size=4))
    content = draw(as_bytes(nested("".join(json.dumps(row) + "\n" for row in rows))))
    name = draw(
        st.sampled_from(("forget01", "forget01_perturbed", "retain90", "retain_perturbed", "world_facts_perturbed", "full"))
    )
    return Case(command, BASES[command], (("write", f"data/{name}.json", content),))


def byte_edits(path: str) -> st.SearchStrategy[tuple[Any, ...]]:
    """Ways to damage one file as bytes."""
    share = st.integers(0, 100).map(lambda part: part / 100)
    return st.one_of(
        st.just(("write", path, b"")),
        st.just(("remove", path)),
        st.just(("folder", path)),
        st.tuples(st.just("cut"), st.just(path), share),
        st.tuples(st.just("splice"), st.just(path), share, st.integers(0, 3), st.binary(max_size=3)),
        st.tuples(st.just("write"), st.just(path), st.binary(max_size=20)),
        st.sampled_from(("null", "[]", "{}", "3", '"x"', "[[]]", "NaN", '{"a": 1}', "---\n", "\n")).map(
            lambda text: ("write", path, text.encode())
        ),
    )


@st.composite
def file_cases(draw: Any, home: Path) -> Case:
    """A file that a flag names, damaged."""
    flag, path = draw(
        st.sampled_from(
            [
                ("forget_file", name)
                for name in ("forget.jsonl", "rows.csv", "rows.json", "text.txt", "rows.jsonl.gz", "rows.parquet")
            ]
            + [("retain_logs", "open.json"), ("retain_logs", "tofu.json"), ("idk_file", "idk.txt")]
            + [("retain_logs", "measured"), ("data", "data")]
        )
    )
    base = BASES[draw(st.sampled_from(("unlearn", "eval")))]
    command = "unlearn" if base is BASES["unlearn"] else "eval"
    if flag == "forget_file":
        base = {name: value for name, value in base.items() if name not in ("data", "split")} | homes.OWN_ROWS
    found = base | {flag: (path,) if flag == "forget_file" else path}
    if flag == "idk_file" and command == "unlearn":
        found |= {"forget_losses": ("IDK+AP",)}
    path = {
        "measured": "measured/eval/forget.jsonl",
        "data": f"data/{draw(st.sampled_from(('forget01', 'retain90', 'holdout01')))}.json",
    }.get(path, path)
    return Case(command, found, (draw(byte_edits(path)),))


# ------------------------------------------------------------------------------------------- documents, by their own keys


@st.composite
def document_edits(draw: Any, home: Path, path: str) -> tuple[Any, ...]:
    """One value of a JSON or YAML file replaced or dropped, wherever in it."""
    document, keys = read(home / path), []
    while isinstance(document, (dict, list)) and document:
        if keys and draw(st.integers(0, 2)) == 0:
            break
        key = draw(st.sampled_from(sorted(document, key=str) if isinstance(document, dict) else range(len(document))))
        keys.append(key)
        document = document[key]
    if draw(st.integers(0, 3)) == 0:
        return "drop", path, tuple(keys)
    if draw(st.integers(0, 5)) == 0:
        return (
            "set",
            path,
            (*keys[:-1], draw(texts.filter(lambda text: text != NESTED))) if isinstance(keys[-1], str) else tuple(keys),
            None,
        )
    close = st.just(document)
    if isinstance(document, bool):
        close = st.just(not document)
    elif isinstance(document, (int, float)):
        close = st.sampled_from((document + 1, -document, document * 1000, document / 2, str(document), [document]))
    elif isinstance(document, str):
        close = st.sampled_from((document + "x", document[:-1], [document], {"x": document}, document.upper()))
    return "set", path, tuple(keys), draw(st.one_of(values, close))


CONFIG_LINES = (
    "model: 2020-01-01", "data: !!python/object/apply:os.getcwd []", "seed: !!binary aGk=", "a: &x [1]\nb: *x", "seed: 0x1F",
    "seed: 1_000",
    "seed: 1:30", "split: forget01\nsplit: forget05", "? [a]\n: b", "\tseed: 1", "seed: .nan", "seed: .inf", "model: ~",
    "{a: b", "- 1", "!!set {a}",
    "model: !!timestamp 2020-01-01T00:00:00Z", "<<: {seed: 3}", "<<: [1]", "seed: " + "9" * 5000, "seed: " + "[" * 300,
    "%YAML 9.9", "...", "3: 4",
    "model: 'a\\0b'", 'model: "a\\0b"', 'model: "\\ud800"', "environment: 3", "inputs: []", "model: |\n  a\n  b", "&a [*a]",
    "a: &a {b: *a}",
)  # fmt: skip


@st.composite
def config_cases(draw: Any, home: Path) -> Case:
    """A configuration of ours with values, keys or bytes changed, given with --config."""
    command = draw(st.sampled_from(("unlearn", "eval", "finetune", "sweep", "plan")))
    path = f"{command if command != 'plan' else 'unlearn'}.yaml"
    how = draw(st.integers(0, 3))
    if how == 0:
        change = draw(byte_edits(path))
    elif how == 1:
        before = (home / path).read_bytes()
        line = draw(st.sampled_from(CONFIG_LINES)).encode("utf-8", "surrogatepass")
        change = ("write", path, draw(st.sampled_from((line, before + line + b"\n", line + b"\n" + before))))
    elif how == 2:
        kind = KINDS[command][0]
        name = draw(st.sampled_from(sorted(flags(kind))))
        change = (
            "set",
            path,
            (name,),
            draw(st.one_of(values, of_type(typing.get_type_hints(kind, include_extras=True)[name]).map(_plain))),
        )
    else:
        change = draw(document_edits(home, path))
    return Case(command, ["--config", path, "--output-dir", "out"], (change,), True)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


# ------------------------------------------------------------------------------------------------------------- model folders

EXTRA_KEYS = {
    "config.json": (
        "auto_map", "architectures", "model_type", "quantization_config", "rope_scaling", "rope_parameters", "torch_dtype",
        "dtype",
        "sliding_window", "layer_types", "text_config", "num_local_experts", "is_decoder", "is_encoder_decoder",
        "_attn_implementation",
        "attn_implementation", "vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
        "head_dim",
        "num_key_value_heads", "tie_word_embeddings", "hidden_act", "transformers_version", "attention_dropout",
    ),
    "tokenizer_config.json": (
        "bos_token", "unk_token", "additional_special_tokens", "extra_special_tokens", "chat_template", "tokenizer_class",
        "auto_map",
        "model_max_length", "padding_side", "add_bos_token", "add_eos_token", "added_tokens_decoder", "eos_token", "pad_token",
    ),
    "generation_config.json": (
        "eos_token_id", "max_length", "max_new_tokens", "min_length", "do_sample", "temperature", "num_beams",
        "suppress_tokens",
        "forced_bos_token_id", "bad_words_ids", "repetition_penalty", "cache_implementation", "stop_strings", "top_k", "top_p",
    ),
    "tokenizer.json": ("normalizer", "pre_tokenizer", "post_processor", "decoder", "model", "added_tokens", "truncation",
    "padding"),
}  # fmt: skip
GOOD_EXTRAS = {
    "model_type": ("gpt2", "bert", "t5", "mamba", "llava", "opt", "modernbert", "xlm-roberta", "gemma3n", "phi3", "unheard-of"),
    "architectures": (["BertForMaskedLM"], ["T5ForConditionalGeneration"], ["Unheard"], [], None),
    "eos_token_id": ([0, 1], 1000, -1, [], [0, 5000], None),
    "pad_token_id": (1000, -1, 5, None),
    "bos_token_id": (1000, 3),
    "vocab_size": (1, 100, 279, 281, 1000),
    "max_position_embeddings": (1, 2, 8, 16),
    "torch_dtype": ("float16", "bfloat16", "float64", "int8"),
    "dtype": ("float16", "bfloat16", "float64", "float8_e4m3fn"),
    "normalizer": (
        {"type": "Lowercase"}, {"type": "Replace", "pattern": {"Regex": "."}, "content": ""}, {"type": "Strip",
        "strip_left": True, "strip_right": True},
        {"type": "Prepend", "prepend": "_"}, {"type": "NFKC"},
    ),
    "truncation": ({"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},),
    "padding": (
        {"strategy": {"Fixed": 16}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "<end>"},
    ),
    "eos_token": ("<other>", {"content": "<new>", "__type": "AddedToken"}),
    "pad_token": ("<other>",),
    "chat_template": ("{{ raise_exception('no') }}", "{{ messages[5].x.y }}", "", "{% for", "{{ messages[0].content }}",
    "{% while %}", "x"),
    "tokenizer_class": ("GPT2Tokenizer", "LlamaTokenizer", "BertTokenizer", "Unheard"),
    "quantization_config": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, {"quant_method": "gptq", "bits": 4},
    {"quant_method": "x"}),
    "rope_scaling": ({"type": "linear", "factor": 2.0}, {"rope_type": "yarn"}, {"rope_type": "unheard"}),
    "auto_map": ({"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}, {"AutoTokenizer": ["code.Tokenizer",
    None]}),
    "stop_strings": (["a"], "a"),
}  # fmt: skip
WEIGHTS = ("drop", "rename", "nan", "huge", "transpose", "shorten", "integers", "half", "flat", "empty")
ADAPTER = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "model", "r": 2, "lora_alpha": 4,
    "target_modules": ["q_proj"],
    "lora_dropout": 0.0, "bias": "none", "inference_mode": True,
}  # fmt: skip


@st.composite
def model_edits(draw: Any, home: Path, folder: str) -> tuple[Any, ...]:
    """One thing wrong with a model's folder."""
    file = draw(
        st.sampled_from(
            ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors")
        )
    )
    path = f"{folder}/{file}"
    if file == "model.safetensors":
        names = sorted(load_file(home / path))
        return draw(
            st.one_of(
                byte_edits(path),
                st.tuples(st.just("tensor"), st.just(path), st.sampled_from(names), st.sampled_from(WEIGHTS)),
                st.tuples(st.just("tensor"), st.just(path), st.sampled_from(names), st.sampled_from(WEIGHTS)),
            )
        )
    how = draw(st.integers(0, 7))
    if how == 0:
        return draw(byte_edits(path))
    if how < 4:
        return draw(document_edits(home, path))
    key = draw(st.sampled_from(EXTRA_KEYS[file]))
    good = GOOD_EXTRAS.get(key)
    return "set", path, (key,), draw(st.one_of(st.sampled_from(good), st.sampled_from(good), values) if good else values)


@st.composite
def other_files(draw: Any) -> tuple[Any, ...]:
    """A file more in a model's folder."""
    name, content = draw(
        st.sampled_from(
            (
                ("special_tokens_map.json", {"eos_token": "<other>"}), ("added_tokens.json", {"<new>": 999}), ("prompt.json",
                {}),
                ("prompt.json", {"template": "x", "tags": None}), ("prompt.json", {"template": "qa",
                "tags": {"question_start": 3}}),
                ("prompt.json", {"template": "chat", "tags": None, "date_string": 3, "system_prompt": ["x"]}),
                ("adapter_config.json", ADAPTER), ("adapter_config.json", ADAPTER | {"peft_type": "X"}),
                ("adapter_config.json", {}),
                ("adapter_config.json", ADAPTER | {"target_modules": None, "r": 0}), ("model.safetensors.index.json",
                {"weight_map": {"a": "b"}}),
                ("adapter_config.json", ADAPTER | {"base_model_name_or_path": draw(st.sampled_from(PATHS))}),
                ("chat_template.jinja", draw(st.sampled_from(GOOD_EXTRAS["chat_template"]))),
                ("special_tokens_map.json", draw(values)), ("prompt.json", draw(values)), ("processor_config.json",
                draw(values)),
            )
        )
    )  # fmt: skip
    text = content if name.endswith(".jinja") else json.dumps(content)
    return "write", f"model/{name}", text.encode("utf-8", "surrogatepass")


@st.composite
def model_cases(draw: Any, home: Path) -> Case:
    """A command on a model folder with one or two things wrong."""
    command = draw(st.sampled_from(("unlearn", "unlearn", "eval", "eval", "finetune", "plan")))
    edits = draw(
        st.lists(st.one_of(model_edits(home, "model"), model_edits(home, "model"), other_files()), min_size=1, max_size=2)
    )
    edits = [
        one for place, one in enumerate(edits) if place == 0 or (one[0] in ("set", "drop", "tensor") and one[1] != edits[0][1])
    ] or edits[:1]
    found = BASES[command]
    if command in ("unlearn", "finetune") and draw(st.integers(0, 4)) == 0:
        found = found | {"use_lora": True, "lora_rank": 2}
    if command == "unlearn":
        pair = draw(st.sampled_from(("NPO+KL", "ME+GD", "IDK+AP", "RMU+EMBED")))
        found = found | {"forget_losses": (pair,)}
    return Case(command, found, tuple(edits))


ARCHITECTURES = (
    "gpt2", "opt", "bert", "roberta", "xlm-roberta", "modernbert-decoder", "xlm", "ctrl", "bloom", "gpt_neo", "phi", "gemma2",
    "mamba",
    "blenderbot", "biogpt", "xglm", "codegen", "gpt_neox", "electra", "openai-gpt", "whisper",
)  # fmt: skip
SETTINGS = {
    "max_position_embeddings": (1, 2, 8, 16, 40), "n_positions": (1, 8, 40), "vocab_size": (1, 50, 256),
    "pad_token_id": (None, -1, 1, 999),
    "eos_token_id": (None, 1, 999, [0, 1]), "bos_token_id": (None, 999), "is_decoder": (False,), "tie_word_embeddings": (True,
    False),
    "sliding_window": (2,), "use_cache": (False,), "attn_pdrop": (0.5,), "scale_embedding": (True,),
}  # fmt: skip


@st.composite
def architecture_cases(draw: Any) -> Case:
    """A command on a model of another type with odd settings, with flags that ask much of a model."""
    command = draw(st.sampled_from(("unlearn", "unlearn", "eval", "finetune", "plan")))
    names = draw(st.lists(st.sampled_from(sorted(SETTINGS)), max_size=2, unique=True))
    settings = {name: draw(st.sampled_from(SETTINGS[name])) for name in names}
    found = dict(BASES[command])
    asked: dict[str, tuple[Any, ...]] = {
        "max_length": (2, 8, 30, 5000), "packing": (False,), "attn_implementation": ("eager", "sdpa", "flash_attention_2"),
        "template": ("qa", "llama3"),
    }  # fmt: skip
    if command in ("unlearn", "finetune"):
        asked |= {"gradient_checkpointing": (True,), "use_lora": (True,)}
    for name in draw(st.lists(st.sampled_from(sorted(asked)), max_size=2, unique=True)):
        found[name] = draw(st.sampled_from(asked[name]))
    if command == "unlearn":
        found["forget_losses"] = (draw(st.sampled_from(("NPO+KL", "ME+GD", "IDK+AP", "RMU+EMBED", "UNDIAL+KLQ"))),)
    return Case(command, found, (("make", "model", draw(st.sampled_from(ARCHITECTURES)), settings),))


# --------------------------------------------------------------------------------------------- what commands of ours left


@st.composite
def own_cases(draw: Any, home: Path) -> Case:
    """A folder that a command of ours has left, with one of its files changed, and what is done with it next."""
    folder = draw(st.sampled_from(("finished", "killed", "killed", "measured", "measuring", "taught", "swept")))
    files: dict[str, list[str]] = {}
    for file in sorted((home / folder).rglob("*")):
        if file.is_file() and file.suffix != ".png":  # by name: there are many copies of some
            name = "reference" if "reference" in file.parts else file.name
            files.setdefault(name, []).append(file.relative_to(home).as_posix())
    path = draw(st.sampled_from(files[draw(st.sampled_from(sorted(files)))]))
    document = path.endswith((".json", ".jsonl", ".yaml")) and not path.endswith("tokenizer.json")
    change = draw(document_edits(home, path) if document and draw(st.integers(0, 2)) else byte_edits(path))
    resumed = homes.UNLEARN | {"output_dir": folder, "task_list": (1, 2), "resume": "newest"}
    trained = f"{folder}/NPO+KL_lr0.001/task2"
    nexts = {
        "finished": [
            ("unlearn", resumed), ("report", {"runs": (folder,)}), ("eval", BASES["eval"] | {"retain_logs": f"{trained}/eval"}),
            ("eval", BASES["eval"] | {"model": f"{trained}/model"}), ("unlearn", resumed | {"resume": None, "overwrite": True}),
            ("unlearn", ["--config", f"{trained}/config.yaml", "--output-dir", "out"]),
        ],
        "killed": [("unlearn", resumed), ("unlearn", resumed), ("report", {"runs": (folder,)})],
        "measured": [
            ("report", {"runs": (folder,)}), ("eval", BASES["eval"] | {"retain_logs": folder}),
            ("eval", homes.EVAL | {"output_dir": folder, "overwrite": True}), ("eval", homes.EVAL | {"output_dir": folder}),
        ],
        "measuring": [("eval", homes.EVAL | {"output_dir": folder}), ("report", {"runs": (folder,)})],
        "taught": [
            ("unlearn", BASES["unlearn"] | {"model": "taught/model"}), ("eval", BASES["eval"] | {"model": "taught/model"}),
            ("finetune", ["--config", "taught/config.yaml", "--output-dir", "out"]),
        ],
        "swept": [("sweep", homes.SWEEP | {"output_dir": folder}), ("report", {"runs": (folder,)})],
    }  # fmt: skip
    command, found = draw(st.sampled_from(nexts[folder]))
    return Case(command, found, (change,))
