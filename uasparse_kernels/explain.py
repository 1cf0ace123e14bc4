"""What was built, and which kernel serves a call and why."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from uasparse_kernels import _library
from uasparse_kernels.inference.run import LayerTime, OptimizedModel
from uasparse_kernels.ops import _common, _cpu

OPS = ("masked_linear", "masked_conv2d", "prune_grow", "unknown_aware_loss", "batch_norm")


class Explanation(NamedTuple):
    """One op call: where it was made, the kernel that served it, and why."""

    where: str
    op: str
    kernel: str
    reason: str


def explain(target: nn.Module | Callable[..., Any], *args: Any, **kwargs: Any) -> list[Explanation] | list[LayerTime]:
    """Runs a module, or an op, on the given arguments and tells which kernel served each of its sparse ops.

    ``explain(model, x)`` or ``explain(ops.masked_linear, x, weight, pattern)``. The call is made without gradients, a
    module in eval mode for its time, so that nothing changes.

    Returns:
        A :class:`LayerTime` a step for a model of :func:`optimize_for_inference`, in order, with its share of time;
        else one :class:`Explanation` a call, in order; ``where`` is the layer's name, or the op's for a lone call.
    """
    if isinstance(target, OptimizedModel):
        return target.explain(*args, **kwargs)
    found: list[Explanation] = []
    stack = [""]

    def listener(op: str, choice: _common.Choice) -> None:
        found.append(Explanation(stack[-1] or op, op, *choice))

    handles, modes = [], {}
    if isinstance(target, nn.Module):
        modes = {module: module.training for module in target.modules()}
        target.eval()
        for name, module in target.named_modules():
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: stack.append(name)))
            handles.append(module.register_forward_hook(lambda *_: stack.pop() and None, always_call=True))
    _common.listeners.append(listener)
    try:
        with torch.no_grad():
            target(*args, **kwargs)
    finally:
        _common.listeners.remove(listener)
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    return found


def backend_info() -> dict[str, Any]:
    """Versions, what was built, and the backend of each op on each device, as a dictionary of plain values."""
    compiled = _library.compiled
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return {
        "uasparse_kernels": _version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "compiled": compiled is not None,
        "built_with_torch": getattr(compiled, "torch_version", None),
        "compiler": getattr(compiled, "compiler", None),
        "cuda_architectures": getattr(compiled, "cuda_archs", "") or None,
        "cpu_isa": compiled.cpu_isa() if hasattr(compiled, "cpu_isa") else None,
        "cpu_isa_forced": os.environ.get("UASPARSE_CPU_ISA"),
        "threads": torch.get_num_threads(),
        "cpu": _cpu.processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "backends": {op: {device: _backend(op, device) for device in devices} for op in OPS},
    }


def _backend(op: str, device: str) -> str:
    if _library.has_kernel_for("topk_indices" if op == "prune_grow" else op, device):
        if device == "cuda" and op in ("masked_linear", "masked_conv2d"):
            return "Triton, CUDA" if _library.has_kernel_for("sparse_product_out", device) else "Triton"
        return {"cpu": "C++", "cuda": "CUDA"}[device]
    return "torch" if op == "batch_norm" else "reference (eager torch)"


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("uasparse_kernels")
    except PackageNotFoundError:
        return "not installed (imported from its source folder)"
