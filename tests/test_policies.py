"""The policy: what trains the actor is seen, target and average stand still, what is saved holds weights alone."""

import copy
import pickle
import threading

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from sb3_softq import DiscreteSoftQ, SoftQ
from sb3_softq.composition import SumOfCritics
from sb3_softq.critic import JointBatchNorm, folded
from sb3_softq.networks import particle_forward
from tests.conftest import flat, small

OBS = np.random.default_rng(0).uniform(-1, 1, (64, 3)).astype(np.float32)
# where a demonstrator goes, in the environment's units
DEMONSTRATED = OBS[:, :1]


def make(algorithm=SoftQ, env="Pendulum-v1", **kwargs):
    return small(algorithm, env=env, **({"width": 16} | kwargs))


def train_on(model, n=1):
    model.set_logger(configure(None, []))
    model.train(gradient_steps=n, batch_size=8)


def clone(model, act, optimizer):
    """Supervised steps towards the demonstrations, as one would take them with SAC."""
    target = th.as_tensor(model.policy.scale_action(DEMONSTRATED))
    for _ in range(300):
        loss = (act(th.as_tensor(OBS), True) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def error(model):
    return np.square(model.policy.scale_action(model.predict(OBS, deterministic=True)[0] - DEMONSTRATED)).mean()


OPTIMIZERS = {
    "the actor's own": lambda model: model.actor.optimizer,
    "Adam": lambda model: th.optim.Adam(model.actor.parameters(), lr=3e-3),
    "foreach": lambda model: th.optim.Adam(model.policy.actor.parameters(), lr=3e-3, foreach=True),
    "all of the policy's": lambda model: th.optim.RMSprop([p for p in model.policy.parameters() if p.requires_grad], lr=3e-3),
    "fused": lambda model: th.optim.Adam(model.policy.actor.parameters(), lr=3e-3, fused=True),
    "SGD": lambda model: th.optim.SGD(model.actor.parameters(), lr=0.3, momentum=0.9),
}


@pytest.mark.parametrize("through", ["policy", "actor"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("n_steps", [0, 30])
def test_demonstrations_are_cloned(tmp_path, through, optimizer, n_steps):
    """Into a fresh agent or a trained one: predict, a saved agent, a copy and the policy alone imitate."""
    model = make().learn(n_steps)
    before = error(model)
    loss = clone(model, getattr(model, through), OPTIMIZERS[optimizer](model))
    assert loss < 0.02 < before
    assert error(model) == pytest.approx(loss, abs=0.01)
    model.save(tmp_path / "model")
    model.policy.save(tmp_path / "policy")
    expected = model.predict(OBS, deterministic=True)[0]
    copies = SoftQ.load(tmp_path / "model", device="cpu"), copy.deepcopy(model), cloudpickle.loads(cloudpickle.dumps(model))
    for other in (*copies, type(model.policy).load(tmp_path / "policy", device="cpu")):
        np.testing.assert_array_equal(other.predict(OBS, deterministic=True)[0], expected)


@pytest.mark.parametrize("ask", [copy.deepcopy, cloudpickle.dumps, lambda model: model.get_parameters()])
def test_what_is_asked_first_does_not_matter(ask):
    model = make().learn(30)
    clone(model, model.policy, model.actor.optimizer)
    expected = model.actor(th.as_tensor(OBS), True).detach()
    answer = ask(model)
    if isinstance(answer, bytes):
        answer = pickle.loads(answer)
    if isinstance(answer, dict):
        other = make(seed=1)
        other.set_parameters(answer)
        answer = other
    for policy in (answer.policy, model.policy):
        assert th.equal(policy.ema_actor(th.as_tensor(OBS), True), expected)


def test_the_policy_has_gradients():
    model = make().learn(30)
    model.policy(th.as_tensor(OBS), True).sum().backward()
    assert all(parameter.grad is not None for parameter in model.actor.trunk.parameters())
    assert all(parameter.grad is None for parameter in model.ema_actor.parameters())
    # without them it answers as predict does
    with th.no_grad():
        actions = model.policy(th.as_tensor(OBS), True).numpy()
    np.testing.assert_allclose(model.policy.unscale_action(actions), model.predict(OBS, deterministic=True)[0], rtol=1e-5)


def test_training_goes_on_from_what_was_cloned():
    """The average does not follow the first updates, whose critics know nothing yet."""
    model = make().learn(5)
    model.learning_starts = 0
    clone(model, model.policy, model.actor.optimizer)
    before = flat(model.actor)
    train_on(model)
    step = flat(model.ema_actor) - before
    th.testing.assert_close(step, 1e-3 * (flat(model.actor) - before), rtol=1e-2, atol=1e-7)


WRITES = {
    "set_parameters": lambda model, other: model.set_parameters(other.get_parameters()),
    "load_state_dict of the policy": lambda model, other: model.policy.load_state_dict(other.policy.state_dict()),
    "a file": lambda model, other: model.set_parameters(other),
}


@pytest.mark.parametrize("write", WRITES)
def test_parameters_of_a_trained_agent_are_kept(tmp_path, write):
    """Into a fresh agent, whose average would be nine tenths of the newest actor after an update."""
    model, trained = make(seed=1).learn(5), make(learning_rate=1e-2).learn(60)
    expected = flat(trained.ema_actor)
    assert not th.equal(expected, flat(trained.actor))
    if write == "a file":
        trained.save(tmp_path / "model")
    WRITES[write](model, trained if write != "a file" else tmp_path / "model.zip")
    assert th.equal(flat(model.ema_actor), expected)
    assert th.equal(flat(model.actor), flat(trained.actor))
    # as if it had been trained here: 52 updates
    assert model.policy.n_averaged == trained.policy.n_averaged == 52
    model.replay_buffer = trained.replay_buffer
    train_on(model)
    th.testing.assert_close(flat(model.ema_actor), expected + 9 / 62 * (flat(model.actor) - expected))


def test_the_actor_alone_can_be_loaded():
    model, other = make().learn(30), make(seed=1)
    other.set_parameters({"policy": {f"actor.{k}": v for k, v in model.actor.state_dict().items()}}, exact_match=False)
    other.policy.set_training_mode(False)
    assert th.equal(flat(other.ema_actor), flat(model.actor))
    third = make(seed=2)
    third.actor.load_state_dict(model.actor.state_dict())
    with th.no_grad():
        assert th.equal(third.policy(th.as_tensor(OBS), True), model.actor(th.as_tensor(OBS), True))


def test_critics_alone_leave_the_average_alone():
    model, other = make().learn(30), make(seed=1).learn(30)
    before, n = flat(other.ema_actor), other.policy.n_averaged
    critic = {f"critic.{k}": v for k, v in model.critic.state_dict().items()}
    other.set_parameters({"policy": critic}, exact_match=False)
    other.predict(OBS)
    assert th.equal(flat(other.ema_actor), before)
    assert other.policy.n_averaged == n


def test_what_goes_by_data_is_noticed():
    """As evolution strategies write."""
    model = make().learn(30)
    nn.utils.vector_to_parameters(th.zeros_like(flat(model.actor)), model.actor.parameters())
    model.predict(OBS)
    assert not flat(model.ema_actor).any()


def test_what_nobody_can_notice_is_copied_on_demand():
    model = make().learn(30)
    weight = model.actor.trunk[0].weight
    weight.data.zero_()
    model.predict(OBS)
    assert model.ema_actor.trunk[0].weight.any()
    model.policy.sync_ema_actor(force=True)
    assert not model.ema_actor.trunk[0].weight.any()


@pytest.mark.parametrize("move", [lambda policy: policy.to("cpu"), lambda policy: policy.double().float(), pickle.dumps])
def test_nothing_is_copied_where_nobody_wrote(move):
    model = make().learn(30)
    before = flat(model.ema_actor)
    move(model.policy)
    model.predict(OBS)
    assert th.equal(flat(model.ema_actor), before)
    assert not th.equal(flat(model.actor), before)


class Noisy(BaseFeaturesExtractor):
    """Batch normalisation and dropout, which training mode moves and makes random."""

    def __init__(self, observation_space):
        super().__init__(observation_space, 3)
        self.net = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5))

    def forward(self, obs):
        return self.net(obs)


TO_TRAINING = {
    "train": lambda network: network.train(),
    "set_training_mode": lambda network: network.set_training_mode(True),
    "apply": lambda network: network.apply(lambda module: module.train()),
}


@pytest.mark.parametrize("call", TO_TRAINING)
@pytest.mark.parametrize("part", ["policy", "ema_actor", "critic_target"])
def test_average_and_target_stand_in_evaluation_mode(call, part):
    model = make(policy_kwargs=dict(net_arch=[8], features_extractor_class=Noisy), tau=0.5).learn(20)
    model.policy.set_training_mode(False)
    TO_TRAINING[call](model.policy if part == "policy" else getattr(model.policy, part))
    for network in (model.ema_actor, model.critic_target):
        assert not any(module.training for module in network.modules())
        assert not any(parameter.requires_grad for parameter in network.parameters())
    assert model.policy.actor.training == (part == "policy")
    buffers = copy.deepcopy(list(model.ema_actor.buffers()))
    answers = [model.ema_actor(th.as_tensor(OBS), True) for _ in range(2)]
    assert th.equal(*answers)
    assert all(th.equal(*pair) for pair in zip(buffers, model.ema_actor.buffers(), strict=True))


@pytest.mark.parametrize("call", TO_TRAINING)
def test_the_target_of_discrete_agents_likewise(call):
    model = make(DiscreteSoftQ, "CartPole-v1", policy_kwargs=dict(features_extractor_class=NoisyCartPole)).learn(20)
    TO_TRAINING[call](model.policy)
    assert not any(module.training for module in model.critic_target.modules())
    assert model.critic.training


class NoisyCartPole(Noisy):
    def __init__(self, observation_space):
        super().__init__(observation_space)
        self.net = nn.Sequential(nn.Linear(4, 3), self.net)


@pytest.mark.parametrize("call", ["train", "apply"])
def test_frozen_sums_likewise(call):
    sum_of_critics = SumOfCritics([make().critic, make().critic], [1.0, 1.0])
    TO_TRAINING[call](sum_of_critics)
    assert not any(module.training for module in sum_of_critics.modules())


class Normed(BaseFeaturesExtractor):
    """Weight normalisation, whose weight is no leaf: copy.deepcopy refuses it."""

    def __init__(self, observation_space):
        super().__init__(observation_space, 5)
        with pytest.warns(FutureWarning):
            self.net = nn.utils.weight_norm(nn.Linear(3, 5))

    def forward(self, obs):
        return self.net(obs)


class Remembering(BaseFeaturesExtractor):
    """Keeps a tensor of its last forward pass, from the first one in its constructor on."""

    def __init__(self, observation_space):
        super().__init__(observation_space, 5)
        self.net = nn.Linear(3, 5)
        self(th.zeros(1, 3))

    def forward(self, obs):
        self.last = self.net(obs)
        return self.last


class Locked(BaseFeaturesExtractor):
    """Holds what no copy can be made of."""

    def __init__(self, observation_space):
        super().__init__(observation_space, 3)
        self.lock = threading.Lock()

    def forward(self, obs):
        return obs


@pytest.mark.parametrize("extractor", [Normed, Remembering, Locked])
def test_extractors_that_cannot_be_copied(extractor):
    with pytest.raises((RuntimeError, TypeError)):
        copy.deepcopy(extractor(spaces.Box(-1.0, 1.0, (3,))))
    model = make(policy_kwargs=dict(net_arch=[8], features_extractor_class=extractor)).learn(30)
    assert model._n_updates > 0
    assert th.equal(flat(make(policy_kwargs=dict(net_arch=[8])).ema_actor), flat(make(policy_kwargs=dict(net_arch=[8])).actor))


def test_predict_in_another_thread_answers_from_the_average():
    """While learn explores with the trained actor."""
    model = make(learning_starts=0, learning_rate=1e-12, actor_learning_rate=1e-12, policy_kwargs=dict(net_arch=[8]))
    model.learn(3)
    # two actors that nobody can mistake for one another, and that do not move
    with th.no_grad():
        for actor, value in ((model.actor, 2.0), (model.ema_actor, -2.0)):
            for parameter in actor.parameters():
                parameter.zero_()
            actor.head[-1].bias[0] = value
            actor.head[-1].bias[1] = -50.0
    model.policy._follow()
    answers, stop = [], threading.Event()

    def ask():
        while not stop.is_set():
            answers.append(model.predict(OBS[0], deterministic=True)[0].item())

    thread = threading.Thread(target=ask)
    thread.start()
    model.gradient_steps = 0
    try:
        model.learn(300, reset_num_timesteps=False)
    finally:
        stop.set()
        thread.join()
    assert len(answers) > 20
    assert max(answers) < 0
    # and it was the trained actor that acted
    assert model.replay_buffer.actions[10:200].mean() > 0.5


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


def test_training_on_observations_far_from_zero():
    class Far(gym.ObservationWrapper):
        def observation(self, observation):
            return (observation + 1e6).astype(np.float32)

    def env():
        env = Far(gym.make("Pendulum-v1"))
        env.observation_space = spaces.Box(-np.inf, np.inf, (3,))
        return env

    model = make(env=make_vec_env(env)).learn(60)
    assert np.isfinite(model.q_values(OBS + np.float32(1e6), DEMONSTRATED)).all()
