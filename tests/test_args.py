"""The command line: its frozen list of flags, presets, YAML, and help that says something."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from dualoptim import EvalArgs, FinetuneArgs, InputError, UnlearnArgs, preset
from dualoptim.args import PRESETS, load_yaml, parse, to_dict
from dualoptim.data import Tags
from dualoptim.tracking import resolve, write_config

ROOT = Path(__file__).resolve().parents[1]

COMMON = """model data template question_start_tag question_end_tag answer_tag max_length packing attn_implementation output_dir
overwrite threads""".split()
MEASURE = """split forget_file retain_file question_column answer_column text_column lm_eval_tasks lm_eval_path
eval_rows eval_batch_size max_new_tokens""".split()
TRAIN = """seed num_epochs max_steps batch_size gradient_accumulation_steps weight_decay adam_betas max_grad_norm warmup_epochs
gradient_checkpointing optim_bits quantize_embeddings use_lora lora_rank lora_alpha lora_dropout lora_target_modules
load_in_4bit log_with""".split()
UNLEARN = """forget_losses task_list optim forget_optimizer retain_optimizer forget_adam_betas forget_weight_decay decouple
base_betas max_update quantize_delta quantize_base learning_rates forget_lr forget_freq retain_freq
forget_coeff regularization_coeff forget_max_grad_norm beta gamma layer reference_dir fix_ref_model mask
idk_file eval save_every keep_checkpoints resume dry_run""".split()


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        (UnlearnArgs, COMMON + MEASURE + TRAIN + UNLEARN),
        (FinetuneArgs, [*COMMON, *TRAIN, "splits", "tasks", "learning_rate", "target_loss"]),
        (EvalArgs, [*COMMON, *MEASURE, "task"]),
    ],
)
def test_the_list_of_flags_is_frozen(kind, flags):
    """A new option is a decision: change this list with it."""
    assert [field.name for field in dataclasses.fields(kind)] == flags


def test_every_flag_has_help_and_stands_in_the_readme(capsys):
    with pytest.raises(SystemExit) as end:
        parse(UnlearnArgs, ["--help"])
    assert end.value.code == 0
    help_text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    table = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `--")]
    in_table = {flag for line in table for flag in re.findall(r"`(--[a-z0-9-]+)`", line.split("|")[1])}
    for name in COMMON + MEASURE + TRAIN + UNLEARN:
        flag = f"--{name.replace('_', '-')}"
        assert flag in help_text
        assert flag in in_table, f"{flag} is missing from the README's table"
    flags = {f"--{name.replace('_', '-')}" for name in COMMON + MEASURE + TRAIN + UNLEARN}
    assert in_table == flags | {"--no-mask", "--no-packing", "--no-eval", "--preset", "--config"}
    source = (ROOT / "dualoptim" / "args.py").read_text().split("\n")
    for name in COMMON + MEASURE + TRAIN + UNLEARN:
        line = next(number for number, text in enumerate(source) if text.startswith(f"    {name}: "))
        assert source[line + 1].strip().startswith('"""'), f"{name} has no docstring"


def test_flags_arrive():
    flags = (
        "--model m --data d/x --forget-losses ME+GD IDK+AP --task-list 1 2 3 --learning-rates 1e-5 2e-5 --forget-lr 3e-6 "
        "--no-mask --no-eval --optim adamw-alternate --adam-betas 0.9 0.95 --output-dir o"
    )
    args = parse(UnlearnArgs, flags.split(" "))
    assert args.forget_losses == ("ME+GD", "IDK+AP")
    assert args.task_list == (1, 2, 3)
    assert args.rates == (1e-5, 2e-5)
    assert (args.forget_lr, args.mask, args.eval, args.optim) == (3e-6, False, False, "adamw-alternate")
    assert args.adam_betas == (0.9, 0.95)


def test_no_flag_is_the_demo():
    args = parse(UnlearnArgs, [])
    assert args == UnlearnArgs()
    assert (args.model, args.data_source, args.rates) == ("demo", "demo", (5e-4,))
    assert UnlearnArgs(model="org/name").data_source == "locuslab/TOFU"
    assert UnlearnArgs(model="org/name").rates == (1e-5,)


