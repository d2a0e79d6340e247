"""Conversion of the original's checkpoints: every parameter accounted for, equal outputs, nothing executed."""

import copy
import functools
import gzip
import json
import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers.core_model_loading import revert_weight_conversion

from m2f_hf import Mask2FormerConfig, Mask2FormerForUniversalSegmentation
from m2f_hf.image_processing_mask2former import M2FImageProcessor


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "conversion"))

import convert_detectron2
from convert_detectron2 import convert
from detectron2_config import (
    DEFAULTS,
    UnsupportedOptionError,
    config_from_yaml,
    processor_from_yaml,
    read_config,
    read_labels,
)
from detectron2_mapping import constants, convert_state_dict, invert_state_dict, mapping_for, relative_position_index
from safe_pickle import load_state_dict


GOLDENS = [
    "coco_panoptic_r50",
    "coco_panoptic_swin",
    "coco_instance_swin",
    "ade20k_semantic_swinl",
    "fpn_basepixeldecoder",
]

# A small config in the original's terms; `changed` makes variants of it.
STAGES = ["res2", "res3", "res4", "res5"]
TINY = {
    "DATASETS": {"TRAIN": ["flowers_train"], "TEST": ["flowers_val"]},
    "INPUT": {"FORMAT": "RGB", "MIN_SIZE_TEST": 64, "MAX_SIZE_TEST": 128},
    "TEST": {"DETECTIONS_PER_IMAGE": 7},
    "MODEL": {
        "META_ARCHITECTURE": "MaskFormer",
        "BACKBONE": {"NAME": "D2SwinTransformer"},
        "PIXEL_MEAN": [123.675, 116.28, 103.53],
        "PIXEL_STD": [58.395, 57.12, 57.375],
        "SWIN": {"EMBED_DIM": 8, "DEPTHS": [2, 1, 1, 1], "NUM_HEADS": [1, 2, 4, 4], "WINDOW_SIZE": 4},
        "RESNETS": {
            "DEPTH": 50,
            "STEM_OUT_CHANNELS": 4,
            "RES2_OUT_CHANNELS": 8,
            "WIDTH_PER_GROUP": 2,
            "STRIDE_IN_1X1": False,
            "OUT_FEATURES": STAGES,
        },
        "SEM_SEG_HEAD": {
            "NAME": "MaskFormerHead",
            "IN_FEATURES": STAGES,
            "NUM_CLASSES": 3,
            "CONVS_DIM": 32,
            "MASK_DIM": 8,
            "TRANSFORMER_ENC_LAYERS": 2,
            "PIXEL_DECODER_NAME": "MSDeformAttnPixelDecoder",
        },
        "MASK_FORMER": {
            "TRANSFORMER_IN_FEATURE": "multi_scale_pixel_decoder",
            "HIDDEN_DIM": 32,
            "NHEADS": 4,
            "DIM_FEEDFORWARD": 16,
            "DEC_LAYERS": 3,
            "NUM_OBJECT_QUERIES": 5,
            "DROPOUT": 0.0,
            "TEST": {"SEMANTIC_ON": True, "OBJECT_MASK_THRESHOLD": 0.25, "OVERLAP_THRESHOLD": 0.5},
        },
    },
}
VARIANTS = {
    "swin": {},
    "resnet": {"MODEL.BACKBONE.NAME": "build_resnet_backbone"},
    "resnet of basic blocks": {
        "MODEL.BACKBONE.NAME": "build_resnet_backbone",
        "MODEL.RESNETS.DEPTH": 18,
        "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    },
    "feature pyramid": {
        "MODEL.BACKBONE.NAME": "build_resnet_backbone",
        "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME": "BasePixelDecoder",
    },
    "enforced input projection": {"MODEL.MASK_FORMER.ENFORCE_INPUT_PROJ": True},
    "decoder wider than features, norm first": {
        "MODEL.MASK_FORMER.HIDDEN_DIM": 48,
        "MODEL.MASK_FORMER.PRE_NORM": True,
    },
}


def changed(changes: dict, config: dict = TINY) -> dict:
    """A copy of `config` with options set by their dotted names."""
    config = copy.deepcopy(config)
    for name, value in changes.items():
        *sections, option = name.split(".")
        node = config
        for section in sections:
            node = node.setdefault(section, {})
        node[option] = value
    return config


def write_config(folder: Path, changes: dict | None = None, name: str = "config.yaml") -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(changed(changes or {})))
    return path


