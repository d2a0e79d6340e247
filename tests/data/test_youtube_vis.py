"""Reading and writing YouTube-VIS' annotation files."""

import itertools
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m2f_hf.data import (
    DatasetError,
    MovingShapesDataset,
    ShapesDataset,
    YouTubeVISDataset,
    open_dataset,
    open_youtube_vis,
    tube_masks,
    write_coco_panoptic,
)
from m2f_hf.data import write_youtube_vis as write
from m2f_hf.data.problems import FileProblem, Problems


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    return write(MovingShapesDataset(3, num_frames=4, image_size=48, seed=5), tmp_path_factory.mktemp("data") / "train")


def changed(written: Path, folder: Path, change) -> Path:
    """The annotation file after `change` of its content, in another folder; frames stay where they are."""
    content = json.loads((written / "instances.json").read_text())
    change(content)
    path = folder / "changed.json"
    path.write_text(json.dumps(content))
    return path


def test_written_videos_read_back_the_same(written):
    shapes = MovingShapesDataset(3, num_frames=4, image_size=48, seed=5)
    dataset, report = open_youtube_vis(written / "instances.json")
    assert [
        {key: category[key] for key in shapes.categories[0]} for category in dataset.categories
    ] == shapes.categories
    for index in range(3):
        mine, theirs = dataset[index], shapes[index]
        assert np.array_equal(tube_masks(mine), tube_masks(theirs))
        assert [info["category_id"] for info in mine["segments_info"]] == [
            info["category_id"] for info in theirs["segments_info"]
        ]
        assert all(info["isthing"] and not info["iscrowd"] for info in mine["segments_info"])
        for one, other in zip(mine["frames"], theirs["frames"], strict=True):
            assert np.array_equal(np.asarray(one), np.asarray(other))
        assert (mine["height"], mine["width"]) == (48, 48) and len(mine["frame_files"]) == 4
        areas = tube_masks(mine).sum((2, 3)).tolist()
        assert [[area or 0 for area in info["areas"]] for info in mine["segments_info"]] == areas
    assert report.num_frames.tolist() == [4, 4, 4] and report.num_opened == 3
    assert report.counts.sum() == sum(len(shapes[index]["segments_info"]) for index in range(3))
    assert "frames: 12, 4..4 in a video" in str(report) and "48..48 x 48..48" in str(report)
    assert str(written / "instances.json") in str(report)
    with pytest.raises(FileExistsError, match="another folder"):
        write(shapes, written)


def test_frames_are_opened_on_access(written, tmp_path):
    """A data set travels to worker processes, and one frame of a video can be missing while another is read."""

    def lose_frame(content):
        content["videos"][0]["file_names"][2] = "lost.png"

    dataset = YouTubeVISDataset(changed(written, tmp_path, lose_frame), written / "JPEGImages", Problems())
    item = pickle.loads(pickle.dumps(dataset))[0]
    assert item["frames"][1].size == (48, 48)
    with pytest.raises(FileProblem, match=r"lost\.png"):
        item["frames"][2]
    with pytest.raises(IndexError, match="0 to 2"):
        dataset[3]


@pytest.mark.parametrize("layout", ["ytvis_2019", "ytvis_2021", "one folder"])
def test_frames_are_found_in_the_usual_layouts(written, tmp_path, layout):
    content = json.loads((written / "instances.json").read_text())
    file, frames = {
        "ytvis_2019": ("train.json", "train/JPEGImages"),
        "ytvis_2021": ("train/instances.json", "train/JPEGImages"),
        "one folder": ("any.json", "."),
    }[layout]
    for name in content["videos"][0]["file_names"]:
        (tmp_path / frames / name).parent.mkdir(parents=True, exist_ok=True)
        Image.open(written / "JPEGImages" / name).save(tmp_path / frames / name)
    content["videos"] = content["videos"][:1]
    content["annotations"] = [entry for entry in content["annotations"] if entry["video_id"] == 1]
    (tmp_path / file).write_text(json.dumps(content))
    assert YouTubeVISDataset(tmp_path / file)[0]["frames"][3].size == (48, 48)


@pytest.mark.parametrize("how", ["missing", "null", "empty"])
def test_a_validation_set_without_annotations_is_readable(written, tmp_path, how):
    def strip(content):
        content["annotations"] = None if how == "null" else []
        if how == "missing":
            del content["annotations"]

    dataset, report = open_youtube_vis(changed(written, tmp_path, strip), written / "JPEGImages")
    assert len(dataset) == 3 and dataset[0]["segments_info"] == [] and len(dataset[0]["frames"]) == 4
    assert tube_masks(dataset[0]).shape == (0, 4, 48, 48)
    assert dataset.is_annotated == report.is_annotated == (how == "empty")
    assert ("no annotations" in str(report)) == (how != "empty")


