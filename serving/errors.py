"""What goes wrong on the server's own side. (What a caller gets wrong is protos.errors.Rejected.)"""

from collections.abc import Sequence

from protos.errors import Rejected


class StartupError(Exception):
    """The server cannot start as configured; the message says what to change."""


class PolicyRefused(Exception):
    """A policy file that must not reach a robot: which file, and per reason what was expected and found."""

    def __init__(self, file: str, reasons: Sequence[Rejected]) -> None:
        self.file, self.reasons = file, tuple(reasons)
        super().__init__("\n".join([f"refused {file}", *(f"  - {reason}" for reason in reasons)]))
