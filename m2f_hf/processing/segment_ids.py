"""Convert segment ids to the colours of COCO's panoptic PNGs and back: id = R + 256 G + 65536 B."""

from typing import Any

import numpy as np


NUM_IDS = 2**24  # ids that three channels of 8 bits can hold


def id_to_rgb(segment_ids: Any) -> np.ndarray:
    """Convert ids, (...) whole numbers from 0 to 2^24 - 1, to (..., 3) uint8 colours.

    Raises:
        ValueError: fractions, and ids out of range.
    """
    ids = np.asarray(segment_ids)
    if ids.dtype.kind not in "iu":
        raise ValueError(f"segment ids are whole numbers, not {ids.dtype}")
    if ids.size and (ids.min() < 0 or ids.max() >= NUM_IDS):
        raise ValueError(f"segment ids must be 0 to {NUM_IDS - 1}, not {ids.min()} to {ids.max()}: renumber them first")
    ids = ids.astype(np.uint32)
    return np.stack([ids & 255, ids >> 8 & 255, ids >> 16], axis=-1).astype(np.uint8)


def rgb_to_id(rgb: Any) -> np.ndarray:
    """Convert (..., 3) whole numbers from 0 to 255, or a Pillow image of mode RGB, to ids: (...) int32.

    Raises:
        ValueError: another number of channels, fractions, and values out of range.
    """
    colors = np.asarray(rgb)
    if colors.ndim == 0 or colors.shape[-1] != 3 or colors.dtype.kind not in "iu":
        raise ValueError(f"colours of segment ids are (..., 3) of whole numbers, not {colors.dtype} of {colors.shape}")
    if colors.dtype != np.uint8 and colors.size and (colors.min() < 0 or colors.max() > 255):
        raise ValueError(f"colours of segment ids are 0 to 255, not {colors.min()} to {colors.max()}")
    red, green, blue = np.moveaxis(colors.astype(np.int32), -1, 0)
    return red + 256 * green + 65536 * blue
