"""Optimizers x objectives at equal forgetting, each at its own best rates, and what relearning and four bits bring back.

    python tests/speed/frontier.py --output-dir runs/frontier

The demo's model forgets three of its twenty authors (forget10, two epochs), keeps five, and is asked about five that no step
sees; in a sequence five authors one after another. Rates climb and fall by a factor until the curve of every seed crosses the
levels. The same command goes on where it was stopped; --minutes stops it, --show only writes the tables of what there is.
"""

import argparse
import contextlib
import csv
import functools
import io
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from peak import cycle_peak

from dualoptim import EvalArgs, FinetuneArgs, UnlearnArgs, run
from dualoptim.config.args import Relearning
from dualoptim.config.optimizers import kind_of
from dualoptim.data import demo
from dualoptim.data.own import Source, open_source
from dualoptim.data.rows import Row
from dualoptim.data.unseen import known_to_train, said
from dualoptim.errors import NonFiniteError
from dualoptim.evaluation.scoring import ScoringPass
from dualoptim.finetune import finetune, learn
from dualoptim.models.launch import release, start_accelerator
from dualoptim.models.load import load_model
from dualoptim.models.rounding import round_to_nearest
from dualoptim.relearn import make_lessons
from dualoptim.reporting.frontier import COLLAPSED, KEPT, Method, mean_curve, methods_of
from dualoptim.reporting.frontier_plot import Beside, Front, frontier
from dualoptim.reporting.log import StepLog
from dualoptim.reporting.plots import render
from dualoptim.reporting.tables import Table
from dualoptim.taught import DEMO_RECIPE, teach_demo

LEVELS = (0.1, 0.003)
KNOWN = 0.02
"""About what a model knows that was never taught the forget set: tables are read there as well."""
STEP = 1.3
"""Factor between rates."""
FARTHEST = 10
"""Factors from the first rate to the last that is tried."""
RELEARN = ("relearned", "relearned_longer")
"""Trained on a fifth of the forget rows; what is read is the others' probability."""
COLUMNS = ("forget", "seen", "unseen", "general", *RELEARN, "four_bits")


@dataclass(frozen=True)
class Contender:
    """An optimizer in words, its flags, and the first rate of forget steps, with its ratio to that of retain steps."""

    title: str
    flags: Mapping[str, Any]
    ratio: float = 1.0
    rate: float = 5.6e-4
    drawn: bool = False  # in the plots


_PLUS = {"optim": "dual-adamw-plus", "max_update": 1.0}
_ALTERNATE = {"optim": "adamw-alternate"}

CONTENDERS = [
    Contender("dual-adamw, equal rates", {}, rate=3e-4, drawn=True),
    Contender("dual-adamw, retain rate 1/3", {}, 3, drawn=True),
    Contender("dual-adamw-plus, bound 1, equal rates", _PLUS, drawn=True),
    Contender("dual-adamw-plus, bound 1, retain rate 1/3", _PLUS, 3),
    Contender("adamw-alternate, equal rates", _ALTERNATE, rate=2e-4),
    Contender("adamw-alternate, coefficient 0.1", {**_ALTERNATE, "forget_coeff": 0.1}, rate=2e-4, drawn=True),
    Contender("adamw-alternate, retain rate 1/3", _ALTERNATE, 3, rate=3e-4),
    Contender("adamw joint", {"optim": "adamw"}),
    Contender("adamw joint, coefficient 0.1", {"optim": "adamw", "forget_coeff": 0.1}, rate=1.6e-3, drawn=True),
    Contender(
        "dual-adamw, forget steps by signSGD, retain rate 1/3", {"forget_optimizer": "signsgd"}, 3, rate=3e-4, drawn=True
    ),
    Contender("dual-adamw, projection, retain rate 1/3", {"project_forget": "global"}, 3),
    Contender("dual-adamw, SAM 0.05, retain rate 1/3", {"sam_rho": 0.05}, 3),
    Contender("dual-adamw in 8 bits, retain rate 1/3", {"optim_bits": 8}, 3),
    Contender("dual-adamw-plus in 8 bits, bound 1, equal rates", {**_PLUS, "optim_bits": 8}),
    Contender("dual-adamw, mean of cycles 0.9, retain rate 1/3", {"average_cycles": 0.9}, 3),
    Contender("dual-adamw, forget betas 0.5 and 0.9, retain rate 1/3", {"forget_adam_betas": (0.5, 0.9)}, 3),
    Contender(
        "adamw-alternate, coefficient 0.1, betas 0.5 and 0.9",
        {**_ALTERNATE, "forget_coeff": 0.1, "adam_betas": (0.5, 0.9)},
        rate=2e-4,
    ),
]
SOME = (0, 1, 2, 4, 5, 7, 8)
FEW = (1, 2, 4, 5, 8, 9)
"""Contenders where pairs are many, by their places."""


