"""The multi-goal environment, its pictures and callbacks."""

import gymnasium as gym
import imageio.v3 as iio
import numpy as np
import pytest
import torch as th
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3 import SAC
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import VecNormalize

from sb3_softq.callbacks import GoalCallback, PeriodicCallback, PlotCallback
from sb3_softq.envs import MultiGoalEnv
from sb3_softq.envs.multi_goal import GOALS, roll_out
from sb3_softq.plots import draw_multi_goal, figure_to_array, new_figure, plot_level_curves
from tests.conftest import small


class Towards:
    """Stands in for an agent: walks straight to the nearest goal, from the centre to each in turn."""

    device = th.device("cpu")

    def __init__(self, goals):
        self.goals = np.array(goals, dtype=np.float64)

    def predict(self, obs, deterministic=False):
        nearest = np.linalg.norm(obs[:, None] - self.goals, axis=2).argmin(axis=1)
        in_turn = np.arange(len(obs)) % len(self.goals)
        chosen = np.where(np.linalg.norm(obs, axis=1) < 0.6, in_turn, nearest)
        return np.clip(self.goals[chosen] - obs, -1.0, 1.0), None


def test_it_is_a_proper_environment():
    check_env(MultiGoalEnv(render_mode="rgb_array"))
    gymnasium_check_env(gym.make("sb3_softq/MultiGoal-v0", render_mode="rgb_array").unwrapped)


def test_rewards_and_ends():
    env = gym.make("sb3_softq/MultiGoal-v0", start_std=0.0)
    obs, _ = env.reset(seed=0)
    np.testing.assert_array_equal(obs, [0.0, 0.0])
    obs, reward, terminated, truncated, info = env.step(np.array([0.5, 0.0], dtype=np.float32))
    np.testing.assert_allclose(obs, [0.5, 0.0])
    assert reward == pytest.approx(-(4.5**2) - 30 * 0.25)
    assert (terminated, truncated, info["goal"]) == (False, False, -1)
    for _ in range(4):
        obs, reward, terminated, truncated, info = env.step(np.array([1.0, 0.0], dtype=np.float32))
    assert reward == pytest.approx(-(0.5**2) - 30 + 10)
    assert (terminated, info["goal"]) == (True, 0)
    # standing still lasts 30 steps
    env.reset(seed=0)
    ends = [env.step(np.zeros(2, dtype=np.float32))[2:4] for _ in range(30)]
    assert ends == [(False, False)] * 29 + [(False, True)]


def test_options():
    env = MultiGoalEnv(goals=[(3.0, 0.0), (0.0, -6.0)], goal_rewards=[1.0, 7.0], start_std=0.0)
    env.reset(seed=0)
    for _ in range(6):
        _, reward, terminated, _, info = env.step(np.array([0.0, -1.0]))
        if terminated:
            break
    assert (terminated, info["goal"]) == (True, 1)
    assert reward == pytest.approx(-30.0 + 7.0)


def test_an_obstacle_stops_the_point():
    env = MultiGoalEnv(obstacles=[(2.0, -1.0, 2.2, 1.0)], start_std=0.0)
    env.reset(seed=0)
    for _ in range(8):
        obs = env.step(np.array([1.0, 0.0]))[0]
    # also where a step would jump over it
    assert obs[0] <= 2.0
    env.reset(seed=0)
    env.step(np.array([0.0, 1.0]))
    env.step(np.array([0.0, 0.5]))
    for _ in range(3):
        obs = env.step(np.array([1.0, 0.0]))[0]
    np.testing.assert_allclose(obs, [3.0, 1.5])


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(-1, 1)), min_size=1, max_size=40), st.integers(0, 1000))
def test_the_point_stays_in_the_square_and_out_of_obstacles(actions, seed):
    env = MultiGoalEnv(obstacles=[(-3.0, 1.0, 3.0, 2.0)])
    obs, _ = env.reset(seed=seed)
    for action in actions:
        obs, reward, *_ = env.step(np.array(action))
        assert env.observation_space.contains(obs)
        assert np.isfinite(reward)
        assert not (-3.0 < obs[0] < 3.0 and 1.0 < obs[1] < 2.0)


