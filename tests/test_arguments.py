"""A bad argument is refused when the agent is made, by a ValueError that names the argument and its value."""

import inspect
import itertools
import re
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import StopTrainingOnMaxEpisodes
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import SimpleMultiObsEnv
from stable_baselines3.common.noise import ActionNoise, NormalActionNoise, OrnsteinUhlenbeckActionNoise, VectorizedActionNoise
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv
from stable_baselines3.sac.policies import SACPolicy

from sb3_softq import DiscreteSoftQ, SoftQ
from sb3_softq.checks import check_choice
from sb3_softq.composition import compose
from sb3_softq.data import from_agent
from tests.conftest import OneStep, OneStepDiscrete, refused, tiny

NAN, INF = float("nan"), float("inf")

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
    if value is None and name == "n_density_particles":
        tiny(n_density_particles=None)
        return
    value = INTEGERS[name] - 1 if value == "too small" else value
    assert f"an integer >= {INTEGERS[name]}" in refused(name, value)


@pytest.mark.parametrize("kind", [np.int64, float, np.float32])
@pytest.mark.parametrize("name", INTEGERS)
def test_smallest_integer_is_allowed(name, kind):
    """As a number of any type, as 1e4 is written where 10000 is meant."""
    # what needs more of them
    policy_kwargs = {"batch_size": {"batch_norm": False}, "n_actor_particles": {"n_experts": 1}}.get(name, {})
    assert tiny(**{name: kind(INTEGERS[name])}, policy_kwargs=policy_kwargs).learn(10).num_timesteps == 10


def test_batch_normalisation_needs_a_batch():
    assert "an integer >= 2" in refused("batch_size", 1)
    assert tiny(batch_size=2).learn(10).num_timesteps == 10


@pytest.mark.parametrize("name", ["tau", "gamma"])
@pytest.mark.parametrize("value", [-0.1, 1.1, NAN, INF, "0.5", None, True, [0.5]])
def test_fractions(name, value):
    assert "a finite number >= 0.0 and <= 1.0" in refused(name, value)


@pytest.mark.parametrize("name", ["tau", "gamma"])
@pytest.mark.parametrize("value", [0, 1, 0.0, 1.0, np.float32(0.5)])
def test_bounds_of_fractions_are_allowed(name, value):
    assert tiny(**{name: value}).learn(10)._n_updates > 0


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


@pytest.mark.parametrize("name", ["actor_learning_rate", "ent_coef_learning_rate"])
@pytest.mark.parametrize("value", ["1e-3", "auto", "lin_1e-3"])
def test_learning_rates_are_no_strings(name, value):
    assert "a finite number > 0.0" in refused(name, value)


@pytest.mark.parametrize("value", ["1e-3", "auto_1e-3", "lin_1e-3", "Auto", ""])
def test_the_learning_rate_is_no_string_but_auto(value):
    assert "a number or 'auto'" in refused("learning_rate", value)


def test_the_learning_rate_of_discrete_actions_is_not_automatic():
    with pytest.raises(ValueError, match="learning_rate='auto' is not allowed: it must be a finite number > 0"):
        DiscreteSoftQ("MlpPolicy", "CartPole-v1", learning_rate="auto")


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
    assert tiny(**{name: value}, **kwargs).learn(10)._n_updates > 0


SCHEDULES = ("learning_rate", "actor_learning_rate", "ent_coef_learning_rate", "ent_coef", "annealing")


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("value", [-1.0, NAN, INF])
@pytest.mark.parametrize("progress_remaining", [1.0, 0.0])
def test_schedules_are_tried_at_both_ends(name, value, progress_remaining):
    def schedule(progress):
        return value if progress == progress_remaining else 1.0

    with pytest.raises(ValueError, match=re.escape(f"{name}({progress_remaining:g})={value!r} is not allowed")):
        tiny(**{name: schedule})


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("schedule", [lambda _: None, lambda _: "a", lambda: 1.0, lambda _: [1.0, 2.0]])
def test_schedules_return_numbers(name, schedule):
    with pytest.raises(ValueError, match=f"{name}.* is not allowed"):
        tiny(**{name: schedule})


@pytest.mark.parametrize("name", SCHEDULES[:3])
def test_learning_rates_may_end_at_zero(name):
    assert tiny(**{name: LinearSchedule(1e-3, 0.0, 1.0)}).learn(20)._n_updates > 0


