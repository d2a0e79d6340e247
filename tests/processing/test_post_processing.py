"""Post-processing against the definition, the original's recorded results, pycocotools and transformers."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from m2f_hf.processing import mask_tiles
from m2f_hf.processing.image_processor import M2FImageProcessor
from m2f_hf.processing.post_processing import semantic_segmentation, split_batch
from m2f_hf.processing.rle import encode_rle


find_panoptic = M2FImageProcessor().post_process_panoptic_segmentation
find_instances = M2FImageProcessor().post_process_instance_segmentation
find_semantic = M2FImageProcessor().post_process_semantic_segmentation
NEAR_TIE = 1e-4
IMAGE_GOLDENS = [
    "coco_panoptic_r50",
    "coco_panoptic_swin",
    "coco_instance_swin",
    "ade20k_semantic_swinl",
    "fpn_basepixeldecoder",
]


# --- the definition, at full size and query by query ---


def naive_masks(mask_logits, image_size, target_size):
    """(Q, h, w) -> (Q, *target_size): to the padded input, crop, to the target."""
    padded = F.interpolate(mask_logits[None].float(), scale_factor=4, mode="bilinear", align_corners=False)
    cropped = padded[:, :, : image_size[0], : image_size[1]]
    return F.interpolate(cropped, size=target_size, mode="bilinear", align_corners=False)[0]


def naive_panoptic(class_logits, mask_logits, image_size, target_size, threshold, overlap, stuff):
    """The map, its segments (id, label), and where it is too close to say: (H, W) bool."""
    probs = class_logits.float().softmax(-1)
    masks = naive_masks(mask_logits, image_size, target_size).sigmoid()
    num_labels = class_logits.shape[-1] - 1
    kept = [q for q in range(len(probs)) if int(probs[q].argmax()) != num_labels and float(probs[q].max()) > threshold]
    segmentation = torch.zeros(target_size, dtype=torch.int32)
    if not kept:
        return segmentation, [], torch.zeros(target_size, dtype=torch.bool)
    scores = torch.stack([probs[q].max() for q in kept])
    weighted = scores[:, None, None] * masks[kept]
    winner = weighted.argmax(0)
    segments, stuff_segment = [], {}
    for place, query in enumerate(kept):
        wins, covers = winner == place, masks[query] >= 0.5
        visible = wins & covers
        if not visible.any() or int(wins.sum()) / int(covers.sum()) < overlap:
            continue
        label = int(probs[query].argmax())
        if label in stuff_segment:
            segmentation[visible] = stuff_segment[label]
            continue
        segments.append((len(segments) + 1, label))
        segmentation[visible] = len(segments)
        if label in stuff:
            stuff_segment[label] = len(segments)
    best = weighted.topk(min(2, len(kept)), dim=0).values
    close = (best[0] - best[-1] < NEAR_TIE) & (len(kept) > 1)
    return segmentation, segments, close | ((masks[kept] - 0.5).abs() < NEAR_TIE).any(0)


def naive_instances(class_logits, mask_logits, image_size, target_size, max_detections, dropped):
    """Label, score and mask of every instance with a pixel, by falling score."""
    probs = class_logits.float().softmax(-1)[:, :-1]
    masks = naive_masks(mask_logits, image_size, target_size)
    pairs = [(float(probs[q, k]), q, k) for q in range(probs.shape[0]) for k in range(probs.shape[1])]
    instances = []
    for prob, query, label in sorted(pairs, reverse=True)[:max_detections]:
        mask = masks[query] > 0
        if label in dropped or not mask.any():
            continue
        mean = float((masks[query].sigmoid() * mask).sum() / (mask.sum() + 1e-6))
        instances.append((label, prob * mean, mask))
    return sorted(instances, key=lambda instance: -instance[1])


def naive_semantic(class_logits, mask_logits, image_size, target_size, resize_before_inference):
    """(K, *target_size) sums over queries."""
    probs = class_logits.float().softmax(-1)[:, :-1]
    if resize_before_inference:
        return torch.einsum("qk,qhw->khw", probs, naive_masks(mask_logits, image_size, target_size).sigmoid())
    padded = F.interpolate(mask_logits[None].float(), scale_factor=4, mode="bilinear", align_corners=False)[0]
    scores = torch.einsum("qk,qhw->khw", probs, padded.sigmoid())[None, :, : image_size[0], : image_size[1]]
    return F.interpolate(scores, size=target_size, mode="bilinear", align_corners=False)[0]


# --- outputs to work on ---


def random_outputs(seed=0, batch=1, queries=12, labels=5, size=(8, 12), image_sizes=None, dtype=torch.float32):
    """Smooth masks and confident classes, so that every branch of the merging is taken."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch, queries, 4, 5, generator=generator) * 8 - 6
    class_logits = torch.randn(batch, queries, labels + 1, generator=generator) * 3
    return SimpleNamespace(
        class_queries_logits=class_logits.to(dtype),
        masks_queries_logits=F.interpolate(coarse, size=size, mode="bilinear").to(dtype),
        image_sizes=None if image_sizes is None else torch.tensor(image_sizes),
    )


