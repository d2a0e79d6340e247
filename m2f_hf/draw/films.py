"""Write drawn frames one by one: an MP4 file, a folder of pictures, an animated GIF of bounded size."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


_MP4_SIDE = 16384  # H.264's limit
_GIF_SIDE = 480
_GIF_FRAMES = 120
# In milliseconds: a picture's time is 16 bits of hundredths of a second, and Pillow merges equal pictures.
_GIF_DURATION = 655350


class Movie:
    """Writes an MP4 file frame by frame."""

    def __init__(self, av: Any, path: Path, rate: float) -> None:
        self._av, self._rate = av, Fraction(rate).limit_denominator(1001)
        self._container = av.open(str(path), "w")
        self._stream: Any = None

    @classmethod
    def open(cls, path: Path, rate: float) -> Movie | None:
        """Return a new one, or None where PyAV is missing."""
        try:
            import av
        except ImportError:
            return None
        return cls(av, path, rate)

    def add(self, picture: Image.Image) -> None:
        if max(picture.size) > _MP4_SIDE:
            picture = picture.copy()
            picture.thumbnail((_MP4_SIDE, _MP4_SIDE))
        pixels = np.asarray(picture)
        height, width = pixels.shape[:2]
        # The format stores colours at half the size.
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


class PictureFolder:
    """Writes a folder of numbered pictures."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        folder.mkdir()

    def add(self, picture: Image.Image) -> None:
        picture.save(self._folder / f"{self._count:06d}.png")
        self._count += 1

    def close(self) -> None:
        pass


class Animation:
    """Writes an animation of bounded size: small pictures, and of a long clip every second frame, every fourth, …"""

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
        duration = min(max(20, round(1000 * self._stride / self._rate)), _GIF_DURATION // len(self._pictures))
        first.save(path, save_all=True, append_images=others, duration=duration, loop=0)
