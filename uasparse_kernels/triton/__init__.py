"""Triton kernels of ``torch.ops.uasparse`` on CUDA devices. Importing this registers them; the first call compiles."""

from __future__ import annotations

import importlib
import importlib.util

import torch

from uasparse_kernels.triton import settings

__all__ = ["available", "register", "settings"]

# Op: the module of this package that has a function of its name.
_OPS = {
    "masked_linear": "masked_linear",
    "masked_linear_backward": "masked_linear",
    "masked_conv2d": "masked_conv2d",
    "masked_conv2d_backward": "masked_conv2d",
    "pack": "pattern",
    "unpack": "pattern",
    "keep_active_": "pattern",
}
_registered: list[torch.library.Library] = []


def available() -> bool:
    """Whether Triton is installed beside a CUDA build of torch (a GPU need not be there)."""
    return torch.version.cuda is not None and importlib.util.find_spec("triton") is not None


def register() -> None:
    """Makes the kernels the CUDA implementations of their ops. Triton itself is imported at the first call."""
    if _registered or not available():
        return
    library = torch.library.Library("uasparse", "IMPL")
    for op, module in _OPS.items():
        library.impl(op, _lazy(module, op), "CUDA")
    _registered.append(library)


def _lazy(module: str, name: str):
    def call(*args):
        function = getattr(importlib.import_module(f"uasparse_kernels.triton.{module}"), name)
        # Triton launches on the current device, which need not be the tensors'.
        if args[0].is_cuda and args[0].device.index != torch.cuda.current_device():
            with torch.cuda.device(args[0].device):
                return function(*args)
        return function(*args)

    return call
