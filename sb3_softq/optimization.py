"""One step of an optimizer down a loss, compiled or not."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch as th

# A loss, whose gradient is the update, and scalars for the log
LossAndStats = tuple[th.Tensor, dict[str, th.Tensor]]


def minimize(
    loss: Callable[..., LossAndStats],
    args: tuple[Any, ...],
    optimizer: th.optim.Optimizer,
    device: th.device,
    bfloat16: bool,
    compile: bool,
) -> dict[str, th.Tensor]:
    """
    :param loss: Returns the loss and scalars for the log
    :param args: Of the loss
    :param optimizer: Of the parameters that move
    :param device: Where they are
    :param bfloat16: Whether matrix products are done in bfloat16
    :param compile: Whether loss and backward pass are compiled, in one graph: compiled apart they are no faster than they were
    :return: Scalars for the log
    """
    optimizer.zero_grad()
    # One context of autocast per step: within one, it caches the weights' casts
    with th.autocast(device.type, dtype=th.bfloat16, enabled=bfloat16):
        if compile:
            stats = _compiled(loss)(*args)
        else:
            stats = _backward(loss, *args)
    optimizer.step()
    return stats


def _backward(loss: Callable[..., LossAndStats], *args: Any) -> dict[str, th.Tensor]:
    value, stats = loss(*args)
    value.backward()
    return stats


# What a graph is not checked for at every call, half of all that torch would check: that nobody has replaced functions and
# classes or hooked into modules since
_CONSTANT_GUARDS = {
    "BUILTIN_MATCH",
    "CLASS_MATCH",
    "CLOSURE_MATCH",
    "EMPTY_NN_MODULE_HOOKS_DICT",
    "MODULE_MATCH",
    "NOT_PRESENT_IN_GENERIC_DICT",
}


def _guards_that_matter(guards: Sequence[Any]) -> list[bool]:
    # They are built once more after this. Of a NumPy array, as a features extractor may have, that is another tensor, which
    # torch would compare to the first as if it were one number
    for guard in guards:
        guard.orig_guard.obj_weakref = None
    return [guard.guard_type not in _CONSTANT_GUARDS for guard in guards]


# The function, not an agent's method, is what is compiled: nothing to save or copy with the agent, and agents of one shape
# share it
@cache
def _compiled(loss: Callable[..., LossAndStats]) -> Callable[..., dict[str, th.Tensor]]:
    # the random numbers of the uncompiled function, not of Inductor
    options: dict[str, Any] = {"fallback_random": True, "guard_filter_fn": _guards_that_matter}
    # One graph for each shape: with graphs for several, an agent's rounding would depend on the agents before it
    compiled = th.compile(lambda *args: _backward(loss, *args), options=options, dynamic=False)
    # A graph for each setting of an agent in this process: past the limit, 8 by default, functions run uncompiled
    setting = th._dynamo.config.patch(trace_autograd_ops=True, recompile_limit=64)

    def call(*args: Any) -> dict[str, th.Tensor]:
        with setting:
            return compiled(*args)

    return call
