"""Translate a config of the original into those of our model and processor.

Only the options in `DEFAULTS` are read. An option whose value our model cannot express is refused by name.
"""

from __future__ import annotations

import ast
import json
import math
import reprlib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedConfig, ResNetConfig, SwinConfig

from m2f_hf import M2FImageProcessor, Mask2FormerConfig, Mask2FormerVideoConfig, Mask2FormerVideoProcessor
from m2f_hf.known.label_sets import TASKS, Label, LabelSet, label_set


# What detectron2 and the original assume for an option that a config leaves out.
DEFAULTS: dict[str, Any] = {
    "DATASETS.TRAIN": (),
    "DATASETS.TEST": (),
    "INPUT.FORMAT": "BGR",
    "INPUT.MIN_SIZE_TEST": 800,
    "INPUT.MAX_SIZE_TEST": 1333,
    "TEST.DETECTIONS_PER_IMAGE": 100,
    "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
    "MODEL.PIXEL_MEAN": [103.53, 116.28, 123.675],
    "MODEL.PIXEL_STD": [1.0, 1.0, 1.0],
    "MODEL.BACKBONE.NAME": "build_resnet_backbone",
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.RESNETS.NORM": "FrozenBN",
    "MODEL.RESNETS.OUT_FEATURES": ["res4"],
    "MODEL.RESNETS.NUM_GROUPS": 1,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 64,
    "MODEL.RESNETS.STRIDE_IN_1X1": True,
    "MODEL.RESNETS.RES5_DILATION": 1,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 64,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 256,
    "MODEL.RESNETS.DEFORM_ON_PER_STAGE": [False, False, False, False],
    "MODEL.SWIN.PRETRAIN_IMG_SIZE": 224,
    "MODEL.SWIN.PATCH_SIZE": 4,
    "MODEL.SWIN.EMBED_DIM": 96,
    "MODEL.SWIN.DEPTHS": [2, 2, 6, 2],
    "MODEL.SWIN.NUM_HEADS": [3, 6, 12, 24],
    "MODEL.SWIN.WINDOW_SIZE": 7,
    "MODEL.SWIN.MLP_RATIO": 4.0,
    "MODEL.SWIN.QKV_BIAS": True,
    "MODEL.SWIN.QK_SCALE": None,
    "MODEL.SWIN.DROP_RATE": 0.0,
    "MODEL.SWIN.ATTN_DROP_RATE": 0.0,
    "MODEL.SWIN.DROP_PATH_RATE": 0.3,
    "MODEL.SWIN.APE": False,
    "MODEL.SWIN.PATCH_NORM": True,
    "MODEL.SWIN.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.SEM_SEG_HEAD.NAME": "SemSegFPNHead",
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 54,
    "MODEL.SEM_SEG_HEAD.IGNORE_VALUE": 255,
    "MODEL.SEM_SEG_HEAD.IN_FEATURES": ["p2", "p3", "p4", "p5"],
    "MODEL.SEM_SEG_HEAD.COMMON_STRIDE": 4,
    "MODEL.SEM_SEG_HEAD.NORM": "GN",
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 128,
    "MODEL.SEM_SEG_HEAD.MASK_DIM": 256,
    "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME": "BasePixelDecoder",
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": 0,
    "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES": ["res3", "res4", "res5"],
    "MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME": "MultiScaleMaskedTransformerDecoder",
    "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE": "res5",
    "MODEL.MASK_FORMER.DEEP_SUPERVISION": True,
    "MODEL.MASK_FORMER.NO_OBJECT_WEIGHT": 0.1,
    "MODEL.MASK_FORMER.CLASS_WEIGHT": 1.0,
    "MODEL.MASK_FORMER.MASK_WEIGHT": 20.0,
    "MODEL.MASK_FORMER.DICE_WEIGHT": 1.0,
    "MODEL.MASK_FORMER.NHEADS": 8,
    "MODEL.MASK_FORMER.DROPOUT": 0.1,
    "MODEL.MASK_FORMER.DIM_FEEDFORWARD": 2048,
    "MODEL.MASK_FORMER.DEC_LAYERS": 6,
    "MODEL.MASK_FORMER.PRE_NORM": False,
    "MODEL.MASK_FORMER.HIDDEN_DIM": 256,
    "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": 100,
    "MODEL.MASK_FORMER.ENFORCE_INPUT_PROJ": False,
    "MODEL.MASK_FORMER.SIZE_DIVISIBILITY": 32,
    "MODEL.MASK_FORMER.TRAIN_NUM_POINTS": 12544,
    "MODEL.MASK_FORMER.OVERSAMPLE_RATIO": 3.0,
    "MODEL.MASK_FORMER.IMPORTANCE_SAMPLE_RATIO": 0.75,
    "MODEL.MASK_FORMER.TEST.SEMANTIC_ON": True,
    "MODEL.MASK_FORMER.TEST.INSTANCE_ON": False,
    "MODEL.MASK_FORMER.TEST.PANOPTIC_ON": False,
    "MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD": 0.0,
    "MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD": 0.0,
    "MODEL.MASK_FORMER.TEST.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE": False,
}

