"""`m2f demo`: the bundled model on the bundled scenes, offline."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

from ..known.bundled import BUNDLED_MODEL, BUNDLED_SCENES
from ..known.label_sets import TASKS
from .common import CommandError, add_output, check_output, make_output, write_errors
from .segment import ImageError, load_segmenter, write_result


_SCALE = 3  # the scenes are small; enlarged, their labels can be read


def add_parser(commands: Any) -> None:
    """Add `demo` to the subparsers of `m2f`."""
    demo = commands.add_parser("demo", help="segment the bundled scenes with the bundled model, offline")
    add_output(demo)
    demo.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run `m2f demo` with its parsed options and return the exit status."""
    scenes = sorted(BUNDLED_SCENES.glob("*.png"))
    check_output(options.output)

    from PIL import Image

    from ..draw.segments import contact_sheet
    from ..inference.segmenter import Segmenter
    from ..processing.images import read_rgb

    loaded = load_segmenter(BUNDLED_MODEL, None, None, "cpu")
    segmenters = [Segmenter(loaded.model, loaded.processor, task) for task in TASKS]
    make_output(options.output)

    print(f"{len(scenes)} generated scenes that the bundled model has never seen, each for {len(TASKS)} tasks:")
    rows = []
    for scene in scenes:
        print(f"\n{scene.stem}")
        image = read_rgb(scene)
        row = [image.resize((image.width * _SCALE, image.height * _SCALE), Image.Resampling.BICUBIC)]
        for segmenter in segmenters:
            result = segmenter(image)
            record = {"image": scene.name, "model": BUNDLED_MODEL.name, "task": segmenter.task}
            try:
                overlay = write_result(options.output, f"{scene.stem}.{segmenter.task}", result, record, scale=_SCALE)
            except ImageError as error:
                raise CommandError(str(error)) from error
            row.append(Image.open(overlay))
            print(f"  {segmenter.task:<9} {result}")
        rows.append(row)
    sheet = options.output / "demo.png"
    picture = contact_sheet(rows, [scene.stem for scene in scenes], ["scene", *TASKS])
    with write_errors(sheet), tempfile.TemporaryDirectory(dir=options.output, prefix=".m2f-") as work:
        picture.save(Path(work, sheet.name))
        os.replace(Path(work, sheet.name), sheet)
    print(f"\nSee {sheet}; next to it are an overlay, an id map and a JSON file for each scene and task.")
    return 0
