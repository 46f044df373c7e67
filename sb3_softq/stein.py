"""
Stein variational gradient descent on pre-tanh actions: tensors in, tensors out.

Batches of particles ``u`` have the shape (batch_size, n_particles, action_dim); the target density over ``u`` is
exp(Q(s, tanh u) / alpha) prod_i (1 - tanh(u_i)^2) / Z. All forces are multiplied by alpha, so that their size stays
that of the gradient of Q when the temperature falls.
"""

import math
from typing import Literal

import torch as th

KernelName = Literal["rbf", "delta"]


def tanh_log_det_grad(u: th.Tensor) -> th.Tensor:
    """
    :param u: Pre-tanh actions
    :return: Gradient of sum_i log(1 - tanh(u_i)^2) with respect to u, -2 tanh(u)
    """
    return -2.0 * th.tanh(u)


def squared_distances(x: th.Tensor, y: th.Tensor) -> th.Tensor:
    """
    :param x: Particles, shape (batch_size, n, action_dim)
    :param y: Particles, shape (batch_size, m, action_dim)
    :return: |x_i - y_j|^2, shape (batch_size, n, m), exactly 0 for identical particles
    """
    return th.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()


def median_bandwidth(sq_distances: th.Tensor, exclude_diagonal: bool, minimum: float = 1e-3) -> th.Tensor:
    """
    Median heuristic h = median(|x - y|^2) / log n (Liu & Wang 2016, https://arxiv.org/abs/1608.04471), per state.

    :param sq_distances: Shape (batch_size, m, n)
    :param exclude_diagonal: Leave out each particle's distance to itself (when both sets are the same)
    :param minimum: Lower bound, keeps the kernel defined when particles coincide
    :return: Shape (batch_size, 1, 1)
    """
    n_updated, n = sq_distances.shape[1:]
    # the zeros of the diagonal sort first
    n_skip = n if exclude_diagonal else 0
    # a lone particle has no distance to take a median of, and its kernel is 1 whatever the bandwidth
    rank = min(n_skip + (n_updated * n - n_skip + 1) // 2, n_updated * n)
    # not kthvalue, which has no deterministic implementation on CUDA
    median = sq_distances.flatten(start_dim=1).topk(max(rank, 1), dim=1, largest=False).values[:, -1]
    return (median / math.log(max(n, 2))).clamp_min(minimum)[:, None, None]


def stein_direction(
    particles: th.Tensor,
    force: th.Tensor,
    updated: th.Tensor | None = None,
    kernel: KernelName = "rbf",
    bandwidth: float | None = None,
    repulsion: th.Tensor | float = 0.0,
) -> th.Tensor:
    """
    Stein direction, eq. (13) of https://arxiv.org/abs/1702.08165 times alpha:

        phi(u_i) = 1/n sum_j [ k(u_j, u_i) force_j + repulsion * grad_{u_j} k(u_j, u_i) ]

    Two ways to keep the particles apart, equal in expectation by Stein's identity:

    - ``repulsion = alpha`` and ``force = grad_u (Q + alpha logdet)``: the original, which asks nothing of the sampler,
      but with few particles in several dimensions the repulsion is too weak and their spread collapses;
    - ``repulsion = 0`` and ``force = grad_u (Q + alpha logdet - alpha log q)`` where the sampler's own density q is known.

    :param particles: Where ``force`` was evaluated, shape (batch_size, n, action_dim)
    :param force: Shape (batch_size, n, action_dim)
    :param updated: Particles to move, shape (batch_size, m, action_dim). By default ``particles`` themselves.
    :param kernel: ``"rbf"`` exp(-r^2/h), or ``"delta"``, the limit h -> 0, where a particle feels its own force only (then
        there is no repulsion, and ``updated`` must not be given)
    :param bandwidth: h > 0, in squared units of u. By default the median heuristic, see :func:`median_bandwidth`.
    :param repulsion: Factor of the kernel's gradient, alpha or 0
    :return: phi, shape of ``updated``
    """
    n = particles.shape[1]
    if kernel == "delta":
        return force / n
    targets = particles if updated is None else updated
    # (batch_size, m, n): row i belongs to the particle that moves
    sq_dist = squared_distances(targets, particles)
    h = median_bandwidth(sq_dist, exclude_diagonal=updated is None) if bandwidth is None else bandwidth
    k = th.exp(-sq_dist / h)
    slope = 2.0 * k / h
    # grad_{u_j} k(u_j, u_i) = slope_ij (u_i - u_j), summed over j without a (batch_size, m, n, action_dim) tensor
    repel = slope.sum(dim=2, keepdim=True) * targets - slope @ particles
    return (k @ force + repulsion * repel) / n


def birth_death_rates(
    q_values: th.Tensor, log_prob_a: th.Tensor, log_weights: th.Tensor, ent_coef: th.Tensor, limit: float = 5.0
) -> th.Tensor:
    """
    How fast the experts of a mixture q = sum_z w_z q_z gain and lose weight, since no move along a gradient carries
    probability from one mode to another. The birth-death (Fisher-Rao) gradient flow of KL(q || exp(Q / alpha) / Z) is

        d log w_z / dt = A_z - sum_y w_y A_y,    A_z = E_{a ~ q_z} [ Q(s, a) / alpha - log q_a(a|s) ]

    (Lu et al. 2019, https://arxiv.org/abs/1905.09863). Multiplied by alpha, as all forces. It comes to rest where all experts
    have the same A, and one of no weight that has found a new mode grows as fast as any.

    :param q_values: Q of one particle from each of n experts, shape (batch_size, n)
    :param log_prob_a: Log-density of the whole mixture at them, over the normalised action box, same shape
    :param log_weights: Log of the experts' weights, same shape
    :param ent_coef: Temperature alpha > 0
    :param limit: Bound of a rate in units of alpha: an expert far from all that is good says nothing about the others
    :return: Rates that sum to 0 over the experts, shape (batch_size, n)
    """
    advantages = q_values - ent_coef * log_prob_a
    mean = (th.softmax(log_weights, dim=1) * advantages).sum(dim=1, keepdim=True)
    rates = ((advantages - mean) / ent_coef).clamp(-limit, limit)
    return ent_coef * (rates - rates.mean(dim=1, keepdim=True))


def weighted_mean(values: th.Tensor, log_weights: th.Tensor) -> th.Tensor:
    """
    Mean over states and particles of a mixture, whose components came in turn and not as often as they weigh.

    :param values: Of particles, shape (batch_size, n)
    :param log_weights: Log of their components' weights, same shape
    :return: Scalar
    """
    # not a product of vectors, which autocast does in bfloat16 on CUDA
    return (th.softmax(log_weights.flatten(), dim=0) * values.flatten()).sum()
