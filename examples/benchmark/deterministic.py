"""
Which function of the observation should be the deterministic action? Candidates on trained agents and on a two-mode bandit.

    python examples/benchmark/deterministic.py logs/a/HalfCheetah-v4.zip logs/a/Hopper-v4.zip logs/a/Walker2d-v4.zip

Each zip is a SoftQ agent saved by ``model.save``; its environment is the name of the file. Writes
``examples/benchmark/results/deterministic.csv`` and prints the table.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import gymnasium as gym
import numpy as np
import pandas as pd
import torch as th
from bandits import SHORT_TRAINING, Bandit

from sb3_softq import SoftQ
from sb3_softq.soft_value import mixture_log_prob, mixture_mode

Candidate = Callable[[SoftQ, th.Tensor], th.Tensor]


def bank(model: SoftQ, obs: th.Tensor, trained: bool = False) -> tuple[th.Tensor, th.Tensor]:
    """Component means and log standard deviations of the fixed bank of particles, shape (1, n_bank, action_dim)."""
    actor = model.actor if trained else model.ema_actor
    return actor.particles(actor.features(obs), actor.xi_bank.unsqueeze(0))


def q_values(model: SoftQ, obs: th.Tensor, u: th.Tensor) -> th.Tensor:
    return model.critic.q_values(model.critic.features(obs), th.tanh(u)).amin(dim=0)


def zero_noise(model: SoftQ, obs: th.Tensor) -> th.Tensor:
    features = model.ema_actor.features(obs)
    return model.ema_actor.particles(features, th.zeros(1, 1, model.ema_actor.action_dim))[0][:, 0]


def mode(model: SoftQ, obs: th.Tensor, densest: bool = False, trained: bool = False) -> th.Tensor:
    mean, log_std = bank(model, obs, trained)
    start = mean[:, mixture_log_prob(mean, mean, log_std).argmax()] if densest else mean[:, 0]
    return mixture_mode(start, mean, log_std)


def medoid(model: SoftQ, obs: th.Tensor) -> th.Tensor:
    means, _ = bank(model, obs)
    return means[:, th.cdist(means, means).sum(dim=2).argmin()]


def best_by_q(model: SoftQ, obs: th.Tensor) -> th.Tensor:
    means, _ = bank(model, obs)
    return means[:, q_values(model, obs, means).argmax()]


def q_weighted_mean(model: SoftQ, obs: th.Tensor) -> th.Tensor:
    means, _ = bank(model, obs)
    weights = th.softmax(q_values(model, obs, means) / model.ent_coef_tensor, dim=1)
    return (weights.unsqueeze(2) * means).sum(dim=1)


CANDIDATES: dict[str, Candidate] = {
    "a sample": lambda model, obs: model.ema_actor.sample(obs)[:, 0],
    "zero noise, mean-shift": mode,
    "the same, of the trained actor": lambda model, obs: mode(model, obs, trained=True),
    "densest of 32, mean-shift": lambda model, obs: mode(model, obs, densest=True),
    "mean particle": lambda model, obs: bank(model, obs)[0].mean(dim=1),
    "medoid": medoid,
    "zero noise": zero_noise,
    "best of 32 by Q": best_by_q,
    "Q-weighted mean": q_weighted_mean,
}


def two_equal_modes(_: float, a: np.ndarray) -> np.ndarray:
    """exp(reward) has two equal bumps at -0.5 and 0.5, so that their mean, 0, is worth -12.5."""
    return -((np.abs(a[..., 0]) - 0.5) ** 2) / (2 * 0.1**2)


def evaluate(model: SoftQ, env: gym.Env, candidate: Candidate, n_episodes: int) -> tuple[float, float]:
    """Mean and standard error of the return; every candidate sees the same episodes' seeds."""
    returns = []
    for episode in range(n_episodes):
        obs, _ = env.reset(seed=2_000 + episode)
        total, done = 0.0, False
        while not done:
            with th.no_grad():
                u = candidate(model, th.as_tensor(obs, dtype=th.float32).unsqueeze(0))
            action = model.policy.unscale_action(th.tanh(u)[0].numpy())
            obs, reward, terminated, truncated, _ = env.step(action)
            total, done = total + float(reward), terminated or truncated
        returns.append(total)
    return float(np.mean(returns)), float(np.std(returns) / np.sqrt(n_episodes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("agents", type=Path, nargs="+")
    parser.add_argument("--episodes", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("examples/benchmark/results/deterministic.csv"))
    args = parser.parse_args()
    th.set_num_threads(1)

    bandit = Bandit(two_equal_modes)
    tasks: list[tuple[str, SoftQ, gym.Env]] = [
        ("two modes", SoftQ("MlpPolicy", bandit, seed=0, **SHORT_TRAINING).learn(5_000), bandit)
    ]
    tasks += [(path.stem, SoftQ.load(path, device="cpu"), gym.make(path.stem)) for path in args.agents]

    rows = []
    for name, candidate in CANDIDATES.items():
        for task, model, env in tasks:
            th.manual_seed(0)
            mean, error = evaluate(model, env, candidate, args.episodes)
            rows.append({"action": name, "task": task, "return": round(mean, 2), "standard_error": round(error, 2)})
        print(
            f"{name:20s}",
            *(f"{row['task']} {row['return']:.1f} +- {row['standard_error']:.1f}" for row in rows[-len(tasks) :]),
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(args.out, index=False)
    print(f"Table: {args.out}")


if __name__ == "__main__":
    main()
