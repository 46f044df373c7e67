"""Checks of spaces and of wrappers: what no network, buffer or action of ours can have is refused when the agent is made."""

from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecNormalize, unwrap_vec_normalize


class UnsupportedSpaceError(ValueError, AssertionError, NotImplementedError):
    """
    A space that an algorithm cannot have: a ValueError, and what Stable-Baselines3 raises there, so that programs that catch
    that need no change: AssertionError for actions, NotImplementedError for observations.
    """


def _refuse(name: str, space: spaces.Space[Any], allowed: str) -> UnsupportedSpaceError:
    return UnsupportedSpaceError(f"{name}={space!r} is not allowed: it must be {allowed}")


def check_observation_space(space: spaces.Space[Any]) -> None:
    """
    :param space: Observation space of the environment
    :raises ValueError: if Stable-Baselines3 has no features extractor for it
    """
    parts = list(space.spaces.values()) if isinstance(space, spaces.Dict) else [space]
    if not parts or not all(
        isinstance(x, spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary) for x in parts
    ):
        raise _refuse("observation_space", space, "a Box, Discrete, MultiDiscrete or MultiBinary space, or a Dict of such")
    for part in parts:
        if isinstance(part, spaces.Box | spaces.MultiBinary) and (part.shape == () or 0 in part.shape):
            raise _refuse(
                "observation_space", space, "of at least one axis (gymnasium.wrappers.FlattenObservation), each of length >= 1"
            )
        if isinstance(part, spaces.MultiDiscrete) and (part.nvec.ndim != 1 or part.nvec.size == 0):
            raise _refuse("observation_space", space, "of one axis, of length >= 1, where it is MultiDiscrete")
        if isinstance(part, spaces.Discrete | spaces.MultiDiscrete) and np.any(part.start != 0):
            raise _refuse("observation_space", space, "of numbers from 0 (start=0)")


def check_vec_normalize(env: VecEnv) -> None:
    """
    Stable-Baselines3 stores the observations that ``VecNormalize`` received, and normalises them when they are replayed: they
    have to be those that the agent sees.

    :param env: Environment of the agent, as Stable-Baselines3 has wrapped it
    :raises ValueError: if a wrapper around ``VecNormalize`` changes observations, or it is around Discrete ones
    """
    wrapper = env
    while isinstance(wrapper, VecEnvWrapper) and not isinstance(wrapper, VecNormalize):
        if unwrap_vec_normalize(wrapper) is not None and wrapper.observation_space != wrapper.venv.observation_space:
            kind = type(wrapper).__name__
            # of images themselves it has no statistics
            without = ""
            if kind == "VecTransposeImage":
                is_dict = isinstance(wrapper.observation_space, spaces.Dict)
                without = ", with norm_obs_keys of the others" if is_dict else ", with norm_obs=False"
            raise ValueError(
                f"env={env!r} is not allowed: it must not have VecNormalize inside of {kind}, which changes its observations "
                f"(VecNormalize({kind}(...)) works{without})"
            )
        wrapper = wrapper.venv
    if isinstance(wrapper, VecNormalize) and isinstance(wrapper.observation_space, spaces.Discrete):
        raise ValueError(
            f"env={env!r} is not allowed: it must not have VecNormalize around Discrete observations, which cannot be "
            "normalised (rewards alone: gymnasium.wrappers.NormalizeReward)"
        )


def check_action_space(space: spaces.Space[Any]) -> None:
    """
    :param space: Action space of the environment
    :raises ValueError: if it is no Box of real numbers, empty, unbounded or has a dimension of width zero
    """
    if isinstance(space, spaces.Discrete):
        raise _refuse("action_space", space, "a Box: for Discrete ones there is sb3_softq.DiscreteSoftQ")
    if (
        not isinstance(space, spaces.Box)
        # the replay buffer would round the actions of an integer one
        or not np.issubdtype(space.dtype, np.floating)
        or space.low.size == 0
        or not (np.isfinite(space.low).all() and np.isfinite(space.high).all())
        or not (space.low < space.high).all()
        # actions are scaled by it
        or not np.isfinite(_width(space)).all()
    ):
        raise _refuse(
            "action_space",
            space,
            "a Box of floats with finite bounds, at least one dimension, and low < high and high - low finite in each",
        )


def _width(space: spaces.Box) -> np.ndarray:
    """high - low, in the precision of the space."""
    with np.errstate(over="ignore"):
        return space.high - space.low


def check_discrete_action_space(space: spaces.Space[Any]) -> None:
    """
    :param space: Action space of the environment
    :raises ValueError: if it is not Discrete, with actions from 0
    """
    if isinstance(space, spaces.Box):
        raise _refuse("action_space", space, "Discrete: for a Box there is sb3_softq.SoftQ")
    if not isinstance(space, spaces.Discrete) or space.start != 0:
        raise _refuse("action_space", space, "Discrete, with actions from 0")
