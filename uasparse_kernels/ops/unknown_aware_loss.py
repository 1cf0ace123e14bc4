"""Cross entropy over K + 1 classes that weighs wrong predictions more, less so where the network admits not to know."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from uasparse_kernels import _library
from uasparse_kernels.ops._common import check_are_tensors, transformed
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
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The unknown-aware loss of MOON (arXiv 2403.20047), whose last class stands for "unknown".

    For a sample with ``p = softmax(logits)`` over the K + 1 outputs, target ``y``, ``h = -log p[y]`` and
    ``u = min(p[K], 1 - 1e-7)``, the loss is ``w * h`` with ``w = 1`` where the prediction (the first largest logit) is
    right, and ``w = 1 + alpha / (1 + alpha * u)`` where it is wrong. The gradient flows through ``u``, but not where
    ``h`` is infinite (a target logit of -inf); ``alpha`` is a constant. A sample of target K is a synthetic unknown:
    its loss is ``unknown_weight * h``.

    The other options are those of ``torch.nn.functional.cross_entropy``, which it equals where ``alpha`` is 0 and
    ``unknown_weight`` 1: class weights and label smoothing change ``h``, and the loss of a soft target (mixup, CutMix)
    is the mixture of the losses of its classes, ``sum_k target[k] * loss(k)``. Smoothing gives the unknown output its
    share ``label_smoothing / (K + 1)`` of every sample. Such options run in plain torch, the others in one kernel.

    Args:
        logits: ``[N, K + 1]`` or ``[N, K + 1, d1, ...]`` (pixels), K >= 1, any floating-point dtype; the arithmetic is
            in float32 (float64 for float64).
        target: int64 ``[N]`` or ``[N, d1, ...]`` in ``[0, K]``; or probabilities, floating point of the shape of the
            logits, which sum to 1 over the classes (not checked).
        alpha: strength, >= 0; as a tensor of one element (of any device) it is not checked: nothing waits for it.
        unknown_weight: factor of the samples of target K, >= 0.
        reduction: "mean" divides the sum by the number of samples that are not ignored, with ``weight`` by the sum of
            their targets' weights (soft targets: always by the number).
        label_smoothing: in [0, 1].
        ignore_index: samples of this target do not count, in the threshold neither; None: there are none. Not for soft
            targets.
        weight: of each class, ``[K + 1]``, the last that of "unknown".

    Returns:
        ``loss``, float32 (float64 for float64), of shape ``[]`` (or that of the samples for "none"); the mean of no
        samples is nan, as that of ``torch.nn.functional.cross_entropy``. And ``threshold``: the mean of ``(1 - u) * h``
        over the samples of known target (soft ones by their known shares; ``h`` without weights and smoothing), from
        which alpha is tuned; 0 where there are none; without gradient.

    Raises:
        ValueError, TypeError: if shapes, dtypes, devices or options do not fit.
        IndexError: if a target is out of range (on a GPU: a device-side assertion).
    """
    _check(logits, target, alpha, unknown_weight, reduction)
    _check_options(logits, target, label_smoothing, ignore_index, weight)
    is_plain = not target.is_floating_point() and label_smoothing == 0 and weight is None
    if not is_plain or not _library.has_kernel("unknown_aware_loss", logits) or transformed() is not None:
        if transformed() is None:  # a look at values, which a transform has not
            _check_range(logits, target, ignore_index)
        return unknown_aware_loss_reference(
            logits,
            target,
            alpha,
            unknown_weight=unknown_weight,
            reduction=reduction,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            weight=weight,
        )
    dtype = _acc_dtype(logits)
    if isinstance(alpha, Tensor):
        alpha = alpha.detach().to(logits.device, dtype).reshape(())
    else:
        alpha = torch.full((), alpha, dtype=dtype, device=logits.device)
    shape, rows, flat = target.shape, _rows(logits), target.reshape(-1)
    if ignore_index is None:
        loss, threshold, _ = torch.ops.uasparse.unknown_aware_loss.default(
            rows, flat, alpha, float(unknown_weight), _REDUCTIONS[reduction]
        )
        return loss.view(shape) if reduction == "none" else loss, threshold
    # As synthetic unknowns, ignored samples have no part in the threshold; their losses are left out.
    counts = flat != ignore_index
    losses, threshold, _ = torch.ops.uasparse.unknown_aware_loss.default(
        rows, torch.where(counts, flat, rows.shape[1] - 1), alpha, float(unknown_weight), _REDUCTIONS["none"]
    )
    return _reduce(torch.where(counts, losses, 0), counts.sum(), reduction, shape), threshold


