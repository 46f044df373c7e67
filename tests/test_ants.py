"""The ant of the examples: its symmetry in MuJoCo's physics, how it is paid, and walls that it cannot pass."""

import importlib
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

EXAMPLES = Path(__file__).parents[1] / "examples"
angles = st.floats(-np.pi, np.pi)


@pytest.fixture(scope="module")
def modules():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield {name: importlib.import_module(name) for name in ("running_ant", "ant_maze", "any_direction", "four_gates")}


@pytest.fixture(scope="module")
def ant():
    return gym.make("Ant-v5", include_cfrc_ext_in_observation=False).unwrapped


def rotation(quaternion):
    return Rotation.from_quat(quaternion, scalar_first=True)


@given(angles, st.floats(-0.5, 0.5), st.floats(-0.5, 0.5), angles)
@settings(deadline=None)
def test_quaternions(modules, yaw, pitch, roll, angle):
    """Against SciPy."""
    running_ant = modules["running_ant"]
    quaternion = Rotation.from_euler("ZYX", [yaw, pitch, roll]).as_quat(scalar_first=True)
    assert np.cos(running_ant.heading(quaternion) - yaw) == pytest.approx(1.0)
    about_z = Rotation.from_euler("Z", angle)
    product = running_ant.product(running_ant.about_z(angle), quaternion)
    assert (rotation(product) * (about_z * rotation(quaternion)).inv()).magnitude() == pytest.approx(0.0, abs=1e-7)
    vector = np.array([1.0, -2.0, 3.0])
    np.testing.assert_allclose(running_ant.turned(vector, angle), about_z.apply(vector))
    assert running_ant.is_upright(quaternion)
    on_its_back = (rotation(quaternion) * Rotation.from_euler("X", np.pi)).as_quat(scalar_first=True)
    assert not running_ant.is_upright(on_its_back)


@given(st.integers(0, 2**31), st.integers(0, 3), angles, angles)
@settings(deadline=None, max_examples=20)
def test_a_quarter_turn_of_the_ant_is_the_ant(modules, ant, seed, n_quarters, turn, direction):
    """
    The same posture with the legs renamed and all turned, the same torques by the gait: MuJoCo moves both alike, so that the
    gait sees the same.
    """
    running_ant, rng = modules["running_ant"], np.random.default_rng(seed)
    # legs are at 45, 135, 225 and 315 degrees; the hinges of ankles, by the model, along the tangent or against it
    tangents = np.array([[-1, 1], [-1, -1], [1, -1], [1, 1]])
    axes = np.array([ant.model.joint(f"ankle_{leg}").axis[:2] for leg in (1, 2, 3, 4)])
    signs = np.sign((axes * tangents).sum(axis=1))
    order = np.roll(np.arange(4), -n_quarters)
    by_leg = np.stack([np.ones(4), signs * signs[order]], axis=1)
    yaw = rng.uniform(-np.pi, np.pi)
    lean = Rotation.from_euler("XY", rng.uniform(-0.2, 0.2, 2))
    postures = []
    for world, quarters in ((0.0, 0), (turn, n_quarters)):
        orientation = Rotation.from_euler("Z", world + yaw) * lean * Rotation.from_euler("Z", quarters * np.pi / 2)
        postures.append(orientation.as_quat(scalar_first=True))
    joints = ant.init_qpos[7:] + rng.uniform(-0.1, 0.1, 8)
    renamed = (joints.reshape(4, 2)[order] * by_leg).ravel()
    torques = rng.uniform(-1.0, 1.0, (20, 8))
    seen, chosen_quarters = [], []
    for orientation, angles_of_joints, world in ((postures[0], joints, 0.0), (postures[1], renamed, turn)):
        ant.reset(seed=0)
        ant.set_state(np.concatenate([[0.0, 0.0, 0.75], orientation, angles_of_joints]), np.zeros(14))
        obs = ant._get_obs()
        seen.append([])
        chosen_quarters.append([])
        for chosen in torques:
            ant_turned = running_ant.Turn(obs, direction + world)
            seen[-1].append(ant_turned.observation(obs))
            chosen_quarters[-1].append(ant_turned.n_quarters)
            obs, *_ = ant.step(ant_turned.action(chosen))
        # it faces the direction within half of a quarter turn, and what its leaning makes of that
        assert abs(running_ant.heading(seen[-1][0][1:5])) <= np.pi / 4 + 0.05
    # half-way between two of its sides a leaning ant may take either
    alike = [(a - b) % 4 == n_quarters for a, b in zip(*chosen_quarters, strict=True)]
    n = [*alike, False].index(False)
    assume(n >= 5)
    # contacts multiply rounding errors
    np.testing.assert_allclose(seen[0][:5], seen[1][:5], atol=1e-9)
    np.testing.assert_allclose(seen[0][:n], seen[1][:n], atol=1e-4)


