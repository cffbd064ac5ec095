"""Convert the CrackForest data set (github.com/cuilimeng/CrackForest-dataset) to images and masks that `folder` reads.

    python examples/convert_cracks.py CrackForest-dataset data/mine

The set has photos in `image/NNN.jpg` and for most of them a MATLAB struct `groundTruth` in `groundTruth/NNN.mat`, whose
`Segmentation` holds 1 for the ground and higher numbers for cracks. Every fifth photo goes to `val`. Needs scipy.
"""

import sys
from pathlib import Path
from shutil import copyfile

import numpy as np
from PIL import Image

try:
    from scipy.io import loadmat
except ImportError:
    sys.exit("needs scipy, which reads MATLAB files: pip install scipy")

if len(sys.argv) != 3:
    sys.exit(__doc__)
source, target = map(Path, sys.argv[1:])
truths = sorted((source / "groundTruth").glob("*.mat"))
if not truths:
    sys.exit(f"{source}/groundTruth/*.mat: no files found; give the folder of the data set")
for number, path in enumerate(truths):
    photo, truth = source / "image" / f"{path.stem}.jpg", loadmat(path)["groundTruth"]["Segmentation"][0, 0]
    split = "val" if number % 5 == 4 else "train"
    for kind in ("images", "masks"):
        (target / kind / split).mkdir(parents=True, exist_ok=True)
    copyfile(photo, target / "images" / split / photo.name)
    Image.fromarray((truth > 1).astype(np.uint8)).save(target / "masks" / split / f"{photo.stem}.png")
print(f"{len(truths)} photos with masks 0 (ground) and 1 (crack) in {target}")