def outputs_of(queries, size=(8, 8), num_labels=4, image_size=None):
    """Outputs of one image from (label or None for no object, class probability, mask probability (h, w) or boxes).

    A mask may be given as (top, left, bottom, right) in mask pixels; inside it the logit is 8, outside -8.
    """
    class_logits, mask_logits = [], []
    for label, prob, mask in queries:
        rest = (1 - prob) / num_labels
        probs = torch.full((num_labels + 1,), rest)
        probs[num_labels if label is None else label] = prob
        class_logits.append(probs.log())
        if isinstance(mask, tuple):
            top, left, bottom, right = mask
            logits = torch.full(size, -8.0)
            logits[top:bottom, left:right] = 8.0
        else:
            logits = torch.logit(torch.as_tensor(mask, dtype=torch.float32))
        mask_logits.append(logits)
    return SimpleNamespace(
        class_queries_logits=torch.stack(class_logits)[None],
        masks_queries_logits=torch.stack(mask_logits)[None],
        image_sizes=None if image_size is None else torch.tensor([image_size]),
    )


SIZES = [((32, 48), (32, 48)), ((30, 41), (30, 41)), ((30, 41), (47, 83)), ((27, 48), (11, 13)), ((32, 33), (64, 5))]


# --- the definition ---


@pytest.mark.parametrize("elements", [1, 2000, 1 << 20])
@pytest.mark.parametrize(("image_size", "target_size"), SIZES)
def test_tiles_equal_two_bilinear_resizings(image_size, target_size, elements, monkeypatch):
    monkeypatch.setitem(mask_tiles.TILE_ELEMENTS, "cpu", elements)
    mask_logits = random_outputs().masks_queries_logits[0]
    tiles = mask_tiles.MaskTiles(mask_logits, image_size, target_size)
    queries = torch.arange(len(mask_logits))
    whole = torch.full((len(mask_logits), *target_size), torch.nan)
    for tile, low, high in zip(tiles, tiles.low.flatten(1).T, tiles.high.flatten(1).T, strict=True):
        values = tiles.logits(tile, queries)
        assert (values >= low[:, None, None]).all() and (values <= high[:, None, None]).all()
        whole[(slice(None), *tile.place)] = values
    torch.testing.assert_close(whole, naive_masks(mask_logits, image_size, target_size), atol=1e-5, rtol=0)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("image_size", "target_size"), SIZES)
def test_panoptic_equals_the_definition(image_size, target_size, seed):
    outputs = random_outputs(seed, queries=30, image_sizes=[image_size])
    stuff, threshold, overlap = {0, 1}, 0.5, 0.4
    result = find_panoptic(outputs, threshold, 0.5, overlap, stuff, [target_size])[0]
    segmentation, segments, near_tie = naive_panoptic(
        outputs.class_queries_logits[0], outputs.masks_queries_logits[0], image_size, target_size, threshold, overlap,
        stuff,
    )  # fmt: skip
    assert [(info["id"], info["label_id"]) for info in result["segments_info"]] == segments
    assert len(segments) > 2
    assert near_tie.float().mean() < 0.05
    assert torch.equal(result["segmentation"][~near_tie], segmentation[~near_tie])
    for info in result["segments_info"]:
        ys, xs = np.nonzero((result["segmentation"] == info["id"]).numpy())
        assert info["area"] == len(ys)
        assert info["bbox"] == [xs.min(), ys.min(), xs.max() - xs.min() + 1, ys.max() - ys.min() + 1]
        assert info["isthing"] is (info["label_id"] not in stuff)
        assert info["was_fused"] is (info["label_id"] in stuff)
        assert threshold < info["score"] <= 1
    # Where the stuff is not known nothing is called thing or stuff; where there is none, everything is a thing.
    for known, is_thing in ((None, None), ((), True)):
        unfused = find_panoptic(outputs, threshold, 0.5, overlap, known, [target_size])[0]
        assert {info["isthing"] for info in unfused["segments_info"]} == {is_thing}
        assert {info["was_fused"] for info in unfused["segments_info"]} == {False}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("image_size", "target_size"), SIZES)
def test_instances_equal_the_definition(image_size, target_size, seed):
    outputs = random_outputs(seed, image_sizes=[image_size])
    expected = naive_instances(
        outputs.class_queries_logits[0], outputs.masks_queries_logits[0], image_size, target_size, 20, {4}
    )
    processor = M2FImageProcessor(max_detections=20, label_ids_to_fuse={4}, instance_threshold=0.0)
    result = processor.post_process(outputs, "instance", target_sizes=[target_size], return_binary_maps=True)[0]
    assert 5 < len(expected) < 20
    assert [info["label_id"] for info in result["segments_info"]] == [label for label, _, _ in expected]
    assert [info["score"] for info in result["segments_info"]] == pytest.approx([s for _, s, _ in expected], abs=2e-6)
    masks = torch.stack([mask for _, _, mask in expected])
    close = naive_masks(outputs.masks_queries_logits[0], image_size, target_size).abs().amin(0) < NEAR_TIE
    assert torch.equal(result["segmentation"][:, ~close], masks[:, ~close])
    for info, mask in zip(result["segments_info"], result["segmentation"], strict=True):
        ys, xs = np.nonzero(mask.numpy())
        assert info["area"] == len(ys)
        assert info["bbox"] == [xs.min(), ys.min(), xs.max() - xs.min() + 1, ys.max() - ys.min() + 1]


