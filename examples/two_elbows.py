"""
A robot arm that can be at each place with its elbow on either side: does one policy know both, and what if the elbow no
longer bends to the side that it prefers?

    pip install -e ".[extra,benchmark]"
    python examples/two_elbows.py         # examples/results/two_elbows.png, two_elbows.csv

The arm is MuJoCo's Reacher with a position controller. An action is the angles that both joints are to have half a second
later, and the reward minus the distance from the hand to a goal then: inverse kinematics, which has two solutions and is
learned from what happens. Each agent is asked for 25 stochastic actions at each of 12 goals; then its more frequent elbow is
locked, which it has not seen in training, and it is asked again, at once and after some more steps. What is finished lies in
--logs, so that a second call goes on; several calls at once take different --seeds or --algos.
"""

import argparse
import itertools
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch as th
from cooling import go_on
from filming import film
from finished import finished, table
from matplotlib.colors import to_rgba
from matplotlib.patches import Circle
from peers import ALGORITHMS, compiled, parser_of
from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_softq.plots import new_figure

OUT = Path(__file__).parent / "results" / "two_elbows.png"
# The same for all
SETTINGS: dict[str, Any] = dict(learning_starts=1000, buffer_size=100_000, device="cpu")
# Metres: lengths of both links, distance of a goal from the shoulder, and from the hand that is there
LINKS, NEAREST, FARTHEST, ARRIVED = (0.1, 0.11), 0.06, 0.18, 0.03
REWARD = 50.0  # for a metre
# Radians of both joints
REACH = np.array([np.pi, 2.8], dtype=np.float32)
# Simulated steps of 0.02 s that an action takes
N_STEPS = 25
N_ATTEMPTS = 5
GOALS = 0.12 * np.stack([np.cos(x := np.arange(12) * np.pi / 6), np.sin(x)], axis=1)
SIDES = ("left", "right")
ELBOW_COLOURS = ("tab:blue", "tab:orange")


class Arm(gym.Wrapper):
    """
    The arm lies stretched out, a goal is shown, and one action is where it is to go. ``reset(options={"goal": (x, y)})`` sets
    the goal, which is anywhere around the shoulder otherwise.

    :param locked: Side of the arm, seen from the shoulder, to which the elbow cannot go
    """

    def __init__(self, locked: str | None = None):
        super().__init__(gym.make("Reacher-v5").unwrapped)
        self.action_space = gym.spaces.Box(-REACH, REACH)
        # an elbow on the left has the hand turned to the right, by a negative angle
        low, high = {None: (-3.0, 3.0), "left": (0.0, 3.0), "right": (-3.0, 0.0)}[locked]
        self.unwrapped.model.joint("joint1").range[:] = low, high  # type: ignore[attr-defined]
        self.qpos: list[np.ndarray] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        _, info = self.env.reset(seed=seed)
        arm: Any = self.unwrapped
        goal = (options or {}).get("goal")
        if goal is None:
            angle, distance = arm.np_random.uniform(-np.pi, np.pi), arm.np_random.uniform(NEAREST, FARTHEST)
            goal = distance * np.array([np.cos(angle), np.sin(angle)])
        arm.set_state(np.array([0.0, 0.0, *goal]), np.zeros(4))
        self.qpos = [arm.data.qpos.copy()]
        return arm._get_obs(), info

    def step(self, action: Any) -> Any:
        arm: Any = self.unwrapped
        for _ in range(N_STEPS):
            error = action - arm.data.qpos[:2]
            # the shoulder turns round, the elbow does not
            error[0] = (error[0] + np.pi) % (2 * np.pi) - np.pi
            obs, _, _, _, info = self.env.step(np.clip(0.5 * error - 0.095 * arm.data.qvel[:2], -1.0, 1.0))
            self.qpos.append(arm.data.qpos.copy())
        distance = float(np.linalg.norm(obs[8:10]))
        info["success"] = distance < ARRIVED
        return obs, -REWARD * distance, True, False, info


