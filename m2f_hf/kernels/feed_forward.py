"""Two linear layers with an activation between them, which learn a piece of a map at a time.

What lies between the layers is several times as wide as what goes in and comes out: in training it is most of what
autograd keeps of a feed-forward network, twice where the activation's input and output differ. Here the activation is
computed again in the backward pass, and for large maps its input, too: writing that to fresh memory and reading it back
takes as long (see `chunking`).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .pieces import add_product, learns_in_pieces, pieces, product_dtype
from .products import linear


_NUMBERS_KEPT = 1 << 23  # 32 MB in float32: what is larger comes from the operating system page by page, every time


def feed_forward(states: Tensor, fc1: nn.Linear, fc2: nn.Linear, activation: str) -> Tensor:
    """`fc2(activation(fc1(states)))` for "relu" or "gelu" (exact, with erf): (..., C) -> (..., C)."""
    if is_plain(fc1) and is_plain(fc2) and learns_in_pieces(states, fc1.weight):
        states = states.to(product_dtype(states))
        output: Tensor = FeedForward.apply(states, activation == "gelu", fc1.weight, fc1.bias, fc2.weight, fc2.bias)
        return output
    if activation == "gelu":
        return apply_linear(fc2, F.gelu(apply_linear(fc1, states)))
    return apply_linear(fc2, F.relu(apply_linear(fc1, states), inplace=not torch.is_grad_enabled()))


def apply_linear(layer: nn.Linear, states: Tensor) -> Tensor:
    """`layer(states)`, (..., in) -> (..., out); where no gradients are recorded by the faster library."""
    if torch.is_grad_enabled() or not is_plain(layer):
        output: Tensor = layer(states)
        return output
    return linear(states, layer.weight, layer.bias)


def is_plain(layer: nn.Module, kind: type[nn.Module] = nn.Linear) -> bool:
    """Whether a layer does what its kind does: adapters change its `forward`, other tools hang hooks on it or compile
    it."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return (
        type(layer).forward is kind.forward
        and "forward" not in vars(layer)
        and layer._compiled_call_impl is None
        and not any(hooks)
        and not nn.modules.module._has_any_global_hook()
    )


class FeedForward(torch.autograd.Function):
    """As `feed_forward`. Nothing of the width of `fc1`'s output outlives a piece, unless it is small: then `expanded`
    does, the activation's input (the output of a ReLU, from which its gradient follows as well).

    Products and output have the dtype of the states. The parameters' own, in which their gradients are added up, is
    float32, under autocast too."""

    @staticmethod
    @torch.autocast("cpu", enabled=False)
    def forward(ctx: Any, states: Tensor, gelu: bool, *parameters: Tensor) -> Tensor:
        """States (..., C), whether the activation is a GELU, weight and bias of `fc1` and of `fc2` -> (..., C)."""
        weight1, bias1, weight2, bias2 = (parameter.to(states.dtype) for parameter in parameters)
        rows = states.flatten(0, -2)
        output = torch.empty_like(rows)
        width = len(weight1)
        expanded = rows.new_empty(len(rows), width) if len(rows) * width <= _NUMBERS_KEPT else None
        for piece in pieces(len(rows), width):
            wide = linear(rows[piece], weight1, bias1, relu=not gelu, out=None if expanded is None else expanded[piece])
            linear(F.gelu(wide) if gelu else wide, weight2, bias2, out=output[piece])
        ctx.save_for_backward(states, expanded, *parameters[:3])
        ctx.gelu = gelu
        return output.view(states.shape)

    @staticmethod
    @torch.autocast("cpu", enabled=False)
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        states, expanded, *parameters = ctx.saved_tensors
        weight1, bias1, weight2 = (parameter.to(states.dtype) for parameter in parameters)
        rows, grad_output = states.flatten(0, -2), grad.flatten(0, -2)
        grad_rows = torch.empty_like(rows)
        grad_weight1, grad_bias1, grad_weight2 = map(torch.zeros_like, parameters)
        for piece in pieces(len(rows), len(weight1)):
            wide = linear(rows[piece], weight1, bias1, relu=not ctx.gelu) if expanded is None else expanded[piece]
            activated = F.gelu(wide) if ctx.gelu else wide
            add_product(grad_weight2, grad_output[piece].T, activated)
            grad_wide = linear(grad_output[piece], weight2.T)
            # In place: fresh memory of that width would not be in the cache.
            if ctx.gelu:
                torch.ops.aten.gelu_backward.grad_input(grad_wide, wide, grad_input=grad_wide)
            else:
                torch.ops.aten.threshold_backward.grad_input(grad_wide, activated, 0, grad_input=grad_wide)
            add_product(grad_weight1, grad_wide.T, rows[piece])
            grad_bias1 += grad_wide.sum(0)
            linear(grad_wide, weight1.T, out=grad_rows[piece])
        grad_bias2 = grad_output.sum(0, dtype=grad_bias1.dtype)
        return grad_rows.view(states.shape), None, grad_weight1, grad_bias1, grad_weight2, grad_bias2
