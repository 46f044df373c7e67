"""Tools of ``speed.py``: fair turns, ratios, threads, and tables that say on which machine they were measured."""

import csv
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch as th

Key = TypeVar("Key")
Row = dict[str, Any]

CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def processor() -> str:
    """Name of the processor, as far as the system tells."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return name


def machine() -> str:
    """What the numbers depend on besides the code."""
    versions = f"torch {th.__version__}, Python {platform.python_version()}, {platform.system()}"
    return f"{processor()}, {os.cpu_count()} cores, {th.get_num_threads()} torch threads by default; {versions}"


def interleave(measure: Callable[[Key], float], keys: Sequence[Key], rounds: int) -> dict[Key, list[float]]:
    """
    Measure all keys in turn, ``rounds`` times, so that what else happens on the machine meets all of them. Each round
    starts with another key, since a pass can heat or throttle the next.
    """
    results: dict[Key, list[float]] = {key: [] for key in keys}
    for i in range(rounds):
        for j in range(len(keys)):
            key = keys[(i + j) % len(keys)]
            results[key].append(measure(key))
    return results


def ratio(values: list[float], reference: list[float] | None) -> float | str:
    """Median over the rounds of the ratio within a round."""
    return "" if reference is None else median(a / b for a, b in zip(values, reference, strict=True))


def show(rows: list[Row]) -> None:
    cells = [list(rows[0]), *([f"{x:.3g}" if isinstance(x, float) else str(x) for x in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    print(flush=True)


def write(path: Path, rows: list[Row]) -> None:
    """A CSV file whose first line is a comment that describes the machine."""
    with path.open("w", newline="") as file:
        file.write(f"# {machine()}\n")
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{x:.5g}" if isinstance(x, float) else x for k, x in row.items()} for row in rows)


def set_threads(n_threads: int, pin: bool = False) -> None:
    """
    :param n_threads: Threads of torch
    :param pin: Confine the process to as many cores. For JAX, whose threads cannot be set once it runs.
    """
    th.set_num_threads(n_threads)
    if hasattr(os, "sched_setaffinity"):
        for thread in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(thread), CORES[:n_threads] if pin else CORES)
