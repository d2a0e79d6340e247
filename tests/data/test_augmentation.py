"""Training samples: image and masks move together, statistics and pixels are those of the original's steps."""

import colorsys
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from m2f_hf import M2FImageProcessor
from m2f_hf.data import CATEGORIES, ShapesDataset
from m2f_hf.data.augmentation import (
    PADDING,
    Placement,
    TrainingTransform,
    cut_image,
    draw_placement,
    jitter_colors,
    largest_category_share,
    pack_masks,
    place_map,
    place_polygons,
    place_targets,
    shift_hue,
    unpack_masks,
)
from m2f_hf.data.inspection import draw_sample, inspect_augmentation
from m2f_hf.known.recipes import Recipe, cropped, default_recipe, get_recipe
from m2f_hf.processing.rle import encode_rle, run_lengths


JITTER = Recipe(crop_size=(96, 96), scale_range=(0.1, 2.0), color_jitter=False, evaluation_size=(96, 96))
CROP = cropped(64, crop_size=(64, 96), color_jitter=False)
COLORS = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [255, 0, 255]], dtype=np.uint8)


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth colours with some noise, no two regions alike."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)).resize((width, height))
    return Image.fromarray((np.asarray(coarse) * 0.9 + rng.uniform(0, 25, (height, width, 3))).astype(np.uint8))


def rectangles(height: int = 90, width: int = 120) -> dict:
    """An item whose segments have a colour each, on black void: ids 1 to 5; 5 is a crowd."""
    ids = np.zeros((height, width), dtype=np.int32)
    for segment_id, (top, left, bottom, right) in enumerate(
        [(5, 5, 40, 30), (10, 60, 80, 75), (50, 8, 85, 50), (3, 90, 30, 115), (45, 85, 88, 118)], start=1
    ):
        ids[top:bottom, left:right] = segment_id
    segments = [{"id": k, "category_id": 10 + k, "iscrowd": int(k == 5), "isthing": True} for k in range(1, 6)]
    return {
        "image": Image.fromarray(COLORS[ids]),
        "segmentation_map": ids,
        "segments_info": segments,
        "image_id": 1,
        "file_name": "rectangles.png",
    }


def as_polygons(item: dict) -> dict:
    """The same item with a polygon for each segment."""
    segments = []
    for info in item["segments_info"]:
        rows, columns = np.nonzero(item["segmentation_map"] == info["id"])
        top, left, bottom, right = rows.min(), columns.min(), rows.max() + 1, columns.max() + 1
        segments.append({**info, "segmentation": [[left, top, right, top, right, bottom, left, bottom]]})
    return {key: value for key, value in item.items() if key != "segmentation_map"} | {"segments_info": segments}


def as_run_lengths(item: dict) -> dict:
    """The same item with COCO's uncompressed run lengths for each segment."""
    segments = []
    for info in item["segments_info"]:
        rle = encode_rle(item["segmentation_map"] == info["id"])
        segments.append({**info, "segmentation": {**rle, "counts": run_lengths(rle["counts"]).tolist()}})
    return {key: value for key, value in item.items() if key != "segmentation_map"} | {"segments_info": segments}


FORMS = {"map": lambda item: item, "run lengths": as_run_lengths, "polygons": as_polygons}


@pytest.fixture(params=FORMS)
def item(request) -> dict:
    if request.param == "polygons":
        pytest.importorskip("pycocotools", reason="polygons are drawn by pycocotools")
    return FORMS[request.param](rectangles())


def samples(item: dict, recipe: Recipe, count: int = 30) -> list[dict]:
    return [TrainingTransform(recipe)(item, np.random.default_rng(seed)) for seed in range(count)]


# --- image and masks together ---


