"""Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159, equation 3): reference form and CPU form.

Bilinear sampling times attention weight is a weighted sum of rows of the value table: levels x points x 4 corners rows
for every query and head. On the CPU that sum is one `embedding_bag`, in chunks that stay in the cache; on GPUs it is a
Triton kernel, in a file of its own. The readable `grid_sample` form says the same, serves where neither does, and is
what `torch.export` sees. The environment variable `M2F_HF_DEFORMABLE_ATTENTION`, read on import, makes a form serve
everywhere else.
"""

import os

import torch
from torch import Tensor, nn

from .operator_registration import empty_gradients, free_name, register_deformable_attention
from .triton_deformable_attention import IS_AVAILABLE, serves, triton_deformable_attention, works_on_gpu


_VARIABLE = "M2F_HF_DEFORMABLE_ATTENTION"
_FORMS = ("auto", "triton", "gather", "grid_sample")
_FORM = os.environ.get(_VARIABLE) or "auto"
if _FORM not in _FORMS:
    raise ValueError(f"The environment variable {_VARIABLE}={_FORM!r} must be one of {', '.join(_FORMS)}.")

# Heads of this width gather. Narrower ones do where their maps, positions x width, hold this many numbers or more: in
# smaller maps `grid_sample` finds its reads in the cache, while the gather has a fixed cost for every row, and its
# backward pass sorts them.
_GATHER_FROM_WIDTH = 32
_GATHER_FROM_SIZE = 1 << 14
_GATHER_FROM_SIZE_WITH_GRADIENTS = 1 << 16

# Rows of (index, weight) handled at once; at 8 bytes a row this stays inside a core's second-level cache.
_ROWS_PER_CHUNK = 1 << 17


