"""Video AP, against pycocotools on the frames of each tube stacked into one tall mask, and against its definition."""

import contextlib
import io
import pickle

import numpy as np
import pytest

from m2f_hf.data import MovingShapesDataset, tube_masks
from m2f_hf.metrics import VideoAP, merged, module_path
from m2f_hf.metrics.video_ap import tubes
from m2f_hf.processing.rle import encode_rle


pytest.importorskip("pycocotools", reason="pycocotools is not installed")

CATEGORIES = [
    {"id": 0, "name": "cat", "isthing": 1},
    {"id": 1, "name": "sky", "isthing": 0},
    {"id": 2, "name": "dog", "isthing": None},
    {"id": 3, "name": "unicorn", "isthing": 1},
]
STATS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
STATS += ("ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large")
AREAS = [[0, 1e10], [0, 128**2], [128**2, 256**2], [256**2, 1e10]]


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


def mean_area(tube: np.ndarray) -> float:
    areas = tube.sum((1, 2))
    return float(areas[areas > 0].mean()) if areas.any() else 0.0


def by_pycocotools(videos: dict[int, tuple]) -> np.ndarray:
    from pycocotools import mask as mask_api
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    content = {"images": [], "annotations": [], "categories": [c for c in CATEGORIES if c["isthing"] != 0]}
    results, areas = [], []
    for video_id, (size, predictions, targets) in videos.items():
        content["images"].append({"id": video_id, "height": size[0] * size[1], "width": size[2]})
        for target in targets:
            rle = mask_api.encode(np.asfortranarray(target["segmentations"].reshape(-1, size[2])))
            own = {"id": len(content["annotations"]) + 1, "image_id": video_id, "segmentation": rle}
            own |= {"category_id": target["category_id"], "iscrowd": target["iscrowd"]}
            content["annotations"].append({**own, "area": mean_area(target["segmentations"])})
        for guess in predictions:
            rle = mask_api.encode(np.asfortranarray(guess["segmentations"].reshape(-1, size[2])))
            own = {"image_id": video_id, "category_id": guess["label_id"], "score": guess["score"]}
            results.append({**own, "segmentation": rle})
            areas.append(mean_area(guess["segmentations"]))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = content
        truth.createIndex()
        found = truth.loadRes(results)
        for number, area in enumerate(areas, start=1):
            found.anns[number]["area"] = area
        evaluator = COCOeval(truth, found, "segm")
        evaluator.params.areaRng = AREAS
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator.stats


def evaluated(videos: dict[int, tuple]) -> VideoAP:
    metric = VideoAP(CATEGORIES)
    for video_id, (size, predictions, targets) in videos.items():
        metric.update(video_id, size, predictions, targets)
    return metric


@pytest.fixture(scope="module")
def videos() -> dict[int, tuple]:
    rng = np.random.default_rng(0)
    return {int(video_id): random_video(rng) for video_id in rng.permutation(25)}


@pytest.fixture(scope="module")
def stats(videos) -> np.ndarray:
    return by_pycocotools(videos)


def test_equals_pycocotools_on_stacked_frames_to_the_last_digit(videos, stats):
    assert np.all((stats > 0.02) & (stats < 0.98)), "every figure is put to the test"
    result = evaluated(videos).compute()
    assert [result[name] for name in STATS] == stats.tolist()
    assert result["per_class"]["unicorn"]["ap"] is None


def test_shares_of_processes_and_their_order_change_nothing(videos, stats):
    parts = [evaluated(dict(share)) for share in (list(videos.items())[7:], list(videos.items())[:7], [])]
    result = merged([pickle.loads(pickle.dumps(part)) for part in parts]).compute()
    assert [result[name] for name in STATS] == stats.tolist()


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
    torch = pytest.importorskip("torch")

    def uncompressed(mask: np.ndarray) -> dict:
        ends = np.flatnonzero(np.diff(mask.T.ravel(), prepend=False))
        return {"size": list(mask.shape), "counts": np.diff(ends, prepend=0, append=mask.size).tolist()}

    forms = [
        lambda tube: [encode_rle(mask) if mask.any() else None for mask in tube],
        lambda tube: [uncompressed(mask) for mask in tube],
        torch.from_numpy,
        list,
    ]
    few = dict(list(videos.items())[:5])
    expected = evaluated(few).compute()
    assert 0 < expected["ap"] < 1
    for form in forms:
        changed = {
            video_id: (size, *([{**e, "segmentations": form(e["segmentations"])} for e in side] for side in sides))
            for video_id, (size, *sides) in few.items()
        }
        assert evaluated(changed).compute() == expected


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


def test_bad_input_is_named():
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
