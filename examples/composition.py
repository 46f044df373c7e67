"""
Two agents, composed without new data: one knows the goals right and up, the other right and down; together they go right.

    python examples/composition.py        # examples/results/composition.png
"""

import argparse
from pathlib import Path

import gymnasium as gym
import numpy as np

from sb3_softq import SoftQ
from sb3_softq.composition import compose
from sb3_softq.envs import MultiGoalEnv
from sb3_softq.envs.multi_goal import roll_out
from sb3_softq.plots import draw_multi_goal, new_figure

OUT = Path(__file__).parent / "results" / "composition.png"
RIGHT, UP, DOWN = (5.0, 0.0), (0.0, 5.0), (0.0, -5.0)


def train(goals: list[tuple[float, float]], steps: int, seed: int) -> SoftQ:
    env = gym.make("sb3_softq/MultiGoal-v0", goals=goals)
    settings = dict(ent_coef=10.0, learning_rate=1e-3, batch_size=64, buffer_size=100_000, tau=0.01)
    return SoftQ("MlpPolicy", env, **settings, seed=seed, device="cpu").learn(steps)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT, help="file of the figure")
    args = parser.parse_args()

    up, down = (train([RIGHT, goal], args.steps, args.seed) for goal in (UP, DOWN))
    both = compose([up, down], gradient_steps=max(args.steps // 3, 1))

    figure, axes = new_figure(12.0, 4.2, n_columns=3)
    env = MultiGoalEnv([RIGHT, UP, DOWN])
    for ax, (name, agent) in zip(axes, {"right or up": up, "right or down": down, "composed": both}.items(), strict=True):
        paths, goals = roll_out(agent, env, 100)
        shares = [float(np.mean(goals == i)) for i in range(3)]
        print(f"{name}: right {shares[0]:.0%}, up {shares[1]:.0%}, down {shares[2]:.0%} of 100 rollouts")
        draw_multi_goal(ax, env, paths[:50], alpha=0.6)
        ax.set_title(name)
    figure.tight_layout()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
