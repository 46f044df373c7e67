"""
Agents of equal return, pushed by forces that they have never met: SoftQ and SAC on InvertedDoublePendulum-v5.

    python examples/robustness.py         # examples/results/robustness.png, robustness.csv

Each is trained until its return reaches --threshold. Then a force in a random direction, changing every 10 steps, acts on
the body --body (``xfrc_applied``).
"""

import argparse
import csv
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3 import SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import EvalCallback, StopTrainingOnRewardThreshold
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_softq import SoftQ
from sb3_softq.plots import new_figure

OUT = Path(__file__).parent / "results" / "robustness.png"
ALGORITHMS: dict[str, Any] = {
    "SoftQ": partial(SoftQ, learning_rate=3e-4, tau=0.02, policy_kwargs=dict(batch_norm=False)),
    "SAC": SAC,
}


class Pushed(gym.Wrapper):
    """
    :param env: A MuJoCo environment
    :param force: Size of the force in newtons
    :param body: Name of the body it acts on
    """

    def __init__(self, env: gym.Env, force: float, body: str):
        super().__init__(env)
        self.force, self.body, self.steps = force, env.unwrapped.model.body(body).id, 0  # type: ignore[attr-defined]

    def reset(self, **kwargs: Any) -> Any:
        self.steps = 0
        return super().reset(**kwargs)

    def step(self, action: Any) -> Any:
        if self.steps % 10 == 0:
            angle = self.np_random.uniform(0.0, 2.0 * np.pi)
            # in the plane in which the body moves
            push = self.force * np.array([np.cos(angle), 0.0, np.sin(angle)])
            self.unwrapped.data.xfrc_applied[self.body, :3] = push  # type: ignore[attr-defined]
        self.steps += 1
        return super().step(action)


def train(name: str, env_id: str, threshold: float, steps: int, seed: int) -> BaseAlgorithm:
    stop = StopTrainingOnRewardThreshold(threshold, verbose=1)
    callback = EvalCallback(make_vec_env(env_id, seed=1000 + seed), stop, n_eval_episodes=10, eval_freq=1000, verbose=0)
    return ALGORITHMS[name]("MlpPolicy", env_id, buffer_size=steps, seed=seed, device="cpu").learn(steps, callback)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="InvertedDoublePendulum-v5")
    parser.add_argument("--body", default="pole2")
    parser.add_argument("--threshold", type=float, default=9300.0, help="return at which training ends")
    parser.add_argument("--steps", type=int, default=50_000, help="of training, at most")
    parser.add_argument("--forces", type=float, nargs="+", default=[0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0], metavar="NEWTON")
    parser.add_argument("--episodes", type=int, default=20, help="per force")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=OUT, help="file of the figure; the numbers are in a .csv beside it")
    args = parser.parse_args()

    returns: dict[str, list[list[float]]] = {name: [] for name in ALGORITHMS}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["seed", "algo", "steps", *(f"{force:g} N" for force in args.forces)])
        for seed in args.seeds:
            for name in ALGORITHMS:
                agent = train(name, args.env, args.threshold, args.steps, seed)
                row = [mean_return(agent, args.env, args.body, force, args.episodes) for force in args.forces]
                returns[name].append(row)
                shown = ", ".join(f"{force:g} N {value:.0f}" for force, value in zip(args.forces, row, strict=True))
                print(f"seed {seed}, {name}, {agent.num_timesteps} steps: {shown}", flush=True)
                writer.writerow([seed, name, agent.num_timesteps, *(f"{value:.1f}" for value in row)])
                file.flush()
    draw(args.forces, returns, args.env, args.out)
    print(args.out)


def mean_return(agent: BaseAlgorithm, env_id: str, body: str, force: float, episodes: int) -> float:
    env = make_vec_env(lambda: Pushed(gym.make(env_id), force, body), seed=2000)
    return float(np.mean(evaluate_policy(agent, env, episodes)[0]))


def draw(forces: list[float], returns: dict[str, list[list[float]]], env_id: str, out: Path) -> None:
    figure, axes = new_figure(6.0, 4.0)
    for name, colour in (("SoftQ", "tab:blue"), ("SAC", "tab:orange")):
        for row in returns[name]:
            axes.plot(forces, row, color=colour, alpha=0.3)
        axes.plot(forces, np.mean(returns[name], axis=0), "o-", color=colour, linewidth=2, label=f"{name}, mean of seeds")
    axes.set(xlabel="force in newtons", ylabel="return", title=env_id)
    axes.legend()
    figure.tight_layout()
    figure.savefig(out)


if __name__ == "__main__":
    main()
