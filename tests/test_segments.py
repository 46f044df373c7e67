"""Saves that write what a replay buffer has gained: what is read back is the buffer, whatever happened in between."""

import os
import shutil
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stable_baselines3 import SAC, TD3
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback

from sb3_softq import DiscreteSoftQ, SoftQ
from sb3_softq.checkpoint import ResumableCheckpoint, has_checkpoint, latest, resume, steps_done
from sb3_softq.checkpointing import manifest, segments
from sb3_softq.checkpointing.segments import WHOLE, load_segments, remember, save_segments
from sb3_softq.replay import end_trajectory
from sb3_softq.serialization.files import buffer_arrays
from tests.conftest import small
from tests.test_serialization_files import KINDS, buffer_of, fill

SIZE = 40


def assert_same(old, new):
    """All that can be sampled, and the next observation beyond it."""
    assert (new.pos, new.full) == (old.pos, old.full)
    n_rows = SIZE if old.full else min(old.pos + 1, SIZE)
    for name, array in buffer_arrays(old).items():
        np.testing.assert_array_equal(buffer_arrays(new)[name][:n_rows], array[:n_rows], err_msg=name)


def save(buffer, folder, base, steps):
    folder.mkdir()
    saved, linked = save_segments(buffer, folder, base, steps)
    remember(buffer, folder, saved)
    assert {segment.name for segment in saved.segments} == {file.name for file in folder.iterdir()}
    return linked


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(list(KINDS)),
    gains=st.lists(st.integers(0, 14), min_size=2, max_size=25),
    keep=st.integers(1, 3),
    resumed_at=st.integers(0, 25),
    ended=st.sets(st.integers(0, 25)),
)
def test_what_was_saved_comes_back(tmp_path_factory, kind, gains, keep, resumed_at, ended):
    """Half full and gone round; with an episode cut off after a save, a resume on the way, and old folders deleted."""
    path = tmp_path_factory.mktemp("segments")
    rng = np.random.default_rng(len(gains))
    buffer = buffer_of(kind, buffer_size=2 * SIZE, n_envs=2)
    folders = []
    steps = 0
    for i, gain in enumerate([5, *gains]):
        if i in ended:
            end_trajectory(buffer)
        fill(buffer, gain, rng)
        steps += 2 * gain
        base = folders[-keep] if len(folders) >= keep else None
        folders.append(path / str(i))
        save(buffer, folders[-1], base, steps)
        if base is not None:
            shutil.rmtree(folders.pop(-keep - 1))
        new = buffer_of(kind, buffer_size=2 * SIZE, n_envs=2)
        load_segments(new, folders[-1], steps)
        assert_same(buffer, new)
        if i == resumed_at:
            buffer = new


def test_only_what_is_new_is_written(tmp_path):
    buffer = buffer_of("plain", buffer_size=20_000, n_envs=1)
    rng = np.random.default_rng(0)
    fill(buffer, 3_000, rng)
    assert save(buffer, tmp_path / "0", None, 3_000) == set()
    for i in range(1, 4):
        fill(buffer, 100, rng)
        linked = save(buffer, tmp_path / str(i), tmp_path / str(i - 1), 3_000 + 100 * i)
        new = {file.name for file in (tmp_path / str(i)).iterdir()} - linked
        assert new == {f"replay-{i:08d}.npz"}
        assert (tmp_path / str(i) / new.pop()).stat().st_size < 102 * 48 + 2_000
        assert all(os.path.samefile(tmp_path / str(i) / name, tmp_path / str(i - 1) / name) for name in linked)


def test_rows_that_are_written_over_are_let_go(tmp_path):
    buffer = buffer_of("plain", buffer_size=1_000, n_envs=1)
    rng = np.random.default_rng(0)
    names = []
    for i in range(30):
        fill(buffer, 100, rng)
        save(buffer, tmp_path / str(i), tmp_path / str(i - 1) if i else None, 100 * (i + 1))
        names.append(sorted(file.name for file in (tmp_path / str(i)).iterdir()))
    assert WHOLE in names[5]
    assert WHOLE not in names[15]
    assert max(map(len, names)) <= 12