@pytest.mark.parametrize("resize_before_inference", [True, False])
@pytest.mark.parametrize(("image_size", "target_size"), SIZES)
def test_semantic_equals_the_definition(image_size, target_size, resize_before_inference, monkeypatch):
    monkeypatch.setitem(mask_tiles.TILE_ELEMENTS, "cpu", 3000)
    outputs = random_outputs(image_sizes=[image_size])
    processor = M2FImageProcessor(semantic_resize_before_inference=resize_before_inference)
    result = processor.post_process_semantic_segmentation(outputs, [target_size], True)[0]
    expected = naive_semantic(
        outputs.class_queries_logits[0], outputs.masks_queries_logits[0], image_size, target_size,
        resize_before_inference,
    )  # fmt: skip
    torch.testing.assert_close(result.segmentation_scores, expected, atol=1e-5, rtol=0)
    assert result.segmentation.dtype == torch.int64
    assert torch.equal(result.segmentation, result.segmentation_scores.argmax(0))


# --- what the original recorded ---


def golden_outputs(raw, image_sizes):
    return SimpleNamespace(
        class_queries_logits=torch.from_numpy(raw["pred_logits"]),
        masks_queries_logits=torch.from_numpy(raw["pred_masks"]),
        image_sizes=torch.tensor(image_sizes),
    )


def golden_settings(goldens, variant):
    facts = json.loads((goldens / variant / "variant.json").read_text())
    options = dict(zip(facts["opts"][::2], facts["opts"][1::2], strict=True))
    facts["threshold"] = options.get("MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD", 0.8)
    facts["overlap"] = options.get("MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD", 0.8)
    facts["detections"] = options.get("TEST.DETECTIONS_PER_IMAGE", 100)
    return facts


def stuff_ids(num_labels, thing_ids):
    return set() if thing_ids is None else set(range(num_labels)) - set(thing_ids)


@pytest.mark.parametrize("variant", IMAGE_GOLDENS)
def test_recorded_semantic(goldens, variant):
    facts = golden_settings(goldens, variant)
    final = np.load(goldens / variant / "final.npz")
    if "sem_seg_0" not in final.files:
        assert variant == "coco_instance_swin"
        return
    outputs = golden_outputs(np.load(goldens / variant / "outputs_raw.npz"), facts["input_sizes"])
    processor = M2FImageProcessor(task="semantic" if variant == "ade20k_semantic_swinl" else "panoptic")
    results = processor.post_process_semantic_segmentation(outputs, facts["output_sizes"], True)
    for index, result in enumerate(results):
        recorded = torch.from_numpy(final[f"sem_seg_{index}"]).float()  # written as float16
        torch.testing.assert_close(result.segmentation_scores, recorded, rtol=1e-3, atol=1e-4)
        best = recorded.topk(2, dim=0).values
        is_clear = best[0] - best[1] > 2e-3 * best[0]
        assert is_clear.float().mean() > 0.9
        assert torch.equal(result.segmentation[is_clear], recorded.argmax(0)[is_clear])


@pytest.mark.parametrize("variant", ["coco_panoptic_r50", "coco_panoptic_swin", "fpn_basepixeldecoder"])
def test_recorded_panoptic(goldens, variant):
    facts = golden_settings(goldens, variant)
    final = np.load(goldens / variant / "final.npz")
    outputs = golden_outputs(np.load(goldens / variant / "outputs_raw.npz"), facts["input_sizes"])
    stuff = stuff_ids(outputs.class_queries_logits.shape[-1] - 1, facts["thing_ids"])
    results = find_panoptic(outputs, facts["threshold"], 0.5, facts["overlap"], stuff, facts["output_sizes"])
    assert len(results) == 2
    for index, result in enumerate(results):
        near_tie = naive_panoptic(
            outputs.class_queries_logits[index], outputs.masks_queries_logits[index], facts["input_sizes"][index],
            facts["output_sizes"][index], facts["threshold"], facts["overlap"], stuff,
        )[2]  # fmt: skip
        recorded = torch.from_numpy(final[f"panoptic_seg_{index}"])
        assert torch.equal(result["segmentation"][~near_tie], recorded[~near_tie])
        assert [
            {"id": info["id"], "isthing": info["isthing"], "category_id": info["label_id"]}
            for info in result["segments_info"]
        ] == facts["panoptic_segments_info"][index]


@pytest.mark.parametrize("variant", IMAGE_GOLDENS)
def test_recorded_instances(goldens, variant):
    facts = golden_settings(goldens, variant)
    final = np.load(goldens / variant / "final.npz")
    if "inst_scores_0" not in final.files:
        assert variant == "ade20k_semantic_swinl"
        return
    outputs = golden_outputs(np.load(goldens / variant / "outputs_raw.npz"), facts["input_sizes"])
    stuff = stuff_ids(outputs.class_queries_logits.shape[-1] - 1, facts["thing_ids"])
    processor = M2FImageProcessor(max_detections=facts["detections"], label_ids_to_fuse=stuff, instance_threshold=0.0)
    results = processor.post_process(outputs, "instance", target_sizes=facts["output_sizes"], return_binary_maps=True)
    for index, result in enumerate(results):
        check_instances(
            result, *(final[f"inst_{name}_{index}"] for name in ("scores", "classes", "masks")), outputs, index, facts
        )


