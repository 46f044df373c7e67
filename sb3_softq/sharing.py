"""Environments of a training that others use too: an evaluation in between, on the very environment that is learned in."""

import pickle
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
from gymnasium.wrappers import PassiveEnvChecker
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_softq.checkpointing.env_state import NO_STATE, WINDOW, layers_of

# Attributes that are no part of what a step or a reset does
_NOT_TRACED = NO_STATE | WINDOW


def check_not_shared(eval_env: VecEnv, env: VecEnv | None) -> None:
    """
    :param eval_env: Environments of an evaluation during training
    :param env: Those of the training
    :raises ValueError: if one is among both: after an evaluation it would be elsewhere than the agent believes
    """
    if env is not None and _identities(eval_env) & _identities(env):
        raise ValueError(f"eval_env={eval_env!r} with an environment of the training is not allowed: it must have its own")


def trace(env: VecEnv) -> list[Any]:
    """
    :param env: Environments, in wrappers or not
    :return: What a reset or a step replaces, whoever makes it: what the last reset has returned, and of the environments of
        this process the attributes and the state of the generator of random numbers
    """
    found: list[Any] = list(getattr(env.unwrapped, "reset_infos", ()))
    for layers in _layers(env):
        asked = (layer for layer in layers if not isinstance(layer, PassiveEnvChecker))
        attributes = (item for layer in asked for item in getattr(layer, "__dict__", {}).items())
        found += [value for name, value in attributes if name not in _NOT_TRACED]
        generator = getattr(getattr(layers[-1], "_np_random", None), "bit_generator", None)
        found.append(None if generator is None else pickle.dumps(generator.state))
    return found


def is_as_left(env: VecEnv | None, before: list[Any] | None) -> bool:
    """
    :param env: Environments
    :param before: Their :func:`trace` of then, None if there is none
    :return: Whether nobody has stepped or reset one since, as far as that can be seen
    """
    if env is None or before is None:
        return True
    now = trace(env)
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
