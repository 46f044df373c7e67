"""What the tests share: small agents, and their weights as one vector."""

from typing import Any

import torch as th
from torch import nn

from sb3_softq import ParticleOptions, SoftQ


def grouped(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of SoftQ, with those that are particle options in ``particle_options``."""
    options = {name: kwargs[name] for name in ParticleOptions.names() if name in kwargs}
    others = {name: value for name, value in kwargs.items() if name not in options}
    return others | {"particle_options": options} if options else others


def small(
    algorithm: Any = SoftQ, policy: str = "MlpPolicy", env: Any = "Pendulum-v1", width: int | None = 8, **kwargs: Any
) -> Any:
    """
    An agent that learns in milliseconds.

    :param algorithm: Its class
    :param policy: Its policy
    :param env: Its environment
    :param width: Of the hidden layer, unless ``policy_kwargs`` say something else; None for the default networks
    :param kwargs: Further arguments, particle options among them
    """
    arguments: dict[str, Any] = dict(learning_starts=8, batch_size=8, buffer_size=200, seed=0, device="cpu")
    arguments |= grouped(kwargs)
    policy_kwargs = arguments.get("policy_kwargs", {})
    if width is not None and isinstance(policy_kwargs, dict | None):
        arguments["policy_kwargs"] = {"net_arch": [width]} | (policy_kwargs or {})
    return algorithm(policy, env, **arguments)


def flat(module: nn.Module) -> th.Tensor:
    """A copy of all parameters, as one vector."""
    return nn.utils.parameters_to_vector(module.parameters()).detach().clone()
