"""Collection: what is written is what happened, whoever acts, however many record, however often interrupted."""

import dataclasses
import functools
import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium
import minari
import numpy as np
import pybullet as p
import pytest

from protos.errors import Rejected
from protos.files import held
from protos.spaces import ACTION, SPEC
from serving.errors import PolicyRefused
from sim_client import ENV_IDS, workers
from sim_client.behaviors import GOLDEN, uniform
from sim_client.calibrate import EPISODES, ROUNDS, calibrate
from sim_client.collect import Collect, Recorder, Summary, _noisy_recorder, collect, main, prepare, recorder
from sim_client.episodes import Episode
from sim_client.randomization import Randomization
from sim_client.rollout import rollout
from sim_client.store import read, read_about
from sim_client.workers import Partial, Record
from sim_client.world import World, unwrapped
from tests.makers import tiny_policy_file
from tests.sim_client.test_store import same


def collected(output: Path, **asked: Any) -> tuple[Summary, list[Episode]]:
    summary = collect(Collect(output=output, **{"task": "block_picking", **asked}))
    return summary, list(read(output))


def test_what_is_written_is_what_happened(tmp_path: Path) -> None:
    summary, episodes = collected(tmp_path / "d", episodes=3, seed=4)
    assert (summary.episodes, summary.successes) == (3, 3)
    assert summary.transitions == sum(map(len, episodes))
    assert [e.seed for e in episodes] == [4_000_000, 4_000_001, 4_000_002]
    assert all(e.terminated and not e.truncated and e.behavior == "expert" for e in episodes)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d"], "nothing else is left"


def test_the_contract_and_the_seed_travel_with_the_data(tmp_path: Path) -> None:
    collected(tmp_path / "d", episodes=1, seed=4)
    about = read_about(tmp_path / "d")
    assert (about.spec, about.task, about.behavior, about.notes) == (SPEC, "block_picking", "expert", {"seed": 4})


def test_the_environment_can_be_recovered_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(arm="kuka", randomize=Randomization(friction=0.2))
    collected(tmp_path / "picking", episodes=1, world=world)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    dataset = minari.load_dataset("picking")
    env = dataset.recover_environment()
    obs, _ = env.reset(seed=0)
    np.testing.assert_array_equal(obs["depth"], next(iter(read(tmp_path / "picking"))).depth[0])
    assert env.unwrapped.randomization == world.randomize  # type: ignore[attr-defined]
    env.close()


def test_success_in_the_last_step_that_there_is_was_not_cut_off() -> None:
    def steps(env: Any) -> Episode:
        return rollout(env, lambda *_: unwrapped(env).expert_action(), seed=3)

    whole = steps(gymnasium.make(ENV_IDS["block_picking"]))
    just = steps(gymnasium.make(ENV_IDS["block_picking"], max_episode_steps=len(whole)))
    assert (len(just), just.terminated, just.truncated) == (len(whole), True, False)


def test_transitions_are_exact_and_the_cut_episode_is_truncated(tmp_path: Path) -> None:
    _, episodes = collected(tmp_path / "d", transitions=10, seed=1)
    assert sum(map(len, episodes)) == 10
    assert (episodes[-1].terminated, episodes[-1].truncated) == (False, True)


def test_the_number_of_workers_changes_nothing(tmp_path: Path) -> None:
    asked = {"episodes": 4, "behavior": "mixed:expert=0.5,random=0.5"}
    _, alone = collected(tmp_path / "one", workers=1, **asked)
    _, together = collected(tmp_path / "two", workers=2, **asked)
    assert all(same(*pair) for pair in zip(alone, together, strict=True))


def telling_what_it_hears() -> Record:
    deaf = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    empty = np.zeros((0, 5), np.float32)
    return lambda _: Episode(empty, empty, empty, empty, deaf, not deaf)


