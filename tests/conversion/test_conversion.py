"""Conversion of the original's checkpoints: every parameter accounted for, equal outputs, nothing executed."""

import contextlib
import copy
import json
import pickle
import re
import runpy
import shutil
import sys
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig
from transformers.core_model_loading import revert_weight_conversion

from m2f_hf import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerVideoConfig,
    Mask2FormerVideoProcessor,
)
from m2f_hf.known.label_sets import Label, label_set
from m2f_hf.processing.image_processor import M2FImageProcessor


sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "conversion"))

import convert_detectron2
import converter
from converter import convert
from detectron2_config import UnsupportedOptionError, config_from_yaml, processor_from_yaml, read_config, read_labels
from detectron2_mapping import convert_state_dict, differences, invert_state_dict, mapping_for, relative_position_index
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
    "swin without query, key and value biases": {"MODEL.SWIN.QKV_BIAS": False, "MODEL.SWIN.MLP_RATIO": 2.0},
    "enforced input projection": {"MODEL.MASK_FORMER.ENFORCE_INPUT_PROJ": True},
    "decoder wider than features, norm first": {"MODEL.MASK_FORMER.HIDDEN_DIM": 48, "MODEL.MASK_FORMER.PRE_NORM": True},
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


def tiny_config(folder: Path, changes: dict | None = None) -> Mask2FormerConfig:
    """Return our config for the original's tiny one with these changes."""
    return Mask2FormerConfig(**config_from_yaml(read_config(write_config(folder, changes))))


def original_of(config: Mask2FormerConfig) -> dict[str, torch.Tensor]:
    """Return the parameters of `random_model` in the original's form."""
    return invert_state_dict(on_disk(random_model(config)), config)


def run(*arguments: object) -> int:
    return convert_detectron2.main([str(argument) for argument in arguments])


def on_disk(model: Mask2FormerForUniversalSegmentation) -> dict[str, torch.Tensor]:
    return revert_weight_conversion(model, model.state_dict())


@pytest.fixture(scope="module")
def tiny_original(tmp_path_factory) -> tuple[Path, Path]:
    """A pickle and a config such as the original leaves behind."""
    folder = tmp_path_factory.mktemp("original")
    config_file = write_config(folder)
    config = Mask2FormerConfig(**config_from_yaml(read_config(config_file)))
    return write_pickle(folder / "model.pkl", original_of(config)), config_file


def write_pickle(path: Path, parameters: dict[str, torch.Tensor]) -> Path:
    path.write_bytes(
        pickle.dumps({"model": OrderedDict((k, v.numpy()) for k, v in parameters.items()), "iteration": 5})
    )
    return path


# --- against the original's own recordings ---


@pytest.fixture(scope="module")
def converted(goldens, repository, tmp_path_factory) -> Path:
    """Every golden checkpoint, converted: one by the script as a user starts it, the others by its function."""
    folder = tmp_path_factory.mktemp("converted")
    by_script, *others = GOLDENS
    script = str(repository / "conversion" / "convert_detectron2.py")
    source = goldens / by_script
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        arguments = ["--checkpoint", source / "model.pkl", "--config-file", source / "config.yaml"]
        patch.setattr(sys, "argv", [script, *map(str, [*arguments, "--output", folder / by_script])])
        runpy.run_path(script, run_name="__main__")
    assert ended.value.code == 0
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


def test_a_decoder_of_clips_in_a_model_of_images_is_refused(tmp_path):
    for name, value in (
        ("MODEL.META_ARCHITECTURE", "VideoMaskFormer"),
        ("MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME", "VideoMultiScaleMaskedTransformerDecoder"),
    ):
        with pytest.raises(UnsupportedOptionError, match=r"both must be of images or both of video"):
            read_config(write_config(tmp_path, {name: value}))


def test_video_checkpoint_gives_a_video_model(goldens, tmp_path, monkeypatch, capsys):
    folder = goldens / "ytvis2019_r50"
    arguments = ["--checkpoint", folder / "model.pkl", "--config-file", folder / "config.yaml"]
    arguments += ["--output", tmp_path / "o"]
    clip = goldens.parent / "data" / "video_clip"
    assert run(*arguments, "--verify", "--photo", clip / "00000100.jpg") == 1
    assert "is of a video model: give --clip" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(converter, "SHOWN_SCORE", 0.0)  # of random weights
    for sample, name in (([], "a generated clip"), (["--clip", clip], "video_clip")):
        shutil.rmtree(tmp_path / "o", ignore_errors=True)
        assert run(*arguments, "--verify", *sample) == 0
        said = capsys.readouterr().out
        assert f"logits are finite for {name} (" in said and f"Look at {tmp_path / 'o.verify.png'}" in said
        assert "nothing found" not in said
        with Image.open(tmp_path / "o.verify.png") as picture:
            assert picture.width > 2 * picture.height  # frames side by side
    assert type(AutoConfig.from_pretrained(tmp_path / "o")) is Mask2FormerVideoConfig
    assert Mask2FormerVideoProcessor.from_pretrained(tmp_path / "o").size["shortest_edge"] == 360
    card = (tmp_path / "o" / "README.md").read_text()
    assert "Mask2FormerForVideoSegmentation.from_pretrained" in card and "pipeline(" not in card


