"""Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159, equation 3) as Triton kernels, for GPUs.

One program computes one head of a block of queries. Its tiles have the queries as rows and the head's width, which is
contiguous in memory, as columns, so every corner that is read is one row of `value`, and nothing but the output is
written. Triton comes with the CUDA builds of torch; without it, `IS_AVAILABLE` is false and the operator must not be
called. Under Triton's interpreter (`TRITON_INTERPRET=1` before Triton is imported) it takes CPU tensors.
"""

import functools
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .fast_path import Kernel
from .operator_registration import check_shapes, empty_gradients, free_name, register_deformable_attention


try:
    import triton
    import triton.language as tl
except ImportError:
    IS_AVAILABLE = False
else:
    IS_AVAILABLE = True


# Warps of a program. The backward kernel hands its sums from the threads that have them to those that store them, and
# one warp does that without waiting for others. Chosen by the compiler's output, not by measuring.
_FORWARD_WARPS = 4
_BACKWARD_WARPS = 1
_WARP_SIZE = 32
_BYTES_OF_A_READ = 16  # the most that a thread reads at once


if IS_AVAILABLE:

    @triton.jit
    def _trial_kernel(number):
        pass

    @triton.jit
    def _neighbours(location, length):
        """Pixels next to a location along one axis: index of the lower, share of the upper, whether one is in the map.

        The lower may be -1 and the upper may be `length`. Outside the map the index is 0 and the share is finite; for
        NaN the share is NaN, and so is what is computed from it.
        """
        coordinate = location * length - 0.5
        coordinate = tl.maximum(coordinate, -1.0, propagate_nan=tl.PropagateNan.ALL)
        coordinate = tl.minimum(coordinate, length, propagate_nan=tl.PropagateNan.ALL)
        inside = (coordinate > -1.0) & (coordinate < length)
        lower = tl.floor(tl.where(inside, coordinate, 0.0))
        return lower.to(tl.int32), coordinate - lower, inside

    @triton.jit
    def _corners(locations, query_is_real, height, width, start, INDEX: tl.constexpr, ACCUMULATOR: tl.constexpr):
        """For one sample of each query: row of `value` at its top left, shares of the right and the bottom, and which
        of the four corners (top left, top right, bottom left, bottom right) are in the map."""
        x = tl.load(locations, mask=query_is_real, other=0.0).to(ACCUMULATOR)
        y = tl.load(locations + 1, mask=query_is_real, other=0.0).to(ACCUMULATOR)
        column, right, inside_x = _neighbours(x, width)
        line, bottom, inside_y = _neighbours(y, height)
        columns, lines = tl.cast(width, tl.int32), tl.cast(height, tl.int32)
        inside = inside_x & inside_y & query_is_real
        has_left, has_right = inside & (column >= 0), inside & (column + 1 < columns)
        has_top, has_bottom = line >= 0, line + 1 < lines
        row = (start + line * columns + column).to(INDEX)
        corners = (has_top & has_left, has_top & has_right, has_bottom & has_left, has_bottom & has_right)
        return row, right, bottom, corners

    @triton.jit
    def _place(queries, HEADS: tl.constexpr, BLOCK_QUERIES: tl.constexpr):
        """Head of this program, its image, and its queries (BLOCK_QUERIES,).

        Programs that run at the same time share queries and differ in heads, which are neighbours in memory.
        """
        program = tl.program_id(0)
        head = program % HEADS
        blocks = tl.cdiv(queries, BLOCK_QUERIES)
        image = (program // HEADS // blocks).to(tl.int64)
        query = program // HEADS % blocks * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
        return head, image, query

    @triton.jit(do_not_specialize=["positions", "queries"])
    def _forward_kernel(
        value,
        locations,
        weights,
        output,
        sizes,
        positions,
        queries,
        HEADS: tl.constexpr,
        WIDTH: tl.constexpr,
        LEVELS: tl.constexpr,
        POINTS: tl.constexpr,
        BLOCK_QUERIES: tl.constexpr,
        BLOCK_WIDTH: tl.constexpr,
        INDEX: tl.constexpr,
        ACCUMULATOR: tl.constexpr,
    ):
        head, image, query = _place(queries, HEADS, BLOCK_QUERIES)
        query_is_real = query < queries
        channel = tl.arange(0, BLOCK_WIDTH)[None, :]
        channel_is_real = channel < WIDTH
        value += image * positions * (HEADS * WIDTH) + head * WIDTH
        place = (image * queries + query) * HEADS + head
        first_sample = place * (LEVELS * POINTS)
        total = tl.zeros((BLOCK_QUERIES, BLOCK_WIDTH), dtype=ACCUMULATOR)
        start = 0
        for level in tl.static_range(LEVELS):
            height, width = sizes[2 * level], sizes[2 * level + 1]
            below = tl.cast(width, INDEX) * (HEADS * WIDTH)
            for point in range(level * POINTS, level * POINTS + POINTS):
                sample = first_sample + point
                row, right, bottom, corners = _corners(
                    locations + 2 * sample, query_is_real, height, width, start, INDEX, ACCUMULATOR
                )
                weight = tl.load(weights + sample, mask=query_is_real, other=0.0).to(ACCUMULATOR)
                top_left = value + row[:, None] * (HEADS * WIDTH) + channel
                for corner in tl.static_range(4):
                    pointer = top_left + (corner // 2) * below + (corner % 2) * (HEADS * WIDTH)
                    mask = corners[corner][:, None] & channel_is_real
                    y_share = bottom if corner // 2 else 1 - bottom
                    x_share = right if corner % 2 else 1 - right
                    read = tl.load(pointer, mask=mask, other=0.0).to(ACCUMULATOR)
                    total += (weight * y_share * x_share)[:, None] * read
            start += tl.cast(height, tl.int32) * tl.cast(width, tl.int32)
        mask = query_is_real[:, None] & channel_is_real
        tl.store(output + place[:, None] * WIDTH + channel, total, mask=mask)

    @triton.jit(do_not_specialize=["positions", "queries"])
    def _backward_kernel(
        grad,
        value,
        locations,
        weights,
        value_grad,
        location_grad,
        weight_grad,
        sizes,
        positions,
        queries,
        HEADS: tl.constexpr,
        WIDTH: tl.constexpr,
        LEVELS: tl.constexpr,
        POINTS: tl.constexpr,
        BLOCK_QUERIES: tl.constexpr,
        BLOCK_WIDTH: tl.constexpr,
        INDEX: tl.constexpr,
        ACCUMULATOR: tl.constexpr,
    ):
        """`value_grad`, in the accumulator's precision and zero at the start, is added to, since many samples read one
        row; every other gradient has one writer."""
        head, image, query = _place(queries, HEADS, BLOCK_QUERIES)
        query_is_real = query < queries
        channel = tl.arange(0, BLOCK_WIDTH)[None, :]
        channel_is_real = channel < WIDTH
        first = image * positions * (HEADS * WIDTH) + head * WIDTH
        place = (image * queries + query) * HEADS + head
        first_sample = place * (LEVELS * POINTS)
        mask = query_is_real[:, None] & channel_is_real
        direction = tl.load(grad + place[:, None] * WIDTH + channel, mask=mask, other=0.0).to(ACCUMULATOR)
        start = 0
        for level in tl.static_range(LEVELS):
            height, width = sizes[2 * level], sizes[2 * level + 1]
            below = tl.cast(width, INDEX) * (HEADS * WIDTH)
            for point in range(level * POINTS, level * POINTS + POINTS):
                sample = first_sample + point
                row, right, bottom, corners = _corners(
                    locations + 2 * sample, query_is_real, height, width, start, INDEX, ACCUMULATOR
                )
                weight = tl.load(weights + sample, mask=query_is_real, other=0.0).to(ACCUMULATOR)
                top_left = row[:, None] * (HEADS * WIDTH) + channel
                sampled, x_slope, y_slope = tl.zeros_like(weight), tl.zeros_like(weight), tl.zeros_like(weight)
                for corner in tl.static_range(4):
                    offset = top_left + (corner // 2) * below + (corner % 2) * (HEADS * WIDTH)
                    mask = corners[corner][:, None] & channel_is_real
                    y_share = bottom if corner // 2 else 1 - bottom
                    x_share = right if corner % 2 else 1 - right
                    added = (weight * y_share * x_share)[:, None] * direction
                    tl.atomic_add(value_grad + first + offset, added, mask=mask, sem="relaxed")
                    read = tl.load(value + first + offset, mask=mask, other=0.0).to(ACCUMULATOR)
                    along = tl.sum(read * direction, axis=1)
                    sampled += y_share * x_share * along
                    x_slope += y_share * along if corner % 2 else -y_share * along
                    y_slope += x_share * along if corner // 2 else -x_share * along
                tl.store(weight_grad + sample, sampled, mask=query_is_real)
                tl.store(location_grad + 2 * sample, weight * width * x_slope, mask=query_is_real)
                tl.store(location_grad + 2 * sample + 1, weight * height * y_slope, mask=query_is_real)
            start += tl.cast(height, tl.int32) * tl.cast(width, tl.int32)


IS_INTERPRETED = IS_AVAILABLE and not isinstance(_forward_kernel, triton.JITFunction)
"""Whether the kernels run in Triton's interpreter, which was decided when Triton was imported."""


def runs_on(device: torch.device) -> bool:
    """Return whether the operator takes tensors on this device."""
    return IS_AVAILABLE and (device.type == "cuda" or (device.type == "cpu" and IS_INTERPRETED))


def works_on(device: torch.device) -> bool:
    """Return whether the operator is the fastest way on this device and works there."""
    return device.type == "cuda" and works_on_gpu(device.index)


@torch.compiler.assume_constant_result
def works_on_gpu(index: int) -> bool:
    """Return whether Triton gets a kernel to run on this GPU; warn, once, where Triton is installed and does not."""
    return IS_AVAILABLE and _trial_succeeds(index)


@functools.cache
def _trial_succeeds(index: int) -> bool:
    try:
        _launch_trial(index)
    except Exception as error:  # no single class covers it: a missing C compiler, a GPU too old
        warnings.warn(
            f"Deformable attention on GPU {index} takes PyTorch's `grid_sample`, which needs more time and memory, "
            f"because Triton fails there: {error}",
            stacklevel=2,
        )
        return False
    return True


def _launch_trial(index: int) -> None:
    with torch.cuda.device(index):
        _trial_kernel[(1,)](2, enable_fp_fusion=True)


def launch_options(
    value: Tensor, sampling_locations: Tensor, warps: int, bytes_of_a_number: int
) -> tuple[int, dict[str, Any]]:
    """Return the number of programs and the constants that a kernel is compiled for.

    Args:
        bytes_of_a_number: size of the numbers that a thread reads or adds to, a row at a time.
    """
    batch, positions, heads, width = value.shape
    queries, levels, points = sampling_locations.shape[1], *sampling_locations.shape[3:5]
    block_width = triton.next_power_of_2(width)
    # One full read for each thread. More would take too many registers; with less, more threads would share a row, and
    # each of them computes coordinates and weights of the row's samples.
    block_queries = max(1, warps * _WARP_SIZE * (_BYTES_OF_A_READ // bytes_of_a_number) // block_width)
    constants = {
        "HEADS": heads,
        "WIDTH": width,
        "LEVELS": levels,
        "POINTS": points,
        "BLOCK_QUERIES": block_queries,
        "BLOCK_WIDTH": block_width,
        # Counts the numbers in the values of one image. The narrow one is faster.
        "INDEX": tl.int32 if positions * heads * width < 2**31 else tl.int64,
        "ACCUMULATOR": tl.float64 if value.dtype == torch.float64 else tl.float32,
        "num_warps": warps,
        "enable_fp_fusion": True,
    }
    return batch * heads * triton.cdiv(queries, block_queries), constants


def _sides(sizes: list[int]) -> tuple[float, ...]:
    # Triton compiles a kernel again for integers of 1 and for multiples of 16, so for many an input size, but not for
    # floats. A tensor would have to be copied to the GPU, and the host would wait for that.
    return tuple(map(float, sizes))


def _on_device_of(tensor: Tensor) -> AbstractContextManager:
    """Make the GPU of a tensor the current one, on which Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


@torch.library.custom_op(free_name("triton_deformable_attention"), mutates_args=())
def triton_deformable_attention(
    value: Tensor, sizes: list[int], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """As [`multi_scale_deformable_attention`], with the levels' heights and widths in turn, on a device that is served.

    Sums are kept in float32, in float64 for values in float64. Dtypes may be mixed. The gradient of `value` is added up
    in no fixed order, so its last digits vary from run to run.
    """
    check_shapes(value, sizes, sampling_locations, attention_weights)
    value, sampling_locations, attention_weights = (
        tensor.contiguous() for tensor in (value, sampling_locations, attention_weights)
    )
    output = value.new_empty(value.shape[0], sampling_locations.shape[1], value.shape[2] * value.shape[3])
    if output.numel():
        programs, constants = launch_options(value, sampling_locations, _FORWARD_WARPS, value.element_size())
        with _on_device_of(value):
            _forward_kernel[(programs,)](
                value,
                sampling_locations,
                attention_weights,
                output,
                _sides(sizes),
                value.shape[1],
                sampling_locations.shape[1],
                **constants,
            )
    return output


@torch.library.custom_op(free_name("triton_deformable_attention_backward"), mutates_args=())
def _triton_deformable_attention_backward(
    grad: Tensor, value: Tensor, sizes: list[int], sampling_locations: Tensor, attention_weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    check_shapes(value, sizes, sampling_locations, attention_weights)
    _warn_or_raise_if_order_matters()
    grad, value, sampling_locations, attention_weights = (
        tensor.contiguous() for tensor in (grad, value, sampling_locations, attention_weights)
    )
    value_grad = torch.zeros_like(value, dtype=torch.promote_types(value.dtype, torch.float32))
    location_grad, weight_grad = empty_gradients(sampling_locations, attention_weights)
    if grad.numel():
        programs, constants = launch_options(value, sampling_locations, _BACKWARD_WARPS, value_grad.element_size())
        with _on_device_of(value):
            _backward_kernel[(programs,)](
                grad,
                value,
                sampling_locations,
                attention_weights,
                value_grad,
                location_grad,
                weight_grad,
                _sides(sizes),
                value.shape[1],
                sampling_locations.shape[1],
                **constants,
            )
    return value_grad.to(value.dtype), location_grad, weight_grad


def _warn_or_raise_if_order_matters() -> None:
    """As `grid_sample` does in its backward pass on GPUs, which adds up in no fixed order either."""
    if torch.are_deterministic_algorithms_enabled():
        message = (
            "The backward pass of deformable attention on GPUs does not have a deterministic implementation, but you "
            "set `torch.use_deterministic_algorithms(True)`; with `warn_only=True` it runs."
        )
        if not torch.is_deterministic_algorithms_warn_only_enabled():
            raise RuntimeError(message)
        warnings.warn(message, stacklevel=2)


register_deformable_attention(triton_deformable_attention, _triton_deformable_attention_backward)


def _serves(value: Tensor, spatial_shapes: Any, sampling_locations: Tensor, attention_weights: Tensor) -> bool:
    return works_on(value.device)


def _forward(
    value: Tensor, spatial_shapes: list[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    sizes = [side for shape in spatial_shapes for side in shape]
    return triton_deformable_attention(value, sizes, sampling_locations, attention_weights)


triton_attention = Kernel(_serves, _forward, compiles=True)
