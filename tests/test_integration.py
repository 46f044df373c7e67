"""What users put around an algorithm: vectorized environments, wrappers, callbacks, loggers, helpers."""

import json

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib.common.wrappers import TimeFeatureWrapper
from stable_baselines3.common.callbacks import (
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
    LogEveryNTimesteps,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack, VecNormalize
from torch import nn

from sb3_softq import DiscreteSoftQ, SoftQ
from tests.conftest import Ends, small

BOTH = pytest.mark.parametrize(("cls", "env_id"), [(SoftQ, "Pendulum-v1"), (DiscreteSoftQ, "CartPole-v1")])


def make(cls, env, policy="MlpPolicy", **kwargs):
    return small(cls, policy, env, **({"buffer_size": 400} | kwargs))


@BOTH
@pytest.mark.parametrize("vec_env_cls", [DummyVecEnv, SubprocVecEnv])
def test_vectorized_environments(cls, env_id, vec_env_cls):
    env = make_vec_env(env_id, n_envs=2, seed=0, vec_env_cls=vec_env_cls)
    model = make(cls, env, gradient_steps=-1).learn(40)
    # an update for each transition after the first eight
    assert model.num_timesteps == 40
    assert model._n_updates == 32
    env.close()


@BOTH
def test_frame_stack(cls, env_id):
    env = VecFrameStack(make_vec_env(env_id, n_envs=2), n_stack=3)
    model = make(cls, env).learn(40)
    assert model.observation_space.shape[0] == 3 * env.venv.observation_space.shape[0]
    assert evaluate_policy(model, env, n_eval_episodes=1)[0] != 0


def image_env():
    return FakeImageEnv(screen_height=36, screen_width=36, n_channels=1, discrete=False)


def test_stacked_images():
    env = VecFrameStack(make_vec_env(image_env), n_stack=2)
    kwargs = dict(features_extractor_kwargs=dict(features_dim=8), net_arch=[8])
    model = make(SoftQ, env, "CnnPolicy", policy_kwargs=kwargs, buffer_size=50).learn(20)
    assert model.observation_space.shape == (2, 36, 36)


@pytest.mark.parametrize("normalize_images", [True, False])
def test_images_with_and_without_normalisation(normalize_images):
    """Images that are floats already are taken as they are."""

    class Floats(gym.ObservationWrapper):
        observation_space = spaces.Box(0.0, 1.0, (1, 36, 36))

        def observation(self, obs):
            return (obs / 255.0).astype(np.float32).transpose(2, 0, 1)

    env = image_env() if normalize_images else Floats(image_env())
    kwargs = dict(features_extractor_kwargs=dict(features_dim=8, normalized_image=not normalize_images), net_arch=[8])
    model = make(SoftQ, env, "CnnPolicy", policy_kwargs=kwargs | dict(normalize_images=normalize_images), buffer_size=50)
    model.learn(20)
    seen = []
    model.ema_actor.features_extractor.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.predict(env.observation_space.sample())
    assert 0.9 < seen[0].max() <= 1.0


class Counting(BaseFeaturesExtractor):
    """A custom extractor that knows how many rows it has seen."""

    def __init__(self, observation_space, features_dim=5):
        super().__init__(observation_space, features_dim)
        self.linear = nn.Linear(observation_space.shape[0], features_dim)
        self.rows = []

    def forward(self, observations):
        self.rows.append(len(observations))
        return th.relu(self.linear(observations))


@pytest.mark.parametrize("share", [True, False])
def test_custom_extractors_see_each_state_once(share):
    kwargs = dict(features_extractor_class=Counting, share_features_extractor=share, net_arch=[8])
    model = make(SoftQ, "Pendulum-v1", policy_kwargs=kwargs, n_actor_states=4, n_value_particles=8).learn(8)
    networks = model.actor, model.ema_actor, model.critic
    extractors = {id(e): e for e in (x.features_extractor for x in networks)}
    for extractor in extractors.values():
        extractor.rows.clear()
    model.train(1, batch_size=8)
    # once per state and network, not per particle: proposal, target, regression, sampler, its critic
    rows = sorted(n for extractor in extractors.values() for n in extractor.rows)
    assert rows == [4, 4, 8, 8, 8]


@BOTH
def test_vec_normalize_is_saved_and_evaluated(cls, env_id, tmp_path):
    env = VecNormalize(make_vec_env(env_id, n_envs=2, seed=0))
    model = make(cls, env).learn(60)
    env.save(str(tmp_path / "normalize.pkl"))
    model.save(tmp_path / "model")
    loaded_env = VecNormalize.load(str(tmp_path / "normalize.pkl"), make_vec_env(env_id, n_envs=2, seed=0))
    loaded_env.training = loaded_env.norm_reward = False
    loaded = cls.load(tmp_path / "model", env=loaded_env, device="cpu")
    obs = env.observation_space.sample()
    np.testing.assert_array_equal(loaded_env.normalize_obs(obs), env.normalize_obs(obs))
    assert np.isfinite(evaluate_policy(loaded, loaded_env, n_eval_episodes=2)[0])
    loaded.learn(20, reset_num_timesteps=False)
    assert loaded.num_timesteps == 80


@BOTH
def test_time_feature(cls, env_id):
    env = TimeFeatureWrapper(gym.make(env_id))
    model = make(cls, env).learn(40)
    assert env.observation_space.contains(np.asarray(model.replay_buffer.observations[5, 0], dtype=np.float32))


@BOTH
def test_callbacks(cls, env_id, tmp_path):
    callback = CallbackList(
        [
            CheckpointCallback(20, str(tmp_path), name_prefix="model", save_replay_buffer=True),
            EvalCallback(Monitor(gym.make(env_id)), eval_freq=20, n_eval_episodes=1, log_path=str(tmp_path), verbose=0),
            EveryNTimesteps(15, StopTrainingOnMaxEpisodes(10)),
            LogEveryNTimesteps(10),
        ]
    )
    model = make(cls, env_id)
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(40, callback, progress_bar=True)
    assert (tmp_path / "model_40_steps.zip").exists()
    assert (tmp_path / "model_replay_buffer_40_steps.pkl").exists()
    with np.load(tmp_path / "evaluations.npz") as evaluations:
        assert evaluations["timesteps"].tolist() == [20, 40]
    rows = (tmp_path / "progress.csv").read_text().splitlines()
    assert len(rows) >= 4
    assert "train/entropy" in rows[0]
    assert cls.load(tmp_path / "model_40_steps", device="cpu").num_timesteps == 40


def test_stop_on_reward():
    stop = StopTrainingOnRewardThreshold(-1e9)
    model = make(SoftQ, "Pendulum-v1")
    model.learn(100, EvalCallback(Monitor(gym.make("Pendulum-v1")), stop, eval_freq=30, n_eval_episodes=1, verbose=0))
    assert model.num_timesteps == 30


@BOTH
def test_loggers(cls, env_id, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = make(cls, env_id, tensorboard_log=str(tmp_path), stats_window_size=2)
    model.learn(30, log_interval=1, tb_log_name="run", callback=LogEveryNTimesteps(10))
    events = EventAccumulator(str(tmp_path / "run_1")).Reload()
    expected = {"train/critic_loss", "train/ent_coef", "train/entropy", "train/learning_rate", "time/fps"}
    assert expected <= set(events.Tags()["scalars"])
    assert all(np.isfinite(event.value) for event in events.Scalars("train/critic_loss"))
    assert model.ep_info_buffer.maxlen == 2

    model.set_logger(configure(str(tmp_path / "json"), ["json"]))
    model.learn(20, callback=LogEveryNTimesteps(10), reset_num_timesteps=False)
    rows = [json.loads(line) for line in (tmp_path / "json" / "progress.json").read_text().splitlines()]
    assert rows[-1]["time/total_timesteps"] > 40
    assert np.isfinite(rows[-1]["train/critic_loss"])


@pytest.mark.parametrize(
    ("cls", "action_space"), [(SoftQ, spaces.Box(-1, 1, (1,))), (DiscreteSoftQ, spaces.Discrete(2))], ids=["box", "discrete"]
)
@pytest.mark.parametrize("n_envs", [1, 2])
def test_truncation_bootstraps_and_termination_does_not(cls, action_space, n_envs):
    """The value of a step that ends is its reward; of one that is cut off, what would have followed counts too."""
    values = {}
    for terminates in (True, False):
        env = make_vec_env(Ends, n_envs=n_envs, env_kwargs=dict(terminates=terminates, action_space=action_space))
        kwargs = dict(gamma=0.5, ent_coef=0.01, tau=0.2, learning_rate=3e-3, train_freq=1, target_update_interval=1)
        model = make(cls, env, policy_kwargs=dict(net_arch=[16]), **kwargs)
        model.learn(1000)
        action = np.zeros((1, 1)) if cls is SoftQ else np.zeros(1, dtype=int)
        values[terminates] = float(model.q_values(np.zeros((1, 1), dtype=np.float32), action)[0])
    assert values[True] == pytest.approx(1.0, abs=0.15)
    assert values[False] == pytest.approx(2.0, abs=0.3)


@BOTH
def test_loading_with_custom_objects_and_without_an_environment(cls, env_id, tmp_path):
    model = make(cls, env_id).learn(20)
    model.save(tmp_path / "model")
    loaded = cls.load(tmp_path / "model", device="cpu", custom_objects=dict(learning_rate=0.5, batch_size=4))
    assert (loaded.learning_rate, loaded.batch_size, loaded.lr_schedule(1.0)) == (0.5, 4, 0.5)
    assert loaded.get_env() is None
    loaded.set_env(gym.make(env_id))
    loaded.learn(20, reset_num_timesteps=True)
    assert loaded.num_timesteps == 20
    with pytest.raises(ValueError, match=r"[Oo]bservation spaces do not match"):
        cls.load(tmp_path / "model", env=gym.make("Acrobot-v1" if cls is DiscreteSoftQ else "MountainCarContinuous-v0"))


@BOTH
def test_replay_buffer_is_saved(cls, env_id, tmp_path):
    model = make(cls, env_id).learn(30)
    model.save_replay_buffer(tmp_path / "buffer")
    other = make(cls, env_id)
    other.load_replay_buffer(tmp_path / "buffer")
    assert other.replay_buffer.size() == 30
    np.testing.assert_array_equal(other.replay_buffer.rewards[:30], model.replay_buffer.rewards[:30])
