"""
Composed skills: one agent slides a puck to x = -1, another to y = -1, and their sum, without new data, to (-1, -1).

    python examples/pusher.py             # examples/results/pusher.png
"""

import argparse
from pathlib import Path

import gymnasium as gym
import numpy as np
from stable_baselines3.common.callbacks import ProgressBarCallback

from sb3_softq import SoftQ
from sb3_softq.composition import compose
from sb3_softq.envs import Pusher2DEnv
from sb3_softq.plots import draw_pusher, new_figure

OUT = Path(__file__).parent / "results" / "pusher.png"
EPISODES = 50


def train(steps: int, seed: int, **goal: float) -> SoftQ:
    env = gym.make("sb3_softq/Pusher2D-v0", **goal)
    return SoftQ("MlpPolicy", env, ent_coef=ENT_COEF, buffer_size=steps, seed=seed, device="cpu").learn(steps, ProgressBarCallback())


def roll_out(agent: SoftQ, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """
    :return: Positions of the puck, shape (101, 2), and of the arm, shape (101, 4, 2)
    """
    env = Pusher2DEnv(goal_x=-1.0, goal_y=-1.0)
    obs, _ = env.reset(seed=seed)
    pucks, arms = [env.puck], [env.arm()]
    for _ in range(100):
        obs = env.step(agent.predict(obs, deterministic=True)[0])[0]
        pucks.append(env.puck)
        arms.append(env.arm())
    return np.stack(pucks), np.stack(arms)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS, help="of each agent")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT, help="file of the figure")
    args = parser.parse_args()

    parents = {"x = -1": train(args.steps, args.seed, goal_x=-1.0), "y = -1": train(args.steps, args.seed, goal_y=-1.0)}
    agents = parents | {
        "composed": compose(list(parents.values()), gradient_steps=max(args.steps // 3, 1)),
        "from scratch": train(args.steps, args.seed, goal_x=-1.0, goal_y=-1.0),
    }

    figure, axes = new_figure(14.0, 4.0, n_columns=4)
    for ax, (name, agent) in zip(axes, agents.items(), strict=True):
        ends = np.stack([roll_out(agent, 1000 + i)[0][-1] for i in range(EPISODES)])
        distances = np.linalg.norm(ends - [-1.0, -1.0], axis=1)
        print(f"{name}: puck at {ends.mean(axis=0).round(2)}, {distances.mean():.2f} m from (-1, -1), {EPISODES} episodes")
        goal = {"x = -1": (-1.0, None), "y = -1": (None, -1.0)}.get(name, (-1.0, -1.0))
        draw_pusher(ax, Pusher2DEnv(*goal), *roll_out(agent, 1000))
        ax.set_title(f"{name}: {distances.mean():.2f} m from (-1, -1)")
    figure.tight_layout()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
