"""What the raw ops must give: references in plain torch, in float64, from the arguments of a call alone (fuzz_ops.py).

Each returns what the op returns or writes: tensors that must be equal, or pairs of values and how far off they may be,
or None where any value will do. Refused where the op must raise.
"""

import math

import torch

FLOATS = (torch.float32, torch.float32, torch.float64, torch.bfloat16)


class Refused(Exception):
    """The reference has no value for these arguments: the op must raise."""


def acc_type(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def pattern_of(blocks, rows, columns):
    def offsets(index, n):
        return torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(index, minlength=n).cumsum(0)])

    row, col = blocks // columns, blocks % columns
    perm = torch.sort(col, stable=True).indices
    tensors = offsets(row, rows), col, offsets(col, columns), row[perm], perm
    return [t.to(torch.int32) for t in tensors]


def grid_of(shape, block):
    return shape[0] // block[0], shape[1] // block[1] * (shape[2] * shape[3] if len(shape) == 4 else 1)


def refuse(condition, text) -> None:
    if condition:
        raise Refused(text)


def check_block(shape, block):
    refuse(len(shape) not in (2, 4) or min(shape) < 1, f"shape {shape}")
    refuse(len(block) != 2 or min(block) < 1 or (block[1] != 1 and block[0] != block[1]), f"block {block}")
    refuse(shape[0] % block[0] or shape[1] % block[1], "block that does not divide")


def active_blocks(crow, col, rows, columns):
    """Flat indices of the active blocks; the tensors must be a pattern."""
    for t in (crow, col):
        refuse(t.dim() != 1 or t.device.type != "cpu" or t.layout != torch.strided, "index tensor of a kind")
        refuse(t.numel() and t.untyped_storage().nbytes() < t.numel() * t.element_size(), "freed")
    refuse(crow.dtype != torch.int32 or col.dtype not in (torch.int32, torch.int16), "dtype")
    crow, col = crow.long(), col.long() & 0xFFFF if col.dtype == torch.int16 else col.long()
    refuse(len(crow) != rows + 1 or crow[0] != 0 or crow[-1] != len(col) or (crow.diff() < 0).any(), "crow")
    row = torch.repeat_interleave(torch.arange(rows), crow.diff())
    blocks = row * columns + col
    refuse((col < 0).any() or (col >= columns).any() or (blocks.diff() <= 0).any(), "col")
    return blocks


def entries(blocks, shape, block):
    """Flat indices into the weight of the blocks' entries: [n, bh * bw]."""
    _, columns = grid_of(shape, block)
    positions = shape[2] * shape[3] if len(shape) == 4 else 1
    row, column = blocks // columns, blocks % columns
    channel, position = column // positions, column % positions
    out = row[:, None] * block[0] + torch.arange(block[0])
    inp = channel[:, None] * block[1] + torch.arange(block[1])
    return ((out[:, :, None] * shape[1] + inp[:, None, :]) * positions + position[:, None, None]).flatten(1)


def index_of(crow, col, shape, block):
    check_block(shape, block)
    return entries(active_blocks(crow, col, *grid_of(shape, block)), shape, block)


def packed_sizes(index, block):
    return [len(index)] if list(block) == [1, 1] else [len(index), *block]


def pack_reference(dense, crow, col, block):
    index = index_of(crow, col, list(dense.shape), block)
    return [dense.reshape(-1)[index].reshape(packed_sizes(index, block))]


def unpack_reference(values, crow, col, shape, block):
    index = index_of(crow, col, shape, block)
    dense = values.new_zeros(shape)
    refuse(values.numel() != index.numel(), "number of values")
    dense.view(-1)[index.view(-1)] = values.reshape(-1)
    return [dense]


def keep_active_reference(dense, crow, col, block):
    index = index_of(crow, col, list(dense.shape), block)
    mask = torch.zeros(dense.shape, dtype=torch.bool)
    mask.view(-1)[index.view(-1)] = True
    return [torch.where(mask, dense, torch.zeros_like(dense))]


def dense_weight(weight, index, shape, block):
    """The masked weight, in float64."""
    dense = torch.zeros(shape, dtype=torch.float64)
    if list(weight.shape) == list(shape):
        dense.view(-1)[index.view(-1)] = weight.reshape(-1)[index.view(-1)].double()
    else:
        refuse(list(weight.shape) != packed_sizes(index, block), "weight's shape")
        dense.view(-1)[index.view(-1)] = weight.reshape(-1).double()
    return dense


