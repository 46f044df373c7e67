"""DiscreteSoftQ: soft Q-learning where the soft value is a sum over the actions, and nothing has to be estimated."""

from typing import Any, ClassVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, PyTorchObs, ReplayBufferSamples, Schedule, TensorDict
from stable_baselines3.dqn.policies import CnnPolicy as DQNCnnPolicy
from stable_baselines3.dqn.policies import DQNPolicy, QNetwork
from stable_baselines3.dqn.policies import MultiInputPolicy as DQNMultiInputPolicy
from typing_extensions import Self

from sb3_softq.base import MaximumEntropyAlgorithm
from sb3_softq.checks import check_integer, check_net_arch, check_network_classes
from sb3_softq.spaces import check_discrete_action_space


class DiscreteSoftQPolicy(DQNPolicy):
    """
    DQN's networks, acting by pi(a|s) = softmax(Q(s, .) / alpha). See :class:`DQNPolicy` for the other parameters.

    :param net_arch: Hidden layers; [256, 256] by default, none after ``NatureCNN``
    """

    log_ent_coef: th.Tensor

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Discrete,
        lr_schedule: Schedule,
        net_arch: list[int] | None = None,
        **kwargs: Any,
    ):
        if net_arch is None and not isinstance(self, CnnPolicy):
            net_arch = [256, 256]
        super().__init__(observation_space, action_space, lr_schedule, net_arch, **kwargs)

    def _build(self, lr_schedule: Schedule) -> None:
        check_net_arch("net_arch", self.net_arch)
        check_network_classes(self.activation_fn, self.optimizer_class, self.features_extractor_class)
        super()._build(lr_schedule)
        # Log of the temperature, here alone: the policy acts by it, with or without the algorithm, which learns or sets it
        self.register_buffer("log_ent_coef", th.zeros(1))

    @property
    def ent_coef(self) -> th.Tensor:
        """Temperature, shape (1,)."""
        return th.exp(self.log_ent_coef.detach())

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
        if "ent_coef" in self._buffers:  # likewise those that were pickled
            self.register_buffer("log_ent_coef", th.log(self._buffers.pop("ent_coef")))  # type: ignore[arg-type]

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


