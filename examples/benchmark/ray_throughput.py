"""
Steps per second of RayVecEnv beside those of Stable-Baselines3's vectorized environments.

    python examples/benchmark/ray_throughput.py

Cheap steps (Pendulum-v1) show what an actor costs, steps of 10 ms (a sleep, as of a simulator on another machine) what
it brings. "two nodes" is a simulated cluster of two Ray nodes on this machine, with one object store each. All kinds take
turns, and medians are quoted.
"""

import argparse
import csv
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import ray
from arguments import positive
from ray.cluster_utils import Cluster
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv

from sb3_softq.vec_env import RayVecEnv

RESULTS = Path(__file__).parent / "results"


class Slow(gym.Wrapper):
    """Every step takes 10 ms longer."""

    def step(self, action: Any) -> Any:
        time.sleep(0.01)
        return super().step(action)


def make_env(slow: bool) -> gym.Env:
    env = gym.make("Pendulum-v1")
    return Slow(env) if slow else env


def steps_per_second(env: VecEnv, seconds: float) -> float:
    env.reset()
    actions = np.zeros((env.num_envs, 1))
    steps, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        env.step(actions)
        steps += env.num_envs
    return steps / (time.perf_counter() - start)


def measure(kinds: dict[str, Callable[..., VecEnv]], args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    for slow in (False, True):
        for n_envs in args.n_envs:
            speeds: dict[str, list[float]] = {kind: [] for kind in kinds}
            for _ in range(args.repeats):
                for kind, make in kinds.items():
                    env = make([partial(make_env, slow)] * n_envs)
                    speeds[kind].append(steps_per_second(env, args.seconds))
                    env.close()
            for kind, values in speeds.items():
                step = "10 ms" if slow else "cheap"
                rows.append(dict(step=step, n_envs=n_envs, kind=kind, steps_per_second=round(float(np.median(values)))))
                print(
                    "{step:>6}{n_envs:>4} environments {kind:<26}{steps_per_second:>8} steps/s".format(**rows[-1]), flush=True
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-envs", type=positive, nargs="+", default=[2, 8])
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "ray_throughput.csv")
    args = parser.parse_args()
    if not 0 < args.seconds < math.inf:
        parser.error(f"--seconds {args.seconds} is not allowed: it must be positive and finite")
    args.out.parent.mkdir(parents=True, exist_ok=True)

    rows: list[dict[str, Any]] = []
    ray.init(include_dashboard=False, log_to_driver=False)
    one_machine: dict[str, Callable[..., VecEnv]] = {
        "DummyVecEnv": DummyVecEnv,
        "SubprocVecEnv": SubprocVecEnv,
        "RayVecEnv": RayVecEnv,
        # an actor per environment, as SubprocVecEnv has a process
        "RayVecEnv, an actor each": lambda env_fns: RayVecEnv(env_fns, n_actors=len(env_fns)),
    }
    measure(one_machine, args, rows)
    ray.shutdown()

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    cluster.wait_for_nodes()
    measure(
        {
            "two nodes": partial(RayVecEnv, n_actors=2),
            "two nodes, an actor each": lambda env_fns: RayVecEnv(env_fns, n_actors=len(env_fns)),
        },
        args,
        rows,
    )
    ray.shutdown()
    cluster.shutdown()

    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