@pytest.mark.parametrize("recipe", [JITTER, CROP], ids=["jitter", "crop"])
def test_image_and_masks_move_together(item, recipe):
    """Inside its mask a segment has its own colour; elsewhere no one's, except for the blur at edges."""
    seen = set()
    for sample in samples(item, recipe):
        pixels, masks = sample["image"].astype(int), sample["mask_labels"]
        assert sample["image"].dtype == np.uint8 and sample["image"].shape == (*masks.shape[1:], 3)
        assert masks.dtype == bool and sample["class_labels"].dtype == np.int64
        assert masks.any((1, 2)).all()
        for mask, label in zip(masks, sample["class_labels"].tolist(), strict=True):
            distance = np.abs(pixels - COLORS[label - 10].astype(int)).max(-1)
            core = _eroded(mask, 2)
            assert (distance[core] <= 2).all(), label
            assert (distance[~_dilated(mask, 2)] > 100).all(), label
            seen.add(label)
    assert seen == {11, 12, 13, 14}, "crowds are no targets, everything else appears"


def _dilated(mask: np.ndarray, steps: int) -> np.ndarray:
    for _ in range(steps):
        padded = np.pad(mask, 1)
        mask = padded[1:-1, 1:-1] | padded[2:, 1:-1] | padded[:-2, 1:-1] | padded[1:-1, 2:] | padded[1:-1, :-2]
        padded = np.pad(mask, 1)
        mask = mask | padded[2:, 2:] | padded[2:, :-2] | padded[:-2, 2:] | padded[:-2, :-2]
    return mask


def _eroded(mask: np.ndarray, steps: int) -> np.ndarray:
    return ~_dilated(~np.pad(mask, steps), steps)[steps:-steps, steps:-steps]  # a mask may end where the canvas does


def test_the_forms_of_an_annotation_give_the_same_targets():
    """Run lengths to the pixel; polygons but for a line along the edges."""
    maps, lengths = samples(rectangles(), CROP), samples(as_run_lengths(rectangles()), CROP)
    for first, second in zip(maps, lengths, strict=True):
        for key in first:
            np.testing.assert_array_equal(first[key], second[key])
    pytest.importorskip("pycocotools", reason="polygons are drawn by pycocotools")
    for first, second in zip(maps, samples(as_polygons(rectangles()), CROP), strict=True):
        labels = dict(zip(first["class_labels"].tolist(), first["mask_labels"], strict=True))
        for label, mask in zip(second["class_labels"].tolist(), second["mask_labels"], strict=True):
            if label in labels:
                assert not (mask & ~_dilated(labels[label], 1)).any()
                assert not (_eroded(labels[label], 1) & ~mask).any()


def test_the_same_generator_gives_the_same_sample(item):
    transform = TrainingTransform(replace(CROP, color_jitter=True))
    first, again, other = (transform(item, np.random.default_rng(seed)) for seed in (3, 3, 4))
    for key in first:
        np.testing.assert_array_equal(first[key], again[key])
    assert not np.array_equal(first["image"], other["image"])


def test_nothing_is_drawn_from_global_generators(item):
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    torch_before = torch.random.get_rng_state()
    samples(item, replace(CROP, color_jitter=True, max_category_share=0.5), 3)
    assert (np.random.get_state()[1] == before).all()
    assert torch.equal(torch.random.get_rng_state(), torch_before)


def test_the_item_is_not_changed():
    item = rectangles()
    samples(item, replace(CROP, color_jitter=True), 3)
    again = rectangles()
    np.testing.assert_array_equal(item["segmentation_map"], again["segmentation_map"])
    np.testing.assert_array_equal(np.asarray(item["image"]), np.asarray(again["image"]))
    assert item["segments_info"] == again["segments_info"]


def test_overlapping_instances_keep_their_pixels():
    full = [[0, 0, 40, 0, 40, 40, 0, 40]]
    inner = [[10, 10, 30, 10, 30, 30, 10, 30]]
    pytest.importorskip("pycocotools", reason="polygons are drawn by pycocotools")
    segments = [
        {"id": 300, "category_id": 0, "iscrowd": 0, "segmentation": full},
        {"id": 301, "category_id": 0, "iscrowd": 0, "segmentation": inner},
    ]
    whole = Placement(False, (40, 40), (0, 0), (40, 40), (40, 40))
    masks, classes = place_targets({"image": photo(40, 40), "segments_info": segments}, whole)
    assert masks[0].all() and masks[1].sum() == 400 and classes.tolist() == [0, 0]


