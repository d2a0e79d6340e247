"""Random training samples of images and their masks, as the original makes them.

An item of a dataset becomes a sample in three steps: a `Placement` is drawn, which says where the image lands on the
canvas of the sample; image and annotation are placed; colours are jittered. Of annotations only what lands on the
canvas is ever written down as boolean masks. Everything random comes from the generator that is passed.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.random import Generator
from PIL import Image, ImageOps
from torch import Tensor
from transformers.image_utils import SizeDict

from ..draw.segments import contact_sheet, draw_segments
from ..known.recipes import Recipe, Size
from ..processing.images import get_resized_size
from ..processing.labels import resize_labels
from ..processing.rle import as_polygons, decode_segmentation, drawable_polygons


PADDING = 128
"""Grey that fills a sample where the image does not reach."""
CROP_TRIES = 10
"""Windows drawn to find one that no class covers too much of."""
BRIGHTNESS, CONTRAST, SATURATION, HUE = 32.0, (0.5, 1.5), (0.5, 1.5), 18
"""Ranges of the colour jitter: what is added, what is multiplied (twice), and turns of hue by up to 2 * 18 degrees."""


# --- geometry ---


class Placement(NamedTuple):
    """Where an image lands on a canvas: it is mirrored or not, then resized, then cut, then laid at the top left.

    Attributes:
        is_mirrored: Whether left and right change places.
        resized: Height and width after resizing.
        offset: Rows above and columns left of the window that is cut out of the resized image.
        window: Height and width of that window.
        canvas: Height and width of the canvas, no smaller than the window.
    """

    is_mirrored: bool
    resized: Size
    offset: Size
    window: Size
    canvas: Size


def draw_placement(size: Size, recipe: Recipe, rng: Generator) -> Placement:
    """Draw where an image of `size` (height, width) lands, as the recipe says.

    Raises:
        ValueError: if the image is so elongated that resizing would leave one side without a pixel.
    """
    is_mirrored = bool(rng.random() < recipe.flip_probability)
    if recipe.scale_range is not None:
        resized = _fit(size, recipe.crop_size, rng.uniform(*recipe.scale_range))
        # One number for both axes: the original's windows lie on the diagonal.
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
    """`draw_placement` for an item of this size; errors name it."""
    try:
        return draw_placement(size, recipe, rng)
    except ValueError as error:
        raise ValueError(f"{item.get('file_name') or item['image_id']}: {error}") from error


def _fit(size: Size, frame: Size, factor: float) -> Size:
    """`size` scaled as large as `factor` times the frame holds."""
    scale = min(factor * outer / inner for outer, inner in zip(frame, size, strict=True))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _smaller(first: Size, second: Size) -> Size:
    return min(first[0], second[0]), min(first[1], second[1])


def _draw_offset(resized: Size, window: Size, rng: Generator) -> Size:
    rows, columns = (int(rng.integers(whole - part + 1)) for whole, part in zip(resized, window, strict=True))
    return rows, columns


def cut_image(image: Image.Image, placement: Placement) -> Image.Image:
    """The window of the mirrored and bilinearly resized image, RGB.

    Only the window is computed, from the part of the image that it shows: at twice the size of a large photo the rest
    would take most of the time and memory.
    """
    (top, left), (height, width) = placement.offset, placement.window
    if placement.is_mirrored:
        left = placement.resized[1] - left - width
    across, down = image.width / placement.resized[1], image.height / placement.resized[0]
    box = (
        left * across,
        top * down,
        min((left + width) * across, image.width),
        min((top + height) * down, image.height),
    )
    window = image.resize((width, height), Image.Resampling.BILINEAR, box=box)
    return ImageOps.mirror(window) if placement.is_mirrored else window


def lay_on_canvas(window: Image.Image, canvas: Size) -> np.ndarray:
    """An RGB image at the top left of a grey canvas (height, width): (height, width, 3) uint8."""
    pixels = np.full((*canvas, 3), PADDING, dtype=np.uint8)
    pixels[: window.height, : window.width] = np.asarray(window)
    return pixels


def place_map(labels: np.ndarray, placement: Placement) -> np.ndarray:
    """Labels or a mask (H, W) on the canvas, by nearest neighbour; where they do not reach it is 0: canvas, any dtype.

    Reads the pixels that resizing with Pillow would.
    """
    rows = _source_positions(labels.shape[0], placement.resized[0], placement.offset[0], placement.window[0])
    columns = _source_positions(labels.shape[1], placement.resized[1], placement.offset[1], placement.window[1])
    if placement.is_mirrored:
        columns = labels.shape[1] - 1 - columns
    canvas = np.zeros(placement.canvas, dtype=labels.dtype)
    canvas[: len(rows), : len(columns)] = labels[rows[:, None], columns]
    return canvas


def _source_positions(old: int, new: int, offset: int, length: int) -> np.ndarray:
    """Which of `old` pixels each of `length` pixels from `offset` on shows, after resizing to `new`: (length,) int."""
    return resize_labels(np.arange(old)[None], (1, new))[0, offset : offset + length]


def place_polygons(polygons: Sequence[Any], size: Size, placement: Placement) -> list[list[float]]:
    """Polygons `[x0, y0, x1, y1, …]` on an image of `size` (height, width), in pixels of the canvas.

    Parts with fewer than three corners are left out; corners outside the window keep their places there.
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
    """Masks and classes of the segments that land on the canvas, crowds and void left out.

    Args:
        item: `segments_info` (dicts of `id`, `category_id`, maybe `iscrowd`), and a `segmentation_map` (H, W) of ids,
            or a `segmentation` in each entry: COCO run lengths or polygons.
        placement: where the image lands.

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
    """Masks that may overlap: those left on the canvas, (N, height, width) bool, and which of `segments` they are."""
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
    """One COCO `segmentation` of an image of `size` (height, width), on the canvas: bool.

    Polygons are moved and then drawn, so that their edges stay sharp; run lengths are decoded and resized.
    """
    if isinstance(segmentation, Mapping):
        return place_map(decode_segmentation(segmentation, *size), placement)
    mask = np.zeros(placement.canvas, dtype=bool)
    height, width = placement.window
    polygons = place_polygons(segmentation, size, placement)
    is_inside = [
        min(polygon[::2]) < width and max(polygon[::2]) > 0 and min(polygon[1::2]) < height and max(polygon[1::2]) > 0
        for polygon in polygons
    ]
    if any(is_inside):
        mask[:height, :width] = decode_segmentation(polygons, height, width)
    return mask


def pack_masks(masks: np.ndarray) -> np.ndarray:
    """Eight pixels in a byte, for the way from a worker to the device: (..., W) bool -> (..., ceil(W / 8)) uint8."""
    return np.packbits(masks, axis=-1, bitorder="little")


def unpack_masks(packed: Tensor, width: int) -> Tensor:
    """Inverse of `pack_masks`, on the tensor's own device: (..., ceil(width / 8)) uint8 -> (..., width) bool."""
    bits = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=packed.device)
    # (..., bytes, 1) & (8,) -> (..., bytes, 8) -> (..., 8 * bytes)
    return (packed[..., None] & bits).ne(0).flatten(-2)[..., :width]


