"""Checks of constructor arguments: a ValueError names the argument, its value and what is allowed."""

import copy
import difflib
import inspect
import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.type_aliases import Schedule, TrainFrequencyUnit
from stable_baselines3.common.utils import get_device

# Of a learning rate: Adam divides it by 1 - beta1 before it becomes single precision
MAX_LEARNING_RATE = 1e30
# Of a temperature, which single precision has to divide by: Q / alpha and alpha H stay far from overflow
MIN_ENT_COEF, MAX_ENT_COEF = 1e-8, 1e8


def _refuse(name: str, value: object, allowed: str) -> ValueError:
    return ValueError(f"{name}={value!r} is not allowed: it must be {allowed}")


def _is_real(value: object) -> bool:
    """A number that is finite in single precision, which ``True`` and ``nan`` are not."""
    if not isinstance(value, int | float | np.integer | np.floating) or isinstance(value, bool):
        return False
    return abs(value) <= float(np.finfo(np.float32).max)


def _is_whole(value: object) -> bool:
    """An integer of any type, or a float such as 1e4 that is one; ``True`` is not."""
    return _is_real(value) and float(value).is_integer()  # type: ignore[arg-type]


def check_integer(name: str, value: Any, minimum: int, maximum: float = math.inf) -> int:
    """
    :param name: Name of the argument
    :param value: Its value, of any type of number
    :param minimum: Smallest value allowed
    :param maximum: Largest value allowed
    :return: The value as an ``int``
    :raises ValueError: if the value is not a whole number between the bounds
    """
    if not _is_whole(value) or not minimum <= value <= maximum:
        upper = f" and <= {maximum}" if math.isfinite(maximum) else ""
        raise _refuse(name, value, f"an integer >= {minimum}{upper}")
    return int(value)


def check_net_arch(name: str, value: Any, keys: set[str] | None = None) -> None:
    """
    :param name: Name of the argument
    :param value: Its value
    :param keys: Where it can also be a dict, its keys
    :raises ValueError: if the value is neither a list of widths of layers nor a dict of such lists
    """
    by_key = keys is not None and isinstance(value, dict) and value.keys() == keys
    for layers in value.values() if by_key else [value]:
        if not isinstance(layers, list | tuple) or any(
            not isinstance(n, int | np.integer) or isinstance(n, bool) or n < 1 for n in layers
        ):
            also = f", or a dict of such lists with the keys {', '.join(sorted(keys))}" if keys else ""
            raise _refuse(name, value, f"a list of integers >= 1, one per hidden layer{also}")


def check_number(name: str, value: Any, low: float = -math.inf, high: float = math.inf, open_low: bool = False) -> None:
    """
    :param name: Name of the argument
    :param value: Its value
    :param low: Lower bound
    :param high: Upper bound, allowed itself
    :param open_low: Whether the lower bound itself is not allowed
    :raises ValueError: if the value is not a finite number between the bounds
    """
    if not _is_real(value) or not (low < value if open_low else low <= value) or value > high:
        lower = f" {'>' if open_low else '>='} {low}" if math.isfinite(low) else ""
        upper = f"{' and' if lower else ''} <= {high}" if math.isfinite(high) else ""
        raise _refuse(name, value, f"a finite number{lower}{upper}")


def check_schedule(
    name: str, value: float | Schedule, low: float, open_low: bool = True, may_end_at_low: bool = False, high: float = math.inf
) -> None:
    """
    :param name: Name of the argument
    :param value: A number, or a function of the progress remaining (from 1 to 0), which is tried at both ends
    :param low: Lower bound
    :param open_low: Whether the lower bound itself is not allowed
    :param may_end_at_low: Whether a function may end at the lower bound even where a constant may not be it
    :param high: Upper bound, allowed itself
    :raises ValueError: if a value is not a finite number between the bounds
    """
    if not callable(value):
        check_number(name, value, low, high, open_low=open_low)
        return
    for progress_remaining in (1.0, 0.0):
        try:
            number = float(value(progress_remaining))
        except (TypeError, ValueError) as error:
            raise _refuse(name, value, "a number, or a function of the progress remaining that returns one") from error
        at_end = may_end_at_low and progress_remaining == 0.0
        check_number(f"{name}({progress_remaining:g})", number, low, high, open_low=open_low and not at_end)