class Reaches(NamedTuple):
    """
    What actions did at each goal.

    :param arrived: Whether the hand was at the goal, shape (n_goals, n_actions)
    :param angles: Of both joints at the end, radians, shape (n_goals, n_actions, 2)
    :param actions: What was asked for, radians, same shape
    """

    arrived: np.ndarray
    angles: np.ndarray
    actions: np.ndarray

    def shares(self) -> np.ndarray:
        """Of the actions at each goal, which arrived with the elbow on the left, on the right; shape (n_goals, 2)."""
        left = self.angles[..., 1] < 0.0
        return np.stack([(self.arrived & left).mean(axis=1), (self.arrived & ~left).mean(axis=1)], axis=1)

    def within(self, n_attempts: int) -> float:
        """Of as many independent actions at a goal at least one arrives: how often, over all that were asked for."""
        n = self.arrived.shape[1] // n_attempts * n_attempts
        return float(self.arrived[:, :n].reshape(len(self.arrived), -1, n_attempts).any(axis=2).mean())


def reach(agent: BaseAlgorithm, arm: Arm, n_actions: int) -> Reaches:
    """Stochastic actions of an agent at each goal, each from the same state."""
    results: list[Any] = []
    for goal in GOALS:
        obs, _ = arm.reset(seed=10_000, options={"goal": goal})
        actions, _ = agent.predict(np.repeat(obs[None], n_actions, axis=0), deterministic=False)
        for action in actions:
            arm.reset(options={"goal": goal})
            *_, info = arm.step(action)
            results.append((info["success"], arm.qpos[-1][:2], action))
    arrived, angles, chosen = (np.array(x).reshape(len(GOALS), n_actions, -1) for x in zip(*results, strict=True))
    return Reaches(arrived[..., 0], angles, chosen)


