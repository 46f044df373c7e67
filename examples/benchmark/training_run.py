"""Train and evaluate one run of the learning benchmark. Started by ``learning.py run``, which stays at the other end."""

import csv
import hashlib
import inspect
import json
import math
import os
import platform
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from learning import COLUMNS, Run, check_same_run, read_rows, write_rows
from measuring import processor
from minatar_games import MinAtarCNN, make_minatar
from sb3_contrib import QRDQN, TQC, CrossQ
from stable_baselines3 import DQN, SAC, TD3
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.utils import LinearSchedule
from time_to_return import family
from variants import VARIANTS

import sb3_softq
from sb3_softq import SQL_2017, DiscreteSoftQ, ParticleOptions, SoftQ
from sb3_softq.checkpoint import ResumableCheckpoint, has_checkpoint, resume
from sb3_softq.products import onednn_is_faster
from sb3_softq.rollouts import Episode, roll_out

CLASSES: dict[str, type[OffPolicyAlgorithm]] = {
    "softq": SoftQ,
    "sac": SAC,
    "td3": TD3,
    "tqc": TQC,
    "crossq": CrossQ,
    "original": SoftQ,
    "discrete": DiscreteSoftQ,
    "dqn": DQN,
    "qrdqn": QRDQN,
}
# Their policy has nothing random in it but the epsilon of exploration
DETERMINISTIC = (TD3, DQN, QRDQN)

# What differs from the defaults of the classes. SAC, TD3, TQC, CrossQ: RL Zoo 2.9.2, hyperparams/*.yml, "mujoco-defaults" of
# the v4 environments (noise_std is its noise_type: normal), but for the critics of CrossQ, which has 2048 there
ARGUMENTS: dict[str, dict[str, Any]] = {
    "softq": dict(learning_starts=5_000),
    "sac": dict(learning_starts=10_000),
    "td3": dict(
        learning_starts=10_000,
        noise_std=0.1,
        train_freq=1,
        gradient_steps=1,
        learning_rate=1e-3,
        batch_size=256,
        policy_kwargs=dict(net_arch=[400, 300]),
    ),
    "tqc": dict(learning_starts=10_000),
    "crossq": dict(learning_starts=5_000, policy_kwargs=dict(net_arch=[256, 256])),
    # SQL (2017), see README.md
    "original": SQL_2017,
    "discrete": {},
    "dqn": {},
    "qrdqn": {},
}
# DQN and QR-DQN of the RL Zoo, which have been tuned for each environment, hyperparams/dqn.yml and qrdqn.yml
CARTPOLE: dict[str, Any] = dict(
    learning_rate=2.3e-3, batch_size=64, buffer_size=100_000, learning_starts=1000, target_update_interval=10, train_freq=256,
    gradient_steps=128, exploration_fraction=0.16, exploration_final_eps=0.04,
)  # fmt: skip
ACROBOT: dict[str, Any] = dict(
    learning_rate=6.3e-4, batch_size=128, buffer_size=50_000, learning_starts=0, target_update_interval=250, train_freq=4,
    gradient_steps=-1, exploration_fraction=0.12, exploration_final_eps=0.1,
)  # fmt: skip
LUNAR_LANDER: dict[str, Any] = dict(
    learning_rate=LinearSchedule(1.5e-3, 0.0, 1.0), batch_size=128, buffer_size=100_000, learning_starts=10_000, gamma=0.995,
    target_update_interval=1, train_freq=256, gradient_steps=-1, exploration_fraction=0.24, exploration_final_eps=0.18,
)  # fmt: skip
# Those on Atari's games, whose runs are ten times as long, with 5,000 random steps in place of 100,000
MINATAR: dict[str, Any] = dict(
    learning_rate=1e-4, batch_size=32, buffer_size=100_000, learning_starts=5000, target_update_interval=1000, train_freq=4,
    gradient_steps=1, exploration_fraction=0.1, exploration_final_eps=0.01,
)  # fmt: skip
MINATAR_NETWORK: dict[str, Any] = dict(policy_kwargs=dict(features_extractor_class=MinAtarCNN, net_arch=[]))