def test_a_video_checkpoint_that_is_not_finite_does_not_pass_verification(goldens, tmp_path, capsys):
    folder = goldens / "ytvis2019_r50"
    content = pickle.loads((folder / "model.pkl").read_bytes())
    content["model"]["sem_seg_head.predictor.class_embed.weight"][:] = 3e38  # finite, but no sum of them is
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(content))
    arguments = ["--checkpoint", tmp_path / "model.pkl", "--config-file", folder / "config.yaml", "--output"]
    assert run(*arguments, tmp_path / "out" / "o", "--verify") == 1
    assert "class_queries_logits are not finite" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_an_image_checkpoint_takes_no_clip(goldens, tmp_path, capsys):
    folder = goldens / "coco_panoptic_r50"
    arguments = ["--checkpoint", folder / "model.pkl", "--config-file", folder / "config.yaml", "--output"]
    arguments += [tmp_path / "o", "--verify", "--clip", tmp_path]
    assert run(*arguments) == 1
    assert "is of an image model: give --photo" in capsys.readouterr().err


# --- the mapping, without recordings ---


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_mapping_covers_the_model_and_round_trips(tmp_path, changes):
    config = tiny_config(tmp_path, changes)
    model = random_model(config)
    saved = {name: value for name, value in on_disk(model).items() if not converter.is_unused(name)}
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


def test_fused_parameters_are_split_in_order(tmp_path):
    config = tiny_config(tmp_path)
    original = original_of(config)
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


def test_batch_counters_are_kept_or_zero_for_frozen_norms(tmp_path):
    config_file = write_config(tmp_path, VARIANTS["resnet"])
    config = Mask2FormerConfig(**config_from_yaml(read_config(config_file)))
    trained = {n: v.clone() for n, v in original_of(config).items()}
    counters = [name for name in trained if name.endswith("num_batches_tracked")]
    for name in counters:
        trained[name] += 7
    frozen = {name: value for name, value in trained.items() if name not in counters}
    assert differences(trained, config).filled == [] and len(differences(frozen, config).filled) == len(counters)
    for original, count in ((trained, 7), (frozen, 0)):
        kept = [v for n, v in convert_state_dict(original, config).items() if n.endswith("num_batches_tracked")]
        assert len(kept) == len(counters) and all(v.dtype == torch.int64 and v.item() == count for v in kept)


# --- files as people have them ---


def numpy_of(parameters: dict) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in parameters.items()}


def tensors_of(parameters: dict) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value) for name, value in parameters.items()}


def renamed(parameters: dict, *rules: tuple[str, str]) -> dict:
    for old, new in rules:
        parameters = {name.replace(old, new): value for name, value in parameters.items()}
    return parameters


def with_metadata(parameters: dict) -> OrderedDict:
    state_dict = OrderedDict(parameters)
    state_dict._metadata = OrderedDict([("", {"version": 1}), ("sem_seg_head", {"version": 2})])
    return state_dict


