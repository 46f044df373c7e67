"""Episodes of an agent, several side by side."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy


class Episode(NamedTuple):
    """
    What happened in one episode of n steps.

    :param observations: Before each step, shape (n, ...)
    :param actions: Shape (n, ...)
    :param rewards: Shape (n,)
    :param terminated: Whether it terminated, or was cut off by a time limit
    :param info: Of the last step
    :param records: What ``record`` returned at the start and after each step, n + 1 values
    """

    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminated: bool
    info: dict[str, Any]
    records: list[Any]


def roll_out(
    model: BaseAlgorithm | BasePolicy,
    envs: Sequence[gym.Env],
    deterministic: bool = False,
    seed: int = 0,
    max_steps: float = float("inf"),
    record: Callable[[Any], Any] = lambda env: None,
) -> list[Episode]:
    """
    One episode in each environment, side by side: one call of the policy serves all that still run.

    :param model: Any agent or policy of Stable-Baselines3
    :param envs: Environments, each of its own
    :param deterministic: Whether to act deterministically
    :param seed: Seed of the first environment's reset; the others have those that follow
    :param max_steps: Longest episode, where the environments have no time limit
    :param record: Called with an environment at the start and after each step
    :return: The episodes
    """
    steps: list[list[tuple[Any, Any, Any]]] = [[] for _ in envs]
    terminated, infos = [False] * len(envs), [dict[str, Any]() for _ in envs]
    current = [env.reset(seed=seed + i)[0] for i, env in enumerate(envs)]
    records = [[record(env)] for env in envs]
    running = list(range(len(envs)))
    while running:
        actions, _ = model.predict(np.stack([current[i] for i in running]), deterministic=deterministic)
        still_running = []
        for i, action in zip(running, actions, strict=True):
            next_observation, reward, terminated[i], truncated, infos[i] = envs[i].step(action)
            steps[i].append((current[i], action, reward))
            records[i].append(record(envs[i]))
            current[i] = next_observation
            if not (terminated[i] or truncated) and len(steps[i]) < max_steps:
                still_running.append(i)
        running = still_running
    episodes = []
    for i, of_episode in enumerate(steps):
        observations, actions, rewards = (np.array(values) for values in zip(*of_episode, strict=True))
        episodes.append(Episode(observations, actions, rewards, terminated[i], infos[i], records[i]))
    return episodes
