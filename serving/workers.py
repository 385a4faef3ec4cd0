"""The threads that answer robots' calls. All are there from the start, and who rested last answers next.

`concurrent.futures.ThreadPoolExecutor` goes round: each call finds a thread whose stack has long left the processor's
caches. That costs a lone client half a millisecond as soon as a flood has made all of its threads (docs/serving.md,
"Who rested last").
"""

import threading
import time
from collections import deque
from concurrent.futures import Executor, Future
from typing import Any

from serving.answering import Arrival

_Task = tuple[Future[Any], Any, tuple[Any, ...], dict[str, Any], float]
"""What to do, what to tell, and when that was asked (time.perf_counter)."""


class _Rest:
    """Where a thread waits for its next task."""

    def __init__(self) -> None:
        self._task: _Task | None = None
        self._came = threading.Lock()
        self._came.acquire()

    def end(self, task: _Task | None) -> None:
        self._task = task
        self._came.release()

    def next(self) -> _Task | None:
        self._came.acquire()
        task, self._task = self._task, None
        return task


class Workers(Executor):
    """From `start` to `shutdown`, so many threads."""

    def __init__(self, count: int) -> None:
        self._resting: list[_Rest] = []
        self._line: deque[_Task] = deque()
        self._lock, self._closed = threading.Lock(), False
        self._call = threading.local()
        self._count, self._threads = count, list[threading.Thread]()

    def start(self) -> None:
        self._threads = [threading.Thread(target=self._work, name=f"call_{i}", daemon=True) for i in range(self._count)]
        for thread in self._threads:
            thread.start()

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        task = future, fn, args, kwargs, time.perf_counter()
        with self._lock:
            if self._closed:
                raise RuntimeError("these threads have been told to stop")
            if not self._resting:
                self._line.append(task)
                return future
            rest = self._resting.pop()
        rest.end(task)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Do what was asked, and end; where it is `cancel_futures`, without what waits in line."""
        with self._lock:
            self._closed = True
            resting, self._resting = self._resting, []
            left = [*self._line] if cancel_futures else []
        for future, *_ in left:
            future.cancel()
        for rest in resting:
            rest.end(None)
        for thread in self._threads if wait else ():
            thread.join()

    def ended(self, within_s: float) -> bool:
        """Whether, after `shutdown`, all threads have come to their end by then."""
        by = time.monotonic() + within_s
        for thread in self._threads:
            thread.join(max(0.0, by - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    @property
    def at_rest(self) -> bool:
        """Whether no task is under way, and none waits."""
        with self._lock:
            return not self._line and len(self._resting) == len(self._threads)

    def arrival(self) -> Arrival | None:
        """Of the call that this thread is answering."""
        return getattr(self._call, "arrival", None)

    def _work(self) -> None:
        rest = _Rest()
        while self._do(self._next(rest)):
            pass

    def _do(self, task: _Task | None) -> bool:
        """Whether there was something to do; nothing of it is kept by a thread that rests."""
        if task is None:
            return False
        future, fn, args, kwargs, submitted = task
        if not future.set_running_or_notify_cancel():
            return True
        self._call.arrival = Arrival(submitted, time.perf_counter() - submitted)
        try:
            result = fn(*args, **kwargs)
        except BaseException as error:  # whoever waits for the future is told, as by any executor
            future.set_exception(error)
        else:
            future.set_result(result)
        return True

    def _next(self, rest: _Rest) -> _Task | None:
        with self._lock:
            if self._line:
                return self._line.popleft()
            if self._closed:
                return None
            self._resting.append(rest)
        return rest.next()
