"""Data sets are read in place, in every supported layout; all their errors are reported at once."""

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from m2f_hf import M2FImageProcessor
from m2f_hf.data import (
    CocoInstanceDataset,
    CocoPanopticDataset,
    DatasetError,
    check_dataset,
    decode_segmentation,
    open_dataset,
    segment_masks,
)
from m2f_hf.data.base import read_image
from m2f_hf.data.categories import find_name_file, read_labels
from m2f_hf.data.packed import PackedList
from m2f_hf.known.label_sets import label_set
from m2f_hf.processing.rle import encode_rle
from m2f_hf.processing.segment_ids import id_to_rgb


HEIGHT, WIDTH = 12, 16


# --- tiny data sets ---


def write_image(path: Path, seed: int = 0, size: tuple[int, int] = (HEIGHT, WIDTH)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_map(path: Path, values, mode: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(values))
    if mode == "P":
        image.putpalette(list(range(255, -1, -1)) * 3)
    image.save(path)


def label_map(seed: int, values) -> np.ndarray:
    """A map (HEIGHT, WIDTH) in which each of the values occurs."""
    drawn = np.random.default_rng(seed).choice(values, (HEIGHT, WIDTH))
    drawn.ravel()[: len(values)] = values
    return drawn.astype(np.uint8 if max(values) < 256 else np.uint16)


SQUARE = [[2.0, 2.0, 8.0, 2.0, 8.0, 8.0, 2.0, 8.0]]  # x 2..8, y 2..8
INNER = [[4.0, 4.0, 6.0, 4.0, 6.0, 6.0, 4.0, 6.0]]


def coco_content(names=("a.png", "b.png", "empty.png"), ids=(7, 3)) -> dict:
    """Two overlapping instances and a crowd, categories with ids that are neither contiguous nor in order."""
    crowd = {"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT, HEIGHT * (WIDTH - 1)]}  # the first column
    annotations = [
        {"id": 11, "image_id": 1, "category_id": ids[0], "segmentation": SQUARE, "iscrowd": 0, "area": 36.0},
        {"id": 300, "image_id": 1, "category_id": ids[1], "segmentation": INNER, "iscrowd": 0, "area": 4.0},
        {"id": 13, "image_id": 2, "category_id": ids[1], "segmentation": crowd, "iscrowd": 1},
        {"id": 14, "image_id": 2, "category_id": ids[1], "segmentation": SQUARE, "iscrowd": 0},
    ]
    return {
        "images": [
            {"id": index, "file_name": name, "height": HEIGHT, "width": WIDTH} for index, name in enumerate(names, 1)
        ],
        "annotations": annotations,
        "categories": [{"id": ids[0], "name": "plate"}, {"id": ids[1], "name": "apple"}],
    }


def write_coco(annotation_file: Path, image_folder: Path, content: dict | None = None) -> dict:
    content = coco_content() if content is None else content
    for index, image in enumerate(content["images"]):
        write_image(image_folder / image["file_name"], index)
    annotation_file.parent.mkdir(parents=True, exist_ok=True)
    annotation_file.write_text(json.dumps(content))
    return content


def write_panoptic(annotation_file: Path, image_folder: Path, map_folder: Path) -> dict[str, np.ndarray]:
    """Two images of two things, one crowd, stuff and void, with ids beyond 255; returns the maps of ids."""
    categories = [
        {"id": 5, "name": "dog", "isthing": 1, "color": [1, 2, 3]},
        {"id": 2, "name": "sky", "isthing": 0, "color": [4, 5, 6]},
        {"id": 9, "name": "cat", "isthing": 1, "color": [7, 8, 9]},
    ]
    images, annotations, maps = [], [], {}
    for index in (1, 2):
        ids = np.zeros((HEIGHT, WIDTH), dtype=np.int32)
        ids[:4], ids[4:8, :4], ids[4:8, 4:8], ids[8:, :5] = 70000, 256, 3, 999
        segments = [
            {"id": 70000, "category_id": 2, "iscrowd": 0},
            {"id": 256, "category_id": 5, "iscrowd": 0},
            {"id": 3, "category_id": 5},
            {"id": 999, "category_id": 9, "iscrowd": 1},
        ]
        write_image(image_folder / f"{index}.jpg", index)
        write_map(map_folder / f"{index}.png", id_to_rgb(ids))
        images.append({"id": index, "file_name": f"{index}.jpg", "height": HEIGHT, "width": WIDTH})
        annotations.append({"image_id": index, "file_name": f"{index}.png", "segments_info": segments})
        maps[f"{index}.jpg"] = ids
    annotation_file.parent.mkdir(parents=True, exist_ok=True)
    content = {"images": images, "annotations": annotations, "categories": categories}
    annotation_file.write_text(json.dumps(content))
    return maps


# --- packed lists ---


def test_a_packed_list_holds_two_arrays_and_gives_its_values_back():
    values = [{"a": [1, 2.5]}, "ä", [], {"b": None}]
    packed = PackedList(values)
    assert list(packed) == values and packed[-1] == values[-1] and packed[1:3] == values[1:3]
    assert list(pickle.loads(pickle.dumps(packed))) == values
    assert all(isinstance(value, np.ndarray) for value in vars(packed).values())
    assert list(PackedList([])) == []
    with pytest.raises(IndexError):
        packed[4]


# --- COCO instances ---


@pytest.mark.parametrize(
    ("annotation_file", "images"),
    [
        ("annotations/instances_train2017.json", "train2017"),
        ("annotations/instances_train2017.json", "images/train2017"),
        ("annotations/ade20k_instance_train.json", "images/training"),
        ("labels.json", "."),
        ("labels.json", "images"),
        ("train/_annotations.coco.json", "train"),
    ],
)
def test_coco_instances_in_every_layout(tmp_path, annotation_file, images):
    write_coco(tmp_path / annotation_file, tmp_path / images)
    for source in (tmp_path, tmp_path / annotation_file):
        found = open_dataset(source, held_out=0)
        assert found.task == "instance" and len(found.train) == 3
        assert [(c["id"], c["name"], c["isthing"], c["dataset_id"]) for c in found.categories] == [
            (0, "apple", True, 3),
            (1, "plate", True, 7),
        ]
        item = found.train[0]
        expected = np.asarray(Image.open(tmp_path / images / "a.png"))
        assert np.array_equal(np.asarray(item["image"]), expected)
        assert Path(item["file_name"]) == tmp_path / images / "a.png" and item["image_id"] == 1


def test_instances_overlap_crowds_stay_crowds_and_empty_images_stay(tmp_path):
    write_coco(tmp_path / "labels.json", tmp_path)
    dataset = CocoInstanceDataset(tmp_path / "labels.json")
    first, second, third = (dataset.annotation(index) for index in range(3))
    plate, apple = segment_masks(first)
    assert plate.sum() == 36 and apple.sum() == 4 and (plate & apple).sum() == 4
    assert [segment["category_id"] for segment in first["segments_info"]] == [1, 0]
    assert [segment["id"] for segment in first["segments_info"]] == [11, 300]
    assert [segment["iscrowd"] for segment in second["segments_info"]] == [1, 0]
    assert segment_masks(second)[0].sum() == HEIGHT and segment_masks(second)[0][:, 0].all()
    assert third["segments_info"] == [] and segment_masks(third).shape == (0, HEIGHT, WIDTH)
    assert "image" not in first and (first["height"], first["width"]) == (HEIGHT, WIDTH)
    with pytest.raises(IndexError, match="0 to 2"):
        dataset[3]


def test_instances_become_semantic_with_the_smaller_on_top(tmp_path):
    write_coco(tmp_path / "labels.json", tmp_path)
    found = open_dataset(tmp_path, task="semantic", held_out=0)
    item = found.train.annotation(0)
    expected = np.zeros((HEIGHT, WIDTH), dtype=int)
    expected[2:8, 2:8], expected[4:6, 4:6] = 2, 1
    assert np.array_equal(item["segmentation_map"], expected)
    assert [(s["id"], s["category_id"], s["area"]) for s in item["segments_info"]] == [(1, 0, 4), (2, 1, 32)]
    with pytest.raises(ValueError, match="no stuff"):
        open_dataset(tmp_path, task="panoptic")


def test_detections_of_stuff_are_no_instances(shared):
    """The sample's masks, written as detections, are those of its PNGs; its stuff has no instances."""
    folder = shared / "data" / "coco_panoptic"
    found = open_dataset(folder, task="instance", held_out=0)
    maps = open_dataset(folder, held_out=0).train
    assert len(found.categories) == 80 and all(category["isthing"] for category in found.categories)
    for index in range(2):
        item, panoptic = found.train[index], maps.annotation(index)
        assert item["image_id"] == panoptic["image_id"]
        things = panoptic["segments_info"], segment_masks(panoptic)
        expected = {s["area"]: mask for s, mask in zip(*things, strict=True) if s["isthing"]}
        masks = segment_masks(item)
        assert len(masks) == len(expected)
        for segment, mask in zip(item["segments_info"], masks, strict=True):
            assert np.array_equal(mask, expected[segment["area"]])


# --- COCO panoptic ---


@pytest.mark.parametrize(
    ("annotation_file", "images", "maps"),
    [
        ("annotations/panoptic_val2017.json", "val2017", "annotations/panoptic_val2017"),
        ("annotations/panoptic_val2017.json", "val2017", "panoptic_val2017"),
        ("panoptic.json", "images", "panoptic"),
        ("ade20k_panoptic_train.json", "images/training", "ade20k_panoptic_train"),
        ("train/panoptic.json", "train/images", "train/panoptic"),
    ],
)
def test_panoptic_maps_in_every_layout(tmp_path, annotation_file, images, maps):
    expected = write_panoptic(tmp_path / annotation_file, tmp_path / images, tmp_path / maps)
    found = open_dataset(tmp_path, held_out=0)
    assert found.task == "panoptic" and len(found.train) == 2
    assert [category["name"] for category in found.categories] == ["sky", "dog", "cat"]
    assert [category["isthing"] for category in found.categories] == [False, True, True]
    item = found.train[1]
    assert np.array_equal(item["segmentation_map"], expected["2.jpg"]) and item["segmentation_map"].dtype == np.int32
    assert [(s["id"], s["category_id"], s["iscrowd"], s["isthing"]) for s in item["segments_info"]] == [
        (70000, 0, 0, False),
        (256, 1, 0, True),
        (3, 1, 0, True),
        (999, 2, 1, True),
    ]
    assert segment_masks(item).sum(axis=(1, 2)).tolist() == [64, 16, 16, 20]


def test_panoptic_maps_do_for_the_other_tasks(tmp_path):
    write_panoptic(tmp_path / "panoptic.json", tmp_path / "images", tmp_path / "panoptic")
    instance = open_dataset(tmp_path, task="instance", held_out=0)
    assert [(c["id"], c["name"]) for c in instance.categories] == [(0, "dog"), (1, "cat")]
    item = instance.train.annotation(0)
    assert [(s["id"], s["category_id"], s["iscrowd"]) for s in item["segments_info"]] == [
        (256, 0, 0),
        (3, 0, 0),
        (999, 1, 1),
    ]
    assert instance.report.splits[0].counts.tolist() == [4, 0] and instance.report.splits[0].num_crowds == 2

    semantic = open_dataset(tmp_path, task="semantic", held_out=0)
    item = semantic.train.annotation(0)
    # Crowds are pixels of their class, as in the original's semantic maps.
    assert [(s["id"], s["category_id"], s["area"]) for s in item["segments_info"]] == [
        (1, 0, 64),
        (2, 1, 32),
        (3, 2, 20),
    ]
    assert item["segmentation_map"][5, 2] == 2 and item["segmentation_map"][11, 15] == 0
    assert semantic.report.splits[0].counts.tolist() == [2, 2, 2]


# --- label maps ---


def test_ade20k_is_recognised_by_file_names(tmp_path):
    for split, name in (("training", "ADE_train_00000001"), ("validation", "ADE_val_00000001")):
        write_image(tmp_path / "images" / split / f"{name}.jpg")
        write_map(tmp_path / "annotations" / split / f"{name}.png", label_map(0, [0, 1, 150]))
    found = open_dataset(tmp_path)
    assert len(found.train) == len(found.validation) == 1 and found.task == "semantic"
    assert len(found.categories) == 150 and found.categories[0]["name"] == "wall"
    assert found.categories[0]["color"] == [120, 120, 120]
    item = found.train[0]
    assert [segment["category_id"] for segment in item["segments_info"]] == [0, 149]
    assert np.array_equal(item["segmentation_map"], label_map(0, [0, 1, 150]))
    assert "0 is 'other'" in str(found.report)


def test_the_ade20k_sample_keeps_its_pixels(shared):
    folder = shared / "data" / "ade20k"
    found = open_dataset(folder, held_out=0)
    for index in range(3):
        item = found.train[index]
        raw = np.asarray(Image.open(folder / "annotations" / f"{Path(item['file_name']).stem}.png"))
        assert np.array_equal(item["segmentation_map"], raw)  # class + 1, as the files have it
        assert item["image"].size == (raw.shape[1], raw.shape[0])


def cityscapes(tmp_path: Path, kinds: dict[str, np.ndarray]) -> None:
    for split in ("train", "val"):
        write_image(tmp_path / "leftImg8bit" / split / "aachen" / "aachen_000000_000019_leftImg8bit.png")
        for kind, values in kinds.items():
            write_map(tmp_path / "gtFine" / split / "aachen" / f"aachen_000000_000019_gtFine_{kind}.png", values)
        write_map(
            tmp_path / "gtFine" / split / "aachen" / "aachen_000000_000019_gtFine_color.png",
            np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8),
        )


def test_cityscapes_label_ids_equal_train_ids(tmp_path):
    ids = label_map(0, [0, 7, 26, 33])
    table = np.full(256, 255, dtype=np.uint8)
    table[[7, 26, 33]] = [0, 13, 18]
    cityscapes(tmp_path / "ids", {"labelIds": ids})
    cityscapes(tmp_path / "train_ids", {"labelIds": ids, "labelTrainIds": table[ids]})
    by_ids, by_train_ids = open_dataset(tmp_path / "ids"), open_dataset(tmp_path / "train_ids")
    assert [c["name"] for c in by_ids.categories] == list(label_set("cityscapes-semantic").id2label.values())
    assert [c["name"] for c in by_ids.categories] == [c["name"] for c in by_train_ids.categories]
    expected = np.where(table[ids] == 255, 0, table[ids].astype(int) + 1)
    for found in (by_ids, by_train_ids):
        assert np.array_equal(found.train[0]["segmentation_map"], expected)
        assert found.train[0]["file_name"].endswith("train/aachen/aachen_000000_000019_leftImg8bit.png")


def test_cityscapes_instance_maps_give_things_stuff_and_groups(tmp_path):
    numbers = label_map(0, [3, 7, 26, 26000, 26001, 33000])
    cityscapes(tmp_path, {"instanceIds": numbers, "labelIds": (numbers % 256).astype(np.uint8)})
    panoptic = open_dataset(tmp_path, task="panoptic")
    item = panoptic.train[0]
    assert [(panoptic.categories[s["category_id"]]["name"], s["iscrowd"]) for s in item["segments_info"]] == [
        ("road", 0),
        ("car", 1),
        ("car", 0),
        ("car", 0),
        ("bicycle", 0),
    ]
    for mask, number in zip(segment_masks(item), [7, 26, 26000, 26001, 33000], strict=True):
        assert np.array_equal(mask, numbers == number)
    instance = open_dataset(tmp_path, task="instance")
    assert len(instance.categories) == 8 and len(instance.train[0]["segments_info"]) == 4


def test_mapillary_reads_names_from_its_config(tmp_path):
    labels = [
        {"name": "animal--bird", "readable": "Bird", "instances": True, "color": [1, 2, 3], "evaluate": True},
        {"name": "construction--curb", "readable": "Curb", "instances": False, "color": [4, 5, 6], "evaluate": True},
        {"name": "void--unlabeled", "readable": "Unlabeled", "instances": False, "color": [0, 0, 0], "evaluate": False},
    ]
    (tmp_path / "config_v1.2.json").write_text(json.dumps({"labels": labels}))
    for split in ("training", "validation"):
        write_image(tmp_path / split / "images" / "x.jpg")
        write_map(tmp_path / split / "v1.2" / "labels" / "x.png", label_map(0, [0, 1, 2]), mode="P")
    found = open_dataset(tmp_path)
    assert [(c["name"], c["isthing"], c["color"]) for c in found.categories] == [
        ("Bird", True, [1, 2, 3]),
        ("Curb", False, [4, 5, 6]),
    ]
    assert np.array_equal(found.train[0]["segmentation_map"], np.array([1, 2, 0])[label_map(0, [0, 1, 2])])


def test_mapillary_instance_maps(tmp_path):
    numbers = label_map(0, [0, 1, 2 * 256, 65 * 256])  # two birds, a curb, unlabelled
    for split in ("training", "validation"):
        write_image(tmp_path / split / "images" / "x.jpg")
        write_map(tmp_path / split / "v1.2" / "labels" / "x.png", (numbers // 256).astype(np.uint8))
        write_map(tmp_path / split / "v1.2" / "instances" / "x.png", numbers)
    found = open_dataset(tmp_path, task="panoptic")
    item = found.train[0]
    names = [found.categories[segment["category_id"]]["name"] for segment in item["segments_info"]]
    assert names == ["Bird", "Bird", "Curb"] and not any(s["iscrowd"] for s in item["segments_info"])


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("images/{name}.jpg", "masks/{name}.png"),
        ("images/{name}.jpg", "masks/{name}_mask.png"),
        ("images/train/{name}.jpg", "masks/train/{name}.png"),
        ("train/images/{name}.jpg", "train/masks/{name}.png"),
        ("train/{name}.jpg", "train_labels/{name}_L.png"),
        ("train_images/{name}.jpg", "train_masks/{name}.png"),
        ("{name}.jpg", "annotations/{name}.png"),
        ("train/{name}.jpg", "train/{name}_mask.png"),
        ("JPEGImages/{name}.jpg", "SegmentationClass/{name}.png"),
        ("images/{name}.jpg", "labels/{name}.jpg.png"),
        ("images/{name}.jpg", "annotations/trimaps/{name}.png"),
    ],
)
def test_images_and_masks_in_every_layout(tmp_path, image, mask):
    for index, name in enumerate(("b", "a")):
        write_image(tmp_path / image.format(name=name), index)
        write_map(tmp_path / mask.format(name=name), label_map(index, [0, 1, 255]))
    (tmp_path / "classes.txt").write_text("ground\ntree\n")
    found = open_dataset(tmp_path, held_out=0)
    assert len(found.train) == 2 and [c["name"] for c in found.categories] == ["ground", "tree"]
    item = found.train[1]
    assert item["file_name"] == str(tmp_path / image.format(name="b"))
    expected = label_map(0, [0, 1, 255]).astype(int) + 1
    assert np.array_equal(item["segmentation_map"], np.where(expected == 256, 0, expected))


def pair_folder(root: Path, values, names=("a", "b"), **options) -> Path:
    for index, name in enumerate(names):
        write_image(root / "images" / f"{name}.jpg", index)
        write_map(root / "masks" / f"{name}.png", label_map(index, values), **options)
    return root


def test_pascal_voc_lists_define_the_splits(tmp_path):
    for index, name in enumerate(("a", "b", "c")):
        write_image(tmp_path / "JPEGImages" / f"{name}.jpg", index)
    for name in ("a", "b"):
        write_map(tmp_path / "SegmentationClass" / f"{name}.png", label_map(0, [0, 1]), mode="P")
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a\n")
    (lists / "val.txt").write_text("b\n")
    found = open_dataset(tmp_path, labels=["background", "aeroplane"])
    assert [Path(part[0]["file_name"]).name for part in (found.train, found.validation)] == ["a.jpg", "b.jpg"]


def test_masks_of_0_and_255_are_background_and_foreground(tmp_path):
    found = open_dataset(pair_folder(tmp_path, [0, 255]), held_out=0)
    assert [category["name"] for category in found.categories] == ["background", "foreground"]
    assert np.array_equal(found.train[0]["segmentation_map"], np.where(label_map(0, [0, 255]) == 255, 2, 1))
    assert "foreground" in str(found.report)


def test_unnamed_classes_are_named_after_their_number(tmp_path):
    found = open_dataset(pair_folder(tmp_path, [0, 3, 255]), held_out=0)
    assert [(c["name"], c["dataset_id"]) for c in found.categories] == [("class 0", 0), ("class 3", 3)]
    assert "labels=" in str(found.report)


def test_label_maps_may_have_16_bits(tmp_path):
    names = {value: f"n{value}" for value in range(300)}
    found = open_dataset(pair_folder(tmp_path, [0, 255, 299]), labels=names, held_out=0)
    assert len(found.categories) == 300
    assert np.array_equal(found.train[0]["segmentation_map"], label_map(0, [0, 255, 299]).astype(int) + 1)


def test_colour_masks_are_read_with_a_list_of_colours(tmp_path):
    colors = np.array([[0, 0, 0], [250, 50, 50], [0, 200, 0]], dtype=np.uint8)
    write_image(tmp_path / "images" / "a.jpg")
    write_map(tmp_path / "masks" / "a.png", colors[label_map(0, [0, 1, 2])])
    with pytest.raises(ValueError, match=r"labelmap\.txt"):
        open_dataset(tmp_path)
    (tmp_path / "labelmap.txt").write_text(
        "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncat:250,50,50::\ndog:0,200,0::\n"
    )
    found = open_dataset(tmp_path, held_out=0)
    assert [category["name"] for category in found.categories] == ["background", "cat", "dog"]
    assert np.array_equal(found.train[0]["segmentation_map"], label_map(0, [0, 1, 2]) + 1)
    write_map(tmp_path / "masks" / "a.png", np.full((HEIGHT, WIDTH, 3), (9, 8, 7), dtype=np.uint8))
    with pytest.raises(DatasetError, match=r"colours that no class has[^§]*\(9, 8, 7\)"):
        open_dataset(tmp_path, labels=tmp_path / "labelmap.txt")


def test_the_void_of_colour_masks_is_a_colour(tmp_path):
    colors = np.array([[0, 0, 0], [255, 0, 0], [224, 224, 192]], dtype=np.uint8)
    write_image(tmp_path / "images" / "a.jpg")
    write_map(tmp_path / "masks" / "a.png", colors[label_map(0, [0, 1, 2])])
    (tmp_path / "labelmap.txt").write_text("ground:0,0,0::\ncat:255,0,0::\nvoid:224,224,192::\n")
    found = open_dataset(tmp_path, held_out=0)
    assert [category["name"] for category in found.categories] == ["ground", "cat"]
    assert np.array_equal(found.train[0]["segmentation_map"], np.array([1, 2, 0])[label_map(0, [0, 1, 2])])
    # 255, an unlisted red, is no void in maps of colours.
    (tmp_path / "labelmap.txt").write_text("ground:0,0,0::\ncat:224,224,192::\n")
    assert "(255, 0, 0)" in problems_of(tmp_path, held_out=0)


def test_reduced_labels_and_ignore_index(tmp_path):
    pair_folder(tmp_path, [0, 1, 2])
    found = open_dataset(tmp_path, labels=["a", "b"], reduce_labels=True, held_out=0)
    assert np.array_equal(found.train[0]["segmentation_map"], label_map(0, [0, 1, 2]))
    found = open_dataset(tmp_path, labels=["a", "b"], ignore_index=2, held_out=0)
    assert np.array_equal(found.train[0]["segmentation_map"], np.array([1, 2, 0])[label_map(0, [0, 1, 2])])
    found = open_dataset(tmp_path, labels={1: "a", 2: "b"}, held_out=0)
    assert np.array_equal(found.train[0]["segmentation_map"], label_map(0, [0, 1, 2]))
    assert "taken as void" in str(found.report)
    # What is asked for counts more than what is listed.
    found = open_dataset(tmp_path, labels=["other", "a", "b"], ignore_index=0, held_out=0)
    assert [category["name"] for category in found.categories] == ["a", "b"]
    assert np.array_equal(found.train[0]["segmentation_map"], label_map(0, [0, 1, 2]))
    assert "treated as void, not as a class: other" in str(found.report)
    found = open_dataset(tmp_path, labels=["a", "void"], reduce_labels=True, held_out=0)
    assert np.array_equal(found.train[0]["segmentation_map"], label_map(0, [0, 1, 2]) % 2)
    with pytest.raises(ValueError, match="the number -1"):
        open_dataset(tmp_path, labels={-1: "plate", 0: "a", 1: "b", 2: "c"})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("labels.json", '["cat", "dog"]'),
        ("id2label.json", '{"0": "cat", "1": "dog"}'),
        ("label2id.json", '{"cat": 0, "dog": 1}'),
        ("classes.json", '{"categories": [{"id": 1, "name": "dog"}, {"id": 0, "name": "cat"}]}'),
        ("config.json", '{"model_type": "m2f", "id2label": {"0": "cat", "1": "dog"}}'),
        ("classes.txt", "cat\ndog\n"),
        ("labels.txt", "0: cat\n1: dog\n"),
        ("names.txt", "0 cat\n1 dog\n"),
        ("labelmap.txt", "cat:1,2,3::\ndog:4,5,6::\n"),
        ("_classes.csv", "Pixel Value, Class\n0, cat\n1, dog\n"),
        ("class_dict.csv", "name,r,g,b\ncat,1,2,3\ndog,4,5,6\n"),
        ("objectInfo150.txt", "Idx\tRatio\tTrain\tVal\tName\n0\t0.1\t1\t1\tcat\n1\t0.1\t1\t1\tdog\n"),
    ],
)
def test_class_names_are_read_from_every_kind_of_file(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    path = find_name_file([tmp_path])
    assert path == tmp_path / name
    entries = read_labels(path)
    assert {entry["id"]: entry["name"] for entry in entries} == {0: "cat", 1: "dog"}


def test_a_config_about_something_else_is_no_class_list(tmp_path):
    (tmp_path / "config.json").write_text('{"learning_rate": 1}')
    assert find_name_file([tmp_path]) is None
    (tmp_path / "labels.json").write_text('{"0": [1]}')
    with pytest.raises(ValueError, match="form that is known"):
        read_labels(tmp_path / "labels.json")
    with pytest.raises(ValueError, match="neither a file nor a known label set"):
        read_labels("ade21k")


# --- tables of the datasets library ---


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))


