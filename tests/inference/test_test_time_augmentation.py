"""Semantic scores from several sizes and mirror images, against the original's own."""

import json
import sys

import numpy as np
import pytest
import torch

from m2f_hf import M2FImageProcessor, Mask2FormerForUniversalSegmentation
from m2f_hf.inference.test_time_augmentation import SCALES, semantic_scores_with_augmentation


class PixelModel(torch.nn.Module):
    """Two queries for two classes, sure of them; the first one's mask is the image, so bright pixels are class 0."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[torch.Tensor] = []

    def forward(self, pixel_values, pixel_mask):
        self.seen.append(pixel_values)
        classes = torch.tensor([[[20.0, 0, 0], [0, 20.0, 0]]])
        bright = torch.nn.functional.avg_pool2d(pixel_values.mean(1, keepdim=True), 4)
        sizes = torch.stack([pixel_mask.any(2).sum(1), pixel_mask.any(1).sum(1)], dim=1)
        masks = torch.cat([10 * bright - 5, 5 - 10 * bright], dim=1)
        names = ("class_queries_logits", "masks_queries_logits", "image_sizes")
        return type("Outputs", (), dict(zip(names, (classes, masks, sizes), strict=True)))


@pytest.fixture
def processor() -> M2FImageProcessor:
    size = {"shortest_edge": 32, "longest_edge": 64}
    return M2FImageProcessor(task="semantic", size=size, do_normalize=False)


@pytest.fixture
def image() -> np.ndarray:
    picture = np.zeros((32, 48, 3), np.uint8)
    picture[:, 8:20] = 255
    return picture


def test_every_size_is_used_with_its_mirror_image(processor, image):
    model = PixelModel()
    scores = semantic_scores_with_augmentation(model, processor, image, shortest_edges=[32, 64], longest_edge=90)
    # Of 64 the longer side would be 96, more than 90 pixels; padded to multiples of 32.
    assert [tuple(pixels.shape[-2:]) for pixels in model.seen] == [(32, 64)] * 2 + [(64, 96)] * 2
    assert torch.equal(model.seen[0][..., :48], model.seen[1][..., :48].flip(-1))
    assert scores.shape == (2, 32, 48) and scores.dtype == torch.float32
    labels = scores.argmax(0)
    assert (labels[:, 10:18] == 0).all() and (labels[:, :6] == 1).all() and (labels[:, 22:] == 1).all()


def test_one_size_without_flip_is_plain_inference(processor, image):
    model = PixelModel()
    scores = semantic_scores_with_augmentation(model, processor, image, shortest_edges=[32], flip=False)
    outputs = model(**processor(image, return_tensors="pt"))
    plain = processor.post_process_semantic_segmentation(outputs, [(32, 48)], return_segmentation_scores=True)[0]
    assert torch.equal(scores, plain["segmentation_scores"])


def test_a_mirrored_image_has_mirrored_scores(processor, image):
    scores, mirrored = (
        semantic_scores_with_augmentation(PixelModel(), processor, picture)
        for picture in (image, image[:, ::-1].copy())
    )
    torch.testing.assert_close(scores, mirrored.flip(-1))


def test_default_sizes_are_those_of_the_processor(processor, image):
    model = PixelModel()
    semantic_scores_with_augmentation(model, processor, image, flip=False)
    assert len(model.seen) == len(SCALES)
    assert [tuple(pixels.shape[-2:]) for pixels in model.seen] == [
        (32, 32), (32, 64), (32, 64), (64, 64), (64, 96), (64, 96)
    ]  # fmt: skip
    with pytest.raises(ValueError, match="at least one size"):
        semantic_scores_with_augmentation(model, processor, image, shortest_edges=[])
    processor.size = {"height": 32, "width": 32}
    with pytest.raises(ValueError, match="give shortest_edges"):
        semantic_scores_with_augmentation(model, processor, image)


@pytest.fixture(scope="module")
def converted(goldens, repository, tmp_path_factory):
    sys.path.insert(0, str(repository / "conversion"))
    from converter import convert

    folder, output = goldens / "ade20k_semantic_swinl", tmp_path_factory.mktemp("ade") / "converted"
    convert(folder / "model.pkl", folder / "config.yaml", output)
    return output


def test_scores_are_the_originals(goldens, converted):
    facts = json.loads((goldens / "extra" / "tta_semantic.json").read_text())
    recorded = np.load(goldens / "extra" / "tta_semantic.npz")
    image = np.load(goldens / "ade20k_semantic_swinl" / "image_0.npy")
    model = Mask2FormerForUniversalSegmentation.from_pretrained(converted).eval()
    processor = M2FImageProcessor.from_pretrained(converted)
    scores = semantic_scores_with_augmentation(
        model,
        processor,
        image,
        shortest_edges=facts["min_sizes"],
        longest_edge=facts["max_size"],
        flip=facts["flip"],
        target_size=recorded["sem_seg"].shape[1:],
    )
    torch.testing.assert_close(scores, torch.from_numpy(recorded["sem_seg"]), atol=2e-4, rtol=0)
