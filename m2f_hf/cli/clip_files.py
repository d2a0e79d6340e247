"""What `m2f track` writes: overlays as a video and an animation, id maps, and results in YouTube-VIS' form."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..draw.films import Animation, Movie, PictureFolder
from ..draw.segments import ClassColors, draw_segments
from ..hub.families import label_names
from ..inference.tracking import to_id_map
from ..known.label_sets import find_label_set
from ..processing.frames import DamagedFrame
from ..processing.rle import encode_rle
from .common import TRACK_FILES, TRACK_FOLDERS, write_errors


# An overlay is enlarged until its shorter side has so many pixels, for labels that can be read.
_READABLE_SIDE = 320
_LONGEST_ENLARGED = 4096


class ClipWriter:
    """Writes results frame by frame; memory grows with the encodings of masks alone.

    Args:
        folder: an empty one.
        config: the model's.
        rate: frames a second.
    """

    def __init__(self, folder: Path, config: Any, rate: float) -> None:
        self.folder, self.num_frames = folder, 0
        self.id2label, self.colors = label_names(config), config.label_colors
        self.category_ids = category_ids(self.id2label)
        self.tracks: dict[int, _TrackRecord] = {}
        self.movie: Movie | PictureFolder = Movie.open(folder / "overlay.mp4", rate) or PictureFolder(
            folder / "overlay"
        )
        self.gif = Animation(rate)
        (folder / "ids").mkdir()

    def add(self, result: Mapping[str, Any], frame: np.ndarray | DamagedFrame) -> None:
        ids = to_id_map(result)
        height, width = ids.shape
        masks = np.asarray(result["segmentation"])
        for index, info in enumerate(result["segments_info"]):
            track = self.tracks.setdefault(info["id"], _TrackRecord(info["label_id"]))
            mask = masks == info["id"] if masks.ndim == 2 else masks[index]
            track.add(self.num_frames, info, encode_rle(mask))
        with write_errors(self.folder.parent):
            picture = Image.fromarray(ids.astype(np.uint8 if ids.max(initial=0) < 256 else np.uint16))
            picture.save(self.folder / "ids" / f"{self.num_frames:06d}.png")
            pixels = np.zeros((3, height, width), np.uint8) if isinstance(frame, DamagedFrame) else frame
            overlay = self._draw(pixels, ids)
            self.movie.add(overlay)
            self.gif.add(overlay)
        self.num_frames += 1

    def _draw(self, pixels: np.ndarray, ids: np.ndarray) -> Image.Image:
        if pixels.dtype != np.uint8:
            pixels = (pixels.clip(0, 1) * 255).astype(np.uint8)
        height, width = ids.shape
        scale = max(1, min(round(_READABLE_SIDE / min(height, width)), _LONGEST_ENLARGED // max(height, width)))
        # All tracks so far, with the class that each had first: so one keeps its colour.
        infos = [
            {
                "id": number,
                "label_id": track.first_label,
                "isthing": track.isthing,
                "label": f"{self.id2label[track.label]} #{number}",
            }
            for number, track in sorted(self.tracks.items())
        ]
        colors: ClassColors | None = self.colors
        return draw_segments(Image.fromarray(pixels.transpose(1, 2, 0)), ids, infos, colors=colors, scale=scale)

    def infos(self) -> list[dict[str, Any]]:
        """Return `segments_info` of the tracks of the whole clip."""
        return [
            {"id": number, "label": self.id2label[track.label], "isthing": track.isthing, "score": track.score}
            for number, track in sorted(self.tracks.items())
        ]

    def finish(self) -> None:
        with write_errors(self.folder.parent):
            self.movie.close()
            self.gif.save(self.folder / "overlay.gif")
            entries = [
                {
                    "video_id": 1,
                    "category_id": self.category_ids[self.tracks[info["id"]].label],
                    "score": info["score"],
                    "segmentations": [self.tracks[info["id"]].encodings.get(frame) for frame in range(self.num_frames)],
                    "track_id": info["id"],
                    "label": info["label"],
                }
                for info in self.infos()
            ]
            lines = ",\n ".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
            (self.folder / "results.json").write_text(f"[{lines}]\n", encoding="utf-8")

    def close(self) -> None:
        """Close files that an error leaves half-written; they are removed with their folder."""
        with suppress(Exception):
            self.movie.close()


class _TrackRecord:
    def __init__(self, label: int) -> None:
        self.first_label = self.label = label
        self.isthing: bool | None = None
        self.encodings: dict[int, dict[str, Any]] = {}  # frame -> COCO RLE
        self._sum = 0.0

    def add(self, frame: int, info: Mapping[str, Any], encoding: dict[str, Any]) -> None:
        self.label, self.isthing = info["label_id"], info["isthing"]
        self.encodings[frame] = encoding
        self._sum += info["score"]

    @property
    def score(self) -> float:
        return round(self._sum / len(self.encodings), 6)


def category_ids(id2label: Mapping[int, str]) -> list[int]:
    """Return the category id of each label, for a data set's files.

    Labels of a known data set have its own ids; others count from 1, as YouTube-VIS' do and as `write_youtube_vis`
    writes them.
    """
    known = find_label_set(id2label)
    if known is not None and len(known.labels) == len(id2label):
        return [label.dataset_id for label in known.labels]
    return [label_id + 1 for label_id in range(len(id2label))]


def replace_results(work: Path, output: Path) -> None:
    """Replace an earlier run's files; `results.json` goes first and comes last, as it vouches for the others."""
    for name in TRACK_FILES:
        (output / name).unlink(missing_ok=True)
    for name in TRACK_FOLDERS:
        if (output / name).is_dir():
            for file in (output / name).glob("[0-9]*.png"):
                if len(file.stem) == 6 and file.stem.isdecimal():
                    file.unlink()
            with suppress(OSError):  # it holds other files too
                (output / name).rmdir()
        if (work / name).is_dir():
            (output / name).mkdir(exist_ok=True)
            for file in (work / name).iterdir():
                os.replace(file, output / name / file.name)
    for name in reversed(TRACK_FILES):
        if (work / name).exists():
            shutil.move(work / name, output / name)
