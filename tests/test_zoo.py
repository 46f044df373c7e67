"""The RL Zoo's commands with --algo softq, run as a user runs them."""

import os
import pickle
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import optuna
import pytest
import yaml
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv, FakeImageEnv, SimpleMultiObsEnv

from sb3_softq import SQL_2017, DiscreteSoftQ, ParticleOptions, SoftQ
from sb3_softq.zoo import HYPERPARAMS, ZooSoftQ, untrusted
from sb3_softq.zoo.__main__ import COMMANDS, with_configuration
from sb3_softq.zoo.environments import environment_of, register_environment
from sb3_softq.zoo.search import convert_softq_params, sample_softq_params
from tests.programs import output_of
from tests.test_untrusted import Payload, with_payload

ENTRIES = {name: yaml.safe_load((HYPERPARAMS / name).read_text()) for name in ("softq.yml", "softq_original.yml")}


#: An environment whose rewards become NaN
BROKEN_ENV = """
import gymnasium as gym

class Broken(gym.Wrapper):
    steps = 0

    def step(self, action):
        self.steps += 1
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, reward if self.steps < 30 else float("nan"), terminated, truncated, info

for env_id in ("Pendulum-v1", "CartPole-v1"):
    gym.register(f"Broken-{env_id}", lambda env_id=env_id: Broken(gym.make(env_id)))
"""


def zoo(*args, code=0, cwd=None, timeout=600, env=None):
    env = {**os.environ, **(env or {}), "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "PYTHONWARNINGS": "ignore"}
    return output_of(["-m", "sb3_softq.zoo", *map(str, args)], env, cwd, code, timeout)


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """A trained agent, as the RL Zoo leaves it."""
    folder = tmp_path_factory.mktemp("logs")
    output = zoo(
        *("train", "--algo", "softq", "--env", "Pendulum-v1", "-n", 300, "-f", folder, "--seed", 1),
        *("--eval-freq", 100, "--eval-episodes", 1),
        *("-params", "learning_starts:50", "n_value_particles:3", "learning_rate:'auto'"),
    )
    # our configuration, and what the command line changes
    assert "softq.yml" in output
    assert "('n_timesteps', 20000)" in output
    assert "('n_value_particles', 3)" in output
    return folder


def test_train(logs):
    run = logs / "softq" / "Pendulum-v1_1"
    model = SoftQ.load(run / "Pendulum-v1.zip", device="cpu")
    assert (model.num_timesteps, model.n_value_particles, model._n_updates) == (300, 3, 250)
    # which the RL Zoo by itself takes for a schedule of its own
    assert model.learning_rate == "auto"
    assert (run / "best_model.zip").exists()
    with np.load(run / "evaluations.npz") as evaluations:
        assert evaluations["timesteps"].tolist() == [100, 200, 300]


def test_enjoy(logs):
    output = zoo("enjoy", "--algo", "softq", "--env", "Pendulum-v1", "-f", logs, "--no-render", "-n", 200)
    assert "Mean reward: -" in output


def test_who_only_acts_has_no_replay_buffer(logs):
    """As enjoy and record_video load the RL Zoo's own agents; training that goes on has it."""
    path = logs / "softq" / "Pendulum-v1_1" / "Pendulum-v1.zip"
    acts, learns = ZooSoftQ.load(path, custom_objects={}, device="cpu"), ZooSoftQ.load(path, device="cpu")
    assert acts.replay_buffer.buffer_size == 1
    assert learns.replay_buffer.buffer_size == learns.buffer_size > 1000


@pytest.fixture
def strangers(logs, tmp_path):
    """The same agent in a folder of somebody else, whose zip runs code where it is unpickled."""
    folder = tmp_path / "strangers"
    shutil.copytree(logs, folder)
    run = folder / "softq" / "Pendulum-v1_1"
    with_payload(run / "Pendulum-v1.zip", tmp_path / "ran")
    return folder, run / "Pendulum-v1", tmp_path / "ran"


WATCH = ("--algo", "softq", "--env", "Pendulum-v1", "-n", 200, "--untrusted")


def test_watch_a_strangers_agent(logs, strangers, tmp_path):
    folder, _, marker = strangers
    seen = [zoo("enjoy", *WATCH[:-1], "-f", logs, "--no-render"), zoo("enjoy", *WATCH, "-f", folder, "--no-render")]
    rewards = [re.search(r"Mean reward: -[\d.]+", output)[0] for output in seen]
    assert rewards[0] == rewards[1]
    zoo("record_video", *WATCH, "-f", folder, "-o", tmp_path / "videos")
    assert not marker.exists()
    # this is what it is about
    zoo("enjoy", *WATCH[:-1], "-f", folder, "--no-render", code=1)
    assert marker.exists()


def test_what_gymnasium_itself_does_is_followed(strangers):
    """Entries of this package have it: those of DeepMind control."""
    folder, settings, marker = strangers
    line = "- - - env_wrapper\n    - gymnasium.wrappers.FlattenObservation"
    (settings / "config.yml").write_text(f"!!python/object/apply:collections.OrderedDict\n{line}\n")
    assert "Mean reward" in zoo("enjoy", *WATCH, "-f", folder, "--no-render")
    assert not marker.exists()


def test_dicts_of_environments_that_have_no_entry():
    env = make_vec_env(lambda: SimpleMultiObsEnv(discrete_actions=False))
    assert type(ZooSoftQ("MlpPolicy", env, buffer_size=10).policy).__name__ == "MultiInputPolicy"


TOUCH = "- - - seed\n    - !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [RAN]]"


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("config.yml", TOUCH, "could not determine a constructor for the tag"),
        ("args.yml", TOUCH, "could not determine a constructor for the tag"),
        ("config.yml", "- - - normalize\n    - __import__('pathlib').Path('RAN').touch()", "normalize=.* is not followed"),
        ("config.yml", "- - - env_wrapper\n    - evil.Wrapper", "env_wrapper='evil.Wrapper' in .* is not followed"),
        ("args.yml", "- - - env_kwargs\n    - {xml_file: evil.xml}", "env_kwargs=.* in .* is not followed"),
        ("vecnormalize.pkl", None, "vecnormalize.pkl in .* is not unpickled"),
    ],
)
def test_a_strangers_settings_do_not_run(strangers, file, line, message):
    folder, settings, marker = strangers
    if line is None:
        (settings / file).write_bytes(pickle.dumps(Payload(marker)))
    else:
        text = f"!!python/object/apply:collections.OrderedDict\n{line.replace('RAN', str(marker))}\n"
        (settings / file).write_text(text)
    assert re.search(message, zoo("enjoy", *WATCH, "-f", folder, "--no-render", code=1))
    assert not marker.exists()


