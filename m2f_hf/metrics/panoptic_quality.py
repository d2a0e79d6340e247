"""Panoptic quality (Kirillov et al., "Panoptic Segmentation", arXiv 1801.00868, section 4), image by image."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .base import Metric, names_of


VOID = 0
"""Id of pixels of no segment, in predictions and targets."""


class PanopticQuality(Metric):
    """PQ, SQ and RQ over all classes, things, stuff and each class.

    A predicted and a true segment of one class match if their intersection over union is above 0.5; then no other
    segment can match either. Per class, with TP the matches, FP and FN the predicted and true segments without one:

    - segmentation quality SQ = mean IoU of the matches,
    - recognition quality RQ = TP / (TP + FP / 2 + FN / 2),
    - PQ = SQ x RQ.

    Pixels void in the target do not count to the union; true segments with `iscrowd` match nothing and are not missed;
    an unmatched prediction with more than half of its pixels in void and crowds of its class is no false positive
    (section 4.1 and COCO's practice). Averages run over the classes that occur in predictions or targets.

    Args:
        categories: the classes in COCO's form; those with an unknown `isthing` (None) are neither things nor stuff.

    Raises:
        ValueError: if two categories have one id.
    """

    def __init__(self, categories: Sequence[Mapping[str, Any]]) -> None:
        self.names = names_of(categories)
        self._row = {category_id: row for row, category_id in enumerate(self.names)}
        known = [category.get("isthing") for category in categories]
        self._isthing = [None if isthing is None else bool(isthing) for isthing in known]
        self.totals = np.zeros((len(self.names), 4))
        """Per class: sum of the matches' IoU, TP, FP, FN."""

    def update(
        self,
        predicted_map: np.ndarray,
        predicted_segments: Iterable[Mapping[str, Any]],
        target_map: np.ndarray,
        target_segments: Iterable[Mapping[str, Any]],
    ) -> None:
        """Add one image.

        Args:
            predicted_map: (H, W) integers, segment ids, 0 where nothing is predicted.
            predicted_segments: a dict with `id` and `category_id` (or `label_id`) for each id in `predicted_map`.
            target_map: (H, W) integers, segment ids, 0 is void.
            target_segments: dicts with `id`, `category_id` and, where it applies, `iscrowd`.

        Raises:
            ValueError: if the maps differ in size, or a map and its segments in ids, or a category is unknown.
        """
        if predicted_map.shape != target_map.shape:
            raise ValueError(
                f"The prediction is {predicted_map.shape} and the target {target_map.shape}: resize the prediction to "
                "the size of the original image (`target_sizes` of post-processing)."
            )
        category_of_prediction = self._categories_of(predicted_map, predicted_segments, "predicted")
        target_segments = list(target_segments)
        category_of_target = self._categories_of(target_map, target_segments, "target")
        crowds = {int(segment["id"]) for segment in target_segments if segment.get("iscrowd", 0)}

        # Two ids of up to 31 bits in one number: unique numbers are found much faster than unique rows.
        pairs = target_map.ravel().astype(np.int64) << 32 | predicted_map.ravel().astype(np.int64)
        found, counts = np.unique(pairs, return_counts=True)
        overlap = {(pair >> 32, pair & 0xFFFFFFFF): n for pair, n in zip(found.tolist(), counts.tolist(), strict=True)}
        target_area: Counter[int] = Counter()
        predicted_area: Counter[int] = Counter()
        for (target, predicted), count in overlap.items():
            target_area[target] += count
            predicted_area[predicted] += count

        matched_targets, matched_predictions = set(), set()
        for (target, predicted), intersection in overlap.items():
            if target == VOID or predicted == VOID or target in crowds:
                continue
            if category_of_target[target] != category_of_prediction[predicted]:
                continue
            in_void = overlap.get((VOID, predicted), 0)
            union = target_area[target] + predicted_area[predicted] - intersection - in_void
            if intersection / union > 0.5:
                self.totals[self._row[category_of_target[target]], :2] += intersection / union, 1
                matched_targets.add(target)
                matched_predictions.add(predicted)

        for target, category_id in category_of_target.items():
            if target not in matched_targets and target not in crowds:
                self.totals[self._row[category_id], 3] += 1
        for predicted, category_id in category_of_prediction.items():
            if predicted in matched_predictions:
                continue
            excused = [VOID, *(crowd for crowd in crowds if category_of_target[crowd] == category_id)]
            if sum(overlap.get((target, predicted), 0) for target in excused) <= 0.5 * predicted_area[predicted]:
                self.totals[self._row[category_id], 2] += 1

    def merge(self, other: "PanopticQuality") -> None:
        self.totals += other.totals

    def compute(self) -> dict[str, Any]:
        """Return `pq_all`, `sq_all`, `rq_all`, the same of `_things` and `_stuff`, and `per_class`.

        Figures are in [0, 1], None where no class of the kind occurred. `per_class` is `{name: {"pq": …, "sq": …,
        "rq": …, "tp": …, "fp": …, "fn": …}}`.
        """
        qualities = [_qualities(row) for row in self.totals]
        result: dict[str, Any] = {}
        for group, kinds in (("all", (True, False, None)), ("things", (True,)), ("stuff", (False,))):
            rows = zip(qualities, self._isthing, strict=True)
            members = [row for row, isthing in rows if isthing in kinds and row["pq"] is not None]
            for key in ("pq", "sq", "rq"):
                result[f"{key}_{group}"] = float(np.mean([entry[key] for entry in members])) if members else None
        result["per_class"] = dict(zip(self.names.values(), qualities, strict=True))
        return result

    def _categories_of(
        self, segment_map: np.ndarray, segments: Iterable[Mapping[str, Any]], side: str
    ) -> dict[int, int]:
        """Return the category id of each segment id; the map and the list must agree."""
        categories = {int(s["id"]): int(s["category_id"] if "category_id" in s else s["label_id"]) for s in segments}
        present = set(np.unique(segment_map).tolist()) - {VOID}
        if min(present, default=0) < 0:
            raise ValueError(f"The {side} map has the negative id {min(present)}: ids count from 1, 0 is void.")
        if present != set(categories):
            raise ValueError(
                f"The {side} map and its segments differ: ids {sorted(present - set(categories))} are in the map only, "
                f"{sorted(set(categories) - present)} in the segments only."
            )
        unknown = set(categories.values()) - set(self.names)
        if unknown:
            raise ValueError(f"Categories {sorted(unknown)} of the {side} segments are not among the given categories.")
        return categories


def _qualities(totals: np.ndarray) -> dict[str, Any]:
    iou, tp, fp, fn = totals.tolist()
    counts = {"tp": int(tp), "fp": int(fp), "fn": int(fn)}
    if tp + fp + fn == 0:
        return {"pq": None, "sq": None, "rq": None, **counts}
    recognized = tp + fp / 2 + fn / 2
    return {"pq": iou / recognized, "sq": iou / tp if tp else 0.0, "rq": tp / recognized, **counts}
