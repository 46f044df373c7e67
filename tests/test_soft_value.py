"""soft_value.py against quadrature and autograd, in float64."""

import math

import numpy as np
import pytest
import torch as th
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from sb3_softq.soft_value import (
    defensive_proposal,
    effective_sample_size,
    local_log_std,
    mixture_log_prob,
    mixture_log_prob_and_score,
    mixture_mode,
    soft_value,
    tanh_log_det,
    uniform_log_prob,
)
from tests.conftest import small

ALPHA = 0.4


def q_function(a):
    """Two bumps and a slope, in any dimension."""
    return th.cos(3.0 * a).sum(dim=-1) + 0.5 * a[..., 0]


def log_z(dim):
    """log integral exp(Q / alpha) over the box, by Gauss-Legendre quadrature."""
    nodes, weights = (th.as_tensor(x) for x in np.polynomial.legendre.leggauss(64))
    points = th.stack(th.meshgrid(*[nodes] * dim, indexing="ij"), dim=-1).reshape(-1, dim)
    volumes = th.stack(th.meshgrid(*[weights] * dim, indexing="ij"), dim=-1).prod(dim=-1).flatten()
    return math.log((volumes * (q_function(points) / ALPHA).exp()).sum().item())


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize(("proposal", "n_particles"), [("policy", 1), ("policy", 4), ("uniform", 1), ("uniform", 4)])
def test_unbiased_and_lower_bound(dim, n_particles, proposal):
    """E exp(V / alpha) = Z and E V <= alpha log Z, for the agent's own proposals on a known Q."""
    agent = make_agent(dim, proposal)
    th.manual_seed(1)
    n_states = 100_000
    with th.no_grad():
        u, log_prob_a = agent.propose(th.zeros(n_states, 1), n_particles)
    u, log_prob_a = u.double(), log_prob_a.double()
    v = soft_value(q_function(th.tanh(u)), log_prob_a, ALPHA)
    ratio = th.exp(v / ALPHA - log_z(dim))
    standard_error = ratio.std().item() / math.sqrt(n_states)
    assert standard_error < 0.03
    assert abs(ratio.mean().item() - 1.0) < 4 * standard_error
    assert v.mean().item() < ALPHA * log_z(dim)


def make_agent(dim, proposal):
    import gymnasium as gym
    from gymnasium import spaces

    class OneState(gym.Env):
        observation_space = spaces.Box(-1, 1, (1,), dtype=np.float32)
        action_space = spaces.Box(-1, 1, (dim,), dtype=np.float32)

        def reset(self, *, seed=None, options=None):
            return np.zeros(1, dtype=np.float32), {}

        def step(self, action):
            return np.zeros(1, dtype=np.float32), 0.0, True, False, {}

    policy_kwargs = {"log_std_init": 0.5}
    return small(env=OneState(), proposal=proposal, buffer_size=10, width=None, policy_kwargs=policy_kwargs)


def test_value_rises_with_the_number_of_particles():
    agent = make_agent(2, "policy")
    th.manual_seed(0)
    values = []
    for n_particles in (1, 4, 16, 64, 256):
        with th.no_grad():
            u, log_prob_a = agent.propose(th.zeros(2_000, 1), n_particles)
        values.append(soft_value(q_function(th.tanh(u)), log_prob_a, ALPHA).mean().item())
    assert values == sorted(values)
    assert values[-1] == pytest.approx(ALPHA * log_z(2), abs=0.05)


def test_one_particle_is_sacs_target():
    q_values, log_prob = th.randn(2, 7, 1, dtype=th.float64)
    th.testing.assert_close(soft_value(q_values, log_prob, 0.3), (q_values - 0.3 * log_prob).squeeze(1))


def test_exact_with_the_boltzmann_proposal():
    """If the proposal is exp((Q - V) / alpha), one particle gives V exactly, and every particle counts."""
    log_prob = th.randn(5, 6, dtype=th.float64)
    q_values = ALPHA * log_prob + 1.7
    th.testing.assert_close(soft_value(q_values, log_prob, ALPHA), th.full((5,), 1.7, dtype=th.float64))
    th.testing.assert_close(effective_sample_size(q_values, log_prob, ALPHA), th.full((5,), 6.0, dtype=th.float64))


def test_effective_sample_size_of_one_dominant_particle():
    q_values = th.tensor([[1000.0, 0.0, 0.0]])
    assert effective_sample_size(q_values, th.zeros(1, 3), 1.0).item() == pytest.approx(1.0)


