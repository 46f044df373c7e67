"""
Replay buffers, statistics of ``VecNormalize`` and states of random generators in files that hold arrays and JSON alone:
reading them runs no code, and a replay buffer takes the room of what is in it.
"""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

_ARRAYS = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")
# Other buffers may hold more than these arrays
_BUFFERS_OF_ARRAYS = (ReplayBuffer, DictReplayBuffer, NStepReplayBuffer, HerReplayBuffer)
# Episodes of HER's buffer: where that of each row begins, how long it is, and where those that go on begin
_EPISODES = ("ep_start", "ep_length", "_current_ep_start")
_VEC_NORMALIZE = ("norm_obs", "norm_reward", "clip_obs", "clip_reward", "gamma", "epsilon", "norm_obs_keys")


def consists_of_arrays(buffer: ReplayBuffer) -> bool:
    """
    :param buffer: Replay buffer
    :return: Whether it consists of arrays: it is one of Stable-Baselines3's, and keeps no info dicts
    """
    return type(buffer) in _BUFFERS_OF_ARRAYS and not getattr(buffer, "copy_info_dict", False)


def buffer_arrays(buffer: ReplayBuffer) -> dict[str, np.ndarray]:
    """
    :param buffer: Replay buffer of arrays, see :func:`consists_of_arrays`
    :return: Its arrays by a name for each; those of a Dict by their key too
    """
    found: dict[str, np.ndarray] = {}
    for name in _ARRAYS:
        values: Any = getattr(buffer, name, None)
        if isinstance(values, dict):
            found |= {f"{name}/{key}": array for key, array in values.items()}
        elif values is not None:
            found[name] = values
    return found


def save_buffer(buffer: ReplayBuffer, path: Path) -> int:
    """
    :param buffer: Replay buffer of arrays, see :func:`consists_of_arrays`
    :param path: File to write, ``.npz``
    :return: Number of rows in it
    """
    # the memory efficient variant has the newest next observation in the row after
    n_rows = buffer.buffer_size if buffer.full else min(buffer.pos + 1, buffer.buffer_size)
    arrays: dict[str, Any] = {"place": np.array([buffer.pos, buffer.full, n_rows])}
    np.savez(path, **arrays | {name: array[:n_rows] for name, array in buffer_arrays(buffer).items()})
    return n_rows


def load_buffer(buffer: ReplayBuffer, path: Path) -> int:
    """
    :param buffer: Replay buffer to fill, of the kind and size that was saved
    :param path: File that :func:`save_buffer` wrote
    :return: Number of rows in it
    :raises ValueError: if it does not fit, naming what differs
    """
    with np.load(path, allow_pickle=False) as saved:
        pos, full, n_rows = (int(x) for x in saved["place"])
        own = buffer_arrays(buffer)
        if saved.files != ["place", *own]:
            raise ValueError(f"{path} holds {saved.files[1:]}, not {list(own)} as the replay buffer of the agent does")
        for name, array in own.items():
            values = saved[name]
            fits = n_rows == len(array) if full else n_rows <= len(array)
            if not fits or values.shape[1:] != array.shape[1:] or values.dtype != array.dtype:
                raise ValueError(
                    f"{name} of shape {values.shape} and type {values.dtype} in {path} do not fit into the agent's replay "
                    f"buffer, of shape {array.shape} and type {array.dtype}: buffer_size, the number of environments and "
                    "spaces must be those that were saved"
                )
            array[:n_rows] = values
    buffer.pos, buffer.full = pos, bool(full)
    return n_rows


def save_episodes(buffer: ReplayBuffer, path: Path) -> None:
    """
    Which rows of HER's buffer belong together: it may change in rows that have long been there, and takes little room.

    :param buffer: Replay buffer; nothing happens where it is not that of HER
    :param path: File to write, ``.npz``
    """
    if isinstance(buffer, HerReplayBuffer):
        np.savez_compressed(path, **{name: getattr(buffer, name) for name in _EPISODES})