def stored(gradient, weight, index):
    """A dense gradient in the weight's storage."""
    values = gradient.reshape(-1)[index]
    if weight.shape != gradient.shape:
        return values.reshape(weight.shape)
    return torch.zeros_like(gradient).view(-1).index_put((index.view(-1),), values.view(-1)).view(gradient.shape)


def served(*tensors):
    dtype = tensors[0].dtype
    refuse(dtype not in FLOATS or any(t is not None and t.dtype != dtype for t in tensors), "dtypes")


def within(value, size, dtype, length):
    """A pair for judge(): `size` is what the sum of absolute terms is."""
    eps = torch.finfo(torch.float32 if dtype == torch.bfloat16 else dtype).eps
    bound = size * eps * (4 + 2 * length**0.5)
    return value, bound + (value.abs() * 2**-8 if dtype == torch.bfloat16 else 0) + 1e-37


def linear_reference(input, weight, bias, crow, col, ccol, row, perm, shape, block):
    served(input, weight, bias)
    index = index_of(crow, col, shape, block)
    refuse(len(shape) != 2, "shape")
    w, x = dense_weight(weight, index, shape, block), input.double()
    b = None if bias is None else bias.double()
    refuse(b is not None and list(b.shape) != shape[:1], "bias")
    size = torch.nn.functional.linear(x.abs(), w.abs(), None if b is None else b.abs())
    return [within(torch.nn.functional.linear(x, w, b), size, input.dtype, shape[1])]


def is_transposed(crow, col, ccol, row, perm, shape, block):
    rows, columns = grid_of(shape, block)
    expected = pattern_of(active_blocks(crow, col, rows, columns), rows, columns)
    return all(
        t.numel() == e.numel() and torch.equal(t, e) for t, e in zip((ccol, row, perm), expected[2:], strict=True)
    )


def linear_backward_reference(grad, input, weight, crow, col, ccol, row, perm, shape, block, mask):
    served(input, grad, weight)
    index = index_of(crow, col, shape, block)
    refuse(len(shape) != 2 or len(mask) != 3, "shape")
    refuse(list(grad.shape) != [*input.shape[:-1], shape[0]], "grad")
    w = dense_weight(weight, index, shape, block)
    dy, x = grad.double().reshape(-1, shape[0]), input.double().reshape(-1, shape[1])
    nothing = torch.zeros(0, dtype=torch.float64)
    dx = within((dy @ w).view(input.shape), (dy.abs() @ w.abs()).view(input.shape), input.dtype, shape[0])
    dw = [stored(g, weight, index) for g in (dy.T @ x, dy.abs().T @ x.abs())]
    dw, db = within(*dw, input.dtype, len(x)), within(dy.sum(0), dy.abs().sum(0), input.dtype, len(x))
    return [g if wanted else (nothing, nothing) for g, wanted in zip((dx, dw, db), mask, strict=True)]


def convolve(x, w, b, stride, padding, dilation, groups):
    if 0 in x.shape[2:]:  # torch wants pixels
        x, padding = torch.nn.functional.pad(x, [padding[1], padding[1], padding[0], padding[0]]), [0, 0]
    return torch.nn.functional.conv2d(x, w, b, stride, padding, dilation, groups)


