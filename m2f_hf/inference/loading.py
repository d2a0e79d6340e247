"""Checks before a checkpoint is loaded, and one-line errors in place of the many that loading raises."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from ..hub.families import IMAGES, Family, family_of
from ..known.errors import first_line
from ..known.lookup import find_config


def choose_device(device: str | None) -> str:
    """Return the device asked for, or by default "cuda" where there is a GPU and "cpu" elsewhere.

    Raises:
        ValueError: the device cannot be used here.
    """
    device = str(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {device} cannot be used here ({first_line(error)}); try device cpu") from error
    return device


def checkpoint_family(
    model: str | os.PathLike[str], revision: str | None = None, *, subfolder: str = "", **download: Any
) -> Family:
    """Return whether a checkpoint is of an image or of a video model, from its `config.json` alone.

    Args:
        model: a folder, or `owner/name` on the Hub.
        revision: branch, tag or commit on the Hub; None: main.
        subfolder: where in the folder or repository the checkpoint is.
        download: `token`, `cache_dir` and `local_files_only`, as in `from_pretrained`.

    Raises:
        OSError: there is no such checkpoint, or it cannot be fetched.
        ValueError: it is another kind of model, its configuration is damaged, or a folder was given with a revision.
    """
    if revision is not None and Path(model).is_dir():
        raise ValueError(f"{model} is a folder, and revision is of a model on the Hub: leave it out")
    config_file = find_config(model, revision=revision, subfolder=subfolder, **download)
    try:
        settings = json.loads(config_file.read_text(encoding="utf-8"))
        model_type = settings.get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"the config.json of {model} is no JSON object ({first_line(error)})") from error
    family = IMAGES if model_type == "mask2former" else family_of(settings)
    if family is None:
        raise ValueError(f"{model} has model_type {model_type!r}; m2f_hf reads 'm2f', 'm2f_video' and 'mask2former'")
    return family


@contextmanager
def explain_load_errors(model: str | os.PathLike[str]) -> Iterator[None]:
    """Turn the many errors of damaged or incomplete checkpoints into an OSError or ValueError of one line."""
    try:
        yield
    except (
        *(OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError),
        *(AttributeError, KeyError, TypeError),  # JSON of another form
    ) as error:
        # A configuration's error names the field in the first line and the fault below.
        reason = " ".join(str(error).split()) if isinstance(error, StrictDataclassError) else first_line(error)
        # Some name the checkpoint already, or a file in it.
        text = reason if reason.startswith(str(model)) else f"{model} cannot be loaded: {reason}"
        raise (OSError if isinstance(error, OSError) else ValueError)(text) from error