def test_mixture_against_scipy_and_autograd():
    th.manual_seed(0)
    u, mean, log_std = th.randn(3, 2, 4, 3, dtype=th.float64)
    u = u.requires_grad_(True)
    log_prob, score = mixture_log_prob_and_score(u, mean, log_std)
    for b in range(2):
        for i in range(4):
            density = np.mean(
                [
                    stats.multivariate_normal(mean[b, k].numpy(), np.diag(np.exp(2 * log_std[b, k].numpy()))).pdf(
                        u[b, i].detach().numpy()
                    )
                    for k in range(4)
                ]
            )
            assert log_prob[b, i].item() == pytest.approx(math.log(density), rel=1e-9)
    (grad,) = th.autograd.grad(mixture_log_prob(u, mean, log_std).sum(), u)
    th.testing.assert_close(score.detach(), grad)
    th.testing.assert_close(mixture_log_prob(u, mean, log_std), log_prob)


def test_weights_of_the_mixture():
    """Against torch's own mixtures, in float64; equal weights are the default."""
    th.manual_seed(0)
    u, mean, log_std = th.randn(3, 2, 4, 3, dtype=th.float64)
    u = u.requires_grad_(True)
    log_weights = th.log_softmax(3 * th.randn(2, 4, dtype=th.float64), dim=1)
    components = th.distributions.Independent(th.distributions.Normal(mean, log_std.exp()), 1)
    mixture = th.distributions.MixtureSameFamily(th.distributions.Categorical(logits=log_weights), components)
    expected = th.stack([mixture.log_prob(u[:, i]) for i in range(4)], dim=1)
    log_prob, score = mixture_log_prob_and_score(u, mean, log_std, log_weights)
    th.testing.assert_close(log_prob, expected)
    th.testing.assert_close(score, th.autograd.grad(expected.sum(), u)[0])
    equal = th.full_like(log_weights, -math.log(4))
    th.testing.assert_close(mixture_log_prob(u, mean, log_std, equal), mixture_log_prob(u, mean, log_std))


def test_tanh_log_det_is_exact_and_survives_saturation():
    u = th.linspace(-5, 5, 41, dtype=th.float64).unsqueeze(1)
    th.testing.assert_close(tanh_log_det(u), th.log(1 - th.tanh(u) ** 2).squeeze(1))
    far = th.tensor([[30.0], [-500.0]])
    th.testing.assert_close(tanh_log_det(far), 2 * math.log(2) - 2 * far.abs().squeeze(1))


def test_density_over_actions_integrates_to_one():
    mean = th.tensor([[[-1.0], [0.8]]], dtype=th.float64)
    log_std = th.tensor([[[-1.0], [0.3]]], dtype=th.float64)

    def density(a):
        u = th.atanh(th.tensor([[[a]]], dtype=th.float64))
        return th.exp(mixture_log_prob(u, mean, log_std) - tanh_log_det(u)).item()

    assert integrate.quad(density, -1, 1, points=[-0.8, 0.7])[0] == pytest.approx(1.0, abs=1e-6)


def test_uniform_log_prob():
    assert uniform_log_prob(3) == pytest.approx(stats.uniform(-1, 2).logpdf(0.2) * 3)


def test_mode_is_the_mean_of_one_and_a_peak_of_two():
    one = mixture_mode(th.ones(1, 2), th.tensor([[[0.3, -0.2]]]), th.zeros(1, 1, 2))
    th.testing.assert_close(one, th.tensor([[0.3, -0.2]]))
    mean = th.tensor([[[-1.0], [-0.9], [-1.1], [1.0], [1.1]]], dtype=th.float64)
    log_std = th.full_like(mean, math.log(0.1))
    grid = th.linspace(-2, 2, 4001, dtype=th.float64).reshape(1, -1, 1)
    peak = grid[0, mixture_log_prob(grid, mean, log_std).argmax()].item()
    start = th.tensor([[-0.5]], dtype=th.float64)
    assert mixture_mode(start, mean, log_std, n_steps=20).item() == pytest.approx(peak, abs=2e-3)
    # one step out of the valley
    assert mixture_mode(start, mean, log_std).item() < -0.89
    # what weighs next to nothing attracts nothing
    log_weights = th.tensor([[-500.0, -500.0, -500.0, 0.0, 0.0]], dtype=th.float64)
    assert mixture_mode(start, mean, log_std, log_weights, n_steps=20).item() > 0.89


