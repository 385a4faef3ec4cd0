"""The flight recorder: what is on the disk is what happened, and whatever happens to the disk, acting goes on."""

import errno
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import grpc
import numpy as np
import pytest

from protos.equiserve.v1 import policy_pb2 as pb
from protos.equiserve.v1 import policy_pb2_grpc as pb_grpc
from serving import recorder as recorder_module
from serving.envelope import Limits
from serving.errors import StartupError
from serving.flight import FlightFile, files_of, read
from serving.recorder import Recorder
from tests.serving.conftest import address_of
from tests.serving.requests import acting

INFO = pb.PolicyInfo(name="tiny", version="0123456789ab", contract="{}")
POLICY = SimpleNamespace(name=INFO.name, version=INFO.version, info=lambda: INFO)


def put(recorder, number, size=0):
    """An action with a frame that does not compress."""
    request = pb.GetActionRequest(observation=pb.Observation(depth=np.random.default_rng(number).bytes(size)))
    response = pb.GetActionResponse(policy=INFO.name, version=INFO.version)
    recorder.put(pb.FlightAction, POLICY, request_id=str(number), request=request, response=response)


def messages_of(path, kind=None):
    found = [entry.message for file in files_of(path) for entry in read(file)]
    return [m for m in found if kind is None or isinstance(m, kind)]


def numbers_of(path):
    return [int(m.request_id) for m in messages_of(path, pb.FlightAction)]


def wait_until(condition, timeout_s=10.0):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it never came about"
        time.sleep(0.005)


@pytest.fixture
def record(tmp_path):
    """record(...) -> a Recorder into tmp_path, closed after the test."""
    made = []

    def make(file_bytes=2**20, total_bytes=2**24):
        made.append(Recorder(tmp_path, file_bytes, total_bytes, Limits()))
        return made[-1]

    yield make
    for recorder in made:
        recorder.close()


class Disk:
    """What a file system does that has `room` bytes left: it takes as many, and then no more."""

    def __init__(self, monkeypatch):
        self.room = 10**9
        plain = Path.open
        monkeypatch.setattr(
            Path, "open", lambda p, mode="r", *a, **k: OnDisk(self, p, k) if mode == "xb" else plain(p, mode, *a, **k)
        )
        self.open = plain


class OnDisk:
    def __init__(self, disk, path, options):
        self._disk, self._file = disk, disk.open(path, "xb", **options)

    def write(self, data):
        share = min(len(data), self._disk.room)
        if not share:
            raise OSError(errno.ENOSPC, "No space left on device")
        self._disk.room -= share
        return self._file.write(data[:share])

    def __getattr__(self, name):
        return getattr(self._file, name)


def test_it_records_what_was_asked_and_answered(serve, healthy, tmp_path):
    running = serve(policy=(f"tiny={healthy}",), record=tmp_path)
    start = pb.StartEpisodeRequest(limits={"planar": 0.02})
    started = running.stub.StartEpisode(start)
    asked = [acting(1), acting(2, episode_id=started.episode_id, step=3)]
    answered = [running.stub.GetAction(request) for request in asked]
    running.stub.GetAction(asked[1])  # a step that is tried again
    end = pb.EndEpisodeRequest(episode_id=started.episode_id, outcome=pb.EndEpisodeRequest.OUTCOME_SUCCESS)
    ended = running.stub.EndEpisode(end)
    wait_until(lambda: running.stub.GetStats(pb.GetStatsRequest()).recorded == 4)

    described, first, *actions, last = messages_of(tmp_path)
    assert described.policy == running.policy.info()
    assert (first.request, first.response) == (start, started)
    assert [m.request for m in actions] == asked
    assert [m.response for m in actions] == answered
    assert [m.request_id for m in actions] == [answer.request_id for answer in answered]
    assert all(m.client for m in (first, *actions, last))
    assert (last.request, last.response) == (end, ended)


def test_a_refused_call_is_not_recorded(serve, healthy, tmp_path):
    running = serve(policy=(str(healthy),), record=tmp_path)
    with pytest.raises(grpc.RpcError):
        running.stub.GetAction(acting(1, policy="other"))
    running.stub.GetAction(acting(1))
    running.server.stop()
    assert len(messages_of(tmp_path, pb.FlightAction)) == 1


