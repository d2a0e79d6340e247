"""Mask average precision as COCO defines it (Lin et al., arXiv 1405.0312; https://cocodataset.org/#detection-eval).

Objects are small below 32 x 32 pixels, and large from 96 x 96 on.

Each image's detections are matched to its objects when it is added, and only the outcome is kept: a score and, per size
range and IoU threshold, two bits for each detection. Matching and averaging are those of pycocotools' `COCOeval`.
"""

import contextlib
import io
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..processing.rle import decode_segmentation, encode_rle
from .base import Metric, names_of


SIZES = {"small": 1, "medium": 2, "large": 3}
"""Positions among the four ranges of areas, the first being all."""
MOST = (1, 10, 100)
"""Numbers of detections that count for a class of an image."""


class Outcome(NamedTuple):
    """Matches of one class's D detections in one image, by falling score, and of its G objects.

    For each size range and IoU threshold: `is_matched` and `is_ignored` (A, T, D) bool; `is_object_ignored` (A, G)
    bool, in some order; `scores` (D,).
    """

    is_matched: np.ndarray
    is_ignored: np.ndarray
    is_object_ignored: np.ndarray
    scores: np.ndarray


def area_ranges(medium: int, large: int) -> list[list[float]]:
    """Return least and most pixels of all, small, medium and large objects, from the least squares of the last two."""
    return [[0, 1e5**2], [0, medium**2], [medium**2, large**2], [large**2, 1e5**2]]


class MaskAP(Metric):
    """AP and AR of instance masks over all images: the mean over IoU thresholds 0.5, 0.55, …, 0.95, and over classes.

    At most 100 detections count for a class of an image, the best-scored. Detections on crowds and on objects outside a
    size range are neither right nor wrong, as in COCO.

    Args:
        categories: the classes in COCO's form; those with a false `isthing` are left out.

    Raises:
        ImportError: if pycocotools is not installed.
        ValueError: if two categories have one id.
    """

    area_ranges = area_ranges(32, 96)
    _unit = "image"

    def __init__(self, categories: Sequence[Mapping[str, Any]]) -> None:
        names = names_of(categories)
        things = {int(category["id"]) for category in categories if is_thing(category)}
        self.names = {category: name for category, name in names.items() if category in things}
        self.others = names.keys() - things
        self.images: dict[Hashable, dict[int, Outcome]] = {}
        """Image -> class -> matches of its detections."""
        try:
            import pycocotools.cocoeval  # noqa: F401
        except ImportError as error:
            raise ImportError("Mask AP needs pycocotools: pip install pycocotools") from error

    def update(
        self,
        image_id: Hashable,
        size: tuple[int, ...],
        predictions: Iterable[Mapping[str, Any]],
        targets: Iterable[Mapping[str, Any]],
    ) -> None:
        """Add one image.

        Args:
            image_id: any, once; of equal scores the one of the image with the lower id counts first, as in COCO.
            size: height and width.
            predictions: dicts with `category_id` (or `label_id`), `score` and `segmentation`: a COCO run-length
                encoding, polygons, or an (H, W) bool array.
            targets: dicts with `category_id`, `segmentation` and, where they apply, `iscrowd` and `area` (by which an
                object is small or large; by default its pixels). Both may list other than thing classes; these are
                left out.

        Raises:
            ValueError: an image that was added before, a mask of another size, an unknown class, a score that is NaN.
        """
        if image_id in self.images:
            raise ValueError(
                f"{self._unit.capitalize()} {image_id!r} was added before: give every {self._unit} its own id, and "
                f"every process its own {self._unit}s (a loader that repeats some to make shares even must not: "
                "`even_batches=False`)."
            )
        found: dict[str, list[dict[str, Any]]] = {"target": [], "prediction": []}
        for side, entries in (("target", targets), ("prediction", predictions)):
            for number, entry in enumerate(entries, start=1):  # the id 0 means "not matched" to COCOeval
                category = self._category_of(entry, side)
                if category is None:
                    continue
                rle, area = self._mask_of(entry, size, is_target=side == "target")
                own = {"id": number, "image_id": 0, "category_id": category, "segmentation": rle, "area": area}
                own |= (
                    {"iscrowd": int(bool(entry.get("iscrowd")))}
                    if side == "target"
                    else {"score": _finite(entry["score"])}
                )
                found[side].append(own)
        self.images[image_id] = _match(found["target"], found["prediction"], self.area_ranges)

    def _mask_of(
        self, entry: Mapping[str, Any], size: tuple[int, ...], is_target: bool
    ) -> tuple[Mapping[str, Any], float]:
        """Return the run-length encoding of an entry's mask, and the area by which it is small or large."""
        from pycocotools import mask

        rle = to_rle(entry["segmentation"], (size[0], size[1]))
        pixels = int(mask.area(rle))
        return rle, entry.get("area", pixels) if is_target else pixels

    def merge(self, other: "MaskAP") -> None:
        twice = self.images.keys() & other.images.keys()
        if twice:
            raise ValueError(
                f"{self._unit.capitalize()}s {sorted(map(str, twice))[:5]} were evaluated by more than one process: "
                f"give every {self._unit} to one (`even_batches=False` for a loader that repeats some to make shares "
                "even)."
            )
        self.images |= other.images

    def compute(self) -> dict[str, Any]:
        """Return `ap`, `ap50`, `ap75`, `ap_small`, …, `ar1`, `ar10`, `ar100`, `ar_small`, …, and `per_class`.

        Figures are in [0, 1], None where there is no object to be found (pycocotools has -1). `per_class` is `{name:
        {"ap": …, "ap50": …, "ap75": …, "ap_small": …, "ap_medium": …, "ap_large": …}}`.
        """
        # Of different types, ids have no order of their own.
        image_ids: list[Any] = sorted(self.images, key=lambda image_id: (type(image_id).__name__, image_id))
        outcomes = [[self.images[i][k] for i in image_ids if k in self.images[i]] for k in self.names]
        curves = [_curves(own, self.area_ranges) for own in outcomes or [[]]]
        # (T, R, K, A, M) and (T, K, A, M): IoU thresholds, recalls, classes, size ranges, numbers of detections.
        precision, recall = (np.stack(parts, axis=-3) for parts in zip(*curves, strict=True))
        result: dict[str, Any] = _precisions(precision)
        result |= {f"ar{most}": _mean(recall[..., 0, m]) for m, most in enumerate(MOST)}
        result |= {f"ar_{size}": _mean(recall[..., i, 2]) for size, i in SIZES.items()}
        result["per_class"] = {name: _precisions(precision[:, :, [k]]) for k, name in enumerate(self.names.values())}
        return result

    def _category_of(self, entry: Mapping[str, Any], side: str) -> int | None:
        """Return the class of an entry, None if it is no thing."""
        category = int(entry["category_id"] if "category_id" in entry else entry["label_id"])
        if category in self.others:
            return None
        if category not in self.names:
            raise ValueError(f"Category {category} of a {side} is not among the given categories.")
        return category


