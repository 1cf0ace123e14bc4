"""What the sparse layers share. Each is a drop-in one: the arguments of the dense layer, then pattern and storage."""

from __future__ import annotations

import copy
import math
import sys
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Proxy

from uasparse_kernels._grid import check_sparsity
from uasparse_kernels._library import constant_when_compiled
from uasparse_kernels.nn.registry import make_dense
from uasparse_kernels.ops._common import replace_data_
from uasparse_kernels.ops._cpu import crossover, wide
from uasparse_kernels.ops._cuda import is_packed_by_default
from uasparse_kernels.pattern import SparsityPattern

_NO_PARAMETRIZATION = (
    "A sparse layer's weight cannot be parametrised (spectral_norm, weight_norm, orthogonal): it would take "
    "a packed weight for a vector, and train entries of a dense-stored one outside the pattern. Leave the layer dense "
    "(sparsify(..., exempt=[...])), or call densify(model) first."
)
_NO_EXPORT = (
    "{}: use uasparse_kernels.densify(copy.deepcopy(model)) instead. On a CPU, "
    "uasparse_kernels.optimize_for_inference(model, x) runs the sparse model fast, and its package() without Python."
)


@constant_when_compiled
def _is_in_onnx_export() -> bool:
    return torch.onnx.is_in_onnx_export()  # Dynamo, the exporter's second try, takes it for False


def as_leaf(module: nn.Module, input: Proxy) -> Any:
    """Under ``torch.fx`` symbolic tracing: a call of the module as a whole, as of torch's own layers."""
    tracer: Any = input.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (input,), {})


# By layer, what is told when a state_dict has brought it another pattern, with the blocks that were active before: how
# optimiser state follows. Not in the layer, so that copies of it have none.
told_of_patterns: weakref.WeakKeyDictionary[SparseLayer, weakref.WeakMethod] = weakref.WeakKeyDictionary()


# By id of a weight, the layer that took it last.
_holders: weakref.WeakValueDictionary[int, SparseLayer] = weakref.WeakValueDictionary()


