"""The image processor against Pillow, the original's recorded inputs and transformers' processor."""

import json
import logging
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers.utils import logging as transformers_logging

from m2f_hf.processing.image_processor import M2FImageProcessor, Mask2FormerImageProcessor
from m2f_hf.processing.labels import resize_labels


MEAN, STD = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])


@pytest.fixture
def picture():
    """(37, 53, 3) uint8, every channel different."""
    return np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)


@pytest.fixture
def processor():
    return M2FImageProcessor(size={"shortest_edge": 60, "longest_edge": 90})


def plain(**settings):
    """A processor that leaves pixels as they are."""
    off = {"do_resize": False, "do_rescale": False, "do_normalize": False, "do_pad": False}
    return M2FImageProcessor(**(off | settings))


def pixels(image, **settings):
    """(H, W, 3) of the pixels that a processor makes of one image."""
    return np.moveaxis(plain(**settings)(image)["pixel_values"][0], 0, -1)


# --- resizing ---


def test_recorded_resizing(goldens):
    recorded = np.load(goldens / "extra" / "preprocess.npz")
    cases = json.loads((goldens / "extra" / "preprocess.json").read_text())["cases"]
    assert len(cases) == 6
    for case in cases:
        image = recorded[f"bgr_{case['i']}"][..., ::-1]
        ours = pixels(image, do_resize=True, size={"shortest_edge": case["min"], "longest_edge": case["max"]})
        assert np.array_equal(ours, recorded[f"resized_rgb_{case['i']}"])


def test_recorded_path_of_the_predictor(goldens):
    recorded = np.load(goldens / "extra" / "predictor_coco_panoptic_r50.npz")
    facts = json.loads((goldens / "extra" / "predictor_coco_panoptic_r50.json").read_text())
    size = {"shortest_edge": facts["min_size_test"], "longest_edge": facts["max_size_test"]}
    ours = pixels(recorded["bgr"][..., ::-1], do_resize=True, size=size)
    assert np.array_equal(ours, recorded["network_input"])


def test_the_aspect_ratio_is_kept_and_the_rest_padded():
    """transformers stretches 800 x 1067 to 800 x 1088."""
    image = np.full((480, 640, 3), 200, dtype=np.uint8)
    batch = M2FImageProcessor()(image, return_tensors="pt")
    assert batch["pixel_values"].shape == (1, 3, 800, 1088)
    assert batch["pixel_mask"].sum(2).unique().tolist() == [1067]
    assert batch["pixel_mask"].sum(1).unique().tolist() == [0, 800]
    assert (batch["pixel_values"][..., 1067:] == 0).all()


# --- normalising and padding ---


def test_recorded_network_input(goldens):
    for variant in ("coco_panoptic_r50", "ade20k_semantic_swinl"):
        files = sorted((goldens / variant).glob("image_*.npy"))
        batch = M2FImageProcessor(do_resize=False)([np.load(file) for file in files], return_tensors="pt")
        recorded = np.load(goldens / variant / "intermediate.npz")["input"]
        assert np.array_equal(batch["pixel_values"].numpy(), recorded)


def test_normalised_then_padded(picture):
    small = picture[:20, :30]
    batch = M2FImageProcessor(do_resize=False)([picture, small], return_tensors="pt")
    assert batch.keys() == {"pixel_values", "pixel_mask"}
    assert batch["pixel_values"].dtype == torch.float32
    assert batch["pixel_mask"].dtype == torch.int64
    assert batch["pixel_values"].shape == (2, 3, 64, 64)
    for index, image in enumerate((picture, small)):
        height, width = image.shape[:2]
        values = np.moveaxis(batch["pixel_values"][index].numpy(), 0, -1)
        np.testing.assert_allclose(values[:height, :width], (image - MEAN) / STD, atol=1e-6)
        assert (values[height:] == 0).all()
        assert (values[:, width:] == 0).all()
        assert batch["pixel_mask"][index, :height, :width].all()
        assert batch["pixel_mask"][index].sum() == height * width


