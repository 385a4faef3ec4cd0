"""What a controller relies on: contract compared, one kind of error, deadlines kept, retries only where they help."""

import itertools
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace

import grpc
import numpy as np
import pytest

from protos.equiserve.v1 import policy_pb2 as pb
from protos.equiserve.v1 import policy_pb2_grpc as pb_grpc
from protos.errors import RETRY, Rejected
from protos.spaces import ACTION, OBSERVATION, PolicySpec, Pose
from serving.client import CHANNEL_OPTIONS, FULL_TIME_AFTER, PolicyClient, PolicyError
from serving.connection import Connection
from serving.flight import files_of, read
from serving.server import Server
from tests.makers import UNHURRIED_MS, certify, scene, settings, small_spec
from tests.serving.conftest import address_of
from tests.serving.load import Relay, free_port

CODES = [code for code in grpc.StatusCode if code not in (grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE)]


class Fickle(pb_grpc.PolicyServiceServicer):
    """Answers GetAction with the given failures first, then well, and EndEpisode as told; counts the calls."""

    def __init__(self):
        self.failures, self.calls, self.delay_s, self.last = [], 0, 0.0, None
        self.remaining_s, self.retries, self.end, self.ends = [], [], None, 0
        self.connect_delay_s, self.valid_s, self.spec = 0.0, 60.0, small_spec()
        self.policy_failures = []

    def GetPolicy(self, request, context):
        time.sleep(self.connect_delay_s)
        if self.policy_failures:
            context.abort(self.policy_failures.pop(0), "as told")
        spec = self.spec
        return pb.GetPolicyResponse(
            policy=pb.PolicyInfo(name="fickle", contract=spec.to_json(), contract_digest=spec.digest)
        )

    def GetAction(self, request, context):
        self.calls, self.last = self.calls + 1, request
        self.remaining_s.append(context.time_remaining())
        self.retries.append(RETRY in dict(context.invocation_metadata()))
        time.sleep(self.delay_s)
        if self.failures:
            context.abort(self.failures.pop(0), "as told")
        return pb.GetActionResponse(action=pb.Action(p=1.0), valid_for_us=round(self.valid_s * 1e6))

    def StartEpisode(self, request, context):
        return pb.StartEpisodeResponse(episode_id="one")

    def EndEpisode(self, request, context):
        self.ends, self.ended = self.ends + 1, request
        if self.end:
            context.abort(self.end, "as told")
        return pb.EndEpisodeResponse()


@pytest.fixture
def fickle():
    servicer, server = Fickle(), grpc.server(ThreadPoolExecutor(4))
    pb_grpc.add_PolicyServiceServicer_to_server(servicer, server)
    servicer.address = f"localhost:{server.add_insecure_port('localhost:0')}"
    server.start()
    yield servicer
    server.stop(None).wait()


def test_an_answer_is_the_policys(running, policy):
    with PolicyClient(running.server.address, spec=small_spec()) as client:
        answer = client.act(scene(3, gripper=1.0))
    proposal = policy.act(scene(3, gripper=1.0))
    np.testing.assert_allclose(answer.action, proposal.action, atol=1e-6)
    np.testing.assert_allclose(answer.std, proposal.std, atol=1e-6)
    assert answer.action.dtype == np.float32
    assert answer.value == pytest.approx(proposal.value)
    assert (answer.policy, answer.version, answer.valid_for_us) == ("tiny", policy.version, UNHURRIED_MS * 1e3)
    assert answer.interventions == ()
    assert answer.latency_ms * 1e3 > answer.timing.inference_us > 0


def test_a_client_without_a_contract_takes_the_servers(running):
    with PolicyClient(running.server.address) as client:
        assert client.spec == small_spec()
        assert client.policy().name == "tiny"


def test_a_contract_that_differs_is_refused_by_field_before_any_action(running):
    expected = PolicySpec(replace(small_spec().observation, extent_m=0.5), ACTION)
    runs = running.runs
    with (
        PolicyClient(running.server.address, spec=expected) as client,
        pytest.raises(Rejected, match=r"contract\.observation\.extent_m: expected .*0\.5, got .*0\.45"),
    ):
        client.act(scene(0))
    assert running.runs == runs


