"""Environments that fail in training: what they raise, and what they return that they had not declared."""

import signal
import time
import traceback
from collections.abc import Iterator
from itertools import dropwhile
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EventCallback
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecNormalize
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs

from sb3_softq.checks import check_number

# Seconds until the system has told of the end of a process whose pipe is closed
PROCESS_END = 5.0
# Seconds between two looks at whether a process that is waited for is still there
PROCESS_CHECK = 1.0


class FaultyEnvironmentError(RuntimeError):
    """
    An environment raised, ended or returned what cannot be stored. What it raised is the cause of this, which is of that
    class too: whoever catches the one catches the other, as the RL Zoo catches a ValueError around a trial of a search.
    """

    @classmethod
    def like(cls, error: BaseException, message: str) -> "FaultyEnvironmentError":
        """
        :param error: What the environment raised
        :param message: What explains it
        :return: An error of both classes, where there can be one
        """
        try:
            kind: Any = type(cls.__name__, (cls, type(error)), {})
            # without the other class's __init__, which may want other arguments
            alike: FaultyEnvironmentError = kind.__base__.__new__(kind)
        except TypeError:
            return cls(message)
        alike.args = (message,)
        return alike

    def __str__(self) -> str:
        # not that of the other class
        return RuntimeError.__str__(self)

    def __reduce__(self) -> Any:
        # a class that was made here has no name that another process could look up
        return FaultyEnvironmentError, self.args


class CheckedDummyVecEnv(DummyVecEnv):
    """A ``DummyVecEnv`` that refuses observations of another number of elements than their space, which SB3's broadcasts."""

    def _save_obs(self, env_idx: int, obs: VecEnvObs) -> None:
        # this alone is what an observation costs that is as it should be
        if not isinstance(obs, np.ndarray) or obs.shape != self.observation_space.shape:
            problem = wrong_shape(obs, self.observation_space, is_copied=True)
            if problem:
                raise ValueError(problem)
        super()._save_obs(env_idx, obs)


class WatchedPipe:
    """
    A pipe to the process of an environment, which tells when that has ended: with ``start_method="fork"`` other processes
    hold the pipe's other end too, and SB3 would wait for ever. After the first failure of any of them all can be closed, and
    nothing else.

    :param pipe: That of the vectorized environment
    :param process: At its other end
    :param index: Of the environment
    :param failed: Indices of the environments that have failed, which all of them share
    """

    def __init__(self, pipe: Any, process: Any, index: int, failed: set[int]):
        self.pipe, self.process, self.index, self.failed = pipe, process, index, failed
        #: Seconds that an answer may take, None for ever
        self.timeout: float | None = None
        # how many answers are to come
        self._owed = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipe, name)

    def send(self, message: tuple[str, Any]) -> None:
        """
        Ask for something.

        :param message: Name of what is asked for, and what belongs to it
        :raises OSError: if the process, or that of another environment, has ended
        """
        closes = message[0] == "close"
        if self.failed and not closes:
            raise BrokenPipeError(f"environment {min(self.failed)} has failed before")
        try:
            self.pipe.send(message)
        except OSError:
            self.failed.add(self.index)
            if not closes:
                raise
        else:
            self._owed += not closes

    def recv(self) -> Any:
        """
        Wait for an answer.

        :raises EOFError: if the process has ended
        :raises TimeoutError: if it takes too long; the process is killed
        """
        if self._owed == 0:
            # close() waits for the answers to a step of which one has failed, and the others may be there already
            return None
        self._owed -= 1
        try:
            self._wait()
            return self.pipe.recv()
        except (EOFError, OSError):
            is_first = not self.failed
            self.failed.add(self.index)
            if is_first:
                raise
            return None

    def _wait(self) -> None:
        begin = time.monotonic()
        while not self.pipe.poll(PROCESS_CHECK if self.timeout is None else min(PROCESS_CHECK, self.timeout)):
            # what it has sent before its end counts
            if not self.process.is_alive() and not self.pipe.poll():
                raise EOFError
            if self.timeout is not None and time.monotonic() - begin >= self.timeout:
                self.process.kill()
                error = TimeoutError(f"it has not answered within timeout={self.timeout:g} seconds, its process was killed")
                error.env_idx = self.index  # type: ignore[attr-defined]
                raise error


def watch(env: VecEnv) -> None:
    """
    Let the environments be checked where only they can be: shapes of observations before ``DummyVecEnv`` broadcasts them,
    processes of ``SubprocVecEnv`` while they are waited for. Done in place, since the user and wrappers hold them too.

    :param env: Environments, in wrappers or not
    """
    inner = env.unwrapped
    if type(inner) is DummyVecEnv:
        inner.__class__ = CheckedDummyVecEnv
    elif isinstance(inner, SubprocVecEnv) and not isinstance(inner.remotes[0], WatchedPipe):
        pipes, failed = zip(inner.remotes, inner.processes, strict=True), set[int]()
        inner.remotes = tuple(WatchedPipe(pipe, process, index, failed) for index, (pipe, process) in enumerate(pipes))


