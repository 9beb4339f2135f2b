"""RWKU's scores: against what its own code computes, from a model's answers and logits on."""

from types import SimpleNamespace

import pytest
import torch
from rwku_layout import write_rwku

from dualoptim import EvalArgs, InputError, UnlearnArgs
from dualoptim.data.batches import pack
from dualoptim.data.benchmark import Benchmark
from dualoptim.data.declaration import read_declaration
from dualoptim.data.prompts import Example
from dualoptim.evaluate import Measures
from dualoptim.evaluation import comparisons
from dualoptim.evaluation.benchmark_scores import benchmark_scores
from dualoptim.evaluation.comparisons import COMPARISONS, bag_f1, ngram_entropy, stated_answer, words_of
from dualoptim.evaluation.distinct_rouge import distinct_rouge
from dualoptim.evaluation.generation import _before_token
from dualoptim.evaluation.judges import Judges
from dualoptim.evaluation.membership import zlib_score
from dualoptim.evaluation.records import Record
from dualoptim.evaluation.scoring import ScoringPass
from dualoptim.evaluation.summarize import summarize

RECALL = COMPARISONS["distinct_rouge_l_recall"].of


class Bigram(torch.nn.Module):
    """Gives logits = W[input_ids], as a transformers model is called."""

    def __init__(self, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(weight, dtype=torch.float64))

    def forward(self, input_ids, logits_to_keep=slice(None), **_):
        return SimpleNamespace(logits=self.weight[input_ids][:, logits_to_keep])


def test_rouge_is_that_of_the_package_but_for_its_errors(shared_json):
    for pair in shared_json("oracles/rwku.json")["rouge_pairs"]:
        recall, f1 = distinct_rouge(pair["reference"], pair["hypothesis"])
        assert recall == pytest.approx(pair.get("recall", 0), abs=1e-9)
        assert f1 == pytest.approx(pair.get("f1", 0), abs=1e-9)


def test_every_probe_each_level_and_all_of_them(shared_json, tmp_path):
    oracle = shared_json("oracles/rwku.json")
    folder = write_rwku(tmp_path, ["Somebody"], probes=oracle["forget_probes"], neighbors=oracle["neighbor_probes"])
    sets, _ = Benchmark(UnlearnArgs(model="none", benchmark="rwku", data=str(folder))).evaluation_sets("", 1)
    records = {}
    for name, own in (("forget", "forget_probes"), ("retain", "neighbor_probes")):
        known = {probe["query"]: probe for probe in oracle[own]}
        records[name] = []
        for row in sets[name]:
            probe = known[row.question]
            recall = RECALL(row.answer, probe["raw_output"].strip())  # as `generate` gives it
            assert recall == pytest.approx(probe["rougeL_recall"], abs=1e-9)
            records[name].append(Record(row.question, row.answer, distinct_rouge_l_recall=recall, group=row.asking.group))
    summary = summarize(records, {}, Judges(), None)
    scores, missing = benchmark_scores(read_declaration("rwku"), summary)
    expected = {
        f"{name}_{kind}": 100 * oracle[f"{name}_scores"][level]
        for name in ("forget", "neighbor")
        for kind, level in {"fb": "level_1", "qa": "level_2", "aa": "level_3"}.items()
        if level in oracle[f"{name}_scores"]
    } | {"forget_all": 100 * oracle["forget_all"], "neighbor_all": 100 * oracle["neighbor_all"]}
    assert scores.scores == pytest.approx(expected, abs=1e-7)  # in percent
    assert summary.rows["forget_prefix_injection"] == 1  # each kind of attack has a mean of its own
    assert missing["rwku.utility_general"] == "needs mmlu.right_choice, which was not measured"


