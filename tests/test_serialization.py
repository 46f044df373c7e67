"""Agents as tensors and JSON: what comes back is what was saved, and nothing of a stranger's file runs."""

import json
from collections import defaultdict
from pathlib import Path

import gymnasium as gym
import numpy as np
import psutil
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.envs import BitFlippingEnv, SimpleMultiObsEnv
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise, VectorizedActionNoise
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.her import GoalSelectionStrategy
from torch import nn

from sb3_softq import DiscreteSoftQ, SoftQ
from sb3_softq.checkpoint import ResumableCheckpoint, latest, resume
from sb3_softq.composition import ComposedSoftQ, compose
from sb3_softq.policies import SoftQPolicy
from sb3_softq.serialization.objects import KnownObjects
from sb3_softq.serialization.values import OpaqueError, decode, encode
from tests.conftest import assert_same, flat, small

HER = dict(
    replay_buffer_class=HerReplayBuffer,
    replay_buffer_kwargs=dict(goal_selection_strategy=GoalSelectionStrategy.FINAL, n_sampled_goal=2),
    learning_starts=20,
)
NOISE = NormalActionNoise(np.zeros(1), 0.1 * np.ones(1))


def multi_obs():
    return SimpleMultiObsEnv(discrete_actions=False)


AGENTS = {
    "default": dict(),
    "a fixed temperature": dict(ent_coef=0.3, annealing=3.0),
    "schedules": dict(learning_rate=LinearSchedule(1e-3, 1e-4, 0.5), ent_coef=LinearSchedule(1.0, 0.1, 1.0)),
    "other layers": dict(policy_kwargs=dict(activation_fn=nn.Tanh, optimizer_class=th.optim.AdamW, net_arch=[8])),
    "target networks": dict(tau=0.005, policy_kwargs=dict(batch_norm=False, net_arch=[8])),
    "noise": dict(action_noise=NOISE),
    "noise with a memory": dict(action_noise=OrnsteinUhlenbeckActionNoise(np.zeros(1), 0.1 * np.ones(1))),
    "noise of several": dict(action_noise=VectorizedActionNoise(NOISE, 1)),
    "episodes": dict(train_freq=(1, "episode"), gradient_steps=-1),
    "n-step": dict(n_steps=3),
    "a folder": dict(tensorboard_log=Path("logs")),
    "dict": dict(policy="MultiInputPolicy", env=multi_obs, policy_kwargs=dict(net_arch=[8])),
    "HER": dict(policy="MultiInputPolicy", env=lambda: BitFlippingEnv(4, continuous=True, max_steps=5), **HER),
}


def agent(env=lambda: gym.make("Pendulum-v1"), steps=40, **kwargs):
    if "policy" not in kwargs:
        kwargs["policy"] = "MlpPolicy"
    return small(env=env(), **kwargs).learn(steps)


def discrete():
    return DiscreteSoftQ("MlpPolicy", "CartPole-v1", policy_kwargs=dict(net_arch=[8]), buffer_size=500).learn(150)


# Made anew by what loads an agent, whatever the file is
MADE_ANEW = {"env", "replay_buffer", "policy", "actor", "critic", "critic_target", "device", "ent_coef_optimizer", "q_net"}
MADE_ANEW |= {
    "_logger",
    "_custom_logger",
    "_is_loaded",
    "_stored",
    "_vec_normalize_env",
    "_keeps_action_noise",
    "tensorboard_log",
}


