"""Read a command's flags, run it, and end with one line and an exit code where something is wrong."""

import argparse
import contextlib
import dataclasses
import importlib
import inspect
import logging
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar, get_type_hints

import tyro

from dualoptim.config.args import NEWEST, CommonArgs, ReportArgs, SweepArgs, UnlearnArgs
from dualoptim.config.flags import flag_name, flags, helps
from dualoptim.config.notes import template_note
from dualoptim.config.presets import batch_note, listing, over, published
from dualoptim.config.saved import load_yaml
from dualoptim.config.spelling import spelled, typed
from dualoptim.config.varying import check_single
from dualoptim.config.waiting import waiting
from dualoptim.errors import (
    InputError,
    NonFiniteError,
    PeerError,
    Stopped,
    WriteError,
    read_to_the_end,
    reason,
    unread,
    with_peers,
)
from dualoptim.signals import heard

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class DefaultsOptions:
    """Where the values of flags that are not given come from."""

    config: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Take them from a config.yaml that a run wrote; of one of another command those that this one has itself."""


@dataclasses.dataclass(frozen=True)
class PresetOptions(DefaultsOptions):
    """Where the values of flags that are not given come from."""

    preset: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME")] = ()
    """Take published settings, later names over earlier ones; without a name, list all presets."""


def parse(kind: type[T], argv: Sequence[str] | None = None) -> T:
    """Read the arguments of `kind` from the command line, over those of `--config FILE` or (unlearning) `--preset NAME ...`.

    Raises:
        InputError: as the dataclass does. Unknown flags and values that do not parse end the program with code 2.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--config")
    finder.add_argument("--preset", nargs="*")
    given = spelled(kind, sys.argv[1:] if argv is None else argv)
    if issubclass(kind, SweepArgs):
        check_single(kind, given)
    try:
        found, rest = finder.parse_known_args(given)
    except argparse.ArgumentError as error:
        raise InputError(f"{error.argument_name} needs a value") from None
    takes_presets = issubclass(kind, UnlearnArgs)
    if found.preset is not None and not takes_presets:
        raise InputError(f"--preset {' '.join(found.preset)} is for unlearning alone; drop it")
    if found.preset == []:
        print(listing())
        sys.exit(0)
    if found.config is not None and not found.config.strip():
        raise InputError("--config is empty; give a YAML file as written to config.yaml, or leave it out")
    if found.config and found.preset:
        raise InputError("--config and --preset both set the defaults; give one of them")

    # `--resume` alone means the newest checkpoint
    bare = [i for i, flag in enumerate(rest) if flag == "--resume" and (rest[i + 1 :] or ["--"])[0].startswith("--")]
    for i in reversed(bare):
        rest.insert(i + 1, NEWEST)

    named, preset = typed(kind, rest), found.preset or ()
    settings = vars(load_yaml(found.config, kind, _say, named)) if found.config else published(preset)  # type: ignore[type-var]
    form = _form(kind, kind(**over(settings, {})), PresetOptions if takes_presets else DefaultsOptions)
    about = inspect.getdoc(kind)
    filled: Any = tyro.cli(form, prog=_program(), args=rest, description=about, config=(tyro.conf.OmitArgPrefixes,))
    values = {name: value for group in vars(filled).values() for name, value in vars(group).items()}
    args = kind(**over(settings, {name: values[name] for name in named}))
    note = found.preset and batch_note(found.preset, args, int(os.environ.get("WORLD_SIZE", "1")))  # type: ignore[arg-type]
    _say(note or "")
    _say(template_note(settings, named) if preset else "")
    return args


def _say(line: str) -> None:
    """Print a line, if there is one, on the first process of a launch alone."""
    if line and os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


def _form(kind: type, default: Any, first: type) -> type:
    """The flags of `kind` in groups, as a dataclass of dataclasses: what `--help` shows under one heading stands in one.

    `first` are options that stand before all others.
    """
    hints, texts = get_type_hints(kind), helps(kind)
    groups: dict[str, list[Any]] = {}
    for name, flag in flags(kind).items():
        names = f"{{{','.join(flag.among)}}}" if flag.among else None
        *others, last = name, *flag.aliases  # help lists what tyro takes for aliases before what it takes for the name
        spelling: dict[str, Any] = {"name": last, "aliases": tuple(map(flag_name, others))} if others else {}
        hint: Any = Annotated[(hints[name], tyro.conf.arg(help=texts[name], metavar=names, **spelling))]
        if hints[name] == tuple[tuple[str, ...], ...]:  # one of them each time that the flag is given
            hint = tyro.conf.UseAppendAction[hint]  # type: ignore[misc]
        groups.setdefault(flag.group, []).append((name, hint, dataclasses.field(default=getattr(default, name))))
    parts: list[Any] = [("defaults", first, dataclasses.field(default_factory=first))]
    for title, entries in groups.items():
        group = dataclasses.make_dataclass(title.capitalize(), entries, frozen=True)
        group.__doc__ = None
        parts.append((title, group, dataclasses.field(default_factory=group)))
    return dataclasses.make_dataclass(kind.__name__, parts, frozen=True)


