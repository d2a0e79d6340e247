"""Panoptic quality and mean IoU, against their definitions."""

import numpy as np
import pytest
import torch

from m2f_hf.data import CATEGORIES, ShapesDataset
from m2f_hf.metrics import Evaluation, MeanIoU, PanopticQuality, PixelScores, evaluate_model, merged
from m2f_hf.metrics.evaluation import VOID_LABEL, semantic_map
from m2f_hf.processing.image_processor import M2FImageProcessor


TWO_THINGS_ONE_STUFF = [
    {"id": 0, "name": "cat", "isthing": 1},
    {"id": 1, "name": "dog", "isthing": 1},
    {"id": 2, "name": "sky", "isthing": 0},
]


def segments(*entries: tuple) -> list[dict]:
    return [{"id": i, "category_id": category, "iscrowd": crowd} for i, category, crowd in entries]


def quality(predicted, predicted_segments, target, target_segments) -> dict:
    metric = PanopticQuality(TWO_THINGS_ONE_STUFF)
    metric.update(np.array(predicted), predicted_segments, np.array(target), target_segments)
    return metric.compute()


def test_a_case_computed_by_hand():
    """A cat found with IoU 4/5, a dog called a cat, a sky found entirely."""
    target = [[1, 1, 1, 1, 2, 2, 3, 3, 3, 3]]
    predicted = [[5, 5, 5, 5, 5, 6, 7, 7, 7, 7]]
    result = quality(
        predicted, segments((5, 0, 0), (6, 0, 0), (7, 2, 0)), target, segments((1, 0, 0), (2, 1, 0), (3, 2, 0))
    )
    cat, dog, sky = (result["per_class"][name] for name in ("cat", "dog", "sky"))
    assert cat == {"pq": pytest.approx(0.8 / 1.5), "sq": pytest.approx(0.8), "rq": 1 / 1.5, "tp": 1, "fp": 1, "fn": 0}
    assert dog == {"pq": 0.0, "sq": 0.0, "rq": 0.0, "tp": 0, "fp": 0, "fn": 1}
    assert sky == {"pq": 1.0, "sq": 1.0, "rq": 1.0, "tp": 1, "fp": 0, "fn": 0}
    assert result["pq_things"] == pytest.approx(0.8 / 1.5 / 2)
    assert [result[f"{key}_stuff"] for key in ("pq", "sq", "rq")] == [1.0, 1.0, 1.0]
    assert result["pq_all"] == pytest.approx((0.8 / 1.5 + 0 + 1) / 3)


def test_an_overlap_of_exactly_one_half_is_no_match():
    result = quality([[5, 5, 5, 0]], segments((5, 0, 0)), [[1, 1, 0, 0]], segments((1, 0, 0)))
    assert result["per_class"]["cat"]["tp"] == 1  # void does not count to the union: 2 / 2
    result = quality([[5, 5, 5, 5]], segments((5, 0, 0)), [[1, 1, 2, 2]], segments((1, 0, 0), (2, 1, 0)))
    assert result["per_class"]["cat"] == {"pq": 0.0, "sq": 0.0, "rq": 0.0, "tp": 0, "fp": 1, "fn": 1}


def test_predictions_mostly_in_void_or_crowds_are_no_false_positives():
    crowd = segments((1, 0, 1), (2, 1, 0))
    target = [[1, 1, 1, 2, 2, 2, 0, 0]]
    inside = quality([[5, 5, 5, 6, 6, 6, 0, 0]], segments((5, 0, 0), (6, 1, 0)), target, crowd)
    assert inside["per_class"]["cat"]["pq"] is None, "a crowd neither matches nor is missed"
    assert inside["per_class"]["dog"]["pq"] == 1.0
    other_class = quality([[5, 5, 5, 6, 6, 6, 0, 0]], segments((5, 2, 0), (6, 1, 0)), target, crowd)
    assert other_class["per_class"]["sky"]["fp"] == 1
    in_void = quality([[0, 0, 0, 6, 6, 6, 5, 5]], segments((5, 0, 0), (6, 1, 0)), target, crowd)
    assert in_void["per_class"]["cat"]["fp"] == 0
    half_in_void = quality([[0, 0, 0, 6, 6, 5, 5, 0]], segments((5, 0, 0), (6, 1, 0)), target, crowd)
    assert half_in_void["per_class"]["cat"]["fp"] == 1, "exactly half is not more than half"


