"""Networks of one shape as one network, whose parameters are stacked along a first axis."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch as th
from torch import nn

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def stacked_state(modules: Sequence[nn.Module], names: Sequence[str]) -> dict[str, th.Tensor]:
    """
    :param modules: Modules of one shape
    :param names: Names of parameters and buffers
    :return: Of each name, the tensors of all modules, stacked
    """
    return {name: th.stack([module.state_dict()[name] for module in modules]) for name in names}


def view_of(stacked: nn.Module, i: int, module: AnyModule) -> AnyModule:
    """
    :param stacked: Module whose parameters and buffers are stacked
    :param i: Which one to look at
    :param module: Module of one network, with the same parameters and buffers
    :return: The same module; its tensors, and gradients where there are some, are now views of the i-th of the stack
    """
    for name, parameter in stacked.named_parameters(recurse=False):
        view = nn.Parameter(parameter.detach()[i], parameter.requires_grad)
        view.grad = None if parameter.grad is None else parameter.grad[i]
        setattr(module, name, view)
    for name, buffer in stacked.named_buffers(recurse=False):
        setattr(module, name, buffer[i])
    return module


def from_sources(sources: str | Sequence[str], tensors: Mapping[str, th.Tensor]) -> th.Tensor:
    """
    :param sources: A name, or names of what is stacked
    :param tensors: Tensors by their names
    :return: The tensor, or the stack of them
    """
    return tensors[sources] if isinstance(sources, str) else th.stack([tensors[name] for name in sources])


def stacked_optimizer_state(
    state: Mapping[str, Any], old_names: Sequence[str], sources: Mapping[str, str | Sequence[str]]
) -> dict[str, Any]:
    """
    :param state: State of an optimizer of separate networks, as its ``state_dict()`` gives it. Parameters before theirs, such
        as those of a features extractor, keep their place.
    :param old_names: Names of their parameters, in the optimizer's order
    :param sources: Of each parameter of the stacked network, in the optimizer's order, its name or the names of those that it
        is stacked from
    :return: State for the stacked network
    """
    (group,) = state["param_groups"]
    n_before = len(group["params"]) - len(old_names)
    old: dict[int, dict[str, Any]] = state["state"]
    by_name = {name: old[i] for i, name in enumerate(old_names, start=n_before) if i in old}
    new = {i: old[i] for i in range(n_before) if i in old}
    for i, names in enumerate(sources.values(), start=n_before):
        first = by_name.get(names if isinstance(names, str) else names[0], {})
        if first:
            # numbers, such as that of the steps, are the same for all
            new[i] = {
                key: from_sources(names, {name: values[key] for name, values in by_name.items()})
                if isinstance(value, th.Tensor) and value.ndim > 0
                else value
                for key, value in first.items()
            }
    return {"state": new, "param_groups": [group | {"params": list(range(n_before + len(sources)))}]}
