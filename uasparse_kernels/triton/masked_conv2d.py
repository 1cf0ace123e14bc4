"""Block-sparse 2-D convolution as an implicit matrix product on channels_last images, packed weights [blocks, b, b].

Column g of the grid of blocks is channel block g // P at kernel position g % P (P = kh * kw). Pixels are rows of a
matrix that is never built: the row of output pixel (n, p, q) at kernel position (u, v) is input pixel
(n, p * stride - padding + u * dilation, q * stride - padding + v * dilation), zero outside of the image.

Product (forward): a program makes [TILE output pixels, b output channels] and walks the active blocks of one row of the
grid; each gives its kernel position and its input channels:

    acc [TILE, b] += X [TILE shifted pixels, DEPTH channels of the block] @ W_block [DEPTH, b]

Transposed product (grad-input): a program makes [TILE input pixels, b input channels] and walks the blocks of one
channel block at all positions: columns c * P to (c + 1) * P of the order by columns. With a stride, an input pixel
meets only the positions of its phase (pixel + padding - u * dilation divisible by the stride), so that a tile holds
pixels of one phase and passes over the blocks of others.

Sampled product (grad-weight): a program makes one block [b, b] from a range of output pixels, as the linear kernel does
from a range of rows; the number of ranges fills the device, since a layer has few blocks.

A 1x1 convolution without stride and padding is the linear kernel on the pixels, and the only one that serves
unstructured weights.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from uasparse_kernels.triton import _launch
from uasparse_kernels.triton import masked_linear as linear
from uasparse_kernels.triton._launch import Config

# Of no use to the compiler: a kernel that was compiled for one size serves every other.
_SIZES = ["pixels", "rows", "blocks", "part", "height", "width", "out_height", "out_width"]


@triton.jit(do_not_specialize=_SIZES)
def product_kernel(
    x, values, bias, crow, col, order, y,
    pixels, rows, height, width, out_height, out_width, channels, out_channels, kernel_width,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    POSITIONS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
    HAS_BIAS: tl.constexpr, ORDERED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y [pixels, out_channels] of x [N, height, width, channels]."""
    tile, r = tl.program_id(0) // rows, tl.program_id(0) % rows
    if ORDERED:
        r = tl.load(order + r)
    start = tl.load(crow + r)
    end = tl.load(crow + r + 1)
    m = tile * TILE + tl.arange(0, TILE)
    image, h, w = _split(tl.minimum(m, pixels - 1), out_height, out_width)
    h = h * stride_h - padding_h
    w = w * stride_w - padding_w
    x += image.to(tl.int64)[:, None] * height * width * channels
    n = tl.arange(0, BLOCK)
    k = tl.arange(0, DEPTH)
    steps: tl.constexpr = BLOCK // DEPTH
    in_block = n[None, :] * BLOCK + k[:, None]
    acc = tl.zeros([TILE, BLOCK], tl.float32)
    for step in range(start * steps, end * steps):
        i = step // steps
        inner = step % steps * DEPTH
        g = tl.load(col + i)
        position = g % POSITIONS
        at_h = h + position // kernel_width * dilation_h
        at_w = w + position % kernel_width * dilation_w
        inside = (at_h >= 0) & (at_h < height) & (at_w >= 0) & (at_w < width)
        column = g // POSITIONS * BLOCK + inner + k
        a = tl.load(x + (at_h * width + at_w)[:, None] * channels + column[None, :], inside[:, None], 0.0)
        b = tl.load(values + i.to(tl.int64) * (BLOCK * BLOCK) + inner + in_block)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias + r * BLOCK + n).to(tl.float32)[None, :]
    out = y + m.to(tl.int64)[:, None] * out_channels + (r * BLOCK + n)[None, :]
    tl.store(out, acc.to(y.dtype.element_ty), (m < pixels)[:, None])