def test_the_digest_travels_with_every_request(fickle):
    with PolicyClient(fickle.address) as client:
        client.act(scene(0), Pose(0.1, 0.2, 0.3, 0.4))
    assert fickle.last.contract_digest == small_spec().digest
    assert fickle.last.observation.pose.yaw == 0.4


def test_a_contract_that_changes_under_a_client_is_noticed(running, serve, healthy, tmp_path):
    """The server restarted with a policy of another contract."""
    with PolicyClient(running.server.address) as client:
        client.policy()
        client._connected = client._connected[0], PolicySpec(OBSERVATION, ACTION)
        with pytest.raises(PolicyError, match="contract_digest") as refused:
            client.act(scene(0))
    assert refused.value.code is grpc.StatusCode.FAILED_PRECONDITION


@pytest.mark.parametrize(("named", "field"), [({"policy": "other"}, "name"), ({"version": "0"}, "version")])
def test_an_unknown_policy_is_one_policy_error(running, named, field):
    with PolicyClient(running.server.address, **named) as client, pytest.raises(PolicyError) as refused:
        client.act(scene(0))
    assert refused.value.code is grpc.StatusCode.NOT_FOUND
    assert refused.value.message.startswith(f"{field}: expected")


def test_a_frame_of_another_size_is_refused_by_field(running):
    with (
        PolicyClient(running.server.address) as client,
        pytest.raises(PolicyError, match=r"INVALID_ARGUMENT: observation\.height: expected 32 pixels, got 16"),
    ):
        client.act(scene(0, small_spec(16)))


def test_unavailable_is_tried_again(fickle):
    fickle.failures = [grpc.StatusCode.UNAVAILABLE] * 2
    with PolicyClient(fickle.address) as client:
        assert client.act(scene(0)).valid_for_us == fickle.valid_s * 1e6
    assert fickle.retries == [False, True, True]  # the server looks for an answer that it has given already


def test_unavailable_is_not_tried_forever(fickle):
    fickle.failures = [grpc.StatusCode.UNAVAILABLE] * 20
    with PolicyClient(fickle.address) as client, pytest.raises(PolicyError, match="UNAVAILABLE: as told"):
        client.act(scene(0))
    assert fickle.calls == 4


@pytest.mark.parametrize("code", CODES, ids=lambda code: code.name)
def test_nothing_else_is_tried_again(fickle, code):
    fickle.failures = [code]
    with PolicyClient(fickle.address) as client, pytest.raises(PolicyError) as refused:
        client.act(scene(0))
    assert (refused.value.code, refused.value.message) == (code, "as told")
    assert fickle.calls == 1


ROUNDED_S = 0.1
"""So much more may a deadline of some seconds be, as it travels."""


def test_the_deadline_covers_retries(fickle):
    """Each try has what the ones before have left."""
    fickle.failures, fickle.delay_s = [grpc.StatusCode.UNAVAILABLE] * 20, 0.3
    with PolicyClient(fickle.address, timeout_s=5) as client, pytest.raises(PolicyError):
        client.act(scene(0))
    tries = list(itertools.pairwise(fickle.remaining_s))
    assert 0 < len(tries) <= 3
    assert all(left <= before - fickle.delay_s + ROUNDED_S for before, left in tries)


def test_connecting_is_a_part_of_the_first_calls_time(fickle):
    fickle.connect_delay_s = 0.4
    with PolicyClient(fickle.address, timeout_s=5) as client:
        client.act(scene(0))
    assert fickle.remaining_s[0] <= 5 - fickle.connect_delay_s + ROUNDED_S


def test_a_slow_server_is_a_deadline(fickle):
    fickle.delay_s = 0.5
    with PolicyClient(fickle.address, timeout_s=0.1) as client:
        client.policy()
        with pytest.raises(PolicyError, match="DEADLINE_EXCEEDED"):
            client.act(scene(0))


def test_waiting_for_nobody_ends():
    with PolicyClient("localhost:1") as client, pytest.raises(PolicyError, match="UNAVAILABLE"):
        client.wait_ready(0.3)


