"""The unknown-aware loss with its auto-tuned strength."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from uasparse_kernels import ops
from uasparse_kernels.ops._common import check_are_tensors


class UnknownAwareLoss(nn.Module):
    """Loss over K known classes and one output for "unknown", with a strength alpha that rises during training.

    The loss is :func:`uasparse_kernels.ops.unknown_aware_loss`. During the warm-up alpha is 0, and it is cross entropy
    over K+1 outputs. Every training step, also of the warm-up, updates a running mean ``a`` of the loss's threshold:
    ``a <- 0.05 * threshold + 0.95 * a``, starting at the first value; a threshold that is not finite is skipped. A
    training step is a call in training mode whose logits require gradients, so that validation does not change the
    mean; one that ``torch.utils.checkpoint`` repeats in the backward pass is one step. After the warm-up alpha starts
    at ``a / rho`` and rises by the same amount each epoch, to ``alpha_final`` in the last one. Call :meth:`step_epoch`
    after each epoch. Nothing here waits for the device.

    With ``total_steps``, for a short fine-tuning, alpha rises at every training step instead. The loss counts the steps
    itself (every micro-batch is one), and you need not call anything.

    Source: Lei et al., "Embracing Unknown Step by Step", arXiv 2403.20047; the schedule after Thulasidasan et al.,
    "Combating Label Noise in Deep Learning Using Abstention", arXiv 1905.10964.

    Args:
        num_classes: K; the logits have K+1 columns. Target K marks a synthetic unknown.
        warmup_epochs: epochs of plain cross entropy, at least 1; 5 by default.
        total_epochs: epochs of the whole training, more than ``warmup_epochs``; 100 by default.
        total_steps: training steps of the whole training, more than ``warmup_steps``, instead of epochs.
        warmup_steps: training steps of plain cross entropy, at least 1; by default a twentieth of all.
        alpha_final: alpha in the last epoch or step.
        rho: divisor of the first alpha.
        unknown_weight: weight of samples with target K.
        reduction: "mean", "sum" or "none".
        label_smoothing, ignore_index, weight: as for the op, and for ``nn.CrossEntropyLoss`` (but no index is ignored
            unless it is named); ``weight`` is a buffer.
        process_group: of processes that train one model, each on its part of a batch. The running mean is then of the
            threshold over all of them, as if one process had the whole batch; without, each process has its own alpha.

    Shapes: logits ``[N, K+1]`` or ``[N, K+1, d1, ...]`` of any floating-point dtype; target int64 ``[N]`` or
        ``[N, d1, ...]``, or probabilities of the logits' shape -> scalar, or one loss a target for "none".
    """

    average: Tensor
    alpha: Tensor
    alpha_start: Tensor
    steps: Tensor
    weight: Tensor | None

    def __init__(
        self,
        num_classes: int,
        *,
        warmup_epochs: int | None = None,
        total_epochs: int | None = None,
        total_steps: int | None = None,
        warmup_steps: int | None = None,
        alpha_final: float = 1.0,
        rho: float = 64.0,
        unknown_weight: float = 1.0,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        ignore_index: int | None = None,
        weight: Tensor | None = None,
        process_group: Any = None,
    ):
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"Expected num_classes >= 1, got {num_classes}.")
        by_epochs = warmup_epochs is not None or total_epochs is not None
        if (total_steps is not None and by_epochs) or (total_steps is None and warmup_steps is not None):
            raise ValueError(
                "Expected total_steps, with or without warmup_steps, or epochs (warmup_epochs, total_epochs), and no "
                "mixture of both."
            )
        if total_steps is None:
            warmup_epochs = 5 if warmup_epochs is None else warmup_epochs
            total_epochs = 100 if total_epochs is None else total_epochs
            if not 1 <= warmup_epochs < total_epochs:
                raise ValueError(f"Expected 1 <= warmup_epochs < total_epochs, got {warmup_epochs} and {total_epochs}.")
        else:
            warmup_steps = max(1, total_steps // 20) if warmup_steps is None else warmup_steps
            if not 1 <= warmup_steps < total_steps:
                raise ValueError(f"Expected 1 <= warmup_steps < total_steps, got {warmup_steps} and {total_steps}.")
        if not (0 <= alpha_final < math.inf and 0 < rho < math.inf):
            raise ValueError(f"Expected a finite alpha_final >= 0 and rho > 0, got {alpha_final} and {rho}.")
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f'Expected reduction "mean", "sum" or "none", got {reduction!r}.')
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"Expected label_smoothing in [0, 1], got {label_smoothing}.")
        if weight is not None and not (isinstance(weight, Tensor) and tuple(weight.shape) == (num_classes + 1,)):
            given = tuple(weight.shape) if isinstance(weight, Tensor) else f"a {type(weight).__name__}"
            raise ValueError(
                f"Expected a tensor with the weights of {num_classes + 1} classes, the unknown one last, got {given}."
            )
        self.num_classes, self.warmup_epochs, self.total_epochs = num_classes, warmup_epochs, total_epochs
        self.warmup_steps, self.total_steps = warmup_steps, total_steps
        self.alpha_final, self.rho = alpha_final, rho
        self.unknown_weight, self.reduction = unknown_weight, reduction
        self.label_smoothing, self.ignore_index = label_smoothing, ignore_index
        self.process_group = process_group
        self.epoch = 0
        # Not finite until the first step whose threshold is.
        self.register_buffer("average", torch.tensor(float("nan")))
        self.register_buffer("alpha_start", torch.tensor(0.0))
        self.register_buffer("alpha", torch.tensor(0.0))
        self.register_buffer("weight", weight)
        if total_steps is not None:
            self.register_buffer("steps", torch.tensor(0))

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        check_are_tensors("UnknownAwareLoss", logits=logits, target=target)
        if logits.dim() < 2 or logits.shape[1] != self.num_classes + 1:
            raise ValueError(
                f"Expected logits [N, {self.num_classes + 1}] or [N, {self.num_classes + 1}, d1, ...] "
                f"({self.num_classes} classes and the unknown output), got {tuple(logits.shape)}; build the model with "
                "num_classes + 1 outputs."
            )
        is_step = self.training and torch.is_grad_enabled() and logits.requires_grad and not _is_repeated()
        alpha = self.alpha
        if is_step and self.total_steps is not None:
            self._set_alpha()
            alpha = self.alpha.clone()  # the next step may come before this one's backward pass
        loss, threshold = ops.unknown_aware_loss(
            logits,
            target,
            alpha,
            unknown_weight=self.unknown_weight,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            weight=self.weight,
        )
        if is_step:
            if self.total_steps is not None:
                self.steps += 1  # not where the loss was refused
            # Few calls, as on a small batch they cost as much as the loss. A threshold is no less than 0 and has no
            # gradient. Where the running mean is not finite, one of the two is not: the other stands for it.
            average, threshold = self.average, threshold.to(self.average.dtype)
            if self.process_group is not None:
                threshold = self._of_all_processes(threshold, target)
            running = torch.lerp(average, threshold, 0.05)
            average.copy_(torch.where(running < math.inf, running, torch.fmin(average, threshold)))
        return loss

    @torch.no_grad()
    def _of_all_processes(self, threshold: Tensor, target: Tensor) -> Tensor:
        """The mean over the known samples of all processes; 0 where there are none, as for one process."""
        if target.is_floating_point():
            known = target[:, : self.num_classes].sum().to(threshold)
        else:
            counts = target < self.num_classes
            if self.ignore_index is not None:
                counts = counts & (target != self.ignore_index)
            known = counts.sum().to(threshold)
        sums = torch.stack([threshold * known, known])
        torch.distributed.all_reduce(sums, group=self.process_group)
        return sums[0] / sums[1].clamp(min=1)

    @torch.no_grad()
    def step_epoch(self) -> None:
        """Ends an epoch: counts it and, unless the schedule goes by steps, sets alpha for the next one."""
        self.epoch += 1
        if self.total_epochs is None or self.warmup_epochs is None:
            return
        after_warmup = self.epoch - self.warmup_epochs
        if after_warmup < 0:
            return
        if after_warmup == 0:
            # No step before the warm-up's end leaves nothing to start from: alpha stays 0.
            self.alpha_start.copy_((self.average / self.rho).nan_to_num(0.0, 0.0))
        share = min(1.0, after_warmup / max(1, self.total_epochs - 1 - self.warmup_epochs))
        self.alpha.copy_(torch.lerp(self.alpha_start, torch.full_like(self.alpha, self.alpha_final), share))

    @torch.no_grad()
    def _set_alpha(self) -> None:
        """Sets a training step's alpha, all on the device."""
        assert self.total_steps is not None and self.warmup_steps is not None
        after_warmup = self.steps - self.warmup_steps
        self.alpha_start.copy_(
            torch.where(after_warmup == 0, (self.average / self.rho).nan_to_num(0.0, 0.0), self.alpha_start)
        )
        share = (after_warmup / max(1, self.total_steps - 1 - self.warmup_steps)).clamp(0, 1).to(self.alpha.dtype)
        alpha = torch.lerp(self.alpha_start, torch.full_like(self.alpha, self.alpha_final), share)
        self.alpha.copy_(torch.where(after_warmup < 0, 0.0, alpha))

    def get_extra_state(self) -> dict[str, Any]:
        return {"epoch": self.epoch}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.epoch = state["epoch"]

    def extra_repr(self) -> str:
        by = "epochs" if self.total_steps is None else "steps"
        text = f"num_classes={self.num_classes}, " + "".join(
            f"{name}_{by}={getattr(self, f'{name}_{by}')}, " for name in ("warmup", "total")
        )
        text += f"alpha_final={self.alpha_final}, rho={self.rho}, unknown_weight={self.unknown_weight}"
        for name, default in (("label_smoothing", 0.0), ("ignore_index", None)):
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        return text


def _is_repeated() -> bool:
    """Whether this is a call again, in a backward pass, of what a checkpoint called before (with ``use_reentrant=True``
    the first call records nothing, and is none of training; the second has no hooks)."""
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
        return False
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
