"""Callbacks: pictures of an agent while it learns, and which of several goals it reaches."""

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback

from sb3_softq.checks import check_integer, check_type
from sb3_softq.envs.multi_goal import MultiGoalEnv, roll_out
from sb3_softq.plots import load_imageio

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def histogram_entropy(counts: np.ndarray) -> float:
    """
    :param counts: How often each of n things was seen
    :return: Entropy of the histogram in nats, log(n) if they are equally frequent
    """
    shares = counts[counts > 0] / max(counts.sum(), 1)
    # not -0.0 where there is one
    return abs(float((shares * np.log(shares)).sum()))


class PeriodicCallback(BaseCallback):
    """
    Do something every ``freq`` steps of a training, counted from its start, over all calls of ``learn`` that it consists of.

    :param freq: Number of steps
    :raises ValueError: if ``freq`` is not an integer >= 1
    """

    def __init__(self, freq: int):
        super().__init__()
        self.freq = check_integer("freq", freq, 1)
        self._next = 0

    def _on_training_start(self) -> None:
        # of another training, or of the same one that goes on
        if not self.num_timesteps < self._next <= self.num_timesteps + self.freq:
            self._next = self.num_timesteps + self.freq

    def _on_step(self) -> bool:
        # with several environments a step of all can jump over a multiple
        if self.num_timesteps >= self._next:
            self._next += self.freq
            # what is asked of the agent takes nothing from the random numbers of training
            with th.random.fork_rng([self.model.device] if self.model.device.type == "cuda" else []):
                self._on_period()
        return True

    @abstractmethod
    def _on_period(self) -> None:
        """What is done."""


class PlotCallback(PeriodicCallback):
    """
    Save a picture of the agent every ``freq`` steps, and an animation of all of them at the end.

    :param draw: Called with the agent; returns a figure (see :func:`sb3_softq.plots.new_figure`)
    :param folder: Where ``frame_<step>.png`` and ``animation.gif`` are written
    :param freq: Steps between two frames
    :param fps: Frames per second of the animation
    :raises ValueError: if ``freq`` or ``fps`` is not an integer >= 1
    :raises ImportError: without the extra ``extra``
    """

    def __init__(self, draw: Callable[[BaseAlgorithm], "Figure"], folder: str | Path, freq: int = 1000, fps: int = 5):
        super().__init__(freq)
        self.fps = check_integer("fps", fps, 1)
        # before training, not after it
        load_imageio()
        self.draw = draw
        self.folder = Path(folder)
        self.frames: list[Path] = []

    def _on_training_start(self) -> None:
        super()._on_training_start()
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.num_timesteps == 0:
            # another training, whose frames may have the names of the last one's
            self.frames = []

    def _on_training_end(self) -> None:
        iio = load_imageio()
        if self.frames:
            images = np.stack([iio.imread(frame)[..., :3] for frame in self.frames])
            iio.imwrite(self.folder / "animation.gif", images, duration=1000 / self.fps, loop=0)

    def _on_period(self) -> None:
        path = self.folder / f"frame_{self.num_timesteps:08d}.png"
        self.draw(self.model).savefig(path)
        self.frames.append(path)


class GoalCallback(PeriodicCallback):
    """
    Log which goals of :class:`sb3_softq.envs.MultiGoalEnv` the policy reaches: ``multi_goal/goals_reached``, how many of
    them; ``multi_goal/entropy``, of the histogram over the goals in nats, log(number of goals) if they are equally frequent;
    ``multi_goal/success_rate``, share of the rollouts that reach one.

    :param env: Goals and obstacles, a ``MultiGoalEnv`` or what ``gymnasium.make`` wraps around it
    :param freq: Steps between two measurements
    :param n_rollouts: Number of rollouts from the centre
    :raises ValueError: if ``freq`` or ``n_rollouts`` is not an integer >= 1, or ``env`` is another environment
    """

    def __init__(self, env: gym.Env[Any, Any], freq: int = 1000, n_rollouts: int = 100):
        super().__init__(freq)
        self.n_rollouts = check_integer("n_rollouts", n_rollouts, 1)
        check_type("env", env.unwrapped, (MultiGoalEnv,), "a MultiGoalEnv", optional=False)
        self.env = cast(MultiGoalEnv, env.unwrapped)

    def _on_period(self) -> None:
        goals = roll_out(self.model, self.env, self.n_rollouts)[1]
        counts = np.bincount(goals[goals >= 0], minlength=len(self.env.goals))
        self.logger.record("multi_goal/goals_reached", int((counts > 0).sum()))
        self.logger.record("multi_goal/entropy", histogram_entropy(counts))
        self.logger.record("multi_goal/success_rate", float(counts.sum() / self.n_rollouts))