def test_one_image_is_the_same_alone_and_in_a_batch(processor, picture):
    alone = processor(picture, return_tensors="pt")["pixel_values"][0]
    together = processor([picture, np.zeros((80, 80, 3), np.uint8)], return_tensors="pt")["pixel_values"][0]
    assert torch.equal(together[:, :60, : alone.shape[2]], alone[:, :60])


def test_switches(picture):
    normalised = M2FImageProcessor(do_resize=False, do_rescale=False, image_mean=0, image_std=2.0)
    assert np.array_equal(normalised(picture)["pixel_values"][0][:, :37, :53], np.moveaxis(picture / 2, -1, 0))
    np.testing.assert_allclose(pixels(picture, do_rescale=True), picture / 255, rtol=1e-6)
    assert plain()(picture)["pixel_values"][0].shape == (3, 37, 53)
    assert plain(do_pad=True, size_divisor=8)(picture)["pixel_values"][0].shape == (3, 40, 56)
    fixed = plain(do_pad=True)([picture, picture[:5]], pad_size={"height": 90, "width": 96}, return_tensors="pt")
    assert fixed["pixel_values"].shape == (2, 3, 96, 96)
    per_call = M2FImageProcessor()(picture, do_resize=False)
    assert per_call["pixel_values"][0].shape == (3, 64, 64)
    square = M2FImageProcessor()(picture, size={"height": 32, "width": 64})
    assert square["pixel_values"][0].shape == (3, 32, 64)
    nearest = pixels(picture, do_resize=True, resample=Image.Resampling.NEAREST, size={"height": 74, "width": 53})
    assert np.array_equal(nearest, picture.repeat(2, axis=0))


def test_blue_green_red(picture):
    """Mean and standard deviation stand in the model's order, as in the original's configs."""
    forward = M2FImageProcessor(do_resize=False)(picture)["pixel_values"][0]
    backward = M2FImageProcessor(
        do_resize=False,
        channel_order="BGR",
        image_mean=M2FImageProcessor.image_mean[::-1],
        image_std=M2FImageProcessor.image_std[::-1],
    )(picture)["pixel_values"][0]
    assert np.array_equal(backward, forward[::-1])
    assert not np.array_equal(backward, forward)


# --- kinds of images ---


@pytest.mark.parametrize(
    "convert",
    [
        Image.fromarray,
        lambda a: a.transpose(2, 0, 1),
        lambda a: torch.from_numpy(a),
        lambda a: torch.from_numpy(a).permute(2, 0, 1),
        lambda a: a.astype(np.int64),
        lambda a: a.astype(np.float64),
        lambda a: a.astype(np.float32) / 255,
        lambda a: torch.from_numpy(a).permute(2, 0, 1).float().div(255).requires_grad_(),
        lambda a: torch.from_numpy(a).bfloat16(),
        lambda a: a.astype(np.uint16) * 257,
        lambda a: Image.fromarray(np.dstack([a, a[..., :1]])),
        lambda a: np.dstack([a, a[..., :1]]),
        lambda a: a[None],
        lambda a: [a],
        lambda a: (Image.fromarray(a),),
    ],
)
def test_every_form_of_an_image_gives_the_same_pixels(processor, picture, convert):
    expected = processor(picture)["pixel_values"][0]
    result = processor(convert(picture))["pixel_values"]
    assert len(result) == 1
    np.testing.assert_allclose(result[0], expected, atol=1e-6)


def test_grey_becomes_three_equal_channels(picture):
    grey = picture[..., 0]
    expected = np.repeat(grey[..., None], 3, axis=2)
    for image in (grey, grey[None], grey[..., None], torch.from_numpy(grey), Image.fromarray(grey)):
        assert np.array_equal(pixels(image), expected)
    assert np.array_equal(pixels(Image.merge("LA", [Image.fromarray(grey)] * 2)), expected)


def test_black_and_white():
    mask = np.eye(5, 7, dtype=bool)
    for image in (mask, Image.fromarray(mask)):
        assert np.array_equal(pixels(image)[..., 1], mask * 255)


