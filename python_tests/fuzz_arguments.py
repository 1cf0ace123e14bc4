"""Arguments for the raw ops, from a random generator: valid ones, wrong ones, damaged ones (fuzz_ops.py)."""

import torch
from fuzz_references import FLOATS, acc_type, active_blocks, grid_of, pattern_of


def tensors_of(arguments) -> list[torch.Tensor]:
    values = [t for a in arguments for t in (a if isinstance(a, list) else [a])]
    return [t for t in values if isinstance(t, torch.Tensor)]


def is_freed(tensor) -> bool:
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.numel() == 0 or tensor._is_zerotensor():
        return False
    last = tensor.storage_offset() + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.untyped_storage().nbytes() < (last + 1) * tensor.element_size()


def copies(arguments):
    def copy(value):
        if isinstance(value, list):
            return [copy(v) for v in value]
        return value if not isinstance(value, torch.Tensor) or is_freed(value) else value.resolve_neg().clone()

    return copy(arguments)


def in_memory(arguments):
    """With real zeros in place of torch's zero tensors, which many of its own ops cannot read."""

    def make(value):
        if isinstance(value, list):
            return [make(v) for v in value]
        zeros = isinstance(value, torch.Tensor) and value.layout == torch.strided and value._is_zerotensor()
        return torch.zeros(value.shape, dtype=value.dtype) if zeros else value

    return make(arguments)


# ---- valid ----------------------------------------------------------------------------------------------


def laid_out(rng, tensor):
    """The same values, at times with other strides or an offset."""
    if tensor.dim() == 0:
        return tensor
    way = rng.choice(["plain", "plain", "plain", "offset", "strided", "transposed", "expanded"])
    if way == "offset":
        flat = torch.empty(tensor.numel() + 3, dtype=tensor.dtype)[3:].view(tensor.shape)
        return flat.copy_(tensor)
    if way == "strided":
        return torch.empty(*tensor.shape[:-1], tensor.shape[-1] * 2, dtype=tensor.dtype)[..., ::2].copy_(tensor)
    if way == "transposed" and tensor.dim() > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if way == "expanded" and tensor.shape[0] > 0:
        return tensor[:1].expand_as(tensor)
    return tensor


def numbers(rng, *sizes, dtype=torch.float32):
    scale = rng.choice([1.0, 1.0, 1e-3, 30.0])
    return (torch.randn(*sizes, dtype=torch.float64) * scale).to(dtype)


def make_pattern(rng, shape, block):
    """crow, col, ccol, row, perm of random active blocks."""
    rows, columns = grid_of(shape, block)
    density = rng.choice([0.0, 0.03, 0.1, 0.3, 0.6, 1.0])
    active = torch.rand(rows, columns) < density
    if rng.random() < 0.3:
        active[torch.rand(rows) < 0.3] = rng.random() < 0.5  # rows that are empty, or full
    return pattern_of(active.view(-1).nonzero().squeeze(1), rows, columns)