def random_model(config: Mask2FormerConfig) -> Mask2FormerForUniversalSegmentation:
    """A model in which no two parameters are equal, so that an exchange of any two is seen."""
    torch.manual_seed(0)
    model = Mask2FormerForUniversalSegmentation(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0  # a norm's weight stays near 1
            parameter.copy_(scale + 0.1 * torch.randn_like(parameter))
    return model


def on_disk(model: Mask2FormerForUniversalSegmentation) -> dict[str, torch.Tensor]:
    return revert_weight_conversion(model, model.state_dict())


@pytest.fixture(scope="module")
def tiny_original(tmp_path_factory) -> tuple[Path, Path]:
    """A pickle and a config such as the original leaves behind."""
    folder = tmp_path_factory.mktemp("original")
    config_file = write_config(folder)
    config = Mask2FormerConfig(**config_from_yaml(read_config(config_file)))
    return write_pickle(folder / "model.pkl", invert_state_dict(on_disk(random_model(config)), config)), config_file


def write_pickle(path: Path, parameters: dict[str, torch.Tensor]) -> Path:
    path.write_bytes(
        pickle.dumps({"model": OrderedDict((k, v.numpy()) for k, v in parameters.items()), "iteration": 5})
    )
    return path


# --- against the original's own recordings ---


@pytest.fixture(scope="module")
def converted(goldens, repository, tmp_path_factory) -> Path:
    """Every golden checkpoint, converted: one by the command a user types, the others in this process."""
    folder = tmp_path_factory.mktemp("converted")
    by_command, *others = GOLDENS
    subprocess.run(
        [
            *(sys.executable, str(repository / "conversion" / "convert_detectron2.py")),
            *("--checkpoint", str(goldens / by_command / "model.pkl")),
            *("--config-file", str(goldens / by_command / "config.yaml")),
            *("--output", str(folder / by_command)),
        ],
        env={**os.environ, "PYTHONPATH": str(repository)},
        check=True,
    )
    for name in others:
        convert(goldens / name / "model.pkl", goldens / name / "config.yaml", folder / name)
    return folder


@pytest.mark.parametrize("name", GOLDENS)
def test_converted_model_gives_the_originals_raw_outputs(converted, goldens, name):
    model = Mask2FormerForUniversalSegmentation.from_pretrained(converted / name).eval()
    pixel_values = torch.from_numpy(np.load(goldens / name / "intermediate.npz")["input"])
    with torch.no_grad():
        outputs = model(pixel_values=pixel_values)
    recorded = np.load(goldens / name / "outputs_raw.npz")
    for ours, theirs in (
        (outputs.class_queries_logits, recorded["pred_logits"]),
        (outputs.masks_queries_logits, recorded["pred_masks"]),
    ):
        torch.testing.assert_close(ours, torch.from_numpy(theirs), rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", GOLDENS)
def test_converted_processor_knows_the_checkpoints_settings(converted, goldens, name):
    processor = M2FImageProcessor.from_pretrained(converted / name)
    variant = json.loads((goldens / name / "variant.json").read_text())
    test = yaml.load((goldens / name / "config.yaml").read_text(), yaml.SafeLoader)["MODEL"]["MASK_FORMER"]["TEST"]
    assert processor.task == ("panoptic" if test["PANOPTIC_ON"] else "instance" if test["INSTANCE_ON"] else "semantic")
    assert processor.threshold == test["OBJECT_MASK_THRESHOLD"]
    assert processor.overlap_mask_area_threshold == test["OVERLAP_THRESHOLD"]
    assert processor.channel_order == variant["channel_order"]
    assert list(processor.image_mean) == [0.485, 0.456, 0.406] and list(processor.image_std) == [0.229, 0.224, 0.225]
    if processor.task == "panoptic":
        assert processor.label_ids_to_fuse == [i for i in range(133) if i not in variant["thing_ids"]]
    else:
        assert processor.label_ids_to_fuse is None
    assert processor.semantic_resize_before_inference == (processor.task != "semantic")


def test_released_and_training_checkpoints_hold_the_same_parameters(goldens):
    folder = goldens / "coco_panoptic_r50"
    released, training, without_metadata = (
        load_state_dict(folder / name) for name in ("model.pkl", "model.pth", "model_nometa.pkl")
    )
    assert list(released) == list(training) == list(without_metadata)
    for name, value in released.items():
        assert value.tobytes() == training[name].numpy().tobytes() == without_metadata[name].tobytes()
        plain = pickle.loads((folder / "model.pkl").read_bytes())["model"][name] if "level_embed" in name else value
        assert np.array_equal(value, plain) and value.dtype == plain.dtype


def test_video_checkpoint_is_refused(goldens, tmp_path, capsys):
    folder = goldens / "ytvis2019_r50"
    arguments = [
        "--checkpoint",
        folder / "model.pkl",
        "--config-file",
        folder / "config.yaml",
        "--output",
        tmp_path / "o",
    ]
    assert convert_detectron2.main([str(argument) for argument in arguments]) == 1
    assert "MODEL.META_ARCHITECTURE is VideoMaskFormer" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def spec_options(spec: dict) -> dict:
    """The options of a released checkpoint, from the record of its settings."""
    names = {
        "META_ARCHITECTURE": spec["meta_arch"],
        "BACKBONE.NAME": spec["backbone"],
        "SEM_SEG_HEAD.NUM_CLASSES": spec["num_classes"],
        "SEM_SEG_HEAD.PIXEL_DECODER_NAME": spec["pixel_decoder"],
        "SEM_SEG_HEAD.CONVS_DIM": spec["convs_dim"],
        "SEM_SEG_HEAD.MASK_DIM": spec["mask_dim"],
        "SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": spec["transformer_enc_layers"],
    }
    for section in ("mask_former", "resnets", "swin"):
        names |= {f"{section}.{option}".upper(): value for option, value in spec.get(section, {}).items()}
    given = {f"MODEL.{name}": value for name, value in names.items()}
    return {name: given.get(name, default) for name, default in DEFAULTS.items()}


@functools.cache
def shapes_on_disk(backbone: str) -> dict[str, torch.Size]:
    """What a model over this backbone (JSON) saves, built without storage; with one class and one query."""
    with torch.device("meta"):
        model = Mask2FormerForUniversalSegmentation(
            Mask2FormerConfig(backbone_config=json.loads(backbone), num_labels=1, num_queries=1)
        )
    return {name: value.shape for name, value in on_disk(model).items() if not convert_detectron2.is_unused(name)}


def test_every_released_checkpoint_maps_onto_our_model_key_by_key(shared):
    zoo = json.loads((shared / "data" / "zoo" / "zoo.json").read_text())
    shapes = json.loads(gzip.decompress((shared / "data" / "zoo" / "state_dict_shapes.json.gz").read_bytes()))
    assert len(zoo) == len(shapes) == 59
    for entry in zoo:
        config = Mask2FormerConfig(**config_from_yaml(spec_options(entry["spec"])))
        source_shapes = shapes[entry["config"].replace("/", "_").removesuffix(".yaml")]
        # Weights without storage, but for the index tables, which are checked by value.
        original = {name: torch.empty(shape, device="meta") for name, shape in source_shapes.items()}
        for source in constants(original, config).checked:
            original[source] = relative_position_index(config.backbone_config.window_size)
        converted = convert_state_dict(original, config)
        classes, queries = entry["spec"]["num_classes"] + 1, entry["spec"]["mask_former"]["num_object_queries"]
        assert {name: tuple(value.shape) for name, value in converted.items()} == {
            **shapes_on_disk(json.dumps(config.backbone_config.to_dict())),
            "class_predictor.weight": (classes, 256),
            "class_predictor.bias": (classes,),
            "criterion.empty_weight": (classes,),
            "model.transformer_module.queries_features.weight": (queries, 256),
            "model.transformer_module.queries_embedder.weight": (queries, 256),
        }
        frozen = entry["spec"].get("resnets", {}).get("norm") == "FrozenBN"
        filled = constants(original, config).filled
        assert all(name.endswith("num_batches_tracked") for name in filled) and bool(filled) == frozen


# --- the mapping, without recordings ---


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_mapping_covers_the_model_and_round_trips(tmp_path, changes):
    config = Mask2FormerConfig(**config_from_yaml(read_config(write_config(tmp_path, changes))))
    model = random_model(config)
    saved = {name: value for name, value in on_disk(model).items() if not convert_detectron2.is_unused(name)}
    original = invert_state_dict(saved, config)
    assert len(original) == len(mapping_for(config))
    converted = convert_state_dict(original, config)
    assert set(converted) == set(saved)
    for name, value in saved.items():
        assert torch.equal(converted[name], value), name


SOURCE_BLOCK, BLOCK = "backbone.layers.{}.blocks.{}", "model.pixel_level_module.encoder.encoder.layers.{}.blocks.{}"
SOURCE_PIXELS, PIXELS = "sem_seg_head.pixel_decoder", "model.pixel_level_module.decoder"
SOURCE_DECODER, DECODER = "sem_seg_head.predictor", "model.transformer_module"
KNOWN_NAMES = {
    f"{SOURCE_BLOCK.format(0, 1)}.attn.qkv.weight": [
        f"{BLOCK.format(0, 1)}.attention.self.{name}.weight" for name in ("query", "key", "value")
    ],
    f"{SOURCE_BLOCK.format(2, 0)}.norm2.bias": [f"{BLOCK.format(2, 0)}.layernorm_after.bias"],
    "backbone.norm3.weight": ["model.pixel_level_module.encoder.hidden_states_norms.stage4.weight"],
    f"{SOURCE_PIXELS}.input_proj.2.1.bias": [f"{PIXELS}.input_projections.2.1.bias"],
    f"{SOURCE_PIXELS}.transformer.encoder.layers.1.norm1.weight": [
        f"{PIXELS}.encoder.layers.1.self_attn_layer_norm.weight"
    ],
    f"{SOURCE_PIXELS}.mask_features.weight": [f"{PIXELS}.mask_projection.weight"],
    f"{SOURCE_DECODER}.query_feat.weight": [f"{DECODER}.queries_features.weight"],
    f"{SOURCE_DECODER}.query_embed.weight": [f"{DECODER}.queries_embedder.weight"],
    f"{SOURCE_DECODER}.transformer_self_attention_layers.1.self_attn.in_proj_bias": [
        f"{DECODER}.decoder.layers.1.self_attn.{name}_proj.bias" for name in "qkv"
    ],
    f"{SOURCE_DECODER}.transformer_cross_attention_layers.0.multihead_attn.in_proj_weight": [
        f"{DECODER}.decoder.layers.0.cross_attn.in_proj_weight"
    ],
    f"{SOURCE_DECODER}.transformer_ffn_layers.1.norm.weight": [f"{DECODER}.decoder.layers.1.final_layer_norm.weight"],
    f"{SOURCE_DECODER}.class_embed.bias": ["class_predictor.bias"],
}


def test_known_names_go_where_they_belong_and_fused_ones_are_split_in_order(tmp_path):
    config = Mask2FormerConfig(**config_from_yaml(read_config(write_config(tmp_path))))
    original = invert_state_dict(on_disk(random_model(config)), config)
    original = {
        name: torch.randn(value.shape) if value.is_floating_point() else value for name, value in original.items()
    }
    converted = convert_state_dict(original, config)
    for source, targets in KNOWN_NAMES.items():
        parts = np.split(original[source].numpy(), len(targets))
        for target, part in zip(targets, parts, strict=True):
            assert np.array_equal(converted[target].numpy(), part), target


def test_position_index_table_by_its_definition():
    table = relative_position_index(3)
    for query in range(9):
        for key in range(9):
            rows, columns = query // 3 - key // 3, query % 3 - key % 3
            assert table[query, key] == (rows + 2) * 5 + columns + 2


def test_half_precision_arrays_and_tensors_become_float32(tmp_path):
    config = Mask2FormerConfig(**config_from_yaml(read_config(write_config(tmp_path))))
    original = invert_state_dict(on_disk(random_model(config)), config)
    half = {n: v.half().numpy() if v.is_floating_point() else v.numpy() for n, v in original.items()}
    converted = convert_state_dict(half, config)
    assert {value.dtype for value in converted.values()} == {torch.float32}
    for name, value in convert_state_dict(original, config).items():
        assert torch.equal(converted[name], value.half().float()), name


def test_batch_counters_of_trained_norms_are_kept_and_those_of_frozen_ones_are_zero(tmp_path):
    config_file = write_config(tmp_path, VARIANTS["resnet"])
    config = Mask2FormerConfig(**config_from_yaml(read_config(config_file)))
    trained = {n: v.clone() for n, v in invert_state_dict(on_disk(random_model(config)), config).items()}
    counters = [name for name in trained if name.endswith("num_batches_tracked")]
    for name in counters:
        trained[name] += 7
    frozen = {name: value for name, value in trained.items() if name not in counters}
    assert constants(trained, config).filled == [] and len(constants(frozen, config).filled) == len(counters)
    for original, count in ((trained, 7), (frozen, 0)):
        kept = [v for n, v in convert_state_dict(original, config).items() if n.endswith("num_batches_tracked")]
        assert len(kept) == len(counters) and all(v.dtype == torch.int64 and v.item() == count for v in kept)


# --- the command ---


def test_folder_holds_model_and_processor_with_equal_outputs(tiny_original, tmp_path):
    checkpoint, config_file = tiny_original
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps([{"id": i, "name": name} for i, name in enumerate(("rose", "tulip", "lily"))]))
    report = convert(checkpoint, config_file, tmp_path / "made" / "model", labels)

    folder = tmp_path / "made" / "model"
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    model, loading = Mask2FormerForUniversalSegmentation.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    assert model.config.id2label == {0: "rose", 1: "tulip", 2: "lily"}
    assert M2FImageProcessor.from_pretrained(folder).max_detections == 7

    expected = random_model(model.config)
    pixel_values = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = model.eval()(pixel_values), expected(pixel_values)
    assert torch.equal(ours.class_queries_logits, theirs.class_queries_logits)
    assert torch.equal(ours.masks_queries_logits, theirs.masks_queries_logits)

    original = load_state_dict(checkpoint)
    assert report.read == len(original) and len(report.checked) == 5
    assert report.written == len(load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("spoil", ["missing", "left over", "index", "shape"])
def test_checkpoint_that_does_not_fit_is_refused_and_nothing_is_left(tiny_original, tmp_path, spoil, capsys):
    checkpoint, config_file = tiny_original
    parameters = {name: torch.tensor(value) for name, value in load_state_dict(checkpoint).items()}
    bias, index = "sem_seg_head.predictor.class_embed.bias", "backbone.layers.0.blocks.0.attn.relative_position_index"
    if spoil == "missing":
        del parameters[bias]
        told = bias
    elif spoil == "left over":
        parameters["sem_seg_head.extra.weight"] = torch.zeros(2)
        told = "sem_seg_head.extra.weight"
    elif spoil == "index":
        parameters[index] = parameters[index].flip(0)
        told = index
    else:
        parameters[bias] = torch.zeros(9)
        told = "class_predictor.bias"
    spoiled = write_pickle(tmp_path / "spoiled.pkl", parameters)
    arguments = ["--checkpoint", spoiled, "--config-file", config_file, "--output", tmp_path / "out"]
    assert convert_detectron2.main([str(argument) for argument in arguments]) == 1
    assert told in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["spoiled.pkl"]


def test_malicious_checkpoint_writes_no_folder_either(tiny_original, tmp_path, capsys):
    _, config_file = tiny_original
    marker, evil = tmp_path / "executed", tmp_path / "evil.pkl"
    evil.write_bytes(b"cos\nsystem\n(S" + repr(f"touch '{marker}'").encode() + b"\ntR.")
    arguments = ["--checkpoint", evil, "--config-file", config_file, "--output", tmp_path / "out"]
    assert convert_detectron2.main([str(argument) for argument in arguments]) == 1
    assert "system" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["evil.pkl"]


def test_folder_with_something_in_it_is_not_touched(tiny_original, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="--output"):
        convert(*tiny_original, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_failure_while_writing_leaves_nothing(tiny_original, tmp_path, monkeypatch):
    def fail(self, folder):
        raise OSError("disk full")

    monkeypatch.setattr(M2FImageProcessor, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        convert(*tiny_original, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --- configs ---


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("MODEL.META_ARCHITECTURE", "VideoMaskFormer"),
        ("MODEL.META_ARCHITECTURE", "GeneralizedRCNN"),
        ("MODEL.BACKBONE.NAME", "build_resnet_deeplab_backbone"),
        ("MODEL.SWIN.APE", True),
        ("MODEL.SWIN.PATCH_NORM", False),
        ("MODEL.SWIN.OUT_FEATURES", ["res3", "res4", "res5"]),
        ("MODEL.SEM_SEG_HEAD.NORM", ""),
        ("MODEL.SEM_SEG_HEAD.COMMON_STRIDE", 8),
        ("MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME", "TransformerEncoderPixelDecoder"),
        ("MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES", STAGES),
        ("MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME", "StandardTransformerDecoder"),
        ("MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE", "res5"),
        ("MODEL.MASK_FORMER.SIZE_DIVISIBILITY", 0),
        ("MODEL.MASK_FORMER.SIZE_DIVISIBILITY", 64),
        ("INPUT.FORMAT", "L"),
        ("INPUT.MIN_SIZE_TEST", 0),
    ],
)
def test_option_without_an_equivalent_is_refused_by_name(tmp_path, option, value):
    with pytest.raises(UnsupportedOptionError, match=option):
        read_config(write_config(tmp_path, {option: value}))


@pytest.mark.parametrize(
    ("option", "value"),
    [("DEPTH", 20), ("NORM", "GN"), ("RES5_DILATION", 2), ("WIDTH_PER_GROUP", 3), ("DEFORM_ON_PER_STAGE", [True] * 4)],
)
def test_resnet_option_without_an_equivalent_is_refused_only_where_there_is_a_resnet(tmp_path, option, value):
    changes = {f"MODEL.RESNETS.{option}": value}
    read_config(write_config(tmp_path, changes))
    with pytest.raises(UnsupportedOptionError, match=f"MODEL.RESNETS.{option}"):
        read_config(write_config(tmp_path, VARIANTS["resnet"] | changes))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("INPUT.MIN_SIZE_TEST", "large"),
        ("MODEL.PIXEL_MEAN", 0.5),
        ("MODEL.PIXEL_STD", "[open('x', 'w')]"),
        ("MODEL.MASK_FORMER.DEC_LAYERS", 2.5),
        ("MODEL.MASK_FORMER.PRE_NORM", "yes, please"),
    ],
)
def test_option_of_the_wrong_type_is_refused_by_name(tmp_path, option, value):
    with pytest.raises(ValueError, match=option):
        read_config(write_config(tmp_path, {option: value}))


def test_impossible_model_is_told_without_a_traceback(tiny_original, tmp_path, capsys):
    config_file = write_config(tmp_path, {"MODEL.SEM_SEG_HEAD.CONVS_DIM": 40})
    arguments = ["--checkpoint", tiny_original[0], "--config-file", config_file, "--output", tmp_path / "out"]
    assert convert_detectron2.main([str(argument) for argument in arguments]) == 1
    assert "feature_size" in capsys.readouterr().err


def test_task_channel_order_and_sizes_come_from_the_config(tmp_path):
    test = "MODEL.MASK_FORMER.TEST."
    changes = {"INPUT.FORMAT": "BGR", f"{test}SEMANTIC_ON": False, f"{test}INSTANCE_ON": True}
    settings = processor_from_yaml(read_config(write_config(tmp_path, changes)))
    assert settings["task"] == "instance" and settings["channel_order"] == "BGR"
    assert settings["size"] == {"shortest_edge": 64, "longest_edge": 128}
    assert settings["semantic_resize_before_inference"] is True
    assert M2FImageProcessor(**settings).threshold == 0.25
    with pytest.raises(UnsupportedOptionError, match="SEMANTIC_ON"):
        processor_from_yaml(read_config(write_config(tmp_path, {f"{test}SEMANTIC_ON": False})))


def test_resnet_norm_and_stride_come_from_the_config(tmp_path):
    frozen = config_from_yaml(read_config(write_config(tmp_path, VARIANTS["resnet"])))
    changes = {"MODEL.RESNETS.NORM": "SyncBN", "MODEL.RESNETS.STRIDE_IN_1X1": True}
    trained = config_from_yaml(read_config(write_config(tmp_path, VARIANTS["resnet"] | changes)))
    assert frozen["freeze_backbone_norm"] and not frozen["backbone_config"].downsample_in_bottleneck
    assert not trained["freeze_backbone_norm"] and trained["backbone_config"].downsample_in_bottleneck


def test_panoptic_checkpoint_needs_to_know_its_stuff(tmp_path):
    options = read_config(write_config(tmp_path, {"MODEL.MASK_FORMER.TEST.PANOPTIC_ON": True}))
    with pytest.raises(UnsupportedOptionError, match="--labels"):
        processor_from_yaml(options)
    labels = tmp_path / "labels.json"
    for content in (
        [{"id": i, "name": "x"} for i in range(3)],
        [{"id": i, "name": "x", "isthing": i == 1} for i in range(3)],
    ):
        labels.write_text(json.dumps({"categories": content}))
        if "isthing" in content[0]:
            assert processor_from_yaml(options, read_labels(labels, 3))["label_ids_to_fuse"] == [0, 2]
        else:
            with pytest.raises(UnsupportedOptionError, match="isthing"):
                processor_from_yaml(options, read_labels(labels, 3))


@pytest.mark.parametrize("name", ["coco", "cityscapes", "ade20k", "mapillary"])
def test_stuff_of_the_known_data_sets(shared, name, tmp_path):
    facts = json.loads((shared / "data" / "labels" / f"{name}-panoptic.json").read_text())["categories"]
    data_sets = {
        "coco": "coco_2017_val_panoptic_with_sem_seg",
        "cityscapes": "cityscapes_fine_panoptic_val",
        "ade20k": "ade20k_panoptic_val",
        "mapillary": "mapillary_vistas_panoptic_val",
    }
    changes = {
        "DATASETS.TRAIN": [data_sets[name]],
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": len(facts),
        "MODEL.MASK_FORMER.TEST.PANOPTIC_ON": True,
    }
    settings = processor_from_yaml(read_config(write_config(tmp_path, changes)))
    assert settings["label_ids_to_fuse"] == [entry["id"] for entry in facts if not entry["isthing"]]


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[1, 2, 3]",
        '{"labels": []}',
        '[{"id": 0, "name": "a"}, {"id": 2, "name": "b"}, {"id": 3, "name": "c"}]',
        '[{"id": 0, "name": "a"}, {"id": 1, "name": "b"}, {"id": 1, "name": "c"}, {"id": 2, "name": "d"}]',
    ],
)
def test_bad_labels_are_refused(tmp_path, content):
    path = tmp_path / "labels.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"labels\.json"):
        read_labels(path, 3)


