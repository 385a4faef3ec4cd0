"""Signals, heard by a thread that does nothing else.

Python runs a signal's handler in the main thread, between two of its steps. A main thread that waits hears nothing of a
signal that another thread was given, or that came just before it fell asleep: one server in a hundred would not stop.
And where a handler does run, it may be in the middle of what holds the lock that it wants.
"""

import logging
import signal
import socket
import threading
from collections.abc import Callable, Mapping

log = logging.getLogger(__name__)
STOPS = (signal.SIGTERM, signal.SIGINT)


def listen(actions: Mapping[signal.Signals, Callable[[], None]]) -> None:
    """From now on, call an action in another thread whenever its signal comes. To be called by the main thread, once.

    Where a first SIGTERM or SIGINT has woken the main thread, a second of them ends the process.
    """
    heard, told = socket.socketpair()
    told.setblocking(False)
    signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)  # written by C, whichever thread is given the signal
    for signum in actions:
        signal.signal(signum, _next_time_at_once if signum in STOPS else _leave_it_to_the_thread)
    threading.Thread(target=_obey, args=(heard, told, actions), name="signals", daemon=True).start()


def _obey(heard: socket.socket, told: socket.socket, actions: Mapping[signal.Signals, Callable[[], None]]) -> None:
    while numbers := heard.recv(64):
        for signum, action in actions.items():
            if signum in numbers:
                try:
                    action()
                except Exception:  # the next signal must be heard, whatever this one failed at
                    log.exception("%s: not all of it could be done", signum.name)
    told.close()


def _next_time_at_once(_signum: int, _frame: object) -> None:
    for signum in STOPS:
        signal.signal(signum, signal.SIG_DFL)


def _leave_it_to_the_thread(_signum: int, _frame: object) -> None:
    """A signal without any handler would not be told of."""
