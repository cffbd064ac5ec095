"""Augmentation with torchvision's transforms v2, after the published steps.

segcore train ddrnet_23_slim_toy --data.augment examples/augment_torchvision.py:augment
"""

import numpy as np
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

STEPS = v2.Compose(
    [
        v2.RandomRotation(15, fill={tv_tensors.Image: 0, tv_tensors.Mask: 255}),  # 255: ignored
        v2.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3),
        v2.RandomGrayscale(0.1),
    ]
)


def augment(image: np.ndarray, mask: np.ndarray, rng: np.random.RandomState) -> tuple[np.ndarray, np.ndarray]:
    """Return another image, uint8 (H, W, 3), and its mask (H, W)."""
    picture = tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1))
    classes = tv_tensors.Mask(torch.from_numpy(mask)[None])
    with torch.random.fork_rng(devices=[]):  # torchvision draws from torch's generator, which training uses as well
        torch.manual_seed(rng.randint(2**31))
        picture, classes = STEPS(picture, classes)
    return picture.permute(1, 2, 0).numpy(), classes[0].numpy()
