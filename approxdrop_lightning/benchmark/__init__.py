"""Whole training steps, side by side: ``python -m approxdrop_lightning.benchmark --help``."""
