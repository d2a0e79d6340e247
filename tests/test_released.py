"""The released checkpoints: the table is the authors', every key finds its place, downloads arrive whole or not."""

import json
import sys
from pathlib import Path

import pytest
import yaml


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "conversion"))

from detectron2_config import DEFAULTS, UnsupportedOptionError, read_config
from released import BACKBONES, RELEASED, find_released, listing


def flat(spec: dict, prefix: str = "") -> dict:
    """Options by dotted name, in upper case."""
    options = {}
    for name, value in spec.items():
        if isinstance(value, dict):
            options |= flat(value, f"{prefix}{name.upper()}.")
        else:
            options[f"{prefix}{name.upper()}"] = value
    return options


def recorded_options(spec: dict) -> dict:
    """What the record of a released checkpoint says, by the original's option names."""
    sections = {
        "MODEL.MASK_FORMER.": spec["mask_former"],
        "MODEL.RESNETS.": spec.get("resnets", {}),
        "MODEL.SWIN.": spec.get("swin", {}),
        "INPUT.": spec["input"],
        "MODEL.SEM_SEG_HEAD.": {
            "num_classes": spec["num_classes"],
            "pixel_decoder_name": spec["pixel_decoder"],
            "in_features": spec["in_features"],
            "mask_dim": spec["mask_dim"],
            "convs_dim": spec["convs_dim"],
            "norm": spec["norm"],
            "ignore_value": spec["ignore_value"],
            "transformer_enc_layers": spec["transformer_enc_layers"],
        },
        "MODEL.": {
            "meta_architecture": spec["meta_arch"],
            "backbone.name": spec["backbone"],
            "pixel_mean": spec["pixel_mean"],
            "pixel_std": spec["pixel_std"],
        },
        "": {
            "datasets.train": spec["datasets_train"],
            "datasets.test": spec["datasets_test"],
            "test.detections_per_image": spec["detections_per_image"],
        },
    }
    options = {name: value for prefix, section in sections.items() for name, value in flat(section, prefix).items()}
    return {name: value for name, value in options.items() if name in DEFAULTS}


def nested(options: dict) -> dict:
    config: dict = {}
    for name, value in options.items():
        *sections, option = name.split(".")
        node = config
        for section in sections:
            node = node.setdefault(section, {})
        node[option] = list(value) if isinstance(value, tuple) else value
    return config


@pytest.fixture(scope="module")
def zoo(shared) -> dict[str, dict]:
    """The record of each released checkpoint, by the digest in its file's name."""
    records = json.loads((shared / "data" / "zoo" / "zoo.json").read_text())
    return {record["url"].removesuffix(".pkl")[-6:]: record for record in records}


# --- the table ---


def test_there_are_59_and_no_two_share_a_name_an_address_or_an_id():
    rows = RELEASED.values()
    assert len(RELEASED) == 59
    for of in ("name", "url", "digest", "model_id", "config_path"):
        assert len({getattr(row, of) for row in rows}) == 59, of
    assert sum(row.is_video for row in rows) == 12


def test_every_row_is_the_authors(zoo):
    assert len(zoo) == 59
    for row in RELEASED.values():
        record = zoo[row.digest]
        reported = dict(record["reported"])
        schedule = reported.pop("epochs", None) or reported.pop("iterations")
        assert {metric: str(value) for metric, value in row.reported.items()} == reported, row.name
        assert (row.url, row.model_id, row.config_path) == (record["url"], record["model_id"], record["config"])
        assert row.config_path.removesuffix(".yaml").endswith("ep") or schedule.endswith("k")
        # One row of the authors' table calls a Swin-L checkpoint R50; its settings don't.
        if row.name != "ade20k-instance-swin-large":
            assert BACKBONES[row.backbone].title == record["backbone"]


def test_every_setting_is_the_authors(zoo):
    for row in RELEASED.values():
        recorded = recorded_options(zoo[row.digest]["spec"])
        ours = {name: row.options()[name] for name in recorded}
        assert ours == recorded, row.name
        assert len(recorded) > 45
        assert set(row.options()) == set(DEFAULTS)


def test_config_and_processor_carry_what_a_checkpoint_knows(zoo, shared):
    for row in RELEASED.values():
        spec = zoo[row.digest]["spec"]
        facts = json.loads((shared / "data" / "labels" / f"{row.labels.name}.json").read_text())
        categories = facts["categories"]
        config, processor = row.config(), row.processor()
        assert list(config.id2label.values()) == [category["name"].strip() for category in categories]
        assert config.num_labels == spec["num_classes"]
        if "color" in categories[0]:
            assert config.label_colors == [category["color"] for category in categories]
        assert config.num_queries == spec["mask_former"]["num_object_queries"]
        assert config.ignore_value == processor.ignore_index == spec["ignore_value"]
        assert config.freeze_backbone_norm == (spec.get("resnets", {}).get("norm") == "FrozenBN")
        assert processor.task == row.task
        stuff = [category["id"] for category in categories if not category.get("isthing")]
        assert processor.label_ids_to_fuse == (stuff if row.task == "panoptic" else None)
        assert dict(processor.size) == {
            "shortest_edge": spec["input"]["min_size_test"],
            "longest_edge": spec["input"]["max_size_test"],
        }
        assert processor.threshold == spec["mask_former"]["test"]["object_mask_threshold"]
        assert processor.overlap_mask_area_threshold == 0.8
        assert processor.channel_order == "RGB"
        assert processor.semantic_resize_before_inference == (row.task != "semantic")


@pytest.mark.parametrize("name", RELEASED)
def test_yaml_of_a_row_reads_back_as_the_row(name, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(nested(RELEASED[name].options())))
    if RELEASED[name].is_video:
        with pytest.raises(UnsupportedOptionError, match="VideoMaskFormer"):
            read_config(path)
    else:
        assert read_config(path) == RELEASED[name].options()


def test_list_shows_all_or_those_asked_for():
    lines = listing().splitlines()
    assert len(lines) == 61
    assert lines[-1] == "59 checkpoints"
    assert all(lines[1 + i].startswith(f"{name} ") for i, name in enumerate(RELEASED))
    assert any("coco-panoptic-swin-large" in line and "PQ 57.8" in line and "COCO" in line for line in lines)
    assert listing(["cityscapes", "SEMANTIC"]).endswith("6 checkpoints")
    assert listing(["video"]).endswith("12 checkpoints")
    with pytest.raises(ValueError, match="'pascal'"):
        listing(["pascal"])


def test_unknown_name_is_told_the_close_ones():
    assert find_released("COCO_panoptic_Swin-Large") is RELEASED["coco-panoptic-swin-large"]
    with pytest.raises(ValueError, match="coco-panoptic-swin-large"):
        find_released("coco-panoptic-swinl")
    with pytest.raises(ValueError, match="--list"):
        find_released("?")
