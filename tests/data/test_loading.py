"""Which images a step sees, the same in every run, process and worker; batches as the model takes them."""

import numpy as np
import torch
from PIL import Image

from m2f_hf import M2FImageProcessor
from m2f_hf.data import ShapesDataset, SizeSchedule, TrainingTransform, default_recipe, open_dataset
from m2f_hf.data.loading import CollateSamples, StepSampler, TrainingStream, to_model_inputs, training_loader


def stream_of(num_images: int, seed: int, **more) -> TrainingStream:
    recipe = default_recipe({"shortest_edge": 32})
    return TrainingStream(ShapesDataset(num_images, 32), TrainingTransform(recipe), seed, **more)


def test_places_in_the_stream_depend_on_the_seed_alone():
    """Each epoch shows every item once, in an order of its own; reading out of order changes nothing."""
    stream, other = stream_of(5, seed=1), stream_of(5, seed=1)
    samples = [stream[position] for position in range(15)]
    epochs = [[sample["file_name"] for sample in samples[start : start + 5]] for start in (0, 5, 10)]
    assert all(len(set(epoch)) == 5 for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1
    for position in (12, 3, 7):
        again = other[position]
        for name in ("image", "mask_labels", "class_labels"):
            assert np.array_equal(again[name], samples[position][name])
    assert not np.array_equal(stream_of(5, seed=2)[3]["image"], samples[3]["image"])


def test_processes_and_accumulated_batches_share_each_step():
    """Every process and batch sees its own of the step's images."""
    one = list(StepSampler(3, 6, 8))
    halves = [list(StepSampler(3, 6, 2, 2, process, 2)) for process in range(2)]
    for step in range(3):
        parts = [batch for half in halves for batch in half[2 * step : 2 * step + 2]]
        assert sorted(position for batch in parts for position in batch) == one[step]
    sampler = StepSampler(3, 6, 2, 2, 1, 2)
    assert len(sampler) == 6 and sampler.images_per_step == 8
    for index, batch in enumerate(sampler):
        assert batch[0] == (3 + index // 2) * 8 + sampler.first_image(index % 2)


def test_samples_grow_over_training():
    sizes = SizeSchedule.parse("0:32,0.5:64")
    stream = stream_of(4, seed=0, sizes=sizes, images_per_step=2, total_steps=4)
    assert [stream[position]["image"].shape[0] for position in range(8)] == [32] * 4 + [64] * 4


def test_batches_are_the_samples_as_the_model_takes_them():
    samples = [stream_of(4, seed=0)[position] for position in range(2)]
    inputs = to_model_inputs(CollateSamples(M2FImageProcessor())(samples))
    assert inputs["pixel_values"].shape == (2, 3, 32, 32)
    for masks, labels, sample in zip(inputs["mask_labels"], inputs["class_labels"], samples, strict=True):
        assert masks.dtype == torch.bool and np.array_equal(masks.numpy(), sample["mask_labels"])
        assert labels.tolist() == sample["class_labels"].tolist()


def test_a_stream_of_rows_starts_at_any_step(tmp_path):
    """Two epochs of a table read as a stream: starting later gives the same batches."""
    from datasets import Dataset, Features
    from datasets import Image as ImageFeature

    rows = {"image": [], "label": []}
    for index, scene in enumerate(ShapesDataset(4, 64)[index] for index in range(4)):
        pictures = {"image": scene["image"], "label": Image.fromarray((scene["segmentation_map"] % 2).astype(np.uint8))}
        for name, picture in pictures.items():
            picture.save(tmp_path / f"{name}{index}.png")
            rows[name].append(str(tmp_path / f"{name}{index}.png"))
    table = Dataset.from_dict(rows, features=Features({"image": ImageFeature(), "label": ImageFeature()}))
    found = open_dataset(table.to_iterable_dataset(), labels=["ground", "thing"], held_out=0)
    transform = TrainingTransform(default_recipe({"shortest_edge": 32}))
    samples = TrainingStream(found.train, transform, seed=0)

    def batches(first, workers):
        loader = training_loader(samples, StepSampler(first, 4, 2), M2FImageProcessor(), workers)
        return [batch["pixel_values"] for batch in loader]

    whole, later = batches(0, 0), batches(3, 4)
    assert len(whole) == 4 and not torch.equal(whole[0], whole[2])
    assert len(later) == 1 and torch.equal(later[0], whole[3])
