"""Fast dynamic sparse training for PyTorch, with networks that say when an input is of a kind that they never saw."""

from typing import TYPE_CHECKING

from uasparse_kernels import inference, nn, ops, topology, unknowns
from uasparse_kernels._library import free_workspaces, keep_freed_memory
from uasparse_kernels.convert import densify, sparsify
from uasparse_kernels.deltas import add_sparse_deltas
from uasparse_kernels.explain import backend_info, explain, version
from uasparse_kernels.inference import load_optimized, load_sparse, optimize_for_inference, save_sparse
from uasparse_kernels.like import sparsify_like
from uasparse_kernels.nn import (
    SparseConv1d,
    SparseConv2d,
    SparseDelta,
    SparseLinear,
    SparseMultiheadAttention,
    UnknownAwareLoss,
    register_layer,
)
from uasparse_kernels.nn.delta import merge_sparse_deltas
from uasparse_kernels.param_groups import param_groups
from uasparse_kernels.pattern import SparsityPattern
from uasparse_kernels.repack import repack
from uasparse_kernels.summary import summary
from uasparse_kernels.topology import AveragedModel, DynamicSparsity
from uasparse_kernels.tune import tune
from uasparse_kernels.unknown_output import add_unknown_output

__all__ = [
    "AveragedModel",
    "DynamicSparsity",
    "SparseConv1d",
    "SparseConv2d",
    "SparseDelta",
    "SparseLinear",
    "SparseMultiheadAttention",
    "SparsityPattern",
    "UnknownAwareLoss",
    "add_sparse_deltas",
    "add_unknown_output",
    "backend_info",
    "densify",
    "explain",
    "free_workspaces",
    "inference",
    "keep_freed_memory",
    "load_optimized",
    "load_sparse",
    "merge_sparse_deltas",
    "nn",
    "ops",
    "optimize_for_inference",
    "param_groups",
    "register_layer",
    "repack",
    "save_sparse",
    "sparsify",
    "sparsify_like",
    "summary",
    "topology",
    "tune",
    "unknowns",
]


__version__: str

if not TYPE_CHECKING:  # for a type checker every misspelt name would be one

    def __getattr__(name):
        if name == "__version__":  # only when asked: reading the metadata takes a while
            return version()
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