class SparseLayer(nn.Module):
    """What the sparse layers share: a weight with a pattern, in packed or dense storage.

    ``weight`` is a parameter of ``pattern.packed_shape`` (packed: gradient and optimiser state are packed too) or of
    ``pattern.shape`` (dense-stored: gradients are masked, and anything else written outside the pattern becomes zero at
    the next forward pass). Initial values are scaled to each output's own fan-in (see :meth:`reset_parameters`).

    Whatever was done to its tensors, a forward pass uses the masked weight or refuses: see ``SparsityPattern``.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    pattern: SparsityPattern
    dense_class: type[nn.Module]  # what it was made of, and becomes again
    _own: int | None = None  # id of the weight; functional_call and fully_shard put others in its place for a while
    # Of it, where it is dense-stored and known to be masked: version, address; and by which state of which pattern.
    _clean: tuple[int, ...] | None = None
    _watched = 0  # how often hooks that watch its gradient came

    def _init_weight(
        self,
        shape: tuple[int, ...],
        bias: bool,
        device: Any,
        dtype: torch.dtype | None,
        sparsity: float | None,
        pattern: SparsityPattern | None,
        block: Sequence[int],
        storage: str,
    ) -> None:
        self.pattern = _resolve_pattern(shape, sparsity, pattern, block).to(device or torch.get_default_device())
        packed = resolve_storage(storage, self.pattern, dtype) == "packed"
        size = self.pattern.packed_shape if packed else self.pattern.shape
        self.weight = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(shape[0], device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws weight and bias as the dense layer does, the weight for each output's own fan-in.

        That is uniform within ``1 / sqrt(fan_in)``, the fan-in of a weight being the number of inputs that its output
        has, of a bias the dense one. Source: Evci et al., "Gradient Flow in Sparse Neural Networks", arXiv 2010.03533.
        """
        fan_in = math.prod(self.pattern.shape[1:])
        bound = 1 / math.sqrt(fan_in) if fan_in else 0.0
        self.weight.uniform_(-bound, bound)
        if self.storage == "dense":
            self.pattern.mask_(self.weight)
        self.scale_to_fan_in_()
        if self.bias is not None:
            self.bias.uniform_(-bound, bound)

    @torch.no_grad()
    def scale_to_fan_in_(self) -> None:
        """Multiplies each output's weights by ``sqrt(inputs / inputs that it has)``.

        Values drawn for the dense layer then give outputs of the dense layer's variance, whatever the pattern.
        """
        if self.weight.is_meta:
            return
        counts = self.pattern.crow.diff().to(torch.int64)
        scale = (self.pattern.grid[1] / counts.clamp(min=1)).sqrt_().to(self.weight.dtype)
        if self.storage == "packed":
            scale = scale.repeat_interleave(counts, output_size=self.pattern.num_blocks)
        else:
            scale = scale.repeat_interleave(self.pattern.block[0])
        self.weight.mul_(scale.view(-1, *[1] * (self.weight.dim() - 1)))

    @property
    def storage(self) -> str:
        """ "packed" or "dense"."""
        return "packed" if self.pattern.is_packed(self.weight) else "dense"

    @staticmethod
    def pattern_view(weight: Tensor) -> Tensor:
        """A dense layer's weight in the pattern's shape."""
        return weight

    @staticmethod
    def dense_view(weight: Tensor) -> Tensor:
        """A tensor of the pattern's shape in that of the dense layer's weight."""
        return weight

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """Of the dense layer's weight."""
        return tuple(self.dense_view(torch.empty(self.pattern.shape, device="meta")).shape)

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """A copy of the weight as the dense layer has it, zeros at inactive entries.

        Raises:
            RuntimeError: if the weight came with another pattern (see ``SparsityPattern``).
        """
        return self.dense_view(self.unpacked_weight())

    @torch.no_grad()
    def unpacked_weight(self) -> Tensor:
        """:meth:`dense_weight`, but of ``pattern.shape``."""
        self.pattern.tensors()
        return self.pattern.unpack(self.weight if self.storage == "packed" else self.pattern.pack(self.weight))

    @torch.no_grad()
    def set_dense_weight(self, dense: Tensor) -> None:
        """Takes the active entries of a weight as the dense layer has it."""
        if tuple(dense.shape) != self.dense_shape:
            raise ValueError(f"Expected a dense tensor of shape {self.dense_shape}, got {tuple(dense.shape)}.")
        values = self.pattern.pack(self.pattern_view(dense.to(self.weight)))
        self.weight.copy_(values if self.storage == "packed" else self.pattern.unpack(values))

    def weight_gradient(self, input: Tensor, grad_output: Tensor, first: int, last: int) -> Tensor:
        """Rows ``[first, last)`` of the gradient of the dense weight, of ``[last - first, *pattern.shape[1:]]``, of a
        call with ``input`` whose output has the gradient ``grad_output``."""
        raise NotImplementedError

    def _own_tensors(self) -> tuple[Tensor, SparsityPattern, Tensor | None, bool]:
        """Weight, pattern, bias, and whether a dense-stored weight is masked: what a forward pass takes.

        All of a dense-stored weight is looked at where its version says that somebody wrote to it, a sample of it
        otherwise, for some ways to write (``.data``) leave the version as it is.
        """
        # Not as attributes, which nn.Module looks up slowly.
        pattern: Any = self._modules["pattern"]
        weight, bias = self._parameters.get("weight"), self._parameters.get("bias")
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            self._refuse_export()
            assert self._watched >= 0  # read: torch.compile looks at no hooks, but compiles anew when this has changed
            return self.weight, pattern, self.bias, False  # in a graph the op masks a copy
        if bias is None:
            bias = self.bias  # none, or not registered as a parameter
        if weight is None:
            return self._unregistered_weight(), pattern, bias, False
        if id(weight) != self._own:
            self._refuse_anothers(weight)
        if weight.dim() == len(pattern.shape):
            return weight, pattern, bias, self._mask_weight(weight, pattern)
        return weight, pattern, bias, False

    def _mask_weight(self, weight: Tensor, pattern: SparsityPattern) -> bool:
        if not (isinstance(weight, nn.Parameter) and weight.is_leaf):
            return False  # somebody's own tensor, which is not ours to change
        if weight.is_meta or weight.shape != pattern.shape or weight.device != pattern.device:
            return False  # nothing to mask, or an error to come
        if torch._C._functorch.is_functorch_wrapped_tensor(weight) or isinstance(weight, FakeTensor):
            return False
        if hasattr(weight, "device_mesh"):  # a part of a sharded one, between forward passes
            return False
        state = None
        if id(weight) == self._own and not weight.is_inference():
            state = (weight._version, weight.data_ptr(), id(pattern), pattern.changes)
        unwritten = state is not None and state == self._clean
        on_gpu = weight.device.type != "cpu"
        # On a GPU looking would wait: it is masked, or trusted.
        if not (unwritten if on_gpu else pattern.is_masked(weight, sampled=unwritten)):
            pattern.mask_(weight)
        self._clean = state
        return True

    def _unregistered_weight(self) -> Tensor:
        """The weight where it is no parameter of the layer: a view into FSDP's, or what a hook made."""
        if any(hasattr(self, name) for name in ("weight_g", "weight_u")):  # torch.nn.utils.weight_norm, spectral_norm
            raise RuntimeError(_NO_PARAMETRIZATION)
        return self.weight

    def _refuse_export(self) -> None:
        if _is_in_onnx_export():
            raise RuntimeError(_NO_EXPORT.format("ONNX has no operator for a sparse layer"))

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight" and param is not None:
            self._refuse_anothers(param)
        super().register_parameter(name, param)
        if name == "weight":
            self._take_weight()

    def _take_weight(self) -> None:
        self._own, self._clean = None, None
        if (weight := self._parameters.get("weight")) is not None:
            self._own, _holders[id(weight)] = id(weight), self

    def _refuse_anothers(self, weight: Tensor) -> None:
        """Raises ValueError for the weight of a layer of another pattern: ``b.weight = a.weight``, and that in
        ``functional_call(b, dict(a.named_parameters()), ...)``."""
        other = _holders.get(id(weight), self)
        if other is not self and other._parameters.get("weight") is weight and not other.pattern.equal(self.pattern):
            self.pattern.tensors()  # says so where its signature came along
            raise ValueError(
                "Expected a weight of this layer's own, or of a layer of the same pattern, got that of a layer of "
                "another one: packed values would stand for other places, and each layer would zero dense-stored ones "
                "that the other has. Make both with the same pattern=, or call one layer at both places."
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._take_weight()

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._take_weight()  # on the meta device, and back, it is another parameter
        return self

    def __delattr__(self, name: str) -> None:
        # torch.nn.utils.parametrize takes the parameter away before it puts its own in place: nothing has changed yet.
        if name == "weight" and sys._getframe(1).f_globals.get("__name__") == "torch.nn.utils.parametrize":
            raise RuntimeError(_NO_PARAMETRIZATION)
        super().__delattr__(name)

    def __deepcopy__(self, memo: dict) -> nn.Module:
        # torch.nn.utils.fusion folds a batch norm into a copy of a layer, whose weight it reads as a matrix.
        if sys._getframe(2).f_globals.get("__name__") == "torch.nn.utils.fusion":
            return self.to_dense()
        copied = self.__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__dict__, memo))
        return copied

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError(_NO_EXPORT.format("torch.jit.script cannot compile a sparse layer"))

    @torch.no_grad()
    def to_dense(self, cls: Any = None) -> Any:
        """A dense layer with the same weights (copied), zeros at inactive entries.

        Args:
            cls: its class, which has the arguments of the built-in one (or is it); None for that of which the sparse
                layer was made.
        """
        if cls is None:
            return make_dense(self)
        module: Any = self._empty_dense({"device": self.weight.device, "dtype": self.weight.dtype})
        if not issubclass(cls, type(module)):
            raise TypeError(f"Expected a subclass of {type(module).__name__}, got {cls.__name__}.")
        module.__class__ = cls
        module.weight.copy_(self.dense_weight())
        _copy_rest(self, module)
        return module

    def _empty_dense(self, options: dict[str, Any]) -> nn.Module:
        """The built-in dense layer, with any values."""
        raise NotImplementedError

    def _sparsity_repr(self) -> str:
        structure = "unstructured" if self.pattern.block == (1, 1) else "blocks {}x{}".format(*self.pattern.block)
        return f"density={self.pattern.density:.4g}, {structure}, storage={self.storage}, device={self.weight.device}"

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        self._own_tensors()  # masked
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = destination.get(prefix + "weight")
        # As a dense layer's checkpoint has it, unless that would be read as packed: all blocks of some Conv1d.
        if weight is not None and weight.shape == self.pattern.shape and self.dense_shape != self.pattern.packed_shape:
            destination[prefix + "weight"] = self.dense_view(weight)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        """Takes a packed or a dense weight, with this or another pattern, or a dense layer's checkpoint (no pattern).

        The weight is brought into this layer's storage. What does not fit, packed values without their pattern, and a
        pattern without values are errors and leave the layer as it is.
        """
        own = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        assign = local_metadata.get("assign_to_params_buffers", False)
        try:
            loaded = self._read_state(own, prefix, assign)
        except (ValueError, TypeError) as error:
            errors.append(f"{prefix.rstrip('.') or type(self).__name__}: {error}")
            loaded, own = None, self.state_dict(prefix=prefix, keep_vars=True) | {prefix + "weight": self.weight}
        before = None
        if loaded is not None:
            pattern, weight = loaded
            if not self.weight.is_meta and not (self.pattern.device == pattern.device and self.pattern.equal(pattern)):
                before = self.pattern.blocks()
                self.weight.grad = None  # of other places
            self.pattern.become_(pattern)
            if assign:  # the layer takes the checkpoint's device and dtype
                if self.pattern.device != weight.device:
                    self.pattern.to_empty(device=weight.device)
                self.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
            elif weight.shape != self.weight.shape:
                # Another number of active weights: the parameter keeps its identity and takes the new size.
                replace_data_(self.weight, weight.new_empty(weight.shape, dtype=self.weight.dtype))
            own[prefix + "weight"] = self.weight if assign else weight
        # What the submodule will find: a dense checkpoint has no pattern, and a bad one is not taken.
        extra = {key: value for key, value in own.items() if key.startswith(prefix + "pattern.")}
        state_dict.update(extra | self.pattern.state_dict(prefix=prefix + "pattern."))
        super()._load_from_state_dict(own, prefix, local_metadata, strict, missing, unexpected, errors)
        if before is not None and (reference := told_of_patterns.get(self)) and (tell := reference()):
            tell(self, before)

    def _read_state(self, own: dict[str, Any], prefix: str, assign: bool) -> tuple[SparsityPattern, Tensor] | None:
        """Pattern and weight of a state_dict, the weight in this layer's storage; None where it has neither."""
        weight, bias = own.get(prefix + "weight"), own.get(prefix + "bias")
        has_pattern = any(key.startswith(prefix + "pattern.") for key in own)
        if weight is None and not has_pattern:
            return None
        if not isinstance(weight, Tensor):
            raise ValueError(
                f"Expected a weight with its pattern, got {prefix}pattern.* and a weight of {type(weight)}."
            )
        if bias is not None and self.bias is not None and bias.shape != self.bias.shape:
            raise ValueError(f"Expected a bias of shape {tuple(self.bias.shape)}, got {tuple(bias.shape)}.")
        target = weight.device if assign or self.weight.is_meta else self.weight.device
        if has_pattern:
            pattern = SparsityPattern.from_state_dict(own, prefix + "pattern.")
            self.pattern.check_fits(pattern)
        else:
            if weight.shape == self.pattern.packed_shape != self.dense_shape:
                names = ", ".join(f"{prefix}pattern.{name}" for name in ("layout", "crow", "col"))
                raise ValueError(f"Expected packed values with their pattern, got them without {names}.")
            pattern = copy.deepcopy(self.pattern)
        is_packed = has_pattern and weight.shape == pattern.packed_shape
        if not is_packed and not (weight.shape == pattern.shape and self.dense_shape == pattern.packed_shape):
            if tuple(weight.shape) != self.dense_shape:
                raise ValueError(
                    f"Expected a weight of shape {self.dense_shape} (dense-stored) or {pattern.packed_shape} (packed), "
                    f"got {tuple(weight.shape)}."
                )
            weight = self.pattern_view(weight)
        if not has_pattern:
            _warn_of_lost_weights(weight, pattern)
        pattern = pattern.to(target) if pattern.device.type != "meta" else pattern.to_empty(device=target)
        weight = weight.detach().to(target)
        values = weight if pattern.is_packed(weight) else pattern.pack(weight)
        # By dimensions: a weight that is shared may have its new size already, by another layer.
        return pattern, pattern.unpack(values) if self.weight.dim() == len(pattern.shape) else values


