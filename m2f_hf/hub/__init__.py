"""Publishing: model cards, the code that travels with a checkpoint, uploads."""
