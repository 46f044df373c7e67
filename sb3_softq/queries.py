"""What a maximum-entropy agent with continuous actions can be asked: samples, densities, entropy, Q and soft values."""

from typing import TYPE_CHECKING

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_softq.actor import SamplingActor
from sb3_softq.checks import check_integer, check_number
from sb3_softq.critic import ParticleCritic, min_q_values
from sb3_softq.modes import mixture_modes
from sb3_softq.observations import batch_size, rows
from sb3_softq.soft_value import defensive_proposal, effective_sample_size, mixture_log_prob, soft_value, tanh_log_det

if TYPE_CHECKING:
    from sb3_softq.policies import SoftQPolicy

Observations = np.ndarray | dict[str, np.ndarray]
# Particles of the estimates that a user asks for, where accuracy counts more than speed
N_QUERY_PARTICLES = 256
N_VALUE_PARTICLES = 1024


class Queries:
    """
    Mixin of :class:`sb3_softq.SoftQ`: questions about one observation, or a batch of them, as numpy arrays. The EMA actor
    answers, and the critics by their running statistics.
    """

    policy: "SoftQPolicy"
    critic: ParticleCritic
    action_space: spaces.Box
    device: th.device
    ent_coef_tensor: th.Tensor

    @property
    def ema_actor(self) -> SamplingActor:
        """Exponential moving average of the actor, which answers ``predict``; see :class:`sb3_softq.SoftQPolicy`."""
        return self.policy.ema_actor

    @property
    def averaged_actor(self) -> SamplingActor:
        """:attr:`ema_actor` by its name in release 0.1.0."""
        return self.policy.ema_actor

    def sample_actions(self, obs: Observations, n: int) -> np.ndarray:
        """
        Independent draws from the policy.

        :param obs: One observation or a batch
        :param n: Number of actions per observation
        :return: Actions in the environment's units, shape (batch_size, n, action_dim); without the first axis for a
            single observation
        """
        n = check_integer("n", n, 1)
        obs_tensor, vectorized = self._query(obs)
        with th.no_grad():
            actions = th.tanh(self.ema_actor.sample(obs_tensor, n)).cpu().numpy()
        actions = self.policy.unscale_action(actions.reshape(*actions.shape[:2], *self.action_space.shape))
        return actions if vectorized else actions[0]

    def log_prob(self, obs: Observations, actions: np.ndarray, n_particles: int = N_QUERY_PARTICLES) -> np.ndarray:
        """
        Log-density of the policy, log pi(a|s), estimated from particles.

        :param obs: One observation or a batch
        :param actions: Actions in the environment's units: one per observation, shape (batch_size, action_dim), or
            several, shape (batch_size, n, action_dim), as :meth:`sample_actions` returns them. What lies beyond the box
            counts as its edge.
        :param n_particles: Number of particles in the estimate, whose bias falls as 1 / ``n_particles``
        :return: In nats over the environment's action box, shape (batch_size,) or (batch_size, n)
        """
        n_particles = check_integer("n_particles", n_particles, 1)
        obs_tensor, vectorized = self._query(obs)
        a, squeeze = self._actions_to_tensor(actions, batch_size(obs_tensor), vectorized)
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

    def entropy(self, obs: Observations, n_particles: int = N_QUERY_PARTICLES) -> np.ndarray:
        """
        Differential entropy of the policy, -E log pi(a|s), estimated from particles.

        :param obs: One observation or a batch
        :param n_particles: Number of particles in the estimate, a lower bound in expectation that tightens with it
        :return: In nats over the environment's action box, shape (batch_size,)
        """
        n_particles = check_integer("n_particles", n_particles, 1)
        obs_tensor, vectorized = self._query(obs)
        with th.no_grad():
            entropies = []
            for mean, log_std in zip(*(x.split(1) for x in self._density(obs_tensor, n_particles)), strict=True):
                u = mean + th.exp(log_std) * th.randn_like(mean)
                entropies.append((tanh_log_det(u) - mixture_log_prob(u, mean, log_std)).mean(dim=1))
        return self._answer(th.cat(entropies) + self._log_scale, vectorized)

    def modes(
        self, obs: Observations, min_share: float = 0.01, n_particles: int = N_QUERY_PARTICLES
    ) -> tuple[np.ndarray, np.ndarray] | tuple[list[np.ndarray], list[np.ndarray]]:
        """
        The ways of acting that the policy has: modes of its density over pre-tanh actions, and how often it acts in
        each (:func:`sb3_softq.modes.mixture_modes`).

        :param obs: One observation or a batch
        :param min_share: Modes with a smaller share are left out, from 0 to 1
        :param n_particles: Number of particles in the estimate of the density; shares are multiples of 1 / ``n_particles``
        :return: Actions in the environment's units, shape (n_modes, action_dim), and their shares of the policy's actions,
            shape (n_modes,), the largest first; for a batch lists of these, one per observation
        """
        n_particles = check_integer("n_particles", n_particles, 1)
        check_number("min_share", min_share, 0.0, 1.0)
        obs_tensor, vectorized = self._query(obs)
        all_actions, all_shares = [], []
        with th.no_grad():
            for mean, log_std in zip(*self._density(obs_tensor, n_particles), strict=True):
                u, shares = mixture_modes(mean, log_std)
                actions = th.tanh(u[shares >= min_share]).cpu().numpy().reshape(-1, *self.action_space.shape)
                all_actions.append(self.policy.unscale_action(actions))
                all_shares.append(shares[shares >= min_share].cpu().numpy())
        return (all_actions, all_shares) if vectorized else (all_actions[0], all_shares[0])

    def q_values(self, obs: Observations, actions: np.ndarray) -> np.ndarray:
        """
        Soft Q-values, the minimum over the critics.

        :param obs: One observation or a batch
        :param actions: Actions in the environment's units, shape (batch_size, action_dim) or (batch_size, n, action_dim)
        :return: Shape (batch_size,) or (batch_size, n)
        """
        obs_tensor, vectorized = self._query(obs)
        a, squeeze = self._actions_to_tensor(actions, batch_size(obs_tensor), vectorized)
        with th.no_grad():
            q_values = self.critic.q_values(self.critic.features(obs_tensor), a).amin(dim=0)
        return self._answer(q_values, vectorized, squeeze)

    def soft_value(
        self, obs: Observations, n_particles: int = N_VALUE_PARTICLES, return_sample_size: bool = False
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """
        Soft value V(s) = alpha log integral exp(Q(s, a) / alpha) da over the environment's action box, estimated from
        particles of the policy, of a wider policy and of the whole box, so that what the policy misses counts too
        (:func:`sb3_softq.soft_value.defensive_proposal`). With it log pi = (Q - V) / alpha holds between :meth:`log_prob`,
        :meth:`q_values` and this method, as far as the policy has converged. (Training uses the normalised box (-1, 1)^d,
        which shifts V by the constant alpha sum_i log((high_i - low_i) / 2), zero for bounds of -1 and 1.) Where the replay
        buffer holds no actions any more, random ones of the beginning that were written over say, critics may be too high, and
        so is V: then few particles carry it.

        :param obs: One observation or a batch
        :param n_particles: Number of particles in the estimate, a lower bound in expectation that tightens with it
        :param return_sample_size: Whether to return the effective sample size too, from 1 to ``n_particles``: how many
            particles carry the estimate. Below a tenth of ``n_particles`` it is a rough one
        :return: Shape (batch_size,), or a pair of that shape
        """
        n_particles = check_integer("n_particles", n_particles, 1)
        obs_tensor, vectorized = self._query(obs)
        ent_coef = self.ent_coef_tensor
        values, sample_sizes = [], []
        with th.no_grad():
            for i in range(batch_size(obs_tensor)):
                row = rows(obs_tensor, slice(i, i + 1))
                u, log_prob_a = defensive_proposal(*self._density(row, -(-n_particles // 2)), n_particles)
                q_values = min_q_values(self.critic, row, u)
                values.append(soft_value(q_values, log_prob_a, ent_coef))
                sample_sizes.append(effective_sample_size(q_values, log_prob_a, ent_coef))
        value = self._answer(th.cat(values) + ent_coef * self._log_scale, vectorized)
        return (value, self._answer(th.cat(sample_sizes), vectorized)) if return_sample_size else value

    def _query(self, obs: Observations) -> tuple[PyTorchObs, bool]:
        """Observations on the device, and whether they came as a batch; networks in evaluation mode."""
        self.policy.set_training_mode(False)
        return self.policy.obs_to_tensor(obs)

    def _density(self, obs: PyTorchObs, n_particles: int) -> tuple[th.Tensor, th.Tensor]:
        """Components of the policy's density, shapes (batch_size, n_particles, action_dim)."""
        features = self.ema_actor.features(obs)
        return self.ema_actor.components(features, n_particles, stratified=True)

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
        a = self.policy.scale_action(actions).reshape(len(actions), -1, self.ema_actor.action_dim)
        return th.as_tensor(a, dtype=th.float32, device=self.device), n_axes == 1

    @property
    def _log_scale(self) -> float:
        """Log of the volume of the environment's action box over that of (-1, 1)^d."""
        return float(np.log((self.action_space.high - self.action_space.low) / 2.0).sum())

    @staticmethod
    def _answer(values: th.Tensor, vectorized: bool, squeeze: bool = False) -> np.ndarray:
        array = (values.squeeze(1) if squeeze else values).cpu().numpy()
        return array if vectorized else array[0]
