"""Random training clips, as in the original: a random frame and some near it, cropped and resized the same way."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.random import Generator

from ..known.recipes import Recipe
from ..processing.video_processor import Mask2FormerVideoProcessor
from .augmentation import Placement, cut_image, jitter_colors, lay_on_canvas, place_item, place_map, place_mask


NUM_FRAMES, FRAME_RANGE = 2, 20
"""The original's `SAMPLING_FRAME_NUM` and `SAMPLING_FRAME_RANGE`."""


def sample_frames(length: int, num_frames: int, frame_range: int, rng: Generator) -> list[int]:
    """Draw `num_frames` positions of a video of `length` frames: a random one, others at most `frame_range` from it.

    They ascend, and none comes twice unless there are too few. (The original draws the others with repetition, which
    makes a difference from three frames on.)
    """
    reference = int(rng.integers(length))
    span = range(max(0, reference - frame_range), min(length, reference + frame_range + 1))
    near = [frame for frame in span if frame != reference] or [reference]
    others = rng.choice(near, num_frames - 1, replace=len(near) < num_frames - 1)
    return sorted([reference, *others.tolist()])


def place_tubes(item: Mapping[str, Any], frames: Sequence[int], placement: Placement) -> tuple[np.ndarray, np.ndarray]:
    """Place the instances of a video on the canvas: masks and classes of those in a frame or more, without crowds.

    Args:
        item: of a `VideoDataset`.
        frames: positions of T frames.
        placement: of each of them.

    Returns:
        (N, T, height, width) bool and (N,) int64, in the order of `segments_info`; N may be 0. In frames where an
        instance is not seen its mask is empty.
    """
    segments = [info for info in item["segments_info"] if not info.get("iscrowd")]
    masks = np.zeros((len(segments), len(frames), *placement.canvas), dtype=bool)
    for t, frame in enumerate(frames):
        if "segmentation_maps" in item:
            ids = place_map(item["segmentation_maps"][frame], placement)
            for tube, info in zip(masks, segments, strict=True):
                np.equal(ids, info["id"], out=tube[t])
            continue
        for tube, info in zip(masks, segments, strict=True):
            segmentation = info["segmentations"][frame]
            if segmentation:
                tube[t] = place_mask(segmentation, (item["height"], item["width"]), placement)
    is_kept = masks.any(axis=(1, 2, 3))
    classes = np.array([info["category_id"] for info in segments], dtype=np.int64)
    return masks[is_kept], classes[is_kept]


class ClipTransform:
    """Makes random training clips of videos by a recipe, drawing size, place, mirroring and colours once for a clip.

    Args:
        recipe: the original's are in `m2f_hf.known.recipes.VIDEO_RECIPES`; recipes for images also work.
        num_frames: frames of a clip.
        frame_range: most distance in frames from the first one drawn.

    Raises:
        ValueError: with fewer than one frame, or a recipe with `max_category_share` below 1.
    """

    def __init__(self, recipe: Recipe, num_frames: int = NUM_FRAMES, frame_range: int = FRAME_RANGE) -> None:
        if num_frames < 1 or frame_range < 1:
            raise ValueError(f"num_frames and frame_range must be 1 or more, got {num_frames} and {frame_range}.")
        if recipe.max_category_share < 1:
            raise ValueError("max_category_share is for semantic maps of images: give clips a recipe with 1.0.")
        self.recipe, self.num_frames, self.frame_range = recipe, num_frames, frame_range

    def __call__(self, item: Mapping[str, Any], rng: Generator, size: int | None = None) -> dict[str, Any]:
        """Make a clip of an item. The same state of `rng` gives the same clip. Other frames are not read.

        Args:
            item: of a `VideoDataset`.
            rng: the source of everything random.
            size: shorter side of the crops in pixels, other than the recipe's.

        Returns:
            `pixel_values_videos` (T, 3, height, width) uint8, `mask_labels` (N, T, height, width) bool, `class_labels`
            (N,) int64, and `frame_indices` (T,) int64, the positions of the frames. N counts the instances that are
            seen in one of the frames or more, maybe 0. `CollateClips` makes batches.

        Raises:
            ValueError: if the frames are too elongated, or an annotation does not fit them.
        """
        recipe = self.recipe if size is None else self.recipe.at_size(size)
        frames = sample_frames(len(item["frames"]), self.num_frames, self.frame_range, rng)
        placement = place_item(item, (item["height"], item["width"]), recipe, rng)
        pixels = []
        for frame in frames:
            window = cut_image(item["frames"][frame], placement)
            if recipe.color_jitter:
                window = jitter_colors(window, copy.deepcopy(rng))
            pixels.append(lay_on_canvas(window, placement.canvas))
        masks, classes = place_tubes(item, frames, placement)
        return {
            "pixel_values_videos": np.stack(pixels).transpose(0, 3, 1, 2),
            "mask_labels": masks,
            "class_labels": classes,
            "frame_indices": np.array(frames, dtype=np.int64),
        }


class CollateClips:
    """Makes batches of clips with the same number of frames: a processor normalises and pads them to the largest."""

    def __init__(self, processor: Mask2FormerVideoProcessor) -> None:
        self.processor = processor

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Batch clips.

        Returns:
            `pixel_values_videos` (B, T, 3, H, W) float32, `pixel_mask` (B, H, W) int64, 0 on padding at the bottom and
            right; for each clip `mask_labels` (N, T, H, W) bool, False on padding, and `class_labels` (N,) int64;
            `file_names` where known.
        """
        inputs = self.processor(
            [torch.from_numpy(sample["pixel_values_videos"]) for sample in samples],
            mask_labels=[sample["mask_labels"] for sample in samples],
            class_labels=[sample["class_labels"] for sample in samples],
            do_resize=False,
            return_tensors="pt",
        )
        return {**inputs, "file_names": [str(sample.get("file_name", "")) for sample in samples]}
