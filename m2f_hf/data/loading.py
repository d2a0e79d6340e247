"""Batches for training and evaluation: the same images in a step in every run, process and worker."""

import itertools
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from ..known.recipes import SizeSchedule
from ..processing.video_processor import Mask2FormerVideoProcessor
from .augmentation import pack_masks, unpack_masks
from .clips import CollateClips
from .hub_datasets import StreamingDataset


SHUFFLE_BUFFER = 1000
"""Rows of a stream that the next one is drawn from."""


class StepSampler(Sampler[list[int]]):
    """Yields one process's batches of positions in the endless sequence of images, from step `first` to `last`.

    A step has `accumulation * num_processes * batch_size` images in a row, the same ones however it is split over
    processes and accumulated batches.

    Args:
        first, last: steps, counted from 0, the last exclusive.
        batch_size: images of one batch of one process.
        accumulation: batches of one process in a step.
        process, num_processes: position among how many.
    """

    def __init__(
        self, first: int, last: int, batch_size: int, accumulation: int = 1, process: int = 0, num_processes: int = 1
    ) -> None:
        self.first, self.last = first, last
        self.batch_size, self.accumulation = batch_size, accumulation
        self.process, self.num_processes = process, num_processes

    @property
    def images_per_step(self) -> int:
        """Number of images of all processes in a step."""
        return self.batch_size * self.accumulation * self.num_processes

    def first_image(self, index: int) -> int:
        """Return the position in a step of the first image of this process's batch `index` of the step."""
        return (index * self.num_processes + self.process) * self.batch_size

    def __len__(self) -> int:
        return (self.last - self.first) * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        for step, index in itertools.product(range(self.first, self.last), range(self.accumulation)):
            start = step * self.images_per_step + self.first_image(index)
            yield list(range(start, start + self.batch_size))


class TrainingStream(Dataset[dict[str, Any]]):
    """An endless sequence of training samples: each epoch a new permutation of the images, each a new random sample.

    A position gives the same sample in every run with the same seed, whatever came before.

    Args:
        dataset: items as the readers of `m2f_hf.data` give them, with a length.
        transform: makes samples of them: a `TrainingTransform`, or a `ClipTransform` for videos.
        seed: of the order and the samples.
        sizes: shorter side of the samples over training, if not the recipe's throughout.
        images_per_step, total_steps: for `sizes`.
    """

    def __init__(
        self,
        dataset: Any,
        transform: Callable[[Mapping[str, Any], np.random.Generator, int | None], dict[str, Any]],
        seed: int,
        sizes: SizeSchedule | None = None,
        images_per_step: int = 1,
        total_steps: int = 1,
    ) -> None:
        self.dataset, self.transform, self.seed = dataset, transform, seed
        self.sizes, self.images_per_step, self.total_steps = sizes, images_per_step, total_steps
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def __getitem__(self, position: int) -> dict[str, Any]:
        epoch, offset = divmod(position, len(self.dataset))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng((self.seed, epoch)).permutation(len(self.dataset))
        return self.sample(self.dataset[int(self._order[offset])], position, (self.seed, epoch, offset))

    def sample(self, item: Mapping[str, Any], position: int, key: tuple[int, ...]) -> dict[str, Any]:
        """Make the sample of an item at a position; everything random comes from `key`."""
        step = position // self.images_per_step
        size = None if self.sizes is None else self.sizes.size_at(step, self.total_steps)
        sample = self.transform(item, np.random.default_rng(key), size)
        return {**sample, "file_name": str(item.get("file_name", item.get("image_id")))}


