"""masked_conv2d with strides, maps in NCHW: planes of the phases of rows and columns, and where these do not serve."""

import random

import pytest
import torch
from test_masked_conv2d import assert_near, kernel, needs_kernel, results

from uasparse_kernels.ops.masked_conv2d import masked_conv2d_reference
from uasparse_kernels.pattern import SparsityPattern


def compare(x, weight, bias, pattern, *arguments):
    """Outputs and all gradients beside the reference in float64 of the same numbers."""
    got = results(kernel, x, weight, bias, pattern, *arguments, rounded_to=x.dtype)
    exact = [t if t is None else t.double() for t in (x, weight, bias)]
    expected = results(masked_conv2d_reference, *exact, pattern, *arguments, rounded_to=x.dtype)
    positions = got[0].numel() // pattern.shape[0]
    terms = [pattern.nnz // pattern.shape[0] + 1, pattern.nnz // x.shape[1] + 1, positions, positions]
    for one, other, count in zip(got, expected, terms, strict=False):
        assert_near(one, other, count)
    return got


@needs_kernel
@pytest.mark.parametrize("seed", range(60))
def test_random_shapes(seed):
    r, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    size, padding = (r.randint(1, 5), r.randint(1, 5)), (r.randint(0, 3), r.randint(0, 3))
    stride = r.choice([(2, 2), (2, 2), (2, 1), (1, 2), (4, 2), (5, 2), (2, 3)])
    dilation = r.choice([(1, 1), (1, 1), (2, 1), (1, 2), (3, 3)])
    least = [max(1, dilation[i] * (size[i] - 1) + 1 - 2 * padding[i]) for i in range(2)]
    height, width = (max(r.choice([r.randint(1, 20), r.randint(14, 70)]), least[i]) for i in range(2))
    groups = r.choice([1, 1, 2, 3])
    shape = (groups * r.randint(1, 40), r.randint(1, 40), *size)
    pattern = SparsityPattern.random(shape, r.choice([0.02, 0.1, 0.5, 1.0]), generator=generator)
    x = torch.randn(r.choice([1, 2, 3, 8, 19]), shape[1] * groups, height, width, generator=generator)
    weight = torch.randn(pattern.packed_shape, generator=generator)
    if r.random() < 0.3:
        weight = pattern.unpack(weight)
    bias = torch.randn(shape[0], generator=generator) if r.random() < 0.5 else None
    compare(x, weight, bias, pattern, stride, padding, dilation, groups)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("batch", "channels", "size", "padding"),
    [
        (3, (9, 6), (32, 32), 1),  # whole vectors
        (17, (30, 20), (8, 8), 1),  # images side by side, the last ones alone
        (8, (40, 70), (28, 28), 1),
        (2, (200, 300), (57, 57), 1),  # rows in several groups, results in several parts
        (5, (300, 64), (15, 14), 1),
        (2, (9, 6), (33, 40), 0),
        (1, (9, 6), (7, 513), 2),
        (1, (9, 6), (9, 700), 1),  # rows that no register tile holds
    ],
)
def test_three_by_three(batch, channels, size, padding, dtype):
    pattern = SparsityPattern.random((channels[1], channels[0], 3, 3), 0.1)
    x, weight = torch.randn(batch, channels[0], *size, dtype=dtype), torch.randn(pattern.packed_shape, dtype=dtype)
    compare(x, weight, torch.randn(channels[1], dtype=dtype), pattern, (2, 2), (padding, padding))


@needs_kernel
@pytest.mark.parametrize("nonzeros", [1, 2, 5, 13])
@pytest.mark.parametrize("height,width", [(9, 35), (8, 8), (15, 14)])
def test_what_is_no_number_stays_where_it_is(nonzeros, height, width):
    """In output and grad_input: images, positions and channels lie side by side in vectors."""
    pattern = SparsityPattern.random((5, 7, 3, 3), nonzeros / 63, generator=torch.Generator().manual_seed(nonzeros))
    index = pattern.pack(pattern.to_mask().double())
    weight = torch.randn(pattern.packed_shape)
    x = torch.randn(40, 7, height, width)
    x[17, 2, 4, width - 1], x[39, 6, 0, 0] = torch.inf, torch.nan
    zeros = torch.nan_to_num(x.double(), 0, 0, 0)
    got = kernel(x, weight, pattern, None, (2, 2), (1, 1))
    touched = masked_conv2d_reference((~x.isfinite()).double(), index, pattern, None, 2, 1)
    assert bool((got.isfinite() == (touched == 0)).all())
    expected = masked_conv2d_reference(zeros, weight.double(), pattern, None, 2, 1)
    assert_near(got[touched == 0], expected[touched == 0], nonzeros)

    grad = torch.randn(got.shape)
    grad[17, 2, 3, got.shape[3] - 1], grad[39, 4, 0, 0] = torch.inf, torch.nan

    def grad_input(grad, weight):
        leaf = torch.zeros(x.shape, dtype=grad.dtype, requires_grad=True)
        function = kernel if grad.dtype == torch.float32 else masked_conv2d_reference
        return torch.autograd.grad(function(leaf, weight, pattern, None, (2, 2), (1, 1)), leaf, grad)[0]

    got, touched = grad_input(grad, weight), grad_input((~grad.isfinite()).double(), index)
    assert bool((got.isfinite() == (touched == 0)).all())
    expected = grad_input(torch.nan_to_num(grad.double(), 0, 0, 0), weight.double())
    assert_near(got[touched == 0], expected[touched == 0], nonzeros)


@needs_kernel
@pytest.mark.parametrize("batch,size", [(1, 30), (3, 15), (9, 31), (70, 8)])
def test_threads_do_not_change_results(batch, size):
    threads = torch.get_num_threads()
    pattern = SparsityPattern.random((300, 40, 3, 3), 0.1)
    x, weight = torch.randn(batch, 40, size, size), torch.randn(pattern.packed_shape)
    arguments = (x, weight, torch.randn(300), pattern, (2, 2), (1, 1))
    try:
        torch.set_num_threads(1)
        expected = results(kernel, *arguments)
        for count in (2, 3, 8):
            torch.set_num_threads(count)
            got = results(kernel, *arguments)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), f"{count} threads"
    finally:
        torch.set_num_threads(threads)


@needs_kernel
def test_lists_follow_the_strides():
    """Lists are kept with a pattern: other strides, and a pattern changed in place, have their own."""
    pattern = SparsityPattern.random((6, 50, 3, 3), 0.2)
    for _ in range(2):
        for stride in [(2, 2), (2, 1), (1, 2), (1, 1), (2, 2)]:
            for padding in (1, 0):
                x, weight = torch.randn(3, 50, 16, 16), torch.randn(pattern.packed_shape)
                compare(x, weight, None, pattern, stride, (padding, padding))
        pattern.assign_(SparsityPattern.random(pattern.shape, 0.2))
