"""Turn a model of ours into a folder that plain `transformers` reads as its own Mask2Former.

    python conversion/export_to_transformers.py FOLDER_OR_ID --output DIR

Nothing is written unless every tensor is the same to the bit and both models give the same output for a random image.
What stock Mask2Former cannot express is refused by name; what it has no field for (task, thresholds, colours) is
reported.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import Mask2FormerConfig as StockConfig
from transformers import Mask2FormerForUniversalSegmentation as StockModel
from transformers import PreTrainedConfig

from m2f_hf import M2FImageProcessor, Mask2FormerConfig, Mask2FormerForUniversalSegmentation
from m2f_hf.known.lookup import find_config


CHECK_SIZE = (96, 128)  # of the random image both models see
MAX_DIFFERENCE = 1e-3  # of their outputs, as a share of the outputs' norm: single attention masks may flip by rounding
# What `transformers`' image processor has a setting for; the rest of ours it takes as arguments, or not at all.
PROCESSOR_SETTINGS = (
    "do_resize",
    "size",
    "size_divisor",
    "resample",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "do_pad",
    "pad_size",
    "ignore_index",
    "do_reduce_labels",
)


class NotExpressibleError(ValueError):
    """The model has something that `transformers`' Mask2Former has not."""


class Report(NamedTuple):
    """What an export did: tensors and parameters written, largest differences of the outputs, what was left out."""

    tensors: int
    parameters: int
    class_difference: float
    mask_difference: float
    notes: list[str]

    def __str__(self) -> str:
        notes = "".join(f"\nnote: {note}" for note in self.notes)
        return (
            f"{self.tensors} tensors written ({self.parameters:,} parameters), equal to the bit. On a random image of "
            f"{CHECK_SIZE[0]}x{CHECK_SIZE[1]} the class logits differ by at most {self.class_difference:.1e}, the mask "
            f"logits by {self.mask_difference:.1e}.{notes}"
        )


@contextmanager
def _without_backbone_warning() -> Iterator[None]:
    """Suppress the warning that stock configs give for every backbone but Swin; the outputs are compared here."""

    def is_another(record: logging.LogRecord) -> bool:
        return "is not a supported model and may not be compatible" not in record.getMessage()

    logger = logging.getLogger(StockConfig.__module__)
    logger.addFilter(is_another)
    try:
        yield
    finally:
        logger.removeFilter(is_another)


