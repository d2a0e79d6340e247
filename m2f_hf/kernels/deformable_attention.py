"""Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159, equation 3): reference form and CPU form.

Bilinear sampling times attention weight is a weighted sum of rows of the value table: levels x points x 4 corners rows
for every query and head. On the CPU that sum is one `embedding_bag`, in pieces that stay in the cache; on GPUs it is a
Triton kernel, in a file of its own. The readable `grid_sample` form says the same, serves where neither does, and is
what `torch.export` sees. The environment variable `M2F_HF_DEFORMABLE_ATTENTION`, read on import, makes a form serve
everywhere else.
"""

import os
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from .operator_registration import empty_gradients, free_name, register_deformable_attention
from .pieces import is_recorded, pieces
from .triton_deformable_attention import IS_AVAILABLE, serves, triton_deformable_attention, works_on_gpu


try:
    from scipy.sparse import csr_array
except ImportError:  # sorting does as well
    csr_array = None


_VARIABLE = "M2F_HF_DEFORMABLE_ATTENTION"
_FORMS = ("auto", "triton", "gather", "grid_sample")
_FORM = os.environ.get(_VARIABLE) or "auto"
if _FORM not in _FORMS:
    raise ValueError(f"The environment variable {_VARIABLE}={_FORM!r} must be one of {', '.join(_FORMS)}.")


# Heads of this width gather. With gradients, narrower ones do where their maps, positions x width, hold this many
# numbers or more: in smaller maps `grid_sample` finds its reads in the cache, while a gathered row has a fixed cost.
_GATHER_FROM_WIDTH = 16
_GATHER_FROM_SIZE_WITH_GRADIENTS = 1 << 13


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
    form = form_for(value)
    if form == "grid_sample":
        return grid_sample_deformable_attention(value, spatial_shapes, sampling_locations, attention_weights)
    sizes = [side for shape in spatial_shapes for side in shape]
    if form == "triton":
        return triton_deformable_attention(value, sizes, sampling_locations, attention_weights)
    map_sizes = torch.tensor([shape[::-1] for shape in spatial_shapes], dtype=torch.float32)  # (L, 2), x first
    coordinates = sampling_locations * map_sizes[:, None] + 0.5
    return _gather_deformable_attention(value, sizes, coordinates, attention_weights)


