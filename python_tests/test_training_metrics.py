"""Scores and metrics of training/ against values worked out by hand."""

import math
from dataclasses import replace

import pytest

pytest.importorskip("torchmetrics")
pytest.importorskip("pytorch_ood")

import torch
from pytorch_ood.detector import RMD, fDBD
from torch import nn

import uasparse_kernels as ua
from uasparse_kernels.training.batches import Normalise
from uasparse_kernels.training.errors import TrainingError
from uasparse_kernels.training.metrics import classification_metrics, detection_metrics, reliability, scaled_metrics
from uasparse_kernels.unknowns import UnknownsError
from uasparse_kernels.unknowns.scores import SCORES, Judge, Outputs, collect, moon_score, unknown_log_odds


def test_detection_metrics_of_a_worked_example():
    # Ordered from most unknown: U 5, K 4, U 3, U 2, K 1, K 0. Of the nine pairs, 3 + 2 + 2 are in the right order.
    metrics = detection_metrics(torch.tensor([4.0, 1.0, 0.0]), torch.tensor([5.0, 3.0, 2.0]))
    assert metrics["auroc"] == pytest.approx(7 / 9)
    # All three unknown are caught (a TPR >= 0.95) from the threshold 2 on, where one of three known is flagged.
    assert metrics["fpr95"] == pytest.approx(1 / 3)
    # All three known are accepted only with the threshold above 4, where two of three unknown are accepted.
    assert metrics["fpr95_known_positive"] == pytest.approx(2 / 3)
    assert metrics["aupr_out"] == pytest.approx((1 / 1 + 2 / 3 + 3 / 4) / 3)
    assert metrics["aupr_in"] == pytest.approx((1 / 1 + 2 / 2 + 3 / 5) / 3)


def test_detection_metrics_count_ties_half():
    metrics = detection_metrics(torch.zeros(4), torch.zeros(3))
    assert metrics["auroc"] == 0.5
    assert metrics["fpr95"] == 1.0
    assert metrics["aupr_out"] == pytest.approx(3 / 7)


@pytest.mark.parametrize("bad", [torch.tensor([0.0, math.nan]), torch.tensor([math.inf]), torch.empty(0)])
def test_detection_metrics_refuse_scores_that_rank_nothing(bad):
    with pytest.raises(TrainingError, match=r"finite scores of at least one unknown image"):
        detection_metrics(torch.tensor([0.0, 1.0]), bad)


def test_classification_metrics_of_a_worked_example():
    p = torch.tensor([[0.7, 0.2, 0.1], [0.2, 0.3, 0.5], [0.1, 0.9, 0.0], [0.25, 0.35, 0.4]], dtype=torch.float64)
    labels = torch.tensor([0, 1, 1, 0])
    metrics = classification_metrics((p + 1e-300).log(), labels)
    assert metrics["accuracy"] == 0.5  # the second and fourth are answered by the third output
    assert metrics["nll"] == pytest.approx(-math.log(0.7 * 0.3 * 0.9 * 0.25) / 4)
    brier = [0.3**2 + 0.2**2 + 0.1**2, 0.2**2 + 0.7**2 + 0.5**2, 0.1**2 + 0.1**2, 0.75**2 + 0.35**2 + 0.4**2]
    assert metrics["brier"] == pytest.approx(sum(brier) / 4)
    # The confidences 0.7, 0.5, 0.9, 0.4 fall in four different of the 15 bins.
    assert metrics["ece"] == pytest.approx((0.3 + 0.5 + 0.1 + 0.4) / 4)


def test_ece_joins_confidences_of_one_bin():
    # 0.95 and 0.97 are both above 14/15: one right, one wrong is an accuracy of 0.5 against a confidence of 0.96.
    p = torch.tensor([[0.95, 0.05], [0.97, 0.03]], dtype=torch.float64)
    metrics = classification_metrics(p.log(), torch.tensor([0, 1]))
    assert metrics["ece"] == pytest.approx(0.46)


def test_reliability_bins_agree_with_ece():
    logits = torch.randn(500, 11, generator=torch.Generator().manual_seed(0)) * 3
    labels = torch.randint(10, (500,), generator=torch.Generator().manual_seed(1))
    bins = reliability(logits, labels)
    gaps = [s * abs(a - c) for s, a, c in zip(bins["share"], bins["accuracy"], bins["confidence"], strict=True)]
    assert sum(gaps) == pytest.approx(
        classification_metrics(logits, labels)["ece"], abs=1e-6
    )  # float32 in torchmetrics
    assert sum(bins["share"]) == pytest.approx(1)


