"""The pixel decoder (paper, section 3.2.2): deformable attention over the coarse maps, or a plain feature pyramid."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from ..kernels.convolution import TiledConv2d, suits_tiles
from ..kernels.deformable_attention import (
    GatherTable,
    deformable_attention_at_offsets,
    form_for,
    points_in_maps,
    softmax_over_samples,
)
from ..kernels.deformable_layer import DeformableLayer, EncodedPlaces, LayerWeights
from ..kernels.feed_forward import apply_linear, feed_forward, is_plain
from ..kernels.group_norm import ChannelsLastGroupNorm, normalise_groups, normalises_channels_last
from ..kernels.pieces import learns_in_pieces, pieces, with_channels_last, works_in_pieces
from ..kernels.pyramid_step import PyramidStep, StepParameters
from ..kernels.swin import to_map
from .configuration import NUM_NORM_GROUPS, Mask2FormerConfig
from .layers import (
    NUM_FEATURE_LEVELS,
    NUM_SAMPLING_POINTS,
    Mask2FormerSinePositionEmbedding,
    SamplingOffsets,
    XavierConv2d,
    XavierLinear,
    ZeroLinear,
    to_tokens,
)
from .padding import continue_edges, masked_group_norm


@dataclass
class Mask2FormerPixelDecoderOutput(ModelOutput):
    """
    Args:
        multi_scale_features: three maps (B, feature_size, H/32, W/32), (…, H/16, W/16), (…, H/8, W/8).
        mask_features: (B, mask_feature_size, H/4, W/4).
    """

    multi_scale_features: tuple[Tensor, ...] | None = None
    mask_features: Tensor | None = None


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
        return apply_linear(self.output_proj, output)

    def project_values(self, hidden_states: Tensor, padding: Tensor | None) -> Tensor:
        """(B, S, C), (B, S) True = padding -> (B, S, heads, C / heads), zeros in the padding."""
        value = apply_linear(self.value_proj, hidden_states)
        if padding is not None:
            value = value.masked_fill(padding[..., None], 0.0)
        return value.unflatten(-1, (self.num_heads, -1))

    def sampling(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """(…, C) -> offsets (…, heads, L * P * 2) in pixels of the level they read, and weights (…, heads, L * P)."""
        offsets, weights = (
            apply_linear(projection, queries).unflatten(-1, (self.num_heads, -1))
            for projection in (self.sampling_offsets, self.attention_weights)
        )
        return offsets, softmax_over_samples(weights)

    def read(self, queries: Tensor, points: Tensor, table: GatherTable) -> Tensor:
        """`forward` for some queries of one image: (n, C), their places in every level (n, L * P * 2) -> (n, C)."""
        offsets, weights = self.sampling(queries)
        coordinates = (offsets + points[:, None]).flatten(1)
        return apply_linear(self.output_proj, table.attend(coordinates, weights.to(points.dtype)).to(queries.dtype))


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
            and not torch.is_autocast_enabled("cpu")
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

    @property
    def convolution(self) -> nn.Conv2d:
        return cast(nn.Conv2d, self[0])

    @property
    def norm(self) -> nn.GroupNorm:
        return cast(nn.GroupNorm, self[1])

    def forward(self, features: Tensor, padding: Tensor | None = None) -> Tensor:
        convolution, norm = self.convolution, self.norm
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
        if self._steps_by_image(finest, paddings):
            return Mask2FormerPixelDecoderOutput(
                multi_scale_features=maps, mask_features=self._step_by_image(finest, maps[-1])
            )
        # One name, so that each map of this size is freed once the next exists: most memory is needed here.
        fused = self.adapter_1(finest, paddings[0])
        del finest
        fused = fused + nn.functional.interpolate(
            continue_edges(maps[-1], coarse_paddings[-1]), size=fused.shape[-2:], mode="bilinear", align_corners=False
        )
        if paddings[0] is not None:
            fused = fused.masked_fill(paddings[0][:, None], 0.0)
        fused = self.layer_1(fused, paddings[0])
        return Mask2FormerPixelDecoderOutput(
            multi_scale_features=maps, mask_features=continue_edges(self.mask_projection(fused), paddings[0])
        )

    def _step_by_image(self, finest: Tensor, coarse: Tensor) -> Tensor:
        """(B, D, H, W), (B, C, h, w) -> mask features (B, M, H, W)."""
        lateral, fuse, masks = self.adapter_1, self.layer_1, self.mask_projection
        assert masks.bias is not None
        parameters = StepParameters(
            lateral=lateral.convolution.weight.flatten(1),
            lateral_scale=lateral.norm.weight,
            lateral_shift=lateral.norm.bias,
            fuse=fuse.convolution.weight,
            fuse_scale=fuse.norm.weight,
            fuse_shift=fuse.norm.bias,
            mask=masks.weight.flatten(1),
            mask_bias=masks.bias,
        )
        eps = (lateral.norm.eps, fuse.norm.eps)
        output: Tensor = PyramidStep.apply(
            finest, coarse, torch.is_grad_enabled(), lateral.norm.num_groups, eps, *parameters
        )
        return output

    def _steps_by_image(self, finest: Tensor, paddings: tuple[Tensor | None, ...]) -> bool:
        """Whether [`PyramidStep`] serves, and nothing else is hung on the parts."""
        blocks, masks = (self.adapter_1, self.layer_1), self.mask_projection
        lateral, fuse = (block.convolution for block in blocks)
        parameters = [parameter for part in (*blocks, masks) for parameter in part.parameters()]
        return (
            all(padding is None for padding in paddings)
            and all(len(block) == 2 and is_plain(block, ConvNorm) for block in blocks)
            and all(is_plain(block.norm, nn.GroupNorm) and block.norm.affine for block in blocks)
            and all(is_plain(layer, nn.Conv2d) for layer in (lateral, fuse, masks))
            and isinstance(fuse, TiledConv2d)
            and fuse.is_three_by_three()
            and all(is_one_by_one(layer) for layer in (lateral, masks))
            and lateral.bias is None is fuse.bias
            and masks.bias is not None
            and self.adapter_1.norm.num_groups == self.layer_1.norm.num_groups
            and self.layer_1.relu
            and not self.adapter_1.relu
            and all(parameter.dtype == finest.dtype for parameter in parameters)
            and (all(parameter.requires_grad for parameter in parameters) or not torch.is_grad_enabled())
            and suits_tiles(finest, fuse.weight, fuse.bias)
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


def is_one_by_one(convolution: nn.Conv2d) -> bool:
    """Whether it is a linear layer of every position by itself."""
    return (
        convolution.kernel_size == convolution.stride == (1, 1)
        and convolution.padding == (0, 0)
        and convolution.groups == 1
    )


PIXEL_DECODER_CLASSES = {"msdeform": Mask2FormerPixelDecoder, "fpn": Mask2FormerFPNPixelDecoder}


def flatten_levels(maps: list[Tensor]) -> Tensor:
    """Maps (B, C, H, W) -> (B, S, C), one after another."""
    return torch.cat([to_tokens(level) for level in maps], dim=1)
