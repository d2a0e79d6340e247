"""Publishing: model cards, the code that travels with a checkpoint, uploads."""

from .push import CARD, CONFIG, PROCESSOR, Figure, HubFolder, model_card, result_files


__all__ = ["CARD", "CONFIG", "PROCESSOR", "Figure", "HubFolder", "model_card", "result_files"]
