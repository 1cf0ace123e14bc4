"""Between dense and sparse models: sparsify and densify swap layers in place."""

from __future__ import annotations

import logging
import math
import numbers
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from uasparse_kernels._attention import join_attention, with_open_attention
from uasparse_kernels._carry_over import carry_over
from uasparse_kernels._coverage import (
    DENSE_BECAUSE,
    check_names,
    dense_shape,
    describe_outputs,
    outputs_without_weights,
    pattern_shape,
    warn_of_the_rest,
)
from uasparse_kernels._grid import check_block, check_sparsity
from uasparse_kernels._keep import Change, Keep, check_changeable, check_not_wrapped, warn_of_outdated
from uasparse_kernels._model import Model
from uasparse_kernels._readers import read_weights
from uasparse_kernels.nn.conv1d import SparseConv1d
from uasparse_kernels.nn.conv2d import SparseConv2d
from uasparse_kernels.nn.delta import SparseDelta, merge_sparse_deltas, put_in_place
from uasparse_kernels.nn.layers import SparseLayer, resolve_storage
from uasparse_kernels.nn.norm import BatchNorm2d, ReLU, ReLU6
from uasparse_kernels.nn.pool import MaxPool2d
from uasparse_kernels.nn.registry import kind_of, make_sparse, why_not
from uasparse_kernels.pattern import SparsityPattern
from uasparse_kernels.topology.distribution import layer_densities
from uasparse_kernels.topology.structure import parse_n_of_m

logger = logging.getLogger("uasparse_kernels")

# What stands between: the same objects, values and gradients, by other kernels.
_BETWEEN: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm2d: BatchNorm2d,
    nn.MaxPool2d: MaxPool2d,
    nn.ReLU: ReLU,
    nn.ReLU6: ReLU6,
}


DISTRIBUTIONS = ("erk", "er", "uniform", "global")
_ALL_WEIGHTS = "the distribution keeps all its weights"  # said of a layer
_CONVOLUTIONS = nn.Conv2d | nn.Conv1d | SparseConv2d | SparseConv1d