def test_config_of_ones_own_follows_its_bases(tmp_path):
    write_config(tmp_path, name="base.yaml")
    (tmp_path / "own").mkdir()
    middle = {
        "_BASE_": "../base.yaml",
        "DATASETS": {"TRAIN": '("coco_2017_train_panoptic",)'},  # detectron2 reads Python's tuples from text
        "MODEL": {"MASK_FORMER": {"NUM_OBJECT_QUERIES": 11}},
    }
    (tmp_path / "own" / "middle.yaml").write_text(yaml.safe_dump(middle))
    top = {"_BASE_": "middle.yaml", "MODEL": {"MASK_FORMER": {"DEC_LAYERS": 4}}}
    (tmp_path / "own" / "top.yaml").write_text(yaml.safe_dump(top))
    options = read_config(tmp_path / "own" / "top.yaml")
    former = {
        name.rpartition(".")[2]: value for name, value in options.items() if name.startswith("MODEL.MASK_FORMER.")
    }
    assert (former["DEC_LAYERS"], former["NUM_OBJECT_QUERIES"], former["DIM_FEEDFORWARD"]) == (4, 11, 16)
    assert options["DATASETS.TRAIN"] == ("coco_2017_train_panoptic",)

    write_config(tmp_path, {"_BASE_": "own/top.yaml"}, name="base.yaml")
    with pytest.raises(ValueError, match="its own _BASE_"):
        read_config(tmp_path / "own" / "top.yaml")
    with pytest.raises(FileNotFoundError, match=r"missing\.yaml"):
        read_config(write_config(tmp_path, {"_BASE_": "missing.yaml"}))
    with pytest.raises(UnsupportedOptionError, match="_BASE_"):
        read_config(write_config(tmp_path, {"_BASE_": "https://example.com/base.yaml"}))


