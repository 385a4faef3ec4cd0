"""Flight recordings on disk: MCAP files that Foxglove and every MCAP tool open, one protobuf message a topic.

Every message is a chunk of its own, compressed and with its CRC: whatever ends the process, all but the last is whole.
LZ4, because mcap makes a new zstd context for each chunk: 64 KiB take 14 us instead of 66, and a noisy frame 30 % more.
The reader is stricter than mcap's own, which skips what it does not know and cannot tell a cut file from a damaged one.
"""

import contextlib
import fcntl
import io
import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from google.protobuf.message import DecodeError, Message
from mcap.opcode import Opcode
from mcap.records import Channel, Chunk, McapRecord, Schema
from mcap.records import Message as McapMessage
from mcap.stream_reader import breakup_chunk
from mcap.writer import MCAP0_MAGIC as MAGIC
from mcap.writer import CompressionType, IndexType, Writer

from protos.equiserve.v1 import policy_pb2 as pb
from protos.errors import Rejected, Status
from serving.envelope import SCALARS, Limits, Workspace

PROFILE, LIBRARY = pb.DESCRIPTOR.package, "equiserve"
SUFFIX = ".mcap"
TOPICS: dict[str, type[Message]] = {
    "policy": pb.FlightPolicy,
    "episode_start": pb.FlightStart,
    "action": pb.FlightAction,
    "episode_end": pb.FlightEnd,
}
RECORD_LIMIT = 64 * 2**20
"""No record of ours is longer; a length beyond it is damage."""
INDEX_BYTES = 80
"""What the index at a file's end takes for each message."""
_HEAD = struct.Struct("<BQ")  # of a record: its kind and length
_CHUNK = struct.Struct("<QQQII3sQ")  # of a chunk: first and last time, size, CRC, "lz4", compressed size
_HEADER_BYTES = len(PROFILE) + len(LIBRARY) + 8
_DATA_END_BYTES = 4


@dataclass(frozen=True)
class Entry:
    """One message of a recording, and when it was recorded (nanoseconds since 1970, the server's clock)."""

    time_ns: int
    message: Message


