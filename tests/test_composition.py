"""Composition: the sum of frozen critics, a sampler trained on the union of the data."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium.wrappers import TransformReward
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import SimpleMultiObsEnv
from stable_baselines3.common.vec_env import VecNormalize

from sb3_softq import ParticleOptions, SoftQ
from sb3_softq.composition import ComposedSoftQ, compose
from sb3_softq.envs import MultiGoalEnv
from sb3_softq.envs.multi_goal import roll_out
from tests.conftest import flat, small

SETTINGS = dict(learning_starts=20, batch_size=16, buffer_size=300, ent_coef=0.5)


def agent(env="Pendulum-v1", steps=30, policy="MlpPolicy", **kwargs):
    return small(SoftQ, policy, env, **(SETTINGS | kwargs)).learn(steps)


def test_q_is_the_weighted_sum_and_frozen():
    agents = [agent(), agent(seed=1, policy_kwargs=dict(net_arch=[5, 6], n_critics=3))]
    rng = np.random.default_rng(0)
    obs, actions = rng.normal(size=(7, 3)).astype(np.float32), rng.uniform(-2, 2, size=(7, 4, 1)).astype(np.float32)
    expected = 2.0 * agents[0].q_values(obs, actions) - 0.5 * agents[1].q_values(obs, actions)
    before = [flat(a.policy) for a in agents]
    model = compose(agents, weights=[2.0, -0.5], gradient_steps=20)
    np.testing.assert_allclose(model.q_values(obs, actions), expected, rtol=1e-4, atol=1e-5)
    for a, parameters in zip(agents, before, strict=True):
        assert th.equal(flat(a.policy), parameters)
    assert model.ent_coef == 0.5
    # the other ways of asking work too
    assert np.isfinite(model.soft_value(obs)).all()
    assert model.predict(obs, deterministic=True)[0].shape == (7, 1)


def test_the_actor_learns_from_the_union():
    agents = [
        agent(),
        agent(make_vec_env("Pendulum-v1", n_envs=3), steps=60, seed=1),
        agent(optimize_memory_usage=True, replay_buffer_kwargs={"handle_timeout_termination": False}),
    ]
    model = compose(agents, gradient_steps=1)
    assert model.replay_buffer.size() == 30 + 60 + 30
    union = {tuple(obs) for obs in model.replay_buffer.observations[:, 0]}
    for a in agents:
        observations = a.replay_buffer.observations[: a.replay_buffer.size()].reshape(-1, 3)
        assert {tuple(obs) for obs in observations.astype(model.replay_buffer.observations.dtype)} <= union
    data = model.replay_buffer.sample(100)
    assert data.next_observations.shape == (100, 3)
    assert th.isfinite(data.next_observations).all()


def test_several_environments():
    first = agent(make_vec_env("Pendulum-v1", n_envs=2), steps=40)
    model = compose([first, agent(steps=31, seed=1)], gradient_steps=1)
    # 71 transitions, two in each row
    assert model.n_envs == 2
    assert model.replay_buffer.observations.shape == (35, 2, 3)
    np.testing.assert_array_equal(model.replay_buffer.observations[:20], first.replay_buffer.observations[:20])
    assert model.learn(10).num_timesteps == 10
    one = compose([first, agent(seed=1)], gradient_steps=1, env=gym.make("Pendulum-v1"))
    assert one.n_envs == 1
    assert one.learn(10).num_timesteps == 10


def test_save_load_and_compose_again(tmp_path):
    model = compose([agent(), agent(seed=1)], gradient_steps=5)
    model.save(tmp_path / "model")
    loaded = ComposedSoftQ.load(tmp_path / "model", device="cpu")
    obs = np.ones((2, 3), dtype=np.float32)
    np.testing.assert_array_equal(loaded.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0])
    np.testing.assert_array_equal(loaded.q_values(obs, np.ones((2, 1))), model.q_values(obs, np.ones((2, 1))))
    other = compose([agent(seed=3), agent(seed=4)], gradient_steps=1)
    other.set_parameters(model.get_parameters())
    np.testing.assert_array_equal(other.q_values(obs, np.ones((2, 1))), model.q_values(obs, np.ones((2, 1))))
    twice = compose([model, agent(seed=2)], gradient_steps=1)
    np.testing.assert_allclose(
        twice.q_values(obs, np.ones((2, 1))),
        model.q_values(obs, np.ones((2, 1))) + agent(seed=2).q_values(obs, np.ones((2, 1))),
        rtol=1e-4,
        atol=1e-5,
    )


def test_it_can_go_on_in_the_environment():
    model = compose([agent(), agent(seed=1)], gradient_steps=2)
    q = model.q_values(np.ones((1, 3), dtype=np.float32), np.ones((1, 1)))
    actor = flat(model.actor)
    model.learn(30)
    assert not th.equal(actor, flat(model.actor))
    np.testing.assert_array_equal(q, model.q_values(np.ones((1, 3), dtype=np.float32), np.ones((1, 1))))


def test_it_logs_where_it_is_told_to(tmp_path, capsys):
    model = compose([agent(), agent(seed=1)], gradient_steps=4.0, policy_delay=2, verbose=1, tensorboard_log=str(tmp_path))
    assert "actor_loss" in capsys.readouterr().out
    model.learn(210, log_interval=1)
    assert "ep_rew_mean" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ComposedSoftQ_1", "compose_1"]


@pytest.mark.parametrize("name", ["tau", "gamma", "n_value_particles", "target_update_interval", "n_steps", "buffer_size"])
def test_what_it_does_not_ask_for_is_refused(name):
    with pytest.raises(ValueError, match=f"{name}=1 is not allowed: it must be left out, the (critics|replay buffer)"):
        compose([agent(), agent(seed=1)], gradient_steps=1, policy_kwargs=None, **{name: 1})


def test_dict_observations():
    env = SimpleMultiObsEnv(discrete_actions=False)
    agents = [agent(env, policy="MultiInputPolicy", seed=i, policy_kwargs=dict(net_arch=[4])) for i in range(2)]
    model = compose(agents, gradient_steps=2)
    assert model.replay_buffer.size() == 60
    assert env.action_space.contains(model.predict(env.observation_space.sample())[0])


def test_two_agents_agree_on_the_common_goal():
    def learn(goals):
        env = gym.make("sb3_softq/MultiGoal-v0", goals=goals)
        settings = dict(ent_coef=10.0, learning_rate=1e-3, learning_starts=100, batch_size=64, buffer_size=10_000, tau=0.01)
        return small(env=env, policy_kwargs=dict(net_arch=[64, 64]), **settings).learn(1_000)

    right, up, down = (5.0, 0.0), (0.0, 5.0), (0.0, -5.0)
    both = compose([learn([right, up]), learn([right, down])], gradient_steps=300)
    goals = roll_out(both, MultiGoalEnv([right, up, down]), 50)[1]
    assert (goals == 0).mean() > 0.8


def no_buffer():
    model = agent(seed=1)
    model.replay_buffer = None
    return model


@pytest.mark.parametrize(
    ("other", "kwargs", "message"),
    [
        (lambda: agent("MountainCarContinuous-v0"), {}, r"observation_space of agents\[1\] is .*: they must be the same"),
        (lambda: agent(ent_coef=0.4), {}, r"ent_coef of agents\[1\] is 0.4, that of agents\[0\] 0.5: they must be the same"),
        (no_buffer, {}, r"agents\[1\] has no replay buffer .*load_replay_buffer"),
        (lambda: agent(VecNormalize(make_vec_env("Pendulum-v1"))), {}, r"agents\[1\] has its own VecNormalize"),
        (lambda: 3, {}, r"agents\[1\]=3 is not allowed: it must be a SoftQ"),
        (agent, {"weights": [1.0]}, r"weights=\[1.0\] is not allowed: it must hold one number for each of 2 agents"),
        (agent, {"weights": [1.0, np.nan]}, r"weights\[1\]=nan is not allowed"),
        (agent, {"gradient_steps": 0}, "gradient_steps=0 is not allowed"),
        (agent, {"nonsense": 0}, "nonsense"),
        (agent, {"buffer_size": 5}, "buffer_size=5 is not allowed: it must be left out, the replay buffer"),
        (agent, {"env": VecNormalize(make_vec_env("Pendulum-v1"))}, "env=.* is not allowed: it must be without VecNormalize"),
    ],
)
def test_agents_that_do_not_fit(other, kwargs, message):
    with pytest.raises((ValueError, TypeError), match=message):
        compose([agent(), other()], **kwargs)


def test_one_agent_is_not_enough():
    with pytest.raises(ValueError, match=r"agents=.* is not allowed: it must hold at least two"):
        compose([agent()])


def test_another_temperature_can_be_given():
    assert compose([agent(), agent(ent_coef=0.4)], gradient_steps=1, ent_coef=0.2).ent_coef == 0.2


def test_a_learned_temperature_begins_in_units_of_the_agents_returns():
    env = TransformReward(gym.make("Pendulum-v1"), lambda reward: 100 * reward)
    agents = [small(env=env, seed=seed).learn(60) for seed in (0, 1)]
    scale = sum(2 * agent.critic.return_scale.item() for agent in agents)
    composed = compose(agents, [2, -2], gradient_steps=1, ent_coef="auto_0.5", ent_coef_learning_rate=1e-9, batch_size=8)
    assert composed.ent_coef_tensor.item() == pytest.approx(0.5 * scale, rel=1e-4)
    assert scale > 100


def test_what_the_actor_is_trained_with_is_the_first_agents():
    policy_kwargs = dict(net_arch=[8], optimizer_class=th.optim.SGD, optimizer_kwargs=dict(momentum=0.5))
    agents = [small(env="Pendulum-v1", ent_coef=0.1, bfloat16=True, policy_kwargs=policy_kwargs).learn(40) for _ in range(2)]
    composed = compose(agents, gradient_steps=2, env="Pendulum-v1", batch_size=8)
    assert type(composed.actor.optimizer) is th.optim.SGD
    assert composed.actor.optimizer.defaults["momentum"] == 0.5
    assert composed.bfloat16
    assert composed.get_env().num_envs == 1


def test_particle_options_of_the_first_agent():
    """But for those of its own training: how it was annealed, and where its soft value looked."""
    options = dict(kernel="delta", n_actor_states=5, annealing=1.0, proposal="uniform")
    both = compose([agent(particle_options=options), agent(seed=1)], gradient_steps=5)
    assert both.particle_options == ParticleOptions(kernel="delta", n_actor_states=5)
    given = compose([agent(), agent(seed=1)], gradient_steps=5, particle_options=options)
    assert given.particle_options == ParticleOptions(**options)
