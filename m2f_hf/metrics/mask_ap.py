"""Mask average precision as COCO defines it (Lin et al., arXiv 1405.0312; https://cocodataset.org/#detection-eval).

Objects are small below 32 x 32 pixels, and large from 96 x 96 on.

Each image's detections are matched to its objects when it is added, and only the outcome is kept: a score and, per size
range and IoU threshold, two bits for each detection. Matching and averaging are pycocotools' own code, or that of
faster-coco-eval where it is installed.
"""

import importlib.util
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..processing.post_processing import encode_rle
from ..processing.rle import decode_segmentation
from .base import Metric, names_of


ENGINES = ("faster_coco_eval", "pycocotools")
SIZES = {"small": 1, "medium": 2, "large": 3}
"""Positions among the four ranges of areas, the first being all."""
MOST = (1, 10, 100)
"""Numbers of detections for a class of an image."""
NUM_IOUS = 10
"""0.5, 0.55, …, 0.95."""
RECALLS = np.linspace(0.0, 1.0, 101)


class Outcome(NamedTuple):
    """What became of one class's detections in one image, D of them by falling score, and of its G objects.

    For each size range and IoU threshold: `is_matched` and `is_ignored` (A, T, D) bool; `is_object_ignored` (A, G)
    bool, in some order; `scores` (D,).
    """

    is_matched: np.ndarray
    is_ignored: np.ndarray
    is_object_ignored: np.ndarray
    scores: np.ndarray


def area_ranges(medium: int, large: int) -> list[list[float]]:
    """Smallest and largest area, in pixels, of all objects, the small, the medium and the large ones.

    Args:
        medium, large: sides of the squares from which on objects are medium and large.
    """
    return [[0, 1e5**2], [0, medium**2], [medium**2, large**2], [large**2, 1e5**2]]


