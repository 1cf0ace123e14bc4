"""What every function that takes a model asks of it."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

Model = TypeVar("Model", bound=nn.Module)  # what is changed in place; a lone layer comes back as another


def check_model(model: Any) -> None:
    """Raises TypeError for what is no module, ValueError for a model that is optimised, or a part of it."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected a model (nn.Module), got a {type(model).__name__}.")
    optimized = [name for name, module in model.named_modules() if getattr(module, "_is_optimized_copy", False)]
    if optimized:
        where = f" at {optimized[0]!r}" if optimized[0] else ""
        raise ValueError(
            f"Expected a model with weights of its own, got an optimised one{where}: use the model that it was made "
            "from. An optimised one is kept by its save(path), and explain(model, *inputs) shows what runs in it."
        )
