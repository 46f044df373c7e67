"""
Four goals, all equally good: SoftQ goes to all of them, SAC at the same temperature to fewer.

    python examples/multi_goal.py         # examples/results/multi_goal.png

``--frames FOLDER`` also saves frames and an animation of SoftQ's training.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3 import SAC
from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_softq import SoftQ
from sb3_softq.callbacks import PlotCallback
from sb3_softq.envs import MultiGoalEnv
from sb3_softq.envs.multi_goal import roll_out
from sb3_softq.plots import draw_multi_goal, new_figure, plot_level_curves

OUT = Path(__file__).parent / "results" / "multi_goal.png"
ENV = "sb3_softq/MultiGoal-v0"
SETTINGS: dict[str, Any] = dict(ent_coef=10.0, learning_rate=1e-3, batch_size=64, buffer_size=100_000, tau=0.01)
STATES = ((0.0, 0.0), (2.5, 2.5), (-2.5, 0.0))
# In the way to a goal, from the centre
WALLS = ((2.5, -2.0, 3.5, 2.0), (-3.5, -2.0, -2.5, 2.0), (-2.0, 2.5, 2.0, 3.5), (-2.0, -3.5, 2.0, -2.5))


def goal_counts(model: BaseAlgorithm, env: MultiGoalEnv, n_rollouts: int = 200) -> np.ndarray:
    goals = roll_out(model, env, n_rollouts)[1]
    return np.bincount(goals[goals >= 0], minlength=len(env.goals))


def draw(model: BaseAlgorithm) -> Any:
    """Rollouts from the centre, as a figure."""
    figure, axes = new_figure(4.0, 4.0)
    env = MultiGoalEnv()
    draw_multi_goal(axes, env, roll_out(model, env, 40)[0], alpha=0.6)
    axes.set_title(f"{model.num_timesteps} steps")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT, help="file of the figure")
    parser.add_argument("--frames", type=Path, help="folder for frames and an animation")
    args = parser.parse_args()

    callback = PlotCallback(draw, args.frames, max(args.steps // 20, 1)) if args.frames else None
    softq = SoftQ("MlpPolicy", ENV, **SETTINGS, seed=args.seed, device="cpu").learn(args.steps, callback)
    sac = SAC("MlpPolicy", ENV, **SETTINGS, seed=args.seed, device="cpu").learn(args.steps)

    figure, axes = new_figure(12.0, 8.0, n_rows=2, n_columns=3)
    for column, (name, model) in enumerate((("SoftQ", softq), ("SAC", sac))):
        env = MultiGoalEnv()
        counts = goal_counts(model, env)
        blocked = MultiGoalEnv(obstacles=[WALLS[int(counts.argmax())]])
        success = goal_counts(model, blocked).sum() / 200
        print(f"{name}: goals of 200 rollouts {counts.tolist()}, with a wall before the favourite {success:.0%} succeed")
        draw_multi_goal(axes[0, column], env, roll_out(model, env, 60)[0], alpha=0.6)
        axes[0, column].set_title(f"{name}: rollouts from the centre", fontsize=10)
        if name == "SoftQ":
            draw_multi_goal(axes[0, 2], blocked, roll_out(model, blocked, 60)[0], alpha=0.6)
            axes[0, 2].set_title("SoftQ: a wall that was not there in training", fontsize=10)
    for ax, state in zip(axes[1], STATES, strict=True):
        plot_level_curves(ax, softq, np.array(state, dtype=np.float32))
        ax.set_title(f"Q(s, ·) at s = {state}, samples of the policy", fontsize=10)
        ax.set(xlabel="action x", ylabel="action y")
    figure.tight_layout()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
