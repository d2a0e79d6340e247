"""For the benchmarks: what is run, as a function without arguments, for an implementation and a setup."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmark_setup import (
    IMPLEMENTATIONS,
    NUM_LABELS,
    NUM_SEGMENTS,
    NUM_THINGS,
    OURS,
    PHOTO,
    SIZES,
    THEIRS,
    Implementation,
    Setup,
    four_thirds,
    full_pixel_mask,
)
from PIL import Image
from torch import Tensor


def prepare_forward(implementation: Implementation, setup: Setup, **inputs: Tensor) -> Callable[[], Any]:
    model, pixel_values = setup.model(implementation).eval(), setup.pixel_values()
    return torch.no_grad()(lambda: model(pixel_values, **inputs))


def prepare_pixel_mask(implementation: Implementation, setup: Setup) -> Callable[[], Any]:
    return prepare_forward(implementation, setup, pixel_mask=full_pixel_mask(setup))


def prepare_bf16(implementation: Implementation, setup: Setup) -> Callable[[], Any]:
    """Ours in bfloat16, theirs in float32."""
    if implementation.name == THEIRS.name:
        return prepare_forward(implementation, setup)
    model, pixel_values = setup.model(implementation, torch.bfloat16).eval(), setup.pixel_values()
    return torch.no_grad()(lambda: model(pixel_values))


def prepare_deformable(implementation: Implementation, setup: Setup) -> Callable[[], Any]:
    inputs = setup.attention_inputs()
    return torch.no_grad()(lambda: implementation.deformable_attention(*inputs))


def prepare_training(implementation: Implementation, setup: Setup) -> Callable[[], Any]:
    model = setup.model(implementation).train()
    inputs = {"pixel_values": setup.pixel_values(), **setup.labels(implementation)}

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(**inputs).loss.backward()

    return step


def prepare_post_processing(task: str, implementation: Implementation, setup: Setup) -> Callable[[], Any]:
    processor = implementation.processor_class()
    outputs = setup.segmentation_outputs()
    function = getattr(processor, f"post_process_{task}_segmentation")
    kwargs: dict[str, Any] = {"target_sizes": [(setup.result_height, four_thirds(setup.result_height))]}
    if task == "panoptic":
        kwargs |= {"threshold": 0.8, "label_ids_to_fuse": set(range(NUM_THINGS, NUM_LABELS))}
    elif task == "instance":
        kwargs |= {"threshold": 0.5}
    return lambda: function(outputs, **kwargs)


def photo_processor(implementation: Implementation, setup: Setup, equal_input: bool) -> Any:
    """The checkpoint's image processor as `from_pretrained` makes it; with `equal_input`, theirs resizes like ours."""
    edges = SIZES[setup.size].edges
    given = {} if edges is None else {"size": {"shortest_edge": edges[0], "longest_edge": edges[1]}}
    ours = OURS.processor_class.from_pretrained(setup.weights, **given)
    if implementation.name == OURS.name:
        return ours
    return implementation.processor_class.from_pretrained(
        setup.weights, **({"size": dict(ours.size)} if equal_input else {})
    )


def prepare_end_to_end(equal_input: bool, implementation: Implementation, setup: Setup) -> Callable[[], Any]:
    """From a JPEG file to panoptic segments of its own size, as each library's documentation does it."""
    model = setup.model(implementation).eval()
    processor = photo_processor(implementation, setup, equal_input)
    path = Path(setup.weights) / PHOTO
    num_found = min(NUM_SEGMENTS, setup.config().num_queries // 2)

    @torch.no_grad()
    def segment() -> Any:
        with Image.open(path) as photo:
            inputs = processor(images=photo, return_tensors="pt")
            target_sizes = [(photo.height, photo.width)]
        outputs = model(**inputs)
        # Random weights are sure of nothing, and post-processing would have nothing to do: some queries are made sure
        # of the class they lean to, the others of none.
        outputs.class_queries_logits[:, :num_found] *= 100
        outputs.class_queries_logits[:, :num_found, -1] -= 1000
        outputs.class_queries_logits[:, num_found:, -1] += 1000
        return processor.post_process_panoptic_segmentation(
            outputs,
            threshold=0.8,
            overlap_mask_area_threshold=0.0,  # masks of random weights overlap
            label_ids_to_fuse=set(range(NUM_THINGS, NUM_LABELS)),
            target_sizes=target_sizes,
        )

    return segment


def describe_end_to_end(equal_input: bool, setup: Setup) -> str:
    """What each network gets, and how much is found."""
    parts = []
    for name, implementation in IMPLEMENTATIONS.items():
        processor = photo_processor(implementation, setup, equal_input)
        with Image.open(Path(setup.weights) / PHOTO) as photo:
            height, width = processor(images=photo, return_tensors="pt")["pixel_values"].shape[-2:]
        segments = prepare_end_to_end(equal_input, implementation, setup)()[0]["segments_info"]
        parts.append(f"{height}×{width} and {len(segments)} segments ({name})")
    return "network input and result " + ", ".join(parts)
