"""The scale of returns, and agents that learn the same whatever the size of the rewards."""

import math
from copy import deepcopy

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium.wrappers import TransformReward
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.vec_env import VecEnvWrapper, VecNormalize

from sb3_softq import DiscreteSoftQ, SoftQ
from sb3_softq.data import from_agent
from sb3_softq.returns import LARGEST_RETURN, ReturnScale
from tests.conftest import Ends, small


@settings(deadline=None)
@given(
    rewards=st.lists(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=2), min_size=1, max_size=20),
    ends=st.lists(st.booleans(), min_size=20, max_size=20),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
)
def test_statistics_of_the_returns(rewards, ends, gamma):
    """Against the definition: discounted returns since each episode's start, their standard deviation and largest size."""
    scale, returns, running = ReturnScale(), [], np.zeros(2)
    for reward, end in zip(rewards, ends, strict=False):
        dones = np.array([end, False])
        scale.observe(np.array(reward), dones, gamma)
        running = np.array(reward) + gamma * running
        returns += running.tolist()
        running = running * ~dones
    assert scale.count == len(returns)
    assert scale.var == pytest.approx(np.var(returns), abs=1e-6 * max(1.0, np.square(returns).max()))
    largest = np.abs(returns).max()
    assert scale.largest == largest
    assert scale.value == pytest.approx(max(np.std(returns), largest / LARGEST_RETURN) or 1.0, rel=1e-5, abs=1e-9)


def test_returns_go_on_where_a_time_limit_cuts_an_episode_off():
    """Values do too: steps of reward 1 that are all cut off are worth 1 / (1 - gamma), those that end 1."""
    action_space = gym.spaces.Box(-1, 1, (1,))
    for terminates, largest in ((True, 1.0), (False, 10.0)):
        env = make_vec_env(Ends, n_envs=2, env_kwargs=dict(terminates=terminates, action_space=action_space))
        model = small(env=env, gamma=0.9, ent_coef="auto_0.01", train_freq=20).learn(400)
        assert model.returns.largest == pytest.approx(largest, rel=1e-6)
        alone = ReturnScale()
        alone.observe_buffer(model.replay_buffer, 0.9)
        assert alone.largest == pytest.approx(largest, rel=1e-4)


def test_rewards_of_zero_have_a_scale():
    scale = ReturnScale()
    scale.observe(np.zeros(3), np.zeros(3), 0.99)
    assert scale.value == 1.0


def scaled_run(factor: float, **kwargs) -> SoftQ:
    env = TransformReward(gym.make("Pendulum-v1"), lambda reward: float(reward) * factor)
    return small(env=env, learning_starts=50, batch_size=32, **kwargs).learn(300)


# Powers of two, by which rewards are multiplied without rounding
FACTORS = 2.0**-10, 2.0**10


@pytest.mark.parametrize("kwargs", [{}, dict(n_steps=3), dict(policy_kwargs=dict(n_bins=1, net_arch=[8]))], ids=str)
def test_rewards_of_any_size_are_learned_alike(kwargs):
    """The same weights to the bit."""
    one = scaled_run(1.0, **kwargs)
    obs, actions = np.zeros((5, 3), dtype=np.float32), np.linspace(-2, 2, 5, dtype=np.float32)[:, None]
    for factor in FACTORS:
        other = scaled_run(factor, **kwargs)
        for name, tensor in one.policy.state_dict().items():
            unit = factor if name.endswith("return_scale") else 1.0
            th.testing.assert_close(other.policy.state_dict()[name], unit * tensor, rtol=1e-5, atol=1e-6 * unit)
        np.testing.assert_allclose(other.q_values(obs, actions), factor * one.q_values(obs, actions), rtol=1e-3)
        np.testing.assert_allclose(other.ent_coef_tensor, factor * one.ent_coef_tensor, rtol=1e-4)


