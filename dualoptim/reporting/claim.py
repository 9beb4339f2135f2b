"""Claim an output folder: what a run is going to write there must be missing, or a result of ours that it may replace."""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from accelerate import Accelerator

from dualoptim.atomic import remove
from dualoptim.config.args import CommonArgs
from dualoptim.errors import InputError
from dualoptim.models.launch import decided
from dualoptim.models.lock import check_free
from dualoptim.reporting.ours import check_ours


def claim(args: CommonArgs, accelerator: Accelerator, targets: Iterable[Path], tables: Iterable[Path] = ()) -> None:
    """Make sure that the files and folders that this run is going to write are not there, removing them with `--overwrite`.

    With `--resume` they may be there and stay, and `tables` may always, which all runs of a folder share. Nothing else in the
    output folder is touched.

    Raises:
        InputError: if a target exists and neither was given, or anything is there that no run of ours wrote, another run
            writes to it, it holds the model or the data, or it cannot be written.
    """

    wanted = list(targets)
    check_claim(args, accelerator, wanted, tables)

    def clear() -> None:
        with _named_if_unwritable():
            for target in wanted if not getattr(args, "resume", None) else ():
                remove(target)
                target.parent.mkdir(parents=True, exist_ok=True)

    decided(accelerator, clear)


def check_claim(args: CommonArgs, accelerator: Accelerator, targets: Iterable[Path], tables: Iterable[Path] = ()) -> None:
    """Make sure that a run may write files and folders, as `claim` does, and remove none.

    Raises:
        InputError: as `claim` does.
    """

    def check() -> None:
        with _named_if_unwritable():
            for target in targets:
                _check(args, target)
            check_ours(tables)

    decided(accelerator, check)


@contextlib.contextmanager
def _named_if_unwritable() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"--output-dir: {error.filename} cannot be written ({error.strerror}); give another folder") from None


def _check(args: CommonArgs, target: Path) -> None:
    for ancestor in target.parents:
        if ancestor.exists() and not ancestor.is_dir():
            raise InputError(f"--output-dir: {ancestor} is a file; give another folder")
    given = [Path(name).expanduser() for name in (args.model, args.data or "")]
    sources = [path.resolve() for path in given if path.exists() and path.resolve() != Path.cwd()]
    if target.exists() and any(target.resolve() in (source, *source.parents) for source in sources):
        raise InputError(f"--output-dir: {target} holds the model or the data of this run; give another folder")
    check_free(target)
    check_ours([target], goes=args.overwrite)
    if target.exists() and not (args.overwrite or getattr(args, "resume", None)):
        goes_on = "; --resume goes on with what it lacks" if hasattr(args, "resume") else ""
        remedy = f"give another folder, or --overwrite to replace it{goes_on}"
        raise InputError(f"--output-dir: {target} is an earlier result; {remedy}")
