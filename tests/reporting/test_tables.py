"""Tables of scores, attacks and settings."""

import pytest

from dualoptim import EvalArgs, UnlearnArgs
from dualoptim.config.saved import to_dict
from dualoptim.evaluation.summary import Attacks, Point, Relearned, RetainOnly, Summary
from dualoptim.evaluation.unseen import ALL_SEEN
from dualoptim.reporting import attack_tables, tables
from dualoptim.reporting.card import model_card
from dualoptim.reporting.console import evaluation_tables, example_answers, score_table
from dualoptim.reporting.unread import unread


def settings(**changes):
    table = tables.setting_table(to_dict(UnlearnArgs(model="org/base", **changes)), UnlearnArgs)
    return dict(table.rows)


def test_columns_line_up_as_plain_text():
    table = tables.Table(("name", "x"), [("a", "1.000"), ("long name", "-")])
    assert table.markdown() == ("| name      |     x |\n|-----------|------:|\n| a         | 1.000 |\n| long name |     - |")
    assert not tables.Table(("name",), [])


def test_a_column_of_numbers_that_nobody_has_is_left_out():
    table = tables.Table(("run", "why", "a", "b", "c"), [("x", "-", "-", "0.5", ""), ("y", "-", "-", "-", "")], left=2)
    assert table.measured() == tables.Table(("run", "why", "b"), [("x", "-", "0.5"), ("y", "-", "-")], left=2)
    assert not tables.Table(("run", "a"), []).measured()


def test_a_tiny_p_value_keeps_its_size_and_an_attack_needs_no_before(after):
    summary = Summary.from_json({**after, "tofu": {"forget_quality": 1.23e-11}})
    rows = tables.aggregate_table(tables.side_by_side(None, summary)).rows
    assert ("TOFU forget quality (p-value against retain-only)", "1e-11", "-", "rise") in rows
    assert ("without an attack", "0.012", "", "0.012", "", "0.965") in attack_tables.attack_table(None, summary).rows


def test_without_attacks_there_is_no_table_of_them(before):
    assert not attack_tables.attack_table(None, Summary.from_json(before))


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


OWN, LUME = {"forget_file": ("f.csv",), "retain_file": ("r.csv",)}, {"benchmark": "lume", "data": "lume"}


@pytest.mark.parametrize(
    ("changes", "name", "shown"),
    [
        ({}, "split", True),
        (OWN, "split", False),
        (LUME, "split", False),
        ({}, "retain_freq", True),
        ({**OWN, "forget_losses": ("NPO+none",)}, "retain_freq", False),
        ({**OWN, "forget_losses": ("NPO+none",)}, "regularization_coeff", False),
        ({**OWN, "forget_losses": ("NPO+none", "NPO+GD")}, "retain_freq", True),
        ({}, "lora_rank", False),
        ({"use_lora": True}, "lora_rank", True),
        ({"decouple": "v", "max_update": 5.0}, "max_update", True),
    ],
)
def test_no_list_of_settings_has_one_that_says_nothing_of_the_run(changes, name, shown):
    args = UnlearnArgs(model="org/base", **changes)
    assert (name.replace("_", " ") in settings(**changes)) == shown
    card = model_card(args, "unlearned")
    assert (f"| {name.replace('_', ' ')} " in card) == shown
    assert (f"\n{name}:" in card) == shown
    assert (name not in unread(to_dict(args))) == shown


def test_a_task_that_is_not_the_default_is_shown_even_if_it_is_0():
    assert ("task", "0") in tables.setting_table({"task": 0}, EvalArgs).rows


def test_the_console_says_what_was_forgotten_and_what_was_kept(before, after, lines_of):
    before, after = Summary.from_json(before), Summary.from_json(after)
    lines = lines_of(score_table({"before": before, "after": after}))
    assert "| | before | after | retain-only |" in lines
    assert any(
        line.startswith("| forget set (should fall): probability of the true answer | 0.987 | 0.012 |") for line in lines
    )
    assert "| model utility (0 to 1, higher keeps more) | 0.654 | 0.643 | 0.621 |" in lines
    over = "over-forgetting: more than retain-only"
    assert f"| forget efficacy (0 to 1, {over}) | 0.123 | 0.901 | 0.876 |" in lines
    lines = lines_of(evaluation_tables(after))
    assert "| rows | metric | score | retain-only | should |" in lines
    assert "| weights in 4 bits | 0.314 | +0.302 | 0.271 | +0.259 | 0.812 |" in lines
    assert "Not measured: cosine_similarity, entailment_score. `skipped` in summary.json says why." in lines


def test_the_console_tells_of_rows_that_no_step_trained_on_or_how_to_have_some(lines_of, monkeypatch):
    """Those that steps trained on are most of the retain set, which has a line already."""
    sets = {name: {"probability": 0.9} for name in ("forget", "retain", "retain_seen", "retain_unseen")}
    lines = lines_of(score_table({"after": Summary(sets=sets)}))
    assert "| retain rows that no step trained on (should stay): probability of the true answer | 0.900 |" in lines
    assert not any("rows that steps trained on" in line for line in lines)
    assert "| forget efficacy (0 to 1, higher forgets more) | - |" in lines
    seen = {"after": Summary(skipped={"retain_unseen": ALL_SEEN})}
    (line,) = [line for line in score_table(seen).splitlines() if line.startswith("Not measured")]
    assert line.endswith("hold some out, as --retain-held-out 0.2.")
    assert "Not measured" not in score_table(seen, explain=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    text = score_table(seen)
    assert max(map(len, text[text.index("Not measured") :].splitlines())) <= 60


@pytest.mark.parametrize(("value", "aim"), [(0.8, "over-forgetting: more than retain-only"), (0.7, "rise, up to retain-only")])
def test_an_efficacy_should_rise_up_to_that_of_the_retain_only_model(value, aim):
    columns = {"before": Summary(untargeted_forget_efficacy=0.9), "after": Summary(untargeted_forget_efficacy=value)}
    assert tables.efficacy_aim(columns) == "rise"
    assert tables.efficacy_aim(columns | {"retain-only": RetainOnly(untargeted_forget_efficacy=0.7)}) == aim


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_gets_tables_that_fit_it_and_a_file_markdown(before, after, monkeypatch, width):
    summaries = {"before": Summary.from_json(before), "after": Summary.from_json(after)}
    whole = Summary.from_json(after)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(width))
    for text in (score_table(summaries), evaluation_tables(whole)):
        assert "|" not in text
        assert max(len(line) for line in text.splitlines() if "Not measured" not in line) <= width
        assert "0.012" in text
    monkeypatch.setattr("sys.stdout.isatty", lambda: False)
    assert "|-----" in score_table(summaries)


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


def test_what_relearning_brought_back_is_read_at_its_peak():
    """An older summary says what had come back after the last step."""
    curve = [Point(step, {"forget": {"probability": p}}) for step, p in ((0, 0.1), (5, 0.7), (10, 0.4))]
    attacks = Attacks(relearn=Relearned(curve=curve, came_back={"probability": 0.3}))
    (_, row) = attack_tables.attack_table(None, Summary(sets=curve[0].sets, attacks=attacks)).rows
    assert row[:3] == ("relearned (5 of 10 steps)", "0.700", "+0.600")