@triton.jit(do_not_specialize=_SIZES)
def transposed_kernel(
    dy, values, col, ccol, row, perm, dx,
    pixels, rows, height, width, out_height, out_width, channels, out_channels, kernel_width,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    POSITIONS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
    STRIDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx [N, height, width, channels] of dy [N, out_height, out_width, out_channels].

    STRIDED: ``pixels`` counts those of one phase, in a grid of ceil(height / stride_h) by ceil(width / stride_w) whose
    last row and column may lie outside of the image; the phase is the grid's second index.
    """
    tile, c = tl.program_id(0) // rows, tl.program_id(0) % rows
    start = tl.load(ccol + c * POSITIONS)
    end = tl.load(ccol + (c + 1) * POSITIONS)
    m = tile * TILE + tl.arange(0, TILE)
    safe = tl.minimum(m, pixels - 1)
    if STRIDED:
        phase_h = tl.program_id(1) // stride_w
        phase_w = tl.program_id(1) % stride_w
        image, h, w = _split(safe, tl.cdiv(height, stride_h), tl.cdiv(width, stride_w))
    else:
        phase_h = 0
        phase_w = 0
        image, h, w = _split(safe, height, width)
    dy += image.to(tl.int64)[:, None] * out_height * out_width * out_channels
    n = tl.arange(0, BLOCK)
    k = tl.arange(0, DEPTH)
    steps: tl.constexpr = BLOCK // DEPTH
    in_block = k[:, None] * BLOCK + n[None, :]
    acc = tl.zeros([TILE, BLOCK], tl.float32)
    for step in range(start * steps, end * steps):
        j = step // steps
        inner = step % steps * DEPTH
        slot = tl.load(perm + j)
        position = tl.load(col + slot) % POSITIONS
        shift_h = phase_h + padding_h - position // kernel_width * dilation_h
        shift_w = phase_w + padding_w - position % kernel_width * dilation_w
        column = tl.load(row + j) * BLOCK + inner + k
        block = values + slot.to(tl.int64) * (BLOCK * BLOCK) + inner * BLOCK
        if STRIDED:
            # Of one phase all pixels meet a position or none does; the divisions are exact where they count.
            if (shift_h % stride_h == 0) & (shift_w % stride_w == 0):
                at_h = h + shift_h // stride_h
                at_w = w + shift_w // stride_w
                inside = (at_h >= 0) & (at_h < out_height) & (at_w >= 0) & (at_w < out_width)
                a = tl.load(
                    dy + (at_h * out_width + at_w)[:, None] * out_channels + column[None, :], inside[:, None], 0.0
                )
                acc = tl.dot(a, tl.load(block + in_block), acc, input_precision=PRECISION)
        else:
            at_h = h + shift_h
            at_w = w + shift_w
            inside = (at_h >= 0) & (at_h < out_height) & (at_w >= 0) & (at_w < out_width)
            a = tl.load(dy + (at_h * out_width + at_w)[:, None] * out_channels + column[None, :], inside[:, None], 0.0)
            acc = tl.dot(a, tl.load(block + in_block), acc, input_precision=PRECISION)
    live = m < pixels
    if STRIDED:
        h = phase_h + h * stride_h
        w = phase_w + w * stride_w
        live = live & (h < height) & (w < width)
    out = dx + ((image.to(tl.int64) * height + h) * width + w)[:, None] * channels + (c * BLOCK + n)[None, :]
    tl.store(out, acc.to(dx.dtype.element_ty), live[:, None])


@triton.jit(do_not_specialize=_SIZES)
def sampled_kernel(
    dy, x, out, col, row, perm,
    pixels, blocks, part, height, width, out_height, out_width, channels, out_channels, kernel_width,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    POSITIONS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [splits, blocks, BLOCK, BLOCK]: dy^T (shifted x) at the active blocks, over ranges of ``part`` pixels."""
    pid = tl.program_id(0)
    j = pid % blocks
    split = pid // blocks
    slot = tl.load(perm + j)
    r = tl.load(row + j)
    g = tl.load(col + slot)
    shift_h = g % POSITIONS // kernel_width * dilation_h - padding_h
    shift_w = g % POSITIONS % kernel_width * dilation_w - padding_w
    n = tl.arange(0, BLOCK)
    dy += r * BLOCK + n[None, :]
    x += g // POSITIONS * BLOCK + n[None, :]
    begin = split * part
    end = tl.minimum(begin + part, pixels)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for step in range(begin, end, TILE):
        m = step + tl.arange(0, TILE)
        live = m < end
        image, h, w = _split(m, out_height, out_width)
        h = h * stride_h + shift_h
        w = w * stride_w + shift_w
        inside = live & (h >= 0) & (h < height) & (w >= 0) & (w < width)
        a = tl.load(dy + m.to(tl.int64)[:, None] * out_channels, live[:, None], 0.0)
        b = tl.load(x + ((image.to(tl.int64) * height + h) * width + w)[:, None] * channels, inside[:, None], 0.0)
        acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)
    out += (split.to(tl.int64) * blocks + slot) * (BLOCK * BLOCK)
    tl.store(out + n[:, None] * BLOCK + n[None, :], acc.to(out.dtype.element_ty))


