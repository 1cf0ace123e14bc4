"""A network that says "unknown", on a folder of your own images: trained, exported, asked.

python examples/unknown_images.py [FOLDER] [--small]

FOLDER has train/CLASS/*.png and test/CLASS/*.png. Without one, a folder of discs, squares and crosses is drawn, and
the network is asked about triangles.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from uasparse_kernels.training.config import FitConfig, arm_settings
from uasparse_kernels.training.export import export_run
from uasparse_kernels.training.predict import load_export
from uasparse_kernels.training.run import fit

small = "--small" in sys.argv
random = np.random.default_rng(0)


def draw(shape, file):
    noise = random.integers(0, 60, (32, 32), np.uint8)
    image = Image.fromarray(noise)
    pen, (x, y), r = ImageDraw.Draw(image), random.integers(11, 21, 2).tolist(), int(random.integers(6, 10))
    light = int(random.integers(150, 255))
    if shape == "disc":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=light)
    elif shape == "square":
        pen.rectangle((x - r, y - r, x + r, y + r), fill=light)
    elif shape == "cross":
        pen.line((x - r, y, x + r, y), fill=light, width=4)
        pen.line((x, y - r, x, y + r), fill=light, width=4)
    else:
        pen.polygon([(x - r, y + r), (x + r, y + r), (x, y - r)], fill=light)
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)


with tempfile.TemporaryDirectory() as folder:
    folders = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    data, asked = Path(*folders) if folders else Path(folder) / "images", Path(folder) / "asked"
    if not folders:
        for shape in ("disc", "square", "cross"):
            for split, count in (("train", 300 if small else 600), ("test", 50 if small else 150)):
                for i in range(count):
                    draw(shape, data / split / shape / f"{i}.png")
    for i in range(20):
        draw("triangle", asked / f"{i}.png")

    settings = arm_settings("rigl+vote+hard-shuffle") | {"unknown_share": 1 / 8}  # small batches: four images of each
    config = FitConfig(data=f"folder:{data}", epochs=8 if small else 12, batch_size=32, delta_t=10, **settings)
    fit(config, Path(folder) / "run", unknowns=("noise",), scores=("u", "msp"))
    _, about = export_run(Path(folder) / "run", onnx=False)
    print(f"test accuracy: {about.accuracy:.3f}; {about.test_accepted:.0%} of the test images taken as known")

    predictor = load_export(Path(folder) / "run")
    rows = predictor.files([asked])
    for row in rows[:4]:
        print(
            Path(row["file"]).name, row["class"], f"{row['confidence']:.2f}", "unknown" if row["unknown"] else "known"
        )
    print(f"{sum(row['unknown'] for row in rows)} of {len(rows)} triangles are called unknown")