def test_temperature_may_not_end_at_zero():
    """It divides: hours of training would end in nan with the last update."""
    with pytest.raises(ValueError, match=re.escape("ent_coef(0)=0.0 is not allowed: it must be a finite number >= 1e-08")):
        tiny(ent_coef=LinearSchedule(0.1, 0.0, 1.0))


@pytest.mark.parametrize(
    "value", ["Auto", "auto_", "auto_0", "auto_-1", "auto_x", "auto_nan", "auto_inf", "auto_1e-20", "", "autox", "auto0.1"]
)
def test_ent_coef_strings(value):
    message = refused("ent_coef", value)
    assert "'auto_X' with an initial value X > 0" in message


@pytest.mark.parametrize(("value", "expected"), [("auto", 0.01), ("auto_0.1", 0.1), ("auto_1e-2", 0.01), ("auto_5", 5.0)])
def test_initial_temperature(value, expected):
    assert tiny(ent_coef=value).ent_coef_tensor.item() == pytest.approx(expected)


def test_initial_temperature_without_a_scale_is_that_of_sac():
    assert tiny(ent_coef="auto", normalize_rewards=False).ent_coef_tensor.item() == pytest.approx(1.0)


def test_numbers_as_strings_are_numbers():
    model = tiny(ent_coef="0.1", target_entropy="-2")
    assert (model.ent_coef, model.target_entropy) == (0.1, -2.0)


@pytest.mark.parametrize("value", ["Auto", "auto_1", -20.0, NAN, INF, None, True, [-1.0]])
def test_target_entropy(value):
    message = refused("target_entropy", value)
    assert ("'auto'" if isinstance(value, str) else "a finite number") in message


@pytest.mark.parametrize(
    "value", [0, -1, 1.5, "4", None, True, (), (1,), [1, "step"], (1, "steps"), (0, "episode"), (1.5, "step"), (1, "step", 2)]
)
def test_train_freq(value):
    refused("train_freq", value)


def test_no_episodes_with_several_environments():
    with pytest.raises(ValueError, match=r"train_freq=\(1, 'episode'\) is not allowed.*n_envs=2"):
        tiny(make_vec_env(OneStep, 2), train_freq=(1, "episode"))


@pytest.mark.parametrize("value", [-1, 2**32, 0.5, "0", NAN])
def test_seed(value):
    refused("seed", value)


@pytest.mark.parametrize("value", [None, 0, 2**32 - 1, np.int64(3)])
def test_seed_is_any_integer_of_32_bits(value):
    assert tiny(seed=value).learn(10)._n_updates > 0


@pytest.mark.parametrize("value", ["net_arch", [], 3])
def test_policy_kwargs_is_a_dict(value):
    refused("policy_kwargs", value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_critics", 0),
        ("n_critics", 1.5),
        ("n_critics", None),
        ("n_experts", 0),
        ("n_experts", 2.5),
        ("n_experts", "16"),
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
        ("share_features_extractor", "no"),
        ("normalize_images", 0),
        ("activation_fn", "relu"),
        ("activation_fn", th.relu),
        ("optimizer_class", "adam"),
        ("optimizer_class", th.optim.LBFGS),
        ("features_extractor_class", "NatureCNN"),
        ("optimizer_kwargs", "eps=1e-3"),
        ("features_extractor_kwargs", 3),
        ("n_bins", 50),
        ("n_bins", 0),
    ],
)
def test_policy_arguments(name, value):
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r} is not")):
        tiny(policy_kwargs={name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("activation_fn", partial(th.nn.LeakyReLU, 0.2)),
        ("activation_fn", lambda: th.nn.ELU()),
        ("optimizer_class", partial(th.optim.AdamW, weight_decay=1e-3)),
        ("features_extractor_class", partial(FlattenExtractor)),
    ],
)
def test_functions_that_make_what_classes_make(name, value):
    """As SAC takes them."""
    assert tiny(policy_kwargs={name: value, "net_arch": [4]}).learn(12)._n_updates > 0


