"""Attention within windows that learns a few windows at a time.

Autograd would keep what every step on the way writes down: normalised rows, their windows, scores, weights, heads put
together. With a backward pass of its own the layer keeps queries, keys and values; the rest is computed again from them
and from the layer's input, while a few windows fit the cache.

What fills windows up is zero behind the norm, so that its queries, keys and values are the biases: only rows that are
in the map are normalised and multiplied. Windows that are filled up come last, so that few pieces have to tell.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .pieces import add_product, pieces
from .products import linear


_NEGLIGIBLE = 1e-30  # an attention weight; of a window's up to 144 together they are below 1e-27


class Windows(NamedTuple):
    """Where the rows of a batch's flattened maps stand in windows of N.

    Args:
        tokens: (W, N) int64, -1 for what only fills a window up. Windows that are full come first.
        regions: (W, N), a position sees only those of its own region; None: all.
        hidden: (rows,) bool, which count as zeros behind the norm; None: there are none.
    """

    tokens: Tensor
    regions: Tensor | None
    hidden: Tensor | None

    @classmethod
    def of(cls, windows: Tensor, regions: Tensor | None, shape: tuple[int, int], hidden: Tensor | None) -> "Windows":
        """Those of some images whose maps have one size.

        Args:
            windows: (windows of one image, N) int64, as `index_windows` says it, its regions beside it.
            regions: of the same shape.
            shape: images, and positions in each.
            hidden: bool, of that shape.
        """
        images, length = shape
        first = torch.arange(images, device=windows.device)[:, None, None] * length
        fills = windows == length
        tokens = (windows + first).masked_fill_(fills, -1).flatten(0, 1)
        full_first = fills.any(1).repeat(images).argsort(stable=True)
        return cls(
            tokens[full_first],
            None if regions is None else regions.repeat(images, 1)[full_first],
            None if hidden is None else hidden.flatten(),
        )

    def pieces(self, width: int) -> Iterator[slice]:
        """Some windows at a time, full ones or others, where the widest tensor has `width` numbers for each row."""
        num_windows, area = self.tokens.shape
        num_full = int((self.tokens >= 0).all(1).sum())
        for start, stop in ((0, num_full), (num_full, num_windows)):
            for piece in pieces(stop - start, width * area):
                yield slice(start + piece.start, start + piece.stop)

    def standing_in(self, piece: slice) -> "Standing":
        """The rows in some windows."""
        tokens = self.tokens[piece].flatten()
        is_row = tokens >= 0
        if is_row.all():
            return Standing(tokens, None, len(tokens))
        positions = is_row.nonzero().flatten()
        return Standing(tokens.index_select(0, positions), positions, len(tokens))

    def clear(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """Zeros, in place, where a row is hidden: (n, C), (n,)."""
        return rows if self.hidden is None else rows.masked_fill_(self.hidden.index_select(0, tokens)[:, None], 0.0)

    def outside(self, piece: slice) -> Tensor | None:
        """(w, 1, N, N) bool, where query and key lie in different regions."""
        if self.regions is None:
            return None
        regions = self.regions[piece]
        return (regions[:, None, :] != regions[:, :, None])[:, None]


class Standing(NamedTuple):
    """Rows that stand in some windows.

    Args:
        tokens: (n,) int64, which rows.
        positions: (n,) int64, where in the windows one after the other; None: everywhere.
        num_positions: of the windows.
    """

    tokens: Tensor
    positions: Tensor | None
    num_positions: int

    def gather(self, places: Tensor) -> Tensor:
        """(num_positions, C) -> (n, C)."""
        return places if self.positions is None else places.index_select(0, self.positions)

    def spread(self, rows: Tensor, others: Tensor | None = None) -> Tensor:
        """(n, C), and (C,) for what is none of them, None for zeros -> (num_positions, C)."""
        if self.positions is None:
            return rows
        if others is None:
            places = rows.new_zeros(self.num_positions, rows.shape[1])
        else:
            places = others.to(rows.dtype).repeat(self.num_positions, 1)  # autocast casts rows alone
        return places.index_copy_(0, self.positions, rows)


class WindowAttention(torch.autograd.Function):
    """`states + keep * output(attention(input(norm(states))))` within windows.

    Under autocast projections are in its dtype, scores and what follows from them in float32.
    """

    @staticmethod
    @torch.autocast("cpu", enabled=False)
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
        dtype: torch.dtype,
    ) -> Tensor:
        """
        Args:
            states: (B, L, C).
            in_weight, in_bias: (3 * C, C) and (3 * C,), of queries, keys and values one after the other.
            position_bias: (heads, N, N), added to the scores.
            keep: (B,), factor of each image's update, without gradient; None: 1.
            windows: of all images.
            penalty: added to the score of a key in another region.
            eps: of the norm.
            dtype: of the projections.

        Returns:
            (B, L, C).
        """
        rows = states.flatten(0, 1)
        num_windows, area = windows.tokens.shape
        heads, width = len(position_bias), rows.shape[1] // len(position_bias)
        output = torch.empty_like(rows)
        projected = rows.new_empty(3, num_windows, heads, area, width, dtype=dtype)  # queries, keys and values
        project_in, bias_in = in_weight.to(dtype), None if in_bias is None else in_bias.to(dtype)
        project_out, bias_out = out_weight.to(dtype), out_bias.to(dtype)
        if keep is not None:
            keep = keep.repeat_interleave(states.shape[1])[:, None]
        ctx.sizes = (penalty, eps, width**-0.5)
        for piece in windows.pieces(len(in_weight)):
            standing = windows.standing_in(piece)
            tokens = standing.tokens
            read = rows.index_select(0, tokens)
            normed = windows.clear(F.layer_norm(read, read.shape[1:], norm_weight, norm_bias, eps), tokens)
            # What fills a window up is zero, of which there is nothing left but the bias.
            split = standing.spread(linear(normed.to(dtype), project_in, bias_in), bias_in)
            # (w * N, 3 * C) -> (3, w, heads, N, C / heads)
            projected[:, piece].copy_(split.view(-1, area, 3, heads, width).permute(2, 0, 3, 1, 4))
            query, key, value = projected[:, piece].to(position_bias.dtype)
            attended = _weights(query, key, position_bias, windows.outside(piece), ctx.sizes) @ value
            attended = standing.gather(attended.transpose(1, 2).flatten(2).flatten(0, 1))
            update = linear(attended.to(dtype), project_out, bias_out)
            if keep is not None:
                update *= keep.index_select(0, tokens)
            output.index_copy_(0, tokens, read.add_(update))
        ctx.save_for_backward(
            states, norm_weight, norm_bias, in_weight, position_bias, out_weight, keep, projected, *windows
        )
        ctx.has_bias, ctx.dtype = in_bias is not None, dtype
        return output.view(states.shape)

    @staticmethod
    @torch.autocast("cpu", enabled=False)
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        states, norm_weight, norm_bias, in_weight, position_bias, out_weight, keep, projected, *tables = (
            ctx.saved_tensors
        )
        windows, (_, eps, scale), dtype = Windows(*tables), ctx.sizes, ctx.dtype
        rows, grad_output = states.flatten(0, 1), grad.flatten(0, 1)
        grad_rows = torch.empty_like(rows)
        grads = [torch.zeros_like(one) for one in (norm_weight, norm_bias, in_weight, position_bias, out_weight)]
        grad_norm_weight, grad_norm_bias, grad_in_weight, grad_position_bias, grad_out_weight = grads
        grad_in_bias, grad_out_bias = in_weight.new_zeros(len(in_weight)), out_weight.new_zeros(len(out_weight))
        project_in, project_out = in_weight.to(dtype), out_weight.to(dtype)
        for piece in windows.pieces(len(in_weight)):
            standing = windows.standing_in(piece)
            tokens = standing.tokens
            grad_read = grad_output.index_select(0, tokens)
            grad_update = (grad_read if keep is None else grad_read * keep.index_select(0, tokens)).to(dtype)
            query, key, value = projected[:, piece].to(position_bias.dtype)
            num_windows, heads, area, width = query.shape
            weights = _weights(query, key, position_bias, windows.outside(piece), ctx.sizes)
            attended = (weights @ value).transpose(1, 2).flatten(2).flatten(0, 1)
            add_product(grad_out_weight, grad_update.T, standing.gather(attended).to(dtype))
            grad_out_bias += grad_update.sum(0, dtype=grad_out_bias.dtype)
            grad_attended = standing.spread(linear(grad_update, project_out.T)).to(position_bias.dtype)
            # (w * N, C) -> (w, heads, N, C / heads)
            grad_attended = grad_attended.view(num_windows, area, heads, width).transpose(1, 2).contiguous()
            grad_scores = torch.ops.aten._softmax_backward_data(grad_attended @ value.mT, weights, -1, weights.dtype)
            grad_position_bias += grad_scores.sum(0)
            grad_value = weights.mT @ grad_attended
            grad_scores *= scale
            # (3, w, heads, N, C / heads) -> (w * N, 3 * C)
            grad_split = torch.stack([grad_scores @ key, grad_scores.mT @ query, grad_value])
            grad_split = grad_split.permute(1, 3, 0, 2, 4).reshape(num_windows * area, -1)
            grad_in_bias += grad_split.sum(0)
            grad_split = standing.gather(grad_split).to(dtype)
            read = rows.index_select(0, tokens)
            normed, mean, inverse_deviation = torch.native_layer_norm(read, read.shape[1:], norm_weight, norm_bias, eps)
            add_product(grad_in_weight, grad_split.T, windows.clear(normed, tokens).to(dtype))
            of_read, of_weight, of_bias = torch.ops.aten.native_layer_norm_backward(
                windows.clear(linear(grad_split, project_in.T), tokens).to(read.dtype),
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
            grad_rows.index_copy_(0, tokens, of_read.add_(grad_read))
        return (
            grad_rows.view(states.shape), grad_norm_weight, grad_norm_bias, grad_in_weight,
            grad_in_bias if ctx.has_bias else None, grad_position_bias, grad_out_weight, grad_out_bias,
            None, None, None, None, None,
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
