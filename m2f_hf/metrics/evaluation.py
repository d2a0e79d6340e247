"""Measures of one model on one data set, from the model's outputs and the data set's items."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypedDict, cast

import numpy as np
import torch

from .base import Gather, Metric, merged, names_of
from .mask_ap import MaskAP
from .mean_iou import MeanIoU
from .panoptic_quality import PanopticQuality
from .video_ap import VideoAP, tubes


MEASURES: dict[str, tuple[str, ...]] = {
    "panoptic": ("pq", "ap", "miou"),
    "instance": ("ap",),
    "semantic": ("miou",),
    "video": ("ap",),
}
"""What the papers report for each task, the main one first."""
MAIN_FIGURE = {"panoptic": "pq_all", "instance": "ap", "semantic": "miou", "video": "ap"}
"""The figure by which checkpoints and images of a task are compared."""
CARD_FIGURES = {
    "pq_all": ("panoptic", "PQ"),
    "pq_things": ("panoptic", "PQ things"),
    "pq_stuff": ("panoptic", "PQ stuff"),
    "ap": ("instance", "AP"),
    "ap50": ("instance", "AP50"),
    "miou": ("semantic", "mIoU"),
}
"""The figures on a model's card, of clips too: key in `Evaluation.compute` -> task and metric on the card."""
VOID_LABEL = -1  # outside the classes, however many there are


class Prediction(TypedDict, total=False):
    """One image's results of `post_process_*_segmentation` at its own size; of a video the tracks as `instances`."""

    panoptic: Mapping[str, Any]
    instances: Mapping[str, Any]
    semantic: torch.Tensor | np.ndarray


class Evaluation:
    """PQ, mask AP and mIoU of one model, image by image, or video AP, clip by clip, in the original images' frame.

    Its state is a few numbers per class, image and detection.

    Args:
        task: "panoptic", "instance", "semantic" or "video".
        processor: an `M2FImageProcessor` (for "video" a `Mask2FormerVideoProcessor`), or another object with its
            `post_process_*_segmentation` methods; its thresholds and stuff classes are used.
        categories: the classes in COCO's form with contiguous ids.
        measures: some of `MEASURES[task]`; None: all. "ap" takes most of the time.

    Raises:
        ValueError: if the task or a measure of it does not exist.
        ImportError: if mask AP is measured and pycocotools is not installed.
    """

    def __init__(
        self,
        task: str,
        processor: Any,
        categories: Sequence[Mapping[str, Any]],
        measures: Collection[str] | None = None,
    ) -> None:
        if task not in MEASURES:
            raise ValueError(f"task {task!r} does not exist; choose one of {', '.join(MEASURES)}")
        unknown = set(measures or ()) - set(MEASURES[task])
        if unknown:
            raise ValueError(
                f"measures {sorted(unknown)} do not exist for task {task!r}; choose from {', '.join(MEASURES[task])}"
            )
        self.task, self.processor, self.categories = task, processor, categories
        self.measures = MEASURES[task] if measures is None else tuple(measures)
        self.metrics: dict[str, Any] = {}
        if "pq" in self.measures:
            self.metrics["pq"] = PanopticQuality(categories)
        if "ap" in self.measures:
            self.metrics["ap"] = VideoAP(categories) if task == "video" else MaskAP(categories)
        if "miou" in self.measures:
            self.metrics["miou"] = MeanIoU(categories, VOID_LABEL)

    def update(self, outputs: Any, items: Sequence[Mapping[str, Any]]) -> None:
        """Add a batch of the model's outputs and the items (of a `SegmentationDataset` or `VideoDataset`) they are for.

        Raises:
            ValueError: an image added before (by its `image_id`), an item without the labels that a measure needs, and
                what the measures refuse.
        """
        for prediction, item in zip(self.predict(outputs, items), items, strict=True):
            self.add(prediction, item)

    def predict(self, outputs: Any, items: Sequence[Mapping[str, Any]]) -> list[Prediction]:
        """Post-process outputs to the images' sizes: what the measures compare with the items."""
        sizes = [image_size(item) for item in items]
        found: dict[str, Any] = {}
        if "pq" in self.metrics:
            found["panoptic"] = self.processor.post_process_panoptic_segmentation(outputs, target_sizes=sizes)
        if "ap" in self.metrics:
            kind = "video_instance" if self.task == "video" else "instance"
            post_process = getattr(self.processor, f"post_process_{kind}_segmentation")
            found["instances"] = post_process(outputs, threshold=0.0, target_sizes=sizes, return_coco_annotation=True)
        if "miou" in self.metrics:
            found["semantic"] = self.processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
        return [cast(Prediction, {name: results[k] for name, results in found.items()}) for k in range(len(items))]

    def add(self, prediction: Prediction, item: Mapping[str, Any]) -> None:
        """Add one image: a prediction as `predict` gives it, and the item it is for."""
        if "pq" in self.metrics:
            result = prediction["panoptic"]
            self.metrics["pq"].update(
                to_array(result["segmentation"]), result["segments_info"], _label_map(item), item["segments_info"]
            )
        if "ap" in self.metrics:
            found = detections(prediction["instances"])
            if self.task == "video":
                size = (len(item["frames"]), *image_size(item))
                named = [{**track, "segmentations": track["segmentation"]} for track in found]
                self.metrics["ap"].update(item["video_id"], size, named, tubes(item))
            else:
                self.metrics["ap"].update(item["image_id"], image_size(item), found, with_masks(item))
        if "miou" in self.metrics:
            target = semantic_map(_label_map(item), item["segments_info"])
            self.metrics["miou"].update(to_array(prediction["semantic"]), target)

    def empty(self) -> "Evaluation":
        """Return an empty one with the same settings."""
        return Evaluation(self.task, self.processor, self.categories, self.measures)

    def merge(self, other: "Evaluation") -> None:
        """Add what another with the same settings has seen."""
        for name, metric in self.metrics.items():
            metric.merge(other.metrics[name])

    def compute(self, gather: Gather | None = None) -> dict[str, Any]:
        """Return the measures' figures in one flat dict, each in [0, 1], None where undefined.

        Args:
            gather: `accelerate.utils.gather_object` or the like, for all processes' images; all must call it then.

        Returns:
            For PQ `pq_all`, `sq_things`, …; for mask AP `ap`, `ap50`, …; for mIoU `miou`, `fwiou`, `macc`,
            `pixel_accuracy`; and `per_class`: `{name: {"pq": …, "ap": …, "iou": …, …}}`.

        Raises:
            ValueError: if two measures report a figure with the same key.
        """
        parts = [self.metrics] if gather is None else gather([self.metrics])
        result: dict[str, Any] = {}
        per_class: dict[str, dict[str, Any]] = {name: {} for name in names_of(self.categories).values()}
        for name in self.metrics:
            metric: Metric = merged([part[name] for part in parts])
            figures = metric.compute()
            for class_name, own in figures.pop("per_class").items():
                _add_figures(per_class[class_name], own, name)
            _add_figures(result, figures, name)
        return {**result, "per_class": per_class}


