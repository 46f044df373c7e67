"""
A replay buffer in several files, of which a save writes but one: what the buffer has gained since an earlier checkpoint. The
other files are links to those of that checkpoint, so that each folder holds the whole buffer by itself. The episodes of HER's
buffer are written each time.

``replay_buffer.npz`` is a whole one. ``replay-00000001.npz`` and so on are rows that are read over it, in this order.
"""

import os
import re
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
from stable_baselines3.common.buffers import ReplayBuffer

from sb3_softq.serialization.files import (
    buffer_arrays,
    consists_of_arrays,
    load_buffer,
    load_episodes,
    save_buffer,
    save_episodes,
)

WHOLE = "replay_buffer.npz"
EPISODES = "episodes.npz"
_PART = re.compile(r"replay-(\d{8})\.npz")
# More files than these are written as a whole one again
MAX_FILES = 100
# Rows by which it is known that a buffer still holds what was saved
_N_COMPARED = 64


@dataclass
class Segment:
    """
    Rows of a buffer in a file.

    :param name: Of the file
    :param start: First row
    :param n_rows: Number of rows from there on, round the end of the buffer
    """

    name: str
    start: int
    n_rows: int


@dataclass
class Saved:
    """
    How a buffer lies in the folder of a checkpoint.

    :param segments: Its files, in the order in which they are read
    :param pos: Row that comes next
    :param full: Whether the buffer has gone round
    :param num_timesteps: Of the agent
    :param checksum: Of some of the rows before ``pos``
    """

    segments: list[Segment]
    pos: int
    full: bool
    num_timesteps: int
    checksum: int


# What was saved of a buffer in this process, or read into it, by the folder
_known: WeakKeyDictionary[ReplayBuffer, dict[Path, Saved]] = WeakKeyDictionary()


def save_segments(buffer: ReplayBuffer, folder: Path, base: Path | None, num_timesteps: int) -> tuple[Saved, set[str]]:
    """
    Write a buffer, or what it has gained since it was saved in another folder.

    :param buffer: Replay buffer of arrays, see :func:`sb3_softq.serialization.files.consists_of_arrays`. Its rows are not
        looked at again once they are saved, but for the newest one of each save
    :param folder: Folder to write into
    :param base: Folder whose files may be used, None if there is none
    :param num_timesteps: Of the agent
    :return: What to tell :func:`remember`, and the names of the files that come from ``base``
    """
    save_episodes(buffer, folder / EPISODES)
    segments = _continued(buffer, base, num_timesteps)
    if segments is not None and base is not None:
        *others, new = segments
        old = {segment.name for segment in others}
        if _link(old, base, folder):
            rows = np.arange(new.start, new.start + new.n_rows) % buffer.buffer_size
            place = np.array([buffer.pos, buffer.full, new.start, new.n_rows, buffer.buffer_size])
            arrays = {name: array[rows] for name, array in buffer_arrays(buffer).items()}
            np.savez(folder / new.name, place=place, **arrays)  # type: ignore[arg-type]
            return _saved(buffer, segments, num_timesteps), old
    n_rows = save_buffer(buffer, folder / WHOLE)
    return _saved(buffer, [Segment(WHOLE, 0, n_rows)], num_timesteps), set()


def bytes_to_write(buffer: ReplayBuffer, base: Path | None, num_timesteps: int) -> int:
    """
    :param buffer: Replay buffer; those of other kinds are pickled whole
    :param base: Folder whose files may be used, None if there is none
    :param num_timesteps: Of the agent
    :return: About how many bytes of it a save writes
    """
    if not consists_of_arrays(buffer):
        parts = [part for x in vars(buffer).values() for part in (x.values() if isinstance(x, dict) else [x])]
        return sum(part.nbytes for part in parts if isinstance(part, np.ndarray))
    segments = _continued(buffer, base, num_timesteps)
    n_rows = buffer.size() if segments is None else segments[-1].n_rows
    return sum(array.nbytes for array in buffer_arrays(buffer).values()) * n_rows // buffer.buffer_size


def load_segments(buffer: ReplayBuffer, folder: Path, num_timesteps: int) -> None:
    """
    :param buffer: Replay buffer to fill, of the kind and size that was saved
    :param folder: Folder that :func:`save_segments` wrote
    :param num_timesteps: Of the agent
    :raises ValueError: if the files do not fit, naming what differs
    """
    segments: list[Segment] = []
    covered = np.zeros(buffer.buffer_size, dtype=bool)
    if (folder / WHOLE).exists():
        n_rows = load_buffer(buffer, folder / WHOLE)
        segments.append(Segment(WHOLE, 0, n_rows))
        covered[:n_rows] = True
    for path in sorted(path for path in folder.iterdir() if _PART.fullmatch(path.name)):
        segment, rows = _load_rows(buffer, path)
        segments.append(segment)
        covered[rows] = True
    if not covered[: buffer.size()].all():
        raise ValueError(f"{folder} lacks row {covered.argmin()} of the replay buffer")
    load_episodes(buffer, folder / EPISODES)
    remember(buffer, folder, _saved(buffer, segments, num_timesteps))


