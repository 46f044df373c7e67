"""
What an ablation changes and no argument of SoftQ does, and what makes a peer faster. Each function changes one thing in this
process, for good: a run of the benchmark has a process of its own (``learning.py run --algos softq --set
variant=no_wide_initialisation``).
"""

import math
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np
import torch as th
from sb3_contrib import QRDQN, TQC
from sb3_contrib.common.utils import quantile_huber_loss
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_softq import DiscreteSoftQ, SoftQ
from sb3_softq.actor import SamplingActor
from sb3_softq.base import MaximumEntropyAlgorithm
from sb3_softq.batch_norm import BATCH_NORM_EPS
from sb3_softq.critic import CriticLayer, ParticleCritic, min_q_values
from sb3_softq.optimization import LossAndStats
from sb3_softq.soft_value import mixture_log_prob, tanh_log_det

# Density-only particles of the next states, as many as the actor's update has by default
N_DENSITY_PARTICLES = 12


def no_wide_initialisation() -> None:
    """The component means are f(s, xi) instead of xi + f(s, xi)."""
    particles = SamplingActor.particles

    def without_noise(
        self: SamplingActor, features: th.Tensor, noise: th.Tensor, n_constant: int = 0
    ) -> tuple[th.Tensor, th.Tensor]:
        mean, log_std = particles(self, features, noise, n_constant)
        return mean - noise[..., : self.action_dim], log_std

    patch.object(SamplingActor, "particles", without_noise).start()


def global_bandwidth() -> None:
    """With ``policy_kwargs.smoothing="local"``: one bandwidth per state for all particles, by Scott's rule."""

    def scott(mean: th.Tensor) -> th.Tensor:
        n_particles, action_dim = mean.shape[1:]
        std = mean.std(dim=1, keepdim=True) * n_particles ** (-1 / (action_dim + 4))
        return th.log(std.clamp(0.1, 1.0)).expand_as(mean)

    patch("sb3_softq.actor.local_log_std", scott).start()


def smoothing_floor() -> None:
    """No component narrower than 0.1 in units of the pre-tanh action."""
    patch("sb3_softq.actor.LOG_STD_MIN", math.log(0.1)).start()


def mean_value() -> None:
    """V = mean Q + alpha entropy, over the particles, instead of the log-mean-exp."""

    def mean(q_values: th.Tensor, log_prob_a: th.Tensor, ent_coef: th.Tensor) -> th.Tensor:
        return (q_values - ent_coef * log_prob_a).mean(dim=1)

    for module in ("softq", "queries"):
        patch(f"sb3_softq.{module}.soft_value", mean).start()


def density_in_value() -> None:
    """The soft value has density-only particles, as the actor's update does."""

    @th.no_grad()
    def propose(self: SoftQ, obs: PyTorchObs, n_particles: int) -> tuple[th.Tensor, th.Tensor]:
        actor = self.ema_actor
        features = actor.features(obs)
        experts = actor.draw_experts(features, n_particles + N_DENSITY_PARTICLES)
        mean, log_std = actor.particles(features, actor.noise(experts))
        u = mean[:, :n_particles] + th.exp(log_std[:, :n_particles]) * th.randn_like(mean[:, :n_particles])
        return u, mixture_log_prob(u, mean, log_std) - tanh_log_det(u)

    patch.object(SoftQ, "propose", propose).start()


def one_critic_in_stein_step() -> None:
    """The sampler climbs the first critic, not the minimum of both."""

    def first(critic: ParticleCritic, obs: PyTorchObs, u: th.Tensor) -> th.Tensor:
        with th.no_grad():
            features = critic.features(obs)
        return critic.q_values(features, th.tanh(u))[0]

    patch("sb3_softq.softq.min_q_values", first).start()


def mean_of_critics() -> None:
    """Q is the mean of the critics, not their minimum, in the soft value, the Stein step and the deterministic action."""
    _judge_by_critics(0.0)


def beyond_the_minimum() -> None:
    """Q is below the mean of the critics by one and a half times as much as their minimum is, in the same places."""
    _judge_by_critics(1.5)


def _judge_by_critics(pessimism: float) -> None:
    """Q = mean - pessimism (mean - min) over the critics, wherever it is their minimum."""
    q_of = ParticleCritic.q_of

    def judged(self: ParticleCritic, outputs: th.Tensor) -> th.Tensor:
        q_values = q_of(self, outputs)
        mean = q_values.mean(dim=0, keepdim=True)
        return (mean - pessimism * (mean - q_values.amin(dim=0, keepdim=True))).expand_as(q_values)

    patch.object(ParticleCritic, "q_of", judged).start()