def test_files_rotate_and_the_oldest_go(record, tmp_path):
    """4 KiB a message: about 12 to a file, about 4 files."""
    file_bytes, total_bytes, size = 100_000, 400_000, 4096
    recorder = record(file_bytes, total_bytes)
    (others := tmp_path / "another.mcap").write_bytes(bytes(total_bytes))
    for number in range(100):
        put(recorder, number, size)
        wait_until(lambda number=number: recorder.recorded == number + 1)
        sizes = [file.stat().st_size for file in files_of(tmp_path) if file != others]
        assert sum(sizes) <= total_bytes + size
        assert max(sizes) <= file_bytes + 2 * size
    recorder.close()
    others.unlink()  # which was there still: it is not the recorder's
    kept = numbers_of(tmp_path)
    assert kept == list(range(kept[0], 100))
    assert len(kept) > 30
    for file in files_of(tmp_path):
        assert isinstance(next(read(file)).message, pb.FlightPolicy), "each file can be read alone"


def test_files_end_before_their_index_takes_much_memory(record, tmp_path, monkeypatch):
    monkeypatch.setattr(recorder_module, "FILE_MESSAGES", 4)  # the description of the policy is one
    recorder = record()
    for number in range(7):
        put(recorder, number)
    recorder.close()
    assert [sum(1 for _ in read(file)) for file in files_of(tmp_path)] == [4, 4, 2]
    assert numbers_of(tmp_path) == list(range(7))


def test_every_file_describes_what_acts_in_it(record, tmp_path):
    recorder = record(file_bytes=30_000)
    for number in range(10):
        put(recorder, number, 8192)
    recorder.close()
    assert len(files_of(tmp_path)) > 1
    for file in files_of(tmp_path):
        assert len(messages_of(file, pb.FlightPolicy)) == 1


def test_two_recorders_in_a_folder_leave_each_other_s_open_file(record, tmp_path):
    """As while one server takes over from another: what went into an unlinked file would be counted, and lost."""
    quiet, busy = record(file_bytes=30_000, total_bytes=120_000), record(file_bytes=30_000, total_bytes=120_000)
    put(quiet, 0)
    wait_until(lambda: quiet.recorded == 1)
    for number in range(100, 130):
        put(busy, number, 8192)
    busy.close()
    put(quiet, 1)
    quiet.close()
    assert [n for n in numbers_of(tmp_path) if n < 100] == [0, 1]
    assert len(files_of(tmp_path)) <= 5
    again = record(file_bytes=30_000, total_bytes=120_000)
    for number in range(200, 230):  # nobody writes the others any more
        put(again, number, 8192)
    again.close()
    assert [n for n in numbers_of(tmp_path) if n < 100] == []


def test_a_file_that_another_server_has_just_removed_costs_no_message(record, tmp_path):
    """Both make room at the same moment: the name is still there when it is looked at, and leads nowhere."""
    (tmp_path / "20260101T000000000000-00001.mcap").symlink_to(tmp_path / "nowhere")
    busy = record()
    for number in range(20):
        put(busy, number)
    busy.close()
    assert (busy.recorded, busy.dropped) == (20, 0)


def test_a_restart_goes_on_in_the_same_folder(record, tmp_path):
    for number in range(2):
        recorder = record()
        put(recorder, number)
        recorder.close()
    assert numbers_of(tmp_path) == [0, 1]


@pytest.mark.parametrize("file_bytes", [100_000, 1_000_000])
def test_another_start_costs_no_recording_that_there_is_room_for(record, tmp_path, file_bytes):
    """Also where a file may be as large as all of them together."""
    for number in range(5):
        recorder = record(file_bytes, total_bytes=1_000_000)
        put(recorder, number)
        recorder.close()
    assert numbers_of(tmp_path) == [0, 1, 2, 3, 4]


def test_a_clock_that_is_set_back_costs_no_recent_file(record, tmp_path, monkeypatch):
    """The oldest go, which are not those of the latest hour."""
    file_bytes, total_bytes, size = 30_000, 120_000, 8192
    now_ns = time.time_ns()
    for start, number in ((now_ns, 0), (now_ns - 3600 * 10**9, 100)):
        monkeypatch.setattr(
            recorder_module, "time", SimpleNamespace(time_ns=lambda t=start: t, monotonic=time.monotonic)
        )
        recorder = record(file_bytes, total_bytes)
        for i in range(number, number + 30):
            put(recorder, i, size)
            wait_until(lambda recorder=recorder: not recorder._waiting_bytes)
        recorder.close()
    kept = numbers_of(tmp_path)
    assert kept == list(range(kept[0], 130))
    assert kept[0] >= 100


