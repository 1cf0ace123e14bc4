"""Random calls of every raw op (``torch.ops.uasparse``): none may crash, hang or be wrong.

    python python_tests/fuzz_ops.py --seconds 600            under AddressSanitizer and UndefinedBehaviorSanitizer
    python python_tests/fuzz_ops.py --plain --seconds 60     the installed build
    python python_tests/fuzz_ops.py --isa avx2 --seed 123    one call again, with all that it was given

A call is made from its seed alone. There are three kinds: valid ones, whose results must be those of a float64 reference;
wrong arguments; and damaged contents of pattern tensors. The last two must raise and change nothing, or be right. Calls
run in batches in a child process, so that a crash costs its batch and is named by its seed. Ends with counts by op and
kind; exit code 1 if anything crashed, hung or was wrong.
"""

import argparse
import collections
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import torch

KINDS = ("valid", "wrong", "damaged")
CALL_SECONDS = 30
BATCH = 300
ERRORS = (ValueError, TypeError, RuntimeError, IndexError)  # NotImplementedError is a RuntimeError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--plain", action="store_true", help="the installed build, without sanitizers")
    parser.add_argument("--isa", help="one of portable, avx2, avx512 (default: all that this processor has)")
    parser.add_argument("--first", type=int, default=0, help="seed of the first call")
    parser.add_argument("--seed", type=int, help="this call alone")
    parser.add_argument("--ops", default="", help="of these ops alone, by commas")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve()
    isas = [options.isa] if options.isa else instruction_sets()
    if options.seed is not None:
        with Server(isas[-1], options.plain) as server:
            print(*server.run(options.seed, 1, options.ops, verbose=True), sep="\n")
            return 0
    return fuzz(isas, options.seconds, options.first, options.ops, options.plain)


def fuzz(isas: list[str], seconds: float, first: int, ops: str = "", plain: bool = False) -> int:
    """Calls of each instruction set in turn, until the time is over. The number of those that went wrong."""
    counts: collections.Counter = collections.Counter()
    bad: list[str] = []
    end = time.monotonic() + seconds
    for left, isa in zip(range(len(isas), 0, -1), isas, strict=True):
        until = time.monotonic() + (end - time.monotonic()) / left
        with Server(isa, plain) as server:
            while time.monotonic() < until:
                for outcome in server.run(first, BATCH, ops, until=until):
                    counts[outcome["op"], outcome["kind"], outcome["result"]] += 1
                    first = outcome["seed"] + 1
                    if outcome["result"] not in ("right", "raised"):
                        bad.append(f"{isa} seed {outcome['seed']} {outcome['op']} {outcome['kind']}: {outcome['result']}")
                        print(bad[-1], outcome.get("text", ""), flush=True)
    print_counts(counts)
    print(f"{sum(counts.values())} calls, {len(bad)} crashed or wrong; the next seed is {first}", *bad, sep="\n")
    return 1 if bad or not counts else 0


def print_counts(counts: collections.Counter) -> None:
    results = sorted({result for _, _, result in counts})
    print(f"{'op':28}{'kind':10}" + "".join(f"{result:>10}" for result in results))
    for op, kind in sorted({key[:2] for key in counts}):
        print(f"{op:28}{kind:10}" + "".join(f"{counts[op, kind, result]:10}" for result in results))


def instruction_sets() -> list[str]:
    flags = pathlib.Path("/proc/cpuinfo").read_text().split() if os.path.exists("/proc/cpuinfo") else []
    found = ["portable"]
    found += ["avx2"] if {"avx2", "fma"} <= set(flags) else []
    return found + (["avx512"] if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= set(flags) else [])


class Server:
    """A process that has imported the package and forks a child for each batch of calls."""

    def __init__(self, isa: str, plain: bool):
        environment = {**os.environ, "UASPARSE_CPU_ISA": isa}
        if not plain:
            import sanitized

            sanitized.build()
            environment = sanitized.environment(isa)
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        command = [sys.executable, __file__, "--serve"]
        self.process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()

    def run(self, first: int, count: int, ops: str, *, until: float | None = None, verbose: bool = False) -> list[dict]:
        order = {"first": first, "count": count, "ops": ops, "verbose": verbose}
        order["seconds"] = None if until is None else max(0.1, until - time.monotonic())
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"The server ended with {self.process.wait()}.")
        return json.loads(line)


