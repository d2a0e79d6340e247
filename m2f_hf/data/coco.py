"""COCO's annotation files, read in place: instances (polygons, run lengths, crowds) and panoptic maps."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..processing.segment_ids import rgb_to_id
from .annotation_files import (
    FIELDS,
    AnnotationFile,
    check_entries,
    check_exists,
    check_segmentation,
    find_folder,
    image_folders,
    read_annotations,
)
from .base import ImageFile, SegmentationDataset, read_map
from .problems import Problems, named


def _read(path: Path, *annotation_keys: str) -> dict[str, Any]:
    """Read an annotation file whose annotations need certain keys."""

    def check(content: dict[str, Any]) -> None:
        for annotation in content["annotations"] if "segments_info" in annotation_keys else ():
            where = f"`segments_info` of {annotation['file_name']}"
            check_entries(annotation["segments_info"], where, ("id",), FIELDS["segments_info"])
        nameless = [image["id"] for image in content["images"] if not (image.get("file_name") or image.get("coco_url"))]
        if nameless:
            raise ValueError(f"images without `file_name`: id {named(nameless)}")

    needed = {"images": ("id",), "annotations": annotation_keys, "categories": ("id", "name")}
    return read_annotations(path, "COCO's", needed, check)


def _name(image: Mapping[str, Any]) -> str:
    name = image.get("file_name") or image["coco_url"].rpartition("/")[2]
    return name.replace("\\", "/")  # some tools on Windows write their own separators


class CocoInstanceDataset(AnnotationFile, SegmentationDataset):
    """Images with instances of an annotation file in COCO's form: polygons, run lengths (compressed or not), crowds.

    Masks stay as the file has them, so instances may overlap. Images without an annotation are kept.

    Args:
        annotation_file: for example `annotations/instances_train2017.json`, or Roboflow's `_annotations.coco.json`.
        image_folder: where the images are; None looks where they usually are.
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
        content = _read(path, "image_id")
        self.task = "instance"
        names = [_name(image) for image in content["images"]]
        if image_folder is not None or names:
            self.image_folder = find_folder(image_folder, image_folders(path), names, "images")
        self._pack(path, content, problems)
        for category in self.categories:
            category["isthing"] = category["isthing"] is not False

    def _records(self, content: Mapping[str, Any], problems: Problems) -> Iterator[dict[str, Any]]:
        images = self._by_id(content, _name, problems)
        by_image = self._group(content, images, problems)
        if images:
            check_exists(self.image_folder, [_name(image) for image in images.values()], "Images", problems)
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
        crowd = int(bool(annotation.get("iscrowd")))
        return {"id": 0, **kept, "category_id": category, "iscrowd": crowd, "segmentation": segmentation}

    def _load(self, position: int) -> tuple[ImageFile, dict[str, Any]]:
        record = self._packed[position]
        path = self.image_folder / record["file_name"]
        return path, {**record, "file_name": str(path)}


class CocoPanopticDataset(AnnotationFile, SegmentationDataset):
    """Images with panoptic maps in COCO's form: a JSON, and PNGs with id = R + 256 G + 65536 B.

    Args:
        source: the JSON, for example `annotations/panoptic_val2017.json`, or a folder with `panoptic.json`, `images/`
            and `panoptic/`, as `write_coco_panoptic` makes.
        image_folder: where the images are; None looks where they usually are.
        panoptic_folder: where the PNGs are, likewise.
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
        content = _read(path, "image_id", "file_name", "segments_info")
        self.task = "panoptic"
        images = {image["id"]: image for image in content["images"]}
        annotated = [annotation for annotation in content["annotations"] if annotation["image_id"] in images]
        if annotated:
            maps = [annotation["file_name"] for annotation in annotated]
            own = path.parent
            # Cityscapes and ADE20K keep the PNGs in a folder named as the JSON.
            candidates = [own / path.stem, own.parent / path.stem, own / "panoptic", *image_folders(path)]
            self.panoptic_folder = find_folder(panoptic_folder, candidates, maps, "panoptic PNGs")
            names = [_name(images[annotation["image_id"]]) for annotation in annotated]
            folders = [folder for folder in image_folders(path) if folder != self.panoptic_folder]
            self.image_folder = find_folder(image_folder, folders, names, "images")
        self._pack(path, content, problems)

    def _records(self, content: Mapping[str, Any], problems: Problems) -> Iterator[dict[str, Any]]:
        file = self.annotation_file
        unknown = [category["name"] for category in self.categories if category["isthing"] is None]
        if unknown:
            problems.error(
                f"{file} does not say of classes whether they are things: give them `isthing` 0 or 1.", named(unknown)
            )
        images = self._by_id(content, _name, problems)
        groups = self._group(content, images, problems)
        for image_id, (_, *more) in groups.items():
            for annotation in more:
                problems.error(
                    f"Images of {file} have several annotations: put all segments into one map.",
                    f"{annotation['file_name']} of image {image_id}",
                )
        for image_id, image in images.items():
            if image_id not in groups:
                problems.error(f"Images of {file} have no annotation: annotate them, or remove them.", _name(image))
        if groups:
            check_exists(self.image_folder, [_name(images[image_id]) for image_id in groups], "Images", problems)
            maps = [annotations[0]["file_name"] for annotations in groups.values()]
            check_exists(self.panoptic_folder, maps, "Panoptic PNGs", problems)
        for image_id, (annotation, *_) in groups.items():
            map_file = annotation["file_name"]
            ids = [info["id"] for info in annotation["segments_info"]]
            if len(set(ids)) < len(ids):
                problems.error(
                    f"Segments in {file} share an id within an image: give each its own.",
                    f"{map_file}: ids {named(sorted({n for n in ids if ids.count(n) > 1}))}",
                )
            segments = [
                {**info, "category_id": category, "iscrowd": int(bool(info.get("iscrowd")))}
                for info in annotation["segments_info"]
                if (category := self._category(info, map_file, problems)) is not None
            ]
            image = {"image_id": image_id, "file_name": _name(images[image_id])}
            yield {**image, "map_file": map_file, "segments_info": segments}

    def _load(self, position: int) -> tuple[ImageFile, dict[str, Any]]:
        record = self._packed[position]
        path = self.image_folder / record["file_name"]
        map_path = self.panoptic_folder / record.pop("map_file")
        colors = read_map(map_path, str(map_path))
        segmentation_map = rgb_to_id(colors) if colors.ndim == 3 else colors.astype(np.int32)
        return path, {**record, "file_name": str(path), "segmentation_map": segmentation_map}
