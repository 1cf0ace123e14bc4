"""Convolutions and linear layers of a plan: which kernel serves each, and its weights in that kernel's order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uasparse_kernels.inference.builder import CONV, LOOKUP, ROWS, Builder, Entry
from uasparse_kernels.inference.fuse import Activation, Layer
from uasparse_kernels.inference.graph import Ref
from uasparse_kernels.inference.maps import Map, up
from uasparse_kernels.inference.pack import GROUP, WINDOW, pack_conv, pack_lookup, pack_rows
from uasparse_kernels.inference.views import CHANNEL, View, plain

FEW_ROWS = 8  # linear layers of up to so many rows have a kernel of their own
# Densities below which the kernels beat torch's dense ones (benchmarks/bench_serve.py).
LINEAR_CROSSOVER = 0.35
MANY_ROWS = 32


def add_layer(b: Builder, layer: Layer) -> None:
    weight = layer.weight().numpy()
    density = float(np.count_nonzero(weight)) / max(1, weight.size)
    shape, out = b.shapes[layer.input], b.shapes[layer.name]
    entry = Entry(layer.label, "", "", density, layer.fused)
    fits = layer.stored.dtype == b.dtype and weight.size and 0 not in shape and 0 not in out
    if layer.conv is not None:
        if not fits or len(shape) != 4 or 4 * np.prod(out, dtype=np.int64) > 1 << 31:
            return _dense(b, layer, entry, "its sizes or dtype")
        return _conv(b, layer, entry, plain(b.image(layer.input), shape), weight, layer.conv)
    rows = int(np.prod(shape[:-1]))
    if not fits:
        return _dense(b, layer, entry, "its sizes or dtype")
    few = rows <= FEW_ROWS
    # With enough rows the kernel that takes channels in fours beats torch's on dense weights too.
    least = MANY_ROWS if b.lanes * b.dtype.itemsize > 16 else rows + 1
    if (density > LINEAR_CROSSOVER and rows < least) or (few and weight.shape[1] > 1 << 16):
        return _dense(b, layer, entry, f"density {density:.2f} above {LINEAR_CROSSOVER}, {rows} rows")
    if few:
        return _few_rows(b, layer, entry, weight, rows)
    one = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
    return _conv(b, layer, entry, _rows_of(b, layer), weight, one)


def _dense(b: Builder, layer: Layer, entry: Entry, reason: str) -> None:
    """Torch's own kernel, with what was folded into the weight."""
    entry.kernel, entry.reason = "torch", "dense: " + reason
    conv, weight = layer.conv, layer.kept_weight

    def function(x: Tensor, residual: Tensor | None) -> Tensor:
        if conv is None:
            y = torch.nn.functional.linear(x, weight, layer.bias)
        else:
            y = torch.nn.functional.conv2d(x, weight, layer.bias, *conv.values())
        return layer.act(y if residual is None else y + residual)

    residual = None if layer.residual is None else Ref(layer.residual)
    b.torch_call(entry, function, [Ref(layer.input), residual], {}, layer.name)


