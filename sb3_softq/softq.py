"""SoftQ: soft Q-learning with a sampling actor, as an off-policy algorithm of Stable-Baselines3."""

import math
from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, PyTorchObs, ReplayBufferSamples, Schedule, TensorDict
from stable_baselines3.common.utils import FloatSchedule, update_learning_rate

from sb3_softq.base import MaximumEntropyAlgorithm
from sb3_softq.checks import (
    MAX_ENT_COEF,
    check_action_space,
    check_choice,
    check_compiler,
    check_flag,
    check_integer,
    check_learning_rate,
    check_number,
    check_schedule,
)
from sb3_softq.policies import (
    LOG_STD_MIN,
    CnnPolicy,
    MlpPolicy,
    MultiInputPolicy,
    ParticleCritic,
    SamplingActor,
    SoftQPolicy,
)
from sb3_softq.soft_value import (
    LOCAL_STD_MIN,
    effective_sample_size,
    mixture_log_prob,
    mixture_log_prob_and_score,
    soft_value,
    tanh_log_det,
    uniform_log_prob,
)
from sb3_softq.stein import KernelName, stein_direction, tanh_log_det_grad

ProposalName = Literal["policy", "uniform", "mixture"]
RepulsionName = Literal["density", "kernel"]

# Where ent_coef is fixed, the actor starts ANNEALING times as hot, so that modes are found before they are kept. The factor
# falls to 1 within a part of training, or a number of updates if that is less: exploration of a long run is not its business.
ANNEALING = 20.0
ANNEALING_PART = 2 / 3
ANNEALING_UPDATES = 10_000
# Particles of the estimates that a user asks for, where accuracy counts more than speed
N_QUERY_PARTICLES = 256


