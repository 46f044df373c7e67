"""
Time to return: steps and minutes on one core until the mean return stays above a threshold, see ``learning.py report``.

Minutes are steps / steps per second, the latter from one table of ``speed.py``, so that all labels are timed on one machine.
They are an upper bound: ``learning_starts`` steps are counted at full price. The environment and the networks are those of
the speed table, not those of each run.
"""

import argparse
import csv
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

SPEED_TABLE = Path(__file__).parent / "results" / "speed_table.csv"
# Row of the speed table by label. The results of softq were trained with compile=True; no row has the settings of "original"
SPEED_ROWS = {"softq": "SoftQ, compiled", "sac": "SAC", "td3": "TD3", "tqc": "TQC", "crossq": "CrossQ"}
COLUMNS = ("environment", "label", "threshold", "return", "steps", "minutes", "n_seeds")


class Threshold(NamedTuple):
    """
    :param name: For the tables
    :param value: The return to reach
    """

    name: str
    value: float


class SpeedTable(NamedTuple):
    """
    :param machine: First line of the file, without the ``#``
    :param steps_per_second: With one thread, by algorithm
    """

    machine: str
    steps_per_second: dict[str, float]


class TimeToReturn(NamedTuple):
    """
    :param env: Environment id
    :param label: Name in the results
    :param threshold: The return to reach
    :param steps: When it was reached for good, None if it was not
    :param minutes: The same on one core, None if it was not reached or the label has no known speed
    :param n_seeds: Seeds that the mean is over
    :param last_step: Last evaluation that all seeds have, None if there is none
    """

    env: str
    label: str
    threshold: Threshold
    steps: int | None
    minutes: float | None
    n_seeds: int
    last_step: int | None


# ------------------------------------------------------------------ input


def family(env: str) -> str:
    """Of ``HalfCheetah-v4`` HalfCheetah, of ``dm_control/walker-walk-v0`` dm_control."""
    return re.split("[-/]", env)[0]


def parse_threshold(text: str) -> tuple[str | None, float]:
    """
    :param text: ``VALUE`` or ``ENV=VALUE``
    :return: The environment, None for all of them, and the return
    """
    env, separator, number = text.rpartition("=")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or bool(env) != bool(separator):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a finite number nor ENV=NUMBER, such as Walker2d-v4=3000")
    return env or None, value


def choose_thresholds(
    given: Sequence[tuple[str | None, float]], envs: Sequence[str], defaults: dict[str, tuple[str, float]]
) -> dict[str, list[Threshold]]:
    """
    :param given: From ``parse_threshold``; if it is empty, the reference and half of it
    :param envs: Environments of the results
    :param defaults: Name and value of the reference return by environment, if it has one
    :return: Thresholds by environment, without environments that have none
    """
    unknown = [env for env, _ in given if env is not None and env not in envs]
    if unknown:
        raise ValueError(f"--thresholds: {unknown[0]!r} is no environment of the results, there are {', '.join(envs)}")
    chosen: dict[str, list[Threshold]] = {}
    for env in envs:
        if given:
            values = dict.fromkeys(value for only, value in given if only in (None, env))
            thresholds = [Threshold(f"{value:.10g}", value) for value in values]
        elif env in defaults:
            name, value = defaults[env]
            thresholds = [Threshold(name, value), Threshold("half of it", value / 2)]
        else:
            thresholds = []
        if thresholds:
            chosen[env] = thresholds
    return chosen


def read_speed_table(path: Path) -> SpeedTable:
    """
    :param path: File of ``speed.py``: a comment that describes the machine, then CSV
    :return: The machine and its steps per second with one thread
    """
    if not path.is_file():
        raise ValueError(f"--speed-table: {str(path)!r} is no file, expected a CSV file of speed.py")
    first, *lines = path.read_text(encoding="utf-8").splitlines() or [""]
    if not first.startswith("#"):
        raise ValueError(f"--speed-table: {path} starts with {first!r}, expected a comment (#) that describes the machine")
    reader = csv.DictReader(lines)
    missing = {"algorithm", "threads", "steps_per_second"} - set(reader.fieldnames or ())
    if missing:
        raise ValueError(f"--speed-table: {path} has no column {', '.join(sorted(missing))}")
    speeds = {}
    for row in reader:
        # what is not installed has a row without number of threads
        if row["threads"] != "1":
            continue
        try:
            speed = float(row["steps_per_second"])
        except ValueError:
            speed = math.nan
        if not (math.isfinite(speed) and speed > 0):
            raise ValueError(
                f"--speed-table: {path} has steps_per_second={row['steps_per_second']!r} for {row['algorithm']!r}, "
                "expected a positive number"
            )
        speeds[row["algorithm"]] = speed
    if not speeds:
        raise ValueError(f"--speed-table: {path} has no row with threads=1")
    return SpeedTable(first.lstrip("# "), speeds)


