"""Segment ids as colours and back."""

import numpy as np
import pytest
from PIL import Image

from m2f_hf.processing.segment_ids import NUM_IDS, id_to_rgb, rgb_to_id


def test_every_channel_has_its_weight():
    ids = np.array([[0, 1, 255], [256, 65536, NUM_IDS - 1]])
    colors = [[[0, 0, 0], [1, 0, 0], [255, 0, 0]], [[0, 1, 0], [0, 0, 1], [255, 255, 255]]]
    assert id_to_rgb(ids).tolist() == colors
    assert rgb_to_id(np.array(colors, dtype=np.uint8)).tolist() == ids.tolist()


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "int64", "uint64"])
def test_round_trip(dtype):
    ids = np.random.default_rng(0).integers(0, min(NUM_IDS, np.iinfo(dtype).max + 1), (7, 5)).astype(dtype)
    colors = id_to_rgb(ids)
    assert (colors.shape, colors.dtype) == ((7, 5, 3), np.uint8)
    back = rgb_to_id(colors)
    assert back.dtype == np.int32
    assert np.array_equal(back, ids)
    assert np.array_equal(rgb_to_id(Image.fromarray(colors)), ids)
    assert np.array_equal(rgb_to_id(colors.astype(np.int64)), ids)


def test_empty_maps():
    assert id_to_rgb(np.zeros((0, 4), dtype=int)).shape == (0, 4, 3)
    assert rgb_to_id(np.zeros((0, 4, 3), dtype=np.uint8)).shape == (0, 4)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[-1]], "0 to 16777215, not -1 to -1"),
        ([[0, NUM_IDS]], "not 0 to 16777216"),
        ([[0.5]], "whole numbers, not float64"),
        ([[True]], "whole numbers, not bool"),
    ],
)
def test_bad_ids(ids, message):
    with pytest.raises(ValueError, match=message):
        id_to_rgb(ids)


@pytest.mark.parametrize(
    ("colors", "message"),
    [
        ([[0, 0, 256]], "0 to 255, not 0 to 256"),
        ([[-1, 0, 0]], "not -1 to 0"),
        ([[0, 0, 0, 255]], r"\(\.\.\., 3\) of whole numbers, not int64 of \(1, 4\)"),
        ([[0.0, 0.0, 0.0]], "not float64"),
        (5, "not int64"),
    ],
)
def test_bad_colours(colors, message):
    with pytest.raises(ValueError, match=message):
        rgb_to_id(np.array(colors))
