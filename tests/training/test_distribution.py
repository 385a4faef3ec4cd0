"""The distribution against numerical integration, and its symmetry."""

import math

import numpy as np
import pytest
import torch

from protos.spaces import ACTION
from protos.symmetry import Element
from training.networks.distribution import (
    INSIDE,
    SquashedGaussian,
    Uniform,
    _motion_log_prob,
    parameter_kinds,
)

SIZE = ACTION.size + 3
PLANAR = ACTION.slice_of("planar")


def distribution(seed: int = 0, batch: int = 1, spread: float = 0.7) -> SquashedGaussian:
    return SquashedGaussian(spread * torch.randn(batch, SIZE, generator=torch.Generator().manual_seed(seed)), ACTION)


def at(field: str, values: torch.Tensor) -> torch.Tensor:
    """Actions [N, 1, A] that are zero but for one field."""
    action = torch.zeros(len(values), 1, ACTION.size)
    action[:, 0, ACTION.slice_of(field)] = values
    return action


def density_without(pi: SquashedGaussian, field: str) -> torch.Tensor:
    """Log-density [1] of the other fields at zero, where `at` holds them."""
    place = ACTION.slice_of(field)
    zero = torch.zeros(1, ACTION.size)
    own = _motion_log_prob(zero[:, place], pi._location[..., place], pi._log_scale[field])
    return pi.log_prob(zero) - own


def test_a_network_predicts_locations_and_one_scale_a_motion_field() -> None:
    assert [k.value for k in parameter_kinds(ACTION)] == ["scalar", "vector", "scalar", "pseudoscalar"] + ["scalar"] * 3


@pytest.mark.parametrize("field", ["lift", "yaw"])
def test_the_density_of_a_scalar_motion_integrates_to_one(field: str) -> None:
    pi = distribution(1)
    edge = 0.97  # inside the clamp, where the density is exact; the tails beyond are counted by sampling
    grid = torch.linspace(-edge, edge, 4001)
    density = (pi.log_prob(at(field, grid[:, None]))[:, 0] - density_without(pi, field)).exp()
    samples = pi.sample(20000)[0][:, 0, ACTION.slice_of(field)]
    inside = (samples.abs() < edge).float().mean().item()
    assert torch.trapezoid(density, grid).item() == pytest.approx(inside, abs=0.015)


def test_the_density_of_a_planar_motion_integrates_to_one_over_the_disc() -> None:
    pi = distribution(2)
    edge = 0.97
    radius, angle = torch.linspace(1e-4, edge, 400), torch.linspace(0, 2 * math.pi, 181)
    r, phi = torch.meshgrid(radius, angle, indexing="ij")
    points = torch.stack([r * phi.cos(), r * phi.sin()], dim=-1).reshape(-1, 2)
    density = (pi.log_prob(at("planar", points))[:, 0] - density_without(pi, "planar")).exp().reshape(r.shape)
    mass = torch.trapezoid(torch.trapezoid(density * r, angle, dim=1), radius).item()
    samples = pi.sample(20000)[0][:, 0, PLANAR]
    assert mass == pytest.approx((samples.norm(dim=-1) < edge).float().mean().item(), abs=0.015)


def test_a_command_s_likelihoods_sum_to_one() -> None:
    pi = distribution(3)
    closed, opened = (pi.log_prob(at("gripper", torch.tensor([[end]])))[0] for end in (-1.0, 1.0))
    rest = pi.log_prob(torch.zeros(1, 1, ACTION.size))[0]
    share = torch.sigmoid(pi._location[..., 0])
    middle = 0.5 * torch.log(share) + 0.5 * torch.log(1 - share)
    assert torch.exp(closed - rest + middle) + torch.exp(opened - rest + middle) == pytest.approx(1.0)


@pytest.mark.parametrize("degrees", [17, 45, 90, 200])
def test_turning_state_and_action_leaves_the_likelihood(degrees: int) -> None:
    turn = Element(math.radians(degrees)).rho(ACTION).astype(np.float32)
    parameters = torch.randn(5, SIZE)
    action = (torch.rand(7, 5, ACTION.size) - 0.5) * 1.3
    after = parameters.clone()
    after[:, : ACTION.size] = parameters[:, : ACTION.size] @ torch.from_numpy(turn).T
    torch.testing.assert_close(
        SquashedGaussian(after, ACTION).log_prob(action @ torch.from_numpy(turn).T),
        SquashedGaussian(parameters, ACTION).log_prob(action),
        atol=1e-4,
        rtol=1e-4,
    )


