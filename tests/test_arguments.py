"""A bad argument is refused when the agent is made, by a ValueError that names the argument and its value."""

import inspect
import re
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, StopTrainingOnMaxEpisodes
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import SimpleMultiObsEnv
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    VecCheckNan,
    VecExtractDictObs,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
)
from stable_baselines3.sac.policies import SACPolicy

from sb3_softq import SQL_2017, DiscreteSoftQ, ParticleOptions, SoftQ
from sb3_softq.checks import check_choice
from tests.conftest import small

NAN, INF = float("nan"), float("inf")


class OneStep(gym.Env):
    """One step per episode, with fixed observations and rewards."""

    def __init__(self, action_space=None, observation=0.0, reward=1.0):
        self.action_space = action_space or spaces.Box(-1, 1, (2,), dtype=np.float32)
        self.observation_space = spaces.Box(-np.inf, np.inf, (1,), dtype=np.float32)
        self.observation = np.array([observation], dtype=np.float32)
        self.reward = reward

    def reset(self, *, seed=None, options=None):
        return self.observation, {}

    def step(self, action):
        return self.observation, self.reward, True, False, {}


def make(env=None, algorithm=SoftQ, **kwargs):
    arguments: dict[str, Any] = {"learning_starts": 4, "batch_size": 4, "buffer_size": 50, "seed": None, "width": 4}
    return small(algorithm, env=env or OneStep(), **(arguments | kwargs))


def refused(name, value, **kwargs):
    """Making the agent fails, and the message says what was wrong, so that it can be put right without the source."""
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r} is not allowed: it must be ")) as excinfo:
        make(**{name: value}, **kwargs)
    return str(excinfo.value)


INTEGERS = {
    "buffer_size": 1,
    "batch_size": 1,
    "n_steps": 1,
    "target_update_interval": 1,
    "policy_delay": 1,
    "stats_window_size": 1,
    "n_value_particles": 1,
    "n_actor_particles": 1,
    "n_actor_states": 1,
    "n_density_particles": 0,
    "learning_starts": 0,
    "gradient_steps": -1,
}


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", ["too small", 1.5, 1e60, NAN, INF, "4", None, True, [4]])
def test_integers(name, value):
    value = INTEGERS[name] - 1 if value == "too small" else value
    assert f"an integer >= {INTEGERS[name]}" in refused(name, value)


@pytest.mark.parametrize("kind", [np.int64, float, np.float32])
@pytest.mark.parametrize("name", INTEGERS)
def test_smallest_integer_is_allowed(name, kind):
    """As a number of any type, as 1e4 is written where 10000 is meant."""
    kwargs = {"policy_kwargs": {"batch_norm": False}} if name == "batch_size" else {}
    assert make(**{name: kind(INTEGERS[name])}, **kwargs).learn(10).num_timesteps == 10


def test_batch_normalisation_needs_a_batch():
    assert "an integer >= 2" in refused("batch_size", 1)
    assert make(batch_size=2).learn(10).num_timesteps == 10


@pytest.mark.parametrize("name", ["tau", "gamma"])
@pytest.mark.parametrize("value", [-0.1, 1.1, NAN, INF, "0.5", None, True, [0.5]])
def test_fractions(name, value):
    assert "a finite number >= 0.0 and <= 1.0" in refused(name, value)


@pytest.mark.parametrize("name", ["tau", "gamma"])
@pytest.mark.parametrize("value", [0, 1, 0.0, 1.0, np.float32(0.5)])
def test_bounds_of_fractions_are_allowed(name, value):
    assert make(**{name: value}).learn(10)._n_updates > 0


@pytest.mark.parametrize("value", [0.0, -0.1, 1.1, NAN, INF, "auto", None, True])
def test_actor_tau(value):
    assert "a finite number > 0.0 and <= 1.0" in refused("actor_tau", value)


POSITIVE = ("learning_rate", "actor_learning_rate", "ent_coef_learning_rate")


@pytest.mark.parametrize("name", POSITIVE)
@pytest.mark.parametrize("value", [0, 0.0, -1e-3, NAN, INF, True, [1e-3], th.tensor(1e-3)])
def test_positive_numbers(name, value):
    assert "a finite number > 0.0" in refused(name, value)


@pytest.mark.parametrize("name", ["learning_rate", "ent_coef", "annealing"])
def test_none_is_no_number(name):
    assert "a finite number" in refused(name, None)


@pytest.mark.parametrize("name", ["learning_rate", "actor_learning_rate", "ent_coef_learning_rate"])
@pytest.mark.parametrize("value", ["1e-3", "auto", "lin_1e-3"])
def test_learning_rates_are_no_strings(name, value):
    assert "a finite number > 0.0" in refused(name, value)


