"""Episodes: a pinned policy, steps answered once and in order, limits of their own."""

import contextlib
import json
import logging
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import grpc
import numpy as np
import pytest

from protos.codec import pack_observation, unpack_action
from protos.equiserve.v1 import policy_pb2 as pb
from protos.errors import Rejected, Status
from protos.spaces import ACTION, SPEC, Pose
from serving.parsing import SHORT_BYTES
from serving.past import FARTHEST, Past
from serving.sessions import SPARED_S, WAITING, Sessions
from tests.makers import far_scene, small_spec, tiny_policy_file
from tests.serving.requests import acting, refusal
from tests.serving.test_dispatcher import until


@pytest.fixture
def episode(running):
    """(stub, id of a new episode)"""
    started = running.stub.StartEpisode(pb.StartEpisodeRequest())
    yield running.stub, started.episode_id
    running.server.sessions.end(started.episode_id, 1.0)


def test_an_episode_says_what_it_pinned(running):
    started = running.stub.StartEpisode(
        pb.StartEpisodeRequest(contract=small_spec().to_json(), limits={"planar": 0.02})
    )
    assert (started.policy, started.version) == ("tiny", running.policy.version)
    assert started.contract_digest == small_spec().digest
    assert started.limits["planar"] == pytest.approx(0.02)
    assert started.limits["lift"] == pytest.approx(0.05)
    assert running.stub.EndEpisode(pb.EndEpisodeRequest(episode_id=started.episode_id)).steps == 0


def test_a_repeat_gets_the_same_bytes_and_asks_the_model_once(episode, running):
    stub, id_ = episode
    before = running.runs
    first = stub.GetAction(acting(1, episode_id=id_, step=0))
    again = stub.GetAction(acting(1, episode_id=id_, step=0, age_us=30_000))
    assert first.SerializeToString() == again.SerializeToString()
    assert running.runs == before + 1


def test_an_older_step_is_refused(episode):
    stub, id_ = episode
    stub.GetAction(acting(1, episode_id=id_, step=5))
    code, parts = refusal(stub.GetAction, acting(2, episode_id=id_, step=4))
    assert (code, parts["field"], parts["got"]) == ("OUT_OF_RANGE", "step", "4")
    stub.GetAction(acting(2, episode_id=id_, step=9))


def test_another_frame_under_the_same_step_is_refused(episode):
    stub, id_ = episode
    stub.GetAction(acting(1, episode_id=id_, step=5))
    code, parts = refusal(stub.GetAction, acting(2, episode_id=id_, step=5))
    assert (code, parts["field"]) == ("FAILED_PRECONDITION", "step")
    assert "depth" in parts["got"]


def test_a_repeat_keeps_to_the_contract_and_shows_the_same_pose(episode):
    stub, id_ = episode
    stub.GetAction(acting(1, episode_id=id_, step=5))
    code, parts = refusal(stub.GetAction, acting(1, episode_id=id_, step=5, contract_digest="another"))
    assert (code, parts["field"], parts["got"]) == ("FAILED_PRECONDITION", "contract_digest", "'another'")
    assert "another contract than you mean" in parts["remedy"]
    code, parts = refusal(stub.GetAction, acting(1, episode_id=id_, step=5, pose=Pose(0, 0, 0, 0)))
    assert (code, parts["field"], parts["got"]) == ("FAILED_PRECONDITION", "step", "another pose")


def test_a_step_that_failed_was_not_taken(episode):
    stub, id_ = episode
    assert refusal(stub.GetAction, acting(1, episode_id=id_, step=1, age_us=10**9))[0] == "OUT_OF_RANGE"
    stub.GetAction(acting(1, episode_id=id_, step=1))
    stub.GetAction(acting(2, episode_id=id_, step=2))


def test_doubles_that_race_get_one_answer(episode, running):
    stub, id_ = episode
    for step in range(30):
        before = running.runs
        calls = [stub.GetAction.future(acting(step, episode_id=id_, step=step)) for _ in range(2)]
        first, second = (call.result() for call in calls)
        assert first.SerializeToString() == second.SerializeToString()
        assert running.runs == before + 1