@triton.jit
def _split(m, height, width):
    """Image, row and column of pixels."""
    return m // (height * width), m // width % height, m % width


def product_configs(block: int, itemsize: int, precision: str, transposed: bool = False) -> list[Config]:
    """Tiles of product_kernel and transposed_kernel to choose from; the first serves unmeasured."""
    depth = min(block, 64 if itemsize == 2 else 32)
    # As in the linear kernel, of the stages only some hold tiles; the transposed kernel reads two indices ahead.
    stages = 7 if transposed else 5
    warps = 8 if block == 128 else 4
    if itemsize == 2:
        configs = [Config(128, depth, warps, stages), Config(64, depth, 4, stages), Config(128, depth, 8, stages - 2)]
        # Twice the pixels read a block of the weight half as often: what small maps of many channels wait for.
        return [*configs, Config(256, depth, 8, stages)] if block == 64 else configs
    if precision == "tf32":
        return [Config(128, depth, warps, stages), Config(64, depth, 4, stages)]
    return [Config(64, min(depth, 16), 8 if block >= 64 else 4, 3), Config(64, depth, 8, 3)]


def sampled_configs(block: int, itemsize: int, precision: str) -> list[Config]:
    """Tiles of sampled_kernel to choose from; the first serves unmeasured."""
    wide = block >= 64
    if itemsize == 2:
        if wide:
            return [Config(64, 0, 4 if block < 128 else 8, 3), Config(64, 0, 8, 4)]
        return [Config(128, 0, 4, 3), Config(64, 0, 4, 3)]
    if precision == "tf32":
        return [Config(32, 0, 8 if wide else 4, 3), Config(64, 0, 8 if wide else 4, 2)]
    return [Config(16, 0, 8 if wide else 4, 3)]


