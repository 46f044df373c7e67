"""A run that is killed and resumed in another process computes what one that is not interrupted does, to the bit."""

import hashlib
import multiprocessing
import os
import random
import signal
import time
from collections import Counter, OrderedDict, defaultdict, deque

import gymnasium as gym
import mujoco
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.wrappers import NormalizeObservation, NormalizeReward, TransformObservation, TransformReward
from stable_baselines3 import SAC, TD3, HerReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.envs import BitFlippingEnv, SimpleMultiObsEnv
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack, VecMonitor, VecNormalize

from sb3_softq import DiscreteSoftQ, SoftQ
from sb3_softq.checkpoint import ENVIRONMENTS, ResumableCheckpoint, latest, resume, steps_done
from sb3_softq.checkpointing.env_state import capture, refusal, restore
from sb3_softq.checkpointing.interruption import HANDLERS
from sb3_softq.checkpointing.training_state import restore_environments, save_environments
from sb3_softq.faults import FaultyEnvironmentError, set_timeout
from sb3_softq.serialization.values import OpaqueError, decode, encode
from tests.conftest import RandomEnv, StopAfter, small

N_STEPS, SAVE_FREQ = 240, 60
BOX = spaces.Box(-1.0, 1.0, (1,), dtype=np.float32)


class Pair(RandomEnv):
    """Keeps what its episodes depend on in an object of its own, and says how to get it."""

    def __init__(self):
        super().__init__(BOX)
        self.simulator = iter(())

    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed)
        self.simulator = iter(range(1, 20))
        return obs, info

    def step(self, action):
        obs, reward, *ends, info = super().step(action)
        return obs, reward + next(self.simulator, 0), *ends, info

    def get_state(self):
        return {"t": self.t, "all": np.arange(1, 20)}

    def set_state(self, state):
        self.t = state["t"]
        self.simulator = iter(state["all"][self.t :].tolist())


def env(name, **kwargs):
    return lambda: Monitor(gym.make(name, **kwargs))


def ou_noise():
    return OrnsteinUhlenbeckActionNoise(np.zeros(1), 0.2 * np.ones(1))


# environments, and arguments of the agent
CASES = {
    "Pendulum": (lambda: env("Pendulum-v1")(), {}),
    "schedules, n-step, rounds": (
        lambda: env("Pendulum-v1", max_episode_steps=50)(),
        dict(n_steps=3, learning_rate=lambda progress: 1e-3 * progress, ent_coef=0.1, buffer_size=90),
    ),
    "memory efficient": (
        lambda: env("MountainCarContinuous-v0")(),
        dict(optimize_memory_usage=True, replay_buffer_kwargs={"handle_timeout_termination": False}, train_freq=7),
    ),
    "correlated noise": (lambda: DummyVecEnv([env("Pendulum-v1")] * 2), dict(action_noise=ou_noise())),
    "CartPole": (lambda: env("CartPole-v1")(), dict(algorithm=DiscreteSoftQ)),
    "Hopper x 4": (lambda: DummyVecEnv([env("Hopper-v4")] * 4), dict(gradient_steps=-1)),
    "Walker2d, normalised": (lambda: VecNormalize(DummyVecEnv([env("Walker2d-v4")] * 2)), {}),
    "Ant": (lambda: env("Ant-v4")(), {}),
    "processes": (lambda: SubprocVecEnv([env("Pendulum-v1")] * 2), {}),
    "frames": (lambda: VecMonitor(VecFrameStack(DummyVecEnv([lambda: gym.make("Pendulum-v1")] * 2), 3)), {}),
    "gymnasium's wrappers": (lambda: Monitor(NormalizeReward(NormalizeObservation(gym.make("Pendulum-v1")))), {}),
    "MultiGoal": (lambda: env("sb3_softq/MultiGoal-v0")(), {}),
    "Pusher2D": (lambda: env("sb3_softq/Pusher2D-v0", goal_x=-1.0)(), {}),
    "a pair of methods": (lambda: DummyVecEnv([Pair] * 2), {}),
    "Dicts": (lambda: SimpleMultiObsEnv(discrete_actions=False), dict(policy="MultiInputPolicy")),
    "hindsight": (
        lambda: BitFlippingEnv(n_bits=4, continuous=True, max_steps=7),
        dict(policy="MultiInputPolicy", replay_buffer_class=HerReplayBuffer),
    ),
    "SAC": (lambda: VecNormalize(DummyVecEnv([env("Pendulum-v1")] * 2)), dict(algorithm=SAC)),
    "TD3": (
        lambda: env("Pendulum-v1")(),
        dict(algorithm=TD3, action_noise=NormalActionNoise(np.zeros(1), 0.1 * np.ones(1))),
    ),
    "compiled": (lambda: env("Pendulum-v1")(), dict(compile=True)),
}


