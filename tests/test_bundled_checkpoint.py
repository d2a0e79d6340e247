"""The bundled checkpoints: that they do what the docs say, and batches of different sizes on real predictions."""

import numpy as np
import pytest
import torch
from PIL import Image

from m2f_hf import (
    BUNDLED_MODEL,
    BUNDLED_VIDEO_MODEL,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerForVideoSegmentation,
    Mask2FormerImageProcessor,
    Mask2FormerVideoProcessor,
)
from m2f_hf.data import CATEGORIES, MovingShapesDataset, ShapesDataset, occlusion_clip, tube_masks
from m2f_hf.metrics import Evaluation, evaluate_model


UNSEEN_SEED = 31_337  # neither trained on nor used to choose thresholds


@pytest.fixture(scope="module")
def model():
    return Mask2FormerForUniversalSegmentation.from_pretrained(BUNDLED_MODEL).eval()


@pytest.fixture(scope="module")
def processor():
    return Mask2FormerImageProcessor.from_pretrained(BUNDLED_MODEL)


@pytest.mark.parametrize(("folder", "mebibytes"), [(BUNDLED_MODEL, 10), (BUNDLED_VIDEO_MODEL, 6)])
def test_they_are_small_and_safe(folder, mebibytes):
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"} == set(files)
    assert sum(files.values()) <= mebibytes * 2**20


def test_it_knows_its_classes(model, processor):
    assert model.config.id2label == {category["id"]: category["name"] for category in CATEGORIES}
    stuff = [category["id"] for category in CATEGORIES if not category["isthing"]]
    assert sorted(processor.label_ids_to_fuse) == stuff
    assert processor.task == "panoptic"
    assert processor.size["shortest_edge"] >= 160


def test_it_segments_unseen_scenes(model, processor):
    """A floor on a few scenes, well below the figure on 200 in docs/training.md; a broken path gives about 0."""
    evaluation = Evaluation("panoptic", processor, CATEGORIES, ["pq", "miou"])
    scenes = ShapesDataset(24, seed=UNSEEN_SEED)
    batches = [[scenes[i] for i in range(start, start + 8)] for start in range(0, len(scenes), 8)]
    inputs = (processor([item["image"] for item in items], return_tensors="pt") for items in batches)
    evaluate_model(model, zip(inputs, batches, strict=True), evaluation.update, show_progress=False)
    results = evaluation.compute()
    assert results["pq_all"] > 0.6
    assert results["pq_things"] > 0.5
    assert results["miou"] > 0.7


def predict(model, processor, images):
    with torch.no_grad():
        outputs = model(**processor(images, return_tensors="pt"))
    sizes = [(image.height, image.width) for image in images]
    maps = processor.post_process_instance_segmentation(outputs, target_sizes=sizes, return_binary_maps=True)
    return outputs, maps


def mean_best_iou(found, expected):
    """Mean over the expected masks of the IoU with the best mask of the same class: (N, H, W) bool each."""
    ious = []
    for info, mask in zip(expected["segments_info"], expected["segmentation"], strict=True):
        same = [i for i, other in enumerate(found["segments_info"]) if other["label_id"] == info["label_id"]]
        overlaps = [
            (found["segmentation"][i] & mask).sum().item() / (found["segmentation"][i] | mask).sum().item()
            for i in same
        ]
        ious.append(max(overlaps, default=0.0))
    return np.mean(ious)


def test_batch_of_one_size_equals_single_images(model, processor):
    images = [ShapesDataset(3, seed=UNSEEN_SEED)[i]["image"] for i in range(3)]
    batched, _ = predict(model, processor, images)
    for i, image in enumerate(images):
        alone, _ = predict(model, processor, [image])
        for name in ("class_queries_logits", "masks_queries_logits"):
            torch.testing.assert_close(batched[name][i], alone[name][0], atol=2e-3, rtol=1e-3)


def test_batch_of_mixed_sizes_nearly_equals_single_images(model, processor):
    scenes = [ShapesDataset(6, seed=UNSEEN_SEED)[i]["image"] for i in range(6)]
    boxes = [(0, 0, 160, 96), (0, 0, 96, 160), (0, 0, 160, 160), (10, 0, 150, 120), (0, 20, 128, 160), (0, 0, 160, 128)]
    images: list[Image.Image] = [scene.crop(box) for scene, box in zip(scenes, boxes, strict=True)]
    _, batched = predict(model, processor, images)
    ious = []
    for image, found in zip(images, batched, strict=True):
        _, [expected] = predict(model, processor, [image])
        assert found["segmentation"].shape[1:] == (image.height, image.width)
        ious.append(mean_best_iou(found, expected))
    assert np.mean(ious) >= 0.99


# --- clips ---


@pytest.fixture(scope="module")
def video_model():
    return Mask2FormerForVideoSegmentation.from_pretrained(BUNDLED_VIDEO_MODEL).eval()


def test_the_video_checkpoint_computes_in_float32(video_model):
    assert {parameter.dtype for parameter in video_model.parameters()} == {torch.float32}
    assert list(video_model.config.id2label.values()) == [c["name"] for c in MovingShapesDataset(1).categories]


def test_video_checkpoint_tracks_through_occlusion(video_model):
    """On average over clips that no training has seen: one track covers each thing, the one that is hidden too."""
    processor = Mask2FormerVideoProcessor.from_pretrained(BUNDLED_VIDEO_MODEL)
    ious = []
    for seed in range(2):
        clip = occlusion_clip(9, seed=seed)
        with torch.inference_mode():
            outputs = video_model(**processor(list(clip["frames"]), return_tensors="pt"))
        found = processor.post_process_video_instance_segmentation(outputs, target_sizes=[(160, 160)])[0]
        tracks = found["segmentation"].numpy()
        masks = tube_masks(clip)
        ious += [max((mask & track).sum() / (mask | track).sum() for track in tracks) for mask in masks]
    assert np.mean(ious) >= 0.6, ious
