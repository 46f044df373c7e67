"""Agents that were saved by release 0.1.0 are the agents that they were."""

import pickle
import shutil
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.logger import configure
from stable_baselines3.common.utils import set_random_seed

from sb3_softq import DiscreteSoftQ, SoftQ, SoftQPolicy
from sb3_softq.checkpoint import resume
from sb3_softq.discrete import DiscreteSoftQPolicy
from sb3_softq.policies import SamplingActor

DATA = Path(__file__).parent / "data" / "agents_0_1_0"
ANSWERS = dict(np.load(DATA / "answers.npz"))
CLASSES = {
    "softq": SoftQ,
    "softq_target": SoftQ,
    "softq_2017": SoftQ,
    "discrete": DiscreteSoftQ,
    "discrete_fixed": DiscreteSoftQ,
}


def deterministic_actions(model, obs):
    """As release 0.1.0 had them: a mode of the density, not the best one of the fixed particles."""
    if isinstance(model, DiscreteSoftQ):
        return model.predict(obs, deterministic=True)[0]
    with th.no_grad():
        actions = th.tanh(model.ema_actor.mode(th.as_tensor(obs))).numpy()
    return model.policy.unscale_action(actions)


def assert_same(model, name):
    obs, actions = ANSWERS[f"{name}_observations"], ANSWERS[f"{name}_actions"]
    np.testing.assert_allclose(deterministic_actions(model, obs), actions, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model.q_values(obs, actions), ANSWERS[f"{name}_q_values"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model.ent_coef_tensor.item(), ANSWERS[f"{name}_ent_coef"], rtol=1e-6)


@pytest.mark.parametrize("name", CLASSES)
def test_zip(name):
    model = CLASSES[name].load(DATA / name, device="cpu")
    assert_same(model, name)
    model.set_env(gym.make("CartPole-v1" if name.startswith("discrete") else "Pendulum-v1"))
    model.learn(30)
    assert model._n_updates == 32 + 22


def test_training_goes_on_as_it_would_have():
    """The same steps on the same data; the EMA actor among them, which is young."""
    model = SoftQ.load(DATA / "softq", device="cpu")
    model.load_replay_buffer(DATA / "softq_buffer.pkl", truncate_last_traj=False)
    set_random_seed(3)
    model.set_logger(configure(None, []))
    model.train(gradient_steps=4, batch_size=16)
    actions = deterministic_actions(model, ANSWERS["softq_observations"])
    np.testing.assert_allclose(actions, ANSWERS["softq_trained_on_actions"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["softq", "discrete"])
def test_pickle(name):
    model = pickle.loads((DATA / f"{name}.pkl").read_bytes())
    assert_same(model, name)
    model.learn(30)
    assert all(tensor.is_floating_point() for tensor in model.policy.state_dict().values())


def test_policies_alone():
    policy = SoftQPolicy.load(DATA / "softq_policy.zip", device="cpu")
    obs = ANSWERS["softq_observations"]
    np.testing.assert_allclose(policy.predict(obs, deterministic=True)[0], ANSWERS["softq_actions"], rtol=1e-5)
    actor = SamplingActor.load(DATA / "softq_actor.zip", device="cpu")
    with th.no_grad():
        np.testing.assert_array_equal(actor(th.as_tensor(obs), True), policy.actor(th.as_tensor(obs), True))
    discrete = DiscreteSoftQPolicy.load(DATA / "discrete_policy.zip", device="cpu")
    obs = ANSWERS["discrete_observations"]
    np.testing.assert_array_equal(discrete.predict(obs, deterministic=True)[0], ANSWERS["discrete_actions"])
    assert discrete.ent_coef.item() == pytest.approx(ANSWERS["discrete_ent_coef"].item(), rel=1e-6)


def test_checkpoint(tmp_path):
    shutil.copytree(DATA / "checkpoints", tmp_path / "checkpoints")
    model = resume(SoftQ, tmp_path / "checkpoints", gym.make("Pendulum-v1"), device="cpu")
    assert_same(model, "checkpoint")
    model.learn(20, reset_num_timesteps=False)
    assert (model.num_timesteps, model._n_updates) == (60, 52)
