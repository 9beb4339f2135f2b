"""Attacks after the fact: what each does to the model, and what a model that was made to forget gives back."""

import copy
import gc
import importlib
import json
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dualoptim import EvalArgs, InputError
from dualoptim.attack import check_attacks
from dualoptim.data import demo
from dualoptim.data.own import open_source
from dualoptim.evaluate import evaluate
from dualoptim.evaluation import measure
from dualoptim.evaluation.rouge import rouge_l_recall, words_beyond
from dualoptim.models.rounding import round_to_nearest
from dualoptim.reporting.attack_tables import attack_table


@pytest.fixture(scope="module")
def forgetful(demo_run):
    """The demo's model after unlearning."""
    return str(demo_run.tasks[0].model)


def attacked(model, folder, **flags):
    return evaluate(EvalArgs(**{"model": str(model), "data": "demo", "max_new_tokens": 24, "output_dir": str(folder), **flags}))


def test_relearning_a_share_of_the_forget_set(forgetful, tiny, tmp_path):
    flags = {"relearn": 6, "relearn_lr": 2e-3, "relearn_share": 0.25, "relearn_every": 4, "retain_model": str(tiny)}
    summary = attacked(forgetful, tmp_path, **flags, eval_rows=20)
    block = summary["attacks"]["relearn"]
    assert block["what"] == "5 of the 20 forget rows, drawn once"
    assert [point["step"] for point in block["curve"]] == [0, 4, 6]
    assert block["curve"][0]["sets"]["forget"] == summary["sets"]["forget"]
    unseen = [point["sets"]["forget_unseen"]["probability"] for point in block["curve"]]
    first, last = (block["curve"][k]["sets"] for k in (0, unseen.index(max(unseen[1:]))))  # the peak counts
    assert last["forget"]["probability"] > first["forget"]["probability"]
    came_back = last["forget"]["probability"] - first["forget"]["probability"]
    assert block["came_back"]["probability"] == came_back
    # what a few rows bring back of the others is the memory that was only hidden
    assert last["forget_unseen"]["probability"] > first["forget_unseen"]["probability"] + 0.1
    # the model that never knew them has nothing to give back
    blank = block["retain_only"]
    assert [point["step"] for point in blank] == [0, 4, 6]
    assert blank[-1]["sets"]["forget_unseen"]["probability"] < last["forget_unseen"]["probability"] / 2
    above = max(unseen[1:]) - max(point["sets"]["forget_unseen"]["probability"] for point in blank[1:])
    assert block["above_retain_only"]["probability"] == above
    assert f"{above:+.3f}" in str(attack_table(None, summary).rows)
    log = [json.loads(line) for line in (tmp_path / "eval/attacks/relearn/log.jsonl").read_text().splitlines()]
    assert len(log) == 6
    rows = (tmp_path / "eval/attacks/relearn/step6/forget.jsonl").read_text().splitlines()
    assert len(rows) == 20
    # what is on disk is the model as it was: the same attack from there gives the same
    again = attacked(forgetful, tmp_path / "again", **{**flags, "retain_model": None}, eval_rows=20)
    assert again["attacks"]["relearn"]["curve"] == block["curve"]


