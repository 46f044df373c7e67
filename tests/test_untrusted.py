"""Files of strangers: nothing in them runs, nothing grows, and what cannot be had without unpickling is named."""

import base64
import json
import pickle
import zipfile
from pathlib import Path

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.utils import ConstantSchedule, LinearSchedule
from torch import nn

from sb3_softq import DiscreteSoftQ, SoftQ
from sb3_softq.checkpoint import ResumableCheckpoint, resume
from tests.conftest import flat, small


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def pendulum():
    return gym.make("Pendulum-v1")


@pytest.fixture
def saved(tmp_path):
    model = small(env=pendulum(), annealing=3.0, gamma=0.9).learn(60)
    model.save(tmp_path / "model.zip")
    return model, tmp_path / "model.zip"


def rewrite(path, change=lambda name, content: content, extra=(), **kwargs):
    """The same zip with other contents."""
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", **kwargs) as archive:
        for name, content in contents.items():
            archive.writestr(name, change(name, content))
        for name, content in extra:
            archive.writestr(name, content)


def with_payload(path, marker, fields=None):
    """Instead of all that is pickled in the JSON, or of some of it."""

    def change(name, content):
        if name != "data":
            return content
        data = json.loads(content)
        serialized = base64.b64encode(pickle.dumps(Payload(marker))).decode()
        for key, entry in data.items():
            if (isinstance(entry, dict) and ":serialized:" in entry) if fields is None else key in fields:
                data[key] = (entry if isinstance(entry, dict) else {}) | {":serialized:": serialized}
        return json.dumps(data).encode()

    rewrite(path, change)


def test_the_same_agent_without_unpickling(saved, monkeypatch):
    model, path = saved

    def refuse(*args, **kwargs):
        raise AssertionError("something was unpickled")

    monkeypatch.setattr(cloudpickle, "loads", refuse)
    loaded = SoftQ.load(path, env=pendulum(), device="cpu", trusted=False)
    assert th.equal(flat(loaded.policy), flat(model.policy))
    assert loaded.particle_options == model.particle_options
    assert (loaded.gamma, loaded.num_timesteps, loaded.train_freq) == (0.9, 60, model.train_freq)
    obs = model.observation_space.sample()
    np.testing.assert_array_equal(loaded.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0])
    loaded.learn(20, reset_num_timesteps=False)
    assert loaded.num_timesteps == 80


def test_schedules_come_from_learning_rates(tmp_path):
    rates = dict(actor_learning_rate=2e-3, ent_coef_learning_rate=3e-3)
    small(env=pendulum(), **rates).learn(60).save(tmp_path / "model.zip")
    loaded = SoftQ.load(tmp_path / "model.zip", env=pendulum(), trusted=False)
    assert (loaded.actor_lr_schedule(0.5), loaded.ent_coef_lr_schedule(0.5)) == (2e-3, 3e-3)


def test_schedules_of_stable_baselines3_are_read_from_their_numbers(tmp_path):
    schedules = dict(learning_rate=LinearSchedule(3e-3, 1e-3, 0.5), ent_coef=ConstantSchedule(0.2))
    small(env=pendulum(), **schedules).save(tmp_path / "model.zip")
    loaded = SoftQ.load(tmp_path / "model.zip", env=pendulum(), trusted=False)
    assert [loaded.lr_schedule(progress) for progress in (1.0, 0.75, 0.0)] == pytest.approx([3e-3, 2e-3, 1e-3])
    assert loaded.ent_coef(0.5) == 0.2


@pytest.mark.parametrize("value", ["a", None, [1e-3], {}, float("nan"), -1.0])
def test_schedules_have_numbers(tmp_path, value):
    path = tmp_path / "model.zip"
    small(env=pendulum()).save(path)

    def change(name, content):
        return (
            content
            if name != "data"
            else json.dumps((data := json.loads(content)) | {"learning_rate": data["learning_rate"] | {"end": value}})
        )

    rewrite(path, change)
    with pytest.raises(ValueError, match="learning_rate"):
        SoftQ.load(path, env=pendulum(), trusted=False)


def test_a_schedule_of_a_strangers_class_is_refused(tmp_path):
    small(env=pendulum(), learning_rate=lambda progress: 1e-3 * progress).save(tmp_path / "model.zip")
    with pytest.raises(ValueError, match="learning_rate is pickled"):
        SoftQ.load(tmp_path / "model.zip", env=pendulum(), trusted=False)


def test_what_a_stranger_pickled_does_not_run(saved, tmp_path):
    model, path = saved
    marker = tmp_path / "ran"
    with_payload(path, marker)
    loaded = SoftQ.load(path, env=pendulum(), device="cpu", trusted=False)
    assert not marker.exists()
    assert th.equal(flat(loaded.policy), flat(model.policy))
    # this is what it is about
    with pytest.raises(Exception):  # noqa: B017, PT011
        SoftQ.load(path, env=pendulum(), device="cpu")
    assert marker.exists()