def test_masks_of_all_kinds_crowds_and_windows_separators(written, tmp_path):
    square = {"size": [48, 48], "counts": [49, 2, 46, 2, 48 * 48 - 99]}

    def change(content):
        content["videos"] = content["videos"][:1]
        content["videos"][0]["file_names"] = [name.replace("/", "\\") for name in content["videos"][0]["file_names"]]
        own = {"video_id": 1, "category_id": 4, "iscrowd": 1}
        masks = [[[1, 1, 3, 1, 3, 3, 1, 3]], square, [], None]
        content["annotations"] = [{**own, "id": 7, "segmentations": masks}]
        content["annotations"].append({**own, "id": 8, "iscrowd": 0, "segmentations": [None, [], None, None]})

    dataset, report = open_youtube_vis(changed(written, tmp_path, change), written / "JPEGImages")
    (segment,) = dataset[0]["segments_info"]
    assert segment["iscrowd"] == 1 and segment["category_id"] == 3
    masks = tube_masks(dataset[0])[0]
    assert np.array_equal(masks[0], masks[1]) and masks[0].sum() == 4 and masks[0][1:3, 1:3].all()
    assert not masks[2:].any()
    assert report.num_crowds == 1 and report.counts.sum() == 0
    assert "no mask in any frame" in str(report) and "annotation 8" in str(report)


def test_all_problems_are_reported_at_once_with_file_names(written, tmp_path):
    frames = tmp_path / "frames"
    for path in sorted((written / "JPEGImages").glob("*/*.png")):
        (frames / path.parent.name).mkdir(parents=True, exist_ok=True)
        Image.open(path).save(frames / path.parent.name / path.name)
    (frames / "00000" / "00001.png").unlink()
    (frames / "00000" / "00002.png").write_bytes(b"damaged")
    Image.new("RGB", (40, 48)).save(frames / "00001" / "00003.png")

    def change(content):
        content["videos"].append({**content["videos"][2], "id": 9, "file_names": []})
        content["videos"].append({**content["videos"][2], "id": 3})
        first, *rest = content["annotations"]
        first["segmentations"].append(None)
        other = next(entry for entry in rest if entry["video_id"] == 2)
        other["segmentations"].pop()
        last = content["annotations"][-1]
        for extra in ({"category_id": 77}, {"video_id": 55}, {"segmentations": [{"size": [9, 9], "counts": [81]}] * 4}):
            content["annotations"].append({**last, "id": 1000 + len(content["annotations"]), **extra})

    with pytest.raises(DatasetError) as caught:
        open_youtube_vis(changed(written, tmp_path, change), frames)
    message = str(caught.value)
    for expected in (
        "00000/00001.png",
        "00000/00002.png",
        "cannot be read",
        "00001/00003.png is 48x40 (height x width), expected 48x48",
        "annotation 1 has 5 for 4 frames",
        "has 3 for 4 frames",
        "has category 77",
        "of video 55",
        "share an id",
        "have no frames",
        "Run lengths do not fit",
        "00002/00000.png: annotation",
    ):
        assert expected in message, expected
    assert message.count("00000/00001.png") == 1, "a missing frame is reported once"


def test_a_missing_size_is_the_first_frames(written, tmp_path):
    def strip(content):
        for video in content["videos"]:
            del video["height"], video["width"]

    dataset, report = open_youtube_vis(changed(written, tmp_path, strip), written / "JPEGImages")
    assert (dataset[1]["height"], dataset[1]["width"]) == (48, 48) and report.sizes.tolist() == [[48, 48]] * 3


@pytest.mark.parametrize("height", [float("nan"), 1e30, -48])
def test_impossible_sizes_are_reported(height, written, tmp_path):
    def change(content):
        content["videos"][1]["height"] = height

    with pytest.raises(DatasetError, match=r"state a size that no picture has: correct or remove(?s:.)*00001"):
        open_youtube_vis(changed(written, tmp_path, change), written / "JPEGImages")


def test_files_of_another_kind_are_refused(written, tmp_path):
    with pytest.raises(FileNotFoundError, match="annotation file in YouTube-VIS' form"):
        YouTubeVISDataset(tmp_path / "none.json")
    for change, message in (
        (lambda content: content.pop("videos"), "lacks videos"),
        (lambda content: content["videos"][1].pop("file_names"), "`file_names` is not in `videos` at 1"),
        (lambda content: content["videos"][1].update(file_names=[3]), "should be texts, in video 2"),
        (lambda content: content["annotations"][0].update(segmentations="x"), "`segmentations` should be a list"),
    ):
        with pytest.raises(ValueError, match=message):
            YouTubeVISDataset(changed(written, tmp_path, change), written / "JPEGImages")
    with pytest.raises(DatasetError, match="empty"):
        YouTubeVISDataset(changed(written, tmp_path, lambda content: content.update(videos=[], annotations=[])))
    with pytest.raises(FileNotFoundError, match=r"frames .* in none of"):
        YouTubeVISDataset(written / "instances.json", tmp_path)


