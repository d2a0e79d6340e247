"""The generated scenes and folders in COCO's panoptic form."""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from m2f_hf.data import CATEGORIES, CocoPanopticDataset, ShapesDataset, write_coco_panoptic
from m2f_hf.data.synthetic.shapes import MORE_SHAPES, NUM_THINGS, SHAPES, fill_outline, outline


@pytest.fixture(scope="module")
def scenes() -> list[dict]:
    dataset = ShapesDataset(40, seed=7)
    return [dataset[index] for index in range(len(dataset))]


def test_a_scene_depends_only_on_seed_and_index():
    forwards, backwards = ShapesDataset(4, 64, seed=3), ShapesDataset(9, 64, seed=3)
    last = [backwards[index] for index in (3, 2, 1, 0)][::-1]
    for one, other in zip([forwards[index] for index in range(4)], last, strict=True):
        assert np.array_equal(np.asarray(one["image"]), np.asarray(other["image"]))
        assert np.array_equal(one["segmentation_map"], other["segmentation_map"])
        assert one["segments_info"] == other["segments_info"]
    other_seed = ShapesDataset(4, 64, seed=4)[0]
    assert not np.array_equal(np.asarray(forwards[0]["image"]), np.asarray(other_seed["image"]))


def test_segments_describe_the_map(scenes):
    for scene in scenes:
        segment_ids = scene["segmentation_map"]
        assert segment_ids.dtype == np.int32 and segment_ids.shape == scene["image"].size[::-1] == (160, 160)
        assert scene["image"].mode == "RGB"
        infos = scene["segments_info"]
        assert {info["id"] for info in infos} == set(np.unique(segment_ids).tolist())
        for info in infos:
            ys, xs = np.nonzero(segment_ids == info["id"])
            assert info["area"] == len(xs) > 0
            assert info["bbox"] == [xs.min(), ys.min(), xs.max() - xs.min() + 1, ys.max() - ys.min() + 1]
            assert info["isthing"] == CATEGORIES[info["category_id"]]["isthing"]
            assert info["iscrowd"] == 0
        stuff = [info["category_id"] for info in infos if not info["isthing"]]
        assert len(stuff) == len(set(stuff)), "stuff of one class is one segment"
        assert json.loads(json.dumps(infos)) == infos, "plain Python numbers"


def test_scenes_have_the_promised_variety(scenes):
    things = [[info for info in scene["segments_info"] if info["isthing"]] for scene in scenes]
    assert max(map(len, things)) <= NUM_THINGS[1]
    assert min(map(len, things)) >= NUM_THINGS[0]
    assert {info["category_id"] for scene in scenes for info in scene["segments_info"]} == set(range(7))
    longest = [max(info["bbox"][2:]) / 160 for scene in things for info in scene]
    assert max(longest) <= 0.51 and max(longest) > 0.4 and min(longest) < 0.12


def test_colour_does_not_tell_the_class():
    """Mean colours of the classes agree within what their spread allows (five standard errors)."""
    dataset = ShapesDataset(150, 64, seed=11)
    colors: dict[int, list[np.ndarray]] = {index: [] for index in range(len(SHAPES))}
    for index in range(len(dataset)):
        scene = dataset[index]
        pixels = np.asarray(scene["image"], dtype=np.float64)
        for info in scene["segments_info"]:
            if info["isthing"]:
                colors[info["category_id"]].append(pixels[scene["segmentation_map"] == info["id"]].mean(axis=0))
    everything = np.concatenate([np.stack(found) for found in colors.values()])
    for found in colors.values():
        error = everything.std(axis=0) / np.sqrt(len(found))
        assert np.all(np.abs(np.mean(found, axis=0) - everything.mean(axis=0)) < 5 * error)


@pytest.mark.parametrize("shape", SHAPES + MORE_SHAPES)
def test_shapes_are_inside_their_circle_and_differ_in_area(shape):
    """The share of the circumscribed circle that a shape covers follows from its definition."""
    bounds = {"circle": (0.98, 1.01), "rectangle": (0.50, 0.65), "triangle": (0.35, 0.43), "star": (0.30, 0.50)}
    bounds |= {"cross": (0.47, 0.66), "ring": (0.62, 0.82), "hexagon": (0.81, 0.85), "crescent": (0.45, 0.63)}
    yy, xx = np.mgrid[:100, :100] + 0.5
    for seed in range(10):
        coverage = fill_outline(outline(np.random.default_rng(seed), shape), 100, (50.0, 50.0), 80.0)
        low, high = bounds[shape]
        assert low < coverage.sum() / (np.pi * 40**2) < high
        assert coverage[(xx - 50) ** 2 + (yy - 50) ** 2 > 42**2].max() == 0


def test_a_ring_has_a_hole_and_a_crescent_is_hollow():
    for seed in range(10):
        for shape, sign in (("ring", 0), ("crescent", 0), ("cross", 1), ("hexagon", 1)):
            assert fill_outline(outline(np.random.default_rng(seed), shape), 100, (50.0, 50.0), 80.0)[50, 50] == sign, (
                shape
            )


def test_default_scenes_equal_the_bundled_checkpoints_training_data():
    """Their maps to the bit, pixels but for rounding; whoever changes them changes what published figures mean."""
    scenes = [ShapesDataset(3, 64, seed=9)[index] for index in range(3)]
    digest = hashlib.sha256(b"".join(scene["segmentation_map"].tobytes() for scene in scenes))
    assert digest.hexdigest() == "d8053dd94660ee87eb3ab8ec6d646768f03ec9c60eb3befe34d440ee9752b066"
    brightness = [np.asarray(scene["image"]).mean() for scene in scenes]
    assert brightness == pytest.approx([102.55, 133.52, 115.05], abs=0.02)


