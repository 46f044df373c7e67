"""A saved agent comes back whole: the same actions, and the same training from there on."""

import copy
import io
import os
import subprocess
import sys
from typing import Any

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv, FakeImageEnv, SimpleMultiObsEnv
from stable_baselines3.common.logger import configure
from stable_baselines3.common.utils import LinearSchedule, set_random_seed
from stable_baselines3.common.vec_env import VecNormalize

from sb3_softq import DiscreteSoftQ, SoftQ
from sb3_softq.policies import SamplingActor, SoftQPolicy
from tests.conftest import assert_same, small

VARIANTS: dict[str, Any] = {
    "default": {},
    "fixed_temperature": {"ent_coef": 0.2, "annealing": LinearSchedule(5.0, 1.0, 0.5)},
    "local_smoothing": {"proposal": "uniform", "policy_kwargs": {"smoothing": "local", "n_critics": 1}},
    "original": {"repulsion": "kernel", "kernel_update_ratio": 0.5, "policy_kwargs": {"smoothing": "none"}},
    "no_batch_norm": {"tau": 0.005, "policy_kwargs": {"batch_norm": False}},
    "own_actor_learning_rate": {"actor_learning_rate": 1e-2, "policy_kwargs": {"net_arch": {"pi": [4], "qf": []}}},
    "episodes": {"train_freq": (1, "episode"), "n_steps": 3},
}
POLICIES = {
    "MlpPolicy": lambda: gym.wrappers.TimeLimit(gym.make("Pendulum-v1"), 20),
    "CnnPolicy": lambda: FakeImageEnv(screen_height=36, screen_width=36, n_channels=1, discrete=False),
    "MultiInputPolicy": lambda: SimpleMultiObsEnv(discrete_actions=False),
}


def make(policy="MlpPolicy", env=None, policy_kwargs=None, **kwargs):
    extractors = {"CnnPolicy": {"features_dim": 8}, "MultiInputPolicy": {"cnn_output_dim": 8}}
    own = {"features_extractor_kwargs": extractors[policy]} if policy in extractors else {}
    kwargs = {"buffer_size": 100, "policy_kwargs": own | (policy_kwargs or {})} | kwargs
    return small(SoftQ, policy, env or POLICIES[policy](), **kwargs)


def load(*args, **kwargs):
    return SoftQ.load(*args, **{"device": "cpu", **kwargs})


def observations(model, n=10):
    space = model.observation_space
    space.seed(0)
    samples = [space.sample() for _ in range(n)]
    return (
        {key: np.stack([s[key] for s in samples]) for key in samples[0]} if isinstance(samples[0], dict) else np.stack(samples)
    )


def actions(model):
    return model.predict(observations(model), deterministic=True)[0]


def assert_same_parameters(first, second):
    states = first.policy.state_dict(), second.policy.state_dict()
    assert states[0].keys() == states[1].keys()
    for key, tensor in states[0].items():
        assert th.equal(tensor, states[1][key]), key
    assert (first.log_ent_coef is None) == (second.log_ent_coef is None)
    assert th.equal(first.ent_coef_tensor, second.ent_coef_tensor)


def train_on(model, seed=3):
    """Some updates that depend on nothing but the model and its buffer."""
    set_random_seed(seed)
    model.set_logger(configure(None, []))
    model.train(gradient_steps=4, batch_size=16)


@pytest.mark.parametrize("variant", VARIANTS)
def test_zip_continues_bit_for_bit(tmp_path, variant):
    """Weights, moments of the optimizers, temperature, progress: after loading, training takes the same steps."""
    model = make(**VARIANTS[variant]).learn(40)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")

    # without an environment
    loaded = load(tmp_path / "model")
    assert loaded.env is None
    assert loaded.num_timesteps == 40
    assert loaded._n_updates == model._n_updates
    loaded.load_replay_buffer(tmp_path / "buffer")
    assert_same_parameters(model, loaded)
    np.testing.assert_array_equal(actions(loaded), actions(model))

    train_on(model)
    before = actions(loaded)
    train_on(loaded)
    assert_same_parameters(model, loaded)
    assert not np.array_equal(actions(loaded), before)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("share_features_extractor", [True, False])
def test_policies(tmp_path, policy, share_features_extractor):
    model = make(policy, policy_kwargs={"share_features_extractor": share_features_extractor}).learn(12)
    model.save(tmp_path / "model")
    loaded = load(tmp_path / "model", env=model.get_env())
    assert_same_parameters(model, loaded)
    np.testing.assert_array_equal(actions(loaded), actions(model))
    assert (loaded.actor.features_extractor is loaded.critic.features_extractor) == share_features_extractor
    loaded.learn(12, reset_num_timesteps=False)
    assert loaded.num_timesteps == 24


