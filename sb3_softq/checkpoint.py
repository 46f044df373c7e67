"""
Crash-safe checkpoints of an off-policy algorithm, and training that goes on from them.

A folder named ``checkpoint-...`` is complete: it is written under another name, synced to the disk and then renamed, and
an old one is renamed away before it is deleted. Whenever a run is killed, its newest checkpoint can be loaded. A manifest
(:mod:`sb3_softq.manifest`) tells whether the disk has kept it: a damaged one is set aside, and the one before is used.
"""

import os
import re
import shutil
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.save_util import load_from_pkl
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, unwrap_vec_normalize

from sb3_softq import manifest
from sb3_softq.checks import check_integer
from sb3_softq.disk import check_writable, is_of_the_disk, make_folder, not_saved, refused, sync
from sb3_softq.finite import DivergedError, check_parameters
from sb3_softq.interruption import Interruption
from sb3_softq.manifest import DamagedCheckpointError
from sb3_softq.plain_files import (
    PLAIN_BUFFERS,
    load_buffer,
    load_random_state,
    load_vec_normalize,
    save_buffer,
    save_random_state,
    save_vec_normalize,
    set_random_state,
)
from sb3_softq.replay import check_newest, end_trajectory, store_last_step

SelfOffPolicyAlgorithm = TypeVar("SelfOffPolicyAlgorithm", bound=OffPolicyAlgorithm)

# Counted, because steps alone do not tell which one is the newest where a second run starts again from 0
NAME = re.compile(r"checkpoint-(\d+)-step(\d+)")
TEMPORARY = "checkpoint.tmp"
# Of a checkpoint that is not what was written
DAMAGED = "damaged-"
# Held while a run writes into a folder; the system lets go of it when the process dies
LOCK, HOLDER = ".lock", ".holder"


