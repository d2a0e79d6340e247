"""Mask average precision as COCO defines it (Lin et al., arXiv 1405.0312; https://cocodataset.org/#detection-eval).

Each image's detections are matched to its objects when it is added, and only the outcome is kept: a score and, per size
range and IoU threshold, two bits for each detection. Matching and averaging are pycocotools' own code, or that of
faster-coco-eval where it is installed.
"""

import copy
import importlib.util
import io
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from typing import Any

import numpy as np

from ..data.masks import decode_segmentation
from ..post_processing import encode_rle
from .base import Metric, names_of


ENGINES = ("faster_coco_eval", "pycocotools")
SIZES = {"small": 1, "medium": 2, "large": 3}
"""Objects below 32 x 32 pixels, below 96 x 96, and above: positions among COCO's four ranges, the first being all."""


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

    def __init__(self, categories: Sequence[Mapping[str, Any]], engine: str | None = None) -> None:
        names = names_of(categories)
        things = {int(category["id"]) for category in categories if is_thing(category)}
        self.names = {category: name for category, name in names.items() if category in things}
        self.others = names.keys() - things
        self.engine = _find_engine(engine)
        self.images: dict[Hashable, dict[int, Any]] = {}
        """Image -> class -> what its detections were matched to, in the engine's form."""

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
        if image_id in self.images:
            raise ValueError(
                f"Image {image_id!r} was added before: give every image its own id, and every process its own images "
                "(a loader that repeats some to make shares even must not: `even_batches=False`)."
            )
        mask_api = _ENGINES[self.engine].mask_api()
        truths: dict[int, list[dict[str, Any]]] = {}
        guesses: dict[int, list[dict[str, Any]]] = {}
        for side, entries, by_class in (("target", targets, truths), ("prediction", predictions, guesses)):
            for number, entry in enumerate(entries, start=1):
                category = self._category_of(entry, side)
                if category is None:
                    continue
                rle = to_rle(entry["segmentation"], size)
                pixels = int(mask_api.area(rle))
                own = {"id": number, "image_id": 0, "category_id": category, "segmentation": rle, "area": pixels}
                if side == "target":
                    crowd = int(bool(entry.get("iscrowd", 0)))
                    own |= {"area": entry.get("area", pixels), "iscrowd": crowd, "ignore": crowd}
                else:
                    own["score"] = _finite(entry["score"])
                by_class.setdefault(category, []).append(own)
        self.images[image_id] = _ENGINES[self.engine].match(truths, guesses)

    def merge(self, other: "MaskAP") -> None:
        twice = self.images.keys() & other.images.keys()
        if twice:
            raise ValueError(
                f"Images {sorted(map(str, twice))[:5]} were evaluated by more than one process: give every image to "
                "one (`even_batches=False` for a loader that repeats some to make shares even)."
            )
        self.images |= other.images

    def compute(self) -> dict[str, Any]:
        """`ap`, `ap50`, `ap75`, `ap_small`, …, `ar1`, `ar10`, `ar100`, `ar_small`, … in [0, 1], and `per_class`.

        None where there is no object to be found (pycocotools has -1). `per_class` is `{name: {"ap": …, "ap50": …,
        "ap75": …, "ap_small": …, "ap_medium": …, "ap_large": …}}`.
        """
        precision, recall = self._curves()
        result: dict[str, Any] = _precisions(precision)
        result |= {f"ar{most}": _mean(recall[:, :, 0, i]) for i, most in enumerate((1, 10, 100))}
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
        """Precision (T, R, K, A, M) and recall (T, K, A, M), -1 where there is no object: `COCOeval.accumulate`'s."""
        if not self.images or not self.names:
            shape = (10, 101, len(self.names), 4, 3)
            return np.full(shape, -1.0), np.full((shape[0], *shape[2:]), -1.0)
        # Of different types, ids have no order of their own.
        image_ids: list[Any] = sorted(self.images, key=lambda image_id: (type(image_id).__name__, image_id))
        return _ENGINES[self.engine].accumulate([self.images[image_id] for image_id in image_ids], list(self.names))


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


# --- engines ---


