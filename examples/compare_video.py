"""A video model against an image model that is run frame by frame, its instances joined to tracks by their overlap.

    python examples/compare_video.py --model m2f_hf/assets/shapes-video --image_model m2f_hf/assets/shapes-panoptic \
        --output runs/compare-video --picture docs/occlusion.png

Both see the same generated videos that no training has seen. What can be set in post-processing and in joining is
chosen for each side by its AP on other videos (`--choice_videos`). Measured are video AP, and identity: of things that
are seen, then gone for some frames, then seen again, for how many one track covers the thing before and after. In the
output folder: `results.json` and `results.md`. `--picture`: a strip of the first clip in which the video model keeps
the star that goes behind a circle, and the joined frames lose it, if there is one.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from m2f_hf import (
    ClipTracker,
    M2FImageProcessor,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerForVideoSegmentation,
    Mask2FormerVideoProcessor,
)
from m2f_hf.data import MovingShapesDataset, occlusion_clip, tube_masks
from m2f_hf.data.synthetic.shapes import TEST_SEED, VALIDATION_SEED
from m2f_hf.draw.segments import contact_sheet, draw_segments
from m2f_hf.metrics import VideoAP
from m2f_hf.metrics.video_ap import tubes


MAX_TRACKS = 10
"""Of a video, as in the original; of the joined tracks the best-scored."""
SEEN, GONE = 0.25, 0.02
"""A thing counts as seen from this share of its largest area on, and as gone below that one."""
COVERED = 0.5
"""IoU over the frames before a gap, over those after it, and over all, from which a track covers the thing there."""
FIGURES = ("ap", "ap50", "ap75", "ar10")
VIDEO_SETTINGS = {"use_mask_quality": (False, True), "mask_threshold": (0.4, 0.5, 0.6)}
JOINED_SETTINGS = {
    "threshold": (0.05, 0.1, 0.3),
    "max_overlap": (0.5, 0.7),
    "min_iou": (0.1, 0.3),
    "max_gap": (0, 4),
    "mean_of_seen": (False, True),
}
COLORS = ((31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189), (140, 86, 75), (227, 119, 194))
"""Of the tracks in a strip, RGB."""

Tracks = list[dict[str, Any]]
"""Dicts of `label_id`, `score` and `segmentations` (T, height, width) bool, by falling score."""


# --- tracks of the video model ---


class VideoSide:
    """The video model: all frames of a clip at once."""

    settings = VIDEO_SETTINGS

    def __init__(self, folder: str) -> None:
        self.model = Mask2FormerForVideoSegmentation.from_pretrained(folder).eval()
        self.processor = Mask2FormerVideoProcessor.from_pretrained(folder)

    @torch.inference_mode()
    def read(self, item: Mapping[str, Any]) -> Any:
        """What the model says of a clip, before anything is set."""
        outputs = self.model(**self.processor(list(item["frames"]), return_tensors="pt"))
        return outputs, (item["height"], item["width"])

    def tracks(self, read: Any, **settings: Any) -> Tracks:
        """Its tracks with these settings."""
        outputs, size = read
        found = self.processor.post_process_video_instance_segmentation(
            outputs, threshold=0.0, target_sizes=[size], max_detections=MAX_TRACKS, **settings
        )[0]
        masks = found["segmentation"].numpy()
        return [{**info, "segmentations": mask} for info, mask in zip(found["segments_info"], masks, strict=True)]


class WindowedSide(VideoSide):
    """The video model over windows of a clip, their tracks joined; post-processing as the checkpoint has it."""

    settings: Mapping[str, Sequence[Any]] = {}

    def __init__(self, folder: str, window: int) -> None:
        super().__init__(folder)
        self.tracker = ClipTracker(self.model, self.processor, window=window, threshold=0.0, max_detections=MAX_TRACKS)

    def read(self, item: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The results of all frames."""
        return list(self.tracker(item["frames"]))

    def tracks(self, read: list[dict[str, Any]]) -> Tracks:  # type: ignore[override]
        """The best tracks, each scored by the mean over the frames that it is seen in."""
        found: dict[int, list[tuple[int, dict[str, Any], np.ndarray]]] = {}
        for result in read:
            for info, mask in zip(result["segments_info"], result["segmentation"].numpy(), strict=True):
                found.setdefault(info["id"], []).append((result["frame"], info, mask))
        tracks = []
        for seen in found.values():
            masks = np.zeros((len(read), *seen[0][2].shape), dtype=bool)
            for frame, _, mask in seen:
                masks[frame] = mask
            score = sum(info["score"] for _, info, _ in seen) / len(seen)
            tracks.append({"label_id": seen[-1][1]["label_id"], "score": score, "segmentations": masks})
        return sorted(tracks, key=lambda track: -track["score"])[:MAX_TRACKS]


