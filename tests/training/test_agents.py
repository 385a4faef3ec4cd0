"""The agents' equations, on numbers worked out by hand and on gradients."""

import math
from typing import Any

import pytest
import torch

from tests.training.conftest import NETWORK, SMALL
from tests.training.test_augment import batch_of
from training.agents.agent import Diverged, Learner, polyak
from training.agents.bc import BC, BCConfig
from training.agents.iql import IQL, IQLConfig
from training.agents.losses import advantage_weight, expectile_loss
from training.batch import Batch
from training.data.dataset import Dataset
from training.networks.family import EQUIVARIANCE

FAMILIES = ["both", "none"]


def make(agent: Any, config: Any, equivariance: str = "both") -> Any:
    return agent(NETWORK, SMALL, EQUIVARIANCE[equivariance], config)


def test_expectile_loss_weighs_shortfalls_by_one_minus_tau() -> None:
    assert expectile_loss(torch.tensor([1.0, -2.0]), 0.8).item() == pytest.approx((0.8 * 1 + 0.2 * 4) / 2)


@pytest.mark.parametrize(("tau", "expected"), [(0.5, 2.0), (0.8, 3.2)])
def test_the_minimiser_of_the_expectile_loss_is_the_expectile(tau: float, expected: float) -> None:
    # For values 0 and 4: tau (4 - m) = (1 - tau) m, so m = 4 tau.
    values, m = torch.tensor([0.0, 4.0]), torch.zeros(1, requires_grad=True)
    for _ in range(400):
        (gradient,) = torch.autograd.grad(expectile_loss(values - m, tau), m)
        m = (m - 0.2 * gradient).detach().requires_grad_()
    assert m.item() == pytest.approx(expected, abs=1e-3)


def test_advantage_weights_are_exponential_and_clipped() -> None:
    weights = advantage_weight(torch.tensor([0.0, 0.5, 100.0]), 0.5, 100.0)
    assert weights.tolist() == pytest.approx([1.0, math.e, 100.0])


@pytest.mark.parametrize("equivariance", FAMILIES)
def test_iql_s_losses_are_the_paper_s(equivariance: str) -> None:
    agent, batch = make(IQL, IQLConfig(), equivariance), batch_of(SMALL)
    with torch.no_grad():
        q = agent.target_critic(batch.state, batch.action).amin(dim=0)
        v, v_next = agent.value(batch.state), agent.value(batch.next_state)
        log_prob = agent.actor(batch.state).log_prob(batch.action)
        twin = agent.critic(batch.state, batch.action)
    losses = agent.losses(batch)
    size = len(q)
    critic = actor = value = 0.0
    for i in range(size):
        target = batch.reward[i] + 0.99 * batch.continues[i] * v_next[i]
        critic += sum(float(twin[k, i] - target) ** 2 for k in range(2)) / size
        actor -= min(math.exp(float(q[i] - v[i]) / 0.5), 100.0) * float(log_prob[i]) / size
        tau = 0.8 if q[i] > v[i] else 0.2
        value += tau * float(q[i] - v[i]) ** 2 / size
    got = [losses[f"losses/{n}"].item() for n in ("critic", "actor", "value")]
    assert got == pytest.approx([critic, actor, value], rel=1e-4)


def actor_gradient(agent: IQL, batch: Batch) -> torch.Tensor:
    agent.zero_grad()
    agent.losses(batch)["losses/actor"].backward()
    return torch.cat([p.grad.flatten() for p in agent.actor.parameters() if p.grad is not None])


def test_the_actor_weighs_each_sample_by_its_own_advantage(monkeypatch: pytest.MonkeyPatch) -> None:
    agent, batch = make(IQL, IQLConfig()), batch_of(SMALL)
    monkeypatch.setattr(agent.target_critic, "forward", lambda s, a: torch.tensor([[2.0, -1.0, 0.0, 0.0, 0.0]] * 2))
    one = actor_gradient(agent, batch)
    monkeypatch.setattr(agent.target_critic, "forward", lambda s, a: torch.tensor([[-1.0, 2.0, 0.0, 0.0, 0.0]] * 2))
    other = actor_gradient(agent, batch)
    assert not torch.allclose(one, other, rtol=1e-2), "a [B, 1] anywhere would average the weights of the batch"


