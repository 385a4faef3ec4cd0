"""`python -m serving.replay`: the same policy says the same bytes, and another answer is found and named."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.codec import pack_observation
from protos.equiserve.v1 import policy_pb2 as pb
from protos.spaces import Pose
from serving.envelope import SCALARS, Limits, Workspace
from serving.flight import FlightFile, files_of, limits_of, read, recorded
from serving.replay import main
from tests.makers import far_scene, scene, tiny_policy_file
from tests.serving.conftest import REPOSITORY, start
from tests.serving.requests import acting

SAMPLE = pb.MODE_SAMPLE
TOLD = {1: {"at_rest": True}, 2: {"applied_step": 0}, 3: {"applied_step": 6}}
"""Of steps 0, 3, 6 and 9: the second begins at rest, the third too, since the second was not applied."""


def fly(running, *, steps=4):
    """Calls of every kind, and the end of the server, so that all of it is on the disk."""
    stub = running.stub
    for number, mode in enumerate((pb.MODE_UNSPECIFIED, pb.MODE_GREEDY, SAMPLE)):
        settled = {"mode": mode, "seed": 7 * number}
        id_ = stub.StartEpisode(pb.StartEpisodeRequest(limits={"jump_m": 0.01}, **settled)).episode_id
        for step in range(steps):
            stub.GetAction(acting(step, episode_id=id_, step=3 * step, **TOLD.get(step, {})))
        stub.EndEpisode(pb.EndEpisodeRequest(episode_id=id_))
        stub.GetAction(acting(number, **settled))
    for encoding in (pb.Observation.UINT16_MILLIMETERS, pb.Observation.UINT16):
        observation = pack_observation(scene(1, gripper=1.0), encoding, depth_scale=0.0005)
        stub.GetAction(pb.GetActionRequest(observation=observation))
    running.server.stop()
    return 3 * (steps + 1) + 2


@pytest.fixture(scope="module")
def flown(healthy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("flown") / "flight"
    running = start(policy=(f"tiny={healthy}",), record=folder)
    fly(running)
    running.channel.close()
    return folder


@pytest.fixture
def recording(flown, tmp_path):
    """A copy, which a test may change."""
    return shutil.copytree(flown, tmp_path / "flight")


def edited(recording, edit, *, drop=(), limits=False):
    """The recording again: `edit` made to its first greedy action outside an episode, messages of `drop` left out.

    Args:
        limits: what the server says that it kept; None: it does not.
    """
    (source,) = files_of(recording)
    path, done = recording / "edited.mcap", False
    file = FlightFile(path)
    for entry in read(source):
        message = entry.message
        if not done and isinstance(message, pb.FlightAction) and not message.request.episode_id:
            message.request_id, done = "the-one", True
            edit(message.response)
        if isinstance(message, pb.FlightPolicy) and limits is not False:
            message.ClearField("limits")
            if limits is not None:
                message.limits.CopyFrom(limits)
        if not isinstance(message, drop):
            file.write(message, entry.time_ns)
    file.close()
    return path


@pytest.mark.parametrize(
    "breaks", [(), ("wild",), ("nan_when_far",)], ids=["sound", "beyond its limits", "sometimes no number"]
)
@pytest.mark.parametrize("with_value", [True, False], ids=["value", "no value"])
def test_the_same_policy_says_the_same_bytes(serve, tmp_path, capsys, breaks, with_value):
    file = tiny_policy_file(tmp_path / "p.onnx", breaks=breaks, golden_from="broken", with_value=with_value)
    running = serve(policy=(f"tiny={file}",), record=tmp_path / "flight")
    if breaks == ("nan_when_far",):
        assert running.stub.GetAction(pb.GetActionRequest(observation=pack_observation(far_scene()))).hold
    calls = fly(running) + (breaks == ("nan_when_far",))
    assert main([str(tmp_path / "flight"), "--policy", str(file)]) == 0
    assert f"{calls} the same, 0 different, 0 skipped" in capsys.readouterr().out


def one_bit(message, name):
    setattr(message, name, np.nextafter(np.float32(getattr(message, name)), np.float32(9)))


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda r: one_bit(r.raw_action, "dx"), "raw_action.dx was"),
        (lambda r: one_bit(r.std, "dtheta"), "std.dtheta was"),
        (lambda r: one_bit(r, "value"), "value was"),
        (lambda r: r.ClearField("value"), "value was absent, is"),
        (lambda r: setattr(r.raw_action, "p", float("nan")), "raw_action.p was nan"),
        (lambda r: one_bit(r.action, "dx"), "action.dx was"),
        (lambda r: setattr(r, "hold", True), "hold was True, is False"),
        (lambda r: r.interventions.add(field="lift", rule="limit"), "interventions were lift limit 0 to [], are none"),
    ],
    ids=["action", "std", "value", "no value", "nan", "what was executed", "a hold", "an intervention"],
)
def test_what_differs_is_named_with_its_request(recording, healthy, capsys, edit, said):
    path = edited(recording, edit)
    assert main([str(path), "--policy", str(healthy)]) == 1
    out = capsys.readouterr().out
    assert f"different: {path}, request the-one: {said}" in out
    assert "16 the same, 1 different" in out


WALLS = {"workspace": (0.3, 0.7, -0.2, 0.2, 0.0, 0.5), "limits": {"lift": 0.01, "step_m": 0.02, "jump_rad": 0.05}}


def test_what_a_servers_limits_changed_is_changed_again(serve, tmp_path, capsys):
    """Of calls with a pose near the walls, in an episode with limits of its own and outside."""
    wild = tiny_policy_file(tmp_path / "p.onnx", breaks=["wild"], golden_from="broken")
    running = serve(policy=(str(wild),), record=tmp_path / "flight", **WALLS)
    id_ = running.stub.StartEpisode(pb.StartEpisodeRequest(limits={"planar": 0.012, "jump_m": 0.01})).episode_id
    rules = set()
    for step in range(6):
        pose = Pose(0.69, 0.19, 0.01, 0.0)
        for episode in ({"episode_id": id_, "step": step}, {}):
            answer = running.stub.GetAction(acting(step, pose=pose, **episode))
            rules |= {change.rule for change in answer.interventions}
    running.server.stop()
    assert rules >= {"limit", "jump", "workspace"}
    assert main([str(tmp_path / "flight"), "--policy", str(wild)]) == 0
    assert "12 the same, 0 different" in capsys.readouterr().out
    path = edited(tmp_path / "flight", lambda response: response.ClearField("interventions"))
    assert main([str(path), "--policy", str(wild)]) == 1
    assert "interventions were none, are " in capsys.readouterr().out
    path.unlink()
    path = edited(tmp_path / "flight", lambda response: None, limits=pb.FlightLimits())
    assert main([str(path), "--policy", str(wild)]) == 1
    assert "action.dx was" in capsys.readouterr().out


def test_of_a_recording_that_tells_no_limits_the_contract_s_are_checked(recording, healthy, capsys):
    path = edited(recording, lambda response: setattr(response.action, "dz", 0.06), limits=None)
    assert main([str(path), "--policy", str(healthy)]) == 1
    out = capsys.readouterr().out
    assert "action.lift [0.05999999865889549] is not within 0.05" in out
    assert "of 17 the recording does not tell the server's limits" in out
    assert "16 the same, 1 different" in out


@given(
    st.dictionaries(st.sampled_from(["planar", "lift", *SCALARS]), st.floats(1e-3, 9.0)),
    st.none() | st.tuples(*3 * [st.floats(-2, -0.1), st.floats(0.1, 2)]),
)
def test_limits_survive_being_recorded(named, box):
    scalars = {name: value for name, value in named.items() if name in SCALARS}
    fields = {name: value for name, value in named.items() if name not in SCALARS}
    limits = Limits(fields, workspace=box and Workspace(box[::2], box[1::2]), **scalars)
    assert limits_of(recorded(limits)) == limits


def test_only_the_policy_that_acted_is_compared(serve, healthy, tmp_path, capsys):
    newer = tiny_policy_file(tmp_path / "newer.onnx", weight=1.5)
    running = serve(policy=(f"tiny={healthy}", f"other={newer}"), record=tmp_path / "flight")
    running.stub.GetAction(acting(1))
    running.stub.GetAction(acting(1, policy="other"))
    version = running.server.registry.resolve("other", "").version
    running.server.stop()
    assert main([str(tmp_path / "flight"), "--policy", str(healthy)]) == 0
    assert f"skipped 1 of 'other' {version}: no --policy is that version" in capsys.readouterr().out
    assert main([str(tmp_path / "flight"), "--policy", str(healthy), "--policy", str(newer)]) == 0
    assert "2 the same, 0 different, 0 skipped" in capsys.readouterr().out


def test_an_episode_goes_on_in_the_next_file_and_files_are_counted_one_by_one(serve, healthy, tmp_path, capsys):
    running = serve(policy=(str(healthy),), record=tmp_path / "flight")
    running.server.recorder._file_bytes = 24_000  # what an almost empty file takes
    calls = fly(running)
    files = files_of(tmp_path / "flight")
    assert len(files) > 1
    assert main([str(tmp_path / "flight"), "--policy", str(healthy)]) == 0
    out = capsys.readouterr().out
    assert f"{calls} the same" in out
    assert all(f"{file}: " in out for file in files)


def test_without_its_start_an_episode_is_skipped(recording, healthy, capsys):
    path = edited(recording, lambda response: None, drop=(pb.FlightStart,))
    assert main([str(path), "--policy", str(healthy)]) == 0
    out = capsys.readouterr().out
    assert "5 the same, 0 different, 12 skipped" in out
    assert "skipped 12 in episodes whose start is not in the recording" in out


def test_a_file_that_was_cut_is_compared_as_far_as_it_goes(recording, healthy, capsys):
    (file,) = files_of(recording)
    content = file.read_bytes()
    file.write_bytes(content[: content.rindex(b"lz4", 0, len(content) // 4)])
    assert main([str(file), "--policy", str(healthy)]) == 0
    assert " 0 different, 0 skipped" in capsys.readouterr().out


def test_a_file_that_the_recorder_removes_meanwhile_is_left_out(recording, healthy, capsys, monkeypatch):
    monkeypatch.setattr("serving.replay.files_of", lambda path: [path / "gone.mcap", *files_of(path)])
    assert main([str(recording), "--policy", str(healthy)]) == 0
    out = capsys.readouterr().out
    assert "gone.mcap: removed meanwhile" in out
    assert "17 the same" in out


@pytest.mark.parametrize("case", ["no policy", "no file", "damaged", "no recording", "no threads"])
def test_what_cannot_be_carried_out_exits_with_2(recording, healthy, capsys, case):
    (file,) = files_of(recording)
    arguments = [str(recording), "--policy", str(healthy)]
    if case == "no policy":
        arguments, said = [str(recording)], "nothing could be compared"
    elif case == "no file":
        arguments, said = [str(recording), "--policy", "nowhere.onnx"], "refused nowhere.onnx"
    elif case == "damaged":
        content = bytearray(file.read_bytes())
        content[100] ^= 1
        file.write_bytes(content)
        said = str(file)
    elif case == "no recording":
        arguments, said = ["nowhere", *arguments[1:]], "nowhere: expected a flight recording"
    else:
        arguments, said = [*arguments, "--intra-op-threads", "0"], "--intra-op-threads: expected at least 1, got 0"
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_it_needs_neither_training_nor_a_simulator():
    code = "import sys, serving.replay; print({'torch', 'pybullet', 'training', 'sim_client'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert done.stdout == "set()\n"


def test_help_teaches_with_an_example(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert "Example: " in capsys.readouterr().out
