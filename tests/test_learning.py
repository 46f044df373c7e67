"""Learning from scratch on real tasks, with bars that a broken algorithm does not reach."""

import pytest
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_softq import SoftQ


def learn(env_id, steps, **kwargs):
    model = SoftQ("MlpPolicy", env_id, seed=0, device="cpu", **kwargs).learn(steps)
    env = make_vec_env(env_id, n_envs=10, seed=1000)
    return [evaluate_policy(model, env, n_eval_episodes=10, deterministic=d)[0] for d in (True, False)]


def test_pendulum():
    """A random policy gets about -1200."""
    kwargs = {"learning_rate": 1e-3, "learning_starts": 500, "batch_size": 128, "policy_kwargs": {"net_arch": [64, 64]}}
    for mean_return in learn("Pendulum-v1", 2_500, **kwargs):
        assert mean_return > -250


@pytest.mark.slow
def test_half_cheetah():
    """SAC is below 0 at twice as many steps; a random policy gets about -280."""
    for mean_return in learn("HalfCheetah-v4", 10_000, learning_starts=1_000):
        assert mean_return > 1_000
