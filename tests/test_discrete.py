"""DiscreteSoftQ against exact soft value iteration, on CartPole, and through what SB3 offers."""

import copy
import subprocess
import sys

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.callbacks import EvalCallback, StopTrainingOnRewardThreshold
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv, FakeImageEnv, SimpleMultiObsEnv

from examples.equivalence import relative_difference
from sb3_softq import DiscreteSoftQ, SoftQ
from sb3_softq.discrete import DiscreteSoftQPolicy
from tests.conftest import flat, small

N_STATES, N_ACTIONS, ALPHA, GAMMA = 4, 3, 1.0, 0.9


class RandomMDP(gym.Env):
    """Random rewards and transitions; the observation is the state, one-hot. An episode ends at random, or after 50 steps."""

    observation_space = spaces.Box(0.0, 1.0, (N_STATES,))
    action_space = spaces.Discrete(N_ACTIONS)

    def __init__(self):
        rng = np.random.default_rng(7)
        self.rewards = rng.normal(size=(N_STATES, N_ACTIONS))
        self.transitions = rng.dirichlet(0.5 * np.ones(N_STATES), size=(N_STATES, N_ACTIONS))
        # part of what follows a pair
        self.terminates = rng.uniform(0.0, 0.3, size=(N_STATES, N_ACTIONS))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.state = 0, int(self.np_random.integers(N_STATES))
        return np.eye(N_STATES, dtype=np.float32)[self.state], {}

    def step(self, action):
        reward = self.rewards[self.state, action]
        terminated = bool(self.np_random.random() < self.terminates[self.state, action])
        self.state = int(self.np_random.choice(N_STATES, p=self.transitions[self.state, action]))
        self.t += 1
        return np.eye(N_STATES, dtype=np.float32)[self.state], float(reward), terminated, self.t == 50, {}

    def soft_value_iteration(self, buffer):
        """
        Fixed point of Q = r + gamma E[(1 - terminates) V], V = alpha log sum exp(Q / alpha), in double precision, with the
        transitions as often as they are in a replay buffer.
        """
        n = buffer.size()
        states, following = buffer.observations[:n, 0].argmax(axis=1), buffer.next_observations[:n, 0].argmax(axis=1)
        actions, goes_on = buffer.actions[:n, 0, 0], 1.0 - buffer.dones[:n, 0] * (1.0 - buffer.timeouts[:n, 0])
        transitions = np.zeros((N_STATES, N_ACTIONS, N_STATES))
        np.add.at(transitions, (states, actions, following), goes_on)
        counts = np.zeros((N_STATES, N_ACTIONS, 1))
        np.add.at(counts, (states, actions, 0), 1.0)
        q = np.zeros((N_STATES, N_ACTIONS))
        for _ in range(1000):
            value = ALPHA * np.log(np.exp(q / ALPHA).sum(axis=1))
            q = self.rewards + GAMMA * (transitions / counts) @ value
        return q


def make(policy="MlpPolicy", env=None, **kwargs):
    return small(DiscreteSoftQ, policy, env or RandomMDP(), **({"width": None} | kwargs))


@pytest.mark.parametrize("seed", [0, 2])
def test_it_converges_to_soft_value_iteration(seed):
    env = RandomMDP()
    model = make(
        seed=seed,
        env=env,
        ent_coef=ALPHA,
        gamma=GAMMA,
        buffer_size=20_000,
        batch_size=256,
        train_freq=1,
        tau=0.02,
        target_update_interval=1,
        learning_rate=lambda progress: 3e-3 * max(progress, 0.1),
        policy_kwargs=dict(net_arch=[32]),
    ).learn(3_000)
    # the scale of the returns, by which Q is multiplied, stays where it is
    model.train(gradient_steps=2_000, batch_size=256)
    q = env.soft_value_iteration(model.replay_buffer)
    states, actions = np.eye(N_STATES, dtype=np.float32), np.tile(np.arange(N_ACTIONS), (N_STATES, 1))
    value = ALPHA * np.log(np.exp(q / ALPHA).sum(axis=1))
    np.testing.assert_allclose(model.q_values(states, actions), q, atol=0.12)
    np.testing.assert_allclose(model.soft_value(states), value, atol=0.12)
    np.testing.assert_allclose(np.exp(model.log_prob(states, actions)), np.exp((q - value[:, None]) / ALPHA), atol=0.1)
    # the greedy way is one off from the soft one: it would fail this
    greedy = np.zeros_like(q)
    for _ in range(1000):
        greedy = env.rewards + GAMMA * (1 - env.terminates) * (env.transitions @ greedy.max(axis=1))
    assert np.abs(model.q_values(states, actions) - greedy).mean() > 0.5


