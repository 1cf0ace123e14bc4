"""masked_linear on the CPU against its float64 reference: forward, all gradients, storages, blocks, odd shapes."""

from __future__ import annotations

import copy
import gc
import importlib
import os
import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import uasparse_kernels as ua
from uasparse_kernels import SparsityPattern, ops
from uasparse_kernels.ops._common import Choice, pattern_tensors
from uasparse_kernels.ops.prune_grow import resize

# The package gives the function of this name; the tests need the module.
module = importlib.import_module("uasparse_kernels.ops.masked_linear")
reference = module.masked_linear_reference
pytestmark = pytest.mark.skipif(
    not torch._C._dispatch_has_kernel_for_dispatch_key("uasparse::masked_linear", "CPU"),
    reason="needs the compiled ops",
)
# Of a dot product of n terms, relative to the sum of their magnitudes: a generous multiple of the unit round-off.
EPS = {torch.float32: 2**-23, torch.float64: 2**-52, torch.bfloat16: 2**-8}


def _op(input, weight, pattern, bias=None):
    """The compiled op itself, whatever the dispatch would choose."""
    return torch.ops.uasparse.masked_linear(
        input, weight, bias, *pattern_tensors(pattern), pattern.shape, pattern.block
    )


def _pattern(out, inp, density, block=(1, 1), seed=0):
    blocks = (out // block[0]) * (inp // block[1])
    generator = torch.Generator().manual_seed(seed)
    if density == 0:
        return SparsityPattern.from_blocks((out, inp), torch.empty(0, dtype=torch.int64), block=block)
    return SparsityPattern.random((out, inp), max(density, 1 / blocks), block=block, generator=generator)


def _problem(pattern, batch_shape, dtype, packed, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    out, inp = pattern.shape
    values = normal(*pattern.packed_shape)
    weight = values if packed else pattern.unpack(values)
    return normal(*batch_shape, inp), weight, normal(out), normal(*batch_shape, out)


def _gradients(function, input, weight, pattern, bias, grad_output):
    leaves = [t.detach().clone().requires_grad_() for t in (input, weight, bias)]
    output = function(leaves[0], leaves[1], pattern, leaves[2])
    output.backward(grad_output)
    return output.detach(), *(t.grad for t in leaves)


def _check_against_reference(pattern, input, weight, bias, grad_output):
    """Forward and gradients within the round-off of their dtype, scaled by the magnitudes that are summed."""
    dtype, wide = input.dtype, torch.float64
    ours = _gradients(_op, input, weight, pattern, bias, grad_output)
    exact = _gradients(reference, *(t.to(wide) for t in (input, weight)), pattern, bias.to(wide), grad_output.to(wide))
    sizes = _gradients(
        reference,
        *(t.to(wide).abs() for t in (input, weight)),
        pattern,
        bias.to(wide).abs(),
        grad_output.to(wide).abs(),
    )
    # float32 sums of n terms err by at most n * eps; bfloat16 is summed in float32 and rounded once.
    terms = max(*pattern.shape, grad_output.numel() // pattern.shape[0], 1) + 1
    tolerance = terms * EPS[torch.float64 if dtype == torch.float64 else torch.float32]
    if dtype == torch.bfloat16:
        tolerance += EPS[torch.bfloat16]
    for name, got, want, size in zip(("output", "input", "weight", "bias"), ours, exact, sizes, strict=True):
        assert got.dtype == dtype and got.shape == want.shape, name
        error = (got.to(wide) - want).abs()
        assert bool((error <= tolerance * size + 1e-300).all()), f"{name}: off by {float(error.max()):.3g}"


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", [(1, 1), (4, 1), (3, 1), (16, 1), (2, 2), (16, 16), (5, 5)], ids=str)
@pytest.mark.parametrize("batch", [1, 7, 64, 150])
def test_matches_reference(batch, block, dtype, packed):
    pattern = _pattern(37 * block[0], 29 * block[1], 0.2, block)
    _check_against_reference(pattern, *_problem(pattern, (batch,), dtype, packed))


@settings(max_examples=60, deadline=None)
@given(
    out=st.integers(1, 70),
    inp=st.integers(1, 70),
    block=st.sampled_from([(1, 1), (2, 1), (8, 1), (4, 4)]),
    batch_shape=st.lists(st.integers(1, 9), max_size=3),
    density=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    packed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_random_problems(out, inp, block, batch_shape, density, dtype, packed, seed):
    pattern = _pattern(out * block[0], inp * block[1], density, block, seed)
    _check_against_reference(pattern, *_problem(pattern, batch_shape, dtype, packed, seed))


@pytest.mark.parametrize("density", [0, 0.01, 0.1, 0.5, 1])
@pytest.mark.parametrize("shape", [(1, 1), (1, 700), (700, 1), (300, 1500), (1100, 333)], ids=str)
def test_sizes_and_densities(shape, density):
    """Sizes beyond one block of rows, of columns and of the batch."""
    pattern = _pattern(*shape, density)
    for batch in (3, 16, 65, 200):
        _check_against_reference(pattern, *_problem(pattern, (batch,), torch.float32, True))


@pytest.mark.parametrize("batch", range(1, 36))
def test_small_batches(batch):
    pattern = _pattern(65, 130, 0.3)
    _check_against_reference(pattern, *_problem(pattern, (batch,), torch.float32, True))


def test_rows_of_very_different_lengths():
    mask = torch.zeros(200, 400)
    mask[3], mask[:, 5], mask[199, 399] = 1, 1, 1
    pattern = SparsityPattern.from_mask(mask)
    _check_against_reference(pattern, *_problem(pattern, (70,), torch.float32, True))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("batch", [5, 70])
def test_strides(batch, packed):
    """Inputs and gradients that are transposed, sliced, expanded or offset."""
    pattern = _pattern(24, 40, 0.3)
    input, weight, bias, _ = _problem(pattern, (2, batch), torch.float32, packed)
    wide = torch.randn(2, batch, 80)
    for x in (
        input.transpose(0, 1),
        input.permute(1, 0, 2).contiguous().permute(1, 0, 2),
        input.mT.contiguous().mT,
        wide[..., ::2],
        wide[..., 7:47],
        wide[:, :1, :40].expand(2, batch, 40),
        wide[0, :, :40].t().contiguous().t(),
    ):
        gradient = torch.randn(*x.shape[:-1], 24)
        for g in (gradient, gradient.mT.contiguous().mT, gradient[..., :1].expand_as(gradient)):
            _check_against_reference(pattern, x, weight, bias, g)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("batch_shape", [(0,), (3, 0, 2)])
def test_empty_batch(batch_shape, packed):
    pattern = _pattern(6, 4, 0.5)
    output, *gradients = _gradients(_op, *_problem_in_order(pattern, batch_shape, packed))
    assert output.shape == (*batch_shape, 6)
    assert all(not g.any() for g in gradients)
    assert gradients[1].shape == (pattern.packed_shape if packed else (6, 4))


def _problem_in_order(pattern, batch_shape, packed):
    input, weight, bias, grad_output = _problem(pattern, batch_shape, torch.float32, packed)
    return input, weight, pattern, bias, grad_output


def test_no_bias_and_one_dimension():
    pattern = _pattern(30, 20, 0.4)
    input, weight, _, _ = _problem(pattern, (), torch.float32, True)
    got = _op(input, weight, pattern)
    assert got.shape == (30,)
    torch.testing.assert_close(got, reference(input, weight, pattern))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("block", [(1, 1), (2, 1), (3, 3)], ids=str)
def test_gradcheck(block, packed):
    pattern = _pattern(4 * block[0], 3 * block[1], 0.6, block)
    input, weight, bias, _ = _problem(pattern, (2, 3), torch.float64, packed)
    # Inactive entries of a dense-stored weight are zero and have a zero gradient: the derivative is taken in the packed
    # values.
    values = (weight if packed else pattern.pack(weight)).requires_grad_()

    def function(x, v, b):
        return _op(x, v if packed else pattern.unpack(v), pattern, b)

    assert torch.autograd.gradcheck(function, (input.requires_grad_(), values, bias.requires_grad_()))


@pytest.mark.parametrize("packed", [True, False])
def test_opcheck(packed):
    pattern = _pattern(12, 10, 0.3)
    input, weight, bias, grad_output = _problem(pattern, (2, 3), torch.float32, packed)
    rest = (*pattern_tensors(pattern), pattern.shape, pattern.block)
    for b in (None, bias.requires_grad_()):
        arguments = (input.requires_grad_(), weight.requires_grad_(), b, *rest)
        torch.library.opcheck(torch.ops.uasparse.masked_linear, arguments)
    arguments = (grad_output, input.detach(), weight.detach(), *rest, [True, False, True])
    torch.library.opcheck(torch.ops.uasparse.masked_linear_backward, arguments)


def test_only_wanted_gradients():
    pattern = _pattern(12, 10, 0.3)
    input, weight, bias, grad_output = _problem(pattern, (70,), torch.float32, True)
    full = _gradients(_op, input, weight, pattern, bias, grad_output)[1:]
    rest = (*pattern_tensors(pattern), pattern.shape, pattern.block)
    for mask in ([a, b, c] for a in (True, False) for b in (True, False) for c in (True, False)):
        parts = torch.ops.uasparse.masked_linear_backward(grad_output, input, weight, *rest, mask)
        for wanted, part, whole in zip(mask, parts, full, strict=True):
            assert torch.equal(part, whole) if wanted else part.numel() == 0


def test_compiles_whole_and_agrees():
    """Traced by torch.compile, forward and backward, without a graph break."""
    pattern = _pattern(64, 32, 0.2)
    input, weight, bias, grad_output = _problem(pattern, (8,), torch.float32, True)
    compiled = torch.compile(_op, backend="aot_eager", fullgraph=True)
    got = _gradients(compiled, input, weight, pattern, bias, grad_output)
    want = _gradients(_op, input, weight, pattern, bias, grad_output)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_gradient_of_inactive_entries_is_zero():
    pattern = _pattern(50, 60, 0.2)
    input, weight, bias, grad_output = _problem(pattern, (9,), torch.float32, False)
    gradient = _gradients(_op, input, weight, pattern, bias, grad_output)[2]
    assert not gradient[~pattern.to_mask()].any()
    assert gradient[pattern.to_mask()].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [17, 32, 33, 65, 129, 200])
def test_many_columns_and_any_batch(batch, dtype):
    """Several blocks of columns, panels of every width, rows of odd and even lengths."""
    pattern = _pattern(23, 1100, 0.1, seed=batch)
    _check_against_reference(pattern, *_problem(pattern, (batch,), dtype, True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_changed_pattern_is_noticed(dtype):
    """What was derived from it is made anew, for both orders."""
    pattern = _pattern(1100, 1200, 0.05)
    problem = _problem(pattern, (70,), dtype, True)
    _check_against_reference(pattern, *problem)
    pattern.assign_(_pattern(1100, 1200, 0.05, seed=1))
    _check_against_reference(pattern, *problem)
    scores = torch.randn(pattern.shape, generator=torch.Generator().manual_seed(0))
    ops.prune_grow(problem[1].detach(), pattern, 0.3, grow_scores=scores)
    _check_against_reference(pattern, *problem)


def test_a_pattern_of_inference_tensors():
    with torch.inference_mode():
        pattern = _pattern(9, 1200, 0.1)
        assert pattern.col.is_inference()
        input, weight, bias, _ = _problem(pattern, (40,), torch.float32, True)
        got = _op(input.detach(), weight.detach(), pattern, bias.detach())
        torch.testing.assert_close(got, reference(input, weight, pattern, bias).detach())


def test_bfloat16_is_summed_in_float32():
    """1 + 4096 * 2^-12 is 2; bfloat16 sums would stay at 1."""
    pattern = _pattern(3, 4097, 1)
    input = torch.full((2, 4097), 2**-12, dtype=torch.bfloat16)
    input[:, 0] = 1
    got = _op(input, torch.ones(pattern.nnz, dtype=torch.bfloat16), pattern)
    assert torch.equal(got, torch.full((2, 3), 2, dtype=torch.bfloat16))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_special_values_pass_through(dtype, value):
    pattern = SparsityPattern.from_mask(torch.eye(40))
    input = torch.zeros(70, 40, dtype=dtype)
    input[69, 39] = value
    got = _op(input, torch.ones(40, dtype=dtype), pattern)
    assert torch.equal(torch.isnan(got), torch.isnan(input))
    assert torch.equal(torch.isinf(got), torch.isinf(input))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 8, 200])
@pytest.mark.parametrize("block", [(1, 1), (4, 1), (8, 8)], ids=str)
def test_same_bits_on_every_run_and_with_any_number_of_threads(block, batch, dtype):
    pattern = _pattern(640, 320, 0.1, block)
    problem = _problem(pattern, (batch,), dtype, True)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 1, 2, 3, 7):
            torch.set_num_threads(threads)
            input, weight, bias, grad_output = problem
            results.append(_gradients(_op, input, weight, pattern, bias, grad_output))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_results_survive_free_workspaces():
    pattern = _pattern(64, 64, 0.2)
    input, weight, bias, _ = _problem(pattern, (100,), torch.float32, True)
    first = _op(input, weight, pattern, bias)
    assert 0 < ua.free_workspaces() <= 256 << 20
    assert ua.free_workspaces() == 0
    assert torch.equal(first, _op(input, weight, pattern, bias))


def test_packed_and_dense_stored_agree_to_the_bit():
    pattern = _pattern(100, 90, 0.15)
    input, weight, bias, grad_output = _problem(pattern, (33,), torch.float32, True)
    a = _gradients(_op, input, weight, pattern, bias, grad_output)
    b = _gradients(_op, input, pattern.unpack(weight), pattern, bias, grad_output)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and torch.equal(pattern.unpack(a[2]), b[2])


@pytest.mark.parametrize("kernel", ["cpu", "dense", "reference"])
@pytest.mark.parametrize("packed", [True, False])
def test_public_function_by_every_kernel(kernel, packed, monkeypatch):
    """The result does not depend on what the dispatch chooses."""
    monkeypatch.setattr(module, "choose", lambda *_, **__: Choice(kernel, "test"))
    pattern = _pattern(48, 36, 0.25)
    input, weight, bias, grad_output = _problem(pattern, (4, 11), torch.float64, packed)
    got = _gradients(ops.masked_linear, input, weight, pattern, bias, grad_output)
    want = _gradients(reference, input, weight, pattern, bias, grad_output)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(37, 29), (3, 2**16), (130, 700), (1, 1)], ids=str)