@dataclass(frozen=True)
class Part:
    """A table: a pair on one task or on a sequence of them, its contenders by their places, seeds, and where rates begin."""

    pair: str
    seeds: tuple[int, ...]
    places: Sequence[int] = range(len(CONTENDERS))
    start: int = 0
    tasks: int = 1
    taught: bool = False  # each seed teaches a model of its own, which moves more than what else it draws

    @property
    def title(self) -> str:
        after = f", {self.tasks} tasks one after another" if self.tasks > 1 else ""
        return self.pair + after + (", a taught model for each seed" if self.taught else "")


OWN = (1, 5, 9, 8, 15, 16, 4, 0)
"""Contenders that are compared on several taught models."""
PARTS = [
    Part("ME+GD", (1, 2, 3, 4, 5), OWN, taught=True),
    Part("ME+GD", (1, 2, 3), range(15)),
    Part("NPO+GD", (1, 2, 3), SOME, 1),
    Part("RMU+EMBED", (1, 2, 3), FEW, 6),
    Part("ME+GD", (4, 5), SOME),
    *(Part(pair, (1, 2, 3), (1, 5), start, 5) for pair, start in (("ME+GD", 1), ("NPO+GD", 2), ("RMU+EMBED", 6))),
    Part("JensUn+JSD", (1, 2, 3), FEW, 6),
    Part("IDK+AP", (1, 2, 3), FEW, 5),
    Part("AltPO+GD", (1,), FEW, 8),
]
"""The most telling first."""


# ------------------------------------------------------------------------------------------------------------- the task


