"""Logged data: they lie in a replay buffer as the environment gave them, and an agent learns from them, offline and online."""

import sys
from unittest.mock import patch

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import DQN, SAC, HerReplayBuffer
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer
from stable_baselines3.common.envs import BitFlippingEnv, FakeImageEnv, SimpleMultiObsEnv
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize, VecTransposeImage

from sb3_softq import DiscreteSoftQ, SoftQ
from sb3_softq.data import Trajectory, from_agent, from_minari
from tests.conftest import RandomEnv, assert_same, flat, small

minari = pytest.importorskip("minari")
from minari.data_collector import EpisodeBuffer  # noqa: E402

ACTIONS = spaces.Box(np.array([-1.0, 0.0], dtype=np.float32), np.array([3.0, 0.5], dtype=np.float32))


def collect(env, n_episodes=3, n_steps=7, seed=0):
    """Trajectories of random actions, the first of which terminates whatever the environment says."""
    env.action_space.seed(seed)
    found = []
    for episode in range(n_episodes):
        observations, actions, rewards = [env.reset(seed=seed + episode)[0]], [], []
        for _ in range(n_steps + episode):
            actions.append(env.action_space.sample())
            obs, reward, terminated, truncated, _ = env.step(actions[-1])
            observations.append(obs)
            rewards.append(reward)
            if terminated or truncated:
                break
        if isinstance(observations[0], dict):
            stacked = {key: np.stack([obs[key] for obs in observations]) for key in observations[0]}
        else:
            stacked = np.stack(observations)
        found.append(Trajectory(stacked, np.array(actions), np.array(rewards), episode == 0))
    return found


def test_transitions_are_those_of_the_trajectories():
    trajectories = collect(RandomEnv(ACTIONS))
    model = small(env=RandomEnv(ACTIONS)).set_data(trajectories)
    buffer = model.logged_data
    assert (buffer.size(), buffer.full, buffer.n_envs) == (7 + 8 + 9, True, 1)
    row = 0
    for observations, actions, rewards, terminated in trajectories:
        for i, reward in enumerate(rewards):
            assert (buffer.observations[row, 0] == observations[i]).all()
            assert (buffer.next_observations[row, 0] == observations[i + 1]).all()
            assert buffer.actions[row, 0] == pytest.approx(
                2 * (actions[i] - ACTIONS.low) / (ACTIONS.high - ACTIONS.low) - 1, abs=1e-6
            )
            assert buffer.rewards[row, 0] == pytest.approx(reward)
            is_last = i == len(rewards) - 1
            assert buffer.dones[row, 0] == is_last
            # what a time limit has cut off goes on
            assert buffer.timeouts[row, 0] == (is_last and not terminated)
            row += 1
    samples = buffer._get_samples(np.arange(row))
    assert np.flatnonzero(samples.dones.numpy()).tolist() == [6]


def test_dictionaries_of_any_observations():
    env = SimpleMultiObsEnv(random_start=False, discrete_actions=False)
    trajectories = collect(env)
    model = small(policy="MultiInputPolicy", env=SimpleMultiObsEnv(random_start=False, discrete_actions=False), n_steps=1)
    buffer = model.set_data(trajectories).logged_data
    assert type(buffer) is DictReplayBuffer
    assert (buffer.observations["vec"][:7, 0] == trajectories[0].observations["vec"][:7]).all()
    # channels first, as the networks have them
    image = trajectories[0].observations["img"][:7]
    expected = image if model.observation_space["img"].shape == image.shape[1:] else image.transpose(0, 3, 1, 2)
    assert (buffer.observations["img"][:7, 0] == expected).all()
    model.pretrain(2)


def test_images_as_environments_give_them():
    env = FakeImageEnv(screen_height=36, screen_width=36, discrete=False)
    model = small(policy="CnnPolicy", env=env, width=None, buffer_size=50).set_data(collect(env))
    assert model.logged_data.observations.shape[2:] == (1, 36, 36)
    model.pretrain(2)


