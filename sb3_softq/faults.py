"""Environments that fail in training: what they raise, and what they return that they had not declared."""

import signal
import time
import traceback
from collections.abc import Iterator
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EventCallback
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecNormalize
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs

# Seconds until the system has told of the end of a process whose pipe is closed
PROCESS_END = 5.0


class FaultyEnvironmentError(RuntimeError):
    """An environment raised, ended or returned what cannot be stored; what it raised is the cause of this."""


class CheckedDummyVecEnv(DummyVecEnv):
    """A ``DummyVecEnv`` that refuses an observation of another shape than its space, which SB3's broadcasts in silence."""

    def _save_obs(self, env_idx: int, obs: VecEnvObs) -> None:
        # this alone is what an observation costs that is as it should be
        if not isinstance(obs, np.ndarray) or obs.shape != self.observation_space.shape:
            problem = wrong_shape(obs, self.observation_space)
            if problem:
                raise ValueError(problem)
        super()._save_obs(env_idx, obs)


def check_shapes(env: VecEnv) -> None:
    """
    Let observations be checked where they are stored for the first time, which is too late to do afterwards.

    :param env: Environments; nothing happens unless they are, within their wrappers, a ``DummyVecEnv``
    """
    inner = env.unwrapped
    if type(inner) is DummyVecEnv:
        # in place: the user, and wrappers, hold it too
        inner.__class__ = CheckedDummyVecEnv


def wrong_shape(obs: Any, space: spaces.Space[Any], n_envs: int | None = None) -> str | None:
    """
    :param obs: Observation, as an environment may return it, or those of all environments
    :param space: Its space
    :param n_envs: Number of environments whose observations are stacked, None for a single one
    :return: What is wrong with it, None if nothing is
    """
    if isinstance(space, spaces.Dict):
        if not hasattr(obs, "keys"):
            return f"the observation is {_short(obs)}, it must be a dict with the keys {list(space.spaces)}"
        missing = [key for key in space.spaces if key not in obs]
        if missing:
            return f"the observation has no {missing[0]!r}, it must have the keys {list(space.spaces)}"
        problems = (wrong_shape(obs[key], part, n_envs) for key, part in space.spaces.items())
        return next((f"{key!r} of {problem}" for key, problem in zip(space.spaces, problems, strict=True) if problem), None)
    if space.shape is None:
        return None
    if obs is None:
        return f"the observation is None, it must have the shape {space.shape}"
    expected = space.shape if n_envs is None else (n_envs, *space.shape)
    try:
        shape = tuple(np.shape(obs))
    except ValueError:
        return f"the observation is {_short(obs)}, it must have the shape {expected}"
    return (
        None if shape == expected else f"the observation has the shape {shape}, it must be {expected} (its space is {space})"
    )


def check_step(
    obs: Any, rewards: Any, dones: np.ndarray, infos: list[dict[str, Any]], space: spaces.Space[Any], num_timesteps: int
) -> None:
    """
    :param obs: Observations of all environments
    :param rewards: Their rewards
    :param dones: Whose episodes have ended
    :param infos: With their last observations
    :param space: Observation space
    :param num_timesteps: Number of steps so far
    :raises FaultyEnvironmentError: if an observation or a reward has another shape than it must have
    """
    n_envs = len(dones)
    if not isinstance(obs, np.ndarray) or obs.shape[1:] != space.shape or len(obs) != n_envs:
        problem = wrong_shape(obs, space, n_envs)
        if problem:
            raise FaultyEnvironmentError(f"The environments failed at step {num_timesteps}: {problem}")
    if np.shape(rewards) != (n_envs,) and np.size(rewards) != n_envs:
        raise FaultyEnvironmentError(
            f"The environments failed at step {num_timesteps}: the rewards have the shape {np.shape(rewards)}, it must be "
            f"{(n_envs,)}, a number of each environment"
        )
    for env_idx in np.flatnonzero(dones):
        if "terminal_observation" in infos[env_idx]:
            # a vectorized environment hands it on as it came
            problem = wrong_shape(infos[env_idx]["terminal_observation"], space)
            if problem:
                raise FaultyEnvironmentError(f"Environment {env_idx} failed at step {num_timesteps}: {problem}")


