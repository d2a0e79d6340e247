"""Checkpoints of `transformers`' own Mask2Former, as written today and years ago: the same outputs, without a word.

`transformers` is the oracle: its model writes the folders and gives the outputs to match.
"""

import json
import re
import shutil

import numpy as np
import pytest
import tiny
import torch
from listening import WarningsOfTransformers
from safetensors.torch import load_file, save_file
from tiny import FIELDS, STAGES, shake
from transformers import Mask2FormerConfig as StockConfig
from transformers import Mask2FormerForUniversalSegmentation as StockModel
from transformers.core_model_loading import revert_weight_conversion

from m2f_hf import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor, Mask2FormerModel
from m2f_hf.known.label_sets import LABEL_SETS, label_set
from m2f_hf.known.stock_checkpoints import add_known_settings, checkpoint_name, translate_settings


TINY = FIELDS | {"encoder_layers": 1, "decoder_layers": 3}
TINY_SWIN = {name: value for name, value in tiny.BACKBONES["swin"].items() if name != "window_size"}
TINY_RESNET = tiny.BACKBONES["resnet"] | {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 2, 1, 1]}
CONVNEXT = {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 2, 1], "out_features": STAGES}
# Every kind of backbone that gives maps at strides 4, 8, 16 and 32 and trains in a stock model.
BACKBONES = {
    "swin, window 7": TINY_SWIN | {"window_size": 7},
    "swin, window 12": TINY_SWIN | {"window_size": 12},
    "resnet, bottleneck": TINY_RESNET | {"layer_type": "bottleneck"},
    "resnet, basic": TINY_RESNET | {"layer_type": "basic"},
    "swinv2": TINY_SWIN | {"model_type": "swinv2", "window_size": 4},
    "maskformer-swin": TINY_SWIN | {"model_type": "maskformer-swin", "window_size": 4},
    "convnext": CONVNEXT | {"model_type": "convnext"},
    "convnextv2": CONVNEXT | {"model_type": "convnextv2"},
    "pvt_v2": {
        "model_type": "pvt_v2",
        "hidden_sizes": [8, 8, 16, 16],
        "num_attention_heads": [1, 1, 2, 2],
        "depths": [1, 1, 1, 1],
        "out_features": STAGES,
    },
    "bit": {
        "model_type": "bit",
        "embedding_size": 8,
        "num_groups": 4,
        "hidden_sizes": [16, 16, 32, 32],
        "depths": [1, 1, 1, 1],
        "out_features": STAGES,
    },
}
SWIN = {"model_type": "swin", "out_features": STAGES}
RESNET = {"model_type": "resnet", "embedding_size": 64, "hidden_sizes": [256, 512, 1024, 2048], "out_features": STAGES}
# Sizes of the released checkpoints.
REAL_BACKBONES = {
    "swin-tiny": SWIN | {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7},
    "swin-small": SWIN | {"embed_dim": 96, "depths": [2, 2, 18, 2], "num_heads": [3, 6, 12, 24], "window_size": 7},
    "swin-base": SWIN | {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32], "window_size": 12},
    "swin-large": SWIN | {"embed_dim": 192, "depths": [2, 2, 18, 2], "num_heads": [6, 12, 24, 48], "window_size": 12},
    "resnet-50": RESNET | {"depths": [3, 4, 6, 3]},
    "resnet-101": RESNET | {"depths": [3, 4, 23, 3]},
}


@pytest.fixture
def messages():
    """Warnings that transformers and the package log during the test."""
    with WarningsOfTransformers() as messages:
        yield messages


def stock_model(backbone, **fields):
    """Return a stock model with every parameter and statistic off its initial value, so that none is ignored."""
    torch.manual_seed(0)
    return shake(StockModel(StockConfig(backbone_config=dict(backbone), **(TINY | fields)))).eval()