@pytest.mark.parametrize("byte_order", ["<", ">"])
def test_a_dark_picture_of_16_bits_stays_dark(byte_order):
    """Its values would fit into 8 bits; its type says that they are not."""
    dark = np.arange(250, 215, -1).reshape(5, 7)
    assert np.array_equal(pixels(dark.astype(np.int32))[..., 0], dark)  # this type doesn't say
    assert np.array_equal(pixels(dark.astype(f"{byte_order}u2"))[..., 0], np.rint(dark / 257))


def test_a_16_bit_file_that_pillow_reads_as_32():
    """Older versions of Pillow give a 16-bit PNG the mode "I"."""
    dark = np.arange(35, dtype=np.int32).reshape(5, 7)
    image = Image.fromarray(dark)
    assert (image.mode, image.format) == ("I", None)
    assert np.array_equal(pixels(image)[..., 0], dark)
    image.format = "PNG"
    assert np.array_equal(pixels(image)[..., 0], np.rint(dark / 257))


@pytest.mark.parametrize("mode", ["P", "CMYK", "YCbCr", "HSV"])
def test_other_modes_as_pillow_converts_them(picture, mode):
    image = Image.fromarray(picture).convert(mode)
    assert np.array_equal(pixels(image), np.asarray(image.convert("RGB")))