def semantic_table(count: int = 4, values=(0, 1, 255)):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
    rows = {
        "image": [picture(index) for index in range(count)],
        "label": [Image.fromarray(label_map(index, list(values))) for index in range(count)],
    }
    return datasets.Dataset.from_dict(rows, features=features)


def test_a_table_with_label_maps(tmp_path):
    table = semantic_table()
    found = open_dataset(table, labels={0: "ground", 1: "tree"}, held_out=0.25)
    assert found.task == "semantic" and (len(found.train), len(found.validation)) == (3, 1)
    everything = open_dataset(table, labels=["ground", "tree"], held_out=0).train
    for index in range(4):
        item = everything[index]
        assert np.array_equal(np.asarray(item["image"]), np.asarray(picture(index)))
        expected = label_map(index, [0, 1, 255]).astype(int) + 1
        assert np.array_equal(item["segmentation_map"], np.where(expected == 256, 0, expected))
    assert [c["name"] for c in open_dataset(table).categories] == ["class 0", "class 1"]
    with pytest.raises(DatasetError, match="reduce_labels=True"):
        open_dataset(table, labels=["only"])


def panoptic_table():
    datasets = pytest.importorskip("datasets")
    ids = np.zeros((HEIGHT, WIDTH), dtype=np.int32)
    ids[:4], ids[4:8] = 300, 2
    names = datasets.ClassLabel(names=["person", "bicycle"])
    segment = {"id": datasets.Value("int64"), "category_id": names, "iscrowd": datasets.Value("int64")}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image(), "segments_info": [segment]})
    segments = [{"id": 300, "category_id": 0, "iscrowd": 0}, {"id": 2, "category_id": 1, "iscrowd": 1}]
    rows = {"image": [picture(0)] * 2, "label": [Image.fromarray(id_to_rgb(ids))] * 2, "segments_info": [segments] * 2}
    return datasets.Dataset.from_dict(rows, features=features), ids


