"""The public functions over the Triton kernels: registration, autograd, storages; on the CPU in place of C++."""

from __future__ import annotations

import importlib
import warnings

import pytest
import torch
import torch.nn.functional as F
from triton_support import DEVICES, poison  # noqa: F401

import uasparse_kernels as ua
from uasparse_kernels import SparsityPattern, ops
from uasparse_kernels.ops._common import Choice, dense_form
from uasparse_kernels.triton import _OPS, _lazy

pytestmark = [pytest.mark.parametrize("device", DEVICES), pytest.mark.usefixtures("poison")]
linear = importlib.import_module("uasparse_kernels.ops.masked_linear")
conv2d = importlib.import_module("uasparse_kernels.ops.masked_conv2d")


@pytest.fixture(autouse=True)
def _triton_everywhere(device, monkeypatch):
    """Every op goes to Triton, under the interpreter also on the CPU."""
    for module in (linear, conv2d):
        monkeypatch.setattr(module, "choose", lambda *_, **__: Choice("triton", "test"))
    if device == "cuda":
        yield
        return
    library = torch.library.Library("uasparse", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for op, module in _OPS.items():
            library.impl(op, _lazy(module, op), "CPU", allow_override=True)
    yield
    library._destroy()


def _gradients(function, input, weight, bias):
    leaves = [t.detach().clone().requires_grad_() for t in (input, weight, bias)]
    output = function(*leaves)
    torch.manual_seed(5)
    output.backward(torch.randn(output.shape, device=output.device).to(output))
    return output.detach(), *(leaf.grad for leaf in leaves)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "dense"])
@pytest.mark.parametrize("shape", [(32, 48), (32, 48, 3, 3), (32, 48, 1, 1)], ids=str)
def test_public_functions(shape, packed, device):
    pattern = SparsityPattern.random(shape, 0.4, block=(16, 16)).to(device)
    values = torch.randn(pattern.packed_shape, device=device)
    weight = values if packed else pattern.unpack(values)
    bias = torch.randn(32, device=device)
    input = torch.randn(6, 48, device=device) if len(shape) == 2 else torch.randn(2, 48, 5, 4, device=device)
    op, torch_op = (ops.masked_linear, F.linear) if len(shape) == 2 else (ops.masked_conv2d, F.conv2d)
    got = _gradients(lambda x, w, b: op(x, w, pattern, b), input, weight, bias)
    mask = torch.zeros(shape, device=device)
    mask.view(-1)[pattern.indices().view(-1)] = 1
    exact = list(_gradients(torch_op, *(t.double() for t in (input, _dense(pattern, values), bias))))
    exact[2] = exact[2].reshape(-1)[pattern.indices()] if packed else exact[2] * mask
    for g, e in zip(got, exact, strict=True):
        torch.testing.assert_close(g.double(), e, rtol=1e-4, atol=1e-4)
    assert packed or not got[2][mask == 0].any()


def _dense(pattern, values):
    dense = values.new_zeros(pattern.shape)
    dense.view(-1)[pattern.indices().view(-1)] = values.view(-1)
    return dense


def test_gradient_of_the_dense_form_is_masked_in_place(device):
    pattern = SparsityPattern.random((30, 20), 0.2).to(device)
    weight = pattern.unpack(torch.randn(pattern.nnz, device=device)).requires_grad_()
    input = torch.randn(7, 20, device=device)
    F.linear(input, dense_form(weight, pattern)).sum().backward()
    full = input.sum(0).expand(30, 20)
    assert not weight.grad[weight == 0].any()
    torch.testing.assert_close(weight.grad, torch.where(weight != 0, full, 0))


def test_second_derivatives_through_the_dense_form(device):
    """A recorded graph must not be masked in place."""
    pattern = SparsityPattern.random((6, 5), 0.4).to(device)
    weight = pattern.unpack(torch.randn(pattern.nnz, device=device)).requires_grad_()
    input = torch.randn(3, 5, device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(F.linear(input, dense_form(weight, pattern)).pow(2).sum(), weight, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), input)
    assert second.isfinite().all() and second.any()


def test_layer_trains(device):
    layer = ua.SparseLinear(32, 32, sparsity=0.5, block=(16, 16), device=device)
    input = torch.randn(8, 32, device=device)
    before = layer.weight.detach().clone()
    loss = layer(input).square().mean()
    loss.backward()
    with torch.no_grad():
        layer.weight -= 0.5 * layer.weight.grad
    assert layer(input).square().mean() < loss and not torch.equal(before, layer.weight)
