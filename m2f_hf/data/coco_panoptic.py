"""Folders in COCO's panoptic form: `images/`, `panoptic/` (PNG, id = R + 256 G + 65536 B) and `panoptic.json`."""

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ..segment_ids import id_to_rgb, rgb_to_id


def write_coco_panoptic(
    dataset: Dataset[dict[str, Any]], folder: str | os.PathLike[str], categories: Sequence[dict[str, Any]]
) -> Path:
    """Write a dataset's items as a folder in COCO's panoptic form and return its path.

    Items are those of `ShapesDataset`: `image`, `segmentation_map`, `segments_info`, `image_id`. Images are stored as
    PNG, without loss. Everything is written to a temporary folder beside `folder`, which then takes its name, so that
    no half-written folder is left.

    Raises:
        FileExistsError: if `folder` exists already.
    """
    target = Path(folder)
    if target.exists():
        raise FileExistsError(f"{target} exists already: remove it or choose another folder.")
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        work.chmod(0o755)
        (work / "images").mkdir()
        (work / "panoptic").mkdir()
        images, annotations = [], []
        for index in tqdm(range(len(dataset)), desc="Writing scenes", unit="scene"):  # type: ignore[arg-type]
            item = dataset[index]
            file_name = f"{item['image_id']:012d}.png"
            item["image"].save(work / "images" / file_name)
            Image.fromarray(id_to_rgb(item["segmentation_map"])).save(work / "panoptic" / file_name)
            width, height = item["image"].size
            images.append({"id": item["image_id"], "file_name": file_name, "width": width, "height": height})
            segments = [{k: v for k, v in info.items() if k != "isthing"} for info in item["segments_info"]]
            annotations.append({"image_id": item["image_id"], "file_name": file_name, "segments_info": segments})
        with open(work / "panoptic.json", "w", encoding="utf-8") as file:
            json.dump({"images": images, "annotations": annotations, "categories": list(categories)}, file)
        os.replace(work, target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return target


class CocoPanopticDataset(Dataset[dict[str, Any]]):
    """Map-style dataset of a folder in COCO's panoptic form; items are those of `ShapesDataset`.

    `categories` holds the classes with contiguous ids, in the order of the ids in the file, and `category_id` in
    `segments_info` is such a contiguous id. Pixels of no segment have id 0 (void).

    Raises:
        FileNotFoundError: if `folder` has no `panoptic.json`, or an image named there is missing.
        ValueError: if `panoptic.json` is not in COCO's form, or a segment names an unknown category.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        path = self.folder / "panoptic.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} not found: expected a folder with images/, panoptic/ and panoptic.json in COCO's form."
            )
        content = json.loads(path.read_text(encoding="utf-8"))
        missing = {"images", "annotations", "categories"} - set(content)
        if missing:
            raise ValueError(f"{path} is not in COCO's panoptic form: it lacks {', '.join(sorted(missing))}.")
        ordered = sorted(content["categories"], key=lambda category: category["id"])
        self._contiguous_id = {category["id"]: index for index, category in enumerate(ordered)}
        self.categories = [{**category, "id": index} for index, category in enumerate(ordered)]
        self._image_files = {image["id"]: image["file_name"] for image in content["images"]}
        self._annotations = content["annotations"]

    def __len__(self) -> int:
        return len(self._annotations)

    def __getitem__(self, index: int) -> dict[str, Any]:
        annotation = self._annotations[index]
        with Image.open(self.folder / "images" / self._image_files[annotation["image_id"]]) as image:
            pixels = image.convert("RGB")
        with Image.open(self.folder / "panoptic" / annotation["file_name"]) as image:
            segment_ids = rgb_to_id(image.convert("RGB"))
        return {
            "image": pixels,
            "segmentation_map": segment_ids,
            "segments_info": [self._to_contiguous(info) for info in annotation["segments_info"]],
            "image_id": annotation["image_id"],
        }

    def _to_contiguous(self, info: dict[str, Any]) -> dict[str, Any]:
        if info["category_id"] not in self._contiguous_id:
            raise ValueError(
                f"Segment {info['id']} has category {info['category_id']}, which panoptic.json does not list."
            )
        category_id = self._contiguous_id[info["category_id"]]
        return {
            **info,
            "category_id": category_id,
            "isthing": self.categories[category_id]["isthing"],
            "iscrowd": info.get("iscrowd", 0),
        }
