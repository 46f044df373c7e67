"""An update of SoftQ: what critics, actor and temperature learn from a minibatch, and when."""

import copy
import math

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.buffers import NStepReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv, IdentityEnvBox
from stable_baselines3.common.utils import LinearSchedule
from torch.utils._python_dispatch import TorchDispatchMode

from sb3_softq import DiscreteSoftQ, ParticleOptions, SoftQ
from sb3_softq.histogram import bin_centers, bin_edges, cross_entropy
from tests.conftest import RandomEnv, batch_normalised, check_training, flat, small


@pytest.mark.parametrize(
    "kwargs", [{}, dict(policy_delay=2, actor_learning_rate=2e-3, n_actor_particles=2, n_actor_states=128)]
)
def test_it_learns(kwargs):
    """Reward for an action near the observation. The faster actor reaches the largest width first, and has to come back."""
    arguments = dict(learning_rate=1e-3, gamma=0.5, batch_size=128, policy_kwargs={"net_arch": [32]})
    model = small(env=IdentityEnvBox(eps=0.5), **arguments, **kwargs)
    model.learn(800)
    obs = np.linspace(-0.9, 0.9, 20, dtype=np.float32)[:, None]
    actions, _ = model.predict(obs, deterministic=True)
    assert np.mean(np.abs(actions - obs) < 0.5) > 0.9


def test_logged_keys():
    logged = check_training(small(verbose=0))
    assert logged.keys() >= {
        "train/actor_loss",
        "train/critic_loss",
        "train/ent_coef",
        "train/ent_coef_loss",
        "train/effective_sample_size",
        "train/entropy",
        "train/learning_rate",
        "train/n_updates",
        "train/particle_std",
        "train/q_value",
        "train/smoothing_std",
    }


@pytest.mark.parametrize("n_steps", [1, 3])
@pytest.mark.parametrize(("tau", "batch_norm", "n_bins"), [(1.0, True, 1), (1.0, True, 51), (0.5, True, 1), (0.5, False, 51)])
def test_critics_regress_on_the_discounted_soft_value(n_steps, tau, batch_norm, n_bins):
    """The critic loss, from the replayed transitions and the equations alone."""
    policy_kwargs = dict(net_arch=[16], batch_norm=batch_norm, n_bins=n_bins)
    settings = dict(gamma=0.9, ent_coef=0.2, n_value_particles=3, policy_kwargs=policy_kwargs)
    model = small(n_steps=n_steps, tau=tau, **settings).learn(60)
    assert isinstance(model.replay_buffer, NStepReplayBuffer) == (n_steps > 1)
    data = model.replay_buffer.sample(16)
    with th.no_grad():
        th.manual_seed(1)
        u, log_prob = model.propose(data.next_observations, 3)
        pairs = th.cat([data.observations, data.actions], dim=1)
        next_pairs = [th.cat([data.next_observations, th.tanh(u[:, k])], dim=1) for k in range(3)]
        nets = model.critic.q_networks
        if batch_norm:
            # all in one batch
            outputs = [batch_normalised(net, th.cat([pairs, *next_pairs])).view(64, n_bins).split(16) for net in nets]
        else:
            outputs = [(net(pairs),) for net in nets]
        if tau == 1.0:
            next_outputs = th.stack([th.stack(x[1:]) for x in outputs])
        else:
            targets = model.critic_target.eval().q_networks
            next_outputs = th.stack([th.stack([net(x) for x in next_pairs]) for net in targets])
        scale = model.returns.value
        if n_bins == 1:
            next_q_values = scale * next_outputs.squeeze(3).amin(dim=0)
        else:
            next_q_values = scale * (th.softmax(next_outputs, dim=3) @ bin_centers(n_bins)).amin(dim=0)
        value = 0.2 * (th.logsumexp((next_q_values / 0.2 - log_prob.T).double(), dim=0) - np.log(3)).float()
        discounts = data.discounts.squeeze(1) if n_steps > 1 else 0.9
        target = data.rewards.squeeze(1) + (1 - data.dones.squeeze(1)) * discounts * value
        if n_bins == 1:
            expected = sum(0.5 * (x[0].squeeze(1) - target / scale).square().mean() for x in outputs)
        else:
            expected = sum(cross_entropy(x[0], target / scale, bin_edges(n_bins)).mean() for x in outputs)
    model.critic.return_scale.fill_(scale)
    model.policy.set_training_mode(True)
    th.manual_seed(1)
    stats = model.update_critic(data, model.ent_coef_tensor)
    th.testing.assert_close(stats["critic_loss"], expected)


