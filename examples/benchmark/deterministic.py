"""
Which function of the observation should be the deterministic action? Candidates on trained agents and on a two-mode bandit.

    python examples/benchmark/deterministic.py logs/a/HalfCheetah-v4.zip logs/a/Hopper-v4.zip logs/a/Walker2d-v4.zip

Each zip is a SoftQ agent saved by ``model.save``; its environment is the name of the file. Writes
``examples/benchmark/results/deterministic.csv`` and prints the table. ``predict`` takes the particle of most Q.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import pandas as pd
import torch as th
from arguments import positive
from bandits import SHORT_TRAINING, Bandit

from sb3_softq import SoftQ

Candidate = Callable[[SoftQ, th.Tensor], th.Tensor]


class Bank(NamedTuple):
    """The fixed particles of a state: (1, n_bank, action_dim) twice, and log weights, (1, n_bank)."""

    mean: th.Tensor
    log_std: th.Tensor
    log_weights: th.Tensor


def bank(model: SoftQ, obs: th.Tensor) -> Bank:
    actor = model.ema_actor
    features = actor.features(obs)
    mean, log_std = actor.particles(features, actor.xi_bank.unsqueeze(0))
    repeats = len(actor.xi_bank) // actor.n_experts
    return Bank(mean, log_std, actor.gate_probs(features).repeat(1, repeats).div(repeats).log())


def q_values(model: SoftQ, obs: th.Tensor, u: th.Tensor) -> th.Tensor:
    return model.critic.q_values(model.critic.features(obs), th.tanh(u)).amin(dim=0)


def zero_noise(model: SoftQ, obs: th.Tensor) -> th.Tensor:
    """Of the expert that weighs most; the first particles of the bank are those of no noise."""
    particles = bank(model, obs)
    return particles.mean[:, particles.log_weights[0, : model.ema_actor.n_experts].argmax()]


def weighted_mean(model: SoftQ, obs: th.Tensor) -> th.Tensor:
    mean, _, log_weights = bank(model, obs)
    return (log_weights.exp().unsqueeze(2) * mean).sum(dim=1)


def medoid(model: SoftQ, obs: th.Tensor) -> th.Tensor:
    means, _, log_weights = bank(model, obs)
    return means[:, (th.cdist(means, means) * log_weights.exp().unsqueeze(1)).sum(dim=2).argmin()]


def most_q(model: SoftQ, obs: th.Tensor, u: th.Tensor) -> th.Tensor:
    return u[:, q_values(model, obs, u).argmax()]


def particles_of_both(model: SoftQ, obs: th.Tensor) -> th.Tensor:
    return most_q(model, obs, th.cat([model.ema_actor.fixed_particles(obs), model.actor.fixed_particles(obs)], dim=1))


def modes_of_both(model: SoftQ, obs: th.Tensor) -> th.Tensor:
    return most_q(model, obs, th.stack([model.ema_actor.mode(obs), model.actor.mode(obs)], dim=1))


def q_weighted_mean(model: SoftQ, obs: th.Tensor) -> th.Tensor:
    means = bank(model, obs).mean
    weights = th.softmax(q_values(model, obs, means) / model.ent_coef_tensor, dim=1)
    return (weights.unsqueeze(2) * means).sum(dim=1)


CANDIDATES: dict[str, Candidate] = {
    "a sample": lambda model, obs: model.ema_actor.sample(obs)[:, 0],
    "particle of most Q": lambda model, obs: most_q(model, obs, model.ema_actor.fixed_particles(obs)),
    "the same, of both actors": particles_of_both,
    "mode of the density": lambda model, obs: model.ema_actor.mode(obs),
    "the same, of the trained actor": lambda model, obs: model.actor.mode(obs),
    "the one of these two of most Q": modes_of_both,
    "mean particle": weighted_mean,
    "medoid": medoid,
    "zero noise": zero_noise,
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
    parser.add_argument("--episodes", type=positive, default=10)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "deterministic.csv")
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
            f"{name:32s}",
            *(f"{row['task']} {row['return']:.1f} +- {row['standard_error']:.1f}" for row in rows[-len(tasks) :]),
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(args.out, index=False)
    print(f"Table: {args.out}")


if __name__ == "__main__":
    main()
