"""What is in a data set: counts, sizes, classes, problems; as text for people."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from .base import SegmentationDataset
from .hub_datasets import StreamingDataset
from .problems import IS_MISSING, FileProblem, Problems, describe, named


_NUM_CLASSES_SHOWN = 30
_NO_SIZES = np.zeros((0, 2), dtype=np.int64)


@dataclass
class SplitReport:
    """What is in one split.

    Attributes:
        name: "train" or "validation".
        num_images: number of images; None for a stream, whose length is unknown.
        num_opened: number of images that were opened with their label maps.
        sizes: (N, 2) int64, height and width in pixels of those.
        counts: (classes,) int64, segments of each class without crowds, of all images if `counts_all`, else of those
            that were opened; `most_segments`, in one image, likewise.
        num_crowds: segments that are crowds.
        num_empty: images without a segment.
        unit: "image" or "video".
        num_frames: of videos (N,) int64, frames of each.
        is_annotated: whether there are annotations at all.
    """

    name: str
    num_images: int | None
    num_opened: int
    sizes: np.ndarray
    counts: np.ndarray
    most_segments: int
    num_crowds: int
    num_empty: int
    counts_all: bool = True
    unit: str = "image"
    num_frames: np.ndarray | None = None
    is_annotated: bool = True


@dataclass
class DatasetReport:
    """What a data set was taken for and what is in it. `str` of it is text to read.

    Attributes:
        source: what was opened.
        form: what it was taken for, and how to override that.
        task: "panoptic", "instance" or "semantic".
        notes: what was assumed.
        problems: errors and warnings, with file names.
    """

    source: str
    form: str
    task: str
    categories: Sequence[Mapping[str, Any]]
    splits: list[SplitReport]
    notes: list[str] = field(default_factory=list)
    problems: Problems = field(default_factory=Problems)

    def __str__(self) -> str:
        things = sum(category["isthing"] is True for category in self.categories)
        stuff = sum(category["isthing"] is False for category in self.categories)
        kinds = f" ({things} things, {stuff} stuff)" if things + stuff else ""
        lines = [
            self.source,
            f"taken for: {self.form}",
            f"task:      {self.task}",
            f"classes:   {len(self.categories)}{kinds}",
            *(f"note:      {note}" for note in self.notes),
        ]
        for split in self.splits:
            lines += ["", *split_lines(split)]
        lines += ["", *class_lines(self.categories, {split.name: split.counts for split in self.splits}, "segments")]
        return "\n".join([*lines, *problem_lines(self.problems)])


def problem_lines(problems: Problems) -> list[str]:
    """Return lines of text on errors and warnings."""
    lines = []
    for title, found in (("errors", problems.errors), ("warnings", problems.warnings)):
        if found:
            lines += ["", f"{title}:", *describe(found)]
    return lines


def split_lines(split: SplitReport) -> list[str]:
    """Return lines of text on one split."""
    total = "a stream" if split.num_images is None else split.num_images
    empty = f" ({split.num_empty} without a segment)" if split.num_empty else ""
    lines = [f"{split.name} {split.unit}s: {total}{empty}".lstrip()]
    if split.num_frames is not None and len(split.num_frames):
        frames = split.num_frames
        lines.append(f"  frames: {frames.sum()}, {frames.min()}..{frames.max()} in a video")
    if len(split.sizes):
        height, width = split.sizes.T
        middle = np.argsort(height * width)[len(height) // 2]
        lines.append(
            f"  size (width x height): {width.min()}..{width.max()} x {height.min()}..{height.max()}, "
            f"typically {width[middle]}x{height[middle]}"
        )
    if split.num_images is None:
        return lines
    scope = "" if split.counts_all else f" in the {split.num_opened} {split.unit}s opened"
    crowds = f"; crowds, which are ignored in training: {split.num_crowds}" if split.num_crowds else ""
    most = f", at most {split.most_segments} in {'an' if split.unit == 'image' else 'a'} {split.unit}"
    found = f"  segments{scope}: {int(split.counts.sum())}{most}{crowds}"
    lines.append(found if split.is_annotated else "  no annotations: for prediction only")
    if split.num_opened < split.num_images:
        lines.append(f"  {split.unit}s and annotations opened to check them: {split.num_opened} (max_opened=None: all)")
    return lines


def class_lines(categories: Sequence[Mapping[str, Any]], counts: Mapping[str, np.ndarray], what: str) -> list[str]:
    """Return a table of the most frequent classes: how many (`what`) there are in each split, by its name."""
    totals = sum(counts.values(), np.zeros(len(categories), dtype=np.int64))
    present = [index for index in np.argsort(-totals, kind="stable").tolist() if totals[index]]
    shown = present[:_NUM_CLASSES_SHOWN]
    width = max([len(categories[index]["name"]) for index in shown] + [8])
    lines = [f"  {what:{width}}  kind   " + "".join(f"{name:>12}" for name in counts)] if shown else []
    for index in shown:
        kind = {True: "thing", False: "stuff", None: "-"}[categories[index]["isthing"]]
        cells = "".join(f"{int(split_counts[index]):>12}" for split_counts in counts.values())
        lines.append(f"  {categories[index]['name']:{width}}  {kind:5}  {cells}")
    if len(shown) < len(present):
        lines.append(f"  … and {len(present) - len(shown)} more classes")
    return lines


# --- counting ---


def spread(total: int, most: int | None) -> list[int]:
    """Choose `most` of `total` positions, spread evenly from the first to the last; all if None."""
    return np.linspace(0, total - 1, total if most is None else min(total, most)).round().astype(int).tolist()


def count_segments(segments: np.ndarray, num_classes: int, num_items: int) -> dict[str, Any]:
    """Count (S, 3) segments (item, class, iscrowd) of this many items: `counts` and what follows in a `SplitReport`."""
    counted = segments[segments[:, 2] == 0]
    return {
        "counts": np.bincount(counted[:, 1], minlength=num_classes),
        "most_segments": int(np.bincount(counted[:, 0]).max(initial=0)),
        "num_crowds": len(segments) - len(counted),
        "num_empty": num_items - len(np.unique(segments[:, 0])),
    }


def inspect_split(
    dataset: SegmentationDataset,
    native: SegmentationDataset,
    name: str,
    problems: Problems,
    max_opened: int | None = 500,
) -> SplitReport:
    """Open images and label maps of a data set, and count. Files known to be missing are not reported again.

    Args:
        native: the same items for the task that the annotations are made for.
        name: of the split.
        problems: gets what is wrong with files.
        max_opened: open this many images at most, spread evenly over the data set; None opens all.
    """
    total = len(dataset)
    chosen = spread(total, max_opened)
    sizes, opened = [], [np.zeros((0, 3), dtype=np.int64)]
    for index in tqdm(chosen, f"Checking {name}", unit="image", disable=len(chosen) < 200):
        try:
            item = dataset.annotation(index, check_image=True)
            _compare_with_map(item if native is dataset else native.annotation(index), native.task, problems)
        except FileProblem as problem:
            if not (IS_MISSING in problem.kind and any(IS_MISSING in kind for kind in problems.errors)):
                problems.error(problem.kind, problem.where)
            continue
        sizes.append((item["height"], item["width"]))
        found = [(index, segment["category_id"], segment["iscrowd"]) for segment in item["segments_info"]]
        opened.append(np.array(found, dtype=np.int64).reshape(-1, 3))
    knows_all = dataset.segments is not None
    segments = dataset.segments if dataset.segments is not None else np.concatenate(opened)
    return SplitReport(
        name=name,
        num_images=total,
        num_opened=len(sizes),
        sizes=np.array(sizes, dtype=np.int64).reshape(-1, 2),
        **count_segments(segments, len(dataset.categories), total if knows_all else len(sizes)),
        counts_all=knows_all or len(chosen) == total,
    )


def _compare_with_map(item: Mapping[str, Any], task: str, problems: Problems) -> None:
    """Report segments that are listed but not in the map, and the other way round (panoptic data)."""
    if task != "panoptic" or "segmentation_map" not in item:
        return
    present = set(np.unique(item["segmentation_map"]).tolist()) - {0}
    listed = {segment["id"] for segment in item["segments_info"]}
    if listed - present:
        problems.error(
            "Segments are listed that their panoptic map does not have: is it the map of that image, as stored "
            "(id = R + 256 G + 65536 B)?",
            f"{item['file_name']}: segment ids {sorted(listed - present)[:5]}",
        )
    if present - listed:
        problems.warn(
            "Panoptic maps have segments that are not listed; they count as void.",
            f"{item['file_name']}: segment ids {sorted(present - listed)[:5]}",
        )


def warn_about_empty_classes(
    categories: Sequence[Mapping[str, Any]], splits: Sequence[SplitReport], problems: Problems
) -> None:
    """Warn about classes that no image of a split has; only for splits whose images were all counted."""
    for split in splits:
        missing = [categories[index]["name"] for index in np.flatnonzero(split.counts == 0).tolist()]
        if split.counts_all and missing:
            effect = "cannot be learned" if split.name == "train" else "cannot be measured"
            problems.warn(
                f"{len(missing)} of {len(categories)} classes have no segment in {split.name} and {effect}.",
                named(missing),
            )


def stream_report(dataset: StreamingDataset, name: str) -> SplitReport:
    """Return the report on a stream, of which nothing is read ahead."""
    nothing = count_segments(np.zeros((0, 3), dtype=np.int64), len(dataset.categories), 0)
    return SplitReport(name, None, 0, _NO_SIZES, **nothing, counts_all=False)


def check_dataset(dataset: SegmentationDataset, max_opened: int | None = None) -> None:
    """Open every image and its annotation (or `max_opened` of them), as `open_dataset` does for 500.

    Raises:
        DatasetError: something is wrong; every problem is named, with the files it is in.
    """
    problems = Problems()
    inspect_split(dataset, dataset, "the data set", problems, max_opened)
    problems.raise_errors("The data set")
