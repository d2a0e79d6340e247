"""The label sets: equal to the reference lists where those are at hand, sound in themselves in any case."""

import json

import pytest

from m2f_hf.known.label_sets import (
    LABEL_SETS,
    TASKS,
    are_placeholders,
    dataset_in_name,
    find_label_set,
    label_set,
    matching_label_sets,
    task_in_name,
)


# name -> labels, things (None: not distinguished), value of pixels without a class
COUNTS = {
    "coco-panoptic": (133, 80, 255),
    "coco-instance": (80, 80, 255),
    "ade20k-panoptic": (150, 100, 255),
    "ade20k-semantic": (150, None, 255),
    "ade20k-instance": (100, 100, 255),
    "cityscapes-panoptic": (19, 8, 255),
    "cityscapes-semantic": (19, None, 255),
    "cityscapes-instance": (8, 8, 255),
    "mapillary-panoptic": (65, 37, 65),
    "mapillary-semantic": (65, None, 65),
    "ytvis2019": (40, 40, 255),
    "ytvis2021": (40, 40, 255),
}


def placeholders(number):
    return {i: f"LABEL_{i}" for i in range(number)}


def test_the_sets_are_those_of_the_released_checkpoints():
    assert list(LABEL_SETS) == list(COUNTS)


@pytest.mark.parametrize("name", COUNTS)
def test_equal_to_the_reference(name, shared):
    reference = json.loads((shared / "data" / "labels" / f"{name}.json").read_text(encoding="utf-8"))
    known = label_set(name)
    assert reference["dataset"] == known.name == name
    assert known.ignore_value == (255 if reference["ignore_label"] is None else reference["ignore_label"])
    assert [category["id"] for category in reference["categories"]] == list(range(len(known.labels)))
    for category, label in zip(reference["categories"], known.labels, strict=True):
        assert label.name == category["name"].strip()
        assert label.is_thing is category.get("isthing")
        # The reference leaves out what the data set's panoptic list says already.
        assert label.color == tuple(category.get("color", label.color))
        assert label.dataset_id == category.get("dataset_id", label.dataset_id)


@pytest.mark.parametrize(("name", "counts"), COUNTS.items())
def test_properties(name, counts):
    num_labels, num_things, ignore_value = counts
    known = label_set(name)
    assert known.name == name
    assert name in (f"{known.dataset}-{known.task}", known.dataset)
    assert known.task in TASKS
    assert known.ignore_value == ignore_value
    assert known.ignore_value not in known.id2label

    assert list(known.id2label) == list(range(num_labels))
    names = list(known.id2label.values())
    assert len(set(names)) == num_labels
    assert all(label == label.strip() != "" for label in names)

    ids = [label.dataset_id for label in known.labels]
    assert len(set(ids)) == num_labels
    assert min(ids) >= 0
    assert ids == sorted(ids) or known.dataset == "coco"  # COCO numbers a few stuff classes after the merged ones

    assert len(known.colors) == num_labels
    assert all(len(color) == 3 and 0 <= min(color) <= max(color) <= 255 for color in known.colors)

    things = {i for i, label in enumerate(known.labels) if label.is_thing}
    if num_things is None:
        assert known.stuff_ids is None
        assert {label.is_thing for label in known.labels} == {None}
    else:
        assert len(things) == num_things
        assert sorted([*things, *known.stuff_ids]) == list(range(num_labels))


def test_the_things_of_a_panoptic_set_are_its_instance_set():
    for dataset in ("coco", "ade20k", "cityscapes"):
        panoptic, instance = label_set(f"{dataset}-panoptic"), label_set(f"{dataset}-instance")
        things = [label for label in panoptic.labels if label.is_thing]
        assert [label.dataset_id for label in things] == [label.dataset_id for label in instance.labels]
        assert [label.color for label in things] == [label.color for label in instance.labels]


def test_single_facts():
    """Of each table something that a slip by a line or a channel would change."""
    assert label_set("coco-panoptic").labels[132] == ("rug-merged", False, (250, 141, 255), 200)
    assert label_set("ade20k-instance").id2label[1] == "windowpane"
    assert label_set("ade20k-panoptic").id2label[8] == "window"
    assert label_set("cityscapes-panoptic").labels[11] == ("person", True, (220, 20, 60), 24)
    assert label_set("mapillary-panoptic").labels[64].name == "Ego Vehicle"
    assert label_set("ytvis2019").id2label[1] == "giant_panda"
    assert label_set("ytvis2021").id2label[39] == "zebra"