@pytest.mark.parametrize("value", [0, 1e-9, -1e-3, 1e9, 1e-40, NAN, INF, True, [1e-3], th.tensor(1e-3)])
def test_temperatures_that_single_precision_can_divide_by(value):
    assert "a finite number >= 1e-08 and <= 100000000.0" in refused("ent_coef", value)


@pytest.mark.parametrize("name", [*POSITIVE, "ent_coef", "annealing", "target_entropy"])
@pytest.mark.parametrize("value", [1, np.float32(1.5), np.float64(1.5), np.int64(2)])
def test_any_kind_of_number_works(name, value):
    """Numbers come out of configuration files and random generators in all types."""
    kwargs = {"ent_coef": 0.5} if name == "annealing" else {}
    # no density in two dimensions has more than log 4
    value = -value if name == "target_entropy" else value
    assert make(**{name: value}, **kwargs).learn(10)._n_updates > 0


SCHEDULES = ("learning_rate", "actor_learning_rate", "ent_coef_learning_rate", "ent_coef", "annealing")


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("value", [-1.0, NAN, INF])
@pytest.mark.parametrize("progress_remaining", [1.0, 0.0])
def test_schedules_are_tried_at_both_ends(name, value, progress_remaining):
    def schedule(progress):
        return value if progress == progress_remaining else 1.0

    with pytest.raises(ValueError, match=re.escape(f"{name}({progress_remaining:g})={value!r} is not allowed")):
        make(**{name: schedule})


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("schedule", [lambda _: None, lambda _: "a", lambda: 1.0, lambda _: [1.0, 2.0]])
def test_schedules_return_numbers(name, schedule):
    with pytest.raises(ValueError, match=f"{name}.* is not allowed"):
        make(**{name: schedule})


@pytest.mark.parametrize("name", SCHEDULES[:3])
def test_learning_rates_may_end_at_zero(name):
    assert make(**{name: LinearSchedule(1e-3, 0.0, 1.0)}).learn(20)._n_updates > 0


def test_temperature_may_not_end_at_zero():
    """It divides: hours of training would end in nan with the last update."""
    with pytest.raises(ValueError, match=re.escape("ent_coef(0)=0.0 is not allowed: it must be a finite number >= 1e-08")):
        make(ent_coef=LinearSchedule(0.1, 0.0, 1.0))


@pytest.mark.parametrize(
    "value", ["Auto", "auto_", "auto_0", "auto_-1", "auto_x", "auto_nan", "auto_inf", "auto_1e-20", "", "autox", "auto0.1"]
)
def test_ent_coef_strings(value):
    message = refused("ent_coef", value)
    assert "'auto_X' with an initial value X > 0" in message


@pytest.mark.parametrize(("value", "expected"), [("auto", 1.0), ("auto_0.1", 0.1), ("auto_1e-2", 0.01), ("auto_5", 5.0)])
def test_initial_temperature(value, expected):
    assert make(ent_coef=value).ent_coef_tensor.item() == pytest.approx(expected)


def test_numbers_as_strings_are_numbers():
    model = make(ent_coef="0.1", target_entropy="-2")
    assert (model.ent_coef, model.target_entropy) == (0.1, -2.0)


@pytest.mark.parametrize("value", ["Auto", "auto_1", -20.0, NAN, INF, None, True, [-1.0]])
def test_target_entropy(value):
    message = refused("target_entropy", value)
    assert ("'auto'" if isinstance(value, str) else "a finite number") in message


@pytest.mark.parametrize("value", [0.5, 0, -1.0, NAN, INF, True])
def test_annealing_is_at_least_one(value):
    assert "a finite number >= 1.0" in refused("annealing", value)


@pytest.mark.parametrize(
    ("name", "value", "hint"),
    [
        ("proposal", "uniforn", "'uniform'"),
        ("proposal", None, "one of 'policy', 'uniform'"),
        ("kernel", "RBF", "one of 'rbf', 'delta'"),
        ("kernel", "rbff", "did you mean 'rbf'?"),
        ("kernel", 1, "one of"),
        ("repulsion", "densities", "did you mean 'density'?"),
        ("repulsion", True, "one of 'density', 'kernel'"),
        ("annealing", "Auto", "one of 'auto'"),
    ],
)
def test_names(name, value, hint):
    assert hint in refused(name, value)


@pytest.mark.parametrize("value", [0, 0.0, -0.5, 1.5, NAN, "0.5", True])
def test_kernel_update_ratio(value):
    assert "a finite number > 0.0 and <= 1.0" in refused("kernel_update_ratio", value)


