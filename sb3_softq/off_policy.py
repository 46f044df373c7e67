"""What Stable-Baselines3's off-policy algorithms lack: checks at the border, and trajectories that end at a reset."""

import copy
import io
import math
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise, VectorizedActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, RolloutReturn, TrainFreq
from stable_baselines3.common.vec_env import VecEnv

from sb3_softq.checks import (
    check_action_noise,
    check_choice,
    check_class,
    check_device,
    check_flag,
    check_integer,
    check_keywords,
    check_learning_rate,
    check_number,
    check_train_freq,
    check_type,
    is_of_a_library,
)
from sb3_softq.faults import check_step, evaluation_envs, explain, flatten, restore_statistics, statistics, watch
from sb3_softq.finite import check_finite, check_parameters
from sb3_softq.replay import check_replay_buffer, end_trajectory, follow_n_steps, store_last_step
from sb3_softq.sharing import Attended, OwnEpisodes, check_not_shared, is_as_left, trace
from sb3_softq.spaces import UnsupportedSpaceError, check_observation_space, check_vec_normalize

SelfChecked = TypeVar("SelfChecked", bound="CheckedOffPolicyAlgorithm")


class CheckedOffPolicyAlgorithm(OwnEpisodes):
    """
    Off-policy algorithm that refuses what cannot work when it is made, and stops at data that are not finite.

    :param policy: The policy model to use
    :param env: The environment to learn from (if registered in Gym, can be str)
    :param args: Further arguments of ``OffPolicyAlgorithm``, as ``kwargs``
    :param verbose: Verbosity level
    :param device: Device on which the code should be run
    :param _init_setup_model: Whether the constructor sets up the model, which it does not where ``load`` does
    :raises ValueError: if an argument is out of its range
    """

    # Whether the replay buffer ends with an episode of another run
    _buffer_is_loaded = False
    # Whether the next call of learn goes on in the middle of an episode, with the action noise of it
    _keeps_action_noise = False
    # Steps, and statistics of VecNormalize, when the newest transition was stored
    _stored: tuple[int, Any] = (0, [])
    # What learning_rate="auto" is where an algorithm has it: from the first linearly to the second within so many updates
    auto_learning_rate: ClassVar[tuple[float, float, int] | None] = None
    # Arguments that are converted to float if they came as another kind of number
    floats: tuple[str, ...] = ("learning_rate",)
    # Attributes that are converted to int if they came as another kind of number, and their smallest values
    integers: ClassVar[dict[str, int]] = {
        "buffer_size": 1,
        "batch_size": 1,
        "n_steps": 1,
        "_stats_window_size": 1,
        "learning_starts": 0,
        "gradient_steps": -1,
    }

    def __init__(
        self,
        policy: str | type[BasePolicy],
        env: GymEnv | str,
        *args: Any,
        verbose: int,
        device: th.device | str,
        _init_setup_model: bool,
        **kwargs: Any,
    ):
        # before SB3 uses them
        if env is not None:  # as load() begins without one
            check_type("env", env, (str, gym.Env, VecEnv), "an environment or its id", optional=False)
        if isinstance(policy, str):
            check_choice("policy", policy, self.policy_aliases)
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
        self._is_loaded = not _init_setup_model

    @staticmethod
    @abstractmethod
    def _check_action_space(space: spaces.Space[Any]) -> None:
        """Raise a ValueError if the algorithm cannot act in this space."""

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
        # one that was loaded may act in several environments, however it was trained
        self.train_freq = check_train_freq(self.train_freq, 1 if self._is_loaded else self.n_envs)
        # The RL Zoo loads agents that are only to act with a learning rate of 0
        may_be_auto = self.auto_learning_rate is not None
        check_learning_rate("learning_rate", self.learning_rate, may_be_zero=self._is_loaded, may_be_auto=may_be_auto)
        for name, minimum in self.integers.items():
            setattr(self, name, check_integer(name.removeprefix("_"), getattr(self, name), minimum))
        check_number("tau", self.tau, 0.0, 1.0)
        check_number("gamma", self.gamma, 0.0, 1.0)
        check_flag("optimize_memory_usage", self.optimize_memory_usage)
        check_replay_buffer(self.replay_buffer_class, self.n_steps, self.optimize_memory_usage, self.observation_space)
        if not (self._is_loaded and isinstance(self.action_noise, VectorizedActionNoise)):
            # a saved one is of as many environments as it had
            check_action_noise(self.action_noise, self.action_space, self.n_envs)
        if self.env is None and self.replay_buffer is None and _is_her(self.replay_buffer_class):
            raise ValueError("env=None is not allowed: a HerReplayBuffer must have an environment, which computes its rewards")
        check_keywords("policy_kwargs", self.policy_kwargs, self.policy_class)
        if self.env is not None:
            check_vec_normalize(self.env)

    def _setup_model(self) -> None:
        # here, not in the constructor: load() fills in the arguments later
        self._check_arguments()
        self._convert_numbers()
        # SB3 writes the buffer that it chooses over the first two, and load() would take it for the user's
        buffer_class, buffer_kwargs, policy_kwargs = self.replay_buffer_class, self.replay_buffer_kwargs, self.policy_kwargs
        self.replay_buffer_kwargs = buffer_kwargs.copy()
        self.policy_kwargs = self._policy_arguments()
        # an environment that cannot be seeded is no fault of the arguments
        self.set_random_seed(self.seed)
        try:
            super()._setup_model()
        except (AssertionError, AttributeError, RuntimeError, TypeError) as error:
            networks = self.policy_class, self.policy_kwargs.get("features_extractor_class", self.policy_class)
            if isinstance(error, th.OutOfMemoryError) or not all(is_of_a_library(cls) for cls in networks):
                # the user's own code has other reasons to fail
                raise
            if self.replay_buffer is None:
                raise ValueError(
                    f"replay_buffer_kwargs={buffer_kwargs!r} is not allowed: it must be what the replay buffer takes "
                    f"({type(error).__name__}: {error})"
                ) from error
            # of the networks, for instance a NatureCNN that is given no image
            raise UnsupportedSpaceError(
                f"policy={self.policy_class.__name__!r} with policy_kwargs={policy_kwargs!r} is not allowed: it must be "
                f"one that can be built for observation_space={self.observation_space!r} ({type(error).__name__}: {error})"
            ) from error
        self.replay_buffer_class, self.replay_buffer_kwargs, self.policy_kwargs = buffer_class, buffer_kwargs, policy_kwargs

    def _setup_lr_schedule(self) -> None:
        if isinstance(self.learning_rate, str):
            self.lr_schedule = self._auto_lr
        else:
            super()._setup_lr_schedule()

    def _auto_lr(self, progress_remaining: float) -> float:
        """By the updates so far: no length of training is needed, and a further call of ``learn`` goes on."""
        assert self.auto_learning_rate is not None
        first, last, n_updates = self.auto_learning_rate
        return first + (last - first) * min(self._n_updates / n_updates, 1.0)

    def _policy_arguments(self) -> dict[str, Any]:
        """``policy_kwargs`` and what the algorithm's own arguments add to them; load() compares the user's alone."""
        return self.policy_kwargs

    def _convert_numbers(self) -> None:
        """FloatSchedule takes few of numpy's numbers."""
        for name in self.floats:
            if isinstance(getattr(self, name), int | np.number):
                setattr(self, name, float(getattr(self, name)))

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
        if not np.isfinite(buffer_action).all():
            # what the environment made of it is no fault of its own
            check_finite("action", buffer_action, self.num_timesteps)
        check_step(raw_obs, raw_reward, dones, infos, self.observation_space, self.num_timesteps)
        # observations first: a reward may have been computed from them
        check_finite("observation", raw_obs, self.num_timesteps, space=self.observation_space)
        # new_obs is the next episode's first one by then
        for env_idx in np.flatnonzero(dones):
            last_obs = infos[env_idx].get("terminal_observation")
            if last_obs is not None:
                check_finite("last observation", last_obs, self.num_timesteps, int(env_idx), self.observation_space)
        check_finite("reward", raw_reward, self.num_timesteps)
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)
        self._stored = self.num_timesteps, statistics(self._vec_normalize_env)
        if self._is_disturbed:
            self._begin_episode()

    @contextmanager
    def _faults_explained(self) -> Iterator[None]:
        """Where an environment fails, the error says which one and at which step."""
        try:
            yield
        except Exception as error:
            fault = None if self.env is None else explain(error, self.env, self.num_timesteps)
            if fault is None:
                raise
            raise fault from error

    def collect_rollouts(
        self,
        env: VecEnv,
        callback: BaseCallback,
        train_freq: TrainFreq,
        replay_buffer: ReplayBuffer,
        action_noise: ActionNoise | None = None,
        learning_starts: int = 0,
        log_interval: int | None = None,
    ) -> RolloutReturn:
        with self._faults_explained():
            rollout = super().collect_rollouts(
                env, Attended(callback, self), train_freq, replay_buffer, action_noise, learning_starts, log_interval
            )
            if not rollout.continue_training:
                store_last_step(self, callback.locals)
            if not rollout.continue_training or self.num_timesteps >= self._total_timesteps:
                self._begin_episode_if_shared()
                # with what callbacks have set
                self._left = trace(env)
        return rollout

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        if self.replay_buffer is not None and self.replay_buffer.n_envs != self.n_envs:
            raise ValueError(
                f"replay_buffer with transitions of n_envs={self.replay_buffer.n_envs} is not allowed for learn(): it must be "
                f"n_envs={self.n_envs}, as env has"
            )
        check_train_freq(self.train_freq, self.n_envs)
        if not is_as_left(self.env, self._left):
            # the last observation is no longer that of the environment
            self._last_obs = None
        self._begin_learning(reset_num_timesteps)
        resets = reset_num_timesteps or self._last_obs is None
        if self.replay_buffer is not None and (resets or self._buffer_is_loaded):
            # what comes next is another episode: SB3 resets the environment, or the buffer came from another run
            end_trajectory(self.replay_buffer)
            self._buffer_is_loaded = False
        # SB3 resets it
        noise = copy.deepcopy(self.action_noise) if self._keeps_action_noise and not resets else None
        if isinstance(self.action_noise, VectorizedActionNoise) and self.action_noise.n_envs != self.n_envs:
            # of an agent that was saved with another number of environments; SB3 makes one of the new number
            self.action_noise = self.action_noise.base_noise
        with self._faults_explained():
            total_timesteps, callback = super()._setup_learn(
                total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar
            )
        if noise is not None:
            self.action_noise = noise
        self._keeps_action_noise = False
        self._episode_has_begun()
        self._stored = self.num_timesteps, statistics(self._vec_normalize_env)
        return total_timesteps, callback

    def _begin_learning(self, reset_num_timesteps: bool) -> None:
        """What an algorithm does at every call of ``learn``, before the environment is reset."""

    def keep_action_noise(self) -> None:
        """Have the next call of ``learn(..., reset_num_timesteps=False)`` leave it as it is."""
        self._keeps_action_noise = True

    def load_replay_buffer(self, path: str | Path | io.BufferedIOBase, truncate_last_traj: bool = True) -> None:
        """
        Load a replay buffer from a pickle file.

        :param path: Path to the pickled replay buffer.
        :param truncate_last_traj: Whether the last episode in it ends there, with HER at once and else when training goes on
            (by default), or is the one that training goes on with
        :raises ValueError: if it is one of n-step returns and the agent's is not, or the other way round
        """
        own = self.replay_buffer
        super().load_replay_buffer(path, truncate_last_traj)
        try:
            follow_n_steps(self.replay_buffer, own)
        except ValueError:
            self.replay_buffer = own
            raise
        self._buffer_is_loaded = truncate_last_traj

    @staticmethod
    def _wrap_env(env: GymEnv, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        env = OffPolicyAlgorithm._wrap_env(env, verbose, monitor_wrapper)
        watch(env)
        return env

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        env = self._wrap_env(env, self.verbose)
        check_vec_normalize(env)
        super().set_env(env, force_reset)
        self._left = None
        if isinstance(self.replay_buffer, HerReplayBuffer):
            # which computes the rewards of other goals
            self.replay_buffer.env = env

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        super()._update_current_progress_remaining(num_timesteps, total_timesteps)
        # The last rollout may go on beyond the end, where no schedule was tried
        self._current_progress_remaining = max(self._current_progress_remaining, 0.0)

    def learn(
        self: SelfChecked,
        total_timesteps: float,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfChecked:
        # a run that goes on may have gone beyond its end by its last rollout
        least = 0.0 if reset_num_timesteps else -math.inf
        check_number("total_timesteps", 0 if total_timesteps == math.inf else total_timesteps, least)
        total_timesteps = max(total_timesteps, 0)
        self._stored = self.num_timesteps, statistics(self._vec_normalize_env)
        for env in evaluation_envs(callback):
            check_not_shared(env, self.env)
            watch(env)
        try:
            super().learn(
                # SB3 compares it with a step count: let 1e6 be written, and inf where a callback stops training
                total_timesteps=total_timesteps if total_timesteps == math.inf else int(total_timesteps),  # type: ignore[arg-type]
                callback=callback,
                log_interval=log_interval,
                tb_log_name=type(self).__name__ if tb_log_name is None else tb_log_name,
                reset_num_timesteps=reset_num_timesteps,
                progress_bar=progress_bar,
            )
        except BaseException as error:
            self._return_to_stored()
            for each in flatten(callback):
                # SB3 tells callbacks of no error
                if hasattr(each, "on_training_error"):
                    each.on_training_error(error)
            raise
        # the losses of the last update were those before it
        check_parameters(self.policy, self.num_timesteps)
        return self

    def _return_to_stored(self) -> None:
        """Forget a step whose transition was not stored; what the environments do next is another episode."""
        self.num_timesteps, normalisation = self._stored
        restore_statistics(normalisation)
        self._last_obs = None

    def _excluded_save_params(self) -> list[str]:
        # which are made from the learning rates
        schedules = [name for name in vars(self) if name.endswith("lr_schedule")]
        return [*super()._excluded_save_params(), "_is_loaded", "_keeps_action_noise", "_stored", *schedules]


def _is_her(cls: type[ReplayBuffer] | None) -> bool:
    return cls is not None and issubclass(cls, HerReplayBuffer)
