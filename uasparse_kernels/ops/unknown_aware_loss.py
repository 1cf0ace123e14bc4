"""Cross entropy over K + 1 classes that weighs wrong predictions more, less so where the network admits not to know."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from uasparse_kernels import _library
from uasparse_kernels.ops._common import transformed
from uasparse_kernels.ops._second import register_recomputed

_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
_LARGEST_UNKNOWN = 1 - 1e-7


def unknown_aware_loss(
    logits: Tensor,
    target: Tensor,
    alpha: float | Tensor,
    *,
    unknown_weight: float = 1.0,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor]:
    """The unknown-aware loss of MOON (arXiv 2403.20047), whose last class stands for "unknown".

    For a sample with ``p = softmax(logits)`` over the K + 1 outputs, target ``y``, ``h = -log p[y]`` and
    ``u = min(p[K], 1 - 1e-7)``, the loss is ``w * h`` with ``w = 1`` where the prediction (the first largest logit) is
    right, and ``w = 1 + alpha / (1 + alpha * u)`` where it is wrong. The gradient flows through ``u``, but not where
    ``h`` is infinite (a target logit of -inf); ``alpha`` is a constant. A sample of target K is a synthetic unknown:
    its loss is ``unknown_weight * h``.

    Args:
        logits: ``[N, K + 1]``, K >= 1, any floating-point dtype; the arithmetic is in float32 (float64 for float64).
        target: int64 ``[N]`` in ``[0, K]``.
        alpha: strength, >= 0; as a tensor of one element (of any device) it is not checked: nothing waits for it.
        unknown_weight: factor of the samples of target K, >= 0.
        reduction: "mean" divides the sum of all samples by N.

    Returns:
        ``loss``, float32 (float64 for float64), of shape ``[]`` (or ``[N]`` for "none"); for N = 0 its mean is nan, as
        that of ``torch.nn.functional.cross_entropy``. And ``threshold``: the mean of ``(1 - u) * h`` over the samples
        of known target, from which alpha is tuned; 0 where there are none; without gradient.

    Raises:
        ValueError, TypeError: if shapes, dtypes, devices or options do not fit.
        IndexError: if a target is out of range (on a GPU: a device-side assertion).
    """
    _check(logits, target, alpha, unknown_weight, reduction)
    if not _library.has_kernel("unknown_aware_loss", logits) or transformed() is not None:
        return unknown_aware_loss_reference(logits, target, alpha, unknown_weight=unknown_weight, reduction=reduction)
    dtype = _acc_dtype(logits)
    if isinstance(alpha, Tensor):
        alpha = alpha.detach().to(logits.device, dtype).reshape(())
    else:
        alpha = torch.full((), alpha, dtype=dtype, device=logits.device)
    loss, threshold, _ = torch.ops.uasparse.unknown_aware_loss.default(
        logits, target, alpha, float(unknown_weight), _REDUCTIONS[reduction]
    )
    return loss, threshold


def unknown_aware_loss_reference(
    logits: Tensor,
    target: Tensor,
    alpha: float | Tensor,
    *,
    unknown_weight: float = 1.0,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor]:
    """What :func:`unknown_aware_loss` computes, in plain torch; differentiable."""
    if isinstance(alpha, Tensor):
        alpha = alpha.detach().to(logits.device, _acc_dtype(logits)).reshape(())
    log_p = torch.log_softmax(logits.to(_acc_dtype(logits)), dim=1)
    h = -log_p.gather(1, target[:, None]).squeeze(1)
    u = log_p[:, -1].exp().clamp(max=_LARGEST_UNKNOWN)
    is_known = target != logits.shape[1] - 1
    correct = logits.argmax(1) == target
    w = torch.where(correct, torch.ones_like(u), 1 + alpha / (1 + alpha * u))
    w = torch.where(h.isinf(), w.detach(), w)
    losses = torch.where(is_known, w, torch.full_like(w, unknown_weight)) * h
    threshold = torch.where(is_known, (1 - u) * h, torch.zeros_like(h)).detach().sum() / is_known.sum().clamp(min=1)
    if reduction == "none":
        return losses, threshold
    return losses.mean() if reduction == "mean" else losses.sum(), threshold


def _acc_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _check(logits: Tensor, target: Tensor, alpha: float | Tensor, unknown_weight: float, reduction: str) -> None:
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ValueError(
            f"unknown_aware_loss: expected logits [N, K + 1] of K >= 1 known classes and the unknown one, got shape "
            f"{tuple(logits.shape)}."
        )
    if not logits.is_floating_point():
        raise TypeError(f"unknown_aware_loss: expected floating-point logits, got {logits.dtype}.")
    if tuple(target.shape) != tuple(logits.shape[:1]):
        raise ValueError(
            f"unknown_aware_loss: expected targets of shape ({logits.shape[0]},), got {tuple(target.shape)}."
        )
    if target.dtype != torch.int64:
        raise TypeError(f"unknown_aware_loss: expected int64 targets (class indices), got {target.dtype}.")
    if target.device != logits.device:
        raise ValueError(
            f"unknown_aware_loss: expected logits and targets on one device, got {logits.device} and {target.device}."
        )
    if isinstance(alpha, Tensor):
        if alpha.numel() != 1:
            raise ValueError(f"unknown_aware_loss: expected one alpha, got a tensor of shape {tuple(alpha.shape)}.")
    elif not (math.isfinite(alpha) and alpha >= 0):
        raise ValueError(f"unknown_aware_loss: expected a finite alpha >= 0, got {alpha}.")
    if not (math.isfinite(unknown_weight) and unknown_weight >= 0):
        raise ValueError(f"unknown_aware_loss: expected a finite unknown_weight >= 0, got {unknown_weight}.")
    if reduction not in _REDUCTIONS:
        raise ValueError(f"unknown_aware_loss: expected a reduction of {list(_REDUCTIONS)}, got {reduction!r}.")


@_library.register_fake("unknown_aware_loss")
def _fake(logits, target, alpha, unknown_weight, reduction):
    dtype = _acc_dtype(logits)
    loss = logits.new_empty((logits.shape[0],) if reduction == _REDUCTIONS["none"] else (), dtype=dtype)
    return loss, logits.new_empty((), dtype=dtype), logits.new_empty((logits.shape[0], 2), dtype=dtype)


@_library.register_fake("unknown_aware_loss_backward")
def _backward_fake(grad_loss, logits, target, alpha, saved, unknown_weight, reduction):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _gradients(grad_loss, logits, target, alpha, saved, unknown_weight, reduction):
    """What unknown_aware_loss_backward gives, in differentiable torch."""
    name = next(name for name, number in _REDUCTIONS.items() if number == reduction)
    options = {"unknown_weight": unknown_weight, "reduction": name}
    loss, _ = unknown_aware_loss_reference(logits, target, alpha, **options)
    return torch.autograd.grad(loss, logits, grad_loss, create_graph=True)


register_recomputed("unknown_aware_loss_backward", _gradients)
