"""
One change each against SoftQ's defaults: is it worth it?

    python examples/benchmark/ablations.py run    # HalfCheetah-v4, 30,000 steps, seeds 35 to 37: five hours on two cores
    python examples/benchmark/ablations.py run --only policy-delay-2 delta-kernel
    python examples/benchmark/ablations.py run --envs Walker2d-v4 --steps 60000 --only no-wide-initialisation
    python examples/benchmark/ablations.py table

``run`` trains the runs that have not finished (``learning.py run``) into logs/ablations. ``table`` adds them to
results/ablations.csv and prints the table of decisions.md.
"""

import argparse
from pathlib import Path
from typing import Any

from arguments import positive
from learning import CHECKPOINT_FREQ, HERE, LOGS, Run, make_parser, train_runs

# Not that of the results: ablations decide about settings
EVALUATION_SEED = 5_000

ABLATIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "policy-delay-2": dict(policy_delay=2),
    # the sampler
    "no-wide-initialisation": dict(variant="no_wide_initialisation"),
    "local-smoothing": {"policy_kwargs.smoothing": "local"},
    "global-smoothing": {"policy_kwargs.smoothing": "local", "variant": "global_bandwidth"},
    "smoothing-floor": dict(variant="smoothing_floor"),
    "explore-with-component-means": dict(variant="explore_with_component_means"),
    "no-ema-actor": dict(actor_tau=1.0),
    "1-expert": {"policy_kwargs.n_experts": 1},
    # the soft value
    "1-value-particle": dict(n_value_particles=1),
    "4-value-particles": dict(n_value_particles=4),
    "8-value-particles": dict(n_value_particles=8),
    "16-value-particles": dict(n_value_particles=16),
    "density-in-value": dict(variant="density_in_value"),
    "1-value-particle-density": dict(n_value_particles=1, variant="density_in_value"),
    "mean-value": dict(variant="mean_value"),
    "uniform-proposal": {"particle_options.proposal": "uniform"},
    # the Stein step
    "4x128-actor-particles": {"particle_options.n_actor_states": 128},
    "4x128-policy-delay-2": {"particle_options.n_actor_states": 128, "policy_delay": 2},
    "2x128-actor-particles": {"particle_options.n_actor_states": 128, "n_actor_particles": 2},
    "8x64-actor-particles": {"n_actor_particles": 8, "particle_options.n_actor_states": 64},
    "16x64-actor-particles": {"n_actor_particles": 16, "particle_options.n_actor_states": 64},
    "32x32-actor-particles": {"n_actor_particles": 32},
    "delta-kernel": {"particle_options.kernel": "delta"},
    "kernel-repulsion": {"particle_options.repulsion": "kernel"},
    "one-critic-in-stein-step": dict(variant="one_critic_in_stein_step"),
    # temperature and critics
    "fixed-temperature-0.1": dict(ent_coef=0.1),
    "fixed-temperature-0.03": dict(ent_coef=0.03),
    "critics-of-numbers": dict(normalize_rewards=False, ent_coef="auto_0.1"),
    "constant-learning-rate": dict(learning_rate=1e-3),
    "joint-gradient": dict(variant="joint_gradient"),
    "no-batch-norm": {"policy_kwargs.batch_norm": False, "tau": 0.005, "learning_rate": 3e-4},
}


def run(args: argparse.Namespace) -> None:
    train_runs(
        [
            Run(
                label=label,
                algo="softq",
                env=env,
                seed=seed,
                steps=args.steps,
                eval_freq=max(args.steps // 6, 1),
                checkpoint_freq=CHECKPOINT_FREQ,
                changes={"compile": True, **ABLATIONS[label]},
                logs=str(args.logs.resolve()),
                evaluation_seed=EVALUATION_SEED,
            )
            for seed in args.seeds
            for label in args.only
            for env in args.envs
        ]
    )


def table(args: argparse.Namespace) -> None:
    """Deterministic return: mean over seeds on the way, each seed at the end, and against the defaults of the same seeds."""
    if not args.no_collect:
        command = ["collect", "--name", args.csv.stem, "--out", str(args.csv.parent), "--update", "--logs", str(args.logs)]
        settings = make_parser().parse_args(command)
        settings.command(settings)
    import pandas as pd  # here, not above: ``run`` waits beside busy cores

    for env, rows in pd.read_csv(args.csv).groupby("env", sort=False):
        returns = rows.pivot(index="step", columns=["label", "seed"], values="deterministic_mean")
        steps = [returns.index[len(returns) * part // 3 - 1] for part in (1, 2, 3)]
        print(f"\n| {env} | {' | '.join(f'{step:,}' for step in steps)} | by seed | to the defaults |\n" + "|---" * 6 + "|")
        final = {label: finished.droplevel(0) for label, finished in returns.loc[steps[-1]].dropna().groupby(level="label")}
        # last, those that an older CSV has and the list no longer
        for label in [label for label in dict.fromkeys([*ABLATIONS, *final]) if label in final]:
            means = returns.loc[steps, label][final[label].index].mean(axis=1)
            by_seed = ", ".join(f"{value:,.0f} ({seed})" for seed, value in final[label].items())
            common = final[label].index.intersection(final["defaults"].index) if "defaults" in final else []
            ratio = f"{final[label][common].sum() / final['defaults'][common].sum():.2f}" if len(common) else ""
            print(f"| `{label}` | {' | '.join(f'{mean:,.0f}' for mean in means)} | {by_seed} | {ratio} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logs", type=Path, default=LOGS.parent / "ablations")
    subparsers = parser.add_subparsers(required=True)
    command = subparsers.add_parser("run", help="train the runs that have not finished")
    command.set_defaults(command=run)
    command.add_argument("--envs", nargs="+", default=["HalfCheetah-v4"])
    command.add_argument("--seeds", nargs="+", type=int, default=[35, 36, 37])
    command.add_argument("--steps", type=positive, default=30_000)
    command.add_argument("--only", nargs="+", choices=ABLATIONS, default=list(ABLATIONS), metavar="LABEL")
    command = subparsers.add_parser("table", help="collect the results and print the table")
    command.set_defaults(command=table)
    command.add_argument("--csv", type=Path, default=HERE / "results" / "ablations.csv")
    command.add_argument("--no-collect", action="store_true", help="the table of the CSV as it is, without the logs")
    args = parser.parse_args()
    args.command(args)


if __name__ == "__main__":
    main()
