"""What is measured of the rows of a set, which several processes share out."""

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest

from dualoptim import EvalArgs
from dualoptim.data.rows import Asking, Row
from dualoptim.evaluation import measure, scoring
from dualoptim.evaluation.scoring import ScoringPass
from dualoptim.models.launch import start_accelerator
from dualoptim.models.load import load_model

PASSAGE = Row(None, "The ferry of Ostby sails at nine.", asking=Asking(metrics=("passage_loss",), only=True))
QUESTION = Row("Who led the ferry company?", "Marta Quill", asking=Asking(metrics=("exact_match",), only=True))
PLAIN = Row("What is it?", "It.")


@pytest.fixture(scope="module")
def tiny_pass(tiny):
    args = EvalArgs(model=str(tiny), data="demo", max_new_tokens=4)
    return ScoringPass(load_model(args, start_accelerator(args)), args)


@pytest.mark.parametrize("rows", [[PASSAGE, QUESTION], [QUESTION, PASSAGE], [PASSAGE, QUESTION, PLAIN]])
def test_every_row_has_what_it_asks_for_whichever_is_the_first(tiny_pass, rows):
    records = dict(zip(rows, measure.set_records(tiny_pass, "forget", rows), strict=True))
    assert records[PASSAGE].passage_loss > 0
    assert records[PASSAGE].loss is None
    assert (records[QUESTION].exact_match, records[QUESTION].passage_loss) == (0, None)
    if PLAIN in records:
        assert records[PLAIN].loss > 0
        assert (records[PLAIN].min_k, records[PLAIN].passage_loss) == (None, None)
        assert records[PLAIN].generated is not None


@pytest.mark.parametrize("rows", [[PASSAGE, QUESTION], [QUESTION, PASSAGE], [PLAIN, PASSAGE]])
def test_all_processes_answer_if_one_has_to(tiny_pass, rows, monkeypatch):
    """Each has one of the two rows; a model that is divided among them waits for all."""
    answered = []
    monkeypatch.setattr(scoring, "gather_object", lambda found: found)
    monkeypatch.setattr(measure, "_add_answers", lambda scoring, name, scored: answered.append([one.index for one in scored]))
    for process in (0, 1):
        accelerator = SimpleNamespace(process_index=process, num_processes=2, is_main_process=False)
        loaded = SimpleNamespace(accelerator=accelerator, autocast=nullcontext, in_step=nullcontext)
        names = ("examples", "attacks_membership_of", "score_texts", "scored_rows", "judges")
        one = SimpleNamespace(loaded=loaded, **{name: getattr(tiny_pass, name) for name in names})
        one.shared_out = partial(ScoringPass.shared_out, one)
        assert len(measure.set_records(one, "forget", rows)) == 1
    assert answered == [[0], [1]]
