"""Modes of a mixture of Gaussians, and how much of it belongs to each: tensors in, tensors out."""

import math
from collections.abc import Callable

import torch as th

from sb3_softq.soft_value import mixture_log_prob, mixture_mode

# Mean-shift stops when no point moves further, in standard deviations of the components, or after so many steps
TOLERANCE, MAX_STEPS = 1e-3, 200
# Width of a component at least, in distances from a component to the next (their median)
REACH = 0.5
# Points closer than this, in the same unit, are one peak
SAME_PEAK = 0.1
# Where the density between two peaks is looked at
N_BETWEEN = 17


def mixture_modes(mean: th.Tensor, log_std: th.Tensor, valley: float = 0.5) -> tuple[th.Tensor, th.Tensor]:
    """
    Modes of a mixture of K Gaussians that weigh the same, 1/K sum_k N(mean_k, diag(std_k^2)), by mean-shift (Comaniciu and
    Meer 2002, https://doi.org/10.1109/34.1000236) from the mean of each.

    A sample of components has more peaks than what it was drawn from. So components are at least half as wide as the next one
    is far (in the median), and peaks between which the density does not fall below ``valley`` of the lower one's are one
    mode, on the straight line or from peak to peak (Chazal et al. 2013, https://doi.org/10.1145/2535927).

    :param mean: Means of the components, shape (K, dim)
    :param log_std: Log standard deviations, same shape
    :param valley: Share of the lower peak's density, in (0, 1], that parts two modes
    :return: Positions of the modes' highest peaks, shape (n_modes, dim), and the shares of the components whose means climb to
        them, shape (n_modes,), the largest first
    """
    if len(mean) > 1:
        # of each component: itself, the next one
        distances = th.cdist(mean, mean, compute_mode="donot_use_mm_for_euclid_dist").topk(2, largest=False).values
        log_std = th.maximum(log_std, th.log(REACH * distances[:, 1].median()))
    scale = th.exp(log_std.mean(dim=0)) * math.sqrt(mean.shape[1])

    def log_density(u: th.Tensor) -> th.Tensor:
        return mixture_log_prob(u[None], mean[None], log_std[None])[0]

    ends = _climb(mean, log_std, TOLERANCE * scale)
    peaks = _distinct(ends, SAME_PEAK * scale)
    top = _merge(peaks, log_density, valley)
    highest, counts = top[_nearest(ends / scale, peaks / scale)].unique(return_counts=True)
    order = counts.argsort(descending=True, stable=True)
    return peaks[highest[order]], counts[order] / len(mean)


def _climb(mean: th.Tensor, log_std: th.Tensor, tolerance: th.Tensor) -> th.Tensor:
    """Where mean-shift leads from the mean of each component, shape (K, dim)."""
    u, size = mean, (len(mean), *mean.shape)
    for _ in range(MAX_STEPS):
        last, u = u, mixture_mode(u, mean.expand(size), log_std.expand(size))
        if bool(((u - last).abs() <= tolerance).all()):
            break
    return u


def _distinct(points: th.Tensor, radius: th.Tensor) -> th.Tensor:
    """Points that are not within ``radius``, per dimension, of one before them."""
    kept = points[:0]
    for point in points:
        if not bool((((point - kept) / radius).norm(dim=1) < 1.0).any()):
            kept = th.cat([kept, point[None]])
    return kept


def _nearest(points: th.Tensor, candidates: th.Tensor) -> th.Tensor:
    return th.cdist(points, candidates, compute_mode="donot_use_mm_for_euclid_dist").argmin(dim=1)


def _merge(peaks: th.Tensor, log_density: Callable[[th.Tensor], th.Tensor], valley: float) -> th.Tensor:
    """Number of the highest peak of each peak's mode: pairs are joined from the highest saddle between them down."""
    heights = log_density(peaks).tolist()
    steps = th.linspace(0.0, 1.0, N_BETWEEN, dtype=peaks.dtype, device=peaks.device)[:, None]
    saddles = [
        (float(log_density(th.lerp(peaks[a], peaks[b], steps)).min()), a, b) for a in range(len(peaks)) for b in range(a)
    ]
    top = list(range(len(peaks)))
    for saddle, a, b in sorted(saddles, reverse=True):
        low, high = sorted((top[a], top[b]), key=heights.__getitem__)
        if saddle >= heights[low] + math.log(valley):
            top = [high if peak == low else peak for peak in top]
    return th.tensor(top, device=peaks.device)