def test_n_steps_do_not_run_into_the_next_trajectory():
    model = small(env=RandomEnv(ACTIONS), n_steps=3, gamma=0.5).set_data(trajectories := collect(RandomEnv(ACTIONS)))
    buffer = model.logged_data
    assert type(buffer) is NStepReplayBuffer
    samples = buffer._get_samples(np.array([0, 5, 13]))
    first, second = trajectories[0].rewards, trajectories[1].rewards
    # the last step but one of the first trajectory, which terminates, and of the second, which was cut off
    expected = [first[0] + 0.5 * first[1] + 0.25 * first[2], first[5] + 0.5 * first[6], second[6] + 0.5 * second[7]]
    assert samples.rewards[:, 0].numpy() == pytest.approx(np.array(expected))
    assert samples.dones[:, 0].tolist() == [0.0, 1.0, 0.0]
    assert samples.discounts[:, 0].tolist() == [0.125, 0.25, 0.25]
    model.pretrain(2)
    model.learn(20)


def test_goals_beside_those_of_her():
    env = BitFlippingEnv(n_bits=4, continuous=True)
    kwargs = dict(replay_buffer_class=HerReplayBuffer, policy="MultiInputPolicy")
    model = small(env=env, **kwargs).set_data(collect(BitFlippingEnv(n_bits=4, continuous=True)), share=0.25)
    assert type(model.logged_data) is DictReplayBuffer
    model.pretrain(2)
    model.learn(40)
    assert model._n_updates > 10


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_share_of_each_minibatch(share):
    """Logged observations are 100."""
    logged = [t._replace(observations=np.full_like(t.observations, 100.0)) for t in collect(RandomEnv(ACTIONS))]
    model = small(env=RandomEnv(ACTIONS)).learn(20)
    model.set_data(logged, share=share)
    samples = model._sample(16)
    is_logged = (samples.observations == 100.0).all(dim=1)
    assert int(is_logged.sum()) == 16 * share
    assert len(samples.rewards) == len(samples.actions) == len(samples.next_observations) == 16
    assert samples.discounts is None
    model.set_data(None)
    assert not (model._sample(16).observations == 100.0).any()


def test_normalised_as_the_environment_is():
    env = VecNormalize(DummyVecEnv([lambda: RandomEnv(ACTIONS)]))
    model = small(env=env).learn(30)
    model.set_data(trajectories := collect(RandomEnv(ACTIONS)), share=1.0)
    samples = model._sample(64)
    raw = np.concatenate([t.observations[:-1] for t in trajectories])
    distances = np.abs(samples.observations.numpy()[:, None] - env.normalize_obs(raw)).max(axis=2)
    assert distances.min(axis=1).max() < 1e-5


@pytest.mark.parametrize("as_dict", [False, True])
def test_a_normalisation_that_has_seen_nothing_is_that_of_the_data(as_dict):
    def make_env():
        return SimpleMultiObsEnv(discrete_actions=False) if as_dict else RandomEnv(ACTIONS)

    trajectories = [t._replace(rewards=500.0 + 10.0 * t.rewards) for t in collect(make_env())]
    keys = dict(norm_obs_keys=["vec"]) if as_dict else {}
    venv = DummyVecEnv([make_env])
    env = VecNormalize(VecTransposeImage(venv) if as_dict else venv, **keys)
    policy = dict(policy="MultiInputPolicy", width=None) if as_dict else {}
    model = small(env=env, buffer_size=100, **policy).set_data(trajectories).clone_behaviour(1)
    seen = np.concatenate([(t.observations["vec"] if as_dict else t.observations)[:-1] for t in trajectories])
    statistics = env.obs_rms["vec"] if as_dict else env.obs_rms
    np.testing.assert_allclose(statistics.mean, seen.mean(axis=0), atol=1e-4)
    np.testing.assert_allclose(statistics.var, seen.var(axis=0), atol=1e-4)
    returns = []
    for trajectory in trajectories:
        running = 0.0
        for reward in trajectory.rewards:
            returns.append(running := env.gamma * running + reward)
    assert env.ret_rms.var == pytest.approx(np.var(returns), rel=0.01)
    # what has been seen is kept
    before = statistics.count
    model.set_data(trajectories[:1]).pretrain(1)
    assert statistics.count == before
    samples = model.logged_data.sample(32, env=env)
    assert np.abs(samples.rewards.numpy()).max() < env.clip_reward


