"""
One picture of the difference: a one-step task with three good ways of acting, of which a Gaussian actor can hold one.

    python examples/modes.py
"""

import argparse
from pathlib import Path
from typing import Any

import gymnasium as gym
import matplotlib
import numpy as np
from gymnasium import spaces
from stable_baselines3 import SAC

from sb3_softq import SoftQ

matplotlib.use("Agg")
import matplotlib.pyplot as plt

WEIGHTS, CENTRES, WIDTH = (0.5, 0.3, 0.2), ((-0.6, -0.5), (0.6, -0.3), (0.0, 0.6)), 0.13
ALPHA = 1.0


def reward(actions: np.ndarray) -> np.ndarray:
    """Log of a Gaussian mixture, so that the Boltzmann distribution of temperature 1 is that mixture."""
    components = [
        np.log(weight / (2 * np.pi * WIDTH**2)) - ((actions - np.array(centre)) ** 2).sum(axis=-1) / (2 * WIDTH**2)
        for weight, centre in zip(WEIGHTS, CENTRES, strict=True)
    ]
    return np.logaddexp.reduce(components)


class ThreeWays(gym.Env):
    """One step: act in (-1, 1)^2 and be paid ``reward(action)``."""

    observation_space = spaces.Box(-1.0, 1.0, (1,), dtype=np.float32)
    action_space = spaces.Box(-1.0, 1.0, (2,), dtype=np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        return np.zeros(1, dtype=np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        return np.zeros(1, dtype=np.float32), float(reward(np.asarray(action, dtype=np.float64))), True, False, {}


def total_variation(actions: np.ndarray, n_bins: int = 20) -> float:
    """Between the samples' histogram and the Boltzmann distribution: 0 where they agree, 1 where they share nothing."""
    edges = np.linspace(-1, 1, n_bins + 1)
    fine = -1 + (np.arange(8 * n_bins) + 0.5) / (4 * n_bins)
    density = np.exp(reward(np.stack(np.meshgrid(fine, fine, indexing="ij"), axis=-1)) / ALPHA)
    density = density.reshape(n_bins, 8, n_bins, 8).sum(axis=(1, 3))
    counts = np.histogramdd(actions, bins=[edges, edges])[0]
    return float(0.5 * np.abs(counts / counts.sum() - density / density.sum()).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("examples/results/modes.png"))
    args = parser.parse_args()

    kwargs: dict[str, Any] = dict(
        learning_rate=1e-3, learning_starts=500, ent_coef=ALPHA, train_freq=8, gradient_steps=8, seed=args.seed
    )
    softq = SoftQ("MlpPolicy", ThreeWays(), n_actor_particles=16, **kwargs).learn(args.steps)
    sac = SAC("MlpPolicy", ThreeWays(), **kwargs).learn(args.steps)
    obs = np.zeros((20_000, 1), dtype=np.float32)
    samples = {"SoftQ": softq.sample_actions(obs[0], 20_000), "SAC": sac.predict(obs)[0]}

    axis = np.linspace(-1, 1, 200)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1)
    fig, axes = plt.subplots(1, 3, figsize=(11, 4), sharex=True, sharey=True, layout="constrained")
    axes[0].contourf(axis, axis, np.exp(reward(grid) / ALPHA), levels=12, cmap="Blues")
    axes[0].set_title("what is to be learned: exp(reward / alpha)")
    for ax, (name, actions) in zip(axes[1:], samples.items(), strict=True):
        distance = total_variation(actions)
        print(f"{name}: total variation to the Boltzmann distribution {distance:.2f}")
        ax.contour(axis, axis, np.exp(reward(grid) / ALPHA), levels=4, colors="0.6", linewidths=0.8)
        ax.scatter(*actions[:1500].T, s=4, alpha=0.5, color="C0" if name == "SoftQ" else "C3")
        ax.set_title(f"actions of {name} (total variation {distance:.2f})")
    for ax in axes:
        ax.set(xlim=(-1, 1), ylim=(-1, 1), xlabel="action 1", aspect="equal")
    axes[0].set_ylabel("action 2")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(args.out, dpi=90)
    print(f"Figure: {args.out}")


if __name__ == "__main__":
    main()
