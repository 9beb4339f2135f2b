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
from dualoptim.config.args import load_yaml, parse, to_dict
from dualoptim.data.tofu import Tags
from dualoptim.method.objectives import FORGET
from dualoptim.config.presets import PRESETS, SCENARIOS
from dualoptim.reporting.log import resolve, write_config

ROOT = Path(__file__).resolve().parents[1]

COMMON = """model data template question_start_tag question_end_tag answer_tag max_length packing attn_implementation output_dir
overwrite threads""".split()
MEASURE = """split forget_file retain_file holdout_file question_column answer_column text_column sentence_encoder
entailment_model idk_file retain_logs mia_gradnorm lm_eval_tasks lm_eval_path eval_rows eval_batch_size
max_new_tokens""".split()
EVAL = """task retain_model reference_model relearn relearn_rows relearn_share relearn_lr relearn_batch_size relearn_every
quantize paraphrase sample sample_temperature""".split()
TRAIN = """seed num_epochs max_steps batch_size gradient_accumulation_steps weight_decay adam_betas max_grad_norm warmup_epochs
gradient_checkpointing optim_bits quantize_embeddings use_lora lora_rank lora_alpha lora_dropout lora_target_modules
load_in_4bit log_with""".split()
UNLEARN = """forget_losses task_list optim forget_optimizer retain_optimizer forget_adam_betas forget_weight_decay decouple
base_betas max_update quantize_delta quantize_base learning_rates forget_lr forget_freq retain_freq
forget_coeff regularization_coeff forget_max_grad_norm beta gamma layer reference_dir fix_ref_model mask
eval save_every keep_checkpoints resume push_to_hub hub_public dry_run""".split()


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        (UnlearnArgs, COMMON + MEASURE + TRAIN + UNLEARN),
        (FinetuneArgs, [*COMMON, *TRAIN, "splits", "tasks", "learning_rate", "target_loss"]),
        (EvalArgs, COMMON + MEASURE + EVAL),
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
    with pytest.raises(SystemExit):
        parse(EvalArgs, ["--help"])
    help_text += " ".join(capsys.readouterr().out.replace("│", " ").split())
    every = COMMON + MEASURE + TRAIN + UNLEARN + EVAL
    for name in every:
        flag = f"--{name.replace('_', '-')}"
        assert flag in help_text
        assert flag in in_table, f"{flag} is missing from the README's table"
    flags = {f"--{name.replace('_', '-')}" for name in every}
    assert in_table == flags | {"--no-mask", "--no-packing", "--no-eval", "--preset", "--config"}
    source = (ROOT / "dualoptim" / "config" / "args.py").read_text().split("\n")
    for name in every:
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


