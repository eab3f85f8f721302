"""Dropout that skips the work it drops, for PyTorch Lightning."""

from approxdrop_lightning import functional
from approxdrop_lightning.callback import ApproxDropout
from approxdrop_lightning.cuda_graph_step import CudaGraphStep
from approxdrop_lightning.distribution import PatternDistribution
from approxdrop_lightning.layers import ApproxLinear, ApproxLSTM
from approxdrop_lightning.memory import keep_freed_memory
from approxdrop_lightning.monitor import ThroughputLogger
from approxdrop_lightning.patterns.row import RowPattern
from approxdrop_lightning.patterns.sampler import PatternSampler
from approxdrop_lightning.patterns.tile import TilePattern
from approxdrop_lightning.surgery import approximate, resample, restore

__all__ = [
    "ApproxDropout",
    "ApproxLSTM",
    "ApproxLinear",
    "CudaGraphStep",
    "PatternDistribution",
    "PatternSampler",
    "RowPattern",
    "ThroughputLogger",
    "TilePattern",
    "approximate",
    "functional",
    "keep_freed_memory",
    "resample",
    "restore",
]

__version__ = "0.1.0"  # the only place; pyproject.toml reads it
