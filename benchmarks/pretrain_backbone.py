"""Teach a small ResNet to name single shapes: this project's small analogue of pretraining a backbone on ImageNet.

Each example is a window around one thing of a generated scene, whatever else overlaps it, and the label is the class of
the thing in the middle. The backbone is saved as a folder that `examples/finetune.py --backbone FOLDER` starts from:

    python benchmarks/pretrain_backbone.py --output runs/shapes-backbone
"""

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import ResNetBackbone, ResNetConfig

from m2f_hf.data.synthetic.shapes import SHAPES, ShapesDataset


WINDOW = 96
"""Side of a window in pixels: three cells at the backbone's last stride of 32, the middle one over the thing."""


class ShapeWindows(Dataset[tuple[Tensor, Tensor]]):
    """Windows around the things of each scene: pixels (N, 3, 96, 96) float32 and classes (N,) int64."""

    def __init__(self, scenes: ShapesDataset, mean: list[float], std: list[float]) -> None:
        self.scenes = scenes
        self.mean, self.std = np.float32(mean), np.float32(std)

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        scene = self.scenes[index]
        pixels = (np.asarray(scene["image"], dtype=np.float32) / 255 - self.mean) / self.std
        half = WINDOW // 2
        padded = np.pad(pixels, ((half, half), (half, half), (0, 0)))  # 0 is the mean, as where a batch is padded
        windows, labels = [], []
        for info in scene["segments_info"]:
            if not info["isthing"]:
                continue
            x, y, width, height = info["bbox"]
            left, top = x + width // 2, y + height // 2  # in the padded frame the window's middle is the box's
            windows.append(padded[top : top + WINDOW, left : left + WINDOW])
            labels.append(info["category_id"])
        return torch.from_numpy(np.stack(windows)).permute(0, 3, 1, 2), torch.tensor(labels)  # (N, H, W, 3) -> NCHW


def join(scenes: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Put the windows of several scenes into one batch."""
    return torch.cat([pixels for pixels, _ in scenes]), torch.cat([labels for _, labels in scenes])


class ShapeClassifier(nn.Module):
    """A backbone and a linear layer on the middle cell of its last feature map: (N, 3, 96, 96) -> (N, 4) logits."""

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        self.backbone = ResNetBackbone(config)
        self.head = nn.Linear(config.hidden_sizes[-1], len(SHAPES))

    def forward(self, pixel_values: Tensor) -> Tensor:
        features = self.backbone(pixel_values).feature_maps[-1]  # (N, C, 3, 3)
        middle = features.shape[-1] // 2
        return self.head(features[:, :, middle, middle])


def loader(seed: int, num_scenes: int, scenes_per_batch: int, mean: list[float], std: list[float]) -> DataLoader[Any]:
    windows = ShapeWindows(ShapesDataset(num_scenes, seed=seed), mean, std)
    return DataLoader(windows, batch_size=scenes_per_batch, collate_fn=join, num_workers=1)


@torch.no_grad()
def accuracy(model: ShapeClassifier, batches: DataLoader[Any]) -> float:
    """Share of things named rightly."""
    model.eval()
    right, seen = 0, 0
    for pixels, labels in batches:
        right += int((model(pixels).argmax(dim=-1) == labels).sum())
        seen += len(labels)
    model.train()
    return right / seen


def save_folder(backbone: ResNetBackbone, report: dict[str, Any], output: Path) -> None:
    """Write config, weights and report to a temporary folder first, so that `output` is whole or absent."""
    output.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    work.chmod(0o755)
    backbone.save_pretrained(work)
    (work / "pretraining.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(output, ignore_errors=True)
    os.replace(work, output)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write; one that exists is replaced")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--scenes_per_batch", type=int, default=12, help="about 5 windows come from each scene")
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--weight_decay", type=float, default=0.05)
    parser.add_argument("--embedding_size", type=int, default=32)
    parser.add_argument("--hidden_sizes", type=int, nargs=4, default=[32, 64, 128, 192])
    parser.add_argument("--depths", type=int, nargs=4, default=[2, 2, 2, 2])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--evaluation_scenes", type=int, default=100)
    parser.add_argument("--evaluate_every", type=int, default=250)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train, save, and return the report: steps and the accuracy on unseen scenes."""
    args = parse_arguments(arguments)
    torch.manual_seed(args.seed)
    config = ResNetConfig(
        embedding_size=args.embedding_size,
        hidden_sizes=args.hidden_sizes,
        depths=args.depths,
        layer_type="basic",
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    model = ShapeClassifier(config)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    train = loader(args.seed, args.steps * args.scenes_per_batch, args.scenes_per_batch, mean, std)
    unseen = loader(args.seed + 1, args.evaluation_scenes, args.scenes_per_batch, mean, std)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=args.steps, pct_start=0.1)

    progress = tqdm(train, total=args.steps, desc="Naming shapes", unit="step", mininterval=5)
    for step, (pixels, labels) in enumerate(progress, start=1):
        loss = nn.functional.cross_entropy(model(pixels), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if step % args.evaluate_every == 0 or step == args.steps:
            share = accuracy(model, unseen)
            tqdm.write(f"step {step}: {share:.1%} of the things of unseen scenes named rightly")

    report = {"steps": args.steps, "scenes": args.steps * args.scenes_per_batch, "accuracy": share}
    save_folder(model.backbone, report, args.output)
    return report


if __name__ == "__main__":
    main()
