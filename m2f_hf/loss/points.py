"""Point sampling: masks are compared at random points instead of at every pixel (Mask2Former, section 3.3).

Two kinds of masks are sampled. Predictions are dense float maps on the grid of the mask features and carry gradients
(`sample_points`). Targets are binary maps on the grid of the padded input, of a size that may differ from image to
image, and are turned into floats a few at a time (`in_floats`). Both kinds use the same convention: points are
(x, y) in [0, 1] of the map's width and height, pixel centres lie at half-integers, values are bilinear, and outside the
map everything is zero.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels.pieces import length_of_pieces, pieces


_FLOATS_AT_ONCE = 1 << 21  # of masks that are sampled, 8 MB
_SAMPLED = 2048  # of a row, to guess one of its quantiles

DrawPoints = Callable[[str, int, Sequence[int], int, torch.device], Tensor]
"""Where random points come from: `draw(purpose, layer, images, num_points, device) -> (len(images), num_points, 2)`.

`purpose` is "matching" (one row per image), "candidates" (one row per matched mask, of which the most uncertain points
are kept) or "random" (one row per matched mask, kept as they are). `layer` counts the stacked outputs, 0 the raw
queries. `images` is the position in the batch of each row's image; the rows of one image follow each other, with the
query index ascending. Of clips, "image" means clip, and a matched mask has a row for each of its frames in turn. Being
told what a draw is for, and for which image, a replacement can replay recorded points, or make them independent of how
a batch is split over processes (`SeededPoints`).
"""


class PointsInParts:
    """A `DrawPoints` on the CPU whose rows can be drawn a few at a time, the same ones."""

    def generators(self, purpose: str, layer: int, images: Sequence[int]) -> Iterator[tuple[Any, int]]:
        """What makes the random bits, and how many of the rows, in order; SFC64 is the fastest that NumPy has."""
        raise NotImplementedError

    def __call__(
        self, purpose: str, layer: int, images: Sequence[int], num_points: int, device: torch.device
    ) -> Tensor:
        rows = torch.empty(len(images), num_points, 2, device="cpu", dtype=torch.float32)
        start = 0
        for part in self.in_parts(purpose, layer, images, num_points, max(1, len(images))):
            rows[start : start + len(part)] = part
            start += len(part)
        return rows.to(device, non_blocking=True)

    def in_parts(
        self, purpose: str, layer: int, images: Sequence[int], num_points: int, at_once: int
    ) -> Iterator[Tensor]:
        """The rows of a draw in order, at most `at_once` in a tensor (n, num_points, 2)."""
        for generator, count in self.generators(purpose, layer, images):
            for start in range(0, count, at_once):
                rows = min(at_once, count - start)
                # 64 bits a point, so that rows drawn one after another are those drawn together. As `torch.rand` does,
                # which takes three times as long: multiples of 2**-24 in [0, 1).
                bits = torch.from_numpy(generator.random_raw(rows * num_points).view(np.int32))
                numbers = bits.bitwise_and_((1 << 24) - 1).to(torch.float32).mul_(2.0**-24)
                yield numbers.view(rows, num_points, 2)


class UniformPoints(PointsInParts):
    """Points that follow from the device's global random state."""

    def generators(self, purpose: str, layer: int, images: Sequence[int]) -> Iterator[tuple[Any, int]]:
        yield np.random.SFC64(torch.randint(1 << 62, (2,), device="cpu").numpy()), len(images)

    def __call__(
        self, purpose: str, layer: int, images: Sequence[int], num_points: int, device: torch.device
    ) -> Tensor:
        if device.type != "cpu":
            return torch.rand(len(images), num_points, 2, device=device, dtype=torch.float32)
        return super().__call__(purpose, layer, images, num_points, device)


draw_uniform_points = UniformPoints()
"""The default `DrawPoints`."""


class SeededPoints(PointsInParts):
    """A `DrawPoints` whose points depend on the seed and on an image's place in the global batch alone.

    Two processes with half a batch each then draw the same points as one process with the whole batch. Points are
    drawn on the CPU, the same for every device.

    Args:
        seed: Start of the sequence. Change it from step to step.
        first_image: Place of this process's first image in the global batch.
    """

    purposes = ("matching", "candidates", "random")

    def __init__(self, seed: int, first_image: int = 0):
        self.seed = seed
        self.first_image = first_image

    def generators(self, purpose: str, layer: int, images: Sequence[int]) -> Iterator[tuple[Any, int]]:
        for image in sorted(set(images)):
            key = (self.seed, self.purposes.index(purpose), layer, self.first_image + image)
            yield np.random.SFC64(hash(key) % 2**63), images.count(image)


