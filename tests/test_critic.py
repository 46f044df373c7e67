"""The critics: joint batch normalisation of transitions and next pairs, its gradients, and its running statistics."""

import copy

import pytest
import torch as th
from torch import nn

from sb3_softq.batch_norm import JointBatchNorm, joint_statistics
from sb3_softq.critic import CriticLayer
from sb3_softq.networks import particle_forward
from tests.conftest import ask_onednn, batch_normalised, needs_onednn, small


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
    outputs = th.stack([th.stack([net(pair) for pair in pairs.unbind(1)], dim=1) for net in critic.q_networks])
    expected = critic.q_of(outputs)
    for values in q_values:
        th.testing.assert_close(values, expected)


def critic_gradients(loss, critic):
    """Of each critic, in the order of the parameters of its network."""
    critic.zero_grad()
    loss.backward()
    return [[parameter.grad for parameter in net.parameters()] for net in critic.q_networks]


@pytest.fixture(params=[nn.ReLU, nn.Tanh, nn.PReLU])
def critic(request):
    """In double precision, with normalisation that is no longer that of the start."""
    model = small(policy_kwargs=dict(net_arch=[8, 8], activation_fn=request.param)).learn(20)
    return model.critic.double()


def draw(n_rows, n_particles):
    """Observations, which are float32 whatever the critics are, and actions."""
    obs, next_obs = th.randn(n_rows, 3), 0.5 + 2.0 * th.randn(n_rows, 3)
    actions, next_actions = th.randn(n_rows, 1).double(), 0.5 + 2.0 * th.randn(n_rows, n_particles, 1).double()
    return obs, actions, next_obs, next_actions


@pytest.mark.parametrize("by_onednn", [False, pytest.param(True, marks=needs_onednn)], ids=["double", "single-onednn"])
def test_gradients_of_batch_renormalisation(critic, by_onednn, monkeypatch):
    """Against Algorithm 1 of arXiv 1702.03275 without its bounds, with the statistics of the joint batch, and autograd."""
    obs, actions, next_obs, next_actions = draw(16, 3)
    pairs = th.cat([obs, actions], dim=1)
    next_pairs = th.cat([next_obs.repeat_interleave(3, dim=0), next_actions.flatten(0, 1)], dim=1)
    oracles = copy.deepcopy(critic.q_networks)
    expected, expected_next = zip(*(joint_normalised(net, pairs, th.cat([pairs, next_pairs])) for net in oracles), strict=True)
    calls = ask_onednn(monkeypatch)
    if by_onednn:
        critic, actions, next_actions = critic.float(), actions.float(), next_actions.float()
    outputs, next_outputs = critic.joint_outputs(obs, actions, next_obs, next_actions)
    assert not next_outputs.requires_grad
    # what follows has no more digits than float32
    th.testing.assert_close(outputs, th.stack(expected).float())
    th.testing.assert_close(next_outputs, th.stack(expected_next).float().unflatten(1, (16, 3)))
    gradients = critic_gradients((outputs - 1.0).square().mean(dim=(1, 2)).sum(), critic)
    for net, values, mine in zip(oracles, expected, gradients, strict=True):
        theirs = th.autograd.grad((values - 1.0).square().mean(), list(net.parameters()))
        tolerance = dict(rtol=1e-3, atol=1e-5) if by_onednn else dict(rtol=1e-5, atol=1e-7)
        th.testing.assert_close(mine, list(theirs), check_dtype=not by_onednn, **tolerance)
    assert bool(calls) == by_onednn


def joint_normalised(net, x, joint):
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


def test_batch_renormalisation_of_one_distribution(critic):
    """Where the next pairs are copies of the transitions, the gradient is that of one pass through all of them."""
    obs, actions, _, _ = draw(16, 1)
    oracles = copy.deepcopy(critic.q_networks)
    outputs, _ = critic.joint_outputs(obs, actions, obs, actions.unsqueeze(1).expand(-1, 3, -1))
    gradients = critic_gradients((outputs - 1.0).square().mean(dim=(1, 2)).sum(), critic)
    for net, mine in zip(oracles, gradients, strict=True):
        expected = batch_normalised(net, th.cat([obs, actions], dim=1).repeat(4, 1))[:16]
        theirs = th.autograd.grad((expected - 1.0).square().mean(), list(net.parameters()))
        th.testing.assert_close(mine, list(theirs), rtol=1e-5, atol=1e-7)


def test_a_features_extractor_learns_through_batch_renormalisation():
    """The gradient to the observations' features, which the first layer passes on, against finite differences."""
    layer = CriticLayer([nn.Linear(4, 5)] * 2, [JointBatchNorm(4)] * 2).double()
    x, y = th.randn(2, 6, 4).double().requires_grad_(True), th.randn(2, 9, 4).double()
    statistics = joint_statistics(x.detach(), y)

    def output(x):
        # constants turn the statistics of the transitions into those of the joint batch, as at the point of the gradient
        own_mean, own_var = x.mean(dim=1), x.var(dim=1, correction=0)
        own_std, std = (own_var + 1e-3).sqrt(), (statistics.var + 1e-3).sqrt()
        r = ((statistics.own_var + 1e-3).sqrt() / std).unsqueeze(1)
        d = ((statistics.own_mean - statistics.mean) / std).unsqueeze(1)
        z = (x - own_mean.unsqueeze(1)) / own_std.unsqueeze(1) * r + d
        return (z @ layer.weight.mT + layer.bias.unsqueeze(1)).sin().sum()

    h = 1e-6
    numerical = th.zeros_like(x)
    with th.no_grad():
        for i in range(x.numel()):
            step = th.zeros(x.numel()).double()
            step[i] = h
            step = step.view_as(x)
            numerical.view(-1)[i] = (output(x + step) - output(x - step)) / (2 * h)
    for subtract_first in (True, False):
        (gradient,) = th.autograd.grad(layer.joint_forward(x, y, subtract_first)[0].sin().sum(), x)
        th.testing.assert_close(gradient, numerical, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1e6, 1.0), (-3e5, 0.1), (1e4, 1e-2)])
