"""
How fast SoftQ trains and acts, beside its peers and a plain port of soft Q-learning, all in one run.

    python examples/benchmark/speed.py            # everything; --quick for a smoke run
    python examples/benchmark/speed.py --only table|growth|predict|start|memory

- table: all algorithms live in one process and take turns at ``learn()``, 50 steps each, at one and two torch threads; each
  round starts with another one. Steps per second are medians over the rounds; a ratio is formed within each round, and its
  median is shown. The time of an update is that of ``train()`` alone, without the profiler. The time in matmuls is
  torch.profiler's, which slows only what lies between them; medians of three. Each matmul is then computed again by itself,
  operands warm, the best of nine chunks by either library: that is the peak, of which shares are given.
- growth: one thread, SoftQ with its defaults except for one number, an environment that costs nothing, a full replay buffer.
  ``growth`` is the ratio to the first point, ``exponent`` the local one since the point before. With several environments the
  time is that of one step of all, with an update for each. Memory is the peak of a fresh process per point.
- predict: milliseconds for one observation and for 64, one thread, SoftQ and SAC in turn; the deterministic action through
  onnxruntime too (extra ``onnx``).
- start: seconds of the first update, each in a fresh process: not compiled, compiled with an empty cache, compiled with the
  cache that this one left.
- memory: resident memory over 5,000 steps (``--long``: 50,000) of a process of its own, the replay buffer full from the start.

Results are in the README of this folder.
"""

import argparse
import importlib
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from arguments import positive
from gymnasium import spaces
from matmul import measure_matmuls
from measuring import Row, interleave, machine, ratio, set_threads, show, write
from plain_port import PlainSoftQ
from sb3_contrib import TQC, CrossQ
from speed_plots import plot_growth, plot_memory, plot_table
from stable_baselines3 import SAC, TD3
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from torch import nn

from sb3_softq import SQL_2017, SoftQ


