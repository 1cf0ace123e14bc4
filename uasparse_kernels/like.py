"""Makes a dense model sparse in the layers, and at the places, in which a state_dict is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from uasparse_kernels._model import Model, check_model
from uasparse_kernels.convert import sparsify
from uasparse_kernels.pattern import SparsityPattern

_LAYOUT = "pattern.layout"


def sparsify_like(model: Model, state: Mapping[str, Any]) -> Model:
    """Makes the layers of a dense model sparse that are sparse in a state_dict, with its patterns and its storage.

    Afterwards ``model.load_state_dict(state)`` fits: of a checkpoint one need not know how its model was made sparse.
    Values are not loaded. A state without sparse layers leaves the model as it is.

    Args:
        model: the dense model, changed in place; if it is itself a layer, its sparse form is returned.
        state: of ``state_dict()`` of a sparse model. Take off a wrapper's prefix first ("module.", "_orig_mod.").

    Returns:
        The model.

    Raises:
        TypeError: for what is no state_dict.
        ValueError: for layers that the model does not have, or with weights of another shape, a damaged pattern, and a
            model that is sparse already. The model is then unchanged.

    Example:
        >>> model = ua.sparsify_like(make_network(), checkpoint["model"])
        >>> model.load_state_dict(checkpoint["model"])
    """
    check_model(model)
    if not isinstance(state, Mapping):
        raise TypeError(f"Expected a state_dict, got a {type(state).__name__}; of a model pass model.state_dict().")
    layers: dict[str, dict[str, Any]] = {}
    # A state_dict lists a module under all of its names, sparsify knows it by its first.
    first = {module: name for name, module in model.named_modules()}
    by_name = dict(model.named_modules(remove_duplicate=False))
    for key in state:
        if key == _LAYOUT or key.endswith(f".{_LAYOUT}"):
            prefix = key.removesuffix(_LAYOUT)
            pattern = SparsityPattern.from_state_dict(state, prefix + "pattern.")
            weight = state.get(prefix + "weight")
            packed = isinstance(weight, Tensor) and tuple(weight.shape) == pattern.packed_shape
            name = prefix.removesuffix(".")
            name = first[by_name[name]] if name in by_name else name
            layers[name] = {"pattern": pattern, "storage": "packed" if packed else "dense"}
    if any(hasattr(module, "pattern_view") for module in model.modules()):
        raise ValueError("Expected a dense model, got one with sparse layers; call densify(model) first.")
    return sparsify(model, 0.0, overrides=layers, filter=lambda *_: False) if layers else model
