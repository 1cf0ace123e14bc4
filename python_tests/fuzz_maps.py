"""Arguments and references of the raw ops over feature maps, masks and dense scores (fuzz_ops.py)."""

import itertools

import torch
from fuzz_arguments import (
    any_numbers,
    laid_out,
    make_batch_norm,
    make_batch_norm_backward,
    make_pattern,
)
from fuzz_references import (
    batch_norm_backward_reference,
    batch_norm_reference,
    refuse,
)


def make_batch_norm_relu(rng):
    x, weight, bias, eps = make_batch_norm(rng)
    residual = laid_out(rng, torch.randn(x.shape)) if rng.random() < 0.5 else None
    return [x, weight, bias, residual, eps]


def batch_norm_relu_reference(input, weight, bias, residual, eps):
    (y, bound), *rest = batch_norm_reference(input, weight, bias, eps)
    refuse(residual is not None and (residual.dtype != torch.float32 or residual.shape != input.shape), "residual")
    if residual is not None:
        y, bound = y + residual.double(), bound + 2e-7 * (y.abs() + residual.double().abs())
    return [(y.relu(), bound), *rest]


def make_batch_norm_relu_backward(rng):
    dy, x, weight, saved, mask = make_batch_norm_backward(rng)
    ceiling = 0.75 if rng.random() < 0.5 else None
    output = laid_out(rng, torch.randn(x.shape).clamp(0, ceiling)) if rng.random() < 0.7 else None
    return [dy, x, weight, output, saved, [*mask, rng.random() < 0.7], None if output is None else ceiling]


def batch_norm_relu_backward_reference(grad, input, weight, output, saved, mask, ceiling=None):
    refuse(len(mask) != 4 or any(t.dtype != torch.float32 for t in (grad, input)) or input.dim() < 2, "dtype")
    refuse(grad.shape != input.shape or list(saved.shape) != [3, input.shape[1]], "shapes")
    refuse(saved.dtype != torch.float64, "saved")
    refuse(weight is not None and (weight.dtype != torch.float32 or list(weight.shape) != [input.shape[1]]), "weight")
    refuse(output is not None and (output.dtype != torch.float32 or output.shape != input.shape), "output")
    refuse(ceiling is not None and (output is None or not ceiling > 0), "ceiling")
    dims, shape = [d for d in range(input.dim()) if d != 1], [1, -1] + [1] * (input.dim() - 2)
    x, (mean, rstd, bias) = input.double(), saved
    unsure = torch.zeros(x.shape, dtype=torch.bool)
    if output is not None:
        gate = ~(output <= 0) if ceiling is None else ~((output <= 0) | (output >= ceiling))
    else:  # from x, rounded: near zero either will do
        w = (rstd if weight is None else weight.double() * rstd).view(shape)
        z = (x - mean.view(shape)) * w + bias.view(shape)
        size = (x.abs() + mean.abs().view(shape)) * w.abs() + bias.abs().view(shape)
        gate, unsure = ~(z <= 0), ~(z.abs() > 1e-6 * size)
    dy = torch.where(gate, grad, torch.zeros_like(grad))
    pairs = batch_norm_backward_reference(dy, input, weight, saved, [True] * 3)
    n, hat = x.numel() // x.shape[1], (x - mean.view(shape)).abs() * rstd.abs().view(shape)
    off = grad.double().abs() * unsure
    db, dw = off.sum(dims), (off * hat).sum(dims)
    w = rstd.abs() if weight is None else weight.double().abs() * rstd.abs()
    dx = w.view(shape) * (off + db.view(shape) / n + hat * dw.view(shape) / n)
    nothing = torch.zeros(0, dtype=torch.float64)
    results = [(value, bound + more) for (value, bound), more in zip(pairs, (dx, dw, db), strict=True)]
    results.append((dy.double(), off))
    return [pair if wanted else (nothing, nothing) for pair, wanted in zip(results, mask, strict=True)]


def make_batch_norm_backward_(rng):
    dy, x, weight, output, saved, mask, ceiling = make_batch_norm_relu_backward(rng)
    relu = rng.random() < 0.7
    return [dy.contiguous(), x, weight, output, saved, relu, [*mask[:3], mask[3] and relu], ceiling]


