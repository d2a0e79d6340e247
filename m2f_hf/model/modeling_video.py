"""The video model: the image model's modules read a clip's frames as a batch, and queries read all frames at once.

Paper: Mask2Former for Video Instance Segmentation, arXiv 2112.10764.
"""

from typing import Any

import torch
from torch import Tensor

from ..kernels.fast_path import is_recorded
from .configuration import Mask2FormerConfig, Mask2FormerVideoConfig
from .modeling import (
    EncodedImages,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerForUniversalSegmentationOutput,
    Mask2FormerModel,
    Mask2FormerModelOutput,
    Mask2FormerPixelLevelModule,
    Mask2FormerPixelLevelModuleOutput,
)


# Frames that are read together without gradients. On a CPU one at a time is the fastest and needs the least memory;
# on an accelerator launches cost time.
FRAMES_PER_BATCH = {"cpu": 1}
FRAMES_PER_BATCH_ACCELERATOR = 8


def frames_at_once(config: Mask2FormerVideoConfig, device: torch.device) -> int:
    """Return how many frames backbone and pixel decoder read together without gradients."""
    return config.frames_per_batch or FRAMES_PER_BATCH.get(device.type, FRAMES_PER_BATCH_ACCELERATOR)


class Mask2FormerVideoPixelLevelModule(Mask2FormerPixelLevelModule):
    """Backbone and pixel decoder, which read every frame as an image."""

    config: Mask2FormerVideoConfig

    def forward(
        self, pixel_values: Tensor, image_sizes: Tensor | None = None, output_hidden_states: bool = False
    ) -> Mask2FormerPixelLevelModuleOutput:
        """Read clips (B, T, 3, H, W), with sizes (B, 2) that all frames of a clip share -> maps (B, T, …)."""
        clips = pixel_values.shape[:2]  # (B, T)
        frames = pixel_values.flatten(0, 1)  # (B, T, 3, H, W) -> (B * T, 3, H, W)
        sizes = None if image_sizes is None else image_sizes.repeat_interleave(clips[1], dim=0)
        # With gradients everything is kept anyway, and in training a norm may need the whole batch. A graph must not
        # know how many chunks there are.
        if not (self.training or torch.is_grad_enabled() or is_recorded()):
            maps: list[Tensor] = []
            step = frames_at_once(self.config, frames.device)
            for start in range(0, len(frames), step):
                chunk = slice(start, start + step)
                chunk_maps = self._maps(
                    super().forward(frames[chunk], None if sizes is None else sizes[chunk], output_hidden_states)
                )
                # Written in place: the decoder reads all frames at once, and joining chunks would hold them twice.
                maps = maps or [level.new_empty(len(frames), *level.shape[1:]) for level in chunk_maps]
                for level, values in zip(maps, chunk_maps, strict=True):
                    level[chunk] = values
        else:
            maps = self._maps(super().forward(frames, sizes, output_hidden_states))
        # (B * T, C, h, w) -> (B, T, C, h, w)
        mask_features, coarsest, *others = (level.unflatten(0, clips) for level in maps)
        return Mask2FormerPixelLevelModuleOutput(
            encoder_last_hidden_state=coarsest,
            encoder_hidden_states=tuple(others[3:]) if output_hidden_states else None,
            decoder_last_hidden_state=mask_features,
            decoder_hidden_states=tuple(others[:3]),
        )

    @staticmethod
    def _maps(output: Any) -> list[Tensor]:
        """Return mask features, the backbone's coarsest map, the decoder's three and, if wanted, all the backbone's."""
        return [
            output.decoder_last_hidden_state,
            output.encoder_last_hidden_state,
            *(output.decoder_hidden_states or ()),
            *(output.encoder_hidden_states or ()),
        ]