class FlightFile:
    """A recording under way. Not thread-safe. Its file is locked, so that `is_under_way` knows.

    An OSError, as of a full disk, ends it: it is closed, and ends with the last whole message; without one, it is gone.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._written, self._described = path, 0, 0
        self.messages = 0
        self._file = path.open("xb", buffering=0)
        with contextlib.suppress(OSError):  # a file system that knows no locks
            fcntl.flock(self._file.fileno(), fcntl.LOCK_EX)  # who looks whether it is locked holds it for a moment
        self._held = _Held()
        self._writer = Writer(self._held, 1, CompressionType.LZ4, IndexType.CHUNK)
        self._writer.start(PROFILE, LIBRARY)
        self._channels = {topic: self._channel(topic, kind) for topic, kind in TOPICS.items()}
        self._put()

    def write(self, message: Message, time_ns: int) -> int:
        """Append one message; how large the file would be if it were closed now. Raises OSError."""
        topic = next(name for name, kind in TOPICS.items() if isinstance(message, kind))
        data = message.SerializeToString()
        self._writer.add_message(self._channels[topic], time_ns, data, time_ns)
        self._put()
        self.messages += 1
        return self._written + self._described + self.messages * INDEX_BYTES

    def close(self) -> None:
        """Write the index and close. Raises OSError when there is no room for it; what was written stays readable."""
        if not self._file.closed:
            self._writer.finish()
            self._put()
            self._file.close()

    def _put(self) -> None:
        """All that is held, or nothing: part of a record would be damage."""
        data = self._held.take()
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(self._written)
            self._file.close()
            if not self.messages:
                self._path.unlink(missing_ok=True)
            raise
        self._written += len(data)

    def _channel(self, topic: str, kind: type[Message]) -> int:
        file = FileDescriptorProto()
        kind.DESCRIPTOR.file.CopyToProto(file)
        described = FileDescriptorSet(file=[file]).SerializeToString()
        self._described += len(described)
        schema = self._writer.register_schema(kind.DESCRIPTOR.full_name, "protobuf", described)
        return self._writer.register_channel(topic, "protobuf", schema)


class _Held(io.BytesIO):
    """What the MCAP writer has written and the file has not; positions are those in the file."""

    def __init__(self) -> None:
        super().__init__()
        self.taken = 0

    def tell(self) -> int:
        return self.taken + super().tell()

    def take(self) -> bytes:
        data = self.getvalue()
        self.taken += len(data)
        self.seek(0)
        self.truncate(0)
        return data


class _Damage(Exception):
    """What was found instead of a record of ours, and where."""

    def __init__(self, at: int, found: str) -> None:
        super().__init__(f"{found} at byte {at}")


def read(path: Path) -> Iterator[Entry]:
    """The messages of one file, in the order of writing, up to the last whole one where the end is missing.

    Raises:
        Rejected: when the file is no recording of ours, or is damaged elsewhere than at its end.
    """
    schemas: dict[int, str] = {}
    channels: dict[int, type[Message]] = {}
    try:
        with path.open("rb") as stream:
            for at, chunk in _chunks(stream):
                for record in _inside(at, chunk):
                    if isinstance(record, Schema):
                        schemas[record.id] = record.name
                    elif isinstance(record, Channel):
                        channels[record.id] = _kind(at, record.topic, schemas.get(record.schema_id, ""))
                    elif isinstance(record, McapMessage):
                        yield Entry(record.log_time, _message(at, record, channels))
    except _Damage as damage:
        raise _refused(path, "an undamaged recording of equiserve", str(damage)) from damage
    except OSError as error:
        raise _refused(path, "a file that can be read", str(error.strerror)) from error


def _kind(at: int, topic: str, schema: str) -> type[Message]:
    kind = TOPICS.get(topic)
    if kind is None or schema != kind.DESCRIPTOR.full_name:
        raise _Damage(at, f"a topic {topic!r} of {schema!r}")
    return kind


def _message(at: int, record: McapMessage, channels: Mapping[int, type[Message]]) -> Message:
    try:
        return channels[record.channel_id].FromString(record.data)
    except (KeyError, DecodeError) as error:
        raise _Damage(at, f"a message that is none of ours ({error})") from error


def _inside(at: int, chunk: Chunk) -> list[McapRecord]:
    try:
        return breakup_chunk(chunk, validate_crc=True)
    except Exception as error:  # those of mcap, lz4 and struct share no base class
        raise _Damage(at, f"a damaged record ({error})") from error


def _chunks(stream: BinaryIO) -> Iterator[tuple[int, Chunk]]:
    """Where each whole chunk begins, and the chunk. What comes behind the data, the index, is not looked at.

    Raises:
        _Damage: where something else follows than the end, be it cut off or not.
    """
    end = stream.seek(0, os.SEEK_END)
    stream.seek(max(end - len(MAGIC), 0))
    complete = end > len(MAGIC) and stream.read() == MAGIC
    stream.seek(0)
    if not MAGIC.startswith(magic := stream.read(len(MAGIC))):
        raise _Damage(0, repr(magic))
    while len(head := stream.read(_HEAD.size)) == _HEAD.size:
        at = stream.tell() - _HEAD.size
        kind, length = _HEAD.unpack(head)
        if not _is_ours(kind, length, at):
            raise _Damage(at, f"a record of kind {kind}, {length} bytes,")
        content = stream.read(length)
        if kind == Opcode.DATA_END:
            return
        if kind == Opcode.CHUNK and len(content) >= _CHUNK.size:
            first, last, size, crc, letters, name, compressed = _CHUNK.unpack_from(content)
            if (letters, name, compressed) != (3, b"lz4", length - _CHUNK.size):
                raise _Damage(at, "a record whose lengths contradict each other")
            if len(content) == length:
                yield at, Chunk("lz4", content[_CHUNK.size :], last, first, crc, size)
        if len(content) < length:  # cut off, or being written: what would be read next began inside of it
            break
    if complete:
        raise _Damage(end, "an end that does not belong to what is before it")


def _is_ours(kind: int, length: int, at: int) -> bool:
    """Whether such a record may stand there; one that is skipped, or taken for the end, would hide what is behind."""
    if at == len(MAGIC):
        return kind == Opcode.HEADER and length == _HEADER_BYTES
    if kind == Opcode.CHUNK:
        return _CHUNK.size <= length <= RECORD_LIMIT
    return kind == Opcode.DATA_END and length == _DATA_END_BYTES


def recorded(limits: Limits) -> pb.FlightLimits:
    """A server's own limits, for a recording of what it kept within them."""
    named = {**limits.fields, **{name: getattr(limits, name) for name in SCALARS}}
    box = limits.workspace
    return pb.FlightLimits(
        limits={name: value for name, value in named.items() if math.isfinite(value)},
        workspace=[bound for axis in zip(box.low, box.high, strict=True) for bound in axis] if box else (),
    )


def limits_of(told: pb.FlightLimits) -> Limits:
    """What was `recorded`."""
    fields = {name: value for name, value in told.limits.items() if name not in SCALARS}
    box = None
    if told.workspace:
        x0, x1, y0, y1, z0, z1 = told.workspace
        box = Workspace((x0, y0, z0), (x1, y1, z1))
    return Limits(fields, workspace=box, **{n: v for n, v in told.limits.items() if n in SCALARS})


def is_under_way(path: Path) -> bool:
    """Whether a recorder, of whichever process, still writes it."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def age_order(file: Path) -> tuple[str, int, str]:
    """A key that sorts a recorder's files, STAMP-NUMBER, as they were made; others' by their names."""
    stamp, _, number = file.name.removesuffix(SUFFIX).partition("-")
    return stamp, int(number) if number.isdecimal() else 0, file.name


def files_of(path: Path) -> list[Path]:
    """The recording's files, oldest first: `path` itself, or those in the folder.

    Raises:
        Rejected: when there is none.
    """
    files = sorted(path.glob(f"*{SUFFIX}"), key=age_order) if path.is_dir() else [path]
    if not files or not files[0].exists():
        raise _refused(path, "a flight recording, or a folder of them", "nothing")
    return files


def _refused(path: Path, expected: str, got: str) -> Rejected:
    return Rejected(str(path), expected, got, "", Status.FAILED_PRECONDITION)
