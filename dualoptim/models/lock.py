"""Keep an output folder for one run at a time, and say in one line when it takes nothing more."""

import contextlib
import errno
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

from accelerate import Accelerator

from dualoptim.atomic import LOCK, NO_ROOM
from dualoptim.errors import InputError, Stopped, WriteError
from dualoptim.models.launch import decided

try:
    import fcntl
except ImportError:  # Windows, where a run has to see for itself that it is alone
    fcntl = None  # type: ignore[assignment]

_REMEDIES = {errno.ENOSPC: "make room", errno.EDQUOT: "make room", errno.ENOENT: "put it back"}


@contextlib.contextmanager
def kept_for_one_run(folder: Path, accelerator: Accelerator, how: str) -> Iterator[None]:
    """Hold an output folder, which is made if there is none; a run that is refused leaves it, or that there is none, as it was.

    The main process holds a lock of the operating system's: it ends with that process, however it ends, and not with whoever
    launched it. `how` is the command that goes on, after a signal or once a full disk has room again.

    Raises:
        InputError: if another run holds the folder, or it cannot be written to.
        WriteError: in place of what is raised inside when the folder takes nothing more.
        Stopped: as inside, with `how` once the run has written anything.
    """
    lock = _Lock(folder)
    decided(accelerator, lock.take)
    refused = False
    try:
        yield
    except InputError:
        refused = True
        raise
    except (Stopped, WriteError) as end:
        if isinstance(end, WriteError) or _begun(folder):  # else the command that was given begins as well
            end.how = how
        raise
    except Exception as error:
        if what := _failed_write(error, folder):
            raise WriteError(what, how) from error
        vars(error).setdefault("output_folder", folder)  # where a command puts the traceback
        raise
    finally:
        lock.release(refused)


def holder(folder: Path) -> str:
    """Say which process holds a folder; nothing if none does, or this one."""
    if fcntl is None:
        return ""
    try:
        file = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return ""
    try:
        who = _who_else(file)
    finally:
        os.close(file)
    return "" if who == _this_process() else who


def check_free(folder: Path) -> None:
    """Make sure that no other run holds a folder.

    Raises:
        InputError: naming the one that does.
    """
    if who := holder(folder):
        raise _held(folder, who)


def _held(folder: Path, who: str) -> InputError:
    """What is said of a folder that another run holds."""
    return InputError(f"--output-dir: {folder} is being written by {who}; wait for its end, or give another folder")


class _Lock:
    """The lock of one folder, which need not be there yet."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._path = folder, folder / LOCK
        self._file: int | None = None
        self._made: list[Path] = []  # the innermost first
        self._times: tuple[int, int] | None = None  # of the folder, if it was there

    def take(self) -> None:
        """Take the lock.

        Raises:
            InputError: if another run has it, or the folder cannot be written to.
        """
        folder = self._folder
        if re.fullmatch(r"task\d+", folder.name):
            check_free(folder.parent.parent)  # whose run writes here as well
        try:
            if folder.is_dir():
                self._times = (folder.stat().st_atime_ns, folder.stat().st_mtime_ns)
            for place in (folder, *folder.parents):
                if place.exists() and not place.is_dir():
                    raise InputError(f"--output-dir: {place} is a file; give another folder")
                self._made += [] if place.exists() else [place]
            while self._file is None:
                folder.mkdir(parents=True, exist_ok=True)
                if fcntl is None:
                    return
                self._file = self._opened()
            os.truncate(self._file, 0)
            os.write(self._file, _this_process().encode())
        except (OSError, InputError) as error:
            self.release(refused=True)
            if isinstance(error, InputError):
                raise
            name = error.filename if isinstance(error.filename, str) else folder
            raise InputError(f"--output-dir: {name} cannot be written ({error.strerror}); give another folder") from None

    def _opened(self) -> int | None:
        """The open and locked file; None if it was removed meanwhile, by the run that held it."""
        try:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:
            return None
        if who := _who_else(file):
            os.close(file)
            raise _held(self._folder, who)
        if self._is_there(file):
            return file
        os.close(file)
        return None

    def _is_there(self, file: int) -> bool:
        with contextlib.suppress(OSError):
            return os.path.samestat(os.fstat(file), os.stat(self._path, follow_symlinks=False))
        return False

    def release(self, refused: bool) -> None:
        """Give the lock back, if this process has it; after a refusal nothing tells that it was there."""
        if self._file is not None:
            if self._is_there(self._file):  # else the folder has been removed, and may be another run's by now
                os.unlink(self._path)
            os.close(self._file)
            self._file = None
        for place in self._made:
            with contextlib.suppress(OSError):  # it is not empty
                place.rmdir()
        if refused and self._times:
            with contextlib.suppress(OSError):
                os.utime(self._folder, ns=self._times)


def _who_else(file: int) -> str:
    """Lock an open file, or say which process has done so."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.pread(file, 200, 0).decode(errors="replace") or "another run"
    except OSError:
        pass  # a file system without locks: that a second run may come is no reason to have none
    return ""


def _this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _begun(folder: Path) -> bool:
    """Tell whether a run has written anything since it took the lock; where there is none, that it may have."""
    with contextlib.suppress(OSError):
        taken = (folder / LOCK).stat().st_mtime_ns
        return any(path.name != LOCK and path.lstat().st_mtime_ns > taken for path in folder.rglob("*"))
    return True


def _failed_write(error: BaseException, folder: Path) -> str:
    """Tell of a write that failed where and why it did and what to do about it; nothing of another error."""
    found: BaseException | None = error
    while found is not None:
        number, name = _error_number(found), getattr(found, "filename", None)
        inside = isinstance(name, (str, os.PathLike)) and folder.absolute() in Path(name).absolute().parents
        nameless = number == errno.EIO and name is None
        # the other files that were looked for in vain on the way to an error explain nothing
        if number in NO_ROOM or nameless or (inside and found is error):
            remedy = _REMEDIES.get(number, "mend that")
            return f"{name or folder} cannot be written ({os.strerror(number)}); {_newest_checkpoint(folder)}{remedy}"
        found = found.__cause__ or found.__context__
    return ""


def _error_number(error: BaseException) -> int:
    """Find the system's number of an error, which libraries of other languages put into their words; 0 if there is none."""
    if isinstance(error, OSError):
        return error.errno or 0
    told = re.search(r"\(os error (\d+)\)|\[Errno (\d+)\]", str(error))
    return int(told[1] or told[2]) if told else 0


def _newest_checkpoint(folder: Path) -> str:
    found = sorted(folder.rglob("checkpoint/step-*/state.json"), key=lambda path: path.stat().st_mtime_ns)
    return f"the newest checkpoint is {found[-1].parent}; " if found else ""
