"""A folder of checkpoints: their names and their order, which of them are what was written, and who writes there."""

import os
import re
import shutil
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sb3_softq.checkpointing import manifest
from sb3_softq.checkpointing.disk import make_folder, refused
from sb3_softq.checkpointing.manifest import DamagedCheckpointError

# Counted, because steps alone do not tell which one is the newest where a second run starts again from 0
NAME = re.compile(r"checkpoint-(\d+)-step(\d+)")
TEMPORARY = "checkpoint.tmp"
# Of a checkpoint that is not what was written
DAMAGED = "damaged-"
# Held while a run writes into a folder; the system lets go of it when the process dies
LOCK, HOLDER = ".lock", ".holder"


def numbers(folder: Path) -> tuple[int, int]:
    """
    :param folder: Of a checkpoint
    :return: Its count and its steps, by its name
    """
    match = NAME.fullmatch(folder.name)
    assert match is not None
    return int(match[1]), int(match[2])


def checkpoints(path: Path) -> list[Path]:
    """
    :param path: Folder of the checkpoints
    :return: Complete ones, oldest first
    """
    return sorted((folder for folder in path.glob("*") if NAME.fullmatch(folder.name)), key=numbers)


def latest(path: str | Path) -> Path | None:
    """
    :param path: Folder of the checkpoints
    :return: Folder of the newest checkpoint that is what was written, None if there is none
    """
    for folder in reversed(checkpoints(Path(path))):
        try:
            manifest.read(folder)
        except (DamagedCheckpointError, FileNotFoundError):
            if folder.exists():
                continue
            # a newer one has taken its place meanwhile
            return latest(path)
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
    return 0 if folder is None else numbers(folder)[1]


def newest_intact(path: Path) -> tuple[Path, dict[str, Any]]:
    """
    Find the newest checkpoint that is what was written; those that are not are set aside on the way.

    :param path: Folder of the checkpoints
    :return: Its folder and its manifest
    :raises FileNotFoundError: if there is no checkpoint
    :raises DamagedCheckpointError: if all of them are damaged
    """
    damages: list[str] = []
    for folder in reversed(checkpoints(path)):
        try:
            return folder, manifest.read(folder)
        except (DamagedCheckpointError, FileNotFoundError) as error:
            if not folder.exists():
                # a newer one has taken its place meanwhile
                return newest_intact(path)
            damages.append(str(error))
            aside = folder.with_name(DAMAGED + folder.name)
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(folder, aside)
            warnings.warn(f"{error}. It is set aside as {aside.name}, the checkpoint before it is used.", stacklevel=3)
    if damages:
        raise DamagedCheckpointError("All checkpoints are damaged: " + "; ".join(damages))
    raise FileNotFoundError(f"There is no checkpoint in {path.absolute()}")


@contextmanager
def folder_lock(path: str | Path) -> Iterator[None]:
    """
    Own a folder of checkpoints: no other process can save into it meanwhile. A process that dies lets go of it.

    :param path: Folder of the checkpoints
    :raises RuntimeError: if another process owns it, naming that
    """
    lock = own(Path(path))
    try:
        yield
    finally:
        lock.release()


def own(path: Path) -> FileLock:
    """
    :param path: Folder of the checkpoints, which is made if there is none
    :return: What lets go of it by ``release()``
    :raises OSError: if it cannot be made or written
    :raises RuntimeError: if another process owns it, naming that
    """
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