TRAINING = {
    "optimizer": {"state": {0: {"step": 5, "exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
    "scheduler": {"last_epoch": 5, "base_lrs": [1e-4], "best": np.float64(0.5)},
    "iteration": 5,
}
# Each writes the same parameters (arrays by name) in another form.
FORMS = {
    "released": lambda p, path: path.write_bytes(pickle.dumps({"model": with_metadata(p), "__author__": "x"})),
    "without metadata": lambda p, path: path.write_bytes(pickle.dumps({"model": dict(p)})),
    "parameters alone": lambda p, path: path.write_bytes(pickle.dumps(with_metadata(p), protocol=2)),
    "training": lambda p, path: torch.save({"model": with_metadata(tensors_of(p)), **TRAINING}, path),
    "before torch 1.6": lambda p, path: torch.save(
        {"model": tensors_of(p), **TRAINING}, path, _use_new_zipfile_serialization=False
    ),
    "arrays in torch's archive": lambda p, path: torch.save({"model": dict(p)}, path),
    "old names": lambda p, path: path.write_bytes(
        pickle.dumps({"model": renamed(p, (".pixel_decoder.", "."), ("query_feat", "static_query"))})
    ),
    "wrapped": lambda p, path: torch.save({"model": tensors_of({f"module.{n}": v for n, v in p.items()})}, path),
    "wrapped twice": lambda p, path: torch.save(tensors_of({f"module._orig_mod.{n}": v for n, v in p.items()}), path),
    "averaged alone": lambda p, path: torch.save({"ema_state": tensors_of(p), "iteration": 5}, path),
    "averaged too": lambda p, path: torch.save(
        {"ema_state": {n: v + 1 for n, v in tensors_of(p).items()}, "model": tensors_of(p)}, path
    ),
    "without index tables and class weights": lambda p, path: path.write_bytes(
        pickle.dumps({n: v for n, v in p.items() if not n.endswith(("relative_position_index", "empty_weight"))})
    ),
}


@pytest.fixture(scope="module", params=["swin", "resnet", "coco_panoptic_r50"])
def plain(request, tmp_path_factory) -> tuple[dict[str, np.ndarray], Mask2FormerConfig, dict[str, torch.Tensor]]:
    """Parameters of the original as arrays, the config, and what they are converted to: ours, and recorded ones."""
    if request.param in VARIANTS:
        folder = tmp_path_factory.mktemp("plain")
        config = tiny_config(folder, VARIANTS[request.param])
        parameters = numpy_of(original_of(config))
    else:
        folder = request.getfixturevalue("goldens") / request.param
        config = Mask2FormerConfig(**config_from_yaml(read_config(folder / "config.yaml")))
        parameters = load_state_dict(folder / "model.pkl")
    return parameters, config, convert_state_dict(parameters, config)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_of_a_checkpoint_converts_to_the_same_bits(plain, tmp_path, form):
    parameters, config, expected = plain
    form(parameters, tmp_path / "model")
    converted = convert_state_dict(load_state_dict(tmp_path / "model"), config)
    assert set(converted) == set(expected)
    for name, value in expected.items():
        assert converted[name].dtype == value.dtype and torch.equal(converted[name], value), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32_of_the_same_values(plain, tmp_path, dtype):
    parameters, config, expected = plain
    halved = {n: v.to(dtype) if v.is_floating_point() else v for n, v in tensors_of(parameters).items()}
    torch.save({"model": halved}, tmp_path / "half.pth")
    converted = convert_state_dict(load_state_dict(tmp_path / "half.pth"), config)
    for name, value in expected.items():
        rounded = value.to(dtype).float() if value.is_floating_point() else value
        assert converted[name].dtype == value.dtype and torch.equal(converted[name], rounded), name
    model = converter._load_strictly(converted, config).eval()
    with torch.no_grad():
        outputs = model(torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert outputs.class_queries_logits.isfinite().all() and outputs.masks_queries_logits.isfinite().all()


def test_synchronised_and_partly_frozen_norms_convert_alike(tmp_path):
    """FrozenBN keeps no counters, SyncBN does, and with FREEZE_AT the first stages of a SyncBN model have none."""
    changes = VARIANTS["resnet"] | {"MODEL.RESNETS.NORM": "SyncBN"}
    config = tiny_config(tmp_path, changes)
    trained = numpy_of(original_of(config))
    counters = [name for name in trained if name.endswith("num_batches_tracked")]
    trained |= {name: np.array(7) for name in counters}
    first = [name for name in counters if name.startswith(("backbone.stem.", "backbone.res2."))]
    partly = {name: value for name, value in trained.items() if name not in first}
    whole, part = (convert_state_dict(form, config) for form in (trained, partly))
    assert 0 < len(first) < len(counters) and len(differences(partly, config).filled) == len(first)
    values = [value.item() for name, value in part.items() if name.endswith("num_batches_tracked")]
    assert sorted(values) == [0] * len(first) + [7] * (len(counters) - len(first))
    for name, value in whole.items():
        assert name.endswith("num_batches_tracked") or torch.equal(value, part[name]), name


def test_class_weights_left_out_are_those_of_the_config(tmp_path):
    changes = {"MODEL.MASK_FORMER.NO_OBJECT_WEIGHT": 0.25}
    config = tiny_config(tmp_path, changes)
    original = original_of(config)
    del original["criterion.empty_weight"]
    assert differences(original, config).filled == ["criterion.empty_weight"]
    assert convert_state_dict(original, config)["criterion.empty_weight"].tolist() == [1.0, 1.0, 1.0, 0.25]


def test_parameter_under_an_old_and_a_new_name_is_refused(tmp_path):
    config = tiny_config(tmp_path)
    original = original_of(config)
    original["sem_seg_head.predictor.static_query.weight"] = original["sem_seg_head.predictor.query_feat.weight"]
    with pytest.raises(ValueError, match=r"query_feat\.weight twice"):
        convert_state_dict(original, config)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 4, "checkpoint has 3 classes .* 4 are expected"),
        ("MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", 6, "checkpoint has 5 queries .* 6 are expected"),
    ],
)
def test_other_counts_are_reported_with_their_option(tiny_original, tmp_path, option, value, message):
    config_file = write_config(tmp_path, {option: value})
    with pytest.raises(ValueError, match=rf"{message}\. Set {option}"):
        convert(tiny_original[0], config_file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_labels_of_another_number_are_refused(tiny_original, tmp_path):
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps([{"id": i, "name": str(i)} for i in range(4)]))
    with pytest.raises(ValueError, match=r"4 labels; the config \(MODEL.SEM_SEG_HEAD.NUM_CLASSES\) needs ids 0 to 2"):
        convert(*tiny_original, tmp_path / "out", labels)
    labels.write_text(json.dumps([{"id": i, "name": str(i)} for i in (1, 2, 3)]))
    with pytest.raises(ValueError, match="ids count from 0 in the order of training"):
        convert(*tiny_original, tmp_path / "out", labels)


# --- the command ---


def test_folder_holds_model_and_processor_with_equal_outputs(tiny_original, tmp_path):
    checkpoint, config_file = tiny_original
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps([{"id": i, "name": name} for i, name in enumerate(("rose", "tulip", "lily"))]))
    report = convert(checkpoint, config_file, tmp_path / "made" / "model", labels)

    folder = tmp_path / "made" / "model"
    files = ["README.md", "config.json", "model.safetensors", "preprocessor_config.json"]
    assert sorted(path.name for path in folder.iterdir()) == files
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
    saved = load_file(folder / "model.safetensors")
    assert report.read == len(original) and len(report.checked) == 5
    assert report.written == len(saved)
    # Of the file alone: in the original, projections to query, key and value are one in Swin and in self-attention.
    fused = [name for name in original if re.search(r"attn\.qkv\.|self_attn\.in_proj_", name)]
    assert sorted(report.split) == sorted(fused) and len(fused) > 10
    whole = len(original) - 5 - len(fused)
    assert report.written == whole + 3 * len(fused) + len(report.filled)
    for message in (
        f"{len(original)} tensors read, none left over: {whole} kept whole, {len(fused)} fused projections split",
        f"{len(saved)} tensors written",
        f"{whole} whole, {3 * len(fused)} from the split ones, {len(report.filled)} initial values",
    ):
        assert message in str(report)


