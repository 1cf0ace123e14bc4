"""Unstructured weights on CUDA devices against float64: the ops around the kernels of csrc/cuda/masked_linear.cu.

On "cpu" the two products are stood in for by eager torch, so that all around them runs without a GPU
(test_cuda_emulation.py executes the kernels themselves).
"""

from __future__ import annotations

import importlib

import pytest
import torch
from triton_support import ROUNDOFF, assert_close, poison  # noqa: F401

from uasparse_kernels import SparsityPattern, ops
from uasparse_kernels.ops import _common
from uasparse_kernels.ops._common import pattern_tensors

kernels = importlib.import_module("uasparse_kernels.triton.masked_linear")
conv_kernels = importlib.import_module("uasparse_kernels.triton.masked_conv2d")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = [
    pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]),
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(not hasattr(torch.ops.uasparse, "sparse_product_out"), reason="needs the compiled ops"),
]


@pytest.fixture(autouse=True)
def _stand_in(device):
    if device == "cuda":
        yield
        return

    def coordinates(offsets, index):
        rows = torch.arange(offsets.numel() - 1).repeat_interleave(offsets[1:] - offsets[:-1])
        return rows, index.long()

    def product_out(x, values, bias, offsets, index, out):
        rows, columns = coordinates(offsets, index)
        y = torch.zeros(out.shape, dtype=torch.float64).index_add_(1, rows, x.double()[:, columns] * values.double())
        out.copy_(y if bias is None else y + bias.double())

    def sampled_product(dy, x, offsets, index):
        rows, columns = coordinates(offsets, index)
        return (dy.double()[:, rows] * x.double()[:, columns]).sum(0).to(x.dtype)

    library = torch.library.Library("uasparse", "IMPL")
    library.impl("sparse_product_out", product_out, "CPU")
    library.impl("sparse_sampled_product", sampled_product, "CPU")
    yield
    library._destroy()


