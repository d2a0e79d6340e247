"""The image model, in the order of the paper's figure 2: backbone, pixel decoder, masked-attention decoder, heads.

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
from .chunking import is_recorded, learns_in_pieces, pieces, works_in_pieces
from .configuration_mask2former import NUM_NORM_GROUPS, Mask2FormerConfig
from .convolution import TiledConv2d
from .criterion import Mask2FormerLoss
from .deformable_layer import DeformableLayer, EncodedPlaces, LayerWeights
from .feed_forward import feed_forward, is_plain
from .group_norm import ChannelsLastGroupNorm, normalise_groups, normalises_channels_last
from .multi_scale_deformable_attention import (
    GatherTable,
    deformable_attention_at_offsets,
    form_for,
    points_in_maps,
    softmax_over_samples,
)
from .padding import (
    PADDING_DIVISOR,
    BackbonePaddingHider,
    continue_edges,
    hidden_padding,
    image_sizes_from_mask,
    masked_group_norm,
    may_hide_padding,
)
from .swin import feature_maps, to_map, use_windowed_layers


NUM_FEATURE_LEVELS = 3  # strides 32, 16 and 8 feed the decoder (paper, section 3.2.2)
NUM_SAMPLING_POINTS = 4  # of deformable attention, for each head and level

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
class Mask2FormerPixelDecoderOutput(ModelOutput):
    """
    Args:
        multi_scale_features: three maps (B, feature_size, H/32, W/32), (…, H/16, W/16), (…, H/8, W/8).
        mask_features: (B, mask_feature_size, H/4, W/4).
    """

    multi_scale_features: tuple[Tensor, ...] | None = None
    mask_features: Tensor | None = None


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


# --- Layers that differ in their first weights alone -----------------------------------------------------------------
# transformers asks for the first weights of one module after another, and passes over those that own no parameter: what
# is special about a layer's start must be known from the layer itself.


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


class ZeroLinear(nn.Linear):
    """Linear layer that starts at zero: deformable attention begins with equal weights."""


class SamplingOffsets(nn.Linear):
    """Offsets that start constant: heads look in different directions, points at growing distance.

    That is the start of deformable attention (arXiv 2010.04159, appendix A.4).
    """

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


# --- Position encoding -----------------------------------------------------------------------------------------------


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
        # In memory a position's channels lie side by side, as they do in the tokens that the encoding is added to.
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


# --- Pixel decoder ---------------------------------------------------------------------------------------------------


class Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention(nn.Module):
    """Multi-scale deformable self-attention over the three coarse maps (arXiv 2010.04159, equation 3)."""

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        samples = num_heads * NUM_FEATURE_LEVELS * NUM_SAMPLING_POINTS
        self.sampling_offsets = SamplingOffsets(embed_dim, num_heads)
        self.attention_weights = ZeroLinear(embed_dim, samples)
        self.value_proj = XavierLinear(embed_dim, embed_dim)
        self.output_proj = XavierLinear(embed_dim, embed_dim)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Tensor,
        reference_points: Tensor,
        map_sizes: Tensor,
        spatial_shapes: list[tuple[int, int]],
        padding: Tensor | None,
    ) -> Tensor:
        """(B, S, C), encoding (B or 1, S, C), points (S, 2), each level's width and height (L, 2), the same as integers
        (height first), padding (B, S) True = padding -> (B, S, C)."""
        queries = hidden_states + position_embeddings
        value = self.project_values(hidden_states, padding)
        offsets, weights = self.sampling(queries)
        samples = (NUM_FEATURE_LEVELS, NUM_SAMPLING_POINTS)
        output = deformable_attention_at_offsets(
            value,
            spatial_shapes,
            map_sizes,
            reference_points,
            offsets.unflatten(-1, (*samples, 2)),
            weights.unflatten(-1, samples),
        )
        return self.output_proj(output)

    def project_values(self, hidden_states: Tensor, padding: Tensor | None) -> Tensor:
        """(B, S, C), (B, S) True = padding -> (B, S, heads, C / heads), zeros in the padding."""
        value = self.value_proj(hidden_states)
        if padding is not None:
            value = value.masked_fill(padding[..., None], 0.0)
        return value.unflatten(-1, (self.num_heads, -1))

    def sampling(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """(…, C) -> offsets (…, heads, L * P * 2) in pixels of the level they read, and weights (…, heads, L * P)."""
        offsets, weights = (
            projection(queries).unflatten(-1, (self.num_heads, -1))
            for projection in (self.sampling_offsets, self.attention_weights)
        )
        return offsets, softmax_over_samples(weights)

    def read(self, queries: Tensor, points: Tensor, table: GatherTable) -> Tensor:
        """`forward` for some queries of one image: (n, C), their places in every level (n, L * P * 2) -> (n, C)."""
        offsets, weights = self.sampling(queries)
        coordinates = (offsets + points[:, None]).flatten(1)
        return self.output_proj(table.attend(coordinates, weights.to(points.dtype)).to(queries.dtype))


class Mask2FormerPixelDecoderEncoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: Mask2FormerConfig) -> None:
        super().__init__()
        width = config.feature_size
        self.self_attn = Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention(width, config.num_attention_heads)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = XavierLinear(width, config.encoder_feedforward_dim, zero_bias=False)
        self.fc2 = XavierLinear(config.encoder_feedforward_dim, width, zero_bias=False)
        self.final_layer_norm = nn.LayerNorm(width)
        self.dropout = config.dropout

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Tensor,
        reference_points: Tensor,
        map_sizes: Tensor,
        spatial_shapes: list[tuple[int, int]],
        padding: Tensor | None,
    ) -> Tensor:
        if works_in_pieces(self, hidden_states) and form_for(hidden_states) == "gather":
            return self._forward_in_pieces(
                hidden_states, position_embeddings, reference_points, map_sizes, spatial_shapes, padding
            )
        if self._has_own_gradients(hidden_states):
            points = points_in_maps(reference_points, map_sizes, NUM_SAMPLING_POINTS)
            places = EncodedPlaces(spatial_shapes, points, padding)
            return self._with_own_gradients(hidden_states, position_embeddings, places)
        attended = self.self_attn(
            hidden_states, position_embeddings, reference_points, map_sizes, spatial_shapes, padding
        )
        return self._finish(hidden_states + self._drop(attended))

    def _has_own_gradients(self, hidden_states: Tensor) -> bool:
        """Whether [`DeformableLayer`] serves, and nothing else is hung on the layer's parts."""
        attention = self.self_attn
        linears = (
            attention.value_proj,
            attention.sampling_offsets,
            attention.attention_weights,
            attention.output_proj,
            self.fc1,
            self.fc2,
        )
        return (
            all(learns_in_pieces(hidden_states, parameter) for parameter in self.parameters())
            and hidden_states.requires_grad
            and form_for(hidden_states.unflatten(-1, (attention.num_heads, -1))) == "gather"
            and is_plain(attention, Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention)
            and all(map(is_plain, linears))
            and all(is_plain(norm, nn.LayerNorm) for norm in (self.self_attn_layer_norm, self.final_layer_norm))
            and not (self.training and self.dropout)
        )

    def _with_own_gradients(self, hidden_states: Tensor, position_embeddings: Tensor, places: EncodedPlaces) -> Tensor:
        """(B, S, C), encoding (1 or B, S, C) -> (B, S, C)."""
        attention, first, last = self.self_attn, self.self_attn_layer_norm, self.final_layer_norm
        sampling = (attention.sampling_offsets, attention.attention_weights)
        weights = LayerWeights(
            value=(attention.value_proj.weight, attention.value_proj.bias),
            sampling=(
                torch.cat([projection.weight for projection in sampling]),
                torch.cat([projection.bias for projection in sampling]),
            ),
            output=(attention.output_proj.weight, attention.output_proj.bias),
            norm1=(first.weight, first.bias),
            fc1=(self.fc1.weight, self.fc1.bias),
            fc2=(self.fc2.weight, self.fc2.bias),
            norm2=(last.weight, last.bias),
        )
        output: Tensor = DeformableLayer.apply(
            hidden_states, position_embeddings, places, attention.num_heads, (first.eps, last.eps), *weights.flat()
        )
        return output

    def _finish(self, hidden_states: Tensor) -> Tensor:
        """What follows the attention and its residual, for every position by itself: (…, C) -> (…, C)."""
        hidden_states = self.self_attn_layer_norm(hidden_states)
        if self.training and self.dropout:
            update = self._drop(self.fc2(self._drop(nn.functional.relu(self.fc1(hidden_states)))))
        else:
            update = feed_forward(hidden_states, self.fc1, self.fc2, "relu")
        return self.final_layer_norm(hidden_states + update)

    def _forward_in_pieces(
        self,
        hidden_states: Tensor,
        position_embeddings: Tensor,
        reference_points: Tensor,
        map_sizes: Tensor,
        spatial_shapes: list[tuple[int, int]],
        padding: Tensor | None,
    ) -> Tensor:
        values = self.self_attn.project_values(hidden_states, padding)
        position_embeddings = position_embeddings.expand_as(hidden_states)
        outputs = hidden_states.new_empty(hidden_states.shape)
        for states, positions, value, output in zip(hidden_states, position_embeddings, values, outputs, strict=True):
            table = GatherTable(value[None].to(reference_points.dtype), spatial_shapes, NUM_SAMPLING_POINTS)
            for piece in pieces(len(states), self.fc1.out_features):
                points = points_in_maps(reference_points[piece], map_sizes, NUM_SAMPLING_POINTS)
                rows = states[piece]
                output[piece] = self._finish(rows + self.self_attn.read(rows + positions[piece], points, table))
        return outputs

    def _drop(self, hidden_states: Tensor) -> Tensor:
        # Asked only where there is something to drop: without, it would copy.
        return nn.functional.dropout(hidden_states, self.dropout) if self.training and self.dropout else hidden_states


