"""MinAtar (Young & Tian 2019, https://arxiv.org/abs/1903.03176): small games of Atari, and the network for all algorithms."""

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

# MinAtar has no limit, and a player of Breakout that has learned it goes on for ever
LONGEST_GAME = 2_500


class Channels(gym.ObservationWrapper):
    """Channels first, as numbers."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        assert env.observation_space.shape is not None
        height, width, n_channels = env.observation_space.shape
        self.observation_space = gym.spaces.Box(0.0, 1.0, (n_channels, height, width), np.float32)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        return observation.transpose(2, 0, 1).astype(np.float32)


def make_minatar(env_id: str) -> gym.Env:
    """
    :param env_id: For instance ``MinAtar/Breakout-v1``
    :return: The game, of the extra ``discrete``
    """
    try:
        from minatar.gym import register_envs
    except ImportError as error:
        raise ImportError(f'{env_id} needs MinAtar: pip install "sb3-softq[discrete]"') from error
    if env_id not in gym.registry:
        register_envs()
    return gym.wrappers.TimeLimit(Channels(gym.make(env_id, disable_env_checker=True)), LONGEST_GAME)


class MinAtarCNN(BaseFeaturesExtractor):
    """
    The network of MinAtar's authors: 16 filters of 3x3, then 128 units.

    :param observation_space: Of the game
    """

    def __init__(self, observation_space: gym.spaces.Box):
        super().__init__(observation_space, 128)
        n_channels, height, width = observation_space.shape
        self.layers = nn.Sequential(
            nn.Conv2d(n_channels, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * (height - 2) * (width - 2), 128), nn.ReLU()
        )

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.layers(observations)