class SoftQ(MaximumEntropyAlgorithm):
    """
    Soft Q-learning (Haarnoja et al. 2017, https://arxiv.org/abs/1702.08165): a maximum-entropy agent
    pi(a|s) = exp((Q(s, a) - V(s)) / alpha) whose actor is a sampler, and therefore keeps several good ways of acting.

    The critic regresses on r + gamma V(s') with the soft value V estimated from particles
    (:func:`sb3_softq.soft_value.soft_value`). It has batch normalisation and no target networks, as in CrossQ
    (Bhatt et al. 2024, https://arxiv.org/abs/1902.05605), but with the gradient of batch renormalisation
    (:func:`sb3_softq.policies.renormalised_forward`). The actor follows amortized Stein variational gradient descent
    (:func:`sb3_softq.stein.stein_direction`), and the temperature adapts to a target entropy as in SAC. An average of the
    actor's weights over the last updates is the policy that was learned; the newest actor only explores.

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, MultiInputPolicy)
    :param env: The environment to learn from (if registered in Gym, can be str)
    :param learning_rate: learning rate of the critics and, unless ``actor_learning_rate`` is given, the actor;
        it can be a function of the current progress remaining (from 1 to 0)
    :param buffer_size: size of the replay buffer
    :param learning_starts: how many steps of the model to collect transitions for before learning starts
    :param batch_size: Minibatch size for each gradient update, at least 2 with batch normalisation
    :param tau: the soft update coefficient ("Polyak update", between 0 and 1) of the target critics. With 1 the critics
        are their own target, for which they need batch normalisation; SAC's, without it, is
        ``tau=0.005, learning_rate=3e-4, policy_kwargs=dict(batch_norm=False)``
    :param gamma: the discount factor
    :param train_freq: Update the model every ``train_freq`` steps. Alternatively pass a tuple of frequency and unit
        like ``(5, "step")`` or ``(2, "episode")``.
    :param gradient_steps: How many gradient steps to do after each rollout (see ``train_freq``)
        Set to ``-1`` means to do as many gradient steps as steps done in the environment during the rollout.
    :param action_noise: the action noise type (None by default), in addition to the policy's own sampling
    :param replay_buffer_class: Replay buffer class to use (for instance ``HerReplayBuffer``).
        If ``None``, it will be automatically selected.
    :param replay_buffer_kwargs: Keyword arguments to pass to the replay buffer on creation.
    :param optimize_memory_usage: Enable a memory efficient variant of the replay buffer at a cost of more complexity.
    :param n_steps: When n_step > 1, uses n-step return (with the NStepReplayBuffer) when updating the Q-value network.
    :param ent_coef: Temperature alpha (the inverse of the reward scale of the original): ``"auto_0.1"`` learns it
        from the initial value 0.1, ``"auto"`` from 1; a positive float, or a function of the progress remaining, sets it.
    :param target_entropy: Target of the policy's entropy in nats over the normalised box (-1, 1)^d when ``ent_coef`` is
        learned, from -3.58 d, that of the narrowest particle, to d log(2), that of uniform actions. ``"auto"`` is -d.
    :param target_update_interval: update the target network every ``target_update_interval`` gradient steps
    :param actor_tau: Step, in (0, 1], of the averaged actor towards the one that is trained, after each of its updates. The
        averaged actor is what ``predict`` and the queries ask, and gives the particles of the soft value (the place of the
        target policy of DDPG and TD3); training collects its data with the other. It begins as an average over the last
        ninth of the updates, until this is longer than ``1 / actor_tau``. 1 does without
    :param policy_delay: Update the actor and the temperature once every ``policy_delay`` updates of the critics
    :param n_value_particles: Number K of particles per next state in the soft value
    :param n_actor_particles: Number of particles per state in an actor update
    :param n_actor_states: Number of states of the minibatch in an actor update, at most ``batch_size``
    :param n_density_particles: Number of further particles per state that only help to evaluate the density of those
        that move
    :param proposal: Where the particles of the soft value come from: ``"policy"``, ``"uniform"`` over the action box,
        or ``"mixture"``, half of each (``n_value_particles`` >= 2)
    :param kernel: Kernel of the Stein step: ``"rbf"``, ``"imq"`` (inverse multiquadric) or ``"delta"`` (its limit of
        bandwidth 0)
    :param bandwidth: Bandwidth of the kernel in squared units of the pre-tanh action, ``"median"`` for the heuristic
    :param repulsion: What keeps the particles apart: the ``"density"`` of the sampler, or the gradient of the
        ``"kernel"`` as in the original (see :func:`sb3_softq.stein.stein_direction`)
    :param kernel_update_ratio: In (0, 1): splits the actor's particles into a fixed part, where the critic's gradient is
        evaluated, and an updated part of this share, which moves (0.5 in the original). By default every particle is both.
    :param annealing: Factor of the temperature in the actor's step (the critic's target keeps ``ent_coef``): a float >= 1
        or a function of the progress remaining. ``"auto"`` is 1 when the temperature is learned, since that anneals by
        itself, and when it is not falls from 20 to 1 over two thirds of training, or over 10,000 updates if they are fewer. It
        never rises again. Of a training in many calls ``learn(..., reset_num_timesteps=False)``, from the first one on, nobody
        knows the length: there it is 10,000 updates.
    :param actor_learning_rate: learning rate of the actor, float or function of the progress remaining;
        ``learning_rate`` by default
    :param ent_coef_learning_rate: learning rate of the log of the temperature, when it is learned;
        1e-3 by default, or ``learning_rate`` where that is larger
    :param bfloat16: Whether matrix products of the updates are done in bfloat16, on hardware that has them fast
    :param compile: Whether the updates are compiled with ``torch.compile``, which takes some seconds at their first call,
        a C++ compiler and a release of torch that traces gradients (2.13 does)
    :param stats_window_size: Window size for the rollout logging, specifying the number of episodes to average
        the reported success rate, mean episode length, and mean reward over
    :param tensorboard_log: the log location for tensorboard (if None, no logging)
    :param policy_kwargs: additional arguments to be passed to the policy on creation, see :class:`SoftQPolicy`
    :param verbose: Verbosity level: 0 for no output, 1 for info messages (such as device or wrappers used), 2 for
        debug messages
    :param seed: Seed for the pseudo random generators
    :param device: Device (cpu, cuda, ...) on which the code should be run.
        Setting it to auto, the code will be run on the GPU if possible.
    :param _init_setup_model: Whether or not to build the network at the creation of the instance
    :raises ValueError: if an argument is out of its range
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    # How far annealing="auto" has come, from 0 to 1, and whether learn() was told how long training is
    _annealed = 0.0
    _length_is_known = True
    policy: SoftQPolicy
    actor: SamplingActor
    averaged_actor: SamplingActor
    critic: ParticleCritic
    critic_target: ParticleCritic
    action_space: spaces.Box
    floats = (*MaximumEntropyAlgorithm.floats, "actor_learning_rate", "annealing")
    integers: ClassVar[dict[str, int]] = MaximumEntropyAlgorithm.integers | {
        "policy_delay": 1,
        "n_value_particles": 1,
        "n_actor_particles": 1,
        "n_actor_states": 1,
        "n_density_particles": 0,
    }

    def __init__(
        self,
        policy: str | type[SoftQPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 1e-3,
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
        ent_coef: str | float | Schedule = "auto_0.1",
        target_entropy: str | float = "auto",
        target_update_interval: int = 1,
        actor_tau: float = 1e-3,
        policy_delay: int = 1,
        n_value_particles: int = 2,
        n_actor_particles: int = 4,
        n_actor_states: int = 32,
        n_density_particles: int = 12,
        proposal: ProposalName = "policy",
        kernel: KernelName = "rbf",
        bandwidth: str | float = "median",
        repulsion: RepulsionName = "density",
        kernel_update_ratio: float | None = None,
        annealing: str | float | Schedule = "auto",
        actor_learning_rate: float | Schedule | None = None,
        ent_coef_learning_rate: float | Schedule | None = None,
        bfloat16: bool = False,
        compile: bool = False,
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
            tau,
            gamma,
            train_freq,
            gradient_steps,
            action_noise,
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
            device=device,
            seed=seed,
        )
        self.actor_tau = actor_tau
        self.policy_delay = policy_delay
        self.n_value_particles = n_value_particles
        self.n_actor_particles = n_actor_particles
        self.n_actor_states = n_actor_states
        self.n_density_particles = n_density_particles
        self.proposal = proposal
        self.kernel = kernel
        self.bandwidth = bandwidth
        self.repulsion = repulsion
        self.kernel_update_ratio = kernel_update_ratio
        self.annealing = annealing
        self.actor_learning_rate = actor_learning_rate
        self.bfloat16 = bfloat16
        self.compile = compile
        if _init_setup_model:
            self._setup_model()

    _check_action_space = staticmethod(check_action_space)

    def _check_arguments(self) -> None:
        super()._check_arguments()
        if self.actor_learning_rate is not None:
            check_learning_rate("actor_learning_rate", self.actor_learning_rate)
        check_number("actor_tau", self.actor_tau, 0.0, 1.0, open_low=True)
        check_choice("proposal", self.proposal, get_args(ProposalName))
        if self.proposal == "mixture" and self.n_value_particles < 2:
            raise ValueError(
                f"n_value_particles={self.n_value_particles} is not allowed with proposal='mixture', half of each: "
                "it must be an integer >= 2"
            )
        check_choice("kernel", self.kernel, get_args(KernelName))
        check_choice("repulsion", self.repulsion, get_args(RepulsionName))
        if isinstance(self.bandwidth, str):
            check_choice("bandwidth", self.bandwidth, ("median",))
        else:
            check_number("bandwidth", self.bandwidth, 0.0, open_low=True)
        if isinstance(self.annealing, str):
            check_choice("annealing", self.annealing, ("auto",))
        else:
            # the temperature times it is divided by too
            check_schedule("annealing", self.annealing, 1.0, open_low=False, high=MAX_ENT_COEF)
        if self.kernel_update_ratio is not None:
            check_number("kernel_update_ratio", self.kernel_update_ratio, 0.0, 1.0, open_low=True)
            if self.kernel_update_ratio == 1.0 or self.n_actor_particles < 2 or self.kernel == "delta":
                raise ValueError(
                    f"kernel_update_ratio={self.kernel_update_ratio!r} is not allowed: it must be < 1, and splits at least 2 "
                    f"particles (n_actor_particles={self.n_actor_particles}) of a kernel other than 'delta'"
                )
        if self.kernel == "delta" and self.repulsion == "kernel":
            raise ValueError("repulsion='kernel' is not allowed with kernel='delta', which has none: it must be 'density'")
        if self.policy_kwargs.get("smoothing") == "none" and self.repulsion == "density":
            raise ValueError(
                "repulsion='density' is not allowed with smoothing='none', which has no density: it must be 'kernel'"
            )
        if self.batch_size == 1 and self.policy_kwargs.get("batch_norm", True):
            raise ValueError(
                "batch_size=1 is not allowed: it must be an integer >= 2 with batch normalisation "
                "(policy_kwargs=dict(batch_norm=False) does without)"
            )
        check_flag("bfloat16", self.bfloat16)
        check_flag("compile", self.compile)
        # An agent that was trained elsewhere may act where nothing can be compiled
        if self.compile and not self._is_loaded:
            check_compiler(self.device)

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        if self.compile:
            check_compiler(self.device)
        if reset_num_timesteps or self.num_timesteps == 0:
            self._length_is_known = reset_num_timesteps
        return super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)

    def _setup_lr_schedule(self) -> None:
        super()._setup_lr_schedule()
        self.actor_lr_schedule = None if self.actor_learning_rate is None else FloatSchedule(self.actor_learning_rate)

    def _auto_target_entropy(self) -> float:
        return -float(math.prod(self.action_space.shape))

    def _entropy_bounds(self) -> tuple[float, float]:
        # from the narrowest Gaussian that smooths a particle, in the middle of the box, to uniform actions in (-1, 1)^d
        n_dims = math.prod(self.action_space.shape)
        log_std = LOG_STD_MIN if self.policy_kwargs.get("smoothing", "learned") == "learned" else math.log(LOCAL_STD_MIN)
        least = n_dims * (0.5 * math.log(2.0 * math.pi * math.e) + log_std)
        return math.ceil(1e3 * least) / 1e3, n_dims * math.log(2.0)

    def _optimizers(self) -> list[th.optim.Optimizer]:
        return [self.actor.optimizer, self.critic.optimizer]

    def _update_learning_rates(self) -> None:
        super()._update_learning_rates()
        if self.actor_lr_schedule is not None:
            update_learning_rate(self.actor.optimizer, self.actor_lr_schedule(self._current_progress_remaining))

    def _create_aliases(self) -> None:
        self.actor = self.policy.actor
        self.averaged_actor = self.policy.averaged_actor
        self.critic = self.policy.critic
        self.critic_target = self.policy.critic_target

    def set_parameters(
        self, load_path_or_dict: str | TensorDict, exact_match: bool = True, device: th.device | str = "auto"
    ) -> None:
        params = self._read_parameters(load_path_or_dict, device)
        super().set_parameters(params, exact_match, device)
        if self._n_updates > 0 and "n_averaged" not in params.get("policy", ["n_averaged"]):
            # release 0.1.0 counted the agent's updates
            self.policy.n_averaged = self._n_updates / self.policy_delay

    # ------------------------------------------------------------------ training

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

    def _update_networks(self, replay_data: ReplayBufferSamples, ent_coef: th.Tensor) -> dict[str, th.Tensor]:
        stats = self._update_critic(replay_data, ent_coef)
        if self._n_updates % self.policy_delay == 0:
            stats |= self._update_actor(replay_data.observations, ent_coef)
        return stats

    def _update_critic(self, replay_data: ReplayBufferSamples, ent_coef: th.Tensor) -> dict[str, th.Tensor]:
        """One step of the critics towards r + gamma V(s')."""
        self.critic.optimizer.zero_grad()
        stats = self._call(SoftQ._critic_gradients, replay_data, ent_coef)
        self.critic.optimizer.step()
        return stats

    def _update_actor(self, obs: PyTorchObs, ent_coef: th.Tensor) -> dict[str, th.Tensor]:
        """One step of the sampler along the Stein direction."""
        self.actor.optimizer.zero_grad()
        stats = self._call(SoftQ._actor_gradients, _spread(obs, self.n_actor_states), ent_coef * self._annealing())
        self.actor.optimizer.step()
        self.policy.update_averaged_actor(self.actor_tau)
        # the quantity that the actor maximizes, with the sign of a loss
        loss = -(stats.pop("actor_q_value") + ent_coef * stats["entropy"])
        return {"actor_loss": loss, **stats}

    def _critic_gradients(self, replay_data: ReplayBufferSamples, ent_coef: th.Tensor) -> dict[str, th.Tensor]:
        """Gradients of the critics' loss, the squared distance to r + gamma V(s')."""
        # For n-step replay, discount factor is gamma**n_steps (when no early termination)
        discounts = replay_data.discounts if replay_data.discounts is not None else self.gamma
        next_obs = replay_data.next_observations
        u, log_prob_a = self._propose(next_obs, self.n_value_particles)
        next_actions = th.tanh(u)
        obs, actions = replay_data.observations, replay_data.actions
        if self.policy.batch_norm:
            q_values, next_q_values = self.critic.joint_q_values(obs, actions, next_obs, next_actions)
        else:
            q_values = th.stack(self.critic(obs, actions))
        with th.no_grad():
            if self._has_target:
                next_q_values = self.critic_target.q_values(self.critic_target.features(next_obs), next_actions)
            next_q_values = next_q_values.amin(dim=0)
            next_values = soft_value(next_q_values, log_prob_a, ent_coef).unsqueeze(1)
            target = replay_data.rewards + (1 - replay_data.dones) * discounts * next_values
            sample_size = effective_sample_size(next_q_values, log_prob_a, ent_coef).mean()

        critic_loss = 0.5 * (q_values - target).square().sum(dim=0).mean()
        critic_loss.backward()
        return {"critic_loss": critic_loss.detach(), "q_value": q_values.detach().mean(), "effective_sample_size": sample_size}

    def _actor_gradients(self, obs: PyTorchObs, hot_ent_coef: th.Tensor) -> dict[str, th.Tensor]:
        """Gradients that move the sampler along the Stein direction."""
        actor = self.actor
        by_density, learned = self.repulsion == "density", actor.smoothing == "learned"
        features = actor.features(obs)
        n_particles = self.n_actor_particles
        # The critics' gradient is evaluated at the first particles, the last ones move: all of them do both, or two parts
        n_fixed = 0 if self.kernel_update_ratio is None else n_particles - self._n_updated_particles
        fixed, updated = slice(0, n_fixed or None), slice(n_fixed, None)
        xi = actor.noise(len(features), n_particles)
        mean, log_std = actor.particles(features, xi, n_constant=0 if learned else n_fixed)
        # (batch_size, n_particles, action_dim), u = mean + offset
        offset = th.zeros_like(mean) if actor.smoothing == "none" else th.exp(log_std) * th.randn_like(mean)
        u = (mean + offset).detach()

        u_fixed = u[:, fixed].requires_grad_(True)
        q_values = self._min_q_values(self.critic, obs, u_fixed)
        (q_force,) = th.autograd.grad(q_values.sum(), u_fixed)
        with th.no_grad():
            components = mean, log_std
            if self.n_density_particles > 0:
                # They make the density true, and cost no evaluation of the critics
                extra = actor.particles(features, actor.noise(len(features), self.n_density_particles))
                components = th.cat([mean, extra[0]], dim=1), th.cat([log_std, extra[1]], dim=1)
        # bfloat16 has enough digits for the networks, not for densities and kernels
        with th.no_grad(), th.autocast(self.device.type, enabled=False):
            log_prob, score = mixture_log_prob_and_score(u, *components)
            kernel_force = q_force + hot_ent_coef * tanh_log_det_grad(u[:, fixed])
            density_force = kernel_force - hot_ent_coef * score[:, fixed]
            phi = stein_direction(
                particles=u[:, fixed],
                force=density_force if by_density else kernel_force,
                updated=u[:, updated] if n_fixed else None,
                kernel=self.kernel,
                bandwidth=None if isinstance(self.bandwidth, str) else self.bandwidth,
                repulsion=0.0 if by_density else hot_ent_coef,
            )
            entropy = (tanh_log_det(u) - log_prob).mean()
            spread = (u - u.mean(dim=1, keepdim=True)).square().mean().sqrt()

        # The gradient of -<stop_gradient(phi), u> is eq. (14). The centres move together, through the kernel; how wide
        # each one is smoothed is its own business, the same direction with a kernel of bandwidth 0.
        actor_loss = -(phi * mean[:, updated]).sum(dim=2).mean()
        if learned:
            actor_loss = actor_loss - (density_force * offset[:, fixed]).sum(dim=2).mean() / density_force.shape[1]
        actor_loss.backward()
        return {
            "actor_q_value": q_values.detach().mean(),
            "entropy": entropy,
            "particle_std": spread,
            "smoothing_std": log_std.detach().exp().mean(),
        }

    @th.no_grad()
    def _propose(self, obs: PyTorchObs, n_particles: int) -> tuple[th.Tensor, th.Tensor]:
        """
        Draw the particles of the soft value.

        :param obs: Observations
        :param n_particles: Number of particles per observation
        :return: Pre-tanh actions, shape (batch_size, n_particles, action_dim), and the proposal's log-density over the
            normalised box, shape (batch_size, n_particles)
        """
        actor = self.averaged_actor
        features = actor.features(obs)
        n_uniform = {"policy": 0, "mixture": n_particles // 2, "uniform": n_particles}[self.proposal]
        n_policy = n_particles - n_uniform
        uniform = th.rand(len(features), n_uniform, actor.action_dim, device=features.device)
        u_uniform = th.atanh((2 * uniform - 1).clamp(-1 + 1e-6, 1 - 1e-6))
        log_uniform = uniform_log_prob(actor.action_dim)
        if n_policy == 0:
            return u_uniform, th.full_like(u_uniform[..., 0], log_uniform)
        mean, log_std = actor.particles(features, actor.noise(len(features), n_policy))
        # stratified: one particle from each component
        u = th.cat([mean + th.exp(log_std) * th.randn_like(mean), u_uniform], dim=1)
        log_prob_a = mixture_log_prob(u, mean, log_std) - tanh_log_det(u)
        if n_uniform > 0:
            # the density of the whole mixture serves every particle
            log_share = math.log(n_policy / n_particles), math.log(n_uniform / n_particles)
            log_prob_a = th.logaddexp(log_prob_a + log_share[0], th.full_like(log_prob_a, log_uniform + log_share[1]))
        return u, log_prob_a

    @staticmethod
    def _min_q_values(critic: ParticleCritic, obs: PyTorchObs, u: th.Tensor) -> th.Tensor:
        """Minimum over the critics at pre-tanh actions u, shape (batch_size, n_particles)."""
        with th.no_grad():
            features = critic.features(obs)
        return critic.q_values(features, th.tanh(u)).amin(dim=0)

    @property
    def _has_target(self) -> bool:
        """Whether the soft value is that of the target critics: not where critics with batch normalisation are their own."""
        return not self.policy.batch_norm or self.tau < 1.0 or self.target_update_interval > 1

    def _call(self, function: Callable[..., dict[str, th.Tensor]], *args: Any) -> dict[str, th.Tensor]:
        """
        One of the functions that leave gradients behind, in bfloat16 and compiled as configured. One context of autocast per
        optimizer step: within one, it caches the weights' casts.
        """
        with th.autocast(self.device.type, dtype=th.bfloat16, enabled=self.bfloat16):
            if not self.compile:
                return function(self, *args)
            # Forward and backward pass in one graph: compiled apart they are no faster than they were. A graph for each
            # setting of an agent in this process: past the limit, 8 by default, functions run uncompiled.
            with th._dynamo.config.patch(trace_autograd_ops=True, recompile_limit=64):
                return _compiled(function)(self, *args)

    @property
    def _n_updated_particles(self) -> int:
        assert self.kernel_update_ratio is not None
        return min(max(round(self.n_actor_particles * self.kernel_update_ratio), 1), self.n_actor_particles - 1)

    def _annealing(self) -> float:
        """Factor of the temperature in the actor's step."""
        if not isinstance(self.annealing, str):
            return FloatSchedule(self.annealing)(self._current_progress_remaining)
        if self.log_ent_coef is not None:
            return 1.0
        part_done = (1.0 - self._current_progress_remaining) / ANNEALING_PART if self._length_is_known else 0.0
        self._annealed = min(max(self._annealed, part_done, self._n_updates / ANNEALING_UPDATES), 1.0)
        return ANNEALING + (1.0 - ANNEALING) * self._annealed

    # ------------------------------------------------------------------ what a maximum-entropy agent can be asked

    def sample_actions(self, obs: np.ndarray | dict[str, np.ndarray], n: int) -> np.ndarray:
        """
        Independent draws from the policy.

        :param obs: One observation or a batch
        :param n: Number of actions per observation
        :return: Actions in the environment's units, shape (batch_size, n, action_dim); without the first axis for a
            single observation
        """
        check_integer("n", n, 1)
        obs_tensor, vectorized = self._query(obs)
        with th.no_grad():
            actions = th.tanh(self.averaged_actor.sample(obs_tensor, n)).cpu().numpy()
        actions = self.policy.unscale_action(actions.reshape(*actions.shape[:2], *self.action_space.shape))
        return actions if vectorized else actions[0]

    def log_prob(
        self, obs: np.ndarray | dict[str, np.ndarray], actions: np.ndarray, n_particles: int = N_QUERY_PARTICLES
    ) -> np.ndarray:
        """
        Log-density of the policy, log pi(a|s), estimated from particles.

        :param obs: One observation or a batch
        :param actions: Actions in the environment's units: one per observation, shape (batch_size, action_dim), or
            several, shape (batch_size, n, action_dim), as :meth:`sample_actions` returns them. What lies beyond the box
            counts as its edge.
        :param n_particles: Number of particles in the estimate, whose bias falls as 1 / ``n_particles``
        :return: In nats over the environment's action box, shape (batch_size,) or (batch_size, n)
        """
        check_integer("n_particles", n_particles, 1)
        obs_tensor, vectorized = self._query(obs)
        a, squeeze = self._actions_to_tensor(actions, _batch_size(obs_tensor), vectorized)
        # the tanh of no finite u is 1
        limit = 1.0 - th.finfo(a.dtype).eps
        u = th.atanh(a.clamp(-limit, limit))
        with th.no_grad():
            mean, log_std = self._density(obs_tensor, n_particles)
            log_prob = th.cat(
                [
                    mixture_log_prob(*x) - tanh_log_det(x[0])
                    for x in zip(u.split(1), mean.split(1), log_std.split(1), strict=True)
                ]
            )
        return self._answer(log_prob - self._log_scale, vectorized, squeeze)

    def entropy(self, obs: np.ndarray | dict[str, np.ndarray], n_particles: int = N_QUERY_PARTICLES) -> np.ndarray:
        """
        Differential entropy of the policy, -E log pi(a|s), estimated from particles.

        :param obs: One observation or a batch
        :param n_particles: Number of particles in the estimate, a lower bound in expectation that tightens with it
        :return: In nats over the environment's action box, shape (batch_size,)
        """
        check_integer("n_particles", n_particles, 1)
        obs_tensor, vectorized = self._query(obs)
        with th.no_grad():
            entropies = []
            for mean, log_std in zip(*(x.split(1) for x in self._density(obs_tensor, n_particles)), strict=True):
                u = mean + th.exp(log_std) * th.randn_like(mean)
                entropies.append((tanh_log_det(u) - mixture_log_prob(u, mean, log_std)).mean(dim=1))
        return self._answer(th.cat(entropies) + self._log_scale, vectorized)

    def q_values(self, obs: np.ndarray | dict[str, np.ndarray], actions: np.ndarray) -> np.ndarray:
        """
        Soft Q-values, the minimum over the critics.

        :param obs: One observation or a batch
        :param actions: Actions in the environment's units, shape (batch_size, action_dim) or (batch_size, n, action_dim)
        :return: Shape (batch_size,) or (batch_size, n)
        """
        obs_tensor, vectorized = self._query(obs)
        a, squeeze = self._actions_to_tensor(actions, _batch_size(obs_tensor), vectorized)
        with th.no_grad():
            q_values = self.critic.q_values(self.critic.features(obs_tensor), a).amin(dim=0)
        return self._answer(q_values, vectorized, squeeze)

    def soft_value(self, obs: np.ndarray | dict[str, np.ndarray], n_particles: int = N_QUERY_PARTICLES) -> np.ndarray:
        """
        Soft value V(s) = alpha log integral exp(Q(s, a) / alpha) da over the environment's action box, estimated from
        particles of the configured proposal. With it log pi = (Q - V) / alpha holds between :meth:`log_prob`,
        :meth:`q_values` and this method, as far as the policy has converged. (Training uses the normalised box (-1, 1)^d,
        which shifts V by the constant alpha sum_i log((high_i - low_i) / 2), zero for bounds of -1 and 1.)

        :param obs: One observation or a batch
        :param n_particles: Number of particles in the estimate, a lower bound in expectation that tightens with it
        :return: Shape (batch_size,)
        """
        check_integer("n_particles", n_particles, 1)
        obs_tensor, vectorized = self._query(obs)
        ent_coef = self.ent_coef_tensor
        values = []
        with th.no_grad():
            for i in range(_batch_size(obs_tensor)):
                row = _rows(obs_tensor, slice(i, i + 1))
                u, log_prob_a = self._propose(row, n_particles)
                values.append(soft_value(self._min_q_values(self.critic, row, u), log_prob_a, ent_coef))
        return self._answer(th.cat(values) + ent_coef * self._log_scale, vectorized)

    def _query(self, obs: np.ndarray | dict[str, np.ndarray]) -> tuple[PyTorchObs, bool]:
        """Observations on the device, and whether they came as a batch; networks in evaluation mode."""
        self.policy.set_training_mode(False)
        return self.policy.obs_to_tensor(obs)

    def _density(self, obs: PyTorchObs, n_particles: int) -> tuple[th.Tensor, th.Tensor]:
        """Components of the policy's density, shapes (batch_size, n_particles, action_dim)."""
        features = self.averaged_actor.features(obs)
        return self.averaged_actor.components(features, n_particles)

    def _actions_to_tensor(self, actions: np.ndarray, batch_size: int, vectorized: bool) -> tuple[th.Tensor, bool]:
        """Normalised actions, shape (batch_size, n, action_dim), and whether n was left out."""
        actions = np.asarray(actions)
        actions = actions if vectorized else actions[None]
        shape = self.action_space.shape
        n_axes = actions.ndim - len(shape)
        if n_axes not in (1, 2) or actions.shape[n_axes:] != shape or len(actions) != batch_size:
            raise ValueError(
                f"actions of shape {actions.shape} do not fit: expected {(batch_size, *shape)} or {(batch_size, 'n', *shape)}"
            )
        a = self.policy.scale_action(actions).reshape(len(actions), -1, self.actor.action_dim)
        return th.as_tensor(a, dtype=th.float32, device=self.device), n_axes == 1

    @property
    def _log_scale(self) -> float:
        """Log of the volume of the environment's action box over that of (-1, 1)^d."""
        return float(np.log((self.action_space.high - self.action_space.low) / 2.0).sum())

    @staticmethod
    def _answer(values: th.Tensor, vectorized: bool, squeeze: bool = False) -> np.ndarray:
        array = (values.squeeze(1) if squeeze else values).cpu().numpy()
        return array if vectorized else array[0]

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "actor", "averaged_actor"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts, tensors = super()._get_torch_save_params()
        return [*state_dicts, "actor.optimizer", "critic.optimizer"], tensors


def _rows(obs: PyTorchObs, rows: slice | th.Tensor) -> PyTorchObs:
    return {key: value[rows] for key, value in obs.items()} if isinstance(obs, dict) else obs[rows]


def _spread(obs: PyTorchObs, n: int) -> PyTorchObs:
    """At most n observations of a minibatch, evenly spaced: HerReplayBuffer has those with goals of its own at the end."""
    batch_size = _batch_size(obs)
    return obs if n >= batch_size else _rows(obs, th.arange(n) * batch_size // n)


def _batch_size(obs: PyTorchObs) -> int:
    return len(next(iter(obs.values())) if isinstance(obs, dict) else obs)


# The function, not the agent, is what is compiled: nothing to save or copy with the agent, and agents of one shape share it
@cache
def _compiled(function: Callable[..., dict[str, th.Tensor]]) -> Callable[..., dict[str, th.Tensor]]:
    # the random numbers of the uncompiled function, not of Inductor
    return th.compile(function, options={"fallback_random": True})
