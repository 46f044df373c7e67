"""
Composed skills: one agent slides a puck to x = -1, another to y = -1, and their sum, without new data, to (-1, -1).

    python examples/pusher.py             # examples/results/pusher.png, pusher.csv
"""

import argparse
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from finished import table

from sb3_softq import SoftQ
from sb3_softq.composition import compose
from sb3_softq.envs.pusher import Pusher2DEnv
from sb3_softq.plots import new_figure
from sb3_softq.rollouts import roll_out

OUT = Path(__file__).parent / "results" / "pusher.png"
SETTINGS: dict[str, Any] = dict(
    ent_coef=0.05,
    learning_rate=1e-3,
    batch_size=128,
    tau=0.02,
    gamma=0.98,
    policy_kwargs=dict(net_arch=[128, 128], batch_norm=False),
    device="cpu",
)
# Nothing is explored any more
COLDER = 0.02
GOALS = {"x = -1": (-1.0, None), "y = -1": (None, -1.0), "both": (-1.0, -1.0)}
EPISODES, LENGTH = 50, 60
# Positions of the puck and of the arm
Episode = tuple[np.ndarray, np.ndarray]


def train(steps: int, goal: tuple[float | None, float | None], settings: dict[str, Any]) -> SoftQ:
    env = gym.make("sb3_softq/Pusher2D-v0", goal_x=goal[0], goal_y=goal[1])
    return SoftQ("MlpPolicy", env, **settings).learn(steps)


def play(agent: SoftQ) -> list[Episode]:
    """
    :return: Of each episode the positions of the puck, shape (LENGTH + 1, 2), and of the arm, shape (LENGTH + 1, 4, 2)
    """
    envs = [Pusher2DEnv(*GOALS["both"]) for _ in range(EPISODES)]
    episodes = roll_out(agent, envs, deterministic=True, seed=1000, max_steps=LENGTH, record=lambda env: (env.puck, env.arm()))
    return [(np.stack(pucks), np.stack(arms)) for pucks, arms in (zip(*e.records, strict=True) for e in episodes)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=25_000, help="of each agent")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="the figure shows the first")
    parser.add_argument("--compile", action="store_true", help="faster, the same numbers but for rounding")
    parser.add_argument("--out", type=Path, default=OUT, help="file of the figure; the numbers are in a .csv beside it")
    args = parser.parse_args()
    header = ["seed", "agent", "mean_distance", "median_distance"]
    with table(args.out.with_suffix(".csv"), header) as write:
        for seed in args.seeds:
            settings = SETTINGS | dict(buffer_size=args.steps, seed=seed, compile=args.compile)
            x, y, scratch = (train(args.steps, goal, settings) for goal in GOALS.values())
            agents = {
                "x = -1": x,
                "y = -1": y,
                "composed": compose([x, y], gradient_steps=max(args.steps * 2 // 5, 1), ent_coef=COLDER, compile=args.compile),
                "from scratch": scratch,
            }
            episodes = {name: play(agent) for name, agent in agents.items()}
            for name in agents:
                values = final_distances(episodes[name])
                print(
                    f"seed {seed}, {name}: puck {values.mean():.2f} m from (-1, -1), median {np.median(values):.2f}",
                    flush=True,
                )
                write([seed, name, f"{values.mean():.4f}", f"{np.median(values):.4f}"])
            if seed == args.seeds[0]:
                draw(episodes, args.out)
    print(args.out)


def final_distances(episodes: list[Episode]) -> np.ndarray:
    """
    :return: Distances of the puck to (-1, -1) in metres at the end of each episode
    """
    return np.array([np.linalg.norm(pucks[-1] - GOALS["both"]) for pucks, _ in episodes])


def draw(episodes: dict[str, list[Episode]], out: Path) -> None:
    figure, axes = new_figure(14.0, 4.0, n_columns=4)
    for ax, (name, of_agent) in zip(axes, episodes.items(), strict=True):
        ends = np.stack([pucks[-1] for pucks, _ in of_agent])
        ax.plot(*ends.T, "k.", markersize=3, zorder=5, label=f"end of {EPISODES} episodes")
        ax.legend(loc="upper left", fontsize=8)
        Pusher2DEnv(*GOALS.get(name, GOALS["both"])).draw(ax, *of_agent[0])
        ax.set_title(f"{name}: {final_distances(of_agent).mean():.2f} m from (-1, -1)")
    figure.tight_layout()
    figure.savefig(out)


if __name__ == "__main__":
    main()
