"""The package's modules: small, and imported in one direction."""

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "sb3_softq"
# From the bottom up, a level each: a module imports from levels below its own alone, or from its own
LEVELS = (
    # and packages that hold modules and no code
    ("version", "checkpointing", "serialization"),
    (
        "checks",
        "finite",
        "faults",
        "checkpointing.disk",
        "spaces",
        "soft_value",
        "stein",
        "replay",
        "observations",
        "optimization",
        "annealing",
        "histogram",
        "stacking",
        "serialization.files",
        "serialization.values",
        "serialization.objects",
        "serialization.agent",
        "checkpointing.mujoco_state",
        "serialization.untrusted",
        "data",
    ),
    (
        "modes",
        "products",
        "checkpointing.env_state",
        "checkpointing.manifest",
        "checkpointing.segments",
        "checkpointing.folders",
        "saving",
    ),
    ("checkpointing.training_state", "checkpointing.interruption", "sharing"),
    ("options", "networks"),
    ("actor", "batch_norm"),
    ("critic",),
    ("averaged_policy",),
    ("policies", "discrete_policy", "off_policy"),
    ("logged_data",),
    ("base", "cloning", "queries"),
    ("own_target", "returns"),
    ("discrete", "softq"),
    ("checkpoint", "composition", "vec_env", "rollouts", "plots"),
    ("envs.multi_goal", "envs.pusher"),
    ("envs",),
    ("callbacks", "tracking"),
    ("zoo.environments", "zoo.search", "zoo.storage", "zoo.tuned", "zoo.untrusted"),
    ("zoo",),
    ("zoo.__main__",),
)
# The package's face, which every module of it is behind
FACE = ""


@cache
def modules() -> dict[str, ast.Module]:
    """Syntax trees by the name within the package."""
    trees = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        trees[name] = ast.parse(path.read_text())
    return trees


def imports(tree: ast.Module) -> set[str]:
    """Modules of the package that a module imports, in functions too; what is for types alone is no import when it runs."""
    for_types = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    names = set()
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    known = modules()
    inner = {name.removeprefix("sb3_softq").removeprefix(".") for name in names if name.split(".")[0] == "sb3_softq"}
    return {name for name in inner if name in known and name != FACE}


def test_every_module_has_a_level():
    assert {name for level in LEVELS for name in level} | {FACE} == set(modules())


def test_imports_run_one_way():
    level_of = {name: i for i, level in enumerate(LEVELS) for name in level}
    upward = [
        f"{name} imports {other}"
        for name, tree in modules().items()
        if name != FACE
        for other in imports(tree)
        if level_of[other] > level_of[name]
    ]
    assert not upward


def test_no_circles():
    graph = {name: imports(tree) - {name} for name, tree in modules().items() if name != FACE}
    list(TopologicalSorter(graph).static_order())
    # and a circle would be found
    with pytest.raises(CycleError):
        list(TopologicalSorter(graph | {"stein": {"softq"}}).static_order())


@pytest.mark.parametrize("name", modules())
def test_modules_are_small(name):
    path = ROOT.joinpath(*name.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    assert len(file.read_text().splitlines()) <= 400
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ClassDef):
            docstring = node.body[0] if ast.get_docstring(node) is not None else None
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length - (((docstring.end_lineno or 0) - docstring.lineno + 1) if docstring else 0) <= 350


def test_names_of_release_0_1_0_can_be_imported():
    from sb3_softq.base import polyak_update
    from sb3_softq.envs.multi_goal import MultiGoalEnv, roll_out
    from sb3_softq.plots import draw_multi_goal, draw_pusher, figure_to_array, new_figure, plot_level_curves
    from sb3_softq.policies import CnnPolicy, MlpPolicy, MultiInputPolicy, ParticleCritic, SamplingActor, SoftQPolicy
    from sb3_softq.softq import SoftQ

    names = [polyak_update, MultiGoalEnv, roll_out, draw_multi_goal, draw_pusher, figure_to_array, new_figure]
    names += [plot_level_curves, CnnPolicy, MlpPolicy, MultiInputPolicy, ParticleCritic, SamplingActor, SoftQPolicy, SoftQ]
    assert all(callable(name) for name in names)
