"""Scores for "is this input unknown?", higher means more unknown. A new score is one more entry of SCORES.

Those named "combined" join several. Those on class logits see the first K only. Post-hoc detectors are pytorch-ood's
(except Mahalanobis, its kin and fDBD, which fail there on dead features or equal rows of a sparse head), with the
hyper-parameters of their papers: nothing is tuned, and what has to be fitted is fitted on training images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

import torch
from pytorch_ood.detector import GEN, KNN, ODIN, EnergyBased, Entropy, MaxLogit, MaxSoftmax, ViM
from pytorch_ood.detector.ash import ash_s
from torch import Tensor, nn
from torch.nn import functional as F

import uasparse_kernels as ua
from uasparse_kernels.unknowns.errors import UnknownsError
from uasparse_kernels.unknowns.head import head_of, logits_and_features

FIT_IMAGES = 10_000  # training images that KNN, Mahalanobis and ReAct are fitted on
KNN_NEIGHBOURS = 50  # the paper's choice for CIFAR-10
REACT_QUANTILE = 0.9  # of all activations, the paper's choice
ASH_PRUNED = 0.65  # share of an image's features that ASH-S sets to zero: the least that its paper tries
DEAD_VARIANCE = 1e-10  # of the largest: below, a direction of the features is one that did not vary in fitting


Normalise = Callable[[Tensor], Tensor]  # makes a network's input of images as they are held


@dataclass(frozen=True, eq=False)
class Outputs:
    """What one pass gives: logits [N, K or K+1] (float64), penultimate features [N, D] (float32), on the CPU."""

    logits: Tensor
    features: Tensor


@dataclass
class Judge:
    """A network with what scoring needs: its normalisation of images, and outputs on training images to fit on.

    `normalise` is called on images [N, C, H, W] and gives the network's input (`lambda x: x` if they already are). If
    it divides channels, its attribute `std` says by what: ODIN takes its step in pixels.
    """

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
        device: torch.device | str = "cpu",
    ) -> Judge:
        """`images` and `labels` are training images; the first FIT_IMAGES after a fixed shuffle are used.

        Raises UnknownsError for fewer than two, labels that are no classes, and a network of other outputs than K or
        K + 1.
        """
        if len(images) < 2 or labels.shape != (len(images),) or labels.is_floating_point():
            raise UnknownsError(
                f"Expected two images or more, and a class for each, got images {list(images.shape)} and labels "
                f"{list(labels.shape)} of {labels.dtype}."
            )
        if not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
            raise UnknownsError(
                f"Expected classes from 0 to {num_classes - 1}, got {int(labels.min())} to {int(labels.max())}."
            )
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:FIT_IMAGES]
        fit = collect(model, images[order], normalise, device)
        if fit.logits.shape[1] not in (num_classes, num_classes + 1):
            raise UnknownsError(
                f"Expected a network with {num_classes} or {num_classes + 1} outputs, got {fit.logits.shape[1]}."
            )
        return cls(model.eval(), normalise, num_classes, fit, labels[order], torch.device(device))

    def scorer(self, name: str) -> Callable[[Any], Tensor]:
        """The score of this name: fitted once; results on the last outputs are remembered, for combined scores.

        It is called with Outputs (see `outputs`); "odin", which needs gradients of the input, with images.

        Raises UnknownsError for a name that is not in SCORES, and a score that needs the output for unknown where the
        network has none.
        """
        if name not in self.scorers:
            if name not in SCORES:
                raise UnknownsError(f"Expected a score of {', '.join(SCORES)}, got {name!r}.")
            if SCORES[name].needs_unknown_output and self.fit.logits.shape[1] <= self.num_classes:
                raise UnknownsError(
                    f"Expected a network with {self.num_classes + 1} outputs for the score {name}, got "
                    f"{self.fit.logits.shape[1]}: add_unknown_output() adds the one for unknown."
                )
            score = _checked(name, SCORES[name].make(self))
            self.scorers[name] = lru_cache(maxsize=2)(score) if SCORES[name].takes == "outputs" else score
        return self.scorers[name]

    def outputs(self, images: Tensor) -> Outputs:
        return collect(self.model, images, self.normalise, self.device, self.batch_size)

    def batches(self, images: Tensor) -> Iterator[Tensor]:
        for part in images.split(self.batch_size):
            yield self.normalise(part.to(self.device))


def _checked(name: str, score: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
    """A score that refuses what another kind of score takes."""
    kind, way = (Outputs, "judge.outputs(images)") if SCORES[name].takes == "outputs" else (Tensor, "images")

    def checked(value: Any) -> Tensor:
        if not isinstance(value, kind):
            raise UnknownsError(f"The score {name} is called with {way}, got a {type(value).__name__}.")
        return score(value)

    return checked


@torch.no_grad()
def collect(
    model: nn.Module, images: Tensor, normalise: Normalise, device: torch.device | str, batch_size: int = 500
) -> Outputs:
    """Runs images [N, C, H, W] through the network in eval mode; features are the input of its last layer."""
    model.eval()
    passes = [logits_and_features(model, normalise(part.to(device))) for part in images.split(batch_size)]
    logits, features = zip(*[(y.double().cpu(), x.float().cpu()) for y, x in passes], strict=True)
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
    distances = _distances(*_class_means(judge))
    return lambda outputs: distances(outputs.features).amin(0).float()


def _mahalanobis_of_directions(judge: Judge) -> Callable[[Outputs], Tensor]:
    """Mahalanobis++: the same of features of length one, in fitting and after (Mueller and Hein, arXiv 2505.18032).

    Lengths differ far more than classes do, and unknown images tend to have short features, which are near every mean.
    """

    def directions(outputs: Outputs) -> Outputs:
        return Outputs(outputs.logits, F.normalize(outputs.features, dim=1))

    score = _mahalanobis(replace(judge, fit=directions(judge.fit), scorers={}))
    return lambda outputs: score(directions(outputs))


def _relative_mahalanobis(judge: Judge) -> Callable[[Outputs], Tensor]:
    """The distance to the nearest class mean less that to the mean of all (Ren et al., arXiv 2106.09022, equation 3).

    Each half squared, by its own scatter, summed and inverted as for Mahalanobis.
    """
    features = judge.fit.features.double()
    to_classes = _distances(*_class_means(judge))
    to_all = _distances(features - features.mean(0), features.mean(0, keepdim=True))
    return lambda outputs: (to_classes(outputs.features).amin(0) - to_all(outputs.features)[0]).float()


def _class_means(judge: Judge) -> tuple[Tensor, Tensor]:
    """The fitted features [N, D] about the means of their classes, and the means [classes, D], in float64."""
    features, labels = judge.fit.features.double(), judge.fit_labels
    means = torch.stack([features[labels == k].mean(0) for k in labels.unique()])
    return features - means[labels.unique(return_inverse=True)[1]], means


def _distances(centred: Tensor, means: Tensor) -> Callable[[Tensor], Tensor]:
    """Half the squared Mahalanobis distances [means, N] of features [N, D]; `centred` is what the scatter is of."""
    variances, directions = torch.linalg.eigh(centred.T @ centred)
    alive = variances > DEAD_VARIANCE * variances[-1]
    whitening = directions[:, alive] / variances[alive].sqrt()

    def distances(features: Tensor) -> Tensor:
        white = features.double() @ whitening
        return torch.stack([(white - mean).square().sum(1) / 2 for mean in means @ whitening])

    return distances


def _class_head(judge: Judge) -> tuple[Tensor, Tensor]:
    """Weight [K, D] and bias [K] of the class outputs."""
    head = head_of(judge.model)
    weight = head.dense_weight() if isinstance(head, ua.SparseLinear) else head.weight
    bias = torch.zeros(len(weight)) if head.bias is None else head.bias
    return weight[: judge.num_classes].detach().float().cpu(), bias[: judge.num_classes].detach().float().cpu()


def _vim(judge: Judge) -> Callable[[Outputs], Tensor]:
    """Virtual-logit matching (Wang et al., arXiv 2203.10807): the norm of what the principal features leave, scaled to
    the largest logits, against the energy. Half the dimensions are principal, 512 from 768 on (section 4.3)."""
    size = judge.fit.features.shape[1]
    detector = ViM(None, size // 2 if size < 768 else 512, *_class_head(judge))
    detector.fit_features(judge.fit.features, judge.fit_labels)
    if not math.isfinite(detector.alpha or 0.0):  # nothing is left over in fitting: no virtual logit
        detector.alpha = 0.0
    return lambda outputs: detector.predict_features(outputs.features)


def _fdbd(judge: Judge) -> Callable[[Outputs], Tensor]:
    """Minus the mean distance to the other classes' decision boundaries, over that to the mean of the training
    features (Liu and Qin, arXiv 2312.11536, equation 7); a class whose weights are the predicted one's has none."""
    weight, _ = _class_head(judge)
    gaps = torch.cdist(weight.double(), weight.double(), compute_mode="donot_use_mm_for_euclid_dist")
    centre = judge.fit.features.double().mean(0)

    def score(outputs: Outputs) -> Tensor:
        logits = outputs.logits[:, : judge.num_classes]
        best, predicted = logits.max(1)
        gap = gaps[predicted]
        distances = torch.where(gap > 0, (best[:, None] - logits) / gap, 0.0)
        boundaries = (gap > 0).sum(1).clamp(min=1)
        return -distances.sum(1) / boundaries / (outputs.features.double() - centre).norm(dim=1).clamp(min=1e-12)

    return score