def test_other_shapes_are_other_classes_on_the_same_ground():
    """The list of shapes gives the classes of things; stuff, texture and light are as ever."""
    assert ShapesDataset(1).categories == CATEGORIES
    dataset = ShapesDataset(20, 64, seed=7, shapes=("ring", "circle"))
    names = [category["name"] for category in dataset.categories]
    assert names == ["ring", "circle", *(category["name"] for category in CATEGORIES if not category["isthing"])]
    assert [category["id"] for category in dataset.categories] == list(range(5))
    assert len({tuple(category["color"]) for category in dataset.categories}) == 5
    circles = ShapesDataset(20, 64, seed=7, shapes=("circle",))
    for index in range(20):
        infos = dataset[index]["segments_info"]
        assert all(info["isthing"] == dataset.categories[info["category_id"]]["isthing"] for info in infos)
        assert {info["category_id"] for info in circles[index]["segments_info"] if info["isthing"]} == {0}
    found = {info["category_id"] for index in range(20) for info in dataset[index]["segments_info"]}
    assert found == set(range(5))


def test_a_hidden_thing_is_no_segment(monkeypatch):
    """Where every thing is drawn over the one before it, only the last is left."""
    disc = fill_outline(outline(np.random.default_rng(0), "circle"), 64, (32.0, 32.0), 30.0)
    monkeypatch.setattr("m2f_hf.data.synthetic.shapes.place_thing", lambda *arguments: (disc, "circle"))
    scene = ShapesDataset(1, 64)[0]
    assert [info["category_id"] for info in scene["segments_info"] if info["isthing"]] == [0]


def test_impossible_datasets_are_refused():
    with pytest.raises(ValueError, match="at least 32"):
        ShapesDataset(1, image_size=16)
    with pytest.raises(ValueError, match="num_scenes"):
        ShapesDataset(-1)
    with pytest.raises(ValueError, match=r"'blob'.*circle, .*crescent"):
        ShapesDataset(1, shapes=("circle", "blob"))
    with pytest.raises(ValueError, match="one shape or more, each once"):
        ShapesDataset(1, shapes=("ring", "ring"))
    with pytest.raises(IndexError, match="0 to 2"):
        ShapesDataset(3)[3]


def test_a_written_folder_reads_back_the_same(tmp_path):
    dataset = ShapesDataset(3, 64, seed=2)
    folder = write_coco_panoptic(dataset, tmp_path / "scenes", CATEGORIES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scenes"]
    assert sorted(path.name for path in folder.iterdir()) == ["images", "panoptic", "panoptic.json"]
    loaded = CocoPanopticDataset(folder)
    assert [{key: own[key] for key in CATEGORIES[0]} for own in loaded.categories] == CATEGORIES
    assert [category["dataset_id"] for category in loaded.categories] == list(range(7))
    for index in range(3):
        assert np.array_equal(np.asarray(loaded[index]["image"]), np.asarray(dataset[index]["image"]))
        assert np.array_equal(loaded[index]["segmentation_map"], dataset[index]["segmentation_map"])
        assert loaded[index]["segments_info"] == dataset[index]["segments_info"]
        assert loaded[index]["image_id"] == index
    with pytest.raises(FileExistsError, match="another folder"):
        write_coco_panoptic(dataset, folder, CATEGORIES)


def test_a_write_that_fails_leaves_nothing(tmp_path):
    class Broken(ShapesDataset):
        def __getitem__(self, index):
            if index == 1:
                raise RuntimeError("no scene")
            return super().__getitem__(index)

    with pytest.raises(RuntimeError, match="no scene"):
        write_coco_panoptic(Broken(2, 64), tmp_path / "scenes", CATEGORIES)
    assert list(tmp_path.iterdir()) == []


def test_category_ids_of_a_folder_become_contiguous(tmp_path):
    folder = write_coco_panoptic(ShapesDataset(1, 64), tmp_path / "scenes", CATEGORIES)
    content = json.loads((folder / "panoptic.json").read_text())
    for entry in content["categories"]:
        entry["id"] = 10 * entry["id"] + 1
    for info in content["annotations"][0]["segments_info"]:
        info["category_id"] = 10 * info["category_id"] + 1
    (folder / "panoptic.json").write_text(json.dumps(content))
    expected = ShapesDataset(1, 64)[0]["segments_info"]
    assert CocoPanopticDataset(folder)[0]["segments_info"] == expected

    content["annotations"][0]["segments_info"][0]["category_id"] = 5
    (folder / "panoptic.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="does not list"):
        CocoPanopticDataset(folder)[0]


def test_folders_of_another_kind_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"panoptic\.json"):
        CocoPanopticDataset(tmp_path)
    (tmp_path / "panoptic.json").write_text("{}")
    with pytest.raises(ValueError, match="lacks annotations, categories, images"):
        CocoPanopticDataset(tmp_path)


def test_reads_the_coco_sample(shared):
    """The published sample has 18 and 32 segments; areas and boxes of its json show that ids are read rightly."""
    dataset = CocoPanopticDataset(shared / "data" / "coco_panoptic")
    for index in range(len(dataset)):
        item = dataset[index]
        for info in item["segments_info"]:
            assert (item["segmentation_map"] == info["id"]).sum() == info["area"]
        assert isinstance(item["image"], Image.Image)
    assert sorted(len(dataset[index]["segments_info"]) for index in range(2)) == [18, 32]