def unknown_aware_loss_reference(
    logits: Tensor,
    target: Tensor,
    alpha: float | Tensor,
    *,
    unknown_weight: float = 1.0,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What :func:`unknown_aware_loss` computes, in plain torch; differentiable."""
    if isinstance(alpha, Tensor):
        alpha = alpha.detach().to(logits.device, _acc_dtype(logits)).reshape(())
    z = _rows(logits).to(_acc_dtype(logits))
    classes = z.shape[1]
    h = -torch.log_softmax(z, dim=1)
    u = (-h[:, -1:]).exp().clamp(max=_LARGEST_UNKNOWN)
    # Every target as probabilities; those of an ignored sample are all zero.
    if target.is_floating_point():
        shape, t = (logits.shape[0], *logits.shape[2:]), _rows(target).to(z.dtype)
        count = torch.full((), t.shape[0], dtype=z.dtype, device=z.device)
    else:
        shape, y = tuple(target.shape), target.reshape(-1, 1)
        counts = torch.ones_like(y, dtype=torch.bool) if ignore_index is None else y != ignore_index
        y = torch.where(counts, y, 0)
        t = torch.zeros_like(z).scatter(1, y, counts.to(z.dtype))
        count = (counts if weight is None else weight.to(z)[y] * counts).sum()
    # Of each class, as if it were the target: its cross entropy, smoothed, and the factor of that.
    cross_entropy = h if weight is None else h * weight.to(z)
    if label_smoothing:
        smooth = cross_entropy.mean(1, keepdim=True)
        cross_entropy = (1 - label_smoothing) * cross_entropy + label_smoothing * smooth
    index = torch.arange(classes, device=z.device)
    w = torch.where(index == z.argmax(1, keepdim=True), 1.0, 1 + alpha / (1 + alpha * u))
    w = torch.where(index == classes - 1, unknown_weight, w)
    finite = cross_entropy.isfinite()
    w = torch.where(finite, w, w.detach())
    losses = torch.where(finite | (t != 0), t * w * cross_entropy, 0).sum(1)  # what is no target may be infinite
    known = t[:, :-1].detach()
    threshold = torch.where(known > 0, (1 - u) * known * h[:, :-1], 0).detach().sum()  # an unknown's may be nan
    share = known.sum()
    threshold = torch.where(share > 0, threshold / torch.where(share > 0, share, 1), 0)
    return _reduce(losses, count, reduction, shape), threshold


def _rows(tensor: Tensor) -> Tensor:
    """``[N, C, d1, ...]`` as ``[N * d1 * ..., C]``."""
    return tensor if tensor.dim() == 2 else tensor.movedim(1, -1).reshape(-1, tensor.shape[1])


def _reduce(losses: Tensor, count: Tensor, reduction: str, shape: Sequence[int]) -> Tensor:
    if reduction == "none":
        return losses.view(shape)
    return losses.sum() / count if reduction == "mean" else losses.sum()


def _acc_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _check(logits: Tensor, target: Tensor, alpha: float | Tensor, unknown_weight: float, reduction: str) -> None:
    check_are_tensors("unknown_aware_loss", logits=logits, target=target)
    if logits.dim() < 2 or logits.shape[1] < 2:
        raise ValueError(
            f"unknown_aware_loss: expected logits [N, K + 1] or [N, K + 1, d1, ...] of K >= 1 known classes and the "
            f"unknown one, got shape {tuple(logits.shape)}."
        )
    if not logits.is_floating_point():
        raise TypeError(f"unknown_aware_loss: expected floating-point logits, got {logits.dtype}.")
    samples = (logits.shape[0], *logits.shape[2:])
    if tuple(target.shape) != (tuple(logits.shape) if target.is_floating_point() and target.dim() > 1 else samples):
        raise ValueError(
            f"unknown_aware_loss: expected int64 targets of shape {samples}, or probabilities of the logits' shape "
            f"{tuple(logits.shape)}, got shape {tuple(target.shape)} of {target.dtype}."
        )
    if target.shape != logits.shape and target.dtype != torch.int64:
        raise TypeError(
            f"unknown_aware_loss: expected int64 targets (class indices) or probabilities, got {target.dtype}."
        )
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


def _check_options(
    logits: Tensor, target: Tensor, label_smoothing: float, ignore_index: int | None, weight: Tensor | None
) -> None:
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"unknown_aware_loss: expected label_smoothing in [0, 1], got {label_smoothing}.")
    if ignore_index is not None and target.is_floating_point():
        raise ValueError("unknown_aware_loss: expected no ignore_index for soft targets; give such samples zeros.")
    if weight is None:
        return
    if tuple(weight.shape) != tuple(logits.shape[1:2]) or not weight.is_floating_point():
        raise ValueError(
            f"unknown_aware_loss: expected a floating-point weight of each of the {logits.shape[1]} classes, the "
            f"unknown one last, got shape {tuple(weight.shape)} of {weight.dtype}."
        )
    if weight.device != logits.device:
        raise ValueError(
            f"unknown_aware_loss: expected logits and weight on one device, got {logits.device} and {weight.device}."
        )


def _check_range(logits: Tensor, target: Tensor, ignore_index: int | None) -> None:
    """Of targets that can be looked at without waiting, or leaving a graph."""
    if target.is_floating_point() or target.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if torch._C._functorch.is_functorch_wrapped_tensor(target) or isinstance(target, FakeTensor):
        return
    wrong = (target < 0) | (target >= logits.shape[1])
    if ignore_index is not None:
        wrong &= target != ignore_index
    if bool(wrong.any()):
        raise IndexError(
            f"unknown_aware_loss: expected targets in [0, {logits.shape[1] - 1}], got {int(target[wrong][0])}"
            + ("." if ignore_index is not None else "; ignore_index= names one that does not count.")
        )


@_library.register_fake("unknown_aware_loss")
def _fake(logits, target, alpha, unknown_weight, reduction):
    dtype = _acc_dtype(logits)
    loss = logits.new_empty((logits.shape[0],) if reduction == _REDUCTIONS["none"] else (), dtype=dtype)
    return loss, logits.new_empty((), dtype=dtype), logits.new_empty((logits.shape[0], 2), dtype=dtype)


@_library.register_fake("unknown_aware_loss_at_once")
def _at_once_fake(logits, target, alpha, unknown_weight, reduction):
    loss, threshold, saved = _fake(logits, target, alpha, unknown_weight, reduction)
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    return loss, threshold, saved.new_empty((logits.shape[0], 3)), grad


@_library.register_fake("unknown_aware_loss_put_right_")
def _put_right_fake(grad, grad_loss, logits, target, alpha, saved, unknown_weight, reduction):
    return None


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
