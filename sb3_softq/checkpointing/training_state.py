"""
The state of training in the middle of an episode, in a file of arrays and JSON: training that is resumed goes on with the step
that would have come next. All environments are saved, or nothing; and all are restored, or nothing.

Known are ``DummyVecEnv``, ``SubprocVecEnv``, ``VecNormalize``, ``VecFrameStack``, ``VecMonitor``, ``VecTransposeImage``, and
in them the environments of :mod:`sb3_softq.checkpointing.env_state`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecEnv,
    VecEnvWrapper,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
)

from sb3_softq.checkpointing.env_state import CALL, capture, refusal, restore
from sb3_softq.faults import CheckedDummyVecEnv
from sb3_softq.serialization.values import OpaqueError, decode, encode

# Attributes of what holds environments
_OF_VEC_ENV: dict[type[VecEnv], tuple[str, ...]] = {
    VecNormalize: ("returns", "old_obs", "old_reward"),
    VecMonitor: ("episode_returns", "episode_lengths", "episode_count"),
    VecFrameStack: (),
    VecTransposeImage: (),
}
_OF_MODEL = ("_last_obs", "_last_original_obs", "_last_episode_starts")


def save_environments(model: OffPolicyAlgorithm, path: Path) -> str | None:
    """
    :param model: An agent between two rollouts
    :param path: File to write, ``.npz``
    :return: Why nothing was written, None if it was. The environments are not asked where an error has ended their episodes.
    """
    arrays: dict[str, np.ndarray] = {}
    try:
        tree = json.dumps(encode(_collect(model), arrays, "state"))
    except OpaqueError as error:
        return str(error)
    np.savez(path, tree=np.array(tree), **arrays)  # type: ignore[arg-type]
    return None


def restore_environments(model: OffPolicyAlgorithm, path: Path) -> str | None:
    """
    :param model: An agent that was loaded with environments like those that were saved
    :param path: File that :func:`save_environments` wrote
    :return: Why they have to begin a new episode, None if they are where they were
    """
    with np.load(path, allow_pickle=False) as file:
        saved = decode(json.loads(str(file["tree"])), {name: file[name] for name in file.files})
    env = model.get_env()
    assert env is not None
    layers = list(_vec_layers(env))
    names = [type(layer).__name__ for layer in layers[:-1]]
    if names != [name for name, _ in saved["vec"]]:
        return f"they were wrapped in {[name for name, _ in saved['vec']]} and are wrapped in {names}"
    # first all are asked, then all are changed
    for function in (refusal, restore):
        for index, state in enumerate(saved["envs"]):
            (reason,) = env.env_method(CALL, function, state, indices=[index])
            if reason is not None:
                return f"environment {index}: {reason}"
    for layer, (_, state) in zip(layers, saved["vec"], strict=False):
        for name, value in state.items():
            setattr(layer.stacked_obs if isinstance(layer, VecFrameStack) else layer, name, value)
    # load() has seeded the next reset, as at the very beginning
    layers[-1]._reset_seeds()
    for name, value in saved["model"].items():
        setattr(model, name, value)
    return None


def _collect(model: OffPolicyAlgorithm) -> dict[str, Any]:
    env = model.get_env()
    if env is None or model._last_obs is None:
        raise OpaqueError("no episode has begun")
    *wrappers, base = _vec_layers(env)
    if type(base) not in (DummyVecEnv, CheckedDummyVecEnv, SubprocVecEnv):
        raise OpaqueError(f"{type(base).__name__} is neither a DummyVecEnv nor a SubprocVecEnv")
    try:
        found = env.env_method(CALL, capture)
    except Exception as error:
        # a process has ended: the next step will tell, and what was learned can be saved
        raise OpaqueError(f"the environments do not answer ({type(error).__name__}: {error})") from error
    for index, state in enumerate(found):
        if isinstance(state, str):
            raise OpaqueError(f"environment {index}: {state}")
    # each has encoded its own, which can always be pickled
    found = [decode(*answer) for answer in found]
    return {
        "vec": [(type(wrapper).__name__, _vec_state(wrapper)) for wrapper in wrappers],
        "envs": found,
        "model": {name: getattr(model, name) for name in _OF_MODEL},
    }


def _vec_layers(env: VecEnv) -> Iterator[VecEnv]:
    """From the outermost wrapper to what holds the environments."""
    yield env
    while isinstance(env, VecEnvWrapper):
        env = env.venv
        yield env


def _vec_state(wrapper: VecEnv) -> dict[str, Any]:
    if type(wrapper) not in _OF_VEC_ENV:
        raise OpaqueError(f"what {type(wrapper).__name__} keeps is not known")
    if isinstance(wrapper, VecFrameStack):
        if not hasattr(wrapper.stacked_obs, "stacked_obs"):
            raise OpaqueError("VecFrameStack of Dict observations")
        return {"stacked_obs": wrapper.stacked_obs.stacked_obs}
    return {name: getattr(wrapper, name) for name in _OF_VEC_ENV[type(wrapper)] if hasattr(wrapper, name)}