@pytest.mark.parametrize(
    "kwargs", [{}, dict(target_update_interval=10), dict(policy_kwargs=dict(n_bins=1, net_arch=[8]))], ids=str
)
def test_discrete_agents_likewise(kwargs):
    one, *others = (
        small(
            DiscreteSoftQ,
            env=TransformReward(gym.make("CartPole-v1"), lambda reward, unit=unit: float(reward) * unit),
            **kwargs,
        ).learn(300)
        for unit in (1.0, *FACTORS)
    )
    assert one.critic.return_scale.item() == pytest.approx(one.returns.value)
    assert one.returns.value > 1.0
    obs = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    for factor, other in zip(FACTORS, others, strict=True):
        for name, tensor in one.policy.state_dict().items():
            unit = factor if name.endswith("return_scale") else 1.0
            th.testing.assert_close(other.policy.state_dict()[name], unit * tensor, rtol=1e-5, atol=1e-6 * unit)
        np.testing.assert_allclose(other.soft_value(obs), factor * one.soft_value(obs), rtol=1e-3)
        np.testing.assert_allclose(other.entropy(obs), one.entropy(obs), rtol=1e-3)
        assert other.policy.ent_coef.item() == pytest.approx(factor * one.policy.ent_coef.item(), rel=1e-4)


@pytest.mark.parametrize("suffix", ["zip", "safetensors"])
def test_weights_of_discrete_agents_keep_their_units(tmp_path, suffix):
    model = small(DiscreteSoftQ, env="CartPole-v1").learn(60)
    path = tmp_path / f"agent.{suffix}"
    model.save(path)
    with pytest.raises(ValueError, match="normalize_rewards=False is not allowed: it must be True, as it was"):
        DiscreteSoftQ.load(path, normalize_rewards=False)
    with pytest.raises(ValueError, match=r"n_bins=1 with normalize_rewards=False is not allowed: .* n_bins must be 101"):
        small(DiscreteSoftQ, env="CartPole-v1", normalize_rewards=False).set_parameters(path)
    other = small(DiscreteSoftQ, env="CartPole-v1", seed=1, learning_starts=0, learning_rate=1e-12)
    other.set_parameters(path)
    other.learn(3)
    assert other.critic.return_scale.item() == model.critic.return_scale.item() > 1.0


def test_the_scale_is_that_of_the_returns_of_training():
    model = scaled_run(1.0, train_freq=50)
    buffer = model.replay_buffer
    observed = ReturnScale()
    observed.observe_buffer(buffer, model.gamma)
    # where no episode has lasted longer than the buffer, both have seen the same
    assert model.returns.count == 300
    assert model.critic.return_scale.item() == pytest.approx(model.returns.value, rel=1e-6)
    assert model.returns.value > 1.0
    assert buffer.size() == 200
    assert observed.count == 200


def test_a_loaded_buffer_alone_tells_the_scale(tmp_path):
    model = small(env="Pendulum-v1", buffer_size=400, train_freq=50).learn(300)
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    other = small(env="Pendulum-v1", buffer_size=400, seed=1)
    other.load_replay_buffer(tmp_path / "buffer.pkl")
    other.learn(0)
    other.train(1, 32)
    assert other.returns.count == 300
    assert other.critic.return_scale.item() == pytest.approx(model.returns.value, rel=0.05)
    learns = small(env="Pendulum-v1", buffer_size=400, seed=1)
    learns.load_replay_buffer(tmp_path / "buffer.pkl")
    learns.learn(5)
    assert learns.returns.count == 305


class RareGoal(BitFlippingEnv):
    """Pays 100 at the goal alone, which no episode reaches: its bits are those of the action, not of the goal."""

    def __init__(self):
        super().__init__(n_bits=12, continuous=True)

    def compute_reward(self, achieved_goal, desired_goal, info):
        return 100.0 * np.all(achieved_goal == desired_goal, axis=-1)


def test_what_her_pays_for_goals_that_no_episode_has_reached():
    """Its rewards were cut off at the support's end, 8 times a scale of 1."""
    model = small(policy="MultiInputPolicy", env=RareGoal(), replay_buffer_class=HerReplayBuffer, learning_starts=50).learn(80)
    assert model.replay_buffer.rewards.max() == 0.0
    assert model.critic.return_scale.item() == pytest.approx(100.0 / LARGEST_RETURN)
    assert model.returns.value == pytest.approx(100.0 / LARGEST_RETURN)


