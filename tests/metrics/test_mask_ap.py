"""Mask AP, against pycocotools' own way from two files to its figures."""

import contextlib
import io
import pickle
import sys

import numpy as np
import pytest

from m2f_hf.metrics import MaskAP, merged
from m2f_hf.metrics import mask_ap as module


pytest.importorskip("pycocotools", reason="pycocotools is not installed")

CATEGORIES = [
    {"id": 0, "name": "cat", "isthing": 1},
    {"id": 1, "name": "sky", "isthing": 0},
    {"id": 2, "name": "dog", "isthing": None},
    {"id": 3, "name": "unicorn", "isthing": 1},
]
STATS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
STATS += ("ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large")


def disc(size: tuple[int, int], center, radius: float) -> np.ndarray:
    rows, columns = np.ogrid[: size[0], : size[1]]
    return (rows - center[0]) ** 2 + (columns - center[1]) ** 2 <= radius**2


def random_image(rng: np.random.Generator, most: int = 12) -> tuple[tuple[int, int], list[dict], list[dict]]:
    """Overlapping discs of all size ranges, a few of them crowds; detections near them, or of nothing, with ties."""
    size = (int(rng.integers(150, 260)), int(rng.integers(150, 260)))
    targets, predictions = [], []
    for _ in range(int(rng.integers(0, most))):
        center, radius = rng.uniform(0, 150, 2), rng.choice([8, 14, 25, 45, 60])
        mask = disc(size, center, radius)
        category = int(rng.choice([0, 2]))
        targets.append({"category_id": category, "segmentation": mask, "iscrowd": int(rng.random() < 0.15)})
        if rng.random() < 0.3:
            targets[-1]["area"] = float(mask.sum()) * 0.8  # of a polygon, say
        for _ in range(int(rng.integers(0, 4))):
            guess = disc(size, center + rng.normal(0, radius / 6, 2), radius * rng.uniform(0.8, 1.2))
            label = category if rng.random() < 0.8 else int(rng.choice([0, 2]))
            score = float(np.round(rng.random(), 1))
            predictions.append({"label_id": label, "segmentation": guess, "score": score})
    return size, predictions, targets


def by_pycocotools(images: dict[int, tuple]) -> tuple[np.ndarray, np.ndarray]:
    """The twelve figures, and the precision array, of `COCOeval` on the same data in COCO's files."""
    from pycocotools import mask as mask_api
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    content = {"images": [], "annotations": [], "categories": [c for c in CATEGORIES if c["isthing"] != 0]}
    results = []
    for image_id, (size, predictions, targets) in images.items():
        content["images"].append({"id": image_id, "height": size[0], "width": size[1]})
        for target in targets:
            rle = mask_api.encode(np.asfortranarray(target["segmentation"]))
            own = {"id": len(content["annotations"]) + 1, "image_id": image_id, "segmentation": rle}
            area = target.get("area", int(mask_api.area(rle)))
            content["annotations"].append({**target, **own, "area": area})
        for guess in predictions:
            rle = mask_api.encode(np.asfortranarray(guess["segmentation"]))
            results.append({"image_id": image_id, "category_id": guess["label_id"], "score": guess["score"]})
            results[-1]["segmentation"] = rle
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = content
        truth.createIndex()
        evaluator = COCOeval(truth, truth.loadRes(results), "segm")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator.stats, evaluator.eval["precision"]


def evaluated(images: dict[int, tuple]) -> MaskAP:
    metric = MaskAP(CATEGORIES)
    for image_id, (size, predictions, targets) in images.items():
        metric.update(image_id, size, predictions, targets)
    return metric


@pytest.fixture(scope="module")
def images() -> dict[int, tuple]:
    rng = np.random.default_rng(0)
    return {int(image_id): random_image(rng) for image_id in rng.permutation(40)}


def test_equals_pycocotools_to_the_last_digit(images):
    stats, precision = by_pycocotools(images)
    assert np.all((stats > 0.02) & (stats < 0.98)), "every figure is put to the test"
    metric = evaluated(images)
    result = metric.compute()
    assert [result[name] for name in STATS] == stats.tolist()
    assert result["per_class"]["unicorn"]["ap"] is None
    for k, name in enumerate(("cat", "dog")):
        own = precision[:, :, k]
        assert result["per_class"][name]["ap"] == own[:, :, 0, 2].mean()
        assert result["per_class"][name]["ap75"] == own[5, :, 0, 2].mean()
        assert result["per_class"][name]["ap_small"] == own[:, :, 1, 2].mean()


