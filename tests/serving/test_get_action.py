"""GetAction over a real socket: what it answers, and that nothing invalid reaches the model."""

import gc
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import grpc
import numpy as np
import pytest
from grpc._server import _RPCState

from protos.codec import pack_observation, unpack_action
from protos.equiserve.v1 import policy_pb2 as pb
from protos.errors import Rejected
from protos.spaces import ACTION, Pose
from serving.parsing import Parser
from tests.makers import UNHURRIED_MS, far_scene, scene, small_spec, tiny_policy_file
from tests.serving.load import Vitals
from tests.serving.requests import acting, refusal

FLOAT32, MILLIMETRES, UINT16 = pb.Observation.FLOAT32_METERS, pb.Observation.UINT16_MILLIMETERS, pb.Observation.UINT16
SIZE = small_spec().observation.height
QUEUE = 4


def request(**changed):
    """A valid request, then changed; a key "observation_x" changes the observation's x."""
    message = pb.GetActionRequest(observation=pack_observation(scene(1)))
    for name, value in changed.items():
        target, field = (message.observation, name[12:]) if name.startswith("observation_") else (message, name)
        if isinstance(value, pb.Pose):
            getattr(target, field).CopyFrom(value)
        else:
            setattr(target, field, value)
    return message


def pixels(value=0.3, dtype="<f4", count=SIZE * SIZE, place=7):
    """Bytes of an image that is fine but for one pixel."""
    image = np.full(count, 0.3 if dtype == "<f4" else 300, dtype)
    image[place] = value
    return image.tobytes()


def counts(scale, value=300):
    return {
        "observation_encoding": UINT16,
        "observation_depth": pixels(value, "<u2"),
        "observation_depth_scale": scale,
    }


