"""Random training samples of images and their masks, as the original makes them.

A sample is made in three steps: a `Placement` of the image on the sample's canvas is drawn; image and annotation are
placed; colours are jittered. Only what is on the canvas becomes boolean masks. Everything random comes from the
generator that is passed.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.random import Generator
from PIL import Image, ImageOps
from torch import Tensor
from transformers.image_utils import SizeDict

from ..known.recipes import Recipe, Size
from ..processing.images import get_resized_size
from ..processing.labels import resize_labels
from ..processing.rle import as_polygons, decode_segmentation, drawable_polygons


PADDING = 128
"""Grey that fills a sample outside the image."""
CROP_TRIES = 10
"""Windows drawn at most to find one without a dominant class."""
BRIGHTNESS, CONTRAST, SATURATION, HUE = 32.0, (0.5, 1.5), (0.5, 1.5), 18
"""Ranges of the colour jitter: what is added, what is multiplied (twice), and turns of hue by up to 2 * 18 degrees."""


# --- geometry ---


class Placement(NamedTuple):
    """Place of an image on a canvas: it is mirrored or not, resized, cropped, and put at the top left.

    Attributes:
        is_mirrored: whether left and right change places.
        resized: height and width after resizing.
        offset: rows above and columns left of the window that is cropped from the resized image.
        window: height and width of that window.
        canvas: height and width of the canvas, no smaller than the window.
    """

    is_mirrored: bool
    resized: Size
    offset: Size
    window: Size
    canvas: Size


def whole_image(size: Size) -> Placement:
    """Return the placement that changes nothing."""
    return Placement(False, size, (0, 0), size, size)


def draw_placement(size: Size, recipe: Recipe, rng: Generator) -> Placement:
    """Draw a random placement of an image of `size` (height, width) by a recipe.

    Raises:
        ValueError: if the image is so elongated that resizing would leave one side without a pixel.
    """
    is_mirrored = bool(rng.random() < recipe.flip_probability)
    if recipe.scale_range is not None:
        resized = _fit(size, recipe.crop_size, rng.uniform(*recipe.scale_range))
        # One number for both axes: the original's windows are on the diagonal.
        share = rng.random()
        window = _smaller(resized, recipe.crop_size)
        offset = (round((resized[0] - window[0]) * share), round((resized[1] - window[1]) * share))
    else:
        edges = {"shortest_edge": int(rng.choice(recipe.shortest_edges)), "longest_edge": recipe.longest_edge}
        resized = get_resized_size(size, SizeDict(**edges))
        window = _smaller(resized, recipe.crop_size)
        offset = _draw_offset(resized, window, rng)
    return Placement(is_mirrored, resized, offset, window, recipe.crop_size if recipe.is_padded else window)


def place_item(item: Mapping[str, Any], size: Size, recipe: Recipe, rng: Generator) -> Placement:
    """Draw a placement for an item of this size; errors name the item."""
    try:
        return draw_placement(size, recipe, rng)
    except ValueError as error:
        raise ValueError(f"{item.get('file_name') or item['image_id']}: {error}") from error


def _fit(size: Size, frame: Size, factor: float) -> Size:
    """Scale `size` to fit into `factor` times the frame."""
    scale = min(factor * outer / inner for outer, inner in zip(frame, size, strict=True))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _smaller(first: Size, second: Size) -> Size:
    return min(first[0], second[0]), min(first[1], second[1])


def _draw_offset(resized: Size, window: Size, rng: Generator) -> Size:
    rows, columns = (int(rng.integers(whole - part + 1)) for whole, part in zip(resized, window, strict=True))
    return rows, columns


def cut_image(image: Image.Image, placement: Placement) -> Image.Image:
    """Crop the window of the mirrored and bilinearly resized image, RGB.

    Only the window is computed: at twice the size of a large photo the rest would take most of the time and memory.
    """
    (top, left), (height, width) = placement.offset, placement.window
    if placement.is_mirrored:
        left = placement.resized[1] - left - width
    across, down = image.width / placement.resized[1], image.height / placement.resized[0]
    right, bottom = min((left + width) * across, image.width), min((top + height) * down, image.height)
    box = (left * across, top * down, right, bottom)
    window = image.resize((width, height), Image.Resampling.BILINEAR, box=box)
    return ImageOps.mirror(window) if placement.is_mirrored else window


def lay_on_canvas(window: Image.Image, canvas: Size) -> np.ndarray:
    """Put an RGB image at the top left of a grey canvas (height, width): (height, width, 3) uint8."""
    pixels = np.full((*canvas, 3), PADDING, dtype=np.uint8)
    pixels[: window.height, : window.width] = np.asarray(window)
    return pixels


def place_map(labels: np.ndarray, placement: Placement) -> np.ndarray:
    """Place labels or a mask (H, W) on the canvas by nearest neighbour, as Pillow resizes; 0 elsewhere; same dtype."""
    rows = _source_positions(labels.shape[0], placement.resized[0], placement.offset[0], placement.window[0])
    columns = _source_positions(labels.shape[1], placement.resized[1], placement.offset[1], placement.window[1])
    if placement.is_mirrored:
        columns = labels.shape[1] - 1 - columns
    canvas = np.zeros(placement.canvas, dtype=labels.dtype)
    canvas[: len(rows), : len(columns)] = labels[rows[:, None], columns]
    return canvas


def _source_positions(old: int, new: int, offset: int, length: int) -> np.ndarray:
    """Return which of `old` pixels `length` pixels from `offset` on show after resizing to `new`: (length,) int."""
    return resize_labels(np.arange(old)[None], (1, new))[0, offset : offset + length]


def place_polygons(polygons: Sequence[Any], size: Size, placement: Placement) -> list[list[float]]:
    """Move polygons `[x0, y0, x1, y1, …]` of an image of `size` (height, width) to pixels of the canvas.

    Polygons with fewer than three corners are left out; corners outside the window stay outside.
    """
    across, down = placement.resized[1] / size[1], placement.resized[0] / size[0]
    placed = []
    for polygon in drawable_polygons(as_polygons(polygons)):
        x, y = np.asarray(polygon, dtype=np.float64).reshape(-1, 2).T
        x = size[1] - x if placement.is_mirrored else x
        corners = np.stack([x * across - placement.offset[1], y * down - placement.offset[0]], axis=1)
        placed.append(corners.ravel().tolist())
    return placed


# --- targets ---


def place_targets(item: Mapping[str, Any], placement: Placement) -> tuple[np.ndarray, np.ndarray]:
    """Place the segments of an item on the canvas: masks and classes, without crowds and void.

    Args:
        item: `segments_info` (dicts of `id`, `category_id`, maybe `iscrowd`), and a `segmentation_map` (H, W) of ids,
            or a `segmentation` in each entry: COCO run lengths or polygons.
        placement: of the image.

    Returns:
        (N, height, width) bool and (N,) int64, in the order of `segments_info`; N may be 0.
    """
    segments = [info for info in item["segments_info"] if not info.get("iscrowd")]
    if "segmentation_map" in item:
        ids = place_map(np.asarray(item["segmentation_map"]), placement)
        present = set(np.unique(ids).tolist())
        segments = [info for info in segments if info["id"] in present and info["id"] != 0]
        masks = np.empty((len(segments), *placement.canvas), dtype=bool)
        for mask, info in zip(masks, segments, strict=True):
            np.equal(ids, info["id"], out=mask)
    else:
        masks, is_kept = _place_instances(item, segments, placement)
        segments = [info for info, kept in zip(segments, is_kept, strict=True) if kept]
    return masks, np.array([info["category_id"] for info in segments], dtype=np.int64)


def _place_instances(
    item: Mapping[str, Any], segments: Sequence[Mapping[str, Any]], placement: Placement
) -> tuple[np.ndarray, list[bool]]:
    """Place masks that may overlap: those on the canvas, (N, height, width) bool, and which of `segments` they are."""
    # A bit for a pixel until it is known how many are left: hundreds of masks are there twice for a moment.
    packed = []
    is_kept = []
    for info in segments:
        mask = place_mask(info["segmentation"], item["image"].size[::-1], placement)
        is_kept.append(bool(mask.any()))
        if is_kept[-1]:
            packed.append(pack_masks(mask))
    masks = np.empty((len(packed), *placement.canvas), dtype=bool)
    for mask, bits in zip(masks, packed, strict=True):
        mask[:] = np.unpackbits(bits, axis=-1, count=mask.shape[-1], bitorder="little")
    return masks, is_kept


def place_mask(segmentation: Any, size: Size, placement: Placement) -> np.ndarray:
    """Place one COCO `segmentation` of an image of `size` (height, width) on the canvas: bool.

    Polygons are moved and then drawn, so that their edges stay sharp; run lengths are decoded and resized.
    """
    if isinstance(segmentation, Mapping):
        return place_map(decode_segmentation(segmentation, *size), placement)
    mask = np.zeros(placement.canvas, dtype=bool)
    height, width = placement.window
    polygons = place_polygons(segmentation, size, placement)
    is_inside = (
        min(xs) < width and max(xs) > 0 and min(ys) < height and max(ys) > 0
        for xs, ys in ((polygon[::2], polygon[1::2]) for polygon in polygons)
    )
    if any(is_inside):
        mask[:height, :width] = decode_segmentation(polygons, height, width)
    return mask


def pack_masks(masks: np.ndarray) -> np.ndarray:
    """Pack eight pixels into a byte for the way to the device: (..., W) bool -> (..., ceil(W / 8)) uint8."""
    return np.packbits(masks, axis=-1, bitorder="little")


def unpack_masks(packed: Tensor, width: int) -> Tensor:
    """Invert `pack_masks` on the tensor's own device: (..., ceil(width / 8)) uint8 -> (..., width) bool."""
    bits = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=packed.device)
    # (..., bytes, 1) & (8,) -> (..., bytes, 8) -> (..., 8 * bytes)
    return (packed[..., None] & bits).ne(0).flatten(-2)[..., :width]


