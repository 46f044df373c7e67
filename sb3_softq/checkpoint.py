"""
Crash-safe checkpoints of an off-policy algorithm, and training that goes on from them.

A folder named ``checkpoint-...`` is complete: it is written under another name, synced to the disk and then renamed, and
an old one is renamed away before it is deleted. Whenever a run is killed, its newest checkpoint can be loaded. A manifest
(:mod:`sb3_softq.checkpointing.manifest`) tells whether the disk has kept it: a damaged one is set aside, and the one before
is used.
"""

import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.save_util import load_from_pkl
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, unwrap_vec_normalize

from sb3_softq.checkpointing import manifest
from sb3_softq.checkpointing.disk import check_writable, is_of_the_disk, not_saved, sync
from sb3_softq.checkpointing.folders import (
    TEMPORARY,
    checkpoints,
    folder_lock,
    has_checkpoint,
    latest,
    newest_intact,
    numbers,
    own,
    steps_done,
)
from sb3_softq.checkpointing.interruption import Interruption
from sb3_softq.checkpointing.segments import bytes_to_write, load_segments, remember, save_segments
from sb3_softq.checkpointing.training_state import restore_environments, save_environments
from sb3_softq.checks import check_choice, check_integer, check_type
from sb3_softq.finite import DivergedError, check_parameters
from sb3_softq.off_policy import CheckedOffPolicyAlgorithm
from sb3_softq.replay import check_newest, end_trajectory, store_last_step
from sb3_softq.serialization.agent import SUFFIX
from sb3_softq.serialization.files import (
    consists_of_arrays,
    load_random_state,
    load_vec_normalize,
    save_random_state,
    save_vec_normalize,
    set_random_state,
)
from sb3_softq.serialization.values import OpaqueError, stored_names

SelfOffPolicyAlgorithm = TypeVar("SelfOffPolicyAlgorithm", bound=OffPolicyAlgorithm)

__all__ = ["ResumableCheckpoint", "folder_lock", "has_checkpoint", "latest", "resume", "steps_done"]

# Where they are in their episodes
ENVIRONMENTS = "environments.npz"
MODEL, PLAIN_MODEL = "model.zip", f"model{SUFFIX}"