def test_transparent_palette(picture, tmp_path):
    image = Image.fromarray(picture).convert("P")
    image.save(tmp_path / "palette.png", transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(pixels(tmp_path / "palette.png"), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(picture, tmp_path, orientation):
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    image = Image.fromarray(picture)
    exif = Image.Exif()
    exif[0x0112] = orientation
    (image if undo is None else image.transpose(undo)).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(pixels(tmp_path / "turned.png"), picture)
    with Image.open(tmp_path / "turned.png") as turned:
        assert np.array_equal(pixels(turned), picture)


def test_where_the_shape_fits_both_layouts():
    row = np.zeros((1, 7, 3), dtype=np.uint8)
    assert pixels(row).shape == (1, 7, 3)
    assert pixels(np.zeros((1, 1, 3), dtype=np.uint8)).shape == (1, 1, 3)
    assert pixels(torch.zeros(3, 7, 3, dtype=torch.uint8)).shape == (7, 3, 3)
    assert pixels(np.zeros((3, 7, 3), dtype=np.uint8)).shape == (3, 7, 3)
    channels_first = plain()(np.zeros((3, 7, 3), dtype=np.uint8), input_data_format="channels_first")
    assert channels_first["pixel_values"][0].shape == (3, 7, 3)


def test_fractions_keep_their_range_unless_rescaled(picture):
    fractions = picture.astype(np.float32) / 255
    assert np.array_equal(pixels(fractions), fractions)
    normalised = fractions * 4 - 2
    assert np.array_equal(pixels(normalised), normalised)
    resized = pixels(fractions, do_resize=True, size={"height": 74, "width": 106})
    assert 0.9 < resized.max() <= 1
    np.testing.assert_allclose(pixels(fractions, do_rescale=True), fractions, rtol=1e-6)


def test_one_pixel(processor):
    batch = processor(np.full((1, 1, 3), 9, dtype=np.uint8), return_tensors="pt")
    assert batch["pixel_values"].shape == (1, 3, 64, 64)
    assert batch["pixel_mask"].sum() == 60 * 60


# --- label maps ---


def labelled(label_map, **arguments):
    """Masks and classes of one label map, at its own size."""
    image = np.zeros((*np.shape(label_map)[:2], 3), dtype=np.uint8)
    batch = plain()(image, label_map, return_tensors="pt", **arguments)
    return batch["mask_labels"][0], batch["class_labels"][0]


def test_semantic_map():
    label_map = np.array([[3, 3, 255], [0, 255, 7]], dtype=np.uint8)
    masks, classes = labelled(label_map)
    assert (masks.dtype, classes.dtype) == (torch.bool, torch.int64)
    assert classes.tolist() == [0, 3, 7]
    assert torch.equal(masks, torch.from_numpy(label_map[None] == np.array([0, 3, 7])[:, None, None]))
    assert labelled(label_map, ignore_index=7)[1].tolist() == [0, 3, 255]
    assert labelled(label_map, ignore_index=None)[1].tolist() == [0, 3, 7, 255]


def test_reduced_labels_make_neither_0_nor_255_a_class():
    """transformers gives void, 255, the class 254."""
    masks, classes = labelled(np.array([[0, 1, 150], [255, 1, 0]], dtype=np.uint8), do_reduce_labels=True)
    assert classes.tolist() == [0, 149]
    assert masks.sum((1, 2)).tolist() == [2, 1]


def test_a_map_of_nothing_has_no_target():
    masks, classes = labelled(np.full((4, 5), 255, dtype=np.uint8))
    assert masks.shape == (0, 4, 5)
    assert (masks.dtype, classes.dtype, classes.shape) == (torch.bool, torch.int64, (0,))


IDS = np.array([[0, 255, 256, 0, 0], [70000, 2**24 - 1, 255, 0, 0]])
SEGMENTS = [
    {"id": 255, "category_id": 2},
    {"id": 256, "label_id": 1},
    {"id": 70000, "category_id": 2, "iscrowd": 1},
    {"id": 2**24 - 1, "category_id": 2, "iscrowd": 0},
]


def coloured(ids):
    return np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)


@pytest.mark.parametrize(
    "convert",
    [
        lambda ids: ids,
        lambda ids: ids.astype(np.float64),
        lambda ids: torch.from_numpy(ids),
        lambda ids: ids[None],
        lambda ids: Image.fromarray(ids.astype(np.int32)),
        coloured,
        lambda ids: coloured(ids).transpose(2, 0, 1),
        lambda ids: Image.fromarray(coloured(ids)),
    ],
)
def test_panoptic_maps_of_every_form(convert):
    image = np.zeros((2, 5, 3), dtype=np.uint8)
    for segments in (SEGMENTS, [SEGMENTS]):
        batch = plain()(image, convert(IDS), segments_info=segments)
        assert batch["class_labels"][0].tolist() == [2, 1, 2]  # 255 is an id here, the crowd is left out
        assert np.array_equal(batch["mask_labels"][0], IDS[None] == np.array([255, 256, 2**24 - 1])[:, None, None])


def test_instance_ids_to_classes():
    ids = np.array([[0, 1, 2], [300, 300, 255]])
    classes = {1: 5, 2: 5, 300: 4, 255: 3}
    expected = [5, 5, 3, 4]
    assert labelled(ids, instance_id_to_semantic_id=classes)[1].tolist() == expected
    assert labelled(ids, instance_id_to_semantic_id=[classes])[1].tolist() == expected
    reduced = labelled(ids, instance_id_to_semantic_id=classes | {1: 0, 2: 255}, do_reduce_labels=True)
    assert reduced[1].tolist() == [2, 3]


def test_labels_follow_the_image(processor, picture):
    label_map = np.random.default_rng(1).integers(0, 3, picture.shape[:2])
    batch = processor([picture, picture[:20]], [label_map, label_map[:20]], return_tensors="pt")
    assert batch["pixel_values"].shape[-2:] == (64, 96)
    nearest = np.asarray(Image.fromarray(label_map.astype(np.uint8)).resize((86, 60), Image.Resampling.NEAREST))
    masks = batch["mask_labels"][0]
    assert masks.shape == (3, 64, 96)
    assert torch.equal(masks[:, :60, :86], torch.from_numpy(nearest[None] == np.arange(3)[:, None, None]))
    assert not masks[:, 60:].any()
    assert not masks[..., 86:].any()
    assert torch.equal(masks.any(0).long(), batch["pixel_mask"][0])
    assert torch.equal(batch["mask_labels"][1].any(0).long(), batch["pixel_mask"][1])


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy, lambda a: a.astype(np.float32), lambda a: a * 255])
def test_ready_masks(processor, picture, kind):
    masks = np.random.default_rng(3).random((2, 37, 53)) < 0.5
    batch = processor(picture, mask_labels=[kind(masks)], class_labels=[[4, 4]], return_tensors="pt")
    assert batch["class_labels"][0].tolist() == [4, 4]
    assert torch.equal(batch["mask_labels"][0][:, :60, :86], torch.from_numpy(resize_labels(masks, (60, 86))))
    assert batch["mask_labels"][0].dtype == torch.bool


