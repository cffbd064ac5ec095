"""Make the images of docs/predictions.md with a trained run of `ddp-seg train ddp_resnet18_toy`.

python scripts/prediction_images.py runs/ddp_resnet18_toy
"""

import sys
import tempfile
from pathlib import Path

from PIL import Image

import segcore
from segcore.cli.main import main

IMAGES = Path(__file__).parents[1] / "docs" / "images"
SCENE = 3
"""Number of the validation image."""


def make(run: str) -> None:
    """Write the images, the longest side at most 1100 pixels."""
    root = segcore.load_experiment(run).data.root
    scene = sorted((root / "leftImg8bit" / "val").rglob("*.png"))[SCENE]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        main("ddp_seg", ["predict", run, str(scene), f"{out}/a.png", "--legend", "--contours", "--confidence",
                         "--uncertainty", "--steps"])  # fmt: skip
        main("ddp_seg", ["predict", run, str(scene), f"{out}/b.png", "--contours", "--opacity", "0"])
        files = {"overlay": "a_overlay", "contours": "b_overlay", "confidence": "a_confidence",
                 "uncertainty": "a_uncertainty", "steps": "a_steps"}  # fmt: skip
        for name, file in files.items():
            picture = Image.open(out / f"{file}.png")
            picture.thumbnail((1100, 1100))
            picture.save(IMAGES / f"prediction_{name}.jpg", quality=80, optimize=True)
        Image.open(out / "a.png").save(IMAGES / "prediction_mask.png", optimize=True)


if __name__ == "__main__":
    make(sys.argv[1])
