"""
A long run: does memory, the number of open files or the time of a step grow? Eight environments of Walker2d-v4, a checkpoint
every 10,000 steps, TensorBoard. The replay buffer is full after 50,000 steps; until then it takes more memory as it fills.
Speed is by the time of the process, whatever else the machine does. glibc keeps freed blocks of up to 32 MB for later, so that
resident memory goes up and down: here it gives large ones back, which is slower, and a leak of less can be seen. Without
(``--keep-freed``) memory in use, which is what glibc has given out, is what to look at.

    python examples/benchmark/soak.py

Writes ``results/soak.csv`` and ``results/soak.png``, and prints what the last third of the run has to the second.
"""

import argparse
import csv
import ctypes
import math
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median

import gymnasium as gym
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import psutil
import torch as th
from arguments import positive
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

from sb3_softq import SoftQ
from sb3_softq.checkpoint import ResumableCheckpoint

# Walker2d-v4 by intention: it is what published results are for
warnings.filterwarnings("ignore", message=".*is out of date")

BUFFER_SIZE, SAVE_FREQ, N_ENVS = 50_000, 10_000, 8
COLUMNS = {
    "step": "steps",
    "megabytes": "resident memory (MB)",
    "megabytes_in_use": "memory in use (MB)",
    "files": "open files",
    "steps_per_second": "steps per second of CPU time",
}
RESULTS = Path(__file__).parent / "results"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Memory, open files and speed over a long run")
    parser.add_argument("--steps", type=positive, default=300_000, help="steps of all environments (default: %(default)s)")
    parser.add_argument("--every", type=positive, default=5_000, help="steps between two looks (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of soak.csv and soak.png (default: %(default)s)")
    parser.add_argument("--keep-freed", action="store_true", help="let glibc keep large freed blocks, as it does by default")
    args = parser.parse_args()
    # a look in each third of the run, and the environments step together
    least = 3 * math.ceil(args.every / N_ENVS) * N_ENVS
    if args.steps < least:
        parser.error(f"--steps {args.steps} is not allowed: with --every {args.every} it must be at least {least}")
    return args


class MallInfo2(ctypes.Structure):
    """Of glibc's ``malloc.h``."""

    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in _names]


def bytes_in_use() -> float:
    """Blocks that the process has from glibc, small ones and large ones; nan where the C library is another."""
    function = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if function is None:
        return math.nan
    function.restype = MallInfo2
    info = function()
    return info.uordblks + info.hblkhd


def give_back_freed() -> None:
    """Blocks of 128 kB and more, as glibc does it until the first one is freed (``M_MMAP_THRESHOLD`` in ``man mallopt``)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 128 * 1024)


class Look(BaseCallback):
    """
    Write down what the process takes.

    :param every: Steps between two looks
    """

    def __init__(self, every: int):
        super().__init__()
        self.every = every
        self.process = psutil.Process()
        self.rows: list[tuple[float, ...]] = []

    def _on_training_start(self) -> None:
        self.begun = self.num_timesteps, time.process_time()

    def _on_step(self) -> bool:
        step, now = self.num_timesteps, time.process_time()
        if step - self.begun[0] >= self.every:
            megabytes = self.process.memory_info().rss / 1e6
            speed = (step - self.begun[0]) / (now - self.begun[1])
            row = (step, round(megabytes, 1), round(bytes_in_use() / 1e6, 1), self.process.num_fds(), round(speed, 1))
            self.rows.append(row)
            print(*(f"{name} {value:,}" for name, value in zip(COLUMNS, row, strict=True)), sep="  ", flush=True)
            self.begun = step, now
        return True


def growth(rows: list[tuple[float, ...]]) -> list[float]:
    """Of memory, resident and in use, open files and speed: median of the last third to that of the second."""
    third = len(rows) // 3
    before, after = rows[third : 2 * third], rows[2 * third :]
    return [median(row[i] for row in after) / median(row[i] for row in before) for i in range(1, len(COLUMNS))]


def draw(rows: list[tuple[float, ...]], path: Path) -> None:
    figure, axes = plt.subplots(1, 4, figsize=(15, 3), layout="constrained")
    for ax, (i, title) in zip(axes, list(enumerate(COLUMNS.values()))[1:], strict=True):
        ax.plot([row[0] / 1000 for row in rows], [row[i] for row in rows])
        ax.axvline(BUFFER_SIZE / 1000, color="0.6", lw=1, ls="--", label="the replay buffer is full")
        ax.set(title=title, xlabel="thousand steps", ylim=(0, 1.2 * max(row[i] for row in rows)))
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=90)


def main() -> None:
    args = parse_args()
    th.set_num_threads(1)
    if not args.keep_freed:
        give_back_freed()
    look = Look(args.every)
    with tempfile.TemporaryDirectory() as folder:
        env = make_vec_env(lambda: gym.make("Walker2d-v4"), n_envs=N_ENVS, seed=0)
        model = SoftQ("MlpPolicy", env, buffer_size=BUFFER_SIZE, tensorboard_log=f"{folder}/tensorboard", seed=0, device="cpu")
        model.learn(args.steps, [ResumableCheckpoint(SAVE_FREQ, f"{folder}/checkpoints"), look])
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "soak.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([list(COLUMNS), *look.rows])
    draw(look.rows, args.out / "soak.png")
    print(
        "last third to the second:",
        *(f"{title} {x:.3f}" for title, x in zip(list(COLUMNS)[1:], growth(look.rows), strict=True)),
    )


if __name__ == "__main__":
    main()
