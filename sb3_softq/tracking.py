"""
What experiment trackers show of an agent, through the logger of Stable-Baselines3: its hyper-parameters, what its policy does
at fixed states, a video; and a writer for MLflow. Weights & Biases takes all of it from TensorBoard (``sync_tensorboard``).
"""

import copy
import io
import tempfile
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Figure, HParam, KVWriter, Logger, TensorBoardOutputFormat
from stable_baselines3.common.utils import check_for_correct_spaces

from sb3_softq.callbacks import PeriodicCallback
from sb3_softq.checkpointing.manifest import arguments_of, without_address
from sb3_softq.checks import check_choice, check_integer
from sb3_softq.observations import rows
from sb3_softq.plots import check_dims, load_imageio, new_figure, plot_level_curves
from sb3_softq.rollouts import roll_out, stack
from sb3_softq.softq import SoftQ

#: Writers that show a number or a line of text alone
TEXT = ("stdout", "log", "json", "csv")
#: What TensorBoard's page of hyper-parameters compares agents by
METRICS = ("rollout/ep_rew_mean", "eval/mean_reward", "train/entropy", "train/ent_coef")


class HParamCallback(BaseCallback):
    """
    Log the agent's hyper-parameters, for TensorBoard's page HPARAMS: each argument of its class that is a number, a string or
    a flag, any other as text.

    :param metrics: Names of what the agents shall be compared by there, as they are logged
    """

    def __init__(self, metrics: tuple[str, ...] = METRICS):
        super().__init__()
        self.metrics = metrics

    def _on_training_start(self) -> None:
        parameters = {
            name: value if isinstance(value, bool | int | float | str) else without_address(repr(value))
            for name, value in arguments_of(self.model).items()
        }
        parameters |= {"algorithm": type(self.model).__name__, "n_envs": self.model.n_envs}
        self.logger.record("hparams", HParam(parameters, dict.fromkeys(self.metrics, 0.0)), exclude=TEXT)

    def _on_step(self) -> bool:
        return True


class PolicyCallback(PeriodicCallback):
    """
    Log what the policy does at fixed states: ``policy/entropy`` in nats over the normalised box, ``policy/soft_value`` in the
    units of the rewards, ``policy/n_modes`` (means over the states); ``policy/modes_per_state``, a histogram; level
    curves of Q with the policy's samples and modes, a figure; and a video of an episode.

    :param states: One observation or a batch, as the agent sees them; by default those that training begins with
    :param freq: Steps between two logs
    :param dims: Which two dimensions of the action the figure shows, at the first state; an agent of one dimension has none
    :param video_env: Environment of the video, or its name; None for no video. Observations are normalised as in training
    :param video_length: Most frames of a video
    :raises ValueError: if ``freq`` or ``video_length`` is not an integer >= 1, ``dims`` are not two of the action's, the
        video's environment does not render arrays or has other spaces, or the agent is not a :class:`sb3_softq.SoftQ`
    :raises ImportError: without matplotlib, or imageio where there is a video
    """

    def __init__(
        self,
        states: Any = None,
        freq: int = 10_000,
        dims: tuple[int, int] = (0, 1),
        video_env: gym.Env[Any, Any] | str | None = None,
        video_length: int = 200,
    ):
        super().__init__(freq)
        self.video_length = check_integer("video_length", video_length, 1)
        # before training, not in the middle of it
        new_figure(1, 1)
        if video_env is not None:
            load_imageio()
        self.states = states
        self.dims = dims
        self.video_env = gym.make(video_env, render_mode="rgb_array") if isinstance(video_env, str) else video_env
        if self.video_env is not None:
            check_choice("render_mode of video_env", self.video_env.render_mode, ("rgb_array",))
        # states that VecNormalize has not normalised
        self._are_raw = False

    def _init_callback(self) -> None:
        if not isinstance(self.model, SoftQ):
            raise ValueError(f"model={type(self.model).__name__} is not allowed: it must be a SoftQ, whose policy has modes")
        n_dims = int(np.prod(self.model.action_space.shape))
        if n_dims >= 2:
            check_dims(self.dims, n_dims)
        if self.video_env is not None:
            env = BaseAlgorithm._wrap_env(self.video_env, monitor_wrapper=False)
            try:
                check_for_correct_spaces(env, self.model.observation_space, self.model.action_space)
            except ValueError as error:
                raise ValueError(
                    f"video_env={self.video_env} is not allowed: it must have the agent's spaces, so its wrappers ({error})"
                ) from error

    def _on_training_start(self) -> None:
        super()._on_training_start()
        if self.states is None:
            self._are_raw = self.model.get_vec_normalize_env() is not None
            # a copy: environments may write into what they gave
            self.states = copy.deepcopy(self.model._last_original_obs if self._are_raw else self.model._last_obs)
        elif not self.model.policy.obs_to_tensor(self.states)[1]:
            # one state alone
            self.states = stack([self.states])

    def _on_period(self) -> None:
        model, logger = self.model, self.logger
        assert isinstance(model, SoftQ)
        states = self.states
        if self._are_raw:
            # by the statistics of now, as the agent sees them
            vec_normalize = model.get_vec_normalize_env()
            assert vec_normalize is not None
            states = vec_normalize.normalize_obs(states)
        n_modes = np.array([len(modes) for modes in model.modes(states)[0]])
        logger.record("policy/entropy", float(np.mean(model.entropy(states))) - model._log_scale)
        logger.record("policy/soft_value", float(np.mean(model.soft_value(states))))
        logger.record("policy/n_modes", float(n_modes.mean()))
        logger.record("policy/modes_per_state", n_modes, exclude=TEXT)
        if np.prod(model.action_space.shape) >= 2:
            figure, axes = new_figure(4, 4)
            first: Any = rows(states, 0)
            plot_level_curves(axes, model, first, self.dims, modes=True)
            figure.tight_layout()
            logger.record("policy/level_curves", Figure(figure, close=False), exclude=TEXT)
        if self.video_env is not None:
            frames = roll_out_frames(model, self.video_env, self.video_length)
            log_video(logger, "policy/video", frames, self.num_timesteps)


