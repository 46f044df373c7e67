"""``python -m sb3_softq.zoo COMMAND ...``: the commands of the RL Zoo, with their own flags, knowing ``--algo softq``."""

import argparse
import importlib
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna

from sb3_softq.zoo import HYPERPARAMS, untrusted
from sb3_softq.zoo.environments import environment_of, register_environment
from sb3_softq.zoo.storage import shared

COMMANDS = {
    "train": "rl_zoo3.train",
    "enjoy": "rl_zoo3.enjoy",
    "record_video": "rl_zoo3.record_video",
    "record_training": "rl_zoo3.record_training",
    "plot_train": "rl_zoo3.plots.plot_train",
    "plot_from_file": "rl_zoo3.plots.plot_from_file",
    "all_plots": "rl_zoo3.plots.all_plots",
    "load_from_hub": "rl_zoo3.load_from_hub",
    "push_to_hub": "rl_zoo3.push_to_hub",
    "benchmark": "rl_zoo3.benchmark",
}


def is_for_softq(arguments: Sequence[str]) -> bool:
    """
    :param arguments: Of a command
    :return: Whether its algorithm is ours
    """
    # which knows abbreviations, as the RL Zoo does
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--algo")
    return bool(parser.parse_known_args(arguments)[0].algo == "softq")


def with_configuration(arguments: Sequence[str]) -> list[str]:
    """
    :param arguments: Of ``train``
    :return: The same, after our hyper-parameters where it is our algorithm: of two files that are named the last one counts
    """
    return [*(("--conf-file", str(HYPERPARAMS / "softq.yml")) if is_for_softq(arguments) else ()), *arguments]


def without_trust(command: str, arguments: Sequence[str]) -> list[str]:
    """
    :param command: One of :data:`COMMANDS`
    :param arguments: Of it
    :return: The same without ``--untrusted``, which is ours, and is followed
    """
    rest = [argument for argument in arguments if argument != "--untrusted"]
    if len(rest) < len(arguments):
        if command not in untrusted.COMMANDS or not is_for_softq(rest):
            sys.exit(f"--untrusted is for {' and '.join(untrusted.COMMANDS)} of --algo softq")
        untrusted.distrust()
    return rest


def call_with_softq(call: Any) -> Any:
    """
    ``subprocess.call`` for commands that start others of the RL Zoo: the child knows the algorithm too, and is this Python.
    """

    def wrapped(command: Any, *args: Any, **kwargs: Any) -> int:
        if isinstance(command, list) and command[:1] == ["python"]:
            # python -m rl_zoo3.record_video ..., or python enjoy.py ...
            target, rest = (command[2], command[3:]) if command[1] == "-m" else (Path(command[1]).stem, command[2:])
            command = [sys.executable, "-m", "sb3_softq.zoo", target.rpartition(".")[2], *rest]
        return call(command, *args, **kwargs)

    return wrapped


def mend_push_to_hub() -> None:
    """RL Zoo 2.9 imports a function that the hub's package has renamed since, and that returned a dict."""
    push_to_hub = importlib.import_module("huggingface_sb3.push_to_hub")
    if not hasattr(push_to_hub, "generate_metadata"):
        push_to_hub.__dict__["generate_metadata"] = lambda *args: push_to_hub._generate_metadata(*args).to_dict()


class TrialNumber(int):
    """The RL Zoo takes 0 for none."""

    def __bool__(self) -> bool:
        return True


def mend_trial_id() -> None:
    """``--trial-id 0`` is the first trial."""
    exp_manager = importlib.import_module("rl_zoo3.exp_manager")
    read_hyperparameters = exp_manager.ExperimentManager.read_hyperparameters

    def wrapped(self: Any) -> Any:
        self.trial_id = None if self.trial_id is None else TrialNumber(self.trial_id)
        return read_hyperparameters(self)

    exp_manager.ExperimentManager.read_hyperparameters = wrapped


def mend_learning_rate() -> None:
    """``learning_rate: auto`` reaches the agent: the RL Zoo takes every string for a schedule of its own."""
    exp_manager = importlib.import_module("rl_zoo3.exp_manager")
    preprocess = exp_manager.ExperimentManager._preprocess_schedules

    def wrapped(hyperparams: dict[str, Any]) -> dict[str, Any]:
        if hyperparams.get("learning_rate") != "auto":
            return preprocess(hyperparams)
        rest = {name: value for name, value in hyperparams.items() if name != "learning_rate"}
        return preprocess(rest) | {"learning_rate": "auto"}

    exp_manager.ExperimentManager._preprocess_schedules = staticmethod(wrapped)


def main() -> None:
    """Run the command that the command line names."""
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command not in COMMANDS:
        known = f"commands: {', '.join(COMMANDS)}; python -m sb3_softq.zoo COMMAND --help shows the flags of one"
        if command in ("-h", "--help"):
            print(known)
            return
        sys.exit(f"{command!r} is not a command of the RL Zoo\n{known}" if command else known)
    arguments = without_trust(command, sys.argv[2:])
    register_environment(environment_of(arguments))
    sys.argv = [f"sb3_softq.zoo {command}", *(with_configuration(arguments) if command == "train" else arguments)]
    subprocess.call = call_with_softq(subprocess.call)
    optuna.create_study = shared(optuna.create_study)
    for mend in {"train": (mend_trial_id, mend_learning_rate), "push_to_hub": (mend_push_to_hub,)}.get(command, ()):
        mend()
    # Some of them parse their arguments only as a main program. Not one that was imported before: runpy warns of that.
    sys.modules.pop(COMMANDS[command], None)
    runpy.run_module(COMMANDS[command], run_name="__main__")


if __name__ == "__main__":
    main()
