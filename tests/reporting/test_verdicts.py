"""The words of a verdict, which are the same everywhere."""

from dualoptim import UnlearnArgs
from dualoptim.evaluation.summary import Summary, Verdict
from dualoptim.evaluation.verdict import judge
from dualoptim.reporting.card import model_card
from dualoptim.reporting.verdicts import verdict_text

VERDICT = Verdict("no", "yes", "the model before", {"forget.probability": 0.1}, ["It knows."], ["Do more."])


def test_a_verdict_is_a_line_for_each_finding_and_then_what_to_try_next():
    assert verdict_text(VERDICT).splitlines() == [
        "Verdict: not forgotten, kept (against the model before).",
        "- It knows.",
        "What to try next:",
        "- Do more.",
    ]
    assert verdict_text(None) == "Verdict: none, because nothing was measured."


def test_console_report_and_card_say_the_same(before, after, run, made, read_page):
    before, after = Summary.from_json(before), Summary.from_json(after)
    verdict = judge(before, after)
    card = model_card(UnlearnArgs(model="org/base"), "unlearned", before, after).replace("\\", "")
    report, page = made(run)
    seen = read_page(page).text
    for line in (*verdict.says, *(one.partition("\n")[0] for one in verdict.tries)):
        assert f"- {line}" in verdict_text(verdict).splitlines()
        assert f"- {line}" in card.splitlines()
        assert f"- {line}" in report.replace("\\", "").splitlines()
        assert line in seen
    assert "Hidden, not forgotten, kept (against the model before unlearning and the retain-only model)." in card


def test_a_report_shows_the_verdict_that_was_given_and_gives_one_about_older_results(write_task, tmp_path, after, made):
    given = {"forgotten": "yes", "kept": "no", "against": "another", "says": ["As it was said."]}
    one, two = write_task(tmp_path / "one" / "task1", after={**after, "verdict": given}), write_task(tmp_path / "two" / "task1")
    report, _ = made(one, two)
    assert "- As it was said." in report
    assert "Comes back after 10 steps of relearning" in report