def explain(error: Exception, env: VecEnv, num_timesteps: int) -> FaultyEnvironmentError | None:
    """
    :param error: Raised while data were collected, or in an evaluation meanwhile
    :param env: Environments of the training
    :param num_timesteps: Number of steps that they have made
    :return: An error that names the environment and the step, None if it was no environment that failed
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    inside = [frame for frame in frames if isinstance(frame.f_locals.get("self"), VecEnv)]
    if not inside:
        return None
    outer: VecEnv = inside[0].f_locals["self"]
    index: int | None = getattr(getattr(error, "cause", error), "env_idx", None)
    what = f"{type(error).__name__}: {error}"
    for frame in inside:
        if index is None and isinstance(frame.f_locals["self"], DummyVecEnv):
            index = frame.f_locals.get("env_idx")
    workers = outer.unwrapped
    if isinstance(workers, SubprocVecEnv):
        if isinstance(error, EOFError | OSError):
            index, what = _ended_process(workers) or (index, what)
        results = [frame.f_locals["results"] for frame in inside if "results" in frame.f_locals]
        if results:
            index, what = _unlike_the_others(results[0], workers.observation_space) or (index, what)
    name = "An environment" if index is None else f"Environment {index}"
    if outer.unwrapped is not env.unwrapped:
        return FaultyEnvironmentError(f"{name} of an evaluation failed at step {num_timesteps}: {what}")
    # the step that it did not make
    step = num_timesteps + (env.num_envs if inside[0].f_code.co_name == "step" else 0)
    return FaultyEnvironmentError(f"{name} failed at step {step}: {what}")


def _ended_process(workers: SubprocVecEnv) -> tuple[int, str] | None:
    """Index of an environment whose process has ended, and how it did."""
    deadline = time.monotonic() + PROCESS_END
    while time.monotonic() < deadline:
        for index, process in enumerate(workers.processes):
            code = process.exitcode
            if code is None:
                continue
            if code < 0:
                return index, f"its process was killed by {signal.Signals(-code).name} (exit code {code})"
            return index, f"its process ended with exit code {code}, what it raised is printed above"
        time.sleep(0.05)
    return None


def _unlike_the_others(results: list[tuple[Any, ...]], space: spaces.Space[Any]) -> tuple[int, str] | None:
    """Index of an environment whose results could not be stacked with those of the others, and why."""
    for index, result in enumerate(results):
        problem = wrong_shape(result[0], space)
        if problem:
            return index, problem
        if len(result) > 2 and np.size(result[1]) != 1:
            return index, f"the reward is {_short(result[1])}, it must be a number"
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def statistics(env: VecNormalize | None) -> list[tuple[RunningMeanStd, Any, Any, float]]:
    """
    :param env: Wrapper that normalises, if there is one
    :return: Its statistics as they are, for :func:`restore_statistics`. They are not copied: an update makes new ones.
    """
    if env is None:
        return []
    obs_rms = getattr(env, "obs_rms", None)
    several = list(obs_rms.values()) if isinstance(obs_rms, dict) else [obs_rms]
    return [(rms, rms.mean, rms.var, rms.count) for rms in [env.ret_rms, *several] if rms is not None]


def restore_statistics(saved: list[tuple[RunningMeanStd, Any, Any, float]]) -> None:
    """
    :param saved: Of :func:`statistics`
    """
    for rms, mean, var, count in saved:
        rms.mean, rms.var, rms.count = mean, var, count


def flatten(callback: Any) -> Iterator[BaseCallback]:
    """
    :param callback: What ``learn`` was given: a callback, a list of them, a function or None
    :return: The callbacks in it, those within others too
    """
    if isinstance(callback, list):
        for each in callback:
            yield from flatten(each)
    elif isinstance(callback, BaseCallback):
        yield callback
        if isinstance(callback, CallbackList):
            yield from flatten(callback.callbacks)
        elif isinstance(callback, EventCallback):
            yield from flatten(callback.callback)