BAD = "INVALID_ARGUMENT"
MALFORMED = {
    "nothing at all": (pb.GetActionRequest(), BAD, "observation"),
    "no observation": (pb.GetActionRequest(policy="tiny"), BAD, "observation"),
    "empty observation": (pb.GetActionRequest(observation=pb.Observation()), BAD, "observation.encoding"),
    "no bytes": (request(observation_depth=b""), BAD, "observation.depth"),
    "one byte": (request(observation_depth=b"\0"), BAD, "observation.depth"),
    "a byte short": (request(observation_depth=pixels()[:-1]), BAD, "observation.depth"),
    "a byte long": (request(observation_depth=pixels() + b"\0"), BAD, "observation.depth"),
    "another image's size": (request(observation_depth=pixels(count=128 * 128)), BAD, "observation.depth"),
    "half as many bytes": (request(observation_depth=pixels(300, "<u2")), BAD, "observation.depth"),
    "floats called counts": (request(observation_encoding=MILLIMETRES), BAD, "observation.depth"),
    "no encoding": (request(observation_encoding=0), BAD, "observation.encoding"),
    "unknown encoding": (request(observation_encoding=4), BAD, "observation.encoding"),
    "negative encoding": (request(observation_encoding=-1), BAD, "observation.encoding"),
    "no height": (request(observation_height=0), BAD, "observation.height"),
    "no width": (request(observation_width=0), BAD, "observation.width"),
    "height off by one": (request(observation_height=SIZE + 1), BAD, "observation.height"),
    "width off by one": (request(observation_width=SIZE - 1), BAD, "observation.width"),
    "height and width that multiply right": (
        request(observation_height=SIZE * 2, observation_width=SIZE // 2),
        BAD,
        "observation.height",
    ),
    "largest height": (request(observation_height=2**32 - 1), BAD, "observation.height"),
    "NaN pixel": (request(observation_depth=pixels(np.nan)), BAD, "observation.depth"),
    "infinite pixel": (request(observation_depth=pixels(np.inf)), BAD, "observation.depth"),
    "minus infinity": (request(observation_depth=pixels(-np.inf)), BAD, "observation.depth"),
    "negative depth": (request(observation_depth=pixels(-0.01)), BAD, "observation.depth"),
    "depth beyond the range": (request(observation_depth=pixels(0.61)), BAD, "observation.depth"),
    "millimetres as metres": (request(observation_depth=pixels(300.0)), BAD, "observation.depth"),
    "big-endian": (request(observation_depth=np.full(SIZE * SIZE, 0.3, ">f4").tobytes()), BAD, "observation.depth"),
    "counts beyond the range": (request(**counts(1e-3, value=601)), BAD, "observation.depth"),
    "no depth scale": (request(**counts(0.0)), BAD, "observation.depth_scale"),
    "negative depth scale": (request(**counts(-1e-3)), BAD, "observation.depth_scale"),
    "NaN depth scale": (request(**counts(np.nan)), BAD, "observation.depth_scale"),
    "infinite depth scale": (request(**counts(np.inf)), BAD, "observation.depth_scale"),
    "overflowing depth scale": (request(**counts(3e38)), BAD, "observation.depth"),
    "NaN gripper": (request(observation_gripper=np.nan), BAD, "observation.gripper"),
    "infinite gripper": (request(observation_gripper=np.inf), BAD, "observation.gripper"),
    "gripper above one": (request(observation_gripper=1.001), BAD, "observation.gripper"),
    "negative gripper": (request(observation_gripper=-0.001), BAD, "observation.gripper"),
    "NaN pose": (request(observation_pose=pb.Pose(x=np.nan)), BAD, "observation.pose.x"),
    "infinite yaw": (request(observation_pose=pb.Pose(yaw=np.inf)), BAD, "observation.pose.yaw"),
    "unknown mode": (request(mode=9), BAD, "mode"),
    "unknown policy": (request(policy="other"), "NOT_FOUND", "policy"),
    "a path as policy": (request(policy="../policy.onnx"), "NOT_FOUND", "policy"),
    "a long policy": (request(policy="x" * 10_000), "NOT_FOUND", "policy"),
    "unknown version": (request(version="0" * 12), "NOT_FOUND", "version"),
    "another contract": (request(contract_digest="0" * 64), "FAILED_PRECONDITION", "contract_digest"),
    "negative mode": (request(mode=-1), BAD, "mode"),
    "an unknown episode": (request(episode_id="e1"), "NOT_FOUND", "episode_id"),
    "an episode with a control character": (request(episode_id="e1\n{}"), "NOT_FOUND", "episode_id"),
    "a long episode": (request(episode_id="x" * 10_000, step=3), "NOT_FOUND", "episode_id"),
    "a step without an episode": (request(step=3), BAD, "step"),
    "an applied step without an episode": (request(applied_step=3), BAD, "applied_step"),
    "a first applied step without an episode": (request(applied_step=0), BAD, "applied_step"),
    "the largest step": (request(step=2**64 - 1), BAD, "step"),
    "an old frame": (request(observation_age_us=round(UNHURRIED_MS * 1e3)), "OUT_OF_RANGE", "observation.age_us"),
    "the oldest frame": (request(observation_age_us=2**64 - 1), "OUT_OF_RANGE", "observation.age_us"),
    "a policy in other letters": (request(policy="TINY"), "NOT_FOUND", "policy"),
    "a policy with a space": (request(policy=" tiny"), "NOT_FOUND", "policy"),
    "a policy with a null": (request(policy="tiny\0"), "NOT_FOUND", "policy"),
    "a policy in another script": (request(policy="\u0442iny"), "NOT_FOUND", "policy"),
    "half a version": (request(version="0" * 6), "NOT_FOUND", "version"),
    "a version with a wildcard": (request(version="*"), "NOT_FOUND", "version"),
    "half a digest": (request(contract_digest=small_spec().digest[:32]), "FAILED_PRECONDITION", "contract_digest"),
    "a digest in capitals": (
        request(contract_digest=small_spec().digest.upper()),
        "FAILED_PRECONDITION",
        "contract_digest",
    ),
    "NaN pose y": (request(observation_pose=pb.Pose(y=np.nan)), BAD, "observation.pose.y"),
    "minus infinite z": (request(observation_pose=pb.Pose(z=-np.inf)), BAD, "observation.pose.z"),
    "every pixel NaN": (
        request(observation_depth=np.full(SIZE * SIZE, np.nan, "<f4").tobytes()),
        BAD,
        "observation.depth",
    ),
    "last pixel NaN": (request(observation_depth=pixels(np.nan, place=SIZE * SIZE - 1)), BAD, "observation.depth"),
    "a denormal below zero": (request(observation_depth=pixels(-1e-45)), BAD, "observation.depth"),
    "the largest float": (request(observation_depth=pixels(3.4e38)), BAD, "observation.depth"),
    "the largest count": (request(**counts(1e-3, value=65535)), BAD, "observation.depth"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_requests_are_refused_by_name_and_never_reach_the_model(running, case):
    message, code, field = MALFORMED[case]
    runs = running.runs
    with pytest.raises(grpc.RpcError) as refused:
        running.stub.GetAction(message, timeout=5)
    assert refused.value.code().name == code
    assert refused.value.details().startswith(f"{field}: expected ")
    assert len(refused.value.details()) < 500
    told, parts = refusal(running.stub.GetAction, message, timeout=5)
    assert (told, parts["field"]) == (code, field)
    assert running.runs == runs


def test_not_found_lists_what_there_is(running):
    with pytest.raises(grpc.RpcError, match="one of: tiny"):
        running.stub.GetAction(request(policy="other"))
    with pytest.raises(grpc.RpcError, match=f"one of: {running.policy.version}"):
        running.stub.GetAction(request(version="other"))


def test_a_request_that_is_too_large_is_refused(running):
    with pytest.raises(grpc.RpcError) as refused:
        running.stub.GetAction(request(observation_depth=bytes(5 * 1024 * 1024)))
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("gripper", [0.0, 1.0])
def test_the_answer_is_what_the_graph_says(running, policy, seed, gripper):
    observation = scene(seed, gripper=gripper)
    feeds = {"depth": observation.depth[None, None], "gripper": np.full((1, 1), gripper, np.float32)}
    action, std, value = policy.session.run(["action", "std", "value"], feeds)
    answer = running.stub.GetAction(pb.GetActionRequest(observation=pack_observation(observation)))
    np.testing.assert_allclose(unpack_action(answer.raw_action, ACTION), action[0], atol=1e-7)
    np.testing.assert_allclose(unpack_action(answer.std, ACTION), std[0], atol=1e-7)
    assert answer.value == pytest.approx(value[0])
    assert answer.action == answer.raw_action
    assert not answer.interventions


def test_the_answer_says_who_answered_and_for_how_long(running):
    answer = running.stub.GetAction(request())
    assert (answer.policy, answer.version) == ("tiny", running.policy.version)
    assert answer.contract_digest == small_spec().digest
    assert answer.valid_for_us == UNHURRIED_MS * 1e3
    older = running.stub.GetAction(request(observation_age_us=150_000))
    assert older.valid_for_us == answer.valid_for_us - 150_000
    assert answer.timing.inference_us > 0


@pytest.mark.parametrize(
    "named",
    [
        {"policy": "tiny"},
        {"contract_digest": small_spec().digest},
        {"mode": pb.MODE_GREEDY},
        {"observation_pose": pb.Pose(z=0.1)},
    ],
    ids=str,
)
def test_optional_fields_are_welcome(running, named):
    assert running.stub.GetAction(request(**named)).action == running.stub.GetAction(request()).action


@pytest.mark.parametrize("encoding", [MILLIMETRES, UINT16])
def test_counts_give_the_same_action_to_their_precision(running, encoding):
    exact = running.stub.GetAction(request())
    rounded = running.stub.GetAction(pb.GetActionRequest(observation=pack_observation(scene(1), encoding)))
    np.testing.assert_allclose(
        unpack_action(rounded.action, ACTION), unpack_action(exact.action, ACTION), atol=0.02 * ACTION.scale.max()
    )


def test_replies_are_never_swapped_between_threads(serve, healthy, policy):
    running = serve(policy=(str(healthy),), concurrency=3, queue=9, max_wait_ms=10_000.0)  # however slow the machine
    scenes = [scene(seed, gripper=float(seed % 2)) for seed in range(16)]
    expected = [policy.act(s).action for s in scenes]
    messages = [pb.GetActionRequest(observation=pack_observation(s)) for s in scenes]
    assert len({tuple(action) for action in expected}) == len(scenes)

    def check(start):
        for step in range(40):
            i = (start + step) % len(scenes)
            answer = running.stub.GetAction(messages[i])
            np.testing.assert_allclose(unpack_action(answer.action, ACTION), expected[i], atol=1e-6)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(check, range(8)))


def test_a_policy_without_a_critic_sends_no_value(serve, tmp_path):
    running = serve(policy=(str(tiny_policy_file(tmp_path / "p.onnx", with_value=False)),))
    assert not running.stub.GetAction(request()).HasField("value")
    assert not running.stub.GetPolicy(pb.GetPolicyRequest()).policy.has_value


def test_interventions_are_reported_and_nothing_else_changes(serve, tmp_path):
    running = serve(policy=(str(tiny_policy_file(tmp_path / "p.onnx", breaks=["wild"], golden_from="broken")),))
    answer = running.stub.GetAction(request())
    raw, action = unpack_action(answer.raw_action, ACTION), unpack_action(answer.action, ACTION)
    changed = {i.field for i in answer.interventions}
    assert "planar" in changed
    assert changed == {f.name for f, size in zip(ACTION.fields, ACTION.magnitudes(raw), strict=True) if size > 1}
    assert (ACTION.magnitudes(action) <= 1 + 1e-6).all()
    for intervention in answer.interventions:
        part = ACTION.slice_of(intervention.field)
        assert intervention.rule == "limit"
        np.testing.assert_array_equal(intervention.before, raw[part])
        np.testing.assert_array_equal(intervention.after, action[part])


@pytest.mark.parametrize("holding", [0.0, 1.0])
def test_a_nan_of_the_model_means_to_stay(serve, tmp_path, holding):
    running = serve(policy=(str(tiny_policy_file(tmp_path / "p.onnx", breaks=["nan_when_far"])),))
    seen = replace(far_scene(), gripper=holding)
    answer = running.stub.GetAction(pb.GetActionRequest(observation=pack_observation(seen)))
    assert answer.hold
    assert (answer.action.dx, answer.action.dy, answer.action.dz, answer.action.dtheta) == (0, 0, 0, 0)
    assert answer.action.p == 1 - holding
    assert {i.rule for i in answer.interventions} == {"not_finite"}
    assert not np.isfinite(unpack_action(answer.raw_action, ACTION)).all()
    assert not running.stub.GetAction(request()).hold


def test_an_unexpected_error_leaves_as_a_number_only(serve, healthy, monkeypatch, caplog):
    running = serve(policy=(str(healthy),))

    def fail(*_):
        raise RuntimeError("/secret/path of the server")

    monkeypatch.setattr(running.sessions["tiny"], "run", fail)
    with pytest.raises(grpc.RpcError) as refused:
        running.stub.GetAction(request())
    assert refused.value.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in refused.value.details()
    request_id = refused.value.details().split()[-1]
    assert request_id in caplog.text
    assert "/secret/path" in caplog.text


def test_workspace_needs_a_pose_and_shortens_the_motion(serve, healthy):
    running = serve(policy=(str(healthy),), workspace=(0.3, 0.7, -0.2, 0.2, 0.0, 0.5))
    with pytest.raises(grpc.RpcError, match=r"observation\.pose: expected a pose") as refused:
        running.stub.GetAction(request())
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    raw = unpack_action(running.stub.GetAction(request(observation_pose=pb.Pose(x=0.5, z=0.2))).action, ACTION)
    corner = Pose(0.7 if raw[1] > 0 else 0.3, 0.0, 0.2, 0.0)
    answer = running.stub.GetAction(pb.GetActionRequest(observation=pack_observation(scene(1), pose=corner)))
    assert [(i.field, i.rule) for i in answer.interventions] == [("planar", "workspace")]
    assert answer.action.dx == answer.action.dy == 0


@pytest.fixture
def held(serve, healthy, monkeypatch, request):
    """A server of one inference at a time that has begun and ends only when the event is set."""
    running = serve(policy=(str(healthy),), concurrency=1, queue=QUEUE + 1, **getattr(request, "param", {}))
    release, asked = threading.Event(), threading.Event()
    session = running.sessions["tiny"]
    run = session.run

    def wait_and_run(*args):
        asked.set()
        release.wait(10)
        return run(*args)

    monkeypatch.setattr(session, "run", wait_and_run)
    first = running.stub.GetAction.future(acting())
    assert asked.wait(5)
    yield running, first, release
    release.set()


def wait_until(condition, timeout_s=5.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def test_calls_beyond_the_queue_are_refused_at_once(held):
    running, first, release = held
    calls = [running.stub.GetAction.future(request()) for _ in range(QUEUE + 3)]
    wait_until(lambda: sum(call.done() for call in calls) == 3)
    assert {call.code() for call in calls if call.done()} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    release.set()
    assert sum(call.exception() is None for call in (first, *calls)) == 1 + QUEUE


def test_the_model_does_not_think_for_callers_who_left(held):
    running, first, release = held
    line = running.server.dispatcher
    impatient = running.stub.GetAction.future(request(), timeout=2)
    patient = running.stub.GetAction.future(request())
    wait_until(lambda: line.waiting == 2)
    in_line = time.monotonic()
    assert impatient.exception().code() is grpc.StatusCode.DEADLINE_EXCEEDED
    wait_until(lambda: line.waiting == 1)
    waited_us = 1e6 * (time.monotonic() - in_line)
    release.set()
    assert first.result().timing.inference_us > waited_us
    assert patient.result().timing.queue_us > waited_us
    assert running.runs == 2
    assert running.server.dispatcher.expired == 1


@pytest.mark.parametrize("held", [{"valid_for_ms": 3000.0}], indirect=True)
def test_a_frame_that_grows_too_old_in_the_line_never_reaches_the_model(held):
    running, first, release = held
    begun = time.monotonic()
    code, parts = refusal(running.stub.GetAction, acting(2, age_us=1_500_000), timeout=20)
    assert (code, parts["field"]) == ("OUT_OF_RANGE", "observation.age_us")
    assert 1.4 < time.monotonic() - begun < 9  # it waited as long as it could, and no longer
    release.set()
    assert first.result()
    assert (running.runs, running.server.dispatcher.expired) == (1, 1)


@pytest.mark.parametrize("held", [{"valid_for_ms": 900.0}], indirect=True)
def test_who_left_the_line_is_counted_as_he_left(held):
    """And not as he would have been told: the deadline is as long as a frame is valid, as serving.client has it."""
    running, first, release = held
    late = running.stub.GetAction.future(acting(2), timeout=0.9)
    left = running.stub.GetAction.future(acting(3), timeout=0.9)
    wait_until(lambda: running.server.dispatcher.waiting == 2)
    left.cancel()
    seen = late.exception().code().name
    wait_until(lambda: running.server.dispatcher.waiting == 0)
    release.set()
    first.exception()
    wait_until(lambda: sum(running.server.metrics.call_counts().values()) == 3)
    counts = running.server.metrics.call_counts()
    assert {code: n for (_, code), n in counts.items() if code != "OK"} == {"CANCELLED": 1, seen: 1}


@pytest.mark.parametrize("age_us", [0, 2_800_000])
def test_a_message_that_comes_late_makes_its_frame_older(serve, healthy, age_us):
    running = serve(policy=(str(healthy),), valid_for_ms=3000.0)
    running.stub.GetStats(pb.GetStatsRequest())  # connects
    path = "/equiserve.v1.PolicyService/GetAction"
    method = running.channel.stream_unary(path, response_deserializer=pb.GetActionResponse.FromString)

    def late():
        time.sleep(0.5 if age_us else 0.0)
        yield acting(1, age_us=age_us).SerializeToString()

    if age_us:
        code, parts = refusal(method, late(), timeout=10)
        assert (code, parts["field"], running.runs) == ("OUT_OF_RANGE", "observation.age_us", 0)
    else:
        assert method(late(), timeout=10).valid_for_us == 3_000_000


@pytest.fixture
def uncollected():
    """Refusals that only a collection would free, and with each the message that was refused."""
    gc.collect()
    gc.disable()
    before = {id(one) for one in _refusals()}
    yield lambda: [one for one in _refusals() if id(one) not in before]
    gc.enable()


def _refusals():
    """And what gRPC knows of a call."""
    return [one for one in gc.get_objects() if type(one) in (Rejected, _RPCState)]


@pytest.mark.parametrize("held", [{"valid_for_ms": 3000.0}], indirect=True)
def test_what_was_refused_is_freed_at_once(held, uncollected):
    running, first, release = held
    for refused in (
        pb.GetActionRequest(),
        acting(age_us=10_000_000),  # too old when it comes
        acting(age_us=2_500_000),  # and in the line
        acting(episode_id="none", step=1),
    ):
        refusal(running.stub.GetAction, refused, timeout=20)
    refusal(running.stub.GetActionBatch, pb.GetActionBatchRequest(), timeout=20)
    refusal(running.stub.StartEpisode, pb.StartEpisodeRequest(policy="none"), timeout=20)
    due, never = running.server._porter._due, threading.Event()
    method = running.channel.stream_unary("/equiserve.v1.PolicyService/GetAction")
    gone = method.future(acting().SerializeToString() for _ in range(1) if never.wait(20))
    wait_until(lambda: due)
    gone.cancel()
    wait_until(lambda: not due)
    never.set()
    full = [running.stub.GetAction.future(acting()) for _ in range(QUEUE + 3)]
    wait_until(lambda: sum(call.done() for call in full) == 3)
    release.set()
    assert first.result()
    assert sum(call.exception() is None for call in full) == QUEUE
    wait_until(lambda: not uncollected())


def test_a_refusal_and_an_answer_tell_their_request_id(running):
    with pytest.raises(grpc.RpcError) as refused:
        running.stub.GetAction(pb.GetActionRequest(), metadata=(("x-request-id", "mine-7"),))
    assert ("x-request-id", "mine-7") in [tuple(pair) for pair in refused.value.trailing_metadata()]
    assert running.stub.GetAction(request(), metadata=(("x-request-id", "mine-8"),)).request_id == "mine-8"
    forged = running.stub.GetAction(request(), metadata=(("x-request-id", "a b"),)).request_id
    assert forged != "a b"


@pytest.mark.parametrize("how", ["an unknown field", "a field sent again and again"])
def test_what_is_no_field_s_is_not_kept_in_memory(how):
    """With each step of an episode, and before a disk that has stalled: megabytes that nobody has counted."""
    frame = acting(1).SerializeToString()
    if how == "an unknown field":
        field = bytes([0x82, 0x7D])  # number 2000, of bytes
        sent = frame + field + _varint(size := 3_000_000) + bytes(size)
    else:
        again = pb.GetActionRequest(observation=pb.Observation(depth=bytes(200_000))).SerializeToString()
        sent = 15 * again + frame
    handler = grpc.unary_unary_rpc_method_handler(lambda *_: None, pb.GetActionRequest.FromString)
    details = SimpleNamespace(method="/equiserve.v1.PolicyService/GetAction")
    careful = Parser(lambda *_: None).intercept_service(lambda _: handler, details)
    vitals = Vitals(os.getpid())
    before, kept = vitals.rss_mib(), [careful.request_deserializer(sent) for _ in range(20)]
    assert vitals.rss_mib() - before < 20
    assert {message.SerializeToString() for message in kept} == {frame}


def _varint(number):
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*encoded, number])
