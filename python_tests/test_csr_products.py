"""Unstructured products by torch's CSR kernel: results (on the CPU by its own kernel), and when they are taken."""

import warnings

import pytest
import torch

from uasparse_kernels import SparsityPattern
from uasparse_kernels.ops import _cuda
from uasparse_kernels.ops._common import pattern_tensors
from uasparse_kernels.triton._csr import csr_product

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rows", "columns", "tokens"), [(1, 1, 1), (37, 53, 70), (64, 19, 129), (5, 300, 3)])
def test_products(rows, columns, tokens, device):
    """Forward with and without bias, and grad-input by the transposed weight; into a part of a larger matrix too."""
    g = torch.Generator().manual_seed(rows)
    mask = torch.rand(rows, columns, generator=g) < 0.1
    mask[0], mask[rows // 2 :: 7] = True, False  # a full row, empty ones
    pattern = SparsityPattern.from_mask(mask)
    values, bias = torch.randn(pattern.nnz, generator=g), torch.randn(rows, generator=g)
    x, dy = torch.randn(tokens, columns + 3, generator=g)[:, :columns], torch.randn(tokens, rows, generator=g)
    weight = pattern.unpack(values).double()
    crow, col, ccol, row, perm = (t.to(device) for t in pattern_tensors(pattern))
    on_device = [t.to(device) for t in (values, bias, x, dy)]
    sums = x.double().abs() @ weight.abs().t()
    forward = csr_product(on_device[2], on_device[0], None, crow, col).cpu()
    assert ((forward - x.double() @ weight.t()).abs() <= 1e-5 * sums).all()
    wide = torch.full((tokens, rows + 2), torch.nan, device=device)
    csr_product(on_device[2], on_device[0], on_device[1], crow, col, wide[:, 1 : rows + 1])
    torch.testing.assert_close(wide[:, 1 : rows + 1].cpu(), forward + bias)
    assert wide[:, [0, -1]].isnan().all()
    grad = csr_product(on_device[3], on_device[0][perm.long()], None, ccol, row).cpu()
    assert ((grad - dy.double() @ weight).abs() <= 1e-5 * (dy.double().abs() @ weight.abs())).all()


def test_a_weight_without_entries():
    offsets, index = torch.zeros(6, dtype=torch.int32), torch.empty(0, dtype=torch.int32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = csr_product(torch.randn(9, 7), torch.empty(0), torch.arange(5.0), offsets, index)
    assert torch.equal(y, torch.arange(5.0).expand(9, 5))


def test_when_it_is_taken(monkeypatch):
    """Nowhere unless it was measured; then float32 up to the crossover, many tokens, and no promise of equal runs."""
    assert not _cuda.takes_csr(torch.float32, 0.001, 8192)
    monkeypatch.setattr(_cuda, "crossover", lambda op, arithmetic, block: ({"csr": 0.02}[block], "measured"))
    assert _cuda.takes_csr(torch.float32, 0.02, 8192)
    assert not _cuda.takes_csr(torch.float32, 0.021, 8192)
    assert not _cuda.takes_csr(torch.float32, 0.01, 2047)
    assert not _cuda.takes_csr(torch.bfloat16, 0.01, 8192)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert not _cuda.takes_csr(torch.float32, 0.01, 8192)


def test_the_way_there(monkeypatch):
    """Forward and grad-input of a layer's products go to it, grad-weight does not."""
    masked_linear = pytest.importorskip("uasparse_kernels.triton.masked_linear")
    monkeypatch.setattr(masked_linear, "takes_csr", lambda dtype, density, tokens: (density, tokens) == (1 / 4, 33))
    pattern = SparsityPattern.random((8, 16), 0.25)
    crow, col, ccol, row, perm = pattern_tensors(pattern)
    values, x, dy = torch.randn(pattern.nnz), torch.randn(33, 16), torch.randn(33, 8)
    weight = pattern.unpack(values)
    torch.testing.assert_close(masked_linear.forward(x, values, None, crow, col, 1), x @ weight.t())
    torch.testing.assert_close(masked_linear.input_gradient(dy, values, ccol, row, perm, 1), dy @ weight)