def test_no_trust_where_no_environment_was_made(strangers, monkeypatch):
    """Rather no agent than one that was unpickled."""
    _, settings, marker = strangers
    monkeypatch.setattr(untrusted, "state", SimpleNamespace(distrusts=True, env=None))
    with pytest.raises(ValueError, match=r"is pickled in .* not read from a file without trust"):
        ZooSoftQ.load(settings.parent / "Pendulum-v1.zip")
    assert not marker.exists()


def test_where_trust_cannot_be_left_out():
    for command in (
        ("train", *WATCH),
        ("enjoy", "--algo", "sac", "--untrusted"),
        ("enjoy", "--algo", "sac", "-f", "softq", "--untrusted"),
    ):
        assert "--untrusted is for enjoy and record_video of --algo softq" in zoo(*command, code=1)


def test_record_video(logs, tmp_path):
    zoo("record_video", "--algo", "softq", "--env", "Pendulum-v1", "-f", logs, "-n", 20, "-o", tmp_path)
    (video,) = tmp_path.glob("*.mp4")
    assert video.stat().st_size > 1000


def test_commands_that_start_others_know_the_algorithm(logs, tmp_path):
    zoo(
        *("benchmark", "--log-dir", logs, "--benchmark-dir", tmp_path / "bench", "-n", 200),
        *("--no-hub", "--num-threads", 1),
        cwd=tmp_path,
    )
    assert "softq" in (tmp_path / "benchmark.md").read_text()


def test_continue_training(logs, tmp_path):
    agent = logs / "softq" / "Pendulum-v1_1" / "Pendulum-v1.zip"
    output = zoo("train", "--algo", "softq", "--env", "Pendulum-v1", "-n", 20, "-f", tmp_path, "-i", agent, "--eval-freq", -1)
    assert "Loading pretrained agent" in output
    assert SoftQ.load(tmp_path / "softq" / "Pendulum-v1_1" / "Pendulum-v1.zip").n_value_particles == 3


def test_plot_train(logs):
    zoo("plot_train", "-a", "softq", "-e", "Pendulum-v1", "-f", logs)