def deformable_attention_at_offsets(
    value: Tensor,
    spatial_shapes: list[tuple[int, int]],
    map_sizes: Tensor,
    reference_points: Tensor,
    offsets: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """[`multi_scale_deformable_attention`] at offsets from each query's reference point, in pixels of their level.

    Args:
        value, spatial_shapes, attention_weights: as there.
        map_sizes: (L, 2) float32, width and height of each level, on the device.
        reference_points: (Q, 2), (x, y) in [0, 1] of any level.
        offsets: (B, Q, M, L, P, 2).
    """
    if form_for(value) != "gather":
        locations = reference_points[:, None, None, None] + offsets / map_sizes[:, None]
        return multi_scale_deformable_attention(value, spatial_shapes, locations, attention_weights)
    sizes = [side for shape in spatial_shapes for side in shape]
    points = points_in_maps(reference_points, map_sizes, num_points=offsets.shape[4])
    coordinates = (offsets.flatten(3) + points[:, None]).view(offsets.shape)
    return _gather_deformable_attention(value, sizes, coordinates, attention_weights)


def points_in_maps(reference_points: Tensor, map_sizes: Tensor, num_points: int) -> Tensor:
    """Where points lie in every level's map, as coordinates of [`GatherTable`], repeated for each sampling point.

    (Q, 2) in [0, 1], (L, 2) -> (Q, L * P * 2).
    """
    points = reference_points[:, None] * map_sizes + 0.5  # (Q, L, 2)
    return points[:, :, None].expand(-1, -1, num_points, -1).flatten(1)


def softmax_over_samples(logits: Tensor) -> Tensor:
    """Softmax over the last axis of (…, Q, M, L * P).

    On the CPU a softmax over so short an axis takes 25 ns a number; with the queries last, 3, and there and back.
    """
    if logits.device.type != "cpu" or is_recorded():
        return logits.softmax(-1)
    return logits.movedim(-3, -1).softmax(-2).movedim(-1, -3).contiguous()


def form_for(value: Tensor) -> str:
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
    if not (torch.is_grad_enabled() and value.requires_grad):
        return True
    _, positions, _, width = value.shape
    return width >= _GATHER_FROM_WIDTH or positions * width >= _GATHER_FROM_SIZE_WITH_GRADIENTS


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


class GatherTable:
    """The value maps of some images as rows of one table, each map inside a border of zeros one position wide.

    The border makes a bounds test needless: a corner outside a map is a row of zeros. A position's heads are
    neighbouring rows, as in the maps.

    Coordinates are in positions of the bordered map, (x, y): the middle of a map's first position is (1, 1). They are
    clamped to the border, and once more after rounding, so that a coordinate which is not a number gives an output that
    is not a number and no stray read.

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
        spread = lambda of_level: of_level.repeat_interleave(num_points, 0).repeat(heads, *(1,) * (of_level.dim() - 1))
        self.limits = spread(sizes.flip(1)).flatten()  # of the lower neighbour, as x and y in turn
        self.ends = (self.limits + 1).to(value.dtype)  # of the coordinate itself
        self.strides = spread(strides)
        self.firsts = spread(starts) + torch.arange(heads, dtype=torch.int32).repeat_interleave(len(sizes) * num_points)
        nothing = torch.zeros_like(self.strides)
        corners = torch.stack([nothing, nothing + heads, self.strides, self.strides + heads])
        self.corners = corners.unflatten(1, (heads, -1)).transpose(0, 1).contiguous()  # (M, 4, L * P)

    def locate(self, coordinates: Tensor, images: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Coordinates (n, M * L * P * 2), each query's image (n,) int32, None for the only one -> the row of the
        neighbour at the top left, int32, and the shares of the ones at the right and below: (n, M, L * P) each."""
        clamped = coordinates.clamp(torch.zeros_like(self.ends), self.ends)
        lower = clamped.to(torch.int32).clamp_(torch.zeros_like(self.limits), self.limits)
        x_share, y_share = clamped.sub_(lower).view(len(coordinates), self.num_heads, -1, 2).unbind(-1)
        column, line = lower.unflatten(1, (-1, 2)).unbind(-1)
        top = (line * self.strides).add_(column, alpha=self.num_heads).add_(self.firsts)
        if images is not None:
            top.add_(images[:, None], alpha=self.rows_of_image)
        return top.view(x_share.shape), x_share, y_share

    def corner_rows(self, top: Tensor) -> Tensor:
        """(n, M, L * P) -> (n * M, 4 * L * P): rows of the corners at the top left and right, bottom left and right."""
        return (top[:, :, None] + self.corners).flatten(2).flatten(0, 1)

    @staticmethod
    def corner_weights(weights: Tensor, x_share: Tensor, y_share: Tensor) -> Tensor:
        """Weight times bilinear share, in the order of `corner_rows`: (n, M, L * P) each -> (n, M, 4, L * P)."""
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
        """Weighted sums of bilinear samples: (n, M * L * P * 2), (n, M, L * P), (n,) as in `locate` -> (n, M * D)."""
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
        """Of `attend`: (n, M, D), its arguments, what `locate` gave -> gradients of coordinates and weights."""
        top, x_share, y_share = located
        # What a sample would add to the loss at each of its corners, (n, M, 4, L * P).
        of_corners = sampled_products(grad.reshape(-1, self.head_width), self.rows, self.corner_rows(top))
        of_corners = of_corners.view(*weights.shape[:2], 4, -1)
        top_left, top_right, bottom_left, bottom_right = of_corners.unbind(2)  # (n, M, L * P) each
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
        """Of `attend`: (n, M, D), weights and what `locate` gave for all queries of all images -> (B, S, M * D).

        It is the transposed gather: the same pairs of query and row, sorted by row instead of by query, with the
        output's gradient as the table. That is several times faster than scattering. A sample's four corners lie at
        fixed distances, so they are sorted once, and what they get is moved to its place afterwards.
        """
        top, x_share, y_share = located
        # `queries`: and their heads, rows of the gradient.
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
    """Each vector's products with the rows of a table that it names: (N, D), (R, D), (N, K) int32 -> (N, K)."""
    starts = torch.arange(0, rows.numel() + 1, rows.shape[1], dtype=rows.dtype)
    with warnings.catch_warnings():
        # That sparse layouts are young; of all ways to say this, it is three times the fastest.
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
        wanted = torch.sparse_csr_tensor(
            starts, rows.flatten(), vectors.new_zeros(rows.numel()), (len(vectors), len(table)), check_invariants=False
        )
        return torch.sparse.sampled_addmm(wanted, vectors, table.t(), beta=0.0).values().view(rows.shape)


def in_order_of_rows(top: Tensor, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Samples by query, in order, to samples by row: (N, K) int32, the row that each of a query's samples names.

    Returns:
        Where the samples stand in `top`, and which queries they are of, (N * K,) each; and at which of them each row
        starts, (R + 1,), the last being N * K.
    """
    num_queries, samples = top.shape
    if csr_array is None:
        named, order = top.flatten().sort()
        starts = torch.searchsorted(named, torch.arange(num_rows + 1, dtype=torch.int32), out_int32=True)
        return order, order.div(samples, rounding_mode="floor").int(), starts
    # Transposing a sparse matrix counts instead of comparing, which takes a third of the time.
    places = np.arange(top.numel(), dtype=np.int32)
    first = np.arange(0, top.numel() + 1, samples, dtype=np.int32)
    by_row = csr_array((places, top.flatten().numpy(), first), shape=(num_queries, num_rows)).tocsc()
    order, queries, starts = (torch.from_numpy(of) for of in (by_row.data, by_row.indices, by_row.indptr))
    return order, queries, starts


def empty_places(weights: Tensor) -> list[Tensor]:
    """Memory for what `GatherTable.locate` gives of samples with these weights: (n, M, L * P) each."""
    return [torch.empty(weights.shape, dtype=dtype) for dtype in (torch.int32, weights.dtype, weights.dtype)]


def images_of_queries(part: slice, queries: int) -> Tensor | None:
    """Each query's image among those of a part of the batch, (n,) int32; None where there is but one."""
    images = part.stop - part.start
    return None if images == 1 else torch.arange(images, dtype=torch.int32).repeat_interleave(queries)


def _spatial_shapes(sizes: list[int]) -> list[tuple[int, int]]:
    return list(zip(sizes[::2], sizes[1::2], strict=True))


def _working_dtype(value: Tensor) -> torch.dtype:
    # Rounded to bfloat16, a coordinate is off by up to a tenth of a pixel in a map of 100; besides, `embedding_bag` is
    # slower in it and refuses mixtures.
    return torch.promote_types(value.dtype, torch.float32)


@torch.library.custom_op(free_name("gather_deformable_attention"), mutates_args=(), device_types="cpu")
def _gather_deformable_attention(
    value: Tensor, sizes: list[int], coordinates: Tensor, attention_weights: Tensor
) -> Tensor:
    """(B, S, M, D), (B, Q, M, L, P, 2) as in `GatherTable`, (B, Q, M, L, P) -> (B, Q, M * D)."""
    dtype = _working_dtype(value)
    batch, queries, heads, levels, points = attention_weights.shape
    output = value.new_empty(batch, queries, heads * value.shape[-1])
    for part in pieces(batch, max(value[0].numel(), 4 * attention_weights[0].numel())):
        table = GatherTable(value[part].to(dtype), _spatial_shapes(sizes), points)
        images = images_of_queries(part, queries)
        rows = output[part].flatten(0, 1)
        places, weights = (
            coordinates[part].reshape(len(rows), -1),
            attention_weights[part].reshape(len(rows), heads, -1),
        )
        for piece in pieces(len(rows), heads * levels * points * 4):
            of_piece = None if images is None else images[piece]
            rows[piece] = table.attend(places[piece].to(dtype), weights[piece].to(dtype), of_piece)
    return output


@torch.library.custom_op(free_name("gather_deformable_attention_backward"), mutates_args=(), device_types="cpu")
def _gather_deformable_attention_backward(
    grad: Tensor, value: Tensor, sizes: list[int], coordinates: Tensor, attention_weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and weights are computed again, so nothing of size queries x samples x 4 is kept between the passes."""
    dtype = _working_dtype(value)
    value_grad, place_grad, weight_grad = empty_gradients(value, coordinates, attention_weights)
    batch, queries, heads, levels, points = attention_weights.shape
    grad = grad.unflatten(2, (heads, -1)).to(dtype)
    for part in pieces(batch, max(value[0].numel(), 4 * attention_weights[0].numel())):
        table = GatherTable(value[part].to(dtype), _spatial_shapes(sizes), points)
        images = images_of_queries(part, queries)
        of_output = grad[part].flatten(0, 1)
        places = coordinates[part].reshape(len(of_output), -1).to(dtype)
        weights = attention_weights[part].reshape(len(of_output), heads, -1).to(dtype)
        located = empty_places(weights)
        of_places, of_weights = place_grad[part].view(places.shape), weight_grad[part].view(weights.shape)
        for piece in pieces(len(places), heads * levels * points * 4):
            of_piece = table.locate(places[piece], None if images is None else images[piece])
            of_places[piece], of_weights[piece] = table.sample_gradients(
                of_output[piece], places[piece], weights[piece], of_piece
            )
            for whole, one in zip(located, of_piece, strict=True):
                whole[piece] = one
        value_grad[part] = table.value_gradient(of_output, weights, located).view(value_grad[part].shape)
    return value_grad, place_grad, weight_grad


register_deformable_attention(_gather_deformable_attention, _gather_deformable_attention_backward)
