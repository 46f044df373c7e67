"""
The particle-based soft value: tensors in, tensors out.

Notation: ``u`` is a pre-tanh action and ``a = tanh(u)`` the action in the normalised box (-1, 1)^d.
Densities with suffix ``_a`` are over ``a``, the others over ``u``. Batches of particles have the shape
(batch_size, n_particles, action_dim).
"""

import math

import torch as th
from torch.nn import functional as F

# Smallest standard deviation that particles get from the distance to their neighbours
LOCAL_STD_MIN = 0.03


def tanh_log_det(u: th.Tensor) -> th.Tensor:
    """
    Log-determinant of the Jacobian of ``a = tanh(u)``, sum_i log(1 - tanh(u_i)^2), written as
    sum_i 2 (log 2 - u_i - softplus(-2 u_i)): exact where ``tanh`` has saturated, with no epsilon.

    :param u: Pre-tanh actions, shape (..., action_dim)
    :return: Shape (...)
    """
    return 2.0 * (math.log(2.0) - u - F.softplus(-2.0 * u)).sum(dim=-1)


def uniform_log_prob(action_dim: int) -> float:
    """
    :param action_dim: Dimension d of the action space
    :return: Log-density -d log 2 of the uniform distribution over the box (-1, 1)^d, in nats
    """
    return -action_dim * math.log(2.0)


def uniform_proposal(n_states: int, n_particles: int, action_dim: int, device: th.device) -> tuple[th.Tensor, th.Tensor]:
    """
    Uniform actions in the box, the proposal of the paper.

    :param n_states: Number of states
    :param n_particles: Number of particles per state
    :param action_dim: Dimension d of the action space
    :param device: Where to draw
    :return: Pre-tanh actions, shape (n_states, n_particles, action_dim), and their log-density over the normalised box, shape
        (n_states, n_particles)
    """
    uniform = th.rand(n_states, n_particles, action_dim, device=device)
    u = th.atanh((2 * uniform - 1).clamp(-1 + 1e-6, 1 - 1e-6))
    return u, th.full_like(u[..., 0], uniform_log_prob(action_dim))


def mixture_log_prob(u: th.Tensor, mean: th.Tensor, log_std: th.Tensor, log_weights: th.Tensor | None = None) -> th.Tensor:
    """
    Log-density of the sampler given K of its particles, q(u|s) = sum_k w_k N(u; mean_k, diag(std_k^2)).

    :param u: Where to evaluate, shape (batch_size, n, action_dim)
    :param mean: Means of the K components, shape (batch_size, K, action_dim)
    :param log_std: Log standard deviations, same shape as ``mean``
    :param log_weights: Log of the components' weights, which sum to 1, shape (batch_size, K); 1/K each by default
    :return: log q(u|s), shape (batch_size, n)
    """
    return th.logsumexp(_components(u, mean, log_std, log_weights)[0], dim=2)


def mixture_log_prob_and_score(
    u: th.Tensor, mean: th.Tensor, log_std: th.Tensor, log_weights: th.Tensor | None = None
) -> tuple[th.Tensor, th.Tensor]:
    """
    :func:`mixture_log_prob` and its gradient with respect to u, sum_k r_k (mean_k - u) / std_k^2 with the
    responsibilities r_k of the components.

    :param u: Where to evaluate, shape (batch_size, n, action_dim)
    :param mean: Means of the K components, shape (batch_size, K, action_dim)
    :param log_std: Log standard deviations, same shape as ``mean``
    :param log_weights: Log of the components' weights, shape (batch_size, K); 1/K each by default
    :return: log q(u|s), shape (batch_size, n), and its gradient, same shape as ``u``
    """
    log_components, z, inv_std = _components(u, mean, log_std, log_weights)
    log_prob = th.logsumexp(log_components, dim=2)
    responsibilities = th.exp(log_components - log_prob.unsqueeze(2)).unsqueeze(3)
    return log_prob, -(z.mul_(inv_std).mul_(responsibilities)).sum(dim=2)


def _components(
    u: th.Tensor, mean: th.Tensor, log_std: th.Tensor, log_weights: th.Tensor | None
) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """log (w_k N(u; mean_k, std_k^2)), shape (batch_size, n, K), and z = (u - mean_k) / std_k, 1 / std_k."""
    inv_std = th.exp(-log_std).unsqueeze(1)
    # (batch_size, n, K, action_dim)
    z = (u.unsqueeze(2) - mean.unsqueeze(1)).mul_(inv_std)
    log_norm = log_std.sum(dim=-1) + 0.5 * u.shape[-1] * math.log(2.0 * math.pi)
    log_norm = log_norm + math.log(mean.shape[1]) if log_weights is None else log_norm - log_weights
    return -0.5 * z.square().sum(dim=-1) - log_norm.unsqueeze(1), z, inv_std


def mixture_mode(
    start: th.Tensor, mean: th.Tensor, log_std: th.Tensor, log_weights: th.Tensor | None = None, n_steps: int = 1
) -> th.Tensor:
    """
    Mean-shift towards a mode of the mixture of :func:`mixture_log_prob`, its EM fixed point

        u <- (sum_k r_k mean_k / std_k^2) / (sum_k r_k / std_k^2)

    with the responsibilities r_k of the components at u. Leaves the valley between two modes for one of them.

    :param start: Where to start, shape (batch_size, action_dim)
    :param mean: Component means, shape (batch_size, K, action_dim)
    :param log_std: Log standard deviations, same shape as ``mean``
    :param log_weights: Log of the components' weights up to a constant, shape (batch_size, K); all the same by default
    :param n_steps: Number of steps
    :return: Shape (batch_size, action_dim)
    """
    log_precision = -2.0 * log_std
    precision = th.exp(log_precision)
    u = start.unsqueeze(1)
    for _ in range(n_steps):
        log_components = 0.5 * (log_precision - (u - mean).square_().mul_(precision)).sum(dim=2)
        if log_weights is not None:
            log_components = log_components + log_weights
        weights = th.softmax(log_components, dim=1).unsqueeze(2) * precision
        u = (weights * mean).sum(dim=1, keepdim=True) / weights.sum(dim=1, keepdim=True)
    return u.squeeze(1)


