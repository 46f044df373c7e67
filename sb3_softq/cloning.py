"""Behaviour cloning of the sampling actor: it learns all the ways in which the logged data act."""

import math
from typing import TypeVar

import torch as th

from sb3_softq.actor import SamplingActor
from sb3_softq.base import MaximumEntropyAlgorithm
from sb3_softq.checks import check_integer
from sb3_softq.finite import check_parameters
from sb3_softq.optimization import LossAndStats, minimize
from sb3_softq.policies import SoftQPolicy
from sb3_softq.soft_value import mixture_log_prob, tanh_log_det

# Particles in the density, and how many of them each expert has at least
N_PARTICLES, N_PER_EXPERT = 32, 2
# Actions at the edges of the box have no finite pre-tanh action
LARGEST_ACTION = 0.999

SelfCloning = TypeVar("SelfCloning", bound="BehaviourCloning")


class BehaviourCloning(MaximumEntropyAlgorithm):
    """Mixin of :class:`sb3_softq.SoftQ`: imitation."""

    policy: SoftQPolicy
    actor: SamplingActor
    actor_tau: float
    bfloat16: bool
    compile: bool

    def clone_behaviour(self: SelfCloning, n_updates: int, log_interval: int = 1_000) -> SelfCloning:
        """
        Have the actor imitate the logged data: minimize -log pi(a|s) of their actions. Where they act in several ways in a
        state, so does the policy, which a Gaussian actor averages. The critics learn nothing.

        :param n_updates: Number of gradient steps
        :param log_interval: Write the log after so many of them
        :return: This agent
        :raises ValueError: if there are no data, see :meth:`set_data`, or with ``smoothing="none"``, which has no density
        """
        if self.actor.smoothing == "none":
            raise ValueError("smoothing='none' is not allowed for clone_behaviour: it must be 'learned' or 'local'")
        n_updates = check_integer("n_updates", n_updates, 1)
        log_interval = check_integer("log_interval", log_interval, 1)
        self._begin_offline("clone")
        assert self.logged_data is not None
        self.policy.set_training_mode(True)
        losses = []
        for i in range(1, n_updates + 1):
            # schedules run from the first to the last update
            self._update_current_progress_remaining(i - 1, n_updates)
            self._update_learning_rates()
            data = self.logged_data.sample(self.batch_size, env=self._vec_normalize_env)
            args = (self, data.observations, data.actions)
            stats = minimize(type(self).cloning_loss, args, self.actor.optimizer, self.device, self.bfloat16, self.compile)
            self.policy.update_ema_actor(self.actor_tau)
            losses.append(stats["cloning_loss"])
            if i % log_interval == 0 or i == n_updates:
                self.logger.record("train/cloning_loss", th.stack(losses).mean().item())
                self.logger.dump(i)
                losses = []
        # not by the critics, who know nothing of these actions
        self.policy.adopt_actor()
        check_parameters(self.policy, self.num_timesteps)
        return self

    def cloning_loss(self, obs: th.Tensor, actions: th.Tensor) -> LossAndStats:
        """
        Mean of -log pi(a|s), with the density of as many particles of each expert.

        :param obs: Observations
        :param actions: Normalised actions, shape (batch_size, action_dim)
        :return: Loss, and scalars for the log
        """
        actor = self.actor
        u = th.atanh(actions.clamp(-LARGEST_ACTION, LARGEST_ACTION)).unsqueeze(1)
        features = actor.features(obs)
        n_per_expert = max(N_PER_EXPERT, N_PARTICLES // actor.n_experts)
        experts = actor.spread_experts(len(features), n_per_expert * actor.n_experts)
        mean, log_std = actor.particles(features, actor.noise(experts))
        # bfloat16 has enough digits for the networks, not for densities
        with th.autocast(self.device.type, enabled=False):
            log_weights = actor.log_weights(features, experts) - math.log(n_per_expert)
            log_prob = mixture_log_prob(u, mean.float(), log_std.float(), log_weights) - tanh_log_det(u)
        loss = -log_prob.mean()
        return loss, {"cloning_loss": loss.detach()}
