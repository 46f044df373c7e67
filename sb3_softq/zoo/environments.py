"""Environments of other packages, registered when a command names one: Atari, DeepMind control, Gymnasium-Robotics."""

import importlib
import re
from collections.abc import Sequence
from itertools import pairwise

import gymnasium as gym

# what an environment's name begins with; the packages that it needs, the one that registers it first; our extra with them
PACKAGES = (
    (r"ALE/|\w+NoFrameskip-v", ("ale_py", "cv2"), "atari"),
    (r"dm_control/", ("shimmy", "dm_control"), "dm_control"),
    (r"(AdroitHand|AntMaze|Fetch|FrankaKitchen|HandManipulate|HandReach|PointMaze)", ("gymnasium_robotics",), "robotics"),
)


def environment_of(arguments: Sequence[str]) -> str:
    """
    :param arguments: Of a command of the RL Zoo
    :return: The environment that they name, or an empty string
    """
    for argument, following in pairwise([*arguments, ""]):
        if argument == "--env":
            return following
        if argument.startswith("--env="):
            return argument.partition("=")[2]
    return ""


def register_environment(env_id: str) -> None:
    """
    Import the package that registers an environment.

    :param env_id: Name of the environment; nothing happens if it is registered, or of no package that is known here
    :raises ImportError: if the package is not there, naming the extra
    """
    if env_id in gym.registry:
        return
    for pattern, packages, extra in PACKAGES:
        if re.match(pattern, env_id):
            try:
                modules = [importlib.import_module(package) for package in packages]
            except ImportError as error:
                raise ImportError(f'{env_id} needs {packages[-1]}: pip install "sb3-softq[{extra}]"') from error
            gym.register_envs(modules[0])
