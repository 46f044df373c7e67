"""
Pre-train a half-cheetah to run in any direction, then go on to one direction from those weights, colder and colder.

    python examples/fine_tuning.py        # examples/results/fine_tuning.png, fine_tuning.csv
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from cooling import Cooling
from finished import table
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.utils import LinearSchedule

from sb3_softq import SoftQ
from sb3_softq.plots import new_figure

OUT = Path(__file__).parent / "results" / "fine_tuning.png"
ALGORITHMS: dict[str, Any] = {"SoftQ": SoftQ, "SAC": SAC}
ENT_COEF = 0.05
SETTINGS: dict[str, Any] = dict(ent_coef=ENT_COEF, gamma=0.97, buffer_size=100_000, device="cpu")
# From the temperature of pre-training to a tenth of it
ANNEALED = LinearSchedule(ENT_COEF, 0.1 * ENT_COEF, 1.0)
FASTEST = 2.0


class Running(gym.Wrapper):
    """
    Half-cheetah that is to run in any direction, at up to ``FASTEST`` metres a second so that one is as good as the other, or
    as fast as it can in one.

    :param direction: 1 forwards, -1 backwards, None either
    """

    def __init__(self, direction: int | None = None):
        super().__init__(gym.make("HalfCheetah-v5"))
        self.direction = direction

    def step(self, action: Any) -> Any:
        obs, _, terminated, truncated, info = super().step(action)
        velocity = info["x_velocity"]
        speed = min(abs(velocity), FASTEST) if self.direction is None else self.direction * velocity
        return obs, float(speed + info["reward_ctrl"]), terminated, truncated, info


class Curve(BaseCallback):
    """
    Mean return of 2 episodes every so many steps.

    :param direction: Of the environment
    :param every: Number of steps
    """

    def __init__(self, direction: int, every: int):
        super().__init__()
        self.env, self.every = Monitor(Running(direction)), every
        self.points: list[tuple[int, float]] = []

    def _on_step(self) -> bool:
        if self.num_timesteps % self.every == 0:
            self.env.reset(seed=1000)
            self.points.append((self.num_timesteps, float(np.mean(evaluate_policy(self.model, self.env, 2)[0]))))
        return True


def fine_tune(
    cls: Any, start: Path | None, direction: int, steps: int, every: int, settings: dict[str, Any]
) -> list[tuple[int, float]]:
    env, curve = Running(direction), Curve(direction, every)
    if cls is SoftQ:
        settings = settings | dict(ent_coef=ANNEALED)
    model = cls("MlpPolicy", env, **settings) if start is None else cls.load(start, env, **settings)
    model.learn(steps, [Cooling(ANNEALED), curve])
    return curve.points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=25_000, help="of pre-training")
    parser.add_argument("--more-steps", type=int, default=10_000, help="of fine-tuning")
    parser.add_argument("--eval-freq", type=int, default=1250, help="in fine-tuning")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--compile", action="store_true", help="SoftQ compiled: faster, the same numbers but for rounding")
    parser.add_argument("--out", type=Path, default=OUT, help="file of the figure; the numbers are in a .csv beside it")
    args = parser.parse_args()
    if args.more_steps < args.eval_freq:
        parser.error(f"--more-steps {args.more_steps} has no evaluation: it must be at least --eval-freq {args.eval_freq}")
    header = ["agent", "direction", "seed", "step", "return"]
    curves: list[tuple[str, list[tuple[int, float]]]] = []
    with table(args.out.with_suffix(".csv"), header) as write, tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            settings = {name: SETTINGS | dict(seed=seed) for name in ALGORITHMS}
            settings["SoftQ"] |= dict(compile=args.compile, learning_rate=3e-4, tau=0.02, policy_kwargs=dict(batch_norm=False))
            starts: dict[str, tuple[str, Path | None]] = {"SoftQ from scratch": ("SoftQ", None)}
            for name, cls in ALGORITHMS.items():
                path = Path(folder) / name
                cls("MlpPolicy", Running(), **settings[name]).learn(args.steps).save(path)
                starts[f"{name} pre-trained"] = name, path
            for label, (name, start) in starts.items():
                for direction in (1, -1):
                    points = fine_tune(ALGORITHMS[name], start, direction, args.more_steps, args.eval_freq, settings[name])
                    print(
                        f"seed {seed}, {label}, {'forwards' if direction > 0 else 'backwards'}: {points[-1][1]:.0f}",
                        flush=True,
                    )
                    for step, value in points:
                        write([label, direction, seed, step, f"{value:.1f}"])
                    curves.append((label, points))
    draw(curves, args.out)
    print(args.out)


def draw(curves: list[tuple[str, list[tuple[int, float]]]], out: Path) -> None:
    """Both directions of each seed, and their mean."""
    figure, axes = new_figure(10.0, 4.5)
    colours = {"SoftQ pre-trained": "tab:blue", "SAC pre-trained": "tab:orange", "SoftQ from scratch": "0.5"}
    for label, colour in colours.items():
        runs = np.array([points for name, points in curves if name == label])  # (n_runs, n_evaluations, 2)
        for points in runs:
            axes.plot(*points.T, color=colour, alpha=0.3, linewidth=1)
        axes.plot(*runs.mean(axis=0).T, "o-", color=colour, linewidth=2, label=f"{label}, mean of {len(runs)} runs")
    axes.set(xlabel="steps of fine-tuning", ylabel="return", title="Half-cheetah: forwards or backwards, after either")
    # beside the curves, some of which are everywhere
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.tight_layout()
    figure.savefig(out)


if __name__ == "__main__":
    main()