def test_recorded_panoptic_photos(shared):
    """COCO's own files at full size: the areas are those that the annotations say."""
    folder = shared / "data" / "coco_panoptic"
    annotations = json.loads((folder / "panoptic.json").read_text())
    assert len(annotations["annotations"]) == 2
    for annotation in annotations["annotations"]:
        name = annotation["file_name"].removesuffix(".png")
        batch = M2FImageProcessor(do_resize=False)(
            folder / "images" / f"{name}.jpg",
            folder / "panoptic" / f"{name}.png",
            segments_info=annotation["segments_info"],
        )
        kept = sorted((s for s in annotation["segments_info"] if not s["iscrowd"]), key=lambda segment: segment["id"])
        assert len(kept) < len(annotation["segments_info"]) or annotation["image_id"] == 142238
        assert batch["mask_labels"][0].sum((1, 2)).tolist() == [segment["area"] for segment in kept]
        assert batch["class_labels"][0].tolist() == [segment["category_id"] for segment in kept]


def test_recorded_semantic_photos(shared):
    folder = shared / "data" / "ade20k"
    for photo in sorted(folder.glob("*.jpg")):
        label_file = folder / "annotations" / f"{photo.stem}.png"
        batch = M2FImageProcessor(do_resize=False, do_reduce_labels=True)(photo, label_file, num_labels=150)
        labels = np.asarray(Image.open(label_file))
        present = np.unique(labels[labels > 0]) - 1
        assert batch["class_labels"][0].tolist() == present.tolist()
        assert batch["mask_labels"][0].sum() == (labels > 0).sum()


def test_agrees_with_transformers_where_it_is_right():
    """Instance ids below 255, no padding, no resizing."""
    stock = pytest.importorskip("transformers.models.mask2former.image_processing_pil_mask2former")
    image = np.random.default_rng(4).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    ids = np.random.default_rng(5).integers(0, 5, (64, 96)).astype(np.int32)
    arguments = {
        "images": [image],
        "segmentation_maps": [ids],
        "instance_id_to_semantic_id": {0: 3, 1: 7, 2: 7, 3: 1, 4: 255},
        "ignore_index": 255,
        "do_resize": False,
        "return_tensors": "pt",
    }
    theirs = stock.Mask2FormerImageProcessorPil()(**arguments)
    ours = M2FImageProcessor()(**arguments)
    assert ours.keys() == theirs.keys()
    torch.testing.assert_close(ours["pixel_values"], theirs["pixel_values"], atol=1e-6, rtol=0)
    assert torch.equal(ours["pixel_mask"], theirs["pixel_mask"])
    assert theirs["class_labels"][0].tolist() == [3, 7, 7, 1, 255]
    assert ours["class_labels"][0].tolist() == [3, 7, 7, 1]  # its class is the one to ignore
    assert torch.equal(ours["mask_labels"][0], theirs["mask_labels"][0][:4].bool())


# --- saved settings ---


