"""Disks that are full, folders that cannot be written: what is said, what stays, and training that goes on."""

import errno
import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.envs import BitFlippingEnv

from sb3_softq import SoftQ
from sb3_softq.checkpoint import ResumableCheckpoint, folder_lock, has_checkpoint, resume, steps_done
from sb3_softq.checkpointing import disk
from sb3_softq.checkpointing.disk import make_folder
from sb3_softq.checkpointing.folders import HOLDER, LOCK, TEMPORARY
from tests.conftest import small
from tests.test_checkpoint import holder, left, make, pendulum, train

resource = pytest.importorskip("resource")


class Between(BaseCallback):
    """The largest size of a file, from a step to another one: beyond it the system refuses to write, as a full disk does."""

    def __init__(self, first, last, size):
        super().__init__()
        self.first, self.last, self.size = first, last, size

    def _on_step(self):
        soft = self.size if self.first <= self.num_timesteps < self.last else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, resource.RLIM_INFINITY))
        return True


@pytest.fixture(autouse=True)
def files_of_any_size():
    # Python ignores the signal that would end the process
    assert signal.getsignal(signal.SIGXFSZ) is signal.SIG_IGN
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def is_free(path):
    """Whether nobody holds the folder, this process included."""
    code = "import sys\nfrom filelock import FileLock\nFileLock(sys.argv[1]).acquire(timeout=0)"
    return subprocess.run([sys.executable, "-c", code, str(path / LOCK)], capture_output=True, check=False).returncode == 0


# Where the first file begins, and in the middle of it, where torch writes
SIZES = [0, 1000, 20_000]


@pytest.mark.parametrize("cls", [SoftQ, SAC])
@pytest.mark.parametrize("size", SIZES)
def test_a_full_disk_ends_training(tmp_path, cls, size):
    model = make(cls=cls)
    with pytest.raises(OSError, match="no checkpoint could be written") as error:
        model.learn(200, [Between(45, 10**9, size), ResumableCheckpoint(20, tmp_path)])
    assert error.value.errno == errno.EFBIG
    text = str(error.value)
    assert re.search(rf"in {tmp_path} at step 60 .*File too large.* needs about [\d.]+ MB, [\d.,]+ MB are free there", text)
    assert isinstance(error.value.__cause__, OSError)
    # the one before is whole, and nothing keeps the disk full
    assert left(tmp_path) == ["checkpoint-1-step20", "checkpoint-2-step40"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    model = resume(cls, tmp_path, pendulum())
    assert model.num_timesteps == model.replay_buffer.size() == 40


@pytest.mark.parametrize("cls", [SoftQ, SAC])
def test_training_goes_on_without_room(tmp_path, cls):
    model = make(cls=cls)
    callback = ResumableCheckpoint(20, tmp_path, on_disk_error="continue")
    with pytest.warns(UserWarning, match="no checkpoint could be written") as caught:
        model.learn(130, [Between(45, 95, 1000), callback])
    messages = [str(warning.message) for warning in caught if "no checkpoint" in str(warning.message)]
    # each time, and not at every rollout
    assert [int(re.search(r"at step (\d+)", message)[1]) for message in messages] == [60, 80]
    assert all("Training goes on, the next save tries again" in message for message in messages)
    assert left(tmp_path) == ["checkpoint-4-step120", "checkpoint-5-step130"]
    assert resume(cls, tmp_path, pendulum()).replay_buffer.size() == 130
    assert is_free(tmp_path)


def test_health_is_no_matter_of_the_disk(tmp_path):
    model = make(learning_starts=1000)

    class Poison(BaseCallback):
        def _on_step(self):
            if self.num_timesteps == 50:
                model.replay_buffer.rewards[45] = float("nan")
            return True

    with pytest.raises(ValueError, match="cannot be learned from"):
        model.learn(200, [Poison(), ResumableCheckpoint(20, tmp_path, on_disk_error="continue")])
    assert steps_done(tmp_path) == 40
    for value in ("ignore", None, True):
        with pytest.raises(ValueError, match=f"on_disk_error={value!r} is not allowed: it must be one of 'raise', 'continue'"):
            ResumableCheckpoint(20, tmp_path, on_disk_error=value)


@pytest.mark.parametrize("cls", [SoftQ, SAC])
@pytest.mark.parametrize("on_disk_error", ["raise", "continue"])
def test_a_last_save_that_fails_gives_the_folder_back(tmp_path, cls, on_disk_error):
    callbacks = [Between(50, 10**9, 1000), ResumableCheckpoint(40, tmp_path, on_disk_error=on_disk_error)]
    handler = signal.getsignal(signal.SIGTERM)
    if on_disk_error == "raise":
        with pytest.raises(OSError, match="at step 60"):
            make(cls=cls).learn(60, callbacks)
    else:
        with pytest.warns(UserWarning, match="at step 60"):
            make(cls=cls).learn(60, callbacks)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert is_free(tmp_path)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert left(tmp_path) == ["checkpoint-1-step40"]


def test_a_full_disk_when_training_ends_by_an_error(tmp_path):
    """Both are told of; nothing tries to save twice."""

    class Fails(BaseCallback):
        def _on_step(self):
            if self.num_timesteps == 50:
                raise KeyError("mine")
            return True

    with pytest.warns(UserWarning, match="could not be saved: .*at step 49"), pytest.raises(KeyError, match="mine"):
        make().learn(200, [Between(45, 10**9, 1000), ResumableCheckpoint(40, tmp_path), Fails()])
    assert left(tmp_path) == ["checkpoint-1-step40"]
    assert is_free(tmp_path)


def test_training_again_after_an_error_gives_the_folder_back(tmp_path):
    """SAC tells the callback of no error."""

    class Fails(BaseCallback):
        def _on_step(self):
            if self.num_timesteps == 50:
                raise KeyError("mine")
            return True

    model, callback = make(cls=SAC), ResumableCheckpoint(40, tmp_path)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyError, match="mine"):
        model.learn(200, [callback, Fails()])
    model.learn(60, callback)
    assert is_free(tmp_path)
    assert signal.getsignal(signal.SIGTERM) is handler


