"""What several environments share: checked parameters, random streams, token names, the value of one sparse reward."""

import math

import numpy as np

from shiq_lab.errors import bad

BOS = "<bos>"
EOS = "<eos>"
# No environment needs larger rewards, and sums of a few thousand of them stay exact to 1e-6 in float64.
LARGEST = 1e6


def at_least(name: str, value: object, least: int, most: int | None = None) -> int:
    """A whole-number parameter, checked; the error names it."""
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):  # type: ignore[operator]
        upto = f" and <= {most}" if most is not None else ""
        raise bad(name, f"a whole number >= {least}{upto}", repr(value))
    return int(value)  # type: ignore[call-overload]


def number(name: str, value: object, least: float = -LARGEST, most: float = LARGEST, *, above: float | None = None) -> float:
    """A real parameter in [least, most], or in (above, most]; NaN, infinities and booleans are refused by name."""
    real = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    low = least if above is None else above
    # A comparison with NaN is false, so NaN fails here; ints too large for a float compare exactly.
    if not real or not low <= value <= most or value == above:  # type: ignore[operator]
        raise bad(name, f"a number {'>=' if above is None else '>'} {low:g} and <= {most:g}", repr(value))
    return float(value)  # type: ignore[arg-type]


def checked_seed(seed: object) -> int:
    """A seed from 0 to 2^32 - 1."""
    return at_least("seed", seed, 0, 2**32 - 1)


def stream(seed: object, number: int = 1) -> np.random.Generator:
    """An environment's own random numbers; `number` >= 1 keeps streams apart.

    random_reference draws from default_rng(seed) itself. Drawing rewards from that too would make them equal to the
    reference logits, and a loss that mixes the two up would pass.
    """
    return np.random.default_rng([checked_seed(seed), number])


def names(prefix: str, n: int) -> list[str]:
    """["a0", "a1", ...]"""
    return [f"{prefix}{i}" for i in range(n)]


def sparse_value(probability: float, reward: float, beta: float) -> float:
    """v* where one reward R is paid with probability p under the reference and nothing else is, at gamma = 1:

    v* = beta ln E_ref exp(R/beta) = beta ln(1 + p (exp(R/beta) - 1)).   p -> 1: v* = R; beta -> infinity: v* = p R.
    expm1 and log1p keep it accurate for p down to 1e-300; R/beta must stay below 709.
    """
    return beta * math.log1p(probability * math.expm1(reward / beta))
