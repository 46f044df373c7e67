"""Environments that fail in training: what is said, what is saved, and that nothing of it is learned from."""

import multiprocessing
import os
import pickle
import re
import signal
import threading
import time
import timeit
from copy import deepcopy
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
from filelock import FileLock
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

from sb3_softq import DiscreteSoftQ, SoftQ
from sb3_softq.checkpoint import ResumableCheckpoint, resume, steps_done
from sb3_softq.checkpointing.folders import LOCK
from sb3_softq.composition import compose
from sb3_softq.faults import CheckedDummyVecEnv, FaultyEnvironmentError, check_step, set_timeout
from sb3_softq.finite import DivergedError
from tests.conftest import StopAfter, small

NAN, INF = float("nan"), float("inf")
BAD_STEP = 30


class Faulty(gym.Env):
    """Episodes of seven steps. At a step of its life it does or returns what it is told to."""

    def __init__(self, fault=None, at=BAD_STEP, discrete=False, on_reset=False, keys=False):
        box = spaces.Box(-10.0, 10.0, (3,))
        self.observation_space = spaces.Dict(a=box, b=box) if keys else box
        self.action_space = spaces.Discrete(3) if discrete else spaces.Box(-1.0, 1.0, (2,))
        self.fault, self.at, self.on_reset, self.keys = fault, at, on_reset, keys
        self.life = self.t = 0

    def _obs(self):
        obs = self.np_random.normal(size=3).astype(np.float32)
        return {"a": obs, "b": obs + 1} if self.keys else obs

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        if self.on_reset and self.life >= self.at:
            return FAULTS[self.fault](self._obs(), 0.0)[0], {}
        return self._obs(), {}

    def step(self, action):
        self.life += 1
        self.t += 1
        obs, reward = self._obs(), float(self.t)
        if self.life == self.at and not self.on_reset:
            obs, reward = FAULTS[self.fault](obs, reward)
        return obs, reward, False, self.t == 7, {}


def raises(obs, reward):
    raise ZeroDivisionError("the simulator is broken")


def replaced(**kwargs):
    return lambda obs, reward: (kwargs.get("obs", obs), kwargs.get("reward", reward))


FAULTS = {
    "raises": raises,
    "None": replaced(obs=None),
    "shape ()": replaced(obs=np.float32(1.0)),
    "shape (1,)": replaced(obs=np.ones(1, dtype=np.float32)),
    "shape (1, 3)": replaced(obs=np.ones((1, 3), dtype=np.float32)),
    "shape (4,)": replaced(obs=np.ones(4, dtype=np.float32)),
    "text": replaced(obs="abc"),
    "NaN": replaced(obs=np.array([0.0, NAN, 0.0], dtype=np.float32)),
    "inf": replaced(obs=np.array([0.0, INF, 0.0], dtype=np.float32)),
    "reward None": replaced(reward=None),
    "reward NaN": replaced(reward=NAN),
    "reward inf": replaced(reward=-INF),
    "reward array": replaced(reward=np.ones(2)),
    "reward [1.0]": replaced(reward=np.ones(1)),
    "key": lambda obs, reward: ({"a": obs["a"]}, reward),
    "key None": lambda obs, reward: (obs | {"b": None}, reward),
    "key shape": lambda obs, reward: (obs | {"b": np.ones(1)}, reward),
    "key NaN": lambda obs, reward: (obs | {"b": np.full(3, NAN)}, reward),
    "no dict": replaced(obs=np.ones(3)),
    "dies": lambda obs, reward: os._exit(7),
    "is killed": lambda obs, reward: os.kill(os.getpid(), signal.SIGKILL),
    "hangs": lambda obs, reward: time.sleep(1000),
}
# what SB3 copies into its own array as it should be
ACCEPTED = "shape (1, 3)"
OF_STEPS = [name for name in FAULTS if "key" not in name and name not in (ACCEPTED, "no dict", "dies", "is killed", "hangs")]
OF_RESETS = [name for name in OF_STEPS if "reward" not in name]
OF_KEYS = ["key", "key None", "key shape", "key NaN", "no dict"]


@pytest.fixture(autouse=True)
def no_processes_left():
    yield
    for process in multiprocessing.active_children():
        process.kill()
        process.join()