def test_a_table_with_panoptic_maps():
    table, ids = panoptic_table()
    with pytest.raises(ValueError, match='"isthing": True'):
        open_dataset(table)
    labels = [{"id": 0, "name": "person", "isthing": True}, {"id": 1, "name": "road", "isthing": False}]
    found = open_dataset(table, labels=labels, held_out=0)
    item = found.train[0]
    assert found.task == "panoptic" and np.array_equal(item["segmentation_map"], ids)
    assert [(s["id"], s["category_id"], s["iscrowd"], s["isthing"]) for s in item["segments_info"]] == [
        (300, 0, 0, True),
        (2, 1, 1, False),
    ]
    assert open_dataset(table, labels=labels, task="instance", held_out=0).categories[0]["name"] == "person"


@pytest.mark.parametrize("form", ["dict of lists", "list of dicts", "run lengths", "images"])
def test_a_table_with_objects(form):
    datasets = pytest.importorskip("datasets")
    names = datasets.ClassLabel(names=["apple", "plate"])
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[2:8, 2:8] = True
    polygon = datasets.Sequence(datasets.Sequence(datasets.Value("float32")))
    feature, value = polygon, SQUARE
    if form == "run lengths":
        feature = {"size": datasets.Sequence(datasets.Value("int64")), "counts": datasets.Value("string")}
        value = encode_rle(mask)
    elif form == "images":
        feature, value = datasets.Image(), Image.fromarray(mask)
    if form == "dict of lists":
        feature = {"category": datasets.Sequence(names), "segmentation": datasets.Sequence(feature)}
        objects = {"category": [1, 0], "segmentation": [value, INNER]}
    else:
        feature = [{"category": names, "segmentation": feature, "bbox": datasets.Sequence(datasets.Value("float32"))}]
        objects = [{"category": 1, "segmentation": value, "bbox": [2, 2, 6, 6]}]
    features = datasets.Features({"image_id": datasets.Value("int64"), "image": datasets.Image(), "objects": feature})
    rows = {"image_id": [41, 42], "image": [picture(0), picture(1)], "objects": [objects, objects]}
    found = open_dataset(datasets.Dataset.from_dict(rows, features=features), held_out=0)
    assert found.task == "instance" and [c["name"] for c in found.categories] == ["apple", "plate"]
    item = found.train[1]
    assert item["image_id"] == 42
    assert np.array_equal(segment_masks(item)[0], mask) and item["segments_info"][0]["category_id"] == 1


