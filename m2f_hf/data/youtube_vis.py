"""YouTube-VIS' annotation files (Yang et al., arXiv 1905.04804), read in place."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from .annotation_files import (
    AnnotationFile,
    check_exists,
    check_segmentation,
    find_folder,
    image_folders,
    read_annotations,
)
from .base import check_pixels, read_image, read_size
from .problems import IS_MISSING, FileProblem, Problems, named
from .report import SplitReport, class_lines, count_segments, problem_lines, split_lines, spread
from .video import Frames, VideoDataset


_NO_SIDE = 1 << 20  # pixels: no picture is as long
_OTHER_SIZE = "Frames have another size than the first of their video, or than its annotation says: scale them."


_NEEDED = {
    "videos": ("id", "file_names"),
    "annotations": ("video_id", "segmentations"),  # a validation set has none
    "categories": ("id", "name"),
}


def _check(content: Mapping[str, Any]) -> None:
    nameless = [v["id"] for v in content["videos"] if not all(isinstance(name, str) for name in v["file_names"])]
    if nameless:
        raise ValueError(f"`file_names` should be texts, in video {named(nameless)}")


class YouTubeVISDataset(AnnotationFile, VideoDataset):
    """Videos of an annotation file in YouTube-VIS' form: for each instance a mask or None in every frame.

    Masks stay as the file has them (polygons, run lengths), so instances may overlap. Videos without an annotation are
    kept, with empty `segments_info`, also those of a file without annotations.

    Items are as `VideoDataset` says, with `segmentations`, and `frame_files`, the paths of their frames. Frames are
    opened when they are accessed.

    Args:
        annotation_file: for example `ytvis_2019/train.json`, or `ytvis_2021/train/instances.json`.
        frame_folder: what the file names of frames are relative to; None looks where it usually is
            (`JPEGImages`, `train/JPEGImages`, …).
        problems: collects what is wrong; if None, errors are raised at once.

    Attributes:
        is_annotated: whether the file has annotations.
        task: "video".
        segments: (S, 3) int32, position of the video, category id and iscrowd of every instance.

    Raises:
        FileNotFoundError: the annotation file or the frames are not there.
        ValueError: the file is not in YouTube-VIS' form, or (without `problems`) has errors; all are named.
    """

    task = "video"
    unit = "video"

    def __init__(
        self,
        annotation_file: str | os.PathLike[str],
        frame_folder: str | os.PathLike[str] | None = None,
        problems: Problems | None = None,
    ) -> None:
        path = Path(annotation_file)
        content = read_annotations(path, "YouTube-VIS'", _NEEDED, _check, optional=("annotations",))
        self.is_annotated = content["annotations"] is not None
        names = [name for video in content["videos"] for name in _file_names(video)]
        self.frame_folder = Path(frame_folder or path.parent)
        if names:
            inside = [place / name for place in image_folders(path) for name in (".", "JPEGImages", "frames")]
            self.frame_folder = find_folder(frame_folder, inside, names, "frames")
        self._pack(path, content, problems)
        for category in self.categories:
            category["isthing"] = category["isthing"] is not False

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._record(index)
        files = [str(self.frame_folder / name) for name in record["file_names"]]
        height, width = record["size"] or read_size(Path(files[0]), files[0])
        return {
            "frames": Frames(partial(_read_frame, files, (height, width)), len(files)),
            "frame_files": files,
            "segments_info": self._with_own_classes(record["segments_info"]),
            "video_id": record["video_id"],
            "file_name": str(Path(files[0]).parent),
            "height": height,
            "width": width,
        }

    def check(self, index: int, problems: Problems) -> tuple[int, int] | None:
        """Decode every frame of a video and report what is wrong; return height and width."""
        record = self._record(index)
        size: tuple[int, int] | None = record["size"] and (record["size"][0], record["size"][1])
        for name in record["file_names"]:
            path = self.frame_folder / name
            try:
                own = read_size(path, str(path))
                size = size or own
                _check_size(str(path), own, size)
                check_pixels(path, str(path))
            except FileProblem as problem:
                if IS_MISSING not in problem.kind:  # those are known from the file names
                    problems.error(problem.kind, problem.where)
        return size

    def num_frames(self) -> np.ndarray:
        """Return the number of frames of each video: (videos,) int64."""
        return np.array([len(self._record(index)["file_names"]) for index in range(len(self))], dtype=np.int64)

    def _record(self, index: int) -> dict[str, Any]:
        self._check_index(index)
        return self._packed[int(self._positions[index])]

    def _records(self, content: Mapping[str, Any], problems: Problems) -> Iterator[dict[str, Any]]:
        file = self.annotation_file
        videos = self._by_id(content, _name, problems)
        by_video = self._group(content, videos, problems)
        for video_id, video in videos.items():
            names = _file_names(video)
            if not names:
                problems.error(f"Videos in {file} have no frames: remove them.", _name(video))
                continue
            check_exists(self.frame_folder, names, "Frames", problems, more=" and their masks")
            stated = (video.get("height") or 0, video.get("width") or 0)
            if not all(0 <= side < _NO_SIDE for side in stated):  # nor is NaN
                fix = f"correct or remove `height` and `width` in {file}"
                problems.error(f"Videos state a size that no picture has: {fix}.", f"{_name(video)}: {stated}")
                continue
            size = (int(stated[0]), int(stated[1])) if all(stated) else None
            segments = [
                self._segment(annotation, number, video, size, problems)
                for number, annotation in enumerate(by_video.get(video_id, ()), start=1)
            ]
            kept = [segment for segment in segments if segment is not None]
            yield {"video_id": video_id, "file_names": names, "size": size, "segments_info": kept}

    def _segment(
        self,
        annotation: Mapping[str, Any],
        number: int,
        video: Mapping[str, Any],
        size: tuple[int, int] | None,
        problems: Problems,
    ) -> dict[str, Any] | None:
        own = f"annotation {annotation.get('id')}"
        masks, names = annotation["segmentations"], _file_names(video)
        category = self._category(annotation, _name(video), problems)
        if category is None:
            return None
        if len(masks) != len(names):
            problems.error(
                "Annotations have more or fewer masks than their video has frames: one for each is meant, null where "
                "the instance is not seen.",
                f"{_name(video)}: {own} has {len(masks)} for {len(names)} frames",
            )
            return None
        checked = [
            check_segmentation(mask, size, f"{name}: {own}", problems) if mask else None
            for mask, name in zip(masks, names, strict=True)
        ]
        if not any(checked):
            problems.warn("Instances have no mask in any frame and are left out.", f"{_name(video)}: {own}")
            return None
        areas = annotation.get("areas")
        return {
            "id": number,
            "category_id": category,
            "iscrowd": int(bool(annotation.get("iscrowd"))),
            "segmentations": checked,
            **({"areas": areas} if isinstance(areas, list) and len(areas) == len(names) else {}),
        }


def _file_names(video: Mapping[str, Any]) -> list[str]:
    return [name.replace("\\", "/") for name in video["file_names"]]


def _name(video: Mapping[str, Any]) -> str:
    """Return the folder of a video's frames, by which a person finds it."""
    names = _file_names(video)
    return (names[0].rpartition("/")[0] if names else "") or f"video {video['id']}"


