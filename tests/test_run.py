"""SoftQ trains with every option, policy, space and wrapper that Stable-Baselines3 offers an off-policy algorithm."""

import copy
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv, FakeImageEnv, IdentityEnvBox, SimpleMultiObsEnv
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise, VectorizedActionNoise
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize, VecTransposeImage, is_vecenv_wrapped
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sb3_softq import SoftQ
from sb3_softq.critic import JointBatchNorm, joint_forward
from tests.conftest import flat, small


class RandomEnv(gym.Env):
    """Random observations, a reward for large actions, episodes of 20 steps."""

    def __init__(self, action_space):
        self.action_space = action_space
        self.observation_space = spaces.Box(-1.0, 1.0, (3,), dtype=np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.np_random.uniform(-1.0, 1.0, 3).astype(np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.t += 1
        return self.np_random.uniform(-1.0, 1.0, 3).astype(np.float32), float(action.sum()), False, self.t == 20, {}


def make(policy="MlpPolicy", env="Pendulum-v1", **kwargs):
    return small(SoftQ, policy, env, **kwargs)


def check_training(model, n_timesteps=24):
    """Train: actor, critic and target move, and everything that is learned or logged is finite."""
    modules = [m for m in (model.actor, model.ema_actor, model.critic, model.critic_target) if m is not None]
    before = [flat(module) for module in modules]
    model.learn(n_timesteps)
    assert model._n_updates > 0
    for module, old in zip(modules, before, strict=True):
        new = flat(module)
        assert th.isfinite(new).all()
        assert not th.equal(new, old)
    logged = {key: value for key, value in model.logger.name_to_value.items() if key.startswith("train/")}
    assert np.isfinite(list(logged.values())).all()
    return logged


def hidden_sizes(net, n_outputs=1):
    sizes = [layer.out_features for layer in net if isinstance(layer, nn.Linear)]
    return sizes[: len(sizes) - n_outputs]


@pytest.mark.parametrize(
    ("net_arch", "actor_sizes", "critic_sizes"),
    [([], [], []), ([4], [4], [4]), ([4, 6], [4, 6], [4, 6]), ({"pi": [8, 4], "qf": [6]}, [8, 4], [6])],
)
def test_net_arch(net_arch, actor_sizes, critic_sizes):
    model = make(policy_kwargs={"net_arch": net_arch}, tau=0.5)
    assert hidden_sizes(model.actor.trunk, n_outputs=0) == actor_sizes
    for critic in (model.critic, model.critic_target):
        assert [hidden_sizes(net) for net in critic.q_networks] == [critic_sizes] * 2
    check_training(model)


@pytest.mark.parametrize("head_arch", [[], [5], (4, 3, 2)])
def test_head_arch(head_arch):
    model = make(policy_kwargs={"head_arch": head_arch})
    assert hidden_sizes(model.actor.head) == list(head_arch)
    check_training(model)


def test_default_net_arch():
    model = make(policy_kwargs={"net_arch": None})
    assert hidden_sizes(model.actor.trunk, n_outputs=0) == [256]
    assert hidden_sizes(model.actor.head) == [64, 64]
    assert hidden_sizes(model.critic.q_networks[0]) == [256, 256]


@pytest.mark.parametrize("n_critics", [1, 3])
def test_n_critics(n_critics):
    model = make(policy_kwargs={"n_critics": n_critics})
    obs, actions = th.zeros(5, 3), th.zeros(5, 1)
    q_values = model.critic(obs, actions)
    assert [q.shape for q in q_values] == [(5, 1)] * n_critics
    th.testing.assert_close(
        th.as_tensor(model.q_values(obs.numpy(), actions.numpy())), th.cat(q_values, dim=1).min(dim=1).values.detach()
    )
    check_training(model)


@pytest.mark.parametrize("activation_fn", [nn.Tanh, nn.ELU, nn.ReLU])
def test_activation(activation_fn):
    model = make(policy_kwargs={"activation_fn": activation_fn}, tau=0.5)
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
def test_optimizer(optimizer_class, optimizer_kwargs, fused):
    model = make(policy_kwargs={"optimizer_class": optimizer_class, "optimizer_kwargs": optimizer_kwargs})
    for optimizer in (model.actor.optimizer, model.critic.optimizer):
        assert type(optimizer) is optimizer_class
        assert optimizer.defaults.items() >= (optimizer_kwargs or {}).items()
        assert optimizer.defaults.get("fused") == fused
    check_training(model)


@pytest.mark.parametrize("smoothing", ["learned", "local"])
@pytest.mark.parametrize(
    ("proposal", "n_value_particles"),
    [("policy", 1), ("policy", 5), ("uniform", 1), ("uniform", 5)],
)
def test_proposals(smoothing, proposal, n_value_particles):
    model = make(proposal=proposal, n_value_particles=n_value_particles, policy_kwargs={"smoothing": smoothing})
    logged = check_training(model)
    assert 1.0 - 1e-5 <= logged["train/effective_sample_size"] <= n_value_particles + 1e-5


@pytest.mark.parametrize("smoothing", ["learned", "local", "none"])
@pytest.mark.parametrize("kernel_update_ratio", [None, 0.5, 0.1])
def test_kernel_repulsion(smoothing, kernel_update_ratio):
    model = make(
        repulsion="kernel",
        kernel_update_ratio=kernel_update_ratio,
        policy_kwargs={"smoothing": smoothing},
    )
    check_training(model)


@pytest.mark.parametrize("smoothing", ["learned", "local"])
@pytest.mark.parametrize("kernel", ["rbf", "delta"])
@pytest.mark.parametrize("n_actor_particles", [1, 2, 5])
def test_density_repulsion(smoothing, kernel, n_actor_particles):
    model = make(kernel=kernel, n_actor_particles=n_actor_particles, n_actor_states=3, policy_kwargs={"smoothing": smoothing})
    check_training(model)


@pytest.mark.parametrize(("target_entropy", "sign"), [(np.log(2.0), 1), (-3.5, -1)])
def test_temperature_follows_the_entropy(target_entropy, sign):
    """Uniform actions in (-1, 1) have an entropy of log 2, and the narrowest particles one of -3.58."""
    model = make(target_entropy=target_entropy, ent_coef="auto_0.1", ent_coef_learning_rate=0.01)
    before = model.log_ent_coef.item()
    assert before == pytest.approx(np.log(0.1))
    check_training(model)
    assert np.sign(model.log_ent_coef.item() - before) == sign


def test_auto_target_entropy():
    model = make(env=RandomEnv(spaces.Box(-1, 1, (2, 2), dtype=np.float32)))
    assert model.target_entropy == -4.0


def test_fixed_temperature_is_not_learned():
    model = make(ent_coef=0.3)
    logged = check_training(model)
    assert model.log_ent_coef is None
    assert model.ent_coef_optimizer is None
    assert logged["train/ent_coef"] == pytest.approx(0.3)
    assert "train/ent_coef_loss" not in logged


def test_schedules():
    """The last update happens when no progress remains, and so with the end value of each schedule."""
    model = make(
        learning_rate=LinearSchedule(1e-3, 1e-4, 1.0),
        actor_learning_rate=LinearSchedule(2e-3, 2e-4, 1.0),
        ent_coef_learning_rate=lambda progress_remaining: 3e-4 + 3e-3 * progress_remaining,
    )
    assert model.critic.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)
    assert model.ent_coef_optimizer.param_groups[0]["lr"] == pytest.approx(3.3e-3)
    check_training(model)
    assert model.critic.optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)
    assert model.actor.optimizer.param_groups[0]["lr"] == pytest.approx(2e-4)
    assert model.ent_coef_optimizer.param_groups[0]["lr"] == pytest.approx(3e-4)


