"""The generated videos."""

import pickle

import numpy as np
import pytest

from m2f_hf.data import MovingShapesDataset, ShapesDataset, occlusion_clip, tube_masks
from m2f_hf.data.synthetic.moving_shapes import NUM_MOVING


def pixels(item: dict) -> np.ndarray:
    return np.stack([np.asarray(frame) for frame in item["frames"]])


@pytest.fixture(scope="module")
def videos() -> list[dict]:
    dataset = MovingShapesDataset(30, num_frames=24, image_size=64, seed=7)
    return [dataset[index] for index in range(len(dataset))]


def test_a_video_depends_only_on_seed_and_index():
    short, long = MovingShapesDataset(3, 4, 64, seed=3), MovingShapesDataset(9, 7, 64, seed=3)
    last = [long[index] for index in (2, 1, 0)][::-1]
    for one, other in zip([short[index] for index in range(3)], last, strict=True):
        assert np.array_equal(pixels(one), pixels(other)[:4])
        assert np.array_equal(one["segmentation_maps"], other["segmentation_maps"][:4])
        assert all(info in other["segments_info"] for info in one["segments_info"])
    again = pickle.loads(pickle.dumps(short[1]))
    assert np.array_equal(pixels(again), pixels(short[1]))
    assert not np.array_equal(pixels(short[1]), pixels(MovingShapesDataset(3, 4, 64, seed=4)[1]))


def test_items_are_as_promised(videos):
    categories = MovingShapesDataset(1).categories
    assert [category["id"] for category in categories] == list(range(4)) and all(c["isthing"] for c in categories)
    for item in videos:
        maps = item["segmentation_maps"]
        assert maps.shape == (24, 64, 64) and maps.dtype == np.int32
        assert len(item["frames"]) == 24 and item["frames"][-1].mode == "RGB" and item["frames"][0].size == (64, 64)
        assert {info["id"] for info in item["segments_info"]} == set(np.unique(maps).tolist()) - {0}
        assert len(item["segments_info"]) <= NUM_MOVING[1]
        masks = tube_masks(item)
        assert masks.shape == (len(item["segments_info"]), 24, 64, 64) and masks.any((1, 2, 3)).all()
        assert np.array_equal(masks.any(0), maps > 0)
    frames = videos[0]["frames"]
    assert [np.asarray(frame).mean() for frame in frames[2:4]] == [np.asarray(frames[t]).mean() for t in (2, 3)]
    with pytest.raises(IndexError, match="0 to 23"):
        frames[24]


def test_things_move_hide_each_other_leave_and_come_back(videos):
    """Counted over thirty videos; a thing is hidden by others if its pixels vanish while its path is in the image."""
    returned = hidden = 0
    for index, item in enumerate(videos):
        scene = MovingShapesDataset(30, 24, 64, seed=7)._scene(index)
        for info in item["segments_info"]:
            thing = scene.things[info["id"] - 1]
            seen = (item["segmentation_maps"] == info["id"]).any((1, 2))
            full = np.array([(thing.coverage(frame, 64)[0] >= 0.5).any() for frame in range(24)])
            first, last = np.flatnonzero(seen)[[0, -1]]
            returned += not full[first:last].all()
            hidden += bool((full & ~seen).any())
            steps = np.diff([thing.center(frame, 64) for frame in range(24)], axis=0)
            assert np.abs(steps).max(0) == pytest.approx(np.abs(thing.velocity)), "it moves, and evenly"
    assert returned >= 5 and hidden >= 3


def test_a_things_colours_move_with_it():
    """Its paint moves with it: in every frame the thing in front shows the same colours."""
    scene = MovingShapesDataset(1, 2, 64, seed=1)._scene(0)
    thing = scene.things[-1]
    plain = pickle.loads(pickle.dumps(scene))
    object.__setattr__(plain, "noise", 0.0)
    object.__setattr__(plain, "light", np.ones_like(scene.light))
    for frame in (0, 1):
        alpha, place, inside = thing.coverage(frame, 64)
        drawn = np.asarray(plain.frame(frame))[place][alpha == 1]
        assert len(drawn) and np.abs(drawn - thing.paint[inside][alpha == 1].clip(0, 255)).max() <= 1


@pytest.mark.parametrize("num_frames", [5, 16])
def test_the_occlusion_clips_star_is_hidden_and_seen_again(num_frames):
    item = occlusion_clip(num_frames, 96)
    masks = tube_masks(item)
    assert [info["id"] for info in item["segments_info"]] == [1, 2, 3]
    assert [info["category_id"] for info in item["segments_info"]] == [3, 0, 3]
    areas = masks.sum((2, 3))
    absent = np.flatnonzero(areas[0] == 0)
    assert 1 <= len(absent) <= num_frames / 2 and np.array_equal(absent, np.arange(absent[0], absent[-1] + 1))
    assert areas[0][[0, -1]] == pytest.approx(areas[0].max(), rel=0.1) and areas[0].max() > 50
    assert (areas[1:] > 50).all(), "the others are always seen"


def test_impossible_videos_are_refused():
    for arguments, message in (((-1,), "num_videos"), ((1, 0), "num_frames"), ((1, 4, 16), "at least 32")):
        with pytest.raises(ValueError, match=message):
            MovingShapesDataset(*arguments)
    with pytest.raises(ValueError, match="Unknown"):
        MovingShapesDataset(1, shapes=("blob",))
    with pytest.raises(ValueError, match="5 or more"):
        occlusion_clip(4)
    with pytest.raises(IndexError, match="0 to 2"):
        MovingShapesDataset(3)[3]
    assert ShapesDataset(1).categories[:4] == MovingShapesDataset(1).categories
