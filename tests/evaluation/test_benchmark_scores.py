"""The scores of benchmarks: against what their own code computes, from the rows on."""

import json
import math
import re
from dataclasses import replace

import pytest

from dualoptim import InputError, UnlearnArgs
from dualoptim.data.declaration import Declaration, RowsOf, ScoreOf, benchmarks, read_declaration
from dualoptim.data.own import open_source
from dualoptim.evaluation.benchmark_scores import benchmark_scores, check_scores, value_of
from dualoptim.evaluation.comparisons import COMPARISONS, OF_BENCHMARKS
from dualoptim.evaluation.generation import before_stop
from dualoptim.evaluation.judges import Judges
from dualoptim.evaluation.membership import min_k
from dualoptim.evaluation.records import Record
from dualoptim.evaluation.rouge import rouge_l_recall
from dualoptim.evaluation.summarize import summarize
from dualoptim.evaluation.summary import Summary
from dualoptim.reporting.tables import set_table


@pytest.fixture
def lume(shared, shared_json, tmp_path):
    """What the product makes of the oracle's generations, and of losses of documents."""
    oracle = shared_json("oracles/lume.json")
    known = {}
    for name in ("forget", "retain"):
        lines = [json.loads(line) for line in shared(f"data/lume/{name}.jsonl").read_text().splitlines()]
        known |= {(name, line["id"]): line for line in lines}

    def compute(rows, losses, mmlu):
        records = {}
        for name in ("forget", "retain"):
            own = [row for row in rows if row["set"] == name]
            (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(known[name, row["id"]]) for row in own))
        args = UnlearnArgs(model="none", benchmark="lume", data=str(tmp_path))
        for name, found in open_source(args).evaluation_sets("", 1)[0].items():
            own = [row["generation"] for row in rows if row["set"] == name]
            records[name] = [
                Record(
                    row.question,
                    row.answer,
                    rouge_l_recall=rouge_l_recall(row.answer, generated),
                    **{metric: COMPARISONS[metric].of(row.answer, generated) for metric in row.asking.metrics},
                    group=row.asking.group,
                )
                for row, generated in zip(found, own, strict=True)
            ]
        records |= {name: [Record(None, "text", loss=loss) for loss in own] for name, own in losses.items()}
        summary = replace(summarize(records, {}, Judges(), None), general={"mmlu": {"acc": mmlu}} if mmlu else None)
        return summary, *benchmark_scores(read_declaration("lume"), summary)

    losses = {"members": oracle["mia"]["member_loss"], "holdout": oracle["mia"]["nonmember_loss"]}
    return oracle, compute, losses


def answer_of(shared, row):
    lines = shared(f"data/lume/{row['set']}.jsonl").read_text().splitlines()
    return next(json.loads(line)["output"] for line in lines if json.loads(line)["id"] == row["id"])


def test_lumes_means_aggregate_membership_and_final_score(lume):
    oracle, compute, losses = lume
    summary, benchmark, missing = compute(oracle["rows"], losses, oracle["mmlu"])
    for name, tasks in oracle["means"].items():
        for task, values in tasks.items():
            scores = {kind: summary.sets[f"{name}_{task.lower()}_{kind}"] for kind in ("sc", "qa")}
            assert scores["sc"]["rouge_l_recall"] == pytest.approx(values["sc_rougeL_recall"], abs=1e-9)
            assert scores["qa"]["exact_match"] == pytest.approx(values["qa_exact_match"], abs=1e-9)
    assert summary.privacy["mia_loss"] == pytest.approx(oracle["mia_auc"], abs=1e-9)
    expected = {"task_aggregate": oracle["task_aggregate"], "membership_score": oracle["mia_score"], "mmlu": oracle["mmlu"]}
    assert benchmark.scores == pytest.approx(expected | {"final_score": oracle["final_score"]}, abs=1e-9)
    assert not [name for name in missing if name.startswith("lume")]
    assert Summary.from_json(json.loads(json.dumps(replace(summary, benchmark=benchmark)))).benchmark == benchmark


def test_one_value_of_zero_makes_lumes_aggregate_zero(lume, shared):
    oracle, compute, losses = lume
    expected = oracle["cases"]["forget_Task2_qa_all_exact_and_mia_swapped"]
    rows = [
        row | {"generation": answer_of(shared, row)}
        if (row["set"], row["task"], row["kind"]) == ("forget", "Task2", "qa")
        else row
        for row in oracle["rows"]
    ]
    swapped = {"members": losses["holdout"], "holdout": losses["members"]}
    _, benchmark, _ = compute(rows, swapped, oracle["mmlu"])
    assert benchmark.scores["task_aggregate"] == 0
    for name, value in (("membership_score", expected["mia_score"]), ("final_score", expected["final_score"])):
        assert benchmark.scores[name] == pytest.approx(value, abs=1e-9)


