"""The pixel decoder (paper, section 3.2.2): deformable attention over the coarse maps, or a plain feature pyramid."""

from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from ..kernels.deformable_attention import multi_scale_deformable_attention
from ..kernels.deformable_encoder_layer import deformable_encoder_layer
from ..kernels.fast_path import fast_path
from ..kernels.feed_forward import relu_feed_forward
from ..kernels.group_norm import channels_last_group_norm
from .configuration import NUM_NORM_GROUPS, Mask2FormerConfig
from .layers import (
    NUM_FEATURE_LEVELS,
    NUM_SAMPLING_POINTS,
    Mask2FormerSinePositionEmbedding,
    SamplingOffsets,
    WinogradConv2d,
    XavierConv2d,
    XavierLinear,
    ZeroLinear,
    to_map,
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


class Places(NamedTuple):
    """Where the S positions of the three maps are, one map after another.

    For S positions and the P points that each head samples in each of L levels, (x, y) of every sample in turn.

    Args:
        spatial_shapes: height and width of each level.
        reference_points: (S, 1, L * P * 2) float32, the position's own middle, in [0, 1] of a map.
        map_sizes: (L * P * 2,) float32, width and height of the level that is sampled.
        padding: (B, S) bool, True = padding; None: there is none.
    """

    spatial_shapes: list[tuple[int, int]]
    reference_points: Tensor
    map_sizes: Tensor
    padding: Tensor | None

    @classmethod
    def of(
        cls, spatial_shapes: list[tuple[int, int]], padding: Tensor | None, device: torch.device, num_points: int
    ) -> "Places":
        """Padding shifts nothing here: a point and the map it is read from are scaled by the same padded size."""
        points = []
        for height, width in spatial_shapes:
            y = (torch.arange(height, device=device, dtype=torch.float32) + 0.5) / height
            x = (torch.arange(width, device=device, dtype=torch.float32) + 0.5) / width
            points.append(
                torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1).flatten(0, 1)
            )
        # Filled on the device: uploading them would make the host wait.
        sizes = torch.stack(
            [
                torch.full((), side, device=device, dtype=torch.float32)
                for shape in spatial_shapes
                for side in shape[::-1]
            ]
        ).view(-1, 1, 2)
        return cls(
            spatial_shapes,
            torch.cat(points).repeat(1, len(spatial_shapes) * num_points)[:, None],
            sizes.expand(-1, num_points, -1).flatten(),
            padding,
        )


class Mask2FormerDeformableAttention(nn.Module):
    """Multi-scale deformable self-attention over the three coarse maps (arXiv 2010.04159, equation 3)."""

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        samples = num_heads * NUM_FEATURE_LEVELS * NUM_SAMPLING_POINTS
        self.sampling_offsets = SamplingOffsets(embed_dim, num_heads)
        self.attention_weights = ZeroLinear(embed_dim, samples)
        self.value_proj = XavierLinear(embed_dim, embed_dim)
        self.output_proj = XavierLinear(embed_dim, embed_dim)

    def forward(self, queries: Tensor, hidden_states: Tensor, places: Places) -> Tensor:
        """(B, S, C) twice, positions with and without their encoding -> (B, S, C)."""
        value = self.value_proj(hidden_states)
        if places.padding is not None:
            value = value.masked_fill(places.padding[..., None], 0.0)
        # (B, S, C) -> (B, S, heads, L * P * 2) in pixels of the level they read, and (B, S, heads, L * P)
        offsets = self.sampling_offsets(queries).unflatten(-1, (self.num_heads, -1))
        weights = self.attention_weights(queries).unflatten(-1, (self.num_heads, -1)).softmax(-1)
        locations = places.reference_points + offsets / places.map_sizes
        samples = (NUM_FEATURE_LEVELS, NUM_SAMPLING_POINTS)
        output = multi_scale_deformable_attention(
            value.unflatten(-1, (self.num_heads, -1)),
            places.spatial_shapes,
            locations.unflatten(-1, (*samples, 2)),
            weights.unflatten(-1, samples),
        )
        return self.output_proj(output)


class Mask2FormerPixelDecoderEncoderLayer(GradientCheckpointingLayer):
    """Deformable self-attention, then a feed-forward network; each with a residual and a norm behind it."""

    def __init__(self, config: Mask2FormerConfig) -> None:
        super().__init__()
        width = config.feature_size
        self.self_attn = Mask2FormerDeformableAttention(width, config.num_attention_heads)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = XavierLinear(width, config.encoder_feedforward_dim, zero_bias=False)
        self.fc2 = XavierLinear(config.encoder_feedforward_dim, width, zero_bias=False)
        self.final_layer_norm = nn.LayerNorm(width)
        self.dropout = config.dropout

    @fast_path(deformable_encoder_layer)
    def forward(self, hidden_states: Tensor, position_embeddings: Tensor, places: Places) -> Tensor:
        """(B, S, C), encoding (B or 1, S, C) -> (B, S, C)."""
        attended = self.self_attn(hidden_states + position_embeddings, hidden_states, places)
        hidden_states = self.self_attn_layer_norm(hidden_states + self._drop(attended))
        return self.final_layer_norm(hidden_states + self._drop(self.feed_forward(hidden_states)))

    @fast_path(relu_feed_forward)
    def feed_forward(self, hidden_states: Tensor) -> Tensor:
        """(B, S, C) -> (B, S, C)."""
        return self.fc2(self._drop(self.fc1(hidden_states).relu()))

    def _drop(self, hidden_states: Tensor) -> Tensor:
        return nn.functional.dropout(hidden_states, self.dropout, self.training)


