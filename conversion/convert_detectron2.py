"""Turn a checkpoint of the original Mask2Former (detectron2) into a folder that `from_pretrained` reads.

    python conversion/convert_detectron2.py --list
    python conversion/convert_detectron2.py --variant coco-panoptic-swin-large --output DIR
    python conversion/convert_detectron2.py --checkpoint model.pkl --config-file config.yaml --output DIR

This is the command line; `converter` does the work.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from download import default_cache_dir
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from released import find_released, listing


NUM_FRAMES = 4  # of the generated clip


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.list is None:
        _check_combination(parser, options)
    try:
        print(_convert(options) if options.list is None else listing(options.list))
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _convert(options: argparse.Namespace) -> str:
    """Convert what was asked for and return a report.

    Raises:
        ValueError, OSError, ImportError: see `convert` and `convert_released`.
    """
    row = find_released(options.variant) if options.variant else None
    # PyTorch and transformers take seconds to import; a list and a wrong argument need not wait for them.
    from converter import convert, convert_released, overlay_path
    from detectron2_config import is_video, read_config

    try:
        sample_name, sample = "", None
        if options.verify:
            takes_clips = row.is_video if row else is_video(read_config(options.config_file))
            sample_name, sample = _clip(options) if takes_clips else _photo(options)
        if row:
            report = convert_released(row, options.output, options.checkpoint, options.cache_dir, sample)
        else:
            report = convert(options.checkpoint, options.config_file, options.output, options.labels, sample)
    except StrictDataclassError as error:
        raise ValueError(error) from error
    lines = [f"{options.output}: {report}"]
    if sample:
        lines.append(
            f"Verified: every weight loads, and logits are finite for {sample_name} ({report.found}). "
            f"Look at {overlay_path(options.output)}."
        )
    return "\n".join(lines)


def _photo(options: argparse.Namespace) -> tuple[str, Any]:
    """Return the name of the photo to verify with, and the photo, RGB.

    Raises:
        ValueError: it is no image, or a clip was given.
        FileNotFoundError: there is none.
    """
    from m2f_hf import BUNDLED_SCENES
    from m2f_hf.processing.images import read_rgb

    if options.clip:
        raise ValueError("This checkpoint is of an image model: give --photo, not --clip.")
    file = options.photo or BUNDLED_SCENES / "scene-1.png"
    return file.name, read_rgb(file)


def _clip(options: argparse.Namespace) -> tuple[str, Any]:
    """Return the name of the clip to verify with, and its frames, RGB.

    Raises:
        ValueError: there is no frame, or they differ in size, or a photo was given.
        FileNotFoundError, ImportError: there is no such clip, or a video file and no PyAV.
    """
    from m2f_hf.data import MovingShapesDataset
    from m2f_hf.processing.video_processor import read_frames

    if options.photo:
        raise ValueError("This checkpoint is of a video model: give --clip (a folder of frames), not --photo.")
    if options.clip is None:
        return "a generated clip", list(MovingShapesDataset(1, num_frames=NUM_FRAMES)[0]["frames"])
    return options.clip.name, [Image.fromarray(frame.transpose(1, 2, 0)) for frame in read_frames(options.clip)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--list", nargs="*", metavar="WORD", help="show the released checkpoints, or those with all the words"
    )
    what.add_argument("--variant", metavar="NAME", help="convert this released checkpoint")
    what.add_argument("--config-file", type=Path, metavar="YAML", help="convert one's own, trained with this config")
    parser.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="the original's .pkl or .pth; a variant's is fetched without it"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="the folder to make")
    parser.add_argument(
        "--labels",
        type=Path,
        metavar="JSON",
        help='one\'s own: list of {"id": 0, "name": "cat", "isthing": true, "color": [0, 128, 255]}, or an object with '
        'such a list as "categories"; ids from 0 in the order of training, "color" (RGB) for every class or none',
    )
    parser.add_argument(
        "--cache-dir", type=Path, metavar="DIR", help=f"where downloads are kept (default: {default_cache_dir()})"
    )
    parser.add_argument("--verify", action="store_true", help="segment a photo or clip with the result and draw it")
    parser.add_argument("--photo", type=Path, metavar="FILE", help="the one for --verify (default: a generated scene)")
    parser.add_argument(
        "--clip",
        type=Path,
        metavar="FOLDER_OR_FILE",
        help="the one for --verify of a video model: a short one's frames, or a video file (default: a generated one)",
    )
    return parser


def _check_combination(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.output is None:
        parser.error("--output is missing: the folder to make")
    for name in ("photo", "clip"):
        if getattr(options, name) and not options.verify:
            parser.error(f"--{name} is for --verify")
    if options.config_file and options.checkpoint is None:
        parser.error("--config-file needs the --checkpoint that was trained with it")
    if options.config_file and options.cache_dir:
        parser.error("--cache-dir is for a --variant, which is fetched")
    if options.variant and options.labels:
        parser.error("--labels is for one's own --config-file; those of a --variant are known")


if __name__ == "__main__":
    sys.exit(main())