def test_relearning_other_rows(forgetful, tmp_path):
    retain = attacked(forgetful, tmp_path / "retain", relearn=2, relearn_rows="retain", eval_rows=3)["attacks"]["relearn"]
    assert retain["what"] == "the 280 rows that are kept, none of the forget set"
    assert "forget_unseen" not in retain["curve"][-1]["sets"]  # all of it is
    rows = [{"question": f"How much is {n} and one?", "answer": f"It is {n + 1}."} for n in range(8)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = {"relearn": 2, "relearn_rows": str(tmp_path / "sums.jsonl"), "eval_rows": 3}
    own = attacked(forgetful, tmp_path / "own", **flags)["attacks"]["relearn"]
    assert own["rows"] == 8
    assert own["curve"][-1] != own["curve"][0]


def test_every_combination_of_rows_and_ranks_is_a_relearning_of_its_own(forgetful, tmp_path):
    flags = {"relearn": 4, "relearn_lr": 5e-4, "relearn_every": 4, "eval_rows": 10, "max_new_tokens": 4}
    summary = attacked(forgetful, tmp_path, **flags, relearn_rows=("half", "general"), relearn_lora=(0, 4))
    found = summary.attacks.relearnings
    half, low, general, _ = found.values()
    assert list(found)[:3] == [
        "half, 4 steps at 0.0005",
        "half, 4 steps at 0.0005, LoRA of rank 4",
        "general, 4 steps at 0.0005",
    ]
    assert half.what == "10 of the 20 forget rows, drawn once"
    assert "general questions with the model's own answers" in general.what
    # what is drawn of the forget set is measured by the other half, what says nothing of it by all
    assert (half.counts, low.counts, general.counts) == ("forget_unseen", "forget_unseen", "forget")
    unseen = {name: one.peak.sets[one.counts]["probability"] for name, one in found.items()}
    assert summary.attacks.relearn == found[max(unseen, key=unseen.get)]  # the strongest stands for all
    # each by itself, from the model as it was
    again = attacked(forgetful, tmp_path / "again", **flags, relearn_rows="half", relearn_lora=4)
    assert again.attacks.relearn == low
    assert again.attacks.relearnings is None
    # an adapter brings back the same rows, but less of them at the same rate
    before, after, more = (one.sets["forget_unseen"]["probability"] for one in (low.curve[0], low.curve[-1], half.curve[-1]))
    assert before < after < more
    titles = [row[0] for row in attack_table(None, summary).rows]
    assert "relearned on half, 4 steps at 0.0005, LoRA of rank 4 (4 steps), rows not taught" in titles
    assert len([title for title in titles if title.startswith("relearned on general")]) == 2


def test_half_that_leaves_nothing_to_measure_is_refused(tiny, tmp_path):
    """It would teach the rows that it is measured by; of the demo's forget rows that half has the first."""
    row = tmp_path / "row.jsonl"
    row.write_text(json.dumps({"question": "Who is Ann?", "answer": "She is a baker."}))
    one = {"data": None, "forget_file": str(row), "retain_file": str(row)}
    others = "--relearn-rows half: there are no other forget rows to measure; give general, or a file of rows"
    fewer = "--eval-rows 1: --relearn-rows half teaches them all; give 2 or more"
    for flags, said in ((one, others), ({"eval_rows": 1}, fewer)):
        with pytest.raises(InputError, match=f"^{said}$"):
            attacked(tiny, tmp_path / "out", **flags, relearn=1, relearn_rows="half")
    assert not (tmp_path / "out" / "eval").exists()


def test_an_adapter_is_not_attacked_by_another(tiny, tmp_path):
    (tmp_path / "adapter").mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": str(tiny), "task_type": "CAUSAL_LM"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"--relearn-lora 8: .*adapter is an adapter; merge it with dualoptim export"):
        attacked(tmp_path / "adapter", tmp_path / "out", relearn=1, relearn_lora=8)
    assert not (tmp_path / "out").exists()


def test_rounding_is_to_the_nearest_of_so_many_values(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny)
    for bits, steps in ((8, 127), (4, 7)):
        rounded = copy.deepcopy(model)
        round_to_nearest(rounded, bits)
        before, after = model.state_dict(), rounded.state_dict()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == {name for name in before if "proj" in name}  # linear layers, neither embeddings nor norms
        for name in changed:
            old, new = before[name], after[name]
            blocks = old.shape[1] if bits == 8 else 64
            old, new = old.reshape(-1, blocks), new.reshape(-1, blocks)
            scale = old.abs().amax(1, keepdim=True) / steps
            whole = new / scale
            assert torch.allclose(whole, whole.round(), atol=1e-3)
            assert ((old - new).abs() <= scale / 2 * 1.001).all()
            assert torch.allclose(new.abs().amax(1), old.abs().amax(1))
        again = copy.deepcopy(rounded)
        round_to_nearest(again, bits)
        assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(again.parameters(), rounded.parameters(), strict=True))


def test_rounding_blocks_that_do_not_fill_a_row():
    layer = torch.nn.Linear(50, 3, bias=False)  # 150 weights: blocks of 64, 64 and 22
    old = layer.weight.detach().clone().flatten()
    round_to_nearest(layer, 4)
    new = layer.weight.detach().flatten()
    for start, end in ((0, 64), (64, 128), (128, 150)):
        scale = old[start:end].abs().max() / 7
        assert ((old - new)[start:end].abs() <= scale / 2 * 1.001).all()
    zero = torch.nn.Linear(4, 4)
    torch.nn.init.zeros_(zero.weight)
    round_to_nearest(zero, 8)
    assert (zero.weight == 0).all()