def test_where_nothing_answers_is_asked_what_runs_there(serve, healthy, tmp_path):
    certify(tmp_path, localhost="localhost")
    secure = serve(policy=(str(healthy),), tls_cert=tmp_path / "localhost.pem", tls_key=tmp_path / "localhost.key")
    for target in ("localhost:1", secure.server.address):
        with PolicyClient(target) as client, pytest.raises(PolicyError, match=r"running there, and with TLS") as nobody:
            client.wait_ready(0.3)
        assert not nobody.value.answered
    with (
        Server(settings(healthy)) as proving,
        PolicyClient(proving.address) as client,
        pytest.raises(PolicyError, match="none yet") as early,
    ):
        client.wait_ready(0.3)
    assert early.value.answered
    assert "TLS" not in str(early.value)


@pytest.mark.parametrize(
    "server", ["localhost", "localhost:", ":50051", "localhost:grpc", "localhost:99999", "localhost:0", ""]
)
def test_an_address_without_host_or_port_is_refused(server):
    with pytest.raises(ValueError, match=r"--server must be HOST:PORT"):
        Connection(server)


def test_waiting_for_a_server_that_says_nothing_ends():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        with PolicyClient(f"127.0.0.1:{silent.getsockname()[1]}", timeout_s=60) as client, pytest.raises(PolicyError):
            client.wait_ready(0.5)
        assert time.monotonic() - start < 10


@pytest.fixture
def free_address():
    return f"localhost:{free_port()}"


def test_waiting_ends_when_the_server_is_ready(launch, healthy, free_address):
    """The client starts before the server has a socket."""
    with PolicyClient(free_address) as client, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lambda: (client.wait_ready(60), time.monotonic()))
        time.sleep(0.5)
        process = launch("--policy", healthy, "--listen", free_address)
        address_of(process)
        began = time.monotonic()
        info, found = waiting.result()
        assert info.name == "tiny"
        assert found - began < 4  # the longest wait between attempts is 1 s
        client.act(scene(0))
    process.terminate()
    assert process.wait(10) == 0


def test_a_server_that_is_back_is_found_again(launch, healthy, free_address):
    """By a controller that goes on asking, as one does."""
    with PolicyClient(free_address, timeout_s=5) as client:
        for _ in range(2):
            process = launch("--policy", healthy, "--listen", free_address)
            address_of(process)
            began, answer = time.monotonic(), None
            while answer is None and time.monotonic() - began < 4:
                with suppress(PolicyError):
                    answer = client.act(scene(0))
                time.sleep(0.05)
            assert answer is not None
            process.kill()
            process.wait()
            for _ in range(10):
                with pytest.raises(PolicyError, match="UNAVAILABLE"):
                    client.act(scene(0))


def test_waiting_asks_the_server_that_is_there_now(fickle):
    """It may have been started again, with a newer policy; but never with one of another contract."""
    with PolicyClient(fickle.address) as client:
        client.wait_ready(5)
        fickle.connect_delay_s = 0.3
        began = time.monotonic()
        client.wait_ready(5)
        assert time.monotonic() - began >= 0.3
        before, fickle.spec = client.spec, PolicySpec(OBSERVATION, ACTION)
        with pytest.raises(Rejected, match=r"contract\.observation\.height"):
            client.wait_ready(5)
        assert client.spec == before


def test_waiting_does_not_hide_another_error(running):
    start = time.monotonic()
    with PolicyClient(running.server.address, "other") as client, pytest.raises(PolicyError, match="NOT_FOUND"):
        client.wait_ready(20)
    assert time.monotonic() - start < 5


def test_an_episode_is_started_stepped_and_ended(serve, healthy, tmp_path):
    running = serve(policy=(str(healthy),), record=tmp_path / "flight")
    with PolicyClient(running.server.address) as client:
        with client.episode(limits={"planar": 0.01}) as episode:
            for picture in range(3):
                answer = episode.act(scene(picture))
                assert np.hypot(*answer.action[1:3]) <= 0.01 + 1e-8
            episode.succeeded()
        with pytest.raises(AttributeError), client.episode() as aborted:
            aborted.act(scene(0), "no pose")
        with client.episode(sample=True, seed=3) as one, client.episode(sample=True, seed=3) as other:
            np.testing.assert_array_equal(one.act(scene(1)).action, other.act(scene(1)).action)
    assert len(running.server.sessions) == 0
    running.server.stop()
    messages = [entry.message for file in files_of(tmp_path / "flight") for entry in read(file)]
    outcomes = [m.request.outcome for m in messages if isinstance(m, pb.FlightEnd)]
    assert outcomes == [pb.EndEpisodeRequest.OUTCOME_SUCCESS, pb.EndEpisodeRequest.OUTCOME_ABORTED, 0, 0]
    asked = [(m.request.mode, m.request.seed) for m in messages if isinstance(m, pb.FlightStart)]
    assert asked == [(pb.MODE_GREEDY, 0)] * 2 + [(pb.MODE_SAMPLE, 3)] * 2
    steps = [m.request.step for m in messages if isinstance(m, pb.FlightAction)]
    assert steps == [1, 2, 3, 1, 1]


