"""What kernels are measured against: dense torch in its faster layout and by oneDNN, torch CSR (MKL) and sparselab."""

from __future__ import annotations

import importlib.util
import warnings

import torch
from torch import Tensor, nn

from uasparse_kernels import SparsityPattern
from uasparse_kernels.ops import _dense

HAS_SPARSELAB = importlib.util.find_spec("sparselab") is not None


class TransposedLinear(nn.Module):
    """Dense linear layer that keeps its weight as ``[in, out]``: the other layout for the vendor's matmul."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(in_features, out_features) / in_features**0.5)
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, input: Tensor) -> Tensor:
        return torch.addmm(self.bias, input, self.weight)


class OneDnnLinear(nn.Linear):
    """Dense linear layer by oneDNN, where torch takes MKL for float32, which is half as fast on AMD's AVX-512."""

    def forward(self, input: Tensor) -> Tensor:
        rows = input.reshape(-1, self.in_features)
        return _dense._OneDnn.apply(rows, self.weight, self.bias).view(*input.shape[:-1], self.out_features)


def on_onednn(model: nn.Module) -> nn.Module:
    """The same model, its linear layers by oneDNN."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = OneDnnLinear
    return model


class CsrLinear(nn.Module):
    """Linear layer on torch's CSR tensors: three MKL kernels, both orders of the indices made once."""

    def __init__(self, pattern: SparsityPattern):
        super().__init__()
        self.pattern = pattern
        self.weight = nn.Parameter(torch.randn(pattern.nnz) / pattern.shape[1] ** 0.5)
        self.bias = nn.Parameter(torch.zeros(pattern.shape[0]))

    def forward(self, input: Tensor) -> Tensor:
        return _CsrProduct.apply(input, self.weight, self.pattern) + self.bias


class _CsrProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, pattern):
        ctx.save_for_backward(input, weight)
        ctx.pattern = pattern
        return (_csr(pattern.crow, pattern.col, weight, pattern.shape) @ input.t()).t()

    @staticmethod
    def backward(ctx, grad):
        (input, weight), p = ctx.saved_tensors, ctx.pattern
        grad_input = grad_weight = None
        if ctx.needs_input_grad[0]:
            transposed = _csr(p.ccol, p.row, weight[p.perm], p.shape[::-1])
            grad_input = (transposed @ grad.t()).t()
        if ctx.needs_input_grad[1]:
            zeros = _csr(p.crow, p.col, torch.zeros_like(weight), p.shape)
            grad_weight = torch.sparse.sampled_addmm(zeros, grad.t(), input, beta=0.0).values()
        return grad_input, grad_weight, None


def _csr(crow: Tensor, col: Tensor, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its CSR support a beta
        return torch.sparse_csr_tensor(crow, col, values, shape, check_invariants=False)


def sparselab_linear(in_features: int, out_features: int, sparsity: float) -> nn.Module:
    import sparselab
    from sparselab import ops

    # It caches transposes by the identity of a weight, which a later weight may take over.
    ops._clear_transpose_cache()
    return sparselab.SparseLinear(in_features, out_features, sparsity=sparsity)
