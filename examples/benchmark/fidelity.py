"""
How close do the actions come to the Boltzmann distribution of a known reward? One change to the defaults per variant.

    python examples/benchmark/fidelity.py

Prints the total variation between the actions and exp(r(a) / alpha) / Z (the mean over the observations) and the error of
the soft value after 4,500 updates, and writes ``examples/benchmark/results/fidelity.csv``.
"""

import argparse
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch as th
from bandits import CASES, SHORT_TRAINING, boltzmann, total_variation
from stable_baselines3 import SAC
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
    "no wide initialisation": dict(variant="no_wide_initialisation"),
    "mean in the soft value": dict(variant="mean_value"),
    "4 particles in the soft value": dict(n_value_particles=4),
    "noise enters the first layer": dict(policy_kwargs={"net_arch": {"pi": [], "qf": [64, 64]}, "head_arch": [64, 64]}),
    "no annealing": dict(particle_options=dict(annealing=1.0)),
    "repulsion by the kernel": dict(particle_options=dict(repulsion="kernel")),
    "repulsion by the kernel, local smoothing": dict(
        particle_options=dict(repulsion="kernel"), policy_kwargs={"smoothing": "local"}
    ),
}


def measure(variant: str, case: str, seed: int) -> dict[str, Any]:
    """Train one agent and compare it with the truth."""
    env = CASES[case]()
    kwargs = SHORT_TRAINING | VARIANTS.get(variant, {}) | dict(seed=seed)
    if "variant" in kwargs:
        PATCHES[kwargs.pop("variant")]()
    kwargs["policy_kwargs"] = SHORT_TRAINING["policy_kwargs"] | kwargs["policy_kwargs"]
    model: Any = (SAC if variant == "SAC" else SoftQ)("MlpPolicy", env, **kwargs).learn(5_000)
    distances, errors = [], []
    for observation in env.observations:
        obs = np.array([[observation]], dtype=np.float32)
        if isinstance(model, SoftQ):
            actions = model.sample_actions(obs, 20_000)[0]
            errors.append(model.soft_value(obs)[0] - boltzmann(env, observation, 1.0)[1])
        else:
            actions = model.predict(obs.repeat(20_000, axis=0))[0]
        distances.append(total_variation(env, observation, 1.0, actions))
    patch.stopall()
    error = round(float(np.mean(errors)), 3) if errors else ""
    return dict(
        variant=variant, case=case, seed=seed, total_variation=round(float(np.mean(distances)), 3), soft_value_error=error
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=[*VARIANTS, "SAC"])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("examples/benchmark/results/fidelity.csv"))
    args = parser.parse_args()
    th.set_num_threads(1)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for variant, case, seed in product(args.variants, args.cases, args.seeds):
        rows.append(measure(variant, case, seed))
        pd.DataFrame(rows).to_csv(args.out, index=False)
        print(*rows[-1].values(), sep="  ", flush=True)


if __name__ == "__main__":
    main()