@pytest.mark.parametrize(
    ("kwargs", "name"),
    [
        ({"goals": []}, "goals"),
        ({"goals": [(9.0, 0.0)]}, "goals"),
        ({"goals": [(1.0, 0.0, 0.0)]}, "goals"),
        ({"goals": "north"}, "goals"),
        ({"goal_rewards": [1.0, 2.0]}, "goal_rewards"),
        ({"goal_rewards": np.nan}, "goal_rewards"),
        ({"obstacles": [(1.0, 1.0)]}, "obstacles"),
        ({"obstacles": [(1.0, 1.0, 0.0, 2.0)]}, "obstacles"),
        ({"obstacles": [(3.0, 1.0, 4.0, 2.0), (-1.0, -1.0, 1.0, 1.0)]}, "obstacles"),
        ({"start_std": -1.0}, "start_std"),
        ({"render_mode": "human"}, "render_mode"),
    ],
)
def test_bad_options(kwargs, name):
    with pytest.raises(ValueError, match=f"{name}=.* is not allowed"):
        MultiGoalEnv(**kwargs)


def test_rollouts_know_their_goals():
    paths, goals = roll_out(Towards(GOALS), MultiGoalEnv(), 8)
    np.testing.assert_array_equal(goals, [0, 1, 2, 3] * 2)
    for path, goal in zip(paths, goals, strict=True):
        assert np.linalg.norm(path[-1] - np.array(GOALS[goal])) < 1.0
        assert np.linalg.norm(path[0]) < 1.0
        # it ends where the goal is reached
        assert len(path) <= 7
    paths, goals = roll_out(Towards([(0.0, 0.0)]), MultiGoalEnv(), 3)
    assert (goals == -1).all()
    assert all(len(path) == 31 for path in paths)


def test_goal_callback(tmp_path):
    model = small(env="sb3_softq/MultiGoal-v0")
    model.set_logger(configure(str(tmp_path), ["csv"]))
    callback = GoalCallback(gym.make("sb3_softq/MultiGoal-v0"), freq=10, n_rollouts=8.0)
    model.learn(30, callback)
    assert 0 <= model.logger.name_to_value["multi_goal/success_rate"] <= 1
    # two goals, equally often
    callback.model = Towards(GOALS[:2])
    callback.model.logger = model.logger
    callback._next = 0
    callback._on_step()
    assert model.logger.name_to_value["multi_goal/goals_reached"] == 2
    assert model.logger.name_to_value["multi_goal/entropy"] == pytest.approx(np.log(2))
    assert model.logger.name_to_value["multi_goal/success_rate"] == 1.0


def test_goal_callback_of_another_environment():
    with pytest.raises(ValueError, match=r"env=.* is not allowed: it must be a MultiGoalEnv"):
        GoalCallback(gym.make("Pendulum-v1"))


def test_goal_callback_sees_what_the_agent_sees(monkeypatch):
    env = VecNormalize(make_vec_env("sb3_softq/MultiGoal-v0", n_envs=2))
    model = small(env=env).learn(100)
    seen, predict = [], model.predict
    monkeypatch.setattr(model, "predict", lambda obs, **kwargs: seen.append(obs) or predict(obs, **kwargs))
    paths, _ = roll_out(model, MultiGoalEnv(), 5)
    first = np.stack([path[0] for path in paths]).astype(np.float32)
    np.testing.assert_allclose(seen[0], env.normalize_obs(first), rtol=1e-5)
    assert np.abs(seen[0] - first).max() > 0.1


def test_pictures():
    env = MultiGoalEnv(obstacles=[(2.0, 1.0, 3.0, 4.0)], render_mode="rgb_array")
    env.reset(seed=0)
    before = env.render()
    for _ in range(3):
        env.step(np.array([1.0, -0.5]))
    after = env.render()
    assert before.shape == after.shape == (400, 400, 3)
    assert before.dtype == np.uint8
    # the way is new, the rest is not
    assert 20 < (before != after).any(axis=2).sum() < 4000
    # the obstacle is dark, the square around it is not
    column, row = (int(400 * (2.5 + 7) / 14), int(400 * (7 - 2.5) / 14))
    assert before[row, column].mean() < 100
    assert before[row, int(400 * (4 + 7) / 14)].mean() > 150


def test_rollouts_have_the_colour_of_their_goal():
    figure, axes = new_figure(3, 3)
    paths = roll_out(Towards(GOALS), MultiGoalEnv(), 4)[0] + roll_out(Towards([(0.0, 0.0)]), MultiGoalEnv(), 1)[0]
    draw_multi_goal(axes, MultiGoalEnv(), paths)
    colours = [line.get_color() for line in axes.lines[::2]]
    assert len(set(colours)) == 5
    assert colours[-1] == "0.4"
    assert figure_to_array(figure).shape == (300, 300, 3)