@pytest.mark.parametrize(
    "kwargs",
    [{"kernel_update_ratio": 1.0}, {"kernel": "delta"}],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_kernel_update_ratio_splits_particles_of_a_kernel(kwargs):
    with pytest.raises(ValueError, match=r"kernel_update_ratio=(0\.5|1\.0) is not allowed: it must be < 1, and splits"):
        make(**{"kernel_update_ratio": 0.5, **kwargs})


def test_one_particle_cannot_be_split():
    with pytest.raises(ValueError, match=r"n_actor_particles=1 is not allowed with kernel_update_ratio=0\.5.*integer >= 2"):
        make(kernel_update_ratio=0.5, n_actor_particles=1)
    make(kernel_update_ratio=0.5, n_actor_particles=2)


@pytest.mark.parametrize("value", [3, "kernel", ["kernel"], True])
def test_particle_options_are_a_dict(value):
    with pytest.raises(ValueError, match=re.escape(f"particle_options={value!r} is not allowed")):
        make(particle_options=value)


def test_unknown_particle_options():
    with pytest.raises(ValueError, match=r"key of particle_options='kernal' is not allowed.*did you mean 'kernel'"):
        make(particle_options={"kernal": "rbf"})


def test_options_are_those_of_the_dataclass():
    options, the_same = ParticleOptions(kernel="delta", n_actor_states=np.int64(3)), {"kernel": "delta", "n_actor_states": 3.0}
    assert make(particle_options=options).particle_options == make(particle_options=the_same).particle_options == options
    with pytest.raises(AttributeError):
        options.kernel = "rbf"


def test_sql_2017():
    """All arguments of the recipe are accepted, and it trains."""
    model = make(**SQL_2017, ent_coef=0.1)
    assert model.particle_options.repulsion == "kernel"
    assert model.learn(20)._n_updates > 0


def test_no_repulsion_without_a_kernel_or_a_density():
    with pytest.raises(ValueError, match=r"repulsion='kernel' is not allowed with kernel='delta'.*must be 'density'"):
        make(kernel="delta", repulsion="kernel")
    with pytest.raises(ValueError, match=r"repulsion='density' is not allowed with smoothing='none'.*must be 'kernel'"):
        make(policy_kwargs={"smoothing": "none"})


@pytest.mark.parametrize(
    "value", [0, -1, 1.5, "4", None, True, (), (1,), [1, "step"], (1, "steps"), (0, "episode"), (1.5, "step"), (1, "step", 2)]
)
def test_train_freq(value):
    refused("train_freq", value)


def test_no_episodes_with_several_environments():
    with pytest.raises(ValueError, match=r"train_freq=\(1, 'episode'\) is not allowed.*n_envs=2"):
        make(make_vec_env(OneStep, 2), train_freq=(1, "episode"))


@pytest.mark.parametrize("value", [-1, 2**32, 0.5, "0", NAN])
def test_seed(value):
    refused("seed", value)


@pytest.mark.parametrize("value", [None, 0, 2**32 - 1, np.int64(3)])
def test_seed_is_any_integer_of_32_bits(value):
    assert make(seed=value).learn(10)._n_updates > 0


@pytest.mark.parametrize("value", ["net_arch", [], 3])
def test_policy_kwargs_is_a_dict(value):
    refused("policy_kwargs", value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_critics", 0),
        ("n_critics", 1.5),
        ("n_critics", None),
        ("log_std_init", NAN),
        ("log_std_init", "small"),
        ("log_std_init", None),
        ("head_arch", 64),
        ("head_arch", [0]),
        ("net_arch", [64, "64"]),
        ("net_arch", {"pi": [4]}),
        ("net_arch", {"pi": [4], "qf": [-1]}),
        ("smoothing", "Learned"),
        ("smoothing", None),
        ("batch_norm", 1),
        ("batch_norm", None),
        ("optimizer_kwargs", "eps=1e-3"),
        ("features_extractor_kwargs", 3),
    ],
)
def test_policy_arguments(name, value):
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r} is not")):
        make(policy_kwargs={name: value})


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(np.array([-1, 0], dtype=np.float32), np.array([1, 0], dtype=np.float32)),
        spaces.Box(-1, 1, (0,), dtype=np.float32),
        spaces.Box(-2, 2, (1,), dtype=np.int32),
    ],
    ids=["no_width", "no_dimension", "integers"],
)
def test_action_space(space):
    with pytest.raises(ValueError, match=r"action_space=Box.* is not allowed: it must be a Box of floats with finite bounds"):
        make(OneStep(space))


def test_unknown_names_of_anything():
    """Of a choice that resembles nothing, no guess is made."""
    with pytest.raises(ValueError, match=r"'policy'$"):
        check_choice("proposal", "xyz", ("policy",))


