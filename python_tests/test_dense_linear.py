"""Dense linear layers by oneDNN: what F.linear computes, with all its derivatives, and only where it pays."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import uasparse_kernels as ua
from uasparse_kernels.ops import _dense

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"),
    reason="a torch without oneDNN",
)


@pytest.fixture
def always(monkeypatch):
    """As on a processor where it pays, for products of any size."""
    monkeypatch.setattr(_dense, "_has_slow_mkl", lambda: True)
    monkeypatch.setattr(_dense, "_WORTH", 1)
    monkeypatch.setattr(_dense, "_ROWS", 0)


def arguments(shape, outputs, *, bias, transposed):
    torch.manual_seed(len(shape) + outputs)
    x = torch.randn(shape)
    if transposed:
        x = x.transpose(0, -2).contiguous().transpose(0, -2)
    tensors = [x, torch.randn(outputs, shape[-1]), torch.randn(outputs) if bias else None]
    return [t if t is None else t.requires_grad_() for t in tensors]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("shape", "outputs", "transposed"),
    [((37, 65), 51, False), ((1, 7), 3, False), ((2, 5, 9), 17, True), ((19,), 4, False)],
)
def test_values_and_gradients(always, shape, outputs, transposed, bias):
    x, weight, b = given = arguments(shape, outputs, bias=bias, transposed=transposed and len(shape) > 2)
    wanted = F.linear(*(t if t is None else t.double() for t in given))
    found = _dense.linear(x, weight, b)
    node = found.grad_fn if x.dim() == 2 else found.grad_fn.next_functions[0][0]
    assert found.dtype == torch.float32 and "OneDnn" in node.name()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    inputs = [t for t in given if t is not None]
    grad = torch.randn_like(found)
    first = torch.autograd.grad(found, inputs, grad, create_graph=True)
    expected = torch.autograd.grad(wanted, inputs, grad.double(), create_graph=True)
    for mine, theirs in zip(first, expected, strict=True):
        torch.testing.assert_close(mine, theirs.float(), rtol=1e-5, atol=1e-5)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs, allow_unused=True)
    expected = torch.autograd.grad(sum(g.square().sum() for g in expected), inputs, allow_unused=True)
    for mine, theirs in zip(second, expected, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("of", ["windows", "expanded", "spread"])
def test_operands_of_any_strides(always, of):
    make = {
        "windows": lambda n: torch.randn(n + 8).unfold(0, 9, 1),
        "expanded": lambda n: torch.randn(1, 1).expand(n, 9),
        "spread": lambda n: torch.randn(n, 18)[:, ::2],
    }[of]
    x, weight, bias = make(30).requires_grad_(), make(12).requires_grad_(), make(12)[:, 0]
    found, wanted = _dense.linear(x, weight, bias), F.linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    for grad in (torch.randn(30, 12), torch.randn(41).unfold(0, 12, 1), torch.ones(()).expand(30, 12)):
        first = torch.autograd.grad(found, [x, weight], grad, retain_graph=True)
        expected = torch.autograd.grad(wanted, [x, weight], grad.double(), retain_graph=True)
        for mine, theirs in zip(first, expected, strict=True):
            torch.testing.assert_close(mine, theirs.float(), rtol=1e-5, atol=1e-5)


def test_only_gradients_that_are_wanted(always):
    x, weight = torch.randn(20, 6), torch.randn(5, 6, requires_grad=True)
    _dense.linear(x, weight).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(5, 6))
    assert x.grad is None


def test_a_layer_that_runs_dense_takes_it(always, monkeypatch):
    calls = []
    apply = _dense._OneDnn.apply
    monkeypatch.setattr(_dense._OneDnn, "apply", lambda *args: calls.append(1) or apply(*args))
    layer = ua.SparseLinear(24, 32, sparsity=0.05, storage="dense")
    x = torch.randn(40, 24, requires_grad=True)
    out = layer(x)
    out.square().sum().backward()
    assert len(calls) == 3  # the product and its two gradients
    weight = layer.dense_weight().double()
    torch.testing.assert_close(out.double(), x.double() @ weight.T + layer.bias.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), 2 * out.double() @ weight, rtol=1e-5, atol=1e-4)
    outside = ~layer.pattern.to_mask()
    assert layer.weight.grad.masked_select(outside).count_nonzero() == 0


def test_where_it_does_not_pay(monkeypatch):
    monkeypatch.setattr(_dense, "_has_slow_mkl", lambda: True)
    large = torch.randn(256, 256), torch.randn(256, 256)
    assert _dense._is_quicker_by_onednn(*large)
    for x, weight in (
        (large[0].double(), large[1].double()),
        (large[0][:8], large[1]),  # few rows
        (torch.randn(64, 64), torch.randn(64, 64)),  # a small product
    ):
        assert not _dense._is_quicker_by_onednn(x, weight)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not _dense._is_quicker_by_onednn(*large)
    monkeypatch.setattr(_dense, "_has_slow_mkl", lambda: False)
    assert not _dense._is_quicker_by_onednn(*large)
