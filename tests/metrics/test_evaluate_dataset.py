"""Evaluation of whole models: `Evaluation`, the `evaluate` modules, and the script, in one process and in two."""

import contextlib
import io
import json
import re
import shutil
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from two_processes import run_two

from m2f_hf import BUNDLED_MODEL, M2FImageProcessor, Mask2FormerForUniversalSegmentation
from m2f_hf.data import CATEGORIES, ShapesDataset, open_dataset, segment_masks, write_coco_panoptic
from m2f_hf.hub.card import is_untouched, model_card, read_card
from m2f_hf.metrics import Evaluation, MaskAP, MeanIoU, PanopticQuality, PixelScores, merged, module_path
from m2f_hf.metrics.evaluate_dataset import EvaluationArguments, Items, evaluate_dataset, match_labels
from m2f_hf.metrics.evaluation import semantic_map, with_masks
from m2f_hf.metrics.options import parse_options
from m2f_hf.metrics.results import card_figures, put_on_card
from m2f_hf.metrics.stock_processor import StockProcessor
from m2f_hf.processing.rle import encode_rle


EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def oracle_outputs(items: list[dict], num_classes: int = 7):
    """Outputs that say of each item what its target says, at the masks' stride of 4, and not quite surely."""
    classes = torch.zeros(len(items), 12, num_classes + 1)
    classes[..., num_classes] = 5.0
    height, width = items[0]["segmentation_map"].shape
    masks = torch.full((len(items), 12, height // 4, width // 4), -9.0)
    for row, item in enumerate(items):
        small = item["segmentation_map"][2::4, 2::4]
        for query, info in enumerate(item["segments_info"]):
            classes[row, query, num_classes], classes[row, query, info["category_id"]] = 0.0, 4.0 + 0.1 * query
            masks[row, query][torch.from_numpy(small == info["id"])] = 9.0
    return type("Outputs", (), {"class_queries_logits": classes, "masks_queries_logits": masks})


@pytest.fixture(scope="module")
def items() -> list[dict]:
    dataset = ShapesDataset(4, 64, seed=5)
    return [dataset[index] for index in range(4)]


@pytest.fixture
def processor() -> M2FImageProcessor:
    return M2FImageProcessor(size={"shortest_edge": 64, "longest_edge": 64}, label_ids_to_fuse=[4, 5, 6])


# --- Evaluation ---


def test_a_panoptic_model_is_measured_for_all_three_tasks_as_each_measure_does(items, processor):
    evaluation = Evaluation("panoptic", processor, CATEGORIES)
    outputs = oracle_outputs(items)
    evaluation.update(outputs, items)
    result = evaluation.compute()

    quality, ap, iou = PanopticQuality(CATEGORIES), MaskAP(CATEGORIES), MeanIoU(CATEGORIES)
    sizes = [(64, 64)] * 4
    panoptic = processor.post_process_panoptic_segmentation(outputs, target_sizes=sizes)
    binary = processor.post_process_instance_segmentation(outputs, 0.0, target_sizes=sizes, return_binary_maps=True)
    semantic = processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
    for index, item in enumerate(items):
        target, infos = item["segmentation_map"], item["segments_info"]
        quality.update(panoptic[index]["segmentation"].numpy(), panoptic[index]["segments_info"], target, infos)
        found = zip(binary[index]["segments_info"], binary[index]["segmentation"].numpy(), strict=True)
        truths = [{**info, "segmentation": target == info["id"]} for info in infos]
        ap.update(index, (64, 64), [{**info, "segmentation": mask} for info, mask in found], truths)
        iou.update(semantic[index].numpy(), semantic_map(target, infos))
    for metric in (quality, ap, iou):
        expected = metric.compute()
        for name, entry in expected.pop("per_class").items():
            assert entry.items() <= result["per_class"][name].items()
        assert expected.items() <= result.items()
    assert result["pq_all"] > 0.6 and result["ap50"] > 0.6 and result["miou"] > 0.7
    assert "ap" not in result["per_class"]["striped ground"], "stuff has no instances"
    assert evaluation.compute() == result, "computing changes nothing"


def test_shares_of_batches_give_what_all_give(items, processor):
    whole, first, rest, none = (Evaluation("panoptic", processor, CATEGORIES) for _ in range(4))
    whole.update(oracle_outputs(items), items)
    first.update(oracle_outputs(items[:1]), items[:1])
    rest.update(oracle_outputs(items[1:]), items[1:])
    parts = [first.metrics, none.metrics, rest.metrics]
    result, expected = none.compute(lambda own: parts), whole.compute()
    per_class = result.pop("per_class"), expected.pop("per_class")
    assert result == pytest.approx(expected)
    assert [entry["fp"] for entry in per_class[0].values()] == [entry["fp"] for entry in per_class[1].values()]
    with pytest.raises(ValueError, match="more than one process"):
        first.compute(lambda own: [*own, *own])


@pytest.mark.parametrize(("task", "figures"), [("instance", "ap"), ("semantic", "miou")])
def test_other_tasks_have_their_own_figures(task, figures, items, processor):
    evaluation = Evaluation(task, processor, CATEGORIES)
    evaluation.update(oracle_outputs(items), items)
    result = evaluation.compute()
    assert result[figures] > 0.3
    assert not {"pq_all", "ap", "miou"} - {figures} & result.keys()


def test_instances_that_overlap_are_measured_by_their_own_masks(processor):
    """Two discs over each other, as masks in COCO's forms: a map could not hold both."""
    rows, columns = np.ogrid[:64, :64]
    masks = [(rows - 30) ** 2 + (columns - x) ** 2 < 300 for x in (26, 34)]
    from pycocotools import mask as mask_api

    packed = mask_api.encode(np.asfortranarray(masks[0]))
    segments = [
        {"id": 1, "category_id": 0, "iscrowd": 0, "segmentation": {**packed, "counts": packed["counts"].decode()}},
        {"id": 2, "category_id": 0, "iscrowd": 0, "segmentation": masks[1]},
    ]
    item = {"image": Image.new("RGB", (64, 64)), "image_id": "a", "segments_info": segments}
    classes = torch.full((1, 3, 8), -9.0)
    classes[0, :2, 0], classes[0, 2, 7] = 9.0, 9.0
    small = torch.stack([torch.from_numpy(mask[2::4, 2::4]) for mask in (*masks, ~masks[0])])
    logits = torch.where(small, 9.0, -9.0)[None]
    outputs = type("Outputs", (), {"class_queries_logits": classes, "masks_queries_logits": logits})
    evaluation = Evaluation("instance", processor, CATEGORIES)
    evaluation.update(outputs, [item])
    assert evaluation.compute()["ap75"] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="measure task 'instance'"):
        Evaluation("semantic", processor, CATEGORIES).update(outputs, [item])
    with pytest.raises(ValueError, match="added before"):
        evaluation.update(outputs, [item])


def test_tasks_and_measures_that_do_not_exist(processor):
    with pytest.raises(ValueError, match="choose one of panoptic"):
        Evaluation("tracks", processor, CATEGORIES)
    with pytest.raises(ValueError, match=r"\['pq'\] do not exist for task 'instance'"):
        Evaluation("instance", processor, CATEGORIES, ["pq"])
    assert "ap" not in Evaluation("panoptic", processor, CATEGORIES, ["pq", "miou"]).compute()
    twice = Evaluation("semantic", processor, CATEGORIES)
    twice.metrics["again"] = twice.metrics["miou"]
    with pytest.raises(ValueError, match="'again' reports accuracy, iou, as another measure does"):
        twice.compute()


def as_prediction(item: dict) -> dict:
    """A prediction that is the item's target."""
    masks = with_masks(item)
    things = [info for info in masks if info["isthing"] is not False and not info["iscrowd"]]
    return {
        "panoptic": {"segmentation": item["segmentation_map"], "segments_info": item["segments_info"]},
        "instances": {
            "segments_info": [{"label_id": info["category_id"], "score": 0.5} for info in things],
            "segmentation": np.array([info["segmentation"] for info in things]),
        },
        "semantic": semantic_map(item["segmentation_map"], item["segments_info"]),
    }


def test_photos_with_crowds_predicted_as_they_are_labelled(shared, processor):
    """Two COCO photos with three crowds, and three of ADE20K with void."""
    photos = open_dataset(shared / "data" / "coco_panoptic", held_out=0).validation
    evaluation = Evaluation("panoptic", processor, photos.categories)
    scenes = open_dataset(shared / "data" / "ade20k", held_out=0).validation
    semantic = Evaluation("semantic", processor, scenes.categories)
    for data, measured in ((photos, evaluation), (scenes, semantic)):
        for index in range(len(data)):
            measured.add(as_prediction(data[index]), data[index])
    result = evaluation.compute()
    assert (result["pq_all"], result["pq_things"], result["pq_stuff"], result["miou"]) == (1, 1, 1, 1)
    assert result["ap"] == pytest.approx(1.0) and result["per_class"]["person"]["fp"] == 0
    assert semantic.compute()["miou"] == 1


def test_a_coco_file_of_instances_gives_pycocotools_figures(shared):
    """Detections are the labelled masks shifted by a few pixels, some with another class."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    file = shared / "data" / "coco_panoptic" / "detection_rle.json"
    dataset = open_dataset(file, image_folder=shared / "data" / "coco_panoptic" / "images", held_out=0).validation
    rng = np.random.default_rng(0)
    metric, detections = MaskAP(dataset.categories), []
    own_id = {category["id"]: category["dataset_id"] for category in dataset.categories}
    for index in range(len(dataset)):
        item = dataset[index]
        predictions = []
        for info, mask in zip(item["segments_info"], segment_masks(item), strict=True):
            shifted = np.roll(mask, rng.integers(-3, 4, 2), axis=(0, 1))
            category = info["category_id"] if rng.random() < 0.8 else 0
            predictions.append({"category_id": category, "score": float(rng.random()), "segmentation": shifted})
        metric.update(item["image_id"], (item["height"], item["width"]), predictions, item["segments_info"])
        detections += [
            {**guess, "image_id": item["image_id"], "category_id": own_id[guess["category_id"]]}
            | {"segmentation": encode_rle(guess["segmentation"])}
            for guess in predictions
        ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = json.loads(file.read_text())
        for annotation in truth.dataset["annotations"]:
            annotation["id"] += 1  # they begin at 0, which pycocotools takes for "not matched"
        truth.createIndex()
        evaluator = COCOeval(truth, truth.loadRes(detections), "segm")
        evaluator.params.catIds = list(own_id.values())  # the file has masks of stuff as well
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    result = metric.compute()
    names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar1", "ar10", "ar100")
    figures = [-1.0 if result[name] is None else result[name] for name in names]
    assert figures == evaluator.stats[:9].tolist()
    assert 0.1 < result["ap"] < 0.9


# --- modules of the `evaluate` library ---


def test_panoptic_quality_and_mask_ap_as_evaluate_modules(load_measure, items, processor):
    outputs, sizes = oracle_outputs(items), [(64, 64)] * 4
    evaluation = Evaluation("panoptic", processor, CATEGORIES)
    evaluation.update(outputs, items)
    expected = evaluation.compute()
    quality = load_measure(module_path("panoptic_quality"), categories=CATEGORIES)
    ap = load_measure(module_path("mask_ap"), categories=CATEGORIES)
    panoptic = processor.post_process_panoptic_segmentation(outputs, target_sizes=sizes)
    instances = processor.post_process_instance_segmentation(
        outputs, threshold=0.0, target_sizes=sizes, return_coco_annotation=True
    )
    for metric, predictions in ((quality, panoptic), (ap, instances)):
        metric.add_batch(predictions=predictions[:3], references=items[:3])
        metric.add(prediction=predictions[3], reference=items[3])
        assert len(metric) == 4
        result = metric.compute()
        result.pop("per_class")
        assert result == {name: expected[name] for name in result}
        assert len(metric) == 0 and set(metric.compute()) >= set(result), "it begins again"
    maps = processor.post_process_instance_segmentation(outputs, threshold=0.0, target_sizes=sizes)
    with pytest.raises(ValueError, match="return_coco_annotation=True"):
        ap.add(prediction=maps[0], reference=items[0])


def test_mean_iou_and_pixel_scores_as_evaluate_modules(load_measure):
    rng = np.random.default_rng(0)
    targets = [rng.choice([0, 1, 2, 255], (9, 7)) for _ in range(5)]
    guesses = [rng.integers(0, 3, (9, 7)) for _ in targets]
    iou, own = load_measure(module_path("mean_iou"), num_classes=3), MeanIoU(3)
    of_class, scores = load_measure(module_path("pixel_scores"), label=1), PixelScores()
    masks, soft = load_measure(module_path("pixel_scores"), threshold=0.7), PixelScores(threshold=0.7)
    for guess, target in zip(guesses, targets, strict=True):
        own.update(guess, target)
        scores.update(guess == 1, target == 1, target == 255)
        soft.update(guess / 2, target == 1)
    assert iou.compute(predictions=[torch.from_numpy(g) for g in guesses], references=targets) == own.compute()
    assert of_class.compute(predictions=guesses, references=targets) == scores.compute()
    result = masks.compute(predictions=[g / 2 for g in guesses], references=[(t == 1).astype(int) for t in targets])
    assert result == soft.compute()
    with pytest.raises(ValueError, match="setting `label`"):
        masks.compute(predictions=guesses, references=targets)


def test_evaluate_modules_gather_and_refuse(load_measure):
    first, second = (load_measure(module_path("mean_iou"), num_classes=2) for _ in range(2))
    first.add(prediction=[[0, 1]], reference=[[0, 1]])
    second.add(prediction=[[0, 0]], reference=[[1, 1]])
    assert first.compute(gather=lambda own: [*own, second.metric])["pixel_accuracy"] == 0.5
    with pytest.raises(ValueError, match="2 predictions for 1 references"):
        first.add_batch(predictions=[1, 2], references=[1])
    with pytest.raises(ValueError, match="unknown inputs labels"):
        first.add(prediction=[[0]], reference=[[0]], labels=[1])
    with pytest.raises(ValueError, match="both or neither"):
        first.compute(predictions=[[[0]]])
    with pytest.raises(ValueError, match="gather=accelerate"):
        load_measure(module_path("mean_iou"), num_classes=2, num_process=2)
    with pytest.raises(ValueError, match="choose one of mask_ap"):
        module_path("accuracy")


# --- the script ---


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The bundled checkpoint at a smaller input size, which is faster."""
    folder = tmp_path_factory.mktemp("model") / "small"
    shutil.copytree(BUNDLED_MODEL, folder)
    file = folder / "preprocessor_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "size": {"shortest_edge": 96, "longest_edge": 192}}))
    return folder


def run(output: Path, *arguments: object) -> dict:
    words = ["--worst", "1", *map(str, arguments), "--output", str(output)]
    return evaluate_dataset(parse_options(EvaluationArguments, words))


def test_a_folder_is_measured_as_evaluation_does_and_put_on_the_card(model, tmp_path, capsys):
    write_coco_panoptic(ShapesDataset(3, 96, seed=3), tmp_path / "scenes", CATEGORIES)
    shutil.copytree(model, tmp_path / "model")
    words = (tmp_path / "model" / "README.md").read_text().split("---")[2].strip()
    (tmp_path / "out" / "worst").mkdir(parents=True)
    for name in ("notes.txt", "07_earlier.jpg"):
        (tmp_path / "out" / "worst" / name).touch()
    arguments = ["--model", tmp_path / "model", "--dataset", tmp_path / "scenes", "--card"]
    result = run(tmp_path / "out", *arguments, "--batch_size", 2)
    assert result["num_images"] == 3 and "pq_all" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == result

    network = Mask2FormerForUniversalSegmentation.from_pretrained(model)
    own = M2FImageProcessor.from_pretrained(model)
    evaluation = Evaluation("panoptic", own, CATEGORIES)
    dataset = ShapesDataset(3, 96, seed=3)
    scenes = [dataset[index] for index in range(3)]
    with torch.no_grad():
        evaluation.update(network(**own([item["image"] for item in scenes], return_tensors="pt")), scenes)
    expected = evaluation.compute()
    del expected["per_class"]
    assert result["figures"] == pytest.approx(expected, abs=1e-3)

    table = (tmp_path / "out" / "results.md").read_text()
    assert f"| {100 * result['figures']['pq_all']:.1f} |" in table and "| circle |" in table
    assert Image.open(tmp_path / "out" / "per_class.png").width > 600
    worst = result["worst"][0]
    assert worst["pq_all"] < result["figures"]["pq_all"] and worst["file_name"].endswith(".png")
    assert Image.open(tmp_path / "out" / worst["picture"]).width > 3 * 480
    found = {path.name for path in (tmp_path / "out" / "worst").iterdir()}
    assert found == {"notes.txt", Path(worst["picture"]).name}, "an earlier evaluation's pictures go, other files stay"
    path = tmp_path / "model" / "README.md"
    assert f"value: {round(100 * result['figures']['pq_all'], 2)}" in path.read_text()
    figures = card_figures({"pq_all": 0.1234, "ap": None}, "scenes", "all images", "m2f evaluate")
    put_on_card(path.parent, network, own, figures)
    card = path.read_text()
    assert words in card, "what the card said stays"
    assert card.count("## Results") == card.count("| all images | PQ |") == card.count("type: pq\n") == 1
    assert "| all images | PQ | 12.34 |" in card and "| all images | mIoU |" in card
    path.unlink()
    put_on_card(path.parent, network, own, figures)
    assert "| all images | PQ | 12.34 |" in path.read_text()


@pytest.mark.parametrize("has_results", [False, True])
def test_figures_put_on_a_card_leave_it_untouched_and_keep_others(has_results, model, tmp_path):
    """Training's figures of the same data are replaced, those of other data keep their source, and the mark fits."""
    network = Mask2FormerForUniversalSegmentation.from_pretrained(model)
    own = M2FImageProcessor.from_pretrained(model)
    values = {"pq_all": 0.5, "pq_things": 0.4, "pq_stuff": 0.6, "ap50": 0.3, "miou": 0.7}
    trained = card_figures(values, "scenes", "validation", "the training run", "owner/scenes") if has_results else []
    url = "https://example.org/log"
    other = card_figures({"pq_all": 0.8}, "photos", "validation", url) if has_results else []
    card = model_card(network.config, own, repo_id="owner/name", figures=[*trained, *other], training={"steps": 1})
    card.save(tmp_path / "README.md")

    measured = card_figures({**values, "ap": 0.2, "miou": 0.75}, "scenes", "validation", "m2f evaluate", "owner/scenes")
    put_on_card(tmp_path, network, own, measured)
    more = card_figures({"miou": 0.65}, "streets", "validation", "m2f evaluate")
    put_on_card(tmp_path, network, own, more)
    text = (tmp_path / "README.md").read_text()
    fresh = model_card(network.config, own, repo_id="owner/name", figures=[*other, *measured, *more])
    section = re.compile(r"^## Results.*?(?=^## |^<!-- )", re.M | re.S)
    assert section.findall(text) == section.findall(fresh.text), "one row for each figure, with who measured it"
    assert f"| {url} |" in text or not has_results
    assert is_untouched(read_card(tmp_path / "README.md")) and '"owner/name"' in text
    assert (
        text.index("## Results") < text.index("## Source and licence") < text.index("<!-- m2f_hf: card of owner/name")
    )

    edited = text.replace("7 classes", "seven classes")
    (tmp_path / "README.md").write_text(edited)
    put_on_card(tmp_path, network, own, measured)
    assert not is_untouched(read_card(tmp_path / "README.md"))
    assert "seven classes" in (tmp_path / "README.md").read_text()


def test_what_was_measured_is_told(model, tmp_path):
    """A data set without splits whole, or the share that training holds out."""
    write_coco_panoptic(ShapesDataset(4, 64), tmp_path / "scenes", CATEGORIES)
    common = ["--model", model, "--dataset", tmp_path / "scenes", "--worst", 1, "--task", "semantic"]
    whole, held_out = run(tmp_path / "whole", *common), run(tmp_path / "part", *common, "--held_out", 0.25)
    assert (whole["num_images"], whole["split"]) == (4, "all images")
    assert (held_out["num_images"], held_out["split"]) == (1, "validation")
    expected = open_dataset(tmp_path / "scenes", held_out=0.25).validation[0]["image_id"]
    assert held_out["worst"][0]["image_id"] == expected
    assert "Images: 4 (all images), task semantic" in (tmp_path / "whole" / "results.md").read_text()


@pytest.mark.parametrize(("task", "figure"), [("instance", "ap"), ("semantic", "miou")])
def test_other_tasks_of_the_same_checkpoint(task, figure, model, tmp_path):
    augmentation = ["--tta", "--worst", 0] if task == "semantic" else []
    result = run(tmp_path, "--model", model, "--dataset", "shapes", "--limit", 1, "--task", task, *augmentation)
    assert 0.1 < result["figures"][figure] <= 1
    assert "pq_all" not in result["figures"] and "pq" not in (tmp_path / "results.md").read_text()
    assert all((tmp_path / row["picture"]).exists() for row in result["worst"])


def test_processes_with_uneven_shares_and_with_none_give_what_one_gives(model, tmp_path):
    """Two gloo processes measure three images, then one image, which leaves the second process without any.

    Each has one thread, as has this one: the number of threads decides how sums are rounded.
    """
    common = ["--model", model, "--dataset", "shapes", "--batch_size", 1]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one = [run(tmp_path / f"one{limit}", *common, "--limit", limit) for limit in (3, 1)]
    finally:
        torch.set_num_threads(threads)
    code = f"""
    import sys
    sys.path.insert(0, {str(EXAMPLES)!r})
    import evaluate
    for limit in (3, 1):
        evaluate.main([*{list(map(str, common))!r}, "--limit", str(limit), "--worst", "1", "--output", f"two{{limit}}"])
    """
    run_two(lambda _: [sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path)
    for single, limit in zip(one, (3, 1), strict=True):
        double = json.loads((tmp_path / f"two{limit}" / "results.json").read_text())
        assert double["num_images"] == limit
        assert double["figures"] == pytest.approx(single["figures"], abs=1e-6)
        assert double["worst"] == single["worst"] and double["per_class"].keys() == single["per_class"].keys()


# --- transformers' processing ---


def test_stock_results_come_in_a_form_that_can_be_measured(items, processor):
    """Fused stuff is listed once, every id has one class, and nothing found is void."""
    outputs = oracle_outputs(items)
    # Two queries for each stuff segment, half of it each, with a thing's query between them.
    stock = StockProcessor(processor)
    classes, masks = outputs.class_queries_logits, outputs.masks_queries_logits
    stuff = int(classes[0, :, 4:7].max(1).values.argmax())
    classes[0, 11], masks[0, 11] = classes[0, stuff], masks[0, stuff].clone()
    masks[0, stuff, :8], masks[0, 11, 8:] = -9.0, -9.0
    classes[3, :, 7] = 30.0
    raw = stock.stock.post_process_panoptic_segmentation(
        outputs, label_ids_to_fuse={4, 5, 6}, target_sizes=[(64, 64)] * 4
    )
    listed = [info["id"] for info in raw[0]["segments_info"]]
    assert len(listed) > len(set(listed)), "what transformers lists twice"
    evaluation = Evaluation("panoptic", stock, CATEGORIES)
    evaluation.update(outputs, items)
    result = evaluation.compute()
    assert 0.2 < result["pq_all"] < 1 and 0.2 < result["ap"] < 1 and 0.5 < result["miou"] < 1
    empty = evaluation.predict(outputs, items)[3]
    assert not empty["panoptic"]["segmentation"].any() and empty["panoptic"]["segments_info"] == []
    with pytest.raises(ValueError, match="no BGR"):
        StockProcessor(M2FImageProcessor(channel_order="BGR"))


def test_the_same_weights_under_transformers_processing(model, tmp_path):
    common = ["--model", model, "--dataset", "shapes", "--limit", 1, "--worst", 0]
    ours, stock = run(tmp_path / "ours", *common), run(tmp_path / "stock", *common, "--post_processing", "stock")
    assert stock["processing"].startswith("transformers")
    assert stock["figures"] != ours["figures"]
    assert stock["figures"]["miou"] == pytest.approx(ours["figures"]["miou"], abs=0.2)


# --- labels, arguments ---


def test_classes_are_matched_by_name_or_by_position():
    categories = [{"id": 0, "name": "Traffic Light"}, {"id": 1, "name": "sky-other"}]
    assert match_labels(categories, {0: "sky other", 5: "traffic_light", 6: "x"}) == {0: 5, 1: 0}
    assert match_labels(categories, {0: "LABEL_0", 1: "LABEL_1"}) == {0: 0, 1: 1}
    with pytest.raises(ValueError, match=r"no label for 1 of the data set's 2 classes: sky-other"):
        match_labels(categories, {0: "traffic light"})


def test_items_have_the_models_labels(items):
    relabelled = Items(items, [2, 0], {label: label + 10 for label in range(7)})
    assert len(relabelled) == 2 and relabelled[0]["position"] == 2
    expected = [info["category_id"] + 10 for info in items[2]["segments_info"]]
    assert [info["category_id"] for info in relabelled[0]["segments_info"]] == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "owner/name", "--card"], "needs --model to be a folder"),
        (["--tta", "--post_processing", "stock"], "leave out --post_processing stock"),
        (["--limit", "0"], "at least 1"),
    ],
)
def test_arguments_that_contradict_each_other(arguments, message, model, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, "--model", model, "--dataset", "shapes", *arguments)
    assert message in capsys.readouterr().err


