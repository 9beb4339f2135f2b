"""The order in which a run meets its rows, and what is drawn for them."""

import pytest
from transformers import AutoTokenizer

from dualoptim import UnlearnArgs
from dualoptim.data.own import load_refusals
from dualoptim.data.prompts import TEMPLATES, Formatter
from dualoptim.data.rows import Row
from dualoptim.data.stream import ExampleBuilder, Stream, seeded


def stream(processes=1, process=0, batch_size=4, accumulation=3, rows=17, seed=5):
    return Stream(
        "forget", rows, lambda index, epoch: [(int(index), epoch)], seed, batch_size, accumulation, process, processes
    )


def flat(windows):
    return [example for window in windows for micro_batch in window for example in micro_batch]


def test_every_epoch_visits_every_row_once():
    seen = flat(stream().window(step) for step in range(17))  # 17 steps of 12 = 12 epochs of 17
    for epoch in range(12):
        assert sorted(index for index, visited in seen if visited == epoch) == list(range(17))
    orders = [[index for index, visited in seen if visited == epoch] for epoch in range(12)]
    assert len({tuple(order) for order in orders}) == 12


def test_a_step_sees_the_same_rows_on_any_number_of_processes():
    for step in (0, 1, 7):
        alone = flat([stream(batch_size=4, accumulation=6).window(step)])
        for processes, batch_size, accumulation in ((2, 4, 3), (2, 2, 6), (3, 4, 2), (8, 1, 3)):
            shares = [flat([stream(processes, p, batch_size, accumulation).window(step)]) for p in range(processes)]
            assert [example for share in shares for example in share] == alone


def test_a_stream_needs_no_memory_of_what_came_before():
    forward, jumping = stream(), stream()
    windows = [flat([forward.window(step)]) for step in range(12)]
    for step in (11, 3, 0, 7):
        assert flat([jumping.window(step)]) == windows[step]


def test_the_seed_and_the_phase_choose_the_order():
    base = flat([stream().window(0)])
    assert flat([stream(seed=6).window(0)]) != base
    other = stream()
    other.name = "retain"
    assert flat([other.window(0)]) != base


def test_refusals_vary_over_rows_and_epochs_and_repeat_with_the_seed(tiny):
    formatter = Formatter(AutoTokenizer.from_pretrained(tiny), TEMPLATES["qa"], 200)
    rows = [Row(f"Question {n}?", "Answer.") for n in range(10)]
    refusals = load_refusals(None)
    first = ExampleBuilder(rows, formatter, ("answer", "refusal"), 1, refusals)
    again = ExampleBuilder(rows, formatter, ("answer", "refusal"), 1, refusals)
    other = ExampleBuilder(rows, formatter, ("answer", "refusal"), 2, refusals)
    drawn = [first(index, epoch)[1].ids for epoch in range(3) for index in range(10)]
    assert [again(index, epoch)[1].ids for epoch in range(3) for index in range(10)] == drawn
    assert [other(index, epoch)[1].ids for epoch in range(3) for index in range(10)] != drawn
    texts = {formatter.tokenizer.decode(ids[first(0, 0)[1].start :]) for ids in drawn}
    assert len(texts) > 20
    answer, refusal = first(3, 0)
    assert answer.ids[: answer.start] == refusal.ids[: refusal.start]


def test_one_of_a_rows_other_answers_is_drawn_at_each_visit(tiny):
    formatter = Formatter(AutoTokenizer.from_pretrained(tiny), TEMPLATES["qa"], 64)
    rows = [Row("Who?", "Ann.", alternatives=("Eva.", "Ida.")), Row("Where?", "Lviv.", alternatives=("Bern.",))]
    build, again, other = (ExampleBuilder(rows, formatter, ("answer", "alternative"), seed) for seed in (1, 1, 2))
    visits = [build(0, epoch)[1].ids for epoch in range(20)]
    assert {tuple(ids) for ids in visits} == {tuple(formatter.example("Who?", text).ids) for text in rows[0].alternatives}
    assert visits == [again(0, epoch)[1].ids for epoch in range(20)] != [other(0, epoch)[1].ids for epoch in range(20)]
    assert build(1, 0) == [formatter.example("Where?", text) for text in ("Lviv.", "Bern.")]


