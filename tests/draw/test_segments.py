"""Pictures of segments."""

import tracemalloc

import numpy as np
import pytest
from PIL import Image

from m2f_hf.draw.segments import contact_sheet, draw_segments, label_color, segment_colors, semantic_to_segments


GREY = (128, 128, 128)


def halves(height: int, width: int) -> np.ndarray:
    """Segment 1 on the left, 2 on the right."""
    return np.where(np.arange(width) < width // 2, 1, 2)[None].repeat(height, axis=0)


def info(segment_id: int, label_id: int, label: str = "") -> dict:
    # A label of one space draws a box but no glyph: pictures without text.
    return {"id": segment_id, "label_id": label_id, "label": label or " "}


def test_semantic_map_becomes_one_segment_for_each_class():
    segmentation, infos = semantic_to_segments(np.array([[3, 3, 0], [255, 0, 0]]), {0: "sky", 3: "sea", 7: "road"})
    assert segmentation.tolist() == [[4, 4, 1], [0, 1, 1]]
    assert infos == [{"id": 1, "label_id": 0, "label": "sky"}, {"id": 4, "label_id": 3, "label": "sea"}]


# --- colours ---


def test_palette_keeps_neighbouring_classes_apart():
    colors = np.array([label_color(i) for i in range(150)], dtype=int)
    neighbours = np.abs(np.diff(colors, axis=0)).max(axis=1)
    assert neighbours.min() >= 60
    assert len({tuple(color) for color in colors.tolist()}) == 150


def test_instances_have_different_colours():
    infos = [info(i, 4) for i in range(1, 8)]
    colors = segment_colors(infos)
    assert colors[1] == label_color(4)
    assert len(set(colors.values())) == 7
    assert segment_colors(infos[:1], {4: (10, 20, 30)})[1] == (10, 20, 30)


@pytest.mark.parametrize("base", [(220, 20, 60), (0, 0, 142), (0, 0, 0), (255, 255, 255), (70, 70, 70)])
def test_things_have_shades_and_stuff_the_classs_colour(base):
    things = [{"id": i, "label_id": 1, "isthing": True} for i in range(1, 8)]
    shades = segment_colors(things, [(1, 2, 3), list(base)])
    assert shades[1] == base
    assert len(set(shades.values())) == 7
    stuff = [{"id": i, "label_id": 1, "isthing": False} for i in range(1, 4)]
    assert set(segment_colors(stuff, [(1, 2, 3), list(base)]).values()) == {base}


def test_classes_without_a_colour_get_the_built_in_one():
    infos = [info(1, 0), info(2, 5)]
    assert segment_colors(infos, [[9, 8, 7]]) == {1: (9, 8, 7), 2: label_color(5)}
    assert segment_colors(infos, None) == {1: label_color(0), 2: label_color(5)}


# --- overlays ---


def test_fill_mixes_the_segments_colour_and_leaves_the_rest():
    image = Image.new("RGB", (60, 60), GREY)
    segmentation = halves(60, 60)
    picture = np.asarray(draw_segments(image, segmentation, [info(2, 0)], colors={0: (255, 0, 0)}))
    assert (picture[:, :30] == GREY).all()  # id 1 is not in the list
    red, green, blue = picture[5, 55].tolist()  # far from the outline and from the label in the middle
    assert red > 128 + 40
    assert green == blue < 128 - 40


def test_outline_follows_the_border_only():
    image = Image.new("RGB", (60, 60), GREY)
    picture = np.asarray(draw_segments(image, halves(60, 60), [info(1, 0), info(2, 0)])).astype(int)
    row = picture[2]
    changes = np.flatnonzero(np.abs(np.diff(row, axis=0)).sum(axis=1))
    assert changes.tolist() == [28, 29, 30]  # one pixel of outline on either side of 29 | 30


def test_outline_keeps_its_proportion_on_large_pictures():
    image = Image.new("RGB", (1200, 1200), GREY)
    row = np.asarray(draw_segments(image, halves(1200, 1200), [info(1, 0), info(2, 0)]))[2].astype(int)
    outline = np.flatnonzero(np.abs(np.diff(row, axis=0)).sum(axis=1))
    assert outline.tolist() == [595, 599, 603]


def changed_by_label(image: Image.Image, segmentation: np.ndarray, infos: list[dict]) -> np.ndarray:
    """(H, W) True where the picture differs from the one without names."""
    import m2f_hf.draw.segments as visualization

    named = np.asarray(draw_segments(image, segmentation, infos))
    colors = segment_colors(infos)
    return (named != visualization._paint(np.asarray(image), segmentation, colors)).any(axis=-1)


def test_label_is_inside_its_segment():
    image = Image.new("RGB", (400, 300), GREY)
    segmentation = np.zeros((300, 400), dtype=int)
    segmentation[180:290, 20:220] = 5
    label = changed_by_label(image, segmentation, [{"id": 5, "label_id": 1, "label": "sofa", "score": 0.912}])
    assert label.sum() > 200
    assert not label[segmentation != 5].any()


def test_label_of_a_ring_does_not_sit_in_its_hole():
    y, x = np.mgrid[:400, :400] - 200
    radius = np.hypot(y, x)
    segmentation = np.where((radius > 110) & (radius < 190), 1, 0)
    label = changed_by_label(Image.new("RGB", (400, 400), GREY), segmentation, [info(1, 0, "ring")])
    assert label.any()
    assert (segmentation[label] == 1).mean() > 0.95


def test_labels_do_not_overlap_and_crowded_ones_are_left_out():
    import m2f_hf.draw.segments as visualization

    rng = np.random.default_rng(0)
    segmentation = rng.integers(0, 40, (12, 12)).repeat(16, axis=0).repeat(16, axis=1)
    ids = [i for i in np.unique(segmentation).tolist() if i]
    boxes = []
    original = visualization._Label.draw

    def record(self, draw, left, top, background):
        boxes.append((left, top, left + self.width, top + self.height))
        original(self, draw, left, top, background)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(visualization._Label, "draw", record)
        draw_segments(Image.new("RGB", (192, 192), GREY), segmentation, [info(i, i, "potted plant") for i in ids])
    assert 5 < len(boxes) < len(ids)
    for i, (left, top, right, bottom) in enumerate(boxes):
        assert 0 <= left < right <= 192
        assert 0 <= top < bottom <= 192
        for other in boxes[:i]:
            assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (1, 500), (500, 1), (40, 30)])