class ResumableCheckpoint(BaseCallback):
    """
    Save all that training needs to go on, every ``save_freq`` steps and at the end of training: the model, its replay
    buffer, the environments in the middle of their episodes where :mod:`sb3_softq.checkpointing.training_state` knows their
    state, the statistics of ``VecNormalize`` and the state of the random generators.

    A save writes the part of the replay buffer that is not in the checkpoint it replaces, ``keep`` saves ago; the rest is
    linked, so that no file is shared by two checkpoints that stay. Transitions must not be changed in the buffer once they are
    there. Buffers of users' own classes, and that of HER with ``copy_info_dict``, are pickled whole.

    Attributes that neither Stable-Baselines3 nor the agent's class sets, such as those that a callback hangs on the model,
    are not saved, and a warning names them.

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
        check_type("path", path, (str, os.PathLike), "a path", optional=False)
        # an environment may change the working directory
        self.path = Path(path).absolute()
        self.keep = check_integer("keep", keep, 1)
        check_choice("on_disk_error", on_disk_error, ("raise", "continue"))
        self.on_disk_error = on_disk_error
        self._saved_at = 0
        self._tried_at = 0
        # where the environments and the replay buffer are at the same step
        self._is_between_rollouts = True
        self._warned_of: set[str] = set()
        self._lock: FileLock | None = None
        self._interruption = Interruption()
        # of the replay buffer before the step whose transition is stored next
        self._position: int | None = None
        # what the last save has raised
        self._failure: BaseException | None = None

    def _init_callback(self) -> None:
        check_type(
            "model", self.model, (OffPolicyAlgorithm,), "an off-policy algorithm, which has a replay buffer", optional=False
        )

    def _on_training_start(self) -> None:
        self._saved_at = self._tried_at = self.model.num_timesteps
        self._position = self._failure = None
        # an algorithm that tells of no error may have left it so
        self._release()
        lock = own(self.path)
        try:
            check_writable(self.path, TEMPORARY)
        except OSError:
            lock.release()
            raise
        self._lock = lock
        # when training ends by an error of an environment, it may not answer any more
        manifest.describe(self.training_env)
        self._interruption.watch(self.model, self.locals.get("callback"))

    def _on_rollout_start(self) -> None:
        self._is_between_rollouts = True
        self._position = None
        if self._interruption.number is not None:
            self._on_training_end()
        if self.model.num_timesteps - self._tried_at >= self.save_freq:
            self._save_in_training()
        self._is_between_rollouts = False

    def _on_step(self) -> bool:
        assert self.model.replay_buffer is not None
        self._position = self.model.replay_buffer.pos
        return True

    def _on_rollout_end(self) -> None:
        self._is_between_rollouts = True
        self._position = None

    def _on_training_end(self) -> None:
        if self._lock is None:
            return
        try:
            assert self.model.replay_buffer is not None
            if self._position is not None:
                # a callback has stopped a rollout; where the agent does not store the last step itself, it is done here
                if self._position == self.model.replay_buffer.pos:
                    store_last_step(self.model, self.locals)
                self._is_between_rollouts = True
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
        before = sys.exc_info()[1]
        with folder_lock(self.path):
            try:
                return self._save()
            except BaseException as error:
                # it would keep a full disk full
                shutil.rmtree(self.path / TEMPORARY, ignore_errors=True)
                self._failure = error
                if isinstance(error, Exception) and is_of_the_disk(error, before):
                    self._failure = not_saved(error, self.path, self.model, self._bytes_of_buffer())
                    raise self._failure from error
                raise

    def _save(self) -> Path:
        steps = self.model.num_timesteps
        check_parameters(self.model.policy, steps)
        assert self.model.replay_buffer is not None
        check_newest(self.model.replay_buffer, -(-(steps - self._saved_at) // self.model.n_envs), steps)
        older = checkpoints(self.path)
        count = 1 + (numbers(older[-1])[0] if older else 0)
        folder = self.path / f"checkpoint-{count}-step{self.model.num_timesteps}"
        replaced = self._replaced(older)
        temporary = self.path / TEMPORARY
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

        self._save_model(temporary)
        buffer, saved, linked = self.model.replay_buffer, None, set[str]()
        if consists_of_arrays(buffer):
            saved, linked = save_segments(buffer, temporary, replaced, steps)
        else:
            self.model.save_replay_buffer(temporary / "replay_buffer.pkl")
        lost: str | None = "training had ended in the middle of a rollout"
        if self._is_between_rollouts and self.model._last_obs is not None:
            lost = save_environments(self.model, temporary / ENVIRONMENTS)
        save_random_state(self.model, temporary / "random.json")
        vec_normalize = self.model.get_vec_normalize_env()
        if vec_normalize is not None:
            save_vec_normalize(vec_normalize, temporary / "vec_normalize.json")
        manifest.write(temporary, self.model, replaced, linked, lost)

        for file in (*temporary.iterdir(), temporary):
            if file.name not in linked:
                sync(file)
        os.replace(temporary, folder)
        sync(self.path)
        for old in older[: len(older) + 1 - self.keep]:
            os.replace(old, temporary)
            shutil.rmtree(temporary)
        if saved is not None:
            remember(buffer, folder, saved)
        self._saved_at = self.model.num_timesteps
        return folder

    def _save_model(self, folder: Path) -> None:
        exclude = self._unknown_attributes()
        if isinstance(self.model, CheckedOffPolicyAlgorithm):
            try:
                return self.model.save(folder / PLAIN_MODEL, exclude)
            except OpaqueError:
                # a function or class of the user's, which only a pickle holds
                pass
        self.model.save(folder / MODEL, exclude)

    def _replaced(self, older: list[Path]) -> Path | None:
        """The checkpoint whose place the next one takes."""
        return older[-self.keep] if len(older) >= self.keep else None

    def _bytes_of_buffer(self) -> int:
        """About how many a save writes."""
        assert self.model.replay_buffer is not None
        return bytes_to_write(self.model.replay_buffer, self._replaced(checkpoints(self.path)), self.model.num_timesteps)

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


def resume(
    cls: type[SelfOffPolicyAlgorithm], path: str | Path, env: GymEnv | str, other_env: bool = False, **kwargs: Any
) -> SelfOffPolicyAlgorithm:
    """
    Load the newest checkpoint that is what was written; those that are not are renamed to ``damaged-...``. Training goes on
    with ``model.learn(n_steps_in_all - model.num_timesteps, reset_num_timesteps=False)``: schedules depend on the number of
    all steps, which has to be the one that the run began with.

    Where the state of all environments could be saved (:mod:`sb3_softq.checkpointing.training_state` says of which), the same
    machine computes on as many threads of its CPU what the run would have computed that was not interrupted, to the bit; SAC
    and TD3 too, but for gSDE and for action noise with a memory. Elsewhere, and where training ended by an error, the
    environments are seeded anew, and the episodes that were going on are cut off, as by a time limit.

    :param cls: Class of the algorithm, such as ``SoftQ``
    :param path: Folder of the checkpoints
    :param env: Environment to go on with, or its id. The saved statistics of ``VecNormalize`` go into its wrapper of that
        name, or into a new one around ``env`` if it has none.
    :param other_env: Whether ``env`` may have another id, or other arguments, than the one that was saved
    :param kwargs: Further arguments of ``cls.load``, such as ``device``
    :return: The model as it was saved
    :raises FileNotFoundError: if there is no checkpoint
    :raises DamagedCheckpointError: if there are checkpoints and all of them are damaged, a ValueError that lists them
    :raises ValueError: if the algorithm's class, the environment, the number of environments, their spaces or their
        ``VecNormalize`` are not those that were saved
    """
    folder, saved = newest_intact(Path(path))
    manifest.check_class(saved, cls)
    env = env if isinstance(env, VecEnv) else cls._wrap_env(maybe_make_env(env, verbose=0))
    # pickled before there was a manifest
    statistics = folder / ("vec_normalize.json" if saved else "vec_normalize.pkl")
    if statistics.exists():
        env = _restore_vec_normalize(statistics, env)
    manifest.check_env(saved, env, other_env)
    model = cls.load(folder / (PLAIN_MODEL if (folder / PLAIN_MODEL).exists() else MODEL), env=env, **kwargs)
    if saved.get("logged_data"):
        warnings.warn("Logged data are not in a checkpoint: set_data(...) them again", stacklevel=2)
    goes_on = _restore_environments(model, folder, saved)
    _restore_buffer(model, folder, goes_on)
    if not goes_on and model.seed is not None:
        assert model.env is not None
        # load() seeded the environment as at the very beginning: its first episodes would come again
        model.env.seed(model.seed + model.num_timesteps)
    set_random_state(model, load_random_state(folder / "random.json") if saved else load_from_pkl(folder / "random.pkl"))
    return model


def _restore_environments(model: OffPolicyAlgorithm, folder: Path, saved: dict[str, Any]) -> bool:
    """Whether they are in the middle of the episodes that were going on."""
    env = model.get_env()
    # another one (other_env=True) begins anew
    if env is None or not manifest.is_same_env(manifest.describe(env)["env"], saved.get("env")):
        return False
    if (folder / ENVIRONMENTS).exists():
        reason = restore_environments(model, folder / ENVIRONMENTS)
        if reason is None:
            if isinstance(model, CheckedOffPolicyAlgorithm):
                model.keep_action_noise()
            return True
    else:
        reason = saved.get("new_episodes")
    if reason is not None:
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
    # names of a Dict, in any order
    for name, comparable in (("norm_obs", bool), ("norm_obs_keys", lambda keys: keys and sorted(keys))):
        here, there = (comparable(getattr(wrapper, name)) for wrapper in (vec_normalize, saved))
        if here != there:
            raise ValueError(f"VecNormalize({name}={here!r}) is not allowed: it must be {there!r}, as in the checkpoint")
    for name in ("clip_obs", "clip_reward", "gamma", "epsilon", "norm_reward"):
        setattr(vec_normalize, name, getattr(saved, name))
    vec_normalize.ret_rms = saved.ret_rms
    if saved.norm_obs:
        vec_normalize.obs_rms = saved.obs_rms
    return env
