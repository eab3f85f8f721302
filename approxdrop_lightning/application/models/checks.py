"""Validation of hyperparameters."""


def check_rate(rate: float) -> float:
    """Return ``rate``; raise ``ValueError`` unless it is a single number in [0, 1)."""
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < 1:
        raise ValueError(f"dropout rate {rate} is outside [0, 1); this model has one rate for all sites")
    return rate


def check_counts(**values: int) -> None:
    """Raise ``ValueError`` naming the first value that is not an integer of at least 1."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
