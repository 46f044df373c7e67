"""Statistics and figures of the learning benchmark, see ``learning.py report``."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter
from time_to_return import (
    SPEED_TABLE,
    TimeToReturn,
    as_text,
    choose_speeds,
    choose_thresholds,
    describe,
    family,
    read_speed_table,
    sac_hours,
    time_to_return,
    write_csv,
)

try:
    import pandas as pd
    from rliable import library, metrics
    from scipy.stats import trim_mean
except ImportError as error:
    raise SystemExit(f"The report needs {error.name}: pip install 'sb3-softq[benchmark]'") from error

# Normalised return, as SimbaV2 and XQC publish theirs: 0 is the random policy, 1 TD3 after 1M steps (v4 of the environments,
# https://github.com/DAVIAN-Robotics/SimbaV2)
MUJOCO = {
    "HalfCheetah": (-289.4, 10574.0),
    "Hopper": (18.8, 3226.0),
    "Walker2d": (2.8, 3946.0),
    "Ant": (-70.3, 3942.0),
    "Humanoid": (120.4, 5165.0),
}
# Elsewhere 0 is the random policy or the least return, and 1 the largest, or what counts as solved
SCALES = MUJOCO | {
    "dm_control": (0.0, 1000.0),
    "CartPole": (22.0, 500.0),
    "Acrobot": (-500.0, -80.0),
    "LunarLander": (-180.0, 200.0),
}
# Returns that are reached in some time: of the RL Zoo's SAC after 1M steps, 2M on Humanoid (v3 of the environments,
# https://github.com/DLR-RM/rl-baselines3-zoo/blob/master/benchmark.md)
REFERENCE_RETURNS = {"HalfCheetah": 9535.0, "Hopper": 2326.0, "Walker2d": 3863.0, "Ant": 4616.0, "Humanoid": 6232.0}
REFERENCE_STEPS = {"Humanoid": 2_000_000}  # the others: 1,000,000

# What others have published of larger networks or more updates: a marker, and the mean return over ten seeds after
# PUBLISHED_STEP steps (https://github.com/DAVIAN-Robotics/SimbaV2 and https://github.com/danielpalenicek/xqc, results/)
PUBLISHED_STEP = 100_000
PUBLISHED = {
    "CrossQ, 2x2048": (
        "o",
        {"Ant-v4": 2299, "HalfCheetah-v4": 8112, "Hopper-v4": 2764, "Walker2d-v4": 3914, "Humanoid-v4": 2603},
    ),
    "XQC": ("s", {"Ant-v4": 3018, "HalfCheetah-v4": 8597, "Hopper-v4": 2828, "Walker2d-v4": 3612, "Humanoid-v4": 3265}),
    "SimbaV2": ("^", {"Ant-v4": 3881, "HalfCheetah-v4": 7328, "Hopper-v4": 2821, "Walker2d-v4": 3023, "Humanoid-v4": 1329}),
}

# In figures; other labels stand for themselves
NAMES = {
    "softq": "SoftQ",
    "sac": "SAC",
    "td3": "TD3",
    "tqc": "TQC",
    "crossq": "CrossQ",
    "original": "SQL (2017)",
    "discrete": "DiscreteSoftQ",
    "dqn": "DQN",
    "qrdqn": "QR-DQN",
}
COLOURS = {"softq": "C0", "sac": "C3", "td3": "C2", "tqc": "C1", "crossq": "C4", "original": "0.45"}
OTHER_COLOURS = ("C5", "C6", "C8", "C9", "navy", "darkgreen", "gold", "maroon", "black")
DIAGNOSTICS = {
    "q_bias": "Q - actual return",
    "temperature": "temperature",
    "entropy": "entropy (nats)",
    "effective_sample_size": "effective sample size",
    "particle_spread": "particle spread",
}
DPI = 90


class Results:
    """
    Evaluations of several labels, and what can be compared of them.

    :param csvs: Files written by ``learning.py collect``
    :param labels: Labels to keep, all by default
    :param reference: Label that comes first, if it is there
    :param returns: ``"deterministic"`` or ``"stochastic"``
    """

    def __init__(self, csvs: list[Path], labels: list[str] | None, reference: str, returns: str):
        try:
            self.rows = pd.concat([pd.read_csv(csv) for csv in csvs])
        except (FileNotFoundError, pd.errors.EmptyDataError) as error:
            raise SystemExit(f"{', '.join(map(str, csvs))}: {error} (learning.py collect writes such files)") from error
        self.rows = self.rows.drop_duplicates(["label", "env", "seed", "step"], keep="last")
        self.rows["return"] = self.rows[f"{returns}_mean"]
        present = list(self.rows["label"].unique())
        missing = sorted(set(labels or []) - set(present))
        if missing:
            raise SystemExit(f"{', '.join(missing)}: no such label, there are {', '.join(present)}")
        known = [label for label in COLOURS if label in present]
        order = labels or [*known, *(label for label in present if label not in known)]
        self.labels = sorted(order, key=lambda label: label != reference)
        self.rows = self.rows[self.rows["label"].isin(self.labels)]
        self.envs: list[str] = list(self.rows["env"].unique())
        others = iter(OTHER_COLOURS * len(self.labels))
        self.colours = {label: COLOURS.get(label) or next(others) for label in self.labels}

    def table(self, label: str, env: str, column: str = "return") -> Any:
        """Values of one label in one environment: a row for each step that all its seeds have, a column per seed."""
        rows = self.rows[(self.rows["label"] == label) & (self.rows["env"] == env)]
        table = rows.pivot(index="step", columns="seed", values=column)
        complete = rows.pivot(index="step", columns="seed", values="return").notna().all(axis=1)
        return table[complete]

    def scores(self) -> tuple[dict[str, np.ndarray], list[str], np.ndarray]:
        """
        Normalised returns where all labels can be compared.

        :return: Array of shape (n_seeds, n_envs, n_steps) per label, the environments, the steps
        """
        envs = [
            env for env in self.envs if family(env) in SCALES and all(len(self.table(label, env)) for label in self.labels)
        ]
        if not envs:
            raise SystemExit("There is no environment with a normalised return in which every label has been evaluated")
        tables = {(label, env): self.table(label, env) for label in self.labels for env in envs}
        steps = sorted(set.intersection(*(set(table.index) for table in tables.values())))
        if not steps:
            raise SystemExit("There is no step at which every label has been evaluated")
        scores = {}
        for label in self.labels:
            seeds = sorted(set.intersection(*(set(tables[label, env].columns) for env in envs)))
            if not seeds:
                raise SystemExit(f"{label} has no seed in all of {', '.join(envs)}")
            values = [normalise(tables[label, env].loc[steps, seeds].to_numpy().T, env) for env in envs]
            scores[label] = np.stack(values, axis=1)
        return scores, envs, np.array(steps)


def normalise(returns: np.ndarray, env: str) -> np.ndarray:
    zero, one = SCALES[family(env)]
    return (returns - zero) / (one - zero)


def estimate(
    scores: dict[str, Any], function: Callable[..., np.ndarray], reps: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """rliable's point estimates and 95 % stratified bootstrap intervals, the same at each call; NaN where one seed has run."""
    np.random.seed(0)  # rliable draws from the global generator
    points, intervals = library.get_interval_estimates(scores, function, reps=reps)
    for label, given in scores.items():
        if min(len(runs) for runs in (given if isinstance(given, tuple) else (given,))) == 1:
            intervals[label] = np.full_like(intervals[label], np.nan)
    return points, intervals