def test_many_files_become_one(tmp_path, monkeypatch):
    monkeypatch.setattr(segments, "MAX_FILES", 4)
    buffer = buffer_of("plain", buffer_size=1_000, n_envs=1)
    rng = np.random.default_rng(0)
    lengths = []
    for i in range(9):
        fill(buffer, 10, rng)
        save(buffer, tmp_path / str(i), tmp_path / str(i - 1) if i else None, 10 * (i + 1))
        lengths.append(len(list((tmp_path / str(i)).iterdir())))
    assert lengths == [1, 2, 3, 4, 1, 2, 3, 4, 1]


def by_hand(buffer, rng):
    """Steps that the agent did not make."""
    fill(buffer, 5, rng)


def all_round(buffer, rng):
    fill(buffer, buffer.buffer_size, rng)


def emptied(buffer, rng):
    buffer.reset()
    fill(buffer, 110, rng)


def gone(buffer, rng):
    shutil.rmtree(gone.folder)


@pytest.mark.parametrize("change", [by_hand, all_round, emptied, gone])
def test_what_is_not_known_is_written_whole(tmp_path, change):
    buffer = buffer_of("plain", buffer_size=400, n_envs=1)
    rng = np.random.default_rng(0)
    fill(buffer, 100, rng)
    save(buffer, tmp_path / "0", None, 100)
    gone.folder = tmp_path / "0"
    change(buffer, rng)
    if change is not emptied:
        fill(buffer, 10, rng)
    assert save(buffer, tmp_path / "1", tmp_path / "0", 110) == set()
    new = buffer_of("plain", buffer_size=400, n_envs=1)
    load_segments(new, tmp_path / "1", 110)
    np.testing.assert_array_equal(new.rewards[: new.size()], buffer.rewards[: buffer.size()])


def test_without_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError("no links here")

    monkeypatch.setattr(segments.os, "link", refuse)
    buffer = buffer_of("plain", buffer_size=400, n_envs=1)
    fill(buffer, 100, np.random.default_rng(0))
    save(buffer, tmp_path / "0", None, 100)
    fill(buffer, 10, np.random.default_rng(1))
    assert save(buffer, tmp_path / "1", tmp_path / "0", 110) == {WHOLE}
    assert not os.path.samefile(tmp_path / "0" / WHOLE, tmp_path / "1" / WHOLE)


def test_files_that_do_not_fit(tmp_path):
    buffer = buffer_of("plain", buffer_size=400, n_envs=1)
    rng = np.random.default_rng(0)
    fill(buffer, 100, rng)
    save(buffer, tmp_path / "0", None, 100)
    fill(buffer, 10, rng)
    save(buffer, tmp_path / "1", tmp_path / "0", 110)
    larger = buffer_of("plain", buffer_size=500, n_envs=1)
    load_segments(larger, tmp_path / "1", 110)
    assert larger.size() == 110
    with pytest.raises(ValueError, match="fit"):
        load_segments(buffer_of("plain", buffer_size=90, n_envs=1), tmp_path / "1", 110)
    (tmp_path / "1" / WHOLE).unlink()
    with pytest.raises(ValueError, match="lacks row 0 of the replay buffer"):
        load_segments(buffer_of("plain", buffer_size=400, n_envs=1), tmp_path / "1", 110)


