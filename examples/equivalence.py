"""
Soft Q-learning is a policy gradient (Schulman et al. 2017, https://arxiv.org/abs/1704.06440), as long as it is on-policy.

    python examples/equivalence.py        # prints the differences, writes examples/results/equivalence.png

With pi = softmax(Q / alpha) and V = alpha logsumexp(Q / alpha), so that Q = V + alpha log pi, actions from pi and a constant
target y(s, a), the gradient of soft Q-learning's loss is

    grad E_pi[ (Q - y)^2 / 2 ]  =  -alpha grad ( E_pi[y] + alpha H(pi) )  +  grad (V - V_target)^2 / 2,

alpha times an entropy-regularised policy gradient and a regression of the value on V_target = E_pi[y] + alpha H(pi).
"""

import argparse
from pathlib import Path

import torch as th
from torch import nn

OUT = Path(__file__).parent / "results" / "equivalence.png"


def gradients(
    net: nn.Module, obs: th.Tensor, target: th.Tensor, alpha: float, off_policy: float
) -> tuple[th.Tensor, th.Tensor]:
    """
    :param net: Q-network
    :param obs: Observations, shape (batch_size, observation_dim)
    :param target: y(s, a) of all actions, shape (batch_size, n_actions)
    :param alpha: Temperature
    :param off_policy: Share of uniform actions among those that soft Q-learning sees: 0 is on-policy
    :return: Gradient of soft Q-learning's loss, and the sum of policy gradient and value regression
    """
    q_values = net(obs)
    n_actions = q_values.shape[1]
    behaviour = (1 - off_policy) * th.softmax(q_values.detach() / alpha, dim=1) + off_policy / n_actions
    soft_q_loss = (behaviour * 0.5 * (q_values - target).square()).sum(dim=1).mean()

    log_pi = th.log_softmax(q_values / alpha, dim=1)
    objective = (log_pi.exp() * (target - alpha * log_pi)).sum(dim=1)
    value = alpha * th.logsumexp(q_values / alpha, dim=1)
    policy_loss = -alpha * objective.mean() + 0.5 * (value - objective.detach()).square().mean()
    return flat_gradient(soft_q_loss, net), flat_gradient(policy_loss, net)


def flat_gradient(loss: th.Tensor, net: nn.Module) -> th.Tensor:
    return th.cat([g.flatten() for g in th.autograd.grad(loss, list(net.parameters()), retain_graph=True)])


def relative_difference(alpha: float, off_policy: float, seed: int = 0) -> float:
    """Distance between the two gradients over the length of the first, in double precision."""
    th.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 4)).double()
    obs, target = th.randn(64, 6).double(), th.randn(64, 4).double()
    soft_q, policy = gradients(net, obs, target, alpha, off_policy)
    return float((soft_q - policy).norm() / soft_q.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="file of the figure")
    args = parser.parse_args()

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    shares = [i / 20 for i in range(21)]
    for alpha in (0.1, 0.3, 1.0):
        differences = [relative_difference(alpha, share) for share in shares]
        print(f"alpha = {alpha}: on-policy {differences[0]:.1e}, half of the actions uniform {differences[10]:.2f}")
        axes.plot(shares, differences, label=f"alpha = {alpha}")
    axes.set(
        xlabel="share of actions that are not the policy's",
        ylabel="relative difference of the gradients",
        title="Soft Q-learning and the policy gradient\nare the same thing on-policy only",
    )
    axes.legend()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=120)
    print(args.out)


if __name__ == "__main__":
    main()