@pytest.mark.parametrize("has_names", [True, False])
def test_a_table_with_class_and_instance_in_one_map(has_names):
    datasets = pytest.importorskip("datasets")
    colors = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    colors[:4], colors[4:8], colors[8:10] = (2, 1, 0), (2, 2, 0), (1, 1, 0)
    rows = {"image": [picture(0)], "annotation": [Image.fromarray(colors)]}
    if has_names:
        rows["semantic_class_to_id"] = [{"background": 0, "person": 1, "car": 2}]
    table = datasets.Dataset.from_dict(rows)
    if not has_names:
        with pytest.raises(ValueError, match="does not name its classes"):
            open_dataset(table, task="instance")
    labels = None if has_names else {1: "person", 2: "car"}
    found = open_dataset(table, task="instance", labels=labels, held_out=0)
    item = found.train[0]
    assert [(c["name"], c["isthing"]) for c in found.categories] == [("person", True), ("car", True)]
    assert [segment["category_id"] for segment in item["segments_info"]] == [0, 1, 1]
    assert segment_masks(item).sum(axis=(1, 2)).tolist() == [2 * WIDTH, 4 * WIDTH, 4 * WIDTH]
    assert segment_masks(item)[1][:4].all()


def test_a_stream_gives_every_row_once_also_to_workers():
    table = semantic_table(6).to_iterable_dataset(num_shards=3)
    found = open_dataset(table, labels=["ground", "tree"], held_out=0)
    expected = open_dataset(semantic_table(6), labels=["ground", "tree"], held_out=0).train
    items = list(found.train)
    assert len(items) == 6 and found.task == "semantic" and "stream" in str(found.report)
    for index, item in enumerate(items):
        assert np.array_equal(item["segmentation_map"], expected[index]["segmentation_map"])
    loader = torch.utils.data.DataLoader(found.train, batch_size=None, num_workers=2, collate_fn=lambda item: item)
    sums = sorted(int(item["segmentation_map"].sum()) for item in loader)
    assert sums == sorted(int(item["segmentation_map"].sum()) for item in items)
    with pytest.raises(ValueError, match="give labels="):
        open_dataset(table)