def interquartile_mean(scores: np.ndarray) -> np.ndarray:
    return np.array([metrics.aggregate_iqm(scores)])


def interquartile_means(scores: np.ndarray) -> np.ndarray:
    """``metrics.aggregate_iqm`` of all steps (the last axis) in one call."""
    return trim_mean(scores.reshape(-1, scores.shape[-1]), proportiontocut=0.25, axis=0)


def mean_band(values: np.ndarray, reps: int) -> np.ndarray:
    """
    95 % bootstrap band of the mean over seeds.

    :param values: Shape (n_steps, n_seeds)
    :return: Shape (2, n_steps)
    """
    draws = np.random.default_rng(0).integers(values.shape[1], size=(reps, values.shape[1]))
    return np.percentile(values[:, draws].mean(axis=2), [2.5, 97.5], axis=1)


def make_report(
    csvs: list[Path],
    out: Path,
    labels: list[str] | None,
    reference: str,
    returns: str,
    reps: int,
    thresholds: Sequence[tuple[str | None, float]] = (),
    speed_table: Path = SPEED_TABLE,
    speed_rows: Sequence[str] = (),
) -> None:
    results = Results(csvs, labels, reference, returns)
    try:
        table = read_speed_table(speed_table)
        speeds = choose_speeds(speed_rows, results.labels, table)
        times = times_to_return(results, thresholds, speeds)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    sac_steps = sorted({reference_steps(time.env) for time in times if not thresholds} | {1_000_000})
    scores, envs, steps = results.scores()
    final = {label: values[..., -1] for label, values in scores.items()}
    iqm = estimate(final, interquartile_mean, reps)
    first, *others = results.labels
    pairs = {label: (final[first], final[label]) for label in others}
    improvement = estimate(pairs, lambda x, y: np.array([metrics.probability_of_improvement(x, y)]), reps)
    efficiency = estimate(scores, interquartile_means, reps)

    out.mkdir(parents=True, exist_ok=True)
    figures = {
        "curves.png": plot_curves(results, returns, reps),
        "aggregate.png": plot_aggregate(results, steps, iqm, improvement, efficiency),
        "diagnostics.png": plot_diagnostics(results),
        "time_to_return.png": plot_time_to_return(results, times, [sac_hours(table, steps) for steps in sac_steps]),
    }
    for name, figure in figures.items():
        figure.savefig(out / name, dpi=DPI)
        plt.close(figure)

    text = markdown(results, scores, envs, int(steps[-1]), iqm, improvement, returns)
    print(text)
    write_csv(times, table, out / "time_to_return.csv")
    print(f"\n{as_text(times, table, speeds, sac_steps)}")
    left_out = [env for env in results.envs if env not in {time.env for time in times}]
    if left_out:
        print(f"No time to return for {', '.join(left_out)}: no reference return, see --thresholds.")
    print(f"\nFigures: {', '.join(str(out / name) for name in figures)}")


