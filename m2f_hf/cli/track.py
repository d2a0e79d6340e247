"""`m2f track`: a clip in; pictures of its tracks, id maps and YouTube-VIS' results out."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from ..draw.segments import ClassColors, draw_segments
from ..draw.words import describe
from ..hub.families import IMAGES, VIDEOS, label_names, load_whole
from ..inference.loading import checkpoint_family, choose_device, first_line
from ..inference.tracking import ClipTracker, to_id_map
from ..known.bundled import BUNDLED_VIDEO_MODEL
from ..known.label_sets import find_label_set
from ..processing.frames import DamagedFrame, count_frames, frame_rate, stream_frames
from ..processing.rle import encode_rle
from ..processing.video_processor import Mask2FormerVideoProcessor
from .common import (
    CommandError,
    add_model_options,
    add_run_options,
    check_output,
    command_errors,
    loading,
    make_output,
    probability,
)


# What a run writes: files, and folders of numbered pictures.
_FILES = ("results.json", "overlay.mp4", "overlay.gif")
_FOLDERS = ("ids", "overlay")
_DEFAULT_RATE = 10.0
_LEAST_RATE, _MOST_RATE = 0.01, 1000.0
# An overlay is enlarged until its shorter side has so many pixels, for labels that can be read.
_READABLE_SIDE = 320
_LONGEST_ENLARGED = 4096
# H.264 has no longer ones.
_LONGEST_SIDE = 16384
_GIF_SIDE = 480
_GIF_FRAMES = 120
# In milliseconds: a picture's time is 16 bits of hundredths of a second, and Pillow makes equal pictures one.
_LONGEST_GIF = 655350


def add_track_parser(commands: Any) -> None:
    """Add `track` to the subparsers of `m2f`."""
    track = commands.add_parser(
        "track",
        help="follow objects through a clip",
        description="Writes overlay.mp4 (with PyAV; otherwise pictures in overlay/), overlay.gif, ids/000000.png and "
        "so on (the track of each pixel, 0 for none), and results.json (YouTube-VIS' form of results).",
    )
    track.add_argument("clip", type=Path, metavar="CLIP", help="a folder of frames, or a video file")
    add_model_options(track, BUNDLED_VIDEO_MODEL, Mask2FormerVideoProcessor.tasks)
    track.add_argument("--window", type=int, default=8, metavar="FRAMES", help="read at once; default: 8")
    track.add_argument("--overlap", type=int, metavar="FRAMES", help="that windows share; default: half of --window")
    track.add_argument(
        "--threshold",
        type=probability,
        help="leave out tracks with a lower score, 0 to 1; default: the model's, or 0.5 where it has none",
    )
    track.add_argument(
        "--max-detections",
        type=int,
        metavar="NUMBER",
        help="most instances of a window; default: the model's",
    )
    track.add_argument("--fps", type=float, help="frames a second of overlay.mp4 and .gif; default: the file's, or 10")
    add_run_options(track)
    track.set_defaults(run=run_track)


def run_track(options: argparse.Namespace) -> int:
    """Run `m2f track` with its parsed options and return the exit status.

    Raises:
        CommandError: nothing was written; what was there is unchanged.
    """
    if options.fps is not None and not _LEAST_RATE <= options.fps <= _MOST_RATE:
        raise CommandError(f"--fps {options.fps} is no number of frames a second from {_LEAST_RATE} to {_MOST_RATE:g}")
    with _reading():
        frames = stream_frames(options.clip)
        rate = options.fps or frame_rate(options.clip) or _DEFAULT_RATE
        rate = min(max(rate, _LEAST_RATE), _MOST_RATE)
        total = count_frames(options.clip)
    _check_places(options.clip, options.output)
    tracker = _load(options)
    num_damaged = 0
    with _reading(), _work_folder(options.output) as work:
        writer = _Writer(work, tracker.model.config, rate)
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
        with _writing(options.output):
            _put_in_place(work, options.output)
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
    """That results can be put in place, before minutes are spent on them."""
    for name in (*_FILES, *_FOLDERS):
        path = output / name
        if path.exists() and path.resolve() == clip.resolve():
            raise CommandError(f"{clip} would be replaced by the results: name another --output")
        if path.exists() and path.is_dir() == (name in _FILES):
            what = "folder" if path.is_dir() else "file"
            raise CommandError(f"the {what} {path} is where results would go: move it, or name another --output")
    check_output(output)


@contextmanager
def _work_folder(output: Path) -> Iterator[Path]:
    """A temporary folder in the output folder, which is made, and taken away again if nothing gets into it."""
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
        processor = Mask2FormerVideoProcessor.from_pretrained(options.model, revision=revision)
        model: Any = load_whole(options.model, VIDEOS, dtype=getattr(torch, options.dtype), revision=revision)[0]
    try:
        return ClipTracker(
            model.to(device).eval(),
            processor,
            window=options.window,
            overlap=options.overlap,
            task=options.task,
            threshold=options.threshold,
            max_detections=options.max_detections,
        )
    except ValueError as error:
        raise CommandError(first_line(error)) from error


@contextmanager
def _reading() -> Iterator[None]:
    """What is wrong with a clip, in one line; damaged frames are reported from the results."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* goes on without what cannot be read")
            yield
    except (ValueError, OSError, ImportError) as error:
        raise CommandError(first_line(error)) from error


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CommandError(f"cannot write to {folder} ({first_line(error)}); free space or name another") from error