def test_a_stream_without_a_validation_split_holds_its_first_rows_out(monkeypatch):
    monkeypatch.setattr("m2f_hf.data.opening._NUM_STREAMED_FOR_VALIDATION", 2)
    found = open_dataset(semantic_table(6).to_iterable_dataset(), labels=["ground", "tree"])
    assert (len(list(found.train)), len(list(found.validation))) == (4, 2)
    assert "first 2 rows" in str(found.report)


def test_tables_on_disk_and_splits_with_other_names(tmp_path):
    datasets = pytest.importorskip("datasets")
    both = datasets.DatasetDict({"train": semantic_table(3), "val": semantic_table(2), "test": semantic_table(1)})
    both.save_to_disk(tmp_path / "saved")
    found = open_dataset(tmp_path / "saved", labels=["ground", "tree"])
    assert (len(found.train), len(found.validation)) == (3, 2)
    (tmp_path / "parquet").mkdir()
    semantic_table(3).to_parquet(tmp_path / "parquet" / "train-00000-of-00001.parquet")
    assert len(open_dataset(tmp_path / "parquet", labels=["ground", "tree"], held_out=0).train) == 3


def test_a_hub_name_loads_its_rows_and_class_names(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name, config, streaming):
        asked.append((name, config, streaming))
        return datasets.DatasetDict({"train": semantic_table(4)})

    def download(name, file, repo_type):
        if file != "id2label.json":
            raise FileNotFoundError(file)
        (tmp_path / file).write_text('{"0": "ground", "1": "tree"}')
        return str(tmp_path / file)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    found = open_dataset("someone/trees", config_name="small")
    assert asked == [("someone/trees", "small", False)]
    assert [category["name"] for category in found.categories] == ["ground", "tree"]


def test_unknown_columns_are_named():
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"text": ["a"], "number": [1]})
    with pytest.raises(ValueError, match="columns text, number: expected an image"):
        open_dataset(table)


# --- splits and classes ---