def draw_in_parts(
    draw: DrawPoints, purpose: str, layer: int, images: Sequence[int], num_points: int, device: torch.device
) -> Iterator[tuple[slice, Tensor]]:
    """The points that `draw` gives, and which rows of `images` they are for.

    On the CPU a few rows at a time where `draw` can do that, to be used while they are in the cache.

    Raises:
        ValueError: `draw` gives more or fewer than it is asked for.
    """
    if device.type == "cpu" and isinstance(draw, PointsInParts):
        start = 0
        for points in draw.in_parts(purpose, layer, images, num_points, length_of_pieces(2 * num_points)):
            yield slice(start, start + len(points)), points
            start += len(points)
        return
    points = draw(purpose, layer, images, num_points, device)
    if points.shape != (len(images), num_points, 2):
        raise ValueError(
            f"`draw_points` gave {purpose!r} points of the shape {tuple(points.shape)}, expected "
            f"({len(images)}, {num_points}, 2): for each mask as many as it is asked for."
        )
    yield slice(None), points


def sample_points(features: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of feature maps at points, in float32.

    Args:
        features: (N, C, H, W), floating.
        points: (N, P, 2), x and y in [0, 1].

    Returns:
        (N, C, P) float32.
    """
    grid = _grid(points.float())[:, :, None]  # (N, P, 1, 2)
    sampled = F.grid_sample(features.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return sampled.squeeze(3)


def spread_to_maps(grad: Tensor, points: Tensor, out: Tensor) -> None:
    """Gradient of `sample_points` to maps with a single channel: (N, P), (N, P, 2) -> (N, H, W), written to `out`.

    Sampling is linear in the maps, so their values don't matter: a single zero stands for all of them, and whoever
    samples need not keep them. On the CPU a few maps at a time, for which the cache is large enough.
    """
    rows = pieces(len(out), 4 * points[0].numel()) if out.device.type == "cpu" and len(out) else [slice(None)]
    for part in rows:
        nothing = grad.new_zeros(()).expand(out[part, None].shape)
        # Bilinear, zeros outside, corners not aligned; of the two gradients the first.
        settings = (0, 0, False, [True, False])
        of_maps, _ = torch.ops.aten.grid_sampler_2d_backward(
            grad[part, None, :, None], nothing, _grid(points[part])[:, :, None], *settings
        )
        out[part] = of_maps[:, 0]


def _grid(points: Tensor) -> Tensor:
    """[0, 1] -> [-1, 1], in one pass."""
    return torch.add(points.new_full((), -1.0), points, alpha=2)


class PointRows:
    """Feature maps that are sampled at many points, all channels of a pixel together; without gradients.

    A bilinear sample is a weighted sum of four rows, one `embedding_bag`: on the CPU several times faster than
    `sample_points`, whose channels lie far apart. Maps with channels last, which are such rows, are not copied.

    Args:
        features: (B, C, H, W), floating.
    """

    def __init__(self, features: Tensor) -> None:
        batch_size, _, height, width = features.shape
        # (B, C, H, W) -> (B * H * W, C)
        self.rows = features.detach().permute(0, 2, 3, 1).flatten(0, 2).float().contiguous()
        self.width = width
        size = torch.tensor([width, height], dtype=torch.float32)  # x and y, as in points
        self.size = size.to(features.device, non_blocking=True).view(2, 1, 1)
        self.first_row = torch.arange(batch_size, device=features.device)[:, None] * height * width

    def sample(self, points: Tensor) -> Tensor:
        """Bilinear values (B, P, C) float32 at points (B, P, 2), x and y in [0, 1]."""
        location = points.float().movedim(-1, 0)  # (2, B, P)
        last = self.size - 1
        # In pixels; where nothing is near, just outside the map.
        position = (location * self.size - 0.5).clamp(min=-1).minimum(self.size)
        lower = position.floor().minimum(last)
        share = position - lower
        # Column and line of both neighbours, and the weights of these: zero outside the map.
        shares = torch.stack([(1 - share).mul_(lower >= 0), share.mul_(lower < last)])  # (2, 2, B, P)
        columns, lines = torch.stack([lower.clamp(min=0), (lower + 1).minimum(last)], dim=1).long()
        corners = (self.first_row + lines * self.width)[:, None] + columns  # (2, 2, B, P), lines first
        weights = shares[:, None, 1] * shares[:, 0]
        sampled = F.embedding_bag(
            corners.flatten(0, 1).flatten(1).T.contiguous(),
            self.rows,
            mode="sum",
            per_sample_weights=weights.flatten(0, 1).flatten(1).T.contiguous(),
        )
        return sampled.view(*points.shape[:2], -1)


def in_reading_order(points: Tensor, size: Sequence[int]) -> Tensor:
    """Points (N, P, 2), each row of them sorted by the pixel of a map of that height and width in which they lie.

    For sums over points, whose order does not matter: on the CPU neighbours find each other's pixels in the cache.
    """
    height, width = size
    column, line = (points * points.new_tensor([width, height])).floor().unbind(-1)
    order = (line * width + column).argsort(1)
    return points.gather(1, order[..., None].expand_as(points))


def in_floats(masks: Tensor, others: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """A few masks at a time as floats, with the others' rows: all of them would be four times the size of booleans."""
    numbers = _FLOATS_AT_ONCE if masks.device.type == "cpu" else 16 * _FLOATS_AT_ONCE
    step = max(1, numbers // max(1, masks[0].numel() if len(masks) else 1))
    for start in range(0, len(masks), step):
        part = masks[start : start + step]
        # As bytes booleans are converted six times as fast.
        yield (part.view(torch.uint8) if part.dtype == torch.bool else part).float(), others[start : start + step]


def uncertain_points(logits: Tensor, candidates: Tensor, num_points: int) -> Tensor:
    """Of many candidates those at which masks are the least certain: a logit close to 0 (PointRend, section 3.1).

    Args:
        logits: (N, 1, H, W) mask logits.
        candidates: (N, R, 2) points, R >= `num_points`.
        num_points: How many of a mask's candidates are kept.

    Returns:
        (N, num_points, 2) points, in no particular order.
    """
    certainty = sample_points(logits, candidates).squeeze(1).abs_()  # (N, R)
    if logits.device.type != "cpu":
        # Their order does not matter, and most of the time would go into it.
        kept = certainty.topk(num_points, dim=1, largest=False, sorted=False).indices
        return candidates.take_along_dim(kept[..., None], dim=1)
    kept = torch.from_numpy(smallest_of_rows(certainty.numpy(), num_points))
    first = torch.arange(len(kept), device=kept.device)[:, None] * candidates.shape[1]
    return candidates.flatten(0, 1).index_select(0, (first + kept).flatten()).view(*kept.shape, 2)


def smallest_of_rows(values: np.ndarray, count: int) -> np.ndarray:
    """Where the smallest of each row are, in no particular order: (N, R) floating -> (N, count) int64.

    A sample of a row says between which two values the last of them will be, of long rows in 997 of 1,000. Only what is
    between has to be told apart, a twentieth: 2 ns a number in all, where `argpartition` takes 4.5 on Intel's
    processors with AVX-512 and 10 to 14 on AMD's. Ties are broken anyhow. What is not a number counts as large.
    """
    chosen = np.empty((len(values), count), dtype=np.int64)
    for row, of_row in zip(values, chosen, strict=True):
        of_row[:] = _smallest(row, count)
    return chosen


def _smallest(row: np.ndarray, count: int) -> np.ndarray:
    """As `smallest_of_rows`, (R,) -> (count,)."""
    sample = row[:: max(1, len(row) // _SAMPLED)]  # of all parts of the row, which may be sorted
    share = count / len(row)
    # Three standard deviations of how many in the sample are among the smallest.
    middle, spread = len(sample) * share, 3 * (len(sample) * share * (1 - share)) ** 0.5
    bounds = [int(middle - spread), int(middle + spread) + 1]
    if bounds[0] >= 0 and bounds[1] < len(sample):
        low, high = np.partition(sample, bounds)[bounds]
        below = np.flatnonzero(row < low)
        missing = count - len(below)
        if missing >= 0:
            between = np.flatnonzero((row >= low) & (row <= high))
            if 0 < missing < len(between):
                between = between[np.argpartition(row[between], missing - 1)]
            if missing <= len(between):
                return np.concatenate([below, between[:missing]])
    # The row is short, nearly all or none of it is wanted, or the sample is not like the rest.
    return np.argpartition(row, count - 1)[:count]