_VIDEO_ARCHITECTURE = "VideoMaskFormer"

# The only values that our model has an equivalent of, and why. Lists of features may be in any order, as the original
# sorts them. Options of a part that the model hasn't don't matter.
_FOUR_STAGES = ["res2", "res3", "res4", "res5"]
_SUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "INPUT.FORMAT": (("RGB", "BGR"), "Pictures come in three channels."),
    "MODEL.META_ARCHITECTURE": (("MaskFormer", _VIDEO_ARCHITECTURE), "Other architectures are other models."),
    "MODEL.BACKBONE.NAME": (("build_resnet_backbone", "D2SwinTransformer"), "Other backbones have other parameters."),
    "MODEL.SEM_SEG_HEAD.NAME": (("MaskFormerHead",), "Other heads classify pixel by pixel."),
    "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME": (
        ("MSDeformAttnPixelDecoder", "BasePixelDecoder"),
        "That of MaskFormer's first version has another encoder.",
    ),
    "MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME": (
        ("MultiScaleMaskedTransformerDecoder", "VideoMultiScaleMaskedTransformerDecoder"),
        "MaskFormer's first version has no masked attention.",
    ),
    "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE": (
        ("multi_scale_pixel_decoder",),
        "Masked attention reads three levels in turn.",
    ),
    "MODEL.SEM_SEG_HEAD.IN_FEATURES": ((_FOUR_STAGES,), "The pixel decoder reads strides 4, 8, 16 and 32."),
    "MODEL.SEM_SEG_HEAD.COMMON_STRIDE": ((4,), "Mask features have stride 4."),
    "MODEL.SEM_SEG_HEAD.NORM": (("GN",), "The pixel decoder's convolutions have no bias, but a group norm."),
}
_SUPPORTED_DEFORMABLE: dict[str, tuple[tuple[Any, ...], str]] = {
    "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES": (
        (["res3", "res4", "res5"],),
        "The deformable encoder has three levels.",
    )
}
_SUPPORTED_RESNET: dict[str, tuple[tuple[Any, ...], str]] = {
    "MODEL.RESNETS.DEPTH": ((18, 34, 50, 101, 152), "There are no other ResNets."),
    "MODEL.RESNETS.NORM": (("FrozenBN", "SyncBN", "BN"), "The backbone has batch norms."),
    "MODEL.RESNETS.OUT_FEATURES": ((_FOUR_STAGES,), "The pixel decoder reads four levels."),
    "MODEL.RESNETS.NUM_GROUPS": ((1,), "A ResNeXt's grouped convolutions have no equivalent."),
    "MODEL.RESNETS.RES5_DILATION": ((1,), "The last level has stride 32."),
    "MODEL.RESNETS.DEFORM_ON_PER_STAGE": (([False] * 4,), "Deformable convolutions have no equivalent."),
}
_SUPPORTED_SWIN: dict[str, tuple[tuple[Any, ...], str]] = {
    "MODEL.SWIN.PATCH_SIZE": ((4,), "The first level has stride 4."),
    "MODEL.SWIN.QK_SCALE": ((None,), "Attention is scaled by the width of a head."),
    "MODEL.SWIN.APE": ((False,), "Resized absolute position embeddings have no equivalent in transformers' Swin."),
    "MODEL.SWIN.PATCH_NORM": ((True,), "Patch embeddings are normalised."),
    "MODEL.SWIN.OUT_FEATURES": ((_FOUR_STAGES,), "The pixel decoder reads four levels."),
}
_SIZE_DIVISOR = 32  # what the model takes an image's own padding to be
_PIXEL_DECODERS = {"MSDeformAttnPixelDecoder": "msdeform", "BasePixelDecoder": "fpn"}
_STAGES = ["stage1", "stage2", "stage3", "stage4"]
_RESNETS = {
    18: ("basic", [2, 2, 2, 2]),
    34: ("basic", [3, 4, 6, 3]),
    50: ("bottleneck", [3, 4, 6, 3]),
    101: ("bottleneck", [3, 4, 23, 3]),
    152: ("bottleneck", [3, 8, 36, 3]),
}