def load_episodes(buffer: ReplayBuffer, path: Path) -> None:
    """
    :param buffer: Replay buffer, whose rows have been read
    :param path: File that :func:`save_episodes` wrote
    :raises ValueError: if it does not fit
    """
    if not isinstance(buffer, HerReplayBuffer):
        return
    with np.load(path, allow_pickle=False) as saved:
        for name in _EPISODES:
            own, values = getattr(buffer, name), saved[name]
            # a larger buffer goes on, see load_buffer
            fits = values.shape[1:] == own.shape[1:] and len(values) <= len(own) and values.dtype == own.dtype
            if not fits or values.min() < 0 or values.max() > buffer.buffer_size:
                raise ValueError(f"{name} of shape {values.shape} in {path} does not fit into the agent's replay buffer")
            own[: len(values)] = values


def save_vec_normalize(env: VecNormalize, path: Path) -> None:
    """
    :param env: Wrapper whose settings and statistics are saved
    :param path: File to write, JSON
    """
    statistics = {"returns": _numbers(env.ret_rms)}
    if env.norm_obs:
        rms: Any = env.obs_rms
        statistics["obs"] = {k: _numbers(v) for k, v in rms.items()} if isinstance(rms, dict) else _numbers(rms)
    settings = {name: getattr(env, name) for name in _VEC_NORMALIZE}
    # they may be numbers of numpy
    path.write_text(json.dumps({"settings": settings, "statistics": statistics}, default=lambda value: value.item()))


def load_vec_normalize(path: Path, env: VecEnv) -> VecNormalize:
    """
    :param path: File that :func:`save_vec_normalize` wrote
    :param env: Environments without such a wrapper
    :return: The wrapper around them
    """
    saved = json.loads(path.read_text())
    wrapped = VecNormalize(env, **saved["settings"])
    wrapped.ret_rms = _running(saved["statistics"]["returns"])
    obs = saved["statistics"].get("obs")
    if obs is not None:
        rms: Any = {key: _running(value) for key, value in obs.items()} if isinstance(wrapped.obs_rms, dict) else _running(obs)
        wrapped.obs_rms = rms
    return wrapped


def _numbers(rms: RunningMeanStd) -> dict[str, Any]:
    return {"mean": np.asarray(rms.mean).tolist(), "var": np.asarray(rms.var).tolist(), "count": float(rms.count)}


def _running(numbers: dict[str, Any]) -> RunningMeanStd:
    mean, var = np.array(numbers["mean"], np.float64), np.array(numbers["var"], np.float64)
    rms = RunningMeanStd(shape=mean.shape)
    # those of returns are numbers of numpy where they were updated
    rms.mean, rms.var, rms.count = mean, var, float(numbers["count"])
    return rms


def save_random_state(model: OffPolicyAlgorithm, path: Path) -> None:
    """
    State of the random generators of Python, numpy and torch, and of that which draws actions before learning starts.

    :param model: The agent
    :param path: File to write, JSON
    """
    name, key, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": [name, np.asarray(key).tolist(), *rest],
        "torch": th.get_rng_state().numpy().tobytes().hex(),
        "cuda": [x.numpy().tobytes().hex() for x in th.cuda.get_rng_state_all()] if th.cuda.is_available() else [],
        "action_space": model.action_space.np_random.bit_generator.state,
    }
    path.write_text(json.dumps(state, default=lambda value: value.tolist()))


def load_random_state(path: Path) -> dict[str, Any]:
    """
    :param path: File that :func:`save_random_state` wrote
    :return: The state, for :func:`set_random_state`
    """
    state: dict[str, Any] = json.loads(path.read_text())
    version, internal, gauss = state["python"]
    state["python"] = (version, tuple(internal), gauss)
    state["numpy"] = tuple(state["numpy"])
    state["torch"] = th.frombuffer(bytearray.fromhex(state["torch"]), dtype=th.uint8)
    state["cuda"] = [th.frombuffer(bytearray.fromhex(x), dtype=th.uint8) for x in state["cuda"]]
    return state


def set_random_state(model: OffPolicyAlgorithm, state: dict[str, Any]) -> None:
    """
    :param model: The agent
    :param state: Of :func:`load_random_state`
    """
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    th.set_rng_state(state["torch"])
    if len(state["cuda"]) == th.cuda.device_count():
        th.cuda.set_rng_state_all(state["cuda"])
    model.action_space.np_random.bit_generator.state = state["action_space"]