def pick_block(rng, out, inp):
    """A block, and sizes that it divides."""
    b = rng.choice([1, 1, 1, 2, 3, 4, 8])
    block = rng.choice([[1, 1], [b, 1], [b, b]])
    return block, max(1, out // block[0]) * block[0], max(1, inp // block[1]) * block[1]


def linear_sizes(rng):
    big = rng.random() < 0.1
    return rng.randint(1, 200 if big else 40), rng.randint(1, 700 if big else 50)


def make_shape(rng):
    block, out, inp = pick_block(rng, *linear_sizes(rng))
    if rng.random() < 0.5:
        return [out, inp], block
    return [out, inp, rng.randint(1, 3), rng.randint(1, 3)], block


def make_weight(rng, shape, block, col, dtype):
    if rng.random() < 0.4:
        return laid_out(rng, numbers(rng, *shape, dtype=dtype))
    sizes = [len(col)] if block == [1, 1] else [len(col), *block]
    return laid_out(rng, numbers(rng, *sizes, dtype=dtype))


def make_pack(rng):
    shape, block = make_shape(rng)
    crow, col, *_ = make_pattern(rng, shape, block)
    return [laid_out(rng, any_numbers(rng, *shape)), crow, col, block]


def any_numbers(rng, *sizes):
    dtype = rng.choice(
        [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.uint8, torch.bool]
    )
    return (torch.randn(*sizes, dtype=torch.float64) * 9).abs().to(dtype)


def make_unpack(rng):
    shape, block = make_shape(rng)
    crow, col, *_ = make_pattern(rng, shape, block)
    sizes = [len(col)] if block == [1, 1] else [len(col), *block]
    return [laid_out(rng, any_numbers(rng, *sizes)), crow, col, shape, block]


def make_keep_active(rng):
    dense, *rest = make_pack(rng)
    return [dense.contiguous() if 0 in dense.stride() else dense, *rest]


def make_linear(rng):
    block, out, inp = pick_block(rng, *linear_sizes(rng))
    shape, dtype = [out, inp], rng.choice(FLOATS)
    pattern = make_pattern(rng, shape, block)
    lead = rng.choice([[], [1], [2], [5], [8], [9], [16], [17], [63], [64], [65], [130], [2, 3], [0], [3, 1, 2]])
    weight = make_weight(rng, shape, block, pattern[1], dtype)
    few = len(lead) == 0 or (len(lead) == 1 and lead[0] <= 8)
    if few and block == [1, 1] and weight.dim() == 1 and dtype != torch.bfloat16 and rng.random() < 0.5:
        pattern[1] = pattern[1].to(torch.int16)
    bias = laid_out(rng, numbers(rng, out, dtype=dtype)) if rng.random() < 0.5 else None
    return [laid_out(rng, numbers(rng, *lead, inp, dtype=dtype)), weight, bias, *pattern, shape, block]


def make_linear_backward(rng):
    input, weight, _, crow, col, *rest = make_linear(rng)
    grad = laid_out(rng, numbers(rng, *input.shape[:-1], rest[3][0], dtype=input.dtype))
    return [grad, input, weight, crow, col.to(torch.int32), *rest, [rng.random() < 0.7 for _ in range(3)]]


def make_conv(rng):
    groups = rng.choice([1, 1, 1, 2, 3])
    block, out, inp = pick_block(rng, rng.randint(1, 24), rng.randint(1, 24))
    shape, dtype = [out * groups, inp, rng.choice([1, 3, 2, 4]), rng.choice([1, 3, 2])], rng.choice(FLOATS)
    pattern = make_pattern(rng, shape, block)
    stride = [rng.choice([1, 1, 1, 2, 3]) for _ in range(2)]
    padding = [rng.choice([0, 1, 1, 2, 4]) for _ in range(2)]
    dilation = [rng.choice([1, 1, 1, 2]) for _ in range(2)]
    sizes = [
        max(shape[2 + i] * dilation[i] - 2 * padding[i], rng.choice([0, 1, 1, 1])) + rng.choice([0, 1, 3, 7, 8, 15, 16])
        for i in range(2)
    ]
    input = numbers(rng, rng.choice([0, 1, 1, 2, 4, 5, 17]), inp * groups, *sizes, dtype=dtype)
    if rng.random() < 0.3:
        input = input.contiguous(memory_format=torch.channels_last)
    weight = make_weight(rng, shape, block, pattern[1], dtype)
    bias = laid_out(rng, numbers(rng, shape[0], dtype=dtype)) if rng.random() < 0.5 else None
    return [laid_out(rng, input), weight, bias, *pattern, shape, block, stride, padding, dilation, groups]


def make_conv_backward(rng):
    input, weight, _, *rest = make_conv(rng)
    shape, _, stride, padding, dilation, _ = rest[5:]
    out = [
        (input.shape[2 + i] + 2 * padding[i] - dilation[i] * (shape[2 + i] - 1) - 1) // stride[i] + 1 for i in range(2)
    ]
    grad = numbers(rng, input.shape[0], shape[0], *out, dtype=input.dtype)
    return [laid_out(rng, grad), input, weight, *rest, [rng.random() < 0.7 for _ in range(3)]]


def make_scores(rng, n=None):
    n = n if n is not None else rng.choice([0, 1, 7, 63, 64, 65, 500, 3000, 20_000])
    scores = torch.randn(n, dtype=rng.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16]))
    if rng.random() < 0.3 and n:
        scores = (scores * 2).round()  # ties
    if rng.random() < 0.3 and n:
        for _ in range(3):
            scores[rng.randrange(n)] = rng.choice([float("nan"), float("inf"), -float("inf"), -0.0])
    return scores


