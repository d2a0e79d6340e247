"""What is compared: two implementations, at which sizes, with which weights, and what each of them is made to do."""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers.models.mask2former import modeling_mask2former as stock
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

import m2f_hf


WEIGHT_STD = 0.05
"""Of the random weights. The initial ones give every query the same, nearly empty or nearly full, mask."""
NUM_SEGMENTS = 25  # queries that found something, in post-processing
NUM_LABELS, NUM_THINGS = 133, 80  # COCO panoptic
STAGES = ["stage1", "stage2", "stage3", "stage4"]
PHOTO = "photo.jpg"


class Implementation(NamedTuple):
    name: str
    model_class: Any
    processor_class: Any
    target_dtype: torch.dtype  # of the target masks that its processor makes; `transformers`' loss takes no others


THEIRS = Implementation(
    "transformers", stock.Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessorPil, torch.float32
)
OURS = Implementation(
    "m2f_hf", m2f_hf.Mask2FormerForUniversalSegmentation, m2f_hf.Mask2FormerImageProcessor, torch.bool
)
IMPLEMENTATIONS = {implementation.name: implementation for implementation in (THEIRS, OURS)}


# --- models ---


configs: Any = transformers  # whose classes take more fields than their annotations say


def _swin(embed_dim: int, depths: list[int], num_heads: list[int], window_size: int, **fields: int) -> Any:
    # Without dropped paths: what they leave out is random, and the losses are to be equal.
    sizes = {"embed_dim": embed_dim, "depths": depths, "num_heads": num_heads, "window_size": window_size}
    backbone = configs.SwinConfig(**sizes, drop_path_rate=0.0, out_features=STAGES)
    return configs.Mask2FormerConfig(backbone_config=backbone, num_labels=NUM_LABELS, **fields)


def _tiny() -> Any:
    names = ("feature_size", "mask_feature_size", "hidden_dim", "encoder_feedforward_dim", "dim_feedforward")
    fields = {"num_attention_heads": 4, "encoder_layers": 2, "decoder_layers": 4, "num_queries": 20}
    return _swin(24, [1, 1, 1, 1], [1, 2, 4, 8], 4, train_num_points=112, **fields, **dict.fromkeys(names, 64))


def _swin_t() -> Any:
    return _swin(96, [2, 2, 6, 2], [3, 6, 12, 24], 7)


def _r50() -> Any:
    return configs.Mask2FormerConfig(backbone_config=configs.ResNetConfig(out_features=STAGES), num_labels=NUM_LABELS)


class Size(NamedTuple):
    """A model, and the size of its inputs.

    Args:
        config: makes the configuration.
        height, width: of the network's input, in pixels, where a line has no size of its own.
        training_side: of the square images of the training step.
        crowded_side: of the square image with 300 targets.
        photo_height: of the photo that is read from a file, which is 4:3.
        edges: shortest and longest edge that a photo is resized to.
    """

    config: Callable[[], Any]
    height: int = 800
    width: int = 1216
    training_side: int = 512
    crowded_side: int = 1024
    photo_height: int = 480
    edges: tuple[int, int] = (800, 1333)


SIZES = {
    "tiny": Size(_tiny, 64, 96, training_side=64, crowded_side=96, photo_height=48, edges=(64, 107)),
    "swin-t": Size(_swin_t),
    "r50": Size(_r50),
}


def save_checkpoint(size: str, folder: str | Path, seed: int) -> str:
    """Write a stock checkpoint with random weights, and a photo, into a folder, and return the folder.

    Masks vary from query to query and place to place.
    """
    torch.manual_seed(seed)
    model = stock.Mask2FormerForUniversalSegmentation(SIZES[size].config())
    with torch.no_grad():
        for parameter in model.parameters():
            # Biases that start at zero, too: with zero biases a window that is all padding gives denormal numbers, and
            # products of those take twenty times as long.
            if parameter.dim() > 1 or not parameter.any():
                parameter.normal_(std=WEIGHT_STD)
    model.save_pretrained(folder)
    THEIRS.processor_class(ignore_index=255).save_pretrained(folder)
    random_photo(SIZES[size].photo_height, torch.Generator().manual_seed(seed)).save(Path(folder) / PHOTO, quality=90)
    return str(folder)


@functools.cache
def load_model(name: str, weights: str, dtype: torch.dtype, device: str) -> Any:
    return IMPLEMENTATIONS[name].model_class.from_pretrained(weights, dtype=dtype).to(device)


# --- inputs ---


