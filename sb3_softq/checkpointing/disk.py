"""Folders and files that survive a power cut, and what is said where a disk does not take them."""

import os
import shutil
from pathlib import Path

from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm


def sync(path: Path) -> None:
    """
    Wait until a file, or the names in a folder, are on the disk.

    :param path: File or folder
    """
    if path.is_dir() and os.name == "nt":
        return  # Windows does not open folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """
    Make a folder, and those that it is in, where there is none yet.

    :param path: Folder
    :raises OSError: if it cannot be made, naming it
    """
    try:
        new = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for folder in new:
            sync(folder.parent)
    except OSError as error:
        raise refused(path, error) from error


def check_writable(path: Path, probe: str) -> None:
    """
    :param path: Folder that is there
    :param probe: Name for a folder in it, which is made and removed
    :raises OSError: if no file can be written there, naming it
    """
    folder = path / probe
    try:
        # what a killed process has left
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(exist_ok=True)
        (folder / "file").write_bytes(b"0")
    except OSError as error:
        raise refused(path, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def refused(path: Path, error: OSError) -> OSError:
    """
    :param path: Folder
    :param error: What the system says of it
    :return: An error that says so of the argument
    """
    return OSError(
        error.errno, f"path={str(path)!r} is not allowed: it must be a folder that can be made and written ({error.strerror})"
    )


def is_of_the_disk(error: BaseException, before: BaseException | None = None) -> bool:
    """
    :param error: Of a save
    :param before: What was being handled when the save began, of an environment say, and is no reason for its error
    :return: Whether the system has refused to write: torch's writer may turn that into a RuntimeError
    """
    cause: BaseException | None = error if isinstance(error, OSError | RuntimeError) else None
    while cause is not None and cause is not before:
        if isinstance(cause, OSError):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def not_saved(error: BaseException, path: Path, model: OffPolicyAlgorithm, buffer_bytes: int) -> OSError:
    """
    :param error: Of a save
    :param path: Folder of the checkpoints
    :param model: What was to be saved
    :param buffer_bytes: What a save writes of its replay buffer
    :return: An error that says what there is no room for
    """
    number = error.errno if isinstance(error, OSError) else None
    try:
        free = f"{shutil.disk_usage(path).free / 1e6:,.1f} MB"
    except OSError:
        free = "an unknown number of bytes"
    # the parameters, and two moments of each
    needed = buffer_bytes + 3 * sum(x.numel() * x.element_size() for x in model.policy.parameters())
    return OSError(
        number,
        f"no checkpoint could be written in {path.absolute()} at step {model.num_timesteps} ({error}): it needs about "
        f"{needed / 1e6:,.1f} MB, {free} are free there. The last checkpoint stays",
    )
