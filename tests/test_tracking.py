"""What experiment trackers get: read back from TensorBoard's, MLflow's and Weights & Biases' own files."""

import inspect
import io
import shutil
import sys
import warnings

import gymnasium as gym
import imageio.v3 as iio
import numpy as np
import pytest
from stable_baselines3 import SAC
from stable_baselines3.common.envs import FakeImageEnv, SimpleMultiObsEnv
from stable_baselines3.common.logger import Logger, TensorBoardOutputFormat
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from sb3_softq import DiscreteSoftQ, SoftQ
from sb3_softq.checkpointing.manifest import arguments_of
from sb3_softq.envs.multi_goal import MultiGoalEnv
from sb3_softq.tracking import HParamCallback, MLflowOutputFormat, PolicyCallback, log_video
from tests.conftest import small
from tests.test_zoo import zoo

mlflow = pytest.importorskip("mlflow")


def events(folder):
    """Of the one run in a folder."""
    (path,) = folder.rglob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(path), size_guidance={"images": 0, "scalars": 0, "histograms": 0})
    return accumulator.Reload()


def two_actions(**kwargs):
    return small(env=gym.make("sb3_softq/MultiGoal-v0", max_episode_steps=30), **kwargs)


@pytest.mark.parametrize("algorithm", [SoftQ, DiscreteSoftQ, SAC])
def test_tensorboard_compares_hyper_parameters(tmp_path, algorithm):
    env = "CartPole-v1" if algorithm is DiscreteSoftQ else "Pendulum-v1"
    kwargs = dict(gamma=0.9, learning_rate=lambda _: 1e-3, tensorboard_log=str(tmp_path), learning_starts=500)
    # an episode of Pendulum, after which is logged
    model = algorithm("MlpPolicy", env, **kwargs).learn(210, HParamCallback(), log_interval=1)
    content = events(tmp_path).summary_metadata[metadata.SESSION_START_INFO_TAG].plugin_data.content
    shown = HParamsPluginData.FromString(content).session_start_info.hparams
    assert shown["gamma"].number_value == 0.9
    assert shown["algorithm"].string_value == algorithm.__name__
    assert "lambda" in shown["learning_rate"].string_value
    assert (shown["n_envs"].number_value, shown["batch_size"].number_value) == (1, model.batch_size)
    assert shown["optimize_memory_usage"].bool_value is False
    experiment = events(tmp_path).summary_metadata[metadata.EXPERIMENT_TAG].plugin_data.content
    metrics = {metric.name.tag for metric in HParamsPluginData.FromString(experiment).experiment.metric_infos}
    assert "rollout/ep_rew_mean" in metrics


def test_all_arguments_are_told():
    model = two_actions(stats_window_size=7)
    told = arguments_of(model)
    assert told["stats_window_size"] == 7
    expected = set(inspect.signature(SoftQ).parameters) - {"policy", "env", "_init_setup_model"}
    assert set(told) == expected


@pytest.mark.parametrize("as_dict", [False, True])
def test_one_state_is_a_batch_of_one(as_dict):
    env = SimpleMultiObsEnv(discrete_actions=False) if as_dict else "Pendulum-v1"
    model = small(policy="MultiInputPolicy" if as_dict else "MlpPolicy", env=env, learning_starts=1000, width=None)
    state = model.observation_space.sample()
    callback = PolicyCallback(state, freq=5)
    model.learn(1, callback)
    assert model.policy.obs_to_tensor(callback.states)[1]
    modes, _ = model.modes(callback.states)
    assert len(modes) == 1
    callback._on_period()


@pytest.mark.parametrize("dims", [(0, 2), (0, 0), (-1, 0), (0,), None])
def test_what_cannot_be_drawn_is_refused_before_training(dims):
    model = two_actions()
    with pytest.raises(ValueError, match=r"dims=.* is not allowed with 2 action dimensions: it must name two of them"):
        model.learn(10, PolicyCallback(dims=dims))
    assert model.num_timesteps == 0


def test_an_environment_that_renders_no_arrays_has_no_video():
    with pytest.raises(ValueError, match="render_mode of video_env=None is not allowed: it must be one of 'rgb_array'"):
        PolicyCallback(video_env=MultiGoalEnv())


@pytest.mark.parametrize("name", ["MountainCarContinuous-v0", "CartPole-v1"])
def test_a_video_of_another_task_is_refused_before_training(name):
    model = small(env="Pendulum-v1", learning_starts=100)
    with pytest.raises(ValueError, match=f"video_env=.*{name}.* is not allowed: it must have the agent's spaces"):
        model.learn(50, PolicyCallback(freq=10, video_env=name))
    assert model.num_timesteps == 0
    # images that the agent sees with their channels first
    env = FakeImageEnv(discrete=False)
    env.render_mode = "rgb_array"
    model = small(policy="CnnPolicy", env=FakeImageEnv(discrete=False), width=None, buffer_size=50, learning_starts=100)
    PolicyCallback(video_env=env).init_callback(model)