@pytest.mark.parametrize("spoil", ["missing", "left over", "index", "shape"])
def test_checkpoint_that_does_not_fit_is_refused_and_nothing_is_left(tiny_original, tmp_path, spoil, capsys):
    checkpoint, config_file = tiny_original
    parameters = {name: torch.tensor(value) for name, value in load_state_dict(checkpoint).items()}
    bias, index = "sem_seg_head.predictor.class_embed.bias", "backbone.layers.0.blocks.0.attn.relative_position_index"
    if spoil == "missing":
        del parameters[bias]
        message = bias
    elif spoil == "left over":
        parameters["sem_seg_head.extra.weight"] = torch.zeros(2)
        message = "sem_seg_head.extra.weight"
    elif spoil == "index":
        parameters[index] = parameters[index].flip(0)
        message = index
    else:
        parameters[bias] = torch.zeros(9)
        message = "class_predictor.bias"
    spoiled = write_pickle(tmp_path / "spoiled.pkl", parameters)
    arguments = ["--checkpoint", spoiled, "--config-file", config_file, "--output", tmp_path / "out"]
    assert run(*arguments) == 1
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["spoiled.pkl"]


def test_malicious_checkpoint_writes_no_folder_either(tiny_original, tmp_path, capsys):
    _, config_file = tiny_original
    marker, evil = tmp_path / "executed", tmp_path / "evil.pkl"
    evil.write_bytes(b"cos\nsystem\n(S" + repr(f"touch '{marker}'").encode() + b"\ntR.")
    arguments = ["--checkpoint", evil, "--config-file", config_file, "--output", tmp_path / "out"]
    assert run(*arguments) == 1
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
        ("MODEL.META_ARCHITECTURE", "GeneralizedRCNN"),
        ("MODEL.BACKBONE.NAME", "build_resnet_deeplab_backbone"),
        ("MODEL.SWIN.APE", True),
        ("MODEL.SWIN.PATCH_NORM", False),
        ("MODEL.SWIN.PATCH_SIZE", 2),
        ("MODEL.SWIN.QK_SCALE", 0.5),
        ("MODEL.SWIN.OUT_FEATURES", ["res3", "res4", "res5"]),
        ("MODEL.SEM_SEG_HEAD.NAME", "PerPixelBaselineHead"),
        ("MODEL.SEM_SEG_HEAD.NORM", ""),
        ("MODEL.SEM_SEG_HEAD.NORM", "SyncBN"),
        ("MODEL.SEM_SEG_HEAD.IN_FEATURES", ["res3", "res4", "res5"]),
        ("MODEL.SEM_SEG_HEAD.COMMON_STRIDE", 8),
        ("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 0),
        ("MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", 0),
        ("MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME", "TransformerEncoderPixelDecoder"),
        ("MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES", STAGES),
        ("MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES", ["res5"]),
        ("MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME", "StandardTransformerDecoder"),
        ("MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE", "res5"),
        ("MODEL.MASK_FORMER.DEC_LAYERS", 0),
        ("MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", 0),
        ("MODEL.MASK_FORMER.SIZE_DIVISIBILITY", 0),
        ("MODEL.MASK_FORMER.SIZE_DIVISIBILITY", 64),
        ("MODEL.PIXEL_MEAN", [0.5]),
        ("INPUT.FORMAT", "L"),
        ("INPUT.MIN_SIZE_TEST", 0),
        ("INPUT.MAX_SIZE_TEST", 0),
        ("TEST.DETECTIONS_PER_IMAGE", 0),
    ],
)
def test_option_without_an_equivalent_is_refused_by_name(tmp_path, option, value):
    with pytest.raises(UnsupportedOptionError, match=rf"^{option} is .*"):
        read_config(write_config(tmp_path, {option: value}))


def test_option_of_a_part_that_the_model_has_not_does_not_matter(tmp_path):
    encoder = {
        "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES": STAGES,
        "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": 0,
    }
    with pytest.raises(UnsupportedOptionError):
        read_config(write_config(tmp_path, encoder))
    read_config(write_config(tmp_path, VARIANTS["feature pyramid"] | encoder))
    with pytest.raises(UnsupportedOptionError, match=r"MODEL\.SWIN\.APE"):
        read_config(write_config(tmp_path, {"MODEL.SWIN.APE": True}))
    read_config(write_config(tmp_path, VARIANTS["resnet"] | {"MODEL.SWIN.APE": True}))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("MODEL.RESNETS.DEPTH", 20),
        ("MODEL.RESNETS.NORM", "GN"),
        ("MODEL.RESNETS.NORM", ""),
        ("MODEL.RESNETS.RES5_DILATION", 2),
        ("MODEL.RESNETS.WIDTH_PER_GROUP", 3),
        ("MODEL.RESNETS.NUM_GROUPS", 32),
        ("MODEL.RESNETS.OUT_FEATURES", ["res4", "res5"]),
        ("MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, True, True, True]),
    ],
)
def test_resnet_option_without_an_equivalent_is_refused_for_resnets(tmp_path, option, value):
    read_config(write_config(tmp_path, {option: value}))
    with pytest.raises(UnsupportedOptionError, match=option):
        read_config(write_config(tmp_path, VARIANTS["resnet"] | {option: value}))


