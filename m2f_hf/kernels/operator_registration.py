"""What the registered forms of deformable attention share: a name of their own, shapes, the way of the gradients."""

from collections.abc import Callable

import torch
from torch import Tensor


def free_name(name: str) -> str:
    """The name of an operator, with a number behind it where there is one of this name.

    Operators are known to the whole process, and a copy of this package's files that travels with a checkpoint may be
    loaded beside the package, or one file twice. Registered under one name, the operator loaded last would compute for
    all, and the earlier ones would read memory that is no longer theirs.
    """
    candidate, number = name, 1
    while hasattr(torch.ops.m2f_hf, candidate):
        number += 1
        candidate = f"{name}_{number}"
    return f"m2f_hf::{candidate}"


def empty_gradients(*inputs: Tensor) -> tuple[Tensor, ...]:
    """Memory for the gradient of each, contiguous whatever the input is: the compiler is told of it beforehand."""
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in inputs)


def register_deformable_attention(forward: Callable[..., Tensor], backward: Callable[..., tuple]) -> None:
    """Tell torch the shapes that two custom operators give, and that the second is the gradient of the first.

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
