"""Registration of the dropout options with Hydra, generated from their single definition."""

from __future__ import annotations

from hydra.core.config_store import ConfigStore

from approxdrop_lightning.options import CallbackOptions, defaults


def register() -> None:
    """Store the options and their defaults as ``options/dropout``, the base of the configs in ``conf/dropout``."""
    target = {"_target_": "approxdrop_lightning.ApproxDropout"}
    ConfigStore.instance().store(group="options", name="dropout", node=target | defaults(CallbackOptions))
