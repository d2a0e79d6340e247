"""Tiny models, inputs and labels that all tests share: a few thousand parameters, 64 x 96 pixels."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from m2f_hf import (
    M2FImageProcessor,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerForVideoSegmentation,
    Mask2FormerVideoConfig,
)


SIZE = (64, 96)  # height, width
STAGES = ["stage1", "stage2", "stage3", "stage4"]
BACKBONES = {
    "swin": {
        "model_type": "swin",
        "embed_dim": 8,
        "depths": [1, 1, 2, 1],
        "num_heads": [1, 1, 2, 2],
        "window_size": 3,
        "drop_path_rate": 0.0,
        "out_features": STAGES,
    },
    "resnet": {
        "model_type": "resnet",
        "embedding_size": 8,
        "hidden_sizes": [8, 12, 16, 20],
        "depths": [1, 1, 1, 1],
        "layer_type": "basic",
        "out_features": STAGES,
    },
}
# Widths differ wherever the architecture lets them, so that none can stand in for another.
FIELDS = {
    "feature_size": 32,
    "mask_feature_size": 20,
    "hidden_dim": 32,
    "num_attention_heads": 2,
    "encoder_layers": 2,
    "encoder_feedforward_dim": 24,
    "decoder_layers": 4,  # one for each scale: with fewer, a scale's projection has no gradient
    "dim_feedforward": 40,
    "num_queries": 6,
    "train_num_points": 20,
    "num_labels": 3,
}
VIDEO_FIELDS = FIELDS | {
    "mask_feature_size": 32,
    "encoder_layers": 1,
    "encoder_feedforward_dim": 32,
    "dim_feedforward": 32,
    "num_labels": 5,
    "train_num_points": 64,
}


# Models


def tiny_config(backbone: str = "resnet", **fields) -> Mask2FormerConfig:
    """Return the configuration of a tiny image model; `fields` replace those of `FIELDS`."""
    return Mask2FormerConfig(**({"backbone_config": dict(BACKBONES[backbone])} | FIELDS | fields))


def tiny_model(backbone: str = "resnet", seed: int = 0, **fields) -> Mask2FormerForUniversalSegmentation:
    """Return a tiny image model in evaluation mode, with every tensor off its initial value."""
    torch.manual_seed(seed)
    return shake(Mask2FormerForUniversalSegmentation(tiny_config(backbone, **fields)), seed).eval()


def tiny_video_config(backbone: str = "resnet", **fields) -> Mask2FormerVideoConfig:
    """Return the configuration of a tiny video model; `fields` replace those of `VIDEO_FIELDS`."""
    return Mask2FormerVideoConfig(**({"backbone_config": dict(BACKBONES[backbone])} | VIDEO_FIELDS | fields))


def tiny_video_model(backbone: str = "resnet", **fields) -> Mask2FormerForVideoSegmentation:
    """Return a tiny video model in evaluation mode whose masks differ, and change from frame to frame."""
    torch.manual_seed(0)
    model = Mask2FormerForVideoSegmentation(tiny_video_config(backbone, **fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model


def shake(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Move every parameter and statistic off its initial value, so that none can be ignored unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and not name.endswith("empty_weight"):
                noise = torch.randn(tensor.shape, generator=generator) * 0.1
                tensor.add_(noise.abs() if name.endswith("running_var") else noise)
    return model


def save_tiny_model(folder: Path, backbone: str = "resnet", processor: dict | None = None, **fields) -> Path:
    """Write a tiny image model and its processor to a folder, and return the folder."""
    tiny_model(backbone, **fields).save_pretrained(folder)
    M2FImageProcessor(**(processor or {})).save_pretrained(folder)
    return folder


# Inputs and labels


def images(batch: int = 2, size: tuple[int, int] = SIZE, seed: int = 0) -> torch.Tensor:
    """Return random pixel values, (batch, 3, height, width)."""
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


def clips(batch: int = 1, frames: int = 3, size: tuple[int, int] = SIZE, seed: int = 1) -> torch.Tensor:
    """Return random pixel values of clips, (batch, frames, 3, height, width)."""
    return torch.randn(batch, frames, 3, *size, generator=torch.Generator().manual_seed(seed))


def labels(
    counts: Sequence[int] = (2, 1), size: tuple[int, int] = SIZE, num_labels: int = 3, seed: int = 0
) -> dict[str, list[torch.Tensor]]:
    """Return `mask_labels` (count, height, width) and `class_labels` (count,), one of each per image."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "mask_labels": [torch.rand(count, *size, generator=generator) > 0.5 for count in counts],
        "class_labels": [torch.randint(0, num_labels, (count,), generator=generator) for count in counts],
    }


# Files


def pictures(number: int = 3, size: tuple[int, int] = (40, 60)) -> list[Image.Image]:
    """Return pictures of noise, `size` being height and width."""
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 255, (*size, 3), dtype=np.uint8)) for _ in range(number)]


def write_video(path: Path, frames: Sequence, codec: str = "mpeg4", **metadata: str) -> None:
    """Write frames, as pictures or arrays (height, width, 3), to a video of 5 frames a second."""
    av = pytest.importorskip("av", reason="needs PyAV")
    with av.open(str(path), "w") as container:
        container.metadata.update(metadata)
        stream = container.add_stream(codec, rate=5)
        stream.height, stream.width = np.asarray(frames[0]).shape[:2]
        stream.pix_fmt = stream.codec.video_formats[0].name
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(frame), format="rgb24")))
        container.mux(stream.encode())
