"""Turn a checkpoint of the original Mask2Former (detectron2) into a folder that `from_pretrained` reads.

    python conversion/convert_detectron2.py --checkpoint model.pkl --config-file config.yaml --output DIR

Every parameter of the original is accounted for, or nothing is written. Neither the checkpoint nor the config can run
code. Reading the config needs PyYAML (`pip install 'm2f_hf[convert]'`).
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from detectron2_config import config_from_yaml, processor_from_yaml, read_config, read_labels
from detectron2_mapping import constants, convert_state_dict
from huggingface_hub.errors import StrictDataclassError
from safe_pickle import load_state_dict
from safetensors import safe_open

from m2f_hf import Mask2FormerConfig, Mask2FormerForUniversalSegmentation
from m2f_hf.image_processing_mask2former import M2FImageProcessor


# Some versions of transformers build and save a last norm of the Swin classifier, which a backbone never uses.
_UNUSED = re.compile(r"\.pixel_level_module\.encoder\.(swin\.)?layernorm\.(weight|bias)$")


class Report(NamedTuple):
    """What a conversion did: tensors read, tensors and parameters written, and constants only one side keeps."""

    read: int
    written: int
    parameters: int
    filled: list[str]
    checked: list[str]

    def __str__(self) -> str:
        return (
            f"{self.read} tensors read, none left over: {len(self.checked)} constants checked, the others written. "
            f"{self.written} tensors written ({self.parameters:,} parameters), of which {len(self.filled)} are "
            "constants that the original doesn't keep."
        )


def convert(checkpoint: Path, config_file: Path, output: Path, labels_file: Path | None = None) -> Report:
    """Convert one checkpoint.

    Args:
        checkpoint: The original's `.pkl` or `.pth`.
        config_file: The YAML it was trained with.
        output: The folder to make; it must not exist, or be empty.
        labels_file: Names of the classes, and which are things (JSON; see `read_labels`).

    Raises:
        FileExistsError: `output` has something in it.
        UnsupportedOptionError, UnsafeCheckpointError, ValueError, OSError: see `read_config`, `read_labels`,
            `load_state_dict` and `convert_state_dict`. Nothing is written then.
        StrictDataclassError: the config has a value that no model can be built with.
    """
    output = output.resolve()
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise FileExistsError(f"{output} exists already. Give an --output that doesn't, or remove it first.")
    options = read_config(config_file)
    labels = read_labels(labels_file, options["MODEL.SEM_SEG_HEAD.NUM_CLASSES"]) if labels_file else None
    config = Mask2FormerConfig(**config_from_yaml(options, labels))
    processor = M2FImageProcessor(**processor_from_yaml(options, labels))
    original = load_state_dict(checkpoint)
    converted = convert_state_dict(original, config)
    model = _load_strictly(converted, config)

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as temporary:
        folder = Path(temporary) / output.name
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        unused = _check_written(folder / "model.safetensors", converted)
        os.replace(folder, output)
    filled, checked = constants(original, config)
    return Report(
        read=len(original),
        written=len(converted) + len(unused),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        filled=filled + unused,
        checked=checked,
    )


def is_unused(name: str) -> bool:
    """Whether a parameter of this (on disk) name plays no part in the model, so that the original has none like it."""
    return _UNUSED.search(name) is not None


def _load_strictly(
    converted: Mapping[str, torch.Tensor], config: Mask2FormerConfig
) -> Mask2FormerForUniversalSegmentation:
    model, loading = Mask2FormerForUniversalSegmentation.from_pretrained(
        None, config=config, state_dict=dict(converted), output_loading_info=True, ignore_mismatched_sizes=True
    )
    missing = [name for name in loading["missing_keys"] if not is_unused(name)]
    if missing or loading["unexpected_keys"] or loading["mismatched_keys"] or loading["error_msgs"]:
        raise ValueError(
            "The checkpoint does not fill the model its config describes. "
            f"Missing: {sorted(missing)[:5]}; unexpected: {sorted(loading['unexpected_keys'])[:5]}; "
            f"other shapes: {list(loading['mismatched_keys'])[:5]}; {loading['error_msgs'][:5]}"
        )
    return model


def _check_written(path: Path, expected: Mapping[str, torch.Tensor]) -> list[str]:
    """Compare the file with what was converted, to the bit; give the names of unused parameters it has besides."""
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        different = [
            name for name in expected if name not in names or not torch.equal(file.get_tensor(name), expected[name])
        ]
    besides = sorted(names - set(expected))
    if different or not all(is_unused(name) for name in besides):
        raise ValueError(
            f"The folder written is not what was converted: {different[:5]} differ, {besides[:5]} are new."
        )
    return besides


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; give the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="the original's .pkl or .pth")
    parser.add_argument("--config-file", type=Path, required=True, help="the YAML it was trained with")
    parser.add_argument("--output", type=Path, required=True, help="the folder to make")
    parser.add_argument("--labels", type=Path, help='JSON list of {"id": 0, "name": "cat", "isthing": true}')
    options = parser.parse_args(arguments)
    try:
        report = convert(options.checkpoint, options.config_file, options.output, options.labels)
    except (ValueError, OSError, ImportError, StrictDataclassError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.output}: {report}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
