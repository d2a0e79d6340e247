"""Convert masks between boolean arrays and what annotations hold: COCO run lengths, polygons, maps of segment ids."""

import math
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
from torch import Tensor


FARTHEST = 100_000
"""Largest distance in pixels of a corner from the image's origin: to draw a line takes memory for its length."""
_MAGNIFICATION = 10
"""How much an image may be enlarged before its polygons are drawn."""


def decode_segmentation(
    segmentation: Mapping[str, Any] | Sequence[Any] | np.ndarray, height: int, width: int
) -> np.ndarray:
    """Decode a COCO `segmentation` to a mask: (height, width) bool.

    Args:
        segmentation: run lengths `{"size": [height, width], "counts": …}`, compressed (str or bytes) or not (list); or
            a list of polygons `[x0, y0, x1, y1, …]` in pixels, whose union is meant; or a mask already.

    Raises:
        ValueError: the segmentation is for another size, or damaged.
        ImportError: polygons, without `pycocotools` (their edges are drawn as COCO's own code draws them).
    """
    if isinstance(segmentation, np.ndarray) and segmentation.ndim == 2:
        if segmentation.shape != (height, width):
            raise ValueError(f"a mask of {segmentation.shape[0]}x{segmentation.shape[1]} for {height}x{width} pixels")
        return segmentation.astype(bool)
    if isinstance(segmentation, Mapping):
        return decode_rle(segmentation, height, width)
    return _draw_polygons(list(segmentation), height, width)


def run_lengths(counts: str | bytes | Sequence[int]) -> np.ndarray:
    """Return the lengths of the runs of a COCO RLE, down the columns, of zeros first: (runs,) int64.

    Compressed counts have five bits a character, lowest first, plus 48; a sixth bit says that the number goes on, the
    fifth of its last character is its sign; from the fourth number on it is the difference to the one two before.
    """
    if not isinstance(counts, (str, bytes)):
        return np.asarray(counts, dtype=np.int64)
    codes = np.frombuffer(counts.encode("ascii") if isinstance(counts, str) else counts, dtype=np.uint8)
    if not codes.size:
        return np.zeros(0, dtype=np.int64)
    groups = codes.astype(np.int64) - 48
    if groups.min() < 0 or groups.max() > 63 or groups[-1] & 0x20:
        raise ValueError("damaged RLE counts: they are not in COCO's compressed form")
    is_last = (groups & 0x20) == 0
    starts = np.flatnonzero(np.r_[True, is_last[:-1]])
    lengths = np.diff(np.r_[starts, groups.size])
    if lengths.max() > 12:
        raise ValueError("damaged RLE counts: a run longer than 60 bits")
    place = np.arange(groups.size) - np.repeat(starts, lengths)
    numbers = np.add.reduceat((groups & 0x1F) << (5 * place), starts)
    is_negative = (groups[is_last] & 0x10) != 0
    numbers -= is_negative * (np.int64(1) << (5 * lengths))
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers


def encode_rle(mask: Tensor | np.ndarray) -> dict[str, Any]:
    """Encode a (height, width) bool mask as a COCO RLE.

    Returns:
        `size` [height, width] and `counts`, compressed as `run_lengths` says. `pycocotools.mask.decode` reads it.
    """
    array = mask.cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask)
    pixels = array.T.astype(bool, order="C", copy=False).ravel()
    ends = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    if pixels[:1].any():
        ends = np.concatenate([[0], ends])  # the first run, of zeros, is empty
    runs = np.diff(ends, prepend=0, append=pixels.size).astype(np.int64)
    runs[3:] -= runs[1:-2]  # NumPy reads before it writes where the two overlap

    num_groups = int(np.abs(runs).max()).bit_length() // 5 + 1  # with the bit of the sign
    rest = runs[:, None] >> 5 * np.arange(num_groups)  # (runs, groups)
    groups = rest & 0x1F
    is_last = rest >> 5 == -(groups >> 4)  # what is left is nothing but the sign
    is_written = np.cumsum(is_last, axis=1) - is_last == 0  # up to the first last one
    counts = (groups + 0x20 * ~is_last + 48)[is_written].astype(np.uint8).tobytes().decode("ascii")
    return {"size": [int(array.shape[0]), int(array.shape[1])], "counts": counts}


