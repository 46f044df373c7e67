"""The benchmark's scripts that measure by themselves, with the smallest numbers that they take."""

from itertools import product
from pathlib import Path

import pandas as pd
import pytest

from sb3_softq import SoftQ
from tests.test_benchmark_learning import SCRIPT, call

pytestmark = pytest.mark.slow


def measured(folder: Path, name: str, *args: str) -> tuple[str, pd.DataFrame]:
    """What the script prints, and the table that it writes, the only thing in a new folder."""
    out = folder / "new" / "table.csv"
    output = call(folder, *args, "--out", str(out), script=SCRIPT.with_name(f"{name}.py"))
    assert list(out.parent.iterdir()) == [out]
    return output, pd.read_csv(out)


def test_actors_learn_from_fixed_critics(tmp_path: Path):
    settings = ["2 particles of 64 states", "Gaussian, 32 states"]
    args = ("--env", "Pendulum-v1", "--steps", "1500", "--updates", "300", "--settings", *settings, "--seeds", "1", "2")
    output, table = measured(tmp_path, "fixed_critics", *args)
    table = table.set_index(["setting", "seed", "n_updates"])
    assert list(table.index) == list(product(settings, [1, 2], [100, 300]))
    assert (table.seconds > 0).all()
    # later on the way, more time and a better actor: +0.8 and more, where the weights stand still at most +0.05
    later = table.xs(300, level="n_updates") - table.xs(100, level="n_updates")
    assert (later.seconds > 0).all()
    assert (later.q_value.groupby("setting").mean() > 0.3).all()
    for setting, q_value in table.q_value.xs(300, level="n_updates").groupby("setting").mean().items():
        assert f"{setting}  100: " in output
        assert f"300: {q_value:.2f}" in output


def test_deterministic_actions_are_compared(tmp_path: Path):
    SoftQ("MlpPolicy", "Pendulum-v1", learning_starts=100, device="cpu").learn(200).save(tmp_path / "Pendulum-v1.zip")
    output, table = measured(tmp_path, "deterministic", "Pendulum-v1.zip", "--episodes", "2")
    table = table.set_index(["task", "action"])["return"].unstack(0)
    assert len(table) == output.count("two modes ") == 10
    assert table["Pendulum-v1"].between(-2_000, -1).all()
    # the two modes: an action between them is worth -12.5, and one of a mode next to nothing
    assert table["two modes"]["mode of the density"] > -1.5
    assert table["two modes"]["mean particle"] < -3.0


def test_checkpoints_cost_what_is_new(tmp_path: Path):
    _, table = measured(tmp_path, "checkpoint_cost", "--fills", "1000", "20000", "--save-freq", "500", "--repeats", "2")
    table = table.set_index(["fill", "callback"])
    assert (table.seconds > 0).all()
    megabytes = table.megabytes.unstack()
    # SB3's callback writes a whole buffer of a million transitions each time, ours what is new since the last save
    assert (megabytes.CheckpointCallback > 300).all()
    assert (megabytes.ResumableCheckpoint < 10).all()
    assert abs(megabytes.ResumableCheckpoint.diff().iloc[1]) < 0.5


def test_environments_on_ray_are_timed(tmp_path: Path):
    pytest.importorskip("ray")
    _, table = measured(tmp_path, "ray_throughput", "--n-envs", "2", "--seconds", "0.3", "--repeats", "1")
    speeds = table.set_index(["kind", "step"]).steps_per_second.unstack()
    kinds = ["DummyVecEnv", "SubprocVecEnv", "RayVecEnv", "RayVecEnv, an actor each", "two nodes", "two nodes, an actor each"]
    assert sorted(speeds.index) == sorted(kinds)
    assert (speeds > 0).all(axis=None)
    # two environments of 10 ms one after the other make 100 steps a second, and 200 side by side
    assert speeds["10 ms"]["DummyVecEnv"] <= 100
    assert 100 < speeds["10 ms"]["SubprocVecEnv"] <= 200