def is_thing(category: Mapping[str, Any]) -> bool:
    """Whether instances of a class are told apart; where it is not known, they are."""
    known = category.get("isthing")
    return known is None or bool(known)


def to_rle(segmentation: Any, size: tuple[int, int]) -> Mapping[str, Any]:
    """Convert a mask in any of COCO's forms, or an (H, W) array or tensor, to a compressed run-length encoding.

    Raises:
        ValueError: if its size is not `size`.
    """
    if isinstance(segmentation, Mapping):
        found, is_compressed = tuple(segmentation["size"]), isinstance(segmentation["counts"], str | bytes)
    else:
        found, is_compressed = tuple(getattr(segmentation, "shape", size)), False
    if found != size:
        raise ValueError(f"A mask is {found} and its image {size} (height, width): resize the one to the other.")
    if is_compressed:
        return segmentation
    if hasattr(segmentation, "shape"):
        return encode_rle(segmentation)
    return encode_rle(decode_segmentation(segmentation, *size))


def _finite(score: Any) -> float:
    if not np.isfinite(score):
        raise ValueError(f"A detection has the score {score}: is the model's output finite?")
    return float(score)


# --- COCOeval ---


def _evaluate(targets: list[Any], predictions: list[Any], images: Sequence[int], categories: Sequence[int], areas: Any):
    """Match predictions to targets in a `COCOeval`: its `evalImgs` are by class, range of areas and image."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    content = {
        "images": [{"id": image, "height": 0, "width": 0} for image in images],  # run lengths state their own size
        "categories": [{"id": category} for category in categories],
    }
    sides = []
    for annotations in (targets, predictions):
        coco = COCO()
        coco.dataset = {**content, "annotations": annotations}
        coco.createIndex()
        sides.append(coco)
    evaluator = COCOeval(*sides, "segm")  # its images and categories are all
    evaluator.params.areaRng, evaluator.params.maxDets = areas, list(MOST)
    evaluator.evaluate()
    return evaluator


def _match(targets: list[Any], predictions: list[Any], areas: list[list[float]]) -> dict[int, Outcome]:
    """Match one image's predictions to its targets: class -> outcome. Both have ids from 1 and the image id 0."""
    categories = sorted({entry["category_id"] for entry in (*targets, *predictions)})
    if not categories:
        return {}
    with contextlib.redirect_stdout(io.StringIO()):
        entries = _evaluate(targets, predictions, [0], categories, areas).evalImgs
    outcomes = {}
    for k, category in enumerate(categories):
        sizes = entries[k * len(areas) : (k + 1) * len(areas)]
        outcomes[category] = Outcome(
            np.stack([entry["dtMatches"] for entry in sizes]) > 0,
            np.stack([entry["dtIgnore"] for entry in sizes]).astype(bool),
            np.stack([entry["gtIgnore"] for entry in sizes]).astype(bool),
            np.array(sizes[0]["dtScores"], dtype=np.float64),
        )
    return outcomes


def _curves(outcomes: Sequence[Outcome], areas: list[list[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Return one class's precision (T, R, A, M) at each recall, and recall (T, A, M); -1 where there is no object."""
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = _evaluate([], [], range(len(outcomes)), [0], areas)
        evaluator.evalImgs = [
            {
                "dtMatches": outcome.is_matched[size],
                "dtIgnore": outcome.is_ignored[size],
                "gtIgnore": outcome.is_object_ignored[size],
                "dtScores": outcome.scores,
            }
            for size in range(len(areas))
            for outcome in outcomes
        ]
        evaluator.accumulate()
    return evaluator.eval["precision"][:, :, 0], evaluator.eval["recall"][:, 0]


def _mean(values: np.ndarray) -> float | None:
    known = values[values > -1]
    return float(known.mean()) if known.size else None


def _precisions(precision: np.ndarray) -> dict[str, float | None]:
    """Average (T, R, K, A, M) over all sizes, at two thresholds, and for each size; at most 100 detections."""
    figures = {"ap": _mean(precision[..., 0, 2]), "ap50": _mean(precision[0, ..., 0, 2])}
    figures["ap75"] = _mean(precision[5, ..., 0, 2])
    return figures | {f"ap_{size}": _mean(precision[..., i, 2]) for size, i in SIZES.items()}
