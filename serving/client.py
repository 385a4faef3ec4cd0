"""What a robot's controller imports: PolicyClient(target).act(observation). Needs grpcio, protobuf and numpy alone."""

import itertools
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import grpc

from protos.codec import pack_observation, unpack_action
from protos.equiserve.v1 import policy_pb2 as pb
from protos.equiserve.v1 import policy_pb2_grpc as pb_grpc
from protos.errors import REQUEST_ID, RETRY
from protos.spaces import Observation, PolicySpec, Pose
from serving.answer import MOMENTARY, Answer, PolicyError
from serving.connection import Connection, Tls, bearer

__all__ = ["Answer", "Connection", "Episode", "Outcome", "PolicyClient", "PolicyError", "Tls"]

RETRY_AFTER_S = (0.02, 0.05, 0.1)
"""Waits before another attempt at a call that was answered UNAVAILABLE; then the error is the caller's."""
POLL_S, ONE_TRY_S = 0.1, 1.0
"""Who waits for a server asks so often, and lets the last try take so long, though its time is over then."""
CHANNEL_OPTIONS = [
    ("grpc.enable_retries", 0),  # retries are ours: bounded, within the deadline, UNAVAILABLE only
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Wi-Fi that roams loses a connection without a word: calls would end by their deadlines until TCP gives up.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 3_000),
]
FULL_TIME_AFTER = 8
"""After so many actions in a row that came too late to be of use, one may take all of a call's time: another server may
be there by now, that is slower and whose answers are of use for longer."""
ASK_AGAIN = "ask again, with a new frame"
HEALTH = "/grpc.health.v1.Health/Check"
"""Spelled out, as a controller need not have grpcio-health-checking. An empty message asks for the whole server."""
Outcome = pb.EndEpisodeRequest


class Episode:
    """One run of a robot on one pinned version. Steps count themselves; a retry gets the same answer."""

    def __init__(self, client: "PolicyClient", started: pb.StartEpisodeResponse) -> None:
        self.id, self.version, self.limits = started.episode_id, started.version, dict(started.limits)
        self._client, self._steps = client, itertools.count(1)
        self.applied_step = self._applied_before = 0
        """The newest step whose answer counts as applied; 0: none."""
        self._stopped = False
        self.outcome = Outcome.OUTCOME_UNSPECIFIED

    def act(
        self, observation: Observation, pose: Pose | None = None, *, age_us: int = 0, at_rest: bool = False
    ) -> Answer:
        """The next step; as PolicyClient.act. Unless it raises, its answer counts as applied.

        Args:
            at_rest: the arm stands still, as after a pause, so jump limits count from there. After a step without an
                answer, and after `not_applied`, it does anyway.
        """
        step, at_rest = next(self._steps), at_rest or self._stopped
        self._stopped = True  # until an answer is here
        whose = {"episode_id": self.id, "step": step, "applied_step": self.applied_step, "at_rest": at_rest}
        answer = self._client._act(observation, pose, age_us, **whose)
        self._applied_before, self.applied_step, self._stopped = self.applied_step, step, False
        return answer

    def not_applied(self) -> None:
        """Say, before the next step or the end, that the last answer was not applied after all: somebody pressed stop.

        The next motion then begins at rest, and an import of the recording leaves out what was never done. After a step
        that raised, the last answer is that of the step before: what raised needs no word.
        """
        self.applied_step, self._stopped = self._applied_before, True

    def succeeded(self, success: bool = True) -> None:
        """How it went; told when the episode ends. Recordings are labelled with it."""
        self.outcome = Outcome.OUTCOME_SUCCESS if success else Outcome.OUTCOME_FAILURE


