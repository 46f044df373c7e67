"""
An ant that learns to run in any direction, then goes on from there in three places: a corridor, a U-turn and a fork.

    pip install -e ".[extra,benchmark]"
    python examples/any_direction.py      # examples/results/any_direction.png, any_direction.csv

This is section 5.2 of https://arxiv.org/abs/1702.08165 with its robot: one policy is trained for speed in the plane, whatever
the direction; in which direction do 100 episodes go? Then its weights go on in a place with walls, where one way is right.
What is finished lies in --logs, so that a second call goes on; several calls at once take different --seeds or --algos.
"""

import argparse
import itertools
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import gymnasium as gym
import numpy as np
import torch as th
from filming import film
from finished import finished, table
from gymnasium.envs.mujoco import mujoco_env
from matplotlib import colormaps
from mazes import Map, Maze
from peers import ALGORITHMS, COLOURS, compiled
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback

from sb3_softq.callbacks import histogram_entropy
from sb3_softq.plots import new_figure
from sb3_softq.rollouts import Episode, roll_out

OUT = Path(__file__).parent / "results" / "any_direction.png"
# The same temperature and discount for all
SETTINGS: dict[str, Any] = dict(ent_coef=0.2, learning_starts=5000, buffer_size=300_000, device="cpu")
FINE_TUNING: dict[str, Any] = dict(learning_starts=1000)
# One direction is as good as another at this speed, metres a second
FASTEST = 2.0
N_STEPS = 300
N_SECTORS = 8
# Places have cells of 3 metres, walls of one metre
CELL = 3.0
PLACES: dict[str, Map] = {
    "corridor": [[1, 1, 1], [1, "g", 1], [1, 0, 1], [1, 0, 1], [1, "r", 1], [1, 1, 1]],
    "U-turn": [[1, 1, 1, 1], [1, "r", 0, 1], [1, 1, 0, 1], [1, "g", 0, 1], [1, 1, 1, 1]],
    "fork": [[1, 1, 1, 1, 1, 1, 1], [1, "g", 0, 0, 0, 0, 1], [1, 1, 1, 0, 1, 1, 1], [1, 1, 1, "r", 1, 1, 1], [1] * 7],
}


class Ant(gym.Wrapper):
    """
    Gymnasium's ant, paid for its speed away from where it began, or towards the goal of a place, up to ``FASTEST``, and as
    usual for staying healthy. It sees where it is, from where it began.

    :param place: One of ``PLACES``, or None for an empty plane
    """

    def __init__(self, place: str | None = None):
        self.maze = None if place is None else Maze(PLACES[place], CELL)
        kwargs: dict[str, Any] = dict(include_cfrc_ext_in_observation=False, exclude_current_positions_from_observation=False)
        with tempfile.TemporaryDirectory() as folder:
            if self.maze is not None:
                kwargs["xml_file"] = str(with_walls(self.maze, Path(folder) / "ant.xml"))
            super().__init__(gym.make("Ant-v5", max_episode_steps=N_STEPS, **kwargs))
        self.place, self.distance, self.success = np.zeros(2), 0.0, False

    def reset(self, **kwargs: Any) -> Any:
        obs, info = self.env.reset(**kwargs)
        self._move(obs[:2])
        return obs, info

    def step(self, action: Any) -> Any:
        obs, _, terminated, truncated, info = self.env.step(action)
        before = self.distance
        self._move(obs[:2])
        speed = (before - self.distance) / self.unwrapped.dt  # type: ignore[attr-defined]
        info["success"] = self.success
        return obs, float(min(speed, FASTEST) + info["reward_survive"]), terminated, truncated, info

    def _move(self, place: np.ndarray) -> None:
        self.place = place.copy()
        if self.maze is None:
            self.distance = -float(np.linalg.norm(place))
        else:
            self.distance = self.maze.distance(place + self.maze.centre(self.maze.start))
            self.success = self.distance < CELL / 2


def with_walls(maze: Maze, path: Path) -> Path:
    """Gymnasium's model of the ant, with the walls of a maze around where it begins."""
    tree = ElementTree.parse(Path(mujoco_env.__file__).parent / "assets" / "ant.xml")
    body = tree.find("worldbody")
    assert body is not None
    for cell in maze.walls:
        x, y = maze.centre(cell) - maze.centre(maze.start)
        geom = dict(type="box", pos=f"{x} {y} 0.5", size=f"{CELL / 2} {CELL / 2} 0.5", rgba="0.6 0.6 0.6 1", conaffinity="1")
        ElementTree.SubElement(body, "geom", geom)
    tree.write(path)
    return path


