"""Point sampling: masks are compared at random points instead of at every pixel (Mask2Former, section 3.3).

Predicted masks are dense float maps on the grid of the mask features. Targets are binary maps on the grid of the padded
input, of a size that may differ from image to image, and become floats a few at a time (`float_chunks`). Points of both
are (x, y) in [0, 1] of the map's width and height, pixel centres are at half-integers, values are bilinear, and outside
the map everything is zero.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


_FLOATS_AT_ONCE = 1 << 21  # of target masks that are sampled, 8 MB

DrawPoints = Callable[[str, int, Sequence[int], int, torch.device], Tensor]
"""Source of random points: `draw(purpose, layer, images, num_points, device) -> (len(images), num_points, 2)`.

`purpose` is "matching" (one row per image), "candidates" (one row per matched mask, of which the most uncertain points
are kept) or "random" (one row per matched mask, all kept). `layer` counts the stacked outputs, 0 the raw queries.
`images` is the position in the batch of each row's image; the rows of one image follow each other, with the query index
ascending. Of clips, "image" means clip, and a matched mask has a row for each of its frames in turn. These arguments
let a replacement replay recorded points, or draw points that do not depend on how a batch is split over processes
(`SeededPoints`).
"""


def draw_uniform_points(
    purpose: str, layer: int, images: Sequence[int], num_points: int, device: torch.device
) -> Tensor:
    """Draw float32 points from the device's global random state: the default `DrawPoints`."""
    return torch.rand(len(images), num_points, 2, device=device, dtype=torch.float32)


class SeededPoints:
    """A `DrawPoints` whose points depend only on the seed and on an image's place in the global batch.

    Two processes with half a batch each draw the same points as one process with the whole batch. Points are drawn on
    the CPU, the same for every device.

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
        generator = torch.Generator("cpu")
        points = torch.empty(len(images), num_points, 2, device="cpu", dtype=torch.float32)
        start = 0
        for image in sorted(set(images)):
            key = (self.seed, self.purposes.index(purpose), layer, self.first_image + image)
            stop = start + images.count(image)
            points[start:stop].uniform_(generator=generator.manual_seed(hash(key) % 2**63))
            start = stop
        return points.to(device, non_blocking=True)


def draw_checked(
    draw: DrawPoints, purpose: str, layer: int, images: Sequence[int], num_points: int, device: torch.device
) -> Tensor:
    """Return the points that `draw` gives: (len(images), num_points, 2).

    Raises:
        ValueError: If their shape is another.
    """
    points = draw(purpose, layer, images, num_points, device)
    if points.shape != (len(images), num_points, 2):
        raise ValueError(
            f"`draw_points` gave {purpose!r} points of the shape {tuple(points.shape)}, expected "
            f"({len(images)}, {num_points}, 2): for each mask as many as requested."
        )
    return points


def sample_points(features: Tensor, points: Tensor) -> Tensor:
    """Sample feature maps at points, bilinearly and in float32.

    Args:
        features: (N, C, H, W), floating. Many channels are sampled several times faster with channels last.
        points: (N, P, 2), x and y in [0, 1].

    Returns:
        (N, C, P) float32.
    """
    sampled = F.grid_sample(
        features.float(), _grid(points.float()), mode="bilinear", padding_mode="zeros", align_corners=False
    )
    return sampled.squeeze(3)


def scatter_to_maps(grad: Tensor, points: Tensor, size: Sequence[int]) -> Tensor:
    """Return the gradient of `sample_points` for maps with a single channel: (N, P), (N, P, 2) -> (N, H, W).

    Sampling is linear in the maps, so their values don't matter: a single zero stands for all of them, and the maps
    need not be kept.
    """
    zeros = grad.new_zeros(()).expand(len(grad), 1, *size)
    # Bilinear, zeros outside, corners not aligned; of the two gradients the first.
    settings = (0, 0, False, [True, False])
    maps, _ = torch.ops.aten.grid_sampler_2d_backward(grad[:, None, :, None], zeros, _grid(points), *settings)
    return maps[:, 0]


def _grid(points: Tensor) -> Tensor:
    """(N, P, 2) in [0, 1] -> (N, P, 1, 2) in [-1, 1], as `grid_sample` takes them."""
    return points.mul(2).sub_(1)[:, :, None]


def float_chunks(masks: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield a few of the masks at a time as floats: (N, H, W) -> slice of N, (n, H, W).

    All at once would take four times the memory of booleans.
    """
    numbers = _FLOATS_AT_ONCE if masks.device.type == "cpu" else 16 * _FLOATS_AT_ONCE
    step = max(1, numbers // max(1, masks.shape[1:].numel()))
    for start in range(0, len(masks), step):
        chunk = slice(start, min(start + step, len(masks)))
        yield chunk, masks[chunk].float()


def uncertain_points(logits: Tensor, candidates: Tensor, num_points: int) -> Tensor:
    """Choose the candidates where masks are the least certain: a logit close to 0 (PointRend, section 3.1).

    Args:
        logits: (N, 1, H, W) mask logits.
        candidates: (N, R, 2) points, R >= `num_points`.
        num_points: How many of a mask's candidates are kept.

    Returns:
        (N, num_points, 2) points, in no particular order.
    """
    certainty = sample_points(logits, candidates).squeeze(1).abs_()  # (N, R)
    kept = certainty.topk(num_points, dim=1, largest=False, sorted=False).indices
    return candidates.take_along_dim(kept[..., None], dim=1)