def make_topk(rng):
    scores = laid_out(rng, make_scores(rng))
    return [scores, rng.randint(0, len(scores)), rng.random() < 0.5, rng.random() < 0.5]


def make_topk_many(rng):
    scores = [laid_out(rng, make_scores(rng)) for _ in range(rng.randint(1, 4))]
    return [scores, [rng.randint(0, len(s)) for s in scores], rng.random() < 0.5, rng.random() < 0.5]


def make_above(rng):
    scores = make_scores(rng)
    return [scores.double() if scores.dtype == torch.bfloat16 else scores, rng.choice([0.0, 0.5, -1.0, 2.0])]


def draw(rng, n, k):
    return torch.tensor(sorted(rng.sample(range(n), k)), dtype=torch.int64)


def make_exclude(rng):
    rows, columns = rng.randint(1, 40), rng.randint(1, 60)
    crow, col, *_ = make_pattern(rng, [rows, columns], [1, 1])
    active = active_blocks(crow, col, rows, columns)
    dropped = active[draw(rng, len(active), rng.randint(0, len(active)))]
    first = rng.randint(0, rows * columns)
    scores = make_scores(rng, rng.randint(0, rows * columns - first))
    scores = scores.double() if scores.dtype == torch.bfloat16 else scores
    return [scores, first, crow, col, dropped, columns]


def make_growth(rng):
    rows, columns = rng.randint(1, 40), rng.randint(1, 60)
    crow, col, *_ = make_pattern(rng, [rows, columns], [1, 1])
    active = active_blocks(crow, col, rows, columns)
    dropped = active[draw(rng, len(active), rng.randint(0, len(active)))]
    dense = make_scores(rng, rows * columns).view(rows, columns)
    dense = dense.double() if dense.dtype == torch.bfloat16 else dense
    return [dense, rng.randint(0, rows * columns - len(active) + len(dropped)), crow, col, dropped]


def make_places(rng):
    rows, columns = rng.randint(1, 40), rng.randint(1, 60)
    crow, col, *_ = make_pattern(rng, [rows, columns], [1, 1])
    return [crow, col, draw(rng, len(col), rng.randint(0, len(col))), columns]


def make_prune_grow(rng):
    shape, block = make_shape(rng)
    pattern = make_pattern(rng, shape, block)
    rows, columns = grid_of(shape, block)
    active = active_blocks(*pattern[:2], rows, columns)
    k = rng.randint(0, len(active))
    dropped = active[draw(rng, len(active), k)]
    kept = torch.ones(rows * columns, dtype=torch.bool)
    kept[active] = False
    kept[dropped] = True
    free = kept.nonzero().squeeze(1)
    grown = free[draw(rng, len(free), k)]
    weight = make_weight(rng, shape, block, pattern[1], rng.choice(FLOATS))
    weight = weight.contiguous() if weight.shape != torch.Size(shape) or 0 in weight.stride() else weight
    states = [
        torch.randn(weight.shape).to(rng.choice([torch.float32, torch.float64, torch.bfloat16, torch.uint8]))
        for _ in range(rng.randint(0, 2))
    ]
    return [weight, states, *pattern, dropped, grown, shape, block]


def make_batch_norm(rng):
    sizes = [rng.choice([2, 3, 8, 17]), rng.choice([1, 2, 3, 16, 33])]
    sizes += rng.choice([[], [1], [3], [1, 1], [2, 3], [4, 4], [7, 9], [16, 17]])
    x = torch.randn(sizes) * rng.choice([1.0, 1e-3, 100.0]) + rng.choice([0.0, 1.0, 1000.0])
    weight = torch.randn(sizes[1]) if rng.random() < 0.7 else None
    bias = torch.randn(sizes[1]) if rng.random() < 0.7 else None
    return [laid_out(rng, x), weight, bias, rng.choice([1e-5, 1e-3, 0.1])]


def make_batch_norm_backward(rng):
    x, weight, bias, eps = make_batch_norm(rng)
    dims = [d for d in range(x.dim()) if d != 1]
    mean, variance = x.double().mean(dims), x.double().var(dims, correction=0)
    saved = torch.stack([mean, (variance + eps).rsqrt(), torch.zeros_like(mean) if bias is None else bias.double()])
    return [laid_out(rng, torch.randn(x.shape)), x, weight, saved, [rng.random() < 0.7 for _ in range(3)]]


