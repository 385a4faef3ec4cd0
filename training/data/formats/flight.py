"""Flight recordings of serving.server: what a robot saw, what it did, and how its episodes ended.

Read twice: first what there is, with which labels; then the frames, of the episodes that are under way alone.
"""

import functools
import logging
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from protos.codec import unpack_action, unpack_observation
from protos.equiserve.v1 import policy_pb2 as pb
from protos.errors import Rejected
from protos.spaces import PolicySpec
from serving.flight import files_of
from serving.flight import read as entries_of
from sim_client.store import About, dataset_id
from training.data.formats.raw import Array, Misused, Raw, Source, about_from_json

log = logging.getLogger(__name__)

SUCCESS_OF = {
    pb.EndEpisodeRequest.OUTCOME_SUCCESS: True,
    pb.EndEpisodeRequest.OUTCOME_FAILURE: False,
    pb.EndEpisodeRequest.OUTCOME_ABORTED: False,
}
SHOWN_IDS = 20
LEAST_OF_A_FAILURE = 2
"""Actions; its last one goes, as no frame shows what came of it."""


@dataclass(frozen=True)
class Choice:
    """Which episodes of a recording become data, and what is known of them beside it."""

    success: Mapping[str, bool] = field(default_factory=dict)
    """By episode id; counts more than what EndEpisode said."""
    unlabelled: Literal["refuse", "skip", "failure"] = "refuse"
    """What to do with episodes of which neither says how they went."""
    policy: str = ""
    """Only episodes in which this one acted; empty: all."""


def read_labels(path: Path) -> dict[str, bool]:
    """A TOML file of lines EPISODE_ID = true or false. Raises Rejected naming what is neither."""
    try:
        labels = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise Rejected(f"--labels {path}", "TOML, a line EPISODE_ID = true or false for each", str(error)) from error
    for episode, success in labels.items():
        if not isinstance(success, bool):
            raise Rejected(f"--labels {path}, {episode}", "true or false", repr(success))
    return labels


def read(path: Path, choice: Choice) -> Source:
    """The recording at `path`, a file or a folder of them.

    Raises:
        Rejected: naming what is damaged, the episodes without a label, or what cannot be in one dataset.
    """
    files, found = files_of(path), _Found()
    for file in files:
        found.take(file)
    chosen, left_out = _choose(path, found, choice)
    policies = [found.policies.get((e.policy, e.version)) for e in chosen.values()]
    known = [info for info in policies if info is not None]
    if len(known) < len(policies):
        raise Rejected(str(path), "what acted, with its contract", "an action of a policy that is not described")
    for name in ("contract_digest", "task"):
        values = {getattr(info, name): info.name for info in known}
        if len(values) > 1:
            got = ", ".join(f"{value[:32]} of {policy}" for value, policy in values.items())
            raise Misused(f"{path}, {name}", "one in all episodes", got, "choose when you import it: --policy NAME")
    if left_out:
        _tell(path, ", ".join(f"{count} {what}" for what, count in left_out.items()))
    notes = {"recording": [file.name for file in files], "left_out": dict(left_out)}
    plain = about_from_json(known[0].contract, known[0].contract_digest, None, str(path))
    about = About(
        spec=plain.spec,
        task=known[0].task,
        behavior=", ".join(sorted({f"policy:{info.name}" for info in known})),
        dataset_id=dataset_id(known[0].task, "flight"),
        notes=notes,
    )
    return Source(about, _episodes(files, chosen, about.spec))


@functools.cache
def _tell(path: Path, left_out: str) -> None:
    """Once, however often a command reads it."""
    log.warning("%s: left out: %s", path, left_out)


@dataclass
class _Seen:
    """What a recording says of an episode, its frames apart."""

    policy: str
    version: str
    answered: list[int] = field(default_factory=list)
    """Steps, in their order."""
    applied: list[int] = field(default_factory=list)
    """Those of them that no later one says were not."""
    started: bool = False
    taken: int | None = None
    """The server's own count of steps, if the end is there."""
    success: bool | None = None

    @property
    def has_gaps(self) -> bool:
        """Messages were dropped, or the file that they were in is gone: what follows what is not known.

        Without the server's own count, steps must be numbered one after another: as `serving.client` does it unless a
        call failed, of which nothing was recorded.
        """
        if self.taken is not None:
            return len(self.answered) != self.taken
        numbered = self.started and self.answered
        return not numbered or self.answered[-1] - self.answered[0] + 1 != len(self.answered)

    def take(self, asked: pb.GetActionRequest) -> None:
        """A step that was answered, unless it was tried again."""
        if self.answered and asked.step <= self.answered[-1]:
            return
        self.deny(asked)
        self.answered.append(asked.step)
        self.applied.append(asked.step)

    def deny(self, told: pb.GetActionRequest | pb.EndEpisodeRequest) -> None:
        """What it says was not applied."""
        while told.HasField("applied_step") and self.applied and self.applied[-1] > told.applied_step:
            self.applied.pop()