class Mask2FormerVideoModel(Mask2FormerModel):
    """[`Mask2FormerModel`] of clips; the class head is the next class's."""

    config: Mask2FormerVideoConfig
    config_class = Mask2FormerVideoConfig
    main_input_name = "pixel_values_videos"
    input_modalities = ["video"]  # noqa: RUF012
    pixel_level_class = Mask2FormerVideoPixelLevelModule

    def __init__(self, config: Mask2FormerConfig) -> None:
        if config.model_type != Mask2FormerVideoConfig.model_type:
            raise TypeError(
                f"a video model has no {type(config).__name__}: make a Mask2FormerVideoConfig of the same settings, or "
                "load an image checkpoint with from_pretrained"
            )
        super().__init__(config)

    def forward(  # type: ignore[override]
        self, pixel_values_videos: Tensor, pixel_mask: Tensor | None = None, **kwargs: Any
    ) -> Mask2FormerModelOutput | tuple[Any, ...]:
        """Predict as [`Mask2FormerModel.forward`] does; every map of the output has a T after the B.

        Args:
            pixel_values_videos: (B, T, 3, H, W), normalised, padded at the bottom and right.
            pixel_mask: (B, H, W), nonzero where the frames of each clip are.
            kwargs: as the image model's.

        Raises:
            ValueError: `pixel_values_videos` or `pixel_mask` has another shape, or there is no frame.
        """
        return super().forward(pixel_values_videos, pixel_mask, **kwargs)

    @staticmethod
    def _image_sizes(pixel_values: Tensor, pixel_mask: Tensor | None) -> Tensor:
        if pixel_values.dim() != 5 or 0 in pixel_values.shape[:2]:
            raise ValueError(
                f"`pixel_values_videos` has shape {tuple(pixel_values.shape)}, expected (batch, frames, channels, "
                "height, width) with at least one clip and one frame; add the batch with `pixel_values_videos[None]`."
            )
        return Mask2FormerModel._image_sizes(pixel_values[:, 0], pixel_mask)


class Mask2FormerForVideoSegmentation(Mask2FormerForUniversalSegmentation):
    """[`Mask2FormerVideoModel`] with a class head and the losses: a query is an object (or stuff) in all its frames.

    The parameters are the image model's, so an image checkpoint, ours or one of `transformers`, is a start.
    """

    config: Mask2FormerVideoConfig
    config_class = Mask2FormerVideoConfig
    main_input_name = "pixel_values_videos"
    input_modalities = ["video"]  # noqa: RUF012
    model_class = Mask2FormerVideoModel

    def forward(
        self,
        pixel_values_videos: Tensor,
        mask_labels: list[Tensor] | None = None,
        class_labels: list[Tensor] | None = None,
        pixel_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_auxiliary_logits: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> Mask2FormerForUniversalSegmentationOutput | tuple[Any, ...]:
        """Predict a class for every query and a mask in every frame; with labels, the losses too.

        Args:
            pixel_values_videos: (B, T, 3, H, W), normalised, padded at the bottom and right.
            mask_labels: for each clip a (N, T, H, W) tensor of N target masks, bool, uint8 or float; False where an
                instance is absent. Leave out instances that are in no frame.
            class_labels: for each clip (N,) int64, the class of each instance, in [0, num_labels). The configuration's
                `label_frame` says what is made of instances that are absent in the last frame.
            pixel_mask: (B, H, W), nonzero where the frames of each clip are; see [`Mask2FormerModel.forward`].
            output_hidden_states: whether to return the states of all parts.
            output_auxiliary_logits: whether to return the logits of all predictions.
            output_attentions: whether to return attention weights (computed eagerly then).
            return_dict: whether to return an output object or a tuple of what is not None, the loss first.

        Returns:
            As for images, with a T in every map: `masks_queries_logits` (B, Q, T, H/4, W/4), the pixel decoder's and
            the backbone's (B, T, C, h, w), masked attention weights (B, heads, Q, T * h * w). `class_queries_logits`
            stay (B, Q, num_labels + 1): a track has one class; `image_sizes` (B, 2): the frames of a clip one size.

        Raises:
            ValueError: the inputs' shapes or the labels' range are wrong, or one kind of labels is missing.
        """
        return super().forward(
            pixel_values_videos,
            mask_labels,
            class_labels,
            pixel_mask,
            output_hidden_states,
            output_auxiliary_logits,
            output_attentions,
            return_dict,
        )

    def encode_frames(self, pixel_values_videos: Tensor, pixel_mask: Tensor | None = None) -> EncodedImages:
        """Run the first half of `forward`, backbone and pixel decoder, on every frame as an image.

        Args:
            pixel_values_videos, pixel_mask: as `forward`'s.

        Returns:
            Maps (B, T, C, h, w). Those of several calls may be joined along T, and any T of them decoded.
        """
        return self.model.encode(pixel_values_videos, pixel_mask)

    def decode_frames(self, encoded: EncodedImages) -> Mask2FormerForUniversalSegmentationOutput:
        """Run the second half of `forward`: queries read all frames that `encode_frames` gave at once.

        Raises:
            ValueError: `encoded` is not an output of `encode_frames`.
        """
        maps: Any = encoded.pixel_level.decoder_last_hidden_state if isinstance(encoded, EncodedImages) else None
        if maps is None or maps.dim() != 5:
            raise ValueError("these are no encoded frames: pass what `encode_frames` gave, with maps (B, T, C, h, w)")
        return self.predict(self.model.decode(encoded))


__all__ = ["Mask2FormerForVideoSegmentation", "Mask2FormerVideoModel"]