def optional_module(name: str) -> Any:
    """A module, or None where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


sbx, onnxruntime = optional_module("sbx"), optional_module("onnxruntime")
if onnxruntime is not None:
    sys.path.append(str(Path(__file__).parents[1]))
    from export_onnx import export


ENV_ID = "Walker2d-v4"
NET: dict[str, Any] = dict(net_arch=[256, 256])
# SQL (2017) at the load of the other rows
LOAD: dict[str, Any] = SQL_2017 | dict(
    particle_options=replace(SQL_2017["particle_options"], n_actor_states=256), ent_coef=0.1
)
ORIGINAL_NET: dict[str, Any] = LOAD.pop("policy_kwargs") | dict(net_arch=dict(pi=[], qf=[256, 256]), head_arch=[256, 256])
PLAIN = "SQL (2017), plain port"


@dataclass
class Effort:
    """How long to measure."""

    rounds: int = 12
    slice_steps: int = 50
    warm_up_steps: int = 300
    profiled_updates: int = 20
    growth_updates: int = 10
    predictions: int = 200
    memory_steps: int = 5_000
    starts: int = 3
    every: int = 1  # take each n-th point of a growth curve


QUICK = Effort(2, 4, 110, 2, 2, 20, 400, starts=1, every=3)


# ---------------------------------------------------------------------- table: steps per second and matmuls


class PlainPort(SoftQ):
    """The plain port inside SB3's loop: SoftQ collects, with the port's actor, and the port learns."""

    def _setup_model(self) -> None:
        super()._setup_model()
        self.plain = PlainSoftQ(self.observation_space.shape[0], self.action_space.shape[0], NET["net_arch"])  # type: ignore[index]
        self.policy.ema_actor.head = self.plain.actor

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        for _ in range(gradient_steps):
            data = self.replay_buffer.sample(batch_size)  # type: ignore[union-attr]
            # MuJoCo's observations are float64
            obs, next_obs = data.observations.float(), data.next_observations.float()
            self.plain.update(obs, data.actions, data.rewards, next_obs, data.dones)


def agents() -> dict[str, Callable[[], Any] | None]:
    """A constructor for each row of the table, None where it is not installed."""

    def row(cls: Any, net: dict[str, Any] = NET, **kwargs: Any) -> Callable[[], Any]:
        # SB3 writes into policy_kwargs: a copy for each
        kwargs |= dict(batch_size=256, buffer_size=100_000, learning_starts=100, policy_kwargs=dict(net))
        return partial(cls, "MlpPolicy", ENV_ID, **kwargs)

    options: dict[str, dict[str, bool]] = {
        "": {},
        ", compiled": dict(compile=True),
        ", bfloat16": dict(bfloat16=True),
        ", compiled, bfloat16": dict(compile=True, bfloat16=True),
    }
    rows: dict[str, Callable[[], Any] | None] = {f"SoftQ{name}": row(SoftQ, {}, **option) for name, option in options.items()}
    rows["SoftQ, no batch normalisation"] = row(SoftQ, dict(batch_norm=False), tau=0.005)
    rows["SoftQ, compiled, policy_delay=2"] = row(SoftQ, {}, compile=True, policy_delay=2)
    rows |= {cls.__name__: row(cls) for cls in (SAC, TD3, TQC, CrossQ)}
    rows["CrossQ, its own widths"] = row(CrossQ, {})
    rows |= {f"{name} of sbx": None if sbx is None else row(getattr(sbx, name)) for name in ("SAC", "TD3", "CrossQ")}
    rows |= {f"SQL (2017), SoftQ{name}": row(SoftQ, ORIGINAL_NET, **LOAD, **option) for name, option in options.items()}
    return rows | {PLAIN: row(PlainPort, ORIGINAL_NET, **LOAD)}


def measure_table(effort: Effort, threads: Sequence[int], out: Path, table_name: str) -> None:
    """Steps per second of ``learn()``, and where an update spends its time, as ``table_name``.csv and ``.png``."""
    set_threads(threads[0])
    constructors = agents()
    missing = [name for name, constructor in constructors.items() if constructor is None]
    models = {name: constructor() for name, constructor in constructors.items() if constructor is not None}
    for name, model in models.items():
        model.learn(effort.warm_up_steps)
        print(f"warm: {name}", flush=True)

    def steps_per_second(key: tuple[str, int]) -> float:
        name, n_threads = key
        set_threads(n_threads, pin="sbx" in name)
        start = time.perf_counter()
        models[name].learn(effort.slice_steps, reset_num_timesteps=False)
        return effort.slice_steps / (time.perf_counter() - start)

    speeds = interleave(steps_per_second, [(name, n) for n in threads for name in models], effort.rounds)
    rows: list[Row] = []
    for (name, n_threads), values in speeds.items():
        row: Row = dict(algorithm=name, threads=n_threads, steps_per_second=median(values))
        for column, reference in (("to_SAC", "SAC"), ("to_TD3", "TD3"), ("to_plain_port", PLAIN)):
            comparable = reference != PLAIN or name.startswith("SQL")
            row[column] = ratio(values, speeds[reference, n_threads] if comparable else None)
        set_threads(n_threads)
        if "sbx" not in name:
            row |= measure_matmuls(models[name], n_threads, effort.profiled_updates, min(effort.rounds, 3))
        rows.append(row)
    rows = [{column: row.get(column, "") for column in rows[0]} for row in rows]
    rows += [dict.fromkeys(rows[0], "") | dict(algorithm=name, steps_per_second="not installed") for name in missing]
    write(out / f"{table_name}.csv", rows)
    show(rows)
    plot_table([row for row in rows if row["threads"]], threads, out / f"{table_name}.png")


# ---------------------------------------------------------------------- growth of time and memory


class RandomEnv(gym.Env):
    """Costs next to nothing itself, in any number of action dimensions."""

    def __init__(self, action_dim: int):
        self.observation_space = spaces.Box(-np.inf, np.inf, (17,))
        self.action_space = spaces.Box(-1.0, 1.0, (action_dim,))
        self.observations = np.random.default_rng(0).standard_normal((1000, 17)).astype(np.float32)
        self.t = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        self.t = 0
        return self.observations[0], {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.t += 1
        return self.observations[self.t % 1000], float(-np.square(action).sum()), False, self.t >= 1000, {}


AXES: dict[str, tuple[int, ...]] = {
    "particles": (1, 2, 4, 8, 16, 32, 64),
    "batch size": (64, 128, 256, 512, 1024, 2048),
    "action dimension": (1, 2, 4, 8, 16, 32, 64),
    "critics": (1, 2, 5),
    "environments": (1, 2, 4, 8, 16),
}


def growth_agent(axis: str, value: int) -> SoftQ:
    """SoftQ with its defaults except for one, its replay buffer full."""
    kwargs: dict[str, dict[str, Any]] = {
        "particles": dict(n_value_particles=value, n_actor_particles=value),
        "batch size": dict(batch_size=value),
        "critics": dict(policy_kwargs=dict(n_critics=value)),
        "environments": dict(gradient_steps=-1),
    }
    env = make_vec_env(partial(RandomEnv, value if axis == "action dimension" else 6), value if axis == "environments" else 1)
    model = SoftQ("MlpPolicy", env, buffer_size=4096, learning_starts=4096, **kwargs.get(axis, {}))
    return model.learn(4096)


def growth_update(model: SoftQ, n_updates: int) -> None:
    """Some updates; with ``gradient_steps=-1`` as many steps of all environments, each followed by an update for each."""
    if model.gradient_steps == -1:
        model.learn(n_updates * model.n_envs, reset_num_timesteps=False)
    else:
        model.train(n_updates, model.batch_size)


def peak_memory(axis: str, value: int, n_updates: int) -> float:
    """Peak of the resident memory in MB (on Linux, elsewhere nan), to be called in a process of its own."""
    th.set_num_threads(1)
    growth_update(growth_agent(axis, value), n_updates)
    # not getrusage, whose maximum a child process inherits from its parent
    status = Path("/proc/self/status")
    return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024 if status.exists() else float("nan")


def in_new_process(function: Callable[..., Any], arguments: list[tuple[Any, ...]]) -> list[Any]:
    """Call a function once for each tuple of arguments, each in a fresh process that has imported this module only."""
    with multiprocessing.get_context("forkserver").Pool(1, maxtasksperchild=1) as pool:
        return pool.starmap(function, arguments, chunksize=1)


def measure_growth(effort: Effort, out: Path) -> None:
    """Time per update and peak memory of the process against each thing that a user can make larger, one thread."""
    set_threads(1)
    rows: list[Row] = []
    for axis, all_values in AXES.items():
        values = sorted({*all_values[:: effort.every], all_values[-1]})
        models = {value: growth_agent(axis, value) for value in values}

        def seconds(value: int, models: dict[int, SoftQ] = models) -> float:
            start = time.perf_counter()
            growth_update(models[value], effort.growth_updates)
            return (time.perf_counter() - start) / effort.growth_updates

        interleave(seconds, values, 1)
        times = interleave(seconds, values, effort.rounds)
        memory = in_new_process(peak_memory, [(axis, value, effort.growth_updates) for value in values])
        for i, value in enumerate(values):
            row: Row = dict(
                axis=axis, value=value, ms=1e3 * median(times[value]), growth=ratio(times[value], times[values[0]])
            )
            row["linear"] = value / values[0]
            # 1 is linear; from the point before to this one
            step = ratio(times[value], times[values[i - 1]]) if i else ""
            row["exponent"] = np.log(step) / np.log(value / values[i - 1]) if i else ""
            rows.append(row | dict(peak_mb=memory[i]))
        print(f"measured: {axis}", flush=True)
    write(out / "speed_growth.csv", rows)
    show(rows)
    plot_growth(rows, out / "speed_growth.png")


# ---------------------------------------------------------------------- latency of predict


def onnx_predict(name: str, policy: BasePolicy, path: Path) -> Callable[[np.ndarray], Any]:
    """The deterministic action through onnxruntime, one thread, from observations as the environment gives them."""
    if name == "SAC":
        # it makes a distribution, whose checks cannot be exported
        actor: Any = policy.actor
        mean = nn.Sequential(actor.features_extractor, actor.latent_pi, actor.mu, nn.Tanh())
        setattr(policy, "_predict", lambda obs, deterministic: mean(obs))  # noqa: B010
    export(policy, path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options)
    return lambda obs: session.run(None, {"obs": np.atleast_2d(obs).astype(np.float32)})


def measure_predict(effort: Effort, out: Path) -> None:
    """Milliseconds of ``predict`` for one observation and for 64, one thread."""
    set_threads(1)
    models: dict[str, OffPolicyAlgorithm] = {
        "SoftQ": SoftQ("MlpPolicy", ENV_ID),
        "SAC": SAC("MlpPolicy", ENV_ID, policy_kwargs=dict(NET)),
    }
    predict: dict[tuple[str, str], Callable[[np.ndarray], Any]] = {}
    for name, model in models.items():
        # SoftQ asks its critics for the deterministic action once they have learned
        model.learn(150)
        predict[name, "stochastic"] = model.predict
        predict[name, "deterministic"] = partial(model.predict, deterministic=True)
    if onnxruntime is not None:
        with tempfile.TemporaryDirectory() as folder:
            for name, model in models.items():
                predict[name, "deterministic, ONNX"] = onnx_predict(
                    name, deepcopy(model.policy), Path(folder) / f"{name}.onnx"
                )
    one = gym.make(ENV_ID).reset(seed=0)[0]
    observations = {1: one, 64: np.stack([one] * 64)}

    def seconds(key: tuple[str, str, int]) -> float:
        name, kind, n_observations = key
        start = time.perf_counter()
        for _ in range(effort.predictions):
            predict[name, kind](observations[n_observations])
        return (time.perf_counter() - start) / effort.predictions

    keys = [(name, kind, n) for n in observations for name, kind in predict]
    interleave(seconds, keys, 1)
    times = interleave(seconds, keys, effort.rounds)
    rows: list[Row] = [
        dict(
            algorithm=name,
            action=kind,
            observations=n,
            ms=1e3 * median(times[name, kind, n]),
            to_SAC=ratio(times[name, kind, n], times["SAC", kind, n]),
        )
        for name, kind, n in keys
    ]
    write(out / "speed_predict.csv", rows)
    show(rows)


# ---------------------------------------------------------------------- start of a process


def start_in_process(compile: bool, cache: str) -> float:
    """Seconds from before the first update to after it, to be called in a process of its own, with torch's cache there."""
    # here, since processes inherit the environment that the first of them was started with
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    warnings.filterwarnings("ignore", message=".*is out of date.*")
    th.set_num_threads(1)
    model = SoftQ("MlpPolicy", ENV_ID, buffer_size=1_000, learning_starts=100, compile=compile).learn(100)
    start = time.perf_counter()
    model.learn(1, reset_num_timesteps=False)
    return time.perf_counter() - start


