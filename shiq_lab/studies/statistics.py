"""What is said of many seeds: the interquartile mean and its bootstrap interval (Agarwal et al. 2021, arXiv 2108.13264)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from shiq_lab.errors import at_least, bad, is_real
from shiq_lab.graph import Floats


def iqm(x: ArrayLike, axis: int = 0) -> Floats:
    """The interquartile mean: what is left when a quarter of the values is cut off at either end, float[...] without `axis`.

    Where a quarter is no whole number of values, as many whole values as it holds are cut (n = 10: two at either end).
    """
    values = np.sort(np.asarray(x, dtype=np.float64), axis)
    n = values.shape[axis]
    if n == 0:
        raise bad("x", "at least one value", "none")
    found: Floats = np.take(values, range(n // 4, n - n // 4), axis).mean(axis)
    return found


@dataclass(frozen=True)
class Interval:
    """A statistic of many seeds and the interval that bootstrap resamples of the seeds give it; floats, or lists for curves."""

    value: float | list[float]
    low: float | list[float]
    high: float | list[float]
    n: int


def interval(
    x: ArrayLike, statistic: Callable[..., Floats] = iqm, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """statistic(x) over the first axis (seeds), and the percentiles of it over `resamples` resamples of the seeds.

    x is float[n] or float[n, ...]; entries are resampled together, so a curve stays a curve. For few seeds the percentile
    bootstrap is somewhat too narrow. Raises ValueError for NaN and for no values.
    """
    values = np.asarray(x, dtype=np.float64)
    if values.ndim == 0 or values.shape[0] == 0 or np.isnan(values).any():
        raise bad("x", "at least one value a seed, none of them NaN", f"shape {values.shape}")
    if not is_real(level) or not 0 < level < 1:
        raise bad("level", "a number between 0 and 1", repr(level))
    n = values.shape[0]
    draws = np.random.default_rng(seed).integers(n, size=(at_least("resamples", resamples, 1), n))
    many = statistic(values[draws], axis=1)  # (resamples, ...)
    low, high = np.quantile(many, [(1 - level) / 2, (1 + level) / 2], axis=0)
    value, low, high = (np.asarray(part).tolist() for part in (statistic(values, axis=0), low, high))
    return Interval(value, low, high, n)


def said(x: Mapping[str, Any], form: str = ".3g") -> str:
    """A number and its interval, as claims tell them: "0.17 [0.09, 0.38]"; x has `value`, `low` and `high`."""
    return f"{x['value']:{form}} [{x['low']:{form}}, {x['high']:{form}}]"
