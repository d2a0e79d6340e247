"""The masked-attention decoder (paper, section 3.2): queries read three levels in turn, each where its mask is."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from .configuration import Mask2FormerConfig
from .layers import NUM_FEATURE_LEVELS, Mask2FormerSinePositionEmbedding, PartlyFrozen, XavierLinear, to_tokens
from .padding import PADDING_DIVISOR, hidden_padding


@dataclass
class Mask2FormerMaskedAttentionDecoderOutput(ModelOutput):
    """
    L = decoder_layers predictions, the first from the raw queries.

    Args:
        last_hidden_state: (B, Q, hidden_dim), before the final LayerNorm.
        hidden_states: decoder layers' inputs and the last output, (Q, B, hidden_dim) each.
        attentions: self-attention weights of each layer, (B, heads, Q, Q).
        cross_attentions: masked attention weights of each layer, (B, heads, Q, height x width of its level).
        intermediate_hidden_states: L normalised states (Q, B, hidden_dim), what the heads read.
        mask_embeddings: L tensors (B, Q, mask_feature_size).
    """

    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    intermediate_hidden_states: tuple[Tensor, ...] | None = None
    mask_embeddings: tuple[Tensor, ...] | None = None


class Level(NamedTuple):
    """What the queries read at one of the three scales, S positions of an image or of all frames of a clip.

    Args:
        source: (B, S, C), keys and values.
        position_embeddings: (1 or B, S, C), join the keys.
        mask_features: (B, mask_feature_size, S), resized to this scale.
        padding: (B, S) bool, True = padding; None: there is none.
    """

    source: Tensor
    position_embeddings: Tensor
    mask_features: Tensor
    padding: Tensor | None


def attend(
    query: Tensor, key: Tensor, value: Tensor, blocked: Tensor | None, dropout: float, eager: bool
) -> tuple[Tensor, Tensor | None]:
    """Multi-head attention: (B, heads, Q, D), (B, heads, S, D) twice, (B, 1, Q, S) True = blocked -> (B, Q, heads * D).

    The second value holds the weights (B, heads, Q, S) in eager attention, None otherwise.
    """
    weights = None
    if eager:
        scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
        if blocked is not None:
            scores = scores.masked_fill(blocked, float("-inf"))
        weights = nn.functional.dropout(scores.float().softmax(-1).to(query.dtype), dropout)
        output = weights @ value
    else:
        attendable = None if blocked is None else ~blocked
        output = nn.functional.scaled_dot_product_attention(query, key, value, attendable, dropout)
    return output.transpose(1, 2).flatten(2), weights


class Mask2FormerAttention(nn.Module):
    """Self-attention of the queries; their position embeddings join queries and keys, not values."""

    def __init__(self, config: Mask2FormerConfig) -> None:
        super().__init__()
        width = config.hidden_dim
        self.config = config
        self.k_proj = XavierLinear(width, width)
        self.v_proj = XavierLinear(width, width)
        self.q_proj = XavierLinear(width, width)
        self.out_proj = XavierLinear(width, width)

    def forward(
        self, hidden_states: Tensor, query_position_embeddings: Tensor, output_attentions: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """(B, Q, C), (Q, C) -> (B, Q, C) and the weights (B, heads, Q, Q) in eager attention."""
        positioned = hidden_states + query_position_embeddings
        query, key, value = (
            split_heads(projection, self.config.num_attention_heads)
            for projection in (self.q_proj(positioned), self.k_proj(positioned), self.v_proj(hidden_states))
        )
        dropout = self.config.dropout if self.training else 0.0
        output, weights = attend(query, key, value, None, dropout, is_eager(self.config, output_attentions))
        return self.out_proj(output), weights


class Mask2FormerMaskedAttention(nn.Module):
    """Cross-attention that reads a level only where the previous mask is (equation 2).

    The parameters are named and laid out as in `nn.MultiheadAttention`.
    """

    def __init__(self, config: Mask2FormerConfig) -> None:
        super().__init__()
        width = config.hidden_dim
        self.config = config
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = XavierLinear(width, width)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, blocked: Tensor, output_attentions: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """(B, Q, C), (B, S, C) twice, (B, 1, Q, S) True = blocked -> (B, Q, C) and, eager, (B, heads, Q, S) weights."""
        query, key, value = (
            split_heads(nn.functional.linear(states, weight, bias), self.config.num_attention_heads)
            for states, weight, bias in zip(
                (query, key, value), self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3), strict=True
            )
        )
        dropout = self.config.dropout if self.training else 0.0
        output, weights = attend(query, key, value, blocked, dropout, is_eager(self.config, output_attentions))
        return self.out_proj(output), weights


def split_heads(states: Tensor, num_heads: int) -> Tensor:
    """(B, N, C) -> (B, heads, N, C / heads)."""
    return states.unflatten(2, (num_heads, -1)).transpose(1, 2)


def is_eager(config: Mask2FormerConfig, output_attentions: bool) -> bool:
    """Return whether the attention weights are computed as a tensor: by configuration, or because they are returned."""
    return output_attentions or config._attn_implementation == "eager"


class Mask2FormerMaskedAttentionDecoderLayer(GradientCheckpointingLayer):
    """Masked cross-attention, self-attention, feed-forward: that order (section 3.2.3)."""

    def __init__(self, config: Mask2FormerConfig) -> None:
        super().__init__()
        width = config.hidden_dim
        self.pre_norm = config.pre_norm
        self.dropout = config.dropout
        self.activation_fn = ACT2FN[config.activation_function]
        self.cross_attn = Mask2FormerMaskedAttention(config)
        self.cross_attn_layer_norm = nn.LayerNorm(width)
        self.self_attn = Mask2FormerAttention(config)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = XavierLinear(width, config.dim_feedforward, zero_bias=False)
        self.fc2 = XavierLinear(config.dim_feedforward, width, zero_bias=False)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(
        self,
        hidden_states: Tensor,
        query_position_embeddings: Tensor,
        source: Tensor,
        source_position_embeddings: Tensor,
        blocked: Tensor,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(B, Q, C), (Q, C), level (B, S, C), its encoding (1 or B, S, C), (B, 1, Q, S) True = blocked.

        Returns:
            (B, Q, C), and self- and cross-attention weights in eager attention.
        """
        states = self._before(self.cross_attn_layer_norm, hidden_states)
        attended, cross_weights = self.cross_attn(
            states + query_position_embeddings, source + source_position_embeddings, source, blocked, output_attentions
        )
        hidden_states = self._after(self.cross_attn_layer_norm, hidden_states, attended)
        states = self._before(self.self_attn_layer_norm, hidden_states)
        attended, self_weights = self.self_attn(states, query_position_embeddings, output_attentions)
        hidden_states = self._after(self.self_attn_layer_norm, hidden_states, attended)
        states = self._before(self.final_layer_norm, hidden_states)
        update = self.fc2(self._drop(self.activation_fn(self.fc1(states))))
        return self._after(self.final_layer_norm, hidden_states, update), self_weights, cross_weights

    def _before(self, norm: nn.LayerNorm, hidden_states: Tensor) -> Tensor:
        return norm(hidden_states) if self.pre_norm else hidden_states

    def _after(self, norm: nn.LayerNorm, hidden_states: Tensor, update: Tensor) -> Tensor:
        hidden_states = hidden_states + self._drop(update)
        return hidden_states if self.pre_norm else norm(hidden_states)

    def _drop(self, hidden_states: Tensor) -> Tensor:
        return nn.functional.dropout(hidden_states, self.dropout, self.training)


