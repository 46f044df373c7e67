"""SQL (2017) (Haarnoja et al., https://arxiv.org/abs/1702.08165, and its code) as arguments of SoftQ."""

from typing import Any

ORIGINAL: dict[str, Any] = dict(
    learning_rate=3e-4,
    tau=1.0,
    target_update_interval=1000,
    actor_tau=1.0,
    proposal="uniform",
    n_value_particles=16,
    n_actor_particles=16,
    n_density_particles=0,
    kernel="rbf",
    repulsion="kernel",
    kernel_update_ratio=0.5,
    annealing=1.0,
)


def original_policy(net_arch: list[int]) -> dict[str, Any]:
    """
    :param net_arch: Hidden layers of actor and critic
    :return: ``policy_kwargs``: one critic without normalisation, and an actor that is a plain function of state and noise
    """
    return dict(net_arch=dict(pi=[], qf=net_arch), head_arch=net_arch, n_critics=1, smoothing="none", batch_norm=False)