def check_instances(result, scores, classes, masks, outputs, index, facts):
    """The original lists instances unsorted, and those without a pixel too, at score 0."""
    has_pixels = masks.any((1, 2))
    assert (scores[~has_pixels] == 0).all()
    order = [i for i in np.argsort(-scores, kind="stable") if has_pixels[i]]
    assert [info["label_id"] for info in result["segments_info"]] == classes[order].tolist()
    assert [info["score"] for info in result["segments_info"]] == pytest.approx(scores[order].tolist(), abs=2e-6)
    logits = naive_masks(outputs.masks_queries_logits[index], facts["input_sizes"][index], facts["output_sizes"][index])
    is_clear = (logits.abs().amin(0) >= NEAR_TIE).numpy()
    assert (result["segmentation"].numpy()[:, is_clear] == masks[order][:, is_clear]).all()


def test_recorded_path_of_the_predictor(goldens):
    """One image smaller than the result, through all three tasks of one checkpoint."""
    facts = golden_settings(goldens, "coco_panoptic_r50")
    recorded = np.load(goldens / "extra" / "predictor_coco_panoptic_r50.npz")
    expected_segments = json.loads((goldens / "extra" / "predictor_coco_panoptic_r50.json").read_text())[
        "segments_info"
    ]
    facts["input_sizes"], facts["output_sizes"] = [recorded["network_input"].shape[:2]], [recorded["bgr"].shape[:2]]
    outputs = golden_outputs(recorded, facts["input_sizes"])
    stuff = stuff_ids(outputs.class_queries_logits.shape[-1] - 1, facts["thing_ids"])
    processor = M2FImageProcessor(
        label_ids_to_fuse=stuff,
        threshold=facts["threshold"],
        overlap_mask_area_threshold=facts["overlap"],
        instance_threshold=0.0,
    )
    panoptic = processor.post_process(outputs, target_sizes=facts["output_sizes"])[0]
    assert np.array_equal(panoptic["segmentation"].numpy(), recorded["panoptic_seg"])
    assert [
        {"id": info["id"], "isthing": info["isthing"], "category_id": info["label_id"]}
        for info in panoptic["segments_info"]
    ] == expected_segments
    semantic = processor.post_process(outputs, task="semantic", target_sizes=facts["output_sizes"])[0]
    assert (semantic.numpy() == recorded["sem_seg_argmax"]).mean() > 0.9999
    instances = processor.post_process(
        outputs, task="instance", target_sizes=facts["output_sizes"], return_binary_maps=True
    )[0]
    check_instances(
        instances, *(recorded[f"inst_{name}"] for name in ("scores", "classes", "masks")), outputs, 0, facts
    )


# --- where transformers does otherwise ---


def test_details_below_a_384th_of_the_image_survive():
    """transformers decides instance masks at 384 x 384 and blows them up: a line of one pixel gets lost or swells."""
    logits = torch.full((4, 400), -8.0)
    logits[:, 201] = 8.0
    outputs = outputs_of([(0, 0.9, logits.sigmoid())], size=(4, 400))
    result = find_instances(outputs, 0.1, target_sizes=[(16, 1600)], return_binary_maps=True)[0]
    # The logit is above 0 within half a mask pixel of its centre: 4 pixels of the input.
    assert result["segmentation"][0].any(0).nonzero().flatten().tolist() == [804, 805, 806, 807]


def test_padding_is_cropped():
    """The left half of the image stays the left half, whatever the batch was padded to."""
    outputs = outputs_of([(0, 0.9, (0, 0, 24, 8))], size=(24, 32), image_size=(64, 64))
    for result in (
        find_instances(outputs, 0.1, target_sizes=[(640, 640)])[0]["segments_info"][0],
        find_panoptic(outputs, 0.1, target_sizes=[(640, 640)])[0]["segments_info"][0],
    ):
        assert result["bbox"] == [0, 0, 320, 640]
    semantic = find_semantic(outputs, [(640, 640)], True)[0]
    assert (semantic.segmentation_scores[0, :, :300] > 0.8).all()
    assert (semantic.segmentation_scores[0, :, 340:] < 0.1).all()


def test_each_image_of_a_batch_has_its_own_size():
    """Also without target sizes: then it is the size before padding."""
    sizes = [(32, 40), (27, 48), (32, 48)]
    outputs = random_outputs(3, batch=3, image_sizes=sizes)
    processor = M2FImageProcessor(threshold=0.5, instance_threshold=0.1)
    for task in ("panoptic", "instance", "semantic"):
        together = processor.post_process(outputs, task=task)
        for index, size in enumerate(sizes):
            alone = SimpleNamespace(
                class_queries_logits=outputs.class_queries_logits[index : index + 1],
                masks_queries_logits=outputs.masks_queries_logits[index : index + 1],
                image_sizes=torch.tensor([size]),
            )
            ours, own = together[index], processor.post_process(alone, task=task)[0]
            maps = (ours, own) if task == "semantic" else (ours["segmentation"], own["segmentation"])
            assert tuple(maps[0].shape) == size
            assert torch.equal(*maps)


