"""The sampling actor: its networks, which of the two is asked, and its deterministic action."""

import math
from functools import partial
from unittest.mock import patch

import numpy as np
import pytest
import torch as th
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sb3_softq.actor import GATE_FLOOR, LOG_STD_MAX, TEACHING_FLOOR
from sb3_softq.networks import bounded_above
from sb3_softq.soft_value import mixture_log_prob_and_score
from tests.conftest import check_training, hidden_sizes, small


@pytest.mark.parametrize("head_arch", [[], [5], (4, 3, 2)])
def test_the_head_has_the_hidden_layers_asked_for(head_arch):
    model = small(policy_kwargs={"head_arch": head_arch})
    assert hidden_sizes(model.actor.head) == list(head_arch)
    check_training(model)


def test_the_trained_actor_collects_and_the_average_is_asked():
    model = small().learn(20)
    seen = []
    for name in ("actor", "ema_actor"):
        actor = getattr(model, name)
        particles = partial(lambda name, particles, *args, **kwargs: seen.append(name) or particles(*args, **kwargs), name)
        actor.particles = partial(particles, actor.particles)
    obs = model.observation_space.sample()

    def asked(call, *args, **kwargs):
        seen.clear()
        call(*args, **kwargs)
        return set(seen)

    learned = {"ema_actor"}
    for deterministic in (True, False):
        assert asked(model.predict, obs, deterministic=deterministic) == learned
    assert asked(model.sample_actions, obs, 2) == asked(model.entropy, obs) == asked(model.soft_value, obs) == learned
    assert asked(model.log_prob, obs, model.action_space.sample()) == learned
    batch = model.replay_buffer.sample(4)
    assert asked(model.update_critic, batch, model.ent_coef_tensor) == learned
    assert asked(model.update_actor, batch, model.ent_coef_tensor) == {"actor"}
    model.learning_starts = 1000
    assert asked(model.learn, 3) == set()
    model.learning_starts, model.gradient_steps = 0, 0
    assert asked(model.learn, 3) == {"actor"}
    assert asked(model.predict, obs) == learned


@pytest.mark.parametrize("smoothing", ["learned", "local", "none"])
def test_deterministic_action_is_a_function_of_observation_and_weights(smoothing):
    repulsion = "kernel" if smoothing == "none" else "density"
    model = small(policy_kwargs={"smoothing": smoothing}, repulsion=repulsion).learn(30)
    obs = np.random.default_rng(0).uniform(-1, 1, (20, 3)).astype(np.float32)
    th.manual_seed(0)
    state = th.get_rng_state()
    actions, _ = model.predict(obs, deterministic=True)
    assert th.equal(th.get_rng_state(), state)
    th.manual_seed(1)
    np.testing.assert_array_equal(model.predict(obs, deterministic=True)[0], actions)
    alone = np.stack([model.predict(o, deterministic=True)[0] for o in obs])
    np.testing.assert_allclose(alone, actions, atol=1e-4)
    assert not np.array_equal(model.predict(obs)[0], model.predict(obs)[0])


def test_experts_are_drawn_by_the_gate_and_taught_in_turn():
    model = small()
    actor, obs = model.actor, th.as_tensor(model.observation_space.sample()).expand(4_000, -1)
    assert actor.n_experts == 16
    with th.no_grad():
        actor.gate.bias.copy_(th.linspace(-3, 3, 16))
        features = actor.features(obs)
        expected = actor.gate_probs(features)[0]
        for n_particles, stratified in ((5, False), (5, True), (1, True)):
            drawn = actor.draw_experts(features, n_particles, stratified)
            assert drawn.shape == (4_000, n_particles)
            share = th.bincount(drawn.flatten(), minlength=16) / drawn.numel()
            th.testing.assert_close(share, expected, atol=0.015, rtol=0)
        # each expert as often as its weight says, rounded
        drawn = actor.draw_experts(features, 256, stratified=True)
        counts = th.stack([(drawn == z).sum(dim=1) for z in range(16)], dim=1)
        assert (counts - 256 * expected).abs().max() < 2
        # in the actor's update whatever they weigh
        taught = actor.spread_experts(4_000, 20)
    assert (taught[:, :16].sort(dim=1).values == th.arange(16)).all()
    assert th.equal(taught[:, 16:], taught[:, :4])
    assert len(taught[:, 0].unique()) == 16


def test_noise_says_which_expert_it_is_of():
    actor = small().actor
    noise = actor.noise(th.arange(16).expand(20_000, -1))
    assert th.equal(noise[..., actor.action_dim :], th.eye(16).expand(20_000, -1, -1))
    xi = noise[..., : actor.action_dim]
    th.testing.assert_close(xi.mean(dim=0), actor.expert_noise[:, : actor.action_dim], atol=0.02, rtol=0)
    # of all of them together: wide, as that of a single sampler
    assert xi.mean().item() == pytest.approx(0.0, abs=0.01)
    assert xi.std().item() == pytest.approx(1.0, abs=0.01)


def test_a_single_expert_has_no_gate():
    model = small(policy_kwargs={"n_experts": 1}).learn(30)
    assert model.actor.gate is None
    assert not any("gate" in name for name in model.policy.state_dict())
    assert model.actor.noise(model.actor.spread_experts(2, 3)).shape == (2, 3, model.actor.action_dim)


@pytest.mark.parametrize("n_experts", [1, 2, 7, 40])
def test_any_number_of_experts_trains(n_experts):
    model = small(policy_kwargs={"n_experts": n_experts})
    check_training(model)
    assert len(model.actor.xi_bank) == {1: 32, 2: 32, 7: 35, 40: 40}[n_experts]


