"""
A point mass in a maze with two equally long ways to a goal: Gymnasium-Robotics' PointMaze with a map of its own, which
``demonstrations.py`` drives in.
"""

from collections import deque
from typing import Any, NamedTuple

import gymnasium as gym
import gymnasium_robotics
import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm

gym.register_envs(gymnasium_robotics)

RING: list[list[int | str]] = [
    [1, 1, 1, 1, 1, 1, 1],
    [1, 0, 0, 0, 0, 0, 1],
    [1, "r", 1, 1, 1, "g", 1],
    [1, 0, 0, 0, 0, 0, 1],
    [1, 1, 1, 1, 1, 1, 1],
]
N_STEPS, REPEAT = 100, 5


class Ring(gym.Wrapper):
    """
    Observe place and velocity, hold each action for ``REPEAT`` steps of the simulation, and be paid minus the distance to the
    goal along the corridors, in lengths of a route. An episode goes on at the goal.
    """

    def __init__(self) -> None:
        super().__init__(
            gym.make("PointMaze_UMaze-v3", maze_map=RING, continuing_task=True, reset_target=False, max_episode_steps=None)
        )
        # every episode begins in the same place: what it does then is up to the policy
        self.unwrapped.position_noise_range = 0.0  # type: ignore[attr-defined]
        assert isinstance(self.env.observation_space, gym.spaces.Dict)
        self.observation_space = self.env.observation_space["observation"]
        self.n_steps = 0
        # cells to the goal, from each cell
        goal = next((i, j) for i, row in enumerate(RING) for j, cell in enumerate(row) if cell == "g")
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
        return [(i, j) for i, j in around if RING[i][j] != 1]

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


def roll_out(agent: BaseAlgorithm, env: Ring, n_episodes: int) -> Outcome:
    """Stochastic episodes. Those that reach the goal have crossed the middle column of the map, above or below."""
    taken = {"up": 0, "down": 0}
    paths = []
    for episode in range(n_episodes):
        obs, _ = env.reset(seed=10_000 + episode)
        path, reached = [obs[:2]], False
        for _ in range(N_STEPS):
            action, _ = agent.predict(obs, deterministic=False)
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


def draw_paths(axes: Any, paths: np.ndarray, colour: str) -> None:
    """The maze from above, and where episodes went."""
    cells = np.array([[cell == 1 for cell in row] for row in RING])
    height, width = cells.shape
    axes.imshow(cells, cmap="Greys", vmax=2, extent=(-width / 2, width / 2, -height / 2, height / 2))
    for path in paths:
        axes.plot(*path.T, color=colour, alpha=0.2, linewidth=0.8)
    axes.set(xticks=[], yticks=[])
