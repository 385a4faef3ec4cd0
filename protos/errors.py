"""What a refusal says: which field, what was expected, what came, what to do; and the gRPC status it maps to."""

from enum import Enum

RETRY = "x-retry"
"""gRPC metadata of a call that may have been answered already, with any value: then its answer is looked for first."""
REQUEST_ID = "x-request-id"
"""gRPC metadata of everything that the server answers; a caller may choose it."""
LONGEST = 400
"""Bytes of each text of a refusal: what came may be long, headers and log lines may not."""


class Status(Enum):
    """The gRPC status codes that a refusal can carry, by name: protos needs no grpc to speak of them."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"  # shape, size, encoding, non-finite
    FAILED_PRECONDITION = "FAILED_PRECONDITION"  # another contract; a pose missing where one is needed
    NOT_FOUND = "NOT_FOUND"  # policy, version, episode
    OUT_OF_RANGE = "OUT_OF_RANGE"  # stale step or frame
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"  # queue, size
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"  # the caller's time ran out before its turn came
    UNAUTHENTICATED = "UNAUTHENTICATED"  # no token, or one that nobody knows
    PERMISSION_DENIED = "PERMISSION_DENIED"  # a token without the role
    INTERNAL = "INTERNAL"  # our own fault
    UNAVAILABLE = "UNAVAILABLE"  # warming up, draining: the only one that a client retries


class Rejected(ValueError):
    """Input that was refused, and why. Texts are cut to LONGEST bytes of UTF-8 each.

    Attributes:
        field: dotted path of the offending field, e.g. "observation.depth".
        expected: what would have been accepted.
        got: what came, in a form that is safe to log.
        remedy: what the caller can do about it; may be empty.
        status: the gRPC status that a server answers with.
    """

    def __init__(
        self, field: str, expected: str, got: str, remedy: str = "", status: Status = Status.INVALID_ARGUMENT
    ) -> None:
        self.field, self.expected, self.got, self.remedy = map(cut, (field, expected, got, remedy))
        self.status = status
        told = f"{self.field}: expected {self.expected}, got {self.got}"
        super().__init__(f"{told}; {self.remedy}" if remedy else told)

    def within(self, where: str) -> "Rejected":
        """The same refusal, where `where` comes before the field: "episode 3, " or "metadata."."""
        return type(self)(where + self.field, self.expected, self.got, self.remedy, self.status)


def shown(text: str, length: int = 64) -> str:
    """A caller's text in a form that is safe to log and to send back: quoted, escaped, and cut to `length`."""
    return ascii(cut(text, length))


def cut(text: str, length: int = LONGEST) -> str:
    """`text`, or its beginning, in at most `length` bytes of UTF-8."""
    encoded = text.encode(errors="backslashreplace")  # JSON may hold halves of surrogate pairs, a header may not
    return encoded.decode() if len(encoded) <= length else encoded[: length - 3].decode(errors="ignore") + "..."