def test_the_policy_at_fixed_states(tmp_path):
    states = np.array([[0.0, 0.0], [3.0, -1.0], [-4.0, 4.0]], dtype=np.float32)
    # without learning, it is the same agent at the end
    model = two_actions(tensorboard_log=str(tmp_path), ent_coef=10.0, learning_starts=100)
    callback = PolicyCallback(states, freq=60, video_env=MultiGoalEnv(render_mode="rgb_array"), video_length=5)
    model.learn(60, callback, log_interval=1)
    model.logger.dump(60)
    seen = events(tmp_path)
    assert seen.Scalars("policy/n_modes")[-1].value == np.mean([len(model.modes(state)[0]) for state in states])
    assert seen.Scalars("policy/entropy")[-1].value == pytest.approx(model.entropy(states).mean(), abs=0.3)
    assert seen.Scalars("policy/soft_value")[-1].value == pytest.approx(model.soft_value(states).mean(), abs=5.0)
    assert seen.Histograms("policy/modes_per_state")[-1].histogram_value.num == 3
    picture = iio.imread(io.BytesIO(seen.Images("policy/level_curves")[-1].encoded_image_string))
    # something is drawn on it
    assert picture.shape[:2] == (400, 400)
    assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 50
    video = iio.imread(io.BytesIO(seen.Images("policy/video")[-1].encoded_image_string))
    assert len(video) == 5
    assert not np.array_equal(video[0], video[-1])


def test_the_entropy_has_the_units_of_that_of_training(tmp_path):
    """Over the normalised box, whatever the environment's is."""
    model = small(env="Pendulum-v1", learning_starts=100, tensorboard_log=str(tmp_path))
    model.learn(60, PolicyCallback(freq=60), log_interval=1)
    model.logger.dump(60)
    entropy = events(tmp_path).Scalars("policy/entropy")[-1].value
    assert entropy <= np.log(2) + 0.05
    obs = np.array([[1.0, 0.0, 0.0]] * 4, dtype=np.float32)
    assert entropy == pytest.approx(model.entropy(obs).mean() - np.log(2), abs=0.3)


def test_states_are_those_that_training_begins_with(tmp_path):
    venv = VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")] * 3))
    model = small(env=venv, tensorboard_log=str(tmp_path))
    callback = PolicyCallback(freq=30)
    seen, modes = [], model.modes
    model.modes = lambda states: (seen.append(states), modes(states))[1]
    model.learn(60, callback, log_interval=1)
    first = np.stack([gym.make("Pendulum-v1").reset(seed=model.seed + i)[0] for i in range(3)])
    np.testing.assert_allclose(callback.states, first, rtol=1e-6)
    # as the agent sees them now
    assert len(seen) == 2
    np.testing.assert_allclose(seen[-1], venv.normalize_obs(first), rtol=1e-4)
    assert np.abs(seen[0] - seen[1]).max() > 1e-3
    model.logger.dump(60)
    assert "policy/n_modes" in events(tmp_path).Tags()["scalars"]
    assert events(tmp_path).Tags()["images"] == []


def test_dict_states(tmp_path):
    env = gym.wrappers.TransformObservation(
        gym.make("Pendulum-v1"), lambda obs: {"obs": obs}, gym.spaces.Dict({"obs": gym.make("Pendulum-v1").observation_space})
    )
    model = small(env=env, policy="MultiInputPolicy", tensorboard_log=str(tmp_path))
    model.learn(20, PolicyCallback(freq=10), log_interval=1)
    model.logger.dump(20)
    assert events(tmp_path).Scalars("policy/n_modes")[-1].value >= 1


def test_training_is_the_same_with_it(tmp_path):
    def train(*callbacks):
        return two_actions().learn(60, list(callbacks)).predict(np.zeros(2, dtype=np.float32), deterministic=True)[0]

    video = dict(video_env=MultiGoalEnv(render_mode="rgb_array"), video_length=10)
    with_it = train(HParamCallback(), PolicyCallback(freq=20, **video))
    np.testing.assert_array_equal(with_it, train())


def test_videos_are_of_normalised_observations(tmp_path):
    """The agent in the video does what it does in training."""
    venv = VecNormalize(DummyVecEnv([MultiGoalEnv]))
    model = small(env=venv, tensorboard_log=str(tmp_path)).learn(60)
    seen = []
    predict = model.predict
    model.predict = lambda obs, **kwargs: (seen.append(obs), predict(obs, **kwargs))[1]
    callback = PolicyCallback(freq=1, video_env=MultiGoalEnv(render_mode="rgb_array"), video_length=2)
    callback.init_callback(model)
    callback.on_training_start({}, {})
    callback._on_period()
    start = MultiGoalEnv().reset(seed=0)[0]
    assert any(np.allclose(obs, venv.normalize_obs(start)) for obs in seen)


