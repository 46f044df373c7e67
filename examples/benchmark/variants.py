"""
What an ablation changes and no argument of SoftQ does. Each function changes one thing in this process, for good: a cell of
the benchmark has a process of its own (``learning.py run --algos softq --set variant=narrow_start``).
"""

import math
from unittest.mock import patch

import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

from sb3_softq import SoftQ
from sb3_softq.policies import ParticleCritic, SamplingActor, SoftQPolicy
from sb3_softq.soft_value import mixture_log_prob, tanh_log_det

# Further particles of the next states in the density of those of the soft value, as many as the actor's update has by default
N_DENSITY_PARTICLES = 12


def narrow_start() -> None:
    """The centres are f(s, xi) instead of xi + f(s, xi)."""
    particles = SamplingActor.particles

    def without_noise(
        self: SamplingActor, features: th.Tensor, xi: th.Tensor, n_constant: int = 0
    ) -> tuple[th.Tensor, th.Tensor]:
        mean, log_std = particles(self, features, xi, n_constant)
        return mean - xi, log_std

    patch.object(SamplingActor, "particles", without_noise).start()


def global_bandwidth() -> None:
    """With ``policy_kwargs.smoothing="local"``: one bandwidth per state for all particles, by Scott's rule."""

    def scott(mean: th.Tensor) -> th.Tensor:
        n_particles, action_dim = mean.shape[1:]
        std = mean.std(dim=1, keepdim=True) * n_particles ** (-1 / (action_dim + 4))
        return th.log(std.clamp(0.1, 1.0)).expand_as(mean)

    patch("sb3_softq.policies.local_log_std", scott).start()


def smoothing_floor() -> None:
    """No component narrower than 0.1 in units of the pre-tanh action."""
    patch("sb3_softq.policies.LOG_STD_MIN", math.log(0.1)).start()


def mean_value() -> None:
    """V = mean Q + alpha entropy, over the particles, instead of the log-mean-exp."""

    def mean(q_values: th.Tensor, log_prob_a: th.Tensor, ent_coef: th.Tensor) -> th.Tensor:
        return (q_values - ent_coef * log_prob_a).mean(dim=1)

    patch("sb3_softq.softq.soft_value", mean).start()


def density_in_value() -> None:
    """The density of the soft value's particles knows of further ones, as that of the actor's does."""

    @th.no_grad()
    def propose(self: SoftQ, obs: PyTorchObs, n_particles: int) -> tuple[th.Tensor, th.Tensor]:
        actor = self.averaged_actor
        features = actor.features(obs)
        mean, log_std = actor.particles(features, actor.noise(len(features), n_particles + N_DENSITY_PARTICLES))
        u = mean[:, :n_particles] + th.exp(log_std[:, :n_particles]) * th.randn_like(mean[:, :n_particles])
        return u, mixture_log_prob(u, mean, log_std) - tanh_log_det(u)

    patch.object(SoftQ, "_propose", propose).start()


def one_critic_in_stein_step() -> None:
    """The sampler climbs the first critic, not the minimum of both."""

    def first(critic: ParticleCritic, obs: PyTorchObs, u: th.Tensor) -> th.Tensor:
        with th.no_grad():
            features = critic.features(obs)
        return critic.q_values(features, th.tanh(u))[0]

    patch.object(SoftQ, "_min_q_values", staticmethod(first)).start()