@pytest.mark.parametrize(
    ("space", "wrong"),
    [
        (spaces.Box(0, 255, (2,), dtype=np.uint8), [[0.5, 0.0], [-1, 0], [256, 0]]),
        (spaces.Discrete(3), [-1, 3, 1.5]),
        (spaces.MultiDiscrete([2, 5]), [[2, 0], [0, 5], [0.5, 0]]),
        (spaces.MultiBinary(2), [[2, 0], [0, -1]]),
    ],
)
def test_observations_that_are_none_of_the_space(space, wrong):
    """Such as images between 0 and 1, of which a buffer of bytes would keep zeros."""
    env = RandomEnv(ACTIONS)
    env.observation_space = space
    model = small(env=env, buffer_size=50)
    right = [space.sample() for _ in range(4)]
    rest = dict(actions=np.zeros((3, 2)), rewards=np.zeros(3), terminated=True)
    model.set_data([Trajectory(np.array(right), **rest)])
    for observation in wrong:
        with pytest.raises(ValueError, match=r"trajectories\[0\] has observations that are not in .*, in step 2"):
            model.set_data([Trajectory(np.array([*right[:2], observation, right[3]]), **rest)])


@pytest.mark.parametrize("way", ["set_data", "load_replay_buffer"])
def test_the_scale_of_returns_is_that_of_normalised_rewards(tmp_path, way):
    """Buffers hold rewards as the environment gives them."""

    def make_env():
        return gym.wrappers.TransformReward(gym.make("Pendulum-v1"), lambda reward: 100.0 * float(reward))

    logged = small(env=make_env(), learning_starts=10**6, buffer_size=1000).learn(1000)
    logged.save_replay_buffer(tmp_path / "buffer.pkl")
    model = small(env=VecNormalize(DummyVecEnv([make_env])), learning_starts=200, buffer_size=1000, train_freq=50)
    if way == "set_data":
        model.set_data(from_agent(logged))
    else:
        model.load_replay_buffer(tmp_path / "buffer.pkl")
    model.learn(500)
    assert model.returns.count == 1500
    # returns of rewards that are divided by the standard deviation of returns
    assert 0.5 < model.critic.return_scale.item() < 2.0


