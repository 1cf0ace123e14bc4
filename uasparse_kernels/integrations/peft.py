"""LoRA on a sparse base: low-rank adapters beside layers whose weights stay sparse."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig
from peft.tuners.lora import Linear

from uasparse_kernels.nn.linear import SparseLinear

_PLAIN_STARTS = (True, False, "gaussian", "orthogonal")


class SparseLinearLora(Linear):
    """A sparse linear layer plus ``B A x``. The sum of the two has no pattern, so that it cannot be merged."""

    def __init__(self, base_layer: Any, adapter_name: str, config: Any, **kwargs: Any):
        if config.init_lora_weights not in _PLAIN_STARTS:
            raise ValueError(
                f"Expected init_lora_weights of {_PLAIN_STARTS} for a sparse layer, got {config.init_lora_weights!r}, "
                "which reads or changes the weight as a matrix."
            )
        super().__init__(base_layer, adapter_name, config=config, **kwargs)

    @property
    def lora_variants(self) -> dict[Any, Any]:
        return {(): None}

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise RuntimeError(
            "An adapter cannot be merged into a sparse layer: their sum is dense. Keep it beside the layer, or get a "
            "dense model: base = uasparse_kernels.densify(model.unload()), then PeftModel.from_pretrained(base, "
            "adapter).merge_and_unload()."
        )


def with_sparse_layers(config: LoraConfig) -> LoraConfig:
    """Lets a LoraConfig target ``SparseLinear`` too; returns it.

    ``get_peft_model(model, with_sparse_layers(LoraConfig(target_modules=["q_proj"])))`` freezes the sparse base, whose
    weights keep values and pattern (DynamicSparsity leaves frozen layers alone). Variants that read the weight (DoRA,
    PiSSA, ...) and merging are refused. The mapping is not saved with an adapter: give the config to
    ``PeftModel.from_pretrained`` as well (``config=with_sparse_layers(LoraConfig.from_pretrained(folder))``).
    """
    config._register_custom_module({SparseLinear: SparseLinearLora})
    return config
