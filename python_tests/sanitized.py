"""Builds the CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, beside the package as it is.

The build is a folder with a package of its own: links to the Python sources, and a compiled part of its own. A process
imports it where ``environment()`` is its environment. Nothing of the real package is touched.
"""

import os
import pathlib
import shutil
import subprocess
import sysconfig

import torch
from torch.utils import cpp_extension

NAME = "_C_torch" + "_".join(torch.__version__.split(".")[:2])

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "sanitized"
# vptr would want type information that torch does not export; what the others find, AddressSanitizer finds too where it
# matters, and without them the build takes a third less.
LEFT_OUT = "-fno-sanitize=vptr,null,object-size,pointer-overflow"
SANITIZERS = ["-fsanitize=address,undefined", LEFT_OUT, "-fno-sanitize-recover=undefined"]
FLAGS = ["-O1", "-g1", "-std=c++20", "-fPIC", "-fno-omit-frame-pointer", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-fopenmp", f"-DTORCH_EXTENSION_NAME={NAME}", "-DPy_LIMITED_API=0x030b0000"]
FLAGS += ["-DTORCH_API_INCLUDE_EXTENSION_H"]
FLAGS += [f'-DUASPARSE_TORCH_VERSION=\\"{torch.__version__}\\"', *SANITIZERS]
# What nearly every file includes: read once.
HEADERS = ["ATen/Parallel.h", "ATen/core/Tensor.h", "ATen/ops/empty.h", "torch/library.h"]
HEADERS += ["torch/csrc/autograd/custom_function.h", "torch/csrc/autograd/autograd_not_implemented_fallback.h"]
HEADER = "".join(f"#include <{name}>\n" for name in HEADERS)


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def build() -> pathlib.Path:
    """The folder to import from; compiles what changed since the last time."""
    package = FOLDER / "uasparse_kernels"
    package.mkdir(parents=True, exist_ok=True)
    for source in (ROOT / "uasparse_kernels").iterdir():
        link = package / source.name
        if source.name not in ("__pycache__",) and not source.name.startswith("_C") and not link.is_symlink():
            link.symlink_to(source)
    header = FOLDER / "torch_headers.h"
    if not header.exists() or header.read_text() != HEADER:
        header.write_text(HEADER)
    sources = sorted([*(ROOT / "csrc").glob("*.cpp"), *(ROOT / "csrc/cpu").glob("*.cpp")])
    includes = [f"-isystem{path}" for path in [*cpp_extension.include_paths(), sysconfig.get_paths()["include"]]]
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()] + ["-ltorch", "-ltorch_cpu", "-lc10"]
    objects = [f"{source.parent.name}_{source.stem}.o" for source in sources]
    # A kernel's file, of one instruction set, includes nothing of torch.
    headers = ["" if has_no_torch(source) else "torch_headers.h" for source in sources]
    lines = [
        f"cxx = {compiler()}",
        f"flags = {' '.join(FLAGS)} -I{ROOT / 'csrc'} {' '.join(includes)}",
        "rule header",
        "  command = $cxx -MMD -MF $out.d $flags -x c++-header $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $flags $include -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx -shared $in {' '.join(SANITIZERS)} -fopenmp {' '.join(libraries)} -o $out",
        "build torch_headers.h.gch: header torch_headers.h",
    ]
    for source, name, include in zip(sources, objects, headers, strict=True):
        lines += [f"build {name}: compile {source}" + (" | torch_headers.h.gch" if include else "")]
        lines += ["  include = -include torch_headers.h"] if include else []
    lines += [f"build uasparse_kernels/{NAME}.abi3.so: link {' '.join(objects)}", ""]
    (FOLDER / "build.ninja").write_text("\n".join(lines))
    done = subprocess.run(["ninja", "-C", str(FOLDER)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"The sanitized build failed:\n{done.stdout[-5000:]}{done.stderr[-5000:]}")
    return FOLDER


def has_no_torch(source: pathlib.Path) -> bool:
    return source.stem.endswith(("_avx2", "_avx512", "_portable")) or source.stem in ("isa", "conv_geometry")


def environment(isa: str) -> dict[str, str]:
    """Of a process that imports the sanitized package, with the kernels of one instruction set."""
    # libstdc++ too, for the exceptions of libraries that are loaded before a C++ one would bring it.
    command = [compiler() or "g++"]
    found = [
        subprocess.run([*command, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(found),
        "PYTHONPATH": str(FOLDER),
        "UASPARSE_CPU_ISA": isa,
        # Python and torch leak by design, and torch answers a request that is too large with an exception.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=4000:handle_abort=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }
