"""Values of Python and numpy as JSON and arrays, which come back exactly and run no code; and the names of attributes."""

import dis
import inspect
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator
from functools import cache, cached_property
from types import CodeType, FunctionType
from typing import Any, Protocol

import numpy as np

_GENERATORS = {cls.__name__: cls for cls in (np.random.PCG64, np.random.PCG64DXSM, np.random.MT19937, np.random.Philox)}
_DICTS: dict[str, type[dict[Any, Any]]] = {cls.__name__: cls for cls in (dict, OrderedDict, Counter, defaultdict)}
# What makes the values that a defaultdict lacks
_FACTORIES = {cls.__name__: cls for cls in (bool, int, float, str, list, tuple, dict)}
# Numbers of a list that take less room, and time, as an array
_LONG = 16


class OpaqueError(ValueError):
    """A value is not made of numbers, strings, arrays and the like."""


class Objects(Protocol):
    """Further objects, as values of JSON."""

    def describe(self, value: Any, name: str) -> list[Any]:
        """What an object is made of, an :class:`OpaqueError` if that is not known."""

    def make(self, description: list[Any]) -> Any:
        """The object that was described."""


def encode(value: Any, arrays: dict[str, np.ndarray], name: str, objects: Objects | None = None) -> Any:
    """
    :param value: Made of None, bool, int, float, str, list, tuple, deque, dict, OrderedDict, Counter, defaultdict of Python's
        types, arrays, numpy's numbers and its generators
    :param arrays: Takes the arrays in it
    :param name: Of the value, for the error
    :param objects: Knows further ones
    :return: The rest of it, for JSON
    :raises OpaqueError: if it is made of something else, naming that
    """
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    # other classes of arrays and dicts become NumPy's and dict in an agent; an environment would act by the difference
    is_agent = objects is not None
    is_array = kind is np.ndarray or isinstance(value, np.generic) or (is_agent and isinstance(value, np.ndarray))
    if is_array and not value.dtype.hasobject and kind is not np.record:
        key = str(len(arrays))
        arrays[key] = np.array(value)
        return {"array" if isinstance(value, np.ndarray) else "number": key}
    if kind is list and len(value) > _LONG and all(type(x) is float for x in value):
        return {"floats": encode(np.array(value), arrays, name)}
    if kind is list:
        return [encode(x, arrays, f"{name}[{i}]", objects) for i, x in enumerate(value)]
    if kind is tuple:
        return {"tuple": encode(list(value), arrays, name, objects)}
    if kind is deque:
        return {"deque": encode(list(value), arrays, name, objects), "maxlen": value.maxlen}
    if kind in _DICTS.values() or (is_agent and isinstance(value, dict)):
        pairs = [[encode(k, arrays, name, objects), encode(v, arrays, f"{name}[{k!r}]", objects)] for k, v in value.items()]
        if is_agent or kind is not defaultdict:
            return {"dict" if is_agent else kind.__name__: pairs}
        if value.default_factory not in (None, *_FACTORIES.values()):
            raise OpaqueError(f"{name} is a defaultdict of {value.default_factory!r}")
        return {"defaultdict": pairs, "factory": getattr(value.default_factory, "__name__", None)}
    if kind is np.random.Generator and type(value.bit_generator).__name__ in _GENERATORS:
        return {"generator": encode(value.bit_generator.state, arrays, name)}
    if objects is not None:
        return {"object": encode(objects.describe(value, name), arrays, name, objects)}
    raise OpaqueError(f"{name} is a {kind.__module__}.{kind.__name__}")


def decode(value: Any, arrays: dict[str, np.ndarray], objects: Objects | None = None) -> Any:
    """
    :param value: Of :func:`encode`
    :param arrays: That it filled
    :param objects: That it asked
    :return: The value that was encoded; with ``objects`` any dict as a ``dict``
    """
    if isinstance(value, list):
        return [decode(x, arrays, objects) for x in value]
    if not isinstance(value, dict):
        return value
    (kind, inner), *rest = value.items()
    if kind == "array":
        return np.array(arrays[inner])
    if kind == "number":
        return arrays[inner][()]
    if kind == "floats":
        return decode(inner, arrays).tolist()
    if kind == "tuple":
        return tuple(decode(inner, arrays, objects))
    if kind == "deque":
        return deque(decode(inner, arrays, objects), maxlen=rest[0][1])
    if kind in _DICTS:
        pairs = {decode(k, arrays, objects): decode(v, arrays, objects) for k, v in inner}
        return defaultdict(_FACTORIES.get(rest[0][1]), pairs) if kind == "defaultdict" else _DICTS[kind](pairs)
    if kind == "object" and objects is not None:
        return objects.make(decode(inner, arrays, objects))
    state = decode(inner, arrays)
    generator = np.random.Generator(_GENERATORS[state["bit_generator"]]())
    generator.bit_generator.state = state
    return generator


@cache
def stored_names(cls: type, constructor: bool) -> frozenset[str]:
    """
    :param cls: A class
    :param constructor: Whether what ``__init__`` alone sets is among them
    :return: Names of the attributes that its methods set, in itself or elsewhere
    """
    codes = [
        code
        for parent in cls.__mro__
        for name, member in vars(parent).items()
        if constructor or name != "__init__"
        for code in _codes(member)
    ]
    return frozenset(x.argval for code in codes for x in dis.get_instructions(code) if x.opname == "STORE_ATTR")


def _codes(member: Any) -> Iterator[CodeType]:
    """Code of a method or property, with the functions in it."""
    if isinstance(member, property):
        functions = [member.fget, member.fset]
    elif isinstance(member, cached_property):
        functions = [member.func]
    else:
        functions = [getattr(member, "__func__", member)]
    unwrapped = [inspect.unwrap(function) for function in functions if callable(function)]
    todo = [x.__code__ for x in unwrapped if isinstance(x, FunctionType)]
    while todo:
        code = todo.pop()
        todo += [x for x in code.co_consts if isinstance(x, CodeType)]
        yield code
