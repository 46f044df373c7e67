"""Batches of observations, which are tensors or Dicts of tensors, and what of them a features extractor gets."""

from typing import Any, TypeAlias

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BaseModel
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import PyTorchObs
from torch.nn import functional as F

# What becomes of a space's observations: numbers are divided by a float, an integer below n becomes a one-hot vector of n,
# several of them one beside the other; by key
Encoding: TypeAlias = "float | int | tuple[int, ...] | dict[str, Encoding]"


def encoding_of(space: spaces.Space[Any], normalize_images: bool = True) -> Encoding:
    """
    What Stable-Baselines3's ``preprocess_obs`` finds out of a space at every call, from arrays, of which ``torch.compile``
    makes no graph.

    :param space: Observation space
    :param normalize_images: Whether images are divided by 255
    :return: For :func:`encode`
    """
    if isinstance(space, spaces.Dict):
        return {key: encoding_of(part, normalize_images) for key, part in space.spaces.items()}
    if isinstance(space, spaces.Discrete):
        return int(space.n)
    if isinstance(space, spaces.MultiDiscrete):
        return tuple(map(int, space.nvec))
    return 255.0 if normalize_images and is_image_space(space) else 1.0


def encode(obs: PyTorchObs, encoding: Encoding) -> PyTorchObs:
    """
    :param obs: Observations
    :param encoding: From :func:`encoding_of`
    :return: What a features extractor gets, as from ``preprocess_obs``: of float32
    """
    if isinstance(encoding, dict):
        assert isinstance(obs, dict)
        return {key: encode(value, encoding[key]) for key, value in obs.items()}  # type: ignore[misc]
    assert isinstance(obs, th.Tensor)
    if isinstance(encoding, tuple):
        columns = obs.long().unbind(dim=1)
        return th.cat([F.one_hot(x, n) for x, n in zip(columns, encoding, strict=True)], dim=1).float()
    if isinstance(encoding, int):
        return F.one_hot(obs.long(), encoding).float()
    return obs.float() / encoding if encoding != 1.0 else obs.float()


class Observer(BaseModel):
    """A network of observations, whose updates can be compiled with them."""

    encoding: Encoding

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.encoding = encoding_of(self.observation_space, self.normalize_images)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.encoding = encoding_of(self.observation_space, self.normalize_images)

    def extract_features(self, obs: PyTorchObs, features_extractor: BaseFeaturesExtractor) -> th.Tensor:
        return features_extractor(encode(obs, self.encoding))


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
