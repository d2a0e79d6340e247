"""Data sets of the `datasets` library, from the Hub, from disk or in memory, as a table or as a stream."""

import json
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from ..processing.images import read_rgb
from ..processing.rle import as_polygons, check_rle, drawable_polygons, encode_rle
from ..processing.segment_ids import rgb_to_id
from .base import ImageFile, SegmentationDataset, read_image, read_map, semantic_segments
from .categories import read_labels
from .label_maps import LabelCoding, decode_labels
from .problems import FileProblem


IMAGE_COLUMNS = ("image", "pixel_values", "img", "images", "photo")
LABEL_COLUMNS = (
    *("label", "labels", "annotation", "annotations", "mask", "masks", "segmentation", "segmentation_mask"),
    *("semantic_mask", "panoptic", "panoptic_map", "label_map", "gt"),
)
SEGMENTATION_KEYS = ("segmentation", "segmentations", "mask", "masks", "polygon", "polygons", "segments")
CATEGORY_KEYS = ("category_id", "category", "label_id", "label", "class_id", "class", "categories", "labels")
CROWD_KEYS = ("iscrowd", "is_crowd")


class Columns(NamedTuple):
    """Which columns hold what.

    `segments` is a panoptic map's list of segments, `objects` are instances with masks, `instances` is a map with the
    class in red and the number of the instance, from 1, in green (as `transformers`' instance example has it).
    """

    image: str
    label: str | None
    segments: str | None
    objects: str | None
    instances: str | None = None

    @property
    def task(self) -> str:
        """The task that the columns are for."""
        if self.segments is not None:
            return "panoptic"
        return "semantic" if self.objects is None and self.instances is None else "instance"


def find_columns(row: Mapping[str, Any], name: str, task: str | None = None) -> Columns:
    """Tell from the first row of a table which columns hold what.

    Raises:
        ValueError: there is no image, or nothing to learn from; the message names the columns there are.
    """
    pictures = [key for key, value in row.items() if _is_picture(value)]
    image = next((key for key in IMAGE_COLUMNS if key in pictures), None)
    if image is None:
        image = next((key for key in pictures if key not in LABEL_COLUMNS), None)
    maps = [key for key, value in row.items() if key != image and (_is_picture(value) or _is_map(value))]
    label = next((key for key in LABEL_COLUMNS if key in maps), next(iter(maps), None))
    lists = {key: _as_dicts(value) for key, value in row.items() if key not in (image, label)}
    listed = [key for key, value in lists.items() if value and {"id", "category_id"} <= set(value[0])]
    segments = "segments_info" if "segments_info" in lists else next(iter(listed), None)
    objects = next((key for key, value in lists.items() if value and _key(value[0], SEGMENTATION_KEYS)), None)
    if objects is None and "objects" in lists:
        objects = "objects"
    if objects is not None and (task == "instance" or label is None):
        label, segments = None, None
    else:
        objects = None
    if image is None or (label is None and objects is None):
        raise ValueError(
            f"{name} has the columns {', '.join(row)}: expected an image (`image`) and either a label map "
            "(`label`, an image), with or without `segments_info`, or `objects` with `segmentation` and `category`. "
            "Rename its columns (rename_column)."
        )
    if task in ("instance", "panoptic") and label is not None and segments is None and read_cell(row[label]).ndim == 3:
        return Columns(image, None, None, None, instances=label)
    return Columns(image, label, segments if label is not None else None, objects)


def _is_picture(value: Any) -> bool:
    return isinstance(value, Image.Image) or (isinstance(value, Mapping) and set(value) == {"bytes", "path"})