# --- files ---


class _Writer:
    """Writes results as they come; memory grows with the encodings of masks alone.

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
        self.movie: _Movie | _Pictures = _Movie.open(folder / "overlay.mp4", rate) or _Pictures(folder / "overlay")
        self.gif = _Gif(rate)
        (folder / "ids").mkdir()

    def add(self, result: Mapping[str, Any], frame: np.ndarray | DamagedFrame) -> None:
        ids = to_id_map(result)
        height, width = ids.shape
        masks = np.asarray(result["segmentation"])
        for index, info in enumerate(result["segments_info"]):
            track = self.tracks.setdefault(info["id"], _TrackRecord(info["label_id"]))
            mask = masks == info["id"] if masks.ndim == 2 else masks[index]
            track.add(self.num_frames, info, encode_rle(mask))
        with _writing(self.folder.parent):
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
        """As `segments_info`, for each track of the clip."""
        return [
            {
                "id": number,
                "label": self.id2label[track.label],
                "isthing": track.isthing,
                "score": track.score,
            }
            for number, track in sorted(self.tracks.items())
        ]

    def finish(self) -> None:
        with _writing(self.folder.parent):
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
        """Let go of files that an error leaves half-written; they go with their folder."""
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
    """The category id of each label, in a data set's files.

    Where the labels are those of a known data set, that one's own; otherwise they count from 1, as YouTube-VIS' do and
    as `write_youtube_vis` writes them.
    """
    known = find_label_set(id2label)
    if known is not None and len(known.labels) == len(id2label):
        return [label.dataset_id for label in known.labels]
    return [label_id + 1 for label_id in range(len(id2label))]


class _Movie:
    """An MP4 file, frame by frame."""

    def __init__(self, av: Any, path: Path, rate: float) -> None:
        self._av, self._rate = av, Fraction(rate).limit_denominator(1001)
        self._container = av.open(str(path), "w")
        self._stream: Any = None

    @classmethod
    def open(cls, path: Path, rate: float) -> _Movie | None:
        """None where PyAV is missing."""
        try:
            import av
        except ImportError:
            return None
        return cls(av, path, rate)

    def add(self, picture: Image.Image) -> None:
        if max(picture.size) > _LONGEST_SIDE:
            picture = picture.copy()
            picture.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
        pixels = np.asarray(picture)
        height, width = pixels.shape[:2]
        # The format halves colours' sides.
        pixels = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        if self._stream is None:
            codec = "libx264" if "libx264" in self._av.codecs_available else "mpeg4"
            self._stream = self._container.add_stream(codec, rate=self._rate)
            self._stream.height, self._stream.width = pixels.shape[:2]
            self._stream.pix_fmt = "yuv420p"
        self._container.mux(self._stream.encode(self._av.VideoFrame.from_ndarray(pixels, format="rgb24")))

    def close(self) -> None:
        if self._stream is not None:
            self._container.mux(self._stream.encode())
            self._stream = None
        self._container.close()


class _Pictures:
    """A folder of numbered pictures."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        folder.mkdir()

    def add(self, picture: Image.Image) -> None:
        picture.save(self._folder / f"{self._count:06d}.png")
        self._count += 1

    def close(self) -> None:
        pass


class _Gif:
    """An animation of bounded size: small pictures, and of a long clip every second frame, every fourth, …"""

    def __init__(self, rate: float) -> None:
        self._rate, self._stride, self._count = rate, 1, 0
        self._pictures: list[Image.Image] = []

    def add(self, picture: Image.Image) -> None:
        if self._count % self._stride == 0:
            if len(self._pictures) == _GIF_FRAMES:
                self._pictures = self._pictures[::2]
                self._stride *= 2
            if self._count % self._stride == 0:
                small = picture.copy()
                small.thumbnail((_GIF_SIDE, _GIF_SIDE))
                self._pictures.append(small.quantize(128, dither=Image.Dither.NONE))
        self._count += 1

    def save(self, path: Path) -> None:
        first, *others = self._pictures
        duration = min(max(20, round(1000 * self._stride / self._rate)), _LONGEST_GIF // len(self._pictures))
        first.save(path, save_all=True, append_images=others, duration=duration, loop=0)


def _put_in_place(work: Path, output: Path) -> None:
    """Replace an earlier run's files; `results.json` goes first and comes last, so that it vouches for the others."""
    for name in _FILES:
        (output / name).unlink(missing_ok=True)
    for name in _FOLDERS:
        if (output / name).is_dir():
            for file in (output / name).glob("[0-9]*.png"):
                if len(file.stem) == 6 and file.stem.isdecimal():
                    file.unlink()
            with suppress(OSError):  # somebody else's files are in it
                (output / name).rmdir()
        if (work / name).is_dir():
            (output / name).mkdir(exist_ok=True)
            for file in (work / name).iterdir():
                os.replace(file, output / name / file.name)
    for name in reversed(_FILES):
        if (work / name).exists():
            shutil.move(work / name, output / name)
