"""Average precision of video instances as YouTube-VIS defines it (Yang et al., arXiv 1905.04804, section 4.1).

The rules are COCO's, with the masks of all frames taken together: intersection and union of two tubes are summed over
the frames. A tube's frames side by side are one wide mask, so `MaskAP` does all of it.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..data.video import tube_masks
from ..processing.rle import run_lengths
from .mask_ap import MaskAP, area_ranges, to_rle


class VideoAP(MaskAP):
    """AP and AR of video instances: the mean over IoU thresholds 0.5, 0.55, …, 0.95 of whole tubes, and over classes.

    At most 100 detections count for a class of a video, the best-scored; `ar1` and `ar10` are the recall with 1 and 10
    of them. Instances are small up to 128 x 128 pixels and large from 256 x 256 on, in the mean over the frames where
    they are seen, as in YouTube-VIS' own evaluation. Of crowds, which YouTube-VIS does not have, COCO's rules hold.

    Arguments and errors as `MaskAP`'s.
    """

    area_ranges = area_ranges(128, 256)
    _unit = "video"

    def update(
        self,
        video_id: Hashable,
        size: tuple[int, ...],
        predictions: Iterable[Mapping[str, Any]],
        targets: Iterable[Mapping[str, Any]],
    ) -> None:
        """Add one video.

        Args:
            video_id: any, once.
            size: number of frames, height and width.
            predictions: dicts with `category_id` (or `label_id`), `score` and `segmentations`: a (T, H, W) bool array
                or tensor, or for each frame None or a mask in any of COCO's forms.
            targets: dicts with `category_id`, `segmentations` and, where they apply, `iscrowd` and `areas` (pixels in
                each frame, None or 0 where the instance is not seen; by default those of the masks).

        Raises:
            ValueError: a video that was added before, tubes of another length or size, an unknown class, a score that
                is NaN.
        """
        super().update(video_id, size, predictions, targets)

    def _mask_of(
        self, entry: Mapping[str, Any], size: tuple[int, ...], is_target: bool
    ) -> tuple[Mapping[str, Any], float]:
        frames = entry["segmentations"]
        if len(frames) != size[0]:
            raise ValueError(
                f"A tube has {len(frames)} masks and its video {size[0]} frames: give one for each frame, None where "
                "there is none."
            )
        runs = [_run_lengths(mask, (size[1], size[2])) for mask in frames]
        areas: Sequence[Any] = [int(lengths[1::2].sum()) for lengths in runs]
        if is_target and entry.get("areas") is not None:
            areas = entry["areas"]
        seen = [area for area in areas if area]
        rle = {"size": [size[1], size[0] * size[2]], "counts": _side_by_side(runs)}
        return rle, float(np.mean(seen)) if seen else 0.0


def _run_lengths(mask: Any, size: tuple[int, int]) -> np.ndarray:
    """Return the run lengths down the columns of a frame's mask, of zeros first: (runs,) int64."""
    if mask is None:
        return np.array([size[0] * size[1]])
    return run_lengths(to_rle(mask, size)["counts"])


def _side_by_side(runs: Sequence[np.ndarray]) -> list[int]:
    """Join the run lengths of frames into those of one mask that shows the frames from left to right."""
    lengths = np.concatenate(runs)
    is_one = np.concatenate([np.arange(len(frame)) % 2 for frame in runs])[lengths > 0]
    lengths = lengths[lengths > 0]
    starts = np.flatnonzero(np.diff(is_one, prepend=-1))
    joined = np.add.reduceat(lengths, starts).tolist()
    return [0, *joined] if is_one[0] else joined


def tubes(item: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the segments of an item of a `VideoDataset`, each with its `segmentations`."""
    if "segmentation_maps" not in item:
        return list(item["segments_info"])
    masks = tube_masks(item)
    return [{**info, "segmentations": mask} for info, mask in zip(item["segments_info"], masks, strict=True)]
