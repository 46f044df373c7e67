"""Environments of a training that others use too, for an evaluation on the very environment that is learned in."""

import pickle
from collections.abc import Iterator
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.wrappers import PassiveEnvChecker
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_softq.checkpointing.env_state import NO_STATE, WINDOW, layers_of
from sb3_softq.faults import check_step, restore_statistics, statistics
from sb3_softq.finite import check_finite
from sb3_softq.replay import end_trajectory
from sb3_softq.saving import SafelySaved

# Attributes that are no part of what a step or a reset does
_NOT_TRACED = NO_STATE | WINDOW
# The clock of gymnasium's TimeLimit, steps and this episode's rewards of Stable-Baselines3's Monitor
_COUNTED = ("_elapsed_steps", "total_steps", "rewards")


def check_not_shared(eval_env: VecEnv, env: VecEnv | None) -> None:
    """
    :param eval_env: Environments of an evaluation during training
    :param env: Those of the training
    :raises ValueError: if one is among both: after an evaluation it would be elsewhere than the agent believes
    """
    if env is not None and _identities(eval_env) & _identities(env):
        raise ValueError(f"eval_env={eval_env!r} with an environment of the training is not allowed: it must have its own")


class Trace(NamedTuple):
    """
    What a reset or a step replaces, whoever makes it.

    :param by_steps: And nothing else does: what the last reset has returned; of environments of this process, the state of the
        generator of random numbers and what wrappers count
    :param by_anyone: All attributes of those environments; a callback may set one, such as a difficulty
    """

    by_steps: list[Any]
    by_anyone: list[Any]


def trace(env: VecEnv, in_training: bool = False) -> Trace:
    """
    :param env: Environments, in wrappers or not
    :param in_training: Whether callbacks may set attributes, which are left out then
    :return: For :func:`is_as_left`
    """
    found = Trace(list(getattr(env.unwrapped, "reset_infos", ())), [])
    for layers in _layers(env):
        for layer in layers:
            attributes = getattr(layer, "__dict__", {})
            found.by_steps.extend(attributes[name] for name in _COUNTED if name in attributes)
            if not in_training and not isinstance(layer, PassiveEnvChecker):
                found.by_anyone.extend(value for name, value in attributes.items() if name not in _NOT_TRACED)
        generator = getattr(getattr(layers[-1], "_np_random", None), "bit_generator", None)
        found.by_steps.append(None if generator is None else pickle.dumps(generator.state))
    return found


def is_as_left(env: VecEnv | None, before: Trace | None, in_training: bool = False) -> bool:
    """
    :param env: Environments
    :param before: Their :func:`trace` of then, None if there is none
    :param in_training: Whether callbacks may have set attributes since
    :return: Whether nobody has stepped or reset one since, as far as that can be seen
    """
    if env is None or before is None:
        return True
    now = trace(env, in_training)
    return _are_same(now.by_steps, before.by_steps) and (in_training or _are_same(now.by_anyone, before.by_anyone))


class OwnEpisodes(SafelySaved):
    """
    Off-policy algorithm whose trajectories are those of its environments where others use them too: a callback that evaluates
    on them, or anybody between two calls of ``learn``. It begins another episode then.
    """

    # The trace of the environments when they were last known to be where the agent believes
    _left: Trace | None = None
    # Whether a callback has used them in the step that is about to be stored
    _is_disturbed = False

    def _begin_episode_if_shared(self) -> None:
        if not is_as_left(self.env, self._left, in_training=True):
            self._begin_episode()

    def _begin_episode(self) -> None:
        """Where somebody else has stepped or reset the environments."""
        assert self.env is not None
        assert self.replay_buffer is not None
        end_trajectory(self.replay_buffer)
        self._last_obs = self.env.reset()  # type: ignore[assignment]
        if self._vec_normalize_env is not None:
            self._last_original_obs = self._vec_normalize_env.get_original_obs()
        if self.action_noise is not None:
            self.action_noise.reset()
        self._episode_has_begun()

    def _episode_has_begun(self) -> None:
        assert self.env is not None
        self._left, self._is_disturbed = trace(self.env), False
        first_obs = self._last_obs if self._vec_normalize_env is None else self._last_original_obs
        check_step(first_obs, np.zeros(self.n_envs), np.zeros(self.n_envs), [], self.observation_space, self.num_timesteps)
        check_finite("first observation", first_obs, self.num_timesteps, space=self.observation_space)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_left", "_is_disturbed"]


class Attended(BaseCallback):
    """
    The callback of a rollout, after which an agent looks for its environments.

    :param callback: It is told what Stable-Baselines3 tells this one
    :param agent: Agent that collects the rollout
    """

    def __init__(self, callback: BaseCallback, agent: OwnEpisodes):
        super().__init__()
        self.callback, self.agent = callback, agent

    def update_locals(self, locals_: dict[str, Any]) -> None:
        self.callback.update_locals(locals_)

    def on_rollout_start(self) -> None:
        self.callback.on_rollout_start()
        self.agent._begin_episode_if_shared()

    def on_step(self) -> bool:
        agent, normalize = self.agent, self.agent._vec_normalize_env
        assert agent.env is not None
        agent._left = trace(agent.env, in_training=True)
        scales, raw = statistics(normalize), (normalize.old_obs, normalize.old_reward) if normalize is not None else None
        goes_on = self.callback.on_step()
        agent._is_disturbed = not is_as_left(agent.env, agent._left, in_training=True)
        if agent._is_disturbed and normalize is not None and raw is not None:
            # the step is stored afterwards
            restore_statistics(scales)
            normalize.old_obs, normalize.old_reward = raw
        return goes_on

    def on_rollout_end(self) -> None:
        self.callback.on_rollout_end()

    def _on_step(self) -> bool:
        return True


def _are_same(now: list[Any], before: list[Any]) -> bool:
    return len(now) == len(before) and all(map(_is_same, now, before))


def _is_same(now: Any, before: Any) -> bool:
    return now is before or (isinstance(now, int | float | bytes) and type(now) is type(before) and now == before)


def _identities(env: VecEnv) -> set[int]:
    return {id(env.unwrapped), *(id(layers[-1]) for layers in _layers(env))}


def _layers(env: VecEnv) -> Iterator[list[gym.Env]]:
    """Of each environment of a ``DummyVecEnv``, from its outermost wrapper on."""
    inner = env.unwrapped
    for each in inner.envs if isinstance(inner, DummyVecEnv) else ():
        yield list(layers_of(each))
