"""``compile=True`` gives the numbers of the uncompiled updates and disturbs nothing else."""

import copy
import os
import subprocess
import sys

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.envs import SimpleMultiObsEnv

from sb3_softq import SQL_2017, SoftQ
from sb3_softq.checks import check_compiler
from sb3_softq.data import Trajectory
from sb3_softq.optimization import minimize
from tests.conftest import flat, small

# sb3_softq.checks.check_compiler refuses them, naming the release
pytestmark = pytest.mark.skipif(not hasattr(th._dynamo.config, "trace_autograd_ops"), reason="torch 2.13 compiles the updates")


def make(compile, policy_kwargs=None, **kwargs):
    # eps: Adam would divide small gradients, and what was rounded in them, by their own size
    policy_kwargs = dict(optimizer_kwargs=dict(eps=1e-3)) | (policy_kwargs or {})
    return small(compile=compile, width=16, policy_kwargs=policy_kwargs, **kwargs)


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(policy_delay=2, n_steps=3),
        dict(tau=0.5),
        # a minute of the compiler each
        pytest.param(
            SQL_2017 | dict(ent_coef=0.1, policy_kwargs=SQL_2017["policy_kwargs"] | dict(net_arch=dict(pi=[], qf=[16]))),
            marks=pytest.mark.slow,
        ),
        pytest.param(dict(policy="MultiInputPolicy", env=SimpleMultiObsEnv(discrete_actions=False)), marks=pytest.mark.slow),
    ],
    ids=["default", "target", "original", "dict"],
)
def test_same_numbers(kwargs):
    pair = [make(compile, **kwargs) for compile in (False, True)]
    before = flat(pair[0].policy)
    for model in pair:
        model.set_random_seed(1)
        model.learn(12)
        assert model._n_updates == 4
    eager, compiled = (flat(model.policy) - before for model in pair)
    assert eager.abs().max() > 1e-4
    th.testing.assert_close(compiled, eager, rtol=0.02, atol=1e-5)


def test_a_constant_of_numpy():
    """As a features extractor may have; torch's guards of one were compared to each other as if they were numbers."""
    scale = np.array([1.0, 2.0, 3.0], dtype=np.float32)

    def loss(weight):
        value = (weight * th.as_tensor(scale)).sum()
        return value, {"value": value.detach()}

    weight = th.nn.Parameter(th.ones(3))
    stats = minimize(loss, (weight,), th.optim.SGD([weight], lr=0.1), weight.device, bfloat16=False, compile=True)
    assert stats["value"] == 6.0
    th.testing.assert_close(weight.detach(), 1.0 - 0.1 * th.as_tensor(scale))


def test_an_agents_graph_does_not_depend_on_the_agents_before_it():
    """A graph for several shapes rounds otherwise: an agent that is resumed alone was another one than among others."""

    def loss(weight, batch):
        value = weight * batch.sum()
        return value, {"value": value.detach()}

    weight = th.nn.Parameter(th.tensor(1.0))
    optimizer = th.optim.SGD([weight], lr=0.0)
    th._dynamo.utils.counters.clear()
    for n in (3, 5, 7):
        stats = minimize(loss, (weight, th.ones(n)), optimizer, weight.device, bfloat16=False, compile=True)
        assert stats["value"] == n
    assert th._dynamo.utils.counters["stats"]["unique_graphs"] == 3


@pytest.mark.slow
def test_same_numbers_of_cloning():
    pair = [make(compile) for compile in (False, True)]
    before = flat(pair[0].actor)
    rng = np.random.default_rng(0)
    data = [Trajectory(rng.uniform(-1.0, 1.0, (31, 3)), rng.uniform(-2.0, 2.0, (30, 1)), np.zeros(30), False)]
    for model in pair:
        model.set_random_seed(1)
        model.set_data(data).clone_behaviour(4)
    eager, compiled = (flat(model.actor) - before for model in pair)
    assert eager.abs().max() > 1e-4
    th.testing.assert_close(compiled, eager, rtol=0.02, atol=1e-5)


def test_what_changes_later_reaches_the_compiled_updates(tmp_path):
    """tau, temperature and learning rate, also of an agent that was loaded or copied."""
    original = make(True, ent_coef=0.5, tau=0.9).learn(10)
    original.save(tmp_path / "model")
    loaded = SoftQ.load(tmp_path / "model", env=original.get_env(), device="cpu")
    assert loaded.compile
    loaded.set_logger(original.logger)
    copied = copy.deepcopy(original)
    untouched = flat(original.policy)
    for model in (loaded, copied):
        model.tau, model.ent_coef, model.gamma = 0.0, 50.0, 0.5
        model.lr_schedule = lambda _: 0.0
        model.replay_buffer = original.replay_buffer
        before, target = flat(model.critic), flat(model.critic_target)
        model.logger.dump()
        model.train(1, 8)
        assert th.equal(flat(model.critic), before)
        assert th.equal(flat(model.critic_target), target)
        assert model.logger.name_to_value["train/ent_coef"] == 50.0
        model.lr_schedule = lambda _: 1e-3
        model.train(1, 8)
        assert not th.equal(flat(model.critic), before)
    assert th.equal(flat(original.policy), untouched)


@pytest.mark.parametrize("loaded", [False, True])
def test_without_a_compiler(tmp_path, loaded):
    """An agent that was compiled where it was trained can act without one, not go on with its training."""
    script = "from sb3_softq import SoftQ\nSoftQ('MlpPolicy', 'Pendulum-v1', compile=True)"
    if loaded:
        make(compile=True).save(tmp_path / "model")
        script = (
            "import gymnasium\nfrom sb3_softq import SoftQ\n"
            f"model = SoftQ.load({str(tmp_path / 'model')!r}, env=gymnasium.make('Pendulum-v1'))\n"
            "print(model.predict(model.get_env().reset()))\n"
            "model.learn(10)"
        )
    # an empty cache, so that nothing compiled earlier is found
    env = {**os.environ, "CXX": str(tmp_path / "no-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert result.returncode == 1
    assert bool(result.stdout) == loaded
    assert "ValueError: compile=True is not allowed here: it needs what torch.compile needs, on a CPU a C++" in result.stderr


def test_older_torch(monkeypatch):
    monkeypatch.setattr(th._dynamo, "config", object())
    with pytest.raises(ValueError, match=r"compile=True is not allowed with torch .*: it needs 2.13 or later"):
        check_compiler(th.device("cpu"))