def check_learning_rate(name: str, value: Any, may_be_zero: bool = False, may_be_auto: bool = False) -> None:
    """
    :param name: Name of the argument
    :param value: A number, or a function of the progress remaining, which may fall to zero
    :param may_be_zero: Whether a number may be zero
    :param may_be_auto: Whether it may be ``"auto"``
    :raises ValueError: if a value is not a finite number between zero and ``MAX_LEARNING_RATE``, nor ``"auto"`` where allowed
    """
    if may_be_auto and isinstance(value, str):
        check_auto(name, value, with_initial_value=False)
        return
    check_schedule(name, value, 0.0, open_low=not may_be_zero, may_end_at_low=True, high=MAX_LEARNING_RATE)


def check_train_freq(value: Any, n_envs: int) -> tuple[int, str]:
    """
    :param value: A number of steps, or a tuple of a number and its unit
    :param n_envs: Number of environments
    :return: The number and its unit
    :raises ValueError: if it is neither
    """
    frequency, unit = value if isinstance(value, tuple) and len(value) == 2 else (value, "step")
    # a loaded agent has the enumeration in place of the name
    unit = unit.value if isinstance(unit, TrainFrequencyUnit) else unit
    units = [member.value for member in TrainFrequencyUnit]
    if not _is_whole(frequency) or frequency < 1 or unit not in units:
        raise _refuse("train_freq", value, f"an integer >= 1, or a tuple of an integer >= 1 and one of {units}")
    if n_envs > 1 and unit == "episode":
        raise _refuse("train_freq", value, f"in steps where there are several environments (n_envs={n_envs})")
    return int(frequency), unit


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """
    :param name: Name of the argument
    :param value: Its value
    :param choices: The names allowed
    :raises ValueError: if the value is none of them, with the nearest one
    """
    choices = list(choices)
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise _refuse(name, value, "one of " + ", ".join(map(repr, choices)) + hint)


def check_flag(name: str, value: object) -> None:
    """
    :param name: Name of the argument
    :param value: Its value
    :raises ValueError: if the value is not a boolean
    """
    if not isinstance(value, bool | np.bool_):
        raise _refuse(name, value, "True or False")


def check_device(value: Any) -> None:
    """
    :param value: Device, or its name
    :raises ValueError: if torch does not know it, or it is not there
    """
    try:
        th.zeros(1, device=get_device(value))
    except (RuntimeError, TypeError, AssertionError, AttributeError) as error:
        raise _refuse("device", value, f"'auto', or a device that torch finds here ({error})") from error


def check_compiler(device: th.device) -> None:
    """
    Compile something small, the first time in a process.

    :param device: Device of the agent
    :raises ValueError: if ``torch.compile`` does not work here
    """
    if not hasattr(th._dynamo.config, "trace_autograd_ops"):
        raise ValueError(f"compile=True is not allowed with torch {th.__version__}: it needs 2.13 or later")
    try:
        th.compile(th.sin)(th.zeros(2, device=device))
    except Exception as error:
        raise ValueError(
            "compile=True is not allowed here: it needs what torch.compile needs, on a CPU a C++ compiler (g++, or what "
            f"the environment variable CXX names) and Python's headers. torch.compile says: {error}"
        ) from error


def check_auto(name: str, value: str, with_initial_value: bool) -> None:
    """
    :param name: Name of the argument
    :param value: A string that must be ``"auto"``, or where allowed ``"auto_0.1"`` with an initial value > 0
    :param with_initial_value: Whether the latter is allowed
    :raises ValueError: if the string is something else
    """
    allowed = "a number or 'auto'"
    if with_initial_value:
        allowed += f", or 'auto_X' with an initial value X > 0 between {MIN_ENT_COEF:g} and {MAX_ENT_COEF:g}"
    if value == "auto":
        return
    prefix, _, text = value.partition("_")
    initial_value = number_from_string(text)
    if (
        not with_initial_value
        or prefix != "auto"
        or isinstance(initial_value, str)
        or not MIN_ENT_COEF <= initial_value <= MAX_ENT_COEF
    ):
        raise _refuse(name, value, allowed)