def test_ids_beyond_eight_bits_stay_apart():
    item = rectangles()
    renumbered = {0: 0, 1: 70_000, 2: 70_256, 3: 255, 4: 256, 5: 2**24 - 1}
    item["segmentation_map"] = np.vectorize(renumbered.get)(item["segmentation_map"]).astype(np.int32)
    item["segments_info"] = [{**info, "id": renumbered[info["id"]]} for info in item["segments_info"]]
    for first, second in zip(samples(item, CROP, 5), samples(rectangles(), CROP, 5), strict=True):
        np.testing.assert_array_equal(first["mask_labels"], second["mask_labels"])


# --- geometry ---


@pytest.mark.parametrize("is_mirrored", [False, True])
@pytest.mark.parametrize(
    ("size", "resized", "offset", "window"),
    [
        ((90, 120), (180, 240), (31, 57), (96, 96)),
        ((90, 120), (41, 55), (0, 0), (41, 55)),
        ((37, 53), (101, 145), (5, 49), (96, 96)),
        ((200, 150), (64, 48), (10, 7), (30, 40)),
    ],
)
def test_a_window_equals_mirroring_resizing_and_cropping(size, resized, offset, window, is_mirrored):
    image = photo(*size)
    labels = np.random.default_rng(1).integers(0, 99, size).astype(np.int32)
    placement = Placement(is_mirrored, resized, offset, window, window)
    box = (offset[1], offset[0], offset[1] + window[1], offset[0] + window[0])
    upright = ImageOps.mirror(image) if is_mirrored else image
    expected = upright.resize(resized[::-1], Image.Resampling.BILINEAR).crop(box)
    difference = np.abs(np.asarray(cut_image(image, placement)).astype(int) - np.asarray(expected).astype(int))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01
    upright = Image.fromarray(labels[:, ::-1].copy() if is_mirrored else labels)
    expected = np.asarray(upright.resize(resized[::-1], Image.Resampling.NEAREST).crop(box))
    np.testing.assert_array_equal(place_map(labels, placement), expected)


def test_mirrored_twice_is_as_before():
    item = rectangles()
    flip = Placement(True, (90, 120), (0, 0), (90, 120), (90, 120))
    once = {
        **item,
        "image": cut_image(item["image"], flip),
        "segmentation_map": place_map(item["segmentation_map"], flip),
    }
    assert not np.array_equal(once["segmentation_map"], item["segmentation_map"])
    np.testing.assert_array_equal(np.asarray(cut_image(once["image"], flip)), np.asarray(item["image"]))
    np.testing.assert_array_equal(place_map(once["segmentation_map"], flip), item["segmentation_map"])
    polygon = [[3.0, 4.0, 50.5, 4.0, 20.0, 60.0]]
    assert place_polygons(place_polygons(polygon, (90, 120), flip), (90, 120), flip) == polygon
    assert place_polygons(polygon, (90, 120), flip)[0][0] == 117.0


def test_polygons_follow_resizing_and_cropping():
    placement = Placement(False, (180, 480), (10, 20), (50, 60), (64, 64))
    assert place_polygons([[5, 10, 30, 10, 30, 20], [1, 2, 3, 4]], (90, 120), placement) == [[0, 10, 100, 10, 100, 30]]


