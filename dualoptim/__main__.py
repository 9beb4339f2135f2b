"""The command `dualoptim`, also `python -m dualoptim`: one word for what to do, then its flags."""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from dualoptim.errors import InputError, read_to_the_end

Place = tuple[str, str]
"""A module of the package and a name in it, which is imported when it is needed: help is quick, torch is not."""


class Command(NamedTuple):
    """The flags that a command takes, what it runs, and what it is for."""

    args: Place
    action: Place
    about: str


COMMANDS = {
    "unlearn": Command(("config.args", "UnlearnArgs"), ("unlearn", "command"), "make a model forget some rows and keep others"),
    "eval": Command(("config.args", "EvalArgs"), ("evaluate", "command"), "measure what a model knows, and attack it"),
    "finetune": Command(("config.args", "FinetuneArgs"), ("finetune", "finetune"), "teach a model rows"),
    "sweep": Command(("config.args", "SweepArgs"), ("sweep", "command"), "unlearn with many settings, and compare them"),
    "ask": Command(("config.args", "AskArgs"), ("ask", "ask"), "ask a model questions, before and after side by side"),
    "report": Command(("config.args", "ReportArgs"), ("report", "report"), "describe and compare what runs have left"),
    "export": Command(("config.args", "ExportArgs"), ("export", "export"), "merge an adapter, or write a .gguf file to serve"),
    "plan": Command(("config.args", "UnlearnArgs"), ("memory_plan", "dry_run"), "say what unlearning would take in memory"),
}


def main() -> NoReturn:
    """Run the command that is named first, with the flags behind it."""
    word, flags = (sys.argv[1:] or ["--help"])[0], sys.argv[2:]
    if word in COMMANDS:
        sys.argv = [f"dualoptim {word}", *flags]
        start(COMMANDS[word])
    with read_to_the_end():
        try:
            print(_usage() if word in ("-h", "--help") else _launch_file(word, flags))
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
    sys.exit(0)


def start(command: Command) -> NoReturn:
    """Parse the flags of a command and run it."""
    from dualoptim.config import cli

    cli.main(_imported(command.args), lambda args: _imported(command.action)(args))


def _imported(place: Place) -> Any:
    module, name = place
    return getattr(import_module(f"dualoptim.{module}"), name)


def _usage() -> str:
    lines = [f"  {word:<12}  {command.about}" for word, command in COMMANDS.items()]
    names = ", ".join(_launch_files())
    lines.append(f"  {'launch-file':<12}  print the path of a file for accelerate launch --config_file: {names}")
    head, foot = "usage: dualoptim COMMAND [flags], with COMMAND one of", "dualoptim COMMAND --help lists its flags"
    return "\n".join([head, *lines, foot])


def _launch_files() -> dict[str, Path]:
    """The files of accelerate_configs by name, as they lie in an installed package or in a checkout."""
    installed, checkout = Path(__file__).parent / "launch_files", Path(__file__).parents[1] / "accelerate_configs"
    return {path.stem: path for path in sorted((installed if installed.is_dir() else checkout).glob("*.yaml"))}


def _launch_file(word: str, names: list[str]) -> str:
    """The path of the launch file that is named.

    Raises:
        InputError: if there is no such command or file.
    """
    if word != "launch-file":
        flag = "; flags stand behind a command, as in dualoptim unlearn --preset" if word.startswith("-") else ""
        raise InputError(f"{word!r} is no command{flag}; give one of {', '.join(COMMANDS)}, launch-file")
    files = _launch_files()
    if len(names) != 1 or names[0] not in files:
        raise InputError(f"launch-file {' '.join(names)}".strip() + f": give one of {', '.join(files)}")
    return str(files[names[0]])


if __name__ == "__main__":
    main()
