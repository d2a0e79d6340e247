"""The video processor: frames to the video model's input, outputs back to tracks, as the image processor does."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.feature_extraction_utils import BatchFeature

from ..known.label_sets import VIDEO_TASKS
from .frames import FRAME_SUFFIXES, DamagedFrame, check_clip, stream_frames
from .image_processor import M2FImageProcessor
from .images import Size
from .post_processing import split_batch, video_instance_segmentation, video_panoptic_segmentation


class Mask2FormerVideoProcessor(M2FImageProcessor):
    """Prepare clips for [`Mask2FormerForVideoSegmentation`], and turn its outputs into tracks.

    Args:
        max_detections: most tracks of a clip; the original's 10.
        instance_threshold: least score of a track, 0 to 1; the original has none.
        use_mask_quality: whether a score is the class's probability times the mean mask probability inside the mask; in
            the original it is the former alone.
        kwargs: as of [`M2FImageProcessor`], whose saved settings can be loaded, too.

    Raises:
        ValueError: a setting that does not exist.
    """

    model_input_names = ["pixel_values_videos", "pixel_mask"]  # noqa: RUF012
    tasks = VIDEO_TASKS
    post_processing_name = "post_process_video_{}_segmentation"
    size: Any = {"shortest_edge": 360, "longest_edge": 1333}  # noqa: RUF012

    def __init__(
        self,
        *,
        max_detections: int = 10,
        instance_threshold: float = 0.0,
        use_mask_quality: bool = False,
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("task", "instance")
        super().__init__(max_detections=max_detections, instance_threshold=instance_threshold, **kwargs)
        self.use_mask_quality = use_mask_quality

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a processor from its settings, or from an image processor's, whose task becomes "instance"."""
        settings = dict(image_processor_dict)
        if settings.get("image_processor_type") != cls.__name__:
            settings["task"] = "instance"
        return super().from_dict(settings, **kwargs)

    def __call__(self, videos: Any, **kwargs: Any) -> BatchFeature:  # type: ignore[override]
        """Call `preprocess`."""
        return self.preprocess(videos, **kwargs)

    def preprocess(  # type: ignore[override]
        self, videos: Any, mask_labels: Any = None, class_labels: Any = None, **kwargs: Any
    ) -> BatchFeature:
        """Read, resize, normalise and pad clips, and their masks with them.

        Args:
            videos: one or a list of clips, each a folder of frames (by name), a video file (read with PyAV), an array
                or tensor (T, H, W, 3) or (T, 3, H, W), or a sequence of images in any form that `M2FImageProcessor`
                takes. The frames of a clip have one size, those of a batch one number of frames.
            mask_labels: for each clip (N, T, H, W) masks of the frames' size, and
            class_labels: their classes (N,).
            kwargs: settings for this call only, and `return_tensors`.

        Returns:
            `pixel_values_videos` (B, T, 3, H, W) float32; `pixel_mask` (B, H, W) int64, 1 on the frames and 0 on
            padding; and with labels `mask_labels`, a list of (N, T, H, W) bool, False on padding, and `class_labels`, a
            list of (N,) int64. Tensors with `return_tensors="pt"`, otherwise arrays.

        Raises:
            ValueError: no frames, frames of different sizes or clips of different lengths, what is not an image or not
                a mask; each says what to do.
            FileNotFoundError: a path that does not exist.
            ImportError: a video file without PyAV.
        """
        if stray := {"segmentation_maps", "segments_info", "instance_id_to_semantic_id"} & kwargs.keys():
            raise ValueError(f"{min(stray)} is for images: give the masks of a clip as mask_labels (N, T, H, W)")
        data_format = kwargs.pop("input_data_format", None)
        clips = [read_frames(clip, data_format) for clip in list_of_clips(videos)]
        lengths = [len(clip) for clip in clips]
        if len(set(lengths)) > 1:
            raise ValueError(f"the clips of a batch must have one number of frames, but these have {lengths}")
        if (mask_labels is None) != (class_labels is None):
            raise ValueError("mask_labels and class_labels go together: give both or neither")
        labels: dict[str, Any] = {}
        if mask_labels is not None:
            masks = [np.asarray(clip_masks) for clip_masks in mask_labels]
            if not len(masks) == len(class_labels) == len(clips):
                raise ValueError(
                    f"mask_labels and class_labels are lists with one entry for each clip: there are {len(clips)} "
                    f"clips, but {len(masks)} and {len(class_labels)} entries"
                )
            for index, (tubes, length) in enumerate(zip(masks, lengths, strict=True)):
                if tubes.ndim != 4 or tubes.shape[1] != length:
                    raise ValueError(f"mask_labels of clip {index} must be (N, {length}, H, W), but are {tubes.shape}")
            # (N, T, H, W) -> one (N, H, W) for each frame, since all frames are one batch of images.
            labels["mask_labels"] = [tubes[:, frame] for tubes in masks for frame in range(tubes.shape[1])]
            labels["class_labels"] = [
                classes for classes, length in zip(class_labels, lengths, strict=True) for _ in range(length)
            ]
        frames = [frame for clip in clips for frame in clip]
        batch = super().preprocess(frames, input_data_format="channels_first", **labels, **kwargs)
        return self._to_clips(batch, len(clips))

    @staticmethod
    def _to_clips(batch: BatchFeature, num_clips: int) -> BatchFeature:
        """Turn a batch of all frames into one of clips."""
        as_arrays = not isinstance(batch["pixel_values"], torch.Tensor)
        frames, pixel_masks = (
            np.stack(batch[name]) if as_arrays else batch[name] for name in ("pixel_values", "pixel_mask")
        )
        length = len(frames) // num_clips
        data: dict[str, Any] = {
            "pixel_values_videos": frames.reshape(num_clips, length, *frames.shape[1:]),
            "pixel_mask": pixel_masks[::length],
        }
        if "mask_labels" in batch:
            stack: Any = np.stack if as_arrays else torch.stack
            masks = batch["mask_labels"]
            data["mask_labels"] = [stack(masks[i : i + length], 1) for i in range(0, len(masks), length)]
            data["class_labels"] = batch["class_labels"][::length]
        return BatchFeature(data=data)

    def post_process_video_instance_segmentation(
        self,
        outputs: Any,
        threshold: float | None = None,
        mask_threshold: float | None = None,
        target_sizes: list[Size] | torch.Tensor | None = None,
        max_detections: int | None = None,
        use_mask_quality: bool | None = None,
        return_coco_annotation: bool = False,
    ) -> list[dict[str, Any]]:
        """Find tracks by falling score, each with its own masks; see `post_processing.video_instance_segmentation`.

        The classes in the processor's `label_ids_to_fuse`, stuff, are left out.

        Args:
            outputs: the model's, of a batch of clips.
            threshold: least score; None: the processor's `instance_threshold`.
            target_sizes: height and width of each clip's result; by default the size it had before padding.
            mask_threshold, max_detections, use_mask_quality: None: the processor's.
            return_coco_annotation: run-length encodings for each track and frame instead of (N, T, height, width) bool.
        """
        settings = self._fill_in(
            mask_threshold=mask_threshold, max_detections=max_detections, use_mask_quality=use_mask_quality
        )
        settings["threshold"] = self.instance_threshold if threshold is None else threshold
        settings["label_ids_to_drop"] = self.label_ids_to_fuse or ()
        settings["return_coco_annotation"] = return_coco_annotation
        clips = split_batch(outputs, target_sizes, is_video=True)
        return [video_instance_segmentation(clip, **settings) for clip in clips]

    def post_process_video_panoptic_segmentation(
        self,
        outputs: Any,
        threshold: float | None = None,
        mask_threshold: float | None = None,
        overlap_mask_area_threshold: float | None = None,
        label_ids_to_fuse: Collection[int] | None = None,
        target_sizes: list[Size] | torch.Tensor | None = None,
        use_mask_quality: bool | None = None,
    ) -> list[dict[str, Any]]:
        """Find tracks of things and stuff without overlaps; see `post_processing.video_panoptic_segmentation`.

        Args:
            outputs: the model's, of a batch of clips.
            threshold, mask_threshold, overlap_mask_area_threshold, label_ids_to_fuse, use_mask_quality: None: the
                processor's.
            target_sizes: height and width of each clip's result; by default the size it had before padding.

        Returns:
            For each clip `segmentation`, (T, height, width) int32 with ids from 1 and 0 for void; and `segments_info`.
        """
        settings = self._fill_in(
            threshold=threshold,
            mask_threshold=mask_threshold,
            overlap_mask_area_threshold=overlap_mask_area_threshold,
            label_ids_to_fuse=label_ids_to_fuse,
            use_mask_quality=use_mask_quality,
        )
        clips = split_batch(outputs, target_sizes, is_video=True)
        return [video_panoptic_segmentation(clip, **settings) for clip in clips]


# --- frames ---


def list_of_clips(videos: Any) -> list[Any]:
    """Return one clip or several as a list.

    Raises:
        ValueError: what is no clip, such as a single image.
    """
    if getattr(videos, "ndim", 4) == 5:
        return list(videos)
    check_clip(videos)
    if isinstance(videos, str | Path | np.ndarray | torch.Tensor):
        return [videos]
    videos = list(videos)
    if not videos:
        raise ValueError("there are no frames: give at least one clip")
    holds_clips = (
        isinstance(videos[0], list | tuple)
        or getattr(videos[0], "ndim", 0) == 4
        or (isinstance(videos[0], str | Path) and Path(videos[0]).is_dir())
        or (isinstance(videos[0], str | Path) and Path(videos[0]).suffix.lower() not in FRAME_SUFFIXES)
    )
    return videos if holds_clips else [videos]


def read_frames(clip: Any, data_format: str | None = None) -> list[np.ndarray]:
    """Read the frames of one clip, (3, H, W) each, without those that cannot be read; see `frames.stream_frames`."""
    return [frame for frame in stream_frames(clip, data_format) if not isinstance(frame, DamagedFrame)]