def test_any_size_is_drawn_at_its_own_size(size):
    width, height = size
    image = Image.new("RGB", size, GREY)
    picture = draw_segments(image, halves(height, width), [info(1, 0, "a long name"), info(2, 1, "another")])
    assert picture.size == size
    assert picture.mode == "RGB"
    assert np.asarray(picture).tolist() != np.asarray(image).tolist()


def test_memory_of_a_large_photo():
    """Of 12 million pixels, floats for each channel and a map for each segment would be a gigabyte and more."""
    image = Image.new("RGB", (1000, 750), GREY)
    segmentation = np.arange(1000)[None].repeat(750, axis=0) // 25
    infos = [info(i, i, "slice") for i in range(40)]
    tracemalloc.start()
    try:
        draw_segments(image, segmentation, infos)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak / (1000 * 750) < 60  # bytes


def test_scale_enlarges_the_picture():
    image = Image.new("RGB", (20, 10), GREY)
    assert draw_segments(image, halves(10, 20), [info(1, 0), info(2, 1)], scale=3).size == (60, 30)


def test_nothing_found_leaves_the_photo():
    image = Image.effect_noise((30, 20), 40).convert("RGB")
    assert np.array_equal(draw_segments(image, np.zeros((20, 30), dtype=int), []), image)


def test_transformers_result_is_drawn():
    torch = pytest.importorskip("torch")
    segmentation = torch.full((40, 40), -1, dtype=torch.int32)
    segmentation[:20] = 0
    infos = [{"id": 0, "label_id": 2, "was_fused": False, "score": 0.9}]
    picture = np.asarray(draw_segments(Image.new("RGB", (40, 40), GREY), segmentation, infos, id2label={2: "cat"}))
    assert (picture[20:] == GREY).all()
    assert (picture[:20] != GREY).any()


def test_map_of_another_size_is_refused():
    with pytest.raises(ValueError, match="target_sizes"):
        draw_segments(Image.new("RGB", (20, 10)), halves(20, 10), [info(1, 0)])


def test_contact_sheet_holds_every_picture():
    colors = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0)]
    pictures = [Image.new("RGB", (100, 60), color) for color in colors]
    sheet = contact_sheet([pictures[:2], pictures[2:]], ["first", "second"], ["left", "right"])
    counts = {color: count for count, color in sheet.getcolors(1 << 16)}
    assert [counts[color] for color in colors] == [6000] * 4
