"""What an agent can be asked: samples, densities, entropies and values agree with each other, in the environment's units."""

from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.envs import FakeImageEnv, SimpleMultiObsEnv

from sb3_softq import SoftQ

BOXES: dict[str, Any] = {
    "asymmetric": spaces.Box(-1.0, 4.0, (1,), dtype=np.float32),
    "plane": spaces.Box(np.array([-1, 2], dtype=np.float32), np.array([3, 2.5], dtype=np.float32)),
    "float64": spaces.Box(-3.0, 1.0, (1,), dtype=np.float64),
}


class Target(gym.Env):
    """One step per episode: act near a point of the box that depends on the sign of the observation."""

    action_space: spaces.Box

    def __init__(self, action_space):
        self.action_space = action_space
        self.observation_space = spaces.Box(-1.0, 1.0, (2,), dtype=np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation = self.np_random.uniform(-1.0, 1.0, 2).astype(np.float32)
        return self.observation, {}

    def step(self, action):
        low, high = self.action_space.low, self.action_space.high
        unit = (np.asarray(action, dtype=np.float64) - low) / (high - low)
        goal = 0.7 if self.observation[0] > 0 else 0.3
        return self.observation, -8.0 * float(((unit - goal) ** 2).sum()), True, False, {}


def train(action_space, n_timesteps=300, **kwargs):
    arguments: dict[str, Any] = {
        "learning_rate": 2e-3,
        "batch_size": 64,
        "learning_starts": 100,
        "ent_coef": 0.5,
        "particle_options": {"annealing": 1.0},
    }
    arguments |= kwargs
    arguments["policy_kwargs"] = {"net_arch": [32]} | arguments.get("policy_kwargs", {})
    return SoftQ("MlpPolicy", Target(action_space), buffer_size=1000, seed=0, device="cpu", **arguments).learn(n_timesteps)


@pytest.fixture(scope="module")
def models():
    return {name: train(space) for name, space in BOXES.items()}


@pytest.fixture(scope="module")
def obs():
    return np.array([[0.5, 0.1], [-0.5, 0.3], [0.9, -0.9]], dtype=np.float32)


def grid(space, n_bins, oversampling=1):
    """Centres of the cells of a grid over the box, and the volume of a cell."""
    n = n_bins * oversampling
    axes = [
        low + (np.arange(n) + 0.5) / n * (high - low)
        for low, high in zip(space.low.astype(float), space.high.astype(float), strict=True)
    ]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(axes))
    return points, np.prod(space.high.astype(float) - space.low) / n ** len(axes)


def log_density_on_grid(model, obs, points):
    """One query for all points, so that all of them see the same particles."""
    return model.log_prob(obs, np.broadcast_to(points, (len(obs), *points.shape))).astype(np.float64)


def density_on_grid(model, obs, points, n_queries=40):
    """Each query is an unbiased estimate of the density: of their mean, little noise is left."""
    return np.mean([np.exp(log_density_on_grid(model, obs, points)) for _ in range(n_queries)], axis=0)


@pytest.mark.parametrize("name", BOXES)
@pytest.mark.parametrize("n", [1, 7])
def test_shapes(models, obs, name, n):
    model, shape = models[name], BOXES[name].shape
    actions = model.sample_actions(obs, n)
    assert actions.shape == (3, n, *shape)
    assert all(BOXES[name].contains(action.astype(BOXES[name].dtype)) for action in actions.reshape(-1, *shape))
    for query in (model.log_prob, model.q_values):
        assert query(obs, actions).shape == (3, n)
        assert query(obs, actions[:, 0]).shape == (3,)
        assert query(obs[:1], actions[:1]).shape == (1, n)
    for query in (model.entropy, model.soft_value):
        assert query(obs).shape == (3,)
        assert query(obs, n_particles=n).shape == (3,)


@pytest.mark.parametrize("name", BOXES)
def test_single_observation(models, obs, name):
    """No axis for the batch where there is none in the observation."""
    model, shape = models[name], BOXES[name].shape
    actions = model.sample_actions(obs[0], 5)
    assert actions.shape == (5, *shape)
    for query in (model.log_prob, model.q_values):
        assert query(obs[0], actions).shape == (5,)
        assert query(obs[0], actions[0]).shape == ()
    for query in (model.entropy, model.soft_value):
        assert query(obs[0]).shape == ()
    np.testing.assert_allclose(model.q_values(obs[0], actions), model.q_values(obs[:1], actions[None])[0], atol=1e-5)