class Aim(gym.Env):
    """One step: act near half of the observation, rewards up to 0."""

    observation_space = spaces.Box(-1.0, 1.0, (1,))
    action_space = spaces.Box(-2.0, 2.0, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.obs = self.np_random.uniform(-1.0, 1.0, 1).astype(np.float32)
        return self.obs, {}

    def step(self, action):
        return self.obs, -10.0 * float((action[0] - self.obs[0]) ** 2), True, False, {}


def test_pretraining_learns_the_task_without_the_environment():
    env = Aim()
    env.action_space.seed(0)
    trajectories = []
    for i in range(1000):
        obs, _ = env.reset(seed=i)
        action = env.action_space.sample()
        trajectories.append(Trajectory(np.stack([obs, obs]), action[None], np.array([env.step(action)[1]]), True))
    model = SoftQ("MlpPolicy", Aim(), policy_kwargs=dict(net_arch=[32]), batch_size=64, seed=0, device="cpu")
    model.set_data(trajectories).pretrain(1500)
    assert (model.num_timesteps, model._n_updates, model.replay_buffer.size()) == (0, 1500, 0)
    obs = np.linspace(-0.8, 0.8, 9, dtype=np.float32)[:, None]
    assert np.abs(model.predict(obs, deterministic=True)[0] - obs).max() < 0.3
    # what a scale of rewards is, is known from the data
    assert model.returns.count == 1000
    model.learn(20)
    assert model.num_timesteps == 20


def test_the_actor_learns_both_ways_of_a_demonstration():
    """Where a Gaussian has its mean, nobody acts."""
    rng = np.random.default_rng(0)
    obs = rng.uniform(-1.0, 1.0, (1001, 3)).astype(np.float32)
    way = rng.choice([-1.0, 1.0], 1000, p=[0.3, 0.7])
    actions = (way * (1.0 + 0.4 * obs[:1000, 0]) + 0.1 * rng.standard_normal(1000))[:, None]
    model = SoftQ("MlpPolicy", "Pendulum-v1", policy_kwargs=dict(net_arch=[32]), batch_size=64, seed=0, device="cpu")
    critics = flat(model.critic)
    model.set_data([Trajectory(obs, actions, np.zeros(1000), False)]).clone_behaviour(600)
    assert th.equal(flat(model.critic), critics)
    for x in (-0.8, 0.0, 0.8):
        modes, shares = model.modes(np.array([x, 0.0, 0.0], dtype=np.float32), min_share=0.05)
        assert modes.ravel() == pytest.approx([1.0 + 0.4 * x, -1.0 - 0.4 * x], abs=0.2)
        assert shares == pytest.approx([0.7, 0.3], abs=0.12)


def test_the_deterministic_action_of_an_imitation_is_the_more_frequent_one():
    """The critics, who have learned nothing, are not asked."""
    rng = np.random.default_rng(0)
    obs = rng.uniform(-1.0, 1.0, (1001, 3)).astype(np.float32)
    way = rng.choice([-1.0, 1.0], 1000, p=[0.1, 0.9])
    actions = (way * (1.0 + 0.4 * obs[:1000, 0]) + 0.1 * rng.standard_normal(1000))[:, None]
    model = SoftQ("MlpPolicy", "Pendulum-v1", policy_kwargs=dict(net_arch=[32]), batch_size=64, seed=0, device="cpu")
    model.set_data([Trajectory(obs, actions, np.zeros(1000), False)]).clone_behaviour(600)
    new = rng.uniform(-1.0, 1.0, (200, 3)).astype(np.float32)
    found = model.predict(new, deterministic=True)[0].ravel()
    assert np.abs(found - (1.0 + 0.4 * new[:, 0])).max() < 0.2
    # until the critics have taught the actor something else
    model.pretrain(1)
    assert not np.array_equal(model.predict(new, deterministic=True)[0].ravel(), found)


def test_one_expert_learns_both_ways_too():
    """With two particles its density was so loose that a Gaussian between the ways was as good."""
    rng = np.random.default_rng(0)
    obs = rng.uniform(-1.0, 1.0, (1001, 3)).astype(np.float32)
    actions = (rng.choice([-1.4, 1.4], 1000) + 0.1 * rng.standard_normal(1000))[:, None]
    policy_kwargs = dict(net_arch=[32], n_experts=1)
    model = SoftQ("MlpPolicy", "Pendulum-v1", policy_kwargs=policy_kwargs, batch_size=64, seed=0, device="cpu")
    model.set_data([Trajectory(obs, actions, np.zeros(1000), False)]).clone_behaviour(600)
    found = model.sample_actions(obs[0], n=500).ravel()
    assert (np.abs(found) < 0.7).mean() < 0.1
    assert 0.3 < (found > 0).mean() < 0.7


def test_a_sampler_without_a_density_cannot_imitate():
    model = small(env=RandomEnv(ACTIONS), policy_kwargs=dict(net_arch=[8], smoothing="none"), repulsion="kernel")
    model.set_data(collect(RandomEnv(ACTIONS)))
    with pytest.raises(ValueError, match="smoothing='none' is not allowed for clone_behaviour"):
        model.clone_behaviour(1)


@pytest.mark.parametrize("log_interval", [1, 7, 1000])
def test_schedules_run_from_the_first_to_the_last_update(log_interval):
    """However often the log is written."""
    seen, rates = [], []

    def schedule(progress):
        seen.append(progress)
        return 1e-3 * progress + 1e-9

    model = small(env=RandomEnv(ACTIONS), learning_rate=schedule, actor_learning_rate=schedule, ent_coef=0.1)
    model.set_data(collect(RandomEnv(ACTIONS)))
    minimize = SoftQ.actor_loss

    def actor_loss(self, *args):
        rates.append([optimizer.param_groups[0]["lr"] for optimizer in self._optimizers()])
        return minimize(self, *args)

    with patch.object(SoftQ, "actor_loss", actor_loss):
        model.pretrain(20, log_interval=log_interval)
    expected = [1e-3 * (1 - i / 20) + 1e-9 for i in range(20)]
    assert [rate for rate, _ in rates] == pytest.approx(expected)
    assert [rate for _, rate in rates] == pytest.approx(expected)
    # the temperature's factor does so too
    assert model._annealing() == pytest.approx(1.0, abs=1e-6)


def test_cloning_has_the_actors_learning_rate():
    rates = []

    class Cloning(SoftQ):
        def cloning_loss(self, *args):
            rates.append(self.actor.optimizer.param_groups[0]["lr"])
            return super().cloning_loss(*args)

    data = collect(RandomEnv(ACTIONS))
    for kwargs, expected in (
        ({}, np.linspace(1e-3, 3e-4, 11)[:10]),
        (dict(actor_learning_rate=1e-5), [1e-5] * 10),
        (dict(actor_learning_rate=lambda progress: 1e-4 * progress), np.linspace(1e-4, 0.0, 11)[:10]),
    ):
        model = small(Cloning, env=RandomEnv(ACTIONS), **kwargs).set_data(data)
        model.clone_behaviour(10, log_interval=3)
        assert rates == pytest.approx(list(expected))
        rates.clear()


def test_discrete_actions():
    env = gym.make("CartPole-v1")
    model = small(DiscreteSoftQ, env="CartPole-v1").set_data(collect(env))
    before = flat(model.policy)
    model.pretrain(5)
    assert not th.equal(flat(model.policy), before)
    model.learn(40)


def test_the_log_of_pretraining(tmp_path):
    model = small(env=RandomEnv(ACTIONS)).set_data(collect(RandomEnv(ACTIONS)))
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.pretrain(10, log_interval=4)
    lines = (tmp_path / "progress.csv").read_text().splitlines()
    assert [line.split(",")[lines[0].split(",").index("train/n_updates")] for line in lines[1:]] == ["4", "8", "10"]


def test_data_are_not_saved(tmp_path):
    model = small(env=RandomEnv(ACTIONS)).set_data(collect(RandomEnv(ACTIONS)), share=0.75)
    model.pretrain(2)
    for name in ("agent.zip", "agent.safetensors"):
        model.save(tmp_path / name)
        loaded = SoftQ.load(tmp_path / name, env=RandomEnv(ACTIONS))
        assert loaded.logged_data is None
        assert loaded.data_share == 0.75
        loaded.learn(20)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.01, 1), (0.5, 4), (0.99, 7), (1.0, 8)])
