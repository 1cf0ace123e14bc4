"""``nn.MultiheadAttention`` with sparse projections."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from uasparse_kernels.nn.layers import SparseLayer
from uasparse_kernels.nn.linear import SparseLinear

_SEPARATE = ("q_proj", "k_proj", "v_proj")
_DENSE_ONLY = ("in_proj_weight", *(f"{name}_weight" for name in _SEPARATE), "in_proj_bias")


class SparseMultiheadAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` whose projections are layers of their own, which may be sparse.

    In place of ``in_proj_weight`` it has a layer ``in_proj`` of ``[3 * embed_dim, embed_dim]``, with which
    self-attention is one product. If query, key and value are different tensors, each costs the whole product. If keys
    or values have other sizes than queries, and in the cross-attention of ``nn.TransformerDecoderLayer``, there are
    layers ``q_proj``, ``k_proj`` and ``v_proj`` instead, so that every input is multiplied by its own weights only.
    ``out_proj`` is a layer as before.

    ``sparsify`` turns an ``nn.MultiheadAttention`` into it, in place, and ``densify`` turns it back. Results and
    gradients are those of the dense module with masked weights. It also loads a state_dict of the dense module.

    Args:
        embed_dim ... dtype: as for ``nn.MultiheadAttention``.
        sparsity: share of absent weights of each projection, in [0, 1); patterns are random with an exact count.
        block, storage: as for :class:`SparseLinear`.
    """

    in_proj: nn.Module
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        sparsity: float,
        block: Sequence[int] = (1, 1),
        storage: str = "auto",
    ):
        sizes = {"kdim": kdim, "vdim": vdim, "batch_first": batch_first, "device": device, "dtype": dtype}
        super().__init__(embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, **sizes)
        self._make_sparse(sparsity=sparsity, block=block, storage=storage)

    @classmethod
    def from_dense(
        cls, module: nn.MultiheadAttention, *, sparsity: float, block: Sequence[int] = (1, 1), storage: str = "auto"
    ) -> SparseMultiheadAttention:
        """A sparse module of a dense one (copied), each projection as by :meth:`SparseLinear.from_dense`.

        Raises:
            TypeError: for a module of another class.
        """
        if type(module) is not nn.MultiheadAttention:
            raise TypeError(f"Expected an nn.MultiheadAttention, got {type(module).__name__}.")
        made: Any = copy.deepcopy(module)
        made.__class__ = cls
        return made._make_sparse(sparsity=sparsity, block=block, storage=storage)

    def to_dense(self) -> nn.MultiheadAttention:
        """A dense module with the same weights (copied), zeros at inactive entries."""
        made: Any = copy.deepcopy(self)
        for name, layer in made.projections().items():
            made._modules[name] = layer.to_dense() if isinstance(layer, SparseLayer) else layer
        return join_projections_(made)

    def _make_sparse(self, **sparse: Any) -> SparseMultiheadAttention:
        split_projections_(self)
        for name, layer in self.projections().items():
            self._modules[name] = SparseLinear.from_dense(layer, **sparse)
        return self

    def projections(self) -> dict[str, Any]:
        """The layers by name."""
        return {name: layer for name, layer in self.named_children() if name in ("in_proj", *_SEPARATE, "out_proj")}

    def _reset_parameters(self) -> None:
        """As the dense module does (which leaves out_proj's weight); sparse weights are scaled to their fan-in."""
        if "in_proj" not in self._modules and "q_proj" not in self._modules:
            super()._reset_parameters()  # called by nn.MultiheadAttention's constructor
            return
        for name, layer in self.projections().items():
            if name != "out_proj" and isinstance(layer, SparseLayer):
                layer.set_dense_weight(nn.init.xavier_uniform_(layer.weight.new_empty(layer.pattern.shape)))
                layer.scale_to_fan_in_()
            elif name != "out_proj":
                nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        for bias in (self.bias_k, self.bias_v):
            if bias is not None:
                nn.init.xavier_normal_(bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As of ``nn.MultiheadAttention``.

        Raises:
            ValueError: for nested tensors, which the dense module takes in evaluation only.
        """
        if isinstance(query, Proxy):  # under torch.fx symbolic tracing: a call of the module as a whole
            options = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
            tracer: Any = query.tracer
            return tracer.create_proxy("call_module", tracer.path_of_module(self), (query, key, value, *options), {})
        if query.is_nested or key.is_nested or value.is_nested:
            raise ValueError(
                "SparseMultiheadAttention takes no nested tensors: pass padded ones (x.to_padded_tensor(0.0)) and a "
                "key_padding_mask that is True at the padding."
            )
        check: Any = F._mha_shape_check  # type: ignore[attr-defined]
        batched = check(query, key, value, key_padding_mask, attn_mask, self.num_heads)
        padding = F._canonical_mask(
            key_padding_mask, "key_padding_mask", F._none_or_dtype(attn_mask), "attn_mask", query.dtype
        )
        mask = F._canonical_mask(attn_mask, "attn_mask", None, "", query.dtype, False)
        if is_causal and mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint, as nn.MultiheadAttention does.")
        if is_causal and padding is None and not need_weights:
            mask = None  # the hint says it all
        else:
            is_causal = False

        q, k, v = (self._heads(part, batched) for part in self._project(query, key, value))
        if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3]:
            raise ValueError(
                "Expected queries, keys and values of one batch, and a value for each key, got "
                f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}."
            )
        mask = self._merged_mask(mask, padding, q, k)
        if self.bias_k is not None and self.bias_v is not None:
            k, v = torch.cat([k, self._bias(self.bias_k, k)], 2), torch.cat([v, self._bias(self.bias_v, v)], 2)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        added = int(self.bias_k is not None) + int(self.add_zero_attn)
        if mask is not None and added:
            mask = F.pad(mask, (0, added))  # they are seen by all

        dropout, weights = self.dropout if self.training else 0.0, None
        if need_weights:
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = F.dropout(weights, dropout) if dropout else weights
            attended = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            attended = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        if not batched:
            attended = attended.squeeze(0).transpose(0, 1)
        else:
            attended = attended.transpose(1, 2) if self.batch_first else attended.permute(2, 0, 1, 3)
        return self.out_proj(attended.flatten(-2)), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> Sequence[Tensor]:
        """Queries, keys and values ``[..., embed_dim]``."""
        if query.shape[-1] != self.embed_dim:
            raise ValueError(f"Expected queries of {self.embed_dim} features, got {query.shape[-1]}.")
        if "in_proj" not in self._modules:
            return self.q_proj(query), self.k_proj(key), self.v_proj(value)
        of_query = self.in_proj(query).chunk(3, -1)
        of_key = of_query if key is query else self.in_proj(key).chunk(3, -1)
        of_value = of_query if value is query else of_key if value is key else self.in_proj(value).chunk(3, -1)
        return of_query[0], of_key[1], of_value[2]

    def _heads(self, projected: Tensor, batched: bool) -> Tensor:
        """``[N, heads, time, head_dim]`` of ``[..., embed_dim]``."""
        split = projected.unflatten(-1, (self.num_heads, self.head_dim))
        if not batched:
            return split.transpose(0, 1).unsqueeze(0)
        return split.transpose(1, 2) if self.batch_first else split.permute(1, 2, 0, 3)

    def _bias(self, bias: Tensor, like: Tensor) -> Tensor:
        """A learned key or value ``[1, 1, embed_dim]``, for every sample."""
        return bias.view(1, self.num_heads, 1, self.head_dim).expand(like.shape[0], -1, -1, -1)

    def _merged_mask(self, mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """What is added to the scores, of a shape that broadcasts to ``[N, heads, queries, keys]``."""
        batch, _, queries, _ = q.shape
        keys = k.shape[2]
        if mask is not None:
            expected = (queries, keys) if mask.dim() == 2 else (batch * self.num_heads, queries, keys)
            if tuple(mask.shape) != expected:
                raise RuntimeError(f"Expected an attn_mask of shape {expected}, got {tuple(mask.shape)}.")
            mask = mask if mask.dim() == 2 else mask.view(batch, self.num_heads, queries, keys)
        if padding is None:
            return mask
        padding = padding.view(batch, 1, 1, keys)
        return padding if mask is None else mask + padding

    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict.update(projections_state(self, state_dict, prefix))
        super()._load_from_state_dict(state_dict, prefix, *args)


def split_projections_(module: Any, separate: bool = False) -> None:
    """Turns a dense module, in place, into a :class:`SparseMultiheadAttention` whose projections are dense layers.

    Its parameters stay the same objects, unless they are parted into q_proj, k_proj and v_proj.
    """
    parameters = module._parameters
    names = ("in_proj",) if module._qkv_same_embed_dim and not separate else _SEPARATE
    weight, bias = parameters["in_proj_weight"], parameters["in_proj_bias"]
    weights = [parameters[f"{name}_weight"] for name in names] if weight is None else _parts(weight, len(names))
    biases = [None] * len(names) if bias is None else _parts(bias, len(names))
    layers: dict[str, nn.Module] = {}
    for name, own, own_bias in zip(names, weights, biases, strict=True):
        layer: Any = nn.Linear(own.shape[1], own.shape[0], own_bias is not None, device="meta")
        layer.weight, layer.bias = own, own_bias
        layers[name] = layer.train(module.training)
    for name in _DENSE_ONLY:
        parameters[name] = None  # absent: those who look see it, as torch's fused paths do
    module._modules = layers | module._modules
    module.out_proj.__class__ = nn.Linear
    module.__class__ = SparseMultiheadAttention


def join_projections_(module: Any) -> Any:
    """Turns a module whose projections are dense layers again, in place, into an ``nn.MultiheadAttention``."""
    layers = [module._modules.pop(name) for name in ("in_proj", *_SEPARATE) if name in module._modules]
    bias = layers[0].bias
    if bias is not None and len(layers) > 1:
        bias = _copied(torch.cat([layer.bias for layer in layers]), bias)
    if len(layers) == 1:
        module.in_proj_weight = layers[0].weight
    elif module._qkv_same_embed_dim:
        module.in_proj_weight = _copied(torch.cat([layer.weight for layer in layers]), layers[0].weight)
    else:
        for name, layer in zip(_SEPARATE, layers, strict=True):
            setattr(module, f"{name}_weight", layer.weight)
    module.in_proj_bias = bias
    module.out_proj.__class__ = NonDynamicallyQuantizableLinear
    module.__class__ = nn.MultiheadAttention
    return module


def projections_state(module: SparseMultiheadAttention, state: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The entries of a dense module's state under the names that they have here; they are taken out of ``state``."""
    found: dict[str, Any] = {}
    names = [name for name in module.projections() if name != "out_proj"]
    for kind in ("weight", "bias"):
        whole = state.pop(f"{prefix}in_proj_{kind}", None)
        parts = [whole] if whole is None or len(names) == 1 else whole.chunk(3)
        if whole is not None:
            found |= {f"{prefix}{name}.{kind}": part for name, part in zip(names, parts, strict=True)}
    for name in names:
        if (weight := state.pop(f"{prefix}{name}_weight", None)) is not None:
            found[f"{prefix}{name}.weight"] = weight
    return found


def dense_state(module: SparseMultiheadAttention, state: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The other way round: entries as the dense module names them, taken out of ``state``, whose weights are dense."""
    found: dict[str, Any] = {}
    names = [name for name in module.projections() if name != "out_proj"]
    for kind in ("weight", "bias"):
        parts = [state.pop(f"{prefix}{name}.{kind}", None) for name in names]
        if parts[0] is None:
            continue
        if kind == "weight" and not module._qkv_same_embed_dim:
            found |= {f"{prefix}{name}_weight": part for name, part in zip(names, parts, strict=True)}
        else:
            found[f"{prefix}in_proj_{kind}"] = parts[0] if len(parts) == 1 else torch.cat(parts)
    return found


def _parts(parameter: nn.Parameter, count: int) -> list[nn.Parameter]:
    return [parameter] if count == 1 else [_copied(part, parameter) for part in parameter.chunk(count)]


def _copied(tensor: Tensor, like: nn.Parameter) -> nn.Parameter:
    """A new parameter with the attributes of the one that it comes from."""
    made = nn.Parameter(tensor.detach().clone(), requires_grad=like.requires_grad)
    made.__dict__.update(like.__dict__)
    return made
