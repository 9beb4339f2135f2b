"""Answers of a model: what is not generated again, where they stop, and that draws follow its softmax."""

import dataclasses
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import scipy.stats
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BartConfig,
    BartForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    RwkvConfig,
    RwkvForCausalLM,
)

from dualoptim import EvalArgs
from dualoptim.data.own import open_source
from dualoptim.data.prompts import make_formatter
from dualoptim.data.rows import Row
from dualoptim.data.tofu import tofu_source
from dualoptim.evaluate import evaluate
from dualoptim.evaluation import generation
from dualoptim.evaluation.generation import continuation, generate
from dualoptim.evaluation.judges import Judges
from dualoptim.evaluation.measure import fingerprints
from dualoptim.evaluation.scoring import ScoringPass
from dualoptim.models.launch import start_accelerator
from dualoptim.models.load import assemble, load_model


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


# ------------------------------------------------------------------------------- what stands beside the model in its folder


def folder_with(taught, folder, **settings):
    """The taught model, with settings of generation of its own."""
    shutil.copytree(taught, folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


def answers_of(model, folder, **changes):
    evaluate(EvalArgs(model=str(model), data="demo", eval_rows=3, max_new_tokens=12, output_dir=str(folder), **changes))
    return [row["generated"] for name in ("forget", "retain") for row in rows_of(folder, name)]


OWN = {
    "time": {"max_time": 1e-4},
    "a dictionary": {"return_dict_in_generate": True, "output_scores": True},
    "draws": {"do_sample": True, "temperature": 5.0, "num_return_sequences": 2, "top_k": 3},
    "beams": {"num_beams": 3, "length_penalty": 9.0, "early_stopping": True},
    "strings": {"stop_strings": ["a", "e"]},
    "contrast": {"penalty_alpha": 0.6, "top_k": 4},
    "layers": {"dola_layers": "high"},
    "penalties": {"repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "encoder_repetition_penalty": 3.0},
    "lengths": {"min_new_tokens": 12, "max_length": 2, "exponential_decay_length_penalty": [1, 9.0]},
    "words": {"bad_words_ids": [[5], [6]], "sequence_bias": [[[7], 99.0]], "guidance_scale": 3.0},
    "other searches": {"prompt_lookup_num_tokens": 3, "cache_implementation": "static", "use_cache": False},
    "ends that are forced": {"forced_bos_token_id": 9, "forced_eos_token_id": 9, "renormalize_logits": True},
}


@pytest.fixture(scope="module")
def plain_answers(taught, tmp_path_factory):
    return answers_of(taught, tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("name", OWN)
def test_greedy_is_greedy_whatever_a_model_asks_for(name, plain_answers, taught, tmp_path):
    assert answers_of(folder_with(taught, tmp_path / "model", **OWN[name]), tmp_path / "out") == plain_answers


def test_tokens_that_a_model_stops_at_or_suppresses_are_its_own_and_remembered(plain_answers, taught, tmp_path):
    """An evaluation that was interrupted scores anew what other tokens would change."""
    tokenizer = AutoTokenizer.from_pretrained(taught)
    first = [tokenizer(f" {text}", add_special_tokens=False)["input_ids"] for text in plain_answers]
    for change in (
        {"suppress_tokens": [first[0][0]]},
        {"begin_suppress_tokens": [first[0][0]]},
        {"eos_token_id": [0, first[0][1]]},
    ):
        name = next(iter(change))
        model = folder_with(taught, tmp_path / name, **change)
        own = answers_of(model, tmp_path / f"{name} out")
        assert own[0] != plain_answers[0]
        found = []
        for folder in (taught, model):
            args = EvalArgs(model=str(folder), data="demo", eval_rows=3, output_dir=str(tmp_path))
            loaded = load_model(args, start_accelerator(args))
            rows = open_source(args).evaluation_sets("forget05", 1)[0]
            found.append(fingerprints(ScoringPass(loaded, args), rows, loaded.weights_hash())["forget"])
        assert found[0]["weights"] == found[1]["weights"]
        assert found[0]["inputs"] != found[1]["inputs"], name


def test_texts_that_nothing_measures_leave_an_evaluation_the_same(tiny, tmp_path):
    """So it finds what was measured before unlearning, whose objective read them; refusals are for an entailment model."""
    args = EvalArgs(model=str(tiny), data="demo", output_dir=str(tmp_path))
    loaded, row = load_model(args, start_accelerator(args)), Row("Who?", "Ann.")
    rows = row, replace(row, alternatives=("Eva.",)), replace(row, refusal="No.")
    for judges, differing in ((Judges(), set()), (Judges(entailment=SimpleNamespace(weights="w")), {"forget"})):
        scoring = ScoringPass(loaded, args, judges)
        plain, other, refused = (fingerprints(scoring, {"forget": [one], "retain": [one]}, "w") for one in rows)
        assert plain == other
        assert {name for name in plain if plain[name] != refused[name]} == differing


def test_what_a_model_asks_for_is_saved_with_it(taught, tmp_path):
    """It is not taken while answers are scored, and not lost by that."""
    model = folder_with(taught, tmp_path / "model", do_sample=True, temperature=0.7, top_k=5)
    args = EvalArgs(model=str(model), data="demo", eval_rows=1, max_new_tokens=4, output_dir=str(tmp_path / "out"))
    loaded = load_model(args, start_accelerator(args))
    generate(ScoringPass(loaded, args), "", [continuation(loaded, Row("Who?", "Nobody."))])
    assert (loaded.model.generation_config.do_sample, loaded.model.generation_config.top_k) == (True, 5)


# ------------------------------------------------------------------------------------------------- what answers depend on


def answers_one_by_one(model, taught, rows, **changes):
    """Answers of one batch, and of as many batches as there are questions."""
    tokenizer = AutoTokenizer.from_pretrained(taught)
    args = EvalArgs(model="x", data="demo", **changes)
    loaded = assemble(args, model, make_formatter(args, tokenizer), start_accelerator(args))
    loaded.model.eval()
    asked = [continuation(loaded, row) for row in rows]
    both = [generate(ScoringPass(loaded, dataclasses.replace(args, eval_batch_size=size)), "", asked) for size in (16, 1)]
    return loaded, asked, both


@pytest.mark.parametrize(
    ("model", "together_as"),
    [
        (lambda: RwkvForCausalLM(
            RwkvConfig(hidden_size=32, num_hidden_layers=2, attention_hidden_size=32, vocab_size=2000)
        ), "none"),
        (lambda: BartForCausalLM(
            BartConfig(d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=64, vocab_size=2000)
        ), "equally long"),
    ],
    ids=["rwkv", "bart"],
)  # fmt: skip
def test_answers_do_not_depend_on_the_batch_(model, together_as, taught):
    torch.manual_seed(1)
    rows = [Row("W" + "h" * n + "o?", "Nobody.") for n in range(6)] * 2
    loaded, asked, (together, alone) = answers_one_by_one(model(), taught, rows, max_new_tokens=8, attn_implementation="eager")
    assert loaded.answering.together == together_as
    assert len({len(one.ids) for one in asked}) > 2
    assert together == alone
    assert together[:6] == together[6:]


@pytest.mark.parametrize("limit", [5, 100])
def test_answers_end_where_positions_do(limit, taught, monkeypatch):
    """Each at its own place: none fails, and none is shorter because its neighbour's question is longer."""
    torch.manual_seed(1)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=2000, n_positions=40))
    model.generation_config.eos_token_id = None
    cut, lengths = generation._cut_at_end, []
    monkeypatch.setattr(generation, "_cut_at_end", lambda *args: lengths.append(len(cut(*args))) or cut(*args))
    rows = [Row("Who " + "or what " * n + "is it?", "Nobody.") for n in range(5)]
    loaded, asked, (together, alone) = answers_one_by_one(model, taught, rows, max_new_tokens=limit, max_length=40)
    assert together == alone
    assert loaded.answering.positions == 40
    assert sorted(lengths)[10:] == sorted(2 * [min(limit, 40 - len(one.ids)) for one in asked])  # 10 begin empty
