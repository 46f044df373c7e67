"""Ctrl-C, other signals and kills at any moment: what is left of training."""

import os
import random
import re
import signal
import subprocess
import sys
import time

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3 import SAC
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv

from sb3_softq import DiscreteSoftQ, SoftQ
from sb3_softq.checkpoint import ResumableCheckpoint, resume, steps_done
from sb3_softq.checkpointing.interruption import HANDLERS
from tests.conftest import small
from tests.test_checkpoint import ROOT, left

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
# An agent that trains on, with the callbacks of what is tested; lines on stdout tell how far it is
BEGIN = """
import os, signal, sys, time
import gymnasium as gym
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from sb3_softq import DiscreteSoftQ, SoftQ
from sb3_softq.checkpoint import ResumableCheckpoint

class Talking(ResumableCheckpoint):
    def _save(self):
        print("saving", self.model.num_timesteps, flush=True)
        folder = super()._save()
        print("saved", self.model.num_timesteps, flush=True)
        return folder

class At(BaseCallback):
    def __init__(self, step, function):
        super().__init__()
        self.step, self.function = step, function
    def _on_step(self):
        if self.num_timesteps == self.step:
            self.function()
        return True

def make(algorithm, **kwargs):
    env = gym.make("CartPole-v1" if algorithm is DiscreteSoftQ else "Pendulum-v1")
    kwargs = dict(learning_starts=20, batch_size=8, buffer_size=200_000, policy_kwargs=dict(net_arch=[8])) | kwargs
    return algorithm("MlpPolicy", env, device="cpu", **kwargs)

def interrupt():
    os.kill(os.getpid(), signal.SIGINT)

path = sys.argv[1]
"""


def start(code, path, *args, **kwargs):
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", BEGIN + code, str(path), *args],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell's background job ignores SIGINT, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        **kwargs,
    )


def outcome(code, path, *args):
    with start(code, path, *args) as process:
        output, errors = process.communicate(timeout=120)
    return process.returncode, output.split("\n")[:-1], errors


def reload(path, algorithm=SoftQ):
    return resume(algorithm, path, gym.make("CartPole-v1" if algorithm is DiscreteSoftQ else "Pendulum-v1"))


def whole(path, algorithm=SoftQ):
    """Steps of the newest checkpoint, in which buffer and count belong together, and from which training goes on."""
    model = reload(path, algorithm)
    steps = model.num_timesteps
    assert steps == model.replay_buffer.size()
    model.learn(3, reset_num_timesteps=False)
    return steps


ALGORITHMS = [SoftQ, DiscreteSoftQ, SAC]
INTERRUPTED = -signal.SIGINT  # a shell calls it 130


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_ctrl_c_in_training(tmp_path, algorithm):
    code = f"make({algorithm.__name__}).learn(10**6, [At(101, interrupt), Talking(10**6, path)])"
    status, output, errors = outcome(code, tmp_path)
    assert status == INTERRUPTED
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert "Ctrl-C: training ends after" in errors
    assert output == ["saving 101", "saved 101"]
    assert whole(tmp_path, algorithm) == 101


@pytest.mark.parametrize("algorithm", [DiscreteSoftQ, SAC])
def test_ctrl_c_in_an_evaluation(tmp_path, algorithm):
    code = f"""
class Evaluated(gym.Wrapper):
    steps = 0
    def step(self, action):
        self.steps += 1
        if self.steps == 3:
            interrupt()
        return super().step(action)

model = make({algorithm.__name__})
evaluation = EvalCallback(Evaluated(gym.make(model.get_env().get_attr("spec")[0].id)), n_eval_episodes=1, eval_freq=101)
model.learn(10**6, [evaluation, Talking(10**6, path)])
"""
    status, output, _ = outcome(code, tmp_path)
    assert status == INTERRUPTED
    assert output[-2:] == ["saving 101", "saved 101"]
    assert len([line for line in output if "sav" in line]) == 2
    assert whole(tmp_path, algorithm) == 101


@pytest.mark.parametrize(("algorithm", "last"), [(SoftQ, False), (DiscreteSoftQ, True), (SAC, True)])
def test_ctrl_c_in_a_save(tmp_path, algorithm, last):
    code = f"""
from sb3_softq import checkpoint
write = checkpoint.manifest.write
def interrupted(folder, model, *rest):
    if model.num_timesteps == 100:
        interrupt()
    write(folder, model, *rest)
checkpoint.manifest.write = interrupted
make({algorithm.__name__}).learn({100 if last else 10**6}, Talking(50, path))
"""
    status, output, _ = outcome(code, tmp_path)
    assert status == INTERRUPTED
    assert output[:4] == ["saving 50", "saved 50", "saving 100", "saved 100"]
    # what the rollout after it has made is saved too
    assert output[4:] == ([] if last else ["saving 101", "saved 101"])
    assert whole(tmp_path, algorithm) == (100 if last else 101)