def arguments(case):
    make_env, kwargs = CASES[case]
    return make_env, {"learning_starts": 100, "buffer_size": 2_000, **kwargs}


def digest(*values):
    """Of tensors, arrays, numbers, and what holds them."""
    result = hashlib.sha256()
    todo = list(values)
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            todo += [x for item in value.items() for x in item]
        elif isinstance(value, list | tuple | deque):
            todo += value
        else:
            array = value.detach().numpy() if isinstance(value, th.Tensor) else np.asarray(value)
            result.update(array.tobytes() if array.dtype != object else repr(value).encode())
    return result.hexdigest()


def state_of(model):
    """Networks, optimizers, temperature, buffer, generators, statistics and observations, each by a digest."""
    buffer = model.replay_buffer
    n_rows = buffer.size()
    arrays = [getattr(buffer, name, None) for name in ("observations", "next_observations", "actions", "rewards", "dones")]
    parts = [part for x in arrays for part in (x.values() if isinstance(x, dict) else [x]) if part is not None]
    normalize = model.get_vec_normalize_env()
    statistics = () if normalize is None else (normalize.obs_rms.mean, normalize.ret_rms.var, normalize.returns)
    episodes = [(x["r"], x["l"]) for x in model.ep_info_buffer]
    return {
        "networks and optimizers": digest(model.get_parameters()),
        "temperature": digest(getattr(model, "log_ent_coef", None)),
        "buffer": digest(*(part[:n_rows] for part in parts), buffer.timeouts[:n_rows]),
        "generators": digest(random.getstate(), np.random.get_state(), th.get_rng_state(), model.action_space.sample()),
        "counts": (model.num_timesteps, model._n_updates, model._episode_num, buffer.pos, buffer.full),
        "progress": model._current_progress_remaining,
        "episodes": (digest(model._last_obs), digest(statistics), episodes),
    }


class Kill(BaseCallback):
    """Ends the process as a power cut does, well after a checkpoint."""

    def _on_step(self):
        if self.num_timesteps > 2 * SAVE_FREQ + 16:
            os.kill(os.getpid(), signal.SIGKILL)
        return True


def train(case, path, *callbacks):
    make_env, kwargs = arguments(case)
    # of environments that draw themselves
    np.random.seed(0)
    model = small(env=make_env(), **kwargs)
    return model.learn(N_STEPS, callback=[ResumableCheckpoint(SAVE_FREQ, path), *callbacks])


def train_and_die(case, path):
    th.set_num_threads(1)
    train(case, path, Kill())


def killed(case, path):
    process = multiprocessing.get_context("forkserver").Process(target=train_and_die, args=(case, path))
    process.start()
    process.join(timeout=300)
    exitcode = process.exitcode
    # one that hangs, and is waited for when the tests end
    process.kill()
    assert exitcode == -signal.SIGKILL
    assert 2 * SAVE_FREQ <= steps_done(path) <= 2 * SAVE_FREQ + 8


@pytest.fixture(autouse=True)
def one_thread():
    n_threads = th.get_num_threads()
    th.set_num_threads(1)
    yield
    th.set_num_threads(n_threads)


