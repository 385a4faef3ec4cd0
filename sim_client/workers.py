"""Episodes by number: recorded by several processes, kept on disk until all are there, the same however many record."""

import io
import json
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import shutil
import signal
import threading
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from protos.files import write_atomically
from sim_client.episodes import Episode


class Record(Protocol):
    """Runs the episode of this number."""

    def __call__(self, index: int) -> Episode: ...

    def close(self) -> None:
        """Let go of what it runs them in."""


_record: Record | None = None  # of this worker process


class Partial:
    """The episodes of a collection that is not finished: one file each, next to where the dataset will be."""

    def __init__(self, output: Path, request: dict[str, Any]) -> None:
        """Open, or start, what an earlier run with the same `request` left.

        Raises:
            FileExistsError: what was left was asked for differently.
        """
        self.folder = self.folder_of(output)
        shutil.rmtree(self._done, ignore_errors=True)  # of a removal that was interrupted
        asked, ours = self.folder / "request.json", json.dumps(request, sort_keys=True, indent=2)
        if self.left_of(output) and asked.exists() and asked.read_text() != ours:
            try:
                before = dict(json.loads(asked.read_text()))
            except (ValueError, TypeError) as error:
                raise FileExistsError(f"{asked} is damaged ({error}): remove the folder") from error
            differ = sorted(k for k in before.keys() | request.keys() if before.get(k) != request.get(k))
            raise FileExistsError(
                f"{self.folder} holds an interrupted collection that differs in {', '.join(differ)}: "
                f"finish that one with its own settings, or remove the folder"
            )
        if not asked.exists() and any(self.folder.glob("*.npz")):
            raise FileExistsError(f"{self.folder} holds episodes, and nothing says of what: remove the folder")
        write_atomically(asked, ours.encode())

    @staticmethod
    def folder_of(output: Path) -> Path:
        return output.with_name(f".{output.name}.partial")

    @staticmethod
    def left_of(output: Path) -> bool:
        """Whether the same command would find something, of its calibration at least, that need not be run again."""
        names = (name for _, _, names in os.walk(Partial.folder_of(output)) for name in names)
        return any(name.endswith((".npz", "calibration.json")) for name in names)

    @property
    def _done(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.done")

    def path(self, index: int) -> Path:
        return self.folder / f"{index:07d}.npz"

    def load(self, index: int) -> Episode:
        path = self.path(index)
        try:
            with np.load(path, allow_pickle=False) as file:
                values = {name: file[name] for name in file.files}
            return Episode(**{name: value if value.ndim else value.item() for name, value in values.items()})
        except (ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is damaged ({error}): remove it, and it is recorded again") from error

    def reject(self, index: int, episode: Episode) -> None:
        """Keep no more of a failure than that it was one: of a rare success's there may be thousands, of 3 MB each."""
        save(
            self.path(index),
            replace(
                episode,
                depth=episode.depth[:0],
                gripper=episode.gripper[:0],
                action=episode.action[:0],
                reward=np.zeros(1, np.float32),
                rgb=None,
            ),
        )

    def remove(self) -> None:
        self.folder.rename(self._done)  # at once: a part of them would be taken for an interrupted collection's
        shutil.rmtree(self._done)


def save(path: Path, episode: Episode) -> None:
    """Write one episode, whole or not at all."""
    values = {name: value for name, value in vars(episode).items() if value is not None}
    buffer = io.BytesIO()
    np.savez(buffer, **values)
    write_atomically(path, buffer.getvalue())


def episodes(partial: Partial, make: Callable[[], Record], workers: int) -> Iterator[Episode]:
    """Episodes 0, 1, 2, ... without end, in order; those on disk are not run again.

    `make` builds a worker's recorder, once per process; it must be picklable when there are several workers.
    """
    if workers == 1:
        record: Record | None = None
        index = 0
        try:
            while True:
                if not partial.path(index).exists():
                    record = record or make()
                    save(partial.path(index), record(index))
                yield partial.load(index)
                index += 1
        finally:
            if record:
                record.close()
    else:
        yield from _parallel(partial, make, workers)


def _parallel(partial: Partial, make: Callable[[], Record], workers: int) -> Iterator[Episode]:
    # spawn: a forked child would share the parent's physics clients
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(make,))
    try:
        ahead: list[Future[None]] = []
        index = 0
        while True:
            while len(ahead) < 2 * workers:  # enough that nobody waits, little enough that little is run in vain
                with _interrupts_held_back():
                    ahead.append(pool.submit(_run, partial.path(index + len(ahead))))
            ahead.pop(0).result()
            yield partial.load(index)
            index += 1
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """What is started meanwhile never hears of Ctrl-C, and finishes its episode: a terminal tells all of its processes,
    and one that is still importing would answer with a traceback."""
    multiprocessing.resource_tracker.ensure_running()  # or it is started below, and lets interrupts through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start(make: Callable[[], Record]) -> None:
    global _record
    end_with_the_parent()
    _record = make()


def end_with_the_parent() -> None:
    """A worker holds both ends of the queue that it waits at, and would not see that nobody is left to fill it."""
    threading.Thread(target=_wait_for_its_end, daemon=True).start()


def _wait_for_its_end() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _run(path: Path) -> None:
    assert _record is not None  # `_start` ran first
    if not path.exists():
        save(path, _record(int(path.stem)))