def evaluate(name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One agent: what it does with both elbows, and with the one that it prefers locked."""
    cls, kwargs = ALGORITHMS[name]
    settings = SETTINGS | kwargs | compiled(name, args.compile)
    agent = cls("MlpPolicy", Arm(), ent_coef=args.ent_coef, seed=seed, **settings).learn(args.steps)
    before = reach(agent, Arm(), args.actions)
    locked = SIDES[int(before.shares().mean(axis=0).argmax())]
    at_once = reach(agent, Arm(locked), args.actions)
    go_on(agent, Arm(locked), args.more)
    after = reach(agent, Arm(locked), args.actions)
    left, right = before.shares().mean(axis=0)
    return dict(
        arrived=round(float(before.arrived.mean()), 3),
        left=round(float(left), 3),
        right=round(float(right), 3),
        both=int((before.shares().min(axis=1) >= 0.2).sum()),
        locked=locked,
        at_once=round(float(at_once.arrived.mean()), 3),
        attempts=round(at_once.within(N_ATTEMPTS), 3),
        after=round(float(after.arrived.mean()), 3),
        angles=before.angles.round(3).tolist(),
        locked_angles=at_once.angles.round(3).tolist(),
        actions=before.actions.round(3).tolist(),
    )


def main() -> None:
    parser = parser_of(__doc__, OUT, [0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=15_000, help="of training")
    parser.add_argument("--more", type=int, default=2_500, help="further steps with an elbow locked")
    parser.add_argument("--actions", type=int, default=25, help=f"at each goal, at least {N_ATTEMPTS}")
    parser.add_argument("--ent-coef", type=float, default=0.2, help="temperature of all agents")
    parser.add_argument("--gif", type=Path, metavar="FILE", help="film the first agent here (without a screen: MUJOCO_GL=egl)")
    args = parser.parse_args()
    if args.actions < N_ATTEMPTS:
        parser.error(f"--actions {args.actions} is not allowed: it must be at least {N_ATTEMPTS}")
    th.set_num_threads(1)

    results = {}
    for seed, name in itertools.product(args.seeds, args.algos):
        given = {key: getattr(args, key) for key in ("steps", "more", "actions", "ent_coef")}
        result = finished(args.logs / f"{name}_{seed}.json", given, partial(evaluate, name, seed, args))
        line = "left {left:.0%}, right {right:.0%}, both at {both} of {n} goals; {locked} locked: {at_once:.0%} at once, "
        line += "{attempts:.0%} in {n_attempts} attempts, {after:.0%} after more steps"
        print(f"seed {seed}, {name}: {line.format(n=len(GOALS), n_attempts=N_ATTEMPTS, **result)}", flush=True)
        results[name, seed] = result
    columns = ("arrived", "left", "right", "both", "locked", "at_once", "attempts", "after")
    names = [*columns[:-2], f"in_{N_ATTEMPTS}_attempts", f"after_{args.more}"]
    with table(args.out.with_suffix(".csv"), ["seed", "algo", *names]) as write:
        for (name, seed), result in results.items():
            write([seed, name, *(result[key] for key in columns)])
    draw({name: results[name, args.seeds[0]] for name in args.algos}, args.out)
    print(args.out)
    if args.gif:
        film_reaches(np.array(results[args.algos[0], args.seeds[0]]["actions"]), args.gif)


def draw(results: dict[str, dict[str, Any]], out: Path) -> None:
    """Of each algorithm the arm after each action, at every other goal; below, with the elbow locked that it prefers."""
    figure, axes = new_figure(3.2 * len(results), 6.6, len(results), 2)
    for column, (name, result) in zip(np.atleast_2d(axes.T), results.items(), strict=True):
        draw_arms(column[0], np.array(result["angles"]))
        column[0].set_title("{}: {left:.0%} left, {right:.0%} right".format(name, **result))
        draw_arms(column[1], np.array(result["locked_angles"]))
        column[1].set_title("{locked} elbow locked: {at_once:.0%} arrive".format(**result))
    figure.tight_layout()
    figure.savefig(out)


def draw_arms(axes: Any, angles: np.ndarray) -> None:
    """The arm from above, at every other goal; a colour for each elbow."""
    for goal, joints in zip(GOALS[::2], angles[::2], strict=True):
        shoulder, hand = joints[:, 0], joints.sum(axis=1)
        elbow = LINKS[0] * np.stack([np.cos(shoulder), np.sin(shoulder)])
        end = elbow + LINKS[1] * np.stack([np.cos(hand), np.sin(hand)])
        arms = np.stack([np.zeros_like(elbow), elbow, end], axis=2).swapaxes(0, 1)
        for (x, y), right in zip(arms, joints[:, 1] > 0.0, strict=True):
            axes.plot(x, y, color=ELBOW_COLOURS[int(right)], alpha=0.3, linewidth=1.0)
        axes.add_patch(Circle(tuple(goal), ARRIVED, fill=False, color="0.3", zorder=3))
    axes.set(xlim=(-0.2, 0.2), ylim=(-0.2, 0.2), aspect="equal", xticks=[], yticks=[])


def film_reaches(actions: np.ndarray, path: Path) -> None:
    """At every third goal, one goal after the other, all actions at once, those of each elbow in a colour."""
    arm, qpos = Arm(), []
    for goal, chosen in zip(GOALS[::3], actions[::3], strict=True):
        for action in chosen:
            arm.reset(options={"goal": goal})
            arm.step(action)
            # every second state, and a rest at the end
            qpos.append(arm.qpos[::2] + arm.qpos[-1:] * 12)
    n_goals, n_actions = len(GOALS[::3]), actions.shape[1]
    # (n_goals, n_actions, n_frames, nq)
    frames = np.array(qpos).reshape(n_goals, n_actions, -1, len(arm.qpos[0]))
    colours = np.array([to_rgba(colour) for colour in ELBOW_COLOURS])[(actions[::3, :, 1] > 0.0).astype(int)]
    model = arm.unwrapped.model  # type: ignore[attr-defined]
    model.vis.headlight.ambient[:] = 0.5
    model.geom("target").rgba[:], model.geom("target").size[0] = (0.9, 0.1, 0.1, 1.0), 0.014
    film(
        path,
        model,
        np.concatenate(frames, axis=1),
        "body0",
        np.concatenate(np.repeat(colours[:, :, None], frames.shape[2], axis=2), axis=1),
        dict(distance=0.55, azimuth=90.0, elevation=-90.0),
        fps=20.0,
    )


if __name__ == "__main__":
    main()
