import copy
import io
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import uasparse_kernels as ua
from uasparse_kernels._grid import hash_of, sample_indices

BLOCKS = [(1, 1), (4, 1), (3, 3)]


@st.composite
def patterns(draw):
    block = draw(st.sampled_from(BLOCKS))
    shape = [block[0] * draw(st.integers(1, 6)), block[1] * draw(st.integers(1, 6))]
    if draw(st.booleans()):
        shape += [draw(st.integers(1, 3)), draw(st.integers(1, 3))]
    seed, probability = draw(st.integers(0, 2**31)), draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    generator = torch.Generator().manual_seed(seed)
    total = math.prod(shape) // math.prod(block)
    blocks = (torch.rand(total, generator=generator) < probability).nonzero().squeeze(1)
    return ua.SparsityPattern.from_blocks(shape, blocks, block=block)


def block_mask(pattern):
    """The mask, built block by block from the definition of the grid."""
    mask = torch.zeros(pattern.shape, dtype=torch.bool)
    view = mask.view(*pattern.shape[:2], -1)
    (bh, bw), positions = pattern.block, view.shape[2]
    for row in range(pattern.grid[0]):
        for column in pattern.col[pattern.crow[row] : pattern.crow[row + 1]].tolist():
            channel, position = divmod(column, positions)
            view[row * bh : (row + 1) * bh, channel * bw : (channel + 1) * bw, position] = True
    return mask


@settings(deadline=None, max_examples=60)
@given(patterns())
def test_mask_pack_and_unpack_agree_with_the_definition(pattern):
    mask = block_mask(pattern)
    assert torch.equal(pattern.to_mask(), mask)
    assert pattern.nnz == mask.sum()
    assert ua.SparsityPattern.from_mask(mask, block=pattern.block).equal(pattern)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        dense = torch.randn(pattern.shape, dtype=dtype)
        values = pattern.pack(dense)
        assert values.shape == pattern.packed_shape
        assert torch.equal(values.view(-1), dense.view(-1)[pattern.indices().view(-1)])
        assert torch.equal(pattern.unpack(values), dense * mask)


@settings(deadline=None, max_examples=60)
@given(patterns())
def test_the_order_by_columns_is_the_transpose(pattern):
    rows, columns = pattern.blocks() // pattern.grid[1], pattern.blocks() % pattern.grid[1]
    perm = pattern.perm.long()
    assert torch.equal(rows[perm], pattern.row.long())
    expected = torch.repeat_interleave(torch.arange(pattern.grid[1]), pattern.ccol.diff().long())
    assert torch.equal(columns[perm], expected)
    assert torch.equal(perm.sort().values, torch.arange(pattern.num_blocks))
    order = columns[perm] * pattern.grid[0] + rows[perm]
    assert (order.diff() > 0).all()


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("density", [0.001, 0.07, 0.5, 0.993, 1.0])
def test_random_has_the_exact_count(block, density):
    pattern = ua.SparsityPattern.random((36, 39, 3, 1), density, block=block)
    total = 36 * 39 * 3 // math.prod(block)
    assert pattern.num_blocks == max(1, round(density * total))
    assert pattern.density == pytest.approx(pattern.to_mask().double().mean().item(), rel=1e-12)


def test_random_follows_its_generator():
    def draw(seed):
        return ua.SparsityPattern.random((50, 50), 0.1, generator=torch.Generator().manual_seed(seed))

    assert draw(1).equal(draw(1))
    assert not draw(1).equal(draw(2))


@pytest.mark.parametrize(("total", "count"), [(10, 10), (1000, 3), (1000, 900), (10**12, 1000), (5, 0), (0, 0)])
def test_sample_indices_are_distinct_and_ascending(total, count):
    sample = sample_indices(total, count)
    assert sample.shape == (count,)
    assert (sample.diff() > 0).all()
    assert not count or (sample[0] >= 0 and sample[-1] < total)


def test_sample_indices_are_uniform():
    # The sparse draw (rejection): 2000 draws of 4 from 40. Each index is expected 200 times, standard deviation 13.4.
    counts = torch.zeros(40)
    generator = torch.Generator().manual_seed(3)
    for _ in range(2000):
        counts[sample_indices(40, 4, generator)] += 1
    assert counts.sum() == 8000
    assert (counts - 200).abs().max() < 5 * 13.4


