"""Pictures of what an agent does: rollouts in the plane, and level curves of Q with the policy's samples."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium import spaces

from sb3_softq.checks import check_type
from sb3_softq.envs.multi_goal import SIZE, MultiGoalEnv
from sb3_softq.softq import SoftQ

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sb3_softq.envs.pusher import Pusher2DEnv

# Of goals and their rollouts
COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:olive")


def new_figure(width: float, height: float, n_columns: int = 1, n_rows: int = 1) -> tuple["Figure", Any]:
    """
    A figure that needs no screen and leaves matplotlib's global state alone.

    :param width: Inches
    :param height: Inches
    :param n_columns: Number of axes, side by side
    :param n_rows: Number of axes, one above the other
    :return: Figure, and its axes (an array if there are several)
    :raises ImportError: without matplotlib
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('figures need matplotlib: pip install "sb3-softq[extra]"') from error
    figure = Figure(figsize=(width, height), dpi=100)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(n_rows, n_columns)


def figure_to_array(figure: "Figure") -> np.ndarray:
    """
    :param figure: From :func:`new_figure`
    :return: Shape (height, width, 3), uint8
    """
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()  # type: ignore[attr-defined]


def draw_multi_goal(axes: "Axes", env: MultiGoalEnv, paths: Sequence[np.ndarray] = (), alpha: float = 1.0) -> None:
    """
    Rollouts over the contours of the reward, each in the colour of the goal that it ends at.

    :param axes: Where to draw
    :param env: Has goals and obstacles
    :param paths: Positions, shape (n_steps, 2) each
    :param alpha: Opacity of a path
    """
    from matplotlib.patches import Circle, Rectangle

    grid = np.linspace(-SIZE, SIZE, 101)
    x, y = np.meshgrid(grid, grid)
    distances = np.linalg.norm(np.stack([x, y], axis=-1)[:, :, None] - env.goals, axis=-1).min(axis=-1)
    axes.contour(x, y, -(distances**2), levels=14, cmap="Greys_r", linewidths=0.5, alpha=0.6)
    for x_min, y_min, x_max, y_max in env.obstacles:
        axes.add_patch(Rectangle((x_min, y_min), x_max - x_min, y_max - y_min, color="0.3", zorder=2))
    for goal, colour in zip(env.goals, COLOURS * len(env.goals), strict=False):
        axes.add_patch(Circle((goal[0], goal[1]), 1.0, facecolor=colour, alpha=0.25, zorder=1))
    for path in paths:
        to_goals = np.linalg.norm(env.goals - path[-1], axis=1)
        colour = COLOURS[int(to_goals.argmin()) % len(COLOURS)] if to_goals.min() < 1.0 else "0.4"
        axes.plot(path[:, 0], path[:, 1], color=colour, alpha=alpha, linewidth=1.0)
        axes.plot(*path[-1], "o", color=colour, alpha=alpha, markersize=3)
    axes.set(xlim=(-SIZE, SIZE), ylim=(-SIZE, SIZE), aspect="equal")


def plot_level_curves(
    axes: "Axes", model: SoftQ, obs: np.ndarray, dims: tuple[int, int] | None = None, n_samples: int = 200, n_grid: int = 60
) -> None:
    """
    Level curves of Q(s, .) with the policy's samples at one state, as in figure 2 of https://arxiv.org/abs/1702.08165.

    :param axes: Where to draw
    :param model: Agent
    :param obs: One observation
    :param dims: Which two dimensions of the action to show; the others are those of the deterministic action
    :param n_samples: Number of samples
    :param n_grid: Points of the grid per axis
    :raises ValueError: if the action has not two dimensions and ``dims`` does not say which to show
    """
    check_type("model.action_space", model.action_space, (spaces.Box,), "a Box", optional=False)
    low, high = model.action_space.low.ravel(), model.action_space.high.ravel()
    if dims is None and len(low) == 2:
        dims = (0, 1)
    if dims is None or len(dims) != 2 or dims[0] == dims[1] or not all(0 <= i < len(low) for i in dims):
        raise ValueError(
            f"dims={dims!r} is not allowed with {len(low)} action dimensions: it must name two of them, for instance (0, 1)"
        )
    first, second = dims
    centre = model.predict(obs, deterministic=True)[0].ravel()
    x, y = (np.linspace(low[i], high[i], n_grid) for i in dims)
    actions = np.tile(centre, (n_grid * n_grid, 1))
    actions[:, first], actions[:, second] = (grid.ravel() for grid in np.meshgrid(x, y))
    q_values = model.q_values(obs, actions.reshape(-1, *model.action_space.shape)).reshape(n_grid, n_grid)
    axes.contour(x, y, q_values, levels=20, cmap="viridis", linewidths=0.8)
    samples = model.sample_actions(obs, n_samples).reshape(n_samples, -1)
    axes.plot(samples[:, first], samples[:, second], ".", color="tab:red", markersize=3, alpha=0.6)
    axes.set(xlim=(low[first], high[first]), ylim=(low[second], high[second]))


def draw_pusher(axes: "Axes", env: "Pusher2DEnv", pucks: np.ndarray, arms: np.ndarray) -> None:
    """
    The way of the puck, seen from above, with the arm at the beginning (grey) and at the end, and the goal: a point, or the
    line of all points that have the coordinate that is given.

    :param axes: Where to draw
    :param env: Has the goal
    :param pucks: Positions of the puck, shape (n_steps, 2)
    :param arms: Positions of the joints and the fingertip, shape (n_steps, 4, 2)
    """
    from matplotlib.patches import Circle

    if env.goal_x is not None and env.goal_y is not None:
        axes.plot(env.goal_x, env.goal_y, "*", color="tab:green", markeredgecolor="white", markersize=16, zorder=6)
    elif env.goal_x is not None:
        axes.axvline(env.goal_x, color="tab:green", linestyle="--", zorder=1)
    elif env.goal_y is not None:
        axes.axhline(env.goal_y, color="tab:green", linestyle="--", zorder=1)
    for i, colour, alpha in ((0, "0.6", 0.5), (-1, "tab:blue", 0.8)):
        axes.plot(*arms[i].T, "o-", color=colour, alpha=alpha, linewidth=4, markersize=5, solid_capstyle="round", zorder=2)
        axes.add_patch(Circle((pucks[i][0], pucks[i][1]), 0.12, color="tab:red", alpha=alpha, zorder=3))
    axes.plot(*pucks.T, color="tab:red", linewidth=1.5, zorder=4)
    axes.set(xlim=(-1.7, 0.9), ylim=(-1.7, 0.9), aspect="equal")