def make_loss(rng):
    n, classes = rng.choice([0, 1, 3, 31, 32, 33, 70]), rng.choice([2, 3, 5, 11, 16, 17, 33, 130, 1500])
    dtype = rng.choice([*FLOATS, torch.float16])
    logits = torch.randn(n, classes, dtype=torch.float64) * rng.choice([1.0, 4.0, 20.0])
    if rng.random() < 0.2:
        logits = logits.round()  # ties
    target = torch.randint(classes, (n,))
    if rng.random() < 0.3 and n:
        for _ in range(3):
            i = rng.randrange(n)
            logits[i, rng.choice([0, classes - 1, int(target[i]), rng.randrange(classes)])] = -float("inf")
    alpha = torch.tensor(rng.choice([0.0, 0.0, 0.5, 1.0, 3.0, 1e4, 1e6]), dtype=acc_type(dtype))
    return [laid_out(rng, logits.to(dtype)), target, alpha, rng.choice([1.0, 0.5, 0.0, 2.0]), rng.randrange(3)]


def make_loss_backward(rng):
    logits, target, alpha, weight, reduction = make_loss(rng)
    saved = torch.ops.uasparse.unknown_aware_loss(logits, target, alpha, weight, reduction)[2]
    grad = torch.randn(len(logits) if reduction == 0 else (), dtype=acc_type(logits.dtype))
    return [grad, logits, target, alpha, saved, weight, reduction]


# ---- wrong, damaged ------------------------------------------------------------------------------------------------

INTS = (0, -1, 1, 2, 3, 7, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, -(2**63))


def make_wrong(name, rng, arguments) -> str:
    """Changes one of the arguments; says what."""
    i = rng.randrange(len(arguments))
    argument = arguments[i]
    if argument is None:
        kind = getattr(torch.ops.uasparse, name).default._schema.arguments[i].type
        argument = torch.randn(rng.choice([0, 1, 5])) if "Tensor" in str(kind) else 1.0
    if isinstance(argument, torch.Tensor):
        how, arguments[i] = wrong_tensor(rng, argument, [a for a in arguments if isinstance(a, torch.Tensor)])
    elif isinstance(argument, bool):
        how, arguments[i] = "flipped", not argument
    elif isinstance(argument, int):
        how, arguments[i] = "int", rng.choice(INTS)
    elif isinstance(argument, float):
        how, arguments[i] = "float", rng.choice([0.0, -1.0, float("nan"), float("inf"), 1e30])
    elif argument and isinstance(argument[0], torch.Tensor):
        how, j = "list", rng.randrange(len(argument))
        changed = wrong_tensor(rng, argument[j], argument)[1]
        arguments[i] = rng.choice(
            [argument[:-1], [*argument, argument[0]], [*argument[:j], changed, *argument[j + 1 :]]]
        )
    else:
        ints = [a for a in argument if not isinstance(a, bool)]
        value = rng.choice(INTS) if ints or not argument else True
        j = rng.randrange(len(argument)) if argument else 0
        how, arguments[i] = (
            "list",
            rng.choice(
                [
                    [],
                    argument[:-1],
                    [*argument, value],
                    [*argument[:j], value, *argument[j + 1 :]],
                    [*argument[:j], value, *argument[j + 1 :]],
                    argument[::-1],
                ]
            ),
        )
    return f"argument {i}: {how}"


def wrong_tensor(rng, tensor, others):
    how = rng.choice(
        [
            "dtype",
            "dim",
            "flat",
            "shorter",
            "longer",
            "empty",
            "strided",
            "expanded",
            "freed",
            "cut",
            "meta",
            "sparse",
            "other",
            "scalar",
            "complex",
            "transposed",
            "zero",
            "negative",
            "misaligned",
        ]
    )
    if is_freed(tensor):
        return "freed", tensor
    try:
        return how, change(rng, how, tensor, others)
    except (RuntimeError, IndexError):  # this tensor cannot be changed so
        return "another", torch.zeros(3, dtype=tensor.dtype)


