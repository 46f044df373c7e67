"""
How close do the actions come to the Boltzmann distribution of a known reward? One change to the defaults per variant.

    python examples/benchmark/fidelity.py

Prints, after 6,000 updates, the total variation between the actions and exp(r(a) / alpha) / Z, or where there are more than
two dimensions the largest error of a mode's share, and the error of the soft value: of each seed, and the worst observation of
it. Writes ``examples/benchmark/results/fidelity.csv``. Changes against the defaults: ``--variants "delta kernel" SAC``.
"""

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch as th
from arguments import positive
from bandits import CASES, FOUR_MODES, SHORT_TRAINING, errors
from stable_baselines3 import SAC
from stable_baselines3.common.utils import LinearSchedule
from variants import VARIANTS as PATCHES

from sb3_softq import SoftQ

# Arguments of SoftQ, and "variant" for what no argument changes (variants.py)
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "no batch normalisation": dict(tau=0.005, policy_kwargs={"batch_norm": False}),
    "joint gradient": dict(variant="joint_gradient"),
    "no density-only particles": dict(particle_options=dict(n_density_particles=0)),
    "delta kernel": dict(particle_options=dict(kernel="delta")),
    "half as many updates of the actor": dict(policy_delay=2),
    "no EMA actor": dict(actor_tau=1.0),
    "one expert": dict(policy_kwargs=dict(n_experts=1)),
    "no wide initialisation": dict(variant="no_wide_initialisation"),
    "mean in the soft value": dict(variant="mean_value"),
    "4 particles in the soft value": dict(n_value_particles=4),
    "noise enters the first layer": dict(policy_kwargs={"net_arch": {"pi": [], "qf": [64, 64]}, "head_arch": [64, 64]}),
    "learning rate over half of training": dict(learning_rate=LinearSchedule(1e-3, 3e-4, 0.5)),
    "learning rate to 5e-4 over three tenths": dict(learning_rate=LinearSchedule(1e-3, 5e-4, 0.3)),
    "learning rate 5e-4": dict(learning_rate=5e-4),
    "learning rate over 50,000 updates": dict(learning_rate="auto"),
    "no annealing": dict(particle_options=dict(annealing=1.0)),
    "repulsion by the kernel": dict(particle_options=dict(repulsion="kernel")),
    "repulsion by the kernel, local smoothing": dict(
        particle_options=dict(repulsion="kernel"), policy_kwargs={"smoothing": "local"}
    ),
    # SAC, at the rate that SoftQ begins with
    "SAC": dict(learning_rate=1e-3),
}


MEASURES = ("total_variation", "share", "soft_value")


def measure(variant: str, case: str, seed: int, n_updates: int) -> dict[str, Any]:
    """Train one agent and compare it with the truth."""
    th.set_num_threads(1)
    env = (CASES | FOUR_MODES)[case]()
    steps = SHORT_TRAINING["learning_starts"] + n_updates
    # all transitions are kept
    kwargs = SHORT_TRAINING | VARIANTS[variant] | dict(seed=seed, buffer_size=max(SHORT_TRAINING["buffer_size"], steps))
    if "variant" in kwargs:
        PATCHES[SoftQ][kwargs.pop("variant")]()
    kwargs["policy_kwargs"] = SHORT_TRAINING["policy_kwargs"] | kwargs["policy_kwargs"]
    model = (SAC if variant == "SAC" else SoftQ)("MlpPolicy", env, **kwargs).learn(steps)
    found = {name: round(value, 3) for name, value in errors(env, model).items()}
    patch.stopall()
    return dict(variant=variant, case=case, seed=seed) | {name: found.get(name, "") for name in MEASURES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=["default"], choices=VARIANTS, metavar="VARIANT")
    parser.add_argument("--cases", nargs="+", default=[*CASES, *FOUR_MODES], choices=[*CASES, *FOUR_MODES], metavar="CASE")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--updates", type=positive, default=6_000, help="of each agent (default: 6000)")
    parser.add_argument("--jobs", type=positive, default=os.cpu_count(), help="agents trained at once (default: cores)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "fidelity.csv")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    runs = list(product(args.variants, args.cases, args.seeds))
    rows = []
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        for row in pool.map(partial(measure, n_updates=args.updates), *zip(*runs, strict=True)):
            rows.append(row)
            # takes the place of older results once it is whole
            pd.DataFrame(rows).to_csv(args.out.with_suffix(".part"), index=False)
            print(*row.values(), sep="  ", flush=True)
    args.out.with_suffix(".part").replace(args.out)
    table = pd.DataFrame(rows).replace("", np.nan)
    for (variant, case), group in table.groupby(["variant", "case"], sort=False):
        parts = [f"{name} {' '.join(f'{x:+.2f}' for x in group[name])}" for name in MEASURES if group[name].notna().all()]
        print(f"{variant}, {case}: {'; '.join(parts)}")


if __name__ == "__main__":
    main()
