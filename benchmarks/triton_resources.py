"""Registers, spills and shared memory of every Triton kernel and tile, compiled ahead of time; no GPU is needed.

    python -m benchmarks.triton_resources [--all]

brings benchmarks/results/triton_resources.json up to date: what is new or changed since it was written is compiled,
with --all everything (about half an hour on one core). It fails where a kernel spills, or needs more registers or
shared memory than there are. Rows are known by a hash of the kernel's source, its arguments and its tile, so that the
tests find a table that does not cover what the package has today (test_triton_resources.py), and compile a part anew.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import inspect
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.harness import RESULTS
from uasparse_kernels.triton import masked_conv2d, masked_linear, pattern
from uasparse_kernels.triton._launch import Config

TABLE = RESULTS / "triton_resources.json"
ARCHITECTURES = (80, 90)
SHARED_LIMIT_BYTES = {80: 163 * 1024, 90: 227 * 1024}
BLOCKS = (16, 32, 64, 128)
# dtype, precision of a float32 product.
KINDS = [("bf16", "ieee"), ("fp16", "ieee"), ("fp32", "tf32"), ("fp32", "tf32x3"), ("fp32", "ieee")]
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}

# Integers that are multiples of 16: sizes of blocks of features.
ALIGNED = ("stride_x", "stride_y", "stride_dy", "stride_out", "channels", "out_channels", "features")


class Case(NamedTuple):
    """One compilation: pointer and integer arguments by name (None: absent), constants, and what is printed."""

    kernel: str
    function: Any
    pointers: dict[str, str | None]
    integers: list[str]
    constants: dict[str, Any]
    config: Config
    label: str


def cases(quick: bool = False) -> Iterator[Case]:
    """Every kernel, dtype, block and tile; ``quick`` takes block 64, the first tile, and no fp16."""
    blocks = (64,) if quick else BLOCKS
    for dtype, precision in KINDS:
        if quick and dtype == "fp16":
            continue
        for block in blocks:
            yield from _linear_cases(dtype, precision, block, quick)
            yield from _conv_cases(dtype, precision, block, quick)
    yield from _other_cases(quick)


def _linear_cases(dtype: str, precision: str, block: int, quick: bool) -> Iterator[Case]:
    pointer, index = f"*{dtype}", "*i32"
    configs = masked_linear.product_configs(block, ITEMSIZE[dtype], precision)
    for config in configs[: 1 if quick else None]:
        for transposed in (False, True):
            yield Case(
                "linear product" + (" transposed" if transposed else ""),
                masked_linear.product_kernel,
                {
                    "x": pointer, "values": pointer, "bias": None if transposed else pointer, "offsets": index,
                    "index": index, "perm": index if transposed else None, "order": index, "y": pointer,
                },
                ["tokens", "rows", "stride_x", "stride_y"],
                {
                    "BLOCK": block, "TILE": config.tile, "DEPTH": config.depth, "TRANSPOSED": transposed,
                    "HAS_BIAS": not transposed, "ORDERED": True, "PRECISION": precision,
                },
                config,
                f"{dtype} {precision if dtype == 'fp32' else ''} b{block}",
            )  # fmt: skip
    configs = masked_linear.sampled_configs(block, ITEMSIZE[dtype], precision)
    for config in configs[: 1 if quick else None]:
        yield Case(
            "linear sampled",
            masked_linear.sampled_kernel,
            {"dy": pointer, "x": pointer, "out": pointer, "col": index, "row": index, "perm": index},
            ["tokens", "blocks", "part", "stride_dy", "stride_x"],
            {
                "BLOCK": block,
                "TILE": config.tile,
                "BY_FEATURES": masked_linear.along_the_sum(precision),
                "PRECISION": precision,
            },
            config,
            f"{dtype} {precision if dtype == 'fp32' else ''} b{block}",
        )


def _conv_cases(dtype: str, precision: str, block: int, quick: bool) -> Iterator[Case]:
    pointer, index = f"*{dtype}", "*i32"
    geometry = ["height", "width", "out_height", "out_width", "channels", "out_channels", "kernel_width"]
    geometry += [f"{name}_{axis}" for name in ("stride", "padding", "dilation") for axis in "hw"]
    label = f"{dtype} {precision if dtype == 'fp32' else ''} b{block}"
    common = {"POSITIONS": 9, "BLOCK": block, "PRECISION": precision}
    for config in masked_conv2d.product_configs(block, ITEMSIZE[dtype], precision)[: 1 if quick else None]:
        tile = {"TILE": config.tile, "DEPTH": config.depth}
        yield Case(
            "conv product",
            masked_conv2d.product_kernel,
            dict.fromkeys(("x", "values", "bias", "y"), pointer) | dict.fromkeys(("crow", "col", "order"), index),
            ["pixels", "rows", *geometry],
            {**common, **tile, "HAS_BIAS": True, "ORDERED": True},
            config,
            label,
        )
    for config in masked_conv2d.product_configs(block, ITEMSIZE[dtype], precision, True)[: 1 if quick else None]:
        tile = {"TILE": config.tile, "DEPTH": config.depth}
        for strided in (False, True):
            yield Case(
                "conv transposed" + (" strided" if strided else ""),
                masked_conv2d.transposed_kernel,
                dict.fromkeys(("dy", "values", "dx"), pointer) | dict.fromkeys(("col", "ccol", "row", "perm"), index),
                ["pixels", "rows", *geometry],
                {**common, **tile, "STRIDED": strided},
                config,
                label,
            )
    for config in masked_conv2d.sampled_configs(block, ITEMSIZE[dtype], precision)[: 1 if quick else None]:
        yield Case(
            "conv sampled",
            masked_conv2d.sampled_kernel,
            dict.fromkeys(("dy", "x", "out"), pointer) | dict.fromkeys(("col", "row", "perm"), index),
            ["pixels", "blocks", "part", *geometry],
            {**common, "TILE": config.tile},
            config,
            label,
        )


def _other_cases(quick: bool) -> Iterator[Case]:
    for dtype in ("fp32",) if quick else ("fp32", "bf16"):
        parts = {"parts": "*fp32", "out": f"*{dtype}"}
        config = Config(1024, 0, 4, 3)
        yield Case(
            "add parts", masked_linear.add_parts_kernel, parts, ["count", "splits"], {"TILE": 1024}, config, dtype
        )
        if dtype == "fp32":
            matrices = {"x": "*fp32", "out": "*fp32"}
            integers = ["tokens", "features", "stride_x", "stride_out"]
            yield Case("transpose", masked_linear.transpose_kernel, matrices, integers, {"TILE": 64}, config, dtype)
        for block in ((1, 1),) if quick else ((1, 1), (4, 1), (64, 64)):
            shape = {"BLOCK_ROWS": block[0], "BLOCK_COLUMNS": block[1], "TILE": 1024}
            indices = {"crow": "*i32", "col": "*i32"}
            for to_dense in (False, True):
                yield Case(
                    "unpack" if to_dense else "pack",
                    pattern.move_kernel,
                    {"dense": f"*{dtype}", "values": f"*{dtype}", **indices},
                    ["positions", "programs", "stride_out", "stride_in", "stride_position"],
                    {**shape, "TO_DENSE": to_dense},
                    config,
                    f"{dtype} b{block[0]}x{block[1]}",
                )


def compile_case(case: Case, arch: int, *, ones: Container[str] = ()) -> Any:
    """The compiled kernel; feature sizes are taken to be multiples of 16, as they are.

    Args:
        ones: integer arguments that are 1, which Triton makes constants.
    """
    signature: dict[str, str] = {}
    constants: dict[str, Any] = dict(case.constants)
    attributes = {}
    for place, name in enumerate(case.function.arg_names):
        if name in ones:
            signature[name] = "constexpr"
            constants[name] = 1
        elif name in case.integers:
            signature[name] = "i32"
        elif case.pointers.get(name) is not None:
            signature[name] = case.pointers[name]  # type: ignore[assignment]
        else:
            signature[name] = "constexpr"
            constants.setdefault(name, None)
        if signature[name] != "constexpr" and (name in case.pointers or name in ALIGNED):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(case.function, signature, constants, attributes)
    options = {"num_warps": case.config.warps, "num_stages": case.config.stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(compiled: Any) -> dict[str, int]:
    """Registers a thread, bytes of stack a thread (spills) and of shared memory a block, and tensor-core opcodes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _cuobjdump("--dump-resource-usage", file.name)
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    ptx = compiled.asm["ptx"]
    return {
        "registers": found["REG"],
        "spill_bytes": found["STACK"] + found["LOCAL"],
        "shared_bytes": compiled.metadata.shared,
        "wgmma": len(re.findall(r"wgmma\.mma_async", ptx)),
        "mma": len(re.findall(r"mma\.sync", ptx)),
        "async_16_byte_copies": len(re.findall(r"cp\.async\.cg\.shared\.global[^;]*0x10", ptx)),
    }