@pytest.mark.parametrize("smoothing", ["learned", "local"])
@pytest.mark.parametrize(
    ("proposal", "n_value_particles"),
    [("policy", 1), ("policy", 5), ("uniform", 1), ("uniform", 5)],
)
def test_effective_sample_size_is_between_one_and_all_particles(smoothing, proposal, n_value_particles):
    model = small(proposal=proposal, n_value_particles=n_value_particles, policy_kwargs={"smoothing": smoothing})
    logged = check_training(model)
    assert 1.0 - 1e-5 <= logged["train/effective_sample_size"] <= n_value_particles + 1e-5


@pytest.mark.parametrize("smoothing", ["learned", "local", "none"])
@pytest.mark.parametrize("kernel_update_ratio", [None, 0.5, 0.1])
def test_it_trains_with_the_repulsion_of_the_kernel(smoothing, kernel_update_ratio):
    model = small(
        repulsion="kernel",
        kernel_update_ratio=kernel_update_ratio,
        policy_kwargs={"smoothing": smoothing},
    )
    check_training(model)


@pytest.mark.parametrize("smoothing", ["learned", "local"])
@pytest.mark.parametrize("kernel", ["rbf", "delta"])
@pytest.mark.parametrize("n_actor_particles", [1, 2, 5])
def test_it_trains_with_the_repulsion_of_the_density(smoothing, kernel, n_actor_particles):
    # experts are compared
    policy_kwargs = {"smoothing": smoothing, "n_experts": 16 if n_actor_particles > 1 else 1}
    model = small(kernel=kernel, n_actor_particles=n_actor_particles, n_actor_states=3, policy_kwargs=policy_kwargs)
    check_training(model)


def test_more_actor_states_than_the_batch_has():
    check_training(small(n_actor_states=100))


@pytest.mark.parametrize(("n_states", "n_own_goals"), [(32, 24), (100, 78)])
def test_the_actor_sees_the_goals_of_her(monkeypatch, n_states, n_own_goals):
    """HerReplayBuffer puts transitions with goals of its own after the others: four in five, and so where the actor learns."""
    env = BitFlippingEnv(n_bits=8, continuous=True)
    model = small(
        SoftQ,
        "MultiInputPolicy",
        env,
        replay_buffer_class=HerReplayBuffer,
        replay_buffer_kwargs={"n_sampled_goal": 4},
        batch_size=128,
        n_actor_states=n_states,
        learning_starts=200,
        gradient_steps=1,
    )
    seen = []
    actor_loss = SoftQ.actor_loss

    def spy(self, obs, ent_coef):
        seen.append(obs)
        return actor_loss(self, obs, ent_coef)

    monkeypatch.setattr(SoftQ, "actor_loss", spy)
    model.learn(202)
    goals = seen[0]["desired_goal"]
    assert goals.shape == (n_states, 8)
    # the environment's own goal is all ones
    assert (goals != 1).any(dim=1).sum() >= n_own_goals


@pytest.mark.parametrize(("target_entropy", "sign"), [(np.log(2.0), 1), (-3.5, -1)])
def test_temperature_follows_the_entropy(target_entropy, sign):
    """Uniform actions in (-1, 1) have an entropy of log 2, and the narrowest particles one of -3.58."""
    model = small(target_entropy=target_entropy, ent_coef="auto_0.1", ent_coef_learning_rate=0.01)
    before = model.log_ent_coef.item()
    assert before == pytest.approx(np.log(0.1))
    check_training(model)
    assert np.sign(model.log_ent_coef.item() - before) == sign


def test_target_entropy_is_minus_the_number_of_actions():
    model = small(env=RandomEnv(spaces.Box(-1, 1, (2, 2), dtype=np.float32)))
    assert model.target_entropy == -4.0


def test_fixed_temperature_is_not_learned():
    model = small(ent_coef=0.3)
    logged = check_training(model)
    assert model.log_ent_coef is None
    assert model.ent_coef_optimizer is None
    assert logged["train/ent_coef"] == pytest.approx(0.3)
    assert "train/ent_coef_loss" not in logged