def test_the_held_out_share_depends_only_on_the_seed(tmp_path):
    pair_folder(tmp_path, [0, 1], names=[f"{index:02d}" for index in range(20)])

    def names(dataset):
        return [Path(dataset.annotation(index)["file_name"]).stem for index in range(len(dataset))]

    first, again, other = (open_dataset(tmp_path, seed=seed) for seed in (0, 0, 1))
    assert len(first.validation) == 2 and not set(names(first.train)) & set(names(first.validation))
    assert sorted(names(first.train) + names(first.validation)) == [f"{index:02d}" for index in range(20)]
    assert names(first.validation) == names(again.validation) != names(other.validation)
    assert "2 of 20 images held out" in str(first.report) and "seed=0" in str(first.report)
    assert len(open_dataset(tmp_path, held_out=0.5).validation) == 10


def test_classes_of_both_splits_are_matched_by_name(tmp_path):
    write_coco(tmp_path / "train" / "_annotations.coco.json", tmp_path / "train")
    # The validation file counts otherwise: "apple" before "plate" here, "plate" before "apple" there.
    write_coco(tmp_path / "valid" / "_annotations.coco.json", tmp_path / "valid", coco_content(ids=(1, 2)))
    found = open_dataset(tmp_path)
    for split in (found.train, found.validation):
        item = split.annotation(0)
        assert [found.categories[s["category_id"]]["name"] for s in item["segments_info"]] == ["plate", "apple"]
        assert split.categories == found.categories
    assert [split.counts.tolist() for split in found.report.splits] == [[2, 1], [2, 1]]

    content = coco_content()
    content["categories"][0]["name"] = "bowl"
    write_coco(tmp_path / "valid" / "_annotations.coco.json", tmp_path / "valid", content)
    with pytest.raises(ValueError, match=r"only in the training data: plate; only in the validation data: bowl"):
        open_dataset(tmp_path)


def test_validation_on_another_folder(tmp_path):
    pair_folder(tmp_path / "here", [0, 1])
    pair_folder(tmp_path / "there", [0, 1], names=("c", "d", "e"))
    found = open_dataset(tmp_path / "here", validation=tmp_path / "there")
    assert (len(found.train), len(found.validation)) == (2, 3)


def test_a_selection_counts_its_own_segments(tmp_path):
    write_coco(tmp_path / "labels.json", tmp_path)
    dataset = CocoInstanceDataset(tmp_path / "labels.json")
    chosen = dataset.select([2, 1])
    assert chosen.annotation(1) == dataset.annotation(1) and chosen.annotation(0) == dataset.annotation(2)
    assert chosen.segments.tolist() == [[1, 0, 1], [1, 0, 0]]
    assert chosen.select([1]).segments.tolist() == [[0, 0, 1], [0, 0, 0]]


def test_workers_give_the_same_items(tmp_path):
    write_panoptic(tmp_path / "panoptic.json", tmp_path / "images", tmp_path / "panoptic")
    dataset = CocoPanopticDataset(tmp_path)
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=1, collate_fn=lambda item: item)
    for index, item in enumerate(loader):
        assert np.array_equal(item["segmentation_map"], dataset[index]["segmentation_map"])
        assert item["segments_info"] == dataset[index]["segments_info"]


def test_images_come_upright(tmp_path):
    write_coco(tmp_path / "labels.json", tmp_path)
    turned = Image.fromarray(np.zeros((WIDTH, HEIGHT, 3), dtype=np.uint8))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "a.png", exif=exif)
    dataset = CocoInstanceDataset(tmp_path / "labels.json")
    assert dataset[0]["image"].size == (WIDTH, HEIGHT)
    assert (dataset.annotation(0)["height"], dataset.annotation(0)["width"]) == (HEIGHT, WIDTH)


def test_training_and_the_processor_read_the_same_pixels(tmp_path):
    """A 16-bit ramp, 32-bit whole numbers and fractions, which TIFF files hold, grey, a palette and transparency."""
    ramp = np.arange(1 << 16).reshape(256, 256)
    grey = Image.fromarray(ramp.astype(np.uint8))
    pictures = [Image.fromarray(values) for values in (ramp.astype(np.uint16), ramp.astype(np.int32))]
    pictures += [Image.fromarray((ramp / 65535).astype(np.float32)), grey, grey.convert("P"), grey.convert("LA")]
    processor = M2FImageProcessor(do_resize=False, do_rescale=False, do_normalize=False, size_divisor=1)
    for number, image in enumerate(pictures):
        path = tmp_path / f"{number}.{'tif' if number in (1, 2) else 'png'}"
        image.save(path)
        expected = processor(path, return_tensors="pt").pixel_values[0].permute(1, 2, 0).numpy()
        expected = np.rint(expected * 255 if expected.max() <= 1 else expected)
        found = read_image(path, "ramp")
        assert found.mode == "RGB" and np.array_equal(np.asarray(found), expected), number
    assert np.array_equal(np.asarray(read_image(tmp_path / "0.png", ""))[..., 0], np.rint(ramp / 257))


def test_the_report_lists_what_was_found(tmp_path):
    write_coco(tmp_path / "labels.json", tmp_path)
    text = str(open_dataset(tmp_path, held_out=0).report)
    assert "COCO instance annotations in" in text and "form='coco-panoptic'" in text
    assert "classes:   2 (2 things, 0 stuff)" in text
    assert "train images: 3 (1 without a segment)" in text
    assert "segments: 3, at most 2 in an image; crowds, which are ignored in training: 1" in text
    assert "16..16 x 12..12" in text


# --- bad input ---


def problems_of(source, **options) -> str:
    with pytest.raises(DatasetError) as caught:
        open_dataset(source, **options)
    return str(caught.value)


def test_all_problems_of_a_coco_file_are_reported_at_once(tmp_path):
    content = write_coco(tmp_path / "labels.json", tmp_path)
    extra = {"iscrowd": 0, "image_id": 1, "category_id": 3}
    outside = [[100.0, 2.0, 110.0, 2.0, 110.0, 8.0]]
    content["annotations"] += [
        {**extra, "id": 50, "category_id": 99, "segmentation": SQUARE},
        {**extra, "id": 51, "image_id": 77, "segmentation": SQUARE},
        {**extra, "id": 52, "segmentation": outside},
        {**extra, "id": 53, "segmentation": {"size": [5, 5], "counts": [25]}},
        {**extra, "id": 54, "segmentation": {"size": [HEIGHT, WIDTH], "counts": [25]}},
        {**extra, "id": 55, "segmentation": [[float("nan")] * 6]},
        {**extra, "id": 56, "segmentation": [["1"] * 6]},
        {**extra, "id": 57, "segmentation": [[0, 0, 1e12, 0, 1e12, 1e12]]},
        {**extra, "id": 58, "segmentation": "a mask"},
        {**extra, "id": 59, "segmentation": {"size": 12, "counts": [float("inf")]}},
    ]
    content["images"].append({"id": 1, "file_name": "twice.png", "height": HEIGHT, "width": WIDTH})
    (tmp_path / "labels.json").write_text(json.dumps(content))
    (tmp_path / "b.png").unlink()
    text = problems_of(tmp_path / "labels.json")
    for expected in (
        "annotation 52: x 100 to 110, y 2 to 8 in 16x12 pixels",
        "segment 50 has category 99",
        "annotation 51 of image 77",
        "annotation 53: an RLE of size [5, 5]",
        "annotation 54: damaged RLE: its runs cover 25 of 192",
        "annotation 55",
        "annotation 56",
        "annotation 57: corners that are no numbers, or further than 100000 pixels",
        "annotation 58: str instead of a list of polygons",
        "annotation 59: an RLE of size 12",
        "twice.png: id 1",
        "b.png",
    ):
        assert expected in text


