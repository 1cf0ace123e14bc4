"""masked_conv2d of several taps in blocks of rows: by space with masks or gaps, and where it falls back."""

import random

import pytest
import test_conv_one_tap
import torch

from uasparse_kernels import SparsityPattern, _library
from uasparse_kernels.ops import _common, masked_conv2d
from uasparse_kernels.ops.masked_conv2d import masked_conv2d_reference

pytestmark = pytest.mark.skipif(_library.compiled is None, reason="needs the compiled kernels")


def check(shape, size, batch, *, density=0.4, **options):
    test_conv_one_tap.check("cpu", shape, size, batch, density, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", [(4, 1), (4, 4), (8, 8), (16, 16)])
@pytest.mark.parametrize(
    ("size", "batch"),
    [
        ((32, 32), 2),  # masks that alternate, planes where they are
        ((16, 16), 3),
        ((8, 8), 5),  # one mask; images side by side for dot products
        ((7, 8), 3),  # half a vector at the end
        ((4, 4), 9),
        ((28, 28), 1),  # gaps
        ((7, 7), 5),
        ((5, 13), 1),
        ((3, 2), 4),  # few positions
        ((40, 33), 2),
    ],
)
def test_sizes(dtype, block, size, batch):
    check((32, 48, 3, 3), size, batch, block=block, dtype=dtype, padding=1)


@pytest.mark.parametrize("seed", range(30))
def test_any_shape(seed):
    rng = random.Random(seed)
    block = rng.choice([(4, 1), (4, 4), (12, 1), (12, 12), (8, 8)])
    groups = rng.choice([1, 1, 2, 3])
    shape = (
        block[0] * groups * rng.randint(1, 3),
        block[1] * rng.randint(1, 4),
        rng.randint(1, 5),
        rng.randint(1, 5),
    )
    dilation = rng.randint(1, 2)
    padding = (rng.randint(0, 3), rng.randint(0, 3))
    # Of one position of output at least.
    size = tuple(
        max(1, dilation * (k - 1) + 1 - 2 * p) + rng.choice([0, 1, 3, 8, 15, 16, 31, rng.randint(0, 40)])
        for k, p in zip(shape[2:], padding, strict=True)
    )
    check(
        shape,
        size,
        rng.randint(1, 6),
        block=block,
        density=rng.choice([0.01, 0.1, 0.5, 1.0]),
        packed=rng.random() < 0.5,
        groups=groups,
        stride=rng.choice([1, 1, 1, 2]),
        padding=padding,
        dilation=dilation,
    )


def test_groups_of_rows():
    """Planes of which L2 holds some rows alone."""
    check((64, 64, 3, 3), (61, 64), 1, block=(4, 4), density=0.1, padding=1)
    check((64, 64, 3, 3), (59, 57), 1, block=(4, 4), density=0.1, padding=1)


@pytest.mark.parametrize("size", [(8, 8), (6, 32)])
def test_what_is_no_number_stays_where_it_is(size):
    """Where edges are masked: an infinity in a column of the edge, and in a gradient there."""
    pattern = SparsityPattern.random((8, 8, 3, 3), 0.5, block=(4, 4))
    x = torch.randn(3, 8, *size)
    x[0, 2, 1, 0], x[1, 5, 3, -1] = torch.inf, torch.nan
    grad = torch.randn(3, 8, *size)
    grad[0, 4, 2, -1] = torch.inf
    leaves = x.requires_grad_(), pattern.pack(torch.randn(pattern.shape)).requires_grad_()
    with _common.forced("cpu"):
        output = masked_conv2d(*leaves, pattern, padding=1)
    found = [output.detach(), *torch.autograd.grad(output, leaves, grad)]
    # Of each active weight alone: a dense reference would multiply by zeros too.
    taps = torch.nn.functional.pad(x.detach().double(), (1, 1, 1, 1)).unfold(2, size[0], 1).unfold(3, size[1], 1)
    weight, mask = pattern.unpack(leaves[1].detach()).double(), pattern.to_mask()
    products = weight[None, :, :, :, :, None, None] * taps[:, None]
    wanted = torch.where(mask[None, :, :, :, :, None, None], products, 0).sum((2, 3, 4))
    to_weight = (grad.double()[:, :, None, None, None] * taps[:, None]).sum((0, -2, -1))
    for ours, right in zip((found[0], found[2]), (wanted, pattern.pack(to_weight)), strict=True):
        largest = float(right[right.isfinite()].abs().max())
        torch.testing.assert_close(ours.double(), right, rtol=1e-4, atol=1e-4 * largest, equal_nan=True)


def results(x, weight, pattern):
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    with _common.forced("cpu"):
        output = masked_conv2d(*leaves, pattern, padding=1)
    return [output.detach(), *torch.autograd.grad(output, leaves, torch.ones_like(output))]


@pytest.mark.parametrize(("batch", "size"), [(1, 32), (5, 8), (3, 13)])
def test_threads_do_not_change_results(batch, size):
    threads = torch.get_num_threads()
    pattern = SparsityPattern.random((24, 40, 3, 3), 0.3, block=(4, 4))
    x, weight = torch.randn(batch, 40, size, size), pattern.pack(torch.randn(pattern.shape))
    try:
        torch.set_num_threads(1)
        expected = results(x, weight, pattern)
        for count in (2, 3, 9):
            torch.set_num_threads(count)
            got = results(x, weight, pattern)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), f"{count} threads"
    finally:
        torch.set_num_threads(threads)


def test_lists_follow_the_pattern_and_the_maps():
    """Lists are kept with a pattern: other maps, and a pattern changed in place, have their own."""
    pattern = SparsityPattern.random((16, 24, 3, 3), 0.3, block=(4, 4))
    for _ in range(3):
        for size, batch in [((32, 32), 1), ((7, 7), 3), ((8, 8), 2), ((32, 32), 1)]:
            x, weight = torch.randn(batch, 24, *size), pattern.pack(torch.randn(pattern.shape))
            wanted = masked_conv2d_reference(x.double(), weight.double(), pattern, padding=1)
            torch.testing.assert_close(results(x, weight, pattern)[0].double(), wanted, rtol=1e-4, atol=1e-4)
        pattern.assign_(SparsityPattern.random(pattern.shape, 0.3, block=(4, 4)))