def local_log_std(mean: th.Tensor, scale: float = 0.7, std_min: float = LOCAL_STD_MIN, std_max: float = 1.0) -> th.Tensor:
    """
    Bandwidths for particles that come without one: std_k = ``scale`` times the distance to the nearest other
    particle over sqrt(d). Local, because one bandwidth for all would fill the valley between two modes.

    :param mean: Component means, shape (batch_size, K, action_dim)
    :param scale: Factor of the distance, > 0
    :param std_min: Smallest standard deviation
    :param std_max: Largest standard deviation, also what a lone particle gets
    :return: Log standard deviations, same shape as ``mean``
    """
    distances = th.cdist(mean, mean, compute_mode="donot_use_mm_for_euclid_dist")
    distances = distances + th.diag_embed(th.full_like(distances[:, 0], math.inf))
    nearest = distances.min(dim=2, keepdim=True).values
    std = (scale / math.sqrt(mean.shape[-1]) * nearest).clamp(std_min, std_max)
    return th.log(std).expand_as(mean)


def defensive_proposal(mean: th.Tensor, log_std: th.Tensor, n_particles: int) -> tuple[th.Tensor, th.Tensor]:
    """
    Particles for estimates that must not miss what the sampler has missed, from a defensive mixture (Hesterberg 1995,
    https://doi.org/10.1080/00401706.1995.10484303): half from the density that K components of the sampler make, a quarter
    from the same with components 1 + 1 / sqrt(d) times as wide, a quarter uniform over the box. So the importance weights
    of :func:`soft_value` are bounded wherever Q is.

    :param mean: Means of the components, shape (batch_size, K, action_dim)
    :param log_std: Log standard deviations, same shape
    :param n_particles: Number of particles, at least 1
    :return: Pre-tanh actions, shape (batch_size, n_particles, action_dim), and the mixture's log-density over the normalised
        box, shape (batch_size, n_particles)
    """
    batch_size, n_components, action_dim = mean.shape
    n_wide = n_uniform = n_particles // 4
    n_own = n_particles - n_wide - n_uniform
    wide = log_std + math.log1p(action_dim**-0.5)
    # each component in turn, from a random one on: stratified
    turn = (th.arange(n_own + n_wide, device=mean.device) + th.randint(n_components, (), device=mean.device)) % n_components
    stds = th.exp(th.cat([log_std[:, turn[:n_own]], wide[:, turn[n_own:]]], dim=1))
    u = mean[:, turn] + stds * th.randn_like(stds)
    uniform, _ = uniform_proposal(batch_size, n_uniform, action_dim, mean.device)
    u = th.cat([u, uniform], dim=1)
    log_det = tanh_log_det(u)
    parts = [
        mixture_log_prob(u, mean, log_std) - log_det + math.log(n_own / n_particles),
        mixture_log_prob(u, mean, wide) - log_det + math.log(max(n_wide / n_particles, 1e-30)),
        th.full_like(log_det, uniform_log_prob(action_dim) + math.log(max(n_uniform / n_particles, 1e-30))),
    ]
    return u, th.logsumexp(th.stack(parts), dim=0)


def soft_value(q_values: th.Tensor, log_prob_a: th.Tensor, ent_coef: th.Tensor | float) -> th.Tensor:
    """
    Soft value by importance sampling, eq. (10) of https://arxiv.org/abs/1702.08165,

        V(s) = alpha [ logsumexp_k( Q(s, a_k) / alpha - log q_a(a_k|s) ) - log K ],

    an estimate of alpha log integral exp(Q(s, a) / alpha) da. exp(V / alpha) is unbiased, V itself is a lower bound in
    expectation that tightens with K. With K = 1 it is SAC's Q - alpha log q.

    :param q_values: Q of the particles, shape (batch_size, K)
    :param log_prob_a: Log-density of the proposal at the particles, over the normalised action box, same shape
    :param ent_coef: Temperature alpha > 0
    :return: Shape (batch_size,)
    """
    return ent_coef * (th.logsumexp(q_values / ent_coef - log_prob_a, dim=1) - math.log(q_values.shape[1]))


def effective_sample_size(q_values: th.Tensor, log_prob_a: th.Tensor, ent_coef: th.Tensor | float) -> th.Tensor:
    """
    How many of the K particles carry the estimate of :func:`soft_value`, (sum w)^2 / sum w^2 with the importance
    weights w_k = exp(Q_k / alpha) / q_a(a_k): K when the proposal is the Boltzmann distribution of Q, 1 when it misses it.

    :param q_values: Q of the particles, shape (batch_size, K)
    :param log_prob_a: Log-density of the proposal, same shape
    :param ent_coef: Temperature alpha > 0
    :return: Between 1 and K, shape (batch_size,)
    """
    weights = th.softmax(q_values / ent_coef - log_prob_a, dim=1)
    return 1.0 / weights.square().sum(dim=1)