def _add_figures(result: dict[str, Any], figures: Mapping[str, Any], name: str) -> None:
    """Add the figures of the measure `name` to the result, in place; refuse keys that it has already."""
    duplicates = sorted(result.keys() & figures.keys())
    if duplicates:
        raise ValueError(f"Measure {name!r} reports {', '.join(duplicates)}, as another measure does: rename its keys.")
    result.update(figures)


# --- items ---


def image_size(item: Mapping[str, Any]) -> tuple[int, int]:
    """Return height and width of an item's image, or of its frames."""
    if "frames" in item:
        return item["height"], item["width"]
    if "segmentation_map" in item:
        height, width = item["segmentation_map"].shape
        return height, width
    return item["image"].height, item["image"].width


def semantic_map(segmentation_map: np.ndarray, segments_info: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Return the class of each pixel of a panoptic map: (H, W) int32, `VOID_LABEL` where there is none."""
    labels = np.full(segmentation_map.shape, VOID_LABEL, dtype=np.int32)
    for info in segments_info:
        labels[segmentation_map == info["id"]] = info["category_id"]
    return labels


def with_masks(item: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the segments of an item with a `segmentation` each: their own, or the map's as (H, W) bool."""
    if "segmentation_map" not in item:
        return list(item["segments_info"])
    return [{**info, "segmentation": item["segmentation_map"] == info["id"]} for info in item["segments_info"]]


def detections(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the instances of a `post_process_instance_segmentation` result, each with its mask as `segmentation`.

    Raises:
        ValueError: if the result is a map, where instances hide each other.
    """
    masks, segments = result["segmentation"], result["segments_info"]
    if len(segments) != len(masks) or getattr(masks, "ndim", 3) != 3:
        raise ValueError(
            "Instances are measured by their whole masks: pass return_coco_annotation=True (or "
            "return_binary_maps=True) to post_process_instance_segmentation."
        )
    return [{**info, "segmentation": mask} for info, mask in zip(segments, masks, strict=True)]


def _label_map(item: Mapping[str, Any]) -> np.ndarray:
    if "segmentation_map" not in item:
        raise ValueError(
            f"Image {item.get('image_id')!r} has masks that may overlap and no segmentation map: measure task "
            "'instance', or take a data set with panoptic or semantic labels."
        )
    return item["segmentation_map"]


def to_array(labels: Any) -> np.ndarray:
    """Convert a tensor on any device, an array or nested lists to an array."""
    return labels.detach().cpu().numpy() if isinstance(labels, torch.Tensor) else np.asarray(labels)