def outputs_of(model, size=(64, 96)):
    with torch.no_grad():
        outputs = model(torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1)))
    return torch.cat([outputs.class_queries_logits.flatten(), outputs.masks_queries_logits.flatten()])


@pytest.fixture(scope="module")
def swin(tmp_path_factory):
    """A stock Swin checkpoint on disk, and its outputs."""
    model = stock_model(BACKBONES["swin, window 7"])
    folder = tmp_path_factory.mktemp("swin")
    model.save_pretrained(folder)
    return folder, outputs_of(model)


def assert_loads(folder, expected, messages):
    messages.clear()
    model, info = Mask2FormerForUniversalSegmentation.from_pretrained(folder, output_loading_info=True)
    assert {name: list(keys) for name, keys in info.items() if keys} == {}
    assert messages == []
    assert expected.std() > 0.1
    torch.testing.assert_close(outputs_of(model.eval()), expected, atol=1e-5, rtol=1e-5)
    return model


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_backbone(backbone, tmp_path, messages):
    theirs = stock_model(BACKBONES[backbone])
    theirs.save_pretrained(tmp_path)
    assert_loads(tmp_path, outputs_of(theirs), messages)


@pytest.mark.parametrize("backbone", REAL_BACKBONES)
def test_files_of_the_real_sizes_have_our_keys_and_shapes(backbone):
    """On the meta device: the names that `save_pretrained` writes."""
    fields = {"num_labels": 133, "num_queries": 200 if backbone == "swin-large" else 100}
    with torch.device("meta"):
        theirs = StockModel(StockConfig(backbone_config=dict(REAL_BACKBONES[backbone]), **fields))
        config = json.loads(theirs.config.to_json_string(use_diff=False)) | {"label_colors": None}
        ours = Mask2FormerForUniversalSegmentation(Mask2FormerConfig.from_dict(config))
    shapes = [
        {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, model.state_dict()).items()}
        for model in (ours, theirs)
    ]
    assert len(shapes[1]) > 400
    assert shapes[0] == shapes[1]


# --- files ---


def as_pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def as_shards(folder):
    model = StockModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2


