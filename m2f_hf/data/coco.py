"""COCO's annotation files, read where they lie: instances (polygons, run lengths, crowds) and panoptic maps."""

import json
import os
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..processing.rle import as_polygons, check_rle, drawable_polygons
from ..processing.segment_ids import rgb_to_id
from .base import ImageFile, SegmentationDataset, read_map
from .categories import make_categories
from .packed import PackedList
from .problems import Problems, named


_OUTSIDE_TOLERANCE = 1.0
"""Pixels that a polygon may reach beyond the image without a word: tools round differently."""
_KIND_NAMES = {int: "a whole number", float: "a number", str: "text", list: "a list"}
_SEGMENT_FIELDS = {"id": (int,), "category_id": (int,), "iscrowd": (int, float), "area": (int, float)}
FIELDS: Mapping[str, Mapping[str, tuple[type, ...]]] = {
    "images": {
        "id": (int, str),
        "file_name": (str,),
        "coco_url": (str,),
        "height": (int, float),
        "width": (int, float),
    },
    "annotations": {
        **_SEGMENT_FIELDS,
        "id": (int, str),
        "image_id": (int, str),
        "file_name": (str,),
        "segments_info": (list,),
    },
    "categories": {"id": (int,), "name": (str,), "isthing": (int,)},
    "segments_info": _SEGMENT_FIELDS,
}
"""What the values may be that are read; null counts as missing."""
_PROGRESS_FROM = 5000
"""Images from which on reading takes long enough for a progress bar."""


def read_coco_json(path: Path, annotation_keys: Sequence[str]) -> dict[str, Any]:
    """The content of an annotation file, whose annotations need to have certain keys.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, or lacks one of COCO's three lists.
    """
    content = read_json(path, "COCO's")
    missing = {"images", "annotations", "categories"} - set(content if isinstance(content, dict) else ())
    if missing:
        raise ValueError(f"{path} is not in COCO's form: it lacks {', '.join(sorted(missing))}.")
    try:
        for part, keys in (("images", ("id",)), ("annotations", annotation_keys), ("categories", ("id", "name"))):
            check_entries(content[part], f"`{part}`", keys, FIELDS[part])
        if "segments_info" in annotation_keys:
            for annotation in content["annotations"]:
                where = f"`segments_info` of {annotation['file_name']}"
                check_entries(annotation["segments_info"], where, ("id",), FIELDS["segments_info"])
    except ValueError as error:
        raise ValueError(f"{path} is not in COCO's form: {error}.") from error
    nameless = [image["id"] for image in content["images"] if not (image.get("file_name") or image.get("coco_url"))]
    if nameless:
        raise ValueError(f"{path} is not in COCO's form: images without `file_name`: id {named(nameless)}.")
    return content


def read_json(path: Path, form: str) -> Any:
    """The content of an annotation file in a form such as "COCO's".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: expected an annotation file in {form} form.")
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error


def check_entries(entries: Any, where: str, needed: Sequence[str], fields: Mapping[str, tuple[type, ...]]) -> None:
    """Refuse a list of a file whose entries lack a needed key, or hold something else than they should.

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


