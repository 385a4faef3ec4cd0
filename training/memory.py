"""What a long-running trainer asks of the C library's allocator."""

import contextlib
import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = 2**31 - 1


def keep_freed_memory() -> None:
    """Let freed activations be used again by the next update, where the allocator is glibc's; nothing elsewhere.

    By default a large block goes back to the kernel at once, which maps and zeroes its pages anew at every update:
    a fifth of an update's time at the paper's sizes (tests/benchmarks/update_time.py).
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, _NEVER)
