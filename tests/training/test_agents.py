"""The agents' equations, on numbers worked out by hand and on gradients."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.training.conftest import NETWORK, SMALL, set_apart
from tests.training.test_augment import batch_of
from training.agents.agent import Diverged, Learner
from training.agents.bc import BC, BCConfig
from training.agents.cql import CQL, LARGEST_LOG_MULTIPLIER, CQLConfig
from training.agents.iql import IQL, IQLConfig
from training.agents.losses import advantage_weight, conservative_gap, expectile_loss, log_mean_exp
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


@pytest.mark.parametrize("config", [IQLConfig(), IQLConfig(expectile=0.7, temperature=0.1, largest_weight=1.01)])
@pytest.mark.parametrize("equivariance", FAMILIES)
def test_iql_s_losses_are_the_paper_s(equivariance: str, config: IQLConfig) -> None:
    agent, batch = make(IQL, config, equivariance), batch_of(SMALL)
    set_apart(agent.target_critic)
    with torch.no_grad():
        q = agent.target_critic(batch.state, batch.action).amin(dim=0)
        v, v_next = agent.value(batch.state), agent.value(batch.next_state)
        log_prob = agent.actor(batch.state).log_prob(batch.action)
        twin = agent.critic(batch.state, batch.action)
    losses = agent.losses(batch)
    size = len(q)
    critic = actor = value = 0.0
    for i in range(size):
        target = batch.reward[i] + batch.discount[i] * v_next[i]
        critic += sum(float(twin[k, i] - target) ** 2 for k in range(2)) / size
        weight = min(math.exp(float(q[i] - v[i]) / config.temperature), config.largest_weight)
        actor -= weight * float(log_prob[i]) / size
        tau = config.expectile if q[i] > v[i] else 1 - config.expectile
        value += tau * float(q[i] - v[i]) ** 2 / size
    got = [losses[f"losses/{n}"].item() for n in ("critic", "actor", "value")]
    assert got == pytest.approx([critic, actor, value], rel=1e-4)


def actor_gradient(agent: IQL, batch: Batch) -> torch.Tensor:
    agent.zero_grad()
    agent.losses(batch)["losses/actor"].backward()
    return torch.cat([p.grad.flatten() for p in agent.actor.parameters() if p.grad is not None])


def test_while_iql_warms_up_every_action_weighs_the_same():
    agent, batch = make(IQL, IQLConfig(temperature=0.01, warm_up=2)), batch_of(SMALL)
    for update in range(4):
        losses = agent.losses(batch)
        plain = -agent.actor(batch.state).log_prob(batch.action).mean()
        assert torch.isclose(losses["losses/actor"], plain) == (update < 2)
        agent.follow()


@pytest.mark.parametrize(("agent", "config"), [(IQL, IQLConfig()), (CQL, CQLConfig(cloning_weight=2.0))])
def test_where_weights_have_drawn_the_batch_the_actor_does_not_weigh_again(agent: Any, config: Any) -> None:
    made, batch = make(agent, replace(config, values_first=0.5)), batch_of(SMALL)
    made.values_rest = True
    losses = made.losses(batch)
    expected = -made.actor(batch.state).log_prob(batch.action).mean().item()
    assert losses["losses/actor"].item() == pytest.approx(expected, rel=1e-4)
    assert list(losses) == ["losses/actor"], "a Q that learns no more is not climbed"
    losses["losses/actor"].backward()
    assert {n.split(".")[0] for n, p in made.named_parameters() if p.grad is not None} == {"actor"}


CLONING = [CQLConfig(cloning_weight=2.0, cloning_value=value) for value in ("head", "network")]


@pytest.mark.parametrize(("agent", "config"), [(IQL, IQLConfig()), *((CQL, config) for config in CLONING)])
def test_weights_for_drawing_are_those_of_the_actor_s_loss(
    agent: Any, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, batch, found = make(agent, config), batch_of(SMALL), []
    set_apart(made.target_critic)
    weight = made.weight

    def noted(*args: Any, **options: Any) -> torch.Tensor:
        found.append(weight(*args, **options))
        return found[-1]

    monkeypatch.setattr(made, "weight", noted)
    with torch.no_grad():
        made.losses(batch)
        for_drawing = weight(made.advantage(batch.state, batch.action))
    (in_the_loss,) = found
    torch.testing.assert_close(for_drawing, in_the_loss, rtol=1e-5, atol=0)


def test_the_actor_weighs_each_sample_by_its_own_advantage(monkeypatch: pytest.MonkeyPatch) -> None:
    agent, batch = make(IQL, IQLConfig()), batch_of(SMALL)
    monkeypatch.setattr(agent.target_critic, "forward", lambda s, a: torch.tensor([[2.0, -1.0, 0.0, 0.0, 0.0]] * 2))
    one = actor_gradient(agent, batch)
    monkeypatch.setattr(agent.target_critic, "forward", lambda s, a: torch.tensor([[-1.0, 2.0, 0.0, 0.0, 0.0]] * 2))
    other = actor_gradient(agent, batch)
    assert not torch.allclose(one, other, rtol=1e-2), "a [B, 1] anywhere would average the weights of the batch"


@pytest.mark.parametrize(
    ("agent", "config", "owners"),
    [
        (IQL, IQLConfig(), {"actor": "actor", "critic": "critic", "value": "value"}),
        (
            CQL,
            replace(CLONING[0], gap=0.5),
            {
                "actor": "actor",
                "critic": "critic",
                "conservative": "critic",
                "alpha": "log_alpha",
                "multiplier": "log_weight",
                "value": "value",
            },
        ),
        (
            CQL,
            CLONING[1],
            {"actor": "actor", "critic": "critic", "conservative": "critic", "alpha": "log_alpha", "value": "value"},
        ),
    ],
)
def test_each_loss_trains_its_own_network_alone(agent: Any, config: Any, owners: dict[str, str]) -> None:
    made, batch = make(agent, config), batch_of(SMALL)
    for loss, own in owners.items():
        made.zero_grad()
        made.losses(batch)[f"losses/{loss}"].backward()
        touched = {n.split(".")[0] for n, p in made.named_parameters() if p.grad is not None and p.grad.any()}
        assert touched == {own}
    assert {name.removeprefix("losses/") for name in made.losses(batch) if "losses/" in name} == set(owners)


@pytest.mark.parametrize(("kind", "config"), [(IQL, IQLConfig(target_rate=0.25)), (CQL, CQLConfig(target_rate=0.25))])
def test_the_target_critic_starts_equal_and_follows_slowly(kind: Any, config: Any) -> None:
    agent = make(kind, config)
    pairs = list(zip(agent.target_critic.parameters(), agent.critic.parameters(), strict=True))
    assert all(torch.equal(t, c) for t, c in pairs)
    with torch.no_grad():
        for _, c in pairs:
            c.add_(1.0)
    agent.follow()
    assert all(torch.allclose(c - t, torch.tensor(0.75), atol=1e-5) for t, c in pairs)


def test_a_terminal_state_has_no_future() -> None:
    agent, batch = make(IQL, IQLConfig()), batch_of(SMALL)
    ended = Batch(batch.state, batch.action, batch.reward, torch.zeros(5), batch.next_state)
    with torch.no_grad():
        q = agent.critic(ended.state, ended.action)
    expected = (q - ended.reward).square().mean(dim=1).sum()
    torch.testing.assert_close(agent.losses(ended)["losses/critic"], expected)


def test_the_soft_maximum_is_the_integral_over_actions_whatever_the_proposals() -> None:
    """Q(a) = k a on [-1, 1]: the integral of exp(Q) is 2 sinh(k) / k, and 2 exp(q) for a constant q."""
    k, n = 2.0, 200_000
    uniform = 2 * torch.rand(n, 1) - 1
    skewed = 2 * torch.rand(n, 1).sqrt() - 1  # density (a + 1) / 2
    closed = math.log(2 * math.sinh(k) / k)
    for action, log_density in ((uniform, torch.full((n, 1), -math.log(2))), (skewed, torch.log((skewed + 1) / 2))):
        estimate = log_mean_exp((k * action)[None].expand(2, -1, -1), log_density, 1.0)
        assert estimate.flatten().tolist() == pytest.approx([closed] * 2, abs=0.02)
    constant = log_mean_exp(torch.full((2, 30, 1), 0.7), torch.full((30, 1), -math.log(2)), 0.5)
    assert constant.flatten().tolist() == pytest.approx([0.7 + 0.5 * math.log(2)] * 2)


def test_the_conservative_gap_by_hand() -> None:
    proposed = torch.tensor([[[0.0], [1.0]], [[2.0], [2.0]]])  # twins x 2 proposals x 1 state
    recorded = torch.tensor([[0.5], [3.0]])
    gap = conservative_gap(proposed, torch.zeros(2, 1), recorded, 1.0)
    assert gap.tolist() == pytest.approx([math.log((1 + math.e) / 2) - 0.5, 2.0 - 3.0])


@pytest.mark.parametrize(
    "config",
    [CQLConfig(proposals=2), CQLConfig(2.0, proposals=2, softness=0.5, entropy_temperature=0.05, target_entropy=-3.0)],
)
@pytest.mark.parametrize("equivariance", FAMILIES)
def test_cql_s_losses_are_the_paper_s(equivariance: str, config: CQLConfig) -> None:
    agent, batch = make(CQL, config, equivariance), batch_of(SMALL)
    soft_max = config.softness
    set_apart(agent.target_critic)
    torch.manual_seed(1)
    losses = agent.losses(batch)
    torch.manual_seed(1)
    with torch.no_grad():
        pi, next_pi, alpha = agent.actor(batch.state), agent.actor(batch.next_state), config.entropy_temperature
        action, log_prob, share = next_pi.with_every_command(*next_pi.sample(1))
        soft = agent.target_critic(batch.next_state, action).amin(dim=0) - alpha * log_prob
        target = batch.reward + batch.discount * (share * soft).sum(dim=0)
        proposals = [agent._uniform.sample(2, batch.action), pi.sample(2), next_pi.sample(2)]
        gap = critic = 0.0
        for k in range(2):
            for i in range(5):
                recorded = float(agent.critic(batch.state, batch.action)[k, i])
                terms = [
                    math.exp(float(agent.critic(batch.state, a[n : n + 1])[k, 0, i]) / soft_max - float(density[n, i]))
                    for a, density in proposals
                    for n in range(2)
                ]
                gap += (soft_max * math.log(sum(terms) / 6) - recorded) / 5
                critic += (recorded - float(target[i])) ** 2 / 5
        action, log_prob, share = pi.with_every_command(*pi.sample(1))
        soft = agent.critic(batch.state, action).amin(dim=0) - alpha * log_prob
        actor = -(share * soft).sum(dim=0).mean().item()
        entropy = -(share * log_prob).sum(dim=0).mean().item()
    got = [losses[f"losses/{n}"].item() for n in ("critic", "conservative", "actor", "alpha")]
    target_entropy = -5 if config.target_entropy is None else config.target_entropy
    expected = [critic, config.conservative_weight * gap, actor, alpha * (entropy - target_entropy)]
    assert got == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("config", CLONING, ids=lambda config: config.cloning_value)
@pytest.mark.parametrize("equivariance", FAMILIES)
def test_cql_clones_by_the_advantage_over_recorded_actions(equivariance: str, config: CQLConfig) -> None:
    config = replace(config, cloning_temperature=0.1, cloning_expectile=0.7, cloning_warm_up=1)
    agent, batch = make(CQL, config, equivariance), batch_of(SMALL)
    found = []
    for weight in (2.0, 0.0):
        for updates in (0, 1):
            torch.manual_seed(1)
            agent.cfg = replace(config, cloning_weight=weight)
            agent.updates.fill_(updates)
            found.append(agent.losses(batch))
    with torch.no_grad():
        features = agent.critic.encode(batch.state)
        q = agent.critic.score(features, batch.action).amin(dim=0)
        v = agent.value(features)[:, 0] if config.cloning_value == "head" else agent.value(batch.state)
        log_prob = agent.actor(batch.state).log_prob(batch.action)
        weights = [min(math.exp(float(q[i] - v[i]) / 0.1), 100.0) for i in range(5)]
        value = sum((0.7 if q[i] > v[i] else 0.3) * float(q[i] - v[i]) ** 2 for i in range(5)) / 5
    equal, weighed, *without = (one["losses/actor"].item() for one in found)
    assert equal - without[0] == pytest.approx(-2 * log_prob.mean().item(), rel=1e-4)
    assert weighed - without[1] == pytest.approx(-2 * (torch.tensor(weights) * log_prob).mean().item(), rel=1e-4)
    assert found[0]["losses/value"].item() == pytest.approx(value, rel=1e-4)


def test_cql_looks_at_each_image_once_per_network(monkeypatch: pytest.MonkeyPatch) -> None:
    agent, batch, seen = make(CQL, CQLConfig()), batch_of(SMALL), []
    for name in ("actor", "critic", "target_critic"):
        role = getattr(agent, name)
        encode = role.encode
        monkeypatch.setattr(role, "encode", lambda s, e=encode, n=name: (seen.append(n), e(s))[1])
    agent.losses(batch)
    assert sorted(seen) == ["actor", "actor", "critic", "target_critic"]


def test_the_temperature_rises_while_the_policy_is_too_certain(reach: Dataset) -> None:
    for target, rises in ((100.0, True), (-100.0, False)):
        agent = make(CQL, CQLConfig(target_entropy=target))
        Learner(agent, 1e-2, bf16=False).update(reach.batch(torch.arange(8)))
        assert (agent.log_alpha.item() > math.log(0.01)) is rises
    fixed = make(CQL, CQLConfig(entropy="fixed", target_entropy=100.0))
    Learner(fixed, 1e-2, bf16=False).update(reach.batch(torch.arange(8)))
    assert fixed.log_alpha.item() == pytest.approx(math.log(0.01))


def test_the_lagrangian_variant_adapts_its_weight_to_the_gap(reach: Dataset) -> None:
    for wanted, rises in ((-100.0, True), (100.0, False)):
        agent = make(CQL, CQLConfig(gap=wanted, gap_rate=20.0))
        learner = Learner(agent, 1e-3, bf16=False)
        for _ in range(3):
            learner.update(reach.batch(torch.arange(8)))
        assert agent.log_weight.item() == pytest.approx(0.06 if rises else -0.06, rel=1e-3)


def test_a_gap_out_of_reach_drives_the_weight_no_further_than_it_can_come_back(reach: Dataset) -> None:
    agent = make(CQL, CQLConfig(gap=100.0, gap_rate=20.0))
    agent.log_weight.data.fill_(20.0)
    learner = Learner(agent, 1e-3, bf16=False)
    learner.update(reach.batch(torch.arange(8)))
    assert agent.log_weight.item() == pytest.approx(LARGEST_LOG_MULTIPLIER)
    learner.update(reach.batch(torch.arange(8)))
    assert agent.log_weight.item() < LARGEST_LOG_MULTIPLIER


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


def test_iql_and_cql_find_out_which_of_two_actions_is_worth_more(reach: Dataset) -> None:
    """In every state, going up once earned 1 and going down once earned nothing: cloning averages the two."""
    every = reach.batch(torch.arange(16).repeat(2))
    up = torch.arange(2).repeat_interleave(16).float()
    action = torch.zeros_like(every.action)
    action[:, SMALL.action.slice_of("lift")] = (1.6 * up - 0.8)[:, None]
    batch = Batch(every.state, action, up, torch.zeros(32), every.next_state)
    agents = {
        "iql": make(IQL, IQLConfig(temperature=0.1)),
        "cql": make(CQL, CQLConfig()),
        "bc": make(BC, BCConfig()),
    }
    lift = {}
    for name, agent in agents.items():
        learner = Learner(agent, 3e-3, bf16=False)
        for _ in range(150):
            learner.update(batch)
        with torch.no_grad():
            lift[name] = agent.actor(batch.state).mode()[:, SMALL.action.slice_of("lift")].mean().item()
    assert lift["iql"] > 0.6
    assert lift["cql"] > 0.6
    assert abs(lift["bc"]) < 0.3


def test_a_loss_that_is_not_finite_stops_before_it_does_harm() -> None:
    agent, batch = make(BC, BCConfig()), batch_of(SMALL)
    learner = Learner(agent, 1e-3, bf16=False)
    before = [p.clone() for p in agent.parameters()]
    broken = Batch(batch.state, batch.action * float("nan"), batch.reward, batch.discount, batch.next_state)
    with pytest.raises(Diverged, match="losses/actor"):
        learner.update(broken)
    assert all(torch.equal(a, b) for a, b in zip(before, agent.parameters(), strict=True))


class Repeated:
    """What a CUDA graph does, where there is no GPU: it is made of what it does once, and knows no other tensors."""

    def __init__(self, work: Any) -> None:
        self.work, self.times = work, 0
        work()

    def __call__(self) -> Any:
        self.times += 1
        return self.work()


def test_what_is_replayed_sees_each_batch_and_is_recorded_again_when_values_rest(
    monkeypatch: pytest.MonkeyPatch, reach: Dataset
) -> None:
    monkeypatch.setattr("training.agents.agent.Recorded", Repeated)
    plain, replayed = (Learner(make(IQL, IQLConfig(values_first=0.5)), 1e-3, bf16=False) for _ in range(2))
    replayed.agent.load_state_dict(plain.agent.state_dict())
    seen = []
    for at, rest in enumerate((False, False, True, True)):
        batch = reach.batch(torch.arange(8) + 8 * at)
        plain.agent.values_rest = replayed.agent.values_rest = rest
        names, values = replayed._replay(batch)
        assert dict(zip(names, values.tolist(), strict=True)) == pytest.approx(plain.update(batch))
        replayed._optimiser.step()
        if not rest:
            replayed.agent.follow()
        _, _, recorded = replayed._recorded
        seen.append((recorded, recorded.times))
    assert [times for _, times in seen] == [1, 2, 1, 2]
    assert seen[0][0] is seen[1][0] is not seen[2][0] is seen[3][0]
    states = (learner.agent.state_dict().values() for learner in (plain, replayed))
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_a_value_beyond_all_reason_stops_too() -> None:
    agent, batch = make(IQL, IQLConfig()), batch_of(SMALL)
    learner = Learner(agent, 1e-3, bf16=False, value_bound=1.0)
    far = [p for n, p in agent.target_critic.named_parameters() if n.endswith("last.bias") or "last" in n]
    with torch.no_grad():
        for p in far:
            p.add_(50.0)
    with pytest.raises(Diverged, match="values/q exploded"):
        learner.update(batch)


@pytest.mark.parametrize(
    "bad",
    [
        {"proposals": 0},
        {"softness": 0.0},
        {"target_rate": 2.0},
        {"cloning_weight": -1.0},
        {"largest_weight": 0},
        {"values_first": 1.0, "cloning_weight": 1.0},
        {"values_first": 0.5},
    ],
)
def test_cql_s_knobs_outside_their_range_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must"):
        CQLConfig(**bad)


@pytest.mark.parametrize("bad", [{"expectile": 0.3}, {"expectile": 1.0}, {"temperature": 0.0}, {"values_first": 1.0}])
def test_knobs_outside_their_range_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        IQLConfig(**bad)


@pytest.mark.parametrize("knob", ["temperature", "largest_weight", "target_rate"])
def test_a_knob_that_is_no_number_is_refused_by_name(knob: str) -> None:
    with pytest.raises(ValueError, match=rf"iql\.{knob} must .*nan"):
        IQLConfig(**{knob: float("nan")})