# The data sets of the released checkpoints under the names that the original registers them by. The first pattern that
# fits a name counts, and only if the number of classes is the same.
_DATA_SETS = {
    "coco_*_panoptic*": "coco-panoptic",
    "coco_20??_*": "coco-instance",
    "ade20k_panoptic_*": "ade20k-panoptic",
    "ade20k_sem_seg_*": "ade20k-semantic",
    "ade20k_instance_*": "ade20k-instance",
    "cityscapes_*_panoptic_*": "cityscapes-panoptic",
    "cityscapes_*_sem_seg_*": "cityscapes-semantic",
    "cityscapes_*_instance_seg_*": "cityscapes-instance",
    "mapillary_vistas_panoptic_*": "mapillary-panoptic",
    "mapillary_vistas_sem_seg_*": "mapillary-semantic",
    "ytvis_2019_*": "ytvis2019",
    "ytvis_2021_*": "ytvis2021",
}


class UnsupportedOptionError(ValueError):
    """The config has an option that our model has no equivalent of; the message names it."""


def read_config(path: str | Path) -> dict[str, Any]:
    """Read a config of the original, its bases included, and check that our model can express it.

    Args:
        path: A YAML file, complete or with a `_BASE_` (or several) relative to itself. Tags that ask for code are never
            executed.

    Returns:
        The value of every option of `DEFAULTS`, by dotted name.

    Raises:
        FileNotFoundError: The file or one of its bases is missing.
        UnsupportedOptionError: An option has a value without an equivalent, or one that is code.
        ValueError: The file is no YAML mapping, its bases go round in a circle, or an option is of the wrong type.
    """
    configs = _with_bases(Path(path), (), {})
    options = {name: _decoded(_look_up(configs, name), default) for name, default in DEFAULTS.items()}
    for name, value in options.items():
        if _has_unread(value):
            raise UnsupportedOptionError(
                f"{name} in {path} is an expression to execute. Write its value instead; nothing in a config is run."
            )
        if not _has_kind(value, DEFAULTS[name]):
            raise ValueError(f"{name} in {path} is {_REPR.repr(value)}; a value like {DEFAULTS[name]!r} is expected.")
    _check_supported(options)
    return options


