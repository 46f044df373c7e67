"""
Train SoftQ on Walker2d (or ``--env``), in a way that survives Ctrl-C, a kill or a power cut.

Everything goes to ``--out``: checkpoints, TensorBoard scalars, the best and the last model, a learning curve and a video.
``--resume`` goes on from the last checkpoint.
"""

import argparse
import multiprocessing
import os
import shlex
import sys
import warnings
import zipfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.callbacks import EvalCallback, ProgressBarCallback
from stable_baselines3.common.monitor import Monitor

from sb3_softq import SoftQ
from sb3_softq.checkpoint import ResumableCheckpoint, folder_lock, has_checkpoint, resume, steps_done

# Walker2d-v4 by intention: it is what published results are for
warnings.filterwarnings("ignore", message=".*is out of date")

DEFAULT_STEPS = 1_000_000
GL_BACKENDS = ("egl", "osmesa", "glfw")
VIDEO_SECONDS, VIDEO_FPS = 8, 25
# What a run leaves in its folder
ARTEFACTS = {
    "checkpoints": "checkpoint",
    "tensorboard": "TensorBoard scalars",
    "monitor": "training episodes",
    "evaluations.npz": "evaluations",
    "best_model.zip": "best model",
    "model.zip": "last model",
    "learning_curve.png": "learning curve",
    "video.mp4": "video",
    "video.gif": "video",
}


class ReturnBar(ProgressBarCallback):
    """SB3's progress bar, with the mean return of the last episodes in front."""

    def _on_step(self) -> bool:
        returns = [episode["r"] for episode in self.model.ep_info_buffer or ()]
        if returns:
            self.pbar.set_description(f"return {np.mean(returns):.1f}", refresh=False)
        return super()._on_step()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train SoftQ on Walker2d")
    parser.add_argument("--steps", type=int, help=f"steps in all (default: {DEFAULT_STEPS}, or those of the resumed run)")
    parser.add_argument("--env", default="Walker2d-v4", help="Gymnasium environment (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder of the results (default: logs/walker2d, logs/<env> with --env)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the folder of the results")
    args = parser.parse_args()
    if args.steps is not None and args.steps < 1:
        parser.error(f"--steps {args.steps} is not allowed: it must be an integer >= 1")
    if args.out is None:
        args.out = Path("logs") / ("walker2d" if args.env == "Walker2d-v4" else args.env)
    return args


def check_extras() -> None:
    missing = [name for name in ("tqdm", "rich", "tensorboard", "matplotlib", "imageio") if find_spec(name) is None]
    if missing:
        sys.exit(f"This example needs {', '.join(missing)}. Install with: pip install sb3-softq[extra]")


def set_earlier_run_aside(out: Path) -> None:
    """A run that starts from scratch in a used folder moves what is there one folder down, and overwrites nothing."""
    used = [out / name for name in ARTEFACTS if (out / name).exists()]
    if used:
        # a run that is still writing there is not moved away under its feet
        with folder_lock(out / "checkpoints"):
            pass
        number = 1
        while (out / f"earlier-{number}").exists():
            number += 1
        aside = out / f"earlier-{number}"
        aside.mkdir()
        for path in used:
            path.rename(aside / path.name)
        print(f"An earlier run was moved to {aside} (--resume would have continued it)")


def make_model(args: argparse.Namespace) -> SoftQ:
    """A new model, or the one of the last checkpoint."""
    checkpoints = args.out / "checkpoints"
    resumed = args.resume and has_checkpoint(checkpoints)
    if args.resume and not resumed:
        print(f"There is no checkpoint in {checkpoints}: starting from scratch")
    if resumed:
        # the files of a run that is still going on are its own
        with folder_lock(checkpoints):
            pass
    else:
        # where nothing can be trained, a mistyped name say, the earlier run stays
        SoftQ("MlpPolicy", args.env, buffer_size=1)
        set_earlier_run_aside(args.out)
    # One file per session, named after its first step: what a killed session did after its last checkpoint stays apart
    start = steps_done(checkpoints) if resumed else 0
    env = Monitor(gym.make(args.env), str(args.out / "monitor" / f"{start:010d}"))
    tensorboard = str(args.out / "tensorboard")
    if not resumed:
        return SoftQ("MlpPolicy", env, seed=args.seed, tensorboard_log=tensorboard)
    print(f"Resuming {checkpoints} at step {start}")
    return resume(SoftQ, checkpoints, env, tensorboard_log=tensorboard)


