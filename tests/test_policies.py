"""The policy: networks as asked for, an average that sees what trains the actor, a target that stands still."""

import copy
import pickle
import threading

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import FakeImageEnv, SimpleMultiObsEnv
from stable_baselines3.common.logger import configure
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecTransposeImage, is_vecenv_wrapped
from torch import nn

from sb3_softq import DiscreteSoftQ, SoftQ
from sb3_softq.composition import SumOfCritics
from sb3_softq.data import from_agent
from tests.conftest import check_training, flat, hidden_sizes, small

OBS = np.random.default_rng(0).uniform(-1, 1, (64, 3)).astype(np.float32)
# where a demonstrator goes, in the environment's units
DEMONSTRATED = OBS[:, :1]


def make(algorithm=SoftQ, env="Pendulum-v1", **kwargs):
    return small(algorithm, env=env, **({"width": 16} | kwargs))


def train_on(model, n=1):
    model.set_logger(configure(None, []))
    model.train(gradient_steps=n, batch_size=8)


def clone(model, act, optimizer):
    """Supervised steps towards the demonstrations, as one would take them with SAC, until they are imitated."""
    target = th.as_tensor(model.policy.scale_action(DEMONSTRATED))
    for _ in range(300):
        loss = (act(th.as_tensor(OBS), True) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.003:
            break
    return loss.item()


def error(model):
    return np.square(model.policy.scale_action(model.predict(OBS, deterministic=True)[0] - DEMONSTRATED)).mean()


OPTIMIZERS = {
    "the actor's own": lambda model: model.actor.optimizer,
    "Adam": lambda model: th.optim.Adam(model.actor.parameters(), lr=3e-3),
    "foreach": lambda model: th.optim.Adam(model.policy.actor.parameters(), lr=3e-3, foreach=True),
    "all of the policy's": lambda model: th.optim.RMSprop([p for p in model.policy.parameters() if p.requires_grad], lr=3e-3),
    "fused": lambda model: th.optim.Adam(model.policy.actor.parameters(), lr=3e-3, fused=True),
    "SGD": lambda model: th.optim.SGD(model.actor.parameters(), lr=0.1, momentum=0.9),
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


def test_a_trace_of_the_policy_acts_as_predict_does():
    """As Stable-Baselines3's page on exporting makes it, with gradients enabled."""
    model = make().learn(30)

    class Deterministic(nn.Module):
        def __init__(self):
            super().__init__()
            self.policy = model.policy

        def forward(self, obs):
            return self.policy(obs, deterministic=True)

    traced = th.jit.trace(Deterministic().eval(), th.as_tensor(OBS[:1]))
    actions = model.policy.unscale_action(traced(th.as_tensor(OBS)).detach().numpy())
    np.testing.assert_allclose(actions, model.predict(OBS, deterministic=True)[0], rtol=1e-4, atol=1e-5)


def test_training_goes_on_from_what_was_cloned():
    """The EMA actor does not follow the first updates, whose critics know nothing yet."""
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


def forget(model):
    model.replay_buffer.reset()
    return model


def load(model, tmp_path):
    model.save(tmp_path / "model")
    return SoftQ.load(tmp_path / "model", env=gym.make("Pendulum-v1"), device="cpu", learning_starts=8)


def load_with_buffer(model, tmp_path):
    loaded = load(model, tmp_path)
    model.save_replay_buffer(tmp_path / "buffer")
    loaded.load_replay_buffer(tmp_path / "buffer")
    return loaded


@pytest.mark.parametrize(
    ("change", "is_anew"),
    [
        (lambda model, _: forget(model), True),
        (lambda model, _: forget(model).set_data(from_agent(make().learn(30))), False),
        (lambda model, path: load(model, path), True),
        (lambda model, path: load_with_buffer(model, path), False),
        (lambda model, _: model, False),
    ],
    ids=["emptied", "logged data", "loaded", "loaded with its data", "as it was"],
)
@pytest.mark.parametrize("reset_num_timesteps", [False, True])
def test_the_average_begins_anew_where_nothing_is_left_to_learn_from(tmp_path, change, is_anew, reset_num_timesteps):
    """So that an agent that goes on to another task follows what it learns there."""
    model = change(make().learn(60), tmp_path)
    before, n_before = model._n_updates, model.policy.n_averaged
    assert n_before == before == 52
    expected = flat(model.ema_actor)
    model.learning_starts = 8 if reset_num_timesteps else model.num_timesteps + 8
    model.learn(8, reset_num_timesteps=reset_num_timesteps)
    # until the first update it answers as before
    assert th.equal(flat(model.ema_actor), expected)
    model.learn(20, reset_num_timesteps=False)
    n_new = model._n_updates - before
    assert n_new > 0
    assert model.policy.n_averaged == (n_new if is_anew else n_before + n_new)


def test_the_average_keeps_what_was_cloned_where_nothing_is_left_to_learn_from():
    model = make().learn(30)
    clone(model, model.policy, model.actor.optimizer)
    imitated = flat(model.actor)
    forget(model).learn(9)
    step = flat(model.ema_actor) - imitated
    assert step.any()
    th.testing.assert_close(step, 1e-3 * (flat(model.actor) - imitated), rtol=1e-2, atol=1e-7)


def test_the_actor_alone_can_be_loaded():
    model, other = make().learn(30), make(seed=1)
    other.set_parameters({"policy": {f"actor.{k}": v for k, v in model.actor.state_dict().items()}}, exact_match=False)
    other.policy.set_training_mode(False)
    assert th.equal(flat(other.ema_actor), flat(model.actor))
    # also one that was trained: its critics do not know this actor
    trained = make(seed=3).learn(30)
    assert trained.policy.is_taught
    trained.set_parameters({"policy": {f"actor.{k}": v for k, v in model.actor.state_dict().items()}}, exact_match=False)
    trained.policy.set_training_mode(False)
    assert not trained.policy.is_taught
    third = make(seed=2)
    third.actor.load_state_dict(model.actor.state_dict())
    with th.no_grad():
        assert th.equal(third.policy(th.as_tensor(OBS), True), model.actor(th.as_tensor(OBS), True))


@pytest.mark.parametrize(("number", "is_taught"), [(0.0, False), (52.0, True), (1e9, False), (2e9, True)])
def test_agents_that_were_saved_before_say_by_a_number_who_has_taught_them(number, is_taught):
    state = make().learn(30).policy.state_dict()
    del state["is_taught"]
    state["n_averaged"] = th.tensor([number])
    policy = make(seed=1).policy
    policy.load_state_dict(state)
    assert (policy.n_averaged, policy.is_taught) == (number, is_taught)
    pickled = make(seed=1).policy
    del pickled.__dict__["is_taught"]
    pickled.n_averaged = number
    assert copy.deepcopy(pickled).is_taught is is_taught


def test_who_has_taught_an_agent_is_saved(tmp_path):
    model = make().learn(30)
    clone(model, model.policy, model.actor.optimizer)
    model.predict(OBS)
    assert not model.policy.is_taught
    for taught in (False, True):
        for name in ("agent.zip", "agent.safetensors"):
            model.save(tmp_path / name)
            assert SoftQ.load(tmp_path / name, device="cpu").policy.is_taught is taught
        train_on(model)


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


def image_env():
    return FakeImageEnv(screen_height=36, screen_width=36, n_channels=1, discrete=False)


@pytest.mark.parametrize(
    ("net_arch", "actor_sizes", "critic_sizes"),
    [([], [], []), ([4], [4], [4]), ([4, 6], [4, 6], [4, 6]), ({"pi": [8, 4], "qf": [6]}, [8, 4], [6])],
)
def test_critics_and_trunk_have_the_hidden_layers_asked_for(net_arch, actor_sizes, critic_sizes):
    model = small(policy_kwargs={"net_arch": net_arch}, tau=0.5)
    assert hidden_sizes(model.actor.trunk, n_outputs=0) == actor_sizes
    for critic in (model.critic, model.critic_target):
        assert [hidden_sizes(net) for net in critic.q_networks] == [critic_sizes] * 2
    check_training(model)


def test_default_hidden_layers():
    model = small(policy_kwargs={"net_arch": None})
    assert hidden_sizes(model.actor.trunk, n_outputs=0) == [256]
    assert hidden_sizes(model.actor.head) == [64, 64]
    assert hidden_sizes(model.critic.q_networks[0]) == [256, 256]


@pytest.mark.parametrize("n_critics", [1, 3])
def test_q_is_the_minimum_of_all_critics(n_critics):
    model = small(policy_kwargs={"n_critics": n_critics})
    obs, actions = th.zeros(5, 3), th.zeros(5, 1)
    q_values = model.critic(obs, actions)
    assert [q.shape for q in q_values] == [(5, 1)] * n_critics
    th.testing.assert_close(
        th.as_tensor(model.q_values(obs.numpy(), actions.numpy())), th.cat(q_values, dim=1).min(dim=1).values.detach()
    )
    check_training(model)


@pytest.mark.parametrize("activation_fn", [nn.Tanh, nn.ELU, nn.ReLU])
def test_all_networks_have_the_activation_asked_for(activation_fn):
    model = small(policy_kwargs={"activation_fn": activation_fn}, tau=0.5)
    for net in (model.actor.trunk, model.actor.head, *model.critic.q_networks, *model.critic_target.q_networks):
        assert any(isinstance(layer, activation_fn) for layer in net)
    check_training(model)


@pytest.mark.parametrize(
    ("optimizer_class", "optimizer_kwargs", "fused"),
    [
        (th.optim.Adam, None, True),
        (th.optim.AdamW, {"weight_decay": 0.1}, True),
        (th.optim.Adam, {"foreach": True}, None),
        (th.optim.RMSprop, {"alpha": 0.9}, None),
        (th.optim.SGD, None, None),
    ],
)
def test_actor_and_critics_have_the_optimizer_asked_for(optimizer_class, optimizer_kwargs, fused):
    model = small(policy_kwargs={"optimizer_class": optimizer_class, "optimizer_kwargs": optimizer_kwargs})
    for optimizer in (model.actor.optimizer, model.critic.optimizer):
        assert type(optimizer) is optimizer_class
        assert optimizer.defaults.items() >= (optimizer_kwargs or {}).items()
        assert optimizer.defaults.get("fused") == fused
    check_training(model)


@pytest.mark.parametrize("share_features_extractor", [True, False])
def test_a_shared_features_extractor_learns_from_the_actor_alone(share_features_extractor):
    model = small(
        SoftQ,
        "CnnPolicy",
        image_env(),
        policy_kwargs={
            "features_extractor_kwargs": {"features_dim": 8},
            "share_features_extractor": share_features_extractor,
        },
        tau=0.5,
    )
    assert is_vecenv_wrapped(model.get_env(), VecTransposeImage)
    assert (model.actor.features_extractor is model.critic.features_extractor) == share_features_extractor
    assert model.critic_target.features_extractor is not model.critic.features_extractor
    optimized = {id(p) for group in model.critic.optimizer.param_groups for p in group["params"]}
    extractor = {id(p) for p in model.critic.features_extractor.parameters()}
    # a shared features extractor learns from the actor's loss alone
    assert optimized.isdisjoint(extractor) if share_features_extractor else optimized > extractor
    check_training(model, 16)
    # the images of the environment have their channels last
    obs, _ = image_env().reset()
    assert model.predict(obs)[0].shape == model.action_space.shape


def test_dict_observations_are_stored_and_learned_from():
    env = SimpleMultiObsEnv(discrete_actions=False)
    model = small(
        SoftQ, "MultiInputPolicy", env, policy_kwargs={"features_extractor_kwargs": {"cnn_output_dim": 8}}, buffer_size=50
    )
    assert isinstance(model.replay_buffer, DictReplayBuffer)
    check_training(model, 16)


def test_training_mode_is_for_training_only():
    """Training mode for training only; the target's running statistics follow the critic's, whatever tau is."""

    class Extractor(nn.Sequential):
        features_dim = 3

        def __init__(self, observation_space):
            super().__init__(nn.Flatten(), nn.BatchNorm1d(3), nn.Dropout(0.5))

    model = small(policy_kwargs={"features_extractor_class": Extractor}, tau=0.0)
    model.learn(30)
    critic, target = model.critic.features_extractor[1], model.critic_target.features_extractor[1]
    assert critic.running_mean.abs().max() > 0
    assert th.equal(critic.running_mean, target.running_mean)
    assert th.equal(critic.running_var, target.running_var)
    assert not model.critic_target.training
    trained, averaged = model.actor.features_extractor[1], model.ema_actor.features_extractor[1]
    assert trained.running_mean.abs().max() > 0
    assert th.equal(trained.running_mean, averaged.running_mean)
    assert not model.ema_actor.training
    before = model.actor.features_extractor[1].running_mean.clone()
    obs = np.ones((4, 3), dtype=np.float32)
    np.testing.assert_array_equal(model.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0])
    assert not model.actor.training
    assert th.equal(model.actor.features_extractor[1].running_mean, before)


def greedy(model, obs):
    """The action of most Q of the fixed particles, and whether ``predict`` takes it."""
    policy = model.policy
    with th.no_grad():
        candidates = th.tanh(model.ema_actor.fixed_particles(th.as_tensor(obs)))
    q_values = np.stack([model.q_values(obs, policy.unscale_action(candidates[:, i].numpy())) for i in range(32)], axis=1)
    best = candidates.numpy()[np.arange(len(obs)), q_values.argmax(axis=1)]
    return np.allclose(model.predict(obs, deterministic=True)[0], policy.unscale_action(best), atol=1e-6)


def mode(model, obs):
    """Whether ``predict`` takes a mode of the density."""
    model.policy.sync_ema_actor()
    with th.no_grad():
        action = th.tanh(model.ema_actor.mode(th.as_tensor(obs))).numpy()
    return np.allclose(model.predict(obs, deterministic=True)[0], model.policy.unscale_action(action), atol=1e-6)


@pytest.mark.parametrize("kwargs", [{}, dict(policy_kwargs=dict(n_experts=1, n_bins=1, batch_norm=False), tau=0.1)])
def test_deterministic_actions_are_those_of_most_q(tmp_path, kwargs):
    """As soon as the critics have taught the actor; until then, and where somebody else has, a mode of the density."""
    obs = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    model = small(**kwargs)
    assert mode(model, obs)
    model.learn(40)
    assert greedy(model, obs)
    assert not mode(model, obs)
    model.save(tmp_path / "model")
    loaded = SoftQ.load(tmp_path / "model")
    assert greedy(loaded, obs)
    # imitation: what was demonstrated, whatever the critics say
    optimizer = th.optim.Adam(model.actor.parameters(), lr=1e-2)
    for _ in range(3):
        loss = (model.policy(th.as_tensor(obs), deterministic=True) - 0.5).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert mode(model, obs)
    assert not greedy(model, obs)
    # also after few updates, which are lost beside large numbers in single precision
    model.learn(3, reset_num_timesteps=False)
    assert greedy(model, obs)
    model.save(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(
        SoftQ.load(tmp_path / "model.safetensors").predict(obs, deterministic=True)[0],
        model.predict(obs, deterministic=True)[0],
    )


def test_a_vector_of_parameters_holds_the_ema_actor():
    model, other = small(seed=0).learn(40), small(seed=1)
    other.policy.load_from_vector(model.policy.parameters_to_vector())
    obs = np.random.default_rng(0).standard_normal((20, 3)).astype(np.float32)
    expected = model.ema_actor.predict(obs, deterministic=True)[0]
    # a mode of its density: the critics' running statistics are not in the vector
    np.testing.assert_allclose(other.predict(obs, deterministic=True)[0], expected, rtol=1e-5, atol=1e-6)
    assert th.equal(flat(other.ema_actor), flat(model.ema_actor))
    assert not th.equal(flat(other.ema_actor), flat(other.actor))
