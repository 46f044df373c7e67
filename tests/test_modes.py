"""Modes of a mixture: those that it was made of, those that a grid shows, and none that are an accident of the sample."""

import math

import numpy as np
import pytest
import torch as th
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from sb3_softq.modes import mixture_modes


def components(centres, counts, spread, std, seed):
    """As many components around each centre as it counts, in a random order."""
    rng = np.random.default_rng(seed)
    centre = np.repeat(centres, counts, axis=0)
    mean = th.as_tensor(rng.permutation(centre + spread * rng.standard_normal(centre.shape)))
    return mean, th.full_like(mean, math.log(std))


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 12),
    st.lists(st.sampled_from([20, 40, 60, 80]), min_size=1, max_size=4, unique=True),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from([0.03, 0.1, 0.3]),
    st.integers(0, 1000),
)
@example(7, [20], 1.0, 0.03, 91)
def test_modes_that_it_was_made_of(dim, counts, spread, std, seed):
    """Clouds of components, each component at least as wide as the cloud, eight widths apart; single ones may stand aside."""
    width = std * math.hypot(1.0, spread)
    centres = np.zeros((len(counts), dim))
    centres[:, seed % dim] = 8.0 * width * np.arange(len(counts))
    centres += np.random.default_rng(seed).uniform(-1.0, 1.0, dim)
    modes, shares = mixture_modes(*components(centres, counts, spread * std, std, seed))
    largest_first = np.argsort(counts)[::-1]
    modes, strays = modes[: len(counts)], shares[len(counts) :]
    # a single one is a twentieth of the smallest cloud
    aside = max(0.05, 1.01 / sum(counts))
    assert float(strays.sum()) < aside
    assert shares[: len(counts)].numpy() == pytest.approx(np.array(counts)[largest_first] / sum(counts), abs=aside)
    # peaks of a sample of components are about as exact as its mean
    assert (np.linalg.norm(modes.numpy() - centres[largest_first], axis=1) < 1.5 * width * math.sqrt(dim)).all()


def modes_on_a_grid(means, stds, valley):
    """Peaks of a mixture in one dimension that a valley parts from each higher one, from its values on a grid."""
    x = np.linspace(-8.0, 8.0, 8001)
    density = norm.pdf(x[:, None], means, stds).mean(axis=1)
    peaks = [i for i in range(1, len(x) - 1) if density[i - 1] < density[i] >= density[i + 1]]
    kept = []
    for peak in sorted(peaks, key=lambda i: -density[i]):
        if all(density[min(peak, k) : max(peak, k) + 1].min() < valley * density[peak] for k in kept):
            kept.append(peak)
    return sorted(x[kept])


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.floats(-4.0, 4.0), st.floats(0.2, 1.0)), min_size=1, max_size=5))
def test_against_a_grid(pairs):
    # each component twice: none is widened to reach the next one
    mean, std = (np.array(column * 2) for column in zip(*pairs, strict=True))
    expected = modes_on_a_grid(mean, std, 0.5)
    assume(len(modes_on_a_grid(mean, std, 0.45)) == len(modes_on_a_grid(mean, std, 0.55)))
    modes, shares = mixture_modes(th.as_tensor(mean)[:, None], th.as_tensor(np.log(std))[:, None])
    found = np.array(sorted(modes[:, 0].tolist()))
    height, highest = (norm.pdf(x[:, None], mean, std).mean(axis=1) for x in (found, np.array(expected)))
    assert height == pytest.approx(highest, rel=0.01)
    # where they are as high, one peak is as good as another
    peaks = np.array(modes_on_a_grid(mean, std, 1.0))
    assert (np.abs(found[:, None] - peaks).min(axis=1) < 0.3).all()
    assert float(shares.sum()) == pytest.approx(1.0)
    assert (shares.diff() <= 0).all()


@pytest.mark.parametrize(("valley", "n_modes"), [(0.05, 1), (0.5, 2), (1.0, 3)])
def test_the_valley_that_parts_two_modes(valley, n_modes):
    # one peak at -2, and two a little apart around 2
    mean = th.tensor([-2.0, -2.0, 1.5, 1.5, 2.5, 2.5])[:, None]
    modes, shares = mixture_modes(mean, th.full_like(mean, math.log(0.45)) + (mean < 0) * 0.6, valley)
    assert len(modes) == n_modes
    assert shares.tolist() == pytest.approx({1: [1.0], 2: [2 / 3, 1 / 3], 3: [1 / 3] * 3}[n_modes])


def test_a_ring_is_one_mode():
    """Its peaks are accidents; a straight line between opposite ones leads through the void."""
    angle = th.rand(256, generator=th.Generator().manual_seed(0)) * 2 * math.pi
    mean = th.stack([th.cos(angle), th.sin(angle)], dim=1)
    modes, shares = mixture_modes(mean, th.full_like(mean, math.log(0.2)))
    assert shares.tolist() == [1.0]
    assert float(modes.norm()) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(("dim", "std"), [(1, 0.3), (2, 0.3), (8, 0.1), (12, 0.1), (12, 0.7)])
def test_a_cloud_is_one_mode(dim, std):
    """In eight dimensions and more hardly one of its components reaches the next."""
    mean = th.randn(256, dim, generator=th.Generator().manual_seed(0))
    _, shares = mixture_modes(mean, th.full_like(mean, math.log(std)))
    assert float(shares[0]) > 0.95


def test_a_single_component():
    modes, shares = mixture_modes(th.tensor([[0.3, -2.0]]), th.zeros(1, 2))
    assert modes.tolist() == pytest.approx(np.array([[0.3, -2.0]]))
    assert shares.tolist() == [1.0]
