"""Build of the compiled parts: C++ for the CPU always, CUDA C++ where nvcc and a CUDA build of torch are.

UASPARSE_BUILD_CUDA=0|1   leave the CUDA parts out, or insist on them (default: build them where they can be)
UASPARSE_WERROR=1         treat C++ warnings as errors (tests and CI do)
UASPARSE_COMPILED=FOLDER  take the compiled parts from there, as an earlier build left them, and build nothing
TORCH_CUDA_ARCH_LIST, MAX_JOBS, CXX, CFLAGS   as torch.utils.cpp_extension honours them
"""

import atexit
import glob
import os
import pathlib
import re
import runpy
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile

import setuptools


def find_cuda_home() -> str | None:
    """The toolkit's folder as nvcc itself tells it: the nvcc on the PATH may be a wrapper that lies elsewhere."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    told = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False
    ).stderr
    top = re.search(r"^#\$ TOP=(.+)$", told, re.MULTILINE)
    return os.path.realpath(top[1]) if top else None


# torch reads CUDA_HOME when it is imported.
if "CUDA_HOME" not in os.environ and (cuda_home := find_cuda_home()):
    os.environ["CUDA_HOME"] = cuda_home

if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(
        f"uasparse_kernels: expected setuptools 77 or newer, found {setuptools.__version__}. Upgrade it first "
        "(pip install -U setuptools), then install this package with --no-build-isolation."
    )
try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    sys.exit(
        "uasparse_kernels: torch is needed to build. Install it first (pip install torch), then install this package "
        "with --no-build-isolation."
    )
if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
    sys.exit(
        f"uasparse_kernels: expected torch 2.11 or newer, found {torch.__version__}. Upgrade it first "
        "(pip install -U torch), then install this package with --no-build-isolation."
    )

ROOT = pathlib.Path(__file__).resolve().parent  # older setuptools give a relative name


def build_cuda() -> bool:
    """True where nvcc and a CUDA torch are found (no GPU is needed), unless UASPARSE_BUILD_CUDA decides otherwise."""
    choice = os.environ.get("UASPARSE_BUILD_CUDA", "auto")
    if choice not in ("0", "1", "auto"):
        sys.exit(f"UASPARSE_BUILD_CUDA: expected 0 or 1, got {choice!r}")
    if choice == "0" or not sources("csrc/cuda/*.cu"):
        return False
    has_nvcc = bool(os.environ.get("CUDA_HOME") or shutil.which("nvcc"))
    possible = has_nvcc and torch.version.cuda is not None
    if choice == "1" and not possible:
        sys.exit(
            "UASPARSE_BUILD_CUDA=1 needs nvcc on the PATH (or CUDA_HOME) and a CUDA build of torch; "
            f"found nvcc: {has_nvcc}, torch.version.cuda: {torch.version.cuda}."
        )
    return possible


def sources(pattern: str) -> list[str]:
    return sorted(str(pathlib.Path(p).relative_to(ROOT)) for p in glob.glob(str(ROOT / pattern)))


def pip_cuda_includes() -> list[str]:
    """Headers (cusparse.h and friends) that torch's CUDA headers need and that pip brings with torch.

    They come after the toolkit's own: pip's cuda_runtime.h is there without the crt/ folder that it includes.
    """
    roots = [*site.getsitepackages(), str(pathlib.Path(torch.__file__).parents[1])]
    found = {p for root in roots for p in glob.glob(os.path.join(root, "nvidia", "*", "include"))}
    return sorted(found)


warnings = ["-Wall", "-Wextra"] + (["-Werror"] if os.environ.get("UASPARSE_WERROR") == "1" else [])
# Warnings are for our own sources: a folder given by -isystem is not searched as one of -I.
system = [f"-isystem{path}" for path in [*cpp_extension.include_paths(), sysconfig.get_paths()["include"]]]
# No debug information, which many a Python asks for: it makes the file 17 times as large.
cxx_flags = ["-O3", "-g0", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", *warnings, *system]
name = "uasparse_kernels._C_torch" + "_".join(torch.__version__.split(".")[:2])  # uasparse_kernels/_compiled.py
files = sources("csrc/*.cpp") + sources("csrc/cpu/*.cpp")
common = {
    "include_dirs": [str(ROOT / "csrc")],
    "define_macros": [("UASPARSE_TORCH_VERSION", f'"{torch.__version__}"')],
    "extra_link_args": ["-fopenmp"],
    "py_limited_api": True,
    "depends": sources("csrc/*.h") + sources("csrc/*/*.h") + sources("csrc/*/*.cuh"),
}
if build_cuda():
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    common["define_macros"].append(("UASPARSE_CUDA_ARCHS", f'"{os.environ["TORCH_CUDA_ARCH_LIST"]}"'))
    cxx_flags += [f"-idirafter{path}" for path in pip_cuda_includes()]
    extension = cpp_extension.CUDAExtension(
        name,
        sources("csrc/cuda/*.cu") + sources("csrc/cuda/*.cpp") + files,  # the one that takes longest first
        extra_compile_args={"cxx": cxx_flags, "nvcc": ["-O3", "-std=c++20", "--Werror", "all-warnings"]},
        **common,
    )
else:
    extension = cpp_extension.CppExtension(name, files, extra_compile_args={"cxx": cxx_flags}, **common)


def check_can_compile() -> None:
    """Says in one line what the compiler would say in hundreds, or what pip would hide."""
    compiler = shlex.split(os.environ.get("CXX") or "c++")[0]
    if shutil.which(compiler) is None:
        sys.exit(
            f"uasparse_kernels: a C++20 compiler is needed to build, and there is no {compiler!r} on the PATH. Debian, "
            "Ubuntu: apt-get install g++; another compiler: CXX=clang++."
        )
    if not pathlib.Path(sysconfig.get_paths()["include"], "Python.h").exists():
        sys.exit(
            "uasparse_kernels: Python's headers are needed to build (Python.h). Debian, Ubuntu: "
            "apt-get install python3-dev."
        )


class Build(cpp_extension.BuildExtension.with_options(use_ninja=True)):
    def build_extensions(self):
        if not os.environ.get("UASPARSE_COMPILED"):
            check_can_compile()
        super().build_extensions()

    def build_extension(self, extension):
        made = os.environ.get("UASPARSE_COMPILED")
        if not made:
            return super().build_extension(extension)
        to = pathlib.Path(self.get_ext_fullpath(extension.name))
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(pathlib.Path(made) / to.name, to)

    def copy_extensions_to_source(self):
        super().copy_extensions_to_source()
        if not os.environ.get("UASPARSE_COMPILED"):
            package = ROOT / "uasparse_kernels"
            digest = runpy.run_path(str(package / "_compiled.py"))["digest_of"](ROOT / "csrc")
            (package / f"{name.rpartition('.')[2]}.digest").write_text(digest)


options = {"bdist_wheel": {"py_limited_api": "cp311"}}
if os.access(ROOT, os.W_OK):
    # Builds under names of earlier times, which nothing loads any more.
    for stale in ROOT.glob("uasparse_kernels/_C.*so"):
        stale.unlink()
else:
    # setuptools would write beside the sources.
    scratch = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    options |= {"egg_info": {"egg_base": scratch}, "build": {"build_base": scratch}}

setuptools.setup(
    ext_modules=[extension],
    options=options,
    cmdclass={"build_ext": Build},
)
