"""Values as users give them: typed, in YAML, or from Python."""

from decimal import Decimal
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from dualoptim import EvalArgs, FinetuneArgs, InputError, SweepArgs, UnlearnArgs, run
from dualoptim.config.cli import parse
from dualoptim.config.flags import default_of, flag_name, flags
from dualoptim.config.saved import difference, load_yaml, to_dict, write_config
from dualoptim.config.values import _hints, field_value
from dualoptim.report import ReportArgs

KINDS = (UnlearnArgs, SweepArgs, FinetuneArgs, EvalArgs)
TAGS = ("question_start_tag", "question_end_tag", "answer_tag")
TEXTS = [(kind, name) for kind in KINDS for name in flags(kind) if "str" in str(_hints(kind)[name]) and name not in TAGS]


@pytest.mark.parametrize(("kind", "name"), TEXTS)
def test_an_empty_text_is_a_mistake_of_every_flag_that_takes_text(kind, name):
    is_tuple = "tuple" in str(_hints(kind)[name])
    for empty in ("", " \t", *([("a", ""), ("",)] if is_tuple else [])):
        with pytest.raises(InputError, match=f"{flag_name(name)} is empty; give a value, or leave it out"):
            kind(**{"model": "m", name: empty})


def test_empty_values_are_mistakes_where_they_are_typed(tmp_path):
    for flag in ("--forget-file", "--data", "--output-dir", "--holdout-file", "--idk-file", "--resume", "--config"):
        with pytest.raises(InputError, match=f"{flag} is empty; give"):
            parse(UnlearnArgs, ["--model", "m", flag, ""])
    for flag in ("--forget-file", "--retain-file", "--holdout-file"):  # a variable of the shell that is not set
        with pytest.raises(InputError, match=f"{flag} is empty; give a value"):
            parse(UnlearnArgs, ["--model", "m", flag])
    with pytest.raises(InputError, match="--preset '' is unknown"):
        parse(UnlearnArgs, ["--preset", ""])
    (tmp_path / "c.yaml").write_text("model: m\ndata: ''\n")
    with pytest.raises(InputError, match=r"--config .*: data is empty; give a value"):
        load_yaml(tmp_path / "c.yaml", UnlearnArgs)
    for changes, message in (
        ({"runs": ("",)}, "RUN is empty; give"),
        ({"runs": ()}, "no RUN is given"),
        ({"runs": "a", "output_dir": ""}, "--output-dir is empty"),
    ):
        with pytest.raises(InputError, match=message):
            ReportArgs(**changes)


def test_an_empty_tag_says_something():
    args = parse(UnlearnArgs, ["--model", "m", "--question-start-tag", "", "--answer-tag", "\n"])
    assert (args.question_start_tag, args.answer_tag, args.question_end_tag) == ("", "\n", None)


def test_python_takes_paths_numpy_and_single_values():
    args = UnlearnArgs(
        model=Path("a/m"), forget_file=Path("x.csv"), retain_file=[Path("y.csv"), "z.csv"], seed=np.int64(3),
        forget_lr=np.float64(2e-5), learning_rates=np.array([1e-6, 1e-5]),
        task_list=range(1, 3), forget_losses="NPO+GD", mask=np.bool_(True), beta="0.5",
        adam_betas=[0.9, np.float64(0.95)], optim_bits=np.int64(32), max_grad_norm=1,
    )  # fmt: skip
    assert args == UnlearnArgs(
        model="a/m", forget_file=("x.csv",), retain_file=("y.csv", "z.csv"), seed=3, forget_lr=2e-5,
        learning_rates=(1e-6, 1e-5),
        task_list=(1, 2), forget_losses=("NPO+GD",), mask=True, beta=0.5, adam_betas=(0.9, 0.95), max_grad_norm=1.0,
    )  # fmt: skip
    assert yaml.safe_load(yaml.safe_dump(to_dict(args))) == to_dict(args)
    assert UnlearnArgs(learning_rates=1e-5, task_list=2) == UnlearnArgs(learning_rates=(1e-5,), task_list=(2,))
    assert EvalArgs(model=Path("m"), quantize=np.int32(8)).quantize == (8,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": "3"}, "--seed: '3' has the wrong type; give int"),
        ({"seed": True}, "--seed: True has the wrong type"),
        ({"seed": None}, "--seed: None has the wrong type"),
        ({"num_epochs": np.float64(2)}, "--num-epochs: 2.0 has the wrong type"),
        ({"learning_rates": "fast"}, "--learning-rates: 'fast' has the wrong type; give float"),
        ({"learning_rates": {1e-5}}, "--learning-rates: {1e-05} has the wrong type"),
        ({"adam_betas": (0.9,)}, "--adam-betas: (0.9,) has the wrong type"),
        ({"model": 7}, "--model: 7 has the wrong type; give str"),
        ({"model": b"m"}, "--model: b'm' has the wrong type"),
        ({"forget_lr": 10**400}, "has the wrong type; give float"),
        ({"seed": 10**5000}, "--seed a number of thousands of digits is out of range"),
        ({"num_epochs": -(10**400)}, "is out of range; give 1 or more"),
        ({"seed": torch.empty(1, device="meta")}, "has the wrong type; give int"),
        ({"forget_file": [["a.csv"]]}, "--forget-file: ['a.csv'] has the wrong type"),
        ({"model": type("P", (), {"__fspath__": lambda self: b"x"})()}, "--model: b'x' has the wrong type"),
        ({"model": "m", "answer_tag": "a\udcff"}, "--answer-tag 'a\\udcff' is not UTF-8 text"),
    ],
)
def test_a_value_of_another_type_is_one_line(changes, message):
    with pytest.raises(InputError) as error:
        UnlearnArgs(**changes)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


