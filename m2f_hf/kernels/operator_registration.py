"""What the two operators of deformable attention share: registration with torch, and checks of shapes."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def free_name(name: str) -> str:
    """Return a name for an operator, with a number behind it where that name is taken.

    Operators are known to the whole process, and a copy of this package's files that travels with a checkpoint may be
    loaded next to the package, or one file twice. Registered under one name, the operator loaded last would compute for
    all, and the earlier ones would read memory that is no longer theirs.
    """
    candidate, number = name, 1
    while hasattr(torch.ops.m2f_hf, candidate):
        number += 1
        candidate = f"{name}_{number}"
    return f"m2f_hf::{candidate}"


def empty_gradients(*inputs: Tensor) -> tuple[Tensor, ...]:
    """Return memory for each input's gradient, contiguous whatever the input is, as the compiler expects."""
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in inputs)


def register_deformable_attention(forward: Callable[..., Tensor], backward: Callable[..., tuple]) -> None:
    """Register the output shapes of two custom operators, and the second as the gradient of the first.

    Args:
        forward: value (B, S, M, D), heights and widths in turn, locations (B, Q, M, L, P, 2), weights (B, Q, M, L, P)
            -> (B, Q, M * D).
        backward: gradient of that and the arguments of `forward` -> gradients of value, locations and weights.
    """

    @forward.register_fake  # type: ignore[attr-defined]
    def _(value: Tensor, sizes: list[int], sampling_locations: Tensor, attention_weights: Tensor) -> Tensor:
        return value.new_empty(value.shape[0], sampling_locations.shape[1], value.shape[2] * value.shape[3])

    @backward.register_fake  # type: ignore[attr-defined]
    def _(
        grad: Tensor, value: Tensor, sizes: list[int], sampling_locations: Tensor, attention_weights: Tensor
    ) -> tuple[Tensor, ...]:
        return empty_gradients(value, sampling_locations, attention_weights)

    def save_for_backward(ctx, inputs, output) -> None:
        value, ctx.sizes, sampling_locations, attention_weights = inputs
        ctx.save_for_backward(value, sampling_locations, attention_weights)

    def gradients(ctx, grad):
        value, sampling_locations, attention_weights = ctx.saved_tensors
        value_grad, location_grad, weight_grad = backward(grad, value, ctx.sizes, sampling_locations, attention_weights)
        return value_grad, None, location_grad, weight_grad

    forward.register_autograd(gradients, setup_context=save_for_backward)  # type: ignore[attr-defined]


def check_positions(value: Tensor, spatial_shapes: Sequence[tuple[int, int]]) -> None:
    """Raise ValueError unless the levels have as many positions together as `value` (B, S, M, D)."""
    positions = sum(height * width for height, width in spatial_shapes)
    if positions != value.shape[1]:
        raise ValueError(
            f"`spatial_shapes` {list(spatial_shapes)} have {positions} positions together, but `value` has "
            f"{value.shape[1]}."
        )


def check_shapes(value: Tensor, sizes: list[int], sampling_locations: Tensor, attention_weights: Tensor) -> None:
    """Raise ValueError where the shapes do not agree: an operator would read memory that is not theirs.

    Args:
        sizes: heights and widths in turn; the others as in [`multi_scale_deformable_attention`].
    """
    check_positions(value, list(zip(sizes[::2], sizes[1::2], strict=True)))
    batch, _, heads, _ = value.shape
    _, queries, _, _, points, _ = sampling_locations.shape
    samples = (batch, queries, heads, len(sizes) // 2, points)
    if sampling_locations.shape != (*samples, 2) or attention_weights.shape != samples:
        raise ValueError(
            f"`value` {tuple(value.shape)} and {len(sizes) // 2} levels want `sampling_locations` {(*samples, 2)} and "
            f"`attention_weights` {samples}, got {tuple(sampling_locations.shape)} and "
            f"{tuple(attention_weights.shape)}."
        )