@with_open_attention
def sparsify(
    model: Model,
    sparsity: float,
    *,
    distribution: str = "erk",
    keep: str = "random",
    scores: Mapping[str, Tensor] | None = None,
    block: Sequence[int] = (1, 1),
    storage: str = "auto",
    structure: str | None = None,
    include_dense: bool = False,
    exempt: Iterable[str] = (),
    overrides: Mapping[str, float | Mapping[str, Any]] | None = None,
    filter: Callable[[str, nn.Module], bool] | None = None,
) -> Model:
    """Replaces the linear and convolution layers of a model by sparse ones, and brings layers that are already sparse
    to the requested sparsity.

    It converts ``nn.Linear``, ``nn.Conv2d``, ``nn.Conv1d``, Hugging Face's ``Conv1D``, subclasses of these that change
    no behaviour, and classes registered with :func:`register_layer`. Patterns are random by default. For a pretrained
    network, ``keep="magnitude"`` keeps the largest weights, and ``scores`` those with the largest scores. Make the
    optimiser afterwards: the parameters are new.

    **What stays dense.** "erk" and "er" cover every layer, "uniform" all but the first convolution, as published (RigL,
    arXiv 1911.11134). A layer that the distribution makes fully dense stays dense (but see ``include_dense``), and so
    do the output embeddings of a language model, which its library resizes as a matrix; ``exempt`` and ``overrides``
    change that. A layer that cannot be converted is left as it is, and the reason is logged (logger
    "uasparse_kernels"): it is of another type, or another module reads or shares its weight. A warning is logged if no
    layer, or less than 80 % of the weights in matrices, could be covered, and if half of a layer's outputs have no
    weight left; ``summary(model)`` shows everything.

    **Values.** Under a random pattern the weights of each output are scaled up for the inputs that it lost, so that
    outputs keep their variance and deep networks without normalisation train. Weights that were chosen by magnitude,
    by scores, or by a ``pattern`` that you give, keep their values.

    **Sparse layers** change in place, to exactly the density that the distribution gives them. They drop their weights
    of smallest magnitude (or score), or grow at random (or by scores of the dense weight's shape), starting at zero.
    Modules, parameters and block sizes stay; packed weights change their size or places, and optimisers with state
    (momentum) have to be made again.

    **Other modules.** ``nn.MultiheadAttention`` becomes a :class:`~uasparse_kernels.nn.SparseMultiheadAttention`; it
    stays the same object, with projections that are layers called ``in_proj`` (or ``q_proj``, ``k_proj``, ``v_proj``)
    and ``out_proj``. ``scores`` may use its dense names. ``nn.BatchNorm2d``, ``nn.ReLU``, ``nn.ReLU6`` and
    ``nn.MaxPool2d`` stay the same objects and get faster kernels for contiguous maps. ``nn.TransformerEncoderLayer`` no
    longer uses its fused evaluation, which reads weights. Hooks and attributes of a layer move to the new one.

    Args:
        model: changed in place; if it is itself a layer, its sparse form is returned and it is not changed.
        sparsity: share of absent weights, in [0, 1), over all layers that the distribution covers: those that are
            neither exempt nor overridden. The count is exact (see ``topology.layer_densities``).
        distribution: "erk", "er" or "uniform" ("N:M" is always uniform); or, with ``keep="magnitude"`` or ``scores``,
            "global": one threshold over all layers, each of which keeps at least its best block (blocks of different
            sizes are compared by root mean square).
        keep: which weights of a dense layer stay: "random" ones or those of largest "magnitude" (blocks by Frobenius
            norm), as many in each layer as the distribution says; with a structure, the largest of each row or group.
        scores: instead of ``keep``, a tensor for each weight, keyed by its name in ``model.named_parameters()``
            ("fc.weight") and of its shape: a gradient, |w| times the norm of the inputs (Wanda, arXiv 2306.11695),
            |w * gradient| (SNIP, arXiv 1810.02340). Those of largest magnitude stay (blocks by norm). Every layer that
            becomes sparse must have one; scores of other parameters are ignored.
        block: (1, 1), (r, 1) or (b, b).
        storage: "auto", "packed" or "dense" (see ``nn.SparseLinear``), also for layers that are already sparse.
        structure: None for patterns without constraint; "fan-in" for the same number of active blocks in every row
            (rounded in each layer); or "N:M" (such as "2:4") for N in every M neighbouring input channels, where
            ``sparsity`` must be 1 - N / M. See ``topology.structured_pattern``.
        include_dense: also replaces layers that the distribution makes fully dense, for methods that prune gradually:
            GMP starts from ``sparsify(model, 0.0, include_dense=True)``.
        exempt: fully qualified names of layers that stay dense (or as they are); that of a module stands for all
            layers in it.
        overrides: by fully qualified name, a layer's own sparsity, or a mapping of ``sparsity`` or ``pattern``,
            ``block`` and ``storage``; what the mapping leaves out is as for the model. The name of a module stands for
            all layers in it, and the longer of two names has the last word.
        filter: called with name and layer; False leaves a layer dense (or as it is).

    Returns:
        The model.

    Raises:
        TypeError: for what is no module, a string as ``exempt``, and overrides of other kinds.
        ValueError: for unknown names, arguments out of range, scores that are missing, not finite or of another shape,
            a model without any layer of these classes or wrapped for several processes, sparse layers that a
            DynamicSparsity holds, and sparse deltas. The model is then unchanged.
    """
    check_sparsity(sparsity)
    if distribution not in DISTRIBUTIONS:
        raise ValueError(
            f"Expected a distribution of {', '.join(map(repr, DISTRIBUTIONS))}, got {distribution!r}; overrides= gives "
            "single layers densities of their own."
        )
    check_block(block)
    check_not_wrapped(model)
    if any(isinstance(module, SparseDelta) for module in model.modules()):
        raise ValueError("The model has sparse deltas; call merge_sparse_deltas(model) first.")
    chooser = Keep(model, keep, scores)
    if distribution == "global" and (chooser.is_random or structure is not None):
        raise ValueError(
            'Expected keep="magnitude" or scores=, and no structure, with distribution="global": one threshold over '
            "the scores of all layers says how many weights each keeps."
        )
    if structure not in (None, "fan-in"):
        n, m = parse_n_of_m(structure)
        if not math.isclose(1 - sparsity, n / m):
            said = f"{1 - n / m:g}" if 1 - n / m == float(f"{1 - n / m:g}") else f"1 - {n} / {m}"
            raise ValueError(f"Expected the sparsity {said} for structure {structure!r}, got {sparsity}.")
        if tuple(block) != (1, 1):
            raise ValueError(f"Expected block (1, 1) for structure {structure!r}, got {tuple(block)}.")
    exempt, overrides = check_names(model, exempt), dict(overrides or {})
    inside = {name: check_names(model, [name]) for name in overrides}

    candidates, skipped = _candidates(model)
    for name, reason in skipped.items():
        logger.warning("%s cannot be made sparse: %s", name, reason)
    held = {name: module for name, module in model.named_modules() if isinstance(module, SparseLayer)}
    if not candidates and not skipped and not held:
        raise ValueError("Expected a model with an nn.Linear, nn.Conv2d or nn.Conv1d, got one without.")
    layers: dict[str, Any] = {n: m for n, m in model.named_modules() if n in candidates or n in held}
    overrides = _by_layer(overrides, inside, layers, skipped)
    uncovered = set(skipped)
    exempt &= layers.keys()
    skipped |= dict.fromkeys(exempt, "exempt")
    if structure is not None and ":" in structure:
        distribution = "uniform"
    first = next((name for name, module in layers.items() if isinstance(module, _CONVOLUTIONS)), None)
    if distribution == "uniform" and first in candidates and first not in overrides and len(layers) > 1:
        skipped.setdefault(first, "the first convolution")
        uncovered.add(first)
    for name in _output_embeddings(model) & candidates.keys() - overrides.keys():
        skipped.setdefault(name, "the output embeddings of a language model, which are resized as a matrix")
        uncovered.add(name)
    blocks = {name: tuple(held[name].pattern.block if name in held else block) for name in layers}
    for name, module in layers.items():
        if name not in overrides and filter is not None and not filter(name, module):
            skipped.setdefault(name, "left out by the filter")
        if name not in overrides and name not in skipped and (reason := _misfit(module, blocks[name], structure)):
            skipped[name] = reason
            uncovered.add(name)

    covered = {n: m for n, m in layers.items() if n not in skipped and n not in overrides}
    for name in held.keys() & (covered.keys() | overrides.keys()):
        check_changeable(name, held[name])
        if any(other.weight is held[name].weight for key, other in held.items() if key != name):
            raise ValueError(
                f"{name}: its weight is another sparse layer's too, and both would change; untie them first."
            )
    if distribution == "global":
        densities = chooser.densities(covered, blocks, 1 - sparsity)
    elif structure is None or structure == "fan-in":
        shapes = {name: dense_shape(module) for name, module in covered.items()}
        densities = layer_densities(shapes, 1 - sparsity, distribution, {name: blocks[name] for name in covered})
    else:
        densities = dict.fromkeys(covered, 1 - sparsity)
    plans: dict[str, dict[str, Any]] = {
        name: {"sparsity": 1 - density, "block": blocks[name], "storage": storage}
        for name, density in densities.items()
    }
    for name, override in overrides.items():
        options = _options_of(name, override, layers[name])
        own = {} if "pattern" in options else {"sparsity": sparsity}
        plans[name] = own | {"block": blocks[name], "storage": storage} | options

    # Everything is decided, and made, before anything changes.
    made: dict[str, Any] = {}
    changes: list[Change] = []
    for name, plan in plans.items():
        if name in held:
            changes.append(_change(name, held[name], plan, structure, chooser))
        elif "pattern" not in plan and plan["sparsity"] <= 0 and not (include_dense and name in densities):
            skipped[name] = "an override keeps all its weights" if name in overrides else _ALL_WEIGHTS
        else:
            made[name] = _made_sparse(name, candidates[name], plan, structure, chooser)
    for name, reason in skipped.items():
        logger.info("%s stays %s: %s", name or "the layer", "as it is" if name in held else "dense", reason)
        DENSE_BECAUSE[model.get_submodule(name)] = reason
    if made or changes:
        warn_of_the_rest(model, layers.keys() - (uncovered - exempt))
    else:
        logger.warning("No layer was made sparse: %s", _by_reason(skipped))
    _turn(model, _BETWEEN)
    warn_of_outdated(change.layer.weight for change in changes if change.apply())
    model = _replace(model, made)
    _leave_fused_evaluation(model)
    sparse = {name: module for name, module in model.named_modules() if isinstance(module, SparseLayer)}
    if few := outputs_without_weights({name: sparse[name] for name in plans if name in sparse}):
        logger.warning(
            "Half of the outputs of a layer or more have no weight left: %s. They are constants; take a lower sparsity "
            "or smaller blocks there (overrides=, block=).",
            describe_outputs(few),
        )
    return model


