"""Fine-tuning: options, the plan made from them, the trainer, checkpoints to resume from, optimization, classes."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names


__all__ = [
    "FinetuningArguments",
    "parse_options",
    "finetune",
    "Data",
    "open_data",
    "Start",
    "load_start",
    "Plan",
    "make_plan",
    "Trainer",
    "set_classes",
    "find_checkpoint",
    "load_checkpoint",
    "save_checkpoint",
]

if TYPE_CHECKING:
    from ..metrics.options import parse_options
    from .arguments import FinetuningArguments
    from .checkpoints import find_checkpoint, load_checkpoint, save_checkpoint
    from .classes import set_classes
    from .plan import Data, Plan, make_plan, open_data
    from .run import finetune
    from .start import Start, load_start
    from .trainer import Trainer
else:
    __getattr__ = lazy_names(  # what needs Accelerate is imported only where it is used
        __name__,
        {
            "..metrics.options": ["parse_options"],
            ".arguments": ["FinetuningArguments"],
            ".checkpoints": ["find_checkpoint", "load_checkpoint", "save_checkpoint"],
            ".classes": ["set_classes"],
            ".plan": ["Data", "Plan", "make_plan", "open_data"],
            ".run": ["finetune"],
            ".start": ["Start", "load_start"],
            ".trainer": ["Trainer"],
        },
    )