def as_sharded_pickle(folder):
    as_shards(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for shard in folder.glob("model-*.safetensors"):
        torch.save(load_file(shard), folder / f"pytorch_{shard.stem}.bin")
        shard.unlink()
    (folder / "model.safetensors.index.json").unlink()
    index["weight_map"] = {
        key: f"pytorch_{name.removesuffix('.safetensors')}.bin" for key, name in index["weight_map"].items()
    }
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("rewrite", [as_pickle, as_shards, as_sharded_pickle])
def test_every_form_of_file(rewrite, swin, tmp_path, messages):
    folder = shutil.copytree(swin[0], tmp_path / "checkpoint")
    rewrite(folder)
    model = assert_loads(folder, swin[1], messages)
    model.save_pretrained(tmp_path / "ours")
    ours, original = load_file(tmp_path / "ours" / "model.safetensors"), load_file(swin[0] / "model.safetensors")
    assert ours.keys() == original.keys()
    assert all(torch.equal(ours[key], original[key]) for key in ours)


def test_half_precision_files(swin, tmp_path, messages):
    folder = shutil.copytree(swin[0], tmp_path / "checkpoint")
    halves = {name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(halves, folder / "model.safetensors", metadata={"format": "pt"})
    model, info = Mask2FormerForUniversalSegmentation.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert {name: list(keys) for name, keys in info.items() if keys} == {}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    torch.testing.assert_close(outputs_of(model.eval()), swin[1], atol=0.05, rtol=0.05)
    assert messages == []


def make_old(folder, **changes):
    """Writes a folder's files again the way transformers 4.26 wrote them for the released checkpoints."""
    weights = load_file(folder / "model.safetensors")
    tables = [name for name in weights if name.endswith("relative_position_bias_table")]
    assert tables
    for name in tables:  # a buffer that used to be stored
        weights[name.replace("bias_table", "index")] = torch.zeros(49, 49, dtype=torch.int64)
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")

    config = json.loads((folder / "config.json").read_text())
    for name in ("dtype", "transformers_version"):
        config.pop(name, None)
        config["backbone_config"].pop(name, None)
    config["backbone_config"] |= {
        "_name_or_path": "",
        "architectures": None,
        "chunk_size_feed_forward": 0,
        "finetuning_task": None,
        "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
        "label2id": {"LABEL_0": 0, "LABEL_1": 1},
        "is_decoder": False,
        "num_beams": 1,
        "num_layers": 4,
        "output_attentions": False,
        "pruned_heads": {},
        "return_dict": True,
        "stage_names": ["stem", *STAGES],
        "temperature": 1.0,
        "torch_dtype": None,
        "torchscript": False,
        "transformers_version": "4.26.0.dev0",
        "use_bfloat16": False,
    }
    config |= {
        "activation_function": "relu",
        "architectures": ["Mask2FormerForUniversalSegmentation"],
        "backbone": None,
        "backbone_kwargs": None,
        "enforce_input_proj": False,
        "model_type": "mask2former",
        "num_hidden_layers": TINY["decoder_layers"],
        "torch_dtype": "float32",
        "transformers_version": None,
        "use_pretrained_backbone": False,
        "use_timm_backbone": False,
    } | changes
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(OLD_PREPROCESSOR))


OLD_PREPROCESSOR = {
    "_max_size": 1333,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "feature_extractor_type": "MaskFormerFeatureExtractor",
    "ignore_index": 255,
    "image_mean": [0.48500001430511475, 0.4560000002384186, 0.4059999883174896],
    "image_processor_type": "MaskFormerImageProcessor",
    "image_std": [0.2290000021457672, 0.2239999920129776, 0.22499999403953552],
    "num_labels": 3,
    "reduce_labels": False,
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 384, "width": 384},
    "size_divisor": 32,
    "size_divisibility": 32,
}


def test_files_of_years_ago(swin, tmp_path, messages):
    folder = shutil.copytree(swin[0], tmp_path / "my-things-instance")
    make_old(folder)
    model = assert_loads(folder, swin[1], messages)
    assert (model.config.model_type, model.config.num_labels) == ("m2f", 3)
    assert Mask2FormerModel.from_pretrained(folder).config.label_colors is None
    processor = Mask2FormerImageProcessor.from_pretrained(folder)
    assert (processor.task, processor.label_ids_to_fuse) == ("instance", None)
    assert messages == []
    inputs = processor(np.zeros((30, 40, 3), dtype=np.uint8), return_tensors="pt", size={"shortest_edge": 33})
    assert inputs["pixel_values"].shape == (1, 3, 64, 64)  # 33 x 44, padded where transformers would stretch
    assert inputs["pixel_mask"].sum() == 33 * 44
    # what is saved from here is ours, and says it all
    model.save_pretrained(tmp_path / "ours")
    processor.save_pretrained(tmp_path / "ours")
    again = Mask2FormerImageProcessor.from_pretrained(tmp_path / "ours")
    assert again.to_dict() == processor.to_dict()
    assert {"_max_size", "num_labels", "feature_extractor_type", "size_divisibility"}.isdisjoint(again.to_dict())
    assert messages == []


# --- labels, task, stuff, size: from name and labels ---


