"""
Demonstrations that act in two ways: 100 episodes of a scripted driver in a ring-shaped maze, who takes either way to the goal.

    pip install -e ".[extra,benchmark,robotics]"
    python examples/demonstrations.py         # examples/results/demonstrations.png, demonstrations.csv

The sampling actor and SAC's Gaussian imitate the same data by the same loss, -log pi(a|s). Asked for actions where the ways
part, the one has both, the other all between them, which nobody has demonstrated; then they drive themselves.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from finished import table
from ring_maze import N_STEPS, Outcome, Ring, draw_paths, roll_out
from stable_baselines3 import SAC
from stable_baselines3.common.utils import update_learning_rate

from sb3_softq import SoftQ
from sb3_softq.data import Trajectory
from sb3_softq.plots import new_figure

OUT = Path(__file__).parent / "results" / "demonstrations.png"
# Corners of the ways, in metres
CORNERS = {"up": [(-2.0, 1.0), (2.0, 1.0), (2.0, 0.0)], "down": [(-2.0, -1.0), (2.0, -1.0), (2.0, 0.0)]}
START = np.array([-2.0, 0.0, 0.0, 0.0])
COLOURS = {"SoftQ": "tab:blue", "SAC": "tab:orange"}
# An action further than this from all that were demonstrated is none of theirs; the box is 2 wide
NEAR = 0.3


def drive(env: Ring, route: str, rng: np.random.Generator) -> Trajectory:
    """One episode along a route, by a controller with some noise."""
    corners = [np.array(corner) for corner in CORNERS[route]]
    obs, _ = env.reset(seed=int(rng.integers(2**31)))
    observations, actions, rewards = [obs], [], []
    for _ in range(N_STEPS):
        if len(corners) > 1 and np.linalg.norm(corners[0] - obs[:2]) < 0.3:
            corners.pop(0)
        # towards a speed of at most two metres a second
        way = corners[0] - obs[:2]
        velocity = 2.0 * way / max(1.0, float(np.linalg.norm(way)))
        action = 0.3 * (velocity - obs[2:]) + 0.05 * rng.standard_normal(2)
        actions.append(np.clip(action, -1.0, 1.0).astype(np.float32))
        obs, reward, *_ = env.step(actions[-1])
        observations.append(obs)
        rewards.append(reward)
    return Trajectory(np.array(observations), np.array(actions), np.array(rewards), terminated=False)


def clone_gaussian(data: list[Trajectory], seed: int, n_updates: int) -> SAC:
    """What ``SoftQ.clone_behaviour`` does, for the actor of SAC."""
    softq = SoftQ("MlpPolicy", Ring(), seed=seed, device="cpu").set_data(data)
    model = SAC("MlpPolicy", Ring(), seed=seed, device="cpu", learning_rate=softq.lr_schedule)
    buffer = softq.logged_data
    assert buffer is not None
    for i in range(n_updates):
        update_learning_rate(model.actor.optimizer, model.lr_schedule(1 - i / n_updates))
        batch = buffer.sample(model.batch_size)
        mean, log_std, kwargs = model.actor.get_action_dist_params(batch.observations)
        distribution = model.actor.action_dist.proba_distribution(mean, log_std, **kwargs)
        loss = -distribution.log_prob(batch.actions.clamp(-0.999, 0.999)).mean()
        model.actor.optimizer.zero_grad()
        loss.backward()
        model.actor.optimizer.step()
    return model


def clone_sampler(data: list[Trajectory], seed: int, n_updates: int) -> SoftQ:
    return SoftQ("MlpPolicy", Ring(), seed=seed, device="cpu").set_data(data).clone_behaviour(n_updates)


ACTORS: dict[str, Callable[[list[Trajectory], int, int], Any]] = {"SoftQ": clone_sampler, "SAC": clone_gaussian}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demonstrations", type=int, default=100, help="episodes of the driver")
    parser.add_argument("--updates", type=int, default=3_000)
    parser.add_argument("--episodes", type=int, default=100, help="of each actor")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=OUT, help="file of the figure; the numbers are in a .csv beside it")
    args = parser.parse_args()
    th.set_num_threads(1)

    pictures: dict[str, tuple[Outcome, np.ndarray]] = {}
    header = ["seed", "actor", "up", "down", "actions_that_nobody_demonstrated"]
    with table(args.out.with_suffix(".csv"), header) as write:
        for seed in args.seeds:
            rng = np.random.default_rng(seed)
            data = [drive(Ring(), ("up", "down")[i % 2], rng) for i in range(args.demonstrations)]
            demonstrated = np.array([trajectory.actions[0] for trajectory in data])
            for name, clone in ACTORS.items():
                agent = clone(data, seed, args.updates)
                outcome = roll_out(agent, Ring(), args.episodes)
                actions = agent.predict(np.tile(START, (500, 1)))[0]
                distances = np.linalg.norm(actions[:, None] - demonstrated, axis=2).min(axis=1)
                row = [seed, name, outcome.up, outcome.down, f"{(distances > NEAR).mean():.3f}"]
                print("seed {}, {}: up {}, down {}; share of actions that nobody demonstrated {}".format(*row), flush=True)
                write(row)
                pictures.setdefault(name, (outcome, actions))
    draw(pictures, args.out)
    print(args.out)


def draw(pictures: dict[str, tuple[Outcome, np.ndarray]], out: Path) -> None:
    """Of each actor of the first seed: paths, and actions at the start."""
    figure, axes = new_figure(4.0 * len(pictures), 5.5, len(pictures), 2)
    for (top, bottom), (name, (outcome, actions)) in zip(axes.T, pictures.items(), strict=True):
        draw_paths(top, outcome.paths, COLOURS[name])
        top.set_title(f"{name}: {outcome.up} up, {outcome.down} down")
        bottom.plot(*actions.T, ".", color=COLOURS[name], markersize=3, alpha=0.5)
        bottom.set(xlim=(-1.05, 1.05), ylim=(-1.05, 1.05), aspect="equal", title="actions at the start")
        bottom.set(xlabel="force to the right", ylabel="force upwards")
    figure.tight_layout()
    figure.savefig(out)


if __name__ == "__main__":
    main()