def test_large_scale_jitter_has_the_originals_statistics():
    """Scales are uniform from 0.1 to 2.0, the image fits the frame, windows are on the diagonal, half are mirrored."""
    recipe = get_recipe("coco-panoptic")
    size = (480, 640)
    rng = np.random.default_rng(0)
    drawn = [draw_placement(size, recipe, rng) for _ in range(4000)]
    scales = np.array([placement.resized[1] for placement in drawn]) / 1024
    assert scales.min() >= 0.0995 and scales.max() <= 2.0005
    counts = np.histogram(scales, bins=10, range=(0.1, 2.0))[0]
    assert (np.abs(counts - 400) < 5 * np.sqrt(400)).all(), counts
    for placement in drawn:
        height, width = placement.resized
        assert abs(height - width * 0.75) <= 1
        assert placement.window == (min(height, 1024), min(width, 1024)) and placement.canvas == (1024, 1024)
        free = height - placement.window[0], width - placement.window[1]
        assert 0 <= placement.offset[0] <= free[0] and 0 <= placement.offset[1] <= free[1]
        if free[0] > 100:
            assert placement.offset[0] / free[0] == pytest.approx(placement.offset[1] / free[1], abs=0.01)
    shares = np.array([p.offset[1] / (p.resized[1] - 1024) for p in drawn if p.resized[1] > 1200])
    assert abs(shares.mean() - 0.5) < 0.04 and shares.min() < 0.02 and shares.max() > 0.98
    assert abs(np.mean([placement.is_mirrored for placement in drawn]) - 0.5) < 0.04


def test_shortest_edges_are_chosen_and_windows_are_anywhere():
    recipe = get_recipe("ade20k-semantic")
    rng = np.random.default_rng(0)
    drawn = [draw_placement((600, 1000), recipe, rng) for _ in range(3000)]
    edges, counts = np.unique([placement.resized[0] for placement in drawn], return_counts=True)
    assert tuple(edges) == recipe.shortest_edges
    expected = 3000 / 16
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()
    large = [placement for placement in drawn if placement.resized[0] > 700]
    shares = np.array([[o / (r - 512) for o, r in zip(p.offset, p.resized, strict=True)] for p in large])
    assert shares.min() >= 0 and shares.max() <= 1 and (np.abs(shares.mean(0) - 0.5) < 0.05).all()
    assert abs(np.corrcoef(shares.T)[0, 1]) < 0.1
    long = draw_placement((100, 1000), recipe, rng).resized
    assert long[1] <= 2048


def test_small_images_are_padded_with_grey_that_colours_leave_alone():
    recipe = replace(JITTER, scale_range=(0.5, 0.5), color_jitter=True)
    for sample in samples(rectangles(90, 120), recipe, 8):
        assert sample["image"].shape == (96, 96, 3)
        assert (sample["image"][36:] == PADDING).all() and (sample["image"][:, 48:] == PADDING).all()
        assert not sample["mask_labels"][:, 36:].any() and not sample["mask_labels"][:, :, 48:].any()
    sizes = {sample["image"].shape[:2] for sample in samples(rectangles(), replace(CROP, is_padded=False))}
    assert len(sizes) > 3 and max(sizes) <= (64, 96)


def test_elongated_images_keep_a_pixel():
    item = {"image": photo(2, 1000), "segmentation_map": np.ones((2, 1000), np.int32)}
    item["segments_info"] = [{"id": 1, "category_id": 0}]
    for sample in samples(item, JITTER, 10):
        assert sample["mask_labels"].sum() >= 9
    item = {"image": photo(1, 1000), "segmentation_map": np.ones((1, 1000), np.int32), "segments_info": []}
    with pytest.raises(ValueError, match=r"thin\.jpg.*too elongated"):
        samples({**item, "file_name": "thin.jpg", "image_id": 3}, CROP, 1)


# --- targets ---


def test_masks_emptied_by_a_crop_are_dropped_and_their_images_kept():
    item = rectangles()
    counts = {len(sample["class_labels"]) for sample in samples(item, replace(CROP, shortest_edges=(300,)), 60)}
    assert 0 in counts and max(counts) > 1
    item["segments_info"] = item["segments_info"][4:]
    for sample in samples(item, CROP, 5):
        assert sample["mask_labels"].shape == (0, 64, 96) and sample["class_labels"].shape == (0,)


def test_images_without_annotation():
    item = {"image": photo(50, 70), "segments_info": [], "image_id": 0}
    for form in (item, {**item, "segmentation_map": np.zeros((50, 70), np.int32)}):
        sample = samples(form, JITTER, 1)[0]
        assert sample["mask_labels"].shape == (0, 96, 96) and sample["mask_labels"].dtype == bool
        assert sample["class_labels"].dtype == np.int64


