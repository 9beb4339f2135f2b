"""Commands in advice: whole, and of the model and the data at hand."""

import dataclasses
import shlex
from pathlib import Path

import pytest

from dualoptim import EvalArgs, FinetuneArgs, UnlearnArgs, unlearn
from dualoptim.config.cli import parse
from dualoptim.config.saved import to_dict, write_config
from dualoptim.evaluation.judged import AGAIN, COMPARE
from dualoptim.evaluation.summary import Summary, Verdict
from dualoptim.evaluation.verdict import _ATTACK, judge
from dualoptim.reporting.commands import NO_RUN, UNNAMED, evaluated, said_and_typed, with_model
from dualoptim.reporting.page import Section, to_html, to_markdown
from dualoptim.reporting.verdicts import verdict_text

ADVICE = Verdict("yes", "yes", "the model before", {}, [], [_ATTACK, COMPARE])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"data": "demo"}, {"data": "demo"}),
        ({"data": "d", "split": "forget10", "task": 2, "max_length": 64}, {"split": "forget10", "task": 2, "max_length": 64}),
        ({"forget_file": ["a b.csv"], "retain_file": ["r.csv"], "question_column": "q"}, {"forget_file": "a b.csv"}),
        ({"benchmark": "rwku", "data": "R", "targets": "Ann Lee", "task": 7}, {"targets": "Ann Lee", "task": 1}),
    ],
)
def test_advice_ends_in_a_command_that_can_be_typed(settings, said):
    whole = vars(UnlearnArgs()) | {"model": "runs/it's/model", **settings}
    lines = verdict_text(ADVICE, whole).splitlines()
    commands = [line.strip() for line in lines if line.startswith("  dualoptim eval --model ")]
    assert len(commands) == 2
    for command in commands:
        args = parse(EvalArgs, shlex.split(command)[2:])
        assert args == EvalArgs(
            **{"model": "runs/it's/model", **settings, **said}, **({"relearn": 20, "quantize": (8, 4), "sample": 8}
            if "--relearn" in command else {"retain_model": "ALONE"}),
        )  # fmt: skip
    assert "--relearn-lr" not in "".join(lines)
    moved = verdict_text(ADVICE, whole | {"learning_rates": (2e-4,)}).splitlines()
    (attack,) = (line for line in moved if "--relearn " in line)
    assert parse(EvalArgs, shlex.split(attack)[2:]).relearn_lr == (2e-4,)  # that which moved the model
    assert evaluated({}) == UNNAMED
    assert all(UNNAMED in one for one in ADVICE.tries)


@pytest.mark.parametrize(
    ("optim", "rates"),
    [
        ("dual-adamw", {"learning_rates": (2e-5,), "forget_lr": 4e-5 * 3}),
        ("dual-adamw-plus", {"learning_rates": (2e-5,), "forget_lr": 4e-5 * 3}),
        ("adamw-alternate", {"learning_rates": (6e-5,), "forget_lr": 4e-5 * 3}),
        ("adamw", {"learning_rates": (6e-5,)}),
    ],
)
def test_advice_to_forget_more_repeats_the_run_that_left_the_model_with_higher_rates(tmp_path, optim, rates):
    folder = tmp_path / "it's"
    args = UnlearnArgs(
        learning_rates=(2e-5,), forget_lr=None if optim == "adamw" else 4e-5, optim=optim, output_dir=str(folder)
    )
    (folder / "task1" / "model").mkdir(parents=True)
    own = {"model": str(folder / "task1" / "model")}
    advice = f"More:{AGAIN} --forget-strength 3 --forget-until 0.1"
    write_config(folder / "task1" / "config.yaml", to_dict(args))
    for settings in (own, EvalArgs(**own)):
        said, command = said_and_typed(with_model(advice, settings))
        again = parse(UnlearnArgs, shlex.split(command)[2:])
        expected = dataclasses.replace(args, forget_until=0.1, output_dir=f"{folder}-more", **rates)
        assert (said, again) == ("More:", expected)
    longer = with_model(f"More:{AGAIN} --forget-strength 0.5 --num-epochs TWICE", own)
    assert "--num-epochs 10" in longer
    (folder / "reference").mkdir()  # whose values the run that is advised reads
    again = parse(UnlearnArgs, shlex.split(said_and_typed(with_model(advice, own))[1])[2:])
    assert again == dataclasses.replace(expected, reference_dir=f"{folder}/reference")
    write_config(folder / "task1" / "config.yaml", to_dict(dataclasses.replace(args, max_steps=7)))
    assert "--max-steps 14" in with_model(f"More:{AGAIN} --forget-strength 0.5 --num-epochs TWICE", own)


