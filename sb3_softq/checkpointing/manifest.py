"""What a checkpoint consists of and what it belongs to, as plain JSON beside its files: read before any of them is opened."""

import hashlib
import inspect
import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import gymnasium
import numpy as np
import stable_baselines3
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, unwrap_vec_normalize

from sb3_softq.checkpointing.env_state import CALL
from sb3_softq.version import __version__

NAME = "manifest.json"
# Raised when older code could not read what newer code writes
FORMAT = 3
# Of checkpoints without a manifest, which were written before there was one
REQUIRED = ("model.zip", "replay_buffer.pkl", "random.pkl")
# Arguments of an environment that change how it is drawn; Stable-Baselines3 gives the first to those that it makes itself
_OF_PICTURES = {"render_mode", "camera_id", "camera_name", "default_camera_config"}
# Sizes and times of the files of a folder whose contents this process has found to be those that were written
_intact: dict[Path, list[tuple[str, int, int, int]]] = {}
# Of environments that were asked
_specs_of: WeakKeyDictionary[VecEnv, dict[str, Any] | None] = WeakKeyDictionary()


class DamagedCheckpointError(ValueError):
    """A checkpoint is not what was written."""


def write(
    folder: Path,
    model: OffPolicyAlgorithm,
    base: Path | None = None,
    old: Collection[str] = (),
    new_episodes: str | None = None,
) -> None:
    """
    Describe the files in a folder.

    :param folder: Of the checkpoint; all of its other files are there
    :param model: The agent whose they are
    :param base: Folder of another checkpoint
    :param old: Names of files that come from there: they have to be what was written at that time, and are not read now
    :param new_episodes: Why the environments could not be saved
    """
    env = model.get_env()
    files = {} if base is None else _entries(base, old)
    manifest = {
        "format": FORMAT,
        "versions": {
            "sb3_softq": __version__,
            "torch": th.__version__,
            "stable_baselines3": stable_baselines3.__version__,
            "gymnasium": gymnasium.__version__,
        },
        "class": type(model).__name__,
        "arguments": _to_json(arguments_of(model)),
        "num_timesteps": model.num_timesteps,
        **({} if env is None else describe(env)),
        "new_episodes": new_episodes,
        "logged_data": getattr(model, "logged_data", None) is not None,
        "files": {
            file.name: files.get(file.name) or {"size": file.stat().st_size, "sha256": _digest(file)}
            for file in sorted(folder.iterdir())
        },
    }
    (folder / NAME).write_text(json.dumps(manifest | {"sha256": _digest_of(manifest)}, indent=1))


def read(folder: Path) -> dict[str, Any]:
    """
    Read the manifest of a checkpoint and check that its files are those that were written. Contents are read once by a
    process, and again where a file has another size or time than it had then.

    :param folder: Of the checkpoint
    :return: The manifest; an empty one for a checkpoint that was written before there were any
    :raises DamagedCheckpointError: if a file is missing, has another size or other contents
    :raises ValueError: if the checkpoint was written by a newer release, in a format that this one does not know
    """
    path = folder / NAME
    if not path.exists():
        missing = [name for name in REQUIRED if not (folder / name).exists()]
        if missing:
            raise DamagedCheckpointError(f"{folder}: {', '.join(missing)} and {NAME} are missing")
        return {}
    try:
        manifest = json.loads(path.read_text())
        files = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
        number, digest = int(manifest["format"]), manifest.pop("sha256")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedCheckpointError(f"{path} cannot be read ({type(error).__name__}: {error})") from error
    if number > FORMAT:
        raise ValueError(
            f"{folder} has format {number}, which sb3_softq {__version__} does not know (up to {FORMAT}): it was written by "
            f"sb3_softq {manifest.get('versions', {}).get('sb3_softq')}, or a later release can read it"
        )
    if digest != _digest_of(manifest):
        raise DamagedCheckpointError(f"{path} has other contents than were written")
    signature = _signature(folder)
    is_known = _intact.get(folder.resolve()) == signature
    for name, (size, digest) in files.items():
        file = folder / name
        if Path(name).name != name or not file.is_file():
            raise DamagedCheckpointError(f"{file} is missing")
        if file.stat().st_size != size:
            raise DamagedCheckpointError(f"{file} has {file.stat().st_size} bytes, {size} were written")
        if not is_known and _digest(file) != digest:
            raise DamagedCheckpointError(f"{file} has other contents than were written")
    _intact[folder.resolve()] = signature
    return manifest