def roll_out_frames(model: SoftQ, env: gym.Env[Any, Any], n_frames: int) -> np.ndarray:
    """
    One episode with deterministic actions.

    :param model: Agent
    :param env: Environment with ``render_mode="rgb_array"``
    :param n_frames: Most frames, the first before the first step
    :return: Frames, shape (n, height, width, 3), uint8
    """
    (episode,) = roll_out(model, [env], deterministic=True, max_steps=n_frames, record=lambda env: np.asarray(env.render()))
    return np.stack(episode.records[:n_frames])


def log_video(logger: Logger, name: str, frames: np.ndarray, step: int, fps: int = 30) -> None:
    """
    Log an animated GIF to TensorBoard and MLflow, where the logger writes to them. ``SummaryWriter.add_video`` of torch needs
    a moviepy older than the RL Zoo's.

    :param logger: Logger of the agent
    :param name: What it is called there
    :param frames: Shape (n, height, width, 3), uint8
    :param step: Number of steps so far
    :param fps: Frames per second
    """
    buffer = io.BytesIO()
    load_imageio().imwrite(buffer, frames, extension=".gif", duration=1000 / fps, loop=0)
    for output in logger.output_formats:
        if isinstance(output, TensorBoardOutputFormat):
            # not at the top: tensorboard is optional, and is there where its writer is
            from tensorboard.compat.proto.summary_pb2 import Summary

            height, width = frames.shape[1:3]
            image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=buffer.getvalue())
            output.writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)
        elif isinstance(output, MLflowOutputFormat):
            output.log_file(f"{name}_{step}.gif", buffer.getvalue())


class MLflowOutputFormat(KVWriter):
    """
    Writer of the logger for MLflow: numbers as metrics, hyper-parameters as parameters, figures and videos as artifacts, in
    the run that is active, or a new one.

        from stable_baselines3.common.logger import HumanOutputFormat, Logger

        model.set_logger(Logger(None, [HumanOutputFormat(sys.stdout), MLflowOutputFormat()]))

    :raises ImportError: without the extra ``mlflow``
    """

    def __init__(self) -> None:
        self._mlflow = _mlflow()
        self._client = self._mlflow.MlflowClient()
        self._begun = self._mlflow.active_run() is None
        self.run_id = (self._mlflow.start_run() if self._begun else self._mlflow.active_run()).info.run_id

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """
        :param key_values: What was recorded
        :param key_excluded: For each of it the writers that do not get it
        :param step: Number of steps so far
        """
        for key, value in key_values.items():
            if "mlflow" in (key_excluded.get(key) or ()):
                continue
            if isinstance(value, HParam):
                for name, parameter in value.hparam_dict.items():
                    try:
                        self._client.log_param(self.run_id, name, parameter)
                    except self._mlflow.exceptions.MlflowException as error:
                        # of a run that goes on with another value
                        warnings.warn(f"MLflow has not taken {name}={parameter!r}: {error}", stacklevel=2)
            elif isinstance(value, Figure):
                buffer = io.BytesIO()
                value.figure.savefig(buffer, format="png")
                self.log_file(f"{key}_{step}.png", buffer.getvalue())
            elif isinstance(value, bool | int | float | np.number):
                self._client.log_metric(self.run_id, key, float(value), step=step)

    def log_file(self, name: str, content: bytes) -> None:
        """
        :param name: Of the artifact, with the folder that it is in
        :param content: Of the file
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / Path(name).name
            path.write_bytes(content)
            self._client.log_artifact(self.run_id, str(path), str(Path(name).parent))

    def close(self) -> None:
        """End the run, if it was begun here."""
        if self._begun:
            self._mlflow.end_run()


def _mlflow() -> ModuleType:
    try:
        import mlflow
    except ImportError as error:
        raise ImportError('MLflowOutputFormat needs MLflow: pip install "sb3-softq[mlflow]"') from error
    return mlflow