def test_a_small_minibatch_has_a_part_of_both(share, expected):
    model = small(env=RandomEnv(ACTIONS)).learn(20)
    model.set_data(collect(RandomEnv(ACTIONS)), share)
    model.logged_data.rewards[:] = 77.0
    assert (model._sample(8).rewards == 77.0).sum() == expected


def test_without_data():
    model = small(env=RandomEnv(ACTIONS))
    for method in (model.pretrain, model.clone_behaviour):
        with pytest.raises(ValueError, match=r"no data to learn from: set_data\(trajectories\) comes first"):
            method(1)
    with pytest.raises(ValueError, match=r"share=1\.5 is not allowed"):
        model.set_data(collect(RandomEnv(ACTIONS)), share=1.5)
    model.set_data(collect(RandomEnv(ACTIONS)))
    for method in (model.pretrain, model.clone_behaviour):
        with pytest.raises(ValueError, match="n_updates=0 is not allowed"):
            method(0)


def wrong(**changes):
    first, second, *others = collect(RandomEnv(ACTIONS))
    return [first, second._replace(**{name: change(getattr(second, name)) for name, change in changes.items()}), *others]


def with_value(value):
    def change(array):
        array = array.copy()
        array[3] = value
        return array

    return change


@pytest.mark.parametrize(
    ("trajectories", "message"),
    [
        ([], "there must be one at least"),
        (wrong(observations=lambda x: x[:-1]), r"trajectories\[1\] has observations of shape \(8, 3\): it must be \(9, 3\)"),
        (wrong(observations=lambda x: x[:, :2]), r"trajectories\[1\] has observations of shape \(9, 2\)"),
        (wrong(observations=lambda x: {"a": x}), r"trajectories\[1\] has observations"),
        (wrong(observations=with_value(np.nan)), r"trajectories\[1\] has observations that are not finite, in step 3"),
        (
            wrong(observations=lambda x: with_value(1e300)(x.astype(np.float64))),
            "has observations that are not finite, in step 3",
        ),
        (wrong()[0], r"trajectories=Trajectory\(...\) is not allowed: it must be a list of them"),
        ([wrong()[0], "a file"], r"trajectories\[1\] is a str: it must be a Trajectory\(observations, actions, "),
        (wrong(actions=lambda x: x[:, 0]), r"trajectories\[1\] has actions of shape \(8,\): it must be \(8, 2\)"),
        (wrong(actions=with_value(np.nan)), r"trajectories\[1\] has actions that are not finite, in step 3"),
        (wrong(actions=with_value(2.0)), r"trajectories\[1\] has actions that are not in Box\(.*, in step 3"),
        (wrong(rewards=with_value(np.inf)), r"trajectories\[1\] has rewards that are not finite, in step 3"),
        (wrong(rewards=lambda x: x[:0]), r"trajectories\[1\] has rewards of shape \(0,\)"),
        (wrong(rewards=lambda x: x[:, None]), r"trajectories\[1\] has rewards of shape \(8, 1\)"),
    ],
)
def test_what_does_not_fit_is_named(trajectories, message):
    with pytest.raises(ValueError, match=message):
        small(env=RandomEnv(ACTIONS)).set_data(trajectories)


