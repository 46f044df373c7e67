"""Critics: all of them in one pass, for several actions per state."""

from collections.abc import Sequence
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, create_mlp
from stable_baselines3.common.type_aliases import PyTorchObs, TensorDict
from torch import nn

from sb3_softq.batch_norm import JointBatchNorm, Statistics, joint_statistics, normalised_linear
from sb3_softq.histogram import bin_centers, bin_edges, cross_entropy
from sb3_softq.networks import Affine, Freezable, activate, particle_forward
from sb3_softq.observations import Observer
from sb3_softq.stacking import from_sources, stacked_optimizer_state, stacked_state, view_of


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

    def joint_forward(self, pairs: th.Tensor, next_pairs: th.Tensor, subtract_first: bool) -> tuple[th.Tensor, th.Tensor]:
        """
        Normalise by the statistics of both, which the running ones follow, and multiply. See :func:`normalised_linear`.

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
        return normalised_linear(pairs, next_pairs, self.weight, self.bias, self.norm.weight, self.norm.bias, statistics)

    def fold(self, subtract_first: bool) -> Affine:
        """
        The layer by running statistics, see :meth:`JointBatchNorm.fold`.

        :param subtract_first: Whether the mean stays apart
        """
        if self.norm is None:
            return Affine(self.weight, self.bias)
        return self.norm.fold(self.weight, self.bias, subtract_first)


class ScaledHistogram(nn.Module):
    """
    What the outputs of critics mean: Q is the mean of a histogram (:mod:`sb3_softq.histogram`) or a number, in both cases
    times ``return_scale``, so that the networks see values of about 1.
    """

    # Unit of what the networks predict, shape (1,)
    return_scale: th.Tensor
    # of agents of release 0.1.0
    n_bins = 1

    def _set_bins(self, n_bins: int) -> None:
        self.n_bins = n_bins
        self.register_buffer("return_scale", th.ones(1))

    def q_of(self, outputs: th.Tensor) -> th.Tensor:
        """
        :param outputs: Of the networks, shape (..., n_bins)
        :return: Q in the environment's units, shape (...)
        """
        if self.n_bins == 1:
            return outputs.squeeze(-1) * self.return_scale
        # not a product, which autocast does in bfloat16
        centers = bin_centers(self.n_bins, outputs.device)
        return (th.softmax(outputs, dim=-1) * centers).sum(dim=-1) * self.return_scale

    def loss(self, outputs: th.Tensor, targets: th.Tensor) -> th.Tensor:
        """
        :param outputs: Of the networks, shape (n_critics, batch_size, n_bins)
        :param targets: Of Q, in the environment's units, shape (batch_size,)
        :return: Cross-entropy to the targets' histograms, or half the squared error, in units of the scale: summed over the
            critics, mean over the batch
        """
        targets = targets / self.return_scale
        if self.n_bins == 1:
            return 0.5 * (outputs.squeeze(-1) - targets).square().sum(dim=0).mean()
        return cross_entropy(outputs, targets, bin_edges(self.n_bins, outputs.device)).sum(dim=0).mean()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # which release 0.1.0 did not have
        state_dict.setdefault(prefix + "return_scale", th.ones_like(self.return_scale))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "return_scale" not in self._buffers:
            self.register_buffer("return_scale", th.ones(1))


class ParticleCritic(Freezable, ScaledHistogram, Observer):
    """
    SB3's Q networks, all of them in one pass, evaluated for several actions per state, and on request with batch normalisation
    before each linear layer (CrossQ, Bhatt et al. 2024, https://arxiv.org/abs/1902.05605). Q is that of a
    :class:`ScaledHistogram`. See SB3's ``ContinuousCritic`` for the other parameters.

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
    :param n_bins: Number of bins of the histogram, 1 for a number
    """

    features_extractor: BaseFeaturesExtractor
    # nn.ModuleLists
    layers: Sequence[CriticLayer]
    activations: Sequence[Sequence[nn.Module]]

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
        n_bins: int = 1,
    ):
        super().__init__(
            observation_space, action_space, features_extractor=features_extractor, normalize_images=normalize_images
        )
        self.share_features_extractor = share_features_extractor
        self.n_critics = n_critics
        self._set_bins(n_bins)
        input_dim = features_dim + get_action_dim(action_space)
        nets = [create_mlp(input_dim, n_bins, net_arch, activation_fn) for _ in range(n_critics)]
        self._stack(nets, batch_norm)

    def _stack(self, nets: Sequence[Sequence[nn.Module]], batch_norm: bool) -> None:
        """Take over the layers of separate networks, and their normalisation where they have it."""
        # of each depth, the modules of all critics
        modules = list(zip(*nets, strict=True))
        linears = [layers for layers in modules if isinstance(layers[0], nn.Linear)]
        norms = [layers for layers in modules if hasattr(layers[0], "running_mean")]
        if batch_norm and not norms:
            norms = [tuple(JointBatchNorm(linear.in_features) for linear in layers) for layers in linears]
        activations = [layers for layers in modules if layers not in linears and layers not in norms]
        self.layers = nn.ModuleList(  # type: ignore[assignment]
            CriticLayer(*layer) for layer in zip(linears, norms or [()] * len(linears), strict=True)
        )
        # After each hidden layer, one for all critics, or one for each where there is something to learn
        self.activations = nn.ModuleList(  # type: ignore[assignment]
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

    def activate(self, depth: int, hidden: th.Tensor) -> th.Tensor:
        """
        :param depth: Number of the hidden layer
        :param hidden: Its output, shape (n_critics, ...), which may be overwritten
        :return: Its activations, same shape
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

    def outputs(self, features: th.Tensor, actions: th.Tensor, weights_are_fixed: bool = False) -> th.Tensor:
        """
        What the networks predict by the running statistics, whatever the mode: see :meth:`q_of` and :meth:`loss`.

        :param features: Shape (batch_size, features_dim)
        :param actions: Actions in the normalised box, shape (batch_size, n_particles, action_dim)
        :param weights_are_fixed: Whether the weights need no gradient, which saves time
        :return: Shape (n_critics, batch_size, n_particles, n_bins)
        """
        with th.set_grad_enabled(th.is_grad_enabled() and not weights_are_fixed):
            # Observations may lie far from zero: folded into the bias, their mean would take their digits along
            layers = [layer.fold(subtract_first=depth == 0) for depth, layer in enumerate(self.layers)]
        if weights_are_fixed:
            layers = [layer.detach() for layer in layers]
        return particle_forward(layers, self.activate, features, actions)

    def q_values(self, features: th.Tensor, actions: th.Tensor, weights_are_fixed: bool = False) -> th.Tensor:
        """
        Q in the environment's units, by the running statistics.

        :param features: Shape (batch_size, features_dim)
        :param actions: Actions in the normalised box, shape (batch_size, n_particles, action_dim)
        :param weights_are_fixed: Whether the weights need no gradient, which saves time
        :return: Shape (n_critics, batch_size, n_particles)
        """
        return self.q_of(self.outputs(features, actions, weights_are_fixed))

    def joint_outputs(
        self, obs: PyTorchObs, actions: th.Tensor, next_obs: PyTorchObs, next_actions: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor]:
        """
        :meth:`outputs` of the transitions and of particles in their next states in one pass, so that batch normalisation sees
        both: the actions of the replay buffer are distributed otherwise than those of the policy. The gradient is that of one
        pass through all rows where both have one distribution, at a third of the cost. See :meth:`CriticLayer.joint_forward`.

        :param obs: Observations
        :param actions: Actions taken, in the normalised box, shape (batch_size, action_dim), batch_size > 1
        :param next_obs: Next observations
        :param next_actions: Shape (batch_size, n_particles, action_dim)
        :return: Shapes (n_critics, batch_size, n_bins) and, without gradient, (n_critics, batch_size, n_particles, n_bins)
        """
        n_particles = next_actions.shape[1]
        with th.no_grad():
            next_features = self.features(next_obs).repeat_interleave(n_particles, dim=0)
        pairs = th.cat([self.features(obs), actions], dim=1).expand(self.n_critics, -1, -1)
        next_pairs = th.cat([next_features, next_actions.flatten(0, 1)], dim=1).expand(self.n_critics, -1, -1)
        for depth, layer in enumerate(self.layers):
            pairs, next_pairs = layer.joint_forward(pairs, next_pairs, subtract_first=depth == 0)
            if depth < len(self.activations):
                pairs = self.activate(depth, pairs)
                with th.no_grad():
                    next_pairs = self.activate(depth, next_pairs)
        # what follows wants more digits than bfloat16 has
        return pairs.float(), next_pairs.float().unflatten(1, (-1, n_particles))

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

    def _sources(self) -> dict[str, str | list[str]]:
        """Names up to release 0.1.0: of a parameter or buffer, or of those of each critic that it is stacked from."""
        sources: dict[str, str | list[str]] = {}
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
                    sources[f"activations.{depth}.{i}.{name}"] = f"qf{i}.{position + 1}.{name}"
        return sources

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        old = prefix + "qf"
        if old + "0.0.weight" in state_dict:
            tensors = {key.removeprefix(prefix): state_dict.pop(key) for key in list(state_dict) if key.startswith(old)}
            for name, names in self._sources().items():
                state_dict[prefix + name] = from_sources(names, tensors)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def stacked_optimizer_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """
        :param state: State of the critics' optimizer, as release 0.1.0 saved it
        :return: State of that of the stacked parameters
        """
        sources = self._sources()
        learned = [name for name, _ in self.named_parameters() if name in sources]
        old_names = [
            name
            for i in range(self.n_critics)
            for key, names in sources.items()
            if key in learned
            for name in ([names] if isinstance(names, str) else names)
            if name.startswith(f"qf{i}.")
        ]
        return stacked_optimizer_state(state, old_names, {name: sources[name] for name in learned})

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
            sources = self._sources()
            own = [parameter for name, parameter in self.named_parameters() if name in sources]
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


def with_stacked_optimizer(critic: nn.Module, params: TensorDict) -> TensorDict:
    """
    :param critic: Critics of an agent
    :param params: Parameters for it, as ``set_parameters`` takes them
    :return: The same, where release 0.1.0 saved them with an optimizer's state that fits the critics
    """
    if "critic.qf0.0.weight" not in params.get("policy", ()) or not isinstance(critic, ParticleCritic):
        return params
    # SB3's TensorDict leaves out that an optimizer's state is no dict of tensors
    state: Any = critic.stacked_optimizer_state(params["critic.optimizer"])  # type: ignore[arg-type]
    return params | {"critic.optimizer": state}