@pytest.mark.parametrize("name", BOXES)
def test_modes(models, obs, name):
    """The one way that there is: the place that the reward names, which the deterministic action takes too."""
    model, space = models[name], BOXES[name]
    all_actions, all_shares = model.modes(obs)
    width = space.high - space.low
    for state, actions, shares in zip(obs, all_actions, all_shares, strict=True):
        assert actions.shape == (len(shares), *space.shape)
        assert 0.9 < shares.sum() <= 1.0
        assert (np.diff(shares) <= 0).all()
        assert np.abs(actions[0] - model.predict(state, deterministic=True)[0]).max() < 0.2 * width.max()
        assert (np.abs(actions[0] - space.low - (0.7 if state[0] > 0 else 0.3) * width) < 0.25 * width).all()
    actions, shares = model.modes(obs[0], min_share=0.9, n_particles=64)
    assert actions.shape == (1, *space.shape)
    assert shares.shape == (1,)
    assert (shares[0] * 64).is_integer()
    assert len(model.modes(obs[0], min_share=1.0)[1]) <= 1
    with pytest.raises(ValueError, match=r"min_share=1\.5 is not allowed: it must be a finite number >= 0\.0 and <= 1\.0"):
        model.modes(obs[0], min_share=1.5)
    with pytest.raises(ValueError, match="n_particles=0"):
        model.modes(obs[0], n_particles=0)


@pytest.mark.parametrize("shape", [(), (2, 2)])
def test_action_spaces_of_other_shapes(obs, shape):
    model = train(spaces.Box(-1.0, 4.0, shape, dtype=np.float32), n_timesteps=110)
    actions = model.sample_actions(obs, 6)
    assert actions.shape == (3, 6, *shape)
    for query in (model.log_prob, model.q_values):
        assert query(obs, actions).shape == (3, 6)
        assert query(obs, actions[:, 0]).shape == (3,)
        assert query(obs[0], actions[0]).shape == (6,)
        assert query(obs[0], actions[0, 0]).shape == ()
    modes, shares = model.modes(obs[0])
    assert modes.shape == (len(shares), *shape)


@pytest.mark.parametrize("policy", ["CnnPolicy", "MultiInputPolicy"])
def test_images_and_dictionaries(policy):
    env: gym.Env
    if policy == "CnnPolicy":
        env = FakeImageEnv(screen_height=36, screen_width=36, n_channels=1, discrete=False)
        extractor = {"features_dim": 8}
    else:
        env = SimpleMultiObsEnv(discrete_actions=False)
        extractor = {"cnn_output_dim": 8}
    model = SoftQ(policy, env, buffer_size=20, seed=0, policy_kwargs={"net_arch": [8], "features_extractor_kwargs": extractor})
    # as the environment gives it, channels last
    single, _ = env.reset()
    batch = (
        {key: np.stack([value] * 2) for key, value in single.items()} if isinstance(single, dict) else np.stack([single] * 2)
    )
    for observation, axes in ((single, ()), (batch, (2,))):
        actions = model.sample_actions(observation, 4)
        assert actions.shape == (*axes, 4, *model.action_space.shape)
        assert model.log_prob(observation, actions).shape == (*axes, 4)
        assert model.q_values(observation, actions).shape == (*axes, 4)
        assert model.entropy(observation).shape == axes
        assert model.soft_value(observation).shape == axes


@pytest.mark.parametrize("name", BOXES)
def test_density_integrates_to_one_over_the_box(models, obs, name):
    points, volume = grid(BOXES[name], 2000 if BOXES[name].shape == (1,) else 100)
    mass = np.exp(log_density_on_grid(models[name], obs, points)).sum(axis=1) * volume
    np.testing.assert_allclose(mass, 1.0, atol=5e-3)


@pytest.mark.parametrize("smoothing", ["learned", "local"])
def test_samples_have_the_density_that_is_claimed(obs, smoothing):
    space = BOXES["asymmetric"]
    model = train(space, policy_kwargs={"smoothing": smoothing})
    n_bins, oversampling = 25, 10
    points, volume = grid(space, n_bins, oversampling)
    density = density_on_grid(model, obs, points) * volume
    probabilities = density.reshape(len(obs), n_bins, oversampling).sum(axis=2)
    for samples, expected in zip(model.sample_actions(obs, 20_000), probabilities, strict=True):
        counts, _ = np.histogram(samples, bins=n_bins, range=(space.low[0], space.high[0]))
        assert 0.5 * np.abs(counts / counts.sum() - expected).sum() < 0.03


