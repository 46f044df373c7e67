"""
Soft Q-learning (Haarnoja et al. 2017, https://arxiv.org/abs/1702.08165) in plain PyTorch, written the obvious way: one
term of an equation, one call of autograd. The yardstick of ``speed.py`` and an oracle of the tests.

As in ``sb3_softq`` the Stein step is taken in u-space (a = tanh(u)), the direction is multiplied by the temperature alpha,
and the initialisation is wide, u = xi + net(s, xi). All else is that of SQL (2017): uniform proposals for the soft value,
one critic, a hard target, particles split into a fixed and an updated half, a kernel that keeps them apart.
"""

import copy
import math
from collections.abc import Sequence

import torch as th
from torch import nn


def mlp(input_dim: int, output_dim: int, net_arch: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in net_arch:
        layers += [nn.Linear(input_dim, width), nn.ReLU()]
        input_dim = width
    return nn.Sequential(*layers, nn.Linear(input_dim, output_dim))


def stein_direction(fixed: th.Tensor, updated: th.Tensor, grad_log_p: th.Tensor) -> th.Tensor:
    """
    Eq. (13) with the kernel exp(-|x - y|^2 / h) and the median heuristic, the kernel's gradient by autograd.

    :param fixed: Particles u_j, shape (batch_size, n, action_dim)
    :param updated: Particles u_i, shape (batch_size, m, action_dim)
    :param grad_log_p: Gradient of the log of the target density at the fixed particles
    :return: 1/n sum_j k(u_j, u_i) grad_log_p_j + grad_{u_j} k(u_j, u_i), shape of ``updated``
    """
    batch_size, n, action_dim = fixed.shape
    m = updated.shape[1]
    # a copy of each fixed particle per updated one, so that every pair gets a gradient of its own
    x = fixed.detach().unsqueeze(2).expand(batch_size, n, m, action_dim).clone().requires_grad_(True)
    sq_distances = (x - updated.detach().unsqueeze(1)).pow(2).sum(dim=3)
    h = sq_distances.detach().flatten(start_dim=1).median(dim=1).values / math.log(n)
    kappa = th.exp(-sq_distances / h.clamp(min=1e-3).view(-1, 1, 1))
    (grad_kappa,) = th.autograd.grad(kappa.sum(), x)
    return (kappa.detach().unsqueeze(3) * grad_log_p.unsqueeze(2) + grad_kappa).mean(dim=1)


class PlainSoftQ:
    """
    :param observation_dim: Size of an observation
    :param action_dim: Size of an action
    :param net_arch: Hidden layers of both networks
    :param learning_rate: Learning rate of both Adams
    :param gamma: Discount factor
    :param ent_coef: Temperature alpha, the inverse of the reward scale
    :param n_value_particles: Uniform actions in the soft value
    :param n_kernel_particles: Particles per state of the Stein step, one half fixed and one half updated
    :param target_update_interval: Copy the critic into its target every so many updates
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        net_arch: Sequence[int] = (256, 256),
        learning_rate: float = 3e-4,
        gamma: float = 0.99,
        ent_coef: float = 0.1,
        n_value_particles: int = 16,
        n_kernel_particles: int = 16,
        target_update_interval: int = 1000,
    ):
        self.action_dim = action_dim
        self.gamma = gamma
        self.ent_coef = ent_coef
        self.n_value_particles = n_value_particles
        self.n_kernel_particles = n_kernel_particles
        self.target_update_interval = target_update_interval
        self.n_updates = 0
        self.actor = mlp(observation_dim + action_dim, action_dim, net_arch)
        self.critic = mlp(observation_dim + action_dim, 1, net_arch)
        self.critic_target = copy.deepcopy(self.critic)
        self.actor_optimizer = th.optim.Adam(self.actor.parameters(), lr=learning_rate)
        self.critic_optimizer = th.optim.Adam(self.critic.parameters(), lr=learning_rate)

    @staticmethod
    def q_values(critic: nn.Module, obs: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """Q of several actions per state, shape (batch_size, n)."""
        repeated = obs.unsqueeze(1).expand(-1, actions.shape[1], -1)
        return critic(th.cat([repeated, actions], dim=2)).squeeze(2)

    def sample(self, obs: th.Tensor, n: int) -> th.Tensor:
        """Pre-tanh actions of the sampler, shape (batch_size, n, action_dim)."""
        xi = th.randn(len(obs), n, self.action_dim)
        repeated = obs.unsqueeze(1).expand(-1, n, -1)
        return xi + self.actor(th.cat([repeated, xi], dim=2))

    def target(self, rewards: th.Tensor, next_obs: th.Tensor, dones: th.Tensor) -> th.Tensor:
        """r + gamma V(s') with V of eq. (10) under uniform proposals, whose density over the box is 2^-d."""
        with th.no_grad():
            actions = 2 * th.rand(len(next_obs), self.n_value_particles, self.action_dim) - 1
            log_weights = self.q_values(self.critic_target, next_obs, actions) / self.ent_coef + self.action_dim * math.log(2)
            value = self.ent_coef * (th.logsumexp(log_weights, dim=1) - math.log(self.n_value_particles))
            return rewards + (1 - dones) * self.gamma * value.unsqueeze(1)

    def direction(self, obs: th.Tensor, fixed: th.Tensor, updated: th.Tensor) -> th.Tensor:
        """alpha times the Stein direction towards exp(Q(s, tanh u) / alpha) prod_i (1 - tanh(u_i)^2)."""
        fixed = fixed.detach().requires_grad_(True)
        log_det = th.log(1 - th.tanh(fixed).pow(2) + 1e-6).sum(dim=2)
        log_p = self.q_values(self.critic, obs, th.tanh(fixed)) / self.ent_coef + log_det
        (grad_log_p,) = th.autograd.grad(log_p.sum(), fixed)
        return self.ent_coef * stein_direction(fixed, updated, grad_log_p)

    def update_critic(
        self, obs: th.Tensor, actions: th.Tensor, rewards: th.Tensor, next_obs: th.Tensor, dones: th.Tensor
    ) -> float:
        """Eq. (11)."""
        target = self.target(rewards, next_obs, dones)
        loss = 0.5 * (self.q_values(self.critic, obs, actions.unsqueeze(1)) - target).pow(2).mean()
        self.critic_optimizer.zero_grad()
        loss.backward()
        self.critic_optimizer.step()
        return loss.item()

    def update_actor(self, obs: th.Tensor) -> None:
        """Eq. (14): the Stein direction passed through the sampler."""
        u = self.sample(obs, self.n_kernel_particles)
        fixed, updated = u.chunk(2, dim=1)
        phi = self.direction(obs, fixed, updated)
        parameters = list(self.actor.parameters())
        gradients = th.autograd.grad(updated, parameters, grad_outputs=phi / updated[..., 0].numel())
        for parameter, gradient in zip(parameters, gradients, strict=True):
            # the optimizer descends, the direction ascends
            parameter.grad = -gradient
        self.actor_optimizer.step()

    def update(self, obs: th.Tensor, actions: th.Tensor, rewards: th.Tensor, next_obs: th.Tensor, dones: th.Tensor) -> float:
        """
        One step of critic and actor, and of the target when it is due.

        :param obs: Shape (batch_size, observation_dim)
        :param actions: Actions in the normalised box, shape (batch_size, action_dim)
        :param rewards: Shape (batch_size, 1)
        :param next_obs: Shape (batch_size, observation_dim)
        :param dones: 1 where the episode terminated, shape (batch_size, 1)
        :return: Loss of the critic
        """
        loss = self.update_critic(obs, actions, rewards, next_obs, dones)
        self.update_actor(obs)
        self.n_updates += 1
        if self.n_updates % self.target_update_interval == 0:
            self.critic_target.load_state_dict(self.critic.state_dict())
        return loss
