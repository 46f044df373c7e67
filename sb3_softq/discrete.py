"""DiscreteSoftQ: soft Q-learning where the soft value is a sum over the actions, and nothing has to be estimated."""

from typing import Any, ClassVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, PyTorchObs, ReplayBufferSamples, Schedule, TensorDict
from stable_baselines3.common.utils import LinearSchedule

from sb3_softq.checks import check_integer
from sb3_softq.discrete_policy import CnnPolicy, DiscreteCritic, DiscreteSoftQPolicy, MlpPolicy, MultiInputPolicy
from sb3_softq.returns import ScaledReturns
from sb3_softq.spaces import check_discrete_action_space

__all__ = ["CnnPolicy", "DiscreteSoftQ", "DiscreteSoftQPolicy", "MlpPolicy", "MultiInputPolicy"]


class DiscreteSoftQ(ScaledReturns):
    """
    Soft Q-learning for Discrete action spaces, exactly: the critic regresses on r + gamma V(s') with

        V(s) = alpha logsumexp_a(Q(s, a) / alpha),    pi(a|s) = exp((Q(s, a) - V(s)) / alpha)

    (Haarnoja et al. 2017, https://arxiv.org/abs/1702.08165, eq. 2 to 4), and the temperature adapts to a target entropy. Q
    is the mean of a histogram in units of the returns' scale, as that of :class:`sb3_softq.SoftQ`.

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, MultiInputPolicy)
    :param env: The environment to learn from (if registered in Gym, can be str)
    :param learning_rate: Learning rate of the critic, float or function of the progress remaining (from 1 to 0); by default
        it falls linearly from 1e-3 to 1e-4 within a call of ``learn`` (a number suits a training in many calls)
    :param target_entropy: Target of the policy's entropy in nats when ``ent_coef`` is learned, between 0 and log(n_actions).
        ``"auto"`` is a quarter of log(n_actions), about that of epsilon-greedy actions with epsilon = 0.1.
    :param tau: Polyak coefficient of the target network, between 0 and 1. By default 0.02, or 1, as in DQN, where
        ``target_update_interval`` says that it is replaced from time to time; a saved agent keeps its own
    :param target_update_interval: Update the target network every so many gradient steps (DQN counts steps of the environment)
    :param ent_coef_learning_rate: Learning rate of the log of the temperature, when it is learned;
        1e-3 by default, or ``learning_rate`` where that is larger
    :param policy_kwargs: Additional arguments to be passed to the policy on creation, those of DQN's and ``n_bins``, which
        is 1, DQN's critic with the square of its error as loss, where ``normalize_rewards=False``
    :raises ValueError: if an argument is out of its range

    All other parameters are those of :class:`sb3_softq.SoftQ`.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    policy: DiscreteSoftQPolicy
    critic: DiscreteCritic
    critic_target: DiscreteCritic
    action_space: spaces.Discrete

    def __init__(
        self,
        policy: str | type[DiscreteSoftQPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = LinearSchedule(1e-3, 1e-4, 1.0),
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
        ent_coef: str | float | Schedule = "auto_0.01",
        target_entropy: str | float = "auto",
        target_update_interval: int = 1,
        normalize_rewards: bool = True,
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
            normalize_rewards=normalize_rewards,
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
            self.policy.log_ent_coef.copy_(th.log(self.ent_coef_tensor / self.critic.return_scale))

    def set_parameters(
        self, load_path_or_dict: str | TensorDict, exact_match: bool = True, device: th.device | str = "auto"
    ) -> None:
        super().set_parameters(load_path_or_dict, exact_match, device)
        # a fixed temperature is an argument, not a parameter
        self._share_ent_coef()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # agents that were pickled before it was shared
        self._share_ent_coef()

    def _create_aliases(self) -> None:
        self.critic = self.policy.q_net
        self.critic_target = self.policy.q_net_target

    @property
    def q_net(self) -> DiscreteCritic:
        """The critic, by DQN's name."""
        return self.critic

    @property
    def q_net_target(self) -> DiscreteCritic:
        """The target critic, by DQN's name."""
        return self.critic_target

    def _auto_target_entropy(self) -> float:
        return 0.25 * float(np.log(self.action_space.n))

    def _entropy_bounds(self) -> tuple[float, float]:
        return 0.0, float(np.log(self.action_space.n))

    def _optimizers(self) -> list[th.optim.Optimizer]:
        return [self.policy.optimizer]

    def _bins_of(self, given: TensorDict) -> int | None:
        bias = given.get(f"q_net.q_net.{len(self.critic.q_net) - 1}.bias")
        return bias.shape[0] // int(self.action_space.n) if isinstance(bias, th.Tensor) else None

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

        outputs = self.critic.outputs(replay_data.observations)  # (batch_size, n_actions, n_bins)
        actions = replay_data.actions.long()
        taken = outputs[th.arange(len(actions), device=self.device), actions.squeeze(1)]
        critic_loss = self.critic.loss(taken.unsqueeze(0), target.squeeze(1))

        self.policy.optimizer.zero_grad()
        critic_loss.backward()
        self.policy.optimizer.step()
        with th.no_grad():
            q_values = self.critic.q_of(outputs)
            log_probs = th.log_softmax(q_values / ent_coef, dim=1)
            entropy = -(log_probs.exp() * log_probs).sum(dim=1).mean()
        return {"critic_loss": critic_loss.detach(), "q_value": q_values.gather(1, actions).mean(), "entropy": entropy}

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
