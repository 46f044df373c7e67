"""Batch normalisation of critics over transitions and particles of next states, folded into the linear layer after it."""

from typing import Any, NamedTuple

import torch as th
from torch import nn
from torch.autograd.function import once_differentiable

from sb3_softq.networks import Affine
from sb3_softq.products import linear, product, product_dtype

# As CrossQ has it
BATCH_NORM_EPS = 1e-3
# Ten times CrossQ's: statistics that lag behind the weights cost mode coverage
BATCH_NORM_MOMENTUM = 0.1


class Statistics(NamedTuple):
    """Mean and variance of the transitions alone, and of the joint batch with the pairs of the next states."""

    own_mean: th.Tensor
    own_var: th.Tensor
    mean: th.Tensor
    var: th.Tensor


def joint_statistics(pairs: th.Tensor, next_pairs: th.Tensor) -> Statistics:
    """
    :param pairs: Of transitions, shape (..., batch_size, n_features)
    :param next_pairs: Of particles of the next states, shape (..., n, n_features)
    :return: Shapes (..., n_features), variances without Bessel's correction
    """
    (mean_1, var_1), (mean_2, var_2) = (_mean_and_var(x) for x in (pairs, next_pairs))
    share = pairs.shape[-2] / (pairs.shape[-2] + next_pairs.shape[-2])
    mean = th.lerp(mean_2, mean_1, share)
    var = th.lerp(var_2, var_1, share) + share * (1.0 - share) * (mean_1 - mean_2).square()
    return Statistics(mean_1, var_1, mean, var)


def _mean_and_var(x: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    # not th.var_mean, which takes twenty times as long over this axis
    mean = x.mean(dim=-2)
    return mean, (x - mean.unsqueeze(-2)).square_().mean(dim=-2)


class _NormalisedLinear(th.autograd.Function):
    """
    See :func:`normalised_linear`. One linear layer, forwards and backwards: what depends on the batch passes through matrix
    products alone, and the rest is as large as the weights.
    """

    @staticmethod
    def forward(
        ctx: Any,
        pairs: th.Tensor,
        next_pairs: th.Tensor,
        weight: th.Tensor,
        bias: th.Tensor,
        gamma: th.Tensor,
        beta: th.Tensor,
        statistics: Statistics,
        dtype: th.dtype,
    ) -> tuple[th.Tensor, th.Tensor]:
        own_mean, own_var, mean, var = statistics
        inv_std = th.rsqrt(var + BATCH_NORM_EPS)
        scale = gamma * inv_std
        shift = th.addcmul(beta, mean, scale, value=-1)
        folded = (weight * scale.unsqueeze(1)).to(dtype)
        folded_bias = (bias + (shift.unsqueeze(1) @ weight.mT).squeeze(1)).to(dtype)
        pairs, next_pairs = pairs.to(dtype), next_pairs.to(dtype)
        ctx.save_for_backward(pairs, weight, folded, scale, shift, inv_std, own_mean, own_var, mean)
        next_output = linear(next_pairs, folded, folded_bias)
        ctx.mark_non_differentiable(next_output)
        return linear(pairs, folded, folded_bias), next_output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: th.Tensor, _: th.Tensor) -> tuple[th.Tensor | None, ...]:
        pairs, weight, folded, scale, shift, inv_std, own_mean, own_var, mean = ctx.saved_tensors
        n_rows = pairs.shape[1]
        # sums over the rows of dL/dy, dL/dy x^T, dL/dz and dL/dz x
        grad_sum = grad.sum(dim=1, dtype=weight.dtype)
        grad_x = product(grad.mT, pairs).to(weight.dtype)
        z_sum = (grad_sum.unsqueeze(1) @ weight).squeeze(1)
        z_x = (grad_x * weight).sum(dim=1)
        grad_weight = (grad_x * scale.unsqueeze(1)).addcmul_(grad_sum.unsqueeze(2), shift.unsqueeze(1))
        grad_pairs = None
        if ctx.needs_input_grad[0]:
            # through the statistics of the transitions, which r and d of batch renormalisation turn into the joint ones
            slope = -scale / (own_var + BATCH_NORM_EPS) * (z_x - own_mean * z_sum) / n_rows
            offset = -scale * z_sum / n_rows - slope * own_mean
            grad_pairs = th.addcmul(offset.unsqueeze(1), pairs, slope.unsqueeze(1)).add_(product(grad, folded)).to(pairs.dtype)
        return grad_pairs, None, grad_weight, grad_sum, inv_std * (z_x - mean * z_sum), z_sum, None, None