def test_samples_have_the_density_that_is_claimed_in_the_plane(models, obs):
    space, n_bins, oversampling = BOXES["plane"], 8, 5
    points, volume = grid(space, n_bins, oversampling)
    density = density_on_grid(models["plane"], obs, points, n_queries=5) * volume
    probabilities = density.reshape(len(obs), n_bins, oversampling, n_bins, oversampling).sum(axis=(2, 4))
    for samples, expected in zip(models["plane"].sample_actions(obs, 20_000), probabilities, strict=True):
        counts, _ = np.histogramdd(samples, bins=n_bins, range=list(zip(space.low, space.high, strict=True)))
        assert 0.5 * np.abs(counts / counts.sum() - expected).sum() < 0.06


@pytest.mark.parametrize("name", BOXES)
def test_entropy_is_minus_the_mean_log_prob_of_samples(models, obs, name):
    """With finitely many particles one is a lower bound and the other an upper bound."""
    model = models[name]
    entropy = np.mean([model.entropy(obs) for _ in range(100)], axis=0)
    upper = -np.mean([model.log_prob(obs, model.sample_actions(obs, 2_500)) for _ in range(20)], axis=(0, 2))
    np.testing.assert_allclose(entropy, upper, atol=0.06)
    assert (entropy < upper + 0.03).all()


@pytest.mark.parametrize("name", BOXES)
def test_entropy_is_that_of_the_density_on_a_grid(models, obs, name):
    points, volume = grid(BOXES[name], 2000 if BOXES[name].shape == (1,) else 100)
    log_density = log_density_on_grid(models[name], obs, points)
    exact = -(np.exp(log_density) * log_density).sum(axis=1) * volume
    np.testing.assert_allclose(np.mean([models[name].entropy(obs) for _ in range(20)], axis=0), exact, atol=0.06)
    # no density over the box has more than the uniform one
    assert (exact < np.log(np.prod(BOXES[name].high - BOXES[name].low))).all()


@pytest.mark.parametrize("name", BOXES)
@pytest.mark.parametrize("proposal", ["policy", "uniform"])
def test_soft_value_is_the_log_integral_of_q(models, obs, name, proposal):
    """V = alpha log integral exp(Q / alpha) da over the environment's box, by quadrature, whatever the proposal."""
    model, alpha = models[name], 0.5
    points, volume = grid(BOXES[name], 2000 if BOXES[name].shape == (1,) else 100)
    q_values = model.q_values(obs, np.broadcast_to(points, (3, *points.shape))).astype(np.float64)
    exact = alpha * (np.logaddexp.reduce(q_values / alpha, axis=1) + np.log(volume))
    before = model.particle_options
    model.particle_options = replace(before, proposal=proposal)
    values = np.mean([model.soft_value(obs, n_particles=1000) for _ in range(10)], axis=0)
    model.particle_options = before
    np.testing.assert_allclose(values, exact, atol=0.03)


@pytest.mark.parametrize("name", BOXES)
def test_q_values_are_those_of_the_critics(models, obs, name):
    model, space = models[name], BOXES[name]
    actions = model.sample_actions(obs, 1)[:, 0]
    normalised = 2.0 * (actions - space.low) / (space.high - space.low) - 1.0
    with th.no_grad():
        q_values = th.cat(model.critic(th.as_tensor(obs), th.as_tensor(normalised, dtype=th.float32)), dim=1)
    np.testing.assert_allclose(model.q_values(obs, actions), q_values.min(dim=1).values.numpy(), atol=1e-5)


def test_density_scales_with_the_box(obs):
    """The same policy on a box of another size: the density shifts by the log of the volume, the samples by the map."""
    near, far = train(spaces.Box(-1.0, 1.0, (2,), dtype=np.float32)), train(spaces.Box(-10.0, 30.0, (2,), dtype=np.float32))
    far.set_parameters(near.get_parameters())
    near_actions = near.sample_actions(obs, 50)
    far_actions = 20.0 * near_actions + 10.0
    results = []
    for model, actions in ((near, near_actions), (far, far_actions)):
        th.manual_seed(0)
        results.append((model.log_prob(obs, actions), model.entropy(obs), model.soft_value(obs), model.q_values(obs, actions)))
    log_volume = 2 * np.log(20.0)
    for (near_answer, far_answer), shift in zip(
        zip(*results, strict=True), (-log_volume, log_volume, 0.5 * log_volume, 0.0), strict=True
    ):
        np.testing.assert_allclose(far_answer, near_answer + shift, atol=2e-3)