@pytest.mark.parametrize("room", [0, 30, 2500, 60_000])
def test_a_full_disk_costs_messages_and_nothing_else(record, tmp_path, monkeypatch, caplog, room):
    """Full at once, within the header, within the first message, within a later one."""
    monkeypatch.setattr(recorder_module, "TRY_AGAIN_S", 0.02)
    disk = Disk(monkeypatch)
    disk.room = room
    recorder = record()
    for number in range(20):
        put(recorder, number, 4096)
    wait_until(lambda: recorder.recorded + recorder.dropped == 20)
    assert recorder.dropped > 0
    assert recorder.recorded == (len(numbers_of(tmp_path)) if recorder.recorded else 0)
    disk.room = 10**9
    time.sleep(0.03)
    lost = recorder.dropped
    for number in range(20, 25):
        put(recorder, number, 4096)
    recorder.close()
    assert recorder.dropped == lost
    assert numbers_of(tmp_path) == [*range(20 - lost), *range(20, 25)]
    assert len([r for r in caplog.records if "cannot write" in r.message]) == 1
    assert len([r for r in caplog.records if "writes again" in r.message]) == 1


def test_what_cannot_be_written_is_dropped_and_the_next_is_written(record, tmp_path, monkeypatch, caplog):
    """Its thread must not die of one message, and record nothing from then on."""
    monkeypatch.setattr(recorder_module, "TRY_AGAIN_S", 0.0)
    recorder = record()
    no_policy = SimpleNamespace(name="tiny", version="", info=mock.Mock(side_effect=ValueError("value out of range")))
    recorder.put(pb.FlightAction, no_policy, request_id="1")
    put(recorder, 2)
    recorder.close()
    assert (recorder.recorded, recorder.dropped) == (1, 1)
    assert numbers_of(tmp_path) == [2]
    assert "cannot write" in caplog.text


def test_a_file_that_cannot_be_closed_does_not_end_the_recording(record, tmp_path, monkeypatch):
    monkeypatch.setattr(recorder_module, "TRY_AGAIN_S", 0.0)
    recorder = record()
    put(recorder, 1)
    wait_until(lambda: recorder.recorded == 1)
    with monkeypatch.context() as broken:
        for method in ("write", "close"):
            broken.setattr(FlightFile, method, mock.Mock(side_effect=RuntimeError("no memory to compress")))
        put(recorder, 2)
        wait_until(lambda: recorder.dropped == 1)
    put(recorder, 3)
    recorder.close()
    assert (recorder.recorded, recorder.dropped, recorder._waiting_bytes) == (2, 1, 0)
    assert numbers_of(files_of(tmp_path)[-1]) == [3]


def test_what_comes_after_the_end_is_dropped_and_counted(record):
    """A call whose caller left during a drain may finish later than the server."""
    recorder = record()
    recorder.close()
    put(recorder, 1)
    assert (recorder.recorded, recorder.dropped) == (0, 1)


def test_a_full_disk_is_not_filled_with_empty_files(record, tmp_path, monkeypatch):
    monkeypatch.setattr(recorder_module, "TRY_AGAIN_S", 0.0)
    Disk(monkeypatch).room = 60
    recorder = record()
    for number in range(50):
        put(recorder, number)
    recorder.close()
    assert recorder.dropped == 50
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_when_the_index_is_written_leaves_every_message(record, tmp_path, monkeypatch):
    disk = Disk(monkeypatch)
    recorder = record()
    put(recorder, 0)
    wait_until(lambda: recorder.recorded == 1)
    disk.room = 100
    recorder.close()
    assert numbers_of(tmp_path) == [0]


def test_acting_goes_on_while_the_disk_is_full(serve, healthy, tmp_path, monkeypatch):
    Disk(monkeypatch).room = 0
    running = serve(policy=(str(healthy),), record=tmp_path)
    for seed in range(10):
        running.stub.GetAction(acting(seed))
    wait_until(lambda: running.stub.GetStats(pb.GetStatsRequest()).dropped == 10)
    assert running.stub.GetStats(pb.GetStatsRequest()).recorded == 0