# --- frames of the image model, joined ---


class JoinedSide:
    """The image model: frame by frame, as `m2f segment` would, instances joined by IoU."""

    settings = JOINED_SETTINGS

    def __init__(self, folder: str) -> None:
        self.model = Mask2FormerForUniversalSegmentation.from_pretrained(folder).eval()
        self.processor = M2FImageProcessor.from_pretrained(folder)

    @torch.inference_mode()
    def read(self, item: Mapping[str, Any]) -> list[Tracks]:
        """The instances of each frame above the lowest threshold: dicts of `label_id`, `score` and `mask`."""
        frames = []
        for frame in item["frames"]:
            outputs = self.model(**self.processor(frame, return_tensors="pt"))
            found = self.processor.post_process_instance_segmentation(
                outputs,
                threshold=min(JOINED_SETTINGS["threshold"]),
                target_sizes=[(item["height"], item["width"])],
                return_binary_maps=True,
            )[0]
            masks = np.asarray(found["segmentation"], dtype=bool)
            frames.append([{**info, "mask": mask} for info, mask in zip(found["segments_info"], masks, strict=True)])
        return frames

    def tracks(self, read: list[Tracks], **settings: Any) -> Tracks:
        """Its tracks with these settings."""
        return join_frames(read, **settings)


class _Track(NamedTuple):
    """A track that grows: the masks and the instances of the frames in which it was seen."""

    masks: dict[int, np.ndarray]
    instances: list[Mapping[str, Any]]


def join_frames(
    frames: Sequence[Tracks], threshold: float, max_overlap: float, min_iou: float, max_gap: int, mean_of_seen: bool
) -> Tracks:
    """Instances of single frames to tracks: the pairs of highest IoU first, each track and each instance once.

    Args:
        frames: the instances of each frame.
        threshold: instances of a lower score are left out.
        max_overlap: of two instances of a frame with a higher IoU the better one stays: in a track they would be twice.
        min_iou: of an instance with the track's last mask; below, it begins a track.
        max_gap: frames that a track may miss; then it has ended.
        mean_of_seen: a track's score is the mean over its frames; otherwise over all frames of the clip.

    Returns:
        The `MAX_TRACKS` best; a track's class is the one with the highest sum of scores.
    """
    tracks: list[_Track] = []
    for number, instances in enumerate(frames):
        found = without_doubles([one for one in instances if one["score"] >= threshold], max_overlap)
        alive = [track for track in tracks if number - max(track.masks) <= max_gap + 1]
        pairs = [
            (iou(track.masks[max(track.masks)], instance["mask"]), i, j)
            for i, track in enumerate(alive)
            for j, instance in enumerate(found)
        ]
        joined, used = set(), set()
        for overlap, i, j in sorted(pairs, reverse=True):
            if overlap >= min_iou and i not in used and j not in joined:
                used.add(i)
                joined.add(j)
                alive[i].masks[number] = found[j]["mask"]
                alive[i].instances.append(found[j])
        tracks += [_Track({number: new["mask"]}, [new]) for j, new in enumerate(found) if j not in joined]
    result = [_finish(track, len(frames), mean_of_seen) for track in tracks]
    return sorted(result, key=lambda track: -track["score"])[:MAX_TRACKS]


def without_doubles(instances: Tracks, max_overlap: float) -> Tracks:
    """Instances of one frame by falling score, without those that overlap a better one too far."""
    kept: Tracks = []
    for instance in instances:
        if all(iou(instance["mask"], other["mask"]) <= max_overlap for other in kept):
            kept.append(instance)
    return kept


def _finish(track: _Track, num_frames: int, mean_of_seen: bool) -> dict[str, Any]:
    sums: dict[int, float] = {}
    for instance in track.instances:
        sums[instance["label_id"]] = sums.get(instance["label_id"], 0.0) + instance["score"]
    label = max(sums, key=lambda label: sums[label])
    masks = np.zeros((num_frames, *track.instances[0]["mask"].shape), dtype=bool)
    for number, mask in track.masks.items():
        masks[number] = mask
    over = len(track.instances) if mean_of_seen else num_frames
    return {"label_id": label, "score": sums[label] / over, "segmentations": masks}


def iou(one: np.ndarray, other: np.ndarray) -> float:
    """Of two masks, or tubes, of one shape; 0 where both are empty."""
    union = np.count_nonzero(one | other)
    return np.count_nonzero(one & other) / union if union else 0.0