def _is_map(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.ndim >= 2 and value.dtype.kind in "iu"
    # Lists of lists of whole numbers, all rows of the same length.
    is_table = isinstance(value, list) and bool(value) and all(isinstance(part, list) for part in value)
    return is_table and len({len(part) for part in value}) == 1 and all(isinstance(n, int) for n in value[0])


def _as_dicts(value: Any) -> list[dict[str, Any]]:
    """Return a list of dicts, or a dict of lists, as a list of dicts; an empty list for anything else."""
    columns = value.values() if isinstance(value, Mapping) else ()
    if columns and all(isinstance(column, (list, np.ndarray)) for column in columns):
        keys = [key for key, column in value.items() if len(column) == max(map(len, value.values()))]
        return [dict(zip(keys, cells, strict=True)) for cells in zip(*(value[key] for key in keys), strict=True)]
    if isinstance(value, list) and value and all(isinstance(entry, Mapping) for entry in value):
        return [dict(entry) for entry in value]
    return []


def _key(entry: Mapping[str, Any], names: Sequence[str]) -> str | None:
    return next((name for name in names if entry.get(name) is not None), None)


# --- class names ---


def class_names(features: Any, columns: Columns) -> list[str] | None:
    """Return the names that the features of a table give its categories; None where they don't."""
    column = columns.objects or columns.segments or columns.label
    found = _class_labels((features or {}).get(column))
    return None if found is None else list(found.names)


def _class_labels(feature: Any) -> Any:
    """Find the `ClassLabel` in a feature, at any depth."""
    if hasattr(feature, "names") and hasattr(feature, "int2str"):
        return feature
    if isinstance(feature, Mapping):
        parts = [feature[key] for key in CATEGORY_KEYS if key in feature]
    elif isinstance(feature, (list, tuple)):
        parts = list(feature)
    else:
        parts = [feature.feature] if hasattr(feature, "feature") else []
    return next((found for part in parts if (found := _class_labels(part)) is not None), None)


def names_on_hub(name: str) -> list[dict[str, Any]] | None:
    """Return the classes in the `id2label.json` or `label2id.json` of a Hub data set; None where there is none."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    for file in ("id2label.json", "label2id.json", "labels.json"):
        try:
            return read_labels(hf_hub_download(name, file, repo_type="dataset"))
        except (HfHubHTTPError, OSError, ValueError):
            continue
    return None


def category_ids(rows: Any, columns: Columns) -> set[Any]:
    """Return every category that a table's segments or objects name: numbers, or names."""
    column = columns.objects or columns.segments
    entries = (entry for row in rows.select_columns([column]) for entry in _as_dicts(row[column]))
    return {entry[key] for entry in entries if (key := _key(entry, CATEGORY_KEYS)) is not None}


# --- data sets ---


class TableDataset(SegmentationDataset):
    """The rows of a `datasets.Dataset`.

    Args:
        rows: anything with `len` and rows by index; its images need not be decoded.
        columns: which columns hold what.
        categories: the classes; `dataset_id` is what the rows name.
        coding: what the numbers of label maps mean (semantic data).
        name: of the data set, for messages.
    """

    def __init__(
        self,
        rows: Any,
        columns: Columns,
        categories: list[dict[str, Any]],
        coding: LabelCoding | None = None,
        name: str = "dataset",
    ) -> None:
        self.rows, self.columns, self.categories, self.coding, self.name = rows, columns, categories, coding, name
        self.task = columns.task
        if self.task == "instance":
            self.categories = [{**category, "isthing": category["isthing"] is not False} for category in categories]
        self._positions = np.arange(len(rows))
        self._table = coding.table() if coding else None
        self._contiguous_id: dict[Any, int] = {category["dataset_id"]: category["id"] for category in categories}
        self._contiguous_id |= {category["name"]: category["id"] for category in categories}

    def _load(self, position: int) -> tuple[ImageFile, dict[str, Any]]:
        return self.read(self.rows[position], position)

    def read(self, row: Mapping[str, Any], position: int | str) -> tuple[ImageFile, dict[str, Any]]:
        """Return the image's file and the item without image and size, of one row."""
        cell = row[self.columns.image]
        file, path = as_file(cell), cell.get("path") if isinstance(cell, Mapping) else None
        where = f"{self.name}[{position}]" + (f" ({path})" if path else "")
        identity = row.get("image_id", row.get("id", position))
        item = {"image_id": identity if isinstance(identity, (int, str)) else position, "file_name": where}
        if self.columns.objects is not None:
            objects = _as_dicts(row[self.columns.objects])
            return file, {**item, "segments_info": [self._object(entry, k, where) for k, entry in enumerate(objects)]}
        values = read_cell(row[self.columns.label or self.columns.instances or ""], where)
        if self.columns.instances is not None:
            numbers = values[..., 0].astype(np.int32) * 256 + values[..., 1]
            segments = [
                {"id": number, "category_id": self._category({"category_id": number // 256}, where), "iscrowd": 0}
                for number in np.unique(numbers).tolist()
                if number % 256
            ]
            return file, {**item, "segmentation_map": numbers, "segments_info": segments}
        if self.coding is not None and self._table is not None:
            labels = decode_labels(values, self.coding, self._table, where)
            return file, {**item, "segmentation_map": labels, "segments_info": semantic_segments(labels)}
        ids = rgb_to_id(values) if values.ndim == 3 else values.astype(np.int32)
        segments = [
            {**info, "category_id": self._category(info, where), "iscrowd": _crowd(info)}
            for info in _as_dicts(row[self.columns.segments or ""])
        ]
        return file, {**item, "segmentation_map": ids, "segments_info": segments}

    def _category(self, entry: Mapping[str, Any], where: str) -> int:
        key = _key(entry, CATEGORY_KEYS)
        if key is None or entry[key] not in self._contiguous_id:
            raise FileProblem(
                "Segments have a category that is not among the classes: name all classes with labels=….",
                f"{where}: category {entry[key] if key else None}",
            )
        return self._contiguous_id[entry[key]]

    def _object(self, entry: Mapping[str, Any], index: int, where: str) -> dict[str, Any]:
        key = _key(entry, SEGMENTATION_KEYS)
        if key is None:
            raise FileProblem("Objects have no mask; a box alone is not enough.", f"{where}: object {index}")
        kept = {name: entry[name] for name in ("area", "bbox") if entry.get(name) is not None}
        return {
            "id": int(entry["id"]) if isinstance(entry.get("id"), int) else index + 1,
            **kept,
            "category_id": self._category(entry, where),
            "iscrowd": _crowd(entry),
            "segmentation": _as_segmentation(entry[key], f"{where}: object {index}"),
        }


def read_cell(value: Any, name: str = "label map") -> np.ndarray:
    """Read a label map in a table's cell, an image or an array, as `read_map` does."""
    return np.asarray(value) if isinstance(value, (list, np.ndarray)) else read_map(as_file(value), name)


def _crowd(entry: Mapping[str, Any]) -> int:
    key = _key(entry, CROWD_KEYS)
    return int(bool(entry[key])) if key else 0


def as_file(value: Any) -> ImageFile:
    """Return what an image is read from: a table's cell is an image, its bytes or path, or an array.

    Raises:
        FileProblem: it is none of these.
    """
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, Mapping):
        return BytesIO(value["bytes"]) if value.get("bytes") is not None else Path(value["path"])
    if isinstance(value, (np.ndarray, list)):
        return read_rgb(np.asarray(value))
    raise FileProblem("Rows have no image where one is expected: remove them.", repr(value)[:80])


def _as_segmentation(value: Any, where: str) -> Any:
    """Return a cell's mask as COCO's RLE or a list of polygons."""
    if _is_picture(value):
        pixels = read_map(as_file(value), where)
        return encode_rle((pixels.any(axis=-1) if pixels.ndim == 3 else pixels) != 0)
    if isinstance(value, np.ndarray) and value.ndim == 2 and value.dtype.kind in "bu":
        return encode_rle(value != 0)
    try:
        if isinstance(value, str):  # tables store values without a fixed schema as JSON text
            value = json.loads(value)
        if isinstance(value, Mapping):
            rle = {"size": list(value.get("size", ())), "counts": value.get("counts")}
            check_rle(rle)
            return rle
        polygons = drawable_polygons(as_polygons(value))
    except ValueError as error:
        raise FileProblem(
            "Masks are neither polygons nor run lengths: draw them again.", f"{where}: {error}"
        ) from error
    if not polygons:
        raise FileProblem("Objects have no mask; a box alone is not enough.", where)
    return polygons


class StreamingDataset(IterableDataset[dict[str, Any]]):
    """Items of a stream of rows (`datasets.IterableDataset`), read once from front to back.

    Args:
        rows: the stream; `datasets` splits it between workers.
        reader: makes items of rows.
    """

    def __init__(self, rows: Any, reader: TableDataset) -> None:
        self.rows, self.reader = rows, reader

    @property
    def categories(self) -> list[dict[str, Any]]:
        """The classes, as in `SegmentationDataset`."""
        return self.reader.categories

    @property
    def task(self) -> str:
        """ "panoptic", "instance" or "semantic"."""
        return self.reader.task

    def with_task(self, task: str) -> "StreamingDataset":
        """Return the same stream for another task, as `SegmentationDataset.with_task`."""
        return StreamingDataset(self.rows, cast(TableDataset, self.reader.with_task(task)))

    def with_categories(
        self, categories: Sequence[Mapping[str, Any]], category_map: Mapping[int, int]
    ) -> "StreamingDataset":
        """Return the same stream with another class list, as `SegmentationDataset.with_categories`."""
        return StreamingDataset(self.rows, self.reader.with_categories(categories, category_map))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        for count, row in enumerate(self.rows):
            file, item = self.reader.read(row, count if worker is None else f"{worker.id}-{count}")
            image = read_image(file, item["file_name"])
            yield {"image": image, **self.reader.complete(item, image.height, image.width)}