def environments(fault, n_envs=2, vec_env=DummyVecEnv, bad=1, **kwargs):
    """Several, of which one has the fault, or those of a tuple."""
    bad = bad if isinstance(bad, tuple) else (min(bad, n_envs - 1),)
    fns = [lambda i=i: Faulty(fault, **kwargs | ({} if i in bad else {"at": 10**9})) for i in range(n_envs)]
    return vec_env(fns)


def agent(env, algorithm=SoftQ, **kwargs):
    discrete = isinstance(env.action_space, spaces.Discrete)
    algorithm = DiscreteSoftQ if discrete and algorithm is SoftQ else algorithm
    policy = "MultiInputPolicy" if isinstance(env.observation_space, spaces.Dict) else "MlpPolicy"
    return small(algorithm, policy, env, **{"learning_starts": 20, "buffer_size": 2000, **kwargs})


def check_saved(path, model, env=None, steps=None):
    """What was learned before the fault is there, whole, and goes on."""
    n_envs = model.n_envs
    done = n_envs * (BAD_STEP - 1) if steps is None else steps
    assert model.num_timesteps == model.replay_buffer.size() * n_envs == done
    assert steps_done(path) == done
    env = env or environments(
        "raises",
        n_envs,
        at=10**9,
        discrete=isinstance(model.action_space, spaces.Discrete),
        keys=isinstance(model.observation_space, spaces.Dict),
    )
    if model.get_vec_normalize_env() is not None:
        env = VecNormalize(env)
    resumed = resume(type(model), path, env)
    assert resumed.num_timesteps == resumed.replay_buffer.size() * n_envs == done
    stored = resumed.replay_buffer
    for values in (stored.observations, stored.next_observations, stored.rewards):
        for array in values.values() if isinstance(values, dict) else [values]:
            assert np.isfinite(array).all()
    if model.get_vec_normalize_env() is not None:
        assert np.isfinite(resumed.get_vec_normalize_env().obs_rms.mean).all()
        assert np.isfinite(resumed.get_vec_normalize_env().ret_rms.var).all()
    resumed.learn(20, ResumableCheckpoint(1000, path), reset_num_timesteps=False)
    return resumed


def fails(model, path, match, error=(FaultyEnvironmentError, ValueError)):
    with pytest.raises(error, match=match) as info:
        model.learn(200, ResumableCheckpoint(10_000, path))
    return info.value


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("fault", OF_STEPS)
def test_faults_of_steps(tmp_path, fault, discrete):
    env = environments(fault, discrete=discrete)
    model = agent(env)
    error = fails(model, tmp_path, rf"nvironment 1 .*at step {2 * BAD_STEP}: ")
    if fault == "raises":
        assert isinstance(error, FaultyEnvironmentError)
        assert isinstance(error.__cause__, ZeroDivisionError)
        assert "ZeroDivisionError: the simulator is broken" in str(error)
    if "shape" in fault:
        given = fault.removeprefix("shape ")
        assert f"the observation has the shape {given}, it must be (3,)" in str(error)
    check_saved(tmp_path, model)
    # the agent itself can go on, in a new episode
    env.envs[1].at = 10**9
    model.learn(20, reset_num_timesteps=False)
    buffer, new = model.replay_buffer, BAD_STEP - 1
    assert buffer.dones[new - 1].all()
    assert (buffer.observations[new] != buffer.next_observations[new - 1]).all()
    assert model.num_timesteps == model.replay_buffer.size() * 2 == 2 * (BAD_STEP - 1) + 20


class OutOfReachError(Exception):
    """An error of somebody's own, with arguments and a text of its own."""

    def __init__(self, joint, angle):
        super().__init__(joint, angle)
        self.joint, self.angle = joint, angle

    def __str__(self):
        return f"mine: {self.joint} at {self.angle}"


class SimulatorError(RuntimeError):
    """The same of a class that the explaining one has too."""

    def __init__(self, code, *, text):
        super().__init__(code)
        self.text = text

    def __str__(self):
        return self.text