def _conv(b: Builder, layer: Layer, entry: Entry, view: View, weight: np.ndarray, conv: dict[str, Any]) -> None:
    out, source = b.shapes[layer.name], view.map
    weight = weight.reshape(*weight.shape[:2], 1, 1) if layer.conv is None else weight
    height, width = out[2:] if layer.conv is not None else (source.height, source.width)
    stride = conv["stride"]
    packed = pack_conv(weight, **conv, channel_block=_channel_block(b, weight, conv, source, height, width))
    entry.kernel = "sparse" if packed.group == 1 else f"{GROUP} channels at once"
    entry.reason = f"{packed.kernel[0]}x{packed.kernel[1]}, {packed.blocks} blocks of channels"

    inputs = source
    phase_h, phase_w = -(-source.height // stride[0]), -(-source.width // stride[1])
    if stride != (1, 1):
        inputs = b.new_map(source.images, source.channels * len(packed.phases), phase_h, phase_w)
        b.load(layer.label, inputs, lambda: (source.body, source.strides()), [], source,
                  packed.phases, stride, (source.height, source.width))  # fmt: skip
    result = b.new_map(source.images, weight.shape[0], height, width, inputs.space, source.kind)
    dy, dx = packed.dy, packed.dx
    inputs.space.need(
        max(phase_w - dx.min(initial=0), width + dx.max(initial=0)),
        max(phase_h - dy.min(initial=0), height + dy.max(initial=0)),
        max(phase_h, height),
        int(np.abs(dy).max()),
        int(np.abs(dx).max()),
    )
    seen = plain(result, out) if layer.conv is not None else View(
        result, (*view.dims[:-1], ((out[-1], CHANNEL, 1),) if out[-1] > 1 else ())
    )  # fmt: skip
    residual = _residual(b, layer, seen)
    bias = b.put_values(np.zeros(packed.rows) if layer.bias is None else layer.bias.numpy())
    values, ptr, order = b.put_values(packed.values), b.put_ints(packed.ptr), b.put_ints(packed.order)
    kind, parameters = b.put_activation(layer.act)

    def emit(*_: Any) -> list[int]:
        space = inputs.space
        offsets = b.put_ints(packed.offsets(space.plane, space.root().pitch))
        tile = _tile(b, packed, space.body)
        chunk = up(384 * 1024 // (tile * b.lanes * 4), WINDOW)
        return [CONV, inputs.body, result.body, residual.body if residual else -1, space.plane, space.plane,
                space.body, space.gap, tile, packed.group, packed.rows, packed.blocks, chunk,
                order, ptr, offsets, values, bias, b.mask(result), kind, parameters]  # fmt: skip

    b.add(entry, emit, [inputs, *([residual] if residual else [])], [result])
    b.keep(layer.name, seen)


def _rows_of(b: Builder, layer: Layer) -> View:
    """The rows of a linear layer's input in planes, in the order of its residual where it has one."""
    found = b.view(layer.input)
    if found is not None and found.is_rows():
        other = None if layer.residual is None else b.view(layer.residual)
        usual = found.map.kind == "tokens" and found == plain(found.map, b.shapes[layer.input])
        if layer.residual is None or usual or (other is not None and other.is_rows() and found.is_like(other)):
            return found
    return plain(b.tokens(layer.input), b.shapes[layer.input])


def _residual(b: Builder, layer: Layer, result: View) -> Map | None:
    if layer.residual is None:
        return None
    found = b.view(layer.residual)
    if layer.conv is not None:
        residual = b.image(layer.residual)
    elif found is not None and found.is_rows() and found.is_like(result):
        residual = found.map
    else:
        residual = b.tokens(layer.residual)
    result.map.space.join(residual.space)
    return residual


def _channel_block(b: Builder, weight: np.ndarray, conv: dict[str, Any], source: Map, height: int, width: int) -> int:
    """Input channels of a block: their part of a tile stays in L1, with enough nonzeros to be worth a pass."""
    channels, kernel = source.channels, weight.shape[2] * weight.shape[3]
    if conv["groups"] > 1:
        return channels
    density = np.count_nonzero(weight) / weight.size
    vectors = -(-source.images * height * (width + (kernel > 1)) // 16)
    phases = int(np.prod(conv["stride"])) if kernel > 1 else 1
    if kernel > 1:
        tile = min(14, vectors)
        room = (28 if phases == 1 else 56) * 1024 // (tile * 64 * phases)
        block = max(8, 1 << int(np.log2(max(1, room))), int(8 / max(density * kernel, 1e-3)))
    else:
        block = max(64, 1 << int(np.ceil(np.log2(6 / max(density, 1e-3)))))
        if vectors <= 4:
            block = max(block, 256)
    return min(channels, block)


def _tile(b: Builder, packed: Any, body: int) -> int:
    """Vectors of a tile."""
    vectors = body // 16
    if packed.group > 1:
        tile = 6
    elif packed.kernel != (1, 1):
        tile = 14
    else:
        block = max(64, int(packed.plane.max(initial=0)) // packed.blocks)
        tile = min(14, max(4, round(52 * 1024 / (block * 64))))
    tile = min(tile, max(1, vectors))
    return min(b.most, tile * (16 // b.lanes if b.lanes < 16 else 1))


def _few_rows(b: Builder, layer: Layer, entry: Entry, weight: np.ndarray, rows: int) -> None:
    packed = pack_rows(weight)
    entry.kernel, entry.reason = "sparse, few rows", f"{rows} rows"
    shape = b.shapes[layer.input]
    looked_up = b.isa == "avx512" and b.dtype == torch.float32 and min(weight.shape) >= 64
    table = pack_lookup(weight) if looked_up else None
    if table is not None and table.values.size > 2 * packed.nnz + 4096:
        table = None
    columns, source = shape[-1], b.maps.get(layer.input)
    if source is not None and source.kind == "image":
        source = None
    if source is None:
        b.tensor(layer.input)
    residual = b.maps.get(layer.residual) if layer.residual else None
    added = layer.residual is not None and (residual is None or not residual.as_rows)
    result = b.new_map(1, packed.rows, 1, rows, kind="rows")
    if table is not None:
        entry.kernel = "sparse, few rows, looked up"
        lists = [b.put_ints(part) for part in (table.ptr, table.index, table.place)]
        lists.append(b.put_values(table.values))
    else:
        index = np.zeros(up(len(packed.columns), 2), np.uint16)
        index[: len(packed.columns)] = packed.columns
        lists = [b.put_ints(packed.ptr), b.put_ints(index.view(np.int32)), b.put_values(packed.values)]
    bias = b.put_values(np.zeros(packed.rows) if layer.bias is None else layer.bias.numpy())
    kind, parameters = b.put_activation(Activation() if added else layer.act)

    def emit(input: Callable[[str], int], _: Any) -> list[int]:
        if source is None:
            where = [input(layer.input), 0, columns, 1]
        else:
            _, stride_k, _, stride_m = source.strides()
            where = [-1, source.body, stride_m, stride_k]
        more = residual.body if residual and not added else -1
        start = [LOOKUP, *where, rows, columns, packed.rows]
        if table is None:
            start = [ROWS, *where, rows, columns, packed.rows, -1]
        return [*start, result.body, packed.rows, more, *lists, bias, kind, parameters]

    reads = [map for map in (source, residual if not added else None) if map is not None]
    b.add(entry, emit, reads, [result], [] if source is not None else [layer.input])
    if added:
        plain = layer.name + "+"
        b.maps[plain], b.shapes[plain] = result, b.shapes[layer.name]
        b.torch_call(Entry(layer.label, "torch", "addition", None, ()), lambda x, y: layer.act(x + y),
                        [Ref(plain), Ref(str(layer.residual))], {}, layer.name)  # fmt: skip
    else:
        b.maps[layer.name] = result