@pytest.mark.parametrize("algorithm", [SoftQ, DiscreteSoftQ])
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("policy_kwargs", dict(policy_kwargs=dict(optimizer_kwargs=dict(beta=0.9)))),
        ("policy_kwargs", dict(policy_kwargs=dict(features_extractor_kwargs=dict(n_features=3)))),
        ("replay_buffer_kwargs", dict(replay_buffer_kwargs=dict(handle_timeouts=True))),
    ],
)
def test_keyword_arguments_that_are_handed_on(algorithm, name, kwargs):
    """The word that is not known is in the message too."""
    (inner,) = kwargs[name].values() if name == "policy_kwargs" else [kwargs[name]]
    with pytest.raises(ValueError, match=rf"{name}=.*{next(iter(inner))}.* is not allowed.*TypeError"):
        tiny(OneStep() if algorithm is SoftQ else OneStepDiscrete(), algorithm, **kwargs)


@pytest.mark.parametrize(
    "noise",
    [NormalActionNoise(np.zeros(3), np.ones(3)), NormalActionNoise(np.zeros(2), np.full(2, np.nan)), lambda: None],
)
def test_action_noise_that_does_not_fit(noise):
    refused("action_noise", noise)


def test_action_noise_of_a_loaded_agent(tmp_path):
    """One that does not fit is refused, that of as many environments as the agent had is not."""
    noise = NormalActionNoise(np.zeros(1), np.full(1, 0.1))
    model = SoftQ("MlpPolicy", make_vec_env("Pendulum-v1", n_envs=3), action_noise=VectorizedActionNoise(noise, 3))
    model.learn(6)
    model.save(tmp_path / "agent")
    assert SoftQ.load(tmp_path / "agent").action_noise.n_envs == 3
    with pytest.raises(ValueError, match=r"action_noise=.* is not allowed: it must be .* of the shape \(1,\)"):
        SoftQ.load(tmp_path / "agent", action_noise=NormalActionNoise(np.zeros(3), np.ones(3)))
    # it follows the number of environments
    for n_envs in (1, 2):
        loaded = SoftQ.load(tmp_path / "agent", env=make_vec_env("Pendulum-v1", n_envs=n_envs))
        loaded.learn(6)
        assert np.shape(loaded.action_noise()) == ((1,) if n_envs == 1 else (2, 1))


def test_action_noise_that_cannot_be_copied():
    """Nothing but an exact resume has to copy it."""

    class Stream(ActionNoise):
        numbers = (np.full(1, x) for x in itertools.cycle([0.1, -0.1]))

        def __init__(self):
            super().__init__()
            self.source = self.numbers

        def __call__(self):
            return next(self.source)

    assert tiny(action_noise=Stream()).learn(12).num_timesteps == 12


@pytest.mark.parametrize("sigma", [np.ones(2), np.ones(1)])
def test_trying_action_noise_changes_nothing(sigma):
    noise = OrnsteinUhlenbeckActionNoise(np.zeros_like(sigma), sigma)
    np.random.seed(3)
    expected = np.random.rand()
    np.random.seed(3)
    tiny(action_noise=noise)
    assert np.random.rand() == expected
    assert not noise.noise_prev.any()


def test_unknown_names_of_anything():
    """Of a choice that resembles nothing, no guess is made."""
    with pytest.raises(ValueError, match=r"'policy'$"):
        check_choice("proposal", "xyz", ("policy",))


@pytest.mark.parametrize("value", [1, 1e-3, LinearSchedule(1e-3, 1e-4, 0.5), lambda p: np.float32(1e-3 * (p + 1))])
def test_learning_rates_are_numbers_or_functions_of_any_kind(value):
    model = tiny(learning_rate=value)
    assert model.lr_schedule(1.0) == pytest.approx(value(1.0) if callable(value) else value)


@pytest.mark.parametrize("value", ["n_critic", "use_sde", "nonsense"])
def test_policy_kwargs_are_known(value):
    with pytest.raises(ValueError, match=f"key of policy_kwargs='{value}' is not allowed: it must be one of .*'n_critics'"):
        tiny(policy_kwargs={value: 1})


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
        assert tiny(device=value).device == th.device("cpu")
    else:
        refused(name, value)


@pytest.mark.parametrize("env", [3, OneStep, ["Pendulum-v1"]])
def test_environments(env):
    with pytest.raises(ValueError, match=r"env=.* is not allowed: it must be an environment or its id$"):
        SoftQ("MlpPolicy", env)


@pytest.mark.parametrize("algorithm", [SoftQ, DiscreteSoftQ])
def test_names_of_policies(algorithm):
    with pytest.raises(ValueError, match=r"policy='MlpPolicyy' is not allowed: .* \(did you mean 'MlpPolicy'\?\)"):
        algorithm("MlpPolicyy", "Pendulum-v1" if algorithm is SoftQ else "CartPole-v1")


