"""Ours to stock `transformers` and back: equal to the bit, or refused by name with nothing written."""

import copy
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
import torch
from listening import WarningsOfTransformers
from PIL import Image
from safetensors.torch import load_file
from tiny import FIELDS, STAGES, images, shake
from torch import nn
from transformers import AutoConfig
from transformers import Mask2FormerConfig as StockConfig
from transformers import Mask2FormerForUniversalSegmentation as StockModel
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil
from transformers.utils.logging import warning_once

from m2f_hf import M2FImageProcessor, Mask2FormerConfig, Mask2FormerForUniversalSegmentation


sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "conversion"))
import export_to_transformers as exporter


SWIN = {"embed_dim": 8, "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2], "window_size": 4, "out_features": STAGES}
CONVOLUTIONAL = {"hidden_sizes": [8, 12, 16, 20], "depths": [2, 1, 1, 1], "out_features": STAGES}
BACKBONES = {
    "swin": {"model_type": "swin", **SWIN},
    "resnet, basic": {"model_type": "resnet", "embedding_size": 8, "layer_type": "basic", **CONVOLUTIONAL},
    "resnet, bottleneck": {"model_type": "resnet", "embedding_size": 8, "layer_type": "bottleneck", **CONVOLUTIONAL},
    "convnext": {"model_type": "convnext", **CONVOLUTIONAL},
    "convnextv2": {"model_type": "convnextv2", **CONVOLUTIONAL},
    "swinv2": {"model_type": "swinv2", **SWIN},
    "maskformer-swin": {"model_type": "maskformer-swin", **SWIN},
    "dinov3_convnext": {"model_type": "dinov3_convnext", **CONVOLUTIONAL},
    "rt_detr_resnet": {"model_type": "rt_detr_resnet", "embedding_size": 8, "layer_type": "basic", **CONVOLUTIONAL},
    "pvt_v2": {
        "model_type": "pvt_v2",
        "hidden_sizes": [8, 16, 24, 32],
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 1, 2, 2],
        "out_features": STAGES,
    },
}
TINY = {name: value for name, value in FIELDS.items() if name not in ("num_labels", "train_num_points")} | {
    "id2label": {0: "cat", 1: "sky", 2: "grass"}
}
GOLDENS = ("coco_panoptic_r50", "coco_panoptic_swin", "coco_instance_swin", "ade20k_semantic_swinl")


def write_ours(folder, backbone="resnet, basic", processor=None, dtype=torch.float32, **fields):
    """Write a model of ours with every tensor off its initial value, and its processor, and return the folder."""
    torch.manual_seed(0)
    config = Mask2FormerConfig(backbone_config=dict(BACKBONES[backbone]), **(TINY | fields))
    shake(Mask2FormerForUniversalSegmentation(config)).to(dtype).save_pretrained(folder)
    M2FImageProcessor(**(processor or {})).save_pretrained(folder)
    return folder


def stock_keeps_input_projections(fields):
    """Older releases of transformers have them in a plain list, and don't save them."""
    stock = StockModel(StockConfig(backbone_config=dict(BACKBONES["resnet, basic"]), **(TINY | fields)))
    return isinstance(stock.model.transformer_module.input_projections, nn.ModuleList)


def assert_equal_outputs(ours, theirs, flip=False):
    """In double precision: how much of 1e-5 a float32 loses in a backbone of transformers depends on the processor.

    What is left is the position encoding, which both compute in float32.
    """
    pixel_values = images(seed=1).double()
    with torch.no_grad():
        mine, other = (
            copy.deepcopy(model).double().eval()(values)
            for model, values in ((ours, pixel_values), (theirs, pixel_values.flip(1) if flip else pixel_values))
        )
    for name in ("class_queries_logits", "masks_queries_logits"):
        assert mine[name].std() > 0.1
        torch.testing.assert_close(other[name], mine[name], atol=1e-6, rtol=1e-6)


def assert_equal_files(first, second):
    ours, theirs = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


# Over and back


