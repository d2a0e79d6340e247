"""Panoptic quality (Kirillov et al., "Panoptic Segmentation", arXiv 1801.00868, section 4), image by image."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np


VOID = 0
"""Id of pixels of no segment, in predictions and targets."""


class PanopticQuality:
    """PQ, SQ and RQ over all classes, things, stuff and each class.

    A predicted and a true segment of one class match if their intersection over union is above 0.5; then no other
    segment can match either. Per class, with TP the matches, FP and FN the predicted and true segments without one:

    - segmentation quality SQ = mean IoU of the matches,
    - recognition quality RQ = TP / (TP + FP / 2 + FN / 2),
    - PQ = SQ x RQ.

    Void and crowds (section 4.1 and COCO's practice): pixels void in the target do not count to the union; true
    segments with `iscrowd` match nothing and are not missed; an unmatched prediction that lies by more than half in
    void and crowds of its class is no false positive. Averages run over the classes that occur in predictions or
    targets.

    Args:
        categories: the classes in COCO's form; `id`, `isthing` and `name` are read.

    Raises:
        ValueError: if two categories have one id.
    """

    def __init__(self, categories: Sequence[Mapping[str, Any]]) -> None:
        self.categories = {int(category["id"]): category for category in categories}
        if len(self.categories) != len(categories):
            raise ValueError("Two categories have the same id: give each class its own.")
        self._row = {category_id: row for row, category_id in enumerate(self.categories)}
        self.totals = np.zeros((len(self.categories), 4))
        """Per class: sum of the matches' IoU, TP, FP, FN. Totals of several processes may be added up."""

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
            predicted_segments: a dict with `id` and `category_id` for each id in `predicted_map`. (The post-processing
                of this package calls the latter `label_id`, which is read as well.)
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

        pairs, counts = np.unique(
            np.stack([target_map.ravel(), predicted_map.ravel()]).astype(np.int64), axis=1, return_counts=True
        )
        overlap = {
            (int(target), int(predicted)): int(n) for (target, predicted), n in zip(pairs.T, counts, strict=True)
        }
        target_area, predicted_area = _sum_by(overlap, 0), _sum_by(overlap, 1)

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

    def compute(self) -> dict[str, Any]:
        """The result so far, each figure in [0, 1].

        Returns:
            `{"all": …, "things": …, "stuff": …, "per_class": {name: …}}`. Each `…` has `pq`, `sq`, `rq`; the averages
            also `num_classes`, how many classes they run over (with none they are 0), and the classes `tp`, `fp`, `fn`
            (None instead of the figures for a class that never occurred).
        """
        per_class = {row: _qualities(self.totals[row]) for row in self._row.values()}
        result: dict[str, Any] = {}
        for group, kinds in (("all", (0, 1)), ("things", (1,)), ("stuff", (0,))):
            members = [
                per_class[self._row[category_id]]
                for category_id, category in self.categories.items()
                if category["isthing"] in kinds and per_class[self._row[category_id]]["pq"] is not None
            ]
            means = {key: float(np.mean([m[key] for m in members])) if members else 0.0 for key in ("pq", "sq", "rq")}
            result[group] = {**means, "num_classes": len(members)}
        result["per_class"] = {str(self.categories[i]["name"]): per_class[row] for i, row in self._row.items()}
        return result

    def _categories_of(
        self, segment_map: np.ndarray, segments: Iterable[Mapping[str, Any]], side: str
    ) -> dict[int, int]:
        """Category id of each segment id; the map and the list must agree."""
        categories = {int(s["id"]): int(s["category_id"] if "category_id" in s else s["label_id"]) for s in segments}
        present = {int(i) for i in np.unique(segment_map)} - {VOID}
        if present != set(categories):
            raise ValueError(
                f"The {side} map and its segments differ: ids {sorted(present - set(categories))} are in the map only, "
                f"{sorted(set(categories) - present)} in the segments only."
            )
        unknown = set(categories.values()) - set(self.categories)
        if unknown:
            raise ValueError(f"Categories {sorted(unknown)} of the {side} segments are not among the given categories.")
        return categories


def _sum_by(overlap: Mapping[tuple[int, int], int], position: int) -> dict[int, int]:
    areas: dict[int, int] = {}
    for pair, count in overlap.items():
        areas[pair[position]] = areas.get(pair[position], 0) + count
    return areas


def _qualities(totals: np.ndarray) -> dict[str, Any]:
    iou, tp, fp, fn = totals.tolist()
    counts = {"tp": int(tp), "fp": int(fp), "fn": int(fn)}
    if tp + fp + fn == 0:
        return {"pq": None, "sq": None, "rq": None, **counts}
    recognized = tp + fp / 2 + fn / 2
    return {"pq": iou / recognized, "sq": iou / tp if tp else 0.0, "rq": tp / recognized, **counts}
