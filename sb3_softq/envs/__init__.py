"""Environments of soft Q-learning, registered with gymnasium when ``sb3_softq`` is imported."""

from gymnasium.envs.registration import register

from sb3_softq.envs.multi_goal import MultiGoalEnv

register(id="sb3_softq/MultiGoal-v0", entry_point="sb3_softq.envs.multi_goal:MultiGoalEnv", max_episode_steps=30)
# not imported here: MuJoCo cannot be imported where the OpenGL of MUJOCO_GL is missing, and few need it
register(id="sb3_softq/Pusher2D-v0", entry_point="sb3_softq.envs.pusher:Pusher2DEnv", max_episode_steps=60)

__all__ = ["MultiGoalEnv"]
