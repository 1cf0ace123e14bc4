"""Losses by name. Each is a module: forward(logits, target) -> scalar, `step_epoch()` at the end of an epoch,
and `num_outputs`, K or K+1. A new arm is one more entry of LOSSES.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

import uasparse_kernels as ua
from uasparse_kernels.training.errors import TrainingError


@dataclass(frozen=True)
class LossSpec:
    """What a loss may need to know about the run."""

    num_classes: int
    epochs: int
    with_unknowns: bool = False
    unknown_weight: float = 0.25
    warmup_epochs: int = 5
    alpha_final: float = 1.0
    rho: float = 64.0
    logit_temperature: float = 0.04


class CrossEntropy(nn.Module):
    """Plain cross entropy: K outputs, or K+1 where synthetic unknowns (target K, own weight) are in the batch."""

    def __init__(self, spec: LossSpec) -> None:
        super().__init__()
        self.with_unknowns, self.unknown_weight = spec.with_unknowns, spec.unknown_weight
        self.num_outputs = spec.num_classes + int(spec.with_unknowns)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        if not self.with_unknowns:
            return F.cross_entropy(logits, target)
        alpha = logits.new_zeros(())  # no up-weighting of wrong samples: what is left is cross entropy over K+1
        return ua.ops.unknown_aware_loss(logits, target, alpha, unknown_weight=self.unknown_weight)[0]

    def step_epoch(self) -> None:
        """Nothing changes with the epochs."""


class Moon(ua.nn.UnknownAwareLoss):
    """The unknown-aware loss with its auto-tuned alpha (arXiv 2403.20047); K+1 outputs."""

    def __init__(self, spec: LossSpec) -> None:
        super().__init__(
            num_classes=spec.num_classes,
            warmup_epochs=spec.warmup_epochs,
            total_epochs=spec.epochs,
            alpha_final=spec.alpha_final,
            rho=spec.rho,
            unknown_weight=spec.unknown_weight,
        )
        self.num_outputs = spec.num_classes + 1


class Reweight(Moon):
    """Wrong samples weigh 1 + alpha: Moon with u held at 0, so all that the unknown output adds is gone. K outputs.

    alpha has Moon's warm-up and schedule (its first value from mean(h), as (1 - u) h is h here).
    """

    def __init__(self, spec: LossSpec) -> None:
        super().__init__(spec)
        if spec.with_unknowns:
            raise TrainingError("Expected no synthetic unknowns with the loss reweight: it has no output for them.")
        self.num_outputs = spec.num_classes

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return super().forward(F.pad(logits, (0, 1), value=-1e4), target)  # exp(-1e4) is 0


class LogitNorm(CrossEntropy):
    """Cross entropy of logits / (temperature * ||logits||_2) (Wei et al., arXiv 2205.09310, equation 5).

    The network is judged by its plain logits, as the authors do. The loss does not see their scale, so ECE and NLL of
    such a network mean little.
    """

    def __init__(self, spec: LossSpec) -> None:
        super().__init__(spec)
        self.temperature = spec.logit_temperature

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return super().forward(F.normalize(logits, dim=1) / self.temperature, target)


LOSSES: dict[str, Callable[[LossSpec], nn.Module]] = {
    "ce": CrossEntropy,
    "moon": Moon,
    "reweight": Reweight,
    "logitnorm": LogitNorm,
}
