"""The measures as modules of the `evaluate` library: `evaluate.load(module_path("mask_ap"), categories=…)`."""

from pathlib import Path


def module_path(name: str) -> str:
    """Return the path for `evaluate.load`: "panoptic_quality", "mask_ap", "mean_iou", "pixel_scores" or "video_ap".

    Raises:
        ValueError: if there is no such module.
    """
    names = sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))
    if name not in names:
        raise ValueError(f"there is no module {name!r}; choose one of {', '.join(names)}")
    return str(Path(__file__).with_name(f"{name}.py"))