def decode_rle(rle: Mapping[str, Any], height: int, width: int) -> np.ndarray:
    """Decode a COCO RLE, compressed or not, to a mask: (height, width) bool.

    Raises:
        ValueError: it is for another size, or damaged.
    """
    runs = check_rle(rle, height, width)
    values = np.zeros(len(runs), dtype=bool)
    values[1::2] = True
    return np.repeat(values, runs).reshape(width, height).T  # run lengths go down the columns


def check_rle(rle: Mapping[str, Any], height: int | None = None, width: int | None = None) -> np.ndarray:
    """Return the run lengths of a COCO RLE, checked against this size, by default its own.

    Raises:
        ValueError: it is for another size, or damaged.
    """
    size = rle.get("size")
    if not isinstance(size, Sequence) or len(size) != 2 or not all(isinstance(side, Integral) for side in size):
        raise ValueError(f"an RLE of size {size} (expected height and width)")
    if height is not None and list(size) != [height, width]:
        raise ValueError(f"an RLE of size {list(size)} for {height}x{width} (height x width) pixels")
    if "counts" not in rle:
        raise ValueError("an RLE without counts")
    try:
        runs = run_lengths(rle["counts"])
    except (TypeError, OverflowError) as error:
        raise ValueError(f"damaged RLE counts: {error}") from error
    if runs.ndim != 1 or (runs < 0).any() or runs.sum() != size[0] * size[1]:
        raise ValueError(f"damaged RLE: its runs cover {int(runs.sum())} of {size[0] * size[1]} pixels")
    return runs


def _draw_polygons(polygons: Sequence[Any], height: int, width: int) -> np.ndarray:
    try:
        from pycocotools import mask as coco
    except ImportError as error:
        raise ImportError("Polygons are drawn by pycocotools: pip install 'm2f_hf[coco]'.") from error
    drawable = drawable_polygons(as_polygons(polygons), _MAGNIFICATION * FARTHEST)
    if not drawable:
        return np.zeros((height, width), dtype=bool)
    return decode_rle(coco.merge(coco.frPyObjects(drawable, height, width)), height, width)


def as_polygons(segmentation: Any) -> list[list[float]]:
    """Return the parts of a `segmentation` as `[x0, y0, x1, y1, …]`; corners may be `[x, y]`, and one part stand alone.

    Raises:
        ValueError: it is no list of lists of numbers.
    """
    if not isinstance(segmentation, (list, tuple, np.ndarray)):
        raise ValueError(f"{type(segmentation).__name__} instead of a list of polygons")
    parts = list(segmentation)
    if parts and (np.isscalar(parts[0]) or (len(parts) > 2 and all(np.shape(corner) == (2,) for corner in parts))):
        parts = [parts]
    # Plain lists, as a file has hundreds of thousands of polygons with a few corners each.
    return [part if isinstance(part, list) and part and np.isscalar(part[0]) else _flat(part) for part in parts]


def _flat(part: Any) -> list[float]:
    try:
        return np.asarray(part, dtype=np.float64).ravel().tolist()
    except (TypeError, ValueError) as error:
        raise ValueError(f"a polygon with something else than numbers: {error}") from error


def drawable_polygons(polygons: Sequence[list[float]], farthest: int = FARTHEST) -> list[list[float]]:
    """Return the polygons with three corners or more and as many x as y.

    Raises:
        ValueError: a corner is no number, or further than `farthest` pixels from the origin.
    """
    drawable = [polygon for polygon in polygons if len(polygon) >= 6 and len(polygon) % 2 == 0]
    try:
        is_fine = all(-farthest <= min(p) and max(p) <= farthest and math.isfinite(sum(p)) for p in drawable)
    except TypeError:
        is_fine = False
    if not is_fine:
        raise ValueError(f"corners that are no numbers, or further than {farthest} pixels from the image")
    return drawable


def segment_masks(annotation: Mapping[str, Any]) -> np.ndarray:
    """Return the masks of an item's `segments_info`, in its order, crowds included: (N, height, width) bool.

    Args:
        annotation: an item of a dataset or what its `annotation` gives: `segments_info`, `height`, `width`, and
            `segmentation_map` unless every segment has a `segmentation`. Masks of the latter kind may overlap.
    """
    segments = annotation["segments_info"]
    size = (annotation["height"], annotation["width"])
    masks = np.zeros((len(segments), *size), dtype=bool)
    for mask, segment in zip(masks, segments, strict=True):
        if "segmentation_map" in annotation:
            np.equal(annotation["segmentation_map"], segment["id"], out=mask)
        else:
            mask[:] = decode_segmentation(segment["segmentation"], *size)
    return masks
