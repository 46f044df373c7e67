"""Files of arrays and JSON: what comes back is what was saved, in no more room than it takes."""

import tempfile
from pathlib import Path

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
from sb3_softq.checkpointing.segments import load_segments, remember, save_segments
from sb3_softq.serialization.files import (
    load_buffer,
    load_episodes,
    load_random_state,
    load_vec_normalize,
    save_buffer,
    save_episodes,
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


def test_no_pickle_in_a_checkpoint(tmp_path):
    env = VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")]))
    small(env=env, buffer_size=500, learning_starts=20).learn(40, callback=ResumableCheckpoint(100, tmp_path))
    folder = latest(tmp_path)
    assert folder is not None
    names = {
        "environments.npz",
        "manifest.json",
        "model.safetensors",
        "random.json",
        "replay_buffer.npz",
        "vec_normalize.json",
    }
    assert {file.name for file in folder.iterdir()} == names


def her_agent(**kwargs):
    env = BitFlippingEnv(n_bits=4, continuous=True, max_steps=5)
    settings = dict(policy_kwargs=dict(net_arch=[8]), learning_starts=20, batch_size=8, buffer_size=40)
    return SoftQ("MultiInputPolicy", env, replay_buffer_class=HerReplayBuffer, replay_buffer_kwargs=kwargs, **settings)


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(n_rows=st.integers(6, 95), more=st.integers(0, 60))
def test_the_episodes_of_her_come_back(tmp_path, n_rows, more):
    """Half full and gone round, in the middle of episodes, which are deleted as a whole where they are written over."""

    def add(buffer, n, seed):
        rng = np.random.default_rng(seed)
        for _ in range(n):
            obs, next_obs = (some(buffer.observation_space, rng, 1) for _ in range(2))
            buffer.add(obs, next_obs, rng.normal(size=(1, 4)), rng.normal(size=1), rng.random(1) < 0.2, [{}])

    old, new = (her_agent().replay_buffer for _ in range(2))
    folders = [Path(tempfile.mkdtemp(dir=tmp_path)) for _ in range(2)]
    add(old, n_rows, 0)
    saved, _ = save_segments(old, folders[0], None, n_rows)
    remember(old, folders[0], saved)
    # the second holds what was gained alone, and the first by links
    add(old, more, 1)
    save_segments(old, folders[1], folders[0], n_rows + more)
    load_segments(new, folders[1], n_rows + more)
    for buffer in (old, new):
        add(buffer, 7, 2)
    assert (new.pos, new.full) == (old.pos, old.full)
    for name in ("ep_start", "ep_length", "_current_ep_start"):
        np.testing.assert_array_equal(getattr(new, name), getattr(old, name))
    if (old.ep_length > 0).any():
        for a, b in zip(drawn(old), drawn(new), strict=True):
            assert th.equal(a, b)


def test_episodes_that_do_not_fit(tmp_path):
    buffer = her_agent().replay_buffer
    buffer.ep_length[3] = 10**6
    save_episodes(buffer, tmp_path / "episodes.npz")
    with pytest.raises(ValueError, match=r"ep_length of shape .* does not fit"):
        load_episodes(her_agent().replay_buffer, tmp_path / "episodes.npz")


@pytest.mark.parametrize("copy_info_dict", [False, True])
def test_a_run_with_her_goes_on(tmp_path, copy_info_dict):
    """Info dicts of an environment are anything: that buffer is pickled."""
    model = her_agent(copy_info_dict=copy_info_dict)
    model.learn(53, callback=ResumableCheckpoint(20, tmp_path))
    assert (latest(tmp_path) / "replay_buffer.pkl").exists() == copy_info_dict
    resumed = resume(SoftQ, tmp_path, model.get_env().envs[0])
    assert isinstance(resumed.replay_buffer, HerReplayBuffer)
    assert resumed.replay_buffer.size() == 40
    assert bool(resumed.replay_buffer.infos[5][0]) == copy_info_dict
    resumed.learn(20, reset_num_timesteps=False)