def number_from_string(value: Any) -> Any:
    """
    :param value: Anything
    :return: The number where it is a string that spells one, such as ``"0.1"``, else the value itself
    """
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def check_type(name: str, value: object, types: tuple[type, ...], allowed: str, optional: bool = True) -> None:
    """
    :param name: Name of the argument
    :param value: Its value
    :param types: Types that it may have
    :param allowed: The same in words
    :param optional: Whether ``None`` is allowed
    :raises ValueError: if it has another type
    """
    if not (isinstance(value, types) or (optional and value is None)):
        raise _refuse(name, value, allowed + (" or None" if optional else ""))


def check_class(name: str, value: object, base: type, optional: bool = False) -> None:
    """
    :param name: Name of the argument
    :param value: Its value
    :param base: Class that it must be, or be derived from
    :param optional: Whether ``None`` is allowed
    :raises ValueError: if it is something else
    """
    if not (isinstance(value, type) and issubclass(value, base)) and not (optional and value is None):
        raise _refuse(name, value, f"{base.__name__} or a class derived from it" + (", or None" if optional else ""))


def check_network_classes(activation_fn: Any, optimizer_class: Any, features_extractor_class: Any) -> None:
    """
    What networks are made of: classes, or functions that make what these do.

    :param activation_fn: Of the activation function
    :param optimizer_class: Of the optimizer, or a ``functools.partial`` of one
    :param features_extractor_class: Of the features extractor
    :raises ValueError: if one of them is something else, or the optimizer evaluates the loss by itself, as LBFGS
    """
    try:
        activation = activation_fn()
    except Exception:
        activation = None
    if not isinstance(activation, th.nn.Module):
        raise _refuse("activation_fn", activation_fn, "a class of modules such as nn.ReLU, or a function that makes one")
    cls: Any = optimizer_class.func if isinstance(optimizer_class, partial) else optimizer_class
    check_class("optimizer_class", cls, th.optim.Optimizer)
    closure = inspect.signature(cls.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise _refuse("optimizer_class", optimizer_class, "one whose step() needs no closure")
    if not callable(features_extractor_class):
        raise _refuse("features_extractor_class", features_extractor_class, "a class of extractors, or what makes one")


def check_keywords(name: str, keywords: Iterable[str], cls: type) -> None:
    """
    :param name: Name of the argument that holds the keyword arguments
    :param keywords: Their names
    :param cls: Class that they are for
    :raises ValueError: if the constructor of the class does not know one of them, with the nearest one
    """
    known: list[str] = []
    for base in cls.__mro__:
        parameters = inspect.signature(base.__init__).parameters.values()  # type: ignore[misc]
        known += [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    for keyword in keywords:
        # each once, without what the algorithm gives
        given = ("self", "observation_space", "action_space", "lr_schedule")
        check_choice(f"key of {name}", keyword, [k for k in dict.fromkeys(known) if k not in given])


def check_action_noise(noise: ActionNoise | None, action_space: spaces.Space[Any], n_envs: int) -> None:
    """
    :param noise: Action noise
    :param action_space: Space of the actions that it is added to
    :param n_envs: Number of environments
    :raises ValueError: if what it gives is not of their shape, or not finite
    """
    if noise is None:
        return
    # neither its own state nor the random numbers of training move on
    state = np.random.get_state()
    try:
        sample = np.asarray(copy.deepcopy(noise)(), dtype=np.float64)
    except Exception:
        # one that cannot be copied, or not be asked before training
        return
    finally:
        np.random.set_state(state)
    shape = action_space.shape or ()
    if sample.shape not in (shape, (n_envs, *shape), (1, *shape), (1,) * len(shape), ()) or not np.isfinite(sample).all():
        raise _refuse("action_noise", noise, f"one that gives finite numbers of the shape {shape} of an action")


def is_of_a_library(cls: Any) -> bool:
    """
    :param cls: Class, or what was given in the place of one
    :return: Whether it comes from Stable-Baselines3 or from here
    """
    return str(getattr(cls, "__module__", "")).startswith(("stable_baselines3.", "sb3_contrib.", "sb3_softq."))
