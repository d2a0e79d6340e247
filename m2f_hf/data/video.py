"""What all data sets of videos have in common: items whose frames are read when they are accessed."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from ..processing.rle import decode_segmentation


class Frames(Sequence[Image.Image]):
    """A video's `length` frames, each loaded when it is accessed by `load(position)`; the whole is never in memory."""

    def __init__(self, load: Callable[[int], Image.Image], length: int) -> None:
        self._load, self._length = load, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._load(position) for position in range(self._length)[index]]
        if not -self._length <= index < self._length:
            raise IndexError(f"Frame {index} of {self._length}: indices run from 0 to {self._length - 1}.")
        return self._load(index % self._length)


class VideoDataset(Dataset[dict[str, Any]]):
    """Videos with instances that keep their identity over all frames.

    An item has

    - `frames`: `Frames`, a sequence of `PIL.Image.Image`, RGB, all of one size; `height`, `width`: that size in pixels;
    - `video_id`: int or str; `file_name`: str, what a person finds the video by;
    - `segments_info`: a list of dicts, one for each instance: `id` (1 or more, the same in every frame),
      `category_id` (contiguous), `iscrowd` (0 or 1), `isthing`;
    - either `segmentation_maps`, (T, height, width) int32 of instance ids, where 0 is none; or in each segment
      `segmentations`, a list with COCO's RLE, polygons or None for each frame: such masks may overlap. `tube_masks`
      decodes both.

    Attributes:
        categories: for each class `id` (contiguous), `name`, `isthing`, `color` where known.
    """

    categories: list[dict[str, Any]]

    def __len__(self) -> int:
        raise NotImplementedError

    def _check_index(self, index: int) -> None:
        if not 0 <= index < len(self):
            raise IndexError(f"Video {index} of {len(self)}: indices run from 0 to {len(self) - 1}.")


def frame_mask(item: Mapping[str, Any], segment: Mapping[str, Any], frame: int) -> np.ndarray | None:
    """Return the mask of one of an item's segments in one frame, (height, width) bool; None where it has none there."""
    if "segmentation_maps" in item:
        return item["segmentation_maps"][frame] == segment["id"]
    segmentation = segment["segmentations"][frame]
    # An empty list of polygons is what some tools write where the instance is absent.
    if segmentation is None or (isinstance(segmentation, list) and not segmentation):
        return None
    return decode_segmentation(segmentation, item["height"], item["width"])


def tube_masks(item: Mapping[str, Any]) -> np.ndarray:
    """Return the masks of an item's `segments_info`, in its order, crowds too: (N, T, height, width) bool."""
    segments = item["segments_info"]
    masks = np.zeros((len(segments), len(item["frames"]), item["height"], item["width"]), dtype=bool)
    for tube, segment in zip(masks, segments, strict=True):
        for frame in range(len(tube)):
            mask = frame_mask(item, segment, frame)
            if mask is not None:
                tube[frame] = mask
    return masks
