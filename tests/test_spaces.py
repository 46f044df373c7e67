"""A space or a wrapper works, or is refused when the agent is made."""

from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3 import SAC
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    VecCheckNan,
    VecExtractDictObs,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
)

from sb3_softq import DiscreteSoftQ, SoftQ
from tests.conftest import AnySpaces, OneStep, tiny

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(np.array([-1, 0], dtype=np.float32), np.array([1, 0], dtype=np.float32)),
        spaces.Box(-1, 1, (0,), dtype=np.float32),
        spaces.Box(-2, 2, (1,), dtype=np.int32),
    ],
    ids=["no_width", "no_dimension", "integers"],
)
def test_action_spaces_that_no_policy_has(space):
    with pytest.raises(ValueError, match=r"action_space=Box.* is not allowed: it must be a Box of floats with finite bounds"):
        tiny(OneStep(space))


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


BOX = spaces.Box(-1, 1, (2,))


@pytest.mark.parametrize(
    ("observation_space", "action_space", "kind"),
    [
        (spaces.Tuple([BOX, BOX]), BOX, NotImplementedError),
        (spaces.Dict(a=spaces.Dict(b=BOX)), BOX, NotImplementedError),
        (BOX, spaces.Discrete(2), AssertionError),
        (BOX, spaces.MultiBinary(2), AssertionError),
    ],
    ids=["tuple", "nested_dict", "discrete", "binary"],
)
def test_programs_that_catch_what_sac_raises_for_a_space_need_no_change(observation_space, action_space, kind):
    policy = "MultiInputPolicy" if isinstance(observation_space, spaces.Dict) else "MlpPolicy"
    for algorithm, error in [(SAC, kind), (SoftQ, kind), (SoftQ, ValueError)]:
        with pytest.raises(error):
            algorithm(policy, AnySpaces(observation_space, action_space), device="cpu")


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
    message = ""
    try:
        model = tiny(AnySpaces(observation_space, action_space), policy=policy)
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
        tiny(OneStep(space))


@pytest.mark.parametrize(("high", "dtype"), [(1e38, np.float32), (1e300, np.float64), (3e4, np.float16)])
def test_boxes_whose_width_does_not(high, dtype):
    space = spaces.Box(-high, high, (1,), dtype)
    with np.errstate(over="ignore"):
        action, _ = tiny(OneStep(space)).learn(10).predict(np.zeros(1, dtype=np.float32))
    assert space.contains(action.astype(dtype))


@pytest.mark.parametrize(
    "space", [spaces.Tuple([spaces.Discrete(2)]), spaces.Text(3), spaces.Dict(a=spaces.Dict(b=spaces.Discrete(2)))]
)
def test_kinds_of_observations_that_no_network_takes(space):
    env = OneStep()
    env.observation_space = space
    with pytest.raises(ValueError, match=r"observation_space=.* is not allowed: it must be a Box, Discrete"):
        SoftQ("MultiInputPolicy", env)


BOX3 = spaces.Box(-1.0, 1.0, (3,), dtype=np.float32)


IMAGE = spaces.Box(0, 255, (36, 36, 1), dtype=np.uint8)


def policy_for(space):
    return "MultiInputPolicy" if isinstance(space, spaces.Dict) else "CnnPolicy" if space is IMAGE else "MlpPolicy"


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
    model = tiny(VecFrameStack(good, 2) if isinstance(space, spaces.Box) else good)
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
    assert tiny(env).learn(12)._n_updates > 0
