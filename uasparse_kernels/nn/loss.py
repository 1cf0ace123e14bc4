"""The unknown-aware loss with its auto-tuned strength."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from uasparse_kernels import ops


class UnknownAwareLoss(nn.Module):
    """Loss over K known classes and one output for "unknown", its strength alpha tuned during training.

    The loss is :func:`uasparse_kernels.ops.unknown_aware_loss`. During ``warmup_epochs`` alpha is 0: cross entropy over
    K+1 outputs. At every training step, warm-up included, a running mean ``a`` of the loss's threshold is kept
    (``a <- 0.05 * threshold + 0.95 * a``, starting at the first value; one that is not finite counts nothing). A
    training step is a call in training mode whose logits require gradients: validation leaves the mean alone. After the
    warm-up alpha starts at ``a / rho`` and rises by the same amount each epoch, so that it is ``alpha_final`` in the
    last one. Call :meth:`step_epoch` after each epoch. Nothing here waits for the device.

    Source: Lei et al., "Embracing Unknown Step by Step", arXiv 2403.20047; the schedule after Thulasidasan et al.,
    "Combating Label Noise in Deep Learning Using Abstention", arXiv 1905.10964.

    Args:
        num_classes: K; the logits have K+1 columns. Target K marks a synthetic unknown.
        warmup_epochs: epochs of plain cross entropy, at least 1.
        total_epochs: epochs of the whole training, more than ``warmup_epochs``.
        alpha_final: alpha in the last epoch.
        rho: divisor of the first alpha.
        unknown_weight: weight of samples with target K.
        reduction: "mean", "sum" or "none".

    Shapes: logits ``[N, K+1]`` of any floating-point dtype, target ``[N]`` int64 -> scalar, or ``[N]`` for "none".
    """

    average: Tensor
    alpha: Tensor
    alpha_start: Tensor

    def __init__(
        self,
        num_classes: int,
        *,
        warmup_epochs: int = 5,
        total_epochs: int = 100,
        alpha_final: float = 1.0,
        rho: float = 64.0,
        unknown_weight: float = 1.0,
        reduction: str = "mean",
    ):
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"Expected num_classes >= 1, got {num_classes}.")
        if not 1 <= warmup_epochs < total_epochs:
            raise ValueError(f"Expected 1 <= warmup_epochs < total_epochs, got {warmup_epochs} and {total_epochs}.")
        if alpha_final < 0 or rho <= 0:
            raise ValueError(f"Expected alpha_final >= 0 and rho > 0, got {alpha_final} and {rho}.")
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f'Expected reduction "mean", "sum" or "none", got {reduction!r}.')
        self.num_classes, self.warmup_epochs, self.total_epochs = num_classes, warmup_epochs, total_epochs
        self.alpha_final, self.rho = alpha_final, rho
        self.unknown_weight, self.reduction = unknown_weight, reduction
        self.epoch = 0
        # NaN until the first step.
        self.register_buffer("average", torch.tensor(float("nan")))
        self.register_buffer("alpha_start", torch.tensor(0.0))
        self.register_buffer("alpha", torch.tensor(0.0))

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        if logits.dim() != 2 or logits.shape[1] != self.num_classes + 1:
            raise ValueError(
                f"Expected logits [N, {self.num_classes + 1}] ({self.num_classes} classes and the unknown output), got "
                f"{tuple(logits.shape)}; build the model with num_classes + 1 outputs."
            )
        loss, threshold = ops.unknown_aware_loss(
            logits, target, self.alpha, unknown_weight=self.unknown_weight, reduction=self.reduction
        )
        if self.training and torch.is_grad_enabled() and logits.requires_grad:
            with torch.no_grad():
                # Few calls: on a small batch they cost as much as the loss.
                threshold = threshold.to(self.average.dtype)
                before = torch.where(self.average == self.average, self.average, threshold)
                running = torch.lerp(before, threshold, 0.05)
                # A threshold is no less than 0: below infinity, it is finite.
                self.average.copy_(torch.where(threshold < math.inf, running, self.average))
        return loss

    @torch.no_grad()
    def step_epoch(self) -> None:
        """Ends an epoch: counts it and sets alpha for the next one."""
        self.epoch += 1
        after_warmup = self.epoch - self.warmup_epochs
        if after_warmup < 0:
            return
        if after_warmup == 0:
            # No step before the warm-up's end leaves nothing to start from: alpha stays 0.
            self.alpha_start.copy_((self.average / self.rho).nan_to_num(0.0))
        share = min(1.0, after_warmup / max(1, self.total_epochs - 1 - self.warmup_epochs))
        self.alpha.copy_(torch.lerp(self.alpha_start, torch.full_like(self.alpha, self.alpha_final), share))

    def get_extra_state(self) -> dict[str, Any]:
        return {"epoch": self.epoch}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.epoch = state["epoch"]

    def extra_repr(self) -> str:
        return (
            f"num_classes={self.num_classes}, warmup_epochs={self.warmup_epochs}, total_epochs={self.total_epochs}, "
            f"alpha_final={self.alpha_final}, rho={self.rho}, unknown_weight={self.unknown_weight}"
        )
