"""Registers the dropout options with Hydra, from the one place that defines them."""

from __future__ import annotations

from hydra.core.config_store import ConfigStore

from approxdrop_lightning.options import CallbackOptions, defaults


def register() -> None:
    """Store the options, with their defaults, as ``options/dropout``, from which ``conf/dropout`` starts."""
    target = {"_target_": "approxdrop_lightning.ApproxDropout"}
    ConfigStore.instance().store(group="options", name="dropout", node=target | defaults(CallbackOptions))
