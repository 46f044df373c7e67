"""The learning benchmark through its command line: killed, continued, collected, reported."""

import csv
import importlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch as th
from scipy.special import log_softmax
from stable_baselines3.common.distributions import SquashedDiagGaussianDistribution

from sb3_softq import softq
from sb3_softq.actor import SamplingActor
from sb3_softq.critic import min_q_values
from sb3_softq.products import onednn_is_faster
from tests.programs import output_of, run_python

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "benchmark" / "learning.py"
ABLATIONS = SCRIPT.with_name("ablations.py")
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
STEPS, EVAL_FREQ = 600, 150
RUN = [
    *("run", "--algos", "softq", "sac", "--envs", "Pendulum-v1", "--seeds", "3", "--steps", str(STEPS), "--jobs", "1"),
    *("--eval-freq", str(EVAL_FREQ), "--checkpoint-freq", "300"),
    *("--set", "learning_starts=100", "train_freq=4", "gradient_steps=1", "--logs", "logs"),
]


def start(folder: Path, *args: str) -> subprocess.Popen:
    command = [sys.executable, str(SCRIPT), *args]
    return subprocess.Popen(command, cwd=folder, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def call(folder: Path, *args: str, script: Path = SCRIPT) -> str:
    return output_of([str(script), *args], ENV, folder, timeout=300)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def wait_until(condition, process: subprocess.Popen | None = None) -> None:
    end = time.monotonic() + 200
    while not condition():
        assert process is None or process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("script", "args", "message"),
    [
        ("learning.py", ("run", "--steps", "1e400"), "'1e400' is not a positive number"),
        ("learning.py", ("report", "--csv", "nowhere.csv"), "No such file or directory"),
        ("learning.py", ("report", "--csv", "empty.csv"), "No columns to parse"),
        ("fidelity.py", ("--updates", "0"), "'0' is not a positive number"),
        ("soak.py", ("--steps", "2999", "--every", "1000"), "--steps 2999 is not allowed"),
    ],
)
def test_what_is_wrong_is_said_without_a_traceback(tmp_path: Path, script: str, args: tuple[str, ...], message: str):
    (tmp_path / "empty.csv").write_text("")
    result = run_python([str(SCRIPT.with_name(script)), *args], ENV, tmp_path, timeout=300)
    output = result.stdout + result.stderr
    assert result.returncode != 0
    assert message in output
    assert "Traceback" not in output


def test_fidelity_writes_a_row_for_each_training(tmp_path: Path):
    """Each change, task and seed, and the numbers that there are of them."""
    variants, cases = ["default", "SAC"], ["two_modes", "four_modes_4d"]
    args = ["--variants", *variants, "--cases", *cases, "--seeds", "3", "4", "--updates", "16", "--jobs", "1"]
    output = call(tmp_path, *args, "--out", "new/fidelity.csv", script=SCRIPT.with_name("fidelity.py"))
    out = tmp_path / "new" / "fidelity.csv"
    assert list(out.parent.iterdir()) == [out]
    table = pd.read_csv(out).set_index(["variant", "case", "seed"])
    assert list(table.index) == list(product(variants, cases, [3, 4]))
    assert list(table.columns) == ["total_variation", "share", "soft_value"]
    in_one_dimension = table.index.get_level_values("case") == "two_modes"
    np.testing.assert_array_equal(table.total_variation.notna(), in_one_dimension)
    np.testing.assert_array_equal(table.share.notna(), ~in_one_dimension)
    # SAC has no soft value
    np.testing.assert_array_equal(table.soft_value.notna(), table.index.get_level_values("variant") == "default")
    # 16 updates teach nothing: half of a box cannot be two narrow modes
    assert table.total_variation.dropna().between(0.2, 1.0).all()
    first, second = table.total_variation["SAC", "two_modes"]
    assert f"SAC, two_modes: total_variation {first:+.2f} {second:+.2f}\n" in output