@pytest.fixture
def warned():
    """What transformers and we log from level warning up."""
    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    root = transformers_logging.get_logger("transformers")
    root.addHandler(handler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield records
    root.removeHandler(handler)


SETTINGS = {
    "task": "instance",
    "label_ids_to_fuse": [3, 5],
    "threshold": 0.1,
    "instance_threshold": 0.2,
    "mask_threshold": 0.3,
    "overlap_mask_area_threshold": 0.4,
    "max_detections": 7,
    "semantic_resize_before_inference": False,
    "size": {"shortest_edge": 20, "longest_edge": 70},
    "size_divisor": 16,
    "ignore_index": 65,
    "do_reduce_labels": True,
    "channel_order": "BGR",
}
DEFAULTS = {"label_ids_to_fuse": None, "semantic_resize_before_inference": None}


@pytest.mark.parametrize("settings", [SETTINGS, DEFAULTS], ids=["settings", "defaults"])
def test_saved_and_loaded(settings, tmp_path, warned, picture):
    processor = M2FImageProcessor(**settings)
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert {name: saved.get(name) for name in settings} == settings
    assert saved["image_processor_type"] == "M2FImageProcessor"
    loaded = M2FImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    assert loaded.label_ids_to_fuse == settings["label_ids_to_fuse"]
    assert np.array_equal(loaded(picture)["pixel_values"], processor(picture)["pixel_values"])
    changed = M2FImageProcessor.from_pretrained(tmp_path, task="semantic", threshold=0.5, size_divisor=8)
    assert (changed.task, changed.threshold, changed.size_divisor) == ("semantic", 0.5, 8)
    assert changed.max_detections == processor.max_detections
    assert warned == []


PLAIN_MASKS = np.array([[[1, 0], [0, 0]], [[0, 0], [0, 1]]])


@pytest.mark.parametrize(
    ("masks", "classes"),
    [
        (PLAIN_MASKS, [3, 1]),
        (PLAIN_MASKS, [[3, 1]]),
        ([PLAIN_MASKS], [3, 1]),
        ([PLAIN_MASKS], [[3, 1]]),
        ([PLAIN_MASKS], [np.array([3, 1])]),
        (PLAIN_MASKS.tolist(), [3, 1]),
        ([PLAIN_MASKS.tolist()], [[3, 1]]),
        (list(PLAIN_MASKS), (3, 1)),
        (list(torch.from_numpy(PLAIN_MASKS)), torch.tensor([3, 1])),
    ],
)
def test_masks_and_classes_as_plain_lists(masks, classes):
    """With a list around the one image's, and without."""
    batch = M2FImageProcessor(do_resize=False, do_pad=False)(
        np.zeros((2, 2, 3), np.uint8), mask_labels=masks, class_labels=classes
    )
    assert np.array_equal(batch["mask_labels"][0], PLAIN_MASKS.astype(bool))
    assert batch["class_labels"][0].tolist() == [3, 1]
    assert batch["class_labels"][0].dtype == np.int64


def test_plain_lists_for_two_images_and_for_none():
    processor = M2FImageProcessor(do_resize=False, do_pad=False)
    picture = np.zeros((2, 2, 3), np.uint8)
    batch = processor(
        [picture, picture], mask_labels=[PLAIN_MASKS.tolist(), PLAIN_MASKS[:1].tolist()], class_labels=[[0, 1], [2]]
    )
    assert [labels.tolist() for labels in batch["class_labels"]] == [[0, 1], [2]]
    assert [len(masks) for masks in batch["mask_labels"]] == [2, 1]
    batch = processor(picture, mask_labels=PLAIN_MASKS[:0], class_labels=[])
    assert batch["mask_labels"][0].shape == (0, 2, 2)
    assert batch["class_labels"][0].shape == (0,)


def test_the_number_of_classes_is_checked_but_not_saved():
    processor = plain(num_labels=4)
    with pytest.raises(ValueError, match="class 4 is out of range"):
        processor(np.zeros((1, 5, 3), dtype=np.uint8), np.array([[0, 1, 2, 3, 4]]))
    assert "num_labels" not in processor.to_dict()


def test_names():
    """`AutoImageProcessor` finds classes by name, so ours must not have transformers'."""
    assert Mask2FormerImageProcessor is M2FImageProcessor
    assert M2FImageProcessor.__name__ == "M2FImageProcessor"


STOCK = {
    "_max_size": 1333,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "ignore_index": 255,
    "image_mean": [0.48500001430511475, 0.4560000002384186, 0.4059999883174896],
    "image_processor_type": "Mask2FormerImageProcessor",
    "image_std": [0.2290000021457672, 0.2240000069141388, 0.22499999403953552],
    "num_labels": 133,
    "reduce_labels": False,
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "size": {"longest_edge": 1333, "shortest_edge": 800},
    "size_divisor": 32,
}


@pytest.mark.parametrize(
    ("changes", "size", "divisor", "reduces"),
    [
        ({}, {"shortest_edge": 800, "longest_edge": 1333}, 32, False),
        ({"reduce_labels": True, "size_divisor": 0}, {"shortest_edge": 800, "longest_edge": 1333}, 32, True),
        ({"size": {"height": 384, "width": 384}}, {"height": 384, "width": 384}, 32, False),
        (
            {"size": 640, "max_size": 2560, "do_reduce_labels": True},
            {"shortest_edge": 640, "longest_edge": 2560},
            32,
            1,
        ),
        ({"ignore_index": None, "size_divisor": 64}, {"shortest_edge": 800, "longest_edge": 1333}, 64, False),
        ({"size": 512, "_max_size": 2048}, {"shortest_edge": 512, "longest_edge": 2048}, 32, False),
        ({"size": 512, "_max_size": None}, {"shortest_edge": 512, "longest_edge": 1333}, 32, False),
    ],
)
def test_settings_of_transformers_processor(tmp_path, warned, picture, changes, size, divisor, reduces):
    stock = STOCK | changes
    if "do_reduce_labels" in changes:
        del stock["reduce_labels"]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stock))
    processor = M2FImageProcessor.from_pretrained(tmp_path)
    assert dict(processor.size) == size
    assert processor.size_divisor == divisor
    assert processor.do_reduce_labels == reduces
    assert processor.ignore_index == 255
    saved = processor.to_dict()
    assert saved["image_processor_type"] == "M2FImageProcessor"
    assert saved.keys().isdisjoint({"num_labels", "_max_size", "max_size", "reduce_labels"})
    values = processor(picture, do_resize=False)["pixel_values"][0][:, :37, :53]
    np.testing.assert_allclose(values, ((picture - MEAN) / STD).transpose(2, 0, 1), atol=2e-6)
    assert warned == []


