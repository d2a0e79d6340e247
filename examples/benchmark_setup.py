"""For the benchmarks: what is compared, at which sizes, with which weights, and what it is given."""

import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from transformers import Mask2FormerConfig, ResNetConfig, SwinConfig
from transformers.models.mask2former import modeling_mask2former as stock
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

import m2f_hf
from m2f_hf.kernels.deformable_attention import multi_scale_deformable_attention


WEIGHT_STD = 0.05
"""Of the random weights. The initial ones give every query the same, nearly empty or nearly full, mask."""
NUM_SEGMENTS = 25  # queries that found something, in post-processing
NUM_LABELS, NUM_THINGS = 133, 80  # COCO panoptic
PHOTO = "photo.jpg"


class Implementation(NamedTuple):
    name: str
    model_class: Any
    deformable_attention: Callable[[Tensor, list[tuple[int, int]], Tensor, Tensor], Tensor]
    processor_class: Any
    target_dtype: torch.dtype  # of the target masks that its processor makes; `transformers`' loss takes no others


THEIRS = Implementation(
    "transformers",
    stock.Mask2FormerForUniversalSegmentation,
    stock.multi_scale_deformable_attention,
    Mask2FormerImageProcessorPil,
    torch.float32,
)
OURS = Implementation(
    "m2f_hf",
    m2f_hf.Mask2FormerForUniversalSegmentation,
    multi_scale_deformable_attention,
    m2f_hf.Mask2FormerImageProcessor,
    torch.bool,
)
IMPLEMENTATIONS = {implementation.name: implementation for implementation in (THEIRS, OURS)}


