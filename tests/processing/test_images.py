"""Images of any kind as arrays of pixels: reading, sizes, resizing, padding."""

import base64
import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_utils import SizeDict

from m2f_hf import BUNDLED_MODEL, Segmenter, stream_frames
from m2f_hf.data.base import read_image as read_training_image
from m2f_hf.inference.pipeline import M2FImageSegmentationPipeline
from m2f_hf.processing.images import get_resized_size, list_of_images, pad_to, read_image, read_rgb, resize_image


@pytest.fixture
def picture():
    """(37, 53, 3) uint8, every channel different."""
    return np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    return Segmenter.from_pretrained(BUNDLED_MODEL, device="cpu")


def deep_pictures() -> dict[str, np.ndarray]:
    """Grey ramps of more than 8 bits, by the name of a file that holds them."""
    ramp = np.linspace(0, 65535, 40 * 64).reshape(40, 64)
    return {
        "deep.png": ramp.astype(np.uint16),
        "dark.png": (ramp / 257).astype(np.uint16),
        "deep.tif": ramp.astype(np.int32),
        "fractions.tif": (ramp / 65535).astype(np.float32),
    }


@pytest.mark.parametrize("name", deep_pictures())
def test_every_way_in_reads_the_same_pixels(name, segmenter, tmp_path):
    """An array, a path, an open file, an address, a clip, the pipeline, one call, and training data."""
    (tmp_path / "clip").mkdir()
    path = tmp_path / "clip" / name
    pixels = deep_pictures()[name]
    Image.fromarray(pixels).save(path)
    expected = pixels[None].repeat(3, axis=0)
    if name != "fractions.tif":
        expected = np.rint(expected / 257).astype(np.uint8)
    address = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    frames = list(stream_frames([path]))
    if path.suffix == ".png":
        frames += stream_frames(tmp_path / "clip")
    for kind in (pixels, Image.fromarray(pixels), path, str(path), Image.open(path), address):
        frames.append(read_image(kind))
    for found in frames:
        assert found.dtype == expected.dtype and np.array_equal(found, expected)
    in_8_bits = np.asarray(read_rgb(path))
    assert in_8_bits.min() == 0 and in_8_bits.max() == (1 if name == "dark.png" else 255)
    pipeline = M2FImageSegmentationPipeline(segmenter.model, image_processor=segmenter.processor)
    assert np.array_equal(segmenter(path).image, in_8_bits)
    assert np.array_equal(read_training_image(path, name), in_8_bits)
    inputs = pipeline.preprocess(str(path))["pixel_values"][0]
    assert torch.equal(inputs, segmenter.processor(path, return_tensors="pt")["pixel_values"][0])
    without_address = pipeline.preprocess(base64.b64encode(path.read_bytes()).decode())
    assert torch.equal(without_address["pixel_values"][0], inputs)


def test_http_address(picture, tmp_path, monkeypatch):
    Image.fromarray(picture).save(tmp_path / "picture.png")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        assert np.array_equal(read_image(f"{address}/picture.png"), picture.transpose(2, 0, 1))
        with pytest.raises(ValueError, match=r"no image could be fetched from .*404.*pass its path"):
            read_image(f"{address}/missing.png")
        monkeypatch.setattr("m2f_hf.processing.images.MAX_DOWNLOAD", 2**10)
        with pytest.raises(ValueError, match="larger than 0 MiB"):
            read_image(f"{address}/picture.png")
    finally:
        server.shutdown()
        server.server_close()


def test_every_kind_is_read_as_rgb_with_channels_first(picture, tmp_path):
    Image.fromarray(picture).save(tmp_path / "picture.png")
    tensor = torch.from_numpy(picture).permute(2, 0, 1)
    for kind in (picture, tensor, Image.fromarray(picture), tmp_path / "picture.png", str(tmp_path / "picture.png")):
        assert np.array_equal(read_image(kind), picture.transpose(2, 0, 1))
    fractions = read_image(tensor.double() / 255)
    assert fractions.dtype == np.float32
    np.testing.assert_allclose(fractions, picture.transpose(2, 0, 1) / 255, rtol=1e-6)


def test_list_of_images(picture):
    assert len(list_of_images(picture)) == len(list_of_images([picture])) == 1
    assert len(list_of_images(np.stack([picture] * 3))) == len(list_of_images((picture,) * 3)) == 3
    with pytest.raises(ValueError, match="no images"):
        list_of_images([])


def test_known_sizes():
    """Of the original at COCO's 800/1333, ADE's 640/2560 and Cityscapes' 1024/2048."""
    coco, ade = SizeDict(shortest_edge=800, longest_edge=1333), SizeDict(shortest_edge=640, longest_edge=2560)
    city = SizeDict(shortest_edge=1024, longest_edge=2048)
    assert get_resized_size((480, 640), coco) == (800, 1067)
    assert get_resized_size((427, 640), coco) == (800, 1199)
    assert get_resized_size((375, 1242), coco) == (402, 1333)
    assert get_resized_size((1024, 2048), ade) == (640, 1280)
    assert get_resized_size((101, 1999), city) == (103, 2048)
    assert get_resized_size((480, 640), SizeDict(shortest_edge=300)) == (300, 400)
    assert get_resized_size((480, 640), SizeDict(height=7, width=9)) == (7, 9)
    assert get_resized_size((1, 1), coco) == (800, 800)


def test_recorded_sizes(goldens):
    shapes = json.loads((goldens / "extra" / "preprocess.json").read_text())["output_shapes"]
    assert len(shapes) > 50
    for case, expected in shapes.items():
        size, edges = ([int(n) for n in part.replace("/", "x").split("x")] for part in case.split("@"))
        assert list(get_resized_size(tuple(size), SizeDict(shortest_edge=edges[0], longest_edge=edges[1]))) == expected


@pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, Image.Resampling.NEAREST, None])
def test_resizing_is_pillows_whatever_the_range(picture, resample):
    image, size = picture.transpose(2, 0, 1), SizeDict(height=20, width=30)
    theirs = Image.fromarray(picture).resize((30, 20), Image.Resampling.BILINEAR if resample is None else resample)
    expected = np.asarray(theirs).transpose(2, 0, 1)
    assert np.array_equal(resize_image(image, size, resample), expected)
    for scale in (1, 255):
        resized = resize_image((image / scale).astype(np.float32), size, resample)
        assert resized.dtype == np.float32
        np.testing.assert_allclose(resized * scale, expected, rtol=1e-6)


def test_padding_is_zero_at_the_bottom_and_right(picture):
    for array in (picture.transpose(2, 0, 1), picture[..., 0] > 100, np.ones((2, 1, 5, 7), np.int64)):
        height, width = array.shape[-2:]
        padded = pad_to(array, (64, 96))
        assert (padded.shape, padded.dtype) == ((*array.shape[:-2], 64, 96), array.dtype)
        assert np.array_equal(padded[..., :height, :width], array)
        assert not padded[..., height:, :].any() and not padded[..., width:].any()
        assert pad_to(array, None) is array
    with pytest.raises(ValueError, match=r"37x53 does not fit into 64x52.*`pad_size`"):
        pad_to(picture.transpose(2, 0, 1), (64, 52))