def test_shares_of_processes_and_their_order_change_nothing(images):
    """Three uneven shares, sent as processes send them; one has nothing."""
    parts = [evaluated(dict(share)) for share in (list(images.items())[7:], list(images.items())[:7], [])]
    sent = [pickle.loads(pickle.dumps(part)) for part in parts]
    assert merged(sent).compute() == evaluated(images).compute()


def test_more_than_a_hundred_detections_of_a_class():
    rng = np.random.default_rng(1)
    images = {7: random_image(rng, most=200), 3: random_image(rng, most=200)}
    assert max(sum(guess["label_id"] == 0 for guess in guesses) for _, guesses, _ in images.values()) > 100
    assert [evaluated(images).compute()[name] for name in STATS] == by_pycocotools(images)[0].tolist()


def test_all_forms_of_a_mask_are_equal():
    """An array, run lengths as numbers or packed, and a polygon of the same pixels."""
    mask = np.zeros((6, 8), bool)
    mask[1:4, 2:6] = True
    forms = [
        mask,
        {"size": [6, 8], "counts": [13, 3, 3, 3, 3, 3, 3, 3, 14]},
        module.encode_rle(mask),
        [[2, 1, 6, 1, 6, 4, 2, 4]],
    ]
    for form in forms:
        metric = MaskAP(CATEGORIES)
        metric.update(
            "a",
            (6, 8),
            [{"category_id": 0, "score": 0.5, "segmentation": form}],
            [{"category_id": 0, "segmentation": mask}],
        )
        assert metric.compute()["ap"] == pytest.approx(1.0)


def test_stuff_does_not_count_and_no_object_gives_none():
    metric = MaskAP(CATEGORIES)
    assert metric.compute()["ap"] is None
    mask = np.ones((4, 4), bool)
    sky = {"category_id": 1, "score": 0.9, "segmentation": mask}
    metric.update(0, (4, 4), [sky], [sky])
    metric.update(1, (4, 4), [{**sky, "category_id": 0}], [])
    result = metric.compute()
    assert {value for name, value in result.items() if name != "per_class"} == {None}
    metric.update(2, (4, 4), [], [{**sky, "category_id": 0}])
    assert metric.compute()["ap"] == 0.0
    assert MaskAP([CATEGORIES[1]]).compute()["per_class"] == {}


def test_memory_does_not_grow_with_pixels():
    sizes = []
    for scale in (1, 8):
        rng = np.random.default_rng(2)
        metric = MaskAP(CATEGORIES)
        for image_id in range(4):
            size, predictions, targets = random_image(rng)
            predictions, targets = (
                [{**e, "segmentation": e["segmentation"].repeat(scale, 0).repeat(scale, 1)} for e in entries]
                for entries in (predictions, targets)
            )
            metric.update(image_id, (size[0] * scale, size[1] * scale), predictions, targets)
        sizes.append(len(pickle.dumps(metric)))
    assert sizes[0] == sizes[1] < 100_000


def test_bad_input_is_named(monkeypatch):
    metric = MaskAP(CATEGORIES)
    mask = np.ones((4, 4), bool)
    good = {"category_id": 0, "score": 0.5, "segmentation": mask}
    metric.update(5, (4, 4), [good], [good])
    for arguments, message in (
        ((5, (4, 4), [], []), "Image 5 was added before"),
        ((6, (4, 5), [good], []), r"mask is \(4, 4\) and its image \(4, 5\)"),
        ((6, (5, 4), [], [{"category_id": 0, "segmentation": module.encode_rle(mask)}]), "resize the one"),
        ((6, (4, 4), [{**good, "category_id": 9}], []), "Category 9 of a prediction"),
        ((6, (4, 4), [{**good, "score": float("nan")}], []), "score nan"),
    ):
        with pytest.raises(ValueError, match=message):
            metric.update(*arguments)
    with pytest.raises(ValueError, match="more than one process"):
        metric.merge(metric)
    monkeypatch.setitem(sys.modules, "pycocotools.cocoeval", None)
    with pytest.raises(ImportError, match="pip install pycocotools"):
        MaskAP(CATEGORIES)
