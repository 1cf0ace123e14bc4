"""Optimiser state that belongs to sparse weights entry by entry: what can move with them, and what cannot."""

from __future__ import annotations

import functools
import logging
import re
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from uasparse_kernels.nn.layers import SparseLayer, told_of_patterns
from uasparse_kernels.ops._common import replace_data_
from uasparse_kernels.pattern import SparsityPattern
from uasparse_kernels.topology.processes import is_sharded, local, whole

logger = logging.getLogger("uasparse_kernels")

# Optimisers whose update of an entry depends on other entries, or that cannot serve at all, and the way out.
_FIRST_ORDER = "use one that treats each weight by itself (SGD, Adam, AdamW, RMSprop, ...)"
_REFUSED = {
    "LBFGS": f"its curvature history mixes all weights, and cannot follow them to other places; {_FIRST_ORDER}",
    "SparseAdam": f"it needs sparse gradients; {_FIRST_ORDER}",
}
# By parts of class names: those that orthogonalise, precondition or factor a weight of two or more dimensions. Of a
# packed one of 1x1 blocks, which has one, they treat each entry by itself (or refuse it, or have state that of() does).
_MATRIX_WISE = re.compile("Muon|Shampoo|SOAP|KFAC|Kron|Adafactor|CAME|SM3")
# State of a grown entry where it is not zero, by optimiser class: as at its first step.
_START: dict[str, dict[str, Callable[[dict[str, Any]], float]]] = {
    "Rprop": {"step_size": lambda group: float(group["lr"])},
    "Adagrad": {"sum": lambda group: float(group.get("initial_accumulator_value", 0.0))},
}


# How often each optimiser of the process has stepped since there was a DynamicSparsity. By identity: they may be equal,
# or have no hash.
_steps = WeakIdKeyDictionary()


def _count(optimizer: Any, args: Any, kwargs: Any) -> None:
    if not torch.compiler.is_compiling():
        _steps[optimizer] = _steps.get(optimizer, 0) + 1


def _stepped() -> list[Any]:
    return [optimizer for reference in _steps.keyrefs() if (optimizer := reference()) is not None]


@functools.cache
def _count_steps_of_all() -> None:
    """One hook, which stays: garbage is collected anywhere, and one that went with its owner could go in the middle of
    torch's loop over hooks, which ends in an error then."""
    register_optimizer_step_post_hook(_count)


class State(NamedTuple):
    """A tensor of the weight's shape that moves with it, and the value of a grown entry."""

    tensor: Tensor
    start: float = 0.0


