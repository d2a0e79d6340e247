"""The image model, in the order of the paper's figure 2: backbone, `pixel_decoder`, `transformer_decoder`, heads.

Paper: Masked-attention Mask Transformer for Universal Image Segmentation, arXiv 2112.01527.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoBackbone, PreTrainedConfig
from transformers.utils import ModelOutput

from ..kernels.chunks import channels_last
from ..loss.criterion import Mask2FormerLoss
from .configuration import Mask2FormerConfig
from .layers import PartlyFrozen, to_tokens
from .padding import (
    PaddedBatch,
    call_on_batch,
    hidden_padding,
    hide_padding_in,
    image_sizes_from_mask,
    may_hide_padding,
)
from .pixel_decoder import PIXEL_DECODER_CLASSES
from .pretrained import Mask2FormerPreTrainedModel
from .swin import use_windowed_layers
from .transformer_decoder import Mask2FormerTransformerModule


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
    """Output of `encode`, input of `decode`.

    Args:
        pixel_level: the maps of backbone and pixel decoder.
        image_sizes: (B, 2) int64, height and width of each image before padding.
        hidden_sizes: the same where padding is to be hidden, None where there is none to hide.
    """

    pixel_level: Mask2FormerPixelLevelModuleOutput
    image_sizes: Tensor
    hidden_sizes: Tensor | None


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


# Fields of the base model's output that the full model's has too.
_PASSED_ON = (
    "encoder_last_hidden_state",
    "pixel_decoder_last_hidden_state",
    "transformer_decoder_last_hidden_state",
    "encoder_hidden_states",
    "pixel_decoder_hidden_states",
    "transformer_decoder_hidden_states",
    "attentions",
    "cross_attentions",
    "image_sizes",
)


# --- Backbone and pixel decoder ---------------------------------------------------------------------------------------


class Mask2FormerPixelLevelModule(PartlyFrozen):
    """Backbone and pixel decoder."""

    def __init__(self, config: Mask2FormerConfig) -> None:
        super().__init__()
        self.config = config
        backbone_config = config.backbone_config
        assert isinstance(backbone_config, PreTrainedConfig)
        if backbone_config._attn_implementation == "sdpa":
            # It was asked for the whole model. Unset, a backbone uses it where it has it, and its own elsewhere.
            backbone_config._attn_implementation = None
        self.encoder = AutoBackbone.from_config(backbone_config)
        use_windowed_layers(self.encoder)
        hide_padding_in(self.encoder)
        self.decoder = PIXEL_DECODER_CLASSES[config.pixel_decoder](config, feature_channels=self.encoder.channels)
        self._freeze()

    def _freeze(self) -> None:
        if self.encoder.config.model_type == "swin":
            # Swin's last norm belongs to classification; DDP would wait for its gradient forever.
            for name, parameter in self.encoder.named_parameters():
                if name.removeprefix("swin.").startswith("layernorm."):
                    parameter.requires_grad_(False)
        if self.config.freeze_backbone_norm:
            for module in self.encoder.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval().requires_grad_(False)

    def _check_strides(self, pixel_values: Tensor, features: list[Tensor]) -> None:
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
        """Read images (B, 3, H, W); with image sizes (B, 2), padding beyond each image's multiple of 32 is hidden.

        The backbone's maps, which the decoder does not need, are returned only with `output_hidden_states`.
        """
        if pixel_values.dtype != torch.float32:
            # A convolutional backbone keeps the layout. In float32 it is as fast in either.
            pixel_values = channels_last(pixel_values)
        size = (pixel_values.shape[2], pixel_values.shape[3])
        batch = None if image_sizes is None else PaddedBatch(image_sizes, size)
        # A list that lets go of the backbone's own maps, so that no map is held in two layouts.
        features = list(map(channels_last, call_on_batch(batch, self.encoder, pixel_values).feature_maps))
        if not torch.compiler.is_exporting():  # there a size may be a symbol, which a comparison would pin down
            self._check_strides(pixel_values, features)
        paddings: tuple[Tensor | None, ...] = (None,) * len(features)
        if image_sizes is not None:
            paddings = tuple(
                hidden_padding(image_sizes, stride, (level.shape[2], level.shape[3]))
                for stride, level in zip(self.config.feature_strides, features, strict=True)
            )
        decoded = self.decoder(tuple(features), paddings)
        return Mask2FormerPixelLevelModuleOutput(
            encoder_last_hidden_state=features[-1],
            encoder_hidden_states=tuple(features) if output_hidden_states else None,
            decoder_last_hidden_state=decoded.mask_features,
            decoder_hidden_states=decoded.multi_scale_features,
        )


# --- Models ----------------------------------------------------------------------------------------------------------


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
        """Predict masks and mask embeddings for every query.

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
        output_hidden_states = self.option("output_hidden_states", output_hidden_states)
        encoded = self.encode(pixel_values, pixel_mask, output_hidden_states)
        output = self.decode(
            encoded,
            output_hidden_states,
            self.option("output_attentions", output_attentions),
            self.option("output_auxiliary_logits", output_auxiliary_logits),
        )
        return output if self.option("return_dict", return_dict) else output.to_tuple()

    def encode(
        self, pixel_values: Tensor, pixel_mask: Tensor | None = None, output_hidden_states: bool = False
    ) -> EncodedImages:
        """Run the first half of `forward`: backbone and pixel decoder."""
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
        """Run the second half of `forward`: the masked-attention decoder."""
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
            masks_queries_logits=tuple((embeddings @ features).unflatten(2, map_size) for embeddings in wanted),
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
        """Return the weighted sum of the terms; `loss_mask_3` has the weight of `loss_mask`."""
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
        """Predict a class and a mask for every query; with labels, the losses too.

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
        output_auxiliary_logits = self.option("output_auxiliary_logits", output_auxiliary_logits)
        outputs = self.model(
            pixel_values,
            pixel_mask=pixel_mask,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            output_auxiliary_logits=output_auxiliary_logits,
            return_dict=True,
        )
        output = self.predict(outputs, mask_labels, class_labels, output_auxiliary_logits)
        return output if self.option("return_dict", return_dict) else output.to_tuple()

    def predict(
        self,
        outputs: Any,  # a Mask2FormerModelOutput, any field of which may be None to a type checker
        mask_labels: list[Tensor] | None = None,
        class_labels: list[Tensor] | None = None,
        output_auxiliary_logits: bool = False,
    ) -> Mask2FormerForUniversalSegmentationOutput:
        """Return the base model's outputs with classes and, with labels, losses."""
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
            loss_dict=loss_dict,
            **{name: getattr(outputs, name) for name in _PASSED_ON},
        )


__all__ = ["Mask2FormerForUniversalSegmentation", "Mask2FormerModel", "Mask2FormerPreTrainedModel"]