def test_outputs_without_image_sizes_were_not_padded():
    outputs = random_outputs(size=(8, 12))
    del outputs.image_sizes
    assert find_semantic(outputs)[0].shape == (32, 48)


def test_pixels_no_mask_covers_are_void():
    outputs = outputs_of([(0, 0.9, (0, 0, 8, 4))])
    segmentation = find_panoptic(outputs)[0]["segmentation"]
    assert (segmentation[:, :16] == 1).all()
    assert (segmentation[:, 16:] == 0).all()


def test_areas_are_of_the_mask_alone():
    """With 0.6 x 0.7 < 0.5 transformers finds the segment's own area empty and drops it."""
    outputs = outputs_of([(0, 0.6, np.full((8, 8), 0.7))])
    result = find_panoptic(outputs, threshold=0.5)[0]
    assert [info["area"] for info in result["segments_info"]] == [32 * 32]


def test_ids_count_up_and_fused_stuff_is_listed_once():
    stuff, thing = 3, 1
    outputs = outputs_of(
        [
            (stuff, 0.85, (0, 0, 2, 8)),
            (thing, 0.9, (2, 0, 4, 8)),
            (stuff, 0.95, (4, 0, 6, 8)),
            (thing, 0.9, (6, 0, 8, 8)),
        ]
    )
    result = find_panoptic(outputs, label_ids_to_fuse={stuff})[0]
    assert result["segmentation"][:, 0].tolist() == [1] * 8 + [2] * 8 + [1] * 8 + [3] * 8
    assert [(info["id"], info["label_id"], info["area"]) for info in result["segments_info"]] == [
        (1, stuff, 512),
        (2, thing, 256),
        (3, thing, 256),
    ]
    assert [info["was_fused"] for info in result["segments_info"]] == [True, False, False]
    assert result["segments_info"][0]["score"] == pytest.approx(0.95, abs=1e-5)
    assert result["segments_info"][0]["bbox"] == [0, 0, 32, 24]


def test_segment_that_wins_too_little_becomes_void():
    """Query 1 has the whole image but wins only the right half of it."""
    queries = [(0, 0.95, (0, 0, 8, 4)), (1, 0.9, np.full((8, 8), 0.9))]
    for overlap, kept in ((0.49, 2), (0.51, 1)):
        result = find_panoptic(outputs_of(queries), overlap_mask_area_threshold=overlap)[0]
        assert len(result["segments_info"]) == kept
        assert (result["segmentation"][:, 17:] == (2 if kept == 2 else 0)).all()
        assert (result["segmentation"][:, :15] == 1).all()


def test_a_ratio_equal_to_the_threshold_is_enough():
    half = torch.full((8, 8), -8.0)
    half[:, :4] = 8.0
    outputs = outputs_of([(0, 0.95, half.sigmoid()), (1, 0.9, np.full((8, 8), 0.9))])
    result = find_panoptic(outputs, overlap_mask_area_threshold=0.0)[0]
    ratio = result["segments_info"][1]["area"] / 32**2
    again = find_panoptic(outputs, overlap_mask_area_threshold=ratio)[0]
    above = find_panoptic(outputs, overlap_mask_area_threshold=math.nextafter(ratio, 1))[0]
    assert (len(again["segments_info"]), len(above["segments_info"])) == (2, 1)


def test_queries_without_object_take_no_part():
    outputs = outputs_of([(None, 0.99, (0, 0, 8, 8)), (0, 0.79, (0, 0, 8, 8)), (1, 0.81, (0, 0, 8, 4))])
    result = find_panoptic(outputs)[0]
    assert [info["label_id"] for info in result["segments_info"]] == [1]
    assert (result["segmentation"][:, 16:] == 0).all()


def test_instances_overlap_and_come_by_score():
    outputs = outputs_of([(2, 0.7, (0, 0, 8, 6)), (1, 0.9, (0, 2, 8, 8)), (0, 0.8, (2, 0, 4, 8))])
    masks = find_instances(outputs, return_binary_maps=True)[0]
    assert [(info["id"], info["label_id"]) for info in masks["segments_info"]] == [(0, 1), (1, 0), (2, 2)]
    assert [info["area"] for info in masks["segments_info"]] == [32 * 24, 8 * 32, 32 * 24]
    assert masks["segmentation"].sum((1, 2)).tolist() == [32 * 24, 8 * 32, 32 * 24]
    in_one_map = find_instances(outputs)[0]
    assert in_one_map["segments_info"] == masks["segments_info"]
    covered = torch.where(masks["segmentation"], torch.arange(3)[:, None, None], 3).amin(0)
    assert torch.equal(in_one_map["segmentation"], torch.where(covered == 3, -1, covered).int())