class DiscreteSoftQ(MaximumEntropyAlgorithm):
    """
    Soft Q-learning for Discrete action spaces, exactly: the critic regresses on r + gamma V(s') with

        V(s) = alpha logsumexp_a(Q(s, a) / alpha),    pi(a|s) = exp((Q(s, a) - V(s)) / alpha)

    (Haarnoja et al. 2017, https://arxiv.org/abs/1702.08165, eq. 2 to 4), and the temperature adapts to a target entropy.

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, MultiInputPolicy)
    :param env: The environment to learn from (if registered in Gym, can be str)
    :param learning_rate: Learning rate of the critic; it can be a function of the current progress remaining (from 1 to 0)
    :param ent_coef: Temperature alpha: ``"auto_0.1"`` learns it from the initial value 0.1, ``"auto"`` from 1; a positive
        float, or a function of the progress remaining, sets it
    :param target_entropy: Target of the policy's entropy in nats when ``ent_coef`` is learned, between 0 and log(n_actions).
        ``"auto"`` is a tenth of log(n_actions).
    :param tau: Polyak coefficient of the target network, between 0 and 1. By default 0.02, or 1, as in DQN, where
        ``target_update_interval`` says that it is replaced from time to time; a saved agent keeps its own
    :param target_update_interval: Update the target network every so many gradient steps (DQN counts steps of the environment)
    :param ent_coef_learning_rate: Learning rate of the log of the temperature, when it is learned;
        1e-3 by default, or ``learning_rate`` where that is larger
    :param policy_kwargs: Additional arguments to be passed to the policy on creation, those of DQN's
    :raises ValueError: if an argument is out of its range

    All other parameters are those of :class:`sb3_softq.SoftQ`. Learning rate and batch size were chosen on CartPole-v1,
    where the defaults reach 500 within 10,000 to 15,000 steps on three of three seeds; one gradient step every two steps,
    with learning rate 2.3e-3 and a target network that is replaced every 128 updates, took 30,000 to 45,000 on two.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    policy: DiscreteSoftQPolicy
    critic: QNetwork
    critic_target: QNetwork
    action_space: spaces.Discrete

    def __init__(
        self,
        policy: str | type[DiscreteSoftQPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 1e-3,
        buffer_size: int = 1_000_000,  # 1e6
        learning_starts: int = 1000,
        batch_size: int = 128,
        tau: float | None = None,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int = 1,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        n_steps: int = 1,
        ent_coef: str | float | Schedule = "auto_0.1",
        target_entropy: str | float = "auto",
        target_update_interval: int = 1,
        ent_coef_learning_rate: float | Schedule | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ):
        super().__init__(
            policy,
            env,
            learning_rate,
            buffer_size,
            learning_starts,
            batch_size,
            (0.02 if target_update_interval == 1 else 1.0) if tau is None else tau,
            gamma,
            train_freq,
            gradient_steps,
            replay_buffer_class=replay_buffer_class,
            replay_buffer_kwargs=replay_buffer_kwargs,
            optimize_memory_usage=optimize_memory_usage,
            n_steps=n_steps,
            ent_coef=ent_coef,
            target_entropy=target_entropy,
            target_update_interval=target_update_interval,
            ent_coef_learning_rate=ent_coef_learning_rate,
            policy_kwargs=policy_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=_init_setup_model,
        )
        if _init_setup_model:
            self._setup_model()

    _check_action_space = staticmethod(check_discrete_action_space)

    def _setup_model(self) -> None:
        super()._setup_model()
        self._share_ent_coef()

    def _share_ent_coef(self) -> None:
        """The policy acts by the temperature that is trained with: by the same tensor where it is learned."""
        if self.log_ent_coef is not None:
            self.policy.log_ent_coef = self.log_ent_coef
        else:
            self.policy.log_ent_coef.copy_(self.ent_coef_tensor.log())

    def set_parameters(
        self, load_path_or_dict: str | TensorDict, exact_match: bool = True, device: th.device | str = "auto"
    ) -> None:
        super().set_parameters(load_path_or_dict, exact_match, device)
        # a fixed temperature is an argument, not a parameter
        self._share_ent_coef()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # agents that were pickled before it was shared
        self._share_ent_coef()

    def _create_aliases(self) -> None:
        self.critic = self.policy.q_net
        self.critic_target = self.policy.q_net_target

    @property
    def q_net(self) -> QNetwork:
        """The critic, by DQN's name."""
        return self.critic

    @property
    def q_net_target(self) -> QNetwork:
        """The target critic, by DQN's name."""
        return self.critic_target

    def _auto_target_entropy(self) -> float:
        return 0.1 * float(np.log(self.action_space.n))

    def _entropy_bounds(self) -> tuple[float, float]:
        return 0.0, float(np.log(self.action_space.n))

    def _optimizers(self) -> list[th.optim.Optimizer]:
        return [self.policy.optimizer]

    def train(self, gradient_steps: int, batch_size: int = 128) -> None:
        super().train(gradient_steps, batch_size)
        # it may be a schedule
        self._share_ent_coef()

    def update_critic(self, replay_data: ReplayBufferSamples, ent_coef: th.Tensor) -> dict[str, th.Tensor]:
        """One step of the critic towards r + gamma V(s')."""
        discounts = replay_data.discounts if replay_data.discounts is not None else self.gamma
        with th.no_grad():
            next_values = self.next_values(replay_data.next_observations, ent_coef)
            target = replay_data.rewards + (1 - replay_data.dones) * discounts * next_values

        all_q_values = self.critic(replay_data.observations)
        q_values = all_q_values.gather(1, replay_data.actions.long())
        critic_loss = 0.5 * (q_values - target).square().mean()

        self.policy.optimizer.zero_grad()
        critic_loss.backward()
        self.policy.optimizer.step()
        log_probs = th.log_softmax(all_q_values.detach() / ent_coef, dim=1)
        entropy = -(log_probs.exp() * log_probs).sum(dim=1).mean()
        return {"critic_loss": critic_loss.detach(), "q_value": q_values.detach().mean(), "entropy": entropy}

    def next_values(self, next_obs: PyTorchObs, ent_coef: th.Tensor) -> th.Tensor:
        """
        :param next_obs: Observations
        :param ent_coef: Temperature, shape (1,)
        :return: V(s') of the target network, shape (batch_size, 1)
        """
        return ent_coef * th.logsumexp(self.critic_target(next_obs) / ent_coef, dim=1, keepdim=True)

    # ------------------------------------------------------------------ what a maximum-entropy agent can be asked

    def sample_actions(self, obs: np.ndarray | dict[str, np.ndarray], n: int) -> np.ndarray:
        """
        Independent draws from the policy.

        :param obs: One observation or a batch
        :param n: Number of actions per observation
        :return: Shape (batch_size, n); without the first axis for a single observation
        """
        n = check_integer("n", n, 1)
        log_probs, vectorized = self._query(obs)[1:]
        actions = th.distributions.Categorical(logits=log_probs).sample((n,)).T.cpu().numpy()
        return actions if vectorized else actions[0]

    def log_prob(self, obs: np.ndarray | dict[str, np.ndarray], actions: np.ndarray | int) -> np.ndarray:
        """
        Log-probabilities of the policy, log pi(a|s) = (Q(s, a) - V(s)) / alpha.

        :param obs: One observation or a batch
        :param actions: One action per observation, shape (batch_size,), or several, shape (batch_size, n)
        :return: In nats, shape of ``actions``
        """
        log_probs, vectorized = self._query(obs)[1:]
        return self._gather(log_probs, actions, vectorized)

    def entropy(self, obs: np.ndarray | dict[str, np.ndarray]) -> np.ndarray:
        """
        :param obs: One observation or a batch
        :return: Entropy of the policy in nats, shape (batch_size,)
        """
        log_probs, vectorized = self._query(obs)[1:]
        entropy = -(log_probs.exp() * log_probs).sum(dim=1).cpu().numpy()
        return entropy if vectorized else entropy[0]

    def q_values(self, obs: np.ndarray | dict[str, np.ndarray], actions: np.ndarray | int) -> np.ndarray:
        """
        :param obs: One observation or a batch
        :param actions: One action per observation, shape (batch_size,), or several, shape (batch_size, n)
        :return: Soft Q-values, shape of ``actions``
        """
        q_values, _, vectorized = self._query(obs)
        return self._gather(q_values, actions, vectorized)

    def soft_value(self, obs: np.ndarray | dict[str, np.ndarray]) -> np.ndarray:
        """
        :param obs: One observation or a batch
        :return: Soft value V(s) = alpha logsumexp_a(Q(s, a) / alpha), shape (batch_size,)
        """
        q_values, log_probs, vectorized = self._query(obs)
        # V = Q - alpha log pi for each action, here the first
        value = (q_values - self.policy.ent_coef * log_probs)[:, 0].cpu().numpy()
        return value if vectorized else value[0]

    def _query(self, obs: np.ndarray | dict[str, np.ndarray]) -> tuple[th.Tensor, th.Tensor, bool]:
        """Q-values and log-probabilities of all actions, shape (batch_size, n_actions), and whether obs came as a batch."""
        self.policy.set_training_mode(False)
        obs_tensor, vectorized = self.policy.obs_to_tensor(obs)
        with th.no_grad():
            q_values = self.critic(obs_tensor)
        return q_values, th.log_softmax(q_values / self.policy.ent_coef, dim=1), vectorized

    def _gather(self, values: th.Tensor, actions: np.ndarray | int, vectorized: bool) -> np.ndarray:
        actions = np.asarray(actions) if vectorized else np.asarray(actions)[None]
        if actions.ndim not in (1, 2) or len(actions) != len(values) or not np.issubdtype(actions.dtype, np.integer):
            raise ValueError(
                f"actions of shape {actions.shape} and type {actions.dtype} do not fit: expected integers of shape "
                f"{(len(values),)} or {(len(values), 'n')}"
            )
        index = th.as_tensor(actions, device=values.device).reshape(len(values), -1).long()
        if ((index < 0) | (index >= values.shape[1])).any():
            raise ValueError(f"actions={actions!r} are not all in {self.action_space}")
        result = values.gather(1, index).reshape(actions.shape).cpu().numpy()
        return result if vectorized else result[0]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts, tensors = super()._get_torch_save_params()
        return [*state_dicts, "policy.optimizer"], tensors