def _swin_t() -> Mask2FormerConfig:
    backbone = SwinConfig(
        embed_dim=96,
        depths=[2, 2, 6, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
        drop_path_rate=0.0,  # what it leaves out is random, and the losses are to be equal
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    return Mask2FormerConfig(backbone_config=backbone, num_labels=NUM_LABELS)


def _r50() -> Mask2FormerConfig:
    backbone = ResNetConfig(out_features=["stage1", "stage2", "stage3", "stage4"])
    return Mask2FormerConfig(backbone_config=backbone, num_labels=NUM_LABELS)


def _tiny() -> Mask2FormerConfig:
    backbone = SwinConfig(
        embed_dim=24,
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 4, 8],
        window_size=4,
        drop_path_rate=0.0,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    return Mask2FormerConfig(
        backbone_config=backbone,
        num_labels=NUM_LABELS,
        feature_size=64,
        mask_feature_size=64,
        hidden_dim=64,
        num_attention_heads=4,
        encoder_layers=2,
        encoder_feedforward_dim=64,
        decoder_layers=4,
        dim_feedforward=64,
        num_queries=20,
        train_num_points=112,
    )


class Size(NamedTuple):
    """A model, and how large what it is given is.

    Args:
        config: makes the configuration.
        checkpoint: name of the released model of this kind; what a processor makes of a photo depends on it.
        height, width: of the network's input, in pixels, where no line has a size of its own.
        training_side: of the square images of the training step.
        crowded_side: of the square image with 300 targets.
        photo_height: of the photo that is read from a file, which is 4:3.
        own_size: of the network's input in the settings that `transformers` has for the checkpoint.
        edges: shortest and longest that m2f_hf resizes a photo to; None for what it knows of the checkpoint.
        curve_side: of the square images of the curves, where these don't vary.
    """

    config: Callable[[], Mask2FormerConfig]
    checkpoint: str = "mask2former-swin-tiny-coco-panoptic"
    height: int = 800
    width: int = 1216
    training_side: int = 512
    crowded_side: int = 1024
    photo_height: int = 480
    own_size: tuple[int, int] = (384, 384)
    edges: tuple[int, int] | None = None
    curve_side: int = 256

    @property
    def photo(self) -> str:
        return f"{self.photo_height}×{four_thirds(self.photo_height)}"


SIZES = {
    "tiny": Size(
        _tiny,
        height=64,
        width=96,
        training_side=64,
        crowded_side=96,
        photo_height=48,
        own_size=(32, 32),
        edges=(64, 107),
        curve_side=64,
    ),
    "swin-t": Size(_swin_t),
    "r50": Size(_r50, checkpoint="mask2former-resnet-50-coco-panoptic"),
}


def save_checkpoint(size: str, parent: str | Path, seed: int, queries: int | None = None) -> str:
    """Write what a released checkpoint has, with random weights, and a photo: the new folder in `parent`.

    Masks vary from query to query and place to place. The settings of the image processor are those that `transformers`
    has for the released one.
    """
    folder = Path(parent) / SIZES[size].checkpoint
    config = SIZES[size].config()
    config.num_queries = config.num_queries if queries is None else queries
    torch.manual_seed(seed)
    model = stock.Mask2FormerForUniversalSegmentation(config)
    height, width = SIZES[size].own_size
    THEIRS.processor_class(size={"height": height, "width": width}, ignore_index=255).save_pretrained(folder)
    random_photo(SIZES[size].photo_height, torch.Generator().manual_seed(seed)).save(folder / PHOTO, quality=90)
    with torch.no_grad():
        for parameter in model.parameters():
            # Biases that start at zero, too: with those of values at zero a window that holds nothing but padding gives
            # denormal numbers, and products with such take twenty times as long.
            if parameter.dim() > 1 or not parameter.any():
                parameter.normal_(std=WEIGHT_STD)
    model.save_pretrained(folder)
    return str(folder)


def random_photo(height: int, generator: torch.Generator) -> Image.Image:
    """Coloured ellipses on a shaded ground, 4:3, with a little noise, so that a JPEG file has the usual size."""
    width = four_thirds(height)
    pixels = torch.rand(3, 1, 1, generator=generator) * torch.linspace(0.5, 1, width)
    pixels = pixels.expand(3, height, width).clone()
    for distance in ellipses(10, height, width, generator):
        pixels[:, distance < 1] = torch.rand(3, 1, generator=generator)
    pixels += 0.03 * torch.randn(pixels.shape, generator=generator)
    return Image.fromarray((pixels.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy())


def four_thirds(height: int) -> int:
    """The width of a picture."""
    return int(height * 4 / 3 + 0.5)


class Setup(NamedTuple):
    """Inputs and models, the same for both implementations and in every process.

    Args:
        size: key of `SIZES`.
        height, width: of the input in pixels, multiples of 32.
        batch: number of images.
        seed: of everything random.
        weights: folder that `save_checkpoint` wrote.
        targets: masks of an image to learn from.
        queries: of the model; None for its configuration's number.
        result_height: of what post-processing makes, 4:3.
        device: where models and inputs are, and what is computed.
    """

    size: str
    height: int
    width: int
    batch: int
    seed: int
    weights: str
    targets: int = 10
    queries: int | None = None
    result_height: int = 480
    device: str = "cpu"

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def config(self) -> Mask2FormerConfig:
        config = SIZES[self.size].config()
        config.num_queries = config.num_queries if self.queries is None else self.queries
        return config

    def model(self, implementation: Implementation, dtype: torch.dtype = torch.float32) -> Any:
        return load_model(implementation.name, self.weights, dtype, self.device)

    def pixel_values(self) -> Tensor:
        """(B, 3, H, W) float32."""
        return torch.randn(self.batch, 3, self.height, self.width, generator=self.generator()).to(self.device)

    def labels(self, implementation: Implementation) -> dict[str, list[Tensor]]:
        """Ellipses (N, H, W) in the form that its processor makes, and classes (N,), for each image."""
        generator = self.generator()
        masks, classes = [], []
        for _ in range(self.batch):
            masks.append(torch.empty(self.targets, self.height, self.width, dtype=implementation.target_dtype))
            for mask in masks[-1]:  # one by one: 300 large ones at once would be the peak of the process
                mask.copy_(ellipses(1, self.height, self.width, generator)[0] < 1)
            classes.append(torch.randint(NUM_LABELS, (self.targets,), generator=generator))
        labels = {"mask_labels": masks, "class_labels": classes}
        return {name: [of_image.to(self.device) for of_image in values] for name, values in labels.items()}

    def segmentation_outputs(self) -> SimpleNamespace:
        """What a trained model might say of one 4:3 photo: a few sure queries with a mask, the others with none."""
        generator = self.generator()
        num_queries = self.config().num_queries
        found = min(NUM_SEGMENTS, num_queries // 2)
        image_size = (self.height, four_thirds(self.height))
        padded = [-(-side // 32) * 32 for side in image_size]
        distances = ellipses(num_queries, padded[0] // 4, padded[1] // 4, generator)
        mask_logits = 6 * (1 - distances) + torch.randn(distances.shape, generator=generator)
        mask_logits[found:] -= 10
        class_logits = torch.randn(num_queries, NUM_LABELS + 1, generator=generator)
        labels = torch.full((num_queries,), NUM_LABELS)
        labels[:found] = torch.randint(NUM_LABELS, (found,), generator=generator)
        class_logits[torch.arange(num_queries), labels] += 12
        return SimpleNamespace(
            class_queries_logits=class_logits[None].to(self.device),
            masks_queries_logits=mask_logits[None].clamp(-20, 20).to(self.device),
            image_sizes=torch.tensor([image_size], device=self.device),
        )

    def attention_inputs(self) -> tuple[Tensor, list[tuple[int, int]], Tensor, Tensor]:
        """Arguments of deformable attention as in the pixel decoder: every position of three levels is a query."""
        generator = self.generator()
        config = self.config()
        heads, levels, points = config.num_attention_heads, 3, 4
        shapes = [(self.height // stride, self.width // stride) for stride in (32, 16, 8)]
        grids = [torch.meshgrid(*((torch.arange(n) + 0.5) / n for n in (w, h)), indexing="xy") for h, w in shapes]
        # (H, W, 2) as (x, y) for each level -> (S, 2)
        reference = torch.cat([torch.stack(grid, dim=-1).flatten(0, 1) for grid in grids])
        total = len(reference)
        value = torch.randn(self.batch, total, heads, config.feature_size // heads, generator=generator)
        offsets = torch.randn(self.batch, total, heads, levels, points, 2, generator=generator) * 2  # pixels
        sides = torch.tensor([(w, h) for h, w in shapes])[:, None]
        locations = reference[:, None, None, None] + offsets / sides
        weights = torch.randn(self.batch, total, heads, levels * points, generator=generator).softmax(-1)
        value, locations, weights = (tensor.to(self.device) for tensor in (value, locations, weights))
        return value, shapes, locations, weights.unflatten(-1, (levels, points))


@functools.cache
def load_model(name: str, weights: str, dtype: torch.dtype, device: str) -> Any:
    return IMPLEMENTATIONS[name].model_class.from_pretrained(weights, dtype=dtype).to(device)


def ellipses(count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Distances from the centres of `count` random ellipses, 1 on their outlines: (count, height, width)."""
    centre_y, centre_x, radius_y, radius_x = torch.rand(4, count, 1, 1, generator=generator)
    y, x = torch.linspace(0, 1, height)[:, None], torch.linspace(0, 1, width)
    return torch.hypot((y - centre_y) / (0.1 + 0.3 * radius_y), (x - centre_x) / (0.1 + 0.3 * radius_x))


def full_pixel_mask(setup: Setup) -> Tensor:
    """(B, H, W) int64, no padding."""
    return torch.ones(setup.batch, setup.height, setup.width, dtype=torch.int64, device=setup.device)
