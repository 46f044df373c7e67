"""What the tests share: environments, small agents, and what is asked of them."""

import multiprocessing
import re
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import set_random_seed
from torch import nn

from sb3_softq import ParticleOptions, SoftQ, products
from sb3_softq.batch_norm import JointBatchNorm

# Processes of environments, programs, and those that a test kills, are forked from one that has imported what takes seconds
multiprocessing.set_forkserver_preload(["tests.conftest", "matplotlib.pyplot", "pandas", "scipy.stats"])


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """What a test draws does not depend on the tests before it, which differ with the number of processes."""
    set_random_seed(0)


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


class OneStepDiscrete(OneStep):
    """The same with three actions."""

    def __init__(self):
        super().__init__(spaces.Discrete(3))


class Ends(gym.Env):
    """Reward 1 in each step; episodes of one step that terminate, or are truncated."""

    observation_space = spaces.Box(0.0, 1.0, (1,))

    def __init__(self, terminates, action_space):
        self.terminates, self.action_space = terminates, action_space

    def reset(self, *, seed=None, options=None):
        return np.zeros(1, dtype=np.float32), {}

    def step(self, action):
        return np.zeros(1, dtype=np.float32), 1.0, self.terminates, not self.terminates, {}


class RandomEnv(gym.Env):
    """Random observations, a reward for large actions, episodes of 20 steps."""

    def __init__(self, action_space):
        self.action_space = action_space
        self.observation_space = spaces.Box(-1.0, 1.0, (3,), dtype=np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.np_random.uniform(-1.0, 1.0, 3).astype(np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.t += 1
        return self.np_random.uniform(-1.0, 1.0, 3).astype(np.float32), float(action.sum()), False, self.t == 20, {}


class AnySpaces(gym.Env):
    """Random observations of a space, and actions of another."""

    def __init__(self, observation_space, action_space):
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed=None, options=None):
        return self.observation_space.sample(), {}

    def step(self, action):
        assert action.shape == self.action_space.shape
        assert self.action_space.contains(action)
        return self.observation_space.sample(), 0.0, False, False, {}


class StopAfter(BaseCallback):
    """Stops training after a number of steps, in the middle of an episode or at its end."""

    def __init__(self, n_steps: int) -> None:
        super().__init__()
        self.n_steps = n_steps

    def _on_step(self) -> bool:
        return self.num_timesteps < self.n_steps


needs_onednn = pytest.mark.skipif(not th.backends.mkldnn.is_available(), reason="torch has no oneDNN")


def ask_onednn(monkeypatch: pytest.MonkeyPatch, min_size: float = 1) -> list[tuple[Any, ...]]:
    """Have products of float32 done by oneDNN on any processor, from a size on; its calls are in the list that is returned."""
    calls: list[tuple[Any, ...]] = []
    multiply = products._multiply

    def recorded(*args: Any) -> th.Tensor:
        calls.append(args)
        return multiply(*args)

    monkeypatch.setattr(products, "_ONEDNN_IS_FASTER", True)
    monkeypatch.setattr(products, "_ONEDNN_MIN_SIZE", min_size)
    monkeypatch.setattr(products, "_multiply", recorded)
    return calls


def assert_same(a: Any, b: Any) -> None:
    """Equal in values and types, down to what containers and objects of Stable-Baselines3 are made of."""
    # an OrderedDict may come back as a plain one
    assert type(a) is type(b) or (isinstance(a, dict) and isinstance(b, dict))
    if isinstance(a, th.Tensor):
        assert a.dtype == b.dtype
        assert th.equal(a, b)
    elif isinstance(a, np.ndarray):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert (a == b).all()
    elif isinstance(a, dict):
        # in any order: the RL Zoo puts a time limit of its own in the place of gymnasium's, which writes first
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif type(a).__module__.startswith("stable_baselines3") and hasattr(a, "__dict__") and not isinstance(a, type):
        assert_same(vars(a), vars(b))
    else:
        assert a == b


def grouped(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of SoftQ, with those that are particle options in ``particle_options``."""
    options = {name: kwargs[name] for name in ParticleOptions.names() if name in kwargs}
    others = {name: value for name, value in kwargs.items() if name not in options}
    return others | {"particle_options": options} if options else others


def small(
    algorithm: Any = SoftQ, policy: str = "MlpPolicy", env: Any = "Pendulum-v1", width: int | None = 8, **kwargs: Any
) -> Any:
    """
    An agent that learns in milliseconds.

    :param algorithm: Its class
    :param policy: Its policy
    :param env: Its environment
    :param width: Of the hidden layer, unless ``policy_kwargs`` say something else; None for the default networks
    :param kwargs: Further arguments, particle options among them
    """
    arguments: dict[str, Any] = dict(learning_starts=8, batch_size=8, buffer_size=200, seed=0, device="cpu")
    arguments |= grouped(kwargs)
    policy_kwargs = arguments.get("policy_kwargs", {})
    if width is not None and isinstance(policy_kwargs, dict | None):
        arguments["policy_kwargs"] = {"net_arch": [width]} | (policy_kwargs or {})
    return algorithm(policy, env, **arguments)


def flat(module: nn.Module) -> th.Tensor:
    """A copy of all parameters, as one vector."""
    return nn.utils.parameters_to_vector(module.parameters()).detach().clone()


def tiny(env: Any = None, algorithm: Any = SoftQ, **kwargs: Any) -> Any:
    """An agent of four hidden units that acts once per episode, unseeded: where only whether it works matters."""
    arguments: dict[str, Any] = {"learning_starts": 4, "batch_size": 4, "buffer_size": 50, "seed": None, "width": 4}
    return small(algorithm, env=env or OneStep(), **(arguments | kwargs))


def refused(name: str, value: Any, **kwargs: Any) -> str:
    """Making the agent fails, and the message says what was wrong, so that it can be put right without the source."""
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r} is not allowed: it must be ")) as excinfo:
        tiny(**{name: value}, **kwargs)
    return str(excinfo.value)


def check_training(model: Any, n_timesteps: int = 24) -> dict[str, Any]:
    """Train: actor, critic and target move, and everything that is learned or logged is finite."""
    modules = [model.actor, model.ema_actor, model.critic, model.critic_target]
    before = [flat(module) for module in modules]
    model.learn(n_timesteps)
    assert model._n_updates > 0
    for module, old in zip(modules, before, strict=True):
        new = flat(module)
        assert th.isfinite(new).all()
        assert not th.equal(new, old)
    logged = {key: value for key, value in model.logger.name_to_value.items() if key.startswith("train/")}
    assert np.isfinite(list(logged.values())).all()
    return logged


def hidden_sizes(net: Any, n_outputs: int = 1) -> list[int]:
    """Widths of the hidden layers."""
    sizes = [layer.out_features for layer in net if isinstance(layer, nn.Linear)]
    return sizes[: len(sizes) - n_outputs]


def batch_normalised(net: Any, x: th.Tensor) -> th.Tensor:
    """A critic network in training mode: by the statistics of x itself."""
    for layer in net:
        if isinstance(layer, JointBatchNorm):
            x = (x - x.mean(dim=0)) / (x.var(dim=0, correction=0) + 1e-3).sqrt() * layer.weight + layer.bias
        else:
            x = layer(x)
    return x.squeeze(1)
