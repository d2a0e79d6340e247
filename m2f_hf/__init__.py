"""Mask2Former as a Hugging Face-style package: the original's results, `transformers`' conventions.

Importing it registers the model types "m2f" and "m2f_video" with the Auto classes, and the `image-segmentation`
pipeline. The `m2f` command skips that, so that `m2f --help` loads neither torch nor `transformers`.
"""

import os
import sys
from typing import TYPE_CHECKING

from ._lazy import add_moved_modules, lazy_names


__version__ = "0.1.0"

__all__ = [
    "Segmenter",
    "Mask2FormerConfig",
    "Mask2FormerModel",
    "Mask2FormerForUniversalSegmentation",
    "Mask2FormerPreTrainedModel",
    "Mask2FormerVideoConfig",
    "Mask2FormerVideoModel",
    "Mask2FormerForVideoSegmentation",
    "Mask2FormerVideoProcessor",
    "Mask2FormerImageProcessor",
    "M2FImageProcessor",
    "ClipTracker",
    "DamagedFrame",
    "stream_frames",
    "BUNDLED_MODEL",
    "BUNDLED_VIDEO_MODEL",
    "BUNDLED_SCENES",
    "register",
]

if TYPE_CHECKING:
    from .auto import register
    from .inference.segmenter import Segmenter
    from .inference.tracking import ClipTracker
    from .known.bundled import BUNDLED_MODEL, BUNDLED_SCENES, BUNDLED_VIDEO_MODEL
    from .model.configuration import Mask2FormerConfig, Mask2FormerVideoConfig
    from .model.modeling import Mask2FormerForUniversalSegmentation, Mask2FormerModel, Mask2FormerPreTrainedModel
    from .model.modeling_video import Mask2FormerForVideoSegmentation, Mask2FormerVideoModel
    from .processing.frames import DamagedFrame, stream_frames
    from .processing.image_processor import M2FImageProcessor, Mask2FormerImageProcessor
    from .processing.video_processor import Mask2FormerVideoProcessor
else:
    __getattr__ = lazy_names(
        __name__,
        {
            ".auto": ["register"],
            ".inference.segmenter": ["Segmenter"],
            ".inference.tracking": ["ClipTracker"],
            ".known.bundled": ["BUNDLED_MODEL", "BUNDLED_VIDEO_MODEL", "BUNDLED_SCENES"],
            ".model.configuration": ["Mask2FormerConfig", "Mask2FormerVideoConfig"],
            ".model.modeling": [
                "Mask2FormerForUniversalSegmentation",
                "Mask2FormerModel",
                "Mask2FormerPreTrainedModel",
            ],
            ".model.modeling_video": ["Mask2FormerForVideoSegmentation", "Mask2FormerVideoModel"],
            ".processing.frames": ["DamagedFrame", "stream_frames"],
            ".processing.image_processor": ["M2FImageProcessor", "Mask2FormerImageProcessor"],
            ".processing.video_processor": ["Mask2FormerVideoProcessor"],
        },
    )


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _runs_command() -> bool:
    """Return whether this process was started as `m2f` or `python -m m2f_hf.cli`."""
    if sys.argv[:1] == ["-m"]:  # while the interpreter still looks for the module
        return "m2f_hf.cli" in sys.orig_argv
    return os.path.basename(sys.argv[0] if sys.argv else "") in ("m2f", "m2f.exe")


add_moved_modules(__name__)
if not _runs_command():
    from .auto import register

    register()