def test_workers_do_not_hear_ctrl_c_and_the_command_does(tmp_path: Path) -> None:
    """A terminal tells all of its processes, and whoever imports, or has nothing to do, would show a traceback."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    made = workers.episodes(Partial(tmp_path / "d", {}), telling_what_it_hears, 2)
    assert all(next(made).terminated for _ in range(4))
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
    made.close()  # type: ignore[attr-defined]


def test_failures_can_be_left_out(tmp_path: Path) -> None:
    asked = {"episodes": 3, "behavior": "mixed:expert=0.5,random=0.5"}
    _, kept = collected(tmp_path / "all", **asked)
    _, won = collected(tmp_path / "won", keep_failures=False, **asked)
    assert not all(e.success for e in kept)
    assert all(e.success for e in won)
    assert len(won) == 3


@pytest.mark.parametrize("workers", [1, 2])
def test_a_behavior_that_never_succeeds_comes_to_an_end_and_fills_no_disk(workers, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("sim_client.collect.HOPELESS", 3)
    asked = Collect(
        output=tmp_path / "none",
        behavior="random",
        task="block_picking",
        episodes=1,
        keep_failures=False,
        workers=workers,
    )
    with pytest.raises(ValueError, match="--behavior random: 3 episodes in a row failed"):
        collect(asked)
    assert list(tmp_path.iterdir()) == []  # another behaviour may have the place


def test_of_a_failure_that_is_not_kept_nothing_remains_but_that_it_was_one(tmp_path) -> None:
    partial, failed = Partial(tmp_path / "none", {}), collected(tmp_path / "all", behavior="random", episodes=1)[1][0]
    assert not failed.success
    partial.reject(0, failed)
    assert partial.path(0).stat().st_size < 5000
    assert not partial.load(0).success


def test_where_failures_are_left_out_none_is_made_by_cutting(tmp_path: Path) -> None:
    summary, won = collected(tmp_path / "won", keep_failures=False, episodes=None, transitions=10)
    assert all(e.success for e in won)
    assert 10 <= summary.transitions < 10 + len(won[-1])


def test_a_noisy_expert_is_clumsier_but_within_bounds(tmp_path: Path) -> None:
    _, steady = collected(tmp_path / "steady", episodes=3)
    _, noisy = collected(tmp_path / "noisy", episodes=3, behavior="noisy", noise=0.6)
    assert np.mean([len(e) for e in noisy]) > np.mean([len(e) for e in steady])
    actions = np.concatenate([e.action for e in noisy])
    assert ACTION.magnitudes(actions).max() <= 1 + 1e-6
    assert set(np.unique(actions[:, ACTION.slice_of("gripper")])) <= {0.0, 1.0}


def test_chance_acts_evenly_and_within_bounds() -> None:
    rng = np.random.default_rng(0)
    actions = np.stack([uniform(ACTION, rng) for _ in range(2000)])
    assert ACTION.magnitudes(actions).max() <= 1 + 1e-6
    part = {f.name: ACTION.normalize(actions)[:, ACTION.slice_of(f.name)] for f in ACTION.fields}
    dx, dy = part["planar"].T
    sectors, _ = np.histogram(np.arctan2(dy, dx), bins=8, range=(-np.pi, np.pi))
    assert sectors.min() > 2000 / 8 - 80
    assert np.mean(np.hypot(dx, dy) < 0.5**0.5) == pytest.approx(0.5, abs=0.05)  # half of the disc
    assert set(part["gripper"].ravel()) == {-1.0, 1.0}
    for name in ("gripper", "lift", "yaw"):
        assert part[name].mean() == pytest.approx(0.0, abs=0.12), name
    for name in ("lift", "yaw"):
        assert part[name].std() == pytest.approx(3**-0.5, abs=0.05), name


def test_who_acts_by_chance_draws_by_the_episodes_seed(tmp_path: Path) -> None:
    _, (episode,) = collected(tmp_path / "d", transitions=3, behavior="random", seed=2)
    rng = np.random.default_rng((episode.seed, 1))
    np.testing.assert_array_equal(episode.action, [uniform(ACTION, rng) for _ in range(3)])


def test_a_policy_file_can_act(tmp_path: Path) -> None:
    policy = tiny_policy_file(tmp_path / "policy.onnx", SPEC)
    _, episodes = collected(tmp_path / "d", transitions=3, behavior=f"policy:{policy}")
    assert episodes[0].behavior == f"policy:{policy}"
    with pytest.raises(PolicyRefused, match=r"nowhere\.onnx"):
        collected(tmp_path / "e", episodes=1, behavior=f"policy:{tmp_path}/nowhere.onnx")


@pytest.mark.parametrize(("of", "told"), [("block_picking", False), ("drawer_opening", True)])
def test_a_policy_of_another_task_acts_and_is_told_of_once(of: str, told: bool, tmp_path: Path, capsys) -> None:
    file = tiny_policy_file(tmp_path / "policy.onnx", SPEC, task=of)
    prepare(Collect(output=tmp_path / "d", task="block_picking", episodes=1, behavior=f"policy:{file}"))
    said = f"policy {file} was trained for drawer_opening, the task here is block_picking\n"
    assert capsys.readouterr().err == said * told


@pytest.mark.parametrize("target", [0.3, 0.7])
def test_the_noise_that_is_found_makes_an_expert_succeed_as_often_as_asked(
    target: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An expert that fails half the time at 0.8, and slowly: its log-odds fall by 2 with the noise's logarithm."""
    seeds: list[int] = []

    def rate(noise: float) -> float:
        return 1 / (1 + (noise / 0.8) ** 2)

    def make(noise: float) -> Callable[[int], Callable[[int], Any]]:
        def recorder(first_seed: int) -> Callable[[int], Any]:
            def record(index: int) -> Any:
                seeds.append(first_seed + index)
                return SimpleNamespace(success=seeds[-1] * GOLDEN % 1 < rate(noise))

            return record

        return recorder

    def played(_scratch: Partial, scenes: Callable[[], Callable[[int], Any]], _workers: int) -> Iterator[Any]:
        record = scenes()
        yield from map(record, itertools.count())

    monkeypatch.setattr("sim_client.calibrate.episodes", played)
    noise, reached = calibrate(make, tmp_path, target, workers=1)
    assert rate(noise) == pytest.approx(target, abs=0.05)
    assert reached == pytest.approx(target, abs=0.01)
    assert len(set(seeds)) == len(seeds) == ROUNDS * EPISODES, "each round has scenes of its own"


