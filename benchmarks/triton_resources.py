"""Registers, spills and shared memory of every Triton kernel and tile, compiled ahead of time; no GPU is needed.

    python -m benchmarks.triton_resources [--quick] [--out benchmarks/results/triton_resources.json]

A kernel fails where it spills or needs more shared memory than a block may have. --quick takes one tile a kernel and
dtype (what the tests do); the full set takes about half an hour on one core, and less where Triton's cache holds it.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from uasparse_kernels.triton import masked_linear
from uasparse_kernels.triton._launch import Config

SHARED_LIMIT_BYTES = {80: 163 * 1024, 90: 227 * 1024}
BLOCKS = (16, 32, 64, 128)
# dtype, precision of a float32 product.
KINDS = [("bf16", "ieee"), ("fp16", "ieee"), ("fp32", "tf32"), ("fp32", "tf32x3"), ("fp32", "ieee")]
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}


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
                ["tokens", "rows", "group", "stride_x", "stride_y"],
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
            {"BLOCK": block, "TILE": config.tile, "PRECISION": precision},
            config,
            f"{dtype} {precision if dtype == 'fp32' else ''} b{block}",
        )


def compile_case(case: Case, arch: int) -> Any:
    """The compiled kernel; strides are taken to be multiples of 16, as sizes are."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = dict(case.constants)
    attributes = {}
    for place, name in enumerate(case.function.arg_names):
        if name in case.integers:
            signature[name] = "i32"
        elif case.pointers.get(name) is not None:
            signature[name] = case.pointers[name]  # type: ignore[assignment]
        else:
            signature[name] = "constexpr"
            constants.setdefault(name, None)
        if name in case.pointers or name.startswith("stride"):
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


def table(quick: bool, architectures: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    for case in cases(quick):
        for arch in architectures:
            row: dict[str, Any] = {"kernel": case.kernel, "arch": arch, "what": case.label, **case.config._asdict()}
            row |= resources(compile_case(case, arch))
            row["ok"] = row["spill_bytes"] == 0 and row["shared_bytes"] <= SHARED_LIMIT_BYTES[arch]
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--only", default="", help="kernels whose name and label hold this text")
    parser.add_argument("--out", type=Path, help="write JSON here too")
    arguments = parser.parse_args()
    rows = []
    for row in table(arguments.quick, tuple(arguments.arch)):
        rows.append(row)
        if len(rows) == 1:
            print("  ".join(row))
        print("  ".join(str(value) for value in row.values()), flush=True)
        if arguments.out is not None:
            versions = {"torch": torch.__version__, "triton": triton.__version__}
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps({"versions": versions, "kernels": rows}, indent=1) + "\n")
    bad = [row for row in rows if not row["ok"]]
    print(f"{len(rows)} kernels, {len(bad)} spill or need too much shared memory")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
