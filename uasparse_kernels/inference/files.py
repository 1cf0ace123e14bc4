"""Files of sparse models, in the safetensors format: a JSON header and raw bytes, no pickle.

The layout is that of safetensors (8 bytes with the header's length, the header, the tensors), so its readers read the
parts; a tensor with zeros enough is held as two of them, its values and either a bitmask or the indices of its nonzeros
(compact.py). The header's metadata says which, and has a hash of all other bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from uasparse_kernels._attention import as_dense_names, as_own_names
from uasparse_kernels._model import Model, check_model
from uasparse_kernels.inference.compact import Compact, Constant, compact, dense
from uasparse_kernels.inference.graph import Graph, Node, Ref, resolve
from uasparse_kernels.nn.layers import SparseLayer
from uasparse_kernels.pattern import SparsityPattern

FORMAT = "uasparse_kernels sparse 2"
_NO_DIGEST = b"0" * 64
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ZEROS = "#zeros"  # after a weight's name: places of active weights that are zero, int64, flat in the pattern's shape
_PARTS = ("#values", "#bitmask", "#indices")  # after the name of a tensor that is held by its nonzeros
_MOST_HEADER = 100 << 20


def write(path: str | os.PathLike[str], tensors: Mapping[str, Constant], metadata: dict[str, Any]) -> None:
    """Writes tensors, sparse ones by their nonzeros; ``metadata`` is anything that JSON holds."""
    parts: dict[str, Tensor] = {}
    sparse: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        if name == "__metadata__" or name.endswith(_PARTS):
            raise ValueError(f"Expected other names than those that the file's format uses itself, got {name!r}.")
        if tensor.dtype not in _NAMES:
            raise TypeError(f"Expected a dtype of {', '.join(_DTYPES)} for {name!r}, got {tensor.dtype}.")
        if isinstance(tensor, Tensor) and (tensor.layout != torch.strided or tensor.is_meta):
            raise TypeError(
                f"Expected a dense tensor with values for {name!r}, got {tensor.layout} on {tensor.device}."
            )
        small = compact(tensor)
        if not isinstance(small, Compact):
            parts[name] = small.detach().cpu().resolve_neg().contiguous()
            continue
        parts[name + "#values"] = small.values
        if small.bitmask is not None:
            parts[name + "#bitmask"] = small.bitmask
        if small.indices is not None:
            parts[name + "#indices"] = small.indices
        sparse[name] = {"shape": list(small.shape)}
    header: dict[str, Any] = {}
    offset = 0
    blocks = []
    for name, tensor in parts.items():
        data: Any = tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else np.zeros(0, np.uint8)
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + data.nbytes],
        }
        blocks.append(data)
        offset += data.nbytes
    header["__metadata__"] = {
        "format": FORMAT,
        "sparse": json.dumps(sparse),
        "sha256": _NO_DIGEST.decode(),
        "content": json.dumps(metadata),
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    field = b'"sha256": "'  # a name may have as many zeros
    text = text.replace(field + _NO_DIGEST, field + _digest(text, blocks))
    # A file that is there is whole, also where several threads or processes write it.
    path = Path(os.path.realpath(path))  # a link stays one, and leads to the new file
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.part")
    try:
        with open(temporary, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for data in blocks:
                file.write(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Constant], dict[str, Any]]:
    """Tensors, in the form that the file has them in, and metadata of a file of :func:`write`; a plain safetensors file
    is read too.

    Raises:
        ValueError: for a file that is cut, damaged or of another kind: no bit of it can change unseen.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            return _parse(file, size)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, RuntimeError, MemoryError) as error:
            said = str(error) if isinstance(error, _DamagedError) else f"something else ({error!r:.200})"
            raise ValueError(
                f"{os.fspath(path)}: expected a whole safetensors file of this version, got {said}."
            ) from error


class _DamagedError(ValueError):
    pass


def _check(good: Any, what: str) -> None:
    if not good:
        raise _DamagedError(what)


