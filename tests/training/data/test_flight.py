"""What a robot did today is a dataset tomorrow: from flight recordings to what training loads."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from protos.codec import pack_action, pack_observation, unpack_action
from protos.equiserve.v1 import policy_pb2 as pb
from protos.errors import Rejected
from protos.spaces import ACTION, Observation
from serving.flight import FlightFile, files_of
from sim_client import store
from tests.makers import scene, small_spec, tiny_policy_file
from tests.serving.conftest import start
from training.data.__main__ import main
from training.data.dataset import load
from training.data.formats.flight import read_labels

Outcome = pb.EndEpisodeRequest
SPEC = small_spec()
INFO = pb.PolicyInfo(
    name="tiny", version="0123456789ab", contract=SPEC.to_json(), contract_digest=SPEC.digest, task="reach_far"
)
OTHER = pb.PolicyInfo(
    name="other", version="ba9876543210", contract=SPEC.to_json(), contract_digest=SPEC.digest, task="stack"
)


class Tape:
    """Writes a recording message by message, as no server would."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.file = FlightFile(folder / "flight.mcap")
        self.put(pb.FlightPolicy(policy=INFO))

    def put(self, message: Any) -> None:
        self.file.write(message, 1)

    def begin(self, episode: str, info: pb.PolicyInfo = INFO) -> None:
        acts = pb.StartEpisodeResponse(episode_id=episode, policy=info.name, version=info.version)
        self.put(pb.FlightStart(response=acts))

    def act(
        self,
        episode: str,
        step: int,
        info: pb.PolicyInfo = INFO,
        depth_m: float = 0.3,
        applied: int | None = None,
        **encoding: Any,
    ) -> None:
        """A frame and an action that tell which step they are of."""
        seen = Observation(np.full(SPEC.observation.shape, depth_m + step / 1000, np.float32), 0.0)
        did = np.array([1, step / 1000, 0, 0, 0], np.float32)
        answer = pb.GetActionResponse(action=pack_action(did, ACTION), policy=info.name, version=info.version)
        observation = pack_observation(seen, **encoding)
        asked = pb.GetActionRequest(observation=observation, episode_id=episode, step=step, applied_step=applied)
        self.put(pb.FlightAction(request=asked, response=answer))

    def end(self, episode: str, outcome: Outcome.Outcome, steps: int, applied: int | None = None) -> None:
        asked = Outcome(episode_id=episode, outcome=outcome, applied_step=applied)
        self.put(pb.FlightEnd(request=asked, response=pb.EndEpisodeResponse(steps=steps)))

    def episode(self, name: str, outcome: Outcome.Outcome, steps: int = 3, info: pb.PolicyInfo = INFO) -> None:
        self.begin(name, info)
        for step in range(steps):
            self.act(name, step, info)
        self.end(name, outcome, steps)


@pytest.fixture
def tape(tmp_path: Path) -> Tape:
    return Tape(tmp_path / "flight")


def imported(tape: Tape, *flags: str) -> store.About:
    assert main(["import", str(tape.folder), "--output", str(tape.folder.parent / "set"), *flags]) == 0
    return store.read_about(tape.folder.parent / "set")


def lengths(tape: Tape) -> list[tuple[int, bool]]:
    return [(len(e), e.success) for e in store.read(tape.folder.parent / "set")]


def robot(stub: Any, seed: int, outcome: Outcome.Outcome, steps: int = 5) -> tuple[list[Any], list[Any]]:
    """An episode as a controller flies it: its observations and the actions that it was answered."""
    id_ = stub.StartEpisode(pb.StartEpisodeRequest(limits={"planar": 0.01})).episode_id
    seen, did = [], []
    for step in range(steps):
        observation = scene(100 * seed + step, gripper=float(step % 2))
        request = pb.GetActionRequest(observation=pack_observation(observation), episode_id=id_, step=2 * step)
        for _ in range(2):  # every step is tried again
            answer = stub.GetAction(request)
        seen.append(observation)
        did.append(unpack_action(answer.action, ACTION))
    stub.GetAction(pb.GetActionRequest(observation=request.observation))
    stub.EndEpisode(pb.EndEpisodeRequest(episode_id=id_, outcome=outcome))
    return seen, did


