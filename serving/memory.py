"""What a server asks of the C library's allocator."""

import contextlib
import ctypes

_M_ARENA_MAX = -8
ARENAS = 2
"""Heaps that threads share. By default glibc gives nearly every worker its own, and each keeps what it once needed: a
hundred reloads under load left 4 to 7 MiB behind, with two heaps 3."""


def share_heaps() -> None:
    """Where the allocator is glibc's; nothing elsewhere. Before threads are made."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, ARENAS)
