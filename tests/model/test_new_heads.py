"""Starting from a checkpoint with other classes or queries, and from a backbone alone."""

import json
import time

import pytest
import torch
import transformers
from listening import WarningsOfTransformers
from safetensors.torch import load_file, save_file
from tiny import BACKBONES, FIELDS, STAGES, shake
from transformers import (
    MODEL_FOR_BACKBONE_MAPPING,
    AutoModelForImageClassification,
    AutoModelForUniversalSegmentation,
)

from m2f_hf import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, Mask2FormerModel
from m2f_hf.model.modeling import Mask2FormerPreTrainedModel


TINY = {name: value for name, value in FIELDS.items() if name not in ("num_labels", "num_queries")}
NAMES = {0: "cat", 1: "dog", 2: "sky"}
CLASS_HEAD = {"class_predictor.weight", "class_predictor.bias", "criterion.empty_weight"}
QUERIES = {f"model.transformer_module.{name}.weight" for name in ("queries_features", "queries_embedder")}


@pytest.fixture(scope="module", params=["ours", "stock", "stock, sharded", "stock, as .bin"])
def folder(request, tmp_path_factory):
    """A checkpoint with 3 classes and 6 queries."""
    folder = tmp_path_factory.mktemp("checkpoint")
    fields = {
        "backbone_config": dict(BACKBONES["resnet"]),
        "num_queries": 6,
        "id2label": NAMES,
        "no_object_weight": 0.2,
        **TINY,
    }
    torch.manual_seed(0)
    if request.param == "ours":
        model = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(label_colors=[[9, 9, 9]] * 3, **fields))
    else:
        model = transformers.Mask2FormerForUniversalSegmentation(transformers.Mask2FormerConfig(**fields))
    shake(model).save_pretrained(folder, **({"max_shard_size": "50KB"} if "sharded" in request.param else {}))
    if "sharded" in request.param:
        assert len(list(folder.glob("*.safetensors"))) > 2
    if ".bin" in request.param:
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture(scope="module")
def original(folder):
    return Mask2FormerForUniversalSegmentation.from_pretrained(folder)


def load(folder, **fields):
    """The model, the names of what was replaced, and what was said."""
    torch.manual_seed(1)
    with WarningsOfTransformers() as messages:
        model, info = Mask2FormerForUniversalSegmentation.from_pretrained(folder, output_loading_info=True, **fields)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info.get("error_msgs")
    return model, {entry[0] for entry in info["mismatched_keys"]}, messages


def assert_kept_but(model, original, replaced):
    """Every tensor but the replaced ones is the checkpoint's, to the bit; the replaced ones are not it."""
    theirs = original.state_dict()
    assert replaced < theirs.keys()
    for name, tensor in model.state_dict().items():
        assert tensor.isfinite().all(), name
        if name not in replaced:
            assert torch.equal(tensor, theirs[name]), name


def targets(num_labels):
    generator = torch.Generator().manual_seed(0)
    return {
        "mask_labels": [torch.rand(2, 64, 64, generator=generator) > 0.5],
        "class_labels": [torch.tensor([0, num_labels - 1])],
    }


# New heads


@pytest.mark.parametrize(
    "fields", [{"num_labels": 5}, {"id2label": {i: f"thing {i}" for i in range(5)}}, {"num_labels": 1}], ids=str
)
def test_another_number_of_classes_replaces_the_class_head_alone(folder, original, fields):
    model, replaced, messages = load(folder, **fields)
    assert replaced == CLASS_HEAD
    assert_kept_but(model, original, CLASS_HEAD)
    assert len(messages) == 1 and all(name in messages[0] for name in CLASS_HEAD)
    count = model.config.num_labels
    assert count == fields.get("num_labels", 5) == len(model.config.id2label)
    assert model.config.label2id == {name: index for index, name in model.config.id2label.items()}
    assert model.config.id2label == fields.get("id2label", {i: f"LABEL_{i}" for i in range(count)})
    assert model.config.label_colors is None
    assert model.criterion.empty_weight.tolist() == pytest.approx([1] * count + [0.2])
    # The first weights of a linear layer of this model (PyTorch's): uniform up to 1 / sqrt(inputs).
    weight, bias = model.class_predictor.weight, model.class_predictor.bias
    assert weight.shape == (count + 1, 32) and bias.shape == (count + 1,)
    assert 0.8 * 32**-0.5 < weight.abs().max() <= 32**-0.5 and 0 < bias.abs().max() <= 32**-0.5
    outputs = model.train()(torch.randn(1, 3, 64, 64), **targets(count))
    assert outputs.class_queries_logits.shape == (1, 6, count + 1)
    assert outputs.loss.isfinite()


