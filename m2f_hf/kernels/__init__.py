"""Faster ways to compute a layer, each next to the plain layer that it replaces."""
