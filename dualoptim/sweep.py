"""`python -m dualoptim.sweep`: pairs of objectives x rates x forget rates x seeds, compared in one table and one plot."""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from accelerate.utils import broadcast_object_list

from dualoptim.config.args import NEWEST, SweepArgs, UnlearnArgs, main, to_dict
from dualoptim.models.checkpoint import write_json, write_text
from dualoptim.errors import InputError, NonFiniteError, reason
from dualoptim.models.load import start_accelerator
from dualoptim.reporting.tables import markdown_table, results_row, write_results
from dualoptim.reporting.log import say
from dualoptim.unlearn import run

FINISHED = "finished.json"
METHOD = ("losses", "optim", "learning_rate", "forget_lr")


def runs_of(args: SweepArgs) -> dict[str, UnlearnArgs]:
    """Every run of the sweep by the name of its folder."""
    own = {field.name for field in dataclasses.fields(UnlearnArgs)}
    shared = {name: getattr(args, name) for name in own}
    found = {}
    for losses, rate, forget_rate, seed in itertools.product(
        args.forget_losses, args.rates, args.forget_lrs or (args.forget_lr,), args.seeds or (args.seed,)
    ):
        name = f"{losses}_lr{rate:g}_flr{rate if forget_rate is None else forget_rate:g}_seed{seed}"
        changes: dict[str, Any] = {
            "forget_losses": (losses,),
            "learning_rates": (rate,),
            "forget_lr": forget_rate,
            "seed": seed,
        }
        changes |= {"output_dir": f"{args.output_dir}/{name}"}
        changes |= {"reference_dir": args.reference_dir or f"{args.output_dir}/reference"}
        found[name] = UnlearnArgs(**{**shared, **changes})
    return found


def sweep(args: SweepArgs) -> list[dict[str, Any]]:
    """Run what is not finished yet; writes `results.csv`, `results.md`, `methods.md` and `results.png`, and returns the rows.

    A row is a task of a run, with the last one's scores; a run that failed has its reason under `failed`. A run that finished
    with other settings is refused, or replaced with `--overwrite`.

    Raises:
        InputError: without an output folder, or if every run is refused, with the first one's reason; nothing is written then.
    """
    if args.output_dir is None:
        raise InputError("a sweep needs a folder that a second call finds again; give --output-dir")
    accelerator = start_accelerator(args)
    folder = Path(args.output_dir).expanduser()
    rows: list[dict[str, Any]] = []
    refused: list[InputError] = []
    for name, one in runs_of(args).items():
        finished, settings = folder / name / FINISHED, _settings(one)
        (known,) = broadcast_object_list([_finished(finished) if accelerator.is_main_process else None])
        if known and known["settings"] == settings:
            say(accelerator, f"{name}: finished before")
            rows += known["rows"]
            continue
        own = {
            "optim": one.optim,
            "forget_lr": f"{one.rates[0] if one.forget_lr is None else one.forget_lr:g}",
            "seed": one.seed,
        }
        try:
            if known and not args.overwrite:
                raise InputError(f"--output-dir: {folder / name} was finished with other settings; --overwrite replaces it")
            if accelerator.is_main_process:
                finished.unlink(missing_ok=True)
            # what an interrupted call left is begun again, unless it has checkpoints to go on from
            goes_on = one.save_every and (folder / name).is_dir() and not args.overwrite
            result = run(dataclasses.replace(one, **({"resume": NEWEST} if goes_on else {"overwrite": True})))
            new = [own | results_row(t.losses, t.learning_rate, t.task, t.before, t.after, t.folder) for t in result.tasks]
            if accelerator.is_main_process:
                write_json(finished, {"settings": settings, "rows": new})
        except Exception as error:  # one run that fails must not stop the others, whatever it is
            if isinstance(error, InputError):
                refused.append(error)
            elif not isinstance(error, NonFiniteError):
                if accelerator.num_processes > 1:
                    raise  # it may have happened to this process alone, while the others wait in the run for it
                accelerator.free_memory()
            failed = f"{type(error).__name__}: {reason(error)}"
            say(accelerator, f"{name}: FAILED, {failed}")
            new = [own | {"losses": one.forget_losses[0], "learning_rate": f"{one.rates[0]:g}", "task": "-", "failed": failed}]
            new[0]["folder"] = str(folder / name)
        rows += new
        if accelerator.is_main_process and len(refused) < len(rows):
            _write(folder, rows)
    if refused and len(refused) == len(rows):
        raise refused[0]
    if accelerator.is_main_process:
        _write(folder, rows)
        say(accelerator, "\n" + (folder / "methods.md").read_text(encoding="utf-8"))
    failures = sum("failed" in row for row in rows)
    say(accelerator, f"{len(runs_of(args))} runs, {failures} failed: {folder / 'results.md'}, {folder / 'results.png'}")
    return rows


def command(args: SweepArgs) -> int:
    """`sweep` as a command: its exit code, 1 if a run failed."""
    return int(any("failed" in row for row in sweep(args)))


# What changes no number of a run: where it is written, how fast it is, and whether it can go on.
_FREE = """output_dir overwrite resume save_every keep_checkpoints threads eval_batch_size log_with reference_dir push_to_hub
hub_public""".split()


def _settings(one: UnlearnArgs) -> str:
    """The hash of everything that decides a run's rows."""
    deciding = {name: value for name, value in to_dict(one).items() if name not in _FREE}
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()


def _finished(path: Path) -> dict[str, Any] | None:
    """The settings and rows of a run that has finished."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _write(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    (folder / "results.csv").unlink(missing_ok=True)  # the rows of all runs are here
    write_results(folder, rows)
    methods = summarize(rows)
    shown: list[tuple[str, ...]] = [
        ("method", "runs", "model utility", "forget efficacy", "retain probability", "forget probability")
    ]
    for method, scores in methods.items():
        count = max((len(values) for values in scores.values()), default=0)
        shown.append((method, str(count), *(_spread(values) for values in scores.values())))
    write_text(folder / "methods.md", markdown_table(shown) + "\n")
    plot_methods(folder / "results.png", methods)


def summarize(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """For every method (pair, optimizer, rates) the scores of its runs after their last task, one per seed."""
    last: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        last[str(Path(str(row["folder"])).parent) if row["task"] != "-" else str(row["folder"])] = row
    found: dict[str, dict[str, list[float]]] = {}
    for row in last.values():
        method = "{} {} lr {} forget {}".format(*(row[name] for name in METHOD))
        scores = found.setdefault(method, {})
        for name in ("model_utility", "untargeted_forget_efficacy", "retain_probability", "forget_probability"):
            scores.setdefault(name, []).extend([row[name]] if row.get(name) is not None else [])
    return found


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    return f"{fmean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def plot_methods(path: Path, methods: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Model utility against forget efficacy: a point per run, and per method the mean with its standard deviation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for index, (method, scores) in enumerate(methods.items()):
        x, y = scores["untargeted_forget_efficacy"], scores["model_utility"]
        if not x or len(x) != len(y):
            continue
        colour = f"C{index % 10}"
        axes.plot(x, y, ".", color=colour, alpha=0.4)
        spread = [stdev(values) if len(values) > 1 else 0.0 for values in (x, y)]
        axes.errorbar(fmean(x), fmean(y), spread[1], spread[0], "o", color=colour, capsize=3, label=method)
    axes.set_xlabel("forget efficacy (higher forgets more)")
    axes.set_ylabel("model utility (higher keeps more)")
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend(fontsize=7)
    figure.savefig(path)


if __name__ == "__main__":
    main(SweepArgs, command)
