"""Frames joined to tracks, and what counts as an identity kept: by hand-made masks, and the script once."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m2f_hf import BUNDLED_MODEL, BUNDLED_VIDEO_MODEL
from m2f_hf.data import occlusion_clip, tube_masks


sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import compare_video
from compare_video import cases, gaps, join_frames, keeps


SETTINGS = {"threshold": 0.3, "max_overlap": 0.5, "min_iou": 0.1, "max_gap": 1, "mean_of_seen": True}


def square(left: int, top: int = 0) -> np.ndarray:
    mask = np.zeros((20, 40), dtype=bool)
    mask[top : top + 8, left : left + 8] = True
    return mask


def instance(mask: np.ndarray, label: int = 0, score: float = 0.8) -> dict:
    return {"mask": mask, "label_id": label, "score": score}


def test_things_that_move_a_little_are_joined_whatever_their_order():
    frames = [[instance(square(2 * t)), instance(square(30 - 2 * t, 12), 1, 0.9)][:: (-1) ** t] for t in range(5)]
    first, second = join_frames(frames, **SETTINGS)
    assert (first["label_id"], second["label_id"]) == (1, 0)
    assert first["score"] == pytest.approx(0.9) and second["score"] == pytest.approx(0.8)
    for t in range(5):
        assert np.array_equal(second["segmentations"][t], square(2 * t))
        assert np.array_equal(first["segmentations"][t], square(30 - 2 * t, 12))


def test_of_two_instances_on_one_thing_the_better_one_stays():
    frames = [[instance(square(3), 0, 0.9), instance(square(4), 1, 0.5), instance(square(20), 1, 0.5)]] * 2
    assert [track["label_id"] for track in join_frames(frames, **SETTINGS)] == [0, 1]
    assert len(join_frames(frames, **{**SETTINGS, "max_overlap": 0.9})) == 3


def test_a_track_ends_after_its_gap_and_its_class_is_voted_for():
    there, gone = [instance(square(3), 2, 0.6)], []
    tracks = join_frames([there, gone, there, [instance(square(3), 1, 0.9)], there], **SETTINGS)
    assert len(tracks) == 1 and tracks[0]["label_id"] == 2 and tracks[0]["score"] == pytest.approx(1.8 / 4)
    assert not tracks[0]["segmentations"][1].any()
    assert len(join_frames([there, gone, gone, there], **SETTINGS)) == 2
    [over_all] = join_frames([there, gone, gone, gone], **{**SETTINGS, "mean_of_seen": False})
    assert over_all["score"] == pytest.approx(0.6 / 4)
    assert join_frames([[instance(square(3), score=0.2)]], **SETTINGS) == [] == join_frames([[], []], **SETTINGS)


def test_gaps_lie_between_frames_in_which_a_thing_is_seen_well():
    def found(*areas):
        return [(before.tolist(), after.tolist()) for before, after in gaps(np.array(areas, dtype=float))]

    assert found(0, 0, 100, 100, 0, 0) == []  # it comes once
    assert found(100, 90, 10, 0, 0, 30, 100) == [([0, 1], [5, 6])]
    assert found(100, 0, 80, 0, 90) == [([0], [2]), ([2], [4])]
    assert found(100, 0, 10, 0, 90) == []  # in between it is not seen well enough to be followed


def test_an_identity_is_kept_by_one_track_before_and_after():
    item = occlusion_clip(8, 64)
    [(number, before, after)] = cases(item)
    assert number == 0
    target = tube_masks(item)[0]
    early, late = target.copy(), target.copy()
    early[after] = False
    late[before] = False
    whole = {"segmentations": target}
    assert keeps([whole], target, before, after)
    assert not keeps([{"segmentations": early}, {"segmentations": late}], target, before, after)
    stray = target.copy()  # on the other star while this one is hidden
    stray[before[-1] + 1 : after[0]] = tube_masks(item)[2][before[-1] + 1 : after[0]]
    assert not keeps([{"segmentations": stray}], target, before, after)
    other = {"segmentations": tube_masks(item)[2]}
    assert not keeps([other], target, before, after) and not keeps([], target, before, after)


def test_the_comparison_measures_both_on_the_same_videos(tmp_path, capsys):
    arguments = [
        "--videos",
        "2",
        "--choice_videos",
        "1",
        "--occlusion_clips",
        "1",
        "--length",
        "5",
        "--image_size",
        "64",
        "--windows",
        "3",
    ]
    models = ["--model", str(BUNDLED_VIDEO_MODEL), "--image_model", str(BUNDLED_MODEL)]
    picture = tmp_path / "strip.png"
    report = compare_video.main([*models, *arguments, "--output", str(tmp_path), "--picture", str(picture)])
    video, joined, windowed = report.values()
    assert video["cases"] == joined["cases"] and video["cases"][1] == 1
    assert all(0 <= side[figure] <= 1 for side in (video, joined, windowed) for figure in compare_video.FIGURES)
    assert set(joined["settings"]) == set(compare_video.JOINED_SETTINGS)
    assert json.loads((tmp_path / "results.json").read_text()) == report
    said = capsys.readouterr().out
    assert said.count("\n|") >= 3 and (picture.exists() != ("no picture" in said))
    if picture.exists():
        assert Image.open(picture).width > 300
