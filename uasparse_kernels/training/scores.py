"""Scores for "is this input unknown?", higher means more unknown. A new score is one more entry of SCORES.

"combined", "combined-features" and "combined-all" join several. Those on class logits see the first K only. Post-hoc
detectors are pytorch-ood's (but Mahalanobis, which there cannot do with dead features), with the hyper-parameters of
their papers: nothing is tuned, and what has to be fitted is fitted on training images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import torch
from pytorch_ood.detector import KNN, ODIN, EnergyBased, Entropy, MaxLogit, MaxSoftmax
from torch import Tensor, nn

from uasparse_kernels.training.batches import Normalise
from uasparse_kernels.training.models import head_of

FIT_IMAGES = 10_000  # training images that KNN, Mahalanobis and ReAct are fitted on
KNN_NEIGHBOURS = 50  # the paper's choice for CIFAR-10
REACT_QUANTILE = 0.9  # of all activations, the paper's choice
DEAD_VARIANCE = 1e-10  # of the largest: below, a direction of the features is one that did not vary in fitting


@dataclass(frozen=True, eq=False)
class Outputs:
    """What one pass gives: logits [N, K or K+1] (float64), penultimate features [N, D] (float32), on the CPU."""

    logits: Tensor
    features: Tensor


@dataclass
class Judge:
    """A network with all that scoring needs: its images' normalisation and outputs on training images to fit on."""

    model: nn.Module
    normalise: Normalise
    num_classes: int
    fit: Outputs
    fit_labels: Tensor
    device: torch.device
    batch_size: int = 500
    scorers: dict[str, Callable[[Any], Tensor]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        normalise: Normalise,
        num_classes: int,
        images: Tensor,
        labels: Tensor,
        device: torch.device,
    ) -> Judge:
        """`images` (uint8) and `labels` are training images; the first FIT_IMAGES after a fixed shuffle are used."""
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:FIT_IMAGES]
        fit = collect(model, images[order], normalise, device)
        return cls(model.eval(), normalise, num_classes, fit, labels[order], device)

    def scorer(self, name: str) -> Callable[[Any], Tensor]:
        """A score by its name: fitted once, and of outputs that it just had (combined scores ask again) remembered."""
        if name not in self.scorers:
            score = SCORES[name].make(self)
            self.scorers[name] = lru_cache(maxsize=2)(score) if SCORES[name].takes == "outputs" else score
        return self.scorers[name]

    def outputs(self, images: Tensor) -> Outputs:
        return collect(self.model, images, self.normalise, self.device, self.batch_size)

    def batches(self, images: Tensor) -> Iterator[Tensor]:
        for part in images.split(self.batch_size):
            yield self.normalise(part.to(self.device))


@torch.no_grad()
def collect(
    model: nn.Module, images: Tensor, normalise: Normalise, device: torch.device | str, batch_size: int = 500
) -> Outputs:
    """Runs uint8 images [N, C, H, W] through the network in eval mode; features are the input of its last layer."""
    features: list[Tensor] = []
    hook = head_of(model).register_forward_pre_hook(lambda _, inputs: features.append(inputs[0].float().cpu()))
    try:
        model.eval()
        logits = [model(normalise(part.to(device))).double().cpu() for part in images.split(batch_size)]
    finally:
        hook.remove()
    return Outputs(torch.cat(logits), torch.cat(features))


def unknown_log_odds(logits: Tensor, num_classes: int) -> Tensor:
    """log(u / (1 - u)) from logits [N, K+1]: the ranking of u, without its rounding to 0 on known images."""
    return logits[:, num_classes] - logits[:, :num_classes].logsumexp(1)


def moon_score(logits: Tensor, num_classes: int) -> Tensor:
    """1 - max_{k<K} p[k], p the softmax over all K+1 outputs (arXiv 2403.20047): u lowers the confidence."""
    return 1 - logits.softmax(1)[:, :num_classes].amax(1)


def _knn(judge: Judge) -> Callable[[Outputs], Tensor]:
    neighbours = min(KNN_NEIGHBOURS, len(judge.fit_labels))
    detector = KNN(None, k=neighbours).fit_features(judge.fit.features, judge.fit_labels)
    return lambda outputs: detector.predict_features(outputs.features)


def _mahalanobis(judge: Judge) -> Callable[[Outputs], Tensor]:
    """Half the squared Mahalanobis distance to the nearest class mean (Lee et al., arXiv 1807.03888, equation 2).

    The scatter about the class means is summed, not averaged, and inverted by its pseudo-inverse, as OpenOOD does: a
    direction in which the features did not vary in fitting (a dead unit, of which sparse networks have some) counts
    nothing. The study's stored runs were scored with pytorch-ood's inverse of the sum plus 1e-6: equal but for such
    directions, of which a thousandth moved the score by ten thousands.
    """
    features, labels = judge.fit.features.double(), judge.fit_labels
    means = torch.stack([features[labels == k].mean(0) for k in labels.unique()])
    centred = features - means[labels.unique(return_inverse=True)[1]]
    variances, directions = torch.linalg.eigh(centred.T @ centred)
    alive = variances > DEAD_VARIANCE * variances[-1]
    whitening = directions[:, alive] / variances[alive].sqrt()

    def score(outputs: Outputs) -> Tensor:
        white = outputs.features.double() @ whitening
        return torch.stack([(white - mean).square().sum(1) / 2 for mean in means @ whitening]).amin(0).float()

    return score