@pytest.mark.parametrize("scale", [0.2, 1.0, 5.0])
def test_a_temperature_undoes_a_wrong_scale(scale):
    logits = torch.randn(20_000, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
    labels = logits.softmax(1).multinomial(1, generator=torch.Generator().manual_seed(1)).flatten()  # so calibrated
    kept = (logits * scale).clone()
    metrics, calibrated = scaled_metrics(kept, labels), classification_metrics(logits, labels)
    assert metrics["temperature"] == pytest.approx(scale, rel=0.02)
    assert metrics["nll_scaled"] == pytest.approx(calibrated["nll"], abs=1e-3)
    assert metrics["ece_scaled"] < 0.015
    assert kept.equal(logits * scale)
    if scale != 1:
        assert classification_metrics(kept, labels)["ece"] > 0.05


def test_a_temperature_is_fitted_on_other_images():
    # Of even images 3 of 4 are right, which asks for sigmoid(1 / T) = 3 / 4; of odd ones 3 of 5. Each gets the other's.
    logits = torch.tensor([1.0, 0.0]).repeat(40, 1)
    labels = torch.tensor([[0, 0, 0, 1] * 5, [0, 0, 0, 1, 1] * 4]).T.flatten()
    even, odd = 1 / math.log(3), 1 / math.log(1.5)

    def nll(right, temperature):
        return math.log1p(math.exp(-1 / temperature)) + (1 - right) / temperature

    metrics = scaled_metrics(logits, labels)
    assert metrics["temperature"] == pytest.approx(math.sqrt(even * odd), rel=1e-3)
    assert metrics["nll_scaled"] == pytest.approx((nll(3 / 4, odd) + nll(3 / 5, even)) / 2, rel=1e-5)


def test_a_single_image_keeps_its_scale():
    metrics = scaled_metrics(torch.tensor([[0.0, 2.0, 1.0]]), torch.tensor([1]))
    assert metrics["temperature"] == 1
    assert metrics["nll_scaled"] == pytest.approx(math.log(math.exp(0) + math.exp(2) + math.exp(1)) - 2)


def test_scores_of_the_unknown_output():
    p = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6]], dtype=torch.float64)
    assert moon_score(p.log(), 2).tolist() == pytest.approx([0.4, 0.8])
    assert unknown_log_odds(p.log(), 2).tolist() == pytest.approx([math.log(0.1 / 0.9), math.log(0.6 / 0.4)])


def test_log_odds_keep_the_order_where_u_underflows():
    logits = torch.tensor([[0.0, -900.0], [0.0, -800.0]], dtype=torch.float64)
    assert logits.softmax(1)[:, 1].tolist() == [0.0, 0.0]
    low, high = unknown_log_odds(logits, 1).tolist()
    assert low < high


def _judge(num_outputs: int, num_classes: int) -> tuple[Judge, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, num_outputs))
    images = torch.randint(256, (120, 1, 4, 4), dtype=torch.uint8)
    labels = torch.arange(120) % num_classes
    judge = Judge.of(model, Normalise.of(images), num_classes, images, labels, torch.device("cpu"))
    return judge, images


def test_class_scores_do_not_see_the_unknown_output():
    judge, images = _judge(num_outputs=4, num_classes=3)
    outputs = judge.outputs(images)
    k = outputs.logits[:, :3]
    expected = {
        "msp": -k.softmax(1).amax(1),
        "maxlogit": -k.amax(1),
        "energy": -k.exp().sum(1).log(),
        "entropy": -(k.softmax(1) * k.log_softmax(1)).sum(1),
    }
    for name, value in expected.items():
        torch.testing.assert_close(SCORES[name].make(judge)(outputs), value)
    # ODIN without perturbation is MSP at temperature 1000; with it, confidence can only have risen (to first order).
    odin = SCORES["odin"].make(judge)(images)
    assert (odin <= -(k / 1000).softmax(1).amax(1) + 1e-9).all()
    assert odin.unique().numel() > 100


def test_feature_scores():
    judge, images = _judge(num_outputs=3, num_classes=3)
    outputs = judge.outputs(images)
    z = judge.fit.features
    unit = z / z.norm(dim=1, keepdim=True).clamp(min=1e-12)
    here = outputs.features / outputs.features.norm(dim=1, keepdim=True).clamp(min=1e-12)
    distances = torch.cdist(here.double(), unit.double()).sort(1).values[:, 49]
    torch.testing.assert_close(SCORES["knn"].make(judge)(outputs), distances, atol=1e-5, rtol=1e-5)

    mu = torch.stack([z[judge.fit_labels == c].mean(0) for c in range(3)])
    scatter = sum((z[judge.fit_labels == c] - mu[c]).T @ (z[judge.fit_labels == c] - mu[c]) for c in range(3))
    precision = torch.linalg.inv(scatter + 1e-6 * torch.eye(8))
    gaps = outputs.features[:, None] - mu
    expected = 0.5 * torch.einsum("ncd,de,nce->nc", gaps, precision, gaps).amin(1)
    torch.testing.assert_close(SCORES["mahalanobis"].make(judge)(outputs), expected, atol=1e-4, rtol=1e-3)

    clip = z.flatten().sort().values[int(0.9 * z.numel()) - 1]
    head = judge.model[-1]
    expected = -head(outputs.features.clamp(max=clip)).double().logsumexp(1).detach()
    torch.testing.assert_close(SCORES["react"].make(judge)(outputs), expected)


