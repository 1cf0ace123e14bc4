"""Unstructured products by torch's own CSR kernel (cuSPARSE on a GPU), for weights with few entries a row.

Our kernel's panels cost a row about 20 clocks each, which at 99 % sparsity is most of its time; cuSPARSE has none, and
reads a transposed input from the L2 cache. `takes_csr` (uasparse_kernels/ops/_cuda.py) says where it was measured to be
faster.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor


def csr_product(
    x: Tensor, values: Tensor, bias: Tensor | None, offsets: Tensor, index: Tensor, out: Tensor | None = None
) -> Tensor:
    """``x @ W^T + bias``, ``[tokens, rows]``, of ``x [tokens, columns]`` and W ``[rows, columns]`` given by rows
    (``offsets``, ``index``, ``values``); the transposed weight gives grad-input. Written to ``out`` if that is given.

    The kernel wants features by tokens: x is transposed before it, the result after, together with the bias.
    """
    _silence()
    rows, columns = offsets.numel() - 1, x.shape[1]
    out = x.new_empty(x.shape[0], rows) if out is None else out
    weight = torch.sparse_csr_tensor(offsets, index, values, (rows, columns), check_invariants=False)
    product = torch.mm(weight, _transposed(x)).t()
    return out.copy_(product) if bias is None else torch.add(product, bias, out=out)


def _transposed(x: Tensor) -> Tensor:
    if not x.is_cuda:
        return x.t().contiguous()
    from uasparse_kernels.triton.masked_linear import transposed

    return transposed(x)[:, : x.shape[0]]


@functools.cache
def _silence() -> None:
    """torch says once a process that CSR tensors are new; whoever uses this package did not ask for one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        torch.sparse_csr_tensor([0, 0], [], [], (1, 1), check_invariants=False)
