"""A convolution and GroupNorm (arXiv 1803.08494) of maps with channels last.

In this layout PyTorch computes the variance as mean square less squared mean, which loses digits, the more the further
the mean is from zero and the larger the map is: at 200x304 positions it had seventy times the error of its other
layout. Here the mean is taken first, and a ReLU that follows is part of the pass.
"""

from typing import Any

import torch
from torch import Tensor

from .chunks import chunks
from .fast_path import Kernel


class ChannelsLastGroupNorm(torch.autograd.Function):
    """`group_norm`, then ReLU if asked, of float32 or float64 maps with channels last."""

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, relu: bool
    ) -> Tensor:
        """(B, C, H, W), weight and bias (C,), number of groups, epsilon -> (B, C, H, W) with channels last."""
        output = torch.empty_like(features, memory_format=torch.channels_last)
        mean, inverse_deviation = normalise_groups(features, weight, bias, groups, eps, relu, output)
        ctx.save_for_backward(features, weight, mean, inverse_deviation, output if relu else None)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        features, weight, mean, inverse_deviation, output = ctx.saved_tensors
        if output is not None:
            grad = torch.ops.aten.threshold_backward(grad, output, 0)
        grad = grad.contiguous(memory_format=torch.channels_last)
        batch, channels, height, width = features.shape
        grads = torch.ops.aten.native_group_norm_backward(
            grad, features, mean, inverse_deviation, weight, batch, channels, height * width, mean.shape[1],
            list(ctx.needs_input_grad[:3]),
        )  # fmt: skip
        return *grads, None, None, None


def normalise_groups(
    features: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, relu: bool, output: Tensor
) -> tuple[Tensor, Tensor]:
    """Normalise (B, C, H, W) into `output`, which may be `features`; both have channels last.

    Returns:
        Mean and inverse deviation, (B, groups) each.
    """
    statistics = []
    for image, normalised in zip(rows_of(features), rows_of(output), strict=True):
        mean, inverse_deviation = _statistics(image, groups, eps)
        scale = (weight.view(groups, -1) * inverse_deviation[:, None]).flatten()
        shift = torch.addcmul(bias, mean.repeat_interleave(len(bias) // groups), scale, value=-1)
        for chunk in chunks(*image.shape):
            torch.addcmul(shift, image[chunk], scale, out=normalised[chunk])
            if relu:
                normalised[chunk].relu_()
        statistics.append((mean, inverse_deviation))
    means, inverse_deviations = map(torch.stack, zip(*statistics, strict=True))
    return means, inverse_deviations


def rows_of(features: Tensor) -> Tensor:
    """(B, C, H, W) with channels last -> (B, H * W, C), the same memory."""
    return features.permute(0, 2, 3, 1).view(len(features), -1, features.shape[1])


def _statistics(rows: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """(H * W, C) -> mean and inverse deviation of each group, (groups,) each."""
    means = rows.mean(0)  # (C,)
    squares = torch.zeros_like(means)
    for piece in chunks(*rows.shape):
        squares += (rows[piece] - means).square_().sum(0)
    means, variances = means.view(groups, -1), (squares / len(rows)).view(groups, -1)
    mean = means.mean(1)
    variance = (variances + (means - mean[:, None]).square()).mean(1)
    return mean, (variance + eps).rsqrt()


def _serves(layer: Any, features: Tensor, padding: Tensor | None = None) -> bool:
    return (
        padding is None
        and features.device.type == "cpu"
        and features.is_contiguous(memory_format=torch.channels_last)
        and features.numel() > 0
    )


def _forward(layer: Any, features: Tensor, padding: Tensor | None = None) -> Tensor:
    """A convolution, its norm and, with `layer.relu`, a ReLU."""
    norm = layer.norm
    convolved = layer.convolution(features).contiguous(memory_format=torch.channels_last)
    if norm.weight.dtype != convolved.dtype or convolved.dtype not in (torch.float32, torch.float64):
        normalised: Tensor = norm(convolved)  # in half precision PyTorch's own adds up in float32
        return normalised.relu() if layer.relu else normalised
    arguments = (convolved, norm.weight, norm.bias, norm.num_groups, norm.eps, layer.relu)
    if torch.is_grad_enabled():
        output: Tensor = ChannelsLastGroupNorm.apply(*arguments)
        return output
    normalise_groups(*arguments, output=convolved)  # in place: no one else has seen it
    return convolved


channels_last_group_norm = Kernel(_serves, _forward)
