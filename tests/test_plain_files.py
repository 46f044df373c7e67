"""Files of arrays and JSON: what comes back is what was saved, in no more room than it takes."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.envs import BitFlippingEnv, SimpleMultiObsEnv
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_softq import SoftQ
from sb3_softq.checkpoint import ResumableCheckpoint, latest, resume
from sb3_softq.plain_files import (
    load_buffer,
    load_random_state,
    load_vec_normalize,
    save_buffer,
    save_random_state,
    save_vec_normalize,
    set_random_state,
)
from tests.conftest import small

BOX = spaces.Box(-1, 1, (3,), dtype=np.float32)
KINDS = {
    "plain": (ReplayBuffer, BOX, {}),
    "memory efficient": (ReplayBuffer, BOX, {"optimize_memory_usage": True, "handle_timeout_termination": False}),
    "n-step": (NStepReplayBuffer, BOX, {"n_steps": 3}),
    "images": (ReplayBuffer, spaces.Box(0, 255, (1, 4, 4), dtype=np.uint8), {}),
    "dict": (DictReplayBuffer, spaces.Dict({"a/b": BOX, "place": spaces.Discrete(4)}), {}),
}


def buffer_of(kind, buffer_size=12, n_envs=2):
    cls, space, kwargs = KINDS[kind]
    return cls(buffer_size, space, BOX, n_envs=n_envs, **kwargs)


def some(space, rng, n):
    if isinstance(space, spaces.Dict):
        return {key: some(value, rng, n) for key, value in space.spaces.items()}
    space.seed(int(rng.integers(2**31)))
    return np.stack([space.sample() for _ in range(n)]).reshape(n, *space.shape)


def fill(buffer, n_rows, rng):
    for _ in range(n_rows):
        obs, next_obs = (some(buffer.observation_space, rng, buffer.n_envs) for _ in range(2))
        actions, rewards = rng.normal(size=(buffer.n_envs, 3)), rng.normal(size=buffer.n_envs)
        buffer.add(obs, next_obs, actions, rewards, rng.random(buffer.n_envs) < 0.3, [{}] * buffer.n_envs)


def drawn(buffer):
    np.random.seed(0)
    batch = buffer.sample(40)
    return [x for value in batch if value is not None for x in (value.values() if isinstance(value, dict) else [value])]


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(list(KINDS)), n_rows=st.integers(2, 30), n_envs=st.integers(1, 3), seed=st.integers(0, 99))
def test_buffers_come_back(tmp_path, kind, n_rows, n_envs, seed):
    """Half full, just full and gone round; and what is added next goes to the same place."""
    rng = np.random.default_rng(seed)
    old, new = buffer_of(kind, n_envs=n_envs), buffer_of(kind, n_envs=n_envs)
    fill(old, n_rows, rng)
    path = tmp_path / "buffer.npz"
    save_buffer(old, path)
    load_buffer(new, path)
    assert (new.pos, new.full, new.size()) == (old.pos, old.full, old.size())
    for a, b in zip(drawn(old), drawn(new), strict=True):
        assert th.equal(a, b)
    for buffer in (old, new):
        fill(buffer, 3, np.random.default_rng(seed + 1))
    for a, b in zip(drawn(old), drawn(new), strict=True):
        assert th.equal(a, b)


def test_room_for_what_is_in_it(tmp_path):
    sizes = []
    for n_rows in (10, 1000):
        buffer = buffer_of("plain", buffer_size=100_000, n_envs=1)
        fill(buffer, n_rows, np.random.default_rng(0))
        save_buffer(buffer, tmp_path / "buffer.npz")
        sizes.append((tmp_path / "buffer.npz").stat().st_size)
    # 3 + 3 + 3 + 1 + 1 + 1 numbers in a row
    assert sizes[0] < 4_000
    assert sizes[1] == pytest.approx(1_001 * 48, rel=0.1)


@pytest.mark.parametrize(
    ("kind", "kwargs"), [("plain", {"buffer_size": 5}), ("plain", {"n_envs": 3}), ("images", {}), ("dict", {})]
)
def test_a_buffer_that_does_not_fit(tmp_path, kind, kwargs):
    buffer = buffer_of("plain")
    fill(buffer, 8, np.random.default_rng(0))
    save_buffer(buffer, tmp_path / "buffer.npz")
    with pytest.raises(ValueError, match=r"observations of shape .* do not fit|not \['observations/a/b'"):
        load_buffer(buffer_of(kind, **kwargs), tmp_path / "buffer.npz")


def test_a_larger_buffer_goes_on(tmp_path):
    """Unless the old one had gone round."""
    for n_rows in (4, 8):
        buffer, larger = buffer_of("plain"), buffer_of("plain", buffer_size=20)
        fill(buffer, n_rows, np.random.default_rng(0))
        save_buffer(buffer, tmp_path / "buffer.npz")
        if n_rows == 4:
            load_buffer(larger, tmp_path / "buffer.npz")
            assert larger.size() == 4
        else:
            with pytest.raises(ValueError, match="do not fit"):
                load_buffer(larger, tmp_path / "buffer.npz")


def test_statistics_come_back(tmp_path):
    for kwargs, make in (
        (dict(clip_obs=3.0, gamma=0.9), lambda: gym.make("Pendulum-v1")),
        (dict(norm_obs=False), lambda: gym.make("Pendulum-v1")),
        (dict(norm_obs_keys=["vec"]), lambda: SimpleMultiObsEnv(discrete_actions=False)),
    ):
        env = VecNormalize(DummyVecEnv([make]), **kwargs)
        env.reset()
        for _ in range(20):
            env.step(np.array([env.action_space.sample()]))
        save_vec_normalize(env, tmp_path / "statistics.json")
        new = load_vec_normalize(tmp_path / "statistics.json", DummyVecEnv([make]))
        for name, value in kwargs.items():
            assert getattr(new, name) == value
        raw = env.get_original_obs()
        expected, found = env.normalize_obs(raw), new.normalize_obs(raw)
        for key in raw if isinstance(raw, dict) else [...]:
            np.testing.assert_array_equal(found[key], expected[key])
        np.testing.assert_array_equal(new.normalize_reward(np.ones(1)), env.normalize_reward(np.ones(1)))


def test_random_states_come_back(tmp_path):
    model = small()
    model.action_space.sample()
    np.random.randn()
    save_random_state(model, tmp_path / "random.json")
    expected = np.random.rand(3), np.random.randn(), th.rand(3), model.action_space.sample()
    set_random_state(model, load_random_state(tmp_path / "random.json"))
    for a, b in zip(expected, (np.random.rand(3), np.random.randn(), th.rand(3), model.action_space.sample()), strict=True):
        np.testing.assert_array_equal(a, b)


def test_no_pickle_beside_the_model(tmp_path):
    env = VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")]))
    small(env=env, buffer_size=500, learning_starts=20).learn(40, callback=ResumableCheckpoint(100, tmp_path))
    folder = latest(tmp_path)
    assert folder is not None
    names = {"environments.npz", "manifest.json", "model.zip", "random.json", "replay_buffer.npz", "vec_normalize.json"}
    assert {file.name for file in folder.iterdir()} == names


def test_the_buffer_of_her_is_pickled_as_before(tmp_path):
    env = BitFlippingEnv(n_bits=4, continuous=True, max_steps=5)
    kwargs = dict(replay_buffer_class=HerReplayBuffer, buffer_size=500, learning_starts=20, batch_size=8)
    model = SoftQ("MultiInputPolicy", env, policy_kwargs=dict(net_arch=[8]), **kwargs)
    model.learn(50, callback=ResumableCheckpoint(100, tmp_path))
    resumed = resume(SoftQ, tmp_path, env)
    assert isinstance(resumed.replay_buffer, HerReplayBuffer)
    assert resumed.replay_buffer.size() == 50
    resumed.learn(20, reset_num_timesteps=False)
