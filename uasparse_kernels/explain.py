"""What was built, and which kernel serves a call and why."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import nn

from uasparse_kernels import _library
from uasparse_kernels._table import render
from uasparse_kernels.inference.run import LayerTime, OptimizedModel
from uasparse_kernels.ops import _common, _cpu

OPS = ("masked_linear", "masked_conv2d", "prune_grow", "unknown_aware_loss", "batch_norm")


class Explanations(list):
    """A list of :class:`Explanation`, or of :class:`LayerTime`; ``print`` shows it as a table with totals."""

    def __str__(self) -> str:
        kernels = ", ".join(f"{count} {kernel}" for kernel, count in Counter(row.kernel for row in self).most_common())
        footer = [f"{len(self)} calls: {kernels}" if self else "No call of a sparse op."]
        if not any(isinstance(row, LayerTime) for row in self):
            return render(("Layer", "Op", "Kernel", "Why"), [tuple(row) for row in self], footer)
        rows = []
        for row in self:
            density = "" if row.density is None else f"{row.density:.2%}"
            why = row.reason + (f"; with {', '.join(row.fused)}" if row.fused else "")
            rows.append((row.layer, density, f"{row.ms:.3f}", f"{row.share:.1%}", row.kernel, why))
        footer = [f"{footer[0]}; {sum(row.ms for row in self):.3f} ms"]
        return render(("Layer", "Density", "ms", "Share", "Kernel", "Why"), rows, footer, numbers={1, 2, 3})


class Explanation(NamedTuple):
    """One op call: where it was made, the kernel that served it, and why."""

    where: str
    op: str
    kernel: str
    reason: str


def explain(target: nn.Module | Callable[..., Any], *args: Any, **kwargs: Any) -> Explanations:
    """Runs a module, or an op, on the given arguments and says which kernel served each of its sparse ops.

    ``explain(model, x)`` or ``explain(ops.masked_linear, x, weight, pattern)``. The call runs without gradients, and a
    module is in eval mode meanwhile, so that nothing changes. What ``torch.compile`` compiled runs uncompiled for it,
    other threads' calls too. Only calls of this thread are recorded: other threads may
    use the module at the same time, but see it in eval mode too (copy a module that they train).

    Returns:
        A list that ``print`` shows as a table with totals. It has one :class:`Explanation` per call, in order
        (``where`` is the layer's name, or the op's for a lone call); for a model of :func:`optimize_for_inference`, one
        :class:`LayerTime` per step, with its share of the time.
    """
    if isinstance(target, OptimizedModel):
        return Explanations(target.explain(*args, **kwargs))
    if not callable(target):
        raise TypeError(f"Expected a model or an op to call, got a {type(target).__name__}.")
    found = Explanations()
    modules = dict(target.named_modules()) if isinstance(target, nn.Module) else {}
    names = {id(module): name for name, module in modules.items()}

    def listener(op: str, choice: _common.Choice) -> None:
        found.append(Explanation(_innermost(names) or op, op, *choice))

    training = [module for module in modules.values() if module.training]
    for module in training:
        module.training = False
    try:
        with _uncompiled(), _common.listening(listener), torch.no_grad():
            target(*args, **kwargs)
    finally:
        for module in training:
            module.training = True
    return found


def _uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Has what is compiled run as it was written: its graphs may be of other sizes, and say less."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled; the import takes a second
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


def _innermost(names: dict[int, str]) -> str | None:
    """The name of the innermost module whose method is running, found on the stack.

    Hooks would tell it too, but they would be on a module that other threads may share.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if (name := names.get(id(frame.f_locals.get("self")))) is not None:
            return name
        frame = frame.f_back
    return None


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
        "uasparse_kernels": version(),
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


def version() -> str:
    """Of the installed package."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("uasparse_kernels")
    except PackageNotFoundError:
        return "not installed (imported from its source folder)"