def test_a_perfect_run_of_lume(lume, shared):
    oracle, compute, losses = lume
    rows = [row | {"generation": "zzz" if row["set"] == "forget" else answer_of(shared, row)} for row in oracle["rows"]]
    same = {"members": losses["members"], "holdout": losses["members"]}
    _, benchmark, _ = compute(rows, same, oracle["mmlu"])
    expected = oracle["cases"]["perfect"]
    assert benchmark.scores["task_aggregate"] == pytest.approx(1, abs=1e-9)
    assert benchmark.scores["final_score"] == pytest.approx(expected["final_score"], abs=1e-9)


def test_what_lacks_a_kind_of_rows_or_mmlu_says_so(lume):
    oracle, compute, losses = lume
    rows = [row for row in oracle["rows"] if (row["set"], row["task"], row["kind"]) != ("retain", "Task3", "sc")]
    _, benchmark, missing = compute(rows, {}, None)
    assert benchmark.scores == {}
    assert missing["lume.task_aggregate"] == "needs retain_task3_sc.rouge_l_recall, which was not measured"
    assert missing["lume.mmlu"] == "needs mmlu; give --lm-eval-tasks mmlu"
    _, benchmark, missing = compute(oracle["rows"], losses, None)
    other = (oracle["task_aggregate"] + oracle["mia_score"]) / 2
    assert benchmark.scores["final_score_without_mmlu"] == pytest.approx(other, abs=1e-9)
    assert "final_score" not in benchmark.scores
    assert "the other two" in benchmark.titles["final_score_without_mmlu"]


def test_muses_memorization_is_its_codes_and_stop_words_cut_one_after_the_other(shared_json):
    muse = shared_json("oracles/muse.json")
    declared = read_declaration("muse-news")
    for row in muse["knowmem"]["rows"]:
        assert before_stop(row["raw_generation"], declared.rows["retain"].stop) == row["cut_generation"]
    score = COMPARISONS["rouge_l_f1_unstemmed"].of
    knows = [Record("q", row["answer"], rouge_l_f1_unstemmed=score(row["answer"], row["cut_generation"].strip()))
             for row in muse["knowmem"]["rows"]]  # fmt: skip
    says = [Record("q", row["gt_cut"], rouge_l_f1_unstemmed=score(row["gt_cut"], row["generation_cut"].strip()))
            for row in muse["verbmem"]["rows"]]  # fmt: skip
    summary = summarize({"forget": says, "forget_knowmem": knows, "retain": knows}, {}, Judges(), None)
    scores = benchmark_scores(declared, summary)[0].scores
    assert scores["verbmem_f"] == pytest.approx(muse["verbmem"]["verbmem_f"], abs=1e-9)
    assert scores["knowmem_f"] == scores["knowmem_r"] == pytest.approx(muse["knowmem"]["knowmem"], abs=1e-9)


@pytest.mark.parametrize("name", ["news", "books"])
def test_privleak_has_muses_sign_and_reference(shared_json, name):
    oracle = shared_json("oracles/muse.json")["privleak"]
    records = {}
    for own, passages in (("members", "forget"), ("holdout", "holdout")):
        every = oracle["passages"][passages]
        records[own] = [Record(None, "text", min_k=min_k(passage["token_logprobs"])) for passage in every]
        for record, passage in zip(records[own], every, strict=True):
            assert record.min_k == pytest.approx(passage["Min-40%"], abs=1e-9)
    summary = summarize({"forget": [], **records}, {}, Judges(), None)
    scores = benchmark_scores(read_declaration(f"muse-{name}"), summary)[0].scores
    assert scores["auc"] == pytest.approx(oracle["MUSE"]["auc"]["forget_holdout_Min-40%"], abs=1e-9)
    assert summary.privacy["mia_min_k"] == pytest.approx(1 - scores["auc"], abs=1e-9)
    assert scores["privleak"] == pytest.approx(oracle["MUSE"]["privleak"][name], abs=1e-9)


def test_formulas_are_arithmetic_and_nothing_else():
    known = {"a.b": 0.25, "c": 4.0}
    assert value_of("1 - 2 * abs(a.b - 0.5)", known) == 0.5
    assert value_of("harmonic_mean(c, mean(c, 2), -(0 - 1))", known) == pytest.approx(3 / (1 / 4 + 1 / 3 + 1))
    for formula in ("__import__('os')", "a.b ** 2", "[c]", "c if c else 1", "abs(c, c)", "'text'", "", "1 / 1e-400"):
        with pytest.raises((ValueError, ZeroDivisionError)):
            value_of(formula, known)
    with pytest.raises(KeyError, match=r"a\.d"):
        value_of("a.d + 1", known)
    assert math.isclose(value_of("0.4772", {}), 0.4772)