def test_a_row_with_a_refusal_of_its_own_is_taught_that(tiny):
    formatter = Formatter(AutoTokenizer.from_pretrained(tiny), TEMPLATES["qa"], 64)
    rows, refusals = [Row("Who?", "Ann.", refusal="I never met her."), Row("Where?", "Lviv.")], ["No.", "Never heard of it."]
    own, drawn = (ExampleBuilder(rows, formatter, ("refusal",), 1, refusals) for rows in (rows, [Row("Who?", "Ann."), rows[1]]))
    for epoch in range(4):
        assert own(0, epoch) == [formatter.of_row(rows[0], "I never met her.", False)]
        assert own(1, epoch) == drawn(1, epoch), "the draws of others stay as they were"


def test_another_text_s_tokens_are_the_labels_again_and_again(tiny):
    formatter = Formatter(AutoTokenizer.from_pretrained(tiny), TEMPLATES["qa"], 64)
    rows = [
        Row("Who?", "Ann, the daughter of Eva and of many others, was here."),
        Row("Where?", "A", refusal="Nobody knows it."),
    ]
    (long,), (short,) = (ExampleBuilder(rows, formatter, ("answer",), 1, ["No."], instead="refusal")(n, 0) for n in (0, 1))
    no, nobody = (formatter.example(row.question, text) for row, text in zip(rows, ("No.", "Nobody knows it."), strict=True))
    said = no.ids[no.start :]
    assert said[-1] == formatter.end
    assert len(long.labels) == len(long.ids) - long.start > 2 * len(said)
    assert long.labels == (said * 99)[: len(long.labels)]
    assert short.labels == nobody.ids[nobody.start :][: len(short.labels)], "a row's own refusal, cut to the answer"
    assert (long.ids, long.start) == (formatter.of_row(rows[0], rows[0].answer).ids, long.start)


def test_the_stream_of_a_run_has_its_numbers():
    """Every row is read from the builder, and all processes together meet what `visited` gives."""
    args = UnlearnArgs(model="m", seed=7, batch_size=2, gradient_accumulation_steps=3)
    rows = [Row(f"{n}?", str(n)) for n in range(5)]
    build = ExampleBuilder(rows, Texts(), ("answer",), args.seed)
    streams = [Stream.of(args, "forget", build, (process, 2)) for process in range(2)]
    assert [(s.rows, s.seed, s.process, s.global_batch) for s in streams] == [(5, 7, 0, 12), (5, 7, 1, 12)]
    met = flat(stream.window(step) for step in range(4) for stream in streams)
    assert met == list(streams[0].visited(4))
    assert sorted(met[:5]) == [(row.question, row.answer, False) for row in rows]


def test_a_mismatch_is_the_answer_of_another_row():
    others = [Row(f"other {n}?", f"other {n}") for n in range(6)]
    build = ExampleBuilder([Row("Why?", "So.")], Texts(), ("mismatch", "answer"), 3, others=others, score_question=True)
    drawn = [build(0, epoch) for epoch in range(20)]
    assert {own for _, own in drawn} == {("Why?", "So.", True)}
    assert len({text for (_, text, _), _ in drawn}) > 3
    assert drawn[4][0][1] == others[int(seeded(3, "mismatch", 4, 0).integers(6))].answer


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [((1001, "forget", 0), [4, 7, 5]), ((1001, "retain", 3), [3, 0, 6]), ((0, "refusal", 2, 17), [8, 0, 3])],
)
def test_draws_are_those_of_earlier_versions(arguments, expected):
    assert seeded(*arguments).integers(10, size=3).tolist() == expected


class Texts:
    """Gives texts in place of their tokens."""

    def of_row(self, row, *texts):
        return row.question, *texts
