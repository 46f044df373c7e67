"""What soft Q-learning needs for any action space: the updates in their order, the temperature, target networks, the log."""

import math
from abc import abstractmethod
from collections import defaultdict
from itertools import islice
from typing import Any, ClassVar

import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples, Schedule, TensorDict
from stable_baselines3.common.utils import FloatSchedule, update_learning_rate
from torch import nn

from sb3_softq.checks import (
    MAX_ENT_COEF,
    MIN_ENT_COEF,
    check_auto,
    check_learning_rate,
    check_number,
    check_schedule,
    number_from_string,
)
from sb3_softq.finite import DivergedError
from sb3_softq.logged_data import LoggedData
from sb3_softq.networks import polyak_update

# Least learning rate of the log of the temperature where none is given
ENT_COEF_LEARNING_RATE = 1e-3


class MaximumEntropyAlgorithm(LoggedData):
    """
    Off-policy algorithm with a temperature, fixed or learned, critics and target critics.

    See :class:`sb3_softq.SoftQ` for the parameters, which are handed on but for those named here.

    :param ent_coef: Temperature alpha, or ``"auto"``
    :param target_entropy: Target of the policy's entropy in nats, or ``"auto"``
    :param target_update_interval: Update the target networks every so many gradient steps
    :param ent_coef_learning_rate: Learning rate of the log of the temperature, or None
    :raises ValueError: if an argument is out of its range
    """

    critic: nn.Module
    critic_target: nn.Module
    policy_delay = 1
    # Initial value of a learned temperature where none is given, as in SAC
    _auto_ent_coef = 1.0
    # At the last update, in nats
    _policy_entropy: float | None = None
    floats = (*LoggedData.floats, "ent_coef_learning_rate", "ent_coef", "target_entropy")
    integers: ClassVar[dict[str, int]] = LoggedData.integers | {"target_update_interval": 1}

    def __init__(
        self,
        *args: Any,
        ent_coef: str | float | Schedule,
        target_entropy: str | float,
        target_update_interval: int,
        ent_coef_learning_rate: float | Schedule | None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.ent_coef = ent_coef
        self.target_entropy = target_entropy
        self.target_update_interval = target_update_interval
        self.ent_coef_learning_rate = ent_coef_learning_rate
        # What load() has to find the parameters of
        self._learned_ent_coef = isinstance(number_from_string(ent_coef), str)
        # Log of the temperature and its optimizer when it is learned
        self.log_ent_coef: th.Tensor | None = None
        self.ent_coef_optimizer: th.optim.Optimizer | None = None

    # ------------------------------------------------------------------ what differs between action spaces

    @abstractmethod
    def _auto_target_entropy(self) -> float:
        """Target of the entropy for ``target_entropy="auto"``, in nats."""

    @abstractmethod
    def _entropy_bounds(self) -> tuple[float, float]:
        """The least and the largest entropy that a policy can have, in nats."""

    @abstractmethod
    def _optimizers(self) -> list[th.optim.Optimizer]:
        """Those that follow ``learning_rate``."""

    @abstractmethod
    def _create_aliases(self) -> None:
        """Set ``actor``, ``critic`` and the like to the networks of the policy, and build what else is needed."""

    @abstractmethod
    def update_critic(self, replay_data: ReplayBufferSamples, ent_coef: th.Tensor) -> dict[str, th.Tensor]:
        """
        One step of the critics.

        :param replay_data: Minibatch
        :param ent_coef: Temperature, shape (1,)
        :return: Scalars for the log; with the ``"entropy"`` of the policy among them the temperature makes a step too
        """

    def update_actor(self, replay_data: ReplayBufferSamples, ent_coef: th.Tensor) -> dict[str, th.Tensor]:
        """
        One step of the actor, if there is one, after every ``policy_delay`` steps of the critics.

        :param replay_data: Minibatch
        :param ent_coef: Temperature, shape (1,)
        :return: As that of :meth:`update_critic`
        """
        return {}

    # ------------------------------------------------------------------ training

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        """
        Sample the replay buffer, and logged data if there are any, and update critics, actor, temperature and target networks.

        :param gradient_steps: Number of gradient steps
        :param batch_size: Minibatch size
        """
        if self.awaits_episode:
            return
        # Switch to train mode (this affects batch norm / dropout)
        self.policy.set_training_mode(True)
        self._update_learning_rates()
        stats: dict[str, list[th.Tensor]] = defaultdict(list)

        for _ in range(gradient_steps):
            replay_data = self._sample(batch_size)
            ent_coef = self.ent_coef_tensor
            self._n_updates += 1
            step_stats = self.update_critic(replay_data, ent_coef)
            if self._n_updates % self.policy_delay == 0:
                step_stats |= self.update_actor(replay_data, ent_coef)
            if self.ent_coef_optimizer is not None and "entropy" in step_stats:
                step_stats |= self._update_ent_coef(step_stats["entropy"])
            step_stats["ent_coef"] = ent_coef
            for key, value in step_stats.items():
                stats[key].append(value.reshape(()))

            if self._n_updates % self.target_update_interval == 0:
                self._update_target()

        self._log_stats(stats)

    @th.no_grad()
    def _update_ent_coef(self, entropy: th.Tensor) -> dict[str, th.Tensor]:
        """One step of the temperature: up while the policy's entropy is below its target, down while it is above."""
        assert self.log_ent_coef is not None
        assert self.ent_coef_optimizer is not None
        assert isinstance(self.target_entropy, float)
        # of the loss below: autograd takes longer than the step does
        self.log_ent_coef.grad = (entropy - self.target_entropy).reshape(1)
        ent_coef_loss = (self.log_ent_coef * self.log_ent_coef.grad).mean()
        self.ent_coef_optimizer.step()
        # where no policy reaches the target, the temperature would fall or rise for ever
        self.log_ent_coef.clamp_(math.log(MIN_ENT_COEF), math.log(MAX_ENT_COEF))
        return {"ent_coef_loss": ent_coef_loss}

    @th.no_grad()
    def _update_target(self) -> None:
        polyak_update(self.critic, self.critic_target, self.tau)

    @property
    def ent_coef_tensor(self) -> th.Tensor:
        """Current temperature, shape (1,), on the device."""
        if self.log_ent_coef is not None:
            return th.exp(self.log_ent_coef.detach())
        return th.full((1,), self._fixed_ent_coef(), device=self.device)

    def _fixed_ent_coef(self) -> float:
        """Temperature of now where it is not learned."""
        return FloatSchedule(self.ent_coef)(self._current_progress_remaining)  # type: ignore[arg-type]

    def _ent_coef_lr(self, progress_remaining: float) -> float:
        """By default never below that of the critics, which would otherwise settle on a temperature that is on its way."""
        if self.ent_coef_lr_schedule is not None:
            return self.ent_coef_lr_schedule(progress_remaining)
        return max(ENT_COEF_LEARNING_RATE, self.lr_schedule(progress_remaining))

    def _update_learning_rates(self) -> None:
        self._update_learning_rate(self._optimizers())
        if self.ent_coef_optimizer is not None:
            update_learning_rate(self.ent_coef_optimizer, self._ent_coef_lr(self._current_progress_remaining))

    def _log_stats(self, stats: dict[str, list[th.Tensor]]) -> None:
        """Average over the gradient steps, read from the device once, checked to be finite."""
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        if not stats:
            return
        values = iter(th.stack([value for steps in stats.values() for value in steps]).tolist())
        for key, steps in stats.items():
            value = sum(islice(values, len(steps))) / len(steps)
            if not math.isfinite(value):
                raise DivergedError(
                    f"{key} became {value} after {self._n_updates} updates, at step {self.num_timesteps}: training stopped. "
                    "Lower learning rates, or normalised observations and rewards (VecNormalize), may help."
                )
            self.logger.record_mean(f"train/{key}", value)
            if key == "entropy":
                self._policy_entropy = value

    # ------------------------------------------------------------------ checks, set-up, saving

    def _check_arguments(self) -> None:
        super()._check_arguments()
        if self.ent_coef_learning_rate is not None:
            check_learning_rate("ent_coef_learning_rate", self.ent_coef_learning_rate)
        # numbers as strings, which SAC takes too
        self.ent_coef = number_from_string(self.ent_coef)
        self.target_entropy = number_from_string(self.target_entropy)
        if isinstance(self.ent_coef, str):
            check_auto("ent_coef", self.ent_coef, with_initial_value=True)
        else:
            check_schedule("ent_coef", self.ent_coef, MIN_ENT_COEF, open_low=False, high=MAX_ENT_COEF)
        if self._is_loaded and self._learned_ent_coef != isinstance(self.ent_coef, str):
            saved, allowed = ("learned", '"auto"') if self._learned_ent_coef else ("fixed", "a number or a function")
            raise ValueError(f"ent_coef={self.ent_coef!r} is not allowed: it was {saved} when saved, so it must be {allowed}")
        if isinstance(self.target_entropy, str):
            check_auto("target_entropy", self.target_entropy, with_initial_value=False)
        else:
            # towards one that no policy has, the temperature would run away
            check_number("target_entropy", self.target_entropy, *self._entropy_bounds())

    def _setup_lr_schedule(self) -> None:
        super()._setup_lr_schedule()
        self.ent_coef_lr_schedule = None if self.ent_coef_learning_rate is None else FloatSchedule(self.ent_coef_learning_rate)

    def _setup_model(self) -> None:
        super()._setup_model()
        self._create_aliases()
        if self.target_entropy == "auto":
            self.target_entropy = self._auto_target_entropy()
        if isinstance(self.ent_coef, str):
            initial_value = float(self.ent_coef.removeprefix("auto").removeprefix("_") or self._auto_ent_coef)
            # The log is what is optimized, as in SAC
            self.log_ent_coef = th.full((1,), math.log(initial_value), device=self.device, requires_grad=True)
            self.ent_coef_optimizer = th.optim.Adam([self.log_ent_coef], lr=self._ent_coef_lr(1.0), fused=True)

    def set_parameters(
        self, load_path_or_dict: str | TensorDict, exact_match: bool = True, device: th.device | str = "auto"
    ) -> None:
        params = self._read_parameters(load_path_or_dict, device)
        own = self.ent_coef_optimizer is not None
        differing = params.keys() ^ set(self._get_torch_save_params()[0])
        if differing == {"ent_coef_optimizer"} and (exact_match or not own):
            given, expected = ("fixed", "learned") if own else ("learned", "fixed")
            raise ValueError(
                f"parameters of an agent with a {given} temperature are not allowed: they must come from one with a "
                f"{expected} temperature, as ent_coef={self.ent_coef!r} is here"
            )
        super().set_parameters(params, exact_match, device)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "critic", "critic_target"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        if self.ent_coef_optimizer is None:
            return ["policy"], []
        return ["policy", "ent_coef_optimizer"], ["log_ent_coef"]
