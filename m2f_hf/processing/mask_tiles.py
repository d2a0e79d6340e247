"""Resize mask logits to the target tile by tile: enlarge to the padded input, crop, resize to the target.

The arithmetic is that of the original code, two bilinear resizings one after the other. Each is a weighted mean of
neighbours, so every value of a tile is within the range of the few mask logits that the tile reads. At a target larger
than the masks, most queries' range leaves nothing to decide in most tiles, and there they need not be resized at all.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor


# The pixel decoder's mask features have stride 4, so the padded input is four times the mask logits.
MASK_STRIDE = 4

# Elements of the largest tile, and bounds of its side. On a CPU a tile should stay in the cache, and small ones leave
# less to decide; on an accelerator kernel launches are what costs.
TILE_ELEMENTS = {"cpu": 2**21}
TILE_ELEMENTS_ACCELERATOR = 2**25
TILE_SIDES = {"cpu": (16, 160)}
TILE_SIDES_ACCELERATOR = (16, 1024)

# Two resizings along two axes round some 20 times, each by at most 2**-24 of the largest value.
RESIZE_ROUNDING = 2.0**-19

Size = tuple[int, int]


class Taps(NamedTuple):
    """For each new position along an axis: lower and upper neighbour, int64, and the upper's weight, float32."""

    low: Tensor
    high: Tensor
    weight: Tensor


class Span(NamedTuple):
    """A slice of one axis of the target, the slice of the mask logits that it reads, and how, by the padded input."""

    target: slice
    source: slice
    to_padded: Taps
    to_target: Taps


class Tile(NamedTuple):
    """A rectangle of the target."""

    row_span: Span
    column_span: Span

    @property
    def place(self) -> tuple[slice, slice]:
        """Rows and columns of the target."""
        return self.row_span.target, self.column_span.target


