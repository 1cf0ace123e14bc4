"""What a plan is built with: lists of numbers, maps and tensors, and calls.

A result may lie in the arena as planes (a Map, or a View of one), or be a tensor of torch, or both; whoever reads it
asks for the one that it needs, and the conversion is made once.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from uasparse_kernels._library import compiled
from uasparse_kernels.inference.fuse import ACTIVATIONS, Activation
from uasparse_kernels.inference.graph import Graph, Ref
from uasparse_kernels.inference.maps import Map, Space, place, up
from uasparse_kernels.inference.views import View, plain

# The steps of csrc/cpu/serve.cpp.
LOAD, CONV, ROWS, POOL, AFFINE, STORE, NORM, ATTENTION, LOOKUP, MADE_FOR = range(10)
FORMAT = 1  # kServeFormat
ISAS = ("portable", "avx2", "avx512")


@dataclasses.dataclass
class Entry:
    """What ``explain`` says of a step."""

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
    """A step of the interpreter, before the maps have their places in the arena."""

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


class _Blob:
    """Arrays that become one, each at a multiple of 16."""

    def __init__(self, dtype: Any):
        self.dtype, self.size = dtype, 0
        self.arrays: list[tuple[int, np.ndarray]] = []

    def put(self, array: np.ndarray) -> int:
        """Takes an array, which nobody changes afterwards; returns its place."""
        place = self.size
        self.arrays.append((place, array))
        self.size += up(array.size)
        return place

    def whole(self) -> Tensor:
        whole = np.zeros(max(16, self.size), self.dtype)
        while self.arrays:  # letting go of each, so that only one of the two is ever whole
            place, array = self.arrays.pop()
            whole[place : place + array.size] = array
        return torch.from_numpy(whole)


class Builder:
    """A plan in the making."""

    def __init__(self, graph: Graph, shapes: dict[str, Any], dtype: torch.dtype):
        self.graph, self.shapes, self.dtype = graph, shapes, dtype
        self.maps: dict[str, Map] = {}
        self.views: dict[str, View] = {}  # of results that are no whole map in its own order
        self.parts: dict[str, list[View]] = {}  # of nodes with several results
        self.tensors: set[str] = set(graph.inputs) | set(graph.constants)
        self.calls: list[_Program | Call] = []
        self.all_maps: list[Map] = []
        self.masks: dict[tuple[int, ...], int] = {}
        self.isa = isa = compiled.cpu_isa() if compiled is not None else "portable"
        self.lanes = {"avx512": 64, "avx2": 32}.get(isa, 16) // dtype.itemsize
        self.most = 24 if isa == "avx512" else 12
        self.numpy = np.float64 if dtype == torch.float64 else np.float32
        self.ints, self.values = _Blob(np.int32), _Blob(self.numpy)

    # ---- blobs ----------------------------------------------------------------------------------------------------

    def put_ints(self, array: np.ndarray) -> int:
        array = np.ascontiguousarray(array).reshape(-1)
        return self.ints.put(array if array.dtype == np.int32 else array.view(np.int32))

    def put_values(self, array: Any) -> int:
        return self.values.put(np.asarray(array, self.numpy).reshape(-1))

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
        """Makes a view a tensor: the whole map becomes one, and torch takes the view of it."""
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

    def torch_call(self, entry: Entry, function: Any, arguments: Any, keywords: Any, result: str) -> None:
        for leaf in pytree.tree_leaves((arguments, keywords), is_leaf=lambda x: isinstance(x, Ref)):
            if isinstance(leaf, Ref):
                self.tensor(leaf.name)
        self.calls.append(Call(entry, function, arguments, keywords, result))
        self.tensors.add(result)

    # ---- the plan -------------------------------------------------------------------------------------------------

    def finish(self, wanted: set[str]) -> Plan:
        size = place(self.all_maps)
        calls: list[Call] = []
        steps, self.calls = deque(self.calls), []
        while steps:  # a step's lists are let go once they are in the blobs
            item = steps.popleft()
            if isinstance(item, Call):
                calls.append(item)
                continue
            names = list(item.inputs)
            outputs = [name for name, _ in item.outputs]
            numbers = item.emit(names.index, outputs.index)
            program = torch.tensor([int(n) for n in numbers], device="cpu")
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
        return Plan(calls, size, self.ints.whole(), self.values.whole())
