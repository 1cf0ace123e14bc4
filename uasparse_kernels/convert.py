"""Between dense and sparse models: sparsify and densify swap layers in place."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from uasparse_kernels._carry_over import carry_over
from uasparse_kernels._readers import read_weights
from uasparse_kernels.nn.layers import SparseConv2d, SparseLayer, SparseLinear
from uasparse_kernels.nn.norm import BatchNorm2d
from uasparse_kernels.nn.pool import MaxPool2d
from uasparse_kernels.pattern import check_block
from uasparse_kernels.topology.distribution import layer_densities
from uasparse_kernels.topology.structure import parse_n_of_m, structured_pattern

logger = logging.getLogger("uasparse_kernels")

DenseLayer = nn.Linear | nn.Conv2d
_LAYERS: dict[type, Any] = {nn.Linear: SparseLinear, nn.Conv2d: SparseConv2d}
# What stands between: the same objects, values and gradients, by other kernels.
_BETWEEN: dict[type[nn.Module], type[nn.Module]] = {nn.BatchNorm2d: BatchNorm2d, nn.MaxPool2d: MaxPool2d}


def sparsify(
    model: nn.Module,
    sparsity: float,
    *,
    distribution: str = "erk",
    block: Sequence[int] = (1, 1),
    storage: str = "auto",
    structure: str | None = None,
    include_dense: bool = False,
    exempt: Iterable[str] = (),
    overrides: Mapping[str, float | Mapping[str, Any]] | None = None,
    filter: Callable[[str, nn.Module], bool] | None = None,
) -> nn.Module:
    """Swaps the ``nn.Linear`` and ``nn.Conv2d`` of a model for sparse ones with random patterns.

    As published (RigL, arXiv 1911.11134), "erk" and "er" cover every layer, and "uniform" all but the first
    convolution, few weights that matter much. A layer that the distribution makes fully dense stays a dense one (but
    see ``include_dense``), and so do the output embeddings of a language model, which its library resizes as a matrix;
    ``exempt`` and ``overrides`` say otherwise. What cannot be converted is left as it is and logged (logger
    "uasparse_kernels") with the reason: layers of other types, and those whose weight somebody else reads or shares.
    Hooks and attributes of a layer go to the new one. Build the optimiser afterwards: the parameters are new ones.

    Weights are scaled up to what a random pattern leaves of each output's inputs, so that outputs keep their variance
    and deep networks without normalisation train. A layer with a ``pattern`` of its own keeps its values.

    ``nn.BatchNorm2d`` and ``nn.MaxPool2d`` become those of ``uasparse_kernels.nn``: the same objects with another
    forward, faster for contiguous maps. An ``nn.TransformerEncoderLayer`` leaves its fused path for evaluation, which
    reads weights.

    Args:
        model: changed in place; a lone layer is not, its sparse form is returned.
        sparsity: share of absent weights, in [0, 1), over all layers that the distribution covers: those that are
            neither exempt nor overridden. The count is exact (see ``topology.layer_densities``).
        distribution: "erk", "er" or "uniform", which "N:M" is always.
        block: (1, 1), (r, 1) or (b, b).
        storage: "auto", "packed" or "dense" (see ``nn.SparseLinear``).
        structure: None for patterns without constraint; "fan-in" for as many active blocks in every row (their number
            is rounded in each layer), or "N:M" (such as "2:4") for N in every M neighbouring input channels, whose
            sparsity is 1 - N / M in every layer: ``sparsity`` must say the same. See ``topology.structured_pattern``.
        include_dense: swaps layers that the distribution makes fully dense too, for methods that prune gradually:
            ``sparsify(model, 0.0, include_dense=True)`` is where GMP starts.
        exempt: fully qualified names of layers that stay dense.
        overrides: by fully qualified name, a layer's own sparsity, or a mapping of ``sparsity`` or ``pattern``,
            ``block`` and ``storage``; what it leaves out is as for the model.
        filter: called with name and layer; False leaves a layer dense.

    Returns:
        The model.

    Raises:
        ValueError: for unknown names or arguments out of range, a model without an ``nn.Linear`` or ``nn.Conv2d``, or
            one that has sparse layers already; the model is unchanged then.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"Expected a sparsity in [0, 1), got {sparsity}.")
    check_block(block)
    if any(isinstance(module, SparseLayer) for module in model.modules()):
        raise ValueError("The model has sparse layers already; call densify(model) first to give it other patterns.")
    if structure not in (None, "fan-in"):
        parse_n_of_m(structure)
    overrides, exempt = dict(overrides or {}), set(exempt)
    names = {name for name, _ in model.named_modules()}
    unknown = sorted((exempt | overrides.keys()) - names)
    if unknown:
        raise ValueError(f"No layer of the model is named {', '.join(map(repr, unknown))}; see model.named_modules().")

    candidates, skipped = _candidates(model)
    if not candidates and not skipped:
        raise ValueError("Expected a model with an nn.Linear or an nn.Conv2d, got one without.")
    for name in overrides:
        if name not in candidates:
            raise ValueError(f"Cannot override {name!r}: {skipped.get(name, 'it is not an nn.Linear or nn.Conv2d')}.")
    for name in exempt & candidates.keys():
        skipped[name] = "exempt"
    if structure is not None and ":" in structure:
        distribution = "uniform"
    first = next((name for name, module in candidates.items() if isinstance(module, nn.Conv2d)), None)
    if distribution == "uniform" and first is not None and first not in overrides and len(candidates) > 1:
        skipped.setdefault(first, "the first convolution")
    for name in _output_embeddings(model) & candidates.keys() - overrides.keys():
        skipped.setdefault(name, "the output embeddings of a language model, which are resized as a matrix")
    for name, module in candidates.items():
        if name not in overrides and filter is not None and not filter(name, module):
            skipped.setdefault(name, "left out by the filter")
        if name not in overrides and name not in skipped and (reason := _misfit(module, block, structure)):
            skipped[name] = reason

    covered = {n: tuple(m.weight.shape) for n, m in candidates.items() if n not in skipped and n not in overrides}
    if structure is None or structure == "fan-in":
        densities = layer_densities(covered, 1 - sparsity, distribution, dict.fromkeys(covered, block))
    else:
        densities = dict.fromkeys(covered, 1 - sparsity)
    plans: dict[str, dict[str, Any]] = {
        name: {"sparsity": 1 - density, "block": block, "storage": storage} for name, density in densities.items()
    }
    for name, override in overrides.items():
        options = dict(override) if isinstance(override, Mapping) else {"sparsity": override}
        own = {} if "pattern" in options else {"sparsity": sparsity}
        plans[name] = own | {"block": block, "storage": storage} | options

    layers: dict[str, Any] = {}
    for name, plan in plans.items():
        if "pattern" not in plan and plan["sparsity"] <= 0 and not (include_dense and name in densities):
            skipped[name] = "fully dense"
            continue
        drawn = False
        if structure is not None and "pattern" not in plan:
            drawn = True
            shape, density = candidates[name].weight.shape, 1 - plan.pop("sparsity")
            plan["pattern"] = structured_pattern(shape, density, structure, block=plan["block"])
        layers[name] = _LAYERS[type(candidates[name])].from_dense(candidates[name], **plan)
        if drawn:
            layers[name].scale_to_fan_in_()
    for name, reason in skipped.items():
        logger.info("%s stays dense: %s", name or "the layer", reason)
    if not layers:
        logger.warning(
            "No layer was made sparse: %s", "; ".join(f"{n or 'the layer'}: {r}" for n, r in skipped.items())
        )
    _turn(model, _BETWEEN)
    model = _replace(model, layers)
    _leave_fused_evaluation(model)
    return model