def read_labels(path: str | Path, num_labels: int) -> list[Label]:
    """Read the classes of a checkpoint from a JSON file.

    Args:
        path: A list of `{"id": int, "name": str, "isthing": bool, "color": [R, G, B]}` or an object that holds one as
            `categories`. Ids count from 0 in the order of training. Only a panoptic checkpoint needs `isthing`; none
            needs `color`, but all classes have one or none has.
        num_labels: How many classes the checkpoint has.

    Raises:
        ValueError: Another number of classes, other ids, an entry without id or name, or a colour for some alone.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        categories = content["categories"] if isinstance(content, dict) else content
        by_id = {int(entry["id"]): _read_label(entry) for entry in categories}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f'{path} is no list of labels: expected [{{"id": 0, "name": "cat", "isthing": true}}, …] ({error!r}).'
        ) from error
    if sorted(by_id) != list(range(num_labels)) or len(categories) != num_labels:
        raise ValueError(
            f"{path} has {len(categories)} labels; the config (MODEL.SEM_SEG_HEAD.NUM_CLASSES) needs ids 0 to "
            f"{num_labels - 1}, once each: ids count from 0 in the order of training."
        )
    colorless = [label.name for label in by_id.values() if label.color is None]
    if 0 < len(colorless) < num_labels:
        raise ValueError(
            f"{path} gives some classes a color, and none to {len(colorless)}, such as {colorless[0]!r}: give one to "
            "every class, or to none."
        )
    return [by_id[i] for i in range(num_labels)]


def _read_label(entry: Mapping[str, Any]) -> Label:
    is_thing, color = entry.get("isthing"), entry.get("color")
    if color is not None:
        red, green, blue = (int(value) for value in color)
        color = (red, green, blue)
    return Label(str(entry["name"]), None if is_thing is None else bool(is_thing), color, int(entry["id"]))


def config_from_yaml(options: Mapping[str, Any], labels: Sequence[Label] | None = None) -> dict[str, Any]:
    """Return the arguments of `Mask2FormerConfig` for a config that `read_config` returned.

    Without `labels` the classes are those of DATASETS.TRAIN where that is one of the released checkpoints' data sets,
    else `LABEL_0`, `LABEL_1`, … as in `transformers`. A dropout other than 0 acts in the transformer decoder too, where
    the original has none; outputs in evaluation are the same.
    """
    head, former = _section(options, "MODEL.SEM_SEG_HEAD"), _section(options, "MODEL.MASK_FORMER")
    labels = labels or _known_labels(options)
    names = [label.name for label in labels] or [f"LABEL_{i}" for i in range(head["NUM_CLASSES"])]
    colors = [list(label.color) for label in labels if label.color is not None]
    backbone_config, freeze_backbone_norm = _backbone(options)
    return {
        **({"label_colors": colors} if len(colors) == len(names) else {}),
        "backbone_config": backbone_config,
        "freeze_backbone_norm": freeze_backbone_norm,
        "pixel_decoder": _PIXEL_DECODERS[head["PIXEL_DECODER_NAME"]],
        "feature_size": head["CONVS_DIM"],
        "mask_feature_size": head["MASK_DIM"],
        "hidden_dim": former["HIDDEN_DIM"],
        "encoder_feedforward_dim": 1024,  # the original passes no other width to its deformable encoder
        "encoder_layers": head["TRANSFORMER_ENC_LAYERS"],
        "decoder_layers": former["DEC_LAYERS"],
        "num_attention_heads": former["NHEADS"],
        "dropout": former["DROPOUT"],
        "dim_feedforward": former["DIM_FEEDFORWARD"],
        "pre_norm": former["PRE_NORM"],
        "enforce_input_projection": former["ENFORCE_INPUT_PROJ"],
        "ignore_value": head["IGNORE_VALUE"],
        "num_queries": former["NUM_OBJECT_QUERIES"],
        "no_object_weight": former["NO_OBJECT_WEIGHT"],
        "class_weight": former["CLASS_WEIGHT"],
        "mask_weight": former["MASK_WEIGHT"],
        "dice_weight": former["DICE_WEIGHT"],
        "train_num_points": former["TRAIN_NUM_POINTS"],
        "oversample_ratio": former["OVERSAMPLE_RATIO"],
        "importance_sample_ratio": former["IMPORTANCE_SAMPLE_RATIO"],
        "use_auxiliary_loss": former["DEEP_SUPERVISION"],
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
    }


def is_video(options: Mapping[str, Any]) -> bool:
    """Return whether it is the config of a video model."""
    return options["MODEL.META_ARCHITECTURE"] == _VIDEO_ARCHITECTURE


def build_config(options: Mapping[str, Any], labels: Sequence[Label] | None = None) -> Mask2FormerConfig:
    """Return the config of the image or video model; see `config_from_yaml`."""
    config_class = Mask2FormerVideoConfig if is_video(options) else Mask2FormerConfig
    return config_class(**config_from_yaml(options, labels))


def build_processor(options: Mapping[str, Any], labels: Sequence[Label] | None = None) -> M2FImageProcessor:
    """Return the processor of the image or video model; see `processor_from_yaml`."""
    processor_class = Mask2FormerVideoProcessor if is_video(options) else M2FImageProcessor
    return processor_class(**processor_from_yaml(options, labels))


def processor_from_yaml(options: Mapping[str, Any], labels: Sequence[Label] | None = None) -> dict[str, Any]:
    """Return the arguments of `M2FImageProcessor`, or the video processor, for a config that `read_config` returned.

    The task is the widest that is switched on for tests, or that of a known data set of things alone.

    Raises:
        UnsupportedOptionError: A panoptic checkpoint of an unknown data set without labels: its stuff is not known.
    """
    test = _section(options, "MODEL.MASK_FORMER.TEST")
    task = _task(options, labels or _known_labels(options))
    return {
        "task": task,
        "label_ids_to_fuse": _stuff_ids(options, labels) if task == "panoptic" else None,
        "threshold": test["OBJECT_MASK_THRESHOLD"],
        "overlap_mask_area_threshold": test["OVERLAP_THRESHOLD"],
        # For clips the original writes 10 into its code.
        "max_detections": 10 if is_video(options) else options["TEST.DETECTIONS_PER_IMAGE"],
        # The original keeps the padded frame only where it has neither instances nor segments to return.
        "semantic_resize_before_inference": bool(
            test["SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE"] or test["PANOPTIC_ON"] or test["INSTANCE_ON"]
        ),
        "channel_order": options["INPUT.FORMAT"],
        "size": {"shortest_edge": options["INPUT.MIN_SIZE_TEST"], "longest_edge": options["INPUT.MAX_SIZE_TEST"]},
        "size_divisor": _SIZE_DIVISOR,
        "image_mean": _per_unit(options["MODEL.PIXEL_MEAN"]),
        "image_std": _per_unit(options["MODEL.PIXEL_STD"]),
        "ignore_index": options["MODEL.SEM_SEG_HEAD.IGNORE_VALUE"],
    }


def _backbone(options: Mapping[str, Any]) -> tuple[PreTrainedConfig, bool]:
    """Return the backbone's config, and whether its batch norms are frozen in training."""
    if _is_swin(options):
        return _swin(_section(options, "MODEL.SWIN")), False
    section = _section(options, "MODEL.RESNETS")
    return _resnet(section), section["NORM"] == "FrozenBN"


