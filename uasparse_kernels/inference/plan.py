"""From steps and concrete sizes to a plan: what the compiled interpreter runs, and what torch runs between.

A result may lie in the arena as planes ("map"), or be a tensor of torch, or both; whoever reads it asks for the one it
needs, and the conversion is made once. Maps that a convolution connects share pitch and rows (a Space); these are
known, and with them offsets and places in the arena, once all steps have said what they need.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from uasparse_kernels._library import compiled
from uasparse_kernels.inference.fuse import ACTIVATIONS, Activation, Affine, Layer, Step, activation_of
from uasparse_kernels.inference.graph import Graph, Node, Ref, fill, resolve
from uasparse_kernels.inference.pack import GROUP, WINDOW, pack_conv, pack_lookup, pack_rows
from uasparse_kernels.inference.views import CHANNEL, COLUMN, View, parts_of, plain, view_of

FEW_ROWS = 8  # the kernel for a few rows of a linear layer serves so many
# Densities below which the kernels beat torch's dense ones (benchmarks/bench_serve.py).
LINEAR_CROSSOVER = 0.35
MANY_ROWS = 32
LOAD, CONV, ROWS, POOL, AFFINE, STORE, NORM, ATTENTION, LOOKUP = range(9)


def _up(value: int, to: int = 16) -> int:
    return -(-value // to) * to


class Space:
    """Pitch, rows and gap of the maps that convolutions connect."""

    def __init__(self, images: int):
        self.images = images
        self.pitch = self.rows = self.height = self.reach_y = self.reach_x = 0
        self._parent: Space | None = None

    def root(self) -> Space:
        space = self
        while space._parent is not None:
            space = space._parent
        return space

    def need(self, pitch: int, rows: int, height: int, reach_y: int = 0, reach_x: int = 0) -> None:
        root = self.root()
        root.pitch, root.rows, root.height = max(root.pitch, pitch), max(root.rows, rows), max(root.height, height)
        root.reach_y, root.reach_x = max(root.reach_y, reach_y), max(root.reach_x, reach_x)

    def join(self, other: Space) -> None:
        a, b = self.root(), other.root()
        if a is not b:
            b._parent = a
            a.need(b.pitch, b.rows, b.height, b.reach_y, b.reach_x)

    @property
    def body(self) -> int:
        root = self.root()
        return _up(((root.images - 1) * root.rows + root.height) * root.pitch)

    @property
    def gap(self) -> int:
        root = self.root()
        gap = _up(root.reach_y * root.pitch + root.reach_x)
        # Planes a multiple of 4 KiB apart would meet in a few lines of the cache. All between them is zero.
        return gap + 16 if (self.body + gap) % 1024 == 0 else gap

    @property
    def plane(self) -> int:
        return self.body + self.gap


@dataclasses.dataclass(eq=False)
class Map:
    """A result in the arena: an "image" (planes of NCHW), "tokens" (planes whose pixels are the rows of
    [..., channels]), or "rows" (as torch has them, for the kernel of a few)."""

    images: int
    channels: int
    height: int
    width: int
    space: Space
    kind: str = "image"
    first: int = -1
    last: int = -1
    position: int = -1

    @property
    def as_rows(self) -> bool:
        return self.kind == "rows"

    def size(self) -> int:
        if self.as_rows:
            return _up(self.width * self.channels)
        return _up(self.space.gap) + self.channels * self.space.plane + 64

    @property
    def body(self) -> int:
        """Where the first plane's body begins."""
        return self.position if self.as_rows else self.position + self.space.gap

    def strides(self) -> tuple[int, int, int, int]:
        if self.as_rows:
            return 0, 1, 0, self.channels
        root = self.space.root()
        return root.rows * root.pitch, self.space.plane, root.pitch, 1


@dataclasses.dataclass
class Entry:
    """What ``explain`` says of a layer, and the interpreter's steps that are its."""

    layer: str
    kernel: str
    reason: str
    density: float | None
    fused: tuple[str, ...]


@dataclasses.dataclass
class Call:
    """One call: of torch (function, arguments, results' names), or of the interpreter (a program)."""

    entry: Entry
    function: Callable[..., Any] | None = None
    arguments: Any = None
    keywords: Any = None
    result: str = ""
    drop: tuple[str, ...] = ()
    program: Tensor | None = None
    inputs: tuple[str, ...] = ()
    outputs: tuple[tuple[str, tuple[int, ...]], ...] = ()