def test_an_episode_keeps_few_threads_waiting(serve, healthy):
    """Or its calls would take all threads, and health and other robots wait for them."""
    running = serve(policy=(str(healthy),))
    id_ = running.stub.StartEpisode(pb.StartEpisodeRequest()).episode_id
    episode = running.server.sessions.get(id_)
    with episode._turn:  # the call before takes long
        calls = [running.stub.GetAction.future(acting(0, episode_id=id_), timeout=20) for _ in range(40)]
        until(lambda: sum(not call.done() for call in calls) <= 1 + WAITING)
        waiting = [call for call in calls if not call.done()]
        assert {call.code() for call in calls if call.done()} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert [call.result().policy for call in waiting] == [running.policy.name] * (1 + WAITING)


@pytest.mark.parametrize(
    "settled", [{"policy": "tiny"}, {"mode": pb.MODE_SAMPLE}, {"mode": pb.MODE_GREEDY}, {"seed": 4}], ids=str
)
def test_what_was_settled_may_be_repeated_and_not_changed(running, settled):
    other = {"policy": "other", "mode": pb.MODE_GREEDY + pb.MODE_SAMPLE - settled.get("mode", 0), "seed": 5}
    started = running.stub.StartEpisode(pb.StartEpisodeRequest(**settled))
    running.stub.GetAction(acting(1, episode_id=started.episode_id, step=1, **settled))
    changed = {name: other[name] for name in settled}
    code, parts = refusal(running.stub.GetAction, acting(2, episode_id=started.episode_id, step=2, **changed))
    assert (code, parts["field"]) == ("FAILED_PRECONDITION", next(iter(settled)))


def test_an_episode_keeps_its_version(serve, healthy, tmp_path):
    newer = tiny_policy_file(tmp_path / "newer.onnx", weight=1.5)
    running = serve(policy=(f"door={healthy}", f"door={newer}"))
    old, new = (p.version for p in running.server.registry)
    pinned = running.stub.StartEpisode(pb.StartEpisodeRequest(version=old)).episode_id
    running.server.registry.remove("door", old)
    assert running.stub.GetAction(acting(1, episode_id=pinned, step=1)).version == old
    assert running.stub.GetAction(acting(1)).version == new


def test_another_contract_is_refused_by_the_field_that_differs(running):
    code, parts = refusal(running.stub.StartEpisode, pb.StartEpisodeRequest(contract=SPEC.to_json()))
    assert (code, parts["field"]) == ("FAILED_PRECONDITION", "contract.observation.height")


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        (pb.StartEpisodeRequest(contract="{"), "contract"),
        (pb.StartEpisodeRequest(contract="[]"), "contract"),
        (pb.StartEpisodeRequest(contract="[" * 100_000), "contract"),
        (pb.StartEpisodeRequest(contract=SPEC.to_json().replace("0.05", "1" + "0" * 400)), "contract"),
        (pb.StartEpisodeRequest(contract=small_spec().to_json().replace('"rad"', '"\\ud800"')), "contract"),
        (pb.StartEpisodeRequest(contract=small_spec().to_json().replace('"rad"', "NaN")), "contract"),
        (pb.StartEpisodeRequest(contract=small_spec().to_json().replace('"rad"', "[" * 900 + "]" * 900)), "contract"),
        (pb.StartEpisodeRequest(mode=9), "mode"),
        (pb.StartEpisodeRequest(policy="other"), "policy"),
        (pb.StartEpisodeRequest(version="other"), "version"),
        (pb.StartEpisodeRequest(limits={"planar": 1.0}), "limits['planar']"),
        (pb.StartEpisodeRequest(limits={"planar": float("nan")}), "limits['planar']"),
        (pb.StartEpisodeRequest(limits={"speed": 1.0}), "limits['speed']"),
    ],
)
def test_a_start_that_makes_no_sense_is_refused(running, asked, field):
    assert refusal(running.stub.StartEpisode, asked)[1]["field"] == field


