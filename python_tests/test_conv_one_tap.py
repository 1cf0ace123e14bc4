"""masked_conv2d of one tap where its ways part: copied planes, planes side by side, and the dense kernel."""

import pytest
import torch

from uasparse_kernels import SparsityPattern, _library
from uasparse_kernels.ops import _common, masked_conv2d
from uasparse_kernels.ops.masked_conv2d import masked_conv2d_reference

pytestmark = pytest.mark.skipif(_library.compiled is None, reason="needs the compiled kernels")


def check(kernel, shape, size, batch, density, dtype=torch.float32, *, block=(1, 1), packed=True, **options):
    """Forward and all gradients by a kernel, beside the reference in float64 of the same rounded numbers."""
    pattern = SparsityPattern.random(shape, density, block=block)
    x = torch.randn(batch, shape[1] * options.get("groups", 1), *size, dtype=dtype, requires_grad=True)
    weight = torch.randn(shape, dtype=dtype)
    weight = (pattern.pack(weight) if packed else weight).requires_grad_()
    bias = torch.randn(shape[0], dtype=dtype, requires_grad=True)
    exact = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    with _common.forced(kernel):
        found = masked_conv2d(x, weight, pattern, bias, **options)
    wanted = masked_conv2d_reference(exact[0], exact[1], pattern, exact[2], **options)
    grad = torch.randn_like(found)
    found.backward(grad)
    wanted.backward(grad.double())
    sums = 1e-10 if dtype == torch.float64 else 1e-4  # of float32 for bfloat16 too, which is rounded once
    for ours, right in ((found, wanted), *zip((x.grad, weight.grad, bias.grad), (t.grad for t in exact), strict=True)):
        torch.testing.assert_close(
            ours.double(),
            right,
            rtol=max(sums, torch.finfo(dtype).eps / 2),
            atol=sums * float(right.detach().abs().max()),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", [(1, 1), (4, 4), (4, 1)])
@pytest.mark.parametrize(
    ("size", "batch", "stride", "groups"),
    [
        ((14, 14), 2, 1, 1),  # a plane a copy
        ((7, 7), 8, 1, 1),  # eight side by side
        ((5, 9), 7, 1, 1),  # the last images are missing
        ((14, 13), 5, 2, 1),  # 7 x 7 taken
        ((15, 28), 3, (2, 1), 2),
        ((28, 28), 3, 1, 1),  # pieces of a plane, and half a vector
        ((13, 20), 1, 1, 1),
        ((9, 7), 1, 1, 2),  # few positions
        ((7, 7), 9, 1, 2),
    ],
)
def test_copies(dtype, block, size, batch, stride, groups):
    check("cpu", (96, 88 // groups, 1, 1), size, batch, 0.7, dtype, block=block, stride=stride, groups=groups)


@pytest.mark.parametrize("density", [0.02, 0.45, 0.95])
@pytest.mark.parametrize(
    ("size", "batch", "groups"),
    [((12, 16), 3, 1), ((17, 16), 2, 1), ((25, 24), 1, 2), ((8, 8), 5, 1), ((4, 4), 9, 2), ((14, 14), 2, 1)],
)
def test_pieces_by_density_and_blocks_of_channels(density, size, batch, groups):
    check("cpu", (40, 300, 1, 1), size, batch, density, groups=groups)


@pytest.mark.parametrize("stride", [1, 2])
def test_the_dense_kernel(stride):
    check("dense", (24, 32, 1, 1), (20, 20), 4, 0.9, stride=stride)


@pytest.mark.parametrize("size", [(7, 9), (13, 20), (28, 28)])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("stride", [1, 2])
def test_what_is_no_number_stays_where_it_is(size, batch, stride):
    """bfloat16, in the map and in its gradient: at the ends of planes, where vectors overlap, and beside numbers."""
    pattern = SparsityPattern.random((11, 9, 1, 1), 0.4)
    x = torch.randn(batch, 9, *size)
    height, width = (-(-n // stride) for n in size)
    overlap = max(0, height * width - 25)
    x[0, 2, -1, -1], x[-1, 5, 0, 0] = torch.inf, torch.nan
    x[0, 7, overlap // width * stride, overlap % width * stride] = -torch.inf
    grad = torch.randn(batch, 11, height, width)
    grad[0, 4, -1, -1], grad[-1, 8, 1, 1] = torch.inf, torch.nan
    x, grad = x.bfloat16(), grad.bfloat16()
    leaves = x.requires_grad_(), pattern.pack(torch.randn(pattern.shape)).bfloat16().requires_grad_()
    with _common.forced("cpu"):
        output = masked_conv2d(*leaves, pattern, None, stride)
    found = [output.detach(), *torch.autograd.grad(output, leaves, grad)]
    # Of each active weight alone: a dense reference would multiply by zeros too.
    mask = pattern.to_mask()[None]
    weight = pattern.unpack(leaves[1].detach()).double()[None]
    taken = x.detach().double()[:, None, :, ::stride, ::stride]
    grads = grad.double()[:, :, None]
    to_input = torch.zeros(x.shape, dtype=torch.float64)
    to_input[..., ::stride, ::stride] = torch.where(mask, weight * grads, 0).sum(1)
    to_weight = (grads * taken).sum((0, 3, 4))[..., None, None]
    wanted = [torch.where(mask, weight * taken, 0).sum(2), to_input, pattern.pack(to_weight)]
    for ours, right in zip(found, wanted, strict=True):
        assert bool(right.isfinite().any())
        largest = float(right[right.isfinite()].abs().max())
        torch.testing.assert_close(
            ours.double(), right, rtol=torch.finfo(torch.bfloat16).eps / 2, atol=1e-4 * largest, equal_nan=True
        )
