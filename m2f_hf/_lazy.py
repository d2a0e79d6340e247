"""Names that a package imports when they are first asked for (PEP 562), and old module paths, kept for one version."""

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any


# Old module -> the modules that its names are in now.
MOVED_MODULES: Mapping[str, tuple[str, ...]] = {
    "checkpoint_lookup": ("known.lookup",),
    "configuration_mask2former": ("model.configuration",),
    "data.masks": ("processing.rle", "data"),
    "data.moving_shapes": ("data.synthetic.moving_shapes",),
    "data.recipes": ("known.recipes",),
    "data.shapes": ("data.synthetic.shapes",),
    "image_processing_mask2former": ("processing.image_processor",),
    "images": ("processing.images",),
    "label_sets": ("known.label_sets",),
    "modeling_mask2former": ("model.modeling",),
    "modeling_mask2former_video": ("model.modeling_video",),
    "multi_scale_deformable_attention": ("kernels.deformable_attention",),
    "optimization": ("training.optimization",),
    "point_sampling": ("loss.points",),
    "post_processing": ("processing.post_processing", "processing.rle"),
    "stock_checkpoints": ("known.stock_checkpoints",),
    "test_time_augmentation": ("inference.test_time_augmentation",),
    "tracking": ("inference.tracking",),
    "video_processing_mask2former": ("processing.video_processor",),
    "visualization": ("draw.segments",),
}


def lazy_names(
    package: str, names: Mapping[str, Sequence[str]], *, is_deprecated: bool = False
) -> Callable[[str], Any]:
    """Return a `__getattr__` for a package that imports a name from its module when it is first asked for.

    Args:
        package: the package's name.
        names: module, relative to `package` such as ".model.modeling" -> the names it gives.
        is_deprecated: whether each use warns, and says where the name is now.
    """
    modules = {name: module for module, given in names.items() for name in given}

    def __getattr__(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = import_module(modules[name], package)
        if is_deprecated:
            _warn(f"{package}.{name}", f"{module.__name__}.{name}")
        return getattr(module, name)

    return __getattr__


class _MovedModule(ModuleType):
    """A module that looks its names up where they are now, and warns."""

    def __init__(self, name: str, modules: tuple[str, ...]) -> None:
        super().__init__(name, f"Moved to {' and '.join(modules)}.")
        self.__dict__["_modules"] = modules

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__"):  # inspect and others look into every module for these
            for source in self._modules:
                module = import_module(source)
                if hasattr(module, name):
                    _warn(f"{self.__name__}.{name}", f"{source}.{name}")
                    return getattr(module, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


def add_moved_modules(package: str) -> None:
    """Let `import m2f_hf.visualization` and the other old paths work; their names warn when they are used."""
    for old, new in MOVED_MODULES.items():
        module = _MovedModule(f"{package}.{old}", tuple(f"{package}.{each}" for each in new))
        sys.modules[module.__name__] = module
        if "." not in old:
            setattr(sys.modules[package], old, module)


def _warn(old: str, new: str) -> None:
    warnings.warn(f"{old} is now {new}; the old name goes in version 0.2", DeprecationWarning, stacklevel=3)
