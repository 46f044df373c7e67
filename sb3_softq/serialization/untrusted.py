"""
Agents saved by Stable-Baselines3 without trust in who saved them: what is pickled in their zip is not unpickled, since that
runs what a stranger wrote, but taken from the JSON beside it, from the caller, or refused by name.
"""

import io
import json
import math
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.save_util import open_path
from stable_baselines3.common.type_aliases import Schedule, TrainFreq, TrainFrequencyUnit
from stable_baselines3.common.utils import ConstantSchedule, LinearSchedule
from stable_baselines3.common.vec_env import VecEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# A file of zeros takes a thousandth of its size in a zip: networks do not
MAX_RATIO = 20
MAX_JSON = 64 * 2**20
# State of a training, without which an agent acts, and begins another episode
_FORGOTTEN = ("_last_obs", "_last_episode_starts", "_last_original_obs", "ep_info_buffer", "ep_success_buffer")

# Numbers that networks are made with besides their weights
SPARE_NUMBERS = 2**20


class NoMoreNumbers(TorchDispatchMode):
    """
    Context in which no more numbers are allocated for new tensors than a file can hold: a stranger's file may ask for networks
    of any size, which its weights would be found not to fit only once they are there.

    :param path: Name of the file
    :param n_bytes: Its size
    :raises ValueError: when more are asked for
    """

    def __init__(self, path: object, n_bytes: int):
        super().__init__()
        self.path, self.n_bytes, self.n_numbers = path, n_bytes, 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not any(isinstance(x, th.Tensor) for x in tree_leaves(args)):
            self.n_numbers += _n_numbers(func, args)
            if self.n_numbers > self.n_bytes + SPARE_NUMBERS:
                raise ValueError(
                    f"{self.path} asks for networks of {self.n_numbers:,} numbers or more, but has {self.n_bytes:,} bytes: it "
                    "does not hold their weights"
                )
        return func(*args, **(kwargs or {}))


def _n_numbers(func: Callable[..., Any], args: tuple[Any, ...]) -> int:
    """That a tensor has which is made of no other: its shape is a list, or it is a range, or a unit matrix."""
    shapes = [x for x in args if isinstance(x, list | tuple)]
    if shapes:
        return math.prod(shapes[0])
    largest = max((abs(math.ceil(x)) for x in args if isinstance(x, int | float) and math.isfinite(x)), default=0)
    return largest**2 if "eye" in str(func) else largest


def n_bytes(path: str | Path | io.BufferedIOBase) -> int:
    """
    :param path: A zip of Stable-Baselines3, named with its suffix or without
    :return: Its size
    """
    file = open_path(path, "r", suffix="zip")
    size = file.seek(0, io.SEEK_END)
    _put_back(file, path)
    return size


def _put_back(file: io.BufferedIOBase, path: str | Path | io.BufferedIOBase) -> None:
    """Close what was opened, and leave what was open for the next reader."""
    if isinstance(path, str | Path):
        file.close()
    else:
        path.seek(0)


def objects_without_unpickling(
    cls: type[BaseAlgorithm],
    path: str | Path | io.BufferedIOBase,
    env: VecEnv | None,
    custom_objects: Mapping[str, Any],
    arguments: Mapping[str, Any],
    rebuilt: Mapping[str, type],
) -> dict[str, Any]:
    """
    What ``load`` takes in place of each pickled object in a zip of Stable-Baselines3. Weights are read by ``torch.load`` with
    ``weights_only=True`` there.

    :param cls: Class of the algorithm
    :param path: The zip
    :param env: Environments, whose spaces are the agent's; or ``custom_objects`` holds these
    :param custom_objects: Objects of the caller, which replace those of the file
    :param arguments: Arguments of ``load`` that replace what was saved
    :param rebuilt: Attributes whose fields JSON holds, and their dataclasses
    :return: ``custom_objects`` and what was found
    :raises ValueError: if an object can be had from nowhere, naming it, or if a file in the zip would grow when it is read
    """
    file = open_path(path, "r", suffix="zip")
    try:
        with zipfile.ZipFile(file) as archive:
            _refuse_bombs(archive, str(path))
            data = json.loads(archive.read("data"))
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{path} is not an agent that Stable-Baselines3 has saved ({error})") from error
    finally:
        _put_back(file, path)
    found: dict[str, Any] = dict(custom_objects)
    for name, entry in data.items():
        if name in found or not (isinstance(entry, dict) and ":serialized:" in entry):
            continue
        if name in arguments or name in _FORGOTTEN or name.endswith("lr_schedule"):
            # given, not needed, or made from the learning rates
            found[name] = None
        elif name == "policy_class":
            found[name] = _policy_class(cls, entry)
        elif name in ("observation_space", "action_space") and env is not None:
            found[name] = getattr(env, name)
        elif name == "train_freq":
            found[name] = TrainFreq(1, TrainFrequencyUnit.STEP)
        elif name in rebuilt:
            fields = rebuilt[name].__dataclass_fields__  # type: ignore[attr-defined]
            found[name] = rebuilt[name](**{key: value for key, value in entry.items() if key in fields})
        elif (schedule := _schedule(entry)) is not None:
            found[name] = schedule
        else:
            raise ValueError(
                f"{name} is pickled in {path}, and is not read from a file without trust: it must come from the caller, as "
                f"{'env or ' if name.endswith('_space') else ''}custom_objects={{{name!r}: ...}}"
            )
    return found


def _schedule(entry: Mapping[str, Any]) -> Schedule | None:
    """One of Stable-Baselines3's, whose numbers are in the JSON."""
    classes: dict[str, tuple[Callable[..., Schedule], list[str]]] = {
        str(ConstantSchedule): (ConstantSchedule, ["val"]),
        str(LinearSchedule): (LinearSchedule, ["start", "end", "end_fraction"]),
    }
    schedule, names = classes.get(str(entry.get(":type:")), (None, []))
    numbers = [entry.get(name) for name in names]
    if schedule is None or not all(isinstance(number, float | int) for number in numbers):
        return None
    return schedule(*numbers)


def _policy_class(cls: type[BaseAlgorithm], entry: dict[str, Any]) -> type:
    """One of the algorithm's own, by the name in the JSON."""
    match = re.match(r"<function (\w+)\.__init__ at", str(entry.get("__init__")))
    known = {policy.__name__: policy for policy in cls.policy_aliases.values()}
    if match is None or match[1] not in known:
        raise ValueError(
            f"policy_class={match and match[1]!r} is not allowed from a file without trust: it must be one of "
            f"{', '.join(known)}, or come from the caller, as custom_objects={{'policy_class': ...}}"
        )
    return known[match[1]]


def _refuse_bombs(archive: zipfile.ZipFile, path: str) -> None:
    """A file that grows when it is read, in the archive or in one of torch's archives in it."""
    for info in archive.infolist():
        holds_tensors = info.filename.endswith(".pth")
        too_large = info.filename == "data" and info.file_size > MAX_JSON
        if too_large or info.file_size > MAX_RATIO * max(info.compress_size, 1024):
            raise ValueError(f"{info.filename} in {path} would have {info.file_size} bytes: it is not read without trust")
        if holds_tensors:
            inner = io.BytesIO(archive.read(info))
            if zipfile.is_zipfile(inner):
                with zipfile.ZipFile(inner) as tensors:
                    _refuse_bombs(tensors, f"{path}/{info.filename}")
