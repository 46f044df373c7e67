"""
Learning benchmark: SoftQ against SAC, TD3, TQC and CrossQ over environments and seeds.

    python examples/benchmark/learning.py run --algos softq sac td3 --envs HalfCheetah-v4 Hopper-v4 Walker2d-v4 --seeds 1 2 3
    python examples/benchmark/learning.py collect --name mujoco_100k --update
    python examples/benchmark/learning.py report --csv examples/benchmark/results/mujoco_100k.csv

A run is one algorithm (or variant of it), environment and seed, trained in a process of its own with one torch thread by
``training_run.py``. ``run`` can be killed at any time: started again, it skips finished runs and continues the others from
their checkpoints. A variant changes arguments of an algorithm and has a label of its own in the results:

    python examples/benchmark/learning.py run --algos softq --set n_value_particles=8 --label softq-8-value-particles

On a cluster, whose machines share the disk, Ray distributes the runs (``ray start --head`` on one machine, ``ray start
--address=HEAD:6379`` on the others):

    python examples/benchmark/learning.py run --ray auto
"""

import argparse
import ast
import csv
import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from arguments import positive
from time_to_return import SPEED_ROWS, SPEED_TABLE, parse_threshold

# torch and Stable-Baselines3 are imported by training_run.py only: this process waits beside busy cores

# The last three are for Discrete actions
ALGOS = ("softq", "sac", "td3", "tqc", "crossq", "original", "discrete", "dqn", "qrdqn")
# Of the environments' first states and of the actions' noise: for results, not for decisions about settings
EVALUATION_SEED = 10_000
HERE = Path(__file__).parent
LOGS = Path("logs/benchmark")
CHECKPOINT_FREQ = 25_000

COLUMNS = (
    "label",
    "algo",
    "env",
    "seed",
    "step",
    "deterministic_mean",
    "deterministic_std",
    "stochastic_mean",
    "stochastic_std",
    "q_value",
    "q_bias",
    "hours",
    "entropy",
    "temperature",
    "effective_sample_size",
    "particle_spread",
)


@dataclass(frozen=True)
class Run:
    """
    One training run.

    :param label: Name in the results
    :param algo: One of ``ALGOS``
    :param env: Environment id
    :param seed: Seed of training
    :param steps: Number of training steps
    :param eval_freq: Evaluate every this many steps
    :param checkpoint_freq: Save a checkpoint every this many steps
    :param changes: Arguments of the algorithm that differ from the benchmark's, ``policy_kwargs.x`` for those of the policy
    :param logs: Folder of all runs
    :param evaluation_seed: First of the reset seeds of the evaluations. The default is for results alone: whatever decides
        about settings has another
    """

    label: str
    algo: str
    env: str
    seed: int
    steps: int
    eval_freq: int
    checkpoint_freq: int
    changes: dict[str, Any]
    logs: str
    evaluation_seed: int = EVALUATION_SEED

    def __str__(self) -> str:
        return f"{self.label} {self.env} seed {self.seed}"

    @property
    def folder(self) -> Path:
        return Path(self.logs) / self.label / self.env / str(self.seed)

    @property
    def evaluations(self) -> Path:
        return self.folder / "evaluations.csv"

    @property
    def config(self) -> Path:
        return self.folder / "config.json"

    @property
    def model(self) -> Path:
        """The trained agent. Written last: its presence says that the run has finished."""
        return self.folder / "model.zip"

    @property
    def identity(self) -> dict[str, Any]:
        """What must not differ between the sittings of a run."""
        return {name: value for name, value in asdict(self).items() if name not in ("checkpoint_freq", "logs")}