@pytest.mark.parametrize("case", [pytest.param(x, marks=pytest.mark.slow) if x == "compiled" else x for x in CASES])
def test_resumed_is_uninterrupted(tmp_path, case):
    make_env, kwargs = arguments(case)
    straight = train(case, tmp_path / "straight")
    expected = state_of(straight)
    killed(case, tmp_path / "killed")
    model = resume(kwargs.get("algorithm", SoftQ), tmp_path / "killed", make_env(), device="cpu")
    callback = ResumableCheckpoint(SAVE_FREQ, tmp_path / "killed")
    model.learn(N_STEPS - model.num_timesteps, callback=callback, reset_num_timesteps=False)
    assert state_of(model) == expected
    assert straight._n_updates > 0
    for vec_env in (straight.get_env(), model.get_env()):
        vec_env.close()


def test_without_trust_too(tmp_path):
    expected = state_of(train("Pendulum", tmp_path / "straight"))
    killed("Pendulum", tmp_path / "killed")
    model = resume(SoftQ, tmp_path / "killed", env("Pendulum-v1")(), device="cpu", trusted=False)
    model.learn(N_STEPS - model.num_timesteps, reset_num_timesteps=False)
    # the log's window of past episodes is pickled
    del expected["episodes"]
    assert expected.items() <= state_of(model).items()


def steps(env, actions):
    """All that an environment says."""
    said = []
    for action in actions:
        obs, reward, terminated, truncated, _ = env.step(action)
        said.append(np.append(np.ravel(obs), [reward, terminated, truncated]))
        if terminated or truncated:
            said.append(np.ravel(env.reset()[0]))
    return np.concatenate(said).tobytes()


def travelled(value):
    """As it comes back from a file."""
    arrays = {}
    return decode(encode(value, arrays, "state"), arrays)


MUJOCO = ("Hopper", "Walker2d", "Ant", "Humanoid", "HumanoidStandup", "HalfCheetah", "Swimmer", "InvertedDoublePendulum")
NAMES = ["Acrobot-v1", "CartPole-v1", "MountainCar-v0", "MountainCarContinuous-v0", "Pendulum-v1", "sb3_softq/MultiGoal-v0"]
NAMES += [f"{name}-{version}" for name in MUJOCO for version in ("v4", "v5")]
NAMES += ["Reacher-v4", "Reacher-v5", "Pusher-v5", "InvertedPendulum-v4", "sb3_softq/Pusher2D-v0"]


@pytest.mark.parametrize("name", NAMES)
def test_environments_go_on(name):
    """The same steps in a new environment, over ends of episodes too."""
    make = env(name, **({"goal_x": 1.0} if "Pusher2D" in name else {}))
    old, new = make(), make()
    old.reset(seed=0)
    old.action_space.seed(0)
    actions = [old.action_space.sample() for _ in range(100)]
    steps(old, actions[:37])
    state = travelled(decode(*capture(old)))
    assert refusal(new, state) is None
    restore(new, state)
    assert steps(new, actions) == steps(old, actions)


class Tuned(gym.Wrapper):
    """Changes what it wraps, in attributes that belong to others."""

    def __init__(self, env, factor=1.0):
        super().__init__(env)
        self.factor = factor

    def reset(self, **kwargs):
        self.unwrapped.goal_reached = False
        return super().reset(**kwargs)


class Handle(gym.Wrapper):
    """Keeps something that cannot be saved."""

    def __init__(self, env):
        super().__init__(env)
        self.simulator = object()


class Domain(gym.Wrapper):
    """Another robot in each episode."""

    def reset(self, **kwargs):
        self.unwrapped.model.body_mass[1] *= 1.1
        return super().reset(**kwargs)


class Sleepy(gym.Wrapper):
    """Lets MuJoCo skip bodies that do not move."""

    def __init__(self, env):
        super().__init__(env)
        self.unwrapped.model.opt.enableflags |= int(mujoco.mjtEnableBit.mjENBL_SLEEP)


