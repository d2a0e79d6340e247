"""The `m2f` command: segment pictures, track through clips, run the demo, describe a checkpoint, publish one.

Exit status: 0, all done; 1, some pictures could not be read or written, the others are done; 2, nothing was done,
because the arguments, the model, the device, the output folder or the repository cannot be used.
"""

from __future__ import annotations

import argparse
import io
import json
import mimetypes
import os
import sys
import tempfile
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
)
from PIL import Image
from tqdm.auto import tqdm
from transformers.utils import logging

from .. import __version__
from ..draw.segments import contact_sheet
from ..hub.families import label_names
from ..hub.push import HubFolder
from ..inference.loading import checkpoint_family, first_line
from ..inference.segmenter import SegmentedImage, Segmenter
from ..known.bundled import BUNDLED_MODEL, BUNDLED_SCENES
from ..known.lookup import NETWORK_ERRORS
from ..model.configuration import Mask2FormerConfig, Mask2FormerVideoConfig
from ..model.modeling import Mask2FormerForUniversalSegmentation
from ..processing.image_processor import TASKS, M2FImageProcessor
from ..processing.images import read_rgb
from ..processing.segment_ids import id_to_rgb
from .common import (
    CommandError,
    ImageError,
    add_model_options,
    add_output,
    add_revision,
    add_run_options,
    check_output,
    command_errors,
    loading,
    make_output,
    probability,
)
from .track import add_track_parser