def test_gradients_of_pack_and_unpack():
    for block in BLOCKS:
        pattern = ua.SparsityPattern.random((12, 6, 2, 1), 0.4, block=block)
        dense = torch.randn(pattern.shape, dtype=torch.float64, requires_grad=True)
        values = torch.randn(pattern.packed_shape, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(pattern.pack, dense)
        assert torch.autograd.gradcheck(pattern.unpack, values)
        assert torch.autograd.gradgradcheck(pattern.unpack, values)


@pytest.mark.parametrize("block", BLOCKS)
def test_opcheck(block):
    pattern = ua.SparsityPattern.random((12, 6), 0.4, block=block)
    dense = torch.randn(pattern.shape, requires_grad=True)
    values = torch.randn(pattern.packed_shape, requires_grad=True)
    index = (pattern.crow, pattern.col)
    torch.library.opcheck(torch.ops.uasparse.pack.default, (dense, *index, pattern.block))
    torch.library.opcheck(torch.ops.uasparse.unpack.default, (values, *index, pattern.shape, pattern.block))


def test_non_contiguous_tensors_are_packed():
    pattern = ua.SparsityPattern.random((12, 6, 3, 3), 0.4, block=(3, 3))
    dense = torch.randn(pattern.shape).to(memory_format=torch.channels_last)
    assert torch.equal(pattern.unpack(pattern.pack(dense)), dense * pattern.to_mask())
    values = torch.randn(*pattern.packed_shape).transpose(1, 2)
    assert torch.equal(pattern.pack(pattern.unpack(values)), values)


def test_copies_pickles_and_state_dicts():
    pattern = ua.SparsityPattern.random((12, 9), 0.4, block=(3, 3))
    buffer = io.BytesIO()
    torch.save(pattern.state_dict(), buffer)
    buffer.seek(0)
    loaded = ua.SparsityPattern.random((12, 9), 0.9, block=(3, 3))
    loaded.load_state_dict(torch.load(buffer))
    assert set(pattern.state_dict()) == {"layout", "crow", "col", "signature"}
    for copied in (copy.deepcopy(pattern), pickle.loads(pickle.dumps(pattern)), loaded):
        assert copied.equal(pattern)
        assert torch.equal(copied.perm, pattern.perm)
        assert copied.col.data_ptr() != pattern.col.data_ptr()
    assert pattern.to("cpu").device == torch.device("cpu")
    assert pattern.half().col.dtype == torch.int32


@pytest.mark.parametrize(
    ("shape", "block", "density"), [((70, 33), (1, 1), 0.3), ((40, 8, 3, 3), (4, 4), 0.5), ((1, 5), (1, 1), 1.0)]
)
def test_the_signature_is_the_same_on_every_device(shape, block, density):
    pattern = ua.SparsityPattern.random(shape, density, block=block)
    for seed in (0, 12345, 2**61 - 1):
        expected = hash_of(pattern.crow, pattern.col, seed)
        assert torch.equal(torch.ops.uasparse.pattern_hash(pattern.crow, pattern.col, seed), expected)
        assert not torch.equal(torch.ops.uasparse.pattern_hash(pattern.crow, pattern.col, seed + 1), expected)
    torch.library.opcheck(torch.ops.uasparse.pattern_hash.default, (pattern.crow, pattern.col, 3))


def test_assign_is_in_place_and_checked():
    pattern = ua.SparsityPattern.random((12, 9), 0.4)
    other = ua.SparsityPattern.random((12, 9), 0.4)
    pointers = [buffer.data_ptr() for buffer in pattern.tensors()]
    pattern.assign_(other)
    assert pattern.equal(other)
    assert pointers == [buffer.data_ptr() for buffer in pattern.tensors()]
    with pytest.raises(ValueError, match="Expected a pattern of shape"):
        pattern.assign_(ua.SparsityPattern.random((12, 9), 0.5))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ua.SparsityPattern.random((4, 4), 0.0), "density in"),
        (lambda: ua.SparsityPattern.random((4, 4), 1.5), "density in"),
        (lambda: ua.SparsityPattern.random((4, 4), float("nan")), "density in"),
        (lambda: ua.SparsityPattern.random((4, 4, 4), 0.5), "weight shape"),
        (lambda: ua.SparsityPattern.random((4, -1), 0.5), "weight shape"),
        (lambda: ua.SparsityPattern.random((4, 6), 0.5, block=(4, 4)), "divides"),
        (lambda: ua.SparsityPattern.random((4, 4), 0.5, block=(1, 4)), "block"),
        (lambda: ua.SparsityPattern.from_mask(torch.eye(4), block=(2, 2)), "2 partly active"),
        (lambda: ua.SparsityPattern.random((4, 4), 0.5).pack(torch.zeros(4, 5)), r"\(4, 4\), got \(4, 5\)"),
        (lambda: ua.SparsityPattern.random((4, 4), 0.5).unpack(torch.zeros(7)), r"\(8,\), got \(7,\)"),
    ],
)
def test_bad_input_is_explained(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("crow", "col"),
    [
        ([0, 1], [0]),
        ([0, 2, 1], [0, 1]),
        ([0, 1, 2], [0, 9]),
        ([0, 2, 2], [1, 0]),
        ([0, 2, 2], [1, 1]),
        ([1, 1, 2], [0, 1]),
    ],
)
def test_inconsistent_indices_are_refused(crow, col):
    with pytest.raises(ValueError, match="Expected"):
        ua.SparsityPattern((2, 3), torch.tensor(crow), torch.tensor(col))


def test_a_corrupt_state_dict_changes_nothing():
    pattern = ua.SparsityPattern.random((4, 4), 0.5)
    before = copy.deepcopy(pattern)
    state = pattern.state_dict() | {"col": torch.full_like(pattern.col, 9)}
    with pytest.raises(RuntimeError, match="columns in"):
        pattern.load_state_dict(state)
    assert pattern.equal(before)


@pytest.mark.skipif(ua._library.compiled is None, reason="needs the compiled kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("shape", "block"),
    [((37, 91), (1, 1)), ((12, 9), (4, 1)), ((15, 20), (5, 5)), ((9, 7, 3, 2), (1, 1)), ((8, 6, 3, 3), (2, 2))],
)
@pytest.mark.parametrize("density", [0.05, 0.6, 1.0])
def test_keep_active(shape, block, density, dtype):
    pattern = ua.SparsityPattern.random(shape, density, block=block)
    dense = torch.randn(shape).to(dtype)
    strided = torch.stack([dense, dense], -1)
    expected = dense * pattern.to_mask()
    torch.ops.uasparse.keep_active_(dense, pattern.crow, pattern.col, block)
    assert torch.equal(dense, expected)
    untouched = strided[..., 1].clone()
    torch.ops.uasparse.keep_active_(strided[..., 0], pattern.crow, pattern.col, block)
    assert torch.equal(strided[..., 0], expected) and torch.equal(strided[..., 1], untouched)
