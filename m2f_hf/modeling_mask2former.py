"""The image model, in the order of the paper's figure 2: backbone and `pixel_decoder`, masked-attention decoder, heads.

Paper: Masked-attention Mask Transformer for Universal Image Segmentation, arXiv 2112.01527.
"""

import math
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoBackbone, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from .backbone import load_backbone_weights, read_backbone_config
from .chunking import is_recorded
from .configuration_mask2former import Mask2FormerConfig
from .criterion import Mask2FormerLoss
from .layers import (
    NUM_FEATURE_LEVELS,
    Mask2FormerSinePositionEmbedding,
    SamplingOffsets,
    XavierConv2d,
    XavierLinear,
    ZeroLinear,
    to_tokens,
    with_channels_last,
)
from .padding import (
    PADDING_DIVISOR,
    BackbonePaddingHider,
    hidden_padding,
    image_sizes_from_mask,
    may_hide_padding,
)
from .pixel_decoder import PIXEL_DECODER_CLASSES, Mask2FormerPixelDecoder
from .products import linear
from .swin import feature_maps, use_windowed_layers


# What of a checkpoint cannot be kept under another value of a field.
_DEPENDS_ON_FIELD = {
    "num_labels": ("class_predictor.weight", "class_predictor.bias", "criterion.empty_weight"),
    "num_queries": ("transformer_module.queries_features.weight", "transformer_module.queries_embedder.weight"),
    "no_object_weight": ("criterion.empty_weight",),
}
_DOWNLOAD_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)


# --- Outputs ---------------------------------------------------------------------------------------------------------


@dataclass
class Mask2FormerPixelLevelModuleOutput(ModelOutput):
    """
    Args:
        encoder_last_hidden_state: the backbone's coarsest map (B, C, H/32, W/32).
        encoder_hidden_states: the backbone's four maps, finest first; with `output_hidden_states`.
        decoder_last_hidden_state: mask features (B, mask_feature_size, H/4, W/4).
        decoder_hidden_states: the pixel decoder's three maps, coarsest first.
    """

    encoder_last_hidden_state: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    decoder_last_hidden_state: Tensor | None = None
    decoder_hidden_states: tuple[Tensor, ...] | None = None


class EncodedImages(NamedTuple):
    """What backbone and pixel decoder made of a batch: all that the masked-attention decoder needs to know of it.

    Args:
        pixel_level: their maps.
        image_sizes: (B, 2) int64, height and width of each image before padding.
        hidden_sizes: the same where padding is to be hidden, None where there is none to hide.
    """

    pixel_level: Mask2FormerPixelLevelModuleOutput
    image_sizes: Tensor
    hidden_sizes: Tensor | None


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


@dataclass
class Mask2FormerModelOutput(ModelOutput):
    """
    L = decoder_layers predictions, the first from the raw queries.

    Args:
        encoder_last_hidden_state: the backbone's coarsest map (B, C, H/32, W/32).
        pixel_decoder_last_hidden_state: mask features (B, mask_feature_size, H/4, W/4).
        transformer_decoder_last_hidden_state: (B, Q, hidden_dim), before the final LayerNorm.
        encoder_hidden_states: the backbone's maps, finest first; with `output_hidden_states`.
        pixel_decoder_hidden_states: the pixel decoder's three maps, coarsest first; with `output_hidden_states`.
        transformer_decoder_hidden_states: decoder states (Q, B, hidden_dim); with `output_hidden_states`.
        transformer_decoder_intermediate_states: L normalised states (Q, B, hidden_dim), what the heads read.
        masks_queries_logits: mask logits (B, Q, H/4, W/4) of the last prediction alone, or of all L with
            `output_auxiliary_logits`.
        attentions: self-attention weights (B, heads, Q, Q) of each decoder layer; with `output_attentions`.
        cross_attentions: masked attention weights (B, heads, Q, positions); with `output_attentions`.
        mask_embeddings: L tensors (B, Q, mask_feature_size); their product with the mask features gives mask logits.
        image_sizes: (B, 2) int64, height and width of each image before padding.
    """

    encoder_last_hidden_state: Tensor | None = None
    pixel_decoder_last_hidden_state: Tensor | None = None
    transformer_decoder_last_hidden_state: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    pixel_decoder_hidden_states: tuple[Tensor, ...] | None = None
    transformer_decoder_hidden_states: tuple[Tensor, ...] | None = None
    transformer_decoder_intermediate_states: tuple[Tensor, ...] | None = None
    masks_queries_logits: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    mask_embeddings: tuple[Tensor, ...] | None = None
    image_sizes: Tensor | None = None


