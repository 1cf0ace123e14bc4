"""Random calls of every raw op (``torch.ops.uasparse``): none may crash, hang or be wrong.

    python python_tests/fuzz_ops.py --seconds 600            under AddressSanitizer and UndefinedBehaviorSanitizer
    python python_tests/fuzz_ops.py --plain --seconds 60     the installed build
    python python_tests/fuzz_ops.py --isa avx2 --seed 123    one call again, with all that it was given

A call is made from its seed alone. There are three kinds: valid ones, whose results must be those of a float64
reference; wrong arguments; and damaged contents of index tensors. The last two must raise and change nothing, or be
right. Calls run in batches in a child process, so that a crash is counted and named by its seed. Ends with counts by op
and kind; exit code 1 if anything crashed, hung or was wrong.
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

import fuzz_arguments as arguments
import fuzz_maps as maps
import fuzz_references as references
import fuzz_serve
import sanitized
import torch
from fuzz_arguments import copies, in_memory, is_freed, make_damaged, make_wrong, tensors_of
from fuzz_references import refuse

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
    if not options.plain:
        print(f"Building under sanitizers in {sanitized.build()} ...", flush=True)
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
                        where = f"--isa {isa} --seed {outcome['seed']}"
                        bad.append(f"{outcome['op']} {outcome['kind']} {outcome['result']}: {where}")
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
            environment = sanitized.environment(isa)
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        command = [sys.executable, __file__, "--serve"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, env=environment, text=True, **pipes)

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
                outcomes[-1] |= {"result": how, "text": errors.read(6000)}
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
        log.flush()


# ---- one call ------------------------------------------------------------------------------------------------------


def run_call(name: str, kind: str, seed: int, verbose: bool = False) -> tuple[str, str]:
    rng = random.Random(seed * 7919 + 1)
    torch.manual_seed(seed)
    make, reference, written = OPS[name]
    given = make(rng)
    told = []
    if kind == "wrong":
        for _ in range(rng.choice([1, 1, 1, 2])):
            told.append(make_wrong(name, rng, given))
    if kind == "damaged":
        make_damaged(name, given, written, rng, told)
    if verbose:
        print(name, kind, *told, *(describe(a) for a in given), sep="\n  ", file=sys.stderr)
    before = copies(given)  # as the op takes them
    # torch itself negates in place what an op writes, and leaves it so where the op raises.
    negated = any(t.is_neg() for t in tensors_of(given))
    try:
        got = getattr(torch.ops.uasparse, name)(*given)
    except ERRORS as error:
        if kind == "valid":
            return "wrong", f"a valid call raised {type(error).__name__}: {error}"
        if "bad_alloc" in str(error):
            return "wrong", f"{told}: bad_alloc"
        if not negated and not same(before, given):
            return "wrong", f"{told}: raised, but changed its arguments"
        return "raised", f"{told} {type(error).__name__}: {str(error).splitlines()[0][:300]}"
    if any(t.is_meta for t in tensors_of(given)):
        return "right", "a meta tensor among the arguments: there is no value"
    try:
        refuse(any(map(is_freed, tensors_of(given))), "freed")
        expected = reference(*in_memory(before if written else given))
    except Exception as error:
        return "wrong", f"{told}: accepted, but the reference says {type(error).__name__}: {error}"
    if written:
        got = [t for i in written for t in tensors_of([given[i]])]
    return judge(list(got) if isinstance(got, (tuple, list)) else [got], expected, told)


def judge(results, expected, told) -> tuple[str, str]:
    """Each of the expected is a tensor (equal) or a pair: values in float64, and how far off they may be."""
    results = [result if isinstance(result, torch.Tensor) else torch.tensor(result) for result in results]
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


def same(before, given) -> bool:
    pairs = zip(tensors_of(before), tensors_of(given), strict=True)
    return all(is_freed(b) or b.layout != torch.strided or b.is_meta or torch.equal(raw(a), raw(b)) for a, b in pairs)


def describe(argument) -> str:
    if isinstance(argument, list):
        return f"[{', '.join(map(describe, argument))}]"
    if not isinstance(argument, torch.Tensor):
        return repr(argument)
    if argument.layout != torch.strided:
        return f"{argument.dtype} {tuple(argument.shape)} {argument.layout}"
    text = f"{argument.dtype} {tuple(argument.shape)} strides {argument.stride()} on {argument.device.type}"
    if is_freed(argument) or argument._is_zerotensor():
        return f"{text}, {'freed' if is_freed(argument) else 'zeros without memory'}"
    return text + (f" {argument.tolist()}" if argument.numel() <= 40 and not argument.is_meta else "")


# Of each op: its arguments, their reference, which of them it writes.
OPS = {
    "pack": (arguments.make_pack, references.pack_reference, ()),
    "unpack": (arguments.make_unpack, references.unpack_reference, ()),
    "keep_active_": (arguments.make_keep_active, references.keep_active_reference, (0,)),
    "masked_linear": (arguments.make_linear, references.linear_reference, ()),
    "masked_linear_backward": (arguments.make_linear_backward, references.linear_backward_reference, ()),
    "masked_conv2d": (arguments.make_conv, references.conv_reference, ()),
    "masked_conv2d_backward": (arguments.make_conv_backward, references.conv_backward_reference, ()),
    "topk_indices": (arguments.make_topk, references.topk_reference, ()),
    "topk_indices_many": (arguments.make_topk_many, references.topk_many_reference, ()),
    "indices_above": (arguments.make_above, references.above_reference, ()),
    "exclude_kept_": (arguments.make_exclude, references.exclude_reference, (0,)),
    "growth_indices": (arguments.make_growth, references.growth_reference, ()),
    "blocks_at": (arguments.make_places, references.places_reference, ()),
    "prune_grow_": (arguments.make_prune_grow, references.prune_grow_reference, (0, 1, 2, 3, 4, 5, 6)),
    "batch_norm": (arguments.make_batch_norm, references.batch_norm_reference, ()),
    "batch_norm_backward": (arguments.make_batch_norm_backward, references.batch_norm_backward_reference, ()),
    "batch_norm_relu": (maps.make_batch_norm_relu, maps.batch_norm_relu_reference, ()),
    "batch_norm_relu_backward": (maps.make_batch_norm_relu_backward, maps.batch_norm_relu_backward_reference, ()),
    "batch_norm_backward_": (maps.make_batch_norm_backward_, maps.batch_norm_backward_reference_, (0,)),
    "max_pool2d": (maps.make_max_pool, maps.max_pool_reference, ()),
    "pattern_hash": (maps.make_hash, maps.hash_reference, ()),
    "mask_": (maps.make_mask, maps.mask_reference, (0,)),
    "is_masked": (maps.make_is_masked, maps.is_masked_reference, ()),
    "serve_run": (fuzz_serve.make_serve, fuzz_serve.serve_reference, (0, 5)),
    "unknown_aware_loss": (arguments.make_loss, references.loss_reference, ()),
    "unknown_aware_loss_backward": (arguments.make_loss_backward, references.loss_backward_reference, ()),
}

if __name__ == "__main__":
    sys.exit(main())