@pytest.mark.parametrize("value", [1, 1e-3, LinearSchedule(1e-3, 1e-4, 0.5), lambda p: np.float32(1e-3 * (p + 1))])
def test_learning_rates_are_numbers_or_functions_of_any_kind(value):
    model = make(learning_rate=value)
    assert model.lr_schedule(1.0) == pytest.approx(value(1.0) if callable(value) else value)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize(("name", "what", "step"), [("reward", "reward", 2), ("observation", "first observation", 0)])
def test_data_that_is_no_number_stops_training(name, what, step, value):
    model = make(make_vec_env(lambda: OneStep(**{name: value}), 2), learning_starts=0)
    with pytest.raises(
        ValueError, match=rf"{what} of environment 0 is not finite at step {step}: .*{value}.*Training stopped"
    ):
        model.learn(20)
    # and leaves no trace
    assert model.replay_buffer.size() == 0
    assert all(th.isfinite(tensor).all() for tensor in model.policy.state_dict().values())


@pytest.mark.parametrize(("terminated", "what"), [(True, "last observation"), (False, "observation")])
@pytest.mark.parametrize("n_envs", [1, 2])
def test_observations_of_steps_are_checked(n_envs, terminated, what):
    """At the end of an episode SB3 hands on the first observation of the next one, and stores the last one of this."""

    class Breaks(OneStep):
        def step(self, action):
            return np.array([NAN], dtype=np.float32), self.reward, terminated, False, {}

    model = make(make_vec_env(Breaks, n_envs), learning_starts=0)
    with pytest.raises(ValueError, match=rf"^{what} of environment 0 is not finite at step {n_envs}: \[nan\]"):
        model.learn(20)
    assert model.replay_buffer.size() == 0


def test_data_is_checked_before_it_is_normalised():
    env = VecNormalize(make_vec_env(lambda: OneStep(reward=INF)))
    with pytest.raises(ValueError, match="reward of environment 0 is not finite"):
        make(env).learn(20)


@pytest.mark.parametrize("value", ["n_critic", "use_sde", "nonsense"])
def test_policy_kwargs_are_known(value):
    with pytest.raises(ValueError, match=f"key of policy_kwargs='{value}' is not allowed: it must be one of .*'n_critics'"):
        make(policy_kwargs={value: 1})


def test_diverged_training_stops():
    with pytest.raises(ValueError, match="Lower learning rates"):
        make(learning_rate=1e30).learn(20)


@pytest.mark.parametrize("name", ["learning_rate", "actor_learning_rate", "ent_coef_learning_rate"])
def test_learning_rates_that_overflow(name):
    refused(name, 3e37)


WRONG_TYPES: dict[str, list[Any]] = {
    "action_noise": [0.1, "normal"],
    "replay_buffer_class": ["HerReplayBuffer", dict, 3],
    "replay_buffer_kwargs": [3, "n_steps"],
    "tensorboard_log": [3, True],
    "verbose": ["1", -1, 1.5, None],
    "device": ["gpux", 3.5, "cuda:99", None],
    "bfloat16": [1, None, "yes"],
    "compile": [0, "auto"],
    "optimize_memory_usage": [None, 1],
    "policy_kwargs": [3, "net_arch"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG_TYPES.items() for value in values])
def test_wrong_types(name, value):
    if name == "device" and value == "cuda:99" and not th.cuda.is_available():
        # SB3's rule for every CUDA device where there is none
        assert make(device=value).device == th.device("cpu")
    else:
        refused(name, value)


@pytest.mark.parametrize("env", [3, OneStep, ["Pendulum-v1"]])
def test_environments(env):
    with pytest.raises(ValueError, match=r"env=.* is not allowed: it must be an environment, its id, or None"):
        SoftQ("MlpPolicy", env)


def test_without_an_environment():
    with pytest.raises(ValueError, match="env=None is not allowed: it must be an environment or its id"):
        SoftQ("MlpPolicy", None)


@pytest.mark.parametrize("policy", [3, dict, SACPolicy])
def test_policy_classes(policy):
    with pytest.raises(ValueError, match=r"policy=.* is not allowed: it must be SoftQPolicy or a class derived from it"):
        SoftQ(policy, OneStep())


@pytest.mark.parametrize(
    "space", [spaces.Tuple([spaces.Discrete(2)]), spaces.Text(3), spaces.Dict(a=spaces.Dict(b=spaces.Discrete(2)))]
)
def test_observation_spaces(space):
    env = OneStep()
    env.observation_space = space
    with pytest.raises(ValueError, match=r"observation_space=.* is not allowed: it must be a Box, Discrete"):
        SoftQ("MultiInputPolicy", env)