def test_answers_agree_with_each_other():
    model = make(ent_coef=0.3)
    obs = np.random.default_rng(0).uniform(size=(5, N_STATES)).astype(np.float32)
    actions = np.tile(np.arange(N_ACTIONS), (5, 1))
    log_prob, q, value = model.log_prob(obs, actions), model.q_values(obs, actions), model.soft_value(obs)
    np.testing.assert_allclose(np.exp(log_prob).sum(axis=1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(log_prob, (q - value[:, None]) / 0.3, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model.entropy(obs), -(np.exp(log_prob) * log_prob).sum(axis=1), rtol=1e-4)
    # a single observation, and one action for each
    assert model.q_values(obs[0], 2) == pytest.approx(q[0, 2], rel=1e-5)
    np.testing.assert_allclose(model.log_prob(obs, actions[:, 1]), log_prob[:, 1], rtol=1e-5)
    # acting follows these probabilities, and the deterministic action is the most likely one
    frequencies = np.stack([(model.sample_actions(obs, 4000) == a).mean(axis=1) for a in range(N_ACTIONS)], axis=1)
    np.testing.assert_allclose(frequencies, np.exp(log_prob), atol=0.04)
    many = np.repeat(obs[:1], 4000, axis=0)
    predicted = model.predict(many)[0]
    np.testing.assert_allclose([(predicted == a).mean() for a in range(N_ACTIONS)], np.exp(log_prob[0]), atol=0.04)
    assert (model.predict(obs, deterministic=True)[0] == q.argmax(axis=1)).all()


@pytest.mark.parametrize("actions", [[0, 1], [0.5] * 5, [3] * 5, [-1] * 5, [[[0]]] * 5])
def test_actions_that_do_not_fit(actions):
    with pytest.raises(ValueError, match="actions"):
        make().q_values(np.zeros((5, N_STATES), dtype=np.float32), np.array(actions))


@pytest.mark.parametrize(("target_entropy", "sign"), [(np.log(N_ACTIONS), 1), (0.0, -1)])
def test_temperature_follows_the_entropy(target_entropy, sign):
    model = make(target_entropy=target_entropy).learn(30)
    assert sign * (model.log_ent_coef.item() - np.log(0.01)) > 0
    assert th.equal(model.policy.ent_coef, model.ent_coef_tensor)


def test_save_and_load(tmp_path):
    model = make(ent_coef="auto_0.5").learn(40)
    obs = RandomMDP.observation_space.sample()
    model.save(tmp_path / "model")
    model.policy.save(tmp_path / "policy")
    loaded = DiscreteSoftQ.load(tmp_path / "model", env=RandomMDP(), device="cpu")
    policy = DiscreteSoftQPolicy.load(tmp_path / "policy", device="cpu")
    np.testing.assert_array_equal(loaded.soft_value(obs), model.soft_value(obs))
    # the policy alone acts at the agent's temperature
    for actor in (model, loaded, policy):
        model.set_random_seed(1)
        actor.sampled = actor.predict(np.tile(obs, (50, 1)))[0]
    assert (loaded.sampled == model.sampled).all()
    assert (policy.sampled == model.sampled).all()
    loaded.learn(20, reset_num_timesteps=False)
    assert loaded.num_timesteps == 60


def test_load_with_another_temperature(tmp_path):
    make(ent_coef=0.1).learn(20).save(tmp_path / "model")
    obs = np.eye(N_STATES, dtype=np.float32)
    loaded = DiscreteSoftQ.load(tmp_path / "model", device="cpu", ent_coef=50.0)
    np.testing.assert_allclose(loaded.entropy(obs), np.log(N_ACTIONS), atol=1e-3)
    other = make(ent_coef=2.0)
    other.set_parameters(loaded.get_parameters())
    assert other.policy.ent_coef.item() == pytest.approx(2.0)


@pytest.mark.parametrize("value", [-0.1, 1.2])
def test_target_entropy_is_one_that_a_policy_has(value):
    with pytest.raises(
        ValueError, match=f"target_entropy={value} is not allowed: it must be a finite number >= 0.0 and <= 1.09"
    ):
        make(target_entropy=value)


@pytest.mark.parametrize(("name", "folder"), [(None, "DiscreteSoftQ_1"), ("mine", "mine_1")])
def test_name_of_the_log(tmp_path, name, folder):
    pytest.importorskip("tensorboard")
    make(tensorboard_log=str(tmp_path)).learn(10, **({} if name is None else {"tb_log_name": name}))
    assert [path.name for path in tmp_path.iterdir()] == [folder]


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(policy="MultiInputPolicy", env=SimpleMultiObsEnv(discrete_actions=True)),
        dict(policy="CnnPolicy", env=FakeImageEnv(screen_height=36, screen_width=36, n_channels=1, discrete=True)),
        dict(policy="MultiInputPolicy", env=BitFlippingEnv(n_bits=3), replay_buffer_class=HerReplayBuffer),
        dict(env=make_vec_env("CartPole-v1", n_envs=3), gradient_steps=-1, n_steps=3, target_update_interval=2),
        dict(env="CartPole-v1", optimize_memory_usage=True, replay_buffer_kwargs={"handle_timeout_termination": False}),
        dict(env="CartPole-v1", train_freq=(1, "episode"), ent_coef=lambda progress: 0.1 + progress),
    ],
    ids=["dict", "image", "her", "several", "memory", "episode"],
)
def test_options(kwargs):
    model = make(**kwargs)
    before = flat(model.critic)
    model.learn(60)
    after = flat(model.critic)
    assert th.isfinite(after).all()
    assert not th.equal(before, after)


