"""Further comparisons of answers: against what the published code computes on given texts."""

from typing import get_args

import pytest

from dualoptim.config.args import Compared
from dualoptim.evaluation.comparisons import COMPARISONS, exact_match, ngram_entropy, words_of
from dualoptim.evaluation.metrics import METRICS
from dualoptim.evaluation.records import Record
from dualoptim.evaluation.rouge import rouge, rouge_l_recall


def test_the_flag_takes_what_can_be_computed_and_every_name_is_a_metric_of_rows():
    assert set(get_args(Compared)) == set(COMPARISONS)
    assert all(name in METRICS and getattr(Record("q", "a"), name) is None for name in COMPARISONS)


def test_open_unlearnings_rouge_is_ours(shared_json):
    for pair in shared_json("oracles/ou_metrics.json")["rouge_pairs"]:
        texts = pair["ground_truth"], pair["generation"]
        assert COMPARISONS["rouge_1_recall"].of(*texts) == pytest.approx(pair["rouge1_recall"], abs=1e-9)
        assert COMPARISONS["rouge_l_f1"].of(*texts) == pytest.approx(pair["rougeL_f1"], abs=1e-9)
        assert rouge_l_recall(*texts) == pytest.approx(pair["rougeL_recall"], abs=1e-9)


def test_muses_rouge_has_no_stems(shared_json):
    muse = shared_json("oracles/muse.json")
    pairs = [(row["gt_cut"], row["generation_cut"], row) for row in muse["verbmem"]["rows"]]
    pairs += [(row["answer"], row["cut_generation"], row) for row in muse["knowmem"]["rows"]]
    for answer, generated, row in pairs:
        assert COMPARISONS["rouge_l_f1_unstemmed"].of(answer, generated) == pytest.approx(row["rougeL"], abs=1e-9)
        recall, f1 = rouge("rouge1", answer, generated, stemmed=False)
        assert (recall, f1) == pytest.approx((row["rouge1_recall"], row["rouge1"]), abs=1e-9)
    for row in muse["verbmem"]["open_unlearning"]["rows"]:
        ours = COMPARISONS["rouge_l_f1"].of(row["ground_truth"], row["scored_generation"])
        assert ours == pytest.approx(row["rougeL_f1"], abs=1e-9)


def test_exact_match_strips_the_ends_and_the_case_and_nothing_else():
    assert exact_match("Duan Yinming", "  DUAN YINMING \n") == 1
    assert [exact_match("The Shadow", other) for other in ("The Shadow.", "The  Shadow", "It is The Shadow", "")] == [0] * 4


def test_the_entropy_of_ngrams_is_rwkus_fluency(shared_json):
    for text in shared_json("oracles/rwku.json")["fluency"]["texts"]:
        assert ngram_entropy(text["tokens"]) == pytest.approx(text["entropy"], abs=1e-9)
        assert words_of(text["text"]) == text["tokens_without_sentence_split"]
    assert COMPARISONS["ngram_entropy"].of("whatever", "loop loop loop loop loop") == 0
