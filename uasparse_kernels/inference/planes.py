"""Steps on planes that are no layers: activations, additions, pooling, concatenation; views move nothing (views.py)."""

from __future__ import annotations

from typing import Any

from uasparse_kernels.inference.builder import AFFINE, POOL, Builder, Entry
from uasparse_kernels.inference.fuse import Activation, Affine, activation_of
from uasparse_kernels.inference.graph import Node, Ref
from uasparse_kernels.inference.maps import Map
from uasparse_kernels.inference.tokens import attention, norm
from uasparse_kernels.inference.views import View, parts_of, plain, view_of


def add_node(b: Builder, node: Node) -> bool:
    """Adds the steps of a node whose input lies in planes; False where there are none, and torch is to run it."""
    first = node.args[0] if node.args else None
    if node.target == "aten.cat.default":
        return _concatenate(b, node)
    if not isinstance(first, Ref):
        return False
    if node.target == "operator.getitem" and first.name in b.parts:
        b.keep(node.name, b.parts[first.name][node.args[1]])
        return True
    view = b.view(first.name)
    if view is None:
        return False
    shape = b.shapes[first.name]
    if (parts := parts_of(node.target, view, node.args, shape)) is not None:
        b.parts[node.name] = parts
        return True
    if node.name not in b.shapes:  # several results
        return False
    out, map = b.shapes[node.name], view.map
    entry = Entry(node.name, "planes", node.target, None, ())
    if (act := activation_of(node)) is not None:
        _elementwise(b, entry, node.name, view, None, act)
        return True
    if node.target == "aten.dropout.default" and not node.args[2]:
        b.keep(node.name, view)
        return True
    if node.target == "aten.layer_norm.default":
        return norm(b, entry, node, view)
    if node.target == "aten.scaled_dot_product_attention.default":
        return attention(b, entry, node)
    if node.target == "aten.add.Tensor" and not node.kwargs:
        other = b.view(node.args[1].name) if isinstance(node.args[1], Ref) else None
        if other is None or not view.is_like(other) or view.dims != other.dims or map.channels != other.map.channels:
            return False
        _elementwise(b, entry, node.name, view, other.map, Activation())
        return True
    if node.target in ("aten.reshape.default", "aten.flatten.using_ints", "aten.squeeze.dims"):
        one = first.name in b.maps and map.kind == "image" and shape[2] == shape[3] == 1
        if one and list(out) == list(shape[:2]):
            return _pixel_rows(b, node.name, map)
    if (seen := view_of(node.target, view, node.args, node.kwargs, out)) is not None:
        b.keep(node.name, seen)
        return True
    if first.name not in b.maps or map.kind != "image":
        return False
    whole = {
        "aten.adaptive_avg_pool2d.default": lambda: list(node.args[1]) in ([1], [1, 1]),
        "aten.mean.dim": lambda: sorted(d % 4 for d in node.args[1]) == [2, 3] and not node.kwargs,
    }
    if node.target in whole and whole[node.target]():
        pooled = _pool(b, entry, map, (map.height, map.width), (1, 1), (0, 0), (1, 1), True, False)
        b.maps[node.name] = pooled
        return True if len(out) == 4 else _pixel_rows(b, node.name, pooled)
    if node.target in ("aten.max_pool2d.default", "aten.avg_pool2d.default"):
        average = node.target == "aten.avg_pool2d.default"
        kernel, stride, padding = ([*_pair(a)] for a in [*node.args[1:4], None, None][:3])
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
        b.maps[node.name] = _pool(
            b, entry, map, tuple(kernel), tuple(stride), tuple(padding), tuple(out[2:]), average, bool(count_padding)
        )
        return True
    return False


def add_affine(b: Builder, step: Affine) -> None:
    entry = Entry(step.label, "scale and shift", "not folded: no layer right before it", None, (step.act.kind,))
    if step.input not in b.maps or b.maps[step.input].kind != "image":
        shape = [1, -1, *[1] * (len(b.shapes[step.input]) - 2)]
        dtype = b.dtype
        scale, shift = step.scale.to(dtype).view(shape), step.shift.to(dtype).view(shape)
        b.torch_call(entry, lambda x: step.act(x * scale + shift), [Ref(step.input)], {}, step.name)
        return
    places = [b.put_values(part.numpy()) for part in (step.scale, step.shift)]
    source = plain(b.maps[step.input], b.shapes[step.input])
    _elementwise(b, entry, step.name, source, None, step.act, *places)


def _elementwise(b: Builder, entry: Entry, name: str, view: View, residual: Map | None, act: Activation,
                 scale: int = -1, shift: int = -1) -> None:  # fmt: skip
    source = view.map
    result = b.new_map(source.images, source.channels, source.height, source.width, source.space, source.kind)
    if residual is not None:
        source.space.join(residual.space)
    kind, parameters = b.put_activation(act)

    def emit(*_: Any) -> list[int]:
        space = source.space
        return [AFFINE, source.body, result.body, residual.body if residual else -1, source.channels, space.plane,
                space.plane, space.plane, space.body, space.gap, scale, shift, b.mask(result), kind,
                parameters]  # fmt: skip

    b.add(entry, emit, [source, *([residual] if residual else [])], [result])
    b.keep(name, view._replace(map=result))


def _pixel_rows(b: Builder, name: str, map: Map) -> bool:
    """[images, channels, 1, 1] as rows [images, channels]: the same planes where nothing lies between images."""
    rows = b.new_map(1, map.channels, 1, map.images, kind="tokens")
    b.load(name, rows, lambda: (map.body, [0, map.strides()[1], 0, map.strides()[0]]), [], map)
    b.maps[name] = rows
    return True


def _pool(b: Builder, entry: Entry, map: Map, kernel: Any, stride: Any, padding: Any, out: Any, average: bool,
          count_padding: bool) -> Map:  # fmt: skip
    result = b.new_map(map.images, map.channels, out[0], out[1])

    def emit(*_: Any) -> list[int]:
        at, to = map.space.root(), result.space.root()
        return [POOL, map.body, result.body, map.channels, map.space.plane, result.space.plane,
                map.images, map.height, map.width, at.pitch, at.rows, *out, to.pitch, to.rows, result.space.body,
                result.space.gap, *kernel, *stride, *padding, int(average), int(count_padding)]  # fmt: skip

    b.add(entry, emit, [map], [result])
    return result


def _concatenate(b: Builder, node: Node) -> bool:
    names = [ref.name for ref in node.args[0] if isinstance(ref, Ref)]
    out = b.shapes[node.name]
    dim = node.args[1] if len(node.args) > 1 else 0
    found = [b.maps.get(name) for name in names]
    if len(out) != 4 or dim % 4 != 1 or not all(m is not None and m.kind == "image" for m in found):
        return False
    maps = [m for m in found if m is not None]
    result = b.new_map(out[0], out[1], out[2], out[3], maps[0].space)
    for map in maps:
        result.space.join(map.space)
    channel = 0
    for map in maps:

        def emit(*_: Any, map: Map = map, channel: int = channel) -> list[int]:
            space = result.space
            return [AFFINE, map.body, result.body + channel * space.plane, -1, map.channels, space.plane,
                    space.plane, space.plane, space.body, space.gap, -1, -1, b.mask(result), 0, -1]  # fmt: skip

        b.add(Entry(node.name, "planes", node.target, None, ()), emit, [map], [result])
        channel += map.channels
    b.maps[node.name] = result
    return True


def _pair(value: Any) -> list[int]:
    if value is None or value == []:
        return []
    return [value, value] if isinstance(value, int) else list(value) if len(value) == 2 else list(value) * 2
