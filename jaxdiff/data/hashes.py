"""Hashes of images, which find equal and similar ones."""

import hashlib
import itertools

import numpy as np
from PIL import Image

BITS = 64
BEYOND_WHITE = 510.0  # grey of transparent pixels for `dhash`: unlike any opaque one, white included


def content_hash(data: bytes) -> int:
    """A 64-bit hash of a file's bytes."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def dhash(image: Image.Image) -> int:
    """A 64-bit difference hash, robust to resizing and compression: where 8 x 9 grey pixels get brighter to the right.

    (N. Krawetz, "Kind of like that", hackerfactor.com, 2013.) Transparent pixels count as brighter than white, so that
    the outline of every drawing counts and hidden colours do not. Every number is the hash of some image: 0 of a plain
    one, or of one that gets darker from left to right.
    """
    grey = image.convert("L")
    if image.has_transparency_data:
        alpha = np.asarray(image.convert("RGBA").getchannel("A"), np.float32) / 255
        grey = Image.fromarray(np.asarray(grey, np.float32) * alpha + BEYOND_WHITE * (1 - alpha))
    small = np.asarray(grey.resize((9, 8), Image.Resampling.BOX)).round().astype(np.int16)
    return int.from_bytes(np.packbits(small[:, 1:] > small[:, :-1]).tobytes(), "big")


def near_duplicates(hashes: np.ndarray, distance: int) -> np.ndarray:
    """Whether each hash differs in at most `distance` bits from an earlier one that is kept.

    The bits are split into distance + 1 bands. Two hashes that differ in at most `distance` bits share at least one
    band, so that only hashes that share a band are compared.

    Args:
        hashes: uint64 [N].

    Returns:
        bool [N].

    >>> near_duplicates(np.asarray([0, 1, 255, 0], np.uint64), 1).tolist()
    [False, True, False, True]
    """
    unique, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    edges = np.linspace(0, BITS, distance + 2).astype(int)
    bands = [(int(low), (1 << int(high - low)) - 1) for low, high in itertools.pairwise(edges)]
    tables: list[dict[int, list[int]]] = [{} for _ in bands]
    kept = np.zeros(len(unique), bool)
    for i in np.argsort(first):
        hash_value = int(unique[i])
        keys = [(hash_value >> low) & mask for low, mask in bands]
        groups = [table.setdefault(key, []) for table, key in zip(tables, keys, strict=True)]
        if not any((hash_value ^ other).bit_count() <= distance for group in groups for other in group):
            kept[i] = True
            for group in groups:
                group.append(hash_value)
    result = ~kept[inverse.ravel()]
    result[np.setdiff1d(np.arange(len(hashes)), first)] = True  # equal to an earlier one
    return result
