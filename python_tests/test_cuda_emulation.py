"""The CUDA kernels (unstructured products, loss, selection, prune-grow) on the CPU under the sanitizers of g++.

cuda_emulation/cuda_runtime.h stands in for CUDA's; the .cu files are compiled unchanged. Each op has a program that
reads cases from stdin and writes results to stdout, which are compared with the references here.
"""

import math
import pathlib
import shutil
import struct
import subprocess

import pytest
import torch

from uasparse_kernels import SparsityPattern
from uasparse_kernels.ops import prune_grow_reference, topk_indices_reference, unknown_aware_loss_reference
from uasparse_kernels.ops._common import pattern_tensors
from uasparse_kernels.ops.prune_grow import kept_blocks

HERE = pathlib.Path(__file__).parent
EMULATION, CSRC = HERE / "cuda_emulation", HERE.parent / "csrc"
CXX = shutil.which("g++")
# Optimising what both address checks fill takes longer than running it as it is.
SANITIZERS = {"address": ["-O0", "-fsanitize=address,undefined"], "thread": ["-O1", "-fsanitize=thread"]}

pytestmark = pytest.mark.skipif(CXX is None or not CSRC.exists(), reason="needs g++ and the sources")


def build(op, source, sanitizer, program):
    """Compiles a .cu file and the program that runs it."""
    flags = ["-std=c++20", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", *SANITIZERS[sanitizer]]
    sources = [str(EMULATION / f"run_{op}.cpp"), "-x", "c++", str(source)]
    command = [CXX, *flags, f"-I{EMULATION}", f"-I{CSRC}", *sources, "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return program


@pytest.fixture(scope="module", params=list(SANITIZERS))
def emulate(request, tmp_path_factory):
    """A function that runs the program of an op on cases, and returns what it wrote."""
    folder, built = tmp_path_factory.mktemp(request.param), {}

    def run(op, cases):
        if op not in built:
            built[op] = build(op, CSRC / "cuda" / f"{op}.cu", request.param, folder / op)
        done = subprocess.run([built[op]], input=b"".join(cases), capture_output=True)
        assert done.returncode == 0, done.stderr.decode()[:5000]
        return Reader(done.stdout)

    run.few = request.param == "thread"  # ThreadSanitizer is slow
    return run


class Reader:
    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, dtype, *shape):
        count = math.prod(shape)
        end = self.at + count * dtype.itemsize
        raw, self.at = self.data[self.at : end], end
        return torch.frombuffer(bytearray(raw), dtype=dtype).view(shape) if count else torch.empty(shape, dtype=dtype)

    def done(self):
        return self.at == len(self.data)


def raw(*tensors):
    return b"".join(t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in tensors if t.numel())


def numbers(*values):
    return struct.pack("q" * len(values), *map(int, values))


LOGIT_TYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


# Rows, classes, shared bytes (of which the kernels need 6 KB for other things), offset of the logits in numbers.
LOSS_SIZES = [
    (1, 2, 0, 0),
    (70, 11, 0, 0),
    (40, 17, 0, 1),
    (9, 33, 0, 0),
    (5, 101, 0, 0),
    (6, 300, 0, 0),
    (4, 513, 16 << 10, 0),
    (4, 517, 7 << 10, 0),  # a part of the chunks is kept
    (5, 600, 0, 3),
    (3, 2600, 64 << 10, 1),  # gradient and logits lie to the chunks' boundaries each in its way
]


def test_unknown_aware_loss(emulate):
    """Forward and backward, and the forward that makes the gradient: for the one expected, put right for another."""
    g = torch.Generator().manual_seed(1)
    cases = []
    for i, (n, classes, *place) in enumerate(LOSS_SIZES):
        for dtype in LOGIT_TYPES[i % 2 :: 2] if emulate.few else LOGIT_TYPES:
            for reduction in [i % 3 or 2] if emulate.few or n < 5 else range(3):
                logits = (3 * torch.randn(n, classes, generator=g)).to(dtype)
                logits[0, torch.rand(classes, generator=g) < 0.2] = -math.inf
                logits[-1] = logits[-1].round()  # of equal logits the first counts
                target = torch.randint(classes, (n,), generator=g)
                target = torch.where(torch.rand(n, generator=g) < 0.33, logits.argmax(1), target)
                target[0] = logits[0].argmax()
                if n > 3 and reduction == 0:
                    logits[2, target[2]] = -math.inf  # an infinite loss with a finite gradient
                acc = torch.float64 if dtype == torch.float64 else torch.float32
                upstream = torch.rand(n if reduction == 0 else 1, generator=g).to(acc) + 0.5
                guess = upstream[:1] if i % 2 else upstream[:1] + 1
                cases.append((logits, target, reduction, upstream, guess.clone(), place))
    got = emulate(
        "unknown_aware_loss",
        [
            numbers(LOGIT_TYPES.index(z.dtype), *z.shape, reduction, *place)
            + struct.pack("d", 0.25)
            + raw(torch.tensor([0.7], dtype=upstream.dtype), upstream, guess, target, z)
            for z, target, reduction, upstream, guess, place in cases
        ],
    )
    for z, target, reduction, upstream, guess, (_, offset) in cases:
        exact = z.double().requires_grad_()
        options = {"unknown_weight": 0.25, "reduction": ("none", "mean", "sum")[reduction]}
        losses, expected = unknown_aware_loss_reference(exact, target, 0.7, **options)
        (expected_grad,) = torch.autograd.grad((losses * upstream.double()).sum(), exact)
        eps = torch.finfo(upstream.dtype).eps
        tolerance = {"rtol": 64 * eps, "atol": 64 * eps}
        of_grad = {"rtol": 64 * eps + 2 * torch.finfo(z.dtype).eps, "atol": 64 * eps}
        gradients = []
        for at_once in (False, True) if reduction else (False,):
            if at_once:
                first = got.take(z.dtype, *z.shape)
                scale = guess.double() / upstream.double()
                torch.testing.assert_close(first.double(), expected_grad * scale, **of_grad)
            loss, threshold = got.take(upstream.dtype, upstream.numel()), got.take(upstream.dtype)
            torch.testing.assert_close(loss.double(), losses.detach().reshape(-1), **tolerance)
            torch.testing.assert_close(threshold.double(), expected, **tolerance)
            gradients.append(got.take(z.dtype, *z.shape))
            torch.testing.assert_close(gradients[-1].double(), expected_grad, **of_grad)
            if at_once:
                assert torch.equal(got.take(upstream.dtype, 1), upstream)  # expected of the next
        # By other chunks, sums have another order.
        assert offset or all(torch.equal(one, gradients[0]) for one in gradients)
    assert got.done()


def test_topk_indices(emulate):
    g = torch.Generator().manual_seed(2)
    cases = []
    for i in range(2 if emulate.few else 8):
        dtype = torch.float64 if i % 2 else torch.float32
        scores = []
        for n in (1, 33, 8192, 9001) if i < 2 else (500, 8193):
            x = torch.randn(n, generator=g)
            if n % 2:  # ties, both zeros, infinities, NaN
                x = (4 * x).round().div(4)
                for value, share in [(0.0, 0.1), (-0.0, 0.1), (math.inf, 0.02), (-math.inf, 0.02), (math.nan, 0.05)]:
                    x[torch.rand(n, generator=g) < share] = value
            scores.append(x.to(dtype))
        ks = [int(torch.randint(s.numel() + 1, (), generator=g)) for s in scores]
        ks[0] = 0 if i % 2 else scores[0].numel()
        cases.append((scores, ks, i // 2 % 2 == 0, i // 4 % 2 == 1))
    got = emulate(
        "topk_indices",
        [
            numbers(len(scores), scores[0].dtype == torch.float64, largest, magnitude)
            + numbers(*(x for s, k in zip(scores, ks, strict=True) for x in (s.numel(), k)))
            + raw(*scores)
            for scores, ks, largest, magnitude in cases
        ],
    )
    for scores, ks, largest, magnitude in cases:
        for s, k in zip(scores, ks, strict=True):
            expected = topk_indices_reference(s, k, largest=largest, magnitude=magnitude)
            assert torch.equal(got.take(torch.int64, k), expected)
    assert got.done()


PRUNE_GROW_CASES = [
    ((37, 53), (1, 1), torch.float32),
    ((9, 7, 3, 2), (1, 1), torch.float64),
    ((30, 21), (2, 1), torch.bfloat16),
    ((32, 28), (4, 4), torch.float32),
    ((8, 12, 3, 1), (4, 4), torch.uint8),
    ((4, 6), (1, 1), torch.complex128),
]


@pytest.mark.parametrize("density", [0.1, 0.6, 1.0])
def test_prune_grow(emulate, density):
    g = torch.Generator().manual_seed(3)
    cases = []
    for shape, block, dtype in PRUNE_GROW_CASES:
        pattern = SparsityPattern.random(shape, density, block=block, generator=g)
        weight, gradient = torch.randn(shape, generator=g), torch.randn(shape, generator=g)
        weight = weight * pattern.to_mask()
        after = SparsityPattern(shape, pattern.crow.clone(), pattern.col.clone(), block=block)
        change = prune_grow_reference(weight.clone(), after, 0.4, grow_scores=gradient)
        values = torch.randint(1, 256, shape, generator=g) * pattern.to_mask()
        dense = values.to(dtype)
        rows, columns = pattern.grid
        first = int(torch.randint(rows * columns // 2, (), generator=g))
        scores = torch.rand(rows * columns - first - 1, generator=g)
        cases.append((pattern, after, change, dense, first, scores))
    got = emulate(
        "prune_grow",
        [
            numbers(*p.grid, math.prod(p.shape[2:]), p.shape[3] if len(p.shape) == 4 else 1, p.num_blocks, *p.block)
            + numbers(change.dropped.numel(), dense.dtype.itemsize, first, scores.numel())
            + raw(p.crow, p.col, change.dropped, change.grown, dense.reshape(-1)[p.indices()], dense, scores)
            for p, _, change, dense, first, scores in cases
        ],
    )
    for pattern, after, change, dense, first, scores in cases:
        for expected in pattern_tensors(after):
            assert torch.equal(got.take(torch.int32, expected.numel()), expected)
        expected = torch.where(after.to_mask(), dense, torch.zeros_like(dense))  # values were zero outside the pattern
        assert torch.equal(got.take(dense.dtype, after.nnz), expected.reshape(-1)[after.indices()].reshape(-1))
        assert torch.equal(got.take(dense.dtype, *dense.shape), expected)
        places = kept_blocks(pattern, change.dropped) - first
        expected = scores.clone()
        expected[places[(places >= 0) & (places < scores.numel())]] = math.nan
        torch.testing.assert_close(got.take(torch.float32, scores.numel()), expected, rtol=0, atol=0, equal_nan=True)
    assert got.done()


# Faults put into a copy of topk_indices.cu: what is there, what replaces it, which sanitizer must say what.
FAULTS = {
    "no barrier between zeroing and counting": (
        "bins[d] = 0;\n  __syncthreads();",
        "bins[d] = 0;",
        "thread",
        "data race",
    ),
    "a score past the end": (
        "count = static_cast<int>(left < kTile ? left : kTile);",
        "count = static_cast<int>(left + 1 < kTile ? left + 1 : kTile);",
        "address",
        "heap-buffer-overflow",
    ),
    "a shared counter past the end": (
        "d < kBins; d += kThreads) bins[d] = 0;",
        "d <= kBins; d += kThreads) bins[d] = 0;",
        "address",
        "global-buffer-overflow",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_seeded_fault_is_reported(fault, tmp_path):
    """The harness can fail: the sanitizer names the fault, in the kernel that has it."""
    right, wrong, sanitizer, report = FAULTS[fault]
    source = (CSRC / "cuda" / "topk_indices.cu").read_text()
    assert source.count(right) == 1
    faulty = tmp_path / "faulty.cu"
    faulty.write_text(source.replace(right, wrong))
    program = build("topk_indices", faulty, sanitizer, tmp_path / "faulty")
    case = numbers(1, False, True, False) + numbers(700, 99) + raw(torch.rand(700))
    done = subprocess.run([program], input=case, capture_output=True)
    assert done.returncode != 0
    assert report in done.stderr.decode()
    assert "histogram_kernel" in done.stderr.decode()


VALUE_TYPES = [torch.float32, torch.float16, torch.bfloat16]
# Rows, columns, tokens, lane_tokens (0: chosen), panel_units (0: chosen), processors.
PRODUCT_SIZES = [
    (1, 1, 1, 0, 0, 2),
    (37, 53, 1, 0, 0, 2),
    (21, 190, 13, 0, 0, 2),
    (40, 61, 17, 0, 0, 2),
    (300, 45, 131, 4, 16, 3),
    (77, 130, 129, 4, 0, 40),
    (9, 201, 65, 2, 32, 1),
    (530, 40, 7, 2, 16, 4),
    (33, 77, 70, 1, 32, 5),
]


def _uneven_pattern(rows, columns, g):
    """Row 0 full, row 1 empty, a hub column, the rest at random."""
    mask = torch.rand(rows, columns, generator=g) < 0.15
    mask[:, columns // 2] = True
    mask[0] = True
    if rows > 1:
        mask[1] = False
    return SparsityPattern.from_mask(mask)


def test_masked_linear(emulate):
    """Forward, and the sampled product, of a weight by rows; grad-input is the forward of the transposed weight."""
    g = torch.Generator().manual_seed(4)
    cases = []
    for i, (rows, columns, tokens, *tile) in enumerate(PRODUCT_SIZES):
        for j, dtype in enumerate(VALUE_TYPES):
            if (i + j) % 3 > (0 if emulate.few else 1) or (emulate.few and i % 2):
                continue
            pattern = _uneven_pattern(rows, columns, g)
            padding = (i + j) % 3  # odd strides, and even ones of odd sizes
            tensors = [
                torch.randn(size, generator=g).to(dtype)
                for size in ((pattern.nnz,), (rows,), (tokens, columns + padding), (tokens, rows))
            ]
            tensors[2][:, columns:] = math.nan
            if columns > 3:  # an infinite activation meets its own column's weights only
                tensors[2][tokens // 2, 3] = math.inf
            cases.append((pattern, dtype, tile, tensors, (i + j) % 2, 4 * ((i + j) % 4 == 1)))
    empty = SparsityPattern.from_mask(torch.zeros(5, 7))
    tensors = [torch.randn(size, generator=g) for size in ((0,), (5,), (40, 7), (40, 5))]
    cases.append((empty, torch.float32, (0, 0, 2), tensors, 1, 0))
    got = emulate(
        "masked_linear",
        [
            numbers(VALUE_TYPES.index(dtype), *p.shape, p.nnz, x.shape[0], x.shape[1], tile[2], 227 << 10)
            + numbers(tile[0], tile[1], has_bias, offset)
            + raw(p.crow, p.col, values, bias, x, dy)
            for p, dtype, tile, (values, bias, x, dy), has_bias, offset in cases
        ],
    )
    for pattern, dtype, _, tensors, has_bias, _ in cases:
        values, bias, x, dy = (t.double() for t in tensors)
        x, bias = x[:, : pattern.shape[1]], bias * has_bias
        tokens, (rows, columns) = x.shape[0], pattern.shape
        y, sampled = got.take(dtype, tokens, rows), got.take(dtype, pattern.nnz)
        r, c = pattern.indices() // columns, pattern.indices() % columns

        def products(x, dy, values, bias, r=r, c=c, size=(tokens, rows)):
            forward = torch.zeros(size, dtype=torch.float64).index_add_(1, r, x[:, c] * values) + bias
            return forward, (dy[:, r] * x[:, c]).sum(0)

        exact, magnitudes = products(x, dy, values, bias), products(*(t.abs() for t in (x, dy, values, bias)))
        for name, terms, a, b, size in zip(
            ("y", "sampled"), (columns, tokens), (y, sampled), exact, magnitudes, strict=True
        ):
            # float32 sums and one rounding; float16's smallest numbers are rounded absolutely.
            tolerance = 2 * (terms + 2) * 2**-24 + torch.finfo(dtype).eps / 2
            fits = (a.double() - b).abs() <= tolerance * size + (2**-24 if dtype == torch.float16 else 0)
            fits |= ~b.isfinite() & ((a.double() == b) | (a.isnan() & b.isnan()))
            assert fits.all(), f"{name} of {tuple(pattern.shape)} {dtype}: {int((~fits).sum())} are off"
    assert got.done()
