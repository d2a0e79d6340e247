"""Segment pictures in one call: `Segmenter.from_pretrained(name)("photo.jpg")`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import find_objects

from ..draw.segments import ClassColors, draw_segments, semantic_to_segments
from ..draw.words import describe
from ..hub.families import VIDEOS, label_names, load_whole
from ..model.modeling import Mask2FormerForUniversalSegmentation
from ..processing.image_processor import M2FImageProcessor
from ..processing.images import read_image, to_pillow
from ..processing.post_processing import check_probabilities
from ..processing.rle import decode_rle
from .loading import checkpoint_family, choose_device, explain_load_errors


INFO_KEYS = ("id", "label_id", "label", "isthing", "score", "area", "bbox", "segmentation")

Size = tuple[int, int]
Segments = tuple[np.ndarray, list[dict[str, Any]]]


@dataclass(frozen=True, eq=False, repr=False)
class SegmentedImage:
    """A picture with its segments. `for segment in result` and `len(result)` go over the segments, and `print(result)`
    says what was found.

    Attributes:
        image: the picture upright, as 8-bit RGB.
        segmentation: (H, W) int32 segment ids, 0 is void. Where instances overlap, the better one's.
        segments: for each segment a dictionary with `id` (from 1), `label_id`, `label`, `isthing` (None where the
            checkpoint does not tell), `score` (0-1, None for semantic), `area` in pixels, `bbox` as
            [x, y, width, height]; for instances also `segmentation`, COCO's run lengths of the whole mask.
        task: "panoptic", "instance" or "semantic".
        colors: RGB of the classes by label id, where the checkpoint has them.
    """

    image: Image.Image
    segmentation: np.ndarray
    segments: list[dict[str, Any]]
    task: str
    colors: ClassColors | None = None

    def mask(self, segment: Mapping[str, Any]) -> np.ndarray:
        """Return the whole mask of one of `segments`: (H, W) bool."""
        if "segmentation" in segment:
            return decode_rle(segment["segmentation"], *self.segmentation.shape)
        return self.segmentation == segment["id"]

    def draw(self, scale: int = 1) -> Image.Image:
        """Return the picture with its segments drawn over it, `scale` times as large."""
        return draw_segments(self.image, self.segmentation, self.segments, colors=self.colors, scale=scale)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.segments)

    def __len__(self) -> int:
        return len(self.segments)

    def __bool__(self) -> bool:
        return True  # also where nothing was found

    def __str__(self) -> str:
        return describe(self.segments)

    def __repr__(self) -> str:
        return f"<SegmentedImage {self.image.width}x{self.image.height}, {self.task}: {self}>"


def _check_settings(processor: M2FImageProcessor, task: str | None, threshold: float | None) -> str:
    """Return the task.

    Raises:
        ValueError: a task that does not exist, a threshold out of range or for semantic segmentation.
    """
    task = task or processor.task
    processor.check_task(task)
    if threshold is not None:
        check_probabilities(threshold=threshold)
        if task == "semantic":
            raise ValueError("threshold has no meaning for semantic segmentation: leave it out")
    return task


class Segmenter:
    """Segments pictures with a model and its processor.

    Args:
        model: in evaluation mode, on the device where it shall run.
        processor: the model's.
        task: "panoptic", "instance" or "semantic"; None: the processor's.
        threshold: leave out segments with a lower score, 0 to 1; None: the processor's.

    Raises:
        ValueError: a task that does not exist, a threshold out of range or for semantic segmentation.
    """

    def __init__(
        self,
        model: Mask2FormerForUniversalSegmentation,
        processor: M2FImageProcessor,
        task: str | None = None,
        threshold: float | None = None,
    ) -> None:
        self.model, self.processor, self.threshold = model, processor, threshold
        self.task = _check_settings(processor, task, threshold)

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | os.PathLike[str],
        task: str | None = None,
        threshold: float | None = None,
        device: str | None = None,
        dtype: str | torch.dtype = "float32",
        revision: str | None = None,
        **download: Any,
    ) -> Segmenter:
        """Load model and processor.

        Args:
            name_or_folder: a model on the Hub, `owner/name`, or a folder that `save_pretrained` wrote; also
                `transformers`' own Mask2Former checkpoints.
            task, threshold: as of the class.
            device: "cpu", "cuda", "cuda:1", "mps", …; None: a CUDA GPU where there is one, else the CPU.
            dtype: "float32", "bfloat16" or "float16", or torch's.
            revision: branch, tag or commit on the Hub; None: main.
            download: `token`, `cache_dir`, `local_files_only` and `subfolder`, as in `transformers`' `from_pretrained`.

        Raises:
            OSError: there is no such checkpoint, or it cannot be fetched.
            ValueError: it is a video model, damaged or incomplete; a device, dtype, task or threshold that cannot be.
        """
        name, device = os.fspath(name_or_folder), choose_device(device)
        torch_dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if not isinstance(torch_dtype, torch.dtype) or not torch_dtype.is_floating_point:
            raise ValueError(f"dtype {dtype} does not exist; choose float32, bfloat16 or float16")
        if checkpoint_family(name, revision, **download) is VIDEOS:
            raise ValueError(
                f"{name} is a video model, which follows objects through clips: run it with `m2f track` or "
                "m2f_hf.ClipTracker (docs/video.md), or name an image model"
            )
        arguments = {**download, "revision": revision or "main"}
        with explain_load_errors(name):
            processor = M2FImageProcessor.from_pretrained(name, **arguments)
        _check_settings(processor, task, threshold)  # before the weights are read
        with explain_load_errors(name):
            network: Any = load_whole(name, dtype=torch_dtype, **arguments)[0]
        return cls(network.to(device).eval(), processor, task, threshold)

    def __call__(self, image: Any) -> SegmentedImage:
        """Segment one picture.

        Args:
            image: path, http(s) address, Pillow image, array or tensor, as `M2FImageProcessor` takes it.

        Raises:
            FileNotFoundError: a path without a file.
            ValueError: what is not an image, or is too elongated for the model's size.
        """
        pixels = read_image(image)  # (3, H, W)
        size = (pixels.shape[1], pixels.shape[2])
        inputs: Any = self.processor(images=pixels, input_data_format="channels_first", return_tensors="pt")
        inputs = inputs.to(self.model.device, dtype=self.model.dtype)  # the mask, of integers, keeps its type
        with torch.inference_mode():
            outputs = self.model(**inputs)
            segmentation, infos = getattr(self, f"_{self.task}")(outputs, size)
        labels = label_names(self.model.config)
        for info in infos:
            info["label"] = labels[info["label_id"]]
        segments = [{key: info[key] for key in INFO_KEYS if key in info} for info in infos]
        return SegmentedImage(to_pillow(pixels), segmentation, segments, self.task, self.model.config.label_colors)

    def _panoptic(self, outputs: Any, size: Size) -> Segments:
        post_process = self.processor.post_process_panoptic_segmentation
        result = post_process(outputs, threshold=self.threshold, target_sizes=[size])[0]
        return result["segmentation"].cpu().numpy(), result["segments_info"]

    def _instance(self, outputs: Any, size: Size) -> Segments:
        post_process = self.processor.post_process_instance_segmentation
        result = post_process(outputs, threshold=self.threshold, target_sizes=[size], return_coco_annotation=True)[0]
        # The processor counts ids from 0, as `transformers` does; here 0 is void for every task.
        infos = [
            {**info, "id": info["id"] + 1, "segmentation": encoding}
            for info, encoding in zip(result["segments_info"], result["segmentation"], strict=True)
        ]
        segmentation = np.zeros(size, dtype=np.int32)
        for info in reversed(infos):  # the better over the worse
            segmentation[decode_rle(info["segmentation"], *size)] = info["id"]
        return segmentation, infos

    def _semantic(self, outputs: Any, size: Size) -> Segments:
        semantic_map = self.processor.post_process_semantic_segmentation(outputs, target_sizes=[size])[0].cpu().numpy()
        segmentation, infos = semantic_to_segments(semantic_map, label_names(self.model.config))
        stuff_ids = self.processor.label_ids_to_fuse
        areas, boxes = np.bincount(segmentation.ravel()), find_objects(segmentation)  # of id 0, 1, …; of id 1, 2, …
        for info in infos:
            rows, columns = boxes[info["id"] - 1]
            info["isthing"] = None if stuff_ids is None else info["label_id"] not in stuff_ids
            info["score"] = None
            info["area"] = int(areas[info["id"]])
            info["bbox"] = [columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start]
        return segmentation, infos
