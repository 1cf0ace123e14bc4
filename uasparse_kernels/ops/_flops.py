"""What ``torch.utils.flop_counter.FlopCounterMode`` counts for the sparse products: two operations for each active
weight and each vector (or pixel) that it meets."""

from __future__ import annotations

import math

import torch
from torch.utils.flop_counter import register_flop_formula

from uasparse_kernels import _library


def _active(col_shape, block) -> int:
    return col_shape[0] * block[0] * block[1]


def _linear(input, weight, bias, crow, col, ccol, row, perm, shape, block, **_) -> int:
    return 2 * math.prod(input[:-1]) * _active(col, block)


def _linear_backward(grad, input, weight, crow, col, ccol, row, perm, shape, block, output_mask, **_) -> int:
    return 2 * math.prod(grad[:-1]) * _active(col, block) * sum(output_mask[:2])


def _conv2d(input, weight, bias, crow, col, ccol, row, perm, shape, block, *_, out_shape, **__) -> int:
    return 2 * out_shape[0] * math.prod(out_shape[2:]) * _active(col, block)


def _conv2d_backward(grad, input, weight, crow, col, ccol, row, perm, shape, block, *options, **_) -> int:
    output_mask = options[-1]
    return 2 * grad[0] * math.prod(grad[2:]) * _active(col, block) * sum(output_mask[:2])


if _library.compiled is not None:
    for _name, _formula in (
        ("masked_linear", _linear),
        ("masked_linear_backward", _linear_backward),
        ("masked_conv2d", _conv2d),
        ("masked_conv2d_backward", _conv2d_backward),
    ):
        register_flop_formula(getattr(torch.ops.uasparse, _name))(_formula)
