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

    :param observations: Before each step, as the environment returns them, shape (n, ...), or a dict of such arrays
    :param actions: Shape (n, ...)
    :param rewards: Shape (n,)
    :param terminated: Whether it terminated, or was cut off by a time limit
    :param info: Of the last step
    :param records: What ``record`` returned at the start and after each step, n + 1 values
    """

    observations: Any
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

    :param model: Any agent or policy of Stable-Baselines3; an agent's VecNormalize normalises what it sees
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
    # policies have none
    normalize = getattr(model, "get_vec_normalize_env", lambda: None)()
    while running:
        seen = stack([current[i] for i in running])
        actions, _ = model.predict(seen if normalize is None else normalize.normalize_obs(seen), deterministic=deterministic)
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
        seen, taken, rewards = zip(*of_episode, strict=True)
        arrays = stack(seen), np.array(taken), np.array(rewards)
        episodes.append(Episode(*arrays, terminated[i], infos[i], records[i]))
    return episodes


def stack(observations: Sequence[Any]) -> Any:
    """
    :param observations: One of each state
    :return: All as one array with an axis of states first, or as a dict of such arrays
    """
    if isinstance(observations[0], dict):
        return {key: np.stack([observation[key] for observation in observations]) for key in observations[0]}
    return np.stack(observations)
