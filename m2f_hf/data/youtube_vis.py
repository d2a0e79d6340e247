"""YouTube-VIS' annotation files (Yang et al., arXiv 1905.04804), read where they lie, and written."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from ..processing.rle import encode_rle
from .base import Selection, check_pixels, read_image, read_size
from .categories import make_categories
from .coco import check_entries, check_segmentation, find_folder, group_annotations, image_folders, read_json
from .coco_panoptic import new_folder
from .packed import PackedList
from .problems import IS_MISSING, FileProblem, Problems, named
from .report import class_lines, problem_lines
from .video import Frames, VideoDataset, frame_mask


_FIELDS: Mapping[str, Mapping[str, tuple[type, ...]]] = {
    "videos": {"id": (int, str), "file_names": (list,), "height": (int, float), "width": (int, float)},
    "annotations": {
        "id": (int, str),
        "video_id": (int, str),
        "category_id": (int,),
        "segmentations": (list,),
        "iscrowd": (int, float),
    },
    "categories": {"id": (int,), "name": (str,), "isthing": (int,)},
}
_NO_SIDE = 1 << 20  # pixels: no picture is as long
_OTHER_SIZE = "Frames have another size than the first of their video, or than its annotation says: scale them."


def _read(path: Path) -> dict[str, Any]:
    """The content of an annotation file; without annotations (a validation set's) they are None.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, or not in YouTube-VIS' form.
    """
    content = read_json(path, "YouTube-VIS'")
    missing = {"videos", "categories"} - set(content if isinstance(content, dict) else ())
    if missing:
        raise ValueError(f"{path} is not in YouTube-VIS' form: it lacks {', '.join(sorted(missing))}.")
    content.setdefault("annotations", None)
    needed = {
        "videos": ("id", "file_names"),
        "annotations": ("video_id", "segmentations"),
        "categories": ("id", "name"),
    }
    try:
        for part, keys in needed.items():
            if content[part] is not None:
                check_entries(content[part], f"`{part}`", keys, _FIELDS[part])
    except ValueError as error:
        raise ValueError(f"{path} is not in YouTube-VIS' form: {error}.") from error
    nameless = [
        video["id"] for video in content["videos"] if not all(isinstance(name, str) for name in video["file_names"])
    ]
    if nameless:
        raise ValueError(
            f"{path} is not in YouTube-VIS' form: `file_names` should be texts, in video {named(nameless)}."
        )
    return content


class YouTubeVISDataset(Selection, VideoDataset):
    """Videos of an annotation file in YouTube-VIS' form: for each instance a mask or None in every frame.

    Masks stay as the file has them (polygons, run lengths), so instances may overlap. Videos without an annotation are
    kept, and so are files without annotations, of which the items have empty `segments_info`.

    Items are as `VideoDataset` says, with `segmentations`; `frame_files` are the paths of their frames, and what is
    not read is not opened.

    Args:
        annotation_file: for example `ytvis_2019/train.json`, or `ytvis_2021/train/instances.json`.
        frame_folder: what the file names of frames are relative to; looked for where it usually is (`JPEGImages`,
            `train/JPEGImages`, …) if None.
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
    segments: np.ndarray

    def __init__(
        self,
        annotation_file: str | os.PathLike[str],
        frame_folder: str | os.PathLike[str] | None = None,
        problems: Problems | None = None,
    ) -> None:
        self.annotation_file = Path(annotation_file)
        content = _read(self.annotation_file)
        found = Problems() if problems is None else problems
        self.is_annotated = content["annotations"] is not None
        self.categories = make_categories(content["categories"], str(self.annotation_file))
        for category in self.categories:
            category["isthing"] = category["isthing"] is not False
        names = [name for video in content["videos"] for name in _file_names(video)]
        self.frame_folder = Path(frame_folder or self.annotation_file.parent)
        if names:
            candidates = _frame_folders(self.annotation_file) if frame_folder is None else [self.frame_folder]
            self.frame_folder = find_folder(candidates, names, "frames")
        self._packed = PackedList(self._records(content, found))
        self._positions = np.arange(len(self._packed))
        self.segments = np.array(
            [
                (position, segment["category_id"], segment["iscrowd"])
                for position, record in enumerate(self._packed)
                for segment in record["segments_info"]
            ],
            dtype=np.int32,
        ).reshape(-1, 3)
        if not len(self):
            found.error("The data set is empty: an annotation file must list videos.", str(self.annotation_file))
        if problems is None:
            found.raise_errors(str(self.annotation_file))

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
        """Decode every frame of a video; what is wrong with any goes to `problems`. Returns height and width."""
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
        """Frames of each video: (videos,) int64."""
        return np.array([len(self._record(index)["file_names"]) for index in range(len(self))], dtype=np.int64)

    def _record(self, index: int) -> dict[str, Any]:
        self._check_index(index)
        return self._packed[int(self._positions[index])]

    def _records(self, content: Mapping[str, Any], problems: Problems) -> Iterator[dict[str, Any]]:
        videos: dict[Any, Mapping[str, Any]] = {}
        for video in content["videos"]:
            if video["id"] in videos:
                problems.error(
                    f"Videos in {self.annotation_file} share an id: give each its own.",
                    f"{_name(video)}: id {video['id']}",
                )
            videos[video["id"]] = video
        by_video = group_annotations(content["annotations"] or (), videos, "video", self.annotation_file, problems)
        contiguous = {category["dataset_id"]: category["id"] for category in self.categories}
        for video_id, video in videos.items():
            if not video["file_names"]:
                problems.error(f"Videos in {self.annotation_file} have no frames: remove them.", _name(video))
                continue
            for name in _file_names(video):
                if not os.path.isfile(self.frame_folder / name):
                    fix = "put them there, or remove them and their masks from the file"
                    problems.error(f"Frames {IS_MISSING} in {self.frame_folder}: {fix}.", name)
            stated = (video.get("height") or 0, video.get("width") or 0)
            if not all(0 <= side < _NO_SIDE for side in stated):  # nor is NaN
                fix = f"correct or remove `height` and `width` in {self.annotation_file}"
                problems.error(f"Videos state a size that no picture has: {fix}.", f"{_name(video)}: {stated}")
                continue
            size = (int(stated[0]), int(stated[1])) if all(stated) else None
            annotations = by_video.get(video_id, ())
            segments = [
                self._segment(annotation, number, video, size, contiguous, problems)
                for number, annotation in enumerate(annotations, start=1)
            ]
            yield {
                "video_id": video_id,
                "file_names": _file_names(video),
                "size": size,
                "segments_info": [segment for segment in segments if segment is not None],
            }

    def _segment(
        self,
        annotation: Mapping[str, Any],
        number: int,
        video: Mapping[str, Any],
        size: tuple[int, int] | None,
        contiguous: Mapping[int, int],
        problems: Problems,
    ) -> dict[str, Any] | None:
        where = f"{_name(video)}: annotation {annotation.get('id')}"
        masks, names = annotation["segmentations"], _file_names(video)
        if annotation.get("category_id") not in contiguous:
            problems.error(
                f"Instances have a category that {self.annotation_file} does not list: add it, or remove them.",
                f"{where} has category {annotation.get('category_id')}",
            )
            return None
        if len(masks) != len(names):
            problems.error(
                "Annotations have more or fewer masks than their video has frames: one for each is meant, null where "
                "the instance is not seen.",
                f"{where} has {len(masks)} for {len(names)} frames",
            )
            return None
        checked = [
            check_segmentation(mask, size, f"{name}: annotation {annotation.get('id')}", problems) if mask else None
            for mask, name in zip(masks, names, strict=True)
        ]
        if not any(checked):
            problems.warn("Instances have no mask in any frame and are left out.", where)
            return None
        areas = annotation.get("areas")
        return {
            "id": number,
            "category_id": contiguous[annotation["category_id"]],
            "iscrowd": int(bool(annotation.get("iscrowd"))),
            "segmentations": checked,
            **({"areas": areas} if isinstance(areas, list) and len(areas) == len(names) else {}),
        }


def _file_names(video: Mapping[str, Any]) -> list[str]:
    return [name.replace("\\", "/") for name in video["file_names"]]


def _name(video: Mapping[str, Any]) -> str:
    """What a person finds a video by: the folder of its frames."""
    names = _file_names(video)
    return (names[0].rpartition("/")[0] if names else "") or f"video {video['id']}"


def _frame_folders(annotation_file: Path) -> list[Path]:
    folders = image_folders(annotation_file)
    return [place for folder in folders for place in (folder, folder / "JPEGImages", folder / "frames")]


def _check_size(name: str, size: tuple[int, int], expected: tuple[int, int]) -> None:
    if tuple(size) != tuple(expected):
        raise FileProblem(
            _OTHER_SIZE, f"{name} is {size[0]}x{size[1]} (height x width), expected {expected[0]}x{expected[1]}"
        )


def _read_frame(files: Sequence[str], size: tuple[int, int], index: int) -> Image.Image:
    """One frame, RGB.

    Raises:
        FileProblem: it is missing or damaged, or of another size.
    """
    image = read_image(Path(files[index]), files[index])
    _check_size(files[index], (image.height, image.width), size)
    return image


# --- what is in it ---


@dataclass
class VideoReport:
    """What is in a data set of videos. `str` of it is text to read.

    Attributes:
        source: what was opened.
        categories: the classes.
        is_annotated: whether there are annotations at all.
        num_frames: (videos,) int64, frames of each video.
        num_opened: of how many videos all frames were decoded.
        sizes: (N, 2) int64, height and width in pixels of those videos.
        counts: (classes,) int64, instances of each class, without crowds.
        most_instances: most instances in one video, without crowds.
        num_crowds: instances that are crowds.
        num_empty: videos without an instance.
        problems: errors and warnings, with file names.
    """

    source: str
    categories: Sequence[Mapping[str, Any]]
    is_annotated: bool
    num_frames: np.ndarray
    num_opened: int
    sizes: np.ndarray
    counts: np.ndarray
    most_instances: int
    num_crowds: int
    num_empty: int
    problems: Problems = field(default_factory=Problems)

    def __str__(self) -> str:
        lines = [self.source, "taken for: YouTube-VIS' annotations", f"classes:   {len(self.categories)}", ""]
        lines.append(f"videos: {len(self.num_frames)}")
        if len(self.num_frames):
            frames = self.num_frames
            lines.append(f"  frames: {frames.sum()}, {frames.min()}..{frames.max()} in a video")
        if len(self.sizes):
            height, width = self.sizes.T
            lines.append(f"  size (width x height): {width.min()}..{width.max()} x {height.min()}..{height.max()}")
        if self.is_annotated:
            empty = f"; {self.num_empty} videos without one" if self.num_empty else ""
            crowds = f"; crowds, which are ignored in training: {self.num_crowds}" if self.num_crowds else ""
            lines.append(f"  instances: {self.counts.sum()}, at most {self.most_instances} in a video{empty}{crowds}")
        else:
            lines.append("  no annotations: for prediction only")
        if self.num_opened < len(self.num_frames):
            lines.append(f"  videos whose frames were opened to check them: {self.num_opened} (max_opened=None: all)")
        lines += ["", *class_lines(self.categories, {"instances": self.counts}, "class")] if self.is_annotated else []
        return "\n".join([*lines, *problem_lines(self.problems)])


def open_youtube_vis(
    annotation_file: str | os.PathLike[str],
    frame_folder: str | os.PathLike[str] | None = None,
    max_opened: int | None = 50,
) -> tuple[YouTubeVISDataset, VideoReport]:
    """Open a data set in YouTube-VIS' form, decode frames of it, and say what was found.

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
    report = inspect_videos(dataset, problems, max_opened)
    problems.raise_errors(str(annotation_file))
    return dataset, report


def inspect_videos(dataset: YouTubeVISDataset, problems: Problems, max_opened: int | None) -> VideoReport:
    """Decode the frames of some videos, and count. What is wrong goes to `problems`.

    Args:
        max_opened: as `open_youtube_vis` takes it.
    """
    total = len(dataset)
    count = total if max_opened is None else min(total, max_opened)
    chosen = np.linspace(0, total - 1, count).round().astype(int).tolist()
    bar = tqdm(chosen, f"Checking {dataset.annotation_file.name}", unit="video", disable=count < 20)
    sizes = [size for size in (dataset.check(index, problems) for index in bar) if size is not None]
    counted = dataset.segments[dataset.segments[:, 2] == 0]
    return VideoReport(
        source=str(dataset.annotation_file),
        categories=dataset.categories,
        is_annotated=dataset.is_annotated,
        num_frames=dataset.num_frames(),
        num_opened=count,
        sizes=np.array(sizes, dtype=np.int64).reshape(-1, 2),
        counts=np.bincount(counted[:, 1], minlength=len(dataset.categories)),
        most_instances=int(np.bincount(counted[:, 0]).max(initial=0)),
        num_crowds=len(dataset.segments) - len(counted),
        num_empty=total - len(np.unique(dataset.segments[:, 0])),
        problems=problems,
    )


# --- writing ---


def write_youtube_vis(dataset: VideoDataset, folder: str | os.PathLike[str]) -> Path:
    """Write a data set's videos in YouTube-VIS' form: `instances.json`, and a folder of PNGs for each in `JPEGImages/`.

    Masks become run lengths. Everything is written to a temporary folder beside `folder`, which then takes its name.

    Returns:
        The path of `folder`.

    Raises:
        FileExistsError: if `folder` exists already.
    """
    target = Path(folder)
    with new_folder(target) as work:
        videos: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in tqdm(range(len(dataset)), desc="Writing videos", unit="video"):
            item = dataset[index]
            names = [f"{index:05d}/{number:05d}.png" for number in range(len(item["frames"]))]
            (work / "JPEGImages" / names[0]).parent.mkdir(parents=True)
            for name, frame in zip(names, item["frames"], strict=True):
                frame.save(work / "JPEGImages" / name)
            size = {"height": item["height"], "width": item["width"]}
            videos.append({"id": index + 1, "file_names": names, "length": len(names), **size})
            for segment in item["segments_info"]:
                masks = [_encode(frame_mask(item, segment, number)) for number in range(len(names))]
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "video_id": index + 1,
                        "category_id": segment["category_id"] + 1,
                        "iscrowd": segment["iscrowd"],
                        "segmentations": [rle for rle, _ in masks],
                        "areas": [area for _, area in masks],
                    }
                )
        # As in YouTube-VIS, ids count from 1.
        categories = [{**category, "id": category["id"] + 1} for category in dataset.categories]
        content = {"videos": videos, "annotations": annotations, "categories": categories}
        (work / "instances.json").write_text(json.dumps(content), encoding="utf-8")
    return target


def _encode(mask: np.ndarray | None) -> tuple[dict[str, Any] | None, int | None]:
    """Run lengths and area; both None where there is nothing."""
    if mask is None or not mask.any():
        return None, None
    return encode_rle(mask), int(np.count_nonzero(mask))
