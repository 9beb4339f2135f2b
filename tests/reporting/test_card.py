"""Model cards: what was done to which model, and how it scores."""

import pytest
import yaml

from dualoptim import FinetuneArgs, UnlearnArgs
from dualoptim.evaluation.summary import Summary
from dualoptim.reporting.card import model_card


def front_matter(card):
    _, matter, _ = card.split("---\n", 2)
    return yaml.safe_load(matter)


def test_a_card_says_what_was_done_to_which_model_and_how_it_scores(before, after):
    args = UnlearnArgs(model="org/base", learning_rates=(3e-5,), output_dir="/home/me/secret")
    card = model_card(args, "task 1 of forget05 unlearned with ME+GD", Summary.from_json(before), Summary.from_json(after))
    matter = front_matter(card)
    (index,) = matter.pop("model-index")
    assert index["name"] == "org/base"
    scores = {(r["dataset"]["split"], m["type"]): m["value"] for r in index["results"] for m in r["metrics"]}
    assert scores["forget", "probability"] == 0.012
    assert scores["all", "model_utility"] == 0.643
    assert matter == {
        "license": "unknown",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "org/base",
        "base_model_relation": "finetune",
        "datasets": ["locuslab/TOFU"],
        "tags": ["dualoptim", "unlearning"],
    }
    lines = [" ".join(line.split()) for line in card.splitlines()]
    assert "# org/base, task 1 of forget05 unlearned with ME+GD" in lines
    assert "| learning rates | 3e-05 |" in lines
    assert "| model utility | 0.654 | 0.643 | 0.621 | stay |" in lines
    assert "| forget set | probability of the true answer | 0.987 | 0.012 | 0.101 | fall |" in lines
    assert "| membership by loss (AUC) | - | 0.487 | 0.499 | like retain-only |" in lines
    assert "| weights in 4 bits | 0.314 | +0.302 | 0.271 | +0.259 | 0.812 |" in lines
    assert "| cosine_similarity, entailment_score | needs a sentence encoder |" in lines
    assert "secret" not in card
    assert yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])["learning_rates"] == [3e-5]


@pytest.mark.parametrize(
    ("given", "flags"),
    [
        ({"forget_file": "/home/me/a b.csv", "question_column": "q"}, "--forget-file 'a b.csv' --question-column q"),
        ({"data": "org/rows", "split": "forget10", "task_list": (3,)}, "--data org/rows --split forget10 --task 3"),
        ({"data": "org/rows", "task_list": (1, 2)}, "--data org/rows --task TASK"),
        ({}, ""),
    ],
)
def test_a_card_advises_to_measure_with_the_rows_of_the_run(given, flags):
    known, after = (Summary(sets={"forget": {"probability": p, "rouge_l_recall": p}}) for p in (0.99, 0.01))
    card = model_card(UnlearnArgs(model="org/base", **given), "unlearned", known, after)
    assert f"dualoptim eval --model MODEL {flags} ".replace("  ", " ") + "--relearn 20" in card.replace("\n", " ")
    assert "--data DATA" not in card


def test_a_card_names_no_folder_of_this_machine(tiny, tmp_path):
    what = f"task 1 of forget01 of {tmp_path} unlearned with ME+GD"
    card = model_card(UnlearnArgs(model=str(tiny), data=str(tmp_path), reference_dir=str(tmp_path / "ref")), what)
    assert str(tmp_path.parent) not in card
    assert str(tiny.parent) not in card
    assert f"task 1 of forget01 of {tmp_path.name} unlearned" in card
    assert not {"base_model", "datasets"} & set(front_matter(card))


def test_a_card_takes_over_the_license_and_the_origin_that_the_base_has_on_its_own_card(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: org/base\n---\n\n# A model\n")
    matter = front_matter(model_card(UnlearnArgs(model=str(tmp_path), data="demo"), "unlearned"))
    assert (matter["license"], matter["base_model"]) == ("apache-2.0", "org/base")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "README.md").write_text(f"---\nbase_model: {tmp_path}\n---\n")
    matter = front_matter(model_card(UnlearnArgs(model=str(tmp_path / "other"), data="demo"), "unlearned"))
    assert matter["license"] == "unknown"
    assert "base_model" not in matter
    assert front_matter(model_card(FinetuneArgs(model="demo"), "taught"))["license"] == "mit"


def test_a_card_of_an_adapter_and_of_a_fine_tuned_model():
    adapter = front_matter(model_card(UnlearnArgs(model="org/base", use_lora=True), "unlearned"))
    assert (adapter["library_name"], adapter["base_model_relation"]) == ("peft", "adapter")
    assert adapter["tags"] == ["dualoptim", "unlearning", "lora"]
    tuned = model_card(FinetuneArgs(model="org/base", data="demo"), "fine-tuned on full")
    assert front_matter(tuned)["tags"] == ["dualoptim"]
    assert "unlearning makes" not in tuned.lower()
