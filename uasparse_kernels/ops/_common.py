"""What the ops share: the choice of a kernel, the dense form of a weight, checks of their arguments."""

from __future__ import annotations

import contextlib
import operator
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from uasparse_kernels import _library
from uasparse_kernels.pattern import SparsityPattern


class Choice(NamedTuple):
    """The kernel that serves a call, and why it was picked."""

    kernel: str
    reason: str


Listener = Callable[[str, Choice], None]


class _OfThread(threading.local):
    """What a thread asked for. Others, autograd's own included, neither hear nor obey it."""

    forced: str | None = None
    listeners: tuple[Listener, ...] = ()


_of_thread = _OfThread()
_asking = 0  # how many forced() and listening() are open in all threads: while none is, a call looks no further
_asking_lock = threading.Lock()


def announce(op: str, choice: Choice) -> str:
    """Tells the thread's listeners of a choice; returns its kernel."""
    return _announce(op, choice) if _asking else choice.kernel


def _announce(op: str, choice: Choice) -> str:
    if _of_thread.forced is not None:
        choice = Choice(_of_thread.forced, "forced")
    for listener in _of_thread.listeners:
        listener(op, choice)
    return choice.kernel


@contextlib.contextmanager
def forced(kernel: str) -> Iterator[None]:
    """Every call of this thread is served by ``kernel``, whatever would be chosen: for measurements and tests."""
    before = _of_thread.forced
    with _ask():
        _of_thread.forced = kernel
        try:
            yield
        finally:
            _of_thread.forced = before


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """``listener`` is called with op and choice at every call of an op in this thread: how explain() learns of them."""
    before = _of_thread.listeners
    with _ask():
        _of_thread.listeners = (*before, listener)
        try:
            yield
        finally:
            _of_thread.listeners = before


@contextlib.contextmanager
def _ask() -> Iterator[None]:
    global _asking
    with _asking_lock:
        _asking += 1
    try:
        yield
    finally:
        with _asking_lock:
            _asking -= 1


def pattern_tensors(pattern: SparsityPattern) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``crow, col, ccol, row, perm``, once it is sure that the weight belongs to them."""
    return pattern.tensors()


class _MaskedGradient(torch.autograd.Function):
    """The identity on a weight that is kept masked; its gradient is masked."""

    @staticmethod
    def forward(ctx, weight, pattern):
        ctx.save_for_backward(pattern.crow, pattern.col)
        ctx.block, ctx.mask = pattern.block, pattern.kept_mask(weight)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad):
        index = ctx.saved_tensors
        # The gradient is fresh from the vendor's kernel: it is masked in place, unless a graph is recorded through it,
        # or it is a batch of gradients.
        apart = torch.is_grad_enabled() or torch.compiler.is_compiling() or _is_batched(grad)
        if _library.has_kernel("keep_active_", grad) and not apart:
            if ctx.mask is not None and grad.is_contiguous():
                torch.ops.uasparse.mask_(grad, ctx.mask)
            else:
                torch.ops.uasparse.keep_active_(grad, *index, ctx.block)
            return grad, None
        values = torch.ops.uasparse.pack(grad, *index, ctx.block)
        return torch.ops.uasparse.unpack(values, *index, grad.shape, ctx.block), None


def _is_batched(grad: Tensor) -> bool:
    """Whether it stands for many: of ``is_grads_batched=True``, or of vmap."""
    functorch = torch._C._functorch
    return functorch.is_legacy_batchedtensor(grad) or functorch.is_functorch_wrapped_tensor(grad)


def dense_form(weight: Tensor, pattern: SparsityPattern, weight_is_masked: bool = False) -> Tensor:
    """The weight as a dense tensor for a vendor's kernel, zero outside of the pattern; the gradient comes back masked,
    in the weight's storage."""
    if pattern.is_packed(weight):
        return pattern.unpack(weight)
    if pattern.density == 1:
        return weight
    if not weight_is_masked:
        return pattern.unpack(pattern.pack(weight))
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        return weight
    return _MaskedGradient.apply(weight, pattern)


def packed_form(weight: Tensor, pattern: SparsityPattern) -> Tensor:
    """The weight as packed values for a block kernel; the gradient comes back in the weight's storage."""
    return weight if pattern.is_packed(weight) else pattern.pack(weight)


