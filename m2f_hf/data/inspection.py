"""Contact sheets of random training samples and clips with their targets: what a model sees."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ..draw.segments import contact_sheet, draw_segments
from .augmentation import TrainingTransform, place_targets, whole_image
from .clips import ClipTransform


def draw_sample(
    sample: Mapping[str, Any],
    id2label: Mapping[int, str] | None = None,
    colors: Mapping[int, Sequence[int]] | None = None,
) -> Image.Image:
    """Draw the targets of a `TrainingTransform`'s sample over its image; the smaller of overlapping masks is on top.

    Args:
        id2label: names of the classes.
        colors: RGB of classes.
    """
    masks, classes = sample["mask_labels"], sample["class_labels"]
    segmentation = np.zeros(masks.shape[1:], dtype=np.int32)
    for index in sorted(range(len(masks)), key=lambda index: -np.count_nonzero(masks[index])):
        segmentation[masks[index]] = index + 1
    segments = [{"id": index, "label_id": int(label)} for index, label in enumerate(classes, start=1)]
    return draw_segments(Image.fromarray(sample["image"]), segmentation, segments, id2label, colors)


def draw_clip(
    sample: Mapping[str, Any],
    id2label: Mapping[int, str] | None = None,
    colors: Mapping[int, Sequence[int]] | None = None,
) -> list[Image.Image]:
    """Draw the targets of a `ClipTransform`'s sample over its frames, as `draw_sample`; instances keep their colour."""
    classes = sample["class_labels"]
    frames = zip(sample["pixel_values_videos"].transpose(0, 2, 3, 1), sample["mask_labels"].swapaxes(0, 1), strict=True)
    stills = [{"image": pixels, "mask_labels": masks, "class_labels": classes} for pixels, masks in frames]
    return [draw_sample(still, id2label, colors) for still in stills]


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
    """Draw a contact sheet: one row for each item, with the item and random samples of it, targets drawn over them.

    Args:
        dataset: items as the readers of `m2f_hf.data` give them.
        transform: makes the samples.
        categories: dicts of `id`, `name` and maybe `color` (RGB), for names and colours of classes.
        indices: of the items.
        num_samples: of each item.
        seed: of the samples.
        size: shorter side of the crops in pixels, other than the recipe's.
        side: pixels of a picture's longer side.

    Raises:
        ValueError: without an item to show.
    """
    if not len(indices):
        raise ValueError("Nothing to show: give at least one index of the dataset.")
    names = _names_and_colors(categories)
    rows, titles = [], []
    for index in indices:
        item = dataset[index]
        masks, classes = place_targets(item, whole_image(item["image"].size[::-1]))
        samples = [{"image": np.array(item["image"]), "mask_labels": masks, "class_labels": classes}]
        samples += [transform(item, np.random.default_rng((seed, index, k)), size) for k in range(num_samples)]
        rows.append(_contain([draw_sample(sample, *names) for sample in samples], side))
        counts = ", ".join(str(len(sample["class_labels"])) for sample in samples[1:])
        titles.append(f"{item.get('file_name') or item['image_id']}: {len(masks)} targets; in the samples {counts}")
    return sheet_of(rows, titles, ["original", *(f"sample {k + 1}" for k in range(num_samples))], side)


def inspect_clips(
    dataset: Any,
    transform: ClipTransform,
    categories: Sequence[Mapping[str, Any]] = (),
    indices: Sequence[int] = (0, 1),
    num_samples: int = 2,
    seed: int = 0,
    size: int | None = None,
    side: int = 320,
) -> Image.Image:
    """Draw a contact sheet of random clips with their targets: a strip of frames for each, `num_samples` a video.

    Arguments and errors as `inspect_augmentation`'s, with videos as items.
    """
    if not len(indices) or num_samples < 1:
        raise ValueError("Nothing to show: give at least one index of the data set, and one sample.")
    names = _names_and_colors(categories)
    rows, titles = [], []
    for index in indices:
        item = dataset[index]
        for number in range(num_samples):
            sample = transform(item, np.random.default_rng((seed, index, number)), size)
            rows.append(_contain(draw_clip(sample, *names), side))
            positions = ", ".join(str(position + 1) for position in sample["frame_indices"].tolist())
            count = len(sample["class_labels"])
            titles.append(f"{item['file_name']}, frames {positions} of {len(item['frames'])}: {count} targets")
    return sheet_of(rows, titles, [f"frame {t + 1}" for t in range(transform.num_frames)], side)


def _names_and_colors(categories: Sequence[Mapping[str, Any]]) -> tuple[dict[int, str], dict[int, Sequence[int]]]:
    """Return the names of classes by their ids, and the colours (RGB) of those that have one."""
    names = {category["id"]: category["name"] for category in categories}
    return names, {category["id"]: category["color"] for category in categories if category.get("color")}


def sheet_of(
    rows: Sequence[Sequence[Image.Image]], titles: Sequence[str], columns: Sequence[str], side: int
) -> Image.Image:
    """Make a contact sheet of pictures that are `side` pixels wide at most, each at the top left of its place."""
    height = max(picture.height for row in rows for picture in row)
    return contact_sheet([[_on_white(picture, (side, height)) for picture in row] for row in rows], titles, columns)


def _contain(pictures: Sequence[Image.Image], side: int) -> list[Image.Image]:
    """Scale pictures to fill `side` x `side` pixels, keeping their aspect ratio."""
    return [ImageOps.contain(picture, (side, side), Image.Resampling.LANCZOS) for picture in pictures]


def _on_white(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Return the picture at the top left of a white one of this width and height."""
    sheet = Image.new("RGB", size, "white")
    sheet.paste(picture, (0, 0))
    return sheet