def test_a_contract_cannot_be_made_to_fill_the_log(running, caplog):
    """Every number of an axis was told twice, and the log had them all."""
    long_axes = {"row_axis": [-1, 0, *[0] * 9000], "col_axis": [0, -1, *[0] * 9000]}
    for changed in (long_axes, {"gripper": "held" * 9000}, {"gripper": "held" * 900_000}):
        contract = json.loads(small_spec().to_json())
        contract["observation"] |= changed
        text = json.dumps(contract, separators=(",", ":"))
        with caplog.at_level(logging.INFO):
            field = refusal(running.stub.StartEpisode, pb.StartEpisodeRequest(contract=text))[1]["field"]
            assert field == ("contract" if len(text) < SHORT_BYTES else "request")
    assert all(len(record.getMessage()) < 2000 for record in caplog.records)


def test_limits_of_an_episode_hold_in_it_alone(serve, tmp_path):
    wild = tiny_policy_file(tmp_path / "p.onnx", breaks=["wild"], golden_from="broken")
    running = serve(policy=(str(wild),))
    limits = {"planar": 0.01, "jump_m": 0.002, "jump_rad": 0.01}
    id_ = running.stub.StartEpisode(pb.StartEpisodeRequest(limits=limits)).episode_id
    before = None
    for step in range(12):
        answer = running.stub.GetAction(acting(step, episode_id=id_, step=step))
        action = unpack_action(answer.action, ACTION).astype(float)
        assert np.hypot(*action[1:3]) <= 0.01 + 1e-8
        if before is not None:
            assert np.linalg.norm(action[1:4] - before[1:4]) <= 0.002 + 1e-8
            assert abs(action[4] - before[4]) <= 0.01 + 1e-8
        before = action
    free = unpack_action(running.stub.GetAction(acting(1)).action, ACTION)
    assert np.hypot(*free[1:3]) > 0.01


JUMP_M = 0.002


def planar(answer):
    return unpack_action(answer.action, ACTION)[1:3].astype(float)


@pytest.mark.parametrize(
    ("told", "from_rest"),
    [({}, False), ({"applied_step": 2}, False), ({"applied_step": 1}, True), ({"at_rest": True}, True)],
    ids=["nothing told", "applied", "not applied", "at rest"],
)
def test_a_jump_counts_from_what_the_arm_did(serve, tmp_path, told, from_rest):
    wild = tiny_policy_file(tmp_path / "p.onnx", breaks=["wild"], golden_from="broken")
    running = serve(policy=(str(wild),))
    id_ = running.stub.StartEpisode(pb.StartEpisodeRequest(limits={"jump_m": JUMP_M})).episode_id
    first, second = (running.stub.GetAction(acting(step, episode_id=id_, step=step)) for step in (1, 2))
    assert np.hypot(*planar(first)) > 2 * JUMP_M
    third = running.stub.GetAction(acting(3, episode_id=id_, step=3, **told))
    start = np.zeros(2) if from_rest else planar(second)
    assert np.linalg.norm(planar(third) - start) <= JUMP_M * (1 + 1e-6)
    assert (np.hypot(*planar(third)) <= JUMP_M * (1 + 1e-6)) == from_rest


def test_a_command_that_was_not_carried_out_is_not_kept_in_a_hold(serve, tmp_path):
    """A hand that holds something, and was told to open half: it keeps what it holds, as the observation says."""
    breaks = tiny_policy_file(tmp_path / "p.onnx", breaks=["nan_when_far"], golden_from="broken")
    running = serve(policy=(str(breaks),))
    held = {}
    for applied in (1, 0):
        id_ = running.stub.StartEpisode(pb.StartEpisodeRequest()).episode_id
        command = running.stub.GetAction(acting(1, episode_id=id_, step=1)).action.p
        observation = pack_observation(replace(far_scene(), gripper=1.0))
        far = pb.GetActionRequest(observation=observation, episode_id=id_, step=2, applied_step=applied)
        answer = running.stub.GetAction(far)
        assert answer.hold
        held[applied] = answer.action.p
    assert held == {1: command, 0: 0.0}
    assert command != 0.0


