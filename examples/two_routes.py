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
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import gymnasium_robotics
import numpy as np
import torch as th
from sb3_contrib import CrossQ
from stable_baselines3 import SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_softq import SoftQ
from sb3_softq.plots import new_figure

gym.register_envs(gymnasium_robotics)

OUT = Path(__file__).parent / "results" / "two_routes.png"
# The same temperature and networks for all
SETTINGS: dict[str, Any] = dict(ent_coef=0.1, gamma=0.98, learning_starts=1_000, buffer_size=100_000, device="cpu")
ALGORITHMS: dict[str, tuple[type[OffPolicyAlgorithm], dict[str, Any]]] = {
    "SoftQ": (SoftQ, {}),
    "SAC": (SAC, {}),
    "CrossQ": (CrossQ, dict(policy_kwargs=dict(net_arch=[256, 256]))),
}
COLOURS = {"SoftQ": "tab:blue", "SAC": "tab:orange", "CrossQ": "tab:purple"}
RING: list[list[int | str]] = [
    [1, 1, 1, 1, 1, 1, 1],
    [1, 0, 0, 0, 0, 0, 1],
    [1, "r", 1, 1, 1, "g", 1],
    [1, 0, 0, 0, 0, 0, 1],
    [1, 1, 1, 1, 1, 1, 1],
]
# Row of the map that is walled up in its middle
ROUTES = {"up": 1, "down": 3}
N_STEPS, REPEAT = 100, 5


def ring(blocked: str | None = None) -> list[list[int | str]]:
    """The map, or that with a wall in the middle of a route."""
    return [
        [1 if ROUTES.get(blocked or "") == i and j == 3 else cell for j, cell in enumerate(row)] for i, row in enumerate(RING)
    ]


class Ring(gym.Wrapper):
    """
    Observe place and velocity, hold each action for ``REPEAT`` steps of the simulation, and be paid minus the distance to the
    goal along the corridors, in lengths of a route. An episode goes on at the goal.

    :param blocked: Route that is walled up
    """

    def __init__(self, blocked: str | None = None):
        self.map = ring(blocked)
        super().__init__(
            gym.make("PointMaze_UMaze-v3", maze_map=self.map, continuing_task=True, reset_target=False, max_episode_steps=None)
        )
        # every episode begins in the same place: what it does then is up to the policy
        self.unwrapped.position_noise_range = 0.0  # type: ignore[attr-defined]
        assert isinstance(self.env.observation_space, gym.spaces.Dict)
        self.observation_space = self.env.observation_space["observation"]
        self.n_steps = 0
        # cells to the goal, from each cell
        goal = next((i, j) for i, row in enumerate(self.map) for j, cell in enumerate(row) if cell == "g")
        self.distances = {goal: 0}
        queue = deque([goal])
        while queue:
            cell = queue.popleft()
            for near in self._neighbours(cell):
                if near not in self.distances:
                    self.distances[near] = self.distances[cell] + 1
                    queue.append(near)

    def _neighbours(self, cell: tuple[int, int]) -> list[tuple[int, int]]:
        around = [(cell[0] + i, cell[1] + j) for i, j in ((0, 1), (1, 0), (0, -1), (-1, 0))]
        return [(i, j) for i, j in around if self.map[i][j] != 1]

    def distance(self, place: np.ndarray) -> float:
        """To the goal, by the centre of this cell or of the next one."""
        maze = self.unwrapped.maze  # type: ignore[attr-defined]
        i, j = (int(x) for x in maze.cell_xy_to_rowcol(place))
        cells = [(i, j), *self._neighbours((i, j))]
        return min(
            float(np.linalg.norm(place - maze.cell_rowcol_to_xy(np.array(cell)))) + self.distances.get(cell, np.inf)
            for cell in cells
        )

    def reset(self, **kwargs: Any) -> Any:
        self.n_steps = 0
        obs, info = self.env.reset(**kwargs)
        return obs["observation"], info

    def step(self, action: Any) -> Any:
        for _ in range(REPEAT):
            obs, _, _, _, info = self.env.step(action)
        self.n_steps += 1
        distance = self.distance(obs["achieved_goal"])
        info["success"] = distance < 0.5
        return obs["observation"], -distance / len(self.distances) * 2, False, self.n_steps == N_STEPS, info


class Outcome(NamedTuple):
    """Of some episodes: how many took each route to the goal, and where they went, shape (n_episodes, N_STEPS + 1, 2)."""

    up: int
    down: int
    paths: np.ndarray

    @property
    def favourite(self) -> str:
        return "up" if self.up >= self.down else "down"


def roll_out(agent: BaseAlgorithm, env: Ring, n_episodes: int, deterministic: bool = False) -> Outcome:
    """Episodes. Those that reach the goal have crossed the middle column of the map, above or below."""
    taken = {"up": 0, "down": 0}
    paths = []
    for episode in range(n_episodes):
        obs, _ = env.reset(seed=10_000 + episode)
        path, reached = [obs[:2]], False
        for _ in range(N_STEPS):
            action, _ = agent.predict(obs, deterministic=deterministic)
            obs, _, _, _, info = env.step(action)
            path.append(obs[:2])
            reached = reached or info["success"]
        paths.append(path)
        if reached:
            places = np.array(path)
            # the last crossing before the goal
            crossed = places[np.abs(places[:, 0]) < 0.5]
            taken["up" if crossed[-1, 1] > 0 else "down"] += 1
    return Outcome(taken["up"], taken["down"], np.array(paths))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algos", nargs="+", choices=list(ALGORITHMS), default=list(ALGORITHMS))
    parser.add_argument("--steps", type=int, default=20_000, help="of training")
    parser.add_argument("--more", type=int, default=5_000, help="further steps with the wall")
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--ent-coef", type=float, default=SETTINGS["ent_coef"], help="temperature")
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
            cls, kwargs = ALGORITHMS[name]
            agent = cls("MlpPolicy", Ring(), seed=seed, **SETTINGS | {"ent_coef": args.ent_coef} | kwargs).learn(args.steps)
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


def draw_paths(axes: Any, paths: np.ndarray, colour: str, blocked: str | None = None) -> None:
    """The maze from above, and where episodes went."""
    cells = np.array([[cell == 1 for cell in row] for row in ring(blocked)])
    height, width = cells.shape
    axes.imshow(cells, cmap="Greys", vmax=2, extent=(-width / 2, width / 2, -height / 2, height / 2))
    for path in paths:
        axes.plot(*path.T, color=colour, alpha=0.2, linewidth=0.8)
    axes.set(xticks=[], yticks=[])


if __name__ == "__main__":
    main()