def _by_layer(
    overrides: Mapping[str, Any], inside: Mapping[str, set[str]], layers: Iterable[str], skipped: Mapping[str, str]
) -> dict[str, Any]:
    """Overrides of modules as those of all layers in them; the longer name has the last word."""
    found: dict[str, Any] = {}
    for name in sorted(overrides, key=len):
        if not (covered := [layer for layer in layers if layer in inside[name]]):
            raise ValueError(f"Cannot override {name!r}: {skipped.get(name, 'its class has no sparse form')}.")
        found |= dict.fromkeys(covered, overrides[name])
    return found


def _options_of(name: str, override: Any, layer: Any) -> dict[str, Any]:
    """What an override says, checked."""
    said = (
        f"{name or type(layer).__name__}: expected a sparsity, or a mapping of sparsity or pattern, block and storage"
    )
    if isinstance(override, numbers.Real):
        override = {"sparsity": override}
    if not isinstance(override, Mapping):
        mask = '; for a mask give {"pattern": SparsityPattern.from_mask(mask)}' if isinstance(override, Tensor) else ""
        raise TypeError(f"{said}, got a {type(override).__name__}{mask}.")
    if unknown := override.keys() - {"sparsity", "pattern", "block", "storage"}:
        raise TypeError(f"{said}, got {', '.join(map(repr, sorted(unknown)))}.")
    check_sparsity(override.get("sparsity", 0.0), name or type(layer).__name__)
    check_block(override.get("block", (1, 1)), name or type(layer).__name__)
    pattern = override.get("pattern")
    if pattern is not None and not isinstance(pattern, SparsityPattern):
        raise TypeError(
            f"{said}, got a {type(pattern).__name__} as pattern: SparsityPattern.from_mask(mask) makes one."
        )
    if pattern is not None and pattern.shape != pattern_shape(layer):
        raise ValueError(f"{name}: expected a pattern of shape {pattern_shape(layer)}, got {pattern.shape}.")
    return dict(override)


