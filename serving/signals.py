"""Signals, heard by a thread that does nothing else.

Python runs a signal's handler in the main thread, between two of its steps. A main thread that waits hears nothing of a
signal that another thread was given, or that came just before it fell asleep: one server in a hundred would not stop.
And where a handler does run, it may be in the middle of what holds the lock that it wants.
"""

import signal
import socket
import threading
from collections.abc import Mapping

STOPS = (signal.SIGTERM, signal.SIGINT)


def listen(events: Mapping[signal.Signals, threading.Event]) -> None:
    """From now on, set an event whenever its signal comes. To be called by the main thread, once.

    Where a first SIGTERM or SIGINT has woken the main thread, a second of them ends the process.
    """
    heard, told = socket.socketpair()
    told.setblocking(False)
    signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)  # written by C, whichever thread is given the signal
    for signum in events:
        signal.signal(signum, _next_time_at_once if signum in STOPS else _leave_it_to_the_thread)
    threading.Thread(target=_obey, args=(heard, told, events), name="signals", daemon=True).start()


def _obey(heard: socket.socket, _told: socket.socket, events: Mapping[signal.Signals, threading.Event]) -> None:
    """`_told` is the other end, which lives as long as this thread does."""
    while True:
        numbers = heard.recv(64)
        for signum, event in events.items():
            if signum in numbers:
                event.set()


def _next_time_at_once(_signum: int, _frame: object) -> None:
    for signum in STOPS:
        signal.signal(signum, signal.SIG_DFL)


def _leave_it_to_the_thread(_signum: int, _frame: object) -> None:
    """A signal without any handler would not be told of."""
