"""
An ant that learns to run in any direction, then goes on from there in three places: a corridor, a U-turn and a fork.

    pip install -e ".[extra,benchmark,onnx]"
    python examples/any_direction.py      # examples/results/any_direction.png, any_direction.csv

This is section 5.2 of https://arxiv.org/abs/1702.08165 with its robot, but that the gait is given (``running_ant.py``): what
is learned is where to go every second and a half. One policy is paid for its way from the start, whatever the direction; in
which directions do 100 episodes go? Then its weights go on in a place with walls, where one way is right. What is finished
lies in --logs, so that a second call goes on; several calls at once take different --seeds.
"""

import argparse
import itertools
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from ant_maze import Ant, film_ants
from cooling import train
from finished import finished, table
from matplotlib import colormaps
from mazes import Map
from peers import ALGORITHMS, COLOURS, compiled, parser_of
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback

from sb3_softq.callbacks import histogram_entropy
from sb3_softq.plots import new_figure
from sb3_softq.rollouts import roll_out

OUT = Path(__file__).parent / "results" / "any_direction.png"
# The same for all
SETTINGS: dict[str, Any] = dict(gamma=0.95, buffer_size=50_000, device="cpu")
# Share of the episodes in which a place counts as learned
LEARNED = 0.8
N_SECTORS = 8
PLACES: dict[str, Map] = {
    "corridor": [[1, 1, 1], [1, "g", 1], [1, 0, 1], [1, 0, 1], [1, "r", 1], [1, 1, 1]],
    "U-turn": [[1, 1, 1, 1], [1, "r", 0, 1], [1, 1, 0, 1], [1, "g", 0, 1], [1, 1, 1, 1]],
    "fork": [[1, 1, 1, 1, 1, 1, 1], [1, "g", 0, 0, 0, 0, 1], [1, 1, 1, 0, 1, 1, 1], [1, 1, 1, "r", 1, 1, 1], [1] * 7],
}


def travel(agent: BaseAlgorithm, ants: list[Ant]) -> float:
    """
    A stochastic episode of each ant, whose track it has afterwards.

    :return: Share of them that reached a goal
    """
    episodes = roll_out(agent, ants, seed=10_000)
    return float(np.mean([episode.info["success"] for episode in episodes]))


def sectors(ends: np.ndarray) -> np.ndarray:
    """
    :param ends: Where episodes end, metres from where they began, shape (n, 2)
    :return: How many of those that go further than two metres end in each of the sectors around the start
    """
    ends = ends[np.linalg.norm(ends, axis=1) > 2.0]
    angle = np.arctan2(ends[:, 1], ends[:, 0])
    return np.bincount(np.round(angle / (2 * np.pi / N_SECTORS)).astype(int) % N_SECTORS, minlength=N_SECTORS)


class UntilLearned(BaseCallback):
    """
    Ask the policy every so many steps for stochastic episodes, and end training when enough of them reach the goal.

    :param place: Where
    :param every: Number of steps
    :param n_episodes: Number of episodes
    """

    def __init__(self, place: str, every: int, n_episodes: int):
        super().__init__()
        self.ants, self.every = [Ant(PLACES[place]) for _ in range(n_episodes)], every
        self.shares: list[tuple[int, float]] = []

    def _on_step(self) -> bool:
        if self.num_timesteps % self.every == 0:
            # what is asked takes nothing from the random numbers of training
            with th.random.fork_rng([]):
                self.shares.append((self.num_timesteps, travel(self.model, self.ants)))
        return not self.shares or self.shares[-1][1] < LEARNED