def _combined(names: Sequence[str]) -> Callable[[Judge], Callable[[Outputs], Tensor]]:
    """The largest of several scores, each standardised by its mean and deviation on training images.

    No OOD data and no weight to choose: each score counts in units of its spread on known images, and an image is as
    unknown as the score that finds it strangest says: u or the features for far-OOD, the energy for what lies between
    the classes. Scores of the unknown output are left out for a network without it.
    """

    def make(judge: Judge) -> Callable[[Outputs], Tensor]:
        has_unknown = judge.fit.logits.shape[1] > judge.num_classes
        parts = [judge.scorer(n) for n in names if has_unknown or not SCORES[n].needs_unknown_output]
        fitted = [part(judge.fit).double() for part in parts]
        scale = [(values.mean(), values.std().clamp(min=1e-12)) for values in fitted]

        def score(outputs: Outputs) -> Tensor:
            standardised = [(p(outputs).double() - mean) / std for p, (mean, std) in zip(parts, scale, strict=True)]
            return torch.stack(standardised).amax(0)

        return score

    return make


def _react(judge: Judge) -> Callable[[Outputs], Tensor]:
    """Energy with penultimate features clipped at a quantile (ReAct, on features that are there already)."""
    threshold = judge.fit.features.flatten().kthvalue(int(REACT_QUANTILE * judge.fit.features.numel())).values
    head = head_of(judge.model)

    @torch.no_grad()
    def score(outputs: Outputs) -> Tensor:
        clipped = outputs.features.clamp(max=threshold).to(judge.device)
        return EnergyBased.score(head(clipped)[:, : judge.num_classes].double()).cpu()

    return score


def _odin(judge: Judge) -> Callable[[Tensor], Tensor]:
    class_logits = _ClassLogits(judge.model, judge.num_classes)
    detector = ODIN(class_logits, norm_std=list(judge.normalise.std))
    return lambda images: torch.cat([detector.predict(x).cpu() for x in judge.batches(images)])


class _ClassLogits(nn.Module):
    """The first K outputs of a network, in float64 so that a temperature of 1000 leaves no ties."""

    def __init__(self, model: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.model, self.num_classes = model, num_classes

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)[:, : self.num_classes].double()


@dataclass(frozen=True)
class Score:
    """`make(judge)` gives a function of Outputs, or of uint8 images where `takes` says so."""

    make: Callable[[Judge], Callable[[Any], Tensor]]
    title: str
    takes: Literal["outputs", "images"] = "outputs"
    needs_unknown_output: bool = False


def _on_class_logits(score: Callable[[Tensor], Tensor]) -> Callable[[Judge], Callable[[Outputs], Tensor]]:
    return lambda judge: lambda outputs: score(outputs.logits[:, : judge.num_classes])


def _on_all_logits(score: Callable[[Tensor, int], Tensor]) -> Callable[[Judge], Callable[[Outputs], Tensor]]:
    return lambda judge: lambda outputs: score(outputs.logits, judge.num_classes)


SCORES: dict[str, Score] = {
    "moon": Score(_on_all_logits(moon_score), "MOON: 1 - max p", needs_unknown_output=True),
    "u": Score(_on_all_logits(unknown_log_odds), "u: log-odds of unknown", needs_unknown_output=True),
    "msp": Score(_on_class_logits(MaxSoftmax.score), "MSP"),
    "maxlogit": Score(_on_class_logits(MaxLogit.score), "MaxLogit"),
    "energy": Score(_on_class_logits(EnergyBased.score), "Energy"),
    "entropy": Score(_on_class_logits(Entropy.score), "Entropy"),
    "odin": Score(_odin, "ODIN", takes="images"),
    "react": Score(_react, "ReAct"),
    "knn": Score(_knn, "KNN"),
    "mahalanobis": Score(_mahalanobis, "Mahalanobis"),
    "combined": Score(_combined(("u", "energy")), "max of u, energy", needs_unknown_output=True),
    "combined-features": Score(_combined(("u", "energy", "mahalanobis")), "max of (u,) energy, Mahalanobis"),
    "combined-all": Score(_combined(("u", "energy", "mahalanobis", "knn")), "max of (u,) energy, Mahalanobis, KNN"),
}
CHEAP_SCORES = ("moon", "u", "msp", "maxlogit", "energy", "entropy")
