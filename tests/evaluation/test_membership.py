"""Scores of membership attacks: by hand, against scikit-learn, and against a plain forward and backward pass."""

import json

import numpy as np
import pytest
import sklearn.metrics
import torch
from support import rows_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from dualoptim import EvalArgs
from dualoptim.data.rows import Asking
from dualoptim.evaluate import evaluate
from dualoptim.evaluation.membership import MIN_K_SHARE, membership_auc, min_k, privleak, zlib_score
from dualoptim.evaluation.scoring import ScoringPass
from dualoptim.models.launch import start_accelerator
from dualoptim.models.load import load_model


def test_membership_auc_by_hand():
    assert membership_auc([0.1, 0.2], [0.3, 0.4]) == 1.0
    assert membership_auc([0.3, 0.4], [0.1, 0.2]) == 0.0
    assert membership_auc([1.0, 3.0], [2.0, 3.0]) == pytest.approx((1 + 0 + 1 + 0.5) / 4)


def test_membership_auc_equals_scikit_learn():
    draw = np.random.default_rng(0)
    for shift in (0.0, 0.5, 2.0):
        one, other = draw.normal(size=40), draw.normal(shift, size=30)
        other[:5] = one[:5]  # ties
        expected = sklearn.metrics.roc_auc_score([0] * 40 + [1] * 30, [*one, *other])
        assert membership_auc(one, other) == pytest.approx(expected, abs=1e-12)


def test_min_k_by_hand():
    assert min_k([-1.0, -5.0, -3.0, -2.0, -4.0]) == 4.5  # the lowest two of five
    assert min_k([-1.0, -2.0]) == 2.0  # one at least


def test_privleak_by_hand():
    assert privleak(0.5, 0.5) == 0.0
    # 1 - AUC falls from 0.5 to 0.1: 80 percent below the retain-only model's
    assert privleak(0.9, 0.5) == pytest.approx(-80.0)


def test_a_piece_of_a_passage_has_no_end_token_to_leave_out(tiny):
    args = EvalArgs(model=str(tiny), data="demo")
    loaded = load_model(args, start_accelerator(args))
    for ended in (True, False):
        text = loaded.formatter.example(None, "The house stood by the old river.", asking=Asking(end=ended))
        ((found,),) = ScoringPass(loaded, args).score_texts("", [[text]], least=MIN_K_SHARE)
        with torch.no_grad():
            log_p = loaded.model(torch.tensor([text.ids])).logits[0, :-1].log_softmax(-1)
        own = log_p.gather(-1, torch.tensor(text.ids[1:])[:, None])[:, 0].tolist()
        assert found.min_k == pytest.approx(min_k(own[:-1] if ended else own), abs=1e-5)
        assert found.loss == pytest.approx(-np.mean(own), abs=1e-5)


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


def test_the_reference_and_gradient_attacks(taught, tiny, tmp_path):
    summary = evaluate(
        EvalArgs(
            model=str(taught),
            data="demo",
            max_new_tokens=24,
            reference_model=str(tiny),
            mia_gradnorm=True,
            eval_rows=5,
            output_dir=str(tmp_path),
        )
    )
    model, tokenizer = AutoModelForCausalLM.from_pretrained(taught), AutoTokenizer.from_pretrained(taught)
    other = AutoModelForCausalLM.from_pretrained(tiny)
    for name in ("forget", "holdout"):
        rows = [json.loads(line) for line in (tmp_path / "eval" / f"{name}.jsonl").read_text().splitlines()]
        for row in rows[:3]:
            prompt = tokenizer(f"Question: {row['question']}\nAnswer:")["input_ids"]
            ids = tokenizer(f"Question: {row['question']}\nAnswer: {row['answer']}")["input_ids"] + [tokenizer.eos_token_id]
            given = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([[-100] * len(prompt) + ids[len(prompt) :]])}
            output = model(**given)
            loss = output.loss
            without_end = output.logits[0, len(prompt) - 1 : -2], torch.tensor(ids[len(prompt) : -1])
            torch.nn.functional.cross_entropy(*without_end).backward()
            norm = torch.stack([p.grad.norm() for p in model.parameters()]).mean()
            model.zero_grad()
            assert row["gradnorm"] == pytest.approx(float(norm), rel=1e-4)
            assert row["reference"] == pytest.approx((loss - other(**given).loss).item(), abs=1e-5)
    assert summary["privacy"]["mia_gradnorm"] == summary["privacy"]["mia_reference"] == 1.0
    assert not {"privacy.mia_gradnorm", "privacy.mia_reference"} & set(summary["skipped"])
