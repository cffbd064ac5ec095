"""One seed function per purpose: integers that identify a random draw determine its seed.

All seeds lie in 0 .. 2^32 - 1. The hash includes the purpose, so draws for different purposes are independent even
if their integers are equal. The same arguments give the same seed on every machine, Python and process.
"""

import hashlib


def order_seed(seed: int, epoch: int) -> int:
    """Return the seed of an epoch's permutation of the training samples."""
    return _derive("order", seed, epoch)


def rare_class_seed(seed: int, iteration: int, position: int) -> int:
    """Return the seed of the class, and of the image with it, that rare-class sampling takes for a position."""
    return _derive("rare class", seed, iteration, position)


def augmentation_seed(seed: int, iteration: int, position: int) -> int:
    """Return the seed of the crop, flip and colors of the image at `position` in the global batch."""
    return _derive("augmentation", seed, iteration, position)


def noise_seed(seed: int, iteration: int, position: int) -> int:
    """Return the seed of the noise that the model draws for that image in training, such as diffusion noise."""
    return _derive("noise", seed, iteration, position)


def dropout_seed(seed: int, iteration: int, rank: int) -> int:
    """Return the seed of torch's own generators in a training step, for dropout and stochastic depth."""
    return _derive("dropout", seed, iteration, rank)


def evaluation_seed(seed: int, index: int) -> int:
    """Return the seed of the noise for image `index` of a data set in evaluation."""
    return _derive("evaluation", seed, index)


def file_seed(seed: int, view: str, name: str) -> int:
    """Return the seed of the noise for a view (scale, flip) of the image file `name`, where images have no index."""
    return _derive("file", seed, view, name)


def window_seed(image_seed: int, view: int, window: int) -> int:
    """Return the seed of the noise for one view (scale or flip) and window of an image with `image_seed`."""
    return _derive("window", image_seed, view, window)


def start_seed(image_seed: int, start: int) -> int:
    """Return the seed of random start number `start` of an image; start 0 uses `image_seed` itself."""
    return _derive("start", image_seed, start) if start else image_seed


def corruption_seed(seed: int, index: int) -> int:
    """Return the seed of the errors that a demo puts into the label map of image `index`."""
    return _derive("corruption", seed, index)


def scene_seed(seed: int, split: int, index: int) -> int:
    """Return the seed of a toy scene; without a purpose in the hash, as for the stored scenes."""
    return _derive(seed, split, index)


def _derive(*keys: int | str) -> int:
    text = ",".join(key if isinstance(key, str) else str(int(key)) for key in keys)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")