@pytest.mark.parametrize(
    ("learning_rate", "expected"), [(3e-4, 1e-3), (0.02, 0.02), (lambda progress: 0.01 * progress, 0.005)]
)
def test_temperature_learns_as_fast_as_the_critics_by_default(learning_rate, expected):
    model = make(learning_rate=learning_rate).learn(10)
    model._update_current_progress_remaining(1, 2)
    model.train(1, 8)
    assert model.ent_coef_optimizer.param_groups[0]["lr"] == pytest.approx(expected)


def test_actor_learning_rate_is_the_critics_by_default():
    model = make(learning_rate=LinearSchedule(1e-3, 1e-4, 1.0))
    check_training(model)
    assert model.actor.optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)


def test_temperature_schedules():
    model = make(ent_coef=LinearSchedule(0.5, 0.1, 1.0), annealing=LinearSchedule(10.0, 1.0, 1.0))
    assert model.ent_coef_tensor.item() == pytest.approx(0.5)
    assert model._annealing() == pytest.approx(10.0)
    check_training(model)
    assert model.ent_coef_tensor.item() == pytest.approx(0.1)
    assert model._annealing() == pytest.approx(1.0)


def test_schedules_end_where_they_were_tried():
    """The last rollout, of several environments or a whole episode, goes on beyond the end."""
    seen = []

    def temperature(progress_remaining):
        seen.append(progress_remaining)
        return 0.2 * progress_remaining + 1e-3

    make(env=make_vec_env("Pendulum-v1", n_envs=4), ent_coef=temperature).learn(21)
    assert min(seen) == 0.0


