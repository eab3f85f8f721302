"""Backends of the public maths in :mod:`approxdrop_lightning.functional`."""