@pytest.mark.parametrize("name", benchmarks())
def test_every_formula_of_the_package_can_be_read(name):
    check_scores(read_declaration(name))


def test_what_is_not_said_of_a_score_follows_from_the_set_and_the_metric():
    rows = {name: RowsOf(("f.jsonl",)) for name in ("letters", "forget", "retain")}
    formulas = {
        "fall": "letters.exact_match",
        "rise": "forget.passage_loss",
        "stay": "retain.exact_match",
        "loss": "retain.passage_loss",
        "gone": "1 - forget.exact_match",
    }
    scores = {name: ScoreOf(formula) for name, formula in formulas.items()} | {
        "said": ScoreOf("retain.exact_match", should="rise")
    }
    declared = Declaration("mine", rows=rows, forget=("letters",), retain="retain", measure=tuple(rows), scores=scores)
    sets = {name: {"exact_match": 0.5, "passage_loss": 1.0} for name in rows}
    found, missing = benchmark_scores(declared, Summary(sets=sets))
    assert found.should == {"fall": "fall", "rise": "rise", "stay": "stay", "loss": "not rise", "gone": "rise", "said": "rise"}
    assert (found.forgets, found.keeps, missing) == (["letters", "forget"], ["retain"], {})
    assert not [
        row
        for row in set_table({"after": Summary(sets=sets, benchmark=found)}).rows
        if row[0] == "letters" and row[-1] == "stay"
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"scores": {"all": ScoreOf("mean(forget.rouge)")}},
            "scores.all has 'forget.rouge'; forget has no rouge",
        ),
        (
            {"scores": {"all": ScoreOf("forget.exactmatch")}},
            "scores.all has 'forget.exactmatch'; forget has no exactmatch (did you mean exact_match?); take probability,",
        ),
        ({"scores": {"all": ScoreOf("privacy.loss")}}, "privacy has no loss (did you mean mia_loss?); take mia_loss, mia_zlib"),
        ({"scores": {"all": ScoreOf("forgot.probability")}}, "take a score above it, or SET.METRIC of forget"),
        (
            {"rows": {"forget": RowsOf("f.jsonl", metrics=("rouge_l_recall",))}},
            "rows.forget.metrics has 'rouge_l_recall', which every set has by itself; take it away",
        ),
        ({"scores": {"all": ScoreOf("forget.probability +")}}, "scores.all.of is 'forget.probability +' (it cannot be read)"),
        ({"scores": {"all": ScoreOf("1", instead_of="none")}}, "scores.all.instead_of is 'none'; name a score above it"),
        ({"rows": {"forget": RowsOf("f.jsonl", metrics=("bleu",))}}, "rows.forget.metrics has 'bleu'; take rouge_1_recall"),
    ],
)
def test_mistakes_in_scores_are_named(change, message):
    declared = Declaration("mine", rows={"forget": RowsOf("f.jsonl")}, forget=("forget",), measure=("forget",))
    with pytest.raises(InputError, match=r"^--benchmark mine: ") as error:
        check_scores(replace(declared, **change))
    assert message in str(error.value)


def test_a_score_may_name_a_group_that_the_rows_make():
    declared = Declaration("mine", rows={"forget": RowsOf("f.jsonl", group_by="kind")}, forget=("forget",), measure=("forget",))
    declared = replace(declared, scores={"gone": ScoreOf("1 - forget_born.exact_match")})
    check_scores(declared, ["forget_born"])
    with pytest.raises(InputError, match=r"scores.gone has 'forget_born.exact_match'; .* SET.METRIC of forget, forget_died$"):
        check_scores(declared, ["forget_died"])


@pytest.mark.parametrize("name", benchmarks())
def test_what_should_stay_is_judged_so_that_more_of_it_is_better_and_none_is_negative(name):
    losses = {metric for metric, (_, aim, _) in OF_BENCHMARKS.items() if aim == "rise"}
    for score in (score for score in read_declaration(name).scores.values() if score.should == "stay"):
        names = re.findall(r"[a-z]\w*\.[\w.]+", score.of)
        assert names, "a constant stays by itself"
        assert not losses & {one.partition(".")[2] for one in names}
        assert 0 <= value_of(score.of, dict.fromkeys(names, 0.5)) < value_of(score.of, dict.fromkeys(names, 1.0))
