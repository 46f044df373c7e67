"""SoftQ: soft Q-learning with a sampling actor, as an off-policy algorithm of Stable-Baselines3."""

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, PyTorchObs, ReplayBufferSamples, Schedule, TensorDict
from stable_baselines3.common.utils import FloatSchedule, LinearSchedule, update_learning_rate

from sb3_softq.actor import N_EXPERTS, TEACHING_FLOOR, SamplingActor, entropy_bounds
from sb3_softq.annealing import Annealing
from sb3_softq.base import MaximumEntropyAlgorithm
from sb3_softq.checks import check_compiler, check_flag, check_learning_rate, check_number
from sb3_softq.cloning import BehaviourCloning
from sb3_softq.critic import ParticleCritic, min_q_values, with_stacked_optimizer
from sb3_softq.observations import batch_size, evenly_spaced
from sb3_softq.optimization import LossAndStats, minimize
from sb3_softq.options import ParticleOptions
from sb3_softq.own_target import OwnTarget
from sb3_softq.policies import CnnPolicy, MlpPolicy, MultiInputPolicy, SoftQPolicy
from sb3_softq.queries import Queries
from sb3_softq.returns import ScaledReturns
from sb3_softq.soft_value import effective_sample_size, mixture_log_prob_and_score, soft_value, tanh_log_det, uniform_proposal
from sb3_softq.spaces import check_action_space
from sb3_softq.stein import birth_death_rates, stein_direction, tanh_log_det_grad, weighted_mean