def write(folder, labels=None, **settings):
    """The two configuration files of a stock checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "preprocessor_config.json").write_text(json.dumps(OLD_PREPROCESSOR | settings))
    if labels is not None:
        config = {"model_type": "mask2former", "backbone_config": dict(TINY_SWIN)} | TINY
        del config["num_labels"]
        config["id2label"] = {str(index): label for index, label in labels.items()}
        config["label2id"] = {label: index for index, label in labels.items()}
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def placeholders(number):
    return {index: f"LABEL_{index}" for index in range(number)}


# name of a released checkpoint -> label set, shortest and longest edge of the original's tests, threshold
RELEASED = {
    "mask2former-swin-large-coco-panoptic": ("coco-panoptic", 800, 1333, 0.8),
    "mask2former-swin-tiny-coco-instance": ("coco-instance", 800, 1333, 0.8),
    "mask2former-swin-large-ade-panoptic": ("ade20k-panoptic", 640, 2560, 0.8),
    "mask2former-swin-tiny-ade-semantic": ("ade20k-semantic", 512, 2048, 0.8),
    "mask2former-swin-small-ade-semantic": ("ade20k-semantic", 512, 2048, 0.8),
    "mask2former-swin-base-IN21k-ade-semantic": ("ade20k-semantic", 640, 2560, 0.8),
    "mask2former-swin-large-ade-semantic": ("ade20k-semantic", 640, 2560, 0.8),
    "mask2former-swin-base-IN21k-cityscapes-panoptic": ("cityscapes-panoptic", 1024, 2048, 0.8),
    "mask2former-swin-large-cityscapes-semantic": ("cityscapes-semantic", 1024, 2048, 0.8),
    "mask2former-swin-small-cityscapes-instance": ("cityscapes-instance", 1024, 2048, 0.8),
    "mask2former-swin-large-mapillary-vistas-panoptic": ("mapillary-panoptic", 2048, 2048, 0.0),
    "mask2former-swin-large-mapillary-vistas-semantic": ("mapillary-semantic", 2048, 2048, 0.0),
}


@pytest.mark.parametrize("has_names", [True, False], ids=["names", "LABEL_0"])
@pytest.mark.parametrize("name", RELEASED)
def test_released_checkpoints_need_no_word(name, has_names, tmp_path, messages):
    set_name, shortest, longest, threshold = RELEASED[name]
    known = label_set(set_name)
    labels = known.id2label if has_names else placeholders(len(known.labels))
    folder = write(tmp_path / name, labels, ignore_index=None)
    processor = Mask2FormerImageProcessor.from_pretrained(folder)
    assert processor.task == known.task
    assert processor.label_ids_to_fuse == known.stuff_ids
    assert processor.threshold == threshold
    assert processor.semantic_resize_before_inference is None
    assert processor.ignore_index == known.ignore_value
    assert dict(processor.size) == {"shortest_edge": shortest, "longest_edge": longest}
    config = Mask2FormerConfig.from_pretrained(folder)
    assert config.id2label == known.id2label
    assert config.label2id == {label: index for index, label in known.id2label.items()}
    assert config.label_colors == known.colors
    assert messages == []


def test_the_facts_are_those_of_the_originals_configs(shared):
    """Size, thresholds and where the semantic product is taken, for each released image checkpoint."""
    datasets = {"coco": "coco", "ade20k": "ade", "cityscapes": "cityscapes", "mapillary-vistas": "mapillary-vistas"}
    entries = json.loads((shared / "data" / "zoo" / "zoo.json").read_text())
    checked = 0
    for entry in entries:
        dataset, task = entry["config"].split("/")[:2]
        if dataset not in datasets:
            continue
        task = task.removesuffix("-segmentation")
        backbone = re.search(r"R50|R101|swin_(tiny|small|base|large)", entry["config"])[0]
        backbone = backbone.replace("R", "resnet-").replace("_", "-")
        spec = entry["spec"]
        settings = add_known_settings(
            translate_settings(OLD_PREPROCESSOR | {"ignore_index": None}),
            placeholders(spec["num_classes"]),
            f"facebook/mask2former-{backbone}-{datasets[dataset]}-{task}",
        )
        test = spec["mask_former"]["test"]
        processor = Mask2FormerImageProcessor.from_dict(settings)
        assert processor.task == task, entry["config"]
        assert dict(processor.size) == {
            "shortest_edge": spec["input"]["min_size_test"],
            "longest_edge": spec["input"]["max_size_test"],
        }, entry["config"]
        assert processor.threshold == test["object_mask_threshold"], entry["config"]
        assert processor.overlap_mask_area_threshold == test["overlap_threshold"]
        assert processor.max_detections == spec["detections_per_image"]
        assert processor.ignore_index == spec["ignore_value"]
        # The original resizes first, whatever its setting says, when it also makes instances or segments.
        resizes_first = test["sem_seg_postprocessing_before_inference"] or test["panoptic_on"] or test["instance_on"]
        assert processor.semantic_resize_before_inference is None
        assert resizes_first == (processor.task != "semantic"), entry["config"]
        checked += 1
    assert checked == 47


def test_labels_alone_identify_a_data_set(tmp_path, messages):
    folder = write(tmp_path / "checkpoint-500", label_set("coco-panoptic").id2label)
    processor = Mask2FormerImageProcessor.from_pretrained(folder)
    assert (processor.task, processor.label_ids_to_fuse) == ("panoptic", list(range(80, 133)))
    assert dict(processor.size) == {"height": 384, "width": 384}  # it may have been tuned at that size
    assert Mask2FormerConfig.from_pretrained(folder).label_colors == label_set("coco-panoptic").colors
    folder = write(tmp_path / "run", label_set("coco-instance").id2label)
    processor = Mask2FormerImageProcessor.from_pretrained(folder)
    assert (processor.task, processor.label_ids_to_fuse) == ("instance", [])
    assert messages == []


def test_equal_labels_of_two_tasks_are_asked_about(tmp_path, messages):
    folder = write(tmp_path / "checkpoint-500", label_set("cityscapes-semantic").id2label)
    processor = Mask2FormerImageProcessor.from_pretrained(folder)
    assert (processor.task, processor.label_ids_to_fuse) == ("panoptic", list(range(11)))
    [message] = messages
    assert str(folder) in message
    assert "its task is panoptic (pass `task=" in message
    assert "label_ids_to_fuse" not in message
    messages.clear()
    processor = Mask2FormerImageProcessor.from_pretrained(folder, task="semantic")
    assert processor.task == "semantic"
    assert messages == []


def test_labels_of_ones_own_are_asked_about(tmp_path, messages):
    folder = write(tmp_path / "mask2former-cells", {0: "cell", 1: "nucleus", 2: "glass"})
    processor = Mask2FormerImageProcessor.from_pretrained(folder)
    assert (processor.task, processor.label_ids_to_fuse) == ("panoptic", None)
    [message] = messages
    assert "its task is panoptic" in message
    assert "none of its labels is stuff (pass `label_ids_to_fuse=[...]`" in message
    messages.clear()

    processor = Mask2FormerImageProcessor.from_pretrained(folder, task="panoptic", label_ids_to_fuse=[2])
    assert (processor.task, processor.label_ids_to_fuse) == ("panoptic", [2])
    processor.save_pretrained(tmp_path / "answered")
    assert Mask2FormerImageProcessor.from_pretrained(tmp_path / "answered").label_ids_to_fuse == [2]
    assert messages == []

    assert Mask2FormerImageProcessor.from_pretrained(folder, task="semantic").task == "semantic"
    assert messages == []  # which has no use for stuff

    Mask2FormerImageProcessor.from_pretrained(folder, label_ids_to_fuse=[])
    assert len(messages) == 1
    assert "task is panoptic" in messages[0]
    assert "is stuff" not in messages[0]


@pytest.mark.parametrize("task", ["semantic", "instance"])
def test_a_task_in_the_name_is_believed(task, tmp_path, messages):
    folder = write(tmp_path / f"mask2former-swin-tiny-coco-{task}-cells", {0: "cell", 1: "glass"})
    assert Mask2FormerImageProcessor.from_pretrained(folder).task == task
    assert messages == []
    write(tmp_path / "cells-panoptic", {0: "cell", 1: "glass"})
    Mask2FormerImageProcessor.from_pretrained(tmp_path / "cells-panoptic")
    assert len(messages) == 1
    assert "task is" not in messages[0]


@pytest.mark.parametrize("name", ["mask2former-swin-large-coco-panoptic", "somewhere"])
def test_without_a_configuration(name, tmp_path, messages):
    processor = Mask2FormerImageProcessor.from_pretrained(write(tmp_path / name))
    assert (processor.task, processor.label_ids_to_fuse) == ("panoptic", None)
    assert len(messages) == 1


def test_arguments_come_before_all(tmp_path, messages):
    folder = write(tmp_path / "mask2former-swin-large-coco-panoptic", label_set("coco-panoptic").id2label)
    size = {"height": 384, "width": 384}
    processor = Mask2FormerImageProcessor.from_pretrained(
        folder, task="semantic", label_ids_to_fuse=[5], threshold=0.3, size=size, ignore_index=7
    )
    assert (processor.task, processor.label_ids_to_fuse, processor.threshold) == ("semantic", [5], 0.3)
    assert (dict(processor.size), processor.ignore_index) == (size, 7)
    config = Mask2FormerConfig.from_pretrained(folder, id2label={0: "cat"})
    assert (config.id2label, config.label2id, config.label_colors) == ({0: "cat"}, {"cat": 0}, None)
    assert messages == []


def test_a_file_and_a_relative_folder_have_their_folders_name(tmp_path, messages, monkeypatch):
    folder = write(tmp_path / "mask2former-swin-large-coco-panoptic", placeholders(133))
    by_file = Mask2FormerImageProcessor.from_pretrained(folder / "preprocessor_config.json")
    assert by_file.label_ids_to_fuse == list(range(80, 133))
    assert Mask2FormerConfig.from_pretrained(folder / "config.json").id2label[132] == "rug-merged"
    monkeypatch.chdir(folder)
    assert Mask2FormerImageProcessor.from_pretrained(".").label_ids_to_fuse == list(range(80, 133))
    assert messages == []
    assert checkpoint_name("facebook/mask2former-swin-large-coco-panoptic").endswith(
        "k/mask2former-swin-large-coco-panoptic"
    )


def as_cached(cache, repo_id):
    """The folder in which the Hub's client keeps a repository."""
    commit = "0" * 40
    repository = cache / f"models--{repo_id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    return repository / "snapshots" / commit


