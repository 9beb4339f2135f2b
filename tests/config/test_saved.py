"""Arguments in `config.yaml`: out and in again, what an older one lacks, and what a run that goes on may change."""

import dataclasses
import re
from types import SimpleNamespace

import pytest
import torch
import yaml

from dualoptim import EvalArgs, FinetuneArgs, InputError, UnlearnArgs
from dualoptim.config.args import SweepArgs
from dualoptim.config.cli import parse
from dualoptim.config.flags import default_of, flags
from dualoptim.config.product import single_runs
from dualoptim.config.saved import (
    ACTING,
    batch_of,
    check_same,
    difference,
    earlier_value,
    load_yaml,
    read_inputs,
    to_dict,
    write_config,
)
from dualoptim.data.prompts import Tags
from dualoptim.models.loaded import LoadedModel
from dualoptim.reporting.runs import read_settings


def test_yaml_out_and_in(tmp_path):
    args = UnlearnArgs(model="org/name", learning_rates=(1e-5, 2e-6), forget_lr=3e-6, answer_tag="\n", output_dir="x")
    formatter = SimpleNamespace(tags=Tags("Question: ", "\n", "\n"), date_string=args.date_string, system_prompt=None)
    alone = SimpleNamespace(num_processes=1)
    loaded = LoadedModel(model=None, formatter=formatter, template="qa", accelerator=alone, layout=None)
    write_config(tmp_path / "config.yaml", loaded.resolved(args))
    args = dataclasses.replace(
        args, template="qa", question_start_tag="Question: ", question_end_tag="\n", data="locuslab/TOFU"
    )
    assert load_yaml(tmp_path / "config.yaml", UnlearnArgs) == args
    assert parse(UnlearnArgs, ["--config", str(tmp_path / "config.yaml")]) == args
    seed = parse(UnlearnArgs, ["--config", str(tmp_path / "config.yaml"), "--seed", "7"])
    assert seed == dataclasses.replace(args, seed=7)
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert set(written) == set(to_dict(args)) - ACTING | {"environment", "processes"}
    assert torch.__version__.startswith(written["environment"]["versions"]["torch"])  # which may lack the name of a build