def largest_category_share(item: Mapping[str, Any], placement: Placement) -> float:
    """Return the share (0 to 1) of the most frequent class in the pixels of segments on the canvas; 1 without any."""
    areas: dict[int, int] = {}
    segments = [{**info, "iscrowd": 0} for info in item["segments_info"]]  # crowds count too
    masks, classes = place_targets({**item, "segments_info": segments}, placement)
    for mask, category in zip(masks, classes.tolist(), strict=True):
        areas[category] = areas.get(category, 0) + int(np.count_nonzero(mask))
    return max(areas.values()) / sum(areas.values()) if areas else 1.0


# --- colours ---


def jitter_colors(image: Image.Image, rng: Generator) -> Image.Image:
    """Vary brightness, contrast, saturation and hue of an RGB image, each with a probability of one half.

    Brightness comes first, contrast before or after the other two. Like the original's, results are clipped to 0–255
    and truncated after each change. Hue and saturation have Pillow's 8-bit steps (of 1.4 degrees and 1/255;
    the original's are OpenCV's, of 2 degrees and 1/255).
    """
    image = _scale_values(image, offset=rng.uniform(-BRIGHTNESS, BRIGHTNESS)) if rng.random() < 0.5 else image
    contrast_first = rng.random() < 0.5
    contrast = rng.uniform(*CONTRAST) if rng.random() < 0.5 else 1.0
    saturation = rng.uniform(*SATURATION) if rng.random() < 0.5 else 1.0
    turn = int(rng.integers(-HUE, HUE, endpoint=True)) if rng.random() < 0.5 else 0
    if contrast_first:
        return shift_hue(_scale_values(image, contrast), saturation, turn)
    return _scale_values(shift_hue(image, saturation, turn), contrast)


