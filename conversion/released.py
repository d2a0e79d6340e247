"""The 59 checkpoints that the authors of Mask2Former released: one row each, everything else computed.

A row holds what cannot be computed: the digest in the file's name, the authors' model id, the figures they report.
Names, addresses and settings follow from data set, task and backbone. Source of the figures: the original's MODEL_ZOO.

The table itself is plain Python. Methods that need the package import it, so that showing the table doesn't wait for
PyTorch.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple


if TYPE_CHECKING:
    from m2f_hf import M2FImageProcessor, Mask2FormerConfig
    from m2f_hf.known.label_sets import LabelSet


DOWNLOADS = "https://dl.fbaipublicfiles.com/maskformer"
MODEL_ZOO = "https://github.com/facebookresearch/Mask2Former/blob/main/MODEL_ZOO.md"
LICENSE = "cc-by-nc-4.0"


class Benchmark(NamedTuple):
    """A data set with a task: what its checkpoints share."""

    title: str
    split: str  # that the figures were measured on
    train: str  # the original's names of the data sets
    test: str
    schedule: str  # as the authors write it: epochs (ep), or thousands of iterations (k)
    metrics: tuple[str, ...]


_MS_FLIP = ' "ms+flip" is test-time augmentation: every picture at several scales (multi-scale), each also mirrored.'
_TASK_OF = {
    "PQ": "panoptic",
    "AP": "instance",
    "AP50": "instance",
    "Boundary AP": "instance",
    "mIoU": "semantic",
    "mIoU (ms+flip)": "semantic",
}
_PANOPTIC, _SEMANTIC = ("PQ", "AP", "mIoU"), ("mIoU", "mIoU (ms+flip)")
BENCHMARKS = {
    "coco-panoptic": Benchmark(
        "COCO", "val2017", "coco_2017_train_panoptic", "coco_2017_val_panoptic_with_sem_seg", "50ep", _PANOPTIC
    ),
    "coco-instance": Benchmark("COCO", "val2017", "coco_2017_train", "coco_2017_val", "50ep", ("AP", "Boundary AP")),
    "cityscapes-panoptic": Benchmark(
        "Cityscapes", "val", "cityscapes_fine_panoptic_train", "cityscapes_fine_panoptic_val", "90k", _PANOPTIC
    ),
    "cityscapes-instance": Benchmark(
        "Cityscapes",
        "val",
        "cityscapes_fine_instance_seg_train",
        "cityscapes_fine_instance_seg_val",
        "90k",
        ("AP", "AP50"),
    ),
    "cityscapes-semantic": Benchmark(
        "Cityscapes", "val", "cityscapes_fine_sem_seg_train", "cityscapes_fine_sem_seg_val", "90k", _SEMANTIC
    ),
    "ade20k-panoptic": Benchmark("ADE20K", "val", "ade20k_panoptic_train", "ade20k_panoptic_val", "160k", _PANOPTIC),
    "ade20k-instance": Benchmark("ADE20K", "val", "ade20k_instance_train", "ade20k_instance_val", "160k", ("AP",)),
    "ade20k-semantic": Benchmark("ADE20K", "val", "ade20k_sem_seg_train", "ade20k_sem_seg_val", "160k", _SEMANTIC),
    "mapillary-panoptic": Benchmark(
        "Mapillary Vistas",
        "val",
        "mapillary_vistas_panoptic_train",
        "mapillary_vistas_panoptic_val",
        "300k",
        ("PQ", "mIoU"),
    ),
    "mapillary-semantic": Benchmark(
        "Mapillary Vistas", "val", "mapillary_vistas_sem_seg_train", "mapillary_vistas_sem_seg_val", "300k", _SEMANTIC
    ),
    "ytvis2019-instance": Benchmark("YouTube-VIS 2019", "val", "ytvis_2019_train", "ytvis_2019_val", "6k", ("AP",)),
    "ytvis2021-instance": Benchmark("YouTube-VIS 2021", "val", "ytvis_2021_train", "ytvis_2021_val", "8k", ("AP",)),
}


class Backbone(NamedTuple):
    """A backbone: its usual name, its name in the configs' names, and its options."""

    title: str
    stem: str
    options: dict[str, Any]