def set_timeout(env: VecEnv, seconds: float | None) -> None:
    """
    Let an environment of a ``SubprocVecEnv`` fail that hangs.

    :param env: Environments, in wrappers or not
    :param seconds: How long a step, a reset or another answer may take, None for ever
    :raises ValueError: if they are no ``SubprocVecEnv``, or the time is not positive
    """
    inner = env.unwrapped
    if not isinstance(inner, SubprocVecEnv):
        raise ValueError(f"env={env!r} is not allowed: it must be a SubprocVecEnv (RayVecEnv has an argument timeout)")
    if seconds is not None:
        check_number("seconds", seconds, 0.0, open_low=True)
    watch(env)
    for pipe in inner.remotes:
        pipe.timeout = seconds


def wrong_shape(obs: Any, space: spaces.Space[Any], n_envs: int | None = None, is_copied: bool = False) -> str | None:
    """
    :param obs: Observation, as an environment may return it, or those of all environments
    :param space: Its space
    :param n_envs: Number of environments whose observations are stacked, None for a single one
    :param is_copied: Whether it is copied into an array of the space's shape: then axes of length 1 in front do not matter,
        as of a number for the shape (1,)
    :return: What is wrong with it, None if nothing is
    """
    if isinstance(space, spaces.Dict):
        if not hasattr(obs, "keys"):
            return f"the observation is {_short(obs)}, it must be a dict with the keys {list(space.spaces)}"
        missing = [key for key in space.spaces if key not in obs]
        if missing:
            return f"the observation has no {missing[0]!r}, it must have the keys {list(space.spaces)}"
        problems = (wrong_shape(obs[key], part, n_envs, is_copied) for key, part in space.spaces.items())
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
    if shape == expected or (is_copied and expected and _without_ones(shape) == _without_ones(expected)):
        return None
    return f"the observation has the shape {shape}, it must be {expected} (its space is {space})"


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape from its first axis on that is not of length 1."""
    return tuple(dropwhile(lambda length: length == 1, shape))


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
    :raises FaultyEnvironmentError: (a ValueError) if an observation or a reward has another shape than it must have
    """
    n_envs = len(dones)
    if not isinstance(obs, np.ndarray) or obs.shape[1:] != space.shape or len(obs) != n_envs:
        problem = wrong_shape(obs, space, n_envs)
        if problem:
            raise _value_error(f"The environments failed at step {num_timesteps}: {problem}")
    if np.shape(rewards) != (n_envs,):
        raise _value_error(
            f"The environments failed at step {num_timesteps}: the rewards have the shape {np.shape(rewards)}, it must be "
            f"{(n_envs,)}, a number of each environment"
        )
    for env_idx in np.flatnonzero(dones):
        if "terminal_observation" in infos[env_idx]:
            # a vectorized environment hands it on as it came
            problem = wrong_shape(infos[env_idx]["terminal_observation"], space, is_copied=True)
            if problem:
                raise _value_error(f"Environment {env_idx} failed at step {num_timesteps}: {problem}")


def _value_error(message: str) -> FaultyEnvironmentError:
    """What numpy raises where such data are stored."""
    return FaultyEnvironmentError.like(ValueError(), message)


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
    by_callback = any(isinstance(frame.f_locals.get("self"), BaseCallback) for frame in frames[: frames.index(inside[0])])
    if by_callback and inside[0].f_code.co_name not in ("step", "reset") and not isinstance(error, EOFError | OSError):
        # a callback's own question, for an attribute that there is not say
        return None
    # Ray has the error of an actor as the cause of its own
    cause = getattr(error, "cause", error)
    index: int | None = getattr(cause, "env_idx", failed_index(error))
    what = f"{type(error).__name__}: {error}"
    if frames[-1].f_code is DummyVecEnv.step_wait.__code__:
        # nothing that the environment has called: what it returned
        what += " (it must return an observation, a number as reward, two booleans and a dict)"
    workers = outer.unwrapped
    if isinstance(workers, SubprocVecEnv):
        if isinstance(error, EOFError | OSError) and index is None:
            index, what = _ended_process(workers) or (index, what)
        results = [frame.f_locals["results"] for frame in inside if "results" in frame.f_locals]
        if results:
            index, what = _unlike_the_others(results[0], workers.observation_space) or (index, what)
    name = "An environment" if index is None else f"Environment {index}"
    if outer.unwrapped is not env.unwrapped:
        return FaultyEnvironmentError.like(cause, f"{name} of an evaluation failed at step {num_timesteps}: {what}")
    # the step that it did not make
    step = num_timesteps + (env.num_envs if inside[0].f_code.co_name == "step" else 0)
    return FaultyEnvironmentError.like(cause, f"{name} failed at step {step}: {what}")


def failed_index(error: Exception) -> int | None:
    """
    :param error: Raised by a ``DummyVecEnv``
    :return: Index of the environment that it was asking, None if it was asking none
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if isinstance(frame.f_locals.get("self"), DummyVecEnv) and "env_idx" in frame.f_locals:
            return int(frame.f_locals["env_idx"])
    return None


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
        if len(result) > 2 and np.shape(result[1]) != ():
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


def evaluation_envs(callback: Any) -> list[VecEnv]:
    """
    :param callback: What ``learn`` was given
    :return: Environments of the evaluations in it
    """
    found = [getattr(each, "eval_env", None) for each in flatten(callback)]
    return [env for env in found if isinstance(env, VecEnv)]


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
