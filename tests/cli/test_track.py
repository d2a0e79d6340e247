"""`m2f track`, with the bundled models and generated clips."""

import importlib.util
import json
import os
import sys
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image, ImageSequence
from tiny import write_video

from m2f_hf import (
    BUNDLED_MODEL,
    BUNDLED_VIDEO_MODEL,
    Mask2FormerForVideoSegmentation,
    Mask2FormerVideoProcessor,
    stream_frames,
)
from m2f_hf.cli import main
from m2f_hf.cli.clip_files import category_ids
from m2f_hf.data import MovingShapesDataset
from m2f_hf.draw.films import Animation, Movie
from m2f_hf.inference.tracking import ClipTracker, to_id_map
from m2f_hf.known.label_sets import label_set
from m2f_hf.processing.rle import decode_rle


NUM_FRAMES = 7
SMALL = ["--window", "4"]


@pytest.fixture(scope="module")
def frames():
    return list(MovingShapesDataset(num_videos=2, num_frames=NUM_FRAMES, image_size=96, seed=3)[1]["frames"])


@pytest.fixture
def clip(tmp_path, frames):
    folder = tmp_path / "clip"
    folder.mkdir()
    for index, frame in enumerate(frames):
        frame.save(folder / f"{index}.png")
    return folder


def track(*arguments):
    return main(["track", *map(str, arguments)])


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def id_names(number=NUM_FRAMES, folder="ids"):
    return [f"{folder}/{index:06d}.png" for index in range(number)]


def test_files_hold_what_the_tracker_says(clip, frames, tmp_path, capsys):
    pytest.importorskip("av", reason="needs PyAV")
    out = tmp_path / "out"
    assert track(clip, "--output", out, *SMALL) == 0
    assert names(out) == sorted([*id_names(), "overlay.gif", "overlay.mp4", "results.json"])
    model = Mask2FormerForVideoSegmentation.from_pretrained(BUNDLED_VIDEO_MODEL).eval()
    expected = list(
        ClipTracker(model, Mask2FormerVideoProcessor.from_pretrained(BUNDLED_VIDEO_MODEL), window=4)(frames)
    )
    found = {info["id"] for result in expected for info in result["segments_info"]}
    assert found, "the bundled model finds something, or this test shows nothing"

    results = json.loads((out / "results.json").read_text())
    assert {result["track_id"] for result in results} == found
    for result in results:
        assert result["video_id"] == 1 and len(result["segmentations"]) == NUM_FRAMES
        of_track = [
            {info["id"]: (info, mask) for info, mask in zip(of["segments_info"], of["segmentation"], strict=True)}
            for of in expected
        ]
        scores = []
        for frame, encoding in enumerate(result["segmentations"]):
            info, mask = of_track[frame].get(result["track_id"], (None, None))
            assert (encoding is None) == (mask is None)
            if info is not None:
                assert np.array_equal(decode_rle(encoding, 96, 96), mask)
                scores.append(info["score"])
                label = info["label_id"]
        assert result["score"] == pytest.approx(np.mean(scores), abs=1e-5)
        # The generated shapes are no data set with ids of its own: they count from 1.
        assert result["category_id"] == label + 1 and result["label"] == model.config.id2label[label]

    for frame, name in enumerate(id_names()):
        picture = Image.open(out / name)
        assert picture.mode == "L" and np.array_equal(np.asarray(picture), to_id_map(expected[frame]))
    overlays = list(stream_frames(out / "overlay.mp4"))
    assert [overlay.shape for overlay in overlays] == [(3, 288, 288)] * NUM_FRAMES
    with Image.open(out / "overlay.gif") as gif:
        assert sum(1 for _ in ImageSequence.Iterator(gif)) == NUM_FRAMES and gif.size == (288, 288)
    said = capsys.readouterr()
    assert f"in {NUM_FRAMES} frames -> {out / 'overlay.mp4'}" in said.out
    assert "generated shapes only" in said.err and f"{NUM_FRAMES}/{NUM_FRAMES}" in said.err


def test_a_video_file_gives_tracks_at_its_own_rate(frames, tmp_path):
    write_video(tmp_path / "clip.mp4", frames)
    assert track(tmp_path / "clip.mp4", "--output", tmp_path / "out", "--task", "panoptic") == 0
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "out" / "overlay.mp4")) as container:
        assert container.streams.video[0].average_rate == 5
    with Image.open(tmp_path / "out" / "overlay.gif") as gif:
        assert gif.info["duration"] == 200


