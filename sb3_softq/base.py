"""What soft Q-learning needs for any action space: the temperature, the target networks, the checks and the log."""

import io
import math
from abc import abstractmethod
from collections import defaultdict
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, ReplayBufferSamples, Schedule, TensorDict
from stable_baselines3.common.utils import FloatSchedule, update_learning_rate
from stable_baselines3.common.vec_env import VecEnv
from torch import nn

from sb3_softq.checks import (
    MAX_ENT_COEF,
    MIN_ENT_COEF,
    UnsupportedSpaceError,
    check_auto,
    check_class,
    check_device,
    check_finite,
    check_flag,
    check_integer,
    check_keywords,
    check_learning_rate,
    check_number,
    check_observation_space,
    check_parameters,
    check_schedule,
    check_train_freq,
    check_type,
    check_vec_normalize,
    number_from_string,
)
from sb3_softq.networks import polyak_update
from sb3_softq.replay import end_trajectory

# Least learning rate of the log of the temperature where none is given
ENT_COEF_LEARNING_RATE = 1e-3

SelfMaximumEntropy = TypeVar("SelfMaximumEntropy", bound="MaximumEntropyAlgorithm")


class MaximumEntropyAlgorithm(OffPolicyAlgorithm):
    """
    Off-policy algorithm with a temperature, fixed or learned, critics and target critics.

    See :class:`sb3_softq.SoftQ` for the parameters, which are handed on to ``OffPolicyAlgorithm`` but for those named here.

    :param ent_coef: Temperature alpha, or ``"auto"``
    :param target_entropy: Target of the policy's entropy in nats, or ``"auto"``
    :param target_update_interval: Update the target networks every so many gradient steps
    :param ent_coef_learning_rate: Learning rate of the log of the temperature, or None
    :raises ValueError: if an argument is out of its range
    """

    critic: nn.Module
    critic_target: nn.Module
    policy_delay = 1
    # Whether the replay buffer ends with an episode of another run
    _buffer_is_loaded = False
    # Arguments that are converted to float if they came as another kind of number
    floats: tuple[str, ...] = ("learning_rate", "ent_coef_learning_rate", "ent_coef", "target_entropy")
    # Attributes that are converted to int if they came as another kind of number, and their smallest values
    integers: ClassVar[dict[str, int]] = {
        "buffer_size": 1,
        "batch_size": 1,
        "n_steps": 1,
        "target_update_interval": 1,
        "_stats_window_size": 1,
        "learning_starts": 0,
        "gradient_steps": -1,
    }

    def __init__(
        self,
        policy: str | type[BasePolicy],
        env: GymEnv | str,
        *args: Any,
        ent_coef: str | float | Schedule,
        target_entropy: str | float,
        target_update_interval: int,
        ent_coef_learning_rate: float | Schedule | None,
        verbose: int,
        device: th.device | str,
        **kwargs: Any,
    ):
        # before SB3 uses them
        check_type("env", env, (str, gym.Env, VecEnv), "an environment, its id,")
        verbose = check_integer("verbose", int(verbose) if isinstance(verbose, bool) else verbose, 0)
        check_device(device)
        if env is not None:
            env = maybe_make_env(env, verbose)
            assert not isinstance(env, str)
            check_observation_space(env.observation_space)
            self._check_action_space(env.action_space)
        policy_kwargs = kwargs.get("policy_kwargs")
        if isinstance(policy_kwargs, dict) and policy_kwargs.get("use_sde") is False:
            # SAC leaves it in the dict that it was given, which a user may pass to us next
            kwargs["policy_kwargs"] = {key: value for key, value in policy_kwargs.items() if key != "use_sde"}
        kwargs |= dict(verbose=verbose, device=device, sde_support=False, support_multi_env=True)
        super().__init__(policy, env, *args, **kwargs)
        self.ent_coef = ent_coef
        self.target_entropy = target_entropy
        self.target_update_interval = target_update_interval
        self.ent_coef_learning_rate = ent_coef_learning_rate
        # Saved as True: load() finds it so before the model is set up
        self._is_loaded = False
        # What load() has to find the parameters of
        self._learned_ent_coef = isinstance(ent_coef, str)
        # Log of the temperature and its optimizer when it is learned
        self.log_ent_coef: th.Tensor | None = None
        self.ent_coef_optimizer: th.optim.Optimizer | None = None

    # ------------------------------------------------------------------ what differs between action spaces

    @staticmethod
    @abstractmethod
    def _check_action_space(space: spaces.Space) -> None:
        """Raise a ValueError if the algorithm cannot act in this space."""

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
        """Set ``critic`` and ``critic_target``."""

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

    # ------------------------------------------------------------------ construction

    def _check_arguments(self) -> None:
        if getattr(self, "observation_space", None) is None:
            raise ValueError("env=None is not allowed: it must be an environment or its id")
        check_class("policy", self.policy_class, self.policy_aliases["MlpPolicy"])
        check_type("policy_kwargs", self.policy_kwargs, (dict,), "a dict")
        check_type("replay_buffer_kwargs", self.replay_buffer_kwargs, (dict,), "a dict")
        check_class("replay_buffer_class", self.replay_buffer_class, ReplayBuffer, optional=True)
        check_type("action_noise", self.action_noise, (ActionNoise,), "an ActionNoise")
        check_type("tensorboard_log", self.tensorboard_log, (str, PathLike), "a path")
        if self.seed is not None:
            self.seed = check_integer("seed", self.seed, 0, 2**32 - 1)
        self.train_freq = check_train_freq(self.train_freq, self.n_envs)
        # The RL Zoo loads agents that are only to act with a learning rate of 0
        check_learning_rate("learning_rate", self.learning_rate, may_be_zero=self._is_loaded)
        if self.ent_coef_learning_rate is not None:
            check_learning_rate("ent_coef_learning_rate", self.ent_coef_learning_rate)
        for name, minimum in self.integers.items():
            setattr(self, name, check_integer(name.removeprefix("_"), getattr(self, name), minimum))
        check_number("tau", self.tau, 0.0, 1.0)
        check_number("gamma", self.gamma, 0.0, 1.0)
        check_flag("optimize_memory_usage", self.optimize_memory_usage)
        has_dict = isinstance(self.observation_space, spaces.Dict)
        if self.optimize_memory_usage and (self.n_steps > 1 or has_dict):
            raise ValueError(
                "optimize_memory_usage=True is not allowed with n_steps > 1 or Dict observations: it must be False, "
                "since Stable-Baselines3 has no such buffer"
            )
        if self.n_steps > 1 and has_dict:
            raise ValueError(f"n_steps={self.n_steps} is not allowed with Dict observations: it must be 1")
        if self.n_steps > 1 and self.replay_buffer_class is not None:
            raise ValueError(
                f"n_steps={self.n_steps} is not allowed with a replay_buffer_class, which would not hear of it: it must be 1 "
                "(what the buffer takes itself goes into replay_buffer_kwargs)"
            )
        if self.replay_buffer_class is not None and issubclass(self.replay_buffer_class, DictReplayBuffer) != has_dict:
            kind = "DictReplayBuffer or HerReplayBuffer" if has_dict else "a buffer for observations that are no Dict"
            raise ValueError(f"replay_buffer_class={self.replay_buffer_class!r} is not allowed: it must be {kind}")
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
        check_keywords("policy_kwargs", self.policy_kwargs, self.policy_class)
        if self.env is not None:
            check_vec_normalize(self.env)

    def _setup_lr_schedule(self) -> None:
        super()._setup_lr_schedule()
        self.ent_coef_lr_schedule = None if self.ent_coef_learning_rate is None else FloatSchedule(self.ent_coef_learning_rate)

    def _setup_model(self) -> None:
        # here, not in the constructor: load() fills in the arguments later
        self._check_arguments()
        self._convert_numbers()
        # SB3 writes the buffer that it chooses over these two, and load() would take it for the user's
        given = self.replay_buffer_class, self.replay_buffer_kwargs
        self.replay_buffer_kwargs = self.replay_buffer_kwargs.copy()
        try:
            super()._setup_model()
        except (AssertionError, AttributeError, RuntimeError) as error:
            # of the networks, for instance a NatureCNN that is given no image
            raise UnsupportedSpaceError(
                f"policy={self.policy_class.__name__!r} with policy_kwargs={self.policy_kwargs!r} is not allowed: it must be "
                f"one that can be built for observation_space={self.observation_space!r} ({type(error).__name__}: {error})"
            ) from error
        self.replay_buffer_class, self.replay_buffer_kwargs = given
        self._create_aliases()
        if self.target_entropy == "auto":
            self.target_entropy = self._auto_target_entropy()
        if isinstance(self.ent_coef, str):
            initial_value = float(self.ent_coef.removeprefix("auto").removeprefix("_") or 1.0)
            # The log is what is optimized, as in SAC
            self.log_ent_coef = th.full((1,), math.log(initial_value), device=self.device, requires_grad=True)
            self.ent_coef_optimizer = th.optim.Adam([self.log_ent_coef], lr=self._ent_coef_lr(1.0), fused=True)
        self._is_loaded = True

    def _convert_numbers(self) -> None:
        """FloatSchedule takes few of numpy's numbers."""
        for name in self.floats:
            if isinstance(getattr(self, name), int | np.number):
                setattr(self, name, float(getattr(self, name)))

    # ------------------------------------------------------------------ training

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        """
        Sample the replay buffer and update critics, actor, temperature and target networks.

        :param gradient_steps: Number of gradient steps
        :param batch_size: Minibatch size
        """
        # Switch to train mode (this affects batch norm / dropout)
        self.policy.set_training_mode(True)
        self._update_learning_rates()
        stats: dict[str, list[th.Tensor]] = defaultdict(list)

        for _ in range(gradient_steps):
            replay_data = self.replay_buffer.sample(batch_size, env=self._vec_normalize_env)  # type: ignore[union-attr]
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

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: np.ndarray,
        new_obs: np.ndarray | dict[str, np.ndarray],
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        raw_obs, raw_reward = new_obs, reward
        if self._vec_normalize_env is not None:
            raw_obs, raw_reward = self._vec_normalize_env.get_original_obs(), self._vec_normalize_env.get_original_reward()
        # observations first: a reward may have been computed from them
        check_finite("observation", raw_obs, self.num_timesteps, space=self.observation_space)
        # new_obs is the next episode's first one by then
        for env_idx in np.flatnonzero(dones):
            last_obs = infos[env_idx].get("terminal_observation")
            if last_obs is not None:
                check_finite("last observation", last_obs, self.num_timesteps, int(env_idx), self.observation_space)
        check_finite("reward", raw_reward, self.num_timesteps)
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        resets = reset_num_timesteps or self._last_obs is None
        if self.replay_buffer is not None and (resets or self._buffer_is_loaded):
            # what comes next is another episode: SB3 resets the environment, or the buffer came from another run
            end_trajectory(self.replay_buffer)
            self._buffer_is_loaded = False
        total_timesteps, callback = super()._setup_learn(
            total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar
        )
        first_obs = self._last_obs if self._vec_normalize_env is None else self._last_original_obs
        check_finite("first observation", first_obs, self.num_timesteps, space=self.observation_space)
        return total_timesteps, callback

    def load_replay_buffer(self, path: str | Path | io.BufferedIOBase, truncate_last_traj: bool = True) -> None:
        """
        Load a replay buffer from a pickle file.

        :param path: Path to the pickled replay buffer.
        :param truncate_last_traj: Whether the last episode in it ends there, with HER at once and else when training goes on
            (by default), or is the one that training goes on with
        """
        super().load_replay_buffer(path, truncate_last_traj)
        self._buffer_is_loaded = truncate_last_traj

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        env = self._wrap_env(env, self.verbose)
        check_vec_normalize(env)
        super().set_env(env, force_reset)

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

    @staticmethod
    def _read_parameters(load_path_or_dict: str | TensorDict, device: th.device | str) -> TensorDict:
        """Parameters as :meth:`set_parameters` takes them, of a file if it is the name of one."""
        if isinstance(load_path_or_dict, dict):
            return load_path_or_dict
        return load_from_zip_file(load_path_or_dict, device=device, load_data=False)[1]

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        super()._update_current_progress_remaining(num_timesteps, total_timesteps)
        # The last rollout may go on beyond the end, where no schedule was tried
        self._current_progress_remaining = max(self._current_progress_remaining, 0.0)

    def _update_ent_coef(self, entropy: th.Tensor) -> dict[str, th.Tensor]:
        """One step of the temperature: up while the policy's entropy is below its target, down while it is above."""
        assert self.log_ent_coef is not None
        assert self.ent_coef_optimizer is not None
        assert isinstance(self.target_entropy, float)
        ent_coef_loss = (self.log_ent_coef * (entropy - self.target_entropy)).mean()
        self.ent_coef_optimizer.zero_grad()
        ent_coef_loss.backward()
        self.ent_coef_optimizer.step()
        with th.no_grad():
            # where no policy reaches the target, the temperature would fall or rise for ever
            self.log_ent_coef.clamp_(math.log(MIN_ENT_COEF), math.log(MAX_ENT_COEF))
        return {"ent_coef_loss": ent_coef_loss.detach()}

    @th.no_grad()
    def _update_target(self) -> None:
        polyak_update(self.critic, self.critic_target, self.tau)

    @property
    def ent_coef_tensor(self) -> th.Tensor:
        """Current temperature, shape (1,), on the device."""
        if self.log_ent_coef is not None:
            return th.exp(self.log_ent_coef.detach())
        return th.full((1,), FloatSchedule(self.ent_coef)(self._current_progress_remaining), device=self.device)  # type: ignore[arg-type]

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
        values = th.stack([value for steps in stats.values() for value in steps])
        means = [float(part.mean()) for part in values.cpu().split([len(steps) for steps in stats.values()])]
        for key, value in zip(stats, means, strict=True):
            if not math.isfinite(value):
                raise ValueError(
                    f"{key} became {value} after {self._n_updates} updates, at step {self.num_timesteps}: training stopped. "
                    "Lower learning rates, or normalised observations and rewards (VecNormalize), may help."
                )
            self.logger.record_mean(f"train/{key}", value)

    def learn(
        self: SelfMaximumEntropy,
        total_timesteps: float,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfMaximumEntropy:
        check_number("total_timesteps", 0 if total_timesteps == math.inf else total_timesteps, 0.0)
        super().learn(
            # SB3 compares it with a step count: let 1e6 be written, and inf where a callback stops training
            total_timesteps=total_timesteps if total_timesteps == math.inf else int(total_timesteps),  # type: ignore[arg-type]
            callback=callback,
            log_interval=log_interval,
            tb_log_name=type(self).__name__ if tb_log_name is None else tb_log_name,
            reset_num_timesteps=reset_num_timesteps,
            progress_bar=progress_bar,
        )
        # the losses of the last update were those before it
        check_parameters(self.policy, self.num_timesteps)
        return self

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "critic", "critic_target"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        if self.ent_coef_optimizer is None:
            return ["policy"], []
        return ["policy", "ent_coef_optimizer"], ["log_ent_coef"]
