"""
The state of an environment in the middle of an episode. Known are

- MuJoCo (``MujocoEnv``), classic control, the environments of this package, and any environment or wrapper whose class has
  ``get_state()`` and ``set_state(state)``, the state being made of numbers, strings, arrays, lists, tuples and dicts;
- wrappers that keep nothing but such values, or running means and variances, in their attributes.

Each layer of wrappers is asked for what it keeps itself, with its generators of random numbers.
"""

import inspect
from collections import deque
from collections.abc import Callable, Iterator
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.wrappers import PassiveEnvChecker
from gymnasium.wrappers.utils import RunningMeanStd
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.running_mean_std import RunningMeanStd as VecRunningMeanStd

from sb3_softq.checkpointing.mujoco_state import has_mujoco, mujoco_state, set_mujoco_state
from sb3_softq.serialization.values import OpaqueError, encode, stored_names

Env = gym.Env[Any, Any]
State = list[tuple[str, dict[str, Any]]]

# Method of every environment that calls a function with it
CALL = "_sb3_softq_call"
# What the pair of methods hands over, among the attributes
STATE = "get_state()"
_CLASSIC = "gymnasium.envs.classic_control"
# Modules whose environments keep all of their state in attributes, or in MuJoCo's data
_KNOWN = (_CLASSIC, "gymnasium.envs.mujoco", "sb3_softq.envs", "stable_baselines3.common.envs")
# What an environment was made from
NO_STATE = {"env", "spec", "metadata", "render_mode", "mujoco_renderer", "_cached_spec", "_metadata", "_saved_kwargs"}
NO_STATE |= {"_ezpickle_args", "_ezpickle_kwargs"}
# Where it is drawn
WINDOW = {"screen", "clock", "surf", "isopen"}
# When and where Monitor writes
_CLOCK_AND_FILE = {"t_start", "results_writer"}
# What wrappers that normalise keep
_STATISTICS = (RunningMeanStd, VecRunningMeanStd)
_CONSTANTS = (type, ModuleType, EnvSpec)
# Those that may change in place
_IN_PLACE = (list, dict, deque, np.random.Generator)
_CONTAINERS = (*_IN_PLACE, np.ndarray)


def _call(env: Env, function: Callable[..., Any], *args: Any) -> Any:
    """What the function returns, or why it could not: an error would end the process of a SubprocVecEnv."""
    try:
        return function(env, *args)
    except Exception as error:
        return str(error) if isinstance(error, OpaqueError) else f"{type(error).__name__}: {error}"


# The process of a SubprocVecEnv calls methods of its environment, and nothing else: it imports this module where it is told
# to call a function of it
setattr(gym.Env, CALL, _call)


def capture(env: Env) -> tuple[Any, dict[str, np.ndarray]]:
    """
    :param env: An environment
    :return: State of each layer by the name of its class, :data:`State`, as
        :func:`sb3_softq.serialization.values.encode` gives it
    :raises OpaqueError: if it cannot be had
    """
    layers = list(layers_of(env))
    found = [(_name(layer), _state(layer)) for layer in layers]
    _check_links(layers, found)
    arrays: dict[str, np.ndarray] = {}
    return encode(found, arrays, "state"), arrays


def refusal(env: Env, saved: State) -> str | None:
    """
    :param env: An environment, which is not changed
    :param saved: Of :func:`capture`
    :return: Why this cannot be restored, None if it can
    """
    layers = list(layers_of(env))
    here, there = [_name(layer) for layer in layers], [name for name, _ in saved]
    if here != there:
        return f"it was {there} and is {here}"
    changing = _changing(layers)
    for layer, (_, state) in zip(layers, saved, strict=True):
        for name, value in state.items():
            own = vars(layer).get(name)
            if name == "data" and has_mujoco(layer):
                if value["model"] != mujoco_state(layer)["model"]:
                    return "MuJoCo's model is another one"
            elif name != STATE and not _may_change(own, value, name in changing) and not _same(own, value):
                return f"{type(layer).__name__}.{name} was {value!r} and is {own!r}, and no method changes it"
    return None


def restore(env: Env, saved: State) -> None:
    """
    :param env: An environment, which has to be reset if this fails
    :param saved: Of :func:`capture`
    """
    layers = list(layers_of(env))
    changing = _changing(layers)
    for layer, (_, state) in zip(layers, saved, strict=True):
        for name, value in state.items():
            _restore_attribute(layer, name, value, name in changing)
        if isinstance(layer, PassiveEnvChecker):
            # it compares the first step with a reset, which there was not
            layer.checked_reset = layer.checked_step = layer.checked_data_reuse = True


def _restore_attribute(layer: Env, name: str, value: Any, is_changing: bool) -> None:
    own = vars(layer).get(name)
    if name == STATE:
        layer.set_state(value)  # type: ignore[attr-defined]
    elif name == "data" and has_mujoco(layer):
        set_mujoco_state(layer, value)
    elif isinstance(own, spaces.Space):
        for space, generator in zip(_spaces(own), value, strict=True):
            space._np_random = generator
    elif isinstance(own, _STATISTICS):
        vars(own).update(value)
    elif isinstance(own, np.ndarray) and not is_changing:
        if not _same(own, value):
            # where it lies: other attributes may be views of it
            own[...] = value
    elif not _same(own, value):
        setattr(layer, name, _put(own, value))


