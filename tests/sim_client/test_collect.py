"""Recorded datasets: what Minari reads back is what happened, with the contract beside it."""

import subprocess
import sys
from pathlib import Path

import minari
import numpy as np
import pytest

from protos.spaces import SPEC
from sim_client.collect import Collect, record, write


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Collect:
    config = Collect(output=tmp_path_factory.mktemp("data") / "drawer", episodes=3, seed=4)
    write(config, list(record(config)))
    return config


def test_minari_reads_back_every_value(config: Collect) -> None:
    dataset = minari.MinariDataset(config.output / "data")
    recorded = list(record(config))
    assert dataset.total_episodes == 3
    for stored, episode in zip(dataset.iterate_episodes(), recorded, strict=True):
        np.testing.assert_array_equal(stored.observations["depth"], episode.depth)
        np.testing.assert_array_equal(stored.observations["gripper"], episode.gripper)
        np.testing.assert_array_equal(stored.actions, episode.action)
        np.testing.assert_array_equal(stored.rewards, episode.reward)
        assert stored.terminations[-1]
        assert not stored.truncations.any()


def test_the_contract_travels_with_the_data(config: Collect) -> None:
    metadata = minari.MinariDataset(config.output / "data").storage.metadata
    assert metadata["contract_digest"] == SPEC.digest
    assert metadata["contract"] == SPEC.to_json()
    assert (metadata["task"], metadata["behavior"]) == ("drawer_opening", "expert")


def test_the_environment_can_be_recovered(config: Collect) -> None:
    env = minari.MinariDataset(config.output / "data").recover_environment()
    obs, _ = env.reset(seed=0)
    assert obs["depth"].shape == SPEC.observation.shape
    env.close()


def test_transitions_are_exact_and_the_cut_episode_is_truncated(tmp_path: Path) -> None:
    episodes = list(record(Collect(output=tmp_path / "x", transitions=10, seed=1)))
    assert sum(map(len, episodes)) == 10
    assert episodes[-1].truncated
    assert not episodes[-1].terminated
    assert len(episodes[-1].depth) == len(episodes[-1]) + 1


def test_an_existing_dataset_is_not_overwritten(config: Collect) -> None:
    command = [sys.executable, "-m", "sim_client.collect", "--episodes", "1", "--output", str(config.output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "exists already" in done.stderr
    assert minari.MinariDataset(config.output / "data").total_episodes == 3


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Collect(output=tmp_path / "half", episodes=1)
    episodes = list(record(config))

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(minari, "create_dataset_from_buffers", full)
    with pytest.raises(OSError, match="No space"):
        write(config, episodes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", [{}, {"episodes": 1, "transitions": 1}, {"episodes": 0}, {"episodes": 1, "seed": -1}])
def test_contradictory_requests_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"give either|nothing to record|negative"):
        Collect(output=Path("unused"), **bad)  # type: ignore[arg-type]
