"""What of a model is sparse, and why the rest is not."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from uasparse_kernels._attention import why_closed
from uasparse_kernels._coverage import DENSE_BECAUSE, Matrix, describe_outputs, matrices, outputs_without_weights
from uasparse_kernels._model import check_model
from uasparse_kernels._table import bytes_of, render
from uasparse_kernels.convert import _candidates
from uasparse_kernels.nn.delta import SparseDelta
from uasparse_kernels.nn.layers import SparseLayer


class SummaryRow(NamedTuple):
    """A parameter of two or more dimensions.

    ``layer`` is the layer's name, with the parameter's where that is not "weight"; ``kind`` its class; ``shape`` the
    dense one; ``structure`` is "unstructured", "blocks 16x16" or, for what is not sparse, "dense"; ``storage`` "packed"
    or "dense"; ``bytes`` counts the parameter and its pattern's indices; ``dense_because`` is empty for what is sparse.
    """

    layer: str
    kind: str
    shape: tuple[int, ...]
    density: float
    structure: str
    storage: str
    bytes: int
    dense_because: str


@dataclass(frozen=True)
class Summary:
    """The table that :func:`summary` makes; ``str()`` of it is the table as text.

    ``weights`` counts the entries of all matrices (parameters of two or more dimensions), ``active`` the active ones
    among them, ``others`` the parameters in biases and norms. ``bytes`` are those of all parameters and patterns,
    ``dense_bytes`` those of the dense model's parameters. ``constant_outputs`` has the layers in which half of the
    outputs or more have no weight: how many these are, of how many outputs.
    """

    rows: list[SummaryRow]
    weights: int
    active: int
    covered: int
    others: int
    bytes: int
    dense_bytes: int
    constant_outputs: dict[str, tuple[int, int]]

    @property
    def sparsity(self) -> float:
        """Share of absent weights in all matrices, dense ones included."""
        return 1 - self.active / self.weights if self.weights else 0.0

    def __str__(self) -> str:
        reasons: Counter[str] = Counter()
        for row in self.rows:
            if row.dense_because:
                reasons[row.dense_because] += math.prod(row.shape)
        notes = {reason: i + 1 for i, reason in enumerate(reasons)}
        header = ("Layer", "Shape", "Density", "Structure", "Storage", "Bytes")
        lines = [
            (
                row.layer,
                "x".join(map(str, row.shape)),
                f"{row.density:.2%}",
                f"dense [{notes[row.dense_because]}]" if row.dense_because else row.structure,
                row.storage,
                bytes_of(row.bytes),
            )
            for row in self.rows
        ]
        footer = [
            f"Weights in {len(self.rows)} matrices: {self.weights:,}, active {self.active:,}: sparsity "
            f"{self.sparsity:.2%}; {self.covered / max(1, self.weights):.1%} of them are in sparse layers",
            f"Other parameters (biases, norms): {self.others:,}",
            f"Bytes of parameters and patterns: {bytes_of(self.bytes)}; as a dense model {bytes_of(self.dense_bytes)}",
            *(
                [f"Outputs without any weight: {describe_outputs(self.constant_outputs)}"]
                if self.constant_outputs
                else []
            ),
            *(
                f"[{i}] {reason} ({reasons[reason] / max(1, self.weights):.1%} of the weights)"
                for reason, i in notes.items()
            ),
        ]
        return render(header, lines, footer, numbers={2, 5})

    __repr__ = __str__


def summary(model: nn.Module) -> Summary:
    """Shows what is sparse in a model: a row for every matrix, the reason where one is dense, and totals.

    ``print(summary(model))`` shows it as a table of at most 100 columns. Nothing runs and no weight is read, so that it
    works on the meta device too. If ``sparsify`` left a layer dense because of its arguments (exempt, the filter, the
    distribution), this reason is known for the model that it was called with, not for copies.

    Args:
        model: any module; a shared parameter counts once, under its first name.
    """
    check_model(model)
    rows, covered, active, held = [], 0, 0, 0
    candidates, skipped = _candidates(model)
    coverable = set(candidates)
    for name, reason in why_closed(model).items():
        for layer in (name, f"{name}.out_proj" if name else "out_proj"):
            skipped.pop(layer, None)  # that the attention itself reads its weight is no reason
            if reason:
                skipped[layer] = reason
            else:
                coverable.add(layer)
    has_sparse = any(isinstance(module, SparseLayer) for module in model.modules())
    bases = {f"{n}.base" if n else "base" for n, m in model.named_modules() if isinstance(m, SparseDelta)}
    all_matrices = list(matrices(model))
    users: dict[int, list[str]] = {}
    for layer, module in model.named_modules():
        for parameter in module._parameters.values():
            users.setdefault(id(parameter), []).append(layer)
    for matrix in all_matrices:
        module, tensor = matrix.module, matrix.tensor
        name = matrix.layer if matrix.name == "weight" else ".".join(filter(None, (matrix.layer, matrix.name)))
        pattern = module.pattern if isinstance(module, SparseLayer) and matrix.name == "weight" else None
        if pattern is not None:
            structure = "unstructured" if pattern.block == (1, 1) else "blocks {}x{}".format(*pattern.block)
            density, storage, because = pattern.density, module.storage, ""
            indices = sum(_bytes(t) for t in (pattern.crow, pattern.col, pattern.ccol, pattern.row, pattern.perm))
            covered, active = covered + matrix.size, active + pattern.nnz
        else:
            structure, density, storage, indices = "dense", 1.0, "dense", 0
            because = _why_dense(matrix, coverable, skipped, bases, has_sparse)
            if (tied := users[id(tensor)][1:]) and matrix.layer not in skipped:
                because += f"; {', '.join(tied)} {'is' if len(tied) == 1 else 'are'} tied to it"
            active += matrix.size
        size = _bytes(tensor) + indices
        held += size
        kind = type(module).__name__
        rows.append(SummaryRow(name or kind, kind, matrix.shape, density, structure, storage, size, because))
    known = {id(matrix.tensor) for matrix in all_matrices}
    others = [p for p in model.parameters() if id(p) not in known]
    rest = sum(_bytes(p) for p in others)
    return Summary(
        rows,
        weights=sum(matrix.size for matrix in all_matrices),
        active=active,
        covered=covered,
        others=sum(p.numel() for p in others),
        bytes=held + rest,
        dense_bytes=sum(matrix.size * matrix.tensor.element_size() for matrix in all_matrices) + rest,
        constant_outputs=outputs_without_weights(
            {name: module for name, module in model.named_modules() if isinstance(module, SparseLayer)}
        ),
    )


def _why_dense(matrix: Matrix, candidates: set[str], skipped: dict[str, str], bases: set[str], has_sparse: bool) -> str:
    module: nn.Module = matrix.module
    if module in DENSE_BECAUSE:
        return DENSE_BECAUSE[module]
    if matrix.layer in bases:
        return "the base of a sparse delta"
    if matrix.layer in skipped and matrix.name.endswith("weight"):
        return skipped[matrix.layer]
    if matrix.layer in candidates and matrix.name.endswith("weight"):
        return "left dense by sparsify or its caller" if has_sparse else "sparsify was not called"
    cls = type(module)
    if matrix.tensor.dim() == 3 and min(matrix.shape) > 1 and not cls.__module__.startswith("torch."):
        return f"{cls.__qualname__} holds stacks of matrices (experts) as single parameters, which have no sparse form"
    if not cls.__module__.startswith("torch.") and next(module.children(), None) is not None:
        return f"a parameter that {cls.__qualname__} holds itself"
    if isinstance(module, ParametrizationList):
        return "it is parametrised"
    where = "nn" if cls.__module__.startswith("torch.nn.modules") else cls.__module__
    return f"{where}.{cls.__qualname__} has no sparse form"


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