@pytest.mark.parametrize("backbone", BACKBONES)
def test_stock_reads_the_export_and_ours_reads_it_back(backbone, tmp_path, capsys):
    source, output, back = write_ours(tmp_path / "ours", backbone), tmp_path / "stock", tmp_path / "back"
    warning_once.cache_clear()  # what was said in an earlier test may be said again
    with WarningsOfTransformers() as messages:
        assert exporter.main([str(source), "--output", str(output)]) == 0
    assert messages == []
    assert "equal to the bit" in capsys.readouterr().out
    with WarningsOfTransformers() as messages:
        theirs, loading = StockModel.from_pretrained(output, output_loading_info=True)
    assert {kind: keys for kind, keys in loading.items() if keys} == {}
    assert [message for message in messages if "is not a supported model" not in message] == []
    ours = Mask2FormerForUniversalSegmentation.from_pretrained(source)
    assert_equal_outputs(ours, theirs)
    assert_equal_files(source, output)

    with WarningsOfTransformers() as messages:
        returned, loading = Mask2FormerForUniversalSegmentation.from_pretrained(output, output_loading_info=True)
    assert {kind: keys for kind, keys in loading.items() if keys} == {}
    assert messages == []
    returned.save_pretrained(back)
    assert_equal_files(source, back)
    origin = {"_name_or_path": None}
    assert returned.config.to_dict() | origin == ours.config.to_dict() | origin


@pytest.mark.parametrize(
    "fields",
    [
        {"pre_norm": True},
        {"decoder_layers": 1},
        {"activation_function": "gelu", "mask_feature_size": 12},
        {"class_weight": 3, "dice_weight": 1, "no_object_weight": 1},  # whole numbers, which stock refuses
    ],
    ids=str,
)
def test_fields_that_stock_shares(fields, tmp_path):
    source = write_ours(tmp_path / "ours", **fields)
    exporter.export(str(source), tmp_path / "stock")
    theirs = StockModel.from_pretrained(tmp_path / "stock")
    assert {name: getattr(theirs.config, name) for name in fields} == fields
    assert_equal_outputs(Mask2FormerForUniversalSegmentation.from_pretrained(source), theirs)


@pytest.mark.parametrize("fields", [{"feature_size": 64}, {"enforce_input_projection": True}], ids=str)
def test_input_projections_go_over_where_stock_keeps_them(fields, tmp_path, capsys):
    source = write_ours(tmp_path / "ours", **fields)
    status = exporter.main([str(source), "--output", str(tmp_path / "stock")])
    if stock_keeps_input_projections(fields):
        assert status == 0
        assert "older releases of `transformers`" in capsys.readouterr().out
        assert_equal_outputs(
            Mask2FormerForUniversalSegmentation.from_pretrained(source),
            StockModel.from_pretrained(tmp_path / "stock"),
        )
    else:
        assert status == 1
        assert "input_projections" in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == ["ours"]


@pytest.mark.parametrize("backbone", ["swin", "resnet, basic", "convnext"])
def test_a_model_of_bgr_becomes_one_of_rgb(backbone, tmp_path, capsys):
    mean, std = [0.4, 0.45, 0.5], [0.22, 0.23, 0.24]
    settings = {"channel_order": "BGR", "image_mean": mean, "image_std": std}
    source = write_ours(tmp_path / "ours", backbone, settings)
    assert exporter.main([str(source), "--output", str(tmp_path / "stock")]) == 0
    assert "takes RGB" in capsys.readouterr().out
    theirs = StockModel.from_pretrained(tmp_path / "stock")
    assert_equal_outputs(Mask2FormerForUniversalSegmentation.from_pretrained(source), theirs, flip=True)
    # From a photo on: the two processors and the two models.
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8))
    stock = Mask2FormerImageProcessorPil.from_pretrained(tmp_path / "stock")
    mine = M2FImageProcessor.from_pretrained(source)
    pixels = [processor(photo, do_resize=False, return_tensors="pt")["pixel_values"] for processor in (mine, stock)]
    torch.testing.assert_close(pixels[1], pixels[0].flip(1), atol=1e-5, rtol=0)
    assert list(stock.image_mean) == mean[::-1] and list(stock.image_std) == std[::-1]


def test_half_precision_stays_half_precision(tmp_path):
    source = write_ours(tmp_path / "ours", dtype=torch.bfloat16)
    exporter.export(str(source), tmp_path / "stock")
    assert_equal_files(source, tmp_path / "stock")
    assert StockModel.from_pretrained(tmp_path / "stock").dtype == torch.bfloat16