@pytest.mark.parametrize("begins", ["learn", "set_data", "load"])
def test_a_buffer_of_larger_returns_counts_whenever_it_is_loaded(tmp_path, begins):
    env = TransformReward(gym.make("Pendulum-v1"), lambda reward: 1000 * reward)
    rich = small(env=env, buffer_size=300, train_freq=50).learn(200)
    rich.save_replay_buffer(tmp_path / "buffer.pkl")
    model = small(env="Pendulum-v1", buffer_size=300)
    if begins == "set_data":
        model.set_data(from_agent(small(env="Pendulum-v1").learn(40)))
    else:
        model.learn(40)
    if begins == "load":
        model.save(tmp_path / "agent")
        model = SoftQ.load(tmp_path / "agent", env=model.get_env())
    own = model.returns.value
    model.load_replay_buffer(tmp_path / "buffer.pkl")
    model.learn(40, reset_num_timesteps=False)
    assert model.critic.return_scale.item() == pytest.approx(rich.returns.value, rel=0.05)
    assert own < 0.1 * rich.returns.value


def test_the_same_data_count_once(tmp_path):
    data = list(from_agent(small(env="Pendulum-v1").learn(50)))
    model = small(env="Pendulum-v1").set_data(data)
    once = model.returns.value
    model.set_data(data)
    model.learn(30)
    seen = deepcopy(model.returns)
    # they are not saved with the agent, which gets them once more
    model.save(tmp_path / "agent")
    loaded = SoftQ.load(tmp_path / "agent", env=model.get_env()).set_data(data)
    assert loaded.returns == seen
    assert model.returns.count == len(data[0].rewards) + 30
    larger = [x._replace(rewards=10 * x.rewards) for x in data]
    assert loaded.set_data(larger).returns.value == pytest.approx(10 * once, rel=0.2)


def test_data_that_come_in_the_middle_leave_the_episodes_that_are_going_on():
    model = small(env="Pendulum-v1").learn(50)
    running = model.returns.running
    data = list(from_agent(model))
    fresh = small(env="Pendulum-v1").set_data(data)
    model.set_data(data)
    assert model.returns.running == running
    assert running[0] != 0.0
    # and do not begin with their return
    assert fresh.returns.running == []
    assert model.returns.largest == pytest.approx(max(fresh.returns.largest, model.returns.largest))
    returns = ReturnScale(running=[-1e6])
    returns.observe_buffer(model.replay_buffer, 0.99)
    assert returns.largest < 1e4
    assert returns.running == [-1e6]


def test_fixed_temperatures_count_their_entropy():
    """Soft returns are what Q estimates: without the entropy they would lie beyond the critics' support."""
    cold, hot = (small(ent_coef=ent_coef).learn(100) for ent_coef in (1e-3, 1e4))
    assert hot.returns.value > 100 * cold.returns.value
    assert hot.critic.return_scale.item() == pytest.approx(hot.returns.value, rel=0.2)


def test_a_learned_temperature_begins_as_a_multiple_of_the_scale():
    model = small(ent_coef="auto_0.01", ent_coef_learning_rate=1e-9).learn(100)
    assert model.ent_coef_tensor.item() == pytest.approx(0.01 * model.critic.return_scale.item(), rel=1e-3)
    # a mean over updates with other scales, in the environment's units
    assert model.logger.name_to_value["train/ent_coef"] > 10 * math.exp(model.log_ent_coef.item())


def test_without_normalisation_nothing_is_scaled():
    model = small(normalize_rewards=False, policy_kwargs=dict(n_bins=1, net_arch=[8]), ent_coef="auto_0.1").learn(60)
    assert model.critic.return_scale.item() == 1.0
    assert model.ent_coef_tensor.item() == pytest.approx(math.exp(model.log_ent_coef.item()))


def test_histograms_need_the_scale():
    with pytest.raises(ValueError, match=r"n_bins=51 is not allowed with normalize_rewards=False, .*: it must be 1"):
        small(normalize_rewards=False, policy_kwargs=dict(n_bins=51))
    assert small(normalize_rewards=False).critic.n_bins == 1
    assert small().critic.n_bins == 101


@pytest.mark.parametrize("gamma", [0.99, 0.9])
def test_vec_normalize_before_it(gamma):
    """As if the rewards of all steps had been normalised as they are now: the first ones were divided by next to nothing."""
    env = VecNormalize(make_vec_env("Pendulum-v1", n_envs=2), gamma=gamma)
    model = small(env=env, gamma=gamma, buffer_size=2000, train_freq=50).learn(1000)
    replayed = ReturnScale()
    for row in range(500):
        replayed.observe(env.normalize_reward(model.replay_buffer.rewards[row].astype(np.float64)), np.zeros(2), gamma)
    assert replayed.largest < 10.0
    model.train(1, 32)
    assert model.critic.return_scale.item() == pytest.approx(replayed.value, rel=0.02)