def test_order_of_actions_does_not_matter(models, obs):
    actions = models["plane"].sample_actions(obs, 30)
    th.manual_seed(0)
    log_prob = models["plane"].log_prob(obs, actions)
    th.manual_seed(0)
    np.testing.assert_allclose(models["plane"].log_prob(obs, actions[:, ::-1]), log_prob[:, ::-1], atol=1e-5)


def test_estimates_tighten_with_the_number_of_particles(models, obs):
    """Both are lower bounds in expectation."""
    model = models["plane"]
    for query in (model.entropy, model.soft_value):
        few, many = (np.mean([query(obs, n_particles=n) for _ in range(200)]) for n in (1, 64))
        assert few < many + 1e-3


@pytest.mark.parametrize("name", BOXES)
def test_bounds_of_the_box_are_finite(models, obs, name):
    """Saturated actions are stored and asked for as well as others."""
    for bound in (BOXES[name].low, BOXES[name].high):
        actions = np.broadcast_to(bound, (3, *bound.shape))
        assert np.isfinite(models[name].log_prob(obs, actions)).all()
        assert np.isfinite(models[name].q_values(obs, actions)).all()


def test_queries_leave_the_agent_as_it_was(models, obs):
    model = models["plane"]
    before = {key: value.clone() for key, value in model.policy.state_dict().items()}
    actions = model.sample_actions(obs, 2)
    for answer in (model.log_prob(obs, actions), model.entropy(obs), model.q_values(obs, actions), model.soft_value(obs)):
        assert isinstance(answer, np.ndarray)
    assert not model.policy.training
    for key, value in model.policy.state_dict().items():
        assert th.equal(value, before[key])


@pytest.mark.parametrize("n", [0, -1, 1.5, True, None])
def test_numbers_of_samples_and_particles(models, obs, n):
    model = models["plane"]
    with pytest.raises(ValueError, match=f"n={n!r} is not allowed: it must be an integer >= 1"):
        model.sample_actions(obs, n)
    for query in (model.entropy, model.soft_value, lambda obs, n_particles: model.log_prob(obs, obs, n_particles)):
        with pytest.raises(ValueError, match=f"n_particles={n!r} is not allowed: it must be an integer >= 1"):
            query(obs, n_particles=n)


@pytest.mark.parametrize("shape", [(2,), (3, 1), (3, 3), (3, 4, 1), (1, 1, 3, 2), (2, 2), (4, 5, 2)])
@pytest.mark.parametrize("query", ["log_prob", "q_values"])
def test_actions_that_do_not_fit(models, obs, query, shape):
    with pytest.raises(ValueError, match="do not fit"):
        getattr(models["plane"], query)(obs, np.ones(shape))


def test_the_soft_value_counts_what_the_policy_misses(monkeypatch):
    """Two modes, of which the policy knows one: particles of the policy alone would lack half of the integral, log 2."""
    space = spaces.Box(-1.0, 1.0, (1,), dtype=np.float32)
    model = SoftQ("MlpPolicy", Target(space), ent_coef=1.0, device="cpu", seed=0, policy_kwargs=dict(net_arch=[4]))

    def q_values(a):
        return 5.0 + np.log(np.exp(-(((a - 0.6) / 0.1) ** 2) / 2) + np.exp(-(((a + 0.6) / 0.1) ** 2) / 2))

    monkeypatch.setattr(
        "sb3_softq.queries.min_q_values", lambda critic, obs, u: th.as_tensor(q_values(np.tanh(u.numpy()))).squeeze(2)
    )
    monkeypatch.setattr(
        model, "_density", lambda obs, n: (th.full((len(obs), n, 1), np.arctanh(0.6)), th.full((len(obs), n, 1), np.log(0.15)))
    )
    points, volume = grid(space, 20_000)
    truth = np.log(np.exp(q_values(points)).sum() * volume)
    obs = np.zeros((3, 2), dtype=np.float32)
    value, sample_size = model.soft_value(obs, return_sample_size=True)
    np.testing.assert_allclose(value, truth, atol=0.15)
    np.testing.assert_allclose(value, model.soft_value(obs), atol=0.3)
    # half of the particles know nothing of where Q is high
    assert ((sample_size > 100) & (sample_size < 1024)).all()
    # what carries an estimate with one particle is this particle
    assert model.soft_value(obs, n_particles=1, return_sample_size=True)[1] == pytest.approx(np.ones(3))