@dataclass
class Mask2FormerForUniversalSegmentationOutput(ModelOutput):
    """
    What the `post_process_*` methods of the image processor read.

    Args:
        loss: 0-dim fp32, the weighted sum of `loss_dict`; with labels.
        class_queries_logits: (B, Q, num_labels + 1), the last class is "no object".
        masks_queries_logits: mask logits (B, Q, H/4, W/4).
        auxiliary_logits: the earlier predictions as dicts of the two above; with `output_auxiliary_logits`.
        encoder_last_hidden_state: the backbone's coarsest map (B, C, H/32, W/32).
        pixel_decoder_last_hidden_state: mask features (B, mask_feature_size, H/4, W/4).
        transformer_decoder_last_hidden_state: (B, Q, hidden_dim), before the final LayerNorm.
        encoder_hidden_states: the backbone's maps, finest first; with `output_hidden_states`.
        pixel_decoder_hidden_states: the pixel decoder's maps, coarsest first; with `output_hidden_states`.
        transformer_decoder_hidden_states: decoder states (Q, B, hidden_dim); with `output_hidden_states`.
        attentions: self-attention weights (B, heads, Q, Q) of each decoder layer; with `output_attentions`.
        cross_attentions: masked attention weights (B, heads, Q, positions); with `output_attentions`.
        loss_dict: the unweighted terms, `loss_{cross_entropy,mask,dice}` of the last prediction and the same with
            suffix `_0` (raw queries), `_1`, … of the earlier ones; with labels.
        image_sizes: (B, 2) int64, height and width of each image before padding.
    """

    loss: Tensor | None = None
    class_queries_logits: Tensor | None = None
    masks_queries_logits: Tensor | None = None
    auxiliary_logits: list[dict[str, Tensor]] | None = None
    encoder_last_hidden_state: Tensor | None = None
    pixel_decoder_last_hidden_state: Tensor | None = None
    transformer_decoder_last_hidden_state: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    pixel_decoder_hidden_states: tuple[Tensor, ...] | None = None
    transformer_decoder_hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    loss_dict: dict[str, Tensor] | None = None
    image_sizes: Tensor | None = None


# --- Backbone and pixel decoder ---------------------------------------------------------------------------------------