@pytest.mark.parametrize(
    ("env", "kwargs", "name"),
    [
        (OneStep(), {"n_steps": 2, "optimize_memory_usage": True}, "optimize_memory_usage"),
        (SimpleMultiObsEnv(discrete_actions=False), {"optimize_memory_usage": True}, "optimize_memory_usage"),
        (SimpleMultiObsEnv(discrete_actions=False), {"n_steps": 2}, "n_steps"),
        (SimpleMultiObsEnv(discrete_actions=False), {"replay_buffer_class": ReplayBuffer}, "replay_buffer_class"),
        (OneStep(), {"replay_buffer_class": HerReplayBuffer}, "replay_buffer_class"),
        (OneStep(), {"n_steps": 2, "replay_buffer_class": ReplayBuffer}, "n_steps"),
    ],
)
def test_replay_buffers_that_sb3_does_not_have(env, kwargs, name):
    policy = "MultiInputPolicy" if isinstance(env.observation_space, spaces.Dict) else "MlpPolicy"
    with pytest.raises(ValueError, match=f"{name}=.* is not allowed"):
        SoftQ(policy, env, **kwargs)


def test_parameters_are_finite_after_the_last_update():
    model = make()

    class Break(BaseCallback):
        def _on_step(self):
            with th.no_grad():
                model.critic.qf1[1].weight[0, 0] = INF
            return True

    # too late for a loss to show it
    with pytest.raises(ValueError, match=r"parameter critic.qf1.1.weight is not finite at step 3: training stopped"):
        model.learn(3, Break())


numbers = st.one_of(
    st.floats(),
    st.floats(0, 3),
    st.integers(-3, 9),
    st.booleans(),
    st.none(),
    st.text(max_size=3),
    st.sampled_from(["auto", "auto_0.1", "auto_-1", "auto_1e400", "median", np.float32(0.5), np.int64(2), np.bool_(True)]),
)
schedules = st.one_of(
    numbers, numbers.map(lambda x: lambda _: x), st.builds(LinearSchedule, *[st.floats(-1, 3)] * 2, st.just(1.0))
)
# sizes stay small: a large one is a large computation, not an error
sizes = st.one_of(st.integers(-3, 9), st.floats(-3, 9), st.booleans(), st.none(), st.text(max_size=3), st.just(np.int64(2)))


def names(*valid):
    return st.one_of(st.sampled_from(valid), st.text(max_size=4), st.none(), st.integers(0, 2))


ARGUMENTS = {
    "learning_rate": schedules,
    "actor_learning_rate": schedules,
    "ent_coef_learning_rate": schedules,
    "ent_coef": schedules,
    "annealing": schedules,
    "target_entropy": numbers,
    "tau": numbers,
    "actor_tau": numbers,
    "gamma": numbers,
    "kernel_update_ratio": numbers,
    **dict.fromkeys(INTEGERS, sizes),
    "train_freq": st.one_of(sizes, st.tuples(sizes, names("step", "episode")), st.lists(sizes, max_size=2)),
    "seed": st.one_of(sizes, st.integers()),
    "proposal": names("policy", "uniform"),
    "kernel": names("rbf", "delta"),
    "repulsion": names("density", "kernel"),
    "policy_kwargs": st.one_of(
        st.none(),
        st.integers(),
        st.fixed_dictionaries(
            {"net_arch": st.just([4])},
            optional={
                "smoothing": names("learned", "local", "none"),
                "n_critics": sizes,
                "log_std_init": numbers,
                "head_arch": st.lists(sizes),
            },
        ),
    ),
}


def some_of(arguments):
    """One argument at a time, so that not every example is refused for the sake of another, or several."""
    one = [st.fixed_dictionaries({name: values}) for name, values in arguments.items()]
    return st.one_of(*one, st.fixed_dictionaries({}, optional=arguments))


def works_or_is_refused(make, kwargs, *more_names):
    message = ""
    try:
        model = make(**kwargs)
    except ValueError as error:
        message = str(error)
    if message:
        # it names one of the arguments given
        assert any(name in message for name in (*kwargs, *more_names))
        return
    assert np.isfinite(model.predict(np.zeros(1, dtype=np.float32), deterministic=True)[0]).all()
    try:
        model.learn(12)
    except ValueError as error:
        message = str(error)
    # extreme values, which no check can tell from daring ones, stop with a word of advice
    assert "training stopped" in message if message else model.num_timesteps >= 12


@settings(deadline=None, max_examples=150)
@given(some_of(ARGUMENTS))
def test_a_working_agent_or_a_value_error(kwargs):
    works_or_is_refused(make, kwargs, "n_critics", "log_std_init", "smoothing", "head_arch")


DISCRETE_ARGUMENTS = {
    name: values
    for name, values in ARGUMENTS.items()
    if name in inspect.signature(DiscreteSoftQ).parameters and name != "policy_kwargs"
}


