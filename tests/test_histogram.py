"""Values as histograms: masses against scipy's Gaussian, gradients against autograd in double precision."""

import numpy as np
import pytest
import torch as th
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from sb3_softq.histogram import SMOOTHING, SUPPORT, bin_centers, bin_edges, cross_entropy, gaussian_histogram
from tests.conftest import small


@pytest.mark.parametrize("n_bins", [3, 51, 101])
def test_bins(n_bins):
    edges, centers = bin_edges(n_bins), bin_centers(n_bins)
    assert (edges[0].item(), edges[-1].item()) == (-SUPPORT, SUPPORT)
    th.testing.assert_close(centers, edges[:-1] + SUPPORT / n_bins, atol=1e-5, rtol=0)
    # so that an agent that knows nothing can say 0
    assert centers[n_bins // 2].item() == pytest.approx(0.0, abs=1e-6)


@settings(deadline=None)
@given(value=st.floats(-2 * SUPPORT, 2 * SUPPORT), n_bins=st.sampled_from([5, 51, 101]))
def test_masses_are_those_of_a_gaussian(value, n_bins):
    edges = bin_edges(n_bins).double()
    width = 2 * SUPPORT / n_bins
    center = np.clip(value, -SUPPORT + width / 2, SUPPORT - width / 2)
    cdf = norm.cdf(edges.numpy(), center, SMOOTHING * width)
    mass = gaussian_histogram(th.tensor([value], dtype=th.float64), edges)[0].numpy()
    np.testing.assert_allclose(mass, np.diff(cdf) / (cdf[-1] - cdf[0]), atol=1e-6)
    assert mass.sum() == pytest.approx(1.0)


@settings(deadline=None)
@given(value=st.floats(-SUPPORT + 1.0, SUPPORT - 1.0))
def test_the_mean_of_a_histogram_is_its_value(value):
    """Away from the ends, where a Gaussian is cut off."""
    mass = gaussian_histogram(th.tensor([value], dtype=th.float64), bin_edges(101).double())
    assert (mass @ bin_centers(101).double()).item() == pytest.approx(value, abs=2e-3)


def test_the_cross_entropy_is_least_at_the_targets():
    """Its gradient is the difference of the two histograms, and its least value the target's entropy."""
    edges = bin_edges(21).double()
    values = th.tensor([-9.0, -0.3, 5.2], dtype=th.float64)
    target = gaussian_histogram(values, edges)
    logits = th.randn(2, 3, 21, dtype=th.float64).requires_grad_(True)
    (gradient,) = th.autograd.grad(cross_entropy(logits, values, edges).sum(), logits)
    th.testing.assert_close(gradient, th.softmax(logits, dim=-1).detach() - target)
    least = cross_entropy(target.clamp_min(1e-300).log(), values, edges)
    th.testing.assert_close(least, -th.special.xlogy(target, target).sum(dim=-1))


def test_critics_predict_the_mean_of_their_histogram_in_the_unit_of_the_scale():
    critic = small(policy_kwargs=dict(n_bins=21)).critic
    critic.return_scale.fill_(30.0)
    features, actions = th.randn(4, 3), th.rand(4, 5, 1) * 2 - 1
    outputs = critic.outputs(features, actions)
    assert outputs.shape == (2, 4, 5, 21)
    expected = 30.0 * (th.softmax(outputs.double(), dim=-1) @ bin_centers(21).double())
    th.testing.assert_close(critic.q_values(features, actions), expected.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n_bins", [1, 51])
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e5])
def test_critics_learn_values_of_any_scale(n_bins, scale):
    """Regression on a line, in the environment's units."""
    model = small(policy_kwargs=dict(n_bins=n_bins, net_arch=[32], batch_norm=False), tau=0.005, learning_rate=0.01)
    critic, obs = model.critic, th.zeros(256, 3)
    critic.return_scale.fill_(scale)
    th.manual_seed(0)
    for _ in range(300):
        actions = th.rand(256, 1) * 2 - 1
        loss = critic.loss(critic.outputs(critic.features(obs), actions.unsqueeze(1)).squeeze(2), scale * truth(actions))
        critic.optimizer.zero_grad()
        loss.backward()
        critic.optimizer.step()
    actions = th.linspace(-1, 1, 41).unsqueeze(1)
    with th.no_grad():
        q_values = th.stack(critic(th.zeros(41, 3), actions)).squeeze(2)
    assert (q_values / scale - truth(actions)).abs().max() < 0.2


def truth(actions: th.Tensor) -> th.Tensor:
    return 2 * actions[:, 0]
