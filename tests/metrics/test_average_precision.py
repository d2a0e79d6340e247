"""Mask AP and video AP, against pycocotools' own way from two files to its figures, and against their definitions."""

import contextlib
import io
import pickle
import sys

import numpy as np
import pytest
import torch

from m2f_hf.data import MovingShapesDataset, tube_masks
from m2f_hf.metrics import MaskAP, VideoAP, merged, module_path
from m2f_hf.metrics.video_ap import tubes
from m2f_hf.processing.rle import encode_rle, run_lengths


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
    return moving_disc((1, *size), center, (0, 0), radius)[0]


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


def moving_disc(size: tuple[int, int, int], center, velocity, radius: float) -> np.ndarray:
    frames, rows, columns = np.ogrid[: size[0], : size[1], : size[2]]
    return (rows - center[0] - frames * velocity[0]) ** 2 + (
        columns - center[1] - frames * velocity[1]
    ) ** 2 <= radius**2


def random_video(rng: np.random.Generator) -> tuple[tuple[int, int, int], list[dict], list[dict]]:
    """Discs of all size ranges on their way, out of sight in some frames; detections near them, with ties."""
    size = (int(rng.integers(1, 5)), int(rng.integers(200, 330)), int(rng.integers(200, 330)))
    targets, predictions = [], []
    for _ in range(int(rng.integers(0, 7))):
        center, velocity, radius = rng.uniform(0, 250, 2), rng.normal(0, 30, 2), rng.choice([20, 40, 90, 120, 200])
        tube = moving_disc(size, center, velocity, radius)
        tube[rng.random(size[0]) < 0.2] = False
        category = int(rng.choice([0, 2]))
        targets.append({"category_id": category, "segmentations": tube, "iscrowd": int(rng.random() < 0.15)})
        for _ in range(int(rng.integers(0, 4))):
            guess = moving_disc(size, center + rng.normal(0, radius / 8, 2), velocity, radius * rng.uniform(0.85, 1.15))
            guess[rng.random(size[0]) < 0.1] = False
            label = category if rng.random() < 0.8 else int(rng.choice([0, 2]))
            predictions.append({"label_id": label, "segmentations": guess, "score": float(np.round(rng.random(), 1))})
    return size, predictions, targets


def by_pycocotools(images: dict[int, tuple], ranges: list | None = None) -> tuple[np.ndarray, np.ndarray]:
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
            own = {"image_id": image_id, "category_id": guess["label_id"], "score": guess["score"]}
            results.append({**own, "segmentation": rle})
    areas = [guess.get("area") for _, predictions, _ in images.values() for guess in predictions]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = content
        truth.createIndex()
        found = truth.loadRes(results)
        for number, area in enumerate(areas, start=1):
            found.anns[number]["area"] = found.anns[number]["area"] if area is None else area
        evaluator = COCOeval(truth, found, "segm")
        evaluator.params.areaRng = ranges or evaluator.params.areaRng
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator.stats, evaluator.eval["precision"]


def evaluated(images: dict[int, tuple], measure: type[MaskAP] = MaskAP) -> MaskAP:
    metric = measure(CATEGORIES)
    for image_id, (size, predictions, targets) in images.items():
        metric.update(image_id, size, predictions, targets)
    return metric


# --- images ---


@pytest.fixture(scope="module")
def images() -> dict[int, tuple]:
    rng = np.random.default_rng(0)
    return {int(image_id): random_image(rng) for image_id in rng.permutation(40)}


@pytest.fixture(scope="module")
def videos() -> dict[int, tuple]:
    rng = np.random.default_rng(0)
    return {int(video_id): random_video(rng) for video_id in rng.permutation(25)}


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


@pytest.mark.parametrize("measure", [MaskAP, VideoAP])
def test_shares_of_processes_and_their_order_change_nothing(images, videos, measure):
    """Three uneven shares, sent as processes send them; one has nothing."""
    seen = list((images if measure is MaskAP else videos).items())
    parts = [evaluated(dict(share), measure) for share in (seen[7:], seen[:7], [])]
    sent = [pickle.loads(pickle.dumps(part)) for part in parts]
    assert merged(sent).compute() == evaluated(dict(seen), measure).compute()


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
        encode_rle(mask),
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
        ((6, (5, 4), [], [{"category_id": 0, "segmentation": encode_rle(mask)}]), "resize the one"),
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


# --- videos ---


def stacked(videos: dict[int, tuple]) -> dict[int, tuple]:
    """Videos as images: the frames of each tube in one tall mask, with its mean area where it is seen."""

    def stack(entry: dict) -> dict:
        tube = entry["segmentations"]
        areas = tube.sum((1, 2))
        mean = float(areas[areas > 0].mean()) if areas.any() else 0.0
        rest = {key: value for key, value in entry.items() if key != "segmentations"}
        return {**rest, "segmentation": tube.reshape(-1, tube.shape[2]), "area": mean}

    return {
        video_id: ((size[0] * size[1], size[2]), *([stack(entry) for entry in side] for side in sides))
        for video_id, (size, *sides) in videos.items()
    }


