"""One form for every complaint: the argument, what was expected, what came, and the remedy; and the checks of plain numbers."""

import difflib
import math
import sys
from collections.abc import Iterable

import numpy as np


def bad(argument: str, expected: str, received: object, remedy: str = "") -> ValueError:
    """Return (not raise) the ValueError that says all four; `raise bad(...)` keeps the traceback at the caller."""
    return ValueError(f"{argument}: expected {expected}, got {received}." + (f" {remedy}" if remedy else ""))


def unknown(argument: str, expected: str, received: object, known: Iterable[str]) -> ValueError:
    """The ValueError for a name that is not among the known ones; it suggests the nearest, whatever its case."""
    names = {name.lower(): name for name in known}
    near = difflib.get_close_matches(str(received).lower(), names, n=1)
    hint = f"Did you mean {names[near[0]]!r}?" if near else f"Known: {', '.join(names.values())}."
    return bad(argument, expected, repr(received), hint)


def is_whole(value: object) -> bool:
    """A whole number of Python or numpy; True and False are none."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def is_real(value: object) -> bool:
    """A number of Python or numpy that float64 can hold, infinities and NaN included; True and False are none."""
    if is_whole(value):
        return abs(value) <= sys.float_info.max  # type: ignore[arg-type]
    return isinstance(value, (float, np.floating))


def at_least(argument: str, value: object, least: int, remedy: str = "") -> int:
    """A whole number >= least, else a ValueError."""
    if not is_whole(value) or value < least:  # type: ignore[operator]
        raise bad(argument, f"a whole number >= {least}", repr(value), remedy)
    return int(value)  # type: ignore[call-overload]


def check_beta(beta: object) -> float:
    """beta as a float > 0, else a ValueError."""
    if not is_real(beta) or not 0 < beta < math.inf:  # type: ignore[operator]
        raise bad("beta", "a finite number > 0", repr(beta))
    return float(beta)  # type: ignore[arg-type]


def check_gamma(gamma: object) -> float:
    """gamma as a float in (0, 1], else a ValueError."""
    if not is_real(gamma) or not 0 < gamma <= 1:  # type: ignore[operator]
        raise bad("gamma", "a number in (0, 1]", repr(gamma))
    return float(gamma)  # type: ignore[arg-type]