class _Found:
    """All that a recording holds, file by file in their order."""

    def __init__(self) -> None:
        self.episodes: dict[str, _Seen] = {}
        self.policies: dict[tuple[str, str], pb.PolicyInfo] = {}
        self.outside = 0

    def take(self, file: Path) -> None:
        for message in (entry.message for entry in entries_of(file)):
            if isinstance(message, pb.FlightPolicy):
                self.policies[message.policy.name, message.policy.version] = message.policy
            elif isinstance(message, pb.FlightStart):
                self._seen(message.response.episode_id, message.response).started = True
            elif isinstance(message, pb.FlightAction) and not message.request.episode_id:
                self.outside += 1
            elif isinstance(message, pb.FlightAction):
                self._seen(message.request.episode_id, message.response).take(message.request)
            elif isinstance(message, pb.FlightEnd) and message.request.episode_id in self.episodes:
                seen = self.episodes[message.request.episode_id]
                seen.deny(message.request)
                seen.taken, seen.success = message.response.steps, SUCCESS_OF.get(message.request.outcome)

    def _seen(self, episode: str, acts: pb.StartEpisodeResponse | pb.GetActionResponse) -> _Seen:
        return self.episodes.setdefault(episode, _Seen(acts.policy, acts.version))


@dataclass(frozen=True)
class _Chosen:
    """An episode that becomes data."""

    policy: str
    version: str
    steps: frozenset[int]
    success: bool


def _choose(path: Path, found: _Found, choice: Choice) -> tuple[dict[str, _Chosen], Counter[str]]:
    """The episodes to take, and how many of what are left out.

    Raises:
        Rejected: when one has no label, or none is left.
    """
    chosen, unlabelled = dict[str, _Chosen](), list[str]()
    left_out = Counter(
        {
            "actions outside an episode": found.outside,
            "labels of episodes that are not there": len(choice.success.keys() - found.episodes.keys()),
        }
    )
    for episode, seen in found.episodes.items():
        success = choice.success.get(episode, seen.success)
        if choice.policy not in ("", seen.policy):
            left_out["episodes of other policies"] += 1
        elif seen.has_gaps:
            left_out["episodes of which messages are missing"] += 1
        elif success is None and choice.unlabelled == "refuse":
            unlabelled.append(episode)
        elif success is None and choice.unlabelled == "skip":
            left_out["episodes without a label"] += 1
        elif len(seen.applied) < (1 if success else LEAST_OF_A_FAILURE):
            left_out["episodes without a whole transition"] += 1
        else:
            chosen[episode] = _Chosen(seen.policy, seen.version, frozenset(seen.applied), bool(success))
            left_out["actions that were not applied"] += len(seen.answered) - len(seen.applied)
    if unlabelled:
        more = len(unlabelled) - SHOWN_IDS
        got = f"none for {len(unlabelled)} of {len(found.episodes)}: {', '.join(unlabelled[:SHOWN_IDS])}"
        labels = f"--labels FILE with a line {unlabelled[0]} = true or false for each"
        remedy = f"import it with {labels}, or --unlabelled skip or failure"
        raise Misused(f"{path}, success", "a label", got + (f" and {more} more" if more > 0 else ""), remedy)
    if not chosen:
        got = ", ".join(f"{count} {what}" for what, count in left_out.items() if count) or "none"
        raise Rejected(str(path), "at least one episode", got, "episodes begin with StartEpisode")
    return chosen, +left_out


def _episodes(files: Sequence[Path], chosen: Mapping[str, _Chosen], spec: PolicySpec) -> Iterator[Raw]:
    """Each as soon as its last step was read."""
    awaited, under_way = dict(chosen), dict[str, dict[int, _Step]]()
    for message in (entry.message for file in files for entry in entries_of(file)):
        if not isinstance(message, pb.FlightAction) or message.request.episode_id not in awaited:
            continue
        id_, step = message.request.episode_id, message.request.step
        steps = under_way.setdefault(id_, {})
        if step in steps or step not in awaited[id_].steps:
            continue  # tried again, or not applied
        steps[step] = _Step.of(message, spec)
        if len(steps) == len(awaited[id_].steps):
            yield _raw(awaited.pop(id_), list(under_way.pop(id_).values()))


@dataclass(frozen=True)
class _Step:
    depth: Array  # [H, W]
    gripper: float
    action: Array  # [A]

    @classmethod
    def of(cls, message: pb.FlightAction, spec: PolicySpec) -> "_Step":
        view, observation = spec.observation, unpack_observation(message.request.observation, spec.observation)
        # The server takes what counts and float32 round beyond the range, by half a millimetre at most; a dataset not.
        depth = np.clip(observation.depth, np.float32(view.depth_min_m), np.float32(view.depth_max_m))
        return cls(depth, observation.gripper, unpack_action(message.response.action, spec.action))


def _raw(episode: _Chosen, steps: Sequence[_Step]) -> Raw:
    reward = np.zeros(len(steps), np.float32)
    reward[-1] = episode.success
    return Raw(
        depth=np.stack([step.depth for step in steps]),
        gripper=np.array([step.gripper for step in steps], np.float32),
        action=np.stack([step.action for step in steps]),
        reward=reward,
        terminated=episode.success,
        truncated=not episode.success,
        behavior=f"policy:{episode.policy}@{episode.version}",
    )