CONVERTS = {
    "padding by the backbone's own divisor": {"MODEL.MASK_FORMER.SIZE_DIVISIBILITY": -1},
    "features in another order": {"MODEL.SEM_SEG_HEAD.IN_FEATURES": STAGES[::-1]},
    "no supervision of the layers between": {"MODEL.MASK_FORMER.DEEP_SUPERVISION": False},
    "one prediction": {"MODEL.MASK_FORMER.DEC_LAYERS": 1},
    "many queries": {"MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": 300},
    "augmentation at test": {"TEST.AUG.ENABLED": True},
    "augmentation in training": {"INPUT.CROP.ENABLED": True, "MODEL.BACKBONE.FREEZE_AT": 2},
    "semantic alone": {"MODEL.MASK_FORMER.TEST.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE": True},
    "numbers as text": {"MODEL.MASK_FORMER.NO_OBJECT_WEIGHT": "1e-1", "MODEL.SWIN.DEPTHS": "(2, 1, 1, 1)"},
}


@pytest.mark.parametrize("changes", CONVERTS.values(), ids=CONVERTS)
def test_option_with_an_equivalent_converts_into_a_model_that_runs(tmp_path, changes):
    options = read_config(write_config(tmp_path, changes))
    config = Mask2FormerConfig(**config_from_yaml(options))
    original = original_of(config)
    model = converter._load_strictly(convert_state_dict(original, config), config).eval()
    inputs = M2FImageProcessor(**processor_from_yaml(options))(np.zeros((70, 60, 3), np.uint8), return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    height, width = inputs["pixel_values"].shape[-2:]
    queries = changes.get("MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", 5)
    assert height % 32 == 0 and outputs.masks_queries_logits.shape == (1, queries, height // 4, width // 4)
    assert config.decoder_layers == changes.get("MODEL.MASK_FORMER.DEC_LAYERS", 3)
    assert config.use_auxiliary_loss == changes.get("MODEL.MASK_FORMER.DEEP_SUPERVISION", True)
    assert config.no_object_weight == 0.1 and config.backbone_config.depths == [2, 1, 1, 1]


def test_options_of_training_and_test_alone_change_nothing_about_the_model(tmp_path):
    plain = read_config(write_config(tmp_path))
    for name in ("augmentation at test", "augmentation in training"):
        assert read_config(write_config(tmp_path, CONVERTS[name])) == plain


def test_padding_by_a_backbone_without_a_divisor_is_refused(tmp_path):
    changes = {"MODEL.MASK_FORMER.SIZE_DIVISIBILITY": -1}  # the original then doesn't pad before a ResNet
    with pytest.raises(UnsupportedOptionError, match="SIZE_DIVISIBILITY"):
        read_config(write_config(tmp_path, VARIANTS["resnet"] | changes))


@pytest.mark.parametrize("task", ["SEMANTIC", "INSTANCE", "PANOPTIC"])
def test_task_is_the_widest_that_is_on(tmp_path, task):
    order = ["SEMANTIC", "INSTANCE", "PANOPTIC"]
    switches = {f"MODEL.MASK_FORMER.TEST.{name}_ON": order.index(name) <= order.index(task) for name in order}
    options = read_config(write_config(tmp_path, switches))
    labels = [Label("a", True, None, 0), Label("b", False, None, 1), Label("c", True, None, 2)]
    settings = processor_from_yaml(options, labels)
    assert settings["task"] == task.lower()
    assert settings["label_ids_to_fuse"] == ([1] if task == "PANOPTIC" else None)
    assert settings["semantic_resize_before_inference"] == (task != "SEMANTIC")


def test_pictures_of_a_bgr_model_are_normalised_in_its_order(tmp_path):
    """The usual setting of detectron2's own ResNets: BGR, mean subtracted, not divided."""
    changes = {"INPUT.FORMAT": "BGR", "MODEL.PIXEL_MEAN": [103.53, 116.28, 123.675], "MODEL.PIXEL_STD": [1.0, 1.0, 1.0]}
    processor = M2FImageProcessor(**processor_from_yaml(read_config(write_config(tmp_path, changes))))
    picture = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)  # RGB, of the size at test
    pixel_values = processor(picture, return_tensors="pt")["pixel_values"][0]
    expected = picture[..., ::-1].astype(np.float32) - np.float32([103.53, 116.28, 123.675])
    torch.testing.assert_close(pixel_values, torch.from_numpy(expected).permute(2, 0, 1), rtol=0, atol=1e-4)


def resnet_by_definition(original: dict[str, torch.Tensor], stride_in_1x1: bool, pixels: torch.Tensor) -> list:
    """The four feature maps of a detectron2 ResNet, from its parameters alone."""

    def layer(name: str, features: torch.Tensor, stride: int = 1) -> torch.Tensor:
        weight = original[f"{name}.weight"]
        features = torch.nn.functional.conv2d(features, weight, stride=stride, padding=weight.shape[-1] // 2)
        mean, variance, scale, shift = (
            original[f"{name}.norm.{kind}"][:, None, None] for kind in ("running_mean", "running_var", "weight", "bias")
        )
        return (features - mean) / (variance + 1e-5).sqrt() * scale + shift

    features = torch.nn.functional.max_pool2d(layer("backbone.stem.conv1", pixels, 2).relu(), 3, 2, 1)
    maps = []
    for stage in STAGES:
        blocks = 1 + max(int(name.split(".")[2]) for name in original if name.startswith(f"backbone.{stage}."))
        for block in range(blocks):
            name = f"backbone.{stage}.{block}"
            stride = 2 if block == 0 and stage != "res2" else 1
            shortcut = features
            if f"{name}.shortcut.weight" in original:
                shortcut = layer(f"{name}.shortcut", features, stride)
            if f"{name}.conv3.weight" in original:
                strides = (stride, 1) if stride_in_1x1 else (1, stride)
                inner = layer(f"{name}.conv2", layer(f"{name}.conv1", features, strides[0]).relu(), strides[1]).relu()
                features = (layer(f"{name}.conv3", inner) + shortcut).relu()
            else:
                inner = layer(f"{name}.conv1", features, stride).relu()
                features = (layer(f"{name}.conv2", inner) + shortcut).relu()
        maps.append(features)
    return maps


@pytest.mark.parametrize(("depth", "stride_in_1x1"), [(18, True), (34, False), (50, True), (50, False), (101, False)])
def test_resnet_of_every_kind_computes_what_detectron2_defines(tmp_path, depth, stride_in_1x1):
    changes = VARIANTS["resnet of basic blocks" if depth < 50 else "resnet"] | {
        "MODEL.RESNETS.DEPTH": depth,
        "MODEL.RESNETS.STRIDE_IN_1X1": stride_in_1x1,
    }
    config = tiny_config(tmp_path, changes)
    original = original_of(config)
    generator = torch.Generator().manual_seed(0)
    for name, value in original.items():  # statistics that matter, and weights that keep the signal alive
        if name.endswith("running_mean"):
            original[name] = 0.1 * torch.randn(value.shape, generator=generator)
        elif name.endswith("running_var"):
            original[name] = torch.rand(value.shape, generator=generator) + 0.5
        elif name.startswith("backbone.") and value.ndim == 4:
            original[name] = torch.randn(value.shape, generator=generator) * value[0].numel() ** -0.5
    model = converter._load_strictly(convert_state_dict(original, config), config).eval()
    pixels = torch.randn(1, 3, 64, 64, generator=generator)
    with torch.no_grad():
        ours = model.model.pixel_level_module.encoder(pixels).feature_maps
    by_definition = resnet_by_definition(original, stride_in_1x1, pixels)
    for level, expected in zip(ours, by_definition, strict=True):
        torch.testing.assert_close(level, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    if depth >= 50:  # blocks of two convolutions have no choice
        other = resnet_by_definition(original, not stride_in_1x1, pixels)
        assert (other[3] - by_definition[3]).abs().max() > 0.01 * by_definition[3].abs().max()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("INPUT.MIN_SIZE_TEST", "large"),
        ("INPUT.MIN_SIZE_TEST", True),
        ("MODEL.PIXEL_MEAN", 0.5),
        ("MODEL.PIXEL_STD", "[open('x', 'w')]"),
        ("MODEL.PIXEL_STD", "(" * 900),
        ("MODEL.SWIN.DEPTHS", [[2], [2], [2], [2]]),
        ("MODEL.MASK_FORMER.DEC_LAYERS", 2.5),
        ("MODEL.MASK_FORMER.PRE_NORM", "yes, please"),
        ("MODEL.MASK_FORMER.CLASS_WEIGHT", float("nan")),
    ],
)
def test_option_of_the_wrong_type_is_refused_by_name(tmp_path, option, value):
    with pytest.raises(ValueError, match=option):
        read_config(write_config(tmp_path, {option: value}))


def test_impossible_model_is_an_error_without_traceback(tiny_original, tmp_path, capsys):
    config_file = write_config(tmp_path, {"MODEL.SEM_SEG_HEAD.CONVS_DIM": 40})
    arguments = ["--checkpoint", tiny_original[0], "--config-file", config_file, "--output", tmp_path / "out"]
    assert run(*arguments) == 1
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


# What the original calls the data sets it trains on -> the classes they have. Counts are those of the papers.
KNOWN_DATA_SETS = {
    "coco_2017_train_panoptic": ("coco-panoptic", 133),
    "coco_2017_val_panoptic_with_sem_seg": ("coco-panoptic", 133),
    "coco_2017_train": ("coco-instance", 80),
    "ade20k_panoptic_train": ("ade20k-panoptic", 150),
    "ade20k_sem_seg_train": ("ade20k-semantic", 150),
    "ade20k_instance_train": ("ade20k-instance", 100),
    "cityscapes_fine_panoptic_train": ("cityscapes-panoptic", 19),
    "cityscapes_fine_sem_seg_train": ("cityscapes-semantic", 19),
    "cityscapes_fine_instance_seg_train": ("cityscapes-instance", 8),
    "mapillary_vistas_panoptic_train": ("mapillary-panoptic", 65),
    "mapillary_vistas_sem_seg_train": ("mapillary-semantic", 65),
    "ytvis_2019_train": ("ytvis2019", 40),
    "ytvis_2021_train": ("ytvis2021", 40),
}


@pytest.mark.parametrize(("data_set", "known"), KNOWN_DATA_SETS.items(), ids=KNOWN_DATA_SETS)
def test_classes_of_a_known_data_set_come_from_its_name(tmp_path, data_set, known):
    name, count = known
    changes = {
        "DATASETS.TRAIN": [data_set],
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": count,
        "MODEL.MASK_FORMER.TEST.PANOPTIC_ON": "panoptic" in name,
    }
    options = read_config(write_config(tmp_path, changes))
    config = Mask2FormerConfig(**config_from_yaml(options))
    assert config.id2label == label_set(name).id2label and config.label_colors == label_set(name).colors
    stuff = label_set(name).stuff_ids if "panoptic" in name else None
    assert processor_from_yaml(options)["label_ids_to_fuse"] == stuff

    own = [Label(f"own {i}", i > 0, (i, 0, 0), i) for i in range(count)]
    config = Mask2FormerConfig(**config_from_yaml(options, own))
    assert config.id2label[0] == "own 0" and config.label_colors == [[i, 0, 0] for i in range(count)]
    assert processor_from_yaml(options, own)["label_ids_to_fuse"] == ([0] if stuff else None)


def test_instances_stay_the_task_with_every_test_switched_on(tmp_path):
    """As the original's configs for ADE20K's instances have it."""
    changes = {"DATASETS.TRAIN": ["ade20k_instance_train"], "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 100}
    changes |= {f"MODEL.MASK_FORMER.TEST.{task}_ON": True for task in ("SEMANTIC", "INSTANCE", "PANOPTIC")}
    options = read_config(write_config(tmp_path, changes))
    settings = processor_from_yaml(options)
    assert (settings["task"], settings["label_ids_to_fuse"]) == ("instance", None)
    assert settings["semantic_resize_before_inference"] is True

    own = [Label(f"own {i}", i > 0, None, i) for i in range(100)]  # stuff among them asks for a panoptic map
    settings = processor_from_yaml(options, own)
    assert (settings["task"], settings["label_ids_to_fuse"]) == ("panoptic", [0])
    things, unsaid = ([label._replace(is_thing=is_thing) for label in own] for is_thing in (True, None))
    assert processor_from_yaml(options, things)["task"] == processor_from_yaml(options, unsaid)["task"] == "instance"
    elsewhere = options | {"DATASETS.TRAIN": ["plants_train"]}
    settings = processor_from_yaml(elsewhere, things)
    assert (settings["task"], settings["label_ids_to_fuse"]) == ("panoptic", [])


@pytest.mark.parametrize(
    ("data_set", "count"), [("coco_2017_train_panoptic", 3), ("ade20k_full_sem_seg_train", 150), ("flowers_train", 133)]
)
def test_classes_of_an_unknown_data_set_or_another_number_are_not_guessed(tmp_path, data_set, count):
    changes = {"DATASETS.TRAIN": [data_set], "MODEL.SEM_SEG_HEAD.NUM_CLASSES": count}
    config = tiny_config(tmp_path, changes)
    assert config.id2label == {i: f"LABEL_{i}" for i in range(count)} and config.label_colors is None


def test_colours_of_ones_own_labels_are_kept_and_those_of_some_alone_refused(tiny_original, tmp_path):
    labels = [{"id": i, "name": f"label {i}", "isthing": 1, "color": [i, 2 * i, 255]} for i in range(3)]
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    convert(*tiny_original, tmp_path / "all", tmp_path / "labels.json")
    assert Mask2FormerConfig.from_pretrained(tmp_path / "all").label_colors == [[0, 0, 255], [1, 2, 255], [2, 4, 255]]
    del labels[1]["color"]
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    with pytest.raises(ValueError, match="none to 1, such as 'label 1': give one to every class, or to none"):
        convert(*tiny_original, tmp_path / "some", tmp_path / "labels.json")
    assert not (tmp_path / "some").exists()


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[1, 2, 3]",
        '{"labels": []}',
        '[{"id": 0, "name": "a", "color": [1, 2]}, {"id": 1, "name": "b"}, {"id": 2, "name": "c"}]',
        '[{"id": 0, "name": "a", "color": "red"}, {"id": 1, "name": "b"}, {"id": 2, "name": "c"}]',
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


EXECUTING_TAGS = [
    "!!python/object/apply:os.system [{command}]",
    "!!python/object/apply:subprocess.check_call {{args: [[sh, -c, {command}]]}}",
    "!!python/object/new:os.system [{command}]",
    "!!python/object/new:subprocess.Popen [[sh, -c, {command}]]",
]
NAMING_TAGS = ["!!python/name:os.system", "!!python/module:os", "!!python/object:os.stat_result {}", "!own tag"]


@pytest.mark.parametrize("place", ["value", "item", "section", "key"])
@pytest.mark.parametrize("tag", EXECUTING_TAGS + NAMING_TAGS)
def test_no_tag_of_a_config_is_followed_wherever_it_stands(tmp_path, monkeypatch, tag, place):
    marker = tmp_path / "executed"
    tag = tag.format(command=json.dumps(f"touch '{marker}'")) if tag in EXECUTING_TAGS else tag
    text = write_config(tmp_path).read_text()
    old, new = {
        "value": ("  MIN_SIZE_TEST: 64", f"  MIN_SIZE_TEST: {tag}"),
        "item": ("  - flowers_train", f"  - {tag}"),
        "section": ("INPUT:\n", f"INPUT: {tag}\nNOT_INPUT:\n"),
        "key": ("INPUT:\n", f"? {tag}\n: 1\nINPUT:\n"),
    }[place]
    assert text.count(old) == 1
    path = tmp_path / "evil.yaml"
    path.write_text(text.replace(old, new))
    if place == "key":
        assert read_config(path) == read_config(tmp_path / "config.yaml")
    else:
        with pytest.raises(UnsupportedOptionError, match=r"(INPUT\.|DATASETS\.TRAIN).* is an expression to execute"):
            read_config(path)
    assert not marker.exists()
    if tag in EXECUTING_TAGS:  # the same file is live ammunition to an unsafe reader
        with contextlib.suppress(Exception):
            yaml.load(path.read_text(), yaml.UnsafeLoader).wait()
        for _ in range(100):
            if marker.exists():
                break
            time.sleep(0.05)
        assert marker.exists()


LAUGHS = "a0: &a0 [1, 1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))
NESTED_LAUGHS = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{x: *a{i - 1}, y: *a{i - 1}}}\n" for i in range(1, 60))
MERGED_LAUGHS = "a0: &a0 {x: 1, y: 2}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 30)
)