def largest_category_share(item: Mapping[str, Any], placement: Placement) -> float:
    """Share (0 to 1) of the pixels of segments on the canvas that the most frequent class has; 1 without any."""
    areas: dict[int, int] = {}
    masks, classes = place_targets({**item, "segments_info": _with_crowds(item)}, placement)
    for mask, category in zip(masks, classes.tolist(), strict=True):
        areas[category] = areas.get(category, 0) + int(np.count_nonzero(mask))
    return max(areas.values()) / sum(areas.values()) if areas else 1.0


def _with_crowds(item: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{**info, "iscrowd": 0} for info in item["segments_info"]]


# --- colours ---


def jitter_colors(image: Image.Image, rng: Generator) -> Image.Image:
    """Vary brightness, contrast, saturation and hue of an RGB image, each with a probability of one half.

    Brightness comes first, contrast before or after the other two. Like the original's, results are clipped to 0–255
    and cut to whole numbers after each change. Hue and saturation have Pillow's 8-bit steps (of 1.4 degrees and 1/255;
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
    """`factor` times each value plus `offset`, clipped and cut to whole numbers."""
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
    """A look-up table for one channel: 256 whole numbers from 0 to 255."""
    return values.clip(0, 255).astype(np.uint8).tolist()


# --- samples ---


class TrainingTransform:
    """Items of a dataset to random training samples, by a recipe.

    Args:
        recipe: How. Recipes of the original are in `m2f_hf.known.recipes`.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def __call__(self, item: Mapping[str, Any], rng: Generator, size: int | None = None) -> dict[str, Any]:
        """One sample of an item. The same state of `rng` gives the same sample.

        Args:
            item: `image` (Pillow, RGB) and its segments, see `place_targets`.
            rng: Where everything random comes from.
            size: Shorter side of the crops in pixels, other than the recipe's (`SizeSchedule.size_at`).

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


# --- inspection ---


def draw_sample(
    sample: Mapping[str, Any],
    id2label: Mapping[int, str] | None = None,
    colors: Mapping[int, Sequence[int]] | None = None,
) -> Image.Image:
    """A sample's targets drawn over its image. Where masks overlap, the smaller one is seen.

    Args:
        sample: What `TrainingTransform` returns.
        id2label: Names of the classes.
        colors: RGB of classes.
    """
    masks, classes = sample["mask_labels"], sample["class_labels"]
    segmentation = np.zeros(masks.shape[1:], dtype=np.int32)
    for index in sorted(range(len(masks)), key=lambda index: -np.count_nonzero(masks[index])):
        segmentation[masks[index]] = index + 1
    segments = [{"id": index, "label_id": int(label)} for index, label in enumerate(classes, start=1)]
    return draw_segments(Image.fromarray(sample["image"]), segmentation, segments, id2label, colors)


def inspect_augmentation(
    dataset: Any,
    transform: TrainingTransform,
    categories: Sequence[Mapping[str, Any]] = (),
    indices: Sequence[int] = (0, 1, 2),
    num_samples: int = 4,
    seed: int = 0,
    size: int | None = None,
    side: int = 400,
) -> Image.Image:
    """A contact sheet: one row for each item, with the item and random samples of it, targets drawn over them.

    Args:
        dataset: Items as the readers of `m2f_hf.data` give them.
        transform: What makes the samples.
        categories: Dicts of `id`, `name` and maybe `color` (RGB), for names and colours of classes.
        indices: Which items.
        num_samples: How many samples of each.
        seed: Of the samples.
        size: Shorter side of the crops in pixels, other than the recipe's.
        side: Pixels that a picture's longer side is shown with.

    Raises:
        ValueError: without an item to show.
    """
    if not len(indices):
        raise ValueError("Nothing to show: give at least one index of the dataset.")
    id2label, colors = names_and_colors(categories)
    rows, titles = [], []
    for index in indices:
        item = dataset[index]
        height, width = item["image"].size[::-1]
        whole = Placement(False, (height, width), (0, 0), (height, width), (height, width))
        masks, classes = place_targets(item, whole)
        samples = [{"image": np.array(item["image"]), "mask_labels": masks, "class_labels": classes}]
        samples += [transform(item, np.random.default_rng((seed, index, k)), size) for k in range(num_samples)]
        pictures = [draw_sample(sample, id2label, colors) for sample in samples]
        rows.append([ImageOps.contain(picture, (side, side), Image.Resampling.LANCZOS) for picture in pictures])
        counts = ", ".join(str(len(sample["class_labels"])) for sample in samples[1:])
        titles.append(f"{item.get('file_name') or item['image_id']}: {len(masks)} targets; in the samples {counts}")
    return sheet_of(rows, titles, ["as it lies", *(f"sample {k + 1}" for k in range(num_samples))], side)


def names_and_colors(
    categories: Sequence[Mapping[str, Any]],
) -> tuple[dict[int, str], dict[int, Sequence[int]]]:
    """The names of classes by their ids, and the colours (RGB) of those that have one."""
    names = {category["id"]: category["name"] for category in categories}
    return names, {category["id"]: category["color"] for category in categories if category.get("color")}


def sheet_of(
    rows: Sequence[Sequence[Image.Image]], titles: Sequence[str], columns: Sequence[str], side: int
) -> Image.Image:
    """A contact sheet of pictures that are `side` pixels wide at most, each at the top left of its place."""
    height = max(picture.height for row in rows for picture in row)
    return contact_sheet([[_on_white(picture, (side, height)) for picture in row] for row in rows], titles, columns)


def _on_white(picture: Image.Image, size: Size) -> Image.Image:
    """The picture at the top left of a white one of this width and height."""
    sheet = Image.new("RGB", size, "white")
    sheet.paste(picture, (0, 0))
    return sheet
