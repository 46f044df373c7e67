"""Environments of soft Q-learning, registered with gymnasium when ``sb3_softq`` is imported."""

from gymnasium.envs.registration import register

from sb3_softq.envs.multi_goal import MultiGoalEnv
from sb3_softq.envs.pusher import Pusher2DEnv

register(id="sb3_softq/MultiGoal-v0", entry_point="sb3_softq.envs.multi_goal:MultiGoalEnv", max_episode_steps=30)
register(id="sb3_softq/Pusher2D-v0", entry_point="sb3_softq.envs.pusher:Pusher2DEnv", max_episode_steps=100)

__all__ = ["MultiGoalEnv", "Pusher2DEnv"]
