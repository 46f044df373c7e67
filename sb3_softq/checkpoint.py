"""
Crash-safe checkpoints of an off-policy algorithm, and training that goes on from them.

A folder named ``checkpoint-...`` is complete: it is written under another name, synced to the disk and then renamed, and
an old one is renamed away before it is deleted. Whenever a run is killed, its newest checkpoint can be loaded. A manifest
(:mod:`sb3_softq.manifest`) tells whether the disk has kept it: a damaged one is set aside, and the one before is used.
"""

import os
import re
import shutil
import signal
import socket
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from filelock import FileLock, Timeout
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.save_util import load_from_pkl
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, unwrap_vec_normalize

from sb3_softq import manifest
from sb3_softq.checks import check_integer
from sb3_softq.episodes import restore_environments, save_environments
from sb3_softq.finite import check_parameters
from sb3_softq.manifest import DamagedCheckpointError
from sb3_softq.off_policy import CheckedOffPolicyAlgorithm
from sb3_softq.plain_files import (
    PLAIN_BUFFERS,
    load_random_state,
    load_vec_normalize,
    save_random_state,
    save_vec_normalize,
    set_random_state,
)
from sb3_softq.plain_values import stored_names
from sb3_softq.replay import check_newest, end_trajectory
from sb3_softq.segments import load_segments, remember, save_segments

SelfOffPolicyAlgorithm = TypeVar("SelfOffPolicyAlgorithm", bound=OffPolicyAlgorithm)

# Counted, because steps alone do not tell which one is the newest where a second run starts again from 0
NAME = re.compile(r"checkpoint-(\d+)-step(\d+)")
TEMPORARY = "checkpoint.tmp"
# Where they are in their episodes
ENVIRONMENTS = "environments.npz"
# Of a checkpoint that is not what was written
DAMAGED = "damaged-"
# Held while a run writes into a folder; the system lets go of it when the process dies
LOCK, HOLDER = ".lock", ".holder"
# That end a process whose program does not know them; Windows has no SIGHUP
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