@pytest.mark.parametrize("n_particles", [1, 4])
def test_observations_far_from_zero_keep_their_digits(mean, std, n_particles):
    """The folded first layer against normalisation before it, in double precision."""
    th.manual_seed(0)
    features = mean + std * th.randn(128, 17, dtype=th.float64)
    features, actions = features.float(), th.rand(128, n_particles, 6) * 2 - 1
    norm, linears = JointBatchNorm(23), [nn.Linear(23, 64), nn.Linear(64, 1)]
    norm.running_mean[:17], norm.running_var[:17] = features.double().mean(dim=0), features.double().var(dim=0)
    with th.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_()
    layers = [CriticLayer(linears[:1], [norm]), CriticLayer(linears[1:])]
    folded = [layer.fold(subtract_first=depth == 0) for depth, layer in enumerate(layers)]
    result = particle_forward(folded, lambda _, hidden: hidden.relu(), features, actions)[0]
    net = nn.Sequential(norm, linears[0], nn.ReLU(), linears[1])
    pairs = th.cat([features.unsqueeze(1).expand(-1, n_particles, -1), actions], dim=2)
    unfolded = net(pairs)
    exact = copy.deepcopy(net).double()(pairs.double())
    assert (result - exact).abs().max() < 2 * (unfolded - exact).abs().max() + 1e-6


@pytest.mark.parametrize("batch_norm", [True, False])
def test_fixed_weights_need_no_gradient(batch_norm):
    """The same Q and gradient to the actions; the weights are no part of the graph."""
    critic = small(tau=1.0 if batch_norm else 0.005, policy_kwargs=dict(batch_norm=batch_norm)).critic
    features = critic.features(th.randn(6, 3))
    gradients = []
    for fixed in (False, True):
        actions = th.linspace(-0.9, 0.9, 24).view(6, 4, 1).requires_grad_(True)
        q_values = critic.q_values(features, actions, weights_are_fixed=fixed)
        (gradient,) = th.autograd.grad(q_values.sum(), actions, retain_graph=True)
        gradients.append(gradient)
        weights = [parameter for name, parameter in critic.named_parameters() if name.startswith("layers.")]
        reached = th.autograd.grad(q_values.sum(), weights, allow_unused=True)
        assert fixed == all(value is None for value in reached)
    th.testing.assert_close(*gradients)


# ---------------------------------------------------------------------- the critics as networks of their own


def test_networks_are_views():
    model = small()
    critic, state = model.critic, th.get_rng_state()
    nets = critic.q_networks
    assert th.equal(th.get_rng_state(), state)
    linear = next(module for module in nets[1] if isinstance(module, nn.Linear))
    with th.no_grad():
        linear.weight.fill_(0.5)
    assert (critic.layers[0].weight[1] == 0.5).all()
    assert not (critic.layers[0].weight[0] == 0.5).any()
    assert linear.weight.grad is None
    obs, actions = th.zeros(2, 3), th.zeros(2, 1)
    critic(obs, actions)[1].sum().backward()
    gradients = critic.layers[-1].weight.grad
    assert th.equal([module for module in critic.q_networks[1] if isinstance(module, nn.Linear)][-1].weight.grad, gradients[1])
    assert th.equal(critic.q1_forward(obs, actions), critic(obs, actions)[0])


@pytest.mark.parametrize("activation_fn", [nn.ReLU, nn.PReLU])
@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("n_critics", [1, 3])
@pytest.mark.parametrize("optimizer_class", [th.optim.Adam, th.optim.SGD])
def test_critics_of_release_0_1_0(activation_fn, batch_norm, n_critics, optimizer_class):
    """Weights and the optimizer's state: the next step is the one that the separate networks make."""
    kwargs = dict(n_critics=n_critics, activation_fn=activation_fn, batch_norm=batch_norm, net_arch=[8, 8], n_bins=1)
    tau = 1.0 if batch_norm else 0.005
    old, model = (small(tau=tau, seed=seed, policy_kwargs=dict(kwargs)).learn(20) for seed in (0, 1))
    nets = copy.deepcopy(old.critic.q_networks)
    parameters = [parameter for net in nets for parameter in net.parameters()]
    settings = dict(lr=0.1, momentum=0.9) if optimizer_class is th.optim.SGD else dict(lr=0.1, betas=(0.5, 0.999))
    optimizer = optimizer_class(parameters, **settings)
    own = optimizer_class(list(model.critic.parameters()), **settings)

    def step(optimizer, parameters):
        for parameter in parameters:
            parameter.grad = th.sin(parameter.detach() + 0.1)
        optimizer.step()

    step(optimizer, parameters)
    step(optimizer, parameters)
    state = {key: value.clone() for i, net in enumerate(nets) for key, value in net.state_dict(prefix=f"qf{i}.").items()}
    model.critic.load_state_dict(state)
    own.load_state_dict(copy.deepcopy(model.critic.stacked_optimizer_state(optimizer.state_dict())))
    obs, actions = th.randn(5, 3), th.rand(5, 1)
    pairs = th.cat([obs, actions], dim=1)
    th.testing.assert_close(model.critic(obs, actions), tuple(net(pairs) for net in nets))
    step(optimizer, parameters)
    step(own, list(model.critic.parameters()))
    for mine, theirs in zip(model.critic.q_networks, nets, strict=True):
        th.testing.assert_close(list(mine.parameters()), list(theirs.parameters()))
