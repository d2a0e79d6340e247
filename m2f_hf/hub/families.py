"""The two families of checkpoints, for images and for clips, and how one is recognised and loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..model.configuration import Mask2FormerConfig, Mask2FormerVideoConfig
from ..model.modeling import Mask2FormerForUniversalSegmentation, Mask2FormerModel
from ..model.modeling_video import Mask2FormerForVideoSegmentation, Mask2FormerVideoModel
from ..processing.image_processor import M2FImageProcessor
from ..processing.video_processor import Mask2FormerVideoProcessor


CONFIG = "config.json"
PROCESSOR = "preprocessor_config.json"
# Settings file -> the field that says which class wrote it.
TYPE_KEYS = {CONFIG: "model_type", PROCESSOR: "image_processor_type"}


@dataclass(frozen=True)
class Family:
    """The classes of image models, or of video models.

    Attributes:
        config, base_model, model, processor: the classes that read a checkpoint's folder.
        auto_models, auto_processors: the Auto classes that give `model` and `processor` without this package installed.
    """

    config: type[Mask2FormerConfig]
    base_model: type[Mask2FormerModel]
    model: type[Mask2FormerForUniversalSegmentation]
    processor: type[M2FImageProcessor]
    auto_models: tuple[str, ...]
    auto_processors: tuple[str, ...]

    @property
    def auto_classes(self) -> dict[str, dict[str, type]]:
        """Settings file -> name of an Auto class -> the class it gives without this package installed."""
        models: dict[str, type] = {"AutoConfig": self.config, "AutoModel": self.base_model}
        models |= dict.fromkeys(self.auto_models, self.model)
        return {CONFIG: models, PROCESSOR: dict.fromkeys(self.auto_processors, self.processor)}

    def type_in(self, file: str) -> str:
        """Return the value of `TYPE_KEYS[file]` in this family's settings files."""
        return {CONFIG: self.config.model_type, PROCESSOR: self.processor.__name__}[file]


IMAGES = Family(
    *(Mask2FormerConfig, Mask2FormerModel, Mask2FormerForUniversalSegmentation, M2FImageProcessor),
    auto_models=("AutoModelForUniversalSegmentation", "AutoModelForImageSegmentation"),  # the latter for pipelines
    auto_processors=("AutoImageProcessor",),
)
# Both processors, since `transformers` has AutoVideoProcessor only where torchvision is installed.
VIDEOS = Family(
    *(Mask2FormerVideoConfig, Mask2FormerVideoModel, Mask2FormerForVideoSegmentation, Mask2FormerVideoProcessor),
    auto_models=("AutoModelForUniversalSegmentation",),
    auto_processors=("AutoImageProcessor", "AutoVideoProcessor"),
)


def family_of(settings: Mapping[str, Any], file: str = CONFIG) -> Family | None:
    """Return the family that the settings in `file` belong to, or None where they are another model's."""
    found = settings.get(TYPE_KEYS[file])
    return next((family for family in (IMAGES, VIDEOS) if family.type_in(file) == found), None)


def read_settings(file: Path) -> dict[str, Any]:
    """Return the JSON object in a settings file.

    Raises:
        ValueError: the file holds none.
    """
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({error}): save it again with save_pretrained") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file} holds no JSON object: save it again with save_pretrained")
    return settings


def label_names(config: Mask2FormerConfig) -> dict[int, str]:
    """Return the class names by id, sorted by id (JSON sorts ids as text)."""
    return dict(sorted((int(label_id), str(label)) for label_id, label in (config.id2label or {}).items()))


def load_whole(
    checkpoint: str | os.PathLike, family: Family = IMAGES, **arguments: Any
) -> tuple[Mask2FormerForUniversalSegmentation, set[str]]:
    """Load a model all of whose weights come from the checkpoint; return it and the checkpoint's unused weights.

    Args:
        family: the model's.
        arguments: passed to `from_pretrained`.

    Raises:
        ValueError: weights are missing, of another shape than the configuration asks for, or not finite.
    """
    loaded: Any = family.model.from_pretrained(
        checkpoint, output_loading_info=True, ignore_mismatched_sizes=True, **arguments
    )
    model, report = loaded
    if missing := report["missing_keys"]:
        raise ValueError(
            f"{checkpoint} lacks {len(missing)} of the model's weights, such as {min(missing)}, and would predict "
            "noise: save it again with save_pretrained"
        )
    if others := report["mismatched_keys"]:
        name, found, wanted = min(others)
        raise ValueError(
            f"{checkpoint} has {len(others)} weights of other shapes than its {CONFIG} asks for, such as {name}, "
            f"{tuple(found)} in place of {tuple(wanted)}: save configuration and weights together, with save_pretrained"
        )
    broken = [name for name, weight in model.state_dict().items() if not weight.isfinite().all()]
    if broken:
        raise ValueError(
            f"{checkpoint} has NaN or infinity in {len(broken)} of its weights, such as {min(broken)}: take an earlier "
            "checkpoint of the training"
        )
    return model, report["unexpected_keys"]
