"""After a short training on a one-step environment the policy is the Boltzmann distribution of the reward."""

import numpy as np
import pytest
from scipy import integrate
from stable_baselines3 import SAC

from examples.benchmark.bandits import CASES, FOUR_MODES, SHORT_TRAINING, Modes, boltzmann, errors, four_modes, total_variation
from sb3_softq import SoftQ

# So few updates need all of the rate: five contexts are 0.31 away where it falls, and 0.11 after 6,000 updates
TRAINING = SHORT_TRAINING | dict(learning_rate=1e-3)
# Narrow modes and several contexts take longer to be right. The narrow mode of the plane is found on most seeds, not on all
STEPS = dict.fromkeys(CASES, 2_500) | {"three_narrow_modes": 6_500, "turning": 4_000}
del STEPS["three_widths_2d"]
# The fast ones have what these do not: narrow modes, contexts, bounds. fidelity.py has all on five seeds
SLOW = ("three_modes", "ring", "rising", "turning", "three_widths", "two_distant_modes")
# of the worst context, where each sees a fifth of the data
SOFT_VALUE = dict.fromkeys(CASES, 0.2) | {"turning": 0.35}


@pytest.mark.parametrize("name", [pytest.param(x, marks=pytest.mark.slow) if x in SLOW else x for x in STEPS])
def test_policy_is_the_boltzmann_distribution(name):
    """
    With the tanh correction left out or differentiated with respect to a, or the repulsion too weak, the distance is
    above 0.3 in one case or another. With a single expert it is 0.28 for three narrow modes and 0.29 for three widths.
    """
    env = CASES[name]()
    model = SoftQ("MlpPolicy", env, seed=0, **TRAINING).learn(STEPS[name])
    found = errors(env, model)
    assert found["total_variation"] < 0.15
    assert found["soft_value"] == pytest.approx(0.0, abs=SOFT_VALUE[name])


def test_four_modes_in_eight_dimensions_are_kept():
    """A single expert loses two of them."""
    env = FOUR_MODES["four_modes_8d"]()
    model = SoftQ("MlpPolicy", env, seed=0, **TRAINING).learn(5_000)
    found = errors(env, model)
    assert found["share"] < 0.1
    assert found["soft_value"] == pytest.approx(0.0, abs=0.4)
    modes, shares = model.modes(np.zeros(1, dtype=np.float32))
    assert shares == pytest.approx(np.full(4, 0.25), abs=0.1)
    assert sorted(env.reward_fn.nearest(modes)) == [0, 1, 2, 3]
    assert np.abs(modes - np.asarray(env.reward_fn.centres)[env.reward_fn.nearest(modes)]).max() < 0.2


def test_a_gaussian_actor_fails_on_two_modes():
    env = CASES["two_modes"]()
    model = SAC("MlpPolicy", env, seed=0, **TRAINING).learn(STEPS["two_modes"])
    actions, _ = model.predict(np.zeros((20_000, 1), dtype=np.float32))
    assert total_variation(env, 0.0, 1.0, actions) > 0.3


def test_the_truth_of_modes_against_quadrature_and_the_grid():
    modes = Modes((0.3, 0.7), ([-0.9], [0.4]), (0.2, 0.1))
    z, _ = integrate.quad(lambda a: np.exp(modes(0.0, np.array([a]))), -1, 1, points=[-0.9, 0.4])
    assert modes.log_z() == pytest.approx(np.log(z), rel=1e-6)
    # a third of the first lies beyond the edge
    assert modes.masses() == pytest.approx([0.3 * 0.6915, 0.7], rel=1e-3)
    assert modes.nearest(np.array([[-0.8], [0.5], [-0.2]])).tolist() == [0, 1, 0]
    for name in ("three_narrow_modes", "three_widths_2d"):
        env = CASES[name]()
        assert env.reward_fn.log_z() == pytest.approx(boltzmann(env, 0.0, 1.0)[1], abs=1e-2)


@pytest.mark.parametrize("action_dim", [4, 6, 8, 12])
def test_four_modes_lie_in_the_box_far_from_each_other(action_dim):
    modes = four_modes(action_dim)
    centres = np.array(modes.centres)
    distances = np.linalg.norm(centres[:, None] - centres, axis=2)[np.triu_indices(4, 1)]
    assert distances.min() >= 5.6 * modes.widths[0]
    assert modes.masses() == pytest.approx([modes.masses()[0]] * 4)
