"""Loads pretrained backbones: the body of an image classifier, to start training from."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_BACKBONE_MAPPING, AutoBackbone, AutoConfig, PreTrainedConfig

from ..known.lookup import find_config


STRIDES = (4, 8, 16, 32)
_PROBE_SIZE = (224, 320)  # multiples of 32, and not square: segmentation takes images of any shape
_LOOKUP_ARGUMENTS = ("revision", "subfolder", "token", "cache_dir", "local_files_only")
_WHAT_WORKS = "use a backbone with a pyramid: Swin, SwinV2, ResNet, ConvNeXt, ConvNeXtV2, PVTv2 or DINOv3-ConvNeXt"


def read_backbone_config(
    name: str, settings: Mapping[str, Any] | None = None, download: Mapping[str, Any] | None = None
) -> PreTrainedConfig:
    """Return the configuration of a pretrained backbone that gives four maps, at strides 4, 8, 16 and 32.

    Args:
        name: folder, or id on the Hub, of a model whose body `AutoBackbone` knows, with a classifier or without.
        settings: fields that differ from the checkpoint's, such as `drop_path_rate`.
        download: `revision`, `token`, `cache_dir` and the like.

    Raises:
        ValueError: the model has no such maps; the message says which it has.
        OSError: there is no such model; see `find_config`.
    """
    download = download or {}
    find_config(name, **{argument: value for argument, value in download.items() if argument in _LOOKUP_ARGUMENTS})
    config = AutoConfig.from_pretrained(name, **(settings or {}), **download)
    if type(config) not in MODEL_FOR_BACKBONE_MAPPING:
        reason = "transformers has no backbone of this type"
        if isinstance(getattr(config, "patch_size", None), int) and not hasattr(config, "depths"):
            reason = f"a plain transformer, whose every layer has the stride {config.patch_size}"
        raise ValueError(
            f"{name} is a {config.model_type!r}: {reason}. Four maps at strides {STRIDES} are needed; {_WHAT_WORKS}."
        )
    config.out_features = stages_at_strides(config)
    # A classifier's names are not ours, and would travel with every checkpoint.
    config.num_labels = 2
    config.architectures = None
    config.dtype = None  # training starts in full precision
    return config


def stages_at_strides(config: PreTrainedConfig) -> list[str]:
    """Return the last of a backbone's stages at each of the strides 4, 8, 16 and 32, found by running all.

    Raises:
        ValueError: there is a stride without a stage, or the backbone cannot run on images of any shape.
    """
    config = deepcopy(config)
    stages = [stage for stage in config.stage_names if stage != "stem"]
    config.out_features = stages
    try:
        with torch.device("meta"), torch.no_grad():
            backbone = AutoBackbone.from_config(config).eval()
            maps = backbone(torch.empty(1, getattr(config, "num_channels", 3), *_PROBE_SIZE)).feature_maps
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"the backbone {config.model_type!r} cannot run on an image of {_PROBE_SIZE[0]}x{_PROBE_SIZE[1]}: "
            f"{error}; {_WHAT_WORKS}."
        ) from error
    strides = [round(_PROBE_SIZE[0] / features.shape[2]) for features in maps]
    at_stride = dict(zip(strides, stages, strict=True))
    if not all(stride in at_stride for stride in STRIDES):
        given = f"the stride {strides[0]} alone" if len(at_stride) == 1 else f"the strides {sorted(at_stride)}"
        raise ValueError(
            f"the backbone {config.model_type!r} gives maps at {given}, but four at strides {STRIDES} are needed; "
            f"{_WHAT_WORKS}."
        )
    channels = [features.shape[1] for features in maps]
    if channels != list(backbone.channels):
        raise ValueError(
            f"the backbone {config.model_type!r} of the installed transformers says {list(backbone.channels)} of its "
            f"maps' channels, which are {channels}; {_WHAT_WORKS}."
        )
    return [at_stride[stride] for stride in STRIDES]


def load_backbone_weights(name: str, config: PreTrainedConfig, download: Mapping[str, Any] | None = None) -> nn.Module:
    """Return the backbone with a checkpoint's weights, in float32.

    Raises:
        ValueError: the checkpoint leaves a parameter out, other than the norms of the outputs, which classifiers lack.
    """
    backbone_class: Any = MODEL_FOR_BACKBONE_MAPPING[type(config)]
    backbone, loading = backbone_class.from_pretrained(
        name, config=config, dtype=torch.float32, output_loading_info=True, **(download or {})
    )
    missing = sorted(key for key in loading["missing_keys"] if not key.startswith("hidden_states_norms."))
    if missing:
        raise ValueError(f"{name} has no weights for {len(missing)} parameters of its backbone: {missing[:5]}")
    return backbone
