"""prune_grow and its pieces against their references: counts, ties, identity, both orders of indices, bad input."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from topology_support import tied

from uasparse_kernels import SparseLinear, SparsityPattern
from uasparse_kernels.ops import (
    prune_grow,
    prune_grow_reference,
    topk_indices_reference,
)
from uasparse_kernels.ops._common import pattern_tensors
from uasparse_kernels.ops.prune_grow import (
    GrowthCandidates,
    apply,
    block_scores,
    drop_candidates,
    drop_count,
    kept_blocks,
    random_candidates,
    resize,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
GEOMETRIES = [
    ((37, 53), (1, 1)),
    ((1, 19), (1, 1)),
    ((9, 7, 3, 3), (1, 1)),
    ((30, 21), (2, 1)),
    ((12, 5, 3, 2), (3, 1)),
    ((32, 28), (4, 4)),
    ((8, 12, 3, 1), (4, 4)),
]
STORAGES = ["packed", "dense"]


def case(shape, block, density, storage, seed=0, ties=True, device="cpu", dtype=torch.float32):
    """Weight, momentum, pattern and dense gradient; values repeat, so that ties matter."""
    g = torch.Generator().manual_seed(seed)
    pattern = SparsityPattern.random(shape, density, block=block, generator=g, device=device)
    dense = [torch.randn(shape, generator=g).to(device, dtype) for _ in range(3)]
    if ties:
        dense = [(2 * d).round() / 2 for d in dense]
    weight, momentum = (d * pattern.to_mask() for d in dense[:2])
    if storage == "packed":
        weight, momentum = pattern.pack(weight), pattern.pack(momentum)
    return weight, momentum, pattern, dense[2]


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("how", ["same", "strided"])
def test_odd_memory_moves_as_any_other(how, storage):
    """States that are the weight's own memory, or each other's, and tensors that are not contiguous."""
    weight, momentum, pattern, _ = case((13, 11), (1, 1), 0.4, storage, ties=False)
    expected = SparsityPattern.from_blocks(pattern.shape, pattern.blocks())
    moved = [weight.clone(), momentum.clone()]
    states = [momentum, momentum.view_as(momentum), weight.detach()]
    if how == "strided":
        weight, *states = (torch.stack([t, t], -1)[..., 0] for t in (weight, momentum))
    k = math.ceil(0.5 * pattern.num_blocks)
    dropped = drop_candidates(weight, pattern, k)
    grown = random_candidates(pattern, dropped, k, torch.Generator().manual_seed(3))
    apply(moved[0], expected, dropped, grown, moved[1:])
    apply(weight, pattern, dropped, grown, states)
    assert pattern.equal(expected) and torch.equal(weight, moved[0]) and torch.equal(states[0], moved[1])


def copy_of(pattern):
    return SparsityPattern(pattern.shape, pattern.crow.clone(), pattern.col.clone(), block=pattern.block)


def assert_consistent(pattern):
    """Both orders of indices are those of the pattern made anew from its blocks."""
    anew = SparsityPattern.from_blocks(pattern.shape, pattern.blocks(), block=pattern.block)
    for mine, theirs in zip(pattern.tensors(), anew.tensors(), strict=True):
        assert torch.equal(mine, theirs)


# ---- the whole update ----


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("density", [0.1, 0.9, 1.0])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("reset", [False, True])
def test_matches_reference(reset, geometry, storage, density, dtype, device):
    for fraction in (0.0, 0.01, 0.3, 1.0):
        weight, momentum, pattern, grad = case(*geometry, density, storage, device=device, dtype=dtype)
        twins = weight.clone(), momentum.clone(), copy_of(pattern)
        options = {"grow_scores": grad, "reset_regrown": reset}
        result = prune_grow(weight, pattern, fraction, states=[momentum], **options)
        expected = prune_grow_reference(twins[0], twins[2], fraction, states=[twins[1]], **options)
        assert torch.equal(result.dropped, expected.dropped) and torch.equal(result.grown, expected.grown)
        assert torch.equal(weight, twins[0]) and torch.equal(momentum, twins[1]) and pattern.equal(twins[2])
        assert_consistent(pattern)


@settings(max_examples=80, deadline=None)
@given(
    geometry=st.sampled_from(GEOMETRIES),
    density=st.floats(0.02, 1),
    fraction=st.floats(0, 1),
    storage=st.sampled_from(STORAGES),
    random=st.booleans(),
    reset=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_properties(geometry, density, fraction, storage, random, reset, seed):
    """What an update promises, checked on dense tensors and without the reference."""
    weight, momentum, pattern, grad = case(*geometry, density, storage, seed=seed)
    dense = [t if storage == "dense" else pattern.unpack(t) for t in (weight.clone(), momentum.clone())]
    old, before = pattern.to_mask(), [(t.data_ptr(), t.shape) for t in (weight, momentum, *pattern.tensors())]
    generator = torch.Generator().manual_seed(seed)
    growth = {"grow": "random", "generator": generator} if random else {"grow_scores": grad}
    dropped, grown = prune_grow(weight, pattern, fraction, states=[momentum], reset_regrown=reset, **growth)

    count = math.ceil(fraction * int(old.sum()) / math.prod(pattern.block))
    assert dropped.numel() == grown.numel() == count
    assert [(t.data_ptr(), t.shape) for t in (weight, momentum, *pattern.tensors())] == before
    new = pattern.to_mask()
    assert new.sum() == old.sum()
    assert_consistent(pattern)

    def mask_of(blocks):
        return SparsityPattern.from_blocks(pattern.shape, blocks, block=pattern.block).to_mask()

    kept = old & ~mask_of(dropped)
    assert torch.equal(new, kept | mask_of(grown)) and not (kept & mask_of(grown)).any()
    for tensor, was in zip((weight, momentum), dense, strict=True):
        now = tensor if storage == "dense" else pattern.unpack(tensor)
        # What left and came back keeps its value and its state.
        assert torch.equal(now, torch.where(kept if reset else old & new, was, torch.zeros_like(was)))
    norms = block_scores(dense[0], pattern.block)
    active, left = torch.zeros(norms.numel(), dtype=torch.bool), torch.zeros(norms.numel(), dtype=torch.bool)
    active[SparsityPattern.from_mask(old, block=pattern.block).blocks()] = True
    left[dropped] = True
    if 0 < count < int(active.sum()):
        assert norms[left].max() <= norms[active & ~left].min()
    if not random and count:
        scores, came = block_scores(grad, pattern.block), torch.zeros_like(left)
        came[grown] = True
        rest = ~came & ~(active & ~left)
        assert not rest.any() or scores[came].min() >= scores[rest].max()


@pytest.mark.parametrize("storage", STORAGES)
def test_ties_go_to_the_lower_index(storage):
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0]], dtype=torch.bool)
    pattern = SparsityPattern.from_mask(mask)
    weight = torch.ones(2, 4) * mask
    weight = pattern.pack(weight) if storage == "packed" else weight
    dropped, grown = prune_grow(weight, pattern, 0.5, grow_scores=torch.ones(2, 4))
    assert dropped.tolist() == [0, 1] and grown.tolist() == [0, 1]  # just-dropped weights are candidates
    assert weight.flatten().sum() == 4 and torch.equal(pattern.to_mask(), mask)
    prune_grow(weight, pattern, 0.5, grow_scores=torch.ones(2, 4), reset_regrown=True)
    assert weight.flatten().sum() == 2 and torch.equal(pattern.to_mask(), mask)


def test_nan_scores_grow_last():
    pattern = SparsityPattern.from_mask(torch.tensor([[1, 0, 0, 0, 0]]))
    scores = torch.tensor([[0.0, math.nan, 1.0, math.nan, 0.5]])
    assert prune_grow(torch.ones(1), pattern, 1.0, grow_scores=scores).grown.tolist() == [2]
    pattern = SparsityPattern.from_mask(torch.tensor([[1, 1, 1, 0, 0]]))
    scores = torch.full((1, 5), math.nan)
    assert prune_grow(torch.tensor([3.0, 2.0, 1.0]), pattern, 0.3, grow_scores=scores).grown.tolist() == [2]


@pytest.mark.parametrize("grow_scores", ["all kept are nan", "all infinite"])
def test_kept_blocks_are_never_grown(grow_scores):
    pattern = SparsityPattern.random((20, 20), 0.9)
    scores = torch.full((20, 20), math.nan if grow_scores == "all kept are nan" else math.inf)
    weight = torch.randn(pattern.nnz)
    kept_before = pattern.blocks()
    dropped, grown = prune_grow(weight, pattern, 0.05, grow_scores=scores)
    kept = kept_before[~torch.isin(kept_before, dropped)]
    assert not torch.isin(grown, kept).any() and grown.unique().numel() == dropped.numel()


def test_channels_last_weight():
    weight, momentum, pattern, grad = case((8, 12, 3, 3), (4, 4), 0.4, "dense")
    twins = [t.clone() for t in (weight, momentum)], copy_of(pattern)
    last = [t.to(memory_format=torch.channels_last) for t in (weight, momentum)]
    prune_grow(last[0], pattern, 0.4, grow_scores=grad.to(memory_format=torch.channels_last), states=last[1:])
    prune_grow(twins[0][0], twins[1], 0.4, grow_scores=grad, states=twins[0][1:])
    assert pattern.equal(twins[1]) and all(torch.equal(a, b) for a, b in zip(last, twins[0], strict=True))
    assert last[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("storage", STORAGES)
def test_parameter_and_its_graph(storage):
    """A parameter changes in place; a graph that saved its old values refuses to run."""
    weight, _, pattern, grad = case((6, 7), (1, 1), 0.5, storage, ties=False)
    parameter = torch.nn.Parameter(weight)
    loss = parameter.square().sum()
    prune_grow(parameter, pattern, 0.5, grow_scores=grad)
    assert parameter.is_leaf and parameter.requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_independent_of_the_number_of_threads():
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            weight, momentum, pattern, grad = case((700, 300), (1, 1), 0.3, "packed")
            result = prune_grow(weight, pattern, 0.3, grow_scores=grad, states=[momentum])
            results.append([weight, momentum, *pattern.tensors(), *result])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# ---- pieces for streamed growth ----


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tile", [1, 3, 8, 37])
@pytest.mark.parametrize("fraction", [0.02, 0.3, 1.0])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_growth_in_tiles(geometry, fraction, tile, device):
    weight, _, pattern, grad = case(*geometry, 0.3, "packed", device=device)
    k = drop_count(fraction, pattern)
    dropped = drop_candidates(weight, pattern, k)
    candidates = GrowthCandidates(k, pattern, dropped)
    for row in range(0, pattern.grid[0], tile):
        rows = grad[row * pattern.block[0] : (row + tile) * pattern.block[0]]
        candidates.add(block_scores(rows, pattern.block), row * pattern.grid[1])
        assert sum(t.numel() for t in candidates._indices) <= 4 * k
    expected = prune_grow_reference(weight, pattern, fraction, grow_scores=grad)
    assert torch.equal(dropped, expected.dropped) and torch.equal(candidates.select(), expected.grown)


@settings(max_examples=60, deadline=None)
@given(cuts=st.lists(st.integers(1, 400), max_size=12), k=st.integers(0, 60), seed=st.integers(0, 2**20))
def test_growth_in_any_tiles(cuts, k, seed):
    """Tiles need not end with a row; NaN counts as -inf."""
    g = torch.Generator().manual_seed(seed)
    pattern = SparsityPattern.random((20, 20), 0.4, generator=g)
    scores = tied(400, g)
    dropped = drop_candidates(torch.randn(pattern.nnz, generator=g), pattern, 30)
    candidates = GrowthCandidates(k, pattern, dropped)
    edges = sorted({0, 400, *(c for c in cuts)})
    for begin, end in itertools.pairwise(edges):
        candidates.add(scores[begin:end].clone(), begin)
        assert sum(t.numel() for t in candidates._indices) <= 4 * k
    expected = scores.nan_to_num(-math.inf, math.inf, -math.inf)
    expected[kept_blocks(pattern, dropped)] = math.nan
    assert torch.equal(candidates.select(), topk_indices_reference(expected, k))


@pytest.mark.parametrize("density", [0.8, 0.97])
def test_growth_where_most_is_kept(density):
    """Tiles hold fewer candidates than are wanted: kept blocks must not fill their place for good."""
    pattern = SparsityPattern.random((50, 40), density)
    grad = torch.randn(50, 40)
    dropped = drop_candidates(torch.randn(pattern.nnz), pattern, 500)
    candidates = GrowthCandidates(500, pattern, dropped)
    for row in range(0, 50, 5):
        candidates.add(block_scores(grad[row : row + 5], (1, 1)), row * 40)
    expected = grad.abs().view(-1)
    expected[kept_blocks(pattern, dropped)] = math.nan
    assert torch.equal(candidates.select(), topk_indices_reference(expected, 500))


def test_growth_candidates_bad_use():
    pattern = SparsityPattern.random((4, 5), 0.5)
    none = torch.empty(0, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"k in \[0, 10\]"):
        GrowthCandidates(11, pattern, none)
    candidates = GrowthCandidates(3, pattern, none)
    with pytest.raises(ValueError, match="from block 0 on"):
        candidates.add(torch.zeros(5), 5)
    with pytest.raises(ValueError, match="at most 20"):
        candidates.add(torch.zeros(21), 0)
    candidates.add(torch.zeros(5), 0)
    with pytest.raises(ValueError, match="all 20 blocks"):
        candidates.select()


@pytest.mark.parametrize("block", [(1, 1), (3, 1), (2, 2)])
def test_random_growth_is_uniform(block):
    """Each inactive or dropped block is drawn equally often (five standard deviations), no other ever."""
    pattern = SparsityPattern.random((12, 6), 0.4, block=block)
    dropped = pattern.blocks()[::3]
    free = torch.ones(math.prod(pattern.grid), dtype=torch.bool)
    free[kept_blocks(pattern, dropped)] = False
    k, draws, generator = dropped.numel(), 500, torch.Generator().manual_seed(7)
    counts = torch.zeros(free.numel())
    for _ in range(draws):
        grown = random_candidates(pattern, dropped, k, generator)
        assert grown.numel() == k and (grown[1:] > grown[:-1]).all()
        counts[grown] += 1
    share = k / int(free.sum())
    assert counts[~free].sum() == 0
    assert (counts[free] - draws * share).abs().max() <= 5 * math.sqrt(draws * share * (1 - share))


@pytest.mark.parametrize("dropped", [torch.empty(1, 0, dtype=torch.int64), torch.empty(0), torch.tensor(3)])
def test_growth_candidates_want_one_row_of_dropped_blocks(dropped):
    with pytest.raises(ValueError, match="one row of int64 indices"):
        GrowthCandidates(1, SparsityPattern.random((4, 4), 0.5), dropped)


@pytest.mark.parametrize("block", [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("function", [prune_grow, prune_grow_reference])
def test_an_empty_pattern_stays_empty(function, block):
    pattern = SparsityPattern.from_mask(torch.zeros(4, 6), block=block)
    for weight in (torch.zeros(4, 6), torch.zeros(pattern.packed_shape)):
        dropped, grown = function(weight, pattern, 0.5, grow_scores=torch.rand(4, 6))
        assert dropped.numel() == grown.numel() == pattern.num_blocks == 0 and not weight.any()


def test_random_growth_needs_no_dense_memory():
    pattern = SparsityPattern(
        (2**18, 2**18), torch.zeros(2**18 + 1, dtype=torch.int32), torch.empty(0, dtype=torch.int32)
    )
    none = torch.empty(0, dtype=torch.int64)
    assert random_candidates(pattern, none, 1000).unique().numel() == 1000


@pytest.mark.parametrize("block", [(1, 1), (3, 1), (2, 2)])
@pytest.mark.parametrize("shape", [(12, 8), (12, 8, 3, 2)])
def test_block_scores(shape, block):
    dense = torch.randn(shape, dtype=torch.float64)
    pattern = SparsityPattern.random(shape, 1.0, block=block)
    expected = pattern.pack(dense).reshape(pattern.num_blocks, -1).norm(dim=1)
    before = dense.clone()
    torch.testing.assert_close(block_scores(dense, block), expected)
    assert torch.equal(dense, before)


# ---- bad input changes nothing ----


BAD = [
    ({"fraction": -0.1}, ValueError, "fraction"),
    ({"fraction": 1.1}, ValueError, "fraction"),
    ({"fraction": math.nan}, ValueError, "fraction"),
    ({"grow_scores": None}, ValueError, "grow_scores of shape"),
    ({"grow_scores": torch.zeros(7, 6)}, ValueError, "grow_scores of shape"),
    ({"grow_scores": torch.zeros(6, 7, dtype=torch.int64)}, TypeError, "floating-point"),
    ({"grow": "magic"}, ValueError, "magic"),
    ({"grow": "random"}, ValueError, "no grow_scores"),
    ({"states": [torch.zeros(3)]}, ValueError, "states of the weight's shape"),
    ({"states": [torch.tensor(1.0)]}, ValueError, "leave other states"),
]


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input_changes_nothing(change, error, message, storage):
    weight, momentum, pattern, grad = case((6, 7), (1, 1), 0.5, storage)
    before = [t.clone() for t in (weight, momentum, *pattern.tensors())]
    arguments = {"fraction": 0.3, "grow_scores": grad, "states": [momentum]} | change
    if "states" in change:
        arguments["states"] = [momentum, *change["states"]]
    for function in (prune_grow, prune_grow_reference):
        with pytest.raises(error, match=message):
            function(weight, pattern, **arguments)
    assert all(torch.equal(a, b) for a, b in zip((weight, momentum, *pattern.tensors()), before, strict=True))


def test_weight_of_another_shape():
    with pytest.raises(ValueError, match="dense-stored"):
        prune_grow(torch.zeros(5, 5), SparsityPattern.random((6, 7), 0.5), 0.3, grow="random")


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(
    ("dropped", "grown", "message"),
    [
        ([0, 1], [3, 4], "active"),  # 1 is not active
        ([0, 1], [1, 3], "active"),  # nor where it comes back
        ([0, 2], [3, 5], "inactive or dropped"),  # 5 is active
        ([2, 0], [1, 3], "ascending"),
        ([0, 0], [1, 3], "ascending"),
        ([0, 2], [3, 1], "ascending"),
        ([0, 2], [1, 6], "in \\["),
        ([0], [1, 3], "as many"),
    ],
)
def test_apply_refuses_bad_blocks(dropped, grown, message, storage):
    pattern = SparsityPattern.from_mask(torch.tensor([[1, 0, 1], [0, 0, 1]]))
    weight = torch.tensor([1.0, 2.0, 3.0])
    weight = pattern.unpack(weight) if storage == "dense" else weight
    before = [t.clone() for t in (weight, *pattern.tensors())]
    with pytest.raises(ValueError, match=message):
        apply(weight, pattern, torch.tensor(dropped), torch.tensor(grown), [weight.clone()])
    assert all(torch.equal(a, b) for a, b in zip((weight, *pattern.tensors()), before, strict=True))


# ---- registration and instruction sets ----


@pytest.mark.parametrize("storage", STORAGES)
def test_opcheck(storage):
    weight, momentum, pattern, _ = case((6, 7), (1, 1), 0.5, storage)
    dropped, grown = pattern.blocks()[:2], (~pattern.to_mask()).flatten().nonzero().squeeze(1)[:2]
    tensors = pattern_tensors(pattern)
    arguments = (weight, [momentum], *tensors, dropped, grown, pattern.shape, pattern.block)
    torch.library.opcheck(torch.ops.uasparse.prune_grow_.default, arguments)
    torch.library.opcheck(torch.ops.uasparse.topk_indices.default, (torch.randn(20), 4, True, False))
    arguments = ([torch.randn(20), torch.randn(3)], [4, 0], True, True)
    torch.library.opcheck(torch.ops.uasparse.topk_indices_many.default, arguments)
    arguments = (torch.randn(14), 7, pattern.crow, pattern.col, dropped, 7)
    torch.library.opcheck(torch.ops.uasparse.exclude_kept_.default, arguments)
    arguments = (torch.randn(6, 7), 5, pattern.crow, pattern.col, dropped)
    torch.library.opcheck(torch.ops.uasparse.growth_indices.default, arguments)
    torch.library.opcheck(torch.ops.uasparse.blocks_at.default, (pattern.crow, pattern.col, torch.tensor([0, 3]), 7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("shape", "density"), [((300, 517), 0.1), ((3, 70000), 0.5), ((1000, 61), 0.9), ((9, 5), 0.3)])
def test_growth_of_any(shape, density, dtype):
    """Where some are left out of the selection, by bits that straddle rows and chunks."""
    g = torch.Generator().manual_seed(shape[0])
    pattern = SparsityPattern.random(shape, density, generator=g)
    active = pattern.blocks()
    dropped = active[torch.rand(len(active), generator=g) < 0.4]
    kept = active[~torch.isin(active, dropped)]
    free = math.prod(shape) - len(kept)
    for scores in (torch.randn(shape, generator=g, dtype=dtype), tied(math.prod(shape), g, dtype).view(shape)):
        reference = scores.flatten().abs().nan_to_num(nan=-math.inf, posinf=math.inf)
        reference[kept] = math.nan
        for k in (0, 1, free // 3, free):
            grown = torch.ops.uasparse.growth_indices(scores, k, pattern.crow, pattern.col, dropped)
            assert torch.equal(grown, topk_indices_reference(reference, k))
        with pytest.raises(ValueError, match="expected k in"):
            torch.ops.uasparse.growth_indices(scores, free + 1, pattern.crow, pattern.col, dropped)


@pytest.mark.parametrize("storage", ["packed", "dense"])
@pytest.mark.parametrize("block", [(1, 1), (3, 1), (2, 2)])
@pytest.mark.parametrize(("out", "come"), [(5, 2), (3, 0), (0, 3), (2, 4), (0, 0)])
@pytest.mark.parametrize("reset", [False, True])
def test_resize_moves_everything(reset, block, storage, out, come):
    g = torch.Generator().manual_seed(out)
    pattern = SparsityPattern.random((12, 6, 1, 3), 0.4, block=block, generator=g)
    dense = torch.randn(pattern.shape, generator=g, dtype=torch.float64)
    tensors = [torch.nn.Parameter(dense.clone()), dense + 5]
    with torch.no_grad():
        tensors = [pattern.pack(t) if storage == "packed" else t.mul_(pattern.to_mask()) for t in tensors]
    kept = pattern.to_mask()
    active = pattern.blocks()
    dropped = active[torch.randperm(active.numel(), generator=g)[:out]].sort().values
    kept &= ~pattern.mask_of(dropped)
    others = (~torch.isin(torch.arange(math.prod(pattern.grid)), active)).nonzero().squeeze(1)
    grown = torch.cat([dropped[:1], others[torch.randperm(others.numel(), generator=g)]])[:come].sort().values
    if not reset:  # a block that comes back is as it was
        kept |= pattern.to_mask() & pattern.mask_of(grown)
    versions = [t._version for t in tensors]
    resize(tensors[0], pattern, dropped, grown, tensors[1:], reset_regrown=reset)
    expected = torch.cat([active[~torch.isin(active, dropped)], grown]).sort().values
    assert torch.equal(pattern.blocks(), expected)
    for tensor, old, version in zip(tensors, [dense, dense + 5], versions, strict=True):
        got = pattern.unpack(tensor) if storage == "packed" else tensor
        assert torch.equal(got.detach(), old * kept)
        assert tensor._version > version


def test_an_old_graph_is_refused_and_a_new_one_is_right():
    layer = SparseLinear(6, 5, sparsity=0.6, storage="packed", dtype=torch.float64)
    x = torch.randn(3, 6, dtype=torch.float64)
    calls = []
    layer.weight.register_post_accumulate_grad_hook(calls.append)
    old, done = layer(x).square().sum(), layer(x).sum()
    done.backward(retain_graph=True)
    blocks = layer.pattern.blocks()
    resize(layer.weight, layer.pattern, blocks[::3], blocks[:0], [layer.weight.grad])
    with pytest.raises(RuntimeError):
        old.backward()
    layer.weight.grad = None
    new = layer(x).square().sum()
    new.backward()
    dense = layer.to_dense()
    dense(x).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, layer.pattern.pack(dense.weight.grad))
    assert len(calls) == 2


@pytest.mark.parametrize(("dropped", "grown"), [([1], []), ([2, 0], []), ([9], []), ([], [2]), ([0, 0], [])])
def test_resize_refuses_bad_blocks_and_changes_nothing(dropped, grown):
    pattern = SparsityPattern.from_mask(torch.tensor([[1, 0, 1], [0, 0, 1]]))
    weight = torch.tensor([1.0, 2.0, 3.0])
    before = [t.clone() for t in (weight, *pattern.tensors())]
    with pytest.raises(ValueError, match="active"):
        resize(weight, pattern, *(torch.tensor(x, dtype=torch.int64) for x in (dropped, grown)))
    assert all(torch.equal(a, b) for a, b in zip((weight, *pattern.tensors()), before, strict=True))


@pytest.mark.parametrize("k", [1, 200, 1500])
def test_blocks_to_drop_that_are_not_active_are_refused_before_anything_is_written(k):
    # All that grows is in the first row, and what is to drop, not active, in the last: the first was planned by then.
    pattern = SparsityPattern.from_mask(torch.arange(4000).view(2, 2000) < 10)
    weight = torch.randn(10)
    tensors = [t.clone() for t in (pattern.crow, pattern.col, pattern.ccol, pattern.row, pattern.perm)]
    kept = [t.clone() for t in (weight, *tensors)]
    dropped, grown = torch.arange(2000, 2000 + k), torch.arange(100, 100 + k)
    with pytest.raises(ValueError, match=r"which is not active"):
        torch.ops.uasparse.prune_grow_(weight, [], *tensors, dropped, grown, [2, 2000], [1, 1])
    assert all(torch.equal(now, before) for now, before in zip((weight, *tensors), kept, strict=True))