IMAGE_SUFFIXES = (".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
OUTPUT_SUFFIXES = (".overlay.png", ".segments.png", ".json")
INFO_KEYS = ("id", "label_id", "label", "isthing", "score", "area", "bbox", "segmentation")
# Of large files, the client reports whatever is wrong as a RuntimeError.
UPLOAD_ERRORS: tuple[type[Exception], ...] = (RuntimeError, *NETWORK_ERRORS)
# What becomes in training of an instance that is absent in the last frame of a clip.
_LABEL_FRAMES = {"any": "an instance keeps its class where it is absent", "last": "absent there is no object"}
# The scenes are small, and their labels are to be read.
_DEMO_SCALE = 3
_READER_GONE = 141  # 128 + SIGPIPE, as shells say it


# --- entry ---


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with `arguments` (default: the process's) and return its exit status."""
    try:
        try:
            return _run(arguments)
        finally:  # of --help, too: here, where it can still be caught that the reader has gone away
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        # As of `m2f demo | head`: nobody is to be told anything. Python would try once more when it ends.
        if isinstance(sys.stdout, io.TextIOWrapper):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _READER_GONE


def _run(arguments: Sequence[str] | None) -> int:
    options = _parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names that the terminal cannot show stop nothing
    try:
        status: int = options.run(options)
        return status
    except CommandError as error:
        print(f"m2f: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("m2f: stopped; what was finished so far is complete", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="m2f", description="Segment pictures and follow objects through clips.")
    parser.add_argument("--version", action="version", version=f"m2f_hf {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

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
    segment.set_defaults(run=_segment)

    add_track_parser(commands)

    demo = commands.add_parser("demo", help="segment the bundled scenes with the bundled model, offline")
    add_output(demo)
    demo.set_defaults(run=_demo)

    info = commands.add_parser("info", help="describe a model without loading its weights")
    info.add_argument("model", metavar="MODEL", help="a model on the Hugging Face Hub or a folder")
    add_revision(info)
    info.set_defaults(run=_info)

    push = commands.add_parser(
        "push",
        help="publish a model on the Hugging Face Hub",
        description="Sends a folder that save_pretrained wrote, model and processor, to the Hub in one commit, with a "
        "model card and the code that runs it where this package is not installed.",
    )
    push.add_argument("folder", type=Path, metavar="FOLDER", help="what save_pretrained wrote")
    push.add_argument("repo_id", metavar="OWNER/NAME", help="the repository; made if need be")
    push.add_argument("--private", action="store_true", help="a new repository that others do not see")
    push.add_argument("--revision", metavar="BRANCH", help="made if need be; default: main")
    push.add_argument("--message", help="of the commit")
    push.add_argument("--replace-card", action="store_true", help="also where somebody wrote in the card on the Hub")
    push.add_argument("--yes", action="store_true", help="do not ask")
    push.set_defaults(run=_push)
    return parser


# --- m2f segment ---


def _segment(options: argparse.Namespace) -> int:
    paths = _find_images(options.images)
    check_output(options.output)
    if options.model == str(BUNDLED_MODEL):
        print(
            "m2f: no --model given: the bundled one knows generated shapes only. For photos, give for example "
            "--model facebook/mask2former-swin-tiny-coco-panoptic",
            file=sys.stderr,
        )
    logging.disable_progress_bar()
    with command_errors():
        segmenter = Segmenter.from_pretrained(
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


def _find_images(arguments: Iterable[str]) -> list[Path]:
    """Files as given and the pictures in folders, each once. Files that do not exist are kept, to be reported."""
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
    """A name for each picture's files, such that no two pictures share one and no picture is overwritten."""
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
    """
    Write `<stem>.overlay.png`, `<stem>.segments.png` and, when those are in place, `<stem>.json`; return the first.

    Args:
        record: what the JSON says of the picture before its `segments_info`.
        scale: enlargement of the overlay.

    Raises:
        ImageError: where the files cannot be written; none is left half-written.
    """
    overlay, segments, description = (folder / f"{stem}{suffix}" for suffix in OUTPUT_SUFFIXES)
    height, width = result.segmentation.shape
    text = _to_json({**record, "height": height, "width": width, "file_name": segments.name}, result.segments)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".m2f-") as work:
            result.draw(scale).save(Path(work, overlay.name))
            Image.fromarray(id_to_rgb(result.segmentation)).save(Path(work, segments.name))
            # Names of files may hold bytes that are no text; so written, json.loads gives them back.
            Path(work, description.name).write_text(text, encoding="utf-8", errors="backslashreplace")
            for target in (overlay, segments, description):
                os.replace(Path(work, target.name), target)
    except OSError as error:
        raise ImageError(f"cannot write to {folder} ({first_line(error)}); free space or name another") from error
    return overlay


def _to_json(record: Mapping[str, Any], segments_info: Sequence[Mapping[str, Any]]) -> str:
    """The record with its `segments_info`, a line for each segment."""
    fields = [f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in record.items()]
    segments = ",".join("\n  " + json.dumps(info, ensure_ascii=False) for info in segments_info)
    fields.append(f'"segments_info": [{segments}\n ]' if segments else '"segments_info": []')
    return "{\n " + ",\n ".join(fields) + "\n}\n"


# --- m2f demo ---


def _demo(options: argparse.Namespace) -> int:
    scenes = sorted(BUNDLED_SCENES.glob("*.png"))
    check_output(options.output)
    logging.disable_progress_bar()
    segmenter = Segmenter.from_pretrained(BUNDLED_MODEL, device="cpu")
    segmenters = [Segmenter(segmenter.model, segmenter.processor, task) for task in TASKS]
    make_output(options.output)

    print(f"{len(scenes)} generated scenes that the bundled model has never seen, each for {len(TASKS)} tasks:")
    rows = []
    for scene in scenes:
        print(f"\n{scene.stem}")
        image = read_rgb(scene)
        row = [image.resize((image.width * _DEMO_SCALE, image.height * _DEMO_SCALE), Image.Resampling.BICUBIC)]
        for segmenter in segmenters:
            result = segmenter(image)
            record = {"image": scene.name, "model": BUNDLED_MODEL.name, "task": segmenter.task}
            try:
                overlay = write_result(
                    options.output, f"{scene.stem}.{segmenter.task}", result, record, scale=_DEMO_SCALE
                )
            except ImageError as error:
                raise CommandError(str(error)) from error
            row.append(Image.open(overlay))
            print(f"  {segmenter.task:<9} {result}")
        rows.append(row)
    sheet = options.output / "demo.png"
    picture = contact_sheet(rows, [scene.stem for scene in scenes], ["scene", *TASKS])
    try:
        with tempfile.TemporaryDirectory(dir=options.output, prefix=".m2f-") as work:
            picture.save(Path(work, sheet.name))
            os.replace(Path(work, sheet.name), sheet)
    except OSError as error:
        raise CommandError(f"cannot write {sheet} ({first_line(error)}); free space or name another folder") from error
    print(f"\nSee {sheet}; beside it lie an overlay, an id map and a JSON file for each scene and task.")
    return 0


# --- m2f info ---


def _info(options: argparse.Namespace) -> int:
    with command_errors():
        family = checkpoint_family(options.model, options.revision)
    with loading(options.model):
        config = family.config.from_pretrained(options.model, revision=options.revision or "main")
        processor = family.processor.from_pretrained(options.model, revision=options.revision or "main")
    # Names stay whole, to be searched for and copied.
    wrapper = textwrap.TextWrapper(100, subsequent_indent=" " * 16, break_on_hyphens=False, break_long_words=False)
    for name, text in _facts(options.model, config, processor):
        wrapper.initial_indent = f"{name:<16}"
        print(wrapper.fill(text))
    return 0


def _facts(model: str, config: Mask2FormerConfig, processor: M2FImageProcessor) -> Iterator[tuple[str, str]]:
    """What there is to know before running a model: rows of (name, text)."""
    stuff_ids = set(processor.label_ids_to_fuse or ())
    labels = label_names(config)
    stuff = [label for label_id, label in labels.items() if label_id in stuff_ids]
    others = [label for label_id, label in labels.items() if label_id not in stuff_ids]
    backbone: Any = config.backbone_config
    layout = [name for name in ("depths", "embed_dim", "hidden_size", "hidden_sizes") if hasattr(backbone, name)]
    edges = [f"{name.replace('_', ' ')} {length}" for name, length in dict(processor.size).items() if length]
    num_parameters = _count_parameters(config)

    yield "model", model
    yield "type", config.model_type
    yield "task", f"video {processor.task}" if isinstance(config, Mask2FormerVideoConfig) else processor.task
    if stuff:
        yield "things", f"{len(others)}: {', '.join(others)}"
        yield "stuff", f"{len(stuff)}: {', '.join(stuff)}"
    else:
        yield "classes", f"{len(others)}: {', '.join(others)}"
    yield "queries", str(config.num_queries)
    yield "backbone", ", ".join([backbone.model_type, *(f"{name} {getattr(backbone, name)}" for name in layout)])
    yield "pixel decoder", config.pixel_decoder
    yield "decoder", f"{config.decoder_layers - 1} layers, width {config.hidden_dim}"
    yield "parameters", f"{num_parameters:,}"
    yield "saved as", str(config.dtype or "float32").removeprefix("torch.")
    size = f"{', '.join(sorted(edges, reverse=True))} pixels, {processor.channel_order}"
    if isinstance(config, Mask2FormerVideoConfig):
        yield "frame size", size
        at_a_time = "a few" if config.frames_per_batch is None else config.frames_per_batch
        yield "frames", f"any number, of one size; backbone and pixel decoder read {at_a_time} at a time"
        yield "label frame", f"{config.label_frame}: {_LABEL_FRAMES[config.label_frame]}"
        yield (
            "tracks",
            f"at most {processor.max_detections} in a clip, score at least {processor.instance_threshold}, mask "
            f"{processor.mask_threshold}",
        )
        return
    yield "image size", size
    yield (
        "thresholds",
        f"panoptic {processor.threshold}, instance {processor.instance_threshold}, mask {processor.mask_threshold}, "
        f"overlap {processor.overlap_mask_area_threshold}",
    )


def _count_parameters(config: Mask2FormerConfig) -> int:
    with torch.device("meta"):
        model = Mask2FormerForUniversalSegmentation(config)
    return sum(parameter.numel() for parameter in model.parameters())


# --- m2f push ---


def _push(options: argparse.Namespace) -> int:
    with loading(str(options.folder)):
        folder = HubFolder(options.folder)
    with _publishing(options.repo_id):
        HfApi().whoami()  # before anything is shown or asked
    place = f"{options.repo_id}{f', branch {options.revision}' if options.revision else ''}"
    print(f"To {place}{' (private)' if options.private else ''}:")
    for name, content in sorted(folder.files.items()):
        print(f"  {_size(len(content) if isinstance(content, str) else content.stat().st_size):>8}  {name}")
    if folder.left_out:
        print(f"Not sent: {', '.join(folder.left_out)}")
    if not options.yes and sys.stdin.isatty() and not _agrees("Publish?"):
        print("nothing was sent")
        return 0
    with _publishing(options.repo_id):
        commit = folder.push(
            options.repo_id,
            private=options.private or None,
            revision=options.revision,
            commit_message=options.message,
            replace_card=options.replace_card,
        )
    print(f"{commit.repo_url} is at {commit.oid[:8]}")
    return 0


def _agrees(question: str) -> bool:
    try:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 1e5 else f"{num_bytes / 1e3:.1f} kB"


@contextmanager
def _publishing(repo_id: str) -> Iterator[None]:
    """Turn what the Hub and the network raise into one line that says what to do and what is there now."""
    # A connection may also break after the Hub has done its work.
    outcome = "the repository has everything of it or nothing"
    again = f"{outcome}. Run the same command again: what has been sent is not sent twice"
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise CommandError("nobody is logged in: run `hf auth login`, then this again") from error
    except HFValidationError as error:
        raise CommandError(f"{repo_id} cannot be a repository's name: give owner/name") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            raise CommandError("the Hub does not accept the token: run `hf auth login` again") from error
        if status == 403:
            raise CommandError(
                f"this account may not write to {repo_id}: name a repository of your own, or log in with a token that "
                "has the right to write (`hf auth login`)"
            ) from error
        is_passing = status >= 500 or status in (408, 409, 412, 429)
        raise CommandError(
            f"the Hub refuses ({first_line(error)}); {again if is_passing else 'no file was published'}"
        ) from error
    except ValueError as error:
        raise CommandError(first_line(error)) from error
    except UPLOAD_ERRORS as error:
        raise CommandError(f"the upload broke off ({first_line(error.__cause__ or error)}); {again}") from error
