"""The teacher-forced pass: every number against a plain forward pass, and what must not change it."""

import dataclasses
import json
import math

import pytest
import torch
from support import rows_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from dualoptim import EvalArgs
from dualoptim.data import demo
from dualoptim.data.tofu import tofu_source
from dualoptim.evaluate import evaluate
from dualoptim.evaluation import scoring
from dualoptim.evaluation.metrics import exact_memorization, extraction_strength
from dualoptim.evaluation.rouge import rouge_l_recall, words_beyond


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
            fact = words_beyond(row["question"], row["answer"])
            assert row["recall_beyond_question"] == rouge_l_recall(fact, generated)
            if name == "forget":
                assert row["probability"] == pytest.approx(math.exp(-loss), rel=1e-5)
            else:
                others = [math.exp(-other) for other in row["perturbed_losses"]]
                assert row["probability"] == pytest.approx(math.exp(-loss) / (math.exp(-loss) + sum(others)), rel=1e-4)
                assert row["paraphrased_loss"] == row["loss"]
            expected = math.exp(row["paraphrased_loss"] - sum(row["perturbed_losses"]) / len(row["perturbed_losses"]))
            assert row["truth_ratio"] == pytest.approx(expected)


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
    forward = scoring.score

    def counted(model, batch):
        seen.append(batch.input_ids.numel())
        return forward(model, batch)

    monkeypatch.setattr(scoring, "score", counted)
    evaluate(EvalArgs(model=str(taught), data="demo", eval_rows=4, max_new_tokens=1, output_dir=str(tmp_path)))
    tokenizer = AutoTokenizer.from_pretrained(taught)
    rows = tofu_source("demo").evaluation_sets("forget05", 1)[0]
    texts = [(row.question, row.texts()) for rows in rows.values() for row in rows[:4]]

    tokens = set()
    for question, own in texts:
        for answer in own:
            ids = [*tokenizer(f"Question: {question}\nAnswer: {answer}")["input_ids"], tokenizer.eos_token_id]
            tokens |= {(question, *ids[: n + 1]) for n in range(len(ids))}
    assert sum(seen) == len(tokens)
