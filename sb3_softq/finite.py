"""Checks during training: what an environment returns, and what is learned from it, is finite."""

from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces


class DivergedError(ValueError):
    """The agent has learned, or is about to learn, something that is not finite."""


def check_finite(
    name: str,
    data: Any,
    num_timesteps: int,
    env_idx: int | None = None,
    space: spaces.Space[Any] | None = None,
) -> None:
    """
    :param name: What the data is
    :param data: Data of one step, the first axis counts the environments, or of one environment: as an environment may return
        it, numbers, lists, tensors or arrays, or a dict of them. What is no number is left to Stable-Baselines3.
    :param num_timesteps: Number of steps so far
    :param env_idx: Of the one environment
    :param space: Observation space of the data: of a Dict, its keys alone are checked
    :raises ValueError: if a value is NaN or infinite, or too large for single precision, naming the environment
    """
    if isinstance(data, dict):
        keys = space.spaces.keys() if isinstance(space, spaces.Dict) else data.keys()
        parts = [(f" {key!r}", data[key]) for key in keys if key in data]
    else:
        parts = [("", data)]
    for key, values in parts:
        array = _as_floats(values)
        with np.errstate(over="ignore"):
            finite = np.isfinite(array.astype(np.float32, copy=False))
        if finite.all():
            continue
        if env_idx is None:
            env_idx = int(np.argwhere(~np.atleast_1d(finite))[0][0])
            array = np.atleast_1d(array)[env_idx]
        where = " in single precision" if np.isfinite(array).all() else ""
        raise ValueError(
            f"{name}{key} of environment {env_idx} is not finite{where} at step {num_timesteps}: {array}. "
            "Training stopped before it was stored."
        )


def _as_floats(values: Any) -> np.ndarray:
    """What an environment returned, as an array; an empty one where it holds no real numbers that could be infinite."""
    if isinstance(values, th.Tensor):
        values = values.detach().cpu().numpy()
    try:
        array = np.asarray(values)
        array = array.astype(np.float64) if array.dtype == object else array
    except (TypeError, ValueError):
        return np.zeros(0)
    return array if np.issubdtype(array.dtype, np.floating) else np.zeros(0)


def check_parameters(policy: th.nn.Module, num_timesteps: int) -> None:
    """
    :param policy: Networks of the agent
    :param num_timesteps: Number of steps so far
    :raises DivergedError: if a parameter is NaN or infinite, a ValueError that names it
    """
    for name, parameter in policy.named_parameters():
        if not th.isfinite(parameter).all():
            raise DivergedError(
                f"parameter {name} is not finite at step {num_timesteps}: training stopped. Lower learning rates, or "
                "normalised observations and rewards (VecNormalize), may help."
            )