def pre_train(name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One agent in the empty plane: it is saved, with where its episodes go."""
    settings = SETTINGS | dict(seed=seed, learning_starts=min(500, args.steps // 4))
    agent = train(name, Ant(), args.steps, (args.first_ent_coef, args.ent_coef), args.compile, **settings)
    agent.save(args.logs / f"{name}_{seed}.zip")
    ants = [Ant() for _ in range(args.episodes)]
    travel(agent, ants)
    counts = sectors(np.array([ant.track[-1] - ant.track[0] for ant in ants]))
    return dict(sectors=counts.tolist(), tracks=[ant.track[::5].round(2).tolist() for ant in ants])


def fine_tune(name: str, seed: int, place: str, args: argparse.Namespace) -> dict[str, Any]:
    """Steps until enough of the episodes reach the end of a place; None if it takes longer than ``args.more``."""
    cls, kwargs = ALGORITHMS.get(name, ALGORITHMS["SoftQ"])
    ant, own = Ant(PLACES[place]), dict(ent_coef=args.ent_coef, learning_starts=min(100, args.more // 4))
    if name == "from scratch":
        agent = cls("MlpPolicy", ant, seed=seed, **SETTINGS | kwargs | compiled(name, args.compile) | own)
    else:
        # what it knows is in its weights: the data, and the random steps, begin anew
        agent = cls.load(args.logs / f"{name}_{seed}.zip", ant, seed=seed, device="cpu", **own)
    callback = UntilLearned(place, args.eval_freq, max(1, args.episodes // 5))
    agent.learn(args.more, callback)
    learned = [step for step, share in callback.shares if share >= LEARNED]
    return dict(steps=learned[0] if learned else None, shares=callback.shares)


def main() -> None:
    parser = parser_of(__doc__, OUT, [0, 1, 2])
    parser.add_argument("--places", nargs="*", choices=list(PLACES), default=list(PLACES))
    parser.add_argument("--steps", type=int, default=8_000, help="of pre-training, each a decision")
    parser.add_argument("--more", type=int, default=4_000, help="steps of fine-tuning, at most")
    parser.add_argument("--eval-freq", type=int, default=250, help="in fine-tuning")
    parser.add_argument("--episodes", type=int, default=100, help="and a fifth of them in each evaluation of fine-tuning")
    parser.add_argument("--first-ent-coef", type=float, default=2.0, help="temperature that training begins with")
    parser.add_argument("--ent-coef", type=float, default=0.5, help="temperature from the half of pre-training on")
    parser.add_argument("--gif", type=Path, metavar="FILE", help="film the first agent here (without a screen: MUJOCO_GL=egl)")
    args = parser.parse_args()
    if args.more < args.eval_freq:
        parser.error(f"--more {args.more} has no evaluation: it must be at least --eval-freq {args.eval_freq}")
    th.set_num_threads(1)
    args.logs.mkdir(parents=True, exist_ok=True)

    before, after = {}, {}
    for seed, name in itertools.product(args.seeds, args.algos):
        given = {key: getattr(args, key) for key in ("steps", "episodes", "first_ent_coef", "ent_coef")}
        result = finished(args.logs / f"{name}_{seed}.json", given, partial(pre_train, name, seed, args))
        entropy = histogram_entropy(np.array(result["sectors"]))
        print(f"seed {seed}, {name}: sectors {result['sectors']}, entropy {entropy:.2f}", flush=True)
        before[name, seed] = result
    for place, seed, name in itertools.product(args.places, args.seeds, [*args.algos, "from scratch"]):
        path = args.logs / f"{name.replace(' ', '_')}_{seed}_{place}.json"
        given = {key: getattr(args, key) for key in ("steps", "more", "eval_freq", "episodes", "first_ent_coef", "ent_coef")}
        result = finished(path, given, partial(fine_tune, name, seed, place, args))
        print(f"{place}, seed {seed}, {name}: {result['shares']}", flush=True)
        after[name, seed, place] = result["steps"]
    header = ["agent", "seed", "entropy", *(f"sector_{i}" for i in range(N_SECTORS)), *args.places]
    with table(args.out.with_suffix(".csv"), header) as write:
        for name, seed in itertools.product([*args.algos, "from scratch"], args.seeds):
            counts = before.get((name, seed), {}).get("sectors", [])
            directions = [f"{histogram_entropy(np.array(counts)):.2f}", *counts] if counts else [""] * (1 + N_SECTORS)
            steps = [after[name, seed, place] for place in args.places]
            write([name, seed, *directions, *(f">{args.more}" if x is None else x for x in steps)])
    draw(before, after, args)
    print(args.out)
    if args.gif:
        cls, _ = ALGORITHMS[args.algos[0]]
        ants = [Ant() for _ in range(12)]
        travel(cls.load(args.logs / f"{args.algos[0]}_{args.seeds[0]}.zip", device="cpu"), ants)
        ways = np.array([ant.track[-1] - ant.track[0] for ant in ants])
        film_ants(ants, colormaps["hsv"](np.arctan2(ways[:, 1], ways[:, 0]) / (2 * np.pi) % 1.0), args.gif)


def draw(before: dict[Any, Any], after: dict[Any, Any], args: argparse.Namespace) -> None:
    """Above, of each algorithm the tracks of the first seed; below, the steps that each place takes, a point for each seed."""
    names = [*args.algos, "from scratch"]
    n_columns = max(len(args.algos), len(args.places), 1)
    figure, axes = new_figure(3.4 * n_columns, 6.6, n_columns, 2)
    axes = np.reshape(axes, (2, n_columns))
    for ax, name in zip(axes[0], args.algos, strict=False):
        for track in before[name, args.seeds[0]]["tracks"]:
            ax.plot(*np.transpose(track), color=COLOURS[name], alpha=0.4, linewidth=0.8)
        ax.set(xlim=(-14, 14), ylim=(-14, 14), aspect="equal", xlabel="x, m", ylabel="y, m")
        entropies = [histogram_entropy(np.array(before[name, seed]["sectors"])) for seed in args.seeds]
        ax.set_title(f"{name}: entropy {', '.join(f'{x:.2f}' for x in entropies)}", fontsize=10)
    for ax, place in zip(axes[1], args.places, strict=False):
        for name, seed in itertools.product(names, args.seeds):
            steps = after[name, seed, place]
            ax.plot(names.index(name), steps or args.more, "o" if steps else "^", color=COLOURS[name], alpha=0.7)
        ax.set_xticks(range(len(names)), names, fontsize=8)
        ax.set(title=f"{place}: steps to {LEARNED:.0%}", ylim=(0, 1.05 * args.more))
    for ax in axes.flat:
        # there are more places than algorithms, or the other way round
        if not ax.has_data():
            ax.set_axis_off()
    figure.tight_layout()
    figure.savefig(args.out)


if __name__ == "__main__":
    main()