class Mask2FormerPixelLevelModule(nn.Module):
    """Backbone and pixel decoder."""

    def __init__(self, config: Mask2FormerConfig) -> None:
        super().__init__()
        self.config = config
        backbone_config = config.backbone_config
        assert isinstance(backbone_config, PreTrainedConfig)
        if backbone_config._attn_implementation == "sdpa":
            # Asked for the whole model. Left open, a backbone takes it too, and one that has no such attention none.
            backbone_config._attn_implementation = None
        self.encoder = AutoBackbone.from_config(backbone_config)
        use_windowed_layers(self.encoder)
        self.padding_hider = BackbonePaddingHider(self.encoder)
        self.decoder = PIXEL_DECODER_CLASSES[config.pixel_decoder](config, feature_channels=self.encoder.channels)
        self._freeze()

    def train(self, mode: bool = True) -> "Mask2FormerPixelLevelModule":
        """As `nn.Module.train`; what must not learn is kept from it.

        Loading replaces the parameters by trainable ones and then calls this.
        """
        super().train(mode)
        self._freeze()
        return self

    def _freeze(self) -> None:
        if self.encoder.config.model_type == "swin":
            # Swin's last norm belongs to classification; DDP would wait for its gradient for ever.
            for name, parameter in self.encoder.named_parameters():
                if name.removeprefix("swin.").startswith("layernorm."):
                    parameter.requires_grad_(False)
        if self.config.freeze_backbone_norm:
            for module in self.encoder.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval().requires_grad_(False)

    def _check_strides(self, pixel_values: Tensor, features: tuple[Tensor, ...]) -> None:
        for stride, level in zip(self.config.feature_strides, features, strict=True):
            for length, side in zip(level.shape[2:], pixel_values.shape[2:], strict=True):
                if abs(length * stride - side) >= stride:
                    raise ValueError(
                        f"The backbone's feature maps have the sizes {[tuple(level.shape[2:]) for level in features]}, "
                        f"which are not strides {list(self.config.feature_strides)} of "
                        f"{tuple(pixel_values.shape[2:])}; choose its stages with `out_features` in `backbone_config`."
                    )

    def forward(
        self, pixel_values: Tensor, image_sizes: Tensor | None = None, output_hidden_states: bool = False
    ) -> Mask2FormerPixelLevelModuleOutput:
        """(B, 3, H, W); with (B, 2) image sizes, padding beyond each image's own multiple of 32 is hidden.

        Only with `output_hidden_states` are the backbone's maps returned, of which the decoder needs none.
        """
        self.padding_hider.image_sizes = image_sizes
        self.padding_hider.input_size = (pixel_values.shape[2], pixel_values.shape[3])
        if pixel_values.dtype != torch.float32:
            # A convolutional backbone keeps the layout. In float32 it is as fast in either.
            pixel_values = with_channels_last(pixel_values)
        features = feature_maps(self.encoder, pixel_values)
        if not torch.compiler.is_exporting():  # there a size may be a symbol, which a comparison would pin down
            self._check_strides(pixel_values, features)
        paddings: tuple[Tensor | None, ...] = (None,) * len(features)
        if image_sizes is not None:
            paddings = tuple(
                hidden_padding(image_sizes, stride, (level.shape[2], level.shape[3]))
                for stride, level in zip(self.config.feature_strides, features, strict=True)
            )
        decoded = self.decoder(features, paddings)
        return Mask2FormerPixelLevelModuleOutput(
            encoder_last_hidden_state=features[-1],
            encoder_hidden_states=tuple(features) if output_hidden_states else None,
            decoder_last_hidden_state=decoded.mask_features,
            decoder_hidden_states=decoded.multi_scale_features,
        )


# --- Masked-attention decoder ----------------------------------------------------------------------------------------


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
            split_heads(linear(states, weight, bias), self.config.num_attention_heads)
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
    """Whether to write the attention weights down: chosen so, or asked for them."""
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

        def cross_attention(states: Tensor) -> tuple[Tensor, Tensor | None]:
            query = states + query_position_embeddings
            return self.cross_attn(query, source + source_position_embeddings, source, blocked, output_attentions)

        def self_attention(states: Tensor) -> tuple[Tensor, Tensor | None]:
            return self.self_attn(states, query_position_embeddings, output_attentions)

        def feed_forward(states: Tensor) -> tuple[Tensor, None]:
            return self.fc2(self._drop(self.activation_fn(self.fc1(states)))), None

        hidden_states, cross_weights = self._block(hidden_states, cross_attention, self.cross_attn_layer_norm)
        hidden_states, self_weights = self._block(hidden_states, self_attention, self.self_attn_layer_norm)
        hidden_states, _ = self._block(hidden_states, feed_forward, self.final_layer_norm)
        return hidden_states, self_weights, cross_weights

    def _block(self, hidden_states: Tensor, function: Any, norm: nn.LayerNorm) -> tuple[Tensor, Tensor | None]:
        update, weights = function(norm(hidden_states) if self.pre_norm else hidden_states)
        hidden_states = hidden_states + self._drop(update)
        return (hidden_states if self.pre_norm else norm(hidden_states)), weights

    def _drop(self, hidden_states: Tensor) -> Tensor:
        # Asked only where there is something to drop: without, it would copy.
        return nn.functional.dropout(hidden_states, self.dropout) if self.training and self.dropout else hidden_states


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