def multi_scale_deformable_attention(
    value: Tensor,
    spatial_shapes: list[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Weighted sum of bilinearly sampled values; locations outside a level read zeros.

    Args:
        value: (B, S, M, D), the levels' maps flattened row by row and concatenated; S = sum of height x width.
        spatial_shapes: (height, width) of each of the L levels.
        sampling_locations: (B, Q, M, L, P, 2) as (x, y), [0, 1] spanning a level from edge to edge.
        attention_weights: (B, Q, M, L, P).

    Returns:
        (B, Q, M * D) in the dtype of `value`.

    Raises:
        ValueError: the shapes do not agree, or the form that `M2F_HF_DEFORMABLE_ATTENTION` asks for doesn't serve the
            device of `value`.
    """
    if sum(height * width for height, width in spatial_shapes) != value.shape[1]:
        raise ValueError(
            f"`spatial_shapes` {list(spatial_shapes)} have {sum(h * w for h, w in spatial_shapes)} positions together, "
            f"but `value` has {value.shape[1]}."
        )
    form = _form_for(value)
    if form == "grid_sample":
        return grid_sample_deformable_attention(value, spatial_shapes, sampling_locations, attention_weights)
    sizes = [side for shape in spatial_shapes for side in shape]
    operator = triton_deformable_attention if form == "triton" else _gather_deformable_attention
    return operator(value, sizes, sampling_locations, attention_weights)


def _form_for(value: Tensor) -> str:
    """The form that the environment asks for, or else the fastest: the names of `_FORMS`."""
    if torch.compiler.is_exporting():
        return "grid_sample"
    if _FORM == "auto":
        if value.device.type == "cuda" and works_on_gpu(value.device.index):
            return "triton"
        return "gather" if _gathers(value) else "grid_sample"
    if _FORM == "triton" and not serves(value.device):
        needs = "a GPU" if IS_AVAILABLE else "Triton, which is not installed"
        raise ValueError(f"{_VARIABLE}=triton needs {needs}, but `value` is on {value.device.type!r}.")
    if _FORM == "gather" and value.device.type != "cpu":
        raise ValueError(f"{_VARIABLE}=gather needs a CPU, but `value` is on {value.device.type!r}.")
    return _FORM


def _gathers(value: Tensor) -> bool:
    """Whether the gather form serves this device and is the faster one for these maps."""
    if value.device.type != "cpu":
        return False
    _, positions, _, width = value.shape
    has_gradients = torch.is_grad_enabled() and value.requires_grad
    least = _GATHER_FROM_SIZE_WITH_GRADIENTS if has_gradients else _GATHER_FROM_SIZE
    return width >= _GATHER_FROM_WIDTH or positions * width >= least


def grid_sample_deformable_attention(
    value: Tensor,
    spatial_shapes: list[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """The reference form of [`multi_scale_deformable_attention`], same arguments and result, level by level."""
    batch, _, heads, width_of_head = value.shape
    queries, levels, points = sampling_locations.shape[1], *sampling_locations.shape[3:5]
    dtype = _working_dtype(value)
    grids = (2 * sampling_locations - 1).to(dtype)
    sampled = []
    start = 0
    for level, (height, width) in enumerate(spatial_shapes):
        # (B, H*W, M, D) -> (B*M, D, H, W)
        level_value = (
            value[:, start : start + height * width].permute(0, 2, 3, 1).reshape(-1, width_of_head, height, width)
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
    return output.view(batch, heads * width_of_head, queries).transpose(1, 2)


def _row_tables(value: Tensor, sizes: list[int]) -> Tensor:
    """Each head's levels as rows, every map inside a border of zeros: (S, M, D) -> (M, R, D).

    The border makes a bounds test needless: a corner outside a map is a row of zeros.
    """
    heads, width_of_head = value.shape[1:]
    tables = []
    start = 0
    for height, width in zip(sizes[::2], sizes[1::2], strict=True):
        level = value[start : start + height * width].view(height, width, heads, width_of_head)
        tables.append(nn.functional.pad(level, (0, 0, 0, 0, 1, 1, 1, 1)).flatten(0, 1))
        start += height * width
    return torch.cat(tables).transpose(0, 1).contiguous()


def _values_of_row_tables(tables: Tensor, sizes: list[int]) -> Tensor:
    """Inverse of [`_row_tables`], the borders dropped: (M, R, D) -> (S, M, D)."""
    levels = []
    start = 0
    for height, width in zip(sizes[::2], sizes[1::2], strict=True):
        rows = (height + 2) * (width + 2)
        level = tables[:, start : start + rows].unflatten(1, (height + 2, width + 2))[:, 1:-1, 1:-1]
        levels.append(level.flatten(1, 2))
        start += rows
    return torch.cat(levels, dim=1).transpose(0, 1)


class _Corners:
    """Rows of the table and bilinear shares of the four corners of every sampling location of one head.

    Coordinates are clamped to the zero border, and the rows once more after rounding, so that a location which is not a
    number gives an output that is not a number and no stray read.

    Args:
        locations: (N, L, P, 2) as (x, y) in [0, 1].
        sizes: height and width of each level, in turn.
    """

    def __init__(self, locations: Tensor, sizes: list[int]) -> None:
        queries, _, points, _ = locations.shape
        heights, widths = torch.tensor(sizes, dtype=torch.int32).view(-1, 2).unbind(-1)  # (L,) each
        rows = (heights + 2) * (widths + 2)
        # Written out for each sample: elementwise kernels are several times slower where they must broadcast.
        spread = [
            constant.repeat_interleave(points).repeat(queries, 1)  # (N, L*P)
            for constant in (widths, heights, widths + 2, rows.cumsum(0, dtype=torch.int32) - rows)
        ]
        self.width, self.height, stride, start = spread
        self.x, column, self.x_share = self._neighbours(locations[..., 0], self.width)
        self.y, line, self.y_share = self._neighbours(locations[..., 1], self.height)
        top = line.mul_(stride).add_(column).add_(start)
        bottom = top + stride
        self.rows = torch.stack([top, top + 1, bottom, bottom + 1], dim=-1).flatten(1)  # (N, L*P*4)

    @staticmethod
    def _neighbours(location: Tensor, length: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Coordinate in the bordered map, index of the lower neighbour there, share of the upper: (N, L*P) each."""
        coordinate = location.flatten(1).mul(length).add_(0.5)
        clamped = coordinate.clamp(min=0).minimum(length + 1)
        lower = clamped.to(torch.int32).clamp_(min=0).minimum(length)
        return coordinate, lower, clamped.sub_(lower)

    def weights(self, attention_weights: Tensor) -> Tensor:
        """Attention weight times bilinear share: (N, L, P) -> (N, L*P*4), in the order of `rows`."""
        attention_weights = attention_weights.flatten(1)
        bottom = attention_weights * self.y_share
        top = attention_weights - bottom
        top_right, bottom_right = top * self.x_share, bottom * self.x_share
        return torch.stack([top.sub_(top_right), top_right, bottom.sub_(bottom_right), bottom_right], -1).flatten(1)

    def gradients(self, corner_grad: Tensor, attention_weights: Tensor) -> tuple[Tensor, Tensor]:
        """Of `weights`: (N, L*P*4), (N, L, P) -> gradients of the locations (N, L, P, 2) and weights (N, L, P)."""
        top_left, top_right, bottom_left, bottom_right = corner_grad.unflatten(1, (-1, 4)).unbind(-1)  # (N, L*P) each
        top_slope, bottom_slope = top_right - top_left, bottom_right - bottom_left
        top = torch.addcmul(top_left, self.x_share, top_slope)
        y_slope = torch.addcmul(bottom_left, self.x_share, bottom_slope).sub_(top)
        x_slope = torch.addcmul(top_slope, self.y_share, bottom_slope - top_slope)
        location_grad = torch.stack(
            [
                x_slope * self.width * ((self.x > 0) & (self.x < self.width + 1)),
                y_slope * self.height * ((self.y > 0) & (self.y < self.height + 1)),
            ],
            dim=-1,
        )
        shape = attention_weights.shape
        location_grad = location_grad.view(*shape, 2) * attention_weights[..., None]
        return location_grad, torch.addcmul(top, self.y_share, y_slope).view(shape)


def _working_dtype(value: Tensor) -> torch.dtype:
    # Rounded to bfloat16, a coordinate is off by up to a tenth of a pixel in a map of 100; besides, `embedding_bag` is
    # slower in it and refuses mixtures.
    return torch.promote_types(value.dtype, torch.float32)


@torch.library.custom_op(free_name("gather_deformable_attention"), mutates_args=(), device_types="cpu")
def _gather_deformable_attention(
    value: Tensor, sizes: list[int], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    dtype = _working_dtype(value)
    batch, queries, heads, levels, points = attention_weights.shape
    output = value.new_empty(batch, queries, heads, value.shape[-1])
    chunk = max(1, _ROWS_PER_CHUNK // (4 * levels * points))
    for image in range(batch):
        tables = _row_tables(value[image].to(dtype), sizes)
        for head in range(heads):
            for start in range(0, queries, chunk):
                part = (image, slice(start, start + chunk), head)
                corners = _Corners(sampling_locations[part].to(dtype), sizes)
                weights = corners.weights(attention_weights[part].to(dtype))
                output[part] = nn.functional.embedding_bag(
                    corners.rows, tables[head], mode="sum", per_sample_weights=weights
                )
    return output.flatten(2)


@torch.library.custom_op(free_name("gather_deformable_attention_backward"), mutates_args=(), device_types="cpu")
def _gather_deformable_attention_backward(
    grad: Tensor, value: Tensor, sizes: list[int], sampling_locations: Tensor, attention_weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and weights are computed again, so nothing of size queries x 48 is kept between the passes.

    The table's gradient is the transposed gather: the same pairs sorted by row instead of by query, with the output's
    gradient as the table. That is several times faster than scattering.
    """
    dtype = _working_dtype(value)
    value_grad, location_grad, weight_grad = empty_gradients(value, sampling_locations, attention_weights)
    heads = attention_weights.shape[2]
    grad = grad.unflatten(2, (heads, -1)).to(dtype)
    for image in range(len(value)):
        tables = _row_tables(value[image].to(dtype), sizes)
        table_grads = torch.empty_like(tables)
        every_row = torch.arange(tables.shape[1], dtype=torch.int32, device=value.device)
        for head in range(heads):
            part = (image, slice(None), head)
            part_weights, part_grad = attention_weights[part].to(dtype), grad[part].contiguous()
            corners = _Corners(sampling_locations[part].to(dtype), sizes)
            pairs = corners.rows.shape[1]  # rows for each query

            sorted_rows, order = corners.rows.flatten().sort()
            table_grads[head] = nn.functional.embedding_bag(
                (order // pairs).to(torch.int32),
                part_grad,
                torch.bucketize(every_row, sorted_rows, out_int32=True),
                mode="sum",
                per_sample_weights=corners.weights(part_weights).flatten()[order],
            )
            queries = torch.arange(len(part_grad), dtype=torch.int32, device=value.device)
            corner_grad = torch.ops.aten._embedding_bag_per_sample_weights_backward(
                part_grad, tables[head], corners.rows.flatten(), queries * pairs, queries.repeat_interleave(pairs), 0
            )
            location_grad[part], weight_grad[part] = corners.gradients(corner_grad.view(-1, pairs), part_weights)
        value_grad[image] = _values_of_row_tables(table_grads, sizes)
    return value_grad, location_grad, weight_grad


register_deformable_attention(_gather_deformable_attention, _gather_deformable_attention_backward)
