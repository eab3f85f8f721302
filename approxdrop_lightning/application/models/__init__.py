"""Ordinary LightningModules, written with stock layers; none knows of the plugin."""

from approxdrop_lightning.application.models.lstm import LSTMLanguageModel
from approxdrop_lightning.application.models.mlp import MLPClassifier
from approxdrop_lightning.application.models.transformer import TransformerLanguageModel

__all__ = ["LSTMLanguageModel", "MLPClassifier", "TransformerLanguageModel"]
