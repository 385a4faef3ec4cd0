"""Equivariance through protos.symmetry, so that no convention can drift between networks, data and server."""

import dataclasses
import math
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from protos.errors import Rejected
from protos.spaces import ACTION, SPEC, ObservationSpec, PolicySpec
from protos.symmetry import EIGHTH_TURN, QUARTER_TURNS, Element
from tests.makers import CONVENTIONS
from tests.training.conftest import NETWORK, SMALL
from training.batch import State
from training.networks import steerable
from training.networks.family import EQUIVARIANCE, NetworkConfig, stages
from training.networks.harmonic import Harmonics
from training.networks.roles import make_actor, make_critic, make_value

EXACT = 1e-5


def random_state(spec: PolicySpec, batch: int = 6, seed: int = 0) -> State:
    rng = torch.Generator().manual_seed(seed)
    depth = 0.1 + 0.3 * torch.rand(batch, 1, *spec.observation.shape, generator=rng)
    return State(depth, torch.randint(0, 2, (batch, 1), generator=rng).float())


def random_action(spec: PolicySpec, *leading: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(*leading, spec.action.size, generator=torch.Generator().manual_seed(seed)) - 0.5


def turned(state: State, turn: Element, spec: PolicySpec) -> State:
    return State(torch.from_numpy(turn.image(state.depth.numpy(), spec.observation)), state.gripper)


def turned_action(action: torch.Tensor, turn: Element) -> torch.Tensor:
    return torch.from_numpy(turn.action(action.detach().numpy(), ACTION))


def spied(owner: type, method: str) -> Any:
    """Inside it the method does what it does, and its calls are counted."""
    return mock.patch.object(owner, method, autospec=True, side_effect=getattr(owner, method))


def trained_a_little(network: nn.Module, loss: object, updates: int) -> None:
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(updates):
        optimiser.zero_grad()
        loss().backward()  # type: ignore[operator]
        optimiser.step()


@pytest.mark.parametrize("group", ["C4", "C8", "C16", "D4", "D8"])
@pytest.mark.parametrize("updates", [0, 50])
def test_the_actor_turns_with_the_scene(group: str, updates: int) -> None:
    actor = make_actor(dataclasses.replace(NETWORK, group=group), SMALL, EQUIVARIANCE["both"])
    state, action = random_state(SMALL), random_action(SMALL, 6)
    trained_a_little(actor, lambda: -actor(state).log_prob(action).mean(), updates)
    before = actor(state)
    for turn in QUARTER_TURNS:
        after = actor(turned(state, turn, SMALL))
        torch.testing.assert_close(after.mode(), turned_action(before.mode(), turn), atol=EXACT, rtol=0)
        torch.testing.assert_close(after.std(), before.std(), atol=EXACT, rtol=0)
        likelihoods = after.log_prob(turned_action(action, turn)), before.log_prob(action)
        torch.testing.assert_close(*likelihoods, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("group", ["C4", "C8", "D4"])
@pytest.mark.parametrize("updates", [0, 50])
def test_critic_and_value_are_invariant(group: str, updates: int) -> None:
    cfg = dataclasses.replace(NETWORK, group=group)
    critic, value = make_critic(cfg, SMALL, EQUIVARIANCE["both"]), make_value(cfg, SMALL, EQUIVARIANCE["both"])
    state, action = random_state(SMALL), random_action(SMALL, 3, 6)
    trained_a_little(critic, lambda: (critic(state, action) - 1).square().mean(), updates)
    trained_a_little(value, lambda: (value(state) - 1).square().mean(), updates)
    for turn in QUARTER_TURNS:
        there = turned(state, turn, SMALL)
        torch.testing.assert_close(
            critic(there, turned_action(action, turn)), critic(state, action), atol=EXACT, rtol=0
        )
        torch.testing.assert_close(value(there), value(state), atol=EXACT, rtol=0)


def test_the_critic_is_not_invariant_to_the_action_alone() -> None:
    critic = make_critic(NETWORK, SMALL, EQUIVARIANCE["both"])
    state, action = random_state(SMALL), random_action(SMALL, 6)
    assert (critic(state, turned_action(action, QUARTER_TURNS[0])) - critic(state, action)).abs().max() > 1e-3


@pytest.mark.parametrize(("row_axis", "col_axis"), CONVENTIONS)
@pytest.mark.parametrize("angle", [0.0, math.pi / 2])
def test_under_a_dihedral_group_yaw_changes_sign_in_the_mirror(
    angle: float, row_axis: tuple[int, int], col_axis: tuple[int, int]
) -> None:
    spec = PolicySpec(ObservationSpec(height=32, width=32, row_axis=row_axis, col_axis=col_axis), ACTION)
    cfg = dataclasses.replace(NETWORK, group="D4")
    actor, critic, value = (make(cfg, spec, EQUIVARIANCE["both"]) for make in (make_actor, make_critic, make_value))
    state, action, mirror = random_state(spec), random_action(spec, 6), Element(angle, flip=True)
    there = turned(state, mirror, spec)
    assert actor(state).mode()[:, ACTION.slice_of("yaw")].abs().min() > 1e-4, "a yaw of zero would prove nothing"
    torch.testing.assert_close(actor(there).mode(), turned_action(actor(state).mode(), mirror), atol=EXACT, rtol=0)
    torch.testing.assert_close(critic(there, turned_action(action, mirror)), critic(state, action), atol=EXACT, rtol=0)
    torch.testing.assert_close(value(there), value(state), atol=EXACT, rtol=0)


@pytest.mark.parametrize(("row_axis", "col_axis"), CONVENTIONS)
def test_every_map_from_pixels_to_the_world_is_obeyed(row_axis: tuple[int, int], col_axis: tuple[int, int]) -> None:
    spec = PolicySpec(ObservationSpec(height=32, width=32, row_axis=row_axis, col_axis=col_axis), ACTION)
    actor, critic = (make(NETWORK, spec, EQUIVARIANCE["both"]) for make in (make_actor, make_critic))
    state, action = random_state(spec), random_action(spec, 6)
    turn = QUARTER_TURNS[0]
    there = turned(state, turn, spec)
    torch.testing.assert_close(actor(there).mode(), turned_action(actor(state).mode(), turn), atol=EXACT, rtol=0)
    torch.testing.assert_close(critic(there, turned_action(action, turn)), critic(state, action), atol=EXACT, rtol=0)


def test_45_degrees_is_approximate_on_a_grid_yet_far_better_than_a_plain_network() -> None:
    cfg = NetworkConfig(fields=(4, 8, 8, 8, 8), hidden=8)
    smooth = torch.nn.functional.interpolate(torch.rand(6, 1, 8, 8) * 0.2 + 0.1, size=128, mode="bicubic")
    state = State(smooth, torch.zeros(6, 1))
    errors = {}
    for equivariance in ("both", "none"):
        actor = make_actor(cfg, SPEC, EQUIVARIANCE[equivariance])
        before, after = actor(state).mode(), actor(turned(state, EIGHTH_TURN, SPEC)).mode()
        span = before.std(dim=0).mean()  # relative to how much the untrained network varies at all
        errors[equivariance] = ((after - turned_action(before, EIGHTH_TURN)).abs().mean() / span).item()
    assert errors["both"] < 0.5 * errors["none"], errors


@pytest.mark.parametrize("make", [make_actor, make_critic, make_value])
@pytest.mark.parametrize("group", ["C4", "C8", "D4"])
def test_both_families_have_a_like_number_of_parameters(make: object, group: str) -> None:
    cfg = NetworkConfig(group=group)
    counts = [
        sum(p.numel() for p in make(cfg, SPEC, EQUIVARIANCE[e]).parameters())  # type: ignore[operator]
        for e in ("both", "none")
    ]
    assert counts[1] == pytest.approx(counts[0], rel=0.15), counts


def test_a_second_network_starts_with_the_weights_that_e2cnn_itself_would_draw() -> None:
    from e2cnn import nn as enn

    make_actor(NETWORK, SMALL, EQUIVARIANCE["both"])  # fills the cache of variances
    torch.manual_seed(5)
    ours = next(m for m in make_actor(NETWORK, SMALL, EQUIVARIANCE["both"]).modules() if isinstance(m, enn.R2Conv))
    torch.manual_seed(5)
    theirs = enn.R2Conv(ours.in_type, ours.out_type, ours.kernel_size, padding=ours.padding)
    torch.testing.assert_close(ours.weights, theirs.weights, atol=0, rtol=0)


@pytest.mark.parametrize("group", ["C4", "C8", "D4"])
def test_the_faster_expansion_gives_e2cnn_s_own_filters(group: str) -> None:
    from e2cnn import nn as enn

    convs = [
        module
        for make in (make_actor, make_critic)
        for module in make(dataclasses.replace(NETWORK, group=group), SMALL, EQUIVARIANCE["both"]).modules()
        if isinstance(module, enn.R2Conv)
    ]
    assert len(convs) >= 12
    for conv in convs:
        (ours, bias), (theirs, their_bias) = conv.expand_parameters(), enn.R2Conv.expand_parameters(conv)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
        assert (bias is None and their_bias is None) or torch.equal(bias, their_bias)


@pytest.mark.parametrize("group", ["C4", "C8", "D4"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_faster_convolution_over_a_single_point_is_e2cnn_s_own(group: str, mode: str) -> None:
    from e2cnn import nn as enn

    network = dataclasses.replace(NETWORK, group=group)
    alone = [
        module
        for make in (make_actor, make_critic)
        for module in make(network, SMALL, EQUIVARIANCE["both"]).modules()
        if isinstance(module, enn.R2Conv) and not module.padding
    ]
    assert {conv.kernel_size for conv in alone} == {1, 3}
    for conv in alone:
        conv.train(mode == "train")
        size = conv.kernel_size
        values = torch.randn(5, conv.in_type.size, size, size).to(memory_format=torch.channels_last)
        images = [enn.GeometricTensor(values.clone().requires_grad_(), conv.in_type) for _ in range(2)]
        ours, theirs = conv(images[0]).tensor, enn.R2Conv.forward(conv, images[1]).tensor
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        (ours.square().sum() + theirs.square().sum()).backward()
        torch.testing.assert_close(images[0].tensor.grad, images[1].tensor.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("group", ["C4", "C8", "C16", "D4", "D8"])
@pytest.mark.parametrize("padding", [0, 1])
def test_a_convolution_by_its_harmonics_is_e2cnn_s_own(
    group: str, padding: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from e2cnn import nn as enn

    monkeypatch.setattr(Harmonics, "pays", lambda *_: True)
    of, to = (steerable._regular(steerable._space(group), fields) for fields in (3, 5))
    conv = steerable._conv(of, to, 3, padding=padding)
    torch.nn.init.normal_(conv.bias)
    image = torch.randn(4, of.size, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
    variables = [image, conv.weights, conv.bias]
    with spied(Harmonics, "convolve") as used:
        ours = conv(enn.GeometricTensor(image, of)).tensor
    theirs = enn.R2Conv.forward(conv, enn.GeometricTensor(image, of)).tensor
    assert used.called
    assert ours.is_contiguous(memory_format=torch.channels_last)
    upstream = torch.randn_like(theirs)
    for mine, reference in zip(
        (ours, *torch.autograd.grad(ours, variables, upstream)),
        (theirs, *torch.autograd.grad(theirs, variables, upstream)),
        strict=True,
    ):
        torch.testing.assert_close(mine, reference, atol=1e-5 * reference.abs().max().item(), rtol=0)


@pytest.mark.parametrize("group", ["C8", "D4"])
def test_a_network_by_its_harmonics_turns_with_the_scene(group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Harmonics, "pays", lambda *_: True)
    actor = make_actor(dataclasses.replace(NETWORK, group=group), SMALL, EQUIVARIANCE["both"])
    state, action = random_state(SMALL), random_action(SMALL, 6)
    trained_a_little(actor, lambda: -actor(state).log_prob(action).mean(), updates=10)
    with spied(Harmonics, "convolve") as used:
        before = actor(state)
    assert used.called
    for turn in QUARTER_TURNS:
        after = actor(turned(state, turn, SMALL))
        torch.testing.assert_close(after.mode(), turned_action(before.mode(), turn), atol=EXACT, rtol=0)


def test_harmonics_are_for_wide_layers_that_train_in_fp32() -> None:
    from e2cnn import nn as enn

    of, narrow, wide = (steerable._regular(steerable._space("C8"), fields) for fields in (2, 4, 64))

    def by_harmonics(conv: enn.R2Conv) -> bool:
        with spied(Harmonics, "convolve") as used:
            conv(enn.GeometricTensor(torch.randn(1, of.size, 8, 8), of))
        return used.called

    conv = steerable._conv(of, wide, 3, padding=1)
    assert by_harmonics(conv)
    assert not by_harmonics(steerable._conv(of, narrow, 3, padding=1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not by_harmonics(conv)
    assert not by_harmonics(conv.eval())  # the exported network's numbers, which are the plain convolution's


@pytest.mark.parametrize(
    ("equivariance", "steerable"),
    [
        ("both", (True, True, True)),
        ("actor", (True, False, False)),
        ("critic", (False, True, True)),
        ("none", (False,) * 3),
    ],
)
def test_an_ablation_makes_exactly_the_roles_steerable_that_it_names(
    equivariance: str, steerable: tuple[bool, ...]
) -> None:
    roles = [make(NETWORK, SMALL, EQUIVARIANCE[equivariance]) for make in (make_actor, make_critic, make_value)]
    built = tuple(any(type(m).__module__.startswith("e2cnn") for m in role.modules()) for role in roles)
    assert built == steerable


@pytest.mark.parametrize("equivariance", ["both", "none"])
def test_what_is_exported_is_the_same_function_without_e2cnn(equivariance: str) -> None:
    state = random_state(SMALL)
    for make in (make_actor, make_value):
        role = make(NETWORK, SMALL, EQUIVARIANCE[equivariance])
        trained_a_little(role, lambda role=role: role.heads[0](role.encode(state)).square().mean(), updates=3)
        exported = role.export()
        assert not any(type(m).__module__.startswith("e2cnn") for m in exported.modules())
        torch.testing.assert_close(
            exported(state.depth, state.gripper), role.heads[0](role.encode(state)), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("equivariance", ["both", "none"])
def test_actions_scored_together_are_scored_as_one_by_one(equivariance: str) -> None:
    critic = make_critic(NETWORK, SMALL, EQUIVARIANCE[equivariance])
    state, actions = random_state(SMALL), random_action(SMALL, 4, 6)
    together = critic(state, actions)
    assert together.shape == (2, 4, 6)
    for one, action in enumerate(actions):
        torch.testing.assert_close(together[:, one], critic(state, action), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("equivariance", ["both", "none"])
def test_nothing_outside_the_disc_is_looked_at(equivariance: str) -> None:
    actor, state = make_actor(NETWORK, SMALL, EQUIVARIANCE[equivariance]), random_state(SMALL)
    corners = state.depth.clone()
    corners[..., :3, :3] = 0.5
    torch.testing.assert_close(actor(State(corners, state.gripper)).mode(), actor(state).mode())


def test_images_that_do_not_tile_are_refused_with_the_sizes_that_do() -> None:
    with pytest.raises(ValueError, match=r"network\.pool: .*8 times a power of two.* 48; for this view: 3, 6, 12"):
        stages(NetworkConfig(), ObservationSpec(height=96, width=96))
    with pytest.raises(ValueError, match="no pooling does that: make views of a multiple of 8 pixels"):
        stages(NetworkConfig(), ObservationSpec(height=100, width=100))
    with pytest.raises(ValueError, match=r"network\.fields: expected 5 or more entries"):
        stages(NetworkConfig(fields=(4, 4)), SPEC.observation)


def test_critics_may_be_narrower_than_the_actor() -> None:
    cfg = NetworkConfig(fields=(3, 4, 8), hidden=8, critic_width=0.5)
    assert (cfg.of_critics.fields, cfg.of_critics.hidden) == ((2, 2, 4), 4)
    critic = make_critic(cfg, SMALL, EQUIVARIANCE["both"])
    assert critic.encoder.features == 4 * 8
    assert make_value(cfg, SMALL, EQUIVARIANCE["both"]).encoder.features == 4 * 8
    assert make_actor(cfg, SMALL, EQUIVARIANCE["both"]).encoder.features == 8 * 8


@pytest.mark.parametrize("group", ["C2", "C6", "D2", "D6", "rotations"])
def test_groups_without_quarter_turns_are_refused(group: str) -> None:
    with pytest.raises(ValueError, match="group"):
        NetworkConfig(group=group)


def test_critics_without_end_are_refused() -> None:
    with pytest.raises(ValueError, match="critic_width must be positive and finite"):
        NetworkConfig(critic_width=math.inf)


def test_a_view_that_does_not_fit_the_fields_says_which_pooling_does() -> None:
    with pytest.raises(Rejected, match=r"--network\.pool 4"):
        stages(NetworkConfig(), ObservationSpec(height=256, width=256))


def test_more_fields_than_halvings_make_convolutions_at_the_narrowest() -> None:
    paper = stages(NetworkConfig(fields=(8, 16, 32, 64, 128, 64, 64), pool=1), SPEC.observation)
    assert [(s.fields, s.padding, s.pool) for s in paper] == [
        (8, 1, True), (16, 1, True), (32, 1, True), (64, 1, True), (128, 1, False), (64, 0, True), (64, 0, False),
    ]  # fmt: skip
    actor = make_actor(NetworkConfig(fields=(4, 8, 8, 8), hidden=8), SMALL, EQUIVARIANCE["both"])
    state = random_state(SMALL)
    after = actor(turned(state, QUARTER_TURNS[0], SMALL)).mode()
    torch.testing.assert_close(after, turned_action(actor(state).mode(), QUARTER_TURNS[0]), atol=EXACT, rtol=0)