@pytest.mark.parametrize("density", [0, 0.02, 0.3, 1])
def test_columns_of_16_bits_give_the_same_bits(shape, density, dtype):
    pattern = _pattern(*shape, density)
    crow, col, *rest = pattern_tensors(pattern)
    op = torch.ops.uasparse.masked_linear
    for batch in (1, 2, 4, 5, module.SHORT_BATCH):
        input, weight, bias, _ = _problem(pattern, (batch,), dtype, True)
        short = op(input, weight, bias, crow, col.to(torch.int16), *rest, pattern.shape, pattern.block)
        assert torch.equal(short, _op(input, weight, pattern, bias))


def test_inference_follows_its_pattern(monkeypatch):
    """The columns of 16 bits are made anew when a topology update, a load or a move changed the pattern."""
    monkeypatch.setattr(module, "choose", lambda *_, **__: Choice("cpu", "test"))
    layer = ua.SparseLinear(30, 20, sparsity=0.8, storage="packed")
    x = torch.randn(2, 30)

    def check(layer):
        with torch.no_grad():
            got = [layer(x), layer(x)]
        assert all(torch.equal(y, _op(x, layer.weight, layer.pattern, layer.bias)) for y in got)
        assert module._short[layer.pattern][2].dtype == torch.int16
        assert not module._short[layer.pattern][2].is_inference()

    check(layer)
    layer.pattern.assign_(_pattern(20, 30, 0.2, seed=5))
    twin = copy.deepcopy(layer)  # before `layer` has noticed
    check(layer)
    check(twin)
    blocks = layer.pattern.blocks()
    resize(layer.weight, layer.pattern, blocks[::3], blocks[:0], [])
    check(layer)
    check(layer.double().float())
    check(pickle.loads(pickle.dumps(layer)))
    used = len(module._short)
    del layer, twin
    gc.collect()
    assert len(module._short) <= used - 2