class OneStepDiscrete(OneStep):
    def __init__(self):
        super().__init__(spaces.Discrete(3))


@settings(deadline=None, max_examples=60)
@given(some_of(DISCRETE_ARGUMENTS))
def test_a_working_discrete_agent_or_a_value_error(kwargs):
    works_or_is_refused(partial(make, OneStepDiscrete(), DiscreteSoftQ), kwargs)


finite = st.floats(-100, 100, width=32)
bounds = st.one_of(finite, st.sampled_from([NAN, INF, -INF, 3e38]))


@st.composite
def boxes(draw, bounds=bounds):
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    low, high = (np.array([draw(bounds) for _ in range(int(np.prod(shape)))]).reshape(shape) for _ in range(2))
    swapped = draw(st.booleans())
    if not swapped:
        low, high = np.minimum(low, high), np.maximum(low, high)
    return low, high, draw(st.sampled_from([np.float32, np.float64]))


class AnySpaces(gym.Env):
    def __init__(self, observation_space, action_space):
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed=None, options=None):
        return self.observation_space.sample(), {}

    def step(self, action):
        assert action.shape == self.action_space.shape
        assert self.action_space.contains(action)
        return self.observation_space.sample(), 0.0, False, False, {}


observation_spaces = st.one_of(
    st.tuples(st.lists(st.integers(1, 4), min_size=1, max_size=2)).map(lambda x: spaces.Box(-1.0, 1.0, tuple(x[0]))),
    st.integers(1, 5).map(spaces.Discrete),
    st.lists(st.integers(1, 3), min_size=1, max_size=3).map(spaces.MultiDiscrete),
    st.integers(1, 4).map(spaces.MultiBinary),
    st.just(spaces.Dict(a=spaces.Box(-1.0, 1.0, (2,)), b=spaces.Discrete(3))),
    st.just(spaces.Tuple([spaces.Discrete(2)])),
)


@settings(deadline=None, max_examples=60)
@given(boxes(), observation_spaces)
def test_a_space_works_or_is_refused(box, observation_space):
    low, high, dtype = box
    try:
        action_space = spaces.Box(low, high, dtype=dtype)
    except (ValueError, AssertionError):
        # gymnasium itself has no such space
        return
    policy = "MultiInputPolicy" if isinstance(observation_space, spaces.Dict) else "MlpPolicy"
    arguments = dict(learning_starts=4, batch_size=4, buffer_size=50, device="cpu", policy_kwargs=dict(net_arch=[4]))
    message = ""
    try:
        model = SoftQ(policy, AnySpaces(observation_space, action_space), **arguments)
    except ValueError as error:
        message = str(error)
    if message:
        assert "_space=" in message
        return
    model.learn(8)
    obs = observation_space.sample()
    assert action_space.contains(model.predict(obs, deterministic=True)[0])
    assert model.sample_actions(obs, 3).shape == (3, *action_space.shape)


WIDE: list[tuple[Any, Any, type]] = [
    (-2e38, 2e38, np.float32),
    (-1e308, 1e308, np.float64),
    (-6e4, 6e4, np.float16),
    ([-1.0, -3e38], [1.0, 1e38], np.float32),
]


@pytest.mark.parametrize(("low", "high", "dtype"), WIDE)
def test_boxes_whose_width_overflows(low, high, dtype):
    space = spaces.Box(np.array(low, dtype), np.array(high, dtype), dtype=dtype)
    with np.errstate(over="ignore"), pytest.raises(ValueError, match=r"action_space=Box.* is not allowed.*high - low finite"):
        make(OneStep(space))


@pytest.mark.parametrize(("high", "dtype"), [(1e38, np.float32), (1e300, np.float64), (3e4, np.float16)])
def test_boxes_whose_width_does_not(high, dtype):
    space = spaces.Box(-high, high, (1,), dtype)
    with np.errstate(over="ignore"):
        action, _ = make(OneStep(space)).learn(10).predict(np.zeros(1, dtype=np.float32))
    assert space.contains(action.astype(dtype))


@pytest.mark.parametrize("n_dims", [1, 3])
@pytest.mark.parametrize("smoothing", ["learned", "local"])
def test_entropies_that_no_sampler_has(n_dims, smoothing):
    """The number that is named is allowed, and the policy of the narrowest component in the middle of the box has it."""
    env = OneStep(spaces.Box(-1, 1, (n_dims,), dtype=np.float32))
    kwargs: dict[str, Any] = {"env": env, "policy_kwargs": {"net_arch": [4], "smoothing": smoothing}}
    message = refused("target_entropy", -20.0, **kwargs)
    match = re.search(r"a finite number >= (\S+) and <= (\S+)", message)
    assert match is not None
    low, high = map(float, match.groups())
    assert high == pytest.approx(n_dims * np.log(2.0))
    log_std = -5.0 if smoothing == "learned" else np.log(0.03)
    normal = th.distributions.Normal(0.0, float(np.exp(log_std)))
    assert low == pytest.approx(n_dims * normal.entropy().item(), abs=2e-3)
    for value in (low, high):
        assert make(target_entropy=value, **kwargs).target_entropy == value