@pytest.mark.parametrize("sparse", [False, True])
def test_scores_of_features_and_head(sparse):
    judge, images = _judge(num_outputs=4, num_classes=3)
    if sparse:
        judge.model[3] = ua.SparseLinear.from_dense(judge.model[3], sparsity=0.4)
        judge.fit = judge.outputs(images)
    outputs = judge.outputs(images)
    z, k, fit = outputs.features.double(), outputs.logits[:, :3], judge.fit.features.double()
    head = judge.model[3]
    weight = (head.dense_weight() if sparse else head.weight).detach()[:3]
    as_linear = nn.Linear(8, 3)
    as_linear.load_state_dict({"weight": weight, "bias": head.bias.detach()[:3]})

    p = k.softmax(1)
    torch.testing.assert_close(SCORES["gen"].make(judge)(outputs), (p * (1 - p)).pow(0.1).mean(1))

    detector = fDBD(None, as_linear).fit_features(judge.fit.features)
    expected = detector.predict_features(outputs.features).double()
    torch.testing.assert_close(SCORES["fdbd"].make(judge)(outputs), expected, atol=1e-5, rtol=1e-4)

    origin = -torch.linalg.pinv(weight.double()) @ head.bias.detach()[:3].double()
    rest = torch.linalg.eigh((fit - origin).T @ (fit - origin)).eigenvectors[:, :4]
    norms = (fit - origin) @ rest
    alpha = judge.fit.logits[:, :3].amax(1).mean() / norms.norm(dim=1).mean()
    expected = alpha * ((z - origin) @ rest).norm(dim=1) - k.logsumexp(1)
    torch.testing.assert_close(SCORES["vim"].make(judge)(outputs).double(), expected, atol=1e-3, rtol=1e-3)

    shaped = []
    for row in z:  # of eight features the largest three are kept
        kept = row * (row >= row.sort(descending=True).values[2])
        shaped.append(kept * (row.sum() / kept.sum()).exp())
    expected = -(torch.stack(shaped).nan_to_num() @ weight.double().T + head.bias.detach()[:3]).logsumexp(1)
    torch.testing.assert_close(SCORES["ash"].make(judge)(outputs), expected, atol=1e-4, rtol=1e-4)

    detector = RMD(None).fit_features(judge.fit.features, judge.fit_labels)
    expected = detector.predict_features(outputs.features).double() / 2
    score = SCORES["relative-mahalanobis"].make(judge)(outputs).double()
    assert torch.corrcoef(torch.stack([score, expected]))[0, 1] > 0.999


def test_a_class_with_the_weights_of_another_has_no_boundary():
    judge, images = _judge(num_outputs=3, num_classes=3)
    with torch.no_grad():
        judge.model[3].weight[1] = judge.model[3].weight[0]
    assert SCORES["fdbd"].make(judge)(judge.outputs(images)).isfinite().all()


@pytest.mark.parametrize("num_outputs", [3, 4])
def test_combined_scores_are_the_largest_of_standardised_ones(num_outputs):
    judge, images = _judge(num_outputs, num_classes=3)
    outputs = judge.outputs(images[:30])

    def standardised(name):
        score = SCORES[name].make(judge)
        known = score(judge.fit).double()
        return (score(outputs).double() - known.mean()) / known.std()

    parts = [standardised(name) for name in ("energy", "mahalanobis", "u")[: num_outputs - 1]]
    torch.testing.assert_close(SCORES["combined-features"].make(judge)(outputs), torch.stack(parts).amax(0))
    joined = torch.stack([*parts, standardised("knn")]).amax(0)
    torch.testing.assert_close(SCORES["combined-all"].make(judge)(outputs), joined)
    parts[1] = standardised("mahalanobis++")
    joined = torch.stack([*parts, standardised("knn")]).amax(0)
    torch.testing.assert_close(SCORES["combined++"].make(judge)(outputs), joined)
    parts[1] = standardised("mahalanobis")
    if num_outputs == 4:
        expected = torch.maximum(parts[0], parts[2])
        torch.testing.assert_close(SCORES["combined"].make(judge)(outputs), expected)