def mask_logits(embeddings: Tensor, features: Tensor) -> Tensor:
    """(B, Q, C) x (B, C, S) -> (B, Q, S)."""
    if embeddings.device.type == "cpu" and not is_recorded() and len(embeddings) == 1:
        # In bfloat16 seven times as fast as the product of a batch of one, which copies the features.
        return linear(embeddings[0], features[0].T)[None]
    return embeddings @ features


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
        """Where a query must not look: (B, Q, C), (B, C, S), (B, S) True = padding -> (B, 1, Q, S), True = blocked.

        Blocked is where the mask probability is below one half (equation 3). A query whose mask is empty on this level
        looks everywhere. `level_features` are the mask features resized to the level: resizing is linear in space and
        the product linear in the channels, so the resized features give the resized logits.
        """
        # (B, Q, C) x (B, C, S) -> (B, Q, S)
        logits = mask_logits(mask_embeddings, level_features)
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
        sources: list[Tensor],
        source_position_embeddings: list[Tensor],
        level_features: list[Tensor],
        paddings: tuple[Tensor | None, ...],
        output_attentions: bool = False,
    ) -> Mask2FormerMaskedAttentionDecoderOutput:
        """Queries (B, Q, C) and (Q, C) read three levels in turn, coarsest first: each a source (B, S, C), its encoding
        (1 or B, S, C), the mask features at its size (B, mask_feature_size, S) and its padding (B, S)."""
        all_states, self_weights, cross_weights = [hidden_states], [], []
        intermediate = [self.layernorm(hidden_states)]
        mask_embeddings = [self.mask_predictor(intermediate[0])]
        for index, layer in enumerate(self.layers):
            level = index % len(sources)
            blocked = self.mask_predictor.blocked_positions(mask_embeddings[-1], level_features[level], paddings[level])
            hidden_states, layer_self_weights, layer_cross_weights = layer(
                hidden_states,
                query_position_embeddings,
                sources[level],
                source_position_embeddings[level],
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


def shrink(features: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resizing of (B, C, H, W) to a smaller size.

    Where a side is an even multiple of the smaller one, that is the mean of the four pixels around each middle. On the
    CPU it is several times faster said this way.
    """
    batch, channels, height, width = features.shape
    if features.device.type == "cpu" and features.dtype == torch.float32 and not torch.compiler.is_exporting():
        steps = height // size[0], width // size[1]
        if steps[0] % 2 == steps[1] % 2 == 0 and (height, width) == (steps[0] * size[0], steps[1] * size[1]):
            middles = features.view(batch, channels, size[0], steps[0], size[1], steps[1])
            upper, lower = middles[..., steps[0] // 2 - 1, :, :], middles[..., steps[0] // 2, :, :]
            right = steps[1] // 2
            upper = upper[..., right - 1] + upper[..., right]
            return (upper + (lower[..., right - 1] + lower[..., right])).mul_(0.25)
    return nn.functional.interpolate(features, size, mode="bilinear", align_corners=False)


class Mask2FormerTransformerModule(nn.Module):
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

    def train(self, mode: bool = True) -> "Mask2FormerTransformerModule":
        """As `nn.Module.train`; what must not learn is kept from it.

        Loading replaces the parameters by trainable ones and then calls this.
        """
        super().train(mode)
        self._freeze()
        return self

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
        sources, encodings, level_features, paddings = [], [], [], []
        for index, features in enumerate(multi_scale_features):
            size = (features.shape[-2], features.shape[-1])
            padding = None if image_sizes is None else hidden_padding(image_sizes, PADDING_DIVISOR >> index, size)
            encodings.append(to_tokens(self.position_embedder(features, padding)))
            # The level embedding joins the source, so it reaches keys and values.
            projected = self.input_projections[index](features.flatten(0, -4)).unflatten(0, leading)
            sources.append(to_tokens(projected) + self.level_embed.weight[index])
            shrunk = shrink(mask_features.detach().flatten(0, -4), size).unflatten(0, leading)
            level_features.append(to_tokens(shrunk).transpose(1, 2))
            paddings.append(None if padding is None else padding.flatten(1).repeat(1, math.prod(leading[1:])))
        return self.decoder(
            self.queries_features.weight.expand(mask_features.shape[0], -1, -1),
            self.queries_embedder.weight,
            sources,
            encodings,
            level_features,
            tuple(paddings),
            output_attentions=output_attentions,
        )


# --- Models ----------------------------------------------------------------------------------------------------------


class Mask2FormerPreTrainedModel(PreTrainedModel):
    config: Mask2FormerConfig
    config_class = Mask2FormerConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ["image"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    # Swin's last norm belongs to classification: no original checkpoint has it.
    _keys_to_ignore_on_load_missing = [r"encoder\.(swin\.)?layernorm\."]  # noqa: RUF012
    # Computed from the window size; checkpoints written by transformers 4.2x have it.
    _keys_to_ignore_on_load_unexpected = [r"\.relative_position_index$"]  # noqa: RUF012
    _no_split_modules = ["Mask2FormerPixelDecoderEncoderLayer", "Mask2FormerMaskedAttentionDecoderLayer"]  # noqa: RUF012

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # transformers looks for its attention interface in this file; ours reads the setting at each call just as well.
        return True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """As in `transformers`; but heads that the caller gives another size start anew without a flag.

        With `num_labels`, `id2label`, `num_queries` or a `config` that differ from the checkpoint's in the number of
        labels or queries, the class head (and the weights of its loss) or the queries get this model's first weights.
        `transformers` reports them by name, and `output_loading_info` has them as "mismatched_keys". Everything else
        is the checkpoint's. Other names for as many labels replace nothing, and another `no_object_weight` reaches the
        loss.

        Raises:
            RuntimeError: anything else has another shape than the checkpoint's.
        """
        replaced = cls._replaced_parameters(pretrained_model_name_or_path, kwargs)
        replaces_more = bool(kwargs.pop("ignore_mismatched_sizes", False))
        wants_info = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(
            pretrained_model_name_or_path,
            *model_args,
            ignore_mismatched_sizes=replaces_more or bool(replaced),
            output_loading_info=True,
            **kwargs,
        )
        model, info = loaded
        others = sorted(entry[0] for entry in info["mismatched_keys"] if not entry[0].endswith(replaced))
        if others and not replaces_more:
            raise RuntimeError(
                f"{len(others)} parameters have other shapes in {pretrained_model_name_or_path}, beside those that "
                f"another number of labels or queries replaces: {others[:5]}. Give them the checkpoint's sizes, or "
                "replace them too with `ignore_mismatched_sizes=True`."
            )
        if "criterion.empty_weight" in replaced and hasattr(model, "criterion"):
            model.criterion.empty_weight[-1] = model.config.no_object_weight
        return (model, info) if wants_info else model

    @classmethod
    def _replaced_parameters(cls, name: Any, kwargs: dict[str, Any]) -> tuple[str, ...]:
        """Ends of the names of what cannot stay as it is in the checkpoint, by the fields that the caller changes."""
        config = kwargs.get("config")
        if isinstance(config, PreTrainedConfig):
            wanted = {field: getattr(config, field) for field in _DEPENDS_ON_FIELD}
        else:
            wanted = {field: kwargs[field] for field in _DEPENDS_ON_FIELD if kwargs.get(field) is not None}
            if kwargs.get("id2label") is not None:
                wanted["num_labels"] = len(kwargs["id2label"])
        if name is None or not wanted:
            return ()
        own = cls.config_class.from_pretrained(name, **_download_arguments(kwargs))
        return tuple(
            parameter
            for field, value in wanted.items()
            if value != getattr(own, field)
            for parameter in _DEPENDS_ON_FIELD[field]
        )

    @classmethod
    def from_backbone(
        cls, backbone_name_or_path: Any, *, backbone_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> Any:
        """A new model around a pretrained backbone, in evaluation mode: the start of training on a data set.

        Args:
            backbone_name_or_path: id on the Hub or folder of a model whose body `AutoBackbone` knows: a classifier
                such as "microsoft/swin-tiny-patch4-window7-224", or one without its head.
            backbone_kwargs: fields of the backbone's configuration, such as `drop_path_rate`.
            kwargs: fields of [`Mask2FormerConfig`], `num_labels` and `id2label` among them, and the `revision`,
                `token`, `cache_dir`, `subfolder`, `force_download` and `local_files_only` of a download.

        Raises:
            TypeError: an argument that is no field of the configuration.
            ValueError: the backbone has no maps at strides 4, 8, 16 and 32 (a plain ViT has one), or lacks weights.
            OSError: there is no such checkpoint.
        """
        download = _download_arguments(kwargs)
        settings = {name: value for name, value in kwargs.items() if name not in download}
        known = {field.name for field in fields(cls.config_class)} | {"num_labels"}
        for name in settings:
            if name not in known - {"backbone_config"}:
                raise TypeError(f"`{name}` is no field of {cls.config_class.__name__}.")
        backbone_config = read_backbone_config(backbone_name_or_path, backbone_kwargs, download)
        weights = load_backbone_weights(backbone_name_or_path, backbone_config, download).state_dict()
        model: Any = cls(cls.config_class(backbone_config=backbone_config, **settings))
        model.base_model.pixel_level_module.encoder.load_state_dict(weights)
        return model.eval()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The original's initial weights; what it leaves at PyTorch's defaults is left there."""
        if isinstance(module, SamplingOffsets):
            init.zeros_(module.weight)
            init.copy_(module.bias, module.first_bias())
        elif isinstance(module, ZeroLinear):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, XavierLinear):
            init.xavier_uniform_(module.weight, gain=self.config.init_xavier_std)
            init.zeros_(module.bias) if module.zero_bias else self._init_bias(module)
        elif isinstance(module, nn.Linear):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            self._init_bias(module)
        elif isinstance(module, Mask2FormerMaskedAttention):
            init.xavier_uniform_(module.in_proj_weight, gain=self.config.init_xavier_std)
            init.zeros_(module.in_proj_bias)
        elif isinstance(module, nn.Conv2d):
            if isinstance(module, XavierConv2d):
                init.xavier_uniform_(module.weight)
            else:
                init.kaiming_uniform_(module.weight, a=1)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, Mask2FormerPixelDecoder):
            init.normal_(module.level_embed)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight)
        elif isinstance(module, Mask2FormerLoss):
            weights = torch.ones_like(module.empty_weight)
            weights[-1] = self.config.no_object_weight
            init.copy_(module.empty_weight, weights)
        else:
            super()._init_weights(module)

    @staticmethod
    def _init_bias(module: nn.Linear) -> None:
        bound = module.in_features**-0.5
        init.uniform_(module.bias, -bound, bound)