def _ash(judge: Judge) -> Callable[[Outputs], Tensor]:
    """Energy with an image's smaller features set to zero and the rest sharpened (ASH-S, arXiv 2209.09858)."""
    energy = _energy_of(judge)

    def score(outputs: Outputs) -> Tensor:
        shaped = ash_s(outputs.features[:, :, None, None], ASH_PRUNED)[:, :, 0, 0]
        return energy(torch.nan_to_num(shaped))  # without a feature above zero there is nothing to sharpen

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
    energy = _energy_of(judge)
    return lambda outputs: energy(outputs.features.clamp(max=threshold))


def _energy_of(judge: Judge) -> Callable[[Tensor], Tensor]:
    """The energy of the class logits of features."""
    head = head_of(judge.model)

    @torch.no_grad()
    def energy(features: Tensor) -> Tensor:
        return EnergyBased.score(head(features.to(judge.device))[:, : judge.num_classes].double()).cpu()

    return energy


def _odin(judge: Judge) -> Callable[[Tensor], Tensor]:
    class_logits = _ClassLogits(judge.model, judge.num_classes)
    std = getattr(judge.normalise, "std", None)
    detector = ODIN(class_logits, norm_std=None if std is None else list(std))
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
    """`make(judge)` gives a function of Outputs, or of images where `takes` says so."""

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
    "gen": Score(_on_class_logits(GEN.score), "GEN"),
    "odin": Score(_odin, "ODIN", takes="images"),
    "react": Score(_react, "ReAct"),
    "knn": Score(_knn, "KNN"),
    "mahalanobis": Score(_mahalanobis, "Mahalanobis"),
    "mahalanobis++": Score(_mahalanobis_of_directions, "Mahalanobis++"),
    "relative-mahalanobis": Score(_relative_mahalanobis, "relative Mahalanobis"),
    "vim": Score(_vim, "ViM"),
    "fdbd": Score(_fdbd, "fDBD"),
    "ash": Score(_ash, "ASH-S"),
    "combined": Score(_combined(("u", "energy")), "max of u, energy", needs_unknown_output=True),
    "combined-features": Score(_combined(("u", "energy", "mahalanobis")), "max of (u,) energy, Mahalanobis"),
    "combined-all": Score(_combined(("u", "energy", "mahalanobis", "knn")), "max of (u,) energy, Mahalanobis, KNN"),
    "combined++": Score(_combined(("u", "energy", "mahalanobis++", "knn")), "max of (u,) energy, Mahalanobis++, KNN"),
}
CHEAP_SCORES = ("moon", "u", "msp", "maxlogit", "energy", "entropy")