def _scale_values(image: Image.Image, factor: float = 1.0, offset: float = 0.0) -> Image.Image:
    """Return `factor` times each value plus `offset`, clipped and truncated to whole numbers."""
    if factor == 1.0 and offset == 0.0:
        return image
    return image.point(_table(np.arange(256, dtype=np.float32) * factor + offset) * len(image.getbands()))


def shift_hue(image: Image.Image, saturation: float, turn: int) -> Image.Image:
    """Multiply an RGB image's saturation and turn its hues by `turn` times 2 degrees."""
    if saturation == 1.0 and turn == 0:
        return image
    values = np.arange(256)
    # Pillow's hues go round in 255 steps.
    hue = _table((values + round(turn * 255 / 180)) % 255)
    return image.convert("HSV").point(hue + _table(values * saturation) + _table(values)).convert("RGB")


def _table(values: np.ndarray) -> list[int]:
    """Return a lookup table for one channel: 256 whole numbers from 0 to 255."""
    return values.clip(0, 255).astype(np.uint8).tolist()


# --- samples ---


class TrainingTransform:
    """Makes random training samples of items by a recipe; the original's are in `m2f_hf.known.recipes`."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def __call__(self, item: Mapping[str, Any], rng: Generator, size: int | None = None) -> dict[str, Any]:
        """Make a sample of an item. The same state of `rng` gives the same sample.

        Args:
            item: `image` (Pillow, RGB) and its segments, see `place_targets`.
            rng: the source of everything random.
            size: shorter side of the crops in pixels, other than the recipe's (`SizeSchedule.size_at`).

        Returns:
            `image` (height, width, 3) uint8, `mask_labels` (N, height, width) bool and `class_labels` (N,) int64, for
            the processor with `do_resize=False`. N counts the segments that are left, maybe 0.

        Raises:
            ValueError: if the image is too elongated, or an annotation does not fit it.
        """
        recipe = self.recipe if size is None else self.recipe.at_size(size)
        placement = self._place(item, recipe, rng)
        window = cut_image(item["image"], placement)
        if recipe.color_jitter:
            window = jitter_colors(window, rng)
        masks, classes = place_targets(item, placement)
        return {"image": lay_on_canvas(window, placement.canvas), "mask_labels": masks, "class_labels": classes}

    @staticmethod
    def _place(item: Mapping[str, Any], recipe: Recipe, rng: Generator) -> Placement:
        placement = place_item(item, item["image"].size[::-1], recipe, rng)
        if recipe.max_category_share < 1:
            for _ in range(CROP_TRIES - 1):
                if largest_category_share(item, placement) < recipe.max_category_share:
                    break
                placement = placement._replace(offset=_draw_offset(placement.resized, placement.window, rng))
        return placement