def test_video_ap_equals_pycocotools_on_stacked_frames(videos):
    stats, _ = by_pycocotools(stacked(videos), [[0, 1e10], [0, 128**2], [128**2, 256**2], [256**2, 1e10]])
    assert np.all((stats > 0.02) & (stats < 0.98)), "every figure is put to the test"
    result = evaluated(videos, VideoAP).compute()
    assert [result[name] for name in STATS] == stats.tolist()
    assert result["per_class"]["unicorn"]["ap"] is None


def test_a_tube_is_matched_as_a_whole():
    """8 of 16 pixels are shared, 2 of 6 in one frame and 6 of 10 in the other: one half, where the mean is 0.47."""
    target = np.zeros((2, 4, 4), bool)
    target[0, 0] = target[1, :2] = True
    guess = np.zeros((2, 4, 4), bool)
    guess[0, 0, :2] = guess[0, 1, :2] = guess[1, :2, :3] = guess[1, 2, :2] = True
    for guesses, ap50 in ((guess, 1.0), (np.where([[[True]], [[False]]], target, guess), 1.0), (guess[::-1], 0.0)):
        metric = VideoAP(CATEGORIES)
        found = {"category_id": 0, "score": 0.5, "segmentations": guesses}
        metric.update("a", (2, 4, 4), [found], [{"category_id": 0, "segmentations": target}])
        assert metric.compute()["ap50"] == pytest.approx(ap50)
    assert (target & guess).sum() / (target | guess).sum() == 0.5


def test_all_forms_of_a_tube_are_equal(videos):
    """Run lengths of each frame, compressed or not, with None where there is nothing; tensors; lists of masks."""

    def uncompressed(mask: np.ndarray) -> dict:
        rle = encode_rle(mask)
        return {**rle, "counts": run_lengths(rle["counts"]).tolist()}

    forms = [
        lambda tube: [encode_rle(mask) if mask.any() else None for mask in tube],
        lambda tube: [uncompressed(mask) for mask in tube],
        torch.from_numpy,
        list,
    ]
    few = dict(list(videos.items())[:5])
    expected = evaluated(few, VideoAP).compute()
    assert 0 < expected["ap"] < 1
    for form in forms:
        changed = {
            video_id: (size, *([{**e, "segmentations": form(e["segmentations"])} for e in side] for side in sides))
            for video_id, (size, *sides) in few.items()
        }
        assert evaluated(changed, VideoAP).compute() == expected


def test_size_is_the_mean_area_over_frames_with_a_mask():
    """A disc seen large in one frame of four is large; the annotation's own areas go before those of its mask."""
    tube = np.zeros((4, 300, 300), bool)
    tube[2, :260, :260] = True
    small = {"areas": [None, 100.0, 200.0, 0]}
    for target, size in (({}, "large"), (small, "small"), ({"areas": None}, "large")):
        metric = VideoAP(CATEGORIES)
        own = {"category_id": 0, "segmentations": tube}
        metric.update(0, tube.shape, [{**own, "score": 1.0}], [{**own, **target}])
        result = metric.compute()
        figures = {name: result[f"ap_{name}"] for name in ("small", "medium", "large")}
        assert {name for name, figure in figures.items() if figure is not None} == {size}


def test_bad_videos_are_named():
    metric = VideoAP(CATEGORIES)
    tube = np.ones((3, 4, 4), bool)
    good = {"category_id": 0, "score": 0.5, "segmentations": tube}
    metric.update(5, (3, 4, 4), [good], [good])
    for arguments, message in (
        ((5, (3, 4, 4), [], []), "Video 5 was added before: give every video"),
        ((6, (4, 4, 4), [good], []), "3 masks and its video 4 frames"),
        ((6, (3, 4, 5), [good], []), r"mask is \(4, 4\) and its image \(4, 5\)"),
        ((6, (3, 4, 4), [{**good, "category_id": 9}], []), "Category 9 of a prediction"),
    ):
        with pytest.raises(ValueError, match=message):
            metric.update(*arguments)
    with pytest.raises(ValueError, match=r"Videos .* more than one process"):
        metric.merge(metric)


def test_the_evaluate_module_measures_items_of_a_data_set(load_measure):
    dataset = MovingShapesDataset(3, num_frames=4, image_size=64)
    module = load_measure(module_path("video_ap"), categories=dataset.categories)
    for index in range(3):
        item = dataset[index]
        found = [
            {"label_id": info["category_id"], "score": 0.9, "segmentations": mask}
            for info, mask in zip(item["segments_info"], tube_masks(item), strict=True)
        ]
        module.add(prediction={"segments_info": found}, reference=item)
        listed = {**item, "segments_info": tubes(item)}
        del listed["segmentation_maps"]
        module.add(
            prediction={"segments_info": found[:1]}, reference={**listed, "video_id": f"{item['video_id']} again"}
        )
    result = module.compute()
    assert 0.4 < result["ar100"] < 1 == result["ap_small"] / result["ap"]
