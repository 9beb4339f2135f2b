"""Answers of a model: what is not generated again, where they stop, and that draws follow its softmax."""

import dataclasses
import json

import pytest
import scipy.stats
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dualoptim import EvalArgs
from dualoptim.data.rows import Row
from dualoptim.data.tofu import tofu_source
from dualoptim.evaluate import evaluate
from dualoptim.evaluation.generation import continuation, generate
from dualoptim.evaluation.scoring import ScoringPass
from dualoptim.models.launch import start_accelerator
from dualoptim.models.load import load_model


def rows_of(folder, name):
    return [json.loads(line) for line in (folder / "eval" / f"{name}.jsonl").read_text().splitlines()]


def counted_generation(loaded, monkeypatch):
    """How many tokens each call of `generate` is asked to add to, and adds."""
    calls, generate = [], loaded.model.generate

    def counted(input_ids, **options):
        output = generate(input_ids=input_ids, **options)
        calls.append((len(input_ids), output.shape[1] - input_ids.shape[1]))
        return output

    monkeypatch.setattr(loaded.model, "generate", counted)
    return calls


@pytest.mark.parametrize("limit", [128, 6])
def test_what_the_pass_has_found_is_not_generated_again(taught, tmp_path, monkeypatch, limit):
    """Answers are those that the questions alone give, whether they agree with the truth wholly, at first or not at all."""
    args = EvalArgs(model=str(taught), data="demo", max_new_tokens=limit, output_dir=str(tmp_path))
    accelerator = start_accelerator(args)
    loaded = load_model(args, accelerator)
    loaded.model.eval()
    scoring = ScoringPass(loaded, args)
    rows = tofu_source("demo").evaluation_sets("forget05", 1)[0]["forget"][:8]
    changed = [dataclasses.replace(row, answer=" ".join([*row.answer.split()[:4], "what nobody says."])) for row in rows[:4]]
    unknown = [Row("What is never asked?", "Nothing of the kind.")]
    passages = [Row(None, row.answer) for row in rows[:2]]
    mixed = [*rows, *changed, *unknown, *passages]
    scores = scoring.score_texts("", [[loaded.formatter.example(row.question, row.answer)] for row in mixed])
    asked = [continuation(loaded, row, own[0].correct) for row, own in zip(mixed, scores, strict=True)]
    calls = counted_generation(loaded, monkeypatch)
    expected = generate(scoring, "", [continuation(loaded, row) for row in mixed])
    plain = sum(batch * length for batch, length in calls)
    calls.clear()
    assert generate(scoring, "", asked) == expected
    assert sum(batch * length for batch, length in calls) < plain / 2
    agreed = [one.agreed for one in asked]
    assert agreed[:8] == [len(one.answer) for one in asked[:8]]  # the end token too
    assert all(0 < own < len(one.answer) for own, one in zip(agreed[8:12], asked[8:12], strict=True))
    assert agreed[12] < len(asked[12].answer)
    # a passage is continued from its middle: what the pass says of its first half is not of its answer
    example = loaded.formatter.example(None, rows[0].answer)
    before = len(example.ids) // 2 - example.start
    correct = [False] * before + [True] * 2 + [False] * (len(example.ids) - example.start - before - 2)
    passage = continuation(loaded, passages[0], correct)
    assert passage.ids + passage.answer == example.ids
    assert (len(passage.ids), passage.agreed) == (len(example.ids) // 2, 2)
    calls.clear()
    assert generate(scoring, "", asked[:8]) == expected[:8]
    assert calls == []
    # a model that does not answer by its first choices is asked for every token
    first = asked[0].answer[0]
    loaded.model.generation_config.suppress_tokens = [first]
    (other,) = generate(scoring, "", asked[:1])
    assert calls
    assert loaded.tokenizer(" " + other)["input_ids"][0] != first
    assert other != expected[0]


def test_answers_stop_at_the_end_token_and_at_the_limit(taught, tmp_path):
    args = EvalArgs(model=str(taught), data="demo", eval_rows=3, max_new_tokens=3, output_dir=str(tmp_path))
    evaluate(args)
    tokenizer = AutoTokenizer.from_pretrained(taught)
    for row in rows_of(tmp_path, "forget"):
        assert row["answer"].startswith(row["generated"])
        assert 0 < len(tokenizer.tokenize(" " + row["generated"])) <= 3
    evaluate(dataclasses.replace(args, eval_rows=12, max_new_tokens=128, output_dir=str(tmp_path / "longer")))
    # with room for 128 tokens, rows that are known word for word end where the answer ends, longer neighbours or not
    known = [row for row in rows_of(tmp_path / "longer", "forget") if row["exact_memorization"] == 1]
    assert len(known) > 8
    assert all(row["generated"] == row["answer"] for row in known)


def test_draws_follow_the_model(taught, tmp_path):
    """First tokens of many draws against the softmax, by a chi-squared test."""
    args = EvalArgs(
        model=str(taught),
        data="demo",
        sample=400,
        sample_temperature=2.5,
        eval_rows=1,
        max_new_tokens=1,
        output_dir=str(tmp_path),
    )
    evaluate(dataclasses.replace(args, eval_batch_size=200))
    (row,) = [json.loads(line) for line in (tmp_path / "eval/attacks/sample/forget.jsonl").read_text().splitlines()]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(taught), AutoTokenizer.from_pretrained(taught)
    ids = tokenizer(f"Question: {row['question']}\nAnswer:", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        p = (model(ids).logits[0, -1].double() / 2.5).softmax(-1)
    texts = [tokenizer.decode(token, skip_special_tokens=True).strip() for token in range(len(p))]
    expected: dict[str, float] = {}
    for text, share in zip(texts, p.tolist(), strict=True):
        expected[text] = expected.get(text, 0) + 400 * share
    common = [text for text, count in expected.items() if count >= 5]
    observed = [row["sampled"].count(text) for text in common]
    rest = 400 - sum(observed), 400 - sum(expected[text] for text in common)
    test = scipy.stats.chisquare([*observed, rest[0]], [*(expected[text] for text in common), rest[1]])
    assert test.pvalue > 1e-3