def test_long_lists_of_problems_are_cut(tmp_path):
    content = write_coco(tmp_path / "labels.json", tmp_path)
    lost = [{"id": 100 + k, "file_name": f"lost{k}.png", "height": 4, "width": 4} for k in range(25)]
    content["images"] += lost
    (tmp_path / "labels.json").write_text(json.dumps(content))
    text = problems_of(tmp_path)
    assert "(25)" in text and "lost9.png" in text and "lost10.png" not in text and "and 15 more" in text


def test_files_that_do_not_fit_are_found_before_training(tmp_path):
    write_coco(tmp_path / "labels.json", tmp_path)
    write_image(tmp_path / "a.png", size=(HEIGHT + 1, WIDTH))
    (tmp_path / "b.png").write_bytes(b"no image")
    write_image(tmp_path / "empty.png", size=(WIDTH, HEIGHT))
    text = problems_of(tmp_path, held_out=0)
    assert "a.png is 13x16, its annotation 12x16" in text and "b.png: cannot identify image" in text
    assert "empty.png is 16x12" in text and "EXIF" in text
    with pytest.raises(DatasetError, match="another size"):
        check_dataset(CocoInstanceDataset(tmp_path / "labels.json"))
    (tmp_path / "a.png").unlink()
    text = problems_of(tmp_path, held_out=0)
    assert text.count("a.png") == 1 and "are missing" in text and text.count("b.png: cannot identify") == 1


def test_harmless_oddities_are_warnings(tmp_path):
    content = write_coco(tmp_path / "labels.json", tmp_path)
    extra = {"iscrowd": 0, "image_id": 1, "category_id": 3}
    content["annotations"] += [
        {**extra, "id": 60, "segmentation": []},
        {**extra, "id": 61, "segmentation": [[1.0, 1.0, 2.0, 2.0], *SQUARE]},
        {**extra, "id": 62, "segmentation": [[-5.0, 2.0, 8.0, 2.0, 8.0, 8.0]]},
    ]
    content["categories"].append({"id": 8, "name": "spoon"})
    (tmp_path / "labels.json").write_text(json.dumps(content))
    found = open_dataset(tmp_path, held_out=0)
    text = str(found.report)
    for expected in (
        "a box alone",
        "annotation 60",
        "fewer than three corners",
        "annotation 61",
        "annotation 62",
        "spoon",
    ):
        assert expected in text
    assert [s["id"] for s in found.train.annotation(0)["segments_info"]] == [11, 300, 61, 62]


