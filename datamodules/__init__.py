"""MNIST and Penn Treebank, each with embedded real data for machines without files or network access."""

from datamodules.mnist import MNISTDataModule
from datamodules.ptb import PTBDataModule

__all__ = ["MNISTDataModule", "PTBDataModule"]