def _put(own: Any, value: Any) -> Any:
    """A value, in the place of what is there where that can be changed: others may hold it too, a callback say."""
    if type(own) is not type(value) or not isinstance(value, _IN_PLACE):
        return value
    if isinstance(value, np.random.Generator):
        if type(own.bit_generator) is not type(value.bit_generator):
            return value
        own.bit_generator.state = value.bit_generator.state
    elif isinstance(value, dict):
        pairs = {key: _put(own.get(key), x) for key, x in value.items()}
        own.clear()
        own.update(pairs)
    else:
        known = [*own, *[None] * len(value)]
        items = [_put(known[i], x) for i, x in enumerate(value)]
        own.clear()
        own.extend(items)
    return own


def _may_change(own: Any, value: Any, is_changing: bool) -> bool:
    """Whether an attribute may differ from that of a new environment, which has ``own``."""
    if is_changing or isinstance(own, (spaces.Space, *_STATISTICS)):
        return True
    return isinstance(value, _CONTAINERS) and type(own) is type(value)


def layers_of(env: Env) -> Iterator[Env]:
    """
    :param env: An environment
    :return: It and what it wraps, from the outermost wrapper on
    """
    yield env
    while isinstance(env, gym.Wrapper):
        env = env.env
        yield env


def _name(layer: Env) -> str:
    """Of its class; the RL Zoo puts one of its own in the place of gymnasium's ``TimeLimit`` when it is imported."""
    names = [cls.__name__ for cls in type(layer).__mro__]
    return "TimeLimit" if "TimeLimit" in names else names[0]


def _state(layer: Env) -> dict[str, Any]:
    """What a layer would have to be given back."""
    cls = type(layer)
    if isinstance(layer, PassiveEnvChecker):
        return {}
    if _has_pair(cls):
        generator = vars(layer).get("_np_random")
        found = {} if generator is None else {"_np_random": generator}
        return found | {STATE: layer.get_state()}  # type: ignore[attr-defined]
    modules = [parent.__module__ for parent in cls.__mro__]
    if not isinstance(layer, gym.Wrapper) and not any(module.startswith(_KNOWN) for module in modules):
        raise OpaqueError(f"{cls.__name__} has no get_state() and set_state(state)")
    is_classic = any(module.startswith(_CLASSIC) for module in modules)
    without = NO_STATE | (_CLOCK_AND_FILE if isinstance(layer, Monitor) else WINDOW if is_classic else set())
    found = {}
    for name, value in vars(layer).items():
        if name == "data" and has_mujoco(layer):
            found[name] = mujoco_state(layer)
        elif isinstance(value, spaces.Space):
            found[name] = [space._np_random for space in _spaces(value)]
        elif isinstance(value, _STATISTICS):
            encode(vars(value), {}, f"{cls.__name__}.{name}")
            found[name] = dict(vars(value))
        elif name not in without and not _is_constant(value) and not (name == "model" and has_mujoco(layer)):
            if name in _changing([layer]) and _is_shared(layer, value):
                raise OpaqueError(f"{cls.__name__}.{name} shares its memory with something else")
            encode(value, {}, f"{cls.__name__}.{name}")
            found[name] = value
    return found


def _check_links(layers: list[Env], found: State) -> None:
    """
    Refuse what two attributes hold and a method has made: each would get one of its own. What constructors have made is linked
    in a new environment too, and changed in place there.
    """
    changing = _changing(layers)
    holders: dict[int, tuple[int, str]] = {}
    for number, (layer, (_, state)) in enumerate(zip(layers, found, strict=True)):
        for name in state.keys() & vars(layer).keys():
            if isinstance(vars(layer)[name], _IN_PLACE):
                first = holders.setdefault(id(vars(layer)[name]), (number, name))
                if first != (number, name) and changing & {first[1], name}:
                    raise OpaqueError(f"{type(layer).__name__}.{name} is the same object as another attribute, {first[1]}")


def _is_shared(layer: Env, value: Any) -> bool:
    """Whether an array is also seen elsewhere, where another one in its place would not be."""
    if not isinstance(value, np.ndarray):
        return False
    others = (other for other in vars(layer).values() if isinstance(other, np.ndarray) and other is not value)
    owner: Any = value
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    # or memory of MuJoCo, say
    return owner.base is not None or any(np.may_share_memory(value, other) for other in others)


def _is_constant(value: Any) -> bool:
    # not a function that keeps something, nor the method of an object
    if isinstance(value, FunctionType) and value.__closure__ is None:
        return True
    return isinstance(getattr(value, "__self__", None) if isinstance(value, BuiltinFunctionType) else value, _CONSTANTS)


def _has_pair(cls: type) -> bool:
    """Whether it has ``get_state()`` and ``set_state(state)``; that of ``MujocoEnv`` takes two arguments."""
    try:
        inspect.signature(cls.get_state).bind(None)  # type: ignore[attr-defined]
        inspect.signature(cls.set_state).bind(None, None)  # type: ignore[attr-defined]
    except (AttributeError, TypeError, ValueError):
        return False
    return True


def _changing(layers: list[Env]) -> set[str]:
    """Names of attributes that their methods set, but for what a constructor alone does."""
    return set().union(*(stored_names(cls, constructor=False) for cls in map(type, layers)))


def _same(a: Any, b: Any) -> bool:
    try:
        return type(a) is type(b) and bool(np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b)
    except ValueError:
        return False


def _spaces(space: spaces.Space[Any]) -> Iterator[spaces.Space[Any]]:
    """A space and those in it, each of which has a generator."""
    yield space
    inner = getattr(space, "spaces", ())
    for part in inner.values() if isinstance(inner, dict) else inner:
        yield from _spaces(part)