def test_health_is_no_matter_of_the_disk_after_an_error_of_it_either(tmp_path):
    model = train(tmp_path)
    callback = ResumableCheckpoint(10, tmp_path)
    callback.init_callback(model)
    model.replay_buffer.rewards[0] = float("nan")

    def broken():
        raise RuntimeError("of torch")

    try:
        raise BrokenPipeError
    except BrokenPipeError:
        with pytest.raises(ValueError, match="cannot be learned from"):
            callback.save()
        callback._save = broken
        with pytest.raises(RuntimeError, match="of torch"):
            callback.save()


@pytest.mark.parametrize("kind", [None, HerReplayBuffer])
def test_the_room_that_is_needed(tmp_path, kind):
    """For a whole buffer, and for what it has gained."""
    if kind is None:
        model = make(buffer_size=20_000)
    else:
        env = BitFlippingEnv(n_bits=4, continuous=True)
        model = small(policy="MultiInputPolicy", env=env, buffer_size=20_000, replay_buffer_class=kind)
    callback = ResumableCheckpoint(10**6, tmp_path, keep=1)
    callback.init_callback(model)
    old, written = set(), []
    for gain in (10_000, 200):
        model.replay_buffer.pos += gain
        model.num_timesteps += gain
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        with pytest.raises(OSError, match="needs about") as error:
            callback.save()
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert not (tmp_path / TEMPORARY).exists()
        files = [file.stat() for file in callback.save().iterdir()]
        written.append(sum(file.st_size for file in files if file.st_ino not in old))
        old = {file.st_ino for file in files}
        needed = 1e6 * float(re.search(r"needs about ([\d.,]+) MB", str(error.value))[1].replace(",", ""))
        assert needed == pytest.approx(written[-1], rel=0.4, abs=2e5)
    if kind is None:
        assert written[1] < 0.5 * written[0]


@contextmanager
def full_disk(path):
    """A file system of a megabyte, where the system lets it be made."""
    path.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("no file system may be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_disk_that_is_really_full(tmp_path):
    disk_ = tmp_path / "disk"
    with full_disk(disk_):
        folder = disk_ / "checkpoints"
        filler = disk_ / "filler"

        class Fill(BaseCallback):
            def _on_step(self):
                if self.num_timesteps == 45:
                    with suppress(OSError), filler.open("wb") as file:
                        while True:
                            file.write(b"0" * 1024)
                            file.flush()
                elif self.num_timesteps == 75:
                    filler.unlink()
                return True

        with pytest.warns(UserWarning, match="No space left on device.* needs about .* MB, 0.0 MB are free"):
            make().learn(90, [Fill(), ResumableCheckpoint(20, folder, on_disk_error="continue")])
        assert left(folder) == ["checkpoint-3-step80", "checkpoint-4-step90"]
        assert resume(SoftQ, folder, pendulum()).replay_buffer.size() == 90


@pytest.mark.parametrize("place", ["file", "file/below", "file/below/twice", "/proc/none/checkpoints"])
def test_a_folder_that_cannot_be_made(tmp_path, place):
    (tmp_path / "file").write_text("precious")
    path = tmp_path / place
    model = make()
    with pytest.raises(OSError, match=rf"path='{path}' is not allowed: it must be a folder that can be made and written"):
        model.learn(30, ResumableCheckpoint(10, path))
    # at the start
    assert model.num_timesteps == 0
    assert (tmp_path / "file").read_text() == "precious"
    with pytest.raises(OSError, match="is not allowed"), folder_lock(path):
        pass


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    """Root may write everywhere: the system says what it says to others."""
    train(tmp_path)
    mkdir = Path.mkdir

    def refuse(self, *args, **kwargs):
        if self.parent == tmp_path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        mkdir(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", refuse)
    model = make()
    with pytest.raises(PermissionError, match=r"is not allowed: .* \(Permission denied\)"):
        model.learn(30, ResumableCheckpoint(10, tmp_path))
    assert model.num_timesteps == 0
    assert is_free(tmp_path)
    assert steps_done(tmp_path) == 60


def test_new_folders_are_synced(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(disk, "sync", synced.append)
    make_folder(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c").is_dir()
    assert set(synced) == {tmp_path, tmp_path / "a", tmp_path / "a" / "b"}
    synced.clear()
    make_folder(tmp_path / "a" / "b")
    assert synced == []


def test_a_killed_process_holds_nothing(tmp_path):
    """Its lock and its name are still there."""
    with holder(tmp_path) as process:
        assert process.stdout.readline() == b"holds\n"
        with pytest.raises(RuntimeError, match=f"is not free: process {process.pid} on"), folder_lock(tmp_path):
            pass
        process.kill()
    assert (tmp_path / LOCK).exists()
    assert str(process.pid) in (tmp_path / HOLDER).read_text()
    assert train(tmp_path).num_timesteps == steps_done(tmp_path)


def test_a_full_disk_hides_no_holder(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "write_text", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with folder_lock(tmp_path):
        assert not is_free(tmp_path)
    assert is_free(tmp_path)
    assert not has_checkpoint(tmp_path)