class Mistaken(FlattenExtractor):
    """Has a mistake of its author."""

    def __init__(self, observation_space):
        super().__init__(observation_space)
        self.size = self.no_such_attribute


@pytest.mark.parametrize("algorithm", [SoftQ, DiscreteSoftQ])
def test_mistakes_of_ones_own_networks_are_no_fault_of_the_space(algorithm):
    env = OneStep() if algorithm is SoftQ else OneStepDiscrete()
    with pytest.raises(AttributeError, match="no_such_attribute"):
        algorithm("MlpPolicy", env, policy_kwargs=dict(features_extractor_class=Mistaken))


def test_an_environment_that_cannot_be_seeded_is_no_fault_of_the_arguments():
    class Unseeded(DummyVecEnv):
        def seed(self, seed=None):
            raise RuntimeError("there is no generator")

    with pytest.raises(RuntimeError, match=r"^there is no generator$"):
        tiny(Unseeded([OneStep]), seed=1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("activation_fn", "relu"), ("net_arch", [64, -1]), ("optimizer_class", 5), ("net_arch", "64")),
        *(("n_bins", 0), ("n_bins", 100), ("n_bins", 0.5)),
    ],
)
def test_policy_arguments_of_discrete_agents(name, value):
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r} is not allowed: it must be ")):
        tiny(OneStepDiscrete(), DiscreteSoftQ, policy_kwargs={name: value})


def test_whole_numbers_of_any_type():
    """As ``learn(1e6)``."""
    model = tiny(policy_kwargs=dict(n_experts=3.0, n_critics=2.0, n_bins=11.0), n_actor_particles=4.0).learn(12.0)
    obs = np.zeros(1, dtype=np.float32)
    assert model.sample_actions(obs, 4.0).shape[0] == 4
    assert np.isfinite(model.log_prob(obs, model.predict(obs)[0], n_particles=1e2))
    assert np.isfinite(model.entropy(obs, n_particles=1e2))
    assert np.isfinite(model.soft_value(obs, n_particles=1e2))
    assert len(model.modes(obs, n_particles=1e2)) == 2
    model.set_data(from_agent(model)).pretrain(2.0, log_interval=1.0).clone_behaviour(2.0, log_interval=1.0)
    assert compose([model, model], gradient_steps=2.0, ent_coef=0.1)._n_updates == 2
    discrete = tiny(OneStepDiscrete(), DiscreteSoftQ).learn(12.0)
    assert discrete.sample_actions(obs, 4.0).shape == (4,)


def test_without_an_environment():
    with pytest.raises(ValueError, match="env=None is not allowed: it must be an environment or its id"):
        SoftQ("MlpPolicy", None)


@pytest.mark.parametrize("policy", [3, dict, SACPolicy])
def test_policy_classes(policy):
    with pytest.raises(ValueError, match=r"policy=.* is not allowed: it must be SoftQPolicy or a class derived from it"):
        SoftQ(policy, OneStep())


@pytest.mark.parametrize(
    ("env", "kwargs", "name"),
    [
        (OneStep(), {"n_steps": 2, "optimize_memory_usage": True}, "optimize_memory_usage"),
        (SimpleMultiObsEnv(discrete_actions=False), {"optimize_memory_usage": True}, "optimize_memory_usage"),
        (SimpleMultiObsEnv(discrete_actions=False), {"n_steps": 2}, "n_steps"),
        (SimpleMultiObsEnv(discrete_actions=False), {"replay_buffer_class": ReplayBuffer}, "replay_buffer_class"),
        (OneStep(), {"replay_buffer_class": HerReplayBuffer}, "replay_buffer_class"),
        (SimpleMultiObsEnv(discrete_actions=False), {"replay_buffer_class": HerReplayBuffer}, "replay_buffer_class"),
        (OneStep(), {"n_steps": 2, "replay_buffer_class": ReplayBuffer}, "n_steps"),
    ],
)
def test_replay_buffers_that_sb3_does_not_have(env, kwargs, name):
    policy = "MultiInputPolicy" if isinstance(env.observation_space, spaces.Dict) else "MlpPolicy"
    with pytest.raises(ValueError, match=f"{name}=.* is not allowed"):
        SoftQ(policy, env, **kwargs)


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
    "learning_rate": st.one_of(schedules, names("auto")),
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
                "n_experts": sizes,
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
    assert "training stopped" in message.lower() if message else model.num_timesteps >= 12