def _swin(section: Mapping[str, Any]) -> SwinConfig:
    return SwinConfig(
        image_size=section["PRETRAIN_IMG_SIZE"],
        patch_size=section["PATCH_SIZE"],
        embed_dim=section["EMBED_DIM"],
        depths=list(section["DEPTHS"]),
        num_heads=list(section["NUM_HEADS"]),
        window_size=section["WINDOW_SIZE"],
        mlp_ratio=section["MLP_RATIO"],
        qkv_bias=section["QKV_BIAS"],
        hidden_dropout_prob=section["DROP_RATE"],
        attention_probs_dropout_prob=section["ATTN_DROP_RATE"],
        drop_path_rate=section["DROP_PATH_RATE"],
        out_features=_STAGES,
    )


def _resnet(section: Mapping[str, Any]) -> ResNetConfig:
    layer_type, depths = _RESNETS[section["DEPTH"]]
    return ResNetConfig(
        embedding_size=section["STEM_OUT_CHANNELS"],
        hidden_sizes=[section["RES2_OUT_CHANNELS"] * 2**stage for stage in range(4)],
        depths=depths,
        layer_type=layer_type,
        downsample_in_bottleneck=section["STRIDE_IN_1X1"],
        out_features=_STAGES,
    )


def _task(options: Mapping[str, Any], labels: Sequence[Label]) -> str:
    tested = [task for task in TASKS if options[f"MODEL.MASK_FORMER.TEST.{task.upper()}_ON"]]
    if not tested:
        raise UnsupportedOptionError(
            "MODEL.MASK_FORMER.TEST has PANOPTIC_ON, INSTANCE_ON and SEMANTIC_ON all off: set the checkpoint's task."
        )
    known = _known_set(options)
    has_stuff = any(label.is_thing is False for label in labels)
    # The original switches every test on for ADE20K's instances as well.
    if known and known.task == "instance" and "instance" in tested and not has_stuff:
        return "instance"
    return tested[0]  # the widest


