"""
An ant that runs where it is told: the gait of the ants in ``four_gates.py`` and ``any_direction.py``.

    pip install -e ".[onnx]"
    python examples/running_ant.py --compile    # half an hour; replaces examples/results/ant_gait.onnx

The gait is learned once, by SoftQ, as Ant-v5 is, but that the direction in which the ant is paid for running changes every
second or two. A quarter turn of the ant is the ant again, so that the gait has one quarter of all directions to learn: those
around the front of an ant whose front is the side that faces the direction best.
"""

import argparse
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import onnxruntime
import torch as th
from export_onnx import export
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_softq import SoftQ

GAIT = Path(__file__).parent / "results" / "ant_gait.onnx"
# Metres a second: to run faster is worth nothing
FASTEST = 2.0
# Steps of 0.05 s in an episode
N_STEPS = 500
# Ant-v5 counts its legs from the front left one to the left, but has the last one first in its actions. Its first and last
# ankle bend by a positive angle, the others by a negative one
N_LEGS = 4
LEGS_OF_ACTIONS = np.array([3, 0, 1, 2])
ANKLES = np.array([1.0, -1.0, -1.0, 1.0])


def product(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Product of two quaternions (w, x, y, z)."""
    return np.concatenate([[p[0] * q[0] - p[1:] @ q[1:]], p[0] * q[1:] + q[0] * p[1:] + np.cross(p[1:], q[1:])])


def about_z(angle: float) -> np.ndarray:
    """Quaternion of a turn to the left, radians."""
    return np.array([np.cos(angle / 2), 0.0, 0.0, np.sin(angle / 2)])


def turned(vector: np.ndarray, angle: float) -> np.ndarray:
    """A vector of three, turned to the left around the vertical."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([c * vector[0] - s * vector[1], s * vector[0] + c * vector[1], vector[2]])


def heading(quaternion: np.ndarray) -> float:
    """Direction in which a body faces, seen from above, radians."""
    w, x, y, z = quaternion
    return float(np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z)))


def is_upright(quaternion: np.ndarray) -> bool:
    return bool(quaternion[1] ** 2 + quaternion[2] ** 2 < 0.5)


class Turn:
    """
    How an ant that is to run in a direction sees itself: the direction is straight on, and of the four sides of the ant the
    one that faces it best is its front.

    :param obs: Of Ant-v5 without contact forces, shape (27,)
    :param direction: Radians from the x axis to the left
    """

    def __init__(self, obs: np.ndarray, direction: float):
        self.direction = direction
        # quarter turns from Ant-v5's front to that side
        self.n_quarters = round((direction - heading(obs[1:5])) / (np.pi / 2)) % N_LEGS
        self.order = (np.arange(N_LEGS) + self.n_quarters) % N_LEGS
        self.signs = np.stack([np.ones(N_LEGS), ANKLES * ANKLES[self.order]], axis=1)

    def observation(self, obs: np.ndarray) -> np.ndarray:
        """What the gait sees, shape (27,)."""
        quarters = self.n_quarters * np.pi / 2
        orientation = product(product(about_z(-self.direction), obs[1:5]), about_z(quarters))
        # a quaternion and its negative are the same orientation
        orientation = orientation * (1.0 if orientation[0] >= 0 else -1.0)
        joints, speeds = self._joints(obs[5:13]), self._joints(obs[19:27])
        velocity, rotation = turned(obs[13:16], -self.direction), turned(obs[16:19], -quarters)
        return np.concatenate([obs[:1], orientation, joints, velocity, rotation, speeds])

    def action(self, chosen: np.ndarray) -> np.ndarray:
        """The torques that the gait has chosen, on the legs as Ant-v5 counts them, shape (8,)."""
        by_leg = np.empty((N_LEGS, 2), dtype=chosen.dtype)
        by_leg[LEGS_OF_ACTIONS] = chosen.reshape(N_LEGS, 2)
        torques = np.empty_like(by_leg)
        torques[self.order] = by_leg * self.signs
        return torques[LEGS_OF_ACTIONS].ravel()

    def _joints(self, values: np.ndarray) -> np.ndarray:
        return (values.reshape(N_LEGS, 2)[self.order] * self.signs).ravel()


class RunningAnt(gym.Wrapper):
    """
    Ant-v5, paid for its speed in a direction that changes every second or two, which it sees as straight on. An episode ends
    when it falls, or after 25 seconds.
    """

    def __init__(self) -> None:
        super().__init__(gym.make("Ant-v5", include_cfrc_ext_in_observation=False).unwrapped)

    def reset(self, **kwargs: Any) -> Any:
        self.obs, info = self.env.reset(**kwargs)
        self.n_steps = 0
        self.n_more = 0
        return self._see(), info

    def step(self, action: Any) -> Any:
        self.obs, _, fallen, _, info = self.env.step(self.turn.action(action))
        self.n_steps += 1
        speed = info["x_velocity"] * np.cos(self.turn.direction) + info["y_velocity"] * np.sin(self.turn.direction)
        fallen = fallen or not is_upright(self.obs[1:5])
        reward = float(min(speed, FASTEST)) + info["reward_survive"] + info["reward_ctrl"]
        return self._see(), reward, fallen, self.n_steps == N_STEPS, info

    def _see(self) -> np.ndarray:
        ant: Any = self.unwrapped
        if self.n_more == 0:
            self.direction, self.n_more = ant.np_random.uniform(-np.pi, np.pi), ant.np_random.integers(20, 41)
        self.n_more -= 1
        self.turn = Turn(self.obs, self.direction)
        return self.turn.observation(self.obs)


class Gait:
    """
    The actor that was learned: from what an ant sees that is to run straight on, shape (27,), to its torques, shape (8,).

    :param path: File that :func:`main` has written
    """

    def __init__(self, path: Path = GAIT):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(str(path), options)

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        return self.session.run(None, {"obs": obs[None].astype(np.float32)})[0][0]

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[np.ndarray, None]:
        """The torques of each row, shape (n_envs, 8): what ``evaluate_policy`` of Stable-Baselines3 asks of an agent."""
        return np.array([self(row) for row in observation]), None


def evaluate(gait: Gait, n_episodes: int) -> np.ndarray:
    """Returns of episodes in which a step is worth 3 at most: one for standing, and one for each metre a second."""
    env = make_vec_env(RunningAnt, seed=10_000)
    returns, _ = evaluate_policy(gait, env, n_episodes, return_episode_rewards=True)
    return np.array(returns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="faster, the same numbers but for rounding")
    parser.add_argument("--out", type=Path, default=GAIT, help="default: %(default)s")
    args = parser.parse_args()
    th.set_num_threads(1)
    settings: dict[str, Any] = dict(learning_starts=5000, seed=args.seed, compile=args.compile, device="cpu", verbose=1)
    agent = SoftQ("MlpPolicy", RunningAnt(), **settings).learn(args.steps, log_interval=50)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    export(agent.ema_actor, args.out)
    found = evaluate(Gait(args.out), 20)
    print(f"{args.out}: returns {np.mean(found):,.0f} ± {np.std(found):,.0f} in {len(found)} episodes")


if __name__ == "__main__":
    main()
