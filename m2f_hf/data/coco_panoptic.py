"""Write folders in COCO's panoptic form: `images/`, `panoptic/` (PNG, id = R + 256 G + 65536 B), `panoptic.json`."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ..processing.segment_ids import id_to_rgb


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
    with new_folder(target) as work:
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
    return target


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target`, which takes its name in the end; after an error nothing is left of it.

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
