"""Figures of ``speed.py``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def plot_table(rows: list[dict[str, Any]], threads: Sequence[int], path: Path) -> None:
    names = list(dict.fromkeys(row["algorithm"] for row in rows))
    fig, ax = plt.subplots(figsize=(8, 0.5 * len(names) + 1.2), layout="constrained")
    height = 0.8 / len(threads)
    for i, n_threads in enumerate(threads):
        values = [row["steps_per_second"] for row in rows if row["threads"] == n_threads]
        bars = ax.barh(np.arange(len(names)) + i * height, values, 0.92 * height, color=f"C{i}")
        bars.set_label(f"{n_threads} thread{'s' * (n_threads > 1)}")
        ax.bar_label(bars, fmt="%.0f", padding=3, fontsize=8)
    ax.set_yticks(np.arange(len(names)) + 0.5 * (len(threads) - 1) * height, names)
    ax.invert_yaxis()
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_xlabel("steps per second of learn(), Walker2d-v4, batch 256,\nnetworks of 2x256 unless said otherwise")
    ax.legend(frameon=False, loc="lower right")
    fig.savefig(path, dpi=110)
    plt.close(fig)


def plot_growth(rows: list[dict[str, Any]], path: Path) -> None:
    axis_names = list(dict.fromkeys(row["axis"] for row in rows))
    fig, axes = plt.subplots(2, len(axis_names), figsize=(15, 6), sharex="col", sharey="row", layout="constrained")
    for (top, bottom), axis in zip(axes.T, axis_names, strict=True):
        mine = [row for row in rows if row["axis"] == axis]
        values = [row["value"] for row in mine]
        top.plot(values, [row["ms"] for row in mine], "o-", label="measured")
        top.plot(values, [mine[0]["ms"] * row["linear"] for row in mine], "--", color="0.6", label="linear")
        top.set(xscale="log", yscale="log", title=f"{axis}: ms per step of all" if axis == "environments" else axis)
        bottom.plot(values, [row["peak_mb"] for row in mine], "o-")
        bottom.set(xlabel="environments, an update for each" if axis == "environments" else axis)
        bottom.set_xticks(values, [str(value) for value in values])
        bottom.minorticks_off()
        for ax in (top, bottom):
            ax.grid(alpha=0.3)
    axes[0, 0].set_ylabel("ms per update")
    axes[1, 0].set_ylabel("peak memory, MB")
    axes[1, 0].set_ylim(bottom=0)
    axes[0, 0].legend(frameon=False)
    fig.savefig(path, dpi=90)
    plt.close(fig)


def plot_memory(samples: Sequence[tuple[int, float]], path: Path) -> None:
    """Resident memory over the steps of a run."""
    fig, ax = plt.subplots(figsize=(6, 3), layout="constrained")
    ax.plot(*zip(*samples, strict=True))
    ax.set(xlabel="step", ylabel="resident memory, MB", ylim=(0, 1.15 * max(mb for _, mb in samples)))
    ax.grid(alpha=0.3)
    fig.savefig(path, dpi=110)
    plt.close(fig)