@pytest.mark.parametrize("name", AGENTS)
def test_the_same_agent(tmp_path, monkeypatch, name):
    """All attributes, weights and moments of the optimizers; and what it learns from there is what a zip's would."""
    monkeypatch.chdir(tmp_path)
    model = agent(**AGENTS[name])
    for path in ("model.zip", "model.safetensors"):
        model.save(path)
    plain, zipped = (SoftQ.load(path, env=model.get_env(), device="cpu") for path in ("model.safetensors", "model.zip"))
    assert_same(plain.get_parameters(), model.get_parameters())
    assert_same(plain.log_ent_coef, model.log_ent_coef)
    assert vars(plain).keys() == vars(zipped).keys()
    for key in vars(zipped).keys() - MADE_ANEW:
        assert_same(getattr(plain, key), getattr(zipped, key))
    weights = []
    for loaded in (plain, zipped):
        loaded.set_random_seed(0)
        # whose buffer is empty
        loaded.learning_starts = 60
        loaded.learn(40, reset_num_timesteps=False)
        weights.append(flat(loaded.policy))
    assert th.equal(*weights)


def test_other_algorithms(tmp_path):
    path = tmp_path / "model.safetensors"
    model = discrete()
    model.save(path)
    loaded = DiscreteSoftQ.load(path)
    assert_same(loaded.get_parameters(), model.get_parameters())
    with pytest.raises(ValueError, match=r"model.safetensors holds a DiscreteSoftQ, not a SoftQ"):
        SoftQ.load(path)
    both = compose([agent(ent_coef=0.3), agent(ent_coef=0.3, seed=1)], gradient_steps=2)
    both.save(path)
    loaded = ComposedSoftQ.load(path)
    assert_same(loaded.get_parameters(), both.get_parameters())
    obs = both.observation_space.sample()
    np.testing.assert_array_equal(loaded.predict(obs, deterministic=True)[0], both.predict(obs, deterministic=True)[0])


def test_strings_and_the_name_of_a_folder_that_is_not_there(tmp_path):
    model = agent()
    model.save(str(tmp_path / "new" / "model.safetensors"))
    assert_same(SoftQ.load(str(tmp_path / "new" / "model.safetensors")).get_parameters(), model.get_parameters())
    # trusted or not, nothing in it runs
    SoftQ.load(tmp_path / "new" / "model.safetensors", trusted=False)


def test_parameters_for_another_agent(tmp_path):
    model, other = agent(), agent(seed=1)
    model.save(tmp_path / "model.safetensors")
    other.set_parameters(tmp_path / "model.safetensors")
    assert_same(other.get_parameters(), model.get_parameters())
    with pytest.raises(ValueError, match="with a fixed temperature"):
        agent(ent_coef=0.2).set_parameters(tmp_path / "model.safetensors")


def test_weights_have_their_names(tmp_path):
    model = agent()
    model.save(tmp_path / "model.safetensors")
    tensors = load_file(tmp_path / "model.safetensors")
    for name, weight in model.policy.state_dict().items():
        np.testing.assert_array_equal(tensors[f"policy/{name}"], weight.numpy())


def test_what_a_file_cannot_hold_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    model = agent(learning_rate=lambda progress: 1e-3 * progress)
    with pytest.raises(ValueError, match=r"learning_rate is <function .* exclude=\['learning_rate'\]"):
        model.save(path)
    assert not path.exists()
    model.save(path, exclude=["learning_rate"])
    loaded = SoftQ.load(path, custom_objects={"learning_rate": model.learning_rate})
    assert loaded.learning_rate(0.5) == 5e-4
    assert_same(loaded.get_parameters(), model.get_parameters())

    class OwnPolicy(SoftQPolicy):
        pass

    with pytest.raises(ValueError, match=r"policy_class is <class .*OwnPolicy"):
        agent(policy=OwnPolicy).save(path)

    class Layer(nn.ReLU):
        pass

    with pytest.raises(ValueError, match=r"policy_kwargs\['activation_fn'\] is <class .*Layer.* exclude=\['policy_kwargs'\]"):
        agent(policy_kwargs=dict(activation_fn=Layer, net_arch=[8])).save(path)


# ------------------------------------------------------------------ checkpoints


