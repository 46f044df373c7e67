"""Checkpoints: what is restored, and what is left when a save is killed."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import SimpleMultiObsEnv
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize, VecTransposeImage

from sb3_softq import SoftQ, checkpoint
from sb3_softq.checkpoint import ResumableCheckpoint, has_checkpoint, latest, resume, steps_done
from sb3_softq.checkpointing import manifest
from sb3_softq.checkpointing.folders import HOLDER, LOCK, TEMPORARY
from sb3_softq.data import from_agent
from tests.conftest import RandomEnv, flat, small

ROOT = Path(__file__).parent.parent
# Saves as fast as it can, and says so once there is something to resume from
SAVE_IN_A_LOOP = """
import sys
import gymnasium as gym
from sb3_softq import SoftQ
from sb3_softq.checkpoint import ResumableCheckpoint

class Talking(ResumableCheckpoint):
    def save(self):
        print(super().save(), flush=True)

model = SoftQ("MlpPolicy", gym.make("Pendulum-v1"), policy_kwargs=dict(net_arch=[8]), batch_size=8, buffer_size=20_000)
model.learn(10_000, callback=Talking(1, sys.argv[1]))
"""


def pendulum():
    return gym.make("Pendulum-v1")


def make(env=None, cls=SoftQ, **kwargs):
    return small(cls, env=env or pendulum(), **{"buffer_size": 500, "learning_starts": 20, **kwargs})


def train(path, steps=60, save_freq=10_000, **kwargs):
    model = make(**kwargs)
    return model.learn(steps, callback=ResumableCheckpoint(save_freq, path))


def reload(path, env=None, cls=SoftQ, **kwargs):
    return resume(cls, path, env or pendulum(), **kwargs)


def left(path):
    """Checkpoints in a folder, and whatever else is not the lock."""
    return sorted(file.name for file in path.iterdir() if file.name not in (LOCK, HOLDER))


def two_checkpoints(path, **kwargs):
    """At 30 and 60 steps."""
    model = train(path, steps=60, save_freq=30, **kwargs)
    assert left(path) == ["checkpoint-1-step30", "checkpoint-2-step60"]
    return model


@pytest.mark.parametrize("cls", [SoftQ, SAC])
def test_round_trip(tmp_path, cls):
    model = train(tmp_path, cls=cls)
    expected = random.random(), np.random.rand(), th.rand(1).item(), model.action_space.sample().item()
    resumed = reload(tmp_path, cls=cls)
    assert expected == (random.random(), np.random.rand(), th.rand(1).item(), resumed.action_space.sample().item())
    assert resumed.num_timesteps == steps_done(tmp_path) == 60
    assert resumed._n_updates == model._n_updates > 0
    th.testing.assert_close(flat(resumed.policy), flat(model.policy), rtol=0, atol=0)
    th.testing.assert_close(resumed.log_ent_coef, model.log_ent_coef, rtol=0, atol=0)
    assert resumed.replay_buffer.size() == model.replay_buffer.size() == 60
    for name in ("observations", "next_observations", "actions", "rewards"):
        np.testing.assert_array_equal(getattr(resumed.replay_buffer, name), getattr(model.replay_buffer, name))


def test_training_goes_on(tmp_path):
    original, copy = tmp_path / "original", tmp_path / "copy"
    train(original)
    results = []
    for _ in range(2):
        shutil.copytree(original, copy)
        model = reload(copy)
        model.learn(40, callback=ResumableCheckpoint(15, copy), reset_num_timesteps=False)
        assert model.num_timesteps == steps_done(copy) == model.replay_buffer.size() == 100
        assert model._total_timesteps == 100
        results.append(flat(model.policy))
        shutil.rmtree(copy)
    # every random generator is restored: the same steps come again
    th.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def opaque():
    """Of which no state can be had."""
    return RandomEnv(spaces.Box(-1.0, 1.0, (1,), dtype=np.float32))


def test_episodes_begin_anew_where_the_state_cannot_be_had(tmp_path):
    model = train(tmp_path, steps=50, env=opaque(), n_steps=3)
    resumed = reload(tmp_path, opaque())
    buffer = resumed.replay_buffer
    # cut off, as by a time limit
    assert buffer.dones[49].all()
    assert buffer.timeouts[49].all()
    assert not model.replay_buffer.dones[49].any()
    resumed.learn(1, reset_num_timesteps=False)
    # not the first one again, which the seed would bring
    assert not np.allclose(buffer.observations[50], buffer.observations[0])
    assert not np.allclose(buffer.observations[50], buffer.next_observations[49])


@pytest.mark.parametrize("kwargs", [{}, dict(n_steps=3), dict(n_steps=1, train_freq=(7, "step"))])
def test_saves_between_rollouts(tmp_path, kwargs):
    """Buffer and step count belong together, and the trajectory goes on."""
    saved = []

    class Recording(ResumableCheckpoint):
        def save(self):
            saved.append((model.num_timesteps, model.replay_buffer.size()))
            return super().save()

    model = make(**kwargs)
    model.learn(70, callback=Recording(25, tmp_path))
    assert len(saved) == 3
    assert all(steps == size for steps, size in saved)
    buffer = reload(tmp_path).replay_buffer
    assert buffer.size() == model.num_timesteps
    assert not buffer.dones.any()
    assert not buffer.timeouts.any()


@pytest.mark.parametrize("wrapped", [True, False])
def test_vec_normalize(tmp_path, wrapped):
    model = train(tmp_path, env=VecNormalize(DummyVecEnv([pendulum])))
    env = DummyVecEnv([pendulum])
    resumed = reload(tmp_path, VecNormalize(env) if wrapped else env)
    old, new = model.get_vec_normalize_env(), resumed.get_vec_normalize_env()
    assert new.obs_rms.count == old.obs_rms.count > 60
    np.testing.assert_array_equal(new.obs_rms.mean, old.obs_rms.mean)
    np.testing.assert_array_equal(new.ret_rms.var, old.ret_rms.var)
    resumed.learn(10, reset_num_timesteps=False)
    assert new.obs_rms.count > old.obs_rms.count


def test_vec_normalize_of_rewards(tmp_path):
    model = train(tmp_path, env=VecNormalize(DummyVecEnv([pendulum]), norm_obs=False))
    resumed = reload(tmp_path, VecNormalize(DummyVecEnv([pendulum]), norm_obs=False))
    assert resumed.get_vec_normalize_env().ret_rms.var == model.get_vec_normalize_env().ret_rms.var
    with pytest.raises(ValueError, match=r"VecNormalize\(norm_obs=True\) is not allowed: it must be False"):
        reload(tmp_path, VecNormalize(DummyVecEnv([pendulum])))


def test_vec_normalize_of_some_observations(tmp_path):
    def normalized(keys):
        env = DummyVecEnv([lambda: SimpleMultiObsEnv(num_row=2, num_col=2, discrete_actions=False)])
        return VecNormalize(VecTransposeImage(env), norm_obs_keys=keys)

    model = small(policy="MultiInputPolicy", env=normalized(["vec"]), width=None)
    model.learn(30, ResumableCheckpoint(10, tmp_path))
    assert resume(SoftQ, tmp_path, normalized(["vec"]), device="cpu").num_timesteps == 30
    with pytest.raises(ValueError, match=r"VecNormalize\(norm_obs_keys=\['img', 'vec'\]\) is not allowed: .* \['vec'\]"):
        resume(SoftQ, tmp_path, normalized(["vec", "img"]), device="cpu")


def test_what_cannot_be_saved_there(tmp_path):
    with pytest.raises(ValueError, match="path=5 is not allowed: it must be a path"):
        ResumableCheckpoint(5, 5)
    with pytest.raises(ValueError, match=r"model=.*PPO.* is not allowed: it must be an off-policy algorithm, which has a"):
        PPO("MlpPolicy", "Pendulum-v1").learn(8, ResumableCheckpoint(5, tmp_path))


def test_several_environments(tmp_path):
    train(tmp_path, save_freq=10, env=DummyVecEnv([pendulum] * 3))
    resumed = reload(tmp_path, DummyVecEnv([pendulum] * 3))
    assert resumed.replay_buffer.pos == 20
    assert resumed.learn(30, reset_num_timesteps=False).num_timesteps == 90


@pytest.mark.parametrize("algorithm", [SoftQ, SAC])
def test_going_on_after_the_end_is_nothing(tmp_path, algorithm):
    """The last rollout of several environments goes beyond it."""
    make = partial(make_vec_env, "Pendulum-v1", n_envs=3)
    small(algorithm, env=make()).learn(100, ResumableCheckpoint(1000, tmp_path))
    model = resume(algorithm, tmp_path, make())
    assert model.num_timesteps == 102
    model.learn(100 - model.num_timesteps, reset_num_timesteps=False)
    assert model.num_timesteps == 102


def test_numbers_of_numpy_among_the_settings(tmp_path):
    env = VecNormalize(make_vec_env("Pendulum-v1"), gamma=np.float32(0.9), clip_obs=np.int64(3))
    kwargs = dict(net_arch=[8], optimizer_kwargs=dict(weight_decay=np.float32(1e-4)))
    small(env=env, policy_kwargs=kwargs).learn(30, ResumableCheckpoint(20, tmp_path))
    model = resume(SoftQ, tmp_path, make_vec_env("Pendulum-v1"))
    assert model.get_vec_normalize_env().gamma == pytest.approx(0.9)
    assert model.actor.optimizer.param_groups[0]["weight_decay"] == pytest.approx(1e-4)


def test_an_environment_that_changes_the_working_directory(tmp_path, monkeypatch):
    class Wanders(gym.Wrapper):
        def step(self, action):
            os.makedirs("elsewhere", exist_ok=True)
            os.chdir("elsewhere")
            return super().step(action)

    monkeypatch.chdir(tmp_path)
    small(env=Wanders(gym.make("Pendulum-v1"))).learn(6, ResumableCheckpoint(2, "checkpoints"))
    assert steps_done(tmp_path / "checkpoints") == 6
    assert len(list(tmp_path.rglob("checkpoint-*"))) == 2


def test_resume_tells_of_logged_data(tmp_path):
    data = list(from_agent(small().learn(40)))
    small().set_data(data).learn(30, ResumableCheckpoint(1000, tmp_path / "with"))
    small().set_data(data).set_data(None).learn(30, ResumableCheckpoint(1000, tmp_path / "without"))
    with pytest.warns(UserWarning, match=r"Logged data are not in a checkpoint: set_data"):
        resume(SoftQ, tmp_path / "with", "Pendulum-v1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resume(SoftQ, tmp_path / "without", "Pendulum-v1")


def test_a_replay_buffer_of_another_number_of_environments(tmp_path):
    small(env=make_vec_env("Pendulum-v1", n_envs=2)).learn(40).save_replay_buffer(tmp_path / "buffer.pkl")
    model = small(env="Pendulum-v1")
    model.load_replay_buffer(tmp_path / "buffer.pkl")
    with pytest.raises(ValueError, match=r"n_envs=2 is not allowed for learn\(\): it must be n_envs=1"):
        model.learn(10)


def test_who_asks_while_a_checkpoint_is_replaced_sees_one(tmp_path, monkeypatch):
    """With keep=1 the newest one that was seen may be gone when it is read."""
    model = small(env="Pendulum-v1")
    callback = ResumableCheckpoint(10, tmp_path, keep=1)
    model.learn(20, callback)
    read = manifest.read
    replaced = []

    def read_late(folder):
        if not replaced:
            replaced.append(folder)
            model.learn(10, callback, reset_num_timesteps=False)
        return read(folder)

    monkeypatch.setattr("sb3_softq.checkpointing.folders.manifest.read", read_late)
    assert steps_done(tmp_path) == 30
    assert len(replaced) == 1


def test_no_checkpoint(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        assert not has_checkpoint(folder)
        assert latest(folder) is None
        assert steps_done(folder) == 0
        with pytest.raises(FileNotFoundError, match=str(folder)):
            reload(folder)
    for name, value in (("save_freq", 0), ("save_freq", 2.5), ("keep", 0), ("keep", None)):
        with pytest.raises(ValueError, match=f"{name}={value}"):
            ResumableCheckpoint(**{"save_freq": 1, "path": tmp_path, name: value})


def test_leftovers_are_not_loaded(tmp_path):
    train(tmp_path)
    leftover = tmp_path / TEMPORARY
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half a file")
    assert reload(tmp_path).num_timesteps == 60
    train(tmp_path, steps=30)
    # the newest one is not the one with the most steps, and nothing else is left
    assert reload(tmp_path).num_timesteps == 30
    assert left(tmp_path) == ["checkpoint-1-step60", "checkpoint-2-step30"]


def test_interrupted_at_every_call(tmp_path, monkeypatch):
    """A save that stops at any call to the file system leaves the older checkpoint or the newer one."""
    calls_left = 10**9

    class Killed(BaseException):
        pass

    def dying(function):
        def call(*args, **kwargs):
            nonlocal calls_left
            calls_left -= 1
            if calls_left < 0:
                raise Killed
            return function(*args, **kwargs)

        return call

    model = train(tmp_path, steps=30)
    callback = ResumableCheckpoint(1, tmp_path)
    callback.init_callback(model)
    monkeypatch.setattr(checkpoint.os, "replace", dying(os.replace))
    monkeypatch.setattr(checkpoint.os, "fsync", dying(os.fsync))
    monkeypatch.setattr(checkpoint.os, "unlink", dying(os.unlink))
    monkeypatch.setattr(checkpoint.os, "link", dying(os.link))
    monkeypatch.setattr(checkpoint.shutil, "rmtree", dying(shutil.rmtree))
    monkeypatch.setattr(checkpoint, "save_random_state", dying(checkpoint.save_random_state))
    seen = set()
    for n_calls in range(40):
        old_steps = steps_done(tmp_path)
        model.learn(1, reset_num_timesteps=False)
        calls_left = n_calls
        try:
            callback.save()
            finished = True
        except Killed:
            finished = False
        calls_left = 10**9
        resumed = reload(tmp_path)
        assert resumed.num_timesteps in (old_steps, model.num_timesteps)
        assert resumed.replay_buffer.size() == resumed.num_timesteps
        seen.add((finished, resumed.num_timesteps == model.num_timesteps))
        if finished:
            break
    # killed too early, killed while cleaning up, not killed
    assert seen == {(False, False), (False, True), (True, True)}


def test_a_diverged_agent_is_not_saved(tmp_path):
    model = train(tmp_path)
    saved = flat(model.policy)
    with th.no_grad():
        model.actor.head[0].bias[0] = float("nan")
    callback = ResumableCheckpoint(1, tmp_path)
    callback.init_callback(model)
    with pytest.raises(ValueError, match=r"parameter actor.head.0.bias is not finite at step 60"):
        callback.save()
    assert th.equal(flat(reload(tmp_path).policy), saved)


def test_killed_while_saving(tmp_path):
    for delay in (0.0, 0.05):
        path = tmp_path / str(delay)
        with subprocess.Popen(
            [sys.executable, "-c", SAVE_IN_A_LOOP, str(path)],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline()
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
        model = reload(path)
        assert model.num_timesteps == model.replay_buffer.size() > 0
        model.learn(5, callback=ResumableCheckpoint(100, path), reset_num_timesteps=False)
        assert len(left(path)) == 2


def flip(file):
    """One bit, in the middle."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