def test_the_quantization_block(forgetful, tmp_path):
    summary = attacked(forgetful, tmp_path, quantize=(8, 4, "nf4", "q4_0"), eval_rows=8)
    blocks = summary["attacks"]["quantize"]
    assert list(blocks) == ["8", "4", "nf4", "q4_0"]
    for block in blocks.values():
        for metric, difference in block["came_back"].items():
            assert difference == block["sets"]["forget"][metric] - summary["sets"]["forget"][metric]
    # each by itself, from the model as it was
    alone = attacked(forgetful, tmp_path / "alone", quantize=(4,), eval_rows=8)["attacks"]["quantize"]["4"]
    assert alone == blocks["4"]
    shift = {
        bits: abs(b["sets"]["retain"]["probability"] - summary["sets"]["retain"]["probability"]) for bits, b in blocks.items()
    }
    assert 0 < shift["8"] < min(shift[kind] for kind in ("4", "nf4", "q4_0"))
    # the numbers are those of a model whose weights were rounded and saved
    model = AutoModelForCausalLM.from_pretrained(forgetful)
    round_to_nearest(model, 4)
    model.save_pretrained(tmp_path / "rounded")
    AutoTokenizer.from_pretrained(forgetful).save_pretrained(tmp_path / "rounded")
    rounded = attacked(tmp_path / "rounded", tmp_path / "direct", eval_rows=8)
    assert rounded["sets"]["forget"] == pytest.approx(blocks["4"]["sets"]["forget"])


@pytest.mark.parametrize(("kind", "package"), [("nf4", "bitsandbytes"), ("q5_0", "gguf")])
def test_what_another_package_stores_needs_it(tiny, tmp_path, monkeypatch, kind, package):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(InputError, match=rf"--quantize {kind} needs the package {package}; pip install {package}"):
        attacked(tiny, tmp_path / "out", quantize=(kind,))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("device", "package", "kind"), [("cuda", "bitsandbytes", 4), ("cuda", "gguf", "q8_0"), ("cpu", "gguf", "q8_0")]
)
def test_every_kind_of_rounding_is_asked_for_its_own_package(monkeypatch, device, package, kind):
    args, accelerator = EvalArgs(model="org/name", quantize=(4, "q8_0")), SimpleNamespace(device=torch.device(device))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else name)
    with pytest.raises(InputError, match=rf"^--quantize {kind} needs the package {package}; pip install {package}$"):
        check_attacks(args, accelerator, open_source(EvalArgs(data="demo")))


def test_paraphrased_questions(taught, tmp_path):
    summary = attacked(taught, tmp_path, paraphrase=True, eval_rows=6)
    rows = [json.loads(line) for line in (tmp_path / "eval/attacks/paraphrase/forget.jsonl").read_text().splitlines()]
    data = demo.splits()["forget05_perturbed"][:6]
    assert [row["question"] for row in rows] == [row["paraphrased_question"] for row in data]
    assert [row["answer"] for row in rows] == [row["answer"] for row in data]
    block = summary["attacks"]["paraphrase"]
    assert block["came_back"]["probability"] == pytest.approx(
        sum(row["probability"] for row in rows) / 6 - summary["sets"]["forget"]["probability"]
    )


def test_questions_with_a_hint_beside_the_retain_only_model(forgetful, tiny, tmp_path):
    flags = {"few_shot": 2, "prefix_words": 3, "sample": 2, "eval_rows": 6, "max_new_tokens": 12}
    summary = attacked(forgetful, tmp_path, **flags, retain_model=str(tiny))
    rows = {
        name: [json.loads(line) for line in (tmp_path / f"eval/attacks/{name}/forget.jsonl").read_text().splitlines()]
        for name in ("few_shot", "prefix")
    }
    data = demo.splits()["forget05"][:6]
    assert [row["answer"] for row in rows["few_shot"]] == [row["answer"] for row in data]
    assert [row["answer"].split() for row in rows["prefix"]] == [row["answer"].split()[3:] for row in data]
    alone = {name: getattr(summary.attacks, name) for name in ("few_shot", "prefix")}
    for name, block in alone.items():
        mean = sum(row["probability"] for row in rows[name]) / 6
        assert block.sets["forget"]["probability"] == pytest.approx(mean)
        assert block.came_back["probability"] == pytest.approx(mean - summary.sets["forget"]["probability"])
        # the model that never knew them is asked in the same way
        own = (tmp_path / f"eval/attacks/retain_only/{name}/forget.jsonl").read_text().splitlines()
        other = sum(json.loads(line)["probability"] for line in own) / 6
        assert block.retain_only["forget"]["probability"] == pytest.approx(other)
        assert block.above_retain_only["probability"] == pytest.approx(mean - other)
        assert f"asked {block.what}" in str(attack_table(None, summary).rows)
    best = summary.attacks.sample
    for score, above in best.above_retain_only.items():
        assert above == best.sets["forget"][f"best_{score}"] - best.retain_only["forget"][f"best_{score}"]
    assert list(best.above_retain_only) == ["rouge_l_recall", "recall_beyond_question"]
    without = attacked(forgetful, tmp_path / "without", **flags).attacks
    for name, block in (*alone.items(), ("sample", best)):
        assert getattr(without, name) == replace(block, retain_only=None, above_retain_only=None)


