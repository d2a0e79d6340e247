"""Runs of a model of a few thousand parameters, and what they left: shared by the tests of training."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny import BACKBONES, FIELDS

from m2f_hf import M2FImageProcessor, Mask2FormerConfig, Mask2FormerForUniversalSegmentation
from m2f_hf.data import CATEGORIES
from m2f_hf.metrics.options import parse_options
from m2f_hf.training import FinetuningArguments, finetune
from m2f_hf.training.checkpoints import read_log, save_model


SMALL = FIELDS | {
    "backbone_config": BACKBONES["resnet"],
    "encoder_layers": 1,
    "num_queries": 12,
    "train_num_points": 64,
}
del SMALL["num_labels"]
FROZEN = {**SMALL, "freeze_backbone_norm": True}
"""Batch norms see one process's batch, so splitting that changes them; the rest of the model does not care."""
COMMON = ["--image_size", "64", "--num_workers", "0", "--log_every", "1", "--eval_scenes", "3"]
COMMON += ["--learning_rate", "1e-3", "--warmup_steps", "1"]
SHAPES = ["--dataset", "shapes"]
TIMES = ("images_per_second", "memory_gb", "minutes_left")


def save_small_model(folder: Path) -> Path:
    """Write a checkpoint of the small model with the classes of the shapes, and return its folder."""
    torch.manual_seed(0)
    names = {category["id"]: category["name"] for category in CATEGORIES}
    model = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(**FROZEN, id2label=names))
    size = {"shortest_edge": 64, "longest_edge": 128}
    save_model(model, M2FImageProcessor(size=size, label_ids_to_fuse=[4, 5, 6]), folder)
    return folder


def arguments_of(*arguments: object) -> FinetuningArguments:
    return parse_options(FinetuningArguments, list(map(str, arguments)))


def train(*arguments: object) -> None:
    """Run in this process what `m2f train` runs."""
    finetune(arguments_of(*arguments))


def run(output: Path, *arguments: object) -> list[dict]:
    """Train in this process and return the rows of the log."""
    train(*COMMON, "--output", output, *arguments)
    return rows_of(output)


def rows_of(output: Path) -> list[dict]:
    """Return the log, without what the clock says."""
    rows = read_log(output / "training_log.jsonl")
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def losses(rows: list[dict]) -> list[dict]:
    return [row for row in rows if "loss" in row]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "best" / "model.safetensors")


def write_config(path: Path, fields: dict = SMALL) -> Path:
    path.write_text(json.dumps(fields))
    return path
