"""
``--untrusted``: watch an agent that somebody else has trained, from the folder that their RL Zoo has left, without running
what they may have put into it. The RL Zoo reads YAML that can name any function, evaluates strings, imports wrappers by their
names and unpickles statistics; here these are refused, each by its name.
"""

from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import rl_zoo3.utils
import yaml

# Commands that load an agent to look at it
COMMANDS = ("enjoy", "record_video")
# Settings of the environment by which the folder would have code run
_REFUSED = ("env_wrapper", "vec_env_wrapper", "env_kwargs", "normalize")
# But for what gymnasium itself does, without arguments
_HARMLESS = {"env_wrapper": ("gymnasium.wrappers.FlattenObservation", "gymnasium.wrappers.TimeAwareObservation")}
# Whether this process trusts no folder, and the environment that it has made last
state = SimpleNamespace(distrusts=False, env=None)


class PlainLoader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML of plain values, and of the ordered dicts and tuples that the RL Zoo writes."""


_PYTHON = "tag:yaml.org,2002:python/"
PlainLoader.add_constructor(
    f"{_PYTHON}object/apply:collections.OrderedDict",
    lambda loader, node: OrderedDict(*loader.construct_sequence(node, deep=True)),
)
PlainLoader.add_constructor(f"{_PYTHON}tuple", lambda loader, node: tuple(loader.construct_sequence(node, deep=True)))


def saved_hyperparams(stats_path: str, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], str | None]:
    """
    In place of the RL Zoo's ``get_saved_hyperparams``.

    :param stats_path: Folder of the settings that an agent was trained with
    :return: The settings, and the folder if it is there
    :raises ValueError: if one of them needs code of the folder to run
    """
    folder = Path(stats_path)
    if not folder.is_dir():
        return {}, None
    settings: dict[str, Any] = {}
    for name in ("args.yml", "config.yml"):
        found = yaml.load((folder / name).read_text(), PlainLoader) if (folder / name).exists() else {}
        for key in _REFUSED:
            wanted = found.get(key) or []
            if any(value not in _HARMLESS.get(key, ()) for value in (wanted if isinstance(wanted, list) else [wanted])):
                raise ValueError(
                    f"{key}={found[key]!r} in {folder / name} is not followed with --untrusted: look at it, then do without"
                )
        settings = dict(found)
    statistics = sorted(file.name for file in folder.glob("*.pkl"))
    if statistics:
        raise ValueError(f"{statistics[0]} in {folder} is not unpickled with --untrusted: look at it, and then do without")
    return settings | {"normalize": False}, stats_path


def make_test_env(*args: Any, **kwargs: Any) -> Any:
    """In place of the RL Zoo's ``create_test_env``: what it makes has the spaces that the agent's file is not asked for."""
    state.env = _create_test_env(*args, **kwargs)
    return state.env


_create_test_env = rl_zoo3.utils.create_test_env


def distrust() -> None:
    """From now on, this process trusts no folder of an agent."""
    state.distrusts = True
    yaml.UnsafeLoader = PlainLoader
    for module in (rl_zoo3, rl_zoo3.utils):
        module.get_saved_hyperparams = saved_hyperparams  # type: ignore[attr-defined]
        module.create_test_env = make_test_env  # type: ignore[attr-defined]
