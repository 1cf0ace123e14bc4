"""The unknown-aware loss with what others' recipes ask of a cross entropy: smoothing, weights, soft targets, pixels."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import uasparse_kernels as ua
from uasparse_kernels.ops import unknown_aware_loss, unknown_aware_loss_reference

N, CLASSES = 12, 5  # K = 4 known ones
REDUCTIONS = ("mean", "sum", "none")


def make(dims=(), soft=False, ignored=False, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(N, CLASSES, *dims, generator=g, dtype=torch.float64).to(dtype)
    target = torch.randint(CLASSES, (N, *dims), generator=g)
    if soft:  # mixup of two classes, some of them the same
        other, share = torch.randint(CLASSES, (N, *dims), generator=g), torch.rand(N, *dims, 1, generator=g)
        mixed = share * F.one_hot(target, CLASSES) + (1 - share) * F.one_hot(other, CLASSES)
        target = mixed.movedim(-1, 1).to(dtype)
    elif ignored:
        target = torch.where(torch.rand(target.shape, generator=g) < 0.3, -100, target)
    return logits, target


def class_weights(weighted):
    return torch.tensor([0.3, 1.5, 1.0, 2.0, 0.7], dtype=torch.float64) if weighted else None


def by_hand(logits, target, alpha, unknown_weight, label_smoothing, ignore_index, weight):
    """The sum, the divisor of the mean and the threshold, sample by sample, class by class."""
    weight = torch.ones(CLASSES, dtype=torch.float64) if weight is None else weight
    rows = logits.movedim(1, -1).reshape(-1, CLASSES)
    soft = target.is_floating_point()
    targets = target.movedim(1, -1).reshape(-1, CLASSES) if soft else target.reshape(-1)
    total = divisor = threshold = known = 0.0
    for z, t in zip(rows, targets, strict=True):
        if not soft and int(t) == ignore_index:
            continue
        p = [math.exp(float(v)) for v in z]
        p = [v / sum(p) for v in p]
        u, predicted = p[-1], p.index(max(p))
        shares = t.tolist() if soft else [float(k == int(t)) for k in range(CLASSES)]
        divisor += 1.0 if soft else float(weight[int(t)])
        for k, share in enumerate(shares):
            h = (1 - label_smoothing) * float(weight[k]) * -math.log(p[k])
            h += sum(label_smoothing / CLASSES * float(weight[j]) * -math.log(p[j]) for j in range(CLASSES))
            factor = 1.0 if k == predicted else 1 + alpha / (1 + alpha * u)
            total += share * (unknown_weight if k == CLASSES - 1 else factor) * h
            if k < CLASSES - 1:
                known, threshold = known + share, threshold + share * (1 - u) * -math.log(p[k])
    return total, divisor, threshold / known


OPTIONS = [
    pytest.param(dims, soft, ignored, smoothing, weighted, id=f"{dims}-{soft=}-{ignored=}-{smoothing}-{weighted=}")
    for dims, soft, ignored, smoothing, weighted in itertools.product(
        ((), (3,), (2, 3)), (False, True), (False, True), (0.0, 0.1), (False, True)
    )
    if not (soft and ignored)
]


@pytest.mark.parametrize(("dims", "soft", "ignored", "smoothing", "weighted"), OPTIONS)
def test_every_combination(dims, soft, ignored, smoothing, weighted):
    logits, target = make(dims, soft, ignored)
    options = {"label_smoothing": smoothing, "weight": class_weights(weighted)}
    ignore = {"ignore_index": -100} if ignored else {}
    logits.requires_grad_()
    for reduction in REDUCTIONS:
        mine, _ = unknown_aware_loss(logits, target, 0.0, reduction=reduction, **options, **ignore)
        torchs = F.cross_entropy(logits, target, reduction=reduction, **options)
        torch.testing.assert_close(mine, torchs, rtol=1e-12, atol=1e-12)
        grads = [torch.autograd.grad(loss.sum(), logits)[0] for loss in (mine, torchs)]
        torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-12)

    alpha, unknown_weight = 0.8, 0.25
    everything = {"unknown_weight": unknown_weight, **options, **ignore}
    results = {r: unknown_aware_loss(logits, target, alpha, reduction=r, **everything) for r in REDUCTIONS}
    total, divisor, threshold = by_hand(
        logits.detach(), target, alpha, unknown_weight, smoothing, -100 if ignored else None, options["weight"]
    )
    assert results["sum"][0].item() == pytest.approx(total, rel=1e-12)
    assert results["mean"][0].item() == pytest.approx(total / divisor, rel=1e-12)
    assert results["none"][0].shape == (N, *dims)
    assert results["none"][0].sum().item() == pytest.approx(total, rel=1e-12)
    for _, got in results.values():
        assert got.item() == pytest.approx(threshold, rel=1e-12) and not got.requires_grad
    single, _ = unknown_aware_loss(logits.float(), target if not soft else target.float(), alpha, **everything)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), results["mean"][0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dims", "soft", "ignored", "smoothing", "weighted"), OPTIONS[::3])
def test_gradcheck(dims, soft, ignored, smoothing, weighted):
    logits, target = make(dims, soft, ignored, seed=4)
    rows = logits.movedim(1, -1).reshape(-1, CLASSES).topk(2, dim=1).values
    assert (rows[:, 0] - rows[:, 1]).min() > 1e-4  # away from ties of the argmax, where the loss jumps
    options = {"label_smoothing": smoothing, "weight": class_weights(weighted), "unknown_weight": 0.5}
    options |= {"ignore_index": -100} if ignored else {}
    for function in (unknown_aware_loss, unknown_aware_loss_reference):
        torch.autograd.gradcheck(
            lambda z, function=function: function(z, target, 0.8, **options)[0],
            (logits.requires_grad_(),),
            atol=1e-7,
            rtol=1e-6,
            fast_mode=True,
        )


def test_a_soft_target_is_the_mixture_of_its_classes():
    """As mixup is written by hand: lam * criterion(logits, a) + (1 - lam) * criterion(logits, b)."""
    logits, a = make(seed=1)
    _, b = make(seed=2)
    soft = 0.3 * F.one_hot(a, CLASSES) + 0.7 * F.one_hot(b, CLASSES).double()
    for smoothing in (0.0, 0.2):
        options = {"unknown_weight": 0.4, "label_smoothing": smoothing, "weight": class_weights(True)}
        mixed, _ = unknown_aware_loss(logits, soft, 0.9, reduction="none", **options)
        parts = [unknown_aware_loss(logits, y, 0.9, reduction="none", **options)[0] for y in (a, b)]
        torch.testing.assert_close(mixed, 0.3 * parts[0] + 0.7 * parts[1])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 0.0, 2.0, 0.5, 0.0], dtype=torch.float64)])
@pytest.mark.parametrize("place", ["target", "unknown", "ignored"])
def test_infinite_logits_are_what_they_are_in_cross_entropy(place, smoothing, weight):
    """Masked logits, and whatever the padding of a sequence has."""
    logits, _ = make(seed=3)
    logits, target = logits[:5].requires_grad_(), torch.tensor([0, 1, 2, -100, 4])
    with torch.no_grad():
        if place == "target":
            logits[[0, 1, 4], [0, 1, 4]] = -math.inf
        elif place == "unknown":
            logits[:, 4] = -math.inf
        else:
            logits[3, :2] = torch.tensor([-math.inf, math.nan])
    options = {"label_smoothing": smoothing, "weight": weight, "reduction": "none"}
    torchs = F.cross_entropy(logits, target, **options)
    expected = torch.autograd.grad(torchs.sum(), logits)[0]
    mine, _ = unknown_aware_loss(logits, target, 0.0, ignore_index=-100, **options)
    torch.testing.assert_close(mine, torchs, equal_nan=True)
    torch.testing.assert_close(torch.autograd.grad(mine.sum(), logits)[0], expected, equal_nan=True)


def test_soft_targets_get_gradients_as_in_cross_entropy():
    """Zeros among them too, and what is not a number stays that."""
    logits, target = make()
    soft = F.one_hot(target, CLASSES).double().requires_grad_()
    losses = unknown_aware_loss(logits, soft, 0.0)[0], F.cross_entropy(logits, soft)
    torch.testing.assert_close(*(torch.autograd.grad(loss, soft)[0] for loss in losses))
    with torch.no_grad():
        soft[0, 0] = math.nan
    assert unknown_aware_loss(logits, soft, 0.5)[0].isnan()


def test_nothing_known_and_nothing_at_all():
    logits, target = make()
    loss, threshold = unknown_aware_loss(logits, torch.full_like(target, -100), 0.5, ignore_index=-100)
    assert loss.isnan() and threshold == 0
    loss, threshold = unknown_aware_loss(logits, torch.full_like(target, 4), 0.5, label_smoothing=0.1)
    assert loss.isfinite() and threshold == 0
    for options in ({}, {"label_smoothing": 0.1}, {"ignore_index": 0}):
        loss, threshold = unknown_aware_loss(logits[:0], target[:0], 0.5, **options)
        assert loss.isnan() and threshold == 0
    # A logit of -inf that is no target changes nothing, and has no gradient.
    logits = torch.tensor([[0.5, -torch.inf, 1.0], [2.0, 1.0, 0.0]], requires_grad=True)
    soft = torch.tensor([[0.4, 0.0, 0.6], [0.5, 0.5, 0.0]])
    loss, _ = unknown_aware_loss(logits, soft, 0.5)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all() and logits.grad[0, 1] == 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing"),
        ({"weight": torch.ones(4)}, ValueError, "5 classes, the unknown one last"),
        ({"weight": torch.ones(5).long()}, ValueError, "floating-point weight"),
        ({"target": torch.full((N, CLASSES), 0.2), "ignore_index": 0}, ValueError, "soft targets"),
        ({"target": torch.full((N, CLASSES - 1), 0.25)}, ValueError, "probabilities"),
        ({"target": torch.full((N,), -100), "label_smoothing": 0.1}, IndexError, "ignore_index"),
        ({"target": torch.full((N,), CLASSES), "weight": torch.ones(5)}, IndexError, r"\[0, 4\], got 5"),
        ({"target": torch.zeros(N, 2, dtype=torch.long)}, ValueError, "shape"),
        ({"target": torch.zeros(N)}, TypeError, "int64"),
        ({"target": [0] * N}, TypeError, "expected target to be a tensor, got list"),
        ({"logits": None}, TypeError, "expected logits to be a tensor, got NoneType"),
    ],
)
def test_bad_options_are_explained(change, error, message):
    logits, target = make()
    options = {"logits": logits, "target": target, "alpha": 0.5} | change
    with pytest.raises(error, match=message):
        unknown_aware_loss(**options)


def test_the_module_takes_them_too():
    logits, target = make((2, 3), ignored=True, dtype=torch.float32)
    weight = class_weights(True).float()
    loss_fn = ua.UnknownAwareLoss(4, label_smoothing=0.1, ignore_index=-100, weight=weight)
    expected = F.cross_entropy(logits, target, label_smoothing=0.1, weight=weight)
    torch.testing.assert_close(loss_fn(logits, target), expected)
    assert loss_fn.average.isnan()  # no gradients are recorded: no training step
    logits.requires_grad_()
    loss_fn(logits, target)
    threshold = unknown_aware_loss(logits, target, 0.0, ignore_index=-100)[1]
    torch.testing.assert_close(loss_fn.average, threshold)
    assert "weight" in loss_fn.state_dict() and "weight" not in ua.UnknownAwareLoss(4).state_dict()
    assert "ignore_index=-100" in repr(loss_fn)
    soft = torch.softmax(torch.randn_like(logits), 1)
    torch.testing.assert_close(ua.UnknownAwareLoss(4)(logits, soft), F.cross_entropy(logits, soft))
    for options, message in [
        ({"weight": torch.ones(4)}, "5 classes"),
        ({"label_smoothing": -1.0}, "label_smoothing"),
        ({"total_steps": 10, "total_epochs": 3}, "or epochs"),
        ({"warmup_steps": 3}, "or epochs"),
        ({"total_steps": 10, "warmup_steps": 10}, "warmup_steps < total_steps"),
    ]:
        with pytest.raises(ValueError, match=message):
            ua.UnknownAwareLoss(4, **options)


@pytest.mark.parametrize("compiled", [False, True])
def test_alpha_rises_by_steps(compiled):
    loss_fn = ua.UnknownAwareLoss(4, total_steps=8, warmup_steps=3, alpha_final=1.5, rho=10.0)
    call = torch.compile(loss_fn, backend="aot_eager", fullgraph=True) if compiled else loss_fn
    averages, losses = [], []
    for step in range(10):  # two more than were said
        logits, target = make(dtype=torch.float32, seed=step)
        logits.requires_grad_()
        start = averages[2] / 10 if step >= 3 else 0.0
        alpha = 0.0 if step < 3 else min(1.5, start + (1.5 - start) * (step - 3) / 4)
        losses.append(call(logits, target))
        assert loss_fn.alpha.item() == pytest.approx(alpha, rel=1e-5)
        torch.testing.assert_close(losses[-1], unknown_aware_loss(logits, target, alpha)[0], rtol=1e-5, atol=1e-6)
        averages.append(loss_fn.average.item())
        loss_fn.step_epoch()  # harmless
        with torch.no_grad():
            loss_fn(logits, target)
    assert loss_fn.steps == 10 and loss_fn.alpha == 1.5
    sum(losses).backward()  # each with its own alpha
    copied = ua.UnknownAwareLoss(4, total_steps=8, warmup_steps=3, alpha_final=1.5, rho=10.0)
    copied.load_state_dict(loss_fn.state_dict())
    assert copied.steps == 10 and copied.alpha == 1.5
    assert ua.UnknownAwareLoss(4, total_steps=100).warmup_steps == 5 and "total_steps=8" in repr(loss_fn)
