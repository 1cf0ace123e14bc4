"""Sparse linear layer on CUDA devices: block-sparse kernels on tensor cores, and the way to the unstructured ones.

Unstructured weights go to the kernels of csrc/cuda/masked_linear.cu, or to torch's (_csr.py). The others are X [T, in]
by packed weights [blocks, b, b], b = 16, 32, 64 or 128.

Product (forward Y = X W^T + bias, and grad-input dX = dY W): a program makes a tile [TILE rows of X, b columns of Y] in
float32 and walks the active blocks of one row of the grid of blocks (forward: crow, col) or one column of it
(grad-input: ccol, row, and perm for the place of a block's values, which stay where they are but in TF32):

    acc [TILE, b] += X [TILE, DEPTH at the block's columns] @ W_block [DEPTH, b]

A step is DEPTH deep: a part of a block (DEPTH <= b), or DEPTH / b blocks gathered side by side (small blocks), so that
a step always has enough work for the tensor cores. Programs come tile by tile, so that a tile of X stays in the cache
while all rows of the weight pass over it. Rows differ in length: they are walked longest first and the hardware hands
out programs as others end.

Sampled product (grad-weight dW = dY^T X at the active blocks): a program makes one block [b, b] from a range of rows:

    acc [b, b] += dY [TILE, b at the block's row]^T @ X [TILE, b at the block's column]

Where the blocks are too few to fill the device, the rows are split over programs that write float32 partial sums, which
a second kernel adds in a fixed order: results are the same in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from uasparse_kernels.ops._cuda import takes_csr
from uasparse_kernels.triton import _launch
from uasparse_kernels.triton._csr import csr_product
from uasparse_kernels.triton._launch import Config

BLOCKS = (16, 32, 64, 128)


# Counts say nothing that the compiler could use: a kernel that was compiled for one serves every other.
@triton.jit(do_not_specialize=["tokens", "rows"])
def product_kernel(
    x, values, bias, offsets, index, perm, order, y,
    tokens, rows, stride_x, stride_y,
    BLOCK: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
    TRANSPOSED: tl.constexpr, HAS_BIAS: tl.constexpr, ORDERED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y [tokens, rows * BLOCK] = x @ W (TRANSPOSED: by columns, through perm) or x @ W^T + bias."""
    pid = tl.program_id(0)
    tile, r = pid // rows, pid % rows
    if ORDERED:
        r = tl.load(order + r)
    start = tl.load(offsets + r)
    end = tl.load(offsets + r + 1)

    m = tile * TILE + tl.arange(0, TILE)
    n = tl.arange(0, BLOCK)
    k = tl.arange(0, DEPTH)
    # Rows past the end read the last one, and are not stored.
    x_rows = x + tl.minimum(m, tokens - 1).to(tl.int64)[:, None] * stride_x
    acc = tl.zeros([TILE, BLOCK], tl.float32)
    if DEPTH <= BLOCK:
        if TRANSPOSED:
            in_block = k[:, None] * BLOCK + n[None, :]
        else:
            in_block = n[None, :] * BLOCK + k[:, None]
        steps: tl.constexpr = BLOCK // DEPTH
        for step in range(start * steps, end * steps):
            i = step // steps
            inner = step % steps * DEPTH
            column = tl.load(index + i) * BLOCK + inner
            slot = tl.load(perm + i) if TRANSPOSED else i
            block = values + slot.to(tl.int64) * (BLOCK * BLOCK) + inner * (BLOCK if TRANSPOSED else 1)
            acc = tl.dot(
                tl.load(x_rows + (column + k)[None, :]), tl.load(block + in_block), acc, input_precision=PRECISION
            )
    else:
        for step in range(start, end, DEPTH // BLOCK):
            i = step + k // BLOCK
            live = i < end
            column = tl.load(index + i, live, 0) * BLOCK + k % BLOCK
            slot = tl.load(perm + i, live, 0) if TRANSPOSED else i
            block = values + (slot.to(tl.int64) * (BLOCK * BLOCK))[:, None]
            if TRANSPOSED:
                in_block = (k % BLOCK * BLOCK)[:, None] + n[None, :]
            else:
                in_block = n[None, :] * BLOCK + (k % BLOCK)[:, None]
            # Both sides are masked: what lies at column 0 may be infinite.
            a = tl.load(x_rows + column[None, :], live[None, :], 0.0)
            w = tl.load(block + in_block, live[:, None], 0.0)
            acc = tl.dot(a, w, acc, input_precision=PRECISION)

    if HAS_BIAS:
        acc += tl.load(bias + r * BLOCK + n).to(tl.float32)[None, :]
    out = y + m.to(tl.int64)[:, None] * stride_y + (r * BLOCK + n)[None, :]
    tl.store(out, acc.to(y.dtype.element_ty), m[:, None] < tokens)


@triton.jit(do_not_specialize=["tokens", "blocks", "part"])
def sampled_kernel(
    dy, x, out, col, row, perm,
    tokens, blocks, part, stride_dy, stride_x,
    BLOCK: tl.constexpr, TILE: tl.constexpr, BY_FEATURES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [splits, blocks, BLOCK, BLOCK]: dy^T x at the active blocks, over rows [split * part, (split + 1) * part).

    BY_FEATURES: dy and x come transposed, [features, tokens], with zeros to the end of the last TILE.
    """
    pid = tl.program_id(0)
    # By columns: programs that run together share columns of x, and all of them a range of rows.
    j, split = pid % blocks, pid // blocks
    slot = tl.load(perm + j)
    r = tl.load(row + j)
    c = tl.load(col + slot)
    n = tl.arange(0, BLOCK)
    t = tl.arange(0, TILE)
    begin = tl.multiple_of(split.to(tl.int64) * part, TILE)
    end = tl.minimum(begin + part, tokens)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    if BY_FEATURES:
        dy += (r * BLOCK + n).to(tl.int64)[:, None] * stride_dy
        x += (c * BLOCK + n).to(tl.int64)[:, None] * stride_x
        for step in range(begin, end, TILE):
            m = (step + t)[None, :]
            acc = tl.dot(tl.load(dy + m), tl.trans(tl.load(x + m)), acc, input_precision=PRECISION)
    else:
        dy += r * BLOCK + n[None, :]
        x += c * BLOCK + n[None, :]
        for step in range(begin, end, TILE):
            m = (step + t)[:, None]
            a = tl.load(dy + m * stride_dy, m < end, 0.0)
            b = tl.load(x + m * stride_x, m < end, 0.0)
            acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)
    out += (split.to(tl.int64) * blocks + slot) * (BLOCK * BLOCK)
    tl.store(out + n[:, None] * BLOCK + n[None, :], acc.to(out.dtype.element_ty))


@triton.jit(do_not_specialize=["tokens"])
def transpose_kernel(x, out, tokens, features, stride_x, stride_out, TILE: tl.constexpr):
    """out [features, tokens to the end of the last TILE] of x [tokens, features]."""
    m = tl.program_id(0) * TILE + tl.arange(0, TILE)
    n = tl.program_id(1) * TILE + tl.arange(0, TILE)
    live = (n < features)[None, :]
    tile = tl.load(x + m.to(tl.int64)[:, None] * stride_x + n[None, :], (m < tokens)[:, None] & live, 0.0)
    tl.store(out + n.to(tl.int64)[:, None] * stride_out + m[None, :], tl.trans(tile), tl.trans(live))


@triton.jit(do_not_specialize=["splits"])
def add_parts_kernel(parts, out, count, splits, TILE: tl.constexpr):
    """out [count] = the sum of parts [splits, count], in order."""
    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    acc = tl.zeros([TILE], tl.float32)
    parts += i
    for _ in range(splits):
        acc += tl.load(parts, i < count, 0.0)
        parts += count
    tl.store(out + i, acc.to(out.dtype.element_ty), i < count)


def product_configs(block: int, itemsize: int, precision: str) -> list[Config]:
    """Tiles of product_kernel to choose from; the first serves unmeasured."""
    # The block's index is read one load ahead of the block, so that of n stages (n + 1) / 2 hold tiles.
    wide = block >= 64
    if itemsize == 2:
        configs = [Config(128, 64, 4 if block < 128 else 8, 5), Config(64, 64, 4, 5), Config(16, 64, 4, 5)]
        if wide:
            return [*configs, Config(128, 64, 4 if block < 128 else 8, 7), Config(256, 64, 8, 5)]
        return [*configs, Config(128, 128, 4, 5), Config(256, 64, 4, 5)]
    if precision == "ieee":
        return [Config(64, 32, 8 if wide else 4, 3), Config(16, 32, 4, 3), Config(128, 16, 8, 3)]
    if precision == "tf32x3":
        # Each operand is held twice, so that tiles are smaller.
        return [Config(64, 32, 8 if wide else 4, 5), Config(16, 32, 4, 5), Config(128, 16, 8, 5)]
    return [Config(128, 32, 8 if wide else 4, 5), Config(64, 32, 8 if wide else 4, 5), Config(16, 32, 4, 5)]


def sampled_configs(block: int, itemsize: int, precision: str) -> list[Config]:
    """Tiles of sampled_kernel to choose from; the first serves unmeasured."""
    wide = block >= 64
    if itemsize == 2:
        if wide:
            return [Config(64, 0, 4 if block < 128 else 8, 4), Config(128, 0, 8, 3), Config(64, 0, 8, 3)]
        return [Config(128, 0, 4, 3), Config(64, 0, 2, 4), Config(256, 0, 4, 2)]
    if precision == "ieee":
        return [Config(32, 0, 8 if wide else 4, 3), Config(16, 0, 8 if wide else 4, 3)]
    if precision == "tf32x3":
        deep, flat = Config(32, 0, 8, 3), Config(16, 0, 8 if wide else 4, 3)
        return [flat] if block == 128 else [deep] if wide else [flat, deep]
    if block == 128:
        return [Config(32, 0, 8, 4), Config(64, 0, 8, 2)]
    return [Config(32, 0, 8 if wide else 4, 4), Config(64, 0, 8 if wide else 4, 3), Config(64, 0, 4, 3)]


def _fitting(configs: list[Config], tokens: int) -> list[Config]:
    """Without tiles far higher than the input."""
    return [c for c in configs if c.tile < 2 * max(tokens, 16)] or [min(configs)]


def product(
    x: Tensor, values: Tensor, bias: Tensor | None, offsets: Tensor, index: Tensor, perm: Tensor | None, block: int,
    op: str = "masked_linear", out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``[tokens, rows * block]`` of ``x [tokens, columns * block]``; ``perm`` walks the transpose of the weight.

    ``op`` names the setting of float32 precision that holds; the result is written to ``out`` if that is given.
    """
    tokens, rows = x.shape[0], offsets.numel() - 1
    y = x.new_empty(tokens, rows * block) if out is None else out
    if tokens == 0:
        return y
    precision = _launch.precision(x.dtype, op)
    order = _launch.longest_first(offsets)

    def launch(config: Config) -> None:
        product_kernel[(triton.cdiv(tokens, config.tile) * rows,)](
            x, values, bias, offsets, index, perm, order, y, tokens, rows, x.stride(0), y.stride(0),
            BLOCK=block, TILE=config.tile, DEPTH=config.depth, TRANSPOSED=perm is not None, HAS_BIAS=bias is not None,
            ORDERED=order is not None, PRECISION=precision, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    key = ("linear product", perm is None, x.dtype, precision, block, _launch.size_class(tokens), rows)
    configs = _fitting(product_configs(block, x.element_size(), precision), tokens)
    _launch.launch_tuned((*key, _launch.density_class(values.shape[0], rows)), x, configs, launch)
    return y


def sampled_product(
    dy: Tensor, x: Tensor, col: Tensor, row: Tensor, perm: Tensor, block: int, op: str = "masked_linear"
) -> Tensor:
    """``dy^T x`` at the active blocks: ``[blocks, block, block]``."""
    tokens, blocks = x.shape[0], col.numel()
    out = x.new_empty(blocks, block, block)
    if tokens == 0 or blocks == 0:
        return out.zero_()
    device, precision = _launch.device_of(x), _launch.precision(x.dtype, op)
    by_features = along_the_sum(precision)
    if by_features:
        dy, x = transposed(dy), transposed(x)

    def launch(config: Config) -> None:
        assert 64 % config.tile == 0 or not by_features
        part, parts = partition(device, blocks, tokens, config.tile)
        target = out if parts == 1 else x.new_empty((parts, blocks, block, block), dtype=torch.float32)
        sampled_kernel[(blocks * parts,)](
            dy, x, target, col, row, perm, tokens, blocks, part, dy.stride(0), x.stride(0),
            BLOCK=block, TILE=config.tile, BY_FEATURES=by_features, PRECISION=precision, num_warps=config.warps,
            num_stages=config.stages,
        )  # fmt: skip
        if parts > 1:
            add_parts(target, out)

    configs = _fitting(sampled_configs(block, x.element_size(), precision), tokens)
    key = ("linear sampled", x.dtype, precision, block, _launch.size_class(tokens), _launch.size_class(blocks))
    _launch.launch_tuned(key, x, configs, launch)
    return out


def along_the_sum(precision: str) -> bool:
    """Whether operands have to lie along the sum, as 32-bit ones do to reach the tensor cores without a detour."""
    return precision in ("tf32", "tf32x3")


def transposed(matrix: Tensor) -> Tensor:
    """``[features, tokens]``, with zeros up to a multiple of 64 tokens, which every tile divides."""
    tokens, features = matrix.shape
    grid = triton.cdiv(tokens, 64), triton.cdiv(features, 64)
    out = matrix.new_empty(features, 64 * grid[0])
    transpose_kernel[grid](matrix, out, tokens, features, matrix.stride(0), out.stride(0), TILE=64, num_warps=4)
    return out


def partition(device: _launch.Device, blocks: int, rows: int, tile: int) -> tuple[int, int]:
    """The rows of a part of a sampled product, whole tiles, and the number of parts."""
    parts = _launch.splits(device, blocks, triton.cdiv(rows, tile))
    part = triton.cdiv(triton.cdiv(rows, parts), tile) * tile
    return part, triton.cdiv(rows, part)


def add_parts(parts: Tensor, out: Tensor) -> None:
    """Adds partial sums ``[splits, *out.shape]`` into ``out``."""
    tile = 1024
    grid = (triton.cdiv(out.numel(), tile),)
    add_parts_kernel[grid](parts, out, out.numel(), parts.shape[0], TILE=tile, num_warps=4)


def _matrix(tensor: Tensor) -> Tensor:
    """As [tokens, features], each row contiguous and on a 16-byte boundary where the whole tensor can be so."""
    matrix = tensor.reshape(-1, tensor.shape[-1])
    aligned = matrix.stride(1) == 1 and matrix.stride(0) * matrix.element_size() % 16 == 0
    return matrix if aligned and matrix.data_ptr() % 16 == 0 else matrix.contiguous()


def check_op(op: str, input: Tensor, weight: Tensor, col: Tensor, block: list[int]) -> None:
    """Raises for what the kernels do not serve, so that a direct call of an op reads nothing out of bounds."""
    b = block[0]
    if block[1] != b or b not in (1, *BLOCKS):
        raise ValueError(f"{op} on CUDA: expected blocks of 1x1 or squares of {BLOCKS}, got {tuple(block)}.")
    size = (col.numel(),) if b == 1 else (col.numel(), b, b)
    if tuple(weight.shape) != size:
        raise ValueError(f"{op} on CUDA: expected a weight {size} (packed), got {tuple(weight.shape)}.")
    if input.dtype != weight.dtype or input.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(
            f"{op} on CUDA: expected input and weight of float32, bfloat16 or float16, got {input.dtype} and "
            f"{weight.dtype}."
        )
    if col.dtype != torch.int32:
        raise TypeError(f"{op}: expected int32 pattern tensors, got {col.dtype}.")


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, crow: Tensor, col: Tensor, block: int,
    op: str = "masked_linear", out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``x @ W^T + bias`` of a packed weight, unstructured (``block`` 1) or of blocks."""
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    if block > 1:
        return product(x, weight, bias, crow, col, None, block, op, out)
    return _unstructured(x, weight, bias, crow, col, out)


def input_gradient(
    dy: Tensor, weight: Tensor, ccol: Tensor, row: Tensor, perm: Tensor, block: int,
    op: str = "masked_linear", out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``dy @ W``, by the columns of the weight."""
    if block > 1 and along_the_sum(_launch.precision(dy.dtype, op)):
        return product(dy, weight.index_select(0, perm).mT.contiguous(), None, ccol, row, None, block, op, out)
    if block > 1:
        return product(dy, weight.contiguous(), None, ccol, row, perm, block, op, out)
    # The kernel reads four values at once for every tile of tokens: gathered once, they are neighbours.
    return _unstructured(dy, weight.index_select(0, perm), None, ccol, row, out)


def weight_gradient(
    dy: Tensor, x: Tensor, crow: Tensor, col: Tensor, row: Tensor, perm: Tensor, block: int, op: str = "masked_linear"
) -> Tensor:
    """``dy^T x`` at the active entries, packed."""
    if block > 1:
        return sampled_product(dy, x, col, row, perm, block, op)
    return torch.ops.uasparse.sparse_sampled_product(dy, x, crow, col)


def _unstructured(
    x: Tensor, values: Tensor, bias: Tensor | None, offsets: Tensor, index: Tensor, out: Tensor | None
) -> Tensor:
    if takes_csr(x.dtype, index.numel() / ((offsets.numel() - 1) * x.shape[1]), x.shape[0]):
        return csr_product(x, values, bias, offsets, index, out)
    y = x.new_empty(x.shape[0], offsets.numel() - 1) if out is None else out
    torch.ops.uasparse.sparse_product_out(x, values, bias, offsets, index, y)
    return y


def masked_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, crow: Tensor, col: Tensor, ccol: Tensor, row: Tensor,
    perm: Tensor, shape: list[int], block: list[int],
) -> Tensor:  # fmt: skip
    """``uasparse::masked_linear`` for packed weights, unstructured or of square blocks."""
    check_op("masked_linear", input, weight, col, block)
    if input.shape[-1] != shape[1]:
        raise ValueError(f"masked_linear: expected an input [..., {shape[1]}], got {tuple(input.shape)}.")
    y = forward(_matrix(input), weight, bias, crow, col, block[0])
    return y.view(*input.shape[:-1], shape[0])


def masked_linear_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, crow: Tensor, col: Tensor, ccol: Tensor, row: Tensor,
    perm: Tensor, shape: list[int], block: list[int], output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``uasparse::masked_linear_backward`` for packed weights, unstructured or of square blocks."""
    check_op("masked_linear_backward", input, weight, col, block)
    if input.shape[-1] != shape[1] or grad_output.shape != (*input.shape[:-1], shape[0]):
        raise ValueError(
            f"masked_linear_backward: expected a grad_output [..., {shape[0]}] and an input [..., {shape[1]}], got "
            f"{tuple(grad_output.shape)} and {tuple(input.shape)}."
        )
    dy = _matrix(grad_output)
    grad_input = grad_weight = grad_bias = grad_output.new_empty(0)
    if output_mask[0]:
        grad_input = input_gradient(dy, weight, ccol, row, perm, block[0]).view(input.shape)
    if output_mask[1]:
        grad_weight = weight_gradient(dy, _matrix(input), crow, col, row, perm, block[0])
    if output_mask[2]:
        grad_bias = dy.sum(0)
    return grad_input, grad_weight, grad_bias
