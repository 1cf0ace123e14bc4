"""Metrics of accuracy, calibration and detection: torchmetrics and scikit-learn, with the conventions fixed here.

In detection, unknown (OOD) is the positive class and a higher score means more unknown.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from uasparse_kernels.training.errors import TrainingError

ECE_BINS = 15
TEMPERATURES = 0.01, 100.0  # the bounds of the search, wider than what a network asks for


def classification_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy, ECE (15 equal-width bins of the confidence), NLL and Brier score, from logits [N, K or K+1].

    With K+1 outputs all are taken over all K+1: an image answered by "unknown" counts as wrong. Brier is the sum over
    the classes of (p - [class is right])^2, so from 0 to 2.
    """
    probabilities = logits.double().softmax(1)
    num_outputs = logits.shape[1]
    right = F.one_hot(labels, num_outputs)
    return {
        "accuracy": float(multiclass_accuracy(probabilities, labels, num_outputs, average="micro")),
        "ece": float(multiclass_calibration_error(probabilities, labels, num_outputs, n_bins=ECE_BINS, norm="l1")),
        "nll": float(F.cross_entropy(logits.double(), labels)),
        "brier": float((probabilities - right).square().sum(1).mean()),
    }


def scaled_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """ECE and NLL with a temperature (Guo et al., arXiv 1706.04599), and the temperature: what a wrong scale costs.

    Logits [N, K or K+1] are divided by the temperature at which other images' NLL is least: every second image is
    scaled by that of the rest, and the rest by theirs. `temperature` is the geometric mean of the two. Below 1 the
    network is less confident than it could be. A single image, which has no others, is left as it is.
    """
    scaled, temperatures = logits.double().clone(), []
    even, odd = slice(0, None, 2), slice(1, None, 2)
    for mine, others in ((even, odd), (odd, even)) if len(labels) > 1 else ():
        temperatures.append(_best_temperature(logits[others].double(), labels[others]))
        scaled[mine] /= temperatures[-1]
    metrics = classification_metrics(scaled, labels)
    return {
        "ece_scaled": metrics["ece"],
        "nll_scaled": metrics["nll"],
        "temperature": math.sqrt(math.prod(temperatures)),
    }


def detection_metrics(known: Tensor, unknown: Tensor) -> dict[str, float]:
    """How well scores tell unknown from known; scores [N] and [M], higher for unknown.

    auroc; fpr95: share of known images flagged when 95 % of the unknown are caught (unknown is positive);
    fpr95_known_positive: share of unknown images accepted when 95 % of the known are accepted (the other convention of
    the literature); aupr_out and aupr_in: average precision with unknown and with known as the positive class.
    OpenOOD and pytorch-ood add up trapezoids under the same curve instead, which is optimistic where many scores are
    equal (all equal: half of 1 + the share of positives, where average precision is the share itself).

    Raises TrainingError for empty or not finite scores.
    """
    for name, values in (("known", known), ("unknown", unknown)):
        if len(values) == 0 or not bool(torch.isfinite(values).all()):
            raise TrainingError(
                f"Expected finite scores of at least one {name} image, got {len(values)}, some not finite."
            )
    scores = torch.cat([known, unknown]).double().numpy()
    is_unknown = np.concatenate([np.zeros(len(known), int), np.ones(len(unknown), int)])
    return {
        "auroc": float(roc_auc_score(is_unknown, scores)),
        "fpr95": _fpr_at_tpr(is_unknown, scores),
        "fpr95_known_positive": _fpr_at_tpr(1 - is_unknown, -scores),
        "aupr_out": float(average_precision_score(is_unknown, scores)),
        "aupr_in": float(average_precision_score(1 - is_unknown, -scores)),
    }


def reliability(logits: Tensor, labels: Tensor) -> dict[str, list[float]]:
    """Confidence, accuracy and share of images in each of the 15 bins (empty bins: 0), for the diagram."""
    confidence, answer = logits.double().softmax(1).max(1)
    bins = (confidence * ECE_BINS).long().clamp(max=ECE_BINS - 1)
    count = torch.bincount(bins, minlength=ECE_BINS).double()

    def mean(values: Tensor) -> list[float]:
        return (torch.bincount(bins, values.double(), ECE_BINS) / count.clamp(min=1)).tolist()

    return {
        "confidence": mean(confidence),
        "accuracy": mean(answer == labels),
        "share": (count / count.sum()).tolist(),
    }


def _best_temperature(logits: Tensor, labels: Tensor) -> float:
    def nll(log_temperature: float) -> float:
        return float(F.cross_entropy(logits / math.exp(log_temperature), labels))

    low, high = map(math.log, TEMPERATURES)
    return math.exp(minimize_scalar(nll, bounds=(low, high), method="bounded").x)


def _fpr_at_tpr(positive: np.ndarray, scores: np.ndarray, tpr: float = 0.95) -> float:
    fprs, tprs, _ = roc_curve(positive, scores, drop_intermediate=False)
    return float(fprs[np.argmax(tprs >= tpr)])