class Name(str, Enum):
    """What notebooks have in place of texts."""

    PAIR = "NPO+none"
    QA = "qa"


def test_members_of_enumerations_are_the_texts_that_they_stand_for():
    args = UnlearnArgs(forget_losses=Name.PAIR, template=Name.QA, beta=Decimal("0.5"), forget_lr=torch.tensor(0.5))
    assert args == UnlearnArgs(forget_losses=("NPO+none",), template="qa", beta=0.5, forget_lr=0.5)
    assert yaml.safe_load(yaml.safe_dump(to_dict(args))) == to_dict(args)


@pytest.mark.parametrize("given", [None, {}, "m", UnlearnArgs, FinetuneArgs(model="m")])
def test_functions_take_their_own_arguments_alone(given):
    from dualoptim.evaluate import evaluate
    from dualoptim.finetune import finetune
    from dualoptim.report import report
    from dualoptim.sweep import sweep

    for call in (run, evaluate, sweep, report, *([] if isinstance(given, FinetuneArgs) else [finetune])):
        with pytest.raises(InputError, match=r"is not what this function takes; give \w+Args\("):
            call(given)
    with pytest.raises(InputError, match=r"call dualoptim\.sweep\.sweep"):
        run(SweepArgs(model="m", output_dir="x", seeds=(1, 2)))


PATHS = [(kind, name) for kind in (*KINDS, ReportArgs) for name, flag in flags(kind).items() if flag.path]


@pytest.mark.parametrize(("kind", "name"), PATHS)
def test_home_and_brackets_are_known_in_every_path(kind, name, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    found = field_value(kind, name, Path("~/a [1]*/x"))
    assert found == (("/home/me/a [1]*/x",) if "tuple" in str(_hints(kind)[name]) else "/home/me/a [1]*/x")
    with pytest.raises(InputError, match=rf"{flag_name(name)} ~nobody-here/x: no such home folder; give the whole path"):
        field_value(kind, name, "~nobody-here/x")


def test_several_files_arrive_and_one_of_an_older_config_is_the_same(tmp_path):
    args = parse(UnlearnArgs, "--model m --forget-file a.jsonl b.csv --retain-file c.csv".split())
    assert (args.forget_file, args.retain_file, args.holdout_file) == (("a.jsonl", "b.csv"), ("c.csv",), None)
    assert parse(UnlearnArgs, ["--model", "m", "--forget-file", "None"]).forget_file is None
    write_config(tmp_path / "c.yaml", {"model": "m", "forget_file": "a.csv", "retain_file": None})
    older = load_yaml(tmp_path / "c.yaml", UnlearnArgs)
    assert older == UnlearnArgs(model="m", forget_file="a.csv")
    assert difference(tmp_path / "c.yaml", to_dict(older), UnlearnArgs, may_change=()) is None
    other = to_dict(UnlearnArgs(model="m", forget_file=("a.csv", "b.csv")))
    assert difference(tmp_path / "c.yaml", other, UnlearnArgs, may_change=()) == ("forget_file", ["a.csv"])
    (tmp_path / "new.yaml").write_text(yaml.safe_dump(to_dict(args)))
    assert load_yaml(tmp_path / "new.yaml", UnlearnArgs) == args


def test_a_config_with_a_mark_is_read_and_one_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"\xef\xbb\xbfmodel: m\n")
    assert load_yaml(tmp_path / "c.yaml", UnlearnArgs).model == "m"
    (tmp_path / "c.yaml").write_bytes(b"model: \xe9\n")
    with pytest.raises(InputError, match=r"--config .*c\.yaml:1: not UTF-8 text \(byte 0xe9\); save"):
        load_yaml(tmp_path / "c.yaml", UnlearnArgs)


MEASURES = [name for name, flag in flags(UnlearnArgs).items() if (flag.group, flag.changes) == ("evaluation", "measures")]


@pytest.mark.parametrize("name", [name for name in MEASURES if name not in ("eval", "lm_eval_path", "lm_eval_data")])
def test_what_is_measured_has_no_effect_without_an_evaluation(name):
    taken = {"metrics": "exact_match", "keep_best": 0.5}
    value = taken.get(name) or {int: 3, bool: True}.get(_hints(UnlearnArgs)[name], "x")
    flag = " ".join([flag_name(name), *([] if value is True else [str(value)])])
    with pytest.raises(
        InputError, match=f"{flag} has no effect with --no-eval, which leaves out the evaluation; drop one of them"
    ):
        UnlearnArgs(model="m", eval=False, **{name: value})
    UnlearnArgs(model="m", eval=False, **{name: default_of(UnlearnArgs, name)})