def test_columns_of_16_bits_only_where_they_fit():
    pattern = _pattern(12, 10, 0.3)
    crow, col, *rest = pattern_tensors(pattern)
    tensors, op = (crow, col.to(torch.int16), *rest), torch.ops.uasparse.masked_linear
    input, weight, bias, _ = _problem(pattern, (module.SHORT_BATCH + 1,), torch.float32, True)
    for wrong in (input, input[:2].bfloat16()):  # too many, and not a dtype of that kernel
        with pytest.raises(TypeError, match="int32"):
            op(wrong, weight.to(wrong.dtype), bias.to(wrong.dtype), *tensors, pattern.shape, pattern.block)
    with pytest.raises(TypeError, match="int32"):
        op(input[:2], pattern.unpack(weight), bias, *tensors, pattern.shape, pattern.block)
    wide = _pattern(1, 2**16 + 1, 0.1)
    crow, col, *rest = pattern_tensors(wide)
    with pytest.raises(TypeError, match="int32"):
        op(
            torch.ones(1, 2**16 + 1),
            torch.ones(wide.nnz),
            None,
            crow,
            col.to(torch.int16),
            *rest,
            wide.shape,
            wide.block,
        )
    for grad, size in ((True, 2), (False, module.SHORT_BATCH + 1)):
        with torch.set_grad_enabled(grad):
            ops.masked_linear(input[:size], weight, pattern, bias)
        assert pattern not in module._short
    with torch.inference_mode():
        made_here = _pattern(12, 10, 0.3)
        y = ops.masked_linear(input[:2], weight, made_here, bias)
    torch.testing.assert_close(y, reference(input[:2], weight, pattern, bias))