def test_yaml_reads_numbers_that_yaml_takes_for_text(tmp_path):
    (tmp_path / "c.yaml").write_text("model: org/name\nlearning_rates: [1e-5]\nforget_lr: 2e-5\nweight_decay: 0\n")
    args = load_yaml(tmp_path / "c.yaml", UnlearnArgs)
    assert (args.learning_rates, args.forget_lr, args.weight_decay) == ((1e-5,), 2e-5, 0.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lerning_rate: 1e-5", "unknown key 'lerning_rate'"),
        ("num_epochs: 2.5", "num_epochs: 2.5 has the wrong type; give int"),
        ("eval: 'no'", "eval: 'no' has the wrong type; give bool"),
        ("optim: sgd", "--optim 'sgd' is unknown; choose from dual-adamw, dual-adamw-plus"),
        ("template: alpaca", "template: 'alpaca' has the wrong type; give one of auto, chat, qa"),
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


# ------------------------------------------------------------------------------------------------- files that were cut


def cut_anywhere(path):
    """The text of a file that was cut at the end of every line, and in the middle of it."""
    lines = path.read_text().splitlines(keepends=True)
    for number, line in enumerate(lines):
        before = "".join(lines[:number])
        yield from (before, before + line[: len(line) // 2], before + line.rstrip("\n"))


@pytest.mark.parametrize("length", [1, 200])
def test_what_was_cut_anywhere_is_refused_in_one_line(tmp_path, length):
    """Whatever reads the file of a run, to go on or to compare, with all that it does not find as its default."""
    args = EvalArgs(model="m" * length, output_dir=str(tmp_path))
    path = tmp_path / "config.yaml"
    write_config(path, to_dict(args), {"rows": "12ab"})
    (tmp_path / "finished.json").write_text("{}")
    read = [
        lambda: difference(path, to_dict(args), EvalArgs, may_change=()),
        lambda: check_same(path, to_dict(args), EvalArgs),
        lambda: earlier_value(path, "model"),
        lambda: batch_of(path),
        lambda: read_inputs(path),
        lambda: load_yaml(path, EvalArgs),
        lambda: read_settings(path, EvalArgs),
    ]
    for one in read:
        one()
    for text in list(cut_anywhere(path)):
        path.write_text(text)
        for one in read:
            with pytest.raises(InputError) as error:
                one()
            assert re.fullmatch(
                rf"{path} is not whole: [^;\n]+; put back what the run wrote, or move {tmp_path} away", str(error.value)
            )


def test_a_file_of_the_users_own_need_not_end_as_a_runs(tmp_path):
    (tmp_path / "config.yaml").write_text("model: org/name")
    assert load_yaml(tmp_path / "config.yaml", EvalArgs) == EvalArgs(model="org/name")


# --------------------------------------------------------------------------------------------------- flags that act

ACTIONS = {"overwrite": True, "resume": "newest", "push_to_hub": "me/model", "hub_public": True, "dry_run": True}
ASKED = [{"overwrite": True}, {"resume": "newest"}, {"push_to_hub": "me/model", "hub_public": True}, {"dry_run": True}]


def test_these_flags_act():
    assert {name for name, flag in flags(UnlearnArgs).items() if flag.acts} == set(ACTIONS) == ACTING


@pytest.mark.parametrize("asked", ASKED)
def test_what_a_run_was_asked_to_do_is_not_done_again_by_its_config(tmp_path, asked):
    args = UnlearnArgs(model="org/name", output_dir="out", **asked)
    config = written(tmp_path, args)
    assert not set(asked) & set(yaml.safe_load(config.read_text()))
    for kind in (UnlearnArgs, SweepArgs):
        again = parse(kind, ["--config", str(config)])
        assert all(getattr(again, name) == default_of(kind, name) for name in asked)
    # an older run kept it
    old = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump(old | asked))
    assert load_yaml(config, UnlearnArgs) == dataclasses.replace(
        args, **{name: default_of(UnlearnArgs, name) for name in asked}
    )
    # asked for in the call itself it is done
    flag = ["--output-dir", "out", f"--{next(iter(asked)).replace('_', '-')}"]
    value = next(iter(asked.values()))
    assert (
        getattr(
            parse(UnlearnArgs, ["--config", str(config), *flag, *([value] if value is not True else [])]), next(iter(asked))
        )
        == value
    )


@pytest.mark.parametrize("asked", ASKED)
def test_a_file_of_the_users_own_cannot_ask_for_it_either(tmp_path, asked):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({"model": "org/name", "output_dir": "out", **asked}))
    name = next(name for name in flags(UnlearnArgs) if name in asked)
    with pytest.raises(
        InputError, match=rf"c.yaml: \w+ is asked .*; remove it, and give --({'|'.join(asked)})$".replace("_", ".")
    ):
        load_yaml(path, UnlearnArgs)
    path.write_text(yaml.safe_dump({"model": "org/name", name: default_of(UnlearnArgs, name)}))
    assert load_yaml(path, UnlearnArgs) == UnlearnArgs(model="org/name")


def test_the_kind_of_a_value_is_checked_also_where_it_is_ignored(tmp_path):
    config = written(tmp_path, ARGS)
    config.write_text(config.read_text() + "overwrite: 'yes'\n")
    with pytest.raises(InputError, match="overwrite: 'yes' has the wrong type; give bool"):
        load_yaml(config, UnlearnArgs)


def written(folder, args, **changes):
    """A config.yaml of `args`, in which these keys are changed or (None) left out."""
    values = to_dict(args) | changes
    write_config(folder / "config.yaml", {name: value for name, value in values.items() if value != "left out"})
    return folder / "config.yaml"


ARGS = UnlearnArgs(model="org/name", output_dir="out", seed=7)


def test_the_same_arguments_go_on(tmp_path):
    check_same(written(tmp_path, ARGS), to_dict(ARGS), UnlearnArgs)


def test_a_run_goes_on_at_the_rate_of_forget_steps_that_it_began_with(tmp_path):
    """Its file states it, whatever the default was then."""
    path = written(tmp_path, ARGS, learning_rates=[1e-5], forget_lr=1e-5)
    (now,) = single_runs(ARGS)
    with pytest.raises(InputError, match=r"--resume: --forget-lr was 1e-05 in .* and is 3e-05; give the same value"):
        check_same(path, to_dict(now), UnlearnArgs)
    (same,) = single_runs(dataclasses.replace(ARGS, forget_lr=1e-5))
    check_same(path, to_dict(same), UnlearnArgs)


def test_a_flag_that_an_older_run_lacks_had_its_default(tmp_path):
    """Run folders outlive versions: a flag that came later is no reason to refuse them."""
    path = written(tmp_path, ARGS, max_update="left out", retain_freq="left out")
    check_same(path, to_dict(ARGS), UnlearnArgs)
    changed = dataclasses.replace(ARGS, retain_freq=3)
    with pytest.raises(InputError, match=r"--resume: --retain-freq was 5 in .* and is 3; give the same value"):
        check_same(path, to_dict(changed), UnlearnArgs)
    assert load_yaml(path, UnlearnArgs) == ARGS


def test_a_bound_of_nothing_that_an_older_run_states_is_none(tmp_path):
    """Runs wrote 0 when it was the default, for whatever optimizer; where --decouple shares a moment, it says something."""
    path = written(tmp_path, ARGS, max_update=0.0)
    assert load_yaml(path, UnlearnArgs) == ARGS
    check_same(path, to_dict(ARGS), UnlearnArgs)
    shared = dataclasses.replace(ARGS, decouple="v")
    path = written(tmp_path, shared, max_update=0.0)
    assert load_yaml(path, UnlearnArgs).max_update == 0
    with pytest.raises(InputError, match=r"--max-update was 0.0 in .* and is None; give the same value"):
        check_same(path, to_dict(shared), UnlearnArgs)


@pytest.mark.parametrize("kind", [UnlearnArgs, SweepArgs, EvalArgs, FinetuneArgs])
def test_what_is_gone_is_read_over_where_a_run_did_nothing_with_it(tmp_path, kind):
    path = written(tmp_path, ARGS)
    as_it_is = load_yaml(path, kind, given=("model",))
    path = written(tmp_path, ARGS, retain_until=None, retain_repeats=4)
    assert load_yaml(path, kind, given=("model",)) == as_it_is
    check_same(path, to_dict(ARGS), UnlearnArgs)


@pytest.mark.parametrize(
    ("did", "said"),
    [
        ({"retain_until": 0.02, "retain_repeats": 4}, "retain_until 0.02"),
        ({"forget_optimizer": "muon"}, "forget_optimizer muon"),
        ({"retain_optimizer": "muon", "retain_until": None}, "retain_optimizer muon"),
    ],
)
def test_a_run_by_what_is_gone_is_not_taken_again_without_a_word(tmp_path, did, said):
    """Nor does it go on, whatever flags are given; what it left is measured, and a copy of its file without that is read."""
    path = written(tmp_path, ARGS, **did)
    for kind in (UnlearnArgs, SweepArgs):
        with pytest.raises(InputError) as error:
            load_yaml(path, kind)
        assert str(error.value) == f"--config {path} is of a run with {said}, which is gone; give a copy without that line"
    with pytest.raises(InputError) as error:
        check_same(path, to_dict(ARGS) | did, UnlearnArgs)
    remedy = "which is gone; drop --resume, and give another --output-dir"
    assert str(error.value) == f"--resume: {path} is of a run with {said}, {remedy}"
    load_yaml(path, EvalArgs, given=("model",))
    line = said.replace(" ", ": ") + "\n"
    (tmp_path / "copy.yaml").write_text(path.read_text().replace(line, ""))
    assert load_yaml(tmp_path / "copy.yaml", UnlearnArgs) == ARGS


def test_a_key_that_no_flag_has_is_refused_when_it_is_given_and_not_when_a_run_goes_on(tmp_path):
    path = written(tmp_path, ARGS, of_a_later_version=1)
    check_same(path, to_dict(ARGS), UnlearnArgs)
    with pytest.raises(InputError, match="unknown key 'of_a_later_version'"):
        load_yaml(path, UnlearnArgs)


def test_the_rows_of_a_step_may_be_shared_out_otherwise(tmp_path):
    """Among other processes or in other micro-batches; the file still says how the run was begun."""
    begun = to_dict(ARGS) | {"processes": 2, "batch_size": 4, "gradient_accumulation_steps": 2}
    path = tmp_path / "config.yaml"
    write_config(path, begun)
    alone = begun | {"processes": 1, "gradient_accumulation_steps": 4}
    check_same(path, alone, UnlearnArgs)
    write_config(path, alone)
    assert batch_of(path) == (2, 4, 2)
    with pytest.raises(InputError, match=r"--gradient-accumulation-steps was 2 in .* and is 3; give the same value"):
        check_same(path, begun | {"gradient_accumulation_steps": 3}, UnlearnArgs)
    write_config(path, begun | {"gradient_accumulation_steps": 3})
    assert batch_of(path) == (2, 4, 3)
    assert load_yaml(path, UnlearnArgs).batch_size == 4


OTHER = {  # a value that is not the default, for every flag whose type does not say one
    "template": "qa", "attn_implementation": "eager", "optim": "adamw", "decouple": "m", "optim_bits": 8,
}  # fmt: skip


def other_than(value, name):
    if name in OTHER:
        return OTHER[name]
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return [*value, "x"] if isinstance(value, list) else "x"


def test_what_changes_no_number_may_change(tmp_path):
    """Every flag that its `Flag` says changes the weights is compared, and no other."""
    path = written(tmp_path, ARGS)
    for name, flag in flags(UnlearnArgs).items():
        changed = to_dict(ARGS) | {name: other_than(to_dict(ARGS)[name], name)}
        found = difference(path, changed, UnlearnArgs, may_change=("speed", "measures", "nothing"))
        assert (found is not None) == (flag.changes == "numbers"), name
        assert difference(path, changed, UnlearnArgs, may_change=())[0] == name


def test_an_evaluation_of_the_release_before_goes_on(tmp_path):
    """What takes several values now was one number there, and no relearning was 0 steps of it."""
    args, older = EvalArgs(model="org/name", data="demo"), {"relearn_rows": "forget", "relearn_lr": 1e-5}
    for steps in (0, [0], []):
        write_config(tmp_path / "config.yaml", to_dict(args) | older | {"relearn": steps})
        assert difference(tmp_path / "config.yaml", to_dict(args), EvalArgs, may_change=()) is None
        assert load_yaml(tmp_path / "config.yaml", EvalArgs) == args
    assert EvalArgs(relearn=(0, 20)) == EvalArgs(relearn=20)
