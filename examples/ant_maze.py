"""
An ant that decides where to go, in an empty plane or between walls, for ``four_gates.py`` and ``any_direction.py``. How it
gets there is the gait's business (``running_ant.py``).
"""

import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import gymnasium as gym
import numpy as np
from filming import film
from gymnasium.envs.mujoco import mujoco_env
from mazes import Map, Maze
from running_ant import Gait, Turn, is_upright

# Metres: side of a cell, as in Gymnasium-Robotics' mazes for the ant
CELL = 4.0
# Simulated steps in a second, and how many metres away a decision can be for each second that it has
STEPS, SPEED = 20, 2.0
# There is where the torso is, within metres
CLOSE = 0.3
# In the plane all is a goal that is as far away from the start, metres
RADIUS = 10.0
# What a decision costs, in metres
HURRY = 1.0
# One for all ants
load_gait = cache(Gait)


class Ant(gym.Wrapper):
    """
    It sees its place, from the middle of the map or from where it began in the plane, its velocity, and the share of its
    decisions that is left. An action is where it is to go from there, in metres. Paid are the metres by which the way to the
    nearest goal becomes shorter, less ``HURRY`` for each decision; in the plane all is a goal that is ``RADIUS`` away from
    where it began. An episode ends there, when the ant falls, or after so many decisions.

    :param cells: The map, or None for an empty plane
    :param n_decisions: Longest episode
    :param seconds: How long a decision holds, unless it is there before
    """

    def __init__(self, cells: Map | None = None, n_decisions: int = 12, seconds: float = 1.5):
        self.maze = None if cells is None else Maze(cells, CELL)
        self.n_decisions = n_decisions
        kwargs: dict[str, Any] = dict(include_cfrc_ext_in_observation=False, exclude_current_positions_from_observation=False)
        with tempfile.TemporaryDirectory() as folder:
            if self.maze is not None:
                kwargs["xml_file"] = str(with_walls(self.maze, Path(folder) / "ant.xml"))
            super().__init__(gym.make("Ant-v5", **kwargs).unwrapped)
        self.n_steps, reach = round(STEPS * seconds), SPEED * seconds
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (5,))
        self.action_space = gym.spaces.Box(-reach, reach, (2,))
        self.gait = load_gait()
        self.start = np.zeros(2) if self.maze is None else self.maze.centre(self.maze.start)
        self.qpos: list[np.ndarray] = []

    def reset(self, **kwargs: Any) -> Any:
        self.state, info = self.env.reset(**kwargs)
        # the walls are around where the ant begins
        self.n_left, self.qpos = self.n_decisions, [self._qpos()]
        self.distance = self._distance()
        return self._see(), info

    def step(self, action: Any) -> Any:
        before = self.distance
        fallen = self._run_to(self.place + action)
        self.n_left -= 1
        ended = fallen or self.is_there or self.n_left == 0
        return self._see(), before - self.distance - HURRY, ended, False, dict(success=self.is_there)

    def _run_to(self, place: np.ndarray) -> bool:
        """Run until it is there, at a goal or out of time; whether it fell."""
        for _ in range(self.n_steps):
            way = place - self.place
            if self.is_there or np.linalg.norm(way) < CLOSE:
                break
            # the gait knows no places
            turn = Turn(self.state[2:], float(np.arctan2(way[1], way[0])))
            self.state, _, unhealthy, _, _ = self.env.step(turn.action(self.gait(turn.observation(self.state[2:]))))
            self.qpos.append(self._qpos())
            self.distance = self._distance()
            if unhealthy or not is_upright(self.state[3:7]):
                return True
        return False

    @property
    def is_there(self) -> bool:
        """Whether it is at a goal."""
        return self.distance < (0.0 if self.maze is None else CELL / 2)

    @property
    def place(self) -> np.ndarray:
        """Where the torso is, shape (2,)."""
        return self.state[:2] + self.start

    @property
    def track(self) -> np.ndarray:
        """Where it has been in this episode, shape (n, 2)."""
        return np.array(self.qpos)[:, :2] + self.start

    def _see(self) -> np.ndarray:
        return np.concatenate([self.place, self.state[15:17], [self.n_left / self.n_decisions]]).astype(np.float32)

    def _distance(self) -> float:
        return RADIUS - float(np.linalg.norm(self.place)) if self.maze is None else self.maze.distance(self.place)

    def _qpos(self) -> np.ndarray:
        return self.unwrapped.data.qpos.copy()  # type: ignore[attr-defined]


def with_walls(maze: Maze, path: Path) -> Path:
    """Gymnasium's model of the ant, with the walls of a maze around where it begins."""
    tree = ElementTree.parse(Path(mujoco_env.__file__).parent / "assets" / "ant.xml")
    body = tree.find("worldbody")
    assert body is not None
    for cell in maze.walls:
        x, y = maze.centre(cell) - maze.centre(maze.start)
        geom = dict(type="box", pos=f"{x} {y} 0.5", size=f"{CELL / 2} {CELL / 2} 0.5", rgba="0.3 0.3 0.35 1", conaffinity="1")
        ElementTree.SubElement(body, "geom", geom)
    tree.write(path)
    return path


def film_ants(ants: Sequence[Ant], colours: np.ndarray, path: Path) -> None:
    """
    Animation of the last episode of each ant, all in one picture, from above: seven seconds, twice as fast. An ant whose
    episode ends before stays as it is.

    :param ants: Ants, in the same place
    :param colours: RGBA of each, shape (n_ants, 4)
    :param path: GIF to write
    """
    model = ants[0].unwrapped.model  # type: ignore[attr-defined]
    n_frames = 7 * STEPS
    qpos = np.array([(ant.qpos + ant.qpos[-1:] * n_frames)[:n_frames:2] for ant in ants])
    # without its pattern, which would take most of the colours that a GIF has
    model.geom("floor").matid, model.geom("floor").rgba[:] = -1, (0.6, 0.6, 0.6, 1.0)
    film(path, model, qpos, "torso", colours, dict(distance=28.0, azimuth=90.0, elevation=-89.0), STEPS)
