"""The examples, run as a user runs them."""

import os
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
from matplotlib import image
from PIL import Image, ImageSequence

from examples.finished import table
from sb3_softq import SoftQ
from sb3_softq.checkpoint import steps_done
from tests.programs import run_python

ROOT = Path(__file__).parent.parent
TRAIN = [sys.executable, str(ROOT / "examples" / "train_walker2d.py")]


def environment(**more):
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "120", **more}


def example(name, *args, code=0, **more):
    result = run_python([str(ROOT / "examples" / name), *map(str, args)], environment(**more))
    assert result.returncode == code, result.stdout + result.stderr
    return result.stderr if code else result.stdout


@cache
def opengl():
    """Whichever of MuJoCo's OpenGLs is there."""
    for backend in ("egl", "osmesa"):
        command = [sys.executable, "-c", "import mujoco; mujoco.GLContext(8, 8).make_current()"]
        if subprocess.run(command, env=environment(MUJOCO_GL=backend), capture_output=True, timeout=600).returncode == 0:
            return backend
    pytest.fail("neither libegl1 nor libosmesa6 is there")


def test_train_walker2d(tmp_path):
    output = example("train_walker2d.py", "--steps", 200, "--out", tmp_path)
    assert "return" in output
    with np.load(tmp_path / "evaluations.npz") as evaluations:
        assert evaluations["timesteps"].tolist() == [40, 80, 120, 160, 200]
    for name in ("model.zip", "best_model.zip"):
        assert SoftQ.load(tmp_path / name).num_timesteps >= 40
    assert steps_done(tmp_path / "checkpoints") == 200
    assert len(list((tmp_path / "tensorboard").rglob("events.out.tfevents.*"))) == 1
    assert image.imread(tmp_path / "learning_curve.png").std() > 0.01
    frames = imageio.mimread(tmp_path / "video.mp4", memtest=False)
    assert len(frames) > 100
    assert frames[0].std() > 1
    assert np.abs(frames[0].astype(float) - frames[20]).max() > 10
    for name in ("checkpoints", "model.zip", "best_model.zip", "learning_curve.png", "video.mp4"):
        assert str(tmp_path / name) in output


@pytest.mark.parametrize(("env_id", "error"), [("Walker2d-v44", "VersionNotFound"), ("CartPole-v1", "DiscreteSoftQ")])
def test_an_earlier_run_stays_where_nothing_can_be_trained(tmp_path, env_id, error):
    (tmp_path / "model.zip").write_text("precious")
    assert error in example("train_walker2d.py", "--env", env_id, "--out", tmp_path, code=1)
    assert [path.name for path in tmp_path.iterdir()] == ["model.zip"]


def test_show_walker2d(tmp_path):
    gif = tmp_path / "walker.gif"
    output = example("show_walker2d.py", "--gif", gif, MUJOCO_GL=opengl())
    returns = output.split("deterministic actions, 10 episodes: ")[1].split()[0]
    # an agent that falls has some hundreds
    assert float(returns.replace(",", "")) > 3000
    frames = imageio.mimread(gif, memtest=False)
    assert len(frames) == 150
    # the camera goes with the walker, which stands out before the sky in the middle of the last frame, too
    sky = frames[-1][60:120, :, :3].astype(float)
    assert np.abs(sky - np.median(sky, axis=1, keepdims=True)).max(axis=2)[:, 80:200].max() > 60


