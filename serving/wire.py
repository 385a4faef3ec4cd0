"""What a protobuf message holds, seen from its bytes (protobuf.dev, "Encoding"): it can take a second to be parsed."""

from collections.abc import Iterator
from typing import NamedTuple

from google.protobuf.message import DecodeError

_VARINT, _BYTES, _FIXED, _LONGEST_VARINT = 0, 2, {1: 8, 5: 4}, 10
"""How a field's wire type says where it ends; of a group, which is out of use, the begin and the end are counted."""


class Part(NamedTuple):
    """A field of a message, each item of a repeated one for itself, and where its content lies."""

    number: int
    begin: int
    end: int


def parts(content: bytes, begin: int = 0, end: int | None = None) -> Iterator[Part]:
    """The fields on the outermost level of the message that lies there.

    Raises:
        DecodeError: at one that has no end.
    """
    at, end = begin, len(content) if end is None else end
    while at < end:
        tag, at = _varint(content, at)
        wire = tag & 7
        size = _FIXED.get(wire, 0)
        if wire == _BYTES:
            size, at = _varint(content, at)
        elif wire == _VARINT:
            size = _varint(content, at)[1] - at
        if at + size > end:
            raise DecodeError("a field is longer than its message")
        yield Part(tag >> 3, at, at + size)
        at += size


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """The number that begins there, and where it ends."""
    number = 0
    for place, byte in enumerate(content[at : at + _LONGEST_VARINT]):
        number |= (byte & 127) << (7 * place)
        if byte < 128:
            return number, at + place + 1
    raise DecodeError("a number has no end")
