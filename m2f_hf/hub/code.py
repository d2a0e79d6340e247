"""The Python files that run a published checkpoint without this package, flattened into one folder."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

from .families import IMAGES, Family, read_settings


CODE = "code"  # folder of the published Python files


def code_files(family: Family = IMAGES) -> dict[str, str]:
    """Return the code that runs a model without this package: path in the repository -> text.

    `transformers` copies the file of a class and what it reaches by `from .x import y` within one folder. So the
    modules of the Auto classes and all that they import from this package are written into the folder `code/`, each
    under its path joined by `_`: `kernels/chunks.py` becomes `code/kernels_chunks.py`, and `from ..kernels.chunks
    import` becomes `from .kernels_chunks import`.

    Raises:
        ImportError: a module imports a package instead of names of a module, which could not be followed.
    """
    files: dict[str, str] = {}
    modules = [cls.__module__ for by_name in family.auto_classes.values() for cls in by_name.values()]
    while modules:
        module = modules.pop()
        name = f"{CODE}/{_flat_name(module)}.py"
        if name not in files:
            text = Path(str(sys.modules[module].__file__)).read_text(encoding="utf-8")
            files[name], imported = _flatten_imports(text, module)
            modules += imported
    return dict(sorted(files.items()))


def add_auto_map(file: Path, family: Family = IMAGES) -> str:
    """Return the text of a settings file with an `auto_map`, which says where its classes are in `code/`."""
    settings = read_settings(file)
    settings["auto_map"] = {
        auto_class: f"{CODE}/{_flat_name(cls.__module__)}.{cls.__name__}"
        for auto_class, cls in family.auto_classes[file.name].items()
    }
    return json.dumps(settings, indent=2, sort_keys=True) + "\n"


def _flat_name(module: str) -> str:
    """`m2f_hf.kernels.chunks` -> `kernels_chunks`."""
    return "_".join(module.split(".")[1:])


def _flatten_imports(text: str, module: str) -> tuple[str, list[str]]:
    """Return a module's text with its relative imports as they are in `code/`, and the modules that they name."""
    imported: list[str] = []

    def flatten(statement: re.Match[str]) -> str:
        absolute = importlib.util.resolve_name(statement["source"], module.rpartition(".")[0])
        if hasattr(sys.modules.get(absolute), "__path__") or "." not in absolute:
            raise ImportError(f"{module} imports from the package {absolute}: name the module, to have it published")
        imported.append(absolute)
        return f"{statement['start']}.{_flat_name(absolute)} import"

    return re.sub(r"^(?P<start>\s*from )(?P<source>\.[.\w]*) import", flatten, text, flags=re.MULTILINE), imported
