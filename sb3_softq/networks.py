"""What actor and critic share: networks that can be frozen, Polyak averaging, many particles per state at little cost."""

from collections.abc import Iterable
from typing import NamedTuple

import torch as th
from torch import nn
from torch.nn import functional as F
from typing_extensions import Self


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
    """A linear layer as tensors, x -> (x - mean) W^T + b; a mean in the first layer alone."""

    weight: th.Tensor
    bias: th.Tensor
    mean: th.Tensor | None = None


def particle_forward(layers: Iterable[nn.Module | Affine], features: th.Tensor, particles: th.Tensor) -> th.Tensor:
    """
    Apply an MLP on [features, particle] to several particles per state. The first layer splits into a part that is computed
    once per state and a part computed per particle.

    :param layers: Linear layers and activations
    :param features: Shape (batch_size, features_dim)
    :param particles: Noise or actions, shape (batch_size, n_particles, particle_dim)
    :return: Shape (batch_size, n_particles, output_dim)
    """
    hidden: th.Tensor | None = None
    for layer in layers:
        if isinstance(layer, nn.Linear):
            layer = Affine(layer.weight, layer.bias)
        if not isinstance(layer, Affine):
            assert hidden is not None
            hidden = activate(layer, hidden)
        elif hidden is not None:
            # two axes: the output of a linear layer on three is a view, for which autograd makes copies
            hidden = F.linear(hidden.view(-1, hidden.shape[-1]), layer.weight, layer.bias)
        else:
            hidden = _first_layer(layer, features, particles)
    assert hidden is not None
    # what follows wants more digits than bfloat16 has
    return hidden.float().view(*particles.shape[:2], -1)


def _first_layer(layer: Affine, features: th.Tensor, particles: th.Tensor) -> th.Tensor:
    sizes = [features.shape[1], particles.shape[2]]
    if layer.mean is not None:
        feature_mean, particle_mean = layer.mean.split(sizes)
        features, particles = features - feature_mean, particles - particle_mean
    if particles.shape[1] == 1:
        return F.linear(th.cat([features, particles.squeeze(1)], dim=1), layer.weight, layer.bias)
    weight_state, weight_particle = layer.weight.split(sizes, dim=1)
    state_part = F.linear(features, weight_state, layer.bias)
    return F.linear(particles, weight_particle).add_(state_part.unsqueeze(1))


def activate(layer: nn.Module, hidden: th.Tensor) -> th.Tensor:
    """
    :param layer: Activation function, or another layer that is no linear one
    :param hidden: Its input, which may be overwritten
    :return: Its output
    """
    # In place: the backward pass of a linear layer does not need its output, and a fresh block of megabytes costs more than
    # the operation itself
    return hidden.relu_() if type(layer) is nn.ReLU else layer(hidden)