class Mask2FormerPixelDecoderEncoderOnly(nn.Module):
    def __init__(self, config: Mask2FormerConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Mask2FormerPixelDecoderEncoderLayer(config) for _ in range(config.encoder_layers)])

    def forward(self, hidden_states: Tensor, position_embeddings: Tensor, places: Places) -> Tensor:
        """The three maps flattened and concatenated, (B, S, C), their encoding (B or 1, S, C) -> (B, S, C)."""
        for layer in self.layers:
            hidden_states = layer(hidden_states, position_embeddings, places)
        return hidden_states


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

    @fast_path(channels_last_group_norm)
    def forward(self, features: Tensor, padding: Tensor | None = None) -> Tensor:
        """(B, C, H, W), (B, H, W) True = padding -> (B, D, H, W)."""
        convolved = self.convolution(features)
        if padding is None and convolved.device.type == "cpu":
            convolved = convolved.contiguous()  # PyTorch's own GroupNorm loses digits where channels are last in memory
        normalised = masked_group_norm(convolved, self.norm, padding)
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
        self.layer_1 = ConvNorm(WinogradConv2d(width, width, 3, padding=1, bias=False), relu=True)
        self.mask_projection = nn.Conv2d(width, config.mask_feature_size, kernel_size=1)

    def forward(
        self, features: tuple[Tensor, ...], paddings: tuple[Tensor | None, ...]
    ) -> Mask2FormerPixelDecoderOutput:
        """Backbone maps and their paddings, finest first -> mask features and three maps, coarsest first."""
        finest, *coarse = features
        maps = self.encode(coarse[::-1], paddings[:0:-1])
        mask_features = self.fuse(finest, continue_edges(maps[-1], paddings[1]), paddings[0])
        return Mask2FormerPixelDecoderOutput(multi_scale_features=maps, mask_features=mask_features)

    def encode(self, coarse: list[Tensor], paddings: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
        """Three maps of the backbone and their paddings -> as many (B, feature_size, H, W); coarsest first."""
        levels = [
            projection(level, padding)
            for projection, level, padding in zip(self.input_projections, coarse, paddings, strict=True)
        ]
        shapes = [(level.shape[2], level.shape[3]) for level in levels]
        known = [padding.flatten(1) for padding in paddings if padding is not None]
        places = Places.of(shapes, torch.cat(known, dim=1) if known else None, levels[0].device, NUM_SAMPLING_POINTS)
        encodings = flatten_levels(
            [
                self.position_embedding(level, padding) + embed[:, None, None]
                for level, padding, embed in zip(levels, paddings, self.level_embed, strict=True)
            ]
        )
        hidden_states = flatten_levels(levels)
        del levels  # not held twice while the layers run
        encoded = self.encoder(hidden_states, encodings, places)
        # (B, S, C) -> three (B, C, H, W)
        tokens = encoded.split([height * width for height, width in shapes], dim=1)
        return tuple(to_map(level, shape) for level, shape in zip(tokens, shapes, strict=True))

    def fuse(self, finest: Tensor, encoded: Tensor, padding: Tensor | None) -> Tensor:
        """Map at stride 4, the encoded one at stride 8, padding of the first -> (B, mask_feature_size, H, W)."""
        # One name, so that each map of this size is freed once the next exists: most memory is needed here.
        fused = self.adapter_1(finest, padding)
        fused += nn.functional.interpolate(encoded, fused.shape[-2:], mode="bilinear", align_corners=False)
        if padding is not None:
            fused = fused.masked_fill(padding[:, None], 0.0)
        fused = self.layer_1(fused, padding)
        return continue_edges(self.mask_projection(fused), padding)


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
                f"layer_{level}", ConvNorm(WinogradConv2d(channels, width, 3, padding=1, bias=False), relu=True)
            )
        self.mask_projection = WinogradConv2d(width, config.mask_feature_size, kernel_size=3, padding=1)

    def forward(
        self, features: tuple[Tensor, ...], paddings: tuple[Tensor | None, ...]
    ) -> Mask2FormerPixelDecoderOutput:
        """Backbone maps and their paddings, finest first -> mask features and three maps, coarsest first."""
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


def flatten_levels(maps: list[Tensor]) -> Tensor:
    """Maps (B, C, H, W) -> (B, S, C), one after another."""
    return torch.cat([to_tokens(level) for level in maps], dim=1)