@pytest.mark.parametrize("command", sorted({*COMMANDS} - {"benchmark"}))
def test_every_command_has_its_own_flags(command):
    output = zoo(command, "--help")
    assert "usage:" in output
    # those that look at finished runs take any name
    assert "softq" in output or command in ("all_plots", "plot_from_file", "plot_train")


def test_unknown_command():
    output = zoo("trian", code=1)
    assert "'trian' is not a command" in output
    assert all(command in output for command in COMMANDS)
    assert zoo("--help").startswith("commands: train, enjoy")


def test_a_discrete_environment_gets_the_discrete_agent(tmp_path):
    zoo("train", "--algo", "softq", "--env", "CartPole-v1", "-n", 120, "-f", tmp_path, "--eval-freq", -1)
    assert DiscreteSoftQ.load(tmp_path / "softq" / "CartPole-v1_1" / "CartPole-v1.zip").num_timesteps == 120
    output = zoo("enjoy", "--algo", "softq", "--env", "CartPole-v1", "-f", tmp_path, "--no-render", "-n", 500)
    assert "Mean reward: " in output  # 500 steps end an episode, however good the agent


@pytest.mark.parametrize(
    ("arguments", "is_ours"),
    [
        (["--algo", "softq"], True),
        (["--env", "a", "--algo=softq"], True),
        (["--alg", "softq"], True),
        (["--algo", "sac"], False),
        (["--env", "softq"], False),
        (["--env-kwargs", "algo:'softq'"], False),
        ([], False),
    ],
)
def test_configuration(arguments, is_ours):
    ours = ["--conf-file", str(HYPERPARAMS / "softq.yml")] if is_ours else []
    assert with_configuration(arguments) == [*ours, *arguments]


def test_configuration_of_the_user(tmp_path):
    """Named by an abbreviation."""
    (tmp_path / "my.yml").write_text("Pendulum-v1: {policy: MlpPolicy, n_timesteps: 60, gamma: 0.123}")
    output = zoo("train", "--algo", "softq", "--env", "Pendulum-v1", "-f", tmp_path, "--conf", tmp_path / "my.yml")
    assert "('gamma', 0.123)" in output
    assert "softq.yml" not in output


@pytest.mark.parametrize(
    ("arguments", "env_id"),
    [
        (["--algo", "softq", "--env", "a/b-v0"], "a/b-v0"),
        (["--env=Fetch", "--seed", "1"], "Fetch"),
        (["--env"], ""),
        ([], ""),
        (["--env-kwargs", "a:1"], ""),
    ],
)
def test_environment_that_arguments_name(arguments, env_id):
    assert environment_of(arguments) == env_id


@pytest.mark.parametrize(
    ("env_id", "package", "extra"),
    [
        ("dm_control/walker-walk-v0", "dm_control", "dm_control"),
        ("FetchReach-v4", "gymnasium_robotics", "robotics"),
        ("ALE/Pong-v5", "cv2", "atari"),
        ("PongNoFrameskip-v4", "cv2", "atari"),
    ],
)
def test_missing_packages_of_environments_are_named(monkeypatch, env_id, package, extra):
    monkeypatch.setattr(gym.envs.registration, "registry", {})
    monkeypatch.setattr(gym, "registry", {})
    # what Python does where a package is not installed
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{env_id} needs {package}: .*\[{extra}\]"):
        register_environment(env_id)


def test_environments_of_nobody_are_left_to_the_rl_zoo():
    register_environment("NoSuchEnvironment-v0")
    assert "NoSuchEnvironment-v0" not in gym.registry


def test_goals_of_a_robot_are_registered_when_they_are_named(tmp_path):
    output = zoo(
        "train", "--algo", "softq", "--env", "FetchReach-v4", "-n", 250, "-f", tmp_path, "--seed", 1, "--eval-freq", -1
    )
    assert "HerReplayBuffer" in output
    assert (tmp_path / "softq" / "FetchReach-v4_1" / "FetchReach-v4.zip").is_file()


# What an entry may be of beside MuJoCo, in small
STAND_INS = {
    "MlpPolicy": lambda: gym.make("Pendulum-v1"),
    "CnnPolicy": lambda: FakeImageEnv(36, 36, discrete=False),
    "MultiInputPolicy": lambda: BitFlippingEnv(n_bits=4, continuous=True),
}
DISCRETE_STAND_INS = {"MlpPolicy": lambda: gym.make("CartPole-v1"), "CnnPolicy": lambda: FakeImageEnv(36, 36)}
# Keys of an entry that are the RL Zoo's own, not arguments of the algorithm
OF_THE_ZOO = {"n_timesteps", "n_envs", "env_wrapper", "frame_stack", "noise_type", "noise_std"}


