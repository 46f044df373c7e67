"""Multi-goal: a point in the plane and several goals that are equally good."""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_softq import rollouts
from sb3_softq.checks import check_choice, check_number
from sb3_softq.plots import figure_to_array, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GOALS = ((5.0, 0.0), (-5.0, 0.0), (0.0, 5.0), (0.0, -5.0))
# Half the width of the plane
SIZE = 7.0
GOAL_RADIUS = 1.0
ACTION_COST = 30.0
# Of goals and the paths to them
COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:olive")


class MultiGoalEnv(gym.Env[np.ndarray, np.ndarray]):
    """
    A point starts near the centre of a square of width 14 and moves by its action, at most 1 per axis and step, see section
    5.1 of https://arxiv.org/abs/1702.08165. The reward is

        r = -|distance to the nearest goal|^2 - 30 |a|^2 + (reward of the goal, where one is reached),

    a goal is reached, and the episode over, within a distance of 1. Registered as ``sb3_softq/MultiGoal-v0``, with 30 steps
    at most. Observation: position, shape (2,). ``info`` of the last step: ``goal``, index of the goal reached, or -1.

    :param goals: Positions of the goals
    :param goal_rewards: Reward of reaching a goal, one for all or one for each
    :param obstacles: Rectangles (x_min, y_min, x_max, y_max) that the point cannot enter: it stays where it was
    :param start_std: Standard deviation of the first position around the centre
    :param render_mode: ``"rgb_array"`` or None
    :raises ValueError: if a goal or an obstacle does not lie in the square, or an argument has another form
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(
        self,
        goals: Sequence[Sequence[float]] = GOALS,
        goal_rewards: float | Sequence[float] = 10.0,
        obstacles: Sequence[Sequence[float]] = (),
        start_std: float = 0.1,
        render_mode: str | None = None,
    ):
        self.goals = _numbers("goals", goals, 2)
        if len(self.goals) == 0:
            raise ValueError(f"goals={goals!r} is not allowed: it must hold at least one position")
        self.obstacles = _numbers("obstacles", obstacles, 4)
        if (self.obstacles[:, :2] >= self.obstacles[:, 2:]).any():
            raise ValueError(f"obstacles={obstacles!r} is not allowed: it must be x_min < x_max, y_min < y_max in each")
        if ((self.obstacles[:, :2] < 0.0) & (self.obstacles[:, 2:] > 0.0)).all(axis=1).any():
            raise ValueError(f"obstacles={obstacles!r} is not allowed: it must leave the centre free, where the point starts")
        rewards = np.asarray(goal_rewards, dtype=np.float64)
        if rewards.shape not in ((), (len(self.goals),)) or not np.isfinite(rewards).all():
            raise ValueError(f"goal_rewards={goal_rewards!r} is not allowed: it must be a finite number, or one for each goal")
        self.goal_rewards = np.broadcast_to(rewards, (len(self.goals),))
        check_number("start_std", start_std, 0.0)
        if render_mode is not None:
            check_choice("render_mode", render_mode, self.metadata["render_modes"])
        self.start_std = start_std
        self.render_mode = render_mode
        self.observation_space = spaces.Box(-SIZE, SIZE, (2,), dtype=np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (2,), dtype=np.float32)
        self.path: list[np.ndarray] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.position = np.clip(self.start_std * self.np_random.standard_normal(2), -SIZE, SIZE)
        self.path = [self.position]
        return self.position.astype(np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        action = np.clip(np.asarray(action, dtype=np.float64), -1.0, 1.0)
        new = np.clip(self.position + action, -SIZE, SIZE)
        if not self._is_blocked(self.position, new):
            self.position = new
        self.path.append(self.position)
        distances = np.linalg.norm(self.goals - self.position, axis=1)
        nearest = int(distances.argmin())
        terminated = bool(distances[nearest] < GOAL_RADIUS)
        reward = -(distances[nearest] ** 2) - ACTION_COST * (action**2).sum() + terminated * self.goal_rewards[nearest]
        return self.position.astype(np.float32), float(reward), terminated, False, {"goal": nearest if terminated else -1}

    def _is_blocked(self, old: np.ndarray, new: np.ndarray) -> bool:
        """Whether the way from one position to another passes through an obstacle."""
        way = old + np.linspace(0.0, 1.0, 11)[1:, None] * (new - old)
        low, high = self.obstacles[:, None, :2], self.obstacles[:, None, 2:]
        return bool(((way > low) & (way < high)).all(axis=2).any())

    def render(self) -> np.ndarray | None:
        """
        :return: The plane with the way so far, shape (400, 400, 3), uint8
        :raises ImportError: without the extra ``extra``, which brings matplotlib
        """
        if self.render_mode is None:
            return None
        figure, axes = new_figure(4.0, 4.0)
        axes.set_position((0.0, 0.0, 1.0, 1.0))
        axes.set_axis_off()
        self.draw(axes, [np.array(self.path)])
        return figure_to_array(figure)

    def draw(self, axes: "Axes", paths: Sequence[np.ndarray] = (), alpha: float = 1.0) -> None:
        """
        Rollouts over the contours of the reward, each in the colour of the goal that it ends at.

        :param axes: Where to draw
        :param paths: Positions, shape (n_steps, 2) each
        :param alpha: Opacity of a path
        """
        from matplotlib.patches import Circle, Rectangle

        grid = np.linspace(-SIZE, SIZE, 101)
        x, y = np.meshgrid(grid, grid)
        distances = np.linalg.norm(np.stack([x, y], axis=-1)[:, :, None] - self.goals, axis=-1).min(axis=-1)
        axes.contour(x, y, -(distances**2), levels=14, cmap="Greys_r", linewidths=0.5, alpha=0.6)
        for x_min, y_min, x_max, y_max in self.obstacles:
            axes.add_patch(Rectangle((x_min, y_min), x_max - x_min, y_max - y_min, color="0.3", zorder=2))
        for goal, colour in zip(self.goals, COLOURS * len(self.goals), strict=False):
            axes.add_patch(Circle((goal[0], goal[1]), 1.0, facecolor=colour, alpha=0.25, zorder=1))
        for path in paths:
            to_goals = np.linalg.norm(self.goals - path[-1], axis=1)
            colour = COLOURS[int(to_goals.argmin()) % len(COLOURS)] if to_goals.min() < 1.0 else "0.4"
            axes.plot(path[:, 0], path[:, 1], color=colour, alpha=alpha, linewidth=1.0)
            axes.plot(*path[-1], "o", color=colour, alpha=alpha, markersize=3)
        axes.set(xlim=(-SIZE, SIZE), ylim=(-SIZE, SIZE), aspect="equal")


def _numbers(name: str, values: Sequence[Sequence[float]], n: int) -> np.ndarray:
    """Points or rectangles as an array, shape (len(values), n)."""
    try:
        array = np.asarray(values, dtype=np.float64).reshape(len(values), n)
    except (TypeError, ValueError):
        array = np.array([[np.nan]])
    if not (np.abs(array) <= SIZE).all():
        raise ValueError(f"{name}={values!r} is not allowed: it must hold {n} numbers each, between -{SIZE} and {SIZE}")
    return array


def roll_out(
    model: BaseAlgorithm, env: MultiGoalEnv, n_rollouts: int, seed: int = 0, deterministic: bool = False, n_steps: int = 30
) -> tuple[list[np.ndarray], np.ndarray]:
    """
    Rollouts from the centre, side by side: one call of the policy serves all that still run.

    :param model: Any agent of Stable-Baselines3
    :param env: Goals and obstacles
    :param n_rollouts: Number of rollouts
    :param seed: Seed of the first positions
    :param deterministic: Whether to act deterministically
    :param n_steps: Longest rollout
    :return: Positions of each, and the goal each one reached, -1 for none, shape (n_rollouts,)
    """
    envs = [copy.copy(env) for _ in range(n_rollouts)]
    episodes = rollouts.roll_out(model, envs, deterministic, seed, n_steps)
    return [np.array(e.path) for e in envs], np.array([episode.info["goal"] for episode in episodes])