@_without_backbone_warning()
def export(source: str, output: Path) -> Report:
    """Export one model.

    Args:
        source: folder, or id on the Hub, of an image model of ours with its image processor.
        output: the folder to make; it must not exist, or be empty.

    Raises:
        FileExistsError: `output` has something in it.
        NotExpressibleError: stock Mask2Former has no such model; the message names what is in the way.
        ValueError: `source` is no model of ours, or what was written is not what was read. Nothing is left then.
        OSError: there is no such folder or id, or a file is missing from it.
    """
    output = output.resolve()
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise FileExistsError(f"{output} exists already. Give an --output that doesn't, or remove it first.")
    _check_model_type(source)
    config = Mask2FormerConfig.from_pretrained(source)
    stock_config = to_stock_config(config)
    processor = M2FImageProcessor.from_pretrained(source)
    ours, loading = Mask2FormerForUniversalSegmentation.from_pretrained(source, output_loading_info=True)
    if loading["missing_keys"] or loading["unexpected_keys"]:
        raise ValueError(
            f"{source} does not fill the model its config describes. Missing: {sorted(loading['missing_keys'])[:5]}; "
            f"unexpected: {sorted(loading['unexpected_keys'])[:5]}"
        )
    tensors = stock_tensors(ours, processor.channel_order)

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as temporary:
        folder = Path(temporary) / output.name
        _write_model(folder, stock_config, tensors)
        settings = to_stock_processor(processor, stock_config)
        (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        differences = _check_written(folder, tensors, ours, processor.channel_order)
        os.replace(folder, output)
    return Report(
        tensors=len(tensors),
        parameters=sum(parameter.numel() for parameter in ours.parameters()),
        class_difference=differences[0],
        mask_difference=differences[1],
        notes=notes_on_losses(config, processor),
    )


def _check_model_type(source: str) -> None:
    find_config(source)
    settings, _ = PreTrainedConfig.get_config_dict(source)
    model_type = settings.get("model_type")
    if model_type == StockConfig.model_type:
        raise ValueError(f"{source} is a checkpoint of `transformers`' Mask2Former already.")
    if model_type == "m2f_video":
        raise NotExpressibleError(f"{source} is a video model; `transformers`' Mask2Former takes images alone.")
    if model_type != Mask2FormerConfig.model_type:
        raise ValueError(
            f"{source} has the model type {model_type!r}, not {Mask2FormerConfig.model_type!r}: give a folder that "
            "`save_pretrained` or conversion/convert_detectron2.py wrote."
        )


def to_stock_config(config: Mask2FormerConfig) -> StockConfig:
    """Return the same configuration in `transformers`' fields.

    Raises:
        NotExpressibleError: there is no such model there.
    """
    if config.pixel_decoder != "msdeform":
        raise NotExpressibleError(
            f"`pixel_decoder`={config.pixel_decoder!r}: `transformers`' Mask2Former has the deformable pixel decoder "
            "('msdeform') alone."
        )
    stock_fields = {field.name: field for field in fields(StockConfig)}
    settings = config.to_dict()
    for name in [field.name for field in fields(Mask2FormerConfig) if field.name not in stock_fields]:
        settings.pop(name, None)
    for name in ("model_type", "architectures", "transformers_version", "auto_map"):
        settings.pop(name, None)
    for name, field in stock_fields.items():
        # Ours takes whole numbers for these, the stock one refuses them.
        if field.type is float and name in settings:
            settings[name] = float(settings[name])
    return StockConfig(**settings)


def to_stock_processor(processor: M2FImageProcessor, config: StockConfig) -> dict[str, Any]:
    """Return the settings of `preprocessor_config.json` for `transformers`' Mask2Former image processor."""
    settings = processor.to_dict()
    stock = {name: settings[name] for name in PROCESSOR_SETTINGS if settings.get(name) is not None}
    if processor.channel_order == "BGR":
        for name in ("image_mean", "image_std"):
            if isinstance(stock.get(name), list | tuple):
                stock[name] = list(stock[name])[::-1]
    return {"image_processor_type": "Mask2FormerImageProcessor", "num_labels": config.num_labels, **stock}


def stock_tensors(model: Mask2FormerForUniversalSegmentation, channel_order: str) -> dict[str, Tensor]:
    """Return the parameters and buffers of the stock model, by their names in memory, which are ours.

    Stock processors give RGB: a model of BGR gets its first convolution's input channels in reverse.
    """
    tensors = dict(model.state_dict())
    if channel_order == "BGR":
        backbone = model.model.pixel_level_module.encoder
        name, first = next((n, m) for n, m in backbone.named_modules() if isinstance(m, nn.Conv2d))
        name = f"model.pixel_level_module.encoder.{name}.weight"
        assert first.in_channels == 3 and name in tensors
        tensors[name] = tensors[name].flip(1)
    return tensors


def _write_model(folder: Path, config: StockConfig, tensors: dict[str, Tensor]) -> None:
    with torch.device("meta"):
        stock = StockModel(config)
    expected = stock.state_dict().keys()
    if tensors.keys() != expected:
        raise NotExpressibleError(
            "the installed `transformers` builds another model from this configuration. It lacks "
            f"{sorted(tensors.keys() - expected)[:5]} and also has {sorted(expected - tensors.keys())[:5]}. "
            "(Some releases don't save `input_projections`, which `feature_size` other than `hidden_dim` and "
            "`enforce_input_projection` need: install a newer one.)"
        )
    stock.load_state_dict(tensors, assign=True)
    stock.save_pretrained(folder)


def _check_written(
    folder: Path, tensors: dict[str, Tensor], ours: Mask2FormerForUniversalSegmentation, channel_order: str
) -> tuple[float, float]:
    """Read the folder as stock `transformers` does, and compare tensors to the bit and outputs on a random image.

    Returns:
        The largest differences of class logits and of mask logits.
    """
    stock, loading = StockModel.from_pretrained(folder, output_loading_info=True)
    problems = {kind: sorted(keys)[:5] for kind, keys in loading.items() if keys}
    different = [name for name, tensor in stock.state_dict().items() if not torch.equal(tensor, tensors[name])]
    if problems or different:
        raise ValueError(f"`transformers` reads something else from the folder written: {problems}; {different[:5]}")
    pixel_values = torch.randn(1, 3, *CHECK_SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = stock.float().eval()(pixel_values)
        mine = ours.float().eval()(pixel_values.flip(1) if channel_order == "BGR" else pixel_values)
    largest = []
    for name in ("class_queries_logits", "masks_queries_logits"):
        difference = theirs[name] - mine[name]
        if not difference.norm() <= MAX_DIFFERENCE * mine[name].norm():
            raise ValueError(
                f"`transformers` gives other {name} than ours: the difference has the norm {difference.norm():.2g}, "
                f"the logits {mine[name].norm():.2g}."
            )
        largest.append(difference.abs().max().item())
    return largest[0], largest[1]


def notes_on_losses(config: Mask2FormerConfig, processor: M2FImageProcessor) -> list[str]:
    """Return notes on what the stock folder cannot hold, and what `transformers` does instead."""
    stuff = "None" if processor.label_ids_to_fuse is None else f"{{{', '.join(map(str, processor.label_ids_to_fuse))}}}"
    notes = [
        f"stock processors don't know the task ({processor.task}) nor its settings. Pass them: "
        f"`post_process_panoptic_segmentation(threshold={processor.threshold}, "
        f"mask_threshold={processor.mask_threshold}, "
        f"overlap_mask_area_threshold={processor.overlap_mask_area_threshold}, label_ids_to_fuse={stuff})`, "
        f"`post_process_instance_segmentation(threshold={processor.instance_threshold})`.",
        f"stock processors stretch an image to multiples of {processor.size_divisor}; ours pads.",
    ]
    if processor.channel_order == "BGR":
        notes.append("the model took BGR; its first convolution was reversed, so that the stock one takes RGB.")
    if getattr(config, "label_colors", None):
        notes.append("`label_colors`: stock configurations have no colours.")
    if config.freeze_backbone_norm:
        notes.append("`freeze_backbone_norm`: stock models train the backbone's batch norms.")
    if config.feature_size != config.hidden_dim or config.enforce_input_projection:
        notes.append("older releases of `transformers` (5.17, for example) lose the `input_projections` of this model.")
    return notes


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", metavar="FOLDER_OR_ID", help="a model of ours: a folder, or an id on the Hub")
    parser.add_argument("--output", type=Path, required=True, help="the folder to make")
    options = parser.parse_args(arguments)
    try:
        report = export(options.source, options.output)
    except (ValueError, OSError, StrictDataclassError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.output}: {report}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
