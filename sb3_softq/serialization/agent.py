"""
Agents in one file of tensors (safetensors, https://github.com/huggingface/safetensors) with JSON in its header: reading it
runs no code. Weights have the names of their state dicts, ``policy/actor.trunk.0.weight`` say, for other programs to read.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import stable_baselines3
import torch as th
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from sb3_softq.serialization.objects import KnownObjects
from sb3_softq.serialization.values import OpaqueError, decode, encode
from sb3_softq.version import __version__

SUFFIX = ".safetensors"
# Raised when older code could not read what newer code writes
FORMAT = 1
_HEADER = "sb3_softq"


class Contents(NamedTuple):
    """
    What Stable-Baselines3 saves of an agent.

    :param data: Attributes
    :param params: State dicts of networks and optimizers by their names
    :param variables: Other tensors by their names
    """

    data: dict[str, Any]
    params: dict[str, Any]
    variables: dict[str, Any]


def is_safetensors(path: Any) -> TypeGuard[str | Path]:
    """
    :param path: Where an agent is to be saved or read
    :return: Whether that is a file of tensors, by its name
    """
    return isinstance(path, str | Path) and Path(path).suffix == SUFFIX


def write_agent(path: str | Path, class_name: str, contents: Contents, objects: KnownObjects) -> None:
    """
    :param path: File to write
    :param class_name: Of the algorithm
    :param contents: Of the agent
    :param objects: Knows what the attributes are made of
    :raises OpaqueError: if an attribute is made of something else, naming it; a ValueError
    """
    tensors: dict[str, np.ndarray] = {}
    arrays: dict[str, np.ndarray] = {}
    header = {
        "format": FORMAT,
        "versions": {"sb3_softq": __version__, "torch": th.__version__, "stable_baselines3": stable_baselines3.__version__},
        "class": class_name,
        "data": {name: _encode(value, arrays, name, objects) for name, value in contents.data.items()},
        "params": {name: _without_tensors(value, name, tensors) for name, value in contents.params.items()},
        "variables": {name: _without_tensors(value, name, tensors) for name, value in contents.variables.items()},
    }
    tensors |= {f"data/{key}": np.asarray(array, order="C") for key, array in arrays.items()}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    # errors of the disk are the system's, which safetensors' own writer hides
    Path(path).write_bytes(save(tensors, metadata={_HEADER: json.dumps(header)}))


def read_agent(path: str | Path, class_names: Sequence[str], objects: KnownObjects) -> Contents:
    """
    :param path: File that :func:`write_agent` wrote
    :param class_names: Names of the algorithm's class and of its parents, in this order
    :param objects: Knows what the attributes may be made of
    :return: What was written
    :raises ValueError: if it is not such a file, one of another class, or of a format that this release does not know
    """
    try:
        with safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {})[_HEADER])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if header["format"] > FORMAT:
            raise ValueError(
                f"{path} has format {header['format']}, which sb3_softq {__version__} does not know (up to {FORMAT}): it was "
                f"written by sb3_softq {header['versions']['sb3_softq']}, or a later release can read it"
            )
        if header["class"] not in class_names:
            raise ValueError(f"{path} holds a {header['class']}, not a {class_names[0]}")
        arrays = {key.removeprefix("data/"): array for key, array in tensors.items() if key.startswith("data/")}
        return Contents(
            {name: decode(value, arrays, objects) for name, value in header["data"].items()},
            {name: _with_tensors(value, tensors) for name, value in header["params"].items()},
            {name: _with_tensors(value, tensors) for name, value in header["variables"].items()},
        )
    except (SafetensorError, KeyError, TypeError, AttributeError, IndexError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not an agent that was saved here ({type(error).__name__}: {error})") from error


def _encode(value: Any, arrays: dict[str, np.ndarray], name: str, objects: KnownObjects) -> Any:
    try:
        return encode(value, arrays, name, objects)
    except OpaqueError as error:
        raise OpaqueError(
            f"{error}, which a {SUFFIX} file cannot hold: save the agent as .zip, or without it by exclude=[{name!r}], and "
            f"give it to load, as custom_objects={{{name!r}: ...}}"
        ) from error


def _without_tensors(value: Any, name: str, tensors: dict[str, np.ndarray]) -> Any:
    """Of a state dict, what is left for JSON; keys may be numbers, as those of an optimizer's parameters are."""
    if isinstance(value, th.Tensor):
        tensors[name] = np.asarray(value.detach().cpu().numpy(), order="C")
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _without_tensors(x, f"{name}/{key}", tensors)] for key, x in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_without_tensors(x, f"{name}/{i}", tensors) for i, x in enumerate(value)]}
    if isinstance(value, list):
        return [_without_tensors(x, f"{name}/{i}", tensors) for i, x in enumerate(value)]
    if isinstance(value, np.generic):
        return value.item()
    if value is not None and not isinstance(value, bool | int | float | str):
        raise OpaqueError(f"{name} is {value!r}, which a file of tensors cannot hold")
    return value


def _with_tensors(value: Any, tensors: Mapping[str, np.ndarray]) -> Any:
    if isinstance(value, list):
        return [_with_tensors(x, tensors) for x in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return th.from_numpy(tensors[inner])
    if kind == "tuple":
        return tuple(_with_tensors(inner, tensors))
    return {key: _with_tensors(x, tensors) for key, x in inner}
