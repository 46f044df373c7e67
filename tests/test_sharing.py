"""Environments that somebody else uses: a callback, or anybody between two calls of learn."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EvalCallback, EveryNTimesteps
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

from sb3_softq import DiscreteSoftQ, SoftQ
from tests.conftest import RandomEnv, flat, small
from tests.test_any_order import EVENTS, Does, Numbered

BOX = spaces.Box(-1.0, 1.0, (1,), dtype=np.float32)


class Plain(RandomEnv):
    """Without a time limit or a generator of random numbers of gymnasium's, and changed in place."""

    def __init__(self):
        super().__init__(BOX)
        self.position = np.zeros(3, dtype=np.float32)

    def reset(self, *, seed=None, options=None):
        self.t = 0
        self.position[:] = 0.0
        return self.position.copy(), {}

    def step(self, action):
        self.t += 1
        self.position += action
        return self.position.copy(), 0.0, False, self.t == 20, {}


# an environment to learn in, and which of its layers is evaluated on
USES = {
    "itself": (lambda: gym.make("Pendulum-v1"), lambda env, given: given),
    "MuJoCo": (lambda: gym.make("Hopper-v4"), lambda env, given: given),
    "its own get_env()": (lambda: gym.make("Pendulum-v1"), lambda env, given: env),
    "in a Monitor": (lambda: Monitor(gym.make("Pendulum-v1")), lambda env, given: given),
    "a user's": (Plain, lambda env, given: given),
    "several": (lambda: DummyVecEnv([Plain] * 2), lambda env, given: given),
    "several, normalised": (lambda: VecNormalize(DummyVecEnv([Plain] * 2)), lambda env, given: given),
    "one of several": (lambda: DummyVecEnv([Plain] * 2), lambda env, given: given.envs[1]),
    "processes": (lambda: SubprocVecEnv([Plain] * 2), lambda env, given: given),
}


@pytest.mark.parametrize("use", USES)
def test_an_evaluation_in_between_begins_another_episode(use):
    """The last observation is no longer that of the environment: no transition may lead from the one to the other."""
    make_env, of = USES[use]
    given = make_env()
    model = small(env=given, buffer_size=1_000, learning_starts=100).learn(7 * getattr(given, "num_envs", 1))
    buffer = model.replay_buffer
    assert not buffer.dones[:7].any()
    evaluate_policy(model, of(model.get_env(), given), n_eval_episodes=1, warn=False)
    model.learn(7 * model.n_envs, reset_num_timesteps=False)
    assert model.num_timesteps == 14 * model.n_envs
    assert buffer.dones[6].all()
    assert buffer.timeouts[6].all()
    assert not buffer.dones[7:14].any()
    # within an episode each follows from the one before
    for rows in (slice(0, 7), slice(7, 14)):
        np.testing.assert_allclose(buffer.observations[rows][1:], buffer.next_observations[rows][:-1], atol=1e-5)
    assert (buffer.observations[7] != buffer.next_observations[6]).any()
    model.get_env().close()


# where attributes of the user's class alone tell, a callback may have set them
@pytest.mark.parametrize("use", [use for use in USES if use not in ("a user's", "one of several")])
@pytest.mark.parametrize("event", EVENTS)
def test_an_evaluation_by_a_callback_begins_another_episode(use, event):
    """In the middle of a rollout, too; the step after which it comes is stored as it was."""
    make_env, of = USES[use]
    given = make_env()
    model = small(env=given, buffer_size=1_000, learning_starts=100, train_freq=2)
    # the n-th time that it happens, and the steps before the other episode
    n, expected = {"_on_step": (7, 7), "_on_rollout_start": (4, 6), "_on_rollout_end": (4, 8)}.get(event, (1, None))
    n_envs = model.n_envs

    def evaluate(callback):
        evaluate_policy(model, of(callback.training_env, given), n_eval_episodes=1, warn=False)

    model.learn(14 * n_envs, Does(event, n, evaluate))
    if event == "_on_training_end":
        expected = 14
        model.learn(2 * n_envs, reset_num_timesteps=False)
    buffer, end = model.replay_buffer, model.num_timesteps // n_envs
    assert buffer.pos == end
    assert np.flatnonzero(buffer.dones[:end].all(axis=1)).tolist() == ([] if expected is None else [expected - 1])
    assert (buffer.timeouts[:end] == buffer.dones[:end]).all()
    # within an episode each follows from the one before
    for rows in (slice(0, expected), slice(expected, end)) if expected else (slice(0, end),):
        np.testing.assert_allclose(buffer.observations[rows][1:], buffer.next_observations[rows][:-1], atol=1e-5)
        assert (np.abs(buffer.next_observations[rows] - buffer.observations[rows]).max(axis=(1, 2)) < 2).all()
    if expected:
        assert (buffer.observations[expected] != buffer.next_observations[expected - 1]).any()
    model.get_env().close()