@pytest.mark.parametrize("beside", [None, FinetuneArgs(model="org/name"), EvalArgs(model="org/name"), "broken"], ids=str)
def test_advice_to_forget_more_repeats_no_run_where_no_unlearning_left_the_model(tmp_path, beside):
    (tmp_path / "model").mkdir()
    if beside == "broken":
        (tmp_path / "config.yaml").write_text("forget_losses: [ME+GD\n")
    elif beside:
        write_config(tmp_path / "config.yaml", to_dict(beside))
    advice = Verdict("no", "yes", "x", {}, [], [f"To forget more:{AGAIN} --forget-strength 10"])
    for settings in ({"model": str(tmp_path / "model")}, EvalArgs(model="org/name"), EvalArgs(model=str(tmp_path / "model"))):
        text = verdict_text(advice, settings)
        assert text.endswith(f"- {NO_RUN}")
        assert "--" not in text
    keep = Verdict("yes", "no", "x", {}, [], [f"To keep more, gentler steps:{AGAIN} --forget-strength 0.5"])
    assert verdict_text(keep, {"model": str(tmp_path / "model")}).endswith("- To keep more, gentler steps.")
    assert AGAIN.strip() in verdict_text(advice)  # of a card, whose files may go anywhere


def test_advice_to_forget_more_has_no_limit_for_a_run_whose_result_is_a_mean_which_none_measures(tmp_path):
    args = UnlearnArgs(average_cycles=0.9, output_dir=str(tmp_path))
    (tmp_path / "task1" / "model").mkdir(parents=True)
    write_config(tmp_path / "task1" / "config.yaml", to_dict(args))
    known, now = (Summary(sets={"forget": {"probability": value, "rouge_l_recall": value}}) for value in (0.99, 0.5))
    (more,) = (one for one in judge(known, now).tries if "--forget-until" in one)
    said, command = said_and_typed(with_model(more, {"model": str(tmp_path / "task1" / "model")}))
    assert said == "To forget more, stronger forget steps:"
    again = parse(UnlearnArgs, shlex.split(command)[2:])
    assert (again.average_cycles, again.forget_until, again.forget_strength) == (0.9, None, 4.0)


def test_a_run_ends_with_the_command_that_tells_more_of_it(monkeypatch, capsys):
    folder = Path("runs/it's mine")
    monkeypatch.setattr(unlearn, "run", lambda args: unlearn.RunResult(folder, []))
    unlearn.command(UnlearnArgs())
    last = capsys.readouterr().out.splitlines()[-1]
    assert shlex.split(last) == ["dualoptim", "report", str(folder)]


def test_no_line_and_no_page_breaks_a_command_or_a_flag(monkeypatch, read_page):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    for columns in range(30, 90):
        monkeypatch.setenv("COLUMNS", str(columns))
        text = verdict_text(Verdict("no", "no", "x", {}, ["Give --eval-every N with --keep-best."], ADVICE.tries))
        assert _ATTACK.partition("\n")[2] in text
        assert not [line for line in text.splitlines() if line.endswith("-")]
    section = Section("T", points=[*ADVICE.tries, "To keep more: --retain-freq, a --forget-lr."])
    assert f"\n      {_ATTACK.partition(chr(10))[2]}\n" in to_markdown(section)
    page = to_html(section)
    assert f'<code class="command">{_ATTACK.partition(chr(10))[2]}</code>' in page
    assert "<code>--retain-freq</code>, a <code>--forget-lr</code>." in page
    assert "code { white-space: nowrap; }" in page
    assert "To keep more: --retain-freq, a --forget-lr." in read_page(page).text
