"""What features extractors get of observations, compiled or not, and the rows of a batch of them."""

from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.preprocessing import preprocess_obs
from stable_baselines3.common.utils import obs_as_tensor

from sb3_softq.observations import batch_size, encode, encoding_of, evenly_spaced, rows
from tests.conftest import AnySpaces, small

sizes = st.integers(1, 4)
# 0 to 255 in bytes is an image where it has three axes, and nothing else is
boxes = st.builds(
    lambda low, high, shape, dtype: spaces.Box(low, high, shape, dtype),
    st.sampled_from([0, 1]),
    st.sampled_from([254, 255]),
    st.lists(sizes, min_size=1, max_size=3).map(tuple),
    st.sampled_from([np.uint8, np.float32, np.float64]),
)
simple: st.SearchStrategy[spaces.Space[Any]] = st.one_of(
    boxes,
    sizes.map(spaces.Discrete),
    st.lists(sizes, min_size=1, max_size=3).map(spaces.MultiDiscrete),
    st.lists(sizes, min_size=1, max_size=2).map(spaces.MultiBinary),
)
dicts = st.dictionaries(st.sampled_from("abc"), simple, min_size=1).map(lambda parts: spaces.Dict(parts))
any_space: st.SearchStrategy[spaces.Space[Any]] = st.one_of(simple, dicts)


def batch(space: spaces.Space[Any], n: int, seed: int = 0) -> Any:
    """As a replay buffer has it, with an axis of its own for an integer."""
    space.seed(seed)
    if isinstance(space, spaces.Dict):
        return {key: batch(part, n, seed) for key, part in space.spaces.items()}
    observations = np.stack([space.sample() for _ in range(n)])
    return obs_as_tensor(observations.reshape(n, -1) if isinstance(space, spaces.Discrete) else observations, th.device("cpu"))


@settings(deadline=None, max_examples=200)
@given(any_space, st.integers(1, 3), st.booleans(), st.integers(0, 100))
def test_encoded_as_stable_baselines3_does(space, n, normalize_images, seed):
    obs = batch(space, n, seed)
    expected = preprocess_obs(obs, space, normalize_images)
    encoded = encode(obs, encoding_of(space, normalize_images))
    for key in expected if isinstance(expected, dict) else [slice(None)]:
        assert encoded[key].dtype == th.float32
        assert th.equal(encoded[key], expected[key])


@pytest.mark.skipif(not hasattr(th._dynamo.config, "trace_autograd_ops"), reason="torch 2.13 compiles the updates")
@pytest.mark.parametrize(
    ("policy", "space"),
    [
        ("MlpPolicy", spaces.Discrete(3)),
        ("MlpPolicy", spaces.MultiDiscrete([3, 2])),
        ("CnnPolicy", spaces.Box(0, 255, (3, 36, 36), np.uint8)),
        ("MultiInputPolicy", spaces.Dict({"image": spaces.Box(0, 255, (3, 36, 36), np.uint8), "goal": spaces.Discrete(2)})),
    ],
    ids=["integer", "integers", "image", "dict"],
)
def test_one_graph(policy, space):
    """Networks of every kind of observation can be compiled as a whole."""
    model = small(policy=policy, env=AnySpaces(space, spaces.Box(-1.0, 1.0, (2,))))
    obs = batch(space, 4)
    for network in (model.actor, model.critic):
        compiled = th.compile(network.features, backend="eager", fullgraph=True)
        assert th.equal(compiled(obs), network.features(obs))


@given(st.integers(1, 30), st.integers(1, 30))
def test_evenly_spaced(n, n_asked):
    for obs in (th.arange(n), {"a": th.arange(n), "b": th.zeros(n, 2)}):
        chosen = evenly_spaced(obs, n_asked)
        index = chosen["a"] if isinstance(chosen, dict) else chosen
        assert batch_size(chosen) == min(n, n_asked)
        assert index[0] == 0
        assert (index.diff() >= 1).all()
        assert len(index.diff().unique()) <= 2


def test_rows():
    obs = {"a": th.arange(6).reshape(3, 2), "b": th.arange(3)}
    chosen = rows(obs, slice(1, 3))
    assert isinstance(chosen, dict)
    assert chosen["a"].tolist() == [[2, 3], [4, 5]]
    assert chosen["b"].tolist() == [1, 2]
