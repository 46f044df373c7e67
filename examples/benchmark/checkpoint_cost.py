"""
What a checkpoint costs: seconds that training stops, and megabytes that are written, by the number of transitions in the
replay buffer. ResumableCheckpoint against Stable-Baselines3's CheckpointCallback with its replay buffer.

The buffer is that of Walker2d-v4, filled with random numbers in place of simulation. Before each save it gains ``--save-freq``
transitions. CheckpointCallback neither waits for the disk nor deletes old checkpoints; this script deletes them.
"""

import argparse
import csv
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch as th
from arguments import positive
from stable_baselines3.common.callbacks import CheckpointCallback

from sb3_softq import SoftQ
from sb3_softq.checkpoint import ResumableCheckpoint

# Walker2d-v4 by intention: it is what published results are for
warnings.filterwarnings("ignore", message=".*is out of date")

BUFFER_SIZE = 1_000_000
FILLS = (10_000, 100_000, 300_000, 1_000_000)
# Seconds and megabytes of each save
Costs = list[tuple[float, float]]
COLUMNS = ("callback", "fill", "seconds", "megabytes")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Seconds and megabytes of a checkpoint")
    parser.add_argument("--fills", type=positive, nargs="+", default=list(FILLS), help="transitions in the replay buffer")
    parser.add_argument("--save-freq", type=positive, default=10_000, help="transitions between saves (default: %(default)s)")
    parser.add_argument("--repeats", type=positive, default=5, help="saves of each, the median counts (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where checkpoints are written (default: that of temporary files)")
    results = Path(__file__).parent / "results" / "checkpoint_cost.csv"
    parser.add_argument("--out", type=Path, default=results, help="CSV file (default: %(default)s)")
    return parser.parse_args()


def gain(model: SoftQ, n_rows: int, rng: np.random.Generator) -> None:
    """Transitions as training would add them."""
    buffer = model.replay_buffer
    assert buffer is not None
    rows = np.arange(buffer.pos, buffer.pos + n_rows) % buffer.buffer_size
    for array in (buffer.observations, buffer.next_observations, buffer.actions, buffer.rewards):
        array[rows] = rng.standard_normal((n_rows, *array.shape[1:]), dtype=np.float32)
    buffer.full = buffer.full or buffer.pos + n_rows >= buffer.buffer_size
    buffer.pos = (buffer.pos + n_rows) % buffer.buffer_size
    model.num_timesteps += n_rows


def measure(save: Callable[[], object], folder: Path) -> tuple[float, float]:
    """
    :param save: What writes files
    :param folder: Where it does
    :return: Seconds, and megabytes of the files that are new
    """
    files = {path: path.stat().st_ino for path in folder.rglob("*") if path.is_file()}
    inodes = set(files.values())
    start = time.perf_counter()
    save()
    seconds = time.perf_counter() - start
    new = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return seconds, sum(stat.st_size for stat in new if stat.st_ino not in inodes) / 1e6


def resumable(model: SoftQ, folder: Path, args: argparse.Namespace, rng: np.random.Generator) -> Costs:
    callback = ResumableCheckpoint(args.save_freq, folder)
    callback.init_callback(model)
    # the first one in each of the two folders is whole
    for _ in range(callback.keep):
        callback.save()
    results = []
    for _ in range(args.repeats):
        gain(model, args.save_freq, rng)
        results.append(measure(callback.save, folder))
    return results


def stable_baselines3(model: SoftQ, folder: Path, args: argparse.Namespace, rng: np.random.Generator) -> Costs:
    callback = CheckpointCallback(1, str(folder), save_replay_buffer=True)
    callback.init_callback(model)
    results = []
    for _ in range(args.repeats):
        gain(model, args.save_freq, rng)
        results.append(measure(callback.on_step, folder))
        shutil.rmtree(folder)
        folder.mkdir()
    return results


def main() -> None:
    args = parse_args()
    th.set_num_threads(1)
    rng = np.random.default_rng(0)
    rows = []
    for fill in args.fills:
        for name, run in (("ResumableCheckpoint", resumable), ("CheckpointCallback", stable_baselines3)):
            model = SoftQ("MlpPolicy", gym.make("Walker2d-v4"), buffer_size=BUFFER_SIZE, learning_starts=300, device="cpu")
            # a few updates, so that the optimizers have something to save
            model.learn(310)
            for _ in range(0, fill - 310 - args.save_freq, args.save_freq):
                gain(model, args.save_freq, rng)
            gain(model, max(fill - args.save_freq - model.num_timesteps, 0), rng)
            with tempfile.TemporaryDirectory(dir=args.folder) as folder:
                results = run(model, Path(folder), args, rng)
            seconds, megabytes = (statistics.median(column) for column in zip(*results, strict=True))
            rows.append((name, fill, f"{seconds:.3f}", f"{megabytes:.1f}"))
            print(f"{name:>20} {fill:>9,} transitions {seconds:7.3f} s {megabytes:7.1f} MB", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([COLUMNS, *rows])


if __name__ == "__main__":
    main()
