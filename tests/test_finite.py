"""What environments return is checked as they return it, and the place of what is not finite is named."""

import re

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    VecEnvWrapper,
    VecNormalize,
)

from sb3_softq import DiscreteSoftQ, SoftQ
from sb3_softq.finite import check_finite
from tests.conftest import OneStep, tiny

NAN, INF = float("nan"), float("inf")
BOX = spaces.Box(-np.inf, np.inf, (2,), dtype=np.float32)


class Returns(gym.Env):
    """Episodes of three steps that return what they are told to."""

    def __init__(self, observation_space, observation, reward=1.0, action_space=None):
        self.observation_space = observation_space
        self.action_space = action_space or spaces.Box(-1.0, 1.0, (1,))
        self.observation, self.reward = observation, reward

    def reset(self, *, seed=None, options=None):
        self.t = 0
        return self.observation_space.sample() * 0 if isinstance(self.observation_space, spaces.Box) else self.observation, {}

    def step(self, action):
        self.t += 1
        return self.observation, self.reward, False, self.t == 3, {}


def make(env, algorithm=SoftQ):
    policy = "MultiInputPolicy" if isinstance(env.observation_space, spaces.Dict) else "MlpPolicy"
    return tiny(env, algorithm, policy=policy)


@pytest.mark.parametrize("algorithm", [SoftQ, DiscreteSoftQ])
@pytest.mark.parametrize(
    ("space", "observation"),
    [
        (spaces.Discrete(3), 2),
        (spaces.Discrete(3), np.int64(2)),
        (spaces.Discrete(3), th.tensor(1)),
        (BOX, [0.5, 1.5]),
        (BOX, (1, 2)),
        (BOX, th.tensor([0.5, 1.5])),
        (BOX, np.array([0.5, 1.5], dtype=object)),
        (spaces.MultiDiscrete([2, 3]), [1, 2]),
        (spaces.MultiBinary(2), [True, False]),
        (spaces.Dict(a=spaces.Discrete(2), b=BOX), {"a": 1, "b": [0.0, 1.0]}),
        (spaces.Dict(a=BOX), {"a": np.ones(2), "unknown to the space": NAN, "text": "abc", "nested": {"x": [NAN]}}),
        (spaces.Dict(a=BOX), {"unknown to the space": None, "a": th.ones(2)}),
    ],
)
def test_whatever_an_environment_returns(algorithm, space, observation):
    env = Returns(space, observation, action_space=spaces.Discrete(2) if algorithm is DiscreteSoftQ else None)
    assert make(env, algorithm).learn(20)._n_updates > 0


def test_frozen_lake():
    assert make(gym.make("FrozenLake-v1"), DiscreteSoftQ).learn(200)._n_updates > 0


class Lists(VecEnvWrapper):
    """A vectorized environment that returns rewards and ends as lists."""

    def reset(self):
        return self.venv.reset()

    def step_wait(self):
        obs, rewards, dones, infos = self.venv.step_wait()
        return obs, rewards.tolist(), dones, tuple(infos)


@pytest.mark.parametrize("n_envs", [1, 2])
def test_rewards_in_a_list(n_envs):
    env = Lists(DummyVecEnv([lambda: Returns(BOX, [0.0, 1.0])] * n_envs))
    assert make(env).learn(20)._n_updates > 0
    broken = Lists(DummyVecEnv([lambda: Returns(BOX, [0.0, 1.0])] * (n_envs - 1) + [lambda: Returns(BOX, [0.0, 1.0], INF)]))
    with pytest.raises(ValueError, match=rf"reward of environment {n_envs - 1} is not finite at step {n_envs}: inf"):
        make(broken).learn(20)


@pytest.mark.parametrize(
    ("space", "observation", "name"),
    [
        (BOX, [0.0, NAN], "observation"),
        (BOX, th.tensor([INF, 0.0]), "observation"),
        (spaces.Dict(a=spaces.Discrete(2), b=BOX), {"a": 1, "b": [0.0, -INF]}, "observation 'b'"),
    ],
)
def test_what_is_not_finite_is_named(space, observation, name):
    class Later(Returns):
        def reset(self, **kwargs):
            super().reset(**kwargs)
            return {"a": 0, "b": np.zeros(2)} if isinstance(space, spaces.Dict) else np.zeros(2), {}

    with pytest.raises(ValueError, match=rf"^{re.escape(name)} of environment 0 is not finite at step 1: "):
        make(Later(space, observation)).learn(20)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("reward", [1.0, 1e300])
def test_an_observation_that_overflows_is_named(dtype, reward):
    """In the cast to single precision, of the buffer or of the network; the reward may have been computed from it."""
    space = spaces.Box(-np.inf, np.inf, (2,), dtype=dtype)

    class Overflows(Returns):
        def reset(self, **kwargs):
            super().reset(**kwargs)
            return np.zeros(2), {}

    with np.errstate(over="ignore"), pytest.raises(ValueError, match=r"^observation of environment 0 is not finite"):
        make(Overflows(space, np.array([0.0, 1e39]), reward)).learn(20)