def conv_reference(input, weight, bias, crow, col, ccol, row, perm, shape, block, stride, padding, dilation, groups):
    served(input, weight, bias)
    index = index_of(crow, col, shape, block)
    refuse(len(shape) != 4 or input.dim() != 4, "shape")
    refuse(any(len(v) != 2 for v in (stride, padding, dilation)), "pairs")
    w, x, b = dense_weight(weight, index, shape, block), input.double(), None if bias is None else bias.double()
    refuse(b is not None and list(b.shape) != shape[:1], "bias")
    refuse(groups < 1 or shape[0] % groups or shape[0] // groups % block[0], "groups")
    rest = (stride, padding, dilation, groups)
    size = convolve(x.abs(), w.abs(), None if b is None else b.abs(), *rest)
    return [within(convolve(x, w, b, *rest), size, input.dtype, w[0].numel())]


def conv_backward_reference(
    grad, input, weight, crow, col, ccol, row, perm, shape, block, stride, padding, dilation, groups, mask
):
    served(input, grad, weight)
    output = conv_reference(
        input, weight, None, crow, col, ccol, row, perm, shape, block, stride, padding, dilation, groups
    )[0][0]
    refuse(grad.shape != output.shape or len(mask) != 3, "grad")
    index = index_of(crow, col, shape, block)
    w = dense_weight(weight, index, shape, block)

    def gradients(x, w, dy):
        x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
        convolve(x, w, None, stride, padding, dilation, groups).backward(dy)
        return x.grad, w.grad, dy.sum((0, 2, 3))

    values = gradients(input.double(), w, grad.double())
    sizes = gradients(input.double().abs(), w.abs(), grad.double().abs())
    terms = (shape[0] * shape[2] * shape[3], output.numel() // shape[0], output.numel() // shape[0])
    pairs = [list(p) for p in zip(values, sizes, strict=True)]
    pairs[1] = [stored(g, weight, index) for g in pairs[1]]
    nothing = torch.zeros(0, dtype=torch.float64)
    return [
        within(*pair, input.dtype, n) if wanted else (nothing, nothing)
        for pair, n, wanted in zip(pairs, terms, mask, strict=True)
    ]


def topk_reference(scores, k, largest, magnitude=False):
    from uasparse_kernels.ops import topk_indices_reference

    refuse(scores.dim() != 1 or not 0 <= k <= len(scores) or not scores.is_floating_point(), "scores")
    return [topk_indices_reference(scores, k, largest=largest, magnitude=magnitude)]


def topk_many_reference(scores, k, largest, magnitude=False):
    refuse(len(scores) != len(k), "lengths")
    return [topk_reference(s, n, largest, magnitude)[0] for s, n in zip(scores, k, strict=True)]


def above_reference(scores, threshold):
    refuse(scores.dim() != 1 or scores.dtype not in (torch.float32, torch.float64), "scores")
    return [(scores > torch.tensor(threshold, dtype=torch.float64).to(scores.dtype)).nonzero().squeeze(1)]


def check_blocks(blocks, total):
    refuse(
        blocks.dtype != torch.int64 or blocks.dim() != 1 or blocks.untyped_storage().nbytes() < 8 * len(blocks),
        "blocks",
    )
    refuse(len(blocks) and (blocks[0] < 0 or blocks[-1] >= total or (blocks.diff() <= 0).any()), "blocks")


def exclude_reference(scores, first, crow, col, dropped, columns):
    rows = len(crow) - 1
    refuse(columns < 1 or first < 0 or first + len(scores) > rows * columns or scores.dim() != 1, "range")
    check_blocks(dropped, rows * columns)
    active = active_blocks(crow, col, rows, columns)
    kept = active[~torch.isin(active, dropped)] - first
    expected = scores.clone()
    expected[kept[(kept >= 0) & (kept < len(scores))]] = float("nan")
    return [(expected, 0)]


def growth_reference(dense, k, crow, col, dropped):
    rows, total = len(crow) - 1, dense.numel()
    refuse(rows < 1 or total % rows or total < rows or dense.dtype not in (torch.float32, torch.float64), "scores")
    check_blocks(dropped, total)
    active = active_blocks(crow, col, rows, total // rows)
    kept = active[~torch.isin(active, dropped)]
    refuse(not 0 <= k <= total - len(kept), "k")
    scores = dense.reshape(-1).abs().nan_to_num(nan=-math.inf, posinf=math.inf)
    scores[kept] = math.nan
    return topk_reference(scores, k, True, False)


def places_reference(crow, col, places, columns):
    refuse(columns < 1, "columns")
    check_blocks(places, len(col))
    return [active_blocks(crow, col, len(crow) - 1, columns)[places]]


def prune_grow_reference(weight, states, crow, col, ccol, row, perm, dropped, grown, shape, block):
    check_block(shape, block)
    rows, columns = grid_of(shape, block)
    active = active_blocks(crow, col, rows, columns)
    for blocks in (dropped, grown):
        check_blocks(blocks, rows * columns)
    refuse(len(dropped) != len(grown) or not torch.isin(dropped, active).all(), "dropped")
    kept = active[~torch.isin(active, dropped)]
    refuse(torch.isin(grown, kept).any(), "grown")
    now = torch.cat([kept, grown]).sort().values
    if torch.equal(dropped, grown):  # nothing changes, and nothing is written anew
        pattern = [t.clone() for t in (crow, col, ccol, row, perm)]
    else:
        pattern = pattern_of(now, rows, columns)
    # What is in both lists stays as it is.
    once = torch.cat([dropped[~torch.isin(dropped, grown)], grown[~torch.isin(grown, dropped)]])
    changed = entries(once, shape, block).view(-1)
    tensors = []
    for tensor in (weight, *states):
        refuse(tensor.shape != weight.shape, "states")
        if list(tensor.shape) == list(shape):
            expected = tensor.clone(memory_format=torch.contiguous_format)
            expected.view(-1)[changed] = 0
        else:
            values = tensor.new_zeros(rows * columns, block[0] * block[1])
            stays = torch.isin(active, kept) | torch.isin(active, grown)
            values[active[stays]] = tensor.reshape(len(active), block[0] * block[1])[stays]
            expected = values[now].view(tensor.shape)
        tensors.append(expected)
    return [*tensors, *pattern]


def batch_norm_reference(input, weight, bias, eps):
    refuse(input.dtype != torch.float32 or input.dim() < 2 or not eps > 0, "input")
    dims, shape = [d for d in range(input.dim()) if d != 1], [1, -1] + [1] * (input.dim() - 2)
    x = input.double()
    refuse(x.numel() <= x.shape[1], "one value a channel")
    for p in (weight, bias):
        refuse(p is not None and (p.dtype != torch.float32 or list(p.shape) != [x.shape[1]]), "parameter")
    mean, variance = x.mean(dims), x.var(dims, correction=0)
    rstd = (variance + eps).rsqrt()
    w = (torch.ones_like(mean) if weight is None else weight.double()) * rstd
    b = torch.zeros_like(mean) if bias is None else bias.double()
    y = (x - mean.view(shape)) * w.view(shape) + b.view(shape)
    # x - mean is rounded: a mean far above the deviation costs what its own rounding costs.
    size = (x.abs() + x.abs().mean(dims).view(shape)) * w.abs().view(shape) + b.abs().view(shape)
    count = x.numel() // x.shape[1]
    stats = torch.stack([mean, x.var(dims, correction=1)])
    saved = torch.stack([mean, rstd, b])
    far = 1e-6 * (1 + x.abs().amax(dims) ** 2 / (variance + eps))
    of_mean = 1e-6 * x.abs().mean(dims)
    return [
        (y, 8e-7 * size * (1 + far.amax()) + 1e-37),
        (stats, stats.abs() * (1e-5 + far * count / (count - 1)) + of_mean),
        (saved, saved.abs() * (1e-5 + far) + of_mean * torch.tensor([[1.0], [1.0], [0.0]])),
    ]


def batch_norm_backward_reference(grad, input, weight, saved, mask):
    refuse(any(t.dtype != torch.float32 for t in (grad, input)) or saved.dtype != torch.float64, "dtype")
    refuse(
        input.dim() < 2 or grad.shape != input.shape or list(saved.shape) != [3, input.shape[1]] or len(mask) != 3,
        "shapes",
    )
    refuse(input.numel() <= input.shape[1], "one value a channel")
    refuse(weight is not None and (weight.dtype != torch.float32 or list(weight.shape) != [input.shape[1]]), "weight")
    dims, shape = [d for d in range(input.dim()) if d != 1], [1, -1] + [1] * (input.dim() - 2)
    dy, x, (mean, rstd, _) = grad.double(), input.double(), saved
    n = x.numel() // x.shape[1]
    hat = (x - mean.view(shape)) * rstd.view(shape)
    db, dw = dy.sum(dims), (dy * hat).sum(dims)
    w = rstd if weight is None else weight.double() * rstd
    dx = w.view(shape) * (dy - db.view(shape) / n - hat * dw.view(shape) / n)
    rounded = (x.abs() + mean.abs().view(shape)) * rstd.abs().view(shape)  # of hat, in units of eps
    sums = (dy.abs() * (hat.abs() + rounded)).sum(dims)
    size = w.abs().view(shape) * (
        dy.abs() + dy.abs().sum(dims).view(shape) / n + (hat.abs() + rounded) * sums.view(shape) / n
    )
    nothing = torch.zeros(0, dtype=torch.float64)
    pairs = [(dx, 3e-6 * size + 1e-37), (dw, 3e-6 * sums + 1e-37), (db, 3e-6 * dy.abs().sum(dims) + 1e-37)]
    return [pair if wanted else (nothing, nothing) for pair, wanted in zip(pairs, mask, strict=True)]


def check_loss(logits, target, alpha, reduction):
    refuse(logits.dim() != 2 or logits.shape[1] < 2 or not logits.is_floating_point(), "logits")
    refuse(target.dtype != torch.int64 or list(target.shape) != [len(logits)] or alpha.numel() != 1, "target")
    refuse(len(target) and not (int(target.min()) >= 0 and int(target.max()) < logits.shape[1]), "range")
    refuse(reduction not in (0, 1, 2), "reduction")
    refuse(not alpha.is_floating_point(), "alpha")


def loss_parts(logits, target, alpha):
    """h, the weight w of the known, u, and how far w moves by rounding u; all in float64."""
    log_p = logits.double().log_softmax(1)
    h, u = -log_p.gather(1, target[:, None]).squeeze(1), log_p[:, -1].exp().clamp(max=1 - 1e-7)
    correct = logits.argmax(1) == target
    w = torch.where(correct, torch.ones_like(u), 1 + alpha / (1 + alpha * u))
    return h, w, u, (2 + log_p[:, -1].abs().nan_to_num(0, 0, 0).clamp(max=100))


def loss_reference(logits, target, alpha, unknown_weight, reduction):
    from uasparse_kernels.ops import unknown_aware_loss_reference

    check_loss(logits, target, alpha, reduction)
    if not alpha.reshape(()) >= 0:
        return [None] * 3  # near a pole
    eps = torch.finfo(acc_type(logits.dtype)).eps
    a = alpha.to(acc_type(logits.dtype)).double().reshape(())
    name = ("none", "mean", "sum")[reduction]
    loss, threshold = unknown_aware_loss_reference(
        logits.double(), target, a, unknown_weight=unknown_weight, reduction=name
    )
    h, w, _, off = loss_parts(logits, target, a)
    largest = logits.double().abs().nan_to_num(0, 0, 0).amax(1) if len(logits) else h
    w = torch.where(target == logits.shape[1] - 1, abs(unknown_weight), w)
    size = (w * (h * off + 1 + largest)).nan_to_num(0, 0, 0) * 16 * eps
    size = size if reduction == 0 else size.sum() / (max(1, len(size)) if reduction == 1 else 1)
    of_threshold = 64 * eps * (threshold.abs() + 1 + (largest.max() if len(largest) else 0))
    return [(loss, size + eps), (threshold, of_threshold), None]


def loss_backward_reference(grad, logits, target, alpha, saved, unknown_weight, reduction):
    from uasparse_kernels.ops import unknown_aware_loss_reference

    check_loss(logits, target, alpha, reduction)
    acc = acc_type(logits.dtype)
    refuse(saved.dtype != acc or saved.numel() != 2 * len(logits), "saved")
    refuse(grad.numel() != (len(logits) if reduction == 0 else 1) or not grad.is_floating_point(), "grad")
    forward = torch.ops.uasparse.unknown_aware_loss(logits, target, alpha, unknown_weight, reduction)
    if not alpha.reshape(()) >= 0 or not torch.equal(saved, forward[2]):
        return [None]  # the gradient of nothing: any will do
    eps, a = torch.finfo(acc).eps, alpha.to(acc).double().reshape(())
    z = logits.double().requires_grad_()
    losses, _ = unknown_aware_loss_reference(z, target, a, unknown_weight=unknown_weight, reduction="none")
    upstream = grad.double().reshape(-1).expand(len(logits)) / (max(1, len(logits)) if reduction == 1 else 1)
    (expected,) = torch.autograd.grad(losses, z, upstream)
    h, w, u, off = loss_parts(logits, target, a)
    through = (h * (a / (1 + a * u)) ** 2 * u).nan_to_num(0, 0, 0)
    known = target != logits.shape[1] - 1
    size = upstream.abs() * torch.where(known, w + through, torch.tensor(abs(unknown_weight), dtype=torch.float64))
    bound = 32 * eps * (size * (off + 4))[:, None] + 1e-37
    if logits.dtype in (torch.bfloat16, torch.float16):
        dtype = torch.finfo(logits.dtype)
        bound = bound + expected.abs() * dtype.eps + dtype.tiny
        bound = torch.where(expected.abs() + bound > dtype.max, torch.inf, bound)
    return [(expected, bound.expand_as(expected))]
