"""Trainings from hot to a temperature, with algorithms that take a number alone, too; and on where something has changed."""

from typing import Any

import gymnasium as gym
import torch as th
from peers import ALGORITHMS, compiled
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import LinearSchedule

from sb3_softq import SoftQ


class Cooling(BaseCallback):
    """
    Give SAC and CrossQ the temperatures of a schedule, which SoftQ takes as ``ent_coef``.

    :param schedule: Temperature by the progress that remains
    """

    def __init__(self, schedule: Schedule):
        super().__init__()
        self.schedule = schedule

    def _on_step(self) -> bool:
        if not isinstance(self.model, SoftQ):
            temperature = self.schedule(self.model._current_progress_remaining)
            self.model.ent_coef_tensor = th.tensor(temperature)  # type: ignore[attr-defined]
        return True


def train(
    name: str, env: gym.Env, n_steps: int, temperatures: tuple[float, float], compile: bool, **settings: Any
) -> OffPolicyAlgorithm:
    """
    :param name: Name in ``peers.ALGORITHMS``
    :param env: Environment
    :param n_steps: Length of the training
    :param temperatures: At its begin, and from its half on
    :param compile: Whether SoftQ is compiled
    :param settings: Further arguments of the algorithm
    :return: The trained agent
    """
    cls, kwargs = ALGORITHMS[name]
    schedule = LinearSchedule(*temperatures, 0.5)
    ent_coef = schedule if cls is SoftQ else temperatures[1]
    agent = cls("MlpPolicy", env, ent_coef=ent_coef, **settings | kwargs | compiled(name, compile))
    return agent.learn(n_steps, Cooling(schedule))


def go_on(agent: OffPolicyAlgorithm, env: gym.Env, n_steps: int) -> None:
    """Train on in an environment that has changed: nothing remembered says what is no longer so."""
    agent.set_env(env)
    assert agent.replay_buffer is not None
    agent.replay_buffer.reset()
    agent.learn(n_steps, reset_num_timesteps=False)