class MaskAP(Metric):
    """AP and AR of instance masks over all images: the mean over IoU thresholds 0.5, 0.55, …, 0.95, and over classes.

    At most 100 detections count for a class of an image, the best-scored. Detections on crowds and on objects outside a
    size range are neither right nor wrong, as in COCO.

    Args:
        categories: the classes in COCO's form; those with a false `isthing` are left out.
        engine: "pycocotools" or "faster_coco_eval"; None: the latter where it is installed. Their figures are equal.

    Raises:
        ImportError: if neither engine is installed.
        ValueError: if two categories have one id, or an engine does not exist.
    """

    area_ranges = area_ranges(32, 96)
    _unit = "image"

    def __init__(self, categories: Sequence[Mapping[str, Any]], engine: str | None = None) -> None:
        names = names_of(categories)
        things = {int(category["id"]) for category in categories if is_thing(category)}
        self.names = {category: name for category, name in names.items() if category in things}
        self.others = names.keys() - things
        self.engine = _find_engine(engine)
        self.images: dict[Hashable, dict[int, Outcome]] = {}
        """Image -> class -> what became of its detections."""

    def update(
        self,
        image_id: Hashable,
        size: tuple[int, int],
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
        self._add(image_id, size, predictions, targets)

    def _add(
        self,
        key: Hashable,
        size: tuple[int, ...],
        predictions: Iterable[Mapping[str, Any]],
        targets: Iterable[Mapping[str, Any]],
    ) -> None:
        if key in self.images:
            raise ValueError(
                f"{self._unit.capitalize()} {key!r} was added before: give every {self._unit} its own id, and every "
                f"process its own {self._unit}s (a loader that repeats some to make shares even must not: "
                "`even_batches=False`)."
            )
        truths: dict[int, list[dict[str, Any]]] = {}
        guesses: dict[int, list[dict[str, Any]]] = {}
        for side, entries, by_class in (("target", targets, truths), ("prediction", predictions, guesses)):
            for number, entry in enumerate(entries, start=1):
                category = self._category_of(entry, side)
                if category is None:
                    continue
                rle, area = self._mask_of(entry, size, is_target=side == "target")
                own = {"id": number, "image_id": 0, "category_id": category, "segmentation": rle, "area": area}
                if side == "target":
                    crowd = int(bool(entry.get("iscrowd", 0)))
                    own |= {"iscrowd": crowd, "ignore": crowd}
                else:
                    own["score"] = _finite(entry["score"])
                by_class.setdefault(category, []).append(own)
        self.images[key] = _ENGINES[self.engine].match(truths, guesses, self.area_ranges)

    @property
    def _mask_api(self) -> Any:
        return _ENGINES[self.engine].mask_api()

    def _mask_of(
        self, entry: Mapping[str, Any], size: tuple[int, ...], is_target: bool
    ) -> tuple[Mapping[str, Any], float]:
        """The compressed run-length encoding of an entry's mask, and the area by which it is small or large."""
        rle = to_rle(entry["segmentation"], (size[0], size[1]))
        pixels = int(self._mask_api.area(rle))
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
        """`ap`, `ap50`, `ap75`, `ap_small`, …, `ar1`, `ar10`, `ar100`, `ar_small`, … in [0, 1], and `per_class`.

        None where there is no object to be found (pycocotools has -1). `per_class` is `{name: {"ap": …, "ap50": …,
        "ap75": …, "ap_small": …, "ap_medium": …, "ap_large": …}}`.
        """
        precision, recall = self._curves()
        result: dict[str, Any] = _precisions(precision)
        result |= {f"ar{most}": _mean(recall[:, :, 0, m]) for m, most in enumerate(MOST)}
        result |= {f"ar_{size}": _mean(recall[:, :, i, 2]) for size, i in SIZES.items()}
        result["per_class"] = {name: _precisions(precision[:, :, [k]]) for k, name in enumerate(self.names.values())}
        return result

    def _category_of(self, entry: Mapping[str, Any], side: str) -> int | None:
        """The class of an entry, None if it is no thing."""
        category = int(entry["category_id"] if "category_id" in entry else entry["label_id"])
        if category in self.others:
            return None
        if category not in self.names:
            raise ValueError(f"Category {category} of a {side} is not among the given categories.")
        return category

    def _curves(self) -> tuple[np.ndarray, np.ndarray]:
        """Precision (T, R, K, A, M) at each recall and recall (T, K, A, M); -1 where there is no object.

        T thresholds of IoU, R recalls, K classes, A size ranges, M numbers of detections: as `COCOeval.accumulate`.
        """
        # Of different types, ids have no order of their own.
        image_ids: list[Any] = sorted(self.images, key=lambda image_id: (type(image_id).__name__, image_id))
        precision = np.full((NUM_IOUS, len(RECALLS), len(self.names), 1 + len(SIZES), len(MOST)), -1.0)
        recall = np.full((NUM_IOUS, *precision.shape[2:]), -1.0)
        for k, category in enumerate(self.names):
            images = [self.images[image_id] for image_id in image_ids]
            outcomes = [image[category] for image in images if category in image]
            for size in range(precision.shape[3] if outcomes else 0):
                num_objects = sum(int((~outcome.is_object_ignored[size]).sum()) for outcome in outcomes)
                for m, most in enumerate(MOST if num_objects else ()):
                    curves = _precision_at_recalls(outcomes, size, most, num_objects)
                    precision[:, :, k, size, m], recall[:, k, size, m] = curves
        return precision, recall


def is_thing(category: Mapping[str, Any]) -> bool:
    """Whether instances of a class are told apart: not stuff; where it is not known, they are."""
    known = category.get("isthing")
    return known is None or bool(known)


def to_rle(segmentation: Any, size: tuple[int, int]) -> Mapping[str, Any]:
    """A mask in any of COCO's forms, or an (H, W) array or tensor, as compressed run-length encoding.

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


def _mean(values: np.ndarray) -> float | None:
    known = values[values > -1]
    return float(known.mean()) if known.size else None


def _precisions(precision: np.ndarray) -> dict[str, float | None]:
    """Of (T, R, K, A, M): over all sizes, at two thresholds, and of each size; at most 100 detections."""
    figures = {"ap": _mean(precision[..., 0, 2]), "ap50": _mean(precision[0, ..., 0, 2])}
    figures["ap75"] = _mean(precision[5, ..., 0, 2])
    return figures | {f"ap_{size}": _mean(precision[..., i, 2]) for size, i in SIZES.items()}


def _precision_at_recalls(
    outcomes: Sequence[Outcome], size: int, most: int, num_objects: int
) -> tuple[np.ndarray, np.ndarray]:
    """Of one class and size range: precision (T, R), made to fall with recall, and the largest recall (T,)."""
    order = np.argsort(-np.concatenate([outcome.scores[:most] for outcome in outcomes]), kind="mergesort")
    is_matched, is_ignored = (
        np.concatenate([getattr(outcome, name)[size, :, :most] for outcome in outcomes], axis=1)[:, order]  # (T, D)
        for name in ("is_matched", "is_ignored")
    )
    result = np.zeros((NUM_IOUS, len(RECALLS)))
    if not len(order):
        return result, np.zeros(NUM_IOUS)
    tp = np.cumsum(is_matched & ~is_ignored, axis=1).astype(np.float64)
    fp = np.cumsum(~is_matched & ~is_ignored, axis=1).astype(np.float64)
    recall = tp / num_objects
    precision = tp / (fp + tp + np.spacing(1))  # the order of the sum, and the spacing, are pycocotools'
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    for t in range(NUM_IOUS):
        place = np.searchsorted(recall[t], RECALLS, side="left")
        reached = place < len(order)
        result[t, reached] = precision[t, place[reached]]
    return result, recall[:, -1]


# --- engines: the detections of one image and class, matched to its objects ---


class _Pycocotools:
    """pycocotools' matching of one image, without the files it is made for."""

    @staticmethod
    def mask_api() -> Any:
        from pycocotools import mask

        return mask

    @staticmethod
    def match(
        truths: Mapping[int, list[Any]], guesses: Mapping[int, list[Any]], areas: list[list[float]]
    ) -> dict[int, Outcome]:
        from pycocotools.cocoeval import COCOeval

        evaluator = COCOeval(iouType="segm")
        evaluator.params.imgIds, evaluator.params.catIds = [0], sorted(truths.keys() | guesses.keys())
        outcomes = {}
        for category in evaluator.params.catIds:
            evaluator._gts[0, category], evaluator._dts[0, category] = (
                truths.get(category, []),
                guesses.get(category, []),
            )
            evaluator.ious[0, category] = evaluator.computeIoU(0, category)
            of_sizes = [evaluator.evaluateImg(0, category, area, MOST[-1]) for area in areas]
            outcomes[category] = Outcome(
                np.stack([entry["dtMatches"] for entry in of_sizes]) > 0,
                np.stack([entry["dtIgnore"] for entry in of_sizes]).astype(bool),
                np.stack([entry["gtIgnore"] for entry in of_sizes]).astype(bool),
                np.array(of_sizes[0]["dtScores"], dtype=np.float64),
            )
        return outcomes


class _FasterCocoEval:
    """The same in faster-coco-eval's C++."""

    @staticmethod
    def mask_api() -> Any:
        from faster_coco_eval import mask

        return mask

    @staticmethod
    def match(
        truths: Mapping[int, list[Any]], guesses: Mapping[int, list[Any]], areas: list[list[float]]
    ) -> dict[int, Outcome]:
        from faster_coco_eval import COCOeval_faster
        from faster_coco_eval.core import faster_eval_api

        evaluator = COCOeval_faster(iouType="segm")
        params = evaluator.params
        categories = sorted(truths.keys() | guesses.keys())
        for dataset, by_class in ((evaluator.gt_dataset, truths), (evaluator.dt_dataset, guesses)):
            for category, entries in by_class.items():
                for entry in entries:
                    dataset.append(0, category, {**entry, "rle": entry["segmentation"]})
        ious = [[evaluator.computeIoU(0, category) for category in categories]]
        datasets = evaluator.gt_dataset, evaluator.dt_dataset
        found = faster_eval_api._C.COCOevalEvaluateImages(
            areas, MOST[-1], params.iouThrs, ious, *datasets, [0], categories, True
        )
        # What an `ImageEvaluation` holds can be read as what it is pickled as: matches of detections (T * D) and of
        # objects, scores (D), ignored objects (G), ignored detections (T * D), and more.
        states = [entry.__getstate__() for entry in found]
        num_sizes = 1 + len(SIZES)
        outcomes = {}
        for k, category in enumerate(categories):
            of_sizes = states[k * num_sizes : (k + 1) * num_sizes]
            shape = (num_sizes, NUM_IOUS, len(of_sizes[0][2]))
            outcomes[category] = Outcome(
                np.array([state[0] for state in of_sizes], dtype=np.int64).reshape(shape) > 0,
                np.array([state[4] for state in of_sizes], dtype=bool).reshape(shape),
                np.array([state[3] for state in of_sizes], dtype=bool),
                np.array(of_sizes[0][2], dtype=np.float64),
            )
        return outcomes


_ENGINES: dict[str, Any] = {"pycocotools": _Pycocotools, "faster_coco_eval": _FasterCocoEval}


def _find_engine(name: str | None) -> str:
    if name is not None and name not in _ENGINES:
        raise ValueError(f"engine {name!r} does not exist; choose one of {', '.join(_ENGINES)}")
    candidates: Collection[str] = ENGINES if name is None else (name,)
    for candidate in candidates:
        if candidate in _ENGINES and importlib.util.find_spec(candidate) is not None:
            return candidate
    raise ImportError(f"Mask AP needs {' or '.join(candidates)}: pip install pycocotools")