class PolicyClient:
    """A connection to one policy of one server. Use as a context manager; threads may share it.

    Args:
        target: "host:port".
        policy, version: empty: the server's default and newest.
        timeout_s: deadline of every call, retries included; of an action, after the first answer, no longer than one
            could be of use: a connection that has gone silent must not hold the arm for longer, but for one action
            after each FULL_TIME_AFTER that came too late.
        spec: the contract that the caller was built for. Compared with the server's at the first call, which raises
            `protos.errors.Rejected` naming the field that differs; left out, the server's is taken.
        tls: left out, the connection is not encrypted.
        token: a bearer token, where the server asks for one. Without `tls` it travels in the clear.
    """

    def __init__(
        self,
        target: str,
        policy: str = "",
        version: str = "",
        *,
        timeout_s: float = 1.0,
        spec: PolicySpec | None = None,
        tls: Tls | None = None,
        token: str = "",
    ) -> None:
        self._policy, self._version, self._timeout_s, self._expected = policy, version, timeout_s, spec
        self._metadata = bearer(token)
        if tls:
            self._channel = grpc.secure_channel(target, tls.credentials(), options=CHANNEL_OPTIONS)
        else:
            self._channel = grpc.insecure_channel(target, options=CHANNEL_OPTIONS)
        self._stub = pb_grpc.PolicyServiceStub(self._channel)
        self._check = self._channel.unary_unary(HEALTH)
        self._connected: tuple[pb.PolicyInfo, PolicySpec] | None = None
        self._useful_s = math.inf
        """How old a frame may be when it is acted on, as the last answer told."""
        self._in_vain = 0
        """Actions asked for in a row that were not answered while they would have been of use."""

    @classmethod
    def of(cls, connection: Connection, policy: str = "", version: str = "", **how: Any) -> "PolicyClient":
        """By what a command was told; `how`: the other arguments."""
        return cls(connection.server, policy, version, tls=connection.tls, token=connection.secret, **how)

    def __enter__(self) -> "PolicyClient":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def wait_ready(self, timeout_s: float = 30.0) -> pb.PolicyInfo:
        """Wait until the server answers for the policy: it listens before its policies have proved themselves.

        It is asked every time, also after an answer: for a server that was started again. With `timeout_s` 0, once, for
        a second at most.

        Raises:
            PolicyError: when it does not, or knows no such policy.
            Rejected: when its contract is not the one expected: `spec`, or else the one this client began with.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                return self._ask(max(deadline - time.monotonic(), ONE_TRY_S))[0]
            except PolicyError as error:
                if error.code not in MOMENTARY:
                    raise
                if time.monotonic() + POLL_S >= deadline:
                    if error.answered:
                        raise
                    told = f"{error.message}; is serving.server running there, and with TLS (--tls-ca)?"
                    raise PolicyError(error.code, told, answered=False) from None
            self._pause(POLL_S)

    def policy(self) -> pb.PolicyInfo:
        """What acts: contract, provenance and the proofs it passed, as of the first call or the last `wait_ready`."""
        return self._connect()[0]

    @property
    def spec(self) -> PolicySpec:
        """The contract: shape and orientation of the view, fields and limits of the action."""
        return self._connect()[1]

    def act(self, observation: Observation, pose: Pose | None = None, *, age_us: int = 0) -> Answer:
        """One observation in, one limited motion out.

        Args:
            pose: where the gripper is; needed by a server that keeps a workspace.
            age_us: how old the frame is now, by the caller's own clock.

        Raises:
            PolicyError: anything but an answer in time. Do not move on it; where it is `late`, ask with a new frame.
        """
        return self._act(observation, pose, age_us, policy=self._policy, version=self._version)

    @contextmanager
    def episode(
        self, *, sample: bool = False, seed: int = 0, limits: Mapping[str, float] | None = None
    ) -> Iterator[Episode]:
        """An episode, ended when the block is left; an exception inside means that it was aborted.

        Args:
            sample: draw actions from the policy's distribution, reproducibly by `seed`, instead of the greedy ones.
            limits: tighter than the server's: by action field, or step_m, jump_m, jump_rad, z_floor_m.

        Raises:
            PolicyError: when the server does not start it, e.g. because a limit is wider.
        """
        asked = pb.StartEpisodeRequest(
            policy=self._policy,
            version=self._version,
            mode=pb.MODE_SAMPLE if sample else pb.MODE_GREEDY,
            seed=seed,
            contract=self.spec.to_json(),
            limits=limits,
        )
        episode = Episode(self, self._call(self._stub.StartEpisode, asked))
        try:
            yield episode
        except BaseException:
            episode.outcome = Outcome.OUTCOME_ABORTED
            with suppress(PolicyError):  # what went wrong before is what the caller must hear of
                self._end(episode)
            raise
        self._end(episode)

    def _act(self, observation: Observation, pose: Pose | None, age_us: int, **whose: Any) -> Answer:
        start, sent = time.perf_counter(), time.monotonic()
        spec = self.spec  # the first time, this connects, and the frame grows older meanwhile
        request = pb.GetActionRequest(
            observation=pack_observation(observation, pose=pose, age_us=age_us), contract_digest=spec.digest, **whose
        )
        left_s, useful_s = self._timeout_s - (time.monotonic() - sent), max(self._useful_s - age_us / 1e6, 0.0)
        # A frame that was too old for the server before is for the server to refuse, which may have been told anew.
        within_s = left_s if self._in_vain == FULL_TIME_AFTER else min(left_s, useful_s or math.inf)
        try:
            response = self._call(self._stub.GetAction, request, within_s)
        except PolicyError as error:
            if error.code is not grpc.StatusCode.DEADLINE_EXCEEDED:  # it may be another server by now, of other ways
                self._useful_s = math.inf
            elif 0 < useful_s < left_s:
                self._in_vain = (self._in_vain + 1) % (FULL_TIME_AFTER + 1)
                times = f"no answer came within {within_s * 1e3:.0f} ms; one is of use for {useful_s * 1e3:.0f} ms"
                told = f"{times}: {ASK_AGAIN}"
                raise PolicyError(grpc.StatusCode.OUT_OF_RANGE, told, answered=error.answered) from None
            raise
        self._useful_s, self._in_vain = (response.valid_for_us + age_us) / 1e6, 0
        expires_at = sent + response.valid_for_us / 1e6
        if (behind_s := time.monotonic() - expires_at) >= 0:
            told = f"the answer came {behind_s * 1e3:.0f} ms after it had expired; {ASK_AGAIN}"
            raise PolicyError(grpc.StatusCode.OUT_OF_RANGE, told)
        return Answer(
            action=unpack_action(response.action, spec.action),
            raw_action=unpack_action(response.raw_action, spec.action),
            std=unpack_action(response.std, spec.action),
            value=response.value if response.HasField("value") else None,
            interventions=tuple(response.interventions),
            hold=response.hold,
            warnings=tuple(response.warnings),
            latency_ms=(time.perf_counter() - start) * 1e3,
            timing=response.timing,
            policy=response.policy,
            version=response.version,
            valid_for_us=response.valid_for_us,
            expires_at=expires_at,
            request_id=response.request_id,
        )

    def _end(self, episode: Episode) -> None:
        """A server that is gone, busy or too slow, or has forgotten the episode, must not hide how it went here."""
        try:
            self._call(
                self._stub.EndEpisode,
                Outcome(episode_id=episode.id, outcome=episode.outcome, applied_step=episode.applied_step),
            )
        except PolicyError as error:
            if error.code not in MOMENTARY | {grpc.StatusCode.NOT_FOUND}:
                raise

    def _connect(self) -> tuple[pb.PolicyInfo, PolicySpec]:
        return self._connected or self._ask()

    def _ask(self, within_s: float = math.inf) -> tuple[pb.PolicyInfo, PolicySpec]:
        request = pb.GetPolicyRequest(name=self._policy, version=self._version)
        info = self._call(self._stub.GetPolicy, request, within_s).policy
        served = PolicySpec.from_json(info.contract)
        expected = self._expected or (self._connected and self._connected[1])
        if expected:
            expected.require_same(served, f"policy {info.name} {info.version}")
        self._connected, self._useful_s = (info, served), math.inf
        return self._connected

    def _pause(self, seconds: float) -> None:
        """Sleep, and be connected where that is possible meanwhile.

        gRPC's older event loop (see `serving`) sees that a connection was made, or refused, while a call waits for it,
        and else every 5 s only: a server that was back was found 10 to 20 s later. What the call is answered is of no
        interest.
        """
        until = time.monotonic() + seconds
        with suppress(grpc.RpcError):
            self._check(b"", timeout=seconds, wait_for_ready=True)
        time.sleep(max(0.0, until - time.monotonic()))

    def _call(self, method: Callable[..., Any], request: Any, within_s: float = math.inf) -> Any:
        """One call, tried again on UNAVAILABLE only: any other status would be the same again, or may have acted."""
        deadline = time.monotonic() + min(self._timeout_s, within_s)
        waits, metadata = iter(RETRY_AFTER_S), self._metadata
        while True:
            try:
                return method(request, timeout=max(deadline - time.monotonic(), 0.0), metadata=metadata)
            except grpc.RpcError as error:
                wait = next(waits, math.inf) * random.uniform(0.5, 1.0)  # not all robots at once
                if error.code() is not grpc.StatusCode.UNAVAILABLE or time.monotonic() + wait >= deadline:
                    answered = REQUEST_ID in dict(error.trailing_metadata() or ())
                    raise PolicyError(error.code(), error.details() or "", answered=answered) from None
            self._pause(wait)
            metadata = (*self._metadata, (RETRY, "1"))
