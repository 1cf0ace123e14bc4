"""The way of the loss on a GPU, where the forward makes the gradient too, walked on the CPU: a stand-in serves the two
ops there. (Their kernels: test_cuda_emulation.py.)"""

from __future__ import annotations

import pytest
import torch
from test_unknown_aware_loss import make

from uasparse_kernels.ops import unknown_aware_loss, unknown_aware_loss_reference

pytestmark = pytest.mark.skipif(
    not torch._C._dispatch_has_kernel_for_dispatch_key("uasparse::unknown_aware_loss", "CPU"),
    reason="needs the compiled ops",
)


class StandIn:
    """The contract of csrc/cuda/unknown_aware_loss_torch.cpp: a gradient for what the last backward came with."""

    def __init__(self):
        self.expected, self.made, self.redone = torch.ones(()), 0, 0

    def at_once(self, logits, target, alpha, unknown_weight, reduction):
        self.made += 1
        options = (target, alpha)
        loss, threshold, saved = torch.ops.uasparse.unknown_aware_loss(logits, *options, unknown_weight, reduction)
        expected = self.expected.to(loss.dtype)
        grad = torch.ops.uasparse.unknown_aware_loss_backward(
            expected, logits, *options, saved, unknown_weight, reduction
        )
        return loss, threshold, torch.cat([saved, expected.expand(len(saved), 1)], 1), grad

    def put_right_(self, grad, grad_loss, logits, target, alpha, saved, unknown_weight, reduction):
        if not torch.equal(saved[:, 2], grad_loss.expand(len(saved))):
            self.redone += 1
            grad.copy_(
                torch.ops.uasparse.unknown_aware_loss_backward(
                    grad_loss, logits, target, alpha, saved[:, :2].contiguous(), unknown_weight, reduction
                )
            )
        self.expected = grad_loss.clone()


@pytest.fixture
def stand_in():
    served, library = StandIn(), torch.library.Library("uasparse", "IMPL")
    library.impl("unknown_aware_loss_at_once", served.at_once, "CPU")
    library.impl("unknown_aware_loss_put_right_", served.put_right_, "CPU")
    yield served
    library._destroy()


def gradient(logits, target, factor=1.0, function=unknown_aware_loss, **options):
    z = logits.clone().requires_grad_()
    loss, _ = function(z, target, 0.7, unknown_weight=0.25, **options)
    (factor * loss).backward()
    return z.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_any_gradient_of_the_loss(stand_in, dtype, reduction):
    """Scaled losses, accumulated batches: right from the first, and made once from the second on."""
    for step, factor in enumerate([1.0, 1.0, 65536.0, 65536.0, 0.25, 0.25, 0.25]):
        logits, target = make(33, 11, dtype, seed=step)
        got = gradient(logits, target, factor, reduction=reduction)
        exact = gradient(logits.double(), target, factor, unknown_aware_loss_reference, reduction=reduction)
        eps = max(torch.finfo(dtype).eps, 1e-12)
        torch.testing.assert_close(got.double(), exact, rtol=4 * eps, atol=4 * eps * factor)
    assert (stand_in.made, stand_in.redone) == (7, 2)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(64, 11), (33, 513), (17, 1001), (5, 32001), (3, 130_001)])
def test_the_kernels(size, dtype):
    """On a GPU, with rows that begin anywhere: gradients of the loss that were expected, and not."""
    for step, factor in enumerate([1.0, 1.0, 1024.0, 1024.0, 0.25]):
        logits, target = (t.cuda()[step:] for t in make(size[0] + step, size[1], dtype, seed=step))
        got = gradient(logits, target, factor)
        exact = gradient(logits.double(), target, factor, unknown_aware_loss_reference)
        eps = 64 * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        torch.testing.assert_close(got.double(), exact, rtol=eps + 2 * torch.finfo(dtype).eps, atol=eps * factor)


def test_graph_that_is_kept(stand_in):
    """A second backward makes its own gradient: the first one's may be written to."""
    logits, target = make(9, 5)
    z = logits.clone().requires_grad_()
    loss, _ = unknown_aware_loss(z, target, 0.7)
    (first,) = torch.autograd.grad(loss, z, retain_graph=True)
    expected = first.clone()
    first.fill_(torch.nan)
    for factor in (1.0, 3.0):
        (again,) = torch.autograd.grad(loss, z, torch.tensor(factor), retain_graph=True)
        torch.testing.assert_close(again, factor * expected)
    assert stand_in.made == 1


def test_gradients_in_batches(stand_in):
    """vmap's gradients are not written into what was made for one."""
    logits, target = make(9, 5)
    z = logits.requires_grad_()
    loss, _ = unknown_aware_loss(z, target, 0.7)
    factors = torch.tensor([1.0, -2.0])
    (found,) = torch.autograd.grad(loss, z, factors, retain_graph=True, is_grads_batched=True)
    (one,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(found, factors.view(2, 1, 1) * one)
    assert (stand_in.made, stand_in.redone) == (1, 0)


def test_second_derivatives(stand_in):
    logits, target = make(6, 4, torch.float64)

    def penalty(function):
        z = logits.clone().requires_grad_()
        (first,) = torch.autograd.grad(function(z, target, 0.7)[0], z, create_graph=True)
        return torch.autograd.grad(first.square().sum(), z)[0]

    torch.testing.assert_close(penalty(unknown_aware_loss), penalty(unknown_aware_loss_reference))
    assert stand_in.made == 1
    z = logits.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: unknown_aware_loss(z, target, 0.7)[0], z)


def test_where_it_is_not_made(stand_in):
    """Without a gradient, with one loss a sample, and in what is traced."""
    logits, target = make(9, 5)
    unknown_aware_loss(logits, target, 0.7)
    with torch.no_grad():
        unknown_aware_loss(logits.clone().requires_grad_(), target, 0.7)
    unknown_aware_loss(logits.clone().requires_grad_(), target, 0.7, reduction="none")[0].sum().backward()
    assert stand_in.made == 0
    compiled = torch.compile(lambda z: unknown_aware_loss(z, target, 0.7, unknown_weight=0.25)[0], backend="aot_eager")
    z = logits.clone().requires_grad_()
    compiled(z).backward()
    assert stand_in.made == 0
    torch.testing.assert_close(z.grad, gradient(logits, target))
    assert stand_in.made == 1


def test_logits_that_were_changed(stand_in):
    z = make(9, 5)[0].requires_grad_()
    logits = 2 * z
    loss, _ = unknown_aware_loss(logits, make(9, 5)[1], 0.7)
    with torch.no_grad():
        logits.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("reduction", [1, 2])
def test_opcheck(stand_in, reduction):
    logits, target = make(7, 5)
    arguments = (target, torch.tensor(0.5))
    tests = ("test_schema", "test_faketensor")
    ops = torch.ops.uasparse
    torch.library.opcheck(
        ops.unknown_aware_loss_at_once.default, (logits, *arguments, 0.25, reduction), test_utils=tests
    )
    *_, saved, grad = ops.unknown_aware_loss_at_once(logits, *arguments, 0.25, reduction)
    torch.library.opcheck(
        ops.unknown_aware_loss_put_right_.default,
        (grad, torch.tensor(2.0), logits, *arguments, saved, 0.25, reduction),
        test_utils=tests,
    )