class Mask2FormerPredictionBlock(nn.Sequential):
    """Linear layer and activation, named as one block of `transformers`' prediction head."""

    def __init__(self, in_dim: int, out_dim: int, activation: nn.Module) -> None:
        super().__init__(nn.Linear(in_dim, out_dim), activation)


class Mask2FormerMLPPredictionHead(nn.Sequential):
    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int) -> None:
        super().__init__(
            Mask2FormerPredictionBlock(input_dim, hidden_dim, nn.ReLU()),
            Mask2FormerPredictionBlock(hidden_dim, hidden_dim, nn.ReLU()),
            Mask2FormerPredictionBlock(hidden_dim, output_dim, nn.Identity()),
        )


class Mask2FormerMaskPredictor(nn.Module):
    def __init__(self, config: Mask2FormerConfig) -> None:
        super().__init__()
        self.mask_embedder = Mask2FormerMLPPredictionHead(
            config.hidden_dim, config.hidden_dim, config.mask_feature_size
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Mask embeddings: (B, Q, hidden_dim) -> (B, Q, mask_feature_size)."""
        return self.mask_embedder(hidden_states)

    @staticmethod
    @torch.no_grad()
    def blocked_positions(mask_embeddings: Tensor, level_features: Tensor, padding: Tensor | None) -> Tensor:
        """Find where a query must not look: (B, Q, C), (B, C, S), (B, S) True = padding -> (B, 1, Q, S) True = blocked.

        Blocked is where the mask probability is below one half (equation 3). A query whose mask is empty on this level
        looks everywhere. `level_features` are the mask features resized to the level: resizing is linear in space and
        the product linear in the channels, so the resized features give the resized logits.
        """
        # (B, Q, C) x (B, C, S) -> (B, Q, S)
        logits = mask_embeddings @ level_features
        if padding is not None:
            logits.masked_fill_(padding[:, None], -1.0)
        highest = logits.amax(dim=-1, keepdim=True)
        blocked = logits < torch.zeros_like(highest).masked_fill_(highest < 0, float("-inf"))
        if padding is not None:
            blocked |= padding[:, None]
        return blocked[:, None]


class Mask2FormerMaskedAttentionDecoder(nn.Module):
    def __init__(self, config: Mask2FormerConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [Mask2FormerMaskedAttentionDecoderLayer(config) for _ in range(config.decoder_layers - 1)]
        )
        self.layernorm = nn.LayerNorm(config.hidden_dim)
        self.mask_predictor = Mask2FormerMaskPredictor(config)

    def forward(
        self,
        hidden_states: Tensor,
        query_position_embeddings: Tensor,
        levels: list[Level],
        output_attentions: bool = False,
    ) -> Mask2FormerMaskedAttentionDecoderOutput:
        """Queries (B, Q, C) and their encoding (Q, C) read three levels in turn, coarsest first."""
        all_states, self_weights, cross_weights = [hidden_states], [], []
        intermediate = [self.layernorm(hidden_states)]
        mask_embeddings = [self.mask_predictor(intermediate[0])]
        for index, layer in enumerate(self.layers):
            level = levels[index % len(levels)]
            blocked = self.mask_predictor.blocked_positions(mask_embeddings[-1], level.mask_features, level.padding)
            hidden_states, layer_self_weights, layer_cross_weights = layer(
                hidden_states,
                query_position_embeddings,
                level.source,
                level.position_embeddings,
                blocked,
                output_attentions,
            )
            all_states.append(hidden_states)
            self_weights.append(layer_self_weights)
            cross_weights.append(layer_cross_weights)
            intermediate.append(self.layernorm(hidden_states))
            mask_embeddings.append(self.mask_predictor(intermediate[-1]))
        return Mask2FormerMaskedAttentionDecoderOutput(
            last_hidden_state=hidden_states,
            hidden_states=tuple(states.transpose(0, 1) for states in all_states),
            attentions=tuple(self_weights) if output_attentions else None,
            cross_attentions=tuple(cross_weights) if output_attentions else None,
            intermediate_hidden_states=tuple(states.transpose(0, 1) for states in intermediate),
            mask_embeddings=tuple(mask_embeddings),
        )


class Mask2FormerTransformerModule(PartlyFrozen):
    """Object queries, and what the masked-attention decoder reads of each level."""

    def __init__(self, in_features: int, config: Mask2FormerConfig) -> None:
        super().__init__()
        width = config.hidden_dim
        self.position_embedder = Mask2FormerSinePositionEmbedding(width // 2)
        self.queries_embedder = nn.Embedding(config.num_queries, width)
        self.queries_features = nn.Embedding(config.num_queries, width)
        project = in_features != width or config.enforce_input_projection
        self.input_projections = nn.ModuleList(
            [
                nn.Conv2d(in_features, width, kernel_size=1) if project else nn.Sequential()
                for _ in range(NUM_FEATURE_LEVELS)
            ]
        )
        self.decoder = Mask2FormerMaskedAttentionDecoder(config)
        self.level_embed = nn.Embedding(NUM_FEATURE_LEVELS, width)
        self._freeze()

    def _freeze(self) -> None:
        # What no layer of a shallow decoder reads; DDP would wait for its gradient for ever.
        num_layers = len(self.decoder.layers)
        self.input_projections[num_layers:].requires_grad_(False)
        if num_layers == 0:
            self.queries_embedder.requires_grad_(False)
            self.level_embed.requires_grad_(False)

    def forward(
        self,
        multi_scale_features: tuple[Tensor, ...],
        mask_features: Tensor,
        image_sizes: Tensor | None = None,
        output_attentions: bool = False,
    ) -> Mask2FormerMaskedAttentionDecoderOutput:
        """Three maps (B, feature_size, H, W), coarsest first, and mask features (B, mask_feature_size, H/4, W/4).

        Of a clip, whose queries read all frames at once, (B, T, …) each; its frames have one size and padding.
        """
        leading = mask_features.shape[:-3]  # (B,), of clips (B, T)
        levels = []
        for index, features in enumerate(multi_scale_features):
            size = (features.shape[-2], features.shape[-1])
            padding = None if image_sizes is None else hidden_padding(image_sizes, PADDING_DIVISOR >> index, size)
            projected = self.input_projections[index](features.flatten(0, -4)).unflatten(0, leading)
            resized = nn.functional.interpolate(mask_features.detach().flatten(0, -4), size, mode="bilinear")
            levels.append(
                Level(
                    # The level embedding joins the source, so it reaches keys and values.
                    source=to_tokens(projected) + self.level_embed.weight[index],
                    position_embeddings=to_tokens(self.position_embedder(features, padding)),
                    mask_features=to_tokens(resized.unflatten(0, leading)).transpose(1, 2),
                    padding=None if padding is None else padding.flatten(1).repeat(1, math.prod(leading[1:])),
                )
            )
        return self.decoder(
            self.queries_features.weight.expand(mask_features.shape[0], -1, -1),
            self.queries_embedder.weight,
            levels,
            output_attentions,
        )