def from_dense(module, build, **sparse):
    layer = build(device=module.weight.device, dtype=module.weight.dtype, **sparse)
    layer.set_dense_weight(module.weight)
    if sparse["pattern"] is None:
        layer.scale_to_fan_in_()
    _copy_rest(module, layer)
    return layer


@torch.no_grad()
def _copy_rest(source: Any, target: Any) -> None:
    """Bias, requires_grad and the training flag."""
    if source.bias is not None:
        target.bias.copy_(source.bias)
        target.bias.requires_grad_(source.bias.requires_grad)
    target.weight.requires_grad_(source.weight.requires_grad)
    target.train(source.training)


def _warn_of_lost_weights(weight: Tensor, pattern: SparsityPattern) -> None:
    """Says once that a dense checkpoint has weights that a layer's pattern has no place for."""
    if weight.is_meta or weight.shape != pattern.shape or pattern.device.type == "meta":
        return
    outside = weight.detach().masked_fill(pattern.to_mask().to(weight.device), 0)
    if bool(outside.any()):  # the same words for every layer, so that Python shows them once
        warnings.warn(
            "A dense checkpoint was loaded into sparse layers whose patterns were made before: weights outside of them "
            "are dropped, however large. To keep the largest, load it into the dense model, then call sparsify(model, "
            'sparsity, keep="magnitude") (or scores=).',
            stacklevel=2,
        )


