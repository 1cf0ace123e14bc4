"""Dynamic sparsity in Hugging Face's Trainer, and sparse models in its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedModel, TrainerCallback
from transformers.trainer_callback import ExportableState

from uasparse_kernels.like import sparsify_like
from uasparse_kernels.topology import DynamicSparsity, Method


class DynamicSparsityCallback(TrainerCallback, ExportableState):
    """Steps a :class:`uasparse_kernels.DynamicSparsity` after each optimiser step, and keeps its state in checkpoints.

    Sparsify the model before you give it to the Trainer. The state is in the checkpoint's trainer_state.json; training
    resumed from a checkpoint (``train(resume_from_checkpoint=...)``) equals uninterrupted training, bit for bit.

    Args:
        method: as of DynamicSparsity.
        total_steps: optimiser steps of the whole training; None takes the trainer's.
        options: the other arguments of DynamicSparsity (``delta_t``, ``drop_fraction``, ``stop_fraction``,
            ``generator``, ``process_group``).

    Raises:
        ValueError: when the training starts, as DynamicSparsity does; for a checkpoint without this callback's state.
    """

    def __init__(self, *, method: str | Method = "rigl", total_steps: int | None = None, **options: Any):
        self.method, self.total_steps, self.options = method, total_steps, options
        self.topology: DynamicSparsity | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        steps = self.total_steps or state.max_steps
        topology = DynamicSparsity(
            kwargs["model"], kwargs["optimizer"], method=self.method, total_steps=steps, **self.options
        )
        if state.global_step:
            saved = (state.stateful_callbacks or {}).get(type(self).__name__) or {}
            if "topology" not in saved:
                raise ValueError(
                    f"DynamicSparsityCallback: expected its state in a checkpoint of step {state.global_step}, got "
                    "none: the checkpoint was made without it. To begin anew from its weights, load them with "
                    "from_pretrained() and call train() without resume_from_checkpoint."
                )
            told = json.loads(saved["topology"])
            generator = torch.frombuffer(bytearray.fromhex(told["generator"]), dtype=torch.uint8)
            topology.load_state_dict(told | {"generator": generator})
        self.topology = topology

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.topology is not None
        self.topology.step()

    def state(self) -> dict[str, Any]:
        """What trainer_state.json keeps."""
        options = {"method": self.method, "total_steps": self.total_steps, **self.options}
        plain = all(value is None or isinstance(value, bool | int | float | str) for value in options.values())
        saved: dict[str, Any] = {"args": options if plain else {}, "attributes": {}}
        if self.topology is not None:
            state = self.topology.state_dict()
            generator = state["generator"].numpy().tobytes().hex()
            saved["topology"] = json.dumps(state | {"generator": generator})
        return saved


def from_pretrained(cls: Any, folder: str | Path, **config: Any) -> PreTrainedModel:
    """A sparse model from a folder that ``model.save_pretrained`` wrote (a checkpoint of the Trainer is one, too).

    Nothing but the folder is needed: the files hold each sparse layer's pattern beside its weight, which tells which
    layers are sparse, where, and how they are stored. The library's own ``from_pretrained`` makes dense layers.

    Args:
        cls: the model's class, or an ``AutoModelFor...``.
        folder: a local folder with config.json and safetensors files (of the Hub:
            ``huggingface_hub.snapshot_download(name)``).
        config: settings that override those in config.json.

    Raises:
        FileNotFoundError: where the folder has no safetensors file.
        ValueError: for files whose layers are not those of the model.
    """
    folder = Path(folder)
    settings = AutoConfig.from_pretrained(folder, **config)
    model = (cls.from_config if hasattr(cls, "from_config") else cls._from_config)(settings)
    tensors = _read(folder)
    sparsify_like(model, tensors)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    model.tie_weights()
    loaded = {id(tensor) for name, tensor in model.named_parameters(remove_duplicate=False) if name not in missing}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    missing = [name for name in missing if name not in parameters or id(parameters[name]) not in loaded]
    if missing or unexpected:
        raise ValueError(
            f"{folder}: expected the weights of {type(model).__name__}; missing: {missing[:5]}, unexpected: "
            f"{unexpected[:5]}."
        )
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def _read(folder: Path) -> dict[str, Tensor]:
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    tensors: dict[str, Tensor] = {}
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"Expected {folder / name}, as save_pretrained() writes it.")
        tensors |= load_file(folder / name)
    return tensors