def test_unknown_sets_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'lvis'.*coco-panoptic, .*ytvis2021"):
        label_set("lvis")


# --- whose labels are these? ---


@pytest.mark.parametrize("name", COUNTS)
def test_every_set_is_found_by_its_own_labels(name):
    known = label_set(name)
    assert find_label_set(known.id2label, f"someone/mask2former-{name}") is known
    unnamed = find_label_set(known.id2label)
    assert unnamed.name == name.replace("semantic", "panoptic")  # equal labels: only the name decides
    assert {candidate.dataset for candidate in matching_label_sets(known.id2label)} == {known.dataset}


def test_spelling_does_not_count():
    shouted = {i: label.upper().replace("-", " ") + " " for i, label in label_set("coco-panoptic").id2label.items()}
    assert find_label_set(shouted).name == "coco-panoptic"
    # the list that `transformers`' ADE20K checkpoints carry has one word a class, in places that of the instance task
    one_word = {i: label.split(",")[0] for i, label in label_set("ade20k-semantic").id2label.items()}
    one_word |= {8: "windowpane", 127: "bicycle", 142: "plate"}
    assert one_word[22] == "painting"
    assert find_label_set(one_word, "x-ade-semantic").name == "ade20k-semantic"


def test_a_few_other_labels_are_a_spelling_and_many_another_set():
    labels = label_set("ade20k-panoptic").id2label
    assert find_label_set(labels | {i: f"other {i}" for i in range(15)}).name == "ade20k-panoptic"
    assert find_label_set(labels | {i: f"other {i}" for i in range(16)}) is None
    small = label_set("cityscapes-instance").id2label
    assert find_label_set(small | {3: "tram"}) is None
    assert find_label_set({i: small[7 - i] for i in range(8)}) is None  # the order is part of it
    assert find_label_set({i: label for i, label in labels.items() if i < 149}) is None


def test_a_name_does_not_outweigh_labels():
    """A fine-tune keeps the name of what it started from."""
    assert find_label_set({0: "cell", 1: "background"}, "mask2former-swin-tiny-coco-instance-cells") is None


@pytest.mark.parametrize(
    ("name", "number", "expected"),
    [
        ("facebook/mask2former-swin-large-coco-panoptic", 133, "coco-panoptic"),
        ("facebook/mask2former-swin-tiny-coco-instance", 80, "coco-instance"),
        ("facebook/mask2former-swin-base-IN21k-ade-semantic", 150, "ade20k-semantic"),
        ("facebook/mask2former-swin-large-ade-panoptic", 150, "ade20k-panoptic"),
        ("facebook/mask2former-swin-large-cityscapes-semantic", 19, "cityscapes-semantic"),
        ("facebook/mask2former-swin-large-mapillary-vistas-panoptic", 65, "mapillary-panoptic"),
        ("shivi/video-mask2former-swin-tiny-youtubevis-2021-instance", 40, "ytvis2021"),
        ("C:\\models\\Mask2Former_ADE20K_Instance\\", 100, "ade20k-instance"),
        ("/cache/models--facebook--mask2former-swin-small-coco-instance/snapshots/0123abc", 80, "coco-instance"),
        ("/coco-panoptic/run-1", 133, None),  # a folder's name counts, its parents' do not
        ("facade-semantic", 150, None),
        ("facebook/mask2former-swin-large-coco-panoptic", 12, None),
        ("", 133, None),
    ],
)
def test_placeholders_are_the_name_s(name, number, expected):
    assert are_placeholders(placeholders(number))
    found = find_label_set(placeholders(number), name)
    assert (found and found.name) == expected


def test_words_in_names():
    assert task_in_name("me/panoptic-to-semantic") == "semantic"
    assert task_in_name("instances/mine") is None
    assert dataset_in_name("org/m2f-ytvis2019") == "ytvis2019"
    assert dataset_in_name("org/youtube-vis-2021-x") == "ytvis2021"
    assert dataset_in_name("coconut") is None