@pytest.mark.parametrize("name", ["policy.pth", "critic.optimizer.pth", "pytorch_variables.pth"])
def test_what_a_stranger_pickled_as_weights_does_not_run(saved, tmp_path, name):
    _, path = saved
    marker = tmp_path / "ran"
    payload = tmp_path / "payload.pth"
    th.save({"weights": Payload(marker)}, payload)
    rewrite(path, lambda entry, content: payload.read_bytes() if entry == name else content)
    with pytest.raises(pickle.UnpicklingError, match=r"[Ww]eights"):
        SoftQ.load(path, env=pendulum(), device="cpu", trusted=False)
    assert not marker.exists()


def test_nothing_is_written_elsewhere(saved, tmp_path):
    model, path = saved
    rewrite(path, extra=[("../outside", b"x"), ("/tmp/sb3_softq_outside", b"x")])
    loaded = SoftQ.load(path, env=pendulum(), device="cpu", trusted=False)
    assert th.equal(flat(loaded.policy), flat(model.policy))
    assert not (tmp_path.parent / "outside").exists()
    assert not Path("/tmp/sb3_softq_outside").exists()


@pytest.mark.parametrize("name", ["policy.pth", "data", "zeros.pth"])
def test_what_grows_is_not_read(saved, name):
    _, path = saved
    zeros = bytes(80 * 2**20)
    extra = [(name, zeros)] if name == "zeros.pth" else []
    rewrite(path, lambda entry, content: zeros if entry == name else content, extra, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=rf"{name} in .* would have 83886080 bytes: it is not read without trust"):
        SoftQ.load(path, env=pendulum(), device="cpu", trusted=False)


def test_what_grows_within_torchs_archive_is_not_read(saved):
    """The outer zip stores it as it is; what grows is in the inner one."""
    _, path = saved

    def change(entry, content):
        if entry != "policy.pth":
            return content
        inner = path.with_suffix(".inner")
        with zipfile.ZipFile(inner, "w", compression=zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data/0", bytes(80 * 2**20))
        return inner.read_bytes()

    rewrite(path, change)
    with pytest.raises(ValueError, match=r"archive/data/0 in .*policy.pth would have 83886080 bytes"):
        SoftQ.load(path, env=pendulum(), device="cpu", trusted=False)


def test_what_cannot_be_had_is_named(tmp_path):
    noise = NormalActionNoise(np.zeros(1), 0.1 * np.ones(1))
    for name, kwargs, value in (
        ("policy_kwargs", dict(policy_kwargs=dict(activation_fn=nn.Tanh)), None),
        ("action_noise", dict(action_noise=noise), noise),
    ):
        model = small(env=pendulum(), **kwargs)
        path = tmp_path / f"{name}.zip"
        model.save(path)
        with pytest.raises(ValueError, match=rf"{name} is pickled in .* it must come from the caller, as custom_objects"):
            SoftQ.load(path, env=pendulum(), trusted=False)
        given = {name: model.policy_kwargs if value is None else value}
        assert th.equal(flat(SoftQ.load(path, pendulum(), trusted=False, custom_objects=given).policy), flat(model.policy))


def test_spaces_come_from_the_caller(saved):
    model, path = saved
    with pytest.raises(ValueError, match=r"observation_space is pickled in .* as env or custom_objects"):
        SoftQ.load(path, trusted=False)
    spaces = dict(observation_space=model.observation_space, action_space=model.action_space)
    loaded = SoftQ.load(path, trusted=False, custom_objects=spaces)
    assert th.equal(flat(loaded.policy), flat(model.policy))
    with pytest.raises(ValueError, match="trusted='no' is not allowed"):
        SoftQ.load(path, trusted="no")


def test_a_policy_of_ones_own_is_named(saved):
    _, path = saved

    def change(name, content):
        return content.replace(b"<function SoftQPolicy.__init__", b"<function Evil.__init__") if name == "data" else content

    rewrite(path, change)
    with pytest.raises(ValueError, match="policy_class='Evil' is not allowed from a file without trust: it must be one of"):
        SoftQ.load(path, env=pendulum(), trusted=False)


def test_no_zip(tmp_path):
    (tmp_path / "model.zip").write_bytes(b"no zip at all")
    with pytest.raises(ValueError, match="is not an agent that Stable-Baselines3 has saved"):
        SoftQ.load(tmp_path / "model.zip", trusted=False)


def test_discrete_agents_and_checkpoints(tmp_path):
    model = DiscreteSoftQ("MlpPolicy", "CartPole-v1", policy_kwargs=dict(net_arch=[8]), buffer_size=500).learn(150)
    model.save(tmp_path / "discrete.zip")
    loaded = DiscreteSoftQ.load(tmp_path / "discrete.zip", env=gym.make("CartPole-v1"), trusted=False)
    assert th.equal(flat(loaded.policy), flat(model.policy))
    checkpoints = tmp_path / "checkpoints"
    agent = small(env=pendulum(), buffer_size=500).learn(40, callback=ResumableCheckpoint(100, checkpoints))
    resumed = resume(SoftQ, checkpoints, pendulum(), trusted=False)
    assert th.equal(flat(resumed.policy), flat(agent.policy))
    assert resumed.replay_buffer.size() == 40
