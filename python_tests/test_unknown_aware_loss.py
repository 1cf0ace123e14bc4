"""unknown_aware_loss against its reference in float64, its derivation, extreme logits, bad input."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from uasparse_kernels.ops import unknown_aware_loss, unknown_aware_loss_reference

REDUCTIONS = ["mean", "sum", "none"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
SIZES = [(1, 2), (7, 3), (33, 11), (64, 16), (130, 17), (5, 101), (3, 1025), (2, 50_000)]


def make(n, classes, dtype=torch.float32, device="cpu", seed=0, scale=3.0):
    g = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(n, classes, generator=g, dtype=torch.float64)).to(dtype)
    # A third of the targets are hit on purpose, a sixth are synthetic unknowns.
    target = torch.randint(classes, (n,), generator=g)
    target = torch.where(torch.rand(n, generator=g) < 0.33, logits.argmax(1), target)
    target = torch.where(torch.rand(n, generator=g) < 0.16, classes - 1, target)
    return logits.to(device), target.to(device)


def run(function, logits, target, alpha, upstream=None, **options):
    """loss, threshold and gradient, in float64; upstream weighs the losses of reduction "none"."""
    logits = logits.clone().requires_grad_()
    loss, threshold = function(logits, target, alpha, **options)
    (grad,) = torch.autograd.grad((loss * (1 if upstream is None else upstream)).sum(), logits)
    return loss.detach().double(), threshold.double(), grad.double()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("size", SIZES)
def test_matches_float64_reference(size, reduction, dtype, device):
    logits, target = make(*size, dtype=dtype, device=device, seed=sum(size))
    upstream = torch.rand(size[0], device=device) + 0.5 if reduction == "none" else None
    options = {"unknown_weight": 0.25, "reduction": reduction, "upstream": upstream}
    loss, threshold, grad = run(unknown_aware_loss, logits, target, 0.7, **options)
    expected = run(unknown_aware_loss_reference, logits.double(), target, 0.7, **options)
    # float32 (or float64) inside; the gradient is rounded to the dtype of the logits.
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    torch.testing.assert_close(loss, expected[0], rtol=64 * eps, atol=64 * eps)
    torch.testing.assert_close(threshold, expected[1], rtol=64 * eps, atol=64 * eps)
    torch.testing.assert_close(grad, expected[2], rtol=64 * eps + 2 * torch.finfo(dtype).eps, atol=64 * eps)


@pytest.mark.parametrize("device", DEVICES)
def test_dtypes_of_results(device):
    for dtype, acc in [(torch.float32, torch.float32), (torch.float64, torch.float64), (torch.bfloat16, torch.float32)]:
        logits, target = make(5, 4, dtype=dtype, device=device)
        logits.requires_grad_()
        loss, threshold = unknown_aware_loss(logits, target, 0.5)
        loss.backward()
        assert loss.dtype == threshold.dtype == acc and logits.grad.dtype == dtype
        assert loss.requires_grad and not threshold.requires_grad


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 70),
    classes=st.integers(2, 70),
    alpha=st.floats(0, 5),
    unknown_weight=st.floats(0, 2),
    seed=st.integers(0, 2**20),
    reduction=st.sampled_from(REDUCTIONS),
)
def test_any_size_matches_reference(n, classes, alpha, unknown_weight, seed, reduction):
    logits, target = make(n, classes, torch.float64, seed=seed)
    options = {"unknown_weight": unknown_weight, "reduction": reduction}
    for got, expected in zip(
        run(unknown_aware_loss, logits, target, alpha, **options),
        run(unknown_aware_loss_reference, logits, target, alpha, **options),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12, equal_nan=n == 0)


@pytest.mark.parametrize("function", [unknown_aware_loss, unknown_aware_loss_reference])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(function, reduction):
    logits, target = make(9, 5, torch.float64, seed=3, scale=2.0)
    top = logits.topk(2, dim=1).values
    assert (top[:, 0] - top[:, 1]).min() > 1e-3  # away from ties of the argmax, where the loss jumps
    logits.requires_grad_()
    torch.autograd.gradcheck(
        lambda z: function(z, target, 0.8, unknown_weight=0.5, reduction=reduction)[0], (logits,), atol=1e-7, rtol=1e-6
    )


def test_gradient_is_the_derived_formula():
    """grad[j] = (w * (p[j] - [j = y]) + h * dw/du * u * ([j = K] - p[j])) / N."""
    alpha, (logits, target) = 0.9, make(40, 8, torch.float64, seed=5)
    target = target.clamp(max=6)
    _, _, grad = run(unknown_aware_loss, logits, target, alpha)
    p = logits.softmax(1)
    h, u = -p.gather(1, target[:, None]).log().squeeze(1), p[:, -1]
    wrong = logits.argmax(1) != target
    assert wrong.any() and not wrong.all()
    w = torch.where(wrong, 1 + alpha / (1 + alpha * u), torch.ones_like(u))
    slope = torch.where(wrong, -(alpha**2) / (1 + alpha * u) ** 2, torch.zeros_like(u))
    is_target, is_unknown = F.one_hot(target, 8), F.one_hot(torch.full_like(target, 7), 8)
    expected = w[:, None] * (p - is_target) + (h * slope * u)[:, None] * (is_unknown - p)
    torch.testing.assert_close(grad, expected / 40, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.3, 1.0, 2.0])
def test_unknown_logit_rises_only_beyond_the_derived_loss(alpha):
    """For a wrong sample with u near 0 the unknown logit rises only while h > (1 + alpha) / alpha^2."""
    bound = (1 + alpha) / alpha**2
    for h, rises in [(bound * 0.99, False), (bound * 1.01, True)]:
        # Two known classes with -log p[0] = h, class 1 predicted unless h < log 2; a tiny third output.
        p = math.exp(-h)
        logits = torch.tensor([[math.log(p), math.log1p(-p), -20.0]], dtype=torch.float64)
        assert p < 0.5, "the sample must be wrong"
        _, _, grad = run(unknown_aware_loss, logits, torch.tensor([0]), alpha)
        assert (grad[0, 2] < 0) == rises


@pytest.mark.parametrize("device", DEVICES)
def test_synthetic_unknowns_are_plain_cross_entropy(device):
    logits, _ = make(50, 6, torch.float64, device=device)
    target = torch.full((50,), 5, device=device)
    loss, threshold, grad = run(unknown_aware_loss, logits, target, 0.7, unknown_weight=0.3)
    z = logits.clone().requires_grad_()
    expected = 0.3 * F.cross_entropy(z, target)
    (expected_grad,) = torch.autograd.grad(expected, z)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(grad, expected_grad)
    assert threshold == 0


@pytest.mark.parametrize("device", DEVICES)
def test_alpha_zero_is_cross_entropy(device):
    logits, target = make(50, 6, torch.float64, device=device)
    loss, _, grad = run(unknown_aware_loss, logits, target, 0.0)
    z = logits.clone().requires_grad_()
    F.cross_entropy(z, target).backward()
    torch.testing.assert_close(loss, F.cross_entropy(logits, target))
    torch.testing.assert_close(grad, z.grad)


@pytest.mark.parametrize("device", DEVICES)
def test_first_of_equal_logits_is_the_prediction(device):
    logits = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [2.0, 0.0, 2.0]], device=device)
    target = torch.tensor([0, 1, 0], device=device)
    losses, _ = unknown_aware_loss(logits, target, 1.0, reduction="none")
    plain = F.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(losses[[0, 2]], plain[[0, 2]])
    assert losses[1] > 1.5 * plain[1]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits(dtype, device):
    inf = math.inf
    logits = torch.tensor(
        [
            [1e4, -1e4, 0.0, 5.0],
            [1e4, -1e4, 0.0, 5.0],
            [-1e4, -1e4, -1e4, -1e4],
            [1e4, 9999.0, 1e4, 9998.0],
            [-inf, 1.0, 2.0, 0.5],
            [1.0, 2.0, 0.5, -inf],
            [-inf, 3.0, -inf, -inf],
            [0.0, 0.0, 0.0, 1e4],
            [-inf, -inf, 100.0, 30.0],
            [-200.0, -inf, -inf, -100.0],
        ],
        dtype=dtype,
        device=device,
    )
    target = torch.tensor([0, 1, 2, 2, 2, 0, 1, 1, 2, 0], device=device)
    loss, threshold, grad = run(unknown_aware_loss, logits, target, 1.0, reduction="none")
    expected = run(unknown_aware_loss_reference, logits.double(), target, 1.0, reduction="none")
    assert loss.isfinite().all() and threshold.isfinite() and grad.isfinite().all()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(loss, expected[0], rtol=8 * eps, atol=8 * eps)
    torch.testing.assert_close(threshold, expected[1], rtol=8 * eps, atol=1e-8)
    torch.testing.assert_close(grad, expected[2], rtol=16 * eps, atol=16 * eps)


def test_large_logits_lose_no_precision():
    """Shifted by 1e4 the differences are exact in float32: so must be loss and gradient."""
    logits, target = make(30, 11, scale=1.0)
    logits = (logits * 64).round() / 64
    for got, expected in zip(
        run(unknown_aware_loss, logits + 1e4, target, 0.5), run(unknown_aware_loss, logits, target, 0.5), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("position", [0, 3, 17])
def test_nan_and_plus_inf_become_nan(position):
    for bad in (math.nan, math.inf):
        logits, target = make(4, 18)
        logits[2, position] = bad
        losses, _ = unknown_aware_loss(logits, target, 0.5, reduction="none")
        assert losses.isnan().tolist() == [False, False, True, False]


def test_target_of_minus_infinity_is_an_infinite_loss():
    logits = torch.tensor([[-math.inf, 1.0, -math.inf]])
    losses, _ = unknown_aware_loss(logits, torch.tensor([0]), 0.5, reduction="none")
    assert losses.isinf().all()
    assert run(unknown_aware_loss, logits, torch.tensor([0]), 0.5)[2].isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("function", [unknown_aware_loss, unknown_aware_loss_reference])
def test_target_of_minus_infinity_has_the_gradient_of_cross_entropy(function, dtype, device):
    """At any alpha, times the weight of the sample: through u comes nothing where h is infinite."""
    logits = torch.tensor([[0.0, -math.inf, 1.0], [2.0, -math.inf, -math.inf]], dtype=dtype, device=device)
    target = torch.tensor([1, 1], device=device)
    z = logits.clone().requires_grad_()
    F.cross_entropy(z, target, reduction="sum").backward()
    assert z.grad[0].tolist() == pytest.approx([0.2689, -1, 0.7311], abs=1e-4)
    u = logits.double().softmax(1)[:, 2]
    for alpha in (0.0, 0.5, 1e4):
        loss, _, grad = run(function, logits, target, alpha, reduction="sum")
        assert loss.isinf()
        weight = 1 + alpha / (1 + alpha * u)
        torch.testing.assert_close(grad, z.grad.double() * weight[:, None], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("alpha", [1e3, 1e4, 1e6, 1e8])
def test_a_large_alpha_loses_no_precision(alpha, device):
    """Where alpha meets a u of about 1 / alpha, the weight needs u's own digits, not those of 1 - u."""
    logits, target = make(200, 5, device=device)
    logits[:, -1] = logits[:, :-1].amax(1) + torch.linspace(-2, 0, 200, device=device) * math.log(alpha)
    target = target.clamp(max=3)
    for got, expected in zip(
        run(unknown_aware_loss, logits, target, alpha, reduction="none"),
        run(unknown_aware_loss_reference, logits.double(), target, alpha, reduction="none"),
        strict=True,
    ):
        size = expected.abs().amax(-1, keepdim=True) if expected.dim() == 2 else expected.abs()
        assert ((got - expected).abs() <= 5e-6 * size + 1e-6).all()


