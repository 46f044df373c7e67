"""Pictures of any agent: figures that need no screen, level curves of Q with the policy's samples."""

from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium import spaces

from sb3_softq.checks import check_type

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sb3_softq.softq import SoftQ


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


def load_imageio() -> ModuleType:
    """
    :return: ``imageio.v3``
    :raises ImportError: without imageio
    """
    try:
        import imageio.v3 as iio
    except ImportError as error:
        raise ImportError('animations and videos need imageio: pip install "sb3-softq[extra]"') from error
    return iio


def figure_to_array(figure: "Figure") -> np.ndarray:
    """
    :param figure: From :func:`new_figure`
    :return: Shape (height, width, 3), uint8
    """
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()  # type: ignore[attr-defined]


def check_dims(dims: Any, n_dims: int) -> tuple[int, int]:
    """
    :param dims: Two dimensions of the action
    :param n_dims: How many it has
    :return: The two
    :raises ValueError: if they are something else
    """
    if dims is None or len(dims) != 2 or dims[0] == dims[1] or not all(0 <= i < n_dims for i in dims):
        raise ValueError(
            f"dims={dims!r} is not allowed with {n_dims} action dimensions: it must name two of them, for instance (0, 1)"
        )
    return dims[0], dims[1]


def plot_level_curves(
    axes: "Axes",
    model: "SoftQ",
    obs: np.ndarray,
    dims: tuple[int, int] | None = None,
    n_samples: int = 200,
    n_grid: int = 60,
    modes: bool = False,
) -> None:
    """
    Level curves of Q(s, .) with the policy's samples at one state, as in figure 2 of https://arxiv.org/abs/1702.08165.

    :param axes: Where to draw
    :param model: Agent
    :param obs: One observation
    :param dims: Which two dimensions of the action to show; the others are those of the deterministic action
    :param n_samples: Number of samples
    :param n_grid: Points of the grid per axis
    :param modes: Whether to mark the modes of the policy, with their shares (:meth:`sb3_softq.SoftQ.modes`)
    :raises ValueError: if the action has not two dimensions and ``dims`` does not say which to show
    """
    check_type("model.action_space", model.action_space, (spaces.Box,), "a Box", optional=False)
    low, high = model.action_space.low.ravel(), model.action_space.high.ravel()
    if dims is None and len(low) == 2:
        dims = (0, 1)
    first, second = dims = check_dims(dims, len(low))
    centre = model.predict(obs, deterministic=True)[0].ravel()
    x, y = (np.linspace(low[i], high[i], n_grid) for i in dims)
    actions = np.tile(centre, (n_grid * n_grid, 1))
    actions[:, first], actions[:, second] = (grid.ravel() for grid in np.meshgrid(x, y))
    q_values = model.q_values(obs, actions.reshape(-1, *model.action_space.shape)).reshape(n_grid, n_grid)
    axes.contour(x, y, q_values, levels=20, cmap="viridis", linewidths=0.8)
    samples = model.sample_actions(obs, n_samples).reshape(n_samples, -1)
    axes.plot(samples[:, first], samples[:, second], ".", color="tab:red", markersize=3, alpha=0.6)
    if modes:
        for action, share in zip(*model.modes(obs), strict=True):
            x_and_y = tuple(action.ravel()[[first, second]])
            axes.plot(*x_and_y, "*", color="black", markersize=9)
            axes.annotate(f"{share:.0%}", x_and_y, xytext=(5, 5), textcoords="offset points")
    axes.set(xlim=(low[first], high[first]), ylim=(low[second], high[second]))


def draw_multi_goal(axes: "Axes", env: Any, paths: Sequence[np.ndarray] = (), alpha: float = 1.0) -> None:
    """``env.draw(axes, paths, alpha)``, by its name in release 0.1.0; see :meth:`sb3_softq.envs.MultiGoalEnv.draw`."""
    env.draw(axes, paths, alpha)


def draw_pusher(axes: "Axes", env: Any, pucks: np.ndarray, arms: np.ndarray) -> None:
    """``env.draw(axes, pucks, arms)``, by its name in release 0.1.0; see :meth:`sb3_softq.envs.pusher.Pusher2DEnv.draw`."""
    env.draw(axes, pucks, arms)