def test_a_replaced_head_starts_as_a_new_model_s(folder):
    loaded = load(folder, num_labels=400)[0].class_predictor
    config = Mask2FormerConfig(backbone_config=dict(BACKBONES["resnet"]), num_labels=400, **TINY)
    new = Mask2FormerForUniversalSegmentation(config).class_predictor
    for mine, reference in ((loaded.weight, new.weight), (loaded.bias, new.bias)):
        assert mine.std().item() == pytest.approx(reference.std().item(), rel=0.1)
        assert mine.abs().max().item() == pytest.approx(reference.abs().max().item(), rel=0.05)


def test_other_names_for_as_many_classes_replace_nothing(folder, original):
    names = {0: "tabby", 1: "poodle", 2: "cloud"}
    model, replaced, messages = load(folder, id2label=names)
    assert replaced == set() and messages == []
    assert_kept_but(model, original, set())
    assert model.config.id2label == names
    assert model.config.label2id == {"tabby": 0, "poodle": 1, "cloud": 2}


@pytest.mark.parametrize("num_queries", [4, 300])
def test_another_number_of_queries_replaces_the_queries_alone(folder, original, num_queries):
    model, replaced, messages = load(folder, num_queries=num_queries)
    assert replaced == QUERIES
    assert_kept_but(model, original, QUERIES)
    assert len(messages) == 1 and all(name.split(".")[-2] in messages[0] for name in QUERIES)
    assert model.config.num_queries == num_queries and model.config.id2label == NAMES
    for name in ("queries_features", "queries_embedder"):
        weight = getattr(model.model.transformer_module, name).weight
        assert weight.shape == (num_queries, 32)
        assert weight.std().item() == pytest.approx(1, abs=0.15)
    with torch.no_grad():
        assert model(torch.randn(1, 3, 64, 64)).masks_queries_logits.shape == (1, num_queries, 16, 16)


def test_classes_and_queries_together(folder, original):
    model, replaced, _ = load(folder, num_queries=9, num_labels=2)
    assert replaced == CLASS_HEAD | QUERIES
    assert_kept_but(model, original, CLASS_HEAD | QUERIES)


def test_the_checkpoint_s_own_numbers_replace_nothing(folder, original):
    model, replaced, messages = load(folder, num_queries=6, num_labels=3)
    assert replaced == set() and messages == []
    assert_kept_but(model, original, set())
    assert model.config.id2label == NAMES


def test_another_weight_of_no_object_reaches_the_loss(folder, original):
    model, replaced, messages = load(folder, no_object_weight=0.5)
    assert replaced == set() and messages == []
    assert model.criterion.empty_weight.tolist() == pytest.approx([1, 1, 1, 0.5])
    assert_kept_but(model, original, {"criterion.empty_weight"})
    config = Mask2FormerConfig.from_pretrained(folder, no_object_weight=0.25)
    assert load(folder, config=config)[0].criterion.empty_weight.tolist() == [1, 1, 1, 0.25]
    assert load(folder, no_object_weight=0.5, num_labels=1)[0].criterion.empty_weight.tolist() == [1, 0.5]


def test_without_loading_info_just_the_model(folder):
    assert isinstance(
        Mask2FormerForUniversalSegmentation.from_pretrained(folder, num_labels=5), Mask2FormerForUniversalSegmentation
    )


def test_a_configuration_of_one_s_own_does_the_same(folder, original):
    config = Mask2FormerConfig.from_pretrained(folder, num_labels=7)
    model, replaced, _ = load(folder, config=config)
    assert replaced == CLASS_HEAD
    assert_kept_but(model, original, CLASS_HEAD)


def test_through_the_auto_class(tmp_path):
    config = Mask2FormerConfig(backbone_config=dict(BACKBONES["resnet"]), num_queries=6, id2label=NAMES, **TINY)
    saved = shake(Mask2FormerForUniversalSegmentation(config))
    saved.save_pretrained(tmp_path)
    model = AutoModelForUniversalSegmentation.from_pretrained(tmp_path, num_labels=7)
    assert isinstance(model, Mask2FormerForUniversalSegmentation) and model.config.num_labels == 7
    assert_kept_but(model, saved, CLASS_HEAD)


def test_the_base_model_replaces_its_queries(folder, original):
    model, info = Mask2FormerModel.from_pretrained(folder, num_queries=4, num_labels=8, output_loading_info=True)
    assert {entry[0] for entry in info["mismatched_keys"]} == {name.removeprefix("model.") for name in QUERIES}
    assert_kept_but(model, original.model, {name.removeprefix("model.") for name in QUERIES})


