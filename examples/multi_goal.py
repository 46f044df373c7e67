"""
Four goals, all equally good: SoftQ goes to all of them, SAC at the same temperature to fewer.

    python examples/multi_goal.py         # examples/results/multi_goal.png, multi_goal.csv

``--frames FOLDER`` also saves frames and an animation of SoftQ's training.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from finished import table
from stable_baselines3 import SAC
from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_softq import SoftQ
from sb3_softq.callbacks import PlotCallback
from sb3_softq.envs import MultiGoalEnv
from sb3_softq.envs.multi_goal import roll_out
from sb3_softq.plots import new_figure, plot_level_curves

OUT = Path(__file__).parent / "results" / "multi_goal.png"
ENV = "sb3_softq/MultiGoal-v0"
# The defaults, but for the paper's temperature, and batches that take half of the time
SETTINGS: dict[str, Any] = dict(ent_coef=10.0, batch_size=64, buffer_size=100_000, device="cpu")
# as fast as SoftQ begins, and its target networks after it
OF_SAC: dict[str, Any] = dict(learning_rate=1e-3, tau=0.01)
STATES = ((0.0, 0.0), (2.5, 2.5), (-2.5, 0.0))
# In the way to a goal, from the centre
WALLS = ((2.5, -2.0, 3.5, 2.0), (-3.5, -2.0, -2.5, 2.0), (-2.0, 2.5, 2.0, 3.5), (-2.0, -3.5, 2.0, -2.5))


def goal_counts(model: BaseAlgorithm, env: MultiGoalEnv, n_rollouts: int = 200) -> np.ndarray:
    goals = roll_out(model, env, n_rollouts)[1]
    return np.bincount(goals[goals >= 0], minlength=len(env.goals))


def draw_rollouts(model: BaseAlgorithm) -> Any:
    """Rollouts from the centre, as a figure."""
    figure, axes = new_figure(4.0, 4.0)
    env = MultiGoalEnv()
    env.draw(axes, roll_out(model, env, 40)[0], alpha=0.6)
    axes.set_title(f"{model.num_timesteps} steps")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="the figure shows the first")
    parser.add_argument("--out", type=Path, default=OUT, help="file of the figure; the numbers are in a .csv beside it")
    parser.add_argument("--frames", type=Path, help="folder for frames and an animation of the first seed")
    args = parser.parse_args()
    header = ["seed", "algo", "right", "left", "up", "down", "success_with_wall"]
    with table(args.out.with_suffix(".csv"), header) as write:
        for seed in args.seeds:
            first = seed == args.seeds[0]
            callback = PlotCallback(draw_rollouts, args.frames, max(args.steps // 20, 1)) if first and args.frames else None
            softq = SoftQ("MlpPolicy", ENV, **SETTINGS, seed=seed).learn(args.steps, callback)
            sac = SAC("MlpPolicy", ENV, **SETTINGS, **OF_SAC, seed=seed).learn(args.steps)
            for name, model in (("SoftQ", softq), ("SAC", sac)):
                counts = goal_counts(model, MultiGoalEnv())
                success = goal_counts(model, behind_wall(counts)).sum() / 200
                print(
                    f"seed {seed}, {name}: goals of 200 rollouts {counts.tolist()}, {success:.0%} with a wall before the first"
                )
                write([seed, name, *counts, success])
            if first:
                draw(softq, sac, args.out)
    print(args.out)


def behind_wall(counts: np.ndarray) -> MultiGoalEnv:
    """A wall before the favourite goal, which was not there in training."""
    return MultiGoalEnv(obstacles=[WALLS[int(counts.argmax())]])


def draw(softq: SoftQ, sac: SAC, out: Path) -> None:
    figure, axes = new_figure(12.0, 8.0, n_rows=2, n_columns=3)
    env = MultiGoalEnv()
    for ax, title, model, where in (
        (axes[0, 0], "SoftQ: rollouts from the centre", softq, env),
        (axes[0, 1], "SAC: rollouts from the centre", sac, env),
        (axes[0, 2], "SoftQ: a wall that was not there in training", softq, behind_wall(goal_counts(softq, env))),
    ):
        where.draw(ax, roll_out(model, where, 60)[0], alpha=0.6)
        ax.set_title(title, fontsize=10)
    for ax, state in zip(axes[1], STATES, strict=True):
        plot_level_curves(ax, softq, np.array(state, dtype=np.float32))
        ax.set_title(f"Q(s, ·) at s = {state}, samples of the policy", fontsize=10)
        ax.set(xlabel="action x", ylabel="action y")
    figure.tight_layout()
    figure.savefig(out)


if __name__ == "__main__":
    main()
