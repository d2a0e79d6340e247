"""Parameter groups and learning rate schedules, against the original's own list and the schedules' definitions."""

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import ResNetConfig, SwinConfig

from m2f_hf import Mask2FormerConfig, Mask2FormerForUniversalSegmentation
from m2f_hf.optimization import get_parameter_groups, get_schedule


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "conversion"))

from detectron2_config import config_from_yaml, read_config
from detectron2_mapping import mapping_for


def small_config(backbone, **settings) -> Mask2FormerConfig:
    return Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
        encoder_layers=1,
        decoder_layers=2,
        num_queries=5,
        **settings,
    )


SWIN = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 2], "window_size": 4}
UNDECAYED = (
    "norm",
    "relative_position_bias_table",
    "position_embeddings",
    "queries_",
    "transformer_module.level_embed",
)
STAGES = ["stage1", "stage2", "stage3", "stage4"]


@pytest.fixture(scope="module")
def swin_model() -> Mask2FormerForUniversalSegmentation:
    backbone = SwinConfig(**SWIN, use_absolute_embeddings=True, image_size=32, patch_size=4, out_features=STAGES)
    return Mask2FormerForUniversalSegmentation(small_config(backbone))


def settings_by_name(groups: list[dict]) -> dict[str, tuple[float, float]]:
    return {name: (group["lr"], group["weight_decay"]) for group in groups for name in group["names"]}


def test_groups_are_those_of_the_original(goldens):
    """Each parameter of the original's own optimizer has the same rate and decay here, and none is missing."""
    folder = goldens / "coco_panoptic_r50"
    config = Mask2FormerConfig(**config_from_yaml(read_config(folder / "config.yaml")))
    model = Mask2FormerForUniversalSegmentation(config)
    ours = settings_by_name(get_parameter_groups(model, learning_rate=1e-4, weight_decay=0.05, backbone_multiplier=0.1))
    targets = {entry.source: entry.targets for entry in mapping_for(config)}
    expected = {
        target: (group["lr"], group["weight_decay"])
        for group in json.loads((folder / "optimizer_groups.json").read_text())
        for name in group["params"]
        for target in targets[name]
    }
    assert set(ours) == set(expected)
    for name, (rate, decay) in expected.items():
        assert ours[name] == pytest.approx((rate, decay)), name


def test_groups_of_swin(swin_model):
    groups = get_parameter_groups(swin_model, 1e-3, 0.05, 0.1)
    found = settings_by_name(groups)
    assert set(found) == {name for name, parameter in swin_model.named_parameters() if parameter.requires_grad}
    assert len(groups) == 4
    assert len({id(parameter) for group in groups for parameter in group["params"]}) == len(found)
    for name, (rate, decay) in found.items():
        assert rate == pytest.approx(1e-4 if ".pixel_level_module.encoder." in name else 1e-3), name
        # In the pixel decoder a convolution and its norm are numbers 0 and 1 of a sequence.
        is_decoder_norm = ".decoder." in name and name.split(".")[-2] == "1" and "encoder.layers" not in name
        is_norm_or_table = is_decoder_norm or any(part in name for part in UNDECAYED)
        assert decay == (0.0 if is_norm_or_table else 0.05), name
    assert found["model.pixel_level_module.decoder.level_embed"][1] == 0.05
    assert found["class_predictor.bias"][1] == 0.05


def test_frozen_parameters_are_left_out(swin_model):
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    model[0].weight.requires_grad_(False)
    assert settings_by_name(get_parameter_groups(model)) == {
        "0.bias": (1e-4, 0.05),
        "1.weight": (1e-4, 0.0),
        "1.bias": (1e-4, 0.0),
    }
    with pytest.raises(ValueError, match="unfreeze"):
        get_parameter_groups(model.requires_grad_(False))


def test_the_base_model_has_the_same_groups(swin_model):
    whole = settings_by_name(get_parameter_groups(swin_model))
    base = settings_by_name(get_parameter_groups(swin_model.model))
    assert base == {name.removeprefix("model."): value for name, value in whole.items() if name.startswith("model.")}


def rates(kind: str, total: int, **settings) -> list[list[float]]:
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": parameters[:1], "lr": 1.0}, {"params": parameters[1:], "lr": 0.1}])
    schedule = get_schedule(optimizer, kind, total, **settings)
    found = []
    for _ in range(total):
        found.append(schedule.get_last_lr())
        optimizer.step()
        schedule.step()
    return found


def test_schedules_follow_their_definitions():
    multistep = [first for first, _ in rates("multistep", 100, warmup_steps=0)]
    assert multistep == pytest.approx([1.0] * 90 + [0.1] * 5 + [0.01] * 5)
    poly = [first for first, _ in rates("poly", 100, warmup_steps=0)]
    assert poly == pytest.approx([(1 - step / 100) ** 0.9 for step in range(100)])
    cosine = [first for first, _ in rates("cosine", 100, warmup_steps=0)]
    assert cosine[0] == 1.0 and cosine[50] == pytest.approx(0.5) and cosine[99] < 1e-3
    assert all(later < earlier for earlier, later in itertools.pairwise(cosine))


def test_warm_up_rises_to_the_peak_in_every_group():
    found = rates("multistep", 40, warmup_steps=4)
    assert [first for first, _ in found[:6]] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert all(second == pytest.approx(0.1 * first) for first, second in found)


def test_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="'multistep', 'poly', 'cosine'"):
        rates("linear", 10)


def test_a_resnet_with_trained_norms_keeps_them_undecayed():
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], layer_type="basic", out_features=STAGES
    )
    found = settings_by_name(get_parameter_groups(Mask2FormerForUniversalSegmentation(small_config(backbone))))
    norms = {name for name in found if ".normalization." in name}
    assert norms and all(found[name] == pytest.approx((1e-5, 0.0)) for name in norms)