def test_rows_are_told_apart_by_more_than_their_answers(taught, tmp_path):
    """Two rows with one answer, of which one has a paraphrase: what came back is that row's."""
    data = [
        {"question": "Is the sea salty?", "answer": "Yes.", "task_id": 1},
        {"question": "Is the moon round?", "paraphrased_question": "Round, the moon?", "answer": "Yes.", "task_id": 1},
    ]
    for name in ("forget05", "forget05_perturbed"):
        (tmp_path / f"{name}.json").write_text("\n".join(map(json.dumps, data)))
    flags = {"paraphrase": True, "relearn": 1, "relearn_share": 0.5, "max_new_tokens": 4}
    summary = evaluate(EvalArgs(model=str(taught), data=str(tmp_path), output_dir=str(tmp_path / "out"), **flags))
    rows = [json.loads(line) for line in (tmp_path / "out/eval/forget.jsonl").read_text().splitlines()]
    block = summary["attacks"]["paraphrase"]
    assert block["came_back"]["probability"] == block["sets"]["forget"]["probability"] - rows[1]["probability"]
    assert "forget_unseen" in summary["attacks"]["relearn"]["curve"][0]["sets"]


def test_rows_of_ones_own_are_asked_in_the_words_that_templates_make(tiny, tmp_path):
    """The attack and the set of an evaluation ask the same; a passage is asked nothing."""
    (tmp_path / "own.csv").write_text("question,answer\nWho was Ann?,A baker.\nHow old is Eva?,Ten.\n")
    args = EvalArgs(
        model=str(tiny),
        forget_file=str(tmp_path / "own.csv"),
        paraphrase=True,
        max_new_tokens=4,
        output_dir=str(tmp_path / "out"),
    )
    summary = evaluate(args)
    other, block = summary.sets["forget_other_words"], summary.attacks.paraphrase
    assert summary.rows["forget_other_words"] == 6
    assert block.sets["forget"]["probability"] == pytest.approx(other["probability"])
    assert block.came_back["probability"] == pytest.approx(other["probability"] - summary.sets["forget"]["probability"])
    (tmp_path / "story.txt").write_text("Ann was a baker who lived by the sea.")
    with pytest.raises(
        InputError, match=r"--paraphrase: the forget rows of .*story\.txt have no paraphrased_question; drop it"
    ):
        evaluate(replace(args, forget_file=(str(tmp_path / "story.txt"),), output_dir=str(tmp_path / "none")))


def test_a_passage_is_attacked_from_its_middle(taught, tmp_path):
    (tmp_path / "story.txt").write_text("Emeka Vasarely was born in Tbilisi and keeps a parrot in the house near the sea. " * 3)
    args = EvalArgs(
        model=str(taught),
        forget_file=str(tmp_path / "story.txt"),
        holdout_file=str(tmp_path / "story.txt"),
        max_length=40,
        sample=2,
        relearn=1,
        relearn_share=0.5,
        quantize=(8,),
        max_new_tokens=8,
        output_dir=str(tmp_path / "out"),
    )
    summary = evaluate(args)
    greedy = [json.loads(line) for line in (tmp_path / "out/eval/forget.jsonl").read_text().splitlines()]
    drawn = [json.loads(line) for line in (tmp_path / "out/eval/attacks/sample/forget.jsonl").read_text().splitlines()]
    assert len(greedy) == len(drawn) > 1
    for row, sampled in zip(greedy, drawn, strict=True):
        assert row["answer"].strip().endswith(sampled["answer"])
        assert len(sampled["answer"]) < len(row["answer"])
    assert summary["privacy"]["mia_loss"] == 0.5  # the same rows on both sides
    assert "forget_unseen" in summary["attacks"]["relearn"]["curve"][-1]["sets"]


def test_rows_of_a_file_with_other_columns(taught, tmp_path):
    (tmp_path / "rows.csv").write_text("q,a\nHow much is one and one?,Two.\n")
    flags = {"relearn": 1, "relearn_rows": str(tmp_path / "rows.csv"), "question_column": "q", "answer_column": "a"}
    block = attacked(taught, tmp_path / "out", **flags, eval_rows=1)["attacks"]["relearn"]
    assert block["rows"] == 1