def _by_reason(skipped: Mapping[str, str]) -> str:
    """Every reason once, with the layers that it is of."""
    names: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        names.setdefault(reason, []).append(name or "the layer")
    said = [
        f"{reason}: {', '.join(of[:4])}{f' and {len(of) - 4} more' if len(of) > 4 else ''}"
        for reason, of in names.items()
    ]
    if _ALL_WEIGHTS in names:
        said.append("for gradual pruning pass include_dense=True")
    return "; ".join(said)


def _made_sparse(
    name: str, module: nn.Module, plan: dict[str, Any], structure: str | None, chooser: Keep
) -> SparseLayer:
    """The sparse form of a dense layer."""
    drawn = "pattern" not in plan
    if drawn and not (structure is None and chooser.is_random):
        density = 1 - plan.pop("sparsity")
        if not 0 < density <= 1:
            raise ValueError(f"{name}: expected a sparsity in [0, 1), got {1 - density:g}.")
        plan["pattern"] = chooser.pattern(name, module, density, plan["block"], structure)
    layer = make_sparse(name, module, **plan)
    if drawn and chooser.is_random and structure is not None:
        layer.scale_to_fan_in_()
    return layer


def _change(name: str, layer: SparseLayer, plan: dict[str, Any], structure: str | None, chooser: Keep) -> Change:
    """What happens to a layer that is sparse already."""
    pattern, block, storage = plan.pop("pattern", None), tuple(plan.pop("block")), plan.pop("storage")
    density = 1 - plan.pop("sparsity", 0.0)
    if block != layer.pattern.block or not 0 < density <= 1:
        raise ValueError(
            f"{name or type(layer).__name__}: expected a sparsity in [0, 1) and the block {layer.pattern.block} that "
            f"it has, got {1 - density:g} and {block}; call densify(model) first to give it other blocks."
        )
    resolve_storage(storage, layer.pattern, None)
    if pattern is not None:
        return Change.to_pattern(layer, pattern, storage)
    return Change(layer, *chooser.change(name, layer, density, structure), storage)


