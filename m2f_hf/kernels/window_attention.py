"""A Swin layer, a few windows at a time.

In inference everything that a chunk of the map needs stays in the cache. In training autograd would keep what every
step on the way writes down: normalised rows, their windows, scores, weights, heads put together. With a backward pass
of its own the attention keeps queries, keys and values; the rest is computed again from them and the layer's input.

What fills windows up is zero behind the norm, so that its queries, keys and values are the biases: only rows that are
in the map are normalised and multiplied. Windows that are filled up come last, so that few chunks have to tell.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .chunks import add_product, chunks, infers_in_chunks, learns_in_chunks, product_dtype
from .fast_path import Kernel
from .feed_forward import feed_forward
from .products import linear


ACROSS_REGIONS = -100.0  # added to the score of a position beyond the edge around which the shifted map wraps
_NEGLIGIBLE = 1e-30  # an attention weight; of a window's up to 144 together they are below 1e-27


class Windows(NamedTuple):
    """Where the rows of a batch's flattened maps are in windows of N.

    Args:
        tokens: (W, N) int64, -1 for what only fills a window up. Windows that are full come first.
        regions: (W, N), a position sees only those of its own region; None: all.
        hidden: (rows,) bool, which count as zeros behind the norm; None: there are none.
    """

    tokens: Tensor
    regions: Tensor | None
    hidden: Tensor | None

    @classmethod
    def from_index(
        cls, windows: Tensor, regions: Tensor | None, shape: Sequence[int], hidden: Tensor | None
    ) -> "Windows":
        """Return the windows of some images whose maps have one size.

        Args:
            windows: (windows of one image, N) int64, from `index_windows`.
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

    def chunks(self, width: int) -> Iterator[slice]:
        """Yield a few windows at a time, all full or none, where the widest tensor has `width` numbers for each row."""
        num_windows, area = self.tokens.shape
        num_full = int((self.tokens >= 0).all(1).sum())
        for start, stop in ((0, num_full), (num_full, num_windows)):
            for chunk in chunks(stop - start, width * area):
                yield slice(start + chunk.start, start + chunk.stop)

    def rows_in(self, chunk: slice) -> "WindowRows":
        """Return the rows in some windows."""
        tokens = self.tokens[chunk].flatten()
        is_row = tokens >= 0
        if is_row.all():
            return WindowRows(tokens, None, len(tokens))
        positions = is_row.nonzero().flatten()
        return WindowRows(tokens.index_select(0, positions), positions, len(tokens))

    def clear(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """Write zeros, in place, where a row is hidden: (n, C), (n,) -> (n, C)."""
        return rows if self.hidden is None else rows.masked_fill_(self.hidden.index_select(0, tokens)[:, None], 0.0)

    def outside(self, chunk: slice) -> Tensor | None:
        """Return where query and key are in different regions: (w, 1, N, N) bool; None: nowhere."""
        if self.regions is None:
            return None
        regions = self.regions[chunk]
        return (regions[:, None, :] != regions[:, :, None])[:, None]


class WindowRows(NamedTuple):
    """Rows that are in some windows.

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

    def scatter(self, rows: Tensor, others: Tensor | None = None) -> Tensor:
        """(n, C), and (C,) for the other positions, None for zeros -> (num_positions, C)."""
        if self.positions is None:
            return rows
        if others is None:
            places = rows.new_zeros(self.num_positions, rows.shape[1])
        else:
            places = others.to(rows.dtype).repeat(self.num_positions, 1)  # autocast casts rows alone
        return places.index_copy_(0, self.positions, rows)


class Attention(NamedTuple):
    """The parameters of a layer's attention.

    Args:
        norm_weight, norm_bias: (C,), of the norm in front.
        in_weight, in_bias: (3 * C, C) and (3 * C,) or None, of queries, keys and values one after the other.
        position_bias: (heads, N, N), added to the scores.
        out_weight, out_bias: (C, C) and (C,), of the output.
        eps: of the norm.
        dtype: of the projections, autocast's where it is on.
    """

    norm_weight: Tensor
    norm_bias: Tensor
    in_weight: Tensor
    in_bias: Tensor | None
    position_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor
    eps: float
    dtype: torch.dtype


def _serves(layer: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> bool:
    attention = layer.attention
    return (
        attention.config._attn_implementation == "sdpa"
        and attention.config.hidden_act == "gelu"
        and not (layer.training and (layer.dropout.p or attention.attention_dropout))
        and (infers_in_chunks(layer, hidden_states) or learns_in_chunks(hidden_states, attention.o_proj.weight))
    )


def _forward(
    layer: Any, hidden_states: Tensor, input_dimensions: tuple[int, int], always_partition: bool = False, **kwargs: Any
) -> tuple[Tensor, None]:
    """As the layer's: (B, H * W, C), (H, W) -> (B, H * W, C), and no attention weights."""
    tokens, regions = layer.index_windows(input_dimensions, always_partition, hidden_states.device)
    windows = Windows.from_index(tokens, regions, hidden_states.shape[:2], layer.hidden_tokens(input_dimensions))
    attention, norm, mlp = layer.attention, layer.layernorm_before, layer.mlp
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    biases = [projection.bias for projection in projections if projection.bias is not None]
    parameters = Attention(
        norm_weight=norm.weight,
        norm_bias=norm.bias,
        in_weight=torch.cat([projection.weight for projection in projections]),
        in_bias=torch.cat(biases) if biases else None,
        position_bias=attention.relative_position_bias()[0],
        out_weight=attention.o_proj.weight,
        out_bias=attention.o_proj.bias,
        eps=norm.eps,
        dtype=product_dtype(hidden_states),
    )
    if torch.is_grad_enabled():
        keep = layer.drop_path(hidden_states.new_ones(len(hidden_states), 1, 1)).flatten() if layer.training else None
        hidden_states = WindowAttention.apply(hidden_states, windows, keep, *parameters)
        return hidden_states + feed_forward(layer.layernorm_after(hidden_states), mlp.fc1, mlp.fc2, "gelu"), None
    rows = attend(hidden_states.flatten(0, 1), windows, parameters)
    for chunk in chunks(len(rows), mlp.fc1.out_features):
        some = rows[chunk]
        some += feed_forward(layer.layernorm_after(some), mlp.fc1, mlp.fc2, "gelu")
    return rows.view(hidden_states.shape), None


swin_layer = Kernel(_serves, _forward)


@torch.autocast("cpu", enabled=False)
def attend(
    rows: Tensor, windows: Windows, attention: Attention, keep: Tensor | None = None, projected: Tensor | None = None
) -> Tensor:
    """Return `rows + keep * output(attention(input(norm(rows))))` within windows.

    Args:
        rows: (rows, C), of the flattened maps.
        windows: where they are.
        attention: its parameters.
        keep: (rows, 1), factor of each row's update; None: 1.
        projected: (3, W, heads, N, C / heads), memory for queries, keys and values that a backward pass reads; None:
            there is none.

    Returns:
        (rows, C).
    """
    heads, area = attention.position_bias.shape[:2]
    in_bias = None if attention.in_bias is None else attention.in_bias.to(attention.dtype)
    in_weight, out_weight, out_bias = (
        one.to(attention.dtype) for one in (attention.in_weight, attention.out_weight, attention.out_bias)
    )
    output = torch.empty_like(rows)
    multiply = linear if projected is None else F.linear
    for chunk in windows.chunks(len(attention.in_weight)):
        located, outside = windows.rows_in(chunk), windows.outside(chunk)
        tokens = located.tokens
        read = rows.index_select(0, tokens)
        normed = windows.clear(
            F.layer_norm(read, read.shape[1:], attention.norm_weight, attention.norm_bias, attention.eps), tokens
        )
        # What fills a window up is zero, of which there is nothing left but the bias.
        split = located.scatter(multiply(normed.to(attention.dtype), in_weight, in_bias), in_bias)
        # (w * N, 3 * C) -> (3, w, heads, N, C / heads)
        split = split.view(-1, area, 3, heads, rows.shape[1] // heads).permute(2, 0, 3, 1, 4)
        if projected is None:
            bias = attention.position_bias if outside is None else attention.position_bias + ACROSS_REGIONS * outside
            query, key, value = split
            attended = F.scaled_dot_product_attention(query, key, value, bias.to(attention.dtype))
        else:
            query, key, value = projected[:, chunk].copy_(split).to(attention.position_bias.dtype)
            attended = _weights(query, key, attention.position_bias, outside) @ value
        # (w, heads, N, C / heads) -> (w * N, C) -> (n, C)
        attended = located.gather(attended.transpose(1, 2).flatten(2).flatten(0, 1))
        update = multiply(attended.to(attention.dtype), out_weight, out_bias)
        if keep is not None:
            update *= keep.index_select(0, tokens)
        output.index_copy_(0, tokens, read.add_(update))
    return output


class WindowAttention(torch.autograd.Function):
    """[`attend`] that learns: (B, L, C), its windows, (B,) factors without gradient, parameters -> (B, L, C).

    Under autocast projections are in its dtype, scores and what follows from them in float32.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, windows: Windows, keep: Tensor | None, *parameters: Any) -> Tensor:
        attention = Attention(*parameters)
        heads, area = attention.position_bias.shape[:2]
        shape = (3, len(windows.tokens), heads, area, states.shape[2] // heads)
        projected = states.new_empty(shape, dtype=attention.dtype)
        if keep is not None:
            keep = keep.repeat_interleave(states.shape[1])[:, None]
        output = attend(states.flatten(0, 1), windows, attention, keep, projected)
        ctx.save_for_backward(states, keep, projected, *windows, *parameters[:-2])
        ctx.settings = parameters[-2:]
        return output.view(states.shape)

    @staticmethod
    @torch.autocast("cpu", enabled=False)
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        states, keep, projected, *others = ctx.saved_tensors
        windows, parameters = Windows(*others[:3]), others[3:]
        attention = Attention._make([*parameters, *ctx.settings])
        rows, grad_output = states.flatten(0, 1), grad.flatten(0, 1)
        grad_rows = torch.empty_like(rows)
        grads: Any = [None if one is None else torch.zeros_like(one) for one in parameters]
        gradient = Attention._make([*grads, *ctx.settings])
        in_weight, out_weight = attention.in_weight.to(attention.dtype), attention.out_weight.to(attention.dtype)
        for chunk in windows.chunks(len(attention.in_weight)):
            located = windows.rows_in(chunk)
            tokens = located.tokens
            grad_read = grad_output.index_select(0, tokens)
            grad_update = (grad_read if keep is None else grad_read * keep.index_select(0, tokens)).to(attention.dtype)
            query, key, value = projected[:, chunk].to(attention.position_bias.dtype)
            num_windows, heads, area, width = query.shape
            weights = _weights(query, key, attention.position_bias, windows.outside(chunk))
            attended = (weights @ value).transpose(1, 2).flatten(2).flatten(0, 1)
            add_product(gradient.out_weight, grad_update.T, located.gather(attended).to(attention.dtype))
            gradient.out_bias.add_(grad_update.sum(0, dtype=gradient.out_bias.dtype))
            grad_attended = located.scatter(F.linear(grad_update, out_weight.T)).to(attention.position_bias.dtype)
            # (w * N, C) -> (w, heads, N, C / heads)
            grad_attended = grad_attended.view(num_windows, area, heads, width).transpose(1, 2).contiguous()
            grad_scores = torch.ops.aten._softmax_backward_data(grad_attended @ value.mT, weights, -1, weights.dtype)
            gradient.position_bias.add_(grad_scores.sum(0))
            grad_value = weights.mT @ grad_attended
            grad_scores *= width**-0.5
            # (3, w, heads, N, C / heads) -> (w * N, 3 * C)
            grad_split = torch.stack([grad_scores @ key, grad_scores.mT @ query, grad_value])
            grad_split = grad_split.permute(1, 3, 0, 2, 4).reshape(num_windows * area, -1)
            if gradient.in_bias is not None:
                gradient.in_bias.add_(grad_split.sum(0))
            grad_split = located.gather(grad_split).to(attention.dtype)
            read = rows.index_select(0, tokens)
            norm = (read.shape[1:], attention.norm_weight, attention.norm_bias)
            normed, mean, inverse_deviation = torch.native_layer_norm(read, *norm, attention.eps)
            add_product(gradient.in_weight, grad_split.T, windows.clear(normed, tokens).to(attention.dtype))
            grad_normed = windows.clear(F.linear(grad_split, in_weight.T), tokens).to(read.dtype)
            through_norm, grad_norm_weight, grad_norm_bias = torch.ops.aten.native_layer_norm_backward(
                grad_normed, read, norm[0], mean, inverse_deviation, *norm[1:], [True, True, True]
            )
            gradient.norm_weight.add_(grad_norm_weight)
            gradient.norm_bias.add_(grad_norm_bias)
            grad_rows.index_copy_(0, tokens, through_norm.add_(grad_read))
        return grad_rows.view(states.shape), None, None, *gradient[:-2], None, None


def _weights(query: Tensor, key: Tensor, position_bias: Tensor, outside: Tensor | None) -> Tensor:
    """(w, heads, N, C / heads) twice -> attention weights (w, heads, N, N)."""
    scores = (query @ key.mT).mul_(query.shape[-1] ** -0.5).add_(position_bias)
    if outside is not None:
        scores.add_(outside, alpha=ACROSS_REGIONS)
    weights = scores.softmax(-1)
    if outside is not None:
        # exp(-100) is a denormal number: products with such are twenty times slower, for nothing.
        torch.threshold_(weights, _NEGLIGIBLE, 0.0)
    return weights
