"""Segments in words."""

import pytest

from m2f_hf.draw.words import describe, plural


def test_description_counts_things_and_names_stuff():
    def info(label, isthing):
        return {"label": label, "isthing": isthing, "score": 0.9}

    infos = [info("circle", True), info("sand", False), info("star", True), info("circle", True), info("sea", False)]
    assert describe(infos) == "2 circles and 1 star on sand and sea"
    assert describe(infos[1:2]) == "sand"
    assert describe(infos[:1]) == "1 circle"
    assert describe([info("sea", None), info("cat", None), info("cat", None)]) == "2 cats and 1 sea"
    assert describe([]) == "nothing found"


def test_description_of_a_semantic_result_gives_shares():
    infos = [{"label": "sea", "score": None, "area": 25}, {"label": "sand", "score": None, "area": 75}]
    assert describe(infos) == "sand 75%, sea 25%"


@pytest.mark.parametrize(
    ("one", "many"),
    [
        ("star", "stars"),
        ("bench", "benches"),
        ("wine glass", "wine glasses"),
        ("bus", "buses"),
        ("skis", "skis"),
        ("LABEL_7", "LABEL_7"),
    ],
)
def test_plurals(one, many):
    assert plural(one) == many
