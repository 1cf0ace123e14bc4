"""The vote: the average of the weights seen late in training (arXiv 2403.20047, section on weight averaging).

A thin layer over torch.optim.swa_utils. The topology must be frozen: an average of networks with different patterns has
the union of their weights, so it is denser than any of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

from uasparse_kernels.unknowns.errors import UnknownsError


class Topology(Protocol):
    """What the vote asks of a `uasparse_kernels.DynamicSparsity`."""

    @property
    def frozen(self) -> bool: ...


class Vote:
    """Running average of the parameters of `model`; starts as a copy of it.

    `topology` is the DynamicSparsity of the model, or None for a dense one. Raises UnknownsError while the topology
    can still change, here and in `update`.
    """

    def __init__(self, model: nn.Module, topology: Topology | None = None) -> None:
        self.topology = topology
        self._check_frozen()
        self.averaged = AveragedModel(model)

    def update(self, model: nn.Module) -> None:
        """Adds the current weights to the average; all count equally."""
        self._check_frozen()
        self.averaged.update_parameters(model)

    @torch.no_grad()
    def result(self, batches: Iterable[tuple[Tensor, Tensor]]) -> nn.Module:
        """Returns the averaged network, its batch-norm statistics estimated again in one pass over `batches`.

        The batches must be like those of training, synthetic unknowns included: another mixture has other statistics.
        """
        if int(self.averaged.n_averaged) == 0:
            raise UnknownsError("Expected at least one update before the result of a vote, got none.")
        batches = iter(batches)
        first = list(islice(batches, 1))
        if not first:
            raise UnknownsError(
                "Expected batches to estimate batch-norm statistics from, got none; a generator gives its own once."
            )
        update_bn(chain(first, batches), self.averaged.module)
        return self.averaged.module.eval()

    def state_dict(self) -> dict[str, Any]:
        return self.averaged.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.averaged.load_state_dict(state)

    def _check_frozen(self) -> None:
        if self.topology is not None and not self.topology.frozen:
            raise UnknownsError(
                "Expected a frozen topology for the vote, got one that still changes: the average of networks with "
                "different patterns would be denser than they are. Start the vote later (a smaller vote_fraction) or "
                "stop the topology earlier (a smaller stop_fraction)."
            )