def test_an_episode_that_the_server_forgot_still_ends(running):
    with PolicyClient(running.server.address) as client, client.episode() as episode:
        episode.act(scene(0))
        running.server.sessions.end(episode.id, 1.0)
        episode.succeeded(False)


@pytest.mark.parametrize("code", ["UNAVAILABLE", "CANCELLED", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "NOT_FOUND"])
def test_a_server_that_is_gone_or_busy_does_not_hide_how_an_episode_went(fickle, code):
    fickle.end = grpc.StatusCode[code]
    with PolicyClient(fickle.address) as client, client.episode() as episode:
        episode.succeeded()
    assert fickle.ends == (4 if code == "UNAVAILABLE" else 1)


@pytest.mark.parametrize("code", ["INTERNAL", "PERMISSION_DENIED"])
def test_an_end_that_a_server_refuses_otherwise_is_told(fickle, code):
    fickle.end = grpc.StatusCode[code]
    with PolicyClient(fickle.address) as client, pytest.raises(PolicyError) as refused, client.episode() as episode:
        episode.succeeded()
    assert (refused.value.code, refused.value.message) == (fickle.end, "as told")
    assert fickle.ends == 1


def test_an_episode_compares_the_whole_contract(running):
    with PolicyClient(running.server.address) as client:
        info, _ = client._connect()
        client._connected = info, PolicySpec(OBSERVATION, ACTION)
        with pytest.raises(PolicyError, match=r"contract\.observation\.height"), client.episode():
            pass


def test_a_frame_grows_older_while_a_client_connects(fickle):
    fickle.connect_delay_s = 0.4
    with PolicyClient(fickle.address) as client:
        before = time.monotonic()
        expires_at = client.act(scene(0)).expires_at
    assert time.monotonic() - before > 0.4
    assert expires_at < before + fickle.valid_s + 0.4


def test_an_answer_that_has_expired_is_no_answer(fickle):
    fickle.valid_s, fickle.delay_s = 0.2, 0.4
    with PolicyClient(fickle.address) as client:
        client.policy()
        with pytest.raises(PolicyError, match=r"came \d+ ms after it had expired") as refused:
            client.act(scene(0))
        assert refused.value.late
        fickle.delay_s = 0.0
        assert client.act(scene(0)).action.any()


def test_an_episode_tells_what_was_not_applied_and_that_the_arm_rests(fickle):
    def told(episode, failure=None, **how):
        fickle.failures = [failure] if failure else []
        with suppress(PolicyError):
            episode.act(scene(0), **how)
        return fickle.last.step, fickle.last.applied_step, fickle.last.at_rest

    with PolicyClient(fickle.address) as client, client.episode() as episode:
        assert told(episode) == (1, 0, False)
        assert told(episode) == (2, 1, False)
        assert told(episode, at_rest=True) == (3, 2, True)
        assert told(episode, grpc.StatusCode.RESOURCE_EXHAUSTED) == (4, 3, False)
        assert told(episode) == (5, 3, True)
        episode.not_applied()
        episode.not_applied()
        assert told(episode) == (6, 3, True)
        assert told(episode, grpc.StatusCode.CANCELLED) == (7, 6, False)
        episode.not_applied()  # stop was pressed while 6 was carried out, and 7 asked for
        assert told(episode) == (8, 3, True)
        assert told(episode) == (9, 8, False)
        fickle.valid_s = 0.0
        assert told(episode) == (10, 9, False)
        fickle.valid_s = 60.0
        assert told(episode) == (11, 9, True)
        episode.not_applied()
    assert fickle.ended.applied_step == 9


