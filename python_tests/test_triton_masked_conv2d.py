"""The Triton kernels of masked_conv2d against float64: forward, all gradients, geometries, every tile."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from triton_support import DEVICES, assert_close, poison  # noqa: F401

from uasparse_kernels import SparsityPattern, ops
from uasparse_kernels.ops._common import pattern_tensors
from uasparse_kernels.triton import _launch, settings
from uasparse_kernels.triton import masked_conv2d as kernels

pytestmark = [pytest.mark.parametrize("device", DEVICES), pytest.mark.usefixtures("poison")]
GEOMETRIES = [
    # kernel, stride, padding, dilation
    ((3, 3), (1, 1), (1, 1), (1, 1)),
    ((3, 3), (2, 2), (1, 1), (1, 1)),
    ((1, 1), (1, 1), (0, 0), (1, 1)),
    ((1, 1), (2, 2), (0, 0), (1, 1)),
    ((1, 1), (1, 1), (1, 2), (1, 1)),
    ((3, 2), (2, 1), (0, 2), (1, 2)),
    ((2, 3), (1, 3), (2, 1), (3, 1)),
    ((3, 3), (3, 2), (4, 0), (2, 2)),
]


def _pattern(out, inp, kernel, block, device, density=0.4):
    shape = (out * block, inp * block, *kernel)
    return SparsityPattern.random(shape, density, block=(block, block)).to(device)


def _problem(pattern, size, geometry, dtype, device, memory_format=torch.channels_last):
    images, height, width = size
    input = torch.randn(images, pattern.shape[1], height, width).to(dtype).to(device, memory_format=memory_format)
    weight = torch.randn(pattern.packed_shape).to(dtype).to(device)
    bias = torch.randn(pattern.shape[0]).to(dtype).to(device)
    spatial = [
        (s + 2 * p - d * (k - 1) - 1) // t + 1
        for s, k, t, p, d in zip((height, width), pattern.shape[2:], *geometry, strict=True)
    ]
    dy = torch.randn(images, pattern.shape[0], *spatial).to(dtype).to(device, memory_format=memory_format)
    return input, weight, bias, dy


def _run(pattern, input, weight, bias, dy, geometry, mask=(True, True, True)):
    arguments = (*pattern_tensors(pattern), pattern.shape, pattern.block, *geometry, 1)
    output = kernels.masked_conv2d(input, weight, bias, *arguments)
    return output, *kernels.masked_conv2d_backward(dy, input, weight, *arguments, list(mask))


def _exact(pattern, input, weight, bias, dy, geometry):
    input, dense, bias = (t.contiguous().requires_grad_() for t in (input, pattern.unpack(weight), bias))
    with torch.backends.mkldnn.flags(enabled=False):
        output = F.conv2d(input, dense, bias, *geometry)
        grads = torch.autograd.grad(output, (input, dense, bias), dy.contiguous())
    return output.detach(), grads[0], pattern.pack(grads[1]), grads[2]


def _check(pattern, size, geometry, dtype, device, *, memory_format=torch.channels_last, precision="ieee"):
    problem = _problem(pattern, size, geometry, dtype, device, memory_format)
    got = _run(pattern, *problem, geometry)
    wide = [t.double() for t in problem]
    want, sizes = _exact(pattern, *wide, geometry), _exact(pattern, *(t.abs() for t in wide), geometry)
    positions, pixels = pattern.shape[2] * pattern.shape[3], problem[3].numel() // pattern.shape[0]
    terms = {"output": pattern.shape[1] * positions, "input": pattern.shape[0] * positions, "weight": pixels}
    terms["bias"] = pixels
    for (name, n), g, w, s in zip(terms.items(), got, want, sizes, strict=True):
        assert g.dtype == dtype
        assert_close(name, g, w, s, n, precision if name != "bias" else "ieee")
    assert got[0].is_contiguous(memory_format=memory_format) and got[1].is_contiguous(memory_format=memory_format)
    return got


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_geometries(geometry, device):
    kernel, *rest = geometry
    _check(_pattern(2, 3, kernel, 16, device), (2, 7, 9), rest, torch.float32, device)
    _check(_pattern(2, 1, kernel, 16, device, 0.9), (1, 10, 6), rest, torch.float32, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_matches_float64(block, dtype, device):
    rows = 1 if block == 128 else 2
    _check(_pattern(rows, 2, (3, 3), block, device), (2, 5, 7), ((1, 1), (1, 1), (1, 1)), dtype, device)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("block", [16, 64, 128])
def test_every_tile(block, stride, device, monkeypatch):
    """Each config of the sets."""
    pattern = _pattern(1 if block == 128 else 2, 1, (3, 3), block, device, 0.4)
    dtype = torch.bfloat16
    product = kernels.product_configs(block, dtype.itemsize, "ieee")
    sampled = kernels.sampled_configs(block, dtype.itemsize, "ieee")
    for i in range(max(len(product), len(sampled))):
        monkeypatch.setattr(kernels, "product_configs", lambda *_, i=i: [product[i % len(product)]])
        monkeypatch.setattr(kernels, "sampled_configs", lambda *_, i=i: [sampled[i % len(sampled)]])
        size = (1, 17 * stride, 17 * stride) if i == 0 else (1, 12 * stride, 12 * stride)
        _check(pattern, size, ((stride, stride), (1, 1), (1, 1)), dtype, device)


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)], ids=str)
def test_contiguous_images(kernel, device):
    """Come back contiguous, as torch's own convolution gives them."""
    pattern = _pattern(2, 2, kernel, 16, device)
    geometry = ((1, 1), (0, 0), (1, 1))
    _check(pattern, (2, 5, 6), geometry, torch.float32, device, memory_format=torch.contiguous_format)


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)], ids=str)
def test_output_mask_and_strides(kernel, device):
    pattern = _pattern(2, 2, kernel, 16, device)
    geometry = ((1, 1), (1, 1), (1, 1)) if kernel == (3, 3) else ((1, 1), (0, 0), (1, 1))
    input, weight, bias, dy = _problem(pattern, (2, 6, 5), geometry, torch.float32, device)
    got = _run(pattern, input, weight, bias, dy, geometry)
    sliced = torch.randn(2, 70, 6, 5, device=device).to(memory_format=torch.channels_last)[:, 3:35].copy_(input)
    other = _run(pattern, sliced, weight, bias, dy.contiguous(), geometry)
    assert all(torch.equal(a, b) for a, b in zip(got, other, strict=True))
    for i in range(3):
        alone = _run(pattern, input, weight, bias, dy, geometry, [j == i for j in range(3)])[1:]
        assert torch.equal(alone[i], got[1 + i])
        assert all(alone[j].numel() == 0 for j in range(3) if j != i)


