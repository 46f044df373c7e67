"""SoftQ trains with every space, wrapper and way of collecting that Stable-Baselines3 offers an off-policy algorithm."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise, VectorizedActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_softq import SoftQ
from sb3_softq.data import from_agent
from tests.conftest import RandomEnv, check_training, small


@pytest.mark.parametrize("train_freq", [5, (5, "step"), (1, "episode")])
def test_as_many_updates_as_train_freq_asks_for(train_freq):
    env = gym.wrappers.TimeLimit(gym.make("Pendulum-v1"), 10)
    model = small(env=env, train_freq=train_freq, gradient_steps=2, learning_starts=0)
    check_training(model, 40)
    assert model._n_updates == (4 if train_freq == (1, "episode") else 8) * 2


@pytest.mark.parametrize("n_envs", [1, 3])
def test_several_environments(n_envs):
    env = make_vec_env(lambda: gym.wrappers.TimeLimit(gym.make("Pendulum-v1"), 10), n_envs)
    noise = NormalActionNoise(np.zeros(1), 0.1 * np.ones(1))
    model = small(env=env, train_freq=4, gradient_steps=-1, learning_starts=0, action_noise=noise)
    # as many updates as transitions
    check_training(model, 8 * n_envs)
    assert model._n_updates == 8 * n_envs
    assert isinstance(model.action_noise, VectorizedActionNoise) == (n_envs > 1)


@pytest.mark.parametrize("noise_class", [NormalActionNoise, OrnsteinUhlenbeckActionNoise])
def test_noise_changes_actions_that_stay_in_the_box(noise_class):
    quiet, noisy = small(learning_starts=0), small(learning_starts=0, action_noise=noise_class(np.zeros(1), 0.5 * np.ones(1)))
    for model in (quiet, noisy):
        check_training(model, 20)
        assert np.abs(model.replay_buffer.actions).max() <= 1.0
    assert not np.array_equal(quiet.replay_buffer.actions, noisy.replay_buffer.actions)


def test_a_memory_efficient_buffer_is_filled():
    model = small(optimize_memory_usage=True, replay_buffer_kwargs={"handle_timeout_termination": False}, buffer_size=16)
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
    model = small(env=env)
    check_training(model)
    obs = np.random.default_rng(0).uniform(-1, 1, (50, 3)).astype(np.float32)
    actions, _ = model.predict(obs, deterministic=deterministic)
    assert actions.shape == (50, *action_space.shape)
    assert all(action_space.contains(action) for action in actions)
    single, _ = model.predict(obs[0], deterministic=deterministic)
    assert action_space.contains(single)
    assert np.abs(model.replay_buffer.actions).max() <= 1.0


@pytest.mark.parametrize("env_id", ["Hopper-v5", "Reacher-v5"])
def test_mujoco_environments(env_id):
    model = small(env=env_id)
    check_training(model)
    assert model.policy.observation_space == gym.make(env_id).observation_space


@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize("image_obs_space", [True, False])
def test_her(n_envs, image_obs_space):
    env = make_vec_env(lambda: BitFlippingEnv(n_bits=3, continuous=True, image_obs_space=image_obs_space), n_envs)
    model = small(
        SoftQ,
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


def test_vec_normalize():
    env = VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")]), clip_obs=5.0)
    model = small(env=env)
    check_training(model, 40)
    assert model.get_vec_normalize_env() is env
    # what is replayed is normalised with the current statistics, what is stored is not
    stored = model.replay_buffer.observations[:40, 0]
    assert np.abs(stored - env.normalize_obs(stored)).max() > 0.5
    for share in (0.0, 0.5):
        # with logged data too
        model.set_data(from_agent(model), share)
        data = model._sample(64)
        for name in ("observations", "next_observations"):
            expected = env.normalize_obs(getattr(model.replay_buffer, name)[:40, 0])
            distances = np.abs(expected - getattr(data, name).numpy()[:, None]).max(axis=2).min(axis=1)
            np.testing.assert_allclose(distances, 0.0, atol=1e-5)


def test_total_timesteps_may_be_a_float():
    model = small().learn(2e1)
    assert model.num_timesteps == 20