class OptimizerStates:
    """The optimisers of a model's sparse weights, those that others wrap included, and what they hold of each weight.

    Raises:
        TypeError: for something that is no optimiser.
    """

    def __init__(self, optimizers: Any):
        given = list(optimizers) if isinstance(optimizers, list | tuple) else [optimizers]
        self.optimizers: list[Any] = []
        self.together: list[list[Any]] = []  # by what was given: it, and what it wraps
        self._given = given
        for optimizer in given:
            found = [o for o in _with_wrapped(optimizer, set()) if isinstance(o.state, Mapping)]
            if not found:
                raise TypeError(
                    f"Expected an optimizer with param_groups and state, or several, got {type(optimizer).__name__}."
                )
            self.optimizers += found
            self.together.append(found)

    def check_holds(self, layers: Mapping[str, SparseLayer]) -> None:
        """Raises ValueError if a weight that requires gradients is in no param group."""
        held = {id(p) for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]}
        missing = [n for n, layer in layers.items() if layer.weight.requires_grad and id(layer.weight) not in held]
        if missing:
            raise ValueError(
                f"The optimizer does not hold the weights of {_names(missing)}: they would never be trained, or their "
                "state would not move with them. Make it after sparsify(), of model.parameters(); pass all optimizers "
                "where there are several; requires_grad_(False) leaves a layer as it is."
            )

    def places(self, optimizer: Any) -> set[int]:
        """Where in ``together`` it is."""
        return {i for i, optimizers in enumerate(self.together) if any(o is optimizer for o in optimizers)}

    def held(self, layers: Mapping[str, SparseLayer], place: int) -> dict[str, SparseLayer]:
        """The layers whose weights are in the param groups of ``together[place]``."""
        groups = (group for optimizer in self.together[place] for group in optimizer.param_groups)
        ids = {id(p) for group in groups for p in group["params"]}
        return {name: layer for name, layer in layers.items() if id(layer.weight) in ids}

    def at_rest(self) -> set[int]:
        """Ids of the parameters that are held at a rate of 0 only."""
        rates: dict[int, bool] = {}
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            rate = group.get("lr")
            rests = isinstance(rate, int | float | Tensor) and float(rate) == 0
            for p in group["params"]:
                rates[id(p)] = rests and rates.get(id(p), True)
        return {key for key, rests in rates.items() if rests}

    def check_can_move(self, layers: Mapping[str, SparseLayer]) -> None:
        """Raises ValueError for optimisers that are known not to go with weights that move."""
        for name, layer in layers.items():
            for optimizer in self._holders(layer.weight):
                kinds = _kinds(optimizer)
                reasons = [reason for kind, reason in _REFUSED.items() if kind in kinds]
                found = next(filter(None, map(_MATRIX_WISE.search, kinds)), None)
                if found and layer.weight.dim() > 1 and not _falls_back(optimizer, layer.weight):
                    reasons.append(
                        f"{found[0]} treats rows and columns of a weight of {layer.weight.dim()} dimensions together, "
                        "and cannot follow weights to other places; take Adam or SGD for the sparse layers, or packed "
                        '1x1 blocks (storage="packed") where the optimizer takes weights of one dimension'
                    )
                if reasons:
                    raise ValueError(
                        f"{name or type(layer).__name__}: {kinds[0]} cannot train weights whose pattern changes: "
                        f"{reasons[0]}."
                    )

    def check_keeps_nothing_aside(self, layers: Mapping[str, SparseLayer]) -> None:
        """Raises ValueError where an optimiser or its wrapper holds tensors of a weight's shape that are no state of
        it: slow weights, master copies, an average."""
        shapes: dict[tuple[int, ...], str] = {}
        for name, layer in layers.items():
            if layer.weight.requires_grad and layer.weight.numel() > 1:
                shapes.setdefault(tuple(layer.weight.shape), name)
        parameters = [p for o in self.optimizers for group in o.param_groups for p in group["params"]]
        # The weights themselves, under whatever name, and their gradients.
        own = {_memory(t) for p in parameters for t in (p, p.grad) if t is not None}
        for optimizer in {id(o): o for o in (*self._given, *self.optimizers)}.values():
            aside = {k: v for k, v in getattr(optimizer, "__dict__", {}).items() if k not in ("state", "param_groups")}
            for group in getattr(optimizer, "param_groups", ()):
                aside |= {f"param_groups[...][{k!r}]": v for k, v in group.items() if k != "params"}
            for key, value in aside.items():
                for tensor in _tensors(value):
                    if tuple(tensor.shape) in shapes and _memory(tensor) not in own:
                        raise ValueError(
                            f"{shapes[tuple(tensor.shape)] or 'the layer'}: {type(optimizer).__name__} holds a tensor "
                            f"of the weight's shape in {key!r}, which cannot move with the weights: only what is in "
                            "optimizer.state[parameter] does. Keep it there (as torch's optimizers do), or take an "
                            "optimizer without it; for averages there is AveragedModel."
                        )

    def warn_of_decay(self, layers: Mapping[str, SparseLayer]) -> None:
        """One line where a rule by dimensions (nanoGPT's, timm's) took packed weights out of weight decay."""
        without = []
        for name, layer in layers.items():
            for optimizer in self._holders(layer.weight):
                decaying = [group["params"] for group in optimizer.param_groups if group.get("weight_decay")]
                decays = any(p is layer.weight for params in decaying for p in params)
                if decaying and not decays and layer.weight.dim() == 1 and layer.weight.requires_grad:
                    without.append(name)
        if without:
            logger.warning(
                "The optimizer decays other weights, but not the packed ones of %s. Packed 1x1 weights have one "
                "dimension, for which a rule such as p.dim() >= 2 takes them for norms; "
                "param_groups(model, weight_decay) makes groups that know them.",
                _names(without),
            )

    def of(self, name: str, weight: Tensor) -> list[State]:
        """What moves with a weight.

        Raises:
            ValueError: if the state of some optimiser holds tensors of another shape.
        """
        states, seen = [], set()
        for optimizer in self.optimizers:
            for key, value in (optimizer.state.get(weight) or {}).items():
                # Not quantised state, whose entries share a scale; a sharded weight's state is sharded as it is.
                plain = type(value) in (Tensor, nn.Parameter) or (is_sharded(weight) and is_sharded(value))
                if plain and value.shape == weight.shape:
                    if id(value) not in seen:
                        seen.add(id(value))
                        states.append(State(value, _start(optimizer, weight, key)))
                elif any(tensor.numel() > 1 for tensor in _tensors(value)):
                    got = f"of shape {tuple(value.shape)}" if plain else f"a {type(value).__name__}"
                    raise ValueError(
                        f"{name}: the state {key!r} of {type(optimizer).__name__} is {got}, where the weight has shape "
                        f"{tuple(weight.shape)}: it cannot move with the weights. If it was loaded from a checkpoint "
                        "of another model or pattern, load the model's state_dict that goes with it, or make a new "
                        f"optimizer; otherwise {_FIRST_ORDER}."
                    )
        return states

    @torch.no_grad()
    def mask(self, layers: Mapping[str, SparseLayer]) -> None:
        """Zeroes the state of dense-stored weights outside of the pattern, which a loaded state may have. First checks
        the state of every layer, as :meth:`of` does."""
        states = {name: self.of(name, layer.weight) for name, layer in layers.items()}
        for name, layer in layers.items():
            if states[name] and layer.weight.requires_grad and not layer.pattern.is_packed(layer.weight):
                inactive = ~layer.pattern.to_mask()
                for tensor, start in states[name]:
                    with whole([tensor]) as (complete,):
                        complete.masked_fill_(inactive, start)

    def _holders(self, weight: Tensor) -> Iterator[Any]:
        return (o for o in self.optimizers if any(p is weight for group in o.param_groups for p in group["params"]))