def test_membership_of_passages(shared_json):
    oracle = shared_json("oracles/rwku.json")["mia"]
    loaded = SimpleNamespace(model=Bigram(oracle["W"]), batch=pack, accelerator=SimpleNamespace(is_main_process=False))
    scoring = ScoringPass(loaded, SimpleNamespace(eval_batch_size=2))
    texts = [[Example(passage["ids"], 1, ended=False)] for passage in oracle["passages"]]
    records = []
    for (found,), passage in zip(scoring.score_texts("", texts, least=0.2), oracle["passages"], strict=True):
        zlib = zlib_score(found.loss, passage["text"])
        assert [-found.loss, -zlib] == pytest.approx([passage["loss"], passage["zlib"]], abs=1e-9)
        expected = [passage["mink_0.2"], passage["mink++_0.2"]]
        assert [-found.min_k, -found.min_k_plus_plus] == pytest.approx(expected, abs=1e-9)
        values = {"loss": found.loss, "zlib": zlib, "min_k": found.min_k, "min_k_plus_plus": found.min_k_plus_plus}
        records.append(Record(None, passage["text"], **{f"passage_{name}": value for name, value in values.items()}))
    summary = summarize({"forget": [], "forget_passages": records}, {}, Judges(), None)
    scores = benchmark_scores(read_declaration("rwku"), summary)[0].scores
    means = oracle["means"]
    expected = {"mia_fm": -100 * means["loss"], "mia_fm_zlib": means["zlib"], "mia_fm_min_k_plus_plus": means["mink++_0.2"]}
    assert scores == pytest.approx(expected, abs=1e-7)
    assert [name for name in summary.skipped if name.startswith("forget_passages")] == []


def test_fluency_of_nltks_words_with_and_without_sentences(shared_json, monkeypatch):
    fluency = shared_json("oracles/rwku.json")["fluency"]
    for one in fluency["texts"]:
        assert ngram_entropy(one["tokens"]) == pytest.approx(one["entropy"], abs=1e-9)
        assert words_of(one["text"]) == one["tokens_without_sentence_split"]
    tokens = {one["text"]: one["tokens"] for one in fluency["texts"]}
    monkeypatch.setattr(comparisons, "sentences_words", tokens.get)
    values = [COMPARISONS["ngram_entropy_of_sentences"].of("", text) for text in tokens]
    summary = summarize(
        {"forget": [], "fluency": [Record("q", "q", ngram_entropy_of_sentences=v) for v in values]}, {}, Judges(), None
    )
    scores = benchmark_scores(read_declaration("rwku"), summary)[0].scores
    assert scores == pytest.approx({"utility_fluency": 100 * fluency["entropy"]}, abs=1e-7)


def test_fluency_without_nltks_data_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("nltk.data.path", [])
    comparisons.splits_sentences.cache_clear()
    remedy = "needs nltk's data punkt_tab; python -m nltk.downloader punkt_tab"
    _, missing = benchmark_scores(read_declaration("rwku"), summarize({"forget": []}, {}, Judges(), None))
    assert missing["rwku.utility_fluency"] == remedy
    with pytest.raises(InputError, match=f"^--metrics ngram_entropy_of_sentences {remedy}$"):
        Measures.load(EvalArgs(model="none", metrics=("ngram_entropy_of_sentences",)), SimpleNamespace(num_processes=1), None)
    comparisons.splits_sentences.cache_clear()


def test_an_answer_stops_before_a_token_that_is_a_line_break_and_at_no_other():
    texts = {1: "Derry", 2: ".\n", 3: "\n", 4: " \n"}
    loaded = SimpleNamespace(tokenizer=SimpleNamespace(decode=lambda ids: texts[ids[0]]))
    assert _before_token(loaded, [1, 2, 1, 3, 1], ("\n", " \n")) == [1, 2, 1]
    assert _before_token(loaded, [4, 1], ("\n", " \n")) == []
    assert _before_token(loaded, [1, 3, 1], ()) == [1, 3, 1]


def test_f1_of_words_and_stated_answers_by_hand():
    assert bag_f1("Rim of Fire", "The rim, of fire!") == 1
    assert bag_f1("Rim of Fire", "a fire") == pytest.approx(2 * 1 * (1 / 3) / (1 + 1 / 3))
    assert [bag_f1("the", "a"), bag_f1("Fire", ""), bag_f1("Fire", "water")] == [1, 0, 0]
    assert stated_answer("(B)", "Let us see. So the answer is (B). Or not.") == 1
    assert stated_answer("(B)", "B") == 1
    assert stated_answer("4", "The answer is 5. 4") == 0
