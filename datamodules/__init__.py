"""MNIST and Penn Treebank, each with real data embedded for machines without files and network."""

from datamodules.mnist import MNISTDataModule
from datamodules.ptb import PTBDataModule

__all__ = ["MNISTDataModule", "PTBDataModule"]
