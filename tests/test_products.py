"""Matrix products by one library or the other: the same numbers and gradients, those of float64."""

import math

import pytest
import torch as th
from hypothesis import given, settings
from hypothesis import strategies as st

from sb3_softq import products
from sb3_softq.products import linear, onednn_is_faster, product
from sb3_softq.stacking import view_of
from tests.conftest import ask_onednn, needs_onednn

LIBRARIES = [pytest.param(math.inf, id="torch"), pytest.param(1, id="onednn", marks=needs_onednn)]


@pytest.fixture(params=LIBRARIES)
def library(request, monkeypatch):
    """All products, whatever their size, by one library."""
    calls = ask_onednn(monkeypatch, request.param)
    yield
    assert bool(calls) == (request.param == 1)


def draw(networks, *shapes):
    return [th.randn(*networks, *shape, requires_grad=True) for shape in shapes]


def layouts(x):
    """The same numbers: in order, transposed in memory, and as parts of larger matrices."""
    wide = th.zeros(*x.shape[:-2], x.shape[-2] + 3, x.shape[-1] + 5)
    wide[..., 2:-1, 3:-2] = x
    return x, x.mT.contiguous().mT, wide[..., 2:-1, 3:-2], wide.mT.contiguous().mT[..., 2:-1, 3:-2]


@pytest.mark.parametrize("networks", [(), (1,), (3,)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_linear(library, networks, has_bias):
    x, weight, bias = draw(networks, (7, 5), (4, 5), (4,))
    exact = [tensor.detach().double().requires_grad_(True) for tensor in (x, weight, bias)]
    expected = exact[0] @ exact[1].mT + (exact[2].unsqueeze(-2) if has_bias else 0.0)
    result = linear(x, weight, bias if has_bias else None)
    th.testing.assert_close(result, expected.float())
    grad = th.randn_like(result)
    inputs = 3 if has_bias else 2
    gradients = th.autograd.grad(result, (x, weight, bias)[:inputs], grad)
    theirs = th.autograd.grad(expected, exact[:inputs], grad.double())
    th.testing.assert_close(gradients, tuple(gradient.float() for gradient in theirs))
    with th.no_grad():
        assert th.equal(linear(x, weight, bias if has_bias else None), result)


@pytest.mark.parametrize("networks", [(), (2,)])
def test_layouts(library, networks):
    """A part of a matrix is as good as a matrix."""
    left, right = (x.detach() for x in draw(networks, (7, 5), (5, 4)))
    for a in layouts(left):
        for b in layouts(right):
            th.testing.assert_close(product(a, b), (left.double() @ right.double()).float())
    expanded = left[..., :1, :].expand(*networks, 7, 5)
    th.testing.assert_close(product(expanded, right), expanded @ right)


def test_what_needs_no_gradient_gets_none(library):
    x, weight, bias = draw((2,), (7, 5), (4, 5), (4,))
    weight.requires_grad_(False)
    linear(x, weight, bias).sum().backward()
    assert x.grad is not None
    assert bias.grad is not None
    assert weight.grad is None


@pytest.mark.parametrize("capability", ["AVX512", "AVX2"])
@pytest.mark.parametrize(
    ("told", "is_zen5"),
    [
        ({"cpu_name": "AMD EPYC", "avx_vnni": True}, True),
        ({"cpu_name": "AMD EPYC", "avx_vnni": False}, False),
        ({"cpu_name": "AMD EPYC"}, False),
        ({"cpu_name": "Intel Xeon", "avx_vnni": True}, False),
        ({}, False),
        (None, False),
    ],
)
def test_mkl_is_left_alone_where_it_is_fast(capability, told, is_zen5, monkeypatch):
    """It does without AVX-512 on AMD's processors, which loses nothing until Zen 4; older versions of torch do not tell."""
    monkeypatch.setattr(th.backends.cpu, "get_cpu_capability", lambda: capability)
    if told is None:
        monkeypatch.delattr(th.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(th.cpu, "get_capabilities", lambda: told, raising=False)
    assert onednn_is_faster() == (th.backends.mkldnn.is_available() and capability == "AVX512" and is_zen5)


def test_other_types_are_left_to_torch(monkeypatch):
    """oneDNN is asked for float32 alone: not where autocast is enabled, and not for double precision."""
    calls = ask_onednn(monkeypatch)
    for networks in ((), (2,)):
        x, weight, bias = draw(networks, (7, 5), (4, 5), (4,))
        with th.autocast("cpu", dtype=th.bfloat16):
            result = linear(x, weight, bias)
            assert result.dtype == th.bfloat16
            result.float().sum().backward()
        assert x.grad.dtype == weight.grad.dtype == th.float32
        assert linear(x.double(), weight.double(), bias.double()).dtype == th.float64
    assert not calls


@needs_onednn
def test_compiled(monkeypatch):
    """The compiler takes oneDNN's product for an operator of its own."""
    ask_onednn(monkeypatch)
    for networks in ((), (2,)):
        x, weight, bias = draw(networks, (7, 5), (5, 5), (5,))

        def loss(x, weight, bias):
            return linear(linear(x, weight, bias).relu(), weight, bias).square().sum()

        gradients = [
            th.autograd.grad(function(x, weight, bias), (x, weight, bias))
            for function in (loss, th.compile(loss, fullgraph=True))
        ]
        th.testing.assert_close(*gradients)


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(0, 3))
def test_shapes(n_rows, n, n_columns, n_networks):
    networks = (n_networks,) if n_networks else ()
    left, right = th.randn(*networks, n_rows, n), th.randn(*networks, n, n_columns)
    th.testing.assert_close(products._multiply(left, right, None), left @ right)


def test_view_of_a_stack():
    stacked = th.nn.Module()
    stacked.weight = th.nn.Parameter(th.randn(3, 4, 5))
    stacked.bias = th.nn.Parameter(th.randn(3, 4), requires_grad=False)
    view = view_of(stacked, 1, th.nn.Linear(5, 4))
    x = th.randn(2, 5)
    th.testing.assert_close(view(x), x @ stacked.weight[1].T + stacked.bias[1])
    assert not view.bias.requires_grad
    view.weight.data.zero_()
    assert (stacked.weight[1] == 0).all()