@pytest.mark.parametrize("name", GOLDENS)
def test_original_to_ours_to_stock_to_ours(name, goldens, tmp_path):
    from converter import convert

    convert(goldens / name / "model.pkl", goldens / name / "config.yaml", tmp_path / "ours")
    projected = any(
        "transformer_module.input_proj" in name for name in load_file(tmp_path / "ours" / "model.safetensors")
    )
    if projected and not stock_keeps_input_projections({"enforce_input_projection": True}):
        with pytest.raises(exporter.NotExpressibleError, match="input_projections"):
            exporter.export(str(tmp_path / "ours"), tmp_path / "stock")
        return
    report = exporter.export(str(tmp_path / "ours"), tmp_path / "stock")
    assert max(report.class_difference, report.mask_difference) < 1e-3
    assert_equal_files(tmp_path / "ours", tmp_path / "stock")
    back = Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path / "stock")
    back.save_pretrained(tmp_path / "back")
    assert_equal_files(tmp_path / "ours", tmp_path / "back")
    with np.load(goldens / name / "intermediate.npz") as arrays:
        pixel_values = torch.from_numpy(arrays["input"])
    with torch.no_grad():
        theirs, ours = (model.eval()(pixel_values) for model in (StockModel.from_pretrained(tmp_path / "stock"), back))
    for field in ("class_queries_logits", "masks_queries_logits"):
        torch.testing.assert_close(theirs[field], ours[field], atol=1e-4, rtol=1e-4)


# What the folder says


WITHOUT_THE_PACKAGE = """
import json, sys
sys.modules["m2f_hf"] = None  # importing it raises
import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForUniversalSegmentation
from transformers.models.auto.image_processing_auto import AutoImageProcessor

folder = sys.argv[1]
config = AutoConfig.from_pretrained(folder)
model, loading = AutoModelForUniversalSegmentation.from_pretrained(folder, output_loading_info=True)
processor = AutoImageProcessor.from_pretrained(folder)
photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8))
inputs = processor(photo, return_tensors="pt")
with torch.no_grad():
    outputs = model.eval()(**inputs)
segments = processor.post_process_panoptic_segmentation(outputs, target_sizes=[(64, 96)], threshold=0.0)
np.savez(sys.argv[2], pixel_values=inputs["pixel_values"], **{
    name: outputs[name] for name in ("class_queries_logits", "masks_queries_logits")})
print(json.dumps([config.model_type, type(model).__module__, type(processor).__name__.removesuffix("Pil"),
    {kind: list(keys) for kind, keys in loading.items() if keys}, list(segments[0]["segmentation"].shape)]))
"""


def test_the_folder_works_where_the_package_is_not_installed(tmp_path):
    source = write_ours(tmp_path / "ours", processor={"size": {"shortest_edge": 64, "longest_edge": 96}})
    exporter.export(str(source), tmp_path / "stock")
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_PACKAGE, str(tmp_path / "stock"), str(tmp_path / "seen.npz")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    module = "transformers.models.mask2former.modeling_mask2former"
    assert json.loads(run.stdout) == ["mask2former", module, "Mask2FormerImageProcessor", {}, [64, 96]]
    ours = Mask2FormerForUniversalSegmentation.from_pretrained(source).eval()
    with np.load(tmp_path / "seen.npz") as seen, torch.no_grad():
        outputs = ours(torch.from_numpy(seen["pixel_values"]))
        for name in ("class_queries_logits", "masks_queries_logits"):
            torch.testing.assert_close(torch.from_numpy(seen[name]), outputs[name], atol=1e-5, rtol=1e-5)


def test_the_files_bear_no_trace_of_ours(tmp_path):
    source = write_ours(tmp_path / "ours", processor={"task": "instance", "label_ids_to_fuse": [1, 2]})
    settings = json.loads((source / "config.json").read_text())
    # What a checkpoint that brings its own code says.
    settings["auto_map"] = {"AutoModel": "modeling_mask2former.Mask2FormerModel"}
    (source / "config.json").write_text(json.dumps(settings))
    exporter.export(str(source), tmp_path / "stock")
    files = {path.name: path for path in (tmp_path / "stock").iterdir()}
    assert files.keys() == {"config.json", "preprocessor_config.json", "model.safetensors"}
    config = json.loads(files["config.json"].read_text())
    known = StockConfig(backbone_config=dict(BACKBONES["resnet, basic"]), **TINY).to_dict().keys()
    assert set(config) <= known | {"architectures", "dtype", "transformers_version"}
    assert (config["model_type"], config["architectures"]) == ("mask2former", ["Mask2FormerForUniversalSegmentation"])
    assert AutoConfig.from_pretrained(tmp_path / "stock").id2label == TINY["id2label"]
    processor = json.loads(files["preprocessor_config.json"].read_text())
    assert processor["image_processor_type"] == "Mask2FormerImageProcessor"
    stock_settings = get_type_hints(Mask2FormerImageProcessorPil.valid_kwargs).keys()
    assert {"size", "size_divisor"} < stock_settings
    assert set(processor) - {"image_processor_type"} <= stock_settings


