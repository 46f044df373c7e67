"""Composition: the sum of several agents' soft Q-functions, and a sampler for it, without new data."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import GymEnv, PyTorchObs, ReplayBufferSamples, Schedule
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize
from torch import nn

from sb3_softq.checks import check_integer, check_number
from sb3_softq.critic import ParticleCritic
from sb3_softq.networks import Freezable
from sb3_softq.policies import SoftQPolicy
from sb3_softq.softq import SoftQ


class SumOfCritics(Freezable):
    """
    Q(s, a) = sum_i w_i min_c Q_ic(s, a), frozen. Stands where a :class:`ParticleCritic` does.

    :param critics: Critics of the agents
    :param weights: One for each
    """

    def __init__(self, critics: Sequence[ParticleCritic], weights: Sequence[float]):
        super().__init__()
        self.critics = nn.ModuleList(critics)
        self.weights = list(weights)
        # their sum is in the environment's units
        self.register_buffer("return_scale", th.ones(1), persistent=False)
        self.freeze()

    def features(self, obs: PyTorchObs) -> list[th.Tensor]:
        """
        :param obs: Observations
        :return: Features of each agent, shapes (batch_size, features_dim)
        """
        return [critic.features(obs) for critic in self.critics]  # type: ignore[operator]

    def q_values(self, features: list[th.Tensor], actions: th.Tensor, weights_are_fixed: bool = True) -> th.Tensor:
        """
        :param features: From :meth:`features`
        :param actions: Actions in the normalised box, shape (batch_size, n_particles, action_dim)
        :param weights_are_fixed: As that of :class:`ParticleCritic`; here they always are
        :return: Shape (1, batch_size, n_particles)
        """
        terms = [
            weight * critic.q_values(x, actions, weights_are_fixed=True).amin(dim=0)  # type: ignore[operator]
            for weight, critic, x in zip(self.weights, self.critics, features, strict=True)
        ]
        return th.stack(terms).sum(dim=0, keepdim=True)

    def forward(self, obs: PyTorchObs, actions: th.Tensor) -> tuple[th.Tensor, ...]:
        return tuple(self.q_values(self.features(obs), actions.unsqueeze(1)))


class ComposedPolicy(SoftQPolicy):
    """
    A sampling actor, and the sum of frozen critics.

    :param observation_space: Observation space
    :param action_space: Action space
    :param lr_schedule: Learning rate schedule of the actor
    :param members: Class and constructor arguments of each agent's policy
    :param weights: Weight of each agent
    :param kwargs: Those of :class:`SoftQPolicy`
    """

    members: list[tuple[type[SoftQPolicy], dict[str, Any]]]
    weights: list[float]

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        lr_schedule: Schedule,
        members: Sequence[tuple[type[SoftQPolicy], dict[str, Any]]] = (),
        weights: Sequence[float] = (),
        **kwargs: Any,
    ):
        # make_critic() needs them, which the parent's constructor calls
        object.__setattr__(self, "members", list(members))
        object.__setattr__(self, "weights", list(weights))
        super().__init__(observation_space, action_space, lr_schedule, **kwargs)

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> SumOfCritics:  # type: ignore[override]
        critics = [policy_class(**kwargs).critic for policy_class, kwargs in self.members]
        return SumOfCritics(critics, self.weights).to(self.device)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return super()._get_constructor_parameters() | dict(members=self.members, weights=self.weights)


class ComposedSoftQ(SoftQ):
    """What :func:`compose` returns: a SoftQ whose critic is given, so that training moves the actor alone."""

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": ComposedPolicy}

    def update_critic(self, replay_data: ReplayBufferSamples, ent_coef: th.Tensor) -> dict[str, th.Tensor]:
        """They are given."""
        return {}

    @property
    def _has_target(self) -> bool:
        """There is nothing to follow."""
        return False

    def _set_return_scale(self) -> None:
        """They have theirs."""


def compose(
    agents: Sequence[SoftQ],
    weights: Sequence[float] | None = None,
    gradient_steps: int = 10_000,
    env: GymEnv | str | None = None,
    **kwargs: Any,
) -> ComposedSoftQ:
    """
    An agent for the sum of the agents' soft Q-functions (Haarnoja et al. 2018, https://arxiv.org/abs/1803.06773): it does
    what is good for all of them. No new data: its actor learns from the frozen sum on the union of the replay buffers.

        agent = compose([agent_x, agent_y])

    :param agents: Two or more, trained on the same spaces at the same temperature, with their replay buffers (after loading:
        ``load_replay_buffer``)
    :param weights: Weight of each agent's Q, 1 by default
    :param gradient_steps: Number of gradient steps, of which every ``policy_delay``-th updates the actor
    :param env: Environment of the composed agent, or its id (default: the first agent's, None if it has none), without
        VecNormalize
    :param kwargs: Arguments of :class:`SoftQ`, such as ``learning_rate``, ``batch_size``, ``seed``; ``ent_coef`` if it shall
        differ from the agents', ``"auto_X"`` from X times the scale of their returns
    :return: The agent, trained
    :raises ValueError: if the agents do not fit together, naming what differs
    """
    agents = list(agents)
    weights = [1.0] * len(agents) if weights is None else list(weights)
    _check_agents(agents, weights, with_temperature="ent_coef" not in kwargs)
    gradient_steps = check_integer("gradient_steps", gradient_steps, 1)
    first = agents[0]
    env = first.get_env() if env is None else maybe_make_env(env, 0)
    if isinstance(env, VecEnv) and unwrap_vec_normalize(env) is not None:
        raise ValueError(f"env={env!r} is not allowed: it must be without VecNormalize, as the agents are")
    for name, value in kwargs.items():
        if name in _OF_THE_BUFFER:
            raise ValueError(f"{name}={value!r} is not allowed: it must be left out, the replay buffer is the agents' union")
        if name in _OF_THE_CRITICS:
            raise ValueError(f"{name}={value!r} is not allowed: it must be left out, the critics are given and do not learn")
    buffers: list[ReplayBuffer] = [agent.replay_buffer for agent in agents]  # type: ignore[misc]
    n_envs = env.num_envs if isinstance(env, VecEnv) else 1

    members = [(type(agent.policy), agent.policy._get_constructor_parameters()) for agent in agents]
    own = {name: value for name, value in members[0][1].items() if name in _ACTOR_ARGUMENTS}
    own["net_arch"] = dict(pi=first.actor.net_arch, qf=[])
    policy_kwargs = own | (kwargs.pop("policy_kwargs", None) or {}) | dict(members=members, weights=weights)
    settings = dict(
        learning_starts=0, ent_coef=float(first.ent_coef_tensor), gamma=first.gamma, device=first.device, seed=first.seed
    )
    settings |= {name: getattr(first, name) for name in _SHARED_SETTINGS}
    # the sampler is trained anew: it anneals by itself, however the agents were
    settings["particle_options"] = replace(first.particle_options, annealing="auto", proposal="policy")
    buffer_size = sum(buffer.size() * buffer.n_envs for buffer in buffers)
    settings |= kwargs | dict(policy_kwargs=policy_kwargs, buffer_size=buffer_size)
    model = ComposedSoftQ(ComposedPolicy, None, **settings, _init_setup_model=False)  # type: ignore[arg-type]
    # it was not load() that left the set-up to us: all is checked as for a new agent
    model._is_loaded = False
    model.observation_space, model.action_space, model.n_envs = first.observation_space, first.action_space, n_envs
    model._setup_model()
    for copy, agent in zip(model.critic.critics, agents, strict=True):  # type: ignore[arg-type]
        copy.load_state_dict(agent.critic.state_dict())
    assert model.replay_buffer is not None
    _fill(model.replay_buffer, buffers)
    if env is not None:
        model.set_env(env, force_reset=True)

    if model.log_ent_coef is not None:
        # the sum is in the environment's units, in which it has no scale of its own
        scale = sum(abs(weight) * float(agent.critic.return_scale) for weight, agent in zip(weights, agents, strict=True))
        with th.no_grad():
            model.log_ent_coef += math.log(scale or 1.0)
    model._begin_log("compose")
    model._update_offline(gradient_steps, LOG_INTERVAL)
    return model


# Write the log after so many updates
LOG_INTERVAL = 1_000
_OF_THE_BUFFER = {"buffer_size", "replay_buffer_class", "replay_buffer_kwargs", "optimize_memory_usage", "n_steps"}
_OF_THE_CRITICS = {"tau", "target_update_interval", "n_value_particles", "gamma"}
# What the composed agent takes over from the first one
_ACTOR_ARGUMENTS = (
    "activation_fn",
    "smoothing",
    "log_std_init",
    "head_arch",
    "n_experts",
    "features_extractor_class",
    "features_extractor_kwargs",
    "normalize_images",
    "optimizer_class",
    "optimizer_kwargs",
)
_SHARED_SETTINGS = (
    "actor_tau",
    "n_actor_particles",
    "batch_size",
    "learning_rate",
    "actor_learning_rate",
    "bfloat16",
)


def _check_agents(agents: list[SoftQ], weights: list[float], with_temperature: bool) -> None:
    for i, agent in enumerate(agents):
        if not isinstance(agent, SoftQ):
            raise ValueError(f"agents[{i}]={agent!r} is not allowed: it must be a SoftQ")
    if len(agents) < 2:
        raise ValueError(f"agents={agents!r} is not allowed: it must hold at least two")
    if len(weights) != len(agents):
        raise ValueError(f"weights={weights!r} is not allowed: it must hold one number for each of {len(agents)} agents")
    for i, weight in enumerate(weights):
        check_number(f"weights[{i}]", weight)
    first = agents[0]
    for i, agent in enumerate(agents):
        for name in ("observation_space", "action_space"):
            if getattr(agent, name) != getattr(first, name):
                raise ValueError(
                    f"{name} of agents[{i}] is {getattr(agent, name)}, that of agents[0] {getattr(first, name)}: "
                    "they must be the same"
                )
        temperatures = float(first.ent_coef_tensor), float(agent.ent_coef_tensor)
        if with_temperature and not math.isclose(*temperatures, rel_tol=1e-4):
            raise ValueError(
                f"ent_coef of agents[{i}] is {temperatures[1]:.4g}, that of agents[0] {temperatures[0]:.4g}: they must be the "
                "same (train with a fixed ent_coef, or give compose() the one to use)"
            )
        if agent.get_vec_normalize_env() is not None:
            raise ValueError(f"agents[{i}] has its own VecNormalize: compose agents that see observations as they are")
        if agent.replay_buffer is None or agent.replay_buffer.size() == 0:
            raise ValueError(
                f"agents[{i}] has no replay buffer to learn from: keep it with save_replay_buffer(), load it with "
                "load_replay_buffer()"
            )


def _fill(union: ReplayBuffer, buffers: list[ReplayBuffer]) -> None:
    """All transitions of the buffers, one after the other (but those that do not fill a row of all environments)."""
    end = 0
    for buffer in buffers:
        start, end = end, end + buffer.size() * buffer.n_envs
        for name in ("observations", "next_observations", "actions", "rewards", "dones", "timeouts"):
            if name == "next_observations" and buffer.optimize_memory_usage:
                source: Any = np.roll(buffer.observations, -1, axis=0)
            else:
                source = getattr(buffer, name)
            target = getattr(union, name)
            for key in source if isinstance(source, dict) else [None]:
                values, place = (source, target) if key is None else (source[key], target[key])
                place = place.reshape(-1, *place.shape[2:])[start:end]
                place[:] = values[: buffer.size()].reshape(-1, *values.shape[2:])[: len(place)]
    union.full = True
