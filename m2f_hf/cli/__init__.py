"""The `m2f` command: one module for each subcommand, a thin layer over one sub-package."""

from .._lazy import lazy_names
from .main import main as main


__getattr__ = lazy_names(
    __name__, {"..": ["Segmenter", "BUNDLED_MODEL", "BUNDLED_VIDEO_MODEL", "BUNDLED_SCENES"]}, is_deprecated=True
)