def test_learning_rates_end_where_their_schedules_end():
    """The last update happens when no progress remains, and so with the end value of each schedule."""
    model = small(
        learning_rate=LinearSchedule(1e-3, 1e-4, 1.0),
        actor_learning_rate=LinearSchedule(2e-3, 2e-4, 1.0),
        ent_coef_learning_rate=lambda progress_remaining: 3e-4 + 3e-3 * progress_remaining,
    )
    assert model.critic.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)
    assert model.ent_coef_optimizer.param_groups[0]["lr"] == pytest.approx(3.3e-3)
    check_training(model)
    assert model.critic.optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)
    assert model.actor.optimizer.param_groups[0]["lr"] == pytest.approx(2e-4)
    assert model.ent_coef_optimizer.param_groups[0]["lr"] == pytest.approx(3e-4)


def test_the_automatic_learning_rate_follows_the_updates(tmp_path):
    """Not the steps or the length of training; in each further call, and in an agent that was saved, it goes on."""
    model = small(learning_rate="auto", learning_starts=20, gradient_steps=3).learn(40)
    path = tmp_path / "agent"
    for suffix in (".zip", ".safetensors"):
        model.save(path.with_suffix(suffix))
    loaded = [SoftQ.load(path.with_suffix(suffix), model.get_env()) for suffix in (".zip", ".safetensors")]
    for agent in (model, copy.deepcopy(model), *loaded):
        assert agent._n_updates == 60
        agent.learn(10, reset_num_timesteps=False)
        assert agent._n_updates == 90
        # the last update was the 90th, and its rate that of the 87 before its round
        expected = 1e-3 - 7e-4 * 87 / 50_000
        for optimizer in (agent.critic.optimizer, agent.actor.optimizer):
            assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-12)
        assert agent.logger.name_to_value["train/learning_rate"] == pytest.approx(expected, rel=1e-12)
    for n_updates, expected in ((0, 1e-3), (25_000, 6.5e-4), (50_000, 3e-4), (10**9, 3e-4)):
        model._n_updates = n_updates
        assert [model.lr_schedule(progress) for progress in (1.0, 0.0)] == pytest.approx([expected] * 2)


def test_defaults_are_those_of_the_page():
    """Of sb3_softq/README.md, a row each; what they were chosen by is in decisions.md."""
    model = SoftQ("MlpPolicy", "Pendulum-v1", device="cpu")
    policy = model.policy
    assert policy.batch_norm
    assert (model.tau, policy.critic_target) == (1.0, None)
    assert [model.lr_schedule(progress) for progress in (1.0, 0.0)] == pytest.approx([1e-3, 3e-4])
    assert model.critic.optimizer.param_groups[0]["betas"] == (0.5, 0.999)
    assert model.actor.optimizer.param_groups[0]["betas"] == (0.9, 0.999)
    assert model.actor_tau == 1e-3
    assert (model.normalize_rewards, policy.n_bins) == (True, 101)
    assert model.log_ent_coef.exp().item() == pytest.approx(0.01)
    assert (policy.net_arch, policy.head_arch) == ({"pi": [256], "qf": [256, 256]}, [64, 64])
    assert (policy.n_experts, policy.n_critics) == (16, 2)
    assert (model.n_value_particles, model.n_actor_particles) == (2, 4)
    assert model.particle_options == ParticleOptions(32, None, "policy", "rbf", "density", None, "auto")
    assert (model.learning_starts, model.batch_size, model.gamma, model.policy_delay) == (100, 256, 0.99, 1)
    assert model.target_entropy == -1.0
    discrete = DiscreteSoftQ("MlpPolicy", "CartPole-v1", device="cpu")
    assert discrete.target_entropy == pytest.approx(0.25 * math.log(2))
    assert [discrete.lr_schedule(progress) for progress in (1.0, 0.0)] == pytest.approx([1e-3, 1e-4])
    assert (discrete.tau, discrete.batch_size, discrete.learning_starts) == (0.02, 128, 1000)
    assert (discrete.normalize_rewards, discrete.policy.n_bins) == (True, 101)
    assert discrete.log_ent_coef.exp().item() == pytest.approx(0.01)


def test_bfloat16_is_in_the_products_alone():
    """The same update from the same weights: a little different, and in parameters of full precision."""
    losses, parameters = [], []
    for bfloat16 in (False, True):
        model = small(bfloat16=bfloat16, learning_starts=1000, width=64).learn(100)
        th.manual_seed(0)
        stats = model.update_critic(model._sample(64), model.ent_coef_tensor)
        losses.append(stats["critic_loss"].item())
        parameters.append(flat(model.critic))
        assert all(parameter.dtype == th.float32 for parameter in model.policy.parameters())
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert not th.equal(*parameters)


