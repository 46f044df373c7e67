"""
Two agents, composed without new data: one knows the goals right and up, the other right and down; together they go right.

    python examples/composition.py        # examples/results/composition.png, composition.csv
"""

import argparse
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from finished import table

from sb3_softq import SoftQ
from sb3_softq.composition import compose
from sb3_softq.envs import MultiGoalEnv
from sb3_softq.envs.multi_goal import roll_out
from sb3_softq.plots import new_figure

OUT = Path(__file__).parent / "results" / "composition.png"
RIGHT, UP, DOWN = (5.0, 0.0), (0.0, 5.0), (0.0, -5.0)


def train(goals: list[tuple[float, float]], steps: int, seed: int) -> SoftQ:
    env = gym.make("sb3_softq/MultiGoal-v0", goals=goals)
    settings: dict[str, Any] = dict(ent_coef=10.0, learning_rate=1e-3, batch_size=64, buffer_size=100_000, tau=0.01)
    settings |= dict(policy_kwargs=dict(batch_norm=False), seed=seed, device="cpu")
    return SoftQ("MlpPolicy", env, **settings).learn(steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="the figure shows the first")
    parser.add_argument("--out", type=Path, default=OUT, help="file of the figure; the numbers are in a .csv beside it")
    args = parser.parse_args()
    env = MultiGoalEnv([RIGHT, UP, DOWN])
    with table(args.out.with_suffix(".csv"), ["seed", "agent", "right", "up", "down"]) as write:
        for seed in args.seeds:
            up, down = (train([RIGHT, goal], args.steps, seed) for goal in (UP, DOWN))
            both = compose([up, down], gradient_steps=max(args.steps // 3, 1))
            agents = {"right or up": up, "right or down": down, "composed": both}
            rollouts = {name: roll_out(agent, env, 100) for name, agent in agents.items()}
            for name, (_, goals) in rollouts.items():
                shares = [float(np.mean(goals == i)) for i in range(3)]
                print(f"seed {seed}, {name}: right {shares[0]:.0%}, up {shares[1]:.0%}, down {shares[2]:.0%} of 100 rollouts")
                write([seed, name, *shares])
            if seed == args.seeds[0]:
                draw(env, {name: paths for name, (paths, _) in rollouts.items()}, args.out)
    print(args.out)


def draw(env: MultiGoalEnv, paths: dict[str, list[np.ndarray]], out: Path) -> None:
    figure, axes = new_figure(12.0, 4.2, n_columns=3)
    for ax, (name, some) in zip(axes, paths.items(), strict=True):
        env.draw(ax, some[:50], alpha=0.6)
        ax.set_title(name)
    figure.tight_layout()
    figure.savefig(out)


if __name__ == "__main__":
    main()