def _download_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: kwargs[name] for name in _DOWNLOAD_ARGUMENTS if name in kwargs}


class Mask2FormerModel(Mask2FormerPreTrainedModel):
    """Backbone, pixel decoder and masked-attention decoder; the class head is the next class's."""

    # Checkpoints are those of the next class: what they have beyond this one is no surprise.
    _keys_to_ignore_on_load_unexpected = [r"^class_predictor\.", r"^criterion\.", r"\.relative_position_index$"]  # noqa: RUF012
    pixel_level_class = Mask2FormerPixelLevelModule

    def __init__(self, config: Mask2FormerConfig) -> None:
        super().__init__(config)
        self.pixel_level_module = self.pixel_level_class(config)
        self.transformer_module = Mask2FormerTransformerModule(in_features=config.feature_size, config=config)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_auxiliary_logits: bool | None = None,
        return_dict: bool | None = None,
    ) -> Mask2FormerModelOutput | tuple[Any, ...]:
        """
        Args:
            pixel_values: (B, 3, H, W), normalised, padded at the bottom and right (to a multiple of 32, as the
                processor does).
            pixel_mask: (B, H, W), nonzero where the image is. With it, padding beyond each image's own multiple of 32
                is hidden, so that an image gives in a batch what it gives alone. Without it, the original's arithmetic:
                padding is image.
            output_hidden_states: whether to return the states of all parts.
            output_attentions: whether to return attention weights (computed eagerly then).
            output_auxiliary_logits: whether to return the mask logits of all predictions.
            return_dict: whether to return an output object or a tuple of what is not None.

        Raises:
            ValueError: `pixel_values` or `pixel_mask` has another shape.
        """
        config = self.config
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        if output_auxiliary_logits is None:
            output_auxiliary_logits = config.output_auxiliary_logits
        return_dict = config.return_dict if return_dict is None else return_dict
        encoded = self.encode(pixel_values, pixel_mask, bool(output_hidden_states))
        output = self.decode(
            encoded, bool(output_hidden_states), bool(output_attentions), bool(output_auxiliary_logits)
        )
        return output if return_dict else output.to_tuple()

    def encode(
        self, pixel_values: Tensor, pixel_mask: Tensor | None = None, output_hidden_states: bool = False
    ) -> EncodedImages:
        """The first half of `forward`: backbone and pixel decoder."""
        image_sizes = self._image_sizes(pixel_values, pixel_mask)
        # Processors give float32; a model in half precision takes it.
        pixel_values = pixel_values.to(self.dtype)
        hidden_sizes = image_sizes if may_hide_padding(pixel_values, pixel_mask, image_sizes) else None
        pixel_level = self.pixel_level_module(pixel_values, hidden_sizes, output_hidden_states)
        return EncodedImages(pixel_level, image_sizes, hidden_sizes)

    def decode(
        self,
        encoded: EncodedImages,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        output_auxiliary_logits: bool = False,
    ) -> Mask2FormerModelOutput:
        """The second half of `forward`: the masked-attention decoder."""
        pixel_level, image_sizes, hidden_sizes = encoded
        mask_features = pixel_level.decoder_last_hidden_state
        assert mask_features is not None
        decoded = self.transformer_module(
            pixel_level.decoder_hidden_states, mask_features, hidden_sizes, output_attentions=output_attentions
        )
        wanted = decoded.mask_embeddings if output_auxiliary_logits else decoded.mask_embeddings[-1:]
        map_size = mask_features.shape[1:-3] + mask_features.shape[-2:]  # (H, W), of clips (T, H, W)
        features = to_tokens(mask_features).transpose(1, 2)
        return Mask2FormerModelOutput(
            encoder_last_hidden_state=pixel_level.encoder_last_hidden_state,
            pixel_decoder_last_hidden_state=mask_features,
            transformer_decoder_last_hidden_state=decoded.last_hidden_state,
            encoder_hidden_states=pixel_level.encoder_hidden_states,
            pixel_decoder_hidden_states=pixel_level.decoder_hidden_states if output_hidden_states else None,
            transformer_decoder_hidden_states=decoded.hidden_states if output_hidden_states else None,
            transformer_decoder_intermediate_states=decoded.intermediate_hidden_states,
            # (B, Q, H, W), of a clip (B, Q, T, H, W); of one prediction unless all are wanted. The loss does not read
            # it, but callers of either mode expect an output to have its masks.
            masks_queries_logits=tuple(
                mask_logits(embeddings, features).unflatten(2, map_size) for embeddings in wanted
            ),
            attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
            mask_embeddings=decoded.mask_embeddings,
            image_sizes=image_sizes,
        )

    @staticmethod
    def _image_sizes(pixel_values: Tensor, pixel_mask: Tensor | None) -> Tensor:
        if pixel_values.dim() != 4:
            raise ValueError(
                f"`pixel_values` has shape {tuple(pixel_values.shape)}, expected (batch, channels, height, width); "
                "add the batch with `pixel_values[None]`."
            )
        batch, _, height, width = pixel_values.shape
        if pixel_mask is None:
            # Filled on the device: uploading them would make the host wait.
            sides = [torch.full((batch,), side, device=pixel_values.device) for side in (height, width)]
            return torch.stack(sides, dim=1)
        if pixel_mask.shape != (batch, height, width):
            raise ValueError(
                f"`pixel_mask` has shape {tuple(pixel_mask.shape)}, expected {(batch, height, width)} like "
                "`pixel_values`; pass both as the image processor returned them."
            )
        return image_sizes_from_mask(pixel_mask)


