"""Files that are either whole or absent: what the four packages write goes through here."""

import contextlib
import errno
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

LOCK = ".being-written"
"""In the folder that `whole` writes in, locked for as long as somebody does."""
SPARE_BYTES = 32 * 2**20
"""Room on a disk that is for others: an index, a worker's next episode, what else is written meanwhile."""


def write_atomically(path: Path, data: bytes, *, mode: int = 0o644, owner: tuple[int, int] | None = None) -> None:
    """Write `data` to `path`: a reader, or a process killed half-way, sees the old file or the new one, never a part.

    Args:
        mode: who may read and write it.
        owner: user and group that it belongs to; None: who writes it.

    What a symbolic link leads to is written, and the link stays.

    Raises:
        OSError: when the directory cannot be written or the disk is full; the old file, if any, is untouched. And where
            there is a device, a pipe or a folder, which could only be replaced.
    """
    _require_file(path)
    path = _led_to(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            if owner:
                os.fchown(file.fileno(), *owner)
            os.fchmod(file.fileno(), mode)  # mkstemp makes files that only their owner can read
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(scratch).replace(path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise


def require_writable(path: Path) -> None:
    """Ask before work whose result `write_atomically` shall write to `path`. Nothing is made there.

    Raises OSError, with `path` in it, where that could not be done.
    """
    try:
        _require_file(path)
        folder = _led_to(path).parent
        while not folder.exists():
            folder = folder.parent
        tempfile.TemporaryFile(dir=folder).close()  # permissions alone do not tell: root has them in /proc as well
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _require_file(path: Path) -> None:
    if path.exists() and not path.is_file():
        raise FileExistsError(errno.EEXIST, "is no file, and would be replaced by one", str(path))


def remove_unfinished(path: Path) -> None:
    """What processes that were killed while they wrote `path` have left. Nobody may be writing it now."""
    path = _led_to(path)
    for scratch in path.parent.glob(f".{glob.escape(path.name)}.????????"):
        scratch.unlink(missing_ok=True)


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A place to write a file or a directory to, which takes the name `path` once it is complete and on the disk.

    What processes that were killed while they wrote `path` have left is removed first.

    Raises:
        FileExistsError: `path` exists, or was made meanwhile.
        OSError: the disk is full, or is not ours to write on; `path` is not made.
    """
    require_absent(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    folder, prefix = path.parent.resolve(), f".{path.name}."
    for stale in folder.glob(f"{glob.escape(prefix)}????????"):
        _remove_abandoned(stale)
    with tempfile.TemporaryDirectory(dir=folder, prefix=prefix) as name, (Path(name) / "unlocked").open("wb") as lock:
        scratch = Path(name)
        with contextlib.suppress(OSError):  # where nothing can be locked, nothing is taken for abandoned
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            Path(lock.name).rename(scratch / LOCK)  # only now: under this name nobody finds it unlocked
        made = scratch / "made"
        yield made
        for written in (*made.rglob("*"), made):
            _sync(written)  # who has it elsewhere removes it there next
        require_absent(path)
        made.rename(path)
        with contextlib.suppress(OSError):  # it is there, whatever became of its name's safety
            _sync(folder)


class Taken(BlockingIOError):
    """Another process has a folder. A kind of its own: that a process cannot be started is a BlockingIOError, too."""


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep a folder for oneself, among processes that ask by this; who is killed lets go of it.

    Raises:
        Taken: another process has it.
        OSError: there is no such folder.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Taken(*error.args) from error
        except OSError:  # where nothing can be locked, nobody can be told from another
            pass
        yield
    finally:
        os.close(handle)


def require_absent(path: Path) -> None:
    """Raises FileExistsError, saying what to do, where `path` is."""
    if path.exists():
        raise FileExistsError(f"{path} exists already: choose another place or remove it first")


def _remove_abandoned(scratch: Path) -> None:
    """Not a folder that is being written, whose lock is held, nor one of somebody's whose name is like ours."""
    with contextlib.suppress(OSError), (scratch / LOCK).open("r+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(scratch)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def require_room(folder: Path, needed: int, purpose: str) -> None:
    """Ask before HDF5 writes so many bytes: where the disk fills up meanwhile, it ends the process by a segfault.

    Raises OSError (ENOSPC), saying what is needed, where there is less, with SPARE_BYTES on top.
    """
    needed += SPARE_BYTES
    if (room := shutil.disk_usage(folder).free) < needed:
        told = f"{needed / 2**20:.0f} MiB are needed to {purpose}, {room / 2**20:.0f} are free"
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {told}", str(folder))


def _led_to(path: Path) -> Path:
    """By symbolic links; of a loop of them, one of it."""
    return Path(os.path.realpath(path))
