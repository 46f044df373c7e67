"""Policies for Discrete actions: DQN's networks, acting by softmax(Q / alpha)."""

from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import create_mlp
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.common.utils import get_device
from stable_baselines3.dqn.policies import CnnPolicy as DQNCnnPolicy
from stable_baselines3.dqn.policies import DQNPolicy, QNetwork
from stable_baselines3.dqn.policies import MultiInputPolicy as DQNMultiInputPolicy
from torch import nn
from typing_extensions import Self

from sb3_softq.checks import check_net_arch, check_network_classes
from sb3_softq.critic import ScaledHistogram
from sb3_softq.policies import N_BINS, check_bins, with_adam_kwargs


class DiscreteCritic(ScaledHistogram, QNetwork):
    """
    DQN's network with a histogram for each action, see :class:`ScaledHistogram`. See SB3's ``QNetwork`` for the other
    parameters.

    :param n_bins: Number of bins of the histograms, 1 for a number
    """

    def __init__(self, *args: Any, n_bins: int = 1, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._set_bins(n_bins)
        if n_bins > 1:
            n_outputs = int(self.action_space.n) * n_bins
            self.q_net = nn.Sequential(*create_mlp(self.features_dim, n_outputs, self.net_arch, self.activation_fn))

    def outputs(self, obs: PyTorchObs) -> th.Tensor:
        """
        What the network predicts: see :meth:`q_of` and :meth:`loss`.

        :param obs: Observations
        :return: Shape (batch_size, n_actions, n_bins)
        """
        return self.q_net(self.extract_features(obs, self.features_extractor)).unflatten(1, (-1, self.n_bins))

    def forward(self, obs: PyTorchObs) -> th.Tensor:
        """
        :param obs: Observations
        :return: Q in the environment's units, shape (batch_size, n_actions)
        """
        return self.q_of(self.outputs(obs))

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return super()._get_constructor_parameters() | dict(n_bins=self.n_bins)

    @classmethod
    def adopt(cls, network: QNetwork) -> None:
        """
        Make the network of an agent that was pickled by release 0.1.0 one of this class.

        :param network: DQN's, which predicts a number
        """
        # its parameters are the optimizer's
        network.__class__ = cls
        network.register_buffer("return_scale", th.ones(1, device=network.device))


class DiscreteSoftQPolicy(DQNPolicy):
    """
    DQN's networks, acting by pi(a|s) = softmax(Q(s, .) / alpha). See :class:`DQNPolicy` for the other parameters.

    :param net_arch: Hidden layers; [256, 256] by default, none after ``NatureCNN``
    :param n_bins: Number of bins of the critic's histograms, odd (0 is a center), or 1 for the squared error of a number
    """

    q_net: DiscreteCritic
    q_net_target: DiscreteCritic
    log_ent_coef: th.Tensor
    # No actor that could have imitated before its critic learned
    is_taught = False

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Discrete,
        lr_schedule: Schedule,
        net_arch: list[int] | None = None,
        n_bins: int = N_BINS,
        **kwargs: Any,
    ):
        if net_arch is None and not isinstance(self, CnnPolicy):
            net_arch = [256, 256]
        self.n_bins = check_bins(n_bins)
        super().__init__(observation_space, action_space, lr_schedule, net_arch, **kwargs)

    def _build(self, lr_schedule: Schedule) -> None:
        check_net_arch("net_arch", self.net_arch)
        check_network_classes(self.activation_fn, self.optimizer_class, self.features_extractor_class)
        self.optimizer_kwargs = with_adam_kwargs(self.optimizer_class, self.optimizer_kwargs)
        super()._build(lr_schedule)
        # Log of the temperature in units of the critic's scale, here alone: the policy acts by it, with or without the
        # algorithm, which learns or sets it
        self.register_buffer("log_ent_coef", th.zeros(1))

    def make_q_net(self) -> DiscreteCritic:
        net_args = self._update_features_extractor(self.net_args, features_extractor=None)
        return DiscreteCritic(**net_args, n_bins=self.n_bins).to(self.device)

    @property
    def ent_coef(self) -> th.Tensor:
        """Temperature in the environment's units, shape (1,)."""
        return th.exp(self.log_ent_coef.detach()) * self.q_net.return_scale

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return super()._get_constructor_parameters() | dict(n_bins=self.n_bins)

    @classmethod
    def load(cls, path: str, device: th.device | str = "auto") -> Self:
        saved = th.load(path, map_location=get_device(device), weights_only=False)
        # that of release 0.1.0 had DQN's critic
        policy = cls(**{"n_bins": 1} | saved["data"])
        policy.load_state_dict(saved["state_dict"])
        return policy.to(get_device(device))

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        # whoever asks: its dropout and running statistics are no business of training
        self.q_net_target.eval()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # agents saved before had the temperature itself
        if prefix + "ent_coef" in state_dict:
            state_dict[prefix + "log_ent_coef"] = th.log(state_dict.pop(prefix + "ent_coef"))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # likewise those that were pickled, with DQN's critic
        if "ent_coef" in self._buffers:
            self.register_buffer("log_ent_coef", th.log(self._buffers.pop("ent_coef")))  # type: ignore[arg-type]
        for network in (self.q_net, self.q_net_target):
            if type(network) is QNetwork:
                DiscreteCritic.adopt(network)
                self.n_bins = 1

    def logits(self, obs: PyTorchObs) -> th.Tensor:
        """
        :param obs: Observations
        :return: Q(s, a) / alpha, shape (batch_size, n_actions)
        """
        return self.q_net(obs) / self.ent_coef

    def _predict(self, obs: PyTorchObs, deterministic: bool = True) -> th.Tensor:
        logits = self.logits(obs)
        if not deterministic:
            # the Gumbel-max trick: a sample of softmax(logits)
            logits = logits - th.empty_like(logits).exponential_().log()
        return logits.argmax(dim=1)


MlpPolicy = DiscreteSoftQPolicy


class CnnPolicy(DiscreteSoftQPolicy, DQNCnnPolicy):
    """:class:`DiscreteSoftQPolicy` with ``NatureCNN`` as its default features extractor."""


class MultiInputPolicy(DiscreteSoftQPolicy, DQNMultiInputPolicy):
    """:class:`DiscreteSoftQPolicy` with ``CombinedExtractor`` as its default features extractor."""