def test_samples_and_modes_stay_inside_the_limits() -> None:
    pi = distribution(4, batch=2000, spread=5.0)
    for action in (pi.sample(3)[0], pi.mode()):
        assert ACTION.magnitudes(ACTION.denormalize(action.numpy())).max() <= 1 + 1e-5


def test_the_mode_is_where_the_samples_are_when_the_scale_is_small() -> None:
    parameters = torch.zeros(1, SIZE)
    parameters[0, 1:5] = torch.tensor([0.4, -0.3, 0.2, -0.1])
    parameters[0, 5:] = -20.0
    pi = SquashedGaussian(parameters, ACTION)
    motions = pi.sample(4000)[0][:, 0, 1:]
    # The smallest scale is 0.22: the squash's curvature moves the mean of the samples off the mode by up to 0.02.
    torch.testing.assert_close(motions.mean(dim=0), pi.mode()[0, 1:], atol=0.03, rtol=0)


@pytest.mark.parametrize("radius", [0.0, 1e-8, 0.5, INSIDE, 1.0, 1.00001])
def test_log_prob_and_its_gradient_are_finite_up_to_the_bound(radius: float) -> None:
    parameters = torch.zeros(1, SIZE, requires_grad=True)
    action = torch.tensor([[1.0, radius, 0.0, -radius, radius]])
    SquashedGaussian(parameters, ACTION).log_prob(action).sum().backward()
    assert parameters.grad is not None
    assert torch.isfinite(parameters.grad).all()


def test_a_likelihood_is_one_number_a_sample() -> None:
    pi = distribution(5, batch=6)
    assert pi.log_prob(torch.zeros(6, ACTION.size)).shape == (6,)
    assert pi.log_prob(torch.zeros(10, 6, ACTION.size)).shape == (10, 6)


def test_a_sample_comes_with_its_own_log_probability() -> None:
    pi = distribution(6, batch=50, spread=0.5)
    action, log_prob = pi.sample(20)
    inside = (torch.from_numpy(ACTION.magnitudes(ACTION.denormalize(action.numpy()))) < INSIDE - 0.01)[..., 1:].all(-1)
    assert inside.sum() > 100
    torch.testing.assert_close(log_prob[inside], pi.log_prob(action)[inside], atol=1e-3, rtol=1e-3)


def test_samples_far_beyond_the_bound_have_a_finite_log_probability_and_gradient() -> None:
    parameters = torch.full((1, SIZE), 30.0, requires_grad=True)
    action, log_prob = SquashedGaussian(parameters, ACTION).sample(8)
    (action.sum() + log_prob.sum()).backward()
    assert torch.isfinite(log_prob).all()
    assert parameters.grad is not None
    assert torch.isfinite(parameters.grad).all()


def test_an_expectation_over_every_command_is_what_many_draws_approach() -> None:
    pi = distribution(7, batch=3)
    value = torch.tensor([1.0, -2.0, 0.5, 3.0, 1.0])
    action, log_prob = pi.sample(40000)
    sampled = ((action * value).sum(dim=-1) - log_prob).mean(dim=0)
    every, log_every, weight = pi.with_every_command(action, log_prob)
    assert len(every) == 2 * len(action)
    torch.testing.assert_close(weight.sum(dim=0), torch.ones(3))
    exact = (weight * ((every * value).sum(dim=-1) - log_every)).sum(dim=0)
    torch.testing.assert_close(exact, sampled, atol=0.05, rtol=0)


def test_uniform_actions_fill_the_disc_and_both_commands_with_density_one_over_the_volume() -> None:
    action, log_prob = Uniform(ACTION).sample(20000, torch.zeros(2, ACTION.size))
    # Half a disc's area lies within 1 / sqrt(2) of its centre. Volume: 2 commands x pi x [-1, 1] x [-1, 1].
    assert (action[..., PLANAR].norm(dim=-1) < math.sqrt(0.5)).float().mean().item() == pytest.approx(0.5, abs=0.01)
    assert action[..., PLANAR].norm(dim=-1).max() <= 1
    assert sorted(action[..., 0].unique().tolist()) == [-1.0, 1.0]
    assert (action[..., ACTION.slice_of("yaw")] < 0.5).float().mean().item() == pytest.approx(0.75, abs=0.01)
    assert log_prob.unique().tolist() == pytest.approx([-math.log(2 * math.pi * 4)])