def test_a_share_that_no_noise_comes_near_is_refused_and_the_place_is_free(tmp_path: Path, monkeypatch) -> None:
    """An expert that succeeds half the time however its hand shakes."""
    monkeypatch.setattr("sim_client.calibrate.ROUNDS", 3)
    outcomes = (SimpleNamespace(success=i % 2 == 0) for i in itertools.count())
    monkeypatch.setattr("sim_client.calibrate.episodes", lambda *_: (outcome for outcome in outcomes))
    asked = Collect(output=tmp_path / "d", task="block_picking", episodes=1, behavior="noisy", target_success=0.95)
    with pytest.raises(Rejected, match=r"--target-success: expected 95% .*, got 60% at a noise of 0.05"):
        collect(asked)
    assert list(tmp_path.iterdir()) == []


def test_a_calibrated_behaviour_says_what_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sim_client.calibrate.EPISODES", 1)
    monkeypatch.setattr("sim_client.calibrate.ROUNDS", 1)
    monkeypatch.setattr("sim_client.calibrate.OFF", 1.0)
    collected(tmp_path / "d", episodes=2, behavior="noisy", target_success=0.5)
    notes = read_about(tmp_path / "d").notes
    assert notes["target_success"] == 0.5
    assert 0 <= notes["calibrated_success"] <= 1
    assert notes["noise"] > 0


def test_an_interrupted_calibration_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sim_client.calibrate.EPISODES", 2)
    config, played = Collect(output=tmp_path / "d", task="block_picking", episodes=1, behavior="noisy", noise=1.0), []

    def found(rounds: int, folder: str) -> tuple[float, float]:
        def make(noise: float) -> Callable[[int], Record]:
            played.append(noise)
            return functools.partial(_noisy_recorder, config, noise)

        monkeypatch.setattr("sim_client.calibrate.ROUNDS", rounds)
        return calibrate(make, tmp_path / folder, 0.5, workers=1)

    whole = found(3, "whole")
    found(2, "halves")
    assert found(3, "halves") == whole
    assert found(3, "halves") == whole
    assert played[:3] == played[3:]  # each round once


