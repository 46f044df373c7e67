"""
A point mass and two equally long ways to a goal: does one policy take both, and what if a wall blocks its favourite?

    pip install -e ".[extra,benchmark,robotics]"
    python examples/two_routes.py         # examples/results/two_routes.png, two_routes.csv

The maze is a ring (Gymnasium-Robotics' PointMaze with a map of its own), the reward minus the distance to the goal along the
corridors. Each agent is trained with both ways open, then asked for 100 stochastic episodes; then its more frequent way is
walled up, which it has not seen in training, and it is asked again, at once and after some more steps.
"""

import argparse
import csv
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from cooling import Cooling
from peers import ALGORITHMS, COLOURS
from ring_maze import Outcome, Ring, draw_paths, roll_out
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.utils import LinearSchedule

from sb3_softq import SoftQ
from sb3_softq.plots import new_figure

OUT = Path(__file__).parent / "results" / "two_routes.png"
# The same for all
SETTINGS: dict[str, Any] = dict(gamma=0.98, learning_starts=1_000, buffer_size=100_000, device="cpu")


def train(name: str, seed: int, args: argparse.Namespace) -> OffPolicyAlgorithm:
    """With both routes open, from hot, where either route is taken, to the temperature that is asked for."""
    cls, kwargs = ALGORITHMS[name]
    schedule = LinearSchedule(args.first_ent_coef, args.ent_coef, 0.5)
    if cls is SoftQ:
        kwargs = kwargs | dict(ent_coef=schedule, compile=args.compile)
    else:
        kwargs = kwargs | dict(ent_coef=args.ent_coef)
    return cls("MlpPolicy", Ring(), seed=seed, **SETTINGS | kwargs).learn(args.steps, Cooling(schedule))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algos", nargs="+", choices=list(ALGORITHMS), default=list(ALGORITHMS))
    parser.add_argument("--steps", type=int, default=20_000, help="of training")
    parser.add_argument("--more", type=int, default=5_000, help="further steps with the wall")
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--ent-coef", type=float, default=0.8, help="temperature from the half of training on")
    parser.add_argument("--first-ent-coef", type=float, default=1.0, help="temperature that training begins with")
    parser.add_argument("--compile", action="store_true", help="SoftQ compiled: faster, the same numbers but for rounding")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=OUT, help="file of the figure; the numbers are in a .csv beside it")
    args = parser.parse_args()
    th.set_num_threads(1)

    pictures: dict[str, tuple[Outcome, Outcome]] = {}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["seed", "algo", "up", "down", "blocked", "at_once", f"after_{args.more}"])
        for seed, name in itertools.product(args.seeds, args.algos):
            agent = train(name, seed, args)
            before = roll_out(agent, Ring(), args.episodes)
            walled = Ring(before.favourite)
            at_once = roll_out(agent, walled, args.episodes)
            # nothing remembered says that the wall can be passed
            agent.set_env(walled)
            assert agent.replay_buffer is not None
            agent.replay_buffer.reset()
            agent.learn(args.more, reset_num_timesteps=False)
            after = roll_out(agent, walled, args.episodes)
            row = [seed, name, before.up, before.down, before.favourite, at_once.up + at_once.down, after.up + after.down]
            print("seed {}, {}: up {}, down {}; {} blocked: {} at once, {} after more steps".format(*row), flush=True)
            writer.writerow(row)
            file.flush()
            pictures.setdefault(name, (before, at_once))
    draw(pictures, args.out)
    print(args.out)


def draw(pictures: dict[str, tuple[Outcome, Outcome]], out: Path) -> None:
    """Of each algorithm the paths of the first seed: both routes open, one blocked."""
    figure, axes = new_figure(3.2 * len(pictures), 5.0, len(pictures), 2)
    for column, (name, (before, at_once)) in zip(np.atleast_2d(axes.T), pictures.items(), strict=True):
        for ax, outcome, blocked in zip(column, (before, at_once), (None, before.favourite), strict=True):
            draw_paths(ax, outcome.paths, COLOURS[name], blocked)
            ax.set_title(f"{name}: {outcome.up} up, {outcome.down} down")
    figure.tight_layout()
    figure.savefig(out)


if __name__ == "__main__":
    main()
