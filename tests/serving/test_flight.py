"""Recordings on disk: a cut file reads to its last whole message, and damage is never taken for the end."""

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mcap.reader import make_reader

from protos.equiserve.v1 import policy_pb2 as pb
from protos.errors import Rejected
from serving.flight import FlightFile, files_of, read


def message(number):
    frame = pb.Observation(depth=np.random.default_rng(number).bytes(50))
    return pb.FlightAction(request_id=str(number), request=pb.GetActionRequest(observation=frame))


@pytest.fixture(scope="module", params=["closed", "killed"])
def recording(request, tmp_path_factory):
    """(a file's bytes, its messages, where each ends)"""
    path = tmp_path_factory.mktemp("recording") / "flight.mcap"
    file, ends = FlightFile(path), []
    for number in range(6):
        file.write(message(number), number)
        ends.append(path.stat().st_size)
    if request.param == "closed":
        file.close()
    return path.read_bytes(), list(read(path)), ends


def test_a_file_cut_anywhere_reads_to_its_last_whole_message(recording, tmp_path):
    """At every byte of the last three messages and a little behind them, and at some elsewhere."""
    content, entries, ends = recording
    path = tmp_path / "cut.mcap"
    near = range(ends[2], min(ends[-1] + 50, len(content) + 1))
    for length in sorted({*near, *range(0, len(content), 97), len(content)}):
        path.write_bytes(content[:length])
        assert list(read(path)) == entries[: sum(end <= length for end in ends)], f"cut to {length} bytes"


@settings(max_examples=300, deadline=None, derandomize=True)
@given(where=st.floats(0, 1, exclude_max=True), bits=st.integers(1, 255))
def test_a_damaged_byte_is_an_error_that_names_the_file_or_does_no_harm(recording, tmp_path_factory, where, bits):
    content, entries, ends = recording
    path = tmp_path_factory.getbasetemp() / "damaged.mcap"
    damaged = bytearray(content)
    damaged[int(where * min(len(content), ends[-1] + 50))] ^= bits
    path.write_bytes(damaged)
    said, found = "", None
    try:
        found = list(read(path))
    except Rejected as error:
        said = error.field
    assert said == str(path) or found == entries


@pytest.mark.parametrize("part", ["record's length", "data"])
def test_damage_in_the_middle_is_not_taken_for_the_end(recording, tmp_path, part):
    content, _, ends = recording
    damaged = bytearray(content)
    damaged[ends[2] + {"record's length": 3, "data": 80}[part]] ^= 1
    path = tmp_path / "damaged.mcap"
    path.write_bytes(damaged)
    with pytest.raises(Rejected, match=rf"damaged\.mcap: expected an undamaged recording.* at byte {ends[2]}"):
        list(read(path))


def test_what_is_no_recording_is_refused_by_name(tmp_path):
    (tmp_path / "text.mcap").write_text("depth, gripper\n")
    with pytest.raises(Rejected, match=r"text\.mcap"):
        list(read(tmp_path / "text.mcap"))
    for nothing in (tmp_path / "nowhere", tmp_path / "folder"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        with pytest.raises(Rejected, match=nothing.name):
            files_of(nothing)


def test_a_closed_file_has_the_index_that_mcap_tools_look_for(tmp_path):
    file = FlightFile(tmp_path / "flight.mcap")
    file.write(pb.FlightPolicy(), 1)
    size = [file.write(message(number), 2 + number) for number in range(50)][-1]
    file.close()
    assert (tmp_path / "flight.mcap").stat().st_size == pytest.approx(size, rel=0.05)
    with (tmp_path / "flight.mcap").open("rb") as stream:
        reader = make_reader(stream, validate_crcs=True)
        assert reader.get_summary().statistics.message_count == 51
        topics = [(schema.name, channel.topic) for schema, channel, _ in reader.iter_messages()]
    assert topics == [("equiserve.v1.FlightPolicy", "policy")] + 50 * [("equiserve.v1.FlightAction", "action")]


def test_a_recording_that_grows_while_it_is_read_is_not_damaged(recording, tmp_path, monkeypatch):
    """The reader has met half of a chunk when the recorder writes the rest."""
    content, entries, ends = recording
    path, plain = tmp_path / "growing.mcap", Path.open
    path.write_bytes(content[: ends[4] + 30])

    class Growing(io.BufferedReader):
        def read(self, size: int | None = -1) -> bytes:
            found = super().read(size)
            if size and 0 <= len(found) < size:
                path.write_bytes(content[: ends[5]])
            return found

    monkeypatch.setattr(
        Path, "open", lambda p, mode="r", *a, **k: Growing(io.FileIO(p)) if mode == "rb" else plain(p, mode, *a, **k)
    )
    assert list(read(path)) == entries[:5]
