"""Critics for several actions per state, with batch normalisation over transitions and particles of their next states."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BaseModel
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, create_mlp
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn
from torch.autograd.function import once_differentiable

from sb3_softq.networks import Affine, Freezable, activate, particle_forward
from sb3_softq.products import linear, product, product_dtype
from sb3_softq.stacking import stacked_optimizer_state, stacked_state, view_of

# As CrossQ has it
BATCH_NORM_EPS = 1e-3
# Ten times CrossQ's: statistics that lag behind the weights cost mode coverage
BATCH_NORM_MOMENTUM = 0.1


class Statistics(NamedTuple):
    """Mean and variance of the transitions alone, and of the joint batch with the pairs of the next states."""

    own_mean: th.Tensor
    own_var: th.Tensor
    mean: th.Tensor
    var: th.Tensor


def joint_statistics(pairs: th.Tensor, next_pairs: th.Tensor) -> Statistics:
    """
    :param pairs: Of transitions, shape (..., batch_size, n_features)
    :param next_pairs: Of particles of the next states, shape (..., n, n_features)
    :return: Shapes (..., n_features), variances without Bessel's correction
    """
    (mean_1, var_1), (mean_2, var_2) = (_mean_and_var(x) for x in (pairs, next_pairs))
    share = pairs.shape[-2] / (pairs.shape[-2] + next_pairs.shape[-2])
    mean = th.lerp(mean_2, mean_1, share)
    var = th.lerp(var_2, var_1, share) + share * (1.0 - share) * (mean_1 - mean_2).square()
    return Statistics(mean_1, var_1, mean, var)


def _mean_and_var(x: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    # not th.var_mean, which takes twenty times as long over this axis
    mean = x.mean(dim=-2)
    return mean, (x - mean.unsqueeze(-2)).square_().mean(dim=-2)


class _NormalisedLinear(th.autograd.Function):
    """
    Batch normalisation and the linear layer after it, as one linear layer, forwards and backwards: what depends on the batch
    passes through matrix products alone. With z = gamma (x - mean) / std + beta, of the joint batch, and y = W z + b.
    """

    @staticmethod
    def forward(
        ctx: Any,
        pairs: th.Tensor,
        next_pairs: th.Tensor,
        weight: th.Tensor,
        bias: th.Tensor,
        gamma: th.Tensor,
        beta: th.Tensor,
        statistics: Statistics,
        dtype: th.dtype,
    ) -> tuple[th.Tensor, th.Tensor]:
        own_mean, own_var, mean, var = statistics
        inv_std = th.rsqrt(var + BATCH_NORM_EPS)
        scale = gamma * inv_std
        shift = th.addcmul(beta, mean, scale, value=-1)
        folded = (weight * scale.unsqueeze(1)).to(dtype)
        folded_bias = (bias + (shift.unsqueeze(1) @ weight.mT).squeeze(1)).to(dtype)
        pairs, next_pairs = pairs.to(dtype), next_pairs.to(dtype)
        ctx.save_for_backward(pairs, weight, folded, scale, shift, inv_std, own_mean, own_var, mean)
        next_output = linear(next_pairs, folded, folded_bias)
        ctx.mark_non_differentiable(next_output)
        return linear(pairs, folded, folded_bias), next_output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: th.Tensor, _: th.Tensor) -> tuple[th.Tensor | None, ...]:
        pairs, weight, folded, scale, shift, inv_std, own_mean, own_var, mean = ctx.saved_tensors
        n_rows = pairs.shape[1]
        # sums over the rows of dL/dy, dL/dy x^T, dL/dz and dL/dz x
        grad_sum = grad.sum(dim=1, dtype=weight.dtype)
        grad_x = product(grad.mT, pairs).to(weight.dtype)
        z_sum = (grad_sum.unsqueeze(1) @ weight).squeeze(1)
        z_x = (grad_x * weight).sum(dim=1)
        grad_weight = (grad_x * scale.unsqueeze(1)).addcmul_(grad_sum.unsqueeze(2), shift.unsqueeze(1))
        grad_pairs = None
        if ctx.needs_input_grad[0]:
            # through the statistics of the transitions, which r and d of batch renormalisation turn into the joint ones
            slope = -scale / (own_var + BATCH_NORM_EPS) * (z_x - own_mean * z_sum) / n_rows
            offset = -scale * z_sum / n_rows - slope * own_mean
            grad_pairs = th.addcmul(offset.unsqueeze(1), pairs, slope.unsqueeze(1)).add_(product(grad, folded)).to(pairs.dtype)
        return grad_pairs, None, grad_weight, grad_sum, inv_std * (z_x - mean * z_sum), z_sum, None, None


class JointBatchNorm(nn.Module):
    """
    Batch normalisation of a critic's inputs, by the statistics of transitions and particles of their next states together
    while it is trained (:func:`normalised_linear`), by running statistics everywhere else. The mode of the module has no part
    in it.

    :param shape: (n_features,), or (n_critics, n_features) for all critics
    """

    running_mean: th.Tensor
    running_var: th.Tensor

    def __init__(self, *shape: int):
        super().__init__()
        self.weight = nn.Parameter(th.ones(shape))
        self.bias = nn.Parameter(th.zeros(shape))
        self.register_buffer("running_mean", th.zeros(shape))
        self.register_buffer("running_var", th.ones(shape))

    @th.no_grad()
    def follow(self, mean: th.Tensor, var: th.Tensor, n_rows: int) -> None:
        """
        Move the running statistics towards those of a batch.

        :param mean: Mean
        :param var: Variance without Bessel's correction
        :param n_rows: Number of rows of the batch
        """
        self.running_mean.lerp_(mean, BATCH_NORM_MOMENTUM)
        self.running_var.lerp_(var * (n_rows / (n_rows - 1)), BATCH_NORM_MOMENTUM)

    def fold(self, weight: th.Tensor, bias: th.Tensor, subtract_first: bool) -> Affine:
        """
        Normalisation by running statistics and the linear layer after it, as one layer.

        :param weight: Of the layer after it, shape (..., n_outputs, n_features)
        :param bias: Shape (..., n_outputs)
        :param subtract_first: Whether the mean stays apart, to be subtracted from the inputs, or goes into the bias
        """
        scale = self._scale()
        shift = self.bias if subtract_first else self.bias - self.running_mean * scale
        mean = self.running_mean if subtract_first else None
        return Affine(weight * scale.unsqueeze(-2), bias + (shift.unsqueeze(-2) @ weight.mT).squeeze(-2), mean)

    def _scale(self) -> th.Tensor:
        return self.weight * th.rsqrt(self.running_var + BATCH_NORM_EPS)

    def forward(self, x: th.Tensor) -> th.Tensor:
        return (x - self.running_mean) * self._scale() + self.bias


class CriticLayer(nn.Module):
    """
    One linear layer of all critics, with batch normalisation before it or without.

    :param linears: The layer of each critic
    :param norms: The normalisation of each critic, or none
    """

    norm: JointBatchNorm | None

    def __init__(self, linears: Sequence[nn.Linear], norms: Sequence[nn.Module] = ()):
        super().__init__()
        self.norm = JointBatchNorm(len(norms), linears[0].in_features) if norms else None
        # (n_critics, n_outputs, n_inputs)
        self.weight = nn.Parameter(th.stack([linear.weight.detach() for linear in linears]))
        self.bias = nn.Parameter(th.stack([linear.bias.detach() for linear in linears]))
        if self.norm is not None:
            self.norm.load_state_dict(stacked_state(norms, list(self.norm.state_dict())))

    def joint_forward(
        self, pairs: th.Tensor, next_pairs: th.Tensor, subtract_first: bool
    ) -> tuple[th.Tensor, th.Tensor]:
        """
        Normalise by the statistics of both, which the running ones follow, and multiply. The gradient is that of batch
        renormalisation (Ioffe 2017, https://arxiv.org/abs/1702.03275): of the statistics of the first alone, which constants
        turn into those of the joint batch. The transitions are part of it, so that these need none of the bounds of the paper.

        :param pairs: Of transitions, shape (n_critics, batch_size, n_inputs)
        :param next_pairs: Of particles of the next states, shape (n_critics, n, n_inputs)
        :param subtract_first: Whether the mean is subtracted from the inputs, or goes into the bias
        :return: Shapes (n_critics, batch_size, n_outputs) and, without gradient, (n_critics, n, n_outputs)
        """
        assert self.norm is not None
        with th.no_grad():
            statistics = joint_statistics(pairs.to(self.weight.dtype), next_pairs.to(self.weight.dtype))
            own_mean, own_var, mean, var = statistics
            self.norm.follow(mean, var, pairs.shape[1] + next_pairs.shape[1])
            if subtract_first:
                next_pairs = next_pairs - mean.unsqueeze(1)
        if subtract_first:
            pairs = pairs - mean.unsqueeze(1)
            statistics = Statistics(own_mean - mean, own_var, th.zeros_like(mean), var)
        return _NormalisedLinear.apply(
            pairs,
            next_pairs,
            self.weight,
            self.bias,
            self.norm.weight,
            self.norm.bias,
            statistics,
            product_dtype(pairs),
        )

    def fold(self, subtract_first: bool) -> Affine:
        """
        The layer by running statistics, see :meth:`JointBatchNorm.fold`.

        :param subtract_first: Whether the mean stays apart
        """
        if self.norm is None:
            return Affine(self.weight, self.bias)
        return self.norm.fold(self.weight, self.bias, subtract_first)


class ParticleCritic(Freezable, BaseModel):
    """
    SB3's Q networks, all of them in one pass, evaluated for several actions per state, and on request with batch normalisation
    before each linear layer (CrossQ, Bhatt et al. 2024, https://arxiv.org/abs/1902.05605). See SB3's ``ContinuousCritic`` for
    the other parameters.

    :param observation_space: Observation space
    :param action_space: Action space
    :param net_arch: Hidden layers
    :param features_extractor: Network to extract features
    :param features_dim: Number of features
    :param activation_fn: Activation function
    :param normalize_images: Whether to normalize images or not, dividing by 255.0 (True by default)
    :param n_critics: Number of critic networks to create
    :param share_features_extractor: Whether the features extractor is the actor's, and learns from its loss alone
    :param batch_norm: Whether to normalise
    """

    features_extractor: BaseFeaturesExtractor

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        net_arch: list[int],
        features_extractor: BaseFeaturesExtractor,
        features_dim: int,
        activation_fn: type[nn.Module] = nn.ReLU,
        normalize_images: bool = True,
        n_critics: int = 2,
        share_features_extractor: bool = True,
        batch_norm: bool = False,
    ):
        super().__init__(
            observation_space, action_space, features_extractor=features_extractor, normalize_images=normalize_images
        )
        self.share_features_extractor = share_features_extractor
        self.n_critics = n_critics
        input_dim = features_dim + get_action_dim(action_space)
        nets = [create_mlp(input_dim, 1, net_arch, activation_fn) for _ in range(n_critics)]
        self._stack(nets, batch_norm)

    def _stack(self, nets: Sequence[Sequence[nn.Module]], batch_norm: bool) -> None:
        """Take over the layers of separate networks, and their normalisation where they have it."""
        # of each depth, the modules of all critics
        modules = list(zip(*nets, strict=True))
        linears = [layers for layers in modules if isinstance(layers[0], nn.Linear)]
        norms = [layers for layers in modules if hasattr(layers[0], "running_mean")]
        if batch_norm and not norms:
            norms = [[JointBatchNorm(linear.in_features) for linear in layers] for layers in linears]
        activations = [layers for layers in modules if layers not in linears and layers not in norms]
        self.layers = nn.ModuleList(CriticLayer(*layer) for layer in zip(linears, norms or [()] * len(linears), strict=True))
        # After each hidden layer, one for all critics, or one for each where there is something to learn
        self.activations = nn.ModuleList(
            nn.ModuleList(layers if list(layers[0].parameters()) else layers[:1]) for layers in activations
        )

    @property
    def batch_norm(self) -> bool:
        """Whether the critics normalise over the batch."""
        return self.layers[0].norm is not None

    @property
    def q_networks(self) -> list[nn.Sequential]:
        """
        The critics as networks of their own, as SB3 has them: normalisation by running statistics, linear layers, activations.
        Their weights, and gradients where there are some, are views: what is written there arrives here. Autograd ends there.
        """
        return [nn.Sequential(*self._network(i)) for i in range(self.n_critics)]

    def _network(self, i: int) -> list[nn.Module]:
        modules: list[nn.Module] = []
        for depth, layer in enumerate(self.layers):
            n_outputs, n_inputs = layer.weight.shape[1:]
            if layer.norm is not None:
                modules.append(view_of(layer.norm, i, JointBatchNorm(n_inputs)))
            # no memory and no random numbers for weights that come from elsewhere
            modules.append(view_of(layer, i, nn.Linear(n_inputs, n_outputs, device="meta")))
            if depth < len(self.activations):
                activations = self.activations[depth]
                modules.append(activations[i % len(activations)])
        return modules

    def _activate(self, depth: int, hidden: th.Tensor) -> th.Tensor:
        """
        :param depth: Number of the hidden layer
        :param hidden: Shape (n_critics, ...)
        """
        modules = self.activations[depth]
        if len(modules) == 1:
            return activate(modules[0], hidden)
        return th.stack([module(x) for module, x in zip(modules, hidden, strict=True)])

    # ------------------------------------------------------------------ Q

    def features(self, obs: PyTorchObs) -> th.Tensor:
        """
        :param obs: Observations
        :return: Features, shape (batch_size, features_dim); without gradient when the extractor is the actor's
        """
        with th.set_grad_enabled(th.is_grad_enabled() and not self.share_features_extractor):
            return self.extract_features(obs, self.features_extractor)

    def q_values(self, features: th.Tensor, actions: th.Tensor, weights_are_fixed: bool = False) -> th.Tensor:
        """
        Q by the running statistics, whatever the mode.

        :param features: Shape (batch_size, features_dim)
        :param actions: Actions in the normalised box, shape (batch_size, n_particles, action_dim)
        :param weights_are_fixed: Whether the weights need no gradient, which saves time
        :return: Shape (n_critics, batch_size, n_particles)
        """
        with th.set_grad_enabled(th.is_grad_enabled() and not weights_are_fixed):
            # Observations may lie far from zero: folded into the bias, their mean would take their digits along
            layers = [layer.fold(subtract_first=depth == 0) for depth, layer in enumerate(self.layers)]
        return particle_forward(layers, self._activate, features, actions).squeeze(-1)

    def joint_q_values(
        self, obs: PyTorchObs, actions: th.Tensor, next_obs: PyTorchObs, next_actions: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor]:
        """
        Q of the transitions and of particles in their next states in one pass, so that batch normalisation sees both: the
        actions of the replay buffer are distributed otherwise than those of the policy. The gradient is that of one pass
        through all rows where both have one distribution, at a third of the cost. See :meth:`CriticLayer.joint_forward`.

        :param obs: Observations
        :param actions: Actions taken, in the normalised box, shape (batch_size, action_dim), batch_size > 1
        :param next_obs: Next observations
        :param next_actions: Shape (batch_size, n_particles, action_dim)
        :return: Shapes (n_critics, batch_size, 1) and, without gradient, (n_critics, batch_size, n_particles)
        """
        n_particles = next_actions.shape[1]
        with th.no_grad():
            next_features = self.features(next_obs).repeat_interleave(n_particles, dim=0)
        pairs = th.cat([self.features(obs), actions], dim=1).expand(self.n_critics, -1, -1)
        next_pairs = th.cat([next_features, next_actions.flatten(0, 1)], dim=1).expand(self.n_critics, -1, -1)
        for depth, layer in enumerate(self.layers):
            pairs, next_pairs = layer.joint_forward(pairs, next_pairs, subtract_first=depth == 0)
            if depth < len(self.activations):
                pairs = self._activate(depth, pairs)
                with th.no_grad():
                    next_pairs = self._activate(depth, next_pairs)
        # what follows wants more digits than bfloat16 has
        return pairs.float(), next_pairs.float().unflatten(1, (-1, n_particles)).squeeze(3)

    def forward(self, obs: PyTorchObs, actions: th.Tensor) -> tuple[th.Tensor, ...]:
        return tuple(self.q_values(self.features(obs), actions.unsqueeze(1)))

    def q1_forward(self, obs: PyTorchObs, actions: th.Tensor) -> th.Tensor:
        """
        Q of the first critic, as SB3 has it.

        :param obs: Observations
        :param actions: Actions in the normalised box, shape (batch_size, action_dim)
        :return: Shape (batch_size, 1)
        """
        return self(obs, actions)[0]

    # ------------------------------------------------------------------ agents whose critics were networks of their own

    def _sources(self) -> dict[str, list[str]]:
        """Of each parameter and buffer, the names that it had in each critic, up to release 0.1.0 and in its order."""
        sources: dict[str, list[str]] = {}
        per_layer = 3 if self.batch_norm else 2
        for depth, layer in enumerate(self.layers):
            position = depth * per_layer
            if layer.norm is not None:
                for name in layer.norm.state_dict():
                    sources[f"layers.{depth}.norm.{name}"] = [f"qf{i}.{position}.{name}" for i in range(self.n_critics)]
                position += 1
            for name in ("weight", "bias"):
                sources[f"layers.{depth}.{name}"] = [f"qf{i}.{position}.{name}" for i in range(self.n_critics)]
            for i, module in enumerate(self.activations[depth] if depth < len(self.activations) else ()):
                for name in module.state_dict():
                    sources[f"activations.{depth}.{i}.{name}"] = [f"qf{i}.{position + 1}.{name}"]
        return sources

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if prefix + "qf0.0.weight" in state_dict:
            for name, old_names in self._sources().items():
                tensors = [state_dict.pop(prefix + old_name) for old_name in old_names]
                state_dict[prefix + name] = th.stack(tensors) if name.startswith("layers.") else tensors[0]
            for key in [key for key in state_dict if key.startswith(prefix) and key.endswith(".num_batches_tracked")]:
                # nn.BatchNorm1d stood here, and counted
                state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def stacked_optimizer_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """
        :param state: State of the critics' optimizer, as release 0.1.0 saved it
        :return: State of that of the stacked parameters
        """
        sources = self._sources()
        names = [name for name, _ in self.named_parameters() if name in sources]
        old_names = [old_name for name in sources if name in names for old_name in sources[name]]
        old_order = [name for i in range(self.n_critics) for name in old_names if name.startswith(f"qf{i}.")]
        return stacked_optimizer_state(state, old_order, {name: sources[name] for name in names})

    def __setstate__(self, state: dict[str, Any]) -> None:
        nets = state.pop("q_networks", None)
        super().__setstate__(state)
        if nets is None:
            return
        # an agent that was pickled
        for i in range(len(nets)):
            del self._modules[f"qf{i}"]
        self._stack(nets, batch_norm=False)
        optimizer = self.__dict__.get("optimizer")
        if optimizer is not None:
            (group,) = optimizer.param_groups
            new_state = self.stacked_optimizer_state(optimizer.state_dict())
            own = [*self.layers.parameters(), *self.activations.parameters()]
            n_before = len(new_state["param_groups"][0]["params"]) - len(own)
            group["params"] = [*group["params"][:n_before], *own]
            optimizer.state.clear()
            optimizer.load_state_dict(new_state)


def min_q_values(critic: ParticleCritic, obs: PyTorchObs, u: th.Tensor) -> th.Tensor:
    """
    :param critic: Critics
    :param obs: Observations; their features come without gradient
    :param u: Pre-tanh actions, shape (batch_size, n_particles, action_dim)
    :return: Minimum of Q over the critics, shape (batch_size, n_particles), with a gradient to u alone
    """
    with th.no_grad():
        features = critic.features(obs)
    return critic.q_values(features, th.tanh(u), weights_are_fixed=True).amin(dim=0)