def test_nothing_in_a_config_is_executed(tmp_path):
    marker = tmp_path / "executed"
    code = f"!!python/object/apply:eval [\"open({str(marker)!r}, 'w')\"]"
    plain = write_config(tmp_path).read_text()

    unread = tmp_path / "unread.yaml"
    unread.write_text(plain.replace("MIN_SIZE_TEST: 64", f"MIN_SIZE_TEST: 64\n  MIN_SIZE_TRAIN: {code}"))
    assert read_config(unread)["INPUT.MIN_SIZE_TEST"] == 64

    needed = tmp_path / "needed.yaml"
    needed.write_text(plain.replace("MIN_SIZE_TEST: 64", f"MIN_SIZE_TEST: [{code}]"))
    with pytest.raises(UnsupportedOptionError, match=r"INPUT\.MIN_SIZE_TEST"):
        read_config(needed)
    assert not marker.exists()

    yaml.load(needed.read_text(), yaml.UnsafeLoader)  # the same file is live ammunition to an unsafe reader
    assert marker.exists()


def test_missing_yaml_package_and_bad_yaml_are_told(tmp_path, monkeypatch):
    for content in ("a: [", "just text"):
        (tmp_path / "bad.yaml").write_text(content)
        with pytest.raises(ValueError, match=r"bad\.yaml"):
            read_config(tmp_path / "bad.yaml")
    path = write_config(tmp_path)
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ImportError, match=r"m2f_hf\[convert\]"):
        read_config(path)
