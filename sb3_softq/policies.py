"""Policies of SoftQ: a sampling actor, particle critics, and the policy that holds both."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy, ContinuousCritic
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import (
    BaseFeaturesExtractor,
    CombinedExtractor,
    FlattenExtractor,
    NatureCNN,
    create_mlp,
    get_actor_critic_arch,
)
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn
from torch.nn import functional as F
from typing_extensions import Self

from sb3_softq.checks import check_flag, check_integer, check_net_arch, check_number, check_type
from sb3_softq.soft_value import local_log_std, mixture_mode

Smoothing = Literal["learned", "local", "none"]
SMOOTHINGS: tuple[Smoothing, ...] = ("learned", "local", "none")

# Bounds of the learned smoothing, in units of the pre-tanh action
LOG_STD_MIN = -5.0
LOG_STD_MAX = 1.0
HEAD_ARCH = (64, 64)
# As CrossQ has it
BATCH_NORM_EPS = 1e-3
# Ten times CrossQ's: statistics that lag behind the weights blur the modes (examples/benchmark/README.md)
BATCH_NORM_MOMENTUM = 0.1
# Of Adam, as CrossQ has them: without target networks the momentum of the gradient is that of an older target. CrossQ's actor
# has them too; ours then keeps the modes less well.
CRITIC_BETAS = (0.5, 0.999)
# The averaged actor begins as the average over the last one of so many parts of the updates
AVERAGING_PARTS = 9
# Number of updates behind an average that has come from elsewhere: it is no beginner's
MATURE = 1e9


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

    def scale(self) -> th.Tensor:
        """
        :return: What the inputs less their running mean are multiplied by, shape (n_features,)
        """
        return self.weight * th.rsqrt(self.running_var + BATCH_NORM_EPS)

    def forward(self, x: th.Tensor) -> th.Tensor:
        return (x - self.running_mean) * self.scale() + self.bias

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # nn.BatchNorm1d stood here, and counted
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def particle_forward(net: nn.Sequential, features: th.Tensor, particles: th.Tensor) -> th.Tensor:
    """
    Apply an MLP on [features, particle] to several particles per state. The first layer splits into a part that is
    computed once per state and a part computed per particle. Batch normalisation has its running statistics.

    :param net: Linear layers, activations and, before linear layers, batch normalisation, as made by ``create_mlp``
    :param features: Shape (batch_size, features_dim)
    :param particles: Noise or actions, shape (batch_size, n_particles, particle_dim)
    :return: Shape (batch_size, n_particles, output_dim)
    """
    hidden: th.Tensor | None = None
    norm: JointBatchNorm | None = None
    for layer in net:
        if isinstance(layer, JointBatchNorm):
            norm = layer
        elif isinstance(layer, nn.Linear):
            weight: th.Tensor = layer.weight
            bias: th.Tensor = layer.bias
            if norm is not None:
                scale: th.Tensor = norm.scale()
                shift: th.Tensor = norm.bias
                if hidden is None:
                    # Observations may lie far from zero: folded into the bias, their mean would take their digits along
                    means = norm.running_mean.split([features.shape[1], particles.shape[2]])
                    features, particles = features - means[0], particles - means[1]
                else:
                    shift = shift - norm.running_mean * scale
                weight, bias = weight * scale, bias + F.linear(shift, weight)
                norm = None
            if hidden is not None:
                # two axes: the output of a linear layer on three is a view, for which autograd makes copies
                hidden = F.linear(hidden.view(-1, hidden.shape[-1]), weight, bias)
            elif particles.shape[1] == 1:
                hidden = F.linear(th.cat([features, particles.squeeze(1)], dim=1), weight, bias)
            else:
                weight_state, weight_particle = weight.split([features.shape[1], particles.shape[2]], dim=1)
                state_part = F.linear(features, weight_state, bias)
                hidden = F.linear(particles, weight_particle).add_(state_part.unsqueeze(1))
        else:
            assert hidden is not None
            hidden = _apply(layer, hidden)
    assert hidden is not None
    # what follows wants more digits than bfloat16 has
    return hidden.float().view(*particles.shape[:2], -1)


def renormalised_forward(net: nn.Sequential, pairs: th.Tensor, next_pairs: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """
    Apply an MLP with batch normalisation to transitions and, without gradient, to pairs of their next states. Both are
    normalised by the statistics of the joint batch, which the running ones follow. The gradient is that of batch
    renormalisation (Ioffe 2017, https://arxiv.org/abs/1702.03275): of the statistics of the transitions alone, which constants
    turn into those of the joint batch. It is that of the joint batch where both have one distribution, at a third of the cost.

    :param net: Batch normalisation, linear layers and activations, see :class:`ParticleCritic`
    :param pairs: Observations and actions, shape (batch_size, input_dim), batch_size > 1
    :param next_pairs: Shape (n, input_dim)
    :return: Shapes (batch_size, output_dim) and (n, output_dim)
    """
    for layer in net:
        if isinstance(layer, JointBatchNorm):
            pairs, next_pairs = layer.normalise_jointly(pairs, next_pairs)
        else:
            pairs = _apply(layer, pairs)
            with th.no_grad():
                next_pairs = _apply(layer, next_pairs)
    # what follows wants more digits than bfloat16 has
    return pairs.float(), next_pairs.float()


def _apply(layer: nn.Module, hidden: th.Tensor) -> th.Tensor:
    # In place: the backward pass of a linear layer does not need its output, and a fresh block of megabytes costs more than
    # the operation itself
    return hidden.relu_() if type(layer) is nn.ReLU else layer(hidden)


def _normalised(net: nn.Module) -> nn.Sequential:
    """The layers of a network, with batch normalisation before each linear one."""
    layers: list[nn.Module] = []
    for layer in net.children():
        if isinstance(layer, nn.Linear):
            layers.append(JointBatchNorm(layer.in_features))
        layers.append(layer)
    return nn.Sequential(*layers)


class SamplingActor(Freezable, BasePolicy):
    """
    Sampler u = c + sigma * eps with c = xi + shift(s, xi), sigma = sigma(s, xi) and noise xi, eps ~ N(0, I_d); a = tanh(u).

    xi chooses where to act (several modes if need be), eps smooths each choice. Because the last step is Gaussian,
    K draws of xi give a density that can be evaluated, see :func:`sb3_softq.soft_value.mixture_log_prob`.
    The sampler starts wide (``shift`` is small at first), so that the modes it is to keep are there to be found.

    :param observation_space: Observation space
    :param action_space: Action space
    :param net_arch: Network architecture
    :param features_extractor: Network to extract features
    :param features_dim: Number of features
    :param activation_fn: Activation function
    :param smoothing: Where sigma comes from: ``"learned"`` by the network, ``"local"`` from the distance to the nearest
        other particle, or ``"none"``: actions are the raw particles c (then ``"local"`` is used where a density is asked for)
    :param log_std_init: Initial log standard deviation of the learned smoothing
    :param head_arch: Hidden layers that xi passes through, after those of ``net_arch``, which see the state alone: many
        particles of a state cost little more than one
    :param n_bank: Number of fixed particles of the deterministic action
    :param n_neighbours: Number of particles that ``"local"`` draws to smooth one action
    :param normalize_images: Whether to normalize images or not, dividing by 255.0 (True by default)
    """

    action_space: spaces.Box
    xi_bank: th.Tensor

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        net_arch: list[int],
        features_extractor: BaseFeaturesExtractor,
        features_dim: int,
        activation_fn: type[nn.Module] = nn.ReLU,
        smoothing: Smoothing = "learned",
        log_std_init: float = -1.2,
        head_arch: Sequence[int] = HEAD_ARCH,
        n_bank: int = 32,
        n_neighbours: int = 8,
        normalize_images: bool = True,
    ):
        super().__init__(
            observation_space,
            action_space,
            features_extractor=features_extractor,
            normalize_images=normalize_images,
            squash_output=True,
        )
        self.net_arch = net_arch
        self.features_dim = features_dim
        self.activation_fn = activation_fn
        self.smoothing = smoothing
        self.log_std_init = log_std_init
        self.head_arch = list(head_arch)
        self.n_bank = n_bank
        self.n_neighbours = n_neighbours

        self.action_dim = get_action_dim(action_space)
        n_outputs = 2 if smoothing == "learned" else 1
        self.trunk = nn.Sequential(*create_mlp(features_dim, -1, net_arch, activation_fn))
        trunk_dim = net_arch[-1] if net_arch else features_dim
        self.head = nn.Sequential(
            *create_mlp(trunk_dim + self.action_dim, n_outputs * self.action_dim, self.head_arch, activation_fn)
        )
        if self.head_arch:
            # The noise as strong as it would be alone, and its kinks spread over its range
            first, bound = self.head[0], 1.0 / math.sqrt(self.action_dim)
            assert isinstance(first, nn.Linear)
            with th.no_grad():
                first.weight[:, -self.action_dim :].uniform_(-bound, bound)
                first.bias.uniform_(-bound, bound)
        # A constant, not a weight: the deterministic action is a function of observation and weights alone
        sobol = th.quasirandom.SobolEngine(self.action_dim, scramble=True, seed=0).draw(n_bank)
        xi_bank = th.special.ndtri(sobol.clamp(1e-4, 1 - 1e-4))
        # where the deterministic action starts
        xi_bank[0] = 0.0
        self.register_buffer("xi_bank", xi_bank, persistent=False)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        data.update(
            dict(
                net_arch=self.net_arch,
                features_dim=self.features_dim,
                activation_fn=self.activation_fn,
                smoothing=self.smoothing,
                log_std_init=self.log_std_init,
                head_arch=self.head_arch,
                n_bank=self.n_bank,
                n_neighbours=self.n_neighbours,
                features_extractor=self.features_extractor,
            )
        )
        return data

    def features(self, obs: PyTorchObs) -> th.Tensor:
        """
        What is computed once per state, however many particles follow.

        :param obs: Observations
        :return: Shape (batch_size, width of the trunk)
        """
        return self.trunk(self.extract_features(obs, self.features_extractor))

    def particles(self, features: th.Tensor, xi: th.Tensor, n_constant: int = 0) -> tuple[th.Tensor, th.Tensor]:
        """
        Components of the policy's density: one Gaussian over the pre-tanh action per noise vector.

        :param features: Of the states, see :meth:`features`
        :param xi: Noise, shape (batch_size, n_particles, action_dim)
        :param n_constant: The first ``n_constant`` particles come without gradient, which saves their backward pass
        :return: Centres and log standard deviations, shapes (batch_size, n_particles, action_dim)
        """
        output = particle_forward(self.head, features, xi[:, n_constant:])
        if n_constant > 0:
            with th.no_grad():
                constant = particle_forward(self.head, features, xi[:, :n_constant])
            output = th.cat([constant, output], dim=1)
        if self.smoothing != "learned":
            centres = xi + output
            return centres, local_log_std(centres.detach())
        shift, log_std = output.chunk(2, dim=2)
        # softplus: smooth at the lower bound, so that a narrow component can widen again
        log_std = LOG_STD_MIN + F.softplus(log_std + (self.log_std_init - LOG_STD_MIN))
        return xi + shift, log_std.clamp(max=LOG_STD_MAX)

    def noise(self, batch_size: int, n_particles: int) -> th.Tensor:
        """
        :param batch_size: Number of states
        :param n_particles: Number of particles per state
        :return: Standard normal noise, shape (batch_size, n_particles, action_dim)
        """
        return th.randn(batch_size, n_particles, self.action_dim, device=self.device)

    def components(self, features: th.Tensor, n_components: int) -> tuple[th.Tensor, th.Tensor]:
        """
        Independent draws of a component of the policy's density, as :meth:`sample` uses them.

        :param features: Of the states, see :meth:`features`
        :param n_components: Number of components per state
        :return: Centres and log standard deviations, shapes (batch_size, n_components, action_dim)
        """
        if self.smoothing != "local":
            return self.particles(features, self.noise(len(features), n_components))
        # Bandwidths depend on the neighbours: a fresh handful for each component, of which the first is used
        features = features.repeat_interleave(n_components, dim=0)
        mean, log_std = self.particles(features, self.noise(len(features), self.n_neighbours))
        shape = (-1, n_components, self.action_dim)
        return mean[:, 0].reshape(shape), log_std[:, 0].reshape(shape)

    def sample(self, obs: PyTorchObs, n_actions: int = 1) -> th.Tensor:
        """
        Independent draws from the policy.

        :param obs: Observations
        :param n_actions: Number of actions per observation
        :return: Pre-tanh actions, shape (batch_size, n_actions, action_dim)
        """
        features = self.features(obs)
        mean, log_std = self.components(features, n_actions)
        if self.smoothing == "none":
            return mean
        return mean + th.exp(log_std) * th.randn_like(mean)

    def mode(self, obs: PyTorchObs) -> th.Tensor:
        """
        Deterministic action: the particle of no noise, moved by one step of mean-shift over a fixed bank of particles.
        Close to the mean where there is one mode, and to one of the modes where there are several. Among the candidates
        of ``examples/benchmark/deterministic.py`` it was nowhere far from the best.

        :param obs: Observations
        :return: Pre-tanh actions, shape (batch_size, action_dim)
        """
        features = self.features(obs)
        mean, log_std = self.particles(features, self.xi_bank.expand(features.shape[0], -1, -1))
        return mixture_mode(mean[:, 0], mean, log_std)

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        u = self.mode(obs) if deterministic else self.sample(obs).squeeze(1)
        return th.tanh(u)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self(observation, deterministic)


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
                self.q_networks[i] = _normalised(net)
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
        return th.stack([particle_forward(net, features, actions).squeeze(2) for net in self.q_networks])  # type: ignore[arg-type]

    def joint_q_values(
        self, obs: PyTorchObs, actions: th.Tensor, next_obs: PyTorchObs, next_actions: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor]:
        """
        Q of the transitions and of particles in their next states in one pass, so that batch normalisation sees both: the
        actions of the replay buffer are distributed otherwise than those of the policy. See :func:`renormalised_forward`.

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
        results = [renormalised_forward(net, pairs, next_pairs) for net in self.q_networks]  # type: ignore[arg-type]
        q_values, next_q_values = (th.stack(values) for values in zip(*results, strict=True))
        return q_values, next_q_values.unflatten(1, (-1, n_particles)).squeeze(3)

    def forward(self, obs: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, ...]:
        q_values = self.q_values(self.features(obs), actions.unsqueeze(1))
        return tuple(q_values)


class SoftQPolicy(BasePolicy):
    """
    Policy class (sampling actor and particle critics) for SoftQ. ``actor`` is the one that is trained, and collects the data;
    ``averaged_actor``, an average of its weights over the last updates, answers ``predict`` and gives the particles of the
    soft value.

    :param observation_space: Observation space
    :param action_space: Action space
    :param lr_schedule: Learning rate schedule (could be constant)
    :param net_arch: Hidden layers of the critics and, before ``head_arch``, the actor: a list for both, or
        dict(pi=[...], qf=[...]); dict(pi=[256], qf=[256, 256]) by default
    :param activation_fn: Activation function
    :param smoothing: Where the smoothing of the actor's particles comes from, see :class:`SamplingActor`
    :param log_std_init: Initial log standard deviation of the learned smoothing
    :param head_arch: Hidden layers of the actor that the noise passes through, see :class:`SamplingActor`
    :param features_extractor_class: Features extractor to use.
    :param features_extractor_kwargs: Keyword arguments to pass to the features extractor.
    :param normalize_images: Whether to normalize images or not, dividing by 255.0 (True by default)
    :param optimizer_class: The optimizer to use, ``th.optim.Adam`` by default
    :param optimizer_kwargs: Additional keyword arguments, excluding the learning rate, to pass to the optimizer.
        Adam and AdamW use ``fused=True`` and, for critics with ``batch_norm``, ``betas=(0.5, 0.999)``, unless told otherwise.
    :param n_critics: Number of critic networks to create.
    :param share_features_extractor: Whether to share or not the features extractor between the actor and the critic
        (this saves computation time)
    :param batch_norm: Whether the critics normalise over the batch, see :class:`ParticleCritic`. Without it they need
        target networks (``tau``) and a lower learning rate.
    """

    actor: SamplingActor
    averaged_actor: SamplingActor
    critic: ParticleCritic
    critic_target: ParticleCritic
    _averaged_output: th.Tensor

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: type[nn.Module] = nn.ReLU,
        smoothing: Smoothing = "learned",
        log_std_init: float = -1.2,
        head_arch: Sequence[int] = HEAD_ARCH,
        features_extractor_class: type[BaseFeaturesExtractor] = FlattenExtractor,
        features_extractor_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        optimizer_class: type[th.optim.Optimizer] = th.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        n_critics: int = 2,
        share_features_extractor: bool = False,
        batch_norm: bool = True,
    ):
        super().__init__(
            observation_space,
            action_space,
            features_extractor_class,
            features_extractor_kwargs,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
            squash_output=True,
            normalize_images=normalize_images,
        )
        if smoothing not in SMOOTHINGS:
            raise ValueError(f"smoothing={smoothing!r} is not known, it must be one of {', '.join(SMOOTHINGS)}")
        check_integer("n_critics", n_critics, 1)
        check_number("log_std_init", log_std_init)
        check_flag("batch_norm", batch_norm)
        check_type("optimizer_kwargs", optimizer_kwargs, (dict,), "a dict")
        check_type("features_extractor_kwargs", features_extractor_kwargs, (dict,), "a dict")
        self.net_arch = dict(pi=[256], qf=[256, 256]) if net_arch is None else net_arch
        check_net_arch("net_arch", self.net_arch, keys={"pi", "qf"})
        check_net_arch("head_arch", head_arch)
        self.activation_fn = activation_fn
        self.smoothing = smoothing
        self.log_std_init = log_std_init
        self.head_arch = list(head_arch)
        self.n_critics = n_critics
        self.share_features_extractor = share_features_extractor
        self.batch_norm = batch_norm

        self.actor = self.make_actor()
        # Like the target, it never shares its features extractor. It takes no random numbers from those that come after it
        with th.random.fork_rng(devices=[]):
            self.averaged_actor = self.make_actor()
        self.averaged_actor.load_state_dict(self.actor.state_dict())
        self.averaged_actor.freeze()
        self.n_averaged = 0.0
        self.critic = self.make_critic(self.actor.features_extractor if share_features_extractor else None)
        # The target never shares its features extractor
        self.critic_target = self.make_critic()
        self.critic_target.load_state_dict(self.critic.state_dict())
        self.critic_target.freeze()

        self.actor.optimizer = self._make_optimizer(list(self.actor.parameters()), lr_schedule)
        self._averaged_version = self._actor_version()
        # not saved; a buffer, so that it moves with the policy
        self.register_buffer("_averaged_output", self._output_layer(), persistent=False)
        # A shared features extractor learns from the actor loss only, as in SAC
        actor_parameters = {id(param) for param in self.actor.parameters()}
        critic_parameters = [param for param in self.critic.parameters() if id(param) not in actor_parameters]
        adam_kwargs = dict(betas=CRITIC_BETAS) if batch_norm else {}
        self.critic.optimizer = self._make_optimizer(critic_parameters, lr_schedule, **adam_kwargs)

    def _make_optimizer(self, parameters: list[nn.Parameter], lr_schedule: Schedule, **adam_kwargs: Any) -> th.optim.Optimizer:
        kwargs = self.optimizer_kwargs
        if self.optimizer_class in (th.optim.Adam, th.optim.AdamW):
            if not {"fused", "foreach", "differentiable"} & kwargs.keys():
                adam_kwargs["fused"] = True
            kwargs = adam_kwargs | kwargs
        return self.optimizer_class(parameters, lr=lr_schedule(1), **kwargs)  # type: ignore[call-arg]

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        data.update(
            dict(
                net_arch=self.net_arch,
                activation_fn=self.activation_fn,
                smoothing=self.smoothing,
                log_std_init=self.log_std_init,
                head_arch=self.head_arch,
                n_critics=self.n_critics,
                lr_schedule=self._dummy_schedule,  # dummy lr schedule, not needed for loading policy alone
                optimizer_class=self.optimizer_class,
                optimizer_kwargs=self.optimizer_kwargs,
                features_extractor_class=self.features_extractor_class,
                features_extractor_kwargs=self.features_extractor_kwargs,
                share_features_extractor=self.share_features_extractor,
                batch_norm=self.batch_norm,
            )
        )
        return data

    def _net_kwargs(self, arch: list[int], features_extractor: BaseFeaturesExtractor | None) -> dict[str, Any]:
        kwargs = dict(
            observation_space=self.observation_space,
            action_space=self.action_space,
            net_arch=arch,
            activation_fn=self.activation_fn,
            normalize_images=self.normalize_images,
        )
        return self._update_features_extractor(kwargs, features_extractor)

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> SamplingActor:
        arch, _ = get_actor_critic_arch(self.net_arch)
        net_kwargs = self._net_kwargs(arch, features_extractor)
        return SamplingActor(
            **net_kwargs, smoothing=self.smoothing, log_std_init=self.log_std_init, head_arch=self.head_arch
        ).to(self.device)

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> ParticleCritic:
        _, arch = get_actor_critic_arch(self.net_arch)
        net_kwargs = self._net_kwargs(arch, features_extractor)
        return ParticleCritic(
            **net_kwargs,
            n_critics=self.n_critics,
            share_features_extractor=self.share_features_extractor,
            batch_norm=self.batch_norm,
        ).to(self.device)

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        """
        Actions in the normalised box. With gradients those of the actor, so that it can be trained by any loss; without, those
        that :meth:`predict` answers.

        :param obs: Observations
        :param deterministic: Whether to return the deterministic action
        :return: Shape (batch_size, action_dim)
        """
        if th.is_grad_enabled():
            return self.actor(obs, deterministic)
        self.sync_averaged_actor()
        return self._predict(obs, deterministic)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self.averaged_actor(observation, deterministic)

    def set_training_mode(self, mode: bool) -> None:
        """
        Put the policy in either training or evaluation mode, in which all that trains or asks it finds it. The averaged actor
        and the target networks stay in evaluation mode.

        :param mode: if true, set to training mode, else set to evaluation mode
        """
        self.sync_averaged_actor()
        super().set_training_mode(mode)

    # ------------------------------------------------------------------ the average of the actor's weights

    def update_averaged_actor(self, tau: float) -> None:
        """
        Move the average towards the actor, after an update of it: averaged <- averaged + step (actor - averaged). The step is
        ``tau``, or 9 / (n + 9) at the n-th update while that is larger, about an average over the last ninth of the updates.

        :param tau: In (0, 1]
        """
        self.n_averaged += 1.0
        polyak_update(self.actor, self.averaged_actor, max(tau, AVERAGING_PARTS / (self.n_averaged + AVERAGING_PARTS)))
        self._follow()

    def sync_averaged_actor(self, force: bool = False) -> None:
        """
        Make the average a copy of the actor, if somebody else than training has written into the actor since it was last
        averaged. All that asks, trains or saves the policy calls it, so that who trains the actor sees what it has learned:

            optimizer = th.optim.Adam(model.actor.parameters(), lr=1e-3)
            for obs, actions in demonstrations:  # tensors; actions in the normalised box (-1, 1)^d
                loss = (model.policy(obs, deterministic=True) - actions).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            model.predict(...)  # imitates; model.learn(...) goes on from there

        Noticed is all that changes the output layer, and in other layers what autograd sees, as the steps of most optimizers
        and ``load_state_dict``. From a copy the average moves on with the steps that it takes late in training.

        :param force: Copy in any case: for what fused optimizers or ``.data`` have written into other layers alone
        """
        written = self._actor_version() != self._averaged_version or not th.equal(self._output_layer(), self._averaged_output)
        if force or written:
            polyak_update(self.actor, self.averaged_actor, tau=1.0)
            self.n_averaged = MATURE
            self._follow()

    def _follow(self) -> None:
        """The average is that of the actor as it stands."""
        self._averaged_version = self._actor_version()
        self._averaged_output = self._output_layer()

    def _actor_version(self) -> int:
        """Changes when autograd sees that the actor's weights are written to, which is not so with fused optimizers."""
        return sum(parameter._version for parameter in self.actor.optimizer.param_groups[0]["params"])

    def _output_layer(self) -> th.Tensor:
        """What any training of the actor changes."""
        layer = self.actor.head[-1]
        return th.cat([layer.weight.detach().flatten(), layer.bias.detach()])  # type: ignore[operator]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.sync_averaged_actor()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # a float, as all that is saved: it can be perturbed or averaged like a weight
        destination[prefix + "n_averaged"] = th.tensor([self.n_averaged], device=self.device)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        n_averaged = state_dict.pop(prefix + "n_averaged", None)
        if n_averaged is not None:
            self.n_averaged = float(n_averaged)
        elif any(key.startswith(prefix + "averaged_actor.") for key in state_dict):
            # agents that were saved without it
            self.n_averaged = MATURE
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        result = super().load_state_dict(state_dict, strict, assign)
        if any(key.startswith("averaged_actor.") for key in state_dict):
            # it came with the actor
            self._follow()
        return result

    def __getstate__(self) -> dict[str, Any]:
        self.sync_averaged_actor()
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # the parameters of a copy count anew
        self._averaged_version = self._actor_version()
        # agents that were pickled before these were there
        self.__dict__.setdefault("n_averaged", MATURE)
        self.register_buffer("_averaged_output", self._output_layer(), persistent=False)
        self.averaged_actor.freeze()
        self.critic_target.freeze()


MlpPolicy = SoftQPolicy


class CnnPolicy(SoftQPolicy):
    """
    SoftQ's policy for images: :class:`SoftQPolicy` with ``NatureCNN`` as its default features extractor.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        features_extractor_class: type[BaseFeaturesExtractor] = NatureCNN,
        **kwargs: Any,
    ):
        kwargs["features_extractor_class"] = features_extractor_class
        super().__init__(observation_space, action_space, lr_schedule, **kwargs)


class MultiInputPolicy(SoftQPolicy):
    """
    SoftQ's policy for Dict observations: :class:`SoftQPolicy` with ``CombinedExtractor`` as its default features extractor.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        features_extractor_class: type[BaseFeaturesExtractor] = CombinedExtractor,
        **kwargs: Any,
    ):
        kwargs["features_extractor_class"] = features_extractor_class
        super().__init__(observation_space, action_space, lr_schedule, **kwargs)
