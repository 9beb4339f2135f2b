"""Sweep: run pairs of objectives x rates x seeds x whatever else varies, and compare them in one table."""

if __name__ == "__main__":  # before the imports below, which take seconds
    from dualoptim.__main__ import COMMANDS, start

    start(COMMANDS["sweep"])

import time
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from dualoptim.atomic import read_json, write_json
from dualoptim.config.args import DEMO, NEWEST, SweepArgs, UnlearnArgs
from dualoptim.config.cli import unforeseen
from dualoptim.config.flags import default_of, flags
from dualoptim.config.product import single_runs
from dualoptim.config.saved import as_today, changed_input, earlier_value, gone, to_dict, to_plain
from dualoptim.config.values import expect, field_value
from dualoptim.config.varying import combinations, in_a_name, in_words, varied
from dualoptim.data.readers import is_read
from dualoptim.data.targets import with_targets
from dualoptim.errors import InputError, NonFiniteError, WriteError, reason, unread
from dualoptim.halving import Halving
from dualoptim.job import Job
from dualoptim.models.launch import decided, say, start_accelerator
from dualoptim.models.load import load_model
from dualoptim.models.lock import kept_for_one_run
from dualoptim.models.resume import all_inputs
from dualoptim.models.saving import how_to_go_on
from dualoptim.models.together import wait
from dualoptim.reporting.console import shown
from dualoptim.reporting.frontier_tables import FRONTIER_FILES, write_frontier
from dualoptim.reporting.methods import SWEEP_FILES, brief_methods, write_sweep
from dualoptim.reporting.ours import check_ours
from dualoptim.reporting.results import result_columns
from dualoptim.unlearn import run

Line = dict[str, Any]
"""A line of results.csv by its columns."""

_KNOWN = ("optim", "losses", "learning_rate", "forget_lr", "seed", "task", "folder")


def sweep(args: SweepArgs) -> list[Line]:
    """Run what is not finished yet; writes `results.csv`, `results.md`, `methods.md` and the frontier, and returns the lines.

    With `budget` that many runs at most, chosen by what those before have kept: the same ones when the sweep goes on.

    A line is a task of a run, with the last one's scores; a run that failed has its reason under `failed`. A run that finished
    with other settings is refused, or replaced with `--overwrite`.

    Raises:
        InputError: without an output folder, or if every run is refused, with the first one's reason; nothing is written then.
        WriteError: if the disk is full or the folder goes meanwhile.
    """
    expect(args, SweepArgs)
    if args.dry_run:
        raise InputError("dry_run trains nothing; call dualoptim.sweep.first_runs(args), or sweep without it")
    args = with_targets(args)
    accelerator = start_accelerator(args)
    folder = Path(str(args.output_dir)).expanduser()
    with kept_for_one_run(folder, accelerator, how_to_go_on(args, folder)):
        decided(accelerator, lambda: check_ours(folder / name for name in (*SWEEP_FILES, *FRONTIER_FILES)))
        return _sweep(args, accelerator, folder)


def _sweep(args: SweepArgs, accelerator: Accelerator, folder: Path) -> list[Line]:
    lines: list[Line] = []
    refused: list[InputError] = []
    runs, now = runs_of(args), _Now(accelerator, _own_columns(args))
    chosen = _halving(args, runs)
    total, began = f"at most {chosen.total}" if chosen else str(len(runs)), time.monotonic()
    for done, name in enumerate(chosen.order(lines) if chosen else runs):
        one, still = runs[name], (chosen.total if chosen else len(runs)) - done
        left = (time.monotonic() - began) / max(done, 1) * still / 60
        say(accelerator, f"run {done + 1} of {total}: {name}" + (f" (about {left:.0f} minutes left)" if done else ""))
        try:
            lines += _run(name, one, folder, now)
        except WriteError:  # the next run could not be written either
            raise
        except Exception as error:  # one run that fails must not stop the others, whatever it is
            if isinstance(error, BrokenPipeError) and unread():
                raise
            failed = f"{type(error).__name__}: {reason(error)}"
            if isinstance(error, InputError):
                refused.append(error)
                say(accelerator, f"{name}: FAILED, {failed}")
            elif isinstance(error, NonFiniteError):
                say(accelerator, f"{name}: FAILED, {failed}")
            else:
                if accelerator.num_processes > 1:
                    raise  # it may have happened to this process alone, while the others wait in the run for it
                accelerator.free_memory()
                say(accelerator, f"{name}: FAILED, {unforeseen(error, folder / name, args.texts)}")
            failed = failed if args.texts else type(error).__name__  # why may hold a text
            lines.append(_line(one, now.columns) | {"failed": failed})
        if accelerator.is_main_process and len(refused) < len(lines):
            write_sweep(folder, lines)
    if refused and len(refused) == len(lines):
        raise refused[0]
    if accelerator.is_main_process:
        table, says = brief_methods(lines)
        say(accelerator, f"\n{shown(table)}\n\n{says}\n")
        if frontier := write_frontier(folder, lines):
            told = [frontier.lead, *frontier.points, *map(shown, filter(None, frontier.tables)), "\n".join(frontier.commands)]
            say(accelerator, "\n\n".join([f"{frontier.title} (also in {folder / FRONTIER_FILES[0]}):", *told]) + "\n")
    failures = sum("failed" in line for line in lines)
    taken = f"{done + 1} of {len(runs)} runs" if chosen else f"{len(runs)} runs"
    say(accelerator, f"{taken}, {failures} failed: {folder / 'results.md'}; `dualoptim report {folder}` draws them")
    wait(accelerator)
    return lines