def explore_with_centres() -> None:
    """Data are collected without the smoothing noise."""
    predict = SoftQPolicy._predict

    def centres(self: SoftQPolicy, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        if not self.exploring:
            return predict(self, observation, deterministic)
        mean, _ = self.actor.components(self.actor.features(observation), 1)
        return th.tanh(mean.squeeze(1))

    patch.object(SoftQPolicy, "_predict", centres).start()


def statistics_of_one_particle() -> None:
    """
    Batch normalisation has the statistics of the transitions and one particle of each next state, as in CrossQ, not of all
    particles: the others are normalised by them and need no gradient.
    """

    def forward(net: nn.Sequential, pairs: th.Tensor, others: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        for layer in net:
            if isinstance(layer, nn.BatchNorm1d):
                assert layer.momentum is not None
                pairs, mean, inv_std = th.native_batch_norm(
                    pairs, layer.weight, layer.bias, layer.running_mean, layer.running_var, True, layer.momentum, layer.eps
                )
                with th.no_grad():
                    others = (others - mean) * (layer.weight * inv_std) + layer.bias
            else:
                pairs = layer(pairs)
                with th.no_grad():
                    others = layer(others)
        return pairs, others

    def joint_q_values(
        self: ParticleCritic, obs: PyTorchObs, actions: th.Tensor, next_obs: PyTorchObs, next_actions: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor]:
        first, rest = next_actions.split([1, next_actions.shape[1] - 1], dim=1)
        with th.no_grad():
            next_features = self.features(next_obs)
            others = th.cat([next_features.repeat_interleave(rest.shape[1], dim=0), rest.flatten(0, 1)], dim=1)
        features = th.cat([self.features(obs), next_features])
        pairs = th.cat([features, th.cat([actions, first.squeeze(1)])], dim=1)
        results = [forward(net, pairs, others) for net in self.q_networks]  # type: ignore[arg-type]
        q_values, first_q_values = th.stack([result[0] for result in results]).float().chunk(2, dim=1)
        other_q_values = th.stack([result[1] for result in results]).float().view(len(results), *rest.shape[:2])
        return q_values, th.cat([first_q_values.detach(), other_q_values], dim=2)

    patch.object(ParticleCritic, "joint_q_values", joint_q_values).start()


def renormalised_transitions() -> None:
    """
    Batch renormalisation (Ioffe 2017, https://arxiv.org/abs/1702.03275) of the transitions: their own statistics, corrected by
    constants to those of the transitions and all particles. The particles then have no part in the backward pass.
    """

    def forward(net: nn.Sequential, pairs: th.Tensor, next_pairs: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        for layer in net:
            if isinstance(layer, nn.BatchNorm1d):
                assert layer.momentum is not None
                with th.no_grad():
                    joint, mean, inv_std = th.native_batch_norm(
                        th.cat([pairs, next_pairs]),
                        layer.weight,
                        layer.bias,
                        layer.running_mean,
                        layer.running_var,
                        True,
                        layer.momentum,
                        layer.eps,
                    )
                    next_pairs = joint[len(pairs) :]
                    _, own_mean, own_inv_std = th.native_batch_norm(pairs, None, None, None, None, True, 0.0, layer.eps)
                    r = inv_std / own_inv_std
                    d = (own_mean - mean) * inv_std
                pairs = th.native_batch_norm(
                    pairs, layer.weight * r, layer.bias + layer.weight * d, None, None, True, 0.0, layer.eps
                )[0]
            else:
                pairs = layer(pairs)
                with th.no_grad():
                    next_pairs = layer(next_pairs)
        return pairs, next_pairs

    def joint_q_values(
        self: ParticleCritic, obs: PyTorchObs, actions: th.Tensor, next_obs: PyTorchObs, next_actions: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor]:
        n_particles = next_actions.shape[1]
        with th.no_grad():
            next_features = self.features(next_obs).repeat_interleave(n_particles, dim=0)
            next_pairs = th.cat([next_features, next_actions.flatten(0, 1)], dim=1)
        pairs = th.cat([self.features(obs), actions], dim=1)
        results = [forward(net, pairs, next_pairs) for net in self.q_networks]  # type: ignore[arg-type]
        q_values = th.stack([result[0] for result in results]).float()
        next_q_values = th.stack([result[1] for result in results]).float()
        return q_values, next_q_values.view(len(results), -1, n_particles)

    patch.object(ParticleCritic, "joint_q_values", joint_q_values).start()


VARIANTS = {
    function.__name__: function
    for function in (
        narrow_start,
        global_bandwidth,
        smoothing_floor,
        mean_value,
        density_in_value,
        one_critic_in_stein_step,
        explore_with_centres,
        statistics_of_one_particle,
        renormalised_transitions,
    )
}
