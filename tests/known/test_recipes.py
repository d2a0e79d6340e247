"""Training recipes equal the released checkpoints' settings; sizes over training; refused settings."""

import json
from dataclasses import replace

import pytest

from m2f_hf.known.recipes import RECIPES, SizeSchedule, cropped, default_recipe, get_recipe, half_to_double


# --- sizes over training ---


def test_size_schedule():
    schedule = SizeSchedule.parse("0:256,0.5:384,0.8:512")
    assert [schedule.size_at(step, 10) for step in range(10)] == [256] * 5 + [384] * 3 + [512] * 2
    assert schedule.size_at(10, 10) == 512
    assert SizeSchedule.parse("0:64").size_at(0, 0) == 64


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("256", "write share:size pairs"),
        ("0:256,x:384", "write share:size pairs"),
        ("0:256:1", "write share:size pairs"),
        ("0.1:256", "start at 0"),
        ("0:256,0.5:384,0.5:512", "rise"),
        ("0:256,1:384", "below 1"),
        ("0:100", "multiples of 32"),
        ("0:0", "multiples of 32"),
        ("", "write share:size pairs"),
    ],
)
def test_senseless_size_schedules_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        SizeSchedule.parse(text)


def test_recipes_at_another_size_keep_their_proportions():
    recipe = get_recipe("cityscapes-panoptic").at_size(256)
    assert recipe.crop_size == (256, 512) and recipe.shortest_edges == tuple(
        round(edge / 2) for edge in get_recipe("cityscapes-panoptic").shortest_edges
    )
    assert recipe.longest_edge == 2048
    assert get_recipe("coco-panoptic").at_size(512).crop_size == (512, 512)


# --- recipes ---


def test_recipes_equal_the_released_checkpoints(shared):
    """All image entries of the model zoo: each has the settings of one recipe."""
    entries = json.loads((shared / "data" / "zoo" / "zoo.json").read_text())
    compared = set()
    for entry in entries:
        dataset, _, rest = entry["config"].partition("/")
        if dataset.startswith("youtubevis"):
            continue
        task = rest.split("-")[0]
        name = f"{dataset.split('-')[0]}-{task}"
        name += "-100ep" if "100ep" in rest else ""
        name += "-res640" if "res640" in rest else ""
        recipe = get_recipe(name)
        compared.add(name)
        spec = entry["spec"]
        given, solver = spec["input"], spec["solver"]

        has_jitter = given["dataset_mapper"].endswith("_lsj")
        assert (recipe.scale_range is not None) == has_jitter
        if has_jitter:
            assert recipe.scale_range == (given["min_scale"], given["max_scale"])
            assert recipe.crop_size == (given["image_size"], given["image_size"]) and recipe.is_padded
        else:
            assert given["crop"]["ENABLED"] and given["crop"]["TYPE"] == "absolute"
            assert recipe.crop_size == tuple(given["crop"]["SIZE"])
            assert recipe.shortest_edges == tuple(given["min_size_train"])
            assert recipe.max_category_share == given["crop"]["SINGLE_CATEGORY_MAX_AREA"]
            assert recipe.is_padded == (given["size_divisibility"] > 0)
            if recipe.is_padded:
                assert recipe.crop_size == (given["size_divisibility"],) * 2
        assert recipe.color_jitter == given["color_aug_ssd"]
        assert recipe.evaluation_size == (given["min_size_test"], given["max_size_test"])

        assert recipe.steps == solver["max_iter"] and recipe.batch_size == solver["ims_per_batch"]
        assert recipe.learning_rate == solver["base_lr"] and recipe.weight_decay == solver["weight_decay"]
        assert recipe.backbone_multiplier == solver["backbone_multiplier"]
        assert (recipe.warmup_steps, recipe.warmup_factor) == (solver["warmup_iters"], solver["warmup_factor"])
        assert {"multistep": "WarmupMultiStepLR", "poly": "WarmupPolyLR"}[recipe.schedule] == solver[
            "lr_scheduler_name"
        ]
        if recipe.schedule == "multistep":
            assert [share * recipe.steps for share in recipe.milestones] == pytest.approx(solver["steps"])
        clip = spec["clip_gradients"]
        assert clip["ENABLED"] and clip["CLIP_TYPE"] == "full_model" and clip["NORM_TYPE"] == 2.0
        assert recipe.max_grad_norm == clip["CLIP_VALUE"]
    assert compared == set(RECIPES)


def test_recipes_state_the_papers_numbers():
    """Appendix and section 4.1 of arXiv 2112.01527, for those without the model zoo at hand."""
    coco, cityscapes, ade = (get_recipe(name) for name in ("coco-instance", "cityscapes-panoptic", "ade20k-semantic"))
    assert coco.scale_range == (0.1, 2.0) and coco.crop_size == (1024, 1024) and coco.schedule == "multistep"
    assert cityscapes.crop_size == (512, 1024) and cityscapes.steps == 90_000 and cityscapes.color_jitter
    assert ade.crop_size == (512, 512) and ade.steps == 160_000 and ade.schedule == "poly"
    assert half_to_double(512)[0] == 256 and half_to_double(512)[-1] == 1024 and len(half_to_double(512)) == 16
    with pytest.raises(ValueError, match="coco-panoptic, "):
        get_recipe("coco")


def test_other_data_gets_a_recipe_around_the_checkpoints_size():
    recipe = default_recipe({"shortest_edge": 800, "longest_edge": 1333})
    assert recipe.crop_size == (800, 800) and recipe.evaluation_size == (800, 1333)
    assert (min(recipe.shortest_edges), max(recipe.shortest_edges)) == (400, 1600)
    assert recipe.steps is None and recipe.color_jitter and recipe.is_padded
    assert default_recipe({"shortest_edge": 500}).crop_size == (512, 512)
    assert default_recipe({"height": 384, "width": 512}).crop_size == (384, 384)
    with pytest.raises(ValueError, match="shortest_edge"):
        default_recipe({})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale_range": (0.5, 1.0)}, "one of them"),
        ({"shortest_edges": ()}, "one of them"),
        ({"shortest_edges": (), "scale_range": (2.0, 0.1)}, "smallest and a largest"),
        ({"crop_size": (0, 64)}, "1 pixel"),
        ({"max_category_share": 0.0}, "max_category_share"),
        ({"flip_probability": 1.5}, "flip_probability"),
    ],
)
def test_senseless_recipes_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        replace(cropped(64), **settings)