def test_level_curves():
    _, axes = new_figure(3, 3)
    plot_level_curves(axes, small(env="sb3_softq/MultiGoal-v0"), np.zeros(2, dtype=np.float32), n_samples=50, n_grid=10)
    (samples,) = axes.lines
    assert len(samples.get_xdata()) == 50
    assert axes.get_xlim() == (-1.0, 1.0)
    assert not axes.texts
    _, axes = new_figure(3, 3)
    plot_level_curves(axes, small(env="sb3_softq/MultiGoal-v0"), np.zeros(2, dtype=np.float32), n_grid=10, modes=True)
    _, *stars = axes.lines
    assert len(stars) == len(axes.texts) >= 1
    assert {star.get_marker() for star in stars} == {"*"}
    assert 90 <= sum(int(text.get_text().removesuffix("%")) for text in axes.texts) <= 101
    _, axes = new_figure(3, 3)
    plot_level_curves(axes, small(env="Hopper-v5"), np.zeros(11), dims=(2, 0), n_samples=5, n_grid=10)
    assert len(axes.lines[0].get_xdata()) == 5


@pytest.mark.parametrize("dims", [None, (0, 3), (1, 1), (0, 1, 2)])
def test_level_curves_ask_for_two_dimensions(dims):
    _, axes = new_figure(3, 3)
    with pytest.raises(ValueError, match=r"dims=.* with 3 action dimensions: it must name two of them"):
        plot_level_curves(axes, small(env="Hopper-v5"), np.zeros(11), dims=dims)


def test_plot_callback(tmp_path):
    def draw(model):
        figure, axes = new_figure(2, 2)
        draw_multi_goal(axes, MultiGoalEnv(), roll_out(model, MultiGoalEnv(), 3)[0])
        return figure

    callback = PlotCallback(draw, tmp_path / "frames", freq=10)
    SAC("MlpPolicy", "sb3_softq/MultiGoal-v0", learning_starts=5).learn(35, callback)
    assert [path.name for path in callback.frames] == [f"frame_{step:08d}.png" for step in (10, 20, 30)]
    assert iio.imread(tmp_path / "frames" / "animation.gif").shape == (3, 200, 200, 3)
    # of another training that writes over them
    SAC("MlpPolicy", "sb3_softq/MultiGoal-v0", learning_starts=5).learn(25, callback)
    assert iio.imread(tmp_path / "frames" / "animation.gif").shape == (2, 200, 200, 3)


@pytest.mark.parametrize("name", ["PlotCallback", "GoalCallback"])
def test_who_watches_changes_nothing(tmp_path, name):
    def draw(model):
        model.sample_actions(np.zeros(2, dtype=np.float32), 10)
        return new_figure(2, 2)[0]

    watching = PlotCallback(draw, tmp_path, freq=10) if name == "PlotCallback" else GoalCallback(MultiGoalEnv(), 10, 3)
    weights = []
    for callback in (None, watching):
        model = small(env="sb3_softq/MultiGoal-v0", learning_starts=5).learn(35, callback)
        weights.append(th.cat([parameter.flatten() for parameter in model.policy.parameters()]))
    assert th.equal(*weights)


@pytest.mark.parametrize("kwargs", [{"freq": 0}, {"freq": 1.5}, {"fps": 0}])
def test_bad_callbacks(kwargs, tmp_path):
    with pytest.raises(ValueError, match=r"(freq|fps)=.* is not allowed: it must be an integer >= 1"):
        PlotCallback(lambda model: None, tmp_path, **kwargs)


def test_periods_go_on_over_calls_of_learn(tmp_path):
    """As those of Stable-Baselines3's callbacks: calls shorter than a period saw none."""
    steps = []

    class Record(PeriodicCallback):
        def _on_period(self):
            steps.append(self.num_timesteps)

    callback, model = Record(freq=50), small(learning_starts=1000)
    for _ in range(8):
        model.learn(30, callback, reset_num_timesteps=False)
    assert steps == [50, 100, 150, 200]
    # another training counts from its own start
    model.learn(60, callback)
    assert steps == [50, 100, 150, 200, 50]
    del steps[:]
    other = small(learning_starts=1000).learn(500)
    other.learn(120, callback, reset_num_timesteps=False)
    assert steps == [550, 600]
