"""Mean intersection over union of semantic maps, from one confusion matrix over all images."""

from typing import Any

import numpy as np


class MeanIoU:
    """IoU of each class over all pixels of all images, and its mean over the classes.

    IoU = TP / (TP + FP + FN), counted in pixels (PASCAL VOC's definition). The mean runs over the classes that occur
    in predictions or targets.

    Args:
        num_classes: labels run from 0 to `num_classes` - 1.
        ignore_index: target value of pixels that do not count.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255) -> None:
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.confusion = np.zeros((num_classes, num_classes + 1), dtype=np.int64)
        """Pixels by true class (row) and predicted class (column; the last is "anything else"). May be added up."""

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

    def compute(self) -> dict[str, Any]:
        """`mean_iou` in [0, 1] (0 before any pixel) and `per_class`, a list (None: the class never occurred)."""
        matrix = self.confusion[:, : self.num_classes]
        intersection = np.diag(matrix)
        union = self.confusion.sum(axis=1) + matrix.sum(axis=0) - intersection
        per_class = [float(i / u) if u else None for i, u in zip(intersection, union, strict=True)]
        present = [value for value in per_class if value is not None]
        return {"mean_iou": float(np.mean(present)) if present else 0.0, "per_class": per_class}