def test_a_dictionary_that_lacks_a_key():
    env = SimpleMultiObsEnv(discrete_actions=False)
    (first, *_) = collect(env)
    del first.observations["vec"]
    with pytest.raises(
        ValueError, match=r"trajectories\[0\] has observations \['img'\]: it must be a dict of \['img', 'vec'\]"
    ):
        small(policy="MultiInputPolicy", env=env).set_data([first])


def test_rounding_at_the_edge_of_the_box():
    (first, *_) = collect(RandomEnv(ACTIONS))
    first.actions[0] = ACTIONS.high + 1e-4
    model = small(env=RandomEnv(ACTIONS)).set_data([first])
    assert model.logged_data.actions[0, 0] == pytest.approx(np.ones(2))


@pytest.mark.parametrize(
    ("algorithm", "policy", "make_env"),
    [
        (SoftQ, "MlpPolicy", lambda: gym.make("Pendulum-v1")),
        (DiscreteSoftQ, "MlpPolicy", lambda: gym.make("CartPole-v1")),
        (SoftQ, "MultiInputPolicy", lambda: BitFlippingEnv(n_bits=4, continuous=True)),
    ],
    ids=["box", "discrete", "dict"],
)
def test_minari(tmp_path, monkeypatch, algorithm, policy, make_env):
    """A data set that is made and kept on this machine."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    trajectories = collect(make_env(), n_episodes=4, n_steps=12)
    buffers = []
    for observations, actions, rewards, terminated in trajectories:
        ends = np.arange(len(rewards)) == len(rewards) - 1
        flags = dict(terminations=list(ends & terminated), truncations=list(ends & (not terminated)))
        buffers.append(EpisodeBuffer(observations=observations, actions=list(actions), rewards=list(rewards), **flags))
    env = make_env()
    spaces_of_it = dict(observation_space=env.observation_space, action_space=env.action_space)
    dataset = minari.create_dataset_from_buffers("test/agent-v0", buffers, algorithm_name="random", **spaces_of_it)
    for source in (dataset, "test/agent-v0"):
        for found, expected in zip(from_minari(source), trajectories, strict=True):
            assert_same(found._replace(rewards=None), expected._replace(rewards=None))
            assert found.rewards == pytest.approx(expected.rewards)
    model = small(algorithm, policy, env=make_env()).set_data(from_minari("test/agent-v0"))
    assert model.logged_data.size() == sum(len(t.rewards) for t in trajectories)
    model.pretrain(3)
    with pytest.raises(FileNotFoundError):
        list(from_minari("test/none-v0"))


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("buffer_size", [300, 60])
@pytest.mark.parametrize(
    "kwargs", [{}, dict(optimize_memory_usage=True, replay_buffer_kwargs=dict(handle_timeout_termination=False))]
)
def test_data_of_an_agent(n_envs, buffer_size, kwargs):
    """Each transition that is there, whole or with its oldest ones overwritten, as the environment gave it."""

    class Recorded(RandomEnv):
        """Ends by itself after 7 steps, or by the limit of 5 in every other episode."""

        log: list = []  # noqa: RUF012

        def __init__(self, i):
            super().__init__(ACTIONS)
            self.i, self.n, self.episode = i, 0, 0

        def reset(self, **kw):
            self.n, self.episode = 0, self.episode + 1
            self.obs, info = super().reset(**kw)
            return self.obs, info

        def step(self, action):
            before = self.obs
            self.obs, reward, _, _, info = super().step(action)
            self.n += 1
            terminated, truncated = self.n == 7, self.n == 5 and self.episode % 2 == 0
            self.log.append((self.i, before, action.copy(), reward, self.obs, terminated))
            return self.obs, reward, terminated, truncated, info

    Recorded.log = []
    env = DummyVecEnv([lambda i=i: Recorded(i) for i in range(n_envs)])
    model = small(env=env, buffer_size=buffer_size, **kwargs).learn(120)
    handles_limits = not kwargs
    found = []
    for trajectory in from_agent(model):
        n = len(trajectory.rewards)
        assert n <= 7
        for k in range(n):
            found.append(
                (trajectory.observations[k], trajectory.actions[k], trajectory.rewards[k], trajectory.observations[k + 1],
                 trajectory.terminated and k == n - 1)
            )  # fmt: skip
    # of each environment the newest ones
    n_rows = min(120, buffer_size) // n_envs - int(bool(kwargs) and buffer_size < 120)
    expected = [row[1:] for i in range(n_envs) for row in [row for row in Recorded.log if row[0] == i][-n_rows:]]
    assert len(found) == len(expected)
    for got, (before, action, reward, after, terminated) in zip(found, expected, strict=True):
        assert got[0] == pytest.approx(before)
        assert got[1] == pytest.approx(action, abs=1e-5)
        assert got[2] == pytest.approx(reward)
        if handles_limits:
            assert got[3] == pytest.approx(after)
            assert got[4] == terminated
    other = small(env=RandomEnv(ACTIONS)).set_data(from_agent(model)).pretrain(3)
    assert other.logged_data.size() == len(expected)


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("n_steps", [1, 11])
def test_pieces_of_one_step(n_steps, length):
    """Episodes of one step, and one that has just begun."""

    class Short(RandomEnv):
        def reset(self, **kw):
            self.n = 0
            return super().reset(**kw)

        def step(self, action):
            self.n += 1
            obs, reward, *_, info = super().step(action)
            return obs, reward, self.n == length, False, info

    model = small(env=Short(ACTIONS), learning_starts=0).learn(n_steps)
    lengths = [len(trajectory.rewards) for trajectory in from_agent(model)]
    assert lengths == [length] * (n_steps // length) + [n_steps % length] * (n_steps % length > 0)


@pytest.mark.parametrize(
    ("algorithm", "policy", "env"),
    [
        (SoftQ, "MultiInputPolicy", SimpleMultiObsEnv(discrete_actions=False)),
        (DiscreteSoftQ, "MultiInputPolicy", SimpleMultiObsEnv()),
        (DiscreteSoftQ, "MlpPolicy", "CartPole-v1"),
    ],
)
def test_data_of_an_agent_and_back(algorithm, policy, env):
    """The replay buffer made of them holds what the agent's does."""
    model = small(algorithm, policy, env=env).learn(60)
    other = small(algorithm, policy, env=env).set_data(from_agent(model))
    buffer, again = model.replay_buffer, other.logged_data
    assert again.size() == 60
    for name in ("actions", "rewards", "observations", "next_observations"):
        assert_same(getattr(again, name), sliced(getattr(buffer, name), 60))
    # where the buffer ends the new one is cut off
    assert_same(again.dones[:-1] * (1 - again.timeouts[:-1]), (buffer.dones * (1 - buffer.timeouts))[:59])


