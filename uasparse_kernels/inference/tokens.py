"""Layer norm and attention of tokens in planes."""

from __future__ import annotations

from typing import Any

from uasparse_kernels.inference.builder import ATTENTION, NORM, Builder, Entry
from uasparse_kernels.inference.compact import dense
from uasparse_kernels.inference.graph import Node, Ref
from uasparse_kernels.inference.views import CHANNEL, COLUMN, View


def norm(b: Builder, entry: Entry, node: Node, view: View) -> bool:
    """Layer norm over the channels."""
    constants = [b.graph.constants.get(a.name) if isinstance(a, Ref) else None for a in [*node.args[2:4], None, None]]
    parts = [None if constant is None else dense(constant) for constant in constants]
    given = [a for a in node.args[2:4] if a is not None]
    known = [part for part in parts if part is not None and part.dtype == b.dtype]
    if not view.is_rows() or len(node.args[1]) != 1 or len(known) != len(given) or node.kwargs:
        return False
    source = view.map
    result = b.new_map(source.images, source.channels, source.height, source.width, source.space, source.kind)
    weight, bias = (-1 if part is None else b.put_values(part.numpy()) for part in parts[:2])
    epsilon = b.put_values([node.args[4] if len(node.args) > 4 else 1e-5])

    def emit(*_: Any) -> list[int]:
        space = source.space
        return [NORM, source.body, result.body, source.channels, space.plane, space.plane, space.body, space.gap,
                weight, bias, epsilon, b.mask(result)]  # fmt: skip

    b.add(entry, emit, [source], [result])
    b.keep(node.name, view._replace(map=result))
    return True


def attention(b: Builder, entry: Entry, node: Node) -> bool:
    """Scaled dot-product attention of queries, keys and values [..., heads, time, channels] in planes."""
    views = [b.view(ref.name) for ref in node.args[:3]]
    scale = node.kwargs.get("scale")
    if len(node.args) > 3 or set(node.kwargs) - {"scale"} or None in views:
        return False
    found = [_heads(view, b.shapes[ref.name]) for view, ref in zip(views, node.args, strict=True) if view]
    q, k, v = views
    if None in found or not (q and k and v):
        return False
    (images, heads), (time, dim) = found[0][0], b.shapes[node.args[0].name][-2:]
    keys, value_dim = b.shapes[node.args[2].name][-2:]
    leading = [[[atom[:2] for atom in group] for group in view.dims[:-2]] for view in (q, k, v)]
    if any(each[0] != found[0][0] for each in found) or leading[1] != leading[0] or leading[2] != leading[0]:
        return False
    result = b.new_map(1, heads * value_dim, 1, images * time, kind="tokens")
    number = b.put_values([dim**-0.5 if scale is None else scale])

    def emit(*_: Any) -> list[int]:
        def body(view: View) -> int:
            return view.map.body + view.start[CHANNEL] * view.map.space.plane + view.start[COLUMN]

        space = result.space
        return [ATTENTION, body(q), body(k), body(v), result.body, *(view.map.space.plane for view in (q, k, v)),
                space.plane, *(each[1][0] for each in found), *(each[1][1] for each in found), images, heads, time,
                keys, dim, value_dim, space.body, space.gap, number]  # fmt: skip

    b.add(entry, emit, [q.map, k.map, v.map], [result])
    steps = {COLUMN: time, CHANNEL: value_dim}
    dims = [tuple((size, axis, steps[axis]) for size, axis, _ in group) for group in q.dims[:-2]]
    last = [((time, COLUMN, 1),) if time > 1 else (), ((value_dim, CHANNEL, 1),) if value_dim > 1 else ()]
    b.keep(node.name, View(result, (*dims, *last)))
    return True


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