def _parse(file: BinaryIO, size: int) -> tuple[dict[str, Constant], dict[str, Any]]:
    _check(size >= 8, "too few bytes")
    length = int.from_bytes(file.read(8), "little")
    _check(length <= min(size - 8, _MOST_HEADER), "a header that is longer than the file")
    text, body = file.read(length), size - 8 - length
    header = json.loads(text)
    metadata = header.pop("__metadata__", {})
    found = metadata.get("format", "")
    _check(found == FORMAT or "uasparse" not in found, f"one of format {found!r}, where this version writes {FORMAT!r}")
    # The tensors are read one by one into their places and are not looked at before their hash is known.
    told = metadata["sha256"].encode() if found == FORMAT or "sha256" in metadata else None
    digest = hashlib.sha256(text.replace(told, _NO_DIGEST) if told else text)
    parts: dict[str, Tensor] = {}
    expected = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (begin, end) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        _check(_are_sizes([*shape, begin, end]) and begin == expected and end <= body, f"odd offsets of {name!r}")
        _check(end - begin == math.prod(shape) * dtype.itemsize, f"a size of {name!r} that does not fit its shape")
        expected = end
        parts[name] = torch.empty(shape, dtype=dtype, device="cpu")
        if end > begin:
            data: Any = parts[name].view(-1).view(torch.uint8).numpy()
            _check(file.readinto(data) == end - begin, f"too few bytes of {name!r}")  # type: ignore[attr-defined]
            digest.update(data)
    _check(expected == body, "bytes that no tensor owns")
    _check(told is None or digest.hexdigest().encode() == told, "bytes that do not match their hash")
    tensors: dict[str, Constant] = {}
    for name, entry in json.loads(metadata.get("sparse", "{}")).items():
        shape = entry["shape"]
        _check(_are_sizes(shape) and name + "#values" in parts, f"no values of {name!r}")
        values = parts.pop(name + "#values")
        bitmask, indices = parts.pop(name + "#bitmask", None), parts.pop(name + "#indices", None)
        numel = math.prod(shape)
        if bitmask is not None:
            _check(bitmask.dtype == torch.uint8 and bitmask.numel() == -(-numel // 8),
                   f"a bitmask of {name!r} of another size")  # fmt: skip
            indices = None
        else:
            _check(indices is not None and numel <= 1 << 31, f"neither bitmask nor indices of {name!r}")
            assert indices is not None
            inside = bool((indices[1:] > indices[:-1]).all())
            inside &= not len(indices) or (int(indices[0]) >= 0 and int(indices[-1]) < numel)
            _check(inside, f"indices of {name!r} that do not ascend or fit")
        tensors[name] = Compact(tuple(shape), values, bitmask, indices)
        nonzeros = len(tensors[name].place())
        _check(nonzeros == values.numel(), f"{values.numel()} values for {nonzeros} nonzeros of {name!r}")
    tensors |= parts
    content = json.loads(metadata.get("content", "{}"))
    _check(isinstance(content, dict), "a content that is no object")
    return tensors, content


def _are_sizes(numbers: Any) -> bool:
    return isinstance(numbers, list) and len(numbers) <= 64 and all(type(n) is int and n >= 0 for n in numbers)


def _digest(text: bytes, blocks: Iterable[Any]) -> bytes:
    """The hash of header and tensors, the place of the hash itself left empty."""
    digest = hashlib.sha256(text)
    for block in blocks:
        digest.update(block)
    return digest.hexdigest().encode()


def save_sparse(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes a model's weights and buffers, sparse layers by their active values, without pickle.

    Layers are written as dense ones (their zeros cost a bit each), so that :func:`load_sparse` takes the file into
    sparse and dense models alike. Where active weights are exactly zero (just grown, or a delta that was not trained
    yet), their places are written too.

    Raises:
        TypeError: for what is no module, and a state that is no dense tensor, as a module's extra state may be.
        ValueError: for a model on the meta device, and names that the file's format uses itself.
    """
    state = _state(model)
    zeros: dict[str, Tensor] = {}
    for name, layer in _layers(model).items():
        places = layer.pattern.indices()[layer.pattern.pack(layer.unpacked_weight()) == 0]
        if layer.pattern.block == (1, 1) and places.numel():
            zeros[(f"{name}." if name else "") + "weight" + _ZEROS] = places
    write(path, as_dense_names(model, state) | zeros, {"kind": "state"})


def load_sparse(model: Model, path: str | os.PathLike[str]) -> Model:
    """Loads a file of :func:`save_sparse` (or any safetensors file) into a model of the same layers; returns the model.

    A sparse layer takes the file's nonzeros, and the active zeros that :func:`save_sparse` wrote, as its pattern where
    its block is 1x1, else it keeps its pattern, into which all nonzeros must fall.

    Raises:
        TypeError: for what is no module, and one whose state is not all tensors, as a module's extra state may be.
        ValueError: for a damaged file, or one of other names or shapes than the model's, and for a model on the meta
            device. The model is unchanged then.
    """
    own = _state(model)
    found, content = read(path)
    if content.get("kind") == "optimized":
        raise ValueError(f"{os.fspath(path)} holds an optimised model; load it with load_optimized().")
    everything = {name: dense(tensor) for name, tensor in found.items()}
    zeros = {name: everything.pop(name) for name in found if name.endswith(_ZEROS)}
    tensors = as_own_names(model, everything)
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or extra:
        raise ValueError(
            f"Expected the model's names; missing in the file: {missing[:5]}, not in the model: {extra[:5]}."
        )
    for name, tensor in own.items():
        if tensor.shape != tensors[name].shape:
            raise ValueError(f"Expected {name} of shape {tuple(tensor.shape)}, got {tuple(tensors[name].shape)}.")
    rest: dict[str, Tensor] = {}
    for name, layer in _layers(model).items():
        key = f"{name}.weight" if name else "weight"
        weight = layer.pattern_view(tensors.pop(key).to(layer.weight.device))
        if layer.pattern.block == (1, 1):
            mask = (weight != 0).contiguous()  # a transposed view otherwise, as of SparseTransposedLinear
            if (places := zeros.get(key + _ZEROS)) is not None:
                inside = places.dtype == torch.int64 and bool(((places >= 0) & (places < mask.numel())).all())
                if not inside:
                    raise ValueError(f"{key}: expected places of active zeros in the weight, got others.")
                mask.view(-1)[places.to(mask.device)] = True
            pattern = SparsityPattern.from_mask(mask)
        elif bool((weight[~layer.pattern.to_mask()] != 0).any()):
            raise ValueError(f"{key}: expected zeros outside the layer's blocks.")
        else:
            pattern = layer.pattern
        prefix = f"{name}." if name else ""
        rest |= {key: pattern.pack(weight), **pattern.state_dict(prefix=prefix + "pattern.")}
    model.load_state_dict(tensors | rest)
    return model


def _layers(model: nn.Module) -> dict[str, SparseLayer]:
    """By all their names, as in a state_dict."""
    named = model.named_modules(remove_duplicate=False)
    return {name: layer for name, layer in named if isinstance(layer, SparseLayer)}


def _state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state with dense weights and no patterns; refused where a file cannot hold all of it."""
    check_model(model)
    state = dict(model.state_dict())
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"Expected tensors as the model's state, got a {type(value).__name__} for {key!r}.")
        if value.is_meta:
            raise ValueError(f"Expected weights with values, got {key} on meta: call model.to_empty(device=...) first.")
        if key.endswith(_ZEROS):
            raise ValueError(f"Expected other names than those that the file's format uses itself, got {key!r}.")
    for name, layer in _layers(model).items():
        prefix = f"{name}." if name else ""
        for key in [key for key in state if key.startswith(prefix + "pattern.")]:
            del state[key]
        state[prefix + "weight"] = layer.dense_weight()
    return state


def graph_to_json(graph: Graph) -> dict[str, Any]:
    fields = {f.name: getattr(graph, f.name) for f in dataclasses.fields(graph) if f.name != "constants"}
    fields["nodes"] = [[n.name, n.target, _encode(n.args), _encode(n.kwargs)] for n in graph.nodes]
    fields["outputs"], fields["input_dtypes"] = _encode(graph.outputs), _encode(graph.input_dtypes)
    for name in ("in_spec", "out_spec"):
        try:
            fields[name] = pytree.treespec_dumps(fields[name])
        except NotImplementedError as error:
            raise TypeError(
                "The model takes or returns a structure that a file cannot hold; use tuples, lists and dictionaries. "
                f"{error}"
            ) from error
    return fields


def graph_from_json(fields: dict[str, Any], constants: dict[str, Constant]) -> Graph:
    """The graph. Raises ValueError (and what else Python makes of it) where it is none, or calls anything but ops."""
    fields = dict(fields)
    fields["nodes"] = [Node(n, t, _decode(a), _decode(k)) for n, t, a, k in fields["nodes"]]
    fields["outputs"], fields["input_dtypes"] = _decode(fields["outputs"]), _decode(fields["input_dtypes"])
    for name in ("in_spec", "out_spec"):
        fields[name] = pytree.treespec_loads(fields[name])
    graph = Graph(constants=constants, **fields)
    known = {*graph.inputs, *graph.constants}
    for node in graph.nodes:
        resolve(node.target)
        if node.target.startswith("control."):
            raise ValueError(f"{node.name} runs a graph that a file cannot hold")
        if unknown := set(node.refs()) - known:
            raise ValueError(f"{node.name} reads {sorted(unknown)}, which nothing makes")
        known.add(node.name)
    return graph


def _encode(value: Any) -> Any:
    if isinstance(value, Ref):
        return {"ref": value.name}
    if isinstance(value, list | tuple):
        return [_encode(v) for v in value]
    if isinstance(value, dict):
        return {"map": {k: _encode(v) for k, v in value.items()}}
    for kind in (torch.dtype, torch.memory_format, torch.layout):
        if isinstance(value, kind):
            return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    what = "torch's control flow (as torch.cond)" if isinstance(value, nn.Module) else f"a {type(value).__name__}"
    raise TypeError(f"The captured graph holds {what}, which a file cannot.")


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(v) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "ref":
        return Ref(inner)
    if kind == "map":
        return {k: _decode(v) for k, v in inner.items()}
    if kind == "device":
        return torch.device(inner)
    found = getattr(torch, inner) if kind == "torch" else None
    if not isinstance(found, torch.dtype | torch.memory_format | torch.layout):
        raise TypeError(f"unknown value {value}")
    return found