class View(gym.Wrapper):
    """Looks at MuJoCo's memory through an attribute that it sets anew."""

    def reset(self, **kwargs):
        self.height = self.unwrapped.data.qpos[1:2]
        return super().reset(**kwargs)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: RandomEnv(BOX), "RandomEnv has no get_state"),
        (lambda: Handle(gym.make("Pendulum-v1")), "Handle.simulator is a builtins.object"),
        (lambda: View(gym.make("Hopper-v4")), "View.height shares its memory"),
        (lambda: Sleepy(gym.make("Hopper-v4")), "bodies that may sleep"),
        (lambda: TransformObservation(gym.make("Pendulum-v1"), np.eye(3).dot, None), "TransformObservation"),
    ],
)
def test_what_cannot_be_had_is_said(tmp_path, make, why):
    """For one environment of several, and none is saved."""
    model = small(env=DummyVecEnv([Pair, make]) if "RandomEnv" in why else DummyVecEnv([make]))
    model.env.reset()
    model._last_obs = np.zeros((model.n_envs, 3))
    assert why in save_environments(model, tmp_path / "x.npz")
    assert not (tmp_path / "x.npz").exists()


@pytest.mark.parametrize(
    ("saved", "here", "why"),
    [
        (lambda: Tuned(env("Pendulum-v1")()), env("Pendulum-v1"), "it was .'Tuned', 'Monitor'"),
        (lambda: Tuned(env("Pendulum-v1")()), lambda: Tuned(env("Pendulum-v1")(), 2.0), r"Tuned.factor was 1.0 and is 2.0"),
        (lambda: Domain(gym.make("Hopper-v4")), lambda: Domain(gym.make("Hopper-v4")), "MuJoCo's model is another one"),
    ],
)
def test_another_environment_is_not_put_there(tmp_path, saved, here, why):
    """And begins a new episode, with all others."""
    path = tmp_path / "checkpoints"
    small(env=DummyVecEnv([saved] * 2)).learn(20, callback=ResumableCheckpoint(10, path))
    with pytest.warns(UserWarning, match=f"New episodes begin.*environment 0: {why}"):
        model = resume(SoftQ, path, DummyVecEnv([here] * 2))
    assert model._last_obs is None
    assert model.replay_buffer.dones[9].all()
    model.learn(10, reset_num_timesteps=False)


def test_what_wrappers_set_elsewhere_belongs_to_the_state():
    old, new = Tuned(env("Pendulum-v1")()), Tuned(env("Pendulum-v1")())
    old.reset(seed=0)
    old.unwrapped.goal_reached = True
    assert refusal(new, travelled(decode(*capture(old)))) is None
    restore(new, travelled(decode(*capture(old))))
    assert new.unwrapped.goal_reached


class Scaled(gym.Wrapper):
    """Pays what a dict says that others hold too."""

    def __init__(self, environment, level):
        super().__init__(environment)
        self.level = self.log = level
        self.noise = np.random.default_rng(0)

    def step(self, action):
        obs, _, *rest = super().step(action)
        self.log["seen"].append(len(self.log["seen"]))
        return obs, self.level["value"] + self.noise.random(), *rest


class ScaledAnew(Scaled):
    def reset(self, **kwargs):
        self.level = self.log = {"value": 0.0, "seen": [0]}
        return super().reset(**kwargs)


class Curriculum(BaseCallback):
    def __init__(self, level):
        super().__init__()
        self.level = level
        self.rewards = []

    def _on_step(self):
        self.rewards.append(float(self.locals["rewards"][0]))
        self.level["value"] = float(self.num_timesteps)
        return True


