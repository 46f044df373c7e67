"""
One picture of the difference: a one-step task with three good ways of acting, of which a Gaussian actor can hold one.

    python examples/modes.py
"""

import argparse
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from benchmark.bandits import CASES, total_variation
from stable_baselines3 import SAC

from sb3_softq import SoftQ

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("examples/results/modes.png"))
    args = parser.parse_args()

    kwargs: dict[str, Any] = dict(
        learning_rate=1e-3, learning_starts=500, ent_coef=1.0, train_freq=8, gradient_steps=8, seed=args.seed
    )
    env = CASES["three_modes"]()
    softq = SoftQ("MlpPolicy", env, **kwargs).learn(args.steps)
    sac = SAC("MlpPolicy", env, **kwargs).learn(args.steps)
    obs = np.zeros((20_000, 1), dtype=np.float32)
    samples = {"SoftQ": softq.sample_actions(obs[0], 20_000), "SAC": sac.predict(obs)[0]}

    axis = np.linspace(-1, 1, 200)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1)
    fig, axes = plt.subplots(1, 3, figsize=(11, 4), sharex=True, sharey=True, layout="constrained")
    axes[0].contourf(axis, axis, np.exp(env.reward_fn(0.0, grid)), levels=12, cmap="Blues")
    axes[0].set_title("to be learned: exp(reward / alpha) / Z")
    for ax, (name, actions) in zip(axes[1:], samples.items(), strict=True):
        distance = total_variation(env, 0.0, 1.0, actions)
        print(f"{name}: total variation to the Boltzmann distribution {distance:.2f}")
        ax.contour(axis, axis, np.exp(env.reward_fn(0.0, grid)), levels=4, colors="0.6", linewidths=0.8)
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