class _Pycocotools:
    """pycocotools' matching of one image and averaging over all, without the files these are made for."""

    @staticmethod
    def mask_api() -> Any:
        from pycocotools import mask

        return mask

    @staticmethod
    def match(truths: Mapping[int, list[Any]], guesses: Mapping[int, list[Any]]) -> dict[int, Any]:
        """Per class: matched and ignored (A, T, D), targets ignored (A, G) and scores (D,), by falling score."""
        from pycocotools.cocoeval import COCOeval

        evaluator = COCOeval(iouType="segm")
        evaluator.params.imgIds, evaluator.params.catIds = [0], sorted(truths.keys() | guesses.keys())
        outcome = {}
        for category in evaluator.params.catIds:
            evaluator._gts[0, category], evaluator._dts[0, category] = (
                truths.get(category, []),
                guesses.get(category, []),
            )
            evaluator.ious[0, category] = evaluator.computeIoU(0, category)
            most = evaluator.params.maxDets[-1]
            of_sizes = [evaluator.evaluateImg(0, category, area, most) for area in evaluator.params.areaRng]
            outcome[category] = (
                np.stack([entry["dtMatches"] for entry in of_sizes]) > 0,
                np.stack([entry["dtIgnore"] for entry in of_sizes]).astype(bool),
                np.stack([entry["gtIgnore"] for entry in of_sizes]).astype(bool),
                np.array(of_sizes[0]["dtScores"], dtype=np.float64),
            )
        return outcome

    @staticmethod
    def accumulate(images: Sequence[Mapping[int, Any]], categories: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        from pycocotools.cocoeval import COCOeval

        def entry(outcome: Any, size: int) -> dict[str, Any] | None:
            if outcome is None:
                return None
            matched, ignored, targets_ignored, scores = outcome
            return {
                "dtMatches": matched[size],
                "dtIgnore": ignored[size],
                "gtIgnore": targets_ignored[size],
                "dtScores": scores,
            }

        evaluator = COCOeval(iouType="segm")
        params = evaluator.params
        params.imgIds, params.catIds = list(range(len(images))), list(categories)
        evaluator.evalImgs = [
            entry(image.get(category), size)
            for category in categories
            for size in range(len(params.areaRng))
            for image in images
        ]
        evaluator._paramsEval = copy.deepcopy(params)
        with redirect_stdout(io.StringIO()):
            evaluator.accumulate()
        return evaluator.eval["precision"], evaluator.eval["recall"]


class _FasterCocoEval:
    """The same in faster-coco-eval's C++, whose outcomes of an image can be sent to other processes too."""

    @staticmethod
    def mask_api() -> Any:
        from faster_coco_eval import mask

        return mask

    @staticmethod
    def match(truths: Mapping[int, list[Any]], guesses: Mapping[int, list[Any]]) -> dict[int, list[Any]]:
        """Per class: one `ImageEvaluation` for each size range."""
        from faster_coco_eval import COCOeval_faster
        from faster_coco_eval.core import faster_eval_api

        evaluator = COCOeval_faster(iouType="segm")
        params = evaluator.params
        categories = sorted(truths.keys() | guesses.keys())
        for dataset, by_class in ((evaluator.gt_dataset, truths), (evaluator.dt_dataset, guesses)):
            for category, entries in by_class.items():
                for entry in entries:
                    dataset.append(0, category, {**entry, "rle": entry["segmentation"]})
        outcomes = faster_eval_api._C.COCOevalEvaluateImages(
            params.areaRng,
            params.maxDets[-1],
            params.iouThrs,
            [[evaluator.computeIoU(0, category) for category in categories]],
            evaluator.gt_dataset,
            evaluator.dt_dataset,
            [0],
            categories,
            True,
        )
        num_sizes = len(params.areaRng)
        return {category: outcomes[k * num_sizes : (k + 1) * num_sizes] for k, category in enumerate(categories)}

    @staticmethod
    def accumulate(images: Sequence[Mapping[int, Any]], categories: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        from faster_coco_eval import COCOeval_faster
        from faster_coco_eval.core import faster_eval_api

        params = COCOeval_faster(iouType="segm").params
        params.imgIds, params.catIds = list(range(len(images))), list(categories)
        nothing = [faster_eval_api._C.ImageEvaluation()] * len(params.areaRng)
        curves = faster_eval_api._C.COCOevalAccumulate(
            params,
            [
                image.get(category, nothing)[size]
                for category in categories
                for size in range(len(params.areaRng))
                for image in images
            ],
        )
        return np.asarray(curves["precision"]), np.asarray(curves["recall"])


_ENGINES: dict[str, Any] = {"pycocotools": _Pycocotools, "faster_coco_eval": _FasterCocoEval}


def _find_engine(name: str | None) -> str:
    if name is not None and name not in _ENGINES:
        raise ValueError(f"engine {name!r} does not exist; choose one of {', '.join(_ENGINES)}")
    candidates: Collection[str] = ENGINES if name is None else (name,)
    for candidate in candidates:
        if candidate in _ENGINES and importlib.util.find_spec(candidate) is not None:
            return candidate
    raise ImportError(f"Mask AP needs {' or '.join(candidates)}: pip install pycocotools")