def test_panoptic_problems(tmp_path):
    write_panoptic(tmp_path / "panoptic.json", tmp_path / "images", tmp_path / "panoptic")
    content = json.loads((tmp_path / "panoptic.json").read_text())
    content["annotations"][0]["segments_info"][0]["id"] = 4711
    (tmp_path / "panoptic.json").write_text(json.dumps(content))
    text = problems_of(tmp_path, held_out=0)
    assert "1.jpg: segment ids [4711]" in text
    content["annotations"][0]["segments_info"].pop(0)
    (tmp_path / "panoptic.json").write_text(json.dumps(content))
    assert "1.jpg: segment ids [70000]" in str(open_dataset(tmp_path, held_out=0).report)

    data = (tmp_path / "panoptic" / "2.png").read_bytes()
    (tmp_path / "panoptic" / "2.png").write_bytes(data[: len(data) // 2])
    assert "2.png" in problems_of(tmp_path, held_out=0)
    write_map(tmp_path / "panoptic" / "2.png", np.zeros((3, 4, 3), dtype=np.uint8))
    assert "2.jpg is 12x16, its annotation 3x4" in problems_of(tmp_path, held_out=0)
    (tmp_path / "panoptic" / "2.png").unlink()
    content["images"].append({"id": 5, "file_name": "5.jpg"})
    del content["categories"][0]["isthing"]
    (tmp_path / "panoptic.json").write_text(json.dumps(content))
    text = problems_of(tmp_path)
    assert "2.png" in text and "5.jpg" in text and "dog" in text


def test_label_map_problems(tmp_path):
    pair_folder(tmp_path, [0, 1], names=("a", "b", "c", "d"))
    write_map(tmp_path / "masks" / "a.png", label_map(0, [0, 7]))
    write_map(tmp_path / "masks" / "b.png", np.zeros((3, 4), dtype=np.uint8))
    data = (tmp_path / "masks" / "c.png").read_bytes()
    (tmp_path / "masks" / "c.png").write_bytes(data[:60])
    text = problems_of(tmp_path, labels=["ground", "tree"], held_out=0)
    assert "a.png: 7" in text and "2 classes: 0 to 1; void: 255" in text
    assert "b.jpg is 12x16, its annotation 3x4" in text and "c.png" in text and "d.png" not in text

    (tmp_path / "masks" / "c.png").rename(tmp_path / "masks" / "z.png")
    text = problems_of(tmp_path, labels=["ground", "tree"])
    assert "c.jpg" in text and "z.png" in text

    with pytest.raises(ValueError, match="objects of a class apart"):
        open_dataset(tmp_path, task="instance")
    write_image(tmp_path / "lossy" / "images" / "a.jpg")
    write_map(tmp_path / "lossy" / "masks" / "a.jpg", label_map(0, [0, 1]))
    with pytest.raises(ValueError, match="store them as PNG"):
        open_dataset(tmp_path / "lossy")


def test_sources_that_are_no_data_set_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a folder or file"):
        open_dataset(str(tmp_path / "nothing" / "here"))
    with pytest.raises(ValueError, match=r"nothing.*Known are COCO"):
        open_dataset(tmp_path)
    (tmp_path / "readme.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"readme\.txt"):
        open_dataset(tmp_path)
    (tmp_path / "odd.json").write_text("{")
    with pytest.raises(ValueError, match="not in COCO's form"):
        open_dataset(tmp_path / "odd.json")
    for options in ({"task": "depth"}, {"form": "voc"}, {"held_out": 1.5}):
        with pytest.raises(ValueError, match=next(iter(options))):
            open_dataset(tmp_path, **options)
    with pytest.raises(ValueError, match="list is no data set"):
        open_dataset([1, 2])
    with pytest.raises(ValueError, match="someone/nothing is no folder here"):
        open_dataset("someone/nothing")


@pytest.mark.parametrize("split", ["train", ""])
def test_yolo_folders_are_not_taken_for_label_maps(split, tmp_path):
    write_image(tmp_path / "images" / split / "a.jpg")
    (tmp_path / "labels" / split).mkdir(parents=True)
    (tmp_path / "labels" / split / "a.txt").write_text("0 0.1 0.1 0.9 0.1 0.5 0.9\n")
    with pytest.raises(ValueError, match=r"no data set in a layout that is known .*YOLO's text files are not read"):
        open_dataset(tmp_path)


def test_empty_data_sets_are_refused(tmp_path):
    content = coco_content(names=())
    content["annotations"] = []
    (tmp_path / "labels.json").write_text(json.dumps(content))
    assert "empty" in problems_of(tmp_path)
    content = write_coco(tmp_path / "labels.json", tmp_path)
    (tmp_path / "labels.json").write_text(json.dumps({**content, "annotations": []}))
    assert "no image has a segment" in problems_of(tmp_path)
    (tmp_path / "labels.json").write_text(json.dumps({**content, "annotations": None}))
    with pytest.raises(ValueError, match="`annotations` is no list"):
        open_dataset(tmp_path)
    (tmp_path / "labels.json").unlink()
    (tmp_path / "maps" / "images").mkdir(parents=True)
    (tmp_path / "maps" / "masks").mkdir()
    with pytest.raises(ValueError, match="images, masks"):
        open_dataset(tmp_path / "maps")
    datasets = pytest.importorskip("datasets")
    with pytest.raises(DatasetError, match="empty"):
        open_dataset(datasets.Dataset.from_dict({"image": [], "label": []}))


def test_missing_image_folders_are_asked_for(tmp_path):
    write_coco(tmp_path / "labels.json", tmp_path / "far" / "away")
    with pytest.raises(FileNotFoundError, match="image_folder="):
        open_dataset(tmp_path)
    assert len(open_dataset(tmp_path, image_folder=tmp_path / "far" / "away", held_out=0).train) == 3


def test_ambiguous_annotation_files_are_asked_for(tmp_path):
    for name in ("instances_train2014.json", "instances_train2017.json"):
        write_coco(tmp_path / "annotations" / name, tmp_path / "images")
    with pytest.raises(ValueError, match=r"instances_train2014\.json, annotations/instances_train2017\.json"):
        open_dataset(tmp_path)


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"m2f_hf\[train\]"):
        open_dataset("someone/something")
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(ImportError, match=r"m2f_hf\[coco\]"):
        decode_segmentation(SQUARE, HEIGHT, WIDTH)


def test_truncated_images_are_found(tmp_path):
    for name in ("a.jpg", "b.png"):
        write_image(tmp_path / "images" / name, size=(64, 64))
        write_map(tmp_path / "masks" / f"{Path(name).stem}.png", np.zeros((64, 64), dtype=np.uint8))
        data = (tmp_path / "images" / name).read_bytes()
        (tmp_path / "images" / name).write_bytes(data[: len(data) * 2 // 3])
    text = problems_of(tmp_path, held_out=0)
    assert "a.jpg" in text and "b.png" in text and "cannot be read" in text


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("images", {"file_name": "a.png"}, "`id` is not in `images` at 0"),
        ("images", {"id": 1}, "images without `file_name`: id 1"),
        ("annotations", {"id": 11, "category_id": 7}, "`image_id` is not in `annotations` at 0"),
        ("categories", {"id": 7}, "`name` is not in `categories` at 0"),
        ("images", None, "`images` has entries that are no objects at 0"),
        ("images", {"id": 1, "file_name": 7}, "`file_name` should be text in `images` at 0"),
        ("images", {"id": [], "file_name": "a.png"}, "`id` should be a whole number or text in `images`"),
        ("images", {"id": 1, "file_name": "a.png", "height": "12"}, "`height` should be a whole number or a number"),
        ("annotations", {"image_id": 1, "category_id": "3"}, "`category_id` should be a whole number"),
        ("annotations", {"image_id": 1, "category_id": 3, "iscrowd": "yes"}, "`iscrowd` should be"),
        ("annotations", {"image_id": 1, "category_id": 3, "area": "large"}, "`area` should be"),
        ("categories", {"id": "3", "name": "apple"}, "`id` should be a whole number in `categories` at 0"),
        ("categories", {"id": 3, "name": None}, "`name` is not in `categories` at 0"),
        ("categories", {"id": 3, "name": "apple", "isthing": "no"}, "`isthing` should be a whole number"),
        ("categories", {"id": 7, "name": "plate", "color": [0, None, 300]}, "plate has the colour"),
    ],
)
def test_wrong_entries_are_named(tmp_path, part, value, message):
    content = write_coco(tmp_path / "labels.json", tmp_path)
    content[part][0] = value
    (tmp_path / "labels.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        open_dataset(tmp_path / "labels.json")


def test_null_counts_as_missing(tmp_path):
    content = write_coco(tmp_path / "labels.json", tmp_path)
    content["annotations"][0] |= {"iscrowd": None, "area": None, "bbox": None}
    content["images"][0] |= {"height": None, "width": None}
    (tmp_path / "labels.json").write_text(json.dumps(content))
    segment = open_dataset(tmp_path / "labels.json", held_out=0).train[0]["segments_info"][0]
    assert segment["iscrowd"] == 0 and "area" not in segment and "bbox" not in segment


def test_several_annotations_of_one_image_are_refused(tmp_path):
    write_panoptic(tmp_path / "panoptic.json", tmp_path / "images", tmp_path / "panoptic")
    content = json.loads((tmp_path / "panoptic.json").read_text())
    content["annotations"].append({"image_id": 1, "file_name": "2.png", "segments_info": []})
    content["annotations"][1]["segments_info"][2]["id"] = 256
    (tmp_path / "panoptic.json").write_text(json.dumps(content))
    text = problems_of(tmp_path, held_out=0)
    assert "several annotations" in text and "2.png of image 1" in text
    assert "share an id within an image" in text and "2.png: ids 256" in text


def test_classes_that_share_a_name_or_id_are_refused(tmp_path):
    content = write_coco(tmp_path / "labels.json", tmp_path)
    content["categories"].append({"id": 9, "name": "apple"})
    (tmp_path / "labels.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="same name: apple"):
        open_dataset(tmp_path)


def test_maps_in_other_folders_are_paired_only_if_unambiguous(tmp_path):
    for folder in ("x", "y"):
        write_image(tmp_path / "images" / folder / "1.jpg")
    write_map(tmp_path / "masks" / "z" / "1.png", label_map(0, [0, 1]))
    text = problems_of(tmp_path)
    assert "x/1.jpg" in text and "y/1.jpg" in text and "z/1.png" in text


class PrivateMemory(torch.utils.data.Dataset):
    """Reads a value, and gives the memory in MB that the process has for itself by the first and the last one."""

    def __init__(self, values):
        self.values = values

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        sum(self.values[index]["polygon"])
        if index not in (0, len(self) - 1):
            return 0.0
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("Private")) / 1024


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's account of memory")
def test_workers_share_annotations_instead_of_copying_them():
    plain = [{"polygon": [index + step / 7 for step in range(2000)]} for index in range(500)]  # some 30 MB

    def growth(values) -> float:
        loader = torch.utils.data.DataLoader(
            PrivateMemory(values), batch_size=None, num_workers=1, multiprocessing_context="fork"
        )
        memory = list(loader)
        return memory[-1] - memory[0]

    assert growth(plain) > 20
    assert growth(PackedList(plain)) < 5