def _resolve_pattern(shape, sparsity, pattern, block) -> SparsityPattern:
    if (sparsity is None) == (pattern is None):
        raise ValueError("Expected one of sparsity= and pattern=, got " + ("none." if pattern is None else "both."))
    if pattern is None:
        check_sparsity(sparsity)
        return SparsityPattern.random(shape, 1 - sparsity, block=block)
    if not isinstance(pattern, SparsityPattern):
        raise TypeError(
            f"Expected a SparsityPattern as pattern, got a {type(pattern).__name__}: SparsityPattern.from_mask(mask) "
            "makes one."
        )
    if pattern.shape != tuple(shape):
        raise ValueError(f"Expected a pattern of shape {tuple(shape)}, got {pattern.shape}.")
    crow, col, *_ = pattern._held  # with values on the meta device, too
    return SparsityPattern(pattern.shape, crow.clone(), col.clone(), block=pattern.block)


def resolve_storage(storage: str, pattern: SparsityPattern, dtype: torch.dtype | None) -> str:
    """ "packed" or "dense", of an option that may be "auto"."""
    if storage not in ("auto", "packed", "dense"):
        raise ValueError(f'Expected storage "auto", "packed" or "dense", got {storage!r}.')
    if storage != "auto":
        return storage
    op = "masked_linear" if len(pattern.shape) == 2 else "masked_conv2d"
    if pattern.device.type == "cuda":
        return "packed" if is_packed_by_default(op, pattern) else "dense"
    structure = "1x1" if pattern.block == (1, 1) else "blocks"
    limit, _ = crossover(op, dtype or torch.get_default_dtype(), structure, wide(pattern.shape))
    return "packed" if pattern.density <= limit else "dense"
