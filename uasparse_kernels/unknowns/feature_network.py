"""A trained network in the form that other people's evaluators ask for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import uasparse_kernels as ua
from uasparse_kernels.unknowns.head import head_of, logits_and_features


class FeatureNetwork(nn.Module):
    """`model` with access to its penultimate features, for pytorch-ood's detectors and OpenOOD's evaluators.

    `network(x)` gives class logits [N, K]; `network(x, return_feature=True)` these and the features [N, D], which are
    the input of the last linear layer; `network.features(x)` the features alone. OpenOOD gets the head
    by `get_fc()` and `get_fc_layer()`.

    Args:
        model: dense or sparse; it is not copied.
        num_classes: K; a further output for "unknown" is left out. None takes all outputs.
    """

    def __init__(self, model: nn.Module, num_classes: int | None = None) -> None:
        super().__init__()
        outputs = int(head_of(model).out_features)  # type: ignore[arg-type]
        if num_classes is not None and not 0 < num_classes <= outputs:
            raise ValueError(f"Expected num_classes from 1 to the {outputs} outputs of the network, got {num_classes}.")
        self.model = model
        self.num_classes: int = num_classes or outputs

    def forward(self, x: Tensor, return_feature: bool = False) -> Any:
        logits, features = self._run(x)
        return (logits, features) if return_feature else logits

    def features(self, x: Tensor) -> Tensor:
        return self._run(x)[1]

    def forward_threshold(self, x: Tensor, threshold: float) -> Tensor:
        """Class logits of features clipped at `threshold`, as OpenOOD's ReAct asks for them."""
        return head_of(self.model)(self.features(x).clamp(max=threshold))[:, : self.num_classes]

    def get_fc_layer(self) -> nn.Linear:
        """The head of the K classes as a dense layer of its own."""
        head = head_of(self.model)
        weight: Any = head.dense_weight() if isinstance(head, ua.SparseLinear) else head.weight
        layer = nn.Linear(weight.shape[1], self.num_classes, device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            layer.weight.copy_(weight[: self.num_classes])
            layer.bias.zero_() if head.bias is None else layer.bias.copy_(head.bias[: self.num_classes])
        return layer

    def get_fc(self) -> tuple[Any, Any]:
        """Weight [K, D] and bias [K] of the head, as numpy arrays."""
        layer = self.get_fc_layer()
        return layer.weight.detach().cpu().numpy(), layer.bias.detach().cpu().numpy()

    def _run(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits, features = logits_and_features(self.model, x)
        return logits[:, : self.num_classes], features