def random_photo(height: int, generator: torch.Generator) -> Image.Image:
    """Return coloured ellipses on a shaded ground, 4:3, with a little noise: as a JPEG file it has the usual size."""
    width = four_thirds(height)
    pixels = torch.rand(3, 1, 1, generator=generator) * torch.linspace(0.5, 1, width)
    pixels = pixels.expand(3, height, width).clone()
    for distance in ellipses(10, height, width, generator):
        pixels[:, distance < 1] = torch.rand(3, 1, generator=generator)
    pixels += 0.03 * torch.randn(pixels.shape, generator=generator)
    return Image.fromarray((pixels.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy())


def four_thirds(height: int) -> int:
    """Return the width of a 4:3 picture."""
    return int(height * 4 / 3 + 0.5)


def ellipses(count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Return distances from the centres of random ellipses, 1 on their outlines: (count, height, width)."""
    centre_y, centre_x, radius_y, radius_x = torch.rand(4, count, 1, 1, generator=generator)
    y, x = torch.linspace(0, 1, height)[:, None], torch.linspace(0, 1, width)
    return torch.hypot((y - centre_y) / (0.1 + 0.3 * radius_y), (x - centre_x) / (0.1 + 0.3 * radius_x))


class Setup(NamedTuple):
    """Inputs and models, the same for every implementation and in every process.

    Args:
        size: key of `SIZES`.
        height, width: of the input in pixels, multiples of 32.
        batch: number of images.
        seed: of everything random.
        weights: folder that `save_checkpoint` wrote.
        targets: masks of an image to learn from.
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
    result_height: int = 480
    device: str = "cpu"

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def config(self) -> Any:
        return SIZES[self.size].config()

    def model(self, implementation: Implementation, dtype: torch.dtype = torch.float32) -> Any:
        return load_model(implementation.name, self.weights, dtype, self.device)

    def pixel_values(self) -> Tensor:
        """Return random images, (B, 3, H, W) float32."""
        return torch.randn(self.batch, 3, self.height, self.width, generator=self.generator()).to(self.device)

    def full_pixel_mask(self) -> Tensor:
        """Return a mask without padding, (B, H, W) int64."""
        return torch.ones(self.batch, self.height, self.width, dtype=torch.int64, device=self.device)

    def labels(self, implementation: Implementation) -> dict[str, list[Tensor]]:
        """Return ellipses (N, H, W), in the dtype that its processor makes, and classes (N,), for each image."""
        generator = self.generator()
        masks, classes = [], []
        for _ in range(self.batch):
            masks.append(torch.empty(self.targets, self.height, self.width, dtype=implementation.target_dtype))
            for mask in masks[-1]:  # one by one: 300 large ones at once would be the peak of the process
                mask.copy_(ellipses(1, self.height, self.width, generator)[0] < 1)
            classes.append(torch.randint(NUM_LABELS, (self.targets,), generator=generator))
        labels = {"mask_labels": masks, "class_labels": classes}
        return {name: [one.to(self.device) for one in values] for name, values in labels.items()}

    def segmentation_outputs(self) -> SimpleNamespace:
        """Return what a trained model might give for one 4:3 photo: a few sure queries, and the others without a
        mask."""
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
        """Return arguments of deformable attention as in the pixel decoder: all positions of three levels are
        queries."""
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


# --- what is run: each returns a function without arguments ---


def prepare_forward(
    implementation: Implementation,
    setup: Setup,
    dtype: torch.dtype = torch.float32,
    wrap: Callable[[Any], Any] = lambda model: model,
) -> Callable[[], Any]:
    """Prepare a forward pass without gradients; `wrap` may compile the model."""
    model, pixel_values = wrap(setup.model(implementation, dtype).eval()), setup.pixel_values().to(dtype)
    return torch.no_grad()(lambda: model(pixel_values))


def prepare_bf16(implementation: Implementation, setup: Setup) -> Callable[[], Any]:
    """Prepare ours in bfloat16, theirs in float32."""
    return prepare_forward(implementation, setup, torch.bfloat16 if implementation.name == OURS.name else torch.float32)


def prepare_training(
    implementation: Implementation, setup: Setup, autocast: bool = False, counts: tuple[int, ...] = ()
) -> Callable[[], Any]:
    """Prepare forward, loss and backward; `counts` are each image's number of targets where they differ."""
    model = setup.model(implementation).train()
    labels = setup.labels(implementation)
    if counts:
        labels = {key: [x[:count] for x, count in zip(labels[key], counts, strict=True)] for key in labels}
    pixel_values = setup.pixel_values()

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(setup.device, torch.bfloat16) if autocast else nullcontext():
            loss = model(pixel_values=pixel_values, **labels).loss
        loss.backward()

    return step


def prepare_post_processing(task: str, implementation: Implementation, setup: Setup) -> Callable[[], Any]:
    """Prepare a task's post-processing of made-up outputs."""
    function = getattr(implementation.processor_class(), f"post_process_{task}_segmentation")
    outputs = setup.segmentation_outputs()
    kwargs: dict[str, Any] = {"target_sizes": [(setup.result_height, four_thirds(setup.result_height))]}
    if task == "panoptic":
        kwargs |= {"threshold": 0.8, "label_ids_to_fuse": set(range(NUM_THINGS, NUM_LABELS))}
    elif task == "instance":
        kwargs |= {"threshold": 0.5}
    return lambda: function(outputs, **kwargs)


def load_processor(implementation: Implementation, setup: Setup) -> Any:
    """Return the checkpoint's image processor; both resize a photo to the same size."""
    shortest, longest = SIZES[setup.size].edges
    size = {"shortest_edge": shortest, "longest_edge": longest}
    return implementation.processor_class.from_pretrained(setup.weights, size=size)


def prepare_end_to_end(implementation: Implementation, setup: Setup) -> Callable[[], Any]:
    """Prepare all from a JPEG file to panoptic segments of its own size, as each library's documentation does it."""
    model, processor = setup.model(implementation).eval(), load_processor(implementation, setup)
    num_found = min(NUM_SEGMENTS, setup.config().num_queries // 2)

    @torch.no_grad()
    def segment() -> Any:
        with Image.open(Path(setup.weights) / PHOTO) as photo:
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
