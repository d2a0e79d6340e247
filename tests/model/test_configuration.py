"""The configuration: defaults, what it refuses and in which words, and what it reads and writes."""

import dataclasses
import json
import math

import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from listening import WarningsOfTransformers
from tiny import BACKBONES, STAGES
from transformers import Mask2FormerConfig as StockConfig
from transformers import ResNetConfig, SwinConfig

from m2f_hf import Mask2FormerConfig


OURS_ALONE = {"label_colors": None, "pixel_decoder": "msdeform", "freeze_backbone_norm": False}
TINY_SWIN = BACKBONES["swin"]


@pytest.fixture
def warnings_of_transformers():
    with WarningsOfTransformers() as messages:
        yield messages


def field_defaults(config_class):
    return {
        field.name: field.default for field in dataclasses.fields(config_class) if field.name != "transformers_version"
    }


def without_backbone(config):
    """Fields as plain data, apart from those that say which library wrote them."""
    fields = json.loads(config.to_json_string(use_diff=False))
    for name in ("backbone_config", "backbone", "model_type", "transformers_version", "architectures"):
        fields.pop(name, None)
    return fields


# Defaults


def test_shared_fields_have_the_defaults_of_transformers():
    theirs = field_defaults(StockConfig)
    assert len(theirs) > 30
    assert field_defaults(Mask2FormerConfig) == theirs | OURS_ALONE


def test_the_default_backbone_is_that_of_transformers():
    ours, theirs = Mask2FormerConfig().backbone_config, StockConfig().backbone_config
    assert type(ours) is type(theirs) is SwinConfig
    assert ours.to_dict() == theirs.to_dict()
    assert ours.depths == [2, 2, 18, 2]
    assert ours.out_features == STAGES


def test_two_configurations_do_not_share_their_backbone():
    first, second = Mask2FormerConfig(), Mask2FormerConfig()
    first.backbone_config.depths.append(1)
    assert second.backbone_config.depths == Mask2FormerConfig().backbone_config.depths == [2, 2, 18, 2]


def test_names_of_transformers_for_width_and_depth():
    config = Mask2FormerConfig(hidden_dim=64, decoder_layers=4)
    assert (config.hidden_size, config.num_hidden_layers) == (64, 4)
    config = Mask2FormerConfig(hidden_size=64, num_hidden_layers=4)
    assert (config.hidden_dim, config.decoder_layers) == (64, 4)


# Refused


