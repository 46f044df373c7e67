"""One-step environments with a known reward, and so a known Boltzmann distribution exp(r(a) / alpha) / Z."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3 import SAC

from sb3_softq import SoftQ

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


@dataclass
class Modes:
    """
    A reward that is the log of a mixture of isotropic Gaussians, cut off at the edges of the box (-1, 1)^d, plus a constant.

    :param weights: Of the Gaussians
    :param centres: Shape (n_modes, action_dim)
    :param widths: Standard deviations
    """

    weights: Sequence[float]
    centres: Sequence[Sequence[float]]
    widths: Sequence[float]

    def __call__(self, _: float, a: np.ndarray) -> np.ndarray:
        return np.logaddexp.reduce(self._log_components(a))

    def _log_components(self, a: np.ndarray) -> list[np.ndarray]:
        return [
            math.log(w / s ** a.shape[-1]) - ((a - np.array(c)) ** 2).sum(axis=-1) / (2 * s * s)
            for w, c, s in zip(self.weights, self.centres, self.widths, strict=True)
        ]

    def nearest(self, actions: np.ndarray) -> np.ndarray:
        """Number of the Gaussian that each action most likely comes from."""
        return np.argmax(self._log_components(actions), axis=0)

    def masses(self) -> np.ndarray:
        """Integral over the box of the weight times the density of each Gaussian, without the factor (2 pi)^(d/2)."""
        centres, widths = np.array(self.centres), np.array(self.widths)[:, None]
        cdf = np.vectorize(NormalDist().cdf)
        return np.array(self.weights) * (cdf((1 - centres) / widths) - cdf((-1 - centres) / widths)).prod(axis=1)

    def log_z(self) -> float:
        """Log of the integral of exp(reward) over the box."""
        return float(np.log(self.masses().sum()) + 0.5 * len(self.centres[0]) * math.log(2 * math.pi))


two_modes = Modes((0.65, 0.35), ([-0.5], [0.55]), (0.15, 0.15))
three_modes = Modes((0.5, 0.3, 0.2), ([-0.6, -0.5], [0.6, -0.3], [0.0, 0.6]), (0.13, 0.13, 0.13))
three_narrow_modes = Modes((0.5, 0.3, 0.2), ([-0.6], [0.0], [0.7]), (0.05, 0.05, 0.05))
three_widths = Modes((0.3, 0.3, 0.4), ([-0.75], [-0.3], [0.4]), (0.05, 0.15, 0.5))
three_widths_2d = Modes((0.3, 0.3, 0.4), ([-0.6, 0.5], [-0.4, -0.5], [0.4, 0.1]), (0.05, 0.15, 0.5))
# 6 standard deviations apart
two_distant_modes = Modes((0.6, 0.4), ([-0.45], [0.45]), (0.15, 0.15))


def four_modes(action_dim: int) -> Modes:
    """Four equal modes, each at -0.5 or 0.5 in every dimension, and apart from each other in half of them."""
    i = np.arange(action_dim)
    signs = (i >= 0, i % 2 == 0, i // 2 % 2 == 0, (i + i // 2) % 2 == 0)
    return Modes((0.25,) * 4, [np.where(plus, 0.5, -0.5).tolist() for plus in signs], (0.25,) * 4)


def ring(_: float, a: np.ndarray) -> np.ndarray:
    return -((np.linalg.norm(a, axis=-1) - 0.6) ** 2) / (2 * 0.15**2)


def rising(_: float, a: np.ndarray) -> np.ndarray:
    """Highest in a corner of the box: where a wrong tanh correction shows."""
    return 2.0 * a[..., 0] + a[..., 1]


def conditional(observation: float, a: np.ndarray) -> np.ndarray:
    return two_modes(observation, a) if observation > 0 else Modes((1.0,), ([0.2],), (0.2,))(observation, a)


def turning(observation: float, a: np.ndarray) -> np.ndarray:
    """Two modes opposite each other, whose direction depends on the observation."""
    x, y = 0.5 * math.cos(2 * observation), 0.5 * math.sin(2 * observation)
    return Modes((0.6, 0.4), ([x, y], [-x, -y]), (0.15, 0.15))(observation, a)


def shifted(_: float, a: np.ndarray) -> np.ndarray:
    """Two modes in a box of bounds (-1, 4)."""
    return Modes((0.4, 0.6), ([0.0], [2.8]), (0.4, 0.4))(_, a)


def _square(reward_fn: RewardFn, **kwargs: Any) -> Bandit:
    return Bandit(reward_fn, (-1, -1), (1, 1), **kwargs)


CASES: dict[str, Callable[[], Bandit]] = {
    "two_modes": lambda: Bandit(two_modes),
    "three_modes": lambda: _square(three_modes),
    "ring": lambda: _square(ring),
    "rising": lambda: _square(rising),
    "conditional": lambda: Bandit(conditional, observations=(-1.0, 1.0)),
    "asymmetric_bounds": lambda: Bandit(shifted, (-1,), (4,)),
    "three_narrow_modes": lambda: Bandit(three_narrow_modes),
    "three_widths": lambda: Bandit(three_widths),
    "three_widths_2d": lambda: _square(three_widths_2d),
    "two_distant_modes": lambda: Bandit(two_distant_modes),
    "turning": lambda: _square(turning, observations=(-1.0, -0.5, 0.0, 0.5, 1.0)),
}
# Where no grid fits, the modes' shares are compared
FOUR_MODES: dict[str, Callable[[], Bandit]] = {
    f"four_modes_{d}d": lambda d=d: Bandit(four_modes(d), (-1,) * d, (1,) * d)  # type: ignore[misc]
    for d in (4, 6, 8, 12)
}
# Of a training that takes half a minute, with ent_coef=1.0
SHORT_TRAINING: dict[str, Any] = dict(
    learning_starts=500,
    buffer_size=10_000,
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


def errors(env: Bandit, model: SoftQ | SAC, n_samples: int = 20_000) -> dict[str, float]:
    """
    How far a trained agent is from the Boltzmann distribution of its reward at temperature 1.

    :param env: One of ``CASES`` or ``FOUR_MODES``
    :param model: The agent
    :param n_samples: Number of actions per observation
    :return: ``"total_variation"``, or where there are more than two dimensions ``"share"``, the largest error of a mode's
        share, and ``"soft_value"``, the error of the soft value (NaN if the agent has none); each the worst of the
        observations
    """
    found: dict[str, list[float]] = {"total_variation": [], "share": [], "soft_value": []}
    for observation in env.observations:
        obs = np.array([[observation]], dtype=np.float32)
        if isinstance(model, SoftQ):
            actions = model.sample_actions(obs, n_samples)[0]
        else:
            actions = model.predict(obs.repeat(n_samples, axis=0))[0]
        if env.action_space.shape[0] > 2:
            assert isinstance(env.reward_fn, Modes)
            masses, log_z = env.reward_fn.masses(), env.reward_fn.log_z()
            shares = np.bincount(env.reward_fn.nearest(actions), minlength=len(masses)) / n_samples
            found["share"].append(np.abs(shares - masses / masses.sum()).max())
        else:
            log_z = boltzmann(env, observation, 1.0)[1]
            found["total_variation"].append(total_variation(env, observation, 1.0, actions))
        found["soft_value"].append(float(model.soft_value(obs)[0]) - log_z if isinstance(model, SoftQ) else math.nan)
    return {name: max(values, key=abs) for name, values in found.items() if values}
