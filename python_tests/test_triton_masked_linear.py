"""The Triton kernels of masked_linear against float64: forward, all gradients, odd sizes, every tile."""

from __future__ import annotations

import pytest
import torch
from triton_support import DEVICES, assert_close, poison  # noqa: F401

from uasparse_kernels import SparsityPattern, ops
from uasparse_kernels.ops._common import pattern_tensors
from uasparse_kernels.triton import _launch, settings
from uasparse_kernels.triton import masked_linear as kernels

pytestmark = [pytest.mark.parametrize("device", DEVICES), pytest.mark.usefixtures("poison")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _pattern(mask_of_blocks, block, device):
    rows, columns = mask_of_blocks.shape
    blocks = mask_of_blocks.flatten().nonzero().squeeze(1)
    shape = (rows * block, columns * block)
    return SparsityPattern.from_blocks(shape, blocks, block=(block, block)).to(device)


def _random_pattern(rows, columns, block, device, density=0.4):
    return SparsityPattern.random((rows * block, columns * block), density, block=(block, block)).to(device)


def _check(pattern, batch, dtype, device, *, precision="ieee", scale=1.0):
    out, inp = pattern.shape
    batch = (batch,) if isinstance(batch, int) else batch
    input = (torch.randn(*batch, inp) * scale).to(dtype).to(device)
    weight = torch.randn(pattern.packed_shape).to(dtype).to(device)
    bias = torch.randn(out).to(dtype).to(device)
    dy = torch.randn(*batch, out).to(dtype).to(device)
    got = _run(pattern, input, weight, bias, dy)
    want, size = (
        _exact(pattern, *(f(t.double()) for t in (input, weight, bias, dy))) for f in (torch.clone, torch.abs)
    )
    tokens = input.numel() // inp
    terms = {"output": inp, "input": out, "weight": tokens, "bias": tokens}
    for (name, n), g, w, s in zip(terms.items(), got, want, size, strict=True):
        assert g.dtype == dtype
        assert_close(name, g, w, s, n, precision if name != "bias" else "ieee")
    return got


def _run(pattern, input, weight, bias, dy, mask=(True, True, True)):
    arguments = (*pattern_tensors(pattern), pattern.shape, pattern.block)
    output = kernels.masked_linear(input, weight, bias, *arguments)
    return output, *kernels.masked_linear_backward(dy, input, weight, *arguments, list(mask))


def _exact(pattern, input, weight, bias, dy):
    dense = pattern.unpack(weight)
    flat_input, flat_dy = input.reshape(-1, pattern.shape[1]), dy.reshape(-1, pattern.shape[0])
    return input @ dense.T + bias, dy @ dense, pattern.pack(flat_dy.T @ flat_input), flat_dy.sum(0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_matches_float64(block, dtype, device):
    _check(_random_pattern(2 if block == 128 else 3, 3, block, device), 77, dtype, device)


@pytest.mark.parametrize("batch", [1, 2, 15, 16, 17, 63, 64, 65, 129, (2, 3, 7)], ids=str)
def test_batch_sizes(batch, device):
    _check(_random_pattern(3, 4, 32, device), batch, torch.float32, device)


@pytest.mark.parametrize("block", [16, 64])
def test_uneven_rows(block, device):
    """A full row, empty rows, an empty column, a single block."""
    mask = torch.zeros(6, 9, dtype=torch.bool)
    mask[1, :8], mask[3, 2], mask[5, 0:7:3] = True, True, True
    _check(_pattern(mask, block, device), 70, torch.float32, device)
    _check(_pattern(torch.zeros(2, 3, dtype=torch.bool), block, device), 20, torch.float32, device)
    _check(_pattern(torch.ones(1, 1, dtype=torch.bool), block, device), 20, torch.float32, device)


@pytest.mark.parametrize(
    ("block", "dtype"),
    [(16, torch.bfloat16), (32, torch.float32), (64, torch.bfloat16), (128, torch.bfloat16), (128, torch.float32)],
    ids=str,
)
def test_every_tile(block, dtype, device, monkeypatch):
    """Each config of the sets."""
    pattern = _random_pattern(1 if block == 128 else 2, 2, block, device, 0.7)
    product = kernels.product_configs(block, dtype.itemsize, "ieee")
    sampled = kernels.sampled_configs(block, dtype.itemsize, "ieee")
    monkeypatch.setattr(kernels, "_fitting", lambda configs, _: configs)
    for i in range(max(len(product), len(sampled))):
        monkeypatch.setattr(kernels, "product_configs", lambda *_, i=i: [product[i % len(product)]])
        monkeypatch.setattr(kernels, "sampled_configs", lambda *_, i=i: [sampled[i % len(sampled)]])
        _check(pattern, 2 * product[i % len(product)].tile + 5, dtype, device)


def test_split_sums_agree_and_repeat(device, monkeypatch):
    """Few blocks and many tokens: partial sums, the same in every run, whether the last part is short or not."""
    pattern = _random_pattern(1, 2, 32, device, 0.5)
    for parts in (1, 2, 5):
        monkeypatch.setattr(_launch, "splits", lambda *_, parts=parts: parts)
        for tokens in (150, 192):
            torch.manual_seed(1)
            first = _check(pattern, tokens, torch.float32, device)
            torch.manual_seed(1)
            again = _check(pattern, tokens, torch.float32, device)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_part_count_fills_the_device(device):
    device = _launch.Device("", 132)
    assert _launch.splits(device, 4096, 1000) == 1
    assert _launch.splits(device, 16, 1000) == 33
    assert _launch.splits(device, 16, 8) == 2
    assert _launch.splits(device, 16, 1) == 1


def test_the_fastest_tile_is_kept(device, monkeypatch):
    """Measured once for a key; what fails or is slow is not taken again."""
    configs = [_launch.Config(tile, 16, 4, 2) for tile in (16, 32, 64)]
    times, measured, launched = {16: 3.0, 32: float("inf"), 64: 1.0}, [], []
    monkeypatch.setattr(_launch, "_tuned", {})
    monkeypatch.setattr(_launch, "_may_measure", lambda _: True)
    monkeypatch.setattr(_launch, "_measure_ms", lambda _, c: measured.append(c.tile) or times[c.tile])
    for key in (("a",), ("a",), ("b",)):
        _launch.launch_tuned(key, torch.empty(1, device=device), configs, launched.append)
    assert measured == [16, 32, 64] * 2 and [c.tile for c in launched] == [64] * 3
    monkeypatch.setattr(_launch, "_may_measure", lambda _: False)
    _launch.launch_tuned(("c",), torch.empty(1, device=device), configs, launched.append)
    assert launched[-1].tile == 16 and len(_launch._tuned) == 2


def test_empty_batch(device):
    pattern = _random_pattern(2, 3, 16, device)
    output, *grads = _run(
        pattern,
        torch.randn(4, 0, 48, device=device),
        torch.randn(pattern.packed_shape, device=device),
        torch.randn(32, device=device),
        torch.randn(4, 0, 32, device=device),
    )
    assert output.shape == (4, 0, 32) and grads[0].shape == (4, 0, 48)
    assert not grads[1].any() and not grads[2].any()


def test_infinite_inputs_stay_in_their_columns(device):
    """A block that a short row does not have must not be read into it: 0 * inf is NaN."""
    mask = torch.tensor([[False, True, False], [True, True, True]])
    pattern = _pattern(mask, 16, device)
    input = torch.randn(5, 48, device=device)
    input[:, :16] = float("inf")
    weight = torch.randn(pattern.packed_shape, device=device)
    output = _run(pattern, input, weight, None, torch.randn(5, 32, device=device))[0]
    assert output[:, :16].isfinite().all()


def test_strides_and_masks(device):
    """Sliced, transposed and expanded inputs; gradients that are not asked for are empty."""
    pattern = _random_pattern(2, 3, 16, device)
    weight = torch.randn(pattern.packed_shape, device=device)
    wide = torch.randn(21, 100, device=device)
    for input in (wide[:, 3:51], wide[:, 4:52], torch.randn(48, 21, device=device).t(), wide[:1, :48].expand(21, 48)):
        for dy in (torch.randn(21, 32, device=device), torch.randn(21, 1, device=device).expand(21, 32)):
            got = _run(pattern, input, weight, None, dy)
            want = _run(pattern, input.contiguous(), weight, None, dy.contiguous())
            assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    for i in range(3):
        alone = _run(pattern, input, weight, None, dy, [j == i for j in range(3)])[1:]
        assert torch.equal(alone[i], got[1 + i])
        assert all(alone[j].numel() == 0 for j in range(3) if j != i)


def test_order_follows_the_pattern(device):
    """The kept order of rows is renewed when the pattern changes in place, and is always a permutation."""
    _launch._orders.clear()  # or that of a freed tensor at the same address may serve: slower, not wrong
    mask = torch.tensor([[True, False, False], [True, True, True]])
    pattern = _pattern(mask, 16, device)
    assert _launch.longest_first(pattern.crow).tolist() == [1, 0]
    pattern.assign_(_pattern(mask.flip(0), 16, device))
    assert _launch.longest_first(pattern.crow).tolist() == [0, 1]
    _check(pattern, 9, torch.float32, device)


def test_bad_arguments_are_errors(device):
    pattern = _random_pattern(2, 3, 16, device)
    input, weight = torch.randn(4, 48, device=device), torch.randn(pattern.packed_shape, device=device)
    dy = torch.randn(4, 32, device=device)
    with pytest.raises(ValueError, match=r"an input \[..., 48\]"):
        _run(pattern, input[:, :32], weight, None, dy)
    with pytest.raises(ValueError, match="packed"):
        _run(pattern, input, pattern.unpack(weight), None, dy)
    with pytest.raises(TypeError, match="float32, bfloat16"):
        _run(pattern, input.double(), weight.double(), None, dy)
    with pytest.raises(ValueError, match="grad_output"):
        _run(pattern, input, weight, None, dy[:3])
    with pytest.raises(ValueError, match="squares of"):
        kernels.masked_linear(input, weight, None, *pattern_tensors(pattern), pattern.shape, (8, 8))


@pytest.mark.parametrize("precision", ["tf32", "tf32x3", "ieee"])
@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_precisions(block, precision, device, monkeypatch):
    monkeypatch.setattr(settings, "float32_precision", precision)
    _check(_random_pattern(3, 4, block, device), 200, torch.float32, device, precision=precision)


def _public(device, dtype, packed, block=64):
    pattern = _random_pattern(8, 8, block, device, 0.1)
    weight = torch.randn(pattern.packed_shape, device=device, dtype=dtype)
    weight = (weight if packed else pattern.unpack(weight)).requires_grad_()
    input = torch.randn(300, 8 * block, device=device, dtype=dtype, requires_grad=True)
    return pattern, weight, input


class TestOnGpu:
    """Through the public function: registration, autograd, graphs."""

    @pytest.mark.parametrize("packed", [True, False])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_public_function(self, dtype, packed, device):
        if device == "cpu":
            pytest.skip("the ops are registered for CUDA")
        pattern, weight, input = _public(device, dtype, packed)
        output = ops.masked_linear(input, weight, pattern)
        dy = torch.randn_like(output)
        output.backward(dy)
        dense = pattern.unpack(weight.detach().double()) if packed else weight.detach().double()
        grad = dy.double().T @ input.detach().double()
        grad = pattern.pack(grad) if packed else grad * pattern.to_mask()
        for got, want in ((output, input.double() @ dense.T), (input.grad, dy.double() @ dense), (weight.grad, grad)):
            assert float((got.double() - want).norm() / want.norm()) < 8 * 2.0**-9
        assert packed or not weight.grad[~pattern.to_mask()].any()

    def test_tuning(self, device):
        if device == "cpu":
            pytest.skip("needs a GPU")
        torch.use_deterministic_algorithms(False)
        before = len(_launch._tuned)
        _check(_random_pattern(4, 4, 64, device), 500, torch.bfloat16, device)
        assert len(_launch._tuned) == before + 3

    def test_cuda_graph(self, device):
        if device == "cpu":
            pytest.skip("needs CUDA graphs")
        pattern, weight, input = _public(device, torch.bfloat16, True)

        def step():
            output = ops.masked_linear(input, weight, pattern)
            return output, *torch.autograd.grad(output.float().square().sum(), (input, weight))

        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        with torch.no_grad():
            input.copy_(torch.randn_like(input))
        graph.replay()
        for got, want in zip(captured, step(), strict=True):
            torch.testing.assert_close(got, want)
