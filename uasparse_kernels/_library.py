"""Loads the compiled ops (``torch.ops.uasparse``) where they were built, and says which of them serve a device."""

from __future__ import annotations

import ctypes
import functools
import sys
from types import ModuleType

import torch

from uasparse_kernels import _compiled

compiled: ModuleType | None = _compiled.load()
if compiled is not None:
    # After the schemas: the implementations that are written in Python.
    from uasparse_kernels import triton as _triton

    _triton.register()


def has_kernel(op: str, tensor: torch.Tensor) -> bool:
    """Whether a compiled (or Triton) kernel of ``op`` serves tensors on the device of ``tensor``."""
    return has_kernel_for(op, tensor.device.type)


def constant_when_compiled(function):
    """Decorator: ``torch.compiler.assume_constant_result`` without its import of the compiler, which takes a second and
    100 MB in every process, those that only serve too."""
    function._dynamo_marked_constant = True
    return function


def apart_when_compiled(function):
    """Decorator: ``torch.compiler.disable``, likewise: where nobody has imported a compiler, none is to be kept out."""
    disabled: list = []

    @functools.wraps(function)
    def call(*args, **kwargs):
        if not disabled:
            if "torch._dynamo" not in sys.modules:
                return function(*args, **kwargs)
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args, **kwargs)

    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    return call


def is_exporting() -> bool:
    """``torch.compiler.is_exporting()``, which in a graph of ``torch.compile`` is always True with torch 2.11."""
    return torch.compiler._is_exporting_flag


@constant_when_compiled
def has_kernel_for(op: str, device_type: str) -> bool:
    """As :func:`has_kernel`, by device type."""
    return _has_kernel_for(op, device_type)


@functools.cache
def _has_kernel_for(op: str, device_type: str) -> bool:
    if compiled is None:
        return False
    # A meta tensor goes where fakes go: to the op, whose fake knows the shape.
    if device_type == "meta":
        return True
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"uasparse::{op}", device_type.upper())


def free_workspaces() -> int:
    """Frees the memory that the CPU kernels keep for their next call, at most 256 MiB; returns its size in bytes."""
    return torch.ops.uasparse.free_workspaces() if compiled is not None else 0


def keep_freed_memory() -> bool:
    """Makes the C library keep memory that CPU tensors free, for the rest of the process; returns whether it does.

    glibc returns large blocks to the system. So every training step asks for its activations again and pays for each
    page that it touches: a good part of the time of a sparse ResNet-18's step. After this call the process stays as
    large as it was at its largest. Call it before training. It returns False with other C libraries.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    # M_MMAP_MAX: no block comes from the system by itself, to go back when it is freed, as those over 32 MiB else do.
    # M_TRIM_THRESHOLD: never.
    return mallopt is not None and bool(mallopt(-4, 0)) and bool(mallopt(-1, -1))


def register_fake(op: str):
    """Decorator: registers the shape function of ``op`` where the op exists."""

    def decorate(function):
        if compiled is not None:
            torch.library.register_fake(f"uasparse::{op}")(function)
        return function

    return decorate


def implement(op: str, function) -> None:
    """Registers a function for tensors of every device as ``op`` where the op exists."""
    if compiled is not None:
        torch.library.impl(f"uasparse::{op}", "CompositeExplicitAutograd")(function)


def register_autograd(op: str, backward, setup_context) -> None:
    """Registers the derivative of ``op`` where the op exists."""
    if compiled is not None:
        torch.library.register_autograd(f"uasparse::{op}", backward, setup_context=setup_context)