def _signature(folder: Path) -> list[tuple[str, int, int, int]]:
    """What of the files in a folder changes where they are written again."""
    files = [(file.name, file.stat()) for file in sorted(folder.iterdir())]
    return [(name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in files]


def describe(env: VecEnv) -> dict[str, Any]:
    """
    :param env: Environments
    :return: What of them a checkpoint depends on
    """
    vec_normalize = unwrap_vec_normalize(env)
    return {
        "env": _spec_of(env),
        "n_envs": env.num_envs,
        "observation_space": repr(env.observation_space),
        "action_space": repr(env.action_space),
        "vec_normalize": None
        if vec_normalize is None
        else {name: getattr(vec_normalize, name) for name in ("norm_obs", "norm_reward")},
    }


def is_same_env(one: dict[str, Any] | None, other: dict[str, Any] | None) -> bool:
    """
    :param one: What :func:`describe` says of the environment, id and arguments
    :param other: Likewise, or from a checkpoint
    :return: Whether what is learned there is the same
    """
    if one is None or other is None:
        return one is other
    arguments = [{k: _to_json(v) for k, v in env["kwargs"].items() if k not in _OF_PICTURES} for env in (one, other)]
    return one["id"] == other["id"] and arguments[0] == arguments[1]


def check_class(manifest: dict[str, Any], cls: type[OffPolicyAlgorithm]) -> None:
    """
    :param manifest: Of a checkpoint
    :param cls: Class of the agent that goes on
    :raises ValueError: if neither it nor a parent of it has been saved
    """
    saved = manifest.get("class")
    if saved is not None and saved not in [parent.__name__ for parent in cls.__mro__]:
        raise ValueError(f"cls={cls.__name__} is not allowed: the checkpoint is one of {saved}")


def check_env(manifest: dict[str, Any], env: VecEnv, other_env: bool) -> None:
    """
    :param manifest: Of a checkpoint
    :param env: Environments to go on with, ``VecNormalize`` among its wrappers where it will be
    :param other_env: Whether an environment of another id, or with other arguments, is wanted
    :raises ValueError: if they are not those that the checkpoint belongs to, naming both
    """
    here = describe(env)
    hint = {"env": " (resume(..., other_env=True) goes on in another one)"}
    for name, value in here.items():
        saved = manifest.get(name, value)
        if name == "env" and (other_env or saved is None or value is None or is_same_env(saved, value)):
            continue
        if saved == value:
            continue
        raise ValueError(f"{name}={value} is not allowed: the checkpoint has {name}={saved}{hint.get(name, '')}")


def _entries(base: Path, names: Collection[str]) -> dict[str, Any]:
    """Of files in the manifest of another folder; none if that cannot be read, so that the files are."""
    try:
        files = json.loads((base / NAME).read_text())["files"]
        return {name: files[name] for name in names}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _spec_of(env: VecEnv) -> dict[str, Any] | None:
    """Of the first environment, which is asked once: later its process may have ended."""
    if env not in _specs_of:
        try:
            if isinstance(env.unwrapped, DummyVecEnv | SubprocVecEnv):
                # by itself: arguments that cannot be pickled would end its process
                (found,) = env.env_method(CALL, _id_and_arguments, indices=[0])
            else:
                found = _of_spec(env.get_attr("spec")[0])
        except AttributeError:
            found = None
        _specs_of[env] = found if isinstance(found, dict) else None
    return _specs_of[env]


def _id_and_arguments(env: gymnasium.Env[Any, Any]) -> dict[str, Any] | None:
    return _of_spec(env.spec)


def _of_spec(spec: Any) -> dict[str, Any] | None:
    return None if spec is None else {"id": spec.id, "kwargs": _to_json(spec.kwargs)}


def arguments_of(model: BaseAlgorithm) -> dict[str, Any]:
    """
    :param model: Agent of any algorithm
    :return: The arguments of its class, without policy and environment, where it keeps them
    """
    names = inspect.signature(type(model)).parameters.keys() - {"policy", "env"}
    # some with an underscore, as stats_window_size
    kept = {name.removeprefix("_"): value for name, value in vars(model).items()} | vars(model)
    return {name: kept[name] for name in sorted(names & kept.keys())}


def _to_json(value: Any) -> Any:
    """What JSON can hold, and of the rest how it looks, wherever in memory it lies."""
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else repr(key): _to_json(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(x) for x in value]
    if isinstance(value, np.number):
        return value.item()
    return without_address(value if value is None or isinstance(value, bool | int | float | str) else repr(value))


def without_address(value: Any) -> Any:
    """
    :param value: How something looks
    :return: The same, wherever in memory it lies
    """
    return re.sub(r" at 0x[0-9a-fA-F]+", "", value) if isinstance(value, str) else value


def _digest_of(manifest: dict[str, Any]) -> str:
    """Of the manifest itself."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
