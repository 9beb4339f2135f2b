"""The flags: their frozen list, what the command line makes of them, and the README's table."""

import dataclasses
import re

import pytest
from support import ROOT

from dualoptim import EvalArgs, FinetuneArgs, InputError, SweepArgs, UnlearnArgs
from dualoptim.config.cli import parse
from dualoptim.config.flags import flag_name

COMMON = """model data forget_file retain_file question_column answer_column text_column benchmark benchmark_rows template
question_start_tag question_end_tag answer_tag date_string system_prompt max_length packing attn_implementation
output_dir overwrite texts threads""".split()
MEASURE = """split targets holdout_file retain_held_out refusal_column group_column sentence_encoder entailment_model
gibberish_model idk_file retain_logs mia_gradnorm lm_eval_tasks lm_eval_path lm_eval_data eval_rows eval_batch_size
max_new_tokens metrics evaluate_sharded""".split()
EVAL = """task retain_model reference_model generate_with relearn relearn_rows relearn_share relearn_lr relearn_lora
relearn_batch_size relearn_every quantize paraphrase few_shot prefix_words sample sample_temperature""".split()
TRAIN = """seed num_epochs max_steps batch_size gradient_accumulation_steps trainable weight_decay adam_betas max_grad_norm
lr_schedule warmup_epochs warmup_steps gradient_checkpointing optim_bits quantize_embeddings use_lora lora_rank lora_alpha
lora_dropout lora_target_modules load_in_4bit log_with save_dtype save_every
save_model_every save_model_every_epochs keep_checkpoints resume""".split()
UNLEARN = """forget_losses retain_questions alternative_column task_list tasks_independent optim forget_optimizer
retain_optimizer forget_adam_betas forget_weight_decay decouple base_betas max_update quantize_delta quantize_base
project_forget learning_rates forget_lr forget_strength forget_freq retain_freq average_cycles sam_rho
forget_coeff regularization_coeff forget_max_grad_norm beta gamma layer reference_dir fix_ref_model mask
eval eval_every eval_every_epochs keep_best keep_budget forget_until push_to_hub hub_public dry_run""".split()


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        (UnlearnArgs, COMMON + MEASURE + TRAIN + UNLEARN),
        (FinetuneArgs, [*COMMON, *TRAIN, "splits", "tasks", "learning_rate", "target_loss"]),
        (EvalArgs, COMMON + MEASURE + EVAL),
        (SweepArgs, [*COMMON, *MEASURE, *TRAIN, *UNLEARN, "forget_lrs", "seeds", "vary", "budget"]),
    ],
)
def test_the_list_of_flags_is_frozen(kind, flags):
    """A new option is a decision: change this list with it."""
    assert [field.name for field in dataclasses.fields(kind)] == flags


def test_every_flag_has_help(capsys):
    help_text = ""
    for kind in (UnlearnArgs, EvalArgs):
        with pytest.raises(SystemExit) as end:
            parse(kind, ["--help"])
        assert end.value.code == 0
        help_text += " ".join(capsys.readouterr().out.replace("│", " ").split())
    readme = (ROOT / "dualoptim" / "config" / "README.md").read_text()
    table = [line for line in readme.splitlines() if line.startswith("| `--")]
    in_table = {flag for line in table for flag in re.findall(r"`(--[a-z0-9-]+)`", line.split("|")[1])}
    for name in COMMON + MEASURE + TRAIN + UNLEARN + EVAL:
        assert flag_name(name) in help_text
        assert flag_name(name) in in_table, f"{flag_name(name)} is missing from the README's tables"
    every = {field.name for kind in (UnlearnArgs, EvalArgs, FinetuneArgs, SweepArgs) for field in dataclasses.fields(kind)}
    assert in_table == set(map(flag_name, every))
    for flag in ("--no-mask", "--no-packing", "--no-eval"):
        assert flag in help_text
    for flag in ("--preset", "--config"):
        assert flag in help_text
        assert flag in readme


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
    assert (args.model, args.data_source, args.rates) == ("demo", "demo", (1.5e-4,))
    assert UnlearnArgs(model="org/name").data_source == "locuslab/TOFU"
    assert UnlearnArgs(model="org/name").rates == (1e-5,)


@pytest.mark.parametrize(
    ("changes", "bits"),
    [
        ({}, 32),
        ({"optim_bits": 8}, 8),
        ({"retain_optimizer": "adamw-8bit"}, 8),
        ({"optim": "dual-adamw-plus", "quantize_base": True}, 8),
        ({"optim": "dual-adamw-plus", "quantize_delta": True}, 8),
    ],
)
def test_the_bits_of_states(changes, bits):
    assert UnlearnArgs(**changes).state_bits == bits


def test_whose_columns_have_names(tmp_path):
    assert not EvalArgs().reads_own_files
    assert EvalArgs(model="m", forget_file="rows.csv", answer_column="reply").reads_own_files
    assert EvalArgs(relearn=2, relearn_rows="rows.csv", answer_column="reply").reads_own_files
    assert UnlearnArgs(holdout_file="rows.csv", question_column="ask").reads_own_files
    with pytest.raises(InputError, match="--answer-column reply names a column of your own files; give --forget-file"):
        EvalArgs(relearn=2, relearn_rows="retain", answer_column="reply")


def test_arguments_are_never_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        UnlearnArgs().seed = 3
