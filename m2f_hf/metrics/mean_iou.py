"""Mean intersection over union of semantic maps, from one confusion matrix over all images."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .base import Metric, names_of


class MeanIoU(Metric):
    """IoU of each class over all pixels of all images, and its means.

    IoU = TP / (TP + FP + FN), counted in pixels (PASCAL VOC's definition). The mean runs over the classes that occur in
    predictions or targets; frequency weighted, each class counts by its share of the target's pixels (Long et al.,
    arXiv 1411.4038, section 5). Accuracy is the share of a class's pixels, or of all pixels, that are labelled rightly;
    its mean runs over the classes that occur in targets.

    Args:
        num_classes: labels run from 0 to `num_classes` - 1; or the classes in COCO's form with such ids.
        ignore_index: target value of pixels that do not count.

    Raises:
        ValueError: if the ids of the classes do not run from 0 without a gap.
    """

    def __init__(self, num_classes: int | Sequence[Mapping[str, Any]], ignore_index: int = 255) -> None:
        names = {i: str(i) for i in range(num_classes)} if isinstance(num_classes, int) else names_of(num_classes)
        if sorted(names) != list(range(len(names))):
            raise ValueError(f"Class ids {sorted(names)} do not run from 0 to {len(names) - 1}: renumber them.")
        self.names = [names[i] for i in range(len(names))]
        self.num_classes = len(names)
        self.ignore_index = ignore_index
        self.confusion = np.zeros((self.num_classes, self.num_classes + 1), dtype=np.int64)
        """Pixels by true class (row) and predicted class (column; the last is "anything else")."""

    def update(self, predicted: np.ndarray, target: np.ndarray) -> None:
        """Add one image: two (H, W) maps of labels. A predicted label out of range is simply wrong.

        Raises:
            ValueError: if the maps differ in size or the target has a label out of range other than `ignore_index`.
        """
        if predicted.shape != target.shape:
            raise ValueError(
                f"The prediction is {predicted.shape} and the target {target.shape}: resize the prediction to the size "
                "of the original image (`target_sizes` of post-processing)."
            )
        counted = target != self.ignore_index
        truth, guess = target[counted].astype(np.int64), predicted[counted].astype(np.int64)
        if truth.size and (truth.min() < 0 or truth.max() >= self.num_classes):
            raise ValueError(
                f"Target labels run from {truth.min()} to {truth.max()}, expected 0 to {self.num_classes - 1} or "
                f"{self.ignore_index} (`ignore_index`)."
            )
        guess = np.where((guess < 0) | (guess >= self.num_classes), self.num_classes, guess)
        width = self.num_classes + 1
        pairs = np.bincount(truth * width + guess, minlength=self.num_classes * width)
        self.confusion += pairs.reshape(self.num_classes, width)

    def merge(self, other: "MeanIoU") -> None:
        self.confusion += other.confusion

    def compute(self) -> dict[str, Any]:
        """Return `miou`, `fwiou`, `macc`, `pixel_accuracy`, and `per_class`, `{name: {"iou": …, "accuracy": …}}`.

        Figures are in [0, 1], None before any pixel and for classes without a pixel to measure.
        """
        right = np.diag(self.confusion)
        pixels = self.confusion.sum(axis=1)
        union = pixels + self.confusion[:, : self.num_classes].sum(axis=0) - right
        with np.errstate(invalid="ignore"):
            iou, accuracy = right / union, right / pixels  # NaN where a class does not occur
        result: dict[str, Any] = {
            "miou": _to_figure(iou[union > 0].mean()) if union.any() else None,
            "fwiou": _to_figure((pixels / pixels.sum() * iou)[pixels > 0].sum()) if pixels.any() else None,
            "macc": _to_figure(accuracy[pixels > 0].mean()) if pixels.any() else None,
            "pixel_accuracy": _to_figure(right.sum() / pixels.sum()) if pixels.any() else None,
        }
        own = [{"iou": _to_figure(iou[i]), "accuracy": _to_figure(accuracy[i])} for i in range(self.num_classes)]
        return {**result, "per_class": dict(zip(self.names, own, strict=True))}


def _to_figure(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)