def batch_norm_backward_reference_(grad, input, weight, output, saved, relu, mask, ceiling=None):
    """What is written: the other results are those of the ops that write nothing."""
    refuse(len(mask) != 4 or not grad.is_contiguous() or (mask[3] and not relu), "mask, layout")
    refuse(output is not None and (output.dtype != torch.float32 or output.shape != input.shape), "output")
    if relu:
        found = batch_norm_relu_backward_reference(grad, input, weight, output, saved, mask, ceiling)
    else:
        found = batch_norm_backward_reference(grad, input, weight, saved, mask[:3])
    return [found[3] if mask[3] else found[0] if mask[0] else grad]


def make_max_pool(rng):
    sizes = [
        rng.choice([0, 1, 2, 3]),
        rng.choice([1, 2, 5]),
        rng.choice([1, 2, 7, 14, 33]),
        rng.choice([1, 2, 7, 15, 40]),
    ]
    x = torch.randn(sizes)
    if rng.random() < 0.4:
        x = x.round()  # ties
    if rng.random() < 0.2 and x.numel():
        for _ in range(3):
            x.view(-1)[rng.randrange(x.numel())] = rng.choice([float("nan"), float("inf"), -float("inf")])
    kernel = [rng.randint(1, 5) for _ in range(2)]
    padding = [rng.randint(0, k // 2) for k in kernel]
    kernel = [min(k, n + 2 * p) for k, n, p in zip(kernel, sizes[2:], padding, strict=True)]
    padding = [min(p, k // 2) for p, k in zip(padding, kernel, strict=True)]
    kernel = [min(k, n + 2 * p) for k, n, p in zip(kernel, sizes[2:], padding, strict=True)]
    return [laid_out(rng, x), kernel, [rng.choice([1, 2, 2, 3, 9]) for _ in range(2)], padding]


def max_pool_reference(input, kernel, stride, padding):
    refuse(input.dtype != torch.float32 or input.dim() != 4, "input")
    refuse(any(len(v) != 2 for v in (kernel, stride, padding)), "pairs")
    return list(torch.nn.functional.max_pool2d(input, kernel, stride, padding, return_indices=True))


def make_hash(rng):
    crow, col, *_ = make_pattern(rng, [rng.randint(1, 40), rng.randint(1, 60)], [1, 1])
    return [crow, col, rng.choice([0, 1, -1, 2**61 - 1, 2**63 - 1])]


def hash_reference(crow, col, seed):
    """Of what crow lists, in whole numbers."""
    refuse(any(t.dim() != 1 or t.dtype != torch.int32 for t in (crow, col)) or len(crow) < 1, "kind")
    starts, total = crow.tolist(), 0
    refuse(any(not 0 <= a <= b <= len(col) for a, b in itertools.pairwise(starts)), "crow")
    for r, (start, end) in enumerate(itertools.pairwise(starts)):
        for c in col[start:end].tolist():
            x = r * 2**31 + seed + c
            for factor, shift in ((0x9E3779B97F4A7C15, 30), (0xBF58476D1CE4E5B9, 27), (0x94D049BB133111EB, 31)):
                x = signed(x * factor)
                x ^= x >> shift
            total += x
    return [torch.tensor(signed(total))]


def signed(x):
    return (x + 2**63) % 2**64 - 2**63


def make_mask(rng):
    sizes = [rng.choice([0, 1, 3, 16, 65]) for _ in range(rng.randint(1, 3))]
    sizes = rng.choice([sizes, [3000], [7, 700]])
    mask = torch.rand(sizes) < rng.choice([0.0, 0.1, 0.5, 1.0])
    return [any_numbers(rng, *sizes), mask]


def masked(dense, mask):
    refuse(mask.dtype != torch.bool or mask.shape != dense.shape or dense.element_size() > 8, "mask")
    return torch.where(mask, dense, torch.zeros_like(dense))


def mask_reference(dense, mask):
    return [masked(dense, mask)]


def make_is_masked(rng):
    dense, mask = make_mask(rng)
    if rng.random() < 0.6:
        dense = masked(dense, mask)
        if rng.random() < 0.5 and dense.numel():
            dense.view(-1)[rng.randrange(dense.numel())] = 1
    return [dense, mask, rng.random() < 0.5]


def is_masked_reference(dense, mask, sampled):
    """In bits: -0.0 counts as written."""
    flat = [t.reshape(-1).clone(memory_format=torch.contiguous_format) for t in (dense, masked(dense, mask))]
    clean = torch.equal(*(t.view(torch.uint8) for t in flat))
    return [None if sampled and not clean and dense.numel() > 64 else torch.tensor(clean)]
