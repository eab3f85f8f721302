"""The training application behind ``train.py``: models, checkpoints, results. The library never imports it."""
