"""Two linear layers with an activation between them, which learn a chunk of a map at a time.

What is between the layers is several times as wide as what goes in and comes out: in training it is most of what
autograd keeps of a feed-forward network, twice where the activation's input and output differ. Here the activation is
computed again in the backward pass, and for large maps its input, too: writing that to fresh memory and reading it back
takes as long (see `chunks`).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .chunks import add_product, chunks, learns_in_chunks, product_dtype
from .fast_path import Kernel
from .products import linear


_NUMBERS_KEPT = 1 << 23  # 32 MB in float32: what is larger comes from the operating system page by page, every time


def feed_forward(states: Tensor, fc1: nn.Linear, fc2: nn.Linear, activation: str) -> Tensor:
    """Return `fc2(activation(fc1(states)))` for "relu" or "gelu" (exact, with erf): (..., C) -> (..., C).

    For kernels, which know that the layers are plain; with gradients, where `learns_in_chunks` holds.
    """
    if torch.is_grad_enabled():
        parameters = (fc1.weight, fc1.bias, fc2.weight, fc2.bias)
        output: Tensor = FeedForward.apply(states.to(product_dtype(states)), activation == "gelu", *parameters)
        return output
    wide = linear(states, fc1.weight, fc1.bias)
    return linear(F.gelu(wide) if activation == "gelu" else wide.relu_(), fc2.weight, fc2.bias)


class FeedForward(torch.autograd.Function):
    """As `feed_forward`. Nothing of the width of `fc1`'s output outlives a chunk, unless it is small: then `expanded`
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
        for chunk in chunks(len(rows), width):
            wide = torch.addmm(bias1, rows[chunk], weight1.T, out=None if expanded is None else expanded[chunk])
            torch.addmm(bias2, F.gelu(wide) if gelu else wide.relu_(), weight2.T, out=output[chunk])
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
        for chunk in chunks(len(rows), len(weight1)):
            if expanded is None:
                wide = torch.addmm(bias1, rows[chunk], weight1.T)
                activated = F.gelu(wide) if ctx.gelu else wide.relu_()
            else:  # what was kept is not changed: there may be a second backward pass
                wide = expanded[chunk]
                activated = F.gelu(wide) if ctx.gelu else wide
            add_product(grad_weight2, grad_output[chunk].T, activated)
            grad_wide = grad_output[chunk] @ weight2
            # In place: fresh memory of that width would not be in the cache.
            if ctx.gelu:
                torch.ops.aten.gelu_backward.grad_input(grad_wide, wide, grad_input=grad_wide)
            else:
                torch.ops.aten.threshold_backward.grad_input(grad_wide, activated, 0, grad_input=grad_wide)
            add_product(grad_weight1, grad_wide.T, rows[chunk])
            grad_bias1 += grad_wide.sum(0)
            torch.mm(grad_wide, weight1, out=grad_rows[chunk])
        grad_bias2 = grad_output.sum(0, dtype=grad_bias1.dtype)
        return grad_rows.view(states.shape), None, grad_weight1, grad_bias1, grad_weight2, grad_bias2


def _serves(layer: Any, states: Tensor) -> bool:
    return learns_in_chunks(states, layer.fc1.weight) and not (layer.training and layer.dropout)


def _forward(layer: Any, states: Tensor) -> Tensor:
    return feed_forward(states, layer.fc1, layer.fc2, "relu")


relu_feed_forward = Kernel(_serves, _forward)