def test_an_interrupted_collection_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Collect(output=tmp_path / "d", task="block_picking", episodes=4)
    saved, save = [], workers.save

    def dies_at_the_third(path: Path, episode: Episode) -> None:
        if len(saved) == 2:
            raise OSError(28, "No space left on device")
        saved.append(path.stem)
        save(path, episode)

    monkeypatch.setattr(workers, "save", dies_at_the_third)
    with pytest.raises(OSError, match="No space"):
        collect(config)
    assert not config.output.exists()
    monkeypatch.setattr(workers, "save", lambda path, episode: (saved.append(path.stem), save(path, episode)))
    collect(config)
    assert saved == ["0000000", "0000001", "0000002", "0000003"], "no episode is run twice"
    _, fresh = collected(tmp_path / "fresh", episodes=4)
    assert all(same(*pair) for pair in zip(read(config.output), fresh, strict=True))


@pytest.mark.parametrize(("failure", "code"), [(KeyboardInterrupt(), 130), (OSError("no space left"), 1)], ids=repr)
@pytest.mark.parametrize("left", ["request.json", "0000000.npz", "noise0/0000000.npz", "calibration.json"])
def test_who_ended_it_is_told_by_the_exit_code(left, failure, code: int, tmp_path, monkeypatch, capsys) -> None:
    """And that it goes on where something is left to go on from: not where the very place could not be made."""

    def fail(_config: Collect) -> None:
        file = tmp_path / ".d.partial" / left
        file.parent.mkdir(parents=True)
        file.touch()
        raise failure

    monkeypatch.setattr("sim_client.collect.collect", fail)
    monkeypatch.setattr("sys.argv", ["collect", "--episodes", "1", "--output", str(tmp_path / "d")])
    assert main() == code
    assert ("goes on from here" in capsys.readouterr().err) is (left != "request.json")


def test_a_killed_collection_loses_at_most_the_running_episodes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sim_client.collect", "--task", "block_picking", "--episodes", "500"]
    asked = ["--workers", "2", "--output", str(tmp_path / "d")]
    process = subprocess.Popen([*command, *asked])
    folder = tmp_path / ".d.partial"
    deadline = time.monotonic() + 60
    while len(list(folder.glob("*.npz"))) < 6 and time.monotonic() < deadline:
        time.sleep(0.05)
    pids = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()  # the command alone, as the kernel does where memory is short
    process.wait()
    assert len(pids) >= 2
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, "its workers stay for ever"
        time.sleep(0.05)
    files = sorted(p.name for p in folder.glob("*.npz"))
    assert len(files) >= 6
    for file in files:
        with np.load(folder / file) as whole:
            assert len(whole["depth"]) == len(whole["action"]) + 1


def test_what_another_process_records_is_left_alone(tmp_path: Path) -> None:
    config = Collect(output=tmp_path / "d", task="block_picking", episodes=2)
    request = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("output", "workers")}
    others = workers.Partial(config.output, json.loads(json.dumps(request, default=str)))
    asked = (others.folder / "request.json").read_text()
    for also in (config, dataclasses.replace(config, behavior="random")):
        with held(others.folder), pytest.raises(FileExistsError, match=r"another process records .*d: let it finish"):
            collect(also)
    assert (others.folder / "request.json").read_text() == asked
    collect(config)


def test_a_process_that_cannot_be_started_is_no_other_that_records(tmp_path: Path, monkeypatch, capsys) -> None:
    """EAGAIN is a BlockingIOError, as is a lock that another has."""

    def no_more_processes(*_: Any) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr("sim_client.collect.write", no_more_processes)
    monkeypatch.setattr("sys.argv", ["collect", "--episodes", "1", "--output", str(tmp_path / "d")])
    assert main() == 1
    assert "stopped: [Errno 11] Resource temporarily unavailable" in capsys.readouterr().err


def test_a_recorder_lets_go_of_its_physics(tmp_path: Path) -> None:
    recorders: list[Recorder] = []

    def make() -> Recorder:
        recorders.append(recorder(Collect(output=tmp_path / "d", task="block_picking", episodes=1), 0.0))
        return recorders[-1]

    endless = workers.episodes(Partial(tmp_path / "d", {}), make, 1)
    next(endless)
    client = unwrapped(recorders[0]._env)._client
    assert p.isConnected(client)
    endless.close()  # type: ignore[attr-defined]
    assert not p.isConnected(client)