def test_agents_that_have_seen_normalised_rewards(tmp_path):
    """As earlier ones have: their statistics get the unit of the rewards."""
    env = VecNormalize(make_vec_env("Pendulum-v1"))
    model = small(env=env).learn(100)
    value, unit = model.returns.value, model._reward_unit()
    model.returns.multiply(1.0 / unit)
    model.returns.is_raw = False
    for name in ("agent.zip", "agent.safetensors"):
        model.save(tmp_path / name)
        loaded = SoftQ.load(tmp_path / name, env=env)
        loaded._set_return_scale()
        assert loaded.returns.value == pytest.approx(value)
        assert loaded.critic.return_scale.item() == pytest.approx(value / unit)


@pytest.mark.parametrize("way", ["pretrain", "load_replay_buffer"])
def test_transitions_from_elsewhere_count_the_entropy_too(tmp_path, way):
    env = gym.make("Pendulum-v1")
    collected = small(env=env, ent_coef=1e4, learning_starts=10**6).learn(200)
    model = small(env=env, ent_coef=1e4, learning_starts=0)
    if way == "pretrain":
        model.set_data(from_agent(collected)).pretrain(1)
    else:
        collected.save_replay_buffer(tmp_path / "buffer.pkl")
        model.load_replay_buffer(tmp_path / "buffer.pkl")
        model.learn(1)
    assert model.critic.return_scale.item() == pytest.approx(collected.returns.value, rel=0.05)


def test_parameters_of_another_agent_keep_their_unit(tmp_path):
    """What the critics have learned would be multiplied by the first scale that is seen here."""
    model = scaled_run(1.0, train_freq=10)
    model.save(tmp_path / "agent")
    scale = model.critic.return_scale.item()
    obs, actions = np.zeros((5, 3), dtype=np.float32), np.linspace(-2, 2, 5, dtype=np.float32)[:, None]
    for parameters in (tmp_path / "agent", model.get_parameters()):
        other = small(env="Pendulum-v1", seed=1, learning_starts=0, learning_rate=1e-12)
        other.set_parameters(parameters)
        np.testing.assert_allclose(other.q_values(obs, actions), model.q_values(obs, actions), rtol=1e-5)
        for _ in range(3):
            other.learn(2, reset_num_timesteps=False)
            # of small rewards so far
            assert other.critic.return_scale.item() == pytest.approx(scale, rel=1e-6)
    # one that has learned nothing has no unit
    fresh, other = small(env="Pendulum-v1"), small(env="Pendulum-v1", seed=1)
    other.set_parameters(fresh.get_parameters())
    assert other.returns.largest == 0.0


@pytest.mark.parametrize("suffix", ["zip", "safetensors"])
@pytest.mark.parametrize(
    ("saved", "asked", "message"),
    [
        ({}, False, "n_bins=1 with normalize_rewards=False is not allowed: .* n_bins must be 101"),
        ({"policy_kwargs": {"net_arch": [8], "n_bins": 1}}, False, None),
        ({"normalize_rewards": False}, True, "n_bins=101 with normalize_rewards=True is not allowed: .* n_bins must be 1"),
    ],
)
def test_weights_keep_the_units_that_they_were_trained_in(tmp_path, saved, asked, message, suffix):
    path = tmp_path / f"agent.{suffix}"
    small(**saved).learn(60).save(path)
    with pytest.raises(ValueError, match=f"normalize_rewards={asked} is not allowed: it must be {not asked}, as it was"):
        SoftQ.load(path, normalize_rewards=asked)
    other = small(**saved | {"normalize_rewards": asked})
    if message is None:
        # numbers come with their scale
        other.set_parameters(path)
    else:
        with pytest.raises(ValueError, match=message):
            other.set_parameters(path)
    assert SoftQ.load(path, normalize_rewards=not asked).normalize_rewards is not asked


def test_agents_of_before_are_refused_by_their_weights(tmp_path):
    """Those that were saved without what they were made with; Stable-Baselines3 takes any ValueError for an old DQN."""
    model = small().learn(60)
    model._was_normalized = None
    model.save(tmp_path / "agent")
    with pytest.raises(ValueError, match="n_bins=1 with normalize_rewards=False is not allowed"):
        SoftQ.load(tmp_path / "agent", normalize_rewards=False)


