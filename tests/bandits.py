"""One-step environments with a known reward, and so a known Boltzmann distribution exp(r(a) / alpha) / Z."""

import math

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class Bandit(gym.Env):
    """
    One step per episode: observe one of ``observations``, act, be paid ``reward_fn(observation, actions)``.

    :param reward_fn: Maps an observation value and actions of shape (..., action_dim) to rewards of shape (...)
    :param low: Lower bounds of the action box
    :param high: Upper bounds of the action box
    :param observations: Values that the one-dimensional observation takes, with equal probability
    """

    def __init__(self, reward_fn, low=(-1.0,), high=(1.0,), observations=(0.0,)):
        self.reward_fn = reward_fn
        self.observations = observations
        self.action_space = spaces.Box(np.array(low, dtype=np.float32), np.array(high, dtype=np.float32))
        self.observation_space = spaces.Box(-1.0, 1.0, (1,), dtype=np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation = self.observations[self.np_random.integers(len(self.observations))]
        return np.array([self.observation], dtype=np.float32), {}

    def step(self, action):
        reward = float(self.reward_fn(self.observation, np.asarray(action, dtype=np.float64)))
        return np.array([self.observation], dtype=np.float32), reward, True, False, {}


def bumps(a, weights, centres, widths):
    """Log of a Gaussian mixture over actions, plus a constant."""
    log_components = [
        math.log(w / s ** a.shape[-1]) - ((a - np.array(c)) ** 2).sum(axis=-1) / (2 * s * s)
        for w, c, s in zip(weights, centres, widths, strict=True)
    ]
    return np.logaddexp.reduce(log_components)


def two_modes(_, a):
    return bumps(a, (0.65, 0.35), ([-0.5], [0.55]), (0.15, 0.15))


def ring(_, a):
    return -((np.linalg.norm(a, axis=-1) - 0.6) ** 2) / (2 * 0.15**2)


def rising(_, a):
    return 2.0 * a[..., 0] + a[..., 1]


def conditional(observation, a):
    return two_modes(None, a) if observation > 0 else bumps(a, (1.0,), ([0.2],), (0.2,))


def shifted(_, a):
    """Two modes in a box of bounds (-1, 4)."""
    return bumps(a, (0.4, 0.6), ([0.0], [2.8]), (0.4, 0.4))


def boltzmann(env, observation, alpha, n_bins):
    """
    :return: Probabilities of the cells of a grid of ``n_bins`` per dimension, and log integral exp(r / alpha) da
    """
    low, high = env.action_space.low.astype(float), env.action_space.high.astype(float)
    oversampling = 8
    n_points = n_bins * oversampling
    axes = [lo + (np.arange(n_points) + 0.5) / n_points * (hi - lo) for lo, hi in zip(low, high, strict=True)]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    log_density = env.reward_fn(observation, points) / alpha
    log_z = np.logaddexp.reduce(log_density.ravel()) + np.log((high - low) / n_points).sum()
    density = np.exp(log_density - log_density.max())
    for axis in range(len(low)):
        shape = density.shape
        density = density.reshape(*shape[:axis], n_bins, oversampling, *shape[axis + 1 :]).sum(axis=axis + 1)
    return density / density.sum(), log_z


def total_variation(env, observation, alpha, actions, n_bins):
    """
    :param actions: Samples, shape (n, action_dim)
    :return: Total variation between their histogram and the Boltzmann distribution, between 0 and 1
    """
    probabilities, _ = boltzmann(env, observation, alpha, n_bins)
    edges = [np.linspace(lo, hi, n_bins + 1) for lo, hi in zip(env.action_space.low, env.action_space.high, strict=True)]
    counts, _ = np.histogramdd(actions, bins=edges)
    return 0.5 * np.abs(counts / counts.sum() - probabilities).sum()