class StreamedBatches(IterableDataset[dict[str, Any]]):
    """The batches of a sampler from a stream (`samples.dataset`), which is read from front to back, again and again.

    Rows are shuffled within a buffer. To start at a later step, earlier rows are read and dropped.
    """

    def __init__(self, samples: TrainingStream, sampler: StepSampler, collate: "CollateSamples") -> None:
        self.samples, self.sampler, self.collate = samples, sampler, collate

    def __iter__(self) -> Iterator[dict[str, Any]]:
        items = enumerate(self._items())
        for positions in self.sampler:
            wanted = [next(pair for pair in items if pair[0] == position) for position in positions]
            yield self.collate([self.samples.sample(item, place, (self.samples.seed, place)) for place, item in wanted])

    def _items(self) -> Iterator[dict[str, Any]]:
        stream: StreamingDataset = self.samples.dataset
        rows = stream.rows.shuffle(seed=self.samples.seed, buffer_size=SHUFFLE_BUFFER)
        for epoch in itertools.count():
            rows.set_epoch(epoch)
            is_empty = True
            for item in StreamingDataset(rows, stream.reader):
                is_empty = False
                yield item
            if is_empty:
                raise ValueError("The stream of training images is empty.")


class CollateSamples:
    """Turns training samples, images or clips as the processor's, into the model's inputs, with masks as bits."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        inputs = {**self._inputs(samples)}
        packed = [torch.from_numpy(pack_masks(masks.numpy())) for masks in inputs.pop("mask_labels")]
        return {**inputs, "packed_masks": packed, "file_names": [sample["file_name"] for sample in samples]}

    def _inputs(self, samples: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        if isinstance(self.processor, Mask2FormerVideoProcessor):
            return CollateClips(self.processor)(samples)
        return self.processor(
            [sample["image"] for sample in samples],
            mask_labels=[sample["mask_labels"] for sample in samples],
            class_labels=[sample["class_labels"] for sample in samples],
            do_resize=False,
            return_tensors="pt",
        )


def to_model_inputs(batch: Mapping[str, Any], device: torch.device | str = "cpu") -> dict[str, Any]:
    """Turn a batch of `CollateSamples` into arguments of the model: masks (N, [T,] H, W) bool, all on `device`."""
    pixels = "pixel_values" if "pixel_values" in batch else "pixel_values_videos"
    width = batch[pixels].shape[-1]

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True)

    return {
        pixels: move(batch[pixels]),
        "pixel_mask": move(batch["pixel_mask"]),
        "mask_labels": [unpack_masks(move(masks), width) for masks in batch["packed_masks"]],
        "class_labels": [move(labels) for labels in batch["class_labels"]],
    }


class CollateItems:
    """Turns a list of items into the model's inputs without labels, and the items, to measure with."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, items: list[dict[str, Any]]) -> tuple[Any, list[dict[str, Any]]]:
        images = [list(item["frames"]) if "frames" in item else item["image"] for item in items]
        return self.processor(images, return_tensors="pt"), items


def training_loader(
    samples: TrainingStream, sampler: StepSampler, processor: Any, num_workers: int
) -> DataLoader[dict[str, Any]]:
    """Load this process's batches, in order, the same with any number of workers. A stream has exactly one worker."""
    collate = CollateSamples(processor)
    common: dict[str, Any] = {"worker_init_fn": ignore_sigterm, "pin_memory": torch.cuda.is_available()}
    if isinstance(samples.dataset, StreamingDataset):
        batches = StreamedBatches(samples, sampler, collate)
        # `datasets` shuffles otherwise outside of a worker, and shares rows out among several.
        return DataLoader(batches, batch_size=None, num_workers=1, **common)
    return DataLoader(samples, batch_sampler=sampler, collate_fn=collate, num_workers=num_workers, **common)


def evaluation_loader(
    dataset: Any, processor: Any, batch_size: int, process: int = 0, num_processes: int = 1
) -> DataLoader[Any]:
    """Load a process's share of a data set, as pairs of inputs and items; shares may differ by one image, or be empty.

    Batches have one video, as others have other lengths.
    """
    batch_size = 1 if isinstance(processor, Mask2FormerVideoProcessor) else batch_size
    share = torch.utils.data.Subset(dataset, range(process, len(dataset), num_processes))
    return DataLoader(share, batch_size=batch_size, collate_fn=CollateItems(processor))


def ignore_sigterm(worker: int) -> None:
    """Ignore SIGTERM in a worker: it is often sent to the whole process group, and the last step needs the workers."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
