"""Where the models and pictures are that come with the package."""

from pathlib import Path


ASSETS = Path(__file__).parents[1] / "assets"
BUNDLED_MODEL = ASSETS / "shapes-panoptic"
BUNDLED_VIDEO_MODEL = ASSETS / "shapes-video"
BUNDLED_SCENES = ASSETS / "scenes"