def test_without_pyav_there_are_pictures(clip, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert track(clip, "--output", out, *SMALL) == 0
    monkeypatch.setitem(sys.modules, "av", None)
    assert track(clip, "--output", out, *SMALL) == 0
    expected = sorted([*id_names(), *id_names(folder="overlay"), "overlay.gif", "results.json"])
    assert names(out) == expected, "the film of the run before is gone"
    assert "pip install 'm2f_hf[video]'" in capsys.readouterr().err
    assert track(tmp_path / "clip" / "0.png", "--output", out) == 2
    assert "needs PyAV" in capsys.readouterr().err


def test_a_second_run_replaces_only_the_files_of_the_first(clip, tmp_path):
    out = tmp_path / "out"
    assert track(clip, "--output", out, *SMALL) == 0
    (out / "notes.txt").write_text("mine")
    (out / "ids" / "mine.png").write_text("mine")
    for index in (5, 6):
        (clip / f"{index}.png").unlink()
    assert track(clip, "--output", out, *SMALL) == 0
    assert [name for name in names(out) if name.startswith("ids/0")] == id_names(5)
    assert (out / "notes.txt").exists() and (out / "ids" / "mine.png").exists()
    assert [name for name in os.listdir(out) if name.startswith(".")] == []


def test_damaged_frames_are_named_and_the_others_are_done(clip, tmp_path, capsys):
    (clip / "2.png").write_bytes(b"no picture")
    assert track(clip, "--output", tmp_path / "out", *SMALL) == 1
    assert "frame 2 cannot be read" in (said := capsys.readouterr().err) and "2.png" in said
    assert [name for name in names(tmp_path / "out") if name.startswith("ids/")] == id_names()
    assert not np.asarray(Image.open(tmp_path / "out" / "ids" / "000002.png")).any()
    for result in json.loads((tmp_path / "out" / "results.json").read_text()):
        assert result["segmentations"][2] is None


def test_what_goes_wrong_leaves_an_earlier_run_as_it_was(clip, tmp_path, capsys):
    out = tmp_path / "out"
    assert track(clip, "--output", out, *SMALL) == 0
    before = {name: (out / name).read_bytes() for name in names(out)}
    Image.new("RGB", (50, 50)).save(clip / "6.png")
    assert track(clip, "--output", out, *SMALL) == 2
    assert "differ in size (96x96 in frame 0, 50x50 in frame 6)" in capsys.readouterr().err
    assert {name: (out / name).read_bytes() for name in names(out)} == before


def test_an_image_model_runs_with_a_warning(clip, tmp_path, capsys):
    assert track(clip, "--output", tmp_path / "out", "--model", BUNDLED_MODEL, "--window", "3", "--overlap", "0") == 0
    assert "is an image model and has learned nothing of time" in capsys.readouterr().err
    labels = {result["label"] for result in json.loads((tmp_path / "out" / "results.json").read_text())}
    assert labels and not any("ground" in label for label in labels), "stuff is no instance"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--window", "0"], "window must be at least 1"),
        (["--window", "4", "--overlap", "4"], "overlap 4 must be 0 or more and less than window 4"),
        (["--task", "panoptic", "--max-detections", "3"], "max_detections is for task='instance'"),
        (["--max-detections", "0"], "max_detections must be at least 1"),
        (["--fps", "0"], "no number of frames a second"),
        (["--fps", "1e-5"], "no number of frames a second from 0.01 to 1000"),
        (["--device", "cuda:77"], "cuda:77 cannot be used here"),
        (["--model", "nowhere/at/all"], "nowhere/at/all"),
    ],
)
def test_what_cannot_be_run_says_so_and_writes_nothing(arguments, message, clip, tmp_path, capsys):
    assert track(clip, "--output", tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("m2f: ") and message in error
    assert not (tmp_path / "out").exists()


def test_clips_and_folders_that_cannot_be_say_so(clip, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    (tmp_path / "file").write_text("in the way")
    without_pyav = importlib.util.find_spec("av") is None
    for source, output, message in (
        (tmp_path / "nowhere", "out", "no folder or video file"),
        (tmp_path / "empty", "out", "has no frames that can be read"),
        (tmp_path / "broken.mp4", "out", "needs PyAV" if without_pyav else "is no video file that can be read"),
        (clip, "file", "a file is in the way; name a folder"),
    ):
        assert track(source, "--output", tmp_path / output) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert track(clip, "--output", tmp_path, "--window", "4") == 0
    for name in ("ids", "overlay.gif"):
        assert track(tmp_path / name, "--output", tmp_path) == 2
        assert "would be replaced by the results" in capsys.readouterr().err
    assert len(list((tmp_path / "ids").iterdir())) == NUM_FRAMES
    assert track("x" * 300, "--output", tmp_path) == 2
    assert "too long" in capsys.readouterr().err


def test_obstacles_to_results_are_reported_before_any_is_made(clip, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "results.json").write_text("of an earlier run")
    (out / "ids").write_text("a file")
    assert track(clip, "--output", out, *SMALL) == 2
    assert f"the file {out / 'ids'} is where results would go" in capsys.readouterr().err
    (out / "ids").unlink()
    (out / "overlay.gif").mkdir()
    assert track(clip, "--output", out, *SMALL) == 2
    assert f"the folder {out / 'overlay.gif'} is where results would go" in capsys.readouterr().err
    assert (out / "results.json").read_text() == "of an earlier run"


def test_a_clip_of_which_nothing_can_be_read_leaves_no_folder(clip, tmp_path, capsys):
    for file in clip.iterdir():
        file.write_bytes(b"")
    assert track(clip, "--output", tmp_path / "out") == 2
    assert "has no frames that can be read" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_narrow_clip_and_a_window_longer_than_memory(tmp_path):
    """Three columns are no channels; and a window needs the memory of the frames that there are."""
    (tmp_path / "clip").mkdir()
    Image.new("RGB", (3, 40)).save(tmp_path / "clip" / "1.png")
    assert track(tmp_path / "clip", "--output", tmp_path / "out", "--window", 10**7) == 0
    with Image.open(tmp_path / "out" / "ids" / "000000.png") as ids:
        assert ids.size == (3, 40)


def test_a_truncated_film_is_reported(frames, tmp_path, capsys):
    write_video(tmp_path / "clip.avi", frames, codec="mjpeg")
    content = (tmp_path / "clip.avi").read_bytes()
    (tmp_path / "clip.avi").write_bytes(content[: len(content) // 2])
    assert track(tmp_path / "clip.avi", "--output", tmp_path / "out", *SMALL) in (0, 1)
    assert f"says that it has {NUM_FRAMES} frames: it may be incomplete" in capsys.readouterr().err


def test_ctrl_c_leaves_an_earlier_run_as_it_was(clip, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    for is_first in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr("m2f_hf.cli.clip_files.encode_rle", Mock(side_effect=KeyboardInterrupt))
            assert track(clip, "--output", out, *SMALL) == 130
        assert "m2f: stopped" in capsys.readouterr().err
        if is_first:
            assert not out.exists()
            out.mkdir()
            (out / "results.json").write_text("of an earlier run")
    assert os.listdir(out) == ["results.json"]


def test_a_film_has_no_longer_sides_than_its_format(tmp_path):
    pytest.importorskip("av", reason="needs PyAV")
    movie = Movie.open(tmp_path / "long.mp4", 10.0)
    movie.add(Image.new("RGB", (20000, 10)))
    movie.close()
    (frame,) = stream_frames(tmp_path / "long.mp4")
    assert frame.shape == (3, 8, 16384)


def test_categories_have_their_data_sets_ids_or_count_from_one():
    assert category_ids({0: "circle", 1: "star"}) == [1, 2]
    for name in ("ytvis2019", "ytvis2021", "coco-instance"):
        known = label_set(name)
        assert category_ids(known.id2label) == [label.dataset_id for label in known.labels]
    assert category_ids(label_set("coco-instance").id2label)[-1] == 90


def test_the_animation_of_a_long_clip_is_bounded(tmp_path):
    gif = Animation(rate=10.0)
    for frame in range(500):
        gif.add(Image.new("RGB", (960, 540), (frame // 2, 255 - frame // 2, 40)))
    gif.save(tmp_path / "long.gif")
    with Image.open(tmp_path / "long.gif") as image:
        durations = [frame.info["duration"] for frame in ImageSequence.Iterator(image)]
        assert image.size == (480, 270) and len(durations) <= 120
    assert abs(sum(durations) - 50_000) <= 1000


@pytest.mark.parametrize(("shades", "seconds"), [((0, 0, 0, 0), 655.35), ((0, 60, 120, 180), 163.83)])
def test_the_animation_of_a_slow_clip_has_the_longest_pauses(shades, seconds, tmp_path):
    gif = Animation(rate=0.001)
    for shade in shades:
        gif.add(Image.new("RGB", (8, 8), (shade, 0, 0)))
    gif.save(tmp_path / "slow.gif")
    with Image.open(tmp_path / "slow.gif") as image:
        assert image.info["duration"] == pytest.approx(1000 * seconds, abs=10)
