"""Attention within windows that learns a few windows at a time.

Autograd would keep what every step on the way writes down: normalised rows, their windows, scores, weights, heads put
together. With a backward pass of its own the layer keeps queries, keys and values; the rest is computed again from them
and from the layer's input, while a few windows fit the cache.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .chunking import pieces
from .products import linear


_NEGLIGIBLE = 1e-30  # an attention weight; of a window's up to 144 together they are below 1e-27


class Windows(NamedTuple):
    """Where the rows of a batch's flattened maps, R in all, stand in windows of N.

    Args:
        tokens: (W, N) int64, R for what only fills a window up.
        blank: (W, N) bool, where zeros are read instead; None: nowhere.
        regions: (windows of one image, N), a position sees only those of its own region; None: all.
    """

    tokens: Tensor
    blank: Tensor | None
    regions: Tensor | None

    def read(self, rows: Tensor, piece: slice) -> Tensor:
        """(R, C) -> those of some windows (w * N, C); for what fills them up any."""
        return rows.index_select(0, self.tokens[piece].flatten().clamp(max=len(rows) - 1))

    def clear(self, rows: Tensor, piece: slice) -> Tensor:
        """Zeros, in place, where a window is blank: (w * N, C)."""
        return rows if self.blank is None else rows.masked_fill_(self.blank[piece].view(-1, 1), 0.0)

    def outside(self, piece: slice) -> Tensor | None:
        """(w, 1, N, N) bool, where query and key lie in different regions."""
        if self.regions is None:
            return None
        window = torch.arange(piece.start, piece.stop, device=self.regions.device) % len(self.regions)
        regions = self.regions.index_select(0, window)
        return (regions[:, None, :] != regions[:, :, None])[:, None]


class WindowAttention(torch.autograd.Function):
    """`states + keep * output(attention(input(norm(states))))` within windows."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        in_weight: Tensor,
        in_bias: Tensor | None,
        position_bias: Tensor,
        out_weight: Tensor,
        out_bias: Tensor,
        keep: Tensor | None,
        windows: Windows,
        penalty: float,
        eps: float,
    ) -> Tensor:
        """
        Args:
            states: (B, L, C).
            in_weight, in_bias: (3 * C, C) and (3 * C,), of queries, keys and values one after the other.
            position_bias: (heads, N, N), added to the scores.
            keep: (B,), factor of each image's update, without gradient; None: 1.
            windows: of all images, one after the other, the same number for each.
            penalty: added to the score of a key in another region.
            eps: of the norm.

        Returns:
            (B, L, C).
        """
        rows = states.flatten(0, 1)
        num_windows, area = windows.tokens.shape
        heads, width = len(position_bias), rows.shape[1] // len(position_bias)
        output = rows.new_empty(len(rows) + 1, rows.shape[1])  # the last row takes what fills windows up
        projected = rows.new_empty(3, num_windows, heads, area, width)  # queries, keys and values
        if keep is not None:
            keep = keep.repeat_interleave(num_windows // len(states)).repeat_interleave(area)[:, None]
        ctx.sizes = (penalty, eps, width**-0.5)
        for piece in pieces(num_windows, 3 * rows.shape[1] * area):
            read = windows.read(rows, piece)
            normed = windows.clear(F.layer_norm(read, read.shape[1:], norm_weight, norm_bias, eps), piece)
            # (w * N, 3 * C) -> (3, w, heads, N, C / heads)
            split = linear(normed, in_weight, in_bias).view(-1, area, 3, heads, width).permute(2, 0, 3, 1, 4)
            query, key, value = projected[:, piece].copy_(split)
            attended = _weights(query, key, position_bias, windows.outside(piece), ctx.sizes) @ value
            update = linear(attended.transpose(1, 2).reshape(read.shape), out_weight, out_bias)
            if keep is not None:
                update *= keep[_rows(piece, area)]
            output.index_copy_(0, windows.tokens[piece].flatten(), update.add_(read))
        ctx.save_for_backward(
            states, norm_weight, norm_bias, in_weight, position_bias, out_weight, keep, projected, *windows
        )
        ctx.has_bias = in_bias is not None
        return output[:-1].view(states.shape)

    @staticmethod
    @torch.autocast("cpu", enabled=False)
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        states, norm_weight, norm_bias, in_weight, position_bias, out_weight, keep, projected, *tables = (
            ctx.saved_tensors
        )
        windows, (_, eps, scale) = Windows(*tables), ctx.sizes
        rows, grad_output = states.flatten(0, 1), grad.flatten(0, 1)
        num_windows, area = windows.tokens.shape
        grad_rows = rows.new_empty(len(rows) + 1, rows.shape[1])
        grads = [torch.zeros_like(one) for one in (norm_weight, norm_bias, in_weight, position_bias, out_weight)]
        grad_norm_weight, grad_norm_bias, grad_in_weight, grad_position_bias, grad_out_weight = grads
        grad_in_bias, grad_out_bias = rows.new_zeros(len(in_weight)), rows.new_zeros(len(out_weight))
        for piece in pieces(num_windows, 3 * rows.shape[1] * area):
            grad_read = windows.read(grad_output, piece)
            grad_read.masked_fill_((windows.tokens[piece] == len(rows)).view(-1, 1), 0.0)
            grad_update = grad_read if keep is None else grad_read * keep[_rows(piece, area)]
            query, key, value = projected[:, piece]
            weights = _weights(query, key, position_bias, windows.outside(piece), ctx.sizes)
            attended = (weights @ value).transpose(1, 2).reshape(grad_read.shape)
            grad_out_weight.addmm_(grad_update.T, attended)
            grad_out_bias += grad_update.sum(0)
            # (w * N, C) -> (w, heads, N, C / heads)
            grad_attended = (
                linear(grad_update, out_weight.T).view(-1, area, *query.shape[1::2]).transpose(1, 2).contiguous()
            )
            grad_scores = torch.ops.aten._softmax_backward_data(grad_attended @ value.mT, weights, -1, weights.dtype)
            grad_position_bias += grad_scores.sum(0)
            grad_value = weights.mT @ grad_attended
            grad_scores *= scale
            # (3, w, heads, N, C / heads) -> (w * N, 3 * C)
            grad_split = torch.stack([grad_scores @ key, grad_scores.mT @ query, grad_value])
            grad_split = grad_split.permute(1, 3, 0, 2, 4).reshape(len(grad_read), -1)
            read = windows.read(rows, piece)
            normed, mean, inverse_deviation = torch.native_layer_norm(read, read.shape[1:], norm_weight, norm_bias, eps)
            grad_in_weight.addmm_(grad_split.T, windows.clear(normed, piece))
            grad_in_bias += grad_split.sum(0)
            of_read, of_weight, of_bias = torch.ops.aten.native_layer_norm_backward(
                windows.clear(linear(grad_split, in_weight.T), piece),
                read,
                read.shape[1:],
                mean,
                inverse_deviation,
                norm_weight,
                norm_bias,
                [True, True, True],
            )
            grad_norm_weight += of_weight
            grad_norm_bias += of_bias
            grad_rows.index_copy_(0, windows.tokens[piece].flatten(), of_read.add_(grad_read))
        return (
            grad_rows[:-1].view(states.shape), grad_norm_weight, grad_norm_bias, grad_in_weight,
            grad_in_bias if ctx.has_bias else None, grad_position_bias, grad_out_weight, grad_out_bias,
            None, None, None, None,
        )  # fmt: skip


def _weights(
    query: Tensor, key: Tensor, position_bias: Tensor, outside: Tensor | None, sizes: tuple[float, float, float]
) -> Tensor:
    """(w, heads, N, C / heads) twice -> attention weights (w, heads, N, N)."""
    penalty, _, scale = sizes
    scores = (query @ key.mT).mul_(scale).add_(position_bias)
    if outside is not None:
        scores.add_(outside, alpha=penalty)
    weights = scores.softmax(-1)
    if outside is not None:
        # exp(-100) is a denormal number: products with such are twenty times slower, for nothing.
        torch.threshold_(weights, _NEGLIGIBLE, 0.0)
    return weights


def _rows(windows: slice, area: int) -> slice:
    return slice(windows.start * area, windows.stop * area)