def main(kind: type[T], action: Callable[[T], object], argv: Sequence[str] | None = None) -> NoReturn:
    """Parse, act, and end: with one line on stderr and code 2 for a user's mistake, 1 for whatever else went wrong.

    With 128 + its number for a signal, also with one line. Otherwise with the code that `action` returns, or 0.
    """
    with read_to_the_end():
        _main(kind, action, argv)


def _main(kind: type[T], action: Callable[[T], object], argv: Sequence[str] | None) -> NoReturn:
    args = None
    try:
        with heard(), with_peers():
            words = sys.argv[1:] if argv is None else argv
            args = (
                parse(kind, words)
                if issubclass(kind, CommonArgs)
                else tyro.cli(kind, prog=_program(), args=spelled(kind, words))
            )
            if missing := getattr(args, "missing", None):
                raise InputError(missing)
            if not isinstance(args, ReportArgs):
                first = "torch" not in sys.modules and os.environ.get("RANK", "0") == "0"
                if first:
                    print(f"{_program()}: importing torch and transformers, which takes some seconds", flush=True)
                with waiting("importing", first):
                    _import_quietly()
            outcome = action(args)
            _leave_process_group()
    except (InputError, NonFiniteError, PeerError, WriteError) as error:
        _say_once(str(error))
        sys.exit(2 if isinstance(error, InputError) else 1)
    except Stopped as stop:
        if not stop.agreed or _leave_process_group():
            print(stop, file=sys.stderr)
        sys.exit(128 + stop.signum)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and unread():
            raise
        folder = vars(error).get("output_folder", getattr(args, "output_dir", None))
        _say_once(unforeseen(error, Path(folder).expanduser() if folder else None, getattr(args, "texts", True)))
        sys.exit(1)
    sys.exit(outcome if isinstance(outcome, int) else 0)


def _import_quietly() -> None:
    """Import what takes seconds, and hide what libraries warn of, which nobody can act on here: what matters is ours to say.

    Who asks Python or a library for its warnings gets them.
    """
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    for name in ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY", "HF_HUB_VERBOSITY", "TORCH_CPP_LOG_LEVEL"):
        os.environ.setdefault(name, "ERROR" if name.startswith("TORCH") else "error")
    # the second warns of a kernel for weights in 4 bits on a CPU, where nothing here holds them with bitsandbytes
    for name in ("accelerate", "bitsandbytes.backends.cpu.ops"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)  # it sets its level itself
    for name in ("torch", "transformers", "accelerate"):
        importlib.import_module(name)


def unforeseen(error: Exception, folder: Path | None, texts: bool = True) -> str:
    """Put an error that nobody foresaw into one line, and its traceback into a file that the line names.

    It lies in `folder` if that is there, else where temporary files do; each process of a launch has its own. Without `texts`
    it says where the error was and of which kind, and not what it said, which may be a text.
    """
    where = ["Traceback (most recent call last):\n", *traceback.format_tb(error.__traceback__), type(error).__name__ + "\n"]
    if type(error).__name__ == "OutOfMemoryError":
        return f"{reason(error)}; give a smaller --batch-size or --eval-batch-size, or see what `dualoptim plan` advises"
    text = "".join(traceback.format_exception(error) if texts else where)
    rank = os.environ.get("RANK")
    name = time.strftime("traceback-%Y%m%d-%H%M%S") + (f"-{rank}" if rank else "") + f"-{os.getpid()}.txt"
    for place in (folder, Path(tempfile.gettempdir())):
        with contextlib.suppress(OSError):
            if place is not None and place.is_dir():
                (place / name).write_text(text, encoding="utf-8", errors="backslashreplace")
                return f"{type(error).__name__}: {reason(error)}; nobody foresaw this, please report it with {place / name}"
    print(text, file=sys.stderr)
    return f"{type(error).__name__}: {reason(error)}; nobody foresaw this, please report it with the lines above"


def _say_once(line: str) -> None:
    """Print an error, of those of a launch's processes the first alone."""
    first, torch = True, sys.modules.get("torch")
    with contextlib.suppress(Exception):  # a launch that is at its end may be unable to tell
        if torch and torch.distributed.is_initialized():
            first = torch.distributed.distributed_c10d._get_default_store().add("dualoptim/error", 1) == 1
    if first:
        print(f"error: {line}".encode(errors="backslashreplace").decode(), file=sys.stderr, flush=True)


def _program() -> str:
    """The command as `--help` names it: without the folder that it lies in."""
    return Path(sys.argv[0]).name


def _leave_process_group() -> bool:
    """End a launch cleanly: a process that leaves while others still talk to it aborts them now and then.

    Tells whether this is the main process, which speaks for all.
    """
    accelerate = sys.modules.get("accelerate")  # a command that has not imported it has no processes to leave
    if accelerate and accelerate.PartialState._shared_state:
        state = accelerate.PartialState()
        main_process = state.is_main_process
        state.wait_for_everyone()
        state.destroy_process_group()
        return main_process
    return True