class SoftQ(Queries, BehaviourCloning, OwnTarget, ScaledReturns, MaximumEntropyAlgorithm):
    """
    Soft Q-learning (Haarnoja et al. 2017, https://arxiv.org/abs/1702.08165): a maximum-entropy agent
    pi(a|s) = exp((Q(s, a) - V(s)) / alpha) whose actor is a sampler, and therefore covers several modes.

    The critics regress on r + gamma V(s'), with the soft value V estimated from particles (:meth:`critic_loss`). They have
    batch normalisation and no target networks, as in CrossQ (Bhatt et al. 2024, https://arxiv.org/abs/1902.05605). The actor
    follows amortized Stein variational gradient descent (:meth:`actor_loss`), and the temperature adapts to an entropy target
    as in SAC. The exponential moving average (EMA) of the actor's weights is the policy that is learned: ``predict`` asks it.

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, MultiInputPolicy)
    :param env: The environment to learn from (if registered in Gym, can be str)
    :param ent_coef: Temperature alpha (the inverse of the reward scale of 2017): ``"auto_0.01"`` learns it from 0.01, with
        ``normalize_rewards`` in units of the returns' scale, and so does ``"auto"`` (without, from 1 as SAC); a positive float
        or a function of the progress remaining sets it, in the environment's units; the scale stays that of the hottest one
    :param n_value_particles: Number K of particles per next state in the soft value
    :param n_actor_particles: Number of particles per state in an actor update, at least 2 where there are several experts
    :param compile: Whether the updates are compiled with ``torch.compile``, which takes some seconds at their first call,
        a C++ compiler and a release of torch that traces gradients (2.13 does)
    :param learning_rate: learning rate of critics and actor, float or function of the progress remaining (from 1 to 0); by
        default it falls linearly from 1e-3 to 3e-4 within a call of ``learn``, with ``"auto"`` over the first 50,000 updates
    :param buffer_size: size of the replay buffer
    :param learning_starts: how many steps of the model to collect transitions for before learning starts
    :param batch_size: Minibatch size for each gradient update, at least 2 with batch normalisation
    :param tau: the soft update coefficient ("Polyak update", between 0 and 1) of the target networks. With 1 the critics are
        their own target (at every step, ``target_update_interval=1``) and need batch normalisation; SAC's, without it, is
        ``tau=0.005, learning_rate=3e-4, policy_kwargs=dict(batch_norm=False)``
    :param gamma: the discount factor
    :param train_freq: Update the model every ``train_freq`` steps, or a tuple of frequency and unit like ``(2, "episode")``
    :param gradient_steps: How many gradient steps to do after each rollout; ``-1`` for as many as it had steps
    :param action_noise: the action noise type (None by default), in addition to the policy's own sampling
    :param replay_buffer_class: Replay buffer class to use (for instance ``HerReplayBuffer``), None for the usual one
    :param replay_buffer_kwargs: Keyword arguments to pass to the replay buffer on creation.
    :param optimize_memory_usage: Enable a memory efficient variant of the replay buffer at a cost of more complexity.
    :param n_steps: When n_step > 1, uses n-step return (with the NStepReplayBuffer) when updating the Q-value network.
    :param target_entropy: Target of the policy's entropy in nats over the normalised box (-1, 1)^d when ``ent_coef`` is
        learned, from -3.58 d, that of the narrowest particle, to d log(2), that of uniform actions. ``"auto"`` is -d.
    :param target_update_interval: update the target network every so many gradient steps
    :param actor_tau: Polyak coefficient, in (0, 1], of the EMA actor, which also gives the particles of the soft value (the
        place of the target policy of DDPG and TD3); the trained actor collects data. It begins as an average over the last
        ninth of the updates, until this is longer than ``1 / actor_tau``, and anew where there are no data. 1 does without
    :param normalize_rewards: Whether the critics' loss, and a learned temperature, are in units of the scale of discounted
        returns (:class:`sb3_softq.returns.ReturnScale`), so that rewards may be of any size. All that is asked of the agent
        is in the environment's units. Without it the critics predict a number (``n_bins=1``)
    :param policy_delay: Update the actor and the temperature once every ``policy_delay`` updates of the critics
    :param actor_learning_rate: learning rate of the actor, float or function of the progress remaining, if it shall differ
    :param ent_coef_learning_rate: that of the log of a learned temperature; 1e-3 by default, or ``learning_rate`` if larger
    :param bfloat16: Whether matrix products of the updates are done in bfloat16, on hardware that has them fast
    :param particle_options: What SQL (2017) and ablations need, a :class:`sb3_softq.ParticleOptions` or a dict of its fields.
        ``SoftQ(policy, env, ent_coef=..., **sb3_softq.SQL_2017)`` is SQL (2017).
    :param stats_window_size: Number of episodes over which the rollout logging averages success rate, length and reward
    :param tensorboard_log: the log location for tensorboard (if None, no logging)
    :param policy_kwargs: additional arguments to be passed to the policy on creation, see :class:`SoftQPolicy`
    :param verbose: 0 for no output, 1 for info messages (such as device or wrappers used), 2 for debug messages
    :param seed: Seed for the pseudo random generators
    :param device: Device (cpu, cuda, ...) on which the code should be run; "auto" is the GPU if possible
    :param _init_setup_model: Whether or not to build the network at the creation of the instance
    :raises ValueError: if an argument is out of its range
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = dict(
        MlpPolicy=MlpPolicy, CnnPolicy=CnnPolicy, MultiInputPolicy=MultiInputPolicy
    )
    policy: SoftQPolicy
    actor: SamplingActor
    critic: ParticleCritic
    action_space: spaces.Box
    auto_learning_rate = (1e-3, 3e-4, 50_000)
    has_experts = False  # of agents of release 0.1.0, whose actor is a single sampler
    saved_dataclasses = ScaledReturns.saved_dataclasses | {"particle_options": ParticleOptions, "annealing_clock": Annealing}
    floats = (*MaximumEntropyAlgorithm.floats, "actor_learning_rate")
    integers = MaximumEntropyAlgorithm.integers | {"policy_delay": 1, "n_value_particles": 1, "n_actor_particles": 1}

    def __init__(
        self,
        policy: str | type[SoftQPolicy],
        env: GymEnv | str,
        learning_rate: float | str | Schedule = LinearSchedule(1e-3, 3e-4, 1.0),
        buffer_size: int = 1_000_000,  # 1e6
        learning_starts: int = 100,
        batch_size: int = 256,
        tau: float = 1.0,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int = 1,
        action_noise: ActionNoise | None = None,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        n_steps: int = 1,
        ent_coef: str | float | Schedule = "auto_0.01",
        target_entropy: str | float = "auto",
        target_update_interval: int = 1,
        actor_tau: float = 1e-3,
        normalize_rewards: bool = True,
        policy_delay: int = 1,
        n_value_particles: int = 2,
        n_actor_particles: int = 4,
        actor_learning_rate: float | Schedule | None = None,
        ent_coef_learning_rate: float | Schedule | None = None,
        bfloat16: bool = False,
        compile: bool = False,
        particle_options: ParticleOptions | Mapping[str, Any] | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ):
        # in SB3's order
        common = (policy, env, learning_rate, buffer_size, learning_starts, batch_size, tau, gamma, train_freq, gradient_steps)
        super().__init__(
            *common,
            action_noise,
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
            device=device,
            seed=seed,
            _init_setup_model=_init_setup_model,
        )
        self.actor_tau = actor_tau
        self.policy_delay = policy_delay
        self.n_value_particles = n_value_particles
        self.n_actor_particles = n_actor_particles
        self.actor_learning_rate = actor_learning_rate
        self.bfloat16 = bfloat16
        self.compile = compile
        self.particle_options = ParticleOptions.of(particle_options)
        self.annealing_clock = Annealing()
        if _init_setup_model:
            self._setup_model()

    # ------------------------------------------------------------------ the critics' update

    def update_critic(self, replay_data: ReplayBufferSamples, ent_coef: th.Tensor) -> dict[str, th.Tensor]:
        """One step of the critics, see :meth:`critic_loss`."""
        self._build_target()
        return self._minimize(type(self).critic_loss, self.critic.optimizer, replay_data, ent_coef)

    def critic_loss(self, replay_data: ReplayBufferSamples, ent_coef: th.Tensor) -> LossAndStats:
        """
        Distance of Q(s, a) to r + gamma V(s'), eq. (11) of https://arxiv.org/abs/1702.08165 with a cross-entropy in place of
        the square (:meth:`ParticleCritic.loss`), with the soft value V of eq. (10), :func:`sb3_softq.soft_value.soft_value`,
        from particles of the EMA actor.

        :param replay_data: Minibatch
        :param ent_coef: Temperature, shape (1,)
        :return: Loss, and scalars for the log
        """
        # For n-step replay, discount factor is gamma**n_steps (when no early termination)
        discounts = replay_data.discounts if replay_data.discounts is not None else self.gamma
        obs, actions, next_obs = replay_data.observations, replay_data.actions, replay_data.next_observations
        # (batch_size, n_value_particles, action_dim), and log q of eq. (10)
        u, log_prob_a = self.propose(next_obs, self.n_value_particles)
        next_actions = th.tanh(u)
        # (n_critics, batch_size, n_bins), and with an axis for the particles before the last
        if self.policy.batch_norm:
            outputs, next_outputs = self.critic.joint_outputs(obs, actions, next_obs, next_actions)
        else:
            outputs = self.critic.outputs(self.critic.features(obs), actions.unsqueeze(1)).squeeze(2)
        with th.no_grad():
            if self._has_target:
                next_outputs = self.critic_target.outputs(self.critic_target.features(next_obs), next_actions)
            # (batch_size, n_value_particles)
            next_q_values = self.critic.q_of(next_outputs).amin(dim=0)
            next_values = soft_value(next_q_values, log_prob_a, ent_coef).unsqueeze(1)
            targets = replay_data.rewards + (1 - replay_data.dones) * discounts * next_values
            sample_size = effective_sample_size(next_q_values, log_prob_a, ent_coef).mean()
            q_value = self.critic.q_of(outputs).mean()

        loss = self.critic.loss(outputs, targets.squeeze(1))
        return loss, {"critic_loss": loss.detach(), "q_value": q_value, "effective_sample_size": sample_size}

    def propose(self, obs: PyTorchObs, n_particles: int) -> tuple[th.Tensor, th.Tensor]:
        """Particles of the soft value, and their log-density, as :meth:`SamplingActor.propose` has them."""
        if self.particle_options.proposal == "policy":
            return self.ema_actor.propose(obs, n_particles)
        return uniform_proposal(batch_size(obs), n_particles, self.actor.action_dim, self.device)

    # ------------------------------------------------------------------ the actor's update

    def update_actor(self, replay_data: ReplayBufferSamples, ent_coef: th.Tensor) -> dict[str, th.Tensor]:
        """One step of the actor, see :meth:`actor_loss`, and of its exponential moving average."""
        obs = evenly_spaced(replay_data.observations, self.particle_options.n_actor_states)
        stats = self._minimize(type(self).actor_loss, self.actor.optimizer, obs, ent_coef * self._annealing())
        self.policy.update_ema_actor(self.actor_tau)
        # the quantity that the actor maximizes, with the sign of a loss
        return {"actor_loss": -(stats.pop("actor_q_value") + ent_coef * stats["entropy"]), **stats}

    def actor_loss(self, obs: PyTorchObs, ent_coef: th.Tensor) -> LossAndStats:
        """
        -<stop_gradient(phi(u)), u>, whose gradient is eq. (14) of https://arxiv.org/abs/1702.08165, with the Stein direction
        phi of eq. (13), :func:`sb3_softq.stein.stein_direction`, in the space of pre-tanh actions u.

        :param obs: Observations
        :param ent_coef: Temperature of the Stein step, shape (1,)
        :return: Loss, and scalars for the log
        """
        actor, options, n_particles = self.actor, self.particle_options, self.n_actor_particles
        by_density, learned = options.repulsion == "density", actor.smoothing == "learned"
        features = actor.features(obs)
        # The critics' gradient is evaluated at the first particles, the last ones move: all do both, or two parts
        n_fixed = options.n_fixed_particles(n_particles)
        fixed, updated = slice(0, n_fixed or None), slice(n_fixed, None)
        n_further = options.density_particles(n_particles, actor.n_experts)
        experts = actor.spread_experts(len(features), n_particles + n_further)  # (batch_size, n_particles + n_further)
        log_gate = actor.log_weights(features, experts)
        log_weights = log_gate[:, :n_particles]
        noise = actor.noise(experts[:, :n_particles])
        mean, log_std = actor.particles(features, noise, n_constant=0 if learned else n_fixed)
        # (batch_size, n_particles, action_dim)
        offset = th.zeros_like(mean) if actor.smoothing == "none" else th.exp(log_std) * th.randn_like(mean)
        u = (mean + offset).detach()

        u_fixed = u[:, fixed].requires_grad_(True)
        q_values = min_q_values(self.critic, obs, u_fixed)
        (q_force,) = th.autograd.grad(q_values.sum(), u_fixed)
        components = mean, log_std
        if n_further > 0:
            # Further particles make the density true, and cost no evaluation of the critics
            with th.no_grad():
                further = actor.particles(features, actor.noise(experts[:, n_particles:]))
            components = th.cat([mean, further[0]], dim=1), th.cat([log_std, further[1]], dim=1)
        # bfloat16 has enough digits for the networks, not for densities and kernels
        with th.no_grad(), th.autocast(self.device.type, enabled=False):
            taught_weights = th.log_softmax(log_gate.clamp(min=math.log(TEACHING_FLOOR / actor.n_experts)), dim=1)
            log_prob, score = mixture_log_prob_and_score(u, *components, taught_weights)
            log_prob_a = log_prob - tanh_log_det(u)
            kernel_force = q_force + ent_coef * tanh_log_det_grad(u[:, fixed])
            density_force = kernel_force - ent_coef * score[:, fixed]
            phi = stein_direction(
                particles=u[:, fixed],
                force=density_force if by_density else kernel_force,
                updated=u[:, updated] if n_fixed else None,
                kernel=options.kernel,
                repulsion=0.0 if by_density else ent_coef,
            )
            spread = (u - u.mean(dim=1, keepdim=True)).square().mean().sqrt()

        # The component means move together, through the kernel; how wide each component is, is its own business, the same
        # direction with a kernel of bandwidth 0.
        loss = -(phi * mean[:, updated]).sum(dim=2).mean()
        if learned:
            loss = loss - (density_force * offset[:, fixed]).sum(dim=2).mean() / density_force.shape[1]
        if actor.gate is not None:
            rates = birth_death_rates(q_values.detach(), log_prob_a[:, fixed], log_weights.detach()[:, fixed], ent_coef)
            loss = loss - (rates * log_weights[:, fixed]).mean()
        return loss / self.critic.return_scale.squeeze(), {  # for Adam, whose epsilon is a size of gradients
            "actor_q_value": weighted_mean(q_values.detach(), log_weights.detach()[:, fixed]),
            "entropy": -weighted_mean(log_prob_a, log_weights.detach()),
            "particle_std": spread,
            "smoothing_std": log_std.detach().exp().mean(),
        }

    def _annealing(self) -> float:
        """Factor of the temperature in the actor's step; a learned temperature anneals by itself."""
        annealing, progress = self.particle_options.annealing, self._current_progress_remaining
        if not isinstance(annealing, str):
            return FloatSchedule(annealing)(progress)
        # offline updates in the middle of a training are no part of its length
        part = None if self._is_offline and self.num_timesteps > 0 else progress
        return 1.0 if self.log_ent_coef is not None else self.annealing_clock.factor(part, self._n_updates)

    def _minimize(self, loss: Callable[..., LossAndStats], optimizer: th.optim.Optimizer, *args: Any) -> dict[str, th.Tensor]:
        """One step down a loss that is a method of this agent's class, in bfloat16 and compiled as configured."""
        return minimize(loss, (self, *args), optimizer, self.device, self.bfloat16, self.compile)

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        """The trained actor collects: an average that hardly moves tries less, and its critics hear late of their errors."""
        if self.num_timesteps < learning_starts:
            return super()._sample_action(learning_starts, action_noise, n_envs)
        assert self._last_obs is not None
        scaled_action = self.policy.scale_action(self.actor.predict(self._last_obs)[0])
        if action_noise is not None:
            scaled_action = np.clip(scaled_action + action_noise(), -1, 1)
        return self.policy.unscale_action(scaled_action), scaled_action

    # ------------------------------------------------------------------ checks, set-up, saving

    _check_action_space = staticmethod(check_action_space)

    def _check_arguments(self) -> None:
        super()._check_arguments()
        self.particle_options = ParticleOptions.adopt(self.__dict__)
        self.has_experts = self.has_experts or not self._is_loaded
        if self.actor_learning_rate is not None:
            check_learning_rate("actor_learning_rate", self.actor_learning_rate)
        check_number("actor_tau", self.actor_tau, 0.0, 1.0, open_low=True)
        n_experts = self.policy_kwargs.get("n_experts", N_EXPERTS) if self.has_experts else 1
        self.particle_options.check(self.n_actor_particles, self.policy_kwargs.get("smoothing", "learned"), n_experts)
        if self.batch_size == 1 and self.policy_kwargs.get("batch_norm", True):
            allowed = "an integer >= 2 with batch normalisation (policy_kwargs=dict(batch_norm=False) does without)"
            raise ValueError(f"batch_size=1 is not allowed: it must be {allowed}")
        check_flag("bfloat16", self.bfloat16)
        check_flag("compile", self.compile)
        if self.compile and not self._is_loaded:  # an agent that was trained elsewhere may act where nothing compiles
            check_compiler(self.device)

    def _policy_arguments(self) -> dict[str, Any]:
        return ({} if self.has_experts else {"n_experts": 1}) | super()._policy_arguments()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"annealing_clock": Annealing()} | state)
        self.particle_options = ParticleOptions.adopt(self.__dict__)

    def _begin_learning(self, reset_num_timesteps: bool) -> None:
        if self.compile:
            check_compiler(self.device)
        super()._begin_learning(reset_num_timesteps)
        self.annealing_clock.begin(self.num_timesteps, reset_num_timesteps, self._n_updates)
        if not self.has_data:
            self.policy.begin_average()

    def _setup_lr_schedule(self) -> None:
        super()._setup_lr_schedule()
        self.actor_lr_schedule = None if self.actor_learning_rate is None else FloatSchedule(self.actor_learning_rate)

    def _auto_target_entropy(self) -> float:
        return -float(math.prod(self.action_space.shape))

    def _entropy_bounds(self) -> tuple[float, float]:
        return entropy_bounds(math.prod(self.action_space.shape), self.policy_kwargs.get("smoothing", "learned"))

    def _optimizers(self) -> list[th.optim.Optimizer]:
        return [self.actor.optimizer, self.critic.optimizer]

    def _update_learning_rates(self) -> None:
        super()._update_learning_rates()
        if self.actor_lr_schedule is not None:
            update_learning_rate(self.actor.optimizer, self.actor_lr_schedule(self._current_progress_remaining))

    def _create_aliases(self) -> None:
        self.actor = self.policy.actor
        self.critic = self.policy.critic
        self._build_target()

    def set_parameters(
        self, load_path_or_dict: str | TensorDict, exact_match: bool = True, device: th.device | str = "auto"
    ) -> None:
        params = self._read_parameters(load_path_or_dict, device)
        super().set_parameters(with_stacked_optimizer(self.critic, params), exact_match, device)
        given: Mapping[str, Any] = dict(params.get("policy", {}))
        if self._n_updates > 0 and "n_averaged" not in given and any(name.startswith("critic.") for name in given):
            self.policy.n_averaged, self.policy.is_taught = self._n_updates / self.policy_delay, True  # of release 0.1.0

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "actor"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts, tensors = super()._get_torch_save_params()
        return [*state_dicts, "actor.optimizer", "critic.optimizer"], tensors