def serve() -> int:
    """Reads orders, runs each in a forked child, answers with the outcomes."""
    import uasparse_kernels  # noqa: F401

    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        order = json.loads(line)
        with tempfile.TemporaryFile("w+") as log, tempfile.TemporaryFile("w+") as errors:
            child = os.fork()
            if child == 0:
                os.dup2(errors.fileno(), 2)
                run_batch(order, log)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            log.seek(0)
            outcomes = [json.loads(record) for record in log]
            if status != 0:
                errors.seek(0)
                how = "hung" if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM else "crashed"
                outcomes[-1] |= {"result": how, "text": errors.read()[-6000:]}
        answers.write(json.dumps([o for o in outcomes if "result" in o]) + "\n")
        answers.flush()
    return 0


def run_batch(order: dict, log) -> None:
    """Writes a line when a call begins (the last is the one that crashed) and one when it ended."""
    end = float("inf") if order["seconds"] is None else time.monotonic() + order["seconds"]
    names = [name for name in order["ops"].split(",") if name] or list(OPS)
    for seed in range(order["first"], order["first"] + order["count"]):
        if time.monotonic() > end:
            return
        outcome = {"seed": seed, "op": names[seed // 3 % len(names)], "kind": KINDS[seed % 3]}
        log.write(json.dumps(outcome) + "\n")
        log.flush()
        signal.alarm(CALL_SECONDS)
        outcome["result"], outcome["text"] = run_call(outcome["op"], outcome["kind"], seed, order["verbose"])
        signal.alarm(0)
        log.write(json.dumps(outcome) + "\n")


# ---- one call ------------------------------------------------------------------------------------------------------


class Refused(Exception):
    """The reference has no value for these arguments: the op must raise."""


def run_call(name: str, kind: str, seed: int, verbose: bool = False) -> tuple[str, str]:
    rng = random.Random(seed * 7919 + 1)
    torch.manual_seed(seed)
    make, reference, written = OPS[name]
    arguments = make(rng)
    told = []
    if kind == "wrong":
        for _ in range(rng.choice([1, 1, 1, 2])):
            told.append(make_wrong(rng, arguments))
    if kind == "damaged":
        make_damaged(name, arguments, written, rng, told)
    before = copies(arguments) if kind != "wrong" else None
    if verbose:
        print(name, kind, *told, *(describe(a) for a in arguments), sep="\n  ", file=sys.stderr)
    try:
        # The reference sees the arguments as they are before the op changes them.
        try:
            refuse(any(map(is_freed, tensors_of(arguments))), "freed")
            expected = reference(*arguments)
        except Exception as error:
            expected = error
        got = getattr(torch.ops.uasparse, name)(*arguments)
    except ERRORS as error:
        if kind == "valid":
            return "wrong", f"a valid call raised {type(error).__name__}: {error}"
        if "Error" in type(error).__name__ and "bad_alloc" in str(error):
            return "wrong", f"{told}: bad_alloc"
        if before is not None and not same(before, arguments):
            return "wrong", f"{told}: raised, but changed its arguments"
        return "raised", f"{told} {type(error).__name__}: {str(error).splitlines()[0][:300]}"
    if any(t.is_meta for t in tensors_of(arguments)):
        return "right", "a meta tensor among the arguments: there is no value"
    if isinstance(expected, Exception):
        return "wrong", f"{told}: accepted, but the reference says {type(expected).__name__}: {expected}"
    return judge(tensors_of([arguments[i] for i in written] if written else [list(got) if isinstance(got, (tuple, list)) else got]), expected, told)


def judge(results, expected, told) -> tuple[str, str]:
    """Each of the expected is a tensor (equal) or a pair: values in float64, and how far off they may be."""
    if len(results) != len(expected):
        return "wrong", f"{told}: {len(results)} results, expected {len(expected)}"
    for i, (result, want) in enumerate(zip(results, expected, strict=True)):
        if want is None:
            continue
        value, bound = want if isinstance(want, tuple) else (want, None)
        if result.shape != value.shape:
            return "wrong", f"{told}: result {i} of shape {tuple(result.shape)}, expected {tuple(value.shape)}"
        if bound is None:
            good = torch.equal(raw(result), raw(value))
        else:
            result, value = result.double(), value.double()
            off = (result - value).abs()
            good = bool(((off <= bound) | (result == value) | (result.isnan() & value.isnan())).all())
        if not good:
            return "wrong", f"{told}: result {i} is\n{result}\nexpected\n{value}\nwithin {bound}"
    return "right", str(told)


def raw(tensor):
    """Its bytes."""
    tensor = tensor.detach().resolve_neg().reshape(-1).clone(memory_format=torch.contiguous_format)
    return tensor.view(torch.uint8)


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
        return value.clone() if isinstance(value, torch.Tensor) and not is_freed(value) else value

    return copy(arguments)


def same(before, arguments) -> bool:
    pairs = zip(tensors_of(before), tensors_of(arguments), strict=True)
    return all(is_freed(b) or b.layout != torch.strided or b.is_meta or torch.equal(raw(a), raw(b)) for a, b in pairs)


def describe(argument) -> str:
    if isinstance(argument, list):
        return f"[{', '.join(map(describe, argument))}]"
    if not isinstance(argument, torch.Tensor):
        return repr(argument)
    text = f"{argument.dtype} {tuple(argument.shape)} strides {argument.stride() if argument.layout == torch.strided else ''}"
    small = argument.numel() <= 40 and argument.device.type == "cpu" and argument.layout == torch.strided
    return text + (f" {argument.tolist()}" if small and argument.untyped_storage().nbytes() else "")


# ---- arguments: valid ----------------------------------------------------------------------------------------------

FLOATS = (torch.float32, torch.float32, torch.float64, torch.bfloat16)


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


def pattern_of(blocks, rows, columns):
    def offsets(index, n):
        return torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(index, minlength=n).cumsum(0)])

    row, col = blocks // columns, blocks % columns
    perm = torch.sort(col, stable=True).indices
    tensors = offsets(row, rows), col, offsets(col, columns), row[perm], perm
    return [t.to(torch.int32) for t in tensors]


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
    dtype = rng.choice([torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int32, torch.int64,
                        torch.uint8, torch.bool])
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
    sizes = [max(shape[2 + i] * dilation[i] - 2 * padding[i], 1) + rng.choice([0, 1, 3, 7, 8, 15, 16]) for i in range(2)]
    input = numbers(rng, rng.choice([0, 1, 1, 2, 4, 5, 17]), inp * groups, *sizes, dtype=dtype)
    if rng.random() < 0.3:
        input = input.contiguous(memory_format=torch.channels_last)
    weight = make_weight(rng, shape, block, pattern[1], dtype)
    bias = laid_out(rng, numbers(rng, shape[0], dtype=dtype)) if rng.random() < 0.5 else None
    return [laid_out(rng, input), weight, bias, *pattern, shape, block, stride, padding, dilation, groups]