def test_what_was_left_of_another_collection_is_not_mixed_in(tmp_path: Path) -> None:
    config = Collect(output=tmp_path / "d", task="block_picking", episodes=4)
    request = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("output", "workers")}
    kept = workers.Partial(config.output, json.loads(json.dumps(request, default=str)))
    kept.path(0).write_bytes(b"cut short")
    with pytest.raises(FileExistsError, match="differs in seed"):
        collect(dataclasses.replace(config, seed=1))
    with pytest.raises(ValueError, match=r"0000000\.npz is damaged .*remove it"):
        collect(config)
    (kept.folder / "request.json").write_text("cut")
    with pytest.raises(FileExistsError, match=r"request\.json is damaged .*remove the folder"):
        collect(config)


def test_where_a_seed_s_scenes_are_not_enough_it_says_how_to_go_on(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("sim_client.collect.RECORDED_PER_SEED", 2)
    config = Collect(output=tmp_path / "d", task="block_picking", transitions=1000)
    with pytest.raises(ValueError, match=r"--seed 0 has 2 scenes, and they are not enough: .*training\.data merge"):
        collect(config)


def test_a_collection_that_recorded_nothing_has_no_hold_on_the_place(tmp_path: Path) -> None:
    config = Collect(output=tmp_path / "d", task="block_picking", episodes=1)
    workers.Partial(config.output, {"episodes": 40, "task": "drawer_opening"})
    collect(config)
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_episodes_that_nobody_knows_the_request_of_are_not_taken_for_ours(tmp_path: Path) -> None:
    """As a removal leaves them that was interrupted, or a worker that outlived its collection."""
    config = Collect(output=tmp_path / "d", task="block_picking", episodes=1)
    folder = tmp_path / ".d.partial"
    folder.mkdir()
    (folder / "0000000.npz").write_bytes(b"another's")
    with pytest.raises(FileExistsError, match="remove the folder"):
        collect(config)
    shutil.rmtree(folder)
    collect(config)
    assert not list(tmp_path.glob(".d*"))


def test_a_policy_that_was_replaced_meanwhile_does_not_go_on_for_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tiny_policy_file(tmp_path / "tiny.onnx", SPEC)
    config = Collect(output=tmp_path / "d", task="block_picking", episodes=2, behavior=f"policy:{file}")

    def interrupted(_output: Path, recorded: Iterator[Any], *_args: Any) -> None:
        next(recorded)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("sim_client.collect.write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            collect(config)
    tiny_policy_file(file, SPEC, weight=2.0)
    with pytest.raises(FileExistsError, match="differs in policies"):
        collect(config)


def test_an_existing_dataset_is_not_overwritten(tmp_path: Path, monkeypatch, capsys) -> None:
    there = tmp_path / "d"
    there.mkdir()
    monkeypatch.setattr("sys.argv", ["collect", "--episodes", "1", "--output", str(there)])
    assert main() == 2
    assert "exists already" in capsys.readouterr().err
    assert list(there.iterdir()) == []


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({}, "give either"),
        ({"episodes": 1, "transitions": 1}, "give either"),
        ({"episodes": 0}, "nothing to record"),
        ({"episodes": 1, "seed": -1}, "must not be negative"),
        ({"episodes": 1, "seed": 900}, "at most 699"),
        ({"episodes": 1, "workers": 0}, "at least 1"),
        ({"episodes": 1, "workers": 100_000}, "and here at most"),
        ({"episodes": 1_000_001}, "a seed has 1000000 scenes"),
        ({"episodes": 1, "behavior": "noisy", "noise": 1e308}, "at most 4"),
        ({"episodes": 1, "behavior": "clever"}, "no behaviour"),
        ({"episodes": 1, "behavior": "mixed:expert=0.5,random=0.2"}, "sum to 1"),
        ({"episodes": 1, "behavior": "mixed:expert=half"}, "mixed:expert="),
        ({"episodes": 1, "behavior": "noisy"}, "noisy takes one of --noise"),
        ({"episodes": 1, "behavior": "noisy", "noise": 0.3, "target_success": 0.4}, "noisy takes one of --noise"),
        ({"episodes": 1, "noise": 0.3}, "expert takes neither --noise nor --target-success"),
        ({"episodes": 1, "target_success": 0.4}, "expert takes neither"),
        ({"episodes": 1, "noise": 0.3, "target_success": 0.4}, "expert takes neither"),
        ({"episodes": 1, "behavior": "noisy", "target_success": 1.2}, "between 0 and 1"),
    ],
)
def test_contradictory_requests_are_refused(bad: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Collect(output=Path("unused"), **bad)