IMPOSSIBLE = {
    "no hidden width": ({"hidden_dim": 0}, r"`hidden_dim`=0 must be a multiple of 4 .* use 8,"),
    "negative hidden width": ({"hidden_dim": -8}, r"`hidden_dim`=-8 must be a multiple .* use 8,"),
    "no room for sine and cosine": (
        {"hidden_dim": 6, "num_attention_heads": 3},
        r"`hidden_dim`=6 .* use 12,",
    ),
    "width that heads do not divide": (
        {"hidden_dim": 100},
        r"`hidden_dim`=100 must be a multiple of 4 .* and of `num_attention_heads`=8; use 96,",
    ),
    "width that groups do not divide": (
        {"feature_size": 100},
        r"`feature_size`=100 must be a multiple of 32 .* use 96,",
    ),
    "heads that divide one width only": (
        {"hidden_dim": 20, "feature_size": 96, "num_attention_heads": 5},
        r"`feature_size`=96 .* of `num_attention_heads`=5; use 160,",
    ),
    "no heads": ({"num_attention_heads": 0}, "`num_attention_heads`=0 must be at least 1"),
    "negative heads": ({"num_attention_heads": -8}, "`num_attention_heads`=-8 must be at least 1"),
    "no mask features": ({"mask_feature_size": 0}, "`mask_feature_size`=0 must be at least 1"),
    "no feed-forward width": ({"dim_feedforward": 0}, "`dim_feedforward`=0 must be at least 1"),
    "no encoder feed-forward width": ({"encoder_feedforward_dim": 0}, "`encoder_feedforward_dim`=0 must be at least"),
    "no predictions": ({"decoder_layers": 0}, "`decoder_layers`=0 must be at least 1"),
    "no queries": ({"num_queries": 0}, "`num_queries`=0 must be at least 1"),
    "no classes": ({"num_labels": 0}, "`num_labels`=0 must be at least 1"),
    "no points": ({"train_num_points": 0}, "`train_num_points`=0 must be at least 1"),
    "deformable decoder without layers": ({"encoder_layers": 0}, "`encoder_layers`=0 .* set `pixel_decoder='fpn'`"),
    "unknown pixel decoder": (
        {"pixel_decoder": "bifpn"},
        r"`pixel_decoder`='bifpn' is not known; use one of \['msdeform', 'fpn'\]",
    ),
    "unknown activation": ({"activation_function": "rleu"}, "`activation_function`='rleu' is not known; use 'relu'"),
    "certain dropout": ({"dropout": 1.0}, r"`dropout`=1.0 must lie in \[0, 1\)"),
    "negative dropout": ({"dropout": -0.1}, r"`dropout`=-0.1 must lie in"),
    "dropout that is no number": ({"dropout": math.nan}, "`dropout`=nan must lie in"),
    "more uncertain points than points": (
        {"importance_sample_ratio": 1.5},
        r"`importance_sample_ratio`=1.5 must lie in \[0, 1\]",
    ),
    "fewer candidates than points": ({"oversample_ratio": 0.5}, "`oversample_ratio`=0.5 must be .* at least 1"),
    "endless candidates": ({"oversample_ratio": math.inf}, "`oversample_ratio`=inf must be a finite"),
    "candidates that are no number": ({"oversample_ratio": math.nan}, "`oversample_ratio`=nan must be a finite"),
    "reward for wrong classes": ({"class_weight": -2.0}, "`class_weight`=-2.0 must be a finite number, 0 or above"),
    "mask weight that is no number": ({"mask_weight": math.nan}, "`mask_weight`=nan must be"),
    "endless dice weight": ({"dice_weight": math.inf}, "`dice_weight`=inf must be"),
    "reward for wrong no object": ({"no_object_weight": -0.1}, "`no_object_weight`=-0.1 must be"),
    "negative scale": ({"init_xavier_std": -1.0}, "`init_xavier_std`=-1.0 must be"),
    "nothing to learn": (
        {"class_weight": 0.0, "mask_weight": 0.0, "dice_weight": 0},
        "`class_weight`, `mask_weight` and `dice_weight` are all 0",
    ),
    "another mask stride": ({"common_stride": 8}, r"`common_stride`=8 and .* only 4 and \[4, 8, 16, 32\] exist"),
    "other feature strides": ({"feature_strides": [8, 16, 32, 64]}, r"`feature_strides`=\[8, 16, 32, 64\]: only 4"),
    "backbone with one map": (
        {"backbone_config": ResNetConfig()},
        r"`backbone_config` gives 1 feature map\(s\).* Set its `out_features`, for example to \['stage1'",
    ),
    "backbone with three maps": (
        {"backbone_config": TINY_SWIN | {"out_features": STAGES[1:]}},
        r"`backbone_config` gives 3 feature map\(s\)",
    ),
    "not a backbone": (
        {"backbone_config": {"model_type": "bert"}},
        "`backbone_config` is a BertConfig, which is no backbone's; use that of 'swin' or 'resnet'",
    ),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_an_impossible_combination_is_refused_with_the_field_and_the_fix(name):
    arguments, message = IMPOSSIBLE[name]
    with pytest.raises(StrictDataclassClassValidationError, match=f"(?s){message}"):
        Mask2FormerConfig(**arguments)


def test_the_proposed_widths_are_possible():
    Mask2FormerConfig(hidden_dim=12, feature_size=96, num_attention_heads=3)
    Mask2FormerConfig(hidden_dim=20, feature_size=160, num_attention_heads=5)
    Mask2FormerConfig(hidden_dim=96, feature_size=96)


@pytest.mark.parametrize("backbone", [{"model_type": "swinn"}, {"depths": [2, 2]}], ids=["unknown", "without"])
def test_a_backbone_of_no_known_type_is_refused(backbone):
    with pytest.raises(ValueError, match=r"`backbone_config` has the `model_type` .* use that of a backbone"):
        Mask2FormerConfig(backbone_config=backbone)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_dim", 256.0),
        ("hidden_dim", "256"),
        ("num_queries", True),
        ("pre_norm", "yes"),
        ("pre_norm", None),
        ("dropout", "0.1"),
        ("class_weight", None),
        ("pixel_decoder", None),
        ("feature_strides", 4),
        ("feature_strides", [4.0, 8.0, 16.0, 32.0]),
        ("backbone_config", "swin"),
        ("activation_function", 1),
    ],
)
def test_a_value_of_another_type_is_refused(name, value):
    with pytest.raises(StrictDataclassFieldValidationError, match=f"'{name}'"):
        Mask2FormerConfig(**{name: value})