def start_grown(states: Sequence[State]) -> None:
    """After an update, which leaves zeros: the first value of grown entries. No other entry is zero in such a state."""
    for tensor, start in states:
        if start:
            here = local(tensor)
            here.masked_fill_(here == 0, start)


class LoadWatch:
    """Keeps optimiser state with its weights where a state_dict brings another pattern in the middle of a training.

    Loading a layer, by itself or in whatever module it is, moves the state by position: what becomes active starts
    anew. A state that was loaded into the optimiser since its last step, or written into the tensors of its
    state_dict() (as dcp.load does), is left as it is, for it belongs to the checkpoint; it is checked, and masked where
    weights are dense-stored, before that optimiser's next step.
    """

    def __init__(self, layers: dict[str, SparseLayer], states: OptimizerStates):
        self._layers, self._states = layers, states
        self._loaded: set[int] = set()  # the places in states.together of what was
        self._running: set[int] = set()
        # Of optimisers whose state_dict() was asked for: the steps so far, and the versions of the tensors in it.
        self.given = WeakIdKeyDictionary()
        self._checking: set[int] = set()  # ids of the optimisers whose steps are preceded by settle()
        self._handles: list[Any] = []
        for layer in layers.values():
            told_of_patterns[layer] = weakref.WeakMethod(self._layer_loaded)
        _count_steps_of_all()
        self._before = WeakIdKeyDictionary()
        for optimizer in _stepped():
            self._before[optimizer] = _steps[optimizer]
        me = weakref.ref(self)  # an optimiser is no owner
        for optimizer in states.optimizers:
            if "_optimizer_load_state_dict_post_hooks" in vars(optimizer):

                def loading(optimizer, state_dict, me=me):
                    if (watch := me()) is not None:
                        watch._running = watch._memory_of_state(optimizer)

                def loaded(optimizer, me=me):
                    # A state_dict() that nobody copied is the running state: it has moved with the weights so far.
                    if (watch := me()) is not None:
                        watch._find_written()
                        if not watch._memory_of_state(optimizer) <= watch._running:
                            watch._optimizer_loaded(optimizer)

                def given(optimizer, state_dict, me=me):
                    if (watch := me()) is not None:
                        versions = [(weakref.ref(t), local(t)._version) for t in watch._tensors_of(optimizer)]
                        watch.given[optimizer] = _steps.get(optimizer, 0), versions

                self._handles.append(optimizer.register_state_dict_post_hook(given))
                self._handles.append(optimizer.register_load_state_dict_pre_hook(loading))
                self._handles.append(optimizer.register_load_state_dict_post_hook(loaded))

    def remove(self) -> None:
        """Ends it. Where it is collected instead, its hooks stay and idle."""
        for layer in self._layers.values():
            if (reference := told_of_patterns.get(layer)) and reference() == self._layer_loaded:
                del told_of_patterns[layer]
        for handle in self._handles:
            handle.remove()

    @property
    def steps(self) -> int:
        """Steps of all optimisers so far. 0 where they do not show."""
        return sum(_steps.get(optimizer, 0) for optimizer in self._states.optimizers)

    def check_nobody_else(self) -> None:
        """Raises ValueError where another optimiser has stepped that has state of a weight."""
        known = [optimizer.state for optimizer in self._states.optimizers]
        trained = {name: layer for name, layer in self._layers.items() if layer.weight.requires_grad}
        others = [optimizer for optimizer in _stepped() if _steps[optimizer] > self._before.get(optimizer, 0)]
        for name, layer in trained.items():
            mine = {id(t) for state in known for t in _tensors(state.get(layer.weight) or {})}
            for optimizer in others:
                state = optimizer.state if isinstance(optimizer.state, Mapping) else {}
                theirs = [t for t in _tensors(state.get(layer.weight) or {}) if t.numel() > 1]
                if any(id(tensor) not in mine for tensor in theirs):
                    raise ValueError(
                        f"{name or 'the layer'}: another {type(optimizer).__name__} has trained its weight than the "
                        "optimizer that DynamicSparsity was made with, and its state would stay where the weights "
                        "were. Make DynamicSparsity with all optimizers that train the sparse layers (a list), and "
                        "another one, with the steps that are left, after a change of optimizers."
                    )

    @torch.no_grad()
    def _layer_loaded(self, layer: SparseLayer, before: Tensor) -> None:
        pattern, weight = layer.pattern, layer.weight
        old = SparsityPattern.from_blocks(pattern.shape, before, block=pattern.block)
        self._find_written()
        loaded = [optimizer.state.get(weight) for place in self._loaded for optimizer in self._states.together[place]]
        states, moved = [], {_memory(tensor) for tensor in (weight, *_tensors(loaded))}
        for optimizer in self._states.optimizers:
            for key, value in (optimizer.state.get(weight) or {}).items():
                fits = isinstance(value, Tensor) and tuple(value.shape) in (old.packed_shape, pattern.shape)
                if fits and _memory(value) not in moved:  # not the weight itself, under another name
                    moved.add(_memory(value))
                    states.append(State(value, _start(optimizer, weight, key)))
        for sharded, _ in states:
            with whole([sharded]) as (tensor,):
                if tuple(tensor.shape) == pattern.shape:
                    tensor.masked_fill_(~(old.to_mask() & pattern.to_mask()), 0)
                    continue
                values = pattern.pack(old.unpack(tensor))
                if values.shape == tensor.shape:
                    tensor.copy_(values)
                else:
                    replace_data_(tensor, values)
        start_grown(states)

    def _tensors_of(self, optimizer: Any) -> list[Tensor]:
        states = [optimizer.state.get(layer.weight) for layer in self._layers.values()]
        return [tensor for state in states for tensor in _tensors(state) if tensor.numel() > 1]

    def _memory_of_state(self, optimizer: Any) -> set[int]:
        return set(map(_memory, self._tensors_of(optimizer)))

    def _find_written(self) -> None:
        """Before anything moves: what somebody wrote into the tensors of a state_dict() is a loaded state."""
        for optimizer, (steps, versions) in list(self.given.items()):
            if steps == _steps.get(optimizer, 0) and any(
                (t := tensor()) is not None and local(t)._version != version for tensor, version in versions
            ):
                self._optimizer_loaded(optimizer)
        self.given.clear()

    def _optimizer_loaded(self, optimizer: Any) -> None:
        self._loaded |= self._states.places(optimizer)
        me = weakref.ref(self)

        def check(optimizer, args, kwargs):
            if (watch := me()) is not None:
                watch.settle(optimizer)

        if id(optimizer) not in self._checking:
            self._checking.add(id(optimizer))
            self._handles.append(optimizer.register_step_pre_hook(check))

    def settle(self, optimizer: Any) -> None:
        """Before a step: what was loaded must fit, and belongs to the weights from now on."""
        for place in self._loaded & self._states.places(optimizer):
            self._states.mask(self._states.held(self._layers, place))
            self._loaded.discard(place)