def test_by_id_from_the_cache(swin, tmp_path, messages):
    """Without a network: all files are found in the cache, and the name is the id."""
    offline = {"cache_dir": tmp_path, "local_files_only": True}
    repo_id = "facebook/mask2former-swin-large-coco-panoptic"
    write(as_cached(tmp_path, repo_id), label_set("coco-panoptic").id2label)
    processor = Mask2FormerImageProcessor.from_pretrained(repo_id, **offline)
    assert (processor.task, processor.label_ids_to_fuse) == ("panoptic", list(range(80, 133)))
    assert dict(processor.size) == {"shortest_edge": 800, "longest_edge": 1333}
    assert Mask2FormerConfig.from_pretrained(repo_id, **offline).label_colors == label_set("coco-panoptic").colors

    make_old(shutil.copytree(swin[0], as_cached(tmp_path, "someone/cells-instance")))
    model = Mask2FormerForUniversalSegmentation.from_pretrained("someone/cells-instance", **offline)
    torch.testing.assert_close(outputs_of(model.eval()), swin[1], atol=1e-5, rtol=1e-5)
    assert Mask2FormerImageProcessor.from_pretrained("someone/cells-instance", **offline).task == "instance"
    assert messages == []


@pytest.mark.parametrize("name", [name for name, known in LABEL_SETS.items() if known.task != "semantic"])
def test_stuff_of_every_set(name):
    known = label_set(name)
    settings = add_known_settings({}, known.id2label, f"my-{name}")
    assert settings["label_ids_to_fuse"] == known.stuff_ids
    assert settings["task"] == known.task