@pytest.mark.parametrize(
    "arguments",
    [
        {"encoder_layers": 0, "pixel_decoder": "fpn"},
        {"decoder_layers": 1},
        {"no_object_weight": 0, "class_weight": 0},
        {"importance_sample_ratio": 0, "oversample_ratio": 1},
        {"importance_sample_ratio": 1.0},
        {"num_labels": 1},
        {"dropout": 0},
    ],
    ids=str,
)
def test_the_edge_of_the_possible_is_accepted(arguments):
    config = Mask2FormerConfig(**arguments)
    assert {name: getattr(config, name) for name in arguments} == arguments


# Read and written


@pytest.mark.parametrize("backbone", [None, TINY_SWIN, ResNetConfig(layer_type="basic", out_features=STAGES)])
def test_a_saved_configuration_reads_back_equal(backbone, tmp_path, warnings_of_transformers):
    config = Mask2FormerConfig(
        backbone_config=backbone,
        hidden_dim=64,
        pixel_decoder="fpn",
        freeze_backbone_norm=True,
        output_auxiliary_logits=True,
        id2label={0: "sky", 1: "cat", 2: "dog"},
    )
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "m2f"
    loaded = Mask2FormerConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert type(loaded.backbone_config) is type(config.backbone_config)
    assert loaded.backbone_config.out_features == STAGES
    assert loaded.id2label == {0: "sky", 1: "cat", 2: "dog"}
    assert loaded.num_labels == 3
    assert warnings_of_transformers == []


def test_a_backbone_dict_stays_as_it_was(tmp_path):
    given = dict(TINY_SWIN)
    config = Mask2FormerConfig(backbone_config=given)
    assert given == TINY_SWIN
    assert isinstance(config.backbone_config, SwinConfig)
    assert {name: getattr(config.backbone_config, name) for name in TINY_SWIN} == TINY_SWIN


def stock_config():
    return StockConfig(
        backbone_config=dict(TINY_SWIN),
        hidden_dim=64,
        decoder_layers=4,
        num_queries=7,
        class_weight=4.0,
        output_auxiliary_logits=True,
        id2label={0: "sky", 1: "cat", 2: "dog"},
        label2id={"sky": 0, "cat": 1, "dog": 2},
    )


OLD_FIELDS = {
    "as written today": {},
    "null fields": {"backbone": None, "use_timm_backbone": None, "backbone_kwargs": None},
    "as on the Hub": {
        "backbone": None,
        "use_timm_backbone": False,
        "use_pretrained_backbone": False,
        "backbone_kwargs": None,
        "architectures": ["Mask2FormerForUniversalSegmentation"],
        "torch_dtype": "float32",
        "transformers_version": "4.25.0",
        "num_hidden_layers": 4,
    },
}


