"""What a server asks of the C library, where it can: fewer heaps, and to let other threads go first."""

import contextlib
import ctypes
from collections.abc import Callable

_M_ARENA_MAX = -8
ARENAS = 2
"""Heaps that threads share. By default glibc gives nearly every worker its own, and each keeps what it once needed: a
hundred reloads under load left 4 to 7 MiB behind, with two heaps 3."""


def share_heaps() -> None:
    """Where the allocator is glibc's; nothing elsewhere. Before threads are made."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, ARENAS)


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