@pytest.mark.parametrize("device", DEVICES)
def test_empty_batch(device):
    logits, target = make(0, 5, device=device)
    for function in (unknown_aware_loss, unknown_aware_loss_reference):
        values = [function(logits, target, 0.5, reduction=r) for r in REDUCTIONS]
        assert values[0][0].isnan() and values[1][0] == 0 and values[2][0].shape == (0,)
        assert all(threshold == 0 for _, threshold in values)
    assert run(unknown_aware_loss, logits, target, 0.5)[2].shape == (0, 5)


@pytest.mark.parametrize("device", DEVICES)
def test_strides_and_alpha_tensor(device):
    logits, target = make(21, 9, device=device)
    plain = run(unknown_aware_loss, logits, target, 0.625)
    wide = torch.randn(42, 18, device=device)[::2, ::2]
    wide.copy_(logits)
    targets = torch.stack([target, target], 1)[:, 0]
    alphas = [torch.tensor(0.625, device=device), torch.tensor([0.625], dtype=torch.float64), 0.625]
    for alpha in alphas:
        for got, expected in zip(run(unknown_aware_loss, wide, targets, alpha), plain, strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_alpha_gets_no_gradient():
    logits, target = make(5, 4)
    alpha = torch.tensor(0.5, requires_grad=True)
    logits.requires_grad_()
    for function in (unknown_aware_loss, unknown_aware_loss_reference):
        function(logits, target, alpha)[0].backward()
        assert alpha.grad is None


def test_independent_of_the_number_of_threads():
    logits, target = make(5000, 11)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(run(unknown_aware_loss, logits, target, 0.5))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.randn(4, 1)}, ValueError, "K >= 1"),
        ({"logits": torch.randn(4)}, ValueError, "K >= 1"),
        ({"logits": torch.zeros(4, 3, dtype=torch.int64)}, TypeError, "floating-point"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, ValueError, r"shape \(4,\)"),
        ({"target": torch.zeros(4)}, TypeError, "int64"),
        ({"target": torch.zeros(4, dtype=torch.int32)}, TypeError, "int64"),
        ({"target": torch.tensor([0, 1, 3, 0])}, IndexError, "got 3 at position 2"),
        ({"target": torch.tensor([0, -1, 0, 0])}, IndexError, "got -1 at position 1"),
        ({"alpha": -0.1}, ValueError, "alpha"),
        ({"alpha": math.nan}, ValueError, "alpha"),
        ({"alpha": torch.zeros(2)}, ValueError, "alpha"),
        ({"unknown_weight": -1.0}, ValueError, "unknown_weight"),
        ({"reduction": "average"}, ValueError, "reduction"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"logits": torch.randn(4, 3), "target": torch.tensor([0, 1, 2, 0]), "alpha": 0.5} | change
    with pytest.raises(error, match=message):
        unknown_aware_loss(**arguments)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_compiled_is_the_same(reduction):
    """Captured whole, forward and backward, with other shapes and another alpha in the second call."""

    def function(z, y, alpha):
        return unknown_aware_loss(z, y, alpha, unknown_weight=0.5, reduction=reduction)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for n, strength in [(9, 0.3), (14, 0.9)]:
        logits, target = make(n, 6, seed=n)
        alpha = torch.tensor(strength)
        for got, expected in zip(
            run(compiled, logits, target, alpha), run(function, logits, target, alpha), strict=True
        ):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("reduction", [0, 1, 2])
def test_opcheck(reduction):
    logits, target = make(7, 5)
    arguments = (logits.requires_grad_(), target, torch.tensor(0.5), 0.25, reduction)
    torch.library.opcheck(torch.ops.uasparse.unknown_aware_loss.default, arguments)


@pytest.mark.cuda
def test_cuda_graph():
    logits, target = make(64, 11, device="cuda")
    alpha = torch.tensor(0.5, device="cuda")
    z = logits.clone().requires_grad_()

    def step():
        z.grad = None
        loss, threshold = unknown_aware_loss(z, target, alpha, unknown_weight=0.25)
        loss.backward()
        return loss.detach(), threshold

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, threshold = step()
    for seed, strength in [(1, 0.2), (2, 0.9)]:
        new_logits, new_target = make(64, 11, device="cuda", seed=seed)
        with torch.no_grad():
            z.copy_(new_logits)
        target.copy_(new_target)
        alpha.fill_(strength)
        graph.replay()
        expected = run(unknown_aware_loss, new_logits, new_target, strength, unknown_weight=0.25)
        for got, want in zip((loss, threshold, z.grad), expected, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-7)