def test_a_checkpoint_of_a_users_function_is_pickled(tmp_path):
    kwargs = dict(buffer_size=500, learning_starts=20)
    model = small(learning_rate=lambda progress: 1e-3 * progress, **kwargs).learn(40, ResumableCheckpoint(100, tmp_path))
    assert (latest(tmp_path) / "model.zip").exists()
    assert not (latest(tmp_path) / "model.safetensors").exists()
    assert_same(resume(SoftQ, tmp_path, model.get_env()).get_parameters(), model.get_parameters())


def test_other_algorithms_are_zipped(tmp_path):
    model = SAC("MlpPolicy", "Pendulum-v1", policy_kwargs=dict(net_arch=[8]), buffer_size=500)
    model.learn(120, ResumableCheckpoint(100, tmp_path))
    assert (latest(tmp_path) / "model.zip").exists()
    assert resume(SAC, tmp_path, model.get_env()).num_timesteps == 120


# ------------------------------------------------------------------ strangers


def rewrite(path, change):
    """The same file with another header."""
    with safe_open(path, framework="numpy") as file:
        header = json.loads(file.metadata()["sb3_softq"])
    tensors = load_file(path)
    change(header, tensors)
    save_file(tensors, path, metadata={"sb3_softq": json.dumps(header)})


def set_data(name, value):
    return lambda header, tensors: header["data"].update({name: value})


