"""What actor and critic share: networks that can be frozen, Polyak averaging, many particles per state at little cost."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch as th
from torch import nn
from torch.autograd.function import once_differentiable
from typing_extensions import Self

from sb3_softq.products import linear


@th.no_grad()
def polyak_update(network: nn.Module, target: nn.Module, tau: float) -> None:
    """
    Move the target's weights towards the network's, target <- target + tau (network - target), all of them in one call, and
    copy what is no weight.

    :param network: What is followed
    :param target: What follows, of the same structure
    :param tau: In [0, 1]
    """
    th._foreach_lerp_(list(target.parameters()), list(network.parameters()), tau)
    # Copy running stats, see https://github.com/DLR-RM/stable-baselines3/issues/996
    for running, copied in zip(network.buffers(), target.buffers(), strict=True):
        copied.copy_(running)


class Freezable(nn.Module):
    """A network that can be frozen: it then stands in evaluation mode and has no gradients, whoever asks for another mode."""

    frozen = False

    def freeze(self) -> None:
        """Freeze for good."""
        self.frozen = True
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Self:
        return super().train(mode and not self.frozen)


class Affine(NamedTuple):
    """
    A linear layer as tensors, x -> (x - mean) W^T + b; a mean in the first layer alone. Of one network, or of several with a
    first axis for them.
    """

    weight: th.Tensor
    bias: th.Tensor
    mean: th.Tensor | None = None

    def detach(self) -> "Affine":
        """The same layer as constants."""
        return Affine(self.weight.detach(), self.bias.detach(), None if self.mean is None else self.mean.detach())


def particle_forward(
    layers: Sequence[Affine],
    activation: Callable[[int, th.Tensor], th.Tensor],
    features: th.Tensor,
    particles: th.Tensor,
) -> th.Tensor:
    """
    Apply an MLP on [features, particle], or several of them, to several particles per state. The first layer splits into a
    part that is computed once per state and a part computed per particle.

    :param layers: Linear layers
    :param activation: Of a hidden layer, by its number
    :param features: Shape (batch_size, features_dim)
    :param particles: Noise or actions, shape (batch_size, n_particles, particle_dim), or (1, ...) of the same for all states
    :return: Shape (batch_size, n_particles, output_dim), or (n_networks, batch_size, n_particles, output_dim)
    """
    # two axes, or three with that of the networks: the output of a linear layer on more is a view, for which autograd makes
    # copies
    hidden = _first_layer(layers[0], features, particles)
    for depth, layer in enumerate(layers[1:]):
        hidden = linear(activation(depth, hidden), layer.weight, layer.bias)
    # what follows wants more digits than bfloat16 has
    return hidden.float().unflatten(-2, (features.shape[0], particles.shape[1]))


def _first_layer(layer: Affine, features: th.Tensor, particles: th.Tensor) -> th.Tensor:
    """Shape (batch_size * n_particles, output_dim), or with the networks' axis before."""
    features_dim = features.shape[1]
    flat = particles.flatten(0, 1)
    if layer.weight.ndim == 3:
        features, flat = (x.expand(len(layer.weight), -1, -1) for x in (features, flat))
    if layer.mean is not None:
        mean = layer.mean.unsqueeze(-2)
        features, flat = features - mean[..., :features_dim], flat - mean[..., features_dim:]
    if particles.shape[1] == 1 and features.shape[-2] == flat.shape[-2]:
        return linear(th.cat([features, flat], dim=-1), layer.weight, layer.bias)
    # (..., batch_size, 1, n_outputs) + (..., batch_size or 1, n_particles, n_outputs)
    state_part = linear(features, layer.weight[..., :features_dim], layer.bias).unsqueeze(-2)
    particle_part = linear(flat, layer.weight[..., features_dim:]).unflatten(-2, particles.shape[:2])
    return (state_part + particle_part).flatten(-3, -2)


def affine_layers(net: nn.Sequential) -> list[Affine]:
    """
    :param net: Linear layers and activations
    :return: The linear layers
    """
    return [Affine(layer.weight, layer.bias) for layer in net if isinstance(layer, nn.Linear)]


def activate(layer: nn.Module, hidden: th.Tensor) -> th.Tensor:
    """
    :param layer: Activation function
    :param hidden: Its input, which may be overwritten
    :return: Its output
    """
    # In place: the backward pass of a linear layer does not need its output, and a fresh block of megabytes costs more than
    # the operation itself
    return hidden.relu_() if type(layer) is nn.ReLU else layer(hidden)


def bounded_above(x: th.Tensor, bound: float) -> th.Tensor:
    """
    x.clamp(max=bound), whose gradient at values beyond the bound is not lost where it leads back: what has gone too far in one
    step would otherwise stay there for good.

    :param x: Any shape
    :param bound: Largest value
    :return: Same shape
    """
    # elsewhere the plain operator, which exporters know
    return _BoundedAbove.apply(x, bound) if th.is_grad_enabled() and x.requires_grad else x.clamp(max=bound)


class _BoundedAbove(th.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: th.Tensor, bound: float) -> th.Tensor:
        ctx.save_for_backward(x > bound)
        return x.clamp(max=bound)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: th.Tensor) -> tuple[th.Tensor, None]:
        (is_beyond,) = ctx.saved_tensors
        # a step is against the gradient
        return grad.masked_fill(is_beyond & (grad < 0), 0.0), None
