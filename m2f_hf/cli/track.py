"""`m2f track`: a clip in; pictures of its tracks, id maps and results in YouTube-VIS' form out."""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from ..known.bundled import BUNDLED_VIDEO_MODEL
from ..known.label_sets import VIDEO_TASKS
from .common import (
    TRACK_FILES,
    TRACK_FOLDERS,
    CommandError,
    add_model_options,
    add_run_options,
    check_output,
    command_errors,
    loading,
    make_output,
    probability,
    write_errors,
)


if TYPE_CHECKING:
    from ..inference.tracking import ClipTracker


_DEFAULT_RATE = 10.0
_LEAST_RATE, _MOST_RATE = 0.01, 1000.0


def add_parser(commands: Any) -> None:
    """Add `track` to the subparsers of `m2f`."""
    track = commands.add_parser(
        "track",
        help="follow objects through a clip",
        description="Writes overlay.mp4 (with PyAV; otherwise pictures in overlay/), overlay.gif, ids/000000.png and "
        "so on (the track of each pixel, 0 for none), and results.json (YouTube-VIS' form of results).",
    )
    track.add_argument("clip", type=Path, metavar="CLIP", help="a folder of frames, or a video file")
    add_model_options(track, BUNDLED_VIDEO_MODEL, VIDEO_TASKS)
    track.add_argument("--window", type=int, default=8, metavar="FRAMES", help="read at once; default: 8")
    track.add_argument("--overlap", type=int, metavar="FRAMES", help="that windows share; default: half of --window")
    track.add_argument(
        "--threshold",
        type=probability,
        help="leave out tracks with a lower score, 0 to 1; default: the model's, or 0.5 where it has none",
    )
    track.add_argument(
        "--max-detections", type=int, metavar="NUMBER", help="most instances of a window; default: the model's"
    )
    track.add_argument("--fps", type=float, help="frames a second of overlay.mp4 and .gif; default: the file's, or 10")
    add_run_options(track)
    track.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run `m2f track` with its parsed options and return the exit status.

    Raises:
        CommandError: nothing was written; files of an earlier run are unchanged.
    """
    if options.fps is not None and not _LEAST_RATE <= options.fps <= _MOST_RATE:
        raise CommandError(f"--fps {options.fps} is no number of frames a second from {_LEAST_RATE} to {_MOST_RATE:g}")

    from ..draw.words import describe
    from ..processing.frames import count_frames, frame_rate, stream_frames
    from .clip_files import ClipWriter, replace_results

    with _clip_errors():
        frames = stream_frames(options.clip)
        rate = options.fps or frame_rate(options.clip) or _DEFAULT_RATE
        rate = min(max(rate, _LEAST_RATE), _MOST_RATE)
        total = count_frames(options.clip)
    _check_places(options.clip, options.output)
    tracker = _load(options)
    num_damaged = 0
    with _clip_errors(), _work_folder(options.output) as work:
        writer = ClipWriter(work, tracker.model.config, rate)
        try:
            # A frame waits for the result of its window.
            read, waiting = itertools.tee(frames)
            pairs = zip(tracker(read, "channels_first"), waiting, strict=True)
            for result, frame in tqdm(pairs, unit="frame", total=total):
                if "damaged" in result:
                    num_damaged += 1
                    tqdm.write(f"m2f: frame {result['frame']} cannot be read: {result['damaged']}", file=sys.stderr)
                writer.add(result, frame)
            writer.finish()
        finally:
            writer.close()
        with write_errors(options.output):
            replace_results(work, options.output)
    shown = next(path for path in (options.output / "overlay.mp4", options.output / "overlay") if path.exists())
    frames_read = "1 frame" if writer.num_frames == 1 else f"{writer.num_frames} frames"
    print(f"{options.clip}: {describe(writer.infos())} in {frames_read} -> {shown}")
    if total is not None and writer.num_frames < total:
        print(f"m2f: {options.clip} says that it has {total} frames: it may be incomplete", file=sys.stderr)
    if shown.name == "overlay":
        print(
            "m2f: an overlay.mp4 needs PyAV: pip install 'm2f_hf[video]'; there are pictures instead", file=sys.stderr
        )
    return 1 if num_damaged else 0


def _check_places(clip: Path, output: Path) -> None:
    """Refuse an output folder where results cannot be put in place, before minutes are spent on them."""
    for name in (*TRACK_FILES, *TRACK_FOLDERS):
        path = output / name
        if path.exists() and path.resolve() == clip.resolve():
            raise CommandError(f"{clip} would be replaced by the results: name another --output")
        if path.exists() and path.is_dir() == (name in TRACK_FILES):
            what = "folder" if path.is_dir() else "file"
            raise CommandError(f"the {what} {path} is where results would go: move it, or name another --output")
    check_output(output)


@contextmanager
def _work_folder(output: Path) -> Iterator[Path]:
    """Make a temporary folder in the output folder; a new output folder is removed again if nothing is put into it."""
    is_new = not output.exists()
    make_output(output)
    try:
        with tempfile.TemporaryDirectory(dir=output, prefix=".m2f-") as work:
            yield Path(work)
    finally:
        if is_new:
            with suppress(OSError):
                output.rmdir()


def _load(options: argparse.Namespace) -> ClipTracker:
    import torch

    from ..hub.families import IMAGES, VIDEOS, load_whole
    from ..inference.loading import checkpoint_family, choose_device
    from ..inference.tracking import ClipTracker

    with command_errors():
        device = choose_device(options.device)
        family = checkpoint_family(options.model, options.revision)
    if options.model == str(BUNDLED_VIDEO_MODEL):
        print(
            "m2f: no --model given: the bundled one knows generated shapes only (docs/video.md names others)",
            file=sys.stderr,
        )
    if family is IMAGES:
        print(
            f"m2f: {options.model} is an image model and has learned nothing of time: its tracks may change their "
            "object until it is trained on clips (docs/training.md)",
            file=sys.stderr,
        )
    revision = options.revision or "main"
    with loading(options.model):
        processor: Any = VIDEOS.processor.from_pretrained(options.model, revision=revision)
        model: Any = load_whole(options.model, VIDEOS, dtype=getattr(torch, options.dtype), revision=revision)[0]
    with command_errors():
        return ClipTracker(
            model.to(device).eval(),
            processor,
            window=options.window,
            overlap=options.overlap,
            task=options.task,
            threshold=options.threshold,
            max_detections=options.max_detections,
        )


@contextmanager
def _clip_errors() -> Iterator[None]:
    """Turn what is wrong with a clip into a CommandError; damaged frames are reported from the results."""
    with warnings.catch_warnings(), command_errors(ImportError):
        warnings.filterwarnings("ignore", message=".* goes on without what cannot be read")
        yield