# --- identity ---


def gaps(areas: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The gaps of a thing: (T,) pixels in each frame -> the frames before and after, in which it is seen well.

    "Before" reaches back to the gap before, "after" to the next one.
    """
    is_gone = areas < max(1.0, GONE * areas.max())
    is_seen = areas >= SEEN * areas.max()
    edges = np.flatnonzero(np.diff(is_gone.astype(int), prepend=0, append=0)).reshape(-1, 2)  # first, and one past last
    borders = [0, *edges.ravel().tolist(), len(areas)]
    for number in range(1, len(borders) - 1, 2):
        before, after = (
            np.flatnonzero(is_seen[first:last]) + first
            for first, last in ((borders[number - 1], borders[number]), (borders[number + 1], borders[number + 2]))
        )
        if len(before) and len(after):
            yield before, after


def keeps(tracks: Tracks, target: np.ndarray, before: np.ndarray, after: np.ndarray) -> bool:
    """Whether one track covers the target (T, height, width) before the gap, after it, and over all frames: on another
    thing in the meantime it does not."""
    parts = (before, after, np.arange(len(target)))
    return any(min(iou(track["segmentations"][part], target[part]) for part in parts) >= COVERED for track in tracks)


def cases(item: Mapping[str, Any]) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """The gaps of all things of a video: which segment, the frames before and after."""
    masks = tube_masks(item)
    return [(number, *gap) for number, mask in enumerate(masks) for gap in gaps(mask.sum((1, 2)).astype(float))]


# --- the comparison ---


def average_precision(items: Sequence[Any], tracks_of: Sequence[Tracks], categories: Any) -> dict[str, Any]:
    """Video AP of the tracks of some videos."""
    metric = VideoAP(categories)
    for item, tracks in zip(items, tracks_of, strict=True):
        metric.update(item["video_id"], (len(item["frames"]), item["height"], item["width"]), tracks, tubes(item))
    return metric.compute()


def choose(side: Any, items: Sequence[Any], categories: Any) -> tuple[dict[str, Any], float]:
    """The settings of a side with the highest AP on some videos, and that AP."""
    read = [side.read(item) for item in tqdm(items, f"{type(side).__name__}: to choose by", unit="video")]
    best: tuple[dict[str, Any], float] = ({}, -1.0)
    for values in itertools.product(*side.settings.values()):
        settings = dict(zip(side.settings, values, strict=True))
        result = average_precision(items, [side.tracks(one, **settings) for one in read], categories)
        best = max(best, (settings, result["ap"] or 0.0), key=lambda entry: entry[1])
    return best


class Measured(NamedTuple):
    """What one side reached.

    Args:
        figures: of the videos.
        in_videos, in_clips: for each of them, gap by gap as `cases` lists them, whether the thing was kept.
        clip_tracks: the tracks of each clip.
    """

    figures: dict[str, float]
    in_videos: list[list[bool]]
    in_clips: list[list[bool]]
    clip_tracks: list[Tracks]


def measure(
    side: Any, settings: Mapping[str, Any], items: Sequence[Any], hidden: Sequence[Any], dataset: Any
) -> Measured:
    """AP of the videos, and which gaps are kept in them and in clips made to hide one thing."""
    tracks_of = [
        side.tracks(side.read(item), **settings)
        for item in tqdm([*items, *hidden], f"{type(side).__name__}: measured", unit="video")
    ]
    kept = [
        [keeps(tracks, tube_masks(item)[number], *gap) for number, *gap in cases(item)]
        for item, tracks in zip([*items, *hidden], tracks_of, strict=True)
    ]
    result = average_precision(items, tracks_of[: len(items)], dataset.categories)
    figures = {name: result[name] for name in FIGURES}
    return Measured(figures, kept[: len(items)], kept[len(items) :], tracks_of[len(items) :])


def row(name: str, result: Measured) -> str:
    """A row of the table."""
    counts = [f"{sum(map(sum, kept))} of {sum(map(len, kept))}" for kept in (result.in_videos, result.in_clips)]
    return f"| {name} | " + " | ".join([f"{result.figures[figure]:.3f}" for figure in FIGURES] + counts) + " |"


# --- picture ---


def draw_strip(item: Mapping[str, Any], tracks: Tracks, names: Mapping[int, str], shown: Sequence[int]) -> list[Any]:
    """Frames with, for each thing, the track that covers it best painted over them, in one colour."""
    best = [
        max(range(len(tracks)), key=lambda number: iou(tracks[number]["segmentations"], mask))
        for mask in tube_masks(item)
        if tracks
    ]
    kept = [tracks[number] for number in dict.fromkeys(best)]
    palette = dict(enumerate(COLORS))
    infos = [
        {"id": number + 1, "label_id": number % len(COLORS), "label": f"{number + 1} {names[track['label_id']]}"}
        for number, track in enumerate(kept)
    ]
    strip = []
    for frame in shown:
        painted = np.zeros((item["height"], item["width"]), dtype=np.int32)
        for number in reversed(range(len(kept))):
            painted[kept[number]["segmentations"][frame]] = number + 1
        strip.append(draw_segments(item["frames"][frame], painted, infos, colors=palette, scale=2))
    return strip


def draw_case(
    clips: Sequence[Any], sides: Mapping[str, Measured], names: Mapping[int, str]
) -> tuple[Image.Image, int] | None:
    """The first clip in which the first side kept the hidden thing and the second lost it; None where there is none."""
    for index, item in enumerate(clips):
        first, second = (result.in_clips[index] for result in sides.values())
        for case, (_, before, after) in enumerate(cases(item)):
            if first[case] and not second[case]:
                start, end = max(before[0], before[-1] - 2), min(after[-1], after[0] + 2)
                shown = np.unique(np.linspace(start, end, 6).round().astype(int)).tolist()
                rows = [draw_strip(item, result.clip_tracks[index], names, shown) for result in sides.values()]
                sheet = contact_sheet(rows, list(sides), [f"frame {frame + 1}" for frame in shown])
                return sheet.quantize(64), index  # the frames' noise would make a large file
    return None


# --- the script ---


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of the video model")
    parser.add_argument("--image_model", required=True, help="folder or Hub id of the image model")
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--videos", type=int, default=60, help="unseen videos that are measured")
    parser.add_argument("--choice_videos", type=int, default=20, help="other unseen videos to choose settings by")
    parser.add_argument("--occlusion_clips", type=int, default=20, help="clips in which a star goes behind a circle")
    parser.add_argument("--length", type=int, default=16, help="frames of a video")
    parser.add_argument("--image_size", type=int, default=160, help="side of the frames")
    parser.add_argument(
        "--windows", type=int, nargs="*", default=[], help="also measure the video model over windows of so many frames"
    )
    parser.add_argument("--picture", type=Path, help="file for a strip of a clip that one side kept and the other lost")
    args = parser.parse_args(arguments)
    if min(args.videos, args.choice_videos, args.occlusion_clips) < 1:
        parser.error("--videos, --choice_videos and --occlusion_clips are 1 or more")
    return args


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    args = parse_arguments(arguments)
    videos = functools.partial(MovingShapesDataset, num_frames=args.length, image_size=args.image_size)
    dataset = videos(args.videos, seed=TEST_SEED)
    items = [dataset[index] for index in range(args.videos)]
    others = videos(args.choice_videos, seed=VALIDATION_SEED + 1)
    hidden = [occlusion_clip(args.length, args.image_size, seed) for seed in range(args.occlusion_clips)]
    sides = {
        "video model": VideoSide(args.model),
        "image model, joined frames": JoinedSide(args.image_model),
        **{f"video model, windows of {window}": WindowedSide(args.model, window) for window in args.windows},
    }
    results, report = {}, {}
    lines = [
        "| | " + " | ".join([figure.upper() for figure in FIGURES]) + " | kept in the videos | kept in the clips |"
    ]
    lines.append("|---|" + "---|" * (len(FIGURES) + 2))
    for name, side in sides.items():
        settings, chosen_at = choose(side, [others[index] for index in range(len(others))], dataset.categories)
        results[name] = measure(side, settings, items, hidden, dataset)
        lines.append(row(name, results[name]))
        kept = (results[name].in_videos, results[name].in_clips)
        report[name] = {
            "settings": settings,
            "ap of the choice": chosen_at,
            **results[name].figures,
            "kept": [sum(map(sum, part)) for part in kept],
            "cases": [sum(map(len, part)) for part in kept],
        }
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "results.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (args.output / "results.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    if args.picture is not None:
        names = {category["id"]: category["name"] for category in dataset.categories}
        drawn = draw_case(hidden, dict(itertools.islice(results.items(), 2)), names)
        if drawn is None:
            print("no clip that the video model kept and the joined frames lost: no picture")
        else:
            drawn[0].save(args.picture)
            print(f"{args.picture}: clip {drawn[1]}, the first that only the video model kept")
    return report


if __name__ == "__main__":
    main()
