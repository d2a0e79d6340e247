"""Publish checkpoints: families, model cards, the code that travels with the weights, uploads."""

from .card import Figure, model_card, result_files
from .push import HubFolder


__all__ = ["Figure", "HubFolder", "model_card", "result_files"]