def hidden(**kwargs: Any) -> dict[str, Any]:
    return dict(policy_kwargs=dict(net_arch=[256, 256], **kwargs))


# The RL Zoo's own exceptions
ENV_ARGUMENTS: dict[tuple[str, str], dict[str, Any]] = {
    ("dqn", "CartPole"): CARTPOLE | hidden(),
    ("dqn", "Acrobot"): ACROBOT | hidden(),
    ("dqn", "LunarLander"): ACROBOT | hidden(),
    ("dqn", "MinAtar"): MINATAR | MINATAR_NETWORK,
    ("qrdqn", "CartPole"): CARTPOLE | hidden(n_quantiles=10),
    ("qrdqn", "Acrobot"): ACROBOT | hidden(n_quantiles=25),
    ("qrdqn", "LunarLander"): LUNAR_LANDER | hidden(n_quantiles=170),
    ("qrdqn", "MinAtar"): MINATAR | MINATAR_NETWORK,
    ("discrete", "MinAtar"): MINATAR_NETWORK,
    ("sac", "Swimmer"): dict(gamma=0.999),
    ("td3", "Swimmer"): dict(gamma=0.9999),
    ("tqc", "Swimmer"): dict(gamma=0.999),
    ("crossq", "Swimmer"): dict(gamma=0.999),
    ("tqc", "Hopper"): dict(top_quantiles_to_drop_per_net=5),
}
# SQL (2017) has no automatic temperature
ORIGINAL_REWARD_SCALES = {"Walker2d": 10, "HalfCheetah": 30, "Hopper": 30, "Swimmer": 30, "Humanoid": 100, "Ant": 300}

N_EPISODES = 10
# Part of a return that may be missing where a time limit has cut an episode off
CUT_OFF = 0.01
# Particles per state in the entropy of SoftQ, and states at once, so that the blocks stay small
N_PARTICLES, BLOCK = 64, 250

# column of the results: key of the logger
LOGGED = {
    "entropy": "train/entropy",
    "temperature": "train/ent_coef",
    "effective_sample_size": "train/effective_sample_size",
    "particle_spread": "train/particle_std",
}


def arguments(run: Run) -> dict[str, Any]:
    """Arguments of the algorithm: the benchmark's, those of this environment, and the changes of a variant."""
    name = family(run.env)
    # As large as SB3's default or the run: the same samples, smaller checkpoints
    result = {"buffer_size": min(1_000_000, run.steps), **ARGUMENTS[run.algo], **ENV_ARGUMENTS.get((run.algo, name), {})}
    if run.algo == "original" and "ent_coef" not in run.changes:
        if name not in ORIGINAL_REWARD_SCALES:
            sys.exit(f"SQL (2017) has no reward scale for {run.env}: give its inverse with --set ent_coef=...")
        result["ent_coef"] = 1 / ORIGINAL_REWARD_SCALES[name]
    for change, value in run.changes.items():
        group, _, name = change.partition(".")
        if group == "policy_kwargs" and name:
            result[group] = {**result.get(group, {}), name: value}
        elif group == "particle_options" and name:
            result[group] = replace(ParticleOptions.of(result.get(group)), **{name: value})
        elif change != "variant":
            result[change] = value
    return result


def make_variant(run: Run) -> None:
    """Change in this process what no argument changes."""
    name = run.changes.get("variant")
    if name is None:
        return
    known = VARIANTS.get(CLASSES[run.algo], {})
    if name not in known:
        sys.exit(f"variant={name!r} of {run.algo} is not known: {', '.join(known) or 'it has none'}")
    known[name]()