class Mask2FormerPixelDecoderEncoderOnly(nn.Module):
    def __init__(self, config: Mask2FormerConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Mask2FormerPixelDecoderEncoderLayer(config) for _ in range(config.encoder_layers)])

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Tensor,
        spatial_shapes: list[tuple[int, int]],
        padding: Tensor | None,
    ) -> Tensor:
        """(B, S, C) -> (B, S, C), the three maps flattened and concatenated."""
        reference_points = self.reference_points(spatial_shapes, hidden_states)
        # Filled on the device: uploading them would make the host wait.
        map_sizes = torch.stack(
            [
                torch.full((), side, device=hidden_states.device, dtype=torch.float32)
                for shape in spatial_shapes
                for side in shape[::-1]
            ]
        ).view(-1, 2)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states, position_embeddings, reference_points, map_sizes, spatial_shapes, padding
            )
        return hidden_states

    @staticmethod
    def reference_points(spatial_shapes: list[tuple[int, int]], like: Tensor) -> Tensor:
        """Centre of every position as (x, y) in [0, 1] of its map: (S, 2).

        Padding shifts nothing here: a point and the map it is read from are scaled by the same padded size.
        """
        points = []
        for height, width in spatial_shapes:
            y = (torch.arange(height, device=like.device, dtype=torch.float32) + 0.5) / height
            x = (torch.arange(width, device=like.device, dtype=torch.float32) + 0.5) / width
            points.append(
                torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1).flatten(0, 1)
            )
        return torch.cat(points)


