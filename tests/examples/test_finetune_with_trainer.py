"""examples/finetune_with_trainer.py, and that the Trainer learns what the model's own loss says."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments, pipeline

from m2f_hf import BUNDLED_MODEL, M2FImageProcessor, Mask2FormerConfig, Mask2FormerForUniversalSegmentation
from m2f_hf.data import CATEGORIES, ShapesDataset, write_coco_panoptic
from m2f_hf.data.augmentation import TrainingTransform
from m2f_hf.data.loading import CollateSamples, TrainingStream, to_model_inputs
from m2f_hf.known.recipes import default_recipe


sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import finetune_with_trainer


sys.path.pop(0)  # `evaluate.py` there would hide the library of that name


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_example_trains_saves_and_measures(tmp_path):
    """From the bundled checkpoint, on a folder with its classes but one, which it does not know."""
    categories = [{**entry, "name": "sky" if entry["name"] == "star" else entry["name"]} for entry in CATEGORIES]
    for seed, split in enumerate(("train", "validation")):
        write_coco_panoptic(ShapesDataset(3, 96, seed=seed), tmp_path / "data" / split, categories)
    arguments = ["--dataset", tmp_path / "data", "--model", BUNDLED_MODEL, "--output", tmp_path / "run"]
    figures = finetune_with_trainer.main([*map(str, arguments), "--batch_size", "2", "--steps", "2"])
    assert figures["pq_stuff"] > 0.3  # what the checkpoint knows was not lost on the way
    assert Mask2FormerConfig.from_pretrained(tmp_path / "run").id2label[3] == "sky"
    segments = pipeline("image-segmentation", model=str(tmp_path / "run"))(ShapesDataset(1, 96)[0]["image"])
    assert {segment["label"] for segment in segments} <= {category["name"] for category in categories}


def test_the_trainer_s_first_loss_is_the_model_s(tmp_path):
    """In evaluation mode the Trainer's loss of a batch is the model's."""
    model = Mask2FormerForUniversalSegmentation.from_pretrained(BUNDLED_MODEL)
    collate = CollateSamples(M2FImageProcessor())
    samples = TrainingStream(ShapesDataset(2, 64), TrainingTransform(default_recipe({"shortest_edge": 64})), seed=0)
    batch = to_model_inputs(collate([samples[0], samples[1]]))
    settings = TrainingArguments(output_dir=str(tmp_path), report_to="none", max_steps=1)
    trainer = Trainer(model=model, args=settings, train_dataset=samples)
    model.eval()
    torch.manual_seed(0)
    expected = model(**batch).loss
    torch.manual_seed(0)
    torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), expected)