@pytest.mark.parametrize("old", OLD_FIELDS)
@pytest.mark.parametrize("source", ["folder", "dict", "keyword arguments"])
def test_a_stock_configuration_is_read_without_a_word(source, old, tmp_path, warnings_of_transformers):
    stock = stock_config()
    fields = json.loads(stock.to_json_string(use_diff=False)) | OLD_FIELDS[old]
    fields["id2label"] = dict(fields["id2label"])
    warnings_of_transformers.clear()  # those of writing it
    if source == "folder":
        (tmp_path / "config.json").write_text(json.dumps(fields))
        config = Mask2FormerConfig.from_pretrained(tmp_path)
    elif source == "dict":
        config = Mask2FormerConfig.from_dict(fields)
    else:
        config = Mask2FormerConfig(**fields)
    assert warnings_of_transformers == []
    assert config.model_type == config.to_dict()["model_type"] == "m2f"
    assert config.backbone_config.to_dict() == stock.backbone_config.to_dict()
    ours, theirs = without_backbone(config), without_backbone(stock)
    assert {name: ours[name] for name in theirs if name not in ("dtype", "torch_dtype")} == {
        name: value for name, value in theirs.items() if name not in ("dtype", "torch_dtype")
    }
    assert {name: ours[name] for name in OURS_ALONE} == OURS_ALONE
    config.save_pretrained(tmp_path / "again")
    assert Mask2FormerConfig.from_pretrained(tmp_path / "again").to_dict() == config.to_dict()


def test_a_stock_folder_is_not_touched_by_reading_it(tmp_path):
    stock_config().save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    Mask2FormerConfig.from_pretrained(tmp_path, num_queries=3)
    assert (tmp_path / "config.json").read_bytes() == before
    assert json.loads(before)["model_type"] == "mask2former"


def test_arguments_win_over_the_folder(tmp_path):
    stock_config().save_pretrained(tmp_path)
    config, unused = Mask2FormerConfig.from_pretrained(tmp_path, num_queries=9, return_unused_kwargs=True, other=1)
    assert config.num_queries == 9
    assert unused == {"other": 1}


