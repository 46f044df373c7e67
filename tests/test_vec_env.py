"""RayVecEnv on a real Ray runtime: the same trajectories as DummyVecEnv, and actors that die."""

import logging
import os
import signal
import threading
import time
from copy import deepcopy
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_softq import SoftQ
from tests.conftest import assert_same
from tests.test_faults import BAD_STEP, agent, check_saved, environments, fails

ray = pytest.importorskip("ray")
from sb3_softq.vec_env import RayVecEnv  # noqa: E402

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module", autouse=True)
def cluster():
    with pytest.MonkeyPatch.context() as patch:
        # Ray's processes would wait for the other tests on busy cores
        patch.setenv("RAY_worker_niceness", "0")
        ray.init(num_cpus=2, include_dashboard=False)
    yield
    ray.shutdown()


class Probe(gym.Env):
    """Knows its process and counts its steps."""

    observation_space = spaces.Box(-1.0, 1.0, (2,))
    action_space = spaces.Box(-1.0, 1.0, (1,))
    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012
    difficulty = 1.0

    def __init__(self, render_mode="rgb_array"):
        self.render_mode = render_mode
        self.pid = os.getpid()
        self.lock = (step for step in ())  # cannot be pickled

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.np_random.uniform(size=2).astype(np.float32), {"options": options}

    def step(self, action):
        if action[0] > 1.5:
            raise RuntimeError("too far")
        self.t += 1
        return self.np_random.uniform(size=2).astype(np.float32), self.difficulty, False, self.t == 5, {}

    def add(self, a, b=0):
        return a + b + self.difficulty

    def render(self):
        return np.full((4, 4, 3), 100 * self.difficulty, dtype=np.uint8)


@pytest.fixture
def probes():
    env = RayVecEnv([Probe] * 3, n_actors=2)
    yield env
    env.close()


class Sampled(gym.Env):
    """Observations are samples of the space."""

    action_space = spaces.Discrete(2)

    def __init__(self, space):
        self.observation_space = deepcopy(space)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), float(action), bool(action), False, {}


