"""
A point mass in a maze with two equally long ways to a goal: Gymnasium-Robotics' PointMaze with a map of its own, which
``demonstrations.py`` and ``two_routes.py`` drive in.
"""

from typing import Any, NamedTuple

import gymnasium as gym
import gymnasium_robotics
import numpy as np
from mazes import Map, Maze
from stable_baselines3.common.base_class import BaseAlgorithm

gym.register_envs(gymnasium_robotics)

RING: Map = [
    [1, 1, 1, 1, 1, 1, 1],
    [1, 0, 0, 0, 0, 0, 1],
    [1, "r", 1, 1, 1, "g", 1],
    [1, 0, 0, 0, 0, 0, 1],
    [1, 1, 1, 1, 1, 1, 1],
]
N_STEPS, REPEAT = 100, 5
N_CELLS = len(Maze(RING).n_cells)
# Row of the map that a route takes
ROUTES = {"up": 1, "down": 3}


def ring(blocked: str | None = None) -> Map:
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
        cells = ring(blocked)
        super().__init__(
            gym.make("PointMaze_UMaze-v3", maze_map=cells, continuing_task=True, reset_target=False, max_episode_steps=None)
        )
        # every episode begins in the same place: what it does then is up to the policy
        self.unwrapped.position_noise_range = 0.0  # type: ignore[attr-defined]
        assert isinstance(self.env.observation_space, gym.spaces.Dict)
        self.observation_space = self.env.observation_space["observation"]
        self.n_steps = 0
        self.maze = Maze(cells)

    def reset(self, **kwargs: Any) -> Any:
        self.n_steps = 0
        obs, info = self.env.reset(**kwargs)
        return obs["observation"], info

    def step(self, action: Any) -> Any:
        for _ in range(REPEAT):
            obs, _, _, _, info = self.env.step(action)
        self.n_steps += 1
        distance = self.maze.distance(obs["achieved_goal"])
        info["success"] = distance < 0.5
        return obs["observation"], -distance / N_CELLS * 2, False, self.n_steps == N_STEPS, info


class Outcome(NamedTuple):
    """Of some episodes: how many took each route to the goal, and where they went, shape (n_episodes, N_STEPS + 1, 2)."""

    up: int
    down: int
    paths: np.ndarray

    @property
    def favourite(self) -> str:
        """The more frequent route."""
        return "up" if self.up >= self.down else "down"


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


def draw_paths(axes: Any, paths: np.ndarray, colour: str, blocked: str | None = None) -> None:
    """The maze from above, and where episodes went."""
    cells = np.array([[cell == 1 for cell in row] for row in ring(blocked)])
    height, width = cells.shape
    axes.imshow(cells, cmap="Greys", vmax=2, extent=(-width / 2, width / 2, -height / 2, height / 2))
    for path in paths:
        axes.plot(*path.T, color=colour, alpha=0.2, linewidth=0.8)
    axes.set(xticks=[], yticks=[])
