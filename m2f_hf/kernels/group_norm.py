"""GroupNorm of maps whose channels lie side by side in memory (arXiv 1803.08494).

For this layout PyTorch's own takes the variance for the mean square less the squared mean, which loses digits, the more
the further the mean lies from zero and the larger the map is: at 200x304 positions it had seventy times the error of
its other form. Here the mean is taken first, and a ReLU that follows is part of the pass.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .pieces import is_recorded, pieces


def normalises_channels_last(features: Tensor, norm: nn.GroupNorm) -> bool:
    """Whether [`ChannelsLastGroupNorm`] should do it: (B, C, H, W) on the CPU, laid out so, float32 or float64."""
    return (
        features.device.type == "cpu"
        and norm.weight.dtype == features.dtype in (torch.float32, torch.float64)
        and features.is_contiguous(memory_format=torch.channels_last)
        and not is_recorded()
    )


class ChannelsLastGroupNorm(torch.autograd.Function):
    """`group_norm`, then ReLU if asked, of what `normalises_channels_last` says yes to."""

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
        grads = group_norm_gradients(grad, features, weight, (mean, inverse_deviation), ctx.needs_input_grad[:3])
        return *grads, None, None, None


def group_norm_gradients(
    grad: Tensor, features: Tensor, weight: Tensor, statistics: tuple[Tensor, Tensor], wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """From the gradient of a norm's output those of its input, weight and bias, as far as they are wanted.

    (B, C, H, W) twice with channels last, (C,), two of (B, groups).
    """
    (batch, channels, height, width), groups = features.shape, statistics[0].shape[1]
    grads: tuple[Tensor | None, Tensor | None, Tensor | None] = torch.ops.aten.native_group_norm_backward(
        grad, features, *statistics, weight, batch, channels, height * width, groups, list(wanted)
    )
    return grads


def normalise_groups(
    features: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, relu: bool, output: Tensor
) -> tuple[Tensor, Tensor]:
    """Writes (B, C, H, W) to `output`, which may be `features`; both have channels last.

    Returns:
        Mean and inverse deviation, (B, groups) each.
    """
    found = [_statistics(image, groups, eps) for image in rows_of(features)]
    means, inverse_deviations = (torch.stack(of_images) for of_images in zip(*found, strict=True))
    apply_statistics(features, weight, bias, (means, inverse_deviations), relu, output)
    return means, inverse_deviations


def apply_statistics(
    features: Tensor, weight: Tensor, bias: Tensor, statistics: tuple[Tensor, Tensor], relu: bool, output: Tensor
) -> None:
    """What `normalise_groups` does with the statistics that it found."""
    groups = statistics[0].shape[1]
    for image, normalised, mean, inverse_deviation in zip(rows_of(features), rows_of(output), *statistics, strict=True):
        scale = (weight.view(groups, -1) * inverse_deviation[:, None]).flatten()
        shift = torch.addcmul(bias, mean.repeat_interleave(len(bias) // groups), scale, value=-1)
        for piece in pieces(*image.shape):
            torch.addcmul(shift, image[piece], scale, out=normalised[piece])
            if relu:
                normalised[piece].relu_()


def rows_of(features: Tensor) -> Tensor:
    """(B, C, H, W) with channels last -> (B, H * W, C), the same memory."""
    return features.permute(0, 2, 3, 1).view(len(features), -1, features.shape[1])


def _statistics(rows: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """(H * W, C) -> mean and inverse deviation of each group, (groups,) each."""
    means = rows.mean(0)  # of each channel
    squares = torch.zeros_like(means)
    for piece in pieces(*rows.shape):
        squares += (rows[piece] - means).square_().sum(0)
    means, variances = means.view(groups, -1), (squares / len(rows)).view(groups, -1)
    mean = means.mean(1)
    variance = (variances + (means - mean[:, None]).square()).mean(1)
    return mean, (variance + eps).rsqrt()