def test_what_is_saved_afterwards_is_whole(folder, tmp_path):
    model, *_ = load(folder, num_labels=5, num_queries=4)
    model.save_pretrained(tmp_path)
    again, replaced, messages = load(tmp_path)
    assert replaced == set() and messages == []
    assert_kept_but(again, model, set())


def test_any_other_mismatch_still_raises(folder):
    with pytest.raises(RuntimeError, match=r"(?i)mismatch"):
        Mask2FormerForUniversalSegmentation.from_pretrained(folder, mask_feature_size=24)
    with pytest.raises(RuntimeError, match=r"other shapes .*mask_projection.*ignore_mismatched_sizes=True"):
        Mask2FormerForUniversalSegmentation.from_pretrained(folder, mask_feature_size=24, num_labels=5)
    model, info = Mask2FormerForUniversalSegmentation.from_pretrained(
        folder, mask_feature_size=24, num_labels=5, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert {entry[0] for entry in info["mismatched_keys"]} > CLASS_HEAD
    assert model.config.mask_feature_size == 24


def test_a_damaged_checkpoint_is_not_taken_for_a_new_head(tmp_path):
    config = Mask2FormerConfig(backbone_config=dict(BACKBONES["resnet"]), num_queries=6, id2label=NAMES, **TINY)
    Mask2FormerForUniversalSegmentation(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["class_predictor.bias"] = torch.zeros(9)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match=r"(?i)mismatch"):
        Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"class_predictor\.bias"):
        Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path, num_queries=4)


# From a backbone

SWIN = {"embed_dim": 8, "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2], "window_size": 3}
CONVOLUTIONAL = {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 2, 1]}
CLASSIFIERS = {
    "swin": transformers.SwinConfig(**SWIN),
    "swinv2": transformers.Swinv2Config(**SWIN),
    "resnet": transformers.ResNetConfig(embedding_size=8, layer_type="bottleneck", **CONVOLUTIONAL),
    "convnext": transformers.ConvNextConfig(**CONVOLUTIONAL),
    "convnextv2": transformers.ConvNextV2Config(**CONVOLUTIONAL),
    "pvt_v2": transformers.PvtV2Config(
        hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 2, 2]
    ),
}


def save_classifier(config, folder):
    torch.manual_seed(0)
    config.num_labels = 10
    model = shake(AutoModelForImageClassification.from_config(config))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_a_classifier_s_body_is_the_backbone(kind, tmp_path):
    classifier = save_classifier(CLASSIFIERS[kind], tmp_path)
    model = Mask2FormerForUniversalSegmentation.from_backbone(tmp_path, id2label=NAMES, num_queries=6, **TINY)
    assert model.config.id2label == NAMES and model.config.num_queries == 6
    assert not model.training and model.dtype == torch.float32
    encoder = model.model.pixel_level_module.encoder
    # The oracle: the backbone that transformers itself loads from the same folder.
    backbone_class = MODEL_FOR_BACKBONE_MAPPING[type(CLASSIFIERS[kind])]
    reference = backbone_class.from_pretrained(tmp_path, out_features=STAGES).eval()
    pixel_values = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        maps = model(pixel_values, output_hidden_states=True).encoder_hidden_states
        expected = reference(pixel_values).feature_maps
    assert len(maps) == 4
    for mine, theirs in zip(maps, expected, strict=True):
        assert mine.std() > 0.01
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    for name, tensor in reference.state_dict().items():
        assert torch.equal(encoder.state_dict()[name], tensor), name
    # And no parameter of the body is left out: all but the norms of the outputs are the classifier's.
    saved = {tensor.double().sum().item() for tensor in classifier.state_dict().values() if tensor.numel() > 1}
    for name, parameter in encoder.named_parameters():
        if not name.startswith("hidden_states_norms.") and parameter.numel() > 1:
            assert parameter.double().sum().item() in saved, name


@pytest.mark.parametrize(("name", "stages"), [("resnet18", [1, 2, 3, 4]), ("convnext_atto", [0, 1, 2, 3])])
def test_timm_s_backbones_give_what_they_give_in_transformers(name, stages, tmp_path):
    pytest.importorskip("timm", reason="timm is not installed")
    backbone = transformers.TimmBackboneConfig(
        backbone=name, out_indices=stages, features_only=True, use_pretrained_backbone=False
    )
    model = shake(Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=backbone, **TINY))).eval()
    model.save_pretrained(tmp_path)
    pixel_values = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = model(pixel_values)
        for cls in (Mask2FormerForUniversalSegmentation, transformers.Mask2FormerForUniversalSegmentation):
            outputs = cls.from_pretrained(tmp_path).eval()(pixel_values)
            torch.testing.assert_close(outputs.class_queries_logits, expected.class_queries_logits, atol=1e-4, rtol=0)
    labels = {"mask_labels": [torch.ones(1, 64, 96)], "class_labels": [torch.tensor([0])]}
    model.train()(pixel_values.repeat(2, 1, 1, 1), **{key: value * 2 for key, value in labels.items()}).loss.backward()
    encoder = model.model.pixel_level_module.encoder
    assert all(parameter.grad is not None for parameter in encoder.parameters())


