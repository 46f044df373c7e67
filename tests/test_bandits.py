"""After a short training on a one-step environment the policy is the Boltzmann distribution of the reward."""

import numpy as np
import pytest
from stable_baselines3 import SAC

from sb3_softq import SoftQ
from tests.bandits import Bandit, boltzmann, conditional, ring, rising, shifted, total_variation, two_modes

CASES = {
    "two_modes": Bandit(two_modes),
    "ring": Bandit(ring, (-1, -1), (1, 1)),
    "rising": Bandit(rising, (-1, -1), (1, 1)),
    "conditional": Bandit(conditional, observations=(-1.0, 1.0)),
    "asymmetric_bounds": Bandit(shifted, (-1,), (4,)),
}


def train(env, cls=SoftQ, **kwargs):
    model = cls(
        "MlpPolicy",
        env,
        learning_rate=1e-3,
        learning_starts=500,
        buffer_size=5_000,
        batch_size=128,
        train_freq=16,
        gradient_steps=16,
        ent_coef=1.0,
        policy_kwargs={"net_arch": [64, 64]},
        seed=0,
        device="cpu",
        **kwargs,
    )
    return model.learn(5_000)


def measure(model, env, n_bins):
    """Worst total variation and worst error of the soft value over the observations."""
    distances, errors = [], []
    for observation in env.observations:
        obs = np.array([[observation]], dtype=np.float32)
        actions = model.sample_actions(obs, 20_000)[0]
        distances.append(total_variation(env, observation, 1.0, actions, n_bins))
        errors.append(abs(model.soft_value(obs)[0] - boltzmann(env, observation, 1.0, n_bins)[1]))
    return max(distances), max(errors)


@pytest.mark.parametrize("name", CASES)
def test_policy_is_the_boltzmann_distribution(name):
    env = CASES[name]
    model = train(env, n_actor_particles=16)
    distance, error = measure(model, env, n_bins=30 if env.action_space.shape == (1,) else 12)
    print(name, distance, error)
    assert distance < 0.2
    assert error < 0.25


def test_a_gaussian_actor_fails_on_two_modes():
    env = CASES["two_modes"]
    model = train(env, SAC)
    obs = np.zeros((20_000, 1), dtype=np.float32)
    actions, _ = model.predict(obs)
    assert total_variation(env, 0.0, 1.0, actions, 30) > 0.3