def test_interrupt_and_resume(tmp_path):
    # a run of before, to be kept
    (tmp_path / "model.zip").write_text("precious")
    with subprocess.Popen(
        [*TRAIN, "--steps", "100000", "--out", str(tmp_path), "--seed", "7"],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
        # a shell's background job ignores SIGINT, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        deadline = time.monotonic() + 300
        log = tmp_path / "monitor" / "0000000000.monitor.csv"
        while not (log.exists() and len(log.read_text().splitlines()) > 6) and time.monotonic() < deadline:
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 130, output
    steps = steps_done(tmp_path / "checkpoints")
    assert steps > 0
    assert f"Interrupted at step {steps}" in output
    assert f"--out {tmp_path} --steps 100000 --seed 7 --resume" in output
    assert SoftQ.load(tmp_path / "model.zip").num_timesteps == steps
    assert (tmp_path / "learning_curve.png").exists()
    assert (tmp_path / "earlier-1" / "model.zip").read_text() == "precious"

    # an OpenGL that does not exist: the run succeeds, and says why there is no video
    output = example("train_walker2d.py", "--steps", steps + 50, "--out", tmp_path, "--resume", MUJOCO_GL="none")
    assert f"at step {steps}" in output
    assert "No video" in output
    assert steps_done(tmp_path / "checkpoints") == steps + 50
    assert SoftQ.load(tmp_path / "model.zip").num_timesteps == steps + 50
    # one run of two sessions
    assert len(list((tmp_path / "monitor").iterdir())) == 2
    assert [folder.name for folder in (tmp_path / "tensorboard").iterdir()] == ["SoftQ_1"]
    with np.load(tmp_path / "evaluations.npz") as evaluations:
        assert evaluations["timesteps"][-1] <= steps + 50


def test_wrong_arguments():
    assert "--steps 0 is not allowed" in example("train_walker2d.py", "--steps", 0, code=2)


def test_missing_extras_are_named(tmp_path):
    blocked = (
        "import importlib.util, runpy, sys\n"
        "find_spec = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *args: None if name == 'tensorboard' else find_spec(name, *args)\n"
        f"sys.argv = ['train_walker2d.py', '--out', {str(tmp_path / 'out')!r}]\n"
        f"runpy.run_path({TRAIN[1]!r}, run_name='__main__')\n"
    )
    result = subprocess.run([sys.executable, "-c", blocked], env=environment(), capture_output=True, text=True)
    assert result.returncode == 1
    assert "needs tensorboard" in result.stderr
    assert "pip install sb3-softq[extra]" in result.stderr
    assert not (tmp_path / "out").exists()


def test_export_onnx(tmp_path):
    SoftQ("MlpPolicy", "Reacher-v5", device="cpu", seed=0).save(tmp_path / "model")
    output = example("export_onnx.py", "--model", tmp_path / "model.zip", "--out", tmp_path / "new" / "policy.onnx")
    assert float(output.split()[-1]) < 1e-5
    assert f"{tmp_path / 'new' / 'policy.onnx'}: " in output
    error = example("export_onnx.py", "--model", tmp_path / "nowhere.zip", "--out", tmp_path / "other.onnx", code=2)
    assert f"--model {tmp_path / 'nowhere.zip'} is not there" in error


def test_multi_goal(tmp_path):
    output = example("multi_goal.py", "--steps", 150, "--out", tmp_path / "figure.png", "--frames", tmp_path / "frames")
    assert output.count("goals of 200 rollouts") == 2
    assert len((tmp_path / "figure.csv").read_text().splitlines()) == 3
    assert image.imread(tmp_path / "figure.png").shape[:2] == (800, 1200)
    assert len(imageio.mimread(tmp_path / "frames" / "animation.gif")) == 21


def test_composition(tmp_path):
    output = example("composition.py", "--steps", 150, "--out", tmp_path / "figure.png")
    assert output.count("of 100 rollouts") == 3
    assert len((tmp_path / "figure.csv").read_text().splitlines()) == 4
    assert image.imread(tmp_path / "figure.png").std() > 0.01


def test_pusher(tmp_path):
    output = example("pusher.py", "--steps", 150, "--out", tmp_path / "figure.png")
    assert output.count("m from (-1, -1)") == 4
    rows = (tmp_path / "figure.csv").read_text().splitlines()
    assert [row.split(",")[1] for row in rows[1:]] == ["x = -1", "y = -1", "composed", "from scratch"]
    assert image.imread(tmp_path / "figure.png").std() > 0.01


def assert_ants_of_many_colours_move(path):
    """On a grey floor, 7 s twice as fast; frames that look alike are merged."""
    with Image.open(path) as gif:
        assert sum(frame.info["duration"] for frame in ImageSequence.Iterator(gif)) == 3500
    frames = np.stack([frame[..., :3] for frame in imageio.mimread(path, memtest=False)]).astype(float)
    assert len(frames) > 20
    coloured = np.ptp(frames, axis=3) > 100
    assert all(0.0005 < frame.mean() < 0.1 for frame in coloured)
    assert len({tuple(colour) for colour in np.round(frames[-1][coloured[-1]] / 64)}) >= 3
    assert (coloured[0] != coloured[-1]).any()


def test_any_direction(tmp_path):
    """Twice: what is finished is not done again."""
    steps = ("--steps", 20, "--more", 20, "--eval-freq", 20, "--episodes", 6, "--seeds", 0, 1)
    arguments = ("any_direction.py", "--algos", "SoftQ", "SAC", "--places", "fork", *steps, "--logs", tmp_path / "logs")
    first = example(*arguments, "--out", tmp_path / "figure.png")
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "logs").iterdir()}
    # agents and results of pre-training, and results in the place, from scratch too
    assert len(files) == 2 * 2 * 2 + 2 * 3
    again = example(*arguments, "--out", tmp_path / "figure.png", "--gif", tmp_path / "ants.gif", MUJOCO_GL=opengl())
    assert again.startswith(first)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "logs").iterdir()} == files
    assert_ants_of_many_colours_move(tmp_path / "ants.gif")
    rows = [row.split(",") for row in (tmp_path / "figure.csv").read_text().splitlines()]
    assert [row[0] for row in rows] == ["agent", *["SoftQ"] * 2, *["SAC"] * 2, *["from scratch"] * 2]
    assert rows[0][-1] == "fork"
    # not learned within so few steps
    assert {row[-1] for row in rows[1:]} == {">20"}
    assert image.imread(tmp_path / "figure.png").std() > 0.01
    # results of other steps are not taken for those that are asked for
    error = example(*arguments, "--episodes", 7, "--out", tmp_path / "figure.png", code=1)
    assert "'episodes': 6, 'first_ent_coef': 2.0, 'ent_coef': 0.5}, and {'steps': 20, 'episodes': 7, " in error
    assert "give another folder as --logs" in error
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "logs").iterdir()} == files


