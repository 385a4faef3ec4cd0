"""The flight recorder: what the server was shown and what it said, written by a thread of its own.

A call hands its messages over and goes on; when the thread cannot keep up, or the disk is full, messages are dropped
and counted, and acting never waits.
"""

import contextlib
import logging
import re
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple, Protocol

from google.protobuf.message import Message

from protos.equiserve.v1 import policy_pb2 as pb
from serving.envelope import Limits
from serving.errors import StartupError
from serving.flight import SUFFIX, FlightFile, age_order, is_under_way, recorded

log = logging.getLogger(__name__)

WAITING_BYTES, ITEM_BYTES = 32 * 2**20, 1024
"""Between the calls and the disk: 500 frames of 128 x 128, some seconds of a stalled disk. And what a message takes
besides its own bytes."""
FILE_MESSAGES = 4096
"""In one file, whatever their size: its index grows by 0.5 KiB a message and is in memory until the file is closed."""
FEWEST_FILES = 4
"""Of a full folder: with one, each new file would take the place of all that was recorded before."""
TRY_AGAIN_S = 1.0
GATHER_S = 0.02
"""How often the thread looks for messages. To be woken by each would cost the call that wakes it."""
QUIET = 100
"""After having looked in vain so often, it waits to be woken after all: an idle server does nothing."""

_STAMP = "%Y%m%dT%H%M%S%f"
_NAME = re.compile(rf"(\d{{8}}T\d{{12}})-(\d{{5,}}){re.escape(SUFFIX)}")


class Acting(Protocol):
    """A policy, as far as a recording tells of it."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    def info(self) -> pb.PolicyInfo:
        """Contract, provenance and proofs."""
        ...


class _Item(NamedTuple):
    kind: type[Message]
    fields: dict[str, Message | str]
    policy: Acting | None
    time_ns: int
    size: int


def require_folder(folder: Path, *, make: bool = True) -> None:
    """Make it where it is missing, or see whether it could be. Raises StartupError where nothing can be written."""
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise StartupError(f"--record {folder}: {error.strerror}") from error


class Recorder:
    """Writes into `folder`, a new file after `file_bytes` or FILE_MESSAGES; the oldest go when there would be more than
    `total_bytes`.

    A file ends with the message that fills it, so it is larger by a part of that one. There are FEWEST_FILES at
    least: they are filled sooner where `total_bytes` is small.

    Args:
        limits: what the server keeps policies within.

    Raises:
        StartupError: when the folder cannot be written.
    """

    def __init__(self, folder: Path, file_bytes: int, total_bytes: int, limits: Limits) -> None:
        self._folder, self._limits = folder, recorded(limits)
        self._file_bytes, self._total_bytes = min(file_bytes, total_bytes // FEWEST_FILES), total_bytes
        self.recorded = self.dropped = 0
        self._queue: SimpleQueue[_Item | None] = SimpleQueue()
        self._waiting_bytes = 0
        self._counting, self._closing = threading.Lock(), threading.Event()
        self._file: FlightFile | None = None
        self._blocked_until, self._failing = 0.0, False
        self._described: set[tuple[str, str]] = set()
        require_folder(folder)
        self._thread = threading.Thread(target=self._write_all, name="recorder", daemon=True)
        self._thread.start()

    def put(
        self,
        kind: type[Message],
        policy: Acting | None = None,
        *,
        size_bytes: int | None = None,
        **fields: Message | str,
    ) -> None:
        """Hand over what makes a message of `kind`; none of it may change any more.

        Args:
            policy: what acts there. A file describes it before its first message, so that it can be read alone.
            size_bytes: about what the fields take, where that is known: protobuf serialises them to say so.

        The thread puts it together: to copy a frame takes 20 us, which a call would wait for.
        """
        if size_bytes is None:
            size_bytes = sum(f.ByteSize() if isinstance(f, Message) else len(f) for f in fields.values())
        size = size_bytes + ITEM_BYTES
        with self._counting:
            if self._closing.is_set() or self._waiting_bytes + size > WAITING_BYTES:
                self.dropped += 1
                return
            self._waiting_bytes += size
            self._queue.put(_Item(kind, fields, policy, time.time_ns(), size))

    def close(self, patience_s: float = 5.0) -> None:
        """Write what waits, and the file's index. What comes later is dropped."""
        with self._counting:
            if self._closing.is_set():
                return
            self._closing.set()
            self._queue.put(None)
        self._thread.join(patience_s)
        if self._thread.is_alive():
            log.error("recorder: the disk did not keep up; the last messages are lost")

    def _write_all(self) -> None:
        while (item := self._next()) is not None:
            try:
                self._write(item)
                self.recorded += 1
                self._say(None)
            except Exception as error:  # the disk's, as a rule; whatever it is, the next message may be fine
                self._close()
                with self._counting:
                    self.dropped += 1
                self._say(error)
            finally:
                with self._counting:
                    self._waiting_bytes -= item.size
        self._close()

    def _next(self) -> _Item | None:
        for _ in range(QUIET):
            if not self._queue.empty() or self._closing.wait(GATHER_S):
                break
        return self._queue.get()

    def _say(self, error: Exception | None) -> None:
        """Once when it begins to fail, and once when it has ended: a full disk may stay so for days."""
        if error is not None and not self._failing:
            log.error("recorder: cannot write, dropping what comes, trying again each %g s: %s", TRY_AGAIN_S, error)
        elif error is None and self._failing:
            log.warning("recorder: writes again; %d messages have been dropped", self.dropped)
        self._failing = error is not None

    def _write(self, item: _Item) -> None:
        policy, time_ns = item.policy, item.time_ns
        if self._file is None:
            if time.monotonic() < self._blocked_until:
                raise OSError("waiting for room")
            self._blocked_until = time.monotonic() + TRY_AGAIN_S
            self._file = self._open(time_ns)
        if policy is not None and (policy.name, policy.version) not in self._described:
            self._file.write(pb.FlightPolicy(policy=policy.info(), limits=self._limits), time_ns)
            self._described.add((policy.name, policy.version))
        size = self._file.write(item.kind(**item.fields), time_ns)
        self._blocked_until = 0.0
        if size >= self._file_bytes or self._file.messages >= FILE_MESSAGES:
            self._close()

    def _open(self, time_ns: int) -> FlightFile:
        self._make_room()
        self._described = set()
        stamp, number = datetime.fromtimestamp(time_ns / 1e9, UTC).strftime(_STAMP), 1
        if files := self._files():
            # Names are in the order of the files, on which their lives depend, although a clock may be set back.
            newest, _, count = files[-1].name.removesuffix(SUFFIX).partition("-")
            stamp, number = max(stamp, newest), int(count) + 1
        return FlightFile(self._folder / f"{stamp}-{number:05d}{SUFFIX}")

    def _make_room(self) -> None:
        sizes = dict[Path, int]()
        for file in self._files():
            with contextlib.suppress(FileNotFoundError):  # another server may make room at the same moment
                sizes[file] = file.stat().st_size
        for file in list(sizes):
            if sum(sizes.values()) + self._file_bytes <= self._total_bytes:
                break
            if not is_under_way(file):  # by another server, whose messages would go nowhere
                file.unlink(missing_ok=True)
                del sizes[file]

    def _files(self) -> list[Path]:
        """Oldest first; others' files are neither counted nor removed."""
        return sorted((f for f in self._folder.glob(f"*{SUFFIX}") if _NAME.fullmatch(f.name)), key=age_order)

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except Exception as error:
                log.error("recorder: the index could not be written; the messages before are whole: %s", error)