def test_the_processor_keeps_its_settings(tmp_path):
    settings = {
        "size": {"shortest_edge": 512, "longest_edge": 1024},
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
        "ignore_index": 254,
        "do_reduce_labels": True,
        "size_divisor": 64,
        "do_normalize": False,
    }
    source = write_ours(tmp_path / "ours", processor=settings)
    exporter.export(str(source), tmp_path / "stock")
    stock = Mask2FormerImageProcessorPil.from_pretrained(tmp_path / "stock")
    saved = stock.to_dict()
    for name, value in settings.items():
        found = saved[name]
        assert (list(found) if isinstance(found, tuple) else found) == value, name
    assert stock.num_labels == 3


def test_losses_are_reported(tmp_path, capsys):
    settings = {"task": "panoptic", "label_ids_to_fuse": [1, 2], "threshold": 0.7, "instance_threshold": 0.4}
    source = write_ours(tmp_path / "ours", processor=settings, freeze_backbone_norm=True)
    assert exporter.main([str(source), "--output", str(tmp_path / "stock")]) == 0
    printed = capsys.readouterr().out
    for part in (
        "task (panoptic)",
        "threshold=0.7",
        "label_ids_to_fuse={1, 2}",
        "post_process_instance_segmentation(threshold=0.4)",
        "freeze_backbone_norm",
    ):
        assert part in printed
    assert "takes RGB" not in printed and "input_projections" not in printed


# Refusals


def assert_refused(source, tmp_path, capsys, *parts):
    before = sorted(path.name for path in tmp_path.iterdir())
    assert exporter.main([str(source), "--output", str(tmp_path / "stock")]) == 1
    printed = capsys.readouterr().err.partition("error: ")[2]  # behind the progress bars
    for part in parts:
        assert part in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_another_pixel_decoder_is_refused(tmp_path, capsys):
    source = write_ours(tmp_path / "ours", pixel_decoder="fpn")
    assert_refused(source, tmp_path, capsys, "`pixel_decoder`='fpn'", "deformable")


@pytest.mark.parametrize(
    ("model_type", "part"),
    [("m2f_video", "video"), ("mask2former", "already"), ("resnet", "'resnet'"), (None, "None")],
)
def test_another_model_type_is_refused(model_type, part, tmp_path, capsys):
    source = write_ours(tmp_path / "ours")
    settings = json.loads((source / "config.json").read_text()) | {"model_type": model_type}
    (source / "config.json").write_text(json.dumps(settings))
    assert_refused(source, tmp_path, capsys, part)


@pytest.mark.parametrize("missing", ["config.json", "preprocessor_config.json", "model.safetensors"])
def test_a_folder_with_a_file_missing_is_refused(missing, tmp_path, capsys):
    source = write_ours(tmp_path / "ours")
    (source / missing).unlink()
    assert_refused(source, tmp_path, capsys, missing)


@pytest.mark.parametrize(
    ("source", "part"),
    [("nope", "there is no folder nope, and the Hub cannot be reached"), ("./nope", "is named owner/name")],
)
def test_a_name_without_a_model_is_refused_at_once(source, part, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("waits to try again"))
    assert_refused(source, tmp_path, capsys, part)


def test_weights_that_do_not_fill_the_model_are_refused(tmp_path, capsys):
    source = write_ours(tmp_path / "ours", decoder_layers=3)
    settings = json.loads((source / "config.json").read_text()) | {"decoder_layers": 4}
    (source / "config.json").write_text(json.dumps(settings))
    assert_refused(source, tmp_path, capsys, "does not fill the model", "decoder.layers.2")


def test_a_folder_with_something_in_it_is_not_touched(tmp_path, capsys):
    source = write_ours(tmp_path / "ours")
    (tmp_path / "stock").mkdir()
    (tmp_path / "stock" / "mine.txt").write_text("mine")
    assert_refused(source, tmp_path, capsys, "exists already")
    assert [path.name for path in (tmp_path / "stock").iterdir()] == ["mine.txt"]


def test_stock_that_gives_something_else_is_noticed_and_nothing_is_left(tmp_path, capsys, monkeypatch):
    source = write_ours(tmp_path / "ours")
    save = StockModel.save_pretrained

    def spoil(self, *args, **kwargs):
        with torch.no_grad():
            self.class_predictor.bias = nn.Parameter(self.class_predictor.bias + 1)
        return save(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(StockModel, "save_pretrained", spoil)
        assert_refused(source, tmp_path, capsys, "class_predictor.bias")
    forward = StockModel.forward

    def shift(self, *args, **kwargs):
        outputs = forward(self, *args, **kwargs)
        outputs.masks_queries_logits = outputs.masks_queries_logits + 0.1
        return outputs

    monkeypatch.setattr(StockModel, "forward", shift)
    assert_refused(source, tmp_path, capsys, "other masks_queries_logits")