def densify(model: Model) -> Model:
    """Replaces the sparse layers of a model by dense ones with the same weights (in place; a lone layer is returned).

    Batch norms, ReLUs and pooling become torch's again, and sparse deltas are merged into their layers.
    """
    model = merge_sparse_deltas(model)
    layers = {name: module.to_dense() for name, module in model.named_modules() if isinstance(module, SparseLayer)}
    _turn(model, {ours: torchs for torchs, ours in _BETWEEN.items()})
    for module in model.modules():
        if _FUSED in module.__dict__:
            module.__dict__.update(module.__dict__.pop(_FUSED))
    model = _replace(model, layers)
    join_attention(model)
    return model


def _candidates(model: nn.Module) -> tuple[dict[str, Any], dict[str, str]]:
    """Layers that can be converted, and the reasons why others that look like it cannot."""
    users: dict[int, list[str]] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module._parameters.items():
            users.setdefault(id(parameter), []).append(".".join(filter(None, (module_name, name))))
    readers = read_weights(model)
    candidates: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    for name, module in model.named_modules():
        if (reason := why_not(module)) is not None:
            skipped[name] = reason
        elif kind_of(type(module)) is None:
            continue
        elif name in readers:
            skipped[name] = f"the forward of {readers[name]} reads its weight, instead of calling it"
        elif id(getattr(module, "weight", None)) not in users:
            skipped[name] = "its weight is no parameter (is it parametrised?)"
        elif len(users[id(module.weight)]) > 1:
            skipped[name] = f"its weight is shared by {', '.join(users[id(module.weight)])}"
        else:
            candidates[name] = module
    return candidates, skipped


def _misfit(module: nn.Module, block: Sequence[int], structure: str | None) -> str:
    """Why a layer's sizes do not take the block or the structure; empty where they do."""
    out, inp = pattern_shape(module)[:2]
    rows = out // getattr(module, "groups", 1)
    if rows % block[0] or inp % block[1]:
        return f"its weight {dense_shape(module)} is not made of {block[0]}x{block[1]} blocks"
    if structure is not None and ":" in structure and tuple(block) != (1, 1):
        return f"it has blocks {tuple(block)}, where {structure} wants single weights"
    if structure is not None and ":" in structure and inp % parse_n_of_m(structure)[1]:
        return f"its {inp} input channels are not made of groups of {parse_n_of_m(structure)[1]}"
    return ""


def _turn(model: nn.Module, classes: Mapping[type[nn.Module], type[nn.Module]]) -> None:
    """Gives the modules of exactly these classes others; attributes, hooks and whoever holds them stay."""
    for module in model.modules():
        if (new := classes.get(type(module))) is not None:
            module.__class__ = new


_FUSED = "_fused_evaluation"  # what a module was told by torch about its fused path, and is told again by densify()


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


def _replace(model: Model, layers: Mapping[str, Any]) -> Model:
    users = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    dense: dict[int, tuple[Any, Any]] = {}  # weights, and what they become, by the id of the former
    new: dict[int, nn.Module] = {}
    for name, layer in layers.items():
        old: Any = model.get_submodule(name)
        carry_over(old, layer)
        # What was shared stays so: a bias is the very one, of a shared sparse weight there is one dense one.
        if old.bias is not None and users[id(old.bias)] > 1:
            layer.bias = old.bias
        _, weight = dense.setdefault(id(old.weight), (old.weight, layer.weight))
        if weight is not layer.weight and weight.shape == layer.weight.shape:
            layer.weight = weight
        new[id(old)] = layer
    return put_in_place(model, new)