@pytest.mark.parametrize(
    "space", [spaces.Discrete(4), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(3), spaces.Box(-1.0, 1.0, (2, 2))], ids=str
)
def test_observation_spaces(space):
    env = RandomMDP()
    env.observation_space = space
    env.reset = lambda **kwargs: (space.sample(), {})
    env.step = lambda action: (space.sample(), float(action), False, False, {})
    model = make(env=env).learn(30)
    assert model.sample_actions(space.sample(), 4).shape == (4,)


def test_same_seed_same_parameters():
    first, second = (make(env="CartPole-v1").learn(100) for _ in range(2))
    for a, b in zip(first.policy.state_dict().values(), second.policy.state_dict().values(), strict=True):
        assert th.equal(a, b)


def test_spaces_and_classes_belong_together():
    with pytest.raises(ValueError, match=r"action_space=Discrete\(2\) is not allowed: .* sb3_softq.DiscreteSoftQ"):
        SoftQ("MlpPolicy", "CartPole-v1")
    with pytest.raises(ValueError, match=r"action_space=Box.* is not allowed: .* sb3_softq.SoftQ"):
        DiscreteSoftQ("MlpPolicy", "Pendulum-v1")
    env = RandomMDP()
    env.action_space = spaces.Discrete(3, start=1)
    with pytest.raises(ValueError, match="with actions from 0"):
        DiscreteSoftQ("MlpPolicy", env)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3, 4, 5])
def test_cartpole(seed):
    """Solved within 50,000 steps: 475 on average over 20 episodes."""
    solved = StopTrainingOnRewardThreshold(475.0)
    env = make_vec_env("CartPole-v1", seed=1000)
    evaluation = EvalCallback(env, solved, eval_freq=5_000, n_eval_episodes=20, verbose=0)
    DiscreteSoftQ("MlpPolicy", "CartPole-v1", seed=seed, device="cpu").learn(50_000, evaluation)
    assert evaluation.best_mean_reward >= 475


@pytest.mark.parametrize(
    ("arguments", "tau"),
    [
        ({}, 0.02),
        (dict(target_update_interval=5), 1.0),
        (dict(tau=0.3), 0.3),
        (dict(target_update_interval=5, tau=0.3), 0.3),
        (dict(tau=0.0), 0.0),
    ],
)
def test_a_target_network_that_is_replaced_from_time_to_time(tmp_path, arguments, tau):
    """DQN's settings name the interval alone, and mean that the whole network is replaced."""
    model = make(ent_coef=0.2, learning_starts=0, **arguments)
    assert model.tau == tau
    model.save(tmp_path / "model")
    assert DiscreteSoftQ.load(tmp_path / "model").tau == tau
    model.learn(10)
    replaced = all(th.equal(a, b) for a, b in zip(model.q_net.parameters(), model.q_net_target.parameters(), strict=True))
    assert replaced == (tau == 1.0)