def test_yaml_that_refers_to_itself_ends_at_once(tmp_path):
    plain = write_config(tmp_path)
    path = tmp_path / "laughs.yaml"
    for unread in (LAUGHS, NESTED_LAUGHS, "loop: &loop {self: *loop}\nlist: &list [*list]\n"):
        path.write_text(unread + plain.read_text())
        assert read_config(path) == read_config(plain)
    for name, needed in (("INPUT.MIN_SIZE_TEST", LAUGHS), ("INPUT.MIN_SIZE_TEST", NESTED_LAUGHS)):
        path.write_text(needed + plain.read_text().replace("MIN_SIZE_TEST: 64", "MIN_SIZE_TEST: *a59"))
        with pytest.raises(ValueError, match=f"{name} in .* is .{{1,500}}; a value like"):
            read_config(path)
    path.write_text("loop: &loop [*loop]\n" + plain.read_text().replace("DEPTHS:", "DEPTHS: *loop\n    DEPTHS_:"))
    with pytest.raises(ValueError, match=r"MODEL\.SWIN\.DEPTHS in"):
        read_config(path)
    # Since 6.0.4 PyYAML writes each merged key once; before, they would have filled the memory.
    path.write_text(MERGED_LAUGHS + plain.read_text())
    try:
        merged = read_config(path)
    except ValueError as error:
        assert "merge keys" in str(error)
    else:
        assert merged == read_config(plain)
    path.write_text("a: " + "[" * 5000)
    with pytest.raises(ValueError, match="no YAML file"):
        read_config(path)


