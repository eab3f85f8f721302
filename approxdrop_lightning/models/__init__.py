"""Two ordinary LightningModules, written with stock layers; neither knows of the plugin."""

from approxdrop_lightning.models.lstm import LSTMLanguageModel
from approxdrop_lightning.models.mlp import MLPClassifier

__all__ = ["LSTMLanguageModel", "MLPClassifier"]