def make_env(run: Run) -> gym.Env:
    if family(run.env) == "MinAtar":
        return make_minatar(run.env)
    if family(run.env) == "dm_control":
        # only here: it needs the RL Zoo
        from sb3_softq.zoo.environments import register_environment

        register_environment(run.env)
        return gym.wrappers.FlattenObservation(gym.make(run.env))
    return gym.make(run.env)


def make_model(run: Run) -> OffPolicyAlgorithm:
    kwargs = arguments(run)
    env = make_env(run)
    if "noise_std" in kwargs:
        assert env.action_space.shape is not None
        kwargs["action_noise"] = NormalActionNoise(
            np.zeros(env.action_space.shape), np.full(env.action_space.shape, kwargs.pop("noise_std"))
        )
    # what a command line can give: from the one rate to the other over the whole of training, or over its first part
    for name in ("learning_rate", "actor_learning_rate"):
        if isinstance(kwargs.get(name), (list, tuple)):
            first, last, *part = kwargs[name]
            kwargs[name] = LinearSchedule(first, last, *(part or [1.0]))
    return CLASSES[run.algo]("MlpPolicy", env, seed=run.seed, device="cpu", **kwargs)


# ------------------------------------------------------------------ evaluation


@contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """Evaluation draws from generators of its own, seeded: training goes on as if it had not taken place."""
    state = random.getstate(), np.random.get_state(), th.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    th.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])
        th.set_rng_state(state[2])


