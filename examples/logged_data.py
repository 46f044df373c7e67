"""
What logged data are worth: steps to a return of 4,000 on HalfCheetah-v5 from scratch, and with data of another agent.

    python examples/logged_data.py        # examples/results/logged_data.png, logged_data.csv

The data are all that a first agent saw until it was that good: of random actions, falls and medium quality. A second one, of
another seed, learns from them alone at first, then goes on in the environment with half of each minibatch from the data.
"""

import argparse
from pathlib import Path

import numpy as np
import torch as th
from finished import table
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_softq import SoftQ
from sb3_softq.data import from_agent
from sb3_softq.plots import new_figure

OUT = Path(__file__).parent / "results" / "logged_data.png"


class UntilReturn(BaseCallback):
    """
    Mean return of 5 episodes every so many steps, until it is as high as asked for.

    :param env_id: Environment
    :param enough: Return
    :param every: Number of steps
    """

    def __init__(self, env_id: str, enough: float, every: int):
        super().__init__()
        self.env, self.enough, self.every = make_vec_env(env_id, n_envs=5, seed=5000), enough, every
        self.points: list[tuple[int, float]] = []

    def _on_training_start(self) -> None:
        self._evaluate()

    def _on_step(self) -> bool:
        if self.num_timesteps % self.every == 0:
            self._evaluate()
        return self.points[-1][1] < self.enough

    def _evaluate(self) -> None:
        self.env.seed(5000)
        self.points.append((self.num_timesteps, float(np.mean(evaluate_policy(self.model, self.env, 5)[0]))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="HalfCheetah-v5")
    parser.add_argument("--enough", type=float, default=4_000.0, metavar="RETURN")
    parser.add_argument("--steps", type=int, default=40_000, help="at most")
    parser.add_argument("--updates", type=int, default=5_000, help="from the data alone")
    parser.add_argument("--eval-freq", type=int, default=1_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--compile", action="store_true", help="SoftQ compiled: faster, the same numbers but for rounding")
    parser.add_argument("--out", type=Path, default=OUT, help="file of the figure; the numbers are in a .csv beside it")
    args = parser.parse_args()
    th.set_num_threads(1)

    curves: list[tuple[str, int, list[tuple[int, float]]]] = []
    with table(args.out.with_suffix(".csv"), ["agent", "seed", "step", "return"]) as write:
        for seed in args.seeds:
            kwargs = dict(buffer_size=args.steps, compile=args.compile, device="cpu")
            first = SoftQ("MlpPolicy", args.env, learning_starts=2_000, seed=seed, **kwargs)
            # the data are there: no random steps are needed
            second = SoftQ("MlpPolicy", args.env, learning_starts=0, seed=seed + 1000, **kwargs)
            for name, agent in (("from scratch", first), ("with data", second)):
                if agent is second:
                    second.set_data(from_agent(first)).pretrain(args.updates)
                callback = UntilReturn(args.env, args.enough, args.eval_freq)
                agent.learn(args.steps, callback)
                curves.append((name, seed, callback.points))
                for step, value in callback.points:
                    write([name, seed, step, f"{value:.1f}"])
                step, value = callback.points[-1]
                print(f"seed {seed}, {name}: {value:.0f} after {step} steps, {callback.points[0][1]:.0f} before", flush=True)
    draw(curves, args.out)
    print(args.out)


def draw(curves: list[tuple[str, int, list[tuple[int, float]]]], out: Path) -> None:
    """A line for each agent and seed, up to the return that was asked for."""
    figure, axes = new_figure(6.0, 4.0)
    colours = {"from scratch": "0.5", "with data": "tab:blue"}
    for name, _, points in curves:
        axes.plot(*zip(*points, strict=True), "o-", color=colours[name], alpha=0.7, markersize=3)
    for name, colour in colours.items():
        steps = [points[-1][0] for label, _, points in curves if label == name]
        axes.plot([], [], color=colour, label=f"{name}: {np.mean(steps):,.0f} steps, mean of {len(steps)}")
    axes.set(xlabel="steps", ylabel="return")
    axes.legend()
    figure.tight_layout()
    figure.savefig(out)


if __name__ == "__main__":
    main()
