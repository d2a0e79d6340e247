"""`m2f segment`: pictures in; overlays, segment maps and JSON files out."""

from __future__ import annotations

import argparse
import json
import mimetypes
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from ..known.bundled import BUNDLED_MODEL
from ..known.errors import first_line
from ..known.label_sets import TASKS
from .common import (
    CommandError,
    add_model_options,
    add_run_options,
    check_output,
    command_errors,
    make_output,
    probability,
)


if TYPE_CHECKING:
    from ..inference.segmenter import SegmentedImage, Segmenter


IMAGE_SUFFIXES = (".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
OUTPUT_SUFFIXES = (".overlay.png", ".segments.png", ".json")


class ImageError(Exception):
    """One picture cannot be segmented or its results not written; the message says why, in one line."""


def add_parser(commands: Any) -> None:
    """Add `segment` to the subparsers of `m2f`."""
    segment = commands.add_parser(
        "segment",
        help="segment pictures",
        description="For photo.jpg, writes photo.overlay.png (coloured segments with labels), photo.segments.png "
        "(id = R + 256 G + 65536 B) and photo.json (what each segment is).",
    )
    segment.add_argument("images", nargs="+", metavar="IMAGE", help="a picture, or a folder of pictures")
    add_model_options(segment, BUNDLED_MODEL, TASKS)
    segment.add_argument(
        "--threshold", type=probability, help="leave out segments with a lower score, 0 to 1; default: the model's"
    )
    add_run_options(segment)
    segment.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run `m2f segment` with its parsed options and return the exit status."""
    paths = _find_images(options.images)
    check_output(options.output)
    if options.model == str(BUNDLED_MODEL):
        print(
            "m2f: no --model given: the bundled one knows generated shapes only. For photos, give for example "
            "--model facebook/mask2former-swin-tiny-coco-panoptic",
            file=sys.stderr,
        )
    segmenter = load_segmenter(
        options.model, options.task, options.threshold, options.device, options.dtype, options.revision
    )
    revision = {"revision": options.revision} if options.revision else {}
    num_failed = 0
    jobs = list(zip(paths, _output_stems(paths, options.output), strict=True))
    for path, stem in tqdm(jobs, unit="image", disable=len(jobs) == 1):
        try:
            result = _segment_file(segmenter, path)
            make_output(options.output)  # only once there is a file to put into it
            record = {"image": str(path), "model": options.model, **revision, "task": segmenter.task}
            overlay = write_result(options.output, stem, result, record)
        except ImageError as error:
            num_failed += 1
            tqdm.write(f"m2f: {path}: {error}", file=sys.stderr)
        else:
            tqdm.write(f"{path}: {result} -> {overlay}")
    if num_failed and len(jobs) > 1:
        print(f"m2f: {num_failed} of {len(jobs)} images failed, see above", file=sys.stderr)
    return 1 if num_failed else 0


def load_segmenter(*arguments: Any) -> Segmenter:
    """Call `Segmenter.from_pretrained` without a progress bar.

    Raises:
        CommandError: the model, the device or the task cannot be used.
    """
    from transformers.utils import logging

    from ..inference.segmenter import Segmenter

    logging.disable_progress_bar()
    with command_errors():
        return Segmenter.from_pretrained(*arguments)


def _find_images(arguments: Iterable[str]) -> list[Path]:
    """Return files as given and the pictures in folders, each once; files that do not exist too, to be reported."""
    paths: dict[Path, Path] = {}  # resolved -> as given
    for argument in map(Path, arguments):
        found = _pictures_in(argument) if argument.is_dir() else [argument]
        for path in found:
            paths.setdefault(path.resolve(), path)
    return list(paths.values())


def _pictures_in(folder: Path) -> list[Path]:
    found = [
        path
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not path.name.startswith(".")
        and not path.name.endswith(OUTPUT_SUFFIXES)
    ]
    if not found:
        raise CommandError(f"no picture in the folder {folder}; looked for {', '.join(IMAGE_SUFFIXES)}")
    return found


def _output_stems(paths: Sequence[Path], folder: Path) -> list[str]:
    """Return a stem for each picture's files, so that no two pictures share one and no picture is overwritten."""
    # Compared without case, as some file systems do.
    taken = {str(path.resolve()).casefold() for path in paths}
    stems = []
    for path in paths:
        stem, number = path.stem, 1
        while taken & (files := {str((folder / f"{stem}{suffix}").resolve()).casefold() for suffix in OUTPUT_SUFFIXES}):
            number += 1
            stem = f"{path.stem}-{number}"
        taken |= files
        stems.append(stem)
    return stems


def _segment_file(segmenter: Segmenter, path: Path) -> SegmentedImage:
    try:
        return segmenter(path)
    except (FileNotFoundError, ValueError) as error:
        if path.is_file() and (mimetypes.guess_type(path)[0] or "").startswith("video/"):
            raise ImageError("is a video: `m2f track` follows the objects in it") from error
        raise ImageError(first_line(error).removeprefix(f"{path} ")) from error


def write_result(folder: Path, stem: str, result: SegmentedImage, record: Mapping[str, Any], scale: int = 1) -> Path:
    """Write `<stem>.overlay.png`, `<stem>.segments.png` and last `<stem>.json`, and return the first.

    Args:
        record: what the JSON says of the picture before its `segments_info`.
        scale: enlargement of the overlay.

    Raises:
        ImageError: the files cannot be written; none is left half-written.
    """
    from PIL import Image

    from ..processing.segment_ids import id_to_rgb

    overlay, segments, description = (folder / f"{stem}{suffix}" for suffix in OUTPUT_SUFFIXES)
    height, width = result.segmentation.shape
    text = _to_json({**record, "height": height, "width": width, "file_name": segments.name}, result.segments)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".m2f-") as work:
            result.draw(scale).save(Path(work, overlay.name))
            Image.fromarray(id_to_rgb(result.segmentation)).save(Path(work, segments.name))
            # File names may contain bytes that are not valid text; with this error handler, json.loads restores them.
            Path(work, description.name).write_text(text, encoding="utf-8", errors="backslashreplace")
            for target in (overlay, segments, description):
                os.replace(Path(work, target.name), target)
    except OSError as error:
        raise ImageError(f"cannot write to {folder} ({first_line(error)}); free space or name another") from error
    return overlay


def _to_json(record: Mapping[str, Any], segments_info: Sequence[Mapping[str, Any]]) -> str:
    """Return the record with its `segments_info` as JSON, a line for each segment."""
    fields = [f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in record.items()]
    segments = ",".join("\n  " + json.dumps(info, ensure_ascii=False) for info in segments_info)
    fields.append(f'"segments_info": [{segments}\n ]' if segments else '"segments_info": []')
    return "{\n " + ",\n ".join(fields) + "\n}\n"
