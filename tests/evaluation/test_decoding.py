"""A batch whose texts are replaced as they end: the same answers as one by one, from fewer calls."""

import dataclasses

import pytest
import torch
from support import GROUPED
from transformers import (
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from dualoptim import EvalArgs
from dualoptim.data.prompts import make_formatter
from dualoptim.data.rows import Row
from dualoptim.evaluation import decoding
from dualoptim.evaluation.generation import Gumbel, continuation, generate
from dualoptim.evaluation.noise import seed_of
from dualoptim.evaluation.scoring import ScoringPass
from dualoptim.models.launch import start_accelerator
from dualoptim.models.load import assemble

SIZES = GROUPED | {"vocab_size": 2000, "head_dim": 8}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 12}
KINDS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES), "refilled"),
    "windows": (Gemma3ForCausalLM, Gemma3TextConfig(**SIZES, **WINDOWS, tie_word_embeddings=False), "refilled"),
    "experts": (MixtralForCausalLM, MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2), "refilled"),
    "mamba": (
        MambaForCausalLM,
        MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=8, vocab_size=2000, tie_word_embeddings=False),
        "any",
    ),
}
ROWS = [Row("Who " + "or what " * (n % 5) + f"is number {n}?", "Nobody " * (n % 7) + "indeed.") for n in range(18)]


def scoring_of(name, taught, **changes):
    """A random model that ends its answers at many tokens, so that some are short."""
    kind, config, together = KINDS[name]
    torch.manual_seed(0)
    model = kind(config)
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=1.0)  # or it says the same token for ever
    model.generation_config.eos_token_id = list(range(3, 2000, 8))
    args = EvalArgs(model="x", data="demo", **{"max_new_tokens": 16} | changes)
    accelerator = start_accelerator(args)
    loaded = assemble(args, model, make_formatter(args, AutoTokenizer.from_pretrained(taught)), accelerator)
    loaded.model.eval()
    assert loaded.answering.together == together
    return ScoringPass(loaded, args)


def with_size(scoring, size):
    return dataclasses.replace(scoring, args=dataclasses.replace(scoring.args, eval_batch_size=size))


def draws(seeds):
    return lambda numbers, starts: Gumbel([seeds[n] for n in numbers], starts, 1.0)


@pytest.mark.parametrize("drawn", [False, True], ids=["greedy", "drawn"])
@pytest.mark.parametrize("name", KINDS)
def test_answers_do_not_depend_on_who_comes_and_goes(name, drawn, taught):
    """On how many are in the batch, and in which order."""
    scoring = scoring_of(name, taught)
    asked = [continuation(scoring.loaded, row) for row in ROWS]
    seeds = [seed_of("sample", n) for n in range(len(ROWS))]
    alone = generate(with_size(scoring, 1), "", asked, draws(seeds) if drawn else None)
    lengths = [len(scoring.loaded.tokenizer(text)["input_ids"]) for text in alone]
    assert KINDS[name][2] == "any" or min(lengths) < 8 < max(lengths)
    for size in (3, 32):
        assert generate(with_size(scoring, size), "", asked, draws(seeds) if drawn else None) == alone
    back = generate(with_size(scoring, 8), "", asked[::-1], draws(seeds[::-1]) if drawn else None)
    assert back[::-1] == alone


def test_what_has_ended_makes_room(taught):
    """The model is called less often, and for fewer texts, than where a batch goes on until its longest one ends."""
    scoring = with_size(scoring_of("llama", taught, max_new_tokens=64), 8)
    plain = dataclasses.replace(scoring.loaded, answering=dataclasses.replace(scoring.loaded.answering, together="any"))
    asked = [continuation(scoring.loaded, row) for row in ROWS]
    calls, found = [], []
    scoring.loaded.model.register_forward_pre_hook(
        lambda _, args, options: calls.append(tuple(options["input_ids"].shape)), with_kwargs=True
    )
    for own in (scoring, dataclasses.replace(scoring, loaded=plain)):
        calls.clear()
        answers = generate(own, "", asked)
        steps = [rows for rows, length in calls if length == 1]
        assert max(rows for rows, _ in calls) == 8
        assert sum(rows for rows, length in calls if length > 1) == len(ROWS)  # each is read once
        found.append((answers, len(steps), sum(steps)))
    (refilled, calls_refilled, tokens_refilled), (expected, calls_plain, tokens_plain) = found
    assert refilled == expected
    assert calls_refilled < 0.75 * calls_plain
    assert tokens_refilled < 0.6 * tokens_plain


def test_tokens_that_begin_no_answer_may_stand_within_it(taught):
    """Also in that of a text that came later, or was in the batch when others did."""
    scoring = scoring_of("llama", taught)
    asked = [continuation(scoring.loaded, row) for row in ROWS]
    free = generate(with_size(scoring, 4), "", asked)
    scoring.loaded.model.generation_config.begin_suppress_tokens = list(range(1500))  # most of its vocabulary
    alone, refilled = (generate(with_size(scoring, size), "", asked) for size in (1, 4))
    assert refilled == alone
    assert alone != free


def test_static_caches_give_the_same_answers(taught, monkeypatch):
    """Compiled steps need them; what is tested here is all but the compilation, which transformers leaves to GPUs."""
    scoring = scoring_of("windows", taught)
    asked = [continuation(scoring.loaded, row) for row in ROWS]
    expected = generate(with_size(scoring, 4), "", asked)
    own = dataclasses.replace(scoring, args=dataclasses.replace(scoring.args, eval_batch_size=4, generate_with="compiled"))
    seen, generate_of = [], scoring.loaded.model.generate

    def watched(input_ids, generation_config, **options):
        seen.append((generation_config.cache_implementation, input_ids.shape[1] + generation_config.max_new_tokens))
        return generate_of(input_ids=input_ids, generation_config=generation_config, **options)

    monkeypatch.setattr(scoring.loaded.model, "generate", watched)
    assert generate(own, "", asked) == expected
    assert set(seen) == {("static", 64 + 16)}  # one shape to compile for


@pytest.mark.parametrize(("rows", "size"), [(0, 2), (7, 2), (9, 4), (19, 8), (1000, 16)])
def test_a_gpu_answers_as_many_at_once_as_its_memory_takes(rows, size, taught, monkeypatch):
    """At most eight times the batch that is asked for; `rows` of the longest kind would fill what is free."""
    scoring = with_size(scoring_of("llama", taught), 2)
    scoring.loaded.model.generation_config.eos_token_id = None
    asked = [continuation(scoring.loaded, row) for row in ROWS]
    expected = generate(scoring, "", asked)
    longest = max(len(one.ids) for one in asked) + 16
    kept = 2 * 2 * 2 * 8 * 4  # bytes a token: layers, keys and values, heads, their numbers
    monkeypatch.setattr(decoding, "free_memory", lambda _: kept * longest * rows)
    most = []
    scoring.loaded.model.register_forward_pre_hook(
        lambda _, args, options: most.append(len(options["input_ids"])), with_kwargs=True
    )
    assert generate(scoring, "", asked) == expected
    assert max(most) == size
