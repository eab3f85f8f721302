"""Layers that skip dropped work; subclasses of the stock layers with the same parameters."""

from approxdrop_lightning.layers.compact_tensor import CompactTensor
from approxdrop_lightning.layers.dropout import ApproxDropoutSite
from approxdrop_lightning.layers.linear import ApproxLinear, CapturedLinear
from approxdrop_lightning.layers.lstm import ApproxLSTM
from approxdrop_lightning.layers.site import Site
from approxdrop_lightning.layers.tile_site import TileSite
from approxdrop_lightning.layers.tiles import TileLinear, TileLSTM

__all__ = [
    "ApproxDropoutSite",
    "ApproxLSTM",
    "ApproxLinear",
    "CapturedLinear",
    "CompactTensor",
    "Site",
    "TileLSTM",
    "TileLinear",
    "TileSite",
]