def change(rng, how, tensor, others):
    if how == "dtype":
        return tensor.to(
            rng.choice(
                [
                    torch.float16,
                    torch.bool,
                    torch.int64,
                    torch.int32,
                    torch.int16,
                    torch.float64,
                    torch.float32,
                    torch.bfloat16,
                    torch.uint8,
                ]
            )
        )
    if how == "dim":
        return tensor.unsqueeze(rng.choice([0, -1]))
    if how == "flat":
        return tensor.reshape(-1)
    if how == "shorter":
        return tensor[..., :-1]
    if how == "longer":
        return torch.cat([tensor, tensor[:1]])
    if how == "empty":
        return tensor.new_empty(0)
    if how == "strided":
        return torch.stack([tensor, tensor], -1)[..., 0]
    if how == "expanded":
        return tensor[:1].expand_as(tensor)
    if how in ("freed", "cut"):
        tensor = tensor.clone()
        tensor.untyped_storage().resize_(0 if how == "freed" else tensor.untyped_storage().nbytes() // 2)
        return tensor
    if how == "meta":
        return tensor.to("meta")
    if how == "sparse":
        return tensor.to_sparse()
    if how == "other":
        return rng.choice(others)
    if how == "scalar":
        return tensor.reshape(-1)[0]
    if how == "complex":
        return torch.complex(tensor.double(), tensor.double())
    if how == "transposed":
        return tensor.transpose(0, -1)
    if how == "zero":
        return torch._efficientzerotensor(tensor.shape, dtype=tensor.dtype)
    if how == "misaligned" and tensor.numel() > 0 and not tensor.is_complex():  # torch itself crashes on those
        memory = torch.empty(tensor.nbytes + 1, dtype=torch.uint8).numpy()
        return torch.frombuffer(memory, dtype=tensor.dtype, offset=1).view(tensor.shape).copy_(tensor)
    if how == "misaligned" or tensor.dtype == torch.bool:
        raise RuntimeError("has none")
    return torch._neg_view(tensor)


def make_damaged(name, arguments, written, rng, told) -> None:
    """Damages what an index tensor holds, in place; at times after a call that was right."""
    places = [
        i
        for i, a in enumerate(arguments)
        if isinstance(a, torch.Tensor)
        and a.dim() == 1
        and a.numel()
        and a.dtype in (torch.int32, torch.int16, torch.int64)
    ]
    if not places:
        told.append(make_wrong(name, rng, arguments))
        return
    if rng.random() < 0.5:
        own = copies(arguments) if written else list(arguments)
        getattr(torch.ops.uasparse, name)(*own)
        arguments[:] = [
            o if i in places and i not in written else a for i, (o, a) in enumerate(zip(own, arguments, strict=True))
        ]
        told.append("after a right call")
    for _ in range(rng.choice([1, 1, 1, 2])):
        i = rng.choice(places)
        if not is_freed(arguments[i]):
            told.append(f"argument {i}: {damage(rng, arguments, i)}")


def damage(rng, arguments, i) -> str:
    tensor = arguments[i]
    if 0 in tensor.stride():
        tensor = arguments[i] = tensor.clone()
    how = rng.choice(["one", "one", "swap", "noise", "reverse", "shift", "zeros", "freed", "repeat", "new", "others"])
    n, j = len(tensor), rng.randrange(len(tensor))
    info = torch.iinfo(tensor.dtype)
    extremes = [0, -1, 1, n - 1, n, n + 1, 7, info.min, info.max, int(tensor[j]) + 1, int(tensor[j]) - 1]
    if how == "one":
        tensor[rng.choice([0, -1, j])] = max(info.min, min(info.max, rng.choice(extremes)))
    elif how == "swap":
        k = rng.randrange(n)
        tensor[[j, k]] = tensor[[k, j]]
    elif how == "noise":
        tensor.random_(info.min, info.max)
    elif how == "reverse":
        tensor.copy_(tensor.flip(0))
    elif how == "shift":
        tensor.add_(rng.choice([1, -1]))
    elif how == "zeros":
        tensor.zero_()
    elif how == "repeat":
        tensor[1:] = tensor[:-1].clone()
    elif how == "others":  # ascending, in range as a list of places, and not those that belong there
        limit = min(max(n, rng.choice([1, 2, 8]) * (abs(int(tensor.max())) % 4096 + 1)), info.max)
        tensor.copy_(torch.randperm(limit)[:n].sort().values)
    elif how == "freed":
        arguments[i] = tensor.clone()
        arguments[i].untyped_storage().resize_(rng.choice([0, 2]))
    else:
        arguments[i] = tensor[torch.randperm(n)]
    return how
