"""topk_indices, topk_indices_many and indices_above against a stable sort: ties, zeros, infinities and NaN."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from topology_support import tied

from uasparse_kernels.ops import topk_indices, topk_indices_many, topk_indices_reference
from uasparse_kernels.ops.topk_indices import indices_above

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [1, 63, 64, 65, 1000, 20_001, 66_049])
def test_topk_matches_stable_sort(n, dtype, device):
    scores = tied(n, torch.Generator().manual_seed(n), dtype).to(device)
    for k in {0, 1, n // 10, n - 1, n}:
        for largest in (True, False):
            for magnitude in (True, False):
                got = topk_indices(scores, k, largest=largest, magnitude=magnitude)
                assert torch.equal(got, topk_indices_reference(scores, k, largest=largest, magnitude=magnitude))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(width=32), min_size=1, max_size=150), st.data(), st.booleans(), st.booleans())
def test_topk_of_any_floats(values, data, largest, magnitude):
    k = data.draw(st.integers(0, len(values)))
    got = topk_indices(torch.tensor(values), k, largest=largest, magnitude=magnitude).tolist()

    def rank(i):
        x = abs(values[i]) if magnitude else values[i]
        return (1, 0, i) if math.isnan(x) else (0, -x if largest else x, i)

    assert got == sorted(sorted(range(len(values)), key=rank)[:k])


@pytest.mark.parametrize("scores", ["sorted", "periodic", "equal", "two", "outliers"])
def test_topk_where_a_sample_misleads(scores):
    n = 70_000
    x = {
        "sorted": torch.arange(n, dtype=torch.float32),
        "periodic": torch.arange(n).remainder(64).float(),
        "equal": torch.ones(n),
        "two": (torch.arange(n) >= n // 2).float(),
        "outliers": torch.cat([torch.zeros(n - 30), torch.arange(30.0)]),
    }[scores]
    for k in (29, n // 10, n // 2 + 1):
        for largest in (True, False):
            assert torch.equal(topk_indices(x, k, largest=largest), topk_indices_reference(x, k, largest=largest))


@pytest.mark.parametrize("device", DEVICES)
def test_topk_of_many_layers(device):
    g = torch.Generator().manual_seed(4)
    scores = [tied(n, g, dtype).to(device) for n, dtype in [(300, torch.float32), (9001, torch.bfloat16)] * 40]
    ks = [int(torch.randint(s.numel() + 1, (), generator=g)) for s in scores]
    for got, s, k in zip(topk_indices_many(scores, ks, largest=False), scores, ks, strict=True):
        assert torch.equal(got, topk_indices_reference(s, k, largest=False))
    assert topk_indices_many([], []) == []
    with pytest.raises(ValueError, match="one k for each"):
        topk_indices_many(scores, ks[1:])


def test_topk_of_strided_scores_and_threads():
    scores = tied(600_000, torch.Generator().manual_seed(1)).view(-1, 2)[:, 1]
    expected = topk_indices_reference(scores, 31_111)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            assert torch.equal(topk_indices(scores, 31_111), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("scores", "k", "error"),
    [
        (torch.zeros(3, 3), 1, ValueError),
        (torch.zeros(3), 4, ValueError),
        (torch.zeros(3), -1, ValueError),
        (torch.zeros(3, dtype=torch.int64), 1, TypeError),
    ],
)
def test_topk_bad_input(scores, k, error):
    with pytest.raises(error, match="topk_indices"):
        topk_indices(scores, k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [0, 1, 63, 64, 1000])
def test_indices_above_any(n, dtype):
    scores = tied(n, torch.Generator().manual_seed(n)).to(dtype)
    for threshold in (-math.inf, -0.25, 0.0, 0.5, math.inf):
        expected = (scores > threshold).nonzero().squeeze(1)
        assert torch.equal(indices_above(scores, threshold), expected)
    if n == 1000:
        torch.library.opcheck(torch.ops.uasparse.indices_above.default, (scores, 0.25))