def test_split_sums_repeat(device, monkeypatch):
    pattern = _pattern(1, 1, (3, 3), 16, device, 0.4)
    geometry = ((1, 1), (1, 1), (1, 1))
    for parts in (1, 3):
        monkeypatch.setattr(_launch, "splits", lambda *_, parts=parts: parts)
        results = []
        for _ in range(2):
            torch.manual_seed(2)
            results.append(_check(pattern, (3, 11, 13), geometry, torch.float32, device))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_empty(device):
    """No images; no active blocks."""
    geometry = ((1, 1), (1, 1), (1, 1))
    pattern = _pattern(2, 2, (3, 3), 16, device)
    got = _run(pattern, *_problem(pattern, (0, 5, 6), geometry, torch.float32, device), geometry)
    assert got[0].shape == (0, 32, 5, 6) and not got[2].any() and not got[3].any()
    nothing = torch.empty(0, dtype=torch.int64)
    pattern = SparsityPattern.from_blocks((32, 32, 3, 3), nothing, block=(16, 16)).to(device)
    problem = _problem(pattern, (1, 5, 6), geometry, torch.float32, device)
    output, grad_input, _, _ = _run(pattern, *problem, geometry)
    assert torch.equal(output, problem[2][None, :, None, None].expand_as(output)) and not grad_input.any()


def test_bad_arguments_are_errors(device):
    geometry = ((1, 1), (1, 1), (1, 1))
    pattern = _pattern(2, 2, (3, 3), 16, device)
    input, weight, bias, dy = _problem(pattern, (1, 5, 6), geometry, torch.float32, device)
    with pytest.raises(ValueError, match=r"an input \[N, 32"):
        _run(pattern, input[:, :16], weight, bias, dy, geometry)
    with pytest.raises(ValueError, match="grad_output"):
        _run(pattern, input, weight, bias, dy[..., :-1], geometry)
    with pytest.raises(ValueError, match="groups"):
        arguments = (*pattern_tensors(pattern), pattern.shape, pattern.block, *geometry, 2)
        kernels.masked_conv2d(input, weight, bias, *arguments)


@pytest.mark.parametrize("precision", ["tf32", "tf32x3", "ieee"])
@pytest.mark.parametrize("stride", [1, 2])
def test_precisions(stride, precision, device, monkeypatch):
    monkeypatch.setattr(settings, "float32_precision", precision)
    geometry = ((stride, stride), (1, 1), (1, 1))
    _check(_pattern(2, 1, (3, 3), 32, device), (2, 8, 9), geometry, torch.float32, device, precision=precision)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_public_function(dtype, packed, device):
    if device == "cpu":
        pytest.skip("the ops are registered for CUDA")
    pattern = _pattern(4, 4, (3, 3), 64, device, 0.1)
    weight = torch.randn(pattern.packed_shape, device=device, dtype=dtype)
    weight = (weight if packed else pattern.unpack(weight)).requires_grad_()
    input = torch.randn(8, 256, 14, 14, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    input.requires_grad_()
    output = ops.masked_conv2d(input, weight, pattern, padding=1)
    dy = torch.randn_like(output)
    output.backward(dy)
    leaves = [t.detach().double().requires_grad_() for t in (input, weight)]
    want = F.conv2d(leaves[0], pattern.unpack(leaves[1]) if packed else leaves[1] * pattern.to_mask(), padding=1)
    want.backward(dy.double())
    for got, exact in ((output, want), (input.grad, leaves[0].grad), (weight.grad, leaves[1].grad)):
        assert float((got.double() - exact).norm() / exact.norm()) < 8 * 2.0**-9
    assert packed or not weight.grad[~pattern.to_mask()].any()
