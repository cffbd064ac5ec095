"""Every random draw of a run follows from integers that say what it is for."""

import hashlib


def derive(*keys: int) -> int:
    """Return a seed in 0 .. 2^32 - 1 that depends on every one of `keys` and on their order, and on nothing else.

    The same keys give the same seed on every machine, Python and process; different ones practically never do.
    Evaluation uses (seed, dataset index, view, window), training (seed, iteration, position in the global batch).
    """
    text = ",".join(str(int(key)) for key in keys)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")
