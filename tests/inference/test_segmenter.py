"""`Segmenter`: one call from a picture to its segments, with the bundled model."""

import base64
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from m2f_hf import ClipTracker, Mask2FormerForVideoSegmentation, Mask2FormerVideoProcessor
from m2f_hf.inference.pipeline import M2FImageSegmentationPipeline
from m2f_hf.inference.segmenter import SegmentedImage, Segmenter
from m2f_hf.known.bundled import BUNDLED_MODEL, BUNDLED_SCENES, BUNDLED_VIDEO_MODEL


SCENE = BUNDLED_SCENES / "scene-1.png"


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    return Segmenter.from_pretrained(BUNDLED_MODEL, device="cpu")


def same(result, expected) -> bool:
    return np.array_equal(result.segmentation, expected.segmentation) and result.segments == expected.segments


def test_every_kind_of_picture_gives_the_same_segments(segmenter):
    result = segmenter(SCENE)
    picture = Image.open(SCENE)
    address = "data:image/png;base64," + base64.b64encode(SCENE.read_bytes()).decode()
    pixels = np.array(picture.convert("RGB"))
    for image in (str(SCENE), address, picture, pixels, torch.from_numpy(pixels).permute(2, 0, 1)):
        assert same(segmenter(image), result)
    assert np.array_equal(np.asarray(result.image), pixels)
    fractions = segmenter(pixels.astype(np.float32) / 255)
    assert same(fractions, result) and np.array_equal(np.asarray(fractions.image), pixels)


def test_result_as_a_container(segmenter):
    result = segmenter(SCENE)
    assert len(result) == len(list(result)) == len(result.segments) > 2
    assert str(result) in repr(result) and result.segments[0]["label"] in str(result)
    for segment in result:
        assert np.array_equal(result.mask(segment), result.segmentation == segment["id"])
    assert result.draw().size == result.image.size
    assert result.draw(scale=2).size == tuple(2 * side for side in result.image.size)
    nothing = SegmentedImage(result.image, result.segmentation * 0, [], "panoptic")
    assert str(nothing) == "nothing found" and len(nothing) == 0 and nothing


def test_masks_of_instances_are_whole(segmenter):
    result = Segmenter(segmenter.model, segmenter.processor, "instance", threshold=0.0)(SCENE)
    overlap = 0
    for segment in result:
        mask = result.mask(segment)
        assert mask.sum() == segment["area"]
        overlap += (mask & (result.segmentation != segment["id"])).sum()
    assert overlap > 0, "nothing overlaps, so nothing is shown"


def crops() -> list[Image.Image]:
    """Pictures whose padding differs."""
    scene = Image.open(SCENE).convert("RGB")
    return [scene.crop((0, 0, 96 - 5 * index, 60 + 17 * index)) for index in range(3)]


def call_segmenter(segmenter):
    return lambda picture: segmenter(picture).segments


def call_pipeline(segmenter):
    pipeline = M2FImageSegmentationPipeline(segmenter.model, image_processor=segmenter.processor)
    return lambda picture: [(each["label"], np.asarray(each["mask"]).sum()) for each in pipeline(picture)]


def call_tracker(segmenter):
    model = Mask2FormerForVideoSegmentation.from_pretrained(BUNDLED_VIDEO_MODEL).eval()
    tracker = ClipTracker(model, Mask2FormerVideoProcessor.from_pretrained(BUNDLED_VIDEO_MODEL), window=2)
    return lambda picture: [result["segments_info"] for result in tracker([picture] * 3)]


@pytest.mark.parametrize("prepare", [call_segmenter, call_pipeline, call_tracker])
def test_threads_share_model_and_processor(segmenter, prepare):
    """Each call gives what it would give alone."""
    call, pictures = prepare(segmenter), crops()
    expected = [call(picture) for picture in pictures]
    assert all(expected)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(call, pictures * 2))
    assert found == expected * 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"task": "depth"}, "no task 'depth'"),
        ({"threshold": 2}, "threshold 2 is not"),
        ({"task": "semantic", "threshold": 0.5}, "leave it out"),
        ({"device": "toaster"}, "try device cpu"),
        ({"dtype": "int8"}, "choose float32"),
        ({"dtype": "double trouble"}, "choose float32"),
        ({"revision": "main"}, "is a folder, and revision"),
    ],
)
def test_bad_settings(arguments, says):
    with pytest.raises(ValueError, match=says):
        Segmenter.from_pretrained(BUNDLED_MODEL, **arguments)


def test_bad_checkpoints(tmp_path):
    with pytest.raises(ValueError, match=r"video model.*ClipTracker"):
        Segmenter.from_pretrained(BUNDLED_VIDEO_MODEL)
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        Segmenter.from_pretrained(tmp_path)
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((BUNDLED_MODEL / name).read_bytes())
    with pytest.raises(OSError, match="cannot be loaded"):
        Segmenter.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="cannot be loaded"):
        Segmenter.from_pretrained(tmp_path)


def test_bad_pictures(segmenter, tmp_path):
    with pytest.raises(FileNotFoundError, match="no image file"):
        segmenter(tmp_path / "missing.jpg")
    with pytest.raises(ValueError, match="list is not an image"):
        segmenter([SCENE])