def make_evaluation(args: argparse.Namespace, steps: int, model: SoftQ) -> EvalCallback:
    """Evaluations on an environment of their own, at least five of them, continuing the list of a resumed run."""
    env = Monitor(gym.make(args.env))
    env.reset(seed=args.seed + 1000)
    callback = EvalCallback(
        env,
        eval_freq=max(min(steps // 5, 10_000), 1),
        n_eval_episodes=5,
        log_path=str(args.out),
        best_model_save_path=str(args.out),
    )
    callback.n_calls = model.num_timesteps
    for step, returns, lengths in zip(*load_evaluations(args.out), strict=True):
        if step <= model.num_timesteps:
            callback.evaluations_timesteps.append(int(step))
            callback.evaluations_results.append(list(returns))
            callback.evaluations_length.append(list(lengths))
            callback.best_mean_reward = max(callback.best_mean_reward, float(np.mean(returns)))
    return callback


def load_evaluations(out: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps, returns and lengths of the evaluations so far."""
    try:
        with np.load(out / "evaluations.npz") as data:
            return data["timesteps"], data["results"], data["ep_lengths"]
    except (OSError, EOFError, ValueError, zipfile.BadZipFile):
        # none yet, or the run was killed while it wrote them
        return np.zeros(0), np.zeros((0, 1)), np.zeros((0, 1))


def load_training_episodes(out: Path) -> tuple[np.ndarray, np.ndarray]:
    """Last step and return of each training episode."""
    steps: list[int] = []
    returns: list[float] = []
    for path in sorted((out / "monitor").glob("*.monitor.csv")):
        session_start = int(path.name.split(".")[0])
        # after two lines of header: return, length, time
        rows = [line.split(",") for line in path.read_text().splitlines()[2:]]
        if not rows:
            continue
        # A session that was killed went on for a while after the checkpoint that the next one started from
        while steps and steps[-1] > session_start:
            steps.pop()
            returns.pop()
        steps += [session_start + int(step) for step in np.cumsum([int(row[1]) for row in rows])]
        returns += [float(row[0]) for row in rows]
    return np.array(steps), np.array(returns)


def plot(args: argparse.Namespace) -> None:
    """Learning curve: training episodes, and evaluations with a band from the worst to the best episode."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps, returns = load_training_episodes(args.out)
    fig, ax = plt.subplots(figsize=(8, 4.5), layout="constrained")
    if len(steps) > 0:
        window = min(max(len(steps) // 20, 5), 100, len(steps))
        running = np.convolve(returns, np.ones(window) / window, mode="valid")
        ax.plot(steps, returns, ".", color="C0", alpha=0.4, markersize=4, label="training episode")
        ax.plot(steps[window - 1 :], running, color="C0", label=f"training, mean of the last {window}")
    steps, results, _ = load_evaluations(args.out)
    if len(steps) > 0:
        ax.plot(steps, results.mean(axis=1), ".-", color="C1", label=f"evaluation, mean of {results.shape[1]}")
        ax.fill_between(
            steps, results.min(axis=1), results.max(axis=1), color="C1", alpha=0.2, lw=0, label="evaluation, worst to best"
        )
    ax.set(title=f"SoftQ on {args.env}", xlabel="environment steps", ylabel="return")
    ax.grid(alpha=0.3)
    ax.legend(loc="best")
    fig.savefig(args.out / "learning_curve.png", dpi=150)


def record(env_id: str, model_path: Path, video: Path, seed: int) -> None:
    """Run the model for a while, again and again if its episodes are short, and write what the camera sees."""
    import imageio

    try:
        model = SoftQ.load(model_path, device="cpu")
        # The default camera of gymnasium 1.4 stays where it is; of a MuJoCo task without this one it is the default again
        is_mujoco = str(gym.spec(env_id).entry_point).startswith("gymnasium.envs.mujoco")
        camera: dict[str, Any] = {"camera_name": "track"} if is_mujoco else {}
        env = gym.make(env_id, render_mode="rgb_array", **camera)
        fps = env.metadata["render_fps"]
        stride = max(round(fps / VIDEO_FPS), 1)
        obs, _ = env.reset(seed=seed)
        frames: list[Any] = []
        for step in range(VIDEO_SECONDS * fps):
            if step % stride == 0:
                frames.append(env.render())
            action, _ = model.predict(obs, deterministic=True)
            obs, _, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                obs, _ = env.reset()
        if video.suffix == ".mp4":
            # H.264 needs even sizes, the default would rescale to multiples of 16
            imageio.mimwrite(video, frames, fps=fps / stride, macro_block_size=2)
        else:
            imageio.mimwrite(video, frames, duration=1000 * stride / fps, loop=0)
    except Exception as error:
        sys.exit(f"  {type(error).__name__}: {error}")


def make_video(args: argparse.Namespace, backends: Sequence[str]) -> None:
    """Record the best model in a process of its own: MuJoCo chooses its OpenGL once per process."""
    best, last = args.out / "best_model.zip", args.out / "model.zip"
    # none before the first evaluation, half a file if the run was killed while it wrote it
    model_path = best if zipfile.is_zipfile(best) else last
    video = args.out / ("video.mp4" if find_spec("imageio_ffmpeg") else "video.gif")
    for backend in backends:
        os.environ["MUJOCO_GL"] = backend
        print(f"Recording a video with MUJOCO_GL={backend}")
        process = multiprocessing.get_context("spawn").Process(target=record, args=(args.env, model_path, video, args.seed))
        process.start()
        process.join()
        if process.exitcode == 0:
            return
    print("No video, for the reasons above. MuJoCo without a screen needs, on Debian or Ubuntu: apt-get install libegl1")


def main() -> int:
    args = parse_args()
    check_extras()
    args.out.mkdir(parents=True, exist_ok=True)
    # Training needs no OpenGL, and MuJoCo cannot even be imported where the chosen one is missing
    chosen_backend = os.environ.pop("MUJOCO_GL", None)
    model = make_model(args)
    # _total_timesteps: what the resumed run was to reach
    steps = args.steps or (model._total_timesteps if model.num_timesteps > 0 else DEFAULT_STEPS)
    if model.num_timesteps >= steps:
        print(f"All {steps} steps are done: --steps with a larger number goes on")
    bar = ReturnBar()
    checkpoint = ResumableCheckpoint(max(min(steps // 5, 20_000), 1), args.out / "checkpoints")
    evaluation = make_evaluation(args, steps, model)
    interrupted = False
    try:
        model.learn(
            max(steps - model.num_timesteps, 0),
            callback=[bar, evaluation, checkpoint],
            reset_num_timesteps=model.num_timesteps == 0,
            tb_log_name="SoftQ",
        )
    except KeyboardInterrupt:
        if steps_done(checkpoint.path) != model.num_timesteps:
            # the second Ctrl-C, of one who does not want to wait for a save
            raise
        interrupted = True
        bar.on_training_end()
        print(f"Interrupted at step {model.num_timesteps}: saving")
    model.save(args.out / "model.zip")
    plot(args)
    if not interrupted:
        make_video(args, (chosen_backend,) if chosen_backend else GL_BACKENDS)
    for name, title in ARTEFACTS.items():
        if (args.out / name).exists():
            print(f"{title:>20}: {args.out / name}")
    if interrupted:
        command = ["python", sys.argv[0], "--env", args.env, "--out", str(args.out), "--steps", str(steps)]
        command += ["--seed", str(args.seed), "--resume"]
        print(f"To go on: {shlex.join(command)}")
    return 130 if interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