def reference_weight(weight: Tensor, pattern: SparsityPattern) -> Tensor:
    """The dense, masked weight in plain torch: for packed storage by indexing, for dense storage by the mask."""
    if not pattern.is_packed(weight):
        return torch.where(pattern.to_mask(), weight, 0)
    flat = weight.new_zeros(pattern.to_mask().numel())
    return flat.index_put((pattern.indices().view(-1),), weight.reshape(-1)).view(pattern.shape)


def transformed() -> Choice | None:
    """Inside a ``torch.func`` transform or forward-mode AD the reference serves: it has every derivative and batch
    rule, and a compiled op that has none would drop a tangent."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return Choice("reference", "inside a torch.func transform or forward-mode AD")
    return None


def surely(condition: Any) -> bool:
    """Of sizes, inside ``torch.compile``: whether it holds for all that a graph serves. To ask a symbol itself would
    make a graph for each answer, and a free batch of an export a constant."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # slow to import

    return statically_known_true(condition)


def autocast(*tensors: Any) -> Any:
    """The tensors in the dtype of torch.autocast where it is on, as torch casts them for its own matmul."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )


def as_pair(value: Any) -> tuple[int, int]:
    """A number (numpy's, too), or a sequence of one or two, for height and width."""
    if isinstance(value, int):
        return value, value
    if not isinstance(value, tuple | list):
        value = tuple(value) if isinstance(value, Iterable) else (operator.index(value),)
    if len(value) not in (1, 2):
        raise ValueError(f"Expected one number or two, for height and width, got {value}.")
    return value[0], value[-1]


def check_are_tensors(op: str, **given: Any) -> None:
    """Raises TypeError for what is no tensor, before anything is asked of it."""
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: expected {name} to be a tensor, got {type(value).__name__}.")


def check_sparse_product(op: str, input: Tensor, weight: Tensor, pattern: SparsityPattern) -> None:
    """Raises TypeError for what is no dense tensor, or no pattern."""
    check_are_tensors(op, input=input, weight=weight)
    if not isinstance(pattern, SparsityPattern):
        raise TypeError(
            f"{op}: expected a SparsityPattern, got {type(pattern).__name__}; SparsityPattern.from_mask makes one of "
            "a mask."
        )
    if input.layout is not torch.strided or input.is_nested:
        raise TypeError(
            f"{op}: expected a dense (strided) input, got a nested or sparse tensor; pad it, or make it dense."
        )


def check_layer_arguments(
    op: str, input: Tensor, weight: Tensor, pattern: SparsityPattern, bias: Tensor | None
) -> bool:
    """Whether the weight is packed. Raises where input, weight, pattern and bias differ in dtype or device, or weight
    or bias have a wrong shape."""
    packed, dtype, device = pattern.is_packed(weight), input.dtype, input.device
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype != dtype:
            raise TypeError(f"{op}: expected input and {name} of one dtype, got {dtype} and {tensor.dtype}.")
        if tensor.device != device:
            raise ValueError(f"{op}: expected input and {name} on one device, got {device} and {tensor.device}.")
    if not input.is_floating_point():
        raise TypeError(f"{op}: expected a floating-point input, got {input.dtype}.")
    if pattern.device != device:
        raise ValueError(
            f"{op}: expected input and pattern on one device, got {device} and {pattern.device}; "
            f"move the pattern with pattern.to({str(device)!r})."
        )
    if bias is not None and tuple(bias.shape) != pattern.shape[:1]:
        raise ValueError(f"{op}: expected a bias of shape {pattern.shape[:1]}, got {tuple(bias.shape)}.")
    return packed


@torch.no_grad()
def replace_data_(tensor: Tensor, data: Tensor) -> None:
    """Gives a leaf tensor data of another size; the object stays. Autograd is made to forget the old size."""
    # A graph of an earlier step may live on (in the loss that a loop keeps) and with it the node that accumulates the
    # gradient, made for the old size. Assigning data drops it only where the dtype changes: so it does, for a moment.
    tensor.data = tensor.new_empty(0, dtype=torch.float32 if tensor.dtype == torch.float64 else torch.float64)
    tensor.data = data
    torch.autograd.graph.increment_version(tensor)
