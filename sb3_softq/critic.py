"""Critics for several actions per state, with batch normalisation over transitions and particles of their next states."""

from typing import Any

import torch as th
from stable_baselines3.common.policies import ContinuousCritic
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn
from torch.nn import functional as F

from sb3_softq.networks import Affine, Freezable, activate, particle_forward

# As CrossQ has it
BATCH_NORM_EPS = 1e-3
# Ten times CrossQ's: statistics that lag behind the weights cost mode coverage
BATCH_NORM_MOMENTUM = 0.1


class JointBatchNorm(nn.Module):
    """
    Batch normalisation of a critic's inputs, by the statistics of transitions and particles of their next states together
    while it is trained (:meth:`normalise_jointly`), by running statistics everywhere else. The mode of the module has no part
    in it.

    :param n_features: Number of inputs
    """

    running_mean: th.Tensor
    running_var: th.Tensor

    def __init__(self, n_features: int):
        super().__init__()
        self.weight = nn.Parameter(th.ones(n_features))
        self.bias = nn.Parameter(th.zeros(n_features))
        self.register_buffer("running_mean", th.zeros(n_features))
        self.register_buffer("running_var", th.ones(n_features))

    def normalise_jointly(self, pairs: th.Tensor, next_pairs: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        Normalise by the statistics of both, which the running ones follow. The gradient is that of batch renormalisation
        (Ioffe 2017, https://arxiv.org/abs/1702.03275): of the statistics of the first alone, which constants turn into those
        of the joint batch.

        :param pairs: Of transitions, shape (batch_size, n_features)
        :param next_pairs: Of particles of the next states, shape (n, n_features)
        :return: The same shapes, the second without gradient
        """
        eps = BATCH_NORM_EPS
        with th.no_grad():
            joint, mean, inv_std = th.native_batch_norm(
                th.cat([pairs, next_pairs]),
                self.weight,
                self.bias,
                self.running_mean,
                self.running_var,
                True,
                BATCH_NORM_MOMENTUM,
                eps,
            )
            _, own_mean, own_inv_std = th.native_batch_norm(pairs, self.weight, self.bias, None, None, True, 0.0, eps)
            # The transitions are part of the joint batch, so r needs none of the bounds that the paper has
            r = inv_std / own_inv_std
            d = (own_mean - mean) * inv_std
        scale, shift = self.weight * r, self.bias + self.weight * d
        return th.native_batch_norm(pairs, scale, shift, None, None, True, 0.0, eps)[0], joint[len(pairs) :]

    def fold(self, linear: nn.Linear, subtract_first: bool) -> Affine:
        """
        Normalisation by running statistics and the linear layer after it, as one layer.

        :param linear: The layer after it
        :param subtract_first: Whether the mean stays apart, to be subtracted from the inputs, or goes into the bias
        """
        scale = self._scale()
        shift = self.bias if subtract_first else self.bias - self.running_mean * scale
        mean = self.running_mean if subtract_first else None
        return Affine(linear.weight * scale, linear.bias + F.linear(shift, linear.weight), mean)

    def _scale(self) -> th.Tensor:
        return self.weight * th.rsqrt(self.running_var + BATCH_NORM_EPS)

    def forward(self, x: th.Tensor) -> th.Tensor:
        return (x - self.running_mean) * self._scale() + self.bias

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # nn.BatchNorm1d stood here, and counted
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def joint_forward(net: nn.Sequential, pairs: th.Tensor, next_pairs: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """
    Apply an MLP with batch normalisation to transitions and, without gradient, to pairs of their next states, each layer with
    joint statistics (:meth:`JointBatchNorm.normalise_jointly`). The gradient is that of one pass through all rows where both
    have one distribution, at a third of the cost.

    :param net: Batch normalisation, linear layers and activations, see :class:`ParticleCritic`
    :param pairs: Observations and actions, shape (batch_size, input_dim), batch_size > 1
    :param next_pairs: Shape (n, input_dim)
    :return: Shapes (batch_size, output_dim) and (n, output_dim)
    """
    for layer in net:
        if isinstance(layer, JointBatchNorm):
            pairs, next_pairs = layer.normalise_jointly(pairs, next_pairs)
        else:
            pairs = activate(layer, pairs)
            with th.no_grad():
                next_pairs = activate(layer, next_pairs)
    # what follows wants more digits than bfloat16 has
    return pairs.float(), next_pairs.float()


def folded(net: nn.Sequential) -> list[nn.Module | Affine]:
    """
    Layers that do what batch normalisation by running statistics and the linear layers after it do.

    :param net: Batch normalisation, linear layers and activations
    :return: For :func:`sb3_softq.networks.particle_forward`
    """
    layers: list[nn.Module | Affine] = []
    norm: JointBatchNorm | None = None
    for layer in net:
        if isinstance(layer, JointBatchNorm):
            norm = layer
        elif isinstance(layer, nn.Linear) and norm is not None:
            # Observations may lie far from zero: folded into the bias, their mean would take their digits along
            layers.append(norm.fold(layer, subtract_first=not layers))
            norm = None
        else:
            layers.append(layer)
    return layers


def normalised(net: nn.Module) -> nn.Sequential:
    """
    :param net: Linear layers and activations
    :return: The same with batch normalisation before each linear one
    """
    layers: list[nn.Module] = []
    for layer in net.children():
        if isinstance(layer, nn.Linear):
            layers.append(JointBatchNorm(layer.in_features))
        layers.append(layer)
    return nn.Sequential(*layers)


class ParticleCritic(Freezable, ContinuousCritic):
    """
    SB3's Q networks, evaluated for several actions per state, and on request with batch normalisation before each linear
    layer (CrossQ, Bhatt et al. 2024, https://arxiv.org/abs/1902.05605). See :class:`ContinuousCritic` for the other
    parameters.

    :param batch_norm: Whether to normalise
    """

    def __init__(self, *args: Any, batch_norm: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if batch_norm:
            for i, net in enumerate(self.q_networks):
                self.q_networks[i] = normalised(net)
                self.add_module(f"qf{i}", self.q_networks[i])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for net in self.q_networks:
            assert isinstance(net, nn.Sequential)
            for i, layer in enumerate(net):
                if isinstance(layer, nn.BatchNorm1d):  # in agents that were pickled when it stood here
                    net[i] = JointBatchNorm(layer.num_features)
                    net[i].load_state_dict(layer.state_dict())

    def features(self, obs: PyTorchObs) -> th.Tensor:
        """
        :param obs: Observations
        :return: Features, shape (batch_size, features_dim); without gradient when the extractor is the actor's
        """
        with th.set_grad_enabled(th.is_grad_enabled() and not self.share_features_extractor):
            return self.extract_features(obs, self.features_extractor)

    def q_values(self, features: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """
        Q by the running statistics, whatever the mode.

        :param features: Shape (batch_size, features_dim)
        :param actions: Actions in the normalised box, shape (batch_size, n_particles, action_dim)
        :return: Shape (n_critics, batch_size, n_particles)
        """
        return th.stack([particle_forward(folded(net), features, actions).squeeze(2) for net in self.q_networks])  # type: ignore[arg-type]

    def joint_q_values(
        self, obs: PyTorchObs, actions: th.Tensor, next_obs: PyTorchObs, next_actions: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor]:
        """
        Q of the transitions and of particles in their next states in one pass, so that batch normalisation sees both: the
        actions of the replay buffer are distributed otherwise than those of the policy. See :func:`joint_forward`.

        :param obs: Observations
        :param actions: Actions taken, in the normalised box, shape (batch_size, action_dim)
        :param next_obs: Next observations
        :param next_actions: Shape (batch_size, n_particles, action_dim)
        :return: Shapes (n_critics, batch_size, 1) and, without gradient, (n_critics, batch_size, n_particles)
        """
        n_particles = next_actions.shape[1]
        with th.no_grad():
            next_features = self.features(next_obs).repeat_interleave(n_particles, dim=0)
        pairs = th.cat([self.features(obs), actions], dim=1)
        next_pairs = th.cat([next_features, next_actions.flatten(0, 1)], dim=1)
        results = [joint_forward(net, pairs, next_pairs) for net in self.q_networks]  # type: ignore[arg-type]
        q_values, next_q_values = (th.stack(values) for values in zip(*results, strict=True))
        return q_values, next_q_values.unflatten(1, (-1, n_particles)).squeeze(3)

    def forward(self, obs: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, ...]:
        q_values = self.q_values(self.features(obs), actions.unsqueeze(1))
        return tuple(q_values)


def min_q_values(critic: ParticleCritic, obs: PyTorchObs, u: th.Tensor) -> th.Tensor:
    """
    :param critic: Critics
    :param obs: Observations; their features come without gradient
    :param u: Pre-tanh actions, shape (batch_size, n_particles, action_dim)
    :return: Minimum of Q over the critics, shape (batch_size, n_particles)
    """
    with th.no_grad():
        features = critic.features(obs)
    return critic.q_values(features, th.tanh(u)).amin(dim=0)
