"""What several environments share: checked parameters and token names."""

import numpy as np

from shiq_lab.errors import bad

BOS = "<bos>"


def at_least(name: str, value: object, least: int, most: int | None = None) -> int:
    """A whole-number parameter, checked; the error names it."""
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):  # type: ignore[operator]
        upto = f" and <= {most}" if most is not None else ""
        raise bad(name, f"a whole number >= {least}{upto}", repr(value))
    return int(value)  # type: ignore[call-overload,no-any-return]


def names(prefix: str, n: int) -> list[str]:
    """["a0", "a1", ...]"""
    return [f"{prefix}{i}" for i in range(n)]
