"""The scale of returns: rewards of any size become values of about 1 for the critics, in units that nobody else sees."""

import io
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.type_aliases import TensorDict
from typing_extensions import Self

from sb3_softq.base import MaximumEntropyAlgorithm
from sb3_softq.checks import check_flag
from sb3_softq.critic import ParticleCritic, ScaledHistogram
from sb3_softq.data import Trajectory
from sb3_softq.discrete_policy import DiscreteSoftQPolicy
from sb3_softq.finite import DivergedError
from sb3_softq.policies import SoftQPolicy

# The largest return that has been seen is at most so many times the scale (SimbaV2)
LARGEST_RETURN = 5.0
# Above it sums of values are infinite in single precision, which ends at 3.4e38
LARGEST_SCALE = 1e35
# Factor by which a buffer has to pay more than was seen before the scale follows it: an agent's own one changes nothing
CLEARLY_MORE = 2.0
# Initial value of a learned temperature, in units of the scale, where none is given
AUTO_ENT_COEF = 0.01


@dataclass
class ReturnScale:
    """
    Running standard deviation of the discounted returns since an episode's start, as VecNormalize has it, but never less than
    a fifth of the largest of them (Lee et al. 2025, SimbaV2, https://arxiv.org/abs/2502.15280). They go on where a time limit
    cuts an episode off, as the values do that are learned there.

    :param mean: Mean of the returns
    :param var: Their variance
    :param count: Their number
    :param largest: Largest magnitude of one
    :param running: Return of each environment so far; empty at the start
    :param is_raw: Whether rewards are taken in before VecNormalize divides them; earlier agents did so after it
    """

    mean: float = 0.0
    var: float = 0.0
    count: int = 0
    largest: float = 0.0
    running: list[float] = field(default_factory=list)
    is_raw: bool = False

    def observe(self, rewards: np.ndarray, terminates: np.ndarray, gamma: float) -> None:
        """
        Take in one step of all environments.

        :param rewards: Shape (n_envs,)
        :param terminates: Whether the episode ends there, and not by a time limit, same shape
        :param gamma: Discount factor
        """
        before = np.array(self.running) if len(self.running) == len(rewards) else np.zeros(len(rewards))
        returns = rewards + gamma * before
        self.running = (returns * (1.0 - terminates)).tolist()
        self._take_in(returns)

    def _take_in(self, returns: np.ndarray) -> None:
        """Discounted returns, of any shape; none of an empty buffer."""
        n, total = returns.size, self.count + returns.size
        if n == 0:
            return
        self.largest = max(self.largest, float(np.abs(returns).max()))
        # of the parallel algorithm for the variance
        delta = float(returns.mean()) - self.mean
        self.var += (n * (float(returns.var()) - self.var) + delta**2 * self.count * n / total) / total
        self.mean += delta * n / total
        self.count = total

    def observe_buffer(self, buffer: ReplayBuffer, gamma: float, bonus: float = 0.0) -> None:
        """
        Take in the transitions of a replay buffer, for instance one that was loaded, from the oldest on.

        :param buffer: Replay buffer
        :param gamma: Discount factor
        :param bonus: What a step earns beside its reward
        """
        first = buffer.pos if buffer.full else 0
        rows = np.arange(first, first + buffer.size()) % buffer.buffer_size
        returns = buffer.rewards[rows].astype(np.float64) + bonus  # (n_rows, n_envs)
        goes_on = 1.0 - buffer.dones[rows] * (1.0 - buffer.timeouts[rows])
        weights = gamma * goes_on.astype(np.float64)
        for row in range(1, len(rows)):
            returns[row] += weights[row - 1] * returns[row - 1]
        self._take_in(returns)

    def begin(self) -> None:
        """Other episodes begin."""
        self.running = []

    def at_least(self, scale: float) -> None:
        """
        Never fall below a scale.

        :param scale: Of what has been learned elsewhere
        """
        self.largest = max(self.largest, LARGEST_RETURN * scale)

    def multiply(self, factor: float) -> None:
        """
        Change the unit of the rewards that were seen.

        :param factor: Size of the old unit in the new one
        """
        self.mean, self.var, self.largest = self.mean * factor, self.var * factor**2, self.largest * factor
        self.running = [value * factor for value in self.running]

    @property
    def value(self) -> float:
        """The scale, > 0; 1 as long as all returns are 0."""
        return max(self.var**0.5, self.largest / LARGEST_RETURN) or 1.0