def _check_size(name: str, size: tuple[int, int], expected: tuple[int, int]) -> None:
    if tuple(size) != tuple(expected):
        raise FileProblem(
            _OTHER_SIZE, f"{name} is {size[0]}x{size[1]} (height x width), expected {expected[0]}x{expected[1]}"
        )


def _read_frame(files: Sequence[str], size: tuple[int, int], index: int) -> Image.Image:
    """Read one frame, RGB; raise a `FileProblem` where it is missing, damaged or of another size."""
    image = read_image(Path(files[index]), files[index])
    _check_size(files[index], (image.height, image.width), size)
    return image


# --- what is in it ---


@dataclass
class VideoReport(SplitReport):
    """What is in a data set of videos, from which file, and its problems. `str` of it is text to read."""

    source: str = ""
    categories: Sequence[Mapping[str, Any]] = ()
    problems: Problems = field(default_factory=Problems)

    @property
    def most_instances(self) -> int:
        """Most instances in one video, without crowds."""
        return self.most_segments

    def __str__(self) -> str:
        head = [self.source, "taken for: YouTube-VIS' annotations", f"classes:   {len(self.categories)}", ""]
        classes = ["", *class_lines(self.categories, {"instances": self.counts}, "class")] if self.is_annotated else []
        return "\n".join([*head, *split_lines(self), *classes, *problem_lines(self.problems)])


def open_youtube_vis(
    annotation_file: str | os.PathLike[str],
    frame_folder: str | os.PathLike[str] | None = None,
    max_opened: int | None = 50,
) -> tuple[YouTubeVISDataset, VideoReport]:
    """Open a data set in YouTube-VIS' form, decode frames of it, and report what was found.

    Args:
        annotation_file, frame_folder: as `YouTubeVISDataset` takes them.
        max_opened: decode the frames of this many videos at most, spread evenly over the data set; None: of all.

    Raises:
        FileNotFoundError: the annotation file or the frames are not there.
        DatasetError: there are errors; all are named, with the files they are in.
        ValueError: the file is not in YouTube-VIS' form.
    """
    problems = Problems()
    dataset = YouTubeVISDataset(annotation_file, frame_folder, problems)
    report = inspect_videos(dataset, "", problems, max_opened)
    problems.raise_errors(str(annotation_file))
    return dataset, report


def inspect_videos(dataset: YouTubeVISDataset, name: str, problems: Problems, max_opened: int | None) -> VideoReport:
    """Decode the frames of some videos, and count. What is wrong goes to `problems`.

    `name` is the split's, `max_opened` as `open_youtube_vis` takes it.
    """
    chosen = spread(len(dataset), max_opened)
    bar = tqdm(chosen, f"Checking {dataset.annotation_file.name}", unit="video", disable=len(chosen) < 20)
    sizes = [size for size in (dataset.check(index, problems) for index in bar) if size is not None]
    return VideoReport(
        name=name,
        num_images=len(dataset),
        num_opened=len(chosen),
        sizes=np.array(sizes, dtype=np.int64).reshape(-1, 2),
        **count_segments(dataset.segments, len(dataset.categories), len(dataset)),
        unit="video",
        num_frames=dataset.num_frames(),
        is_annotated=dataset.is_annotated,
        source=str(dataset.annotation_file),
        categories=dataset.categories,
        problems=problems,
    )