def test_the_precision_is_named_where_it_is_the_cause():
    with pytest.raises(ValueError, match=r"x of environment 1 is not finite in single precision at step 3: 1e\+39\. Training"):
        check_finite("x", np.array([1.0, 1e39]), 3)


values = st.recursive(
    st.one_of(
        st.booleans(),
        st.integers(),
        st.text(max_size=3),
        st.binary(max_size=3),
        st.floats(-1e30, 1e30),
        st.floats(-1e30, 1e30).map(th.tensor),
        st.floats(-1e4, 1e4).map(np.float16),
        st.just(np.datetime64("2020-01-01")),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=2), inner, max_size=3)),
    max_leaves=6,
)


@given(values)
def test_what_holds_no_infinite_number_passes(value):
    check_finite("value", value, 0, 0)


@given(st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=4), st.sampled_from([NAN, INF, -INF, 1e39]), st.data())
def test_what_is_infinite_never_passes(numbers, bad, data):
    place = data.draw(st.integers(0, len(numbers) - 1))
    numbers[place] = bad
    wrap = data.draw(st.sampled_from([list, tuple, np.array, th.tensor, lambda x: np.array(x, dtype=object)]))
    with pytest.raises(ValueError, match=f"value of environment {place} is not finite"):
        check_finite("value", wrap(numbers), 0)
    with pytest.raises(ValueError, match="value 'key' of environment 7 is not finite"):
        check_finite("value", {"key": wrap(numbers)}, 0, 7)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize(("name", "what", "step"), [("reward", "reward", 2), ("observation", "first observation", 0)])
def test_data_that_is_no_number_stops_training(name, what, step, value):
    model = tiny(make_vec_env(lambda: OneStep(**{name: value}), 2), learning_starts=0)
    with pytest.raises(
        ValueError, match=rf"{what} of environment 0 is not finite at step {step}: .*{value}.*Training stopped"
    ):
        model.learn(20)
    # and leaves no trace
    assert model.replay_buffer.size() == 0
    assert all(th.isfinite(tensor).all() for tensor in model.policy.state_dict().values())


@pytest.mark.parametrize(("terminated", "what"), [(True, "last observation"), (False, "observation")])
@pytest.mark.parametrize("n_envs", [1, 2])
def test_observations_of_steps_are_checked(n_envs, terminated, what):
    """At the end of an episode SB3 hands on the first observation of the next one, and stores the last one of this."""

    class Breaks(OneStep):
        def step(self, action):
            return np.array([NAN], dtype=np.float32), self.reward, terminated, False, {}

    model = tiny(make_vec_env(Breaks, n_envs), learning_starts=0)
    with pytest.raises(ValueError, match=rf"^{what} of environment 0 is not finite at step {n_envs}: \[nan\]"):
        model.learn(20)
    assert model.replay_buffer.size() == 0


def test_data_is_checked_before_it_is_normalised():
    env = VecNormalize(make_vec_env(lambda: OneStep(reward=INF)))
    with pytest.raises(ValueError, match="reward of environment 0 is not finite"):
        tiny(env).learn(20)


def test_diverged_training_stops():
    with pytest.raises(ValueError, match="Lower learning rates"):
        tiny(learning_rate=1e30).learn(20)


def paid(algorithm, reward):
    return make(Returns(BOX, [0.0, 1.0], reward, spaces.Discrete(2) if algorithm is DiscreteSoftQ else None), algorithm)


@pytest.mark.parametrize("algorithm", [SoftQ, DiscreteSoftQ])
@pytest.mark.parametrize("reward", [3e38, -3e38, 1e37])
def test_rewards_whose_values_would_be_infinite_are_named(algorithm, reward):
    with pytest.raises(ValueError, match=r"^scale of the discounted returns became .* at step \d+, too large for single"):
        paid(algorithm, reward).learn(500)


@pytest.mark.parametrize("algorithm", [SoftQ, DiscreteSoftQ])
@pytest.mark.parametrize("reward", [1e33, -1e33])
def test_rewards_of_any_size_below_are_learned_from(algorithm, reward):
    model = paid(algorithm, reward).learn(500)
    assert model._n_updates > 400
    assert all(th.isfinite(tensor).all() for tensor in model.policy.state_dict().values())


def test_parameters_are_finite_after_the_last_update():
    model = tiny()

    class Break(BaseCallback):
        def _on_step(self):
            with th.no_grad():
                model.critic.q_networks[1][1].weight[0, 0] = INF
            return True

    # too late for a loss to show it
    with pytest.raises(ValueError, match=r"parameter critic.layers.0.weight is not finite at step 3: training stopped"):
        model.learn(3, Break())