def test_games_of_atari_have_an_entry(tmp_path):
    output = zoo(
        *("train", "--algo", "softq", "--env", "ALE/Pong-v5", "-n", 40, "-f", tmp_path, "--eval-freq", -1),
        *("--hyperparams", "learning_starts:20", "buffer_size:100"),
    )
    assert "AtariWrapper" in output
    assert "Stacking 4 frames" in output
    assert (tmp_path / "softq" / "ALE-Pong-v5_1" / "ALE-Pong-v5.zip").is_file()


@pytest.mark.parametrize("file", ENTRIES)
def test_entries_are_of_known_environments_and_arguments(file):
    for env_id, entry in ENTRIES[file].items():
        if env_id not in ("default", "atari") and not env_id.startswith("dm_control"):
            register_environment(env_id)
            gym.spec(env_id)
        arguments = {k: v for k, v in entry.items() if k not in OF_THE_ZOO}
        for name in ("policy_kwargs", "replay_buffer_class", "replay_buffer_kwargs"):
            if isinstance(arguments.get(name), str):
                # as the RL Zoo does
                arguments[name] = eval(arguments[name], {"HerReplayBuffer": HerReplayBuffer})
        stand_ins = STAND_INS | DISCRETE_STAND_INS if env_id in ("CartPole-v1", "atari") else STAND_INS
        env = stand_ins[arguments["policy"]]()
        ZooSoftQ(env=env, **arguments | {"buffer_size": min(arguments.get("buffer_size", 1000), 1000)})


def test_the_original_recipe_is_that_of_the_package():
    for env_id, entry in ENTRIES["softq_original.yml"].items():
        arguments = {k: v for k, v in entry.items() if k not in ("n_timesteps", "policy", "ent_coef")}
        arguments["policy_kwargs"] = eval(arguments["policy_kwargs"])
        arguments["particle_options"] = ParticleOptions.of(arguments["particle_options"])
        assert arguments == SQL_2017, env_id


def test_sampler():
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = set()
    for _ in range(10):
        trial = study.ask()
        kwargs = sample_softq_params(trial, 1, 1, {})
        drawn.add((kwargs["learning_rate"], kwargs["policy_kwargs"]["batch_norm"]))
        # no target networks where the critics are normalised
        assert (kwargs["tau"] == 1.0) == trial.params["batch_norm"]
        model = SoftQ("MlpPolicy", "Pendulum-v1", learning_starts=4, device="cpu", **kwargs).learn(6)
        assert model.target_entropy == trial.params["target_entropy_per_dim"]
        # what a stored trial is converted to
        assert convert_softq_params(trial.params) == kwargs
    assert len(drawn) == 10
    assert {batch_norm for _, batch_norm in drawn} == {True, False}


def test_sampler_for_discrete_actions():
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(5):
        trial = study.ask()
        kwargs = sample_softq_params(trial, 0, 1, {})
        model = DiscreteSoftQ("MlpPolicy", "CartPole-v1", learning_starts=4, device="cpu", **kwargs).learn(6)
        assert model.target_entropy == trial.params["target_entropy"]
        assert convert_softq_params(trial.params) == kwargs


