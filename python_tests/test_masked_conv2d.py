"""masked_conv2d against its float64 reference: values, all gradients, layouts, dtypes, threads, errors."""

import random

import pytest
import torch

from uasparse_kernels import _library
from uasparse_kernels.ops._common import pattern_tensors
from uasparse_kernels.ops.masked_conv2d import choose, masked_conv2d, masked_conv2d_reference
from uasparse_kernels.pattern import SparsityPattern

needs_kernel = pytest.mark.skipif(not _library.has_kernel_for("masked_conv2d", "cpu"), reason="no compiled kernel")
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "sliced": lambda x: torch.stack([x, x + 1], -1)[..., 0],
    "transposed": lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
}


def kernel(x, weight, pattern, bias=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1):
    """The compiled op, whatever the dispatch would choose."""
    return torch.ops.uasparse.masked_conv2d(
        x, weight, bias, *pattern_tensors(pattern), pattern.shape, pattern.block, stride, padding, dilation, groups
    )


def results(function, x, weight, bias, *arguments, rounded_to=torch.float64):
    """Output and gradients (input, weight, bias) for a fixed random grad_output, representable in ``rounded_to``."""
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, weight)]
    if bias is not None:
        leaves.append(bias.detach().clone().requires_grad_())
    output = function(*leaves[:2], arguments[0], leaves[2] if bias is not None else None, *arguments[1:])
    generator = torch.Generator().manual_seed(7)
    grad = torch.randn(output.shape, dtype=torch.float64, generator=generator).to(rounded_to).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


def assert_near(got, expected, terms):
    """Rounding of ``terms`` products of size one, in the dtype of ``got`` (storage) and float32 or wider (sums)."""
    storage = torch.finfo(got.dtype).eps
    sums = min(torch.finfo(torch.float32).eps, storage)
    assert got.shape == expected.shape
    error = (got.double() - expected).abs()
    largest = 1 + float(expected.abs().amax()) if expected.numel() else 1
    bound = storage * expected.abs() + 8 * sums * max(terms, 1) ** 0.5 * largest
    assert bool((error <= bound).all()), f"error {error.max():.3g} over the bound {bound.min():.3g}"


def draw(seed):
    """A random convolution: pattern, input, weight, bias (float64) and arguments."""
    r = random.Random(seed)
    block = r.choice([(1, 1), (1, 1), (2, 1), (8, 1), (2, 2), (4, 4), (12, 12)])
    groups = r.choice([1, 1, 2, 3])
    size = [r.randint(1, 5) for _ in range(2)]
    stride, dilation = (tuple(r.randint(1, 3) for _ in range(2)) for _ in range(2))
    padding = tuple(r.randint(0, 4) for _ in range(2))
    height, width = (max(r.randint(1, 20), dilation[i] * (size[i] - 1) + 1 - 2 * padding[i]) for i in range(2))
    out, inp = groups * block[0] * r.randint(1, 7), block[1] * r.randint(1, 7)
    generator = torch.Generator().manual_seed(seed)
    shape = (out, inp, *size)
    pattern = SparsityPattern.random(shape, r.choice([0.01, 0.1, 0.5, 1.0]), block=block, generator=generator)
    x = torch.randn(r.randint(1, 34), inp * groups, height, width, dtype=torch.float64, generator=generator)
    weight = pattern.pack(torch.randn(shape, dtype=torch.float64, generator=generator))
    bias = torch.randn(out, dtype=torch.float64, generator=generator) if r.random() < 0.5 else None
    if r.random() < 0.5:
        weight = pattern.unpack(weight)
    return r, pattern, x, weight, bias, (stride, padding, dilation, groups)