def test_choice_depends_on_dtype():
    pattern = _pattern(512, 512, 0.05)
    assert module.choose((128, 512), torch.float32, "cpu", pattern, packed=True).kernel == "cpu"
    assert module.choose((128, 512), torch.float16, "cpu", pattern, packed=True).kernel == "dense"


def test_bad_input_is_an_error():
    pattern = _pattern(12, 10, 0.3)
    input, weight, bias, _ = _problem(pattern, (4,), torch.float32, True)
    with pytest.raises(ValueError, match="expected an input"):
        ops.masked_linear(input[:, :9], weight, pattern, bias)
    with pytest.raises(ValueError, match="Expected a weight of shape"):
        ops.masked_linear(input, weight[:-1], pattern, bias)
    with pytest.raises(ValueError, match="bias"):
        ops.masked_linear(input, weight, pattern, bias[:-1])
    with pytest.raises(TypeError, match="one dtype"):
        ops.masked_linear(input, weight.double(), pattern, bias)
    with pytest.raises(TypeError, match="floating-point"):
        ops.masked_linear(input.long(), weight.long(), pattern)


def test_bad_input_to_the_op_is_an_error():
    """The op itself never reads out of bounds: it checks sizes and dtypes too."""
    pattern = _pattern(12, 10, 0.3)
    input, weight, bias, grad_output = _problem(pattern, (4,), torch.float32, True)
    tensors, op = pattern_tensors(pattern), torch.ops.uasparse.masked_linear
    rest = (pattern.shape, pattern.block)
    with pytest.raises(ValueError, match="expected an input"):
        op(input[:, :9], weight, bias, *tensors, *rest)
    with pytest.raises(ValueError, match="expected a weight"):
        op(input, weight[:-1], bias, *tensors, *rest)
    with pytest.raises(TypeError, match="weight of dtype"):
        op(input, weight.double(), bias, *tensors, *rest)
    with pytest.raises(ValueError, match="bias"):
        op(input, weight, bias[:-1], *tensors, *rest)
    with pytest.raises(TypeError, match="float32"):
        op(input.half(), weight.half(), bias.half(), *tensors, *rest)
    with pytest.raises(TypeError, match="int32"):
        op(input, weight, bias, *(t.long() for t in tensors), *rest)
    with pytest.raises(ValueError, match="entries"):
        op(input, weight, bias, *tensors[:4], tensors[4][:-1], *rest)
    with pytest.raises(ValueError, match="grad_output"):
        torch.ops.uasparse.masked_linear_backward(grad_output[:-1], input, weight, *tensors, *rest, [True] * 3)


def test_an_empty_instruction_set_is_none():
    """Others: test_cpu_isa.py."""
    code = (
        "import torch; from uasparse_kernels import SparsityPattern, ops; p = SparsityPattern.random((8, 8), 0.5);"
        "torch.ops.uasparse.masked_linear(torch.ones(2, 8), torch.ones(p.nnz), None, p.crow, p.col, p.ccol, p.row,"
        "p.perm, p.shape, p.block)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "UASPARSE_CPU_ISA": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
