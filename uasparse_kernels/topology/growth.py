"""The dense gradient of a sparse layer's weight, in tiles: what growth looks at, and what rarely exists as a whole."""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from uasparse_kernels import _library
from uasparse_kernels.nn.layers import SparseLayer
from uasparse_kernels.ops._common import transformed
from uasparse_kernels.topology.processes import is_sharded, local

# A tile's size in entries (4 MiB of float32 on the CPU, 64 MiB on a GPU): a small part of any layer that is worth it,
# large enough for a matmul.
_TILE_ENTRIES = 1 << 20
_GPU_TILES = 16

_keys = itertools.count()
_captures: weakref.WeakValueDictionary[int, GradientCapture] = weakref.WeakValueDictionary()

Pair = tuple[Tensor, Tensor]  # a layer's input and the gradient of its output


class _Pass(list[Pair]):
    """The pairs of a backward pass. Lists have no weak references."""


class _WeakHook:
    """A method as a hook of a weight that does not hold the object. The garbage collector does not look into the hooks
    that a tensor has, and would never free a cycle through them."""

    only_for_sparse_layers = True  # densify() leaves it behind

    def __init__(self, method: Callable[[Tensor], None]):
        self._method = weakref.WeakMethod(method)

    def __call__(self, weight: Tensor) -> None:
        if (method := self._method()) is not None:
            method(weight)


def tile_entries(device: torch.device) -> int:
    return _TILE_ENTRIES if device.type == "cpu" else _TILE_ENTRIES * _GPU_TILES