@pytest.mark.parametrize(
    "raised",
    [
        ValueError("mine"),
        AssertionError("mine"),
        FloatingPointError("mine"),
        RuntimeError("mine"),
        Exception("mine"),
        KeyError("mine"),
        OSError(5, "mine"),
        UnicodeDecodeError("utf-8", b"x", 0, 1, "mine"),
        OutOfReachError("elbow", 1.5),
        SimulatorError(3, text="mine"),
        FaultyEnvironmentError("mine"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("algorithm", [SoftQ, SAC])
def test_what_an_environment_raises_can_be_caught_as_with_sac(algorithm, raised, monkeypatch):
    """The RL Zoo does: it prunes a trial of a search."""

    def fault(obs, reward):
        raise raised

    monkeypatch.setitem(FAULTS, "raises", fault)
    with pytest.raises(type(raised), match="mine") as error:
        agent(environments("raises"), algorithm).learn(200)
    if algorithm is SoftQ:
        assert isinstance(error.value, FaultyEnvironmentError)
        assert error.value.__cause__ is raised
        assert isinstance(error.value, ValueError) == isinstance(raised, ValueError)
        assert re.search(rf"^Environment 1 failed at step \d+: {type(raised).__name__}: .*mine", str(error.value))
        # as processes and Ray send it
        again = pickle.loads(pickle.dumps(error.value))
        assert isinstance(again, FaultyEnvironmentError)
        assert str(again) == str(error.value)


class SealedError(Exception):
    """One that nothing can be derived from."""

    def __init_subclass__(cls):
        raise TypeError


def test_an_error_that_no_other_can_be_like():
    error = FaultyEnvironmentError.like(SealedError(), "why")
    assert type(error) is FaultyEnvironmentError
    assert str(error) == "why"


class Formed(gym.Env):
    """Episodes of seven steps, whose observations are given another form."""

    def __init__(self, shape, form):
        self.observation_space = spaces.Box(-10.0, 10.0, shape)
        self.action_space = spaces.Box(-1.0, 1.0, (2,))
        self.form, self.t = form, 0

    def _obs(self):
        return self.form(self.np_random.normal(size=self.observation_space.shape).astype(np.float32))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self._obs(), {}

    def step(self, action):
        self.t += 1
        return self._obs(), 1.0, False, self.t == 7, {}


FORMS = [
    ((1,), lambda obs: obs.item()),
    ((1,), lambda obs: obs[0]),
    ((3,), lambda obs: obs[None]),
    ((3,), list),
    ((1, 3), lambda obs: obs[0]),
]


@pytest.mark.parametrize("algorithm", [SoftQ, SAC])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize(("shape", "form"), FORMS)
def test_as_many_elements_as_declared_are_what_was_declared(algorithm, normalised, shape, form):
    """Where SAC takes them, and at the end of episodes too."""
    stored = []
    for each in (form, lambda obs: obs):
        env = DummyVecEnv([lambda each=each: Formed(shape, each)] * 2)
        model = agent(VecNormalize(env) if normalised else env, algorithm, learning_starts=1000)
        model.learn(50)
        stored.append((model.replay_buffer.observations[:25], model.replay_buffer.next_observations[:25]))
    np.testing.assert_array_equal(*stored)


def test_processes_copy_no_observation():
    """SB3 stacks what comes from them, and SAC fails too."""
    env = environments(ACCEPTED, vec_env=partial(SubprocVecEnv, start_method="fork"))
    with pytest.raises(ValueError, match=r"^Environment 1 failed .* has the shape \(1, 3\), it must be \(3,\)"):
        agent(env).learn(200)


@pytest.mark.parametrize("fault", OF_STEPS)
def test_faults_at_the_end_of_an_episode(tmp_path, fault):
    """The observation is no part of what the vectorized environment returns, but of its infos."""
    model = agent(environments(fault, at=28))
    fails(model, tmp_path, r"nvironment 1 .*at step 56: ")
    check_saved(tmp_path, model, steps=54)


@pytest.mark.parametrize("fault", OF_RESETS)
@pytest.mark.parametrize("at", [0, 28])
def test_faults_of_resets(tmp_path, fault, at):
    model = agent(environments(fault, at=at, on_reset=True))
    fails(model, tmp_path, rf"nvironment 1 .*at step {2 * at}: ")
    if at:
        check_saved(tmp_path, model, steps=54)


@pytest.mark.parametrize("fault", OF_KEYS)
def test_faults_of_dicts(tmp_path, fault):
    model = agent(environments(fault, keys=True))
    fails(model, tmp_path, rf"nvironment 1 .*at step {2 * BAD_STEP}: ")
    check_saved(tmp_path, model)


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize(
    ("fault", "on_reset"),
    [(fault, False) for fault in ("NaN", "inf", "reward NaN", "reward inf", "raises")]
    # resets have no reward
    + [(fault, True) for fault in ("NaN", "inf", "raises")],
)
def test_statistics_of_a_fault_are_forgotten(tmp_path, fault, on_reset, discrete):
    at = 28 if on_reset else BAD_STEP
    model = agent(VecNormalize(environments(fault, at=at, on_reset=on_reset, discrete=discrete)))
    with np.errstate(invalid="ignore"):
        fails(model, tmp_path, rf"nvironment 1 .*at step {2 * at}: ")
    resumed = check_saved(tmp_path, model, steps=2 * (at - 1))
    assert np.isfinite(model.get_vec_normalize_env().obs_rms.mean).all()
    assert resumed.num_timesteps == 2 * (at - 1) + 20


@pytest.mark.parametrize("fault", OF_STEPS)
def test_faults_in_processes(tmp_path, fault, capfd):
    env = environments(fault, vec_env=partial(SubprocVecEnv, start_method="fork"))
    model = agent(env)
    error = fails(model, tmp_path, rf"nvironment.* at step {2 * BAD_STEP}: ")
    if fault == "raises":
        assert "Environment 1 failed" in str(error)
        assert "its process ended with exit code 1, what it raised is printed above" in str(error)
        assert isinstance(error.__cause__, EOFError | OSError)
        assert "ZeroDivisionError: the simulator is broken" in capfd.readouterr().err
    else:
        assert "nvironment 1 " in str(error)
    check_saved(tmp_path, model)
    check_closing(model.env)


def check_closing(env):
    """It waits for no answer that has come, or will never come."""
    closing = threading.Thread(target=env.close, daemon=True)
    closing.start()
    closing.join(10)
    assert not closing.is_alive()
    assert env.unwrapped.closed
    assert not any(process.is_alive() for process in env.unwrapped.processes)


@pytest.mark.parametrize("fault", ["dies", "hangs"])
def test_two_processes_that_fail_in_the_same_step(tmp_path, fault):
    env = environments(fault, 3, partial(SubprocVecEnv, start_method="fork"), bad=(0, 2))
    set_timeout(env, 0.5)
    model = agent(env)
    fails(model, tmp_path, f"^Environment [02] failed at step {3 * BAD_STEP}: ")
    check_closing(model.env)


def test_nothing_is_asked_after_a_failure():
    """An answer that is late would be taken for another one."""
    env = environments("dies", 3, partial(SubprocVecEnv, start_method="fork"))
    with pytest.raises(FaultyEnvironmentError):
        agent(env).learn(100)
    for ask in (env.reset, partial(env.get_attr, "spec"), partial(env.step, env.action_space.sample())):
        with pytest.raises(BrokenPipeError, match="environment 1 has failed before"):
            ask()
    check_closing(env)


@pytest.mark.parametrize(
    ("fault", "ending"), [("dies", "ended with exit code 7"), ("is killed", r"was killed by SIGKILL \(exit code -9\)")]
)
@pytest.mark.parametrize("start_method", ["fork", "forkserver"])
@pytest.mark.parametrize("n_envs", [1, 3])
def test_processes_that_end(tmp_path, fault, ending, start_method, n_envs):
    model = agent(environments(fault, n_envs, partial(SubprocVecEnv, start_method=start_method)))
    bad = min(1, n_envs - 1)
    fails(model, tmp_path, rf"^Environment {bad} failed at step {n_envs * BAD_STEP}: its process {ending}")
    check_saved(tmp_path, model)
    check_closing(model.env)


@pytest.mark.parametrize("n_envs", [1, 3])
def test_processes_that_hang(tmp_path, n_envs):
    env = environments("hangs", n_envs, partial(SubprocVecEnv, start_method="fork"))
    set_timeout(env, 0.5)
    model = agent(env)
    bad = min(1, n_envs - 1)
    error = fails(model, tmp_path, rf"^Environment {bad} failed at step {n_envs * BAD_STEP}: .* within timeout=0.5 seconds")
    assert isinstance(error.__cause__, TimeoutError)
    check_saved(tmp_path, model)
    check_closing(model.env)
    for seconds in (0, -1.0, "1"):
        with pytest.raises(ValueError, match="seconds="):
            set_timeout(env, seconds)
    with pytest.raises(ValueError, match=r"it must be a SubprocVecEnv \(RayVecEnv has an argument timeout\)"):
        set_timeout(environments("hangs"), 1)


@pytest.mark.parametrize("fault", OF_STEPS)
def test_a_single_process(tmp_path, fault):
    """What cannot be stacked with others can be on its own."""
    model = agent(environments(fault, 1, partial(SubprocVecEnv, start_method="fork")))
    fails(model, tmp_path, rf"nvironment.* at step {BAD_STEP}: ")
    check_saved(tmp_path, model)


@pytest.mark.parametrize("fault", OF_STEPS)
def test_an_environment_that_is_not_vectorized(tmp_path, fault):
    """Stable-Baselines3 puts a Monitor around it."""
    model = agent(Faulty(fault))
    fails(model, tmp_path, rf"nvironment 0 .*at step {BAD_STEP}: ")
    check_saved(tmp_path, model)


@pytest.mark.parametrize("train_freq", [(5, "step"), (1, "episode")])
def test_in_the_middle_of_a_rollout(tmp_path, train_freq):
    model = agent(environments("NaN", 1), train_freq=train_freq, n_steps=3)
    fails(model, tmp_path, rf"environment 0 .*at step {BAD_STEP}: ")
    check_saved(tmp_path, model)


def test_an_evaluation_that_fails(tmp_path):
    model = agent(environments("raises", at=10**9))
    evaluation = EvalCallback(Faulty("raises", at=3), eval_freq=10, verbose=0)
    with pytest.raises(FaultyEnvironmentError, match=r"^Environment 0 of an evaluation failed at step 20: ZeroDivisionError"):
        model.learn(200, [evaluation, ResumableCheckpoint(10_000, tmp_path)])
    # its transition was not stored yet
    check_saved(tmp_path, model, steps=18)


def test_processes_of_an_evaluation_that_end(tmp_path):
    model = agent(environments("raises", at=10**9))
    evaluation = EvalCallback(environments("dies", 2, partial(SubprocVecEnv, start_method="fork"), at=3), eval_freq=10)
    with pytest.raises(FaultyEnvironmentError, match=r"^Environment 1 of an evaluation failed at step 20: its process ended"):
        model.learn(200, [evaluation, ResumableCheckpoint(10_000, tmp_path)])
    check_saved(tmp_path, model, steps=18)


def test_a_callback_that_fails(tmp_path):
    class Fails(BaseCallback):
        def _on_step(self):
            if self.num_timesteps == 40:
                raise KeyError("mine")
            return True

    model = agent(environments("raises", at=10**9))
    with pytest.raises(KeyError, match="mine"):
        model.learn(200, [ResumableCheckpoint(10_000, tmp_path), Fails()])
    check_saved(tmp_path, model, steps=38)


def test_what_has_diverged_is_not_saved(tmp_path):
    model = agent(environments("raises", at=10**9), learning_rate=1e30)
    with pytest.raises(ValueError, match="training stopped"):
        model.learn(200, ResumableCheckpoint(10, tmp_path))
    assert steps_done(tmp_path) == 20
    with FileLock(tmp_path / LOCK, is_singleton=True, timeout=0):
        pass


def test_a_loss_that_is_no_number_is_reason_enough(tmp_path, monkeypatch):
    """Before a parameter is."""
    model = agent(environments("raises", at=10**9))
    callback = ResumableCheckpoint(10, tmp_path)

    def diverge(gradient_steps, batch_size):
        if model.num_timesteps == 36:
            raise DivergedError("entropy became nan")

    monkeypatch.setattr(model, "train", diverge)
    with pytest.raises(ValueError, match="entropy became nan"):
        model.learn(200, callback)
    assert steps_done(tmp_path) == 30


def test_an_error_is_not_lost_where_nothing_can_be_saved(tmp_path):
    model = agent(environments("raises"))
    callback = ResumableCheckpoint(10_000, tmp_path)
    callback._save = lambda: raises(0, 0)
    with (
        pytest.warns(UserWarning, match="its last steps could not be saved: the simulator is broken"),
        pytest.raises(FaultyEnvironmentError, match="Environment 1 failed"),
    ):
        model.learn(200, callback)


class BrokenNoise(ActionNoise):
    """Becomes NaN at a step."""

    steps = 0

    def __call__(self):
        self.steps += 1
        return np.full(2, NAN if self.steps == BAD_STEP else 0.0)


def test_an_action_that_is_no_number(tmp_path):
    model = agent(environments("raises", 1, at=10**9), action_noise=BrokenNoise())
    fails(model, tmp_path, rf"^action of environment 0 is not finite at step {BAD_STEP}: ")
    check_saved(tmp_path, model)


def test_what_a_callback_asks_in_vain_is_no_fault_of_an_environment():
    class Ask(BaseCallback):
        def _on_step(self):
            self.training_env.get_attr("no_such_attribute")

    with pytest.raises(AttributeError, match="no_such_attribute") as excinfo:
        agent(environments("raises", 1, at=10**9)).learn(20, Ask())
    assert not isinstance(excinfo.value, FaultyEnvironmentError)


@pytest.mark.parametrize("algorithm", [SoftQ, DiscreteSoftQ, SAC])
@pytest.mark.parametrize(("at", "train_freq"), [(40, 1), (56, 1), (40, 3), (42, 3)])
@pytest.mark.parametrize("first", [False, True])
def test_a_stop_by_a_callback_keeps_the_last_step(tmp_path, algorithm, at, train_freq, first):
    env = environments("raises", at=10**9, discrete=algorithm is DiscreteSoftQ)
    model = agent(env, algorithm, train_freq=train_freq)
    callbacks = [StopAfter(at), ResumableCheckpoint(10_000, tmp_path)]
    model.learn(200, callbacks[::-1] if first else callbacks)
    assert model.num_timesteps == 2 * model.replay_buffer.size() == steps_done(tmp_path) == at
    np.testing.assert_array_equal(model.replay_buffer.dones[: at // 2, 0], (np.arange(at // 2) + 1) % 7 == 0)
    # what comes next begins where this ended
    model.learn(10, reset_num_timesteps=False)
    buffer = model.replay_buffer
    ends = buffer.dones[: buffer.size() - 1].astype(bool)
    follows = (buffer.next_observations[: buffer.size() - 1] == buffer.observations[1 : buffer.size()]).all(axis=2)
    assert (follows | ends).all()


@pytest.mark.parametrize("algorithm", [SoftQ, DiscreteSoftQ])
def test_a_stop_keeps_the_last_step_without_checkpoints_too(algorithm):
    model = agent(environments("raises", at=10**9, discrete=algorithm is DiscreteSoftQ), algorithm)
    model.learn(200, StopAfter(40))
    assert model.num_timesteps == 2 * model.replay_buffer.size() == 40


@pytest.mark.parametrize("fault", ["raises", "NaN", "shape (1,)"])
def test_composed_agents(tmp_path, fault):
    agents = [agent(environments("raises", at=10**9), ent_coef=0.1).learn(60) for _ in range(2)]
    model = compose(agents, gradient_steps=3, env=environments(fault), learning_starts=0)
    model.replay_buffer.reset()
    fails(model, tmp_path, rf"nvironment 1 .*at step {2 * BAD_STEP}: ")
    check_saved(tmp_path, model)


def test_a_vectorized_environment_is_checked_in_place():
    env = environments("raises")
    model = agent(VecNormalize(env))
    assert type(env) is CheckedDummyVecEnv
    assert model.get_env().venv is env
    assert isinstance(deepcopy(env), CheckedDummyVecEnv)
    # subclasses of others stay as they are
    other = type("Other", (DummyVecEnv,), {})([Faulty])
    assert type(agent(other).get_env()) is type(other)


def test_a_check_costs_little():
    """Of one environment, in a vector of observations as those of MuJoCo."""
    obs, done, infos = np.zeros((1, 17), dtype=np.float32), np.array([False]), [{}]
    reward, space = np.zeros(1, dtype=np.float32), spaces.Box(-np.inf, np.inf, (17,))
    env = DummyVecEnv([lambda: Faulty("raises")])
    checked = CheckedDummyVecEnv([lambda: Faulty("raises")])

    def seconds(function):
        return min(timeit.repeat(function, number=2000, repeat=7)) / 2000

    row = np.zeros(3, dtype=np.float32)
    cost = seconds(lambda: checked._save_obs(0, row)) - seconds(lambda: env._save_obs(0, row))
    cost += seconds(lambda: check_step(obs, reward, done, infos, space, 0))
    # 2.5 µs where nothing else runs
    assert cost < 2e-5