class Compare(BaseCallback):
    """After each checkpoint, reads it."""

    def __init__(self, path):
        super().__init__()
        self.path, self.seen, self.n_saved, self.n_whole = path, None, 0, 0

    def _on_rollout_start(self):
        folder = latest(self.path)
        if folder is None or folder == self.seen:
            return
        self.seen = folder
        old = self.model.replay_buffer
        new = ReplayBuffer(old.buffer_size, old.observation_space, old.action_space, "cpu")
        load_segments(new, folder, 0)
        for name, array in buffer_arrays(old).items():
            n_rows = old.size()
            np.testing.assert_array_equal(buffer_arrays(new)[name][:n_rows], array[:n_rows])
        self.n_saved += 1
        self.n_whole += {file.name for file in folder.glob("replay*")} == {WHOLE}
        others = [other for other in self.path.glob("checkpoint-*/replay*") if other.parent != folder]
        assert not any(os.path.samefile(file, other) for file in folder.glob("replay*") for other in others)

    def _on_step(self):
        return True


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_checkpoints_of_a_run(tmp_path, keep):
    """Also one that goes on after a resume, and none shares a file with another that stays."""
    model = small(buffer_size=300)
    compare = Compare(tmp_path)
    model.learn(400, callback=[ResumableCheckpoint(20, tmp_path, keep=keep), compare])
    assert (compare.n_saved, compare.n_whole) == (19, keep)
    assert len(list(latest(tmp_path).glob("replay*"))) <= 300 / 20 / keep + 3
    model = resume(SoftQ, tmp_path, small().get_env())
    before = latest(tmp_path)
    compare = Compare(tmp_path)
    model.learn(130, callback=[ResumableCheckpoint(20, tmp_path, keep=keep), compare], reset_num_timesteps=False)
    assert latest(tmp_path) != before
    # the first one that takes over the files of the checkpoint it came from, and what is found at the start
    assert (compare.n_saved, compare.n_whole) == (7, keep - 1)
    again = resume(SoftQ, tmp_path, small().get_env())
    np.testing.assert_array_equal(again.replay_buffer.rewards, model.replay_buffer.rewards)


def test_a_manifest_that_is_gone_is_no_reason_to_stop(tmp_path):
    model = small(buffer_size=500)
    callback = ResumableCheckpoint(20, tmp_path, keep=1)
    model.learn(40, callback=callback)
    (latest(tmp_path) / manifest.NAME).unlink()
    model.learn(10, reset_num_timesteps=False)
    folder = callback.save()
    assert latest(tmp_path) == folder
    assert {file.name for file in folder.glob("replay*")} == {WHOLE, "replay-00000001.npz", "replay-00000002.npz"}


def test_contents_are_read_once(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(manifest, "_digest", lambda file, digest=manifest._digest: read.append(file.name) or digest(file))
    small(buffer_size=500).learn(100, callback=ResumableCheckpoint(20, tmp_path, keep=1))
    # those that are linked were looked at when they were written
    assert read.count(WHOLE) == 1
    read.clear()
    assert has_checkpoint(tmp_path)
    assert steps_done(tmp_path) == 100
    n_read = len(read)
    assert n_read == len(list(latest(tmp_path).iterdir())) - 1
    resume(SoftQ, tmp_path, small().get_env())
    assert len(read) == n_read


def test_what_others_hang_on_the_model_is_not_saved(tmp_path):
    class Hang(BaseCallback):
        def _on_step(self):
            self.model.their_history = np.zeros(100_000)
            return True

    class Mine(SoftQ):
        def train(self, *args, **kwargs):
            self.my_count = getattr(self, "my_count", 0) + 1
            super().train(*args, **kwargs)

    with pytest.warns(UserWarning, match="that Mine does not know are not in its checkpoints: their_history") as caught:
        model = small(Mine).learn(60, callback=[Hang(), ResumableCheckpoint(10, tmp_path)])
    assert len([x for x in caught if "does not know" in str(x.message)]) == 1
    resumed = resume(Mine, tmp_path, model.get_env())
    assert not hasattr(resumed, "their_history")
    assert resumed.my_count == model.my_count > 0
    # as Stable-Baselines3 has it
    model.save(tmp_path / "model")
    assert Mine.load(tmp_path / "model").their_history.shape == (100_000,)


@pytest.mark.parametrize("cls", [SoftQ, DiscreteSoftQ, SAC, TD3])
def test_everything_of_the_agents_own_is_saved(tmp_path, cls):
    env = "CartPole-v1" if cls is DiscreteSoftQ else "Pendulum-v1"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = small(cls, env=env).learn(30, callback=ResumableCheckpoint(10, tmp_path))
        resumed = resume(cls, tmp_path, small(cls, env=env).get_env())
        resumed.learn(30, callback=ResumableCheckpoint(10, tmp_path), reset_num_timesteps=False)
    assert vars(resumed).keys() >= vars(model).keys() - {"_keeps_action_noise"}