def test_one_query_may_give_instances_of_several_classes():
    outputs = outputs_of([(0, 0.5, (0, 0, 4, 4))], num_labels=1)
    outputs.class_queries_logits = torch.tensor([[[0.5, 0.4, 0.1]]]).log()
    result = find_instances(outputs, 0.3, return_binary_maps=True)[0]
    assert [info["label_id"] for info in result["segments_info"]] == [0, 1]
    assert torch.equal(result["segmentation"][0], result["segmentation"][1])


def test_score_is_class_times_mean_mask_probability():
    mask = np.full((8, 8), 0.2)
    mask[:4] = 0.75
    outputs = outputs_of([(0, 0.8, mask)])
    info = find_instances(outputs, 0.1)[0]["segments_info"][0]
    probs = naive_masks(outputs.masks_queries_logits[0], (32, 32), (32, 32)).sigmoid()[0]
    assert info["score"] == pytest.approx(0.8 * float(probs[probs > 0.5].mean()), abs=1e-5)
    assert info["score"] < 0.61  # and so between 0.8 x 0.5 and 0.8 x 0.75


def test_the_threshold_only_cuts_the_list():
    outputs = random_outputs(5)
    everything = find_instances(outputs, 0.0, return_binary_maps=True)[0]
    some = find_instances(outputs, 0.4, return_binary_maps=True)[0]
    kept = [info for info in everything["segments_info"] if info["score"] >= 0.4]
    assert 0 < len(kept) < len(everything["segments_info"])
    assert some["segments_info"] == kept
    assert torch.equal(some["segmentation"], everything["segmentation"][: len(kept)])


@pytest.mark.parametrize("mask_threshold", [0.2, 0.8])
def test_mask_threshold(mask_threshold):
    outputs = outputs_of([(0, 0.99, np.linspace(0.05, 0.95, 64).reshape(8, 8))])
    probs = naive_masks(outputs.masks_queries_logits[0], (32, 32), (32, 32)).sigmoid()[0]
    instance = find_instances(outputs, 0.0, mask_threshold, return_binary_maps=True)[0]
    assert torch.equal(instance["segmentation"][0], probs > mask_threshold)
    panoptic = find_panoptic(outputs, 0.0, mask_threshold)[0]
    assert torch.equal(panoptic["segmentation"] == 1, probs >= mask_threshold)


# --- run-length encodings ---


def masks_to_encode():
    rng = np.random.default_rng(0)
    long_runs = np.zeros((900, 1100), dtype=bool)  # runs of several groups of bits, and falling ones
    long_runs[100:, 50] = long_runs[:, 500:900] = long_runs[3, 1000] = True
    return [
        np.zeros((5, 7), dtype=bool),
        np.ones((5, 7), dtype=bool),
        np.ones((1, 1), dtype=bool),
        np.eye(40, 17, dtype=bool),
        *(rng.random((37, 61)) < density for density in (0.02, 0.5, 0.98)),
        long_runs,
    ]


@pytest.mark.parametrize("mask", masks_to_encode(), ids=lambda mask: f"{mask.shape}-{mask.sum()}")
def test_encoding_is_cocos(mask):
    coco = pytest.importorskip("pycocotools.mask")
    ours = encode_rle(torch.from_numpy(mask))
    theirs = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    assert ours == {"size": list(theirs["size"]), "counts": theirs["counts"].decode()}
    assert np.array_equal(coco.decode(ours), mask)
    json.dumps(ours)


def test_a_known_encoding():
    """Down the columns: 1 zero, 2 ones, 1 zero, 1 one, 1 zero; the fourth less the second is -1."""
    assert encode_rle(np.array([[0, 0], [1, 1], [1, 0]], dtype=bool)) == {"size": [3, 2], "counts": "121O0"}


def test_encoded_instances_are_the_binary_maps():
    coco = pytest.importorskip("pycocotools.mask")
    outputs = random_outputs(1, image_sizes=[(30, 41)])
    arguments = {"threshold": 0.05, "target_sizes": [(47, 83)]}
    maps = find_instances(outputs, **arguments, return_binary_maps=True)[0]
    encoded = find_instances(outputs, **arguments, return_coco_annotation=True)[0]
    assert encoded["segments_info"] == maps["segments_info"]
    assert len(encoded["segmentation"]) > 3
    for encoding, mask, info in zip(encoded["segmentation"], maps["segmentation"], maps["segments_info"], strict=True):
        assert np.array_equal(coco.decode(encoding), mask.numpy())
        assert coco.area(encoding) == info["area"]
        assert coco.toBbox(encoding).tolist() == info["bbox"]


# --- nothing found ---