def test_by_default_the_learning_rate_falls_over_the_steps_that_learn_is_told():
    model = small(learning_starts=10)
    rates = []
    optimizer = model.critic.optimizer
    optimizer.register_step_post_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
    model.learn(60)
    # the step n of 60 is the one with 1 - n / 60 remaining
    np.testing.assert_allclose(rates, [1e-3 - 7e-4 * step / 60 for step in range(11, 61)])
    assert model.ent_coef_optimizer.param_groups[0]["lr"] == 1e-3


def test_schedules_end_where_they_were_tried():
    """The last rollout, of several environments or a whole episode, goes on beyond the end."""
    seen = []

    def temperature(progress_remaining):
        seen.append(progress_remaining)
        return 0.2 * progress_remaining + 1e-3

    small(env=make_vec_env("Pendulum-v1", n_envs=4), ent_coef=temperature).learn(21)
    assert min(seen) == 0.0


@pytest.mark.parametrize(
    ("learning_rate", "expected"), [(3e-4, 1e-3), (0.02, 0.02), (lambda progress: 0.01 * progress, 0.005)]
)
def test_temperature_learns_as_fast_as_the_critics_by_default(learning_rate, expected):
    model = small(learning_rate=learning_rate).learn(10)
    model._update_current_progress_remaining(1, 2)
    model.train(1, 8)
    assert model.ent_coef_optimizer.param_groups[0]["lr"] == pytest.approx(expected)


def test_actor_learning_rate_is_the_critics_by_default():
    model = small(learning_rate=LinearSchedule(1e-3, 1e-4, 1.0))
    check_training(model)
    assert model.actor.optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)


@pytest.mark.parametrize("policy_delay", [1, 2])
def test_the_average_follows_the_actor(policy_delay):
    """Against weights in float64: first over the last ninth of the actor's updates, then with the step that was asked for."""
    model = small(actor_tau=0.4, learning_starts=1000, policy_delay=policy_delay, learning_rate=1e-2).learn(20)
    expected = flat(model.actor).double()
    assert th.equal(flat(model.ema_actor).double(), expected)
    for n in range(1, 31):
        model.train(gradient_steps=policy_delay, batch_size=8)
        tau = 9 / (n + 9) if n <= 13 else 0.4
        expected += tau * (flat(model.actor).double() - expected)
        th.testing.assert_close(flat(model.ema_actor).double(), expected, rtol=1e-4, atol=1e-6)
    assert (flat(model.actor) - flat(model.ema_actor)).abs().max() > 1e-3
    assert not any(parameter.requires_grad for parameter in model.ema_actor.parameters())


def test_an_average_over_one_update_is_the_actor():
    model = small(actor_tau=1.0).learn(20)
    assert th.equal(flat(model.ema_actor), flat(model.actor))


def test_targets_are_updated_once_per_interval():
    model = small(target_update_interval=3, tau=1.0, learning_starts=0, learning_rate=1e-2)
    before = flat(model.critic_target)
    model.learn(2)
    assert model._n_updates == 2
    assert th.equal(flat(model.critic_target), before)
    model.learn(1, reset_num_timesteps=False)
    assert model._n_updates == 3
    assert th.equal(flat(model.critic_target), flat(model.critic))


def test_actor_and_temperature_learn_once_per_policy_delay():
    model = small(policy_delay=3, learning_starts=0)
    modules = model.actor, model.critic
    before = [flat(module) for module in modules]
    model.learn(2)
    assert model._n_updates == 2
    assert [th.equal(flat(module), old) for module, old in zip(modules, before, strict=True)] == [True, False]
    assert model.log_ent_coef.item() == pytest.approx(np.log(0.01))
    assert "train/actor_loss" not in model.logger.name_to_value
    model.learn(1, reset_num_timesteps=False)
    assert not th.equal(flat(model.actor), before[0])
    assert model.log_ent_coef.item() != pytest.approx(np.log(0.01))
    # averages over the updates of a call, of which two are the actor's
    model.train(gradient_steps=6, batch_size=8)
    assert np.isfinite(model.logger.name_to_value["train/actor_loss"])


