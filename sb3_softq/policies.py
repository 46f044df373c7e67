"""Policies of SoftQ: they hold the sampling actor, its exponential moving average and the critics."""

from collections.abc import Sequence
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import (
    BaseFeaturesExtractor,
    CombinedExtractor,
    FlattenExtractor,
    NatureCNN,
    get_actor_critic_arch,
)
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.common.utils import get_device
from torch import nn
from typing_extensions import Self

from sb3_softq.actor import HEAD_ARCH, N_EXPERTS, SMOOTHINGS, SamplingActor, Smoothing
from sb3_softq.averaged_policy import AveragedPolicy
from sb3_softq.checks import (
    check_choice,
    check_flag,
    check_integer,
    check_net_arch,
    check_network_classes,
    check_number,
    check_type,
)
from sb3_softq.critic import ParticleCritic

__all__ = ["CnnPolicy", "MlpPolicy", "MultiInputPolicy", "ParticleCritic", "SamplingActor", "SoftQPolicy"]

# Of Adam, as CrossQ has them: without target networks the momentum is that of an older target. Its actor has them too; ours
# then covers fewer modes.
CRITIC_BETAS = (0.5, 0.999)
# Of the critics' histograms, as C51 and SimbaV2 have it
N_BINS = 101
# Of the policy, that it keeps, beside those of Stable-Baselines3's
_ARGUMENTS = (
    *("net_arch", "activation_fn", "smoothing", "log_std_init", "head_arch", "n_experts", "n_critics", "optimizer_class"),
    *("optimizer_kwargs", "features_extractor_class", "features_extractor_kwargs", "share_features_extractor", "batch_norm"),
    "n_bins",
)


def check_bins(n_bins: int) -> int:
    """
    :param n_bins: Number of bins of the critics' histograms
    :return: The same as an int
    :raises ValueError: if it is not an odd integer, so that 0 is a center
    """
    number = check_integer("n_bins", n_bins, 1)
    if number % 2 == 0:
        raise ValueError(f"n_bins={n_bins!r} is not allowed: it must be odd")
    return number


def with_adam_kwargs(optimizer_class: type, optimizer_kwargs: dict[str, Any], **adam_kwargs: Any) -> dict[str, Any]:
    """
    :param optimizer_class: Class of an optimizer
    :param optimizer_kwargs: Its keyword arguments, as a user gave them
    :param adam_kwargs: Further ones for Adam and AdamW, unless told else
    :return: Both, and for these ``fused=True``, unless told else
    """
    if optimizer_class not in (th.optim.Adam, th.optim.AdamW):
        return optimizer_kwargs
    if not {"fused", "foreach", "differentiable"} & optimizer_kwargs.keys():
        adam_kwargs["fused"] = True
    return adam_kwargs | optimizer_kwargs


