"""Label maps of any kind, resized and taken apart into masks with classes."""

import numpy as np
import pytest
import torch
from PIL import Image

from m2f_hf.processing.labels import convert_label_map_to_masks, read_label_map, resize_labels
from m2f_hf.processing.segment_ids import id_to_rgb


def test_every_kind_of_label_map_gives_the_same_numbers(tmp_path):
    labels = np.random.default_rng(0).integers(0, 256, (5, 7))
    small = Image.fromarray(labels.astype(np.uint8))
    small.save(tmp_path / "labels.png")
    palette = small.copy()
    palette.putpalette(np.random.default_rng(1).permutation(256).repeat(3).tolist())  # its colours say nothing
    images = (small, palette, Image.fromarray(labels.astype(np.int32)), tmp_path / "labels.png")
    for kind in (labels, labels[None], labels[..., None], torch.from_numpy(labels), labels.astype(float), *images):
        read, is_colour_coded = read_label_map(kind)
        assert (read.dtype, is_colour_coded) == (np.int64, False)
        assert np.array_equal(read, labels)
    ids = labels * 65_537
    for colors in (id_to_rgb(ids), id_to_rgb(ids).transpose(2, 0, 1), Image.fromarray(id_to_rgb(ids))):
        read, is_colour_coded = read_label_map(colors)
        assert is_colour_coded and np.array_equal(read, ids)


@pytest.mark.parametrize(
    ("label_map", "message"),
    [
        (np.full((2, 2), 0.5), "whole numbers, not float64"),
        (np.zeros((2, 2, 5), int), r"got \(2, 2, 5\)"),
        (Image.new("CMYK", (2, 2)), "mode CMYK"),
    ],
)
def test_bad_label_maps(label_map, message):
    with pytest.raises(ValueError, match=message):
        read_label_map(label_map)


@pytest.mark.parametrize(("size", "new_size"), [((37, 53), (60, 86)), ((37, 53), (11, 7)), ((1, 1), (5, 6))])
def test_labels_are_resized_as_pillow_does(size, new_size):
    labels = np.random.default_rng(2).integers(0, 2**24, size).astype(np.int32)
    expected = np.asarray(Image.fromarray(labels).resize(new_size[::-1], Image.Resampling.NEAREST))
    assert np.array_equal(resize_labels(labels, new_size), expected)
    assert np.array_equal(resize_labels(np.stack([labels, labels + 1]), new_size)[1], expected + 1)


def test_convert_label_map_keeps_the_order_of_ids():
    masks, classes = convert_label_map_to_masks(np.array([[9, 2], [5, 2]]), {2: 1, 5: 0, 9: None})
    assert classes.tolist() == [1, 0]
    assert masks.tolist() == [[[False, True], [False, True]], [[False, False], [True, False]]]