def test_what_a_callback_shares_with_the_environment_stays_shared(tmp_path):
    def new():
        level = {"value": 0.0, "seen": []}
        return Scaled(gym.make("Pendulum-v1"), level), Curriculum(level)

    environment, curriculum = new()
    small(env=environment, learning_starts=500).learn(60, callback=curriculum)
    expected = curriculum.rewards
    environment, curriculum = new()
    small(env=environment, learning_starts=500).learn(40, callback=[curriculum, ResumableCheckpoint(1000, tmp_path)])
    assert curriculum.rewards == expected[:40]
    environment, curriculum = new()
    resumed = resume(SoftQ, tmp_path, environment)
    assert environment.level is environment.log is curriculum.level
    resumed.learn(20, callback=curriculum, reset_num_timesteps=False)
    assert curriculum.rewards == expected[40:]
    assert curriculum.level["seen"] == list(range(60))


def test_what_a_method_has_made_for_two_attributes_is_said(tmp_path):
    environment = ScaledAnew(gym.make("Pendulum-v1"), {})
    small(env=environment, learning_starts=500).learn(40, callback=ResumableCheckpoint(1000, tmp_path))
    with pytest.warns(UserWarning, match="New episodes begin.* is the same object as another attribute"):
        resume(SoftQ, tmp_path, ScaledAnew(gym.make("Pendulum-v1"), {}))


class Counts(gym.Wrapper):
    """Pays less for what was often seen, in dicts of other classes."""

    def __init__(self, environment, factory=int):
        super().__init__(environment)
        self.factory = factory

    def reset(self, **kwargs):
        self.visits, self.order, self.counter = defaultdict(self.factory), OrderedDict(), Counter()
        return super().reset(**kwargs)

    def step(self, action):
        obs, _, *rest = super().step(action)
        cell = tuple(np.round(obs).tolist())
        self.visits[cell] += 1
        self.order[cell] = self.order.pop(cell, 0) + 1
        self.counter.update([cell])
        first = next(iter(self.order.values()))
        return obs, 1.0 / self.visits[cell] + first + self.counter.most_common(1)[0][1], *rest


def test_dicts_of_other_classes_come_back(tmp_path):
    def rewards(model, n):
        record = Curriculum({})
        model.learn(n, callback=[record, ResumableCheckpoint(1000, tmp_path)], reset_num_timesteps=False)
        return record.rewards

    straight = rewards(small(env=Counts(gym.make("Pendulum-v1")), learning_starts=500), 60)
    first = rewards(small(env=Counts(gym.make("Pendulum-v1")), learning_starts=500), 40)
    resumed = resume(SoftQ, tmp_path, Counts(gym.make("Pendulum-v1")))
    assert first + rewards(resumed, 20) == straight


@pytest.mark.parametrize(
    ("make_env", "reason"),
    [
        (lambda: TransformReward(gym.make("Pendulum-v1"), lambda reward: float(reward) / 10), None),
        (lambda: Counts(gym.make("Pendulum-v1"), lambda: 0), "Counts.visits is a defaultdict of"),
    ],
)
def test_what_cannot_be_pickled_ends_no_process(tmp_path, make_env, reason):
    """The environments are asked for their names and states, which have lambdas in them."""
    vec_env = SubprocVecEnv([make_env] * 2, start_method="fork")
    model = small(env=vec_env, learning_starts=500).learn(40, callback=ResumableCheckpoint(20, tmp_path))
    assert model.num_timesteps == 40
    assert vec_env.env_method("get_wrapper_attr", "unwrapped") is not None
    vec_env.close()
    if reason is not None:
        with pytest.warns(UserWarning, match=f"New episodes begin.*{reason}"):
            resume(SoftQ, tmp_path, DummyVecEnv([make_env] * 2))


class Interrupted(gym.Wrapper):
    def step(self, action):
        result = super().step(action)
        if self.get_wrapper_attr("total_steps") == 50:
            raise KeyboardInterrupt
        return result