def test_void_is_no_target_even_if_listed():
    item = rectangles()
    item["segments_info"].append({"id": 0, "category_id": 3})
    assert all(3 not in sample["class_labels"] for sample in samples(item, CROP, 5))


def test_run_lengths_of_another_size_are_refused():
    item = as_run_lengths(rectangles())
    item["image"] = photo(80, 120)
    with pytest.raises(ValueError, match="size"):
        samples(item, CROP, 1)


@pytest.mark.parametrize("form", ["map", "run lengths"])
def test_windows_that_one_class_covers_are_drawn_again(form):
    """Three quarters are one class: most windows have more than 0.8 of it, with the limit about a fifth."""
    ids = np.ones((200, 200), dtype=np.int32)
    ids[:, 150:] = 2
    segments = [{"id": 1, "category_id": 5}, {"id": 2, "category_id": 6}]
    item = FORMS[form]({"image": photo(200, 200), "segmentation_map": ids, "segments_info": segments})
    recipe = cropped(40, shortest_edges=(200,), color_jitter=False, flip_probability=0.0)

    def shares(recipe: Recipe) -> np.ndarray:
        transform = TrainingTransform(recipe)
        placements = [transform._place(item, recipe, np.random.default_rng(seed)) for seed in range(60)]
        return np.array([largest_category_share(item, placement) for placement in placements])

    free, limited = shares(recipe), shares(replace(recipe, max_category_share=0.8))
    # A window has both classes, neither over 0.8, in 23 of the 161 places: ten tries miss them with 0.857 ** 10 = 0.21.
    assert (free >= 0.8).mean() > 0.6
    assert (limited >= 0.8).mean() < 0.4
    assert (limited < 1).any()


def test_the_share_of_a_category_counts_crowds_and_all_its_segments():
    item = rectangles()
    whole = Placement(False, (90, 120), (0, 0), (90, 120), (90, 120))
    areas = np.bincount(item["segmentation_map"].ravel(), minlength=6)[1:]
    assert largest_category_share(item, whole) == pytest.approx(areas.max() / areas.sum())
    for info in item["segments_info"]:
        info["category_id"] = 0
    assert largest_category_share(item, whole) == 1.0
    assert largest_category_share({**item, "segments_info": []}, whole) == 1.0