def test_settings_saved_by_transformers_processor(tmp_path, warned):
    stock = pytest.importorskip("transformers.models.mask2former.image_processing_pil_mask2former")
    stock.Mask2FormerImageProcessorPil(ignore_index=255, num_labels=19).save_pretrained(tmp_path)
    processor = M2FImageProcessor.from_pretrained(tmp_path)
    assert dict(processor.size) == {"shortest_edge": 800, "longest_edge": 1333}
    assert warned == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "depth"}, "panoptic, instance, semantic"),
        ({"channel_order": "RBG"}, "RGB or BGR"),
        ({"threshold": 80}, "threshold 80 is not a probability"),
        ({"max_detections": 0}, "max_detections must be at least 1"),
        ({"size_divisor": -1}, "size_divisor must be at least 1"),
        ({"do_center_crop": True, "crop_size": 8}, "crop images and label maps before"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        M2FImageProcessor(**settings)


# --- bad input ---


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((1, 20000, 3), np.uint8), "1x20000 pixels is too elongated.*longest_edge"),
        (np.full((4, 4, 3), np.nan), "NaN or infinite"),
        (np.full((4, 4, 3), np.inf, dtype=np.float16), "NaN or infinite"),
        (torch.full((3, 4, 4), torch.nan), "NaN or infinite"),
        (Image.fromarray(np.full((4, 4), np.nan, dtype=np.float32)), "NaN or infinite"),
        (np.full((4, 4, 3), -1.5), "before it is normalised"),
        (np.full((4, 4, 3), 300.0), "0 to 1 or 0 to 255"),
        (np.full((4, 4, 3), -1), "0 to 65535"),
        (np.full((4, 4, 3), "a"), "no pixel values"),
        (np.zeros((5, 4, 5)), "no axis of 1, 3 or 4 channels"),
        (np.zeros((4,)), "2 or 3 dimensions"),
        (np.zeros((0, 4, 3)), "no pixels"),
        ({"image": 1}, "dict is not an image"),
        (None, "NoneType is not an image"),
        ([], "the list is empty"),
    ],
)
def test_bad_images(image, message):
    with pytest.raises(ValueError, match=message):
        M2FImageProcessor()(image)


def test_bad_files(tmp_path, picture):
    text, cut = tmp_path / "text.jpg", tmp_path / "cut.jpg"
    text.write_text("not an image")
    Image.fromarray(picture).resize((400, 300)).save(cut)
    cut.write_bytes(cut.read_bytes()[:3000])
    for path in (text, cut, str(cut)):
        with pytest.raises(ValueError, match=rf"{path}.*cannot be read as an image.*save it again"):
            M2FImageProcessor()(path)
    with pytest.raises(FileNotFoundError, match="there is no image file"):
        M2FImageProcessor()(tmp_path / "missing.jpg")
    with pytest.raises(FileNotFoundError, match="there is no image file"):
        M2FImageProcessor()(tmp_path)