def test_training_uses_a_new_tau(tmp_path):
    """Callbacks may change it on the way: target networks are there from then on, and come with the agent that is saved."""
    model = small(learning_rate=1e-2).learn(20)
    assert model.critic_target is model.critic
    assert not [name for name in model.policy.state_dict() if "target" in name]
    before = flat(model.critic)
    model.tau = 0.25
    model.train(gradient_steps=1, batch_size=8)
    th.testing.assert_close(flat(model.critic_target), before + 0.25 * (flat(model.critic) - before))
    model.save(tmp_path / "model")
    loaded = SoftQ.load(tmp_path / "model", device="cpu")
    assert th.equal(flat(loaded.critic_target), flat(model.critic_target))


@pytest.mark.parametrize("share_features_extractor", [True, False])
def test_an_agent_without_target_networks_can_get_them(tmp_path, share_features_extractor):
    """Loaded with another tau, they begin as a copy of the critics; and the other way round."""
    kwargs = {"share_features_extractor": share_features_extractor}
    without, others = small(policy_kwargs=kwargs).learn(20), small(policy_kwargs=kwargs, tau=0.5, seed=1).learn(20)
    without.save(tmp_path / "model")
    loaded = SoftQ.load(tmp_path / "model", tau=0.5, device="cpu")
    others_parameters = copy.deepcopy(others.get_parameters())
    others.set_parameters(without.get_parameters())
    for model in (loaded, others):
        assert th.equal(flat(model.critic_target), flat(without.critic))
    without.set_parameters(others_parameters)
    assert without.critic_target is without.critic
    others.save(tmp_path / "other")
    loaded = SoftQ.load(tmp_path / "other", tau=1.0, device="cpu")
    assert loaded.critic_target is loaded.critic


@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize(
    "options", [{}, {"proposal": "uniform", "repulsion": "kernel", "policy_kwargs": {"smoothing": "none"}}]
)
def test_same_seed_same_parameters(n_envs, options):
    def trained(seed):
        return small(env=make_vec_env("Pendulum-v1", n_envs, seed=seed), seed=seed, **options).learn(40)

    first, second, other = trained(7), trained(7), trained(8)
    for name, tensor in first.policy.state_dict().items():
        assert th.equal(tensor, second.policy.state_dict()[name]), name
    assert th.equal(first.log_ent_coef, second.log_ent_coef)
    assert not th.equal(flat(first.actor), flat(other.actor))
    np.testing.assert_array_equal(first.replay_buffer.actions, second.replay_buffer.actions)


# Of https://pytorch.org/docs/stable/generated/torch.use_deterministic_algorithms.html: what raises there on CUDA
NOT_DETERMINISTIC = {
    "kthvalue",
    "median.dim",
    "cumsum",
    "histc",
    "bincount",
    "put_",
    "index_copy",
    "_cdist_backward",
    "adaptive_avg_pool2d_backward",
    "grid_sampler_2d_backward",
    "nll_loss2d",
    "_embedding_bag",
    "max_unpool2d",
    "native_dropout_backward_nondeterministic",
}


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"repulsion": "kernel", "kernel_update_ratio": 0.5}, {"policy_kwargs": {"smoothing": "local"}}],
)
def test_an_update_can_be_deterministic_on_cuda(kwargs):
    """Nothing of what torch.use_deterministic_algorithms(True) refuses there is called."""
    seen = set()

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(func.__name__)
            return func(*args, **(kwargs or {}))

    model = small(learning_starts=1000, **kwargs).learn(20)
    with Spy():
        model.train(gradient_steps=2, batch_size=8)
    assert {"topk.default", "_cdist_forward.default"} <= seen
    assert not [name for name in seen if name.removesuffix(".default") in NOT_DETERMINISTIC]


def test_a_subclass_changes_the_losses():
    """A plug-in is pluggable: what a class overrides is what is trained with."""

    class Calm(SoftQ):
        def critic_loss(self, replay_data, ent_coef):
            loss, stats = super().critic_loss(replay_data, ent_coef)
            return 0.0 * loss, stats | {"own": loss.detach()}

        def actor_loss(self, obs, ent_coef):
            loss, stats = super().actor_loss(obs, ent_coef)
            return 0.0 * loss, stats

    model = small(Calm).learn(30)
    fresh = small(Calm)
    assert model._n_updates > 0
    assert th.equal(flat(model.actor), flat(fresh.actor))
    assert th.equal(flat(model.critic), flat(fresh.critic))
    assert np.isfinite(model.logger.name_to_value["train/own"])