def test_fresh_process(tmp_path):
    """Nothing but the zip is needed for the same deterministic actions."""
    model = make().learn(30)
    model.save(tmp_path / "model.zip")
    np.save(tmp_path / "obs.npy", observations(model))
    script = (
        "import sys, numpy as np; from sb3_softq import SoftQ; folder = sys.argv[1];"
        "model = SoftQ.load(folder + '/model.zip', device='cpu');"
        "np.save(folder + '/actions.npy', model.predict(np.load(folder + '/obs.npy'), deterministic=True)[0])"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=env, check=True, timeout=120)
    np.testing.assert_array_equal(np.load(tmp_path / "actions.npy"), actions(model))


def test_file_object():
    model = make().learn(12)
    file = io.BytesIO()
    model.save(file)
    file.seek(0)
    np.testing.assert_array_equal(actions(load(file)), actions(model))


def test_custom_objects_and_arguments(tmp_path):
    model = make(learning_rate=lambda _: 1e-3).learn(12)
    model.save(tmp_path / "model")
    custom_objects = {"learning_rate": 2e-5, "actor_learning_rate": LinearSchedule(1e-4, 1e-5, 1.0), "unknown": 1.0}
    loaded = load(tmp_path / "model", env=model.get_env(), custom_objects=custom_objects, gradient_steps=2, verbose=0)
    assert loaded.learning_rate == 2e-5
    assert loaded.gradient_steps == 2
    assert not hasattr(loaded, "unknown")
    loaded.learn(12)
    assert loaded.critic.optimizer.param_groups[0]["lr"] == pytest.approx(2e-5)
    assert loaded.actor.optimizer.param_groups[0]["lr"] == pytest.approx(1e-5)


def test_loaded_arguments_are_checked(tmp_path):
    make().save(tmp_path / "model")
    with pytest.raises(ValueError, match="tau=2"):
        load(tmp_path / "model", tau=2)


@pytest.mark.parametrize(("saved", "loaded"), [("auto", 0.2), (0.2, "auto"), ("auto_0.5", lambda progress: 0.1)])
def test_a_learned_temperature_stays_learned(tmp_path, saved, loaded):
    make(ent_coef=saved).save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"ent_coef=.* is not allowed: it was (learned|fixed)"):
        load(tmp_path / "model", ent_coef=loaded)


@pytest.mark.parametrize("algorithm", [SoftQ, DiscreteSoftQ])
def test_a_temperature_that_a_string_spells_is_fixed(tmp_path, algorithm):
    model = small(algorithm, env="CartPole-v1" if algorithm is DiscreteSoftQ else "Pendulum-v1", ent_coef="0.1").learn(20)
    for name in ("agent.zip", "agent.safetensors"):
        model.save(tmp_path / name)
        assert algorithm.load(tmp_path / name).ent_coef == 0.1
    assert model.log_ent_coef is None


def test_a_fixed_temperature_can_be_annealed(tmp_path):
    make(ent_coef=0.5, learning_starts=0).save(tmp_path / "model")
    loaded = load(tmp_path / "model", env=make().get_env(), ent_coef=lambda progress: 0.1 + 0.4 * progress)
    loaded.learn(20)
    assert float(loaded.ent_coef_tensor) == pytest.approx(0.1 + 0.4 * loaded._current_progress_remaining)
    assert loaded._current_progress_remaining < 0.1


@pytest.mark.parametrize("device", ["auto", "cpu", th.device("cpu")])
def test_device(tmp_path, device):
    make().save(tmp_path / "model")
    loaded = load(tmp_path / "model", device=device)
    tensors = [*loaded.policy.state_dict().values(), loaded.log_ent_coef, loaded.actor.xi_bank]
    # of the first GPU alone the number is left out
    assert {tensor.device.type for tensor in tensors} == {loaded.device.type}


def test_state_dict_holds_floats_only():
    """What is saved can be averaged, perturbed and compared like weights."""
    for tensor in make().policy.state_dict().values():
        assert tensor.is_floating_point()
        assert tensor.numel() > 0