@pytest.mark.parametrize("n_actions", [0, 4])
def test_sampler_with_goals(n_actions):
    """As the RL Zoo's samplers of SAC and DQN."""
    study, drawn = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)), set()
    goals = {"using_her_replay_buffer": True, "her_kwargs": {"copy_info_dict": True}}
    env = BitFlippingEnv(n_bits=4, continuous=n_actions > 0)
    for _ in range(5):
        trial = study.ask()
        kwargs = sample_softq_params(trial, n_actions, 1, goals)
        her = kwargs["replay_buffer_kwargs"]
        drawn.add((her["n_sampled_goal"], her["goal_selection_strategy"]))
        small_buffer = dict(replay_buffer_class=HerReplayBuffer, buffer_size=100)
        model = ZooSoftQ("MultiInputPolicy", env, learning_starts=9, **small_buffer, **kwargs)
        assert model.learn(12).replay_buffer.n_sampled_goal == trial.params["n_sampled_goal"]
        del her["copy_info_dict"]
        assert convert_softq_params(trial.params) == kwargs
    assert len(drawn) > 2
    assert goals["her_kwargs"] == {"copy_info_dict": True}


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "CartPole-v1"])
def test_a_trial_with_nan_is_pruned(env_id, tmp_path):
    plugin = tmp_path / "broken.py"
    plugin.write_text(BROKEN_ENV)
    output = zoo(
        *("train", "--algo", "softq", "--env", f"Broken-{env_id}", "-n", 60, "-f", tmp_path, "-optimize", "--n-trials", 2),
        *("--gym-packages", "broken", "--n-evaluations", 1, "--eval-episodes", 1, "--no-optim-plots"),
        env={"PYTHONPATH": str(tmp_path)},
        # the RL Zoo ends with an error when there is no trial to recommend
        code=1,
    )
    assert output.count("of environment 0 is not finite at step 30") == 2
    assert output.count("Trial 0 pruned") == output.count("Trial 1 pruned") == 1


#: An environment that raises what the RL Zoo prunes a trial for
RAISING_ENV = """
import gymnasium as gym

errors = iter([AssertionError("mine"), ValueError("mine")])

class Raising(gym.Wrapper):
    steps = 0

    def step(self, action):
        self.steps += 1
        if self.steps == 30:
            raise next(errors)
        return self.env.step(action)

gym.register("Raising-v1", lambda: Raising(gym.make("Pendulum-v1")))
"""


def test_a_trial_whose_environment_raises_is_pruned(tmp_path):
    """As with SAC, for an AssertionError and a ValueError."""
    (tmp_path / "raising.py").write_text(RAISING_ENV)
    output = zoo(
        *("train", "--algo", "softq", "--env", "Raising-v1", "-n", 60, "-f", tmp_path, "-optimize", "--n-trials", 2),
        *("--gym-packages", "raising", "--n-evaluations", 1, "--eval-episodes", 1, "--no-optim-plots"),
        env={"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])},
        code=1,
    )
    for error in ("AssertionError", "ValueError"):
        assert f"Environment 0 failed at step 30: {error}: mine" in output
    assert output.count("Trial 0 pruned") == output.count("Trial 1 pruned") == 1


def test_search(tmp_path):
    storage = tmp_path / "study" / "journal.log"
    output = zoo(
        *("train", "--algo", "softq", "--env", "Pendulum-v1", "-n", 150, "-f", tmp_path, "-optimize", "--n-trials", 2),
        *("--n-evaluations", 1, "--eval-episodes", 1, "--storage", storage, "--study-name", "test", "--no-optim-plots"),
    )
    assert "Best trial" in output
    backend = optuna.storages.journal.JournalFileBackend(str(storage))
    study = optuna.load_study(study_name="test", storage=optuna.storages.JournalStorage(backend))
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 2
    # and training with what was found, by the first trial too
    for trial in study.trials:
        output = zoo(
            *("train", "--algo", "softq", "--env", "Pendulum-v1", "-n", 60, "-f", tmp_path, "--eval-freq", -1),
            *("--storage", storage, "--study-name", "test", "--trial-id", trial.number),
        )
        found = sample_softq_params(optuna.trial.FixedTrial(trial.params), 1, 1, {})
        assert all(str((name, value)) in output for name, value in found.items() if name != "policy_kwargs")


@pytest.mark.slow
@pytest.mark.parametrize(("file", "env_id"), [(file, env_id) for file, entries in ENTRIES.items() for env_id in entries])
def test_every_entry_trains(file, env_id, tmp_path):
    env_id = {"default": "Pendulum-v1", "atari": "ALE/Pong-v5"}.get(env_id, env_id)
    packages = ["--gym-packages", "gymnasium_robotics"] if env_id.startswith("PointMaze") else []
    for package, prefixes in {"gymnasium_robotics": ["PointMaze"], "Box2D": ["LunarLander", "Bipedal", "CarRacing"]}.items():
        if env_id.startswith(tuple(prefixes)):
            pytest.importorskip(package)
    steps = 300 if env_id.startswith("CarRacing") else 2000
    zoo(
        *("train", "--algo", "softq", "--env", env_id, "-n", steps, "-f", tmp_path, "--eval-freq", -1),
        *("-conf", HYPERPARAMS / file, *packages),
    )
    assert list(Path(tmp_path).glob("softq/*/*.zip"))
