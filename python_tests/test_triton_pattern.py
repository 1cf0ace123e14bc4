"""The Triton kernels of pack, unpack and keep_active_ against plain indexing."""

from __future__ import annotations

import pytest
import torch
from triton_support import DEVICES, INTERPRETED, poison  # noqa: F401

from uasparse_kernels import SparsityPattern, ops
from uasparse_kernels.triton import pattern as kernels

pytestmark = [pytest.mark.parametrize("device", DEVICES), pytest.mark.usefixtures("poison")]
SHAPES = [
    ((37, 29), (1, 1)),
    ((3, 2500), (1, 1)),
    ((40, 21), (4, 1)),
    ((15, 25), (5, 5)),
    ((48, 64), (16, 16)),
    ((14, 6, 3, 3), (1, 1)),
    ((8, 10, 2, 3), (4, 1)),
    ((8, 12, 3, 2), (4, 4)),
    ((32, 48, 3, 3), (16, 16)),
    ((32, 16, 1, 1), (16, 16)),
]
LAYOUTS = ["contiguous", "channels_last", "transposed", "sliced"]


def _pattern(shape, block, device, density=0.3):
    return SparsityPattern.random(shape, density, block=block).to(device)


def _dense(shape, dtype, device, layout):
    dense = torch.randn(shape, device=device)
    dense = (dense > 0 if dtype == torch.bool else dense * 100).to(dtype)
    if layout == "channels_last" and len(shape) == 4:
        return dense.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return dense.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "sliced":
        wide = torch.zeros(*shape[:-1], shape[-1] + 3, dtype=dtype, device=device)
        wide[..., 1:-2] = dense
        return wide[..., 1:-2]
    return dense


def _mask(pattern):
    mask = torch.zeros(pattern.shape, dtype=torch.bool, device=pattern.device)
    mask.view(-1)[pattern.indices().view(-1)] = True
    return mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.bool, torch.int64], ids=str)
@pytest.mark.parametrize(("shape", "block"), SHAPES, ids=str)
def test_pack_and_unpack(shape, block, dtype, device):
    pattern = _pattern(shape, block, device)
    for layout in LAYOUTS if dtype == torch.float32 else LAYOUTS[:1]:
        dense = _dense(shape, dtype, device, layout)
        values = kernels.pack(dense, pattern.crow, pattern.col, block)
        assert torch.equal(values, dense.reshape(-1)[pattern.indices()])
        back = kernels.unpack(values, pattern.crow, pattern.col, shape, block)
        assert torch.equal(back, torch.where(_mask(pattern), dense, torch.zeros_like(dense)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "block"), SHAPES, ids=str)
def test_keep_active(shape, block, layout, dtype, device):
    pattern = _pattern(shape, block, device)
    dense = _dense(shape, dtype, device, layout)
    want = torch.where(_mask(pattern), dense, torch.zeros_like(dense))
    strides = dense.stride()
    kernels.keep_active_(dense, pattern.crow, pattern.col, block)
    assert torch.equal(dense, want) and dense.stride() == strides


@pytest.mark.parametrize(
    ("shape", "block"), [((2, 2500), (1, 1)), ((6, 2511), (3, 3)), ((16, 2064), (16, 16))], ids=str
)
@pytest.mark.parametrize("density", [0.97, 1.0])
def test_keep_active_in_long_full_rows(density, shape, block, device):
    pattern = _pattern(shape, block, device, density)
    dense = _dense(shape, torch.float32, device, "contiguous")
    want = torch.where(_mask(pattern), dense, torch.zeros_like(dense))
    kernels.keep_active_(dense, pattern.crow, pattern.col, block)
    assert torch.equal(dense, want)


def test_neighbours_of_a_slice_are_left(device):
    wide = torch.ones(6, 30, device=device)
    pattern = _pattern((6, 20), (1, 1), device)
    kernels.keep_active_(wide[:, 3:23], pattern.crow, pattern.col, (1, 1))
    assert wide[:, :3].all() and wide[:, 23:].all()
    assert torch.equal(wide[:, 3:23] != 0, _mask(pattern))


def test_rows_longer_than_a_tile(device):
    """Several rounds, among them one that ends with the row; full rows and empty rows."""
    for active in (0, 1, kernels._TILE - 1, kernels._TILE, kernels._TILE + 1, 2 * kernels._TILE, 2999, 3000):
        mask = torch.zeros(3, 3000, dtype=torch.bool)
        mask[1, torch.randperm(3000)[:active]] = True
        mask[2, 5] = True
        pattern = SparsityPattern.from_mask(mask).to(device)
        dense = torch.randn(3, 3000, device=device)
        want = dense * mask.to(device)
        kernels.keep_active_(dense, pattern.crow, pattern.col, (1, 1))
        assert torch.equal(dense, want)


def test_nothing_active(device):
    pattern = SparsityPattern.from_blocks((8, 8), torch.empty(0, dtype=torch.int64), block=(4, 4)).to(device)
    dense = torch.randn(8, 8, device=device)
    assert kernels.pack(dense, pattern.crow, pattern.col, (4, 4)).shape == (0, 4, 4)
    assert not kernels.unpack(torch.empty(0, 4, 4, device=device), pattern.crow, pattern.col, (8, 8), (4, 4)).any()
    kernels.keep_active_(dense, pattern.crow, pattern.col, (4, 4))
    assert not dense.any()


@pytest.mark.skipif(INTERPRETED, reason="the ops are registered for CUDA")
@pytest.mark.parametrize("packed", [True, False])
def test_unstructured_layer(packed, device):
    """The vendor's kernel on the dense form: outputs and gradients, and the gradient masked in place."""
    pattern = _pattern((300, 200), (1, 1), device)
    values = torch.randn(pattern.packed_shape, device=device)
    weight = (values if packed else pattern.unpack(values)).requires_grad_()
    input = torch.randn(50, 200, device=device)
    output = ops.masked_linear(input, weight, pattern)
    dy = torch.randn_like(output)
    output.backward(dy)
    exact = dy.double().T @ input.double()
    grad = weight.grad if not packed else pattern.unpack(weight.grad)
    assert not grad[~_mask(pattern)].any()
    torch.testing.assert_close(grad, (exact * _mask(pattern)).float(), rtol=1e-4, atol=1e-3)