def travel(agent: BaseAlgorithm, ants: list[Ant]) -> tuple[np.ndarray, float]:
    """
    A stochastic episode of each ant.

    :return: Their paths, shape (n_ants, N_STEPS + 1, 2), where one that ended stays where it is; share that had success
    """
    episodes = roll_out(agent, ants, seed=10_000, record=lambda ant: (*ant.place, ant.success))
    records = records_of(episodes, N_STEPS)
    return records[:, :, :2] - records[:, :1, :2], float(records[:, :, 2].any(axis=1).mean())


def records_of(episodes: list[Episode], n_steps: int) -> np.ndarray:
    """What was recorded, shape (n_episodes, n_steps + 1, ...); an ant whose episode has ended stays as it is."""
    records = [np.array(episode.records) for episode in episodes]
    return np.stack([np.concatenate([x, np.repeat(x[-1:], n_steps + 1 - len(x), axis=0)]) for x in records])


def sectors(paths: np.ndarray) -> np.ndarray:
    """How many episodes end in each of the sectors around the start, of those that go further than two metres."""
    ends = paths[:, -1]
    ends = ends[np.linalg.norm(ends, axis=1) > 2.0]
    angle = np.arctan2(ends[:, 1], ends[:, 0])
    return np.bincount(np.round(angle / (2 * np.pi / N_SECTORS)).astype(int) % N_SECTORS, minlength=N_SECTORS)


class UntilSuccess(BaseCallback):
    """
    Ask the policy every so many steps, and end training when it reaches the goal in 80 % of 20 stochastic episodes.

    :param place: Where
    :param every: Number of steps
    """

    def __init__(self, place: str, every: int):
        super().__init__()
        self.ants, self.every = [Ant(place) for _ in range(20)], every
        self.shares: list[tuple[int, float]] = []

    def _on_step(self) -> bool:
        if self.num_timesteps % self.every == 0:
            # what is asked takes nothing from the random numbers of training
            with th.random.fork_rng([]):
                self.shares.append((self.num_timesteps, travel(self.model, self.ants)[1]))
        return not self.shares or self.shares[-1][1] < 0.8


