"""Evaluation of a model that knows its rows: every number against a plain forward pass, and what must not change it."""

import dataclasses
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dualoptim import EvalArgs, InputError
from dualoptim.data import demo
from dualoptim.evaluation import scoring as passes
from dualoptim.data.tofu import Row, Source
from dualoptim.evaluate import evaluate
from dualoptim.evaluation.metrics import exact_memorization, extraction_strength, min_k, rouge_l_recall, zlib_score
from dualoptim.models.load import load_policy, start_accelerator
from dualoptim.evaluation.scoring import ScoringPass
from dualoptim.report import ReportArgs, report


def rows_of(folder, name):
    return [json.loads(line) for line in (folder / "eval" / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def evaluated(taught, tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    args = EvalArgs(model=str(taught), data="demo", eval_rows=12, output_dir=str(folder))
    return folder, evaluate(args)


def test_the_files_and_the_summary(evaluated):
    folder, summary = evaluated
    assert sorted(path.name for path in (folder / "eval").iterdir()) == [
        "config.yaml",
        "finished.json",
        "forget.jsonl",
        "holdout.jsonl",
        "real_authors.jsonl",
        "retain.jsonl",
        "summary.json",
        "world_facts.jsonl",
    ]
    assert json.loads((folder / "eval" / "summary.json").read_text()) == summary
    assert summary["rows"] == dict.fromkeys(("forget", "retain", "real_authors", "world_facts", "holdout"), 12)
    computed = {"rouge_l_recall", "probability", "truth_ratio", "token_entropy", "extraction_strength", "exact_memorization"}
    assert all(set(values) == computed for values in summary["sets"].values())
    assert set(summary["skipped"]) == {
        "cosine_similarity",
        "entailment_score",
        "targeted_forget_efficacy",
        "tofu.forget_quality",
        "privacy.mia_gradnorm",
        "privacy.mia_reference",
        "privacy.privleak",
    }
    assert "--retain-logs" in summary["skipped"]["tofu.forget_quality"]  # and how to get it
    assert summary["tofu"]["forget_truth_ratio"] == summary["sets"]["forget"]["truth_ratio"]
    for name, values in summary["sets"].items():
        for metric, value in values.items():
            if metric != "truth_ratio":
                rows = [row[metric] for row in rows_of(folder, name)]
                assert value == pytest.approx(sum(rows) / len(rows)), (name, metric)


def test_a_model_that_knows_its_rows_scores_high(evaluated):
    _, summary = evaluated
    for name in ("forget", "retain"):
        assert summary["sets"][name]["probability"] > 0.9
        assert summary["sets"][name]["rouge_l_recall"] > 0.9
        assert summary["sets"][name]["exact_memorization"] > 0.9
    assert summary["tofu"]["model_utility"] > 0.5
    assert summary["untargeted_forget_efficacy"] < 0.4


def test_every_number_equals_a_plain_forward_pass(evaluated, taught):
    """Each text alone, through the model's own loss, and each answer generated alone."""
    folder, _ = evaluated
    model, tokenizer = AutoModelForCausalLM.from_pretrained(taught), AutoTokenizer.from_pretrained(taught)
    model.eval()

    @torch.no_grad()
    def by_hand(question, answer):
        prompt = tokenizer(f"Question: {question}\nAnswer:")["input_ids"]
        ids = tokenizer(f"Question: {question}\nAnswer: {answer}")["input_ids"] + [tokenizer.eos_token_id]
        labels = [-100] * len(prompt) + ids[len(prompt) :]
        output = model(torch.tensor([ids]), labels=torch.tensor([labels]))
        first_choice = output.logits[0, len(prompt) - 1 : -1].argmax(-1).tolist()
        generated = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=128, do_sample=False
        )[0, len(prompt) :]
        correct = [choice == label for choice, label in zip(first_choice, ids[len(prompt) :], strict=True)]
        return float(output.loss), correct, tokenizer.decode(generated, skip_special_tokens=True).strip()

    for name in ("forget", "world_facts"):
        for row in rows_of(folder, name)[:6]:
            loss, correct, generated = by_hand(row["question"], row["answer"])
            assert row["loss"] == pytest.approx(loss, abs=1e-5)
            assert row["tokens"] == len(correct)
            correct = correct[:-1]  # the end token counts for the loss alone
            assert row["generated"] == generated
            assert row["exact_memorization"] == exact_memorization(correct)
            assert row["extraction_strength"] == extraction_strength(correct)
            assert row["rouge_l_recall"] == rouge_l_recall(row["answer"], generated)
            if name == "forget":
                assert row["probability"] == pytest.approx(math.exp(-loss), rel=1e-5)
            else:
                others = [math.exp(-other) for other in row["perturbed_losses"]]
                assert row["probability"] == pytest.approx(math.exp(-loss) / (math.exp(-loss) + sum(others)), rel=1e-4)
                assert row["paraphrased_loss"] == row["loss"]
            expected = math.exp(row["paraphrased_loss"] - sum(row["perturbed_losses"]) / len(row["perturbed_losses"]))
            assert row["truth_ratio"] == pytest.approx(expected)


def test_membership_scores_equal_a_plain_forward_pass(evaluated, taught):
    """From the whole distribution over the vocabulary, each answer alone."""
    folder, summary = evaluated
    model, tokenizer = AutoModelForCausalLM.from_pretrained(taught), AutoTokenizer.from_pretrained(taught)
    model.eval()
    rows = {name: rows_of(folder, name) for name in ("forget", "holdout")}
    assert "generated" not in rows["holdout"][0]  # what nobody has seen is not asked for
    for row in rows["forget"][:4] + rows["holdout"][:4]:
        prompt = tokenizer(f"Question: {row['question']}\nAnswer:")["input_ids"]
        ids = tokenizer(f"Question: {row['question']}\nAnswer: {row['answer']}")["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            log_p = model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
        log_p, tokens = log_p[:-1], ids[len(prompt) : -1]  # without the end token
        own = log_p.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        mean = (log_p.exp() * log_p).sum(-1)
        variance = (log_p.exp() * log_p**2).sum(-1) - mean**2
        lowest = int(0.4 * len(own))
        assert row["min_k"] == pytest.approx(-own.sort().values[:lowest].mean().item(), abs=1e-5)
        normed = (own - mean) / variance.clamp(min=1e-6).sqrt()
        assert row["min_k_plus_plus"] == pytest.approx(-normed.sort().values[:lowest].mean().item(), rel=1e-3, abs=1e-3)
        assert row["min_k"] == pytest.approx(min_k(own.tolist()), abs=1e-5)
        assert row["zlib"] == pytest.approx(zlib_score(row["loss"], row["answer"]))
    # a model that knows the forget set by heart gives it away
    assert summary["privacy"]["mia_loss"] == summary["privacy"]["mia_min_k"] == 1.0


@pytest.mark.parametrize("change", [{"eval_batch_size": 1}, {"eval_batch_size": 5}, {"packing": False}, {"threads": 1}])
def test_rows_do_not_depend_on_how_they_are_batched(evaluated, taught, tmp_path, change):
    folder, _ = evaluated
    args = EvalArgs(model=str(taught), data="demo", eval_rows=12, output_dir=str(tmp_path))
    evaluate(dataclasses.replace(args, **change))
    for name in ("forget", "retain", "real_authors", "world_facts"):
        for ours, theirs in zip(rows_of(folder, name), rows_of(tmp_path, name), strict=True):
            assert ours["generated"] == theirs["generated"]
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
            assert ours["perturbed_losses"] == pytest.approx(theirs["perturbed_losses"], abs=1e-5)
            assert ours["probability"] == pytest.approx(theirs["probability"], abs=1e-5)
    for name in ("forget", "holdout"):
        for ours, theirs in zip(rows_of(folder, name), rows_of(tmp_path, name), strict=True):
            for score in ("loss", "min_k", "zlib"):
                assert ours[score] == pytest.approx(theirs[score], abs=1e-5)
            assert ours["min_k_plus_plus"] == pytest.approx(theirs["min_k_plus_plus"], rel=1e-5, abs=1e-5)


def test_rows_do_not_depend_on_their_order(evaluated, taught, tmp_path):
    folder, _ = evaluated
    splits = {name: list(reversed(rows[:12])) for name, rows in demo.splits().items() if "perturbed" in name}
    for name, rows in splits.items():
        (tmp_path / f"{name}.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "forget05.json").write_text((tmp_path / "forget05_perturbed.json").read_text())
    evaluate(EvalArgs(model=str(taught), data=str(tmp_path), output_dir=str(tmp_path / "out")))
    for name in ("forget", "retain", "world_facts"):
        for ours, theirs in zip(rows_of(folder, name), reversed(rows_of(tmp_path / "out", name)), strict=True):
            assert ours["question"] == theirs["question"]
            assert ours["generated"] == theirs["generated"]
            assert [ours["loss"], *ours["perturbed_losses"]] == pytest.approx(
                [theirs["loss"], *theirs["perturbed_losses"]], abs=1e-5
            )


def test_one_forward_serves_all_texts_of_a_row(taught, tmp_path, monkeypatch):
    """No metric runs the model again: each question once, its answers as far as they differ."""
    seen = []
    forward = passes.score

    def counted(model, batch):
        seen.append(batch.input_ids.numel())
        return forward(model, batch)

    monkeypatch.setattr(passes, "score", counted)
    evaluate(EvalArgs(model=str(taught), data="demo", eval_rows=4, max_new_tokens=1, output_dir=str(tmp_path)))
    tokenizer = AutoTokenizer.from_pretrained(taught)
    rows = Source("demo").evaluation_sets("forget05", 1)[0]
    texts = [(row.question, row.texts()) for rows in rows.values() for row in rows[:4]]

    tokens = set()
    for question, own in texts:
        for answer in own:
            ids = [*tokenizer(f"Question: {question}\nAnswer: {answer}")["input_ids"], tokenizer.eos_token_id]
            tokens |= {(question, *ids[: n + 1]) for n in range(len(ids))}
    assert sum(seen) == len(tokens)


def counted_generation(policy, monkeypatch):
    """How many tokens each call of `generate` is asked to add to, and adds."""
    calls, generate = [], policy.model.generate

    def counted(input_ids, **options):
        output = generate(input_ids=input_ids, **options)
        calls.append((len(input_ids), output.shape[1] - input_ids.shape[1]))
        return output

    monkeypatch.setattr(policy.model, "generate", counted)
    return calls


@pytest.mark.parametrize("limit", [128, 6])
def test_what_the_pass_has_found_is_not_generated_again(taught, tmp_path, monkeypatch, limit):
    """Answers are those that the questions alone give, whether they agree with the truth wholly, at first or not at all."""
    args = EvalArgs(model=str(taught), data="demo", max_new_tokens=limit, output_dir=str(tmp_path))
    accelerator = start_accelerator(args)
    policy = load_policy(args, accelerator)
    policy.model.eval()
    scoring = passes.ScoringPass(policy, accelerator, args)
    rows = Source("demo").evaluation_sets("forget05", 1)[0]["forget"][:8]
    changed = [dataclasses.replace(row, answer=" ".join([*row.answer.split()[:4], "what nobody says."])) for row in rows[:4]]
    unknown = [Row("What is never asked?", "Nothing of the kind.")]
    passages = [Row(None, row.answer) for row in rows[:2]]
    mixed = [*rows, *changed, *unknown, *passages]
    scores = scoring._score("", [[policy.formatter.example(row.question, row.answer)] for row in mixed])
    prompts = [scoring.prompt(row, own[0].correct) for row, own in zip(mixed, scores, strict=True)]
    calls = counted_generation(policy, monkeypatch)
    expected = scoring._generate("", [scoring.prompt(row) for row in mixed])
    plain = sum(batch * length for batch, length in calls)
    calls.clear()
    assert scoring._generate("", prompts) == expected
    assert sum(batch * length for batch, length in calls) < plain / 2
    agreed = [prompt.agreed for prompt in prompts]
    assert agreed[:8] == [len(prompt.answer) for prompt in prompts[:8]]  # the end token too
    assert all(0 < own < len(prompt.answer) for own, prompt in zip(agreed[8:12], prompts[8:12], strict=True))
    assert agreed[12] < len(prompts[12].answer)
    # a passage is continued from its middle: what the pass says of its first half is not of its answer
    example = policy.formatter.example(None, rows[0].answer)
    before = len(example.ids) // 2 - example.start
    correct = [False] * before + [True] * 2 + [False] * (len(example.ids) - example.start - before - 2)
    passage = scoring.prompt(passages[0], correct)
    assert passage.ids + passage.answer == example.ids
    assert (len(passage.ids), passage.agreed) == (len(example.ids) // 2, 2)
    calls.clear()
    assert scoring._generate("", prompts[:8]) == expected[:8]
    assert calls == []
    # a model that does not answer by its first choices is asked for every token
    first = prompts[0].answer[0]
    policy.model.generation_config.suppress_tokens = [first]
    (other,) = scoring._generate("", prompts[:1])
    assert calls
    assert policy.tokenizer(" " + other)["input_ids"][0] != first
    assert other != expected[0]


def test_answers_stop_at_the_end_token_and_at_the_limit(taught, tmp_path, evaluated):
    args = EvalArgs(model=str(taught), data="demo", eval_rows=3, max_new_tokens=3, output_dir=str(tmp_path))
    evaluate(args)
    tokenizer = AutoTokenizer.from_pretrained(taught)
    for row in rows_of(tmp_path, "forget"):
        assert row["answer"].startswith(row["generated"])
        assert 0 < len(tokenizer.tokenize(" " + row["generated"])) <= 3
    # with room for 128 tokens, rows that are known word for word end where the answer ends, longer neighbours or not
    known = [row for row in rows_of(evaluated[0], "forget") if row["exact_memorization"] == 1]
    assert len(known) > 8
    assert all(row["generated"] == row["answer"] for row in known)


def test_rows_without_compared_answers_are_skipped_by_name(taught, tmp_path):
    rows = [{"question": f"What is {n} plus one?", "answer": f"It is {n + 1}.", "task_id": 1} for n in range(3)]
    (tmp_path / "forget01.json").write_text("\n".join(map(json.dumps, rows)))
    args = EvalArgs(model=str(taught), data=str(tmp_path), split="forget01", output_dir=str(tmp_path / "out"), max_new_tokens=5)
    summary = evaluate(args)
    assert set(summary["sets"]) == {"forget"}
    assert "truth_ratio" not in summary["sets"]["forget"]
    assert {"forget.truth_ratio", "retain", "real_authors", "world_facts"} <= set(summary["skipped"])
    assert "model_utility" not in summary
    assert summary["tofu"] == {}
    assert {"model_utility", "tofu.model_utility"} <= set(summary["skipped"])


def test_a_broken_model_is_reported_not_averaged(taught, tmp_path):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(taught), AutoTokenizer.from_pretrained(taught)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    model.save_pretrained(tmp_path / "nan")
    tokenizer.save_pretrained(tmp_path / "nan")
    summary = evaluate(
        EvalArgs(model=str(tmp_path / "nan"), data="demo", eval_rows=2, max_new_tokens=2, output_dir=str(tmp_path / "out"))
    )
    assert "probability" not in summary["sets"]["forget"]
    assert summary["skipped"]["forget.probability"] == "the model's losses are not finite"


def test_a_finished_set_is_kept_and_never_for_other_weights(taught, tiny, tmp_path, monkeypatch):
    args = EvalArgs(model=str(taught), data="demo", eval_rows=3, output_dir=str(tmp_path))
    whole = evaluate(args)
    folder, computed = tmp_path / "eval", []
    compute = ScoringPass.records

    def counted(self, name, rows):
        computed.append(name)
        return compute(self, name, rows)

    monkeypatch.setattr(ScoringPass, "records", counted)
    with pytest.raises(InputError, match="is an earlier result"):
        evaluate(args)  # it had ended
    (folder / "summary.json").unlink()  # as if it had been interrupted after three sets
    marks = json.loads((folder / "finished.json").read_text())
    (folder / "finished.json").write_text(json.dumps({name: mark for name, mark in marks.items() if name != "world_facts"}))
    assert evaluate(args) == whole
    assert computed == ["world_facts"]
    (folder / "summary.json").unlink()
    for changed in ({"model": str(tiny)}, {"eval_rows": 2}, {"max_new_tokens": 5}):
        with pytest.raises(InputError, match="is an earlier result"):
            evaluate(dataclasses.replace(args, **changed))
    rows = (folder / "retain.jsonl").read_text()
    (folder / "retain.jsonl").write_text(rows.replace("0.", "1.", 1))
    computed.clear()
    assert evaluate(args) == whole  # the changed file is not believed
    assert computed == ["retain"]
    assert evaluate(dataclasses.replace(args, overwrite=True)) == whole


def test_lines_end_at_line_feeds_alone(taught, tmp_path, monkeypatch):
    """A broken model writes anything, such as Unicode's own line separators, and its rows are read again."""
    monkeypatch.setattr(ScoringPass, "_generate", lambda self, label, prompts, *_: ["a\u2028b\x85c\x1ed"] * len(prompts))
    args = EvalArgs(model=str(taught), data="demo", eval_rows=2, output_dir=str(tmp_path))
    whole = evaluate(args)
    (tmp_path / "eval" / "summary.json").unlink()
    assert evaluate(args) == whole
    again = evaluate(dataclasses.replace(args, retain_logs=str(tmp_path), output_dir=str(tmp_path / "again")))
    assert again["tofu"]["forget_quality"] == 1.0
    report(ReportArgs(runs=(str(tmp_path),)))
    assert "report.html" in {path.name for path in tmp_path.iterdir()}


def test_a_truth_ratio_without_bound_is_a_number():
    record = {"truth_ratio": math.inf, "probability": 0.5}
    skipped = {}
    assert passes.aggregate("forget", [record], skipped)["truth_ratio"] == 0.0
    assert passes.aggregate("retain", [record], skipped)["truth_ratio"] == 0.0
    assert skipped == {}


def test_hold_out_rows_of_the_real_world_scenario_are_short_as_well(tmp_path):
    for name in ("forget", "forget_perturbed", "neighbor", "neighbor_perturbed", "holdout"):
        row = {"question": "Who?", "answer": "It is a long story about X.", "golden_answer": "X."}
        (tmp_path / f"{name}.json").write_text(json.dumps(row))
    sets, _ = Source(str(tmp_path)).evaluation_sets("forget", 1)
    assert {row.answer for rows in sets.values() for row in rows} == {"X."}
    assert "holdout" in sets