def test_it_trains_saves_and_loads(tmp_path):
    save_classifier(CLASSIFIERS["swin"], tmp_path / "classifier")
    model = Mask2FormerForUniversalSegmentation.from_backbone(
        tmp_path / "classifier", id2label=NAMES, backbone_kwargs={"drop_path_rate": 0.25}, num_queries=6, **TINY
    )
    assert model.config.backbone_config.drop_path_rate == 0.25
    loss = model.train()(torch.randn(1, 3, 64, 64), **targets(3)).loss
    loss.backward()
    assert all(p.grad is not None for p in model.model.pixel_level_module.encoder.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path / "saved")
    again, replaced, messages = load(tmp_path / "saved")
    assert replaced == set() and messages == []
    assert_kept_but(again, model, set())
    # The classifier's own labels stay behind.
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert len(saved["backbone_config"].get("id2label", {})) <= 2


def test_the_base_model_from_a_backbone(tmp_path):
    save_classifier(CLASSIFIERS["resnet"], tmp_path)
    model = Mask2FormerModel.from_backbone(tmp_path, **TINY)
    assert type(model) is Mask2FormerModel
    reference = MODEL_FOR_BACKBONE_MAPPING[transformers.ResNetConfig].from_pretrained(tmp_path, out_features=STAGES)
    for name, tensor in reference.state_dict().items():
        assert torch.equal(model.pixel_level_module.encoder.state_dict()[name], tensor), name


def test_half_precision_checkpoints_become_float32(tmp_path):
    save_classifier(CLASSIFIERS["resnet"], tmp_path / "full")
    AutoModelForImageClassification.from_pretrained(tmp_path / "full").half().save_pretrained(tmp_path / "half")
    model = Mask2FormerForUniversalSegmentation.from_backbone(tmp_path / "half", num_labels=3, **TINY)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            transformers.ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16),
            r"'vit': a plain transformer, whose every layer has the stride 16\. Four maps .*Swin",
        ),
        (
            transformers.Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2),
            r"'dinov2' gives maps at the stride 14 alone, but four .*Swin",
        ),
        (
            transformers.HieraConfig(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2]),
            r"'hiera' cannot run on an image of 224x320.*Swin",
        ),
        (
            transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 8], depths=[1, 1, 1]),
            r"'resnet' gives maps at the strides \[4, 8, 16\], but four .*Swin",
        ),
        (transformers.BertConfig(), r"'bert': transformers has no backbone of this type"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_a_model_without_four_scales_is_refused_with_the_reason(config, message, tmp_path):
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        Mask2FormerForUniversalSegmentation.from_backbone(tmp_path, num_labels=3, **TINY)


def test_weights_that_leave_a_parameter_out_are_refused(tmp_path):
    save_classifier(CLASSIFIERS["resnet"], tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    gone = next(name for name in tensors if "stages.2" in name and name.endswith("convolution.weight"))
    del tensors[gone]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no weights for 1 parameters of its backbone: \['.*stages\.2"):
        Mask2FormerForUniversalSegmentation.from_backbone(tmp_path, num_labels=3, **TINY)


def test_a_misspelt_field_and_a_missing_checkpoint_are_refused(tmp_path, monkeypatch):
    save_classifier(CLASSIFIERS["resnet"], tmp_path)
    with pytest.raises(TypeError, match="`num_querys` is no field of Mask2FormerConfig"):
        Mask2FormerForUniversalSegmentation.from_backbone(tmp_path, num_querys=3)
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("waits to try again"))
    for name, message in (
        ("no/thing", "there is no folder no/thing, and the Hub cannot be reached"),
        (tmp_path / "nothing", "there is no folder .*nothing, and a model on the Hub is named owner/name"),
    ):
        with pytest.raises(OSError, match=message):
            Mask2FormerForUniversalSegmentation.from_backbone(name, num_labels=3)


def test_arguments_of_the_download_arrive(tmp_path, monkeypatch):
    save_classifier(CLASSIFIERS["resnet"], tmp_path / "deep" / "er")
    model = Mask2FormerForUniversalSegmentation.from_backbone(
        tmp_path / "deep", subfolder="er", local_files_only=True, num_labels=3, **TINY
    )
    assert isinstance(model, Mask2FormerPreTrainedModel)
