"""What DynamicSparsity logs, each line once, where a training goes on that may not be what was meant."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from uasparse_kernels._coverage import describe_outputs, outputs_without_weights
from uasparse_kernels.nn.layers import SparseLayer
from uasparse_kernels.topology.growth import GradientCapture

logger = logging.getLogger("uasparse_kernels")


class Notices:
    """The lines that were said, and the calls of ``step()`` since they were last compared with the optimiser's."""

    def __init__(self, steps: int) -> None:
        self._said: set[str] = set()
        self._calls = self._idle_calls = 0
        self._steps = steps  # of the optimisers

    def _is_first(self, what: str) -> bool:
        if what in self._said:
            return False
        self._said.add(what)
        return True

    def count_call(self, steps: int) -> None:
        """A call of ``step()`` after so many steps of the optimisers; it is idle if none came before it."""
        self._calls += 1
        self._idle_calls += steps == self._steps
        self._steps = steps

    def forget_calls(self) -> None:
        self._calls = self._idle_calls = 0

    def extra_calls(self) -> None:
        """Where step() is called for every micro-batch."""
        calls, steps = self._calls, self._calls - self._idle_calls
        self.forget_calls()
        # An update may replace an optimiser step, and a GradScaler skip a few.
        if steps and 3 * (steps + 1) < 2 * calls and self._is_first("extra calls"):
            logger.warning(
                "Topology: step() was called %d times for %d steps of the optimizer. Call it once per optimizer step, "
                "not for every micro-batch: updates come too often, and grow by a part of the gradient.",
                calls,
                steps,
            )

    def postponed(self, reason: str) -> None:
        if self._is_first("postponed"):
            logger.warning("Topology: %s at an update step; the update waits for the next step where they are.", reason)

    def unseen(self, captures: Sequence[tuple[SparseLayer, GradientCapture]]) -> None:
        """Where ``.grad`` came from passes that growth does not know."""
        if any(capture.lacks_passes(layer) for layer, capture in captures) and self._is_first("unseen"):
            logger.warning(
                "Topology: .grad is not the gradient of the backward passes that growth sees. It does not see passes "
                "inside of torch.func transforms and forward-mode AD, third derivatives, and what hooks of a weight or "
                "a replaced forward do. Of passes that are merged by hand (PCGrad) it sees the last alone: let them "
                "add up in .grad (zero it before the first only), then write the result over it. Or grow at random "
                '(method="set").'
            )

    def unfinished(self, left_out: dict[str, SparseLayer]) -> None:
        """Where the last update of gradual pruning left out layers that train."""
        left = [
            f"{name!r} ({layer.pattern.density:.3g})" for name, layer in left_out.items() if layer.weight.requires_grad
        ]
        if left:
            logger.warning(
                "Topology: the last update of gradual pruning left out layers without a gradient at this step, or at "
                "a rate of 0; they keep their density: %s.",
                ", ".join(left),
            )

    def lost(self, layers: dict[str, SparseLayer], step: int) -> None:
        """Where updates took the weights of half of a layer's outputs, or more."""
        if "lost" not in self._said and (lost := outputs_without_weights(layers)) and self._is_first("lost"):
            logger.warning(
                "Topology: after step %d half of the outputs of a layer or more have no weight left: %s. They are "
                "constants. With growth by gradient, drop=topology.relative_magnitude keeps outputs alive.",
                step,
                describe_outputs(lost),
            )
