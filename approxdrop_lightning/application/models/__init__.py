"""Two ordinary LightningModules, written with stock layers; neither knows of the plugin."""

from approxdrop_lightning.application.models.lstm import LSTMLanguageModel
from approxdrop_lightning.application.models.mlp import MLPClassifier

__all__ = ["LSTMLanguageModel", "MLPClassifier"]