def test_what_combined_scores_share_is_computed_once(monkeypatch):
    judge, images = _judge(num_outputs=4, num_classes=3)
    outputs, seen, knn = judge.outputs(images[:30]), [], SCORES["knn"]

    def make(judge):
        score = knn.make(judge)
        return lambda outputs: seen.append(outputs) or score(outputs)

    monkeypatch.setitem(SCORES, "knn", replace(knn, make=make))
    alone, joined = judge.scorer("knn")(outputs), judge.scorer("combined-all")(outputs)
    assert len(seen) == 2 and seen[0] is outputs and seen[1] is judge.fit
    monkeypatch.undo()
    torch.testing.assert_close(alone, SCORES["knn"].make(judge)(outputs))
    torch.testing.assert_close(joined, SCORES["combined-all"].make(judge)(outputs))


def test_a_score_says_what_it_takes():
    judge, images = _judge(num_outputs=3, num_classes=3)
    with pytest.raises(UnknownsError, match=r"Expected a score of moon, u, .*, got 'mps'"):
        judge.scorer("mps")
    with pytest.raises(UnknownsError, match=r"a network with 4 outputs for the score u, got 3: add_unknown_output\(\)"):
        judge.scorer("u")
    with pytest.raises(UnknownsError, match="odin is called with images, got a Outputs"):
        judge.scorer("odin")(judge.outputs(images))
    with pytest.raises(UnknownsError, match=r"msp is called with judge.outputs\(images\), got a Tensor"):
        judge.scorer("msp")(images)


def test_collect_gives_the_input_of_the_last_layer():
    judge, images = _judge(num_outputs=3, num_classes=3)
    outputs = collect(judge.model, images, judge.normalise, "cpu", batch_size=7)
    with torch.no_grad():
        features = judge.model[:3](judge.normalise(images))
        torch.testing.assert_close(outputs.features, features)
        torch.testing.assert_close(outputs.logits, judge.model[3](features).double())
    assert not judge.model[3]._forward_pre_hooks


def _judge_of_features(features, labels):
    outputs = Outputs(torch.zeros(len(features), 3).double(), features)
    return Judge(nn.Identity(), Normalise((0.0,), (1.0,)), 3, outputs, labels, torch.device("cpu")), outputs


def test_mahalanobis_of_directions_does_not_see_lengths():
    torch.manual_seed(0)
    labels, features = torch.arange(300) % 3, torch.randn(300, 8) + 1
    judge, fit = _judge_of_features(features, labels)
    score = SCORES["mahalanobis++"].make(judge)
    unit = features.double() / features.double().norm(dim=1, keepdim=True)
    means = torch.stack([unit[labels == k].mean(0) for k in range(3)])
    centred = unit - means[labels]
    precision = torch.linalg.inv(centred.T @ centred)
    off = unit - means[:, None]
    expected = torch.einsum("kni,ij,knj->kn", off, precision, off).amin(0) / 2
    torch.testing.assert_close(score(fit), expected.float(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(score(Outputs(fit.logits, 0.1 * features)), score(fit), atol=1e-6, rtol=1e-5)
    nothing = score(Outputs(fit.logits, torch.zeros(300, 8)))  # no direction at all
    assert nothing.isfinite().all()


def test_a_feature_that_was_dead_in_fitting_counts_nothing():
    torch.manual_seed(0)
    labels, features = torch.arange(300) % 3, torch.randn(300, 8)
    features[:, 4] = 0.0
    features[:, 6] = features[:, 5]  # nor does a difference that was always zero
    judge, fit = _judge_of_features(features, labels)
    score = SCORES["mahalanobis"].make(judge)
    changed = features.clone()
    changed[:, 4] = 0.001
    changed[:, 6] += 0.001
    moved = score(Outputs(fit.logits, changed)) - score(fit)
    assert moved.abs().max() < 0.01 * score(fit).std()
    # Without such features it is the usual score.
    alive = features[:, :4]
    judge, fit = _judge_of_features(alive, labels)
    centred = torch.cat([alive[labels == k] - alive[labels == k].mean(0) for k in range(3)]).double()
    precision = torch.linalg.inv(centred.T @ centred)
    off = torch.stack([alive.double() - alive[labels == k].double().mean(0) for k in range(3)])
    expected = torch.einsum("kni,ij,knj->kn", off, precision, off).amin(0) / 2
    torch.testing.assert_close(SCORES["mahalanobis"].make(judge)(fit), expected.float(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("labels", [[0, 0, 0, 2, 2], [0, 1, 2, 2, 2], [0, 1, 2, 3, 4]])
@pytest.mark.parametrize(
    "name", [name for name, score in SCORES.items() if score.takes == "outputs" and not score.needs_unknown_output]
)
def test_scores_are_fitted_on_classes_with_one_image_or_none(name, labels):
    judge, images = _judge(3, 3)
    outputs = collect(judge.model, images, judge.normalise, judge.device)
    judge.fit, judge.fit_labels = Outputs(outputs.logits[:5], outputs.features[:5]), torch.tensor(labels)
    assert SCORES[name].make(judge)(outputs).isfinite().all()