def test_anchors_and_merge_keys_are_followed(tmp_path):
    text = write_config(tmp_path).read_text()
    merged = "BASE: &base {MIN_SIZE_TEST: 72, FORMAT: BGR}\n" + text.replace("INPUT:\n", "INPUT:\n  <<: *base\n")
    (tmp_path / "merged.yaml").write_text(merged)
    options = read_config(tmp_path / "merged.yaml")
    assert (options["INPUT.MIN_SIZE_TEST"], options["INPUT.FORMAT"]) == (64, "RGB")  # own values win
    (tmp_path / "merged.yaml").write_text(merged.replace("  FORMAT: RGB\n", ""))
    assert read_config(tmp_path / "merged.yaml")["INPUT.FORMAT"] == "BGR"


@pytest.mark.parametrize("value", ["2020-13-45", "!!int ''", "!!float x", "!!bool x", "9" * 5000])
def test_invalid_yaml_values_are_reported(tmp_path, value):
    path = tmp_path / "bad.yaml"
    path.write_text(f"VERSION: {value}\n" + write_config(tmp_path).read_text())
    with pytest.raises(ValueError, match=r"bad\.yaml is no YAML file"):
        read_config(path)


def test_several_bases_later_ones_first(tmp_path):
    queries, layers = "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", "MODEL.MASK_FORMER.DEC_LAYERS"
    write_config(tmp_path, {queries: 7, layers: 4}, name="common.yaml")
    for name, own in (("one", {queries: 8, layers: 5}), ("two", {queries: 9})):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(changed({"_BASE_": "common.yaml", **own}, {})))
    top = tmp_path / "top.yaml"
    for bases, expected in ((["one.yaml", "two.yaml"], (9, 4)), (["two.yaml", str(tmp_path / "one.yaml")], (8, 5))):
        top.write_text(yaml.safe_dump({"_BASE_": bases}))
        options = read_config(top)
        assert (options[queries], options[layers]) == expected
    for bases in ([], None):
        top.write_text(yaml.safe_dump(changed({"_BASE_": bases})))
        if bases is None:
            with pytest.raises(UnsupportedOptionError, match="_BASE_"):
                read_config(top)
        else:
            assert read_config(top)[queries] == 5
    # Each file names the one before twice: read once each, not 2^40 times.
    write_config(tmp_path, name="b0.yaml")
    for i in range(1, 41):
        (tmp_path / f"b{i}.yaml").write_text(f"_BASE_: [b{i - 1}.yaml, ./b{i - 1}.yaml]\n")
    assert read_config(tmp_path / "b40.yaml")[queries] == 5


def test_bad_yaml_is_named(tmp_path):
    for content in ("a: [", "just text"):
        (tmp_path / "bad.yaml").write_text(content)
        with pytest.raises(ValueError, match=r"bad\.yaml"):
            read_config(tmp_path / "bad.yaml")
