"""Point sampling: masks are compared at random points instead of at every pixel (Mask2Former, section 3.3).

Two kinds of masks are sampled. Predictions are dense float maps on the grid of the mask features and carry gradients
(`sample_points`). Targets are binary maps on the grid of the padded input, of a size that may differ from image to
image, and are never turned into floats as a whole (`PackedMasks`, `sample_masks`). Both kinds use the same convention:
points are (x, y) in [0, 1] of the map's width and height, pixel centres lie at half-integers, values are bilinear, and
outside the map everything is zero.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


DrawPoints = Callable[[str, int, Sequence[int], int, torch.device], Tensor]
"""Where random points come from: `draw(purpose, layer, images, num_points, device) -> (len(images), num_points, 2)`.

`purpose` is "matching" (one row per image), "candidates" (one row per matched mask, of which the most uncertain points
are kept) or "random" (one row per matched mask, kept as they are). `layer` counts the stacked outputs, 0 the raw
queries. `images` is the position in the batch of each row's image; the rows of one image follow each other, with the
query index ascending. Being told what a draw is for, and for which image, a replacement can replay recorded points, or
make them independent of how a batch is split over processes (`SeededPoints`).
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


class _SamplePoints(torch.autograd.Function):
    """Bilinear sampling that keeps no copy of the sampled maps for the backward pass.

    Sampling is linear in the maps, so its gradient needs the points and the maps' shape only, but `grid_sample` saves
    its input. For the ten outputs of the default decoder that would be ten times all matched masks at stride 4.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, points: Tensor) -> Tensor:
        ctx.save_for_backward(points)
        ctx.shape = features.shape
        return _grid_sample(features, points)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (points,) = ctx.saved_tensors
        with torch.enable_grad():
            # The values don't matter to a linear map's gradient: a single zero stands for all of them.
            features = grad.new_zeros(()).expand(ctx.shape).requires_grad_()
            sampled = _grid_sample(features, points)
        return torch.autograd.grad(sampled, features, grad)[0], None


def _grid_sample(features: Tensor, points: Tensor) -> Tensor:
    grid = 2 * points[:, :, None] - 1  # (N, P, 2) -> (N, P, 1, 2), [0, 1] -> [-1, 1]
    return F.grid_sample(features, grid, mode="bilinear", padding_mode="zeros", align_corners=False).squeeze(3)


def sample_points(features: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of feature maps at points, in float32.

    Args:
        features: (N, C, H, W), floating.
        points: (N, P, 2), x and y in [0, 1]. No gradient flows to them.

    Returns:
        (N, C, P) float32, differentiable once with respect to `features`.
    """
    return _SamplePoints.apply(features.float(), points.float())


class PointRows:
    """Feature maps laid out to be sampled at many points, all channels of a pixel together; without gradients.

    A bilinear sample is a weighted sum of four rows, one `embedding_bag`: on the CPU several times faster than
    `sample_points`, whose channels lie far apart.

    Args:
        features: (B, C, H, W), floating.
    """

    def __init__(self, features: Tensor) -> None:
        batch_size, _, height, width = features.shape
        # (B, C, H, W) -> (B, H+2, W+2, C) -> (B * (H+2) * (W+2), C), zeros all around
        bordered = F.pad(features.detach().float().permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
        self.rows = bordered.flatten(0, 2).contiguous()
        self.stride = width + 2
        size = torch.tensor([width, height]).to(features.device, non_blocking=True)  # (2,), x and y as in points
        self.size = size.expand(batch_size, 1, 2)
        self.first_row = torch.arange(batch_size, device=features.device)[:, None] * (height + 2) * self.stride

    def sample(self, points: Tensor) -> Tensor:
        """Bilinear values (B, P, C) float32 at points (B, P, 2), x and y in [0, 1]."""
        (column, line), (x_share, y_share) = (part.unbind(-1) for part in _lower_neighbour(points, self.size))
        top = self.first_row + line * self.stride + column
        corners = torch.stack([top, top + 1, top + self.stride, top + self.stride + 1], dim=-1)  # (B, P, 4)
        weights = (
            torch.stack([1 - y_share, y_share], dim=-1)[..., None]
            * torch.stack([1 - x_share, x_share], -1)[..., None, :]
        )
        # (B, P, 2, 2), rows as in `corners`
        sampled = F.embedding_bag(
            corners.flatten(0, 1), self.rows, mode="sum", per_sample_weights=weights.flatten(2).flatten(0, 1)
        )
        return sampled.view(*points.shape[:2], -1)


class PackedMasks(NamedTuple):
    """N masks of possibly different sizes in one flat tensor, so that all are sampled in one go.

    Attributes:
        values: All pixels, mask after mask, row-major, in the masks' own dtype, each mask inside a border of zeros one
            pixel wide: what lies outside is read like any pixel.
        offsets: (N,) int64, where in `values` each mask begins.
        heights, widths: (N,) int64, pixels, without the border.
    """

    values: Tensor
    offsets: Tensor
    heights: Tensor
    widths: Tensor


def pack_masks(masks: Sequence[Tensor], device: torch.device) -> PackedMasks:
    """Packs the masks of a batch, one (N_i, H_i, W_i) tensor per image, in order.

    Uploads don't block: the host would wait for all work queued on the device.
    """
    sizes = torch.tensor([tuple(image.shape[1:]) for image in masks for _ in range(len(image))], dtype=torch.int64)
    sizes = sizes.reshape(-1, 2)  # without any mask, too
    areas = (sizes + 2).prod(1)
    offsets, heights, widths = torch.stack([areas.cumsum(0) - areas, *sizes.T]).to(device, non_blocking=True)
    values = torch.cat([F.pad(image.to(device, non_blocking=True), (1, 1, 1, 1)).flatten() for image in masks])
    return PackedMasks(values, offsets, heights, widths)


def sample_masks(masks: PackedMasks, rows: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of packed masks at points: `sample_points` for targets.

    Args:
        masks: The masks.
        rows: (M,) int64, which mask each row of points is for.
        points: (M, P, 2), x and y in [0, 1].

    Returns:
        (M, P) float32.
    """
    heights, widths = masks.heights[rows, None], masks.widths[rows, None]  # (M, 1)
    column, x_share = _lower_neighbour(points[..., 0], widths)
    line, y_share = _lower_neighbour(points[..., 1], heights)
    stride = widths + 2
    top = masks.offsets[rows, None] + line * stride + column

    def read(position: Tensor) -> Tensor:
        return masks.values.index_select(0, position.flatten()).view(position.shape).float()

    upper = torch.lerp(read(top), read(top + 1), x_share)
    bottom = top + stride
    return upper.lerp_(torch.lerp(read(bottom), read(bottom + 1), x_share), y_share)


def _lower_neighbour(location: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """In a map with a border of one pixel: the pixel at or below each location (in [0, 1]), and the share of the next.

    Locations outside are moved into the border. `size` is without it, and broadcasts with `location`.
    """
    position = (location.float() * size + 0.5).clamp(min=0).minimum(size + 1)
    lower = position.long().minimum(size)
    return lower, position - lower


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
    certainty = sample_points(logits, candidates).squeeze(1).abs()  # (N, R)
    # Their order does not matter, and half of the time would go into it.
    kept = certainty.topk(num_uncertain, dim=1, largest=False, sorted=False).indices
    first = torch.arange(len(kept), device=kept.device)[:, None] * candidates.shape[1]
    uncertain = candidates.flatten(0, 1).index_select(0, (first + kept).flatten())
    return torch.cat([uncertain.view(*kept.shape, 2), random], dim=1)