class ConvNorm(nn.Sequential):
    """Convolution and GroupNorm, then ReLU if asked; padding is left out of the statistics and comes out as zeros."""

    def __init__(self, convolution: nn.Conv2d, relu: bool = False) -> None:
        super().__init__(convolution, nn.GroupNorm(NUM_NORM_GROUPS, convolution.out_channels))
        self.relu = relu

    def forward(self, features: Tensor, padding: Tensor | None = None) -> Tensor:
        convolution, norm = self
        assert isinstance(norm, nn.GroupNorm)
        convolved = convolution(features)
        if padding is None and is_plain(norm, nn.GroupNorm) and normalises_channels_last(convolved, norm):
            arguments = (convolved, norm.weight, norm.bias, norm.num_groups, norm.eps, self.relu)
            if not torch.is_grad_enabled() and is_plain(convolution, nn.Conv2d):
                normalise_groups(*arguments, output=convolved)  # in place: nobody else has seen it
                return convolved
            output: Tensor = ChannelsLastGroupNorm.apply(*arguments)
            return output
        if padding is None and convolved.device.type == "cpu" and convolved.dtype in (torch.float32, torch.float64):
            convolved = convolved.contiguous()  # PyTorch's own is exact only so, see `group_norm`
        normalised = masked_group_norm(convolved, norm, padding)
        return normalised.relu() if self.relu else normalised