@pytest.mark.parametrize("address", ["data:image/png;base64,AAAA", "http://127.0.0.1:9/photo.jpg"])
def test_bad_addresses(address):
    with pytest.raises(ValueError, match=r"no image could be fetched from .*pass its path"):
        M2FImageProcessor()(address)


def test_the_error_names_the_image_of_the_batch(picture):
    with pytest.raises(ValueError, match=r"image 1 of the batch: .*NaN"):
        M2FImageProcessor()([picture, np.full((4, 4, 3), np.nan)])


ZEROS = np.zeros((2, 3, 3), dtype=np.uint8)
MAP = np.zeros((2, 3), dtype=np.int64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"segmentation_maps": np.zeros((3, 2), int)}, "3x2 pixels, the image 2x3.*nearest"),
        ({"segmentation_maps": [MAP, MAP]}, "2 segmentation maps for 1 images"),
        ({"segmentation_maps": MAP + 0.5}, "whole numbers"),
        ({"segmentation_maps": np.full((2, 3), np.nan)}, "whole numbers"),
        ({"segmentation_maps": np.zeros((2, 3, 5, 1), int)}, r"\(H, W\)"),
        ({"segmentation_maps": np.full((2, 3, 3), 7, np.uint8)}, "segments_info or instance_id_to_semantic_id"),
        ({"segmentation_maps": Image.new("LAB", (3, 2))}, "mode LAB"),
        ({"segmentation_maps": MAP - 1}, "class -1 is out of range"),
        ({"segmentation_maps": MAP + 4, "num_labels": 4}, "class 4 is out of range.*0 to 3.*ignore_index"),
        ({"segmentation_maps": MAP + 9, "segments_info": [{"id": 8, "category_id": 0}]}, r"without a class: \[9\]"),
        ({"segmentation_maps": MAP + 9, "instance_id_to_semantic_id": {}}, r"without a class: \[9\]"),
        ({"segmentation_maps": MAP + 9, "segments_info": [{"id": 9, "category_id": 4}], "num_labels": 4}, "class 4 is"),
        ({"segmentation_maps": MAP + 9, "segments_info": [{"id": 9, "category_id": "cat"}]}, "unknown class 'cat'"),
        ({"segmentation_maps": MAP + 9, "segments_info": [{"id": 9, "category_id": -2}]}, "unknown class -2"),
        ({"segmentation_maps": MAP + 9, "segments_info": [{"id": 9}]}, "needs `id` and `category_id`"),
        ({"segmentation_maps": MAP, "segments_info": [{"id": 9, "label_id": 1}] * 2}, "id 9 twice"),
        ({"segmentation_maps": MAP, "segments_info": [[], []]}, "2 segments_info for 1 images"),
        ({"segmentation_maps": MAP, "segments_info": [], "instance_id_to_semantic_id": {}}, "not both"),
        ({"segmentation_maps": MAP, "mask_labels": [MAP[None]]}, "not both"),
        ({"segments_info": []}, "classes without masks"),
        ({"mask_labels": [MAP[None]]}, "mask_labels without class_labels"),
        ({"mask_labels": [MAP[None]], "class_labels": [[1, 2]]}, "do not fit"),
        ({"mask_labels": [MAP[None]], "class_labels": [[1.5]]}, "whole numbers"),
        ({"mask_labels": [MAP[None, :, :2]], "class_labels": [[1]]}, "2x2 pixels, the image 2x3"),
        ({"mask_labels": [MAP[None]], "class_labels": [[-1]]}, "class -1 is out of range"),
    ],
)
def test_bad_labels(arguments, message):
    with pytest.raises(ValueError, match=message):
        M2FImageProcessor()(ZEROS, **arguments)


def test_label_map_in_another_orientation_is_refused(picture):
    """The image is turned upright, its label map has no EXIF of its own."""
    image = Image.fromarray(picture)
    image.getexif()[0x0112] = 6
    assert ImageOps.exif_transpose(image).size == (37, 53)
    with pytest.raises(ValueError, match="upright"):
        M2FImageProcessor()(image, np.zeros(picture.shape[:2], int))
