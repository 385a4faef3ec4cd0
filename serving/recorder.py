"""The flight recorder: what the server was shown and what it said, written by a thread of its own.

A call hands its messages over and goes on; when the thread cannot keep up, or the disk is full, messages are dropped
and counted, and acting never waits.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path

from google.protobuf.message import Message

from protos.equiserve.v1 import policy_pb2 as pb
from serving.errors import StartupError
from serving.flight import SUFFIX, FlightFile

log = logging.getLogger(__name__)

WAITING = 512
"""Messages between a call and the disk: 32 MiB of frames, some seconds of a stalled disk."""
TRY_AGAIN_S = 1.0


class Recorder:
    """Writes into `folder`, a new file after `file_bytes`, at most `total_bytes` of them.

    Args:
        live: the policies that act, for the beginning of each file.

    Raises:
        StartupError: when the folder cannot be written.
    """

    def __init__(
        self, folder: Path, file_bytes: int, total_bytes: int, live: Callable[[], Iterable[pb.PolicyInfo]]
    ) -> None:
        self._folder, self._file_bytes, self._total_bytes, self._live = folder, file_bytes, total_bytes, live
        self.recorded = self.dropped = 0
        self._queue: queue.Queue[tuple[Message, int] | None] = queue.Queue(WAITING)
        self._file: FlightFile | None = None
        self._size, self._opened, self._blocked_until = 0, 0, 0.0
        self._known: set[tuple[str, str]] = set()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise StartupError(f"--record {folder}: {error.strerror}") from error
        self._thread = threading.Thread(target=self._write_all, name="recorder", daemon=True)
        self._thread.start()

    def put(self, message: Message) -> None:
        """Hand over; the message must not change any more."""
        try:
            self._queue.put_nowait((message, time.time_ns()))
        except queue.Full:
            self.dropped += 1

    def close(self, patience_s: float = 5.0) -> None:
        """Write what waits, and the file's index."""
        try:
            self._queue.put(None, timeout=patience_s)
        except queue.Full:
            log.error("recorder: the disk did not keep up; the last messages are lost")
        self._thread.join(patience_s)

    def _write_all(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                self._write(*item)
                self.recorded += 1
            except OSError as error:
                self.dropped += 1
                if time.monotonic() >= self._blocked_until:
                    log.error("recorder: cannot write, dropping: %s", error)
                    self._blocked_until = time.monotonic() + TRY_AGAIN_S
                self._close()
        self._close()

    def _write(self, message: Message, time_ns: int) -> None:
        if self._file is None:
            if time.monotonic() < self._blocked_until:
                raise OSError("waiting for room")
            self._open(time_ns)
        assert self._file is not None
        if isinstance(message, pb.FlightAction):
            self._describe(message.response.policy, message.response.version, time_ns)
        self._size = self._file.write(message, time_ns)
        if self._size >= self._file_bytes:
            self._close()

    def _open(self, time_ns: int) -> None:
        self._make_room()
        self._opened += 1
        stamp = datetime.fromtimestamp(time_ns / 1e9, UTC).strftime("%Y%m%dT%H%M%S%f")
        self._file, self._known = FlightFile(self._folder / f"{stamp}-{self._opened:05d}{SUFFIX}"), set()

    def _describe(self, name: str, version: str, time_ns: int) -> None:
        """Once a file: contract and provenance of what acts, so that the file can be read alone."""
        if (name, version) in self._known or self._file is None:
            return
        for info in self._live():
            if (info.name, info.version) == (name, version):
                self._file.write(pb.FlightPolicy(policy=info), time_ns)
                self._known.add((name, version))

    def _make_room(self) -> None:
        files = sorted(self._folder.glob(f"*{SUFFIX}"))
        sizes = [file.stat().st_size for file in files]
        while files and sum(sizes) + self._file_bytes > self._total_bytes:
            files.pop(0).unlink(missing_ok=True)
            sizes.pop(0)

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError as error:
                log.error("recorder: the index could not be written; the messages before are whole: %s", error)
