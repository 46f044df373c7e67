"""
How fast does an actor learn while the critics stand still? What an update of it costs and brings, without a training's noise.

    python examples/benchmark/fixed_critics.py

Trains one agent, freezes its critics, and has new actors learn from its replay buffer, at a temperature that adapts. Prints Q
of their actions, mean over 1,000 replayed states, and the CPU time of an update, and writes
``examples/benchmark/results/fixed_critics.csv``. It tells settings of the actor apart within minutes; how they do with critics
that learn, trainings have to show.
"""

import argparse
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd
import torch as th
from arguments import positive
from stable_baselines3.common.utils import update_learning_rate
from variants import VARIANTS

from sb3_softq import SoftQ

# Updates after which an actor is looked at, and after its last one
POINTS = (100, 300, 600, 1000, 2000)


@dataclass(frozen=True)
class Setting:
    """
    :param n_states: States in an update of the actor
    :param n_particles: Particles of each
    :param learning_rate: Of the actor
    :param kwargs: Further arguments of SoftQ
    :param variant: A change of ``variants.py``
    """

    n_states: int = 256
    n_particles: int = 2
    learning_rate: float = 1e-3
    kwargs: dict[str, Any] = field(default_factory=dict)
    variant: str | None = None


ONE_EXPERT: dict[str, Any] = dict(policy_kwargs=dict(n_experts=1))
SETTINGS = {
    "4 particles of 32 states": Setting(32, 4),
    "2 particles of 64 states": Setting(64),
    "2 particles of 128 states": Setting(128),
    "2 particles of 256 states": Setting(),
    "4 particles of 256 states": Setting(256, 4),
    "2 particles of 256 states, 2e-3": Setting(learning_rate=2e-3),
    "2 particles of 256 states, 3e-3": Setting(learning_rate=3e-3),
    "one expert, 4 particles of 32 states": Setting(32, 4, kwargs=ONE_EXPERT),
    "one expert, 1 particle of 256 states": Setting(256, 1, kwargs=ONE_EXPERT),
    "Gaussian, 32 states": Setting(32, 1, kwargs=ONE_EXPERT, variant="gaussian_actor"),
    "Gaussian, 256 states": Setting(256, 1, kwargs=ONE_EXPERT, variant="gaussian_actor"),
}


def measure(teacher: SoftQ, name: str, seed: int, points: list[int]) -> list[dict[str, Any]]:
    """A new actor that learns from the teacher's critics: Q, entropy, temperature and seconds of CPU after so many updates."""
    setting = SETTINGS[name]
    env, buffer = teacher.get_env(), teacher.replay_buffer
    assert env is not None
    assert buffer is not None
    if setting.variant is not None:
        VARIANTS[SoftQ][setting.variant]()
    model = SoftQ(
        "MlpPolicy",
        env,
        n_actor_particles=setting.n_particles,
        particle_options=dict(n_actor_states=setting.n_states),
        seed=seed,
        device="cpu",
        **setting.kwargs,
    )
    assert model.log_ent_coef is not None
    assert teacher.log_ent_coef is not None
    model.critic.load_state_dict(teacher.critic.state_dict())
    with th.no_grad():
        model.log_ent_coef.copy_(teacher.log_ent_coef)
    update_learning_rate(model.actor.optimizer, setting.learning_rate)
    # the same for all
    obs = buffer._get_samples(th.randperm(buffer.size(), generator=th.Generator().manual_seed(0))[:1000].numpy()).observations
    rows, seconds = [], 0.0
    for i in range(1, points[-1] + 1):
        data = buffer.sample(model.batch_size)
        begin = time.process_time()
        stats = model.update_actor(data, model.ent_coef_tensor)
        model._update_ent_coef(stats["entropy"])
        seconds += time.process_time() - begin
        if i in points:
            with th.no_grad():
                actions = th.tanh(model.actor.sample(obs, 64))
                q_value = model.critic.q_values(model.critic.features(obs), actions).amin(dim=0).mean()
            found = dict(q_value=float(q_value), entropy=float(stats["entropy"]), ent_coef=float(model.ent_coef_tensor))
            rows.append(dict(setting=name, seed=seed, n_updates=i, seconds=seconds) | found)
    patch.stopall()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="Walker2d-v4")
    parser.add_argument("--steps", type=positive, default=15_000, help="of the agent whose critics teach")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS, metavar="SETTING")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the actors")
    parser.add_argument("--updates", type=positive, default=3_000, help="of each actor")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "fixed_critics.csv")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    points = [*(n for n in POINTS if n < args.updates), args.updates]
    th.set_num_threads(1)
    teacher = SoftQ("MlpPolicy", args.env, learning_starts=min(5_000, args.steps // 3), compile=True, seed=60, device="cpu")
    teacher.learn(args.steps)
    rows = []
    for name in args.settings:
        for seed in args.seeds:
            rows += measure(teacher, name, seed, points)
        table = pd.DataFrame(rows)
        means = table[table.setting == name].groupby("n_updates")[["q_value", "seconds"]].mean()
        values = "  ".join(f"{n}: {row.q_value:.2f}" for n, row in means.iterrows())
        print(f"{name}  {values}  {1e3 * means.seconds.iloc[-1] / args.updates:.1f} ms", flush=True)
        table.round(4).to_csv(args.out, index=False)


if __name__ == "__main__":
    main()
