"""Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159, equation 3), in plain PyTorch.

Bilinear sampling times attention weight is a weighted sum of rows of the value table: levels x points x 4 corners rows
for every query and head. On the CPU that sum is one `embedding_bag`, on GPUs a Triton kernel; the text below serves
where neither does, and is what `torch.export` sees.
"""

import torch
from torch import Tensor, nn

from .fast_path import fast_path
from .gather_deformable_attention import gather_attention
from .operator_registration import check_positions
from .triton_deformable_attention import triton_attention


@fast_path(triton_attention, gather_attention)
def multi_scale_deformable_attention(
    value: Tensor,
    spatial_shapes: list[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Return weighted sums of bilinearly sampled values; locations outside a level read zeros.

    Args:
        value: (B, S, M, D), the levels' maps flattened row by row and concatenated; S = sum of height x width.
        spatial_shapes: (height, width) of each of the L levels.
        sampling_locations: (B, Q, M, L, P, 2) as (x, y), [0, 1] spanning a level from edge to edge.
        attention_weights: (B, Q, M, L, P).

    Returns:
        (B, Q, M * D) in the dtype of `value`.

    Raises:
        ValueError: the levels do not have S positions together.
    """
    check_positions(value, spatial_shapes)
    batch, _, heads, head_width = value.shape
    queries, levels, points = sampling_locations.shape[1], *sampling_locations.shape[3:5]
    dtype = torch.promote_types(value.dtype, torch.float32)  # in bfloat16 a coordinate is off by a tenth of a pixel
    grids = (2 * sampling_locations - 1).to(dtype)
    sampled = []
    start = 0
    for level, (height, width) in enumerate(spatial_shapes):
        # (B, H*W, M, D) -> (B*M, D, H, W)
        level_value = (
            value[:, start : start + height * width].permute(0, 2, 3, 1).reshape(-1, head_width, height, width)
        ).to(dtype)
        # (B, Q, M, P, 2) -> (B*M, Q, P, 2)
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)
        sampled.append(
            nn.functional.grid_sample(level_value, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        )
        start += height * width
    # (B, Q, M, L, P) -> (B*M, 1, Q, L*P)
    weights = attention_weights.transpose(1, 2).reshape(batch * heads, 1, queries, levels * points).to(dtype)
    # L x (B*M, D, Q, P) -> (B*M, D, Q, L*P), summed over the last
    output = (torch.cat(sampled, dim=-1) * weights).sum(-1).to(value.dtype)
    return output.view(batch, heads * head_width, queries).transpose(1, 2)


grid_sample_deformable_attention = multi_scale_deformable_attention.__wrapped__  # type: ignore[attr-defined]