class ResumableCheckpoint(BaseCallback):
    """
    Save all that training needs to go on, every ``save_freq`` steps and at the end of training: the model, its replay
    buffer, the statistics of ``VecNormalize`` and the state of the random generators.

    Saves happen between rollouts, where the replay buffer, the networks and the number of steps belong together. From the
    start of training to its end the folder belongs to this process. SIGTERM, as cluster schedulers send it, SIGHUP and Ctrl-C
    save after the rollout or evaluation that is going on and end the process with the usual status, 143, 129 and 130, unless
    the program handles them itself or trains in another thread than its main one. A second Ctrl-C ends it at once.

    Where training ends by an error, of an environment say, ``SoftQ`` and ``DiscreteSoftQ`` save what they had learned before
    it, unless it is an error of what they learned.

    :param save_freq: Save every ``save_freq`` steps, counted over all environments
    :param path: Folder of the checkpoints
    :param keep: How many of the newest checkpoints are kept, at least 1
    :param on_disk_error: What a save does that the disk has no room for, or that it refuses: ``"raise"`` ends training,
        ``"continue"`` warns, and the next save tries again; :meth:`save` itself raises
    :raises ValueError: if an argument is out of its range
    """

    model: OffPolicyAlgorithm

    def __init__(self, save_freq: int, path: str | Path, keep: int = 2, on_disk_error: str = "raise"):
        super().__init__()
        self.save_freq = check_integer("save_freq", save_freq, 1)
        self.path = Path(path)
        self.keep = check_integer("keep", keep, 1)
        if on_disk_error not in ("raise", "continue"):
            raise ValueError(f'on_disk_error={on_disk_error!r} is not allowed: it must be "raise" or "continue"')
        self.on_disk_error = on_disk_error
        self._saved_at = 0
        self._tried_at = 0
        self._lock: FileLock | None = None
        self._interruption = Interruption()
        # of the replay buffer before the step whose transition is stored next
        self._position: int | None = None
        # what the last save has raised
        self._failure: BaseException | None = None

    def _on_training_start(self) -> None:
        self._saved_at = self._tried_at = self.model.num_timesteps
        self._position = self._failure = None
        # an algorithm that tells of no error may have left it so
        self._release()
        lock = _acquire(self.path)
        try:
            check_writable(self.path, TEMPORARY)
        except OSError:
            lock.release()
            raise
        self._lock = lock
        # when training ends by an error of an environment, it may not answer any more
        manifest.describe(self.training_env)
        self._interruption.watch(self.model)

    def _on_rollout_start(self) -> None:
        self._position = None
        if self._interruption.number is not None:
            self._on_training_end()
        if self.model.num_timesteps - self._tried_at >= self.save_freq:
            self._save_in_training()

    def _on_step(self) -> bool:
        assert self.model.replay_buffer is not None
        self._position = self.model.replay_buffer.pos
        return True

    def _on_rollout_end(self) -> None:
        self._position = None

    def _on_training_end(self) -> None:
        if self._lock is None:
            return
        try:
            assert self.model.replay_buffer is not None
            if self._position == self.model.replay_buffer.pos:
                # a callback has stopped an agent that does not do so itself
                store_last_step(self.model, self.locals)
            self._save_in_training()
        finally:
            self._release()
        self._interruption.end_process()

    def on_training_error(self, error: BaseException) -> None:
        """
        Save when training has ended by an error, and give the folder back; for algorithms that say so.

        :param error: Which ended it
        """
        if self._lock is None:
            return
        wanted = isinstance(error, Exception) or self._interruption.number is None
        try:
            if wanted and not isinstance(error, DivergedError) and error is not self._failure:
                self.save()
        except Exception as failure:
            warnings.warn(f"Training ended by an error, and its last steps could not be saved: {failure}", stacklevel=2)
        finally:
            self._release()
        if isinstance(error, Exception):
            # Ctrl-C reaches the processes of environments too, which end by it
            self._interruption.end_process()

    def _release(self) -> None:
        self._interruption.release()
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _save_in_training(self) -> None:
        self._tried_at = self.model.num_timesteps
        try:
            self.save()
        except OSError as error:
            if self.on_disk_error == "raise":
                raise
            warnings.warn(f"{error}. Training goes on, the next save tries again", stacklevel=2)

    def save(self) -> Path:
        """
        Write a checkpoint now, then delete the older ones but ``keep`` - 1.

        :return: Folder of the checkpoint
        :raises ValueError: if a parameter, or what the replay buffer has gained since the last save, is NaN or infinite; the
            last checkpoint stays
        :raises OSError: if the disk does not take it, saying how much room there is; the last checkpoint stays
        :raises RuntimeError: if another process writes into the folder
        """
        with folder_lock(self.path):
            try:
                return self._save()
            except BaseException as error:
                # it would keep a full disk full
                shutil.rmtree(self.path / TEMPORARY, ignore_errors=True)
                self._failure = error
                if isinstance(error, Exception) and is_of_the_disk(error):
                    self._failure = not_saved(error, self.path, self.model)
                    raise self._failure from error
                raise

    def _save(self) -> Path:
        steps = self.model.num_timesteps
        check_parameters(self.model.policy, steps)
        assert self.model.replay_buffer is not None
        check_newest(self.model.replay_buffer, -(-(steps - self._saved_at) // self.model.n_envs), steps)
        older = _checkpoints(self.path)
        count = 1 + (_numbers(older[-1])[0] if older else 0)
        folder = self.path / f"checkpoint-{count}-step{self.model.num_timesteps}"
        temporary = self.path / TEMPORARY
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

        self.model.save(temporary / "model.zip")
        if type(self.model.replay_buffer) in PLAIN_BUFFERS:
            save_buffer(self.model.replay_buffer, temporary / "replay_buffer.npz")
        else:
            self.model.save_replay_buffer(temporary / "replay_buffer.pkl")
        save_random_state(self.model, temporary / "random.json")
        vec_normalize = self.model.get_vec_normalize_env()
        if vec_normalize is not None:
            save_vec_normalize(vec_normalize, temporary / "vec_normalize.json")
        manifest.write(temporary, self.model)

        for file in (*temporary.iterdir(), temporary):
            sync(file)
        os.replace(temporary, folder)
        sync(self.path)
        for old in older[: len(older) + 1 - self.keep]:
            os.replace(old, temporary)
            shutil.rmtree(temporary)
        self._saved_at = self.model.num_timesteps
        return folder


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
    with ``model.learn(n_more_steps, reset_num_timesteps=False)``, in a new episode: the state of an environment cannot be
    saved.

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
    _restore_buffer(model, folder)
    if model.seed is not None:
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
    make_folder(path)
    # one per folder and process: training and a save within it own the same
    lock = FileLock(path / LOCK, is_singleton=True)
    holder = path / HOLDER
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        who = (holder.read_text() if holder.exists() else "") or "another process"
        raise RuntimeError(f"{path.absolute()} is not free: {who} writes its checkpoints there") from error
    except OSError as error:
        raise refused(path, error) from error
    # no more than a help for others: a full disk is told of by what is to be saved
    with suppress(OSError):
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


def _restore_buffer(model: OffPolicyAlgorithm, folder: Path) -> None:
    assert model.replay_buffer is not None
    if (folder / "replay_buffer.npz").exists():
        load_buffer(model.replay_buffer, folder / "replay_buffer.npz")
    else:
        model.load_replay_buffer(folder / "replay_buffer.pkl")
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