class GradientCapture:
    """Keeps, while armed, the inputs and output gradients that a layer's ``weight.grad`` came from, and computes the
    gradient of the whole weight from them.

    A forward hook keeps the input, a hook of the output pairs it with its gradient, and a hook of the weight, called
    when a backward pass has added to ``weight.grad``, confirms the pairs of that pass. Passes that do not add to it
    (``autograd.grad``, a frozen weight) leave nothing. Gradients that were set to None or to zero take the pairs that
    they came from with them: the pairs are those of what stands in ``weight.grad``. So micro-batches and layers used
    several times add up, and discarded batches, a generator's passes through a discriminator or the first pass of SAM
    do not count.

    With ``create_graph=True`` the gradient of a layer's input is a product with the weight, as the output is, and has a
    pair of its own: what flows back into it, and the output's gradient. So second derivatives (gradient penalties)
    count. Third ones would need further pairs, and do not, nor do passes inside of ``torch.func`` transforms and
    forward-mode AD.

    Confirmed pairs that take more memory than the dense gradient are folded into it, so that a layer never holds more
    than the larger of one pass and its dense gradient.

    Where fully_shard holds the layer, the weight is a whole one in a pass, whose gradient confirms the pairs, and that
    of the process's part comes later, or, without synchronisation, after further passes.

    In a graph of ``torch.compile``, which takes no hooks of tensors, an op in the backward pass hands over the pairs.

    It is a forward hook of the layer (``with_kwargs=True``); a copy or a pickle of the layer carries an idle one. Its
    owner may be collected, and everything be let go of, in the middle of any of its methods that hooks call.
    """

    only_for_sparse_layers = True  # densify() leaves it behind

    def __init__(self) -> None:
        self.armed = False
        self.ran = False  # whether the layer's forward was ever called, outside of compiled graphs
        self.removed = False
        self.pairs: list[Pair] = []  # confirmed
        self.mark = torch.tensor(next(_keys), device="cpu")  # names it in compiled graphs
        _captures[int(self.mark)] = self
        self._reset()

    def _reset(self) -> None:
        self._layer: SparseLayer | None = None
        self._weight: Tensor | None = None
        self._hooks: list[Any] = []
        self._hooked: Tensor | None = None
        # By running backward pass, not confirmed yet. The pass holds them: they go with one that fails.
        self._open: weakref.WeakValueDictionary[int, _Pass] = weakref.WeakValueDictionary()
        self._discarded = False  # whether a pass was
        self._unseen = False  # whether there was something that pairs may not show
        self._drop()

    def _drop(self) -> None:
        self.pairs.clear()
        self._dense: Tensor | None = None
        self._confirmed = False
        self._standing: tuple[int, int] | None = None  # weight.grad after it was last added to: address and version
        self._coming = False  # whether what was confirmed is still to be added to a sharded weight.grad

    def __deepcopy__(self, memo) -> GradientCapture:
        return GradientCapture()

    def __getstate__(self) -> dict:
        return {}

    def __setstate__(self, state: dict) -> None:
        self.__init__()  # type: ignore[misc]

    def arm(self, layer: SparseLayer) -> None:
        """Begins to keep what comes."""
        self.clear()
        self._layer, self._weight = layer, layer.weight
        self.armed = True

    def remove_from(self, layer: SparseLayer) -> None:
        """Ends it. Not to be called where torch may be in the middle of a loop over the layer's hooks."""
        self.clear()
        self.removed = True
        for key in [key for key, hook in layer._forward_hooks.items() if hook is self]:
            del layer._forward_hooks[key]
            layer._forward_hooks_with_kwargs.pop(key, None)

    def clear(self) -> None:
        """Lets go of everything and idles."""
        self.armed = False
        for hook in self._hooks:
            hook.remove()
        self._reset()

    @property
    def has_gradient(self) -> bool:
        """Whether what stands in ``weight.grad``, or was there for an optimiser that runs in the backward pass, is
        known."""
        taken = self._standing is None and not self._coming  # by a hook, in the pass itself
        return self._confirmed and self._weight is not None and (taken or self._weight.grad is not None)

    @property
    def grad_was_written(self) -> bool:
        """Whether anybody but backward passes wrote to ``weight.grad``."""
        return self._weight is not None and _place(self._weight.grad) != self._standing

    def __call__(
        self, module: SparseLayer, args: tuple, kwargs: dict[str, Any], output: Tensor | None = None
    ) -> Tensor | None:
        if output is None:  # removed since torch copied the list of hooks: it is called as one without kwargs
            return None
        if not torch.compiler.is_compiling():
            self.ran = True
            if self.removed:  # its owner is gone. torch calls hooks from a copy of their list
                self.remove_from(module)
        if not self.armed:
            return None
        input = args[0] if args else kwargs["input"]
        if torch.compiler.is_compiling() and _library.compiled is not None:
            if _library.is_exporting() or not (module.weight.requires_grad and output.requires_grad):
                return None
            return torch.ops.uasparse.watch(output, input.detach(), self.mark)
        self._watch(module, input, output)
        return None

    @torch._disable_dynamo  # what follows belongs to autograd: a compiled graph is cut here while armed
    def _watch(self, layer: SparseLayer, input: Tensor, output: Tensor) -> None:
        weight, mine = layer.weight, self._weight
        if mine is None or (weight is not mine and not is_sharded(mine)):
            return
        if transformed() is not None:
            self._unseen |= weight.requires_grad and torch.is_grad_enabled()
            return
        if not weight.requires_grad or not output.requires_grad:
            return
        first = next(iter(layer._forward_hooks.values()))
        self._unseen |= "forward" in vars(layer) or first is not self or bool(mine._backward_hooks)  # may change it
        if self._hooked is not weight:
            self._hooked = weight
            self._hooks.append(weight.register_post_accumulate_grad_hook(_WeakHook(self._confirm)))
            if weight is not mine:
                self._hooks.append(mine.register_post_accumulate_grad_hook(_WeakHook(self._stand)))
        # What is no result of a graph is somebody's own memory, which may hold the next batch before step() comes.
        kept = input.detach().clone() if input.is_leaf else input.detach()
        recorded: list[Tensor] = []  # the output's gradient in a pass that records a graph
        output.register_hook(partial(self._of_output, kept, recorded))
        if input.requires_grad:
            hook = input.register_hook(partial(self._of_input, recorded))
            if input.is_leaf:  # a learned input outlives the pass, and its hooks would add up
                self._hooks.append(hook)

    def pair_in_graph(self, input: Tensor, grad: Tensor) -> None:
        """What an op of a compiled backward pass saw, whose memory the compiler may use again."""
        weight = self._weight
        if weight is None:
            return
        if self._hooked is not weight:
            self._hooked = weight
            self._hooks.append(weight.register_post_accumulate_grad_hook(_WeakHook(self._confirm)))
        self._pair(input.clone(), grad)

    def _of_output(self, input: Tensor, recorded: list[Tensor], grad: Tensor) -> None:
        recorded[:] = [grad.detach()] if torch.is_grad_enabled() else []
        self._pair(input, grad)

    def _of_input(self, recorded: list[Tensor], grad: Tensor) -> None:
        """With ``create_graph=True`` the input's gradient is a product with the weight, as the output is: what flows
        back into it, of a gradient penalty, makes a pair with the output's gradient."""
        if self.armed and recorded and grad.requires_grad:
            grad.register_hook(partial(self._of_gradient, recorded.pop()))

    def _of_gradient(self, of_output: Tensor, of_grad: Tensor) -> None:
        self._unseen |= torch.is_grad_enabled()  # third derivatives
        self._pair(of_grad.detach().clone(), of_output)

    def _pair(self, input: Tensor, grad: Tensor) -> None:
        if not self.armed:
            return
        task = torch._C._current_graph_task_id()
        pairs = self._open.get(task)
        if pairs is None:
            self._forget_discarded()
            pairs = self._open[task] = _Pass()
            torch.autograd.Variable._execution_engine.queue_callback(pairs.clear)
        self.ran = True
        pairs.append((input, grad.detach().clone()))  # it may be the caller's own: output.backward(grad)

    def _forget_discarded(self) -> None:
        """Before a pass: pairs whose gradient was let go do not count any more."""
        weight, layer = self._weight, self._layer
        if not self._confirmed or self._coming or weight is None or layer is None:
            return
        grad = weight.grad
        if grad is None or (_is_zeroed(grad) and (_place(grad) != self._standing or self._was_zeroed(weight, layer))):
            self._drop()
            self._discarded = True

    def _was_zeroed(self, weight: Tensor, layer: SparseLayer) -> bool:
        """Whether a gradient of zeros is not what the passes gave. What ``.data`` writes leaves no version."""
        return not is_sharded(weight) and self.is_withheld(layer)

    @torch.no_grad()
    def _confirm(self, weight: Tensor) -> None:
        pairs = self._open.get(torch._C._current_graph_task_id())
        layer = self._layer
        if layer is None or not pairs:
            return
        self.pairs += pairs
        pairs.clear()
        self._confirmed = True
        if weight is self._weight:
            self._stand(weight)
        else:
            self._coming = True
        held = sum(tensor.numel() * tensor.element_size() for pair in self.pairs for tensor in pair)
        if self._dense is not None or held > math.prod(layer.pattern.shape) * _dtype(layer).itemsize:
            dense = [tile for _, tile in self.tiles(layer)]
            self._dense = torch.cat(dense) if len(dense) > 1 else dense[0]
            self.pairs.clear()

    def is_withheld(self, layer: SparseLayer) -> bool:
        """Whether ``weight.grad``, which is zero, is not what the passes gave: hooks of the weight withhold it."""
        mask = layer.pattern.to_mask()
        return any(bool(tile[mask[first : first + len(tile)]].any()) for first, tile in self.tiles(layer))

    @torch.no_grad()
    def lacks_passes(self, layer: SparseLayer) -> bool:
        """Whether ``weight.grad`` came from more than the known passes: there was something that they may not show, or
        one was discarded and ``.grad`` written later; and it points elsewhere than what is known (scaled or clipped it
        would not)."""
        grad = layer.weight.grad
        if grad is None or is_sharded(grad) or not (self._unseen or (self._discarded and self.grad_was_written)):
            return False
        written = (grad if layer.storage == "dense" else layer.pattern.unpack(grad)).to(_dtype(layer))
        mask = layer.pattern.to_mask()
        sums = written.new_zeros(3)
        for first, tile in self.tiles(layer):
            rows = slice(first, first + len(tile))
            a, b = tile[mask[rows]], written[rows][mask[rows]]
            sums += torch.stack([a @ b, a @ a, b @ b])
        both, known, given = sums.tolist()
        return both < 0.99 * math.sqrt(known * given)

    def _stand(self, weight: Tensor) -> None:
        self._standing, self._coming = _place(weight.grad), False

    def tiles(self, layer: SparseLayer, group=None) -> Iterator[tuple[int, Tensor]]:
        """Tiles of the dense gradient: ``(first row, gradient [rows, ...])``, ascending, whole rows of blocks each.

        Args:
            group: a process group over which each tile is summed.
        """
        shape = layer.pattern.shape
        rows_of_blocks = max(1, tile_entries(layer.weight.device) // math.prod(shape[1:]) // layer.pattern.block[0])
        rows = rows_of_blocks * layer.pattern.block[0]
        for first in range(0, shape[0], rows):
            last = min(first + rows, shape[0])
            dense = self._dense
            if dense is None:
                tile = torch.zeros((last - first, *shape[1:]), dtype=_dtype(layer), device=layer.weight.device)
            else:
                tile = dense[first:last].clone()
            for input, grad in self.pairs:
                common = torch.promote_types(input.dtype, grad.dtype)
                tile += layer.weight_gradient(input.to(common), grad.to(common), first, last)
            if group is not None:
                torch.distributed.all_reduce(tile, group=group)
            yield first, tile


def _dtype(layer: SparseLayer) -> torch.dtype:
    return torch.promote_types(layer.weight.dtype, torch.float32)


def _place(grad: Tensor | None) -> tuple[int, int] | None:
    return None if grad is None else (local(grad).data_ptr(), local(grad)._version)


def _is_zeroed(grad: Tensor) -> bool:
    here = local(grad)
    return here.numel() > 0 and not bool(here.any())


def _capture(mark: Tensor, input: Tensor, grad_output: Tensor) -> None:
    capture = _captures.get(int(mark))
    if capture is not None:
        capture.pair_in_graph(input, grad_output)


_library.implement("capture_", _capture)


@_library.register_fake("capture_")
def _fake(mark, input, grad_output):
    return None