@pytest.mark.parametrize("where", ["training", "save", "last save"])
def test_a_second_ctrl_c_ends_at_once(tmp_path, where):
    code = f"""
where = {where!r}
from sb3_softq import checkpoint
write = checkpoint.manifest.write
def interrupted(folder, model, *rest):
    if model.num_timesteps == 100 and where != "training":
        interrupt(), interrupt()
    write(folder, model, *rest)
checkpoint.manifest.write = interrupted
twice = At(80 if where == "training" else -1, lambda: (interrupt(), interrupt()))
make(SoftQ).learn(100 if where == "last save" else 10**6, [twice, Talking(50, path)])
"""
    status, output, _ = outcome(code, tmp_path)
    assert status == INTERRUPTED
    assert output == ["saving 50", "saved 50"] + ([] if where == "training" else ["saving 100"])
    # nothing is left of the save
    assert left(tmp_path) == ["checkpoint-1-step50"]
    assert whole(tmp_path) == 50


def test_ctrl_c_of_programs_that_handle_it(tmp_path):
    """Their KeyboardInterrupt comes anywhere: what was stored is saved once."""
    code = """
def handler(*_):
    raise KeyboardInterrupt
signal.signal(signal.SIGINT, handler)
try:
    make(SoftQ).learn(10**6, [At(101, interrupt), Talking(10**6, path)])
except KeyboardInterrupt:
    assert signal.getsignal(signal.SIGINT) is handler
    print("mine")
"""
    assert outcome(code, tmp_path)[:2] == (0, ["saving 100", "saved 100", "mine"])
    assert whole(tmp_path) == 100


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, INTERRUPTED), (signal.SIGTERM, 128 + signal.SIGTERM)])
@pytest.mark.parametrize(("algorithm", "start_method"), [(SoftQ, "forkserver"), (SAC, "fork")])
def test_signals_to_the_processes_of_environments(tmp_path, algorithm, number, status, start_method):
    """A terminal or a scheduler sends them to all; the environments live until the rollout is over, and are saved too."""
    code = f"""
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv
if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    env = make_vec_env("Pendulum-v1", 2, vec_env_cls=SubprocVecEnv, vec_env_kwargs=dict(start_method="{start_method}"))
    model = {algorithm.__name__}("MlpPolicy", env, policy_kwargs=dict(net_arch=[8]), learning_starts=1000)
    model.learn(10**6, [At(100, lambda: print("ready", flush=True)), Talking(10**6, path)])
"""
    with start(code, tmp_path, start_new_session=True) as process:
        assert process.stdout.readline() == "ready\n"
        os.killpg(process.pid, number)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    assert len(re.findall("saved", output)) == 1
    model = resume(algorithm, tmp_path, make_vec_env("Pendulum-v1", 2))
    assert model.num_timesteps == 2 * model.replay_buffer.size() >= 100
    # in the middle of an episode
    assert model._last_obs is not None


@pytest.mark.parametrize(("algorithm", "number"), [(SoftQ, signal.SIGTERM), (SAC, signal.SIGINT)])
def test_signals_to_the_processes_of_an_evaluation(tmp_path, algorithm, number):
    """It ends as it would have, and so does the rollout before the save."""
    code = f"""
from stable_baselines3.common.vec_env import SubprocVecEnv
class Slow(gym.Wrapper):
    def step(self, action):
        time.sleep(0.005)
        return super().step(action)
class Told(EvalCallback):
    def _on_step(self):
        if self.n_calls % self.eval_freq == 0:
            print("ready", flush=True)
        return super()._on_step()
signal.signal(signal.SIGTERM, signal.SIG_DFL)
evaluated = SubprocVecEnv([lambda: Slow(gym.make("Pendulum-v1"))], start_method="fork")
evaluation = Told(evaluated, n_eval_episodes=1, eval_freq=101, verbose=0)
make({algorithm.__name__}).learn(10**6, [evaluation, Talking(10**6, path)])
"""
    with start(code, tmp_path, start_new_session=True) as process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.3)
        os.killpg(process.pid, number)
        output, errors = process.communicate(timeout=60)
    assert "saved 101" in output, errors
    assert process.returncode == (INTERRUPTED if number == signal.SIGINT else 128 + number), errors
    assert whole(tmp_path, algorithm) == 101


class Guarded(gym.Wrapper):
    """Ends what it has started when it is told to."""

    def __init__(self, env):
        super().__init__(env)
        signal.signal(signal.SIGTERM, lambda *_: os._exit(7))

    def handler(self):
        return repr(signal.getsignal(signal.SIGTERM))


def test_handlers_of_environments_in_processes_stay(tmp_path):
    before = [signal.signal(number, handler) for number, handler in HANDLERS.items()]
    env = SubprocVecEnv([lambda: Guarded(gym.make("Pendulum-v1"))], start_method="fork")
    handler = env.env_method("handler")
    small(env=env, learning_starts=1000).learn(30, ResumableCheckpoint(10**6, tmp_path))
    for number, own in zip(HANDLERS, before, strict=True):
        signal.signal(number, own)
    assert env.env_method("handler") == handler
    env.processes[0].terminate()
    env.processes[0].join(10)
    assert env.processes[0].exitcode == 7