def test_annealing_reaches_the_actor_only():
    """One update from the same weights on the same data: the factor changes the actor's step, not the critic's."""
    results = []
    for annealing in (1.0, 20.0):
        model = make(ent_coef=0.1, annealing=annealing, learning_starts=1000).learn(20)
        th.manual_seed(0)
        np.random.seed(0)
        model.train(gradient_steps=1, batch_size=8)
        results.append((flat(model.actor), flat(model.critic)))
    assert not th.equal(results[0][0], results[1][0])
    assert th.equal(results[0][1], results[1][1])


def batch_normalised(net, x):
    """In training mode: by the statistics of x itself."""
    for layer in net:
        if isinstance(layer, JointBatchNorm):
            x = (x - x.mean(dim=0)) / (x.var(dim=0, correction=0) + 1e-3).sqrt() * layer.weight + layer.bias
        else:
            x = layer(x)
    return x.squeeze(1)


@pytest.mark.parametrize("n_steps", [1, 3])
@pytest.mark.parametrize(("tau", "batch_norm"), [(1.0, True), (0.5, True), (0.5, False)])
def test_critics_regress_on_the_discounted_soft_value(n_steps, tau, batch_norm):
    """The critic loss, from the replayed transitions and the equations alone."""
    policy_kwargs = dict(net_arch=[16], batch_norm=batch_norm)
    settings = dict(gamma=0.9, ent_coef=0.2, n_value_particles=3, policy_kwargs=policy_kwargs)
    model = make(n_steps=n_steps, tau=tau, **settings).learn(60)
    assert isinstance(model.replay_buffer, NStepReplayBuffer) == (n_steps > 1)
    data = model.replay_buffer.sample(16)
    with th.no_grad():
        th.manual_seed(1)
        u, log_prob = model.propose(data.next_observations, 3)
        pairs = th.cat([data.observations, data.actions], dim=1)
        next_pairs = [th.cat([data.next_observations, th.tanh(u[:, k])], dim=1) for k in range(3)]
        nets = model.critic.q_networks
        if batch_norm:
            # all in one batch
            q_values = [batch_normalised(net, th.cat([pairs, *next_pairs])).split(16) for net in nets]
        else:
            q_values = [(net(pairs).squeeze(1),) for net in nets]
        if tau == 1.0:
            next_q_values = th.stack([th.stack(q[1:]) for q in q_values]).amin(dim=0)
        else:
            targets = model.critic_target.eval().q_networks
            next_q_values = th.stack([th.stack([net(x).squeeze(1) for x in next_pairs]) for net in targets]).amin(dim=0)
        value = 0.2 * (next_q_values / 0.2 - log_prob.T).exp().mean(dim=0).log()
        discounts = data.discounts.squeeze(1) if n_steps > 1 else 0.9
        target = data.rewards.squeeze(1) + (1 - data.dones.squeeze(1)) * discounts * value
        expected = sum(0.5 * (q[0] - target).square().mean() for q in q_values)
    model.policy.set_training_mode(True)
    th.manual_seed(1)
    stats = model.update_critic(data, model.ent_coef_tensor)
    th.testing.assert_close(stats["critic_loss"], expected)