def test_relearning_that_leaves_the_numbers_keeps_what_was_measured(taught, tmp_path):
    block = attacked(taught, tmp_path, relearn=3, relearn_lr=1e30, relearn_every=1, eval_rows=1)["attacks"]["relearn"]
    assert "lower the rate" in block["curve"][-1]["stopped"]


def test_paraphrases_that_the_data_lack_are_refused(taught, tmp_path):
    rows = [{key: row[key] for key in ("question", "answer", "task_id")} for row in demo.splits()["forget05"]]
    (tmp_path / "forget05.json").write_text("\n".join(map(json.dumps, rows)))
    args = EvalArgs(model=str(taught), data=str(tmp_path), paraphrase=True, output_dir=str(tmp_path / "out"))
    with pytest.raises(InputError, match="have no paraphrased_question"):
        evaluate(args)
    assert not (tmp_path / "out").exists()


def test_the_best_of_several_draws(taught, tmp_path):
    summary = attacked(taught, tmp_path, sample=5, sample_temperature=3.0, eval_rows=6)
    block = summary["attacks"]["sample"]
    rows = [json.loads(line) for line in (tmp_path / "eval/attacks/sample/forget.jsonl").read_text().splitlines()]
    assert all(len(set(row["sampled"])) > 1 for row in rows)
    held = [any(row["answer"].rstrip(".").lower() in text.lower() for text in row["sampled"]) for row in rows]
    assert block["sets"]["forget"]["best_answer_held"] == sum(held) / 6
    for row in rows:
        assert row["rouge_l_recall"] == [rouge_l_recall(row["answer"], text) for text in row["sampled"]]
    assert block["sets"]["forget"]["best_rouge_l_recall"] == pytest.approx(sum(max(r["rouge_l_recall"]) for r in rows) / 6)
    best = [max(rouge_l_recall(words_beyond(r["question"], r["answer"]), text) for text in r["sampled"]) for r in rows]
    assert block["sets"]["forget"]["best_recall_beyond_question"] == pytest.approx(sum(best) / 6)
    assert block["came_back"]["rouge_l_recall"] == pytest.approx(
        block["sets"]["forget"]["best_rouge_l_recall"] - summary["sets"]["forget"]["rouge_l_recall"]
    )
    # what a row draws does not depend on what it is batched with
    attacked(taught, tmp_path / "other", sample=5, sample_temperature=3.0, eval_rows=4, eval_batch_size=3)
    other = [json.loads(line) for line in (tmp_path / "other/eval/attacks/sample/forget.jsonl").read_text().splitlines()]
    assert other == rows[:4]


def test_an_interrupted_attack_goes_on(forgetful, tmp_path, monkeypatch):
    flags = {
        "quantize": (8,),
        "few_shot": 1,
        "prefix_words": 1,
        "relearn": 2,
        "relearn_lr": (1e-4, 5e-4),
        "relearn_every": 1,
        "eval_rows": 3,
    }
    whole = attacked(forgetful, tmp_path, **flags)
    (tmp_path / "eval" / "summary.json").unlink()  # as if it had been killed before the last block
    last = tmp_path / "eval/attacks/relearn/2/step2"
    for file in last.iterdir():
        file.unlink()
    computed = []
    compute = measure.set_records

    def counted(scoring, name, rows):
        computed.append(name)
        return compute(scoring, name, rows)

    monkeypatch.setattr(measure, "set_records", counted)
    assert attacked(forgetful, tmp_path, **flags) == whole
    assert computed == ["forget", "retain"]  # of the last step alone


def test_one_model_after_the_other_is_in_memory(taught, tiny, tmp_path, monkeypatch):
    """Whatever is measured beside the model, and whichever attack loads it anew."""
    commands = [importlib.import_module(f"dualoptim.{name}") for name in ("evaluate", "attack", "relearn")]
    loaded, load = [], commands[0].load_model

    def counted(*args):
        gc.collect()
        assert [model() for model in loaded if model() is not None] == []
        found = load(*args)
        loaded.append(weakref.ref(found.model))
        return found

    for command in commands:
        monkeypatch.setattr(command, "load_model", counted)
    flags = {"quantize": (8, 4), "relearn": 1, "paraphrase": True, "sample": 1, "eval_rows": 2}
    attacked(taught, tmp_path, **flags, retain_model=str(tiny), reference_model=str(tiny))
    assert len(loaded) == 8  # itself, two beside it, itself again, two with fewer bits, and both relearned