def _stuff_ids(options: Mapping[str, Any], labels: Sequence[Label] | None) -> list[int]:
    for known in (labels, _known_labels(options)):
        if known and all(label.is_thing is not None for label in known):
            return [i for i, label in enumerate(known) if not label.is_thing]
    raise UnsupportedOptionError(
        f"DATASETS.TRAIN is {list(options['DATASETS.TRAIN'])}, no panoptic data set of "
        f"{options['MODEL.SEM_SEG_HEAD.NUM_CLASSES']} classes whose things are known. Pass --labels with `isthing` for "
        "each class."
    )


def _known_set(options: Mapping[str, Any]) -> LabelSet | None:
    """Return the released data set it was trained or tested on, or None where there is none with as many classes."""
    for name in (*options["DATASETS.TRAIN"], *options["DATASETS.TEST"]):
        fitting = next((known for pattern, known in _DATA_SETS.items() if fnmatchcase(str(name), pattern)), None)
        if fitting and len(label_set(fitting).labels) == options["MODEL.SEM_SEG_HEAD.NUM_CLASSES"]:
            return label_set(fitting)
    return None


def _known_labels(options: Mapping[str, Any]) -> Sequence[Label]:
    known = _known_set(options)
    return known.labels if known else ()


def _per_unit(values: list[float]) -> list[float]:
    """Convert the original's 0–255 to our 0–1, rounded so that 123.675 becomes the usual 0.485."""
    return [round(value / 255, 10) for value in values]


def _is_swin(options: Mapping[str, Any]) -> bool:
    return options["MODEL.BACKBONE.NAME"] == "D2SwinTransformer"


def _has_deformable_encoder(options: Mapping[str, Any]) -> bool:
    return options["MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME"] == "MSDeformAttnPixelDecoder"


def _section(options: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {
        option.removeprefix(f"{name}."): value for option, value in options.items() if option.startswith(f"{name}.")
    }


def _check_supported(options: Mapping[str, Any]) -> None:
    supported = {**_SUPPORTED, **(_SUPPORTED_SWIN if _is_swin(options) else _SUPPORTED_RESNET)}
    if _has_deformable_encoder(options):
        supported |= _SUPPORTED_DEFORMABLE
    for name, (choices, reason) in supported.items():
        value = options[name]
        if isinstance(value, list | tuple):
            value = sorted(value, key=str)
        if value not in choices:
            known = " or ".join(repr(choice) for choice in choices)
            raise UnsupportedOptionError(f"{name} is {options[name]!r}; only {known} converts. {reason}")
    decoder = options["MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME"]
    if decoder.startswith("Video") != is_video(options):
        raise UnsupportedOptionError(
            f"MODEL.META_ARCHITECTURE is {options['MODEL.META_ARCHITECTURE']!r} and "
            f"MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME is {decoder!r}; both must be of images or "
            "both of video."
        )
    if not _is_swin(options):
        _check_resnet(_section(options, "MODEL.RESNETS"))
    _check_numbers(options)


def _check_numbers(options: Mapping[str, Any]) -> None:
    for name in ("INPUT.MIN_SIZE_TEST", "INPUT.MAX_SIZE_TEST", *_COUNTS):
        if options[name] < 1:
            raise UnsupportedOptionError(f"{name} is {options[name]}; give a number of at least 1.")
    if _has_deformable_encoder(options) and options["MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS"] < 1:
        raise UnsupportedOptionError(
            f"MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS is {options['MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS']}; our "
            "deformable pixel decoder has at least one layer."
        )
    divisor = options["MODEL.MASK_FORMER.SIZE_DIVISIBILITY"]
    if divisor != _SIZE_DIVISOR and not (divisor < 0 and _is_swin(options)):  # below 0: the backbone's own; a Swin's 32
        raise UnsupportedOptionError(
            f"MODEL.MASK_FORMER.SIZE_DIVISIBILITY is {divisor}; our model takes pictures padded to a multiple of "
            f"{_SIZE_DIVISOR}. Set it to {_SIZE_DIVISOR} to convert all the same: results near the right and lower "
            "edge then differ a little."
        )
    for name in ("MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"):
        if len(options[name]) != 3 or not all(isinstance(value, int | float) for value in options[name]):
            raise UnsupportedOptionError(f"{name} is {options[name]!r}; three numbers are expected, one for a channel.")


_COUNTS = (
    "TEST.DETECTIONS_PER_IMAGE",
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES",
    "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES",
    "MODEL.MASK_FORMER.DEC_LAYERS",
)


def _check_resnet(section: Mapping[str, Any]) -> None:
    layer_type, _ = _RESNETS[section["DEPTH"]]
    if layer_type == "bottleneck" and section["RES2_OUT_CHANNELS"] != 4 * section["WIDTH_PER_GROUP"]:
        raise UnsupportedOptionError(
            f"MODEL.RESNETS.WIDTH_PER_GROUP is {section['WIDTH_PER_GROUP']}; our bottleneck blocks are a quarter of "
            f"RES2_OUT_CHANNELS wide, which is {section['RES2_OUT_CHANNELS']}."
        )


class _Unread:
    """Replaces a YAML node that only code could evaluate."""


def _has_unread(value: Any) -> bool:
    return any(isinstance(item, _Unread) for item in (value if isinstance(value, list | tuple) else (value,)))


def _decoded(value: Any, default: Any) -> Any:
    """Decode a value in Python's notation, which YAML takes for text: `("coco_2017_train", )`, `1e-1`."""
    if isinstance(value, str) and not isinstance(default, str) and len(value) <= _LONGEST_LITERAL:
        try:
            return ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return value
    return value


_LONGEST_LITERAL = 1000


def _has_kind(value: Any, default: Any) -> bool:
    if default is None:
        return value is None or _is_scalar(value)
    if isinstance(default, list | tuple):
        return isinstance(value, list | tuple) and all(_is_scalar(item) for item in value)
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, float):
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, type(default)) and not isinstance(value, bool)