class ResumableCheckpoint(BaseCallback):
    """
    Save all that training needs to go on, every ``save_freq`` steps and at the end of training: the model, its replay
    buffer, the environments in the middle of their episodes where :mod:`sb3_softq.episodes` knows their state, the
    statistics of ``VecNormalize`` and the state of the random generators.

    A save writes the part of the replay buffer that is not in the checkpoint it replaces, ``keep`` saves ago; the rest is
    linked, so that no file is shared by two checkpoints that stay. Transitions must not be changed in the buffer once they are
    there. The buffers of HER and of users are written whole.

    Attributes that neither Stable-Baselines3 nor the agent's class sets, such as those that a callback hangs on the model,
    are not saved, and a warning names them.

    Saves happen between rollouts, where the replay buffer, the networks and the number of steps belong together. From the
    start of training to its end the folder belongs to this process. SIGTERM, as cluster schedulers send it, and SIGHUP save
    after the rollout or evaluation that is going on and end the process with the usual status, 143 and 129, unless the
    program handles them itself or trains in another thread than its main one.

    :param save_freq: Save every ``save_freq`` steps, counted over all environments
    :param path: Folder of the checkpoints
    :param keep: How many of the newest checkpoints are kept, at least 1
    :raises ValueError: if an argument is out of its range
    """

    model: OffPolicyAlgorithm

    def __init__(self, save_freq: int, path: str | Path, keep: int = 2):
        super().__init__()
        self.save_freq = check_integer("save_freq", save_freq, 1)
        self.path = Path(path)
        self.keep = check_integer("keep", keep, 1)
        self._saved_at = 0
        # where the environments and the replay buffer are at the same step
        self._is_between_rollouts = True
        self._warned_of: set[str] = set()
        self._lock: FileLock | None = None
        self._handled: list[int] = []
        self._signal: int | None = None

    def _on_training_start(self) -> None:
        self._saved_at = self.model.num_timesteps
        self._lock = _acquire(self.path)
        if threading.current_thread() is threading.main_thread():
            self._handled = [number for number in SIGNALS if signal.getsignal(number) is signal.SIG_DFL]
        for number in self._handled:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_code is OffPolicyAlgorithm.learn.__code__ and frame.f_locals["self"] is self.model:
                self._signal = number
                return
            frame = frame.f_back
        # training ended by an error, which calls no callback
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    def _on_rollout_start(self) -> None:
        self._is_between_rollouts = True
        if self._signal is not None:
            self._on_training_end()
            raise SystemExit(128 + self._signal)
        if self.model.num_timesteps - self._saved_at >= self.save_freq:
            self.save()
        self._is_between_rollouts = False

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self._is_between_rollouts = True

    def _on_training_end(self) -> None:
        self.save()
        for number in self._handled:
            signal.signal(number, signal.SIG_DFL)
        self._handled = []
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def save(self) -> Path:
        """
        Write a checkpoint now, then delete the older ones but ``keep`` - 1.

        :return: Folder of the checkpoint
        :raises ValueError: if a parameter, or what the replay buffer has gained since the last save, is NaN or infinite; the
            last checkpoint stays
        :raises RuntimeError: if another process writes into the folder
        """
        with folder_lock(self.path):
            return self._save()

    def _save(self) -> Path:
        steps = self.model.num_timesteps
        check_parameters(self.model.policy, steps)
        assert self.model.replay_buffer is not None
        check_newest(self.model.replay_buffer, -(-(steps - self._saved_at) // self.model.n_envs), steps)
        older = _checkpoints(self.path)
        count = 1 + (_numbers(older[-1])[0] if older else 0)
        folder = self.path / f"checkpoint-{count}-step{self.model.num_timesteps}"
        replaced = older[-self.keep] if len(older) >= self.keep else None
        temporary = self.path / TEMPORARY
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

        self.model.save(temporary / "model.zip", exclude=self._unknown_attributes())
        buffer, saved, linked = self.model.replay_buffer, None, set[str]()
        if type(buffer) in PLAIN_BUFFERS:
            saved, linked = save_segments(buffer, temporary, replaced, steps)
        else:
            self.model.save_replay_buffer(temporary / "replay_buffer.pkl")
        if self._is_between_rollouts:
            save_environments(self.model, temporary / ENVIRONMENTS)
        save_random_state(self.model, temporary / "random.json")
        vec_normalize = self.model.get_vec_normalize_env()
        if vec_normalize is not None:
            save_vec_normalize(vec_normalize, temporary / "vec_normalize.json")
        manifest.write(temporary, self.model, replaced, linked)

        for file in (*temporary.iterdir(), temporary):
            if file.name not in linked:
                _sync(file)
        os.replace(temporary, folder)
        _sync(self.path)
        for old in older[: len(older) + 1 - self.keep]:
            os.replace(old, temporary)
            shutil.rmtree(temporary)
        if saved is not None:
            remember(buffer, folder, saved)
        self._saved_at = self.model.num_timesteps
        return folder

    def _unknown_attributes(self) -> set[str]:
        """Of the model, that none of its classes sets."""
        unknown = vars(self.model).keys() - stored_names(type(self.model), constructor=True)
        new = unknown - self._warned_of
        if new:
            self._warned_of |= new
            warnings.warn(
                f"Attributes of the model that {type(self.model).__name__} does not know are not in its checkpoints: "
                + ", ".join(sorted(new))
            )
        return unknown


@contextmanager
def folder_lock(path: str | Path) -> Iterator[None]:
    """
    Own a folder of checkpoints: no other process can save into it meanwhile. A process that dies lets go of it.

    :param path: Folder of the checkpoints
    :raises RuntimeError: if another process owns it, naming that
    """
    lock = _acquire(Path(path))
    try:
        yield
    finally:
        lock.release()


def latest(path: str | Path) -> Path | None:
    """
    :param path: Folder of the checkpoints
    :return: Folder of the newest checkpoint that is what was written, None if there is none
    """
    for folder in reversed(_checkpoints(Path(path))):
        try:
            manifest.read(folder)
        except DamagedCheckpointError:
            continue
        return folder
    return None


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


def resume(
    cls: type[SelfOffPolicyAlgorithm], path: str | Path, env: GymEnv, other_env: bool = False, **kwargs: Any
) -> SelfOffPolicyAlgorithm:
    """
    Load the newest checkpoint that is what was written; those that are not are renamed to ``damaged-...``. Training goes on
    with ``model.learn(n_steps_in_all - model.num_timesteps, reset_num_timesteps=False)``: schedules depend on the number of
    all steps, which has to be the one that the run began with.

    Where the state of all environments could be saved (:mod:`sb3_softq.episodes` says of which), the same machine computes on
    as many threads of its CPU what the run would have computed that was not interrupted, to the bit; SAC and TD3 too, but for
    gSDE and for action noise with a memory. Elsewhere the environments are seeded anew, and the episodes that were going on
    are cut off, as by a time limit.

    :param cls: Class of the algorithm, such as ``SoftQ``
    :param path: Folder of the checkpoints
    :param env: Environment to go on with. The saved statistics of ``VecNormalize`` go into its wrapper of that name, or
        into a new one around ``env`` if it has none.
    :param other_env: Whether ``env`` may have another id, or other arguments, than the one that was saved
    :param kwargs: Further arguments of ``cls.load``, such as ``device``
    :return: The model as it was saved
    :raises FileNotFoundError: if there is no checkpoint
    :raises DamagedCheckpointError: if there are checkpoints and all of them are damaged, a ValueError that lists them
    :raises ValueError: if the algorithm's class, the environment, the number of environments, their spaces or their
        ``VecNormalize`` are not those that were saved
    """
    folder, saved = _newest_intact(Path(path))
    manifest.check_class(saved, cls)
    env = env if isinstance(env, VecEnv) else cls._wrap_env(env)
    # pickled before there was a manifest
    statistics = folder / ("vec_normalize.json" if saved else "vec_normalize.pkl")
    if statistics.exists():
        env = _restore_vec_normalize(statistics, env)
    manifest.check_env(saved, env, other_env)
    model = cls.load(folder / "model.zip", env=env, **kwargs)
    goes_on = _restore_environments(model, folder, saved)
    _restore_buffer(model, folder, goes_on)
    if not goes_on and model.seed is not None:
        assert model.env is not None
        # load() seeded the environment as at the very beginning: its first episodes would come again
        model.env.seed(model.seed + model.num_timesteps)
    set_random_state(model, load_random_state(folder / "random.json") if saved else load_from_pkl(folder / "random.pkl"))
    return model


def _newest_intact(path: Path) -> tuple[Path, dict[str, Any]]:
    """Folder and manifest of the newest checkpoint that is not damaged; damaged ones are set aside on the way."""
    damages: list[str] = []
    for folder in reversed(_checkpoints(path)):
        try:
            return folder, manifest.read(folder)
        except DamagedCheckpointError as error:
            damages.append(str(error))
            aside = folder.with_name(DAMAGED + folder.name)
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(folder, aside)
            warnings.warn(f"{error}. It is set aside as {aside.name}, the checkpoint before it is used.", stacklevel=3)
    if damages:
        raise DamagedCheckpointError("All checkpoints are damaged: " + "; ".join(damages))
    raise FileNotFoundError(f"There is no checkpoint in {path.absolute()}")


def _acquire(path: Path) -> FileLock:
    path.mkdir(parents=True, exist_ok=True)
    # one per folder and process: training and a save within it own the same
    lock = FileLock(path / LOCK, is_singleton=True)
    holder = path / HOLDER
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        who = holder.read_text() if holder.exists() else "another process"
        raise RuntimeError(f"{path.absolute()} is not free: {who} writes its checkpoints there") from error
    holder.write_text(f"process {os.getpid()} on {socket.gethostname()}")
    return lock


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


def _restore_environments(model: OffPolicyAlgorithm, folder: Path, saved: dict[str, Any]) -> bool:
    """Whether they are in the middle of the episodes that were going on."""
    env = model.get_env()
    # another one (other_env=True) begins anew
    if env is None or not (folder / ENVIRONMENTS).exists() or manifest.describe(env)["env"] != saved.get("env"):
        return False
    reason = restore_environments(model, folder / ENVIRONMENTS)
    if reason is None:
        if isinstance(model, CheckedOffPolicyAlgorithm):
            model.keep_action_noise()
        return True
    warnings.warn(f"New episodes begin, since the environments cannot be put where they were: {reason}", stacklevel=3)
    return False


def _restore_buffer(model: OffPolicyAlgorithm, folder: Path, goes_on: bool) -> None:
    assert model.replay_buffer is not None
    if (folder / "replay_buffer.pkl").exists():
        model.load_replay_buffer(folder / "replay_buffer.pkl", truncate_last_traj=not goes_on)
    else:
        load_segments(model.replay_buffer, folder, model.num_timesteps)
    if not goes_on:
        end_trajectory(model.replay_buffer)


def _restore_vec_normalize(statistics: Path, env: VecEnv) -> VecEnv:
    def load(env: VecEnv) -> VecNormalize:
        return load_vec_normalize(statistics, env) if statistics.suffix == ".json" else VecNormalize.load(str(statistics), env)

    vec_normalize = unwrap_vec_normalize(env)
    if vec_normalize is None:
        return load(env)
    saved = load(vec_normalize.venv)
    if vec_normalize.norm_obs != saved.norm_obs:
        raise ValueError(
            f"VecNormalize(norm_obs={vec_normalize.norm_obs!r}) is not allowed: "
            f"it must be {saved.norm_obs!r}, as in the checkpoint"
        )
    for name in ("clip_obs", "clip_reward", "gamma", "epsilon", "norm_reward"):
        setattr(vec_normalize, name, getattr(saved, name))
    vec_normalize.ret_rms = saved.ret_rms
    if saved.norm_obs:
        vec_normalize.obs_rms = saved.obs_rms
    return env
