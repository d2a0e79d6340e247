"""What annotation files in JSON have in common: reading, checks of every entry, finding the images, one packed list."""

import json
import os
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..processing.rle import as_polygons, check_rle, drawable_polygons
from .base import Selection
from .categories import make_categories
from .packed import PackedList
from .problems import IS_MISSING, Problems, named


_OUTSIDE_TOLERANCE = 1.0
"""Pixels that a polygon may reach beyond the image without a warning: tools round differently."""
_KIND_NAMES = {int: "a whole number", float: "a number", str: "text", list: "a list"}
_SEGMENT_FIELDS = {"id": (int,), "category_id": (int,), "iscrowd": (int, float), "area": (int, float)}
_SIZE_FIELDS = {"id": (int, str), "height": (int, float), "width": (int, float)}
FIELDS: Mapping[str, Mapping[str, tuple[type, ...]]] = {
    "images": {**_SIZE_FIELDS, "file_name": (str,), "coco_url": (str,)},
    "videos": {**_SIZE_FIELDS, "file_names": (list,)},
    "annotations": {
        **_SEGMENT_FIELDS,
        **dict.fromkeys(("id", "image_id", "video_id"), (int, str)),
        "file_name": (str,),
        **dict.fromkeys(("segments_info", "segmentations"), (list,)),
    },
    "categories": {"id": (int,), "name": (str,), "isthing": (int,)},
    "segments_info": _SEGMENT_FIELDS,
}
"""Types of the values that are read; null counts as missing."""
_PROGRESS_FROM = 5000
"""Images from which on reading takes long enough for a progress bar."""


# --- reading ---