@pytest.mark.parametrize("ent_coef", ["auto", 0.1])
def test_get_and_set_parameters(ent_coef):
    model, other = make(ent_coef=ent_coef).learn(30), make(ent_coef=ent_coef, seed=1)
    parameters = copy.deepcopy(model.get_parameters())
    expected = {"policy", "actor.optimizer", "critic.optimizer"}
    assert parameters.keys() == expected | ({"ent_coef_optimizer"} if ent_coef == "auto" else set())
    assert not np.array_equal(actions(other), actions(model))
    other.set_parameters(parameters, exact_match=True)
    np.testing.assert_array_equal(actions(other), actions(model))
    with pytest.raises(ValueError, match="nonsense"):
        other.set_parameters({**parameters, "nonsense": {}})
    with pytest.raises(ValueError, match="Names of parameters"):
        other.set_parameters({"policy": parameters["policy"]}, exact_match=True)
    with pytest.raises(RuntimeError, match="Missing key"):
        other.set_parameters({**parameters, "policy": dict(list(parameters["policy"].items())[:-1])})


def test_temperature_is_learned_on(tmp_path):
    model = make(ent_coef="auto_0.5", ent_coef_learning_rate=0.1).learn(20)
    model.save(tmp_path / "model")
    loaded = load(tmp_path / "model", env=model.get_env())
    assert th.equal(loaded.log_ent_coef, model.log_ent_coef)
    assert loaded.log_ent_coef.item() != pytest.approx(np.log(0.5))
    loaded.learn(20)
    assert not th.equal(loaded.log_ent_coef, model.log_ent_coef)


@pytest.mark.parametrize("policy", POLICIES)
def test_policy_alone(tmp_path, policy):
    model = make(policy, policy_kwargs={"smoothing": "local", "log_std_init": -0.7, "share_features_extractor": True})
    obs, expected = observations(model), actions(model)
    model.policy.save(tmp_path / "policy")
    loaded = type(model.policy).load(tmp_path / "policy", device="cpu")
    assert isinstance(loaded, SoftQPolicy)
    assert (loaded.smoothing, loaded.log_std_init, loaded.share_features_extractor) == ("local", -0.7, True)
    np.testing.assert_array_equal(loaded.predict(obs, deterministic=True)[0], expected)

    model.actor.save(tmp_path / "actor")
    actor = SamplingActor.load(tmp_path / "actor", device="cpu")
    np.testing.assert_array_equal(actor.predict(obs, deterministic=True)[0], expected)


@pytest.mark.parametrize("suffix", ["zip", "safetensors"])
@pytest.mark.parametrize(
    ("arguments", "policy_kwargs"),
    [
        (dict(normalize_rewards=False), dict(net_arch=[8])),
        (dict(tau=0.1), dict(net_arch=[8], batch_norm=False)),
        (dict(ent_coef=0.2), dict(net_arch=[8], n_experts=3, n_bins=21)),
        ({}, {}),
    ],
)
def test_policy_kwargs_are_those_that_were_given(tmp_path, suffix, arguments, policy_kwargs):
    """Stable-Baselines3 refuses to load an agent with others."""
    model = SoftQ("MlpPolicy", "Pendulum-v1", buffer_size=10, device="cpu", policy_kwargs=dict(policy_kwargs), **arguments)
    assert model.policy_kwargs == policy_kwargs
    path = tmp_path / f"model.{suffix}"
    model.save(path)
    loaded = load(path, policy_kwargs=dict(policy_kwargs))
    assert loaded.policy_kwargs == policy_kwargs
    assert_same(loaded.get_parameters()["policy"], model.get_parameters()["policy"])
    with pytest.raises(ValueError, match="policy kwargs do not equal"):
        load(path, policy_kwargs=dict(net_arch=[9]))


@pytest.mark.parametrize("kwargs", [dict(tau=0.005), dict(target_update_interval=3), {}])
def test_a_policy_alone_keeps_its_target_networks(tmp_path, kwargs):
    model = make(**kwargs).learn(40)
    model.policy.save(tmp_path / "policy")
    loaded = SoftQPolicy.load(tmp_path / "policy", device="cpu")
    assert (loaded.critic_target is None) == (not kwargs)
    assert_same(loaded.state_dict(), model.policy.state_dict())
    if kwargs:
        assert not loaded.critic_target.training
        assert not any(parameter.requires_grad for parameter in loaded.critic_target.parameters())


def test_replay_buffer(tmp_path):
    model = make().learn(30)
    model.save_replay_buffer(tmp_path / "buffer")
    other = make()
    other.load_replay_buffer(tmp_path / "buffer")
    for name in ("observations", "actions", "rewards", "dones", "timeouts"):
        np.testing.assert_array_equal(getattr(other.replay_buffer, name), getattr(model.replay_buffer, name))
    assert other.replay_buffer.size() == 30