@dataclass(frozen=True)
class Task:
    """What is unlearned in a folder: the demo's model, rows and questions. Other models are tasks of their own."""

    folder: Path
    levels: tuple[float, float] = LEVELS
    known: float = KNOWN
    relearn: tuple[tuple[int, float], ...] = ((20, 5e-4), (60, 1e-3))  # steps and rate of each column of RELEARN
    seed: int = 42  # of teaching

    def of(self, part: "Part", seed: int) -> "Task":
        """Give the task of a part's seed: another folder where its model is another."""
        return replace(self, folder=self.folder / f"seed{seed}", seed=seed) if part.taught else self

    def prepare(self) -> None:
        """Write rows with other answers; teach the demo's model, and one that never sees the three authors, if need be."""
        folder, rows = self.folder, demo.splits()
        others = [{**row, "other": row["perturbed_answer"]} for row in rows["forget10_perturbed"]]
        for name, lines in (("forget", others), ("retain", rows["retain10"])):
            (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
        if not (folder / "model").is_dir():
            args = UnlearnArgs(output_dir=str(folder), seed=self.seed)
            teach_demo(load_model(args, start_accelerator(args)), args, folder / "model")
        if not (folder / "retain_only" / "model").is_dir():
            splits = ("retain50", "retain_unseen", "forget05", "real_authors_perturbed", "world_facts_perturbed")
            recipe = {**DEMO_RECIPE, "splits": splits, "tasks": (4, 5, 6, 7, 8, 9, 10), "overwrite": True}
            finetune(FinetuneArgs(data="demo", seed=self.seed, output_dir=str(folder / "retain_only"), **recipe))

    def flags(self, part: "Part") -> dict[str, Any]:
        """Name the rows and the model of a run."""
        rows: dict[str, Any]
        if part.pair.startswith("AltPO"):
            rows = {name: str(self.folder / f"{name.removesuffix('_file')}.jsonl") for name in ("forget_file", "retain_file")}
            rows["alternative_column"] = "other"
        else:
            rows = {"data": "demo", "split": ("forget10" if part.tasks == 1 else "forget05",)}
        return {"model": str(self.folder / "model"), "num_epochs": 2, **rows}

    def measuring(self, tasks: int) -> "Measuring":
        """Say what models are asked after so many tasks."""
        split = "forget10" if tasks == 1 else "forget05"
        args = EvalArgs(model=str(self.folder / "model"), data="demo", split=(split,), relearn=(1,))
        source = open_source(args)
        trained = known_to_train(args, source) or frozenset()
        sets, _ = source.evaluation_sets(split, 1)
        kept = sets["retain"]
        asked = {
            "forget": [Row(row.question, row.answer) for task in range(1, tasks + 1) for row in source.task_rows(split, task)],
            "seen": [row for row in kept if said(row) in trained],
            "unseen": [row for row in kept if said(row) not in trained],
            "general": [*sets["real_authors"], *sets["world_facts"]],
        }
        return Measuring(args, source, asked, self.relearn)


@dataclass(frozen=True)
class Measuring:
    """Scores models of a task by probabilities of true answers alone, as they are, in four bits, and after relearning."""

    args: EvalArgs
    source: Source
    asked: Mapping[str, Sequence[Row]]
    relearn: Sequence[tuple[int, float]]

    def scores(self, model: Path) -> dict[str, float]:
        """Give the mean probability by `COLUMNS`."""
        args = EvalArgs(**{**vars(self.args), "model": str(model)})
        accelerator = start_accelerator(args)
        loaded = load_model(args, accelerator)
        weights = {name: weight.clone() for name, weight in loaded.model.state_dict().items()}
        found = {name: self._probability(loaded, rows) for name, rows in self.asked.items()}
        (lesson,) = make_lessons(args, self.source, loaded)
        taught = {said(row) for row in lesson.rows}
        for name, (steps, rate) in zip(RELEARN, self.relearn, strict=True):
            epochs = math.ceil(steps * 4 / len(lesson.rows))
            recipe = Relearning(model=str(model), learning_rate=rate, num_epochs=epochs, max_steps=steps, warmup_epochs=0)
            loaded.model.train()
            with StepLog(None, steps, "relearn", accelerator) as log:
                for _ in learn(loaded, lesson.rows, recipe, log):
                    pass
            release(loaded)
            found[name] = self._probability(loaded, [row for row in self.asked["forget"] if said(row) not in taught])
            loaded.model.load_state_dict(weights)
        round_to_nearest(loaded.model, 4)
        found["four_bits"] = self._probability(loaded, self.asked["forget"])
        return found

    def _probability(self, loaded: Any, rows: Sequence[Row]) -> float:
        loaded.model.eval()
        return statistics.fmean(math.exp(-loss) for loss in ScoringPass(loaded, self.args).losses("score", rows))


@functools.cache
def measuring(task: Task, tasks: int) -> Measuring:
    """Say it once a process."""
    return task.measuring(tasks)


# ------------------------------------------------------------------------------------------------------------- the runs

Line = dict[str, Any]


@dataclass
class Runs:
    """The runs that there are, in a file that grows by a line with each."""

    path: Path
    lines: list[Line] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.path.exists():
            with self.path.open() as file:
                self.lines = [{k: _number(v) for k, v in line.items()} for line in csv.DictReader(file)]

    def add(self, line: Line) -> None:
        """Append a line to the file."""
        new = not self.path.exists()
        with self.path.open("a") as file:
            writer = csv.DictWriter(file, _HEAD, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(line)
        self.lines.append(line)

    def of(self, part: Part, contender: Contender) -> list[Line]:
        """Give those of a contender in a part, of all seeds."""
        return [line for line in self.lines if (line["part"], line["optimizer"]) == (part.title, contender.title)]


_HEAD = ("part", "optimizer", "place", "learning_rate", "forget_lr", "seed", *COLUMNS, "seconds")


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def around(known: Mapping[int, Line], level: float) -> tuple[int, int] | None:
    """Find the neighbouring places of a seed between which it comes to a level; None if it was not seen to."""
    knows = [place for place, line in known.items() if line["forget"] != "" and line["forget"] >= level]
    forgets = [place for place, line in known.items() if line["forget"] != "" and line["forget"] <= level]
    beyond = [place for place in forgets if not knows or place > max(knows)]
    return (max(knows), min(beyond)) if knows and beyond else None


def next_place(known: Mapping[int, Line], begin: Sequence[int], levels: Sequence[float] = LEVELS) -> int | None:
    """Say which rate a seed tries next, in factors of `STEP` from the first; None where its curve crosses the levels or ends.

    It begins with one rate, or with those around the levels of an earlier seed. Those around the lowest level are a factor
    apart, those around others two at most; none is tried above one that has lost half of what was to be kept.
    """
    for place in begin:
        if place not in known:
            return place
    low, high, stride = min(known), max(known), 1 if len(begin) > 2 else 2
    broken = known[high]["forget"] == "" or known[high]["unseen"] < COLLAPSED
    for level in levels:
        found = around(known, level)
        if found and found[1] - found[0] > (1 if level == min(levels) else 2) and sum(found) // 2 not in known:
            return sum(found) // 2
        if not found and known[low]["forget"] != "" and known[low]["forget"] < level and low > begin[0] - FARTHEST:
            return low - stride
        if not found and not broken and known[high]["forget"] > level and high < begin[0] + FARTHEST:
            return high + stride
    return None


def take(task: Task, part: Part, contender: Contender, place: int, seed: int) -> Line:
    """Unlearn and measure, in a process that says nothing."""
    forget_lr = contender.rate * STEP**place
    rates: dict[str, Any] = {"learning_rates": (float(f"{forget_lr / contender.ratio:.3g}"),)}
    if contender.flags.get("optim") != "adamw":
        rates["forget_lr"] = float(f"{forget_lr:.3g}")
    flags = {**task.flags(part), **rates, **contender.flags, "task_list": tuple(range(1, part.tasks + 1))}
    own = task.folder / f"run-{os.getpid()}"
    args = UnlearnArgs(forget_losses=(part.pair,), eval=False, overwrite=True, seed=seed, output_dir=str(own), **flags)
    line: Line = {"part": part.title, "optimizer": contender.title, "place": place, "seed": seed}
    line |= {"learning_rate": args.learning_rates[0], "forget_lr": args.forget_lr or args.learning_rates[0]}
    with (
        (task.folder / f"said-{os.getpid()}.txt").open("w") as said_there,
        contextlib.redirect_stdout(said_there),
        contextlib.redirect_stderr(said_there),
    ):
        try:
            result = run(args)
        except NonFiniteError:
            return line | dict.fromkeys((*COLUMNS, "seconds"), "")
        line["seconds"] = sum(record["seconds"] for done in result.tasks for record in done.log)
        line |= measuring(task, part.tasks).scores(result.tasks[-1].model)
    return line


def take_all(task: Task, runs: Runs, parts: Sequence[Part], ends: float, at_once: int = 1) -> None:
    """Take what is missing, the most telling parts first, until a time; so many runs beside each other."""
    chains = [(part, CONTENDERS[place], seed) for part in parts for seed in part.seeds for place in part.places]
    taken: dict[Future[Line], tuple[Part, Contender, int]] = {}
    ready = functools.cache(functools.partial(beside, runs=runs))
    with ProcessPoolExecutor(at_once, multiprocessing.get_context("spawn")) as pool:
        while True:
            for part, contender, seed in chains:
                if len(taken) == at_once or time.time() > ends:
                    break
                lines = runs.of(part, contender)
                known = {int(line["place"]): line for line in lines if line["seed"] == seed}
                place = next_place(known, _earlier(lines, seed, task.levels) or [part.start], task.levels)
                if place is not None and (part, contender, seed) not in taken.values():
                    taken[pool.submit(take, ready(task.of(part, seed)), part, contender, place, seed)] = part, contender, seed
            if not taken:
                return
            for done in wait(taken, return_when=FIRST_COMPLETED).done:
                part, contender, seed = taken.pop(done)
                runs.add(line := done.result())
                scores = ", ".join(f"{name} {line[name]:.3f}" for name in COLUMNS if line[name] != "")
                print(f"{part.title}, {contender.title}, {line['forget_lr']:g}, seed {seed}: {scores}", flush=True)


def beside(task: Task, runs: Runs) -> Task:
    """Teach the models of a task and measure those that nothing was unlearned from, if need be."""
    task.folder.mkdir(parents=True, exist_ok=True)
    task.prepare()
    for name, place in (("before", "model"), ("retain-only", "retain_only/model")):
        if not any((line["optimizer"], line["seed"]) == (name, task.seed) for line in runs.lines):
            runs.add({"part": "", "optimizer": name, "seed": task.seed, **measuring(task, 1).scores(task.folder / place)})
    return task


def _earlier(lines: Sequence[Line], seed: int, levels: Sequence[float] = LEVELS) -> list[int]:
    """Give the places around the levels of the first seed, none for that one."""
    first = lines[0]["seed"] if lines else seed
    known = {int(line["place"]): line for line in lines if line["seed"] == first}
    pairs = [pair for level in levels if (pair := around(known, level))] if first != seed else []
    return sorted({place for pair in pairs for place in pair})


# ----------------------------------------------------------------------------------------------------------- the tables


def methods(lines: Sequence[Line], before: Mapping[str, float]) -> list[Method]:
    """Make the frontier's methods of runs, one for each contender."""
    prefixed = {f"before_retain_{kind}_probability": before[kind] for kind in ("seen", "unseen")}
    return methods_of(
        [
            {
                "losses": "", "optim": line["optimizer"], "learning_rate": line["learning_rate"],
                "forget_lr": line["forget_lr"], "seed": int(line["seed"]),
                "task": 1, "folder": f"{number}/task1", "forget_probability": line["forget"],
                "retain_seen_probability": line["seen"], "retain_unseen_probability": line["unseen"],
                "failed": "NonFiniteError" if line["forget"] == "" else "", **prefixed,
            }
            for number, line in enumerate(lines)
        ]
    )  # fmt: skip


def between(lines: Sequence[Line], column: str, level: float) -> list[float]:
    """Interpolate a column at a level for every seed that reaches it, linearly in the logarithm of the forget probability."""
    found = []
    for seed in sorted({line["seed"] for line in lines}):
        own = sorted((line["forget"], line[column]) for line in lines if line["seed"] == seed and line["forget"] != "")
        if own and own[0][0] <= level:
            forget, values = zip(*own, strict=True)
            found.append(float(np.interp(math.log(level), np.log(forget), values)))
    return found


def spread(values: Sequence[float], seeds: int) -> str:
    """Write mean and deviation, and of how many seeds if not of all."""
    if not values:
        return "not reached"
    some = f" ({len(values)} of {seeds})" if len(values) < seeds else ""
    return f"{statistics.fmean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "") + some


def tables(task: Task, runs: Runs, parts: Sequence[Part]) -> Iterator[str]:
    """Write a table and a plot for every part, and tables of what they cost and are compared with."""
    known = {line["optimizer"]: line for line in runs.lines if line["part"] == "" and line["seed"] in ("", task.seed)}
    high, low = task.levels
    for title in dict.fromkeys(part.title for part in parts):
        own = [_strongest(line) for line in runs.lines if line["part"] == title]
        if not own:
            continue
        by_method = {method.words[-1]: method for method in methods(own, known["before"])}
        rows = []
        for name, method in by_method.items():
            lines = [line for line in own if line["optimizer"] == name]
            seeds = len({line["seed"] for line in lines})
            at = [spread(method.at("unseen", level), seeds) for level in (high, task.known, low)]
            at += [spread(between(lines, column, task.known), seeds) for column in ("seen", "general", "relearned")]
            at.append(spread(between(lines, "relearned", low), seeds))
            broken, known_of = method.collapsed("unseen")
            best = next(iter(method.ranked("unseen", task.known)), [])
            rates = f"{best[0].rate:.2g}, {best[0].forget_rate:.2g}" if best else "-"
            rows.append((name, str(seeds), *at, f"{broken} of {known_of}", rates))
        head = ("", "seeds", *(f"unseen at {level:g}" for level in (high, task.known, low)))
        head += (*(f"{what} at {task.known:g}" for what in ("seen", "general", "relearned")), f"relearned at {low:g}")
        yield f"### {title}\n\n{Table((*head, 'collapsed', 'best rates'), rows).markdown()}"
        name = f"frontier-{title.replace(', ', '-').replace(' ', '-')}.png"
        (task.folder / name).write_bytes(_plot(by_method, known, (high, task.known, low)))
    costs = [line for line in runs.lines if line["part"] == parts[0].title and line["seconds"] != ""]
    seconds = {one.title: [line["seconds"] for line in costs if line["optimizer"] == one.title] for one in CONTENDERS}
    rows = [(name, f"{statistics.median(own):.1f}", *_memory(task, parts[0], name)) for name, own in seconds.items() if own]
    yield f"### Cost\n\n{Table(('', 'seconds of steps', 'bytes of state a weight', 'MiB of a cycle'), rows).markdown()}"
    rows = [(name, *(f"{line[column]:.3f}" for column in COLUMNS)) for name, line in known.items()]
    rises = [line["four_bits"] - line["forget"] for line in runs.lines if line["forget"] != ""]
    yield f"Four bits raise the forget probability of {len(rises)} models by {max(rises):.3f} at most."
    yield f"### Beside\n\n{Table(('', *COLUMNS), rows).markdown()}"


def _plot(by_method: Mapping[str, Method], known: Mapping[str, Line], levels: Sequence[float]) -> bytes:
    """Draw what the plainest contenders keep of unseen rows."""
    fronts = [
        Front(
            name.replace("forget steps by ", "").replace("retain rate ", ""),
            [(run.forget, run.kept["unseen"]) for run in method.runs],
            mean_curve(method.fronts("unseen")),
        )
        for name, method in by_method.items()
        if any(one.drawn for one in CONTENDERS if one.title == name)  # there are runs of some that are gone
    ]
    alone = known["retain-only"]
    beside = Beside(levels, known["before"]["unseen"], (alone["forget"], alone["unseen"]))
    return render(frontier(fronts, KEPT["unseen"], beside)).png


def _strongest(line: Line) -> Line:
    """Let a line's `relearned` be what most came back by."""
    return line if line["forget"] == "" else {**line, "relearned": max(line[name] for name in RELEARN)}


def _memory(task: Task, part: Part, title: str) -> tuple[str, str]:
    """Say how many bytes of a weight's states are kept, where all can be quantized, and the MiB that a cycle holds at once."""
    flags = next(one.flags for one in CONTENDERS if one.title == title)
    moments = kind_of(args := UnlearnArgs(**flags)).moments(args)
    state = str(4 * moments.wide + moments.in_bytes)
    if not (task.folder / "model").is_dir():
        return state, "-"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return state, f"{cycle_peak(UnlearnArgs(learning_rates=(1e-4,), **task.flags(part), **flags)) / 2**20:.1f}"


def main(task: Callable[[Path], Task] = Task, parts: Sequence[Part] = PARTS) -> None:
    """Go on, and write the tables."""
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--at-once", type=int, default=1, help="runs beside each other, each in a process of its own")
    parser.add_argument("--pairs", nargs="*", default=[part.pair for part in parts])
    parser.add_argument("--show", action="store_true")
    args = parser.parse_args()
    folder = args.output_dir
    ends = time.time() + 60 * args.minutes
    folder.mkdir(parents=True, exist_ok=True)
    runs, what = Runs(folder / "frontier.csv"), task(folder)
    if not args.show:
        beside(what, runs)
        take_all(what, runs, [part for part in parts if part.pair in args.pairs], ends, args.at_once)
    text = "\n\n".join(tables(what, runs, parts))
    (folder / "frontier.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