BOX, IMAGE = spaces.Box(0.0, 1.0, (2,)), spaces.Box(0, 255, (8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("env_id", "n_actors", "steps"),
    [
        ("Hopper-v4", 2, 100),
        ("Pendulum-v1", 1, 210),
        (lambda: Sampled(spaces.Dict({"a": BOX, "b": spaces.Discrete(5)})), 3, 20),
        (lambda: Sampled(IMAGE), None, 20),
        (lambda: Sampled(spaces.Tuple((BOX, spaces.Discrete(5)))), 2, 20),
    ],
    ids=["mujoco", "truncation", "dict", "image", "tuple"],
)
def test_same_trajectories_as_dummy_vec_env(env_id, n_actors, steps):
    envs = [
        make_vec_env(env_id, n_envs=3, seed=3, vec_env_cls=cls, vec_env_kwargs=kwargs)
        for cls, kwargs in [(DummyVecEnv, {}), (RayVecEnv, dict(n_actors=n_actors))]
    ]
    dummy, remote = envs
    assert remote.observation_space == dummy.observation_space
    assert remote.action_space == dummy.action_space
    assert_same(remote.reset(), dummy.reset())
    dummy.action_space.seed(0)
    ends = 0
    for _ in range(steps):
        actions = np.stack([dummy.action_space.sample() for _ in range(3)])
        (obs, rewards, dones, infos), expected = remote.step(actions), dummy.step(actions)
        assert_same((obs, rewards, dones), expected[:3])
        for info, other in zip(infos, expected[3], strict=True):
            if "episode" in info:
                # seconds
                info["episode"].pop("t"), other["episode"].pop("t")
            assert_same(info, other)
        assert_same(remote.reset_infos, dummy.reset_infos)
        ends += dones.sum()
    assert ends > 0
    for env in envs:
        env.close()


def test_questions(probes):
    pids = probes.get_attr("pid")
    assert pids[0] == pids[1] != pids[2]
    assert os.getpid() not in pids
    probes.set_attr("difficulty", 2.0, indices=[0, 2])
    assert probes.get_attr("difficulty", indices=[2, 1]) == [2.0, 1.0]
    assert probes.get_attr("difficulty", indices=-1) == [2.0]
    assert probes.env_method("add", 3, b=4) == [9.0, 8.0, 9.0]
    assert probes.env_method("add", 1, indices=1) == [2.0]
    assert probes.env_is_wrapped(Monitor, indices=[0, 1]) == [False] * 2
    assert probes.has_attr("lock")
    assert not probes.has_attr("key")
    with pytest.raises(AttributeError):
        probes.get_attr("key")
    with pytest.raises(IndexError):
        probes.get_attr("pid", indices=3)
    assert [int(image[0, 0, 0]) for image in probes.get_images()] == [200, 100, 200]
    assert probes.render().shape == (8, 8, 3)
    probes.set_options([{"start": i} for i in range(3)])
    probes.reset()
    assert [info["options"] for info in probes.reset_infos] == [{"start": i} for i in range(3)]
    probes.reset()
    assert [info["options"] for info in probes.reset_infos] == [None] * 3


def test_an_error_of_the_environment_is_not_a_death(probes):
    probes.reset()
    with pytest.raises(RuntimeError, match="too far"):
        probes.step(np.full((3, 1), 2.0))
    assert probes.n_restarts == 0


def kill(env, index):
    os.kill(env.get_attr("pid", index)[0], signal.SIGKILL)


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
@pytest.mark.parametrize("when", ["step", "question", "reset", "between"])
def test_an_actor_that_dies_is_started_again(probes, caplog, when):
    actions = np.zeros((3, 1))
    probes.seed(0)
    first = probes.reset()
    probes.set_attr("difficulty", 3.0, indices=[0])
    obs = probes.step(actions)[0]
    pids = probes.get_attr("pid")
    with caplog.at_level(logging.WARNING, logger="sb3_softq.vec_env"):
        if when == "step":
            probes.step_async(actions)
            os.kill(pids[0], signal.SIGKILL)
            # the step may have been made before the signal came
            probes.step_wait()
            result = probes.step(actions) if probes.n_restarts == 0 else None
        else:
            os.kill(pids[0], signal.SIGKILL)
            if when == "question":
                assert probes.get_attr("difficulty") == [3.0, 1.0, 1.0]
                assert probes.n_restarts == 1
            if when == "reset":
                probes.reset()
            result = probes.step(actions)
    assert "Actor 0 with environments 0 to 1 died" in caplog.text
    assert probes.n_restarts == 1
    if when == "reset":
        # nothing was lost
        assert not result[2].any()
    elif result is not None:
        new_obs, rewards, dones, infos = result
        assert dones.tolist() == [True, True, False]
        assert rewards.tolist() == [0.0, 0.0, 1.0]
        if when != "step":
            np.testing.assert_array_equal(np.stack([info["terminal_observation"] for info in infos[:2]]), obs[:2])
        assert all(info["TimeLimit.truncated"] and info["actor_restarted"] for info in infos[:2])
        assert "terminal_observation" not in infos[2]
        # an episode that has not been before
        assert np.abs(new_obs[:2] - first[:2]).min() > 1e-6
    assert probes.get_attr("pid")[0] != pids[0]
    assert probes.get_attr("pid")[2] == pids[2]
    # what was set is set again, and the environments go on
    assert probes.step(actions)[1].tolist() == [3.0, 1.0, 1.0]


class Killer(BaseCallback):
    """Kills an actor at step 48."""

    def _on_step(self) -> bool:
        if self.num_timesteps == 48:
            kill(self.training_env, 0)
        return True


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
@pytest.mark.parametrize("algorithm", [SoftQ, PPO])
def test_training_goes_on(algorithm, caplog):
    env = make_vec_env(Probe, n_envs=4, seed=0, vec_env_cls=RayVecEnv, vec_env_kwargs=dict(n_actors=2))
    kwargs = dict(n_steps=20) if algorithm is PPO else dict(learning_starts=20, gradient_steps=1)
    model = algorithm("MlpPolicy", VecNormalize(env), seed=0, device="cpu", **kwargs)
    model.learn(80, Killer())
    assert model.num_timesteps == 80
    assert env.env_is_wrapped(Monitor) == [True] * 4
    assert len(model.ep_info_buffer) > 0
    assert env.n_restarts == 1
    assert "its episodes are truncated" in caplog.text
    if algorithm is SoftQ:
        buffer = model.replay_buffer
        # episodes of 5 steps end at every fifth; those of the first actor end in step 13 as well, and begin anew
        assert buffer.timeouts[12, :2].all()
        assert buffer.dones[12].tolist() == [1, 1, 0, 0]
        assert buffer.rewards[12].tolist() == [0, 0, 1, 1]
        assert np.flatnonzero(buffer.dones[:20, 0]).tolist() == [4, 9, 12, 17]
        assert np.flatnonzero(buffer.dones[:20, 2]).tolist() == [4, 9, 14, 19]
    env.close()


def test_an_actor_that_cannot_start(tmp_path):
    flag = tmp_path / "fails"

    def make_env():
        if flag.exists():
            raise RuntimeError("no licence")
        return Probe()

    env = RayVecEnv([make_env])
    env.reset()
    flag.touch()
    kill(env, 0)
    with pytest.raises(ray.exceptions.RayActorError, match="no licence"):
        env.step(np.zeros((1, 1)))
    env.close()
    with pytest.raises(ray.exceptions.RayActorError, match="no licence"):
        RayVecEnv([make_env])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(env_fns=[]), "env_fns"),
        (dict(n_actors=4), "n_actors=4"),
        (dict(n_actors=0), "n_actors=0"),
        (dict(start_timeout=0), "start_timeout=0"),
        (dict(timeout=0), "timeout=0"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        RayVecEnv(**({"env_fns": [Probe] * 3} | kwargs))


def test_no_room_for_an_actor():
    with pytest.raises(TimeoutError, match="start_timeout=2 seconds"):
        RayVecEnv([Probe], actor_options={"num_cpus": 64}, start_timeout=2)
    # for the second one, which VecEnv would ask a question before it was waited for
    n_cpus = ray.cluster_resources()["CPU"]
    with pytest.raises(TimeoutError, match="start_timeout=5 seconds"):
        RayVecEnv([Probe] * 2, n_actors=2, actor_options={"num_cpus": n_cpus}, start_timeout=5)
    # as many as there is room for
    env = RayVecEnv([Probe] * 2, actor_options={"num_cpus": n_cpus})
    assert len(env._actors) == 1
    env.close()


class Hanging(Probe):
    """Waits for a file to go away: at the third step, in a reset, or in a question."""

    def __init__(self, flag=None, when="step", index=0):
        super().__init__()
        self.flag, self.when, self.index = flag, when, index

    def wait(self, when):
        while when == self.when and self.index == 1 and self.flag.exists():
            time.sleep(0.1)

    def reset(self, **kwargs):
        self.wait("reset")
        return super().reset(**kwargs)

    def step(self, action):
        if self.t == 2:
            self.wait("step")
        return super().step(action)

    def add(self, a, b=0):
        self.wait("question")
        return super().add(a, b)


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for a process as Linux does")
@pytest.mark.parametrize("when", ["step", "reset", "question"])
def test_an_actor_that_hangs_is_started_again(tmp_path, caplog, when):
    flag = tmp_path / "hangs"
    env = RayVecEnv([partial(Hanging, flag, when, i) for i in range(4)], n_actors=2, timeout=3)
    env.seed(0)
    env.reset()
    obs = env.step(np.zeros((4, 1)))[0]
    env.step(np.zeros((4, 1)))
    pids = env.get_attr("pid")
    flag.touch()
    # the one that is started again does not hang
    threading.Timer(4, flag.unlink).start()
    begin = time.monotonic()
    with caplog.at_level(logging.WARNING, logger="sb3_softq.vec_env"):
        if when == "step":
            obs, rewards, dones, infos = env.step(np.zeros((4, 1)))
            assert dones.tolist() == [True, True, False, False]
            assert rewards.tolist() == [0.0, 0.0, 1.0, 1.0]
            assert all(info["TimeLimit.truncated"] and info["actor_restarted"] for info in infos[:2])
        elif when == "reset":
            env.reset()
        else:
            assert env.env_method("add", 1) == [2.0] * 4
    assert 3 <= time.monotonic() - begin < 60
    assert "Actor 0 with environments 0 to 1 hung for 3 s and is started again" in caplog.text
    assert env.n_restarts == 1
    assert env.get_attr("pid")[0] != pids[0]
    assert env.get_attr("pid")[2] == pids[2]
    # it is dead, not waiting somewhere
    while Path(f"/proc/{pids[0]}").exists():
        assert time.monotonic() - begin < 60
        time.sleep(0.1)
    assert env.step(np.zeros((4, 1)))[0].shape == obs.shape
    env.close()


def test_an_actor_that_always_hangs(tmp_path):
    flag = tmp_path / "hangs"
    flag.touch()
    env = RayVecEnv([partial(Hanging, flag, "reset", i) for i in range(2)], n_actors=1, timeout=1)
    with pytest.raises(TimeoutError, match=r"environments 0 to 1 has not answered reset\(\) within timeout=1 seconds, and"):
        env.reset()
    flag.unlink()
    env.close()


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("fault", ["raises", "shape (1,)", "NaN"])
def test_faults_name_the_environment(tmp_path, fault, discrete):
    """Counted over all actors."""
    env = environments(fault, 4, partial(RayVecEnv, n_actors=2), bad=3, discrete=discrete)
    model = agent(env)
    error = fails(model, tmp_path, rf"nvironment 3 .*at step {4 * BAD_STEP}: ")
    if fault == "raises":
        assert isinstance(error.__cause__, ZeroDivisionError)
        assert "the simulator is broken" in str(error)
    assert env.n_restarts == 0
    check_saved(tmp_path, model)
    env.close()


def test_close_twice(probes):
    probes.close()
    probes.close()