@pytest.mark.parametrize("alpha", [0.1, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_on_policy_it_is_a_policy_gradient(alpha, seed):
    assert relative_difference(alpha, off_policy=0.0, seed=seed) < 1e-12
    assert relative_difference(alpha, off_policy=0.5, seed=seed) > 0.05


def test_example_of_the_equivalence(tmp_path):
    script = "import sys; sys.path.insert(0, 'examples'); import equivalence, pathlib; "
    script += f"equivalence.OUT = pathlib.Path({str(tmp_path / 'figure.png')!r}); equivalence.main()"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("on-policy") == 3
    assert (tmp_path / "figure.png").stat().st_size > 5000


@pytest.mark.parametrize("given", ["dict", "file"])
def test_one_temperature(tmp_path, given):
    """What is trained with is what is acted by, whoever sets it."""
    model, other = make(ent_coef="auto_0.5").learn(30), make(ent_coef="auto_0.01", seed=1)
    parameters = model.get_parameters()
    if given == "file":
        model.save(tmp_path / "model")
        parameters = tmp_path / "model.zip"
    other.set_parameters(parameters)
    assert other.policy.ent_coef.item() == other.ent_coef_tensor.item() == pytest.approx(model.policy.ent_coef.item())
    other.learn(30)
    assert other.policy.ent_coef.item() == other.ent_coef_tensor.item() != model.policy.ent_coef.item()


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda model: cloudpickle.loads(cloudpickle.dumps(model))])
@pytest.mark.parametrize("ent_coef", ["auto_0.5", 0.5, lambda progress: 0.1 + 0.4 * progress])
def test_copies_have_one_temperature_too(tmp_path, copy_of, ent_coef):
    model = make(ent_coef=ent_coef).learn(20)
    model.save(tmp_path / "model")
    for other in (copy_of(model), DiscreteSoftQ.load(tmp_path / "model", env=model.get_env(), device="cpu")):
        other.learn(20, reset_num_timesteps=False)
        assert other.policy.ent_coef.item() == pytest.approx(other.ent_coef_tensor.item(), rel=1e-6)
        assert (other.log_ent_coef is None) == (ent_coef != "auto_0.5")
    assert model.policy.ent_coef.item() == pytest.approx(model.ent_coef_tensor.item(), rel=1e-6)


def test_writing_to_the_policy_writes_to_the_agent():
    model = make(ent_coef="auto_0.5")
    model.policy.load_state_dict(make(ent_coef=0.2).policy.state_dict())
    assert model.ent_coef_tensor.item() == pytest.approx(0.2)


@pytest.mark.parametrize("n_bins", [1, 11])
def test_files_have_the_histograms(tmp_path, n_bins):
    """Those of the agent, of its policy alone and of its critic alone."""
    model = make(policy_kwargs=dict(n_bins=n_bins, net_arch=[8])).learn(40)
    obs = np.eye(N_STATES, dtype=np.float32)
    with th.no_grad():
        outputs = model.critic.outputs(th.as_tensor(obs))
    assert outputs.shape == (N_STATES, N_ACTIONS, n_bins)
    actions = np.tile(np.arange(N_ACTIONS), (N_STATES, 1))
    np.testing.assert_allclose(model.q_values(obs, actions), model.critic.q_of(outputs), rtol=1e-5)
    for name in ("agent.zip", "agent.safetensors"):
        model.save(tmp_path / name)
        np.testing.assert_array_equal(DiscreteSoftQ.load(tmp_path / name).q_values(obs, actions), model.q_values(obs, actions))
    model.policy.save(tmp_path / "policy")
    policy = DiscreteSoftQPolicy.load(tmp_path / "policy", device="cpu")
    assert th.equal(policy.logits(th.as_tensor(obs)), model.policy.logits(th.as_tensor(obs)))
    q_net = model.q_net
    q_net.save(tmp_path / "critic")
    assert th.equal(type(q_net).load(tmp_path / "critic", device="cpu")(th.as_tensor(obs)), q_net(th.as_tensor(obs)))


@pytest.mark.parametrize("key", ["use_sde"])
def test_policy_kwargs_that_sac_has_had(key):
    """SAC writes into the dict that it is given."""
    policy_kwargs = dict(net_arch=[4])
    SAC("MlpPolicy", "Pendulum-v1", policy_kwargs=policy_kwargs)
    assert policy_kwargs[key] is False
    assert make(policy_kwargs=policy_kwargs).learn(10)._n_updates > 0
    assert key in policy_kwargs
    with pytest.raises(ValueError, match="key of policy_kwargs='use_sde' is not allowed"):
        make(policy_kwargs={"use_sde": True})