def read_rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        # A kill can cut the last row short
        return [row for row in csv.DictReader(file) if None not in row.values()]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """All or nothing: the file is replaced in one go."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)


# ------------------------------------------------------------------ run


def run(args: argparse.Namespace) -> None:
    if args.label and len(args.algos) > 1:
        sys.exit("--label names one variant: give one of --algos")
    # seeds outermost: a benchmark that is stopped early has compared everything on the seeds it has
    runs = [make_run(args, algo, env, seed) for seed in args.seeds for env in args.envs for algo in args.algos]
    train_runs(runs, args.jobs, args.ray)


def train_runs(runs: list[Run], jobs: int | None = None, ray: str | None = None) -> None:
    """
    Train the runs that have not finished, and exit with an error if one fails.

    :param runs: In the order in which they are started
    :param jobs: Runs at once, by default as many as there are cores or the cluster has room for
    :param ray: Address of a Ray cluster, None for this machine alone
    """
    waiting = []
    # each once: two would write into one folder
    for run in {run.folder: run for run in runs}.values():
        if run.config.exists():
            check_same_run(run)
        if run.model.exists():
            print(f"{run}: finished before, skipped")
        else:
            waiting.append(run)

    failed = 0
    results = train_on_ray(waiting, ray, jobs) if ray else train_here(waiting, jobs or os.cpu_count() or 1)
    try:
        for done, (run, message) in enumerate(results, start=1):
            failed += not run.model.exists()
            print(f"[{done}/{len(waiting)}] {run}: {message}", flush=True)
    except KeyboardInterrupt:
        print("Interrupted: the same command continues", flush=True)
        # at once, without starting the runs that wait
        os._exit(130)
    if failed:
        sys.exit(f"{failed} of {len(waiting)} runs failed")


def train_here(runs: list[Run], jobs: int) -> Iterator[tuple[Run, str]]:
    """
    :param runs: What to train
    :param jobs: Runs at once
    :return: Runs as they end, and how
    """
    # without "with", which would wait for the threads when interrupted
    pool = ThreadPoolExecutor(jobs)
    futures = {pool.submit(train_in_process, run): run for run in runs}
    for future in as_completed(futures):
        yield futures[future], future.result()


def train_on_ray(runs: list[Run], address: str, jobs: int | None) -> Iterator[tuple[Run, str]]:
    """
    The same on the machines of a Ray cluster, which see this script and the logs under the same path: one task with one CPU
    per run. The run of a machine that is lost continues on another one from its checkpoint.

    :param runs: What to train
    :param address: Address of the cluster, ``"auto"`` or ``"local"``, see ``ray.init``
    :param jobs: Runs at once, by default as many as the cluster has room for
    :return: Runs as they end, and how
    """
    try:
        import ray
    except ImportError:
        sys.exit('--ray needs Ray: pip install "sb3-softq[ray]"')
    ray.init(address=address, log_to_driver=False)
    train = ray.remote(num_cpus=1, max_retries=-1)(train_in_process)
    waiting = list(reversed(runs))
    running: dict[Any, Run] = {}
    while waiting or running:
        while waiting and (jobs is None or len(running) < jobs):
            run = waiting.pop()
            running[train.remote(run)] = run
        (ref,), _ = ray.wait(list(running), num_returns=1)
        run = running.pop(ref)
        try:
            yield run, ray.get(ref)
        except ray.exceptions.RayError as error:
            yield run, f"FAILED in Ray: {error}"


def make_run(args: argparse.Namespace, algo: str, env: str, seed: int) -> Run:
    changes = dict(args.set)
    label = args.label or "-".join([algo, *(f"{name}={value}" for name, value in changes.items())])
    return Run(
        label=label.replace("/", "_"),
        algo=algo,
        env=env,
        seed=seed,
        steps=args.steps,
        eval_freq=args.eval_freq or max(args.steps // 20, 1),
        checkpoint_freq=args.checkpoint_freq,
        changes=changes,
        evaluation_seed=args.evaluation_seed,
        # absolute: the processes of a cluster start elsewhere
        logs=str(args.logs.resolve()),
    )


def check_same_run(run: Run) -> None:
    before = json.loads(run.config.read_text())
    # through JSON, where tuples are lists
    for name, value in json.loads(json.dumps(run.identity)).items():
        if before.get(name) != value:
            sys.exit(
                f"{run.folder} holds a run with {name}={before.get(name)!r}, not {value!r}: "
                "choose another --label, or remove the folder"
            )


def train_in_process(run: Run) -> str:
    """
    :return: How it ended, for the user
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    log = run.folder / "log.txt"
    with log.open("a") as file:
        # training_run.py stops when the other end of its standard input closes: no run outlives this process
        process = subprocess.Popen(
            [sys.executable, str(HERE / "training_run.py"), json.dumps(asdict(run))],
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        process.wait()
        assert process.stdin is not None
        process.stdin.close()
    if process.returncode != 0 or not run.model.exists():
        tail = "".join(deque(log.open(), maxlen=15))
        return f"FAILED with code {process.returncode}, the end of {log}:\n{tail}"
    last = read_rows(run.evaluations)[-1]
    returns = f"{float(last['deterministic_mean']):.0f} deterministic, {float(last['stochastic_mean']):.0f} stochastic"
    return f"finished after {float(last['hours']):.2f} h, return {returns}"


# ------------------------------------------------------------------ collect


def collect(args: argparse.Namespace) -> None:
    rows: list[dict[str, str]] = []
    unfinished = []
    arguments: dict[tuple[str, str], set[str]] = {}
    for path in sorted(args.logs.glob("**/evaluations.csv")):
        # an environment may have a folder in its name
        label, *names, seed = path.relative_to(args.logs).parts[:-1]
        env = "/".join(names)
        if (args.labels and label not in args.labels) or (args.envs and env not in args.envs):
            continue
        rows += read_rows(path)
        config = json.loads((path.parent / "config.json").read_text())
        # the digest of the source tells what has changed in it, the commit what has changed anywhere
        config["versions"].pop("commit", None)
        arguments.setdefault((label, env), set()).add(json.dumps([config["arguments"], config["versions"]], sort_keys=True))
        if not (path.parent / "model.zip").exists():
            unfinished.append(f"{label} {env} seed {seed}")
    if not rows:
        sys.exit(f"There are no evaluations in {args.logs}")
    for (label, env), variants in arguments.items():
        if len(variants) > 1:
            print(f"Warning: the seeds of {label} on {env} were trained with different arguments or versions (config.json)")
    if unfinished:
        print(f"Warning: unfinished: {', '.join(unfinished)}")
    out = args.out / f"{args.name}.csv"
    if args.update:
        collected = {name_run(row) for row in rows}
        rows += [row for row in read_rows(out) if name_run(row) not in collected]
    rows.sort(key=lambda row: (row["label"], row["env"], int(row["seed"]), int(row["step"])))
    write_rows(out, rows)
    print(f"{len(rows)} evaluations of {len({name_run(row) for row in rows})} runs: {out}")


def name_run(row: dict[str, str]) -> tuple[str, str, str]:
    return row["label"], row["env"], row["seed"]


# ------------------------------------------------------------------ command line


def report(args: argparse.Namespace) -> None:
    # here, not above: it needs packages that training does not
    from report import make_report

    make_report(
        args.csv,
        args.out or args.csv[0].with_suffix(""),
        args.labels,
        args.reference,
        args.returns,
        args.reps,
        args.thresholds,
        args.speed_table,
        args.speed_row,
    )


def parse_change(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form name=value")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers = parser.add_subparsers(required=True)

    command = subparsers.add_parser("run", help="train the runs that have not finished")
    command.set_defaults(command=run)
    command.add_argument("--algos", nargs="+", choices=ALGOS, default=["softq", "sac", "td3"])
    command.add_argument("--envs", nargs="+", default=["HalfCheetah-v4", "Hopper-v4", "Walker2d-v4"])
    command.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    command.add_argument("--steps", type=positive, default=100_000)
    command.add_argument("--eval-freq", type=positive, help="steps between evaluations (default: steps / 20)")
    command.add_argument("--checkpoint-freq", type=positive, default=CHECKPOINT_FREQ, help="steps between checkpoints")
    command.add_argument("--jobs", type=positive, help="runs at once (default: cores, or what the cluster has room for)")
    command.add_argument("--ray", metavar="ADDRESS", help="train on a Ray cluster: its address, auto, or local for a new one")
    command.add_argument(
        "--set", nargs="+", action="extend", type=parse_change, default=[], metavar="NAME=VALUE", help="change arguments"
    )
    command.add_argument("--evaluation-seed", type=int, default=EVALUATION_SEED, help="first reset seed of the evaluations")
    command.add_argument("--label", help="name in the results (default: the algorithm and what --set changes)")
    command.add_argument("--logs", type=Path, default=LOGS)

    command = subparsers.add_parser("collect", help="merge the evaluations of all runs into one CSV")
    command.set_defaults(command=collect)
    command.add_argument("--name", required=True, help="name of the CSV")
    command.add_argument("--labels", nargs="+", help="only these (default: all)")
    command.add_argument("--envs", nargs="+", help="only these (default: all)")
    command.add_argument("--update", action="store_true", help="keep what the CSV has of other runs, from other machines say")
    command.add_argument("--logs", type=Path, default=LOGS)
    command.add_argument("--out", type=Path, default=HERE / "results", help="folder of the CSV")

    command = subparsers.add_parser("report", help="statistics and figures of a CSV")
    command.set_defaults(command=report)
    command.add_argument("--csv", type=Path, nargs="+", required=True, help="one or more, taken together")
    command.add_argument("--out", type=Path, help="folder of the figures (default: beside the first CSV, of its name)")
    command.add_argument("--labels", nargs="+", help="only these, in this order (default: all)")
    command.add_argument("--reference", default="softq", help="label whose probability of improvement is computed")
    command.add_argument("--returns", choices=("deterministic", "stochastic"), default="deterministic")
    command.add_argument("--reps", type=positive, default=2000, help="bootstrap replications")
    command.add_argument(
        "--thresholds",
        nargs="+",
        action="extend",
        type=parse_threshold,
        default=[],
        metavar="[ENV=]RETURN",
        help="returns whose time to return is computed (default: that of the RL Zoo's SAC and half of it)",
    )
    command.add_argument("--speed-table", type=Path, default=SPEED_TABLE, help="of speed.py, for minutes (default: results/)")
    command.add_argument(
        "--speed-row",
        nargs="+",
        action="extend",
        default=[],
        metavar="LABEL=ROW",
        help=f"row of the speed table for a label (default: {', '.join(f'{x}={y}' for x, y in SPEED_ROWS.items())})",
    )
    return parser


def main() -> None:
    args = make_parser().parse_args()
    args.command(args)


if __name__ == "__main__":
    main()