def _with_wrapped(optimizer: Any, seen: set[int]) -> Iterator[Any]:
    """An optimiser and those that it holds as attributes, in lists too."""
    if id(optimizer) in seen:
        return
    seen.add(id(optimizer))
    is_optimizer = hasattr(optimizer, "param_groups") and hasattr(optimizer, "state")
    if is_optimizer:
        yield optimizer
    for value in list(getattr(optimizer, "__dict__", {}).values()):
        for inner in value if isinstance(value, list | tuple) else [value]:
            if isinstance(inner, torch.optim.Optimizer) or (
                not isinstance(inner, type) and hasattr(type(inner), "step") and hasattr(inner, "param_groups")
            ):
                yield from _with_wrapped(inner, seen)


def _falls_back(optimizer: Any, weight: Tensor) -> bool:
    """Whether the weight's group asks for the element-wise optimiser that comes with a Muon."""
    return any(
        group.get("use_muon") is False or bool(group.get("use_fallback"))
        for group in optimizer.param_groups
        if any(p is weight for p in group["params"])
    )


def _kinds(optimizer: Any) -> list[str]:
    return [kind.__name__ for kind in type(optimizer).__mro__]


def _start(optimizer: Any, weight: Tensor, key: str) -> float:
    for kind in _kinds(optimizer):
        if key in _START.get(kind, {}):
            for group in optimizer.param_groups:
                if any(p is weight for p in group["params"]):
                    return _START[kind][key](group)
    return 0.0


def _memory(tensor: Tensor) -> int:
    here = local(tensor)
    return here.data_ptr() if here.layout == torch.strided else id(tensor)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner)


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(name or "the model itself" for name in names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")