def read_annotations(
    path: Path,
    form: str,
    needed: Mapping[str, Sequence[str]],
    check: Callable[[dict[str, Any]], None],
    optional: Container[str] = (),
) -> dict[str, Any]:
    """Read an annotation file in a form such as "COCO's" and check every entry of its lists.

    Args:
        needed: the lists, and which keys their entries must have.
        check: raises a ValueError for what else is wrong.
        optional: lists that may be missing; they are None then.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON or not in that form; the message says what is missing or wrong.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: expected an annotation file in {form} form.")
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    try:
        present = content if isinstance(content, dict) else {}
        missing = [part for part in needed if part not in present and part not in optional]
        if missing:
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        for part, keys in needed.items():
            if content.setdefault(part, None) is not None or part not in optional:
                check_entries(content[part], f"`{part}`", keys, FIELDS[part])
        check(content)
    except ValueError as error:
        raise ValueError(f"{path} is not in {form} form: {error}.") from error
    return content


def check_entries(entries: Any, where: str, needed: Sequence[str], fields: Mapping[str, tuple[type, ...]]) -> None:
    """Refuse a list of a file whose entries lack a needed key or have a value of another type.

    Raises:
        ValueError: the message says which key, and in which entries.
    """
    if not isinstance(entries, list):
        raise ValueError(f"{where} is no list")
    strange = [index for index, entry in enumerate(entries) if not isinstance(entry, dict)]
    if strange:
        raise ValueError(f"{where} has entries that are no objects at {named(strange)}")
    for key in needed:
        without = [index for index, entry in enumerate(entries) if entry.get(key) is None]
        if without:
            raise ValueError(f"`{key}` is not in {where} at {named(without)}")
    for key, kinds in fields.items():
        wrong = [index for index, entry in enumerate(entries) if not isinstance(entry.get(key), (*kinds, type(None)))]
        if wrong:
            names = " or ".join(_KIND_NAMES[kind] for kind in kinds)
            raise ValueError(f"`{key}` should be {names} in {where} at {named(wrong)}")


# --- files ---


def find_folder(
    given: str | os.PathLike[str] | None, candidates: Sequence[Path], names: Sequence[str], what: str
) -> Path:
    """Return the folder that has most of the named files: the one given, or one of the candidates.

    Raises:
        FileNotFoundError: none has any; the message names the folders.
    """
    candidates = candidates if given is None else [Path(given)]
    sample = names[:: max(1, len(names) // 20)]
    counts = [sum((folder / name).is_file() for name in sample) for folder in candidates]
    if not any(counts):
        looked = ", ".join(str(folder) for folder in candidates if folder.is_dir())
        raise FileNotFoundError(
            f"The {what} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''}) are in none of: {looked}. "
            "Put them next to the annotation file, or name their folder (image_folder=…)."
        )
    return candidates[counts.index(max(counts))]


def image_folders(annotation_file: Path) -> list[Path]:
    """Return where the images of an annotation file usually are: next to it, or in a folder named after the split."""
    own = annotation_file.parent
    root = own.parent if own.name in ("annotations", "annotation", "labels") else own
    words = annotation_file.stem.split("_")
    splits = [words[-1], "_".join(words[1:]), {"train": "training", "val": "validation"}.get(words[-1], words[-1])]
    folders = [own, root]
    for base in (root, root / "images", root / "leftImg8bit", own / "images"):
        folders += [base / split for split in splits if split] + [base]
    return list(dict.fromkeys(folders))


def check_exists(folder: Path, names: Sequence[str], what: str, problems: Problems, more: str = "") -> None:
    """Report the files that are not in the folder; `more` is what else must go from the annotation file with them."""
    for name in names:
        if not os.path.isfile(folder / name):
            problems.error(
                f"{what} {IS_MISSING} in {folder}: put them there, or remove them{more} from the file.", name
            )


# --- entries ---


def check_segmentation(
    segmentation: Any, size: tuple[int, int] | None, where: str, problems: Problems
) -> Mapping[str, Any] | list[list[float]] | None:
    """Return the run lengths or drawable polygons of an annotation; None, and a report, where it has no mask.

    Args:
        segmentation: what the annotation has.
        size: height and width of the image, where known.
        where: the file and the annotation.
        problems: collects what is wrong.
    """
    if isinstance(segmentation, Mapping):
        try:
            check_rle(segmentation, *(size or (None, None)))
        except ValueError as error:
            problems.error("Run lengths do not fit their image: write them again.", f"{where}: {error}")
            return None
        return segmentation
    if not segmentation:
        problems.warn("Annotations have no mask (a box alone is not enough) and are left out.", where)
        return None
    try:
        polygons = as_polygons(segmentation)
        drawable = drawable_polygons(polygons)
    except ValueError as error:
        problems.error("Masks are neither polygons nor run lengths: draw them again.", f"{where}: {error}")
        return None
    if len(drawable) < len(polygons):
        problems.warn("Polygons with fewer than three corners, or an odd number of coordinates, are left out.", where)
    return drawable if drawable and (size is None or _is_inside(drawable, size, where, problems)) else None


def _is_inside(polygons: list[list[float]], size: tuple[int, int], where: str, problems: Problems) -> bool:
    """Whether polygons touch their image; report those that do not, or reach beyond it."""
    height, width = size
    xs, ys = ([part(polygon[axis::2]) for polygon in polygons for part in (min, max)] for axis in (0, 1))
    left, right, top, bottom = min(xs), max(xs), min(ys), max(ys)
    if right <= 0 or bottom <= 0 or left >= width or top >= height:
        problems.error(
            "Polygons are outside their image: were they drawn at another size of it?",
            f"{where}: x {left:g} to {right:g}, y {top:g} to {bottom:g} in {width}x{height} pixels",
        )
        return False
    if min(left, top) < -_OUTSIDE_TOLERANCE or max(right - width, bottom - height) > _OUTSIDE_TOLERANCE:
        problems.warn("Polygons reach beyond their image; what is outside is cut off.", where)
    return True


# --- data sets ---


class AnnotationFile(Selection):
    """Images or videos of one annotation file, with the segments of each as one packed record.

    Attributes:
        annotation_file: the path of the file.
        unit: "image" or "video".
    """

    unit = "image"
    segments: np.ndarray

    def _pack(self, path: Path, content: Mapping[str, Any], problems: Problems | None) -> None:
        """Pack the records of a file's content; raise its errors unless `problems` collects them."""
        self.annotation_file = path
        found = Problems() if problems is None else problems
        self.categories = make_categories(content["categories"], str(path))
        self._contiguous_id = {category["dataset_id"]: category["id"] for category in self.categories}
        segments: list[tuple[int, int, int]] = []

        def records() -> Iterator[dict[str, Any]]:
            is_short = len(content[f"{self.unit}s"]) < _PROGRESS_FROM
            bar = tqdm(self._records(content, found), f"Reading {path.name}", unit=self.unit, disable=is_short)
            for position, record in enumerate(bar):
                segments.extend((position, s["category_id"], s["iscrowd"]) for s in record["segments_info"])
                yield record

        self._packed = PackedList(records())
        self.segments = np.array(segments, dtype=np.int32).reshape(-1, 3)
        self._positions = np.arange(len(self._packed))
        if not len(self):
            found.error(f"The data set is empty: an annotation file must list {self.unit}s.", str(path))
        if problems is None:
            found.raise_errors(str(path))

    def _records(self, content: Mapping[str, Any], problems: Problems) -> Iterator[dict[str, Any]]:
        """Yield a record of JSON values with `segments_info` for each image or video."""
        raise NotImplementedError

    def _by_id(
        self, content: Mapping[str, Any], name: Callable[[Mapping[str, Any]], str], problems: Problems
    ) -> dict[Any, Mapping[str, Any]]:
        """Return the images or videos by id; report those that share one, by their `name`."""
        by_id: dict[Any, Mapping[str, Any]] = {}
        for entry in content[f"{self.unit}s"]:
            if entry["id"] in by_id:
                kind = f"{self.unit.capitalize()}s in {self.annotation_file} share an id: give each its own."
                problems.error(kind, f"{name(entry)}: id {entry['id']}")
            by_id[entry["id"]] = entry
        return by_id

    def _group(
        self, content: Mapping[str, Any], listed: Container[Any], problems: Problems
    ) -> dict[Any, list[Mapping[str, Any]]]:
        """Return the annotations of each image or video by its id; report those of one that is not listed."""
        groups: dict[Any, list[Mapping[str, Any]]] = {}
        for annotation in content["annotations"] or ():
            owner = annotation[f"{self.unit}_id"]
            if owner in listed:
                groups.setdefault(owner, []).append(annotation)
            else:
                name = annotation.get("file_name") or f"annotation {annotation.get('id')}"
                problems.error(
                    f"Annotations are of {self.unit}s that {self.annotation_file} does not list: add them to "
                    f"`{self.unit}s`, or remove the annotations.",
                    f"{name} of {self.unit} {owner}",
                )
        return groups

    def _category(self, annotation: Mapping[str, Any], where: str, problems: Problems) -> int | None:
        """Return the contiguous class of an annotation; None, and a report, where the file does not list it."""
        category = annotation.get("category_id")
        if category in self._contiguous_id:
            return self._contiguous_id[category]
        problems.error(
            f"Segments have a category that {self.annotation_file} does not list: add it, or remove them.",
            f"{where}: segment {annotation.get('id')} has category {category}",
        )
        return None