def _cuobjdump(*arguments: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = str(tool) if tool.exists() else "cuobjdump"
    return subprocess.run([command, *arguments], check=True, capture_output=True, text=True).stdout


def key(case: Case, arch: int) -> str:
    """A hash of all that a compilation depends on but for Triton's version."""
    facts = (_source_hash(case.function.fn.__module__), *case[2:5], *case.config, arch)
    return hashlib.sha256(repr((case.kernel, case.function.fn.__name__, *facts)).encode()).hexdigest()[:16]


@functools.cache
def _source_hash(module: str) -> str:
    """Of all jitted functions of a module, since they call each other."""
    functions = [f for f in vars(sys.modules[module]).values() if isinstance(f, triton.JITFunction)]
    return hashlib.sha256("".join(inspect.getsource(f.fn) for f in functions).encode()).hexdigest()


def measure(case: Case, arch: int) -> dict[str, Any]:
    """A row of the table."""
    row: dict[str, Any] = {"key": key(case, arch), "kernel": case.kernel, "arch": arch, "what": case.label}
    return {**row, **case.config._asdict(), **resources(compile_case(case, arch))}


def fits(row: dict[str, Any]) -> bool:
    """Whether a kernel has no spills and keeps to the registers and the shared memory that there are."""
    registers = row["registers"] * 32 * row["warps"]
    return row["spill_bytes"] == 0 and row["shared_bytes"] <= SHARED_LIMIT_BYTES[row["arch"]] and registers <= 65536


def read_table() -> dict[str, dict[str, Any]]:
    """The rows that are kept, by key."""
    return {row["key"]: row for row in json.loads(TABLE.read_text())["rows"]} if TABLE.exists() else {}


def table_version() -> str:
    """Triton's version that the table was made with."""
    return json.loads(TABLE.read_text())["versions"]["triton"]


def cuda_kernels(library: str) -> dict[str, int]:
    """Bytes of stack and local memory a thread (spills) of the kernels in a compiled file, by mangled name."""
    found = re.findall(
        r"Function (\S+):\s+REG:\d+ STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", _cuobjdump("--dump-resource-usage", library)
    )
    worst: dict[str, int] = {}
    for name, stack, local in found:
        worst[name] = max(worst.get(name, 0), int(stack) + int(local))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="compile what is known too")
    arguments = parser.parse_args()
    wanted = {key(case, arch): (case, arch) for case in cases() for arch in ARCHITECTURES}
    known = {} if arguments.all else {k: row for k, row in read_table().items() if k in wanted}
    for k, (case, arch) in wanted.items():
        if k in known:
            continue
        known[k] = measure(case, arch)
        print("  ".join(str(value) for value in known[k].values()), "" if fits(known[k]) else "TOO MUCH", flush=True)
        _write([known[k] for k in wanted if k in known])
    rows = [known[k] for k in wanted]
    _write(rows)
    bad = [row for row in rows if not fits(row)]
    print(f"{len(rows)} kernels, {len(bad)} spill or need too many registers or too much shared memory")
    sys.exit(bool(bad))


def _write(rows: list[dict[str, Any]]) -> None:
    """One row a line."""
    versions = json.dumps({"torch": torch.__version__, "triton": triton.__version__})
    lines = ",\n".join(json.dumps(row) for row in rows)
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    TABLE.write_text(f'{{"versions": {versions},\n"rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
