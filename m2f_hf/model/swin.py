"""Swin's layers over maps of any size, with the parameters of `transformers` (arXiv 2103.14030, section 3.2).

`transformers` pads, rolls and cuts a map into windows, and back, one copy after another. Here the windows are an index:
one gather reads them, one puts them back, and in `torch.export` height and width may be symbols.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.swin import modeling_swin

from ..kernels.fast_path import fast_path
from ..kernels.window_attention import ACROSS_REGIONS, swin_layer
from .padding import hidden_tokens


def use_windowed_layers(backbone: nn.Module) -> None:
    """Let the layers of a Swin compute as [`WindowedSwinLayer`]; other backbones, and other tools' layers, stay."""
    for module in backbone.modules():
        if type(module) is modeling_swin.SwinLayer and hasattr(module.attention, "relative_position_bias"):
            module.__class__ = WindowedSwinLayer


class WindowedSwinLayer(modeling_swin.SwinLayer):
    """`transformers`' SwinLayer, computed from an index of its windows; a batch's padding is zeroed like the positions
    that fill up a window."""

    hides_padding = True

    @fast_path(swin_layer)
    def forward(  # type: ignore[override] # transformers states a single tensor and returns the two
        self, hidden_states: Tensor, input_dimensions: tuple[int, int], always_partition: bool = False, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """(B, H * W, C), (H, W) -> (B, H * W, C), and attention weights from attention that writes them down."""
        windows, regions = self.index_windows(input_dimensions, always_partition, hidden_states.device)
        order, slots = windows.flatten(), token_slots(windows, hidden_states.shape[1])
        normed = self.layernorm_before(hidden_states)
        padding = self.hidden_tokens(input_dimensions)
        if padding is not None:
            normed = normed.masked_fill(padding[..., None], 0.0)
        # (B, H * W, C) -> (B, windows * N, C) -> (B * windows, N, C)
        rows = RearrangeRows.apply(normed, order, slots, True).flatten(0, 1).unflatten(0, (-1, windows.shape[1]))
        across = None
        if regions is not None:
            across = (regions[:, None, :] != regions[:, :, None]).to(rows.dtype) * ACROSS_REGIONS
        attended, weights = self.attention(rows, across, **kwargs)
        # (B * windows, N, C) -> (B, windows * N, C) -> (B, H * W, C)
        update = RearrangeRows.apply(attended.flatten(0, 1).unflatten(0, (normed.shape[0], -1)), slots, order, False)
        hidden_states = hidden_states + self.drop_path(self.dropout(update))
        return hidden_states + self.dropout(self.mlp(self.layernorm_after(hidden_states))), weights

    def index_windows(
        self, size: tuple[int, int], always_partition: bool, device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        """Return [`index_windows`] of a map; without `always_partition` one that fits into a window is not shifted."""
        is_shifted = always_partition or min(size) > self.window_size
        return index_windows(*size, self.window_size, self.shift_size if is_shifted else 0, device)

    @staticmethod
    def hidden_tokens(size: tuple[int, int]) -> Tensor | None:
        """Return which tokens of a map are a batch's hidden padding, (B, H * W) bool; None: none is."""
        return hidden_tokens(size)


class RearrangeRows(torch.autograd.Function):
    """Rows in another order, whose gradient is gathered, too, instead of scattered."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor, has_blanks: bool) -> Tensor:
        """
        Args:
            rows: (B, M, C).
            order: (N,), which row is in each place; M for zeros.
            inverse: (M,), the place that each row went to; N for nowhere.
            has_blanks: whether some `order` is M; otherwise some `inverse` may be N.

        Returns:
            (B, N, C).
        """
        ctx.save_for_backward(inverse)
        ctx.has_blanks = has_blanks
        return gather_rows(rows, order, has_blanks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        return gather_rows(grad, inverse, not ctx.has_blanks), None, None, None


def gather_rows(rows: Tensor, order: Tensor, has_blanks: bool) -> Tensor:
    """(B, M, C), (N,) -> (B, N, C), zeros where `order` is M."""
    if not has_blanks:
        return rows.index_select(1, order)
    length = rows.shape[1]
    return rows.index_select(1, order.clamp(max=length - 1)).masked_fill_((order == length)[:, None], 0.0)


def index_windows(
    height: int, width: int, window_size: int, shift: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Return which token is where in the windows of a map that is filled up at the bottom and right, then shifted.

    Returns:
        (windows, window_size ** 2) int64, positions in the flattened map, `height * width` for what fills it up; and
        for a shifted map, of the same shape, the region of each: windows at its end hold regions that do not adjoin.
    """
    rows, columns = ((side + window_size - 1) // window_size for side in (height, width))  # of windows
    # By arithmetic rather than by views, which in an exported graph would depend on there being more than one window.
    place = torch.arange(rows * columns * window_size**2, device=device)
    window, inner = place // window_size**2, place % window_size**2
    shifted_y = window // columns * window_size + inner // window_size
    shifted_x = window % columns * window_size + inner % window_size
    y, x = (shifted_y + shift) % (rows * window_size), (shifted_x + shift) % (columns * window_size)
    tokens = torch.where((y < height) & (x < width), y * width + x, height * width).view(-1, window_size**2)
    if not shift:
        return tokens, None
    row_region, column_region = (
        (position >= (count - 1) * window_size).int() + (position >= count * window_size - shift)
        for position, count in ((shifted_y, rows), (shifted_x, columns))
    )
    return tokens, (row_region * 3 + column_region).view(-1, window_size**2)


def token_slots(windows: Tensor, length: int) -> Tensor:
    """Return the inverse of `index_windows`, each token's place in the flattened windows: (windows, N) -> (length,)."""
    order = windows.flatten()
    slots = order.new_empty(length + 1)
    return slots.index_copy_(0, order, torch.arange(order.shape[0], device=order.device))[:length]
