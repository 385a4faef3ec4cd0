"""Files that are either whole or absent: what the four packages write goes through here."""

import errno
import glob
import os
import tempfile
from pathlib import Path


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
    if path.exists() and not path.is_file():
        raise FileExistsError(errno.EEXIST, "is no file, and would be replaced by one", str(path))
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


def remove_unfinished(path: Path) -> None:
    """What processes that were killed while they wrote `path` have left. Nobody may be writing it now."""
    path = _led_to(path)
    for scratch in path.parent.glob(f".{glob.escape(path.name)}.????????"):
        scratch.unlink(missing_ok=True)


def _led_to(path: Path) -> Path:
    """By symbolic links; of a loop of them, one of it."""
    return Path(os.path.realpath(path))
