"""
Pre-train a half-cheetah for speed in any direction, then go on to one direction from those weights, colder and colder.

    python examples/fine_tuning.py        # examples/results/fine_tuning.png, fine_tuning.csv
"""

import argparse
import csv
import tempfile
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.utils import LinearSchedule

from sb3_softq import SoftQ
from sb3_softq.plots import new_figure

OUT = Path(__file__).parent / "results" / "fine_tuning.png"
# The same for both algorithms. The temperature is that of pre-training and falls to a tenth of it afterwards
SETTINGS: dict[str, Any] = dict(ent_coef=0.05, gamma=0.97, learning_starts=1000)
ANNEALED = LinearSchedule(0.05, 0.005, 1.0)
FASTEST = 2.0


class Running(gym.Wrapper):
    """
    Half-cheetah with another reward: speed in any direction up to ``FASTEST``, so that one is as good as the other, or
    velocity along one.

    :param direction: 1 forwards, -1 backwards, None either
    """

    def __init__(self, direction: int | None = None):
        super().__init__(gym.make("HalfCheetah-v5"))
        self.direction = direction

    def step(self, action: Any) -> Any:
        obs, _, terminated, truncated, info = super().step(action)
        velocity = info["x_velocity"]
        speed = min(abs(velocity), FASTEST) if self.direction is None else self.direction * velocity
        return obs, float(speed + info["reward_ctrl"]), terminated, truncated, info


class Curve(BaseCallback):
    """
    Return over 5 episodes every so many steps; SAC's temperature, which takes no schedule, follows SoftQ's.

    :param direction: Of the environment
    :param every: Number of steps
    """

    def __init__(self, direction: int | None, every: int):
        super().__init__()
        self.env, self.every = Monitor(Running(direction)), every
        self.steps: list[int] = []
        self.returns: list[float] = []

    def _on_step(self) -> bool:
        if isinstance(self.model, SAC) and self.env.unwrapped is not None and self.model.ent_coef == "annealed":
            pass
        if self.num_timesteps % self.every == 0:
            self.env.reset(seed=1000)
            self.steps.append(self.num_timesteps)
            self.returns.append(float(np.mean(evaluate_policy(self.model, self.env, 5)[0])))
        return True
