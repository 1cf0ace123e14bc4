"""Where a network's classes are told apart: its last linear layer, and an output for "unknown" of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import uasparse_kernels as ua
from uasparse_kernels.unknowns.errors import UnknownsError


class UnknownHead(nn.Module):
    """The last layer of a classifier, with an output for "unknown" that looks at the features in another way.

    Features [N, D] -> logits [N, K + 1]. The K classes are linear in the features, as usual. "Unknown" is linear in the
    standardised features (batch norm without scale and shift) and their squares: 2 D weights and a bias, which start at
    zero and are to stay dense. As a row of the last layer it would call unknown what lies on one side of a plane, and
    in a very sparse layer it may be left with one weight of many. With the squares it can call unknown what lies far
    from the known images on any side, as a Mahalanobis distance with a diagonal matrix does, but trained.

    docs/evidence/choices.md has what it gains, and what it was chosen on.
    """

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(num_features, affine=False)
        self.unknown = nn.Linear(2 * num_features, 1)
        nn.init.zeros_(self.unknown.weight)
        nn.init.zeros_(self.unknown.bias)
        self.classes = nn.Linear(num_features, num_classes)  # the last, as `head_of` looks for it

    def forward(self, features: Tensor) -> Tensor:
        z = self.norm(features)
        return torch.cat([self.classes(features), self.unknown(torch.cat([z, z.square()], 1))], 1)


def give_unknown_head(model: nn.Module) -> nn.Module:
    """Replaces the last linear layer of K + 1 outputs, the last for "unknown", by an `UnknownHead`, in place.

    The layer must be dense still; its weights are not kept. Give `unknown_layers(model)` to `sparsify` as `exempt`.
    Returns the model. Raises UnknownsError if the layer is sparse, or the model is itself that layer.
    """
    head = head_of(model)
    name = next(name for name, module in model.named_modules() if module is head)
    if not name or type(head) is not nn.Linear:
        raise UnknownsError(f"Expected a model around an nn.Linear as its last layer, got {name or 'a'} {type(head)}.")
    new = UnknownHead(head.in_features, head.out_features - 1).to(head.weight.device, head.weight.dtype)
    model.set_submodule(name, new)
    return model


def unknown_layers(model: nn.Module) -> list[str]:
    """The names of the layers that only make the output "unknown"."""
    return [f"{name}.unknown" for name, module in model.named_modules() if isinstance(module, UnknownHead)]


def num_outputs(model: nn.Module) -> int:
    """K, or K + 1 with an output for "unknown" in the last layer or beside it."""
    return int(head_of(model).out_features) + len(unknown_layers(model))  # type: ignore[arg-type]


def head_of(model: nn.Module) -> nn.Module:
    """Returns the last linear layer (dense or sparse); its input are the penultimate features. Raises UnknownsError.

    Of a network with an `UnknownHead` it is the layer of the classes.
    """
    heads = [m for m in model.modules() if isinstance(m, nn.Linear | ua.SparseLinear)]
    if not heads:
        raise UnknownsError(f"{type(model).__name__} has no linear layer, so no penultimate features to score.")
    return heads[-1]


def logits_and_features(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of one pass: logits [N, outputs], and the features [N, D] that the last layer makes them of.

    Raises UnknownsError unless the layer of `head_of`, called once, makes the logits: what is fitted on its input, or
    reads its weights, would be of another layer.
    """
    head, seen = head_of(model), []

    def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        seen.append((args[0] if args else kwargs["input"], output))

    hook = head.register_forward_hook(see, with_kwargs=True)
    try:
        logits = model(x)
    finally:
        hook.remove()
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        got = list(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise UnknownsError(
            f"Expected a network that gives logits [N, outputs], got {got}; wrap it in a module that does."
        )
    if len(seen) != 1 or not _are_equal(logits[:, : head.out_features], seen[0][1]):  # type: ignore[misc]
        name = next(name for name, module in model.named_modules() if module is head)
        raise UnknownsError(
            f"Expected the network's last linear layer, {name or 'itself'}, to make its logits in one call, and "
            f"nothing to change them afterwards; it was called {len(seen)} times. Define the head after all other "
            "layers, and leave out what follows it."
        )
    return logits, seen[0][0]


def _are_equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a.detach(), b.detach().to(a), rtol=0, atol=0, equal_nan=True)
