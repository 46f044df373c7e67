"""Particle options: their values, what fits together, and SQL (2017)."""

import re

import numpy as np
import pytest
import torch as th
from hypothesis import given, settings
from hypothesis import strategies as st

from sb3_softq import SQL_2017, ParticleOptions, SoftQ
from tests.conftest import flat, refused, tiny

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "value", "hint"),
    [
        ("proposal", "uniforn", "'uniform'"),
        ("proposal", None, "one of 'policy', 'uniform'"),
        ("kernel", "RBF", "one of 'rbf', 'delta'"),
        ("kernel", "rbff", "did you mean 'rbf'?"),
        ("kernel", 1, "one of"),
        ("repulsion", "densities", "did you mean 'density'?"),
        ("repulsion", True, "one of 'density', 'kernel'"),
        ("annealing", "Auto", "one of 'auto'"),
    ],
)
def test_names_that_do_not_exist_are_answered_with_those_that_do(name, value, hint):
    assert hint in refused(name, value)


@pytest.mark.parametrize("value", [0.5, 0, -1.0, NAN, INF, True])
def test_annealing_is_at_least_one(value):
    assert "a finite number >= 1.0" in refused("annealing", value)


@pytest.mark.parametrize("value", [0, 0.0, -0.5, 1.5, NAN, "0.5", True])
def test_kernel_update_ratio_is_a_share(value):
    assert "a finite number > 0.0 and <= 1.0" in refused("kernel_update_ratio", value)


@pytest.mark.parametrize(
    "kwargs",
    [{"kernel_update_ratio": 1.0}, {"kernel": "delta"}],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_kernel_update_ratio_splits_particles_of_a_kernel(kwargs):
    with pytest.raises(ValueError, match=r"kernel_update_ratio=(0\.5|1\.0) is not allowed: it must be < 1, and splits"):
        tiny(**{"kernel_update_ratio": 0.5, **kwargs})


def test_one_particle_cannot_be_split():
    with pytest.raises(ValueError, match=r"n_actor_particles=1 is not allowed with kernel_update_ratio=0\.5.*integer >= 2"):
        tiny(kernel_update_ratio=0.5, n_actor_particles=1)
    tiny(kernel_update_ratio=0.5, n_actor_particles=2, policy_kwargs=dict(n_experts=1))


@pytest.mark.parametrize(
    ("kwargs", "name"),
    [
        (dict(n_actor_particles=1), "n_actor_particles=1"),
        (dict(n_actor_particles=2, kernel_update_ratio=0.5), "n_actor_particles=2 and kernel_update_ratio=0.5"),
        (dict(n_actor_particles=4, kernel_update_ratio=0.8), "n_actor_particles=4 and kernel_update_ratio=0.8"),
    ],
)
def test_experts_are_weighed_by_comparison(kwargs, name, tmp_path):
    """A gate that nothing teaches would leave all experts their weight."""
    with pytest.raises(ValueError, match=re.escape(name) + r" is not allowed with n_experts=16, .* must be at least 2"):
        tiny(**kwargs)
    with pytest.raises(ValueError, match=r"with n_experts=2, "):
        tiny(**kwargs, policy_kwargs=dict(n_experts=2))
    tiny(**kwargs, policy_kwargs=dict(n_experts=1)).learn(8)
    (model := tiny()).save(tmp_path / "agent")
    changed = {key: x for key, x in kwargs.items() if key == "n_actor_particles"}
    if "kernel_update_ratio" in kwargs:
        changed["particle_options"] = ParticleOptions(kernel_update_ratio=kwargs["kernel_update_ratio"])
    with pytest.raises(ValueError, match="n_experts=16"):
        SoftQ.load(tmp_path / "agent", env=model.get_env(), **changed)


@settings(max_examples=10, deadline=None)
@given(n_particles=st.integers(2, 6), ratio=st.none() | st.floats(0.05, 0.95))
def test_whatever_is_accepted_teaches_the_gate(n_particles, ratio):
    options = {} if ratio is None else {"kernel_update_ratio": ratio}
    if 0 < ParticleOptions(**options).n_fixed_particles(n_particles) < 2:
        with pytest.raises(ValueError, match="n_experts=16"):
            tiny(n_actor_particles=n_particles, **options)
        return
    model = tiny(n_actor_particles=n_particles, **options)
    before = flat(model.actor.gate)
    model.learn(8)
    assert not th.equal(flat(model.actor.gate), before)


@settings(deadline=None)
@given(n_particles=st.integers(1, 100), n_experts=st.integers(1, 100))
def test_each_expert_has_as_many_particles_in_the_density(n_particles, n_experts):
    """Without some of the experts two contexts ended 0.17 from the truth, with all of them 0.014 (bandits.py)."""
    n_all = n_particles + ParticleOptions().density_particles(n_particles, n_experts)
    assert n_all % n_experts == 0
    assert max(n_particles, 16) <= n_all < max(n_particles, 16) + n_experts
    assert ParticleOptions(n_density_particles=3).density_particles(n_particles, n_experts) == 3


@pytest.mark.parametrize("kwargs", [{}, dict(n_actor_particles=5), dict(policy_kwargs=dict(n_experts=3))])
def test_the_actor_is_taught_by_the_density_of_all_experts(kwargs):
    model, seen = tiny(**kwargs), []
    spread = model.actor.spread_experts

    def record(batch_size, n_particles):
        seen.append(spread(batch_size, n_particles))
        return seen[-1]

    model.actor.spread_experts = record
    model.actor_loss(th.zeros(7, *model.observation_space.shape), th.ones(1))
    (experts,) = seen
    n_experts = model.actor.n_experts
    counts = th.nn.functional.one_hot(experts, n_experts).sum(dim=1)
    assert counts.unique().tolist() == [experts.shape[1] // n_experts]


@pytest.mark.parametrize("value", [3, "kernel", ["kernel"], True])
def test_particle_options_are_a_dict(value):
    with pytest.raises(ValueError, match=re.escape(f"particle_options={value!r} is not allowed")):
        tiny(particle_options=value)


def test_unknown_particle_options():
    with pytest.raises(ValueError, match=r"key of particle_options='kernal' is not allowed.*did you mean 'kernel'"):
        tiny(particle_options={"kernal": "rbf"})


def test_options_are_those_of_the_dataclass():
    options, the_same = ParticleOptions(kernel="delta", n_actor_states=np.int64(3)), {"kernel": "delta", "n_actor_states": 3.0}
    assert tiny(particle_options=options).particle_options == tiny(particle_options=the_same).particle_options == options
    with pytest.raises(AttributeError):
        options.kernel = "rbf"


def test_the_recipe_of_2017_trains():
    """All arguments of the recipe are accepted, and it trains."""
    model = tiny(**SQL_2017, ent_coef=0.1)
    assert model.particle_options.repulsion == "kernel"
    assert model.learn(20)._n_updates > 0


def test_no_repulsion_without_a_kernel_or_a_density():
    with pytest.raises(ValueError, match=r"repulsion='kernel' is not allowed with kernel='delta'.*must be 'density'"):
        tiny(kernel="delta", repulsion="kernel")
    with pytest.raises(ValueError, match=r"repulsion='density' is not allowed with smoothing='none'.*must be 'kernel'"):
        tiny(policy_kwargs={"smoothing": "none"})
