"""Auto classes and pipeline: ours are found, and the import changes nothing for stock checkpoints."""

import inspect
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from listening import WarningsOfTransformers
from PIL import Image
from tiny import BACKBONES, FIELDS, tiny_config
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageSegmentation,
    AutoModelForUniversalSegmentation,
    ImageSegmentationPipeline,
    pipeline,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

import m2f_hf


NAMES = {0: "cat", 1: "dog", 2: "sky", 3: "grass"}
SIZES = FIELDS | {"encoder_layers": 1, "decoder_layers": 3, "num_queries": 9, "num_labels": 4, "id2label": NAMES}


def spread(model):
    """Return the model with weights whose logits vary enough for every kind of segment."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1.0 if "queries" in name else 0.2, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours")
    spread(m2f_hf.Mask2FormerForUniversalSegmentation(tiny_config(**SIZES))).save_pretrained(folder)
    m2f_hf.Mask2FormerImageProcessor(
        size={"shortest_edge": 64, "longest_edge": 96},
        task="instance",
        label_ids_to_fuse=[2, 3],
        threshold=0.3,
        instance_threshold=0.05,
        overlap_mask_area_threshold=0.1,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stock")
    config = transformers.Mask2FormerConfig(backbone_config=dict(BACKBONES["swin"]), **SIZES)
    spread(transformers.Mask2FormerForUniversalSegmentation(config)).save_pretrained(folder)
    Mask2FormerImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))


@pytest.fixture
def complaints():
    """Warnings that transformers logs during the test."""
    with WarningsOfTransformers() as messages:
        yield messages


def test_complaints_are_collected(complaints):
    transformers.logging.get_logger("transformers.tests").warning("heard")
    assert complaints == ["heard"]


def test_auto_classes_find_ours_without_complaint(ours, complaints):
    for auto_class in (AutoModelForUniversalSegmentation, AutoModelForImageSegmentation):
        assert type(auto_class.from_pretrained(ours)) is m2f_hf.Mask2FormerForUniversalSegmentation
    assert type(AutoModel.from_pretrained(ours)) is m2f_hf.Mask2FormerModel
    assert type(m2f_hf.Mask2FormerModel.from_pretrained(ours)) is m2f_hf.Mask2FormerModel
    assert type(AutoConfig.from_pretrained(ours)) is m2f_hf.Mask2FormerConfig
    assert type(AutoImageProcessor.from_pretrained(ours)) is m2f_hf.M2FImageProcessor
    assert complaints == []


def test_the_saved_processor_names_itself(ours):
    saved = json.loads((ours / "preprocessor_config.json").read_text())
    assert saved["image_processor_type"] == "M2FImageProcessor"
    assert json.loads((ours / "config.json").read_text())["model_type"] == "m2f"


def reference(folder, image):
    """Model outputs and processor of a checkpoint of ours, without the pipeline."""
    model = m2f_hf.Mask2FormerForUniversalSegmentation.from_pretrained(folder).eval()
    processor = m2f_hf.M2FImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        return model(**processor(image, return_tensors="pt")), processor, [(image.height, image.width)]


def test_pipeline_takes_the_checkpoints_task_and_thresholds(ours, image, complaints):
    segmenter = pipeline("image-segmentation", model=str(ours))
    outputs, processor, sizes = reference(ours, image)
    expected = processor.post_process_instance_segmentation(outputs, target_sizes=sizes, return_binary_maps=True)[0]
    assert len(expected["segments_info"]) >= 2
    result = segmenter(image)
    assert [segment["label"] for segment in result] == [
        NAMES[segment["label_id"]] for segment in expected["segments_info"]
    ]
    assert [segment["score"] for segment in result] == pytest.approx(
        [segment["score"] for segment in expected["segments_info"]]
    )
    for segment, mask in zip(result, expected["segmentation"], strict=True):
        assert segment["mask"].mode == "L"
        assert np.array_equal(np.asarray(segment["mask"]) > 0, mask.numpy())
    # what the caller gives still counts
    threshold = expected["segments_info"][0]["score"] - 1e-4
    assert len(segmenter(image, threshold=threshold)) == 1
    assert segmenter(image, threshold=1.0) == []
    assert complaints == []


def test_pipeline_subtasks(ours, image):
    segmenter = pipeline("image-segmentation", model=str(ours))
    outputs, processor, sizes = reference(ours, image)

    panoptic = processor.post_process_panoptic_segmentation(outputs, target_sizes=sizes)[0]
    assert panoptic["segments_info"]
    result = segmenter(image, subtask="panoptic")
    assert len(result) == len(panoptic["segments_info"])
    for segment, info in zip(result, panoptic["segments_info"], strict=True):
        assert segment["label"] == NAMES[info["label_id"]]
        assert np.array_equal(np.asarray(segment["mask"]) > 0, panoptic["segmentation"].numpy() == info["id"])

    semantic = processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)[0]
    result = segmenter(image, subtask="semantic")
    assert {segment["label"] for segment in result} == {NAMES[i] for i in semantic.unique().tolist()}
    assert sum(np.asarray(segment["mask"]).astype(bool).sum() for segment in result) == image.width * image.height
    assert all(segment["score"] is None for segment in result)

    with pytest.raises(ValueError, match="choose one of"):
        segmenter(image, subtask="depth")


@pytest.mark.parametrize("subtask", ["panoptic", "instance", "semantic"])
def test_pipeline_in_batches_of_any_sizes(ours, subtask):
    segmenter = pipeline("image-segmentation", model=str(ours))
    random = np.random.default_rng(4)
    images = [
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for height, width in ((50, 70), (90, 40), (30, 30), (41, 87), (50, 70))
    ]
    singly = [segmenter(image, subtask=subtask) for image in images]
    assert sum(map(len, singly)) >= len(images)
    for batch_size in (2, 5):
        batched = segmenter(images, subtask=subtask, batch_size=batch_size)
        for image, alone, together in zip(images, singly, batched, strict=True):
            assert [segment["label"] for segment in together] == [segment["label"] for segment in alone]
            for segment, expected in zip(together, alone, strict=True):
                assert segment["score"] == pytest.approx(expected["score"], abs=1e-4)
                assert segment["mask"].size == image.size
                differs = np.asarray(segment["mask"]) != np.asarray(expected["mask"])
                assert differs.mean() < 0.005  # a pixel at the threshold may fall on either side


def test_stock_folders_get_the_stock_classes_and_results(stock, image):
    assert type(AutoConfig.from_pretrained(stock)) is transformers.Mask2FormerConfig
    model = AutoModelForUniversalSegmentation.from_pretrained(stock)
    assert type(model) is transformers.Mask2FormerForUniversalSegmentation
    assert type(AutoModel.from_pretrained(stock)) is transformers.Mask2FormerModel
    processor = Mask2FormerImageProcessorPil.from_pretrained(stock)

    both = [
        cls(model=model, image_processor=processor, task="image-segmentation")
        for cls in (
            ImageSegmentationPipeline,
            type(pipeline("image-segmentation", model=model, image_processor=processor)),
        )
    ]
    assert type(both[1]) is not ImageSegmentationPipeline
    for arguments in ({}, {"subtask": "semantic"}, {"subtask": "instance", "threshold": 0.0}, {"threshold": 0.2}):
        theirs, through_ours = (segmenter(image, **arguments) for segmenter in both)
        assert len(theirs) == len(through_ours)
        for expected, segment in zip(theirs, through_ours, strict=True):
            assert segment["label"] == expected["label"]
            assert segment["score"] == expected["score"]
            assert segment["mask"].tobytes() == expected["mask"].tobytes()
    assert both[0](image, subtask="instance", threshold=0.0)


def look_up(folder):
    """Return the classes that the Auto classes find, and a sum of logits. Its source is also run in a process."""
    import torch
    import transformers
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    model = transformers.AutoModelForUniversalSegmentation.from_pretrained(folder)
    loaded = (model, AutoImageProcessor.from_pretrained(folder), transformers.AutoConfig.from_pretrained(folder))
    generator = torch.Generator().manual_seed(0)
    outputs = model.eval()(torch.randn(1, 3, 64, 64, generator=generator))
    classes = [f"{type(each).__module__}.{type(each).__name__}" for each in loaded]
    return [*classes, outputs.masks_queries_logits.double().sum().item()]


WITHOUT_OURS = """
import json, sys
answer = look_up(sys.argv[1])
assert "m2f_hf" not in sys.modules
print(json.dumps(answer))
sys.stderr.write("the import: ")
import m2f_hf
"""


def test_the_import_is_silent_and_changes_nothing_for_stock_folders(stock):
    """Compare a process that has not imported ours with this one, which has."""
    command = [sys.executable, "-c", inspect.getsource(look_up) + WITHOUT_OURS, stock]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    *classes, total = look_up(stock)
    *classes_without, total_without = json.loads(run.stdout)
    assert classes == classes_without
    assert total == pytest.approx(total_without, rel=1e-5)
    assert run.stderr.rpartition("the import: ")[1:] == ("the import: ", "")


def test_registering_again_changes_nothing(ours, complaints):
    m2f_hf.register()
    assert type(AutoModel.from_pretrained(ours)) is m2f_hf.Mask2FormerModel
    assert complaints == []


def test_other_segmentation_models_keep_their_pipeline(image):
    config = transformers.SegformerConfig(
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 8, 8, 8],
        decoder_hidden_size=8,
        num_attention_heads=[1, 1, 1, 1],
        num_labels=3,
    )
    model = transformers.SegformerForSemanticSegmentation(config).eval()
    from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil

    processor = SegformerImageProcessorPil(size={"height": 32, "width": 32})
    theirs = ImageSegmentationPipeline(model=model, image_processor=processor, task="image-segmentation")(image)
    ours = pipeline("image-segmentation", model=model, image_processor=processor)(image)
    assert (
        [(s["label"], s["mask"].tobytes()) for s in ours] == [(s["label"], s["mask"].tobytes()) for s in theirs] != []
    )