def test_a_hold_keeps_the_last_command_that_was_carried_out(serve, tmp_path):
    """Though what came after it was denied, and though the observation says that nothing is held."""
    breaks = tiny_policy_file(tmp_path / "p.onnx", breaks=["nan_when_far"], golden_from="broken")
    running = serve(policy=(str(breaks),))
    id_ = running.stub.StartEpisode(pb.StartEpisodeRequest()).episode_id
    commands = [
        running.stub.GetAction(acting(step, episode_id=id_, step=step, applied_step=applied)).action.p
        for step, applied in ((1, 0), (2, 1), (3, 2), (4, 2), (5, 2))
    ]
    far = pb.GetActionRequest(observation=pack_observation(far_scene()), episode_id=id_, step=6, applied_step=2)
    answer = running.stub.GetAction(far)
    assert answer.hold
    assert answer.action.p == commands[1] != 1.0
    assert len(set(commands)) == 5


def test_steps_that_say_nothing_can_be_denied_further_back(serve, tmp_path):
    """By a controller that speaks up only when its answers have come too late: the hand keeps what it holds."""
    breaks = tiny_policy_file(tmp_path / "p.onnx", breaks=["nan_when_far"], golden_from="broken")
    running = serve(policy=(str(breaks),))
    id_ = running.stub.StartEpisode(pb.StartEpisodeRequest()).episode_id
    commands = [running.stub.GetAction(acting(step, episode_id=id_, step=step)).action.p for step in (1, 2, 3)]
    far = pb.GetActionRequest(observation=pack_observation(far_scene()), episode_id=id_, step=4, applied_step=1)
    answer = running.stub.GetAction(far)
    assert (answer.hold, answer.action.p) == (True, commands[0])


def test_of_an_episode_whose_steps_say_nothing_few_answers_are_kept():
    past = Past()
    for step in range(1, 1000):
        past.answered(pb.GetActionRequest(step=step), np.zeros(5, np.float32))
    assert len(past._answered) == FARTHEST
    past.answered(pb.GetActionRequest(step=1000, applied_step=999), np.zeros(5, np.float32))
    assert [step for step, _ in past._answered] == [999, 1000]


@pytest.mark.parametrize("claimed", [2, 3])
def test_what_was_denied_cannot_be_claimed_later(running, claimed):
    """As by a controller that asks before it has applied the answer before."""
    id_ = running.stub.StartEpisode(pb.StartEpisodeRequest()).episode_id
    for step, applied in ((1, 0), (2, 1), (4, 1)):
        running.stub.GetAction(acting(step, episode_id=id_, step=step, applied_step=applied))
    code, parts = refusal(running.stub.GetAction, acting(5, episode_id=id_, step=5, applied_step=claimed))
    assert (code, parts["field"]) == ("INVALID_ARGUMENT", "applied_step")
    assert running.stub.GetAction(acting(5, episode_id=id_, step=5, applied_step=4)).policy


@pytest.mark.parametrize("told", [{"at_rest": True}, {"applied_step": 0}, {"applied_step": 3}])
def test_a_retry_says_the_same_of_the_arm(running, told):
    """Or the first try's motion would be applied to an arm that has come to rest since."""
    id_ = running.stub.StartEpisode(pb.StartEpisodeRequest()).episode_id
    first = acting(1, episode_id=id_, step=4)
    answer = running.stub.GetAction(first)
    code, parts = refusal(running.stub.GetAction, acting(1, episode_id=id_, step=4, **told))
    assert (code, parts["field"]) == ("FAILED_PRECONDITION", next(iter(told)))
    assert running.stub.GetAction(first) == answer


