"""
Crash-safe checkpoints of an off-policy algorithm, and training that goes on from them.

A folder named ``checkpoint-...`` is complete: it is written under another name, synced to the disk and then renamed, and
an old one is renamed away before it is deleted. Whenever a run is killed, its newest checkpoint can be loaded.
"""

import os
import random
import re
import shutil
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.save_util import load_from_pkl, save_to_pkl
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, unwrap_vec_normalize

from sb3_softq.finite import check_parameters
from sb3_softq.replay import end_trajectory

SelfOffPolicyAlgorithm = TypeVar("SelfOffPolicyAlgorithm", bound=OffPolicyAlgorithm)

# Counted, because steps alone do not tell which one is the newest where a second run starts again from 0
NAME = re.compile(r"checkpoint-(\d+)-step(\d+)")
TEMPORARY = "checkpoint.tmp"


class ResumableCheckpoint(BaseCallback):
    """
    Save all that training needs to go on, every ``save_freq`` steps and at the end of training: the model, its replay
    buffer, the statistics of ``VecNormalize`` and the state of the random generators. Only the newest checkpoint is kept.

    Saves happen between rollouts, where the replay buffer, the networks and the number of steps belong together.

    :param save_freq: Save every ``save_freq`` steps, counted over all environments
    :param path: Folder of the checkpoints
    """

    model: OffPolicyAlgorithm

    def __init__(self, save_freq: int, path: str | Path):
        super().__init__()
        if save_freq < 1:
            raise ValueError(f"save_freq={save_freq!r} is not allowed: it must be an integer >= 1")
        self.save_freq = save_freq
        self.path = Path(path)
        self._saved_at = 0

    def _on_training_start(self) -> None:
        self._saved_at = self.model.num_timesteps

    def _on_rollout_start(self) -> None:
        if self.model.num_timesteps - self._saved_at >= self.save_freq:
            self.save()

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        self.save()

    def save(self) -> Path:
        """
        Write a checkpoint now, then delete the older ones.

        :return: Folder of the checkpoint
        :raises ValueError: if a parameter is NaN or infinite; the last checkpoint stays
        """
        check_parameters(self.model.policy, self.model.num_timesteps)
        older = _checkpoints(self.path)
        count = 1 + (_numbers(older[-1])[0] if older else 0)
        folder = self.path / f"checkpoint-{count}-step{self.model.num_timesteps}"
        temporary = self.path / TEMPORARY
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

        self.model.save(temporary / "model.zip")
        self.model.save_replay_buffer(temporary / "replay_buffer.pkl")
        save_to_pkl(temporary / "random.pkl", _random_state(self.model))
        vec_normalize = self.model.get_vec_normalize_env()
        if vec_normalize is not None:
            vec_normalize.save(str(temporary / "vec_normalize.pkl"))

        for file in (*temporary.iterdir(), temporary):
            _sync(file)
        os.replace(temporary, folder)
        _sync(self.path)
        for old in older:
            os.replace(old, temporary)
            shutil.rmtree(temporary)
        self._saved_at = self.model.num_timesteps
        return folder


def latest(path: str | Path) -> Path | None:
    """
    :param path: Folder of the checkpoints
    :return: Folder of the newest checkpoint, None if there is none
    """
    checkpoints = _checkpoints(Path(path))
    return checkpoints[-1] if checkpoints else None


def has_checkpoint(path: str | Path) -> bool:
    """
    :param path: Folder of the checkpoints
    :return: Whether there is a checkpoint to resume from
    """
    return latest(path) is not None


def steps_done(path: str | Path) -> int:
    """
    :param path: Folder of the checkpoints
    :return: Number of steps at the newest checkpoint, 0 if there is none
    """
    folder = latest(path)
    return 0 if folder is None else _numbers(folder)[1]


def resume(cls: type[SelfOffPolicyAlgorithm], path: str | Path, env: GymEnv, **kwargs: Any) -> SelfOffPolicyAlgorithm:
    """
    Load the newest checkpoint. Training goes on with ``model.learn(n_more_steps, reset_num_timesteps=False)``, in a new
    episode: the state of an environment cannot be saved.

    :param cls: Class of the algorithm, such as ``SoftQ``
    :param path: Folder of the checkpoints
    :param env: Environment to go on with. The saved statistics of ``VecNormalize`` go into its wrapper of that name, or
        into a new one around ``env`` if it has none.
    :param kwargs: Further arguments of ``cls.load``, such as ``device``
    :return: The model as it was saved
    :raises FileNotFoundError: if there is no checkpoint
    :raises ValueError: if the ``VecNormalize`` of ``env`` normalises observations and the saved one does not, or vice versa
    """
    folder = latest(path)
    if folder is None:
        raise FileNotFoundError(f"There is no checkpoint in {Path(path).absolute()}")
    statistics = folder / "vec_normalize.pkl"
    if statistics.exists():
        env = _restore_vec_normalize(statistics, env if isinstance(env, VecEnv) else cls._wrap_env(env))
    model = cls.load(folder / "model.zip", env=env, **kwargs)
    model.load_replay_buffer(folder / "replay_buffer.pkl")
    assert model.replay_buffer is not None
    end_trajectory(model.replay_buffer)
    if model.seed is not None:
        assert model.env is not None
        # load() seeded the environment as at the very beginning: its first episodes would come again
        model.env.seed(model.seed + model.num_timesteps)
    _set_random_state(model, load_from_pkl(folder / "random.pkl"))
    return model


def _numbers(folder: Path) -> tuple[int, int]:
    """Count and steps of a checkpoint, by its name."""
    match = NAME.fullmatch(folder.name)
    assert match is not None
    return int(match[1]), int(match[2])


def _checkpoints(path: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted((folder for folder in path.glob("*") if NAME.fullmatch(folder.name)), key=_numbers)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows does not open folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _random_state(model: OffPolicyAlgorithm) -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": th.get_rng_state(),
        "cuda": th.cuda.get_rng_state_all() if th.cuda.is_available() else [],
        # draws the actions before learning starts
        "action_space": model.action_space.np_random.bit_generator.state,
    }


def _set_random_state(model: OffPolicyAlgorithm, state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    th.set_rng_state(state["torch"])
    if len(state["cuda"]) == th.cuda.device_count():
        th.cuda.set_rng_state_all(state["cuda"])
    model.action_space.np_random.bit_generator.state = state["action_space"]


def _restore_vec_normalize(statistics: Path, env: VecEnv) -> VecEnv:
    vec_normalize = unwrap_vec_normalize(env)
    if vec_normalize is None:
        return VecNormalize.load(str(statistics), env)
    saved = VecNormalize.load(str(statistics), vec_normalize.venv)
    if vec_normalize.norm_obs != saved.norm_obs:
        raise ValueError(
            f"VecNormalize(norm_obs={vec_normalize.norm_obs!r}) is not allowed: "
            f"it must be {saved.norm_obs!r}, as in the checkpoint"
        )
    vec_normalize.ret_rms = saved.ret_rms
    if saved.norm_obs:
        vec_normalize.obs_rms = saved.obs_rms
    return env