FILES = ("model.safetensors", "replay_buffer.npz", "environments.npz", "random.json", "vec_normalize.json", "manifest.json")
DAMAGES = {
    "flipped": flip,
    "cut off": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "empty": lambda file: file.write_bytes(b""),
    "missing": lambda file: file.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_set_aside(tmp_path, name, damage):
    two_checkpoints(tmp_path, env=VecNormalize(DummyVecEnv([pendulum])))
    DAMAGES[damage](tmp_path / "checkpoint-2-step60" / name)
    assert steps_done(tmp_path) == 30
    with pytest.warns(UserWarning, match=rf"checkpoint-2-step60.*{name}.*set aside as damaged-checkpoint-2-step60"):
        model = reload(tmp_path, DummyVecEnv([pendulum]))
    assert model.num_timesteps == model.replay_buffer.size() == 30
    assert left(tmp_path) == ["checkpoint-1-step30", "damaged-checkpoint-2-step60"]
    model.learn(10, callback=ResumableCheckpoint(100, tmp_path), reset_num_timesteps=False)
    assert reload(tmp_path, DummyVecEnv([pendulum])).num_timesteps == 40


def test_nothing_left(tmp_path):
    two_checkpoints(tmp_path)
    flip(tmp_path / "checkpoint-1-step30" / "replay_buffer.npz")
    (tmp_path / "checkpoint-2-step60" / "model.safetensors").unlink()
    assert not has_checkpoint(tmp_path)
    with (
        pytest.warns(UserWarning, match="set aside"),
        pytest.raises(ValueError, match=r"All checkpoints are damaged: .*model.* is missing; .*replay_buffer.npz has other"),
    ):
        reload(tmp_path)


@pytest.mark.parametrize("keep", [1, 3])
def test_so_many_are_kept(tmp_path, keep):
    make().learn(50, callback=ResumableCheckpoint(10, tmp_path, keep=keep))
    assert left(tmp_path) == [f"checkpoint-{i}-step{10 * i}" for i in range(6 - keep, 6)]


def test_the_manifest_says_what_it_is(tmp_path):
    model = train(tmp_path, ent_coef="auto_0.2")
    manifest = json.loads((latest(tmp_path) / "manifest.json").read_text())
    assert manifest["class"] == "SoftQ"
    assert manifest["num_timesteps"] == 60
    assert manifest["arguments"]["ent_coef"] == "auto_0.2"
    assert manifest["arguments"]["batch_size"] == model.batch_size
    assert manifest["env"] == {"id": "Pendulum-v1", "kwargs": {}}
    assert manifest["versions"]["torch"] == th.__version__
    for name, entry in manifest["files"].items():
        file = latest(tmp_path) / name
        assert entry == {"size": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


def test_a_newer_format(tmp_path):
    train(tmp_path)
    path = latest(tmp_path) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(ValueError, match=r"has format 99, which sb3_softq .* does not know \(up to 3\)"):
        reload(tmp_path)
    # it is no damage
    assert left(tmp_path) == ["checkpoint-1-step60"]


def test_another_environment_is_refused(tmp_path):
    train(tmp_path)
    heavy = partial(gym.make, "Pendulum-v1", g=20.0)
    with pytest.raises(ValueError, match=r"env=.*'g': 20.0.* is not allowed: the checkpoint has env=.*other_env=True"):
        reload(tmp_path, heavy())
    assert reload(tmp_path, heavy(), other_env=True).num_timesteps == 60
    with pytest.raises(ValueError, match=r"n_envs=2 is not allowed: the checkpoint has n_envs=1"):
        reload(tmp_path, DummyVecEnv([pendulum] * 2))
    with pytest.raises(ValueError, match=r"vec_normalize=.*'norm_obs': True.* the checkpoint has vec_normalize=None"):
        reload(tmp_path, VecNormalize(DummyVecEnv([pendulum])))
    with pytest.raises(ValueError, match=r"observation_space=Box\(.*\(2,\).* the checkpoint has observation_space=.*\(3,\)"):
        reload(tmp_path, gym.make("MountainCarContinuous-v0"), other_env=True)
    with pytest.raises(ValueError, match="cls=SAC is not allowed: the checkpoint is one of SoftQ"):
        reload(tmp_path, cls=SAC)


class Argument:
    """As it looks, it lies somewhere in memory."""


@pytest.mark.parametrize(
    ("saved", "resumed"),
    [
        ({}, {"render_mode": "rgb_array"}),
        ({"render_mode": "rgb_array"}, {}),
        ({"argument": Argument()}, {"argument": Argument()}),
        ({"argument": lambda x: x}, {"argument": lambda x: x}),
        ({"argument": [Argument()]}, {"argument": [Argument()]}),
        ({"argument": {(0, 1): 2.0, 3: np.float32(1.0)}}, {"argument": {(0, 1): 2.0, 3: np.float32(1.0)}}),
    ],
)
def test_the_same_environment_goes_on(tmp_path, saved, resumed):
    """In the middle of its episode, with whatever it was made."""
    made = partial(gym.make, "Pendulum-v1")
    env = made()
    env.spec.kwargs.update(saved)
    train(tmp_path, env=env)
    env = made()
    env.spec.kwargs.update(resumed)
    model = reload(tmp_path, env)
    assert model.num_timesteps == 60
    assert model._last_obs is not None


def test_other_arguments_are_refused(tmp_path):
    env = pendulum()
    env.spec.kwargs["argument"] = {(0, 1): 2.0}
    train(tmp_path, env=env)
    env = pendulum()
    env.spec.kwargs["argument"] = {(0, 1): 3.0}
    with pytest.raises(ValueError, match=r"env=.*'\(0, 1\)': 3.0.* is not allowed: the checkpoint has env=.*'\(0, 1\)': 2.0"):
        reload(tmp_path, env)


def test_an_environment_by_its_id(tmp_path):
    small(env="Pendulum-v1", buffer_size=500).learn(60, ResumableCheckpoint(10_000, tmp_path))
    for env in ("Pendulum-v1", pendulum()):
        model = resume(SoftQ, tmp_path, env)
        assert model._last_obs is not None
    with pytest.raises(ValueError, match="MountainCarContinuous-v0"):
        resume(SoftQ, tmp_path, "MountainCarContinuous-v0")


def test_the_settings_of_vec_normalize_come_back(tmp_path):
    train(tmp_path, env=VecNormalize(DummyVecEnv([pendulum]), clip_obs=3.0, gamma=0.9))
    new = reload(tmp_path, VecNormalize(DummyVecEnv([pendulum]))).get_vec_normalize_env()
    assert (new.clip_obs, new.gamma) == (3.0, 0.9)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("name", ["rewards", "observations", "next_observations", "actions"])
def test_what_cannot_be_learned_from_is_not_saved(tmp_path, name, value):
    model = make(learning_starts=1_000)

    class Poison(BaseCallback):
        def _on_step(self):
            if self.num_timesteps == 50:
                getattr(model.replay_buffer, name)[45, 0] = value
            return True

    with pytest.raises(ValueError, match=rf"{name} of environment 0 in row 45 of the replay buffer .* at step 60"):
        model.learn(100, callback=[Poison(), ResumableCheckpoint(20, tmp_path)])
    assert reload(tmp_path).num_timesteps == 40


HOLD = """
import sys
from sb3_softq.checkpoint import folder_lock
with folder_lock(sys.argv[1]):
    print("holds", flush=True)
    sys.stdin.read()
"""


def holder(path):
    """A process that owns a folder, says so, and lets go of it when its input closes."""
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def test_a_folder_has_one_writer(tmp_path):
    with holder(tmp_path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"holds\n"
        with pytest.raises(RuntimeError, match=rf"{tmp_path} is not free: process {process.pid} on"):
            train(tmp_path)
        process.kill()
    # a dead one holds nothing
    assert train(tmp_path).num_timesteps == steps_done(tmp_path)


TRAIN = """
import sys
import gymnasium as gym
from stable_baselines3.common.callbacks import BaseCallback
from sb3_softq import SoftQ
from sb3_softq.checkpoint import ResumableCheckpoint

class Ready(BaseCallback):
    def _on_step(self):
        if self.num_timesteps == 20:
            print("ready", flush=True)
        return True

model = SoftQ("MlpPolicy", gym.make("Pendulum-v1"), policy_kwargs=dict(net_arch=[8]), batch_size=8, buffer_size=200_000)
model.learn(200_000, callback=[ResumableCheckpoint(200_000, sys.argv[1]), Ready()])
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_saves(tmp_path, number, status):
    with subprocess.Popen(
        [sys.executable, "-c", TRAIN, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        # a shell's background job may ignore what its terminal sends
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(number)
        assert process.wait(timeout=60) == status
    model = reload(tmp_path)
    assert model.num_timesteps == model.replay_buffer.size() >= 20


def test_signals_are_the_programs_own_again(tmp_path):
    for handler in (signal.SIG_DFL, lambda *_: None):
        previous = signal.signal(signal.SIGTERM, handler)
        try:
            train(tmp_path)
            assert signal.getsignal(signal.SIGTERM) is handler
        finally:
            signal.signal(signal.SIGTERM, previous)


def test_a_signal_after_training_has_failed_ends_the_process(tmp_path):
    program = TRAIN.replace("if self.num_timesteps == 20:", "if self.num_timesteps == 20:\n            raise KeyError")
    program = program.replace("model.learn(", "try:\n    model.learn(") + (
        "except KeyError:\n    pass\nimport os, signal, time\nos.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(30)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == -signal.SIGTERM, result.stderr