PUBLISHED = {  # rate, forget rate, batch, accumulation, forget coefficient: typed from the published configuration files
    "tofu-llama2-7b": (1e-5, 1e-5, 5, 4, 0.1),
    "tofu-phi-1.5": (1e-5, 1e-5, 5, 4, 0.1),
    "real-world-llama3-8b": (5e-6, 1e-5, 4, 4, 0.5),
}


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_are_diffs_that_flags_override(name):
    by_flag = parse(UnlearnArgs, ["--preset", name])
    assert by_flag == preset(name)
    rate, forget_rate, batch, accumulation, coefficient = PUBLISHED[name]
    assert by_flag.rates == (rate,)
    assert (by_flag.forget_lr or rate, by_flag.forget_coeff) == (forget_rate, coefficient)
    assert (by_flag.batch_size, by_flag.gradient_accumulation_steps) == (batch, accumulation)
    assert (by_flag.num_epochs, by_flag.weight_decay, by_flag.seed, by_flag.retain_freq, by_flag.beta) == (
        5,
        0.01,
        1001,
        5,
        None,  # each objective's own
    )
    changed = parse(UnlearnArgs, [f"--preset={name}", "--num-epochs", "2", "--learning-rates", "7e-6"])
    assert changed == dataclasses.replace(by_flag, num_epochs=2, learning_rates=(7e-6,))
    assert preset(name, num_epochs=2).num_epochs == 2
    default = UnlearnArgs()
    assert all(getattr(default, field) != value for field, value in PRESETS[name].items()), "a diff repeats a default"


def test_yaml_out_and_in(tmp_path):
    args = UnlearnArgs(model="org/name", learning_rates=(1e-5, 2e-6), forget_lr=3e-6, answer_tag="\n", output_dir="x")
    policy = SimpleNamespace(template="qa", formatter=SimpleNamespace(tags=Tags("Question: ", "\n", "\n")))
    write_config(tmp_path / "config.yaml", resolve(args, policy))
    args = dataclasses.replace(
        args, template="qa", question_start_tag="Question: ", question_end_tag="\n", data="locuslab/TOFU"
    )
    assert load_yaml(tmp_path / "config.yaml", UnlearnArgs) == args
    assert parse(UnlearnArgs, ["--config", str(tmp_path / "config.yaml")]) == args
    seed = parse(UnlearnArgs, ["--config", str(tmp_path / "config.yaml"), "--seed", "7"])
    assert seed == dataclasses.replace(args, seed=7)
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert set(to_dict(args)) < set(written)
    assert written["environment"]["versions"]["torch"].startswith("2.")


def test_yaml_reads_numbers_that_yaml_takes_for_text(tmp_path):
    (tmp_path / "c.yaml").write_text("model: org/name\nlearning_rates: [1e-5]\nforget_lr: 2e-5\nweight_decay: 0\n")
    args = load_yaml(tmp_path / "c.yaml", UnlearnArgs)
    assert (args.learning_rates, args.forget_lr, args.weight_decay) == ((1e-5,), 2e-5, 0.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: 1e-5", "unknown key 'learning_rate'"),
        ("num_epochs: 2.5", "num_epochs: 2.5 has the wrong type; give int"),
        ("eval: 'no'", "eval: 'no' has the wrong type; give bool"),
        ("optim: sgd", "optim: 'sgd' has the wrong type; give one of dual-adamw"),
        ("adam_betas: [0.9]", "adam_betas"),
        ("- 1", "holds no `name: value` lines"),
        ("a: [", "is not YAML"),
        ("seed: -1", "--seed -1 is out of range"),
    ],
)
def test_bad_yaml_is_one_line(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError, match=message.replace("(", r"\(")) as error:
        load_yaml(tmp_path / "c.yaml", UnlearnArgs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("script", ["train_unlearn.py", "eval_tofu.py"])
def test_the_scripts_only_parse_and_call(script):
    text = (ROOT / script).read_text()
    assert len(text.splitlines()) < 60
    done = subprocess.run([sys.executable, str(ROOT / script), "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "--model" in done.stdout


def test_what_the_package_offers_is_there():
    import dualoptim
    import train_unlearn

    for name in dualoptim.__all__:
        assert getattr(dualoptim, name) is not None
    assert train_unlearn.run is dualoptim.run
    with pytest.raises(AttributeError, match="no attribute 'unlearn'"):
        _ = dualoptim.unlearn
