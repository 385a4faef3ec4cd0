"""What a protobuf message holds, without parsing it, which can take a second (protobuf.dev, "Encoding")."""

from collections.abc import Iterator
from typing import NamedTuple

from google.protobuf.message import DecodeError

_VARINT, _BYTES, _GROUP, _END, _FIXED, _LONGEST_VARINT = 0, 2, 3, 4, {1: 8, 5: 4}, 10
"""How a field's wire type says where it ends."""


class Part(NamedTuple):
    """A field of a message, each item of a repeated one for itself, and where its content lies."""

    number: int
    begin: int
    end: int
    is_bytes: bool
    """A message, a text or bytes, and no number."""


def parts(content: bytes, begin: int = 0, end: int | None = None) -> Iterator[Part]:
    """The fields on the outermost level of the message that lies there. Of a group, which is out of use and none of
    ours, its begin, what it holds and its end come one by one, as fields of number 0.

    Raises:
        DecodeError: at one that has no end.
    """
    at, end, groups = begin, len(content) if end is None else end, 0
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
        groups += wire == _GROUP
        yield Part(0 if groups else tag >> 3, at, at + size, wire == _BYTES)
        groups -= wire == _END
        at += size


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """The number that begins there, and where it ends."""
    number = 0
    for place, byte in enumerate(content[at : at + _LONGEST_VARINT]):
        number |= (byte & 127) << (7 * place)
        if byte < 128:
            return number, at + place + 1
    raise DecodeError("a number has no end")