def _pattern(shape, density, device):
    """With a full row, an empty one, and a column that every row has."""
    mask = torch.rand(shape) < density
    mask[:, shape[1] // 3] = True
    mask[shape[0] // 2] = True
    mask[shape[0] // 3] = False
    return SparsityPattern.from_mask(mask).to(device)


def _run(pattern, input, weight, bias, dy, mask=(True, True, True)):
    arguments = (*pattern_tensors(pattern), pattern.shape, pattern.block)
    output = kernels.masked_linear(input, weight, bias, *arguments)
    return output, *kernels.masked_linear_backward(dy, input, weight, *arguments, list(mask))


def _check(pattern, batch, dtype, device):
    out, inp = pattern.shape
    input, dy = torch.randn(*batch, inp).to(dtype).to(device), torch.randn(*batch, out).to(dtype).to(device)
    weight, bias = torch.randn(pattern.nnz).to(dtype).to(device), torch.randn(out).to(dtype).to(device)
    got = _run(pattern, input, weight, bias, dy)
    flat = torch.Size((input.numel() // inp,))

    def exact(x, w, b, g):
        dense, x2, g2 = pattern.to_mask().double(), x.reshape(*flat, inp), g.reshape(*flat, out)
        dense.view(-1)[pattern.indices()] = w
        return x @ dense.T + b, g @ dense, (g2.T @ x2).reshape(-1)[pattern.indices()], g2.sum(0)

    leaves = [t.double() for t in (input, weight, bias, dy)]
    want, size = exact(*leaves), exact(*(t.abs() for t in leaves))
    terms = {"output": inp, "input": out, "weight": flat[0], "bias": flat[0]}
    for (name, n), g, w, s in zip(terms.items(), got, want, size, strict=True):
        assert g.dtype == dtype
        assert_close(name, g, w, s, n)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 3), (61, 77), (300, 130), (77, 1023), (1030, 515)], ids=str)
def test_matches_float64(shape, dtype, device):
    _check(_pattern(shape, 0.1, device), (197,), dtype, device)


@pytest.mark.parametrize("batch", [(1,), (2,), (16,), (17,), (32,), (65,), (129,), (2, 3, 7), (3000,)], ids=str)
def test_batch_sizes(batch, device):
    _check(_pattern((45, 70), 0.2, device), batch, torch.float32, device)


@pytest.mark.parametrize("density", [0.0, 0.002, 0.5, 1.0])
def test_densities(density, device):
    _check(_pattern((270, 140), density, device), (140,), torch.bfloat16, device)


def test_no_active_weight(device):
    pattern = SparsityPattern.from_mask(torch.zeros(6, 5)).to(device)
    for tokens in (4, 40):
        x, dy = torch.randn(tokens, 5, device=device), torch.randn(tokens, 6, device=device)
        output, grad_input, grad_weight, _ = _run(pattern, x, torch.empty(0, device=device), None, dy)
        assert not output.any() and not grad_input.any() and grad_weight.shape == (0,)


def test_empty_batch(device):
    pattern = _pattern((9, 7), 0.3, device)
    x, dy = torch.randn(4, 0, 7, device=device), torch.randn(4, 0, 9, device=device)
    output, *grads = _run(pattern, x, torch.randn(pattern.nnz, device=device), None, dy)
    assert output.shape == (4, 0, 9) and grads[0].shape == (4, 0, 7) and not grads[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_offsets_and_masks(dtype, device):
    """Sliced, transposed and expanded inputs, and weights that begin anywhere in their storage."""
    pattern = _pattern((21, 48), 0.3, device)
    wide = torch.randn(41, 101, device=device, dtype=dtype)
    weight = torch.randn(pattern.nnz + 1, device=device, dtype=dtype)[1:]
    dy = torch.randn(41, 21, device=device, dtype=dtype)
    for input in (wide[:, 3:51], wide[:, 4:52], wide.t()[:48].contiguous().t(), wide[:1, :48].expand(41, 48)):
        got = _run(pattern, input, weight, None, dy)
        want = _run(pattern, input.clone(), weight.clone(), None, dy)
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    for i in range(3):
        alone = _run(pattern, input, weight, None, dy, [j == i for j in range(3)])[1:]
        assert torch.equal(alone[i], got[1 + i])
        assert all(alone[j].numel() == 0 for j in range(3) if j != i)


def test_infinite_inputs_stay_in_their_columns(device):
    mask = torch.ones(5, 40)
    mask[:3, 7] = 0
    pattern = SparsityPattern.from_mask(mask).to(device)
    for tokens in (6, 66):
        input = torch.randn(tokens, 40, device=device)
        input[:, 7] = torch.inf
        dy, weight = torch.randn(tokens, 5, device=device), torch.rand(pattern.nnz, device=device) + 1
        output = _run(pattern, input, weight, None, dy)[0]
        assert output[:, :3].isfinite().all() and output[:, 3:].isinf().all()


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_convolution_by_1x1(format, device):
    pattern = SparsityPattern.random((24, 30, 1, 1), 0.2).to(device)
    x = torch.randn(3, 30, 5, 7, device=device).to(memory_format=format)
    weight, bias = torch.randn(pattern.nnz, device=device), torch.randn(24, device=device)
    dy = torch.randn(3, 24, 5, 7, device=device).to(memory_format=format)
    arguments = (*pattern_tensors(pattern), pattern.shape, pattern.block, [1, 1], [0, 0], [1, 1], 1)
    got = (
        conv_kernels.masked_conv2d(x, weight, bias, *arguments),
        *conv_kernels.masked_conv2d_backward(dy, x, weight, *arguments, [True] * 3),
    )
    leaves = [t.double().detach().requires_grad_() for t in (x, weight, bias)]
    want = ops.masked_conv2d_reference(leaves[0], leaves[1], pattern, leaves[2])
    want.backward(dy.double())
    for g, w in zip(got, (want, *(leaf.grad for leaf in leaves)), strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="1x1 kernel without stride"):
        conv_kernels.masked_conv2d(x, weight, bias, *arguments[:7], [2, 2], *arguments[8:])


def test_bad_arguments_are_errors(device):
    pattern = _pattern((9, 7), 0.3, device)
    x, dy, weight = (torch.randn(n, device=device) for n in ((4, 7), (4, 9), (pattern.nnz,)))
    with pytest.raises(ValueError, match=r"an input \[..., 7\]"):
        _run(pattern, x[:, :5], weight, None, dy)
    with pytest.raises(ValueError, match="packed"):
        _run(pattern, x, weight[1:], None, dy)
    with pytest.raises(TypeError, match="float32, bfloat16"):
        _run(pattern, x.double(), weight.double(), None, dy)


class TestOnGpu:
    """Through the public function, which takes the ops that are registered for CUDA."""

    @pytest.mark.parametrize("packed", [True, False])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_public_function(self, dtype, packed, device):
        if device == "cpu":
            pytest.skip("the ops are registered for CUDA")
        pattern = _pattern((520, 390), 0.05, device)
        weight = torch.randn(pattern.nnz, device=device, dtype=dtype)
        weight = (weight if packed else pattern.unpack(weight)).requires_grad_()
        input = torch.randn(300, 390, device=device, dtype=dtype, requires_grad=True)
        dy = torch.randn(300, 520, device=device, dtype=dtype)
        with _common.forced("cuda"):
            output = ops.masked_linear(input, weight, pattern)
        output.backward(dy)
        dense = (pattern.unpack(weight.detach()) if packed else weight.detach()).double()
        grad = dy.double().T @ input.detach().double()
        grad = pattern.pack(grad) if packed else grad * pattern.to_mask()
        for got, want in ((output, input.double() @ dense.T), (input.grad, dy.double() @ dense), (weight.grad, grad)):
            assert float((got.double() - want).norm() / want.norm()) < 8 * max(ROUNDOFF[dtype], 2**-20)

    def test_same_bits_in_every_run_and_in_a_cuda_graph(self, device):
        if device == "cpu":
            pytest.skip("needs CUDA graphs")
        pattern = _pattern((600, 300), 0.1, device)
        weight = torch.randn(pattern.nnz, device=device)
        input, dy = torch.randn(2000, 300, device=device), torch.randn(2000, 600, device=device)
        first = _run(pattern, input, weight, None, dy)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = _run(pattern, input, weight, None, dy)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, first, strict=True))
        # The pattern may change in place under a graph.
        with torch.no_grad():
            pattern.assign_(SparsityPattern.from_blocks(pattern.shape, _other_blocks(pattern)).to(device))
        graph.replay()
        again = _run(pattern, input, weight, None, dy)
        assert all(torch.equal(a, b) for a, b in zip(captured, again, strict=True))


def _other_blocks(pattern):
    total = pattern.shape[0] * pattern.shape[1]
    return torch.randperm(total)[: pattern.nnz].sort().values
