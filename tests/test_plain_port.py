"""SoftQ with the arguments of SQL (2017) against a plain port of it, which computes each term by autograd."""

from dataclasses import replace

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from examples.benchmark.plain_port import PlainSoftQ
from examples.benchmark.plain_port import stein_direction as plain_stein_direction
from sb3_softq import SQL_2017, SoftQ
from sb3_softq.stein import stein_direction, tanh_log_det_grad
from tests.conftest import AnySpaces, flat

OBSERVATION_DIM, ACTION_DIM, BATCH_SIZE, ALPHA = 5, 3, 32, 0.2


def minibatch(seed):
    th.manual_seed(seed)
    return ReplayBufferSamples(
        observations=th.randn(BATCH_SIZE, OBSERVATION_DIM),
        actions=2 * th.rand(BATCH_SIZE, ACTION_DIM) - 1,
        next_observations=th.randn(BATCH_SIZE, OBSERVATION_DIM),
        dones=(th.rand(BATCH_SIZE, 1) < 0.3).float(),
        rewards=3 * th.randn(BATCH_SIZE, 1),
    )


def make_pair(learning_rate, target_update_interval=1000):
    """SoftQ and the plain port with the same weights."""
    model = SoftQ(
        "MlpPolicy",
        AnySpaces(spaces.Box(-1.0, 1.0, (OBSERVATION_DIM,)), spaces.Box(-1.0, 1.0, (ACTION_DIM,))),
        learning_rate=learning_rate,
        learning_starts=0,
        buffer_size=BATCH_SIZE,
        batch_size=BATCH_SIZE,
        tau=1.0,
        normalize_rewards=False,
        target_update_interval=target_update_interval,
        actor_tau=1.0,
        n_value_particles=16,
        n_actor_particles=16,
        particle_options=replace(SQL_2017["particle_options"], n_actor_states=BATCH_SIZE),
        ent_coef=ALPHA,
        policy_kwargs=SQL_2017["policy_kwargs"] | dict(net_arch=dict(pi=[], qf=[24, 16]), head_arch=[24, 16]),
        seed=0,
        device="cpu",
    )
    model.learn(0)  # sets up the logger
    plain = PlainSoftQ(
        OBSERVATION_DIM,
        ACTION_DIM,
        [24, 16],
        learning_rate=learning_rate,
        ent_coef=ALPHA,
        target_update_interval=target_update_interval,
    )
    plain.actor.load_state_dict(model.actor.head.state_dict())
    plain.critic.load_state_dict(model.critic.q_networks[0].state_dict())
    plain.critic_target.load_state_dict(model.critic_target.q_networks[0].state_dict())
    return model, plain


def update_both(model, plain, monkeypatch, seed):
    """One update of each on the same minibatch with the same noise. Returns both critic losses."""
    data = minibatch(seed)
    monkeypatch.setattr(model.replay_buffer, "sample", lambda *args, **kwargs: data)
    th.manual_seed(seed)
    plain_loss = plain.update(data.observations, data.actions, data.rewards, data.next_observations, data.dones)
    th.manual_seed(seed)
    model.logger.name_to_value.clear()
    model.logger.name_to_count.clear()
    model.train(1, BATCH_SIZE)
    return model.logger.name_to_value["train/critic_loss"], plain_loss


def gradients(module):
    return th.cat([parameter.grad.flatten() for parameter in module.parameters()])


def assert_close(ours, plain):
    """To the precision of float32, relative to the largest entry: the two add in different orders."""
    assert plain.abs().max() > 0
    assert (ours - plain).abs().max() <= 2e-4 * plain.abs().max()


def test_same_losses_and_gradients(monkeypatch):
    # so slow that the actor's step sees the critic that both started from
    model, plain = make_pair(learning_rate=1e-9)
    loss, plain_loss = update_both(model, plain, monkeypatch, seed=1)
    assert loss == pytest.approx(plain_loss, rel=1e-4)
    assert_close(gradients(model.critic.q_networks[0]), gradients(plain.critic))
    assert_close(gradients(model.actor.head), gradients(plain.actor))


def test_same_stein_direction():
    model, plain = make_pair(learning_rate=1e-3)
    obs = minibatch(2).observations
    u = 0.7 * th.randn(BATCH_SIZE, 16, ACTION_DIM)
    fixed, updated = u[:, :8].requires_grad_(True), u[:, 8:]
    q_values = model.critic.q_values(model.critic.features(obs), th.tanh(fixed))
    (q_force,) = th.autograd.grad(q_values.sum(), fixed)
    with th.no_grad():
        force = q_force + ALPHA * tanh_log_det_grad(fixed)
        phi = stein_direction(fixed, force, updated, repulsion=ALPHA)
    assert_close(phi, plain.direction(obs, fixed, updated))


def test_same_stein_direction_in_float64():
    generator = th.Generator().manual_seed(3)
    fixed, updated, grad_log_p = th.randn(3, 6, 8, 4, dtype=th.float64, generator=generator)
    phi = ALPHA * plain_stein_direction(fixed, updated, grad_log_p)
    th.testing.assert_close(stein_direction(fixed, ALPHA * grad_log_p, updated, repulsion=ALPHA), phi, rtol=1e-10, atol=1e-12)


def test_same_course_with_a_hard_target(monkeypatch):
    model, plain = make_pair(learning_rate=1e-3, target_update_interval=3)
    losses = np.array([update_both(model, plain, monkeypatch, seed) for seed in range(7)])
    assert losses[:, 0] == pytest.approx(losses[:, 1], rel=2e-3)
    modules = [
        (model.actor.head, plain.actor),
        (model.critic.q_networks[0], plain.critic),
        # last copied at the sixth update
        (model.critic_target.q_networks[0], plain.critic_target),
    ]
    for pair in modules:
        ours, port = (flat(module) for module in pair)
        # Adam's first steps have the size of the learning rate whatever the gradient, also where it is rounding alone
        assert (ours - port).abs().mean() < 1e-5
