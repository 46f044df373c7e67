"""Search space of ``-optimize`` for the RL Zoo."""

from typing import Any

import optuna
from rl_zoo3.hyperparams_opt import sample_her_params

NET_ARCHS = {"small": [64, 64], "medium": [256, 256], "big": [400, 300]}


def sample_softq_params(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    Draw hyper-parameters of SoftQ, or of DiscreteSoftQ.

    :param trial: Trial of the study
    :param n_actions: Dimension of the action space, 0 where actions are Discrete
    :param n_envs: Number of environments, which nothing here depends on
    :param additional_args: Whether there is a replay buffer of HER, and its arguments, which are sampled too
    :return: Arguments of the constructor
    """
    params: dict[str, Any] = {
        "one_minus_gamma": trial.suggest_float("one_minus_gamma", 0.0003, 0.05, log=True),
        "learning_rate": trial.suggest_float("learning_rate", 1e-4, 3e-3, log=True),
        # a multiple of the returns' scale
        "ent_coef_init": trial.suggest_float("ent_coef_init", 0.001, 0.1, log=True),
        "ent_coef_learning_rate": trial.suggest_float("ent_coef_learning_rate", 1e-4, 1e-2, log=True),
        "batch_size_pow": trial.suggest_int("batch_size_pow", 6, 9),
        "net_arch": trial.suggest_categorical("net_arch", list(NET_ARCHS)),
    }
    # Critics with batch normalisation have no target networks
    if n_actions == 0 or not trial.suggest_categorical("batch_norm", [True, False]):
        params["tau"] = trial.suggest_float("tau", 0.003, 0.05, log=True)
    her: dict[str, Any] = {}
    if additional_args.get("using_her_replay_buffer"):
        her = sample_her_params(trial, {}, additional_args["her_kwargs"])
    if n_actions == 0:
        params["target_entropy"] = trial.suggest_float("target_entropy", 0.005, 0.5, log=True)
        return convert_softq_params(params) | her
    params |= {
        "actor_learning_rate_factor": trial.suggest_categorical("actor_learning_rate_factor", [0.3, 1.0, 3.0]),
        # in nats per action dimension
        "target_entropy_per_dim": trial.suggest_float("target_entropy_per_dim", -2.0, 0.0),
        "value_particles_pow": trial.suggest_int("value_particles_pow", 0, 3),
        "actor_particles_pow": trial.suggest_int("actor_particles_pow", 1, 3),
        "log_std_init": trial.suggest_float("log_std_init", -2.5, 0.0),
        # no choice: a trial holds what was suggested, and who loads it has nothing else
        "n_actions": trial.suggest_int("n_actions", n_actions, n_actions),
    }
    return convert_softq_params(params) | her


def convert_softq_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """
    :param sampled_params: As suggested to a trial
    :return: Arguments of the constructor
    """
    learning_rate, net_arch = sampled_params["learning_rate"], NET_ARCHS[sampled_params["net_arch"]]
    result: dict[str, Any] = {
        "learning_rate": learning_rate,
        "ent_coef": f"auto_{sampled_params['ent_coef_init']:.6g}",
        "ent_coef_learning_rate": sampled_params["ent_coef_learning_rate"],
        "gamma": 1 - sampled_params["one_minus_gamma"],
        "tau": sampled_params.get("tau", 1.0),
        "batch_size": 2 ** sampled_params["batch_size_pow"],
    }
    if "n_sampled_goal" in sampled_params:
        result["replay_buffer_kwargs"] = {name: sampled_params[name] for name in ("n_sampled_goal", "goal_selection_strategy")}
    if "target_entropy" in sampled_params:
        return result | {"target_entropy": sampled_params["target_entropy"], "policy_kwargs": {"net_arch": net_arch}}
    result |= {
        "actor_learning_rate": learning_rate * sampled_params["actor_learning_rate_factor"],
        "n_value_particles": 2 ** sampled_params["value_particles_pow"],
        "n_actor_particles": 2 ** sampled_params["actor_particles_pow"],
        "policy_kwargs": {
            "net_arch": {"pi": net_arch[:1], "qf": net_arch},
            "log_std_init": sampled_params["log_std_init"],
            "batch_norm": "tau" not in sampled_params,
        },
    }
    # not in trials of release 0.1.0
    if "n_actions" in sampled_params:
        result["target_entropy"] = sampled_params["target_entropy_per_dim"] * sampled_params["n_actions"]
    return result