def test_running_statistics_of_the_critics():
    """Learned from both halves of the critics' pass; what is asked apart from it uses them and leaves them alone."""
    model = make(n_value_particles=3, tau=1.0, policy_kwargs=dict(batch_norm=True)).learn(20)
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


def renormalised(net, x, joint):
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
    model = make(policy_kwargs=dict(net_arch=[8, 8], activation_fn=activation_fn)).learn(20)
    net = model.critic.q_networks[0].double()
    pairs, next_pairs = th.randn(16, 4, dtype=th.float64), 0.5 + 2.0 * th.randn(48, 4, dtype=th.float64)
    oracle = copy.deepcopy(net)
    expected, expected_next = renormalised(oracle, pairs, th.cat([pairs, next_pairs]))
    q_values, next_q_values = joint_forward(net, pairs, next_pairs)
    assert not next_q_values.requires_grad
    # what follows has no more digits than float32
    th.testing.assert_close(q_values, expected.float())
    th.testing.assert_close(next_q_values, expected_next.float())
    th.testing.assert_close(critic_gradients(q_values, net), critic_gradients(expected, oracle), rtol=1e-5, atol=1e-7)


def test_batch_renormalisation_of_one_distribution():
    """Where the next pairs are copies of the transitions, the gradient is that of one pass through all of them."""
    model = make(policy_kwargs=dict(net_arch=[8, 8])).learn(20)
    net = model.critic.q_networks[0].double()
    oracle = copy.deepcopy(net)
    pairs = th.randn(16, 4, dtype=th.float64)
    expected = batch_normalised(oracle, pairs.repeat(4, 1))[:16]
    q_values, _ = joint_forward(net, pairs, pairs.repeat(3, 1))
    th.testing.assert_close(
        critic_gradients(q_values.squeeze(1), net), critic_gradients(expected, oracle), rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("policy_delay", [1, 2])
def test_ema_actor(policy_delay):
    """Against weights in float64: first over the last ninth of the actor's updates, then with the step that was asked for."""
    model = make(actor_tau=0.4, learning_starts=1000, policy_delay=policy_delay, learning_rate=1e-2).learn(20)
    expected = flat(model.actor).double()
    assert th.equal(flat(model.ema_actor).double(), expected)
    for n in range(1, 31):
        model.train(gradient_steps=policy_delay, batch_size=8)
        tau = 9 / (n + 9) if n <= 13 else 0.4
        expected += tau * (flat(model.actor).double() - expected)
        th.testing.assert_close(flat(model.ema_actor).double(), expected, rtol=1e-4, atol=1e-6)
    assert (flat(model.actor) - flat(model.ema_actor)).abs().max() > 1e-3
    assert not any(parameter.requires_grad for parameter in model.ema_actor.parameters())


def test_average_of_one():
    model = make(actor_tau=1.0).learn(20)
    assert th.equal(flat(model.ema_actor), flat(model.actor))


def test_the_trained_actor_collects_and_the_average_is_asked():
    model = make().learn(20)
    seen = []
    for name in ("actor", "ema_actor"):
        actor = getattr(model, name)
        particles = partial(lambda name, particles, *args, **kwargs: seen.append(name) or particles(*args, **kwargs), name)
        actor.particles = partial(particles, actor.particles)
    obs = model.observation_space.sample()

    def asked(call, *args, **kwargs):
        seen.clear()
        call(*args, **kwargs)
        return set(seen)

    learned = {"ema_actor"}
    for deterministic in (True, False):
        assert asked(model.predict, obs, deterministic=deterministic) == learned
    assert asked(model.sample_actions, obs, 2) == asked(model.entropy, obs) == asked(model.soft_value, obs) == learned
    assert asked(model.log_prob, obs, model.action_space.sample()) == learned
    batch = model.replay_buffer.sample(4)
    assert asked(model.update_critic, batch, model.ent_coef_tensor) == learned
    assert asked(model.update_actor, batch, model.ent_coef_tensor) == {"actor"}
    model.learning_starts = 1000
    assert asked(model.learn, 3) == set()
    model.learning_starts, model.gradient_steps = 0, 0
    assert asked(model.learn, 3) == {"actor"}
    assert asked(model.predict, obs) == learned


def test_target_update_interval():
    model = make(target_update_interval=3, tau=1.0, learning_starts=0, learning_rate=1e-2)
    before = flat(model.critic_target)
    model.learn(2)
    assert model._n_updates == 2
    assert th.equal(flat(model.critic_target), before)
    model.learn(1, reset_num_timesteps=False)
    assert model._n_updates == 3
    assert th.equal(flat(model.critic_target), flat(model.critic))


def test_policy_delay():
    model = make(policy_delay=3, learning_starts=0)
    modules = model.actor, model.critic
    before = [flat(module) for module in modules]
    model.learn(2)
    assert model._n_updates == 2
    assert [th.equal(flat(module), old) for module, old in zip(modules, before, strict=True)] == [True, False]
    assert model.log_ent_coef.item() == pytest.approx(np.log(0.1))
    assert "train/actor_loss" not in model.logger.name_to_value
    model.learn(1, reset_num_timesteps=False)
    assert not th.equal(flat(model.actor), before[0])
    assert model.log_ent_coef.item() != pytest.approx(np.log(0.1))
    # averages over the updates of a call, of which two are the actor's
    model.train(gradient_steps=6, batch_size=8)
    assert np.isfinite(model.logger.name_to_value["train/actor_loss"])


def test_training_uses_a_new_tau(tmp_path):
    """Callbacks may change it on the way: target networks are there from then on, and come with the agent that is saved."""
    model = make(learning_rate=1e-2).learn(20)
    assert model.critic_target is None
    assert not [name for name in model.policy.state_dict() if "target" in name]
    before = flat(model.critic)
    model.tau = 0.25
    model.train(gradient_steps=1, batch_size=8)
    th.testing.assert_close(flat(model.critic_target), before + 0.25 * (flat(model.critic) - before))
    model.save(tmp_path / "model")
    loaded = SoftQ.load(tmp_path / "model", device="cpu")
    assert th.equal(flat(loaded.critic_target), flat(model.critic_target))


@pytest.mark.parametrize("train_freq", [5, (5, "step"), (1, "episode")])
def test_train_freq(train_freq):
    env = gym.wrappers.TimeLimit(gym.make("Pendulum-v1"), 10)
    model = make(env=env, train_freq=train_freq, gradient_steps=2, learning_starts=0)
    check_training(model, 40)
    assert model._n_updates == (4 if train_freq == (1, "episode") else 8) * 2


@pytest.mark.parametrize("n_envs", [1, 3])
def test_several_environments(n_envs):
    env = make_vec_env(lambda: gym.wrappers.TimeLimit(gym.make("Pendulum-v1"), 10), n_envs)
    noise = NormalActionNoise(np.zeros(1), 0.1 * np.ones(1))
    model = make(env=env, train_freq=4, gradient_steps=-1, learning_starts=0, action_noise=noise)
    # as many updates as transitions
    check_training(model, 8 * n_envs)
    assert model._n_updates == 8 * n_envs
    assert isinstance(model.action_noise, VectorizedActionNoise) == (n_envs > 1)


@pytest.mark.parametrize("noise_class", [NormalActionNoise, OrnsteinUhlenbeckActionNoise])
def test_action_noise(noise_class):
    quiet, noisy = make(learning_starts=0), make(learning_starts=0, action_noise=noise_class(np.zeros(1), 0.5 * np.ones(1)))
    for model in (quiet, noisy):
        check_training(model, 20)
        assert np.abs(model.replay_buffer.actions).max() <= 1.0
    assert not np.array_equal(quiet.replay_buffer.actions, noisy.replay_buffer.actions)


def test_optimize_memory_usage():
    model = make(optimize_memory_usage=True, replay_buffer_kwargs={"handle_timeout_termination": False}, buffer_size=16)
    check_training(model, 40)
    assert model.replay_buffer.full


@pytest.mark.parametrize(
    "action_space",
    [
        spaces.Box(-1, 1, (1,), dtype=np.float32),
        spaces.Box(-1, 1, (2, 2), dtype=np.float32),
        spaces.Box(-1, 1, (), dtype=np.float32),
        spaces.Box(-2, 2, (3,), dtype=np.float64),
        spaces.Box(np.array([-1, 5], dtype=np.float32), np.array([4, 6], dtype=np.float32)),
    ],
    ids=["1", "2x2", "scalar", "float64", "asymmetric"],
)
@pytest.mark.parametrize("deterministic", [True, False])
def test_action_spaces(action_space, deterministic):
    env = RandomEnv(action_space)
    model = make(env=env)
    check_training(model)
    obs = np.random.default_rng(0).uniform(-1, 1, (50, 3)).astype(np.float32)
    actions, _ = model.predict(obs, deterministic=deterministic)
    assert actions.shape == (50, *action_space.shape)
    assert all(action_space.contains(action) for action in actions)
    single, _ = model.predict(obs[0], deterministic=deterministic)
    assert action_space.contains(single)
    assert np.abs(model.replay_buffer.actions).max() <= 1.0


@pytest.mark.parametrize("env_id", ["Hopper-v5", "Reacher-v5"])
def test_mujoco(env_id):
    model = make(env=env_id)
    check_training(model)
    assert model.policy.observation_space == gym.make(env_id).observation_space


def image_env():
    return FakeImageEnv(screen_height=36, screen_width=36, n_channels=1, discrete=False)


@pytest.mark.parametrize("share_features_extractor", [True, False])
def test_cnn_policy(share_features_extractor):
    model = make(
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


def test_multi_input_policy():
    env = SimpleMultiObsEnv(discrete_actions=False)
    model = make("MultiInputPolicy", env, policy_kwargs={"features_extractor_kwargs": {"cnn_output_dim": 8}}, buffer_size=50)
    assert isinstance(model.replay_buffer, DictReplayBuffer)
    check_training(model, 16)


@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize("image_obs_space", [True, False])
def test_her(n_envs, image_obs_space):
    env = make_vec_env(lambda: BitFlippingEnv(n_bits=3, continuous=True, image_obs_space=image_obs_space), n_envs)
    model = make(
        "MultiInputPolicy",
        env,
        replay_buffer_class=HerReplayBuffer,
        replay_buffer_kwargs={"n_sampled_goal": 2, "goal_selection_strategy": "future"},
        policy_kwargs={"features_extractor_kwargs": {"cnn_output_dim": 8}},
        train_freq=4,
        learning_starts=16,
    )
    check_training(model, 40)
    assert isinstance(model.replay_buffer, HerReplayBuffer)


@pytest.mark.parametrize(("n_states", "n_own_goals"), [(32, 24), (100, 78)])
def test_the_actor_sees_the_goals_of_her(monkeypatch, n_states, n_own_goals):
    """HerReplayBuffer puts transitions with goals of its own after the others: four in five, and so where the actor learns."""
    env = BitFlippingEnv(n_bits=8, continuous=True)
    model = make(
        "MultiInputPolicy",
        env,
        replay_buffer_class=HerReplayBuffer,
        replay_buffer_kwargs={"n_sampled_goal": 4},
        batch_size=128,
        n_actor_states=n_states,
        learning_starts=200,
        gradient_steps=1,
    )
    seen = []
    actor_loss = SoftQ.actor_loss

    def spy(self, obs, ent_coef):
        seen.append(obs)
        return actor_loss(self, obs, ent_coef)

    monkeypatch.setattr(SoftQ, "actor_loss", spy)
    model.learn(202)
    goals = seen[0]["desired_goal"]
    assert goals.shape == (n_states, 8)
    # the environment's own goal is all ones
    assert (goals != 1).any(dim=1).sum() >= n_own_goals


def test_more_actor_states_than_the_batch_has():
    check_training(make(n_actor_states=100))


def test_vec_normalize():
    env = VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")]), clip_obs=5.0)
    model = make(env=env)
    check_training(model, 40)
    assert model.get_vec_normalize_env() is env
    # what is replayed is normalised with the current statistics, what is stored is not
    np.testing.assert_array_equal(
        model.replay_buffer._normalize_obs(model.replay_buffer.observations[:40, 0], env),
        env.normalize_obs(model.replay_buffer.observations[:40, 0]),
    )
    assert np.abs(model.replay_buffer.observations[:40, 0, 2]).max() > 0.5


def test_it_learns():
    """Reward for an action near the observation."""
    model = make(env=IdentityEnvBox(eps=0.5), learning_rate=1e-3, gamma=0.5, batch_size=128, policy_kwargs={"net_arch": [32]})
    model.learn(400)
    obs = np.linspace(-0.9, 0.9, 20, dtype=np.float32)[:, None]
    actions, _ = model.predict(obs, deterministic=True)
    assert np.mean(np.abs(actions - obs) < 0.5) > 0.9


@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize(
    "options", [{}, {"proposal": "uniform", "repulsion": "kernel", "policy_kwargs": {"smoothing": "none"}}]
)
def test_same_seed_same_parameters(n_envs, options):
    def trained(seed):
        return make(env=make_vec_env("Pendulum-v1", n_envs, seed=seed), seed=seed, **options).learn(40)

    first, second, other = trained(7), trained(7), trained(8)
    for name, tensor in first.policy.state_dict().items():
        assert th.equal(tensor, second.policy.state_dict()[name]), name
    assert th.equal(first.log_ent_coef, second.log_ent_coef)
    assert not th.equal(flat(first.actor), flat(other.actor))
    np.testing.assert_array_equal(first.replay_buffer.actions, second.replay_buffer.actions)


@pytest.mark.parametrize("smoothing", ["learned", "local", "none"])
def test_deterministic_action_is_a_function_of_observation_and_weights(smoothing):
    repulsion = "kernel" if smoothing == "none" else "density"
    model = make(policy_kwargs={"smoothing": smoothing}, repulsion=repulsion).learn(30)
    obs = np.random.default_rng(0).uniform(-1, 1, (20, 3)).astype(np.float32)
    th.manual_seed(0)
    state = th.get_rng_state()
    actions, _ = model.predict(obs, deterministic=True)
    assert th.equal(th.get_rng_state(), state)
    th.manual_seed(1)
    np.testing.assert_array_equal(model.predict(obs, deterministic=True)[0], actions)
    alone = np.stack([model.predict(o, deterministic=True)[0] for o in obs])
    np.testing.assert_allclose(alone, actions, atol=1e-4)
    assert not np.array_equal(model.predict(obs)[0], model.predict(obs)[0])


def test_dropout_and_batch_norm():
    """Training mode for training only; the target's running statistics follow the critic's, whatever tau is."""

    class Extractor(nn.Sequential):
        features_dim = 3

        def __init__(self, observation_space):
            super().__init__(nn.Flatten(), nn.BatchNorm1d(3), nn.Dropout(0.5))

    model = make(policy_kwargs={"features_extractor_class": Extractor}, tau=0.0)
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


def test_logged_keys():
    logged = check_training(make(verbose=0))
    assert logged.keys() >= {
        "train/actor_loss",
        "train/critic_loss",
        "train/ent_coef",
        "train/ent_coef_loss",
        "train/effective_sample_size",
        "train/entropy",
        "train/learning_rate",
        "train/n_updates",
        "train/particle_std",
        "train/q_value",
        "train/smoothing_std",
    }


def test_total_timesteps_may_be_a_float():
    model = make().learn(2e1)
    assert model.num_timesteps == 20


# Of https://pytorch.org/docs/stable/generated/torch.use_deterministic_algorithms.html: what raises there on CUDA
NOT_DETERMINISTIC = {
    "kthvalue",
    "median.dim",
    "cumsum",
    "histc",
    "bincount",
    "put_",
    "index_copy",
    "_cdist_backward",
    "adaptive_avg_pool2d_backward",
    "grid_sampler_2d_backward",
    "nll_loss2d",
    "_embedding_bag",
    "max_unpool2d",
    "native_dropout_backward_nondeterministic",
}


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"repulsion": "kernel", "kernel_update_ratio": 0.5}, {"policy_kwargs": {"smoothing": "local"}}],
)
def test_an_update_can_be_deterministic_on_cuda(kwargs):
    """Nothing of what torch.use_deterministic_algorithms(True) refuses there is called."""
    seen = set()

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(func.__name__)
            return func(*args, **(kwargs or {}))

    model = make(learning_starts=1000, **kwargs).learn(20)
    with Spy():
        model.train(gradient_steps=2, batch_size=8)
    assert {"topk.default", "_cdist_forward.default"} <= seen
    assert not [name for name in seen if name.removesuffix(".default") in NOT_DETERMINISTIC]


