"""One-step environments with a known reward, and so a known Boltzmann distribution exp(r(a) / alpha) / Z."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

RewardFn = Callable[[float, np.ndarray], np.ndarray]


class Bandit(gym.Env):
    """
    One step per episode: observe one of ``observations``, act, be paid ``reward_fn(observation, actions)``.

    :param reward_fn: Maps an observation value and actions of shape (..., action_dim) to rewards of shape (...)
    :param low: Lower bounds of the action box
    :param high: Upper bounds of the action box
    :param observations: Values that the one-dimensional observation takes, with equal probability
    """

    action_space: spaces.Box

    def __init__(
        self,
        reward_fn: RewardFn,
        low: Sequence[float] = (-1.0,),
        high: Sequence[float] = (1.0,),
        observations: Sequence[float] = (0.0,),
    ):
        self.reward_fn = reward_fn
        self.observations = observations
        self.observation = observations[0]
        self.action_space = spaces.Box(np.array(low, dtype=np.float32), np.array(high, dtype=np.float32))
        self.observation_space = spaces.Box(-1.0, 1.0, (1,), dtype=np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.observation = self.observations[int(self.np_random.integers(len(self.observations)))]
        return np.array([self.observation], dtype=np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        reward = float(self.reward_fn(self.observation, np.asarray(action, dtype=np.float64)))
        return np.array([self.observation], dtype=np.float32), reward, True, False, {}


def bumps(a: np.ndarray, weights: Sequence[float], centres: Sequence[Sequence[float]], widths: Sequence[float]) -> np.ndarray:
    """Log of a Gaussian mixture over actions, plus a constant."""
    log_components = [
        math.log(w / s ** a.shape[-1]) - ((a - np.array(c)) ** 2).sum(axis=-1) / (2 * s * s)
        for w, c, s in zip(weights, centres, widths, strict=True)
    ]
    return np.logaddexp.reduce(log_components)


def two_modes(_: float, a: np.ndarray) -> np.ndarray:
    return bumps(a, (0.65, 0.35), ([-0.5], [0.55]), (0.15, 0.15))


def three_modes(_: float, a: np.ndarray) -> np.ndarray:
    return bumps(a, (0.5, 0.3, 0.2), ([-0.6, -0.5], [0.6, -0.3], [0.0, 0.6]), (0.13, 0.13, 0.13))


def ring(_: float, a: np.ndarray) -> np.ndarray:
    return -((np.linalg.norm(a, axis=-1) - 0.6) ** 2) / (2 * 0.15**2)


def rising(_: float, a: np.ndarray) -> np.ndarray:
    """Highest in a corner of the box: where a wrong tanh correction shows."""
    return 2.0 * a[..., 0] + a[..., 1]


def conditional(observation: float, a: np.ndarray) -> np.ndarray:
    return two_modes(observation, a) if observation > 0 else bumps(a, (1.0,), ([0.2],), (0.2,))


def shifted(_: float, a: np.ndarray) -> np.ndarray:
    """Two modes in a box of bounds (-1, 4)."""
    return bumps(a, (0.4, 0.6), ([0.0], [2.8]), (0.4, 0.4))


CASES: dict[str, Callable[[], Bandit]] = {
    "two_modes": lambda: Bandit(two_modes),
    "three_modes": lambda: Bandit(three_modes, (-1, -1), (1, 1)),
    "ring": lambda: Bandit(ring, (-1, -1), (1, 1)),
    "rising": lambda: Bandit(rising, (-1, -1), (1, 1)),
    "conditional": lambda: Bandit(conditional, observations=(-1.0, 1.0)),
    "asymmetric_bounds": lambda: Bandit(shifted, (-1,), (4,)),
}
# Of a training that takes half a minute, with ent_coef=1.0
SHORT_TRAINING: dict[str, Any] = dict(
    learning_rate=1e-3,
    learning_starts=500,
    buffer_size=5_000,
    batch_size=128,
    train_freq=16,
    gradient_steps=16,
    ent_coef=1.0,
    policy_kwargs={"net_arch": [64, 64]},
    device="cpu",
)


def n_bins(env: Bandit) -> int:
    """Bins per dimension of the grid on which distributions are compared."""
    return 30 if env.action_space.shape == (1,) else 12


def boltzmann(env: Bandit, observation: float, alpha: float) -> tuple[np.ndarray, float]:
    """
    :param env: Environment
    :param observation: Value of the observation
    :param alpha: Temperature
    :return: Probabilities of the bins of a grid, and log integral exp(r / alpha) da over the box
    """
    low, high = env.action_space.low.astype(float), env.action_space.high.astype(float)
    oversampling, bins = 8, n_bins(env)
    n_points = bins * oversampling
    axes = [lo + (np.arange(n_points) + 0.5) / n_points * (hi - lo) for lo, hi in zip(low, high, strict=True)]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    log_density = env.reward_fn(observation, points) / alpha
    log_z = float(np.logaddexp.reduce(log_density.ravel()) + np.log((high - low) / n_points).sum())
    density = np.exp(log_density - log_density.max())
    for axis in range(len(low)):
        shape = density.shape
        density = density.reshape(*shape[:axis], bins, oversampling, *shape[axis + 1 :]).sum(axis=axis + 1)
    return density / density.sum(), log_z


def total_variation(env: Bandit, observation: float, alpha: float, actions: np.ndarray) -> float:
    """
    :param env: Environment
    :param observation: Value of the observation
    :param alpha: Temperature
    :param actions: Samples, shape (n, action_dim)
    :return: Total variation between their histogram and the Boltzmann distribution: 0 where they agree, 1 where they
        share nothing
    """
    probabilities, _ = boltzmann(env, observation, alpha)
    edges = [np.linspace(lo, hi, n_bins(env) + 1) for lo, hi in zip(env.action_space.low, env.action_space.high, strict=True)]
    counts, _ = np.histogramdd(actions, bins=edges)
    return float(0.5 * np.abs(counts / counts.sum() - probabilities).sum())
