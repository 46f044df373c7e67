"""
A point mass and two equally long ways to a goal: does one policy take both, and what if a wall blocks its favourite?

    pip install -e ".[extra,benchmark,robotics]"
    python examples/two_routes.py         # examples/results/two_routes.png, two_routes.csv

The maze is a ring (Gymnasium-Robotics' PointMaze with a map of its own), the reward minus the distance to the goal along the
corridors. Each agent is trained with both ways open, then asked for 100 stochastic episodes; then its more frequent way is
walled up, which it has not seen in training, and it is asked again, at once and after some more steps. What is finished lies
in --logs, so that a second call goes on; several calls at once take different --seeds or --algos.
"""

import argparse
import itertools
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from cooling import go_on, train
from finished import finished, table
from peers import COLOURS, parser_of
from ring_maze import Ring, draw_paths, roll_out

from sb3_softq.plots import new_figure

OUT = Path(__file__).parent / "results" / "two_routes.png"
# The same for all
SETTINGS: dict[str, Any] = dict(gamma=0.98, learning_starts=1_000, buffer_size=100_000, device="cpu")


def main() -> None:
    parser = parser_of(__doc__, OUT, [0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=20_000, help="of training")
    parser.add_argument("--more", type=int, default=5_000, help="further steps with the wall")
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--ent-coef", type=float, default=0.8, help="temperature from the half of training on")
    parser.add_argument("--first-ent-coef", type=float, default=1.0, help="temperature that training begins with")
    args = parser.parse_args()
    th.set_num_threads(1)

    results = {}
    for seed, name in itertools.product(args.seeds, args.algos):
        given = {key: getattr(args, key) for key in ("steps", "more", "episodes", "ent_coef", "first_ent_coef")}
        result = finished(args.logs / f"{name}_{seed}.json", given, partial(evaluate, name, seed, args))
        line = "up {up}, down {down}; {blocked} blocked: {at_once} at once, {after} after more steps".format(**result)
        print(f"seed {seed}, {name}: {line}", flush=True)
        results[name, seed] = result
    header = ["seed", "algo", "up", "down", "blocked", "at_once", f"after_{args.more}"]
    with table(args.out.with_suffix(".csv"), header) as write:
        for (name, seed), result in results.items():
            write([seed, name, *(result[key] for key in ("up", "down", "blocked", "at_once", "after"))])
    draw({name: results[name, args.seeds[0]] for name in args.algos}, args.out)
    print(args.out)


def evaluate(name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One agent: how many episodes take which way, and how many arrive where their favourite is walled up."""
    # from hot, where either route is taken
    temperatures = args.first_ent_coef, args.ent_coef
    agent = train(name, Ring(), args.steps, temperatures, args.compile, seed=seed, **SETTINGS)
    before = roll_out(agent, Ring(), args.episodes)
    walled = Ring(before.favourite)
    at_once = roll_out(agent, walled, args.episodes)
    go_on(agent, walled, args.more)
    after = roll_out(agent, walled, args.episodes)
    return dict(
        up=before.up,
        down=before.down,
        blocked=before.favourite,
        at_once=at_once.up + at_once.down,
        after=after.up + after.down,
        paths=before.paths.round(2).tolist(),
        walled_paths=at_once.paths.round(2).tolist(),
    )


def draw(results: dict[str, dict[str, Any]], out: Path) -> None:
    """Of each algorithm the paths of one seed: both routes open, one blocked."""
    figure, axes = new_figure(3.2 * len(results), 5.0, len(results), 2)
    for column, (name, result) in zip(np.atleast_2d(axes.T), results.items(), strict=True):
        draw_paths(column[0], np.array(result["paths"]), COLOURS[name])
        column[0].set_title("{}: {up} up, {down} down".format(name, **result))
        draw_paths(column[1], np.array(result["walled_paths"]), COLOURS[name], result["blocked"])
        column[1].set_title("{}: {at_once} of {n} arrive".format(name, n=len(result["walled_paths"]), **result))
    figure.tight_layout()
    figure.savefig(out)


if __name__ == "__main__":
    main()
