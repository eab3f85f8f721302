"""Plain LightningModules built from stock layers; none of them depends on the plugin."""

from approxdrop_lightning.application.models.ctr import ClickModel
from approxdrop_lightning.application.models.lstm import LSTMLanguageModel
from approxdrop_lightning.application.models.mlp import MLPClassifier
from approxdrop_lightning.application.models.sign import SIGNClassifier
from approxdrop_lightning.application.models.transformer import TransformerLanguageModel

__all__ = ["ClickModel", "LSTMLanguageModel", "MLPClassifier", "SIGNClassifier", "TransformerLanguageModel"]
