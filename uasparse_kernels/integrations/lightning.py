"""Dynamic sparsity in Lightning's Trainer."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging

from uasparse_kernels.topology import DynamicSparsity, Method


class DynamicSparsityCallback(Callback):
    """Steps a :class:`uasparse_kernels.DynamicSparsity` after each optimiser step, and keeps its state in checkpoints.

    Sparsify the model in the LightningModule's ``__init__`` (or before ``fit``), so that ``configure_optimizers`` sees
    the sparse weights. Steps are the batches after which an optimiser stepped: with accumulation one in several, with
    several optimisers (manual optimisation) one for all of them. Gradients must be kept until the batch ends, as
    they are in automatic optimisation; with manual optimisation zero them before the backward pass.

    Training resumed from a checkpoint (``fit(ckpt_path=...)``) equals uninterrupted training, bit for bit.

    Args:
        method: as of DynamicSparsity.
        total_steps: optimiser steps of the whole training; None takes the trainer's ``estimated_stepping_batches``.
        options: the other arguments of DynamicSparsity (``delta_t``, ``drop_fraction``, ``stop_fraction``,
            ``generator``, ``process_group``).

    Raises:
        ValueError: when the training starts, as DynamicSparsity does; where the trainer does not know its number of
            steps; for a checkpoint without this callback's state. Later, for Lightning's averages of weights that begin
            while the topology moves.
    """

    def __init__(self, *, method: str | Method = "rigl", total_steps: int | None = None, **options: Any):
        self.method, self.total_steps, self.options = method, total_steps, options
        self.topology: DynamicSparsity | None = None
        self._loaded: dict[str, Any] | None = None
        self._seen = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        steps = trainer.estimated_stepping_batches if self.total_steps is None else self.total_steps
        if not 0 < steps < math.inf:
            raise ValueError(
                "DynamicSparsityCallback: expected a trainer that knows its number of steps, got max_epochs=-1 or a "
                "loader without a length; give total_steps=."
            )
        state = self._loaded
        if trainer.global_step and state is None:
            state = self.state_dict()  # a second fit() goes on
            if not state:
                raise ValueError(
                    f"DynamicSparsityCallback: expected its state in a checkpoint of step {trainer.global_step}, got "
                    "none: the checkpoint was made without it. To begin anew from its weights, load them with "
                    "load_state_dict() and call fit() without ckpt_path."
                )
        self.topology = DynamicSparsity(
            pl_module, trainer.optimizers, method=self.method, total_steps=int(steps), **self.options
        )
        if state:
            self.topology.load_state_dict(state)
        self._loaded, self._seen = None, trainer.global_step

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for average in self._averages(trainer, StochasticWeightAveraging):
            if average.swa_start <= trainer.current_epoch:
                self._refuse(average)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step != self._seen:
            self._seen = trainer.global_step
            assert self.topology is not None
            for average in self._averages(trainer, WeightAveraging):
                if average.should_update(step_idx=trainer.global_step - 1):
                    self._refuse(average)
            self.topology.step()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for average in self._averages(trainer, WeightAveraging):
            if average.should_update(epoch_idx=trainer.current_epoch):
                self._refuse(average)

    def state_dict(self) -> dict[str, Any]:
        return self.topology.state_dict() if self.topology is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict

    def _averages(self, trainer: Trainer, kind: type[Callback]) -> list[Any]:
        """Callbacks that average the weights, while these change their places."""
        assert self.topology is not None
        callbacks = [] if self.topology.frozen else trainer.callbacks  # type: ignore[attr-defined]
        return [callback for callback in callbacks if isinstance(callback, kind)]

    def _refuse(self, average: Callback) -> None:
        assert self.topology is not None
        raise ValueError(
            f"{type(average).__name__} begins before step {self.topology.schedule.end}, at which the topology is "
            "frozen: it would average weights of different places. Begin later, give a smaller stop_fraction, or use "
            "uasparse_kernels.AveragedModel, which follows the topology."
        )