@pytest.mark.parametrize("applied", [2, 3, 2**64 - 1])
def test_what_was_applied_came_before(running, applied):
    id_ = running.stub.StartEpisode(pb.StartEpisodeRequest()).episode_id
    code, parts = refusal(running.stub.GetAction, acting(1, episode_id=id_, step=2, applied_step=applied))
    assert (code, parts["field"]) == ("INVALID_ARGUMENT", "applied_step")
    assert running.stub.GetAction(acting(1, episode_id=id_, step=2, applied_step=1)).policy


@pytest.mark.parametrize("outcome", [0, pb.EndEpisodeRequest.OUTCOME_SUCCESS])
def test_an_episode_ends_once(running, outcome):
    id_ = running.stub.StartEpisode(pb.StartEpisodeRequest()).episode_id
    running.stub.GetAction(acting(1, episode_id=id_, step=1))
    assert running.stub.EndEpisode(pb.EndEpisodeRequest(episode_id=id_, outcome=outcome)).steps == 1
    for method, message in (
        (running.stub.EndEpisode, pb.EndEpisodeRequest(episode_id=id_)),
        (running.stub.GetAction, acting(1, episode_id=id_, step=2)),
    ):
        assert refusal(method, message)[0] == "NOT_FOUND"


def test_of_two_calls_that_end_an_episode_at_once_one_is_too_late(policy):
    """Or its end would be recorded twice."""
    sessions = Sessions(limit=1, idle_s=60.0)
    episode = sessions.start(policy, None, 0, 0)
    both, lock = threading.Barrier(2), threading.Lock()

    class Slow:
        """A lock that is left when both have had it."""

        def __enter__(self):
            lock.acquire()

        def __exit__(self, *_error):
            lock.release()
            with contextlib.suppress(threading.BrokenBarrierError):
                both.wait(0.5)

    sessions._lock = Slow()

    def end(_):
        try:
            return sessions.end(episode.id, 5.0)
        except Rejected as refused:
            return refused.status

    with ThreadPoolExecutor(2) as pool:
        assert set(pool.map(end, range(2))) == {0, Status.NOT_FOUND}


def test_an_end_waits_for_the_step_under_way(serve, healthy):
    """Or a recording would have the end before the last step, and the episode would be taken for one with a gap."""
    running = serve(policy=(str(healthy),))
    id_ = running.stub.StartEpisode(pb.StartEpisodeRequest()).episode_id
    episode, end = running.server.sessions.get(id_), pb.EndEpisodeRequest(episode_id=id_)
    with episode._turn:  # as while the model is asked
        with pytest.raises(grpc.RpcError) as too_long:
            running.stub.EndEpisode(end, timeout=0.3)
        assert too_long.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        ending = running.stub.EndEpisode.future(end, timeout=20)
        with pytest.raises(grpc.FutureTimeoutError):
            ending.result(0.2)
        late = running.stub.GetAction.future(acting(1, episode_id=id_, step=2), timeout=20)
        episode.steps += 1
    assert ending.result().steps == 1 + (late.exception() is None)
    assert refusal(running.stub.GetAction, acting(1, episode_id=id_, step=3))[0] == "NOT_FOUND"


def test_who_starts_episodes_and_dies_locks_nobody_out(policy):
    sessions = Sessions(limit=3, idle_s=600.0)
    open_ = [sessions.start(policy, None, 0, 0) for _ in range(3)]
    for episode, idle_s in zip(open_, (29.0, 25.0, 0.0), strict=True):
        episode.touched -= idle_s
    with pytest.raises(Rejected) as refused:
        sessions.start(policy, None, 0, 0)
    assert refused.value.status is Status.RESOURCE_EXHAUSTED
    open_[1].touched -= 10.0
    sessions.start(policy, None, 0, 0)
    assert [sessions.get(open_[i].id) for i in (0, 2)] == [open_[0], open_[2]]
    with pytest.raises(Rejected, match="made room"):
        sessions.get(open_[1].id)