def runs_of(args: SweepArgs) -> dict[str, UnlearnArgs]:
    """List every run of the sweep by the name of its folder."""
    shared = UnlearnArgs(**{field.name: getattr(args, field.name) for field in fields(UnlearnArgs)})
    shared = replace(shared, reference_dir=args.reference_dir or f"{args.output_dir}/reference")
    found = {}
    for words, some in combinations(args, shared):
        for one in single_runs(some, args.forget_lrs, args.seeds):
            name = f"{one.forget_losses[0]}_lr{one.learning_rates[0]:g}_flr{_forget_lr(one):g}_seed{one.seed}{in_a_name(words)}"
            found[name] = replace(one, output_dir=f"{args.output_dir}/{name}")
    return found


def first_runs(args: SweepArgs) -> list[str]:
    """Name the runs that a sweep begins with, by their folders: all of them, or with `budget` those of its first round.

    Raises:
        InputError: if the budget cannot be kept, or is none.
    """
    runs = runs_of(with_targets(args))
    chosen = _halving(args, runs)
    return chosen.first if chosen else [*runs]


def _halving(args: SweepArgs, runs: Mapping[str, UnlearnArgs]) -> Halving | None:
    """Plan which runs are taken, None if all are."""
    columns = _own_columns(args)
    return Halving({name: _line(one, columns) for name, one in runs.items()}, args.budget) if args.budget else None


def _own_columns(args: SweepArgs) -> list[str]:
    """Name the flags that vary, beside pair, optimizer, rates and seed."""
    return [*varied(args), *(["tasks_independent"] if args.tasks_independent else [])]


def _own(one: UnlearnArgs, columns: Sequence[str]) -> Line:
    """Say what tells a run from others of the sweep, beside its pair and rate."""
    own: Line = {"optim": one.optim, "forget_lr": f"{_forget_lr(one):g}", "seed": one.seed}
    return own | {name: in_words(getattr(one, name)) for name in columns}


def _line(one: UnlearnArgs, columns: Sequence[str]) -> Line:
    """Make a line of results.csv of a run that has no scores."""
    line = {"losses": one.forget_losses[0], "learning_rate": f"{one.learning_rates[0]:g}", "task": "-"}
    return _own(one, columns) | line | {"folder": str(Path(str(one.output_dir)).expanduser())}


