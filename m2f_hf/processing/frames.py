"""Stream the frames of a clip from a folder, a video file (with PyAV) or a sequence of images."""

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .images import read_image


FRAME_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


@dataclass(frozen=True)
class DamagedFrame:
    """Stands for a frame that cannot be read, so that those after it keep their numbers.

    Args:
        index: its number, from 0.
        reason: what is wrong, with the name of its file where it has one.
    """

    index: int
    reason: str


def stream_frames(source: Any, data_format: str | None = None) -> Iterator[np.ndarray | DamagedFrame]:
    """Stream the frames of one clip; no more than one of them is in memory at a time.

    Args:
        source: a folder of frames (in the order of their names, numbers by value: 9 before 10), a video file, an array
            or tensor (T, H, W, 3) or (T, 3, H, W), or any iterable of images in a form that `M2FImageProcessor` takes.
        data_format: of arrays and tensors, "channels_first" or "channels_last"; by default their shape tells.

    Returns:
        An iterator of upright (3, H, W) arrays, RGB. For a file that cannot be read, in a folder, a video or a sequence
        of paths, it warns by name and yields a `DamagedFrame`.

    Raises:
        FileNotFoundError: a path that does not exist.
        ImportError: a video file without PyAV.
        ValueError: a file that is no video, a folder without images, what is no clip; and, while iterating, no frame
            that can be read, one of another size than those before, or what is not an image.
    """
    if isinstance(source, str | Path):
        return _checked(_open(Path(source)), str(source), data_format)
    check_clip(source)
    return _checked(source, "the clip", data_format)


def check_clip(clip: Any) -> None:
    """Raise a ValueError for what is no clip, such as a single image."""
    dimensions = getattr(clip, "ndim", 4)
    if isinstance(clip, Image.Image) or dimensions < 4:
        raise ValueError("a single image is no clip: give a list of frames, [image] for one")
    if dimensions > 4 or isinstance(clip, Mapping | bytes) or not isinstance(clip, str | Path | Iterable):
        raise ValueError(
            f"{type(clip).__name__} is no clip: give a list of images, an array (T, H, W, 3), a folder or a video"
        )


def count_frames(source: Any) -> int | None:
    """Return how many frames a source says it has, damaged ones included; None where only reading it would tell."""
    if not isinstance(source, str | Path):
        return len(source) if hasattr(source, "__len__") else None
    path = Path(source)
    if path.is_dir():
        return len(_files_in(path))
    with _container(path) as container:
        return container.streams.video[0].frames or None


def frame_rate(source: Any) -> float | None:
    """Return the frames per second of a video file; None for anything else, and where the file does not say."""
    if not isinstance(source, str | Path) or Path(source).is_dir():
        return None
    with _container(Path(source)) as container:
        rate = container.streams.video[0].average_rate
        return float(rate) if rate else None


def _checked(items: Iterable[Any], name: str, data_format: str | None) -> Iterator[np.ndarray | DamagedFrame]:
    first: tuple[int, tuple[int, int]] | None = None  # index and size of the first frame that was read
    for index, item in enumerate(items):
        if isinstance(item, DamagedFrame):  # `items` is a stream itself
            yield item
            continue
        try:
            if isinstance(item, ValueError):  # from `_open` or `_decode`
                raise item
            array = read_image(item, data_format)
        except (ValueError, OSError) as error:
            if not isinstance(item, str | Path | ValueError) or isinstance(error, FileNotFoundError):
                raise
            warnings.warn(f"{name} goes on without what cannot be read: frame {index} ({error})", stacklevel=2)
            yield DamagedFrame(index, str(error))
            continue
        height, width = array.shape[-2:]
        first = first or (index, (height, width))
        if (height, width) != first[1]:
            number, (first_height, first_width) = first
            raise ValueError(
                f"the frames of {name} differ in size ({first_height}x{first_width} in frame {number}, "
                f"{height}x{width} in frame {index}): resize or split them first"
            )
        yield array
        del item, array  # while the next is read
    if first is None:
        raise _no_frames(name)


def _no_frames(name: str) -> ValueError:
    return ValueError(
        f"{name} has no frames that can be read: give at least one image ({', '.join(FRAME_SUFFIXES)} in a folder)"
    )


# --- folders and files ---


def _open(path: Path) -> Iterable[Any]:
    if not path.exists():
        raise FileNotFoundError(f"there is no folder or video file {path}")
    if not path.is_dir():
        return _decode(path, _container(path))
    files = _files_in(path)
    if not files:
        raise _no_frames(str(path))
    # A link may be broken, and a file be gone by its turn.
    return (file if file.exists() else ValueError(f"there is no image file {file}") for file in files)


def _files_in(folder: Path) -> list[Path]:
    files = (file for file in folder.iterdir() if file.suffix.lower() in FRAME_SUFFIXES and not file.is_dir())
    return sorted((file for file in files if not file.name.startswith(".")), key=_by_numbers)


def _by_numbers(file: Path) -> tuple[list[Any], str]:
    # Texts and numbers alternate, so that only like is compared; between 1 and 01 the name decides.
    parts = re.split(r"([0-9]+)", file.name)
    return [int(part) if position % 2 else part for position, part in enumerate(parts)], file.name


def _pyav(path: Path) -> Any:
    try:
        import av
    except ImportError as error:
        raise ImportError(
            f"reading the video file {path} needs PyAV: pip install 'm2f_hf[video]', or give a folder of its frames"
        ) from error
    return av


def _container(path: Path) -> Any:
    av = _pyav(path)
    try:
        container = av.open(str(path), metadata_errors="ignore")  # titles are not always UTF-8
    except (av.error.FFmpegError, OSError) as error:
        raise ValueError(f"{path} is no video file that can be read ({error})") from error
    if not container.streams.video:
        container.close()
        raise ValueError(f"{path} is no video file that can be read (it has no pictures, only sound or text)")
    return container


def _decode(path: Path, container: Any) -> Iterator[np.ndarray | ValueError]:
    av = _pyav(path)
    damage = ValueError(f"{path} is damaged there")
    broken: list[int] = []  # times of what could not be decoded; frames may be stored in another order than shown
    with container:
        for packet in container.demux(container.streams.video[0]):
            try:
                frames = packet.decode()
            except av.error.EOFError:
                break
            except av.error.FFmpegError:
                broken.append(packet.pts or 0)
                continue
            for frame in frames:
                earlier = [time for time in broken if frame.pts is None or time < frame.pts]
                broken = [time for time in broken if time not in earlier]
                yield from [damage] * len(earlier)
                if getattr(frame, "is_corrupt", False):
                    yield damage
                else:
                    yield np.rot90(frame.to_ndarray(format="rgb24"), round(getattr(frame, "rotation", 0) / 90))
    yield from [damage] * len(broken)
