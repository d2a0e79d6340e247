"""Convert a checkpoint of the original into a folder that `from_pretrained` reads.

Every parameter of the original is accounted for, or nothing is written. Neither the checkpoint nor the config can run
code.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2_config import build_config, build_processor, read_config, read_labels
from detectron2_mapping import MisfitError, convert_state_dict, differences
from download import default_cache_dir, digest_in_name, download, md5_of
from PIL import Image
from released import RELEASED, Released
from safe_pickle import load_state_dict
from safetensors import safe_open
from transformers import MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING

from m2f_hf import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, Mask2FormerVideoProcessor
from m2f_hf.draw.segments import contact_sheet, draw_segments
from m2f_hf.draw.words import describe
from m2f_hf.hub.card import model_card
from m2f_hf.hub.families import VIDEOS, label_names, load_whole
from m2f_hf.inference.segmenter import Segmenter
from m2f_hf.metrics.pictures import to_map
from m2f_hf.processing.image_processor import M2FImageProcessor


Sample = Image.Image | Sequence[Image.Image]
"""An RGB photo to verify with; for a video model, RGB frames of one size."""

SHOWN_SCORE = 0.5  # least score of a track that is drawn; the original keeps ten, whatever they score
SHOWN_FRAMES, SHOWN_SIDE = 4, 480  # most frames that are drawn of a clip, and their longest side in pixels

# Some versions of transformers build and save a last norm of the Swin classifier, which a backbone never uses.
_UNUSED = re.compile(r"\.pixel_level_module\.encoder\.(swin\.)?layernorm\.(weight|bias)$")


class Report(NamedTuple):
    """What a conversion did: tensors read, tensors and parameters written, and where these are not one to one.

    `filled` names what the original does not have (counters of frozen norms, a norm that no backbone uses), `checked`
    the constants that have no place in our model, `split` the fused projections to queries, keys and values, which are
    three in ours. `found` is what the verification found in its photo or clip, in words, or None;
    `note` a remark for the user.
    """

    read: int
    written: int
    parameters: int
    filled: list[str]
    checked: list[str]
    split: list[str]
    found: str | None = None
    note: str = ""

    def __str__(self) -> str:
        as_they_are = self.read - len(self.checked) - len(self.split)
        return (
            f"{self.read} tensors read, none left over: {as_they_are} kept whole, {len(self.split)} fused projections "
            f"split into query, key and value, {len(self.checked)} constants checked. {self.written} tensors written "
            f"({self.parameters:,} parameters): {as_they_are} whole, {3 * len(self.split)} from the split ones, "
            f"{len(self.filled)} initial values of what the original doesn't keep.{self.note and ' ' + self.note}"
        )


def convert(
    checkpoint: Path, config_file: Path, output: Path, labels_file: Path | None = None, sample: Sample | None = None
) -> Report:
    """Convert one checkpoint.

    Args:
        checkpoint: The original's `.pkl` or `.pth`.
        config_file: The YAML it was trained with.
        output: The folder to make; it must not exist, or be empty.
        labels_file: Names of the classes, and which are things (JSON; see `read_labels`).
        sample: Segment it with the result, see `verify`, and put the picture at `overlay_path`.

    Raises:
        FileExistsError: `output` has something in it.
        UnsupportedOptionError, UnsafeCheckpointError, ValueError, OSError: see `read_config`, `read_labels`,
            `load_state_dict`, `convert_state_dict` and `verify`. Nothing is written then.
        StrictDataclassError: the config has a value that no model can be built with.
    """
    output = _check_free(output)
    options = read_config(config_file)
    labels = read_labels(labels_file, options["MODEL.SEM_SEG_HEAD.NUM_CLASSES"]) if labels_file else None
    return _convert(checkpoint, build_config(options, labels), build_processor(options, labels), output, {}, sample)


def convert_released(
    row: Released,
    output: Path,
    checkpoint: Path | None = None,
    cache_dir: Path | None = None,
    sample: Sample | None = None,
) -> Report:
    """Convert a released checkpoint, fetched if need be.

    The authors' figures and licence go onto the card if the file is theirs, by its MD5.

    Args:
        row: Which one; see `find_released`.
        output, sample: As in `convert`.
        checkpoint: Its file, if you have it already, or one that someone else trained with the same settings.
        cache_dir: Where a download is kept; default: `default_cache_dir()`.

    Raises:
        DownloadError: see `download`.
        ValueError: `checkpoint` has the name of the released file and is another, or it is that of another variant.
        And what `convert` raises.
    """
    output = _check_free(output)
    if checkpoint is None:
        checkpoint = download(row.url, cache_dir or default_cache_dir())
        return _convert(checkpoint, row.config(), row.processor(), output, row.card(), sample)
    if not checkpoint.is_file():
        raise FileNotFoundError(f"There is no checkpoint {checkpoint}.")
    digest = md5_of(checkpoint)
    if digest.startswith(row.digest):
        return _convert(checkpoint, row.config(), row.processor(), output, row.card(), sample)
    _check_not_another(checkpoint, digest, row)
    try:
        report = _convert(checkpoint, row.config(), row.processor(), output, {}, sample)
    except MisfitError as error:
        raise ValueError(
            f"{checkpoint} is not the file of {row.name}. {error.facts} --list shows the others; one of your own "
            "needs its --config-file."
        ) from error
    return report._replace(
        note=f"{checkpoint.name} is not the authors' file (its MD5 is {digest}, theirs begins with {row.digest}): "
        "neither their figures nor their licence are on the card."
    )


def _check_not_another(checkpoint: Path, digest: str, row: Released) -> None:
    """Refuse a file that is another row's by its MD5, or has this row's name and another MD5."""
    for other in RELEASED.values():  # which may well fit, with labels and a task that it wasn't trained for
        if digest.startswith(other.digest):
            raise ValueError(
                f"{checkpoint} is not the file of {row.name}. It is that of {other.name}: convert it with --variant "
                f"{other.name}."
            )
    if digest_in_name(checkpoint.name) == row.digest:
        raise ValueError(
            f"{checkpoint} has the name of the file of {row.name} and is another: its MD5 begins with "
            f"{digest[: len(row.digest)]}. It is damaged or was changed: fetch it again from {row.url}."
        )


def _check_free(output: Path) -> Path:
    output = output.resolve()
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise FileExistsError(f"{output} exists already. Give an --output that doesn't, or remove it first.")
    return output


def _convert(
    checkpoint: Path,
    config: Mask2FormerConfig,
    processor: M2FImageProcessor,
    output: Path,
    card: Mapping[str, Any],
    sample: Sample | None,
) -> Report:
    original = load_state_dict(checkpoint)
    converted = convert_state_dict(original, config)
    model = _load_strictly(converted, config)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as temporary:
        folder = Path(temporary) / output.name
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        model_card(config, processor, repo_id=output.name, **card).save(folder / "README.md")
        unused = _check_written(folder / "model.safetensors", converted)
        found = verify(folder, sample, Path(temporary) / "verify.png") if sample else None
        os.replace(folder, output)
        if sample:
            os.replace(Path(temporary) / "verify.png", overlay_path(output))
    filled, checked, split = differences(original, config)
    return Report(
        read=len(original),
        written=len(converted) + len(unused),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        filled=filled + unused,
        checked=checked,
        split=split,
        found=found,
    )


def overlay_path(output: Path) -> Path:
    """Return where `--verify` puts its picture: next to the folder, since it is no part of the checkpoint."""
    return output.with_name(f"{output.name}.verify.png")


def verify(folder: Path, sample: Sample, overlay: Path) -> str:
    """Load a converted folder as a user would, segment a photo or track through a clip with it, and draw the result.

    Args:
        folder: What `convert` made.
        sample: An RGB photo, or a clip's RGB frames, of one size.
        overlay: Where to save the photo, or some frames, with the segments drawn over it.

    Returns:
        The segments in words.

    Raises:
        OSError, ValueError: The folder doesn't fill the model, the photo or clip is of an impossible size, or the
            logits are not finite.
    """
    if not isinstance(sample, Image.Image):
        return _verify_with_clip(folder, sample, overlay)
    segmenter = Segmenter.from_pretrained(folder, device="cpu")
    segmenter.model.register_forward_hook(_check_finite)
    result = segmenter(sample)
    result.draw().save(overlay)
    return str(result)


def _verify_with_clip(folder: Path, frames: Sequence[Image.Image], overlay: Path) -> str:
    model, _ = load_whole(folder, VIDEOS)
    model.register_forward_hook(_check_finite)
    processor = Mask2FormerVideoProcessor.from_pretrained(folder)
    size = (frames[0].height, frames[0].width)
    with torch.inference_mode():
        outputs = model.eval()(**processor(list(frames), return_tensors="pt"))
    (result,) = processor.post_process_video_instance_segmentation(
        outputs, threshold=SHOWN_SCORE, target_sizes=[size], use_mask_quality=False
    )
    names, colors = label_names(model.config), dict(enumerate(model.config.label_colors or []))
    tracks = [  # the better over the worse
        {**info, "label": names[info["label_id"]], "isthing": True, "masks": masks}
        for info, masks in zip(result["segments_info"], result["segmentation"].numpy(), strict=True)
        if masks.any()
    ][::-1]
    shown = np.linspace(0, len(frames) - 1, min(SHOWN_FRAMES, len(frames))).round().astype(int).tolist()
    pictures = []
    for frame in shown:
        segments = to_map([{**track, "segmentation": track["masks"][frame]} for track in tracks], size, "label_id")
        pictures.append(draw_segments(frames[frame], *segments, names, colors))
        pictures[-1].thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    contact_sheet([pictures], ["tracks"], [f"frame {frame + 1} of {len(frames)}" for frame in shown]).save(overlay)
    return describe(tracks)


def _check_finite(module: torch.nn.Module, arguments: Any, outputs: Any) -> None:
    for name in ("class_queries_logits", "masks_queries_logits"):
        if not outputs[name].isfinite().all():
            raise ValueError(f"The converted model's {name} are not finite: the checkpoint is damaged or diverged.")


def is_unused(name: str) -> bool:
    """Return whether a parameter, by its name on disk, is one that the model never uses and the original has not."""
    return _UNUSED.search(name) is not None


def _load_strictly(
    converted: Mapping[str, torch.Tensor], config: Mask2FormerConfig
) -> Mask2FormerForUniversalSegmentation:
    model, loading = MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING[type(config)].from_pretrained(
        None, config=config, state_dict=dict(converted), output_loading_info=True, ignore_mismatched_sizes=True
    )
    missing = [name for name in loading["missing_keys"] if not is_unused(name)]
    if missing or loading["unexpected_keys"] or loading["mismatched_keys"] or loading["error_msgs"]:
        raise MisfitError(
            "The checkpoint does not fill the model. "
            f"Missing: {sorted(missing)[:5]}; unexpected: {sorted(loading['unexpected_keys'])[:5]}; "
            f"other shapes: {list(loading['mismatched_keys'])[:5]}; {loading['error_msgs'][:5]}.",
            "Convert it with the config it was trained with.",
        )
    return model


def _check_written(path: Path, expected: Mapping[str, torch.Tensor]) -> list[str]:
    """Check that a file has the converted tensors, to the bit; return the names of the unused ones it has too."""
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        different = [
            name for name in expected if name not in names or not torch.equal(file.get_tensor(name), expected[name])
        ]
    others = sorted(names - set(expected))
    if different or not all(is_unused(name) for name in others):
        raise ValueError(f"The folder written is not what was converted: {different[:5]} differ, {others[:5]} are new.")
    return others