@pytest.mark.parametrize("form", ["panoptic", "instance", "return_binary_maps", "return_coco_annotation"])
def test_an_empty_result_has_the_types_of_a_full_one(form):
    def run(threshold):
        outputs = random_outputs(2, image_sizes=[(30, 41)])
        if form == "panoptic":
            return find_panoptic(outputs, threshold, target_sizes=[(21, 34)])[0]
        options = {} if form == "instance" else {form: True}
        return find_instances(outputs, threshold, target_sizes=[(21, 34)], **options)[0]

    full, empty = run(0.2), run(1.0)
    assert full["segments_info"]
    assert empty["segments_info"] == []
    assert full.keys() == empty.keys()
    assert type(full["segmentation"]) is type(empty["segmentation"])
    if form == "return_coco_annotation":
        assert empty["segmentation"] == []
        return
    assert full["segmentation"].dtype == empty["segmentation"].dtype
    assert full["segmentation"].shape[-2:] == empty["segmentation"].shape[-2:] == (21, 34)
    assert full["segmentation"].dtype == (torch.bool if form == "return_binary_maps" else torch.int32)
    void = {"panoptic": 0, "instance": -1, "return_binary_maps": False}[form]
    assert (empty["segmentation"] == void).all()
    assert form != "return_binary_maps" or len(empty["segmentation"]) == 0
    assert form == "return_binary_maps" or (full["segmentation"] == void).any()


# --- memory and work ---


class AllocationRecorder(TorchDispatchMode):
    """The largest tensor that any operation returns, and how many elements are resized."""

    def __init__(self):
        super().__init__()
        self.largest = self.resized = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in (result if isinstance(result, list | tuple) else [result]) if isinstance(t, torch.Tensor)]
        self.largest = max([self.largest, *(t.numel() for t in tensors)])
        if "lerp" in func.name():
            self.resized += sum(t.numel() for t in tensors)
        return result


def recorded(function):
    with AllocationRecorder() as recorder:
        function()
    return recorder


TARGET = (120, 160)


@pytest.mark.parametrize("task", ["panoptic", "instance", "rle", "semantic", "semantic-only"])
def test_memory_does_not_grow_with_the_queries(task, monkeypatch):
    monkeypatch.setitem(mask_tiles.TILE_ELEMENTS, "cpu", 2**13)

    def largest(queries):
        outputs = random_outputs(0, queries=queries)
        outputs.class_queries_logits[..., 0] += 12  # every query passes the threshold
        run = {
            "panoptic": lambda: find_panoptic(outputs, 0.1, target_sizes=[TARGET]),
            "instance": lambda: find_instances(outputs, 0.1, target_sizes=[TARGET]),
            "rle": lambda: find_instances(outputs, 0.1, target_sizes=[TARGET], return_coco_annotation=True),
            "semantic": lambda: find_semantic(outputs, [TARGET]),
            "semantic-only": lambda: M2FImageProcessor(task="semantic").post_process(outputs, target_sizes=[TARGET]),
        }
        return recorded(run[task]).largest

    # One map of the target, or the strip and the few channels by which it may exceed its budget.
    allowed = max(TARGET[0] * TARGET[1], 2 * 2**13)
    assert largest(10) <= allowed
    assert largest(60) <= allowed


def test_recorder_sees_memory_that_grows():
    """The straightforward form fails the test above."""
    outputs = random_outputs(0, queries=60)
    recorder = recorded(lambda: naive_masks(outputs.masks_queries_logits[0], (32, 48), TARGET))
    assert recorder.largest >= 60 * TARGET[0] * TARGET[1]


@pytest.mark.parametrize("task", ["panoptic", "instance"])
def test_queries_below_the_threshold_are_never_resized(task):
    few = outputs_of([(0, 0.9, (0, 0, 8, 4)), (1, 0.9, (0, 4, 8, 8))])
    many = outputs_of([(0, 0.9, (0, 0, 8, 4)), (1, 0.9, (0, 4, 8, 8))] + [(2, 0.3, (0, 0, 8, 8))] * 30)

    def resized(outputs):
        if task == "panoptic":
            return recorded(lambda: find_panoptic(outputs)).resized
        return recorded(lambda: find_instances(outputs)).resized

    assert resized(few) == resized(many) > 0


@pytest.mark.parametrize("task", ["panoptic", "instance", "semantic"])
def test_tiles_do_not_show(task, monkeypatch):
    outputs = random_outputs(4, image_sizes=[(30, 41)])
    processor = M2FImageProcessor(threshold=0.4, instance_threshold=0.1)

    def run():
        result = processor.post_process(outputs, task=task, target_sizes=[(50, 70)])[0]
        return (result, None) if task == "semantic" else (result["segmentation"], result["segments_info"])

    whole = run()
    monkeypatch.setitem(mask_tiles.TILE_ELEMENTS, "cpu", 1)
    row_by_row = run()
    assert torch.equal(whole[0], row_by_row[0])
    if task == "semantic":
        return
    for one, other in zip(whole[1], row_by_row[1], strict=True):
        assert one.pop("score") == pytest.approx(other.pop("score"), abs=2e-6)
        assert one == other


# --- types, devices, agreement ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("task", ["panoptic", "instance", "semantic"])
def test_low_precision_outputs_are_computed_in_float32(task, dtype):
    low = random_outputs(6, dtype=dtype)
    same = SimpleNamespace(
        **{name: getattr(low, name).float() for name in ("class_queries_logits", "masks_queries_logits")}
    )
    processor = M2FImageProcessor(threshold=0.4, instance_threshold=0.1)
    first, second = (processor.post_process(outputs, task=task, target_sizes=[(50, 70)])[0] for outputs in (low, same))
    if task == "semantic":
        assert torch.equal(first, second)
        return
    assert torch.equal(first["segmentation"], second["segmentation"])
    assert first["segments_info"] == second["segments_info"]


