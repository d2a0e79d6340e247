"""Swin's layers over maps of any size, with the parameters of `transformers` (arXiv 2103.14030, section 3.2).

`transformers` pads, rolls and cuts a map into windows, and back, one copy after another. Here the windows are an index:
one gather reads them, one puts them back. On the CPU a layer in inference goes through its windows piece by piece
(`chunking`), and in `torch.export` height and width may be symbols.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.swin import modeling_swin

from .feed_forward import apply_linear, feed_forward, is_plain
from .pieces import is_recorded, learns_in_pieces, pieces, product_dtype, with_channels_last, works_in_pieces
from .window_attention import Standing, WindowAttention, Windows


_OUTSIDE = -100.0  # added to the score of a position beyond the edge around which the shifted map wraps


def use_windowed_layers(backbone: nn.Module) -> None:
    """Let a Swin's layers compute as [`WindowedSwinLayer`], and its stages give views of their tokens as maps.

    Of another backbone nothing changes, nor do layers that are not `transformers`' own.
    """
    for module in backbone.modules():
        if type(module) is modeling_swin.SwinLayer and hasattr(module.attention, "relative_position_bias"):
            module.__class__ = WindowedSwinLayer
        elif type(module) is modeling_swin.SwinStage:
            # Not by a class of our own: transformers knows by the name what must stay on one device.
            module.get_reshaped_hidden_states = _view_of_stage  # type: ignore[method-assign, assignment]


def feature_maps(backbone: Any, pixel_values: Tensor) -> tuple[Tensor, ...]:
    """A backbone's maps (B, C, H, W).

    Those of a Swin on the CPU have a position's channels side by side in memory, as layers and norms write them;
    `transformers` copies each map three times to have them apart. A backbone that other tools have changed, or that is
    compiled or exported, is asked as a whole.
    """
    if pixel_values.device.type != "cpu" or is_recorded() or not _is_untouched(backbone):
        theirs: tuple[Tensor, ...] = backbone(pixel_values).feature_maps
        return theirs
    # The convolution that embeds patches keeps the layout, and a norm over channels follows.
    tokens, size = backbone.swin.embeddings(with_channels_last(pixel_values))
    maps = [to_map(tokens, size)]
    for stage in backbone.swin.encoder.layers:
        tokens, of_stage, _ = stage(tokens, size, always_partition=True, output_hidden_states_before_downsampling=True)
        maps.append(of_stage)
        size = (size[0] + 1) // 2, (size[1] + 1) // 2
    return tuple(
        to_map(backbone.hidden_states_norms[name](features.flatten(2).transpose(1, 2)), features.shape[2:])
        for name, features in zip(backbone.stage_names, maps, strict=True)
        if name in backbone.out_features
    )


def _is_untouched(backbone: nn.Module) -> bool:
    kinds = {
        "": modeling_swin.SwinBackbone,
        "swin": modeling_swin.SwinModel,
        "swin.encoder": modeling_swin.SwinEncoder,
    }
    if type(backbone) is not modeling_swin.SwinBackbone:
        return False
    modules = [(backbone.get_submodule(name), kind) for name, kind in kinds.items()]
    return all(type(module) is kind and is_plain(module) for module, kind in modules)


def _view_of_stage(
    hidden_states: Tensor, before_downsampling: Tensor, height: int, width: int, is_before: bool
) -> Tensor:
    """As SwinStage's method of the name, without a copy."""
    if is_before or hidden_states is before_downsampling:
        return to_map(before_downsampling, (height, width))
    return to_map(hidden_states, ((height + 1) // 2, (width + 1) // 2))


def to_map(tokens: Tensor, size: Sequence[int]) -> Tensor:
    """(B, H * W, C) -> (B, C, H, W), in the same memory."""
    return tokens.unflatten(1, size).permute(0, 3, 1, 2)


class WindowedSwinLayer(modeling_swin.SwinLayer):
    """`transformers`' SwinLayer, computed from an index of its windows.

    Attributes:
        padding_hider: says which tokens are a batch's padding; they are zeroed like those that fill up a window.
    """

    padding_hider: Any = None

    def forward(  # type: ignore[override] # transformers states a single tensor and returns the two
        self, hidden_states: Tensor, input_dimensions: tuple[int, int], always_partition: bool = False, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """(B, H * W, C), (H, W) -> (B, H * W, C), and attention weights from attention that writes them down."""
        if not always_partition:
            theirs: Any = super().forward(hidden_states, input_dimensions, always_partition, **kwargs)
            return theirs
        height, width = input_dimensions
        windows, regions = index_windows(height, width, self.window_size, self.shift_size, hidden_states.device)
        hidden = None if self.padding_hider is None else self.padding_hider.hidden_tokens((height, width))
        if works_in_pieces(self, hidden_states):
            return self._forward_in_pieces(hidden_states, windows, regions, hidden), None

        if self._learns_in_pieces(hidden_states):
            hidden_states = self._attend_in_pieces(hidden_states, windows, regions, hidden)
            return hidden_states + self._expand(self.layernorm_after(hidden_states)), None

        length = height * width
        order, slots = windows.flatten(), token_slots(windows, length)
        blank = order == length
        inside = order.clamp(max=length - 1)
        normed = self.layernorm_before(hidden_states)
        if hidden is not None:
            normed = normed.masked_fill(hidden[..., None], 0.0)
        # (B, H*W, C) -> (B, windows * N, C), zeros for what fills up windows; and back, without it.
        rows = RearrangeRows.apply(normed, inside, blank, slots, None)
        attended, weights = self._attend(rows.flatten(0, 1), windows.shape[1], regions, **kwargs)
        update = RearrangeRows.apply(attended.reshape(rows.shape), slots, None, inside, blank)
        hidden_states = hidden_states + self.drop_path(self.dropout(update))
        return hidden_states + self.dropout(self._expand(self.layernorm_after(hidden_states))), weights

    def _expand(self, hidden_states: Tensor) -> Tensor:
        if self.attention.config.hidden_act != "gelu":
            return self.mlp(hidden_states)
        return feed_forward(hidden_states, self.mlp.fc1, self.mlp.fc2, "gelu")

    def _attend(
        self, rows: Tensor, area: int, regions: Tensor | None, standing: Standing | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attention inside each window: (B * windows * N, C), N, (windows, N) -> (B * windows * N, C).

        Args:
            standing: where only some positions have a row, (n, C), and the others are zero; then (n, C) come out.
        """
        attention = self.attention

        def project(projection: nn.Linear) -> Tensor:
            """(n, C) -> (B * windows, heads, N, C / heads)."""
            if standing is None or standing.positions is None:
                projected = apply_linear(projection, rows.unflatten(0, (-1, area)))
            else:
                blank: Tensor | None = projection.bias
                if not is_plain(projection):
                    blank = apply_linear(projection, rows.new_zeros(1, 1, rows.shape[1]))[0, 0]
                projected = standing.spread(apply_linear(projection, rows[None])[0], blank).unflatten(0, (-1, area))
            return projected.unflatten(2, (attention.num_attention_heads, -1)).transpose(1, 2)

        query, key, value = map(project, (attention.q_proj, attention.k_proj, attention.v_proj))
        bias = attention.relative_position_bias()  # (1, heads, N, N)
        if regions is not None:
            across = (regions[:, None, :] != regions[:, :, None]).to(bias.dtype)  # (windows, N, N)
            bias = torch.add(bias, across[:, None], alpha=_OUTSIDE)  # (windows, heads, N, N)
            images = query.shape[0] // regions.shape[0]
            bias = bias.expand(images, -1, -1, -1, -1).flatten(0, 1)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            attention.config._attn_implementation, modeling_swin.eager_attention_forward
        )
        dropout = attention.attention_dropout if self.training else 0.0
        output, weights = attend(
            attention, query, key, value, bias, dropout=dropout, scaling=attention.scaling, **kwargs
        )
        output = output.reshape(-1, area, rows.shape[1])
        if standing is not None and standing.positions is not None:
            output = standing.gather(output.flatten(0, 1))[None]
        return apply_linear(attention.o_proj, output).flatten(0, 1), weights

    def _learns_in_pieces(self, hidden_states: Tensor) -> bool:
        attention = self.attention
        projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        return (
            learns_in_pieces(hidden_states, attention.o_proj.weight)
            and all(map(is_plain, projections))
            and attention.config._attn_implementation == "sdpa"
            and not (self.training and (self.dropout.p or attention.attention_dropout))
        )

    def _attend_in_pieces(
        self, hidden_states: Tensor, windows: Tensor, regions: Tensor | None, hidden: Tensor | None
    ) -> Tensor:
        """The layer's first half: (B, H * W, C) -> (B, H * W, C)."""
        attention, norm = self.attention, self.layernorm_before
        images, length, _ = hidden_states.shape
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        weights: list[Tensor] = [projection.weight for projection in projections]
        biases: list[Tensor] = [projection.bias for projection in projections if projection.bias is not None]
        keep = self.drop_path(hidden_states.new_ones(images, 1, 1)).flatten() if self.training else None
        output: Tensor = WindowAttention.apply(
            hidden_states,
            norm.weight,
            norm.bias,
            torch.cat(weights),
            torch.cat(biases) if biases else None,
            attention.relative_position_bias()[0],
            attention.o_proj.weight,
            attention.o_proj.bias,
            keep,
            Windows.of(windows, regions, (images, length), hidden),
            _OUTSIDE,
            norm.eps,
            product_dtype(hidden_states),
        )
        return output

    def _forward_in_pieces(
        self, hidden_states: Tensor, windows: Tensor, regions: Tensor | None, hidden: Tensor | None
    ) -> Tensor:
        rows = hidden_states.flatten(0, 1)
        output = torch.empty_like(rows)
        widest = self.mlp.fc1.out_features
        located = Windows.of(windows, regions, (hidden_states.shape[0], hidden_states.shape[1]), hidden)
        for piece in located.pieces(widest):
            standing = located.standing_in(piece)
            read = rows.index_select(0, standing.tokens)
            normed = located.clear(self.layernorm_before(read), standing.tokens)
            of_piece = None if located.regions is None else located.regions[piece]
            attended, _ = self._attend(normed, windows.shape[1], of_piece, standing)
            output.index_copy_(0, standing.tokens, attended.add_(read))
        for piece in pieces(len(rows), widest):
            some = output[piece]
            some += self._expand(self.layernorm_after(some))
        return output.view(hidden_states.shape)


class RearrangeRows(torch.autograd.Function):
    """`rows[:, order]`, whose gradient is gathered, too, instead of scattered."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, order: Tensor, blank: Tensor | None, inverse: Tensor, left_out: Tensor | None
    ) -> Tensor:
        """
        Args:
            rows: (B, M, C).
            order: (N,), which row stands where.
            blank: (N,) bool, where zeros stand instead.
            inverse: (M,), where each row went.
            left_out: (M,) bool, rows that went nowhere.

        Returns:
            (B, N, C).
        """
        ctx.save_for_backward(inverse, left_out)
        return gather_rows(rows, order, blank)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return gather_rows(grad, *ctx.saved_tensors), None, None, None, None


def gather_rows(rows: Tensor, order: Tensor, blank: Tensor | None) -> Tensor:
    """(B, M, C), (N,), (N,) bool -> (B, N, C), zeros where it is blank."""
    gathered = rows.index_select(1, order)
    return gathered if blank is None else gathered.masked_fill_(blank[:, None], 0.0)


def index_windows(
    height: int, width: int, window_size: int, shift: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Which token stands where in the windows of a map that is filled up at the bottom and right, then shifted.

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
    """Inverse of `index_windows`: (windows, N) -> (length,), where each token stands in the flattened windows."""
    order = windows.flatten()
    slots = order.new_empty(length + 1)
    return slots.index_copy_(0, order, torch.arange(order.shape[0], device=order.device))[:length]