def make_conv_backward(rng):
    input, weight, _, *rest = make_conv(rng)
    shape, _, stride, padding, dilation, _ = rest[5:]
    out = [(input.shape[2 + i] + 2 * padding[i] - dilation[i] * (shape[2 + i] - 1) - 1) // stride[i] + 1 for i in range(2)]
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
    states = [torch.randn(weight.shape).to(rng.choice([torch.float32, torch.float64, torch.bfloat16, torch.uint8]))
              for _ in range(rng.randint(0, 2))]
    return [weight, states, *pattern, dropped, grown, shape, block]


def make_batch_norm(rng):
    sizes = [rng.choice([2, 3, 8, 17]), rng.choice([1, 2, 3, 16, 33])]
    sizes += rng.choice([[], [1], [3], [1, 1], [2, 3], [4, 4], [7, 9], [16, 17]])
    x = torch.randn(sizes) * rng.choice([1.0, 1e-3, 100.0]) + rng.choice([0.0, 1.0, 1000.0])
    weight = torch.randn(sizes[1]) if rng.random() < 0.7 else None
    bias = torch.randn(sizes[1]) if rng.random() < 0.7 else None
    return [laid_out(rng, x), weight, bias, rng.choice([1e-5, 1e-3, 0.1])]


def make_batch_norm_backward(rng):
    x, weight, _, eps = make_batch_norm(rng)
    dims = [d for d in range(x.dim()) if d != 1]
    mean, variance = x.double().mean(dims), x.double().var(dims, correction=0)
    saved = torch.stack([mean, (variance + eps).rsqrt()])
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


def acc_type(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def make_product(rng):
    crow, col, *_ = make_pattern(rng, [8, 9], [1, 1])
    return [torch.randn(3, 9), torch.randn(len(col)), None, crow, col, torch.empty(3, 8)]


def make_sampled(rng):
    crow, col, *_ = make_pattern(rng, [8, 9], [1, 1])
    return [torch.randn(3, 8), torch.randn(3, 9), crow, col]


# ---- arguments: wrong, damaged ----------------------------------------------------------------------------------------

INTS = (0, -1, 1, 2, 3, 7, 2**20 + 1, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, -(2**63))


def make_wrong(rng, arguments) -> str:
    """Changes one of the arguments; says what."""
    i = rng.randrange(len(arguments))
    argument = arguments[i]
    if argument is None:
        argument = torch.randn(rng.choice([0, 1, 5]))
    if isinstance(argument, torch.Tensor):
        how, arguments[i] = wrong_tensor(rng, argument, [a for a in arguments if isinstance(a, torch.Tensor)])
    elif isinstance(argument, bool):
        how, arguments[i] = "flipped", not argument
    elif isinstance(argument, int):
        how, arguments[i] = "int", rng.choice(INTS)
    elif isinstance(argument, float):
        how, arguments[i] = "float", rng.choice([0.0, -1.0, float("nan"), float("inf"), 1e300])
    elif argument and isinstance(argument[0], torch.Tensor):
        how, j = "list", rng.randrange(len(argument))
        changed = wrong_tensor(rng, argument[j], argument)[1]
        arguments[i] = rng.choice([argument[:-1], argument + [argument[0]], argument[:j] + [changed] + argument[j + 1 :]])
    else:
        ints = [a for a in argument if not isinstance(a, bool)]
        value = rng.choice(INTS) if ints or not argument else True
        j = rng.randrange(len(argument)) if argument else 0
        how, arguments[i] = "list", rng.choice([[], argument[:-1], [*argument, value],
                                               [*argument[:j], value, *argument[j + 1 :]],
                                               [*argument[:j], value, *argument[j + 1 :]], argument[::-1]])
    return f"argument {i}: {how}"


def wrong_tensor(rng, tensor, others):
    how = rng.choice(["dtype", "dim", "flat", "shorter", "longer", "empty", "strided", "expanded", "freed", "cut", "meta",
                      "sparse", "other", "scalar", "complex", "transposed", "zero", "negative"])
    try:
        return how, change(rng, how, tensor, others)
    except (RuntimeError, IndexError):  # this tensor cannot be changed so
        return "another", torch.zeros(3, dtype=tensor.dtype)


def change(rng, how, tensor, others):
    if how == "dtype":
        return tensor.to(rng.choice([torch.float16, torch.bool, torch.int64, torch.int32, torch.int16, torch.float64,
                                     torch.float32, torch.bfloat16, torch.uint8]))
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
    return torch._neg_view(tensor)


def make_damaged(name, arguments, written, rng, told) -> None:
    """Damages what an index tensor holds, in place; at times after a call that was right."""
    places = [i for i, a in enumerate(arguments)
              if isinstance(a, torch.Tensor) and a.dim() == 1 and a.numel() and a.dtype in (torch.int32, torch.int16, torch.int64)]
    if not places:
        told.append(make_wrong(rng, arguments))
        return
    if rng.random() < 0.5:
        own = copies(arguments) if written else list(arguments)
        getattr(torch.ops.uasparse, name)(*own)
        arguments[:] = [o if i in places and i not in written else a for i, (o, a) in enumerate(zip(own, arguments, strict=True))]
        told.append("after a right call")
    for _ in range(rng.choice([1, 1, 1, 2])):
        i = rng.choice(places)
        if not is_freed(arguments[i]):
            told.append(f"argument {i}: {damage(rng, arguments, i)}")


def damage(rng, arguments, i) -> str:
    tensor = arguments[i]
    how = rng.choice(["one", "one", "swap", "noise", "reverse", "shift", "zeros", "freed", "repeat", "new"])
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
    elif how == "freed":
        arguments[i] = tensor.clone()
        arguments[i].untyped_storage().resize_(rng.choice([0, 2]))
    else:
        arguments[i] = tensor[torch.randperm(n)]
    return how


# ---- references: from the arguments alone, in float64 ---------------------------------------------------------------


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
    return all(t.numel() == e.numel() and torch.equal(t, e) for t, e in zip((ccol, row, perm), expected[2:], strict=True))


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


def conv_reference(input, weight, bias, crow, col, ccol, row, perm, shape, block, stride, padding, dilation, groups):
    served(input, weight, bias)
    index = index_of(crow, col, shape, block)
    refuse(len(shape) != 4 or input.dim() != 4, "shape")
    refuse(any(len(v) != 2 for v in (stride, padding, dilation)), "pairs")
    w, x, b = dense_weight(weight, index, shape, block), input.double(), None if bias is None else bias.double()
    refuse(b is not None and list(b.shape) != shape[:1], "bias")
    refuse(groups < 1 or shape[0] % groups or shape[0] // groups % block[0], "groups")
    rest = (stride, padding, dilation, groups)
    size = torch.nn.functional.conv2d(x.abs(), w.abs(), None if b is None else b.abs(), *rest)
    return [within(torch.nn.functional.conv2d(x, w, b, *rest), size, input.dtype, w[0].numel())]


def conv_backward_reference(grad, input, weight, crow, col, ccol, row, perm, shape, block, stride, padding, dilation,
                            groups, mask):
    served(input, grad, weight)
    output = conv_reference(input, weight, None, crow, col, ccol, row, perm, shape, block, stride, padding, dilation,
                            groups)[0][0]
    refuse(grad.shape != output.shape or len(mask) != 3, "grad")
    index = index_of(crow, col, shape, block)
    w = dense_weight(weight, index, shape, block)

    def gradients(x, w, dy):
        x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
        torch.nn.functional.conv2d(x, w, None, stride, padding, dilation, groups).backward(dy)
        return x.grad, w.grad, dy.sum((0, 2, 3))

    values = gradients(input.double(), w, grad.double())
    sizes = gradients(input.double().abs(), w.abs(), grad.double().abs())
    terms = (shape[0] * shape[2] * shape[3], output.numel() // shape[0], output.numel() // shape[0])
    pairs = [list(p) for p in zip(values, sizes, strict=True)]
    pairs[1] = [stored(g, weight, index) for g in pairs[1]]
    nothing = torch.zeros(0, dtype=torch.float64)
    return [within(*pair, input.dtype, n) if wanted else (nothing, nothing)
            for pair, n, wanted in zip(pairs, terms, mask, strict=True)]


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
    refuse(blocks.dtype != torch.int64 or blocks.dim() != 1 or blocks.untyped_storage().nbytes() < 8 * len(blocks),
           "blocks")
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
    if len(dropped) == 0:
        pattern = [t.clone() for t in (crow, col, ccol, row, perm)]
    else:
        pattern = pattern_of(now, rows, columns)
    changed = entries(torch.cat([dropped, grown]), shape, block).view(-1)
    tensors = []
    for tensor in (weight, *states):
        refuse(tensor.shape != weight.shape, "states")
        if list(tensor.shape) == list(shape):
            expected = tensor.clone(memory_format=torch.contiguous_format)
            expected.view(-1)[changed] = 0
        else:
            values = tensor.new_zeros(rows * columns, block[0] * block[1])
            values[kept] = tensor.reshape(len(active), block[0] * block[1])[torch.isin(active, kept)]
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
    size = (x.abs() + mean.abs().view(shape)) * w.abs().view(shape) + b.abs().view(shape)
    count = x.numel() // x.shape[1]
    stats = torch.stack([mean, x.var(dims, correction=1)])
    saved = torch.stack([mean, rstd])
    far = 1e-6 * (1 + x.abs().amax(dims) ** 2 / (variance + eps))
    return [(y, 8e-7 * size * (1 + far.amax())), (stats, stats.abs() * (1e-5 + far * count / (count - 1)) + 1e-6 * mean.abs()),
            (saved, saved.abs() * (1e-5 + far) + 1e-6 * mean.abs())]


def batch_norm_backward_reference(grad, input, weight, saved, mask):
    refuse(any(t.dtype != torch.float32 for t in (grad, input)) or saved.dtype != torch.float64, "dtype")
    refuse(input.dim() < 2 or grad.shape != input.shape or list(saved.shape) != [2, input.shape[1]] or len(mask) != 3, "shapes")
    refuse(input.numel() <= input.shape[1], "one value a channel")
    refuse(weight is not None and (weight.dtype != torch.float32 or list(weight.shape) != [input.shape[1]]), "weight")
    dims, shape = [d for d in range(input.dim()) if d != 1], [1, -1] + [1] * (input.dim() - 2)
    dy, x, (mean, rstd) = grad.double(), input.double(), saved
    n = x.numel() // x.shape[1]
    hat = (x - mean.view(shape)) * rstd.view(shape)
    db, dw = dy.sum(dims), (dy * hat).sum(dims)
    w = rstd if weight is None else weight.double() * rstd
    dx = w.view(shape) * (dy - db.view(shape) / n - hat * dw.view(shape) / n)
    rounded = (x.abs() + mean.abs().view(shape)) * rstd.abs().view(shape)  # of hat, in units of eps
    sums = (dy.abs() * (hat.abs() + rounded)).sum(dims)
    size = w.abs().view(shape) * (dy.abs() + dy.abs().sum(dims).view(shape) / n + (hat.abs() + rounded) * sums.view(shape) / n)
    nothing = torch.zeros(0, dtype=torch.float64)
    pairs = [(dx, 3e-6 * size + 1e-37), (dw, 3e-6 * sums + 1e-37), (db, 3e-6 * dy.abs().sum(dims) + 1e-37)]
    return [pair if wanted else (nothing, nothing) for pair, wanted in zip(pairs, mask, strict=True)]


def check_loss(logits, target, alpha, reduction):
    refuse(logits.dim() != 2 or logits.shape[1] < 2 or not logits.is_floating_point(), "logits")
    refuse(target.dtype != torch.int64 or list(target.shape) != [len(logits)] or alpha.numel() != 1, "target")
    refuse(len(target) and not (0 <= int(target.min()) and int(target.max()) < logits.shape[1]), "range")
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
    eps = torch.finfo(acc_type(logits.dtype)).eps
    a = alpha.to(acc_type(logits.dtype)).double().reshape(())
    name = ("none", "mean", "sum")[reduction]
    loss, threshold = unknown_aware_loss_reference(logits.double(), target, a, unknown_weight=unknown_weight, reduction=name)
    h, w, _, off = loss_parts(logits, target, a)
    largest = logits.double().abs().nan_to_num(0, 0, 0).amax(1) if len(logits) else h
    size = (torch.where(target == logits.shape[1] - 1, abs(unknown_weight), w) * (h * off + 1 + largest)).nan_to_num(0, 0, 0) * 16 * eps
    size = size if reduction == 0 else size.sum() / (max(1, len(size)) if reduction == 1 else 1)
    return [(loss, size + eps), (threshold, 64 * eps * (threshold.abs() + 1 + (largest.max() if len(largest) else 0))), None]


def loss_backward_reference(grad, logits, target, alpha, saved, unknown_weight, reduction):
    from uasparse_kernels.ops import unknown_aware_loss_reference

    check_loss(logits, target, alpha, reduction)
    acc = acc_type(logits.dtype)
    refuse(saved.dtype != acc or saved.numel() != 2 * len(logits), "saved")
    refuse(grad.numel() != (len(logits) if reduction == 0 else 1) or not grad.is_floating_point(), "grad")
    if not torch.equal(saved, torch.ops.uasparse.unknown_aware_loss(logits, target, alpha, unknown_weight, reduction)[2]):
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
        bound = bound + expected.abs() * torch.finfo(logits.dtype).eps + torch.finfo(logits.dtype).tiny
    return [(expected, bound.expand_as(expected))]


def never(*_):
    raise Refused("no kernel on the CPU")


# Of each op: its arguments, their reference, which of them it writes.
OPS = {
    "pack": (make_pack, pack_reference, ()),
    "unpack": (make_unpack, unpack_reference, ()),
    "keep_active_": (make_keep_active, keep_active_reference, (0,)),
    "masked_linear": (make_linear, linear_reference, ()),
    "masked_linear_backward": (make_linear_backward, linear_backward_reference, ()),
    "masked_conv2d": (make_conv, conv_reference, ()),
    "masked_conv2d_backward": (make_conv_backward, conv_backward_reference, ()),
    "topk_indices": (make_topk, topk_reference, ()),
    "topk_indices_many": (make_topk_many, topk_many_reference, ()),
    "indices_above": (make_above, above_reference, ()),
    "exclude_kept_": (make_exclude, exclude_reference, (0,)),
    "prune_grow_": (make_prune_grow, prune_grow_reference, (0, 1, 2, 3, 4, 5, 6)),
    "batch_norm": (make_batch_norm, batch_norm_reference, ()),
    "batch_norm_backward": (make_batch_norm_backward, batch_norm_backward_reference, ()),
    "unknown_aware_loss": (make_loss, loss_reference, ()),
    "unknown_aware_loss_backward": (make_loss_backward, loss_backward_reference, ()),
}

if __name__ == "__main__":
    sys.exit(main())
