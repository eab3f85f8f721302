"""MNIST and Penn Treebank, each with an embedded stand-in for machines without data and network."""

from datamodules.mnist import MNISTDataModule
from datamodules.ptb import PTBDataModule

__all__ = ["MNISTDataModule", "PTBDataModule"]
