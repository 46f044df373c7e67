"""What agents are made of beside numbers, as values of JSON: spaces, schedules, action noise, and known classes by name."""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from enum import Enum
from functools import cache
from inspect import isclass
from pathlib import PurePath
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common import buffers, noise, torch_layers
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule
from stable_baselines3.her import GoalSelectionStrategy
from torch import nn

from sb3_softq.serialization.values import OpaqueError

# How each space is made anew
_SPACES: Mapping[type[spaces.Space[Any]], tuple[str, ...]] = {
    spaces.Box: ("low", "high", "dtype"),
    spaces.Discrete: ("n", "start"),
    spaces.MultiDiscrete: ("nvec", "dtype", "start"),
    spaces.MultiBinary: ("n",),
    spaces.Dict: ("spaces",),
}
# Whose attributes are all that they consist of
_INSTANCES = (
    ConstantSchedule,
    FloatSchedule,
    LinearSchedule,
    noise.NormalActionNoise,
    noise.OrnsteinUhlenbeckActionNoise,
    noise.VectorizedActionNoise,
)


@cache
def _known_classes() -> dict[str, type]:
    """Classes of libraries that a file may name: layers, optimizers, features extractors, replay buffers."""
    found: dict[str, type] = {}
    for module, parent in ((nn, nn.Module), (th.optim, th.optim.Optimizer), (torch_layers, nn.Module)):
        found |= {name: x for name, x in vars(module).items() if isclass(x) and issubclass(x, parent)}
    found |= {x.__name__: x for x in (HerReplayBuffer, buffers.ReplayBuffer, buffers.DictReplayBuffer)}
    found |= {x.__name__: x for x in (buffers.NStepReplayBuffer, GoalSelectionStrategy, *_INSTANCES)}
    return found


class KnownObjects:
    """
    Objects as names and values of JSON, and back: only what is known by name is ever made.

    :param classes: Classes that may be named beside those of the libraries
    :param instances: Classes whose instances consist of their attributes
    """

    def __init__(self, classes: Iterable[type] = (), instances: Iterable[type] = ()):
        instances = (*_INSTANCES, *instances)
        self.classes = _known_classes() | {cls.__name__: cls for cls in (*classes, *instances)}
        self.instances = {cls.__name__ for cls in instances}

    def describe(self, value: Any, name: str) -> list[Any]:
        """
        :param value: An object
        :param name: Of the value, for the error
        :return: Its kind, and what it is made of
        :raises OpaqueError: if it is not known how it is made
        """
        kind = type(value)
        if kind in _SPACES:
            parts = {part: getattr(value, part) for part in _SPACES[kind]}
            if kind is spaces.Dict:
                parts["spaces"] = dict(value.spaces)
            return ["space", kind.__name__, parts]
        if self.classes.get(kind.__name__) is kind and kind.__name__ in self.instances:
            return ["instance", kind.__name__, dict(vars(value))]
        if kind is TrainFreq:
            return ["train_freq", value.frequency, value.unit.value]
        if isinstance(value, Enum) and self.classes.get(kind.__name__) is kind:
            return ["member", kind.__name__, value.name]
        if isinstance(value, np.dtype) or (isclass(value) and issubclass(value, np.generic)):
            return ["dtype", np.dtype(value).name]
        if isclass(value) and self.classes.get(value.__name__) is value:
            return ["class", value.__name__]
        if isinstance(value, PurePath):
            return ["path", str(value)]
        if value is BasePolicy._dummy_schedule:
            return ["no_schedule"]
        raise OpaqueError(f"{name} is {value!r}")

    def make(self, description: list[Any]) -> Any:
        """
        :param description: Of :meth:`describe`
        :return: The object, or one like it
        :raises ValueError: if it names a class that is not known
        """
        kind, *parts = description
        if kind == "space":
            arguments = dict(parts[1])
            if parts[0] == "Dict":
                # a plain dict would be sorted
                arguments["spaces"] = OrderedDict(arguments["spaces"])
            return {space.__name__: space for space in _SPACES}[parts[0]](**arguments)
        if kind == "train_freq":
            return TrainFreq(parts[0], TrainFrequencyUnit(parts[1]))
        if kind == "dtype":
            # the class, which is what those have who have one
            return np.dtype(parts[0]).type
        if kind == "path":
            return parts[0]
        if kind == "no_schedule":
            return BasePolicy._dummy_schedule
        cls = self.classes.get(parts[0])
        if cls is None or (kind == "instance" and parts[0] not in self.instances):
            raise ValueError(f"{kind} {parts[0]!r} is not known here")
        if kind == "member":
            return cls[parts[1]]  # type: ignore[index]
        if kind == "class":
            return cls
        result: Any = object.__new__(cls)
        result.__dict__.update(parts[1])
        return result
