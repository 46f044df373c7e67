"""Pusher2D: a three-joint arm slides a puck over a table."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import mujoco
import numpy as np
from gymnasium import spaces
from gymnasium.envs.mujoco import MujocoEnv
from numpy.typing import NDArray

from sb3_softq.checks import check_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TABLE = 1.5
PUCK_START = np.array([-0.55, -0.55])
# Where the fingertip is near enough: reward for less would have the hand hug the puck, and move it where no goal asks to
NEAR = 0.25
# Angles that put the fingertip beyond the puck, seen from the goals at -1, and near enough for random torques to touch it
ARM_START = np.array([1.60, 2.45, 1.01])


class Pusher2DEnv(MujocoEnv):
    """
    A three-joint arm slides a puck to where ``goal_x`` and ``goal_y`` say; a coordinate that is None is free, as for the
    skills composed in https://arxiv.org/abs/1803.06773. The reward is

        r = -|puck - goal| - 0.5 max(|fingertip - puck| - 0.25, 0) - 0.05 |a|^2,

    the first distance over the coordinates that are given. Registered as ``sb3_softq/Pusher2D-v0`` with 60 steps of 0.1
    seconds; nothing ends an episode early. Action: torques of shoulder, elbow and wrist in [-1, 1]. Observation, shape (15,):
    cosines and sines of the joints' angles, their velocities, then fingertip, puck and velocity of the puck, x and y of each.
    ``info``: ``distance``, of the puck to the goal. The arm starts bent to one side or the other: x and y play the same role.

    :param goal_x: Goal of the puck's x in metres, between -1.5 and 1.5, or None
    :param goal_y: Goal of the puck's y, likewise
    :param start_noise: Half the width of the square in which the puck starts, in metres, from 0 to 0.3
    :param kwargs: Of ``MujocoEnv``, for example ``render_mode``
    :raises ValueError: if both goals are None, or a goal is not on the table
    """

    metadata: dict[str, Any] = {"render_modes": ["human", "rgb_array", "depth_array", "rgbd_tuple"], "render_fps": 10}  # noqa: RUF012

    def __init__(self, goal_x: float | None = None, goal_y: float | None = None, start_noise: float = 0.3, **kwargs: Any):
        if goal_x is None and goal_y is None:
            raise ValueError("goal_x=None and goal_y=None is not allowed: give at least one coordinate")
        for name, value in (("goal_x", goal_x), ("goal_y", goal_y)):
            if value is not None:
                check_number(name, value, -TABLE, TABLE)
        check_number("start_noise", start_noise, 0.0, 0.3)
        self.goal_x, self.goal_y, self.start_noise = goal_x, goal_y, start_noise
        super().__init__(
            str(Path(__file__).parent / "assets" / "pusher2d.xml"),
            frame_skip=10,
            observation_space=spaces.Box(-np.inf, np.inf, (15,), dtype=np.float64),
            camera_name="above",
            **kwargs,
        )

    @property
    def fingertip(self) -> NDArray[np.float64]:
        """Position of the fingertip, shape (2,)."""
        return self.data.site("fingertip").xpos[:2].copy()

    @property
    def puck(self) -> NDArray[np.float64]:
        """Position of the puck, shape (2,)."""
        return self.data.qpos[3:].copy()

    def arm(self) -> NDArray[np.float64]:
        """
        :return: Positions of shoulder, elbow, wrist and fingertip, shape (4, 2)
        """
        joints = [self.data.body(name).xpos[:2] for name in ("upper_arm", "forearm", "hand")]
        return np.stack([*joints, self.fingertip])

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float64], np.float64, bool, bool, dict[str, np.float64]]:
        action = np.clip(np.asarray(action, dtype=np.float64), -1.0, 1.0)
        self.do_simulation(action, self.frame_skip)
        # positions of the links belong to the state before the last step of MuJoCo
        mujoco.mj_kinematics(self.model, self.data)
        offsets = [x - goal for x, goal in zip(self.puck, (self.goal_x, self.goal_y), strict=True) if goal is not None]
        distance = np.float64(np.linalg.norm(offsets))
        reach = max(np.linalg.norm(self.fingertip - self.puck) - NEAR, 0.0)
        reward = np.float64(-distance - 0.5 * reach - 0.05 * np.square(action).sum())
        if self.render_mode == "human":
            self.render()
        return self._observation(), reward, False, False, {"distance": distance}

    def reset_model(self) -> NDArray[np.float64]:
        while True:
            arm = ARM_START + self.np_random.uniform(-0.2, 0.2, size=3)
            if self.np_random.random() < 0.5:
                # its mirror image in the diagonal x = y
                arm = np.array([0.5 * np.pi, 0.0, 0.0]) - arm
            puck = PUCK_START + self.np_random.uniform(-self.start_noise, self.start_noise, size=2)
            self.set_state(np.concatenate([arm, puck]), np.zeros(5))
            # not in one another
            if self.data.ncon == 0:
                break
        return self._observation()

    def _observation(self) -> NDArray[np.float64]:
        angles, velocities = self.data.qpos[:3], self.data.qvel
        return np.concatenate([np.cos(angles), np.sin(angles), velocities[:3], self.fingertip, self.puck, velocities[3:]])

    def draw(self, axes: "Axes", pucks: NDArray[np.float64], arms: NDArray[np.float64]) -> None:
        """
        The path of the puck, seen from above, with the arm at the beginning (grey) and at the end, and the goal: a point, or
        the line of all points that have the coordinate that is given.

        :param axes: Where to draw
        :param pucks: Positions of the puck, shape (n_steps, 2)
        :param arms: Positions of the joints and the fingertip, shape (n_steps, 4, 2)
        """
        from matplotlib.patches import Circle

        if self.goal_x is not None and self.goal_y is not None:
            axes.plot(self.goal_x, self.goal_y, "*", color="tab:green", markeredgecolor="white", markersize=16, zorder=6)
        elif self.goal_x is not None:
            axes.axvline(self.goal_x, color="tab:green", linestyle="--", zorder=1)
        elif self.goal_y is not None:
            axes.axhline(self.goal_y, color="tab:green", linestyle="--", zorder=1)
        for i, colour, alpha in ((0, "0.6", 0.5), (-1, "tab:blue", 0.8)):
            axes.plot(*arms[i].T, "o-", color=colour, alpha=alpha, linewidth=4, markersize=5, solid_capstyle="round", zorder=2)
            axes.add_patch(Circle((pucks[i][0], pucks[i][1]), 0.12, color="tab:red", alpha=alpha, zorder=3))
        axes.plot(*pucks.T, color="tab:red", linewidth=1.5, zorder=4)
        axes.set(xlim=(-1.7, 0.9), ylim=(-1.7, 0.9), aspect="equal")
