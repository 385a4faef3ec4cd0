"""Log lines for people or machines. What a caller sent can neither end a line nor forge a field."""

import logging
import sys
import time
from typing import Literal

from pythonjsonlogger.json import JsonFormatter

TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
PER_SECOND = 20
"""Refusals beyond this are counted, not written: a flood must not fill a disk."""


def configure(style: Literal["text", "json"]) -> None:
    """Log to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    if style == "json":
        names = {"asctime": "time", "levelname": "level", "name": "logger"}
        fields = "%(asctime)s %(levelname)s %(name)s %(message)s"
        handler.setFormatter(JsonFormatter(fields, rename_fields=names, json_ensure_ascii=True))
    else:
        handler.setFormatter(_OneLine(TEXT))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


class _OneLine(logging.Formatter):
    """Control characters in a message are shown, not obeyed; tracebacks, which are ours, keep their lines."""

    def format(self, record: logging.LogRecord) -> str:
        plain = logging.makeLogRecord(record.__dict__)
        plain.msg, plain.args = _visible(record.getMessage()), ()
        if request_id := record.__dict__.get("request_id"):
            plain.msg += f" [{_visible(request_id)}]"
        return super().format(plain)


def _visible(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class Throttle:
    """Whether one more line may be written now; the next that may says how many were not."""

    def __init__(self, per_second: int = PER_SECOND) -> None:
        self._per_second, self._second, self._written, self._left_out = per_second, 0, 0, 0

    def allows(self) -> bool:
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._written = second, 0
        self._written += 1
        if self._written > self._per_second:
            self._left_out += 1
            return False
        return True

    def left_out(self) -> int:
        """Lines left out since this was last asked."""
        count, self._left_out = self._left_out, 0
        return count
