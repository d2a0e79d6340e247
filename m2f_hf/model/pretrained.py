"""The base class of the models: loading with other heads, building around a backbone, initial weights."""

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from ..loss.criterion import Mask2FormerLoss
from .backbone import load_backbone_weights, read_backbone_config
from .configuration import Mask2FormerConfig
from .layers import SamplingOffsets, XavierConv2d, XavierLinear, ZeroLinear
from .padding import keep_batch
from .pixel_decoder import Mask2FormerPixelDecoder
from .transformer_decoder import Mask2FormerMaskedAttention


# Parameters of a checkpoint that do not fit when a field of the configuration changes.
_DEPENDS_ON_FIELD = {
    "num_labels": ("class_predictor.weight", "class_predictor.bias", "criterion.empty_weight"),
    "num_queries": ("transformer_module.queries_features.weight", "transformer_module.queries_embedder.weight"),
    "no_object_weight": ("criterion.empty_weight",),
}
_DOWNLOAD_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


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

    def option(self, name: str, value: bool | None) -> bool:
        """Return an argument of `forward`, or the configuration's where it is None."""
        return bool(getattr(self.config, name) if value is None else value)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # transformers looks for its attention interface in this file; ours reads the setting at each call just as well.
        return True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """Load a model as in `transformers`; heads that the caller gives another size are initialised without a flag.

        With `num_labels`, `id2label`, `num_queries` or a `config` that differ from the checkpoint's in the number of
        labels or queries, the class head (and the weights of its loss) or the queries get a new model's weights.
        `transformers` reports them by name, and `output_loading_info` has them as "mismatched_keys". Everything else
        is the checkpoint's. Other names for as many labels replace nothing, and another `no_object_weight` reaches the
        loss.

        Raises:
            RuntimeError: anything else has another shape than the checkpoint's.
        """
        replaced = cls._find_replaced(pretrained_model_name_or_path, kwargs)
        allows_others = bool(kwargs.pop("ignore_mismatched_sizes", False))
        wants_info = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(
            pretrained_model_name_or_path,
            *model_args,
            ignore_mismatched_sizes=allows_others or bool(replaced),
            output_loading_info=True,
            **kwargs,
        )
        model, info = loaded
        others = sorted(entry[0] for entry in info["mismatched_keys"] if not entry[0].endswith(replaced))
        if others and not allows_others:
            raise RuntimeError(
                f"{len(others)} parameters have other shapes in {pretrained_model_name_or_path}, apart from those that "
                f"another number of labels or queries replaces: {others[:5]}. Give them the checkpoint's sizes, or "
                "replace them too with `ignore_mismatched_sizes=True`."
            )
        if "criterion.empty_weight" in replaced and hasattr(model, "criterion"):
            model.criterion.empty_weight[-1] = model.config.no_object_weight
        return (model, info) if wants_info else model

    @classmethod
    def _find_replaced(cls, name: Any, kwargs: dict[str, Any]) -> tuple[str, ...]:
        """Return the ends of the names of parameters that the caller's fields give another size or value."""
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
        """Return a new model around a pretrained backbone, in evaluation mode: the start of training on a data set.

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
        """Set the original's initial weights; what it leaves at PyTorch's defaults is left there."""
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
