"""Account for every key of the released checkpoints, without their weights, and print a table of it.

    python conversion/account_released.py state_dict_shapes.json.gz

The file has the keys and shapes of each checkpoint, named by the original's config with `_` for `/`:
`{"coco_panoptic-segmentation_maskformer2_R50_bs16_50ep": {"backbone.stem.conv1.weight": [64, 3, 7, 7], …}, …}`.
Models are built without storage, so it takes seconds.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from converter import is_unused
from detectron2_mapping import COUNTER, mapping_for, relative_position_index
from released import RELEASED, Released
from tqdm.auto import tqdm
from transformers import MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING
from transformers.core_model_loading import revert_weight_conversion

from m2f_hf import Mask2FormerConfig


Shape = tuple[int, ...]


class Account(NamedTuple):
    """Where the keys of a checkpoint go. `stored`, `checked` and `left` are its keys; the others are our model's.

    Args:
        stored: Keys whose values our model stores.
        checked: Keys of constants that our model computes itself (Swin's index tables), compared when converting.
        left: Keys that our model has no place for.
        filled: Constants of our model that the original doesn't keep (the batch counters of frozen norms).
        missing: What our model needs and the checkpoint doesn't have.
        reshaped: What has another shape on the two sides.
        parameters: How many numbers are trained or frozen in our model; buffers are not counted.
    """

    stored: list[str]
    checked: list[str]
    left: list[str]
    filled: list[str]
    missing: list[str]
    reshaped: list[str]
    parameters: int

    @property
    def is_complete(self) -> bool:
        return not (self.left or self.missing or self.reshaped)


def account(row: Released, shapes: Mapping[str, Sequence[int]]) -> Account:
    """Compare a checkpoint's keys and shapes with the model that the row's settings describe."""
    config: Any = row.config()
    missing, parameters = _model(config)
    left = dict(shapes)
    stored: list[str] = []
    checked: list[str] = []
    filled: list[str] = []
    reshaped: list[str] = []
    for source, targets in mapping_for(config):
        if source not in left and not source.endswith(COUNTER):
            continue  # its targets stay among the missing
        if targets:
            expected = [missing.pop(target, None) for target in targets]
        else:
            expected = [tuple(relative_position_index(config.backbone_config.window_size).shape)]
        if source not in left:
            filled += targets
            continue
        shape = left.pop(source)
        (stored if targets else checked).append(source)
        if any(part != _part(shape, len(expected)) for part in expected):
            reshaped.append(source)
    return Account(stored, checked, sorted(left), filled, sorted(missing), reshaped, parameters)


def read_shapes(path: Path) -> dict[str, dict[str, list[int]]]:
    """Read the keys and shapes of all released checkpoints, by our names.

    Raises:
        ValueError: A checkpoint is not in the file.
    """
    by_config = json.loads(gzip.decompress(path.read_bytes()))
    names = {name: row.config_path.removesuffix(".yaml").replace("/", "_") for name, row in RELEASED.items()}
    absent = [name for name, config in names.items() if config not in by_config]
    if absent:
        raise ValueError(f"{path} has no keys of {', '.join(absent)}.")
    return {name: by_config[config] for name, config in names.items()}


def _model(config: Mask2FormerConfig) -> tuple[dict[str, Shape], int]:
    """Return the shapes by name that our model saves, and its number of parameters."""
    with torch.device("meta"):
        model = MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING[type(config)](config)
    saved = revert_weight_conversion(model, model.state_dict())
    shapes = {name: tuple(value.shape) for name, value in saved.items() if not is_unused(name)}
    return shapes, sum(parameter.numel() for parameter in model.parameters())


def _part(shape: Sequence[int], parts: int) -> Shape:
    """Return the shape of one of `parts` equal parts along the first dimension, or (-1,) where it does not divide."""
    if parts == 1:
        return tuple(shape)
    return (shape[0] // parts, *shape[1:]) if shape and shape[0] % parts == 0 else (-1,)


def main(arguments: list[str] | None = None) -> int:
    """Print the table (Markdown); return 1 if a key of any checkpoint has no place or a place no key, else 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("shapes", type=Path, help="keys and shapes of the released checkpoints, .json.gz")
    try:
        shapes = read_shapes(parser.parse_args(arguments).shapes)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    columns = ("checkpoint", "keys", "stored", "checked", "left", "missing", "reshaped", "filled", "parameters", "s")
    print(f"| {' | '.join(columns)} |", f"|---{'|---:' * (len(columns) - 1)}|", sep="\n")
    complete = True
    for name, row in tqdm(RELEASED.items(), desc="checkpoints", disable=None):
        start = time.perf_counter()
        result = account(row, shapes[name])
        counts = [len(getattr(result, column)) for column in columns[2:8]]
        cells = [name, len(shapes[name]), *counts, f"{result.parameters:,}", f"{time.perf_counter() - start:.1f}"]
        tqdm.write(f"| {' | '.join(map(str, cells))} |")
        complete &= result.is_complete
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
