"""The sampling actor: a network from observation and noise to actions, whose samples have a density."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, create_mlp
from stable_baselines3.common.type_aliases import PyTorchObs
from stable_baselines3.common.utils import get_device
from torch import nn
from torch.nn import functional as F
from typing_extensions import Self

from sb3_softq.networks import Freezable, activate, affine_layers, bounded_above, particle_forward
from sb3_softq.observations import Observer
from sb3_softq.soft_value import LOCAL_STD_MIN, local_log_std, mixture_log_prob, mixture_mode, tanh_log_det

Smoothing = Literal["learned", "local", "none"]
SMOOTHINGS: tuple[Smoothing, ...] = ("learned", "local", "none")

# Bounds of the learned smoothing, in units of the pre-tanh action
LOG_STD_MIN = -5.0
LOG_STD_MAX = 1.0
HEAD_ARCH = (64, 64)
N_EXPERTS = 16
# Standard deviation of the noise of one of several experts, whose centres have the rest of a variance of 1
EXPERT_STD = 0.5
# Probability that the experts share whatever the gate says: as actions, and in the density that teaches them. One that weighed
# nothing would see in the density at its particles not itself but the tails of heavy experts far away, whose score is huge: it
# would be thrown out of the modes, and the others too, until each mode had a single expert. Actions of it are seldom good
GATE_FLOOR = 1e-4
TEACHING_FLOOR = 1e-2
# Fixed particles of the deterministic action, at least
N_FIXED_PARTICLES = 32
# Particles that smoothing="local" draws to smooth one action
N_NEIGHBOURS = 8


class SamplingActor(Freezable, Observer, BasePolicy):
    """
    Mixture of experts (Jacobs et al. 1991, https://doi.org/10.1162/neco.1991.3.1.79) whose experts are samplers: an expert z
    with the probability that the gate gives it in the state, then u = c + sigma * eps with c = xi + shift(s, xi, z),
    sigma = sigma(s, xi, z) and noise xi ~ N(centre_z, I_d / 4), eps ~ N(0, I_d); a = tanh(u). A single expert has noise
    xi ~ N(0, I_d), and so have all of them together.

    The expert and xi choose where to act (several modes if need be), eps smooths each choice. The gate sets how much each
    mode weighs, which no local move of an action can. Because the last step is Gaussian, K draws of (z, xi) give a density
    that can be evaluated, see :func:`sb3_softq.soft_value.mixture_log_prob`.
    Its initialisation is wide (``shift`` is small at first, all experts weigh the same), so that the modes to be covered are
    there to be found. "Noise" below is xi and, where there are several experts, the one-hot vector of z after it.

    :param observation_space: Observation space
    :param action_space: Action space
    :param net_arch: Network architecture
    :param features_extractor: Network to extract features
    :param features_dim: Number of features
    :param activation_fn: Activation function
    :param smoothing: Where sigma comes from: ``"learned"`` by the network, ``"local"`` from the distance to the nearest
        other particle, or ``"none"``: actions are the raw particles c (then ``"local"`` is used where a density is asked for)
    :param log_std_init: Initial log standard deviation of the learned smoothing
    :param head_arch: Hidden layers that the noise passes through, after those of ``net_arch``, which see the state alone: many
        particles of a state cost little more than one
    :param n_experts: Number of experts; 1 is a single sampler, without a gate
    :param normalize_images: Whether to normalize images or not, dividing by 255.0 (True by default)
    """

    action_space: spaces.Box
    xi_bank: th.Tensor
    expert_noise: th.Tensor

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        net_arch: list[int],
        features_extractor: BaseFeaturesExtractor,
        features_dim: int,
        activation_fn: type[nn.Module] = nn.ReLU,
        smoothing: Smoothing = "learned",
        log_std_init: float = -1.2,
        head_arch: Sequence[int] = HEAD_ARCH,
        n_experts: int = N_EXPERTS,
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
        self.n_experts = n_experts

        self.action_dim = get_action_dim(action_space)
        n_outputs = 2 if smoothing == "learned" else 1
        self.trunk = nn.Sequential(*create_mlp(features_dim, -1, net_arch, activation_fn))
        trunk_dim = net_arch[-1] if net_arch else features_dim
        noise_dim = self.action_dim + (n_experts if n_experts > 1 else 0)
        self.head = nn.Sequential(
            *create_mlp(trunk_dim + noise_dim, n_outputs * self.action_dim, self.head_arch, activation_fn)
        )
        if self.head_arch:
            # The noise as strong as it would be alone, and its kinks spread over its range
            first, bound = self.head[0], 1.0 / math.sqrt(self.action_dim)
            assert isinstance(first, nn.Linear)
            with th.no_grad():
                first.weight[:, -noise_dim:].uniform_(-bound, bound)
                first.bias.uniform_(-bound, bound)
        # Constants, not weights. Noise of each expert, without what is random in it
        expert_noise = th.zeros(n_experts, noise_dim)
        self.gate = None
        if n_experts > 1:
            self.gate = nn.Linear(trunk_dim, n_experts)
            nn.init.zeros_(self.gate.weight)
            nn.init.zeros_(self.gate.bias)
            centres = _normal_quantiles(n_experts, self.action_dim, seed=1)
            # as many points have not the mean and the variance of all
            centres = (centres - centres.mean(dim=0)) / centres.std(dim=0, correction=0)
            expert_noise = th.cat([centres * math.sqrt(1.0 - EXPERT_STD**2), th.eye(n_experts)], dim=1)
        self.register_buffer("expert_noise", expert_noise, persistent=False)
        # The deterministic action is a function of observation and weights alone: of each expert as many particles, the first
        # of them without noise
        n_fixed = n_experts * math.ceil(N_FIXED_PARTICLES / n_experts)
        xi_bank = _normal_quantiles(n_fixed, self.action_dim, seed=0)
        xi_bank[:n_experts] = 0.0
        self.register_buffer("xi_bank", self._noise(th.arange(n_fixed) % n_experts, xi_bank), persistent=False)

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
                n_experts=self.n_experts,
                features_extractor=self.features_extractor,
            )
        )
        return data

    @classmethod
    def load(cls, path: str, device: th.device | str = "auto") -> Self:
        saved = th.load(path, map_location=get_device(device), weights_only=False)
        # release 0.1.0 saved two constants
        data = {name: value for name, value in saved["data"].items() if name not in ("n_bank", "n_neighbours")}
        # and had one expert
        data = {"n_experts": 1} | data
        actor = cls(**data)
        actor.load_state_dict(saved["state_dict"])
        return actor.to(get_device(device))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # actors that release 0.1.0 pickled
        if "n_experts" not in state:
            self.n_experts, self.gate = 1, None

    def features(self, obs: PyTorchObs) -> th.Tensor:
        """
        What is computed once per state, however many particles follow.

        :param obs: Observations
        :return: Shape (batch_size, width of the trunk)
        """
        return self.trunk(self.extract_features(obs, self.features_extractor))

    def particles(self, features: th.Tensor, noise: th.Tensor, n_constant: int = 0) -> tuple[th.Tensor, th.Tensor]:
        """
        Components of the policy's density: one Gaussian over the pre-tanh action per noise vector.

        :param features: Of the states, see :meth:`features`
        :param noise: Shape (batch_size, n_particles, noise_dim), or (1, ...) of the same for all states
        :param n_constant: The first ``n_constant`` particles come without gradient, which saves their backward pass
        :return: Component means and log standard deviations, shapes (batch_size, n_particles, action_dim)
        """
        layers = affine_layers(self.head)
        output = particle_forward(layers, self._activate_head, features, noise[:, n_constant:])
        if n_constant > 0:
            with th.no_grad():
                constant = particle_forward(layers, self._activate_head, features, noise[:, :n_constant])
            output = th.cat([constant, output], dim=1)
        xi = noise[..., : self.action_dim]
        if self.smoothing != "learned":
            mean = xi + output
            return mean, local_log_std(mean.detach())
        shift, log_std = output[..., : self.action_dim], output[..., self.action_dim :]
        # softplus: smooth at the lower bound, so that a narrow component can widen again
        log_std = LOG_STD_MIN + F.softplus(log_std + (self.log_std_init - LOG_STD_MIN))
        return xi + shift, bounded_above(log_std, LOG_STD_MAX)

    def _activate_head(self, depth: int, hidden: th.Tensor) -> th.Tensor:
        return activate(self.head[2 * depth + 1], hidden)

    def gate_probs(self, features: th.Tensor) -> th.Tensor:
        """
        :param features: Of the states, see :meth:`features`
        :return: Probabilities of the experts, shape (batch_size, n_experts)
        """
        if self.gate is None:
            return features.new_ones(len(features), 1)
        return th.softmax(self.gate(features).float(), dim=1) * (1.0 - GATE_FLOOR) + GATE_FLOOR / self.n_experts

    def log_weights(self, features: th.Tensor, experts: th.Tensor) -> th.Tensor:
        """
        :param features: Of the states, see :meth:`features`
        :param experts: Numbers of experts, shape (batch_size, n_particles)
        :return: Their log-probabilities, same shape
        """
        probs = self.gate_probs(features)
        if self.gate is None:
            return th.log(probs).expand_as(experts)
        # not gather, whose gradient has no deterministic implementation on CUDA
        one_hot = self.expert_noise[:, self.action_dim :][experts]
        return th.log((one_hot * probs.unsqueeze(1)).sum(dim=2))

    def spread_experts(self, batch_size: int, n_particles: int) -> th.Tensor:
        """
        Experts in turn, from a random one on: what teaches them. One that weighs little learns as much as the others, and can
        come to weigh more.

        :param batch_size: Number of states
        :param n_particles: Number of particles per state
        :return: Numbers of the experts, shape (batch_size, n_particles)
        """
        if self.gate is None:
            return th.zeros(batch_size, n_particles, dtype=th.long, device=self.device)
        first = th.randint(self.n_experts, (batch_size, 1), device=self.device)
        return (first + th.arange(n_particles, device=self.device)) % self.n_experts

    def draw_experts(self, features: th.Tensor, n_particles: int, stratified: bool = False) -> th.Tensor:
        """
        Experts by the gate's probabilities.

        :param features: Of the states, see :meth:`features`
        :param n_particles: Number of particles per state
        :param stratified: Whether each has its own part of the cumulative distribution, or all are independent
        :return: Numbers of the experts, shape (batch_size, n_particles)
        """
        if self.gate is None:
            return th.zeros(len(features), n_particles, dtype=th.long, device=self.device)
        probs = self.gate_probs(features)
        if not stratified:
            # NaN passes on to the actions, where training stops and says so
            return probs.nan_to_num(1.0).multinomial(n_particles, replacement=True)
        strata = th.arange(n_particles, device=self.device)
        position = (th.rand(len(features), n_particles, device=self.device) + strata) / n_particles
        # a product, for cumsum has no deterministic implementation on CUDA
        cumulative = probs @ th.ones(self.n_experts, self.n_experts - 1, device=self.device).triu()
        return (position.unsqueeze(2) > cumulative.unsqueeze(1)).sum(dim=2)

    def noise(self, experts: th.Tensor) -> th.Tensor:
        """
        :param experts: Numbers of the experts, shape (batch_size, n_particles)
        :return: Noise for them, shape (batch_size, n_particles, noise_dim)
        """
        return self._noise(experts, th.randn(*experts.shape, self.action_dim, device=experts.device))

    def _noise(self, experts: th.Tensor, normal: th.Tensor) -> th.Tensor:
        """Noise of the experts, from standard normal one of shape (..., action_dim)."""
        if self.gate is None:
            return normal
        noise = self.expert_noise[experts]
        noise[..., : self.action_dim].add_(normal, alpha=EXPERT_STD)
        return noise

    def components(self, features: th.Tensor, n_components: int, stratified: bool = False) -> tuple[th.Tensor, th.Tensor]:
        """
        Draws of a component of the policy's density, as :meth:`sample` uses them.

        :param features: Of the states, see :meth:`features`
        :param n_components: Number of components per state
        :param stratified: Whether their experts are stratified, or all independent; see :meth:`draw_experts`
        :return: Component means and log standard deviations, shapes (batch_size, n_components, action_dim)
        """
        if self.smoothing != "local":
            return self.particles(features, self.noise(self.draw_experts(features, n_components, stratified)))
        # Bandwidths depend on the neighbours: a fresh handful for each component, of which the first is used
        features = features.repeat_interleave(n_components, dim=0)
        mean, log_std = self.particles(features, self.noise(self.draw_experts(features, N_NEIGHBOURS)))
        shape = (-1, n_components, self.action_dim)
        return mean[:, 0].reshape(shape), log_std[:, 0].reshape(shape)

    @th.no_grad()
    def propose(self, obs: PyTorchObs, n_particles: int) -> tuple[th.Tensor, th.Tensor]:
        """
        Particles of the soft value: one from each of ``n_particles`` components, with the density of all of them.

        :param obs: Observations
        :param n_particles: Number of particles per observation
        :return: Pre-tanh actions, shape (batch_size, n_particles, action_dim), and their log-density over the normalised box,
            shape (batch_size, n_particles)
        """
        features = self.features(obs)
        mean, log_std = self.particles(features, self.noise(self.draw_experts(features, n_particles)))
        u = mean + th.exp(log_std) * th.randn_like(mean)
        return u, mixture_log_prob(u, mean, log_std) - tanh_log_det(u)

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

    def fixed_particles(self, obs: PyTorchObs) -> th.Tensor:
        """
        Particles of noise that is the same for every observation: the candidates of the deterministic action.

        :param obs: Observations
        :return: Pre-tanh actions, shape (batch_size, n, action_dim)
        """
        return self.particles(self.features(obs), self.xi_bank.unsqueeze(0))[0]

    def mode(self, obs: PyTorchObs) -> th.Tensor:
        """
        A mode of the density, which no critic is asked for: of the experts' particles of no noise the one of most density,
        moved by mean-shift over the fixed particles. Close to the mean where there is one mode, and to one of the modes
        where there are several.

        :param obs: Observations
        :return: Pre-tanh actions, shape (batch_size, action_dim)
        """
        features = self.features(obs)
        mean, log_std = self.particles(features, self.xi_bank.unsqueeze(0))
        log_weights = th.log(self.gate_probs(features)).repeat(1, len(self.xi_bank) // self.n_experts)
        densest = mixture_log_prob(mean[:, : self.n_experts], mean, log_std, log_weights).argmax(dim=1)
        start = mean.gather(1, densest[:, None, None].expand(-1, 1, self.action_dim)).squeeze(1)
        return mixture_mode(start, mean, log_std, log_weights)

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        u = self.mode(obs) if deterministic else self.sample(obs).squeeze(1)
        return th.tanh(u)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self(observation, deterministic)


def _normal_quantiles(n: int, action_dim: int, seed: int) -> th.Tensor:
    """n points of low discrepancy for the standard normal distribution, shape (n, action_dim)."""
    sobol = th.quasirandom.SobolEngine(action_dim, scramble=True, seed=seed).draw(n)
    return th.special.ndtri(sobol.clamp(1e-4, 1 - 1e-4))


def entropy_bounds(action_dim: int, smoothing: Smoothing) -> tuple[float, float]:
    """
    :param action_dim: Dimension d of the action space
    :param smoothing: As in :class:`SamplingActor`
    :return: Entropies in nats over the normalised box, of the narrowest component in the middle of it (rounded up to what a
        message can name) and of uniform actions, d log 2
    """
    log_std = LOG_STD_MIN if smoothing == "learned" else math.log(LOCAL_STD_MIN)
    least = action_dim * (0.5 * math.log(2.0 * math.pi * math.e) + log_std)
    return math.ceil(1e3 * least) / 1e3, action_dim * math.log(2.0)
