"""Who SoftQ is compared with in the examples that need the extra ``benchmark``."""

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