def test_annealing_of_a_training_in_many_calls():
    """Nobody knows its length: a function of the updates alone, that the first call does not use up."""
    model = make(ent_coef=0.1, learning_starts=0)
    for n in range(1, 6):
        model.learn(20, reset_num_timesteps=False)
        assert model._n_updates == 20 * n
        assert model._annealing() == pytest.approx(20 - 19 * model._n_updates / 10_000)
    model._n_updates = 20_000
    assert model._annealing() == 1.0


@pytest.mark.parametrize("reset_num_timesteps", [True, False])
def test_annealing_never_rises_again(tmp_path, reset_num_timesteps):
    """The first call says how long training is: what comes after it does not begin anew."""
    model, factors = make(ent_coef=0.1, learning_starts=0), []

    class Record(BaseCallback):
        def _on_step(self):
            factors.append(self.model._annealing())
            return True

    model.learn(30, Record())
    assert factors[0] > 19
    assert factors[-1] == 1.0
    model.save(tmp_path / "model")
    model = SoftQ.load(tmp_path / "model", env=model.get_env(), device="cpu")
    model.learn(30, Record(), reset_num_timesteps=reset_num_timesteps)
    assert len(factors) == 60
    assert sorted(factors, reverse=True) == factors


def test_a_subclass_changes_the_losses():
    """A plug-in is pluggable: what a class overrides is what is trained with."""

    class Calm(SoftQ):
        def critic_loss(self, replay_data, ent_coef):
            loss, stats = super().critic_loss(replay_data, ent_coef)
            return 0.0 * loss, stats | {"own": loss.detach()}

        def actor_loss(self, obs, ent_coef):
            loss, stats = super().actor_loss(obs, ent_coef)
            return 0.0 * loss, stats

    model = small(Calm).learn(30)
    fresh = small(Calm)
    assert model._n_updates > 0
    assert th.equal(flat(model.actor), flat(fresh.actor))
    assert th.equal(flat(model.critic), flat(fresh.critic))
    assert np.isfinite(model.logger.name_to_value["train/own"])