def test_what_robots_did_is_what_training_loads(tmp_path: Path, capsys, caplog) -> None:
    """Four robots at the same time, files that end in the middle of episodes, tight limits, and steps tried again."""
    recording, output = tmp_path / "flight", tmp_path / "set"
    policy = tiny_policy_file(tmp_path / "p.onnx", breaks=["wild"], golden_from="broken")
    running = start(policy=(f"tiny={policy}",), listen="localhost:0", record=recording, queue=8, max_wait_ms=10_000)
    assert running.server.recorder is not None
    running.server.recorder._file_bytes = 30_000
    outcomes = [Outcome.OUTCOME_SUCCESS, Outcome.OUTCOME_FAILURE, Outcome.OUTCOME_SUCCESS, Outcome.OUTCOME_ABORTED]
    with ThreadPoolExecutor(4) as pool:
        flown = list(pool.map(lambda i: robot(running.stub, i, outcomes[i]), range(4)))
    running.channel.close()
    running.server.stop()
    assert len(files_of(recording)) > 1

    assert main(["import", str(recording), "--format", "flight", "--output", str(output)]) == 0
    told = capsys.readouterr()
    assert told.out == f"{output}: 4 episodes, 18 transitions, 2 successful\n"
    assert caplog.messages == [f"{recording}: left out: 4 actions outside an episode"]

    by_first_frame = {e.depth[0].tobytes(): e for e in store.read(output)}
    for (seen, did), outcome in zip(flown, outcomes, strict=True):
        episode, success = by_first_frame[seen[0].depth.tobytes()], outcome == Outcome.OUTCOME_SUCCESS
        kept = 5 if success else 4
        np.testing.assert_array_equal(episode.depth[:5], [o.depth for o in seen])
        np.testing.assert_array_equal(episode.gripper[:5, 0], [o.gripper for o in seen])
        np.testing.assert_array_equal(episode.action, did[:kept])
        assert episode.reward.tolist() == [0.0] * (kept - 1) + [float(success)]
        assert (episode.terminated, episode.truncated) == (success, not success)
        assert episode.behavior == f"policy:tiny@{running.policy.version}"

    data = load(output, successful_only=True)
    assert (data.spec, data.task, len(data)) == (SPEC, "tiny", 10)
    assert main(["validate", str(output)]) == 0


def test_what_was_not_applied_is_no_data(tape: Tape, caplog: pytest.LogCaptureFixture) -> None:
    """The robot stood still: the frame after is as good as the one before, and nothing was done in between."""
    tape.begin("a")
    for step, applied in ((1, 0), (2, 0), (3, 0), (5, 3), (6, 5), (7, 5), (8, 5), (9, 8), (10, 9)):
        tape.act("a", step, applied=applied)
    tape.end("a", Outcome.OUTCOME_SUCCESS, 9)
    about = imported(tape)
    (episode,) = store.read(tape.folder.parent / "set")
    np.testing.assert_allclose(episode.action[:, 1], [0.003, 0.005, 0.008, 0.009, 0.01], rtol=1e-6)
    np.testing.assert_allclose(episode.depth[:-1, 0, 0], [0.303, 0.305, 0.308, 0.309, 0.31], rtol=1e-6)
    assert about.notes["left_out"] == {"actions that were not applied": 4}
    assert "left out: 4 actions that were not applied" in caplog.text


def test_the_end_may_say_that_the_last_action_was_not_applied(tape: Tape) -> None:
    """The task was done before it: the success is that of the action before."""
    tape.begin("a")
    for step in (1, 2, 3):
        tape.act("a", step, applied=step - 1)
    tape.end("a", Outcome.OUTCOME_SUCCESS, 3, applied=2)
    imported(tape)
    (episode,) = store.read(tape.folder.parent / "set")
    np.testing.assert_allclose(episode.action[:, 1], [0.001, 0.002], rtol=1e-6)
    assert (episode.reward.tolist(), episode.terminated) == ([0.0, 1.0], True)


def test_an_episode_of_which_nothing_was_applied_is_left_out(tape: Tape) -> None:
    tape.episode("good", Outcome.OUTCOME_SUCCESS)
    tape.begin("a")
    for step in (1, 2, 3):
        tape.act("a", step, applied=0)
    tape.end("a", Outcome.OUTCOME_FAILURE, 3)
    assert imported(tape).notes["left_out"] == {"episodes without a whole transition": 1}
    assert lengths(tape) == [(3, True)]