@pytest.mark.parametrize("make_env", [lambda: gym.make("CartPole-v1"), lambda: DummyVecEnv([Plain] * 2)])
def test_a_callback_that_sets_attributes_ends_no_episode(make_env):
    """Which is how tasks become harder during training."""

    class Harder(BaseCallback):
        def _on_step(self):
            self.training_env.set_attr("gravity", 9.8 + 0.01 * self.n_calls)
            return True

    env = make_env()
    model = small(DiscreteSoftQ if isinstance(env.action_space, spaces.Discrete) else SoftQ, env=env, learning_starts=100)
    model.learn(7 * model.n_envs, Harder())
    assert model.get_env().get_attr("gravity")[0] == pytest.approx(9.87)
    assert not model.replay_buffer.dones[:7].any()


@pytest.mark.parametrize("n", [0, 2])
def test_an_evaluation_after_few_steps(n):
    """What the agent has observed at last is of an episode that has ended since."""
    model = small(env=Numbered(BOX)).learn(n)
    evaluate_policy(model, model.get_env(), n_eval_episodes=1, warn=False)
    model.learn(2, reset_num_timesteps=False)
    before, after = model.replay_buffer.observations[n, 0], model.replay_buffer.next_observations[n, 0]
    assert (after - before).tolist() == [0, 1]


@pytest.mark.parametrize(
    "make_env", [lambda: gym.make("Pendulum-v1", render_mode="rgb_array"), lambda: SubprocVecEnv([Plain] * 2)]
)
def test_nobody_in_between_changes_nothing(tmp_path, make_env):
    """Nor do questions and files: the episode goes on as in one call."""
    weights = []
    for parts in ([18], [11, 7]):
        model = small(env=make_env(), learning_starts=8, learning_rate=1e-3)
        for part in parts:
            model.learn(part * model.n_envs, reset_num_timesteps=False)
            model.predict(model.observation_space.sample(), deterministic=True)
            model.save(tmp_path / "model")
            model.get_env().get_attr("spec")
            model.get_env().render("rgb_array")
        assert not model.replay_buffer.dones[:18].any()
        weights.append(flat(model.policy))
        model.get_env().close()
    np.testing.assert_array_equal(*weights)


@pytest.mark.parametrize("within", [lambda x: x, lambda x: CallbackList([x]), lambda x: [EveryNTimesteps(3, x)]])
@pytest.mark.parametrize("of", [lambda env: env, lambda env: env.unwrapped, lambda env: env.envs[0].unwrapped])
def test_an_evaluation_during_training_has_its_own(within, of):
    """SB3 would go on from where the evaluation has left the environment, as if the agent had gone there."""
    model = small(DiscreteSoftQ, env="CartPole-v1")
    with pytest.raises(ValueError, match=r"eval_env=.* with an environment of the training is not allowed"):
        model.learn(20, callback=within(EvalCallback(of(model.get_env()), eval_freq=5, warn=False)))
    assert model.num_timesteps == 0
    model.learn(20, callback=within(EvalCallback(gym.make("CartPole-v1"), eval_freq=5, warn=False)))
    assert model.num_timesteps == 20
