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


class PackedMasks(NamedTuple):
    """N masks of possibly different sizes in one flat tensor, so that all are sampled in one go.

    Attributes:
        values: All pixels, mask after mask, row-major, in the masks' own dtype.
        offsets: (N,) int64, where in `values` each mask begins.
        heights, widths: (N,) int64, pixels.
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
    areas = sizes.prod(1)
    offsets, heights, widths = torch.stack([areas.cumsum(0) - areas, *sizes.T]).to(device, non_blocking=True)
    values = torch.cat([image.to(device, non_blocking=True).flatten() for image in masks])
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
    offsets, heights, widths = masks.offsets[rows, None], masks.heights[rows, None], masks.widths[rows, None]
    columns = _neighbours(points[..., 0].float() * widths - 0.5, widths)
    lines = _neighbours(points[..., 1].float() * heights - 0.5, heights)
    sampled = points.new_zeros(points.shape[:2], dtype=torch.float32)
    for line, line_weight in lines:
        start = offsets + line * widths
        for column, column_weight in columns:
            sampled += line_weight * column_weight * masks.values[start + column]
    return sampled


def _neighbours(position: Tensor, size: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The two pixels on either side of each position along one axis, and their weights, 0 where there is no pixel."""
    low = position.floor()
    pairs = ((low, low + 1 - position), (low + 1, position - low))
    is_inside = [(pixel >= 0) & (pixel < size) for pixel, _ in pairs]
    return [(pixel.where(ok, 0).long(), weight * ok) for (pixel, weight), ok in zip(pairs, is_inside, strict=True)]


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
    uncertainty = -sample_points(logits, candidates).squeeze(1).abs()  # (N, R)
    kept = uncertainty.topk(num_uncertain, dim=1).indices
    return torch.cat([candidates.take_along_dim(kept[..., None], dim=1), random], dim=1)