class SoftQPolicy(AveragedPolicy):
    """
    Policy class (sampling actor and particle critics) for SoftQ. ``actor`` is trained and collects the data; the EMA actor,
    ``ema_actor``, is the exponential moving average of its weights, answers ``predict`` and gives the particles of the soft
    value.

    :param observation_space: Observation space
    :param action_space: Action space
    :param lr_schedule: Learning rate schedule (could be constant)
    :param net_arch: Hidden layers of the critics and, before ``head_arch``, the actor: a list for both, or
        dict(pi=[...], qf=[...]); dict(pi=[256], qf=[256, 256]) by default
    :param activation_fn: Activation function
    :param smoothing: Where the smoothing of the actor's particles comes from, see :class:`SamplingActor`
    :param log_std_init: Initial log standard deviation of the learned smoothing
    :param head_arch: Hidden layers of the actor that the noise passes through, see :class:`SamplingActor`
    :param n_experts: Number of experts of the actor, at least 1, see :class:`SamplingActor`
    :param features_extractor_class: Features extractor to use.
    :param features_extractor_kwargs: Keyword arguments to pass to the features extractor.
    :param normalize_images: Whether to normalize images or not, dividing by 255.0 (True by default)
    :param optimizer_class: The optimizer to use, ``th.optim.Adam`` by default
    :param optimizer_kwargs: Additional keyword arguments, excluding the learning rate, to pass to the optimizer.
        Adam and AdamW use ``fused=True`` and, for critics with ``batch_norm``, ``betas=(0.5, 0.999)``, unless told else.
    :param n_critics: Number of critic networks to create.
    :param share_features_extractor: Whether actor and critics share the features extractor, which saves time
    :param batch_norm: Whether the critics normalise over the batch; else they need ``tau`` and a lower learning rate
    :param n_bins: Number of bins of the critics' histograms, odd (0 is a center), or 1 for the squared error of a number
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: type[nn.Module] = nn.ReLU,
        smoothing: Smoothing = "learned",
        log_std_init: float = -1.2,
        head_arch: Sequence[int] = HEAD_ARCH,
        n_experts: int = N_EXPERTS,
        features_extractor_class: type[BaseFeaturesExtractor] = FlattenExtractor,
        features_extractor_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        optimizer_class: type[th.optim.Optimizer] = th.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        n_critics: int = 2,
        share_features_extractor: bool = False,
        batch_norm: bool = True,
        n_bins: int = N_BINS,
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
        check_choice("smoothing", smoothing, SMOOTHINGS)
        self.n_critics = check_integer("n_critics", n_critics, 1)
        self.n_experts = check_integer("n_experts", n_experts, 1)
        self.n_bins = check_bins(n_bins)
        check_number("log_std_init", log_std_init)
        check_type("optimizer_kwargs", optimizer_kwargs, (dict,), "a dict")
        check_type("features_extractor_kwargs", features_extractor_kwargs, (dict,), "a dict")
        self.net_arch = dict(pi=[256], qf=[256, 256]) if net_arch is None else net_arch
        check_net_arch("net_arch", self.net_arch, keys={"pi", "qf"})
        check_net_arch("head_arch", head_arch)
        self.activation_fn = activation_fn
        self.smoothing = smoothing
        self.log_std_init = log_std_init
        self.head_arch = list(head_arch)
        self.share_features_extractor = share_features_extractor
        self.batch_norm = batch_norm
        for name in ("batch_norm", "share_features_extractor", "normalize_images"):
            check_flag(name, getattr(self, name))
        check_network_classes(activation_fn, optimizer_class, features_extractor_class)

        self.actor = self.make_actor()
        # Like the target, it never shares its features extractor. It takes no random numbers from those that come after it
        with th.random.fork_rng(devices=[]):
            self.ema_actor = self.make_actor()
        self.ema_actor.load_state_dict(self.actor.state_dict())
        self.ema_actor.freeze()
        self.n_averaged, self.is_taught = 0.0, False
        self.critic = self.make_critic(self.actor.features_extractor if share_features_extractor else None)
        self.critic_target = None

        self.actor.optimizer = self._make_optimizer(list(self.actor.parameters()), lr_schedule)
        self._ema_version = self._actor_version()
        # not saved; a buffer, so that it moves with the policy
        self.register_buffer("_ema_bias", self._output_bias().clone(), persistent=False)
        # A shared features extractor learns from the actor loss only, as in SAC
        actor_parameters = {id(param) for param in self.actor.parameters()}
        critic_parameters = [param for param in self.critic.parameters() if id(param) not in actor_parameters]
        adam_kwargs = dict(betas=CRITIC_BETAS) if batch_norm else {}
        self.critic.optimizer = self._make_optimizer(critic_parameters, lr_schedule, **adam_kwargs)

    def _make_optimizer(self, parameters: list[nn.Parameter], lr_schedule: Schedule, **adam_kwargs: Any) -> th.optim.Optimizer:
        kwargs = with_adam_kwargs(self.optimizer_class, self.optimizer_kwargs, **adam_kwargs)
        return self.optimizer_class(parameters, lr=lr_schedule(1), **kwargs)  # type: ignore[call-arg]

    def _get_constructor_parameters(self) -> dict[str, Any]:
        # dummy lr schedule, not needed for loading policy alone
        own = {name: getattr(self, name) for name in _ARGUMENTS} | dict(lr_schedule=self._dummy_schedule)
        return super()._get_constructor_parameters() | own

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
        own = ("smoothing", "log_std_init", "head_arch", "n_experts")
        return SamplingActor(**net_kwargs, **{name: getattr(self, name) for name in own}).to(self.device)

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> ParticleCritic:
        _, arch = get_actor_critic_arch(self.net_arch)
        net_kwargs = self._net_kwargs(arch, features_extractor)
        own = ("n_critics", "share_features_extractor", "batch_norm", "n_bins")
        return ParticleCritic(**net_kwargs, **{name: getattr(self, name) for name in own}).to(self.device)

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        """
        Actions in the normalised box: with gradients those of the actor, for any loss; without, as where a trace of the
        policy is made, those of :meth:`predict`.

        :param obs: Observations
        :param deterministic: Whether to return the deterministic action
        :return: Shape (batch_size, action_dim)
        """
        if th.is_grad_enabled() and not th.jit.is_tracing():
            return self.actor(obs, deterministic)
        self.sync_ema_actor()
        return self._predict(obs, deterministic)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        """A sample; or argmax Q, the mode of exp(Q / alpha) / Z, over fixed particles, as for Discrete actions."""
        if not (deterministic and self.is_taught):
            return self.ema_actor(observation, deterministic)
        actions = th.tanh(self.ema_actor.fixed_particles(observation))
        q_values = self.critic.q_values(self.critic.features(observation), actions).amin(dim=0)
        best = q_values.argmax(dim=1)[:, None, None].expand(-1, 1, actions.shape[2])
        return actions.gather(1, best).squeeze(1)

    def set_training_mode(self, mode: bool) -> None:
        """
        Put the policy in training or evaluation mode. The EMA actor and the target networks stay in evaluation mode.

        :param mode: if true, set to training mode, else set to evaluation mode
        """
        self.sync_ema_actor()
        if self.training is not mode:
            self.training = mode
        for network in (self.actor, self.critic):
            # a walk through all modules takes longer than an action does
            if network.training is not mode:
                network.train(mode)

    def build_target(self) -> None:
        """Make ``critic_target``, target networks that are a copy of the critics and never share a features extractor."""
        target = self.make_critic()
        target.load_state_dict(self.critic.state_dict())
        target.freeze()
        self.critic_target = target

    @classmethod
    def load(cls, path: str, device: th.device | str = "auto") -> Self:
        saved = th.load(path, map_location=get_device(device), weights_only=False)
        # the actor of release 0.1.0 was a single sampler, its critics predicted a number
        policy = cls(**{"n_experts": 1, "n_bins": 1} | saved["data"])
        if "n_experts" in saved["data"] and any(key.startswith("critic_target.") for key in saved["state_dict"]):
            policy.build_target()
        policy.load_state_dict(saved["state_dict"])
        return policy.to(get_device(device))


MlpPolicy = SoftQPolicy


class CnnPolicy(SoftQPolicy):
    """:class:`SoftQPolicy` for images, with ``NatureCNN`` as its default features extractor."""

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        lr_schedule: Schedule,
        features_extractor_class: type[BaseFeaturesExtractor] = NatureCNN,
        **kwargs: Any,
    ):
        kwargs["features_extractor_class"] = features_extractor_class
        super().__init__(observation_space, action_space, lr_schedule, **kwargs)


class MultiInputPolicy(SoftQPolicy):
    """:class:`SoftQPolicy` for Dict observations, with ``CombinedExtractor`` as its default features extractor."""

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        lr_schedule: Schedule,
        features_extractor_class: type[BaseFeaturesExtractor] = CombinedExtractor,
        **kwargs: Any,
    ):
        kwargs["features_extractor_class"] = features_extractor_class
        super().__init__(observation_space, action_space, lr_schedule, **kwargs)
