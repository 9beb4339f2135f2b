"""The built-in demo: its rows and its tiny model."""

import hashlib
import json

import torch

from dualoptim.data import demo


def test_demo_rows_are_deterministic_and_in_tofus_shape():
    splits = demo.splits()
    digest = hashlib.sha256(json.dumps(splits, sort_keys=True).encode()).hexdigest()
    assert digest == "d382e139f065ca5fa40c635d40d2651136c58de3918e6b5981bd3e5c3b49a96c"
    assert len(splits["full"]) == len(demo.AUTHORS) * len(demo.FACTS) == 400
    assert len({row["question"] for row in splits["full"]}) == 400
    for row in splits["forget05_perturbed"] + splits["retain_perturbed"]:
        assert len(set(row["perturbed_answer"])) == 5
        assert row["paraphrased_answer"] not in row["perturbed_answer"]
    for row in splits["real_authors_perturbed"] + splits["world_facts_perturbed"]:
        assert len(set(row["perturbed_answer"])) == 3
        assert row["answer"] not in row["perturbed_answer"]
    assert all(len(set(values)) == 20 for values in (fact.values for fact in demo.FACTS))


def test_every_value_is_that_of_one_author_to_forget_and_of_one_to_keep():
    answers, half = {row["answer"] for row in demo.splits()["full"]}, len(demo.AUTHORS) // 2
    for fact in demo.FACTS:
        kept, forgotten = (
            [value for name in names for value in fact.values if fact.answer.format(name=name, value=value) in answers]
            for names in (demo.AUTHORS[:half], demo.AUTHORS[half:])
        )
        assert sorted(kept) == sorted(forgotten)
        assert len(set(kept)) == half


def test_half_of_the_measured_rows_to_keep_are_of_authors_that_no_step_sees_and_the_model_is_taught():
    splits = demo.splits()
    said = {name: {row["question"] for row in rows} for name, rows in splits.items()}
    assert said["retain50"] == said["retain10"]
    assert len(said["retain50"]) == len(said["retain_unseen"]) == 100
    assert len(said["retain_perturbed"] & said["retain50"]) == len(said["retain_perturbed"] & said["retain_unseen"]) == 50
    assert said["full"] == said["retain50"] | said["retain_unseen"] | said["forget05"]
    assert {row["task_id"] for row in splits["forget10"]} == {"1"}
    three = [row["question"] for row in splits["forget05"] if row["task_id"] in ("1", "2", "3")]
    assert three == [row["question"] for row in splits["forget10"]]


def test_the_unseen_author_has_two_values_of_each_author_to_keep_and_no_word_of_his_decides_the_tokenizer():
    """Else his rows would be told from the forget set by values of nobody, and numbers of the model would hang on them."""
    said = {row["answer"] for row in demo.splits()["retain50"] + demo.splits()["retain_unseen"]}
    shared = dict.fromkeys(demo.AUTHORS[:10], 0)
    for fact, row in zip(demo.FACTS, demo.splits()["holdout05"], strict=True):
        assert row["question"] == fact.question.format(name=demo.UNSEEN_AUTHOR)
        (same,) = [name for name in shared if row["answer"].replace(demo.UNSEEN_AUTHOR, name) in said]
        shared[same] += 1
    assert set(shared.values()) == {2}
    assert demo.splits()["holdout10"] == demo.splits()["holdout05"]
    assert demo.UNSEEN_AUTHOR not in demo.AUTHORS
    _, tokenizer = demo.tiny_model(1)
    for fact in demo.FACTS:
        assert fact.unseen not in fact.values
        assert len(tokenizer.tokenize(f" {fact.unseen}")) == len(fact.unseen.split()), (
            "the tokenizer has learned each as a word"
        )


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


def test_the_model_that_was_taught_is_told_by_its_card(tmp_path):
    (tmp_path / "README.md").write_text(f"# demo, {demo.KNOWS}\n")
    assert demo.is_taught(str(tmp_path))
    (tmp_path / "README.md").write_text("# another, unlearned\n")
    assert not any(map(demo.is_taught, [str(tmp_path), "org/name", "demo", "a\0b"]))
