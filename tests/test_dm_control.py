"""DeepMind control in the RL Zoo."""

import gymnasium as gym
import numpy as np
import pytest
import yaml

from sb3_softq import SoftQ
from sb3_softq.zoo import HYPERPARAMS
from sb3_softq.zoo.environments import register_environment
from tests.test_zoo import zoo

ENTRIES = yaml.safe_load((HYPERPARAMS / "softq.yml").read_text())
TASKS = [env_id for env_id in ENTRIES if env_id.startswith("dm_control/")]
# Of the page of the zoo
NAMED = (
    "cheetah-run",
    "walker-walk",
    "walker-run",
    "hopper-hop",
    "finger-spin",
    "quadruped-run",
    "reacher-hard",
    "humanoid-run",
)


def make(env_id):
    register_environment(env_id)
    return gym.wrappers.FlattenObservation(gym.make(env_id))


# the others take minutes
MARKED = [pytest.param(f"dm_control/{task}-v0") for task in NAMED]
MARKED += [pytest.param(env_id, marks=pytest.mark.slow) for env_id in TASKS if (env_id,) not in [x.values for x in MARKED]]


@pytest.mark.parametrize("env_id", MARKED)
def test_every_entry_trains(env_id):
    env = make(env_id)
    model = SoftQ("MlpPolicy", env, learning_starts=20, seed=0, device="cpu").learn(30)
    assert ENTRIES[env_id]["env_wrapper"] == "gymnasium.wrappers.FlattenObservation"
    assert model.action_space.contains(model.predict(env.reset(seed=0)[0])[0])


def test_the_tasks_of_the_readme_are_there():
    assert {f"dm_control/{task}-v0" for task in NAMED} <= set(TASKS)


def test_episodes_end_by_their_time_limit_and_with_another_start_for_another_seed():
    env = make("dm_control/cheetah-run-v0")
    starts = [env.reset(seed=seed)[0] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(starts[0], starts[1])
    assert not np.array_equal(starts[0], starts[2])
    for step in range(1, 1001):
        _, _, terminated, truncated, _ = env.step(env.action_space.sample())
        # a limit is no end of the task: the critics look beyond it
        assert (terminated, truncated) == (False, step == 1000)


def test_the_command_of_the_readme_trains_and_watches(tmp_path):
    arguments = ("--algo", "softq", "--env", "dm_control/walker-walk-v0", "-f", tmp_path, "--seed", 1)
    zoo("train", *arguments, "-n", 1100, "--eval-freq", 1000, "--eval-episodes", 1, "-params", "learning_starts:1000")
    assert (tmp_path / "softq" / "dm_control-walker-walk-v0_1" / "best_model.zip").is_file()
    output = zoo("enjoy", *arguments, "-n", 1000, "--no-render")
    assert "Mean reward" in output