def choose_speeds(given: Sequence[str], labels: Sequence[str], table: SpeedTable) -> dict[str, float]:
    """
    :param given: ``LABEL=ROW``, in addition to ``SPEED_ROWS`` or instead of its rows
    :param labels: Labels of the results
    :param table: Where the rows are
    :return: Steps per second by label, without labels that have no row
    """
    rows = {label: row for label, row in SPEED_ROWS.items() if label in labels and row in table.steps_per_second}
    for text in given:
        # both can contain "=": "softq-train_freq=4=SoftQ, compiled, policy_delay=2"
        parts = text.split("=")
        pairs = [("=".join(parts[:i]), "=".join(parts[i:])) for i in range(1, len(parts))]
        pairs = [(label, row) for label, row in pairs if label in labels and row in table.steps_per_second]
        if len(pairs) != 1:
            raise ValueError(
                f"--speed-row: {text!r} is not LABEL=ROW with one of the labels {', '.join(map(repr, labels))} "
                f"and one of the rows {', '.join(map(repr, table.steps_per_second))}"
            )
        rows.update(pairs)
    return {label: table.steps_per_second[row] for label, row in rows.items()}


# ------------------------------------------------------------------ computation


def first_step_above(steps: Sequence[int], means: Sequence[float], threshold: float) -> int | None:
    """
    :param steps: Steps of the evaluations, in ascending order
    :param means: Mean return over seeds at each of them
    :param threshold: The return to reach
    :return: First step from which on no mean is below the threshold, None if the last one is
    """
    first = None
    for step, mean in zip(reversed(steps), reversed(means), strict=True):
        # not "mean < threshold", which lets NaN pass
        if not mean >= threshold:
            break
        first = step
    return first


def time_to_return(
    env: str,
    label: str,
    thresholds: Iterable[Threshold],
    steps: Sequence[int],
    means: Sequence[float],
    n_seeds: int,
    speed: float | None,
) -> list[TimeToReturn]:
    """
    :param env: Environment id
    :param label: Name in the results
    :param thresholds: Returns to reach
    :param steps: Steps of the evaluations that all seeds have, in ascending order
    :param means: Mean return over seeds at each of them
    :param n_seeds: Seeds that the mean is over
    :param speed: Steps per second, None if it is not known
    :return: One for each threshold
    """
    times = []
    for threshold in thresholds:
        reached = first_step_above(steps, means, threshold.value)
        minutes = None if reached is None or speed is None else reached / speed / 60
        times.append(TimeToReturn(env, label, threshold, reached, minutes, n_seeds, steps[-1] if len(steps) else None))
    return times


# ------------------------------------------------------------------ output


def describe(time: TimeToReturn) -> str:
    """Steps and minutes in words."""
    if time.last_step is None:
        return "no evaluation that all seeds have"
    if time.steps is None:
        return f"not within {time.last_step:,} steps"
    if time.minutes is None:
        return f"{time.steps:,} steps"
    return f"{time.steps:,} steps, {time.minutes:.1f} min"


def as_text(
    times: Sequence[TimeToReturn], table: SpeedTable, speeds: dict[str, float], reference_steps: Iterable[int] = (1_000_000,)
) -> str:
    """
    :param times: What to print
    :param table: What the minutes are from
    :param speeds: Steps per second by label
    :param reference_steps: Steps for which SAC's hours are printed
    :return: Table and notes, for the screen
    """
    rows = [("environment", "threshold", "return", "label", "seeds", "time to return")]
    rows += [
        (time.env, time.threshold.name, f"{time.threshold.value:,.10g}", time.label, str(time.n_seeds), describe(time))
        for time in times
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += [
        "",
        "Time to return: first evaluation from which on the mean over seeds of the deterministic return is never below the "
        "threshold, up to the last step that all seeds have.",
        f"Minutes on one core: steps / steps per second, measured on {table.machine}. An upper bound: learning_starts steps "
        "counted at full price. Environment and networks are those of the speed table.",
    ]
    unknown = dict.fromkeys(time.label for time in times if time.label not in speeds)
    if unknown:
        lines.append(f"No minutes for {', '.join(unknown)}: no row of the speed table is theirs, see --speed-row.")
    lines += [sac_hours(table, steps) for steps in reference_steps]
    return "\n".join(lines)


def sac_hours(table: SpeedTable, steps: int = 1_000_000) -> str:
    """
    :param table: What the hours are from
    :param steps: How many SAC trains for
    :return: A sentence
    """
    speed = table.steps_per_second.get(SPEED_ROWS["sac"])
    hours = f"no row {SPEED_ROWS['sac']!r} in the speed table" if speed is None else f"{steps / speed / 3600:.1f} hours"
    return f"SAC after {steps:,} steps: {hours}"


def write_csv(times: Sequence[TimeToReturn], table: SpeedTable, path: Path) -> None:
    """
    :param times: One row each
    :param table: Its machine is the comment in the first line
    :param path: File to write
    """
    with path.open("w", newline="", encoding="utf-8") as file:
        file.write(f"# {table.machine}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for time in times:
            minutes = "" if time.minutes is None else f"{time.minutes:.2f}"
            value = f"{time.threshold.value:.10g}"
            steps = "" if time.steps is None else time.steps
            writer.writerow((time.env, time.label, time.threshold.name, value, steps, minutes, time.n_seeds))