def test_what_does_not_fit_is_dropped_and_counted_and_nobody_waits(record, tmp_path, monkeypatch):
    """The disk hangs. Eight threads hand over four times what may wait."""
    monkeypatch.setattr(recorder_module, "WAITING_BYTES", 100 * (4096 + recorder_module.ITEM_BYTES))
    go_on, write = threading.Event(), FlightFile.write
    monkeypatch.setattr(FlightFile, "write", lambda *a: go_on.wait(10) and write(*a))
    recorder = record()
    began = time.perf_counter()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: put(recorder, number, 4000), range(400)))
    took_s = time.perf_counter() - began
    go_on.set()
    recorder.close()
    assert took_s < 2, "400 handovers; the disk would have taken 10 s"
    assert recorder.recorded + recorder.dropped == 400
    assert 90 <= recorder.recorded <= 101
    assert len(numbers_of(tmp_path)) == recorder.recorded


def test_a_folder_that_cannot_be_written_is_refused_at_the_start(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StartupError, match="--record"):
        Recorder(tmp_path / "file", 1, 1, Limits())


def test_after_kill_9_all_that_was_whole_is_read(launch, healthy, tmp_path):
    process = launch("--policy", healthy, "--listen", "localhost:0", "--record", tmp_path)
    answered = []
    with grpc.insecure_channel(address_of(process)) as channel:
        stub = pb_grpc.PolicyServiceStub(channel)

        def call():
            try:
                while True:
                    answered.append(stub.GetAction(acting(len(answered) % 9), timeout=5))
            except grpc.RpcError:
                pass

        calling = threading.Thread(target=call)
        calling.start()
        wait_until(lambda: stub.GetStats(pb.GetStatsRequest()).recorded >= 50)
        promised = stub.GetStats(pb.GetStatsRequest()).recorded
        process.send_signal(signal.SIGKILL)
        calling.join(10)
    recorded = [m.response for m in messages_of(tmp_path, pb.FlightAction)]
    together = min(len(answered), len(recorded))
    assert recorded[:together] == answered[:together]
    assert promised <= len(recorded) <= len(answered) + 1


def test_what_is_no_field_of_ours_is_not_kept(serve, healthy, tmp_path):
    """A megabyte of it with each call would push all other recordings off the disk."""
    running = serve(policy=(f"tiny={healthy}",), record=tmp_path)
    unknown = b"\xfa\x3f" + bytes([128, 128, 64]) + np.random.default_rng(0).bytes(2**20)  # field 1023, 1 MiB
    act = running.channel.unary_unary("/equiserve.v1.PolicyService/GetAction")
    act(acting(1).SerializeToString() + unknown, timeout=20)
    running.server.stop()
    assert len(messages_of(tmp_path, pb.FlightAction)) == 1
    assert sum(file.stat().st_size for file in files_of(tmp_path)) < 200_000


def test_files_are_in_order_whatever_their_number(record, tmp_path):
    """Of a clock that was ahead once, all later ones keep the stamp, and only the number tells them apart."""
    for number in (99_999, 100_000):
        (tmp_path / f"29991231T235959000000-{number}.mcap").write_bytes(bytes(400_000))
    recorder = record(100_000, 900_000)
    put(recorder, 0)
    wait_until(lambda: recorder.recorded == 1)
    assert [file.name.partition("-")[2] for file in files_of(tmp_path)] == ["99999.mcap", "100000.mcap", "100001.mcap"]
    recorder.close()
    recorder = record(100_000, 600_000)
    put(recorder, 1)
    wait_until(lambda: recorder.recorded == 1)
    assert "99999" not in str(files_of(tmp_path))
    assert "100000" in str(files_of(tmp_path))


def test_what_looks_whether_a_folder_can_be_written_leaves_what_is_there(record, tmp_path):
    (tmp_path / ".writable").write_text("a user's")
    record()
    assert (tmp_path / ".writable").read_text() == "a user's"


def test_small_messages_fill_the_line_too(record, monkeypatch):
    """Each is about a kilobyte of Python, however little it says."""
    recorder, go = record(), threading.Event()
    monkeypatch.setattr(recorder, "_write", lambda item: go.wait(20))
    for _ in range(2 * recorder_module.WAITING_BYTES // recorder_module.ITEM_BYTES):
        recorder.put(pb.FlightStart, client="x")
    assert recorder.dropped > 0
    go.set()