# losses, optimizer, rate, forget rate, forget coefficient, batch, accumulation, epochs: typed from the published files.
# Where the source is a method's, the scenario it runs on stands before it.
PUBLISHED = {
    "tofu-llama2-7b": ("ME+GD", "dual-adamw", 1e-5, None, 0.1, 5, 4, 5),
    "tofu-phi-1.5": ("ME+GD", "dual-adamw", 1e-5, None, 0.1, 5, 4, 5),
    "real-world-llama3-8b": ("ME+GD", "dual-adamw", 5e-6, 1e-5, 0.5, 4, 4, 5),
    "tofu-phi-1.5 me-gd": ("ME+GD", "dual-adamw", 1e-5, 1e-5, 0.1, 5, 4, 5),
    "tofu-phi-1.5 idk-ap": ("IDK+AP", "dual-adamw", 1e-5, 1e-5, 1.0, 5, 4, 5),
    "tofu-phi-1.5 me-gd-plus": ("ME+GD", "dual-adamw-plus", 1e-5, 1e-5, 0.1, 4, 5, 5),
    "tofu-llama2-7b me-gd-joint": ("ME+GD", "adamw", 1e-5, None, 0.1, 4, 4, 5),
    "tofu-llama2-7b idk-ap-joint": ("IDK+AP", "adamw", 1e-5, None, 1.0, 4, 4, 5),
    "tofu-llama2-7b ga-gd": ("GA+GD", "adamw", 1e-5, None, 1.0, 4, 4, 5),
    "real-world-llama3-8b npo-gd": ("NPO+GD", "adamw", 1e-5, None, 1.0, 4, 4, 5),
    "idk-gd": ("IDK+GD", "adamw", 1e-5, None, 1.0, 4, 4, 5),
    "dpo-gd": ("DPO+GD", "adamw", 1e-5, None, 1.0, 4, 4, 5),
    "ga-kl": ("GA+KLQ", "adamw", 1e-5, None, 1.0, 4, 4, 5),
    "npo-kl": ("NPO+KLQ", "adamw", 1e-5, None, 1.0, 4, 4, 5),
    "idk-kl": ("IDK+KLQ", "adamw", 1e-5, None, 1.0, 4, 4, 5),
    "dpo-kl": ("DPO+KLQ", "adamw", 1e-5, None, 1.0, 4, 4, 5),
    "simnpo-gd": ("SimNPO+GD", "adamw", 1e-5, None, 0.125, 4, 4, 10),
    "rmu-embed": ("RMU+EMBED", "adamw", 1e-5, None, 1.0, 4, 4, 10),
    "undial": ("UNDIAL+none", "adamw", 1e-4, None, 1.0, 2, 8, 10),
    "wga-gd": ("WGA+GD", "adamw", 1e-5, None, 1.0, 4, 4, 5),
    "satimp-gd": ("SatImp+GD", "adamw", 1e-5, None, 0.1, 4, 4, 5),
    "ce-u": ("CE-U+none", "adamw", 1e-5, None, 1.0, 4, 4, 10),
}


def test_every_preset_is_compared_with_what_was_published():
    assert {names.split()[-1] for names in PUBLISHED} == set(PRESETS)


@pytest.mark.parametrize("names", list(PUBLISHED))
def test_presets_hold_the_published_numbers_and_flags_override_them(names):
    by_flag = parse(UnlearnArgs, ["--preset", *names.split()])
    assert by_flag == preset(*names.split())
    losses, optim, rate, forget_rate, coefficient, batch, accumulation, epochs = PUBLISHED[names]
    assert (by_flag.forget_losses, by_flag.optim) == ((losses,), optim)
    assert (by_flag.rates, by_flag.forget_lr) == ((rate,), forget_rate)
    assert (by_flag.forget_coeff, by_flag.regularization_coeff) == (coefficient, 1.0)
    assert (by_flag.batch_size, by_flag.gradient_accumulation_steps, by_flag.num_epochs) == (batch, accumulation, epochs)
    assert (by_flag.weight_decay, by_flag.seed, by_flag.retain_freq, by_flag.forget_freq) == (0.01, 1001, 5, 1)
    assert by_flag.mask == (names != "tofu-llama2-7b me-gd-joint")
    flags = [f"--preset={names}"] if " " not in names else ["--preset", *names.split()]
    changed = parse(UnlearnArgs, [*flags, "--num-epochs", "2", "--learning-rates", "7e-6"])
    assert changed == dataclasses.replace(by_flag, num_epochs=2, learning_rates=(7e-6,))
    assert preset(*names.split(), num_epochs=2).num_epochs == 2


def test_constants_of_presets():
    assert preset("simnpo-gd").beta == 4.5  # everything else is the objective's own default
    plus = preset("me-gd-plus")
    assert (plus.adam_betas, plus.base_betas) == ((0.9, 0.95), (0.99, 0.999))
    for name in ("rmu-embed", "undial", "wga-gd", "satimp-gd"):
        args, objective = preset(name), FORGET[preset(name).forget_losses[0].split("+")[0]]
        assert args.beta == objective.beta
        assert args.gamma is None or args.gamma == objective.gamma


def test_a_scenario_is_a_diff():
    default = UnlearnArgs()
    for scenario in SCENARIOS.values():
        assert all(getattr(default, field) != value for field, value in scenario.settings.items()), "it repeats a default"


def test_preset_without_a_name_lists_all_with_a_line_each(capsys):
    with pytest.raises(SystemExit) as end:
        parse(UnlearnArgs, ["--preset"])
    assert end.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(PRESETS)
    assert all(preset.about in line and preset.source in line for preset, line in zip(PRESETS.values(), lines, strict=True))


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