@dataclasses.dataclass
class _Program:
    """A step of the interpreter before places are known."""

    entry: Entry
    emit: Callable[[Callable[[str], int], Callable[[str], int]], list[int]]
    inputs: tuple[str, ...] = ()
    outputs: tuple[tuple[str, tuple[int, ...]], ...] = ()


@dataclasses.dataclass
class Plan:
    calls: list[Call]
    arena: int
    ints: Tensor
    values: Tensor
    merged: list[Call] = dataclasses.field(default_factory=list)


class Planner:
    def __init__(self, graph: Graph, steps: list[Step], shapes: dict[str, Any], dtype: torch.dtype):
        self.graph, self.steps, self.shapes, self.dtype = graph, steps, shapes, dtype
        self.maps: dict[str, Map] = {}
        self.views: dict[str, View] = {}  # of results that are no whole map in its own order
        self.parts: dict[str, list[View]] = {}  # of nodes with several results
        self.tensors: set[str] = set(graph.inputs) | set(graph.constants)
        self.calls: list[_Program | Call] = []
        self.all_maps: list[Map] = []
        self.ints: list[np.ndarray] = []
        self.values: list[np.ndarray] = []
        self.ints_size = self.values_size = 0
        self.masks: dict[tuple[int, ...], int] = {}
        self.isa = isa = compiled.cpu_isa() if compiled is not None else "portable"
        self.lanes = {"avx512": 64, "avx2": 32}.get(isa, 16) // dtype.itemsize
        self.most = 24 if isa == "avx512" else 12
        self.numpy = np.float64 if dtype == torch.float64 else np.float32

    # ---- blobs ----------------------------------------------------------------------------------------------------

    def put_ints(self, array: np.ndarray) -> int:
        place = self.ints_size
        array = np.ascontiguousarray(array).reshape(-1)
        array = array if array.dtype == np.int32 else array.view(np.int32)
        padded = np.zeros(_up(array.size), np.int32)
        padded[: array.size] = array
        self.ints.append(padded)
        self.ints_size += padded.size
        return place

    def put_values(self, array: Any) -> int:
        place = self.values_size
        array = np.asarray(array, self.numpy).reshape(-1)
        padded = np.zeros(_up(array.size), self.numpy)
        padded[: array.size] = array
        self.values.append(padded)
        self.values_size += padded.size
        return place

    def put_activation(self, act: Activation) -> tuple[int, int]:
        return ACTIVATIONS.index(act.kind), self.put_values([act.a, act.b]) if act.kind in ("clamp", "leaky") else -1

    def mask(self, map: Map) -> int:
        root = map.space.root()
        key = (map.images, map.height, map.width, root.pitch, root.rows, map.space.body)
        if key not in self.masks:
            mask = np.zeros((map.images * max(root.rows, root.height), root.pitch), bool)
            for n in range(map.images):
                mask[n * root.rows : n * root.rows + map.height, : map.width] = True
            flat = np.zeros(map.space.body, np.int64 if self.dtype == torch.float64 else np.int32)
            flat[: mask.size] = -mask.reshape(-1)[: flat.size].astype(flat.dtype)
            self.masks[key] = self.put_ints(flat)
        return self.masks[key]

    # ---- maps and tensors -----------------------------------------------------------------------------------------

    def new_map(self, images: int, channels: int, height: int, width: int, space: Space | None = None,
                kind: str = "image") -> Map:  # fmt: skip
        map = Map(images, channels, height, width, space or Space(images), kind)
        map.space.need(width, height, height)
        self.all_maps.append(map)
        return map

    def add(self, entry: Entry, emit: Any, reads: list[Map], writes: list[Map], inputs=(), outputs=()) -> None:
        at = len(self.calls)
        for map in writes:
            map.first = at if map.first < 0 else map.first
        for map in (*reads, *writes):
            map.last = max(map.last, at)
        self.calls.append(_Program(entry, emit, tuple(inputs), tuple(outputs)))

    def tensor(self, name: str) -> None:
        """Makes a result a tensor of torch."""
        if name in self.tensors:
            return
        if name not in self.maps:
            return self.strided(name, self.views[name])
        map, shape = self.maps[name], self.shapes[name]

        def emit(_: Any, output: Callable[[str], int]) -> list[int]:
            _, plane, pitch, _ = map.strides()
            if map.as_rows:  # images of one pixel
                c = map.channels
                return [STORE, map.body, 1, c, 1, map.width, c, 1, 1, output(name), 0, c, 1, 0, 0]
            h, w, c = map.height, map.width, map.channels
            strides = [c * h * w, h * w, w, 1] if map.kind == "image" else [0, 1, 0, c]
            rows = map.space.root().rows
            return [STORE, map.body, plane, pitch, rows, map.images, c, h, w, output(name), 0, *strides]

        self.add(Entry(name, "to a tensor", "read by torch", None, ()), emit, [map], [], (), [(name, tuple(shape))])
        self.tensors.add(name)

    def strided(self, name: str, view: View) -> None:
        """Makes a view a tensor: the whole map as one, of which torch takes the view."""
        map = view.map
        base = f"map {self.all_maps.index(map)}"
        if base not in self.maps:
            self.maps[base] = map
            image = map.kind == "image"
            self.shapes[base] = [*view.sizes()] if image else [map.width, map.channels]
        image = map.kind == "image"
        h, w, c = map.height, map.width, map.channels
        by_axis = (c * h * w, h * w, w, 1) if image else (0, 1, 0, c)
        atoms = [atom for dim in view.dims for atom in dim]
        sizes, strides = [size for size, _, _ in atoms], [step * by_axis[axis] for _, axis, step in atoms]
        offset = sum(start * stride for start, stride in zip(view.start, by_axis, strict=True))
        shape = self.shapes[name]

        def function(x: Tensor) -> Tensor:
            return x.as_strided(sizes, strides, offset).reshape(shape)

        self.torch_call(Entry(name, "torch", "a view", None, ()), function, [Ref(base)], {}, name)

    def view(self, name: str) -> View | None:
        """A result in planes, as a view of its map."""
        map = self.maps.get(name)
        if map is not None and map.kind != "rows":
            return plain(map, self.shapes[name])
        return self.views.get(name)

    def keep(self, name: str, view: View) -> None:
        shape = self.shapes[name]
        whole = len(shape) == 4 if view.map.kind == "image" else bool(shape) and shape[-1] == view.map.channels
        if whole and np.prod(shape) == np.prod(view.sizes()) and view == plain(view.map, shape):
            self.maps[name] = view.map
        else:
            self.views[name] = view

    def rows_of(self, layer: Layer) -> View:
        """The rows of a linear layer's input in planes, in the order of its residual where it has one."""
        found = self.view(layer.input)
        if found is not None and found.is_rows():
            other = None if layer.residual is None else self.view(layer.residual)
            usual = found.map.kind == "tokens" and found == plain(found.map, self.shapes[layer.input])
            if layer.residual is None or usual or (other is not None and other.is_rows() and found.is_like(other)):
                return found
        return plain(self.tokens(layer.input), self.shapes[layer.input])

    def image(self, name: str) -> Map:
        """Makes a result [images, channels, height, width] a map."""
        if name not in self.maps or self.maps[name].kind != "image":
            self.tensor(name)
            n, c, h, w = self.shapes[name]
            self.maps[name] = self.load(name, self.new_map(n, c, h, w), lambda: (0, [c * h * w, h * w, w, 1]), [name])
        return self.maps[name]

    def tokens(self, name: str) -> Map:
        """Makes a result [..., channels] a map whose pixels are its rows."""
        if name not in self.maps or self.maps[name].kind != "tokens":
            self.tensor(name)
            shape = self.shapes[name]
            map = self.new_map(1, shape[-1], 1, int(np.prod(shape[:-1])), kind="tokens")
            self.maps[name] = self.load(name, map, lambda: (0, [0, 1, 0, shape[-1]]), [name])
        return self.maps[name]

    def load(self, label: str, map: Map, source: Callable[[], Any], inputs: list[str], reads: Map | None = None,
             phases: np.ndarray | None = None, stride: tuple[int, int] = (1, 1), size: Any = None) -> Map:  # fmt: skip
        phases = np.zeros(1, np.int32) if phases is None else phases
        listed = self.put_ints(phases)
        height, width = size or (map.height, map.width)
        channels = map.channels // len(phases)

        def emit(input: Callable[[str], int], _: Any) -> list[int]:
            position, strides = source()
            root, space = map.space.root(), map.space
            rows = root.rows if map.images > 1 else root.height
            return [LOAD, input(inputs[0]) if inputs else -1, position, *strides, map.images, channels, height, width,
                    map.body, space.plane, root.pitch, rows, space.gap, space.body,
                    len(phases), *stride, listed]  # fmt: skip

        entry = Entry(label, "to planes" if len(phases) == 1 else "phases", "layout", None, ())
        self.add(entry, emit, [reads] if reads else [], [map], inputs)
        return map

    # ---- steps ----------------------------------------------------------------------------------------------------

    def plan(self) -> Plan:
        wanted = {
            leaf.name
            for leaf in pytree.tree_leaves(self.graph.outputs, is_leaf=lambda x: isinstance(x, Ref))
            if isinstance(leaf, Ref)
        }
        for step in self.steps:
            if isinstance(step, Layer):
                self.layer(step)
            elif isinstance(step, Affine):
                self.affine(step)
            elif step.target == "aten.sym_size.int" and isinstance(step.args[1], int):
                size = self.shapes[step.args[0].name][step.args[1]]
                self.torch_call(Entry(step.name, "torch", "size", None, ()), lambda size=size: size, [], {}, step.name)
            elif not self.on_planes(step):
                self.torch_node(step)
        for name in wanted:
            self.tensor(name)
        return self.finish(wanted)

    def torch_call(self, entry: Entry, function: Any, arguments: Any, keywords: Any, result: str) -> None:
        for leaf in pytree.tree_leaves((arguments, keywords), is_leaf=lambda x: isinstance(x, Ref)):
            if isinstance(leaf, Ref):
                self.tensor(leaf.name)
        self.calls.append(Call(entry, function, arguments, keywords, result))
        self.tensors.add(result)

    def torch_node(self, node: Node) -> None:
        entry = Entry(node.name, "torch", node.target, None, ())
        self.torch_call(entry, resolve(node.target), node.args, node.kwargs, node.name)

    def layer(self, layer: Layer) -> None:
        weight = layer.weight.numpy()
        density = float(np.count_nonzero(weight)) / max(1, weight.size)
        shape, out = self.shapes[layer.input], self.shapes[layer.name]
        entry = Entry(layer.label, "", "", density, layer.fused)
        fits = layer.weight.dtype == self.dtype and weight.size and 0 not in shape and 0 not in out
        if layer.conv is not None:
            if not fits or len(shape) != 4 or 4 * np.prod(out, dtype=np.int64) > 1 << 31:
                return self.dense(layer, entry, "its sizes or dtype")
            return self.conv(layer, entry, plain(self.image(layer.input), shape), layer.conv)
        rows = int(np.prod(shape[:-1]))
        if not fits:
            return self.dense(layer, entry, "its sizes or dtype")
        few = rows <= FEW_ROWS
        # With rows enough the kernel for channels in fours serves dense weights too.
        least = MANY_ROWS if self.lanes * self.dtype.itemsize > 16 else rows + 1
        if (density > LINEAR_CROSSOVER and rows < least) or (few and weight.shape[1] > 1 << 16):
            return self.dense(layer, entry, f"density {density:.2f} above {LINEAR_CROSSOVER}, {rows} rows")
        if few:
            return self.few_rows(layer, entry, rows)
        one = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
        return self.conv(layer, entry, self.rows_of(layer), one)

    def dense(self, layer: Layer, entry: Entry, reason: str) -> None:
        """Torch's own kernel, with what was folded."""
        entry.kernel, entry.reason = "torch", "dense: " + reason
        conv = layer.conv

        def function(x: Tensor, residual: Tensor | None) -> Tensor:
            if conv is None:
                y = torch.nn.functional.linear(x, layer.weight, layer.bias)
            else:
                y = torch.nn.functional.conv2d(x, layer.weight, layer.bias, *conv.values())
            return layer.act(y if residual is None else y + residual)

        residual = None if layer.residual is None else Ref(layer.residual)
        self.torch_call(entry, function, [Ref(layer.input), residual], {}, layer.name)

    def conv(self, layer: Layer, entry: Entry, view: View, conv: dict[str, Any]) -> None:
        out, source = self.shapes[layer.name], view.map
        weight = layer.weight.numpy()
        weight = weight.reshape(*weight.shape[:2], 1, 1) if layer.conv is None else weight
        height, width = out[2:] if layer.conv is not None else (source.height, source.width)
        stride = conv["stride"]
        packed = pack_conv(weight, **conv, channel_block=self.channel_block(weight, conv, source, height, width))
        entry.kernel = "sparse" if packed.group == 1 else f"{GROUP} channels at once"
        entry.reason = f"{packed.kernel[0]}x{packed.kernel[1]}, {packed.blocks} blocks of channels"

        inputs = source
        phase_h, phase_w = -(-source.height // stride[0]), -(-source.width // stride[1])
        if stride != (1, 1):
            inputs = self.new_map(source.images, source.channels * len(packed.phases), phase_h, phase_w)
            self.load(layer.label, inputs, lambda: (source.body, source.strides()), [], source,
                      packed.phases, stride, (source.height, source.width))  # fmt: skip
        result = self.new_map(source.images, weight.shape[0], height, width, inputs.space, source.kind)
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
        residual = self.residual(layer, seen)
        bias = self.put_values(np.zeros(packed.rows) if layer.bias is None else layer.bias.numpy())
        values, ptr, order = self.put_values(packed.values), self.put_ints(packed.ptr), self.put_ints(packed.order)
        kind, parameters = self.put_activation(layer.act)

        def emit(*_: Any) -> list[int]:
            space = inputs.space
            offsets = self.put_ints(packed.offsets(space.plane, space.root().pitch))
            tile = self.tile(packed, space.body)
            chunk = _up(384 * 1024 // (tile * self.lanes * 4), WINDOW)
            return [CONV, inputs.body, result.body, residual.body if residual else -1, space.plane, space.plane,
                    space.body, space.gap, tile, packed.group, packed.rows, packed.blocks, chunk,
                    order, ptr, offsets, values, bias, self.mask(result), kind, parameters]  # fmt: skip

        self.add(entry, emit, [inputs, *([residual] if residual else [])], [result])
        self.keep(layer.name, seen)

    def residual(self, layer: Layer, result: View) -> Map | None:
        if layer.residual is None:
            return None
        found = self.view(layer.residual)
        if layer.conv is not None:
            residual = self.image(layer.residual)
        elif found is not None and found.is_rows() and found.is_like(result):
            residual = found.map
        else:
            residual = self.tokens(layer.residual)
        result.map.space.join(residual.space)
        return residual

    def channel_block(self, weight: np.ndarray, conv: dict[str, Any], source: Map, height: int, width: int) -> int:
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

    def tile(self, packed: Any, body: int) -> int:
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
        return min(self.most, tile * (16 // self.lanes if self.lanes < 16 else 1))

    def few_rows(self, layer: Layer, entry: Entry, rows: int) -> None:
        packed = pack_rows(layer.weight.numpy())
        entry.kernel, entry.reason = "sparse, few rows", f"{rows} rows"
        shape = self.shapes[layer.input]
        looked_up = self.isa == "avx512" and self.dtype == torch.float32 and min(layer.weight.shape) >= 64
        table = pack_lookup(layer.weight.numpy()) if looked_up else None
        if table is not None and table.values.size > 2 * packed.nnz + 4096:
            table = None
        columns, source = shape[-1], self.maps.get(layer.input)
        if source is not None and source.kind == "image":
            source = None
        if source is None:
            self.tensor(layer.input)
        residual = self.maps.get(layer.residual) if layer.residual else None
        added = layer.residual is not None and (residual is None or not residual.as_rows)
        result = self.new_map(1, packed.rows, 1, rows, kind="rows")
        if table is not None:
            entry.kernel = "sparse, few rows, looked up"
            lists = [self.put_ints(part) for part in (table.ptr, table.index, table.place)]
            lists.append(self.put_values(table.values))
        else:
            index = np.zeros(_up(len(packed.columns), 2), np.uint16)
            index[: len(packed.columns)] = packed.columns
            lists = [self.put_ints(packed.ptr), self.put_ints(index.view(np.int32)), self.put_values(packed.values)]
        bias = self.put_values(np.zeros(packed.rows) if layer.bias is None else layer.bias.numpy())
        kind, parameters = self.put_activation(Activation() if added else layer.act)

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
        self.add(entry, emit, reads, [result], [] if source is not None else [layer.input])
        if added:
            plain = layer.name + "+"
            self.maps[plain], self.shapes[plain] = result, self.shapes[layer.name]
            self.torch_call(Entry(layer.label, "torch", "addition", None, ()), lambda x, y: layer.act(x + y),
                            [Ref(plain), Ref(str(layer.residual))], {}, layer.name)  # fmt: skip
        else:
            self.maps[layer.name] = result

    def affine(self, step: Affine) -> None:
        entry = Entry(step.label, "scale and shift", "no layer before it takes it in", None, (step.act.kind,))
        if step.input not in self.maps or self.maps[step.input].kind != "image":
            shape = [1, -1, *[1] * (len(self.shapes[step.input]) - 2)]
            dtype = self.dtype
            scale, shift = step.scale.to(dtype).view(shape), step.shift.to(dtype).view(shape)
            self.torch_call(entry, lambda x: step.act(x * scale + shift), [Ref(step.input)], {}, step.name)
            return
        places = [self.put_values(part.numpy()) for part in (step.scale, step.shift)]
        source = plain(self.maps[step.input], self.shapes[step.input])
        self.elementwise(entry, step.name, source, None, step.act, *places)

    def elementwise(self, entry: Entry, name: str, view: View, residual: Map | None, act: Activation,
                    scale: int = -1, shift: int = -1) -> None:  # fmt: skip
        source = view.map
        result = self.new_map(source.images, source.channels, source.height, source.width, source.space, source.kind)
        if residual is not None:
            source.space.join(residual.space)
        kind, parameters = self.put_activation(act)

        def emit(*_: Any) -> list[int]:
            space = source.space
            return [AFFINE, source.body, result.body, residual.body if residual else -1, source.channels, space.plane,
                    space.plane, space.plane, space.body, space.gap, scale, shift, self.mask(result), kind,
                    parameters]  # fmt: skip

        self.add(entry, emit, [source, *([residual] if residual else [])], [result])
        self.keep(name, view._replace(map=result))

    def on_planes(self, node: Node) -> bool:
        """Serves a node whose input lies in planes; False where it cannot."""
        first = node.args[0] if node.args else None
        if node.target == "aten.cat.default":
            return self.concatenate(node)
        if not isinstance(first, Ref):
            return False
        if node.target == "operator.getitem" and first.name in self.parts:
            self.keep(node.name, self.parts[first.name][node.args[1]])
            return True
        view = self.view(first.name)
        if view is None:
            return False
        shape = self.shapes[first.name]
        if (parts := parts_of(node.target, view, node.args, shape)) is not None:
            self.parts[node.name] = parts
            return True
        if node.name not in self.shapes:  # several results
            return False
        out, map = self.shapes[node.name], view.map
        entry = Entry(node.name, "planes", node.target, None, ())
        if (act := activation_of(node)) is not None:
            self.elementwise(entry, node.name, view, None, act)
            return True
        if node.target == "aten.dropout.default" and not node.args[2]:
            self.keep(node.name, view)
            return True
        if node.target == "aten.layer_norm.default":
            return self.norm(entry, node, view)
        if node.target == "aten.scaled_dot_product_attention.default":
            return self.attention(entry, node)
        if node.target == "aten.add.Tensor" and not node.kwargs:
            other = self.view(node.args[1].name) if isinstance(node.args[1], Ref) else None
            if (
                other is None
                or not view.is_like(other)
                or view.dims != other.dims
                or map.channels != other.map.channels
            ):
                return False
            self.elementwise(entry, node.name, view, other.map, Activation())
            return True
        if node.target in ("aten.reshape.default", "aten.flatten.using_ints", "aten.squeeze.dims"):
            one = first.name in self.maps and map.kind == "image" and shape[2] == shape[3] == 1
            if one and list(out) == list(shape[:2]):
                return self.pixel_rows(node.name, map)
        if (seen := view_of(node.target, view, node.args, node.kwargs, out)) is not None:
            self.keep(node.name, seen)
            return True
        if first.name not in self.maps or map.kind != "image":
            return False
        whole = {
            "aten.adaptive_avg_pool2d.default": lambda: list(node.args[1]) in ([1], [1, 1]),
            "aten.mean.dim": lambda: sorted(d % 4 for d in node.args[1]) == [2, 3] and not node.kwargs,
        }
        if node.target in whole and whole[node.target]():
            pooled = self.pool(entry, map, (map.height, map.width), (1, 1), (0, 0), (1, 1), True, False)
            self.maps[node.name] = pooled
            return True if len(out) == 4 else self.pixel_rows(node.name, pooled)
        if node.target in ("aten.max_pool2d.default", "aten.avg_pool2d.default"):
            average = node.target == "aten.avg_pool2d.default"
            kernel, stride, padding = ([*map_pair(a)] for a in [*node.args[1:4], None, None][:3])
            kernel = kernel or [1, 1]
            stride, padding = stride or kernel, padding or [0, 0]
            rest = [*node.args[4:], *node.kwargs.values()]
            count_padding = True
            if average:
                ceil_mode = node.args[4] if len(node.args) > 4 else False
                count_padding = node.args[5] if len(node.args) > 5 else True
                if ceil_mode or len(node.args) > 6 or node.kwargs:
                    return False
            elif any(r not in (False, 1, [1, 1], [1]) for r in rest):
                return False
            self.maps[node.name] = self.pool(
                entry, map, tuple(kernel), tuple(stride), tuple(padding), tuple(out[2:]), average, bool(count_padding)
            )
            return True
        return False

    def norm(self, entry: Entry, node: Node, view: View) -> bool:
        """Layer norm over the channels."""
        parts = [
            self.graph.constants.get(a.name) if isinstance(a, Ref) else None for a in [*node.args[2:4], None, None]
        ]
        given = [a for a in node.args[2:4] if a is not None]
        known = [part for part in parts if part is not None and part.dtype == self.dtype]
        if not view.is_rows() or len(node.args[1]) != 1 or len(known) != len(given) or node.kwargs:
            return False
        source = view.map
        result = self.new_map(source.images, source.channels, source.height, source.width, source.space, source.kind)
        weight, bias = (-1 if part is None else self.put_values(part.numpy()) for part in parts[:2])
        epsilon = self.put_values([node.args[4] if len(node.args) > 4 else 1e-5])

        def emit(*_: Any) -> list[int]:
            space = source.space
            return [NORM, source.body, result.body, source.channels, space.plane, space.plane, space.body, space.gap,
                    weight, bias, epsilon, self.mask(result)]  # fmt: skip

        self.add(entry, emit, [source], [result])
        self.keep(node.name, view._replace(map=result))
        return True

    def attention(self, entry: Entry, node: Node) -> bool:
        """Scaled dot-product attention of queries, keys and values [..., heads, time, channels] in planes."""
        views = [self.view(ref.name) for ref in node.args[:3]]
        scale = node.kwargs.get("scale")
        if len(node.args) > 3 or set(node.kwargs) - {"scale"} or None in views:
            return False
        found = [_heads(view, self.shapes[ref.name]) for view, ref in zip(views, node.args, strict=True) if view]
        q, k, v = views
        if None in found or not (q and k and v):
            return False
        (images, heads), (time, dim) = found[0][0], self.shapes[node.args[0].name][-2:]
        keys, value_dim = self.shapes[node.args[2].name][-2:]
        leading = [[[atom[:2] for atom in group] for group in view.dims[:-2]] for view in (q, k, v)]
        if any(each[0] != found[0][0] for each in found) or leading[1] != leading[0] or leading[2] != leading[0]:
            return False
        result = self.new_map(1, heads * value_dim, 1, images * time, kind="tokens")
        number = self.put_values([dim**-0.5 if scale is None else scale])

        def emit(*_: Any) -> list[int]:
            def body(view: View) -> int:
                return view.map.body + view.start[CHANNEL] * view.map.space.plane + view.start[COLUMN]

            space = result.space
            return [ATTENTION, body(q), body(k), body(v), result.body, *(view.map.space.plane for view in (q, k, v)),
                    space.plane, *(each[1][0] for each in found), *(each[1][1] for each in found), images, heads, time,
                    keys, dim, value_dim, space.body, space.gap, number]  # fmt: skip

        self.add(entry, emit, [q.map, k.map, v.map], [result])
        steps = {COLUMN: time, CHANNEL: value_dim}
        dims = [tuple((size, axis, steps[axis]) for size, axis, _ in group) for group in q.dims[:-2]]
        last = [((time, COLUMN, 1),) if time > 1 else (), ((value_dim, CHANNEL, 1),) if value_dim > 1 else ()]
        self.keep(node.name, View(result, (*dims, *last)))
        return True

    def pixel_rows(self, name: str, map: Map) -> bool:
        """[images, channels, 1, 1] as rows [images, channels]: the same planes where nothing lies between images."""
        rows = self.new_map(1, map.channels, 1, map.images, kind="tokens")
        self.load(name, rows, lambda: (map.body, [0, map.strides()[1], 0, map.strides()[0]]), [], map)
        self.maps[name] = rows
        return True

    def pool(self, entry: Entry, map: Map, kernel: Any, stride: Any, padding: Any, out: Any, average: bool,
             count_padding: bool) -> Map:  # fmt: skip
        result = self.new_map(map.images, map.channels, out[0], out[1])

        def emit(*_: Any) -> list[int]:
            a, b = map.space.root(), result.space.root()
            return [POOL, map.body, result.body, map.channels, map.space.plane, result.space.plane,
                    map.images, map.height, map.width, a.pitch, a.rows, *out, b.pitch, b.rows, result.space.body,
                    result.space.gap, *kernel, *stride, *padding, int(average), int(count_padding)]  # fmt: skip

        self.add(entry, emit, [map], [result])
        return result

    def concatenate(self, node: Node) -> bool:
        names = [ref.name for ref in node.args[0] if isinstance(ref, Ref)]
        out = self.shapes[node.name]
        dim = node.args[1] if len(node.args) > 1 else 0
        found = [self.maps.get(name) for name in names]
        if len(out) != 4 or dim % 4 != 1 or not all(m is not None and m.kind == "image" for m in found):
            return False
        maps = [m for m in found if m is not None]
        result = self.new_map(out[0], out[1], out[2], out[3], maps[0].space)
        for map in maps:
            result.space.join(map.space)
        channel = 0
        for map in maps:

            def emit(*_: Any, map: Map = map, channel: int = channel) -> list[int]:
                space = result.space
                return [AFFINE, map.body, result.body + channel * space.plane, -1, map.channels, space.plane,
                        space.plane, space.plane, space.body, space.gap, -1, -1, self.mask(result), 0, -1]  # fmt: skip

            self.add(Entry(node.name, "planes", node.target, None, ()), emit, [map], [result])
            channel += map.channels
        self.maps[node.name] = result
        return True

    # ---- places ---------------------------------------------------------------------------------------------------

    def finish(self, wanted: set[str]) -> Plan:
        size = self.allocate()
        calls: list[Call] = []
        for item in self.calls:
            if isinstance(item, Call):
                calls.append(item)
                continue
            names = list(item.inputs)
            outputs = [name for name, _ in item.outputs]
            numbers = item.emit(names.index, outputs.index)
            program = torch.tensor([int(n) for n in numbers])
            calls.append(Call(item.entry, program=program, inputs=item.inputs, outputs=item.outputs))
        # Tensors are let go after their last reader.
        last: dict[str, int] = {}
        for i, call in enumerate(calls):
            for leaf in pytree.tree_leaves((call.arguments, call.keywords), is_leaf=lambda x: isinstance(x, Ref)):
                if isinstance(leaf, Ref):
                    last[leaf.name] = i
            for name in call.inputs:
                last[name] = i
        for name, i in last.items():
            if name not in wanted and name not in self.graph.constants:
                calls[i].drop += (name,)
        ints = np.concatenate(self.ints) if self.ints else np.zeros(16, np.int32)
        values = np.concatenate(self.values) if self.values else np.zeros(16, self.numpy)
        return Plan(calls, size, torch.from_numpy(ints), torch.from_numpy(values))

    def allocate(self) -> int:
        """Places in the arena: the first gap among the maps that live at the same time."""
        placed: list[Map] = []
        for map in sorted(self.all_maps, key=lambda m: -m.size()):
            near = sorted((m for m in placed if m.first <= map.last and map.first <= m.last), key=lambda m: m.position)
            position = 0
            for other in near:
                if position + map.size() <= other.position:
                    break
                position = max(position, other.position + other.size())
            map.position = position
            placed.append(map)
        return max((m.position + m.size() for m in placed), default=0) + 1024


def _heads(view: View, shape: list[int]) -> Any:
    """Numbers of images and heads, and their steps, of [..., time, channels] where these two lie side by side."""
    last = ((shape[-2], COLUMN, 1),) if shape[-2] > 1 else (), ((shape[-1], CHANNEL, 1),) if shape[-1] > 1 else ()
    if view.dims[-2:] != last or view.start[0] or view.start[2]:
        return None
    atoms = [atom for group in view.dims[:-2] for atom in group]
    images = [atom for atom in atoms if atom[1] == COLUMN]
    heads = [atom for atom in atoms if atom[1] == CHANNEL]
    if len(images) > 1 or len(heads) > 1 or len(images) + len(heads) != len(atoms):
        return None
    (many, _, image), (each, _, head) = images[0] if images else (1, 0, 0), heads[0] if heads else (1, 0, 0)
    return (many, each), (image, head)


def map_pair(value: Any) -> list[int]:
    if value is None or value == []:
        return []
    return [value, value] if isinstance(value, int) else list(value) if len(value) == 2 else list(value) * 2


def shapes_of(graph: Graph, steps: list[Step], inputs: list[Tensor]) -> dict[str, Any]:
    """The shapes of all results for inputs of these sizes, from a run of the graph on no device."""
    env: dict[str, Any] = {name: t.to("meta") for name, t in graph.constants.items()}
    env |= {
        name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in zip(graph.inputs, inputs, strict=True)
    }
    for node in graph.nodes:
        keywords = {k: "meta" if k == "device" else v for k, v in fill_all(node.kwargs, env).items()}
        env[node.name] = resolve(node.target)(*fill(node.args, env), **keywords)
    return {name: list(t.shape) for name, t in env.items() if isinstance(t, Tensor)}


def fill_all(kwargs: dict[str, Any], env: dict[str, Any]) -> dict[str, Any]:
    return {k: fill(v, env) for k, v in kwargs.items()}
