"""Pusher2D: geometry, reward and contact of the arm with the puck."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import sb3_softq  # noqa: F401
from sb3_softq.envs.pusher import Pusher2DEnv
from sb3_softq.plots import draw_pusher, figure_to_array, new_figure


@pytest.mark.parametrize("goal", [(-1.0, None), (None, -1.0), (-1.0, -1.0)])
@pytest.mark.filterwarnings("ignore:.*A Box observation space")
def test_gymnasium_accepts_it(goal):
    env = gym.make("sb3_softq/Pusher2D-v0", goal_x=goal[0], goal_y=goal[1])
    check_env(env.unwrapped, skip_render_check=True)
    env.reset(seed=0)
    ends = [env.step(env.action_space.sample())[2:4] for _ in range(60)]
    assert ends == [(False, False)] * 59 + [(False, True)]


@pytest.mark.parametrize("goal", [(-1.0, None), (None, 0.5), (-1.0, -0.5)])
def test_reward_and_observation(goal):
    env = Pusher2DEnv(*goal)
    obs, _ = env.reset(seed=1)
    for _ in range(20):
        action = env.action_space.sample()
        obs, reward, *_, info = env.step(action)
        angles = env.data.qpos[:3]
        # forward kinematics by hand: links of 0.6, 0.6 and 0.4 metres
        total = np.cumsum(angles)
        fingertip = np.array([[0.6, 0.6, 0.4] @ np.cos(total), [0.6, 0.6, 0.4] @ np.sin(total)])
        np.testing.assert_allclose(obs[9:11], fingertip, atol=1e-6)
        np.testing.assert_allclose(env.arm()[-1], fingertip, atol=1e-6)
        np.testing.assert_allclose(obs[:6], [*np.cos(angles), *np.sin(angles)])
        puck = obs[11:13]
        given = [i for i in range(2) if goal[i] is not None]
        distance = np.sqrt(sum((puck[i] - goal[i]) ** 2 for i in given))
        assert info["distance"] == pytest.approx(distance)
        expected = -distance - 0.5 * max(np.hypot(*(fingertip - puck)) - 0.25, 0) - 0.05 * np.square(action).sum()
        assert reward == pytest.approx(expected, abs=1e-6)


def test_the_hand_slides_the_puck_and_the_other_links_do_not():
    env = Pusher2DEnv(goal_x=-1.0, start_noise=0.0)
    env.reset(seed=0)
    # the hand lies along y = 0 and turns towards the puck beside it
    env.set_state(np.array([0.0, 0.0, 0.0, 1.4, -0.3]), np.zeros(5))
    start = env.puck
    for _ in range(20):
        env.step(np.array([-1.0, 0.0, 0.0]))
    assert start[1] - env.puck[1] > 0.2
    # a puck between shoulder and elbow stays where it is
    env.set_state(np.array([0.0, 0.0, 0.0, 0.3, -0.3]), np.zeros(5))
    for _ in range(20):
        env.step(np.array([-1.0, 0.0, 0.0]))
    np.testing.assert_allclose(env.puck, [0.3, -0.3], atol=1e-6)


def test_the_puck_stays_on_the_table():
    env = Pusher2DEnv(goal_x=-1.0)
    env.reset(seed=0)
    env.set_state(np.array([0.0, 0.0, 0.0, 1.5, 1.5]), np.array([0.0, 0.0, 0.0, 50.0, 50.0]))
    for _ in range(25):
        env.step(np.zeros(3))
    assert (np.abs(env.puck) < 1.7).all()


@pytest.mark.parametrize("goal", [(-1.0, None), (None, -1.0), (-1.0, -1.0)])
def test_drawing(goal):
    env = Pusher2DEnv(*goal)
    env.reset(seed=0)
    pucks, arms = [env.puck], [env.arm()]
    for _ in range(5):
        env.step(np.ones(3))
        pucks.append(env.puck + 0.3)
        arms.append(env.arm())
    figure, axes = new_figure(4.0, 4.0)
    empty = figure_to_array(figure)
    draw_pusher(axes, env, np.stack(pucks), np.stack(arms))
    drawn = figure_to_array(figure)
    assert (drawn != empty).any(axis=2).mean() > 0.02
    # the puck, its way and the goal in their colours
    red, green = np.array([214, 39, 40]), np.array([44, 160, 44])
    assert all((np.abs(drawn - colour.astype(float)).max(axis=2) < 40).any() for colour in (red, green))


def test_seeds():
    first, again, other = (Pusher2DEnv(goal_x=-1.0).reset(seed=seed)[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(), "goal_x=None and goal_y=None"),
        (dict(goal_x=2.0), "goal_x=2.0"),
        (dict(goal_y=float("nan")), "goal_y=nan"),
        (dict(goal_x="left"), "goal_x='left'"),
        (dict(goal_x=-1.0, start_noise=0.5), "start_noise=0.5"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Pusher2DEnv(**kwargs)


def test_x_and_y_play_the_same_role():
    env = Pusher2DEnv(goal_x=-1.0, start_noise=0.0)
    starts = []
    for seed in range(40):
        env.reset(seed=seed)
        starts.append(env.fingertip)
    to_the_right = [start[0] > start[1] for start in starts]
    assert 10 < sum(to_the_right) < 30
    # the mean of one side is the mirror image of the other's
    sides = np.array(to_the_right)
    one, other = np.array(starts)[sides].mean(axis=0), np.array(starts)[~sides].mean(axis=0)
    np.testing.assert_allclose(one, other[::-1], atol=0.08)