@pytest.mark.parametrize("algorithm", [SoftQ, SAC])
def test_stopped_by_a_callback(tmp_path, algorithm):
    """The last step is stored: the episode goes on."""
    model = small(algorithm, env=env("Pendulum-v1")(), buffer_size=500, train_freq=3)
    model.learn(100, callback=[ResumableCheckpoint(1_000, tmp_path), StopAfter(50)])
    resumed = resume(algorithm, tmp_path, env("Pendulum-v1")())
    assert resumed.num_timesteps == resumed.replay_buffer.size() == 50
    resumed.learn(10, reset_num_timesteps=False)
    buffer = resumed.replay_buffer
    assert not buffer.dones[:60].any()
    np.testing.assert_array_equal(buffer.observations[50], buffer.next_observations[49])
    np.testing.assert_array_equal(buffer.next_observations[:50], model.replay_buffer.next_observations[:50])


@pytest.mark.parametrize("algorithm", [SoftQ, SAC])
def test_interrupted_in_the_middle_of_a_rollout(tmp_path, algorithm):
    """Environment and buffer are not at the same moment, and a new episode begins."""
    checkpoint = ResumableCheckpoint(1_000, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        small(algorithm, env=Interrupted(env("Pendulum-v1")()), buffer_size=500).learn(100, callback=checkpoint)
    checkpoint.save()
    assert not (latest(tmp_path) / ENVIRONMENTS).exists()
    model = resume(algorithm, tmp_path, Interrupted(env("Pendulum-v1")()))
    assert model.replay_buffer.dones[model.replay_buffer.pos - 1].all()


class Signal(BaseCallback):
    """In the middle of a rollout, which ends before the process does."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def _on_step(self):
        if self.num_timesteps - self.model.n_envs < 101 <= self.num_timesteps:
            os.kill(os.getpid(), self.number)
        return True


@pytest.mark.parametrize(("number", "ending"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
@pytest.mark.parametrize("case", ["Pendulum", "Hopper x 4", "SAC"])
def test_a_signal_is_no_interruption_of_the_computation(tmp_path, case, number, ending, monkeypatch):
    make_env, kwargs = arguments(case)
    monkeypatch.setitem(CASES, case, (make_env, {"train_freq": 5, **kwargs}))
    expected = state_of(train(case, tmp_path / "straight"))
    handler = signal.signal(number, HANDLERS[number])
    try:
        with pytest.raises(ending):
            train(case, tmp_path / "ended", Signal(number))
    finally:
        signal.signal(number, handler)
    model = resume(kwargs.get("algorithm", SoftQ), tmp_path / "ended", make_env(), device="cpu")
    assert 101 <= model.num_timesteps < 125
    model.learn(N_STEPS - model.num_timesteps, reset_num_timesteps=False)
    assert state_of(model) == expected


class Breaking(Pair):
    """Fails in the middle of an episode, and can be asked for its state before."""

    life = 0

    def __init__(self, fault=None):
        super().__init__()
        self.fault = fault

    def step(self, action):
        self.life += 1
        if self.fault is not None and self.life == 50:
            self.fault()
        return super().step(action)


def raises():
    raise ZeroDivisionError("the simulator is broken")


@pytest.mark.parametrize(
    ("vec_env", "fault"),
    [
        (DummyVecEnv, raises),
        (SubprocVecEnv, raises),
        (SubprocVecEnv, lambda: os._exit(7)),
        (SubprocVecEnv, lambda: time.sleep(1000)),
    ],
)
def test_a_new_episode_begins_after_an_error(tmp_path, vec_env, fault):
    """The environments are not asked any more: one of them may not answer."""
    options = {"start_method": "fork"} if vec_env is SubprocVecEnv else {}
    broken = vec_env([Breaking, lambda: Breaking(fault)], **options)
    if options:
        set_timeout(broken, 1.0)
    model = small(env=broken, buffer_size=500)
    with pytest.raises(FaultyEnvironmentError, match="Environment 1 failed at step 100"):
        model.learn(200, callback=ResumableCheckpoint(40, tmp_path))
    before, last = sorted(folder for folder in tmp_path.iterdir() if folder.is_dir())
    assert (before / ENVIRONMENTS).exists()
    assert not (last / ENVIRONMENTS).exists()
    resumed = resume(SoftQ, tmp_path, DummyVecEnv([Breaking] * 2))
    assert resumed._last_obs is None
    assert resumed.num_timesteps == 98
    old, new = model.replay_buffer, resumed.replay_buffer
    assert old.size() == new.size() == 49
    for name in ("observations", "next_observations", "actions", "rewards"):
        np.testing.assert_array_equal(getattr(new, name)[:49], getattr(old, name)[:49])
    # an episode has 20 steps; the last one is cut off, as by a time limit
    ends = [19, 39, 48]
    assert [np.flatnonzero(new.dones[:49, i]).tolist() for i in range(2)] == [ends] * 2
    assert new.timeouts[48].all()
    resumed.learn(20, callback=ResumableCheckpoint(40, tmp_path), reset_num_timesteps=False)
    assert (new.observations[49] != new.next_observations[48]).any(axis=1).all()
    again = resume(SoftQ, tmp_path, DummyVecEnv([Breaking] * 2))
    assert again.num_timesteps == 118
    np.testing.assert_array_equal(again.replay_buffer.dones[:59], new.dones[:59])
    np.testing.assert_array_equal(again.replay_buffer.observations[:59], new.observations[:59])


def test_processes_that_end_between_rollouts(tmp_path):
    """What was learned is saved, and the next step says what has happened."""

    class Killer(BaseCallback):
        def _on_step(self):
            return True

        def _on_rollout_end(self):
            if self.num_timesteps == 60:
                self.training_env.processes[1].kill()

    model = small(env=SubprocVecEnv([Breaking] * 3, start_method="fork"), buffer_size=500, train_freq=10)
    with pytest.raises(FaultyEnvironmentError, match=r"Environment 1 failed .* was killed by SIGKILL"):
        model.learn(200, callback=[ResumableCheckpoint(20, tmp_path, on_disk_error="continue"), Killer()])
    assert steps_done(tmp_path) == model.num_timesteps == 60


class Keeps(gym.Wrapper):
    """Something that nobody knows how to save."""

    def __init__(self, env):
        super().__init__(env)
        self.filter = iter(range(10))


def test_what_could_not_be_saved_is_said(tmp_path):
    """What a wrapper has learned may be lost with it."""
    small(env=Keeps(gym.make("Pendulum-v1"))).learn(40, ResumableCheckpoint(1000, tmp_path))
    with pytest.warns(UserWarning, match=r"New episodes begin, .* environment 0: Keeps.filter is a builtins.range_iterator"):
        model = resume(SoftQ, tmp_path, Keeps(gym.make("Pendulum-v1")))
    assert model._last_obs is None


def test_an_environment_that_cannot_take_its_state(tmp_path):
    class Broken(Pair):
        def set_state(self, state):
            raise KeyError("t")

    model = small(env=DummyVecEnv([Pair] * 2)).learn(20)
    assert save_environments(model, tmp_path / "x.npz") is None
    other = small(env=DummyVecEnv([Pair, type("Pair", (Broken,), {})]))
    assert restore_environments(other, tmp_path / "x.npz") == "environment 1: KeyError: 't'"
    assert other._last_obs is None


def test_values_come_back():
    value = {
        "a": [None, True, 1, 1.5, float("inf"), "b", (1, 2), {3: 4}, [0.1] * 40],
        "n": (np.float32(0.1), np.arange(6).reshape(2, 3), np.zeros((0, 2)), deque([1, 2], maxlen=2)),
    }
    back = travelled(value)
    assert repr(back) == repr(value)
    generator = np.random.default_rng(3)
    assert travelled([generator])[0].random() == generator.random()
    with pytest.raises(OpaqueError, match=r"x\['a'\]\[1\] is a builtins.object"):
        encode({"a": [1, object()]}, {}, "x")