class _Geometry:
    """Sizes of one convolution, as the kernels take them."""

    def __init__(self, input_size, shape, stride, padding, dilation):
        self.images, self.channels, self.height, self.width = input_size
        self.out_channels, _, kernel_height, self.kernel_width = shape
        self.positions = kernel_height * self.kernel_width
        kernel = kernel_height, self.kernel_width
        self.out_height, self.out_width = (
            (input_size[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(2)
        )
        self.stride, self.padding, self.dilation = tuple(stride), tuple(padding), tuple(dilation)
        self.pixels = self.images * self.out_height * self.out_width
        self.is_linear = self.positions == 1 and self.stride == (1, 1) and self.padding == (0, 0)

    def arguments(self) -> tuple[int, ...]:
        return (
            self.height, self.width, self.out_height, self.out_width, self.channels, self.out_channels,
            self.kernel_width, *self.stride, *self.padding, *self.dilation,
        )  # fmt: skip

    def key(self) -> tuple:
        """Layers that differ in none of these share their tuned tiles."""
        return self.channels, self.out_channels, self.positions, self.stride, _launch.size_class(self.pixels)


def _check_sizes(op: str, input: Tensor, geometry: _Geometry, shape: list[int], block: list[int], groups: int) -> None:
    if block[0] == 1 and not geometry.is_linear:
        raise ValueError(f"{op} on CUDA: expected square blocks, or a 1x1 kernel without stride and padding.")
    if groups != 1:
        raise ValueError(f"{op} on CUDA: expected groups=1, got {groups}.")
    if input.shape[1] != shape[1] or min(geometry.out_height, geometry.out_width) < 1:
        raise ValueError(f"{op}: expected an input [N, {shape[1]}, H, W] for {tuple(shape)}, got {tuple(input.shape)}.")
    largest = max(geometry.pixels, geometry.images * (geometry.height + 1) * (geometry.width + 1))
    image = max(
        geometry.height * geometry.width * geometry.channels, geometry.out_height * geometry.out_width * shape[0]
    )
    if max(largest, image) >= 2**31 - 2**16:
        raise ValueError(f"{op} on CUDA: {largest} pixels, {image} values an image are too many for 32-bit indices.")


def _pixels(tensor: Tensor) -> Tensor:
    """An image [N, C, H, W] as contiguous [N * H * W, C]: a view of a channels_last one."""
    return tensor.permute(0, 2, 3, 1).contiguous().view(-1, tensor.shape[1])


def _image_like(input: Tensor, size: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """A new image in the memory format of ``input``, and the pixels to write: its own, or a matrix to copy from."""
    format = torch._prims_common.suggest_memory_format(input)
    image = torch.empty(size, dtype=input.dtype, device=input.device, memory_format=format)
    rows = image.permute(0, 2, 3, 1)
    return image, rows.view(-1, size[1]) if rows.is_contiguous() else input.new_empty(rows.numel() // size[1], size[1])


def _deliver(image: Tensor, pixels: Tensor) -> Tensor:
    if image.data_ptr() != pixels.data_ptr():
        image.permute(0, 2, 3, 1).copy_(pixels.view(image.shape[0], *image.shape[2:], image.shape[1]))
    return image


def _product(x: Tensor, values: Tensor, bias: Tensor | None, crow: Tensor, col: Tensor, y: Tensor, block: int, size):
    precision = _launch.precision(x.dtype, "masked_conv2d")
    rows, order = crow.numel() - 1, _launch.longest_first(crow)

    def launch(config: Config) -> None:
        product_kernel[(triton.cdiv(size.pixels, config.tile) * rows,)](
            x, values, bias, crow, col, order, y, size.pixels, rows, *size.arguments(),
            POSITIONS=size.positions, BLOCK=block, TILE=config.tile, DEPTH=config.depth, HAS_BIAS=bias is not None,
            ORDERED=order is not None, PRECISION=precision, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    key = ("conv product", x.dtype, precision, block, size.key(), _launch.density_class(values.shape[0], rows))
    _launch.launch_tuned(key, x, product_configs(block, x.element_size(), precision), launch)


def _transposed(dy: Tensor, values: Tensor, col, ccol, row, perm, dx: Tensor, block: int, size: _Geometry) -> None:
    precision = _launch.precision(dy.dtype, "masked_conv2d")
    rows, strided = size.channels // block, size.stride != (1, 1)
    phases = size.stride[0] * size.stride[1]
    pixels = size.images * triton.cdiv(size.height, size.stride[0]) * triton.cdiv(size.width, size.stride[1])

    def launch(config: Config) -> None:
        transposed_kernel[(triton.cdiv(pixels, config.tile) * rows, phases)](
            dy, values, col, ccol, row, perm, dx, pixels, rows, *size.arguments(),
            POSITIONS=size.positions, BLOCK=block, TILE=config.tile, DEPTH=config.depth, STRIDED=strided,
            PRECISION=precision, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    key = ("conv transposed", dy.dtype, precision, block, size.key(), _launch.density_class(values.shape[0], rows))
    _launch.launch_tuned(key, dy, product_configs(block, dy.element_size(), precision, True), launch)


def _sampled(dy: Tensor, x: Tensor, col: Tensor, row: Tensor, perm: Tensor, block: int, size: _Geometry) -> Tensor:
    precision, device, blocks = _launch.precision(x.dtype, "masked_conv2d"), _launch.device_of(x), col.numel()
    out = x.new_empty(blocks, block, block)
    if size.pixels == 0 or blocks == 0:
        return out.zero_()

    def launch(config: Config) -> None:
        part, parts = linear.partition(device, blocks, size.pixels, config.tile)
        target = out if parts == 1 else x.new_empty((parts, blocks, block, block), dtype=torch.float32)
        sampled_kernel[(blocks * parts,)](
            dy, x, target, col, row, perm, size.pixels, blocks, part, *size.arguments(),
            POSITIONS=size.positions, BLOCK=block, TILE=config.tile, PRECISION=precision,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        if parts > 1:
            linear.add_parts(target, out)

    key = ("conv sampled", x.dtype, precision, block, size.key(), _launch.size_class(blocks))
    _launch.launch_tuned(key, x, sampled_configs(block, x.element_size(), precision), launch)
    return out


def masked_conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None, crow: Tensor, col: Tensor, ccol: Tensor, row: Tensor,
    perm: Tensor, shape: list[int], block: list[int], stride: list[int], padding: list[int], dilation: list[int],
    groups: int,
) -> Tensor:  # fmt: skip
    """``uasparse::masked_conv2d`` for packed weights of square blocks (by 1x1: unstructured too), without groups."""
    linear.check_op("masked_conv2d", input, weight, col, block)
    size = _Geometry(input.shape, shape, stride, padding, dilation)
    _check_sizes("masked_conv2d", input, size, shape, block, groups)
    image, y = _image_like(input, (size.images, shape[0], size.out_height, size.out_width))
    if size.pixels == 0:
        return image
    x = _pixels(input)
    if size.is_linear:
        linear.forward(x, weight, bias, crow, col, block[0], "masked_conv2d", y)
    else:
        bias = None if bias is None else bias.contiguous()
        _product(x, weight.contiguous(), bias, crow, col, y, block[0], size)
    return _deliver(image, y)


def masked_conv2d_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, crow: Tensor, col: Tensor, ccol: Tensor, row: Tensor,
    perm: Tensor, shape: list[int], block: list[int], stride: list[int], padding: list[int], dilation: list[int],
    groups: int, output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``uasparse::masked_conv2d_backward`` for the same weights."""
    linear.check_op("masked_conv2d_backward", input, weight, col, block)
    size = _Geometry(input.shape, shape, stride, padding, dilation)
    _check_sizes("masked_conv2d_backward", input, size, shape, block, groups)
    expected = (size.images, shape[0], size.out_height, size.out_width)
    if tuple(grad_output.shape) != expected or grad_output.dtype != input.dtype:
        raise ValueError(
            f"masked_conv2d_backward: expected a grad_output {expected} of {input.dtype}, got "
            f"{tuple(grad_output.shape)} of {grad_output.dtype}."
        )
    dy = _pixels(grad_output)
    grad_input = grad_weight = grad_bias = grad_output.new_empty(0)
    if output_mask[0]:
        grad_input, dx = _image_like(input, tuple(input.shape))
        if size.pixels == 0:
            grad_input.zero_()
        else:
            if size.is_linear:
                linear.input_gradient(dy, weight, ccol, row, perm, block[0], "masked_conv2d", dx)
            else:
                _transposed(dy, weight.contiguous(), col, ccol, row, perm, dx, block[0], size)
            grad_input = _deliver(grad_input, dx)
    if output_mask[1]:
        x = _pixels(input)
        if size.is_linear:
            grad_weight = linear.weight_gradient(dy, x, crow, col, row, perm, block[0], "masked_conv2d")
        else:
            grad_weight = _sampled(dy, x, col, row, perm, block[0], size)
    if output_mask[2]:
        grad_bias = dy.sum(0)
    return grad_input, grad_weight, grad_bias