def sliced(values, n):
    return {key: value[:n] for key, value in values.items()} if isinstance(values, dict) else values[:n]


class Cells(gym.Env):
    """Discrete observations, alone or in a Dict: the number of the step."""

    def __init__(self, in_dict, action_space):
        self.space = spaces.Discrete(50)
        self.observation_space = spaces.Dict(cell=self.space, x=spaces.Box(0, 50, (2,))) if in_dict else self.space
        self.in_dict, self.action_space = in_dict, action_space

    def observe(self):
        return {"cell": self.n, "x": np.full(2, self.n, dtype=np.float32)} if self.in_dict else self.n

    def reset(self, *, seed=None, options=None):
        self.n = 0
        return self.observe(), {}

    def step(self, action):
        self.n += 1
        return self.observe(), 1.0, self.n == 20, False, {}


@pytest.mark.parametrize("in_dict", [False, True])
@pytest.mark.parametrize(("teacher", "algorithm"), [(DQN, DiscreteSoftQ), (SAC, SoftQ)])
def test_discrete_observations_of_an_agent(teacher, algorithm, in_dict):
    env = Cells(in_dict, spaces.Discrete(2) if teacher is DQN else ACTIONS)
    policy = "MultiInputPolicy" if in_dict else "MlpPolicy"
    agent = teacher(policy, env, buffer_size=100, learning_starts=1000, device="cpu").learn(48)
    trajectories = list(from_agent(agent))
    assert [len(trajectory.rewards) for trajectory in trajectories] == [20, 20, 8]
    cells = trajectories[1].observations["cell"] if in_dict else trajectories[1].observations
    assert cells.tolist() == list(range(21))
    assert small(algorithm, policy, env=env).set_data(trajectories).pretrain(2)._n_updates == 2


