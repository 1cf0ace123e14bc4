"""masked_conv2d of one tap where its ways part: copied planes, planes side by side, and the dense kernel."""

import pytest
import torch

from uasparse_kernels import SparsityPattern, _library
from uasparse_kernels.ops import _common, masked_conv2d
from uasparse_kernels.ops.masked_conv2d import masked_conv2d_reference

pytestmark = pytest.mark.skipif(_library.compiled is None, reason="needs the compiled kernels")


def check(kernel, shape, size, batch, density, dtype=torch.float32, *, block=(1, 1), stride=1, groups=1):
    """Forward and all gradients by a kernel, beside the reference in float64."""
    pattern = SparsityPattern.random(shape, density, block=block)
    x = torch.randn(batch, shape[1] * groups, *size, dtype=dtype, requires_grad=True)
    weight = pattern.pack(torch.randn(shape, dtype=dtype)).requires_grad_()
    bias = torch.randn(shape[0], dtype=dtype, requires_grad=True)
    exact = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    with _common.forced(kernel):
        found = masked_conv2d(x, weight, pattern, bias, stride, groups=groups)
    wanted = masked_conv2d_reference(exact[0], exact[1], pattern, exact[2], stride, groups=groups)
    grad = torch.randn_like(found)
    found.backward(grad)
    wanted.backward(grad.double())
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    for ours, right in ((found, wanted), *zip((x.grad, weight.grad, bias.grad), (t.grad for t in exact), strict=True)):
        torch.testing.assert_close(
            ours.double(), right, rtol=tolerance, atol=tolerance * float(right.detach().abs().max())
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("block", [(1, 1), (4, 4), (4, 1)])
@pytest.mark.parametrize(
    ("size", "batch", "stride", "groups"),
    [
        ((14, 14), 2, 1, 1),  # a plane a copy
        ((7, 7), 8, 1, 1),  # eight side by side
        ((5, 9), 7, 1, 1),  # the last images are missing
        ((14, 13), 5, 2, 1),  # 7 x 7 taken
        ((15, 28), 3, (2, 1), 2),
        ((7, 7), 9, 1, 2),
    ],
)
def test_copies(dtype, block, size, batch, stride, groups):
    check("cpu", (96, 88 // groups, 1, 1), size, batch, 0.7, dtype, block=block, stride=stride, groups=groups)


@pytest.mark.parametrize("stride", [1, 2])
def test_the_dense_kernel(stride):
    check("dense", (24, 32, 1, 1), (20, 20), 4, 0.9, stride=stride)
