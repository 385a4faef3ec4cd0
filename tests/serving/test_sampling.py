"""Draws come from the distribution that was trained, and are reproducible."""

import numpy as np
import pytest

from protos.codec import unpack_action
from protos.equiserve.v1 import policy_pb2 as pb
from protos.spaces import ACTION
from serving.sampling import sample
from tests.serving.requests import acting

COUNT = 20_000


def drawn(parameters):
    """(draws of training's own distribution, draws rebuilt from its mode and scale), [COUNT, A] each, physical."""
    import torch

    from training.networks.distribution import SquashedGaussian

    torch.manual_seed(0)
    trained = SquashedGaussian(torch.tensor(parameters)[None], ACTION)
    expected = ACTION.denormalize(trained.sample(COUNT)[0][:, 0].numpy())
    mode, std = ACTION.denormalize(trained.mode()[0].numpy()), trained.std()[0].numpy() * ACTION.scale
    rng = np.random.default_rng(0)
    return expected, np.stack([sample(mode, std, ACTION, rng) for _ in range(COUNT)])


@pytest.mark.parametrize(
    "parameters",
    [
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        [1.5, 0.6, -0.3, 0.4, -0.8, -3.0, 0.0, 2.0],
        [-2.0, 2.5, 1.0, -1.5, 0.1, 1.0, -2.0, 0.5],
    ],
)
def test_a_draw_is_one_of_the_trained_distribution(parameters):
    expected, rebuilt = drawn(parameters)
    error = ACTION.scale / np.sqrt(COUNT) * 5  # of a mean: no component's deviation exceeds its scale
    np.testing.assert_array_less(np.abs(rebuilt.mean(axis=0) - expected.mean(axis=0)), error)
    np.testing.assert_array_less(np.abs(rebuilt.std(axis=0) - expected.std(axis=0)), error)
    for share in (0.1, 0.5, 0.9):
        between = np.quantile(rebuilt[:, 1:], share, axis=0) - np.quantile(expected[:, 1:], share, axis=0)
        np.testing.assert_array_less(np.abs(between), 0.05 * ACTION.scale[1:])


def test_draws_respect_the_bounds():
    rng = np.random.default_rng(0)
    mode, std = np.array([1.0, 0.05, 0.0, -0.05, 0.785], np.float32), ACTION.scale * 3
    draws = np.stack([sample(mode, std, ACTION, rng) for _ in range(2000)])
    assert (ACTION.magnitudes(draws) <= 1 + 1e-6).all()
    assert set(np.unique(draws[:, 0])) <= {0.0, 1.0}


def test_a_sample_is_reproducible_by_its_seed(running):
    def act(seed):
        return running.stub.GetAction(acting(1, mode=pb.MODE_SAMPLE, seed=seed)).action

    assert act(7) == act(7)
    assert act(7) != act(8)
    greedy = unpack_action(running.stub.GetAction(acting(1)).action, ACTION)
    assert not np.allclose(unpack_action(act(7), ACTION), greedy)


def test_an_episode_draws_anew_at_each_step_and_the_same_in_each_run(running):
    def episode(seed):
        id_ = running.stub.StartEpisode(pb.StartEpisodeRequest(mode=pb.MODE_SAMPLE, seed=seed)).episode_id
        return [running.stub.GetAction(acting(1, episode_id=id_, step=step)).action.dx for step in range(4)]

    assert episode(3) == episode(3) != episode(4)
    assert len(set(episode(3))) == 4