@pytest.mark.parametrize("n_particles", [1, 3, 4, 5, 1000])
def test_defensive_density_is_that_of_its_particles(n_particles):
    """E 1 / q = volume of the box, over its own particles; exactly so many of them come from each part."""
    th.manual_seed(0)
    mean, log_std = 0.5 * th.randn(2_000, 6, 1, dtype=th.float64), th.full((2_000, 6, 1), -0.5, dtype=th.float64)
    u, log_prob_a = defensive_proposal(mean, log_std, n_particles)
    assert u.shape == (2_000, n_particles, 1)
    assert log_prob_a.shape == (2_000, n_particles)
    if n_particles >= 4:
        # bounded by the uniform part
        assert log_prob_a.min() >= math.log(n_particles // 4 / n_particles / 2) - 1e-9
        assert th.exp(-log_prob_a).mean().item() == pytest.approx(2.0, rel=0.02)
    else:
        own = mixture_log_prob(u, mean, log_std) - tanh_log_det(u)
        th.testing.assert_close(log_prob_a, own)


@pytest.mark.parametrize("dim", [1, 2, 6])
def test_a_defensive_value_sees_what_the_sampler_has_missed(dim):
    """
    A sampler that has found one of two equal modes is low by log 2, and does not notice: its own particles are as good a
    sample of what they see. With the uniform part, in few dimensions, the value is right.
    """
    th.manual_seed(0)
    width, centre = 0.2, 0.5
    mean = th.full((200, 64, dim), math.atanh(centre)) + 0.15 * th.randn(200, 64, dim)
    log_std = th.full_like(mean, math.log(0.15))

    def q_values(u):
        a = th.tanh(u)
        squares = th.stack([(a - sign * centre).square().sum(dim=2) for sign in (-1, 1)])
        return th.logsumexp(-squares / (2 * width**2), dim=0)

    u, log_prob_a = defensive_proposal(mean, log_std, 2_000)
    inside = stats.norm.cdf((1 - centre) / width) - stats.norm.cdf((-1 - centre) / width)
    log_z = math.log(2) + dim * math.log(width * math.sqrt(2 * math.pi) * inside)
    defensive = soft_value(q_values(u), log_prob_a, 1.0)
    assert effective_sample_size(q_values(u), log_prob_a, 1.0).min() >= 1.0
    own_u = mean + th.exp(log_std) * th.randn_like(mean)
    own = soft_value(q_values(own_u), mixture_log_prob(own_u, mean, log_std) - tanh_log_det(own_u), 1.0).mean().item()
    assert own < log_z - 0.6
    if dim <= 2:
        assert defensive.mean().item() == pytest.approx(log_z, abs=0.02)
    else:
        # no worse, where the box is too large to find anything in it
        assert defensive.mean().item() > own - 0.05


def test_local_bandwidth_follows_the_nearest_neighbour():
    mean = th.tensor([[[0.0, 0.0], [0.1, 0.0], [5.0, 0.0]]])
    std = th.exp(local_log_std(mean))[0, :, 0]
    th.testing.assert_close(std, th.tensor([0.7 * 0.1 / math.sqrt(2), 0.7 * 0.1 / math.sqrt(2), 1.0]))


@settings(deadline=None, max_examples=60)
@given(
    q_scale=st.sampled_from([0.0, 1.0, 1e6]),
    u_scale=st.sampled_from([0.0, 1.0, 50.0]),
    log_std=st.sampled_from([-5.0, 0.0, 1.0]),
    n=st.integers(1, 6),
    dim=st.integers(1, 60),
    ent_coef=st.sampled_from([1e-3, 1.0, 10.0]),
)
def test_finite_at_extremes(q_scale, u_scale, log_std, n, dim, ent_coef):
    th.manual_seed(0)
    mean = u_scale * th.randn(2, n, dim)
    log_std_ = th.full_like(mean, log_std)
    u = mean + th.exp(log_std_) * th.randn_like(mean)
    log_prob, score = mixture_log_prob_and_score(u, mean, log_std_)
    log_prob_a = log_prob - tanh_log_det(u)
    value = soft_value(q_scale * th.randn(2, n), log_prob_a, ent_coef)
    for tensor in (log_prob, score, log_prob_a, value, mixture_mode(u[:, 0], mean, log_std_)):
        assert th.isfinite(tensor).all()
    assert th.isfinite(local_log_std(mean)).all()