def test_the_gate_learns_which_expert_is_better():
    """
    Particles stay where the noise puts them, so what moves is weight alone: to experts that start where Q is high, but not all
    of it to the best of them, since that one alone is a poor density.
    """
    model = small(ent_coef=1.0, learning_rate=0.01, annealing=1.0)
    model.actor.head.requires_grad_(False)
    with patch("sb3_softq.softq.min_q_values", lambda critic, obs, u: 4.0 * th.tanh(u)[..., 0]):
        for _ in range(300):
            model._minimize(type(model).actor_loss, model.actor.optimizer, th.zeros(64, 3), model.ent_coef_tensor)
    with th.no_grad():
        weights = model.actor.gate_probs(model.actor.features(th.zeros(1, 3)))[0]
    start = model.actor.expert_noise[:, 0]
    assert weights[start > 0].sum() > 0.9
    assert weights.max() < 0.9


def test_no_expert_loses_all_weight():
    """
    Or the score at its particles would be that of a narrow expert far away, not its own: it was, by 1,000 times what moves
    particles else, and threw all of them to the edge of the box.
    """
    actor = small().actor
    features = actor.features(th.zeros(1, 3))
    with th.no_grad():
        actor.gate.bias.copy_(th.tensor([0.0] + [-1000.0] * 15))
        log_weights = actor.log_weights(features, th.arange(16).unsqueeze(0))
        assert log_weights.exp().sum().item() == pytest.approx(1.0)
        assert log_weights.min().item() == pytest.approx(math.log(GATE_FLOOR / 16), abs=1e-5)
    # the heavy one is narrow and 40 of its widths away
    mean = th.tensor([[[2.0]] + [[0.0]] * 15]).reshape(1, 16, 1)
    log_std = th.tensor([math.log(0.05)] + [math.log(0.3)] * 15).reshape(1, 16, 1)
    _, score = mixture_log_prob_and_score(th.zeros(1, 1, 1), mean, log_std, log_weights)
    assert score.abs().item() < 1.0
    with th.no_grad():
        unbounded = th.log_softmax(actor.gate(features), dim=1)
    _, score = mixture_log_prob_and_score(th.zeros(1, 1, 1), mean, log_std, unbounded)
    assert score.item() == pytest.approx(2.0 / 0.05**2, rel=1e-3)


def test_an_expert_that_the_gate_has_given_up_is_taught_by_its_own_density(monkeypatch):
    """
    Four standard deviations beside a heavy one. At its own weight it would see the tail of the other, whose score of 40
    drives it away from the mode; one expert per mode was what remained.
    """
    model = small(ent_coef=1.0, annealing=1.0, n_density_particles=14)
    actor, scores = model.actor, []

    def particles(features, noise, n_constant=0):
        experts = noise[..., actor.action_dim :].argmax(dim=-1, keepdim=True)
        mean = th.where(experts == 0, 0.0, 0.4).expand(*noise.shape[:-1], actor.action_dim) + 0.0 * actor.head[-1].bias.sum()
        return mean, th.full_like(mean, math.log(0.1)) + 0.0 * actor.head[-1].bias.sum()

    def record(u, *components):
        log_prob, score = mixture_log_prob_and_score(u, *components)
        scores.append(score[u > 0.3].mean().item())
        return log_prob, score

    with th.no_grad():
        actor.gate.bias.copy_(th.tensor([0.0] + [-1000.0] * 15))
    monkeypatch.setattr(actor, "particles", particles)
    monkeypatch.setattr("sb3_softq.softq.mixture_log_prob_and_score", record)
    for floor in (TEACHING_FLOOR, GATE_FLOOR):
        monkeypatch.setattr("sb3_softq.softq.TEACHING_FLOOR", floor)
        th.manual_seed(0)
        model.actor_loss(th.zeros(64, 3), th.ones(1))
    assert abs(scores[0]) < 10.0
    assert scores[1] < -20.0


@settings(deadline=None)
@given(
    x=arrays(np.float32, 8, elements=st.floats(-10, 10, width=32)),
    grad=arrays(np.float32, 8, elements=st.floats(-3, 3, width=32)),
    bound=st.floats(-5, 5),
)
def test_a_bound_from_above_can_be_left_again(x, grad, bound):
    values, upstream = th.tensor(x, requires_grad=True), th.tensor(grad)
    bounded = bounded_above(values, bound)
    assert th.equal(bounded, values.detach().clamp(max=bound))
    (found,) = th.autograd.grad(bounded, values, upstream)
    # a small step against the gradient moves all that lie within, and those beyond the bound towards it alone
    leads_back = (values <= bound) | (upstream > 0)
    assert th.equal(found, th.where(leads_back, upstream, 0.0))


def test_an_expert_that_has_become_too_wide_narrows_again():
    """A plain clamp has no gradient there: what had overshot in one step stayed at the edges of the box for good."""
    actor = small().actor
    with th.no_grad():
        actor.head[-1].bias[actor.action_dim :] = 10.0
    noise = actor.noise(actor.spread_experts(5, 4))
    features = actor.features(th.zeros(5, 3))
    log_std = actor.particles(features, noise)[1]
    assert (log_std == LOG_STD_MAX).all()
    optimizer = th.optim.Adam(actor.parameters(), lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        actor.particles(actor.features(th.zeros(5, 3)), noise)[1].sum().backward()
        optimizer.step()
    assert (actor.particles(actor.features(th.zeros(5, 3)), noise)[1] < 0.0).all()
