"""The sampling actor: its networks, which of the two is asked, and its deterministic action."""

from functools import partial

import numpy as np
import pytest
import torch as th

from tests.conftest import check_training, hidden_sizes, small


@pytest.mark.parametrize("head_arch", [[], [5], (4, 3, 2)])
def test_the_head_has_the_hidden_layers_asked_for(head_arch):
    model = small(policy_kwargs={"head_arch": head_arch})
    assert hidden_sizes(model.actor.head) == list(head_arch)
    check_training(model)


def test_the_trained_actor_collects_and_the_average_is_asked():
    model = small().learn(20)
    seen = []
    for name in ("actor", "ema_actor"):
        actor = getattr(model, name)
        particles = partial(lambda name, particles, *args, **kwargs: seen.append(name) or particles(*args, **kwargs), name)
        actor.particles = partial(particles, actor.particles)
    obs = model.observation_space.sample()

    def asked(call, *args, **kwargs):
        seen.clear()
        call(*args, **kwargs)
        return set(seen)

    learned = {"ema_actor"}
    for deterministic in (True, False):
        assert asked(model.predict, obs, deterministic=deterministic) == learned
    assert asked(model.sample_actions, obs, 2) == asked(model.entropy, obs) == asked(model.soft_value, obs) == learned
    assert asked(model.log_prob, obs, model.action_space.sample()) == learned
    batch = model.replay_buffer.sample(4)
    assert asked(model.update_critic, batch, model.ent_coef_tensor) == learned
    assert asked(model.update_actor, batch, model.ent_coef_tensor) == {"actor"}
    model.learning_starts = 1000
    assert asked(model.learn, 3) == set()
    model.learning_starts, model.gradient_steps = 0, 0
    assert asked(model.learn, 3) == {"actor"}
    assert asked(model.predict, obs) == learned


@pytest.mark.parametrize("smoothing", ["learned", "local", "none"])
def test_deterministic_action_is_a_function_of_observation_and_weights(smoothing):
    repulsion = "kernel" if smoothing == "none" else "density"
    model = small(policy_kwargs={"smoothing": smoothing}, repulsion=repulsion).learn(30)
    obs = np.random.default_rng(0).uniform(-1, 1, (20, 3)).astype(np.float32)
    th.manual_seed(0)
    state = th.get_rng_state()
    actions, _ = model.predict(obs, deterministic=True)
    assert th.equal(th.get_rng_state(), state)
    th.manual_seed(1)
    np.testing.assert_array_equal(model.predict(obs, deterministic=True)[0], actions)
    alone = np.stack([model.predict(o, deterministic=True)[0] for o in obs])
    np.testing.assert_allclose(alone, actions, atol=1e-4)
    assert not np.array_equal(model.predict(obs)[0], model.predict(obs)[0])