def reference_steps(env: str) -> int:
    return REFERENCE_STEPS.get(family(env), 1_000_000)


def times_to_return(
    results: Results, thresholds: Sequence[tuple[str | None, float]], speeds: dict[str, float]
) -> list[TimeToReturn]:
    """
    :param results: Evaluations; whatever they compare, deterministic returns count
    :param thresholds: Returns to reach, with the environment or None for all; by default the reference and half of it
    :param speeds: Steps per second by label
    :return: By environment, threshold and label
    """
    references = {
        env: (f"SAC {thousands(reference_steps(env), 0)}", REFERENCE_RETURNS[family(env)])
        for env in results.envs
        if family(env) in REFERENCE_RETURNS
    }
    times = []
    for env, values in choose_thresholds(thresholds, results.envs, references).items():
        for threshold in values:
            for label in results.labels:
                table = results.table(label, env, "deterministic_mean")
                if table.shape[1] == 0:
                    continue
                steps, means = table.index.tolist(), table.mean(axis=1).tolist()
                times += time_to_return(env, label, [threshold], steps, means, table.shape[1], speeds.get(label))
    return times


# ------------------------------------------------------------------ table


def markdown(
    results: Results,
    scores: dict[str, np.ndarray],
    envs: list[str],
    last_step: int,
    iqm: tuple[dict[str, np.ndarray], dict[str, np.ndarray]],
    improvement: tuple[dict[str, np.ndarray], dict[str, np.ndarray]],
    returns: str,
) -> str:
    first = results.labels[0]
    header = ["", *results.envs, "IQM, normalised (95 %)", f"P({first} better) (95 %)", "seeds", "hours"]
    lines = [header, ["---"] * len(header)]
    for label in results.labels:
        cells = []
        for env in results.envs:
            table = results.table(label, env)
            value = table.loc[last_step] if last_step in table.index else table.iloc[-1] if len(table) else None
            if value is None:
                cells.append("")
                continue
            spread = f" ± {value.std():,.0f}" if len(value) > 1 else ""
            # where the label stands at another step, or where it is not part of the comparison
            step = "" if value.name == last_step else f" (at {value.name:,})"
            cells.append(f"{value.mean():,.0f}{spread}{step}")
        cells.append(with_interval(iqm, label))
        cells.append(with_interval(improvement, label) if label != first else "")
        cells.append(str(len(scores[label])))
        cells.append(f"{run_hours(results, label, last_step):.2f}")
        lines.append([label, *cells])
    table_text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    note = (
        f"After {last_step:,} steps, {returns} actions, 10 episodes: mean ± standard deviation over seeds. "
        f"Interquartile mean and probability of improvement over {', '.join(envs)}, with 95 % stratified bootstrap intervals; "
        f"a normalised return of 0 is {zero_and_one(envs)}. "
        "Hours: mean of a run on one thread, without evaluations."
    )
    return f"{table_text}\n\n{note}"


def zero_and_one(envs: list[str]) -> str:
    if all(family(env) in MUJOCO for env in envs):
        return "the random policy's, of 1 that of TD3 after 1,000,000 steps"
    scales = {family(env): SCALES[family(env)] for env in envs}
    return f"{', '.join(f'{zero:g} ({name})' for name, (zero, _) in scales.items())}, of 1 " + ", ".join(
        f"{one:g}" for _, one in scales.values()
    )