def remember(buffer: ReplayBuffer, folder: Path, saved: Saved) -> None:
    """
    :param buffer: Replay buffer
    :param folder: Where it was saved, or read from; what is known of folders that are gone is forgotten
    :param saved: Of :func:`save_segments`
    """
    known = _known.setdefault(buffer, {})
    known[folder.resolve()] = saved
    for other in [other for other in known if not other.exists()]:
        del known[other]


def _load_rows(buffer: ReplayBuffer, path: Path) -> tuple[Segment, np.ndarray]:
    own = buffer_arrays(buffer)
    with np.load(path, allow_pickle=False) as saved:
        pos, full, start, n_rows, buffer_size = (int(x) for x in saved["place"])
        fits = buffer_size == buffer.buffer_size if full else buffer_size <= buffer.buffer_size
        fits = fits and 0 <= pos < buffer_size and 0 <= start < buffer_size and 0 < n_rows <= buffer_size
        if not fits or saved.files != ["place", *own]:
            raise ValueError(f"{path} does not fit into the agent's replay buffer: buffer_size must be {buffer_size}")
        rows = np.arange(start, start + n_rows) % buffer_size
        for name, array in own.items():
            values = saved[name]
            if values.shape != (n_rows, *array.shape[1:]) or values.dtype != array.dtype:
                raise ValueError(f"{name} of shape {values.shape} and type {values.dtype} in {path} do not fit")
            array[rows] = values
    buffer.pos, buffer.full = pos, bool(full)
    return Segment(path.name, start, n_rows), rows


def _continued(buffer: ReplayBuffer, base: Path | None, num_timesteps: int) -> list[Segment] | None:
    """Segments of a folder with what was added since, as the last one; None where the buffer is to be written whole."""
    before = None if base is None else _known.get(buffer, {}).get(base.resolve())
    gained = None if before is None else _gained(buffer, before, num_timesteps)
    if before is None or gained is None:
        return None
    # The newest row may have changed, since a reset ends its episode, and so may the row after it, where the memory
    # efficient variant has the newest next observation.
    number = 1 + max(_number(segment.name) for segment in before.segments)
    new = Segment(f"replay-{number:08d}.npz", (before.pos - 1) % buffer.buffer_size, gained + 2)
    segments = _needed([*before.segments, new], buffer.buffer_size)
    return segments if len(segments) <= MAX_FILES else None


def _number(name: str) -> int:
    match = _PART.fullmatch(name)
    return 0 if match is None else int(match[1])


def _gained(buffer: ReplayBuffer, before: Saved, num_timesteps: int) -> int | None:
    """Rows that were added since; None if that is not known, or if they are nearly all."""
    gained = (buffer.pos - before.pos) % buffer.buffer_size
    steps = num_timesteps - before.num_timesteps
    has_begun = before.full or before.pos > 0
    fits = gained + 2 + _n_compared(buffer) <= buffer.buffer_size
    # where another agent, or the user, has filled it meanwhile, there are other numbers or other rows
    if not has_begun or not fits or not 0 <= gained * buffer.n_envs < steps + buffer.n_envs:
        return None
    return gained if _checksum(buffer, before.pos, before.full) == before.checksum else None


def _n_compared(buffer: ReplayBuffer) -> int:
    return min(_N_COMPARED, buffer.buffer_size // 4)


def _checksum(buffer: ReplayBuffer, pos: int, full: bool) -> int:
    """Of rows that are there and stay as they are until they are written over."""
    n_rows = _n_compared(buffer) if full else min(_n_compared(buffer), max(pos - 1, 0))
    rows = np.arange(pos - 1 - n_rows, pos - 1) % buffer.buffer_size
    checksum = 0
    for array in buffer_arrays(buffer).values():
        checksum = zlib.crc32(np.ascontiguousarray(array[rows]).tobytes(), checksum)
    return checksum


def _saved(buffer: ReplayBuffer, segments: list[Segment], num_timesteps: int) -> Saved:
    return Saved(segments, buffer.pos, buffer.full, num_timesteps, _checksum(buffer, buffer.pos, buffer.full))


def _needed(segments: list[Segment], buffer_size: int) -> list[Segment]:
    """Without those whose rows have all been written over."""
    covered = np.zeros(buffer_size, dtype=bool)
    needed = []
    for segment in reversed(segments):
        end = segment.start + segment.n_rows
        parts = (slice(segment.start, end), slice(0, max(end - buffer_size, 0)))
        if not all(covered[part].all() for part in parts):
            needed.append(segment)
        for part in parts:
            covered[part] = True
    return needed[::-1]


def _link(names: set[str], base: Path, folder: Path) -> bool:
    """Whether files of another folder are now in this one too."""
    try:
        for name in names:
            try:
                os.link(base / name, folder / name)
            except OSError:
                # a file system without links
                shutil.copyfile(base / name, folder / name)
    except OSError:
        for name in names:
            (folder / name).unlink(missing_ok=True)
        return False
    return True