def test_places_that_cannot_be_are_told_before_anything_is_measured(model, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SystemExit):
        run(tmp_path / "file", "--model", model, "--dataset", "shapes")
    assert "file is a file: name a folder" in capsys.readouterr().err
    with pytest.raises(ValueError, match="nowhere is neither a folder with a checkpoint nor on the Hub"):
        run(tmp_path / "out", "--model", tmp_path / "nowhere", "--dataset", "shapes")


def test_bad_data_is_told_before_anything_is_measured(model, tmp_path):
    other = [{**category, "name": f"{category['name']} x"} for category in CATEGORIES]
    write_coco_panoptic(ShapesDataset(1, 64), tmp_path / "scenes", other)
    for dataset, message in (("nowhere", "nowhere"), ("scenes", "no label for 7 of the data set's 7 classes")):
        with pytest.raises((ValueError, OSError), match=message):
            run(tmp_path / "out", "--model", model, "--dataset", tmp_path / dataset)
    with pytest.raises(ValueError, match="task semantic, not panoptic"):
        run(tmp_path / "out", "--model", model, "--dataset", "shapes", "--tta")
    assert not (tmp_path / "out").exists()


def test_merging_leaves_the_parts_as_they_are(items, processor):
    evaluation, other = (Evaluation("semantic", processor, CATEGORIES) for _ in range(2))
    evaluation.update(oracle_outputs(items[:2]), items[:2])
    other.update(oracle_outputs(items[2:]), items[2:])
    before = evaluation.compute()
    both = merged([evaluation.metrics["miou"], other.metrics["miou"]]).compute()
    assert evaluation.compute() == before != both