def from_frames(content: dict, name: str) -> dict:
    """A list of frames with objects in one order, each a label and a polygon, in YouTube-VIS' form."""
    frames = content["frames"]
    labels = sorted({thing["label"] for frame in frames for thing in frame["objects"]})
    video = {"id": 1, "file_names": [f"{name}/{frame['image']}" for frame in frames]}
    video |= {"height": frames[0]["height"], "width": frames[0]["width"], "length": len(frames)}
    annotations = [
        {
            "id": number,
            "video_id": 1,
            "category_id": 1 + labels.index(things[0]["label"]),
            "iscrowd": 0,
            "segmentations": [[[value for corner in thing["polygon"] for value in corner]] for thing in things],
        }
        for number, things in enumerate(zip(*(frame["objects"] for frame in frames), strict=True), start=1)
    ]
    categories = [{"id": number, "name": label} for number, label in enumerate(labels, start=1)]
    return {"videos": [video], "annotations": annotations, "categories": categories}


def test_reads_the_real_clip(shared, tmp_path):
    folder = shared / "data" / "video_clip"
    pytest.importorskip("pycocotools", reason="pycocotools is not installed")
    content = from_frames(json.loads((folder / "annotations.json").read_text()), folder.name)
    (tmp_path / "clip.json").write_text(json.dumps(content))
    dataset, report = open_youtube_vis(tmp_path / "clip.json", folder.parent)
    item = dataset[0]
    masks = tube_masks(item)
    assert masks.shape == (3, 5, 563, 1000) and masks.any((2, 3)).all()
    assert [dataset.categories[info["category_id"]]["name"] for info in item["segments_info"]] == [
        "track",
        "track",
        "car",
    ]
    # From frame to frame a thing stays where it was, not where another is.
    for tube in masks:
        for one, other in itertools.pairwise(tube):
            assert (one & other).sum() > 0.7 * (one | other).sum()
    assert report.most_instances == 3


# --- opened for training ---


def test_a_folder_is_opened_like_images(written, tmp_path):
    """Splits by name, classes of the validation videos by name, a share held out where there is no such split."""
    folder = tmp_path / "both"
    write(MovingShapesDataset(3, 4, 48, seed=5), folder / "train")
    others = write(
        MovingShapesDataset(2, 5, 48, seed=6, shapes=("star", "circle", "triangle", "rectangle")), folder / "valid"
    )
    found = open_dataset(folder)
    assert found.task == "video" and (len(found.train), len(found.validation)) == (3, 2)
    assert "taken for: YouTube-VIS' annotations" in str(found.report) and "train videos: 3" in str(found.report)
    plain = YouTubeVISDataset(others / "instances.json")
    for index in range(2):
        names = [
            [dataset.categories[info["category_id"]]["name"] for info in dataset[index]["segments_info"]]
            for dataset in (plain, found.validation)
        ]
        assert names[0] == names[1] and np.array_equal(tube_masks(plain[index]), tube_masks(found.validation[index]))
    most = max(len(found.train[index]["segments_info"]) for index in range(3))
    assert found.report.splits[0].most_segments == most
    for source in (written, written / "instances.json"):
        held = open_dataset(source, task="video", held_out=0.3)
        assert (len(held.train), len(held.validation)) == (2, 1) and "1 of 3 videos held out" in str(held.report)
        ids = sorted(part[index]["video_id"] for part in held[:2] for index in range(len(part)))
        assert ids == [1, 2, 3]
    for index in range(2):
        assert {info["id"] for info in held.train[index]["segments_info"]} == set(
            range(1, 1 + int((held.train.segments[:, 0] == index).sum()))
        )


def test_videos_without_annotations_are_no_validation_data(written, tmp_path):
    """As YouTube-VIS' own validation set is."""
    for name in ("train", "valid"):
        write(MovingShapesDataset(3, 4, 48, seed=5), tmp_path / name)
    path = tmp_path / "valid" / "instances.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "annotations": None}))
    found = open_dataset(tmp_path)
    assert "validation: no annotations, left out" in str(found.report) and len(found.train) == 2
    with pytest.raises(DatasetError, match="no annotations"):
        open_dataset(tmp_path / "valid")


def test_videos_and_images_are_not_taken_for_each_other(written, tmp_path):
    with pytest.raises(ValueError, match="annotations of videos: no good for task='panoptic'"):
        open_dataset(written, task="panoptic")
    write_coco_panoptic(ShapesDataset(2, 48), tmp_path / "images", ShapesDataset(1).categories)
    with pytest.raises(ValueError, match="task='video', which needs YouTube-VIS'"):
        open_dataset(tmp_path / "images", task="video")


def test_problems_of_videos_are_reported_on_opening(written, tmp_path):
    def spoil(content):
        content["videos"][0]["file_names"][1] = "nowhere/00001.png"
        content["annotations"][-1]["segmentations"] += [None, None]

    path = changed(written, tmp_path, spoil)
    (tmp_path / "JPEGImages").symlink_to(written / "JPEGImages")
    with pytest.raises(DatasetError) as caught:
        open_dataset(path)
    assert "nowhere/00001.png" in str(caught.value) and "has 6 for 4 frames" in str(caught.value)
