"""Whatever is given ends in success, or in one line with nothing written: no traceback, no hang."""

import collections

import pytest
from fuzz import strategies
from fuzz.judge import Failure, play
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

KINDS = {
    "words": lambda home: strategies.word_cases(),
    "flags": lambda home: strategies.flag_cases(only_parse=True),
    "runs with odd flags": lambda home: strategies.flag_cases(only_parse=False),
    "rows": lambda home: strategies.row_cases(),
    "files": lambda home: strategies.file_cases(),
    "configurations": strategies.config_cases,
    "model folders": strategies.model_cases,
    "our own files": strategies.own_cases,
}
"""What inputs are drawn from, by what they are about."""

FEW = {
    "words": 60,
    "flags": 80,
    "configurations": 60,
    "runs with odd flags": 8,
    "rows": 10,
    "files": 8,
    "model folders": 10,
    "our own files": 10,
}
MANY = {
    "words": 300,
    "flags": 400,
    "configurations": 300,
    "runs with odd flags": 250,
    "rows": 300,
    "files": 200,
    "model folders": 400,
    "our own files": 400,
}
ALWAYS = {"deadline": None, "database": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


def inputs(home, name, count, tried, phases=(Phase.generate,)):
    """Draw so many inputs of a kind, and try each."""

    @settings(max_examples=count, phases=phases, **ALWAYS)
    @given(case=KINDS[name](home))
    def every(case):
        tried(case)

    every()


@pytest.mark.parametrize("name", list(KINDS))
def test_an_input_ends_in_success_or_in_one_line(name, home, tmp_path):
    inputs(home, name, FEW[name], lambda case: play(case, home, tmp_path / "place"), (Phase.generate, Phase.shrink))


@pytest.mark.campaign
@pytest.mark.parametrize("name", list(KINDS))
def test_many_inputs_end_in_success_or_in_one_line(name, home, tmp_path):
    """All of them are tried; what fails is told by kinds, each with its shortest input."""
    failures: dict[str, list[Failure]] = collections.defaultdict(list)
    outcomes: collections.Counter[str] = collections.Counter()

    def tried(case):
        try:
            outcome = play(case, home, tmp_path / "place")
            outcomes["done" if outcome == "done" else "not finite" if outcome.startswith("NonFinite") else "refused"] += 1
        except Failure as failure:
            failures[failure.place].append(failure)

    inputs(home, name, MANY[name], tried)
    print(f"{name}: {dict(outcomes)}, {sum(map(len, failures.values()))} failed in {len(failures)} ways")
    told = [f"{len(found)} x {place}\n{min(found, key=lambda one: len(repr(one.case)))}" for place, found in failures.items()]
    assert not told, "\n\n".join(told)


def test_the_judge_sees_what_is_wrong(home, tmp_path, monkeypatch):
    """A judge that passes everything would pass here too."""
    from fuzz import judge

    def breaks(args):
        raise KeyError("x")

    def writes(args):
        (tmp_path / "place" / "home" / "x").write_text("y")
        raise judge.InputError("no")

    def hangs(args):
        while True:
            pass

    monkeypatch.setattr(judge, "SECONDS", 0.2)
    case = judge.Case("eval", {"model": "model"})
    for action, says in ((breaks, "KeyError"), (writes, "changed .*home/x"), (hangs, "took more than")):
        for flags in ({"model": "model"}, ["--model", "model"]):
            monkeypatch.setitem(judge.KINDS, "eval", (judge.EvalArgs, action))
            with pytest.raises(Failure, match=says) as failure:
                play(case._replace(flags=flags), home, tmp_path / "place")
            assert judge.from_text(str(failure.value).split("'END'\n")[1].removesuffix("\nEND")) == case._replace(flags=flags)


def test_inputs_are_the_same_every_time(home):
    for name in KINDS:
        once, again = [], []
        for found in (once, again):
            inputs(home, name, 5, lambda case, found=found: found.append(repr(case)))
        assert once == again
    assert st