def table_of_three(figure):
    """Rows of an example that compares the three, whose figure shows something."""
    rows = [row.split(",") for row in figure.with_suffix(".csv").read_text().splitlines()]
    assert [row[1] for row in rows] == ["algo", "SoftQ", "SAC", "CrossQ"]
    assert image.imread(figure).std() > 0.01
    return rows


def test_four_gates(tmp_path):
    """Twice: what is finished is not done again, and can be filmed."""
    steps = ("--steps", 20, "--more", 5, "--decisions", 8, "--seeds", 0, "--logs", tmp_path / "logs")
    output = example("four_gates.py", *steps, "--out", tmp_path / "figure.png")
    assert output.count(" walled up: ") == 3
    rows = table_of_three(tmp_path / "figure.png")
    for row in rows[1:]:
        counts = dict(zip(rows[0][2:6], map(int, row[2:6]), strict=True))
        assert sum(counts.values()) <= 8
        assert counts[row[6]] == max(counts.values())
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "logs").iterdir()}
    assert len(files) == 2 * 3
    again = example(
        "four_gates.py", *steps, "--out", tmp_path / "figure.png", "--gif", tmp_path / "ants.gif", MUJOCO_GL=opengl()
    )
    assert again.startswith(output)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "logs").iterdir()} == files
    assert_ants_of_many_colours_move(tmp_path / "ants.gif")


def test_fine_tuning_without_an_evaluation(tmp_path):
    """Said before anything is trained or overwritten."""
    (tmp_path / "figure.csv").write_text("precious")
    error = example("any_direction.py", "--more", 200, "--eval-freq", 201, "--out", tmp_path / "figure.png", code=2)
    assert "--more 200 has no evaluation: it must be at least --eval-freq 201" in error
    assert (tmp_path / "figure.csv").read_text() == "precious"


def test_a_table_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "new" / "table.csv"
    with table(path, ["seed", "return"]) as write:
        write([0, 1.5])
    assert path.read_text() == "seed,return\n0,1.5\n"

    def interrupted():
        with table(path, ["seed", "return"]) as write:
            write([0, 2.5])
            # those who watch see each row at once
            assert path.with_suffix(".part").read_text() == "seed,return\n0,2.5\n"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "seed,return\n0,1.5\n"
    assert path.with_suffix(".part").read_text() == "seed,return\n0,2.5\n"


def test_two_routes(tmp_path):
    """Twice: what is finished is not done again."""
    steps = ("--steps", 120, "--more", 60, "--episodes", 2, "--seeds", 0, "--logs", tmp_path / "logs")
    output = example("two_routes.py", *steps, "--out", tmp_path / "figure.png")
    assert output.count("blocked: ") == 3
    table_of_three(tmp_path / "figure.png")
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "logs").iterdir()}
    assert [path.stem for path in sorted(files)] == ["CrossQ_0", "SAC_0", "SoftQ_0"]
    again = example("two_routes.py", *steps, "--algos", "SAC", "--out", tmp_path / "figure.png")
    assert [line for line in output.splitlines() if "SAC" in line] == again.splitlines()[:-1]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "logs").iterdir()} == files
    error = example("two_routes.py", *steps, "--ent-coef", 0.7, "--out", tmp_path / "figure.png", code=1)
    assert "'ent_coef': 0.8, 'first_ent_coef': 1.0}, and " in error