def random_panoptic(rng: np.random.Generator, side: int = 24) -> tuple[np.ndarray, list[dict]]:
    """Blocks of random segments; id 0 is void, some are crowds."""
    ids = np.kron(rng.integers(0, 7, (6, 6)), np.ones((side // 6, side // 6), dtype=np.int64))
    present = [i for i in np.unique(ids).tolist() if i]
    return ids, segments(*[(i, int(rng.integers(3)), int(rng.random() < 0.15)) for i in present])


def nearly(rng: np.random.Generator, ids: np.ndarray, infos: list[dict]) -> tuple[np.ndarray, list[dict]]:
    """A prediction that follows the target but for some pixels and some classes."""
    predicted = np.where(rng.random(ids.shape) < 0.15, rng.integers(0, 7, ids.shape), ids)
    classes = {info["id"]: info["category_id"] for info in infos}
    present = [i for i in np.unique(predicted).tolist() if i]
    entries = [(i, classes.get(i, 0) if rng.random() < 0.8 else int(rng.integers(3)), 0) for i in present]
    return predicted, segments(*entries)


def quality_by_definition(images: list[tuple]) -> dict[int, list[float]]:
    """IoU sum, TP, FP, FN of each class, from boolean masks of all pairs."""
    totals = {category: [0.0, 0, 0, 0] for category in range(3)}
    for predicted, predicted_infos, target, target_infos in images:
        void = target == 0
        unmatched = {info["id"]: info for info in predicted_infos}
        for truth in target_infos:
            if truth["iscrowd"]:
                continue
            matched = False
            for guess in predicted_infos:
                p, t = (predicted == guess["id"]) & ~void, target == truth["id"]
                iou = (p & t).sum() / (p | t).sum()
                if guess["category_id"] == truth["category_id"] and iou > 0.5:
                    totals[truth["category_id"]][0] += iou
                    totals[truth["category_id"]][1] += 1
                    del unmatched[guess["id"]]
                    matched = True
            totals[truth["category_id"]][3] += not matched
        for guess in unmatched.values():
            mask = predicted == guess["id"]
            excused = void.copy()
            for truth in target_infos:
                if truth["iscrowd"] and truth["category_id"] == guess["category_id"]:
                    excused |= target == truth["id"]
            totals[guess["category_id"]][2] += (mask & excused).sum() <= 0.5 * mask.sum()
    return totals


def test_agrees_with_the_definition_on_random_maps():
    rng = np.random.default_rng(0)
    metric, images = PanopticQuality(TWO_THINGS_ONE_STUFF), []
    for _ in range(60):
        target, target_infos = random_panoptic(rng)
        images.append((*nearly(rng, target, target_infos), target, target_infos))
        metric.update(*images[-1])
    expected = quality_by_definition(images)
    assert all(value >= 10 for totals in expected.values() for value in totals), "every count is exercised"
    assert np.allclose(metric.totals, [expected[category] for category in range(3)])
    for entry, (iou, tp, fp, fn) in zip(metric.compute()["per_class"].values(), expected.values(), strict=True):
        assert entry["sq"] == pytest.approx(iou / tp)
        assert entry["pq"] == pytest.approx(entry["sq"] * entry["rq"]) == pytest.approx(iou / (tp + fp / 2 + fn / 2))


def test_renamed_ids_and_the_order_of_images_change_nothing():
    rng = np.random.default_rng(1)
    images = []
    for _ in range(10):
        target, target_infos = random_panoptic(rng)
        images.append((*nearly(rng, target, target_infos), target, target_infos))
    plain, renamed = PanopticQuality(TWO_THINGS_ONE_STUFF), PanopticQuality(TWO_THINGS_ONE_STUFF)
    for image in images:
        plain.update(*image)
    names = np.concatenate([[0], rng.permutation(2**24 - 1)[:10] + 1])
    for predicted, predicted_infos, target, target_infos in images[::-1]:
        other = [{**info, "id": int(names[info["id"]])} for info in predicted_infos[::-1]]
        renamed.update(names[predicted], other, target, target_infos)
    assert np.allclose(plain.totals, renamed.totals)


def test_totals_of_two_processes_add_up():
    rng = np.random.default_rng(2)
    whole, halves = PanopticQuality(TWO_THINGS_ONE_STUFF), [PanopticQuality(TWO_THINGS_ONE_STUFF) for _ in range(2)]
    for index in range(8):
        target, target_infos = random_panoptic(rng)
        image = (*nearly(rng, target, target_infos), target, target_infos)
        whole.update(*image)
        halves[index % 2].update(*image)
    alone = halves[0].totals.copy()
    result, expected = merged([*halves, PanopticQuality(TWO_THINGS_ONE_STUFF)]).compute(), whole.compute()
    for name, entry in expected.pop("per_class").items():
        assert result["per_class"][name] == pytest.approx(entry)
    assert {name: result[name] for name in expected} == pytest.approx(expected)
    assert np.array_equal(halves[0].totals, alone), "the parts stay as they are"


def test_a_target_predicts_itself_perfectly():
    metric, iou = PanopticQuality(CATEGORIES), MeanIoU(7)
    dataset = ShapesDataset(12, 64)
    for index in range(len(dataset)):
        item = dataset[index]
        metric.update(*[item["segmentation_map"], item["segments_info"]] * 2)
        iou.update(item["segmentation_map"] % 7, item["segmentation_map"] % 7)
    result = metric.compute()
    assert [entry["pq"] for entry in result["per_class"].values()] == [1.0] * 7
    assert result["pq_all"] == result["sq_things"] == result["rq_stuff"] == 1.0
    figures = iou.compute()
    assert figures["miou"] == figures["fwiou"] == figures["macc"] == figures["pixel_accuracy"] == 1.0


def test_nothing_seen_and_nothing_predicted():
    metric = PanopticQuality(TWO_THINGS_ONE_STUFF)
    assert metric.compute()["pq_all"] is None
    metric.update(np.zeros((2, 2), int), [], np.ones((2, 2), int), segments((1, 0, 0)))
    assert metric.compute()["per_class"]["cat"]["fn"] == 1


def test_maps_that_contradict_their_segments_are_refused():
    metric = PanopticQuality(TWO_THINGS_ONE_STUFF)
    ones, one = np.ones((2, 2), int), segments((1, 0, 0))
    for arguments, message in (
        ((ones, [], ones, one), r"ids \[1\] are in the map only"),
        ((ones, one, ones, segments((1, 0, 0), (2, 0, 0))), r"\[2\] in the segments only"),
        ((np.ones((3, 2), int), one, ones, one), "resize the prediction"),
        ((ones, segments((1, 9, 0)), ones, one), "not among"),
        ((-ones, one, ones, one), "negative id -1"),
    ):
        with pytest.raises(ValueError, match=message):
            metric.update(*arguments)
    with pytest.raises(ValueError, match="same id"):
        PanopticQuality([TWO_THINGS_ONE_STUFF[0]] * 2)


def test_mean_iou_by_hand():
    metric = MeanIoU([{"id": i, "name": name} for i, name in enumerate(("sky", "sea", "sun"))])
    metric.update(np.array([[0, 0, 1, 1, 1]]), np.array([[0, 1, 1, 1, 255]]))
    assert metric.compute() == {
        "miou": pytest.approx((1 / 2 + 2 / 3) / 2),
        "fwiou": pytest.approx(1 / 4 * 1 / 2 + 3 / 4 * 2 / 3),
        "macc": pytest.approx((1 + 2 / 3) / 2),
        "pixel_accuracy": 3 / 4,
        "per_class": {
            "sky": {"iou": 1 / 2, "accuracy": 1.0},
            "sea": {"iou": pytest.approx(2 / 3), "accuracy": pytest.approx(2 / 3)},
            "sun": {"iou": None, "accuracy": None},
        },
    }


def test_mean_iou_equals_a_confusion_matrix_by_pixel():
    rng = np.random.default_rng(0)
    metric, halves = MeanIoU(4, ignore_index=9), [MeanIoU(4, ignore_index=9) for _ in range(3)]
    targets = [rng.choice([0, 1, 2, 9], (5, 7)) for _ in range(6)]  # 3 is only ever predicted
    guesses = [np.where(rng.random((5, 7)) < 0.5, rng.integers(-1, 6, (5, 7)), target) for target in targets]
    confusion = np.zeros((4, 5))
    for index, (guess, target) in enumerate(zip(guesses, targets, strict=True)):
        metric.update(guess, target)
        halves[index % 2].update(guess, target)  # the third process sees nothing
        for predicted, true in zip(guess.ravel(), target.ravel(), strict=True):
            if true != 9:
                confusion[true, predicted if 0 <= predicted < 4 else 4] += 1
    assert confusion[:, 4].any() and confusion[:, 3].any()
    right, pixels = np.diagonal(confusion), confusion.sum(1)
    iou = right / (pixels + confusion[:, :4].sum(0) - right)
    result = metric.compute()
    assert [entry["iou"] for entry in result["per_class"].values()] == iou.tolist()
    assert result["miou"] == iou.mean()
    assert result["macc"] == (right[:3] / pixels[:3]).mean()
    assert result["fwiou"] == pytest.approx((pixels[:3] / pixels.sum() * iou[:3]).sum(), rel=1e-15)
    assert result["pixel_accuracy"] == right.sum() / pixels.sum()
    assert merged(halves).compute() == result
    assert MeanIoU(2).compute()["miou"] is None


def test_mean_iou_refuses_labels_out_of_range():
    with pytest.raises(ValueError, match="expected 0 to 2 or 255"):
        MeanIoU(3).update(np.zeros((1, 1), int), np.full((1, 1), 3))
    with pytest.raises(ValueError, match="resize the prediction"):
        MeanIoU(3).update(np.zeros((1, 2), int), np.zeros((1, 1), int))
    with pytest.raises(ValueError, match="renumber"):
        MeanIoU([{"id": 1, "name": "cat"}])


class Oracle(torch.nn.Module):
    """Says of each scene what its target says: one query per segment, sure of its class and its pixels."""

    def __init__(self, items: list[dict], num_classes: int = 7) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.unused = torch.nn.Parameter(torch.zeros(1))
        self.items = items

    def forward(self, pixel_values, pixel_mask):
        assert not self.training
        nothing = self.num_classes
        classes = torch.zeros(len(self.items), 12, nothing + 1)
        classes[..., nothing] = 20.0
        masks = torch.full((len(self.items), 12, 16, 16), -50.0)
        for row, item in enumerate(self.items):
            small = item["segmentation_map"][2::4, 2::4]
            for query, info in enumerate(item["segments_info"]):
                classes[row, query, nothing], classes[row, query, info["category_id"]] = 0.0, 20.0
                masks[row, query][torch.from_numpy(small == info["id"])] = 50.0
        return type("Outputs", (), {"class_queries_logits": classes, "masks_queries_logits": masks})


def test_a_model_that_knows_the_target_scores_high_through_the_processor():
    """What is lost is the masks' stride of 4 alone; the way through post-processing loses no segment or class."""
    dataset = ShapesDataset(4, 64, seed=5)
    items = [dataset[index] for index in range(4)]
    processor = M2FImageProcessor(size={"shortest_edge": 64, "longest_edge": 64}, label_ids_to_fuse=[4, 5, 6])
    inputs = processor([item["image"] for item in items], return_tensors="pt")
    evaluation = Evaluation("panoptic", processor, CATEGORIES, ["pq", "miou"])
    model = Oracle(items).train()
    evaluate_model(model, [(inputs, items)], evaluation.update, show_progress=False)
    assert model.training
    result = evaluation.compute()
    assert result["miou"] > 0.7
    assert result["rq_stuff"] == 1.0
    assert result["sq_all"] > 0.75
    doubled = evaluation.compute(lambda parts: 2 * parts)  # as if another process had seen the same
    assert doubled["pq_all"] == pytest.approx(result["pq_all"])


def test_three_hundred_classes_do_not_collide_with_void():
    """Class 255 and those above it are counted as what they are; a pixel of no segment counts nowhere."""
    categories = [{"id": i, "name": str(i), "isthing": 0} for i in range(300)]
    segment_ids = np.repeat(np.arange(1, 5, dtype=np.int32), 16)[None].repeat(64, axis=0)  # four strips of 16 columns
    infos = segments((1, 255, 0), (2, 256, 0), (3, 299, 0), (4, 7, 0))
    item = {"segmentation_map": segment_ids, "segments_info": infos}
    expected = np.array([255, 256, 299, 7])[segment_ids - 1]
    assert np.array_equal(semantic_map(segment_ids, infos), expected)
    assert np.array_equal(semantic_map(segment_ids, infos[:3]) == VOID_LABEL, segment_ids == 4)
    assert VOID_LABEL not in range(300)

    evaluation = Evaluation("semantic", M2FImageProcessor(label_ids_to_fuse=[]), categories)
    pixels = torch.zeros(1, 3, 64, 64)
    batch = {"pixel_values": pixels, "pixel_mask": torch.ones(1, 64, 64)}
    evaluate_model(Oracle([item], num_classes=300), [(batch, [item])], evaluation.update, show_progress=False)
    per_class = evaluation.compute()["per_class"]
    assert {name for name, entry in per_class.items() if entry["iou"] is not None} == {"7", "255", "256", "299"}
    assert min(per_class[name]["iou"] for name in ("7", "255", "256", "299")) > 0.8


# --- pixel scores ---


def test_pixel_scores_by_hand():
    metric = PixelScores()
    target = np.array([[True, True, True, False, False]])
    metric.update(np.array([[0.9, 0.5, 0.2, 0.6, 0.0]]), target)
    result = metric.compute()
    assert result["iou"] == 2 / 4
    assert result["dice"] == 4 / 6
    assert result["precision"] == result["recall"] == 2 / 3
    assert result["mae"] == pytest.approx((0.1 + 0.5 + 0.8 + 0.6) / 5)
    assert result["mse"] == pytest.approx((0.01 + 0.25 + 0.64 + 0.36) / 5)
    assert all(result[f"mean_{name}"] == result[name] for name in ("iou", "dice", "precision", "recall", "mae", "mse"))


def test_pixel_scores_over_pixels_and_over_images():
    """An image four times as large counts four times over pixels, once over images; an empty one has no IoU."""
    metric, halves = PixelScores(), [PixelScores(), PixelScores(), PixelScores()]
    right, wrong, empty = np.ones((4, 4), bool), np.zeros((2, 2), bool), np.zeros((2, 2), bool)
    ignored = np.array([[True, False], [True, False]])
    for index, arguments in enumerate(((right, right), (wrong, ~wrong), (empty, empty), (~wrong, ignored, ignored))):
        metric.update(*arguments)
        halves[index % 2].update(*arguments)
    result = metric.compute()
    assert result["iou"] == 16 / (16 + 4 + 2)
    assert result["mean_iou"] == (1 + 0 + 0) / 3
    assert result["recall"] == 16 / 20
    assert result["precision"] == 16 / 18
    assert result["mean_mae"] == (0 + 1 + 0 + 1) / 4
    assert merged(halves).compute() == result
    assert set(PixelScores().compute().values()) == {None}


def test_pixel_scores_refuse_what_is_no_mask():
    target = np.zeros((2, 2), bool)
    for predicted, truth, message in (
        (np.zeros((2, 3)), target, "resize the prediction"),
        (np.full((2, 2), 3.0), target, "apply a sigmoid"),
        (np.full((2, 2), np.nan), target, "apply a sigmoid"),
        (np.zeros((2, 2)), target.astype(int), "not bool"),
    ):
        with pytest.raises(ValueError, match=message):
            PixelScores().update(predicted, truth)
