"""Inference on the CPU: ``optimize_for_inference`` and the files of sparse models."""

from uasparse_kernels.inference.run import LayerTime, OptimizedModel, optimize_for_inference

__all__ = ["LayerTime", "OptimizedModel", "optimize_for_inference"]