def test_each_loss_trains_its_own_network_alone() -> None:
    agent, batch = make(IQL, IQLConfig()), batch_of(SMALL)
    for own in ("actor", "critic", "value"):
        agent.zero_grad()
        agent.losses(batch)[f"losses/{own}"].backward()
        touched = {n.split(".")[0] for n, p in agent.named_parameters() if p.grad is not None and p.grad.any()}
        assert touched == {own}


def test_the_target_critic_starts_equal_and_follows_slowly() -> None:
    agent = make(IQL, IQLConfig(target_rate=0.25))
    pairs = list(zip(agent.target_critic.parameters(), agent.critic.parameters(), strict=True))
    assert all(torch.equal(t, c) for t, c in pairs)
    with torch.no_grad():
        for _, c in pairs:
            c.add_(1.0)
    polyak(agent.target_critic, agent.critic, 0.25)
    assert all(torch.allclose(c - t, torch.tensor(0.75), atol=1e-5) for t, c in pairs)


def test_a_terminal_state_has_no_future() -> None:
    agent, batch = make(IQL, IQLConfig()), batch_of(SMALL)
    ended = Batch(batch.state, batch.action, batch.reward, torch.zeros(5), batch.next_state)
    with torch.no_grad():
        q = agent.critic(ended.state, ended.action)
    expected = (q - ended.reward).square().mean(dim=1).sum()
    torch.testing.assert_close(agent.losses(ended)["losses/critic"], expected)


@pytest.mark.parametrize(("equivariance", "share"), [("both", 0.1), ("none", 0.7)])
def test_behaviour_cloning_learns_to_reach(reach: Dataset, equivariance: str, share: float) -> None:
    learner = Learner(make(BC, BCConfig(), equivariance), 3e-3, bf16=False)
    generator = torch.Generator().manual_seed(0)
    everything = reach.batch(torch.arange(len(reach)))

    def error() -> float:
        with torch.no_grad():
            return (learner.agent.actor(everything.state).mode() - everything.action).square().mean().item()

    before = error()
    for _ in range(300):
        learner.update(reach.sample(16, generator))
    assert error() < share * before


def test_iql_finds_out_which_of_two_actions_is_worth_more(reach: Dataset) -> None:
    """In every state, going up once earned 1 and going down once earned nothing: cloning averages the two."""
    every = reach.batch(torch.arange(16).repeat(2))
    up = torch.arange(2).repeat_interleave(16).float()
    action = torch.zeros_like(every.action)
    action[:, SMALL.action.slice_of("lift")] = (1.6 * up - 0.8)[:, None]
    batch = Batch(every.state, action, up, torch.zeros(32), every.next_state)
    agents = {"iql": make(IQL, IQLConfig(temperature=0.1)), "bc": make(BC, BCConfig())}
    lift = {}
    for name, agent in agents.items():
        learner = Learner(agent, 3e-3, bf16=False)
        for _ in range(150):
            learner.update(batch)
        with torch.no_grad():
            lift[name] = agent.actor(batch.state).mode()[:, SMALL.action.slice_of("lift")].mean().item()
    assert lift["iql"] > 0.6
    assert abs(lift["bc"]) < 0.3


def test_a_loss_that_is_not_finite_stops_before_it_does_harm() -> None:
    agent, batch = make(BC, BCConfig()), batch_of(SMALL)
    learner = Learner(agent, 1e-3, bf16=False)
    before = [p.clone() for p in agent.parameters()]
    broken = Batch(batch.state, batch.action * float("nan"), batch.reward, batch.continues, batch.next_state)
    with pytest.raises(Diverged, match="losses/actor"):
        learner.update(broken)
    assert all(torch.equal(a, b) for a, b in zip(before, agent.parameters(), strict=True))


@pytest.mark.parametrize("bad", [{"expectile": 0.3}, {"expectile": 1.0}, {"temperature": 0.0}, {"discount": 1.0}])
def test_knobs_outside_their_range_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        IQLConfig(**bad)
