"""The operations behind :mod:`approxdrop_lightning.functional`: one folder per operation, with its backends."""