def test_her_replay_buffer(tmp_path):
    env = make_vec_env(lambda: BitFlippingEnv(n_bits=3, continuous=True), 2)
    model = make("MultiInputPolicy", env, replay_buffer_class=HerReplayBuffer, learning_starts=16).learn(40)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = load(tmp_path / "model", env=env)
    loaded.load_replay_buffer(tmp_path / "buffer", truncate_last_traj=False)
    np.testing.assert_array_equal(actions(loaded), actions(model))
    loaded.learn(20, reset_num_timesteps=False)
    assert loaded.num_timesteps == 60
    assert loaded.replay_buffer.size() == 30


def test_vec_normalize_is_found_again(tmp_path):
    env = VecNormalize(make_vec_env("Pendulum-v1"))
    model = make(env=env).learn(20)
    model.save(tmp_path / "model")
    loaded = load(tmp_path / "model", env=env)
    assert loaded.get_vec_normalize_env() is env
    np.testing.assert_array_equal(actions(loaded), actions(model))


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda model: cloudpickle.loads(cloudpickle.dumps(model))])
@pytest.mark.parametrize("variant", VARIANTS)
def test_copies_are_complete_and_independent(copy_of, variant):
    model = make(**VARIANTS[variant]).learn(40)
    copied = copy_of(model)
    assert copied.actor is copied.policy.actor
    assert_same_parameters(model, copied)
    expected = actions(model)
    train_on(copied)
    assert not np.array_equal(actions(copied), expected)
    np.testing.assert_array_equal(actions(model), expected)
    train_on(model)
    assert_same_parameters(model, copied)


def test_learning_goes_on():
    model = make().learn(20)
    updates = model._n_updates
    model.learn(10, reset_num_timesteps=False)
    assert model.num_timesteps == 30
    assert model._n_updates == updates + 10
    assert model.replay_buffer.size() == 30
    model.learn(10)
    assert model.num_timesteps == 10


def test_another_number_of_environments(tmp_path):
    make().learn(20).save(tmp_path / "model")
    env = make_vec_env("Pendulum-v1", 3)
    loaded = load(tmp_path / "model", env=env)
    loaded.learn(30)
    assert loaded.replay_buffer.actions.shape[1] == 3


def test_n_step_returns_follow_what_load_is_given(tmp_path, recwarn):
    make(n_steps=3, gamma=0.9).learn(20).save(tmp_path / "model")
    buffer = load(tmp_path / "model").replay_buffer
    assert (buffer.n_steps, buffer.gamma) == (3, 0.9)
    buffer = load(tmp_path / "model", n_steps=5, gamma=0.5).replay_buffer
    assert (buffer.n_steps, buffer.gamma) == (5, 0.5)
    assert type(load(tmp_path / "model", n_steps=1).replay_buffer) is ReplayBuffer
    make().learn(20).save(tmp_path / "one")
    assert load(tmp_path / "one", n_steps=3).replay_buffer.n_steps == 3
    assert not [warning for warning in recwarn if "n_steps" in str(warning.message)]


def test_arguments_of_the_buffer_stay_as_given():
    kwargs = {"handle_timeout_termination": True}
    model = make(n_steps=3, replay_buffer_kwargs=kwargs)
    assert model.replay_buffer.n_steps == 3
    assert model.replay_buffer_class is None
    assert model.replay_buffer_kwargs == kwargs == {"handle_timeout_termination": True}


@pytest.mark.parametrize("algorithm", [SoftQ, DiscreteSoftQ])
def test_hindsight_without_the_replay_buffer(tmp_path, algorithm):
    """It waits for an episode that goals can be drawn from, where it had learned before or not."""
    env = BitFlippingEnv(n_bits=6, continuous=algorithm is SoftQ)
    env.max_steps = 10
    arguments = dict(env=env, policy="MultiInputPolicy", replay_buffer_class=HerReplayBuffer)
    for n_before in (15, 25):
        model = small(algorithm, **arguments, learning_starts=20).learn(n_before)
        model.save(tmp_path / "model")
        loaded = algorithm.load(tmp_path / "model", env=env, device="cpu")
        loaded.learn(8, reset_num_timesteps=False)
        assert loaded._n_updates == model._n_updates == max(n_before - 20, 0)
        loaded.learn(8, reset_num_timesteps=False)
        # from the end of the first episode, and from the first steps of all that begin to learn, on
        assert loaded._n_updates > model._n_updates
    # a new agent is told that it begins too early
    with pytest.raises(RuntimeError, match="learning_starts that is greater"):
        small(algorithm, **arguments, learning_starts=3).learn(8)
