"""Benchmark of whole training steps: ``python -m approxdrop_lightning.benchmark --help``."""
