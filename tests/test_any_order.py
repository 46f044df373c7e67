"""Whatever is asked of an agent, and in whatever order: it stores what has happened and nothing else, and acts."""

import itertools
import math
import tempfile
from contextlib import contextmanager
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_softq import DiscreteSoftQ, SoftQ
from sb3_softq.checkpoint import ResumableCheckpoint, resume
from sb3_softq.data import from_agent
from sb3_softq.faults import FaultyEnvironmentError
from tests.conftest import StopAfter, small

EVENTS = ("_on_training_start", "_on_rollout_start", "_on_step", "_on_rollout_end", "_on_training_end")


def length(episode):
    return 3 + episode % 5


class Numbered(gym.Env):
    """Observes the number of the episode, which no other has, and of the step; the reward follows from that and the action."""

    episodes = itertools.count(1)
    # calls until it raises
    raises_in = math.inf

    def __init__(self, action_space):
        self.action_space = action_space
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), dtype=np.float32)

    def observe(self):
        Numbered.raises_in -= 1
        if Numbered.raises_in == 0:
            raise ZeroDivisionError("the simulator is broken")
        return np.array([self.episode, self.t], dtype=np.float32)

    def reward(self, action):
        return self.t + np.ravel(action)[0] / 4

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.t = next(self.episodes), 0
        return self.observe(), {}

    def step(self, action):
        self.t += 1
        ended, terminates = self.t == length(self.episode), self.episode % 2 == 1
        return self.observe(), self.reward(action), ended and terminates, ended and not terminates, {}


class NumberedGoals(Numbered):
    """The goal is the last step of the episode."""

    def __init__(self, action_space):
        super().__init__(action_space)
        goal = spaces.Box(-np.inf, np.inf, (1,), dtype=np.float32)
        self.observation_space = spaces.Dict(observation=self.observation_space, achieved_goal=goal, desired_goal=goal)

    def observe(self):
        goals = {"achieved_goal": [self.t], "desired_goal": [length(self.episode)]}
        return {"observation": super().observe()} | {name: np.float32(goal) for name, goal in goals.items()}

    def reward(self, action):
        return self.compute_reward(np.array([self.t]), np.array([length(self.episode)]), {})

    def compute_reward(self, achieved_goal, desired_goal, info):
        return np.float32(achieved_goal[..., 0] == desired_goal[..., 0])


class Does(BaseCallback):
    """Does something the ``n``-th time that an event happens."""

    def __init__(self, event, n, what):
        super().__init__()
        self.n, self.what = n, what
        setattr(self, event, self.count)

    def count(self):
        self.n -= 1
        if self.n == 0:
            self.what(self)
        return True

    def _on_step(self):
        return True


def evaluate(callback):
    """On the environments of the training."""
    evaluate_policy(callback.model, callback.training_env, n_eval_episodes=1, warn=False)


