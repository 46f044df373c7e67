"""The state of MuJoCo in an environment, as arrays. MuJoCo is not imported: where it cannot be, no environment has any."""

import hashlib
import sys
from typing import Any

import gymnasium as gym
import numpy as np

from sb3_softq.serialization.values import OpaqueError

Env = gym.Env[Any, Any]


def has_mujoco(env: Env) -> bool:
    """
    :param env: An environment without wrappers
    :return: Whether it keeps MuJoCo's data beside their model
    """
    mujoco = sys.modules.get("mujoco")
    kinds = [type(vars(env).get(name)) for name in ("model", "data")]
    return mujoco is not None and kinds == [mujoco.MjModel, mujoco.MjData]


def mujoco_state(env: Env) -> dict[str, Any]:
    """
    What MuJoCo integrates, and what it has derived from that: positions of bodies belong to the state before its last step,
    so that they cannot be computed anew, and environments read them before they take theirs.

    :param env: An environment of MuJoCo
    :return: Its state, and a digest of the model
    :raises OpaqueError: if the model has plugins, or bodies that may sleep, which keep more than that
    """
    mujoco, model, data = sys.modules["mujoco"], vars(env)["model"], vars(env)["data"]
    if model.nplugin > 0 or model.opt.enableflags & int(getattr(mujoco.mjtEnableBit, "mjENBL_SLEEP", 0)):
        raise OpaqueError("MuJoCo's model has plugins, or bodies that may sleep")
    state = np.empty(mujoco.mj_stateSize(model, mujoco.mjtState.mjSTATE_INTEGRATION))
    mujoco.mj_getState(model, data, state, mujoco.mjtState.mjSTATE_INTEGRATION)
    written = np.zeros(mujoco.mj_sizeModel(model), np.uint8)
    mujoco.mj_saveModel(model, None, written)
    return {"integrated": state, "derived": _derived(model, data), "model": hashlib.sha256(written.tobytes()).hexdigest()}


def _derived(model: Any, data: Any) -> dict[str, np.ndarray]:
    # those of contacts and constraints, of which new data have none, are made anew in each step. No integers: MuJoCo uses them
    # as indices, and the file may be a stranger's
    fresh = sys.modules["mujoco"].MjData(model)
    names = [name for name in dir(fresh) if not name.startswith("_")]
    values = {name: getattr(fresh, name) for name in names}
    found = [name for name, x in values.items() if isinstance(x, np.ndarray) and x.size > 0 and x.dtype == np.float64]
    return {name: getattr(data, name) for name in found}


def set_mujoco_state(env: Env, value: dict[str, Any]) -> None:
    """
    :param env: An environment of the same model
    :param value: Of :func:`mujoco_state`
    """
    mujoco, model, data = sys.modules["mujoco"], vars(env)["model"], vars(env)["data"]
    for name, array in _derived(model, data).items():
        array[...] = value["derived"][name]
    mujoco.mj_setState(model, data, value["integrated"], mujoco.mjtState.mjSTATE_INTEGRATION)