def test_a_run_that_is_named_twice_is_trained_once(tmp_path: Path):
    run = ("run", "--algos", "sac", "sac", "--envs", "Pendulum-v1", "--seeds", "3", "3", "--steps", "20", "--eval-freq", "20")
    output = call(tmp_path, *run, "--jobs", "2", "--logs", "logs")
    assert "[1/1]" in output
    assert output.count("finished after") == 1


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_killed_run_continues(tmp_path: Path):
    name = "{}-learning_starts=100-train_freq=4-gradient_steps=1"
    softq, sac = (tmp_path / "logs" / name.format(algo) / "Pendulum-v1" / "3" for algo in ("softq", "sac"))

    # Killed in the second half of the first run, when there is something to continue
    process = start(tmp_path, *RUN)
    wait_until(lambda: any(softq.glob("checkpoints/checkpoint-*")), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    log = softq / "log.txt"
    # nobody is left who would write into the folder
    wait_until(lambda: "learning.py has ended" in log.read_text())
    assert not (softq / "model.zip").exists()
    assert not sac.exists()

    output = call(tmp_path, *RUN)
    assert "finished after" in output
    assert "resumed from step 300" in log.read_text()
    assert log.read_text().count("started") == 1
    for run in (softq, sac):
        rows = read(run / "evaluations.csv")
        assert [int(row["step"]) for row in rows] == list(range(EVAL_FREQ, STEPS + 1, EVAL_FREQ))
        assert np.all(np.diff([float(row["hours"]) for row in rows]) > 0)
        assert all(-2000 < float(row[f"{kind}_mean"]) < 0 for row in rows for kind in ("deterministic", "stochastic"))
        assert all(float(row["temperature"]) > 0 for row in rows)
        assert (run / "model.zip").exists()
        assert not (run / "checkpoints").exists()
        # Pendulum is always cut off, and too early for a return to compare Q with
        assert rows[0]["q_bias"] == ""
    assert all(float(row["effective_sample_size"]) >= 1 for row in read(softq / "evaluations.csv"))
    config = json.loads((softq / "config.json").read_text())
    assert config["arguments"]["train_freq"] == 4
    assert config["versions"]["processor"]
    assert config["versions"]["float32_matmul_precision"] == ("medium" if onednn_is_faster() else "highest")

    before = log.read_text()
    assert call(tmp_path, *RUN).count("skipped") == 2
    assert log.read_text() == before

    call(tmp_path, "collect", "--name", "both", "--logs", "logs", "--out", "results")
    rows = read(tmp_path / "results" / "both.csv")
    assert len(rows) == 2 * STEPS // EVAL_FREQ
    assert {row["algo"] for row in rows} == {"softq", "sac"}

    # what the logs still have replaces its rows, what they have no longer is kept
    sac_rows = [row for row in rows if row["algo"] == "sac"]
    shutil.rmtree(tmp_path / "logs" / name.format("sac"))
    write_rows(tmp_path / "results" / "both.csv", [*sac_rows, *(row | {"hours": "99"} for row in rows if row not in sac_rows)])
    call(tmp_path, "collect", "--name", "both", "--logs", "logs", "--out", "results", "--update")
    assert read(tmp_path / "results" / "both.csv") == rows
    call(tmp_path, "collect", "--name", "both", "--logs", "logs", "--out", "results")
    assert read(tmp_path / "results" / "both.csv") == [row for row in rows if row["algo"] == "softq"]

    process = start(tmp_path, *(str(2 * STEPS) if arg == str(STEPS) else arg for arg in RUN))
    assert "choose another --label" in process.communicate()[0]
    assert process.returncode == 1


def module_beside_the_script(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    return importlib.import_module(name)


@pytest.fixture
def training_run(monkeypatch):
    return module_beside_the_script("training_run", monkeypatch)


def test_products_have_the_digits_of_float32(training_run):
    """What torch calls medium precision is bfloat16 where the processor is fast at it, an error of 0.1 here."""
    left, right = th.randn(256, 512), th.randn(512, 256)
    before = th.get_float32_matmul_precision()
    try:
        training_run.choose_library()
        error = (left @ right - (left.double() @ right.double())).abs().max()
    finally:
        th.set_float32_matmul_precision(before)
    assert error < 1e-3


def test_evaluation_leaves_random_numbers_alone(training_run):
    def draw() -> tuple[float, float, float]:
        return random.random(), np.random.random(), th.rand(1).item()

    random.seed(1), np.random.seed(1), th.manual_seed(1)
    expected = draw(), draw()
    random.seed(1), np.random.seed(1), th.manual_seed(1)
    first = draw()
    with training_run.own_randomness(7):
        inside = draw()
    assert (first, draw()) == expected
    with training_run.own_randomness(7):
        assert draw() == inside


def test_q_against_returns(training_run, monkeypatch):
    """By hand, with Q = 7, entropy bonus 2, reward 1, gamma = 0.5: what is missing weighs below 1 % after 7 steps."""
    monkeypatch.setattr(training_run, "q_values", lambda model, observations, actions: np.full(len(actions), 7.0))
    monkeypatch.setattr(training_run, "entropy_bonus", lambda model, observations: np.full(len(observations), 2.0))
    model = SimpleNamespace(gamma=0.5)

    def episode(length: int, terminated: bool):
        return training_run.Episode(np.zeros((length, 3)), np.zeros((length, 1)), np.ones(length), terminated, {}, [])

    # returns of the three pairs: 1 + 0.5 (2 + 2.5), 1 + 0.5 (2 + 1), 1
    q, bias = training_run.q_against_returns(model, [episode(3, True), episode(7, False)])
    assert (q, bias) == pytest.approx((7.0, 7.0 - (3.25 + 2.5 + 1.0) / 3))
    # without end: r + gamma (2 + G) = G, G = 4
    assert training_run.q_against_returns(model, [episode(60, False)])[1] == pytest.approx(3.0, abs=0.01)
    assert np.isnan(training_run.q_against_returns(model, [episode(7, False)])).all()


@pytest.mark.parametrize("algo", ["softq", "sac", "td3", "tqc", "crossq"])
def test_entropy_bonus_and_q(training_run, algo: str):
    """Shapes, and the critic's unit: the entropy is that over the normalised box."""
    kwargs = {} if algo == "td3" else {"ent_coef": 0.5}
    model = training_run.CLASSES[algo]("MlpPolicy", "Pendulum-v1", device="cpu", **kwargs)
    observations = np.random.default_rng(0).normal(size=(400, 3)).astype(np.float32)
    bonus = training_run.entropy_bonus(model, observations)
    q = training_run.q_values(model, observations, np.zeros((400, 1), dtype=np.float32))
    assert bonus.shape == q.shape == (400,)
    # An untrained policy is about as wide as the box (-1, 1): alpha log 2; in Pendulum's units it would be alpha log 4. That
    # of CrossQ has wide Gaussians, whose actions are at the bounds
    expected, tolerance = (0.0, 0.0) if algo == "td3" else (0.5 * np.log(2), 0.15)
    assert bonus.mean() <= expected + tolerance
    assert bonus.mean() >= expected - (1.0 if algo == "crossq" else tolerance)


@pytest.mark.parametrize("algo", ["discrete", "dqn", "qrdqn"])
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Acrobot-v1", "LunarLander-v3", "MinAtar/Breakout-v1"])
def test_discrete_actions(training_run, algo: str, env_id: str):
    """What the critics say of the actions that were taken, and what the entropy brings."""
    run = training_run.Run(algo, algo, env_id, 1, 1000, 500, 500, {}, "logs")
    model = training_run.make_model(run)
    observations = np.stack([model.observation_space.sample() for _ in range(50)])
    if env_id.startswith("MinAtar"):
        assert model.policy.observation_space.shape == (4, 10, 10)
    actions = np.array([model.action_space.sample() for _ in range(50)])
    q = training_run.q_values(model, observations, actions)
    greedy = training_run.q_values(model, observations, model.predict(observations, deterministic=True)[0])
    assert q.shape == greedy.shape == (50,)
    assert (greedy >= q - 1e-5).all()
    assert (greedy > q).any()
    bonus = training_run.entropy_bonus(model, observations)
    if algo == "discrete":
        # at the first temperature, in units of the scale, which is 1 before there are rewards
        assert 0.01 * np.log(model.action_space.n) + 1e-6 >= bonus.max() > 0.0
        # in double precision: where values lie far apart there is next to none
        n_actions = int(model.action_space.n)
        values = model.q_values(observations, np.tile(np.arange(n_actions), (50, 1))).astype(np.float64)
        log_probs = log_softmax(values / 0.01, axis=1)
        np.testing.assert_allclose(bonus, -0.01 * (np.exp(log_probs) * log_probs).sum(axis=1), rtol=1e-3, atol=1e-8)
    else:
        assert not bonus.any()
        # tuned for each environment by the RL Zoo
        assert (model.learning_rate if env_id != "LunarLander-v3" else model.lr_schedule(0.5)) in (
            2.3e-3,
            6.3e-4,
            1e-4,
            7.5e-4,
        )


@pytest.mark.parametrize(("part", "end"), [([], 0.0), ([0.5], 0.5)], ids=["the whole of training", "its first part"])
def test_two_rates_are_one_that_falls(training_run, part, end):
    changes = dict(learning_rate=(1e-2, 1e-3, *part), actor_learning_rate=[4e-3, 0.0, *part])
    run = training_run.Run("softq", "softq", "Pendulum-v1", 1, 1000, 500, 500, changes, "logs")
    model = training_run.make_model(run)
    middle = (1 + end) / 2
    assert [model.lr_schedule(progress) for progress in (1, middle, end, 0)] == pytest.approx([1e-2, 5.5e-3, 1e-3, 1e-3])
    assert [model.actor_lr_schedule(progress) for progress in (1, middle, end, 0)] == pytest.approx([4e-3, 2e-3, 0.0, 0.0])


def test_games_begin_with_their_seed_and_end(training_run):
    env = training_run.make_minatar("MinAtar/Breakout-v1")
    starts = {seed: env.reset(seed=seed)[0] for seed in range(4)}
    np.testing.assert_array_equal(env.reset(seed=0)[0], starts[0])
    assert any(not np.array_equal(starts[0], starts[seed]) for seed in range(1, 4))
    assert env.spec.max_episode_steps == 2500
    assert set(np.unique(starts[0])) == {0.0, 1.0}


@pytest.fixture
def variant(training_run):
    """Makes one of the variants, which last for the process that they are made for."""
    known = {name: make for variants in training_run.VARIANTS.values() for name, make in variants.items()}
    yield lambda name: known[name]()
    patch.stopall()


@pytest.mark.parametrize(
    ("algo", "name"),
    [
        ("sac", "no_wide_initialisation"),
        ("softq", "no_wide_initialization"),
        ("softq", "double_q"),
        ("discrete", "gaussian_actor"),
    ],
)
def test_variant_that_would_do_nothing(training_run, algo: str, name: str):
    with pytest.raises(SystemExit, match=f"variant='{name}' of {algo} is not known"):
        training_run.make_variant(SimpleNamespace(algo=algo, changes={"variant": name}))


def small_agent(training_run, **kwargs):
    return training_run.SoftQ("MlpPolicy", "Pendulum-v1", seed=0, device="cpu", **kwargs)


OBSERVATIONS = th.randn(500, 3, generator=th.Generator().manual_seed(0))


def test_variant_no_wide_initialisation(training_run, variant):
    def spread() -> float:
        actor = small_agent(training_run).actor
        return actor.particles(actor.features(OBSERVATIONS), actor.noise(actor.spread_experts(500, 4)))[0].std().item()

    assert 0.8 < spread() < 1.2
    variant("no_wide_initialisation")
    assert spread() < 0.4


def test_variants_of_the_smoothing(training_run, variant):
    def widths(**policy_kwargs) -> th.Tensor:
        actor = small_agent(training_run, policy_kwargs=policy_kwargs).actor
        return actor.particles(actor.features(OBSERVATIONS), actor.noise(actor.spread_experts(500, 4)))[1].exp()

    assert widths(log_std_init=-8.0).max() < 0.1
    assert widths(smoothing="local").std(dim=1).mean() > 0.05
    variant("smoothing_floor")
    variant("global_bandwidth")
    assert widths(log_std_init=-8.0).min() > 0.1
    assert widths(smoothing="local").std(dim=1).max() < 1e-6


def test_variants_of_the_soft_value(training_run, variant):
    """Jensen's inequality, and a density that knows of more components than the particle's own is lower there."""

    def value() -> float:
        th.manual_seed(0)
        return model.soft_value(OBSERVATIONS.numpy(), n_particles=8).mean()

    model = small_agent(training_run, ent_coef=1.0)
    log_mean_exp = value()
    own = model.propose(OBSERVATIONS, 1)[1].mean()
    variant("mean_value")
    assert value() < log_mean_exp - 0.1
    variant("density_in_value")
    u, log_prob = model.propose(OBSERVATIONS, 1)
    assert u.shape == (500, 1, 1)
    assert log_prob.mean() < own - 0.5


def test_variant_one_critic(training_run, variant):
    critic, u = small_agent(training_run).critic, th.zeros(500, 1, 1)
    first, second = critic.q_values(critic.features(OBSERVATIONS), th.tanh(u))
    assert th.equal(softq.min_q_values(critic, OBSERVATIONS, u), th.minimum(first, second))
    variant("one_critic_in_stein_step")
    assert th.equal(softq.min_q_values(critic, OBSERVATIONS, u), first)


@pytest.mark.parametrize(("name", "pessimism"), [("mean_of_critics", 0.0), ("beyond_the_minimum", 1.5)])
def test_variants_of_the_pessimism(training_run, variant, name: str, pessimism: float):
    """What takes the minimum of both critics gets another value, and its gradient."""
    critic, u = small_agent(training_run).critic, th.zeros(500, 1, 1, requires_grad=True)
    first, second = critic.q_values(critic.features(OBSERVATIONS), th.tanh(u))
    assert (first - second).abs().max() > 0.01
    expected = (first + second) / 2 - pessimism * (first - second).abs() / 2
    variant(name)
    q_values = min_q_values(critic, OBSERVATIONS, u)
    th.testing.assert_close(q_values, expected)
    th.testing.assert_close(*(th.autograd.grad(values.sum(), u)[0] for values in (q_values, expected)))


def test_variant_joint_gradient(training_run, variant):
    """The same Q, other gradients, but for particles that are copies of the transitions."""
    critic = small_agent(training_run).critic.train()

    def q_and_gradients(next_obs: th.Tensor, next_actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        outputs, next_outputs = critic.joint_outputs(OBSERVATIONS, actions, next_obs, next_actions)
        gradients = th.autograd.grad(outputs.sub(1).square().sum(), list(critic.parameters()))
        return th.cat([outputs.unsqueeze(2), next_outputs], dim=2), th.cat([gradient.flatten() for gradient in gradients])

    actions = th.tanh(OBSERVATIONS[:, :1])
    batches = (OBSERVATIONS, actions.unsqueeze(1).repeat(1, 2, 1)), (OBSERVATIONS.flip(0), th.zeros(500, 2, 1))
    (same_q, same), (other_q, other) = (q_and_gradients(*batch) for batch in batches)
    variant("joint_gradient")
    (joint_same_q, joint_same), (joint_other_q, joint_other) = (q_and_gradients(*batch) for batch in batches)
    th.testing.assert_close(joint_same_q, same_q)
    th.testing.assert_close(joint_other_q, other_q)
    th.testing.assert_close(joint_same, same, rtol=1e-3, atol=1e-3)
    assert (joint_other - other).norm() > 0.05 * other.norm()


def test_variant_gaussian_actor(training_run, variant):
    """One Gaussian per state; its loss is SAC's, here by SB3's own distribution, with gradients in mean and width."""
    variant("gaussian_actor")
    options = training_run.ParticleOptions(n_actor_states=256)
    kwargs = dict(n_value_particles=1, n_actor_particles=1, particle_options=options, policy_kwargs=dict(n_experts=1))
    model = small_agent(training_run, learning_starts=100, ent_coef=0.3, **kwargs)
    mean, log_std = model.actor.components(model.actor.features(OBSERVATIONS), 3)
    assert th.equal(mean[:, 0], mean[:, 2])
    th.manual_seed(0)
    loss, stats = model.actor_loss(OBSERVATIONS, th.tensor([0.3]))
    th.manual_seed(0)
    model.actor.noise(th.zeros(500, 1))  # drawn and not used
    gaussian = SquashedDiagGaussianDistribution(1).proba_distribution(mean[:, 0], log_std[:, 0])
    u = mean[:, 0] + log_std[:, 0].exp() * th.randn(500, 1)
    log_prob = gaussian.log_prob(th.tanh(u), u)
    q_values = softq.min_q_values(model.critic, OBSERVATIONS, u.unsqueeze(1))
    assert loss.item() == pytest.approx((0.3 * log_prob - q_values.squeeze(1)).mean().item(), abs=1e-4)
    assert stats["entropy"].item() == pytest.approx(-log_prob.mean().item(), abs=1e-4)
    loss.backward()
    assert all((parameter.grad != 0).any() for parameter in model.actor.parameters() if parameter.requires_grad)
    model.learn(120)


def test_variant_double_q(training_run, variant):
    """By hand, in numbers: a policy of two actions by one network, its values by the other one."""
    model = training_run.DiscreteSoftQ("MlpPolicy", "CartPole-v1", device="cpu")
    q, q_target = th.tensor([[1.0, 3.0]]), th.tensor([[5.0, 2.0]])
    model.critic, model.critic_target = (lambda obs: q), (lambda obs: q_target)
    own = model.next_values(OBSERVATIONS, th.tensor([2.0]))
    assert own.item() == pytest.approx(2 * np.log(np.exp(5 / 2) + np.exp(1)))
    variant("double_q")
    first = 1 / (1 + np.exp(1))
    by_hand = first * (5 - 2 * np.log(first)) + (1 - first) * (2 - 2 * np.log(1 - first))
    assert model.next_values(OBSERVATIONS, th.tensor([2.0])).item() == pytest.approx(by_hand)


@pytest.mark.parametrize(("algo", "env_id"), [("tqc", "Pendulum-v1"), ("qrdqn", "CartPole-v1")])
def test_variant_compiled_loss(training_run, variant, algo: str, env_id: str):
    """It is compiled, and the agent learns the same."""

    def parameters() -> th.Tensor:
        arguments = dict(policy_kwargs=dict(net_arch=[8]), learning_starts=20, seed=0, device="cpu")
        model = training_run.CLASSES[algo]("MlpPolicy", env_id, **arguments).learn(60)
        assert model._n_updates > 0
        return th.nn.utils.parameters_to_vector(model.policy.parameters()).detach()

    uncompiled = parameters()
    variant("compiled_loss")
    th._dynamo.utils.counters.clear()
    compiled = parameters()
    assert th._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    th.testing.assert_close(compiled, uncompiled, rtol=1e-4, atol=1e-5)


def test_variant_ema_actor_collects_half(training_run, variant):
    """Episodes 1, 3, ... of Pendulum, of 200 steps each, are collected by the EMA actor."""
    variant("ema_actor_collects_half")
    model = small_agent(training_run, learning_starts=0, train_freq=600)
    collectors = []
    forward = SamplingActor.forward

    def record(self, obs: th.Tensor, deterministic: bool = False) -> th.Tensor:
        collectors.append(self is model.actor)
        return forward(self, obs, deterministic)

    with patch.object(SamplingActor, "forward", record):
        model.learn(600)
    assert collectors == [True] * 200 + [False] * 200 + [True] * 200


def test_variant_explore_with_component_means(training_run, variant):
    """With almost no shift, component means are the noise xi, and smoothing noise of 0.7 makes the actions wider."""
    policy = small_agent(training_run, policy_kwargs=dict(log_std_init=-0.3)).policy

    def spread(actor: SamplingActor) -> float:
        return th.atanh(actor._predict(OBSERVATIONS).clamp(-0.9999, 0.9999)).std().item()

    wide = spread(policy.actor)
    variant("explore_with_component_means")
    assert spread(policy.actor) < wide - 0.1
    assert spread(policy.ema_actor) == pytest.approx(wide, rel=0.1)


def test_ablations(tmp_path: Path):
    """Too short to learn: runs of their labels, and the table."""
    script = [
        *("run", "--envs", "Pendulum-v1", "--seeds", "1", "--steps", "201"),
        "--only",
        "defaults",
        "no-wide-initialisation",
    ]
    call(tmp_path, *script, script=ABLATIONS)
    output = call(tmp_path, "table", "--csv", "ablations.csv", script=ABLATIONS)
    rows = read(tmp_path / "ablations.csv")
    assert {(row["label"], row["env"], row["seed"]) for row in rows} == {
        (label, "Pendulum-v1", "1") for label in ("defaults", "no-wide-initialisation")
    }
    returns = {row["label"]: float(row["deterministic_mean"]) for row in rows if row["step"] == "201"}
    table = {line.split("`")[1]: [x.strip() for x in line.split("|")[2:-1]] for line in output.splitlines() if "`" in line}
    assert list(table) == ["defaults", "no-wide-initialisation"]
    for label, cells in table.items():
        assert cells[2:] == [
            f"{returns[label]:,.0f}",
            f"{returns[label]:,.0f} (1)",
            f"{returns[label] / returns['defaults']:.2f}",
        ]
    # without the defaults there is nothing to compare with
    shutil.rmtree(tmp_path / "logs" / "ablations" / "defaults")
    output = call(tmp_path, "table", "--csv", "alone.csv", script=ABLATIONS)
    assert f"| {returns['no-wide-initialisation']:,.0f} (1) |  |" in output
    config = json.loads(
        (tmp_path / "logs" / "ablations" / "no-wide-initialisation" / "Pendulum-v1" / "1" / "config.json").read_text()
    )
    assert config["changes"] == {"compile": True, "variant": "no_wide_initialisation"}
    # what is decided on is not what results are measured on
    assert config["evaluation_seed"] == 5_000


def write_synthetic(path: Path) -> None:
    rng = np.random.default_rng(0)
    empty = ("q_bias", "temperature", "entropy", "effective_sample_size", "particle_spread")
    columns = ("label", "algo", "env", "seed", "step", "deterministic_mean", "stochastic_mean", "hours", *empty)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for label, level in (("softq", 1000.0), ("sac", 500.0), ("variant", 200.0), ("single", 100.0)):
            for env in ("HalfCheetah-v4", "Hopper-v4", "Unknown-v0"):
                # the variant has not finished
                for seed, step in np.ndindex(1 if label == "single" else 3, 2 if label == "variant" else 3):
                    returns = level * (step + 1) + rng.normal()
                    writer.writerow(
                        dict(label=label, algo="softq", env=env, seed=seed, step=1000 * (step + 1), hours=0.1 * (step + 1))
                        | dict(deterministic_mean=returns, stochastic_mean=returns - 100)
                    )


def test_report(tmp_path: Path):
    pytest.importorskip("rliable")
    write_synthetic(tmp_path / "results.csv")
    output = call(tmp_path, "report", "--csv", "results.csv", "--out", "figures", "--reps", "50")
    table = {
        line.split("|")[1].strip(): [x.strip() for x in line.split("|")[2:-1]] for line in output.splitlines() if "|" in line
    }
    assert list(table) == ["", "---", "softq", "sac", "variant", "single"]
    # at the last step that all have
    assert "After 2,000 steps, deterministic actions" in output
    assert [round(float(cell.split(" ±")[0].replace(",", "")), -2) for cell in table["softq"][:3]] == [2000, 2000, 2000]
    # by hand: the returns differ by about 1, so the interquartile mean is about that of the two environments
    expected = ((2000 + 289.4) / (10574 + 289.4) + (2000 - 18.8) / (3226 - 18.8)) / 2
    assert abs(float(table["softq"][3].split()[0]) - expected) < 0.01
    assert table["sac"][4] == "1.00 (1.00 to 1.00)"
    # one seed has no interval
    assert table["single"][4] == "1.00"
    assert re.fullmatch(r"-?\d\.\d\d", table["single"][3])
    for name in ("curves", "aggregate", "diagnostics"):
        assert 5_000 < (tmp_path / "figures" / f"{name}.png").stat().st_size < 500_000
    # compared with nobody
    call(tmp_path, "report", "--csv", "results.csv", "--out", "alone", "--reps", "50", "--labels", "softq")
    with_panel, without = (plt.imread(tmp_path / folder / "aggregate.png").shape[1] for folder in ("figures", "alone"))
    assert without < with_panel


def test_published_returns_stand_at_their_step(tmp_path: Path, monkeypatch):
    """Of deterministic actions, in the versions and after as many steps as they are of."""
    pytest.importorskip("rliable")
    report = module_beside_the_script("report", monkeypatch)
    write_synthetic(tmp_path / "results.csv")
    rows = read(tmp_path / "results.csv")
    for row in rows:
        # Hopper-v4 ends before it
        row["step"] = str(int(row["step"]) * (50 if row["env"] != "Hopper-v4" else 25))
        row["env"] = row["env"].replace("Unknown-v0", "Ant-v5")
    write_rows(tmp_path / "results.csv", rows)

    def points(returns: str) -> dict[str, list[float]]:
        results = report.Results([tmp_path / "results.csv"], None, "softq", returns)
        axes = report.plot_curves(results, returns, 10).axes
        lines = {ax.get_title(): [line for line in ax.get_lines() if line.get_linestyle() == "None"] for ax in axes}
        assert all(set(line.get_xdata()) == {100_000} for drawn in lines.values() for line in drawn)
        plt.close("all")
        return {env: [float(line.get_ydata()[0]) for line in drawn] for env, drawn in lines.items() if env}

    assert points("deterministic") == {"HalfCheetah-v4": [8112, 8597, 7328], "Hopper-v4": [], "Ant-v5": []}
    assert not any(points("stochastic").values())


def test_report_of_discrete_actions(tmp_path: Path):
    """Environments with a folder in their name, and other scales than MuJoCo's."""
    steps = ("--steps", "300", "--eval-freq", "150", "--seeds", "1", "--jobs", "2", "--logs", "logs")
    call(tmp_path, "run", "--algos", "discrete", "dqn", "--envs", "CartPole-v1", *steps)
    call(tmp_path, "run", "--algos", "discrete", "--envs", "MinAtar/Breakout-v1", *steps)
    call(tmp_path, "collect", "--name", "all", "--logs", "logs", "--out", ".")
    rows = read(tmp_path / "all.csv")
    runs = {("discrete", "CartPole-v1"), ("dqn", "CartPole-v1"), ("discrete", "MinAtar/Breakout-v1")}
    assert {(row["algo"], row["env"]) for row in rows} == runs
    last = [row for row in rows if row["algo"] == "discrete" and row["env"] == "CartPole-v1"][-1]
    output = call(tmp_path, "report", "--csv", "all.csv", "--out", "figures", "--reps", "50", "--reference", "discrete")
    assert "0 is 22 (CartPole), of 1 500" in output
    (line,) = (line for line in output.splitlines() if line.startswith("| discrete"))
    expected = (float(last["deterministic_mean"]) - 22) / (500 - 22)
    assert abs(float(line.split("|")[4].split()[0]) - expected) < 0.01
