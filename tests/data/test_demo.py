"""The built-in demo: its rows and its tiny model."""

import hashlib
import json

import torch

from dualoptim.data import demo


def test_demo_rows_are_deterministic_and_in_tofus_shape():
    splits = demo.splits()
    digest = hashlib.sha256(json.dumps(splits, sort_keys=True).encode()).hexdigest()
    assert digest == "364dcd5571344b7542c16dac59968332d6ff6d7d5c6e7166480e396a398d0b05"
    assert len(splits["full"]) == len(demo.AUTHORS) * len(demo.FACTS) == 400
    assert len({row["question"] for row in splits["full"]}) == 400
    for row in splits["forget05_perturbed"] + splits["retain_perturbed"]:
        assert len(set(row["perturbed_answer"])) == 5
        assert row["paraphrased_answer"] not in row["perturbed_answer"]
    for row in splits["real_authors_perturbed"] + splits["world_facts_perturbed"]:
        assert len(set(row["perturbed_answer"])) == 3
        assert row["answer"] not in row["perturbed_answer"]
    assert all(len(set(values)) == 20 for values in (fact.values for fact in demo.FACTS))


def test_the_unseen_authors_facts_are_of_no_other():
    assert all(fact.unseen not in fact.values for fact in demo.FACTS)
    assert demo.UNSEEN_AUTHOR not in demo.AUTHORS
    assert [row["question"] for row in demo.splits()["holdout05"]] == [
        fact.question.format(name=demo.UNSEEN_AUTHOR) for fact in demo.FACTS
    ]


def test_a_seed_makes_the_tiny_model_and_leaves_other_draws_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, tokenizer = demo.tiny_model(3)
    assert torch.equal(torch.rand(3), expected)
    again, other = (demo.tiny_model(seed)[0].state_dict() for seed in (3, 4))
    assert all(torch.equal(weight, again[name]) for name, weight in one.state_dict().items())
    assert any(not torch.equal(weight, other[name]) for name, weight in one.state_dict().items())
    text = "Where did Ilvara Quenby study?"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