@settings(deadline=None, max_examples=150)
@given(some_of(ARGUMENTS))
def test_a_working_agent_or_a_value_error(kwargs):
    works_or_is_refused(tiny, kwargs, "n_critics", "n_experts", "log_std_init", "smoothing", "head_arch")


DISCRETE_ARGUMENTS = {
    name: values
    for name, values in ARGUMENTS.items()
    if name in inspect.signature(DiscreteSoftQ).parameters and name != "policy_kwargs"
}


@settings(deadline=None, max_examples=60)
@given(some_of(DISCRETE_ARGUMENTS))
def test_a_working_discrete_agent_or_a_value_error(kwargs):
    works_or_is_refused(partial(tiny, OneStepDiscrete(), DiscreteSoftQ), kwargs)


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
        assert tiny(target_entropy=value, **kwargs).target_entropy == value


@pytest.mark.parametrize("algorithm", [SoftQ, DiscreteSoftQ])
@pytest.mark.parametrize("extreme", ["lowest", "highest"])
@pytest.mark.parametrize("learning_rate", [3.0, 1e20])
def test_the_temperature_stays_where_single_precision_can_divide_by_it(algorithm, extreme, learning_rate):
    """Towards an entropy that no policy reaches it falls or rises for ever: both ends of what is allowed, at any speed."""
    bounds = {SoftQ: (-7.162, 2 * np.log(2.0)), DiscreteSoftQ: (0.0, np.log(3.0))}[algorithm]
    target = bounds[extreme == "highest"]
    env = OneStep() if algorithm is SoftQ else OneStepDiscrete()
    model = tiny(env, algorithm, target_entropy=target, ent_coef_learning_rate=learning_rate).learn(60)
    unit = model.critic.return_scale.item()
    assert 0.9e-8 < model.ent_coef_tensor.item() / unit < 1.1e8
    assert all(th.isfinite(tensor).all() for tensor in model.policy.state_dict().values())
    assert np.isfinite(model.soft_value(np.zeros((1, 1), dtype=np.float32))).all()


@pytest.mark.parametrize("total_timesteps", [INF, np.inf, 1e9])
@pytest.mark.parametrize("algorithm", [SoftQ, DiscreteSoftQ])
def test_until_a_callback_stops(total_timesteps, algorithm):
    model = tiny(OneStep() if algorithm is SoftQ else OneStepDiscrete(), algorithm)
    model.learn(total_timesteps, StopTrainingOnMaxEpisodes(15))
    assert model.num_timesteps == 15
    assert model._current_progress_remaining > 0.99


@pytest.mark.parametrize("value", [NAN, -1, "100", None, -INF])
def test_total_timesteps(value):
    with pytest.raises(ValueError, match=re.escape(f"total_timesteps={value!r} is not allowed")):
        tiny().learn(value)


@pytest.mark.parametrize("algorithm", [SoftQ, DiscreteSoftQ])
def test_no_updates_are_no_updates(algorithm):
    model = tiny(OneStep() if algorithm is SoftQ else OneStepDiscrete(), algorithm).learn(20)
    before = {name: tensor.clone() for name, tensor in model.policy.state_dict().items()}
    n_updates = model._n_updates
    model.train(0)
    assert model._n_updates == n_updates
    assert all(th.equal(tensor, before[name]) for name, tensor in model.policy.state_dict().items())


@pytest.mark.parametrize("algorithm", [SoftQ, DiscreteSoftQ])
@pytest.mark.parametrize(("own", "other"), [("auto", 0.2), (0.2, "auto"), (lambda progress: 0.1, "auto_0.5")])
def test_parameters_of_another_kind_of_temperature(tmp_path, algorithm, own, other):
    def agent(ent_coef):
        return tiny(OneStep() if algorithm is SoftQ else OneStepDiscrete(), algorithm, ent_coef=ent_coef)

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
    assert tiny(OneStep() if algorithm is SoftQ else OneStepDiscrete(), algorithm, **kwargs).learn(20)._n_updates > 0


@pytest.mark.parametrize("value", [2.0, np.int64(2), (2.0, "step"), (np.int32(2), "step")])
def test_train_freq_of_any_kind_of_number(value):
    assert tiny(train_freq=value).learn(20)._n_updates > 0
