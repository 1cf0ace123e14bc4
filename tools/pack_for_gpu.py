"""Gathers what `--suite cifar` needs where there is no network (docs/gpu-measuring.md): unknown images as NAME.npz.

    python tools/pack_for_gpu.py FOLDER --data folder:cifar10

The data set itself travels as the archive it came in: CIFAR-10 as JPEG re-encodes is 19 MB as .tar.xz, its pixels as
.npz 170 MB. Names that the other machine can make by itself are left out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from uasparse_kernels.training.data import load_train_test, load_unknowns
from uasparse_kernels.training.study.suites import SUITES

MADE_THERE = ("noise", "blobs", "inverted", "photos")  # scikit-learn brings the photographs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", default="cifar10", help="as in training: folder:PATH, say")
    parser.add_argument("--suite", default="cifar")
    arguments = parser.parse_args()
    known = load_train_test(arguments.data)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name in SUITES[arguments.suite].unknowns:
        if name in MADE_THERE:
            continue
        images = load_unknowns(name, known).images.permute(0, 2, 3, 1).numpy()
        if (images == images[..., :1]).all():
            images = images[..., 0]  # grey: a third of the bytes
        path = arguments.folder / f"{name}.npz"
        np.savez_compressed(path, images=images)
        print(f"{path}: {len(images)} images, {path.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
