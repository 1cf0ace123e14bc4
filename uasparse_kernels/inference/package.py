"""An optimised model as a package of AOTInductor, which a C++ program runs without Python (examples/serve_cpp)."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from uasparse_kernels._library import compiled, register_fake
from uasparse_kernels.inference.builder import FORMAT, ISAS, MADE_FOR
from uasparse_kernels.inference.capture import one_cudnn_precision

if TYPE_CHECKING:
    from uasparse_kernels.inference.run import OptimizedModel


@register_fake("serve_run")
def _(arena, program, ints, values, inputs, outputs) -> None:
    pass


# What the compiler may use for each: the x86-64 levels that the kernels' instruction sets are.
_LEVELS = {"portable": "x86-64", "avx2": "x86-64-v3", "avx512": "x86-64-v4"}


class _Planned(nn.Module):
    """Calls an optimised model's steps one by one, as torch.export wants to see them."""

    def __init__(self, model: OptimizedModel):
        super().__init__()
        self._model = [model]  # no submodule: its tensors are the plan's, constants of the graph
        self.eval()

    def forward(self, *args: Any) -> Any:
        (model,) = self._model
        model._arenas.clear()  # one kept from another trace is no real tensor
        return model._run_parts(pytree.tree_leaves(args))


def package(model: OptimizedModel, path: str | os.PathLike[str], batch: int) -> None:
    """See ``OptimizedModel.package``; ``model`` is one that nobody else calls."""
    if Path(path).suffix != ".pt2":
        raise ValueError(f"Expected a path that ends in .pt2, got {os.fspath(path)!r}.")
    graph = model._graph
    if batch < graph.least_batch:
        raise ValueError(f"Expected a batch of at least {graph.least_batch}, got {batch}.")
    sizes = [[batch if size is None else size for size in shape] for shape in graph.input_shapes]
    dtypes = zip(sizes, graph.input_dtypes, strict=True)
    inputs = [torch.zeros(size, dtype=dtype, device="cpu") for size, dtype in dtypes]
    isa = compiled.cpu_isa() if compiled is not None else "portable"
    made_for = torch.tensor([MADE_FOR, FORMAT, ISAS.index(isa)], device="cpu")
    with torch.no_grad(), one_cudnn_precision():
        model._run_parts(inputs)  # makes the plans
        for call in (call for plan in model._plans.values() for call in plan.merged):
            call.program = None if call.program is None else torch.cat([made_for, call.program])
        program = torch.export.export(_Planned(model), pytree.tree_unflatten(inputs, graph.in_spec)[0], strict=False)
        try:
            # Machine code for those machines that the plan is for, whichever of them this one is.
            settings: dict[str, Any] = {"aot_inductor.metadata": {"uasparse_isa": isa}}
            chosen = torch._inductor.config.cpp
            if platform.machine() == "x86_64" and getattr(chosen, "march", "") is None:
                settings |= {"cpp.march": _LEVELS[isa], "cpp.simdlen": {"portable": 1, "avx2": 256}.get(isa)}
            torch._inductor.aoti_compile_and_package(program, package_path=os.fspath(path), inductor_configs=settings)
        except torch._inductor.exc.InvalidCxxCompiler as error:
            raise RuntimeError(f"A package is compiled: it needs a C++ compiler ($CXX, else g++). {error}") from error
