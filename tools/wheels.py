"""Builds the wheel, with compiled parts for several versions of torch, and tries it with each in an empty environment.

    python tools/wheels.py --torch 2.11.0 [--cuda]        (`make wheels`, `make wheels CUDA=1`)

The environment that runs this brings all that building needs; its own torch is always one of those built for. Other
versions are downloaded without what they depend on, which is borrowed from here. The wheel comes to dist/, with the
variant in its version (0.1.0+cpu, 0.1.0+cu130), as torch's own.
"""

import argparse
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "wheels"
OWN = pathlib.Path(sysconfig.get_paths()["purelib"])
# torch brings these: a copy of its own would be a second pool of threads, or a second CUDA runtime.
FROM_TORCH = ["libtorch.so", "libtorch_*.so", "libc10*.so", "libgomp.so.*", "libcudart.so.*"]


def call(*command: object, cwd: pathlib.Path = ROOT, **variables: str) -> None:
    subprocess.run([str(part) for part in command], cwd=cwd, env={**os.environ, **variables}, check=True)


def torch_folder(version: str) -> pathlib.Path | None:
    """A folder that holds this torch alone, to stand before this environment on the path; None for the one here."""
    if version == torch.__version__.split("+")[0]:
        return None
    folder = WORK / f"torch-{version}"
    if not (folder / "torch").is_dir():
        call(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, f"torch=={version}")
        if (OWN / "nvidia").is_dir():  # torch looks for CUDA's libraries beside itself
            (folder / "nvidia").symlink_to(OWN / "nvidia")
    return folder


def build(version: str, variant: str, cuda: bool) -> pathlib.Path:
    """A wheel for this torch alone."""
    folder, out = torch_folder(version), WORK / f"{variant}-{version}"
    shutil.rmtree(out / "dist", ignore_errors=True)
    shutil.rmtree(out / "base" / "lib", ignore_errors=True)
    command = ["setup.py", "-q", "egg_info", "-e", out, "-b", f"+{variant}", "build", "-b", out / "base"]
    # Built already: a second time in one process, torch gives every flag twice, and ninja compiles all anew.
    command += ["bdist_wheel", "--skip-build", "-d", out / "dist"]
    out.mkdir(parents=True, exist_ok=True)
    call(sys.executable, *command, PYTHONPATH=str(folder or ""), UASPARSE_BUILD_CUDA="01"[cuda])
    (wheel,) = (out / "dist").glob("*.whl")
    return wheel


def merge(wheels: list[pathlib.Path], variant: str) -> pathlib.Path:
    """The first wheel with the compiled parts of all."""
    out = WORK / f"{variant}-all"
    shutil.rmtree(out, ignore_errors=True)
    call(sys.executable, "-m", "wheel", "unpack", "-d", out, wheels[0])
    (folder,) = out.iterdir()
    for wheel in wheels[1:]:
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.endswith(".so"):
                    archive.extract(name, folder)
    call(sys.executable, "-m", "wheel", "pack", "-d", out, folder)
    (wheel,) = out.glob("*.whl")
    exclude = [part for name in FROM_TORCH for part in ("--exclude", name)]
    repaired = out / "repaired"
    call(sys.executable, "-m", "auditwheel", "repair", "--strip", *exclude, "-w", repaired, wheel)
    (wheel,) = repaired.glob("*.whl")
    return pathlib.Path(shutil.copy(wheel, ROOT / "dist"))


def try_out(wheel: pathlib.Path, version: str) -> None:
    """Trains with the installed wheel from another folder, with nothing but this torch beside it."""
    folder, out = torch_folder(version), WORK / f"try-{version}"
    shutil.rmtree(out, ignore_errors=True)
    call(sys.executable, "-m", "venv", out)
    python = out / "bin" / "python"
    site = next(out.glob("lib/python*/site-packages"))
    (site / "borrowed.pth").write_text("".join(f"{path}\n" for path in (folder, OWN) if path))
    call(python, "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", wheel)
    shutil.copy(ROOT / "python_tests" / "smoke.py", out)
    call(python, "-I", "smoke.py", cwd=out, OMP_NUM_THREADS="1")
    call(python, "-I", "-m", "uasparse_kernels", cwd=out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", nargs="*", default=["2.11.0"], metavar="VERSION", help="besides the one here")
    parser.add_argument("--cuda", action="store_true", help="with the CUDA parts (needs nvcc)")
    options = parser.parse_args()
    versions = list(dict.fromkeys([torch.__version__.split("+")[0], *options.torch]))
    cuda = re.sub(r"\D", "", torch.version.cuda or "")
    variant = f"cu{cuda}" if options.cuda else "cpu"
    (ROOT / "dist").mkdir(exist_ok=True)
    wheel = merge([build(version, variant, options.cuda) for version in versions], variant)
    for version in versions:
        print(f"With torch {version}:", flush=True)
        try_out(wheel, version)
    print(f"{wheel.relative_to(ROOT)}: {wheel.stat().st_size / 2**20:.1f} MiB, for torch {', '.join(versions)}")


if __name__ == "__main__":
    main()
