"""The critics: joint batch normalisation of transitions and next pairs, its gradients, and its running statistics."""

import copy

import pytest
import torch as th
from torch import nn

from sb3_softq.critic import JointBatchNorm, folded, joint_forward
from sb3_softq.networks import particle_forward
from tests.conftest import batch_normalised, small


def test_running_statistics_of_the_critics():
    """Learned from both halves of the critics' pass; what is asked apart from it uses them and leaves them alone."""
    model = small(n_value_particles=3, tau=1.0, policy_kwargs=dict(batch_norm=True)).learn(20)
    critic = model.critic
    data = model.replay_buffer.sample(16)
    norm = critic.q_networks[0][0]
    before = norm.running_mean.clone(), norm.running_var.clone()
    model.policy.set_training_mode(True)
    th.manual_seed(1)
    u, _ = model.propose(data.next_observations, 3)
    th.manual_seed(1)
    model.update_critic(data, model.ent_coef_tensor)
    obs = th.cat([data.observations, data.next_observations.repeat(3, 1)])
    pairs = th.cat([obs, th.cat([data.actions, *th.tanh(u).unbind(1)])], dim=1)
    th.testing.assert_close(norm.running_mean, 0.9 * before[0] + 0.1 * pairs.mean(dim=0))
    th.testing.assert_close(norm.running_var, 0.9 * before[1] + 0.1 * pairs.var(dim=0))

    statistics = [buffer.clone() for buffer in critic.buffers()]
    model.update_actor(data, model.ent_coef_tensor)
    actions = th.rand(16, 5, 1) * 2 - 1
    q_values = [critic.q_values(critic.features(data.observations), actions)]
    model.policy.set_training_mode(False)
    q_values.append(critic.q_values(critic.features(data.observations), actions))
    assert all(th.equal(*pair) for pair in zip(statistics, critic.buffers(), strict=True))
    pairs = th.cat([data.observations.unsqueeze(1).expand(-1, 5, -1), actions], dim=2)
    # the modules themselves, in evaluation mode, one pair at a time
    expected = th.stack([th.stack([net(pair) for pair in pairs.unbind(1)], dim=1).squeeze(2) for net in critic.q_networks])
    for values in q_values:
        th.testing.assert_close(values, expected)


def joint_normalised(net, x, joint):
    """Batch renormalisation, Algorithm 1 of arXiv 1702.03275 without its bounds and with the statistics of the joint batch."""
    for layer in net:
        if isinstance(layer, JointBatchNorm):
            own_mean, joint_mean = (z.mean(dim=0) for z in (x, joint))
            own_std, joint_std = ((z.var(dim=0, correction=0) + 1e-3).sqrt() for z in (x, joint))
            r, d = (own_std / joint_std).detach(), ((own_mean - joint_mean) / joint_std).detach()
            x = ((x - own_mean) / own_std * r + d) * layer.weight + layer.bias
            joint = (joint - joint_mean) / joint_std * layer.weight + layer.bias
        else:
            x, joint = layer(x), layer(joint)
    return x, joint[len(x) :]


def critic_gradients(q_values, net):
    return th.autograd.grad((q_values - 1.0).square().mean(), list(net.parameters()))


@pytest.mark.parametrize("activation_fn", [nn.ReLU, nn.Tanh])
def test_gradients_of_batch_renormalisation(activation_fn):
    model = small(policy_kwargs=dict(net_arch=[8, 8], activation_fn=activation_fn)).learn(20)
    net = model.critic.q_networks[0].double()
    pairs, next_pairs = th.randn(16, 4, dtype=th.float64), 0.5 + 2.0 * th.randn(48, 4, dtype=th.float64)
    oracle = copy.deepcopy(net)
    expected, expected_next = joint_normalised(oracle, pairs, th.cat([pairs, next_pairs]))
    q_values, next_q_values = joint_forward(net, pairs, next_pairs)
    assert not next_q_values.requires_grad
    # what follows has no more digits than float32
    th.testing.assert_close(q_values, expected.float())
    th.testing.assert_close(next_q_values, expected_next.float())
    th.testing.assert_close(critic_gradients(q_values, net), critic_gradients(expected, oracle), rtol=1e-5, atol=1e-7)


def test_batch_renormalisation_of_one_distribution():
    """Where the next pairs are copies of the transitions, the gradient is that of one pass through all of them."""
    model = small(policy_kwargs=dict(net_arch=[8, 8])).learn(20)
    net = model.critic.q_networks[0].double()
    oracle = copy.deepcopy(net)
    pairs = th.randn(16, 4, dtype=th.float64)
    expected = batch_normalised(oracle, pairs.repeat(4, 1))[:16]
    q_values, _ = joint_forward(net, pairs, pairs.repeat(3, 1))
    th.testing.assert_close(
        critic_gradients(q_values.squeeze(1), net), critic_gradients(expected, oracle), rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1e6, 1.0), (-3e5, 0.1), (1e4, 1e-2)])
@pytest.mark.parametrize("n_particles", [1, 4])
def test_observations_far_from_zero_keep_their_digits(mean, std, n_particles):
    """The folded first layer against normalisation before it, in double precision."""
    th.manual_seed(0)
    features = mean + std * th.randn(128, 17, dtype=th.float64)
    features, actions = features.float(), th.rand(128, n_particles, 6) * 2 - 1
    norm, linear = JointBatchNorm(23), nn.Linear(23, 64)
    norm.running_mean[:17], norm.running_var[:17] = features.double().mean(dim=0), features.double().var(dim=0)
    with th.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_()
    net = nn.Sequential(norm, linear, nn.ReLU(), nn.Linear(64, 1))
    result = particle_forward(folded(net), features, actions)
    pairs = th.cat([features.unsqueeze(1).expand(-1, n_particles, -1), actions], dim=2)
    unfolded = net(pairs)
    exact = copy.deepcopy(net).double()(pairs.double())
    assert (result - exact).abs().max() < 2 * (unfolded - exact).abs().max() + 1e-6