def normalised_linear(
    pairs: th.Tensor,
    next_pairs: th.Tensor,
    weight: th.Tensor,
    bias: th.Tensor,
    gamma: th.Tensor,
    beta: th.Tensor,
    statistics: Statistics,
) -> tuple[th.Tensor, th.Tensor]:
    """
    W z + b with z = gamma (x - mean) / std + beta by the statistics of the joint batch. The gradient is that of batch
    renormalisation (Ioffe 2017, https://arxiv.org/abs/1702.03275): of the statistics of the transitions alone, which constants
    turn into those of the joint batch. The transitions are part of it, so that these need none of the bounds of the paper.

    :param pairs: Of transitions, shape (n_critics, batch_size, n_inputs)
    :param next_pairs: Of particles of the next states, shape (n_critics, n, n_inputs)
    :param weight: W, shape (n_critics, n_outputs, n_inputs)
    :param bias: b, shape (n_critics, n_outputs)
    :param gamma: Scale, shape (n_critics, n_inputs)
    :param beta: Shift, shape (n_critics, n_inputs)
    :param statistics: See :func:`joint_statistics`
    :return: Shapes (n_critics, batch_size, n_outputs) and, without gradient, (n_critics, n, n_outputs)
    """
    return _NormalisedLinear.apply(pairs, next_pairs, weight, bias, gamma, beta, statistics, product_dtype(pairs))


class JointBatchNorm(nn.Module):
    """
    Batch normalisation of a critic's inputs, by the statistics of transitions and particles of their next states together
    while it is trained (:func:`normalised_linear`), by running statistics everywhere else. The mode of the module has no part
    in it.

    :param shape: (n_features,), or (n_critics, n_features) for all critics
    """

    running_mean: th.Tensor
    running_var: th.Tensor

    def __init__(self, *shape: int):
        super().__init__()
        self.weight = nn.Parameter(th.ones(shape))
        self.bias = nn.Parameter(th.zeros(shape))
        self.register_buffer("running_mean", th.zeros(shape))
        self.register_buffer("running_var", th.ones(shape))

    @th.no_grad()
    def follow(self, mean: th.Tensor, var: th.Tensor, n_rows: int) -> None:
        """
        Move the running statistics towards those of a batch.

        :param mean: Mean
        :param var: Variance without Bessel's correction
        :param n_rows: Number of rows of the batch
        """
        self.running_mean.lerp_(mean, BATCH_NORM_MOMENTUM)
        self.running_var.lerp_(var * (n_rows / (n_rows - 1)), BATCH_NORM_MOMENTUM)

    def fold(self, weight: th.Tensor, bias: th.Tensor, subtract_first: bool) -> Affine:
        """
        Normalisation by running statistics and the linear layer after it, as one layer.

        :param weight: Of the layer after it, shape (..., n_outputs, n_features)
        :param bias: Shape (..., n_outputs)
        :param subtract_first: Whether the mean stays apart, to be subtracted from the inputs, or goes into the bias
        """
        scale = self._scale()
        shift = self.bias if subtract_first else self.bias - self.running_mean * scale
        mean = self.running_mean if subtract_first else None
        return Affine(weight * scale.unsqueeze(-2), bias + (shift.unsqueeze(-2) @ weight.mT).squeeze(-2), mean)

    def _scale(self) -> th.Tensor:
        return self.weight * th.rsqrt(self.running_var + BATCH_NORM_EPS)

    def forward(self, x: th.Tensor) -> th.Tensor:
        return (x - self.running_mean) * self._scale() + self.bias