class Mask2FormerForUniversalSegmentation(Mask2FormerPreTrainedModel):
    """[`Mask2FormerModel`] with a class head and the losses, for panoptic, instance and semantic segmentation."""

    model_class = Mask2FormerModel

    def __init__(self, config: Mask2FormerConfig) -> None:
        super().__init__(config)
        self.model = self.model_class(config)
        self.weight_dict: dict[str, float] = {
            "loss_cross_entropy": config.class_weight,
            "loss_mask": config.mask_weight,
            "loss_dice": config.dice_weight,
        }
        num_labels: int = config.num_labels  # type: ignore[assignment]
        self.class_predictor = nn.Linear(config.hidden_dim, num_labels + 1)
        self.criterion = Mask2FormerLoss(config=config, weight_dict=self.weight_dict)
        self.post_init()

    def get_loss(self, loss_dict: dict[str, Tensor]) -> Tensor:
        """Weighted sum of the terms; `loss_mask_3` has the weight of `loss_mask`."""
        weighted = [
            weight * loss
            for name, weight in self.weight_dict.items()
            for key, loss in loss_dict.items()
            if key.startswith(name)
        ]
        return torch.stack(weighted).sum()

    def forward(
        self,
        pixel_values: Tensor,
        mask_labels: list[Tensor] | None = None,
        class_labels: list[Tensor] | None = None,
        pixel_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_auxiliary_logits: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> Mask2FormerForUniversalSegmentationOutput | tuple[Any, ...]:
        """
        Args:
            pixel_values: (B, 3, H, W), normalised, padded at the bottom and right.
            mask_labels: for each image a (N, H, W) tensor of N target masks, bool, uint8 or float.
            class_labels: for each image (N,) int64, the class of each mask, in [0, num_labels).
            pixel_mask: (B, H, W), nonzero where the image is; see [`Mask2FormerModel.forward`].
            output_hidden_states: whether to return the states of all parts.
            output_auxiliary_logits: whether to return the logits of all predictions.
            output_attentions: whether to return attention weights (computed eagerly then).
            return_dict: whether to return an output object or a tuple of what is not None, the loss first.

        Raises:
            ValueError: the inputs' shapes or the labels' range are wrong, or one kind of labels is missing.
        """
        if (mask_labels is None) != (class_labels is None):
            missing = "mask_labels" if mask_labels is None else "class_labels"
            raise ValueError(f"`{missing}` is missing: the loss needs `mask_labels` and `class_labels`, or neither.")
        config = self.config
        return_dict = config.return_dict if return_dict is None else return_dict
        if output_auxiliary_logits is None:
            output_auxiliary_logits = config.output_auxiliary_logits
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        outputs = self.model(
            pixel_values,
            pixel_mask=pixel_mask,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            output_auxiliary_logits=output_auxiliary_logits,
            return_dict=True,
        )
        output = self.predict(outputs, mask_labels, class_labels, bool(output_auxiliary_logits))
        return output if return_dict else output.to_tuple()

    def predict(
        self,
        outputs: Any,  # a Mask2FormerModelOutput, any field of which may be None to a type checker
        mask_labels: list[Tensor] | None = None,
        class_labels: list[Tensor] | None = None,
        output_auxiliary_logits: bool = False,
    ) -> Mask2FormerForUniversalSegmentationOutput:
        """What `forward` makes of the base model's outputs: classes and, with labels, losses."""
        loss = loss_dict = None
        supervised = mask_labels is not None and self.config.use_auxiliary_loss
        wanted = slice(None) if supervised or output_auxiliary_logits else slice(-1, None)
        states = torch.stack(outputs.transformer_decoder_intermediate_states[wanted])
        class_logits = self.class_predictor(states.transpose(1, 2))  # (L or 1, B, Q, num_labels + 1)
        if mask_labels is not None:
            predictions = slice(None) if supervised else slice(-1, None)
            loss_dict = self.criterion(
                class_queries_logits=class_logits[predictions],
                mask_embeddings=torch.stack(outputs.mask_embeddings[predictions]),
                mask_features=outputs.pixel_decoder_last_hidden_state,
                mask_labels=mask_labels,
                class_labels=class_labels,
            )
            loss = self.get_loss(loss_dict)

        auxiliary_logits = None
        if output_auxiliary_logits:
            auxiliary_logits = [
                {"masks_queries_logits": masks, "class_queries_logits": classes}
                for masks, classes in zip(outputs.masks_queries_logits[:-1], class_logits[:-1], strict=True)
            ]
        return Mask2FormerForUniversalSegmentationOutput(
            loss=loss,
            class_queries_logits=class_logits[-1],
            masks_queries_logits=outputs.masks_queries_logits[-1],
            auxiliary_logits=auxiliary_logits,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            pixel_decoder_last_hidden_state=outputs.pixel_decoder_last_hidden_state,
            transformer_decoder_last_hidden_state=outputs.transformer_decoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states,
            pixel_decoder_hidden_states=outputs.pixel_decoder_hidden_states,
            transformer_decoder_hidden_states=outputs.transformer_decoder_hidden_states,
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
            loss_dict=loss_dict,
            image_sizes=outputs.image_sizes,
        )


__all__ = ["Mask2FormerForUniversalSegmentation", "Mask2FormerModel", "Mask2FormerPreTrainedModel"]
