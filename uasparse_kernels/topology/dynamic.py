"""Dynamic sparsity: prune-and-grow of a model's sparse layers while it trains."""

from __future__ import annotations

import copy
import math
import re
import weakref
from collections.abc import Sequence
from dataclasses import asdict, fields, is_dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from uasparse_kernels._model import check_model
from uasparse_kernels.nn.layers import SparseLayer
from uasparse_kernels.ops.prune_grow import apply, resize
from uasparse_kernels.topology.checks import check_method, check_owned, check_patterns, check_same_layers, why_unowned
from uasparse_kernels.topology.growth import GradientCapture
from uasparse_kernels.topology.methods import MEST, METHODS, LayerUpdate, Method, NOfM, Update
from uasparse_kernels.topology.notices import Notices
from uasparse_kernels.topology.processes import (
    broadcast,
    find_group,
    gathered,
    is_sharded,
    largest,
    local,
    make_alike,
    whole,
)
from uasparse_kernels.topology.schedule import CosineSchedule
from uasparse_kernels.topology.states import LoadWatch, OptimizerStates, State, start_grown

_OWNERS: weakref.WeakKeyDictionary[SparseLayer, weakref.ref[DynamicSparsity]] = weakref.WeakKeyDictionary()


class DynamicSparsity:
    """Changes which weights of a model are active, every ``delta_t`` optimiser steps.

    Call :meth:`step` once per optimiser step (not per micro-batch), after ``loss.backward()`` and before the gradients
    are zeroed. On an update step the method decides, for all layers at once, what they drop and grow. Weights,
    gradients in flight and every optimiser state tensor of the weight's shape are changed in place. Entries that were
    inactive start at zero, with the state of an optimiser's first step; those that are dropped and grown at the same
    update keep value and state. Most methods grow as many blocks as they drop,
    ``ceil(fraction * blocks)`` per layer, so that no size ever changes, and leave fully dense layers alone. Gradual
    pruning (and SRigL's ablation) changes the number of active weights: packed weights and their states then change
    their sizes, and the parameters stay the same objects.

    Called after ``optimizer.step()``, the update comes on top of the optimiser step. The authors of RigL and MOON let
    it replace the optimiser step: ``if not topology.step(): optimizer.step()``.

    **What an update changes.** Layers whose weight does not require gradients, or that the optimiser holds at a rate of
    0, stay as they are, bit for bit, and do not count where scores are compared over all layers (``scope="global"``,
    GraNet). The same holds, with a method that uses gradients, for layers without a gradient at this step, or whose
    gradient a hook of the weight sets to zero; SET and GMP need none. What cannot be done correctly (a weight that the
    optimiser does not hold, state that cannot move, or of an optimiser that was not given, copies of weights that an
    optimiser keeps outside of its state, a sharded or parametrised weight, a weight or pattern that layers share,
    sparse layers that came or went since) is an error before anything changes.

    **Growth by gradient** uses exactly the backward passes that the weights' ``.grad`` came from. Micro-batches add up;
    passes that left nothing in ``.grad`` (zeroed since, ``autograd.grad``, a frozen weight) do not count. Before an
    update step, a layer's inputs and output gradients are kept until :meth:`step`, and the dense gradient exists one
    tile at a time. If they would take more memory than the dense gradient, that is summed instead.

    **Mixed precision.** An update waits for a step at which the gradients of all layers and processes are finite. Call
    step() at every step, also when a GradScaler skips its own, and after the gradients are unscaled (MEST compares them
    with the weights)::

        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        topology.step()  # or, before it:  if not topology.step(): scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    **Several processes.** The DistributedDataParallel that holds the weights is found, whether the model is the
    wrapper, is inside it or contains it. At the start, patterns and weights are made equal on all processes. At an
    update, gradients are summed over the processes before the selection, and random draws are those of the first
    process, so that all end with the same pattern. DDP's buckets have fixed sizes: a method that changes the number of
    active weights needs ``storage="dense"``. With ``fully_shard`` (FSDP2, a mesh of one dimension) make DynamicSparsity
    after sharding. Values, gradients and optimiser state stay sharded, and an update gathers one layer at a time. All
    processes must start with the same patterns.

    A model has one DynamicSparsity: making another detaches the first. :meth:`detach` ends one.

    Args:
        model: holds the sparse layers.
        optimizer: its state tensors of a weight's shape move with the weight; several as a sequence. Optimisers inside
            a wrapper (ZeroRedundancyOptimizer, Lookahead, those of Accelerate and Lightning) are found.
        method: "rigl", "set", "mest", "gmp", "granet", "srigl", "N:M" (such as "2:4"), "static" (never changes
            anything), or a :class:`topology.Method`, such as ``topology.GraNet(final_sparsity=0.95)``.
        total_steps: optimiser steps of the whole training.
        delta_t: steps between updates.
        drop_fraction: share of active weights replaced at first; it falls to 0 by a cosine.
        stop_fraction: share of the training after which the topology is frozen.
        generator: CPU generator of random growth; by default one seeded from torch's.
        process_group: of the processes that train this model, where no DistributedDataParallel tells. False: the
            processes train models of their own.

    Raises:
        TypeError: for what is no module, no optimizer or no method.
        ValueError: for an unknown method, arguments out of range, a model without sparse layers, patterns that the
            method cannot keep to (SRigL, N:M), weights that cannot be updated (of FullyShardedDataParallel, of tensor
            parallelism, parametrised), an optimiser that does not hold the weights or cannot follow them (LBFGS; on
            weights of two or more dimensions Muon, Shampoo, Adafactor and their like), and several processes of which
            it is not known how they train together.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        *,
        method: str | Method = "rigl",
        total_steps: int,
        delta_t: int = 100,
        drop_fraction: float = 0.3,
        stop_fraction: float = 0.75,
        generator: torch.Generator | None = None,
        process_group: Any | Literal[False] | None = None,
    ):
        check_model(model)
        self.schedule = CosineSchedule(total_steps, delta_t, drop_fraction, stop_fraction)
        self.method = resolve_method(method)
        self.layers = {name: module for name, module in model.named_modules() if isinstance(module, SparseLayer)}
        self._model = weakref.ref(model)
        if not self.layers:
            raise ValueError(
                "Expected a model with sparse layers, got none; call sparsify(model, sparsity) first (for gradual "
                "pruning from a dense model, sparsify(model, 0.0, include_dense=True))."
            )
        self.optimizer = optimizer
        self._states = OptimizerStates(optimizer)
        self._checked: dict[str, int] = {}  # what is known to suit the method: states of patterns
        if self.method is not None or all(why_unowned(layer) is None for layer in self.layers.values()):
            check_owned(self.layers, self._states, changes=self.method is not None)
        weights = [layer.weight for layer in self.layers.values()]
        self.group = find_group(model, weights, process_group, needed=self.method is not None)
        if self.method is not None:
            self._states.check_can_move(self.layers)
            check_patterns(self.method, self.layers, self._checked)
            check_method(self.method, self.layers, self.schedule, in_processes=self.group is not None)
        self._states.warn_of_decay(self.layers)
        if generator is None:
            generator = torch.Generator()
            generator.manual_seed(int(torch.randint(2**62, (), device="cpu")))
        self.generator = generator
        self.steps = 0
        self._postponed = 0  # the step whose update waits for finite gradients
        self._states_seen = self.method is None
        if self.group is not None:
            make_alike(self.layers, self.group)
        self.initial_blocks = {name: layer.pattern.num_blocks for name, layer in self.layers.items()}
        self._attach()
        self._notices = Notices(0 if self.method is None else self._watch.steps)
        self._arm()

    def __repr__(self) -> str:
        weights = sum(math.prod(layer.pattern.shape) for layer in self.layers.values())
        active = sum(layer.pattern.nnz for layer in self.layers.values())
        state = f"detached: {self._detached}" if self._detached else "frozen" if self.frozen else "moving"
        return (
            f"DynamicSparsity({_say(self.method)}, {_in_words(asdict(self.schedule))}, step={self.steps}, {state}, "
            f"{len(self.layers)} sparse layers of sparsity {1 - active / max(1, weights):.2%})"
        )

    @property
    def frozen(self) -> bool:
        """Whether no further update comes: weights may be averaged from here on."""
        return self.method is None or (self.schedule.is_over(self.steps) and not self._postponed)

    @torch.no_grad()
    def step(self) -> bool:
        """Counts an optimiser step, and updates the topology if that is due. Returns whether anything was updated.

        Raises:
            RuntimeError, ValueError: if the update cannot be done right. Nothing is changed then, and the step not
                counted.
        """
        if self._detached:
            raise RuntimeError(f"This DynamicSparsity is no longer attached to its model: {self._detached}.")
        if not self._states_seen:  # once: those of a checkpoint may lie outside of the pattern
            self._states.mask(self.layers)
            self._states_seen = True
        if self.method is not None:
            self._notices.count_call(self._watch.steps)
            self._watch.given.clear()  # what is written from here on is an update
        step = self.steps + 1
        due = step if self.method is not None and self.schedule.is_update(step) else self._postponed
        updated = self._update(due) if due else False
        self._postponed = due if updated is None else 0
        self.steps = step
        self._arm()
        return bool(updated)

    def detach(self) -> None:
        """Removes the hooks from the model and the optimiser, which are as without it then."""
        self._detach("detach() was called")

    def __deepcopy__(self, memo: dict[int, Any]) -> DynamicSparsity:
        """A detached one: hooks are of the layers and the optimiser that they were made for."""
        copied = self.__new__(type(self))
        memo[id(self)] = copied
        hooks = ("_captures", "_watch", "_finalizer")
        vars(copied).update(copy.deepcopy({key: v for key, v in vars(self).items() if key not in hooks}, memo))
        copied._captures = {}
        if self.method is not None:
            copied._detached = "it is a copy; make one of copies of model and optimizer, and load its state_dict()"
        return copied

    def state_dict(self) -> dict[str, Any]:
        """The step, the generator, the sizes at first, and what was asked for; patterns and weights are in the model's
        state_dict."""
        state = {"steps": self.steps, "postponed": self._postponed, "generator": self.generator.get_state()}
        schedule = asdict(self.schedule)
        return state | {"initial_blocks": dict(self.initial_blocks), "method": _say(self.method), "schedule": schedule}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a state of :meth:`state_dict`, bit for bit with model and optimiser restored as well.

        Raises:
            ValueError: if the state is of another method, schedule or set of layers.
        """
        mine, differences = self.state_dict(), []
        for key in ("method", "schedule"):
            if state.get(key, mine[key]) != mine[key]:
                differences.append(f"{key} {_in_words(state[key])} there, {_in_words(mine[key])} here")
        blocks = {_plain(name): count for name, count in state["initial_blocks"].items()}
        names = {_plain(name): name for name in self.layers}
        for where, missing in (
            ("only there", blocks.keys() - names.keys()),
            ("only here", names.keys() - blocks.keys()),
        ):
            if missing:
                differences.append(f"sparse layers {where}: {', '.join(sorted(missing))}")
        if differences:
            raise ValueError(
                f"Expected the state of a training with these settings, got {'; '.join(differences)}. Resume with the "
                "settings there (total_steps= of a framework's callback too). To train on with others, restore model "
                "and optimizer, and start a new DynamicSparsity without this state."
            )
        self.generator.set_state(state["generator"].cpu())
        self.initial_blocks = {names[name]: count for name, count in blocks.items()}
        self.steps, self._postponed = state["steps"], state.get("postponed", 0)
        self._notices.forget_calls()
        self._arm()

    # ---- hooks ----

    def _attach(self) -> None:
        for layer in self.layers.values():
            owner = _OWNERS.get(layer)
            if owner is not None and (other := owner()) is not None:
                other._detach("another DynamicSparsity was made for the same layers")
            for hook in [h for h in layer._forward_hooks.values() if isinstance(h, GradientCapture)]:
                hook.remove_from(layer)  # of a copied model
        self._detached, self._armed = "", False
        self._captures: dict[str, GradientCapture] = {}
        if self.method is None:
            return
        for name, layer in self.layers.items():
            self._captures[name] = GradientCapture()
            layer.register_forward_hook(self._captures[name], prepend=True, with_kwargs=True)
            _OWNERS[layer] = weakref.ref(self)
            layer._watched += 1
        self._watch = LoadWatch(self.layers, self._states)
        # The hooks know nothing of this object. They idle when it is gone, and captures go when next called: garbage
        # is collected anywhere, in the middle of torch's loops over hooks too. Nor does what waits for its end hold
        # anything: layers and optimisers may hold this object.
        self._finalizer = weakref.finalize(self, _forget, [weakref.ref(c) for c in self._captures.values()])
        self._finalizer.atexit = False

    def _detach(self, reason: str) -> None:
        self._detached = reason
        if self._captures and self._finalizer.detach():
            for name, layer in self.layers.items():
                self._captures[name].remove_from(layer)
            self._watch.remove()

    def _arm(self) -> None:
        method, armed = self.method, False
        if method is not None and method.needs_gradient:
            armed = bool(self._postponed) or self.schedule.is_update(self.steps + 1)
        if armed or self._armed:
            for name, capture in self._captures.items():
                if armed:
                    capture.arm(self.layers[name])
                else:
                    capture.clear()
        self._armed = armed

    # ---- the update ----

    def _update(self, due: int) -> bool | None:
        """The update that was due at a step. Returns whether anything changed, None if it has to wait."""
        assert self.method is not None
        names, states = self._ready()
        if names is None:
            return None
        self._notices.extra_calls()
        if self.method.final_sparsity is not None and self.schedule.progress(due) == 1:
            self._notices.unfinished({n: layer for n, layer in self.layers.items() if n not in names})
        if not names:
            return False
        if self.method.needs_gradient and self.group is None:
            self._notices.unseen([(self.layers[name], self._captures[name]) for name in names])
        *_, last = self.layers.values()
        updates = []
        for name in names:
            layer = self.layers[name]
            tiles = partial(self._captures[name].tiles, layer, self.group) if self.method.needs_gradient else _no_tiles
            kind = _ShardedUpdate if is_sharded(layer.weight) else LayerUpdate
            updates.append(
                kind(
                    layer.weight.detach(),
                    layer.weight.grad,
                    layer.pattern,
                    self.initial_blocks[name],
                    tiles,
                    last=layer is last,
                )
            )
        update = Update(updates, self.schedule.fraction(due), self.schedule.progress(due), self.generator)
        changes = self.method.update(update)
        # Everything is decided before anything changes.
        self._states.mask({name: self.layers[name] for name in names})
        for name, (dropped, grown) in zip(names, changes, strict=True):
            layer = self.layers[name]
            moving = [layer.weight, *(state.tensor for state in states[name])]
            if layer.weight.grad is not None:
                moving.append(layer.weight.grad)
            if layer.storage == "packed":  # what others keep with the values, such as AdaHessian's weight.hess
                kept = [t for t in vars(layer.weight).values() if isinstance(t, Tensor)]
                moving += [t for t in kept if t.shape == layer.weight.shape and t.device == layer.weight.device]
            change = apply if dropped.numel() == grown.numel() else resize
            grown = broadcast(grown, self.group) if self.group is not None else grown
            with whole(moving) as (weight, *others):
                change(weight, layer.pattern, dropped, grown, others, reset_regrown=self.method.reset_regrown)
            start_grown(states[name])
            self._checked[name] = layer.pattern.changes
        self._notices.lost(self.layers, self.steps + 1)
        return True

    def _ready(self) -> tuple[list[str] | None, dict[str, list[State]]]:
        """The layers that can be updated now (None: later) with their optimiser states, the same in every process."""
        method = self.method
        assert method is not None
        refused, states = None, {}
        rests = self._states.at_rest()
        weights = {name: layer.weight for name, layer in self.layers.items()}
        training = {name for name, weight in weights.items() if weight.requires_grad and id(weight) not in rests}
        try:
            check_same_layers(self.layers, self._model())
            check_owned(self.layers, self._states, changes=True)
            check_patterns(method, self.layers, self._checked)
            self._watch.check_nobody_else()
            states = {name: self._states.of(name, weight) for name, weight in weights.items() if name in training}
        except ValueError as error:
            refused = error
        device = next(iter(self.layers.values())).pattern.device
        norms = self._gradient_norms(training)
        facts = [int(refused is not None), int(not all(map(math.isfinite, norms.values())))]
        for name, layer in self.layers.items():
            seen = self._gradient_seen(name, norms)
            no_grad = name not in training or layer.weight.grad is None
            facts += [name not in training, seen, no_grad, refused is None and self._is_misread(name, norms, seen)]
        one_failed, not_finite, *by_layer = largest([int(fact) for fact in facts], device, self.group)
        if one_failed:
            raise refused or ValueError("Another process cannot update its topology; its error says why.")
        if not_finite:
            self._notices.postponed("gradients are not finite")
            return None, states
        table = {name: tuple(by_layer[4 * i : 4 * i + 4]) for i, name in enumerate(self.layers)}
        trained = {name: row for name, row in table.items() if not row[0]}
        if method.needs_gradient and trained and not any(seen == 2 for _, seen, _, _ in trained.values()):
            if any(seen for _, seen, _, _ in trained.values()):
                self._notices.postponed("all gradients are zero")
                return None, states
            raise RuntimeError(
                "Expected a backward pass through the sparse layers since the last step() (growth by gradient uses "
                "it), got none whose gradients are in their .grad; call step() after loss.backward() and before "
                "zero_grad(), once per optimiser step."
            )
        misread = [name for name, (_, seen, _, wrong) in trained.items() if wrong and not seen]
        if misread:
            raise RuntimeError(
                f"The weights of {', '.join(misread)} have gradients, but their layers were never called: the model "
                "reads .weight as a matrix, so that neither the pattern nor its growth reach them. Leave these layers "
                f"dense: sparsify(..., exempt={misread})."
            )
        self._end_of_first_interval()
        reads_grad = isinstance(method, MEST)
        if reads_grad and trained and all(absent for _, _, absent, _ in trained.values()):
            raise RuntimeError("MEST: expected gradients at the update, got none; call step() before zero_grad().")
        ready = []
        for name, (_, seen, absent, _) in trained.items():
            left_alone = bool((method.needs_gradient and seen < 2) or (reads_grad and absent))
            if not left_alone and (method.resizes or self.layers[name].pattern.density < 1):
                ready.append(name)
        return ready, states

    def _gradient_norms(self, training: set[str]) -> dict[str, float]:
        """Largest magnitude of the gradient of every weight in training that has one; one wait for a GPU."""
        grads = {
            name: local(layer.weight.grad)
            for name, layer in self.layers.items()
            if name in training and layer.weight.grad is not None and layer.weight.numel()
        }
        if not grads:
            return {}
        device = next(iter(grads.values())).device
        norms = [
            torch.linalg.vector_norm(grad, math.inf).to(device, torch.float64)
            if grad.numel()
            else torch.zeros((), dtype=torch.float64, device=device)  # no part of a sharded one
            for grad in grads.values()
        ]
        return dict(zip(grads, torch.stack(norms).tolist(), strict=True))

    def _gradient_seen(self, name: str, norms: dict[str, float]) -> int:
        """2 where the dense gradient of ``.grad`` is known, 1 where it is but ``.grad`` was zeroed, afterwards or by a
        hook of the weight, else 0."""
        capture = self._captures[name]
        if not capture.has_gradient:
            return 0
        if norms.get(name) != 0:
            return 2
        return 1 if capture.grad_was_written or capture.is_withheld(self.layers[name]) else 2

    def _is_misread(self, name: str, norms: dict[str, float], seen: int) -> bool:
        """Whether a weight has a gradient that did not come through its layer."""
        layer = self.layers[name]
        if seen or self._captures[name].ran or not norms.get(name) or self._captures[name].removed:
            return False
        assert self.method is not None
        if self.method.needs_gradient:
            return True
        # Hooks may not show in a compiled graph. But the layer itself masks the gradient of a dense-stored weight.
        if layer.pattern.is_packed(layer.weight) or is_sharded(layer.weight):
            return False
        grad = layer.weight.grad
        assert grad is not None
        return bool(grad.masked_fill(layer.pattern.to_mask(), 0).any())

    def _end_of_first_interval(self) -> None:
        """Methods that read no gradients need no hooks but to know that the layers are called."""
        assert self.method is not None
        if not self.method.needs_gradient:
            for name, layer in self.layers.items():
                self._captures[name].remove_from(layer)


