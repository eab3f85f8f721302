"""Hydra configs of the callback, found by applications through the search path plugin."""
