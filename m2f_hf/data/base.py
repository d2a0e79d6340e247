"""What all data sets of images in files have in common: items, items without their image, selections."""

import copy
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from ..processing.images import read_rgb
from ..processing.rle import decode_segmentation
from .problems import FileProblem


ImageFile = Path | BytesIO | Image.Image
"""What an image is read from; an open image stands for itself."""
_EXIF_ORIENTATION = 0x0112
_Items = TypeVar("_Items", bound="Selection")


def read_image(file: ImageFile, name: str) -> Image.Image:
    """Read an image, upright, as RGB: the pixels that the processor reads.

    Raises:
        FileProblem: it cannot be read; `name` says which.
    """
    with _open_image(file, name) as image:
        return read_rgb(image)


def read_size(file: ImageFile, name: str) -> tuple[int, int]:
    """Return height and width in pixels of the upright image, from the file's header.

    Raises:
        FileProblem: it cannot be read.
    """
    with _open_image(file, name) as image:
        width, height = image.size
        is_turned = image.getexif().get(_EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
    return (width, height) if is_turned else (height, width)


def read_map(file: ImageFile, name: str) -> np.ndarray:
    """Read what a map stores for each pixel: whole numbers, (height, width), or colours, (height, width, 3) uint8.

    Palettes are not applied: the number is what counts.

    Raises:
        FileProblem: it cannot be read.
    """
    with _open_image(file, name, "Annotations") as image:
        if image.mode in ("RGB", "RGBA", "CMYK", "YCbCr"):
            return np.asarray(image.convert("RGB"))
        if image.mode == "1":
            return np.asarray(image).astype(np.uint8)
        if image.mode in ("LA", "PA"):
            image = image.getchannel(0)
        values = np.asarray(image)
    if values.dtype.kind not in "iu":
        raise FileProblem("Label maps must hold whole numbers (8 or 16 bit PNG).", f"{name}: mode {image.mode}")
    return values


def check_pixels(file: ImageFile, name: str) -> None:
    """Decode an image, JPEG at an eighth of its size, which finds files that were cut off.

    Raises:
        FileProblem: it cannot be decoded.
    """
    with _open_image(file, name) as image:
        image.draft("RGB", (image.width // 8, image.height // 8))
        image.load()


@contextmanager
def _open_image(file: ImageFile, name: str, what: str = "Images") -> Iterator[Image.Image]:
    try:
        if isinstance(file, Image.Image):
            yield file
            return
        with Image.open(file) as image:
            yield image
    except FileNotFoundError as error:
        raise FileProblem(f"{what} are missing: put them back, or remove them from the list.", name) from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, struct.error, EOFError) as error:
        raise FileProblem(f"{what} cannot be read: replace or remove them.", f"{name}: {error}") from error


class Selection(Dataset[dict[str, Any]]):
    """What data sets of images and of videos share: selecting items, changing classes.

    Attributes:
        categories, task, segments: as `SegmentationDataset` says.
    """

    categories: list[dict[str, Any]]
    task: str
    segments: np.ndarray | None = None
    _positions: np.ndarray
    _category_map: dict[int, int] | None = None
    _merges_classes: bool = False

    def __len__(self) -> int:
        return len(self._positions)

    def select(self: _Items, indices: Sequence[int] | np.ndarray) -> _Items:
        """Return the items at these indices, in this order."""
        chosen = np.asarray(indices, dtype=np.int64)
        result = copy.copy(self)
        result._positions = self._positions[chosen]
        if self.segments is not None:
            starts = np.searchsorted(self.segments[:, 0], chosen)
            ends = np.searchsorted(self.segments[:, 0], chosen, side="right")
            parts = [self.segments[start:end] for start, end in zip(starts, ends, strict=True)]
            result.segments = np.concatenate([self.segments[:0], *parts])
            result.segments[:, 0] = np.repeat(np.arange(len(chosen)), ends - starts)
        return result

    def with_categories(
        self: _Items, categories: Sequence[Mapping[str, Any]], category_map: Mapping[int, int]
    ) -> _Items:
        """Return the same items with another class list, without segments of classes that `category_map` lacks."""
        return copy.copy(self)._with_categories([dict(category) for category in categories], dict(category_map))

    def _with_categories(self: _Items, categories: list[dict[str, Any]], added: dict[int, int]) -> _Items:
        old = self._category_map or {category["id"]: category["id"] for category in self.categories}
        self._category_map = {own: added[new] for own, new in old.items() if new in added}
        if self.segments is not None:
            table = np.full(len(self.categories), -1, dtype=np.int32)
            table[list(added)] = list(added.values())
            segments = self.segments.copy()
            segments[:, 1] = table[segments[:, 1]]
            self.segments = segments[segments[:, 1] >= 0]
        self.categories = categories
        self._merges_classes |= self.task == "semantic"  # segment ids are the class + 1
        return self

    def _with_own_classes(self, segments: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Map the classes of segments from the annotation's to `categories`; add `isthing`."""
        if self._category_map is not None:
            ids = self._category_map
            segments = [{**s, "category_id": ids[s["category_id"]]} for s in segments if s["category_id"] in ids]
        isthing = [category["isthing"] for category in self.categories]
        return [{**segment, "isthing": isthing[segment["category_id"]]} for segment in segments]


class SegmentationDataset(Selection):
    """Images with segments.

    Subclasses define `_load` and set `categories`, `task` and `_positions = np.arange(n)` for n images; `segments` too
    where they are known.

    An item has

    - `image`: `PIL.Image.Image`, RGB, upright; `height`, `width`: its size in pixels;
    - `image_id`: int or str; `file_name`: str, where a person finds the image;
    - `segments_info`: a list of dicts: `id`, `category_id` (contiguous), `iscrowd` (0 or 1), `isthing` (bool or None),
      and what else the annotation says;
    - either `segmentation_map`, (height, width) int32 of segment ids, where 0 and ids that are not listed are void; or
      in each segment a `segmentation`, COCO's RLE or polygons in pixels: such masks may overlap. `segment_masks`
      decodes both.

    Attributes:
        categories: for each class `id` (contiguous), `name`, `isthing` (bool or None), `color` where known, and
            `dataset_id`, the files' own id.
        task: "panoptic", "instance" or "semantic".
        segments: (S, 3) int32, position of the item, category id and iscrowd of every segment, where that is known
            without opening files; None where not.
    """

    def _load(self, position: int) -> tuple[ImageFile, dict[str, Any]]:
        """Return the image's file, and the item without image and size (`read_size(file, name)` gives it if needed).

        `category_id` is the contiguous id, as in the `categories` that this reader made.
        """
        raise NotImplementedError

    def __getitem__(self, index: int) -> dict[str, Any]:
        file, item = self._open(index)
        image = read_image(file, item["file_name"])
        return {"image": image, **self.complete(item, image.height, image.width)}

    def annotation(self, index: int, check_image: bool = False) -> dict[str, Any]:
        """Return the item without `image`; the size is read from the file's header, or after decoding the image.

        Raises:
            FileProblem: a file is missing or damaged, or the annotation is for another size.
        """
        file, item = self._open(index)
        item = self.complete(item, *read_size(file, item["file_name"]))
        if check_image:
            check_pixels(file, item["file_name"])
        return item

    def with_task(self, task: str) -> "SegmentationDataset":
        """Return the same images for another task: only things for "instance", one segment a class for "semantic".

        Raises:
            ValueError: the annotations don't say enough for the task.
        """
        stuff = {category["id"] for category in self.categories if category["isthing"] is False}
        if task == self.task and not (task == "instance" and stuff):
            return self
        result = copy.copy(self)
        result.task = task
        if task == "semantic":
            result._merges_classes = True
            if self.segments is not None:
                pairs = np.unique(self.segments[:, :2], axis=0)
                result.segments = np.concatenate([pairs, np.zeros_like(pairs[:, :1])], axis=1)
            return result
        if task != "instance" or self.task == "semantic":
            reason = "instances may overlap, and there is no stuff"
            if self.task == "semantic":
                reason = "they don't tell the objects of a class apart"
            raise ValueError(f"{self.task} annotations don't do for task={task!r}: {reason}.")
        things = [category for category in self.categories if category["id"] not in stuff]
        if not things:
            raise ValueError("None of the classes is a thing, so there are no instances: use task='semantic'.")
        return result._with_categories(
            [{**category, "id": index} for index, category in enumerate(things)],
            {category["id"]: index for index, category in enumerate(things)},
        )

    def _open(self, index: int) -> tuple[ImageFile, dict[str, Any]]:
        if not 0 <= index < len(self):
            raise IndexError(f"Item {index} of {len(self)}: indices run from 0 to {len(self) - 1}.")
        return self._load(int(self._positions[index]))

    def complete(self, item: dict[str, Any], height: int, width: int) -> dict[str, Any]:
        """Add to an item of `_load` its image's size; map its classes to `categories` and `task`.

        Raises:
            FileProblem: the annotation is for another size.
        """
        annotated = [item.get("annotated_size"), getattr(item.get("segmentation_map"), "shape", None)]
        masks = [segment.get("segmentation") for segment in item["segments_info"]]
        for size in (*annotated, *(mask["size"] for mask in masks if isinstance(mask, Mapping))):
            if size is not None and tuple(size) != (height, width):
                _refuse_size(item["file_name"], size, (height, width))
        item = {
            **item,
            "height": height,
            "width": width,
            "segments_info": self._with_own_classes(item["segments_info"]),
        }
        item.pop("annotated_size", None)
        return merge_classes(item) if self._merges_classes else item


def _refuse_size(file_name: str, annotated: Sequence[int], size: tuple[int, int]) -> None:
    hint = ""
    if tuple(annotated) == size[::-1]:
        hint = " (made for the image as stored, before its EXIF orientation? then turn the image and remove that)"
    raise FileProblem(
        "Annotations are for another size than their image (height x width): scale them, or take their image.",
        f"{file_name} is {size[0]}x{size[1]}, its annotation {annotated[0]}x{annotated[1]}{hint}",
    )


def merge_classes(item: dict[str, Any]) -> dict[str, Any]:
    """Merge an item's segments by class, crowds too, into a map of classes + 1; of instances the smaller is on top."""
    segments = item["segments_info"]
    size = (item["height"], item["width"])
    labels = np.zeros(size, dtype=np.int32)
    if "segmentation_map" in item:
        present, place = np.unique(item["segmentation_map"], return_inverse=True)
        classes = {segment["id"]: segment["category_id"] + 1 for segment in segments}
        table = np.array([classes.get(int(segment_id), 0) for segment_id in present], dtype=np.int32)
        labels = table[place].reshape(size)
    else:
        # One mask at a time: all of a large photo's together would take gigabytes.
        area_on_top = np.full(size, np.iinfo(np.int64).max)
        for segment in segments:
            mask = decode_segmentation(segment["segmentation"], *size)
            mask &= area_on_top >= (area := np.count_nonzero(mask))
            area_on_top[mask] = area
            labels[mask] = segment["category_id"] + 1
    isthing = {segment["category_id"]: segment["isthing"] for segment in segments}
    merged = semantic_segments(labels)
    for segment in merged:
        segment["isthing"] = isthing[segment["category_id"]]
    return {**item, "segmentation_map": labels, "segments_info": merged}


def semantic_segments(segmentation_map: np.ndarray) -> list[dict[str, Any]]:
    """Return the `segments_info` of a map (height, width) of classes + 1: one segment for each class that occurs."""
    areas = np.bincount(segmentation_map.ravel())
    return [
        {"id": int(value), "category_id": int(value) - 1, "iscrowd": 0, "area": int(areas[value])}
        for value in np.flatnonzero(areas)
        if value > 0
    ]
