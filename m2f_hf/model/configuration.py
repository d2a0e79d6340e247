"""Configurations of the image and the video model: typed defaults, impossible combinations refused when built."""

import math
from copy import deepcopy
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneConfigMixin, consolidate_backbone_kwargs_to_config
from transformers.utils import logging

from ..known.stock_checkpoints import add_known_labels, checkpoint_name


logger = logging.get_logger(__name__)

_DEFAULT_BACKBONE: dict[str, Any] = {
    "depths": [2, 2, 18, 2],
    "drop_path_rate": 0.3,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
PIXEL_DECODERS = ("msdeform", "fpn")
LABEL_FRAMES = ("any", "last")
NUM_NORM_GROUPS = 32  # groups of every GroupNorm in the pixel decoders


@strict
class Mask2FormerConfig(PreTrainedConfig):
    r"""
    Configuration of [`Mask2FormerModel`] and [`Mask2FormerForUniversalSegmentation`].

    Fields and defaults are those of `transformers`' `Mask2FormerConfig`; a configuration saved by it
    (`model_type="mask2former"`) is read as it is. Added here: `pixel_decoder`, `freeze_backbone_norm` and
    `label_colors`.

    Args:
        backbone_config: configuration (or its dict) of any `AutoBackbone` with four feature maps at strides 4, 8, 16
            and 32. Default: Swin-S.
        feature_size: channels of the pixel decoder; a multiple of 32 (its GroupNorms have 32 groups).
        mask_feature_size: channels of the mask features and of the mask embeddings.
        hidden_dim: width of the transformer decoder; a multiple of 4 (position encoding) and of the heads.
        encoder_feedforward_dim: feed-forward width of the deformable encoder layers.
        activation_function: activation of the decoder's feed-forward blocks.
        encoder_layers: deformable attention layers in the pixel decoder (`pixel_decoder="msdeform"` only).
        decoder_layers: number of predictions; there are `decoder_layers - 1` decoder layers, since the raw queries
            predict too (paper, section 3.2.1).
        num_attention_heads: heads of the deformable encoder and of the decoder.
        dropout: dropout probability everywhere outside the backbone, in [0, 1).
        dim_feedforward: feed-forward width of the decoder layers.
        pre_norm: LayerNorm before instead of after each decoder block.
        enforce_input_projection: 1x1 convolutions before the decoder even where the widths agree.
        common_stride: stride of the mask features; only 4 exists.
        ignore_value: label value that means "no label" in label maps.
        num_queries: number of object queries.
        no_object_weight: weight of the "no object" class in the cross-entropy.
        class_weight, mask_weight, dice_weight: weights of the three loss terms and of the matching costs.
        train_num_points: points sampled for each mask in matching and loss.
        oversample_ratio: candidates for each sampled point, at least 1.
        importance_sample_ratio: share of points chosen for their uncertainty, in [0, 1].
        init_std: not read; kept so that configurations go to `transformers` and back unchanged.
        init_xavier_std: gain of the Xavier-uniform initial weights.
        use_auxiliary_loss: whether every prediction, or only the last, enters the loss.
        feature_strides: strides of the backbone's feature maps.
        output_auxiliary_logits: whether `forward` also returns the earlier layers' logits.
        pixel_decoder: `"msdeform"` (paper's default) or `"fpn"` (the original's plain feature pyramid).
        freeze_backbone_norm: whether the backbone's batch norms keep their statistics and affine parameters in
            training (the original's FrozenBN).
        label_colors: an RGB colour, 0 to 255, for each label, to paint its segments in; None: no such colours. They are
            those of the present labels: when the number of labels changes, they are dropped.

    Raises:
        StrictDataclassFieldValidationError: a field of another type (`huggingface_hub.errors`).
        StrictDataclassClassValidationError: a combination that no model can be built from; the message names the field
            to change.
        ValueError: `backbone_config` is a dict of no known model type.
    """

    model_type = "m2f"
    attribute_map: ClassVar = {"hidden_size": "hidden_dim", "num_hidden_layers": "decoder_layers"}
    sub_configs: ClassVar = {"backbone_config": AutoConfig}

    backbone_config: dict | PreTrainedConfig | None = None
    feature_size: int = 256
    mask_feature_size: int = 256
    hidden_dim: int = 256
    encoder_feedforward_dim: int = 1024
    activation_function: str = "relu"
    encoder_layers: int = 6
    decoder_layers: int = 10
    num_attention_heads: int = 8
    dropout: float | int = 0.0
    dim_feedforward: int = 2048
    pre_norm: bool = False
    enforce_input_projection: bool = False
    common_stride: int = 4
    ignore_value: int = 255
    num_queries: int = 100
    no_object_weight: float | int = 0.1
    class_weight: float | int = 2.0
    mask_weight: float | int = 5.0
    dice_weight: float | int = 5.0
    train_num_points: int = 12544
    oversample_ratio: float | int = 3.0
    importance_sample_ratio: float | int = 0.75
    init_std: float | int = 0.02
    init_xavier_std: float | int = 1.0
    use_auxiliary_loss: bool = True
    feature_strides: list[int] | tuple[int, ...] = (4, 8, 16, 32)
    output_auxiliary_logits: bool | None = None
    pixel_decoder: str = "msdeform"
    freeze_backbone_norm: bool = False
    label_colors: list[list[int]] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("model_type", None)  # the class knows; in a stock dict it says "mask2former"
        if isinstance(self.backbone_config, dict) and self.backbone_config.get("model_type") not in CONFIG_MAPPING:
            raise ValueError(
                f"`backbone_config` has the `model_type` {self.backbone_config.get('model_type')!r}, which "
                "transformers does not know; use that of a backbone, for example 'swin' or 'resnet'."
            )
        if kwargs.get("backbone_kwargs") is None:
            kwargs.pop("backbone_kwargs", None)  # null in old files
        # Stock configurations saved before transformers 5 name their backbone in several fields; one place knows them.
        self.backbone_config, kwargs = consolidate_backbone_kwargs_to_config(
            backbone_config=self.backbone_config,
            default_config_type="swin",
            default_config_kwargs=deepcopy(_DEFAULT_BACKBONE),
            **kwargs,
        )
        super().__post_init__(**kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        labels = self.__dict__.get("id2label")
        if name == "id2label" and labels is not None and value is not None and len(labels) != len(value):
            self.label_colors = None
        super().__setattr__(name, value)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read settings as in `transformers`; those of a `mask2former` are read as ours with fewer fields.

        Where name or labels are those of a known data set, its colours are added, and its names replace placeholders.
        Those of a video model are read with a warning, as those of an image model with the same weights.
        """
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        model_type = config_dict.get("model_type")
        if model_type == "mask2former":
            config_dict = add_known_labels(config_dict, checkpoint_name(pretrained_model_name_or_path))
            config_dict["model_type"] = cls.model_type
        elif model_type == Mask2FormerVideoConfig.model_type != cls.model_type:
            logger.warning(
                f"{pretrained_model_name_or_path} is a video model, read here as an image model: the weights fit, but "
                "it learned from clips. For clips use `Mask2FormerForVideoSegmentation`."
            )
            fields_of_clips = Mask2FormerVideoConfig.__annotations__
            config_dict = {name: value for name, value in config_dict.items() if name not in fields_of_clips}
            config_dict["model_type"] = cls.model_type
        return config_dict, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build as in `transformers`; labels given here, or another number of them, replace all that the dict has.

        Raises:
            ValueError: `id2label` is no dict of whole numbers to names, or `num_labels` says another number.
            StrictDataclassClassValidationError: as when a configuration is built: what is given here is checked too.
        """
        id2label, num_labels = kwargs.get("id2label"), kwargs.get("num_labels")
        old_labels = config_dict.get("id2label")
        if id2label is not None or (
            num_labels is not None and old_labels is not None and num_labels != len(old_labels)
        ):
            config_dict = {k: v for k, v in config_dict.items() if k not in ("id2label", "label2id", "label_colors")}
        if id2label is not None:
            kwargs["id2label"] = id2label = _to_id2label(id2label)
            kwargs.setdefault("label2id", {label: index for index, label in id2label.items()})
            if num_labels not in (None, len(id2label)):
                raise ValueError(
                    f"`num_labels`={num_labels}, but `id2label` has {len(id2label)} labels: leave `num_labels` out."
                )
        loaded = super().from_dict(config_dict, **kwargs)
        # What the caller gave was set on a finished configuration, after its own checks.
        (loaded[0] if isinstance(loaded, tuple) else loaded).validate()
        return loaded

    def validate_architecture(self) -> None:
        """Refuse impossible combinations (`@strict` calls this after construction).

        Raises:
            ValueError: naming the field at fault and a value that works.
        """
        super().validate_architecture()
        self._validate_counts()
        self._validate_widths()
        self._validate_backbone()
        self._validate_colors()

    def _validate_widths(self) -> None:
        heads = self.num_attention_heads
        for name, base, reason in (
            ("hidden_dim", 4, "sine and cosine for y and x in the position encoding"),
            ("feature_size", NUM_NORM_GROUPS, "the groups of the pixel decoder's GroupNorms"),
        ):
            value, divisor = getattr(self, name), math.lcm(base, heads)
            if value < 1 or value % divisor:
                better = max(round(value / divisor), 1) * divisor
                raise ValueError(
                    f"`{name}`={value} must be a multiple of {base} ({reason}) and of `num_attention_heads`={heads}; "
                    f"use {better}, for example."
                )

    def _validate_counts(self) -> None:
        for name in (
            "num_attention_heads",
            "mask_feature_size",
            "encoder_feedforward_dim",
            "dim_feedforward",
            "decoder_layers",
            "num_queries",
            "num_labels",
            "train_num_points",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}`={getattr(self, name)} must be at least 1.")
        label_ids = sorted(int(index) for index in self.id2label or {})
        if label_ids != list(range(len(label_ids))):
            raise ValueError(
                f"`id2label` has the ids {_shortened(label_ids)}; ids count from 0 without a gap, in the "
                "order of the model's classes. Pass an `id2label` that does."
            )
        if self.activation_function not in ACT2FN:
            raise ValueError(
                f"`activation_function`={self.activation_function!r} is not known; use 'relu', 'gelu' or another name "
                "in `transformers.activations.ACT2FN`."
            )
        if self.pixel_decoder not in PIXEL_DECODERS:
            raise ValueError(f"`pixel_decoder`={self.pixel_decoder!r} is not known; use one of {list(PIXEL_DECODERS)}.")
        if self.pixel_decoder == "msdeform" and self.encoder_layers < 1:
            raise ValueError(
                f"`encoder_layers`={self.encoder_layers} must be at least 1; for a pixel decoder without deformable "
                "attention set `pixel_decoder='fpn'`."
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout`={self.dropout} must lie in [0, 1).")
        if not 0 <= self.importance_sample_ratio <= 1:
            raise ValueError(f"`importance_sample_ratio`={self.importance_sample_ratio} must lie in [0, 1].")
        if not 1 <= self.oversample_ratio < math.inf:
            raise ValueError(f"`oversample_ratio`={self.oversample_ratio} must be a finite number of at least 1.")
        for name in ("class_weight", "mask_weight", "dice_weight", "no_object_weight", "init_xavier_std"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"`{name}`={getattr(self, name)} must be a finite number, 0 or above.")
        if not any((self.class_weight, self.mask_weight, self.dice_weight)):
            raise ValueError("`class_weight`, `mask_weight` and `dice_weight` are all 0: nothing would be learned.")
        if self.common_stride != 4 or tuple(self.feature_strides) != (4, 8, 16, 32):
            raise ValueError(
                f"`common_stride`={self.common_stride} and `feature_strides`={list(self.feature_strides)}: only 4 and "
                "[4, 8, 16, 32] exist."
            )

    def _validate_colors(self) -> None:
        if self.label_colors is None:
            return
        if len(self.label_colors) != self.num_labels:
            raise ValueError(
                f"`label_colors` has {len(self.label_colors)} colours for {self.num_labels} labels; give one for each, "
                "or None."
            )
        for index, color in enumerate(self.label_colors):
            if len(color) != 3 or not all(0 <= value <= 255 for value in color):
                raise ValueError(f"`label_colors`[{index}]={color} must be red, green and blue from 0 to 255.")

    def _validate_backbone(self) -> None:
        backbone = self.backbone_config
        if not isinstance(backbone, BackboneConfigMixin):
            raise ValueError(
                f"`backbone_config` is a {type(backbone).__name__}, which is no backbone's; use that of 'swin' or "
                "'resnet', for example."
            )
        if len(backbone.out_indices) != len(self.feature_strides):
            raise ValueError(
                f"`backbone_config` gives {len(backbone.out_indices)} feature map(s), but four at strides 4, 8, 16 and "
                "32 are needed. Set its `out_features`, for example to ['stage1', 'stage2', 'stage3', 'stage4']."
            )


@strict
class Mask2FormerVideoConfig(Mask2FormerConfig):
    r"""
    Configuration of [`Mask2FormerForVideoSegmentation`]: that of the image model and two fields for clips.

    A configuration of an image model (ours or `transformers`') is read as it is, and its weights fit.

    Args:
        label_frame: what a query is to say of an instance that is absent (has no pixel) in a clip's last frame. "any":
            its class, as it is in some frame. "last": "no object", as the original trains.
        frames_per_batch: how many frames the backbone and the pixel decoder read at a time where no gradients are
            wanted: memory against launches. None: one on the CPU, where a frame alone is fastest, and 8 elsewhere.

    Raises:
        As [`Mask2FormerConfig`].
    """

    model_type = "m2f_video"

    label_frame: str = "any"
    frames_per_batch: int | None = None

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read settings; those of an image model are read as ours with fewer fields."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config_dict.get("model_type") == Mask2FormerConfig.model_type:
            config_dict["model_type"] = cls.model_type
        return config_dict, kwargs

    def validate_architecture(self) -> None:
        """Refuse impossible combinations, also of the fields for clips.

        Raises:
            ValueError: naming the field at fault and a value that works.
        """
        super().validate_architecture()
        if self.label_frame not in LABEL_FRAMES:
            raise ValueError(f"`label_frame`={self.label_frame!r} is not known; use one of {list(LABEL_FRAMES)}.")
        if self.frames_per_batch is not None and self.frames_per_batch < 1:
            raise ValueError(f"`frames_per_batch`={self.frames_per_batch} must be at least 1, or None.")


def _to_id2label(labels: Any) -> dict[int, str]:
    """Return labels by whole number; a JSON file has these as text."""
    try:
        return {int(index): label for index, label in labels.items()}
    except (AttributeError, TypeError, ValueError):
        raise ValueError(
            f"`id2label` is {_shortened(labels)}; pass a dict of ids and names, such as {{0: 'cat', 1: 'dog'}}."
        ) from None


def _shortened(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


__all__ = ["Mask2FormerConfig", "Mask2FormerVideoConfig"]