class ScaledReturns(MaximumEntropyAlgorithm):
    """
    What :class:`sb3_softq.SoftQ` and :class:`sb3_softq.DiscreteSoftQ` share: the critics' ``return_scale`` follows the returns
    of training, soft ones where the temperature is fixed. A learned temperature is a multiple of the scale, as the critics'
    outputs are.

    :param args: Those of :class:`MaximumEntropyAlgorithm`, as ``kwargs``
    :param normalize_rewards: Whether there is a scale, or all is in the environment's units
    """

    policy: SoftQPolicy | DiscreteSoftQPolicy
    critic: ScaledHistogram
    saved_dataclasses: ClassVar[dict[str, type]] = {"returns": ReturnScale}
    # for agents of release 0.1.0, whose critics predict a number, and later ones for Discrete actions
    has_histograms = False
    # That of the agent as it was made, which load() cannot change; None for agents that were saved without it
    _was_normalized: bool | None = None
    # load() has set the returns, and sets the parameters that belong to them
    _awaits_parameters = False
    # Whether a replay buffer was loaded that is to be taken in
    _has_other_buffer = False

    def __init__(self, *args: Any, normalize_rewards: bool, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.normalize_rewards = normalize_rewards
        self.returns = ReturnScale(is_raw=True)

    @property
    def ent_coef_tensor(self) -> th.Tensor:
        """Current temperature in the environment's units, shape (1,), on the device."""
        ent_coef = super().ent_coef_tensor
        return ent_coef * self.critic.return_scale if self.normalize_rewards and self.log_ent_coef is not None else ent_coef

    @property
    def _auto_ent_coef(self) -> float:  # type: ignore[override]
        """SAC's 1, in units of the scale, would drown all rewards, and take thousands of updates to fall."""
        return AUTO_ENT_COEF if self.normalize_rewards else super()._auto_ent_coef

    def _check_arguments(self) -> None:
        self.has_histograms = self.has_histograms or not self._is_loaded
        if not self.has_histograms:
            self.normalize_rewards = False
        super()._check_arguments()
        check_flag("normalize_rewards", self.normalize_rewards)
        if not self._is_loaded:
            self._was_normalized = bool(self.normalize_rewards)
        elif self._was_normalized not in (None, self.normalize_rewards):
            raise ValueError(
                f"normalize_rewards={self.normalize_rewards} is not allowed: it must be {self._was_normalized}, as it was "
                "when saved, whose units the critics have"
            )
        if not self.normalize_rewards and self.policy_kwargs.get("n_bins", 1) != 1:
            raise ValueError(
                f"n_bins={self.policy_kwargs['n_bins']!r} is not allowed with normalize_rewards=False, which has no scale "
                "that a histogram could end at: it must be 1"
            )

    def _policy_arguments(self) -> dict[str, Any]:
        return ({} if self.normalize_rewards else {"n_bins": 1}) | super()._policy_arguments()

    def _setup_model(self) -> None:
        super()._setup_model()
        self._awaits_parameters = self._is_loaded

    def set_parameters(
        self, load_path_or_dict: str | TensorDict, exact_match: bool = True, device: th.device | str = "auto"
    ) -> None:
        params = self._read_parameters(load_path_or_dict, device)
        self._check_bins(dict(params.get("policy", {})))
        super().set_parameters(params, exact_match, device)
        scale = self.critic.return_scale.item()
        if not self._awaits_parameters and (self.policy.is_taught or scale != 1.0):
            # what they have learned is in units of their scale; critics of an actor that has only imitated have none
            self.returns.at_least(scale * self._reward_unit())
        self._awaits_parameters = False

    def _check_bins(self, given: TensorDict) -> None:
        """The critics whose weights are given must have as many outputs as those here."""
        n_bins = self._bins_of(given)
        if n_bins is not None and n_bins != self.critic.n_bins:
            raise ValueError(
                f"n_bins={self.critic.n_bins} with normalize_rewards={self.normalize_rewards} is not allowed: with the "
                f"weights of these critics n_bins must be {n_bins}"
            )

    def _bins_of(self, given: TensorDict) -> int | None:
        """The number of bins that the critics had whose weights are given; None where they tell nothing of it."""
        if not isinstance(self.critic, ParticleCritic):
            return None  # of a policy with critics of its own
        bias = given.get(f"critic.layers.{len(self.critic.layers) - 1}.bias")
        return bias.shape[-1] if isinstance(bias, th.Tensor) else None

    def set_data(self, trajectories: Iterable[Trajectory] | None, share: float = 0.5) -> Self:
        super().set_data(trajectories, share)
        if self.logged_data is not None:
            self._observe_loaded()
            self._observe_other(self.logged_data)
        return self

    def _begin_learning(self, reset_num_timesteps: bool) -> None:
        super()._begin_learning(reset_num_timesteps)
        if reset_num_timesteps or self._last_obs is None:
            self.returns.begin()

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: np.ndarray,
        new_obs: np.ndarray | dict[str, np.ndarray],
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        self._observe_loaded()
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)
        terminates = np.asarray(dones, dtype=bool) & ~np.array([info.get("TimeLimit.truncated", False) for info in infos])
        if self._vec_normalize_env is not None:
            # its first ones are divided by next to nothing
            reward = self._vec_normalize_env.get_original_reward()
        rewards = np.asarray(reward, dtype=np.float64) + self._entropy_bonus()
        self.returns.observe(rewards, terminates, self.gamma)

    def load_replay_buffer(self, path: str | Path | io.BufferedIOBase, truncate_last_traj: bool = True) -> None:
        super().load_replay_buffer(path, truncate_last_traj)
        self._has_other_buffer = True

    def _sample(self, batch_size: int) -> Any:
        """A buffer may pay what no episode has been paid: HER does for goals that none has reached."""
        samples = super()._sample(batch_size)
        if self.normalize_rewards:
            rewards = samples.rewards * self._reward_unit() + self._entropy_bonus()
            largest = float(rewards.abs().max())
            if largest > CLEARLY_MORE * self.returns.largest:
                self.returns.largest = largest
                self._set_return_scale()
        return samples

    def _entropy_bonus(self) -> float:
        """What a step earns beside its reward where the temperature is fixed, so that soft returns are what is measured."""
        if self.log_ent_coef is not None:
            return 0.0
        # actions are uniform before the first update
        entropy = self._entropy_bounds()[1] if self._policy_entropy is None else self._policy_entropy
        return self._fixed_ent_coef() * entropy * self._reward_unit()

    def _reward_unit(self) -> float:
        """By which VecNormalize divides rewards before they are learned from, 1 without it."""
        env = self._vec_normalize_env
        return 1.0 if env is None or not env.norm_reward else float(np.sqrt(env.ret_rms.var + env.epsilon))

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({"returns": ReturnScale(), "normalize_rewards": False} | state)

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        if self.normalize_rewards:
            self._set_return_scale()
        super().train(gradient_steps, batch_size)

    def _set_return_scale(self) -> None:
        self._observe_loaded()
        scale = self.returns.value / self._reward_unit()
        if scale > LARGEST_SCALE:
            raise DivergedError(
                f"scale of the discounted returns became {scale:.3g} at step {self.num_timesteps}, too large for single "
                "precision: training stopped. Smaller rewards (VecNormalize) help."
            )
        for critic in (self.critic, self.critic_target):
            # the target's outputs have the unit of today too, however long ago it was replaced
            critic.get_buffer("return_scale").fill_(scale)

    def _observe_loaded(self) -> None:
        """Before the first step, and where there is none: a replay buffer that came from elsewhere."""
        assert self.replay_buffer is not None
        if not self.returns.is_raw:
            self.returns.multiply(self._reward_unit())
            self.returns.is_raw = True
        if self.returns.count == 0 or self._has_other_buffer:
            self._observe_other(self.replay_buffer)
        self._has_other_buffer = False

    def _observe_other(self, buffer: ReplayBuffer) -> None:
        """What came from elsewhere: an agent that has seen returns may have seen these, so that they do not count twice."""
        if self.returns.count == 0:
            self.returns.observe_buffer(buffer, self.gamma, self._entropy_bonus())
            return
        other = ReturnScale(is_raw=True)
        other.observe_buffer(buffer, self.gamma, self._entropy_bonus())
        if other.value > CLEARLY_MORE * self.returns.value:
            self.returns.at_least(other.value)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_awaits_parameters", "_has_other_buffer"]