def measure_start(effort: Effort, out: Path) -> None:
    """Seconds of the first update: without compilation, compiled for the first time on a machine, and in a second process."""
    rows: list[Row] = []
    for i in range(effort.starts):
        with tempfile.TemporaryDirectory() as folder:
            for name, compile in (("not compiled", False), ("compiled, first process", True), ("compiled, second", True)):
                (seconds,) = in_new_process(start_in_process, [(compile, folder)])
                rows.append(dict(start=name, turn=i, seconds=seconds))
    write(out / "speed_start.csv", rows)
    show(rows)


# ---------------------------------------------------------------------- memory over a run


class MemoryCallback(BaseCallback):
    """Notes the resident memory of the process in MB every ``interval`` steps."""

    def __init__(self, interval: int):
        super().__init__()
        self.interval = interval
        self.samples: list[tuple[int, float]] = []

    def _on_step(self) -> bool:
        if self.num_timesteps % self.interval == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.samples.append((self.num_timesteps, pages * os.sysconf("SC_PAGE_SIZE") / 2**20))
        return True


def memory_over_steps(n_steps: int) -> list[tuple[int, float]]:
    """Resident memory over a run whose replay buffer is full already, to be called in a process of its own."""
    th.set_num_threads(1)
    callback = MemoryCallback(max(n_steps // 50, 1))
    growth_agent("environments", 1).learn(n_steps, callback, reset_num_timesteps=False)
    return callback.samples


def measure_memory(effort: Effort, out: Path) -> None:
    if not Path("/proc/self/statm").exists():
        print("memory over steps: needs Linux, left out")
        return
    (samples,) = in_new_process(memory_over_steps, [(effort.memory_steps,)])
    write(out / "speed_memory.csv", [dict(step=step, resident_mb=mb) for step, mb in samples])
    settled = samples[len(samples) // 5 :]
    print(f"growth over the last 80 % of {effort.memory_steps} steps: {settled[-1][1] - settled[0][1]:.1f} MB\n", flush=True)
    plot_memory(samples, out / "speed_memory.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["table", "growth", "predict", "start", "memory"], help="measure this part alone")
    parser.add_argument("--quick", action="store_true", help="smoke run, its numbers mean nothing")
    parser.add_argument("--long", action="store_true", help="memory over 50,000 steps")
    parser.add_argument("--threads", type=positive, nargs="+", default=[1, 2], help="torch threads of the table")
    parser.add_argument(
        "--matmul-precision",
        choices=["highest", "medium"],
        default="highest",
        help="of torch.set_float32_matmul_precision, for all rows: 'medium' has the matmuls done by oneDNN instead of MKL",
    )
    parser.add_argument("--out", type=Path, help="folder (default: results beside this script, with --quick logs/speed)")
    args = parser.parse_args()
    if args.quick and args.long:
        parser.error("--long is not for --quick")
    if args.out is None:
        args.out = Path("logs/speed") if args.quick else Path(__file__).parent / "results"

    # v4 is what the published results of the peers are for
    warnings.filterwarnings("ignore", message=".*is out of date.*")
    th.set_float32_matmul_precision(args.matmul_precision)
    effort = QUICK if args.quick else Effort(memory_steps=50_000 if args.long else Effort.memory_steps)
    args.out.mkdir(parents=True, exist_ok=True)
    print(f"{machine()}\n", flush=True)
    if args.only in (None, "table"):
        suffix = "" if args.matmul_precision == "highest" else f"_{args.matmul_precision}"
        measure_table(effort, args.threads, args.out, f"speed_table{suffix}")
    if args.only in (None, "growth"):
        measure_growth(effort, args.out)
    if args.only in (None, "predict"):
        measure_predict(effort, args.out)
    if args.only in (None, "start"):
        measure_start(effort, args.out)
    if args.only in (None, "memory"):
        measure_memory(effort, args.out)
    print(f"Results: {args.out}")


if __name__ == "__main__":
    main()
