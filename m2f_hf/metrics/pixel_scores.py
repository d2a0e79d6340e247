"""Scores of one mask or one class by pixel: IoU, Dice, precision, recall, and errors of soft masks."""

from typing import Any

import numpy as np

from .base import Metric


SCORES = ("iou", "dice", "precision", "recall", "mae", "mse")


class PixelScores(Metric):
    """Scores of masks over all pixels of all images, and as a mean over images.

    With TP, FP and FN counted in pixels: IoU = TP / (TP + FP + FN), Dice = 2 TP / (2 TP + FP + FN) (which is F1),
    precision = TP / (TP + FP), recall = TP / (TP + FN). MAE and MSE are the mean absolute and squared difference of a
    predicted probability (of a binary mask: 0 or 1) and the target.

    Args:
        threshold: a pixel is predicted where its probability is at least this, 0 to 1.
    """

    def __init__(self, threshold: float = 0.5) -> None:
        self.threshold = threshold
        self.totals = np.zeros(6)
        """Over all pixels: TP, FP, FN, pixels, sum of the absolute and of the squared differences."""
        self.image_sums = np.zeros((2, len(SCORES)))
        """Of each score its sum over images, and over how many it runs."""

    def update(self, predicted: np.ndarray, target: np.ndarray, ignored: np.ndarray | None = None) -> None:
        """Add one image.

        Args:
            predicted: (H, W) bool, or probabilities from 0 to 1.
            target: (H, W) bool. (A class of two label maps: `predicted_labels == k`, `target_labels == k`.)
            ignored: (H, W) bool, True where a pixel does not count.

        Raises:
            ValueError: if the maps differ in size, the target is not bool, or probabilities leave 0 to 1.
        """
        if predicted.shape != target.shape or (ignored is not None and ignored.shape != target.shape):
            raise ValueError(
                f"The prediction is {predicted.shape} and the target {target.shape}: resize the prediction to the size "
                "of the original image (`target_sizes` of post-processing)."
            )
        if target.dtype != np.bool_:
            raise ValueError(f"The target is {target.dtype}, not bool: compare it with the class or the id meant.")
        counted = np.ones_like(target) if ignored is None else ~ignored
        values, truth = predicted[counted].astype(np.float64), target[counted]
        # Negated, so that NaN is refused as well.
        if values.size and not (values.min() >= 0 and values.max() <= 1):
            raise ValueError("Predictions must be bool or probabilities from 0 to 1: apply a sigmoid to logits.")
        guess = values >= self.threshold
        difference = np.abs(values - truth)
        counts = [(guess & truth).sum(), (guess & ~truth).sum(), (~guess & truth).sum(), truth.size]
        totals = np.array([*counts, difference.sum(), np.square(difference).sum()])
        self.totals += totals
        known = [(0.0, 0) if score is None else (score, 1) for score in _scores(totals).values()]
        self.image_sums += np.array(known).T

    def merge(self, other: "PixelScores") -> None:
        self.totals += other.totals
        self.image_sums += other.image_sums

    def compute(self) -> dict[str, Any]:
        """Return `iou`, `dice`, `precision`, `recall`, `mae`, `mse` over all pixels, and each as `mean_…` over images.

        None where undefined: the first four need a pixel in the prediction or the target (precision: in the
        prediction; recall: in the target). A mean leaves out images where the score is undefined.
        """
        sums, counts = self.image_sums
        means = {f"mean_{name}": float(s / n) if n else None for name, s, n in zip(SCORES, sums, counts, strict=True)}
        return {**_scores(self.totals), **means}


def _scores(totals: np.ndarray) -> dict[str, float | None]:
    tp, fp, fn, pixels, absolute, squared = totals.tolist()
    fractions = {
        "iou": (tp, tp + fp + fn),
        "dice": (2 * tp, 2 * tp + fp + fn),
        "precision": (tp, tp + fp),
        "recall": (tp, tp + fn),
        "mae": (absolute, pixels),
        "mse": (squared, pixels),
    }
    return {name: part / whole if whole else None for name, (part, whole) in fractions.items()}