@pytest.mark.parametrize("algorithm", [SoftQ, DiscreteSoftQ])
@pytest.mark.parametrize("extreme", ["lowest", "highest"])
@pytest.mark.parametrize("learning_rate", [3.0, 1e20])
def test_the_temperature_stays_where_single_precision_can_divide_by_it(algorithm, extreme, learning_rate):
    """Towards an entropy that no policy reaches it falls or rises for ever: both ends of what is allowed, at any speed."""
    bounds = {SoftQ: (-7.162, 2 * np.log(2.0)), DiscreteSoftQ: (0.0, np.log(3.0))}[algorithm]
    target = bounds[extreme == "highest"]
    env = OneStep() if algorithm is SoftQ else OneStepDiscrete()
    model = make(env, algorithm, target_entropy=target, ent_coef_learning_rate=learning_rate).learn(60)
    assert 0.9e-8 < model.ent_coef_tensor.item() < 1.1e8
    assert all(th.isfinite(tensor).all() for tensor in model.policy.state_dict().values())
    assert np.isfinite(model.soft_value(np.zeros((1, 1), dtype=np.float32))).all()


BOX3 = spaces.Box(-1.0, 1.0, (3,), dtype=np.float32)
IMAGE = spaces.Box(0, 255, (36, 36, 1), dtype=np.uint8)
WRAPPED = {
    "frames stacked over normalised ones": (BOX3, lambda env: VecFrameStack(VecNormalize(env), 2)),
    "and with rewards alone": (BOX3, lambda env: VecFrameStack(VecNormalize(env, norm_obs=False), 2)),
    "and with something between": (BOX3, lambda env: VecFrameStack(VecMonitor(VecNormalize(env)), 2)),
    "a key of normalised ones": (
        spaces.Dict(a=BOX3, b=BOX3),
        lambda env: VecExtractDictObs(VecNormalize(env), "a"),
    ),
    "images that SB3 transposes": (IMAGE, lambda env: VecNormalize(env, norm_obs=False)),
    "images among others": (spaces.Dict(a=BOX3, b=IMAGE), lambda env: VecNormalize(env, norm_obs_keys=["a"])),
    "numbers": (spaces.Discrete(3), lambda env: VecNormalize(env, norm_obs=False)),
}


def policy_for(space):
    return "MultiInputPolicy" if isinstance(space, spaces.Dict) else "CnnPolicy" if space is IMAGE else "MlpPolicy"


@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.parametrize("algorithm", [SoftQ, DiscreteSoftQ])
def test_wrappers_that_do_not_fit(name, algorithm):
    space, wrap = WRAPPED[name]
    action_space = spaces.Box(-1.0, 1.0, (1,)) if algorithm is SoftQ else spaces.Discrete(2)
    env = wrap(DummyVecEnv([lambda: AnySpaces(space, action_space)]))
    with pytest.raises(ValueError, match=r"env=.* is not allowed: it must not have VecNormalize"):
        algorithm(policy_for(space), env, device="cpu")


@pytest.mark.parametrize("name", ["frames stacked over normalised ones", "numbers"])
def test_wrappers_that_come_later_are_refused_too(tmp_path, name):
    space, wrap = WRAPPED[name]
    action_space = spaces.Box(-1.0, 1.0, (1,))
    good = DummyVecEnv([lambda: AnySpaces(space, action_space)])
    model = make(VecFrameStack(good, 2) if isinstance(space, spaces.Box) else good)
    bad = wrap(DummyVecEnv([lambda: AnySpaces(space, action_space)]))
    with pytest.raises(ValueError, match="must not have VecNormalize"):
        model.set_env(bad)
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match="must not have VecNormalize"):
        SoftQ.load(tmp_path / "model", env=bad)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda env: VecNormalize(VecFrameStack(env, 2)),
        lambda env: VecMonitor(VecNormalize(env)),
        lambda env: VecCheckNan(VecMonitor(VecNormalize(VecFrameStack(env, 3)))),
    ],
)
def test_wrappers_that_fit(wrap):
    env = wrap(DummyVecEnv([lambda: AnySpaces(BOX3, spaces.Box(-1.0, 1.0, (1,)))]))
    assert make(env).learn(12)._n_updates > 0


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(-1.0, 1.0, ()),
        spaces.Box(-1.0, 1.0, (0,)),
        spaces.Box(-1.0, 1.0, (2, 0)),
        spaces.Dict(a=spaces.Box(-1.0, 1.0, ()), b=BOX3),
        spaces.Dict(a=BOX3, b=spaces.Box(-1.0, 1.0, (0,))),
        spaces.Dict({}),
        spaces.Discrete(3, start=1),
        spaces.Dict(a=spaces.Discrete(3, start=-1)),
        spaces.MultiDiscrete(np.array([[2, 3], [2, 2]])),
        spaces.MultiDiscrete([2, 3], start=[1, 0]),
    ],
)
@pytest.mark.parametrize("algorithm", [SoftQ, DiscreteSoftQ])
def test_observations_that_no_network_takes(space, algorithm):
    action_space = spaces.Box(-1.0, 1.0, (1,)) if algorithm is SoftQ else spaces.Discrete(2)
    with pytest.raises(ValueError, match=r"(?s)observation_space=.* is not allowed: it must be"):
        algorithm(policy_for(space), AnySpaces(space, action_space))