def pre_train(name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One agent in the empty plane: it is saved, with where its episodes go."""
    cls, kwargs = ALGORITHMS[name]
    agent = cls("MlpPolicy", Ant(), seed=seed, **SETTINGS | kwargs | compiled(name, args.compile)).learn(args.steps)
    agent.save(args.logs / f"{name}_{seed}.zip")
    paths, _ = travel(agent, [Ant() for _ in range(args.episodes)])
    return dict(sectors=sectors(paths).tolist(), paths=np.round(paths[:, ::5], 2).tolist())


def fine_tune(name: str, seed: int, place: str, args: argparse.Namespace) -> dict[str, Any]:
    """Steps until 80 % of the episodes reach the end of a place; None if it takes longer than ``args.more_steps``."""
    cls, kwargs = ALGORITHMS.get(name, ALGORITHMS["SoftQ"])
    settings = SETTINGS | kwargs | compiled(name, args.compile)
    if name == "from scratch":
        agent = cls("MlpPolicy", Ant(place), seed=seed, **settings | FINE_TUNING)
    else:
        # what it knows is in its weights: the data, and the random steps, begin anew
        agent = cls.load(args.logs / f"{name}_{seed}.zip", Ant(place), seed=seed, device="cpu", **FINE_TUNING)
    callback = UntilSuccess(place, args.eval_freq)
    agent.learn(args.more_steps, callback)
    reached = [step for step, share in callback.shares if share >= 0.8]
    return dict(steps=reached[0] if reached else None, shares=callback.shares)


def film_ants(agent: BaseAlgorithm, path: Path, n_ants: int = 12, seconds: float = 6.0) -> None:
    """Animation of stochastic episodes, all in one picture, each ant in the colour of the direction that it takes."""
    ants = [Ant() for _ in range(n_ants)]
    fps = ants[0].metadata["render_fps"]
    n_frames = round(seconds * fps)
    episodes = roll_out(agent, ants, seed=10_000, max_steps=n_frames, record=lambda ant: ant.unwrapped.data.qpos.copy())
    qpos = records_of(episodes, n_frames)
    angles = np.arctan2(*(qpos[:, -1, :2] - qpos[:, 0, :2]).T[::-1])
    colours = colormaps["hsv"](angles / (2 * np.pi) % 1.0)
    model = ants[0].unwrapped.model  # type: ignore[attr-defined]
    # a floor in light grey
    model.tex_data[:] = 100 + model.tex_data // 4
    model.mat_reflectance[:] = 0.0
    film(path, model, qpos[:, ::2], "torso", colours, dict(distance=28.0, azimuth=90.0, elevation=-75.0), fps / 2)


def cell(path: Path, arguments: dict[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    result = finished(path, arguments, compute)
    print(path.stem, {key: value for key, value in result.items() if key not in ("arguments", "paths")}, flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algos", nargs="+", choices=list(ALGORITHMS), default=list(ALGORITHMS))
    parser.add_argument("--places", nargs="*", choices=list(PLACES), default=list(PLACES))
    parser.add_argument("--steps", type=int, default=150_000, help="of pre-training")
    parser.add_argument("--more-steps", type=int, default=50_000, help="of fine-tuning, at most")
    parser.add_argument("--eval-freq", type=int, default=2500, help="in fine-tuning")
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--compile", action="store_true", help="SoftQ compiled: faster, the same numbers but for rounding")
    parser.add_argument("--logs", type=Path, default=Path("logs/any_direction"), help="agents and results, one file each")
    parser.add_argument("--gif", type=Path, metavar="FILE", help="film the first agent here (without a screen: MUJOCO_GL=egl)")
    parser.add_argument("--out", type=Path, default=OUT, help="file of the figure; the numbers are in a .csv beside it")
    args = parser.parse_args()
    if args.more_steps < args.eval_freq:
        parser.error(f"--more-steps {args.more_steps} has no evaluation: it must be at least --eval-freq {args.eval_freq}")
    th.set_num_threads(1)
    args.logs.mkdir(parents=True, exist_ok=True)

    before, after = {}, {}
    for seed, name in itertools.product(args.seeds, args.algos):
        given = dict(steps=args.steps, episodes=args.episodes)
        path = args.logs / f"{name}_{seed}.json"
        before[name, seed] = cell(path, given, partial(pre_train, name, seed, args))
    for place, seed, name in itertools.product(args.places, args.seeds, [*args.algos, "from scratch"]):
        path = args.logs / f"{name.replace(' ', '_')}_{seed}_{place}.json"
        given = dict(steps=args.steps, more_steps=args.more_steps, eval_freq=args.eval_freq)
        after[name, seed, place] = cell(path, given, partial(fine_tune, name, seed, place, args))
    header = ["agent", "seed", "entropy", *(f"sector_{i}" for i in range(N_SECTORS)), *args.places]
    with table(args.out.with_suffix(".csv"), header) as write:
        for name, seed in [(name, seed) for name in [*args.algos, "from scratch"] for seed in args.seeds]:
            counts = before.get((name, seed), {}).get("sectors", [])
            steps = [after[name, seed, place]["steps"] for place in args.places]
            directions = [f"{histogram_entropy(np.array(counts)):.2f}", *counts] if counts else [""] * (1 + N_SECTORS)
            write([name, seed, *directions, *(args.more_steps + 1 if x is None else x for x in steps)])
    draw(before, after, args)
    print(args.out)
    if args.gif:
        cls, _ = ALGORITHMS[args.algos[0]]
        film_ants(cls.load(args.logs / f"{args.algos[0]}_{args.seeds[0]}.zip", device="cpu"), args.gif)


def draw(before: dict[Any, Any], after: dict[Any, Any], args: argparse.Namespace) -> None:
    """Above, of each algorithm the paths of the first seed; below, the steps that each place takes, a point for each seed."""
    names = [*args.algos, "from scratch"]
    n_columns = max(len(args.algos), len(args.places), 1)
    figure, axes = new_figure(3.4 * n_columns, 6.6, n_columns, 2)
    axes = np.reshape(axes, (2, n_columns))
    for ax, name in zip(axes[0], args.algos, strict=False):
        seed = args.seeds[0]
        for path in np.array(before[name, seed]["paths"]):
            ax.plot(*path.T, color=COLOURS[name], alpha=0.4, linewidth=0.8)
        limit = FASTEST * N_STEPS * 0.05
        ax.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xlabel="x, m", ylabel="y, m")
        entropies = [histogram_entropy(np.array(before[name, s]["sectors"])) for s in args.seeds]
        ax.set_title(f"{name}: entropy {', '.join(f'{x:.2f}' for x in entropies)}", fontsize=10)
    for ax, place in zip(axes[1], args.places, strict=False):
        for name, seed in itertools.product(names, args.seeds):
            steps = after[name, seed, place]["steps"]
            ax.plot(names.index(name), steps or args.more_steps, "o" if steps else "^", color=COLOURS[name], alpha=0.7)
        ax.set_xticks(range(len(names)), names, fontsize=8)
        ax.set(title=f"{place}: steps to 80 %", ylim=(0, 1.05 * args.more_steps))
    for ax in axes.flat:
        # there are more places than algorithms, or the other way round
        if not ax.has_data():
            ax.set_axis_off()
    figure.tight_layout()
    figure.savefig(args.out)


if __name__ == "__main__":
    main()
