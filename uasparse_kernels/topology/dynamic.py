"""Dynamic sparsity: prune-and-grow of a model's sparse layers while it trains."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from uasparse_kernels.nn.layers import SparseLayer
from uasparse_kernels.ops.prune_grow import apply, resize
from uasparse_kernels.topology.growth import GradientCapture
from uasparse_kernels.topology.methods import METHODS, LayerUpdate, Method, NOfM, Update
from uasparse_kernels.topology.schedule import CosineSchedule

logger = logging.getLogger("uasparse_kernels")


class DynamicSparsity:
    """Changes which weights of a model are active, every ``delta_t`` optimiser steps.

    Call :meth:`step` once an optimiser step, after ``loss.backward()`` and before the gradients are zeroed. On an
    update step the method decides for all layers at once what they drop and grow; weights, gradients in flight and
    every optimiser state tensor of the weight's shape move along in place. Entries that were inactive start at zero;
    those that are dropped and grown at the same update stay as they are. Most methods
    grow as many blocks as they drop, ``ceil(fraction * blocks)`` a layer, so that no size ever changes, and leave fully
    dense layers alone. Gradual pruning (and SRigL's ablation) changes the number of active weights: packed weights and
    their states take new sizes then, parameters keeping their identity. Growth by gradient sees every backward pass
    since the last step, so gradient accumulation needs nothing; the dense gradient exists only a tile at a time (the
    layer's inputs and output gradients of an update step are kept until :meth:`step`).

    ``step`` after ``optimizer.step()`` makes the update an addition to the optimiser step. The authors of RigL and MOON
    have it replace the optimiser step: ``if not topology.step(): optimizer.step()``.

    Under DistributedDataParallel pass the wrapped model: gradients are summed over its processes before the selection
    and random draws are the first process's, so that all end with the same pattern. Give DDP
    ``broadcast_buffers=False`` to spare it sending the patterns at every step. Its buckets have fixed sizes: a method
    that changes the number of active weights needs ``storage="dense"``.

    Args:
        model: holds the sparse layers.
        optimizer: its state tensors of a weight's shape move with the weight.
        method: "rigl", "set", "mest", "gmp", "granet", "srigl", "N:M" (such as "2:4"), "static" (never changes
            anything), or a :class:`topology.Method`, such as ``topology.GraNet(final_sparsity=0.95)``.
        total_steps: optimiser steps of the whole training.
        delta_t: steps between updates.
        drop_fraction: share of active weights replaced at first; it falls to 0 by a cosine.
        stop_fraction: share of the training after which the topology is frozen.
        generator: CPU generator of random growth; by default one seeded from torch's.

    Raises:
        ValueError: for an unknown method, arguments out of range, a model without sparse layers, or patterns that the
            method cannot keep to (SRigL, N:M).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        method: str | Method = "rigl",
        total_steps: int,
        delta_t: int = 100,
        drop_fraction: float = 0.3,
        stop_fraction: float = 0.75,
        generator: torch.Generator | None = None,
    ):
        self.schedule = CosineSchedule(total_steps, delta_t, drop_fraction, stop_fraction)
        self.method = resolve_method(method)
        self.optimizer = optimizer
        self.group = model.process_group if isinstance(model, DistributedDataParallel) else None
        self.layers = {name: module for name, module in model.named_modules() if isinstance(module, SparseLayer)}
        if not self.layers:
            raise ValueError("Expected a model with sparse layers, got none; call sparsify(model, sparsity) first.")
        if self.method is not None:
            self._check_method(self.method)
        if generator is None:
            generator = torch.Generator()
            generator.manual_seed(int(torch.randint(2**62, ())))
        self.generator = generator
        self.steps = 0
        self.initial_blocks = {name: layer.pattern.num_blocks for name, layer in self.layers.items()}
        # DDP makes the weights alike at its construction, but the patterns only with broadcast_buffers=True.
        for layer in self.layers.values():
            for tensor in layer.pattern.buffers():
                self._agree(tensor)
        self._captures: dict[str, GradientCapture] = {}
        if self.method is not None and self.method.needs_gradient:
            for name, layer in self.layers.items():
                self._captures[name] = GradientCapture()
                layer.register_forward_hook(self._captures[name])
        self._arm()

    @property
    def frozen(self) -> bool:
        """Whether no further update comes: weights may be averaged from here on."""
        return self.method is None or self.schedule.is_over(self.steps)

    @torch.no_grad()
    def step(self) -> bool:
        """Counts an optimiser step, and updates the topology if one is due. Returns whether it was."""
        self.steps += 1
        due = self.method is not None and self.schedule.is_update(self.steps)
        if due:
            self._update(self.schedule.fraction(self.steps))
        self._arm()
        return due

    def state_dict(self) -> dict[str, Any]:
        """The step, the generator and the sizes at first; patterns and weights are in the model's state_dict."""
        state = {"steps": self.steps, "generator": self.generator.get_state()}
        return state | {"initial_blocks": dict(self.initial_blocks)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a state of :meth:`state_dict`, bit for bit with model and optimiser restored as well."""
        self.generator.set_state(state["generator"].cpu())
        self.initial_blocks = dict(state["initial_blocks"])
        self.steps = state["steps"]
        self._arm()

    def _arm(self) -> None:
        armed = self.method is not None and self.schedule.is_update(self.steps + 1)
        for capture in self._captures.values():
            capture.clear()
            capture.armed = armed

    def _update(self, fraction: float) -> None:
        assert self.method is not None
        if self._captures and not any(capture.pairs for capture in self._captures.values()):
            raise RuntimeError(
                "Expected a backward pass through the sparse layers since the last step() (growth by gradient looks at "
                "it), got none; call step() after loss.backward(), once an optimiser step."
            )
        names, updates = [], []
        *_, last = self.layers.values()
        for name, layer in self.layers.items():
            capture = self._captures.get(name)
            idle = capture is not None and not capture.pairs and self.group is None
            if idle or (layer.pattern.density == 1 and not self.method.resizes):
                continue
            names.append(name)
            updates.append(
                LayerUpdate(
                    layer.weight.detach(),
                    layer.weight.grad,
                    layer.pattern,
                    self.initial_blocks[name],
                    partial(capture.tiles, layer, self.group) if capture is not None else _no_tiles,
                    last=layer is last,
                )
            )
        if not updates:
            return
        progress = self.schedule.progress(self.steps)
        changes = self.method.update(Update(updates, fraction, progress, self.generator))
        # Everything is decided before anything changes.
        for name, (dropped, grown) in zip(names, changes, strict=True):
            layer = self.layers[name]
            change = apply if dropped.numel() == grown.numel() else resize
            states, reset = self._states(layer.weight), self.method.reset_regrown
            change(layer.weight, layer.pattern, dropped, self._agree(grown), states, reset_regrown=reset)

    def _check_method(self, method: Method) -> None:
        for name, layer in self.layers.items():
            try:
                method.check(layer.pattern)
            except ValueError as error:
                raise ValueError(f"{name or type(layer).__name__}: {error}") from error
            if method.resizes and self.group is not None and layer.storage == "packed":
                raise ValueError(
                    f"{name}: expected dense storage under DistributedDataParallel, whose buckets have fixed sizes, "
                    'for a method that changes the number of active weights; call sparsify(..., storage="dense").'
                )
        if method.scope == "global" and len({layer.pattern.block for layer in self.layers.values()}) > 1:
            raise ValueError('Expected one block size in all layers for scope "global", whose norms it compares.')
        if method.final_sparsity is not None and self.schedule.is_over(0):
            raise ValueError(
                f"Expected an update every {self.schedule.delta_t} steps before step {self.schedule.end}, got none: "
                "gradual pruning would never begin; give a smaller delta_t."
            )

    def _agree(self, tensor: Tensor) -> Tensor:
        """Takes over the first process's tensor, in place, where there are several."""
        if self.group is not None:
            torch.distributed.broadcast(tensor, torch.distributed.get_global_rank(self.group, 0), group=self.group)
        return tensor

    def _states(self, weight: nn.Parameter) -> list[Tensor]:
        """Tensors that belong to the weight entry by entry: optimiser state, and a gradient in flight."""
        tensors = [t for t in self.optimizer.state.get(weight, {}).values() if isinstance(t, Tensor)]
        if weight.grad is not None:
            tensors.append(weight.grad)
        return [t for t in tensors if t.shape == weight.shape]


def _no_tiles() -> Any:
    raise RuntimeError("A method that reads gradient tiles must say so: needs_gradient = True.")


def resolve_method(method: str | Method) -> Method | None:
    """The method of a name; None for "static"."""
    if not isinstance(method, str):
        return method
    if method == "static":
        return None
    if ":" in method:
        return NOfM.of(method)
    if method not in METHODS:
        raise ValueError(f"Expected a method of {['static', *METHODS, 'N:M']}, got {method!r}.")
    return METHODS[method]()
