"""Suspicious frames: a warning in the reply, or a refusal where that was asked for."""

from types import SimpleNamespace

import numpy as np
import pytest

from protos.equiserve.v1 import policy_pb2 as pb
from protos.errors import Rejected
from protos.spaces import Observation
from serving.frames import QUIET_S, REMEMBERED, REMEMBERED_BYTES, FrameRules, FrameWatch
from tests.makers import scene, small_spec
from tests.serving.requests import acting, refusal


def holey(share):
    depth = scene(1).depth.copy()
    depth.reshape(-1)[: int(share * depth.size)] = 0
    return acting_on(Observation(depth, 0.0))


def acting_on(observation):
    from protos.codec import pack_observation

    return pb.GetActionRequest(observation=pack_observation(observation))


def test_a_camera_that_repeats_itself_is_warned_of(serve, healthy):
    running = serve(policy=(str(healthy),), frozen_after=4)
    answers = [running.stub.GetAction(acting(1)) for _ in range(5)]
    assert [len(a.warnings) for a in answers] == [0, 0, 0, 1, 1]
    assert "the same frame 5 times running" in answers[-1].warnings[0]
    assert not running.stub.GetAction(acting(2)).warnings


def test_a_camera_that_sees_little_is_warned_of(running):
    assert not running.stub.GetAction(holey(0.19)).warnings
    (warning,) = running.stub.GetAction(holey(0.5)).warnings
    assert "got 50%" in warning


@pytest.mark.parametrize("message", [holey(0.5), None], ids=["few pixels", "frozen"])
def test_they_are_refused_where_that_is_asked_for(serve, healthy, message):
    running = serve(policy=(str(healthy),), frozen_after=2, strict_frames=True)
    if message is None:
        message = acting(1)
        running.stub.GetAction(message)
    code, parts = refusal(running.stub.GetAction, message)
    assert (code, parts["field"]) == ("FAILED_PRECONDITION", "observation.depth")
    assert running.server.metrics.registry.get_sample_value("equiserve_frame_warnings_total") == 1
    running.stub.GetAction(acting(3))


def shown(watch, source, observation):
    look = watch.look((source,), observation)
    watch.answered(look)
    return look.warnings


def test_a_frame_that_is_sent_again_after_a_refusal_is_not_repeated():
    watch = FrameWatch(FrameRules(frozen_after=2, strict=True))
    for _ in range(5):
        watch.look(("a",), scene(0))
    assert not shown(watch, "a", scene(0))
    with pytest.raises(Rejected, match="2 times running"):
        watch.look(("a",), scene(0))


def test_a_camera_stays_frozen_however_long_it_is_refused(monkeypatch):
    now = 0.0
    monkeypatch.setattr("serving.frames.time", SimpleNamespace(monotonic=lambda: now))
    watch, refused = FrameWatch(FrameRules(frozen_after=2, strict=True)), 0
    for step in range(10):
        shown(watch, "other", scene(step))
        try:
            shown(watch, "a", scene(0))
        except Rejected:
            refused += 1
        now += QUIET_S / 4
    assert refused == 9


def test_every_source_has_its_own_camera():
    watch, frame = FrameWatch(FrameRules(frozen_after=3)), scene(0)
    for turn in range(4):
        warnings = [shown(watch, source, frame) for source in ("a", "b")]
        assert [bool(w) for w in warnings] == [turn >= 2] * 2


def test_a_camera_freezes_over_many_short_episodes(serve, healthy):
    running, warned = serve(policy=(str(healthy),), frozen_after=4), []
    for _ in range(3):
        id_ = running.stub.StartEpisode(pb.StartEpisodeRequest()).episode_id
        answers = [running.stub.GetAction(acting(1, episode_id=id_, step=step)) for step in (1, 2)]
        warned += [bool(answer.warnings) for answer in answers]
        running.stub.EndEpisode(pb.EndEpisodeRequest(episode_id=id_))
    assert warned == [False] * 3 + [True] * 3


def test_robots_of_one_client_have_a_camera_each():
    """Their episodes go on from their own frames, not from the client's last, which is another robot's."""
    watch = FrameWatch(FrameRules(frozen_after=3))
    for turn in range(4):
        looks = [watch.look((episode, "fleet"), scene(i)) for i, episode in enumerate(("left", "right"))]
        for look in looks:
            watch.answered(look)
        assert [bool(look.warnings) for look in looks] == [turn >= 2] * 2


def test_a_repeated_step_is_no_frozen_camera(serve, healthy):
    running = serve(policy=(str(healthy),), frozen_after=2)
    id_ = running.stub.StartEpisode(pb.StartEpisodeRequest()).episode_id
    assert not [running.stub.GetAction(acting(1, episode_id=id_, step=1)).warnings for _ in range(4)][-1]


def test_memory_is_bounded():
    watch = FrameWatch(FrameRules())
    for source in range(3 * REMEMBERED):
        shown(watch, str(source), scene(0))
    assert len(watch._last) == REMEMBERED
    for source in range(20):  # of 4 MiB each
        shown(watch, str(source), Observation(np.ones((1024, 1024), np.float32), 0.0))
        assert sum(look.depth.nbytes for look, _ in watch._last.values()) == watch._bytes <= REMEMBERED_BYTES
    assert shown(watch, "19", scene(0)) == []
    assert len(watch._last) == REMEMBERED_BYTES // 2**22


def test_who_was_silent_is_forgotten(monkeypatch):
    """A client that comes and goes leaves nothing, and one that pauses does not repeat itself."""
    now = 0.0
    monkeypatch.setattr("serving.frames.time", SimpleNamespace(monotonic=lambda: now))
    watch, seen = FrameWatch(FrameRules(frozen_after=2)), scene(0)
    for source in range(20):
        shown(watch, str(source), seen)
        now += QUIET_S / 4
    assert len(watch._last) == 4
    assert shown(watch, "19", seen)
    assert not shown(watch, "0", seen)


def test_both_can_be_switched_off():
    watch, blank = FrameWatch(FrameRules(frozen_after=0, invalid_share=1.0)), np.zeros(small_spec().observation.shape)
    assert not any(shown(watch, "a", Observation(blank, 0.0)) for _ in range(20))