class Mask2FormerPixelDecoder(nn.Module):
    """Deformable attention over strides 32, 16 and 8, then one feature-pyramid step to stride 4 (section 3.2.2)."""

    def __init__(self, config: Mask2FormerConfig, feature_channels: list[int]) -> None:
        super().__init__()
        width = config.feature_size
        self.position_embedding = Mask2FormerSinePositionEmbedding(width // 2)
        self.level_embed = nn.Parameter(torch.empty(NUM_FEATURE_LEVELS, width))
        self.input_projections = nn.ModuleList(
            [ConvNorm(XavierConv2d(channels, width, 1)) for channels in feature_channels[:0:-1]]
        )
        self.encoder = Mask2FormerPixelDecoderEncoderOnly(config)
        self.adapter_1 = ConvNorm(nn.Conv2d(feature_channels[0], width, 1, bias=False))
        self.layer_1 = ConvNorm(TiledConv2d(width, width, 3, padding=1, bias=False), relu=True)
        self.mask_projection = nn.Conv2d(width, config.mask_feature_size, kernel_size=1)

    def forward(
        self, features: tuple[Tensor, ...], paddings: tuple[Tensor | None, ...]
    ) -> Mask2FormerPixelDecoderOutput:
        """Backbone maps and their paddings, finest first -> mask features and three maps, coarsest first."""
        finest, *coarse = map(with_channels_last, features)
        coarse_paddings = paddings[:0:-1]
        known_paddings = [padding for padding in coarse_paddings if padding is not None]
        projected = [
            projection(level, padding)
            for projection, level, padding in zip(self.input_projections, coarse[::-1], coarse_paddings, strict=True)
        ]
        spatial_shapes = [(level.shape[2], level.shape[3]) for level in projected]
        encoded = self.encoder(
            flatten_levels(projected),
            flatten_levels(
                [
                    self.position_embedding(level, padding) + embed[:, None, None]
                    for level, padding, embed in zip(projected, coarse_paddings, self.level_embed, strict=True)
                ]
            ),
            spatial_shapes,
            torch.cat([padding.flatten(1) for padding in known_paddings], dim=1) if known_paddings else None,
        )
        sizes = [height * width for height, width in spatial_shapes]
        # (B, S, C) -> three (B, C, H, W)
        maps = tuple(
            to_map(level, shape) for level, shape in zip(encoded.split(sizes, dim=1), spatial_shapes, strict=True)
        )
        # One name for what follows from each other: maps of this size are what most memory is needed for, and each may
        # go when the next is there.
        fused = self.adapter_1(finest, paddings[0])
        fused = fused + nn.functional.interpolate(
            continue_edges(maps[-1], coarse_paddings[-1]), size=fused.shape[-2:], mode="bilinear", align_corners=False
        )
        if paddings[0] is not None:
            fused = fused.masked_fill(paddings[0][:, None], 0.0)
        fused = self.layer_1(fused, paddings[0])
        return Mask2FormerPixelDecoderOutput(
            multi_scale_features=maps, mask_features=continue_edges(self.mask_projection(fused), paddings[0])
        )


class Mask2FormerFPNPixelDecoder(nn.Module):
    """The original's plain feature pyramid: no attention, nearest upsampling, a 3x3 mask projection."""

    def __init__(self, config: Mask2FormerConfig, feature_channels: list[int]) -> None:
        super().__init__()
        width = config.feature_size
        self.num_levels = len(feature_channels)
        # Numbered from the finest map. The coarsest has nothing to be added to, hence no adapter.
        for level, channels in enumerate(feature_channels, start=1):
            if level < self.num_levels:
                self.add_module(f"adapter_{level}", ConvNorm(nn.Conv2d(channels, width, 1, bias=False)))
                channels = width
            self.add_module(
                f"layer_{level}", ConvNorm(TiledConv2d(channels, width, 3, padding=1, bias=False), relu=True)
            )
        self.mask_projection = TiledConv2d(width, config.mask_feature_size, kernel_size=3, padding=1)

    def forward(
        self, features: tuple[Tensor, ...], paddings: tuple[Tensor | None, ...]
    ) -> Mask2FormerPixelDecoderOutput:
        """Backbone maps and their paddings, finest first -> mask features and three maps, coarsest first."""
        features = tuple(map(with_channels_last, features))
        coarsest, padding = features[-1], paddings[-1]
        if padding is not None:
            coarsest = coarsest.masked_fill(padding[:, None], 0.0)
        maps = [getattr(self, f"layer_{self.num_levels}")(coarsest, padding)]
        for level in range(self.num_levels - 1, 0, -1):
            padding = paddings[level - 1]
            lateral = getattr(self, f"adapter_{level}")(features[level - 1], padding)
            # Nearest upsampling by two carries the zeros of the padding along.
            upsampled = nn.functional.interpolate(maps[-1], size=lateral.shape[-2:], mode="nearest")
            maps.append(getattr(self, f"layer_{level}")(lateral + upsampled, padding))
        return Mask2FormerPixelDecoderOutput(
            multi_scale_features=tuple(maps[:NUM_FEATURE_LEVELS]),
            mask_features=continue_edges(self.mask_projection(maps[-1]), paddings[0]),
        )


PIXEL_DECODER_CLASSES = {"msdeform": Mask2FormerPixelDecoder, "fpn": Mask2FormerFPNPixelDecoder}


def with_channels_last(features: Tensor) -> Tensor:
    """(B, C, H, W) as it lies in memory best: on the CPU a position's channels side by side.

    Convolutions, resizing and what treats positions one by one are up to twenty times as fast in half precision so.
    """
    if features.device.type != "cpu" or is_recorded():
        return features
    return features.contiguous(memory_format=torch.channels_last)


def to_tokens(features: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H * W, C), or a clip's (B, T, C, H, W) -> (B, T * H * W, C)."""
    return features.movedim(-3, -1).flatten(1, -2)


def mask_logits(embeddings: Tensor, features: Tensor) -> Tensor:
    """(B, Q, C) x (B, C, S) -> (B, Q, S)."""
    if embeddings.device.type == "cpu" and not is_recorded() and len(embeddings) == 1:
        # In bfloat16 seven times as fast as the product of a batch of one, which copies the features.
        return (embeddings[0] @ features[0])[None]
    return embeddings @ features


def flatten_levels(maps: list[Tensor]) -> Tensor:
    """Maps (B, C, H, W) -> (B, S, C), one after another."""
    return torch.cat([to_tokens(level) for level in maps], dim=1)


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
