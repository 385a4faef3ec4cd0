"""Datasets: values survive, and what is broken is refused by episode, step and field."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import minari
import numpy as np
import pytest
import torch

from protos.errors import Rejected
from protos.spaces import ACTION, SPEC
from sim_client import store
from sim_client.episodes import Episode
from tests.training.conftest import SMALL, write_dataset
from tests.training.data.makers import REPOSITORY
from training.data.dataset import Dataset, load


def test_transitions_are_those_that_minari_stores(reach: Dataset, reach_path: Path) -> None:
    stored = list(minari.MinariDataset(reach_path / "data").iterate_episodes())
    assert len(reach) == sum(len(e.actions) for e in stored)
    batch = reach.batch(torch.tensor([0, 3, 4]))  # the first and last step of episode 0, the first of episode 1
    for row, (episode, step) in enumerate([(0, 0), (0, 3), (1, 0)]):
        source = stored[episode]
        np.testing.assert_array_equal(batch.state.depth[row, 0], source.observations["depth"][step])
        np.testing.assert_array_equal(batch.next_state.depth[row, 0], source.observations["depth"][step + 1])
        np.testing.assert_array_equal(batch.next_state.gripper[row], source.observations["gripper"][step + 1])
        np.testing.assert_allclose(SMALL.action.denormalize(batch.action[row].numpy()), source.actions[step], atol=1e-6)
    assert batch.reward.tolist() == [0.0, 1.0, 0.0]
    assert batch.discount.tolist() == pytest.approx([0.99, 0.0, 0.99])


def test_transitions_are_drawn_alike_or_by_weight(reach: Dataset) -> None:
    generator, weights = torch.Generator().manual_seed(0), torch.zeros(len(reach))
    weights[3], weights[7] = 3.0, 1.0
    counts = torch.bincount(reach.draw(4000, generator, weights), minlength=len(reach)) / 4000
    assert set(counts.nonzero()[:, 0].tolist()) == {3, 7}
    assert counts[3].item() == pytest.approx(0.75, abs=0.03)
    counts = torch.bincount(reach.draw(4000, generator), minlength=len(reach)) / 4000
    torch.testing.assert_close(counts, torch.full_like(counts, 1 / len(reach)), rtol=0, atol=0.02)


@pytest.mark.parametrize("n_step", [1, 3, 10, 10**12])
def test_rewards_are_summed_over_n_steps_as_far_as_the_episode_goes(n_step: int, tmp_path: Path) -> None:
    def edit(index: int, episode: dict[str, Any]) -> None:
        episode["reward"] = [1.0, 0.0, 2.0, 4.0]
        episode["termination"] = [False, False, False, index == 0]

    data = load(write_dataset(tmp_path, episodes=2, edit=edit), successful_only=False, discount=0.5, n_step=n_step)
    frames_per_episode = 5
    for row in range(8):
        episode, step = divmod(row, 4)
        ahead = min(n_step, 4 - step)
        rewards = [1.0, 0.0, 2.0, 4.0][step : step + ahead]
        ended = step + ahead == 4 and episode == 0
        assert data.reward[row].item() == pytest.approx(sum(0.5**i * r for i, r in enumerate(rewards)))
        assert data.discount[row].item() == pytest.approx(0.0 if ended else 0.5**ahead)
        assert data.then[row].item() == episode * frames_per_episode + step + ahead
    assert data.where(torch.tensor([0, 5])) == [(0, 0), (1, 1)]


def test_the_hash_is_of_the_content_alone(tmp_path: Path, reach: Dataset) -> None:
    again = load(write_dataset(tmp_path / "again"), successful_only=True)
    assert again.sha256 == reach.sha256

    def nudge(index: int, episode: dict[str, Any]) -> None:
        episode["depth"][0][0, 0] += 1e-6

    assert load(write_dataset(tmp_path / "other", edit=nudge), successful_only=True).sha256 != reach.sha256


def test_failures_are_dropped_for_cloning_and_kept_for_reinforcement(tmp_path: Path) -> None:
    path = write_dataset(tmp_path, episodes=4, reward=lambda episode: float(episode % 2))
    assert load(path, successful_only=True).episodes == 2
    assert load(path, successful_only=False).episodes == 4


def test_nothing_worth_imitating_is_an_error(tmp_path: Path) -> None:
    path = write_dataset(tmp_path, episodes=2, reward=lambda episode: 0.0)
    with pytest.raises(Rejected, match="successful episodes"):
        load(path, successful_only=True)


def put(field: str, step: int, value: Any) -> Callable[[int, dict[str, Any]], None]:
    """An edit that replaces one step of episode 1."""

    def edit(index: int, episode: dict[str, Any]) -> None:
        if index == 1:
            episode[field][step] = value(episode[field][step])

    return edit


def to_all(field: str, change: Callable[[Any], Any]) -> Callable[[int, dict[str, Any]], None]:
    def edit(index: int, episode: dict[str, Any]) -> None:
        episode[field] = [change(v) for v in episode[field]]

    return edit


def at_component(index: int, value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(action: np.ndarray) -> np.ndarray:
        action = action.copy()
        action.reshape(-1)[index] = value
        return action

    return change


BROKEN: dict[str, tuple[Callable[[int, dict[str, Any]], None], str]] = {
    "NaN depth": (put("depth", 2, at_component(5, np.nan)), "episode 1, step 2, depth: expected finite"),
    "infinite depth": (put("depth", 0, at_component(0, np.inf)), "episode 1, step 0, depth: expected finite"),
    "depth in millimetres": (put("depth", 3, lambda d: d * 1000), "episode 1, step 3, depth: expected 0 to 0.6 m"),
    "negative depth": (put("depth", 1, lambda d: -d), "episode 1, step 1, depth"),
    "NaN gripper": (put("gripper", 4, lambda g: g * np.nan), "episode 1, step 4, gripper"),
    "gripper in metres": (put("gripper", 1, lambda g: g * 0 + 8), "episode 1, step 1, gripper"),
    "NaN action": (put("action", 1, at_component(3, np.nan)), "episode 1, step 1, action: expected finite"),
    "planar beyond its radius": (put("action", 2, at_component(1, 0.2)), "episode 1, step 2, action.planar"),
    "lift beyond its limit": (put("action", 0, at_component(3, -0.06)), "episode 1, step 0, action.lift"),
    "yaw in degrees": (put("action", 3, at_component(4, 45.0)), "episode 1, step 3, action.yaw"),
    "gripper command -1": (put("action", 3, at_component(0, -1.0)), "episode 1, step 3, action.gripper"),
    "NaN reward": (put("reward", 0, lambda r: np.nan), "episode 1, step 0, reward"),
    "termination before the end": (
        lambda i, e: e.update(termination=[False, True, False, True]),
        "episode 0, step 1, termination",
    ),
    "another image size": (to_all("depth", lambda d: d[:16, :16]), "episode 0, depth: expected shape"),
    "four action components": (to_all("action", lambda a: a[:4]), "episode 0, action: expected shape"),
    "integer depth": (to_all("depth", lambda d: (d * 1000).astype(np.uint16)), "episode 0, depth: expected float32"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_dataset_is_refused_by_episode_step_and_field(name: str, tmp_path: Path) -> None:
    edit, said = BROKEN[name]
    path = write_dataset(tmp_path, episodes=3, edit=edit)
    with pytest.raises(Rejected) as refusal:
        load(path, successful_only=False)
    assert said in str(refusal.value)


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"task": "reach"}, "metadata.contract"),
        ({"contract": "{}", "contract_digest": "0"}, "contract"),
        ({"contract": SMALL.to_json(), "contract_digest": "0" * 64}, "metadata.contract_digest"),
    ],
)
def test_data_without_a_contract_are_refused(metadata: dict[str, str], said: str, tmp_path: Path) -> None:
    path = write_dataset(tmp_path, episodes=1, metadata=metadata)
    with pytest.raises(Rejected, match=said):
        load(path, successful_only=False)


def test_a_dataset_that_does_not_fit_in_memory_is_refused_in_words(tmp_path: Path) -> None:
    """Twice 39 MB, where 50 are left."""
    frames, path = 600, tmp_path / "long"
    long = Episode(
        depth=np.full((frames + 1, *SPEC.observation.shape), 0.3, np.float32),
        gripper=np.zeros((frames + 1, 1), np.float32),
        action=np.zeros((frames, ACTION.size), np.float32),
        reward=np.ones(frames, np.float32),
        terminated=True,
        truncated=False,
    )
    store.write(path, [long], store.About(spec=SPEC, task="wait", behavior="none"))
    code = f"""
import resource
from pathlib import Path
from protos.errors import Rejected
from training.data.dataset import load
fits = load(Path({str(path)!r}), successful_only=True)
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + 50 * 2**20,) * 2)
try:
    load(Path({str(path)!r}), successful_only=True)
except Rejected as refused:
    print(refused)
"""
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True
    ).stdout
    assert said.startswith(f"{path}: expected a dataset that fits in memory, twice while it is read, got ")
    assert "python -m training.data split" in said


def test_no_dataset_and_half_a_file_are_errors_that_name_the_path(tmp_path: Path) -> None:
    with pytest.raises(Rejected, match="nothing there"):
        load(tmp_path / "nowhere", successful_only=False)
    path = write_dataset(tmp_path, episodes=2)
    file = path / "data" / "main_data.hdf5"
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(Rejected, match=str(path)):
        load(path, successful_only=False)