def _resnet(depth: int) -> dict[str, Any]:
    stages = ["res2", "res3", "res4", "res5"]
    return {
        "MODEL.BACKBONE.NAME": "build_resnet_backbone",
        "MODEL.RESNETS.DEPTH": depth,
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
        "MODEL.RESNETS.OUT_FEATURES": stages,
    }


def _swin(width: int, blocks: int, window: int, image_size: int) -> dict[str, Any]:
    return {
        "MODEL.BACKBONE.NAME": "D2SwinTransformer",
        "MODEL.SWIN.EMBED_DIM": width,
        "MODEL.SWIN.DEPTHS": [2, 2, blocks, 2],
        "MODEL.SWIN.NUM_HEADS": [width // 32 * 2**stage for stage in range(4)],
        "MODEL.SWIN.WINDOW_SIZE": window,
        "MODEL.SWIN.PRETRAIN_IMG_SIZE": image_size,
    }


BACKBONES = {
    "r50": Backbone("R50", "R50", _resnet(50)),
    "r101": Backbone("R101", "R101", _resnet(101)),
    "swin-tiny": Backbone("Swin-T", "swin_tiny", _swin(96, 6, 7, 224)),
    "swin-small": Backbone("Swin-S", "swin_small", _swin(96, 18, 7, 224)),
    "swin-base": Backbone("Swin-B", "swin_base_384", _swin(128, 18, 12, 384)),
    "swin-base-in21k": Backbone("Swin-B (IN21k)", "swin_base_IN21k_384", _swin(128, 18, 12, 384)),
    "swin-large": Backbone("Swin-L (IN21k)", "swin_large_IN21k_384", _swin(192, 18, 12, 384)),
}

# Options that all released checkpoints share.
_COMMON: dict[str, Any] = {
    "INPUT.FORMAT": "RGB",
    "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
    "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
    "MODEL.SEM_SEG_HEAD.NAME": "MaskFormerHead",
    "MODEL.SEM_SEG_HEAD.IN_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 256,
    "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME": "MSDeformAttnPixelDecoder",
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": 6,
    "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE": "multi_scale_pixel_decoder",
    "MODEL.MASK_FORMER.CLASS_WEIGHT": 2.0,
    "MODEL.MASK_FORMER.MASK_WEIGHT": 5.0,
    "MODEL.MASK_FORMER.DICE_WEIGHT": 5.0,
    "MODEL.MASK_FORMER.DROPOUT": 0.0,
    "MODEL.MASK_FORMER.DEC_LAYERS": 10,
    "MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD": 0.8,
}


@dataclass(frozen=True)
class Released:
    """One released checkpoint.

    `digest` is the start of the file's MD5, in hexadecimal, which is also in its name. `figures` are what the authors
    report, in the order of the benchmark's `metrics` and in their units (percent).
    """

    dataset: str
    task: str
    backbone: str
    digest: str
    model_id: str
    figures: tuple[float, ...]

    @property
    def name(self) -> str:
        return f"{self.dataset}-{self.task}-{self.backbone}"

    @property
    def benchmark(self) -> Benchmark:
        return BENCHMARKS[f"{self.dataset}-{self.task}"]

    @property
    def is_video(self) -> bool:
        return self.dataset.startswith("ytvis")

    @property
    def labels(self) -> LabelSet:
        from m2f_hf.known.label_sets import label_set

        return label_set(self.dataset if self.is_video else f"{self.dataset}-{self.task}")

    @property
    def reported(self) -> dict[str, float]:
        """The reported figures by metric, the one of the task first."""
        return dict(zip(self.benchmark.metrics, self.figures, strict=True))

    @property
    def schedule(self) -> str:
        return "100ep" if self.dataset == "coco" and self.backbone == "swin-large" else self.benchmark.schedule

    @property
    def config_path(self) -> str:
        """Path of the YAML it was trained with, in the original's `configs/`."""
        stem = _CONFIG_STEMS.get(self.name, self._stem)
        swin = "swin/" if self._has_swin else ""
        if self.is_video:
            return f"youtubevis_{self.dataset.removeprefix('ytvis')}/{swin}{stem}.yaml"
        folder = "mapillary-vistas" if self.dataset == "mapillary" else self.dataset
        return f"{folder}/{self.task}-segmentation/{swin}{stem}.yaml"

    @property
    def url(self) -> str:
        stem = _FOLDER_STEMS.get(self.name, self._stem)
        if self.is_video:
            folder = f"video_mask2former/ytvis_{self.dataset.removeprefix('ytvis')}"
        else:
            folder = f"mask2former/{'mapillary_vistas' if self.dataset == 'mapillary' else self.dataset}/{self.task}"
        return f"{DOWNLOADS}/{folder}/{stem}/model_final_{self.digest}.pkl"

    @property
    def _has_swin(self) -> bool:
        return self.backbone.startswith("swin")

    @property
    def _stem(self) -> str:
        schedule = "8ep" if self.is_video else self.schedule
        stem = f"maskformer2_{BACKBONES[self.backbone].stem}_bs16_{schedule}"
        is_enlarged = (self.dataset, self.task) == ("ade20k", "semantic") and self._size[0] == 640
        return ("video_" if self.is_video else "") + stem + ("_res640" if is_enlarged else "")

    @property
    def _size(self) -> tuple[int, int]:
        if not self.is_video:
            from m2f_hf.known.stock_checkpoints import released_test_size

            return released_test_size(self.dataset, self.task, self.backbone)
        return (480, 1333) if self._has_swin and self.name != "ytvis2021-instance-swin-large" else (360, 1333)

    def options(self) -> dict[str, Any]:
        """Return the original's options: what `read_config` gives for the YAML it was trained with."""
        from detectron2_config import DEFAULTS

        from m2f_hf.known.stock_checkpoints import released_threshold

        sync_norm = self.dataset == "cityscapes" or self.name == "ade20k-semantic-r101"
        video = "Video" if self.is_video else ""
        # The original switches all three tasks on for ADE20K's instance models; Mapillary has no instance figures.
        tests_panoptic = self.task == "panoptic" or (self.dataset, self.task) == ("ade20k", "instance")
        tests_instance = self.task == "instance" or (tests_panoptic and self.dataset != "mapillary")
        return {
            **DEFAULTS,
            **_COMMON,
            **BACKBONES[self.backbone].options,
            "DATASETS.TRAIN": [self.benchmark.train],
            "DATASETS.TEST": [self.benchmark.test],
            "INPUT.MIN_SIZE_TEST": self._size[0],
            "INPUT.MAX_SIZE_TEST": self._size[1],
            "MODEL.META_ARCHITECTURE": f"{video}MaskFormer",
            "MODEL.RESNETS.NORM": "SyncBN" if sync_norm else "FrozenBN",
            "MODEL.SEM_SEG_HEAD.NUM_CLASSES": len(self.labels.labels),
            "MODEL.SEM_SEG_HEAD.IGNORE_VALUE": self.labels.ignore_value,
            "MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME": f"{video}MultiScaleMaskedTransformerDecoder",
            "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": (
                200 if self.backbone == "swin-large" and self.task != "semantic" else 100
            ),
            "MODEL.MASK_FORMER.TEST.SEMANTIC_ON": self.task == "semantic" or tests_panoptic,
            "MODEL.MASK_FORMER.TEST.INSTANCE_ON": tests_instance,
            "MODEL.MASK_FORMER.TEST.PANOPTIC_ON": tests_panoptic,
            "MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD": released_threshold(self.dataset),
        }

    def config(self) -> Mask2FormerConfig:
        """Return the model's config, with the data set's labels and colours."""
        from detectron2_config import build_config

        return build_config(self.options())

    def processor(self) -> M2FImageProcessor:
        """Return the processor, for the task that the figures are reported for."""
        from detectron2_config import build_processor

        return build_processor(self.options())

    def card(self) -> dict[str, Any]:
        """Return the arguments of `model_card`: source, training, reported figures."""
        from m2f_hf.hub import Figure

        epochs = self.schedule.endswith("ep")
        backbone, benchmark = BACKBONES[self.backbone].title, self.benchmark
        return {
            "title": f"Mask2Former {backbone}, {benchmark.title} {self.task} segmentation",
            "description": (
                f"A [Mask2Former](https://arxiv.org/abs/2112.01527) for {self.task} segmentation with a {backbone} "
                f"backbone, trained on {benchmark.title} by the authors of the paper (their model {self.model_id}) and "
                "converted from their file: the same weights under other names. The results below are those that the "
                "authors report; they were not measured again with this checkpoint."
                f"{_MS_FLIP if 'mIoU (ms+flip)' in self.reported else ''}"
            ),
            "datasets": [self.dataset],
            "license": LICENSE,
            "source_url": self.url,
            "figures": [
                Figure(_TASK_OF[metric], benchmark.title, benchmark.split, metric, value, MODEL_ZOO)
                for metric, value in self.reported.items()
            ],
            "training": {
                "config of the original": self.config_path,
                "schedule": f"{self.schedule.removesuffix('ep')} epochs" if epochs else f"{self.schedule} iterations",
                "batch size": 16,
                "optimizer": "AdamW, learning rate 1e-4 (backbone 1e-5), weight decay 0.05",
            },
        }


# Configs and download folders whose names don't follow the rule.
_CONFIG_STEMS = {
    "ade20k-semantic-r101": "maskformer2_R101_bs16_90k",
    "mapillary-panoptic-r50": "maskformer_R50_bs16_300k",
}
_FOLDER_STEMS = {**_CONFIG_STEMS, "mapillary-semantic-r50": "maskformer_R50_bs16_300k"}

# Of each benchmark: backbone, start of the MD5, model id, reported figures.
_ROWS: dict[str, list[tuple[Any, ...]]] = {
    "coco-panoptic": [
        ("r50", "94dc52", "47430278_4", 51.9, 41.7, 61.7),
        ("r101", "b807bd", "47992113_1", 52.6, 42.6, 62.4),
        ("swin-tiny", "9fd0ae", "48558700_1", 53.2, 43.3, 63.2),
        ("swin-small", "a407fd", "48558700_3", 54.6, 44.7, 64.2),
        ("swin-base", "9d7f02", "48558700_5", 55.1, 45.2, 65.1),
        ("swin-base-in21k", "54b88a", "48558700_7", 56.4, 46.3, 67.1),
        ("swin-large", "f07440", "47429163_0", 57.8, 48.6, 67.4),
    ],
    "coco-instance": [
        ("r50", "3c8ec9", "47430277_2", 43.7, 30.6),
        ("r101", "eba159", "47992113_0", 44.2, 31.1),
        ("swin-tiny", "86143f", "48558700_0", 45.0, 31.8),
        ("swin-small", "1e7f22", "48558700_2", 46.3, 32.9),
        ("swin-base", "f6e0f6", "48558700_4", 46.7, 33.2),
        ("swin-base-in21k", "83d103", "48558700_6", 48.1, 34.4),
        ("swin-large", "e5f453", "48235555", 50.1, 36.2),
    ],
    "cityscapes-panoptic": [
        ("r50", "4ab90c", "48267400_0", 62.1, 37.3, 77.5),
        ("r101", "04d286", "48267400_11", 62.4, 37.7, 78.6),
        ("swin-tiny", "ceba0f", "48333144_2", 63.9, 39.1, 80.5),
        ("swin-small", "23efb7", "48381916", 64.8, 40.7, 81.8),
        ("swin-base-in21k", "fa840f", "48333157_2", 66.1, 42.8, 82.7),
        ("swin-large", "064788", "48318254_2", 66.6, 43.6, 82.9),
    ],
    "cityscapes-instance": [
        ("r50", "01a8ed", "48267400_8", 37.4, 61.9),
        ("r101", "c2b8c8", "48267400_16", 38.5, 63.9),
        ("swin-tiny", "6a63f8", "48333144_4", 39.7, 66.9),
        ("swin-small", "974824", "48333149_4", 41.8, 70.4),
        ("swin-base-in21k", "7a3b6d", "48333157_4", 42.0, 68.8),
        ("swin-large", "dfa862", "49111004_2", 43.7, 71.4),
    ],
    "cityscapes-semantic": [
        ("r50", "cc1b1f", "48267400_4", 79.4, 82.2),
        ("r101", "257ce8", "48267400_13", 80.1, 81.9),
        ("swin-tiny", "2d58d4", "48333144_3", 82.1, 83.0),
        ("swin-small", "fa26ae", "48333149_3", 82.6, 83.6),
        ("swin-base-in21k", "1c6b65", "48333157_3", 83.3, 84.5),
        ("swin-large", "17c1ee", "48318254_5", 83.3, 84.3),
    ],
    "ade20k-panoptic": [
        ("r50", "5c90d4", "48243028_0", 39.7, 26.5, 46.1),
        ("swin-large", "e0c58e", "48267279", 48.1, 34.2, 54.5),
    ],
    "ade20k-instance": [("r50", "67e945", "47429167_7", 26.4), ("swin-large", "92dae9", "49040271_0", 34.9)],
    "ade20k-semantic": [
        ("r50", "500878", "47429167_5", 47.2, 49.2),
        ("r101", "0d68be", "48243040_0", 47.8, 50.1),
        ("swin-tiny", "5274a6", "48333144_5", 47.7, 49.6),
        ("swin-small", "011c6d", "48333149_5", 51.3, 52.4),
        ("swin-base", "503e96", "48333153_5", 52.4, 53.7),
        ("swin-base-in21k", "7e47bf", "48333157_5", 53.9, 55.1),
        ("swin-large", "6b4a3a", "48004474_0", 56.1, 57.3),
    ],
    "mapillary-panoptic": [
        ("r50", "4e9874", "49392417_0", 36.3, 50.7),
        ("swin-large", "132c71", "48267065_4", 45.5, 60.8),
    ],
    "mapillary-semantic": [
        ("r50", "6c66d0", "49189528_1", 57.4, 59.0),
        ("swin-large", "90ee2d", "49189528_0", 63.2, 64.7),
    ],
    "ytvis2019-instance": [
        ("r50", "34112b", "51130652_3", 46.4),
        ("r101", "a34dca", "50897581_1", 49.2),
        ("swin-tiny", "26fffe", "50897611_3", 51.5),
        ("swin-small", "4a5174", "50897661_2", 54.3),
        ("swin-base-in21k", "221a8a", "50897733_2", 59.5),
        ("swin-large", "c5c739", "50908813_0", 60.4),
    ],
    "ytvis2021-instance": [
        ("r50", "b8aae2", "51130652_7", 40.6),
        ("r101", "6efd7a", "50897581_8", 42.4),
        ("swin-tiny", "965185", "50897611_7", 45.9),
        ("swin-small", "0dec91", "50897661_7", 48.6),
        ("swin-base-in21k", "a9b925", "50897733_9", 52.0),
        ("swin-large", "4da256", "50908813_6", 52.6),
    ],
}


def _released() -> Iterator[Released]:
    for benchmark, rows in _ROWS.items():
        dataset, task = benchmark.split("-")
        for backbone, digest, model_id, *figures in rows:
            yield Released(dataset, task, backbone, digest, model_id, tuple(figures))


RELEASED = {row.name: row for row in _released()}


def find_released(name: str) -> Released:
    """Return the released checkpoint of this name; upper case and `_` are read as lower case and `-`.

    Raises:
        ValueError: There is none; the message names similar ones.
    """
    row = RELEASED.get(re.sub(r"[\s_]+", "-", name.strip().lower()))
    if row is not None:
        return row
    close = difflib.get_close_matches(name.lower(), RELEASED, n=4, cutoff=0.5)
    hint = f"Did you mean {' or '.join(close)}?" if close else "They are called like coco-panoptic-swin-large."
    raise ValueError(f"There is no released checkpoint {name!r}. {hint} --list shows all {len(RELEASED)}.")


def listing(words: Sequence[str] = ()) -> str:
    """Return a table of the released checkpoints whose row has all the words, upper case or lower.

    Raises:
        ValueError: No row has them.
    """
    heading = ("name", "backbone", "data set", "task", "reported")
    rows = [
        (
            row.name,
            BACKBONES[row.backbone].title,
            row.benchmark.title,
            f"video {row.task}" if row.is_video else row.task,
            ", ".join(f"{metric} {value}" for metric, value in row.reported.items()),
        )
        for row in RELEASED.values()
    ]
    rows = [row for row in rows if all(word.lower() in " ".join(row).lower() for word in words)]
    if not rows:
        raise ValueError(f"No released checkpoint has {' and '.join(map(repr, words))} in its row; --list shows all.")
    widths = [max(map(len, column)) for column in zip(heading, *rows, strict=True)]
    lines = [
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (heading, *rows)
    ]
    lines.append(f"{len(rows)} checkpoint{'s' if len(rows) > 1 else ''}")
    return "\n".join(lines)
