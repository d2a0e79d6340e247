"""What both decoders share: layers with initial weights of their own, position encoding, layouts.

transformers initialises one module after another and skips those without parameters, so a layer's class has to tell
its initial weights.
"""

import math
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..kernels.convolution import winograd_convolution
from ..kernels.fast_path import fast_path


NUM_FEATURE_LEVELS = 3  # strides 32, 16 and 8 feed the decoder (paper, section 3.2.2)
NUM_SAMPLING_POINTS = 4  # of deformable attention, for each head and level


_Module = TypeVar("_Module", bound="PartlyFrozen")


class PartlyFrozen(nn.Module):
    """A module some of whose parameters must never learn; `_freeze` freezes them."""

    def train(self: _Module, mode: bool = True) -> _Module:
        """As `nn.Module.train`, then freeze again: loading replaces parameters by trainable ones and calls this."""
        super().train(mode)
        self._freeze()
        return self

    def _freeze(self) -> None:
        raise NotImplementedError


class XavierLinear(nn.Linear):
    """Linear layer of a transformer: Xavier-uniform weights, bias zero or (feed-forward) PyTorch's default.

    Args:
        zero_bias: whether the bias starts at zero.
    """

    def __init__(self, in_features: int, out_features: int, zero_bias: bool = True) -> None:
        super().__init__(in_features, out_features)
        self.zero_bias = zero_bias


class XavierConv2d(nn.Conv2d):
    """Convolution with Xavier-uniform weights: those that lead into the deformable encoder."""


class WinogradConv2d(nn.Conv2d):
    """A convolution that the CPU computes by Winograd's algorithm where that is faster."""

    @fast_path(winograd_convolution)
    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, O, H, W)."""
        return super().forward(input)


class ZeroLinear(nn.Linear):
    """Linear layer that starts at zero: deformable attention begins with equal weights."""


class SamplingOffsets(nn.Linear):
    """Offsets that start constant: each head in its own direction, its points at growing distance (arXiv 2010.04159,
    appendix A.4)."""

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__(embed_dim, num_heads * NUM_FEATURE_LEVELS * NUM_SAMPLING_POINTS * 2)
        self.num_heads = num_heads

    def first_bias(self) -> Tensor:
        """(heads * levels * points * 2,) as (x, y) in pixels of the level that is read."""
        angle = torch.arange(self.num_heads, dtype=torch.float32, device="cpu") * (2 * math.pi / self.num_heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
        direction = direction / direction.abs().amax(dim=-1, keepdim=True)  # (M, 2)
        distance = torch.arange(1, NUM_SAMPLING_POINTS + 1, dtype=torch.float32, device="cpu")
        # (M, 1, 1, 2) x (P, 1) -> (M, L, P, 2)
        return (direction[:, None, None] * distance[:, None]).expand(-1, NUM_FEATURE_LEVELS, -1, -1).flatten()


class Mask2FormerSinePositionEmbedding(nn.Module):
    """Sine position encoding of DETR, normalised to 2 pi over each image; y before x, sine and cosine interleaved.

    In a clip, an encoding of the frame's number is added, over all channels and normalised likewise.

    Args:
        num_position_features: channels for each of y and x.
    """

    temperature = 10000
    scale = 2 * math.pi
    eps = 1e-6

    def __init__(self, num_position_features: int) -> None:
        super().__init__()
        self.num_position_features = num_position_features

    def forward(self, features: Tensor, padding: Tensor | None = None) -> Tensor:
        """For a map (B, C, H, W), encoding (1 or B, 2 * num_position_features, H, W) in its dtype; B with padding.

        For a clip (B, T, C, H, W), with the same padding (B, H, W) in all frames: (1 or B, T, …, H, W).
        """
        height, width = features.shape[-2:]
        device = features.device
        y = torch.arange(1, height + 1, device=device, dtype=torch.float32)
        x = torch.arange(1, width + 1, device=device, dtype=torch.float32)
        last_y, last_x = y[-1:], x[-1:]
        if padding is not None:
            last_y, last_x = ((~side).sum(1, keepdim=True).float() for side in (padding[:, :, 0], padding[:, 0]))
        y_angles = self._angles(y / (last_y + self.eps) * self.scale, self.num_position_features)  # (1 or B, H, F)
        x_angles = self._angles(x / (last_x + self.eps) * self.scale, self.num_position_features)
        y_part = y_angles[:, :, None].expand(-1, -1, width, -1)
        x_part = x_angles[:, None].expand(-1, height, -1, -1)
        # Channels are last in memory, as in the tokens that the encoding is added to.
        encoding = torch.cat([y_part, x_part], dim=-1).movedim(-1, 1)
        if features.dim() == 5:
            frame = torch.arange(1, features.shape[1] + 1, device=device, dtype=torch.float32)
            angles = self._angles(frame / (frame[-1:] + self.eps) * self.scale, 2 * self.num_position_features)
            encoding = encoding[:, None] + angles[..., None, None]
        return encoding.to(features.dtype)

    def _angles(self, positions: Tensor, num_features: int) -> Tensor:
        """(n,) or (B, n) -> (1 or B, n, num_features)."""
        pair = torch.arange(num_features // 2, device=positions.device, dtype=torch.float32)
        frequency = self.temperature ** (2 * pair / num_features)
        angles = positions.view(-1, positions.shape[-1], 1) / frequency
        return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)


def to_tokens(features: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H * W, C), or a clip's (B, T, C, H, W) -> (B, T * H * W, C)."""
    return features.movedim(-3, -1).flatten(1, -2)


def to_map(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, H * W, C) -> (B, C, H, W), in the same memory."""
    return tokens.unflatten(1, size).permute(0, 3, 1, 2)