def test_two_elbows(tmp_path):
    """Twice: what is finished is not done again, and can be filmed."""
    steps = ("--steps", 1050, "--more", 40, "--actions", 6, "--seeds", 0, "--logs", tmp_path / "logs")
    output = example("two_elbows.py", *steps, "--out", tmp_path / "figure.png")
    assert output.count(" locked: ") == 3
    rows = table_of_three(tmp_path / "figure.png")
    assert rows[0][-3:] == ["at_once", "in_5_attempts", "after_40"]
    gif = ("--gif", tmp_path / "arm.gif")
    again = example("two_elbows.py", *steps, *gif, "--out", tmp_path / "figure.png", MUJOCO_GL=opengl())
    assert again.startswith(output)
    with Image.open(tmp_path / "arm.gif") as film:
        # however many look the same: at four goals 25 states, 50 ms each
        assert sum(frame.info["duration"] for frame in ImageSequence.Iterator(film)) == 4 * 25 * 50
    frames = np.stack([frame[..., :3] for frame in imageio.mimread(tmp_path / "arm.gif", memtest=False)]).astype(float)
    # at four goals 13 states of a reach, and 12 of rest; those that look the same are one frame
    assert 4 * 8 <= len(frames) <= 4 * 25
    assert np.abs(frames[0] - frames[12]).max() > 100
    error = example("two_elbows.py", "--actions", 4, "--out", tmp_path / "figure.png", code=2)
    assert "--actions 4 is not allowed: it must be at least 5" in error


def test_both_elbows_reach_each_goal():
    """By the formulas of inverse kinematics; where one elbow is locked the other does, and the arm knows which is which."""
    script = """
import numpy as np
from two_elbows import GOALS, LINKS, SIDES, Arm, Reaches
first, second = LINKS
for locked in (None, *SIDES):
    arm = Arm(locked)
    for goal in GOALS:
        bend = np.arccos((goal @ goal - first**2 - second**2) / (2 * first * second))
        angles, arrived = [], []
        for elbow in (-bend, bend):
            turn = np.arctan2(goal[1], goal[0]) - np.arctan2(second * np.sin(elbow), first + second * np.cos(elbow))
            obs, _ = arm.reset(options={"goal": goal})
            assert np.allclose(obs[4:6], goal)
            _, reward, terminated, _, info = arm.step(np.array([(turn + np.pi) % (2 * np.pi) - np.pi, elbow]))
            assert terminated
            place = first * np.exp(1j * arm.qpos[-1][0]) + second * np.exp(1j * arm.qpos[-1][:2].sum())
            assert np.isclose(reward, -50 * abs(place - complex(*goal)))
            # the elbow is on the left of the way to the hand if that has turned to the right after it
            assert locked or np.sign(np.imag(np.exp(1j * arm.qpos[-1][0]) / place)) == -np.sign(elbow)
            angles.append(arm.qpos[-1][:2])
            arrived.append(info["success"])
        shares = Reaches(np.array([arrived]), np.array([angles]), np.array([angles])).shares()
        assert shares.tolist() == [[0.5 * (locked != "left"), 0.5 * (locked != "right")]], (locked, goal, shares)
"""
    path = os.pathsep.join([str(ROOT), str(ROOT / "examples")])
    result = subprocess.run([sys.executable, "-c", script], env=environment(PYTHONPATH=path), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_logged_data(tmp_path):
    task = ("--env", "Pendulum-v1", "--enough", -1100, "--steps", 3000, "--updates", 200, "--eval-freq", 500)
    output = example("logged_data.py", *task, "--seeds", 0, "--out", tmp_path / "figure.png")
    assert output.count("seed 0, ") == 2
    rows = [row.split(",") for row in (tmp_path / "figure.csv").read_text().splitlines()]
    last = {row[0]: float(row[-1]) for row in rows[1:]}
    assert set(last) == {"from scratch", "with data"}
    # both went on until they were as good
    assert min(last.values()) >= -1100
    assert image.imread(tmp_path / "figure.png").std() > 0.01


def test_demonstrations(tmp_path):
    steps = ("--demonstrations", 20, "--updates", 1000, "--episodes", 2, "--seeds", 0)
    output = example("demonstrations.py", *steps, "--out", tmp_path / "figure.png")
    assert output.count("share of actions that nobody demonstrated") == 2
    rows = [row.split(",") for row in (tmp_path / "figure.csv").read_text().splitlines()]
    assert [row[1] for row in rows] == ["actor", "SoftQ", "SAC"]
    # an actor that has learned nothing has 0.9
    assert all(float(row[-1]) < 0.6 for row in rows[1:])
    assert image.imread(tmp_path / "figure.png").std() > 0.01
