"""The image model, in the order of the paper's figure 2: backbone, `pixel_decoder`, `masked_attention_decoder`, heads.

Paper: Masked-attention Mask Transformer for Universal Image Segmentation, arXiv 2112.01527.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoBackbone, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from ..kernels.pieces import with_channels_last
from ..loss.criterion import Mask2FormerLoss
from .backbone import load_backbone_weights, read_backbone_config
from .configuration import Mask2FormerConfig
from .layers import (
    PartlyFrozen,
    SamplingOffsets,
    XavierConv2d,
    XavierLinear,
    ZeroLinear,
    to_tokens,
)
from .padding import (
    PaddedBatch,
    call_on_batch,
    hidden_padding,
    hide_padding_in,
    image_sizes_from_mask,
    keep_batch,
    may_hide_padding,
)
from .pixel_decoder import PIXEL_DECODER_CLASSES, Mask2FormerPixelDecoder
from .swin import use_windowed_layers
from .transformer_decoder import Mask2FormerMaskedAttention, Mask2FormerTransformerModule


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


class Mask2FormerPixelLevelModule(PartlyFrozen):
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
        hide_padding_in(self.encoder)
        self.decoder = PIXEL_DECODER_CLASSES[config.pixel_decoder](config, feature_channels=self.encoder.channels)
        self._freeze()

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
        if pixel_values.dtype != torch.float32:
            # A convolutional backbone keeps the layout. In float32 it is as fast in either.
            pixel_values = with_channels_last(pixel_values)
        size = (pixel_values.shape[2], pixel_values.shape[3])
        batch = None if image_sizes is None else PaddedBatch(image_sizes, size)
        features = call_on_batch(batch, self.encoder, pixel_values).feature_maps
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

    def _set_gradient_checkpointing(  # type: ignore[override] # releases differ in the other arguments
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, **kwargs: Any
    ) -> None:
        super()._set_gradient_checkpointing(enable, keep_batch(gradient_checkpointing_func), **kwargs)

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
