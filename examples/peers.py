"""Who SoftQ is compared with in the examples that need the extra ``benchmark``."""

import argparse
from pathlib import Path
from typing import Any

from sb3_contrib import CrossQ
from stable_baselines3 import SAC
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_softq import SoftQ

# Networks of 2x256 for all
ALGORITHMS: dict[str, tuple[type[OffPolicyAlgorithm], dict[str, Any]]] = {
    "SoftQ": (SoftQ, {}),
    "SAC": (SAC, {}),
    "CrossQ": (CrossQ, dict(policy_kwargs=dict(net_arch=[256, 256]))),
}
COLOURS = {"SoftQ": "tab:blue", "SAC": "tab:orange", "CrossQ": "tab:purple", "from scratch": "0.5"}


def compiled(name: str, compile: bool) -> dict[str, Any]:
    """What compiles an agent of this name, "from scratch" being a SoftQ; the others have no such argument."""
    return dict(compile=True) if compile and name not in ("SAC", "CrossQ") else {}


def parser_of(description: str | None, out: Path, seeds: list[int]) -> argparse.ArgumentParser:
    """
    :param description: Of the script
    :param out: Where its figure goes
    :param seeds: Of its results
    :return: What all scripts take that compare
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algos", nargs="+", choices=list(ALGORITHMS), default=list(ALGORITHMS))
    parser.add_argument("--compile", action="store_true", help="SoftQ compiled: faster, the same numbers but for rounding")
    parser.add_argument("--seeds", type=int, nargs="+", default=seeds)
    parser.add_argument("--logs", type=Path, default=Path("logs") / out.stem, help="what is finished, one file each")
    parser.add_argument("--out", type=Path, default=out, help="file of the figure; the numbers are in a .csv beside it")
    return parser
