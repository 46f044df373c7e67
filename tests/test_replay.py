"""Where an environment is reset in the middle of an episode, the trajectory in the replay buffer ends."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv

from sb3_softq import DiscreteSoftQ, SoftQ
from tests.conftest import small

GAMMA = 0.5


class Counting(gym.Env):
    """Never ends. Pays its number, another one after each reset: a return over a reset is no sum of equal rewards."""

    def __init__(self, action_space, goals):
        self.action_space = action_space
        box = spaces.Box(-np.inf, np.inf, (1,), dtype=np.float32)
        names = ("observation", "achieved_goal", "desired_goal")
        self.observation_space = spaces.Dict(dict.fromkeys(names, box)) if goals else box
        self.number = 0

    def _obs(self):
        x = np.array([self.number], dtype=np.float32)
        return dict.fromkeys(self.observation_space.spaces, x) if isinstance(self.observation_space, spaces.Dict) else x

    def reset(self, *, seed=None, options=None):
        self.number += 1
        return self._obs(), {}

    def step(self, action):
        return self._obs(), float(self.number), False, False, {}

    def compute_reward(self, achieved_goal, desired_goal, info):
        return (achieved_goal == desired_goal).astype(np.float32).ravel()


def make(algorithm=SoftQ, n_envs=1, goals=False, env=None, **kwargs):
    action_space = spaces.Discrete(2) if algorithm is DiscreteSoftQ else spaces.Box(-1.0, 1.0, (1,))
    env = env or make_vec_env(lambda: Counting(action_space, goals), n_envs)
    # nothing is learned
    arguments = dict(learning_starts=10_000, buffer_size=300, gamma=GAMMA)
    return small(algorithm, "MultiInputPolicy" if goals else "MlpPolicy", env, **(arguments | kwargs))


def assert_no_return_crosses_a_reset(model, n_steps):
    """All n-step returns are those of one number: (1 - gamma^k) / (1 - gamma) of it over the k steps that are left."""
    data = model.replay_buffer._get_samples(np.arange(model.replay_buffer.size()))
    numbers, returns = data.observations.numpy(), data.rewards.numpy()
    possible = (1 - GAMMA ** np.arange(1, n_steps + 1)) / (1 - GAMMA)
    assert np.isclose(returns / numbers, possible, rtol=1e-5).any(axis=1).all()
    np.testing.assert_array_equal(data.next_observations.numpy(), numbers)
    # cut off, not terminal
    assert not data.dones.any()
    assert len(np.unique(numbers)) > 1


def learn_again(model, path):
    model.learn(50)


def in_another_environment(model, path):
    model.set_env(model.get_env())
    model.learn(50, reset_num_timesteps=False)


def loaded(model, path):
    model.save(path / "model")
    model.save_replay_buffer(path / "buffer")
    model = type(model).load(path / "model", env=model.get_env(), device="cpu")
    model.load_replay_buffer(path / "buffer")
    return model.learn(50, reset_num_timesteps=False)


def buffer_of_another(model, path):
    """The buffer comes into an agent that is in the middle of an episode of its own."""
    model.save_replay_buffer(path / "buffer")
    other = make(type(model), model.n_envs, n_steps=model.n_steps)
    for _ in range(2):
        other.learn(7 * model.n_envs)
    other.load_replay_buffer(path / "buffer")
    return other.learn(50, reset_num_timesteps=False)


@pytest.mark.parametrize("algorithm", [SoftQ, DiscreteSoftQ])
@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize("handle_timeout_termination", [True, False])
@pytest.mark.parametrize("go_on", [learn_again, in_another_environment, loaded, buffer_of_another])
def test_returns_end_where_the_environment_is_reset(tmp_path, algorithm, n_envs, handle_timeout_termination, go_on):
    kwargs = {"handle_timeout_termination": handle_timeout_termination}
    model = make(algorithm, n_envs, n_steps=5, replay_buffer_kwargs=kwargs).learn(50)
    model = go_on(model, tmp_path) or model
    assert_no_return_crosses_a_reset(model, 5)


def test_training_that_goes_on_does_not_end_it():
    model = make(n_steps=5).learn(50)
    for _ in range(3):
        model.learn(10, reset_num_timesteps=False)
    assert not model.replay_buffer.dones.any()
    assert not model.replay_buffer.timeouts.any()


def test_where_the_buffer_begins_again():
    """The newest transition stands at the end of a ring."""
    model = make(n_steps=5, buffer_size=50).learn(50)
    assert model.replay_buffer.pos == 0
    model.learn(20)
    assert_no_return_crosses_a_reset(model, 5)


def test_memory_efficient_buffers_have_no_next_observation_there(recwarn):
    """Where the next row is to hold it: the last transition counts as terminal, whoever resets."""
    kwargs = {"handle_timeout_termination": False}
    model = make(optimize_memory_usage=True, replay_buffer_kwargs=kwargs).learn(50)
    model.set_env(model.get_env())
    model.learn(20, reset_num_timesteps=False)
    assert model.replay_buffer.dones[49] == 1


@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize("strategy", ["future", "final", "episode"])
def test_goals_of_her_come_from_the_same_episode(recwarn, n_envs, strategy):
    kwargs = {"n_sampled_goal": 4, "goal_selection_strategy": strategy}
    model = make(n_envs=n_envs, goals=True, replay_buffer_class=HerReplayBuffer, replay_buffer_kwargs=kwargs)
    for _ in range(3):
        model.learn(40)
    in_another_environment(model, None)
    model.learn(40)
    data = model.replay_buffer.sample(2000)
    assert (data.observations["desired_goal"] == data.observations["observation"]).all()
    assert len(data.observations["observation"].unique()) >= 4
    assert not [warning for warning in recwarn if "truncated" in str(warning.message)]


def test_an_episode_that_had_ended_stays_terminal():
    class Terminates(Counting):
        def step(self, action):
            return (*super().step(action)[:2], True, False, {})

    model = make(env=make_vec_env(lambda: Terminates(spaces.Box(-1.0, 1.0, (1,)), goals=False))).learn(20)
    model.learn(20)
    assert model.replay_buffer.dones[:40].all()
    assert not model.replay_buffer.timeouts.any()


def test_goals_are_rewarded_by_the_environment_of_now():
    model = SoftQ("MultiInputPolicy", BitFlippingEnv(3, continuous=True), replay_buffer_class=HerReplayBuffer, device="cpu")
    other = make_vec_env(lambda: BitFlippingEnv(3, continuous=True), n_envs=1)
    model.set_env(other)
    assert model.replay_buffer.env is model.get_env() is other


def test_a_loaded_buffer_returns_over_the_steps_of_the_agent(tmp_path):
    model = small(env=Counting(spaces.Box(-1, 1, (1,)), goals=False), n_steps=3, gamma=0.9).learn(30)
    model.save(tmp_path / "agent")
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    loaded = SoftQ.load(tmp_path / "agent", env=model.get_env(), n_steps=2, gamma=0.5)
    loaded.load_replay_buffer(tmp_path / "buffer.pkl")
    assert loaded.replay_buffer.size() == 30
    assert set(loaded._sample(200).discounts.unique().tolist()) <= {0.5, 0.25}
    one = SoftQ.load(tmp_path / "agent", env=model.get_env(), n_steps=1)
    own = one.replay_buffer
    with pytest.raises(ValueError, match="replay buffer of n_steps=3 is not allowed for an agent of n_steps=1"):
        one.load_replay_buffer(tmp_path / "buffer.pkl")
    assert one.replay_buffer is own
    one.learn(20, reset_num_timesteps=False).save_replay_buffer(tmp_path / "of_one.pkl")
    with pytest.raises(ValueError, match="replay buffer of n_steps=1 is not allowed for an agent of n_steps=2"):
        loaded.load_replay_buffer(tmp_path / "of_one.pkl")
    assert loaded.replay_buffer.size() == 30


def test_an_agent_of_whole_episodes_acts_in_several_environments(tmp_path):
    small(env="Pendulum-v1", train_freq=(1, "episode")).save(tmp_path / "agent")
    envs = make_vec_env("Pendulum-v1", n_envs=2)
    model = SoftQ.load(tmp_path / "agent", env=envs)
    assert model.predict(envs.reset())[0].shape == (2, 1)
    with pytest.raises(ValueError, match=r"train_freq=.* in steps where there are several environments \(n_envs=2\)"):
        model.learn(10)