@pytest.mark.parametrize(
    ("policy", "space"),
    [
        ("CnnPolicy", BOX3),
        ("CnnPolicy", spaces.Box(0, 255, (8, 8, 1), dtype=np.uint8)),
        ("MultiInputPolicy", BOX3),
        ("MlpPolicy", spaces.Dict(a=BOX3)),
    ],
)
@pytest.mark.parametrize("algorithm", [SoftQ, DiscreteSoftQ])
def test_policies_that_do_not_fit_the_observations(policy, space, algorithm):
    action_space = spaces.Box(-1.0, 1.0, (1,)) if algorithm is SoftQ else spaces.Discrete(2)
    with pytest.raises(ValueError, match=policy):
        algorithm(policy, AnySpaces(space, action_space))


@pytest.mark.parametrize("total_timesteps", [INF, np.inf, 1e9])
@pytest.mark.parametrize("algorithm", [SoftQ, DiscreteSoftQ])
def test_until_a_callback_stops(total_timesteps, algorithm):
    model = make(OneStep() if algorithm is SoftQ else OneStepDiscrete(), algorithm)
    model.learn(total_timesteps, StopTrainingOnMaxEpisodes(15))
    assert model.num_timesteps == 15
    assert model._current_progress_remaining > 0.99


@pytest.mark.parametrize("value", [NAN, -1, "100", None, -INF])
def test_total_timesteps(value):
    with pytest.raises(ValueError, match=re.escape(f"total_timesteps={value!r} is not allowed")):
        make().learn(value)


@pytest.mark.parametrize("algorithm", [SoftQ, DiscreteSoftQ])
def test_no_updates_are_no_updates(algorithm):
    model = make(OneStep() if algorithm is SoftQ else OneStepDiscrete(), algorithm).learn(20)
    before = {name: tensor.clone() for name, tensor in model.policy.state_dict().items()}
    n_updates = model._n_updates
    model.train(0)
    assert model._n_updates == n_updates
    assert all(th.equal(tensor, before[name]) for name, tensor in model.policy.state_dict().items())


@pytest.mark.parametrize("algorithm", [SoftQ, DiscreteSoftQ])
@pytest.mark.parametrize(("own", "other"), [("auto", 0.2), (0.2, "auto"), (lambda progress: 0.1, "auto_0.5")])
def test_parameters_of_another_kind_of_temperature(tmp_path, algorithm, own, other):
    def agent(ent_coef):
        return make(OneStep() if algorithm is SoftQ else OneStepDiscrete(), algorithm, ent_coef=ent_coef)

    model, parameters = agent(own), agent(other).get_parameters()
    kinds = ("fixed", "learned") if own == "auto" else ("learned", "fixed")
    match = f"an agent with a {kinds[0]} temperature are not allowed: they must come from one with a {kinds[1]} temperature"
    with pytest.raises(ValueError, match=match):
        model.set_parameters(parameters)
    agent(other).save(tmp_path / "model")
    with pytest.raises(ValueError, match=match):
        model.set_parameters(tmp_path / "model.zip")


@pytest.mark.parametrize("kwargs", [{"verbose": True}, {"verbose": False}, {"verbose": 7}, {"learning_starts": 1e1}])
@pytest.mark.parametrize("algorithm", [SoftQ, DiscreteSoftQ])
def test_what_sac_takes(algorithm, kwargs):
    assert make(OneStep() if algorithm is SoftQ else OneStepDiscrete(), algorithm, **kwargs).learn(20)._n_updates > 0


@pytest.mark.parametrize("value", [2.0, np.int64(2), (2.0, "step"), (np.int32(2), "step")])
def test_train_freq_of_any_kind_of_number(value):
    assert make(train_freq=value).learn(20)._n_updates > 0
