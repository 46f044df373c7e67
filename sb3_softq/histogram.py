"""
A value as a histogram: regression by classification, with Gaussian targets (HL-Gauss, Farebrother et al. 2024,
https://arxiv.org/abs/2403.03950). Tensors in, tensors out.

The bins divide (-SUPPORT, SUPPORT) evenly. Values are in units of a scale that the caller keeps, within which lie the returns
that have been seen: :class:`sb3_softq.returns.ReturnScale`.
"""

import math

import torch as th

# Returns that have been seen lie within 5: there is room for better ones to come, and none for values that no return bears out
SUPPORT = 8.0
# Standard deviation of the targets, in widths of a bin, as the paper has it
SMOOTHING = 0.75


def bin_edges(n_bins: int, device: th.device | None = None) -> th.Tensor:
    """
    :param n_bins: Number of bins
    :param device: Where the edges are wanted
    :return: Edges in ascending order, shape (n_bins + 1,)
    """
    return th.linspace(-SUPPORT, SUPPORT, n_bins + 1, device=device)


def bin_centers(n_bins: int, device: th.device | None = None) -> th.Tensor:
    """
    :param n_bins: Number of bins
    :param device: Where the centers are wanted
    :return: Centers in ascending order, shape (n_bins,)
    """
    edges = bin_edges(n_bins, device)
    return 0.5 * (edges[1:] + edges[:-1])


def gaussian_histogram(values: th.Tensor, edges: th.Tensor) -> th.Tensor:
    """
    The mass in each bin of a Gaussian around a value, of standard deviation ``SMOOTHING`` times a bin, cut off at the ends of
    the support and normalised (eq. (5) of the paper).

    :param values: Shape (...); what lies beyond the centers of the outer bins counts as these
    :param edges: From :func:`bin_edges`
    :return: Probabilities, shape (..., n_bins)
    """
    width = edges[1] - edges[0]
    values = values.clamp(edges[0] + 0.5 * width, edges[-1] - 0.5 * width).unsqueeze(-1)
    mass = th.erf((edges - values) / (SMOOTHING * math.sqrt(2.0) * width))
    return (mass[..., 1:] - mass[..., :-1]) / (mass[..., -1:] - mass[..., :1])


def cross_entropy(logits: th.Tensor, values: th.Tensor, edges: th.Tensor) -> th.Tensor:
    """
    :param logits: Of the bins, shape (..., n_bins)
    :param values: Targets, whose shape broadcasts with that of the logits without its last axis
    :param edges: From :func:`bin_edges`
    :return: Cross-entropy of the prediction to the Gaussian histogram of each target, in nats, shape (...)
    """
    return -(gaussian_histogram(values, edges) * th.log_softmax(logits, dim=-1)).sum(dim=-1)