def test_an_episode_lives_as_long_as_it_is_called(serve, healthy):
    running = serve(policy=(str(healthy),), max_episodes=1)
    id_ = running.stub.StartEpisode(pb.StartEpisodeRequest()).episode_id
    running.server.sessions.get(id_).touched -= SPARED_S
    running.stub.GetAction(acting(1, episode_id=id_, step=1))
    assert refusal(running.stub.StartEpisode, pb.StartEpisodeRequest())[0] == "RESOURCE_EXHAUSTED"
    running.stub.GetAction(acting(2, episode_id=id_, step=2))


def test_episodes_are_bounded_and_idle_ones_forgotten(serve, healthy):
    running = serve(policy=(str(healthy),), max_episodes=3, episode_idle_s=1.0)
    ids = [running.stub.StartEpisode(pb.StartEpisodeRequest()).episode_id for _ in range(3)]
    assert refusal(running.stub.StartEpisode, pb.StartEpisodeRequest())[0] == "RESOURCE_EXHAUSTED"
    for episode in map(running.server.sessions.get, ids[:2]):
        episode.touched -= 1.0
    assert running.stub.GetStats(pb.GetStatsRequest()).open_episodes == 1
    assert refusal(running.stub.GetAction, acting(1, episode_id=ids[0], step=1))[0] == "NOT_FOUND"
    running.stub.GetAction(acting(1, episode_id=ids[2], step=1))
    assert running.stub.StartEpisode(pb.StartEpisodeRequest()).episode_id not in ids


def calls_on_a_bad_network(steps, rng):
    """(step, how it travels): 1 % each are lost, doubled, swapped with the next, or late by several steps."""
    queue, late = [], []
    for step in range(steps):
        fate = rng.choices(("fine", "lost", "doubled", "late"), (97, 1, 1, 1))[0]
        if fate == "late":
            late.append((step, step + rng.randint(2, 5)))
        elif fate != "lost":
            queue += [step] * (2 if fate == "doubled" else 1)
        queue += [old for old, due in late if due == step]
        if len(queue) > 1 and rng.random() < 0.01:
            queue[-1], queue[-2] = queue[-2], queue[-1]
    return queue


def test_a_bad_network_brings_nothing_stale_doubled_or_swapped(serve, healthy, policy):
    running = serve(policy=(str(healthy),), queue=8, max_wait_ms=1000.0)  # four callers, however slow the machine
    assert bad_network(running, policy, 1000) == (0, 0, 0)


def bad_network(running, policy, steps):
    """How many answers were stale (an older step accepted), doubled (computed twice) or swapped (another's)."""
    from tests.makers import scene

    scenes = 16
    expected = [policy.act(scene(seed)).action for seed in range(scenes)]
    stale = doubled = swapped = 0
    lock = threading.Lock()

    def drive(seed):
        nonlocal stale, doubled, swapped
        id_ = running.stub.StartEpisode(pb.StartEpisodeRequest()).episode_id
        newest, answers = -1, {}
        rng = random.Random(seed)
        for step in calls_on_a_bad_network(steps // 4, rng):
            request = acting((step + seed) % scenes, episode_id=id_, step=step)
            if step < newest:
                try:
                    running.stub.GetAction(request)
                    with lock:
                        stale += 1
                except grpc.RpcError as refused:
                    if refused.code() is not grpc.StatusCode.OUT_OF_RANGE:
                        raise
                continue
            if step > newest and rng.random() < 0.01:  # its answer is lost, on the way or before there was one
                running.stub.GetAction.future(request).cancel()
            answer = running.stub.GetAction(request)
            right = np.allclose(unpack_action(answer.raw_action, ACTION), expected[(step + seed) % scenes], atol=1e-6)
            with lock:
                swapped += not right
                doubled += answers.setdefault(step, answer.request_id) != answer.request_id
            newest = step
        taken = running.stub.EndEpisode(pb.EndEpisodeRequest(episode_id=id_)).steps
        with lock:
            doubled += taken != len(answers)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(drive, range(4)))
    return stale, doubled, swapped
