"""Soft Q-learning for Stable-Baselines3."""

from sb3_softq import envs as envs
from sb3_softq.discrete import DiscreteSoftQ
from sb3_softq.policies import CnnPolicy, MlpPolicy, MultiInputPolicy, SoftQPolicy
from sb3_softq.softq import SoftQ
from sb3_softq.version import __version__

__all__ = ["CnnPolicy", "DiscreteSoftQ", "MlpPolicy", "MultiInputPolicy", "SoftQ", "SoftQPolicy", "__version__"]