HOSTILE = {
    "a class that is not known": (set_data("seed", {"object": ["class", "Popen"]}), "class 'Popen' is not known here"),
    "an object that is not known": (
        set_data("seed", {"object": ["instance", "PosixPath", {"dict": []}]}),
        "instance 'PosixPath' is not known here",
    ),
    "a layer as an object": (
        set_data("seed", {"object": ["instance", "Linear", {"dict": []}]}),
        "instance 'Linear' is not known here",
    ),
    "a kind that is not known": (set_data("seed", {"object": ["eval", "1"]}), "eval"),
    "a space that is not known": (set_data("seed", {"object": ["space", "Evil", {"dict": []}]}), "is not an agent"),
    "a value that is none": (set_data("seed", {"evil": 1}), "is not an agent"),
    "an array that is missing": (set_data("seed", {"array": "99"}), "is not an agent"),
    "a weight that is missing": (lambda header, tensors: tensors.pop("policy/actor.head.0.bias"), "is not an agent"),
    "no state": (lambda header, tensors: header.pop("params"), "is not an agent"),
    "a state of another kind": (lambda header, tensors: header.update(params=[1]), "is not an agent"),
    "a newer format": (lambda header, tensors: header.update(format=99), r"has format 99, .* does not know \(up to 1\)"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_not_known_is_refused(tmp_path, name):
    change, message = HOSTILE[name]
    path = tmp_path / "model.safetensors"
    agent().save(path)
    rewrite(path, change)
    with pytest.raises(ValueError, match=message):
        SoftQ.load(path)


LARGE = {
    "wide": {"net_arch": [10**6, 10**6]},
    "deep": {"net_arch": [1000] * 1000},
    "experts": {"net_arch": [8], "n_experts": 10**7},
    "bins": {"net_arch": [8], "n_bins": 10**9 + 1},
}


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("suffix", ["safetensors", "zip"])
def test_networks_larger_than_their_file_are_not_built(tmp_path, name, suffix):
    path = tmp_path / f"model.{suffix}"
    model = agent()
    model.policy_kwargs = LARGE[name]
    model.save(path)
    before = psutil.Process().memory_info().rss
    with pytest.raises(ValueError, match=r"asks for networks of [0-9,]+ numbers or more, but has [0-9,]+ bytes"):
        SoftQ.load(path, env=gym.make("Pendulum-v1"), trusted=False)
    assert psutil.Process().memory_info().rss < before + 300e6


def test_weights_of_another_shape(tmp_path):
    path = tmp_path / "model.safetensors"
    agent().save(path)
    rewrite(path, lambda header, tensors: tensors.update({"policy/actor.head.0.bias": np.zeros(3, np.float32)}))
    with pytest.raises(RuntimeError, match=r"size mismatch for actor.head.0.bias"):
        SoftQ.load(path)


def test_other_files(tmp_path):
    """Cut off at any place, of another program, or with tensors that would be larger than the file."""
    path = tmp_path / "model.safetensors"
    agent().save(path)
    content = path.read_bytes()
    for n in (0, 7, 8, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:n])
        with pytest.raises(ValueError, match="is not an agent that was saved here"):
            SoftQ.load(path)
    save_file({"weight": np.zeros(3)}, path)
    with pytest.raises(ValueError, match="is not an agent that was saved here"):
        SoftQ.load(path)
    header = json.dumps({"weight": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match="is not an agent that was saved here"):
        SoftQ.load(path)
    with pytest.raises(FileNotFoundError):
        SoftQ.load(tmp_path / "nowhere.safetensors")


# ------------------------------------------------------------------ objects


BOXES = st.builds(
    lambda low, width, shape, dtype: spaces.Box(low, low + width, shape, dtype),
    st.integers(-100, 100),
    st.integers(0, 100),
    st.lists(st.integers(1, 3), max_size=3).map(tuple),
    st.sampled_from([np.float32, np.float64, np.int32]),
)
INFINITE = st.just(spaces.Box(np.array([-np.inf, 0.0]), np.array([1.0, np.inf])))
DISCRETE = st.builds(lambda n, start: spaces.Discrete(n, start=start), st.integers(1, 9), st.integers(-3, 3))
MULTI = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(spaces.MultiDiscrete)
BINARY = st.one_of(st.integers(1, 5), st.lists(st.integers(1, 3), min_size=1, max_size=2)).map(spaces.MultiBinary)
LEAVES = st.one_of(BOXES, INFINITE, DISCRETE, MULTI, BINARY)
SPACES = st.recursive(
    LEAVES,
    lambda x: st.dictionaries(st.text(min_size=1, max_size=3), x, min_size=1, max_size=3).map(spaces.Dict),
    max_leaves=5,
)


def there_and_back(value):
    arrays: dict[str, np.ndarray] = {}
    objects = KnownObjects()
    plain = json.loads(json.dumps(encode(value, arrays, "value", objects)))
    return decode(plain, arrays, objects)


@settings(deadline=None)
@given(SPACES)
def test_spaces_come_back(space):
    found = there_and_back(space)
    assert found == space
    assert type(found) is type(space)
    assert found.dtype == space.dtype
    assert repr(found) == repr(space)
    if isinstance(space, spaces.Dict):
        assert list(found.spaces) == list(space.spaces)


@pytest.mark.parametrize("value", [nn.ReLU, th.optim.Adam, HerReplayBuffer, GoalSelectionStrategy.EPISODE, np.float32])
def test_classes_come_back(value):
    assert there_and_back(value) is value


def test_a_class_of_a_known_name_is_not_that_class():
    impostor = type("ReLU", (nn.Module,), {})
    for value in (impostor, impostor()):
        with pytest.raises(OpaqueError, match="ReLU"):
            there_and_back(value)


def test_agents_of_sb3_policies_are_not_instances():
    """A layer holds weights: it is no value of a few numbers."""
    with pytest.raises(OpaqueError, match="Linear"):
        there_and_back(nn.Linear(2, 2))


def test_dicts_and_arrays_of_other_classes_become_plain_ones(tmp_path):
    """As an agent's arguments: what a defaultdict lacks is not asked of it."""
    policy_kwargs = defaultdict(lambda: None, net_arch=[8])
    model = agent(policy_kwargs=policy_kwargs)
    model.masks = np.ma.masked_array([1.0, 2.0])
    model.save(tmp_path / "agent.safetensors")
    loaded = SoftQ.load(tmp_path / "agent.safetensors")
    assert loaded.policy_kwargs == {"net_arch": [8]}
    assert type(loaded.masks) is np.ndarray