class AnyOrder(RuleBasedStateMachine):
    """An agent, its environment, and what has been stored."""

    @initialize(
        algorithm=st.sampled_from([SoftQ, DiscreteSoftQ]),
        n_envs=st.sampled_from([1, 2]),
        normalized=st.booleans(),
        has_goals=st.booleans(),
        kwargs=st.fixed_dictionaries(
            dict(
                n_steps=st.sampled_from([1, 3]),
                ent_coef=st.sampled_from(["auto", 0.1]),
                buffer_size=st.sampled_from([20, 2_000]),
                train_freq=st.sampled_from([1, 3]),
                learning_starts=st.sampled_from([0, 6]),
                optimize_memory_usage=st.booleans(),
            )
        ),
    )
    def make(self, algorithm, n_envs, normalized, has_goals, kwargs):
        Numbered.episodes, Numbered.raises_in = itertools.count(1), math.inf
        self.folder = tempfile.TemporaryDirectory()
        self.algorithm, self.n_envs, self.normalized, self.has_goals = algorithm, n_envs, normalized, has_goals
        if has_goals:
            # from an episode that has ended on
            kwargs |= dict(policy="MultiInputPolicy", replay_buffer_class=HerReplayBuffer, learning_starts=8 * n_envs)
            kwargs |= dict(n_steps=1, optimize_memory_usage=False)
        elif kwargs["optimize_memory_usage"]:
            kwargs |= dict(n_steps=1, replay_buffer_kwargs=dict(handle_timeout_termination=False))
        self.model = small(algorithm, env=self.make_env(), batch_size=4, **kwargs)
        self.train_freq = kwargs["train_freq"]

    def make_env(self):
        space = spaces.Discrete(3) if self.algorithm is DiscreteSoftQ else spaces.Box(-1.0, 1.0, (1,))
        env = DummyVecEnv([lambda: Monitor((NumberedGoals if self.has_goals else Numbered)(space))] * self.n_envs)
        if not self.normalized:
            return env
        normalize = VecNormalize(env)
        if hasattr(self, "model"):
            before = self.model.get_vec_normalize_env()
            normalize.obs_rms, normalize.ret_rms = before.obs_rms, before.ret_rms
        return normalize

    def teardown(self):
        if hasattr(self, "folder"):
            self.folder.cleanup()

    @property
    def path(self):
        return Path(self.folder.name)

    # ------------------------------------------------------------------ training

    @contextmanager
    def each_step_is_stored(self, reset=False):
        buffer, before = self.model.replay_buffer, self.model.num_timesteps
        first = buffer.pos
        try:
            yield
        finally:
            n_new = self.n_envs * (buffer.pos - first)
            # where the first reset fails, the count is still that of before
            assert buffer.full or self.model.num_timesteps in ({n_new, before} if reset else {before + n_new})

    @rule(n=st.integers(0, 12), reset=st.booleans())
    def learn(self, n, reset):
        before = 0 if reset else self.model.num_timesteps
        with self.each_step_is_stored(reset):
            self.model.learn(n, reset_num_timesteps=reset)
        rollout = self.n_envs * self.train_freq
        assert self.model.num_timesteps == before + rollout * math.ceil(n / rollout)

    @rule(n=st.integers(1, 6))
    def learn_until_a_callback_says_stop(self, n):
        until = self.model.num_timesteps + n * self.n_envs
        with self.each_step_is_stored():
            self.model.learn(100, StopAfter(until), reset_num_timesteps=False)
        assert self.model.num_timesteps == until

    @rule(
        n=st.integers(1, 4),
        event=st.sampled_from(EVENTS),
        error=st.sampled_from([KeyboardInterrupt, RuntimeError]),
        reset=st.booleans(),
    )
    def learn_until_a_callback_raises(self, n, event, error, reset):
        def fail(_):
            raise error("of a callback")

        callback = Does(event, 1 if event in ("_on_training_start", "_on_training_end") else n, fail)
        with pytest.raises(error, match="of a callback"), self.each_step_is_stored(reset):
            self.model.learn(n * self.n_envs * self.train_freq, callback, reset_num_timesteps=reset)

    @rule(n=st.integers(1, 4), event=st.sampled_from(EVENTS), reset=st.booleans())
    def learn_while_a_callback_evaluates(self, n, event, reset):
        callback = Does(event, 1 if event in ("_on_training_start", "_on_training_end") else n, evaluate)
        with self.each_step_is_stored(reset):
            self.model.learn((n + 2) * self.n_envs * self.train_freq, callback, reset_num_timesteps=reset)
        assert callback.n <= 0

    @rule(n=st.integers(1, 6), reset=st.booleans())
    def learn_until_the_environment_raises(self, n, reset):
        Numbered.raises_in = n
        try:
            with pytest.raises(FaultyEnvironmentError, match="the simulator is broken"), self.each_step_is_stored(reset):
                self.model.learn(20 * self.n_envs, reset_num_timesteps=reset)
        finally:
            Numbered.raises_in = math.inf

    @rule(itself=st.booleans())
    def evaluate_on_the_environment_of_training(self, itself):
        env = self.model.get_env()
        evaluate_policy(self.model, env if itself else env.unwrapped.envs[0].unwrapped, n_eval_episodes=1, warn=False)

    @rule(n=st.integers(1, 4))
    def pretrain(self, n):
        self.offline(self.model.pretrain, n)

    @precondition(lambda self: self.algorithm is SoftQ)
    @rule(n=st.integers(1, 4))
    def clone_behaviour(self, n):
        self.offline(self.model.clone_behaviour, n)

    def offline(self, learn, n):
        before = self.model.num_timesteps
        if self.model.logged_data is None:
            with pytest.raises(ValueError, match="there are no data"):
                learn(n)
        else:
            learn(n)
        assert self.model.num_timesteps == before

    @rule(share=st.sampled_from([0.0, 0.5, 1.0]))
    def set_data(self, share):
        self.model.set_data(from_agent(self.model) if self.model.replay_buffer.size() > 0 else None, share)

    # ------------------------------------------------------------------ files

    @property
    def observations(self):
        obs = np.array([[1.0, 2.0], [3.0, 4.0]], dtype=np.float32)
        goal = obs[:, :1]
        return dict(observation=obs, achieved_goal=goal, desired_goal=goal) if self.has_goals else obs

    def predictions(self):
        return self.model.predict(self.observations, deterministic=True)[0]

    @rule(with_buffer=st.booleans(), truncate=st.booleans())
    def save_and_load(self, with_buffer, truncate):
        before = self.predictions(), self.model.num_timesteps, self.model._n_updates
        self.model.save(self.path / "model.zip")
        self.model.save_replay_buffer(self.path / "buffer.pkl")
        self.model = self.algorithm.load(self.path / "model.zip", env=self.make_env(), device="cpu")
        np.testing.assert_array_equal(self.predictions(), before[0])
        assert (self.model.num_timesteps, self.model._n_updates) == before[1:]
        if with_buffer:
            self.model.load_replay_buffer(self.path / "buffer.pkl", truncate_last_traj=truncate)

    @rule(n=st.integers(1, 12))
    def resume_from_a_checkpoint(self, n):
        self.model.learn(n, ResumableCheckpoint(5, self.path / "run"), reset_num_timesteps=False)
        before = self.predictions(), self.model.num_timesteps, self.model._n_updates, self.model.replay_buffer.pos
        self.model = resume(self.algorithm, self.path / "run", self.make_env(), device="cpu")
        np.testing.assert_array_equal(self.predictions(), before[0])
        assert (self.model.num_timesteps, self.model._n_updates, self.model.replay_buffer.pos) == before[1:]

    @rule()
    def set_parameters(self):
        before = self.predictions()
        self.model.set_parameters(self.model.get_parameters())
        np.testing.assert_array_equal(self.predictions(), before)

    @rule()
    def set_env(self):
        self.model.set_env(self.make_env())

    # ------------------------------------------------------------------ what always holds

    @rule(n=st.integers(1, 3))
    def ask(self, n):
        obs = self.observations
        actions = self.model.sample_actions(obs, n)
        answers = [self.model.log_prob(obs, actions), self.model.q_values(obs, actions)]
        answers += [self.model.entropy(obs), self.model.soft_value(obs)]
        assert [answer.shape for answer in answers] == [(2, n), (2, n), (2,), (2,)]
        assert all(np.isfinite(answer).all() for answer in answers)

    @precondition(lambda self: hasattr(self, "model") and not self.has_goals)
    @invariant()
    def what_is_stored_has_happened(self):
        buffer = self.model.replay_buffer
        order = (buffer.pos * buffer.full + np.arange(buffer.size())) % buffer.buffer_size
        if buffer.full and buffer.optimize_memory_usage:
            # the newest observation has been written over the oldest one, which is not drawn any more
            order = order[1:]
        for env in range(self.n_envs):
            for i, row in enumerate(order):
                episode, t = buffer.observations[row, env]
                ended, cut_off = bool(buffer.dones[row, env]), bool(buffer.timeouts[row, env])
                assert buffer.rewards[row, env] == pytest.approx(t + 1 + buffer.actions[row, env, 0] / 4, abs=1e-4)
                if not buffer.optimize_memory_usage:
                    assert buffer.next_observations[row, env] == pytest.approx([episode, t + 1], abs=1e-2)
                    assert not cut_off or ended
                    if t + 1 == length(episode):
                        assert (ended, cut_off) == (True, episode % 2 == 0)
                    else:
                        # only by a reset
                        assert ended == cut_off
                if not ended and i < len(order) - 1:
                    after = buffer.observations[(row + 1) % buffer.buffer_size, env]
                    assert after.tolist() == [episode, t + 1]

    @precondition(lambda self: hasattr(self, "model") and self.model.replay_buffer.size() > 0)
    @invariant()
    def what_is_drawn_has_happened(self):
        buffer = self.model.replay_buffer
        if self.has_goals and not (buffer.ep_length > 0).any():
            # none has ended
            return
        state = np.random.get_state()
        samples = buffer.sample(16)
        np.random.set_state(state)
        obs, next_obs = (
            {name: value.numpy() for name, value in x.items()} if self.has_goals else x.numpy()
            for x in (samples.observations, samples.next_observations)
        )
        if self.has_goals:
            goal = obs["desired_goal"][:, 0]
            (episode, t), (next_episode, next_t) = obs["observation"].T, next_obs["observation"].T
            assert (obs["achieved_goal"][:, 0] == t).all()
            assert next_obs["achieved_goal"][:, 0] == pytest.approx(next_t, abs=1e-2)
            assert (next_obs["desired_goal"][:, 0] == goal).all()
            # of the episode, and not before it was reached
            assert ((goal > t) & (goal <= length(episode))).all()
            assert samples.rewards[:, 0].numpy() == pytest.approx(np.isclose(goal, next_t).astype(float))
        else:
            (episode, t), (next_episode, next_t) = obs.T, next_obs.T
        ended = samples.dones[:, 0].numpy() == 1.0
        if buffer.optimize_memory_usage:
            # what comes after the end of an episode is the next one's, and does not count
            episode, t, next_episode, next_t = (x[~ended] for x in (episode, t, next_episode, next_t))
        else:
            assert (ended == np.isclose(next_t, length(episode)) & (episode % 2 == 1)).all()
        n_steps = next_t - t
        assert next_episode == pytest.approx(episode, abs=1e-2)
        assert n_steps == pytest.approx(np.round(n_steps).clip(1, self.model.n_steps), abs=1e-2)
        if self.model.n_steps > 1:
            discounts = self.model.gamma ** np.arange(self.model.n_steps)
            steps = np.arange(self.model.n_steps) < np.round(n_steps)[:, None]
            rewards = ((t[:, None] + 1 + np.arange(self.model.n_steps)) * discounts * steps).sum(axis=1)
            # but for the actions
            assert samples.rewards[:, 0].numpy() == pytest.approx(rewards, abs=0.51 * self.model.n_steps)
            assert samples.discounts[:, 0].numpy() == pytest.approx(self.model.gamma ** np.round(n_steps))

    @precondition(lambda self: hasattr(self, "model"))
    @invariant()
    def it_acts(self):
        for parameter in self.model.policy.parameters():
            assert th.isfinite(parameter).all()
        actions, _ = self.model.predict(self.observations)
        assert all(self.model.action_space.contains(action) for action in actions)


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=20, stateful_step_count=12, deadline=None, suppress_health_check=[*HealthCheck])
pytestmark = pytest.mark.filterwarnings("ignore")
