"""`m2f info`: what a checkpoint is, without its weights."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterator
from typing import Any

from .common import add_revision, command_errors, loading


# What training makes of an instance that is absent in the last frame of a clip.
_LABEL_FRAMES = {"any": "an instance keeps its class where it is absent", "last": "absent there is no object"}


def add_parser(commands: Any) -> None:
    """Add `info` to the subparsers of `m2f`."""
    info = commands.add_parser("info", help="describe a model without loading its weights")
    info.add_argument("model", metavar="MODEL", help="a model on the Hugging Face Hub or a folder")
    add_revision(info)
    info.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run `m2f info` with its parsed options and return the exit status."""
    from ..inference.loading import checkpoint_family

    with command_errors():
        family = checkpoint_family(options.model, options.revision)
    with loading(options.model):
        config = family.config.from_pretrained(options.model, revision=options.revision or "main")
        processor = family.processor.from_pretrained(options.model, revision=options.revision or "main")
    # Names stay whole, to be searched for and copied.
    wrapper = textwrap.TextWrapper(100, subsequent_indent=" " * 16, break_on_hyphens=False, break_long_words=False)
    for name, text in _describe(options.model, config, processor):
        wrapper.initial_indent = f"{name:<16}"
        print(wrapper.fill(text))
    return 0


def _describe(model: str, config: Any, processor: Any) -> Iterator[tuple[str, str]]:
    """Yield what there is to know before running a model: rows of (name, text)."""
    from ..hub.families import VIDEOS, label_names

    is_video = isinstance(config, VIDEOS.config)
    stuff_ids = set(processor.label_ids_to_fuse or ())
    labels = label_names(config)
    stuff = [label for label_id, label in labels.items() if label_id in stuff_ids]
    others = [label for label_id, label in labels.items() if label_id not in stuff_ids]
    backbone = config.backbone_config
    layout = [name for name in ("depths", "embed_dim", "hidden_size", "hidden_sizes") if hasattr(backbone, name)]
    edges = [f"{name.replace('_', ' ')} {length}" for name, length in dict(processor.size).items() if length]

    yield "model", model
    yield "type", config.model_type
    yield "task", f"video {processor.task}" if is_video else processor.task
    if stuff:
        yield "things", f"{len(others)}: {', '.join(others)}"
        yield "stuff", f"{len(stuff)}: {', '.join(stuff)}"
    else:
        yield "classes", f"{len(others)}: {', '.join(others)}"
    yield "queries", str(config.num_queries)
    yield "backbone", ", ".join([backbone.model_type, *(f"{name} {getattr(backbone, name)}" for name in layout)])
    yield "pixel decoder", config.pixel_decoder
    yield "decoder", f"{config.decoder_layers - 1} layers, width {config.hidden_dim}"
    yield "parameters", f"{_count_parameters(config):,}"
    yield "saved as", str(config.dtype or "float32").removeprefix("torch.")
    yield (
        "frame size" if is_video else "image size",
        f"{', '.join(sorted(edges, reverse=True))} pixels, {processor.channel_order}",
    )
    if is_video:
        frames = "a few" if config.frames_per_batch is None else config.frames_per_batch
        yield "frames", f"any number, of one size; backbone and pixel decoder read {frames} at a time"
        yield "label frame", f"{config.label_frame}: {_LABEL_FRAMES[config.label_frame]}"
        yield (
            "tracks",
            f"at most {processor.max_detections} in a clip, score at least {processor.instance_threshold}, mask "
            f"{processor.mask_threshold}",
        )
    else:
        yield (
            "thresholds",
            f"panoptic {processor.threshold}, instance {processor.instance_threshold}, mask "
            f"{processor.mask_threshold}, overlap {processor.overlap_mask_area_threshold}",
        )


def _count_parameters(config: Any) -> int:
    import torch

    from ..model.modeling import Mask2FormerForUniversalSegmentation

    with torch.device("meta"):
        model = Mask2FormerForUniversalSegmentation(config)
    return sum(parameter.numel() for parameter in model.parameters())
