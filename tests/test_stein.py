"""stein.py against oracles that are written here, in float64, from the equations alone."""

import math

import pytest
import torch as th
from hypothesis import given, settings
from hypothesis import strategies as st

from sb3_softq.stein import birth_death_rates, median_bandwidth, squared_distances, stein_direction, tanh_log_det_grad


def kernel_function(x, y, h):
    r2 = ((x - y) ** 2).sum()
    return th.exp(-r2 / h)


def oracle(particles, force, updated, h, repulsion):
    """Eq. (13), term by term, the kernel's gradient by autograd."""
    result = th.zeros_like(updated)
    for b in range(len(particles)):
        for i in range(updated.shape[1]):
            for j in range(particles.shape[1]):
                u_j = particles[b, j].clone().requires_grad_(True)
                k = kernel_function(u_j, updated[b, i], h[b])
                (grad,) = th.autograd.grad(k, u_j)
                result[b, i] += (k.detach() * force[b, j] + repulsion * grad) / particles.shape[1]
    return result


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("bandwidth", [None, 0.37])
@pytest.mark.parametrize("repulsion", [0.0, 0.2])
def test_direction_is_equation_13(shared, bandwidth, repulsion):
    th.manual_seed(0)
    particles, force = th.randn(2, 3, 5, 2, dtype=th.float64)
    updated = particles if shared else th.randn(3, 4, 2, dtype=th.float64)
    h = []
    for b in range(3):
        pairs = [
            ((updated[b, i] - particles[b, j]) ** 2).sum().item()
            for i in range(updated.shape[1])
            for j in range(5)
            if not shared or i != j
        ]
        # torch's convention for an even number: the lower of the two
        h.append(bandwidth or sorted(pairs)[(len(pairs) - 1) // 2] / math.log(5))
    phi = stein_direction(particles, force, None if shared else updated, bandwidth=bandwidth, repulsion=repulsion)
    th.testing.assert_close(phi, oracle(particles, force, updated, h, repulsion), rtol=1e-10, atol=1e-12)


def test_delta_kernel_is_the_limit_of_bandwidth_zero():
    particles, force = th.randn(2, 3, 6, 2, dtype=th.float64)
    narrow = stein_direction(particles, force, kernel="rbf", bandwidth=1e-9)
    th.testing.assert_close(stein_direction(particles, force, kernel="delta"), narrow)


def test_tanh_log_det_grad_against_autograd():
    u = th.linspace(-4, 4, 33, dtype=th.float64).reshape(-1, 1).requires_grad_(True)
    (grad,) = th.autograd.grad(th.log(1 - th.tanh(u) ** 2).sum(), u)
    th.testing.assert_close(tanh_log_det_grad(u.detach()), grad)


def test_both_repulsions_agree_by_steins_identity():
    """E_q[k(u', u) grad log q(u')] = -E_q[grad_{u'} k(u', u)]: the two forms of the direction have the same mean."""
    th.manual_seed(0)
    alpha, std = 0.5, 0.7
    particles = std * th.randn(1, 200_000, 2, dtype=th.float64)
    updated = th.tensor([[[0.3, -0.2], [1.0, 0.5]]], dtype=th.float64)
    score = -particles / std**2
    by_kernel = stein_direction(particles, th.zeros_like(particles), updated, bandwidth=1.0, repulsion=alpha)
    by_density = stein_direction(particles, -alpha * score, updated, bandwidth=1.0)
    th.testing.assert_close(by_kernel, by_density, rtol=0.05, atol=5e-3)


def test_actor_gradient_is_equation_14():
    """One backward pass through -<stop_gradient(phi), u> equals the chain rule du/dtheta * phi, taken particle by particle."""
    th.manual_seed(0)
    net = th.nn.Sequential(th.nn.Linear(2, 8), th.nn.Tanh(), th.nn.Linear(8, 2)).double()
    xi = th.randn(3, 4, 2, dtype=th.float64)
    force = th.randn(3, 4, 2, dtype=th.float64)
    u = net(xi)
    phi = stein_direction(u.detach(), force, repulsion=0.3)
    (-(phi * u).sum(dim=2).mean()).backward()
    (weight, *_) = net.parameters()
    long_way = th.zeros_like(weight)
    for b in range(3):
        for i in range(4):
            for component in range(2):
                (jacobian,) = th.autograd.grad(net(xi)[b, i, component], weight)
                long_way += jacobian * phi[b, i, component] / 12
    th.testing.assert_close(weight.grad, -long_way)


def test_particles_converge_to_a_gaussian():
    """Plain SVGD with many particles finds mean and variance of a Gaussian; with the sign of the repulsion wrong it can't."""
    th.manual_seed(0)
    u = th.randn(1, 100, 1, dtype=th.float64) * 0.1 + 2.0
    for _ in range(2000):
        u = u + 0.5 * stein_direction(u, -(u + 1.0) / 0.25, repulsion=1.0) * 0.25
    assert abs(u.mean().item() + 1.0) < 0.05
    assert abs(u.std().item() - 0.5) < 0.05


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(1, 8),
    dim=st.integers(1, 60),
    scale=st.sampled_from([0.0, 1e-6, 1.0, 1e3]),
    force_scale=st.sampled_from([0.0, 1.0, 1e6]),
    kernel=st.sampled_from(["rbf", "delta"]),
)
def test_finite_and_translation_invariant(n, dim, scale, force_scale, kernel):
    th.manual_seed(0)
    particles = scale * th.randn(2, n, dim)
    force = force_scale * th.randn(2, n, dim)
    phi = stein_direction(particles, force, kernel=kernel, repulsion=0.0 if kernel == "delta" else 1.0)
    assert phi.shape == particles.shape
    assert th.isfinite(phi).all()
    if scale == 1.0:
        moved = stein_direction(particles + 3.0, force, kernel=kernel, repulsion=0.0 if kernel == "delta" else 1.0)
        th.testing.assert_close(moved, phi, rtol=1e-3, atol=1e-4 * max(force_scale, 1.0))


def test_one_particle_follows_its_own_force():
    force = th.randn(4, 1, 3)
    th.testing.assert_close(stein_direction(th.randn(4, 1, 3), force, repulsion=1.0), force)


def test_identical_particles_feel_the_mean_force():
    force = th.randn(1, 5, 2)
    phi = stein_direction(th.ones(1, 5, 2), force, repulsion=1.0)
    th.testing.assert_close(phi, force.mean(dim=1, keepdim=True).expand_as(phi))


def test_bandwidth_ignores_the_diagonal_and_has_a_floor():
    x = th.tensor([[[0.0], [1.0], [3.0]]])
    # distances 1, 2, 3 squared, each twice
    assert median_bandwidth(squared_distances(x, x), exclude_diagonal=True).item() == pytest.approx(4.0 / math.log(3))
    same = th.zeros(1, 3, 1)
    assert median_bandwidth(squared_distances(same, same), exclude_diagonal=True).item() == pytest.approx(1e-3)


def log_density_of_experts(a, centres, width):
    return -((a[:, None] - centres) ** 2) / (2 * width**2) - math.log(width * math.sqrt(2 * math.pi))


def test_birth_death_rates_are_the_natural_gradient_of_the_divergence():
    """-dKL(q || p) / dw_z on a grid by autograd, up to the constant that keeps the sum of the weights."""
    grid = th.linspace(-6, 6, 6001, dtype=th.float64)
    centres = th.tensor([-2.0, 0.5, 2.0], dtype=th.float64)
    experts = log_density_of_experts(grid, centres, 0.4).exp()
    log_weights = th.log_softmax(th.tensor([1.0, -0.5, 0.3], dtype=th.float64), dim=0)
    q_function, alpha = -0.3 * grid**2 + th.sin(3 * grid), 0.7
    weights = log_weights.exp().requires_grad_(True)
    q = experts @ weights
    step = grid[1] - grid[0]
    divergence = (q * (q.log() - q_function / alpha)).sum() * step
    (grad,) = th.autograd.grad(divergence, weights)
    # an expert's advantage as its expectation over the grid, in place of one particle
    advantage = (experts * (q_function - alpha * q.detach().log())[:, None]).sum(dim=0) * step
    rates = birth_death_rates(advantage[None], th.zeros(1, 3, dtype=th.float64), log_weights[None], th.tensor([alpha]))[0]
    th.testing.assert_close(rates, -alpha * (grad - grad.mean()), rtol=1e-6, atol=1e-6)


def test_birth_death_moves_weight_to_the_boltzmann_distribution():
    """Two experts on two distant modes, one of which begins with next to nothing: no move of particles could do it."""
    th.manual_seed(0)
    logits, log_target = th.tensor([[9.0, 0.0]]), th.log(th.tensor([[0.3, 0.7]]))
    ent_coef = th.tensor([0.2])
    for _ in range(400):
        log_weights = th.log_softmax(logits, dim=1)
        # Q and the density at a particle of each: the widths are the target's, the weights are not
        eps = th.randn(1, 2)
        log_component = -0.5 * eps**2
        rates = birth_death_rates(ent_coef * (log_target + log_component), log_weights + log_component, log_weights, ent_coef)
        logits = logits + 0.1 * rates / ent_coef
    th.testing.assert_close(th.softmax(logits, dim=1), th.exp(log_target), atol=0.01, rtol=0)


@settings(deadline=None, max_examples=60)
@given(
    scale=st.sampled_from([0.0, 1.0, 1e6]),
    ent_coef=st.sampled_from([1e-3, 1.0, 10.0]),
    n=st.integers(1, 5),
)
def test_birth_death_rates_are_bounded_and_sum_to_zero(scale, ent_coef, n):
    th.manual_seed(0)
    rates = birth_death_rates(
        scale * th.randn(7, n), th.randn(7, n), th.log_softmax(scale * th.randn(7, n), dim=1), th.tensor([ent_coef])
    )
    assert rates.abs().max() <= 2 * 5.0 * ent_coef * (1 + 1e-6)
    th.testing.assert_close(rates.sum(dim=1), th.zeros(7), atol=1e-4 * ent_coef, rtol=0)
