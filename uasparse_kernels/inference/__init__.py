"""Inference on the CPU: ``optimize_for_inference`` and the files of sparse models."""

from uasparse_kernels.inference.files import load_sparse, save_sparse
from uasparse_kernels.inference.run import LayerTime, OptimizedModel, load_optimized, optimize_for_inference

__all__ = ["LayerTime", "OptimizedModel", "load_optimized", "load_sparse", "optimize_for_inference", "save_sparse"]