def test_weights_that_somebody_has_changed_load(tmp_path):
    model = small(normalize_rewards=False)
    model.policy.load_state_dict({name: th.rand_like(value) for name, value in model.policy.state_dict().items()})
    model.save(tmp_path / "agent")
    assert th.equal(SoftQ.load(tmp_path / "agent").critic.return_scale, model.critic.return_scale)


def test_parameters_of_an_imitation_have_no_unit():
    """Its critics have learned nothing: rewards that are small here were lost in the unit 1 of a scale that saw none."""
    data = list(from_agent(small(env="Pendulum-v1", learning_starts=100).learn(100)))
    imitation = small(env="Pendulum-v1").set_data(data).clone_behaviour(2)
    assert imitation.critic.return_scale.item() == 1.0
    other = small(env="Pendulum-v1", seed=1)
    other.set_parameters(imitation.get_parameters())
    assert other.returns.largest == 0.0
    # one that has learned, and imitates after that, has one
    imitation.learn(100).clone_behaviour(2)
    other.set_parameters(imitation.get_parameters())
    assert other.returns.value == pytest.approx(imitation.critic.return_scale.item())


@settings(deadline=None)
@given(
    rewards=arrays(np.float64, st.tuples(st.integers(1, 30), st.integers(1, 3)), elements=st.floats(-1e6, 1e6)),
    seed=st.integers(0, 2**32 - 1),
    n_more=st.integers(0, 10),
    bonus=st.floats(-10, 10),
)
def test_a_buffer_is_taken_in_as_its_steps_are(rewards, seed, n_more, bonus):
    """From the oldest on, where it has gone round too."""
    n_steps, n_envs = rewards.shape
    rng = np.random.default_rng(seed)
    size = max(n_steps - n_more, 1)
    box = gym.spaces.Box(-1, 1, (1,))
    buffer = ReplayBuffer(size * n_envs, box, box, n_envs=n_envs)
    steps = ReturnScale()
    for i, reward in enumerate(rewards):
        dones, limits = rng.random((2, n_envs)) < 0.3
        zero = np.zeros((n_envs, 1))
        buffer.add(zero, zero, zero, reward, dones, [{"TimeLimit.truncated": bool(limit)} for limit in limits])
        if i >= n_steps - size:
            # in single precision a tiny bonus would be lost
            steps.observe(np.float64(np.float32(reward)) + bonus, dones & ~limits, 0.9)
    whole = ReturnScale()
    whole.observe_buffer(buffer, 0.9, bonus)
    assert whole.count == steps.count
    assert whole.running == []
    # but for the numbers next to 0, which have few digits
    assert whole.largest == pytest.approx(steps.largest, rel=1e-12, abs=1e-300)
    assert whole.mean == pytest.approx(steps.mean, rel=1e-9, abs=max(1e-12 * steps.largest, 1e-300))
    assert whole.value == pytest.approx(steps.value, rel=1e-6, abs=1e-300)


class FloatDones(VecEnvWrapper):
    """A simulator of many environments that says with numbers whose episodes have ended."""

    def reset(self):
        return self.venv.reset()

    def step_wait(self):
        obs, rewards, dones, infos = self.venv.step_wait()
        return obs, rewards, dones.astype(np.float32), infos


@pytest.mark.parametrize("algorithm", [SoftQ, SAC])
def test_ends_that_are_numbers(algorithm):
    env = FloatDones(make_vec_env("Pendulum-v1", n_envs=2))
    model = algorithm("MlpPolicy", env, learning_starts=100, policy_kwargs=dict(net_arch=[8]), device="cpu").learn(500)
    assert model.replay_buffer.dones.sum() == 2


def test_saved_and_loaded(tmp_path):
    model = small().learn(100)
    model.save(tmp_path / "agent")
    for trusted in (True, False):
        loaded = SoftQ.load(tmp_path / "agent", env=model.get_env(), trusted=trusted)
        assert loaded.returns == model.returns
        assert loaded.returns.is_raw
        assert th.equal(loaded.critic.return_scale, model.critic.return_scale)
        loaded.learn(30, reset_num_timesteps=False)
        assert loaded.returns.count == 130