class MaskTiles:
    """Tiles of the target, from left to right and then down, and the mask logits in them.

    Args:
        mask_logits: (N, h, w), any floating dtype; the computation is in float32.
        image_size: height and width before padding, at most (4 h, 4 w).
        target_size: height and width of the result.
        num_channels: the most channels that the caller makes of the N, which bounds a tile's size: no tensor has more
            than about `TILE_ELEMENTS` elements, or 16 x 16 pixels of every channel where that is more.

    Attributes:
        side: of a tile in pixels; the last ones may be smaller.
        low, high: (N, tile rows, tile columns) float32, on the CPU whatever the device (the only synchronisation):
            bounds of each query's logits in a tile.
        heights, widths, pixels: (tile rows,), (tile columns,) and (tile rows, tile columns) int64, of the tiles; on
            the CPU.
    """

    def __init__(self, mask_logits: Tensor, image_size: Size, target_size: Size, num_channels: int = 1) -> None:
        self.mask_logits = mask_logits
        self.target_size = target_size
        device = mask_logits.device
        elements = TILE_ELEMENTS.get(device.type, TILE_ELEMENTS_ACCELERATOR)
        least, most = TILE_SIDES.get(device.type, TILE_SIDES_ACCELERATOR)
        self.side = min(max(int((elements / max(len(mask_logits), num_channels)) ** 0.5), least), most)
        self.row_spans, self.column_spans = (
            _spans(mask_logits.shape[1 + axis], image_size[axis], target_size[axis], self.side, device)
            for axis in range(2)
        )
        self.low, self.high = self._bounds()
        self.heights, self.widths = (
            torch.tensor([span.target.stop - span.target.start for span in spans])
            for spans in (self.row_spans, self.column_spans)
        )
        self.pixels = self.heights[:, None] * self.widths

    def _bounds(self) -> tuple[Tensor, Tensor]:
        bounds = []
        for reduce in (torch.amin, torch.amax):
            by_row = [reduce(self.mask_logits[:, span.source], 1) for span in self.row_spans]
            by_rows = torch.stack(by_row, 1)  # (N, tile rows, w)
            by_tile = [reduce(by_rows[..., span.source], 2) for span in self.column_spans]
            bounds.append(torch.stack(by_tile, 2).float())
        low, high = torch.stack(bounds).cpu()
        slack = RESIZE_ROUNDING * torch.maximum(low.abs(), high.abs())
        return low - slack, high + slack

    def __iter__(self) -> Iterator[Tile]:
        return itertools.starmap(Tile, itertools.product(self.row_spans, self.column_spans))

    def members(self, is_member: Tensor) -> tuple[Tensor, ...]:
        """Return for each tile the indices, rising, of its members, from (M, tile rows, tile columns) bool."""
        is_in_tile = is_member.flatten(1).T
        indices = is_in_tile.nonzero()[:, 1].to(self.mask_logits.device)
        return indices.split(is_in_tile.sum(1).tolist())

    def logits(self, tile: Tile, queries: Tensor, at_padded_size: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Resize the masks of some queries within a tile.

        Args:
            queries: (n,) int64.
            at_padded_size: applied between the two resizings, (n, rows, columns) -> (c, rows, columns).

        Returns:
            (n or c, rows, columns) float32, memory of its own.
        """
        rows, columns = tile
        masks = self.mask_logits[:, rows.source, columns.source].index_select(0, queries).float()
        masks = _resize_columns(masks, columns.to_padded)
        if at_padded_size is not None:
            masks = at_padded_size(_resize_rows(masks, rows.to_padded))
            return _resize_rows(_resize_columns(masks, columns.to_target), rows.to_target)
        # The order of rows and columns does not matter, and there are fewer rows now.
        masks = _resize_columns(masks, columns.to_target)
        return _resize_rows(_resize_rows(masks, rows.to_padded), rows.to_target)

    def expand_rows(self, by_tile_row: Tensor) -> Tensor:
        """(N, tile rows) -> (N, height): every row of the target gets its tiles' value."""
        return by_tile_row.repeat_interleave(self.side, 1)[:, : self.target_size[0]].to(self.mask_logits.device)

    def expand_columns(self, by_tile_column: Tensor) -> Tensor:
        """(N, tile columns) -> (N, width)."""
        return by_tile_column.repeat_interleave(self.side, 1)[:, : self.target_size[1]].to(self.mask_logits.device)


def bilinear_taps(size: int, new_size: int) -> Taps:
    """Return the taps of bilinear resizing from `size` to `new_size`, half-pixel centres.

    In float32, as `torch.nn.functional.interpolate` computes it: with large sizes the rounding of the position shows.
    """
    scale = torch.tensor(size, dtype=torch.float32) / new_size
    position = ((torch.arange(new_size, dtype=torch.float32) + 0.5) * scale - 0.5).clamp(min=0)
    low = position.long().clamp(max=size - 1)
    weight = position - low
    return Taps(low, torch.where(weight > 0, low + 1, low).clamp(max=size - 1), weight)


def _spans(size: int, image_size: int, target_size: int, side: int, device: torch.device) -> list[Span]:
    to_padded = bilinear_taps(size, MASK_STRIDE * size)
    to_target = bilinear_taps(image_size, target_size)
    spans = []
    for start in range(0, target_size, side):
        target = slice(start, min(start + side, target_size))
        low, high, weight = (tap[target] for tap in to_target)
        # `padded`: the positions of the padded input that this span reads, each once.
        padded, place = torch.unique(torch.stack([low, high]), return_inverse=True)
        source_low, source_high, source_weight = (tap[padded] for tap in to_padded)
        source = slice(int(source_low[0]), int(source_high[-1]) + 1)
        taps = (
            Taps(source_low - source.start, source_high - source.start, source_weight),
            Taps(place[0], place[1], weight),
        )
        spans.append(Span(target, source, *(Taps(*(tap.to(device) for tap in each)) for each in taps)))
    return spans


def _resize_rows(masks: Tensor, taps: Taps) -> Tensor:
    """(n, h, w) -> (n, rows, w)."""
    return masks.index_select(1, taps.low).lerp_(masks.index_select(1, taps.high), taps.weight[:, None])


def _resize_columns(masks: Tensor, taps: Taps) -> Tensor:
    """(n, h, w) -> (n, h, columns)."""
    low, high = (tap.expand(*masks.shape[:2], -1) for tap in (taps.low, taps.high))
    return masks.gather(2, low).lerp_(masks.gather(2, high), taps.weight)  # `index_select` is slower along rows