def test_a_step_that_came_twice_is_one_step(tape: Tape) -> None:
    tape.begin("a")
    for step in (0, 1, 1, 0, 5):
        tape.act("a", step)
    tape.end("a", Outcome.OUTCOME_SUCCESS, 3)
    imported(tape)
    (episode,) = store.read(tape.folder.parent / "set")
    np.testing.assert_allclose(episode.action[:, 1], [0, 0.001, 0.005], rtol=1e-6)
    np.testing.assert_allclose(episode.depth[:, 0, 0], [0.3, 0.301, 0.305, 0.305], rtol=1e-6)


def test_labels_count_more_than_outcomes(tape: Tape) -> None:
    tape.episode("a", Outcome.OUTCOME_SUCCESS, 3)
    tape.episode("b", Outcome.OUTCOME_FAILURE, 4)
    tape.episode("0c", Outcome.OUTCOME_UNSPECIFIED, 5)
    tape.episode("d", Outcome.OUTCOME_SUCCESS, 6)
    labels = tape.folder / "labels.toml"
    labels.write_text("a = false\nb = true\n0c = true\n")
    about = imported(tape, "--labels", str(labels))
    assert lengths(tape) == [(2, False), (4, True), (5, True), (6, True)]
    assert (about.task, about.behavior) == ("reach_far", "policy:tiny")
    assert about.dataset_id == "equiserve/reach-far/flight-v0"


def test_episodes_without_a_label_are_refused_by_their_ids(tape: Tape, capsys: pytest.CaptureFixture[str]) -> None:
    tape.episode("a", Outcome.OUTCOME_SUCCESS)
    tape.episode("b", Outcome.OUTCOME_UNSPECIFIED)
    tape.begin("c")
    tape.act("c", 0)
    assert main(["import", str(tape.folder), "--output", str(tape.folder / "set")]) == 2
    told = "success: expected a label, got none for 2 of 3: b, c; import it with --labels FILE"
    assert told in capsys.readouterr().err
    assert not (tape.folder / "set").exists()
    assert main(["validate", str(tape.folder)]) == 2  # nothing is broken
    assert f"refused: {tape.folder}, {told}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("what", "expected"), [("skip", [(3, True)]), ("failure", [(3, True), (3, False)])], ids=["skip", "failure"]
)
def test_episodes_without_a_label_are_what_the_flag_says(
    tape: Tape, what: str, expected: list[tuple[int, bool]]
) -> None:
    tape.episode("a", Outcome.OUTCOME_SUCCESS, 3)
    tape.episode("b", Outcome.OUTCOME_UNSPECIFIED, 4)
    about = imported(tape, "--unlabelled", what)
    assert lengths(tape) == expected
    assert about.notes["left_out"] == ({"episodes without a label": 1} if what == "skip" else {})


def test_a_label_is_enough_for_an_episode_whose_server_was_killed(tape: Tape) -> None:
    tape.begin("a")
    for step in range(3):
        tape.act("a", step)
    (tape.folder / "labels.toml").write_text("a = true")
    imported(tape, "--labels", str(tape.folder / "labels.toml"))
    assert lengths(tape) == [(3, True)]


def test_a_gap_is_seen_also_where_the_end_is_missing(tape: Tape, caplog: pytest.LogCaptureFixture) -> None:
    tape.episode("whole", Outcome.OUTCOME_SUCCESS)
    for episode, steps in (("gap", (0, 1, 5, 6)), ("begins late", (3, 4, 5))):
        tape.begin(episode)
        for step in steps:
            tape.act(episode, step)
    (tape.folder / "labels.toml").write_text('gap = true\n"begins late" = true')
    imported(tape, "--labels", str(tape.folder / "labels.toml"))
    assert lengths(tape) == [(3, True), (3, True)]
    assert "1 episodes of which messages are missing" in caplog.text


def test_episodes_with_gaps_or_without_a_transition_are_left_out(tape: Tape, caplog: pytest.LogCaptureFixture) -> None:
    """Joined over a gap, two frames would be a transition that never was."""
    tape.episode("whole", Outcome.OUTCOME_SUCCESS)
    tape.begin("a message was dropped")
    for step in (0, 2):
        tape.act("a message was dropped", step)
    tape.end("a message was dropped", Outcome.OUTCOME_SUCCESS, 3)
    tape.act("its start is in a file that is gone", 7)
    tape.episode("nothing done", Outcome.OUTCOME_SUCCESS, 0)
    tape.episode("one step, and it failed", Outcome.OUTCOME_FAILURE, 1)
    imported(tape)
    assert lengths(tape) == [(3, True)]
    assert "2 episodes of which messages are missing, 2 episodes without a whole transition" in caplog.text