def test_two_hundred_instances_are_in_memory_once():
    """Peak memory beyond the result stays below a quarter of it, though all masks overlap."""
    pytest.importorskip("pycocotools", reason="polygons are drawn by pycocotools")
    rng = np.random.default_rng(0)
    segments = []
    for index in range(200):
        x, y = rng.uniform(0, 500, 2)
        corners = [x, y, x + 80, y, x + 80, y + 90, x, y + 90]
        segments.append({"id": index + 1, "category_id": 0, "iscrowd": 0, "segmentation": [corners]})
    item = {"image": photo(512, 512), "segments_info": segments}
    recipe = replace(JITTER, crop_size=(512, 512), scale_range=(1.0, 1.0))
    transform = TrainingTransform(recipe)
    transform(item, np.random.default_rng(0))
    tracemalloc.start()
    sample = transform(item, np.random.default_rng(0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sample["mask_labels"].shape == (200, 512, 512)
    assert peak < 1.25 * sample["mask_labels"].nbytes + sample["image"].nbytes


@pytest.mark.parametrize("width", [1, 8, 21, 64])
def test_masks_survive_packing(width):
    masks = np.random.default_rng(0).random((3, 5, width)) < 0.5
    packed = torch.from_numpy(pack_masks(masks))
    assert packed.shape == (3, 5, -(-width // 8)) and packed.dtype == torch.uint8
    assert torch.equal(unpack_masks(packed, width), torch.from_numpy(masks))
    assert unpack_masks(packed[:0], width).shape == (0, 5, width)


def test_the_processor_takes_samples():
    recipe = replace(CROP, is_padded=False)
    batch = [TrainingTransform(recipe)(rectangles(), np.random.default_rng(seed)) for seed in (0, 1)]
    processor = M2FImageProcessor()
    encoded = processor(
        [sample["image"] for sample in batch],
        mask_labels=[sample["mask_labels"] for sample in batch],
        class_labels=[sample["class_labels"] for sample in batch],
        do_resize=False,
        return_tensors="pt",
    )
    for index, sample in enumerate(batch):
        height, width = sample["image"].shape[:2]
        assert encoded["pixel_mask"][index].sum() == height * width
        np.testing.assert_array_equal(encoded["mask_labels"][index][:, :height, :width], sample["mask_labels"])
        np.testing.assert_array_equal(encoded["class_labels"][index], sample["class_labels"])


# --- colours ---


class Draws:
    """A generator whose `random` gives these numbers; ranges give their value at `position` (0 to 1)."""

    def __init__(self, chances: list[float], position: float) -> None:
        self.chances, self.position = chances, position

    def random(self) -> float:
        return self.chances.pop(0)

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self.position

    def integers(self, low: int, high: int, endpoint: bool) -> int:
        assert endpoint
        return round(low + (high - low) * self.position)


def by_formula(pixel: np.ndarray, changes: list[tuple[str, float]]) -> np.ndarray:
    """The SSD changes of one RGB pixel (0–255) in floating point, clipped after each."""
    values = pixel.astype(float)
    for kind, amount in changes:
        if kind == "brightness":
            values = values + amount
        elif kind == "contrast":
            values = values * amount
        else:
            hue, saturation, value = colorsys.rgb_to_hsv(*(values / 255))
            if kind == "saturation":
                saturation = min(saturation * amount, 1.0)
            else:
                hue = (hue + amount / 180) % 1
            values = 255 * np.array(colorsys.hsv_to_rgb(hue, saturation, value))
        values = values.clip(0, 255)
    return values


YES, NO = 0.0, 0.9
# Does it change? brightness, (contrast first), contrast, saturation, hue.
CASES = {
    "nothing": ([NO, YES, NO, NO, NO], lambda p: []),
    "brightness": ([YES, YES, NO, NO, NO], lambda p: [("brightness", -32 + 64 * p)]),
    "contrast": ([NO, YES, YES, NO, NO], lambda p: [("contrast", 0.5 + p)]),
    "saturation": ([NO, YES, NO, YES, NO], lambda p: [("saturation", 0.5 + p)]),
    "hue": ([NO, YES, NO, NO, YES], lambda p: [("hue", round(-18 + 36 * p))]),
    "contrast first": (
        [YES, YES, YES, YES, YES],
        lambda p: [
            ("brightness", -32 + 64 * p),
            ("contrast", 0.5 + p),
            ("saturation", 0.5 + p),
            ("hue", round(-18 + 36 * p)),
        ],
    ),
    "contrast last": (
        [YES, NO, YES, YES, YES],
        lambda p: [
            ("brightness", -32 + 64 * p),
            ("saturation", 0.5 + p),
            ("hue", round(-18 + 36 * p)),
            ("contrast", 0.5 + p),
        ],
    ),
}


@pytest.mark.parametrize("position", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", CASES)
def test_colours_change_by_the_formulas(name, position):
    chances, changes = CASES[name]
    image = photo(12, 16)
    found = np.asarray(jitter_colors(image, Draws(list(chances), position))).astype(float)
    pixels = np.asarray(image).reshape(-1, 3)
    expected = np.stack([by_formula(pixel, changes(position)) for pixel in pixels]).reshape(found.shape)
    # Cut to whole numbers at each change. A step of the hue, 1.4 degrees, is up to six levels; contrast enlarges them.
    has_hue = {kind for kind, _ in changes(position)} & {"saturation", "hue"}
    assert np.abs(found - expected).max() < (12 if has_hue else 2)
    assert np.abs(found - expected).mean() < (3 if has_hue else 1)
    if name == "nothing":
        np.testing.assert_array_equal(found, np.asarray(image))
    elif position != 0.3:
        assert np.abs(found - np.asarray(image)).mean() > 3


def test_brightness_and_contrast_are_truncated_as_in_the_original():
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3))
    values = np.arange(256, dtype=np.float32)
    bright = jitter_colors(ramp, Draws([YES, YES, NO, NO, NO], 0.9))
    np.testing.assert_array_equal(np.asarray(bright)[..., 0].ravel(), (values + 25.6).clip(0, 255).astype(np.uint8))
    strong = jitter_colors(ramp, Draws([NO, YES, YES, NO, NO], 0.8))
    np.testing.assert_array_equal(np.asarray(strong)[..., 0].ravel(), (values * 1.3).clip(0, 255).astype(np.uint8))


def test_grey_has_no_hue_to_turn_and_hues_go_round():
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3))
    np.testing.assert_array_equal(np.asarray(shift_hue(grey, 1.5, 18)), np.asarray(grey))
    red = Image.new("RGB", (1, 1), (255, 0, 0))
    assert shift_hue(red, 1.0, 60).getpixel((0, 0)) == (0, 255, 0)
    assert shift_hue(red, 1.0, 180).getpixel((0, 0)) == (255, 0, 0)
    assert shift_hue(red, 1.0, -60).getpixel((0, 0)) == (0, 0, 255)
    assert shift_hue(red, 0.0, 0).getpixel((0, 0)) == (255, 255, 255)


def test_each_change_happens_half_of_the_time():
    """Grey tells brightness and contrast from nothing: with both at half, three in four differ."""
    rng = np.random.default_rng(0)
    grey = Image.new("RGB", (1, 1), (100, 100, 100))
    changed = np.mean([jitter_colors(grey, rng).getpixel((0, 0)) != (100, 100, 100) for _ in range(2000)])
    assert abs(changed - 0.75) < 0.04
    values = [jitter_colors(grey, rng).getpixel((0, 0))[0] for _ in range(2000)]
    assert min(values) < 45 and max(values) > 185


# --- sizes over training ---


@pytest.mark.parametrize("recipe", [JITTER, cropped(96, color_jitter=False)], ids=["jitter", "crop"])
def test_smaller_samples_show_the_same_at_a_smaller_scale(recipe):
    """The same draws give the same part of the image, but for rounding."""
    transform = TrainingTransform(recipe)
    for seed in range(10):
        large = transform(rectangles(), np.random.default_rng(seed))
        small = transform(rectangles(), np.random.default_rng(seed), size=32)
        assert large["image"].shape == (96, 96, 3) and small["image"].shape == (32, 32, 3)
        areas = {label: mask.mean() for label, mask in zip(large["class_labels"], large["mask_labels"], strict=True)}
        for label, mask in zip(small["class_labels"], small["mask_labels"], strict=True):
            assert mask.mean() == pytest.approx(areas.get(label, 0), abs=0.06)


# --- pictures ---


def test_pictures_show_items_and_samples():
    dataset = ShapesDataset(4, 96)
    transform = TrainingTransform(default_recipe({"shortest_edge": 96}))
    sheet = inspect_augmentation(dataset, transform, CATEGORIES, indices=(0, 3), num_samples=2, side=96)
    again = inspect_augmentation(dataset, transform, CATEGORIES, indices=(0, 3), num_samples=2, side=96)
    other = inspect_augmentation(dataset, transform, CATEGORIES, indices=(0, 3), num_samples=2, side=96, seed=1)
    assert sheet.width > 3 * 96 and sheet.height > 2 * 96
    assert np.array_equal(sheet, again) and not np.array_equal(sheet, other)
    with pytest.raises(ValueError, match="at least one index"):
        inspect_augmentation(dataset, transform, CATEGORIES, indices=())


def test_a_small_mask_is_seen_on_a_large_one():
    masks = np.zeros((2, 40, 40), dtype=bool)
    masks[0, 10:20, 10:20] = True
    masks[1] = True
    sample = {"image": np.zeros((40, 40, 3), np.uint8), "mask_labels": masks, "class_labels": np.array([0, 1])}
    pixels = np.asarray(draw_sample(sample, {0: "", 1: ""}, {0: (255, 0, 0), 1: (0, 0, 255)}))
    assert pixels[15, 15, 0] > pixels[15, 15, 2] + 50
    assert pixels[35, 5, 2] > pixels[35, 5, 0] + 50