def owner_of(layer: SparseLayer) -> DynamicSparsity | None:
    """What changes a layer's pattern as it trains."""
    reference = _OWNERS.get(layer)
    owner = reference() if reference is not None else None
    return None if owner is None or owner._detached else owner


class _ShardedUpdate(LayerUpdate):
    """A layer whose values are sharded: they are gathered when a method asks, so that those of one layer at a time
    are here."""

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        return gathered(value) if name in ("weight", "gradient") and value is not None else value


def _forget(captures: list[weakref.ref[GradientCapture]]) -> None:
    for reference in captures:
        if (capture := reference()) is not None:
            capture.clear()
            capture.removed = True


def _no_tiles() -> Any:
    raise RuntimeError("A method that reads gradient tiles must say so: needs_gradient = True.")


def _plain(name: str) -> str:
    """A layer's name without those of wrappers."""
    return ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))


def _in_words(setting: Any) -> str:
    """A method or a schedule of a state."""
    return ", ".join(f"{k}={v}" for k, v in setting.items()) if isinstance(setting, dict) else str(setting)


def _say(part: Any) -> Any:
    """A method in words that two runs share, without addresses."""
    if part is None or isinstance(part, bool | int | float | str):
        return "static" if part is None else part
    if is_dataclass(part):
        values = {f.name: getattr(part, f.name) for f in fields(part)}
        said = ", ".join(f"{key}={'None' if value is None else _say(value)}" for key, value in values.items())
        return f"{type(part).__name__}({said})"
    return getattr(part, "__qualname__", type(part).__name__)


def resolve_method(method: str | Method) -> Method | None:
    """The method of a name; None for "static"."""
    if isinstance(method, Method):
        return method
    if not isinstance(method, str):
        found = f"the class {method.__name__}: make one" if isinstance(method, type) else f"a {type(method).__name__}"
        raise TypeError(f"Expected a method by its name or a topology.Method, such as topology.RigL(), got {found}.")
    if method == "static":
        return None
    if re.fullmatch(r"\d+:\d+", method):
        return NOfM.of(method)
    if method not in METHODS:
        raise ValueError(
            f'Expected a method of {", ".join(["static", *METHODS])} or "N:M" (such as "2:4"), got {method!r}; for '
            "settings of its own pass a topology.Method, such as topology.GMP(final_sparsity=0.8)."
        )
    return METHODS[method]()
