"""The operations behind :mod:`approxdrop_lightning.functional`: a folder for each, with definition and backends."""