def test_another_type_of_folder_is_still_warned_about(tmp_path, warnings_of_transformers):
    fields = json.loads(stock_config().to_json_string(use_diff=False)) | {"model_type": "maskformer"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    warnings_of_transformers.clear()
    Mask2FormerConfig.from_pretrained(tmp_path)
    assert any("maskformer" in message for message in warnings_of_transformers)


def test_a_bad_file_is_refused_when_it_is_read(tmp_path):
    fields = json.loads(stock_config().to_json_string(use_diff=False)) | {"hidden_dim": 30}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(StrictDataclassClassValidationError, match="`hidden_dim`=30 must be a multiple"):
        Mask2FormerConfig.from_pretrained(tmp_path)


# Colours of the labels


COLORS = [[0, 0, 0], [255, 128, 0], [1, 2, 3]]


def test_colours_are_kept_with_the_labels(tmp_path, warnings_of_transformers):
    config = Mask2FormerConfig(backbone_config=dict(TINY_SWIN), num_labels=3, label_colors=COLORS)
    config.save_pretrained(tmp_path)
    assert Mask2FormerConfig.from_pretrained(tmp_path).label_colors == COLORS
    assert Mask2FormerConfig.from_pretrained(tmp_path, num_labels=3).label_colors == COLORS
    assert warnings_of_transformers == []


@pytest.mark.parametrize(
    ("colors", "message"),
    [
        (COLORS[:2], "`label_colors` has 2 colours for 3 labels"),
        ([], "`label_colors` has 0 colours for 3 labels"),
        ([*COLORS[:2], [0, 0]], r"`label_colors`\[2\]=\[0, 0\] must be red, green and blue from 0 to 255"),
        ([*COLORS[:2], [0, 0, 256]], "must be red, green and blue"),
        ([*COLORS[:2], [-1, 0, 0]], "must be red, green and blue"),
    ],
)
def test_colours_that_do_not_fit_are_refused(colors, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        Mask2FormerConfig(num_labels=3, label_colors=colors)


NEW_LABELS = {0: "cell", 1: "glass"}


@pytest.mark.parametrize(
    ("arguments", "labels"),
    [
        ({"num_labels": 2}, {0: "LABEL_0", 1: "LABEL_1"}),
        ({"id2label": NEW_LABELS}, NEW_LABELS),
        ({"id2label": {"0": "cell", "1": "glass"}}, NEW_LABELS),
        ({"id2label": NEW_LABELS, "num_labels": 2}, NEW_LABELS),
        ({"id2label": NEW_LABELS, "label2id": {"cell": 0, "glass": 1}}, NEW_LABELS),
    ],
)
@pytest.mark.parametrize("folder_is_stock", [False, True])
def test_new_labels_leave_nothing_of_the_old_ones(
    arguments, labels, folder_is_stock, tmp_path, warnings_of_transformers
):
    if folder_is_stock:
        stock_config().save_pretrained(tmp_path)
    else:
        Mask2FormerConfig(
            backbone_config=dict(TINY_SWIN), id2label={0: "a", 1: "b", 2: "c"}, label_colors=COLORS
        ).save_pretrained(tmp_path)
    warnings_of_transformers.clear()
    config = Mask2FormerConfig.from_pretrained(tmp_path, **arguments)
    assert (config.num_labels, config.id2label, config.label_colors) == (2, labels, None)
    assert config.label2id == {label: index for index, label in labels.items()}
    config.save_pretrained(tmp_path / "again")
    assert Mask2FormerConfig.from_pretrained(tmp_path / "again").id2label == labels
    assert warnings_of_transformers == []


def test_new_labels_of_the_same_number_have_no_colours_yet(tmp_path):
    Mask2FormerConfig(backbone_config=dict(TINY_SWIN), num_labels=3, label_colors=COLORS).save_pretrained(tmp_path)
    config = Mask2FormerConfig.from_pretrained(tmp_path, id2label={0: "x", 1: "y", 2: "z"})
    assert (config.label_colors, config.label2id) == (None, {"x": 0, "y": 1, "z": 2})
    config = Mask2FormerConfig.from_pretrained(tmp_path, id2label={0: "x", 1: "y", 2: "z"}, label_colors=COLORS)
    assert config.label_colors == COLORS


def test_labels_set_afterwards_drop_the_colours(tmp_path):
    for change in ({"num_labels": 2}, {"id2label": NEW_LABELS}):
        config = Mask2FormerConfig(backbone_config=dict(TINY_SWIN), num_labels=3, label_colors=COLORS)
        for name, value in change.items():
            setattr(config, name, value)
        assert (config.num_labels, config.label_colors) == (2, None)
        config.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    "id2label", [{1: "a", 2: "b"}, {0: "a", 5: "b"}, {-1: "a"}], ids=["from one", "gap", "negative"]
)
def test_ids_of_labels_count_from_zero_without_a_gap(id2label):
    with pytest.raises(StrictDataclassClassValidationError, match="count from 0 without a gap"):
        Mask2FormerConfig(id2label=id2label)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_queries": 0}, "`num_queries`=0 must be at least 1"),
        ({"num_labels": 0}, "`num_labels`=0 must be at least 1"),
        ({"id2label": {0: "a", 2: "b"}}, "count from 0 without a gap"),
        ({"id2label": {}}, "`num_labels`=0 must be at least 1"),
        ({"id2label": ["a", "b"]}, "pass a dict of ids and names"),
        ({"id2label": {0: "a"}, "num_labels": 4}, "`num_labels`=4, but `id2label` has 1 labels"),
        ({"hidden_dim": 30}, "`hidden_dim`=30 must be a multiple"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_is_given_at_loading_is_checked_as_well(given, message, tmp_path):
    Mask2FormerConfig(num_labels=3).save_pretrained(tmp_path)
    with pytest.raises((ValueError, StrictDataclassClassValidationError), match=message):
        Mask2FormerConfig.from_pretrained(tmp_path, **given)