def test_policies_of_two_tasks_are_not_mixed(tape: Tape, capsys: pytest.CaptureFixture[str]) -> None:
    tape.put(pb.FlightPolicy(policy=OTHER))
    tape.episode("a", Outcome.OUTCOME_SUCCESS)
    tape.episode("b", Outcome.OUTCOME_SUCCESS, 5, info=OTHER)
    arguments = ["import", str(tape.folder), "--output", str(tape.folder.parent / "set")]
    assert main(arguments) == 2
    assert "choose when you import it: --policy NAME" in capsys.readouterr().err
    assert main(["validate", str(tape.folder)]) == 2  # nothing is broken
    assert main([*arguments, "--policy", "other"]) == 0
    assert lengths(tape) == [(5, True)]


def test_an_action_of_a_policy_that_nothing_describes_is_refused(
    tape: Tape, capsys: pytest.CaptureFixture[str]
) -> None:
    tape.episode("a", Outcome.OUTCOME_SUCCESS, info=OTHER)
    assert main(["import", str(tape.folder), "--output", str(tape.folder / "set")]) == 2
    assert "a policy that is not described" in capsys.readouterr().err


def test_a_depth_that_counts_round_beyond_the_range_is_on_its_edge(tape: Tape) -> None:
    """0.6 m in counts of 0.7 mm is 857 counts, 0.5999 m; in counts of 0.9 mm 667, 0.6003 m: the server takes both."""
    tape.begin("a")
    for step, scale in enumerate((0.0007, 0.0009)):
        tape.act("a", step, depth_m=0.6 - step / 1000, encoding=pb.Observation.UINT16, depth_scale=scale)
    tape.end("a", Outcome.OUTCOME_SUCCESS, 2)
    imported(tape)
    (episode,) = store.read(tape.folder.parent / "set")
    assert episode.depth[:, 0, 0].tolist() == [np.float32(857) * np.float32(0.0007), np.float32(0.6), np.float32(0.6)]


def test_a_damaged_recording_is_refused_by_the_file(tape: Tape, capsys: pytest.CaptureFixture[str]) -> None:
    tape.episode("a", Outcome.OUTCOME_SUCCESS)
    (file,) = files_of(tape.folder)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert main(["import", str(tape.folder), "--output", str(tape.folder / "set")]) == 2
    assert str(file) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [("a = 1", "a: expected true or false, got 1"), ("a = yes", "expected TOML"), (None, "No such file")],
)
def test_labels_that_are_none_are_refused(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "labels.toml").write_text(text)
    with pytest.raises(Rejected) as refused:
        read_labels(tmp_path / "labels.toml")
    assert said in str(refused.value)
    assert str(refused.value).startswith(f"--labels {tmp_path}")


@pytest.mark.parametrize("flags", [["--unlabelled", "skip"], ["--policy", "tiny"]])
def test_flags_of_recordings_are_refused_with_other_data(
    tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lab.npz").touch()
    assert main(["import", str(tmp_path / "lab.npz"), "--output", str(tmp_path / "set"), *flags]) == 2
    assert "is no flight recording" in capsys.readouterr().err


def test_every_command_tells_what_a_recording_has_that_it_leaves_out_once(tape: Tape, tmp_path: Path, caplog) -> None:
    for name in ("one", "two", "three"):
        tape.episode(name, Outcome.OUTCOME_SUCCESS)
    tape.act("", 0)
    tape.file.close()
    outputs = ["--output-a", str(tmp_path / "a"), "--output-b", str(tmp_path / "b")]
    for command in (["validate"], ["inspect"], ["split", "--share", "0.5", *outputs]):
        assert main([command[0], str(tape.folder), *command[1:]]) == 0
    assert caplog.text.count("left out: 1 actions outside an episode") == 1


def test_a_recording_is_inspected_like_any_dataset(tape: Tape, capsys: pytest.CaptureFixture[str]) -> None:
    tape.episode("a", Outcome.OUTCOME_SUCCESS)
    assert main(["inspect", str(next(iter(files_of(tape.folder))))]) == 0
    assert "1, 1 successful" in capsys.readouterr().out
