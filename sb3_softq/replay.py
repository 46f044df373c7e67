"""Replay buffers of Stable-Baselines3 where an environment is reset in the middle of an episode."""

import warnings

import numpy as np
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.buffers import ReplayBuffer


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
