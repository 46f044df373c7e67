"""Replay buffers of Stable-Baselines3 where an environment is reset in the middle of an episode."""

import warnings
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm


def store_last_step(model: OffPolicyAlgorithm, step: dict[str, Any]) -> None:
    """
    Store the transition after which a callback has stopped training: Stable-Baselines3 counts that step, but leaves its
    transition out, and training that goes on would store one from before it to after it.

    :param model: The agent
    :param step: Local variables of the rollout, as callbacks have them
    """
    names = ("buffer_actions", "new_obs", "rewards", "dones", "infos")
    assert model.replay_buffer is not None
    model._store_transition(model.replay_buffer, *(step[name] for name in names))


def end_trajectory(buffer: ReplayBuffer) -> None:
    """
    Mark the newest transition of each environment as cut off by a time limit, if its episode has not ended: what is added
    next begins another one, which neither n-step returns nor the goals of HER may run into.

    :param buffer: Replay buffer; nothing happens where it is empty or its last episodes have ended
    """
    if buffer.size() == 0:
        return
    if isinstance(buffer, HerReplayBuffer):
        with warnings.catch_warnings():
            # of what is wanted here
            warnings.filterwarnings("ignore", "The last trajectory in the replay buffer will be truncated")
            buffer.truncate_last_trajectory()
        return
    last = buffer.pos - 1
    unfinished = np.logical_not(buffer.dones[last])
    buffer.dones[last][unfinished] = True
    # Not terminal, so that the value of the next observation counts: but there is none where the next row is to hold it
    if not buffer.optimize_memory_usage:
        buffer.timeouts[last][unfinished] = True


def follow_n_steps(buffer: ReplayBuffer | None, own: ReplayBuffer | None) -> None:
    """
    Have a replay buffer that was loaded return over as many steps, and with the discount factor, that the agent asks for.

    :param buffer: The one that was loaded
    :param own: The one that the agent was made with
    :raises ValueError: if one of the two alone has n-step returns
    """
    if isinstance(buffer, NStepReplayBuffer) and isinstance(own, NStepReplayBuffer):
        buffer.n_steps, buffer.gamma = own.n_steps, own.gamma
    elif isinstance(buffer, NStepReplayBuffer) or isinstance(own, NStepReplayBuffer):
        there, here = (getattr(x, "n_steps", 1) for x in (buffer, own))
        raise ValueError(
            f"a replay buffer of n_steps={there} is not allowed for an agent of n_steps={here}: both must have n-step "
            "returns, or none (sb3_softq.data.from_agent takes the transitions of any)"
        )


def check_newest(buffer: ReplayBuffer, n_rows: int, num_timesteps: int) -> None:
    """
    :param buffer: Replay buffer
    :param n_rows: Number of its newest rows, of one transition of each environment, that are looked at
    :param num_timesteps: Number of steps so far
    :raises ValueError: if a value in them is NaN or infinite, or too large to be learned from, naming where it is
    """
    rows = np.arange(buffer.pos - min(n_rows, buffer.size()), buffer.pos) % buffer.buffer_size
    for name in ("observations", "next_observations", "actions", "rewards"):
        stored = getattr(buffer, name, None)
        for key, values in stored.items() if isinstance(stored, dict) else [(None, stored)]:
            if not isinstance(values, np.ndarray) or not np.issubdtype(values.dtype, np.floating):
                continue
            # as losses have it
            with np.errstate(over="ignore", invalid="ignore"):
                wrong = ~np.isfinite(np.square(values[rows], dtype=np.float32))
            if wrong.any():
                row, env_idx = np.argwhere(wrong)[0][:2]
                label = name if key is None else f"{name} {key!r}"
                raise ValueError(
                    f"{label} of environment {env_idx} in row {rows[row]} of the replay buffer cannot be learned from at step "
                    f"{num_timesteps}: {values[rows[row], env_idx]}. Nothing was saved, the last checkpoint stays."
                )


def check_replay_buffer(
    buffer_class: type[ReplayBuffer] | None, n_steps: int, optimize_memory_usage: bool, observation_space: spaces.Space[Any]
) -> None:
    """
    :param buffer_class: Class that was asked for, None for the one that Stable-Baselines3 chooses
    :param n_steps: Number of steps of the returns
    :param optimize_memory_usage: Whether the memory efficient variant was asked for
    :param observation_space: Observation space
    :raises ValueError: if Stable-Baselines3 has no such buffer
    """
    has_dict = isinstance(observation_space, spaces.Dict)
    if optimize_memory_usage and (n_steps > 1 or has_dict):
        raise ValueError(
            "optimize_memory_usage=True is not allowed with n_steps > 1 or Dict observations: it must be False, "
            "since Stable-Baselines3 has no such buffer"
        )
    if n_steps > 1 and has_dict:
        raise ValueError(f"n_steps={n_steps} is not allowed with Dict observations: it must be 1")
    if n_steps > 1 and buffer_class is not None:
        raise ValueError(
            f"n_steps={n_steps} is not allowed with a replay_buffer_class, which would not hear of it: it must be 1 "
            "(what the buffer takes itself goes into replay_buffer_kwargs)"
        )
    if buffer_class is not None and issubclass(buffer_class, DictReplayBuffer) != has_dict:
        kind = "DictReplayBuffer or HerReplayBuffer" if has_dict else "a buffer for observations that are no Dict"
        raise ValueError(f"replay_buffer_class={buffer_class!r} is not allowed: it must be {kind}")
    if buffer_class is not None and issubclass(buffer_class, HerReplayBuffer):
        missing = {"observation", "achieved_goal", "desired_goal"} - set(observation_space.spaces)  # type: ignore[attr-defined]
        if missing:
            raise ValueError(
                f"replay_buffer_class={buffer_class!r} is not allowed without goals: observations must have the keys "
                f"{', '.join(sorted(missing))} too"
            )
