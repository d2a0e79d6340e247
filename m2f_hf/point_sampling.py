"""Point sampling: masks are compared at random points instead of at every pixel (Mask2Former, section 3.3).

Two kinds of masks are sampled. Predictions are dense float maps on the grid of the mask features and carry gradients
(`sample_points`). Targets are binary maps on the grid of the padded input, of a size that may differ from image to
image, and are turned into floats a few at a time (`sample_masks`). Both kinds use the same convention: points are
(x, y) in [0, 1] of the map's width and height, pixel centres lie at half-integers, values are bilinear, and outside the
map everything is zero.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .chunking import pieces


_FLOATS_AT_ONCE = 1 << 22  # of masks that are sampled, 16 MB

DrawPoints = Callable[[str, int, Sequence[int], int, torch.device], Tensor]
"""Where random points come from: `draw(purpose, layer, images, num_points, device) -> (len(images), num_points, 2)`.

`purpose` is "matching" (one row per image), "candidates" (one row per matched mask, of which the most uncertain points
are kept) or "random" (one row per matched mask, kept as they are). `layer` counts the stacked outputs, 0 the raw
queries. `images` is the position in the batch of each row's image; the rows of one image follow each other, with the
query index ascending. Of clips, "image" means clip, and a matched mask has a row for each of its frames in turn. Being
told what a draw is for, and for which image, a replacement can replay recorded points, or make them independent of how
a batch is split over processes (`SeededPoints`).
"""


def draw_uniform_points(
    purpose: str, layer: int, images: Sequence[int], num_points: int, device: torch.device
) -> Tensor:
    """Uniform points in [0, 1] from the device's global random state: the default `DrawPoints`."""
    return torch.rand(len(images), num_points, 2, device=device)


class SeededPoints:
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

    def __call__(
        self, purpose: str, layer: int, images: Sequence[int], num_points: int, device: torch.device
    ) -> Tensor:
        rows = [torch.empty(0, num_points, 2)]
        for image in sorted(set(images)):
            generator = torch.Generator()
            key = (self.seed, self.purposes.index(purpose), layer, self.first_image + image)
            generator.manual_seed(hash(key) % 2**63)
            rows.append(torch.rand(images.count(image), num_points, 2, generator=generator))
        return torch.cat(rows).to(device, non_blocking=True)


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


def spread_to_maps(grad: Tensor, points: Tensor, shape: Sequence[int]) -> Tensor:
    """Gradient of `sample_points` to maps of the shape (N, C, H, W): (N, C, P), (N, P, 2) -> (N, C, H, W).

    Sampling is linear in the maps, so their values don't matter: a single zero stands for all of them, and whoever
    samples need not keep them.
    """
    grid = _grid(points)[:, :, None]
    nothing = grad.new_zeros(()).expand(shape)
    # Bilinear, zeros outside, corners not aligned; of the two gradients the first.
    return torch.ops.aten.grid_sampler_2d_backward(grad[..., None], nothing, grid, 0, 0, False, [True, False])[0]


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


def sample_masks(masks: Tensor, points: Tensor) -> Tensor:
    """`sample_points` for targets, each mask at its own points: (N, H, W) of any dtype, (N, P, 2) -> (N, P) float32."""
    sampled = [sample_points(part[:, None], of_part)[:, 0] for part, of_part in _in_floats(masks, points)]
    return torch.cat(sampled) if sampled else points.new_zeros(points.shape[:2])


def sample_masks_alike(masks: Tensor, points: Tensor) -> Tensor:
    """`sample_points` for targets, all at the same points: (N, H, W) of any dtype, (P, 2) -> (N, P) float32."""
    sampled = [sample_points(part[None], points[None])[0] for part, _ in _in_floats(masks, masks)]
    return torch.cat(sampled) if sampled else points.new_zeros(0, len(points))


def _in_floats(masks: Tensor, others: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """A few masks at a time as floats, with the others' rows: all of them would be four times the size of booleans."""
    numbers = _FLOATS_AT_ONCE if masks.device.type == "cpu" else 8 * _FLOATS_AT_ONCE
    step = max(1, numbers // max(1, masks[0].numel() if len(masks) else 1))
    for start in range(0, len(masks), step):
        part = masks[start : start + step]
        # As bytes booleans are converted six times as fast.
        yield (part.view(torch.uint8) if part.dtype == torch.bool else part).float(), others[start : start + step]


def select_uncertain_points(logits: Tensor, candidates: Tensor, random: Tensor, num_uncertain: int) -> Tensor:
    """The points at which the loss looks: the most uncertain of many candidates, and some random ones.

    Uncertain means a logit close to 0 (PointRend, section 3.1).

    Args:
        logits: (N, 1, H, W) mask logits.
        candidates: (N, R, 2) points, R >= `num_uncertain`.
        random: (N, S, 2) points.
        num_uncertain: How many of the candidates are kept.

    Returns:
        (N, num_uncertain + S, 2) points.
    """
    if logits.device.type != "cpu":
        certainty = sample_points(logits, candidates).squeeze(1).abs_()  # (N, R)
        # Their order does not matter, and most of the time would go into it.
        kept = certainty.topk(num_uncertain, dim=1, largest=False, sorted=False).indices
        return torch.cat([candidates.take_along_dim(kept[..., None], dim=1), random], dim=1)
    chosen = torch.empty(len(logits), num_uncertain + random.shape[1], 2)
    chosen[:, num_uncertain:] = random
    for part in pieces(len(logits) if num_uncertain else 0, candidates[0].numel() if len(logits) else 1):
        certainty = sample_points(logits[part], candidates[part]).squeeze(1).abs_()
        kept = torch.from_numpy(np.argpartition(certainty.numpy(), num_uncertain - 1, axis=1)[:, :num_uncertain])
        first = torch.arange(len(kept))[:, None] * candidates.shape[1]
        uncertain = candidates[part].flatten(0, 1).index_select(0, (first + kept).flatten())
        chosen[part, :num_uncertain] = uncertain.view(*kept.shape, 2)
    return chosen
