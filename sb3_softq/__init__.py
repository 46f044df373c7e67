"""Soft Q-learning for Stable-Baselines3."""

from sb3_softq import envs as envs
from sb3_softq.discrete import DiscreteSoftQ
from sb3_softq.options import SQL_2017, ParticleOptions
from sb3_softq.policies import CnnPolicy, MlpPolicy, MultiInputPolicy, SoftQPolicy
from sb3_softq.softq import SoftQ
from sb3_softq.version import __version__

__all__ = [
    "SQL_2017",
    "CnnPolicy",
    "DiscreteSoftQ",
    "MlpPolicy",
    "MultiInputPolicy",
    "ParticleOptions",
    "SoftQ",
    "SoftQPolicy",
    "__version__",
]