def densify(model: nn.Module) -> nn.Module:
    """Swaps the sparse layers of a model for dense ones with the same weights (in place; a lone layer is returned).

    Its batch norms and pooling are torch's again.
    """
    layers = {name: module.to_dense() for name, module in model.named_modules() if isinstance(module, SparseLayer)}
    _turn(model, {ours: torchs for torchs, ours in _BETWEEN.items()})
    for module in model.modules():
        if _FUSED in module.__dict__:
            module.__dict__.update(module.__dict__.pop(_FUSED))
    return _replace(model, layers)


def _candidates(model: nn.Module) -> tuple[dict[str, DenseLayer], dict[str, str]]:
    """Layers that can be converted, and the reasons why others that look like it cannot."""
    users: dict[int, list[str]] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module._parameters.items():
            users.setdefault(id(parameter), []).append(".".join(filter(None, (module_name, name))))
    readers = read_weights(model)
    candidates: dict[str, DenseLayer] = {}
    skipped: dict[str, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        if type(module) not in _LAYERS:
            cls = f"{type(module).__module__}.{type(module).__qualname__}"
            skipped[name] = f"its class {cls} may be used in ways that a sparse layer does not serve"
        elif name in readers and not _has_fused_evaluation(model, name):
            skipped[name] = f"the forward of {readers[name]} reads its weight, instead of calling it"
        elif id(getattr(module, "weight", None)) not in users:
            skipped[name] = "its weight is no parameter (is it parametrised?)"
        elif len(users[id(module.weight)]) > 1:
            skipped[name] = f"its weight is shared by {', '.join(users[id(module.weight)])}"
        else:
            candidates[name] = module
    for name, reason in skipped.items():
        logger.warning("%s cannot be made sparse: %s", name, reason)
    return candidates, skipped


def _misfit(module: DenseLayer, block: Sequence[int], structure: str | None) -> str:
    """Why a layer's sizes do not take the block or the structure; empty where they do."""
    out, inp = module.weight.shape[:2]
    rows = out // getattr(module, "groups", 1)
    if rows % block[0] or inp % block[1]:
        return f"its weight {tuple(module.weight.shape)} is not made of {block[0]}x{block[1]} blocks"
    if structure is not None and ":" in structure and inp % parse_n_of_m(structure)[1]:
        return f"its {inp} input channels are not made of groups of {parse_n_of_m(structure)[1]}"
    return ""


def _turn(model: nn.Module, classes: Mapping[type[nn.Module], type[nn.Module]]) -> None:
    """Gives the modules of exactly these classes others; attributes, hooks and whoever holds them stay."""
    for module in model.modules():
        if (new := classes.get(type(module))) is not None:
            module.__class__ = new


_FUSED = "_fused_evaluation"  # what a module was told by torch about its fused path, and is told again by densify()


def _has_fused_evaluation(model: nn.Module, name: str) -> bool:
    """Whether a layer's weight is read by the fused path of ``nn.TransformerEncoderLayer`` alone."""
    parent, _, child = name.rpartition(".")
    owner = model.get_submodule(parent)
    is_torchs = isinstance(owner, nn.TransformerEncoderLayer) and type(owner).forward is _ENCODER_FORWARD
    return is_torchs and child in ("linear1", "linear2")


_ENCODER_FORWARD = nn.TransformerEncoderLayer.forward


def _leave_fused_evaluation(model: nn.Module) -> None:
    """Has encoder layers with sparse parts take the path of training in evaluation too."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            told: dict[str, Any] = {"activation_relu_or_gelu": 0}
        elif isinstance(module, nn.TransformerEncoder):
            told = {"use_nested_tensor": False}
        else:
            continue
        if any(isinstance(child, SparseLayer) for child in module.modules()):
            module.__dict__[_FUSED] = {key: module.__dict__[key] for key in told if key in module.__dict__}
            module.__dict__.update(told)


def _output_embeddings(model: nn.Module) -> set[str]:
    """Names of the layers that a model of Hugging Face's kind gives out as its output embeddings."""
    heads = set()
    for module in model.modules():
        get = getattr(module, "get_output_embeddings", None)
        if callable(get):
            try:
                heads.add(get())
            except (AttributeError, NotImplementedError):
                continue
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module in heads}


def _replace(model: nn.Module, layers: Mapping[str, nn.Module]) -> nn.Module:
    for name, layer in layers.items():
        old = model.get_submodule(name)
        carry_over(old, layer)
        if not name:
            return layer
        # A module may be registered under several names: all of them follow.
        for parent in model.modules():
            for child, module in parent.named_children():
                if module is old:
                    setattr(parent, child, layer)
    return model
