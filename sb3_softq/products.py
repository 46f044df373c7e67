"""Matrix products of networks and their gradients: of one network, or of several whose weights are stacked."""

from collections.abc import Mapping
from typing import Any

import torch as th
from torch import library
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def onednn_is_faster() -> bool:
    """
    Whether oneDNN multiplies up to twice as fast as MKL, torch's choice for float32: on AMD's processors since Zen 5, whose
    AVX-512 MKL does without. Elsewhere both are about as fast, on Zen 4 too, which carries AVX-512 out in halves, and calls of
    oneDNN cost more.
    """
    has_avx512 = th.backends.cpu.get_cpu_capability() == "AVX512"
    # older versions of torch do not tell
    capabilities: Mapping[str, Any] = th.cpu.get_capabilities() if hasattr(th.cpu, "get_capabilities") else {}
    # AVX-VNNI came with Zen 5
    is_zen5 = "AMD" in str(capabilities.get("cpu_name", "")) and bool(capabilities.get("avx_vnni", False))
    return has_avx512 and is_zen5 and th.backends.mkldnn.is_available()


_ONEDNN_IS_FASTER = onednn_is_faster()
# Below so many multiplications the call costs more than it saves
_ONEDNN_MIN_SIZE = 2_000_000


def product(left: th.Tensor, right: th.Tensor) -> th.Tensor:
    """
    left @ right, without gradient, by the fastest library that there is.

    :param left: Shape (n_rows, n), or (n_networks, n_rows, n) of several networks
    :param right: Shape (n, n_columns) or (n_networks, n, n_columns), of the same type
    :return: Shape (n_rows, n_columns) or (n_networks, n_rows, n_columns)
    """
    return _onednn_product(left, right, None) if _is_for_onednn(left, right, left.dtype) else left @ right


def linear(x: th.Tensor, weight: th.Tensor, bias: th.Tensor | None = None) -> th.Tensor:
    """
    x W^T + b, of one network or of several, by the fastest library that there is.

    :param x: Shape (n_rows, n_inputs) or (n_networks, n_rows, n_inputs)
    :param weight: Shape (n_outputs, n_inputs) or (n_networks, n_outputs, n_inputs)
    :param bias: Shape (n_outputs,) or (n_networks, n_outputs)
    :return: Shape (n_rows, n_outputs) or (n_networks, n_rows, n_outputs), in autocast's type where it is enabled
    """
    if _is_for_onednn(x, weight, product_dtype(x)):
        return _OneDNNLinear.apply(x, weight, bias) if th.is_grad_enabled() else _onednn_product(x, weight.mT, bias)
    if x.ndim == 2:
        return F.linear(x, weight, bias)
    return x @ weight.mT if bias is None else th.baddbmm(bias.unsqueeze(1), x, weight.mT)


def product_dtype(x: th.Tensor) -> th.dtype:
    """
    :param x: A factor
    :return: Type of the factors of a matrix product, autocast's where it is enabled
    """
    device = x.device.type
    return th.get_autocast_dtype(device) if th.is_autocast_enabled(device) else x.dtype


def _is_for_onednn(left: th.Tensor, right: th.Tensor, dtype: th.dtype) -> bool:
    """By the number of rows of the left factor and of entries of the right one, or of its transpose."""
    is_possible = _ONEDNN_IS_FASTER and dtype == th.float32 and left.device.type == "cpu" and not th.compiler.is_exporting()
    return is_possible and left.shape[-2] * right.shape[-2] * right.shape[-1] >= _ONEDNN_MIN_SIZE


class _OneDNNLinear(th.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: th.Tensor, weight: th.Tensor, bias: th.Tensor | None) -> th.Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn_product(x, weight.mT, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: th.Tensor) -> tuple[th.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            product(grad, weight) if needs_x else None,
            product(grad.mT, x) if needs_weight else None,
            grad.sum(dim=-2) if needs_bias else None,
        )


def _onednn_product(left: th.Tensor, right: th.Tensor, bias: th.Tensor | None) -> th.Tensor:
    call = th.ops.sb3_softq.onednn_product if th.compiler.is_compiling() else _multiply
    return call(left, right, bias)


def _multiply(left: th.Tensor, right: th.Tensor, bias: th.Tensor | None) -> th.Tensor:
    """By the operator that torch has for its compiler, without a gradient and for two axes alone."""
    multiply = th.ops.mkldnn._linear_pointwise
    # oneDNN takes hundreds of times as long over a part of a matrix
    left, right = _dense(left), _dense(right)
    if left.ndim == 2:
        return multiply(left, right.mT, bias, "none", [], "")
    biases = [None] * len(left) if bias is None else bias.unbind()
    factors = zip(left.unbind(), right.mT.unbind(), biases, strict=True)
    return th.stack([multiply(*network, "none", [], "") for network in factors])


def _dense(factor: th.Tensor) -> th.Tensor:
    """The matrices, copied if neither they nor their transposes fill their memory without gaps."""
    n_rows, n_columns = factor.shape[-2:]
    is_dense = factor.stride()[-2:] in ((n_columns, 1), (1, n_rows))
    return factor if is_dense else factor.contiguous()


# For the compiler it is an operator that it knows nothing of: that of torch it takes for constant weights alone
_LIBRARY = library.Library("sb3_softq", "DEF")
_LIBRARY.define("onednn_product(Tensor left, Tensor right, Tensor? bias) -> Tensor")
_LIBRARY.impl("onednn_product", _multiply, "CPU")


def _shape_of_product(left: th.Tensor, right: th.Tensor, bias: th.Tensor | None) -> th.Tensor:
    return left.new_empty(*left.shape[:-1], right.shape[-1])


library.register_fake("sb3_softq::onednn_product", _shape_of_product, lib=_LIBRARY)