def test_processes_of_environments_end_by_signals_again(tmp_path):
    # whoever runs the tests may have others
    before = [signal.signal(number, handler) for number, handler in HANDLERS.items()]

    def make_env():
        for number, handler in HANDLERS.items():
            signal.signal(number, handler)
        return gym.make("Pendulum-v1")

    env = SubprocVecEnv([make_env] * 3)
    small(env=env, learning_starts=1000).learn(30, ResumableCheckpoint(10**6, tmp_path))
    for number, handler in zip(HANDLERS, before, strict=True):
        signal.signal(number, handler)
    for process, number in zip(env.processes, (signal.SIGTERM, signal.SIGINT, 0), strict=True):
        os.kill(process.pid, number)
        process.join(10 if number else 0)
        assert process.is_alive() == (number == 0)
    env.processes[2].kill()


def test_ctrl_c_after_training_has_failed_is_the_programs_own(tmp_path):
    """SAC tells the callback of no error, which holds the signal still."""
    code = """
def fail():
    raise KeyError
for algorithm in (SAC, SoftQ):
    try:
        make(algorithm).learn(10**6, [At(10, fail), ResumableCheckpoint(10**6, path)])
    except KeyError:
        pass
    try:
        interrupt()
        time.sleep(10)
    except KeyboardInterrupt:
        print("mine", signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""
    assert outcome(code, tmp_path)[:2] == (0, ["mine True", "mine True"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_in_the_last_save_is_not_lost(tmp_path, number):
    code = f"""
signal.signal({number}, signal.SIG_DFL)
class Signalled(Talking):
    def _save(self):
        os.kill(os.getpid(), {number})
        return super()._save()
make(SoftQ).learn(100, Signalled(10**6, path))
"""
    assert outcome(code, tmp_path)[:2] == (128 + number, ["saving 100", "saved 100"])
    assert whole(tmp_path) == 100


# Says when a save begins and ends; the delays of a kill after it are drawn by the test
FOREVER = """
freq = int(sys.argv[2])
algorithm = {"SoftQ": SoftQ, "DiscreteSoftQ": DiscreteSoftQ}[sys.argv[3]]
from sb3_softq.checkpoint import has_checkpoint, resume
env = gym.make("CartPole-v1" if algorithm is DiscreteSoftQ else "Pendulum-v1")
model = resume(algorithm, path, env) if has_checkpoint(path) else make(algorithm)
assert model.num_timesteps == model.replay_buffer.size()
class Ready(BaseCallback):
    def _on_step(self):
        if self.n_calls % 10 == 0:
            print("at", self.num_timesteps, flush=True)
        return True
model.learn(10**6, [Talking(freq, path), Ready()], reset_num_timesteps=False)
"""


def kill_at_random_instants(path, n, n_in_saves, algorithm, seed):
    """Kill a run that goes on each time, so many times in training and so many within a save; count what is lost."""
    generator = random.Random(seed)
    freq, kinds = 60, ["training"] * n + ["save"] * n_in_saves
    generator.shuffle(kinds)
    duration, lost, in_saves = 0.1, [], 0
    for kind in kinds:
        with start(FOREVER, path, str(freq), algorithm.__name__) as process:
            reached = steps_done(path)
            n_saves, after, began = 0, generator.randrange(1, 3), 0.0
            for line in process.stdout:
                word, steps = line.split()
                reached = max(reached, int(steps))
                if word == "saving":
                    began = time.monotonic()
                elif word == "saved":
                    n_saves, duration = n_saves + 1, time.monotonic() - began
                if kind == "save" and word == "saving" and n_saves == after:
                    time.sleep(generator.random() * duration)
                    break
                if kind == "training" and word == "at" and n_saves == after - 1:
                    time.sleep(generator.random() * 0.3)
                    break
            process.send_signal(signal.SIGKILL)
            # the kill may have cut the last line off
            rest = [line.split() for line in process.stdout.read().splitlines(keepends=True) if line.endswith("\n")]
            errors = process.stderr.read()
            assert process.wait() == -signal.SIGKILL, errors
        reached = max([reached, *(int(steps) for _, steps in rest)])
        in_saves += kind == "save" and not any(word == "saved" for word, _ in rest)
        model = reload(path, algorithm) if steps_done(path) else None
        done = 0 if model is None else model.num_timesteps
        if model is not None:
            assert model.replay_buffer.size() == done
        lost.append(reached - done)
    assert np.max(lost) <= freq + 1, lost
    assert in_saves >= n_in_saves // 2, "too few kills have hit a save"
    assert [name for name in left(path) if name.startswith("damaged")] == []
    return whole(path, algorithm)


@pytest.mark.parametrize("algorithm", [SoftQ])
def test_kills_at_random_instants(tmp_path, algorithm):
    assert kill_at_random_instants(tmp_path, 5, 3, algorithm, seed=1) > 100


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", [SoftQ, DiscreteSoftQ])
def test_many_kills_at_random_instants(tmp_path, algorithm):
    assert kill_at_random_instants(tmp_path, 30, 20, algorithm, seed=2) > 1000
