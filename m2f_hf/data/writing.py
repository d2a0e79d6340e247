"""Write data sets as folders in COCO's panoptic form or in YouTube-VIS' form."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ..processing.rle import encode_rle
from ..processing.segment_ids import id_to_rgb
from .video import VideoDataset, frame_mask


def write_coco_panoptic(
    dataset: Dataset[dict[str, Any]], folder: str | os.PathLike[str], categories: Sequence[dict[str, Any]]
) -> Path:
    """Write a data set as `images/`, `panoptic/` (PNG, id = R + 256 G + 65536 B) and `panoptic.json`; return `folder`.

    Items are those of `ShapesDataset`: `image`, `segmentation_map`, `segments_info`, `image_id`. Images are stored as
    PNG, without loss. The write is atomic: after an error there is no folder.

    Raises:
        FileExistsError: if `folder` exists already.
    """
    with new_folder(Path(folder)) as work:
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
        content = {"images": images, "annotations": annotations, "categories": list(categories)}
        (work / "panoptic.json").write_text(json.dumps(content), encoding="utf-8")
    return Path(folder)


def write_youtube_vis(dataset: VideoDataset, folder: str | os.PathLike[str]) -> Path:
    """Write videos as `instances.json` and a folder of PNGs for each in `JPEGImages/`; return `folder`.

    Masks become run lengths. The write is atomic: after an error there is no folder.

    Raises:
        FileExistsError: if `folder` exists already.
    """
    with new_folder(Path(folder)) as work:
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
    return Path(folder)


def _encode(mask: np.ndarray | None) -> tuple[dict[str, Any] | None, int | None]:
    """Run lengths and area; both None where there is nothing."""
    if mask is None or not mask.any():
        return None, None
    return encode_rle(mask), int(np.count_nonzero(mask))


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Give a temporary folder next to `target`, which takes its name in the end; after an error it is removed.

    Raises:
        FileExistsError: if `target` exists already.
    """
    if target.exists():
        raise FileExistsError(f"{target} exists already: remove it or choose another folder.")
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        work.chmod(0o755)
        yield work
        os.replace(work, target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