def explore_with_component_means() -> None:
    """Data are collected without the smoothing noise."""
    predict = SamplingActor._predict

    def component_means(self: SamplingActor, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        if self.frozen or deterministic:
            return predict(self, observation, deterministic)
        mean, _ = self.components(self.features(observation), 1)
        return th.tanh(mean.squeeze(1))

    patch.object(SamplingActor, "_predict", component_means).start()


def ema_actor_collects_half() -> None:
    """The EMA actor, which is the policy, collects every other episode."""
    trained_collects = SoftQ._sample_action

    def sample_action(self: SoftQ, *args: Any, **kwargs: Any) -> tuple[np.ndarray, np.ndarray]:
        collect = MaximumEntropyAlgorithm._sample_action if self._episode_num % 2 else trained_collects
        return collect(self, *args, **kwargs)

    patch.object(SoftQ, "_sample_action", sample_action).start()


def joint_gradient() -> None:
    """
    As in CrossQ, the gradient of batch normalisation goes through all rows of the joint pass, the particles of the next states
    included, not through the transitions alone.
    """

    def joint_forward(layer: CriticLayer, rows: th.Tensor) -> th.Tensor:
        assert layer.norm is not None
        mean, var = rows.mean(dim=1), rows.var(dim=1, correction=0)
        layer.norm.follow(mean.detach(), var.detach(), rows.shape[1])
        scale = layer.norm.weight * th.rsqrt(var + BATCH_NORM_EPS)
        rows = (rows - mean.unsqueeze(1)) * scale.unsqueeze(1) + layer.norm.bias.unsqueeze(1)
        return th.baddbmm(layer.bias.unsqueeze(1), rows, layer.weight.mT)

    def joint_outputs(
        self: ParticleCritic, obs: PyTorchObs, actions: th.Tensor, next_obs: PyTorchObs, next_actions: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor]:
        batch_size, n_particles, _ = next_actions.shape
        with th.no_grad():
            next_features = self.features(next_obs).repeat_interleave(n_particles, dim=0)
        features = th.cat([self.features(obs), next_features])
        rows = th.cat([features, th.cat([actions, next_actions.flatten(0, 1)])], dim=1).expand(self.n_critics, -1, -1)
        for depth, layer in enumerate(self.layers):
            rows = joint_forward(layer, rows)
            if depth < len(self.activations):
                rows = self.activate(depth, rows)
        outputs, next_outputs = rows.float().split([batch_size, batch_size * n_particles], dim=1)
        return outputs, next_outputs.detach().unflatten(1, (batch_size, n_particles))

    patch.object(ParticleCritic, "joint_outputs", joint_outputs).start()


def gaussian_actor() -> None:
    """
    SAC's actor, for ``policy_kwargs.n_experts=1``, ``n_value_particles=1``, ``n_actor_particles=1`` and as many
    ``particle_options.n_actor_states`` as the minibatch has: a Gaussian per state, u = mean(s) + sigma(s) eps, which descends
    alpha log pi(u|s) - min Q(s, tanh(u)) through u.
    """
    particles = SamplingActor.particles

    def one_gaussian(
        self: SamplingActor, features: th.Tensor, noise: th.Tensor, n_constant: int = 0
    ) -> tuple[th.Tensor, th.Tensor]:
        return particles(self, features, th.zeros_like(noise), n_constant)

    def actor_loss(self: SoftQ, obs: PyTorchObs, ent_coef: th.Tensor) -> LossAndStats:
        features = self.actor.features(obs)
        mean, log_std = self.actor.components(features, 1)
        u = mean + th.exp(log_std) * th.randn_like(mean)
        log_prob = (mixture_log_prob(u, mean, log_std) - tanh_log_det(u)).mean()
        q_value = min_q_values(self.critic, obs, u).mean()
        loss = (ent_coef * log_prob - q_value).squeeze() / self.critic.return_scale.squeeze()
        return loss, {
            "actor_q_value": q_value.detach(),
            "entropy": -log_prob.detach(),
            "smoothing_std": log_std.detach().exp().mean(),
        }

    patch.object(SamplingActor, "particles", one_gaussian).start()
    patch.object(SoftQ, "actor_loss", actor_loss).start()


def double_q() -> None:
    """
    ``DiscreteSoftQ`` as double Q-learning (van Hasselt et al. 2016, https://arxiv.org/abs/1509.06461): the policy is that of
    the critic, its values are the target network's, V(s') = sum_a pi(a|s') (Q_target(s', a) - alpha log pi(a|s')).
    """

    def next_values(self: DiscreteSoftQ, next_obs: PyTorchObs, ent_coef: th.Tensor) -> th.Tensor:
        log_probs = th.log_softmax(self.critic(next_obs) / ent_coef, dim=1)
        return (log_probs.exp() * (self.critic_target(next_obs) - ent_coef * log_probs)).sum(dim=1, keepdim=True)

    patch.object(DiscreteSoftQ, "next_values", next_values).start()


def compiled_loss() -> None:
    """
    The loss of TQC and QR-DQN, which compares each quantile with each one of the target, in one compiled function: the same
    numbers but for rounding, and TQC's update takes two thirds of the time.
    """
    compiled = th.compile(quantile_huber_loss, dynamic=False)
    for module in ("tqc.tqc", "qrdqn.qrdqn"):
        patch(f"sb3_contrib.{module}.quantile_huber_loss", compiled).start()


_OF_SOFTQ = (
    no_wide_initialisation,
    global_bandwidth,
    smoothing_floor,
    mean_value,
    density_in_value,
    one_critic_in_stein_step,
    mean_of_critics,
    beyond_the_minimum,
    explore_with_component_means,
    ema_actor_collects_half,
    joint_gradient,
    gaussian_actor,
)
# Of each algorithm, by name
VARIANTS: dict[type, dict[str, Callable[[], None]]] = {
    SoftQ: {function.__name__: function for function in _OF_SOFTQ},
    DiscreteSoftQ: {double_q.__name__: double_q},
    TQC: {compiled_loss.__name__: compiled_loss},
    QRDQN: {compiled_loss.__name__: compiled_loss},
}
