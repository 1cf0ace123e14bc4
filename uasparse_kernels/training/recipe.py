"""The training loop: sparse training by SGD with the unknown-aware loss and the vote (arXiv 2403.20047).

`Trainer` owns everything that changes during training; its state_dict at the end of an epoch is enough to go on with
the same result, bit for bit on a CPU.

Several processes (torchrun) train one network, each on its share of every batch: they draw the same batches and take
their parts, so that the result is that of one process, up to rounding and to batch norm on a CPU, where each process
has statistics of its part. A checkpoint does not know how many there were.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import uasparse_kernels as ua
from uasparse_kernels.training.batches import Batches, Normalise
from uasparse_kernels.training.checkpoint import check_form
from uasparse_kernels.training.config import FIXED_SPARSITY, INITIAL_SPARSITY, FitConfig
from uasparse_kernels.training.data import TrainTest, check_classes
from uasparse_kernels.training.errors import CheckpointError, NonFiniteLossError, TrainingError, told
from uasparse_kernels.training.losses import LOSSES, LossSpec
from uasparse_kernels.training.models import Whitening, build_model
from uasparse_kernels.training.processes import rank_and_world
from uasparse_kernels.training.weight_dropout import WeightDropout
from uasparse_kernels.unknowns import PatchShuffle, Vote
from uasparse_kernels.unknowns.head import give_unknown_head, num_outputs, unknown_layers

StepCallback = Callable[[int, Tensor], None]  # step within the epoch, its loss (still on the device)
WHITENING_IMAGES = 5000  # at most, spread evenly: folders have class by class
CHECK_EVERY_ON_GPU = 50  # steps between host syncs that look for a loss that is not finite


def learning_rate(step: int, cosine_steps: int, lr_max: float, lr_min: float, rise_steps: int = 0) -> float:
    """Rises linearly to lr_max at step `rise_steps`, falls by a cosine to lr_min at `cosine_steps`, and stays there."""
    if step < rise_steps:
        return lr_max * (step + 1) / (rise_steps + 1)
    progress = min((step - rise_steps) / max(1, cosine_steps - rise_steps), 1.0)
    return lr_min + 0.5 * (lr_max - lr_min) * (1 + math.cos(math.pi * progress))


def layout_for(device: torch.device) -> torch.memory_format:
    """The memory layout of feature maps and filters. cuDNN wants channels last; else it copies at every convolution."""
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def build_network(
    config: FitConfig, num_classes: int, in_channels: int, image_size: int, start: nn.Module | None = None
) -> tuple[nn.Module, nn.Module]:
    """Builds (network, loss) as the config says; the network is sparse unless the method is dense.

    `start`: a trained network to make it of, in place; its weights of largest magnitude stay. Raises TrainingError for
    settings that do not fit the network.
    """
    loss_fn = LOSSES[config.loss](
        LossSpec(
            num_classes,
            config.epochs,
            with_unknowns=config.unknowns != "none",
            unknown_weight=config.unknown_weight,
            warmup_epochs=config.warmup_epochs,
            alpha_final=config.alpha_final,
            rho=config.rho,
            logit_temperature=config.logit_temperature,
        )
    )
    outputs = cast(int, loss_fn.num_outputs)
    model = start or build_model(config.model, outputs, in_channels, image_size, config.stem)
    if config.unknown_head == "own" and start is None:
        with told():
            give_unknown_head(model)
    if (found := num_outputs(model)) != outputs:
        raise TrainingError(f"Expected a network of {outputs} outputs to start {config.arm} from, got one of {found}.")
    if config.method != "dense":
        try:
            keep = "random" if start is None else "magnitude"
            model = ua.sparsify(model, keep=keep, exempt=unknown_layers(model), **sparsity_options(config))
        except ValueError as error:
            raise TrainingError(f"{config.model} cannot be made sparse by these settings: {error}") from error
        if not any(isinstance(module, ua.nn.SparseLayer) for module in model.modules()):
            raise TrainingError(
                f"Expected a layer of {config.model} that can be made sparse, got none: not one is divided by "
                f"{config.block} blocks and given to the method {config.method} at sparsity {config.sparsity}. Give a "
                "smaller --block, another sparsity, or --method dense."
            )
    return model, loss_fn


def sparsity_options(config: FitConfig) -> dict[str, Any]:
    """The arguments of `sparsify`: the network as the method starts with it."""
    sparsity = FIXED_SPARSITY.get(config.method, config.sparsity)
    options: dict[str, Any] = {
        "sparsity": min(sparsity, INITIAL_SPARSITY.get(config.method, sparsity)),
        "distribution": config.distribution,
        "block": config.block_size,
        "storage": config.storage,
        "include_dense": config.method in INITIAL_SPARSITY,
    }
    return options | {"structure": {"srigl": "fan-in", "2:4": "2:4"}.get(config.method)}


def topology_method(config: FitConfig) -> str | ua.topology.Method:
    """The argument of `DynamicSparsity`."""
    if config.method not in ua.topology.METHODS:
        return config.method
    method = ua.topology.METHODS[config.method]()
    if config.method in INITIAL_SPARSITY:
        method = replace(method, final_sparsity=config.sparsity)
    if config.drop == "relative":
        method = replace(method, drop=ua.topology.relative_magnitude)
    return method


class Trainer:
    """One run of `config` on `data`, from scratch or from the trained network `start`, which is changed in place.

    Raises TrainingError for settings that cannot work together.
    """

    def __init__(
        self, config: FitConfig, data: TrainTest, device: torch.device | str = "cpu", *, start: nn.Module | None = None
    ) -> None:
        check_classes(data)
        self.config, self.data, self.device = config, data, torch.device(device)
        torch.manual_seed(config.seed)
        images = data.train.images
        model, loss_fn = build_network(config, data.train.num_classes, images.shape[1], images.shape[-1], start)
        self.rank, self.world = rank_and_world()
        if self.world > 1 and self.device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.model, self.loss_fn = model.to(self.device), loss_fn.to(self.device)
        self.layout = layout_for(self.device)
        if self.layout == torch.channels_last:
            self.model.to(memory_format=self.layout)
        self.network: nn.Module = self.model  # what the training calls
        if self.world > 1:
            self.network = DistributedDataParallel(self.model)
            if isinstance(self.loss_fn, ua.UnknownAwareLoss):
                self.loss_fn.process_group = dist.group.WORLD
        if config.compile:
            self.network = cast(nn.Module, torch.compile(self.network, dynamic=False))
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=config.lr_max,
            momentum=config.momentum,
            nesterov=config.momentum > 0,
            weight_decay=config.weight_decay,
        )
        self.normalise = Normalise.of(images)
        for whitening in (m for m in self.model.modules() if start is None and isinstance(m, Whitening)):
            whitening.fit(self.normalise(images[:: -(-len(images) // WHITENING_IMAGES)].to(self.device)))
        self.generator = torch.Generator().manual_seed(config.seed)
        self.batches = self._make_batches(self.generator)
        if self.batches.batch_size % self.world:
            raise TrainingError(
                f"Expected a batch size that the {self.world} processes can share, got {self.batches.batch_size}."
            )
        self.total_steps = config.epochs * len(self.batches)
        self.topology = self._make_topology()
        self.vote: Vote | None = None
        self.dropout = WeightDropout(self.model, config.weight_dropout)
        self.epoch = self.step = 0
        self._finite = _FiniteCheck(self.device)
        self._check_vote_settings()
        self._check_forward()

    def train_epoch(self, on_step: StepCallback | None = None) -> dict[str, float]:
        """Trains one epoch and returns its loss, accuracy, learning rate, seconds and compute_seconds.

        compute_seconds leave out the time that other processes had the processor, if one CPU thread does all the work.

        Raises NonFiniteLossError with the first step whose loss was NaN or infinite (on a CPU before that step changes
        a weight), and if a weight is not finite at the end of the epoch.
        """
        start, cpu_start = time.perf_counter(), time.process_time()
        config, cosine_steps = self.config, self.config.vote_start_epoch * len(self.batches)
        rise_steps = min(round(config.lr_rise * len(self.batches)), cosine_steps)
        voting = self.epoch >= config.vote_start_epoch
        if voting and self.vote is None:
            self.vote = Vote(self.model, self.topology)
        totals = torch.zeros(2, device=self.device, dtype=torch.float64)
        self.model.train()
        rate = config.lr_max
        for index, batch in enumerate(self.batches):
            x, y = (part[self.rank :: self.world] for part in batch)
            rate = learning_rate(self.step, cosine_steps, config.lr_max, config.lr_min, rise_steps)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.dropout.draw()
            with self.dropout:
                with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
                    logits = self.network(x.contiguous(memory_format=self.layout))
                logits = logits if logits.dtype == torch.float64 else logits.float()
                loss = self.loss_fn(logits, y)
                self._finite(loss, self.step, self.epoch)
                loss.backward()
            self._update_weights()
            self.optimizer.zero_grad()
            self.step += 1
            if self.vote is not None and self._is_vote(index):
                with self.dropout:
                    self.vote.update(self.model)
            with torch.no_grad():
                totals += torch.stack([loss.detach(), (logits.argmax(1) == y).float().mean()])
            if on_step is not None:
                on_step(index, loss.detach())
        self._finite.raise_if_found(self.epoch)
        self.check_weights()
        if self.world > 1:
            dist.all_reduce(totals)
        mean_loss, accuracy = (totals / len(self.batches) / self.world).tolist()
        record = {"epoch": self.epoch + 1, "train_loss": mean_loss, "train_accuracy": accuracy, "lr": rate}
        if isinstance(alpha := getattr(self.loss_fn, "alpha", None), Tensor):
            record["alpha"] = float(alpha)  # of this epoch; step_epoch sets that of the next
        self.loss_fn.step_epoch()
        self.epoch += 1
        record["seconds"] = record["compute_seconds"] = time.perf_counter() - start
        if self.device.type == "cpu" and torch.get_num_threads() == 1:
            record["compute_seconds"] = time.process_time() - cpu_start
        return record

    def result(self) -> nn.Module:
        """Returns the network to be evaluated: the average if there was a vote, else the last weights.

        Raises NonFiniteLossError if it holds a value that is not finite.
        """
        if self.vote is not None:
            self.vote.result(self._make_batches(torch.Generator().manual_seed(self.config.seed + 1)))
        self.check_weights()
        return (self.model if self.vote is None else self.vote.averaged.module).eval()

    def check_weights(self) -> None:
        """Raises NonFiniteLossError unless weights, optimiser state and average are all finite.

        A finite loss may have a gradient that is not finite. The loss of the next step would show it; after the last
        step of an epoch there is none.
        """
        average = self.vote.averaged.state_dict() if self.vote is not None else {}
        momenta = [value for state in self.optimizer.state.values() for value in state.values()]
        values = [*self.model.state_dict().values(), *self.loss_fn.state_dict().values(), *average.values(), *momenta]
        if not all(bool(v.isfinite().all()) for v in values if isinstance(v, Tensor) and v.is_floating_point()):
            raise NonFiniteLossError(f"Weights are NaN or infinite after step {self.step - 1}.", self.step - 1)

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes, tensors and plain values only."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "model": self.model.state_dict(),
            "loss": self.loss_fn.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "topology": self.topology.state_dict() if self.topology is not None else None,
            "vote": self.vote.state_dict() if self.vote is not None else None,
            "generator": self.generator.get_state(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises CheckpointError for a state that is damaged or of a run with another network."""
        try:
            self._check_form(state)
            self.model.load_state_dict(state["model"])
            self.loss_fn.load_state_dict(state["loss"])
            self.optimizer.load_state_dict(state["optimizer"])
            self._check_momenta()
            if self.topology is not None:
                self.topology.load_state_dict(state["topology"])
            self.vote = None
            if state["vote"] is not None:
                self.vote = Vote(self.model, self.topology)
                self.vote.load_state_dict(state["vote"])
            self.generator.set_state(state["generator"])
            torch.set_rng_state(state["rng"])
            if self.device.type == "cuda" and state["cuda_rng"]:
                torch.cuda.set_rng_state_all(state["cuda_rng"])
            self.epoch, self.step = state["epoch"], state["step"]
            self.check_weights()
        except Exception as error:  # whatever torch makes of another's tensors
            reason = error if isinstance(error, CheckpointError) else repr(error)
            raise CheckpointError(f"The checkpoint does not fit this run: {reason}.") from error

    def _check_form(self, state: dict[str, Any]) -> None:
        """Raises CheckpointError unless the state has the form that `state_dict` gives, where torch would not look."""
        mine, free = self.state_dict(), ("topology", "optimizer", "vote", "cuda_rng")
        check_form({name: state.get(name) for name in mine}, mine, free=free)
        epoch, optimizer = state["epoch"], state["optimizer"]
        if not 0 <= epoch <= self.config.epochs or state["step"] != epoch * len(self.batches):
            raise CheckpointError(f"epoch {epoch} and step {state['step']} of {self.total_steps} steps")
        if (state["vote"] is None) != (epoch <= self.config.vote_start_epoch):
            raise CheckpointError(f"a vote at epoch {epoch} that is {'missing' if state['vote'] is None else 'early'}")
        if state["vote"] is not None:
            check_form(state["vote"], Vote(self.model).state_dict(), "vote")
        check_form(optimizer["param_groups"], mine["optimizer"]["param_groups"], "optimizer", exact=True, free=("lr",))
        if (state["topology"] is None) != (self.topology is None):
            raise CheckpointError("a topology that was not expected, or none where one was expected")
        if self.topology is not None:
            nested = [name for name, value in mine["topology"].items() if isinstance(value, dict | list | tuple)]
            check_form(state["topology"], mine["topology"], "topology", free=nested)

    def _check_momenta(self) -> None:
        """Raises CheckpointError unless each parameter's state is of its shape."""
        for parameter, state in self.optimizer.state.items():
            for name, value in state.items():
                if isinstance(value, Tensor) and value.dim() > 0 and value.shape != parameter.shape:
                    raise CheckpointError(f"{name} of {tuple(value.shape)} for a weight of {tuple(parameter.shape)}")

    def _is_vote(self, index: int) -> bool:
        """Whether the weights after step `index` of an epoch of the vote count: every tenth of the epoch by default.

        `as_released`: all steps in the first tenth instead (the released program has // where it should have %).
        """
        every = max(1, len(self.batches) // self.config.votes_per_epoch)
        return index // every == 0 if self.config.as_released else (index + 1) % every == 0

    def _update_weights(self) -> None:
        if self.topology is None:
            self.optimizer.step()
        elif self.config.update_step == "extra":
            self.optimizer.step()
            self.topology.step()
        elif not self.topology.step():
            self.optimizer.step()

    def _make_batches(self, generator: torch.Generator) -> Batches:
        config, unknowns = self.config, None
        if config.unknowns == "patch-shuffle":
            unknown_label = self.data.train.num_classes
            grids, seams = config.unknown_grids, config.unknown_seams
            unknowns = PatchShuffle(unknown_label, share=config.unknown_share, grids=grids, seams=seams)
            images = self.data.train.images
            with told():
                unknowns.check(min(config.batch_size, len(images)), *images.shape[-2:])
        return Batches(
            self.data.train,
            self.normalise,
            batch_size=config.batch_size,
            generator=generator,
            augment=config.augment,
            unknowns=unknowns,
            device=self.device,
        )

    def _make_topology(self) -> Any:
        config = self.config
        if config.method == "dense":
            return None
        end = math.ceil(self._stop_fraction() * self.total_steps)  # the first step that changes nothing any more
        # As released, the topology hardly changes: this is one of the faults that are repeated.
        if config.method != "static" and config.delta_t >= end and not config.as_released:
            raise TrainingError(
                f"Expected a topology update of method {config.method} before step {end} (stop_fraction of the "
                f"{self.total_steps} steps of this training), got the first at step delta_t {config.delta_t}. "
                + (f"Give a delta_t of at most {end - 1}, more epochs," if end > 1 else "Give more epochs")
                + " or method static."
            )
        try:
            return ua.DynamicSparsity(
                self.model,
                self.optimizer,
                method=topology_method(config),
                total_steps=self.total_steps,
                delta_t=config.delta_t,
                drop_fraction=config.drop_fraction,
                stop_fraction=self._stop_fraction(),
                generator=torch.Generator().manual_seed(config.seed),
            )
        except ValueError as error:
            raise TrainingError(f"Method {config.method} cannot work with these settings: {error}") from error

    def _stop_fraction(self) -> float:
        """Share of all steps after which the topology is frozen.

        `as_released`: the drop fraction falls to 0 over stop_fraction * epochs *steps* (the released program gives its
        cosine the number of epochs and advances it every step), so that with 100 epochs of 390 steps 75 steps see it.
        """
        share = self.config.stop_fraction
        return share / len(self.batches) if self.config.as_released else share

    def _check_vote_settings(self) -> None:
        config = self.config
        start = config.vote_start_epoch / config.epochs
        if config.vote and config.method not in ("dense", "static") and self._stop_fraction() > start:
            raise TrainingError(
                f"The vote starts after {start:.0%} of the epochs, but the topology changes until stop_fraction "
                f"{config.stop_fraction:.0%}: networks with different patterns cannot be averaged. "
                f"Give a stop_fraction of at most {math.floor(start * 100) / 100}, a smaller vote_fraction, or more "
                "epochs."
            )

    @torch.no_grad()
    def _check_forward(self) -> None:
        """Raises TrainingError if the network cannot take the images, or batch norm gets a single value per channel."""
        values: dict[str, int] = {}
        norms = [(n, m) for n, m in self.model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        hooks = [
            m.register_forward_pre_hook(lambda _, inputs, n=n: values.update({n: inputs[0][:, 0].numel()}))
            for n, m in norms
        ]
        image = self.data.train.images[:1].to(self.device)
        try:
            self.model.eval()(self.normalise(image))
        except (RuntimeError, ValueError) as error:
            shape = "x".join(map(str, image.shape[1:]))
            raise TrainingError(f"{self.config.model} cannot take images of {shape}: {error}") from error
        finally:
            for hook in hooks:
                hook.remove()
            self.model.train()
        if self.batches.batch_size == self.world and (alone := [name for name, count in values.items() if count == 1]):
            raise TrainingError(
                f"Expected batches of two images a process at least: batch norm ({alone[0]} of {self.config.model}) "
                f"has one value a channel to take statistics of, as images are {image.shape[-2]}x{image.shape[-1]}. "
                "Give a larger --batch-size or --image-size."
            )


class _FiniteCheck:
    """Remembers the first step with a loss that is not finite. On a GPU it looks only now and then."""

    def __init__(self, device: torch.device) -> None:
        self.every = 1 if device.type == "cpu" else CHECK_EVERY_ON_GPU
        self.first = torch.full((), -1, dtype=torch.int64, device=device)

    def __call__(self, loss: Tensor, step: int, epoch: int) -> None:
        bad = ~torch.isfinite(loss.detach()) & (self.first < 0)
        self.first = torch.where(bad, step, self.first)
        if step % self.every == 0:
            self.raise_if_found(epoch)

    def raise_if_found(self, epoch: int) -> None:
        step = int(self.first)
        if step >= 0:
            raise NonFiniteLossError(f"The loss is NaN or infinite at step {step} (epoch {epoch + 1}).", step)
