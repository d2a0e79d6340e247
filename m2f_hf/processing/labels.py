"""Turn label maps and masks of any kind into the `mask_labels` and `class_labels` that a model learns from."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from .images import Size, open_image
from .segment_ids import rgb_to_id


def read_label_map(label_map: Any) -> tuple[np.ndarray, bool]:
    """Read a label map of any kind as (H, W) whole numbers, and tell whether it was colour-coded.

    Args:
        label_map: path, Pillow image (a palette image's indices are its labels), array or tensor, (H, W), (1, H, W) or
            (H, W, 1), of whole numbers; or RGB, (H, W, 3) or (3, H, W), where a segment's id is
            R + 256 G + 65536 B.

    Raises:
        ValueError: other shapes and fractions.
    """
    if isinstance(label_map, str | Path):
        label_map = open_image(label_map)
    if isinstance(label_map, Image.Image):
        if label_map.mode not in ("1", "L", "P", "I", "RGB", "RGBA") and not label_map.mode.startswith("I;16"):
            raise ValueError(f"a label map of Pillow mode {label_map.mode}: save it as L, P, I or RGB")
        label_map = ImageOps.exif_transpose(label_map)
    array = label_map.detach().cpu().numpy() if isinstance(label_map, torch.Tensor) else np.asarray(label_map)
    if array.dtype.kind == "f" and (array == np.rint(array)).all():
        array = array.astype(np.int64)
    if array.dtype.kind not in "iub":
        raise ValueError(f"a label map holds whole numbers, not {array.dtype} with fractions, NaN or other values")
    if array.ndim == 3 and 1 in (array.shape[0], array.shape[-1]):
        array = array.squeeze(0 if array.shape[0] == 1 else -1)
    if array.ndim == 2:
        return array.astype(np.int64), False
    colors = np.moveaxis(array, 0, -1) if array.ndim == 3 and array.shape[-1] not in (3, 4) else array
    if colors.ndim == 3 and colors.shape[-1] in (3, 4):
        return rgb_to_id(colors[..., :3]).astype(np.int64), True
    raise ValueError(f"a label map has the shape (H, W), or (H, W, 3) for ids as colours; got {array.shape}")


def resize_labels(labels: np.ndarray, size: Size) -> np.ndarray:
    """Resize (..., H, W) of any dtype to (..., *size) by nearest neighbour, with the pixels that Pillow picks."""
    rows, columns = (
        np.asarray(Image.fromarray(np.arange(old, dtype=np.int32)[None]).resize((new, 1), Image.Resampling.NEAREST))[0]
        for old, new in zip(labels.shape[-2:], size, strict=True)
    )
    return labels[..., rows[:, None], columns]


def _classes_of_segments(segments_info: Sequence[Mapping[str, Any]]) -> dict[int, int | None]:
    """Return segment id -> class; None for crowds, which are left out.

    Raises:
        ValueError: an entry without id or class, a class that is no whole number from 0, an id given twice.
    """
    classes: dict[int, int | None] = {}
    for segment in segments_info:
        label = segment.get("category_id", segment.get("label_id"))
        if "id" not in segment or label is None:
            raise ValueError(
                f"segments_info needs `id` and `category_id` (or `label_id`) in every entry; got {segment}"
            )
        if isinstance(label, bool) or not isinstance(label, int | np.integer) or label < 0:
            raise ValueError(f"unknown class {label!r} of segment {segment['id']}: classes are whole numbers from 0")
        if int(segment["id"]) in classes:
            raise ValueError(f"segments_info has the id {segment['id']} twice")
        classes[int(segment["id"])] = None if segment.get("iscrowd") else int(label)
    return classes


def convert_label_map_to_masks(
    label_map: np.ndarray,
    class_of_id: Mapping[int, int | None] | None = None,
    *,
    ignore_index: int | None = 255,
    do_reduce_labels: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Return one boolean mask and one class for each segment of a label map, by rising id.

    Args:
        label_map: (H, W) whole numbers: classes, or segment ids if `class_of_id` is given.
        class_of_id: segment id -> class; None leaves the segment out. The ids 0 and `ignore_index` need not be in it:
            they are void then.
        ignore_index: stands for no class; its pixels are in no mask.
        do_reduce_labels: classes count from 1 and 0 is none: 1 becomes 0, and 0 is ignored, as is `ignore_index`.

    Returns:
        Masks (N, H, W) bool and classes (N,) int64.

    Raises:
        ValueError: an id that is not in `class_of_id`.
    """
    ids = np.unique(label_map).tolist()
    if class_of_id is None:
        class_of_id = {label: label for label in ids}
    unlisted = [i for i in ids if i not in class_of_id and i not in (0, ignore_index)]
    if unlisted:
        raise ValueError(
            f"the label map has segment ids without a class: {unlisted[:5]}{' and more' if len(unlisted) > 5 else ''}. "
            "List them in segments_info or instance_id_to_semantic_id, or set their pixels to 0"
        )
    segments: dict[int, int] = {}
    for segment_id in ids:
        label = class_of_id.get(segment_id)
        if label is None or label == ignore_index or (do_reduce_labels and label == 0):
            continue
        segments[segment_id] = label - 1 if do_reduce_labels else label
    kept = np.array(list(segments), dtype=label_map.dtype)
    masks = label_map[None] == kept[:, None, None]  # (1, H, W) == (N, 1, 1) -> (N, H, W)
    return masks, np.array(list(segments.values()), dtype=np.int64)


def _check_classes(classes: np.ndarray, num_labels: int | None) -> None:
    outside = classes[(classes < 0) | (classes >= (math.inf if num_labels is None else num_labels))]
    if len(outside):
        allowed = "at least 0" if num_labels is None else f"0 to {num_labels - 1}"
        raise ValueError(
            f"class {outside[0]} is out of range, classes are {allowed}: map the labels to the model's own, set "
            "`ignore_index` to the value of pixels without a class, or `do_reduce_labels` where 0 is such a value"
        )


# --- as arguments of the processor ---


class Labels(NamedTuple):
    """One image's labels at its own size: a label map (H, W), or masks (N, H, W) with their classes."""

    array: np.ndarray
    class_of_id: Mapping[int, int | None] | None = None
    classes: np.ndarray | None = None


def _ndim(value: Any) -> int:
    """Count the dimensions of an array, of nested lists, or of arrays in lists."""
    if isinstance(value, list | tuple):
        return 1 + (_ndim(value[0]) if len(value) else 0)
    return getattr(value, "ndim", 0)


def _per_image(values: Any, num_images: int, name: str, ndim: int | None = None) -> list[Any]:
    """Return a list with one value for each image. For one image the list around the value may be missing.

    `ndim` is that of one image's value where this may be a list itself.
    """
    is_batch = isinstance(values, list | tuple) or (isinstance(values, np.ndarray | torch.Tensor) and num_images > 1)
    is_batch = is_batch and not (num_images == 1 and _ndim(values) == ndim)
    values = list(values) if is_batch else [values]
    if len(values) != num_images:
        raise ValueError(f"{len(values)} {name} for {num_images} images: pass one for each image")
    return values


def labels_of_images(
    num_images: int,
    segmentation_maps: Any,
    instance_id_to_semantic_id: Any,
    segments_info: Any,
    mask_labels: Any,
    class_labels: Any,
) -> list[Labels] | None:
    """Sort the label arguments of `M2FImageProcessor.preprocess` by image; None where none was given.

    Raises:
        ValueError: arguments that don't go together, or not one for each image; maps or masks that can't be read.
    """
    if segmentation_maps is None and mask_labels is None:
        if any(value is not None for value in (instance_id_to_semantic_id, segments_info, class_labels)):
            raise ValueError("classes without masks: pass segmentation_maps or mask_labels with them")
        return None
    if segmentation_maps is None:
        if class_labels is None:
            raise ValueError("mask_labels without class_labels: pass one class for each mask")
        masks = _per_image(mask_labels, num_images, "mask_labels", ndim=3)
        classes = _per_image(class_labels, num_images, "class_labels", ndim=1)
        return list(map(_read_masks, masks, classes))
    if mask_labels is not None or class_labels is not None:
        raise ValueError("pass segmentation_maps, or mask_labels and class_labels, not both")
    maps = _per_image(segmentation_maps, num_images, "segmentation maps")
    return list(map(_read_labels, maps, _classes_per_image(instance_id_to_semantic_id, segments_info, num_images)))


def _classes_per_image(
    instance_id_to_semantic_id: Any, segments_info: Any, num_images: int
) -> list[Mapping[int, int | None] | None]:
    if instance_id_to_semantic_id is not None and segments_info is not None:
        raise ValueError("pass instance_id_to_semantic_id or segments_info, not both")
    if isinstance(instance_id_to_semantic_id, Mapping):
        return [instance_id_to_semantic_id] * num_images
    if instance_id_to_semantic_id is not None:
        return _per_image(instance_id_to_semantic_id, num_images, "instance_id_to_semantic_id")
    if segments_info is None:
        return [None] * num_images
    if num_images == 1 and (len(segments_info) == 0 or isinstance(segments_info[0], Mapping)):
        segments_info = [segments_info]
    return [_classes_of_segments(infos) for infos in _per_image(segments_info, num_images, "segments_info")]


def _read_labels(label_map: Any, class_of_id: Mapping[int, int | None] | None) -> Labels:
    array, is_colour_coded = read_label_map(label_map)
    if is_colour_coded and class_of_id is None:
        raise ValueError(
            "a label map in RGB holds segment ids: pass their classes as segments_info or instance_id_to_semantic_id; "
            "or, if it holds classes, pass it with one channel"
        )
    return Labels(array, class_of_id)


def _read_masks(masks: Any, classes: Any) -> Labels:
    """Check masks (N, H, W) of any number type, above 0 inside, and classes (N,), whole numbers."""
    masks, classes = (
        value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        for value in (masks, classes)
    )
    if masks.ndim != 3 or classes.shape != masks.shape[:1]:
        raise ValueError(
            f"mask_labels (N, H, W) and class_labels (N,) do not fit: got {masks.shape} and {classes.shape}"
        )
    if classes.size and classes.dtype.kind not in "iu":
        raise ValueError(f"class_labels must be whole numbers, not {classes.dtype}")
    return Labels(masks > 0, classes=classes.astype(np.int64))


def to_targets(
    labels: Labels,
    image_size: Size,
    new_size: Size,
    *,
    ignore_index: int | None,
    do_reduce_labels: bool,
    num_labels: int | None,
    **kwargs: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Return masks (N, *new_size) bool and classes (N,) int64; settings as in `M2FImageProcessorKwargs`.

    Raises:
        ValueError: labels of another size than the image, ids without a class, classes out of range.
    """
    if labels.array.shape[-2:] != tuple(image_size):
        raise ValueError(
            f"the label map has {labels.array.shape[-2]}x{labels.array.shape[-1]} pixels, the image "
            f"{image_size[0]}x{image_size[1]} (upright, after its EXIF orientation): resize the map with nearest "
            "neighbour, or check that the two belong together"
        )
    resized = resize_labels(labels.array, new_size)
    if labels.classes is None:
        masks, classes = convert_label_map_to_masks(
            resized, labels.class_of_id, ignore_index=ignore_index, do_reduce_labels=do_reduce_labels
        )
    else:
        masks, classes = resized, labels.classes
    _check_classes(classes, num_labels)
    return masks, classes