_REPR = reprlib.Repr()
_REPR.maxlevel = 2  # keeps a value that refers to itself a billion times on one line


def _is_scalar(value: Any) -> bool:
    return isinstance(value, str | int | float)


def _with_bases(path: Path, seen: tuple[Path, ...], read: dict[Path, dict[str, Any]]) -> list[dict[str, Any]]:
    """Read a config and its bases, each file once; the files that override others come first."""
    path = path.resolve()
    if path in seen:
        raise ValueError(f"{path} is its own _BASE_, by way of {', '.join(str(other) for other in seen)}.")
    if not path.is_file():
        raise FileNotFoundError(f"There is no config {path}" + (f", the _BASE_ of {seen[-1]}." if seen else "."))
    if path not in read:
        read[path] = _parse(path)
        bases = read[path].get("_BASE_", [])
        for base in reversed(bases if isinstance(bases, list) else [bases]):  # a later one overrides those before it
            if not isinstance(base, str) or "://" in base:
                raise UnsupportedOptionError(
                    f"_BASE_ in {path} is {_REPR.repr(base)}; only paths of local files are followed."
                )
            _with_bases(path.parent / Path(base).expanduser(), (*seen, path), read)
    return list(read.values())


def _look_up(configs: list[dict[str, Any]], name: str) -> Any:
    """Find an option by its dotted name in the first config that has it.

    Configs aren't merged or written out in full: a few lines of YAML can refer to themselves a billion times.
    """
    for config in configs:
        value: Any = config
        for part in name.split("."):
            if isinstance(value, _Unread):
                return value
            value = value.get(part, _NOT_GIVEN) if isinstance(value, dict) else _NOT_GIVEN
        if value is not _NOT_GIVEN:
            return value
    return DEFAULTS[name]


_NOT_GIVEN = object()


def _parse(path: Path) -> dict[str, Any]:
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), _InertLoader)
    # The parser checks neither what it makes numbers and dates of nor how deep lists are nested.
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} is no YAML file ({str(error) or type(error).__name__}).") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is no config of the original: expected options by name.")
    return config


class _InertLoader(yaml.SafeLoader):
    """A safe loader that makes `_Unread` of tags it doesn't know (`!!python/object…`)."""

    MOST_KEYS = 10_000

    def flatten_mapping(self, node: Any) -> None:
        super().flatten_mapping(node)
        if len(node.value) > self.MOST_KEYS:
            raise yaml.constructor.ConstructorError(None, None, "merge keys (<<) without end", node.start_mark)


_InertLoader.add_constructor(None, lambda loader, node: _Unread())
