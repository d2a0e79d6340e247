"""Run lengths and polygons become masks as pycocotools makes them."""

import numpy as np
import pytest

from m2f_hf.processing.rle import decode_segmentation, run_lengths


HEIGHT, WIDTH = 12, 16


def test_run_lengths_decode_as_pycocotools_does():
    coco = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for _ in range(60):
        height, width = rng.integers(1, 40, 2)
        mask = (rng.random((height, width)) < rng.random()).astype(np.uint8)
        rle = coco.encode(np.asfortranarray(mask))
        as_text = {**rle, "counts": rle["counts"].decode()}
        uncompressed = {**rle, "counts": run_lengths(rle["counts"]).tolist()}
        for form in (rle, as_text, uncompressed):
            assert np.array_equal(decode_segmentation(form, height, width), mask.astype(bool))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools with NumPy 2
def test_polygons_are_drawn_as_pycocotools_draws_them():
    coco = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(1)
    for _ in range(20):
        polygons = [rng.uniform(-2, 20, 2 * rng.integers(3, 8)).tolist() for _ in range(rng.integers(1, 4))]
        expected = coco.decode(coco.merge(coco.frPyObjects(polygons, HEIGHT, WIDTH)))
        assert np.array_equal(decode_segmentation(polygons, HEIGHT, WIDTH), expected.astype(bool))


@pytest.mark.parametrize(
    "rle",
    [
        {"size": [2, 3], "counts": [1, 2]},
        {"size": [3, 2], "counts": [3, 3]},
        {"size": [2, 3], "counts": [7, -1]},
        {"size": [2, 3], "counts": "0" * 3 + "P"},
        {"size": [2, 3], "counts": "\x01"},
        {"size": [2, 3]},
    ],
)
def test_damaged_run_lengths_are_refused(rle):
    with pytest.raises(ValueError, match="RLE"):
        decode_segmentation(rle, 2, 3)
