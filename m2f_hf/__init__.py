"""Mask2Former as a Hugging Face-style package."""

__version__ = "0.1.0"