class _Now:
    """Hashes what the runs of a sweep read as it is now, when a run that has finished is to be compared with it."""

    def __init__(self, accelerator: Accelerator, columns: Sequence[str]) -> None:
        self.accelerator = accelerator
        self.columns = columns
        self._known: dict[tuple[Any, ...], tuple[Job, list[dict[str, str]]]] = {}

    def changed(self, one: UnlearnArgs) -> str | None:
        """Name what is not as it was when a run that has finished read it; the same on all processes."""
        folder = Path(str(one.output_dir)).expanduser()
        taught = folder / "demo_model"
        if one.model == DEMO:  # each run has taught its own
            if not taught.is_dir():
                return None
            one = replace(one, model=str(taught), data=DEMO)
        # the seed is what a fresh adapter is drawn by, and a pair may have columns of its own, or keep nothing
        drawn_by = one.seed if one.use_lora else None
        texts = is_read(one, "refusal", side=1), is_read(one, "alternative"), one.makes_rows  # of own files
        key = one.model, drawn_by, *texts, *(getattr(one, name) for name in self.columns)
        if key not in self._known:
            job, loaded = Job.read(one, self.accelerator), load_model(one, self.accelerator, "measure")
            job.check(loaded)
            job.make_rows(loaded)
            self._known[key] = job, [inputs for _, _, inputs in all_inputs(job, loaded)]
        job, inputs = self._known[key]
        job = replace(job, args=replace(one, output_dir=str(folder)))
        pairs = [(job.folder(task) / "config.yaml", now) for task, now in zip(one.task_list, inputs, strict=True)]
        return decided(self.accelerator, lambda: next(filter(None, (changed_input(*pair) for pair in pairs)), None))


def _run(name: str, one: UnlearnArgs, folder: Path, now: _Now) -> list[Line]:
    """The lines of a run, which is taken unless it has finished before with the same settings, rows, prompts and weights."""
    path, settings, accelerator = folder / name / "finished.json", _settings(one), now.accelerator
    finished = decided(accelerator, lambda: _finished(path))
    if finished:
        other = now.changed(one) if _same(finished["settings"], settings) else "settings"
        if not other:
            say(accelerator, f"{name}: finished before")
            return [_own(one, now.columns) | row for row in finished["rows"]]  # an older sweep did not say all of it
        if not one.overwrite:
            raise InputError(f"--output-dir: {folder / name} was finished with other {other}; --overwrite replaces it")
    elif not one.overwrite:
        decided(accelerator, lambda: _check_begun(one))
    # what an interrupted call left is begun again, unless it has trained, or has checkpoints to go on from
    left = ("*/task*/checkpoint/step-*", "*/task*/trained.json") if not one.save_every else ("*",)
    goes_on = decided(accelerator, lambda: any(any((folder / name).glob(kind)) for kind in left)) and not one.overwrite
    result = run(replace(one, resume=NEWEST) if goes_on else replace(one, overwrite=True))
    lines = [_own(one, now.columns) | result_columns(task) for task in result.tasks]
    if accelerator.is_main_process:
        write_json(path, {"settings": settings, "rows": lines})
    return lines


def _finished(path: Path) -> dict[str, Any] | None:
    """Read what a run of a sweep left when it ended, None if it has not.

    Raises:
        InputError: if it is something else.
    """
    remedy = "move it away, and the run is taken again"
    found = read_json(path, {"settings": dict, "rows": list}, remedy) if path.exists() else None
    if found and not all(isinstance(row, dict) and {*_KNOWN} <= {*row} for row in found["rows"]):
        raise InputError(f"{path}: rows are not those of a run; {remedy}")
    return found


def _check_begun(one: UnlearnArgs) -> None:
    """Make sure that a sweep began what lies unfinished in the folder of one of its runs: its tasks name a shared reference.

    Raises:
        InputError: if a run of its own did.
    """
    folder = Path(str(one.output_dir)).expanduser()
    for config in sorted(folder.glob("*/task*/config.yaml")):
        if earlier_value(config, "reference_dir") is None:
            raise InputError(f"--output-dir: {folder} was not begun by a sweep; give another, or --overwrite to replace it")


def _forget_lr(one: UnlearnArgs) -> float:
    return one.forget_lr or one.learning_rates[0]


def _settings(one: UnlearnArgs) -> dict[str, Any]:
    """Everything that decides the lines of a run."""
    deciding = flags(UnlearnArgs)
    return {name: value for name, value in to_dict(one).items() if deciding[name].changes in ("numbers", "measures")}


def _same(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether a run was finished with the same settings; a flag that it does not know, because it is older, had its default."""
    if gone(before):
        return False
    known = as_today({name: field_value(UnlearnArgs, name, before[name]) for name in now if name in before})
    return to_plain({name: known.get(name, default_of(UnlearnArgs, name)) for name in now}) == dict(now)


def command(args: SweepArgs) -> int:
    """Sweep as a command, or with `--dry-run` name the first runs: return its exit code, 1 if a run failed."""
    if args.dry_run:
        print("\n".join(first_runs(args)))
        return 0
    return int(any("failed" in line for line in sweep(args)))