def with_interval(estimates: tuple[dict[str, np.ndarray], dict[str, np.ndarray]], label: str) -> str:
    point, (low, high) = estimates[0][label], estimates[1][label]
    interval = "" if np.isnan(low[0]) else f" ({low[0]:.2f} to {high[0]:.2f})"
    return f"{point[0]:.2f}{interval}"


def run_hours(results: Results, label: str, step: int) -> float:
    rows = results.rows[(results.rows["label"] == label) & (results.rows["step"] == step)]
    return float(rows["hours"].mean())


# ------------------------------------------------------------------ figures


def thousands(value: float, _: int) -> str:
    return f"{value / 1000:g}k" if value < 1_000_000 else f"{value / 1_000_000:g}M"


def display(label: str) -> str:
    return NAMES.get(label, label)


def finish(ax: Axes, **properties: Any) -> None:
    ax.set(**properties)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)


def add_legend(figure: Figure, results: Results, others: Iterable[Line2D] = ()) -> None:
    lines = [Line2D([], [], color=results.colours[label], lw=2, label=display(label)) for label in results.labels]
    handles = [*lines, *others]
    n_columns = len(handles) if len(handles) <= 6 else -(-len(handles) // 2)
    figure.legend(handles=handles, loc="outside lower center", ncols=n_columns, frameon=False)


def plot_curves(results: Results, returns: str, reps: int) -> Figure:
    n_columns = 2 if len(results.envs) == 4 else min(len(results.envs), 3)
    n_rows = -(-len(results.envs) // n_columns)
    figure, axes = plt.subplots(
        n_rows, n_columns, figsize=(max(4.1 * n_columns, 5.5), 3.2 * n_rows + 0.3), layout="constrained", squeeze=False
    )
    published: dict[str, Line2D] = {}
    for ax, env in zip(axes.flat, results.envs, strict=False):
        for label in results.labels:
            table = results.table(label, env)
            if len(table) == 0:
                continue
            ax.fill_between(table.index, *mean_band(table.to_numpy(), reps), color=results.colours[label], alpha=0.15, lw=0)
            ax.plot(table.index, table, color=results.colours[label], lw=0.6, alpha=0.5)
            ax.plot(table.index, table.mean(axis=1), color=results.colours[label], lw=1.8)
        reached = results.rows.loc[results.rows["env"] == env, "step"].max() >= PUBLISHED_STEP
        for name, (marker, values) in PUBLISHED.items():
            if returns == "deterministic" and reached and env in values:
                style = dict(marker=marker, ls="", mec="black", mfc="none", clip_on=False, zorder=3)
                (published[name],) = ax.plot(PUBLISHED_STEP, values[env], label=f"{name}, published", **style)
        ax.xaxis.set_major_formatter(FuncFormatter(thousands))
        finish(ax, title=env, xlabel="steps")
    for ax in axes.flat[len(results.envs) :]:
        ax.set_visible(False)
    for ax in axes[:, 0]:
        ax.set_ylabel(f"{returns} return")
    add_legend(figure, results, published.values())
    return figure


def plot_aggregate(
    results: Results,
    steps: np.ndarray,
    iqm: tuple[dict[str, np.ndarray], dict[str, np.ndarray]],
    improvement: tuple[dict[str, np.ndarray], dict[str, np.ndarray]],
    efficiency: tuple[dict[str, np.ndarray], dict[str, np.ndarray]],
) -> Figure:
    first, *others = results.labels
    # without others there is nothing to be better than
    width_ratios = [1, 1, 1.2] if others else [1, 1.2]
    figure, axes = plt.subplots(
        1,
        len(width_ratios),
        figsize=(4.1 * len(width_ratios), max(3.2, 0.32 * len(results.labels) + 1.4)),
        layout="constrained",
        width_ratios=width_ratios,
    )
    plot_intervals(axes[0], results, results.labels, iqm)
    low, high = axes[0].get_xlim()
    axes[0].set_xlim(min(low, -0.02 * high), high)
    finish(axes[0], title=f"interquartile mean at {steps[-1]:,} steps", xlabel="normalised return")
    if others:
        plot_intervals(axes[1], results, others, improvement)
        axes[1].axvline(0.5, color="0.5", lw=1, ls="--")
        finish(axes[1], title=f"probability that {display(first)} is better than", xlabel="probability", xlim=(-0.02, 1.02))
    for label in results.labels:
        axes[-1].fill_between(steps, *efficiency[1][label], color=results.colours[label], alpha=0.15, lw=0)
        axes[-1].plot(steps, efficiency[0][label], color=results.colours[label], lw=1.8)
    axes[-1].xaxis.set_major_formatter(FuncFormatter(thousands))
    finish(axes[-1], title="sample efficiency", xlabel="steps", ylabel="interquartile mean")
    add_legend(figure, results)
    return figure


def plot_intervals(
    ax: Axes, results: Results, labels: list[str], estimates: tuple[dict[str, np.ndarray], dict[str, np.ndarray]]
) -> None:
    for height, label in enumerate(reversed(labels)):
        low, high = estimates[1][label][:, 0]
        ax.barh(height, high - low, left=low, height=0.5, color=results.colours[label], alpha=0.3)
        ax.plot([estimates[0][label][0]] * 2, [height - 0.25, height + 0.25], color=results.colours[label], lw=2.5)
    ax.set_yticks(range(len(labels)), [display(label) for label in reversed(labels)])
    ax.set_ylim(-0.6, len(labels) - 0.4)


def plot_diagnostics(results: Results) -> Figure:
    """Means over seeds of what tells why something learns or does not; an algorithm without a quantity has no line."""
    n_rows, n_columns = len(results.envs), len(DIAGNOSTICS)
    figure, axes = plt.subplots(
        n_rows, n_columns, figsize=(3.1 * n_columns, 2.5 * n_rows + 0.5), layout="constrained", squeeze=False, sharex="row"
    )
    for row, env in zip(axes, results.envs, strict=True):
        for ax, column in zip(row, DIAGNOSTICS, strict=True):
            for label in results.labels:
                values = results.table(label, env, column).mean(axis=1)
                ax.plot(values.index, values, color=results.colours[label], lw=1.5)
            if column == "temperature" and ax.get_lines():
                ax.set_yscale("log")
            if column == "q_bias":
                ax.axhline(0, color="0.5", lw=1, ls="--")
            ax.xaxis.set_major_formatter(FuncFormatter(thousands))
            finish(ax)
        row[0].set_ylabel(env)
    for top, bottom, title in zip(axes[0], axes[-1], DIAGNOSTICS.values(), strict=True):
        top.set_title(title)
        bottom.set_xlabel("steps")
    add_legend(figure, results)
    return figure


def plot_time_to_return(results: Results, times: list[TimeToReturn], notes: list[str]) -> Figure:
    """A panel per environment, a bar of minutes per label and threshold; the text stands where there is no bar too."""
    envs = list(dict.fromkeys(time.env for time in times)) or [""]
    n_columns = min(len(envs), 2)
    n_rows = -(-len(envs) // n_columns)
    n_bars = max((sum(time.env == env for time in times) for env in envs), default=1)
    figure, axes = plt.subplots(
        n_rows,
        n_columns,
        figsize=(5.5 * n_columns, n_rows * (0.24 * n_bars + 0.8) + 0.4),
        layout="constrained",
        squeeze=False,
        sharex=True,
    )
    for ax, env in zip(axes.flat, envs, strict=False):
        mine = [time for time in times if time.env == env]
        labels = [label for label in results.labels if any(time.label == label for time in mine)]
        for height, label in enumerate(labels):
            group = [time for time in mine if time.label == label]
            width = 0.84 / len(group)
            for i, time in enumerate(group):
                y = height + (i - 0.5 * (len(group) - 1)) * width
                if time.minutes is not None:
                    alpha = 0.6 - 0.35 * i / max(len(group) - 1, 1)
                    ax.barh(y, time.minutes, height=0.92 * width, color=results.colours[label], alpha=alpha)
                name, value = time.threshold.name, f"{time.threshold.value:,.10g}"
                title = value if name == f"{time.threshold.value:.10g}" else f"{name} ({value})"
                colour = "black" if time.steps is not None else "0.5"
                text = f"{title}: {describe(time)}"
                ax.annotate(text, (0, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8, color=colour)
        ax.set_yticks(range(len(labels)), [display(label) for label in labels])
        ax.set_ylim(len(labels) - 0.4, -0.6)
        finish(ax, title=env)
        ax.grid(visible=False, axis="y")
        ax.set_axisbelow(True)
    axes[0, 0].set_xlim(0, 1.05 * max((time.minutes for time in times if time.minutes is not None), default=1))
    for ax in axes.flat[len(envs) :]:
        ax.set_visible(False)
    # the lowest panel of each column has the numbers, where the last row is not full too
    for ax in axes.flat[max(len(envs) - n_columns, 0) : len(envs)]:
        ax.tick_params(labelbottom=True)
    figure.supxlabel(f"minutes on one core, learning_starts steps at full price. {'. '.join(notes)}", fontsize=9)
    return figure