def test_speed_in_the_direction_is_paid(modules):
    """Whichever it is: thrown along it, against it and across."""
    ant = modules["running_ant"].RunningAnt()
    directions = set()
    for seed in range(8):
        for angle, speed in ((0.0, 1.0), (0.0, 5.0), (np.pi, 1.0), (np.pi / 2, 1.0)):
            ant.reset(seed=seed)
            direction = ant.turn.direction
            data = ant.unwrapped.data
            data.qvel[:2] = speed * np.array([np.cos(direction + angle), np.sin(direction + angle)])
            before = data.qpos[:2].copy()
            obs, reward, _, _, _ = ant.step(np.zeros(8))
            moved = (data.qpos[:2] - before) @ (np.cos(direction), np.sin(direction)) / 0.05
            assert reward == pytest.approx(1.0 + min(moved, 2.0), abs=0.3)
            assert obs.shape == (27,)
            directions.add(round(float(direction), 3))
    assert len(directions) == 8
    # it changes within two seconds
    ant.reset(seed=0)
    seen = []
    for _ in range(100):
        ant.step(np.zeros(8))
        seen.append(ant.turn.direction)
    assert 3 <= len(set(seen)) <= 6


def test_the_gait_runs_where_it_is_told(modules):
    """The weights that are in the repository."""
    running_ant = modules["running_ant"]
    # standing still returns 500, and falling at once next to nothing
    returns = running_ant.evaluate(running_ant.Gait(), 8)
    assert np.median(returns) > 900


@pytest.mark.parametrize("way", [(3.0, 0.0), (-3.0, 0.0), (0.0, 3.0), (1.5, -2.0)])
def test_it_goes_where_it_decides(modules, way):
    ant = modules["ant_maze"].Ant(seconds=2.5)
    obs, _ = ant.reset(seed=0)
    start = ant.place
    np.testing.assert_allclose(obs[:2], start, rtol=1e-6)
    _, reward, terminated, truncated, _ = ant.step(np.array(way))
    assert np.linalg.norm(ant.place - start - way) < 1.2
    assert reward == pytest.approx(np.linalg.norm(ant.place) - np.linalg.norm(start) - 1.0)
    assert not terminated
    assert not truncated
    np.testing.assert_allclose(ant.track[[0, -1]], [start, ant.place])


@pytest.mark.parametrize("place", ["corridor", "U-turn", "fork"])
def test_places_have_walls_and_an_end(modules, place):
    any_direction = modules["any_direction"]
    ant = any_direction.Ant(any_direction.PLACES[place], 3, seconds=3.0)
    ant.reset(seed=0)
    maze, model, data = ant.maze, ant.unwrapped.model, ant.unwrapped.data
    boxes = {tuple(np.round(pos[:2], 6)) for pos, kind in zip(model.geom_pos, model.geom_type, strict=True) if kind == 6}
    assert boxes == {tuple(maze.centre(cell) - maze.centre(maze.start)) for cell in maze.walls}
    np.testing.assert_allclose(ant.place, maze.centre(maze.start), atol=0.2)
    # thrown at the wall behind it with ten metres a second, and running there, it stays in its cell
    wall = next(cell for cell in maze.walls if np.abs(np.subtract(cell, maze.start)).sum() == 1)
    way = maze.centre(wall) - maze.centre(maze.start)
    way /= np.linalg.norm(way)
    data.qvel[:2] = 10 * way
    for _ in range(2):
        ant.step(5 * way)
    assert (ant.place - maze.centre(maze.start)) @ way < 2.0
    # put next to the goal it is there after one more decision, and paid for the way that this has saved
    ant.reset(seed=0)
    before = ant.distance
    data.qpos[:2] = maze.centre(maze.goals[0]) - maze.centre(maze.start)
    obs, reward, terminated, truncated, info = ant.step(np.array([1.0, 0.0]))
    assert (terminated, truncated, info["success"]) == (True, False, True)
    assert reward == pytest.approx(before - maze.distance(ant.place) - 1.0)
    assert obs[4] == pytest.approx(2 / 3)


@pytest.mark.parametrize(("n_decisions", "ends"), [(1, [True]), (3, [False, False, True])])
def test_an_episode_ends_with_its_decisions(modules, n_decisions, ends):
    ant = modules["ant_maze"].Ant(n_decisions=n_decisions, seconds=0.1)
    obs, _ = ant.reset(seed=0)
    left = [obs[4]]
    ended = []
    for _ in ends:
        obs, reward, terminated, truncated, info = ant.step(np.array([0.2, 0.2]))
        left.append(obs[4])
        ended.append(terminated)
        assert not truncated
        assert not info["success"]
        assert abs(reward + 1.0) < 0.5
    assert ended == ends
    assert left == pytest.approx([1.0 - i / n_decisions for i in range(n_decisions + 1)])


def test_an_ant_that_falls_ends_its_episode(modules):
    ant = modules["ant_maze"].Ant()
    ant.reset(seed=0)
    # on its back
    ant.unwrapped.data.qpos[3:7] = 0.0, 1.0, 0.0, 0.0
    _, _, terminated, _, info = ant.step(np.array([2.0, 0.0]))
    assert terminated
    assert not info["success"]
    assert len(ant.track) == 2


def test_a_gate_can_be_walled_up(modules):
    four_gates = modules["four_gates"]
    for gate, cell in four_gates.GATES.items():
        ant, walled = four_gates.make_ants(1)[0], four_gates.make_ants(1, gate)[0]
        assert set(walled.maze.walls) - set(ant.maze.walls) == {cell}
        goal = ant.maze.centre(cell)
        for some, there in ((ant, gate), (walled, None)):
            some.reset(seed=0)
            some.step(goal.astype(np.float32))
            assert four_gates.through(some) == there
        # whether it arrived or not
        assert four_gates.nearest(ant.place) == four_gates.nearest(walled.place) == gate
