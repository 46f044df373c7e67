"""
An ant in a yard with four gates: through which does one policy go, and what if the gate that it prefers is walled up?

    pip install -e ".[extra,benchmark,onnx]"
    python examples/four_gates.py         # examples/results/four_gates.png, four_gates.csv

The ant can run (``running_ant.py``). What is learned is one decision: a place to run to, within five seconds; paid are the
metres by which it comes nearer to the nearest of the gates. Each agent is asked for 100 stochastic decisions; then the gate
that it takes most often is walled up, which it has not seen in training, and it is asked again, at once and after some more
steps. What is finished lies in --logs, so that a second call goes on; several calls at once take different --seeds or --algos.
"""

import argparse
import itertools
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from ant_maze import CELL, Ant, film_ants
from cooling import go_on, train
from finished import finished, table
from matplotlib.colors import to_rgba
from mazes import Map, Maze
from peers import ALGORITHMS, parser_of
from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_softq.plots import new_figure
from sb3_softq.rollouts import roll_out

OUT = Path(__file__).parent / "results" / "four_gates.png"
# The same for all; a decision takes the time of several updates
SETTINGS: dict[str, Any] = dict(gradient_steps=4, buffer_size=50_000, device="cpu")
YARD: Map = [
    [1, 1, 1, 1, 1, 1, 1],
    [1, 1, 1, "g", 1, 1, 1],
    [1, 1, 0, 0, 0, 1, 1],
    [1, "g", 0, "r", 0, "g", 1],
    [1, 1, 0, 0, 0, 1, 1],
    [1, 1, 1, "g", 1, 1, 1],
    [1, 1, 1, 1, 1, 1, 1],
]
# Row and column of each gate
GATES = {"right": (3, 5), "up": (1, 3), "left": (3, 1), "down": (5, 3)}
GATE_COLOURS = {"right": "tab:blue", "up": "tab:orange", "left": "tab:green", "down": "tab:red"}


def yard(walled: str | None = None) -> Map:
    """The map, or that with a wall in the place of a gate."""
    return [[1 if walled and GATES[walled] == (i, j) else cell for j, cell in enumerate(row)] for i, row in enumerate(YARD)]


def make_ants(n: int, walled: str | None = None) -> list[Ant]:
    return [Ant(yard(walled), n_decisions=1, seconds=5.0) for _ in range(n)]


def go(agent: BaseAlgorithm, ants: list[Ant]) -> list[str | None]:
    """The gate to which each ant goes by a stochastic decision, None where it comes to none; it has its track afterwards."""
    roll_out(agent, ants, seed=10_000)
    return [through(ant) for ant in ants]


def through(ant: Ant) -> str | None:
    """The gate in which an ant is."""
    return nearest(ant.place) if ant.is_there else None


def nearest(place: np.ndarray) -> str:
    """The gate that a place is nearest to."""
    maze = Maze(YARD, CELL)
    return min(GATES, key=lambda name: float(np.linalg.norm(place - maze.centre(GATES[name]))))


def evaluate(name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One agent: where its decisions lead, and where they do with the gate walled up that it takes most often."""
    settings = SETTINGS | dict(seed=seed, learning_starts=min(500, args.steps // 4))
    agent = train(name, make_ants(1)[0], args.steps, (args.first_ent_coef, args.ent_coef), args.compile, **settings)
    agent.save(args.logs / f"{name}_{seed}.zip")
    ants = make_ants(args.decisions)
    gates = go(agent, ants)
    counts = {gate: gates.count(gate) for gate in GATES}
    walled = max(counts, key=lambda gate: counts[gate])
    walled_ants = make_ants(args.decisions, walled)
    at_once = args.decisions - go(agent, walled_ants).count(None)
    tracks, walled_tracks = ([ant.track[::4].round(2).tolist() for ant in some] for some in (ants, walled_ants))
    go_on(agent, make_ants(1, walled)[0], args.more)
    after = args.decisions - go(agent, walled_ants).count(None)
    return dict(counts=counts, walled=walled, at_once=at_once, after=after, tracks=tracks, walled_tracks=walled_tracks)


def main() -> None:
    # 0 and 1 decided on settings
    parser = parser_of(__doc__, OUT, [2, 3, 4, 5, 6])
    parser.add_argument("--steps", type=int, default=3_000, help="of training, each a decision")
    parser.add_argument("--more", type=int, default=500, help="further steps with the wall")
    parser.add_argument("--decisions", type=int, default=100)
    parser.add_argument("--first-ent-coef", type=float, default=2.0, help="temperature that training begins with")
    parser.add_argument("--ent-coef", type=float, default=0.5, help="temperature from the half of training on")
    parser.add_argument("--gif", type=Path, metavar="FILE", help="film the first agent here (without a screen: MUJOCO_GL=egl)")
    args = parser.parse_args()
    th.set_num_threads(1)

    results = {}
    for seed, name in itertools.product(args.seeds, args.algos):
        given = {key: getattr(args, key) for key in ("steps", "more", "decisions", "first_ent_coef", "ent_coef")}
        result = finished(args.logs / f"{name}_{seed}.json", given, partial(evaluate, name, seed, args))
        gates = ", ".join(f"{gate} {n}" for gate, n in result["counts"].items())
        then = "{walled} walled up: {at_once} at once, {after} after more steps".format(**result)
        print(f"seed {seed}, {name}: {gates}; {then}", flush=True)
        results[name, seed] = result
    with table(args.out.with_suffix(".csv"), ["seed", "algo", *GATES, "walled", "at_once", f"after_{args.more}"]) as write:
        for (name, seed), result in results.items():
            write([seed, name, *result["counts"].values(), *(result[key] for key in ("walled", "at_once", "after"))])
    draw({name: results[name, args.seeds[0]] for name in args.algos}, args.out)
    print(args.out)
    if args.gif:
        ants = make_ants(16)
        agent = ALGORITHMS[args.algos[0]][0].load(args.logs / f"{args.algos[0]}_{args.seeds[0]}.zip", device="cpu")
        go(agent, ants)
        film_ants(ants, np.array([to_rgba(GATE_COLOURS[nearest(ant.place)]) for ant in ants]), args.gif)


def draw(results: dict[str, dict[str, Any]], out: Path) -> None:
    """Of each algorithm the tracks of one seed: all gates open, and its favourite walled up."""
    figure, axes = new_figure(3.2 * len(results), 6.6, len(results), 2)
    for column, (name, result) in zip(np.atleast_2d(axes.T), results.items(), strict=True):
        draw_yard(column[0], result["tracks"])
        column[0].set_title(f"{name}: {', '.join(str(n) for n in result['counts'].values())}")
        draw_yard(column[1], result["walled_tracks"], result["walled"])
        column[1].set_title("{walled} walled up: {at_once} arrive".format(**result))
    figure.tight_layout()
    figure.savefig(out)


def draw_yard(axes: Any, tracks: list[Any], walled: str | None = None) -> None:
    """The yard from above, and the tracks, in the colour of the gate that each is nearest to at its end."""
    cells = np.array([[cell == 1 for cell in row] for row in yard(walled)])
    size = CELL * len(cells) / 2
    axes.imshow(cells, cmap="Greys", vmax=2, extent=(-size, size, -size, size))
    for track in tracks:
        axes.plot(*np.transpose(track), color=GATE_COLOURS[nearest(np.array(track[-1]))], alpha=0.4, linewidth=0.8)
    axes.set(xticks=[], yticks=[])


if __name__ == "__main__":
    main()