def test_a_connection_that_answers_no_more_holds_the_arm_no_longer_than_an_answer_could_be_of_use(fickle):
    with PolicyClient(fickle.address, timeout_s=30.0) as client:
        client.policy()
        fickle.valid_s = 1.5
        client.act(scene(0))
        fickle.delay_s = 4.0
        for age_us, most_s in ((0, 1.5), (1_000_000, 0.5)):
            with pytest.raises(PolicyError) as refused:
                client.act(scene(0), age_us=age_us)
            assert refused.value.late
            assert fickle.remaining_s[-1] < most_s + 0.2  # gRPC rounds them up


@contextmanager
def hurried(fickle, timeout_s):
    """A client that has been told by an answer that such are of use for 0.2 s."""
    with PolicyClient(fickle.address, timeout_s=timeout_s) as client:
        client.policy()
        fickle.valid_s = 0.2
        with suppress(PolicyError):  # on a busy machine it comes too late
            client.act(scene(0))
        yield client


def test_a_slower_server_in_the_same_place_is_given_its_time_in_the_end(fickle):
    """Started while its client was silent, it answers nothing in the time that the one before allowed."""
    with hurried(fickle, timeout_s=30.0) as client:
        fickle.valid_s, fickle.delay_s = 60.0, 0.6
        for _ in range(FULL_TIME_AFTER):
            with pytest.raises(PolicyError, match="of use"):
                client.act(scene(0))
        for _ in range(2):
            client.act(scene(0))
            assert fickle.remaining_s[-1] > 20


def test_a_server_that_says_nothing_at_all_holds_the_arm_for_longer_once_in_a_while(fickle):
    with hurried(fickle, timeout_s=2.0) as client:
        fickle.delay_s, took_s = 3.0, []
        for _ in range(FULL_TIME_AFTER + 2):
            begun = time.monotonic()
            with pytest.raises(PolicyError, match="within") as refused:
                client.act(scene(0))
            took_s.append(time.monotonic() - begun)
            assert refused.value.late
        assert [took > 1.2 for took in took_s] == [False] * FULL_TIME_AFTER + [True, False]


def test_a_server_that_allows_more_than_before_is_given_that_time(fickle):
    with hurried(fickle, timeout_s=30.0) as client:
        fickle.valid_s = 60.0
        client.act(scene(0), age_us=300_000)  # too old for the one before
        assert fickle.remaining_s[-1] > 20
        client.act(scene(0))
        assert fickle.remaining_s[-1] > 20
        fickle.valid_s = 0.2
        with suppress(PolicyError):
            client.act(scene(0))
        client.wait_ready()
        fickle.valid_s = 60.0
        client.act(scene(0))
        assert fickle.remaining_s[-1] > 20


@pytest.mark.parametrize("code", [grpc.StatusCode.CANCELLED, grpc.StatusCode.RESOURCE_EXHAUSTED])
def test_who_waits_for_a_server_waits_out_what_is_momentary(fickle, code):
    fickle.policy_failures = [code]
    with PolicyClient(fickle.address) as client:
        assert client.wait_ready(5).name == "fickle"
        assert not fickle.policy_failures


def test_an_answer_says_until_when_it_may_be_applied(running):
    with PolicyClient(running.server.address) as client:
        client.policy()
        before = time.monotonic()
        answer = client.act(scene(0), age_us=50_000)
        left_s = UNHURRIED_MS / 1e3 - 0.05
        assert before + left_s <= answer.expires_at <= time.monotonic() + left_s
        assert (answer.hold, answer.warnings) == (False, ())
        assert answer.request_id


def test_a_connection_that_went_silent_is_replaced(serve, healthy, monkeypatch):
    """As by Wi-Fi that roams: nothing comes any more, and nobody says so."""
    options = dict(CHANNEL_OPTIONS) | {"grpc.keepalive_time_ms": 500, "grpc.http2.ping_timeout_ms": 500}
    monkeypatch.setattr("serving.client.CHANNEL_OPTIONS", list(options.items()))
    running = serve(policy=(str(healthy),))
    with Relay(running.server.address) as relay, PolicyClient(relay.address, timeout_s=0.3) as client:
        client.act(scene(0))
        relay.lose()
        end = time.monotonic() + 15
        while True:
            with suppress(PolicyError):
                client.act(scene(1))
                break
            assert time.monotonic() < end, "the connection stays, though another would do"