def q_values(model: OffPolicyAlgorithm, observations: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """Minimum of the critics, as the targets take it; of TQC's quantiles the mean, as its actor takes it."""
    if isinstance(model, (SoftQ, DiscreteSoftQ)):
        return model.q_values(observations, actions)
    observation_tensor, _ = model.policy.obs_to_tensor(observations)
    if isinstance(model, (DQN, QRDQN)):
        with th.no_grad():
            q = (
                model.q_net(observation_tensor)
                if isinstance(model, DQN)
                else model.quantile_net(observation_tensor).mean(dim=1)
            )
        return np.take_along_axis(q.numpy(), actions.reshape(-1, 1), axis=1)[:, 0]
    assert isinstance(model, (SAC, TD3, TQC, CrossQ))
    action_tensor = th.as_tensor(model.policy.scale_action(actions), dtype=th.float32)
    with th.no_grad():
        q = model.critic(observation_tensor, action_tensor)
        q = q.mean(dim=(1, 2)) if isinstance(model, TQC) else th.cat(q, dim=1).amin(dim=1)
    return q.numpy()


def entropy_bonus(model: OffPolicyAlgorithm, observations: np.ndarray) -> np.ndarray:
    """
    What a state earns besides its reward: alpha times the entropy of the policy there, over the normalised box (-1, 1)^d,
    which is the critics' unit.
    """
    if isinstance(model, SoftQ):
        assert isinstance(model.action_space, gym.spaces.Box)
        log_scale = np.log((model.action_space.high - model.action_space.low) / 2.0).sum()
        return model.ent_coef_tensor.numpy() * (model.entropy(observations, n_particles=N_PARTICLES) - log_scale)
    if isinstance(model, DiscreteSoftQ):
        return model.ent_coef_tensor.numpy() * model.entropy(observations)
    if isinstance(model, (SAC, TQC, CrossQ)):
        observation_tensor, _ = model.policy.obs_to_tensor(observations)
        with th.no_grad():
            alpha = model.ent_coef_tensor if model.log_ent_coef is None else th.exp(model.log_ent_coef)
            return -(alpha * model.actor.action_log_prob(observation_tensor)[1]).numpy()
    return np.zeros(len(observations))


def q_against_returns(model: OffPolicyAlgorithm, episodes: list[Episode]) -> tuple[float, float]:
    """
    Critic against reality, along episodes of the policy that it judges. The actual return of the pair at time t is

        G_t = r_t + gamma (alpha H(pi(.|s_{t+1})) + G_{t+1}),

    the soft return, or the plain one for TD3, DQN and QR-DQN. Where an episode terminates nothing follows. Where a time limit
    cuts it off, only pairs count that are so far before it that what is missing weighs less than 1 %.

    :return: Means over the pairs: Q(s_t, a_t), and the bias Q(s_t, a_t) - G_t; nan if no episode is long enough
    """
    horizon = math.ceil(math.log(CUT_OFF) / math.log(model.gamma)) if model.gamma < 1 else sys.maxsize
    all_q, all_returns = [], []
    for episode in episodes:
        n_pairs = len(episode.rewards) - (0 if episode.terminated else horizon)
        if n_pairs <= 0:
            continue
        blocks = range(0, len(episode.rewards), BLOCK)
        bonus = np.concatenate([entropy_bonus(model, episode.observations[i : i + BLOCK]) for i in blocks])
        returns = np.zeros(len(episode.rewards) + 1)
        bonus = np.append(bonus, 0.0)
        for t in reversed(range(len(episode.rewards))):
            returns[t] = episode.rewards[t] + model.gamma * (bonus[t + 1] + returns[t + 1])
        all_q.append(q_values(model, episode.observations[:n_pairs], episode.actions[:n_pairs]))
        all_returns.append(returns[:n_pairs])
    if not all_q:
        return math.nan, math.nan
    q, actual = np.concatenate(all_q), np.concatenate(all_returns)
    return float(q.mean()), float((q - actual).mean())


def evaluate(model: OffPolicyAlgorithm, envs: list[gym.Env], seed: int) -> dict[str, float]:
    with own_randomness(seed):
        deterministic = roll_out(model, envs, deterministic=True, seed=seed)
        # a deterministic policy would do the same again
        stochastic = (
            deterministic if isinstance(model, DETERMINISTIC) else roll_out(model, envs, deterministic=False, seed=seed)
        )
        q, bias = q_against_returns(model, stochastic)
    result = {"q_value": q, "q_bias": bias}
    for name, episodes in (("deterministic", deterministic), ("stochastic", stochastic)):
        returns = [episode.rewards.sum() for episode in episodes]
        result |= {f"{name}_mean": float(np.mean(returns)), f"{name}_std": float(np.std(returns))}
    return result


class Evaluation(BaseCallback):
    """
    Append a row to the run's CSV every ``eval_freq`` steps and at the end.

    :param run: The run
    :param hours: Hours of training, without evaluations, in earlier sittings
    """

    model: OffPolicyAlgorithm

    def __init__(self, run: Run, hours: float):
        super().__init__()
        self.run = run
        self.hours = hours
        self.envs = [make_env(run) for _ in range(N_EPISODES)]
        self.last_step = -1

    def _on_training_start(self) -> None:
        self.started = time.monotonic()

    def _on_step(self) -> bool:
        if self.num_timesteps % self.run.eval_freq == 0:
            self.append_row()
        return True

    def _on_training_end(self) -> None:
        if self.last_step != self.num_timesteps:
            self.append_row()

    def append_row(self) -> None:
        self.hours += (time.monotonic() - self.started) / 3600
        row: dict[str, Any] = {name: self.model.logger.name_to_value.get(key, math.nan) for name, key in LOGGED.items()}
        row |= evaluate(self.model, self.envs, self.run.evaluation_seed)
        row["hours"] = self.hours
        row = {name: "" if math.isnan(value) else f"{value:.6g}" for name, value in row.items()}
        row |= {name: getattr(self.run, name) for name in ("label", "algo", "env", "seed")}
        row["step"] = self.last_step = self.num_timesteps
        with self.run.evaluations.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(row)
        print(
            f"step {row['step']}: {row['deterministic_mean']} deterministic, {row['stochastic_mean']} stochastic", flush=True
        )
        self.started = time.monotonic()


# ------------------------------------------------------------------ training


def train(run: Run) -> None:
    checkpoints = run.folder / "checkpoints"
    configure(run)
    rows = read_rows(run.evaluations)
    if has_checkpoint(checkpoints):
        model = resume(CLASSES[run.algo], checkpoints, make_env(run), device="cpu")
        print(f"resumed from step {model.num_timesteps}", flush=True)
    else:
        model = make_model(run)
        print("started", flush=True)
    # Rows after the checkpoint belong to steps that are now done again
    measured = [0.0, *(float(row["step"]) for row in rows)], [0.0, *(float(row["hours"]) for row in rows)]
    hours = float(np.interp(model.num_timesteps, *measured))
    write_rows(run.evaluations, [row for row in rows if int(row["step"]) <= model.num_timesteps])

    if model.num_timesteps < run.steps:
        # in this order: a checkpoint at a step implies that the evaluation there is in the CSV
        callbacks = [Evaluation(run, hours), ResumableCheckpoint(run.checkpoint_freq, checkpoints)]
        model.learn(run.steps - model.num_timesteps, callbacks, reset_num_timesteps=False)

    temporary = run.folder / "unfinished.zip"
    model.save(temporary)
    os.replace(temporary, run.model)
    shutil.rmtree(checkpoints, ignore_errors=True)


def configure(run: Run) -> None:
    """Write down what is run; a continued run has to be the same."""
    changed = arguments(run)
    defaults = {name: p.default for name, p in inspect.signature(CLASSES[run.algo]).parameters.items()}
    left_out = ("policy", "env", "seed", "device", "verbose", "tensorboard_log", "_init_setup_model")
    used = {name: value for name, value in {**defaults, **changed}.items() if name not in left_out}
    packages = ("stable_baselines3", "sb3_contrib", "torch", "gymnasium", "mujoco", "numpy")
    versions = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    if CLASSES[run.algo] in (SoftQ, DiscreteSoftQ):
        versions |= {"sb3_softq": sb3_softq.__version__, "commit": commit(), "source": source()}
    # how many digits products have depends on both
    versions |= {"processor": processor(), "float32_matmul_precision": th.get_float32_matmul_precision()}
    # schedules as text
    config = json.loads(json.dumps({**run.identity, "arguments": used, "versions": versions}, default=repr))
    if run.config.exists():
        check_same_run(run)
        before = json.loads(run.config.read_text())
        if before["arguments"] != config["arguments"]:
            different = sorted(name for name, value in config["arguments"].items() if before["arguments"].get(name) != value)
            sys.exit(f"{run.folder} holds a run with other defaults of {', '.join(different)}: remove it to start again")
        if before["versions"] != config["versions"]:
            print(f"Warning: begun with {before['versions']}, continued with {config['versions']}")
        return
    temporary = run.config.with_suffix(".tmp")
    temporary.write_text(json.dumps(config, indent=1) + "\n")
    os.replace(temporary, run.config)


def commit() -> str:
    """Of the package that is used, empty where it does not lie in a clone."""
    command = ["git", "-C", str(Path(sb3_softq.__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def source() -> str:
    """Digest of the package: a commit does not tell what was changed since."""
    digest = hashlib.sha256()
    for path in sorted(Path(sb3_softq.__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def stop_with_parent() -> None:
    """Nothing is ever written to standard input: it ends when ``learning.py`` does, however that was killed."""
    os.read(0, 1)  # not sys.stdin, whose lock would be held when this process ends first
    print("learning.py has ended, so does this process", flush=True)
    os._exit(1)


def choose_library() -> None:
    """Who multiplies, for all algorithms: oneDNN where it is faster, which has the digits of float32 there."""
    if onednn_is_faster():
        # on Intel's processors with AMX this means bfloat16
        th.set_float32_matmul_precision("medium")


def main() -> None:
    run = Run(**json.loads(sys.argv[1]))
    threading.Thread(target=stop_with_parent, daemon=True).start()
    th.set_num_threads(1)
    choose_library()
    make_variant(run)
    train(run)


if __name__ == "__main__":
    main()
