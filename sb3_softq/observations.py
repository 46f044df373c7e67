"""Batches of observations, which are tensors or Dicts of tensors."""

import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs


def batch_size(obs: PyTorchObs) -> int:
    """
    :param obs: Observations
    :return: How many they are
    """
    return len(next(iter(obs.values())) if isinstance(obs, dict) else obs)


def rows(obs: PyTorchObs, index: int | slice | th.Tensor) -> PyTorchObs:
    """
    :param obs: Observations
    :param index: Which of them
    :return: Those observations
    """
    return {key: value[index] for key, value in obs.items()} if isinstance(obs, dict) else obs[index]


def evenly_spaced(obs: PyTorchObs, n: int) -> PyTorchObs:
    """
    :param obs: Observations of a minibatch
    :param n: How many at most
    :return: n of them, evenly spaced: HerReplayBuffer has those with goals of its own at the end
    """
    size = batch_size(obs)
    if n >= size:
        return obs
    device = next(iter(obs.values())).device if isinstance(obs, dict) else obs.device
    # there, since CUDA waits for an index that comes from elsewhere
    return rows(obs, th.arange(n, device=device) * size // n)