@pytest.mark.parametrize("kwargs", [dict(freq=0), dict(video_length=0), dict(freq=1.5)])
def test_numbers_of_steps(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        PolicyCallback(**kwargs)


def test_agents_without_modes_are_refused():
    with pytest.raises(ValueError, match="model=SAC"):
        SAC("MlpPolicy", "Pendulum-v1").learn(1, PolicyCallback())


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory):
    """Of MLflow, which takes five seconds to make one."""
    path = tmp_path_factory.mktemp("mlflow") / "empty.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def tracking(tmp_path, empty_database):
    """A database of MLflow, and its run."""
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{shutil.copy(empty_database, tmp_path / 'mlflow.db')}")
    experiment = mlflow.create_experiment("test", artifact_location=(tmp_path / "artifacts").as_uri())
    mlflow.set_experiment(experiment_id=experiment)
    yield tmp_path / "artifacts"
    while mlflow.active_run():
        mlflow.end_run()
    mlflow.set_tracking_uri(before)


def test_mlflow(tracking):
    model = two_actions(gamma=0.9)
    output = MLflowOutputFormat()
    model.set_logger(Logger(None, [output]))
    callback = PolicyCallback(freq=60, video_env=MultiGoalEnv(render_mode="rgb_array"), video_length=3)
    model.learn(60, [HParamCallback(), callback], log_interval=1)
    model.logger.record("hidden", 1.0, exclude="mlflow")
    model.logger.dump(60)
    run = mlflow.get_run(output.run_id)
    assert run.data.params["gamma"] == "0.9"
    assert run.data.metrics["time/total_timesteps"] == 60
    assert {"rollout/ep_rew_mean", "policy/n_modes"} <= run.data.metrics.keys()
    assert "hidden" not in run.data.metrics
    history = mlflow.MlflowClient().get_metric_history(output.run_id, "rollout/ep_rew_mean")
    assert history[0].step == 30
    assert len(iio.imread(next(tracking.rglob("video_60.gif")))) == 3
    assert iio.imread(next(tracking.rglob("level_curves_60.png"))).shape[0] == 400
    output.close()
    assert mlflow.active_run() is None


def test_other_parameters_do_not_end_a_run_of_mlflow_that_goes_on(tracking):
    """Functions look alike wherever they lie; what differs is told of."""
    with mlflow.start_run():
        output = MLflowOutputFormat()

        def log(gamma):
            model = two_actions(gamma=gamma, learning_rate=lambda progress: 1e-3)
            model.set_logger(Logger(None, [output]))
            model.learn(10, HParamCallback(), log_interval=1)
            model.logger.dump(10)

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            log(0.9)
            log(0.9)
        with pytest.warns(UserWarning, match=r"MLflow has not taken gamma=0\.8"):
            log(0.8)
    assert mlflow.get_run(output.run_id).data.params["gamma"] == "0.9"


def test_a_run_of_mlflow_that_is_active_goes_on(tracking):
    with mlflow.start_run() as run:
        output = MLflowOutputFormat()
        output.write({"a": 1.0}, {"a": None}, step=3)
        output.close()
        assert mlflow.active_run().info.run_id == run.info.run_id
    assert mlflow.get_run(run.info.run_id).data.metrics == {"a": 1.0}


@pytest.mark.parametrize(
    ("package", "make", "extra"),
    [
        ("mlflow", MLflowOutputFormat, "mlflow"),
        ("matplotlib.figure", PolicyCallback, "extra"),
        ("imageio.v3", lambda: PolicyCallback(video_env=MultiGoalEnv(render_mode="rgb_array")), "extra"),
    ],
)
def test_missing_packages_are_named_before_training(monkeypatch, package, make, extra):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"\[{extra}\]"):
        make()


def test_videos_go_nowhere_without_a_writer_for_them(tmp_path):
    frames = np.zeros((2, 8, 8, 3), dtype=np.uint8)
    log_video(Logger(None, []), "video", frames, 1)
    writer = TensorBoardOutputFormat(str(tmp_path))
    log_video(Logger(None, [writer]), "video", frames, 1)
    writer.close()
    assert events(tmp_path).Images("video")[0].width == 8


def test_track_of_the_rl_zoo_is_weights_and_biases(tmp_path):
    pytest.importorskip("wandb")
    arguments = ("--algo", "softq", "--env", "Pendulum-v1", "-n", 850, "-f", "logs", "--eval-freq", 400, "--eval-episodes", 1)
    # what it shall show beside the defaults
    callback = "callback:['sb3_softq.tracking.HParamCallback',{'sb3_softq.tracking.PolicyCallback':{'freq':790}}]"
    zoo(
        "train", *arguments, "--track", "-params", "learning_starts:780", callback, cwd=tmp_path, env={"WANDB_MODE": "offline"}
    )
    (path,) = tmp_path.rglob("*.wandb")
    content = path.read_bytes()
    for name in ("rollout/ep_rew_mean", "eval/mean_reward", "policy/n_modes", "train/entropy"):
        assert name.encode() in content, name