@needs_kernel
@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_matches_reference(seed, dtype):
    r, pattern, x, weight, bias, arguments = draw(seed)
    # The reference gets the numbers as rounded, so that only sums and outputs round differently.
    x, weight = LAYOUTS[r.choice(list(LAYOUTS))](x.to(dtype)), weight.to(dtype)
    bias = bias if bias is None else bias.to(dtype)
    got = results(kernel, x, weight, bias, pattern, *arguments, rounded_to=dtype)
    exact = [t if t is None else t.double() for t in (x, weight, bias)]
    expected = results(masked_conv2d_reference, *exact, pattern, *arguments, rounded_to=dtype)
    positions = got[0].numel() // max(pattern.shape[0], 1)
    terms = [pattern.nnz // pattern.shape[0] + 1, pattern.nnz // x.shape[1] + 1, positions, positions]
    for one, other, count in zip(got, expected, terms, strict=False):
        assert one.dtype == dtype
        assert_near(one, other, count)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "batch,size,shape,padding,dilation",
    [
        (3, (32, 32), (6, 9, 3, 3), (1, 1), (1, 1)),
        (17, (16, 16), (6, 9, 3, 3), (1, 1), (1, 1)),
        (5, (8, 8), (20, 30, 3, 3), (1, 1), (1, 1)),
        (33, (4, 4), (20, 30, 3, 3), (1, 1), (1, 1)),
        (2, (14, 7), (4, 5, 5, 5), (2, 2), (1, 1)),
        (2, (16, 28), (4, 5, 3, 3), (0, 0), (1, 1)),
        (2, (40, 16), (4, 5, 3, 3), (2, 2), (2, 2)),
        (2, (20, 18), (6, 9, 3, 3), (0, 0), (1, 1)),
        (2, (9, 16), (6, 9, 7, 7), (3, 3), (1, 1)),
        (2, (8, 32), (6, 9, 1, 1), (1, 1), (1, 1)),
        (2, (8, 30), (6, 9, 1, 1), (9, 9), (1, 1)),
        (2, (8, 30), (6, 9, 1, 1), (1, 1), (1, 1)),
        (5, (7, 7), (6, 9, 1, 1), (0, 0), (1, 1)),
        (1, (100, 48), (40, 70, 3, 3), (1, 1), (1, 1)),
    ],
)
def test_stride_one(batch, size, shape, padding, dilation, dtype):
    """Maps whose rows fill vectors, alone or side by side, in one group of rows or several."""
    pattern = SparsityPattern.random(shape, 0.2)
    x = torch.randn(batch, shape[1], *size, dtype=dtype)
    weight = torch.randn(pattern.packed_shape, dtype=dtype)
    got = results(kernel, x, weight, None, pattern, (1, 1), padding, dilation, rounded_to=dtype)
    expected = results(
        masked_conv2d_reference, x.double(), weight.double(), None, pattern, (1, 1), padding, dilation, rounded_to=dtype
    )
    for one, other, terms in zip(got, expected, (pattern.nnz, pattern.nnz, got[0].numel()), strict=True):
        assert_near(one, other, terms // shape[0] + 1)


@needs_kernel
@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_one_tap(seed, dtype):
    """Pieces of planes, one, several, too few to fill a register tile, with and without a rest; with strides too."""
    r = random.Random(seed)
    whole = [(32, 32), (16, 16), (8, 8), (4, 4), (4, 2), (3, 16), (13, 8), (56, 56), (5, 40)]
    size = r.choice([*whole, (7, 7), (14, 14), (28, 28), (9, 13), (57, 55), (17, 1), (3, 5)])
    batch, groups, block = (
        r.choice([1, 2, 5, 9]),
        r.choice([1, 1, 3]),
        r.choice([(1, 1), (1, 1), (4, 1), (2, 2), (4, 4), (8, 8)]),
    )
    shape = (groups * block[0] * r.randint(1, 9), block[1] * r.randint(1, 40), 1, 1)
    pattern = SparsityPattern.random(shape, r.choice([0.02, 0.3, 1.0]), block=block)
    x = torch.randn(2 * batch, shape[1] * groups + 1, *size, dtype=dtype)[::2, 1:]
    weight = torch.randn(pattern.packed_shape, dtype=dtype)
    bias = torch.randn(shape[0], dtype=dtype) if r.random() < 0.5 else None
    arguments = (r.choice([(1, 1), (1, 1), (2, 2), (1, 3), (3, 2)]), (0, 0), (r.randint(1, 2), 1), groups)
    got = results(kernel, x, weight, bias, pattern, *arguments, rounded_to=dtype)
    exact = [t if t is None else t.double() for t in (x, weight, bias)]
    expected = results(masked_conv2d_reference, *exact, pattern, *arguments, rounded_to=dtype)
    assert torch.equal(kernel(x, weight, pattern, bias, *arguments), got[0])  # of the slice itself
    positions = batch * size[0] * size[1]
    # The same, and all gradients, of input and grad_output that lie otherwise.
    grad = torch.randn(got[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7)).to(dtype)
    index = (*pattern_tensors(pattern), pattern.shape, pattern.block)
    for layout in LAYOUTS.values():
        assert_near(kernel(layout(x), weight, pattern, bias, *arguments), expected[0], shape[1])
        other = torch.ops.uasparse.masked_conv2d_backward(
            layout(grad), layout(x), weight, *index, *arguments, [True, True, True]
        )
        for one, two, terms in zip(other, expected[1:], [shape[0], positions, positions], strict=False):
            assert_near(one, two, terms)
    for one, other, terms in zip(got, expected, [shape[1], shape[0], positions, positions], strict=False):
        assert_near(one, other, terms)


@needs_kernel
@pytest.mark.parametrize("batch", [1, 2, 3, 8, 17])
@pytest.mark.parametrize("height,width", [(7, 7), (14, 9), (29, 5), (3, 40), (31, 23)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_images(batch, height, width, dtype):
    """Fewer images than lanes are cut into strips of rows: kernels, strides, paddings whose rows end otherwise."""
    for kernel_size, stride, padding in ((3, 2, 1), (3, 1, 0), (5, 2, 2), (3, 3, 3), (1, 2, 1)):
        if min(height, width) + 2 * padding < kernel_size:
            continue
        pattern = SparsityPattern.random((6, 5, kernel_size, kernel_size), 0.3)
        x, weight = torch.randn(batch, 5, height, width, dtype=dtype), torch.randn(pattern.packed_shape, dtype=dtype)
        arguments = (pattern, (stride, stride), (padding, padding))
        for layout in (torch.contiguous_format, torch.channels_last):
            x = x.to(memory_format=layout)
            bias = torch.randn(6, dtype=dtype)
            got = results(kernel, x, weight, bias, *arguments, rounded_to=dtype)
            exact = [t.double() for t in (x, weight, bias)]
            expected = results(masked_conv2d_reference, *exact, *arguments, rounded_to=dtype)
            for one, other in zip(got, expected, strict=True):
                assert_near(one, other, batch * height * width)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("nonzeros", [1, 2, 3, 9, 12, 13])
def test_what_is_no_number_stays_where_it_is(nonzeros, dtype):
    """Lists of even and odd lengths: what is multiplied together must not mix images, positions or channels."""
    pattern = SparsityPattern.random(
        (5, 7, 3, 3), nonzeros / (7 * 9), generator=torch.Generator().manual_seed(nonzeros)
    )
    x = torch.randn(40, 7, 9, 35)
    weight = torch.randn(pattern.packed_shape)
    for value, image, channel, row, column in ((torch.inf, 17, 2, 4, 33), (torch.nan, 39, 6, 0, 0)):
        x[image, channel, row, column] = value
    x, weight = x.to(dtype), weight.to(dtype)
    got = kernel(x, weight, pattern, None, (1, 1), (1, 1))
    expected = masked_conv2d_reference(torch.nan_to_num(x.double(), 0, 0, 0), weight.double(), pattern, None, 1, 1)
    touched = masked_conv2d_reference(
        (~x.isfinite()).double(), pattern.pack(pattern.to_mask().double()), pattern, None, 1, 1
    )
    assert bool((got.isfinite() == (touched == 0)).all())
    assert_near(got[touched == 0], expected[touched == 0], nonzeros)


@needs_kernel
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("size,stride", [(3, 1), (1, 1), (1, 2)])
@pytest.mark.parametrize("trained", [True, False])
def test_memory_format_follows_the_input(format, size, stride, trained):
    pattern = SparsityPattern.random((8, 6, size, size), 0.3)
    x = torch.randn(4, 6, 8, 8).to(memory_format=format).requires_grad_() * 1  # autograd gives leaves their own format
    output = kernel(x, torch.randn(pattern.packed_shape, requires_grad=trained), pattern, stride=(stride, stride))
    (grad,) = torch.autograd.grad(output.square().sum(), x)
    assert output.is_contiguous(memory_format=format)
    assert grad.is_contiguous(memory_format=format)


@needs_kernel
@pytest.mark.parametrize("batch,height,width", [(0, 5, 5), (1, 1, 1), (17, 1, 3), (3, 4, 1)])
@pytest.mark.parametrize("density", ["empty", "full"])
def test_edge_sizes(batch, height, width, density):
    mask = torch.full((3, 2, 1, 1), density == "full")
    pattern = SparsityPattern.from_mask(mask)
    x = torch.randn(batch, 2, height, width, dtype=torch.float64)
    weight = pattern.pack(torch.randn(3, 2, 1, 1, dtype=torch.float64))
    bias = torch.randn(3, dtype=torch.float64)
    got = results(kernel, x, weight, bias, pattern)
    expected = results(masked_conv2d_reference, x, weight, bias, pattern)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size,stride", [(3, 1), (1, 1), (1, 2)])
def test_gradients_that_are_not_asked_for(size, stride, dtype):
    pattern = SparsityPattern.random((4, 3, size, size), 0.5)
    x, weight, bias = torch.randn(5, 3, 13, 14), torch.randn(pattern.packed_shape), torch.randn(4)
    x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    full = results(kernel, x, weight, bias, pattern, (stride, stride))
    for wanted in range(3):
        leaves = [t.clone().requires_grad_(i == wanted) for i, t in enumerate((x, weight, bias))]
        output = kernel(leaves[0], leaves[1], pattern, leaves[2], (stride, stride))
        grad = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7)).to(dtype)
        output.backward(grad)
        assert torch.equal(leaves[wanted].grad, full[1 + wanted])
        assert all(t.grad is None for i, t in enumerate(leaves) if i != wanted)


@needs_kernel
@pytest.mark.parametrize("seed", range(6))
def test_gradcheck(seed):
    generator = torch.Generator().manual_seed(seed)
    block, groups = [((1, 1), 1), ((2, 1), 1), ((2, 2), 1), ((1, 1), 2), ((2, 1), 2), ((2, 2), 2)][seed]
    pattern = SparsityPattern.random((4, 2, 2, 3), 0.5, block=block, generator=generator)
    x = torch.randn(2, 2 * groups, 4, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = pattern.pack(torch.randn(pattern.shape, dtype=torch.float64, generator=generator)).requires_grad_()
    bias = torch.randn(4, dtype=torch.float64, generator=generator, requires_grad=True)
    stride = (1 + seed % 2, 1)
    assert torch.autograd.gradcheck(
        lambda x, w, b: kernel(x, w, pattern, b, stride, (1, 0), (1, 2), groups), (x, weight, bias)
    )


@needs_kernel
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_opcheck(packed, format):
    pattern = SparsityPattern.random((4, 3, 3, 3), 0.4)
    weight = torch.randn(pattern.packed_shape) if packed else pattern.unpack(torch.randn(pattern.packed_shape))
    x = torch.randn(2, 3, 6, 7).to(memory_format=format).requires_grad_()
    arguments = (
        x, weight.requires_grad_(), torch.randn(4, requires_grad=True), *pattern_tensors(pattern), pattern.shape,
        pattern.block, (2, 1), (1, 1), (1, 1), 1,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.uasparse.masked_conv2d.default, arguments)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "batch,map_size,size,stride",
    [
        (70, 12, 3, 1),
        (70, 12, 1, 1),
        (3, 12, 1, 1),
        (3, 12, 3, 2),
        (3, 12, 1, 2),
        (2, 40, 3, 1),
        (9, 31, 3, 2),
        (9, 7, 1, 1),
    ],
)
def test_threads_do_not_change_results(dtype, batch, map_size, size, stride):
    threads = torch.get_num_threads()
    pattern = SparsityPattern.random((24, 10, size, size), 0.2)
    x, weight = torch.randn(batch, 10, map_size, map_size).to(dtype), torch.randn(pattern.packed_shape).to(dtype)
    bias = torch.randn(24).to(dtype)
    try:
        torch.set_num_threads(1)
        padding = (size // 2, size // 2)
        expected = results(kernel, x, weight, bias, pattern, (stride, stride), padding)
        for count in (1, 2, 3, 8, 40):
            torch.set_num_threads(count)
            got = results(kernel, x, weight, bias, pattern, (stride, stride), padding)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), f"{count} threads"
    finally:
        torch.set_num_threads(threads)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_lists_follow_the_pattern(dtype):
    """Lists are kept with a pattern: other maps, the other storage and a pattern changed in place have their own."""
    shape = (6, 50, 3, 3)
    pattern = SparsityPattern.random(shape, 0.2)
    for _ in range(2):
        for size, padding, packed in [((9, 16), 1, True), ((9, 16), 1, False), ((9, 16), 0, True), ((30, 20), 1, True)]:
            x, values = torch.randn(3, shape[1], *size, dtype=dtype), torch.randn(pattern.packed_shape, dtype=dtype)
            arguments = pattern, (1, 1), (padding, padding)
            weight = values if packed else pattern.unpack(values)
            expected = results(masked_conv2d_reference, x.double(), weight.double(), None, *arguments, rounded_to=dtype)
            for _ in range(2):
                got = results(kernel, x, weight, None, *arguments, rounded_to=dtype)
                for one, other in zip(got, expected, strict=True):
                    assert_near(one, other, x.numel())
        pattern.assign_(SparsityPattern.random(shape, 0.2))


@needs_kernel
def test_packed_equals_dense_stored():
    pattern = SparsityPattern.random((16, 8, 3, 3), 0.2)
    x, weight = torch.randn(9, 8, 10, 10), torch.randn(pattern.packed_shape)
    packed = results(kernel, x, weight, None, pattern)
    dense = results(kernel, x, pattern.unpack(weight), None, pattern)
    assert torch.equal(packed[0], dense[0])
    assert torch.equal(packed[1], dense[1])
    assert torch.equal(pattern.unpack(packed[2]), dense[2])


@needs_kernel
def test_workspaces_can_be_freed():
    pattern = SparsityPattern.random((16, 8, 3, 3), 0.2)
    x, weight = torch.randn(9, 8, 10, 10), torch.randn(pattern.packed_shape)
    expected = kernel(x, weight, pattern)
    torch.ops.uasparse.free_workspaces()
    assert torch.equal(kernel(x, weight, pattern), expected)


def test_bad_input():
    pattern = SparsityPattern.random((4, 3, 3, 3), 0.5)
    x, weight = torch.randn(2, 3, 8, 8), torch.randn(pattern.packed_shape)
    cases = [
        (ValueError, "expected an input", (torch.randn(2, 4, 8, 8), weight, pattern), {}),
        (ValueError, "expected an input", (torch.randn(4, 8, 8), weight, pattern), {}),
        (ValueError, "Expected a weight of shape", (x, weight[:-1], pattern), {}),
        (ValueError, "expected a bias of shape", (x, weight, pattern, torch.randn(5)), {}),
        (TypeError, "one dtype", (x, weight.double(), pattern), {}),
        (ValueError, "larger than the padded input", (torch.randn(2, 3, 2, 8), weight, pattern), {}),
        (ValueError, "stride and dilation", (x, weight, pattern), {"stride": 0}),
        (ValueError, "groups", (x, weight, pattern), {"groups": 3}),
        (ValueError, "pattern of shape", (x, weight, SparsityPattern.random((4, 3), 0.5)), {}),
    ]
    for error, words, arguments, keywords in cases:
        with pytest.raises(error, match=words):
            masked_conv2d(*arguments, **keywords)


def test_what_no_kernel_covers_is_dense():
    pattern = SparsityPattern.random((4, 3, 3, 3), 0.5)
    if _library.has_kernel_for("masked_conv2d", "cpu"):
        choice = choose((8, 3, 8, 8), torch.float16, "cpu", pattern, packed=True)
        assert choice.kernel == "dense"
        assert "float16" in choice.reason
    x, weight = torch.randn(2, 3, 8, 8).half(), torch.randn(pattern.packed_shape).half()
    expected = masked_conv2d_reference(x.double(), weight.double(), pattern)
    assert_near(masked_conv2d(x, weight, pattern), expected, 27)