def test_outputs_of_training_keep_no_graph():
    outputs = random_outputs(7)
    outputs.masks_queries_logits.requires_grad_()
    outputs.class_queries_logits.requires_grad_()
    result = find_semantic(outputs, return_segmentation_scores=True)[0]
    assert not result.segmentation_scores.requires_grad


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("task", ["panoptic", "instance", "semantic"])
def test_results_stay_on_the_device(task):
    outputs = random_outputs(8, image_sizes=[(30, 41)])
    there = SimpleNamespace(**{name: value.cuda() for name, value in vars(outputs).items()})
    processor = M2FImageProcessor(threshold=0.4, instance_threshold=0.1)
    ours, theirs = (processor.post_process(o, task=task, target_sizes=[(50, 70)])[0] for o in (outputs, there))
    if task != "semantic":
        ours, theirs = ours["segmentation"], theirs["segmentation"]
    assert theirs.device.type == "cuda"
    assert (ours == theirs.cpu()).float().mean() > 0.999


def test_agrees_with_transformers_where_it_is_right():
    """Without padding and at its fixed size of 384 x 384 its semantic map is the semantic-only checkpoints'."""
    stock = pytest.importorskip("transformers.models.mask2former.image_processing_pil_mask2former")
    outputs = random_outputs(9, batch=2, size=(96, 96))
    theirs = stock.Mask2FormerImageProcessorPil().post_process_semantic_segmentation(
        outputs, target_sizes=[(200, 301), (384, 384)], return_segmentation_scores=True
    )
    ours = M2FImageProcessor(task="semantic").post_process_semantic_segmentation(
        outputs, target_sizes=[(200, 301), (384, 384)], return_segmentation_scores=True
    )
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.segmentation_scores, other.segmentation_scores, atol=1e-5, rtol=0)
        best = other.segmentation_scores.topk(2, dim=0).values
        is_clear = best[0] - best[1] > NEAR_TIE
        assert torch.equal(one.segmentation[is_clear], other.segmentation[is_clear])
        assert one.keys() == other.keys()


# --- the processor's settings ---


def test_a_checkpoint_knows_its_task_stuff_and_thresholds():
    outputs = outputs_of([(0, 0.6, (0, 0, 4, 8)), (3, 0.6, (4, 0, 6, 8)), (3, 0.6, (6, 0, 8, 8))])
    stock_like = M2FImageProcessor()
    assert stock_like.post_process(outputs)[0]["segments_info"] == []
    tuned = M2FImageProcessor(threshold=0.5, label_ids_to_fuse=[3], instance_threshold=0.55)
    assert [info["label_id"] for info in tuned.post_process(outputs)[0]["segments_info"]] == [0, 3]
    things = tuned.post_process(outputs, task="instance")[0]["segments_info"]
    assert [info["label_id"] for info in things] == [0]
    assert tuned.post_process_panoptic_segmentation(outputs, threshold=0.7)[0]["segments_info"] == []
    assert len(tuned.post_process_panoptic_segmentation(outputs, label_ids_to_fuse=[])[0]["segments_info"]) == 3
    assert len(M2FImageProcessor(task="instance").post_process(outputs)[0]["segments_info"]) == 3
    assert len(M2FImageProcessor(task="instance", max_detections=2).post_process(outputs)[0]["segments_info"]) == 2
    assert torch.is_tensor(M2FImageProcessor(task="semantic").post_process(outputs)[0])


def test_a_semantic_checkpoint_resizes_after_the_product():
    outputs = random_outputs(image_sizes=[(30, 41)])
    (image,) = split_batch(outputs, [(47, 83)])
    expected = {
        order: semantic_segmentation(image, resize_before_inference=order, return_scores=True)[1]
        for order in (False, True)
    }
    assert (expected[False] - expected[True]).abs().max() > 1e-3, "they are equal, so nothing is shown"
    for processor, order in (
        (M2FImageProcessor(task="semantic"), False),
        (M2FImageProcessor(task="panoptic"), True),
        (M2FImageProcessor(task="semantic", semantic_resize_before_inference=True), True),
    ):
        scores = processor.post_process_semantic_segmentation(outputs, [(47, 83)], True)[0].segmentation_scores
        assert torch.equal(scores, expected[order])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, o: p.post_process(o, target_sizes=[(4, 4)]), "1 target sizes for 2 images"),
        (lambda p, o: p.post_process(o, target_sizes=[(4, 4), (0, 4)]), "at least"),
        (lambda p, o: p.post_process(o, task="depth"), "panoptic, instance, semantic"),
        (
            lambda p, o: p.post_process_instance_segmentation(o, return_coco_annotation=True, return_binary_maps=True),
            "not for both",
        ),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(M2FImageProcessor(), random_outputs(batch=2))


def test_impossible_image_sizes():
    with pytest.raises(ValueError, match="multiple of 32"):
        find_semantic(random_outputs(size=(8, 12), image_sizes=[(33, 48)]))
