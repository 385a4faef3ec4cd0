"""Flight recordings on disk: MCAP files that Foxglove and every MCAP tool open, one protobuf message a topic.

Every message is a chunk of its own, compressed and with its CRC: whatever ends the process, all but the last is whole.
"""

import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from google.protobuf.message import DecodeError, Message
from mcap.exceptions import McapError
from mcap.records import Channel, Schema
from mcap.records import Message as McapMessage
from mcap.stream_reader import CRCValidationError, StreamReader
from mcap.writer import IndexType, Writer

from protos.equiserve.v1 import policy_pb2 as pb
from protos.errors import Rejected, Status

PROFILE = "equiserve.v1"
SUFFIX = ".mcap"
TOPICS: dict[str, type[Message]] = {
    "policy": pb.FlightPolicy,
    "episode_start": pb.FlightStart,
    "action": pb.FlightAction,
    "episode_end": pb.FlightEnd,
}
RECORD_LIMIT = 64 * 2**20
"""No record of ours is longer; a length beyond it is damage."""


@dataclass(frozen=True)
class Entry:
    """One message of a recording, and when it was recorded (nanoseconds since 1970, the server's clock)."""

    time_ns: int
    message: Message


class FlightFile:
    """A recording under way. Not thread-safe."""

    def __init__(self, path: Path) -> None:
        self._stream: IO[bytes] = path.open("xb")
        self._writer = Writer(self._stream, chunk_size=1, index_types=IndexType.CHUNK)
        self._writer.start(PROFILE, "equiserve")
        self._channels = {topic: self._channel(topic, kind) for topic, kind in TOPICS.items()}
        self._stream.flush()

    def write(self, message: Message, time_ns: int) -> int:
        """Append one message; the file's size afterwards. Raises OSError."""
        topic = next(name for name, kind in TOPICS.items() if isinstance(message, kind))
        data = message.SerializeToString()
        self._writer.add_message(self._channels[topic], time_ns, data, time_ns)
        self._stream.flush()
        return self._stream.tell()

    def close(self) -> None:
        """Write the index and close. Raises OSError when there is no room for it; what was written stays readable."""
        try:
            self._writer.finish()
        finally:
            self._stream.close()

    def _channel(self, topic: str, kind: type[Message]) -> int:
        file = FileDescriptorProto()
        kind.DESCRIPTOR.file.CopyToProto(file)
        described = FileDescriptorSet(file=[file]).SerializeToString()
        schema = self._writer.register_schema(kind.DESCRIPTOR.full_name, "protobuf", described)
        return self._writer.register_channel(topic, "protobuf", schema)


def read(path: Path) -> Iterator[Entry]:
    """The messages of one file, in the order of writing, up to the last whole one where the end is missing.

    Raises:
        Rejected: when the file is no recording of ours, or is damaged elsewhere than at its end.
    """
    channels: dict[int, type[Message]] = {}
    schemas: dict[int, str] = {}
    kinds = {kind.DESCRIPTOR.full_name: kind for kind in TOPICS.values()}
    with path.open("rb") as stream:
        records = StreamReader(
            io.BufferedReader(stream.raw), validate_crcs=True, record_size_limit=RECORD_LIMIT
        ).records
        try:
            for record in records:
                if isinstance(record, Schema):
                    schemas[record.id] = record.name
                elif isinstance(record, Channel):
                    kind = kinds.get(schemas.get(record.schema_id, ""))
                    if kind is None:
                        raise _refused(path, "topics of an equiserve recording", repr(record.topic))
                    channels[record.id] = kind
                elif isinstance(record, McapMessage):
                    yield Entry(record.log_time, channels[record.channel_id].FromString(record.data))
        except (CRCValidationError, DecodeError, zlib.error, KeyError) as error:
            raise _refused(path, "whole records", f"a damaged one: {error}") from error
        except McapError as error:
            if stream.tell() == path.stat().st_size and channels:
                return  # the process ended while it wrote
            raise _refused(path, "an MCAP file", f"{type(error).__name__} {error}") from error


def files_of(path: Path) -> list[Path]:
    """The recording's files, oldest first: `path` itself, or those in the folder.

    Raises:
        Rejected: when there is none.
    """
    files = sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() else [path]
    if not files or not files[0].exists():
        raise _refused(path, "a flight recording, or a folder of them", "nothing")
    return files


def _refused(path: Path, expected: str, got: str) -> Rejected:
    return Rejected(str(path), expected, got, "", Status.FAILED_PRECONDITION)
