"""
A long run: does memory, the number of open files or the time of a step grow? Eight environments of Walker2d-v4, a checkpoint
every 10,000 steps, TensorBoard. The replay buffer is full after 50,000 steps; until then it takes more memory as it fills.
Speed is by the time of the process, whatever else the machine does.

    python examples/benchmark/soak.py

Writes ``results/soak.csv`` and ``results/soak.png``, and prints what the last third of the run has to the second.
"""

import argparse
import csv
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
    "files": "open files",
    "steps_per_second": "steps per second of CPU time",
}
RESULTS = Path(__file__).parent / "results"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Memory, open files and speed over a long run")
    parser.add_argument("--steps", type=int, default=300_000, help="steps of all environments (default: %(default)s)")
    parser.add_argument("--every", type=int, default=5_000, help="steps between two looks (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of soak.csv and soak.png (default: %(default)s)")
    return parser.parse_args()


class Look(BaseCallback):
    """
    Write down what the process takes.

    :param every: Steps between two looks
    """

    def __init__(self, every: int):
        super().__init__()
        self.every = every
        self.process = psutil.Process()
        self.rows: list[tuple[int, float, int, float]] = []

    def _on_training_start(self) -> None:
        self.begun = self.num_timesteps, time.process_time()

    def _on_step(self) -> bool:
        step, now = self.num_timesteps, time.process_time()
        if step - self.begun[0] >= self.every:
            megabytes = self.process.memory_info().rss / 1e6
            row = (step, round(megabytes, 1), self.process.num_fds(), round((step - self.begun[0]) / (now - self.begun[1]), 1))
            self.rows.append(row)
            print(*(f"{name} {value:,}" for name, value in zip(COLUMNS, row, strict=True)), sep="  ", flush=True)
            self.begun = step, now
        return True


def growth(rows: list[tuple[int, float, int, float]]) -> list[float]:
    """Of memory, open files and speed: median of the last third to that of the second."""
    third = len(rows) // 3
    before, after = rows[third : 2 * third], rows[2 * third :]
    return [median(row[i] for row in after) / median(row[i] for row in before) for i in (1, 2, 3)]


def draw(rows: list[tuple[int, float, int, float]], path: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(12, 3), layout="constrained")
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
    look = Look(args.every)
    with tempfile.TemporaryDirectory() as folder:
        env = make_vec_env(lambda: gym.make("Walker2d-v4"), n_envs=N_ENVS, seed=0)
        model = SoftQ("MlpPolicy", env, buffer_size=BUFFER_SIZE, tensorboard_log=f"{folder}/tensorboard", seed=0, device="cpu")
        model.learn(args.steps, [ResumableCheckpoint(SAVE_FREQ, f"{folder}/checkpoints"), look])
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "soak.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([list(COLUMNS), *look.rows])
    draw(look.rows, args.out / "soak.png")
    memory, files, speed = growth(look.rows)
    print(f"last third to the second: memory {memory:.3f}, open files {files:.3f}, speed {speed:.3f}")


if __name__ == "__main__":
    main()
