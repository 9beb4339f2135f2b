"""Tables of scores, attacks and settings."""

import pytest

from dualoptim import EvalArgs, UnlearnArgs
from dualoptim.config.saved import to_dict
from dualoptim.evaluation.summary import Summary
from dualoptim.reporting import tables
from dualoptim.reporting.console import evaluation_tables, example_answers, score_table


def settings(**changes):
    table = tables.setting_table(to_dict(UnlearnArgs(model="org/base", **changes)), UnlearnArgs)
    return dict(table.rows)


def test_columns_line_up_as_plain_text():
    table = tables.Table(("name", "x"), [("a", "1.000"), ("long name", "-")])
    assert table.markdown() == ("| name      |     x |\n|-----------|------:|\n| a         | 1.000 |\n| long name |     - |")
    assert not tables.Table(("name",), [])


def test_a_tiny_p_value_keeps_its_size_and_an_attack_needs_no_before(after):
    summary = Summary.from_json({**after, "tofu": {"forget_quality": 1.23e-11}})
    rows = tables.aggregate_table(tables.side_by_side(None, summary)).rows
    assert ("TOFU forget quality (p-value against retain-only)", "1e-11", "-", "rise") in rows
    assert ("without an attack", "0.012", "", "0.012", "", "0.965") in tables.attack_table(None, summary).rows


def test_without_attacks_there_is_no_table_of_them(before):
    assert not tables.attack_table(None, Summary.from_json(before))


def test_sets_that_no_one_knows_are_shown_after_the_others():
    table = tables.set_table({"score": Summary(sets={"own_set": {"probability": 0.5}, "forget_task3": {"truth_ratio": 0.5}})})
    assert table.rows == [
        ("own set", "probability of the true answer", "0.500", "stay"),
        ("task 3, unlearned before", "truth ratio", "0.500", "stay forgotten"),
    ]


def test_settings_that_are_off_are_left_out():
    shown = settings()
    assert shown["model"] == "org/base"
    assert shown["weight decay"] == "0.01"
    assert not {"max steps", "use lora", "lora rank", "beta", "eval rows", "retain file"} & set(shown)
    changed = settings(weight_decay=0.0, mask=False, max_steps=7, use_lora=True)
    assert {name: changed[name] for name in ("weight decay", "mask", "max steps", "use lora", "lora rank")} == {
        "weight decay": "0", "mask": "no", "max steps": "7", "use lora": "yes", "lora rank": "8",
    }  # fmt: skip


@pytest.mark.parametrize(("optim", "shown"), [("dual-adamw", True), ("adamw-alternate", True), ("adamw", False)])
def test_settings_that_the_optimizer_does_not_read_are_left_out(optim, shown):
    assert ("retain freq" in settings(optim=optim)) == shown


def test_a_task_that_is_not_the_default_is_shown_even_if_it_is_0():
    assert ("task", "0") in tables.setting_table({"task": 0}, EvalArgs).rows


def test_the_console_says_what_was_forgotten_and_what_was_kept(before, after, lines_of):
    before, after = Summary.from_json(before), Summary.from_json(after)
    lines = lines_of(score_table({"before": before, "after": after}))
    assert "| forget set (should fall): probability of the true answer | 0.987 | 0.012 |" in lines
    assert "| model utility (0 to 1, higher keeps more) | 0.654 | 0.643 |" in lines
    lines = lines_of(evaluation_tables(after))
    assert "| rows | metric | score | retain-only | should |" in lines
    assert "| weights in 4 bits | 0.314 | +0.302 | 0.271 | +0.259 | 0.812 |" in lines
    assert "| cosine_similarity, entailment_score | needs a sentence encoder |" in lines


def test_the_console_shows_answers_in_one_line(write_json, tmp_path):
    for part, said in (("eval_before", "Right\u2028there."), ("eval", "")):
        write_json(tmp_path / part / "forget.jsonl", [{"question": None, "answer": "Here.", "generated": said}])
    text = example_answers(tmp_path / "eval_before", tmp_path / "eval", {"forget": 2, "retain": 2})
    assert text.splitlines() == [
        "[forget] (a passage, continued from its middle)",
        "  truth:  Here.",
        "  before: Right there.",
        "  after:  (nothing)",
    ]
