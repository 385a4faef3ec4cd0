"""What a server asks of the C library, where it can: fewer heaps, and to let other threads go first."""

import contextlib
import ctypes
from collections.abc import Callable

_M_ARENA_MAX, _M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -8, -3, -1
ARENAS = 1
"""Heaps that threads share. By default glibc gives nearly every worker its own, and each keeps what it once needed: a
hundred reloads under load left 4 to 7 MiB behind, with one heap 3. With two, the second still grew in a soak."""

LARGE_BYTES, SPARE_BYTES = 128 * 1024, 2 * 2**20
"""What is larger has pages of its own, which go back when it is freed: by default, glibc takes it from the heaps once
it has freed a larger one, and what is left between long-lived small blocks grows. And how much of a heap's end is kept
for the next call."""


def share_heaps() -> None:
    """Where the allocator is glibc's; nothing elsewhere. Before threads are made."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in (
            (_M_ARENA_MAX, ARENAS), (_M_MMAP_THRESHOLD, LARGE_BYTES), (_M_TRIM_THRESHOLD, SPARE_BYTES)
        ):  # fmt: skip
            mallopt(option, value)


def _sched_yield(library: type[ctypes.CDLL]) -> Callable[[], object]:
    try:
        return library(None).sched_yield
    except (AttributeError, OSError, TypeError):
        return lambda: None


offer_core = _sched_yield(ctypes.PyDLL)
"""Let threads run that wait for a core, and not for the interpreter: it is kept. A microsecond if there are none."""
offer_interpreter = _sched_yield(ctypes.CDLL)
"""Let threads run that wait for a core or for the interpreter. `time.sleep(0)` would do, but takes 84 microseconds, and
whether `os.sched_yield` keeps the interpreter depends on Python's version."""