@pytest.mark.parametrize("in_dict", [False, True])
@pytest.mark.parametrize("teacher", [SAC, SoftQ])
def test_an_episode_that_was_left_does_not_go_on_in_the_next(teacher, in_dict):
    """At a new call of ``learn``, where a foreign agent's buffer marks nothing."""
    policy = "MultiInputPolicy" if in_dict else "MlpPolicy"
    agent = teacher(policy, Cells(in_dict, ACTIONS), buffer_size=100, learning_starts=1000, device="cpu")
    for n in (5, 7, 25):
        agent.learn(n)
    trajectories = list(from_agent(agent))
    assert [len(trajectory.rewards) for trajectory in trajectories] == [5, 7, 20, 5]
    for trajectory in trajectories:
        cells = trajectory.observations["cell"] if in_dict else trajectory.observations
        assert cells.tolist() == list(range(len(trajectory.rewards) + 1))
    assert [trajectory.terminated for trajectory in trajectories] == [False, False, True, False]


def test_agents_without_data_are_refused():
    with pytest.raises(ValueError, match="load_replay_buffer"):
        next(from_agent(small()))


def test_without_minari(monkeypatch):
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(ImportError, match=r'Minari data sets need minari: pip install "sb3-softq\[minari\]"'):
        next(from_minari("mujoco/walker2d/medium-v0"))
