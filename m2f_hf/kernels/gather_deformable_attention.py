"""Multi-scale deformable attention as weighted gathers, for CPUs.

The attention is a weighted sum of rows, one `embedding_bag`, here in chunks that stay in the cache; the backward pass
is made of the same parts.
"""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .chunks import chunks
from .fast_path import Kernel
from .operator_registration import check_shapes, empty_gradients, free_name, register_deformable_attention


try:
    from scipy.sparse import csr_array
except ImportError:  # sorting does as well
    csr_array = None


# Heads of this width gather. With gradients, narrower ones do where their maps, positions x width, hold this many
# numbers or more: in smaller maps `grid_sample` finds its reads in the cache, while a gathered row has a fixed cost.
_LEAST_WIDTH = 16
_LEAST_SIZE_WITH_GRADIENTS = 1 << 13


class GatherTable:
    """The value maps of some images as rows of one table, each map inside a border of zeros one position wide.

    With the border no bounds test is needed: a corner outside a map is a row of zeros. A position's heads are
    neighbouring rows, as in the maps.

    Coordinates are in positions of the bordered map, (x, y): the middle of a map's first position is (1, 1). They are
    clamped to the border, and again after rounding, so that a NaN gives NaN and no read out of bounds.

    Args:
        value: (B, S, M, D), the levels' maps flattened row by row and concatenated, in the dtype to compute in.
        spatial_shapes: (height, width) of each level.
        num_points: samples that a head takes of each level.
    """

    def __init__(self, value: Tensor, spatial_shapes: list[tuple[int, int]], num_points: int) -> None:
        batch, _, heads, self.head_width = value.shape
        self.spatial_shapes, self.num_heads = spatial_shapes, heads
        bordered_shapes = [(height + 2, width + 2) for height, width in spatial_shapes]
        areas = [height * width for height, width in bordered_shapes]
        table = value.new_empty(batch, sum(areas), heads * self.head_width)
        for bordered, level in zip(
            split_levels(table, bordered_shapes), split_levels(value.flatten(2), spatial_shapes), strict=True
        ):
            bordered[:, 1:-1, 1:-1] = level
            bordered[:, [0, -1]] = 0
            bordered[:, :, [0, -1]] = 0
        self.bordered_shapes, self.rows_of_image = bordered_shapes, sum(areas) * heads
        self.rows = table.view(-1, self.head_width)  # (B * R * M, D)

        # For each sample of a query, (M * L * P,) and twice as many: elementwise kernels are several times slower where
        # they must broadcast short rows.
        sizes = torch.tensor(spatial_shapes, dtype=torch.int32)  # (L, 2)
        strides = (sizes[:, 1] + 2) * heads
        starts = (torch.tensor(areas).cumsum(0).int() - torch.tensor(areas, dtype=torch.int32)) * heads
        spread = lambda levels: levels.repeat_interleave(num_points, 0).repeat(heads, *(1,) * (levels.dim() - 1))
        self.limits = spread(sizes.flip(1)).flatten()  # of the lower neighbour, as x and y in turn
        self.map_sizes = self.limits.to(value.dtype)  # width and height in turn
        self.ends = self.map_sizes + 1  # of the coordinate itself
        self.strides = spread(strides)
        self.firsts = spread(starts) + torch.arange(heads, dtype=torch.int32).repeat_interleave(len(sizes) * num_points)
        nothing = torch.zeros_like(self.strides)
        corners = torch.stack([nothing, nothing + heads, self.strides, self.strides + heads])
        self.corners = corners.unflatten(1, (heads, -1)).transpose(0, 1).contiguous()  # (M, 4, L * P)

    def coordinates(self, locations: Tensor) -> Tensor:
        """Convert (n, M * L * P * 2) from [0, 1] of a map to positions of the bordered map."""
        return torch.addcmul(locations.new_tensor(0.5), locations, self.map_sizes)

    def locate(self, coordinates: Tensor, images: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return, for each sample, the row of its top left neighbour, int32, and the shares of the right and the lower
        one: coordinates (n, M * L * P * 2), each query's image (n,) int32 or None -> (n, M, L * P) each."""
        clamped = coordinates.clamp(torch.zeros_like(self.ends), self.ends)
        lower = clamped.to(torch.int32).clamp_(torch.zeros_like(self.limits), self.limits)
        x_share, y_share = clamped.sub_(lower).view(len(coordinates), self.num_heads, -1, 2).unbind(-1)
        column, line = lower.unflatten(1, (-1, 2)).unbind(-1)
        top = (line * self.strides).add_(column, alpha=self.num_heads).add_(self.firsts)
        if images is not None:
            top.add_(images[:, None], alpha=self.rows_of_image)
        return top.view(x_share.shape), x_share, y_share

    def corner_rows(self, top: Tensor) -> Tensor:
        """Return the rows of a sample's top left, top right, bottom left and bottom right neighbour: (n, M, L * P) ->
        (n * M, 4 * L * P)."""
        return (top[:, :, None] + self.corners).flatten(2).flatten(0, 1)

    @staticmethod
    def corner_weights(weights: Tensor, x_share: Tensor, y_share: Tensor) -> Tensor:
        """Multiply weights and bilinear shares, corners as in `corner_rows`: (n, M, L * P) each -> (n, M, 4, L * P)."""
        output = weights.new_empty(*weights.shape[:2], 4, weights.shape[2])
        top_left, top_right, bottom_left, bottom_right = output.unbind(2)
        torch.mul(weights, y_share, out=bottom_left)
        torch.sub(weights, bottom_left, out=top_left)
        torch.mul(top_left, x_share, out=top_right)
        top_left.sub_(top_right)
        torch.mul(bottom_left, x_share, out=bottom_right)
        bottom_left.sub_(bottom_right)
        return output

    def attend(self, coordinates: Tensor, weights: Tensor, images: Tensor | None = None) -> Tensor:
        """Sum weighted bilinear samples: (n, M * L * P * 2), (n, M, L * P), (n,) as in `locate` -> (n, M * D)."""
        top, x_share, y_share = self.locate(coordinates, images)
        bags = nn.functional.embedding_bag(
            self.corner_rows(top),
            self.rows,
            mode="sum",
            per_sample_weights=self.corner_weights(weights, x_share, y_share).flatten(2).flatten(0, 1),
        )
        return bags.view(len(weights), -1)

    def sample_gradients(
        self, grad: Tensor, coordinates: Tensor, weights: Tensor, located: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of coordinates and weights in `attend`.

        Args:
            grad: of its output, (n, M, D).
            coordinates, weights: its arguments.
            located: what `locate` returned for them.
        """
        top, x_share, y_share = located
        # Product of the output's gradient and the row at each corner, (n, M, 4, L * P).
        products = sampled_products(grad.reshape(-1, self.head_width), self.rows, self.corner_rows(top))
        top_left, top_right, bottom_left, bottom_right = products.view(*weights.shape[:2], 4, -1).unbind(2)
        top_slope, bottom_slope = top_right - top_left, bottom_right - bottom_left
        upper = torch.addcmul(top_left, x_share, top_slope)
        y_slope = torch.addcmul(bottom_left, x_share, bottom_slope).sub_(upper)
        x_slope = torch.addcmul(top_slope, y_share, bottom_slope - top_slope)
        weight_grad = torch.addcmul(upper, y_share, y_slope)
        # Beyond the border nothing changes with the coordinate.
        moves = (coordinates > 0) & (coordinates < self.ends)
        slopes = torch.stack([x_slope * weights, y_slope * weights], dim=-1)
        return slopes.view(coordinates.shape).mul_(moves), weight_grad

    def value_gradient(self, grad: Tensor, weights: Tensor, located: Sequence[Tensor]) -> Tensor:
        """Return the gradient of the values in `attend`, (B, S, M * D), from arguments as in `sample_gradients` for all
        queries of all images.

        It is the transposed gather: the same pairs of query and row, sorted by row instead of by query, with the
        output's gradient as the table. That is several times faster than scattering. A sample's four corners are at
        fixed distances, so samples are sorted once, and each corner's sums are shifted afterwards.
        """
        top, x_share, y_share = located
        order, queries, starts = in_order_of_rows(top.flatten(0, 1), len(self.rows))
        corner_weights = self.corner_weights(weights, x_share, y_share)
        batch = len(self.rows) // self.rows_of_image
        positions = sum(height * width for height, width in self.spatial_shapes)
        value_grad = grad.new_zeros(batch, positions, grad[0].numel())
        for corner, (down, right) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
            table_grad = nn.functional.embedding_bag(
                queries,
                grad.reshape(-1, self.head_width),
                starts,
                mode="sum",
                per_sample_weights=corner_weights[:, :, corner].flatten().index_select(0, order),
                include_last_offset=True,
            )
            bordered_levels = split_levels(table_grad.view(batch, -1, grad[0].numel()), self.bordered_shapes)
            for level, bordered in zip(split_levels(value_grad, self.spatial_shapes), bordered_levels, strict=True):
                _, height, width, _ = level.shape
                level += bordered[:, 1 - down : height + 1 - down, 1 - right : width + 1 - right]
        return value_grad


def split_levels(maps: Tensor, spatial_shapes: list[tuple[int, int]]) -> list[Tensor]:
    """(B, S, C) -> each level's (B, height, width, C)."""
    levels = maps.split([height * width for height, width in spatial_shapes], dim=1)
    return [level.unflatten(1, shape) for level, shape in zip(levels, spatial_shapes, strict=True)]


def sampled_products(vectors: Tensor, table: Tensor, rows: Tensor) -> Tensor:
    """Multiply each vector by K rows of a table: (N, D), (R, D), which rows (N, K) int32 -> (N, K)."""
    starts = torch.arange(0, rows.numel() + 1, rows.shape[1], dtype=rows.dtype)
    with warnings.catch_warnings():
        # The layout is marked as beta; it is three times as fast as any other way.
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
        wanted = torch.sparse_csr_tensor(
            starts, rows.flatten(), vectors.new_zeros(rows.numel()), (len(vectors), len(table)), check_invariants=False
        )
        return torch.sparse.sampled_addmm(wanted, vectors, table.t(), beta=0.0).values().view(rows.shape)


def in_order_of_rows(top: Tensor, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort samples by the row that they read: (N, K) int32, the row of each query's samples, in [0, R).

    Returns:
        Indices of the samples in `top.flatten()` and their queries, (N * K,) each; where each row's samples start,
        (R + 1,), the last being N * K.
    """
    num_queries, samples = top.shape
    if csr_array is None:
        sorted_rows, order = top.flatten().sort()
        starts = torch.searchsorted(sorted_rows, torch.arange(num_rows + 1, dtype=torch.int32), out_int32=True)
        return order, order.div(samples, rounding_mode="floor").int(), starts
    # Transposing a sparse matrix counts instead of comparing, which takes a third of the time.
    places = np.arange(top.numel(), dtype=np.int32)
    first = np.arange(0, top.numel() + 1, samples, dtype=np.int32)
    by_row = csr_array((places, top.flatten().numpy(), first), shape=(num_queries, num_rows)).tocsc()
    order, queries, starts = (torch.from_numpy(of) for of in (by_row.data, by_row.indices, by_row.indptr))
    return order, queries, starts


def working_dtype(value: Tensor) -> torch.dtype:
    """Return the dtype to compute in: `embedding_bag` is slower in bfloat16, and coordinates would be too coarse."""
    return torch.promote_types(value.dtype, torch.float32)


class _Images(NamedTuple):
    """Some images of a batch, their queries as rows one after another.

    Args:
        part: which images.
        table: their values.
        locations: (n, M * L * P * 2), as the operator takes them.
        weights: (n, M, L * P), in the dtype to compute in.
        image_of_query: (n,) int32, None for a single image.
    """

    part: slice
    table: GatherTable
    locations: Tensor
    weights: Tensor
    image_of_query: Tensor | None

    @classmethod
    def split(cls, value: Tensor, sizes: list[int], locations: Tensor, weights: Tensor) -> Iterator["_Images"]:
        """Cut a batch, the arguments of the operator, into groups of images that fit the cache."""
        check_shapes(value, sizes, locations, weights)
        dtype = working_dtype(value)
        shapes = list(zip(sizes[::2], sizes[1::2], strict=True))
        batch, queries, heads, _, points = weights.shape
        for part in chunks(batch, max(value.shape[1:].numel(), 4 * weights.shape[1:].numel())):
            images = part.stop - part.start
            yield cls(
                part,
                GatherTable(value[part].to(dtype), shapes, points),
                locations[part].reshape(images * queries, -1),
                weights[part].reshape(images * queries, heads, -1).to(dtype),
                None if images == 1 else torch.arange(images, dtype=torch.int32).repeat_interleave(queries),
            )

    def chunks(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor | None]]:
        """Yield some rows at a time: which, their coordinates in the table's maps, weights, and images."""
        for chunk in chunks(len(self.weights), 4 * self.weights.shape[1:].numel()):
            coordinates = self.table.coordinates(self.locations[chunk].to(self.weights.dtype))
            images = None if self.image_of_query is None else self.image_of_query[chunk]
            yield chunk, coordinates, self.weights[chunk], images


@torch.library.custom_op(free_name("gather_deformable_attention"), mutates_args=(), device_types="cpu")
def gather_deformable_attention(
    value: Tensor, sizes: list[int], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """As [`multi_scale_deformable_attention`], with the levels' heights and widths in turn."""
    output = value.new_empty(*sampling_locations.shape[:2], value.shape[2] * value.shape[3])
    for images in _Images.split(value, sizes, sampling_locations, attention_weights):
        rows = output[images.part].flatten(0, 1)
        for chunk, coordinates, weights, image_of_query in images.chunks():
            rows[chunk] = images.table.attend(coordinates, weights, image_of_query)
    return output


@torch.library.custom_op(free_name("gather_deformable_attention_backward"), mutates_args=(), device_types="cpu")
def _gather_deformable_attention_backward(
    grad: Tensor, value: Tensor, sizes: list[int], sampling_locations: Tensor, attention_weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and weights are computed again, so nothing of size queries x samples x 4 is kept between the passes."""
    value_grad, location_grad, weight_grad = empty_gradients(value, sampling_locations, attention_weights)
    grad = grad.unflatten(2, (value.shape[2], -1)).to(working_dtype(value))
    for images in _Images.split(value, sizes, sampling_locations, attention_weights):
        table, grad_rows = images.table, grad[images.part].flatten(0, 1)
        location_rows = location_grad[images.part].view(images.locations.shape)
        weight_rows = weight_grad[images.part].view(images.weights.shape)
        located = [torch.empty(images.weights.shape, dtype=dtype) for dtype in (torch.int32, grad.dtype, grad.dtype)]
        for chunk, coordinates, weights, image_of_query in images.chunks():
            found = table.locate(coordinates, image_of_query)
            slopes, weight_rows[chunk] = table.sample_gradients(grad_rows[chunk], coordinates, weights, found)
            location_rows[chunk] = slopes.mul_(table.map_sizes)
            for whole, one in zip(located, found, strict=True):
                whole[chunk] = one
        value_grad[images.part] = table.value_gradient(grad_rows, images.weights, located).view(-1, *value.shape[1:])
    return value_grad, location_grad, weight_grad


register_deformable_attention(gather_deformable_attention, _gather_deformable_attention_backward)


def _serves(value: Tensor, spatial_shapes: Any, sampling_locations: Tensor, attention_weights: Tensor) -> bool:
    if value.device.type != "cpu":
        return False
    if not (torch.is_grad_enabled() and value.requires_grad):
        return True
    _, positions, _, width = value.shape
    return width >= _LEAST_WIDTH or positions * width >= _LEAST_SIZE_WITH_GRADIENTS


def _forward(
    value: Tensor, spatial_shapes: list[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    sizes = [side for shape in spatial_shapes for side in shape]
    return gather_deformable_attention(value, sizes, sampling_locations, attention_weights)


gather_attention = Kernel(_serves, _forward, compiles=True)