def find_folder(candidates: Sequence[Path], names: Sequence[str], what: str) -> Path:
    """The folder that has most of the named files.

    Raises:
        FileNotFoundError: none has any; the message says where they were looked for.
    """
    sample = names[:: max(1, len(names) // 20)]
    counts = [sum((folder / name).is_file() for name in sample) for folder in candidates]
    if not sample or not any(counts):
        looked = ", ".join(str(folder) for folder in candidates if folder.is_dir())
        raise FileNotFoundError(
            f"The {what} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''}) are in none of: {looked}. "
            "Put them beside the annotation file, or name their folder (image_folder=…)."
        )
    return candidates[counts.index(max(counts))]


def image_folders(annotation_file: Path) -> list[Path]:
    """Where the images of an annotation file usually lie: beside it, or in a folder named after the split."""
    own = annotation_file.parent
    root = own.parent if own.name in ("annotations", "annotation", "labels") else own
    words = annotation_file.stem.split("_")
    splits = [words[-1], "_".join(words[1:]), {"train": "training", "val": "validation"}.get(words[-1], words[-1])]
    folders = [own, root]
    for base in (root, root / "images", root / "leftImg8bit", own / "images"):
        folders += [base / split for split in splits if split] + [base]
    return list(dict.fromkeys(folders))


class _CocoDataset(SegmentationDataset):
    """Images of one annotation file, with the segments of each as one packed record."""

    def __init__(self, annotation_file: Path, content: Mapping[str, Any], problems: Problems | None) -> None:
        self.annotation_file = annotation_file
        found = Problems() if problems is None else problems
        self.categories = make_categories(content["categories"], str(annotation_file))
        self._contiguous_id = {category["dataset_id"]: category["id"] for category in self.categories}
        segments: list[tuple[int, int, int]] = []

        def records() -> Iterator[dict[str, Any]]:
            source = self._records(content, found)
            bar = tqdm(
                source, f"Reading {annotation_file.name}", unit="image", disable=len(content["images"]) < _PROGRESS_FROM
            )
            for position, record in enumerate(bar):
                segments.extend((position, s["category_id"], s["iscrowd"]) for s in record["segments_info"])
                yield record

        self._packed = PackedList(records())
        self.segments = np.array(segments, dtype=np.int32).reshape(-1, 3)
        self._positions = np.arange(len(self._packed))
        if not len(self):
            found.error("The data set is empty: an annotation file must list images.", str(annotation_file))
        if problems is None:
            found.raise_errors(str(annotation_file))

    def _records(self, content: Mapping[str, Any], problems: Problems) -> Iterator[dict[str, Any]]:
        raise NotImplementedError

    def _category(self, annotation: Mapping[str, Any], file_name: str, problems: Problems) -> int | None:
        """The contiguous class of an annotation; None, and an error, where the file does not list it."""
        category = annotation.get("category_id")
        if category in self._contiguous_id:
            return self._contiguous_id[category]
        problems.error(
            f"Segments have a category that {self.annotation_file} does not list: add it, or remove them.",
            f"{file_name}: segment {annotation.get('id')} has category {category}",
        )
        return None


def _unique_images(content: Mapping[str, Any], path: Path, problems: Problems) -> dict[Any, Mapping[str, Any]]:
    images: dict[Any, Mapping[str, Any]] = {}
    for image in content["images"]:
        if image["id"] in images:
            problems.error(f"Images in {path} share an id: give each its own.", f"{_name(image)}: id {image['id']}")
        images[image["id"]] = image
    return images


def _name(image: Mapping[str, Any]) -> str:
    name = image.get("file_name") or image["coco_url"].rpartition("/")[2]
    return name.replace("\\", "/")  # some tools on Windows write their own separators


def check_exists(folder: Path, names: Sequence[str], what: str, fix: str, problems: Problems) -> None:
    """Name the files that are not in the folder."""
    for name in names:
        if not os.path.isfile(folder / name):
            problems.error(f"{what} are missing in {folder}: {fix}.", name)


class CocoInstanceDataset(_CocoDataset):
    """Images with instances of an annotation file in COCO's form: polygons, run lengths (compressed or not), crowds.

    Masks stay as the file has them, so instances may overlap. Images without an annotation are kept.

    Args:
        annotation_file: for example `annotations/instances_train2017.json`, or Roboflow's `_annotations.coco.json`.
        image_folder: where the images lie; looked for where they usually do if None.
        problems: collects what is wrong; if None, errors are raised at once.

    Raises:
        FileNotFoundError: the annotation file or the images are not there.
        ValueError: the file is not in COCO's form, or (without `problems`) has errors; all are named.
    """

    def __init__(
        self,
        annotation_file: str | os.PathLike[str],
        image_folder: str | os.PathLike[str] | None = None,
        problems: Problems | None = None,
    ) -> None:
        path = Path(annotation_file)
        content = read_coco_json(path, ("image_id",))
        self.task = "instance"
        names = [_name(image) for image in content["images"]]
        if image_folder is not None or names:
            candidates = image_folders(path) if image_folder is None else [Path(image_folder)]
            self.image_folder = find_folder(candidates, names, "images")
        super().__init__(path, content, problems)
        for category in self.categories:
            category["isthing"] = category["isthing"] is not False

    def _records(self, content: Mapping[str, Any], problems: Problems) -> Iterator[dict[str, Any]]:
        images = _unique_images(content, self.annotation_file, problems)
        by_image = group_annotations(content["annotations"], images, "image", self.annotation_file, problems)
        names = [_name(image) for image in images.values()]
        if names:
            check_exists(self.image_folder, names, "Images", "put them there, or remove them from the file", problems)
        for image_id, image in images.items():
            size = (image["height"], image["width"]) if image.get("height") and image.get("width") else None
            kept = [self._segment(a, _name(image), size, problems) for a in by_image.get(image_id, ())]
            yield {
                "image_id": image_id,
                "file_name": _name(image),
                "annotated_size": size,
                "segments_info": [segment for segment in kept if segment is not None],
            }

    def _segment(
        self, annotation: Mapping[str, Any], file_name: str, size: tuple[int, int] | None, problems: Problems
    ) -> dict[str, Any] | None:
        category = self._category(annotation, file_name, problems)
        if category is None:
            return None
        where = f"{file_name}: annotation {annotation.get('id')}"
        segmentation = check_segmentation(annotation.get("segmentation"), size, where, problems)
        if segmentation is None:
            return None
        kept = {key: annotation[key] for key in ("id", "area", "bbox") if annotation.get(key) is not None}
        return {
            "id": 0,
            **kept,
            "category_id": category,
            "iscrowd": int(bool(annotation.get("iscrowd"))),
            "segmentation": segmentation,
        }

    def _load(self, position: int) -> tuple[ImageFile, dict[str, Any]]:
        record = self._packed[position]
        path = self.image_folder / record["file_name"]
        return path, {**record, "file_name": str(path)}


def group_annotations(
    annotations: Iterable[Mapping[str, Any]],
    listed: Container[Any],
    kind: str,
    annotation_file: Path,
    problems: Problems,
) -> dict[Any, list[Mapping[str, Any]]]:
    """The annotations of each image or video (`kind`) by its id; those of one that is not listed are told of."""
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for annotation in annotations:
        owner = annotation[f"{kind}_id"]
        if owner in listed:
            groups.setdefault(owner, []).append(annotation)
        else:
            problems.error(
                f"Annotations are of {kind}s that {annotation_file} does not list: add them to `{kind}s`, or remove "
                "the annotations.",
                f"annotation {annotation.get('id')} of {kind} {owner}",
            )
    return groups


def check_segmentation(
    segmentation: Any, size: tuple[int, int] | None, where: str, problems: Problems
) -> Mapping[str, Any] | list[list[float]] | None:
    """The run lengths or polygons of an annotation; None, and word of it, where there is no mask in them.

    Args:
        segmentation: what the annotation has.
        size: height and width of the image, where known.
        where: the file and the annotation.
        problems: collects what is wrong.
    """
    if not isinstance(segmentation, Mapping):
        return _polygons(segmentation, size, where, problems)
    try:
        check_rle(segmentation, *(size or (None, None)))
    except ValueError as error:
        problems.error("Run lengths do not fit their image: write them anew.", f"{where}: {error}")
        return None
    return segmentation


def _polygons(
    segmentation: Any, size: tuple[int, int] | None, where: str, problems: Problems
) -> list[list[float]] | None:
    """The polygons of an annotation that can be drawn; None, and word of it, where there are none."""
    if not segmentation:
        problems.warn("Annotations have no mask (a box alone does not do) and are left out.", where)
        return None
    try:
        polygons = as_polygons(segmentation)
        drawable = drawable_polygons(polygons)
    except ValueError as error:
        problems.error("Masks are neither polygons nor run lengths: draw them anew.", f"{where}: {error}")
        return None
    if len(drawable) < len(polygons):
        problems.warn("Polygons with fewer than three corners, or an odd number of coordinates, are left out.", where)
    if not drawable:
        return None
    if size is not None:
        height, width = size
        xs, ys = ([part(polygon[axis::2]) for polygon in drawable for part in (min, max)] for axis in (0, 1))
        left, right, top, bottom = min(xs), max(xs), min(ys), max(ys)
        if right <= 0 or bottom <= 0 or left >= width or top >= height:
            problems.error(
                "Polygons lie outside their image: were they drawn at another size of it?",
                f"{where}: x {left:g} to {right:g}, y {top:g} to {bottom:g} in {width}x{height} pixels",
            )
            return None
        if min(left, top) < -_OUTSIDE_TOLERANCE or max(right - width, bottom - height) > _OUTSIDE_TOLERANCE:
            problems.warn("Polygons reach beyond their image; what is outside is cut off.", where)
    return drawable


class CocoPanopticDataset(_CocoDataset):
    """Images with panoptic maps in COCO's form: a JSON, and PNGs with id = R + 256 G + 65536 B.

    Args:
        source: the JSON, for example `annotations/panoptic_val2017.json`, or a folder with `panoptic.json`, `images/`
            and `panoptic/`, as `write_coco_panoptic` makes.
        image_folder: where the images lie; looked for where they usually do if None.
        panoptic_folder: where the PNGs lie; looked for likewise.
        problems: collects what is wrong; if None, errors are raised at once.

    Raises:
        FileNotFoundError: the JSON, the images or the PNGs are not there.
        ValueError: the JSON is not in COCO's form, or (without `problems`) has errors; all are named.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        image_folder: str | os.PathLike[str] | None = None,
        panoptic_folder: str | os.PathLike[str] | None = None,
        problems: Problems | None = None,
    ) -> None:
        path = Path(source)
        if path.is_dir() or path.suffix != ".json":
            path = path / "panoptic.json"
        content = read_coco_json(path, ("image_id", "file_name", "segments_info"))
        self.task = "panoptic"
        images = {image["id"]: image for image in content["images"]}
        annotated = [annotation for annotation in content["annotations"] if annotation["image_id"] in images]
        if annotated:
            maps = [annotation["file_name"] for annotation in annotated]
            own = path.parent
            # Cityscapes and ADE20K keep the PNGs in a folder named as the JSON.
            candidates = [own / path.stem, own.parent / path.stem, own / "panoptic", *image_folders(path)]
            self.panoptic_folder = find_folder(
                candidates if panoptic_folder is None else [Path(panoptic_folder)], maps, "panoptic PNGs"
            )
            names = [_name(images[annotation["image_id"]]) for annotation in annotated]
            folders = [folder for folder in image_folders(path) if folder != self.panoptic_folder]
            self.image_folder = find_folder(folders if image_folder is None else [Path(image_folder)], names, "images")
        super().__init__(path, content, problems)

    def _records(self, content: Mapping[str, Any], problems: Problems) -> Iterator[dict[str, Any]]:
        unknown = [category["name"] for category in self.categories if category["isthing"] is None]
        if unknown:
            problems.error(
                f"{self.annotation_file} does not say of classes whether they are things: give them `isthing` 0 or 1.",
                named(unknown),
            )
        images = _unique_images(content, self.annotation_file, problems)
        annotations: dict[Any, Mapping[str, Any]] = {}
        for annotation in content["annotations"]:
            if annotation["image_id"] in annotations:
                problems.error(
                    f"Images of {self.annotation_file} have several annotations: put all segments into one map.",
                    f"{annotation['file_name']} of image {annotation['image_id']}",
                )
            elif annotation["image_id"] in images:
                annotations[annotation["image_id"]] = annotation
            else:
                problems.error(
                    f"Annotations are of images that {self.annotation_file} does not list: add them to `images`, or "
                    "remove the annotations.",
                    f"{annotation['file_name']} of image {annotation['image_id']}",
                )
        for image_id, image in images.items():
            if image_id not in annotations:
                problems.error(
                    f"Images of {self.annotation_file} have no annotation: annotate them, or remove them.", _name(image)
                )
        if annotations:
            fix = "put them there, or remove them from the file"
            names = [_name(images[image_id]) for image_id in annotations]
            check_exists(self.image_folder, names, "Images", fix, problems)
            maps = [annotation["file_name"] for annotation in annotations.values()]
            check_exists(self.panoptic_folder, maps, "Panoptic PNGs", fix, problems)
        for image_id, annotation in annotations.items():
            segments = []
            ids = [info["id"] for info in annotation["segments_info"]]
            if len(set(ids)) < len(ids):
                problems.error(
                    f"Segments in {self.annotation_file} share an id within an image: give each its own.",
                    f"{annotation['file_name']}: ids {named(sorted({n for n in ids if ids.count(n) > 1}))}",
                )
            for info in annotation["segments_info"]:
                category = self._category(info, annotation["file_name"], problems)
                if category is not None:
                    segments.append({**info, "category_id": category, "iscrowd": int(bool(info.get("iscrowd")))})
            yield {
                "image_id": image_id,
                "file_name": _name(images[image_id]),
                "map_file": annotation["file_name"],
                "segments_info": segments,
            }

    def _load(self, position: int) -> tuple[ImageFile, dict[str, Any]]:
        record = self._packed[position]
        path = self.image_folder / record["file_name"]
        map_path = self.panoptic_folder / record.pop("map_file")
        colors = read_map(map_path, str(map_path))
        segmentation_map = rgb_to_id(colors) if colors.ndim == 3 else colors.astype(np.int32)
        return path, {**record, "file_name": str(path), "segmentation_map": segmentation_map}
